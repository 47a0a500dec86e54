"""The data report: what each column of each series is like, before anything is fitted on it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl

from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TIME_DTYPE

OUTLIER_SIGMAS = 6.0
_NORMAL_FROM_MEDIAN = 1.4826  # standard deviation of a normal variable over its median absolute deviation
_NORMAL_FROM_MEAN = 1.2533  # ... over its mean absolute deviation, sqrt(pi / 2)


def data_report(frame: SeriesFrame, *, max_age: timedelta | None = None, as_of: datetime | None = None) -> pl.DataFrame:
    """Return one row per series and column, in the order of the frame.

    Columns: ``series_id, column, role``; ``rows`` (steps of the series) and ``observed``; ``start, end`` (first and
    last observed time); ``gaps`` and ``longest_gap`` (runs of missing steps between them, and the longest in steps);
    ``null_share`` of all steps; ``constant``; ``outliers`` (values more than 6 robust standard deviations from the
    median); ``min, mean, max``; ``age`` of the last value and ``stale`` (null without ``max_age``).

    Args:
        frame: the series.
        max_age: age from which a column counts as stale.
        as_of: moment the age counts back from, default now; later rows do not make it negative.
    """
    schema = frame.schema
    roles = {name: role for role in ("past", "known") for name in getattr(schema, role)}
    parts = [_one_column(frame, name, roles.get(name, "target")) for name in schema.columns]
    order = {name: place for place, name in enumerate(schema.columns)}
    table = pl.concat(parts).sort("series_id", pl.col("column").replace_strict(order, return_dtype=pl.Int64))
    if frame.schema.has_integer_time:
        return table.with_columns(age=pl.lit(None, pl.Duration("us")), stale=pl.lit(None, pl.Boolean))
    moment = pl.lit(as_of or datetime.now(UTC)).cast(TIME_DTYPE)
    age = pl.max_horizontal(moment - pl.col("end"), pl.lit(timedelta(0)))
    stale = pl.lit(None, pl.Boolean) if max_age is None else (pl.col("end").is_null() | (age > max_age))
    return table.with_columns(age=pl.when(pl.col("end").is_not_null()).then(age), stale=stale)


def _one_column(frame: SeriesFrame, name: str, role: str) -> pl.DataFrame:
    value = pl.col("value")
    center = value.median()
    spread = (value - center).abs()
    sigma = (
        pl.when(spread.median() > 0)
        .then(spread.median() * _NORMAL_FROM_MEDIAN)
        .otherwise(spread.mean() * _NORMAL_FROM_MEAN)  # half of the values or more are equal
    )
    runs = value.is_null().rle()
    inner = runs.slice(1, pl.max_horizontal(runs.len().cast(pl.Int64) - 2, 0))  # not before the first, after the last
    holes = inner.struct.field("len").filter(inner.struct.field("value"))
    seen = pl.col("time").filter(value.is_not_null())
    plain = frame.table.lazy().select("series_id", "time", pl.col(name).alias("value"))
    return (
        plain.group_by("series_id", maintain_order=True)
        .agg(
            pl.lit(name).alias("column"),
            pl.lit(role).alias("role"),
            pl.len().cast(pl.Int64).alias("rows"),
            value.count().cast(pl.Int64).alias("observed"),
            seen.first().alias("start"),
            seen.last().alias("end"),
            holes.len().cast(pl.Int64).alias("gaps"),
            holes.max().fill_null(0).cast(pl.Int64).alias("longest_gap"),
            value.is_null().mean().alias("null_share"),
            (value.drop_nulls().n_unique() == 1).alias("constant"),
            (spread > OUTLIER_SIGMAS * sigma).sum().cast(pl.Int64).alias("outliers"),
            value.min().alias("min"),
            value.mean().alias("mean"),
            value.max().alias("max"),
        )
        .collect()
    )
