"""Joint scores over variates, from normalised residuals z [N, V]; larger = stranger, NaN = not scorable.

All of them look at one row at a time: latency 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.covariance import Covariance, squared_distance
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]


def winsorise(z: ArrayLike, limit: float = 50.0) -> FloatArray:
    """Return z cut at ``limit`` on both sides; NaN stays."""
    return np.clip(np.asarray(z, dtype=np.float64), -limit, limit)


def mean_abs(z: ArrayLike) -> FloatArray:
    """Return mean_v |z_v| over the observed variates: broad faults."""
    return mean_of(np.abs(np.asarray(z, dtype=np.float64)))


def mean_of(values: ArrayLike) -> FloatArray:
    """Return the mean over the observed columns of rows [N, K]."""
    return _over_columns(np.asarray(values, dtype=np.float64), np.nanmean)


def max_abs(z: ArrayLike) -> FloatArray:
    """Return max_v |z_v| over the observed variates: single-sensor faults."""
    return _over_columns(np.abs(np.asarray(z, dtype=np.float64)), np.nanmax)


def top_k(z: ArrayLike, k: int) -> FloatArray:
    """Return the mean of the k largest |z_v| (of all observed ones when fewer than k are).

    Raises:
        DataError: k is smaller than 1 or larger than the number of variates.
    """
    size = np.abs(np.asarray(z, dtype=np.float64))
    if not 1 <= k <= size.shape[1]:
        raise DataError(f"top_k needs k from 1 to the number of variates, {size.shape[1]}; given {k}")
    largest = -np.sort(np.where(np.isnan(size), np.inf, -size), axis=1)[:, :k]
    return mean_abs(np.where(np.isinf(largest), np.nan, largest))


def mahalanobis(z: ArrayLike, covariance: Covariance | None, constant: NDArray[np.bool_] | None = None) -> FloatArray:
    """Return ``d2 = z' S^-1 z``, brought to V degrees of freedom where variates are missing.

    Args:
        z: [N, V]. covariance: of the variates that are not constant, None when all are.
        constant: [V] variates kept out of the covariance; they add their own z^2, as independent ones would.

    Raises:
        DataError: no covariance, although some variates need one.
    """
    r = np.asarray(z, dtype=np.float64)
    own = np.zeros(r.shape[1], dtype=bool) if constant is None else constant
    added: FloatArray = np.nansum(np.square(r[:, own]), axis=1)
    if own.all():
        return np.where(np.isnan(r).all(axis=1), np.nan, added)
    if covariance is None:
        raise DataError(f"{int((~own).sum())} of {own.size} variates need a covariance; fit one on the scale span")
    return squared_distance(covariance, r[:, ~own]) + added


def product(z: ArrayLike, covariance: Covariance | None, constant: NDArray[np.bool_] | None = None) -> FloatArray:
    """Return ``mean_v |z_v| sqrt(d2)``: broad faults and broken correlations; arguments as of ``mahalanobis``.

    Not a standard score: the product of the two that see different faults, which needs no scale between them.

    Raises:
        DataError: see ``mahalanobis``.
    """
    return mean_abs(z) * np.sqrt(mahalanobis(z, covariance, constant))


def balanced(
    z: ArrayLike,
    share: ArrayLike,
    covariance: Covariance | None,
    constant: NDArray[np.bool_] | None = None,
    *,
    limit: float = 50.0,
) -> FloatArray:
    """Return ``mean_v |e_v| / sqrt(s_v sigma_v)`` times the root of the Mahalanobis distance.

    e is the residual, s its scale and sigma the deviation of the variate in training. In units of s alone a variate
    that is told almost exactly rules the mean, in units of sigma alone one that nobody can tell; between them lies the
    geometric mean. Not a standard score. Power and weights were chosen on labelled series (docs/anomaly-benchmark.md).

    Args:
        z: [N, V] residuals in units of s, not winsorised. share: [V] s / sigma.
        covariance, constant: as of ``mahalanobis``.
        limit: where residuals are cut, in either unit.

    Raises:
        DataError: see ``mahalanobis``.
    """
    size = np.abs(np.asarray(z, dtype=np.float64))
    between = np.sqrt(np.minimum(size, limit) * np.minimum(size * np.asarray(share, dtype=np.float64), limit))
    return mean_abs(between) * mahalanobis(winsorise(z, limit), covariance, constant) ** 0.25


def consensus(
    z: ArrayLike, plain: ArrayLike, covariance: Covariance | None, constant: NDArray[np.bool_] | None = None
) -> FloatArray:
    """Return the geometric mean of ``mean_v |z_v|``, the Mahalanobis distance and ``mean_v |r_v|``.

    A row is strange when all three say so: one that finds it usual holds back what another makes of it. Not a standard
    score; the three were chosen on labelled series (docs/anomaly-benchmark.md).

    Args:
        z: [N, V] residuals of the model. plain: [N, V] residuals r of a row on the one before; where a row has none the
            mean is one of two.
        covariance, constant: as of ``mahalanobis``.

    Raises:
        DataError: see ``mahalanobis``.
    """
    joined, size = product(z, covariance, constant), mean_abs(plain)
    return np.where(np.isnan(size), np.sqrt(joined), np.cbrt(joined * size))


def fisher(p_values: ArrayLike) -> FloatArray:
    """Return ``-2 sum_v log p_v`` over observed variates, scaled up to V where some are missing.

    Variates are dependent, so the sum is a score to calibrate, not a chi-square statistic.
    """
    p = np.asarray(p_values, dtype=np.float64)
    return np.asarray(mean_of(-2.0 * np.log(p)) * p.shape[1])


def runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, stop) of every maximal run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _over_columns(values: FloatArray, reduce: Callable[..., FloatArray]) -> FloatArray:
    if not np.isnan(values).any():
        return np.asarray(reduce(values, axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without any observed variate stay NaN, as documented
        return np.asarray(reduce(values, axis=1))
