"""Scores with memory over rows: exponential, causal median, one-sided cumulative sum, two-sided mean; state survives a
restart.

    exponential  S[t] = a s[t] + (1 - a) S[t-1],  S[0] = s[0]
    median       median of the scores observed among the last ``window`` rows
    cusum        C[t] = max(0, C[t-1] + s[t] - k),  k = median of the calibration scores + shift / 2;  0 after an alarm
    two_sided    S[t] = sum_j w[j] s[t+j] / sum_j w[j],  w[j] = (1 - a)^|j|,  j = -r .. r, over the scores observed

The first three are causal; the last is known r rows later, and its first rows have fewer than r before them. A missing
score (NaN) gives NaN, and what they return is a score like any other: calibrate after them. ``run`` is ``step`` over
and over, so that cutting the rows differently changes no bit.

Sources: exponential: Roberts (1959), Technometrics 1 (3); cusum: Page (1954), Biometrika 41, with the reference value k
half a shift above the usual level. Deviation: the shift is in robust standard deviations (interquartile range / 1.349)
of the calibration scores, so that one setting fits series of any scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.config import (
    CusumSmoothing,
    ExponentialSmoothing,
    MedianSmoothing,
    ScoreConfig,
    TwoSidedSmoothing,
)
from tsforge.anomaly.residuals import IQR_OF_NORMAL
from tsforge.anomaly.thresholds import Decisions, ThresholdRule
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
NAN = float("nan")
_FEW = 4  # rows that are stepped rather than run: a stream often brings one


class Smoother(ABC):
    """Turns scores into scores, row by row, remembering rows before."""

    kind: str
    latency = 0
    """Rows after a row that its smoothed score reads."""
    resets = False
    """Whether alarms change later scores: such a smoother must hear of each alarm by ``notify`` before the next row."""

    def fit(self, calibration: ArrayLike) -> Self:
        """Learn what the smoother needs from unsmoothed calibration scores; most need nothing. Returns itself."""
        return self

    @abstractmethod
    def step(self, score: float) -> float:
        """Take the score of the next row and return the smoothed one of the row ``latency`` rows before it.

        NaN stays NaN, and is also what is returned while there is no such row.
        """

    def run(self, scores: ArrayLike) -> FloatArray:
        """Take the scores of rows in time order and return the smoothed ones that are known now, in time order.

        The same as repeated ``step``, from the state as it is. Of the first ``latency`` rows ever taken none is known:
        that many are returned less, and wait.
        """
        s = np.asarray(scores, dtype=np.float64).ravel()
        return np.array([self.step(score) for score in s.tolist()], dtype=np.float64)

    def notify(self, alarm: bool) -> None:  # noqa: B027 - most smoothers do not care
        """Say whether the row of the last ``step`` raised an alarm."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return settings and memory as plain JSON types; ``restore_smoother`` reads them back."""


class Exponential(Smoother):
    """Weighted mean of all rows so far, weights falling by ``1 - weight`` a row.

    After missing rows it starts afresh (``reset``), or goes on as if the level had decayed with the time passed
    (``decay``): after g missing rows the old level weighs ``(1 - weight) ** (g + 1)``.
    """

    kind = "exponential"

    def __init__(self, weight: float, gaps: Literal["reset", "decay"] = "reset") -> None:
        self.weight, self.gaps = weight, gaps
        self._level: float | None = None
        self._missed = 0

    def step(self, score: float) -> float:
        """Return ``a s + (1 - a) S``."""
        if score != score:  # NaN
            self._missed += 1
            return NAN
        level = self._level
        if level is None or (self._missed and self.gaps == "reset"):
            level = score
        elif self._missed:
            kept = (1.0 - self.weight) ** (self._missed + 1)
            level = (1.0 - kept) * score + kept * level
        else:
            level = self.weight * score + (1.0 - self.weight) * level
        self._level, self._missed = level, 0
        return level

    def state(self) -> dict[str, Any]:
        """Return settings, level and the number of missing rows since."""
        return {
            "kind": self.kind,
            "weight": self.weight,
            "gaps": self.gaps,
            "level": self._level,
            "missed": self._missed,
        }


class MovingMedian(Smoother):
    """Median of the scores observed among the last ``window`` rows, this one included; missing rows take up a place."""

    kind = "median"

    def __init__(self, window: int) -> None:
        self.window = window
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def step(self, score: float) -> float:
        """Return the median; the mean of the two middle scores where their number is even."""
        if len(self._recent) == self.window:
            old = self._recent.popleft()
            if old == old:
                del self._sorted[bisect_left(self._sorted, old)]
        self._recent.append(score)
        if score != score:
            return NAN
        insort(self._sorted, score)
        middle, odd = divmod(len(self._sorted), 2)
        return self._sorted[middle] if odd else (self._sorted[middle - 1] + self._sorted[middle]) / 2.0

    def state(self) -> dict[str, Any]:
        """Return the window, oldest row first; a missing row is None."""
        recent = [None if score != score else score for score in self._recent]
        return {"kind": self.kind, "window": self.window, "recent": recent}


class CumulativeSum(Smoother):
    """How far scores have summed up above the usual level: small shifts that last. Held over missing rows."""

    kind = "cusum"
    resets = True

    def __init__(self, shift: float) -> None:
        self.shift = shift
        self.reference: float | None = None
        self._sum = 0.0

    def fit(self, calibration: ArrayLike) -> Self:
        """Set k from unsmoothed calibration scores (NaN is left out).

        Raises:
            DataError: no calibration score, or half of them or more are alike so that a shift has no unit.
        """
        s = np.asarray(calibration, dtype=np.float64).ravel()
        s = s[~np.isnan(s)]
        if not s.size:
            raise DataError("score.smoothing.kind=cusum needs calibration scores and got none that is a number")
        quarter, median, three = (float(q) for q in np.quantile(s, (0.25, 0.5, 0.75)))
        if three <= quarter:
            raise DataError(
                f"score.smoothing.kind=cusum: half of the {s.size} calibration scores are equal, so a shift of "
                f"{self.shift:g} standard deviations has no size; take another joint score or smoothing"
            )
        self.reference = median + 0.5 * self.shift * (three - quarter) / IQR_OF_NORMAL
        return self

    def step(self, score: float) -> float:
        """Return ``max(0, C + s - k)``.

        Raises:
            DataError: ``fit`` has not been called.
        """
        if self.reference is None:
            raise DataError("a cumulative sum needs calibration scores first: call fit before step or run")
        if score != score:
            return NAN
        self._sum = max(0.0, self._sum + (score - self.reference))
        return self._sum

    def notify(self, alarm: bool) -> None:
        """Start again at 0 after an alarm."""
        if alarm:
            self._sum = 0.0

    def state(self) -> dict[str, Any]:
        """Return the shift, k and the sum."""
        return {"kind": self.kind, "shift": self.shift, "reference": self.reference, "sum": self._sum}


class TwoSided(Smoother):
    """Weighted mean over the rows around a row, the same to both sides: nothing lags, and everything is told late.

    A row that misses its score has none and counts for no other. Sums go from the oldest row to the newest.
    """

    kind = "two_sided"

    def __init__(self, weight: float, reach: int) -> None:
        self.weight, self.reach, self.latency = weight, reach, reach
        self._weights = ((1.0 - weight) ** np.abs(np.arange(-reach, reach + 1.0))).tolist()
        self._recent: deque[float] = deque(maxlen=2 * reach + 1)
        self._waiting = 0  # rows taken whose own score is not known yet

    def step(self, score: float) -> float:
        """Return the mean around the row ``reach`` rows before; NaN while there is none."""
        self._recent.append(score)
        if self._waiting < self.reach:
            self._waiting += 1
            return NAN
        recent = list(self._recent)
        if recent[-1 - self.reach] != recent[-1 - self.reach]:
            return NAN
        total = mass = 0.0
        for weight, one in zip(self._weights[-len(recent) :], recent, strict=True):
            if one == one:
                total += weight * one
                mass += weight
        return total / mass

    def run(self, scores: ArrayLike) -> FloatArray:
        """Return the means that are known now: ``step`` for all rows side by side, with the same bits."""
        new = np.asarray(scores, dtype=np.float64).ravel()
        known = max(self._waiting + new.size - self.reach, 0)
        if new.size <= _FEW:
            return np.array([self.step(score) for score in new.tolist()][new.size - known :], dtype=np.float64)
        rows = np.concatenate([np.array(self._recent, dtype=np.float64), new])
        first = rows.size - self.reach - known  # of the rows told
        lead = self.reach - first  # rows lacking before it
        padded = np.pad(rows, (max(lead, 0), 0), constant_values=NAN)[max(-lead, 0) :]
        seen = ~np.isnan(padded)
        filled, counted = np.where(seen, padded, 0.0), seen.astype(np.float64)
        total, mass = np.zeros(known), np.zeros(known)
        for place, weight in enumerate(self._weights):
            total += weight * filled[place : place + known]
            mass += weight * counted[place : place + known]
        self._recent.extend(new.tolist())
        self._waiting = min(self._waiting + new.size, self.reach)
        own = rows[first : first + known]
        return np.where(np.isnan(own), NAN, total / np.where(mass > 0.0, mass, 1.0))

    def state(self) -> dict[str, Any]:
        """Return the settings and the rows around those that wait, oldest first; a missing row is None."""
        recent = [None if score != score else score for score in self._recent]
        return {
            "kind": self.kind,
            "weight": self.weight,
            "reach": self.reach,
            "waiting": self._waiting,
            "recent": recent,
        }


def build_smoother(config: ScoreConfig) -> Smoother | None:
    """Return the smoother that ``score.smoothing`` asks for, with no memory yet; None where scores stay as they are."""
    settings = config.smoothing
    if isinstance(settings, ExponentialSmoothing):
        return Exponential(settings.weight, settings.gaps)
    if isinstance(settings, MedianSmoothing):
        return MovingMedian(settings.window)
    if isinstance(settings, CusumSmoothing):
        return CumulativeSum(settings.shift)
    if isinstance(settings, TwoSidedSmoothing):
        return TwoSided(settings.weight, settings.rows)
    return None


def restore_smoother(state: dict[str, Any]) -> Smoother:
    """Return the smoother whose ``state()`` this is.

    Raises:
        DataError: the state is of no known smoother or lacks a field.
    """
    try:
        kind = state["kind"]
        if kind == Exponential.kind:
            exponential = Exponential(state["weight"], state["gaps"])
            exponential._level, exponential._missed = state["level"], state["missed"]
            return exponential
        if kind == MovingMedian.kind:
            median = MovingMedian(state["window"])
            median.run([NAN if score is None else score for score in state["recent"]])
            return median
        if kind == CumulativeSum.kind:
            cusum = CumulativeSum(state["shift"])
            cusum.reference, cusum._sum = state["reference"], state["sum"]
            return cusum
        if kind == TwoSided.kind:
            two_sided = TwoSided(state["weight"], state["reach"])
            two_sided._recent.extend(NAN if score is None else score for score in state["recent"])
            two_sided._waiting = state["waiting"]
            return two_sided
    except KeyError as error:
        raise DataError(f"the stored state of a smoother lacks {error}; start the detector again") from error
    raise DataError(f"the stored state names the unknown smoother {kind!r}; start the detector again")


def smooth_and_judge(scores: ArrayLike, smoother: Smoother | None, rule: ThresholdRule) -> tuple[FloatArray, Decisions]:
    """Return the smoothed scores that are known now and what the rule says of them; both advance their state.

    The one place that knows that a cumulative sum must hear of an alarm before the next row.
    """
    s = np.asarray(scores, dtype=np.float64).ravel()
    if smoother is not None and smoother.latency:
        s, smoother = smoother.run(s), None
    if s.size > _FEW and (smoother is None or not smoother.resets):
        smoothed = s if smoother is None else smoother.run(s)
        return smoothed, rule.run(smoothed)
    out = s.copy()
    decisions = Decisions(np.zeros(s.size, dtype=bool), np.empty(s.size), np.empty(s.size))
    for i, score in enumerate(s.tolist()):
        if smoother is not None:
            out[i] = smoother.step(score)
        decisions.alarm[i], decisions.threshold[i], decisions.low[i] = rule.step(float(out[i]))
        if smoother is not None:
            smoother.notify(bool(decisions.alarm[i]))
    return out, decisions
