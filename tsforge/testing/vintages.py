"""Made-up publications: revised targets, late covariates, forecasts of a covariate that improve as the hour nears."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl

START = datetime(2024, 1, 1, tzinfo=UTC)
KEYS = ["series_id", "time", "published"]


def revised_table(
    num_rows: int = 240,
    num_series: int = 2,
    *,
    seed: int = 0,
    issue_every: int = 6,
    lead: int = 24,
    late: int = 2,
    error: float = 0.15,
    revision: float = 0.5,
) -> pl.DataFrame:
    """Return hourly publications ``series_id, time, published, load, flow, wind``.

    Args:
        num_rows, num_series: size.
        seed: of everything.
        issue_every, lead: ``wind`` (a known covariate) is forecast every so many hours for so many hours ahead.
        error: of these forecasts an hour ahead; it grows with the root of the distance.
        revision: by which the first release of ``load`` is too high, in the mean.
        late: hours after which ``flow`` (a covariate of the past) is published.

    ``load`` (the target) follows ``wind``; its first release, at its own time, is revised a day later.
    """
    rng = np.random.default_rng(seed)
    hours = np.arange(num_rows)
    parts = []
    for number in range(num_series):
        wind = np.cumsum(rng.normal(0, 0.5, num_rows + lead)) * 0.3 + rng.normal(0, 1, num_rows + lead)
        flow = rng.normal(0, 1, num_rows)
        wave = np.sin(2 * np.pi * hours / 24)
        load = 10 * (number + 1) + 2 * wave + 1.5 * wind[:num_rows] + 0.3 * np.roll(flow, late + 1)
        load += rng.normal(0, 0.1, num_rows)
        first = load + revision * (1 + rng.normal(0, 0.4, num_rows))
        parts.append(_rows(number, hours, hours, load=first))
        parts.append(_rows(number, hours, hours + 24, load=load))
        parts.append(_rows(number, hours, hours + late, flow=flow))
        for issued in range(-lead, num_rows, issue_every):
            ahead = np.arange(max(issued, 0), min(issued + lead + issue_every, num_rows + lead))
            missed = rng.normal(0, error, len(ahead)) * np.sqrt(np.maximum(ahead - issued, 0))
            parts.append(_rows(number, ahead, np.full(len(ahead), issued), wind=wind[ahead] + missed))
    table = pl.concat(parts, how="diagonal").group_by(KEYS).agg(pl.col("load", "flow", "wind").max())
    return table.sort(KEYS)


def _rows(number: int, time: np.ndarray, published: np.ndarray, **values: np.ndarray) -> pl.DataFrame:
    start = pl.lit(START).cast(pl.Datetime("us", "UTC"))
    table = pl.DataFrame({"time": time, "published": published, **values}).with_columns(
        (start + pl.duration(hours=pl.col(name))).alias(name) for name in ("time", "published")
    )
    return table.select(pl.lit(f"s{number}").alias("series_id"), pl.all())
