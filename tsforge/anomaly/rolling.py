"""Upper order statistics of a rolling window, exact, in time that hardly depends on the window.

Only values above a moving floor are kept sorted; the rest of the window is counted, not ordered. When expiry leaves too
few above the floor, the floor is found again from the raw window (a partition, rare).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
_SLACK = 64
_ROOM = 1_024  # rows, at first


class RollingLargest:
    """The k-th largest of the last ``window`` numbers pushed, for k that vary slowly."""

    def __init__(self, window: int, values: ArrayLike = ()) -> None:
        start = np.asarray(values, dtype=np.float64).ravel()[-window:]
        self.window = window
        self.size = int(start.size)
        self._ring = start.copy()  # grows with the rows up to the window, which may be longer than any stream
        self._next = self.size % window
        self._top: list[float] = []
        self._floor = np.nan  # nothing is kept sorted until a rank is asked for
        self._wanted = 0
        self._limit = 0

    def push(self, value: float) -> None:
        """Append a number; the oldest leaves when the window is full."""
        place = self._next
        if self.size == self.window:
            old = float(self._ring[place])
            if old >= self._floor:
                del self._top[bisect_left(self._top, old)]
        else:
            self._reserve(place + 1)
            self.size += 1
        self._ring[place] = value
        self._next = place + 1 if place + 1 < self.window else 0
        if value >= self._floor:
            insort(self._top, value)
            if len(self._top) > self._limit:
                self._trim()

    def kth_largest(self, k: int) -> float:
        """Return the k-th largest number of the window, 1 <= k <= size."""
        if k > len(self._top):
            self._rebuild(k)
        return self._top[-k]

    def sweep(self, values: FloatArray, ranks: Callable[[int], tuple[int, int]]) -> tuple[FloatArray, FloatArray]:
        """Return two order statistics of the window before each value, pushing the values one after another.

        Equal to ``kth_largest`` and ``push`` in turn. Only rows that enter or leave the sorted part change a level; the
        stretches between them are filled at once.

        Args:
            values: [N] numbers.
            ranks: window size -> (small rank, large rank), neither falling as the window grows.
        """
        high, low = np.empty(values.size), np.empty(values.size)
        done = 0
        while done < values.size:
            small, large = ranks(self.size)
            count = min(values.size - done, self.window - self._next)
            if self.size < self.window and ranks(self.size + count - 1) != (small, large):
                # the ranks rarely change while the window grows: take the stretch of sizes over which they do not
                count = 1 + bisect_left(
                    range(1, count), True, key=lambda more: ranks(self.size + more) != (small, large)
                )
            block = slice(done, done + count)
            done += self._sweep_block(values[block], high[block], low[block], small, large)
        return high, low

    def _sweep_block(self, values: FloatArray, high: FloatArray, low: FloatArray, small: int, large: int) -> int:
        """Sweep values at constant ranks until the floor moves; return how many were taken."""
        level_low, level_high = self.kth_largest(large), self.kth_largest(small)
        floor, place, top, count = self._floor, self._next, self._top, values.size
        is_full = self.size == self.window
        old = self._ring[place : place + count].copy() if is_full else np.full(count, -np.inf)
        busy = np.flatnonzero((values >= floor) | (old >= floor)) if is_full else np.flatnonzero(values >= floor)
        taken = 0
        for j, entering, leaving in zip(busy.tolist(), values[busy].tolist(), old[busy].tolist(), strict=True):
            low[taken : j + 1] = level_low
            high[taken : j + 1] = level_high
            taken = j + 1
            if is_full and leaving >= floor:
                del top[bisect_left(top, leaving)]
            if entering >= floor:
                insort(top, entering)
            if len(top) < large or len(top) > self._limit:
                break
            level_low, level_high = top[-large], top[-small]
        else:
            low[taken:] = level_low
            high[taken:] = level_high
            taken = count
        if not is_full:
            self._reserve(place + taken)
        self._ring[place : place + taken] = values[:taken]
        self._next = (place + taken) % self.window
        self.size = min(self.size + taken, self.window)
        if len(top) > self._limit:
            self._trim()
        return taken

    def values(self) -> FloatArray:
        """Return the window in time order, oldest first: the whole state."""
        if self.size < self.window:
            return self._ring[: self.size].copy()
        return np.roll(self._ring, -self._next)

    def _reserve(self, rows: int) -> None:
        """Make room for so many rows, and for as many again while the window is not full."""
        if rows > self._ring.size:
            larger = np.empty(min(self.window, max(2 * rows, _ROOM)))
            larger[: self.size] = self._ring[: self.size]
            self._ring = larger

    def _rebuild(self, k: int) -> None:
        self._wanted = k
        keep = min(self.size, 2 * k + _SLACK)
        held = self._ring[: self.size]
        self._floor = float(np.partition(held, self.size - keep)[self.size - keep])
        self._top = np.sort(held[held >= self._floor]).tolist()
        self._set_limit()

    def _trim(self) -> None:
        """Raise the floor; values equal to it stay, or their expiry would miss them."""
        self._floor = self._top[-(2 * self._wanted + _SLACK)]
        self._top = self._top[bisect_left(self._top, self._floor) :]
        self._set_limit()

    def _set_limit(self) -> None:
        """Trim again only after the list has doubled: with many ties it cannot be made short."""
        self._limit = max(4 * (self._wanted + _SLACK), 2 * len(self._top))
