"""The rows an online detector keeps of every series, and how new ones compare with the forecasts made before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.contexts import ContextFunction, block_context_outputs, context_block
from tsforge.anomaly.deviations import compared, forecast_outputs, used_steps
from tsforge.anomaly.growth import growth_function
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.fixed_blocks import Block, block_size
from tsforge.forecasting.predict import artifact_panel
from tsforge.forecasting.rolling import Output, RollingForecasts, block_outputs
from tsforge.forecasting.stream_buffer import NEVER, Buffer, ring_of_rows
from tsforge.forecasting.stream_rows import NewRows, overlay_known
from tsforge.forecasting.window_forecasts import FloatArray, evaluating

Ints = NDArray[np.int64]
MOST_KEPT = 32_000_000  # numbers of forecasts kept for the next rows: 256 MB


@dataclass(frozen=True)
class Compared:
    """Rows to judge now, one series after another.

    Shapes: series [N], whose they are; deviations [N, K, V]; values, expected [N, V]; modes [N], as they were given;
    impossible [N, V], values that the network does not see, None where a score reads no value but that of its row.
    """

    series: Ints
    deviations: FloatArray
    values: FloatArray
    expected: FloatArray
    modes: FloatArray | None
    impossible: NDArray[np.bool_] | None = None


class Recent(Protocol):
    """What an online detector keeps of the last rows of every series."""

    buffer: Buffer
    first: Ints
    config: ScoreConfig

    def compare(
        self, new: NewRows, turns: range, watched: NDArray[np.bool_], modes: FloatArray | None = None
    ) -> Compared:
        """Return the rows that can be judged now that new ones are there.

        Args:
            new: checked rows; turns of one update come in order.
            turns: which rows of each series, counted from 0.
            watched: [S] series that are judged; others only inform coupled models.
            modes: operating mode of every new row, where scores are compared by it.
        """
        ...

    def take(self, new: NewRows) -> None:
        """Take new rows into the ring."""
        ...


@dataclass(eq=False)
class RecentRows:
    """The last rows of every series: enough for each window that forecasts the next row.

    Attributes:
        buffer: ring of ``context_length + max(steps) - 1`` rows a series.
        first: [S] absolute row where the history of each series begins; a window needs a whole context of it.
        config: kind and steps of the score.
    """

    buffer: Buffer
    first: Ints
    config: ScoreConfig
    _filler: Block = field(default_factory=Block, init=False)

    @classmethod
    def of_frame(cls, artifact: Artifact, frame: SeriesFrame, stop: int, config: ScoreConfig) -> RecentRows:
        """Return the rows before absolute row ``stop``; arguments as of ``kept_rows``."""
        return cls(*kept_rows(artifact, frame, stop, ring_size(artifact, config)), config)

    @property
    def artifact(self) -> Artifact:
        """What forecasts."""
        return self.buffer.artifact

    @cached_property
    def _steps(self) -> Ints:
        return np.array(used_steps(self.config, self.artifact.window.horizon), dtype=np.int64)

    @cached_property
    def _place(self) -> Ints:
        return np.arange(len(self._steps))

    @property
    def _together(self) -> int:
        """Windows that a model sees together: one of every series where it couples them."""
        return len(self.first) if self.buffer.coupled else 1

    @cached_property
    def _outputs(self) -> tuple[tuple[Output, ...], tuple[float, ...]]:
        return forecast_outputs(self.config)

    @cached_property
    def _growth(self) -> ContextFunction | None:
        """What makes free runs in place of forecasts, where these are what is judged."""
        return growth_function(self.artifact, int(self._steps[-1])) if self.config.kind == "growth" else None

    @cached_property
    def _told(self) -> dict[str, tuple[int, ...]]:
        """What is told of a row, and its shape after steps and variates."""
        outputs, levels = self._outputs
        plain = ("mean", *outputs, *(("spread",) if self._growth else ()))
        return dict.fromkeys(plain, ()) | ({"quantiles": (len(levels),)} if levels else {})

    def compare(
        self, new: NewRows, turns: range, watched: NDArray[np.bool_], modes: FloatArray | None = None
    ) -> Compared:
        """Return how new rows compare with their forecasts; nothing is taken yet."""
        if self._keeps and turns.start == 0 and new.count.numpy().max() == 1:
            return self._compare_next(new, np.flatnonzero(watched & (new.count.numpy() == 1)), modes)
        steps = self._steps
        owner, done = new.owner.numpy(), new.done.numpy()
        place = np.flatnonzero((done >= turns.start) & (done < turns.stop) & watched[owner])
        values = new.judged[place]
        shape = (1, len(place), len(steps), values.shape[1])
        found = {name: np.full((*shape, *size), np.nan) for name, size in self._told.items()}
        row_of = np.full(len(new.values), -1)
        row_of[place] = np.arange(len(place))
        start, stop = new.start.numpy(), np.minimum(turns.stop, new.count.numpy())

        def put(series: Ints, before: Ints, told: dict[str, FloatArray]) -> None:
            turn = before[:, None] + steps - 1  # [B, K] row that each step is for
            inside = (turn >= turns.start) & (turn < stop[series][:, None]) & watched[series][:, None]
            window, k = np.nonzero(inside)
            row = row_of[start[series[window]] + turn[window, k]]
            for name, part in told.items():
                found[name][0, row, k] = part[window, k]

        series, before = self._windows(new, turns, watched)
        if self._keeps:
            kept, at_hand = self._remembered(series, before)
            put(series[kept], before[kept], at_hand)
            series, before = series[~kept], before[~kept]
        for who, when, told in self._forecasts(series, before, new):
            put(who, when, told)
            if self._keeps:
                self._remember(who, when, told, stop)
        return self._compared(place, new, {name: part[0] for name, part in found.items()}, modes)

    def _compare_next(self, new: NewRows, series: Ints, modes: FloatArray | None) -> Compared:
        """Return what ``compare`` does where no series gets more than one row: those of ``series``, all watched.

        Forecasts that are lacking are made and kept; then all of them are at hand. A fraction of the array operations.
        """
        steps, (cutoffs, kept) = self._steps, self._memory
        row = self.buffer.last.numpy()[series] + 1
        cutoff = row[:, None] + (1 - steps)  # [M, K]
        whole = cutoff >= (self.first[series] + self.artifact.window.context_length)[:, None]
        slot = cutoff % cutoffs.shape[1]
        who = series[:, None]
        lacks, k = np.nonzero((cutoffs[who, slot] != cutoff) & whole)
        for some, before, told in self._forecasts(series[lacks], 1 - steps[k], new):
            self._remember(some, before, told, new.count.numpy())
        found = {name: part[who, slot, self._place] for name, part in kept.items()}
        if not whole.all():
            for part in found.values():
                part[~whole] = np.nan
        return self._compared(new.start.numpy()[series], new, found, modes)

    def _forecasts(
        self, series: Ints, before: Ints, new: NewRows
    ) -> Iterator[tuple[Ints, Ints, dict[str, FloatArray]]]:
        """Yield series and new rows before the cutoff, both [B], and forecasts at the steps used [B, K, ...]."""
        steps, wanted, network, growth = self._steps, self._outputs, self.artifact.network, self._growth
        size = context_block(network, growth) if growth else block_size(network, self._together) * self._together
        for low in range(0, len(series), size):
            who, when = series[low : low + size], before[low : low + size]
            batch = self._block(who, when, new, with_target=bool(wanted[0]))
            if not self.buffer.coupled:
                batch = self._filler.filled(batch, size)
            if growth:
                told = dict(zip(self._told, block_context_outputs(network, batch, growth), strict=True))
            else:
                with evaluating(network), torch.no_grad():
                    told = block_outputs(network, batch, int(steps[-1]), wanted[::-1], self._together)
            yield who, when, {name: part[: len(who), steps - 1] for name, part in told.items()}

    def _compared(self, place: Ints, new: NewRows, found: dict[str, FloatArray], modes: FloatArray | None) -> Compared:
        """Return the rows at ``place`` [N] among the new ones against their forecasts [N, K, V, ...]."""
        values = new.judged[place]
        seen = new.values.numpy()[place, : values.shape[1]]
        deviations = self._deviations(seen, values, found)
        series, named = new.owner.numpy()[place], None if modes is None else modes[place]
        impossible = np.isnan(seen) & ~np.isnan(values) if self.config.joint == "consensus" else None
        return Compared(series, deviations, values, found["mean"][:, 0], named, impossible)

    def _deviations(self, seen: NDArray[np.float32], values: FloatArray, found: dict[str, FloatArray]) -> FloatArray:
        """Return deviations [N, K, V] of ``values`` [N, V], of which the network sees ``seen``, from forecasts."""
        if self._growth:
            return np.asarray((values[:, None] - found["mean"]) / found["spread"])
        whole = {name: part[None] for name, part in found.items()}
        forecasts = RollingForecasts(
            series_ids=(),
            variates=self.artifact.schema.targets,
            grid=self.artifact.grid,
            start=0,
            stop=len(values),
            target=seen[None].astype(np.float64),
            mean=whole["mean"],
            scale=np.broadcast_to(np.nan, whole["mean"].shape),
            quantile_levels=self._outputs[1],
            cdf=None,
            quantiles=whole.get("quantiles"),
            log_tail=whole.get("log_tail"),
            log_density=whole.get("log_density"),
        )
        return np.asarray(compared(forecasts, values[None], self._place, self.config.kind)[0])

    def _windows(self, new: NewRows, turns: range, watched: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Return series and new rows before the cutoff, both [M], of the windows that forecast any of the rows.

        Of models that couple series, every cutoff comes with a window of each of them.
        """
        steps = self._steps
        before = np.arange(turns.start - int(steps[-1]) + 1, turns.stop)
        stop = np.minimum(turns.stop, new.count.numpy())  # [S]
        row = before[:, None] + steps - 1  # [D, K]
        wanted = ((row >= turns.start)[None] & (row[None] < stop[:, None, None])).any(axis=2)  # [S, D]
        cutoff = self.buffer.last.numpy()[:, None] + 1 + before
        whole = cutoff >= self.first[:, None] + self.artifact.window.context_length
        if self.buffer.coupled:
            shared = before[wanted.any(axis=0) & whole.any(axis=0)]
            return np.tile(np.arange(self._together), len(shared)), np.repeat(shared, self._together)
        series, turn = np.nonzero(wanted & whole & watched[:, None])
        return series, before[turn]

    @cached_property
    def _keeps(self) -> bool:
        """Whether forecasts of earlier cutoffs are kept instead of made again; the same either way, to the bit.

        Not where they would depend on the rows they are for, or on what is told of later ones.
        """
        cells = len(self.first) * int(self._steps[-1]) * len(self._steps) * len(self.artifact.schema.targets)
        cells *= sum(int(np.prod(size)) for size in self._told.values())
        return not (self._outputs[0] or self.buffer.coupled or self.artifact.schema.known) and cells < MOST_KEPT

    @cached_property
    def _memory(self) -> tuple[Ints, dict[str, FloatArray]]:
        """Cutoffs [S, R] of the forecasts kept, -1 for none, and these [S, R, K, V, ...]; R = the farthest step."""
        shape = (len(self.first), int(self._steps[-1]), len(self._steps), len(self.artifact.schema.targets))
        return np.full(shape[:2], -1), {name: np.zeros((*shape, *size)) for name, size in self._told.items()}

    def _remembered(self, series: Ints, before: Ints) -> tuple[NDArray[np.bool_], dict[str, FloatArray]]:
        """Return which of the windows [M] were forecast before, and these forecasts."""
        cutoffs, kept = self._memory
        cutoff = self.buffer.last.numpy()[series] + 1 + before
        slot = cutoff % cutoffs.shape[1]
        hit = cutoffs[series, slot] == cutoff
        return hit, {name: part[series[hit], slot[hit]] for name, part in kept.items()}

    def _remember(self, series: Ints, before: Ints, told: dict[str, FloatArray], stop: Ints) -> None:
        """Keep forecasts that the new row before ``stop`` [S] and rows after it may ask for again."""
        cutoffs, kept = self._memory
        late = before >= stop[series] - cutoffs.shape[1]  # so many cutoffs in a row have a slot each
        cutoff = (self.buffer.last.numpy()[series] + 1 + before)[late]
        place = (series[late], cutoff % cutoffs.shape[1])
        cutoffs[place] = cutoff
        for name, part in kept.items():
            part[place] = told[name][late]

    def _block(self, series: Ints, before: Ints, new: NewRows, *, with_target: bool) -> Batch:
        """Return some windows, with the targets that are there so far if asked for."""
        who, done = torch.from_numpy(series), torch.from_numpy(before)
        batch = self.buffer.contexts(who, done, new)
        if not with_target:
            return batch
        spec = self.artifact.network.spec
        index = (self.buffer.last[who] + 1 + done)[:, None] + torch.arange(spec.horizon)
        cells = self.buffer.cells(who, index, new)[..., : spec.num_variates]
        there = index <= (self.buffer.last + new.count)[who][:, None]
        mask = there[..., None] & ~torch.isnan(cells)
        return batch._replace(target=torch.where(mask, cells, 0.0), target_mask=mask)

    def take(self, new: NewRows) -> None:
        """Take new rows into the ring."""
        self.buffer.take(new)


def kept_rows(artifact: Artifact, frame: SeriesFrame, stop: int, size: int) -> tuple[Buffer, Ints]:
    """Return the rows before absolute row ``stop`` of every series that has any, and where their histories begin [S].

    Args:
        artifact: columns, grid and sizes.
        frame: matched to the artifact; known covariates of later rows are taken along.
        stop: the row that comes next.
        size: rows kept of each series.
    """
    visible = frame.until(artifact.grid.time_at(stop - 1), keep_known=True)
    panel = artifact_panel(artifact, visible)
    coupled = artifact.network.capabilities.rows_coupled
    series = np.arange(panel.num_series) if coupled else np.flatnonzero((panel.lengths > 0) & (panel.offset < stop))
    data, last = panel.resident(), np.full(len(series), stop - 1)
    buffer = Buffer(
        artifact=artifact,
        series=tuple(panel.series_ids[number] for number in series),
        rows=ring_of_rows(panel, series, last, size),
        last=torch.from_numpy(last),
        started=torch.from_numpy((panel.lengths > 0)[series]),
        static=None if data.static is None else data.static[torch.from_numpy(series)],
    )
    if artifact.schema.known:
        buffer.ahead = torch.full((len(series), artifact.window.horizon, len(artifact.schema.known)), torch.nan)
        buffer.ahead = overlay_known(visible.table.select("series_id", "time", *artifact.schema.known), buffer.place)
    return buffer, np.where(panel.lengths > 0, panel.offset, NEVER)[series].astype(np.int64)


def ring_size(artifact: Artifact, config: ScoreConfig) -> int:
    """Return the rows of the network's columns that a series keeps."""
    return artifact.window.context_length + max(used_steps(config, artifact.window.horizon), default=1) - 1
