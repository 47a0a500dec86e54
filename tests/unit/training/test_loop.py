"""The training loop: it learns, repeats exactly, resumes exactly, stops well, and says what went wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import StopTraining
from tsforge.training.loop import CHECKPOINT, TrainResult, evaluate_windows, fit_network

SPEC = WindowSpec(context_length=24, horizon=4)
QUICK = TrainConfig(max_epochs=4, batch_size=16, learning_rate=0.01, seed=3, accelerator="cpu")


def _panel(num_rows: int = 260) -> Panel:
    rng = np.random.default_rng(0)
    steps = np.arange(num_rows)
    table = pl.DataFrame(
        {
            "time": steps,
            "a": 5 + 2 * np.sin(2 * np.pi * steps / 12) + rng.normal(size=num_rows) * 0.2,
            "b": -50 + 9 * np.cos(2 * np.pi * steps / 8) + rng.normal(size=num_rows),
        }
    )
    return Panel.from_frame(SeriesFrame.from_wide(table, time="time", freq="1i"))


class Parts:
    """Panel, windows and series of one small problem."""

    def __init__(self) -> None:
        self.panel = _panel()
        self.train = WindowDataset(self.panel, SPEC, None, 180)
        self.valid = WindowDataset(self.panel, SPEC, 180, None)
        self.series = self.panel.training_series(None, 180)

    def network(self, seed: int = 0, **config: Any) -> ForecastNetwork:
        spec = DataSpec(context_length=24, horizon=4, num_variates=2)
        return build_network(NetworkConfig.model_validate({"model": "dlinear", **config}), spec, seed=seed)

    def fit(self, network: ForecastNetwork, config: TrainConfig = QUICK, **options: Any) -> TrainResult:
        options = {"valid": self.valid, "progress": False, **options}
        return fit_network(network, self.train, options.pop("valid"), config, series=self.series, **options)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


def _same(first: ForecastNetwork, second: ForecastNetwork) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


class NoisyConfig(ModelConfig):
    """Settings of the probe."""

    name: Literal["noisy"] = "noisy"


class Noisy(ForecastModel[NoisyConfig]):
    """A linear map behind dropout that counts its hooks; draws random numbers in every step."""

    config_class = NoisyConfig
    calls: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: NoisyConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.map = nn.Linear(spec.context_length, spec.horizon * spec.num_params)
        self.register_buffer("strength", torch.zeros(()))

    def forward(self, batch: Batch) -> Prediction:
        rows = nn.functional.dropout(batch.context.transpose(1, 2), 0.3, self.training)
        out = self.map(rows).unflatten(-1, (self.spec.horizon, self.spec.num_params))
        return Prediction(out.transpose(1, 2))

    def prepare(self, data: TrainingSeries) -> None:
        self.calls["rows"] = len(data.values)

    def anneal(self, progress: float) -> None:
        self.calls.setdefault("progress", []).append(progress)
        self.strength.fill_(progress)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> type[Noisy]:
    monkeypatch.setitem(MODELS._classes, "noisy", Noisy)
    Noisy.calls.clear()
    return Noisy


# learning and repeating


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_training_learns_and_keeps_the_best_weights(schedule: str, parts: Parts) -> None:
    network = parts.network()
    config = QUICK.model_copy(update={"schedule": schedule, "max_epochs": 12})
    result = parts.fit(network, config)
    losses = [row["valid_loss"] for row in result.history]
    assert result.epochs == len(losses) == 12
    assert result.best_epoch == int(np.argmin(losses))
    assert result.metrics["valid_loss"] == min(losses) < 0.5 * losses[0]
    again = evaluate_windows(network, parts.valid, 7)
    assert again["valid_loss"] == pytest.approx(min(losses), rel=1e-5)  # other batch size, same windows
    assert not network.training
    assert result.windows_per_second > 0
    assert result.stopped_by == "max_epochs"


def test_best_weights_are_those_of_the_best_epoch_not_the_last(parts: Parts) -> None:
    """A rate so high that late epochs get worse."""
    network = parts.network()
    result = parts.fit(network, TrainConfig(max_epochs=12, batch_size=16, learning_rate=0.3, patience=None, seed=1))
    losses = [row["valid_loss"] for row in result.history]
    assert result.best_epoch < 11
    found = evaluate_windows(network, parts.valid, 64)["valid_loss"]
    assert found == pytest.approx(losses[result.best_epoch], rel=1e-5)
    assert found < losses[-1]


def test_validation_metrics_equal_a_plain_loop(parts: Parts) -> None:
    network = parts.network()
    result = parts.fit(network, QUICK.model_copy(update={"max_epochs": 1}))
    errors = []
    for batch in parts.valid.batches(1):
        errors.append(((network.predict(batch).mean - batch.target) / network.scaler.global_scale).flatten())
    error = torch.cat(errors).double()
    assert result.metrics["valid_mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert result.metrics["valid_mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)


def test_same_seed_same_weights_other_seed_other_weights(parts: Parts, noisy) -> None:
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(int(time.time()))  # the caller's random state must not matter
        networks.append(parts.network(model="noisy"))
        parts.fit(networks[-1], QUICK.model_copy(update={"seed": seed}))
    assert _same(networks[0], networks[1])
    assert not _same(networks[0], networks[2])


def test_the_callers_random_state_is_left_alone(parts: Parts) -> None:
    before = torch.get_rng_state()
    parts.fit(parts.network(), QUICK.model_copy(update={"max_epochs": 1}))
    assert torch.equal(before, torch.get_rng_state())


def test_without_validation_every_epoch_runs_and_the_last_weights_stay(parts: Parts) -> None:
    result = parts.fit(parts.network(), valid=None)
    assert result.epochs == 4
    assert result.best_epoch == 3
    assert "valid_loss" not in result.metrics


def test_patience_stops_training(parts: Parts) -> None:
    config = TrainConfig(max_epochs=60, batch_size=16, learning_rate=0.3, patience=2, seed=1)
    result = parts.fit(parts.network(), config)
    assert result.stopped_by == "patience"
    assert result.epochs == result.best_epoch + 3 < 60


def test_steps_per_epoch_can_be_limited(parts: Parts) -> None:
    seen: list[dict[str, float]] = []
    parts.fit(
        parts.network(),
        QUICK.model_copy(update={"max_steps_per_epoch": 2, "max_epochs": 2}),
        on_epoch=lambda epoch, metrics: seen.append(metrics),
    )
    assert [round(row["windows_per_second"] * row["seconds"]) for row in seen] == [32, 32]


def test_a_plateau_lowers_the_rate_once_the_validation_loss_stops_falling(parts: Parts) -> None:
    settings = {"schedule": "plateau", "plateau_factor": 0.5, "plateau_patience": 1, "max_epochs": 8, "patience": None}
    config = QUICK.model_copy(update=settings | {"learning_rate": 1e-9})  # it cannot fall
    rates = [row["learning_rate"] for row in parts.fit(parts.network(), config).history]
    assert rates == pytest.approx([1e-9, 1e-9, 1e-9, 5e-10, 5e-10, 2.5e-10, 2.5e-10, 1.25e-10], rel=1e-6)
    with pytest.raises(ConfigError, match="schedule=plateau follows the validation loss"):
        fit_network(parts.network(), parts.train, None, config, series=parts.series, progress=False)
    with pytest.raises(ConfigError, match="train.plateau_factor has no effect with schedule 'cosine'"):
        validate(TrainConfig, {"schedule": "cosine", "plateau_factor": 0.5})


# hooks of the model


def test_model_hooks_run(parts: Parts, noisy) -> None:
    network = parts.network(model="noisy")
    parts.fit(network, QUICK.model_copy(update={"max_epochs": 2, "patience": None}))
    assert noisy.calls["rows"] == len(parts.series.values)
    progress = noisy.calls["progress"]
    steps = -(-len(parts.train) // 16)
    np.testing.assert_allclose(progress, np.arange(2 * steps) / (2 * steps), atol=1e-12)


def test_epoch_hook_sees_every_epoch_and_may_stop(parts: Parts) -> None:
    seen: list[int] = []

    def hook(epoch: int, metrics: dict[str, float]) -> None:
        seen.append(epoch)
        assert {"train_loss", "valid_loss", "valid_mse", "valid_mae", "learning_rate"} <= set(metrics)
        if epoch == 2:
            raise StopTraining

    result = parts.fit(parts.network(), TrainConfig(max_epochs=9, batch_size=16), on_epoch=hook)
    assert seen == [0, 1, 2]
    assert result.stopped_by == "hook"
    assert result.epochs == 3


def test_other_errors_of_the_hook_pass_through(parts: Parts) -> None:
    def hook(epoch: int, metrics: dict[str, float]) -> None:
        raise KeyError("pruned")

    with pytest.raises(KeyError, match="pruned"):
        parts.fit(parts.network(), on_epoch=hook)


# resuming


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_bitwise_like_an_uninterrupted_one(
    stop_after: int, schedule: str, parts: Parts, noisy, tmp_path: Path
) -> None:
    config = QUICK.model_copy(update={"max_epochs": 6, "schedule": schedule})
    whole = parts.network(model="noisy")
    expected = parts.fit(whole, config)

    def die(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == stop_after:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        parts.fit(parts.network(model="noisy"), config, checkpoint_dir=tmp_path, on_epoch=die)
    assert (tmp_path / CHECKPOINT).is_file()
    resumed = parts.network(model="noisy", seed=99)  # its own start must not matter
    epochs: list[int] = []
    result = parts.fit(
        resumed, config, checkpoint_dir=tmp_path, resume=True, on_epoch=lambda epoch, metrics: epochs.append(epoch)
    )
    assert epochs == list(range(stop_after, 6))
    assert _same(whole, resumed)
    timeless = [
        [{key: value for key, value in row.items() if "second" not in key} for row in run.history]
        for run in (expected, result)
    ]
    assert timeless[0] == timeless[1]
    assert result.best_epoch == expected.best_epoch
    assert not (tmp_path / CHECKPOINT).exists()  # the run ended well


def test_resume_without_checkpoint_starts_anew(parts: Parts, tmp_path: Path) -> None:
    first, second = parts.network(), parts.network()
    parts.fit(first)
    parts.fit(second, checkpoint_dir=tmp_path, resume=True)
    assert _same(first, second)
    with pytest.raises(ConfigError, match="needs checkpoint_dir"):
        parts.fit(parts.network(), resume=True)


def _interrupted(parts: Parts, folder: Path) -> None:
    def die(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        parts.fit(parts.network(), checkpoint_dir=folder, on_epoch=die)


def test_resuming_with_other_settings_is_refused(parts: Parts, tmp_path: Path) -> None:
    _interrupted(parts, tmp_path)
    with pytest.raises(ConfigError, match="other settings or other data"):
        parts.fit(
            parts.network(), QUICK.model_copy(update={"learning_rate": 0.02}), checkpoint_dir=tmp_path, resume=True
        )


def test_a_checkpoint_of_a_model_with_fewer_parameters_is_named(parts: Parts, tmp_path: Path) -> None:
    """As an earlier version may have kept it: its optimiser has no state for the new ones."""
    _interrupted(parts, tmp_path)
    network = parts.network()
    network.model.register_parameter("added", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(BackendError, match=r"last\.ckpt is of other settings or another version .*model\.added"):
        parts.fit(network, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named(damage: str, parts: Parts, tmp_path: Path) -> None:
    _interrupted(parts, tmp_path)
    place = tmp_path / CHECKPOINT
    content = bytearray(place.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    place.write_bytes({"truncate": content[: len(content) // 2], "empty": b"", "flip": content}[damage])
    with pytest.raises(BackendError, match=r"last\.ckpt .*delete it to start anew"):
        parts.fit(parts.network(), checkpoint_dir=tmp_path, resume=True)


def test_checkpoints_hold_no_arbitrary_objects(parts: Parts, tmp_path: Path) -> None:
    _interrupted(parts, tmp_path)
    torch.load(tmp_path / CHECKPOINT, weights_only=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_and_the_handler(
    number: signal.Signals, parts: Parts, noisy, tmp_path: Path
) -> None:
    config = QUICK.model_copy(update={"max_epochs": 5})
    whole = parts.network(model="noisy")
    parts.fit(whole, config)
    handler = signal.getsignal(number)

    def press(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        parts.fit(parts.network(model="noisy"), config, checkpoint_dir=tmp_path, on_epoch=press)
    assert signal.getsignal(number) is handler
    resumed = parts.network(model="noisy")
    parts.fit(resumed, config, checkpoint_dir=tmp_path, resume=True)
    assert _same(whole, resumed)


def test_training_works_outside_the_main_thread(parts: Parts) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(parts.fit(parts.network())))
    thread.start()
    thread.join()
    assert results[0].epochs == 4


# closed forms and models that do not train


class SolvedConfig(ModelConfig):
    """Whether the closed form finishes the job."""

    name: Literal["solved"] = "solved"
    finished: bool = True


class Solved(ForecastModel[SolvedConfig]):
    """Repeats the last value; 'solved' without a residual scale."""

    config_class = SolvedConfig
    capabilities = Capabilities(closed_form=True, probabilistic=False)

    def __init__(self, config: SolvedConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.gain = nn.Parameter(torch.tensor(5.0))

    def forward(self, batch: Batch) -> Prediction:
        last = batch.context[:, -1:] * self.gain
        return Prediction(last.expand(-1, self.spec.horizon, -1).unsqueeze(-1))

    def solve(self, data: TrainingSeries) -> SolveReport:
        with torch.no_grad():
            self.gain.fill_(1.0)
        return SolveReport(finished=self.config.finished, method="by_hand")


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS._classes, "solved", Solved)


def test_a_finished_closed_form_takes_no_gradient_steps(parts: Parts, solved) -> None:
    network = parts.network(model="solved", likelihood={"name": "normal"})
    seen: list[int] = []
    result = parts.fit(network, on_epoch=lambda epoch, metrics: seen.append(epoch))
    assert (result.epochs, result.best_epoch, result.stopped_by, seen) == (0, -1, "solved", [0])
    assert result.solve is not None
    assert result.solve.method == "by_hand"
    assert network.model.gain.item() == 1.0
    assert result.metrics["valid_mse"] == pytest.approx(evaluate_windows(network, parts.valid, 9)["valid_mse"])
    # no residual scale reported: taken from the training windows
    batch = next(parts.train.batches(len(parts.train)))
    error = network.scaler.scale(batch).target - network.scaler.scale(batch).context[:, -1:]
    spread = torch.nn.functional.softplus(network.param_offset[..., 1])
    torch.testing.assert_close(spread, error.square().mean(0).sqrt(), rtol=1e-3, atol=1e-3)


def test_a_warm_start_that_training_cannot_improve_is_kept(parts: Parts, solved) -> None:
    network = parts.network(model={"name": "solved", "finished": False})
    config = TrainConfig(max_epochs=2, batch_size=16, learning_rate=50.0, gradient_clip=None, seed=0)
    result = parts.fit(network, config)
    assert result.best_epoch == -1
    assert network.model.gain.item() == 1.0
    found = evaluate_windows(network, parts.valid, 64)["valid_loss"]
    assert result.metrics["valid_loss"] == pytest.approx(found)


# refusals and silence


def test_a_loss_that_explodes_is_explained(parts: Parts) -> None:
    config = TrainConfig(max_epochs=30, batch_size=16, learning_rate=1e38, gradient_clip=None)
    with pytest.raises(ModelError, match=r"broke down in epoch \d+: .*lower train\.learning_rate \(now 1e\+38\)"):
        parts.fit(parts.network(), config)


def test_rows_coupled_models_need_aligned_windows(parts: Parts, noisy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noisy, "capabilities", Capabilities(rows_coupled=True))
    table = pl.DataFrame({"id": ["x"] * 90 + ["y"] * 90, "time": [*range(90), *range(90)]})
    table = table.with_columns(a=pl.col("time").sin(), b=pl.col("time").cos())
    panel = Panel.from_frame(SeriesFrame.from_long(table, series_id="id", time="time", targets=["a", "b"], freq="1i"))
    for aligned in (False, True):
        network, windows = parts.network(model="noisy"), WindowDataset(panel, SPEC, aligned=aligned)
        if aligned:
            fit_network(network, windows, None, QUICK, series=panel.training_series(None, None), progress=False)
        else:
            with pytest.raises(ConfigError, match="build its training windows aligned"):
                fit_network(network, windows, None, QUICK, series=panel.training_series(None, None), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_gpu_is_said(parts: Parts) -> None:
    with pytest.raises(BackendError, match="no CUDA device"):
        parts.fit(parts.network(), TrainConfig(accelerator="gpu"))


def test_an_unusable_checkpoint_folder_is_said(parts: Parts, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    with pytest.raises(BackendError, match="cannot keep checkpoints"):
        parts.fit(parts.network(), checkpoint_dir=place)


def test_training_is_silent_and_restores_loggers(parts: Parts, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lightning.pytorch")
    level, filters = logger.level, list(warnings.filters)
    parts.fit(parts.network(), progress=True)  # standard error is no terminal here
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert logger.level == level
    assert warnings.filters == filters


def test_unknown_train_settings_are_refused() -> None:
    for bad in ({"max_epochs": 0}, {"batch_size": -1}, {"learning_rate": 0}, {"precision": "16"}, {"epochs": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainConfig.model_validate(bad)


_KILLED = """
import sys, os, signal
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_loop import Parts, QUICK
from pathlib import Path
parts = Parts()
def die(epoch, metrics):
    if epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
parts.fit(parts.network(), QUICK, checkpoint_dir=Path(sys.argv[2]), on_epoch=die)
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_another_to_the_same_weights(parts: Parts, tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", _KILLED, str(here), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, resumed = parts.network(), parts.network()
    parts.fit(whole)
    result = parts.fit(resumed, checkpoint_dir=tmp_path, resume=True)
    assert _same(whole, resumed)
    assert json.dumps(result.history[0])  # plain numbers


def test_mixed_precision_trains_and_clips(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimiser and mixed precision: the trainer's own clipping refuses the pair."""
    norms: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def noted(parameters: Iterable[torch.nn.Parameter], largest: float) -> torch.Tensor:
        kept = list(parameters)
        result = real(kept, largest)
        found = [part.grad.norm() for part in kept if part.grad is not None]
        norms.append(float(torch.stack(found).norm()))
        return result

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    whole, mixed = parts.network(), parts.network()
    config = QUICK.model_copy(update={"max_epochs": 12, "gradient_clip": 0.01})
    expected = parts.fit(whole, config)
    found = parts.fit(mixed, config.model_copy(update={"precision": "bf16-mixed"}))
    assert found.metrics["valid_loss"] == pytest.approx(expected.metrics["valid_loss"], rel=0.1)
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["auto", "32"])
def test_training_on_a_gpu_reaches_the_cpu_result(precision: str, parts: Parts) -> None:
    here, there = parts.network(), parts.network()
    config = QUICK.model_copy(update={"max_epochs": 12})
    expected = parts.fit(here, config)
    found = parts.fit(there, config.model_copy(update={"accelerator": "gpu", "precision": precision}))
    assert found.metrics["valid_loss"] == pytest.approx(expected.metrics["valid_loss"], rel=0.1)
    assert next(there.parameters()).device.type == "cpu"
    assert next(there.parameters()).dtype == torch.float32
