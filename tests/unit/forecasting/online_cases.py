"""Forecasts and times that several tests of online intervals share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

START = datetime(2024, 1, 1, tzinfo=UTC)


def times(rows: Sequence[int] | np.ndarray) -> pl.Series:
    return pl.Series([START + timedelta(hours=int(row)) for row in rows], dtype=pl.Datetime("us", "UTC"))


def forecasts(
    values: np.ndarray, horizon: int, stride: int = 1, *, series: str = "a", coverage: float = 0.8, half: float = 1.0
) -> pl.DataFrame:
    """Intervals [-half, half] around 0 from every ``stride``-th row; values [T], NaN = not observed."""
    cutoffs = np.arange(0, len(values) - horizon, stride)
    cutoff, step = np.repeat(cutoffs, horizon), np.tile(np.arange(1, horizon + 1), len(cutoffs))
    low, high = round(0.5 - coverage / 2, 9), round(0.5 + coverage / 2, 9)
    return pl.DataFrame(
        {
            "series_id": [series] * len(step),
            "cutoff": times(cutoff),
            "step": step.astype(np.int32),
            "time": times(cutoff + step),
            "variate": ["y"] * len(step),
            "mean": np.zeros(len(step)),
            f"q{low:g}": np.full(len(step), -half),
            f"q{high:g}": np.full(len(step), half),
            "actual": pl.Series(values[cutoff + step]).fill_nan(None),
        }
    )
