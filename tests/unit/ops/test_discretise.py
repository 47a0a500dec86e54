"""Discretisation against scipy's, against an ODE solver and against quadrature of the defining integrals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.signal import cont2discrete, lsim
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.discretise import bilinear_diagonal, expm1_complex, gbt, zoh, zoh_diagonal
from tsforge.ops.hippo import HippoKind, hippo_matrix

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(step: tuple[Tensor, Tensor], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """All states [K, N] of ``x_k = A_bar x_{k-1} + B_bar u_k``."""
    matrix, gain = (part.numpy() for part in step)
    states, state = [], np.zeros(len(gain))
    for value in inputs:
        state = matrix @ state + gain * value
        states.append(state)
    return np.array(states)


@pytest.mark.parametrize("kind", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("order", [1, 4, 8])
def test_checklist_06_step_equals_scipy(kind: HippoKind, order: int) -> None:
    matrix, entry = hippo_matrix(kind, order)
    system = (matrix.numpy(), entry[:, None].numpy(), np.eye(order), np.zeros((order, 1)))
    for dt in (0.003, 0.02):
        for alpha in (0.0, 0.25, 0.5, 1.0):
            expected = cont2discrete(system, dt, method="gbt", alpha=alpha)
            found = gbt(matrix, entry, scalar(dt), alpha)
            np.testing.assert_allclose(found[0].numpy(), expected[0], atol=1e-13, rtol=0)
            np.testing.assert_allclose(found[1].numpy(), expected[1][:, 0], atol=1e-13, rtol=0)
        expected = cont2discrete(system, dt, method="zoh")
        found = zoh(matrix, entry, scalar(dt))
        np.testing.assert_allclose(found[0].numpy(), expected[0], atol=1e-13, rtol=0)
        np.testing.assert_allclose(found[1].numpy(), expected[1][:, 0], atol=1e-13, rtol=0)


def test_checklist_07_held_inputs_equal_lsim_one_sample_later() -> None:
    matrix, entry = hippo_matrix("legs", 8)
    inputs, dt = random(50).numpy(), 0.05
    times = dt * np.arange(51)
    system = (matrix.numpy(), entry[:, None].numpy(), np.eye(8), np.zeros((8, 1)))
    _, expected, _ = lsim(system, np.append(inputs, 0.0), times, interp=False)  # the last input acts after the end
    found = run(zoh(matrix, entry, scalar(dt)), inputs)
    np.testing.assert_allclose(found, expected[1:], atol=1e-12, rtol=0)


def drive(time: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.sin(3 * time) + 0.5 * np.cos(7 * time)
    return result


@pytest.fixture(scope="module")
def solution() -> NDArray[np.float64]:
    """The state at time 2 of LegS of order 8 from an adaptive solver."""
    matrix, entry = (part.numpy() for part in hippo_matrix("legs", 8))

    def slope(time: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = matrix @ state + entry * drive(np.array(time))
        return result

    found = solve_ivp(slope, (0.0, 2.0), np.zeros(8), method="DOP853", rtol=1e-12, atol=1e-13)
    state: NDArray[np.float64] = found.y[:, -1]
    return state


@pytest.mark.parametrize("rule", [gbt, zoh], ids=["bilinear", "zoh"])
@pytest.mark.parametrize(("averaged", "order"), [(True, 2.0), (False, 1.0)])
def test_checklist_08_order_of_convergence(
    rule: Step, averaged: bool, order: float, solution: NDArray[np.float64]
) -> None:
    matrix, entry = hippo_matrix("legs", 8)
    errors = []
    for steps in (200, 400, 800):
        values = drive(np.linspace(0.0, 2.0, steps + 1))
        inputs = 0.5 * (values[:-1] + values[1:]) if averaged else values[1:]
        errors.append(np.abs(run(rule(matrix, entry, scalar(2.0 / steps)), inputs)[-1] - solution).max())
    observed = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(observed, order, atol=0.1, rtol=0)


def test_checklist_09_implicit_euler_is_the_gated_update() -> None:
    z, before, value = random(20, seed=1), random(20, seed=2), random(20, seed=3)
    matrix, gain = gbt(scalar(-1.0)[None, None], scalar(1.0)[None], z.exp(), alpha=1.0)
    gate = torch.sigmoid(z)
    torch.testing.assert_close(
        matrix[:, 0, 0] * before + gain[:, 0] * value, (1.0 - gate) * before + gate * value, atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("product", [0.0, 1e-300, 1e-12])
def test_checklist_09_held_input_gain_tends_to_the_step(product: float) -> None:
    dt = scalar(0.25).requires_grad_()
    re = scalar(-product / 0.25).requires_grad_()
    im = scalar(product / 0.25).requires_grad_()
    gain = zoh_diagonal(re, im, dt)
    torch.testing.assert_close(torch.stack(gain), torch.stack([scalar(0.25), scalar(0.0)]), atol=2e-13, rtol=0)
    slopes = torch.autograd.grad(gain[0], (re, im, dt))
    torch.testing.assert_close(
        torch.stack(slopes), torch.stack([scalar(0.03125), scalar(0.0), scalar(1.0)]), atol=3e-12, rtol=0
    )
    dense = zoh(
        torch.full((1, 1), -product / 0.25, dtype=torch.float64), torch.ones(1, dtype=torch.float64), scalar(0.25)
    )
    torch.testing.assert_close(dense[1], torch.full((1,), 0.25, dtype=torch.float64), atol=2e-13, rtol=0)


def test_hold_of_a_singular_system_is_exact() -> None:
    double_integrator = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    matrix, gain = zoh(double_integrator, torch.tensor([0.0, 1.0], dtype=torch.float64), scalar(0.3))
    np.testing.assert_allclose(matrix.numpy(), [[1.0, 0.3], [0.0, 1.0]], atol=1e-15)
    np.testing.assert_allclose(gain.numpy(), [0.045, 0.3], atol=1e-15)


@pytest.mark.parametrize("rule", [gbt, zoh], ids=["bilinear", "zoh"])
def test_dense_rules_broadcast_and_keep_the_dtype(rule: Step) -> None:
    # Three copies of order three, where a stack of vectors could pass for a matrix.
    matrix, entry, dt = -torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3), random(3, 3), random(2, 3).exp()
    steps, gains = rule(matrix, entry, dt)
    assert steps.shape == (2, 3, 3, 3)
    assert gains.shape == (2, 3, 3)
    for a in range(2):
        for h in range(3):
            step, gain = rule(matrix, entry[h], dt[a, h])
            torch.testing.assert_close(steps[a, h], step, atol=1e-14, rtol=0)
            torch.testing.assert_close(gains[a, h], gain, atol=1e-14, rtol=0)
    single = rule(matrix.float(), entry.float(), dt.float())
    assert [part.dtype for part in single] == [torch.float32] * 2
    torch.testing.assert_close(single[0].double(), steps, atol=1e-5, rtol=0)


def test_explicit_euler_broadcasts_too() -> None:
    steps, gains = gbt(-torch.eye(2), torch.ones(5, 2), torch.full((5,), 0.1), alpha=0.0)
    torch.testing.assert_close(steps, (0.9 * torch.eye(2)).expand(5, 2, 2))
    torch.testing.assert_close(gains, torch.full((5, 2), 0.1))


def test_triangular_solve_equals_the_full_one() -> None:
    matrix, entry = hippo_matrix("legs", 64)
    dt = torch.tensor([1e-3, 1e-2, 0.1], dtype=torch.float64)
    full, substituted = gbt(matrix, entry, dt), gbt(matrix, entry, dt, lower_triangular=True)
    for one, other in zip(full, substituted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert bool((substituted[0].triu(1) == 0.0).all())


def test_bilinear_rule_keeps_a_stable_system_stable_for_any_step() -> None:
    matrix, entry = hippo_matrix("legt", 16)
    for dt in (1e-3, 1.0, 1e3):
        step, _ = gbt(matrix, entry, scalar(dt))
        assert float(torch.linalg.eigvals(step).abs().max()) < 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.4])
def test_a_step_too_long_for_an_explicit_rule_is_refused_exactly_where_it_diverges(alpha: float) -> None:
    matrix, entry = hippo_matrix("legs", 8)  # its eigenvalues are -1 .. -8
    limit = 2.0 / (1.0 - 2.0 * alpha) / 8.0
    step, _ = gbt(matrix, entry, scalar(0.999 * limit), alpha)
    assert 0.99 < float(torch.linalg.eigvals(step).abs().max()) < 1.0
    with pytest.raises(ModelError, match=rf"alpha {alpha} is unstable for 1 of 2 steps: .* use alpha 0.5"):
        gbt(matrix, entry, torch.tensor([0.5, 1.001], dtype=torch.float64) * limit, alpha)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_the_family_is_refused(alpha: float) -> None:
    with pytest.raises(ModelError, match=r"must lie in \[0, 1\]"):
        gbt(-torch.eye(2), torch.ones(2), torch.tensor(0.1), alpha)


def test_a_growing_system_that_cannot_be_solved_is_refused() -> None:
    with pytest.raises(ModelError, match="I - alpha dt A is singular"):
        gbt(torch.eye(2), torch.ones(2), torch.tensor(2.0))


def test_expm1_has_no_cancellation_in_float32() -> None:
    size = torch.logspace(-30, 0, 31)
    for angle in (0.0, 0.6, 1.5707964, 2.5):
        re, im = -size * abs(math.cos(angle)), size * math.sin(angle)
        found = torch.complex(*(part.double() for part in expm1_complex(re, im)))
        z = re.numpy().astype(np.complex128) + 1j * im.numpy().astype(np.float64)
        expected = torch.from_numpy(np.expm1(z))
        assert float(((found - expected).abs() / expected.abs()).max()) < 3e-7


def quadrature(rate: NDArray[np.complex128], dt: float, moment: int) -> NDArray[np.complex128]:
    """``integral_0^dt s^moment exp(rate s) ds`` by 60 Gauss points."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    places = 0.5 * dt * (nodes + 1.0)
    result: NDArray[np.complex128] = (0.5 * dt * weights * places**moment * np.exp(rate[:, None] * places)).sum(1)
    return result


def test_held_input_gain_and_its_gradients_equal_the_integrals_at_every_scale() -> None:
    dt = scalar(0.5).requires_grad_()
    # From far below the series' limit through both sides of it to several turns.
    size = np.concatenate([np.logspace(-14, -2.5, 24), np.linspace(0.9e-2, 1.1e-2, 9), np.logspace(-1.5, 1.2, 12)])
    for angle in (math.pi, 2.0, 0.5 * math.pi):
        rate = size / 0.5 * np.exp(1j * angle)
        re, im = (torch.from_numpy(part.copy()).requires_grad_() for part in (rate.real, rate.imag))
        gain_re, gain_im = zoh_diagonal(re, im, dt)
        integral, slope = quadrature(rate, 0.5, 0), quadrature(rate, 0.5, 1)
        found = torch.complex(gain_re, gain_im).detach().numpy()
        assert float(np.max(np.abs(found - integral))) < 5e-15
        by_re = torch.autograd.grad(gain_re.sum(), (re, im), retain_graph=True)
        by_im = torch.autograd.grad(gain_im.sum(), (re, im), retain_graph=True)
        for pair, parts in ((by_re, (slope.real, -slope.imag)), (by_im, (slope.imag, slope.real))):
            for gradient, expected in zip(pair, parts, strict=True):
                assert float(np.max(np.abs(gradient.numpy() - expected) / np.abs(slope))) < 1e-13
        (by_dt,) = torch.autograd.grad(gain_re.sum(), (dt,))
        assert float(by_dt) == pytest.approx(float(np.exp(0.5 * rate).real.sum()), rel=1e-12)


def test_diagonal_rules_equal_the_dense_ones_and_broadcast() -> None:
    re, im, dt = -random(4).exp(), 5.0 * random(4, seed=1), random(3, 1, seed=2).exp()
    gain = torch.complex(*zoh_diagonal(re, im, dt))
    step_pair, gain_pair = bilinear_diagonal(re, im, dt)
    assert gain.shape == gain_pair[0].shape == gain_pair[1].shape == step_pair[0].shape == step_pair[1].shape == (3, 4)
    entry = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for h in range(3):
        for n in range(4):
            a, b = float(re[n]), float(im[n])
            turning = torch.tensor([[a, -b], [b, a]], dtype=torch.float64)  # a + i b as a real matrix
            for rule, found_step, found_gain in (
                (zoh, torch.exp(torch.complex(a * dt[h, 0], b * dt[h, 0])), gain[h, n]),
                (gbt, torch.complex(*step_pair)[h, n], torch.complex(*gain_pair)[h, n]),
            ):
                step, column = rule(turning, entry, dt[h, 0])
                torch.testing.assert_close(torch.view_as_real(found_step), step[:, 0], atol=1e-12, rtol=0)
                torch.testing.assert_close(torch.view_as_real(found_gain), column, atol=1e-12, rtol=0)


def test_diagonal_rules_survive_extreme_modes_in_float32() -> None:
    re = torch.tensor([0.0, -1e-12, -0.5, -3e3, -0.5]).requires_grad_()
    im = torch.tensor([0.0, 1e-12, 2e4, 0.0, 1e9]).requires_grad_()
    dt = torch.tensor(1.0).requires_grad_()
    for parts in (zoh_diagonal(re, im, dt), sum(bilinear_diagonal(re, im, dt), ())):
        assert all(part.dtype == torch.float32 and bool(part.isfinite().all()) for part in parts)
        total = torch.stack([part.sum() for part in parts]).sum()
        assert all(bool(slope.isfinite().all()) for slope in torch.autograd.grad(total, (re, im, dt)))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_gbt_has_right_gradients(alpha: float) -> None:
    matrix = (-torch.eye(3, dtype=torch.float64) + 0.3 * random(2, 3, 3)).requires_grad_()
    entry, dt = random(3).requires_grad_(), torch.tensor([0.1, 0.4], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, d: gbt(a, b, d, alpha), [matrix, entry, dt])


def test_other_rules_have_right_gradients() -> None:
    matrix = (-torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3)).requires_grad_()
    lower = (-torch.eye(3, dtype=torch.float64) + random(3, 3).tril(-1)).requires_grad_()
    entry, dt = random(3).requires_grad_(), torch.tensor([0.1, 0.4], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(zoh, [matrix, entry, dt])
    assert torch.autograd.gradcheck(lambda a, b, d: gbt(a.tril(), b, d, lower_triangular=True), [lower, entry, dt])
    re = torch.tensor([-0.5, -1e-3, -2.0], dtype=torch.float64).requires_grad_()
    im = torch.tensor([3.0, 2e-3, 0.0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(zoh_diagonal, [re, im, dt[:, None].detach().requires_grad_()])
    assert torch.autograd.gradcheck(expm1_complex, [re, im])
    assert torch.autograd.gradcheck(
        lambda r, i, d: sum(bilinear_diagonal(r, i, d), ()), [re, im, dt[:, None].detach().requires_grad_()]
    )
