"""Training of seeds side by side: windows, the optimiser, independence of groups, safety."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.dynamics import module
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.network import Reconstruction
from tsforge.dynamics.radam import GroupedRAdam
from tsforge.dynamics.windows import RandomWindows

SERIES = np.stack([np.sin(np.arange(400) * 0.2), np.cos(np.arange(400) * 0.2)], axis=1)


def config(**changes: Any) -> ReconstructionConfig:
    plain: dict[str, Any] = {
        "data": {"path": "x.parquet"},
        "model": {"hidden": 8},
        "train": {"epochs": 3, "batches_per_epoch": 6, "batch_size": 4, "sequence_length": 10},
    }
    for name, value in changes.items():
        plain[name] = {**plain.get(name, {}), **value}
    return validate(ReconstructionConfig, plain)


def test_steps_of_the_forcing_are_counted_over_the_whole_training() -> None:
    """With 6 steps an epoch, every 4th: steps 4, 8, 12, ... and not the 4th of each epoch; every 7th is not never."""

    def kappas(interval: int) -> list[bool]:
        settings = config(train={"epochs": 4}, forcing={"interval": interval})
        return [row["kappa"][0] == row["kappa"][0] for row in train_seeds([SERIES], settings, [0]).trace]

    assert kappas(7) == [False, True, True, True]
    seen: list[int] = []
    original = Reconstruction._estimate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconstruction, "_estimate", lambda *args: seen.append(1) or original(*args))
        train_seeds([SERIES], config(forcing={"interval": 4}), [0])
    assert len(seen) == 18 // 4


def test_an_interval_of_sparse_forcing_that_forces_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(forcing={"method": "sparse"})
    monkeypatch.setattr(module, "forcing_interval", lambda series: 10)
    with pytest.raises(ConfigError, match=r"sparse forcing of 10 steps.*sequence_length=10 are not longer"):
        train_seeds([SERIES], settings, [0])
    monkeypatch.setattr(module, "forcing_interval", lambda series: 9)
    assert train_seeds([SERIES], settings, [0]).network.schedule.tau == 9


def test_windows_stay_inside_a_trajectory_and_reach_its_last_row() -> None:
    first, second = torch.arange(8.0)[:, None], 100 + torch.arange(7.0)[:, None]
    windows = RandomWindows([first, second], 4, [0])
    starts = windows.draw(200, 8)
    assert starts.shape == (200, 1, 1, 8)
    seen = torch.cat([windows.gather(row) for row in starts], dim=2)
    assert seen.shape == (1, 5, 1600, 1)
    assert bool((seen.diff(dim=1) == 1).all())
    assert set(seen[0, 0, :, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 100.0, 101.0, 102.0}


def test_a_window_longer_than_every_trajectory_is_refused() -> None:
    with pytest.raises(DataError, match="sequence_length"):
        RandomWindows([torch.zeros(4, 1), torch.zeros(5, 1)], 5, [0])


def test_the_optimiser_is_radam_for_every_group() -> None:
    torch.manual_seed(0)
    start, target = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimiser, reference = GroupedRAdam([mine], None), torch.optim.RAdam([theirs], lr=0.05)
    for _ in range(40):  # passes the step from which the variance is rectified
        optimiser.step((mine - target).pow(4).sum((1, 2)), 0.05)
        reference.zero_grad()
        (theirs - target).pow(4).sum().backward()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_gradients_are_clipped_group_by_group() -> None:
    weights = torch.nn.Parameter(torch.zeros(2, 1))
    optimiser = GroupedRAdam([weights], 1.0)
    optimiser.step(torch.stack([1000 * weights[0, 0], 0.5 * weights[1, 0]]), 1.0)
    torch.testing.assert_close(weights.detach(), torch.tensor([[-1.0], [-0.5]]), rtol=1e-5, atol=0)


def test_a_group_that_is_not_finite_skips_the_step_alone() -> None:
    weights = torch.nn.Parameter(torch.ones(2, 1))
    optimiser = GroupedRAdam([weights], 10.0)
    bad = optimiser.step(torch.stack([weights[0, 0] * float("nan"), weights[1, 0]]), 0.1)
    assert bad.tolist() == [True, False]
    assert weights[0, 0] == 1.0
    assert weights[1, 0] < 1.0
    saved = optimiser.snapshot()
    optimiser.step(weights.square().sum(1), 0.1)
    moved = weights.detach().clone()
    optimiser.restore(saved, torch.tensor([True, False]), 0.5)
    assert weights[0, 0] == 1.0
    assert weights[1, 0] == moved[1, 0]
    assert optimiser.rate_scale.flatten().tolist() == [0.5, 1.0]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_seed_trains_alike_alone_and_beside_others(noise: float) -> None:
    settings = config(train={"noise": noise})
    together = train_seeds([SERIES], settings, [3, 7]).network
    alone = train_seeds([SERIES], settings, [7]).network
    for (name, many), one in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(many[1], one[0], rtol=2e-4, atol=2e-5, msg=name)
    torch.testing.assert_close(together.schedule.alpha[1], alone.schedule.alpha[0], rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_traces_it() -> None:
    training = train_seeds([SERIES], config(train={"epochs": 150, "learning_rate": 1e-2}), [0, 1])
    first, last = training.trace[0], training.trace[-1]
    assert last["epoch"] == 150
    assert all(after < 0.5 * before for before, after in zip(first["loss"], last["loss"], strict=True))
    assert training.failed_steps == [0, 0]
    assert all(after < before for before, after in zip(first["alpha"], last["alpha"], strict=True))


def test_a_broken_group_is_restored_counted_and_forced_more(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Reconstruction.loss, [0]

    def broken(self: Reconstruction, *args: Any) -> torch.Tensor:
        calls[0] += 1
        loss = original(self, *args)
        return loss * torch.tensor([float("nan"), 1.0]) if calls[0] == 8 else loss  # step 2 of epoch 2

    settings = config(forcing={"method": "constant", "start": 0.2})
    fine = train_seeds([SERIES], settings, [0, 1]).network
    monkeypatch.setattr(Reconstruction, "loss", broken)
    training = train_seeds([SERIES], settings, [0, 1])
    assert (training.failed_steps, training.restored) == ([1, 0], [1, 0])
    assert training.network.schedule.alpha.tolist() == pytest.approx([0.28, 0.2])
    for mine, theirs in zip(training.network.parameters(), fine.parameters(), strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine[1], theirs[1])


def test_a_failed_epoch_ends_where_the_last_fine_one_began_at_half_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group 0 fails in epochs 2 and 3, group 1 in epoch 3 only; states are those at the start of each epoch."""
    original, starts, calls = Reconstruction.loss, [], [0]
    optimisers: list[GroupedRAdam] = []

    def broken(self: Reconstruction, *args: Any) -> torch.Tensor:
        if calls[0] % 6 == 0:
            starts.append(torch.cat([part.detach().flatten(1) for part in self.parameters()], dim=1))
        calls[0] += 1
        nan = float("nan")
        factors = {8: [nan, 1.0], 15: [nan, nan]}.get(calls[0], [1.0, 1.0])
        return original(self, *args) * torch.tensor(factors)

    class Kept(GroupedRAdam):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            optimisers.append(self)

    monkeypatch.setattr(Reconstruction, "loss", broken)
    monkeypatch.setattr(module, "GroupedRAdam", Kept)
    training = train_seeds([SERIES], config(), [0, 1])
    final = torch.cat([part.detach().flatten(1) for part in training.network.parameters()], dim=1)
    assert torch.equal(final[0], starts[0][0])
    assert torch.equal(final[1], starts[1][1])
    assert not torch.equal(starts[1][1], starts[0][1])
    assert optimisers[0].rate_scale.flatten().tolist() == [0.25, 0.5]
    assert (training.failed_steps, training.restored) == ([2, 1], [2, 1])


def test_the_learning_rate_falls_by_a_constant_factor_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = GroupedRAdam.step

    def noted(self: GroupedRAdam, loss: torch.Tensor, rate: float) -> torch.Tensor:
        rates.append(rate)
        return original(self, loss, rate)

    monkeypatch.setattr(GroupedRAdam, "step", noted)
    train_seeds([SERIES], config(train={"learning_rate": 1e-2, "learning_rate_end": 1e-5}), [0])
    assert rates == pytest.approx([1e-2] * 6 + [1e-3] * 6 + [1e-4] * 6)


@pytest.mark.parametrize("place", ["window", "inputs"])
def test_noise_is_on_the_window_or_leaves_the_targets_clean(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Reconstruction.loss

    def noted(self: Reconstruction, x: torch.Tensor, targets: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append((x, targets))
        return original(self, x, targets, *args)

    monkeypatch.setattr(Reconstruction, "loss", noted)
    train_seeds([SERIES], config(train={"noise": 0.3, "noise_on": place}), [0, 1])
    noise = []
    for x, targets in seen:
        if place == "window":
            assert torch.equal(targets, x[:, 1:])
        # the wave tells clean rows: sin^2 + cos^2 = 1
        assert bool(((targets.square().sum(-1) - 1).abs().amax() < 1e-5) == (place == "inputs"))
        if place == "inputs":
            noise.append(x[:, 1:] - targets)
    if place == "inputs":
        assert float(torch.stack(noise).std()) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    "model",
    [
        {"observation": "affine", "latent": 3},
        {"observation": "affine", "latent": 2, "bias": True},
        {"latent": 4},
        {"latent": 1, "observation": "affine"},
    ],
)
def test_the_short_way_for_complete_data_equals_the_read_out(model: dict[str, Any]) -> None:
    settings = config(model=model)
    network = Reconstruction(settings.model, settings.forcing, 2, [0, 1]).double()
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    z1, forced = network.inferred(x)
    expected = network.observation.forcing(x[:, 1:])
    torch.testing.assert_close(z1, network.observation.initial(x[:, 0]))
    torch.testing.assert_close(forced.states, expected.states)
    torch.testing.assert_close(forced.reach, expected.reach)


def test_missing_values_are_neither_forced_nor_in_the_loss() -> None:
    holes = SERIES.copy()
    holes[::3, 1] = np.nan
    training = train_seeds([holes], config(train={"epochs": 20, "learning_rate": 1e-2}), [0])
    assert training.failed_steps == [0]
    assert training.trace[-1]["loss"][0] < training.trace[0]["loss"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"kind": "deep"}, "forcing": {"method": "constant", "start": 0.2}},
        {"model": {"kind": "almost_linear", "latent": 4, "hidden": None, "rectified": 2}},
        {"forcing": {"method": "sparse"}},
        {"forcing": {"method": "none"}, "train": {"lambda_mar": 0.1}},
    ],
)
def test_every_kind_of_map_and_forcing_trains_and_runs(changes: dict[str, Any]) -> None:
    training = train_seeds([SERIES], config(**changes), [0])
    assert np.isfinite(training.trace[-1]["loss"]).all()
    model = training.network.group(0)
    states = model.run(model.initial(torch.from_numpy(SERIES[:3])), 4)
    step = model.step(states[2])
    torch.testing.assert_close(states[3], step)


def test_adaptive_forcing_of_a_deep_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="deep"):
        train_seeds([SERIES], config(model={"kind": "deep"}), [0])


@pytest.mark.parametrize(
    ("plain", "fragment"),
    [
        ({"data": {}}, "path"),
        ({"data": {"path": "a", "test": "b", "split": 0.5}}, "exclude each other"),
        ({"data": {"path": "a", "test_every": 2}}, "belong to a test file"),
        ({"data": {"path": "a"}, "seeds": [1, 1]}, "distinct"),
        ({"data": {"path": "a"}, "forcing": {"method": "none", "start": 0.5}}, "no part"),
    ],
)
def test_settings_that_contradict_each_other(plain: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        validate(ReconstructionConfig, plain)


def test_a_number_of_seeds_counts_from_zero() -> None:
    assert validate(ReconstructionConfig, {"data": {"path": "a"}, "seeds": 3}).seeds == (0, 1, 2)
    with pytest.raises(ConfigError, match="seeds: give at least one seed"):
        validate(ReconstructionConfig, {"data": {"path": "a"}, "seeds": 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_too() -> None:
    training = train_seeds([SERIES], config(train={"accelerator": "gpu", "epochs": 30, "learning_rate": 1e-2}), [0, 1])
    assert training.device != "cpu"
    assert training.failed_steps == [0, 0]
    assert np.all(np.array(training.trace[-1]["loss"]) < training.trace[0]["loss"])
    assert {part.device.type for part in training.network.parameters()} == {"cpu"}
