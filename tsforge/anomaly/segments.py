"""From alarm rows to events: hysteresis, merge, minimum length; over a span or row by row, with equal results."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tsforge.anomaly.config import EventConfig
from tsforge.anomaly.scorers import runs
from tsforge.anomaly.thresholds import Decisions


@dataclass(frozen=True)
class Segment:
    """Rows ``start .. end`` (both included) of one event, its highest score at ``peak``; open = it may still grow."""

    start: int
    end: int
    peak: int
    is_open: bool = False

    @property
    def length(self) -> int:
        """Return the number of rows, both ends included."""
        return self.end - self.start + 1


def find_segments(scores: ArrayLike, decisions: Decisions, config: EventConfig) -> list[Segment]:
    """Return the events of a span in time order.

    An event opens at an alarm and stays open while the score exceeds the low level; ``patience`` rows at or below it,
    or one missing row, close it. Events at most ``merge_gap`` rows apart become one. Short ones go.
    """
    s = np.asarray(scores, dtype=np.float64)
    index = np.arange(s.size)
    missing = np.isnan(s)
    with np.errstate(invalid="ignore"):
        above = (decisions.alarm | (s > decisions.low)) & ~missing
    last_above = np.maximum.accumulate(np.where(above, index, -config.patience))
    last_missing = np.maximum.accumulate(np.where(missing, index, -1))
    alive = (index - last_above < config.patience) & (last_above > last_missing)
    spans: list[tuple[int, int]] = []
    is_active = False
    for start, stop in runs(alive):
        alarms = np.flatnonzero(decisions.alarm[start:stop])
        if not alarms.size:
            continue
        first, last = start + int(alarms[0]), int(last_above[stop - 1])
        is_active = stop == s.size
        if spans and first - spans[-1][1] - 1 <= config.merge_gap:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    segments = []
    for position, (start, end) in enumerate(spans):
        is_last = position == len(spans) - 1
        is_open = is_last and (is_active or s.size - 1 - end <= config.merge_gap)
        peak = start + int(np.nanargmax(s[start : end + 1]))
        segments.append(Segment(start, end, peak, is_open))
    return [segment for segment in segments if segment.length >= config.min_length]


class SegmentTracker:
    """The same, row by row: ``step`` returns an event when it is over, ``current`` the one that may still grow."""

    def __init__(self, config: EventConfig, first: int = 0) -> None:
        self.config = config
        self._row = first - 1
        self._is_active = False
        self._quiet = 0
        self._start = self._end = self._peak = -1
        self._peak_score = -math.inf
        self._later_peak = -1
        self._later_score = -math.inf

    def step(self, score: float, alarm: bool, low: float) -> Segment | None:
        """Take the next row; return the event that can no longer grow, if one just ended."""
        self._row += 1
        is_missing = math.isnan(score)
        ended = None
        if self._start >= 0 and not is_missing and score > self._later_score:
            self._later_peak, self._later_score = self._row, score
        if self._is_active:
            if is_missing:
                self._is_active = False
            elif alarm or score > low:
                self._extend()
            else:
                self._quiet += 1
                self._is_active = self._quiet < self.config.patience
        elif alarm and self._start >= 0 and self._row - self._end - 1 <= self.config.merge_gap:
            self._is_active = True
            self._extend()
        elif alarm:
            ended = self._close()
            self._is_active = True
            self._start, self._peak_score = self._row, -math.inf
            self._later_peak, self._later_score = self._row, score
            self._extend()
        if ended is None and not self._is_active and self._start >= 0 and self._row - self._end > self.config.merge_gap:
            ended = self._close()
        return ended

    @property
    def is_idle(self) -> bool:
        """True when no event is under way, not even one too short to count."""
        return self._start < 0

    @property
    def row(self) -> int:
        """Return the row taken last."""
        return self._row

    @property
    def start(self) -> int:
        """Return the first row of what is under way, -1 when idle."""
        return self._start

    @property
    def end(self) -> int:
        """Return the last row so far of what is under way, -1 when idle."""
        return self._end

    def skip(self, rows: int) -> None:
        """Take so many rows without an alarm while idle: the same as ``step`` for each."""
        self._row += rows

    @property
    def current(self) -> Segment | None:
        """Return the event that may still grow, None if there is none of the minimum length."""
        if self._start < 0 or self._end - self._start + 1 < self.config.min_length:
            return None
        return Segment(self._start, self._end, self._peak, True)

    def state(self) -> dict[str, Any]:
        """Return the memory as plain JSON types (None for no number)."""
        plain = {name: value for name, value in vars(self).items() if name != "config"}
        return {name: None if value == -math.inf else value for name, value in plain.items()}

    @classmethod
    def restore(cls, config: EventConfig, state: dict[str, Any]) -> SegmentTracker:
        """Return the tracker whose ``state()`` this is."""
        tracker = cls(config)
        for name, value in state.items():
            setattr(tracker, name, -math.inf if value is None else value)
        return tracker

    def _extend(self) -> None:
        self._end, self._quiet = self._row, 0
        if self._later_score > self._peak_score:
            self._peak, self._peak_score = self._later_peak, self._later_score
        self._later_peak, self._later_score = -1, -math.inf

    def _close(self) -> Segment | None:
        segment = self.current
        self._start = self._end = self._peak = -1
        self._peak_score = self._later_score = -math.inf
        return None if segment is None else Segment(**{**asdict(segment), "is_open": False})


def is_continuation(
    start: int, leading: frozenset[str], last_end: int, last_leading: frozenset[str], cooldown: int
) -> bool:
    """Return whether an event goes on with the one before it: soon after its end, and on some of the same variates."""
    return start - last_end <= cooldown and bool(leading & last_leading)
