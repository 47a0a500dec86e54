"""Errors of point forecasts, cell by cell, and means over any axes with the number of cells behind each.

Everything is float64. A cell is scored when its target is observed; a forecast that is missing there is not skipped, it
makes the mean NaN: leaving such cells out would flatter whoever did not forecast them.

Legend: target, forecast and mask have one shape, usually [..., H, V]; means lack the axes they were taken over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
Axis = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Score:
    """A mean and the number of cells it was taken over; NaN where that number is 0."""

    value: FloatArray
    count: NDArray[np.int64]


def squared_error(target: ArrayLike, forecast: ArrayLike) -> FloatArray:
    """Return (target - forecast)^2 of every cell."""
    return np.square(_float(target) - _float(forecast))


def absolute_error(target: ArrayLike, forecast: ArrayLike) -> FloatArray:
    """Return |target - forecast| of every cell."""
    return np.abs(_float(target) - _float(forecast))


def symmetric_percentage_error(target: ArrayLike, forecast: ArrayLike) -> FloatArray:
    """Return 200 |y - f| / (|y| + |f|) of every cell, in percent from 0 to 200; 0 where both are 0.

    Source: Makridakis, Spiliotis, Assimakopoulos (2020), The M4 Competition, Eq. (sMAPE).
    """
    y, f = _float(target), _float(forecast)
    size = np.abs(y) + np.abs(f)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size == 0.0, 0.0, 200.0 * np.abs(y - f) / size)


def scored_cells(target: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Return which cells count: the target is a number and, where a mask is given, marked as observed.

    Raises:
        DataError: the mask has another shape, or a cell marked as observed is infinite.
    """
    y = _float(target)
    present = ~np.isnan(y)
    if mask is not None:
        observed = np.asarray(mask, dtype=bool)
        if observed.shape != y.shape:
            raise DataError(f"the mask has shape {observed.shape}, the target {y.shape}; they must be equal")
        present &= observed
    infinite = int(np.isinf(y[present]).sum())
    if infinite:
        raise DataError(f"{infinite} of {int(present.sum())} observed targets are infinite; mark them as missing")
    return present


def mean_over(cells: ArrayLike, scored: ArrayLike, axis: Axis = None) -> Score:
    """Return the mean of ``cells`` over ``axis`` (None = all), counting only scored cells.

    Shapes:
        cells [..., H, V] or any other shape, scored the same; the result lacks the axes that were averaged.
    """
    values, keep = np.asarray(cells, dtype=np.float64), np.asarray(scored, dtype=bool)
    count = np.asarray(keep.sum(axis=axis), dtype=np.int64)
    total = np.where(keep, values, 0.0).sum(axis=axis)
    return Score(_ratio(total, count), count)


def mse(target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None) -> Score:
    """Return the mean squared error over ``axis``.

    Raises:
        DataError: see ``scored_cells``.
    """
    return mean_over(squared_error(target, forecast), scored_cells(target, mask), axis)


def mae(target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None) -> Score:
    """Return the mean absolute error over ``axis``.

    Raises:
        DataError: see ``scored_cells``.
    """
    return mean_over(absolute_error(target, forecast), scored_cells(target, mask), axis)


def rmse(target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None) -> Score:
    """Return the root of the mean squared error over ``axis`` (the root is taken last).

    Raises:
        DataError: see ``scored_cells``.
    """
    score = mse(target, forecast, mask, axis)
    return Score(np.sqrt(score.value), score.count)


def msle(target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None) -> Score:
    """Return the mean squared error of log(1 + y); a forecast below 0 counts as 0 here.

    Raises:
        DataError: a scored target is below 0, so it has no such logarithm; see ``scored_cells``.
    """
    scored = scored_cells(target, mask)
    below = int((scored & (_float(target) < 0)).sum())
    if below:
        raise DataError(f"{below} scored targets are below 0; the squared logarithmic error is for counts and sizes")
    y, guess = (np.log1p(np.maximum(_float(values), 0.0)) for values in (target, forecast))
    return mean_over(squared_error(y, guess), scored, axis)


def smape(target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None) -> Score:
    """Return the symmetric mean absolute percentage error over ``axis``, in percent from 0 to 200.

    Raises:
        DataError: see ``scored_cells``.
    """
    return mean_over(symmetric_percentage_error(target, forecast), scored_cells(target, mask), axis)


def seasonal_scale(values: ArrayLike, season_length: int, mask: ArrayLike | None = None) -> Score:
    """Return the mean |y[t] - y[t - season_length]| of a training span, the unit of MASE and MSIS.

    Shapes:
        values [N, V], mask [N, V] -> value [V], count [V] of pairs with both ends observed.
    Units:
        data units. NaN where the span has no such pair or never changes: no unit exists, so MASE is undefined there.
    Raises:
        DataError: season_length is below 1.
    Source: Hyndman and Koehler (2006), Int. J. Forecasting 22:679-688, Eq. (MASE), seasonal form of M4.
    """
    if season_length < 1:
        raise DataError(f"season_length is {season_length}; it must be at least 1")
    y = _float(values)
    keep = scored_cells(y, mask)
    step = np.abs(y[season_length:] - y[:-season_length])
    score = mean_over(step, keep[season_length:] & keep[:-season_length], axis=0)
    return Score(np.where(score.value > 0.0, score.value, np.nan), score.count)


def mase(
    target: ArrayLike, forecast: ArrayLike, scale: ArrayLike, mask: ArrayLike | None = None, axis: Axis = None
) -> Score:
    """Return the mean absolute scaled error over ``axis``; cells whose scale is undefined are left out of the count.

    Shapes:
        target, forecast [..., H, V]; scale broadcasts to them, usually [V] or [N, 1, V] (see ``seasonal_scale``).
    """
    return mean_scaled(absolute_error(target, forecast), scale, scored_cells(target, mask), axis)


def mean_scaled(cells: ArrayLike, scale: ArrayLike, scored: ArrayLike, axis: Axis = None) -> Score:
    """Return the mean of ``cells / scale`` over ``axis``, without the cells whose scale is zero or undefined."""
    values, unit = np.broadcast_arrays(_float(cells), _float(scale))
    usable = np.isfinite(unit) & (unit > 0.0)
    return mean_over(values / np.where(usable, unit, 1.0), np.asarray(scored, dtype=bool) & usable, axis)


class ErrorSums:
    """Running sums of squared and absolute errors per step and variate, for test spans too large to hold.

    Shapes:
        sums [H, V]; ``add`` takes [B, H, V].
    """

    def __init__(self, horizon: int, num_variates: int) -> None:
        self.squared = np.zeros((horizon, num_variates))
        self.absolute = np.zeros((horizon, num_variates))
        self.count = np.zeros((horizon, num_variates), dtype=np.int64)
        self.windows = 0

    def add(self, target: ArrayLike, forecast: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Add one batch of windows."""
        scored = scored_cells(target, mask)
        error = np.where(scored, _float(target) - _float(forecast), 0.0)
        self.add_sums(np.square(error).sum(axis=0), np.abs(error).sum(axis=0), scored.sum(axis=0), len(error))

    def add_sums(self, squared: ArrayLike, absolute: ArrayLike, count: ArrayLike, windows: int) -> None:
        """Add sums [H, V] over ``windows`` windows that were taken elsewhere, for example on a device."""
        self.squared += _float(squared)
        self.absolute += _float(absolute)
        self.count += np.asarray(count, dtype=np.int64)
        self.windows += windows

    def mse(self, axis: Axis = None) -> Score:
        """Return the mean squared error over ``axis`` of [H, V]."""
        count = np.asarray(self.count.sum(axis=axis))
        return Score(_ratio(self.squared.sum(axis=axis), count), count)

    def mae(self, axis: Axis = None) -> Score:
        """Return the mean absolute error over ``axis`` of [H, V]."""
        count = np.asarray(self.count.sum(axis=axis))
        return Score(_ratio(self.absolute.sum(axis=axis), count), count)


def _float(values: ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def _ratio(total: Any, count: Any) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(np.asarray(count) > 0, np.asarray(total) / count, np.nan), dtype=np.float64)
