"""Rules that follow the scores: a level that is corrected by its own alarms, and scores standardised as they come.

    adaptive        a[t+1] = a[t] + gain (alpha - alarm[t]);  level = rolling quantile of share a[t]
    ew_normalised   z[t] = (log s[t] - m[t-1]) / sqrt(v[t-1]);  level = calibration quantile of z
                    d = log s[t] - m[t-1], cut at 3 sqrt(v[t-1]);  m += w d;  v = (1 - w) (v + w d^2)

``adaptive``: Gibbs and Candes, "Adaptive Conformal Inference Under Distribution Shift" (NeurIPS 2021), eq. 2, on the
scores of a rolling window instead of a fixed sample, because a level inside the calibration range cannot follow scores
that left it. Where a[t] is 0 or less nothing alarms, so for any scores whatever the share of alarms in T rows is at
most ``alpha + (a[1] + gain) / (gain T)``. Deviation: a[t] never exceeds one half, so that ordinary rows do not alarm to
make up for a quiet time; the share may then stay below alpha.

``ew_normalised``: weight ``w = 1 - 0.5^(1 / half_life)``; the recursion of mean and variance is that of West (1979),
Communications of the ACM 22 (9), in exponential form. Own choices: mean and variance start at those of all calibration
scores; scores below the smallest positive calibration score count as that one (log 0); the deviation never falls below
1 % of the calibration one.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from tsforge.anomaly.rolling import RollingLargest
from tsforge.anomaly.rule_base import (
    LONGEST_ALPHA,
    Decision,
    ThresholdRule,
    calibration_sample,
    low_alpha,
    not_fitted,
    upper_rank,
)
from tsforge.core.errors import DataError

CLIP = 3.0
LEAST_DEVIATION = 0.01
LARGEST_EXPONENT = 709.0  # exp overflows beyond


class Adaptive(ThresholdRule):
    """A rolling quantile whose share moves after every row: up a little, down a lot after an alarm."""

    kind = "adaptive"
    learns = True

    def __init__(self, alpha: float, gain: float, window: int, *, low_factor: float = 5.0) -> None:
        self._alpha, self.gain, self.window, self.low_factor = float(alpha), float(gain), int(window), float(low_factor)
        self._memory = RollingLargest(self.window)
        self._share = self._alpha

    def fit(self, calibration: ArrayLike) -> Self:
        """Start the window with the calibration scores, the most recent ones if there are too many."""
        self._memory = RollingLargest(self.window, calibration_sample(calibration, self.kind))
        self._share = self._alpha
        return self

    def step(self, score: float) -> Decision:
        """Judge one score against the window before it, then correct the share and take the score in."""
        memory = self._memory
        size = memory.size
        if not size:
            raise not_fitted(self.kind)
        # the larger rank first: it makes the list long enough for both
        low = memory.kth_largest(upper_rank(low_alpha(max(self._share, self._alpha), self.low_factor), size))
        threshold = memory.kth_largest(upper_rank(self._share, size)) if self._share > 0.0 else math.inf
        alarm = score > threshold
        if score == score:  # not NaN
            memory.push(score)
            self._share = min(self._share + self.gain * (self._alpha - alarm), LONGEST_ALPHA)
        return Decision(alarm, threshold, low)

    @property
    def alpha(self) -> float | None:
        """Return the share of alarms it keeps to."""
        return self._alpha

    def describe(self) -> str:
        """Return ``adaptive(alpha=..., gain=..., window=...)``."""
        return f"adaptive(alpha={self._alpha:.6g},gain={self.gain:.6g},window={self.window})"

    def facts(self) -> dict[str, Any]:
        """Return the share that the next row is judged by."""
        return {"share_now": self._share}

    def state(self) -> dict[str, Any]:
        """Return settings, share and window, oldest score first."""
        return {
            "kind": self.kind,
            "alpha": self._alpha,
            "gain": self.gain,
            "window": self.window,
            "low_factor": self.low_factor,
            "share": self._share,
            "scores": self._memory.values().tolist(),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(state["alpha"], state["gain"], state["window"], low_factor=state["low_factor"])
        rule._memory = RollingLargest(rule.window, state["scores"])
        rule._share = state["share"]
        return rule


class EwNormalised(ThresholdRule):
    """A static level of log scores standardised by what they were recently."""

    kind = "ew_normalised"
    learns = True

    def __init__(self, alpha: float, half_life: float, *, low_factor: float = 5.0) -> None:
        self._alpha, self.half_life, self.low_factor = float(alpha), float(half_life), float(low_factor)
        self._weight = -math.expm1(-math.log(2.0) / self.half_life)
        self._floor = self._least = math.nan  # of the score, of the deviation
        self._mean = self._variance = math.nan
        self._high = self._low = math.nan  # of the standardised log score

    def fit(self, calibration: ArrayLike) -> Self:
        """Set the level from the standardised calibration scores, and mean and variance as they are after them.

        Raises:
            DataError: negative scores, or scores that do not differ.
        """
        s = calibration_sample(calibration, self.kind)
        if s.min() < 0.0:
            raise DataError(
                f"rule ew_normalised takes the logarithm of scores; {int((s < 0.0).sum())} of {s.size} calibration "
                "scores are negative; take another score or rule"
            )
        positive = s[s > 0.0]
        logs = np.log(np.maximum(s, positive.min())) if positive.size else np.zeros(1)
        deviation = float(logs[np.isfinite(logs)].std())
        if not deviation > 0.0:
            raise DataError(
                f"rule ew_normalised: the {s.size} calibration scores do not differ, so there is no scale; calibrate "
                "on other rows or take another rule"
            )
        self._floor, self._least = float(positive.min()), LEAST_DEVIATION * deviation
        self._mean, self._variance = float(logs[np.isfinite(logs)].mean()), deviation**2
        z = np.sort([self._standardised(score) for score in s.tolist()])
        self._high = float(z[-upper_rank(self._alpha, z.size)])
        self._low = float(z[-upper_rank(low_alpha(self._alpha, self.low_factor), z.size)])
        return self

    def _standardised(self, score: float) -> float:
        """Return z of a score by the rows before it, then learn from it."""
        distance = math.log(max(score, self._floor)) - self._mean
        deviation = self._deviation()
        step = max(-CLIP * deviation, min(distance, CLIP * deviation))
        self._mean += self._weight * step
        self._variance = (1.0 - self._weight) * (self._variance + self._weight * step * step)
        return distance / deviation

    def _deviation(self) -> float:
        return max(math.sqrt(self._variance), self._least)

    def step(self, score: float) -> Decision:
        """Judge one score, then move mean and variance."""
        if self._mean != self._mean:
            raise not_fitted(self.kind)
        deviation = self._deviation()
        threshold = math.exp(min(self._mean + self._high * deviation, LARGEST_EXPONENT))
        low = math.exp(min(self._mean + self._low * deviation, LARGEST_EXPONENT))
        if score == score:  # not NaN
            self._standardised(score)
        return Decision(score > threshold, threshold, low)

    @property
    def alpha(self) -> float | None:
        """Return the nominal share of alarms."""
        return self._alpha

    def describe(self) -> str:
        """Return ``ew_normalised(alpha=..., half_life=...)``."""
        return f"ew_normalised(alpha={self._alpha:.6g},half_life={self.half_life:.6g})"

    def facts(self) -> dict[str, Any]:
        """Return mean and deviation of log scores as they stand, and the level in deviations."""
        return {"log_mean": self._mean, "log_deviation": self._deviation(), "level": self._high}

    def state(self) -> dict[str, Any]:
        """Return settings, mean, variance and levels."""
        return {
            "kind": self.kind,
            "alpha": self._alpha,
            "half_life": self.half_life,
            "low_factor": self.low_factor,
            "floor": self._floor,
            "least": self._least,
            "mean": self._mean,
            "variance": self._variance,
            "high": self._high,
            "low": self._low,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(state["alpha"], state["half_life"], low_factor=state["low_factor"])
        rule._floor, rule._least = state["floor"], state["least"]
        rule._mean, rule._variance = state["mean"], state["variance"]
        rule._high, rule._low = state["high"], state["low"]
        return rule
