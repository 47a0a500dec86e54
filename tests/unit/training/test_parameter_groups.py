"""Optimiser groups: every trainable parameter once, with the learning rate and decay that its layer asks for."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tsforge.contracts.model import OptimRule
from tsforge.contracts.tensors import DataSpec
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.module import TrainModule, parameter_groups

SPEC = DataSpec(context_length=24, horizon=4, num_variates=2, num_known=1, num_past=1, num_static=1)
SIZE = {"d_model": 8, "d_state": 8, "num_layers": 2, "patch_length": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "s4d": {"name": "s4", "kernel": "s4d", "skip": "learned", "head": "direct"},
    "s4": {"name": "s4", "kernel": "s4", "skip": "closed_form", "ridge": 10.0, "head": "masked"},
    "lru": {"name": "s4", "kernel": "lru", "skip": "none", "head": "rollout"},
    "lssl": {"name": "lssl", "fixed": False, "skip": "closed_form", "ridge": 10.0, "head": "direct"},
    "lssl-fixed": {"name": "lssl", "fixed": True, "skip": "none", "head": "direct"},
}
SLOW = {  # what sections 2.2 and 1.4 of the specification cap: dt, A, B (and P), never C or D
    "s4d": {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3, "B": 1e-3},
    "s4": {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3, "B": 1e-3, "P": 1e-3},
    "lru": {"log_decay": 1e-3, "frequency": 1e-3, "B": 1e-3},
    "lssl": {
        "log_dt": 1e-3,
        **dict.fromkeys(("tri_diagonal", "tri_upper", "tri_lower", "shift", "left", "right", "b"), 1e-4),
    },
    "lssl-fixed": {},
}
LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.1


def network(kind: str, likelihood: str = "point") -> ForecastNetwork:
    config = NetworkConfig.model_validate({"model": SIZE | NETWORKS[kind], "likelihood": {"name": likelihood}})
    return build_network(config, SPEC)


def settings_of(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return (learning rate, decay) of each parameter; fails where one is in two groups."""
    found: dict[int, tuple[float, float]] = {}
    for group in groups:
        assert group["params"], "an empty group"
        for parameter in group["params"]:
            assert id(parameter) not in found, "a parameter in two groups"
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    return found


def expected_of(kind: str, net: ForecastNetwork, rate: float, decay: float) -> dict[int, tuple[float, float]]:
    caps = SLOW[kind]
    found = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        inside = ".ssm." in name and leaf in caps
        found[id(parameter)] = (min(rate, caps[leaf]), 0.0) if inside else (rate, decay)
    return found


@pytest.mark.parametrize("rate", [0.01, 5e-4, 1e-5])
@pytest.mark.parametrize("kind", NETWORKS)
def test_checklist_20_every_parameter_once_and_slow_ones_slowly(kind: str, rate: float) -> None:
    net = network(kind)
    found = settings_of(parameter_groups(net, rate, WEIGHT_DECAY))
    assert found == expected_of(kind, net, rate, WEIGHT_DECAY)
    trainable = {id(part) for part in net.parameters() if part.requires_grad}
    assert set(found) == trainable
    slow = [pair for pair in found.values() if pair[1] == 0.0]
    assert len(slow) == 2 * len(SLOW[kind])  # two layers
    assert all(pair[0] <= 1e-3 for pair in slow)


def test_checklist_20_frozen_parameters_are_in_no_group() -> None:
    net = network("s4")
    frozen = [part for part in net.parameters() if not part.requires_grad]
    assert len(frozen) == 1  # the matrix of the closed form
    assert id(frozen[0]) not in settings_of(parameter_groups(net, 0.01, 0.0))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_checklist_20_the_optimiser_gets_exactly_these_groups(kind: str, schedule: Any) -> None:
    net = network(kind, likelihood="normal")
    config = TrainConfig(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, schedule=schedule)
    configured = TrainModule(net, config, total_steps=40).configure_optimizers()
    expected = expected_of(kind, net, LEARNING_RATE, WEIGHT_DECAY)
    if schedule == "constant":
        assert isinstance(configured, torch.optim.AdamW)
        assert settings_of(configured.param_groups) == expected
        return
    optimizer = configured["optimizer"]
    assert configured["lr_scheduler"]["interval"] == "step"
    scheduler = configured["lr_scheduler"]["scheduler"]
    peaks: dict[int, float] = {}
    for step in range(40):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                peaks[id(parameter)] = max(peaks.get(id(parameter), 0.0), group["lr"])
                assert group["weight_decay"] == expected[id(parameter)][1], step
        optimizer.step()
        if step < 39:
            scheduler.step()
    assert peaks == {key: pytest.approx(rate) for key, (rate, _) in expected.items()}  # the peak is the cap
    low = [group["lr"] for group in optimizer.param_groups]
    assert max(low) < 0.1 * LEARNING_RATE  # and both schedules end far below it


class Ruled(nn.Module):
    """Three parameters, two of them with a rule that says one thing each."""

    optim_rules: ClassVar[dict[str, OptimRule]] = {
        "capped": OptimRule(max_learning_rate=1e-4),
        "undecayed": OptimRule(weight_decay=0.0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.capped = nn.Parameter(torch.zeros(1))
        self.undecayed = nn.Parameter(torch.zeros(1))
        self.free = nn.Parameter(torch.zeros(1))


def test_a_rule_changes_only_what_it_says() -> None:
    module = Ruled()
    found = settings_of(parameter_groups(module, 0.02, 0.3))
    assert found[id(module.capped)] == (1e-4, 0.3)
    assert found[id(module.undecayed)] == (0.02, 0.0)
    assert found[id(module.free)] == (0.02, 0.3)
    assert settings_of(parameter_groups(module, 1e-6, 0.3))[id(module.capped)] == (1e-6, 0.3)  # a cap, not a value


def test_parameters_without_a_rule_come_first_in_one_group() -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    (only,) = parameter_groups(plain, 0.02, 0.3)
    assert [id(part) for part in only["params"]] == [id(part) for part in plain.parameters()]
    assert (only["lr"], only["weight_decay"]) == (0.02, 0.3)
    groups = parameter_groups(nn.Sequential(Ruled(), nn.Linear(2, 2)), 0.02, 0.3)
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.02, 0.3)
    assert len(groups[0]["params"]) == 3


def test_a_shared_parameter_is_in_one_group() -> None:
    first, second = Ruled(), nn.Linear(1, 1)
    second.bias = first.capped
    assert len(settings_of(parameter_groups(nn.Sequential(first, second), 0.02, 0.3))) == 4


def test_capped_parameters_move_less() -> None:
    """One step of AdamW moves a parameter by about its learning rate."""
    net = network("lssl")
    config = TrainConfig(learning_rate=LEARNING_RATE, weight_decay=0.0)
    optimizer = TrainModule(net, config, total_steps=1).configure_optimizers()
    before = {name: part.detach().clone() for name, part in net.named_parameters()}
    for part in net.parameters():
        part.grad = torch.ones_like(part) if part.requires_grad else None
    optimizer.step()
    for name, part in net.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        cap = SLOW["lssl"].get(leaf, LEARNING_RATE) if ".ssm." in name else LEARNING_RATE
        moved = float((part.detach() - before[name]).abs().max())
        assert moved == pytest.approx(cap if part.requires_grad else 0.0, rel=0.01, abs=1e-7), name
