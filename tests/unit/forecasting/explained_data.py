"""Frames that the tests of explanations share."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl

from tsforge.data.frame import SeriesFrame

START = datetime(2024, 1, 1)


def hours(count: int) -> datetime:
    """Return the time ``count`` hours after the first row."""
    return START + timedelta(hours=count)


def changed(frame: SeriesFrame, series: str, column: str, first: int, last: int, value: float) -> SeriesFrame:
    """The frame with a column of some rows (hours, inclusive) of a series set to a value."""
    where = (pl.col("series_id") == series) & pl.col("time").is_between(
        pl.lit(hours(first)).dt.replace_time_zone("UTC"), pl.lit(hours(last)).dt.replace_time_zone("UTC")
    )
    table = frame.table.with_columns(pl.when(where).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))
    return SeriesFrame(table, frame.schema, frame.static)


def with_covariates() -> SeriesFrame:
    """One target, a covariate known ahead that it follows, and noise."""
    rng = np.random.default_rng(3)
    count = 420
    known = rng.normal(size=count)
    y = 2.0 * known + rng.normal(0, 0.05, count)
    table = pl.DataFrame(
        {
            "series_id": ["a"] * count,
            "time": [hours(0) + timedelta(hours=h) for h in range(count)],
            "y": np.where(np.arange(count) < 400, y, np.nan),
            "promo": known,
        }
    ).with_columns(pl.col("y").fill_nan(None))
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"], known=["promo"])
