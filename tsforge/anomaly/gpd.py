"""Generalised Pareto tails: small p-values from the excesses over a high quantile.

Legend: u threshold, x = s - u excess, gamma shape, sigma scale, N_u number of excesses among n calibration scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
MIN_EXCESSES = 50
SHAPE_LIMIT = 0.5
SMALLEST_P = 1e-300  # beyond a finite end of the support: tiny, but still a number with a logarithm
_NEAR_ZERO = 1e-8


@dataclass(frozen=True, kw_only=True)
class ParetoTail:
    """The upper tail of a score distribution.

    Attributes:
        u: where the tail starts. gamma, sigma: shape and scale of the excesses.
        num_excesses: N_u. num_scores: n.
    """

    u: float
    gamma: float
    sigma: float
    num_excesses: int
    num_scores: int

    def survival(self, scores: ArrayLike) -> FloatArray:
        """Return P(S > s) for s > u: ``(N_u / n) (1 + gamma (s - u) / sigma)^(-1 / gamma)``; never 0."""
        x = np.asarray(scores, dtype=np.float64) - self.u
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inside = 1.0 + self.gamma * x / self.sigma
            log_tail = (
                -x / self.sigma if abs(self.gamma) < _NEAR_ZERO else -np.log(np.maximum(inside, 0.0)) / self.gamma
            )
            p = self.num_excesses / self.num_scores * np.exp(log_tail)
        return np.where(np.isnan(x), np.nan, np.maximum(p, SMALLEST_P))

    def quantile(self, risk: float) -> float:
        """Return z_q, the score exceeded with probability ``risk``: ``u + sigma/gamma ((q n / N_u)^-gamma - 1)``."""
        ratio = risk * self.num_scores / self.num_excesses
        if abs(self.gamma) < _NEAR_ZERO:
            return float(self.u - self.sigma * np.log(ratio))
        return float(self.u + self.sigma / self.gamma * (ratio**-self.gamma - 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "u": self.u,
            "gamma": self.gamma,
            "sigma": self.sigma,
            "num_excesses": self.num_excesses,
            "num_scores": self.num_scores,
        }


def scores_needed(level: float) -> int:
    """Return how many scores leave enough of them above their quantile ``level``, where they differ."""
    return int(np.ceil((MIN_EXCESSES + 1) / (1.0 - level)))


def fit_tail(
    scores: ArrayLike,
    *,
    level: float = 0.98,
    shape: Literal["free", "nonnegative"] = "free",
    method: Literal["likelihood", "moments"] = "likelihood",
) -> ParetoTail:
    """Return the generalised Pareto tail of ``scores`` above their empirical quantile ``level``.

    Args:
        scores: calibration scores; NaN is left out.
        level: quantile u at which the tail starts.
        shape: ``free`` keeps gamma in [-0.5, 0.5], ``nonnegative`` in [0, 0.5].
        method: maximum likelihood, or the moments estimate alone.

    Raises:
        DataError: fewer than 50 excesses, or they do not differ.

    Source: Siffer et al. (KDD 2017); likelihood by the one-dimensional reduction of Grimshaw (1993), with the shape
    bounded. Moments: ``gamma = (1 - m^2/v) / 2``, ``sigma = m (m^2/v + 1) / 2``.
    """
    s = np.asarray(scores, dtype=np.float64).ravel()
    s = s[~np.isnan(s)]
    u = float(np.quantile(s, level)) if s.size else np.nan
    x = s[s > u] - u
    if x.size < MIN_EXCESSES:
        raise DataError(
            f"a tail model needs {MIN_EXCESSES} scores above the {level:g} quantile, {s.size} calibration scores leave "
            f"{x.size}; calibrate on at least {scores_needed(level)} rows or lower tail_level"
        )
    return fit_excesses(x, u=u, num_excesses=int(x.size), num_scores=int(s.size), shape=shape, method=method)


def fit_excesses(
    excesses: FloatArray,
    *,
    u: float,
    num_excesses: int,
    num_scores: int,
    shape: Literal["free", "nonnegative"] = "free",
    method: Literal["likelihood", "moments"] = "likelihood",
) -> ParetoTail:
    """Return the tail above ``u`` from its excesses [K], which may be the most recent of ``num_excesses`` only.

    Raises:
        DataError: the excesses do not differ, or are infinite.
    """
    x = excesses
    low = 0.0 if shape == "nonnegative" else -SHAPE_LIMIT
    mean = float(x.mean())
    spread = float((x / mean).var(ddof=1)) if np.isfinite(mean) and mean > 0.0 else 0.0
    if spread <= 1e-24:
        raise DataError(f"the {x.size} scores above {u:g} do not differ or are infinite; no tail can be fitted")
    gamma, sigma = _moments(spread, low)
    if method == "likelihood":
        gamma, sigma = _likelihood(x / mean, low, start=(gamma, sigma))
    return ParetoTail(u=u, gamma=gamma, sigma=sigma * mean, num_excesses=num_excesses, num_scores=num_scores)


def _moments(variance: float, low: float) -> tuple[float, float]:
    """Return shape and scale of excesses with mean 1."""
    ratio = 1.0 / variance
    gamma = 0.5 * (1.0 - ratio)
    if low <= gamma <= SHAPE_LIMIT:
        return gamma, 0.5 * (ratio + 1.0)
    gamma = float(np.clip(gamma, low, SHAPE_LIMIT))
    return gamma, 1.0 - gamma  # the mean of a generalised Pareto variable is sigma / (1 - gamma)


def _negative_log_likelihood(x: FloatArray, gamma: float, sigma: float) -> float:
    """Return the mean negative log-likelihood; infinite outside the support."""
    if sigma <= 0.0:
        return np.inf
    if abs(gamma) < _NEAR_ZERO:
        return float(np.log(sigma) + x.mean() / sigma)
    inside = 1.0 + gamma * x / sigma
    if inside.min() <= 0.0:
        return np.inf
    return float(np.log(sigma) + (1.0 + 1.0 / gamma) * np.log(inside).mean())


def _likelihood(x: FloatArray, low: float, start: tuple[float, float]) -> tuple[float, float]:
    """Return the bounded maximum-likelihood shape and scale of excesses with mean 1.

    For a fixed ratio theta = gamma / sigma the best shape is mean(log(1 + theta x)), so one number is searched for. It
    grows with theta, so bounds on the shape are bounds on theta; on a bound, sigma is fitted alone. At a shape of 0 the
    mean is the best scale.
    """
    from scipy.optimize import minimize_scalar

    edge = -1.0 / float(x.max())

    def shape_at(theta: float) -> float:
        return float(np.log1p(theta * x).mean())

    def profile(theta: float) -> float:
        gamma = shape_at(theta)
        return _negative_log_likelihood(x, gamma, 1.0 if abs(theta) < _NEAR_ZERO else gamma / theta)

    left = 0.0 if low >= 0.0 else _solve_shape(shape_at, low, edge * (1.0 - 1e-9), 0.0)
    right = 1.0
    while shape_at(right) < SHAPE_LIMIT:
        right *= 2.0
    right = _solve_shape(shape_at, SHAPE_LIMIT, 0.0, right)
    candidates = [start]
    grid = np.linspace(left, right, 17)
    best = int(np.argmin([profile(float(theta)) for theta in grid]))
    bracket = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, grid.size - 1)]))
    theta = float(minimize_scalar(profile, bounds=bracket, method="bounded", options={"xatol": 1e-10}).x)
    if abs(theta) >= _NEAR_ZERO:
        candidates.append((shape_at(theta), shape_at(theta) / theta))
    candidates.append((0.0, 1.0))
    if best == 0 and low < 0.0:
        candidates.append((low, _best_scale(x, low)))
    if best == grid.size - 1:
        candidates.append((SHAPE_LIMIT, _best_scale(x, SHAPE_LIMIT)))
    return min(candidates, key=lambda pair: _negative_log_likelihood(x, *pair))


def _solve_shape(shape_at: Callable[[float], float], target: float, left: float, right: float) -> float:
    """Return theta in [left, right] with the wanted shape; the nearer end when it is not reached."""
    from scipy.optimize import brentq

    if shape_at(left) >= target:
        return left
    if shape_at(right) <= target:
        return right
    return float(brentq(lambda theta: shape_at(theta) - target, left, right, xtol=1e-14, rtol=1e-14))


def _best_scale(x: FloatArray, gamma: float) -> float:
    """Return the maximum-likelihood scale at a fixed shape other than 0."""
    from scipy.optimize import minimize_scalar

    smallest = -gamma * float(x.max()) * (1.0 + 1e-9) if gamma < 0.0 else 1e-6
    found = minimize_scalar(
        lambda sigma: _negative_log_likelihood(x, gamma, sigma),
        bounds=(smallest, max(10.0, 10.0 * smallest)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(found.x)
