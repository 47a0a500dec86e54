"""Scores by hour of the week or operating mode, brought to one scale before they are smoothed, calibrated and judged.

What is usual on Monday at 8 is not what is usual on Sunday at 3. Each bucket of rows has its own calibration scores; a
score is replaced by the pooled score of the same rank,

    s' = P^-1(F_b(s)),   F_b of the bucket's scores, P of all of them,

both piecewise linear between order statistics. Beyond the largest score of the bucket s' goes on in proportion to how
far each reaches above its median, so that extremes keep their order. One p-value and one threshold then serve all rows.

Only a bucket of at least ``10 / alpha`` calibration scores is treated by itself: a smaller one knows nothing of its
own level of alpha. Its rows are judged by the pooled scores, as they are, and a notice says so.

Source: own construction (quantile normalisation); the bound on bucket sizes keeps ten alarms a bucket in expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError, DataError, nearest
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel

FloatArray = NDArray[np.float64]
HOUR_OF_WEEK = "hour_of_week"
ALARMS_A_BUCKET = 10.0
_REACH = 0.9  # quantile whose height above the median says how scores spread, for those beyond the sample


@dataclass(frozen=True)
class BucketScale:
    """Calibration scores, sorted: of all rows, and of each bucket that has enough of its own.

    Attributes:
        pooled: [N]. samples: bucket -> [N_b]. small: buckets, and rows in them, that are judged by the pooled scores.
    """

    pooled: FloatArray
    samples: dict[float, FloatArray]
    small: tuple[int, int] = (0, 0)

    def apply(self, scores: ArrayLike, buckets: ArrayLike) -> FloatArray:
        """Return scores [M] on the pooled scale; rows of unknown (NaN) or small buckets and NaN scores stay."""
        s, bucket = np.array(scores, dtype=np.float64), np.asarray(buckets, dtype=np.float64)
        for name in np.unique(bucket[~np.isnan(bucket)]).tolist():
            if name in self.samples:
                rows = (bucket == name) & ~np.isnan(s)
                s[rows] = _mapped(s[rows], self.samples[name], self.pooled)
        return s


def _places(size: int) -> FloatArray:
    return (np.arange(size) + 0.5) / size


def _mapped(s: FloatArray, sample: FloatArray, pooled: FloatArray) -> FloatArray:
    own, of_all = _places(sample.size), _places(pooled.size)
    inside = np.interp(np.interp(s, sample, own), of_all, pooled)
    top, bottom = np.interp(own[[-1, 0]], of_all, pooled)
    spreads = [float(np.subtract(*np.quantile(each, (_REACH, 0.5)))) for each in (pooled, sample)]
    ratio = spreads[0] / spreads[1] if min(spreads) > 0.0 else 1.0
    above = top + (s - sample[-1]) * ratio
    below = bottom + (s - sample[0]) * ratio
    return np.asarray(np.where(s > sample[-1], above, np.where(s < sample[0], below, inside)))


def fit_buckets(scores: ArrayLike, buckets: ArrayLike, alpha: float) -> BucketScale:
    """Return the scale of calibration scores [N] of rows whose buckets [N] are given; NaN scores are left out.

    Args:
        scores: of normal rows.
        buckets: a number a row, NaN where unknown.
        alpha: share of rows that may alarm.

    Raises:
        DataError: no score is a number.
    """
    s, bucket = np.asarray(scores, dtype=np.float64), np.asarray(buckets, dtype=np.float64)
    seen = ~np.isnan(s)
    if not seen.any():
        raise DataError("no calibration score is a number; calibrate on rows whose forecasts and values exist")
    needed = smallest_bucket(alpha)
    samples, small = {}, (0, 0)
    for name in np.unique(bucket[seen & ~np.isnan(bucket)]).tolist():
        own = s[seen & (bucket == name)]
        if own.size >= needed:
            samples[name] = np.sort(own)
        else:
            small = (small[0] + 1, small[1] + int(own.size))
    return BucketScale(pooled=np.sort(s[seen]), samples=samples, small=small)


def smallest_bucket(alpha: float) -> int:
    """Return ``10 / alpha``, the fewest calibration scores of a bucket of its own."""
    return math.ceil(ALARMS_A_BUCKET / alpha)


def bucket_notice(by: str, scales: dict[str, BucketScale], alpha: float) -> list[str]:
    """Return a notice on buckets that were too small, empty when none was.

    Args:
        by: ``calibration.by``.
        scales: series -> its scale.
        alpha: share of rows that may alarm.
    """
    short = {name: scale for name, scale in scales.items() if scale.small[0]}
    if not short:
        return []
    buckets, rows = (sum(scale.small[k] for scale in short.values()) for k in (0, 1))
    total = buckets + sum(len(scale.samples) for scale in short.values())
    return [
        f"calibration.by={by}: {buckets} of {total} buckets ({rows} rows, {len(short)} of {len(scales)} series) hold "
        f"fewer than the {smallest_bucket(alpha)} calibration scores that a rate of {alpha:.2g} needs; their rows are "
        "judged by all scores together"
    ]


def row_buckets(by: str, panel: Panel, series_ids: tuple[str, ...], start: int, stop: int) -> FloatArray:
    """Return the bucket [S, T] of absolute rows [start, stop) of each series; NaN where the mode was not observed.

    Args:
        by: ``hour_of_week``, or the name of a target or covariate whose value is the operating mode.
        panel: the judged values.
        series_ids: which series, in order.
        start, stop: absolute rows.

    Raises:
        ConfigError: hours of a time that is a plain number, or no such column.
    """
    if by == HOUR_OF_WEEK:
        hours = hour_of_week(panel.grid, start, stop)
        return np.broadcast_to(hours, (len(series_ids), stop - start)).copy()
    columns = panel.schema.columns
    if by not in columns:
        raise ConfigError(
            f"calibration.by: '{by}' is neither {HOUR_OF_WEEK} nor a column of the artifact{nearest(by, columns)} "
            f"(columns: {', '.join(columns)})"
        )
    rows, indptr, offset = panel.rows(start, stop)
    place = columns.index(by)
    series = np.repeat(np.arange(panel.num_series), np.diff(indptr))
    found = np.full((panel.num_series, stop - start), np.nan)
    found[series, offset[series] - start + np.arange(len(rows)) - indptr[series]] = np.where(
        panel.observed[rows, place], panel.values[rows, place], np.nan
    )
    number = {name: index for index, name in enumerate(panel.series_ids)}
    return found[[number[name] for name in series_ids]]


def hour_of_week(grid: TimeGrid, start: int, stop: int) -> FloatArray:
    """Return hours since Monday 0:00 [T], 0 to 167, of absolute rows [start, stop).

    Raises:
        ConfigError: time is a plain number.
    """
    if grid.is_integer:
        raise ConfigError(f"calibration.by: {HOUR_OF_WEEK} needs a clock, here time is a plain number")
    times = pl.Series(grid.time_at(np.arange(start, stop)))
    return ((times.dt.weekday().cast(pl.Int64) - 1) * 24 + times.dt.hour().cast(pl.Int64)).to_numpy().astype(np.float64)
