"""A covariate that was not observed counts as its training mean, never as a raw zero."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from tsforge.contracts.tensors import DataSpec
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import ForecastNetwork, NetworkConfig


def test_missing_pressure_is_not_zero_pressure() -> None:
    rng = np.random.default_rng(0)
    pressure = (1013.0 + rng.normal(size=200)).tolist()
    pressure[150] = None  # type: ignore[call-overload]
    table = pl.DataFrame({"time": range(200), "y": rng.normal(size=200), "pressure": pressure})
    frame = SeriesFrame.from_wide(table, time="time", targets=["y"], past=["pressure"], freq="1i")
    panel = Panel.from_frame(frame)
    spec = DataSpec(context_length=8, horizon=2, num_variates=1, num_past=1)
    network = ForecastNetwork(NetworkConfig.model_validate({"model": {"name": "ar_net", "lags": 4}}), spec)
    series = panel.training_series(None, 180)
    network.fit_scaler(series)
    assert abs(float(network.scaler.past_loc[0]) - 1013.0) < 0.5
    windows = WindowDataset(panel, WindowSpec(context_length=8, horizon=2), 152, 154)
    batch = windows.__getitems__([0])
    assert batch.past is not None
    assert torch.isnan(batch.past[0, 6, 0])
    scaled = network.scaler.scale(batch).past
    assert scaled is not None
    assert float(scaled[0, 6, 0]) == 0.0
    assert float(scaled.abs().max()) < 6.0
