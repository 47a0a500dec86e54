"""Extreme-value rules: levels that a generalised Pareto tail exceeds with a stated risk; static, streaming, drifting.

Legend: q risk, u where the tail starts (quantile ``level`` of the calibration scores, kept), N_u of n scores above it.

    pot     z_q of the calibration scores
    spot    s > z_q: alarm, learnt from not at all;  u < s <= z_q: an excess, the tail is fitted again;  else n grows
    dspot   spot on s - (mean of the last d scores that were no alarms)

Source: Siffer et al., "Anomaly Detection in Streams with Extreme Value Theory" (KDD 2017), algorithms 1 to 3. The risk
is aimed at, not promised: a hundred excesses do not determine a level a hundred times beyond them.
Deviations: ``exclude_flagged`` caps how many alarms in a row stay outside the tail (None: no cap, published): without
one every row after a level shift is an alarm for ever. The tail is fitted to the last ``max_excesses`` excesses, while
N_u and n count all. Up to 174 of them it is fitted again after every new one, as published, beyond after about a 25th
part of new ones, which bounds the time where every row is an excess; N_u and n move z_q each time. The shape can be
kept at or above 0 (safer, see ``gpd``). z_q never falls below u, where the tail says nothing. Excesses that no longer
differ change the counts, not the shape and scale.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from tsforge.anomaly.gpd import MIN_EXCESSES, ParetoTail, fit_excesses, scores_needed
from tsforge.anomaly.rule_base import (
    Decision,
    Decisions,
    FloatArray,
    StaticRule,
    ThresholdRule,
    calibration_sample,
    low_alpha,
    not_fitted,
    rows_that_leave,
    upper_rank,
)
from tsforge.core.errors import DataError

Shape = Literal["free", "nonnegative"]
ALIKE = 1e-9  # relative range below which excesses do not determine a tail
FITTED_EACH_TIME, FIT_SHARE = 150, 25  # the tail is fitted after each new excess up to so many, then more rarely
SUM_AFRESH = 1_024  # rows after which a running sum is added up again, so that rounding never builds up
STRETCH = 256


def _start_of_tail(
    sample: FloatArray, level: float, kind: str, spent: int | None = None, latency: int = 0
) -> tuple[float, FloatArray]:
    """Return u and the excesses of the calibration scores above it, in time order.

    ``spent`` scores of a rule that learns are not in them; None for one that does not learn, and is fitted on all rows.
    ``latency`` as of the rule.
    """
    u = float(np.quantile(sample, level))
    excesses = sample[sample > u] - u
    if excesses.size < MIN_EXCESSES:
        needed = scores_needed(level)
        rows = f"{needed} rows" if spent is None else rows_that_leave(needed + spent, latency)
        raise DataError(
            f"rule {kind} needs {MIN_EXCESSES} calibration scores above their {level:g} quantile, {sample.size} scores "
            f"leave {excesses.size}; calibrate on at least {rows}, lower rule.level, or take another rule"
        )
    return u, excesses


class Pot(StaticRule):
    """Peaks over threshold: z_q of the calibration scores; static."""

    kind = "pot"
    extrapolates = True

    def __init__(
        self, risk: float, *, level: float = 0.98, shape: Shape = "nonnegative", low_factor: float = 5.0
    ) -> None:
        self.risk, self.level, self.low_factor = float(risk), float(level), float(low_factor)
        self.shape: Shape = shape
        self.tail: ParetoTail | None = None

    def fit(self, calibration: ArrayLike) -> Self:
        """Fit the tail.

        Raises:
            DataError: fewer than 50 excesses, or they do not differ.
        """
        sample = calibration_sample(calibration, self.kind)
        u, excesses = _start_of_tail(sample, self.level, self.kind)
        self.tail = fit_excesses(
            excesses, u=u, num_excesses=int(excesses.size), num_scores=int(sample.size), shape=self.shape
        )
        share = low_alpha(self.risk, self.low_factor)
        is_in_tail = share * sample.size < excesses.size
        below = float(np.sort(sample)[-upper_rank(share, sample.size)])
        self.threshold, self.low = self.tail.quantile(self.risk), self.tail.quantile(share) if is_in_tail else below
        return self

    @property
    def alpha(self) -> float | None:
        """Return the risk."""
        return self.risk

    def describe(self) -> str:
        """Return ``pot(risk=..., level=..., tail_shape=...)``."""
        return f"pot(risk={self.risk:.6g},level={self.level:.6g},tail_shape={self.shape})"

    def facts(self) -> dict[str, Any]:
        """Return the fitted tail with its number of excesses."""
        return {} if self.tail is None else self.tail.to_dict()

    def state(self) -> dict[str, Any]:
        """Return settings, tail and both levels."""
        return {
            "kind": self.kind,
            "risk": self.risk,
            "level": self.level,
            "shape": self.shape,
            "low_factor": self.low_factor,
            "tail": None if self.tail is None else self.tail.to_dict(),
            "threshold": self.threshold,
            "low": self.low,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(state["risk"], level=state["level"], shape=state["shape"], low_factor=state["low_factor"])
        rule.tail = None if state["tail"] is None else ParetoTail(**state["tail"])
        rule.threshold, rule.low = state["threshold"], state["low"]
        return rule


class Spot(ThresholdRule):
    """Streaming peaks over threshold: excesses that are no alarms move the level, alarms do not."""

    kind = "spot"
    learns = True
    extrapolates = True

    def __init__(
        self,
        risk: float,
        *,
        level: float = 0.98,
        shape: Shape = "nonnegative",
        exclude_flagged: int | None = 120,
        max_excesses: int = 1_000,
        low_factor: float = 5.0,
    ) -> None:
        self.risk, self.level, self.low_factor = float(risk), float(level), float(low_factor)
        self.shape: Shape = shape
        self.exclude_flagged, self.max_excesses = exclude_flagged, int(max_excesses)
        self._excesses: deque[float] = deque(maxlen=self.max_excesses)
        self._unfitted = 0  # excesses since the shape was fitted
        self._u = math.nan
        self._num_excesses = self._num_scores = 0
        self._excluded = 0  # alarm rows left out in a row
        self._below = math.nan  # low level where it lies below the tail
        self._tail: ParetoTail | None = None
        self._threshold = self._low = math.nan

    def fit(self, calibration: ArrayLike) -> Self:
        """Fit the first tail.

        Raises:
            DataError: fewer than 50 excesses, or they do not differ.
        """
        self._start(calibration_sample(calibration, self.kind))
        return self

    def _start(self, sample: FloatArray, spent: int = 0) -> None:
        self._u, excesses = _start_of_tail(sample, self.level, self.kind, spent, self.latency)
        self._excesses = deque(excesses.tolist(), maxlen=self.max_excesses)
        self._num_excesses, self._num_scores = int(excesses.size), int(sample.size)
        self._excluded = self._unfitted = 0
        self._tail = None
        share = low_alpha(self.risk, self.low_factor)
        self._below = float(np.sort(sample)[-upper_rank(share, sample.size)])
        self._refit()

    def step(self, score: float) -> Decision:
        """Judge one score, then learn from it unless it is an alarm or missing."""
        if self._tail is None:
            raise not_fitted(self.kind)
        decision = Decision(score > self._threshold, self._threshold, self._low)
        if score == score:  # not NaN
            self._learn(score, decision.alarm)
        return decision

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``, going from excess to excess."""
        if self._tail is None:
            raise not_fitted(self.kind)
        s = np.asarray(scores, dtype=np.float64).ravel()
        seen = np.cumsum(~np.isnan(s))
        alarm, threshold, low = np.zeros(s.size, dtype=bool), np.empty(s.size), np.empty(s.size)
        with np.errstate(invalid="ignore"):
            above = np.flatnonzero(s > self._u)
        done = counted = 0
        for place, score in zip(above.tolist(), s[above].tolist(), strict=True):
            threshold[done : place + 1], low[done : place + 1] = self._threshold, self._low
            self._pass(int(seen[place]) - 1 - counted)
            alarm[place] = score > self._threshold
            self._learn(score, bool(alarm[place]))
            done, counted = place + 1, int(seen[place])
        threshold[done:], low[done:] = self._threshold, self._low
        self._pass(int(seen[-1]) - counted if s.size else 0)
        return Decisions(alarm, threshold, low)

    def _pass(self, rows: int) -> None:
        """Count rows that are neither alarms nor excesses."""
        if rows:
            self._num_scores += rows
            self._excluded = 0

    def _learn(self, score: float, alarm: bool) -> bool:
        """Learn from a score; return False where it is left out."""
        if alarm:
            if not self._admits_alarm(score):
                return False
        else:
            self._excluded = 0
        self._num_scores += 1
        if score > self._u:
            self._excesses.append(score - self._u)
            self._num_excesses += 1
            self._unfitted += 1
            self._refit()
        return True

    def _admits_alarm(self, score: float) -> bool:
        """Return whether an alarm is learnt from all the same, because too many before it were not."""
        if self.exclude_flagged is None or math.isinf(score):
            return False
        if self._excluded >= self.exclude_flagged:
            return True
        self._excluded += 1
        return False

    def _refit(self) -> None:
        count = len(self._excesses)
        if self._tail is None or self._unfitted > max(count - FITTED_EACH_TIME, 0) // FIT_SHARE:
            self._unfitted = 0
            self._tail = self._fitted(np.fromiter(self._excesses, dtype=np.float64, count=count))
        else:
            self._tail = replace(self._tail, num_excesses=self._num_excesses, num_scores=self._num_scores)
        share = low_alpha(self.risk, self.low_factor)
        is_in_tail = share * self._num_scores < self._num_excesses
        self._threshold = max(self._tail.quantile(self.risk), self._u)
        self._low = min(self._tail.quantile(share), self._threshold) if is_in_tail else self._below

    def _fitted(self, excesses: FloatArray) -> ParetoTail:
        if self._tail is not None and float(np.ptp(excesses)) <= ALIKE * float(excesses.max()):
            return replace(self._tail, num_excesses=self._num_excesses, num_scores=self._num_scores)
        return fit_excesses(
            excesses,
            u=self._u,
            num_excesses=self._num_excesses,
            num_scores=self._num_scores,
            shape=self.shape,
        )

    @property
    def alpha(self) -> float | None:
        """Return the risk."""
        return self.risk

    def describe(self) -> str:
        """Return the kind and its settings."""
        return f"{self.kind}({self._settings()})"

    def _settings(self) -> str:
        return (
            f"risk={self.risk:.6g},level={self.level:.6g},tail_shape={self.shape},"
            f"exclude_flagged={'all' if self.exclude_flagged is None else self.exclude_flagged},"
            f"max_excesses={self.max_excesses}"
        )

    def facts(self) -> dict[str, Any]:
        """Return the tail as it stands, with its number of excesses."""
        return {} if self._tail is None else {**self._tail.to_dict(), "excesses_fitted": len(self._excesses)}

    def state(self) -> dict[str, Any]:
        """Return settings, excesses, counts and levels."""
        return {
            "kind": self.kind,
            "risk": self.risk,
            "level": self.level,
            "shape": self.shape,
            "exclude_flagged": self.exclude_flagged,
            "max_excesses": self.max_excesses,
            "low_factor": self.low_factor,
            "excesses": list(self._excesses),
            "unfitted": self._unfitted,
            "u": self._u,
            "num_excesses": self._num_excesses,
            "num_scores": self._num_scores,
            "excluded": self._excluded,
            "below": self._below,
            "tail": None if self._tail is None else self._tail.to_dict(),
            "threshold": self._threshold,
            "low": self._low,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = cls(state["risk"], **cls._further(state))
        rule._excesses.extend(state["excesses"])
        rule._unfitted = state["unfitted"]
        rule._u, rule._below = state["u"], state["below"]
        rule._num_excesses, rule._num_scores = state["num_excesses"], state["num_scores"]
        rule._excluded = state["excluded"]
        rule._tail = None if state["tail"] is None else ParetoTail(**state["tail"])
        rule._threshold, rule._low = state["threshold"], state["low"]
        return rule

    @classmethod
    def _further(cls, state: dict[str, Any]) -> dict[str, Any]:
        """Return the settings besides the risk."""
        names = ("level", "shape", "exclude_flagged", "max_excesses", "low_factor")
        return {name: state[name] for name in names}


class Dspot(Spot):
    """Streaming peaks over threshold of what a score is above the mean of recent normal ones: for slow drifts."""

    kind = "dspot"

    def __init__(self, risk: float, depth: int, **settings: Any) -> None:
        super().__init__(risk, **settings)
        self.depth = int(depth)
        self._recent: deque[float] = deque(maxlen=self.depth)
        self._sum = 0.0
        self._until_afresh = SUM_AFRESH

    def fit(self, calibration: ArrayLike) -> Self:
        """Fit the first tail to the calibration scores after the first ``depth``.

        Raises:
            DataError: too few scores after those, or they do not differ.
        """
        sample = calibration_sample(calibration, self.kind)
        sample = sample[np.isfinite(sample)]
        if sample.size <= self.depth:
            needed = scores_needed(self.level) + self.depth
            raise DataError(
                f"rule dspot needs more calibration scores than its depth of {self.depth}, got {sample.size}; lower "
                f"rule.depth or calibrate on at least {rows_that_leave(needed, self.latency)}"
            )
        self._recent = deque(sample[: self.depth].tolist(), maxlen=self.depth)
        self._sum, self._until_afresh = math.fsum(self._recent), SUM_AFRESH
        distances = np.empty(sample.size - self.depth)
        for i, score in enumerate(sample[self.depth :].tolist()):
            distances[i] = score - self._sum / self.depth
            self._take(score)
        self._start(distances, spent=self.depth)
        return self

    def step(self, score: float) -> Decision:
        """Judge one score by the mean of the normal ones before it, then learn from it unless it is an alarm."""
        if self._tail is None:
            raise not_fitted(self.kind)
        mean = self._sum / self.depth
        distance = score - mean
        decision = Decision(distance > self._threshold, mean + self._threshold, mean + self._low)
        if score == score and self._learn(distance, decision.alarm) and not math.isinf(score):
            self._take(score)
        return decision

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``, in stretches in which every row is learnt from."""
        if self._tail is None:
            raise not_fitted(self.kind)
        s = np.asarray(scores, dtype=np.float64).ravel()
        seen = ~np.isnan(s)
        values = s[seen]
        found = Decisions(np.zeros(values.size, dtype=bool), np.empty(values.size), np.empty(values.size))
        done = 0
        while done < values.size:
            rows = slice(done, done + min(self._until_afresh, STRETCH))
            part = Decisions(found.alarm[rows], found.threshold[rows], found.low[rows])
            done += self._stretch(values[rows], part)
            while done < values.size and found.alarm[done - 1]:  # alarms come in runs; a stretch would end at each
                found.alarm[done], found.threshold[done], found.low[done] = self.step(float(values[done]))
                done += 1
        # a missing score changes nothing: it shows the levels that the next score will be judged by
        before = np.cumsum(seen) - seen
        alarm = np.zeros(s.size, dtype=bool)
        alarm[seen] = found.alarm
        mean = self._sum / self.depth
        threshold, low = np.append(found.threshold, mean + self._threshold), np.append(found.low, mean + self._low)
        return Decisions(alarm, threshold[before], low[before])

    def _stretch(self, values: FloatArray, found: Decisions) -> int:
        """Judge rows as long as every one of them enters the window; return how many were judged."""
        old = np.concatenate([np.fromiter(self._recent, dtype=np.float64), values])[: values.size]
        with np.errstate(invalid="ignore"):
            # one addition after another, as step does it
            sums = np.cumsum(np.concatenate([[self._sum], values - old]))
            mean = sums[:-1] / self.depth
            distance = values - mean
            busy = np.flatnonzero((distance > self._u) | np.isinf(values))
        done = 0
        for place in busy.tolist():
            found.threshold[done : place + 1] = mean[done : place + 1] + self._threshold
            found.low[done : place + 1] = mean[done : place + 1] + self._low
            self._pass(place - done)
            self._take_all(values[done:place], float(sums[place]))
            alarm = found.alarm[place] = bool(distance[place] > self._threshold)
            done = place + 1
            if not self._learn(float(distance[place]), alarm) or math.isinf(values[place]):
                return done
            self._take(float(values[place]))
        found.threshold[done:], found.low[done:] = mean[done:] + self._threshold, mean[done:] + self._low
        self._pass(values.size - done)
        self._take_all(values[done:], float(sums[-1]))
        return int(values.size)

    def _take(self, score: float) -> None:
        self._sum += score - self._recent[0]
        self._recent.append(score)
        self._count(1)

    def _take_all(self, values: FloatArray, total: float) -> None:
        """Take scores into the window whose sum is then ``total``."""
        if values.size:
            self._recent.extend(values.tolist())
            self._sum = total
            self._count(int(values.size))

    def _count(self, rows: int) -> None:
        self._until_afresh -= rows
        if self._until_afresh <= 0:
            self._sum, self._until_afresh = math.fsum(self._recent), SUM_AFRESH

    def _settings(self) -> str:
        return f"{super()._settings()},depth={self.depth}"

    def state(self) -> dict[str, Any]:
        """Return what ``Spot`` returns, and the window of recent normal scores with its running sum."""
        window = {"recent": list(self._recent), "sum": self._sum, "until_afresh": self._until_afresh}
        return {**super().state(), "depth": self.depth, **window}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is."""
        rule = super().restore(state)
        rule._recent.extend(state["recent"])
        rule._sum, rule._until_afresh = state["sum"], state["until_afresh"]
        return rule

    @classmethod
    def _further(cls, state: dict[str, Any]) -> dict[str, Any]:
        return {**super()._further(state), "depth": state["depth"]}
