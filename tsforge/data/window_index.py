"""Which windows a panel has, by rule instead of by list: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsforge.data.grid import Bools, Ints
from tsforge.data.panel import Panel

BLOCK = 65_536  # windows, or rows, looked at in one go: a few MB
_MAX_STEPS = 4  # more cost as much as a binary search

Span: TypeAlias = tuple[int | None, int | None]
Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]  # int32 or int64


@dataclass(frozen=True, eq=False)
class WindowIndex:
    """Items in runs: those of run r are cutoffs ``stride`` rows apart from ``first[r]`` on.

    An item is one window, and run r holds those of series r; or, *aligned*, one cutoff with a window of every series.

    Attributes:
        first: int64 [R], cutoff of the first item of each run (whatever where a run is empty).
        ends: int64 [R], items in this run and all before it.
        stride: rows between neighbouring cutoffs of a run.
        num_series: series of the panel.
        aligned: an item has ``num_series`` windows.
        kept: int32 or int64 [num_items], the numbers of the items that are left, in their order; None = all.
    """

    first: Ints
    ends: Ints
    stride: int
    num_series: int
    aligned: bool = False
    kept: Numbers | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return self.num_counted if self.kept is None else len(self.kept)

    @property
    def num_counted(self) -> int:
        """Items of all runs, those left out of ``kept`` included."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.first.nbytes + self.ends.nbytes + (0 if self.kept is None else self.kept.nbytes)

    def select(self, items: Numbers) -> WindowIndex:
        """Return the index of some items (numbers below ``len``), in the given order."""
        kept = items if self.kept is None else self.kept[items]
        return replace(self, kept=kept.astype(smallest_type(self.num_counted), copy=False))

    def edges(self) -> tuple[Ints, Ints, Ints]:
        """Return number, first and last cutoff of every run that is not empty."""
        counts = np.diff(self.ends, prepend=0)
        used = np.flatnonzero(counts)
        return used, self.first[used], self.first[used] + (counts[used] - 1) * self.stride


def smallest_type(count: int) -> type[np.int32] | type[np.int64]:
    """Return int32 where it can number ``count`` things."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


class WindowLocator:
    """Says where the windows of items are; its tables (a few numbers a run) live on a device.

    A table of guesses by equal stretches of item numbers leaves a few steps to the run that holds an item; where runs
    differ so much in length that they would be many, a binary search takes their place.
    """

    def __init__(self, index: WindowIndex, device: torch.device) -> None:
        self.index = index
        run = index.edges()[0]
        ends, total = index.ends[run], index.num_counted
        starts = np.concatenate([[0], ends])[: len(run)]
        self._shift = int(np.log2(max(total / (4 * max(len(run), 1)), 1.0)))
        stretch = np.arange((total >> self._shift) + 1) << self._shift
        guess = np.searchsorted(ends, stretch, side="right")
        last = np.minimum(np.searchsorted(ends, stretch + (1 << self._shift) - 1, side="right"), len(run) - 1)
        self._steps = int((last - guess).max(initial=0))
        tables = (run, ends, index.first[run] - starts * index.stride, guess)  # the third: cutoff less number x stride
        self._run, self._ends, self._base, self._guess = (torch.from_numpy(table).to(device) for table in tables)

    def locate(self, items: Numbers) -> tuple[Tensor, Tensor]:
        """Return series and cutoff, int64 [num_windows], of the windows of some items, item after item."""
        index = self.index
        chosen = items if index.kept is None else index.kept[items]
        number = torch.from_numpy(chosen).to(self._ends.device, torch.int64)
        if self._steps > _MAX_STEPS:
            place = torch.searchsorted(self._ends, number, right=True)
        else:
            place = self._guess.index_select(0, number >> self._shift)
            for _ in range(self._steps):
                place = place + (self._ends.index_select(0, place) <= number)
        cutoff = self._base.index_select(0, place) + number * index.stride
        if not index.aligned:
            return self._run.index_select(0, place), cutoff
        series = torch.arange(index.num_series, device=cutoff.device)
        return series.repeat(len(cutoff)), cutoff.repeat_interleave(index.num_series)


def count_windows(
    panel: Panel, horizon: int, stride: int, span: Span, *, need: int, only: Bools | None, aligned: bool
) -> WindowIndex:
    """Return all windows with ``need`` past rows and the whole target inside a span of absolute rows.

    Args:
        panel: the data.
        horizon: rows of a target.
        stride: rows between the cutoffs, which all series share; they are counted from the first possible one.
        span: ``[start, stop)``, None = open.
        need: rows before a cutoff that a series must have.
        only: bool [num_series], the series that take part; None = all.
        aligned: give the cutoffs at which any series has a window.
    """
    start, stop = span
    present = panel.lengths > 0 if only is None else (panel.lengths > 0) & only
    low = panel.offset + need
    high = panel.offset + panel.lengths
    if start is not None:
        low = np.maximum(low, start)
    if stop is not None:
        high = np.minimum(high, stop)
    anchor = int(low[present].min()) if present.any() else 0
    first = anchor + -(-(low - anchor) // stride) * stride
    counts = np.where(present, np.maximum((high - horizon - first) // stride + 1, 0), 0)
    if not aligned:
        return WindowIndex(first, np.cumsum(counts), stride, panel.num_series)
    starts, ends = _union((first - anchor)[counts > 0] // stride, counts[counts > 0])
    return WindowIndex(anchor + starts * stride, np.cumsum(ends - starts), stride, panel.num_series, aligned=True)


def _union(start: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Return the maximal runs ``[start, end)`` of whole numbers that any of the given runs covers."""
    change = np.zeros(int((start + count).max(initial=0)) + 1, dtype=np.int64)
    np.add.at(change, start, 1)
    np.add.at(change, start + count, -1)
    edge = np.diff((np.cumsum(change) > 0).astype(np.int8), prepend=0)
    return np.flatnonzero(edge > 0), np.flatnonzero(edge < 0)


def keep_observed(panel: Panel, index: WindowIndex, horizon: int, share: float) -> WindowIndex:
    """Return the items of which at least ``share`` of the target cells were observed; the same index when all were.

    Works through the rows in blocks. The targets must lie inside the series of their windows, unless aligned.
    """
    counts = _aligned_counts(panel, index, horizon) if index.aligned else _window_counts(panel, index, horizon)
    cells = (panel.num_series if index.aligned else 1) * horizon * panel.num_targets
    flags = [count / cells >= share for count in counts]
    if all(flag.all() for flag in flags):
        return index
    begin, kept = 0, []
    for flag in flags:
        kept.append((begin + np.flatnonzero(flag)).astype(smallest_type(len(index))))
        begin += len(flag)
    return index.select(np.concatenate(kept))


def _window_counts(panel: Panel, index: WindowIndex, horizon: int) -> Iterator[Ints]:
    """Yield how many target cells of each window were observed, block by block."""
    locator = WindowLocator(index, torch.device("cpu"))
    step = max(BLOCK // index.stride, 1)
    for begin in range(0, len(index), step):
        series, cutoff = (part.numpy() for part in locator.locate(np.arange(begin, min(begin + step, len(index)))))
        row = panel.indptr[series] + cutoff - panel.offset[series]  # ascending, as the windows are
        running = _running(panel.target_observed[row[0] : row[-1] + horizon].sum(axis=1, dtype=np.int64))
        yield running[row + horizon - row[0]] - running[row - row[0]]


def _aligned_counts(panel: Panel, index: WindowIndex, horizon: int) -> Iterator[Ints]:
    """Yield how many target cells of each cutoff were observed in all series together."""
    present = panel.lengths > 0
    origin, stop = int(panel.offset[present].min()), int((panel.offset + panel.lengths)[present].max())
    seen = np.zeros(stop - origin, dtype=np.int64)  # observed cells of each absolute row
    for begin in range(0, panel.num_rows, BLOCK):
        row = np.arange(begin, min(begin + BLOCK, panel.num_rows))
        series = np.searchsorted(panel.indptr, row, side="right") - 1
        counts = panel.target_observed[begin : begin + BLOCK].sum(axis=1, dtype=np.int64)
        np.add.at(seen, row - panel.indptr[series] + panel.offset[series] - origin, counts)
    running = _running(seen)
    items = WindowIndex(index.first, index.ends, index.stride, 1, kept=index.kept)  # each cutoff once
    for begin in range(0, len(items), BLOCK):
        _, cutoff = WindowLocator(items, torch.device("cpu")).locate(np.arange(begin, min(begin + BLOCK, len(items))))
        place = np.clip(cutoff.numpy() - origin, 0, len(seen))
        yield running[np.clip(place + horizon, 0, len(seen))] - running[place]


def _running(counts: Ints) -> Ints:
    """Return sums of everything before each place, [N + 1]."""
    return np.concatenate([[0], np.cumsum(counts)])
