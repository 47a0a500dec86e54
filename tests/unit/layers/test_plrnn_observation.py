"""Read-outs of piecewise-linear recurrent networks: inversion, gradients and missing entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.plrnn import make_map
from tsforge.layers.plrnn_observation import Observation, make_observation
from tsforge.ops.plrnn import gtf_loop, gtf_sequence


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(observed: int, latent: int, *, bias: bool = False) -> Observation:
    read = make_observation("affine", observed, latent, seeds=[0, 1], bias=bias).double()
    if bias:
        with torch.no_grad():
            read.b.copy_(draws(2, observed, seed=7))
    return read


def test_identity_reads_and_forces_the_first_units() -> None:
    read = make_observation("identity", 2, 5, seeds=[0, 1]).double()
    x = draws(2, 4, 3, 2)
    z1 = read.initial(x[:, 0])
    assert torch.equal(read.observe(z1), x[:, 0])
    torch.testing.assert_close(z1[1, 2, 2:], read.L[1] @ x[1, 0, 2])
    states, reach = read.forcing(x)
    assert torch.equal(states[..., :2], x)
    assert reach.tolist() == [1, 1, 0, 0, 0]
    assert not states.requires_grad
    z1.sum().backward()
    assert read.L.grad.abs().sum() > 0
    assert read.penalty().tolist() == [0, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("observed", "latent"), [(6, 4), (4, 4), (3, 4)])
def test_affine_inverts_its_read_out(observed: int, latent: int, bias: bool) -> None:
    read = affine(observed, latent, bias=bias)
    x = draws(2, 5, 3, observed)
    states, reach = read.forcing(x)
    offset = read.b.detach().numpy() if bias else np.zeros((2, observed))
    for g in range(2):
        rows = x[g].reshape(-1, observed).numpy() - offset[g]
        expected = np.linalg.lstsq(read.B[g].detach().numpy(), rows.T, rcond=None)[0].T
        np.testing.assert_allclose(states[g].reshape(-1, latent).numpy(), expected, atol=1e-10)
    assert reach.tolist() == [1] * latent
    assert not states.requires_grad
    torch.testing.assert_close(read.initial(x[:, 0]), states[:, 0])
    if observed <= latent:
        torch.testing.assert_close(read.observe(states), x)


def test_the_first_state_carries_gradients_to_the_read_out() -> None:
    read = affine(6, 4, bias=True)
    read.initial(draws(2, 3, 6)).square().sum().backward()
    assert read.B.grad.abs().sum() > 0
    assert read.b.grad.abs().sum() > 0


def test_condition_penalty() -> None:
    read = affine(6, 4)
    condition = np.linalg.cond(read.B[1].detach().numpy())
    assert read.penalty()[1].item() == pytest.approx((1 - condition) ** 2, rel=1e-8)


def test_initial_values_depend_on_the_seed_of_the_group_alone() -> None:
    for kind, latent in (("identity", 9), ("affine", 4)):
        grouped = make_observation(kind, 6, latent, seeds=[4, 5])
        alone = make_observation(kind, 6, latent, seeds=[5])
        for one, other in zip(grouped.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one[1], other[0])
    assert make_observation("affine", 200, 8, seeds=[0]).B.std().item() == pytest.approx(0.5, rel=0.1)


def forced(read: Observation, x: Tensor, alpha: float) -> Tensor:
    built = make_map("clipped_shallow", read.latent, 8, seeds=[0, 1]).double()
    states, reach = read.forcing(x[:, 1:])
    strength = alpha * reach if reach.ndim == 4 else (alpha * reach).expand(2, -1)
    with torch.no_grad():
        z = gtf_sequence(read.initial(x[:, 0]), states, strength, built.shallow(), clipped=True, backend="reference")
    return z


def test_checklist_8_12_a_missing_entry_of_the_identity_is_not_forced() -> None:
    read = make_observation("identity", 3, 4, seeds=[0, 1]).double()
    built = make_map("clipped_shallow", 4, 8, seeds=[0, 1]).double()
    x = draws(2, 7, 2, 3)
    holes = x.clone()
    holes[0, 3, 1, 2] = holes[1, 5, 0, 0] = math.nan
    alpha = torch.full((2, 6, 2, 4), 0.4, dtype=torch.float64)
    alpha[..., 3] = 0
    alpha[0, 2, 1, 2] = alpha[1, 4, 0, 0] = 0
    with torch.no_grad():
        expected = gtf_loop(built.step, read.initial(x[:, 0]), read.forcing(x[:, 1:]).states, alpha)
    torch.testing.assert_close(forced(read, holes, 0.4), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(forced(read, x, 0.4), expected)


@pytest.mark.parametrize(("kind", "observed"), [("identity", 3), ("affine", 6), ("affine", 3)])
def test_checklist_8_12_a_masked_stretch_is_a_free_run(kind: str, observed: int) -> None:
    read = make_observation(kind, observed, 4, seeds=[0, 1]).double()
    built = make_map("clipped_shallow", 4, 8, seeds=[0, 1]).double()
    x = draws(2, 9, 2, observed)
    x[:, 4:] = math.nan
    z = forced(read, x, 0.4)
    with torch.no_grad():
        follow = z[:, 3]
        for k in range(4, 8):
            follow = built.step(follow)
            torch.testing.assert_close(z[:, k], follow, rtol=1e-12, atol=1e-12)


def test_checklist_8_12_affine_takes_least_squares_on_the_observed_rows() -> None:
    read = affine(6, 3, bias=True)
    x = draws(2, 4, 3, 6)
    x[0, 1, 2, [0, 4]] = math.nan  # four rows left for three units
    x[1, 2, 0, :4] = math.nan  # two rows: the state is not determined
    states, reach = read.forcing(x)
    rows = [1, 2, 3, 5]
    B, b = read.B[0].detach().numpy(), read.b[0].detach().numpy()
    expected = np.linalg.lstsq(B[rows], x[0, 1, 2, rows].numpy() - b[rows], rcond=None)[0]
    np.testing.assert_allclose(states[0, 1, 2].numpy(), expected, atol=1e-10)
    assert reach[0, 1, 2].tolist() == [1, 1, 1]
    assert reach[1, 2, 0].tolist() == [0, 0, 0]
    assert not states[1, 2, 0].any()
    assert reach.sum() == 2 * 4 * 3 * 3 - 3
    whole = read.forcing(torch.nan_to_num(x)).states
    torch.testing.assert_close(states[0, 0], whole[0, 0])


def test_a_first_state_exists_whatever_is_missing() -> None:
    x1 = draws(2, 3, 3)
    x1[0, 1, 0] = math.nan
    x1[1, 2] = math.nan
    read = make_observation("identity", 3, 5, seeds=[0, 1]).double()
    assert read.initial(x1)[0, 1, 0] == 0
    assert torch.isfinite(read.initial(x1)).all()
    plain = affine(3, 3)
    z1 = plain.initial(x1)
    assert not z1[1, 2].any()
    torch.testing.assert_close(plain.observe(z1)[0, 1, 1:], x1[0, 1, 1:])
    z1.square().sum().backward()
    assert torch.isfinite(plain.B.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "afine", "observed": 2, "latent": 2}, "did you mean 'affine'"),
        ({"kind": "identity", "observed": 3, "latent": 2}, "needs latent >= 3"),
        ({"kind": "identity", "observed": 2, "latent": 2, "bias": True}, "no bias"),
        ({"kind": "affine", "observed": 0, "latent": 2}, "at least 1"),
    ],
)
def test_bad_settings_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_observation(**options)


def test_observations_of_the_wrong_shape_are_told() -> None:
    with pytest.raises(ModelError, match="G = 2 and N = 3"):
        affine(3, 3).forcing(torch.zeros(2, 4, 3))
