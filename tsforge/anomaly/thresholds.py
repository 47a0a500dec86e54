"""Threshold rules: from scores to alarms, one row at a time or a whole span at once with the same result.

Every rule offers ``fit(calibration)``, ``step(score)``, ``run(scores)`` and a JSON-ready ``state()``; a missing score
(NaN) never alarms and never enters a rule's memory. "Contamination" (flag the top x % of the scored span) is not here
on purpose: it always alarms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.config import BudgetRule, FixedRule, QuantileRule, RollingQuantileRule
from tsforge.anomaly.rolling import RollingLargest
from tsforge.core.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]
LONGEST_ALPHA = 0.5  # an event's low level is never below the median score
MIN_WINDOW = 5_000


class Decision(NamedTuple):
    """One row judged: alarm if ``score > threshold``; an open event stays open while ``score > low``."""

    alarm: bool
    threshold: float
    low: float


class Decisions(NamedTuple):
    """Many rows judged; all arrays [N]."""

    alarm: NDArray[np.bool_]
    threshold: FloatArray
    low: FloatArray


def upper_rank(alpha: float, size: int) -> int:
    """Return k such that the k-th largest of ``size`` scores is the ``ceil((1 - alpha)(size + 1))``-th smallest.

    Where that rank lies beyond the sample (alpha < 1 / (size + 1)) the largest score is taken: k = 1.
    """
    return max(1, min(size, math.floor(alpha * (size + 1) + 1e-9)))


class ThresholdRule(ABC):
    """A causal rule with serialisable state."""

    kind: str
    learns = False
    """Whether judged scores change later judgements."""

    @abstractmethod
    def fit(self, calibration: ArrayLike) -> Self:
        """Start from calibration scores in time order (NaN is left out); returns the rule itself."""

    @abstractmethod
    def step(self, score: float) -> Decision:
        """Judge one score, then learn from it where the rule learns."""

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``."""
        s = np.asarray(scores, dtype=np.float64).ravel()
        alarm, threshold, low = np.zeros(s.size, dtype=bool), np.empty(s.size), np.empty(s.size)
        step = self.step
        for i, score in enumerate(s.tolist()):
            alarm[i], threshold[i], low[i] = step(score)
        return Decisions(alarm, threshold, low)

    @property
    @abstractmethod
    def alpha(self) -> float | None:
        """Return the nominal share of alarms on normal rows, None where none is promised."""

    @abstractmethod
    def describe(self) -> str:
        """Return the rule and its settings in one canonical string, part of event ids."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return settings and memory as plain JSON types; ``restore_rule`` reads them back."""


def _sample(calibration: ArrayLike, kind: str) -> FloatArray:
    s = np.asarray(calibration, dtype=np.float64).ravel()
    s = s[~np.isnan(s)]
    if not s.size:
        raise DataError(f"rule {kind} needs calibration scores and got none that is a number")
    return s


class Fixed(ThresholdRule):
    """A level given by the user."""

    kind = "fixed"

    def __init__(self, value: float) -> None:
        self.value = float(value)

    def fit(self, calibration: ArrayLike) -> Self:
        """Return itself: domain limits need no calibration."""
        return self

    def step(self, score: float) -> Decision:
        """Judge one score."""
        return Decision(score > self.value, self.value, self.value)

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order."""
        return _constant(scores, self.value, self.value)

    @property
    def alpha(self) -> float | None:
        """Return None: a fixed level promises no rate."""
        return None

    def describe(self) -> str:
        """Return ``fixed(value=...)``."""
        return f"fixed(value={self.value:.6g})"

    def state(self) -> dict[str, Any]:
        """Return the level."""
        return {"kind": self.kind, "value": self.value}


class Quantile(ThresholdRule):
    """The calibration score that a share alpha exceeded; static."""

    kind = "quantile"

    def __init__(self, alpha: float, *, low_factor: float = 5.0) -> None:
        self._alpha, self.low_factor = float(alpha), float(low_factor)
        self.threshold = self.low = math.nan

    def fit(self, calibration: ArrayLike) -> Self:
        """Set both levels from the calibration scores."""
        ordered = np.sort(_sample(calibration, self.kind))
        self.threshold = float(ordered[-upper_rank(self._alpha, ordered.size)])
        self.low = float(ordered[-upper_rank(_low_alpha(self._alpha, self.low_factor), ordered.size)])
        return self

    def step(self, score: float) -> Decision:
        """Judge one score."""
        return Decision(score > self.threshold, self.threshold, self.low)

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order."""
        return _constant(scores, self.threshold, self.low)

    @property
    def alpha(self) -> float | None:
        """Return the nominal share of alarms."""
        return self._alpha

    def describe(self) -> str:
        """Return ``quantile(alpha=...)``."""
        return f"quantile(alpha={self._alpha:.6g})"

    def state(self) -> dict[str, Any]:
        """Return settings and both levels."""
        return {
            "kind": self.kind,
            "alpha": self._alpha,
            "low_factor": self.low_factor,
            "threshold": self.threshold,
            "low": self.low,
        }


class RollingQuantile(ThresholdRule):
    """The same level over the last ``window`` scores, flagged ones included.

    Every score is judged against the window before it. Calibration scores are the start of the window, which then grows
    to its full length. Leaving flagged rows out sounds prudent and is fatal after a level shift: everything is flagged,
    nothing is learnt, alarms never end.
    """

    kind = "rolling_quantile"
    learns = True

    def __init__(self, alpha: float, window: int, *, low_factor: float = 5.0) -> None:
        self._alpha, self.window, self.low_factor = float(alpha), int(window), float(low_factor)
        self._memory = RollingLargest(self.window)

    def fit(self, calibration: ArrayLike) -> Self:
        """Start the window with the calibration scores, the most recent ones if there are too many."""
        self._memory = RollingLargest(self.window, _sample(calibration, self.kind))
        return self

    def step(self, score: float) -> Decision:
        """Judge one score against the window before it, then take it into the window."""
        memory = self._memory
        if not memory.size:
            raise DataError("rule rolling_quantile was not fitted; call fit(calibration) before step or run")
        threshold, low = self._levels()
        if score == score:  # a missing score is NaN, the only value that differs from itself
            memory.push(score)
        return Decision(score > threshold, threshold, low)

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``, faster."""
        if not self._memory.size:
            return super().run(scores)
        s = np.asarray(scores, dtype=np.float64).ravel()
        seen = ~np.isnan(s)
        high, low = self._memory.sweep(s[seen], self._ranks)
        last_high, last_low = self._levels()
        # a missing score changes nothing: it shows the levels that the next score will be judged by
        before = np.cumsum(seen) - seen
        threshold = np.append(high, last_high)[before]
        with np.errstate(invalid="ignore"):
            return Decisions(s > threshold, threshold, np.append(low, last_low)[before])

    def _ranks(self, size: int) -> tuple[int, int]:
        return upper_rank(self._alpha, size), upper_rank(_low_alpha(self._alpha, self.low_factor), size)

    def _levels(self) -> tuple[float, float]:
        small, large = self._ranks(self._memory.size)
        # the larger rank first: it makes the list long enough for both
        low = self._memory.kth_largest(large)
        return self._memory.kth_largest(small), low

    @property
    def alpha(self) -> float | None:
        """Return the nominal share of alarms."""
        return self._alpha

    def describe(self) -> str:
        """Return ``rolling_quantile(alpha=..., window=...)``."""
        return f"rolling_quantile(alpha={self._alpha:.6g},window={self.window})"

    def state(self) -> dict[str, Any]:
        """Return settings and the window, oldest score first."""
        return {
            "kind": self.kind,
            "alpha": self._alpha,
            "window": self.window,
            "low_factor": self.low_factor,
            "scores": self._memory.values().tolist(),
        }


def _low_alpha(alpha: float, factor: float) -> float:
    return min(max(alpha, LONGEST_ALPHA), alpha * factor)


def _constant(scores: ArrayLike, threshold: float, low: float) -> Decisions:
    s = np.asarray(scores, dtype=np.float64).ravel()
    with np.errstate(invalid="ignore"):
        return Decisions(s > threshold, np.full(s.size, threshold), np.full(s.size, low))


def restore_rule(state: dict[str, Any]) -> ThresholdRule:
    """Return the rule whose ``state()`` this is.

    Raises:
        DataError: the state is of no known rule or lacks a field.
    """
    try:
        kind = state["kind"]
        if kind == Fixed.kind:
            return Fixed(state["value"])
        if kind == Quantile.kind:
            static = Quantile(state["alpha"], low_factor=state["low_factor"])
            static.threshold, static.low = float(state["threshold"]), float(state["low"])
            return static
        if kind == RollingQuantile.kind:
            rolling = RollingQuantile(state["alpha"], state["window"], low_factor=state["low_factor"])
            return rolling.fit(state["scores"]) if state["scores"] else rolling
    except KeyError as error:
        raise DataError(f"the stored state of a threshold rule lacks {error}; fit the rule again") from error
    raise DataError(f"the stored state names the unknown rule {kind!r}; fit the rule again")


def default_window(alpha: float, season_length: int | None) -> int:
    """Return the rolling window: the largest of 5,000 rows, 10 / alpha and two seasons."""
    return max(MIN_WINDOW, math.ceil(10.0 / alpha), 2 * (season_length or 0))


def budget_alpha(config: BudgetRule, points_per_day: float | None, num_series: int) -> float:
    """Return the share of rows that may alarm: budget / rows a day, divided among series where they share it.

    Raises:
        ConfigError: rows a day are unknown (time is a number), or the budget asks for more than every fifth row.
    """
    rows = config.points_per_day or points_per_day
    if rows is None:
        raise ConfigError(
            "rule.points_per_day: needed where time is a plain number, so that alarms per day mean something"
        )
    alpha = config.alarms_per_day / rows / (num_series if config.scope == "total" else 1)
    if alpha > 0.2:
        raise ConfigError(
            f"rule.alarms_per_day: {config.alarms_per_day:g} alarms a day at {rows:g} rows a day would flag "
            f"{alpha:.0%} of normal rows; ask for at most {0.2 * rows:.3g}"
        )
    return alpha


def build_rule(
    config: BudgetRule | RollingQuantileRule | QuantileRule | FixedRule,
    *,
    low_factor: float = 5.0,
    points_per_day: float | None = None,
    season_length: int | None = None,
    num_series: int = 1,
) -> ThresholdRule:
    """Return the rule a config asks for, not yet fitted.

    Args:
        low_factor: the low level is the quantile of ``low_factor * alpha``.
        points_per_day: rows a day of the grid. season_length: rows of the longest season.
        num_series: how many series share a total budget.
    """
    if isinstance(config, FixedRule):
        return Fixed(config.value)
    if isinstance(config, QuantileRule):
        return Quantile(config.alpha, low_factor=low_factor)
    alpha = budget_alpha(config, points_per_day, num_series) if isinstance(config, BudgetRule) else config.alpha
    window = config.window or default_window(alpha, season_length)
    return RollingQuantile(alpha, window, low_factor=low_factor)
