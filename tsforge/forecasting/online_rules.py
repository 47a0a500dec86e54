"""How online intervals learn: their settings, and the two rules that turn judged intervals into the next margins.

**Tracking** (the default). The margin of a cell is the conformal quantile of its rolling scores, times a correction
that every judged interval moves: half width = (quantile + 1/2) exp(c) and c <- c + rate / delay (missed - miss rate
wanted). A rolling quantile that foretells the score, with an integrator on the misses it leaves, is conformal PID
control (Angelopoulos, Candes, Tibshirani 2023, NeurIPS). Here the integrator acts on the logarithm of the half width:
one rate serves every unit, and no margin is infinite.

Deviations. (1) The step is divided by the delay in judged cutoffs: when d intervals are under way and the first of them
misses, most of the others will tell the same, and d full steps would overshoot. (2) c stays above ``LOWEST``: a target
that is hit for certain (rain in a desert) would wind it down without end. (3) No saturation: c grows linearly.

Guarantee. c rises only after a miss, so it stays below B plus one rate, where B is the logarithm of (largest score +
1/2) over (least quantile + 1/2), or 0 if that is larger. Hence over T judged intervals with d others under way the
share of misses exceeds the one wanted by at most (B + rate) (d + 1) / (rate T), whatever the data. There is no such
bound on misses that are too few, because of (2).

**ACI**: see ``online_conformal``. It moves the level instead of the margin, and asks for an infinite interval as soon
as the level exceeds what a finite sample can show.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import listing
from tsforge.forecasting.conformal_scores import conformal_rank

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
LOWEST = -1.0  # of the logarithm of the correction
_HIGHEST = 300.0  # exp of more is no number; only absurd units come near
_LEAST_HALF = 0.01  # half width that a correction starts from, in widths: what is 0 cannot be multiplied
_RATE, _RATES, _MEMORY = 0.4, (0.05,), 100


class OnlineConfig(Config):
    """How intervals go on learning from what came."""

    method: Literal["tracking", "aci"] = "tracking"
    """``tracking``: a correction of the margin, always finite; ``aci``: a level, which asks for infinite intervals."""
    rate: float | None = Field(None, gt=0.0, lt=2.0)
    """Step of ``tracking`` after a miss, as share of the half width, over the delay; default 0.4."""
    rates: tuple[float, ...] | None = None
    """Steps of the level of ``aci``: one = plain ACI (default 0.05), several are weighted by how well they do."""
    window: int = Field(100, ge=10)
    """Scores of a cell that count, the newest ones."""
    start: int = Field(20, ge=1)
    """Scores before a cell adapts; never fewer than its coverage needs (19 for 95 %)."""
    pool: Literal["own", "series"] = "own"
    """``own``: each series learns from itself; ``series``: all together."""
    cap: bool = False
    """``aci``: give the largest score at hand instead of an infinite interval; the long-run guarantee is lost."""
    memory: int = Field(_MEMORY, ge=2)
    """``aci`` with several rates: judged intervals over which their weights may change."""
    patience: int = Field(1, ge=1)
    """Horizons that an actual value may come late; then its forecast is given up."""

    @model_validator(mode="before")
    @classmethod
    def _steps(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name, default = ("rates", _RATES) if given.get("method") == "aci" else ("rate", _RATE)
        return given if given.get(name) is not None else {**given, name: default}

    @model_validator(mode="after")
    def _usable(self) -> OnlineConfig:
        if self.method == "tracking":
            idle = {"rates": self.rates is not None, "cap": self.cap, "memory": self.memory != _MEMORY}
            if any(idle.values()):
                names = [name for name, is_set in idle.items() if is_set]
                raise ValueError(f"only method aci has {listing(names)}; add method: aci, or remove {listing(names)}")
            return self
        if self.rate is not None:
            raise ValueError("only method tracking has a rate; method aci has rates")
        rates = self.rates or ()
        if not rates or any(not 0.0 < rate < 1.0 for rate in rates) or len(set(rates)) != len(rates):
            raise ValueError(f"rates must be different numbers between 0 and 1, given: {listing(rates)}")
        return self

    @property
    def steps(self) -> tuple[float, ...]:
        """The rates side by side; one with ``tracking``."""
        return (self.rate or _RATE,) if self.method == "tracking" else (self.rates or _RATES)

    def beginning(self, miss: FloatArray) -> FloatArray:
        """Return what cells [C] of these miss rates have learned before they were judged, [C, K]."""
        first = np.zeros_like(miss) if self.method == "tracking" else miss
        return np.repeat(first[:, None], len(self.steps), axis=1)


def stored_settings(settings: Any) -> Any:
    """Return settings as they were stored, of a version that knew only ``aci`` too, as ``OnlineConfig`` takes them."""
    return settings if not isinstance(settings, dict) or "method" in settings else {"method": "aci", **settings}


def least(coverage: float) -> int:
    """Return the fewest scores that give a finite interval of this coverage."""
    count = max(1, math.ceil(coverage / (1.0 - coverage) - 1e-9))
    return count if conformal_rank(count, coverage) <= count else count + 1


def position(size: IntArray, alpha: FloatArray) -> FloatArray:
    """Return (n + 1)(1 - alpha), whose ceiling is the rank of a margin; without the last digits of a sum of steps."""
    return np.asarray(np.round((size + 1) * (1.0 - alpha), 9))


def corrected(quantile: FloatArray, correction: FloatArray) -> FloatArray:
    """Return margins of ``tracking`` in widths of the published interval: its half width is margin + 1/2."""
    return np.asarray(np.maximum(quantile + 0.5, _LEAST_HALF) * np.exp(correction) - 0.5)


def next_correction(correction: FloatArray, missed: FloatArray, miss: FloatArray, step: FloatArray) -> FloatArray:
    """Return corrections after judged intervals of which the share ``missed`` missed; ``step``: rate over delay."""
    return np.clip(correction + step * (missed - miss), LOWEST, _HIGHEST)


def weight_rate(miss: FloatArray, config: OnlineConfig) -> FloatArray:
    """Return eta of the weights of rates (Gibbs & Candes 2024, section 3.2) for an interval of ``memory`` steps."""
    number, span = len(config.steps), config.memory
    spread = (1.0 - miss) ** 2 * miss**3 + miss**2 * (1.0 - miss) ** 3
    return np.asarray(np.sqrt(3.0 / span * (math.log(number * span) + 2.0) / spread))
