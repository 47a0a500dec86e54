"""The PLRNN forecaster: the recurrence, members, objectives, adaptive forcing, settings, what it shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plrnn_forecaster_cases import BASE, H, L, V, batch_of, make, spec_of, without_target
from torch import Tensor

import tsforge.models.plrnn as module
from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models.plrnn import PLRNN, PLRNNForecastConfig
from tsforge.network import NetworkConfig, build_network
from tsforge.testing.generators import make_batch, make_series, seasonal_panel
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network


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
