"""Plain scorers that every result table must show: a learned model that does not beat them has learnt nothing.

All take complete arrays [N, V], learn from training rows only and score row by row. Larger = stranger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve

from tsforge.anomaly.covariance import Covariance, fit_covariance, squared_distance
from tsforge.anomaly.scorers import max_abs, mean_abs
from tsforge.core.errors import ConfigError, DataError, nearest

FloatArray = NDArray[np.float64]
BaselineJoint = Literal["mean_abs", "max_abs", "mahalanobis"]


class BaselineScorer(Protocol):
    """Learns from training rows, scores test rows."""

    def fit(self, train: ArrayLike) -> Self:
        """Learn from rows [N, V]."""
        ...

    def score(self, test: ArrayLike) -> FloatArray:
        """Return one score a row [M]."""
        ...


def _rows(values: ArrayLike) -> FloatArray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise DataError(f"a baseline needs rows [N, V] without missing or infinite values, given shape {x.shape}")
    return x


@dataclass
class Standardise:
    """z = (x - mean) / max(standard deviation, floor), cut at ``clip``; statistics of the training rows."""

    floor: float = 0.01
    clip: float = 20.0
    mean: FloatArray = field(default_factory=lambda: np.empty(0))
    deviation: FloatArray = field(default_factory=lambda: np.empty(0))

    def fit(self, train: ArrayLike) -> Self:
        """Learn mean and standard deviation [V]."""
        x = _rows(train)
        self.mean, self.deviation = x.mean(axis=0), np.maximum(x.std(axis=0), self.floor)
        return self

    def apply(self, values: ArrayLike) -> FloatArray:
        """Return z of rows [N, V]."""
        return np.clip((_rows(values) - self.mean) / self.deviation, -self.clip, self.clip)


class _Joint:
    """Joins deviations of variates; the covariance comes from deviations of training rows."""

    def __init__(self, joint: BaselineJoint) -> None:
        self.joint = joint
        self._covariance: Covariance | None = None
        self._center = np.zeros(1)

    def fit(self, deviations: FloatArray) -> None:
        if self.joint == "mahalanobis":
            self._covariance, self._center = fit_covariance(deviations), deviations.mean(axis=0)

    def score(self, deviations: FloatArray) -> FloatArray:
        if self._covariance is not None:
            return squared_distance(self._covariance, deviations - self._center)
        return max_abs(deviations) if self.joint == "max_abs" else mean_abs(deviations)


class RandomScore:
    """Uniform noise, seeded: the chance level of every metric."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, train: ArrayLike) -> Self:
        """Learn nothing."""
        return self

    def score(self, test: ArrayLike) -> FloatArray:
        """Return the same noise for the same seed and length."""
        return np.random.default_rng(self.seed).uniform(size=len(np.asarray(test)))


class ZScore:
    """Distance from the training mean in training standard deviations: no model at all."""

    def __init__(self, joint: BaselineJoint = "mean_abs") -> None:
        self._scale, self._joint = Standardise(), _Joint(joint)

    def fit(self, train: ArrayLike) -> Self:
        """Learn mean, scale and, for ``mahalanobis``, the covariance."""
        self._joint.fit(self._scale.fit(train).apply(train))
        return self

    def score(self, test: ArrayLike) -> FloatArray:
        """Return the joined deviations."""
        return self._joint.score(self._scale.apply(test))


class PcaResidual:
    """What principal components of 95 % of the variance leave over, each variate by its training deviation."""

    def __init__(self, explained: float = 0.95, floor: float = 0.01, joint: BaselineJoint = "mean_abs") -> None:
        self.explained, self.floor = explained, floor
        self._scale, self._joint = Standardise(), _Joint(joint)
        self._components = np.empty((0, 0))
        self._deviation = np.empty(0)

    def fit(self, train: ArrayLike) -> Self:
        """Learn components, the deviation of what they leave over and, for ``mahalanobis``, its covariance."""
        z = self._scale.fit(train).apply(train)
        _, singular, components = np.linalg.svd(z, full_matrices=False)
        share = np.cumsum(singular**2) / np.sum(singular**2)
        count = int(np.searchsorted(share, self.explained)) + 1
        self._components = components[: min(count, len(components))]
        left_over = self._left_over(z)
        self._deviation = np.maximum(left_over.std(axis=0), self.floor)
        self._joint.fit(left_over / self._deviation)
        return self

    def score(self, test: ArrayLike) -> FloatArray:
        """Return the joined left-over."""
        return self._joint.score(self._left_over(self._scale.apply(test)) / self._deviation)

    def _left_over(self, z: FloatArray) -> FloatArray:
        return z - z @ self._components.T @ self._components


class Var1Residual:
    """Residual of a ridge regression of each standardised row on the row before."""

    def __init__(self, joint: BaselineJoint = "mean_abs", ridge: float = 0.01) -> None:
        self.ridge = ridge
        self._scale, self._joint = Standardise(), _Joint(joint)
        self._weights = np.empty((0, 0))

    def fit(self, train: ArrayLike) -> Self:
        """Learn the coefficients, with a penalty of ``ridge`` a row, and the covariance of the residuals."""
        z = self._scale.fit(train).apply(train)
        past, now = z[:-1], z[1:]
        gram = past.T @ past + self.ridge * len(past) * np.eye(z.shape[1])
        self._weights = np.asarray(cho_solve(cho_factor(gram), past.T @ now))
        self._joint.fit(now - past @ self._weights)
        return self

    def score(self, test: ArrayLike) -> FloatArray:
        """Return the joined residuals; the first row has no row before it and counts as unchanged."""
        z = self._scale.apply(test)
        past = np.vstack([z[:1], z[:-1]])
        return self._joint.score(z - past @ self._weights)


class SeasonalNaive:
    """Distance from the row one season earlier, in standard deviations of that distance in training."""

    def __init__(self, season_length: int, joint: BaselineJoint = "mean_abs") -> None:
        if season_length < 1:
            raise ConfigError(f"season_length is {season_length}; it must be at least 1")
        self.season_length = season_length
        self._scale, self._joint = Standardise(), _Joint(joint)
        self._before = np.empty((0, 0))

    def fit(self, train: ArrayLike) -> Self:
        """Learn the scale of seasonal differences and keep the last season.

        Raises:
            DataError: fewer than two seasons of training rows.
        """
        x = _rows(train)
        if len(x) < 2 * self.season_length:
            raise DataError(f"{len(x)} training rows hold no two seasons of {self.season_length}; use a shorter season")
        difference = x[self.season_length :] - x[: -self.season_length]
        self._joint.fit(self._scale.fit(difference).apply(difference))
        self._before = x[-self.season_length :]
        return self

    def score(self, test: ArrayLike) -> FloatArray:
        """Return the joined seasonal differences; the test rows follow the training rows."""
        x = _rows(test)
        earlier = np.vstack([self._before, x])[: len(x)]
        return self._joint.score(self._scale.apply(x - earlier))


BASELINES = (
    "random",
    "mean_abs",
    "max_abs",
    "mahalanobis",
    "pca_residual",
    "var1_mean_abs",
    "var1_mahalanobis",
    "seasonal_naive",
)


def build_baseline(name: str, *, seed: int = 0, season_length: int | None = None) -> BaselineScorer:
    """Return an unfitted baseline by its name in result tables.

    Raises:
        ConfigError: unknown name, or ``seasonal_naive`` without a season.
    """
    if name == "random":
        return RandomScore(seed)
    for joint in get_args(BaselineJoint):
        if name == joint:
            return ZScore(joint)
    if name == "pca_residual":
        return PcaResidual()
    if name in ("var1_mean_abs", "var1_mahalanobis"):
        return Var1Residual("mean_abs" if name == "var1_mean_abs" else "mahalanobis")
    if name == "seasonal_naive" and season_length is not None:
        return SeasonalNaive(season_length)
    if name == "seasonal_naive":
        raise ConfigError("seasonal_naive needs a season_length")
    raise ConfigError(f"unknown baseline '{name}'{nearest(name, BASELINES)} (known: {', '.join(BASELINES)})")
