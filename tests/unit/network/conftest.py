"""Small real panels and networks for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.contracts.tensors import DataSpec
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import ForecastNetwork, NetworkConfig, build_network


def make_frame(num_rows: int = 300, *, scale: float = 1.0, shift: float = 0.0) -> SeriesFrame:
    """Two series of two seasonal variates with gaps."""
    rng = np.random.default_rng(0)
    tables = []
    for index, name in enumerate(("north", "south")):
        steps = np.arange(num_rows)
        season = np.sin(2 * np.pi * steps / 12 + index)
        columns = {
            "load": (10 + 3 * season + rng.normal(size=num_rows) * 0.3) * scale + shift,
            "temp": (-5 + 2 * np.roll(season, 3) + rng.normal(size=num_rows) * 0.2) * scale + shift,
        }
        columns = {key: np.where(rng.random(num_rows) < 0.05, np.nan, value) for key, value in columns.items()}
        time = [datetime(2024, 1, 1) + timedelta(hours=int(step)) for step in steps]
        tables.append(pl.DataFrame({"store": [name] * num_rows, "when": time, **columns}))
    table = pl.concat(tables).with_columns(pl.col("load", "temp").fill_nan(None))
    return SeriesFrame.from_long(table, series_id="store", time="when", targets=["load", "temp"], freq="1h")


@pytest.fixture(scope="session")
def frame() -> SeriesFrame:
    return make_frame()


@pytest.fixture(scope="session")
def panel(frame: SeriesFrame) -> Panel:
    return Panel.from_frame(frame)


@pytest.fixture(scope="session")
def window() -> WindowSpec:
    return WindowSpec(context_length=24, horizon=6)


@pytest.fixture(scope="session")
def windows(panel: Panel, window: WindowSpec) -> WindowDataset:
    return WindowDataset(panel, window, None, 200)


@pytest.fixture(scope="session")
def make_network(panel: Panel) -> Callable[..., ForecastNetwork]:
    """Return a function that builds a network with a fitted scaler."""

    def build(seed: int = 0, *, fit: bool = True, data: Panel | None = None, **config: Any) -> ForecastNetwork:
        settings = NetworkConfig.model_validate({"model": "dlinear", **config})
        network = build_network(settings, DataSpec(context_length=24, horizon=6, num_variates=2), seed=seed)
        if fit:
            network.fit_scaler((data or panel).training_series(None, 200))
        return network.eval()

    return build
