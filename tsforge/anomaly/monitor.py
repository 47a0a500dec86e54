"""One series under watch: from deviations to scores, alarms and events, row after row, in memory that does not grow.

A batch run is one call of ``Monitor.run``, a stream many: cutting the rows differently changes no bit. Every stage
either looks at one row at a time (score model, p-values, contributions) or advances a state of its own (memory of
residuals, smoother, rule, segments, the event under way). Where smoothing reads later rows, a row waits for its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.attribution import Extremes, contributions, leading_variates, rank_extremes
from tsforge.anomaly.buckets import BucketScale
from tsforge.anomaly.calibration import Calibration, ranked_p_values
from tsforge.anomaly.config import EventConfig
from tsforge.anomaly.confirmed import judge
from tsforge.anomaly.scoring import Memory, ScoreModel
from tsforge.anomaly.segments import Segment, SegmentTracker, is_continuation
from tsforge.anomaly.smoothing import Smoother, smooth_and_judge
from tsforge.anomaly.thresholds import Decisions, ThresholdRule

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
_AHEAD = 64  # rows whose contributions are worked out together while an event is under way


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """One event in absolute rows, with its ranked variates; ``continues``: first row of the event it goes on with."""

    segment: Segment
    peak_score: float
    p_value: float
    threshold: float
    variates: list[dict[str, Any]]
    continues: int | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Rows judged, and the events that ended in them.

    Shapes:
        joint, p_values and the decisions [N]; z, values and expected [N, V]; variate_p_values [N, V], None where they
        are not kept.
    """

    joint: FloatArray
    z: FloatArray
    values: FloatArray
    expected: FloatArray
    p_values: FloatArray
    variate_p_values: FloatArray | None
    decisions: Decisions
    closed: list[EventRow]

    @classmethod
    def nothing(cls, width: int, rows: int = 0, *, by_variate: bool = True) -> Judged:
        """Return rows (default none) of ``width`` variates of which nothing is known yet."""
        none, wide = np.full(rows, np.nan), np.full((rows, width), np.nan)
        return cls(
            joint=none,
            z=wide,
            values=wide,
            expected=wide,
            p_values=none,
            variate_p_values=wide if by_variate else None,
            decisions=Decisions(np.zeros(rows, dtype=bool), none, none),
            closed=[],
        )

    def since(self, row: int) -> Judged:
        """Return the rows from the one at position ``row`` on, with all events that ended."""
        if not row:
            return self
        sizes, said = self.variate_p_values, self.decisions
        return Judged(
            joint=self.joint[row:],
            z=self.z[row:],
            values=self.values[row:],
            expected=self.expected[row:],
            p_values=self.p_values[row:],
            variate_p_values=None if sizes is None else sizes[row:],
            decisions=Decisions(said.alarm[row:], said.threshold[row:], said.low[row:]),
            closed=self.closed,
        )

    @classmethod
    def join(cls, parts: Sequence[Judged]) -> Judged:
        """Return the rows of all parts (at least one), in order."""
        if len(parts) == 1:
            return parts[0]
        sizes = [part.variate_p_values for part in parts]
        kept = [size for size in sizes if size is not None]
        return cls(
            joint=np.concatenate([part.joint for part in parts]),
            z=np.concatenate([part.z for part in parts]),
            values=np.concatenate([part.values for part in parts]),
            expected=np.concatenate([part.expected for part in parts]),
            p_values=np.concatenate([part.p_values for part in parts]),
            variate_p_values=np.concatenate(kept) if len(kept) == len(parts) else None,
            decisions=Decisions(*(np.concatenate(each) for each in zip(*(p.decisions for p in parts), strict=True))),
            closed=[event for part in parts for event in part.closed],
        )


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Rows taken that wait for their smoothed score: z, values, expected [N, V], confirmed [N]."""

    z: FloatArray
    values: FloatArray
    expected: FloatArray
    confirmed: BoolArray

    @classmethod
    def nothing(cls, width: int) -> Waiting:
        """Return no rows of ``width`` variates."""
        none = np.empty((0, width))
        return cls(z=none, values=none, expected=none, confirmed=np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.confirmed)

    def part(self, rows: slice) -> Waiting:
        """Return some of the rows."""
        return Waiting(
            z=self.z[rows], values=self.values[rows], expected=self.expected[rows], confirmed=self.confirmed[rows]
        )

    def then(self, later: Waiting) -> Waiting:
        """Return these rows and later ones."""
        if not len(self):
            return later
        return Waiting(
            z=np.concatenate([self.z, later.z]),
            values=np.concatenate([self.values, later.values]),
            expected=np.concatenate([self.expected, later.expected]),
            confirmed=np.concatenate([self.confirmed, later.confirmed]),
        )


@dataclass
class Under:
    """What an event under way has shown so far: up to its last alarm, and since then, in case it goes on.

    Attributes:
        settled, since: rows up to the end of the event, and those after it.
    """

    settled: Extremes
    since: Extremes

    @classmethod
    def nothing(cls, width: int) -> Under:
        """Return the memory of no row of ``width`` variates."""
        return cls(Extremes.nothing(width), Extremes.nothing(width))

    def settle(self) -> None:
        """Count the rows since the last alarm as part of the event."""
        self.settled.join(self.since)
        self.since = Extremes.nothing(len(self.since.marginal))


@dataclass(frozen=True)
class Ended:
    """The last event that ended: what a later one may continue. ``origin``: first row of its chain."""

    end: int
    leading: frozenset[str]
    origin: int


@dataclass(eq=False, kw_only=True)
class Monitor:
    """State of one series.

    Attributes:
        names: of the variates.
        config: of events.
        model, buckets, calibration: fitted, never changed again.
        memory, smoother, rule: advance with every row.
        samples: sorted sizes of normal deviates a variate, for its p-values; None where they are not kept.
        row: absolute row that is judged next. start: first row that counts; events that end before it are nobody's.
        tracker, under, ended: of events.
        waiting: rows from ``row`` on that have been taken and wait for a smoothed score.
        alarms, scored: flags of the most recent rows from ``start`` on, at most ``recent`` of them.
    """

    series_id: str
    names: tuple[str, ...]
    config: EventConfig
    model: ScoreModel
    memory: Memory = field(default_factory=Memory)
    buckets: BucketScale | None
    calibration: Calibration
    smoother: Smoother | None
    rule: ThresholdRule
    samples: tuple[FloatArray, ...] | None
    row: int
    start: int
    recent: int
    waiting: Waiting | None = None
    tracker: SegmentTracker = field(init=False)
    under: Under = field(init=False)
    ended: Ended | None = None
    alarms: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    scored: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self) -> None:
        self.tracker = SegmentTracker(self.config, first=self.row)
        self.under = Under.nothing(len(self.names))

    @property
    def next_row(self) -> int:
        """The absolute row that is taken next."""
        return self.row + (0 if self.waiting is None else len(self.waiting))

    def run(
        self,
        deviations: FloatArray,
        values: FloatArray,
        buckets: FloatArray | None = None,
        confirmed: BoolArray | None = None,
        expected: FloatArray | None = None,
        impossible: BoolArray | None = None,
    ) -> Judged:
        """Take the next rows in time order and return those that can be judged now, from ``row`` on.

        Args:
            deviations: [N, K, V]. values: [N, V].
            buckets: [N], where scores are compared within buckets.
            confirmed: [N] rows that a rule must not learn from; none by default.
            expected: [N, V], told again of the rows judged; default unknown.
            impossible: [N, V] values that are judged and say nothing of later rows; none by default.
        """
        found = self.model.raw(deviations, values, self.memory, impossible)
        raw = found.joint
        if self.buckets is not None and buckets is not None:
            raw = self.buckets.apply(raw, buckets)
        rows = Waiting(
            z=found.z,
            values=values,
            expected=np.full(values.shape, np.nan) if expected is None else expected,
            confirmed=np.zeros(raw.size, dtype=bool) if confirmed is None else confirmed,
        )
        joint, decisions, rows = self._judge(raw, rows)
        p_values = self.calibration.p_values(joint, self.row + np.arange(joint.size))
        closed = self._walk(rows.z, joint, p_values, decisions)
        counted = slice(max(self.start - self.row, 0), joint.size)
        self.alarms = np.concatenate([self.alarms, decisions.alarm[counted]])[-self.recent :]
        self.scored = np.concatenate([self.scored, ~np.isnan(joint[counted])])[-self.recent :]
        self.row += joint.size
        return Judged(
            joint=joint,
            z=rows.z,
            values=rows.values,
            expected=rows.expected,
            p_values=p_values,
            variate_p_values=self._variate_p_values(rows.z),
            decisions=decisions,
            closed=closed,
        )

    def current(self) -> EventRow | None:
        """Return the event that may still grow, None where there is none."""
        segment = self.tracker.current
        return None if segment is None or segment.end < self.start else self._event(segment)

    def _judge(self, raw: FloatArray, rows: Waiting) -> tuple[FloatArray, Decisions, Waiting]:
        """Return the scores that are known now, what the rule says of them, and the rows that they are of."""
        smoother = self.smoother
        if smoother is None or not smoother.latency:
            return (*self._decide(raw, smoother, rows.confirmed), rows)
        joint = smoother.run(raw)
        rows = rows if self.waiting is None else self.waiting.then(rows)
        self.waiting = rows.part(slice(joint.size, None))
        rows = rows.part(slice(joint.size))
        return (*self._decide(joint, None, rows.confirmed), rows)

    def _decide(self, raw: FloatArray, smoother: Smoother | None, confirmed: BoolArray) -> tuple[FloatArray, Decisions]:
        rule = self.rule
        if not confirmed.any():
            return smooth_and_judge(raw, smoother, rule)
        if smoother is None or not smoother.resets:
            joint = raw if smoother is None else smoother.run(raw)
            return joint, judge(rule, joint, confirmed)
        joint, parts = np.empty_like(raw), []
        for i in range(raw.size):
            joint[i] = smoother.step(float(raw[i]))
            parts.append(judge(rule, joint[i : i + 1], confirmed[i : i + 1]))
            smoother.notify(bool(parts[-1].alarm[0]))
        return joint, Decisions(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _walk(self, z: FloatArray, joint: FloatArray, p_values: FloatArray, decisions: Decisions) -> list[EventRow]:
        """Advance the events over all rows; quiet stretches are passed over at once."""
        tracker, closed = self.tracker, []
        alarms = np.flatnonzero(decisions.alarm)
        size, i, block = joint.size, 0, range(0)
        while i < size:
            if tracker.is_idle:
                place = int(np.searchsorted(alarms, i))
                following = int(alarms[place]) if place < alarms.size else size
                tracker.skip(following - i)
                i = following
                if i == size:
                    break
            if i not in block:
                block = range(i, min(i + _AHEAD, size))
                parts = contributions(z[block.start : block.stop], self.model.covariance, self.model.constant)
            score, threshold = float(joint[i]), float(decisions.threshold[i])
            ended = tracker.step(score, bool(decisions.alarm[i]), float(decisions.low[i]))
            if ended is not None and ended.end >= self.start:
                closed.append(self._close(ended))
            if tracker.is_idle or tracker.start == tracker.row:
                self.under = Under.nothing(z.shape[1])
            if not tracker.is_idle:
                self.under.since.add(parts, i - block.start, score, threshold, float(p_values[i]))
                if tracker.end == tracker.row:
                    self.under.settle()
            i += 1
        return closed

    def _event(self, segment: Segment) -> EventRow:
        found = self.under.settled
        variates = rank_extremes(self.names, found, limit=self.config.ranked_variates)
        last = self.ended
        goes_on = last is not None and is_continuation(
            segment.start, leading_variates(variates), last.end, last.leading, self.config.cooldown
        )
        return EventRow(
            segment=segment,
            peak_score=found.score,
            p_value=found.p_value,
            threshold=found.threshold,
            variates=variates,
            continues=last.origin if goes_on and last is not None else None,
        )

    def _close(self, segment: Segment) -> EventRow:
        event = self._event(segment)
        origin = segment.start if event.continues is None else event.continues
        self.ended = Ended(segment.end, leading_variates(event.variates), origin)
        return event

    def _variate_p_values(self, z: FloatArray) -> FloatArray | None:
        """Return the conformal p-value of |z| of every row and variate by the normal rows before, else NaN."""
        if self.samples is None:
            return None
        size, out = np.abs(z), np.full_like(z, np.nan)
        for v, sample in enumerate(self.samples):
            if sample.size:
                out[:, v] = ranked_p_values(sample, size[:, v])
        return out
