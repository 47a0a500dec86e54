"""What the tests of kernels share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

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
