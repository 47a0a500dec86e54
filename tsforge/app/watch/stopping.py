"""How a watch is asked to end: signals become a wish that is granted after the turn."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """What SIGTERM and Ctrl-C ask for: to end after the turn. A second signal interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listen while the block runs; must be called from the main thread."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            os.write(self._writer, b"x")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._reader)
            os.close(self._writer)

    def wait(self, seconds: float, also: int | None = None) -> None:
        """Wait, at most until a signal comes or the file descriptor ``also`` has something to read."""
        handles = [self._reader] if also is None else [self._reader, also]
        select.select(handles, [], [], max(0.0, seconds))
