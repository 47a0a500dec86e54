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
MORE = [
    ("ETTh1", "linear", 720, 192, {**NORMALISED, "ridge": 5e4}, 0.400, 0.418),
    ("ETTh1", "linear", 720, 336, {**NORMALISED, "ridge": 5e4}, 0.424, 0.434),
    ("ETTh1", "linear", 720, 720, {**NORMALISED, "ridge": 5e4}, 0.430, 0.458),
    ("ETTh2", "linear", 720, 96, {**NORMALISED, "ridge": 5e4}, 0.271, 0.335),
    ("ETTh2", "linear", 720, 192, {**NORMALISED, "ridge": 5e4}, 0.331, 0.373),
    ("ETTh2", "linear", 720, 336, {**NORMALISED, "ridge": 5e4}, 0.352, 0.394),
    ("ETTh2", "linear", 720, 720, {**NORMALISED, "ridge": 5e4}, 0.379, 0.423),
    ("ETTh1", "linear", 336, 720, {**NORMALISED, "ridge": 0.0}, 0.442, 0.457),
    ("ETTh2", "linear", 336, 720, OLS, 0.741, 0.612),
    ("ETTh1", "seasonal_naive", 168, 720, {"season_length": 168}, 0.658, 0.521),
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
