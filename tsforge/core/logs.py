"""Structured log lines on standard error; the library only logs, shells decide the format."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

_QUIET = (
    "alembic",
    "mlflow",
    "lightning.pytorch",
    "lightning.fabric",
    "apscheduler",
    "urllib3",
    "matplotlib",
    "sqlalchemy",
)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; it lies below ``tsforge`` so that one setting reaches all of them."""
    return logging.getLogger(name if name.startswith("tsforge") else f"tsforge.{name}")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        tail = "".join(f" {key}={_short(value)}" for key, value in fields.items() if value is not None)
        return f"{record.levelname.lower():7s} {record.getMessage()}{tail}"


def _short(value: object) -> object:
    """Return what a person reads: six digits of a fraction; records in JSON keep them all."""
    return f"{value:.6g}" if isinstance(value, float) else value


def configure_logging(level: str = "info", *, as_json: bool = False) -> None:
    """Send tsforge's logs and Python's warnings to standard error, one line a record; called once by a shell.

    Args:
        level: lowest level shown (``debug``, ``info``, ``warning``, ``error``).
        as_json: one JSON object a line instead of text, for log collectors.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    root = logging.getLogger("tsforge")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning without the place in our code that gave it, which says nothing to who runs a command."""
    get_logger("warnings").warning("%s", " ".join(str(message).split()))


def log_event(logger: logging.Logger, message: str, **fields: object) -> None:
    """Log one structured line at info level: a message plus named fields."""
    logger.info(message, extra={"fields": fields})


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[tuple[str, object]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, record.msg)  # the text without its figures
        is_new = record.levelno < logging.WARNING or kind not in self._told
        self._told.add(kind)
        return is_new


@contextmanager
def warned_once(*modules: str) -> Iterator[None]:
    """Let each kind of warning of some modules through once: what holds for a hundred fits is said of the first."""
    once, loggers = _Once(), [get_logger(module) for module in modules]
    for logger in loggers:
        logger.addFilter(once)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(once)
