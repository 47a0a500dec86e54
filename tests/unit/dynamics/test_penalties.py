"""The penalty on what a unit of an almost-linear map takes over from itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.network import Reconstruction
from tsforge.layers.plrnn import make_map

ALMOST = {"kind": "almost_linear", "latent": 3, "rectified": 1}


def config(model: dict[str, Any], **train: Any) -> ReconstructionConfig:
    size = {"epochs": 40, "batches_per_epoch": 5, "batch_size": 4, "sequence_length": 8, "learning_rate": 1e-2}
    forcing = {"method": "constant", "start": 0.5}
    plain = {"data": {"path": "a"}, "model": model, "forcing": forcing, "train": size | {"lambda_lat": 0.0} | train}
    return validate(ReconstructionConfig, plain)


def test_the_penalty_is_the_norm_of_what_exceeds_the_limit() -> None:
    almost = make_map("almost_linear", 3, rectified=1, seeds=[0, 1]).double()
    with torch.no_grad():
        almost.raw_A.copy_(torch.tensor([[0.9, 0.5, -2.0], [0.1, 0.2, 0.3]]))
        almost.W.fill_(5.0)  # off the diagonal it has no part
        almost.W.diagonal(dim1=1, dim2=2).copy_(torch.tensor([[0.2, 0.75, 0.1], [0.0, 0.1, 0.2]]))
    found = almost.self_penalty(0.95)
    assert found[0].item() == pytest.approx(math.hypot(0.15, 0.3))
    assert found[1].item() == 0
    found.sum().backward()
    assert almost.raw_A.grad is not None
    assert almost.raw_A.grad[0].tolist() == pytest.approx(
        [0.15 / math.hypot(0.15, 0.3), 0.3 / math.hypot(0.15, 0.3), 0]
    )
    assert almost.raw_A.grad[1].tolist() == [0, 0, 0]  # not NaN: a norm has no slope at 0


def test_the_loss_has_the_penalty_with_its_weight_and_limit() -> None:
    x = torch.zeros(2, 9, 4, 2)
    losses = []
    for train in ({}, {"lambda_self": 0.3}, {"lambda_self": 0.3, "self_limit": -1.0}):
        settings = config(ALMOST, **train)
        network = Reconstruction(settings.model, settings.forcing, 2, [0, 1])
        losses.append(network.loss(x, x[:, 1:], settings.train, 1, True).detach())
    penalties = [0.3 * network.map.self_penalty(limit).detach() for limit in (0.95, -1.0)]
    torch.testing.assert_close(losses[1] - losses[0], penalties[0])
    torch.testing.assert_close(losses[2] - losses[0], penalties[1])
    assert bool((penalties[1] > penalties[0]).all())


@pytest.mark.parametrize(
    ("name", "model", "others"),
    [
        ("lambda_lat", {"hidden": 5}, {}),
        ("lambda_obs", {"hidden": 5, "observation": "affine", "latent": 3}, {}),
        ("lambda_mar", {"kind": "plrnn", "latent": 4}, {"mar_ratio": 0.3}),
    ],
)
def test_the_loss_has_every_other_penalty_with_its_weight(
    name: str, model: dict[str, Any], others: dict[str, Any]
) -> None:
    x = torch.zeros(2, 9, 4, 2)
    losses = []
    for train in ({}, {name: 0.3, **others}):
        settings = config(model, **train)
        network = Reconstruction(settings.model, settings.forcing, 2, [0, 1])
        losses.append(network.loss(x, x[:, 1:], settings.train, 1, True).detach())
    expected = {
        "lambda_lat": network.map.penalty(),
        "lambda_obs": network.observation.penalty(),
        "lambda_mar": network.map.mar_penalty(0.3),
    }[name]
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * expected.detach())


def test_training_keeps_the_units_below_the_limit() -> None:
    """A ramp wants a multiplier above 1."""
    series = np.exp(0.05 * np.arange(60.0))[:, None]
    ends = []
    for weight in (0.0, 10.0):
        settings = config({"kind": "almost_linear", "latent": 1, "rectified": 0}, lambda_self=weight)
        almost = train_seeds([series], settings, [0]).network.map
        ends.append(float((almost.A + almost.get_parameter("W").diagonal(dim1=1, dim2=2)).detach().max()))
    assert ends[1] < 0.99 < 1.01 < ends[0]


@pytest.mark.parametrize(
    ("model", "train", "fragment"),
    [
        ({"kind": "plrnn"}, {"lambda_self": 0.1}, "model.kind=almost_linear"),
        (ALMOST, {"self_limit": 0.9}, "no part without"),
    ],
)
def test_a_penalty_without_its_map_or_weight_is_refused(
    model: dict[str, Any], train: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ConfigError, match=fragment):
        config(model, **train)
    with pytest.raises(ConfigError, match="almost_linear"):
        make_map("plrnn", 2, seeds=[0]).self_penalty(0.95)
