"""The rule ``fdr``: scores to p-values or e-values by the calibration, judged by a procedure of ``fdr``.

Ties count against the alarm whatever ``calibration.ties`` says of reported p-values. No rate of alarms is promised on
normal rows: what is aimed at is the share of alarm rows that are false. The smallest p-value of a conformal calibration
is 1 / (n + 1), mostly above the levels that these procedures start from; take a tail model (``calibration.method``
``auto`` or ``gpd``). ``warning`` says when the calibration cannot reach the level.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from tsforge.anomaly.calibration import Calibration, fit_calibration
from tsforge.anomaly.config import CalibrationConfig, FdrRule
from tsforge.anomaly.fdr import Lond, LordDecay, LordPlusPlus, Procedure, TrailingBH
from tsforge.anomaly.gpd import SMALLEST_P, ParetoTail, scores_needed
from tsforge.anomaly.rule_base import (
    LONGEST_ALPHA,
    Decision,
    FloatArray,
    ThresholdRule,
    calibration_sample,
    not_fitted,
    rows_that_leave,
)
from tsforge.core.errors import DataError

DEFAULT_BLOCK = 1_000
RECENT_ROWS = 1_000.0
LARGEST_SHARE = 0.2  # more alarm rows than this are no rare anomalies: the data have moved
LARGEST_EXPONENT = 700.0
LARGEST_LEVEL = 0.5  # that the settings allow


class _Evidence(ABC):
    """Turns a score into a value (p, or 1 / e) and a level of such values back into a score."""

    @abstractmethod
    def value(self, score: float) -> float:
        """Return how usual a score is; small is strange."""

    @abstractmethod
    def score_at(self, level: float) -> float:
        """Return the score above which values are at most ``level``; infinite where no score gets there."""

    @property
    @abstractmethod
    def smallest(self) -> float:
        """Return the smallest value there can be."""


class _PValues(_Evidence):
    """The p-values of ``Calibration.p_values``, one at a time."""

    def __init__(self, sample: FloatArray, tail: ParetoTail | None) -> None:
        self.sample, self.tail = sample, tail
        self._ordered: list[float] = sample.tolist()

    def value(self, score: float) -> float:
        """Return the p-value."""
        if self.tail is not None and score > self.tail.u:
            return float(self.tail.survival(score))
        size = len(self._ordered)
        return (1.0 + size - bisect_left(self._ordered, score)) / (size + 1.0)

    def score_at(self, level: float) -> float:
        """Return the score above which p is at most ``level``."""
        size = len(self._ordered)
        tail = self.tail
        if tail is not None and level * tail.num_scores < tail.num_excesses:
            return max(tail.quantile(max(level, SMALLEST_P)), tail.u)
        # p <= level exactly when at most so many calibration scores are as large as the score
        allowed = math.floor(level * (size + 1) * (1.0 + 1e-12)) - 1
        if allowed < 0:
            return math.inf
        found = self._ordered[size - 1 - allowed] if allowed < size else -math.inf
        return found if tail is None else min(found, tail.u)

    @property
    def smallest(self) -> float:
        """Return 1 / (n + 1) without a tail model, about 0 with one."""
        return 1.0 / (len(self._ordered) + 1.0) if self.tail is None else SMALLEST_P


class _KappaE(_Evidence):
    """1 / e for ``e = kappa p^(kappa - 1)``."""

    def __init__(self, p_values: _PValues, kappa: float) -> None:
        self.p_values, self.kappa = p_values, kappa

    def value(self, score: float) -> float:
        """Return ``p^(1 - kappa) / kappa``."""
        return float(self.p_values.value(score) ** (1.0 - self.kappa)) / self.kappa

    def score_at(self, level: float) -> float:
        """Return the score above which 1 / e is at most ``level``."""
        return self.p_values.score_at(float((self.kappa * level) ** (1.0 / (1.0 - self.kappa))))

    @property
    def smallest(self) -> float:
        """Return the smallest 1 / e."""
        return float(self.p_values.smallest ** (1.0 - self.kappa)) / self.kappa


class _DirectE(_Evidence):
    """1 / e for ``e = (n + 1) s^w / (s^w + sum_i c_i^w)``: ``(1 + C / s^w) / (n + 1)``, by logarithms."""

    def __init__(self, sample: FloatArray, power: float) -> None:
        if sample[0] < 0.0 or not sample[-1] > 0.0 or math.isinf(sample[-1]):
            raise DataError(
                "rule fdr with e_values direct takes scores as they are: calibration scores must be finite, none "
                f"negative and some positive; they run from {sample[0]:g} to {sample[-1]:g}; take e_values kappa"
            )
        self.power, self.size = power, sample.size
        with np.errstate(divide="ignore"):
            logs = power * np.log(sample / sample[-1])
        self._log_sum = float(np.log(np.exp(logs).sum())) + power * math.log(sample[-1])

    def value(self, score: float) -> float:
        """Return 1 / e; infinite for a score of 0."""
        if score <= 0.0:
            return math.inf
        log_ratio = self._log_sum - self.power * math.log(score)
        return (1.0 + math.exp(min(log_ratio, LARGEST_EXPONENT))) / (self.size + 1.0)

    def score_at(self, level: float) -> float:
        """Return the score above which 1 / e is at most ``level``."""
        room = level * (self.size + 1.0) - 1.0
        if room <= 0.0:
            return math.inf
        return math.exp(min((self._log_sum - math.log(room)) / self.power, LARGEST_EXPONENT))

    @property
    def smallest(self) -> float:
        """Return the 1 / e of an infinite score."""
        return 1.0 / (self.size + 1.0)


class FalseDiscoveryRate(ThresholdRule):
    """Aims at a share of false ones among alarm rows; its level moves with alarms and time."""

    kind = "fdr"
    learns = True
    extrapolates = True

    def __init__(self, config: FdrRule, calibration: CalibrationConfig, *, low_factor: float = 5.0) -> None:
        self.config, self.calibration, self.low_factor = config, calibration, float(low_factor)
        self._procedure = _procedure(config)
        self._sample: FloatArray = np.empty(0)
        self._tail: ParetoTail | None = None
        self._evidence: _Evidence | None = None
        self._share = 0.0  # of alarms in recent rows

    def fit(self, calibration: ArrayLike) -> Self:
        """Fit the calibration and start the procedure afresh.

        Raises:
            DataError: no score; ``calibration.method`` gpd with too few excesses; direct e-values of negative scores.
        """
        settings = self.calibration
        scores = calibration_sample(calibration, self.kind)
        try:
            found: Calibration = fit_calibration(
                scores,
                method=settings.method,
                level=settings.tail_level,
                shape=settings.tail_shape,
            )
        except DataError as error:
            needed = scores_needed(settings.tail_level)
            if settings.method != "gpd" or scores.size >= needed:  # more scores would not help
                raise
            raise DataError(
                f"rule {self.kind} with calibration.method gpd cannot fit a tail above the {settings.tail_level:g} "
                f"quantile of the {scores.size} scores that are left, {needed} scores will do; calibrate on at least "
                f"{rows_that_leave(needed, self.latency)}, lower calibration.tail_level, or take method auto"
            ) from error
        self._sample, self._tail = found.sample, found.tail
        self._evidence = _evidence(self.config, found.sample, found.tail)
        self._procedure = _procedure(self.config)
        self._share = 0.0
        return self

    def step(self, score: float) -> Decision:
        """Judge one score at the level of this row, then learn whether it was an alarm."""
        evidence, procedure = self._evidence, self._procedure
        if evidence is None:
            raise not_fitted(self.kind)
        level = procedure.level
        threshold = evidence.score_at(level)
        low = min(evidence.score_at(min(self.low_factor * level, max(level, LONGEST_ALPHA))), threshold)
        if score != score:  # NaN: no test, so no level is spent
            return Decision(False, threshold, low)
        value = evidence.value(score)
        alarm = value <= level
        procedure.learn(value, alarm)
        self._share += (alarm - self._share) / RECENT_ROWS
        return Decision(alarm, threshold, low)

    @property
    def alpha(self) -> float | None:
        """Return None: the share of alarm rows that are false is aimed at, no rate on normal rows."""
        return None

    def describe(self) -> str:
        """Return the procedure, its level and the settings that have an effect on it."""
        config = self.config
        parts = [f"procedure={config.procedure}", f"level={config.level:.6g}"]
        if config.procedure == "lord_decay":
            parts += [f"decay={_decay(config):.6g}", f"eta={_eta(config):.6g}"]
        if config.procedure in ("bh", "e_bh"):
            parts.append(f"block={config.block or DEFAULT_BLOCK}")
        if config.procedure.startswith("e_"):
            is_direct = config.e_values == "direct"
            parts.append(f"direct^{_power(config):.6g}" if is_direct else f"kappa={_kappa(config):.6g}")
        return f"fdr({','.join(parts)})"

    def facts(self) -> dict[str, Any]:
        """Return the level of the next row and what the calibration can reach; of a tail, its number of excesses."""
        if self._evidence is None:
            return {}
        excesses = {} if self._tail is None else {"num_excesses": self._tail.num_excesses}
        return {
            "level_now": self._procedure.level,
            "smallest_value": self._evidence.smallest,
            "recent_alarm_share": self._share,
            **excesses,
        }

    def warning(self) -> str:
        """Return that no score can alarm at the level of the next row, or that too many do; empty otherwise."""
        if self._share > LARGEST_SHARE:
            return (
                f"rule fdr: about {self._share:.0%} of recent rows are alarms, so they are hardly rare anomalies; the "
                "data have moved away from the calibration: fit again"
            )
        if self._evidence is None or self._evidence.smallest <= self._procedure.level:
            return ""
        who = "no lone row" if isinstance(self._procedure, TrailingBH) else "no row"
        name = "1/e" if self.config.procedure.startswith("e_") else "p"
        return (
            f"rule fdr: its level is {self._procedure.level:.2g}, while {self._sample.size} calibration scores give no "
            f"{name} below {self._evidence.smallest:.2g}: {who} can alarm; {self._remedy()}"
        )

    def _remedy(self) -> str:
        """Return what lets a row alarm: more calibration rows, another level, or another procedure."""
        config = self.config
        share = _eta(config) * (1.0 - _decay(config))  # of its level, lord_decay always spends so much
        tail = scores_needed(self.calibration.tail_level)
        smallest = 1.0 / (self._sample.size + 1.0)
        if config.procedure != "lord_decay":
            rows = rows_that_leave(tail, self.latency)
            ways = [f"calibrate with a tail model (calibration.method=gpd) on at least {rows}"]
            if config.e_values == "direct":  # which a tail model leaves as they are
                ways = ["take e_values kappa with a tail model (calibration.method=gpd)"]
            if smallest <= config.level * share:
                ways.append("take procedure lord_decay")
            return ", or ".join(ways)
        scores = math.ceil(1.0 / (config.level * share)) - 1
        if self.calibration.method != "conformal":
            scores = min(scores, tail)
        enough = math.ceil(1000.0 * smallest / share) / 1000.0
        raised = f", or raise rule.level to {enough:g}" if enough <= LARGEST_LEVEL else ""
        return f"calibrate on at least {rows_that_leave(scores, self.latency)}{raised}"

    def state(self) -> dict[str, Any]:
        """Return settings, calibration and the memory of the procedure."""
        return {
            "kind": self.kind,
            "config": self.config.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json"),
            "low_factor": self.low_factor,
            "sample": self._sample.tolist(),
            "tail": None if self._tail is None else self._tail.to_dict(),
            "procedure": self._procedure.state(),
            "share": self._share,
            "latency": self.latency,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(
            FdrRule(**state["config"]), CalibrationConfig(**state["calibration"]), low_factor=state["low_factor"]
        )
        rule._sample = np.array(state["sample"], dtype=np.float64)
        rule._tail = None if state["tail"] is None else ParetoTail(**state["tail"])
        if rule._sample.size:
            rule._evidence = _evidence(rule.config, rule._sample, rule._tail)
        rule._procedure.resume(state["procedure"])
        rule._share = state["share"]
        rule.latency = state.get("latency", 0)  # only words depend on it: states written before it can go on
        return rule


def _decay(config: FdrRule) -> float:
    return 0.99 if config.decay is None else config.decay


def _eta(config: FdrRule) -> float:
    return 0.5 if config.eta is None else config.eta


def _kappa(config: FdrRule) -> float:
    return 0.5 if config.kappa is None else config.kappa


def _power(config: FdrRule) -> float:
    return 1.0 if config.power is None else config.power


def _procedure(config: FdrRule) -> Procedure:
    match config.procedure:
        case "lord":
            return LordPlusPlus(config.level)
        case "lord_decay":
            return LordDecay(config.level, _decay(config), _eta(config))
        case "e_lond":
            return Lond(config.level)
        case "bh" | "e_bh":
            return TrailingBH(config.level, config.block or DEFAULT_BLOCK)


def _evidence(config: FdrRule, sample: FloatArray, tail: ParetoTail | None) -> _Evidence:
    if config.procedure.startswith("e_") and config.e_values == "direct":
        return _DirectE(sample, _power(config))
    p_values = _PValues(sample, tail)
    return _KappaE(p_values, _kappa(config)) if config.procedure.startswith("e_") else p_values
