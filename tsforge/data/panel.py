"""Dense arrays of all series, one after another, on one absolute grid: what windows and closed-form fits read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.tensors import TrainingSeries
from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Bools, Ints, TimeGrid, show_time
from tsforge.data.schema import SeriesSchema
from tsforge.data.versions import PanelVersions

_BLOCK = 65_536  # rows checked in one go
_CHANGES = 20  # from row to row that must be lost to say that a column is
_FAINT = 1e-12  # relative: a change that arithmetic may have left behind, unless such changes lead somewhere
_NOISE = 16 * float(np.finfo(np.float64).eps)  # relative: how far apart rounding sets the values of a constant
_LARGE = 1e7  # from here on neighbouring float32 numbers lie 1 apart: below, sums that drift are left in peace
_WANDERING = 24  # mean changes that the values of a constant may lie apart: noise goes to and fro

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ResidentTensors:
    """The panel on a device. Shapes: target [N, V], mask [N, V] bool, past [N, P], known [N, F], static [S_n, S]."""

    target: Tensor
    mask: Tensor
    past: Tensor | None
    known: Tensor | None
    static: Tensor | None


@dataclass(frozen=True, eq=False)
class Panel:
    """Rows of all series one after another.

    Attributes:
        values: float64 [N, C] in the order of ``schema.columns``; unobserved targets are 0, covariates NaN.
        observed: bool [N, C].
        indptr: int64 [num_series + 1], rows of series s are ``indptr[s]:indptr[s + 1]`` (equal for an absent series).
        offset: int64 [num_series], absolute grid index of each first row.
        static: float64 [num_series, S], or None without static columns.
        series_ids: names in the order of ``series_index``.
        schema: roles of the columns.
        grid: where absolute index 0 lies.
        versions: what windows see of cells that were published late or revised (``vintage_panel``); None = every
            cell is what it is.
    """

    values: Floats
    observed: Bools
    indptr: Ints
    offset: Ints
    static: Floats | None
    series_ids: tuple[str, ...]
    schema: SeriesSchema
    grid: TimeGrid
    versions: PanelVersions | None = None
    _resident: dict[tuple[str, torch.dtype], ResidentTensors] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_frame(
        cls, frame: SeriesFrame, grid: TimeGrid | None = None, series_ids: Sequence[str] | None = None
    ) -> Panel:
        """Return the panel of a frame.

        Args:
            frame: the data.
            grid: the absolute grid, usually a fitted model's; default: origin at the frame's first time.
            series_ids: fixes which series has which index, as in training; those absent from the frame get no rows.

        Raises:
            DataError: the frame has another frequency or phase than ``grid``, or a series not in ``series_ids``.
        """
        where = frame.grid if grid is None else grid
        if where.freq != frame.schema.freq:
            raise DataError(f"the data has freq '{frame.schema.freq}', the grid '{where.freq}'; resample the data")
        starts = frame.indptr
        offset = where.index_of(frame.table["time"].gather(starts[:-1]))
        columns = frame.table.select(frame.schema.columns).get_columns()
        values = np.empty((frame.num_rows, len(columns)))
        observed = np.empty(values.shape, dtype=bool)
        for place, column in enumerate(columns):  # one at a time: a second copy of everything may not fit
            # a raw 0 would be a value like any other to a covariate without a mask; NaN lets the scaler put its mean
            fill = 0.0 if place < len(frame.schema.targets) else float("nan")
            values[:, place] = column.fill_null(fill).to_numpy()
            observed[:, place] = column.is_not_null().to_numpy()
        static = None if frame.static is None else frame.static.select(frame.schema.static).to_numpy(writable=True)
        ids = frame.series_ids
        if series_ids is not None and tuple(series_ids) != ids:
            values, observed, starts, offset, static = _reordered(
                (values, observed, starts, offset, static), ids, tuple(series_ids)
            )
            ids = tuple(series_ids)
        return cls(values, observed, starts, offset, static, ids, frame.schema, where)

    @property
    def num_series(self) -> int:
        """Number of series, absent ones included."""
        return len(self.series_ids)

    @property
    def num_rows(self) -> int:
        """Rows of all series together."""
        return len(self.values)

    @property
    def num_targets(self) -> int:
        """V, the number of target columns."""
        return len(self.schema.targets)

    @property
    def lengths(self) -> Ints:
        """int64 [num_series]: rows of each series."""
        return np.diff(self.indptr)

    @property
    def target_observed(self) -> Bools:
        """bool [N, V]: which target cells were observed."""
        return self.observed[:, : self.num_targets]

    def span(self) -> tuple[int, int]:
        """Return absolute rows ``[start, stop)`` from the first row to the last one with an observed target.

        Raises:
            DataError: no target is observed anywhere.
        """
        last = self.last_observed()
        seen = last >= self.offset
        if not seen.any():
            raise DataError("no target is observed in any series")
        return int(self.offset[self.lengths > 0].min()), int(last[seen].max()) + 1

    def last_observed(self) -> Ints:
        """Return int64 [num_series]: absolute row of the last observed target, ``offset - 1`` where there is none."""
        seen = np.flatnonzero(self.target_observed.any(axis=1))
        place = np.searchsorted(seen, self.indptr[1:]) - 1
        row = np.where(place >= 0, seen[place] if len(seen) else -1, -1)
        row = np.where(row >= self.indptr[:-1], row, self.indptr[:-1] - 1)
        result: Ints = self.offset + row - self.indptr[:-1]
        return result

    def rows(self, start: int | None, stop: int | None, only: Bools | None = None) -> tuple[Ints, Ints, Ints]:
        """Return what lies in absolute rows ``[start, stop)``: row numbers [M], indptr and offset of that part.

        Series that are not among ``only`` [num_series] have no rows there.
        """
        lengths = self.lengths
        low = np.zeros_like(lengths) if start is None else np.clip(start - self.offset, 0, lengths)
        high = lengths if stop is None else np.clip(stop - self.offset, low, lengths)
        counts = high - low if only is None else np.where(only, high - low, 0)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(indptr[-1])
        rows += np.repeat(self.indptr[:-1] + low - indptr[:-1], counts)
        return rows, indptr, self.offset + low

    def training_series(self, start: int | None, stop: int | None, only: Bools | None = None) -> TrainingSeries:
        """Return absolute rows ``[start, stop)`` (None = open) as float64 tensors in data units.

        Covariates are NaN where not observed. An absent series, one outside the span, or one that is not among
        ``only`` (bool [num_series]), has no rows; static covariates of the last are NaN.

        Raises:
            DataError: no row lies in the span.
        """
        rows, indptr, offset = self.rows(start, stop, only)
        if not len(rows):
            raise DataError(f"no series has rows between absolute rows {start} and {stop}; check the split")
        num_targets, num_past = self.num_targets, len(self.schema.past)
        edges = (0, num_targets, num_targets + num_past, self.values.shape[1])
        target, past, known = (
            torch.from_numpy(np.ascontiguousarray(self.values[rows, a:b])) if b > a else None
            for a, b in pairwise(edges)
        )
        if target is None:  # the schema guarantees a target
            raise DataError("the panel has no target column")
        static = self.static if only is None or self.static is None else np.where(only[:, None], self.static, np.nan)
        return TrainingSeries(
            values=target,
            mask=torch.from_numpy(np.ascontiguousarray(self.observed[rows, :num_targets])),
            indptr=torch.from_numpy(indptr),
            offset=torch.from_numpy(offset),
            past=past,
            known=known,
            static=None if static is None else torch.from_numpy(static.copy()),
        )

    def resident(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ResidentTensors:
        """Return the panel as tensors on a device; made once per device and type and shared by all windows.

        Raises:
            DataError: a value is too large for ``dtype``, or ``dtype`` cannot tell the values of a column apart.
        """
        key = (str(torch.device(device)), dtype)
        if key not in self._resident:
            self._check_range(dtype)
            self._check_resolution(dtype)
            sizes = (self.num_targets, len(self.schema.past), len(self.schema.known))
            parts = torch.split(torch.from_numpy(self.values), list(sizes), dim=1)
            target, past, known = (
                part.to(dtype, memory_format=torch.contiguous_format).contiguous().to(device) if part.shape[1] else None
                for part in parts
            )
            if target is None:  # the schema guarantees a target
                raise DataError("the panel has no target column")
            self._resident[key] = ResidentTensors(
                target=target,
                mask=torch.from_numpy(np.ascontiguousarray(self.target_observed)).to(device),
                past=past,
                known=known,
                static=None if self.static is None else torch.from_numpy(self.static).to(device, dtype),
            )
        return self._resident[key]

    def _check_range(self, dtype: torch.dtype) -> None:
        """Refuse values that would overflow to infinity, such as a sensor's nonsense value of -1e42."""
        limit = torch.finfo(dtype).max
        too_large = np.zeros(self.values.shape[1], dtype=bool)
        first = None
        for begin in range(0, self.num_rows, _BLOCK):  # two copies of everything may not fit
            part = slice(begin, begin + _BLOCK)
            wrong = (np.abs(self.values[part]) > limit) & self.observed[part]
            if wrong.any():
                too_large |= wrong.any(axis=0)
                row, column = (int(place[0]) for place in np.nonzero(wrong))
                first = (begin + row, column) if first is None else first
        if first is not None:
            row, column = first
            names = [name for name, bad in zip(self.schema.columns, too_large, strict=True) if bad]
            series = int(np.searchsorted(self.indptr, row, side="right")) - 1
            time = self.grid.time_at(int(self.offset[series] + row - self.indptr[series]))
            raise DataError(
                f"column(s) {listing(names)} hold values beyond {limit:.3g} (first: {self.values[row, column]:.3g} in "
                f"'{self.series_ids[series]}' at {show_time(time)}); declare a valid range to mask them"
            )

    def _check_resolution(self, dtype: torch.dtype) -> None:
        """Refuse columns whose changes vanish beside their level in some series, such as a meter that begins at 3e8.

        That is so where most of at least ``_CHANGES`` changes from row to row are lost. What the arithmetic that made
        a constant left behind is no change.
        """
        least = torch.finfo(dtype).eps  # relative: numbers closer than this may be one
        owner = np.repeat(np.arange(self.num_series), self.lengths)
        changes = np.zeros((self.values.shape[1], self.num_series), dtype=np.int64)
        lost = np.zeros_like(changes)
        faint = np.zeros(self.values.shape[1], dtype=bool)
        for begin in range(1, self.num_rows, _BLOCK):
            rows = slice(begin, min(begin + _BLOCK, self.num_rows))
            before = slice(begin - 1, rows.stop - 1)
            pair = self.observed[rows] & self.observed[before] & (owner[rows] == owner[before])[:, None]
            step, size = np.abs(self.values[rows] - self.values[before]), np.abs(self.values[rows])
            moves = pair & (step > _FAINT * size)
            faint |= (pair & (step > 0) & ~moves).any(axis=0)
            small = moves & (step < least * size)
            for column in np.flatnonzero(small.any(axis=0)):
                for total, counted in ((changes, moves), (lost, small)):
                    total[column] += np.bincount(owner[rows][counted[:, column]], minlength=self.num_series)
        if least > _FAINT:  # float64 itself loses none of them
            for column in np.flatnonzero(faint):
                found = self._faint_changes(int(column), owner, least)
                changes[column] += found
                lost[column] += found
        places, owners = np.nonzero((lost >= _CHANGES) & (2 * lost > changes))  # blocks without a loss do not count
        if len(places):
            place, series = int(places[0]), int(owners[0])
            names = [self.schema.columns[column] for column in np.unique(places)]
            largest = float(np.abs(self.values[owner == series, place]).max())
            kind = str(dtype).removeprefix("torch.")
            raise DataError(
                f"column(s) {listing(names)} lie so far from 0 that {kind} numbers, which windows hold, lose their "
                f"changes ({lost[place, series]} of them in '{self.series_ids[series]}', at values up to "
                f"{largest:.6g}); subtract a constant from them, or take differences"
            )

    def _faint_changes(self, column: int, owner: Ints, least: float) -> Ints:
        """Return how many faint changes of a column [num_series] are more than rounding.

        A stretch without larger changes may be a constant up to rounding, or a counter far from 0 (an id of 1.8e18,
        whose neighbours are one rounding unit apart). The constant goes to and fro, the counter leaves its level. What
        is lost of a series that shows other changes in most rows, such as the end of a decay, is no loss.

        Args:
            column: number. owner: series of each row.
            least: numbers closer than this, relative, may be one.
        """
        values, seen = self.values[:, column], self.observed[:, column]
        step, size = np.abs(np.diff(values)), np.abs(values)
        joined = seen[1:] & seen[:-1] & (owner[1:] == owner[:-1]) & (step <= _FAINT * size[1:])
        starts = np.flatnonzero(np.concatenate([[True], ~joined]))
        moved = np.concatenate([[0.0], np.where(joined, step, 0.0)])
        total, count = (np.add.reduceat(part, starts) for part in (moved, (moved > 0).astype(np.int64)))
        spread = np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)
        real = (size[starts] >= _LARGE) & (spread > _NOISE * size[starts]) & (spread * count > _WANDERING * total)
        told = (moved > 0) & np.repeat(real, np.diff(np.append(starts, len(values))))
        found, rows = (np.bincount(owner[part], minlength=self.num_series) for part in (told, seen))
        return np.where(self._is_one(column, least) | (2 * found >= rows), found, 0).astype(np.int64)

    def _is_one(self, column: int, least: float) -> Bools:
        """Return of which series [num_series] all values of a column are one number, or two neighbours."""
        found, filled = np.ones(self.num_series, dtype=bool), self.lengths > 0
        begins, values, seen = self.indptr[:-1][filled], self.values[:, column], self.observed[:, column]
        low = np.minimum.reduceat(np.where(seen, values, np.inf), begins)
        high = np.maximum.reduceat(np.where(seen, values, -np.inf), begins)
        with np.errstate(invalid="ignore"):  # of a series without a value inf - inf is asked
            found[filled] = high - low <= least * np.maximum(np.abs(low), np.abs(high))
        return found


_Arrays: TypeAlias = tuple[Floats, Bools, Ints, Ints, "Floats | None"]


def _reordered(arrays: _Arrays, ids: tuple[str, ...], wanted: tuple[str, ...]) -> _Arrays:
    """Return the arrays with series in the wanted order; wanted series that are absent get no rows and static 0."""
    values, observed, indptr, offset, static = arrays
    there = set(wanted)
    unknown = [name for name in ids if name not in there]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(ids)} series are unknown to the model ({listing(unknown)}"
            f"{nearest(unknown[0], wanted)}); known: {listing(wanted)}; leave them out or fit again"
        )
    place = {name: position for position, name in enumerate(ids)}
    source = np.array([place.get(name, -1) for name in wanted], dtype=np.int64)
    present = source >= 0
    counts = np.where(present, np.diff(indptr)[source], 0)
    new_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if (np.diff(source[present]) < 0).any():
        rows = np.repeat(indptr[:-1][source] - new_indptr[:-1], counts) + np.arange(new_indptr[-1])
        values, observed = values[rows], observed[rows]
    new_offset = np.where(present, offset[source], 0)
    new_static = None if static is None else np.where(present[:, None], static[source], 0.0)
    return values, observed, new_indptr, new_offset, new_static
