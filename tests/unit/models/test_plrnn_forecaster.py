"""The PLRNN forecaster: the recurrence, members, objectives, gain, streaming, settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tsforge.models.plrnn as module
from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models._plrnn_gain import GRID, choose_gain, thinned
from tsforge.models.linear import Linear
from tsforge.models.plrnn import PLRNN, PLRNNForecastConfig
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.testing.generators import make_batch, make_series, seasonal_panel
from tsforge.training.config import TrainConfig
from tsforge.training.loop import evaluate_windows, fit_network

L, H, V = 10, 4, 3
BASE: dict[str, Any] = {
    "kind": "clipped_shallow",
    "latent": 5,
    "hidden": 7,
    "bounded": True,
    "observation": "identity",
    "ensemble": 2,
    "objective": "gtf",
    "forcing": {"method": "constant", "start": 0.3},
    "gain": "innovation",
    "normalisation": "window",
    "skip": "none",
}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": V, **sizes})


def make(spec: DataSpec | None = None, *, seed: int = 0, **settings: Any) -> PLRNN:
    """Return a float64 model in evaluation mode whose biases are not 0."""
    torch.manual_seed(seed)
    model = PLRNN(validate(PLRNNForecastConfig, BASE | settings, where="model"), spec or spec_of()).double()
    with torch.no_grad():
        for name, part in model.named_parameters():
            if not name.startswith("skip"):
                part.add_(0.2 * torch.randn_like(part))
    return model.eval()


def batch_of(spec: DataSpec | None = None, **options: Any) -> Batch:
    batch = make_batch(spec or spec_of(), **options)
    return Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)


def without_target(batch: Batch) -> Batch:
    return batch._replace(target=None, target_mask=None)


def by_hand(model: PLRNN, member: int, batch: Batch, row: int, alpha: np.ndarray, *, target: bool) -> np.ndarray:
    """Return the predictions [L - 1 + H, V] of one member for one window by scalar loops, in scaled units."""
    part = {name: value[member].detach().numpy() for name, value in model.map.named_parameters()}
    A = 0.999 * np.tanh(part["raw_A"])
    extra = model.observation.L[member].detach().numpy()
    context, mask = batch.context[row].numpy(), batch.context_mask[row].numpy()
    loc = np.array([context[mask[:, v], v].mean() if mask[:, v].any() else 0.0 for v in range(V)])
    spread = [context[mask[:, v], v].std() if mask[:, v].sum() > 1 else 1.0 for v in range(V)]
    rows = [(context[t], mask[t]) for t in range(L)]
    if target:
        assert batch.target is not None
        assert batch.target_mask is not None
        rows += [(batch.target[row].numpy()[t], batch.target_mask[row].numpy()[t]) for t in range(H)]
    x = [np.where(seen, (values - loc) / spread, 0.0) for values, seen in rows]
    z = np.concatenate([x[0], extra @ x[0]])
    found = []
    for t in range(1, L + H):
        new = np.zeros(len(z))
        for i in range(len(z)):
            new[i] = A[i] * z[i] + part["h1"][i]
            for j in range(len(part["h2"])):
                drive = sum(part["W2"][j, k] * z[k] for k in range(len(z)))
                new[i] += part["W1"][i, j] * (max(drive + part["h2"][j], 0.0) - max(drive, 0.0))
            inputs = []
            if batch.known is not None:
                inputs += batch.known[row, t].tolist()
            if batch.static is not None:
                inputs += batch.static[row].tolist()
            new[i] += sum(part["C"][i, k] * s for k, s in enumerate(inputs))
        found.append(new[:V] * spread + loc)
        z = new
        if t < len(rows):
            for v in range(V):
                if rows[t][1][v]:
                    z[v] = (1 - alpha[v]) * z[v] + alpha[v] * x[t][v]
    return np.array(found)


# ---- the recurrence


def test_forecast_is_the_mean_of_members_run_by_hand() -> None:
    spec = spec_of(num_known=2, num_static=1)
    model, batch = make(spec), batch_of(spec, size=3, gaps=0.3)
    gain = torch.tensor([[0.9, 0.1, 0.4], [0.2, 1.0, 0.5]]).double()
    model.gain.copy_(gain)
    model.settled.fill_(True)
    with torch.no_grad():
        found = model(without_target(batch))
        context = model._locations(without_target(batch))[:, : L - 1]
    assert found.context_raw is None
    for row in range(3):
        told = [by_hand(model, g, batch, row, gain[g].numpy(), target=False) for g in range(2)]
        expected = np.mean(told, axis=0)
        np.testing.assert_allclose(context[row].numpy(), expected[: L - 1], atol=1e-12)
        np.testing.assert_allclose(found.raw[row, ..., 0].numpy(), expected[L - 1 :], atol=1e-12)


def test_training_forces_with_the_target_and_gives_each_member_its_part() -> None:
    spec = spec_of(num_known=1)
    model, batch = make(spec).train(), batch_of(spec, size=5, gaps=0.2)
    found = model(batch)
    alpha = np.full(V, 0.3)
    for row in range(5):  # two members, parts of three rows
        expected = by_hand(model, row // 3, batch, row, alpha, target=True)
        whole = torch.cat([found.context_raw, found.raw], dim=1)[row, ..., 0]
        np.testing.assert_allclose(whole.detach().numpy(), expected, atol=1e-12)


def test_rows_of_one_member_give_no_gradient_to_another() -> None:
    model, batch = make().train(), batch_of(size=6)
    model(batch).raw[:3].square().sum().backward()
    for name, part in model.named_parameters():
        assert part.grad is not None
        assert bool((part.grad[1] == 0).all()), name
    assert float(model.map.W1.grad[0].abs().max()) > 0


def test_more_members_than_rows() -> None:
    model, batch = make(ensemble=4).train(), batch_of(size=1)
    assert model(batch).raw.shape == (1, H, V, 1)


def test_objective_horizon_runs_freely_while_training() -> None:
    model, batch = make(objective="horizon", ensemble=1).train(), batch_of()
    assert torch.equal(model(batch).raw, model(without_target(batch)).raw)
    forced = make(ensemble=1).train()
    assert not torch.equal(forced(batch).raw, forced(without_target(batch)).raw)


def test_target_cells_that_are_hidden_do_not_force() -> None:
    model, batch = make().train(), batch_of(gaps=0.4)
    assert batch.target is not None
    assert batch.target_mask is not None
    other = batch._replace(target=torch.where(batch.target_mask, batch.target, 1e3))
    assert torch.equal(model(batch).raw, model(other).raw)


def test_a_fully_masked_stretch_is_a_free_run() -> None:
    model, batch = make(), without_target(batch_of(gaps=0.0))
    mask = batch.context_mask.clone()
    mask[:, 4:] = False
    hidden = batch._replace(context_mask=mask)
    with torch.no_grad():
        state = model.warm_up(hidden)
        short = make(spec_of(context_length=4, horizon=L - 4))
        short.load_state_dict(model.state_dict())
        start = short.warm_up(batch._replace(context=batch.context[:, :4], context_mask=batch.context_mask[:, :4]))
        ahead = short.observation.observe(short._run_freely(start["z"].transpose(0, 1).contiguous(), L - 4, None))
    torch.testing.assert_close(model.observation.observe(state["z"].transpose(0, 1)), ahead[:, -1])


def test_forecasts_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(num_known=1)
    model, batch = make(spec), without_target(batch_of(spec, size=7))
    with torch.no_grad():
        whole = model(batch).raw
        monkeypatch.setattr(module, "_MOST_CELLS", 2 * (L + H) * 5 * 2)
        assert torch.allclose(model(batch).raw, whole, atol=1e-14)


def test_loss_weighs_every_step_alike() -> None:
    config = NetworkConfig.model_validate(
        {"model": {"name": "plrnn", **BASE}, "likelihood": {"name": "point"}, "scaling": {"kind": "none"}}
    )
    network, batch = build_network(config, spec_of()).train(), make_batch(spec_of(), gaps=0.0)
    parts = network.loss(batch)
    found = network.model(batch)
    everything = torch.cat([found.context_raw, found.raw], dim=1)[..., 0]
    assert batch.target is not None
    error = (everything - torch.cat([batch.context[:, 1:], batch.target], dim=1)).square()
    expected = error.mean() * (L - 1 + H) / H
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_context_is_judged_with_the_spread_of_the_first_step() -> None:
    config = NetworkConfig.model_validate(
        {"model": {"name": "plrnn", **BASE}, "likelihood": {"name": "normal"}, "scaling": {"kind": "none"}}
    )
    network, batch = build_network(config, spec_of()).train(), make_batch(spec_of(), gaps=0.0)
    network.set_residual_scale(torch.linspace(0.5, 2.0, H).unsqueeze(1).expand(-1, V))
    found = network.model(batch)
    error = found.context_raw[..., 0] - batch.context[:, 1:]
    nll = (0.5 * (error / 0.5).square() + math.log(0.5) + 0.5 * math.log(2 * math.pi)).mean()
    assert network.loss(batch)["context_nll"].item() == pytest.approx(nll.item() * (L - 1) / H, rel=1e-4)


def test_network_gives_the_target_while_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = PLRNN.forward

    def spy(self: PLRNN, batch: Batch) -> Any:
        seen.append(batch.target is not None)
        return real(self, batch)

    monkeypatch.setattr(PLRNN, "forward", spy)
    config = NetworkConfig.model_validate({"model": {"name": "plrnn", **BASE}, "likelihood": {"name": "point"}})
    network, batch = build_network(config, spec_of()), make_batch(spec_of())
    network.fit_scaler(make_series(spec_of()))
    network.train().loss(batch)
    network.eval().loss(batch)
    network.evaluate(batch)
    network.predict(batch)
    assert seen == [True, False, False, False]


def test_spread_comes_from_residuals_over_the_horizon() -> None:
    panel = seasonal_panel(num_rows=400)
    window = WindowSpec(context_length=16, horizon=3)
    config = NetworkConfig.model_validate({"model": {"name": "plrnn", **BASE}, "likelihood": {"name": "normal"}})
    network = build_network(config, DataSpec(context_length=16, horizon=3, num_variates=2))
    train = WindowDataset(panel, window, None, 300)
    fit_network(
        network,
        train,
        WindowDataset(panel, window, 300, 400),
        TrainConfig(max_epochs=1, accelerator="cpu"),
        series=panel.training_series(None, 300),
        progress=False,
    )
    errors = []
    for batch in train.batches(512):
        scaled = network.scaler.scale(batch)
        assert scaled.target is not None
        errors.append(network(batch).raw[..., 0].detach() - scaled.target)
    expected = torch.cat(errors).square().mean(0).sqrt()
    batch = next(iter(train.batches(4)))
    levels = network.predict(batch, (0.158655, 0.841345)).quantiles
    assert levels is not None
    unit = network.scaler.stats(batch)[1][0, 0]
    torch.testing.assert_close((levels[0, ..., 1] - levels[0, ..., 0]) / 2 / unit, expected, rtol=2e-3, atol=1e-4)


# ---- adaptive forcing


def test_adaptive_forcing_moves_while_training_only_and_is_kept() -> None:
    model = make(forcing={"method": "adaptive", "interval": 2, "decay": 0.5})
    batch = batch_of(size=6)
    with torch.no_grad():
        model(without_target(batch))
    assert model.schedule.alpha.tolist() == [1.0, 1.0]
    model.train()
    model(batch)
    assert model.schedule.alpha.tolist() == [1.0, 1.0]
    model(batch)  # the second step is due
    moved = model.schedule.alpha.clone()
    assert bool((moved < 1).all())
    other = make(forcing={"method": "adaptive", "interval": 2, "decay": 0.5}, seed=1)
    other.load_state_dict(model.state_dict())
    for one in (model, other.train()):
        one(batch)
        one(batch)
    assert torch.equal(model.schedule.alpha, other.schedule.alpha)
    assert bool((model.schedule.alpha < moved).all())


def test_adaptive_estimate_is_taken_at_the_forced_states(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(params: Any, states: Tensor, method: str, **options: Any) -> Tensor:
        seen.append(states)
        return torch.full((1,), 2.0)

    monkeypatch.setattr(module, "kappa", spy)
    model = make(ensemble=1, forcing={"method": "adaptive", "interval": 1, "decay": 0.0}).train()
    batch = batch_of(size=2, gaps=0.0)
    model(batch)
    assert float(model.schedule.alpha) == 0.5
    mean, spread = batch.context.mean(1), batch.context.std(1, correction=0)
    assert batch.target is not None
    x = torch.cat([batch.context[:, 1:], batch.target[:, :-1]], dim=1)
    x = (x - mean.unsqueeze(1)) / spread.unsqueeze(1)
    torch.testing.assert_close(seen[0][0, ..., :V], x.transpose(0, 1))  # alpha was 1: observed units are the data
    assert float(seen[0][0, ..., V:].abs().min()) > 0  # units never observed hold what the model says


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


# ---- beside a linear map


def beside(spec: DataSpec, **settings: Any) -> PLRNN:
    """Return a model whose linear map is solved."""
    model = make(spec, **{"skip": "closed_form", "ridge": 10.0, **settings})
    model.solve(make_series(spec))
    return model


def linear_of(model: PLRNN, batch: Batch) -> Tensor:
    """Return the forecasts [B, H, V] of the linear forecaster by itself."""
    found = Linear(model.skip.config, model.spec).double()
    found.solve(make_series(model.spec))
    return found.eval()(Batch(batch.context, batch.context_mask)).raw[..., 0]


def alone(model: PLRNN) -> PLRNN:
    """Return the same network without a linear map."""
    config = model.config.model_copy(update={"skip": "none", "ridge": None})
    found = PLRNN(config, model.spec).double()
    found.load_state_dict({name: part for name, part in model.state_dict().items() if not name.startswith("skip")})
    return found.eval()


@pytest.mark.parametrize("normalisation", ["window", "last", "none"])
@pytest.mark.parametrize("ridge", [10.0, None])
def test_a_forecast_lies_between_linear_and_free_run(normalisation: str, ridge: float | None) -> None:
    spec = spec_of(num_known=1, num_static=1)
    batch = without_target(batch_of(spec, size=5, gaps=0.2))
    model = beside(spec, normalisation=normalisation, ridge=ridge)
    share = torch.tensor([0.0, 0.4, 1.0]).double()
    with torch.no_grad():
        free, linear = alone(model)(batch).raw[..., 0], linear_of(model, batch)
        torch.testing.assert_close(model(batch).raw[..., 0], free)  # before anything was chosen
        model.share.copy_(share)
        found = model(batch).raw[..., 0]
        parts = model.components(batch)
    torch.testing.assert_close(found, (1 - share) * linear + share * free)
    torch.testing.assert_close(sum(parts.values()), found)
    assert set(parts) > {"lags", "free_run"}
    assert [row["share"] for row in model.explain()["observer"]] == pytest.approx(share.tolist())


@pytest.mark.parametrize("objective", ["gtf", "horizon"])
def test_training_does_not_see_the_linear_map(objective: str) -> None:
    model, batch = beside(spec_of(), objective=objective), batch_of(size=6)
    model.share.fill_(0.3)
    ours, theirs = model.train()(batch), alone(model).train()(batch)
    assert torch.equal(ours.raw, theirs.raw)
    assert torch.equal(ours.context_raw, theirs.context_raw)
    assert not any(part.requires_grad for part in model.skip.parameters())


def windows_with(model: PLRNN, share: Tensor) -> Batch:
    """Return windows whose targets lie between both forecasts, away from them by what neither explains."""
    batch = batch_of(model.spec, size=12, gaps=0.3)
    with torch.no_grad():
        free, linear = alone(model)(without_target(batch)).raw[..., 0], linear_of(model, batch)
    assert batch.target_mask is not None
    target = linear + share * (free - linear)
    return batch._replace(target=torch.where(batch.target_mask, target, 1e3))


def test_the_share_is_the_best_on_held_out_windows() -> None:
    share = torch.tensor([0.25, 0.0, 1.0]).double()
    model = beside(spec_of(), gain=0.5)
    model.settle([windows_with(model, share)])
    torch.testing.assert_close(model.share, share, atol=1e-9, rtol=0.0)
    model.settle([windows_with(model, torch.tensor([-0.5, 1.5, 0.5]).double())])  # never beyond either
    torch.testing.assert_close(model.share, torch.tensor([0.0, 1.0, 0.5]).double(), atol=1e-9, rtol=0.0)


def test_a_variate_without_targets_and_a_run_that_diverges_leave_the_linear_forecast() -> None:
    model = beside(spec_of(), gain=0.5)
    batch = windows_with(model, torch.ones(V).double())
    assert batch.target_mask is not None
    mask = batch.target_mask.clone()
    mask[..., 1] = False
    model.settle([batch._replace(target_mask=mask)])
    assert model.share.tolist() == pytest.approx([1.0, 0.0, 1.0])
    torch.nn.init.constant_(model.map.h1, torch.inf)
    model.settle([batch])
    assert model.share.tolist() == [0.0] * V
    with torch.no_grad():
        torch.testing.assert_close(model(without_target(batch)).raw[..., 0], linear_of(model, batch))


def test_a_fit_is_no_worse_than_its_linear_map_on_the_validation_span() -> None:
    panel = seasonal_panel(num_rows=400)
    window = WindowSpec(context_length=24, horizon=3)
    train, valid = WindowDataset(panel, window, None, 300), WindowDataset(panel, window, 300, 400)
    series = panel.training_series(None, 300)
    found = {}
    for name, model in {"plrnn": {**BASE, "skip": "closed_form", "ridge": 10.0}, "linear": {"ridge": 10.0}}.items():
        config = NetworkConfig.model_validate({"model": {"name": name, **model}, "likelihood": {"name": "point"}})
        network = build_network(config, DataSpec(context_length=24, horizon=3, num_variates=2))
        result = fit_network(
            network, train, valid, TrainConfig(max_epochs=2, accelerator="cpu"), series=series, progress=False
        )
        found[name] = result.metrics["valid_mse"]
        if name == "plrnn":
            assert result.epochs == 2
            assert result.solve is None
            assert bool(((network.model.share >= 0) & (network.model.share < 1)).all())
    assert found["plrnn"] <= found["linear"] * (1 + 1e-5)


def test_a_linear_map_goes_with_windows_normalised_by_themselves() -> None:
    def config(**settings: Any) -> PLRNNForecastConfig:
        return validate(PLRNNForecastConfig, BASE | settings, where="model")

    cases = {("auto", "window"): True, ("auto", "last"): True, ("auto", "none"): False, ("closed_form", "none"): True}
    for (skip, normalisation), has in (cases | {("none", "window"): False}).items():
        settings = config(skip=skip, normalisation=normalisation)
        assert (PLRNN(settings, spec_of()).skip is not None) == has
        assert PLRNN.capabilities_of(settings).closed_form == has
    assert PLRNN(config(skip="none"), spec_of()).components(batch_of()) == {}


# ---- settings, what it shows


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"context_weight": 0.5}, "context_weight has no effect"),
        ({"kind": "deep", "forcing": {"method": "adaptive"}}, "deep"),
        ({"forcing": {"method": "sparse"}}, "tau"),
        ({"observation": "affine", "innovation_clip": 3.0}, "identity"),
        ({"gain": 1.5}, "gain"),
        ({"gain": "best"}, "neither innovation, horizon nor a number"),
        ({"ensemble": 0}, "ensemble"),
        ({"forcing": {"estimator": "arithmetic_mean"}}, "estimator has no part in method 'constant'"),
        ({"skip": "learned"}, r"model\.skip: the PLRNN is trained without the linear map; use closed_form or none"),
        (
            {"skip": "auto", "normalisation": "none", "ridge": 3.0},
            r"model\.ridge has no effect with normalisation 'none'",
        ),
        ({"skip": "none", "ridge": 3.0}, r"model\.ridge has no effect with skip 'none'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        validate(PLRNNForecastConfig, BASE | settings, where="model")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"latent": 2}, "latent >= 3"),
        ({"kind": "almost_linear", "hidden": None}, "rectified"),
        ({"bases": 3}, "bases does not belong"),
    ],
)
def test_maps_that_do_not_fit_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        make(**settings)


def test_default_sizes() -> None:
    def size(settings: dict[str, Any], **sizes: int) -> tuple[int, int]:
        model = PLRNN(PLRNNForecastConfig.model_validate(settings), spec_of(**sizes))
        return model.map.latent, model.map.shallow().h2.shape[-1]

    assert size({}) == (64, 256)
    assert size({}, num_variates=50) == (82, 256)
    assert size({"observation": "affine"}, num_variates=90) == (64, 256)
    assert PLRNNForecastConfig.model_validate({"forcing": {"start": 0.5}}).forcing.method == "constant"
    assert PLRNNForecastConfig.model_validate({"forcing": {"method": "adaptive"}}).forcing.start is None


def test_diagonal_is_not_decayed() -> None:
    from tsforge.training.module import parameter_groups

    model = make()
    decayed = {
        id(part): group["weight_decay"]
        for group in parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
        for part in group["params"]
    }
    assert decayed[id(model.map.raw_A)] == 0.0
    assert decayed[id(model.map.W1)] == 0.1


def test_explanation_tells_gain_and_error_of_variates() -> None:
    model = make()
    fresh = model.explain()
    assert [row["gain"] for row in fresh["observer"]] == pytest.approx([0.3] * V)
    assert "one_step_error" not in fresh["observer"][0]
    model.settle([batch_of(size=6)])
    told = model.explain()
    assert [row["gain"] for row in told["observer"]] == pytest.approx(model.gain.mean(0).tolist())
    assert [row["one_step_error"] for row in told["observer"]] == pytest.approx(model.innovation.mean(0).tolist())
    assert [row["forcing"] for row in told["members"]] == pytest.approx([0.3, 0.3])


def test_symbols_are_the_signs_of_the_rectified_units() -> None:
    model = make(kind="almost_linear", hidden=None, rectified=2, ensemble=2)
    batch = without_target(batch_of(gaps=0.2))
    found = model.symbols(batch)
    assert found.shape == (len(batch.context), L)
    for stop in (1, 4, L):
        short = make(spec_of(context_length=stop), kind="almost_linear", hidden=None, rectified=2, ensemble=2)
        short.load_state_dict(model.state_dict())
        loc, scale = model._statistics(batch)  # the statistics are those of the whole context
        x = ((batch.context - loc) / scale)[:, :stop]
        part = Batch(x, batch.context_mask[:, :stop])
        object.__setattr__(short, "config", short.config.model_copy(update={"normalisation": "none"}))
        z = short.warm_up(part)["z"][:, 0, -2:]
        expected = (z > 0).long() @ torch.tensor([1, 2])
        assert torch.equal(found[:, stop - 1], expected)
    assert len(found.unique()) > 1
    with pytest.raises(ModelError, match="almost_linear"):
        make().symbols(batch)
    with pytest.raises(ModelError, match="13 rectified"):
        make(kind="almost_linear", hidden=None, latent=16, rectified=13).symbols(batch)
