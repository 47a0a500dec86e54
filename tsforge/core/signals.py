"""Polite endings: a termination signal becomes an exception, so that open work is marked and closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); treated like Ctrl-C everywhere."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(f"ended by signal {signal.Signals(number).name}")


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` inside the block.

    A handler that somebody else installed is respected, and outside the main thread nothing changes (signals cannot be
    caught there).
    """
    usable = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not usable:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C or SIGTERM behind ``error``, however wrapped (a trainer may turn it into ``SystemExit``)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
