"""What the tests of kernels share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tsforge.ops import compiled


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
def two_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads also for little work, in the module that the test file calls ``module``."""
    before = torch.get_num_threads()
    monkeypatch.setattr(request.module.module, "_WORK_PER_THREAD", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
