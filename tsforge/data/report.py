"""The data report: what each column of each series is like, before anything is fitted on it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl

from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TIME_DTYPE
from tsforge.data.vintages import KEYS, VintageFrame

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


def vintage_report(vintages: VintageFrame) -> pl.DataFrame:
    """Return one row per column: how often it was published, how late, how much it was revised.

    Columns: ``column, role``; ``values`` (cells with any value) and ``publications`` of them; ``revised`` (cells whose
    value changed after its first publication), ``revised_share`` of all, ``revisions`` (publications that changed a
    value); ``mean_revision`` (mean absolute difference of last and first value, of revised cells); ``mean_delay`` and
    ``median_delay`` of the first publication after its time (negative = ahead; null with integer time) and
    ``last_published``.
    """
    schema = vintages.schema
    roles = {name: role for role in ("past", "known") for name in getattr(schema, role)}
    return pl.concat([_revisions(vintages, name, roles.get(name, "target")) for name in schema.columns])


def _revisions(vintages: VintageFrame, name: str, role: str) -> pl.DataFrame:
    value, delay = pl.col("value"), pl.col("delay")
    given = vintages.table.lazy().select(*KEYS, pl.col(name).alias("value")).drop_nulls("value")
    cells = given.group_by("series_id", "time").agg(
        pl.len().cast(pl.Int64).alias("publications"),
        (value != value.shift()).sum().cast(pl.Int64).alias("changes"),
        (value.last() - value.first()).abs().alias("moved"),
        (pl.col("published").first() - pl.col("time").first()).alias("delay"),
        pl.col("published").max(),
    )
    lateness = pl.lit(None, pl.Duration("us")) if vintages.schema.has_integer_time else None
    return cells.select(
        pl.lit(name).alias("column"),
        pl.lit(role).alias("role"),
        pl.len().cast(pl.Int64).alias("values"),
        pl.col("publications").sum(),
        (pl.col("changes") > 0).sum().cast(pl.Int64).alias("revised"),
        (pl.col("changes") > 0).mean().alias("revised_share"),
        pl.col("changes").sum().alias("revisions"),
        pl.col("moved").filter(pl.col("changes") > 0).mean().alias("mean_revision"),
        (delay.mean() if lateness is None else lateness).alias("mean_delay"),
        (delay.median() if lateness is None else lateness).alias("median_delay"),
        pl.col("published").max().alias("last_published"),
    ).collect()
