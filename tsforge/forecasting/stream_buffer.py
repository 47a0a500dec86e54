"""The last rows of every series of a stream in fixed memory, and the windows they make.

A ring: absolute row t stands at ``t % R``, so that taking a row overwrites the oldest and moves nothing. R is the
context length L, or more where intervals rest on forecasts from earlier rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ArtifactError, DataError, listing, nearest
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike, show_time
from tsforge.data.panel import Panel
from tsforge.data.windows import last_windows
from tsforge.forecasting.predict import artifact_panel
from tsforge.forecasting.stream_rows import Ints, NewRows, StreamPlace, overlay_known
from tsforge.forecasting.window_forecasts import WindowForecasts

NEVER = np.iinfo(np.int64).max // 2  # later than any row


def ring_of_rows(panel: Panel, series: Ints, last: Ints, size: int) -> Tensor:
    """Return the rows [S, R, C] up to ``last`` [S] of some series, row t at ``t % R``; NaN where there is none.

    Columns are those of the panel in its order, NaN where not observed.
    """
    data = panel.resident()
    parts = [torch.where(data.mask, data.target, torch.nan), data.past, data.known]
    cells = torch.cat([part for part in parts if part is not None], dim=1)
    index = last[:, None] + np.arange(1 - size, 1)
    turn = index - panel.offset[series][:, None]
    inside = torch.from_numpy((turn >= 0) & (turn < panel.lengths[series][:, None]))
    rows = torch.from_numpy(np.clip(panel.indptr[series][:, None] + turn, 0, max(panel.num_rows - 1, 0)))
    found = torch.where(inside[..., None], cells[rows], torch.nan)
    slots = torch.from_numpy(index % size)[..., None].expand_as(found)
    return torch.empty_like(found).scatter_(1, slots, found)


@dataclass(eq=False)
class Buffer:
    """The last R >= L rows of every series, and the known covariates of the H rows after them.

    Attributes:
        artifact: columns, grid and sizes.
        series: names by position.
    Shapes:
        rows [S, R, C] float32 in the order of ``schema.columns``, NaN where not observed. last [S] int64, absolute row
        of the last one. started [S] bool, False for series without data beside others that a coupled model needs them
        for. ahead [S, H, F], NaN where not told yet, None without any. static [S, num_static] or None. begins [S]
        int64, absolute row that the history of each series begins with; None where R = L.
    """

    artifact: Artifact
    series: tuple[str, ...]
    rows: Tensor
    last: Tensor
    started: Tensor
    ahead: Tensor | None = None
    static: Tensor | None = None
    begins: Tensor | None = None

    @classmethod
    def of_frame(
        cls, artifact: Artifact, frame: SeriesFrame, cutoff: TimeLike | None = None, size: int | None = None
    ) -> Buffer:
        """Return the buffer after the last row with an observed target of each series, or after ``cutoff``.

        Args:
            artifact, frame, cutoff: as in ``Stream.start``.
            size: rows to keep, at least those of a context, which is the default; a shorter history fills fewer.

        Raises:
            ArtifactError: the frame does not fit the artifact.
            DataError: fewer rows than the context, or nothing observed in it.
        """
        frame = match_frame(artifact, frame)
        visible = frame if cutoff is None else frame.until(cutoff, keep_known=True)
        schema, length = frame.schema, artifact.window.context_length
        # known covariates of the context only, as if past ones: those of the horizon may arrive later
        renamed = replace(schema, past=schema.past + schema.known, known=())
        context = SeriesFrame(visible.table, renamed, visible.static, require_targets=False)
        panel = artifact_panel(artifact, context)
        windows = last_windows(panel, artifact.window, cutoff, aligned=artifact.network.capabilities.rows_coupled)
        last, size = windows.cutoff_index - 1, size or length
        places, history = windows.series_index, panel.lengths[windows.series_index] > 0
        data = panel.resident()
        buffer = cls(
            artifact=artifact,
            series=tuple(panel.series_ids[place] for place in places),
            rows=ring_of_rows(panel, places, last, size),
            last=torch.from_numpy(last),
            started=torch.from_numpy(history),
            static=None if data.static is None else data.static[torch.from_numpy(places)],
            begins=torch.from_numpy(np.where(history, panel.offset[places], NEVER)) if size > length else None,
        )
        if schema.known:
            buffer.ahead = torch.full((len(last), artifact.window.horizon, len(schema.known)), torch.nan)
            buffer.ahead = overlay_known(visible.table.select("series_id", "time", *schema.known), buffer.place)
        return buffer

    @property
    def coupled(self) -> bool:
        """True when the model couples series: all of them then move together."""
        return self.artifact.network.capabilities.rows_coupled

    @property
    def place(self) -> StreamPlace:
        """Where the buffer stands, for checks of new rows."""
        return StreamPlace(
            schema=self.artifact.schema,
            grid=self.artifact.grid,
            series=self._places,
            last=self.last.numpy(),
            ahead=self.ahead,
            shared_clock=self.coupled,
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.series)}

    @property
    def everyone(self) -> Tensor:
        """Positions of all series [S]."""
        return torch.arange(len(self.series))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, series along the first axis."""
        found = {"rows": self.rows, "last": self.last, "started": self.started}
        optional = {"ahead": self.ahead, "static": self.static, "begins": self.begins}
        return found | {name: value for name, value in optional.items() if value is not None}

    def check(self, length: int | None = None, *, begins: bool = False) -> None:
        """Check that stored tensors are those of this artifact and these series, ``length`` rows each.

        Args:
            length: rows kept; default those of a context.
            begins: where histories begin is kept.

        Raises:
            ArtifactError: one is missing, too many or of another shape.
        """
        spec, count = self.artifact.network.spec, len(self.series)
        width = spec.num_variates + spec.num_past + spec.num_known
        expected = {"rows": (count, length or spec.context_length, width), "last": (count,), "started": (count,)}
        if spec.num_known:
            expected["ahead"] = (count, spec.horizon, spec.num_known)
        if spec.num_static:
            expected["static"] = (count, spec.num_static)
        if begins:
            expected["begins"] = (count,)
        found = {name: tuple(value.shape) for name, value in self.tensors().items()}
        if found != expected:
            raise ArtifactError(f"it holds tensors of shapes {found}, expected {expected}")

    def joined(self, other: Buffer) -> tuple[Buffer, list[int]]:
        """Return the buffer of both, ordered as a panel orders series, and where each of them stood before."""
        ids = self.series + other.series
        number = {name: place for place, name in enumerate(self.artifact.series_ids)}
        order = sorted(range(len(ids)), key=lambda place: (number.get(ids[place], len(number)), ids[place]))
        theirs = other.tensors()
        both = {name: torch.cat([value, theirs[name]])[order] for name, value in self.tensors().items()}
        return Buffer(self.artifact, tuple(ids[place] for place in order), **both), order

    def take(self, new: NewRows) -> None:
        """Take new rows: O(1) a row."""
        # numpy views of the same memory: for a single row they are several times as fast as tensors
        length, owner, done, count = self.rows.shape[1], new.owner.numpy(), new.done.numpy(), new.count.numpy()
        values, last = new.values.numpy(), self.last.numpy()
        if len(values) > length and count.max() > length:
            kept = done >= count[owner] - length
            owner, done, values = owner[kept], done[kept], values[kept]
        self.rows.numpy()[owner, (last[owner] + 1 + done) % length] = values
        if self.ahead is not None:
            self.ahead = new.known_from(self.everyone, new.count, self.ahead.shape[1])
        if not self.started.numpy().all():
            told = ~torch.isnan(new.values).all(dim=1)
            seen = new.owner[told]
            if self.begins is not None:
                first = (self.last + 1)[seen] + new.done[told]
                self.begins = self.begins.scatter_reduce(0, seen, first, "amin")
            self.started = self.started.index_fill(0, seen, True)
        self.last = self.last + new.count

    def contexts(self, series: Tensor, done: Tensor | None = None, new: NewRows | None = None) -> Batch:
        """Return the windows of some series [B] that end after the first ``done`` [B] of their new rows.

        Data units, no target; the same tensors that batch prediction gathers from a panel. A buffer of more rows than a
        context also gives windows that end before its last row: ``done`` is negative then.
        """
        spec = self.artifact.network.spec
        variates, past = spec.num_variates, spec.num_past
        done = torch.zeros_like(series) if done is None else done
        # numpy: several times as fast as tensors for a single window
        end = self.last.numpy()[series.numpy()] + done.numpy()
        rows = self.cells(series, torch.from_numpy(end[:, None] + self._backwards), new)
        targets = rows.numpy()[..., :variates]
        mask = ~np.isnan(targets)
        later = self.later(series, done, new)
        return Batch(
            context=torch.from_numpy(np.where(mask, targets, np.float32(0.0))),
            context_mask=torch.from_numpy(mask),
            past=rows[..., variates : variates + past].contiguous() if past else None,
            known=None if later is None else torch.cat([rows[..., variates + past :], later], dim=1),
            static=None if self.static is None else self.static[series],
            series_index=self._numbers[series],
            cutoff_index=torch.from_numpy(end + 1),
        )

    def cells(self, series: Tensor, index: Tensor, new: NewRows | None) -> Tensor:
        """Return all columns [B, T, C] of absolute rows ``index`` [B, T] of some series [B], those kept or new."""
        who, wanted = series.numpy()[:, None], index.numpy()
        rows = self.rows.numpy()[who, wanted % self.rows.shape[1]]
        turn = wanted - self.last.numpy()[who] - 1
        if new is not None and (turn >= 0).any():
            place = np.clip(new.start.numpy()[who] + turn, 0, len(new.values) - 1)
            rows = np.where((turn >= 0)[..., None], new.values.numpy()[place], rows)
        return torch.from_numpy(rows)

    def later(self, series: Tensor, done: Tensor, new: NewRows | None) -> Tensor | None:
        """Return known covariates [B, H, F] of the rows after the first ``done`` new ones."""
        if self.ahead is None or new is None:
            return None if self.ahead is None else self.ahead[series]
        horizon, width = self.ahead.shape[1:]
        told = new.known_from(series, done.clamp(min=0), horizon)
        if not bool((done < 0).any()):
            return told
        step = done[:, None] + torch.arange(horizon)  # [B, H] new rows before each step; taken long ago where negative
        kept = self.cells(series, self.last[series][:, None] + 1 + step.clamp(max=-1), None)[..., -width:]
        place = step.clamp(min=0) - done.clamp(min=0)[:, None]
        assert told is not None  # there are known covariates
        return torch.where((step < 0)[..., None], kept, told.gather(1, place[..., None].expand(-1, -1, width)))

    @cached_property
    def _backwards(self) -> NDArray[np.int64]:
        """Rows of a context [L], its last one being 0."""
        return np.arange(1 - self.artifact.network.spec.context_length, 1)

    @cached_property
    def _numbers(self) -> Tensor:
        """Number of each series [S] as in training; new ones come after."""
        numbers = {name: number for number, name in enumerate(self._panel_ids)}
        return torch.tensor([numbers[name] for name in self.series])

    @cached_property
    def _panel_ids(self) -> tuple[str, ...]:
        known = set(self.artifact.series_ids)
        return self.artifact.series_ids + tuple(name for name in self.series if name not in known)

    def panel(self, new: NewRows | None = None) -> Panel:
        """Return all rows kept, and the new ones, as a panel; where the schema has known covariates, H rows more.

        Series are numbered as in training (``located`` says where they are), with no row before their history begins.
        Values have gone through single precision.
        """
        schema, size = self.artifact.schema, self.rows.shape[1]
        width, variates, horizon = len(schema.columns), len(schema.targets), self.artifact.window.horizon
        numbers, last = self._numbers.numpy(), self.last.numpy()
        count = np.zeros_like(last) if new is None else new.count.numpy()
        begin = last + 1 - size
        if self.begins is not None:
            begin = np.maximum(begin, self.begins.numpy())
        lengths, offset = np.zeros((2, len(self._panel_ids)), dtype=np.int64)
        stop = last + count + 1
        lengths[numbers] = np.maximum(stop + (horizon if schema.known else 0) - begin, 0) * (begin < stop)
        offset[numbers] = np.where(begin < stop, begin, 0)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        at = np.zeros(len(lengths), dtype=np.int64)  # position in the stream by number
        at[numbers] = np.arange(len(numbers))
        owner = np.repeat(at, lengths)
        index = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - offset, lengths)
        step = index - stop[owner]
        after = step >= 0
        there = np.where(after, stop[owner] - 1, index)[:, None]
        cells = self.cells(torch.from_numpy(owner), torch.from_numpy(there), new).numpy()[:, 0]
        cells[after] = np.nan
        later = self.later(self.everyone, torch.from_numpy(count), new)
        if later is not None:
            known = width - later.shape[2]
            cells[after, known:] = later.numpy()[owner[after], step[after]]
        values = cells.astype(np.float64)
        observed = ~np.isnan(values)
        values[:, :variates] = np.where(observed[:, :variates], values[:, :variates], 0.0)
        static = None
        if self.static is not None:
            static = np.zeros((len(lengths), self.static.shape[1]))
            static[numbers] = self.static.numpy()
        return Panel(values, observed, indptr, offset, static, self._panel_ids, schema, self.artifact.grid)

    def located(self, found: WindowForecasts, series: Ints) -> WindowForecasts:
        """Return forecasts of series [B] of the stream as those of series of ``panel``."""
        return replace(found, series_index=self._numbers.numpy()[series])

    def names(self) -> Panel:
        """Return a panel without rows: names and grid for a table."""
        empty = np.zeros((0, len(self.artifact.schema.columns)))
        nowhere = np.zeros(len(self.series), dtype=np.int64)
        bounds = np.zeros(len(self.series) + 1, dtype=np.int64)
        schema, grid = self.artifact.schema, self.artifact.grid
        return Panel(empty, empty.astype(bool), bounds, nowhere, None, self.series, schema, grid)

    def ends(self) -> pl.DataFrame:
        """Return ``series_id, time``: the last row that each series has taken."""
        ids = pl.Series("series_id", self.series, dtype=pl.String)
        table = pl.DataFrame([ids, self.artifact.grid.time_at(self.last.numpy())])
        return table.filter(pl.Series(self.started.numpy()))

    def seen(self) -> NDArray[np.bool_]:
        """Return whether a target was observed in the last L rows of each series [S]."""
        kept = self.last[:, None] + torch.from_numpy(self._backwards)
        targets = self.cells(self.everyone, kept, None).numpy()[..., : self.artifact.network.spec.num_variates]
        found: NDArray[np.bool_] = ~np.isnan(targets).all(axis=(1, 2))
        return found

    def seen_before(self, new: NewRows) -> NDArray[np.bool_]:
        """Return whether a target was observed in the L rows before each new row [N]."""
        variates, length = self.artifact.network.spec.num_variates, self.artifact.network.spec.context_length
        last, owner, place = self.last.numpy(), new.owner.numpy(), np.arange(len(new.values))
        who = np.flatnonzero(new.count.numpy())  # one row of one series must not cost those of all
        kept = last[who, None] + self._backwards
        old = self.cells(torch.from_numpy(who), torch.from_numpy(kept), None).numpy()[..., :variates]
        newest = last - length
        newest[who] = np.where(np.isnan(old).all(axis=2), newest[who, None], kept).max(axis=1)
        fresh = np.where(np.isnan(new.values.numpy()[:, :variates]).all(axis=1), -1, place)
        before = np.concatenate([[-1], np.maximum.accumulate(fresh)[:-1]]) if len(place) else place
        index = last[owner] + 1 + new.done.numpy()
        seen = np.where(before >= new.start.numpy()[owner], index - (place - before), newest[owner])
        found: NDArray[np.bool_] = seen >= index - length
        return found

    def blind(self) -> tuple[str, ...]:
        """Return the series that have begun and have no observed target in their last L rows."""
        unseen = self.started.numpy() & ~self.seen()
        return tuple(self.series[place] for place in np.flatnonzero(unseen))

    def chosen(self, series: Sequence[str] | None) -> list[int]:
        """Return the positions of series by name, default all that have begun.

        Raises:
            DataError: one is not in the stream.
        """
        places = {name: place for place, name in enumerate(self.series) if bool(self.started[place])}
        if series is None:
            return list(places.values())
        unknown = [name for name in series if name not in places]
        if unknown:
            hint = nearest(unknown[0], places)
            raise DataError(f"unknown series {listing(unknown)}{hint} (in the stream: {listing(places, 10)})")
        return sorted({places[name] for name in series})

    def check_sight(self, chosen: Sequence[int]) -> None:
        """Check that a target was observed in the last L rows of the chosen series.

        Raises:
            DataError: it was not; they are named.
        """
        blind = set(self.blind()) & {self.series[place] for place in chosen}
        if blind and not (self.coupled and len(blind) < len(chosen)):
            raise DataError(
                f"{len(blind)} of {len(chosen)} series have no observed target in the last {len(self._backwards)} rows "
                f"({listing(sorted(blind))}); leave them out (series=...) until they have"
            )

    def check_known(self, chosen: Sequence[int], ahead: Tensor | None) -> None:
        """Check that known covariates ``ahead`` [S, H, F] are complete for the chosen series.

        Raises:
            DataError: they are not; counts, columns and the first place are named.
        """
        if ahead is None or not bool((missing := torch.isnan(ahead[list(chosen)])).any()):
            return
        schema = self.artifact.schema
        names = [
            name for name, lacks in zip(schema.known, missing.any(dim=1).any(dim=0).tolist(), strict=True) if lacks
        ]
        cells = missing.any(dim=2)
        place, turn = (int(part) for part in cells.nonzero()[0])
        time = self.artifact.grid.time_at(int(self.last[chosen[place]]) + 1 + turn)
        raise DataError(
            f"known covariate(s) {listing(names)} are missing in {int(cells.sum())} of {cells.numel()} forecast rows "
            f"of {int(cells.any(dim=1).sum())} series (first: '{self.series[chosen[place]]}' at {show_time(time)}); "
            f"give their values for {cells.shape[1]} rows after the last one (known=...)"
        )
