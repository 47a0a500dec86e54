"""PV-RNN as a forecaster: what it reads, that it repeats itself, its settings, and what it makes of a fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.errors import ConfigError
from tsforge.models.pvrnn import PVRNN, PVRNNConfig

L, H, V, WINDOW = 12, 3, 2, 8
SMALL: dict[str, Any] = {"units": [20], "latents": [3], "time_constants": [1.5], "window": WINDOW} | {
    "training_steps": 4,
    "inference_steps": 20,
}


def make(**changes: Any) -> PVRNN:
    torch.manual_seed(0)
    spec = DataSpec(context_length=L, horizon=H, num_variates=V, num_params=changes.pop("params", 1))
    return PVRNN(PVRNNConfig(**SMALL | changes), spec)


def waves(rows: int, seed: int) -> Tensor:
    """Return two variates mixed from two frequencies, with noise of 0.1, [rows, V]."""
    rng, t = np.random.default_rng(seed), np.arange(rows)
    first, second = np.sin(2 * np.pi * t / 7), np.sin(2 * np.pi * t / 18 + 0.5)
    values = np.stack([first + 0.5 * second, second], axis=1) + 0.1 * rng.normal(size=(rows, V))
    return torch.tensor(values, dtype=torch.float32)


def contexts(x: Tensor) -> Batch:
    """Return the context that ends with every row from row L - 1 on."""
    rows = x.unfold(0, L, 1).transpose(1, 2).contiguous()
    return Batch(rows, ~rows.isnan())


@pytest.fixture(scope="module")
def trained() -> PVRNN:
    """A small network after a few seconds on waves without faults."""
    model = make().train()
    torch.manual_seed(0)
    windows = waves(1200, 0).unfold(0, L + H, 1).transpose(1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    steps = 180
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        rows = windows[torch.randint(len(windows), (32,), generator=generator)]
        told = model(contexts_of(rows[:, :L]))
        assert told.aux_losses is not None
        loss = (told.raw[..., 0] - rows[:, L:]).square().mean() + told.aux_losses["free_energy"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def contexts_of(rows: Tensor) -> Batch:
    return Batch(rows, torch.ones_like(rows, dtype=torch.bool))


def test_a_trained_network_forecasts_waves(trained: PVRNN) -> None:
    x = waves(400, 1)
    batch = contexts(x[:-H])
    with torch.no_grad():
        error = float((trained(batch).raw[..., 0] - x[L:].unfold(0, H, 1).transpose(1, 2)).square().mean())
    assert error < 0.25 * float(x.var())


def test_planted_faults_cost_more_than_normal_rows(trained: PVRNN) -> None:
    x = waves(500, 2)
    rows = torch.arange(40, 480, 20)
    faulty = x.clone()
    for place, row in enumerate(rows.tolist()):
        faulty[row, place % V] += 1.2 if place % 3 else -1.2
    with torch.no_grad():
        usual, found = costs(trained, x), trained.free_energy(contexts(faulty))
    scores = (found.reconstruction.mean(-1) + found.divergence)[rows - (L - 1)]
    assert float((scores > usual.quantile(0.95)).float().mean()) > 0.8
    assert float(scores.median()) > float(usual.quantile(0.99))
    near = (found.expected - faulty[L - 1 :])[:20].square().mean()
    assert float(near) < 0.25 * float(x.var())


def costs(model: PVRNN, x: Tensor) -> Tensor:
    """Return the score of every row from row L - 1 on."""
    found = model.free_energy(contexts(x))
    return found.reconstruction.mean(-1) + found.divergence


def test_a_level_shift_raises_the_score_within_three_rows(trained: PVRNN) -> None:
    x = waves(300, 3)
    with torch.no_grad():
        level = float(costs(trained, x).quantile(0.99))
        for start in (60, 105, 150, 205):
            moved = x.clone()
            moved[start:] += 2.0
            assert float(costs(trained, moved)[start - (L - 1) : start - (L - 1) + 3].max()) > level


@pytest.mark.parametrize("model", ["trained", "fresh"])
def test_forecasts_and_scores_repeat_themselves_and_leave_the_random_state(
    model: str, request: pytest.FixtureRequest
) -> None:
    net = request.getfixturevalue("trained") if model == "trained" else make().eval()
    batch = contexts(waves(60, 5))
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first = (net(batch).raw, *net.free_energy(batch))
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(99)
        again = (net(batch).raw, *net.free_energy(batch))
        part = Batch(*(None if value is None else value[7:9] for value in batch))
        alone = (net(part).raw, *net.free_energy(part))
    for one, other, own in zip(first, again, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(own, one[7:9], rtol=1e-3, atol=1e-3)


def test_only_observed_cells_of_the_window_are_read() -> None:
    net, batch = make().eval(), contexts(waves(20, 6))
    mask = batch.context_mask.clone()
    mask[:, -3, 0] = False
    with torch.no_grad():
        told, cost = net(Batch(batch.context, mask)).raw, net.free_energy(Batch(batch.context, mask))
        changed = batch.context.clone()
        changed[:, : L - WINDOW] += 5.0  # before the window
        changed[:, -3, 0] = 7.0  # not observed
        assert torch.equal(net(Batch(changed, mask)).raw, told)
        assert torch.equal(net.free_energy(Batch(changed, mask)).divergence, cost.divergence)
        changed[:, L - WINDOW] += 1.0
        assert not torch.equal(net(Batch(changed, mask)).raw, told)


def test_the_newest_row_unobserved_costs_no_reconstruction_and_the_rest_explains_it() -> None:
    net, batch = make().eval(), contexts(waves(20, 6))
    mask = batch.context_mask.clone()
    mask[:, -1] = False
    with torch.no_grad():
        found = net.free_energy(Batch(batch.context, mask))
    assert not found.reconstruction.any()
    assert bool(torch.isfinite(found.divergence).all())
    assert bool(torch.isfinite(found.expected).all())


def test_training_draws_and_adds_the_free_energy_and_a_forecast_does_neither() -> None:
    net, batch = make(params=2), contexts(waves(30, 7))
    torch.manual_seed(0)
    first, second = net(batch), net(batch)
    assert not torch.equal(first.raw, second.raw)
    assert first.raw.shape == (len(batch.context), H, V, 2)
    assert first.aux_losses is not None
    first.aux_losses["free_energy"].backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
    assert net.eval()(batch).aux_losses is None


def test_half_precision_regions_change_nothing() -> None:
    net, batch = make().eval(), contexts(waves(20, 8))
    with torch.no_grad():
        plain = net(batch).raw
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(batch).raw, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": [3, 2]}, "model.latents has 2 entries, model.units has 1"),
        ({"time_constants": []}, "model.time_constants has 0 entries"),
        ({"time_constants": [0.5]}, "0.5 is below 1 step"),
        ({"units": [0]}, "at least 1"),
        ({"units": [], "latents": [], "time_constants": []}, "at least one level"),
        ({"meta_prior": [0.1, 0.2]}, "model.meta_prior has 2 entries"),
        ({"meta_prior": -1.0}, "-1.0 is negative"),
        ({"window": L + 1}, f"{L + 1} rows are more than the context of {L}"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_defaults_fit_short_contexts() -> None:
    for length in (1, 3, 40):
        model = PVRNN(PVRNNConfig(), DataSpec(context_length=length, horizon=1, num_variates=1))
        assert model.window == min(16, length)
