"""The loss of a window against the recurrence written out, one sample and step after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.network import Reconstruction
from tsforge.ops.plrnn_jacobian import jacobians

G, T, B, N, K = 2, 6, 3, 2, 1


def network(inputs: int = 0, **plain: Any) -> tuple[Reconstruction, ReconstructionConfig]:
    settings = validate(ReconstructionConfig, {"data": {"path": "a"}, "train": {"lambda_lat": 0.0}} | plain)
    return Reconstruction(settings.model, settings.forcing, N, [0, 1], inputs=inputs, tau=None).double(), settings


def windows(holes: bool = False) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(G, T + 1, B, N)))
    if holes:
        x[:, 2, :, 0] = x[:, 4, 1] = float("nan")
    return x


def expected(net: Reconstruction, x: torch.Tensor, alpha: list[float], s: torch.Tensor | None) -> np.ndarray:
    """Return the mean squared errors (G,) of identity read-outs; ``alpha`` of each step after its prediction."""
    losses = []
    for g in range(G):
        errors = []
        for b in range(B):
            z = net.observation.initial(x[:, 0])[g, b]
            for k in range(T):
                both = torch.zeros(G, 1, len(z), dtype=torch.float64)
                both[g, 0] = z
                z = net.map.step(both)[g, 0]
                if s is not None:
                    assert net.map.C is not None
                    z = z + net.map.C[g] @ s[g, k, b]
                target = x[g, k + 1, b]
                seen = ~target.isnan()
                errors += ((z[:N] - target)[seen] ** 2).tolist()
                mixed = z.clone()
                mixed[:N][seen] = ((1 - alpha[k]) * z[:N] + alpha[k] * target)[seen]
                z = mixed
        losses.append(np.mean(errors))
    return np.array(losses)


CONSTANT = {"forcing": {"method": "constant", "start": 0.35}}


@pytest.mark.parametrize("latent", [N, 4])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("kind", ["clipped_shallow", "deep"])
def test_the_loss_is_that_of_unforced_predictions(kind: str, driven: bool, holes: bool, latent: int) -> None:
    net, settings = network(K if driven else 0, model={"kind": kind, "hidden": 5, "latent": latent}, **CONSTANT)
    x = windows(holes)
    s = torch.from_numpy(np.random.default_rng(1).normal(size=(G, T, B, K))) if driven else None
    found = net.loss(x, x[:, 1:], settings.train, 1, not holes, s)
    with torch.no_grad():
        np.testing.assert_allclose(found.detach(), expected(net, x, [0.35] * T, s), rtol=1e-10)


@pytest.mark.parametrize(
    ("forcing", "alpha"),
    [({"method": "none"}, [0.0] * T), ({"method": "sparse", "tau": 2}, [0.0, 1.0] * 3), ({}, [1.0] * T)],
)
def test_the_method_of_forcing_sets_alpha(forcing: dict[str, Any], alpha: list[float]) -> None:
    net, settings = network(model={"hidden": 5}, forcing=forcing)
    x = windows()
    with torch.no_grad():
        np.testing.assert_allclose(
            net.loss(x, x[:, 1:], settings.train, 1, True), expected(net, x, alpha, None), rtol=1e-10
        )


@pytest.mark.parametrize("every", [1, 4])
def test_alpha_follows_the_jacobians_at_every_so_many_th_forcing_signal(every: int) -> None:
    net, settings = network(model={"hidden": 5}, forcing={"interval": 3}, train={"estimate_every": every})
    with torch.no_grad():
        for part in net.map.parameters():
            part.mul_(3)
    x = windows()
    net.loss(x, x[:, 1:], settings.train, 2, True)
    assert net.schedule.alpha.tolist() == [1.0, 1.0]  # not due
    net.loss(x, x[:, 1:], settings.train, 3, True)
    norms = torch.linalg.matrix_norm(jacobians(net.map.shallow(), x[:, 1::every], clipped=True), 2)
    kappa = norms.log().mean(1).exp().amax(1).detach()
    torch.testing.assert_close(net.last_kappa, kappa)
    torch.testing.assert_close(net.schedule.alpha, 0.999 + 0.001 * (1 - 1 / kappa).clamp(min=0))
