"""Errors of quantile, interval and distribution forecasts, in float64, with the cell rules of ``metrics.point``.

Quantile axis Q comes last: quantiles [..., H, V, Q] beside targets [..., H, V]. Bounds may be infinite (a conformal
interval from too few residuals is): coverage stays defined, width and pinball are then infinite rather than pretty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln, ndtr, stdtr

from tsforge.core.errors import DataError
from tsforge.metrics.point import Axis, FloatArray, Score, mean_over, mean_scaled, scored_cells

_INV_SQRT_PI = 0.5641895835477563
_INV_SQRT_2PI = 0.3989422804014327


def check_levels(levels: Sequence[float]) -> FloatArray:
    """Return the levels as an array.

    Raises:
        DataError: there are none, they do not ascend strictly, or one lies outside (0, 1).
    """
    array = np.asarray(levels, dtype=np.float64)
    if array.ndim != 1 or not array.size or not ((array > 0) & (array < 1)).all() or (np.diff(array) <= 0).any():
        raise DataError(f"quantile levels must ascend strictly within (0, 1), given: {list(levels)}")
    return array


def pinball(target: ArrayLike, quantiles: ArrayLike, levels: Sequence[float]) -> FloatArray:
    """Return max(level (y - q), (level - 1)(y - q)) of every cell and level.

    Shapes:
        target [...], quantiles [..., Q] -> [..., Q].
    Raises:
        DataError: another number of quantiles than of levels, or levels as ``check_levels`` refuses them.
    Source: Koenker and Bassett (1978), Econometrica 46:33-50.
    """
    tau = check_levels(levels)
    q = np.asarray(quantiles, dtype=np.float64)
    if q.shape[-1] != tau.size:
        raise DataError(f"{q.shape[-1]} quantiles on the last axis, but {tau.size} levels")
    difference = np.asarray(target, dtype=np.float64)[..., None] - q
    return np.maximum(tau * difference, (tau - 1.0) * difference)


def pinball_loss(
    target: ArrayLike,
    quantiles: ArrayLike,
    levels: Sequence[float],
    mask: ArrayLike | None = None,
    axis: Axis = None,
) -> Score:
    """Return the pinball loss averaged over levels and ``axis`` (axes of the target).

    Raises:
        DataError: see ``pinball`` and ``scored_cells``.
    """
    cells = pinball(target, quantiles, levels).mean(axis=-1)
    return mean_over(cells, scored_cells(target, mask), axis)


def weighted_quantile_loss(
    target: ArrayLike,
    quantiles: ArrayLike,
    levels: Sequence[float],
    mask: ArrayLike | None = None,
    axis: Axis = None,
) -> Score:
    """Return WQL = mean over levels of 2 sum(pinball) / sum(|y|), sums over ``axis``; NaN where the sum is 0.

    Source: Park, Maddix, Aubet, Kan, Gasthaus, Wang (2022), AISTATS, Eq. (weighted quantile loss).
    """
    scored = scored_cells(target, mask)
    loss = mean_over(pinball(target, quantiles, levels).mean(axis=-1), scored, axis)
    size = mean_over(np.abs(np.asarray(target, dtype=np.float64)), scored, axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(size.value > 0.0, 2.0 * loss.value / size.value, np.nan)
    return Score(ratio, loss.count)


def level_weights(levels: Sequence[float]) -> FloatArray:
    """Return how much of (0, 1) each level stands for: the part nearer to it than to any other; they sum to 1."""
    tau = check_levels(levels)
    edges = np.concatenate([[0.0], (tau[1:] + tau[:-1]) / 2.0, [1.0]])
    return np.asarray(np.diff(edges))


def crps_quantiles(target: ArrayLike, quantiles: ArrayLike, levels: Sequence[float]) -> FloatArray:
    """Return the continuous ranked probability score of every cell, from quantiles.

    CRPS = 2 integral of the pinball loss over levels, here a sum with ``level_weights``; with levels (i - 1/2) / Q it
    tends to the exact value as Q grows, with few levels it ignores what lies beyond the outermost ones.

    Source: Gneiting and Ranjan (2011), J. Business & Economic Statistics 29:411-422, Eq. (5).
    """
    loss = pinball(target, quantiles, levels)
    return np.asarray(2.0 * (loss * level_weights(levels)).sum(axis=-1))


def crps_normal(target: ArrayLike, mean: ArrayLike, scale: ArrayLike) -> FloatArray:
    """Return the continuous ranked probability score of Normal(mean, scale) for every cell; |y - mean| at scale 0.

    Raises:
        DataError: a negative scale.

    Source: Gneiting and Raftery (2007), JASA 102:359-378, Eq. (21).
    """
    y, mu, sigma = (np.asarray(part, dtype=np.float64) for part in (target, mean, scale))
    if (sigma < 0).any():
        raise DataError(f"{int((sigma < 0).sum())} scales of a Normal forecast are negative")
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (y - mu) / sigma
        density = _INV_SQRT_2PI * np.exp(-0.5 * np.square(z))
        spread = sigma * (z * (2.0 * ndtr(z) - 1.0) + 2.0 * density - _INV_SQRT_PI)
    return np.where(sigma == 0, np.abs(y - mu), spread)  # a missing spread gives a missing score


def crps_student_t(target: ArrayLike, mean: ArrayLike, scale: ArrayLike, df: ArrayLike) -> FloatArray:
    """Return the continuous ranked probability score of a Student-t for every cell; |y - mean| at scale 0.

    With z = (y - mean) / scale, density f and distribution function F of ``df`` degrees of freedom n:
    scale (z (2 F(z) - 1) + 2 f(z) (n + z^2) / (n - 1) - 2 sqrt(n) / (n - 1) B(1/2, n - 1/2) / B(1/2, n/2)^2).

    Args:
        scale: of the distribution, not its standard deviation.
        df: degrees of freedom, above 1 (below, the mean and the score do not exist).

    Raises:
        DataError: a negative scale, or degrees of freedom that are not above 1.

    Source: Jordan, Krueger, Lerch (2019), J. Statistical Software 90(12), appendix A.
    """
    y, mu, sigma, n = (np.asarray(part, dtype=np.float64) for part in (target, mean, scale, df))
    if (sigma < 0).any() or not (n > 1).all():
        raise DataError("a Student-t forecast needs scales of at least 0 and more than 1 degree of freedom")
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (y - mu) / sigma
        density = np.exp(-(n + 1.0) / 2.0 * np.log1p(np.square(z) / n) - betaln(0.5, n / 2.0)) / np.sqrt(n)
        pairs = 2.0 * np.sqrt(n) / (n - 1.0) * np.exp(betaln(0.5, n - 0.5) - 2.0 * betaln(0.5, n / 2.0))
        spread = sigma * (z * (2.0 * stdtr(n, z) - 1.0) + 2.0 * density * (n + np.square(z)) / (n - 1.0) - pairs)
    return np.where(sigma == 0, np.abs(y - mu), spread)  # a missing spread gives a missing score


def crps_samples(target: ArrayLike, samples: ArrayLike, *, fair: bool = True) -> FloatArray:
    """Return the continuous ranked probability score of every cell, from samples on the last axis.

    Args:
        fair: divide the spread term by M (M - 1), unbiased for the distribution the samples were drawn from;
            otherwise by M^2, the score of the empirical distribution itself.

    Shapes:
        target [...], samples [..., M].
    Raises:
        DataError: fewer than 2 samples with ``fair``, or none.
    Source: Gneiting and Raftery (2007), Eq. (20); the spread from order statistics, O(M log M).
    """
    draws = np.sort(np.asarray(samples, dtype=np.float64), axis=-1)
    number = draws.shape[-1]
    if number < (2 if fair else 1):
        raise DataError(f"{number} samples a cell are too few for the CRPS")
    distance = np.abs(draws - np.asarray(target, dtype=np.float64)[..., None]).mean(axis=-1)
    rank = 2.0 * np.arange(1, number + 1) - number - 1.0
    pairs = number * (number - 1) if fair else number * number
    return np.asarray(distance - (draws * rank).sum(axis=-1) / pairs)


def inside(target: ArrayLike, low: ArrayLike, high: ArrayLike) -> FloatArray:
    """Return 1.0 where low <= target <= high, else 0.0; NaN where a bound is missing."""
    y, bottom, top = (np.asarray(part, dtype=np.float64) for part in (target, low, high))
    hit = ((bottom <= y) & (y <= top)).astype(np.float64)
    return np.where(np.isnan(bottom) | np.isnan(top), np.nan, hit)


def coverage(
    target: ArrayLike, low: ArrayLike, high: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None
) -> Score:
    """Return the share of targets inside [low, high], bounds included."""
    return mean_over(inside(target, low, high), scored_cells(target, mask), axis)


def interval_width(
    target: ArrayLike, low: ArrayLike, high: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None
) -> Score:
    """Return the mean of high - low over the cells that ``coverage`` counts, in data units."""
    width = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
    return mean_over(width, scored_cells(target, mask), axis)


def interval_score(target: ArrayLike, low: ArrayLike, high: ArrayLike, alpha: float) -> FloatArray:
    """Return (high - low) + 2 / alpha times the distance by which the target lies outside, for every cell.

    Args:
        alpha: 1 - nominal coverage, in (0, 1).

    Raises:
        DataError: another ``alpha``.

    Source: Gneiting and Raftery (2007), Eq. (43).
    """
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha is {alpha}; it must lie between 0 and 1")
    y, bottom, top = (np.asarray(part, dtype=np.float64) for part in (target, low, high))
    outside = np.maximum(bottom - y, 0.0) + np.maximum(y - top, 0.0)
    return np.asarray((top - bottom) + 2.0 / alpha * outside)


def msis(
    target: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    alpha: float,
    scale: ArrayLike,
    mask: ArrayLike | None = None,
    axis: Axis = None,
) -> Score:
    """Return the mean scaled interval score; cells whose scale is undefined are left out of the count.

    Args:
        scale: unit of the series as in ``metrics.point.mase``.

    Source: Makridakis, Spiliotis, Assimakopoulos (2020), The M4 Competition, Eq. (MSIS).
    """
    return mean_scaled(interval_score(target, low, high, alpha), scale, scored_cells(target, mask), axis)
