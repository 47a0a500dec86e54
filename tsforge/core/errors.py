"""The errors tsforge raises on purpose. Each message says what, where, how many and what to do.

A shell (command line, pipeline, dashboard) prints ``str(error)`` and exits with ``error.exit_code``; a traceback is
only ever shown for a bug in tsforge itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TsforgeError(Exception):
    """Base of every error a user can cause; never raised itself."""

    exit_code = 1


class ConfigError(TsforgeError):
    """A setting is unknown, of the wrong type, out of range or contradicts another one."""

    exit_code = 2


class DataError(TsforgeError):
    """Rows, columns or timestamps do not satisfy the contract of a ``SeriesFrame``."""

    exit_code = 3


class EmptySpanError(DataError):
    """No row lies in the span that was asked for: new rows may still come."""


class ModelError(TsforgeError):
    """A model cannot be built, trained or applied as asked."""

    exit_code = 4


class ArtifactError(TsforgeError):
    """A stored model is missing, damaged, of a newer format or does not fit the data."""

    exit_code = 5


class BackendError(TsforgeError):
    """A database, tracking server, disk or device did not do its part."""

    exit_code = 6


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest choice, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def listing(values: Iterable[object], limit: int = 5) -> str:
    """Return values separated by commas, cut after ``limit`` with the count of the rest (for messages)."""
    items = [str(value) for value in values]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
