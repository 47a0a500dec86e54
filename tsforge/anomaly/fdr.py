"""Procedures that aim at a share of false discoveries, over a whole span or value by value.

Legend: p p-values, e e-values, alpha the wanted share, m number of values, k rejections, tau_j time of the j-th
rejection, R number of rejections, g_j a series that sums to about 1, see ``lord_series``.

    BH          reject the k smallest p, k the largest with p_(k) <= alpha k / m
    e-BH        reject the k largest e, k the largest with e_(k) >= m / (alpha k);  this is BH of 1 / e
    LORD++      alpha_t = w0 g_t + (alpha - w0) g_{t - tau_1} + alpha sum_{j >= 2} g_{t - tau_j},  w0 = alpha / 2
    LORD decay  alpha_t = alpha eta max(g_t, 1 - delta) + alpha sum_j delta^(t - tau_j) g_{t - tau_j}
    e-LOND      reject if e_t >= 1 / (alpha g_t (R + 1));  this is LOND of 1 / e

BH needs independent or positively dependent p-values, LORD++ independent ones, the two of e-values no assumption on
dependence. LORD decay bounds the share of false ones among recent discoveries. All of them need p-values that are
uniform on normal rows: estimated ones are so about, hence "aims at", not "guarantees".

Sources: Benjamini and Hochberg (1995); Wang and Ramdas, "False discovery rate control with e-values" (2022); Ramdas et
al., "Online control of the false discovery rate with decaying memory" (NeurIPS 2017), LORD++; Rebjock et al., "Online
false discovery rate control for anomaly detection in time series" (NeurIPS 2021); Xu and Ramdas, "Online multiple
testing with e-values" (AISTATS 2024); g after Javanmard and Montanari (2018).
Deviations: both LORDs add up the last ``KEPT_REJECTIONS`` rejections only, LORD decay also none whose ``delta^age`` is
below 1e-12: time and memory stay bounded on an endless stream, and levels only get smaller. ``TrailingBH`` is our way
to use BH and e-BH row by row: a row is judged with the ``block - 1`` values before it, each row once. Rows not there
yet count as 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
NORMALISER = 0.07720838
KEPT_REJECTIONS = 1_000
FORGOTTEN = 1e-12
MOST_AHEAD = 256


def lord_series(j: ArrayLike) -> FloatArray:
    """Return ``g_j = 0.07720838 log(max(j, 2)) / (j exp(sqrt(log j)))`` for whole j >= 1."""
    lag = np.asarray(j, dtype=np.float64)
    return NORMALISER * np.log(np.maximum(lag, 2.0)) / (lag * np.exp(np.sqrt(np.log(lag))))


def benjamini_hochberg(p_values: ArrayLike, level: float) -> BoolArray:
    """Return which p-values [N] of a whole span are rejected; NaN is left out and not counted."""
    p = np.asarray(p_values, dtype=np.float64).ravel()
    ordered = np.sort(p[~np.isnan(p)])
    passed = np.flatnonzero(ordered <= level * np.arange(1, ordered.size + 1) / max(ordered.size, 1))
    if not passed.size:
        return np.zeros(p.size, dtype=bool)
    with np.errstate(invalid="ignore"):
        rejected: BoolArray = p <= ordered[passed[-1]]
    return rejected


def e_benjamini_hochberg(e_values: ArrayLike, level: float) -> BoolArray:
    """Return which e-values [N] of a whole span are rejected; NaN is left out and not counted."""
    with np.errstate(divide="ignore"):
        return benjamini_hochberg(1.0 / np.asarray(e_values, dtype=np.float64), level)


def kappa_e_values(p_values: ArrayLike, kappa: float = 0.5) -> FloatArray:
    """Return ``kappa p^(kappa - 1)``, an e-value where p is uniform (Vovk and Wang 2021); 0 < kappa < 1.

    Raises:
        ConfigError: kappa outside (0, 1).
    """
    if not 0.0 < kappa < 1.0:
        raise ConfigError(f"kappa {kappa:g} must lie between 0 and 1")
    with np.errstate(divide="ignore"):
        e: FloatArray = kappa * np.asarray(p_values, dtype=np.float64) ** (kappa - 1.0)
    return e


def direct_e_values(calibration: ArrayLike, scores: ArrayLike, *, power: float = 1.0) -> FloatArray:
    """Return ``(n + 1) s^power / (s^power + sum_i c_i^power)`` of each score; its mean is 1 on exchangeable scores.

    Args:
        calibration: scores of normal rows, none negative; NaN is left out. scores: [N], none negative; NaN stays NaN.
        power: the larger, the more one extreme score weighs.
    """
    c = np.asarray(calibration, dtype=np.float64).ravel()
    c = c[~np.isnan(c)]
    s = np.asarray(scores, dtype=np.float64)
    unit = max(float(c.max()), float(np.nanmax(s, initial=0.0)))
    if unit == 0.0:
        return np.where(np.isnan(s), np.nan, 1.0)
    raised = (s / unit) ** power
    e: FloatArray = (c.size + 1.0) * raised / (raised + ((c / unit) ** power).sum())
    return e


class Procedure(ABC):
    """Judges values one by one: rejects a value (p, or 1 / e) that is at most ``level``."""

    @property
    @abstractmethod
    def level(self) -> float:
        """Return the level of the next value."""

    @abstractmethod
    def learn(self, value: float, rejected: bool) -> None:
        """Take in a value that was judged."""

    def step(self, value: float) -> bool:
        """Judge one value and learn from it."""
        rejected = value <= self.level
        self.learn(value, rejected)
        return rejected

    def run(self, values: ArrayLike) -> BoolArray:
        """Judge values [N] in time order."""
        return np.array([self.step(value) for value in np.asarray(values, dtype=np.float64).tolist()], dtype=bool)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the memory as plain JSON types."""

    @abstractmethod
    def resume(self, state: dict[str, Any]) -> Self:
        """Take over the memory of a procedure with the same settings; returns itself."""


class _Rewarded(Procedure):
    """Levels that are a start level plus a reward for every rejection, fading with the time since."""

    def __init__(self) -> None:
        self._time = 0  # values judged
        self._rejections: list[int] = []
        self._ahead: FloatArray = np.empty(0)  # levels of the next values, if none of them is rejected
        self._used = 0
        self._reach = 1

    @property
    def level(self) -> float:
        """Return the level of the next value."""
        if self._used == self._ahead.size:
            self._look_ahead()
        return float(self._ahead[self._used])

    def _look_ahead(self) -> None:
        """Work out levels of several values at once; more each time, until a rejection makes them wrong."""
        times = np.arange(self._time + 1, self._time + 1 + self._reach)
        levels = self._start(times)
        if self._rejections:
            lags = times - np.array(self._rejections)[:, None]
            # one addition after another, so that a level does not depend on how many are worked out at once
            levels = np.cumsum(np.concatenate([levels[None], self._rewards(lags)]), axis=0)[-1]
        self._ahead, self._used = levels, 0
        self._reach = min(2 * self._reach, MOST_AHEAD)

    @abstractmethod
    def _start(self, times: NDArray[np.int64]) -> FloatArray:
        """Return the level without rejections at times [B]."""

    @abstractmethod
    def _rewards(self, lags: NDArray[np.int64]) -> FloatArray:
        """Return what rejections add to the level so many values later, [R, B]."""

    def learn(self, value: float, rejected: bool) -> None:
        """Count the value; a rejection raises the levels after it."""
        self._time += 1
        self._used += 1
        if rejected:
            self._rejections.append(self._time)
            self._forget()
            self._ahead, self._used, self._reach = np.empty(0), 0, 1

    def _forget(self) -> None:
        del self._rejections[:-KEPT_REJECTIONS]

    def state(self) -> dict[str, Any]:
        """Return the number of values judged and the times of rejections."""
        return {"time": self._time, "rejections": list(self._rejections)}

    def resume(self, state: dict[str, Any]) -> Self:
        """Take over the memory of a procedure with the same settings; returns itself."""
        self._time, self._rejections = int(state["time"]), [int(time) for time in state["rejections"]]
        self._ahead, self._used, self._reach = np.empty(0), 0, 1
        return self


class LordPlusPlus(_Rewarded):
    """LORD++ with start wealth alpha / 2."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha, self.wealth = alpha, alpha / 2.0
        self._first = 0

    def _start(self, times: NDArray[np.int64]) -> FloatArray:
        return self.wealth * lord_series(times)

    def _rewards(self, lags: NDArray[np.int64]) -> FloatArray:
        rewards = self.alpha * lord_series(lags)
        if self._rejections[0] == self._first:
            rewards[0] = (self.alpha - self.wealth) * lord_series(lags[0])
        return rewards

    def learn(self, value: float, rejected: bool) -> None:
        """Count the value; a rejection raises the levels after it."""
        if rejected and not self._first:
            self._first = self._time + 1
        super().learn(value, rejected)

    def state(self) -> dict[str, Any]:
        """Return the number of values judged and the times of rejections."""
        return {**super().state(), "first": self._first}

    def resume(self, state: dict[str, Any]) -> Self:
        """Take over the memory of a procedure with the same settings; returns itself."""
        self._first = int(state["first"])
        return super().resume(state)


class LordDecay(_Rewarded):
    """LORD whose rewards also fade by ``delta`` a value; start levels stay at ``alpha eta (1 - delta)`` or more."""

    def __init__(self, alpha: float, delta: float = 0.99, eta: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.delta, self.eta = alpha, delta, eta
        self._memory = math.ceil(math.log(FORGOTTEN) / math.log(delta))

    def _start(self, times: NDArray[np.int64]) -> FloatArray:
        return self.alpha * self.eta * np.maximum(lord_series(times), 1.0 - self.delta)

    def _rewards(self, lags: NDArray[np.int64]) -> FloatArray:
        rewards: FloatArray = self.alpha * np.power(self.delta, lags.astype(np.float64)) * lord_series(lags)
        return rewards

    def _forget(self) -> None:
        super()._forget()
        oldest = self._time - self._memory
        if self._rejections[0] < oldest:
            self._rejections = [time for time in self._rejections if time >= oldest]


class Lond(Procedure):
    """Levels in proportion to the rejections so far; of 1 / e it is e-LOND."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._time = self._rejected = 0

    @property
    def level(self) -> float:
        """Return ``alpha g_t (R + 1)``."""
        return self.alpha * float(lord_series(self._time + 1)) * (self._rejected + 1)

    def learn(self, value: float, rejected: bool) -> None:
        """Count the value and the rejection."""
        self._time += 1
        self._rejected += rejected

    def state(self) -> dict[str, Any]:
        """Return both counts."""
        return {"time": self._time, "rejected": self._rejected}

    def resume(self, state: dict[str, Any]) -> Self:
        """Take over the memory of a procedure with the same settings; returns itself."""
        self._time, self._rejected = int(state["time"]), int(state["rejected"])
        return self


class TrailingBH(Procedure):
    """BH over the last ``block`` values, deciding on the newest only; of 1 / e it is e-BH.

    The newest is among the rejected ones of its block exactly when it is at most ``alpha K / block``, where K - 1 is
    the largest j for which the j-th smallest of the others is at most ``alpha (j + 1) / block``.
    """

    def __init__(self, alpha: float, block: int) -> None:
        self.alpha, self.block = alpha, block
        self._bars = alpha * (np.arange(block) + 2.0) / block
        self._time = 0
        self._small: deque[tuple[int, float]] = deque()  # values at most alpha: no other can matter
        self._sorted = np.empty(block)
        self._count = 0
        self._level = alpha / block
        self._is_stale = False

    @property
    def level(self) -> float:
        """Return ``alpha K / block``, whatever the next value may be."""
        if self._is_stale:
            passed = np.flatnonzero(self._sorted[: self._count] <= self._bars[: self._count])
            passing = int(passed[-1]) + 2 if passed.size else 1
            self._level = self.alpha * passing / self.block
            self._is_stale = False
        return self._level

    def learn(self, value: float, rejected: bool) -> None:
        """Take the value into the block; the oldest leaves."""
        self._time += 1
        held = self._sorted
        if value <= self.alpha:
            place = int(np.searchsorted(held[: self._count], value))
            held[place + 1 : self._count + 1] = held[place : self._count]
            held[place] = value
            self._count += 1
            self._small.append((self._time, value))
            self._is_stale = True
        while self._small and self._small[0][0] <= self._time - self.block + 1:
            _, old = self._small.popleft()
            place = int(np.searchsorted(held[: self._count], old))
            held[place : self._count - 1] = held[place + 1 : self._count]
            self._count -= 1
            self._is_stale = True

    def state(self) -> dict[str, Any]:
        """Return the number of values and those of the block that matter, with their times."""
        return {"time": self._time, "small": [[time, value] for time, value in self._small]}

    def resume(self, state: dict[str, Any]) -> Self:
        """Take over the memory of a procedure with the same settings; returns itself."""
        self._time = int(state["time"])
        self._small = deque((int(time), float(value)) for time, value in state["small"])
        self._count = len(self._small)
        self._sorted[: self._count] = np.sort([value for _, value in self._small])
        self._is_stale = True
        return self
