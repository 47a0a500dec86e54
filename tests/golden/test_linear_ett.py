"""Closed-form linear and naive forecasts on ETT: the long-horizon protocol, every test window, standardised units.

Source: the project's own table of baselines (mean squared and absolute errors to three decimals, measured with an
independent implementation on explicit windows). Tolerance 0.001, the rounding of the table plus one digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tsforge.contracts.model import ForecastModel
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.models.registry import MODELS

TRAIN, VALID, TEST = 8640, 2880, 2880


def standardised(folder: Path, name: str) -> torch.Tensor:
    values = pl.read_parquet(folder / "forecast" / f"{name}.parquet").drop("ds").to_numpy().astype("float64")
    return torch.from_numpy((values - values[:TRAIN].mean(0)) / values[:TRAIN].std(0))


def errors(values: torch.Tensor, name: str, length: int, horizon: int, **settings: Any) -> tuple[float, float]:
    spec = DataSpec(context_length=length, horizon=horizon, num_variates=values.shape[1])
    model: ForecastModel[Any] = MODELS.get(name)(MODELS.get(name).config_class(name=name, **settings), spec)
    train = values[:TRAIN]
    model.solve(
        TrainingSeries(train, torch.ones_like(train, dtype=torch.bool), torch.tensor([0, TRAIN]), torch.tensor([0]))
    )
    test = values[TRAIN + VALID - length : TRAIN + VALID + TEST].float()
    windows = test.unfold(0, length + horizon, 1).transpose(1, 2)
    assert len(windows) == TEST - horizon + 1
    squared, absolute = 0.0, 0.0
    with torch.no_grad():
        for part in windows.split(256):
            batch = Batch(part[:, :length], torch.ones_like(part[:, :length], dtype=torch.bool))
            error = (model(batch).raw[..., 0] - part[:, length:]).double()
            squared += float(error.square().sum())
            absolute += float(error.abs().sum())
    count = len(windows) * horizon * values.shape[1]
    return squared / count, absolute / count


OLS = {"remove": "none", "offset": "constant", "ridge": 0.0}
NORMALISED = {"remove": "window_mean", "offset": "window_scale"}

CASES = [
    ("ETTh1", "linear", 336, 96, OLS, 0.370, 0.392),
    ("ETTh2", "linear", 336, 96, OLS, 0.302, 0.365),
    ("ETTh1", "linear", 336, 96, {**NORMALISED, "ridge": 0.0}, 0.371, 0.392),
    ("ETTh2", "linear", 336, 96, {**NORMALISED, "ridge": 0.0}, 0.273, 0.335),
    ("ETTh1", "linear", 720, 96, {**NORMALISED, "ridge": 5e4}, 0.366, 0.398),
    ("ETTh1", "last_value", 96, 96, {}, 1.294, 0.713),
    ("ETTh1", "seasonal_naive", 336, 96, {"season_length": 24}, 0.512, 0.433),
    ("ETTh2", "seasonal_naive", 336, 96, {"season_length": 168}, 0.582, 0.485),
]
TABLE = [  # data, method, look-back, then (MSE, MAE) of horizons 96, 192, 336, 720
    ("ETTh1", "last_value", 96, (1.294, 0.713), (1.325, 0.733), (1.330, 0.746), (1.335, 0.755)),
    ("ETTh1", "seasonal_24", 336, (0.512, 0.433), (0.581, 0.469), (0.650, 0.501), (0.655, 0.514)),
    ("ETTh1", "seasonal_168", 336, (0.657, 0.509), (0.662, 0.513), (0.683, 0.520), (0.658, 0.521)),
    ("ETTh1", "ols", 96, (0.381, 0.393), (0.432, 0.424), (0.475, 0.451), (0.500, 0.497)),
    ("ETTh1", "ols_in", 96, (0.384, 0.392), (0.436, 0.422), (0.479, 0.444), (0.480, 0.469)),
    ("ETTh1", "ols", 336, (0.370, 0.392), (0.404, 0.413), (0.433, 0.434), (0.471, 0.488)),
    ("ETTh1", "ols_in", 336, (0.371, 0.392), (0.405, 0.412), (0.431, 0.429), (0.442, 0.457)),
    ("ETTh1", "ols", 720, (0.376, 0.399), (0.413, 0.422), (0.448, 0.448), (0.492, 0.505)),
    ("ETTh1", "ols_in", 720, (0.376, 0.399), (0.413, 0.422), (0.446, 0.442), (0.464, 0.475)),
    ("ETTh1", "ridge_in", 720, (0.366, 0.398), (0.400, 0.418), (0.424, 0.434), (0.430, 0.458)),
    ("ETTh2", "last_value", 96, (0.432, 0.422), (0.534, 0.473), (0.597, 0.511), (0.594, 0.519)),
    ("ETTh2", "seasonal_24", 336, (0.391, 0.380), (0.482, 0.429), (0.532, 0.466), (0.525, 0.474)),
    ("ETTh2", "seasonal_168", 336, (0.582, 0.485), (0.579, 0.487), (0.567, 0.491), (0.554, 0.491)),
    ("ETTh2", "ols", 96, (0.341, 0.393), (0.469, 0.470), (0.585, 0.535), (0.810, 0.648)),
    ("ETTh2", "ols_in", 96, (0.289, 0.337), (0.374, 0.389), (0.414, 0.425), (0.420, 0.439)),
    ("ETTh2", "ols", 336, (0.302, 0.365), (0.397, 0.428), (0.486, 0.484), (0.741, 0.612)),
    ("ETTh2", "ols_in", 336, (0.273, 0.335), (0.334, 0.377), (0.358, 0.400), (0.390, 0.429)),
    ("ETTh2", "ols", 720, (0.309, 0.373), (0.423, 0.444), (0.539, 0.512), (0.900, 0.672)),
    ("ETTh2", "ols_in", 720, (0.270, 0.335), (0.331, 0.375), (0.354, 0.398), (0.382, 0.428)),
    ("ETTh2", "ridge_in", 720, (0.271, 0.335), (0.331, 0.373), (0.352, 0.394), (0.379, 0.423)),
]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "last_value": ("last_value", {}),
    "seasonal_24": ("seasonal_naive", {"season_length": 24}),
    "seasonal_168": ("seasonal_naive", {"season_length": 168}),
    "ols": ("linear", OLS),
    "ols_in": ("linear", {**NORMALISED, "ridge": 0.0}),
    "ridge_in": ("linear", {**NORMALISED, "ridge": 5e4}),
}
HORIZONS = (96, 192, 336, 720)
MORE = [
    (data, METHODS[method][0], length, horizon, METHODS[method][1], *found)
    for data, method, length, *cells in TABLE
    for horizon, found in zip(HORIZONS, cells, strict=True)
]


@pytest.mark.parametrize(("data", "name", "length", "horizon", "settings", "mse", "mae"), CASES)
def test_table_of_baselines(
    shared_data: Path, data: str, name: str, length: int, horizon: int, settings: dict[str, Any], mse: float, mae: float
) -> None:
    found = errors(standardised(shared_data, data), name, length, horizon, **settings)
    assert found == pytest.approx((mse, mae), abs=1.0e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "name", "length", "horizon", "settings", "mse", "mae"), MORE)
def test_table_of_baselines_long(
    shared_data: Path, data: str, name: str, length: int, horizon: int, settings: dict[str, Any], mse: float, mae: float
) -> None:
    found = errors(standardised(shared_data, data), name, length, horizon, **settings)
    assert found == pytest.approx((mse, mae), abs=1.0e-3)
