"""Residuals in comparable units: robust scale per step and variate, floors, constant channels, predictive tails.

Legend: e residual y - forecast, z normalised residual, H forecast steps used, V variates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from tsforge.anomaly.row_regression import RowRegression
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
IQR_OF_NORMAL = 1.349  # interquartile range of a standard normal
MIN_OBSERVED = 20  # residuals a step and variate must have to be scaled


@dataclass(frozen=True, kw_only=True)
class TrainingRange:
    """What the training span says about each variate [V]; NaN where it was never observed.

    Attributes:
        low, high: [V] extremes. deviation: [V] standard deviation.
        regression: of a row on the one before, None where nothing asks for it.
    """

    low: FloatArray
    high: FloatArray
    deviation: FloatArray
    regression: RowRegression | None = None

    @classmethod
    def of(cls, values: ArrayLike) -> TrainingRange:
        """Return the range of training rows [N, V]; NaN is missing."""
        v = np.asarray(values, dtype=np.float64)
        seen = ~np.isnan(v)
        never = ~seen.any(axis=0)
        low = np.where(seen, v, np.inf).min(axis=0, initial=np.inf)
        high = np.where(seen, v, -np.inf).max(axis=0, initial=-np.inf)
        count = np.where(never, np.nan, seen.sum(axis=0))
        apart = np.where(seen, v - np.where(seen, v, 0.0).sum(axis=0) / count, 0.0)
        return cls(
            low=np.where(never, np.nan, low),
            high=np.where(never, np.nan, high),
            deviation=np.sqrt(np.square(apart).sum(axis=0) / count),
        )

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which variates had one value only."""
        return np.asarray(self.high == self.low)


@dataclass(frozen=True, kw_only=True)
class ResidualScale:
    """Location and scale of out-of-sample residuals, one per step and variate.

    Attributes:
        location, scale: [H, V]; NaN where fewer than 20 residuals were seen (such cells are never scored).
        constant: [V] variates that were constant in training; scored by "differs from the constant" alone.
        level: [V] value of the constant ones. constant_score: z given to a value that differs.
    """

    location: FloatArray
    scale: FloatArray
    constant: NDArray[np.bool_]
    level: FloatArray
    constant_score: float = 10.0

    def normalise(self, residuals: ArrayLike, values: ArrayLike) -> FloatArray:
        """Return z [N, H, V] of residuals [N, H, V]; ``values`` [N, V] judge constant variates. Missing stays NaN."""
        e = np.asarray(residuals, dtype=np.float64)
        z = (e - self.location) / self.scale
        if self.constant.any():
            y = np.asarray(values, dtype=np.float64)[:, self.constant]
            level = self.level[self.constant]
            apart = y - level
            # stored as float32 somewhere on the way: a difference in the last digits is no difference
            moved = np.abs(apart) > 1e-6 * np.maximum(np.abs(level), 1e-6)
            own = np.where(moved, np.sign(apart) * self.constant_score, 0.0)
            z[:, :, self.constant] = np.where(np.isnan(y), np.nan, own)[:, None, :]
        return z

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which variates [V] can be scored at some step."""
        return np.asarray(self.constant | ~np.isnan(self.scale).all(axis=0))


def fit_residual_scale(
    residuals: ArrayLike, training: TrainingRange, *, smallest: ArrayLike, constant_score: float = 10.0
) -> ResidualScale:
    """Return robust location (median) and scale (interquartile range / 1.349) of residuals [N, H, V].

    Args:
        residuals: of rows the model was not fitted on; NaN is missing.
        training: range of each variate in training; a variate without any is constant.
        smallest: [V] or one number, floor of the scale: without it a near-constant variate makes any wiggle infinite.
        constant_score: z of a value that leaves the constant of training.

    Raises:
        DataError: no variate has 20 residuals at any step.
    """
    e = np.asarray(residuals, dtype=np.float64)
    enough = (~np.isnan(e)).sum(axis=0) >= MIN_OBSERVED
    if not (enough.any() or training.constant.any()):
        raise DataError(
            f"{e.shape[0]} rows leave no variate with {MIN_OBSERVED} residuals to set a scale; give the detector more "
            "observed rows between training and scoring"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-missing columns are handled by `enough`
        quarter, median, three = np.nanquantile(e, (0.25, 0.5, 0.75), axis=0)
    floor = np.fmax(np.asarray(smallest, dtype=np.float64), np.finfo(np.float64).tiny ** 0.5)
    return ResidualScale(
        location=np.where(enough, median, np.nan),
        scale=np.where(enough, np.fmax((three - quarter) / IQR_OF_NORMAL, floor), np.nan),
        constant=training.constant,
        level=np.where(training.constant, training.low, np.nan),
        constant_score=constant_score,
    )


def reduce_horizon(z: ArrayLike, how: Literal["first", "last", "median", "max"]) -> FloatArray:
    """Return one z a row and variate [N, V] from z [N, H, V] of several steps, over the steps available.

    ``first`` and ``last`` take the nearest and the farthest available step, ``max`` the one farthest from 0 with its
    sign. Applied after normalising: raw errors grow with the step.
    """
    values = np.asarray(z, dtype=np.float64)
    if values.shape[1] == 1:
        return values[:, 0, :].copy()
    seen = ~np.isnan(values)
    if how == "median" and seen.all():
        ordered = np.sort(values, axis=1)
        middle, is_odd = divmod(values.shape[1], 2)
        upper = ordered[:, middle]
        return upper.copy() if is_odd else 0.5 * (ordered[:, middle - 1] + upper)
    none = ~seen.any(axis=1)
    if how == "median":
        ordered = np.sort(values, axis=1)  # missing ones last
        count = seen.sum(axis=1)
        low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, values.shape[1] - 1)
        below, above = (np.take_along_axis(ordered, place[:, None, :], axis=1)[:, 0, :] for place in (low, high))
        return np.asarray(np.where(count % 2 == 1, below, 0.5 * (below + above)))
    if how == "first":
        index = seen.argmax(axis=1)
    elif how == "last":
        index = values.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)
    else:
        index = np.where(seen, np.abs(values), -1.0).argmax(axis=1)
    picked = np.take_along_axis(values, index[:, None, :], axis=1)[:, 0, :]
    return np.where(none, np.nan, picked)


def tail_to_normal(signed_tail: ArrayLike) -> FloatArray:
    """Return the standard normal z with a signed two-sided tail score t, |t| = -log(2 min(F(y), 1 - F(y))).

    So a residual of any predictive distribution becomes comparable with one of a normal distribution.
    """
    t = np.asarray(signed_tail, dtype=np.float64)
    size = np.abs(t)
    moderate = -ndtri(0.5 * np.exp(-np.minimum(size, 600.0)))
    # past the smallest float: P(|Z| > z) ~ exp(-z^2 / 2), continued from the last exact point
    anchor = -float(ndtri(0.5 * np.exp(-600.0)))
    return np.asarray(
        np.sign(t) * np.where(size <= 600.0, moderate, np.sqrt(anchor**2 + 2.0 * np.maximum(size - 600.0, 0.0)))
    )
