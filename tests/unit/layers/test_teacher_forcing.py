"""Strength of teacher forcing over training: the adaptive rule, sparse forcing, the interval from data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.forcing_interval import forcing_interval, predictability_interval
from tsforge.layers.teacher_forcing import AlphaSchedule, ForcingConfig


def kappa_of(alpha: float) -> float:
    return 1 / (1 - alpha)


def test_checklist_8_7_alpha_trace_of_scripted_estimates() -> None:
    schedule = AlphaSchedule(ForcingConfig(start=0.5, decay=0.9, interval=2), groups=2)
    scripted = [([0.9, 0.1], None), ([0.2, 0.8], [0.47, 0.8]), ([0.9, 0.9], None), ([0.6, 0.0], [0.6, 0.72])]
    before = [0.5, 0.5]
    for step, (estimates, after) in enumerate(scripted, start=1):
        assert schedule.due(step) == (after is not None)
        schedule.update(step, torch.tensor([kappa_of(a) for a in estimates], dtype=torch.float64))
        before = before if after is None else after
        assert schedule.alpha.tolist() == pytest.approx(before, abs=1e-12)
    schedule.update(6, torch.tensor(0.5))  # a contracting map: the estimate is 0, for both groups
    assert schedule.alpha.tolist() == pytest.approx([0.54, 0.648], abs=1e-12)


def test_checklist_8_7_falls_to_a_half_in_about_70_epochs_of_50_steps() -> None:
    schedule = AlphaSchedule(ForcingConfig())
    assert schedule.alpha.item() == 1.0
    epochs = 0
    while schedule.alpha.item() > 0.5:
        epochs += 1
        for step in range(1, 51):
            schedule.update(step, torch.tensor(1.0))
    assert epochs == math.ceil(math.log(0.5) / math.log(0.999) / 10)


def test_checklist_8_7_survives_a_checkpoint() -> None:
    first = AlphaSchedule(ForcingConfig(), groups=2)
    first.update(5, torch.tensor([1.0, 1.2]))
    second = AlphaSchedule(ForcingConfig(), groups=2)
    second.load_state_dict(first.state_dict())
    for step in (10, 15):
        first.update(step, torch.tensor([1.1, 3.0]))
        second.update(step, torch.tensor([1.1, 3.0]))
    assert torch.equal(first.alpha, second.alpha)
    assert first.alpha[0] != 1.0
    assert list(first.parameters()) == []


def test_a_broken_estimate_changes_nothing_and_an_infinite_one_forces_fully() -> None:
    schedule = AlphaSchedule(ForcingConfig(start=0.3), groups=2)
    schedule.update(5, torch.tensor([math.nan, math.inf]))
    assert schedule.alpha.tolist() == [0.3, 1.0]
    with pytest.raises(ModelError, match="kappa"):
        schedule.update(5, torch.ones(3))


def test_constant_and_none_stay() -> None:
    for config, value in ((ForcingConfig(method="constant", start=0.15), 0.15), (ForcingConfig(method="none"), 0.0)):
        schedule = AlphaSchedule(config, groups=2)
        schedule.update(5, torch.tensor(9.0))
        assert schedule.alpha_for(4).tolist() == [value, value]


def test_lift_raises_the_marked_groups_only() -> None:
    schedule = AlphaSchedule(ForcingConfig(method="constant", start=0.5), groups=2)
    assert schedule.lift(torch.tensor([False, True]), 0.2)
    assert schedule.alpha.tolist() == pytest.approx([0.5, 0.6])
    assert not AlphaSchedule(ForcingConfig(method="sparse", tau=3)).lift(torch.tensor([True]))


def test_sparse_forcing_replaces_every_tau_th_state() -> None:
    schedule = AlphaSchedule(ForcingConfig(method="sparse", tau=3))
    # entry k follows state t = k + 2; forced where (t - 1) mod 3 == 0
    assert schedule.alpha_for(7).tolist() == [float((t - 1) % 3 == 0) for t in range(2, 9)]
    assert AlphaSchedule(ForcingConfig(method="sparse", tau=1)).alpha_for(4).tolist() == [1] * 4
    assert AlphaSchedule(ForcingConfig(method="sparse"), tau=5).alpha_for(4).tolist() == [0] * 4


def test_strength_is_alpha_times_reach_in_the_least_shape() -> None:
    reach = torch.tensor([1.0, 1.0, 0.0])
    whole = torch.ones(2, 4, 5, 3)
    whole[1, 2, 3, 0] = 0
    constant = AlphaSchedule(ForcingConfig(method="constant", start=0.25), groups=2)
    assert constant.strength(4).tolist() == [0.25, 0.25]
    assert constant.strength(4, reach).tolist() == [[0.25, 0.25, 0.0]] * 2
    assert torch.equal(constant.strength(4, whole), 0.25 * whole)
    sparse = AlphaSchedule(ForcingConfig(method="sparse", tau=2), groups=2)
    found = sparse.strength(4, reach)
    assert found.shape == (2, 4, 3)
    assert found[1].tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]
    taken = torch.tensor([0.0, 1.0, 0.0, 1.0])[None, :, None, None]
    assert torch.equal(sparse.strength(4, whole), taken * whole)
    with pytest.raises(ModelError, match="reach"):
        sparse.strength(4)
    with pytest.raises(ModelError, match="T = 5"):
        constant.strength(5, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "constant"}, "needs start"),
        ({"method": "constant", "start": 0.1, "decay": 0.9}, "decay has no part"),
        ({"method": "adaptive", "tau": 5}, "tau has no part"),
        ({"method": "none", "start": 0.5}, "start has no part"),
        ({"method": "constant", "start": 1.5}, "less than or equal to 1"),
    ],
)
def test_contradicting_settings_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ForcingConfig(**settings)


def test_schedules_that_cannot_be_are_told() -> None:
    with pytest.raises(ConfigError, match="needs tau"):
        AlphaSchedule(ForcingConfig(method="sparse"))
    with pytest.raises(ConfigError, match="tau = 4"):
        AlphaSchedule(ForcingConfig(), tau=4)
    with pytest.raises(ConfigError, match="groups"):
        AlphaSchedule(ForcingConfig(), groups=0)


def test_interval_of_a_smooth_process_is_its_decorrelation_time() -> None:
    noise = np.random.default_rng(0).standard_normal((40_000, 3))
    x = np.zeros_like(noise)
    for t in range(1, len(x)):
        x[t] = 0.9 * x[t - 1] + noise[t]
    x[100:140, 0] = math.nan
    assert 8 <= forcing_interval(x) <= 10  # 0.9^9.5 = 1/e; the information of a process of order 1 keeps falling


def test_interval_of_a_sine_is_below_its_quarter() -> None:
    t = np.arange(2000)
    x = np.stack([np.sin(2 * np.pi * t / 80), np.full(2000, 3.0)], axis=1)  # the constant variate is left out
    # cos(2 pi lag / 80) < 1/e from lag 16
    assert 1 <= forcing_interval(x) <= 16
    assert forcing_interval(x, bins=2) == 16
    assert forcing_interval(x, bins=2, max_lag=7) == 7


def test_intervals_that_cannot_be_told() -> None:
    with pytest.raises(ModelError, match="constant"):
        forcing_interval(np.ones((50, 2)))
    with pytest.raises(ModelError, match="constant or missing"):
        forcing_interval(np.full((50, 1), np.nan))
    with pytest.raises(ModelError, match="shape"):
        forcing_interval(np.ones(50))
    assert predictability_interval(0.009) == 77
    with pytest.raises(ModelError, match="positive"):
        predictability_interval(-1.0)
