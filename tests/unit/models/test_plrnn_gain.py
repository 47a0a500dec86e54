"""The PLRNN forecaster: how the gain of its observer is chosen, and how a carried state follows observations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plrnn_forecaster_cases import BASE, L, V, batch_of, make, spec_of, without_target
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models._plrnn_gain import GRID, choose_gain, thinned
from tsforge.models.plrnn import PLRNN
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.testing.generators import make_series, seasonal_panel
from tsforge.training.config import TrainConfig
from tsforge.training.loop import evaluate_windows, fit_network

# ---- the gain


def scalar(transition: float, **settings: Any) -> PLRNN:
    """Return the linear model x[t] = transition x[t-1] in one unit."""
    spec = DataSpec(context_length=200, horizon=4, num_variates=1)
    fixed = {"latent": 1, "hidden": 1, "ensemble": 1, "normalisation": "none", "bounded": False}
    model = make(spec, **{**BASE, **fixed, **settings})
    with torch.no_grad():
        for part in model.parameters():
            part.zero_()
        model.map.raw_A.fill_(transition)
    return model


@pytest.mark.parametrize(("process", "noise"), [(1.0, 0.5), (0.1, 1.0), (0.02, 1.0)])
@pytest.mark.parametrize("objective", ["innovation", "horizon"])
def test_chosen_gain_is_that_of_the_kalman_filter(process: float, noise: float, objective: str) -> None:
    transition = 0.95
    # steady state of the variance of the prediction: P = a^2 P r / (P + r) + q
    b = noise - transition**2 * noise - process
    predicted = (-b + math.sqrt(b * b + 4 * process * noise)) / 2
    kalman = predicted / (predicted + noise)
    rng = np.random.default_rng(3)
    windows, length = 400, 204
    state = np.zeros((windows, length))
    state[:, 0] = rng.normal(size=windows) * math.sqrt(process / (1 - transition**2))
    for t in range(1, length):
        state[:, t] = transition * state[:, t - 1] + rng.normal(size=windows) * math.sqrt(process)
    seen = torch.from_numpy(state + rng.normal(size=state.shape) * math.sqrt(noise)).unsqueeze(-1)
    model = scalar(transition, gain=objective)
    batch = Batch(seen[:, :200], torch.ones(windows, 200, 1, dtype=torch.bool), seen[:, 200:])
    model.settle([batch])
    nearest = sorted(GRID, key=lambda value: abs(value - kalman))[:2]
    assert any(float(model.gain) == pytest.approx(value) for value in nearest)
    if objective == "innovation":
        assert float(model.innovation) == pytest.approx(math.sqrt(predicted + noise), rel=0.05)


def test_gain_before_settling_is_the_strength_of_training() -> None:
    assert make()._gain().tolist() == [[0.3] * V] * 2
    assert make(forcing={"method": "none"})._gain().tolist() == [[1.0] * V] * 2
    assert make(forcing={"method": "sparse", "tau": 3})._gain().tolist() == [[1.0] * V] * 2


def test_fixed_gain_stays_and_innovations_are_measured() -> None:
    model = make(gain=0.25)
    assert model._gain().tolist() == [[0.25] * V] * 2
    model.settle([batch_of(size=6)])
    assert model._gain().tolist() == [[0.25] * V] * 2
    assert bool(model.innovation.isfinite().all())


def test_settling_twice_is_settling_once_and_touches_no_weights() -> None:
    model, batches = make(), [batch_of(size=6, seed=seed) for seed in range(2)]
    weights = {name: part.clone() for name, part in model.named_parameters()}
    model.settle(batches)
    once = {name: part.clone() for name, part in model.state_dict().items()}
    model.settle(batches)
    assert all(torch.equal(part, once[name]) for name, part in model.state_dict().items())
    assert all(torch.equal(part, weights[name]) for name, part in model.named_parameters())


def test_settling_reads_no_values_that_are_hidden() -> None:
    batch = batch_of(size=6, gaps=0.4)
    assert batch.target_mask is not None
    assert batch.target is not None
    dirty = batch._replace(
        context=torch.where(batch.context_mask, batch.context, 1e3),
        target=torch.where(batch.target_mask, batch.target, 1e3),
    )
    for gain in ("innovation", "horizon"):
        models = [make(gain=gain) for _ in range(2)]
        for model, windows in zip(models, (batch, dirty), strict=True):
            model.settle([windows])
        assert torch.equal(models[0].gain, models[1].gain)
        assert torch.equal(models[0].innovation, models[1].innovation)


def test_metrics_of_a_fit_are_those_after_settling() -> None:
    panel = seasonal_panel(num_rows=400)
    window = WindowSpec(context_length=16, horizon=3)
    config = NetworkConfig.model_validate({"model": {"name": "plrnn", **BASE}, "likelihood": {"name": "point"}})
    network: ForecastNetwork = build_network(config, DataSpec(context_length=16, horizon=3, num_variates=2))
    valid = WindowDataset(panel, window, 300, 400)
    result = fit_network(
        network,
        WindowDataset(panel, window, None, 300),
        valid,
        TrainConfig(max_epochs=1, accelerator="cpu"),
        series=panel.training_series(None, 300),
        progress=False,
    )
    assert bool(network.model.settled)
    assert result.metrics["valid_mse"] == pytest.approx(evaluate_windows(network, valid, 512)["valid_mse"], rel=1e-6)


def errors_of(table: dict[float, list[float]], together: list[float]) -> Any:
    """Return errors [1, 2] by the gain of both variates, ``together`` where the gains differ."""

    def errors(windows: Batch, gain: Tensor) -> Tensor:
        low, high = gain[0].tolist()
        return torch.tensor([together if low != high else table.get(round(low, 4), [9.0, 9.0])])

    return errors


def test_gains_of_variates_are_taken_only_if_they_are_better_together() -> None:
    table = {0.1: [1.0, 5.0], 0.3: [3.0, 2.0], 1.0: [4.0, 1.5]}
    like, windows = torch.ones(1, 2), batch_of()
    apart = choose_gain(errors_of(table, [1.0, 1.5]), windows, like, by_variate=True)
    assert torch.allclose(apart, torch.tensor([[0.1, 1.0]]))
    worse = choose_gain(errors_of(table, [3.0, 2.5]), windows, like, by_variate=True)
    assert torch.allclose(worse, torch.tensor([[0.3, 0.3]]))
    shared = choose_gain(errors_of(table, [0.0, 0.0]), windows, like, by_variate=False)
    assert torch.allclose(shared, torch.tensor([[0.3, 0.3]]))


def test_gains_that_diverge_are_not_chosen() -> None:
    table = {0.02: [math.nan, 0.0], 0.05: [0.0, math.inf], 0.5: [1.0, 1.0]}
    found = choose_gain(errors_of(table, [0.0, math.nan]), batch_of(), torch.ones(1, 2), by_variate=True)
    assert torch.allclose(found, torch.tensor([[0.5, 0.5]]))


def test_thinned_windows_are_spread_evenly() -> None:
    def batches() -> Any:
        for start in range(0, 100, 30):
            places = torch.arange(start, min(start + 30, 100)).double().view(-1, 1, 1)
            yield Batch(places, torch.ones_like(places, dtype=torch.bool))

    found = thinned(batches(), most=30)
    assert found is not None
    assert found.context.flatten().tolist() == list(range(0, 100, 4))
    half = thinned(batches(), most=60)
    assert half is not None
    assert half.context.flatten().tolist() == list(range(0, 100, 2))
    everything = thinned(batches(), most=100)
    assert everything is not None
    assert everything.context.flatten().tolist() == list(range(100))
    assert thinned([]) is None


# ---- streaming


def rows_of(batch: Batch, steps: int) -> list[Observation]:
    return [
        Observation(
            batch.context[:, t], batch.context_mask[:, t], known=None if batch.known is None else batch.known[:, t]
        )
        for t in range(steps)
    ]


@pytest.mark.parametrize(("clip", "skip"), [(None, "none"), (0.7, "none"), (None, "closed_form")])
def test_carried_state_forecasts_as_the_whole_window(clip: float | None, skip: str) -> None:
    spec = spec_of(num_known=2, num_static=1)
    model = make(spec, normalisation="none", innovation_clip=clip, skip=skip)
    model.solve(make_series(spec))
    batch = without_target(batch_of(spec, gaps=0.3))
    model.settle([batch_of(spec, size=8, seed=5)])
    assert batch.known is not None
    with torch.no_grad():
        whole = model(batch).raw
        state = model.initial_state(len(batch.context), batch.static)
        for row in rows_of(batch, L):
            state = model.step(state, row)
        torch.testing.assert_close(model.free_run(state, batch.known[:, L:]).raw, whole)
        torch.testing.assert_close(model.free_run(model.warm_up(batch), batch.known[:, L:]).raw, whole)


def test_an_outlier_moves_the_state_by_no_more_than_the_cut() -> None:
    batch = batch_of(gaps=0.0)
    found = {}
    for clip in (None, 2.0):
        model = make(normalisation="none", innovation_clip=clip, gain=0.5)
        model.settle([batch_of(size=8, seed=5)])
        row = Observation(torch.full_like(batch.context[:, 0], 50.0), torch.ones_like(batch.context_mask[:, 0]))
        with torch.no_grad():
            state = model.warm_up(batch)
            told = model._advance(state["z"].transpose(0, 1), None)[..., :V]
            after = model.step(state, row)["z"].transpose(0, 1)
        found[clip] = (after[..., :V] - told) / model.innovation.unsqueeze(1)
    torch.testing.assert_close(found[2.0], torch.ones_like(found[2.0]))  # gain 0.5 times 2 deviations
    assert float(found[None].min()) > 10
