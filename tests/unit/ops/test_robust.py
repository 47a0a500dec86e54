"""Reweighted least squares against statsmodels and scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.linear_model import QuantileRegressor
from torch import Tensor

from tsforge.ops.robust import RobustLoss, reweighted_least_squares


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.7 + rng.standard_t(2, size=600)
    return x, y


def fit(x: np.ndarray, y: np.ndarray, loss: RobustLoss) -> tuple[np.ndarray, float]:
    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(x), 250):
            yield torch.from_numpy(x[start : start + 250]), torch.from_numpy(y[start : start + 250, None])

    start = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    weight, bias, _ = reweighted_least_squares(chunks, *start, loss, max_iterations=400)
    return weight[0].numpy(), float(bias[0])


def test_huber_satisfies_its_estimating_equation() -> None:
    x, y = data()
    weight, bias = fit(x, y, RobustLoss(kind="huber"))
    residual = y - x @ weight - bias
    scale = 1.4826 * np.median(np.abs(residual))
    clipped = np.clip(residual, -1.345 * scale, 1.345 * scale)
    assert np.abs(x.T @ clipped / len(x)).max() < 1e-3 * scale
    ordinary = np.linalg.lstsq(np.column_stack([x, np.ones(600)]), y, rcond=None)[0][:3]
    truth = np.array([1.0, -2.0, 0.5])
    assert np.abs(weight - truth).sum() < np.abs(ordinary - truth).sum()


def test_quantile_equals_the_linear_programme() -> None:
    x, y = data()
    for level in (0.5, 0.9):
        weight, bias = fit(x, y, RobustLoss(kind="quantile", level=level))
        exact = QuantileRegressor(quantile=level, alpha=0.0, solver="highs").fit(x, y)
        pinball = [
            np.where(r >= 0, level * r, (level - 1) * r).mean() for r in (y - x @ weight - bias, y - exact.predict(x))
        ]
        assert pinball[0] <= pinball[1] * 1.002
