"""Validation while seeds train: what is looked at, what is kept, and that looking changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.evaluation import evaluate, free_comparison
from tsforge.dynamics.module import TRACED, Training, train_seeds
from tsforge.dynamics.network import Model, Reconstruction
from tsforge.dynamics.validation import Validation, ValidationSeries

SERIES = np.stack([np.sin(np.arange(500) * 0.2), np.cos(np.arange(500) * 0.2)], axis=1)
SERIES += 0.02 * np.random.default_rng(0).normal(size=SERIES.shape)
TRAIN, VALID = SERIES[:400], SERIES[400:]
EPOCHS = 6


def config(every: int | None = 1, **train: Any) -> ReconstructionConfig:
    size = {"epochs": EPOCHS, "batches_per_epoch": 8, "batch_size": 4, "sequence_length": 10, "learning_rate": 1e-2}
    plain = {
        "data": {"path": "x.parquet", "valid": None if every is None else 0.2},
        "model": {"hidden": 8},
        "train": size | {"validate_every": every} | train,
    }
    return validate(ReconstructionConfig, plain)


def trained(every: int | None = 1, **train: Any) -> Training:
    return train_seeds(
        [TRAIN], config(every, **train), [0, 1], valid=None if every is None else ValidationSeries(VALID)
    )


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[list[float]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give the groups these scores, epoch by epoch, and return the list that gets weights and alpha of every look."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Validation.look
    given = iter([score for row in scores for score in row])

    def look(self: Validation, epoch: int, network: Reconstruction, values: torch.Tensor) -> Any:
        seen.append((values.detach().clone(), network.schedule.alpha.clone()))
        return original(self, epoch, network, values)

    def judge(self: Validation, model: Model) -> dict[str, float]:
        return {"score": next(given), "d_stsp": 0.0, "d_h": 0.0, "free_run_range": 1.0}

    monkeypatch.setattr(Validation, "look", look)
    monkeypatch.setattr(Validation, "judge", judge)
    return seen


def weights(training: Training, index: int) -> torch.Tensor:
    return torch.cat([part[index].flatten() for part in training.network.parameters()])


def test_each_seed_keeps_the_weights_and_alpha_of_its_own_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = math.nan
    seen = scripted(monkeypatch, [[3, 1], [1, 2], [2, nan], [1, 5], [nan, 5], [4, 5]])  # a tie keeps the earlier one
    training = trained()
    validation = training.validation
    assert validation is not None
    assert (validation.epochs, validation.scores) == ([2, 1], [1, 1])
    for index, epoch in enumerate((2, 1)):
        assert torch.equal(weights(training, index), seen[epoch - 1][0][index])
        assert training.network.schedule.alpha[index] == seen[epoch - 1][1][index]
        assert not torch.equal(weights(training, index), seen[-1][0][index])


def test_without_a_finite_run_the_last_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [[math.nan, math.nan]] * EPOCHS)
    training = trained()
    assert training.validation is not None
    assert training.validation.epochs == [None, None]
    assert torch.equal(weights(training, 0), seen[-1][0][0])


def test_looking_changes_nothing_in_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(None)
    assert plain.validation is None
    scripted(monkeypatch, [[5 - epoch] * 2 for epoch in range(EPOCHS)])  # the last one is the best
    looked = trained()
    assert all(torch.equal(weights(plain, index), weights(looked, index)) for index in range(2))
    assert torch.equal(plain.network.schedule.alpha, looked.network.schedule.alpha)
    for ours, theirs in zip(plain.trace, looked.trace, strict=True):
        np.testing.assert_equal(ours, theirs)


def test_the_score_is_that_of_the_final_judgement_on_the_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(validate_every=4)
    expected: dict[int, list[float]] = {}
    original = Validation.look

    def look(self: Validation, epoch: int, network: Reconstruction, values: torch.Tensor) -> Any:
        plain = settings.evaluation.model_copy(update={"findings": False, "lyapunov_steps": 100})
        judged = [evaluate(network.group(index), VALID, plain, 1.0) for index in range(2)]
        expected[epoch] = [item.metrics["d_stsp"] + item.metrics["d_h"] for item in judged]
        return original(self, epoch, network, values)

    monkeypatch.setattr(Validation, "look", look)
    rows: list[tuple[int, dict[str, list[float]]]] = []
    training = train_seeds(
        [TRAIN], settings, [0, 1], valid=ValidationSeries(VALID), on_trace=lambda *row: rows.append(row)
    )
    assert training.validation is not None
    assert [row["epoch"] for row in training.validation.history] == [4, EPOCHS]  # the last one too
    assert {row["epoch"]: row["score"] for row in training.validation.history} == expected
    traced = {epoch: row["validation_score"] for epoch, row in rows if "validation_score" in row}
    assert traced == expected


def test_missing_values_leave_the_spectrum_out() -> None:
    network = Reconstruction(config().model, config().forcing, 2, [0])
    holed = VALID.copy()
    holed[5, 0] = np.nan
    figures = Validation(ValidationSeries(holed), 20.0, 1).judge(network.group(0))
    assert figures["score"] == figures["d_stsp"]
    assert math.isnan(figures["d_h"])
    assert figures["free_run_range"] == np.abs(free_comparison(network.group(0), holed)).max()


def test_a_run_that_is_not_finite_has_no_score() -> None:
    network = Reconstruction(validate(type(config().model), {"kind": "plrnn"}), config().forcing, 2, [0])
    with torch.no_grad():
        network.map.raw_A.fill_(9.0)
    validation = Validation(ValidationSeries(np.tile(VALID, (10, 1))), 20.0, 1)
    assert math.isnan(validation.judge(network.group(0))["score"])
    with torch.no_grad():
        network.map.raw_A.fill_(math.nan)
    assert math.isnan(validation.judge(network.group(0))["score"])


def test_a_driven_model_is_validated_along_its_inputs() -> None:
    settings = config()
    network = Reconstruction(settings.model, settings.forcing, 2, [0], inputs=1)
    inputs = np.random.default_rng(3).normal(size=(120, 1))
    model = network.group(0)
    with torch.no_grad():
        start = model.initial(torch.zeros(1, 2, dtype=torch.float64))
        run = model.run(start, 119, inputs=torch.from_numpy(inputs[1:, None]))
        data = model.observe(torch.cat([start, run[:, 0]])).numpy()
    assert Validation(ValidationSeries(data, inputs), 20.0, 1).judge(model)["score"] < 1e-6
    assert Validation(ValidationSeries(data, inputs[::-1].copy()), 20.0, 1).judge(model)["score"] > 0.1


def test_rows_and_interval_belong_together() -> None:
    for plain in ({"data": {"path": "a", "valid": 0.2}}, {"data": {"path": "a"}, "train": {"validate_every": 5}}):
        with pytest.raises(ConfigError, match="belong together"):
            validate(ReconstructionConfig, plain)
    with pytest.raises(ConfigError, match="validate_every"):
        train_seeds([TRAIN], config(None), [0], valid=ValidationSeries(VALID))


def test_the_trace_holds_kappa_gradient_norm_and_largest_A() -> None:
    """Against a run of one step an epoch, whose figures are those of that step alone."""
    norms: list[float] = []
    original = torch.linalg.vector_norm

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        found = original(*args, **options)
        norms.append(float(found.flatten()[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "vector_norm", noted)
        training = trained(None, batches_per_epoch=5, gradient_clip=1e-3)
    per_epoch = np.array(norms).reshape(EPOCHS, 5).mean(axis=1)
    assert {"epoch", *TRACED} == training.trace[0].keys()
    np.testing.assert_allclose([row["gradient_norm"][0] for row in training.trace], per_epoch, rtol=1e-5)
    assert min(per_epoch) > 1e-3  # before clipping
    final = training.trace[-1]
    assert final["max_abs_A"] == training.network.map.A.abs().amax(1).tolist()
    found = 1 - 1 / np.array([row["kappa"] for row in training.trace])
    alpha = np.array([[1.0, 1.0], *[row["alpha"] for row in training.trace]])
    wanted = np.maximum(found, 0.0)
    expected = np.where(wanted > alpha[:-1], wanted, 0.999 * alpha[:-1] + 0.001 * wanted)
    np.testing.assert_allclose(alpha[1:], expected, rtol=1e-6)  # one estimate an epoch: alpha follows this kappa


def test_without_adaptive_forcing_there_is_no_kappa() -> None:
    plain = validate(
        ReconstructionConfig, config(None).model_dump() | {"forcing": {"method": "constant", "start": 0.2}}
    )
    assert all(math.isnan(value) for row in train_seeds([TRAIN], plain, [0]).trace for value in row["kappa"])
