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


def test_an_unclear_improvement_is_taken_only_without_a_margin() -> None:
    """On noise the best epoch is a hair better than the start; with a margin the weights of the start return."""
    taken_back = 0
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=600)
        loose, strict = (fitted(noise, start_margin=margin) for margin in (0.0, 1.0))
        if not (loose[1].best_epoch >= 0 > strict[1].best_epoch):
            continue
        taken_back += 1
        start, series = network_of(), panel_of(noise).training_series(None, 400)
        start.fit_scaler(series)
        start.solve(series)
        kept = strict[0].state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in start.state_dict().items())
        assert any(not torch.equal(value, kept[name]) for name, value in loose[0].state_dict().items())
    assert taken_back >= 1


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
    [
        (1.0, 0.45, 10, True),
        (1.0, 0.55, 10, False),
        (1.0, 0.45, 3, True),
        (1.0, 0.0713, 2, True),  # tan(pi (1/2 - 0.02275)) = 13.97
        (1.0, 0.0718, 2, False),
        (1.0, float("nan"), 1, False),
    ],
)
def test_what_counts_as_clear(gain: float, error: float, blocks: int, clear: bool) -> None:
    assert Comparison(gain, error, blocks).is_clear(2.0) is clear


@pytest.mark.parametrize(("rows", "kept", "warned"), [(17, False, False), (11, True, True), (40, False, False)])
def test_a_large_gain_on_two_stretches_stays_and_one_too_short_to_tell_is_named(
    rows: int, kept: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The logistic map again, validated on few rows: two, one and many stretches of six."""
    values = logistic(600)
    panel, network = panel_of(values), network_of()
    settings = {"max_epochs": 12, "batch_size": 32, "learning_rate": 5e-3, "patience": None, "accelerator": "cpu"}
    result = fit_network(
        network,
        windows(panel, None, 400),
        windows(panel, 400, 400 + rows),
        TrainConfig.model_validate(settings),
        series=panel.training_series(None, 400),
        progress=False,
    )
    assert (result.best_epoch == -1) is kept
    assert ("was taken back all the same" in caplog.text) is warned
