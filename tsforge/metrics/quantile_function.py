"""From quantiles at a few levels to a whole distribution: its quantile function and its distribution function.

Between neighbouring levels a quantile is linear in the Normal score of the level, so that the quantiles of a Normal
give back that Normal. Beyond the outermost level the tail is exponential and passes through the two outermost
quantiles, the rule of ``layers.likelihoods.Quantiles``. Equal neighbouring quantiles are an atom: the distribution
function jumps there, and when the two outermost are equal the atom takes the whole tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from tsforge.core.errors import DataError
from tsforge.metrics.point import FloatArray
from tsforge.metrics.quantile import check_levels


def quantile_at(quantiles: ArrayLike, levels: Sequence[float], probabilities: ArrayLike) -> FloatArray:
    """Return the quantiles at any probabilities.

    Args:
        quantiles: ascending along the last axis, finite.
        levels: where they are known, at least two.
        probabilities: strictly between 0 and 1; one axis [P] for the same ones in every cell, else as many axes as the
            quantiles.

    Shapes:
        quantiles [..., Q], probabilities [P] or [..., P] -> [..., P].
    Raises:
        DataError: fewer than two levels, or a probability outside (0, 1).
    """
    values, probability = np.asarray(quantiles, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    left, weight = _places(levels, probability)
    if probability.ndim == 1:
        low, high = values[..., left], values[..., left + 1]
    else:
        low = np.take_along_axis(values, left, axis=-1)
        high = np.take_along_axis(values, left + 1, axis=-1)
    return np.asarray(low + weight * (high - low))


def _places(levels: Sequence[float], probability: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Return k and w with Q(p) = q_k + w (q_(k+1) - q_k); w lies outside [0, 1] in the tails."""
    tau = _two_levels(levels)
    if not ((probability > 0.0) & (probability < 1.0)).all():
        raise DataError("probabilities must lie strictly between 0 and 1")
    score = ndtri(tau)
    left = np.clip(np.searchsorted(tau, probability, side="right") - 1, 0, tau.size - 2)
    weight = (ndtri(probability) - score[left]) / (score[left + 1] - score[left])
    lower = np.log(probability / tau[0]) / np.log(tau[1] / tau[0])
    upper = 1.0 + np.log((1.0 - tau[-1]) / (1.0 - probability)) / np.log((1.0 - tau[-2]) / (1.0 - tau[-1]))
    return left, np.where(probability < tau[0], lower, np.where(probability > tau[-1], upper, weight))


def probability_at(quantiles: ArrayLike, levels: Sequence[float], values: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return P(Y < y) and P(Y <= y); they differ at atoms only. NaN where a value or a quantile is missing.

    Shapes:
        quantiles [..., Q] ascending, values [...] -> [...], [...].
    """
    tau = _two_levels(levels)
    q, y = np.asarray(quantiles, dtype=np.float64), np.asarray(values, dtype=np.float64)
    below, up_to = (q < y[..., None]).sum(axis=-1), (q <= y[..., None]).sum(axis=-1)
    smooth = _smooth_probability(q, tau, y, below)
    atom = up_to - below >= 2  # levels below .. up_to - 1 share this value
    before = np.where(below == 0, 0.0, tau[np.minimum(below, tau.size - 1)])
    after = np.where(up_to == tau.size, 1.0, tau[np.maximum(up_to - 1, 0)])
    missing = np.isnan(y) | np.isnan(q).any(axis=-1)
    first, last = np.where(atom, before, smooth), np.where(atom, after, smooth)
    return np.where(missing, np.nan, first), np.where(missing, np.nan, last)


def _smooth_probability(q: FloatArray, tau: FloatArray, y: FloatArray, below: NDArray[np.int64]) -> FloatArray:
    """Return the distribution function where it is continuous."""
    score = ndtri(tau)
    right = np.clip(below, 1, tau.size - 1)
    low = np.take_along_axis(q, (right - 1)[..., None], axis=-1)[..., 0]
    high = np.take_along_axis(q, right[..., None], axis=-1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weight = np.clip((y - low) / (high - low), 0.0, 1.0)
        body = ndtr(score[right - 1] + weight * (score[right] - score[right - 1]))
        left_rate = np.log(tau[1] / tau[0]) / (q[..., 1] - q[..., 0])
        right_rate = np.log((1.0 - tau[-2]) / (1.0 - tau[-1])) / (q[..., -1] - q[..., -2])
        lower = tau[0] * np.exp(np.minimum((y - q[..., 0]) * left_rate, 0.0))
        upper = 1.0 - (1.0 - tau[-1]) * np.exp(-np.maximum((y - q[..., -1]) * right_rate, 0.0))
    return np.asarray(np.where(y < q[..., 0], lower, np.where(y > q[..., -1], upper, body)))


def _two_levels(levels: Sequence[float]) -> FloatArray:
    tau = check_levels(levels)
    if tau.size < 2:
        raise DataError(f"a distribution needs quantiles at two or more levels, given: {list(levels)}")
    return tau
