"""Conformity scores, their finite-sample ranks, and bounds that do not cross: what ``conformal`` is made of.

An interval is base + margin x unit on either side; base and unit are the kind of score:

===================== ================== ======================================== ==================
score                 base (low, high)   unit                                     margins
===================== ================== ======================================== ==================
``absolute``          mean               scale of the window                      one for both sides
``asymmetric``        mean               scale of the window                      one for each side
``cqr``               forecast quantiles scale of the window                      one for both sides
``cqr_asymmetric``    forecast quantiles scale of the window                      one for each side
``scaled``            mean               mean to forecast quantile, on each side  one for both sides
``scaled_volatility`` mean               root mean square step of the context     one for both sides
``recent``            mean               recent errors of the network             one for both sides
===================== ================== ======================================== ==================

Source: Papadopoulos et al. (2002), ECML; Lei et al. (2018), JASA 113:1094-1111, Eq. (split conformal) and section 5.2
(local scale); Romano, Patterson, Candes (2019), NeurIPS, Eq. (6)-(8) and section 4 (asymmetric); Kivaranovic, Johnson,
Leeb (2020), AISTATS (stretched quantiles, here ``scaled``); Barber et al. (2023), Annals of Statistics 51:816-845,
Eq. (10)-(11) (weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, listing

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
ScoreArray = NDArray[np.floating[Any]]
QUANTILE_SCORES = ("cqr", "cqr_asymmetric", "scaled")
LOCAL_UNIT = {"scaled_volatility": "volatility of the context", "recent": "recent errors of the network"}
TWO_SIDED = ("asymmetric", "cqr_asymmetric")


def conformal_rank(count: int, coverage: float) -> int:
    """Return k = ceil((n + 1) coverage): the k-th smallest of n scores is the margin; k > n means there is none.

    Raises:
        ConfigError: coverage lies outside (0, 1).
    """
    if not 0.0 < coverage < 1.0:
        raise ConfigError(f"coverage {coverage} must lie between 0 and 1")
    return math.ceil(round((count + 1) * coverage, 9))  # 10 * 0.9 must not become 9.000000000000002


def conformal_margin(
    scores: ScoreArray, mask: NDArray[np.bool_], coverage: float, weights: FloatArray | None = None
) -> tuple[FloatArray, IntArray]:
    """Return the margin and the number of scores behind it; infinite where they are too few.

    Args:
        scores, mask: True = counts.
        coverage: wanted.
        weights: of the scores [N] in (0, 1]; the score to come has weight 1 (Barber et al. 2023, Eq. 10-11).

    Shapes:
        scores [N, ...], mask [N, ...] -> margin [...], n [...].
    """
    codes = np.where(mask, 0, -1).reshape(len(mask), math.prod(mask.shape[1:]))
    margin, count = bucket_margins(scores.reshape(codes.shape), codes, 1, coverage, weights)
    return margin[0].reshape(mask.shape[1:]), count[0].reshape(mask.shape[1:])


def bucket_margins(
    scores: ScoreArray, codes: IntArray, number: int, coverage: float, weights: FloatArray | None = None
) -> tuple[FloatArray, IntArray]:
    """Return the margin of every bucket and column, and the number of scores in it; infinite where they are too few.

    Shapes:
        scores [N, C], codes [N, C] in 0 .. number - 1 or -1 (left out), weights [N] -> [number, C] twice.
    """
    rows, columns = scores.shape
    used = codes >= 0
    place = (np.maximum(codes, 0) * columns + np.arange(columns))[used]
    count = np.bincount(place, minlength=number * columns).reshape(number, columns)
    rank = np.ceil(np.round((count + 1) * coverage, 9)).astype(np.int64)
    margin = np.full(count.shape, np.inf)
    if not rows:
        return margin, count
    if number == 1 and weights is None:
        ordered = np.sort(np.where(used, scores, np.inf), axis=0)
        place = np.where(rank <= count, rank - 1, 0)
        return np.where(rank <= count, np.take_along_axis(ordered, place, axis=0), np.inf), count
    order = np.argsort(scores, axis=0, kind="stable")
    group = np.take_along_axis(np.where(used, codes, number), order, axis=0)
    order = np.take_along_axis(order, np.argsort(group, axis=0, kind="stable"), axis=0)  # by bucket, then by score
    start = np.cumsum(count, axis=0) - count
    ordered = np.take_along_axis(scores, order, axis=0)
    if weights is None:
        place = np.where(rank <= count, start + rank - 1, 0)
        return np.where(rank <= count, np.take_along_axis(ordered, place, axis=0), np.inf), count
    for bucket, at in zip(*np.nonzero(count), strict=True):
        part = slice(start[bucket, at], start[bucket, at] + count[bucket, at])
        mass = np.cumsum(weights[order[part, at]])
        found = int(np.searchsorted(mass, np.round(coverage * (mass[-1] + 1.0), 9) - 1e-9))
        margin[bucket, at] = ordered[part, at][found] if found < count[bucket, at] else np.inf
    return margin, count


def paired_levels(levels: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return (coverage, position of the low level, position of the high level) of each central interval, widest first.

    Raises:
        ConfigError: levels do not ascend within (0, 1), or one below or above 0.5 has no mirror image.
    """
    given = [float(level) for level in levels]
    if not given or any(not 0.0 < level < 1.0 for level in given) or sorted(set(given)) != given:
        raise ConfigError(f"quantile levels must ascend within (0, 1), given: {listing(given, 20)}")
    alone = [a for a in given if not any(abs(a + b - 1.0) < 1e-9 for b in given)]
    if alone:
        raise ConfigError(
            f"quantile level(s) {listing(alone)} have no mirror image (0.1 goes with 0.9); "
            "a calibrated interval needs both bounds"
        )
    half = len(given) // 2
    return [(round(given[-1 - i] - given[i], 9), i, len(given) - 1 - i) for i in range(half)]


@dataclass(frozen=True)
class Anchors:
    """Where the bounds of every central interval start, and what a margin of 1 moves them by; all [N, H, V, P]."""

    low: FloatArray
    high: FloatArray
    unit_low: FloatArray
    unit_high: FloatArray


def anchors(
    score: str,
    mean: FloatArray,
    quantiles: FloatArray | None,
    levels: Sequence[float],
    scale: FloatArray,
    local: FloatArray | None,
) -> Anchors:
    """Return base and unit of every central interval; arguments as for ``interval_scores``.

    Raises:
        ConfigError: the score needs quantiles or a unit that are not given.
    """
    pairs = paired_levels(levels)
    shape = (*mean.shape, len(pairs))
    middle = np.broadcast_to(mean[..., None], shape)
    unit = np.broadcast_to(scale[:, None, :, None], shape)
    if score in ("absolute", "asymmetric"):
        return Anchors(middle, middle, unit, unit)
    least = unit * 1e-3  # a spread of nothing would make every score infinite
    if score in LOCAL_UNIT:
        if local is None:
            raise ConfigError(f"the calibration scales by the {LOCAL_UNIT[score]}, not at hand here")
        spread = np.maximum(np.nan_to_num(local)[..., None], least)
        return Anchors(middle, middle, np.broadcast_to(spread, shape), np.broadcast_to(spread, shape))
    if quantiles is None:
        raise ConfigError(f"'{score}' scores need the quantiles of a distribution, this network gives points")
    low, high = quantiles[..., [i for _, i, _ in pairs]], quantiles[..., [j for _, _, j in pairs]]
    if score == "scaled":
        return Anchors(middle, middle, np.maximum(middle - low, least), np.maximum(high - middle, least))
    return Anchors(low, high, unit, unit)


def interval_scores(
    target: FloatArray,
    mean: FloatArray,
    quantiles: FloatArray | None,
    levels: Sequence[float],
    scale: FloatArray,
    *,
    score: str | None = None,
    local: FloatArray | None = None,
) -> FloatArray:
    """Return the conformity score of every cell and central interval: how many units the target lies outside the base.

    Args:
        target, mean: data units.
        quantiles: of the network at ``levels``; None for points.
        levels: closed under mirroring at 0.5.
        scale: unit of each window.
        score: see the module; default ``cqr`` with quantiles, else ``absolute``.
        local: unit of each window or cell, for ``scaled_volatility`` and ``recent``.

    Shapes:
        target, mean [N, H, V], quantiles [N, H, V, Q], scale [N, V], local [N, H or 1, V] -> [N, H, V, P]; for scores
        with a margin for each side [N, H, V, P, 2]: below the base, above it.
    """
    score = score or ("absolute" if quantiles is None else "cqr")
    base = anchors(score, mean, quantiles, levels, scale, local)
    below = (base.low - target[..., None]) / base.unit_low
    above = (target[..., None] - base.high) / base.unit_high
    if score in TWO_SIDED:
        return np.stack([below, above], axis=-1)
    return np.asarray(np.maximum(below, above))


def nested(quantiles: FloatArray) -> FloatArray:
    """Return quantiles pushed outwards from the middle until none cross; symmetric level sets, shape [..., Q]."""
    number = quantiles.shape[-1]
    half = number // 2
    result = np.array(quantiles)
    if not half:
        return result
    low, high = result[..., half - 1], result[..., number - half]
    if number % 2:
        middle_low = middle_high = result[..., half]
    else:  # without a median only an inverted innermost interval needs a middle
        with np.errstate(invalid="ignore"):
            middle = (low + high) / 2.0
        middle_low, middle_high = np.where(low > high, middle, low), np.where(low > high, middle, high)
    result[..., half - 1] = np.minimum(low, middle_low)
    result[..., number - half] = np.maximum(high, middle_high)
    result[..., :half] = np.minimum.accumulate(result[..., :half][..., ::-1], axis=-1)[..., ::-1]
    result[..., number - half :] = np.maximum.accumulate(result[..., number - half :], axis=-1)
    return result
