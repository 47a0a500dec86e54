"""Small panels and fitted artifacts shared by the forecasting tests."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.baselines import fit_solved
from tsforge.network import NetworkConfig

START = datetime(2024, 1, 1)


@pytest.fixture(scope="session")
def frame() -> SeriesFrame:
    """Three hourly series of two variates, different lengths and levels, a hole in one of them."""
    rng = np.random.default_rng(7)
    parts = []
    for number, (name, first, rows) in enumerate((("a", 0, 400), ("b", 30, 330), ("c", 0, 380))):
        hour = np.arange(first, first + rows)
        y = 10.0 * number + 3.0 * np.sin(2 * np.pi * hour / 24) + rng.normal(0, 0.4, rows)
        z = 0.5 * y + rng.normal(0, 0.2, rows)
        table = pl.DataFrame({"series_id": [name] * rows, "time": [START + timedelta(hours=int(h)) for h in hour]})
        parts.append(table.with_columns(y=pl.Series(y), z=pl.Series(z)))
    table = pl.concat(parts)
    hole = (pl.col("series_id") == "c") & pl.col("time").is_between(
        START + timedelta(hours=200), START + timedelta(hours=210)
    )
    table = table.with_columns(pl.when(~hole).then(pl.col(name)).alias(name) for name in ("y", "z"))
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y", "z"])


def hours(count: int) -> datetime:
    """Return the time ``count`` hours after the first row."""
    return START + timedelta(hours=count)


@pytest.fixture(scope="session")
def make_artifact(frame: SeriesFrame) -> Callable[..., Artifact]:
    """Fit a closed-form model on the first 250 hours."""

    def make(
        model: str | dict[str, Any] = "linear",
        likelihood: str = "point",
        *,
        context_length: int = 48,
        horizon: int = 6,
        scaling: str = "auto",
        data: SeriesFrame | None = None,
    ) -> Artifact:
        settings = {"name": model} if isinstance(model, str) else model
        plain = {"model": settings, "likelihood": {"name": likelihood}, "scaling": {"kind": scaling}}
        window = WindowSpec(context_length=context_length, horizon=horizon)
        source = frame.until(hours(249)) if data is None else data
        return fit_solved(source, validate(NetworkConfig, plain), window)

    return make
