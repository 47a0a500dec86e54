"""What the tests of kernels share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tsforge.ops import _plrnn_compiled, _scan2d_compiled, compiled, encoder_lstm


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the module of compiled kernels logs, whatever the shells did to the loggers above it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = compiled.logger.level
    compiled.logger.addHandler(handler)
    compiled.logger.setLevel(logging.INFO)
    yield records
    compiled.logger.removeHandler(handler)
    compiled.logger.setLevel(level)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads also for little work, in every kernel."""
    before = torch.get_num_threads()
    for kernel in (_plrnn_compiled, _scan2d_compiled, encoder_lstm):
        monkeypatch.setattr(kernel, "_WORK_PER_THREAD", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
