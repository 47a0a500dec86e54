"""External inputs: which step they enter, in training, free runs, PE(n), Lyapunov exponents and fixed points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.core.errors import ModelError
from tsforge.dynamics.config import EvaluationConfig, PLRNNConfig, ReconstructionConfig
from tsforge.dynamics.evaluation import Drive, evaluate, free_comparison
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.network import Model, Reconstruction
from tsforge.dynamics.windows import RandomWindows
from tsforge.layers.teacher_forcing import ForcingConfig

INPUTS = np.random.default_rng(0).normal(size=(300, 2))
NOISE = np.random.default_rng(1).normal(size=(300, 2))
SMALL = validate(
    EvaluationConfig, {"lyapunov_steps": 200, "lyapunov_transient": 20, "capture_runs": 5, "capture_steps": 500}
)


def model(seed: int = 0, inputs: int = 2, **settings: Any) -> Model:
    """Return a map of two units with random weights of a size that bends it."""
    plain = validate(PLRNNConfig, {"kind": "shallow", "hidden": 6, **settings})
    constant = ForcingConfig(method="constant", start=0.5)
    parts = Reconstruction(plain, constant, 2, [seed], inputs=inputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, part in parts.map.named_parameters():
            scale = 0.3 if name != "C" else 0.5
            part.copy_(scale * torch.randn(part.shape, generator=generator))
    return parts.group(0)


def entry(of: Model) -> np.ndarray:
    """Return C (M, K): what each input adds to the step."""
    return of.push(torch.eye(of.inputs, dtype=torch.float64)).numpy().T


def driven(of: Model, inputs: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return states under the inputs of the rows that they are, one step of the formula after another."""
    states = [start]
    for s in inputs[1:]:
        z = torch.from_numpy(states[-1][None])
        states.append(of.step(z)[0].numpy() + entry(of) @ s)
    return np.array(states)


def test_inputs_of_a_window_are_those_of_its_predicted_rows() -> None:
    rows, inputs = torch.arange(30.0)[:, None], 100 + torch.arange(60.0).reshape(30, 2)
    windows = RandomWindows([rows[:12], rows[12:]], 4, [0, 1], inputs=[inputs[:12], inputs[12:]])
    starts = windows.draw(1, 5)[0]
    x, s = windows.gather(starts), windows.gather_inputs(starts)
    assert s is not None
    assert s.shape == (2, 4, 5, 2)
    assert torch.equal(s[..., 0], 100 + 2 * x[:, 1:, :, 0])
    assert RandomWindows([rows], 4, [0]).gather_inputs(starts[:1]) is None


@pytest.mark.parametrize(
    "kind", [{"kind": "almost_linear", "rectified": 0, "latent": 1}, {"kind": "deep", "hidden": 4}]
)
def test_training_finds_how_the_inputs_of_the_target_step_enter(kind: dict[str, Any]) -> None:
    """Inputs without memory: those of any other step would explain nothing."""
    s = np.random.default_rng(2).normal(size=(2, 500, 1))
    series = np.zeros((2, 500, 1))
    for t in range(1, 500):
        series[:, t] = 0.6 * series[:, t - 1] + 0.5 * s[:, t]
    plain = {
        "data": {"path": "x.parquet"},
        "model": kind,
        "forcing": {"method": "constant", "start": 1.0},
        "train": {
            "epochs": 30,
            "batches_per_epoch": 10,
            "sequence_length": 8,
            "learning_rate": 0.1,
            "learning_rate_end": 1e-3,
            "lambda_lat": 0,
        },
    }
    training = train_seeds(list(series), validate(ReconstructionConfig, plain), [0, 1], inputs=list(s))
    assert max(training.trace[-1]["loss"]) < 2e-3
    for index in range(2):
        assert float(training.network.weights(index)["map.C"]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("settings", [{}, {"kind": "deep", "hidden": [5]}, {"kind": "clipped_shallow"}])
def test_a_free_run_takes_the_inputs_of_the_rows_that_it_predicts(settings: dict[str, Any]) -> None:
    of = model(**settings)
    test = NOISE
    run = free_comparison(of, test, INPUTS)
    np.testing.assert_allclose(run, driven(of, INPUTS, test[0]), rtol=1e-6, atol=1e-9)
    later = test.copy()
    later[1:] = 1e6
    np.testing.assert_array_equal(free_comparison(of, later, INPUTS), run)
    other = INPUTS.copy()
    other[0] = 1e6  # belongs to the step that led to the start
    np.testing.assert_array_equal(free_comparison(of, test, other), run)
    other[200:] += 1
    assert np.flatnonzero((free_comparison(of, test, other) != run).any(axis=1))[0] == 200


def test_prediction_errors_of_the_true_driven_map_are_nil_and_its_run_the_data() -> None:
    of = model()
    test = driven(of, INPUTS, np.array([0.3, -0.2]))
    judged = evaluate(of, test, SMALL, 1.0, drive=Drive(inputs=INPUTS, mean=np.zeros(2)))
    assert judged.metrics["pe"] < 1e-12
    assert judged.metrics["d_stsp"] < 1e-6
    assert judged.failed == ""
    shifted = evaluate(of, test, SMALL, 1.0, drive=Drive(inputs=np.roll(INPUTS, 1, axis=0), mean=np.zeros(2)))
    assert shifted.metrics["pe"] > 0.05


def test_lyapunov_exponents_follow_the_driven_orbit() -> None:
    """Against differences of neighbouring runs under the same inputs, one QR a step."""
    of = model(3)
    test = driven(of, INPUTS, np.array([0.3, -0.2]))
    judged = evaluate(of, test, SMALL, 0.5, drive=Drive(inputs=INPUTS, mean=np.zeros(2)))
    frame, logs, eps = np.eye(2), [], 1e-7
    for z in test[20 : 20 + 30 + 200]:  # the transient asked for, a tenth to align, the steps asked for
        sides = [of.step(torch.from_numpy(z + sign * eps * np.eye(2))).numpy().T for sign in (1, -1)]
        frame, upper = np.linalg.qr((sides[0] - sides[1]) / (2 * eps) @ frame)
        logs.append(np.log(np.abs(np.diag(upper))))
    expected = np.mean(logs[30:], axis=0) / 0.5
    np.testing.assert_allclose(judged.spectrum, expected, atol=0.02)
    assert judged.lyapunov_steps == 200
    short = evaluate(of, test[:80], SMALL, 0.5, drive=Drive(inputs=INPUTS[:80], mean=np.zeros(2)))
    assert short.lyapunov_steps == 80 - 20 - 8


def test_fixed_points_are_those_of_the_inputs_held_at_their_mean() -> None:
    of = model(1)
    test = driven(of, INPUTS, np.zeros(2))
    mean = np.array([0.7, -0.4])
    judged = evaluate(of, test, SMALL, 1.0, drive=Drive(inputs=INPUTS, mean=mean))
    assert judged.findings["cycles"]
    for cycle in judged.findings["cycles"]:
        z = np.array(cycle["points"])
        after = of.step(torch.from_numpy(z)).numpy() + entry(of) @ mean
        np.testing.assert_allclose(after, z, atol=1e-6)
        assert cycle["captured"] is None
    assert judged.findings["healthy"] is None
    assert math.isnan(judged.metrics["captured"])
    assert any("mean inputs" in note for note in judged.findings["notes"])


@pytest.mark.parametrize("inputs", [0, 2])
def test_inputs_and_their_map_belong_together(inputs: int) -> None:
    drive = Drive(inputs=INPUTS, mean=np.zeros(2))
    with pytest.raises(ModelError, match="external inputs"):
        evaluate(model(inputs=inputs), NOISE, SMALL, 1.0, drive=None if inputs else drive)
