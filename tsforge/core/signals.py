"""Polite endings: a termination signal becomes an exception, so that open work is marked and closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


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


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM wait while the block runs; yield the list that takes those that came.

    For a few steps that belong together, such as publishing and writing that down. The caller says what the signals
    came too late for. Handlers of others are left alone, and outside the main thread nothing changes.
    """
    came: list[int] = []
    held: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        held = {number: old for number, old in held.items() if old in (_raise, signal.default_int_handler)}
    for number in held:
        signal.signal(number, lambda found, frame: came.append(found))
    try:
        yield came
    finally:
        for number, old in held.items():
            signal.signal(number, old)


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C or SIGTERM behind ``error``, however wrapped (a trainer may turn it into ``SystemExit``)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
