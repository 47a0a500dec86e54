"""Threshold rules: from scores to alarms, one row at a time or a whole span at once with the same result.

Every rule offers ``fit(calibration)``, ``step(score)``, ``run(scores)`` and a JSON-ready ``state()``; a missing score
(NaN) never alarms and never enters a rule's memory. "Contamination" (flag the top x % of the scored span) is not here
on purpose: it always alarms. Here are fixed levels and plain quantiles, and the two functions that know every rule;
``extreme_rules``, ``adaptive_rules`` and ``fdr_rule`` hold the others.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from tsforge.anomaly.adaptive_rules import Adaptive, EwNormalised
from tsforge.anomaly.config import (
    AdaptiveRule,
    BudgetRule,
    CalibrationConfig,
    DspotRule,
    EwNormalisedRule,
    FdrRule,
    FixedRule,
    PotRule,
    QuantileRule,
    RollingQuantileRule,
    RuleConfig,
    SpotRule,
)
from tsforge.anomaly.extreme_rules import Dspot, Pot, Spot
from tsforge.anomaly.fdr_rule import FalseDiscoveryRate
from tsforge.anomaly.rolling import RollingLargest
from tsforge.anomaly.rule_base import (
    Decision,
    Decisions,
    StaticRule,
    ThresholdRule,
    calibration_sample,
    low_alpha,
    not_fitted,
    upper_rank,
)
from tsforge.core.errors import ConfigError, DataError

__all__ = [
    "Decision",
    "Decisions",
    "Fixed",
    "Quantile",
    "RollingQuantile",
    "ThresholdRule",
    "budget_alpha",
    "build_rule",
    "default_window",
    "restore_rule",
]
MIN_WINDOW = 5_000


class Fixed(StaticRule):
    """A level given by the user."""

    kind = "fixed"

    def __init__(self, value: float) -> None:
        self.value = self.threshold = self.low = float(value)

    def fit(self, calibration: ArrayLike) -> Self:
        """Return itself: domain limits need no calibration."""
        return self

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

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        return cls(state["value"])


class Quantile(StaticRule):
    """The calibration score that a share alpha exceeded; static."""

    kind = "quantile"

    def __init__(self, alpha: float, *, low_factor: float = 5.0) -> None:
        self._alpha, self.low_factor = float(alpha), float(low_factor)

    def fit(self, calibration: ArrayLike) -> Self:
        """Set both levels from the calibration scores."""
        ordered = np.sort(calibration_sample(calibration, self.kind))
        self.threshold = float(ordered[-upper_rank(self._alpha, ordered.size)])
        self.low = float(ordered[-upper_rank(low_alpha(self._alpha, self.low_factor), ordered.size)])
        return self

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

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(state["alpha"], low_factor=state["low_factor"])
        rule.threshold, rule.low = float(state["threshold"]), float(state["low"])
        return rule


class RollingQuantile(ThresholdRule):
    """The same level over the last ``window`` scores, flagged ones included unless ``exclude_flagged`` says otherwise.

    Every score is judged against the window before it. Calibration scores are the start of the window, which then grows
    to its full length. Leaving flagged rows out sounds prudent and is fatal after a level shift: everything is flagged,
    nothing is learnt, alarms never end. Hence at most ``exclude_flagged`` flagged rows in a row stay outside the
    window; those after them enter it, until a row that is not flagged.
    """

    kind = "rolling_quantile"
    learns = True

    def __init__(self, alpha: float, window: int, *, low_factor: float = 5.0, exclude_flagged: int = 0) -> None:
        self._alpha, self.window, self.low_factor = float(alpha), int(window), float(low_factor)
        self.exclude_flagged = int(exclude_flagged)
        self._memory = RollingLargest(self.window)
        self._excluded = 0  # flagged rows left out in a row

    def fit(self, calibration: ArrayLike) -> Self:
        """Start the window with the calibration scores, the most recent ones if there are too many."""
        self._memory = RollingLargest(self.window, calibration_sample(calibration, self.kind))
        self._excluded = 0
        return self

    def step(self, score: float) -> Decision:
        """Judge one score against the window before it, then take it into the window."""
        memory = self._memory
        if not memory.size:
            raise not_fitted(self.kind)
        threshold, low = self._levels()
        alarm = score > threshold
        if alarm and self._excluded < self.exclude_flagged:
            self._excluded += 1
        elif score == score:  # a missing score is NaN, the only value that differs from itself
            memory.push(score)
            if not alarm:
                self._excluded = 0
        return Decision(alarm, threshold, low)

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``, faster."""
        if self.exclude_flagged or not self._memory.size:
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
        return upper_rank(self._alpha, size), upper_rank(low_alpha(self._alpha, self.low_factor), size)

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
        """Return ``rolling_quantile(alpha=..., window=...)``, with the exclusions where there may be any."""
        excluded = f",exclude_flagged={self.exclude_flagged}" if self.exclude_flagged else ""
        return f"rolling_quantile(alpha={self._alpha:.6g},window={self.window}{excluded})"

    def state(self) -> dict[str, Any]:
        """Return settings and the window, oldest score first."""
        return {
            "kind": self.kind,
            "alpha": self._alpha,
            "window": self.window,
            "low_factor": self.low_factor,
            "exclude_flagged": self.exclude_flagged,
            "excluded": self._excluded,
            "scores": self._memory.values().tolist(),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(
            state["alpha"],
            state["window"],
            low_factor=state["low_factor"],
            exclude_flagged=state["exclude_flagged"],
        )
        rule._memory = RollingLargest(rule.window, state["scores"])
        rule._excluded = state["excluded"]
        return rule


RULES: dict[str, type[ThresholdRule]] = {
    rule.kind: rule
    for rule in (Fixed, Quantile, RollingQuantile, Pot, Spot, Dspot, Adaptive, EwNormalised, FalseDiscoveryRate)
}


def restore_rule(state: dict[str, Any]) -> ThresholdRule:
    """Return the rule whose ``state()`` this is.

    Raises:
        DataError: the state is of no known rule or lacks a field.
    """
    try:
        kind = state["kind"]
        if kind in RULES:
            return RULES[kind].restore(state)
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
    config: RuleConfig,
    *,
    low_factor: float = 5.0,
    points_per_day: float | None = None,
    season_length: int | None = None,
    num_series: int = 1,
    calibration: CalibrationConfig | None = None,
) -> ThresholdRule:
    """Return the rule a config asks for, not yet fitted.

    Args:
        low_factor: the low level is the quantile of ``low_factor * alpha``.
        points_per_day: rows a day of the grid. season_length: rows of the longest season.
        num_series: how many series share a total budget.
        calibration: how rules that judge p-values make them.
    """
    match config:
        case FixedRule():
            return Fixed(config.value)
        case QuantileRule():
            return Quantile(config.alpha, low_factor=low_factor)
        case PotRule():
            return Pot(config.risk, level=config.level, shape=config.tail_shape, low_factor=low_factor)
        case DspotRule() | SpotRule():
            return _spot(config, low_factor)
        case EwNormalisedRule():
            return EwNormalised(config.alpha, config.half_life, low_factor=low_factor)
        case FdrRule():
            return FalseDiscoveryRate(config, calibration or CalibrationConfig(), low_factor=low_factor)
        case AdaptiveRule():
            window = config.window or default_window(config.alpha, season_length)
            return Adaptive(config.alpha, config.gain, window, low_factor=low_factor)
        case BudgetRule() | RollingQuantileRule():
            return _rolling(config, low_factor, points_per_day, season_length, num_series)


def _spot(config: SpotRule | DspotRule, low_factor: float) -> Spot:
    settings: dict[str, Any] = {
        "level": config.level,
        "shape": config.tail_shape,
        "exclude_flagged": config.exclude_flagged,
        "max_excesses": config.max_excesses,
        "low_factor": low_factor,
    }
    return (
        Dspot(config.risk, config.depth, **settings) if isinstance(config, DspotRule) else Spot(config.risk, **settings)
    )


def _rolling(
    config: BudgetRule | RollingQuantileRule,
    low_factor: float,
    points_per_day: float | None,
    season_length: int | None,
    num_series: int,
) -> RollingQuantile:
    if isinstance(config, BudgetRule):
        alpha, exclude_flagged = budget_alpha(config, points_per_day, num_series), 0
    else:
        alpha, exclude_flagged = config.alpha, config.exclude_flagged
    return RollingQuantile(
        alpha,
        config.window or default_window(alpha, season_length),
        low_factor=low_factor,
        exclude_flagged=exclude_flagged,
    )
