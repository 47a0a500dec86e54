"""A closed-form start is kept unless gradient steps improved on it clearly."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.contracts.tensors import DataSpec
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import TrainResult, evaluate_windows, fit_network
from tsforge.training.warm_start import Comparison, compare

LENGTH, HORIZON = 24, 6
MODEL = {"name": "s4", "d_model": 8, "d_state": 8, "num_layers": 1, "ridge": 100.0, "patch_length": 1}


def panel_of(values: np.ndarray) -> Panel:
    table = pl.DataFrame({"time": np.arange(len(values)), "y": values})
    return Panel.from_frame(SeriesFrame.from_wide(table, time="time", freq="1i"))


def windows(panel: Panel, start: int | None, stop: int | None) -> WindowDataset:
    return WindowDataset(panel, WindowSpec(context_length=LENGTH, horizon=HORIZON), start, stop)


def network_of() -> ForecastNetwork:
    spec = DataSpec(context_length=LENGTH, horizon=HORIZON, num_variates=1)
    return build_network(NetworkConfig.model_validate({"model": MODEL}), spec, seed=1)


def fitted(values: np.ndarray, **settings: object) -> tuple[ForecastNetwork, TrainResult]:
    panel, network = panel_of(values), network_of()
    config = TrainConfig.model_validate(
        {"max_epochs": 4, "batch_size": 32, "learning_rate": 5e-3, "patience": None, "accelerator": "cpu", **settings}
    )
    result = fit_network(
        network,
        windows(panel, None, 400),
        windows(panel, 400, 600),
        config,
        series=panel.training_series(None, 400),
        progress=False,
    )
    return network, result


def logistic(rows: int) -> np.ndarray:
    """A deterministic map whose next value is a parabola of the last: nothing linear forecasts it."""
    values = [0.3]
    for _ in range(rows - 1):
        values.append(3.7 * values[-1] * (1 - values[-1]))
    return np.array(values)


def test_training_that_only_fits_noise_is_taken_back() -> None:
    noise = np.random.default_rng(0).normal(size=600)
    network, result = fitted(noise)
    assert result.best_epoch == -1
    start = network_of()
    panel = panel_of(noise)
    start.fit_scaler(panel.training_series(None, 400))
    start.solve(panel.training_series(None, 400))
    for name, value in start.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    assert result.metrics["valid_mse"] == pytest.approx(1.0, abs=0.3)
    assert len(result.history) == 4


def test_clear_improvements_stay() -> None:
    values = logistic(600)
    network, result = fitted(values, max_epochs=12)
    assert result.best_epoch >= 0
    start, panel = network_of().eval(), panel_of(values)
    start.fit_scaler(panel.training_series(None, 400))
    start.solve(panel.training_series(None, 400))
    linear = evaluate_windows(start, windows(panel, 400, 600), 64)["valid_mse"]
    assert result.metrics["valid_mse"] < 0.9 * linear
    assert bool((network.model.head.weight != 0).any())


def test_margin_zero_takes_any_improvement() -> None:
    """Seed and data are such that the best of the epochs is a hair better than the start, within its error."""
    found = {}
    for margin in (0.0, 1.0):
        best = [fitted(np.random.default_rng(seed).normal(size=600), start_margin=margin)[1] for seed in range(3)]
        found[margin] = [result.best_epoch for result in best]
    assert any(epoch >= 0 for epoch in found[0.0])
    assert sum(epoch >= 0 for epoch in found[1.0]) < sum(epoch >= 0 for epoch in found[0.0])


def test_comparison_is_the_mean_over_blocks_of_one_horizon() -> None:
    panel = panel_of(logistic(200))
    network = network_of().eval()
    series = panel.training_series(None, 120)
    network.fit_scaler(series)
    network.solve(series)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        network.model.head.bias.add_(0.3)
    after = {name: value.clone() for name, value in network.state_dict().items()}
    valid = windows(panel, 120, 200)
    result = compare(network, before, valid, 16)
    assert all(torch.equal(value, after[name]) for name, value in network.state_dict().items())
    gains: dict[int, list[float]] = {}
    for item in range(len(valid)):
        batch = valid.__getitems__([item])
        losses = []
        for state in (before, after):
            network.load_state_dict(state)
            losses.append(network.loss(batch)["nll"].item())
        gains.setdefault(int(batch.cutoff_index[0]) // HORIZON, []).append(losses[0] - losses[1])
    largest = max(len(part) for part in gains.values())
    means = np.array([np.mean(part) for part in gains.values() if len(part) >= 0.5 * largest])
    assert result.blocks == len(means)
    assert result.gain == pytest.approx(means.mean(), abs=1e-6)
    assert result.error == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)), abs=1e-6)


@pytest.mark.parametrize(
    ("gain", "error", "blocks", "clear"),
    [(1.0, 0.9, 10, True), (1.0, 1.1, 10, False), (1.0, 0.1, 2, False), (1.0, float("nan"), 1, False)],
)
def test_what_counts_as_clear(gain: float, error: float, blocks: int, clear: bool) -> None:
    assert Comparison(gain, error, blocks).is_clear(1.0) is clear
