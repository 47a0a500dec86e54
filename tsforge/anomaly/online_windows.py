"""The rows an online detector keeps where a score judges the window or context ending with a row, and what it makes of
new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.contexts import ContextFunction, block_context_outputs, context_block, joined
from tsforge.anomaly.deviations import WindowedSeries
from tsforge.anomaly.online_rows import Compared, kept_rows, ring_size
from tsforge.anomaly.windowed import Found, WindowJudge, trace_function
from tsforge.artifact import Artifact
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.fixed_blocks import Block
from tsforge.forecasting.stream_buffer import Buffer
from tsforge.forecasting.stream_rows import NewRows

FloatArray = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class KeptWindows:
    """What is kept of one series.

    Attributes:
        judge: its score.
        trail: traces of its last ``reach + latency`` rows.
        values: [latency, V] judged values, and modes [latency], of the rows that wait for their score.
    """

    judge: WindowJudge
    trail: FloatArray
    values: FloatArray
    modes: FloatArray

    @classmethod
    def of(cls, series: WindowedSeries, width: int) -> KeptWindows:
        """Return what to keep of a series of ``width`` variates before any of its rows waits."""
        late = series.judge.latency
        return cls(series.judge, series.trail.copy(), np.full((late, width), np.nan), np.full(late, np.nan))

    def take(
        self, traces: FloatArray, values: FloatArray, modes: FloatArray, row: int, begin: int
    ) -> tuple[Found, FloatArray, FloatArray]:
        """Return what is found in the rows that can be judged now, their values and their modes.

        Args:
            traces, values, modes: of N new rows, the first being absolute row ``row``.
            begin: first row that is judged at all.
        """
        count, late = len(values), self.judge.latency
        values, modes = np.concatenate([self.values, values]), np.concatenate([self.modes, modes])
        if len(self.trail):
            traces = np.concatenate([self.trail, traces])
        skipped = min(max(begin - (row - late), 0), count)
        part = slice(skipped, count)
        found = self.judge.judge(traces[skipped:], values[part], row - late + skipped)
        kept = len(self.trail)
        self.trail = traces[len(traces) - kept :].copy()
        self.values, self.modes = values[count:].copy(), modes[count:].copy()
        return found, values[part], modes[part]


@dataclass(eq=False)
class RecentWindows:
    """The last rows of every series: the context of the next one, and the traces that its score reads.

    Attributes:
        buffer: ring of a context of each series.
        first: [S] absolute row where the history of each series begins.
        config: kind of score.
        begin: first absolute row that is judged.
        kept: of every series that is judged.
    """

    buffer: Buffer
    first: Ints
    config: ScoreConfig
    begin: int
    kept: dict[str, KeptWindows]
    _filler: Block = field(default_factory=Block, init=False)

    @classmethod
    def of_frame(
        cls,
        artifact: Artifact,
        frame: SeriesFrame,
        stop: int,
        config: ScoreConfig,
        windowed: Mapping[str, WindowedSeries],
    ) -> RecentWindows:
        """Return what is known before absolute row ``stop``, the first to be judged.

        Args:
            artifact, frame, stop: as of ``kept_rows``.
            config: kind of score.
            windowed: of every series that is judged.
        """
        buffer, first = kept_rows(artifact, frame, stop, ring_size(artifact, config))
        width = len(artifact.schema.targets)
        return cls(
            buffer, first, config, stop, {name: KeptWindows.of(series, width) for name, series in windowed.items()}
        )

    @cached_property
    def _function(self) -> ContextFunction | None:
        return trace_function(self.buffer.artifact, self.config)

    def compare(
        self, new: NewRows, turns: range, watched: NDArray[np.bool_], modes: FloatArray | None = None
    ) -> Compared:
        """Return the rows whose windows are complete now; the traces of the new ones are taken along."""
        width = new.judged.shape[1]
        start = new.start.numpy() + turns.start
        stop = new.start.numpy() + np.minimum(new.count.numpy(), turns.stop)
        if self._function is None:  # what the network does not see judges no other row
            traces = np.where(np.isnan(new.values.numpy()[:, :width]), np.nan, new.judged)
        else:
            traces = self._traces(new, turns, watched, self._function)
        named = np.full(len(new.values), np.nan) if modes is None else modes
        nothing = np.empty((0, width))
        parts = [(np.empty(0, dtype=np.int64), np.empty((0, 1, width)), nothing, nothing, np.empty(0))]
        for place in np.flatnonzero(watched & (stop > start)):
            rows = slice(int(start[place]), int(stop[place]))
            row = int(self.buffer.last[place]) + 1 + turns.start
            found, values, own = self.kept[self.buffer.series[place]].take(
                traces[rows], new.judged[rows], named[rows], row, self.begin
            )
            deviations = np.broadcast_to(found.deviations, values.shape)[:, None]
            parts.append((np.full(len(values), place), deviations, values, found.expected, own))
        series, deviations, values, expected, own = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Compared(series, deviations, values, expected, None if modes is None else own)

    def _traces(self, new: NewRows, turns: range, watched: NDArray[np.bool_], function: ContextFunction) -> FloatArray:
        """Return the traces [N, ...] of new rows, NaN where it is not their turn or no whole context ends with them."""
        done, owner = new.done.numpy(), new.owner.numpy()
        row = self.buffer.last.numpy()[owner] + 1 + done
        whole = row + 1 >= self.first[owner] + self.buffer.artifact.window.context_length
        place = np.flatnonzero((done >= turns.start) & (done < turns.stop) & watched[owner] & whole)
        found: FloatArray | None = None
        for who, told in self._blocks(place, new, function):
            if found is None:
                found = np.full((len(new.values), *told.shape[1:]), np.nan)
            found[who] = told
        return np.full((len(new.values), 1), np.nan) if found is None else found

    def _blocks(self, place: Ints, new: NewRows, function: ContextFunction) -> Iterator[tuple[Ints, FloatArray]]:
        """Yield some of the places [B] among the new rows and the traces of the contexts that end there."""
        network = self.buffer.artifact.network
        size = context_block(network, function)
        for low in range(0, len(place), size):
            some = place[low : low + size]
            batch = self.buffer.contexts(new.owner[some], new.done[some] + 1, new)
            told = joined(block_context_outputs(network, self._filler.filled(batch, size), function))
            yield some, told[: len(some)]

    def take(self, new: NewRows) -> None:
        """Take new rows into the ring."""
        self.buffer.take(new)
