"""Model health: how often a detector alarms beside how often it should on normal data (a calibration goes stale).

The rate counts the last 7 days or 5,000 rows, whichever is less. More than five times the nominal rate, on at least ten
alarm rows, is a notice about the model rather than so many alarms about the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.contracts.tables import JOINT

HEALTH_DAYS = 7
HEALTH_ROWS = 5_000
HEALTH_RATIO = 5.0
HEALTH_MIN_ALARMS = 10  # fewer alarm rows say nothing about a rate
MICROSECONDS_PER_DAY = 86_400_000_000


def health_window(per_day: float | None) -> int:
    """Return the rows that count, given the rows a day (None where time is a plain number)."""
    return HEALTH_ROWS if per_day is None else max(1, min(HEALTH_ROWS, round(HEALTH_DAYS * per_day)))


def is_stale(alarms: int, rows: int, nominal: float | None) -> bool:
    """Return whether so many alarm rows among the scored ones call the calibration into question."""
    return bool(nominal and rows and alarms >= HEALTH_MIN_ALARMS and alarms / rows > HEALTH_RATIO * nominal)


def alarm_health(
    alarm: NDArray[np.bool_], scored: NDArray[np.bool_], nominal: float | None, per_day: float | None
) -> dict[str, Any]:
    """Return ``alarm_rate_observed`` of the recent rows, its ``alarm_rate_ratio`` to the nominal one, ``is_stale``.

    Args:
        alarm, scored: [N] of the rows of a series; rows without a score count for nothing.
        nominal: alarm rate that the rule aims at, None for a fixed level, which aims at none.
        per_day: rows a day.
    """
    recent = health_window(per_day)
    alarms, rows = int(alarm[-recent:].sum()), int(scored[-recent:].sum())
    rate = alarms / rows if rows else None
    ratio = None if rate is None or not nominal else rate / nominal
    return {"alarm_rate_observed": rate, "alarm_rate_ratio": ratio, "is_stale": is_stale(alarms, rows, nominal)}


def health_history(scores: pl.DataFrame, nominal: float | None, *, points: int = 200) -> pl.DataFrame:
    """Return the alarm rate of each series as it stood at up to ``points`` times, the last scored row among them.

    Args:
        scores: a table of scores; its joint rows count.
        nominal: alarm rate that the rule aims at, None if it aims at none.

    Returns:
        ``series_id, time, alarms, rows, rate, ratio, is_stale``, in order of series and time; ``alarms`` and ``rows``
        are those of the window that ends there.
    """
    joint = scores.filter(pl.col("variate") == JOINT).sort("series_id", "time")
    window = health_window(_rows_a_day(joint))
    counted = joint.select(
        "series_id",
        "time",
        alarms=(pl.col("alarm") & pl.col("score").is_not_null()).fill_null(False).cast(pl.Int64),
        rows=pl.col("score").is_not_null().cast(pl.Int64),
    ).with_columns(pl.col("alarms", "rows").rolling_sum(window, min_samples=1).over("series_id"))
    left = pl.len().over("series_id") - 1 - pl.int_range(pl.len()).over("series_id")
    stride = (pl.len().over("series_id") - 1) // points + 1
    rate = pl.when(pl.col("rows") > 0).then(pl.col("alarms") / pl.col("rows"))
    ratio = pl.lit(None, dtype=pl.Float64) if not nominal else pl.col("rate") / nominal
    stale = (pl.col("ratio") > HEALTH_RATIO) & (pl.col("alarms") >= HEALTH_MIN_ALARMS)
    return (
        counted.filter(left % stride == 0)
        .with_columns(rate=rate)
        .with_columns(ratio=ratio)
        .with_columns(is_stale=stale.fill_null(False))
    )


def _rows_a_day(joint: pl.DataFrame) -> float | None:
    """Return the rows a day of a regular grid, from its shortest step; None where time is a plain number."""
    if not isinstance(joint.schema["time"], pl.Datetime):
        return None
    step = joint.select(pl.col("time").diff().over("series_id")).to_series().min()
    return None if step is None else MICROSECONDS_PER_DAY / (step.total_seconds() * 1e6)  # type: ignore[union-attr]
