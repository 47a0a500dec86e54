"""Snapshot ensembles: the schedule, what is kept, and that the one training is that of the network alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import load_artifact, save_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import load, to_yaml, validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.predict import predict
from tsforge.models.committee import CommitteeConfig
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import StopTraining
from tsforge.training.loop import TrainResult, evaluate_windows, fit_network
from tsforge.training.module import TrainModule

MEMBER: dict[str, Any] = {"name": "gru", "d_model": 6, "dropout": 0.2, "normalisation": "none", "skip": "none"}
CYCLES, EPOCHS = 3, 6
TRAIN: dict[str, Any] = {"max_epochs": EPOCHS, "batch_size": 32, "learning_rate": 0.02, "seed": 5, "accelerator": "cpu"}
CYCLIC = TRAIN | {"schedule": "cyclic_cosine", "cycles": CYCLES, "patience": None}


def frame(rows: int = 240) -> SeriesFrame:
    rng, time = np.random.default_rng(0), np.arange(rows)
    table = pl.DataFrame({"time": time, "y": 4 + np.sin(time / 3) + rng.normal(0, 0.2, rows)})
    return SeriesFrame.from_wide(table, time="time", freq="1i")


class Parts:
    """One small problem: windows, and the same first weights for every network."""

    def __init__(self) -> None:
        panel, spec = Panel.from_frame(frame()), WindowSpec(context_length=16, horizon=3)
        self.train, self.valid = WindowDataset(panel, spec, None, 180), WindowDataset(panel, spec, 180, None)
        self.series = panel.training_series(None, 180)

    def network(self, snapshots: int | None, *, likelihood: str = "normal", **member: Any) -> ForecastNetwork:
        settings: Any = {**MEMBER, **member}
        model = settings if snapshots is None else {"name": "committee", "member": settings, "snapshots": snapshots}
        config = NetworkConfig.model_validate({"model": model, "likelihood": {"name": likelihood}})
        return build_network(config, DataSpec(context_length=16, horizon=3, num_variates=1), seed=7)

    def fit(self, network: ForecastNetwork, settings: dict[str, Any], **options: Any) -> TrainResult:
        valid = options.pop("valid", self.valid)
        config = validate(TrainConfig, settings)
        return fit_network(network, self.train, valid, config, series=self.series, progress=False, **options)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def timeless(result: TrainResult) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in result.history]


def stopped_after(parts: Parts, epochs: int) -> dict[str, torch.Tensor]:
    """Return the weights of the member trained alone with the same schedule, after some epochs."""

    def hook(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == epochs - 1:
            raise StopTraining

    alone = parts.network(None)
    parts.fit(alone, CYCLIC, valid=None, on_epoch=hook)
    return state(alone.model)


# the schedule


@pytest.mark.parametrize(("steps", "cycles"), [(24, 3), (10, 1), (12, 12)])
def test_rates_follow_the_formula_of_the_paper(parts: Parts, steps: int, cycles: int) -> None:
    """Huang et al. (2017), Eq. (2), for iterations t = 1 .. T: a0 / 2 (cos(pi mod(t - 1, T / M) / (T / M)) + 1)."""
    config = validate(TrainConfig, CYCLIC | {"cycles": cycles, "max_epochs": cycles, "learning_rate": 0.3})
    found = TrainModule(parts.network(None), config, total_steps=steps).configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert found["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    length = steps // cycles
    expected = [0.15 * (math.cos(math.pi * ((t - 1) % length) / length) + 1) for t in range(1, steps + 1)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cycles_end_with_epochs_of_the_training(parts: Parts) -> None:
    rates = [row["learning_rate"] for row in parts.fit(parts.network(None), CYCLIC, valid=None).history]
    steps = -(-len(parts.train) // 32)  # of an epoch, two of which are a cycle
    last = [0.01 * (math.cos(math.pi * (epoch * steps - 1) / (2 * steps)) + 1) for epoch in (1, 2)]
    assert rates == pytest.approx(last * CYCLES, rel=1e-6)  # of each epoch's last step, not of the restart after it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cycles": None}, "needs train.cycles"),
        ({"max_epochs": 20}, r"not a multiple of train.cycles=3; .* set train.max_epochs=21"),
        ({"schedule": "cosine"}, "train.cycles has no effect with schedule 'cosine'"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig, CYCLIC | settings)


# what is kept


@pytest.mark.parametrize("validated", [True, False])
def test_snapshots_are_the_weights_of_the_network_alone_at_the_ends_of_cycles(parts: Parts, validated: bool) -> None:
    network = parts.network(CYCLES)
    result = parts.fit(network, CYCLIC, valid=parts.valid if validated else None)
    for index, member in enumerate(network.model.members):
        assert same(state(member), stopped_after(parts, 2 * (index + 1)))
    states = [state(member) for member in network.model.members]
    assert not same(states[0], states[1])
    assert (result.epochs, result.best_epoch, result.stopped_by) == (EPOCHS, EPOCHS - 1, "max_epochs")


def test_the_last_weights_are_kept_however_they_validate(parts: Parts) -> None:
    """Noise is best forecast by the mean, where training begins: the better it fits the waves, the worse it looks."""
    noise = np.random.default_rng(3).normal(4.0, 2.0, 90)
    other = Panel.from_frame(
        SeriesFrame.from_wide(pl.DataFrame({"time": range(90), "y": noise}), time="time", freq="1i")
    )
    network = parts.network(CYCLES)
    result = parts.fit(network, CYCLIC, valid=WindowDataset(other, WindowSpec(context_length=16, horizon=3), None, 90))
    losses = [row["valid_loss"] for row in result.history]
    assert losses[-1] > min(losses)
    assert same(state(network.model.members[-1]), stopped_after(parts, EPOCHS))


def test_of_more_cycles_the_last_are_kept(parts: Parts) -> None:
    network = parts.network(2)
    parts.fit(network, CYCLIC, valid=None)
    for member, epochs in zip(network.model.members, (4, 6), strict=True):
        assert same(state(member), stopped_after(parts, epochs))


def test_one_snapshot_forecasts_what_the_network_alone_does(parts: Parts) -> None:
    network, alone = parts.network(1), parts.network(None)
    for one in (network, alone):
        parts.fit(one, CYCLIC, valid=None)
    batch = next(parts.valid.batches(50))
    ours, theirs = (one.predict(batch, (0.1, 0.5, 0.9)) for one in (network, alone))
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.quantiles, theirs.quantiles)


def test_the_forecast_is_the_mean_of_the_snapshots_and_so_are_the_metrics(parts: Parts) -> None:
    network = parts.network(CYCLES, likelihood="point")
    result = parts.fit(network, CYCLIC)
    batch = next(parts.valid.batches(50))
    each = []
    for member in network.model.members:
        alone = parts.network(None, likelihood="point")
        alone.scaler.load_state_dict(network.scaler.state_dict())
        alone.model.load_state_dict(member.state_dict())
        each.append(alone.eval().predict(batch).mean)
    torch.testing.assert_close(network.predict(batch).mean, torch.stack(each).mean(0))
    found = evaluate_windows(network, parts.valid, 11)["valid_loss"]
    assert result.metrics["valid_loss"] == pytest.approx(found, rel=1e-5)
    assert result.metrics["valid_loss"] != pytest.approx(result.history[-1]["valid_loss"], rel=1e-3)


def test_history_is_that_of_the_network_alone(parts: Parts) -> None:
    """Validation must neither see snapshots nor change a step."""
    found = parts.fit(parts.network(CYCLES), CYCLIC)
    assert timeless(found) == timeless(parts.fit(parts.network(None), CYCLIC))


# interruptions


def test_a_resumed_training_ends_with_the_same_snapshots(parts: Parts, tmp_path: Path) -> None:
    whole = parts.network(CYCLES)
    parts.fit(whole, CYCLIC)
    for stop_after in (1, 2, 3):

        def die(epoch: int, metrics: dict[str, float], stop_after: int = stop_after) -> None:
            if epoch == stop_after:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            parts.fit(parts.network(CYCLES), CYCLIC, checkpoint_dir=folder, on_epoch=die)
        resumed = parts.network(CYCLES)
        parts.fit(resumed, CYCLIC, checkpoint_dir=folder, resume=True)
        assert same(state(whole), state(resumed))


def test_a_hook_that_stops_before_the_last_snapshot_is_an_error(parts: Parts) -> None:
    def hook(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 3:
            raise StopTraining

    with pytest.raises(ModelError, match="after 4 of 6 epochs, before the last of 3 snapshots"):
        parts.fit(parts.network(CYCLES), CYCLIC, on_epoch=hook)


@pytest.mark.parametrize(
    ("snapshots", "settings", "message"),
    [
        (3, TRAIN | {"patience": None}, "schedule 'constant' has none; set train.schedule=cyclic_cosine"),
        (4, CYCLIC, "model.snapshots=4 needs as many cycles .* train.cycles is 3"),
        (3, CYCLIC | {"patience": 5}, "train.patience=5 could stop before"),
    ],
)
def test_trainings_that_give_no_snapshots_are_refused(
    parts: Parts, snapshots: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parts.fit(parts.network(snapshots), settings)


def test_size_and_snapshots_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        validate(CommitteeConfig, {"member": "gru", "size": 3, "snapshots": 3})
    both = [validate(CommitteeConfig, settings) for settings in ({}, {"snapshots": 5})]
    assert [(one.size, one.snapshots, one.count) for one in both] == [(4, None, 4), (None, 5, 5)]
    assert [validate(CommitteeConfig, one.model_dump()) for one in both] == both


# a closed-form start


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_the_mean_competes_with_a_closed_form_start(parts: Parts, margin: float) -> None:
    settings = CYCLIC | {"start_margin": margin, "learning_rate": 3.0, "gradient_clip": None}
    network = parts.network(CYCLES, likelihood="point", skip="closed_form")
    result = parts.fit(network, settings)
    assert result.best_epoch == -1
    assert result.metrics["valid_loss"] == pytest.approx(evaluate_windows(network, parts.valid, 64)["valid_loss"])
    states = [state(member) for member in network.model.members]
    assert all(same(states[0], other) for other in states)


# one artifact like any other


def test_fitted_from_configs_and_stored(tmp_path: Path) -> None:
    overrides = ["model=committee", "model.snapshots=5", "train=snapshots", "train.max_epochs=5", "data.name=x"]
    overrides += ["model.member.d_model=6", "window.context_length=16", "window.horizon=3", "train.seed=2"]
    config = load(FitConfig, "fit", overrides)
    import yaml

    assert validate(FitConfig, yaml.safe_load(to_yaml(config))) == config
    data = frame()
    artifact, training = fit_frame(data, config)
    again, _ = fit_frame(data, config)
    assert same(state(artifact.network), state(again.network))
    assert training.epochs == 5
    stored = load_artifact(save_artifact(artifact, tmp_path).path)
    assert predict(artifact, data).table.equals(predict(stored, data).table)
    assert len(stored.network.model.members) == 5
