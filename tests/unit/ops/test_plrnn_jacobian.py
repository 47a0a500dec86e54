"""Jacobians of shallow PLRNN maps and the estimates of their norm, against autograd and singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import plrnn_jacobian
from tsforge.ops.plrnn import Shallow, shallow_map
from tsforge.ops.plrnn_jacobian import jacobians, kappa

POINTWISE = ("product_upper_bound", "batch_maximum")
METHODS = ("arithmetic_mean", *POINTWISE, "jacobian_upper_bound")


def draw(latent: int, hidden: int, seed: int, groups: int | None = None) -> Shallow:
    generator = torch.Generator().manual_seed(seed)
    lead = () if groups is None else (groups,)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    return Shallow(
        0.5 * normal(latent),
        normal(latent, hidden) / hidden**0.5,
        normal(hidden, latent),
        normal(latent),
        normal(hidden),
    )


def states(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(params: Shallow, z: Tensor, clipped: bool) -> Tensor:
    """Jacobians of points (N, M), one after another."""
    return torch.stack([torch.autograd.functional.jacobian(lambda x: shallow_map(x, params, clipped), p) for p in z])


def by_definition(params: Shallow, z: Tensor, method: str, clipped: bool) -> float:
    steps, batch, latent = z.shape
    J = by_autograd(params, z.reshape(-1, latent), clipped).view(steps, batch, latent, latent)
    if method == "arithmetic_mean":
        return float(torch.linalg.svdvals(J.mean(0))[:, 0].max())
    norms = torch.linalg.svdvals(J)[..., 0]
    return float(norms.max() if method == "batch_maximum" else norms.log().mean(0).exp().max())


@pytest.mark.parametrize("clipped", [False, True])
def test_checklist_8_1_jacobians_equal_autograd(clipped: bool) -> None:
    params, z = draw(3, 7, 0), states(20, 3)
    torch.testing.assert_close(
        jacobians(params, z, clipped=clipped), by_autograd(params, z, clipped), rtol=0, atol=1e-12
    )
    assert jacobians(params, z.view(4, 5, 3), clipped=clipped).shape == (4, 5, 3, 3)
    assert jacobians(params, z[0], clipped=clipped).shape == (3, 3)


def test_groups_do_not_meet() -> None:
    params, z = draw(3, 7, 1, groups=2), states(2, 4, 5, 3)
    together = jacobians(params, z, clipped=True)
    for group in range(2):
        alone = Shallow(*(part[group] for part in params))
        torch.testing.assert_close(together[group], jacobians(alone, z[group], clipped=True))
        for method in METHODS:
            both = kappa(params, z, method, clipped=True)
            assert both.shape == (2,)
            torch.testing.assert_close(both[group], kappa(alone, z[group], method, clipped=True))


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("method", ["arithmetic_mean", *POINTWISE])
@pytest.mark.parametrize("latent", [1, 2, 3, 5, 8, 12, 20])
def test_estimates_equal_their_definition(latent: int, method: str, clipped: bool) -> None:
    params, z = draw(latent, 30, latent), states(13, 4, latent)
    expected = by_definition(params, z, method, clipped)
    assert float(kappa(params, z, method, clipped=clipped)) == pytest.approx(
        expected, rel=1e-2 if latent == 20 else 1e-3
    )


def test_single_precision_suffices() -> None:
    params, z = draw(3, 50, 5), states(200, 4, 3)
    exact = float(kappa(params, z, "batch_maximum"))
    single = kappa(Shallow(*(part.float() for part in params)), z.float(), "batch_maximum")
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(exact, rel=1e-4)


def test_the_parameter_bound_is_its_formula() -> None:
    params = draw(4, 9, 2)
    expected = params.A.abs().max() + torch.linalg.svdvals(params.W1)[0] * torch.linalg.svdvals(params.W2)[0]
    torch.testing.assert_close(kappa(params, states(3, 2, 4), "jacobian_upper_bound"), expected)


@pytest.mark.parametrize("latent", [1, 3, 12, 20])
@pytest.mark.parametrize("method", METHODS)
def test_checklist_8_6_a_linear_map_gives_the_norm_of_its_diagonal(method: str, latent: int) -> None:
    params = draw(latent, 9, 3)
    linear = params._replace(W1=torch.zeros_like(params.W1))
    assert float(kappa(linear, states(6, 2, latent), method)) == pytest.approx(float(params.A.abs().max()), rel=1e-9)


@pytest.mark.parametrize("latent", [3, 12, 20])
@pytest.mark.parametrize("clipped", [False, True])
def test_checklist_8_6_estimates_are_in_order(latent: int, clipped: bool) -> None:
    for seed in range(20):
        params, z = draw(latent, 25, seed), states(11, 3, latent, seed=seed)
        product, largest, bound = (float(kappa(params, z, method, clipped=clipped)) for method in METHODS[1:])
        assert product < largest < bound


@pytest.mark.parametrize("latent", [3, 12, 20])
def test_a_map_of_zeros_has_norm_zero(latent: int) -> None:
    params = Shallow(*(torch.zeros_like(part) for part in draw(latent, 4, 0)))
    for method in METHODS:
        assert float(kappa(params, states(5, 2, latent), method)) == 0.0


@pytest.mark.parametrize("method", METHODS[:3])
def test_every_takes_some_steps_only(method: str) -> None:
    params, z = draw(3, 20, 4), states(21, 4, 3)
    assert float(kappa(params, z, method, every=4)) == float(kappa(params, z[::4].contiguous(), method))
    assert float(kappa(params, z, method, every=4)) != float(kappa(params, z, method))


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("latent", [3, 12, 20])
@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_states_with_missing_entries_are_left_out(method: str, latent: int, hole: float) -> None:
    params, z = draw(latent, 20, 4), states(10, 3, latent)
    holes = torch.cat([z, torch.full_like(z[:4], hole)])
    holes[10:, :, 1:] = 1.0
    torch.testing.assert_close(kappa(params, holes, method), kappa(params, z, method))
    assert float(kappa(params, torch.full_like(z, hole), method)) == 0.0


def test_no_matrix_is_built_for_many_latent_units(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("matrices of every state were built")

    monkeypatch.setattr(plrnn_jacobian, "_lane_norms", refuse)
    monkeypatch.setattr(torch, "baddbmm", refuse)
    assert float(kappa(draw(20, 6, 0), states(3, 2, 20), "product_upper_bound")) > 0.0


def test_no_gradient_reaches_the_estimate() -> None:
    params = Shallow(*(part.requires_grad_() for part in draw(3, 5, 0)))
    assert not kappa(params, states(3, 2, 3), "arithmetic_mean").requires_grad


def test_bad_arguments_are_refused() -> None:
    params, z = draw(3, 5, 0), states(4, 2, 3)
    with pytest.raises(ModelError, match="did you mean 'batch_maximum'"):
        kappa(params, z, "batch_maximun")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="every is 0"):
        kappa(params, z, every=0)
    with pytest.raises(ModelError, match="3 latent units"):
        kappa(params, z[..., :2])
    with pytest.raises(ModelError, match="need 3 axes"):
        kappa(params, z[0])
    with pytest.raises(ModelError, match="cast the states"):
        jacobians(params, z.float())
