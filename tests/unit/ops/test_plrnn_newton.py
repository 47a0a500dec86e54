"""Newton's iterations over all steps of a forced PLRNN, against a plain loop under autograd."""

from __future__ import annotations

import functools

import plrnn_cases
import pytest
import torch
from plrnn_cases import loop
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import _plrnn_newton as newton
from tsforge.ops.plrnn import Shallow


def draw(groups: int, latent: int, hidden: int) -> Shallow:
    """Return a random map in float64 that need not contract by itself."""
    return plrnn_cases.draw(1, 1, latent, hidden, groups=groups, gain=1.0).params


@functools.cache
def lorenz() -> tuple[Shallow, Tensor]:
    """A chaotic map, fitted to Lorenz-63 (dt 0.01) by least squares on random hidden units, and its data."""

    def slope(p: Tensor) -> Tensor:
        x, y, z = p
        return torch.stack([10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z])

    point, path, dt = torch.tensor([1.0, 2.0, 20.0], dtype=torch.float64), [], 0.01
    for _ in range(4500):
        k1 = slope(point)
        k2 = slope(point + dt / 2 * k1)
        k3 = slope(point + dt / 2 * k2)
        point = point + dt / 6 * (k1 + 2 * k2 + 2 * k3 + slope(point + dt * k3))
        path.append(point)
    data = torch.stack(path[500:])
    data = (data - data.mean(0)) / data.std(0)
    generator = torch.Generator().manual_seed(1)
    W2 = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    h2 = torch.randn(100, generator=generator, dtype=torch.float64)
    ones = torch.ones(len(data) - 1, 1, dtype=torch.float64)
    features = torch.cat([torch.relu(data[:-1] @ W2.T + h2), ones], dim=1)
    gram = features.T @ features + 1e-4 * torch.eye(101, dtype=torch.float64)
    weights = torch.linalg.solve(gram, features.T @ (data[1:] - 0.9 * data[:-1]))
    A = torch.full((3,), 0.9, dtype=torch.float64)
    return Shallow(A[None], weights[:-1].T[None].contiguous(), W2[None], weights[-1][None], h2[None]), data


def compare(
    z1: Tensor,
    forcing: Tensor,
    alpha: Tensor,
    params: Shallow,
    inputs: Tensor | None,
    clipped: bool,
    tol: float = 1e-10,
) -> None:
    """Results and every gradient agree, relative to the largest entry."""
    weight = torch.randn(forcing.shape, generator=torch.Generator().manual_seed(3), dtype=forcing.dtype)
    outcomes = []
    for run in (loop, newton.gtf_newton):
        leaves = [part.clone().requires_grad_() for part in (z1, *params, *(() if inputs is None else (inputs,)))]
        z = run(leaves[0], forcing, alpha, Shallow(*leaves[1:6]), leaves[6] if inputs is not None else None, clipped)
        outcomes.append((z.detach(), *torch.autograd.grad((z * weight).sum(), leaves)))
    for expected, found in zip(*outcomes, strict=True):
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= tol * (1.0 + float(expected.abs().max()))


def window(steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Starts z1 (1, B, 3) and noisy forcing signals (1, T, B, 3) from the Lorenz data."""
    data = lorenz()[1]
    starts = torch.arange(batch) * 97
    noise = 0.05 * torch.randn(1, steps, batch, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return data[starts][None], data[1 + starts + torch.arange(steps)[:, None]][None] + noise


def solved(alpha: float, steps: int, **options: int) -> newton.Solution:
    z1, forcing = window(steps, 4)
    keep = torch.full_like(forcing, 1.0 - alpha)
    return newton.solve(z1, None, keep, alpha * forcing, forcing, lorenz()[0], clipped=False, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 101])
def test_the_scan_equals_its_recurrence(steps: int) -> None:
    K, r = torch.randn(2, steps, 3, 4, 4, dtype=torch.float64) / 3, torch.randn(2, steps, 3, 4, dtype=torch.float64)
    s, expected = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for k in range(steps):
        s = torch.einsum("gbij,gbj->gbi", K[:, k], s) + r[:, k]
        expected.append(s)
    torch.testing.assert_close(newton.affine_scan(K, r), torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.5, 1.0])
def test_a_chaotic_map_over_many_steps(alpha: float) -> None:
    z1, forcing = window(2000, 2)
    compare(
        z1, forcing, torch.full((), alpha, dtype=torch.float64).expand_as(forcing), lorenz()[0], None, clipped=False
    )


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("steps", "latent", "hidden"), [(1, 3, 5), (2, 1, 4), (101, 4, 9), (200, 6, 33)])
def test_random_maps_with_inputs_and_groups(steps: int, latent: int, hidden: int, alpha: float, clipped: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    z1 = torch.randn(2, 3, latent, generator=generator, dtype=torch.float64)
    forcing, inputs = torch.randn(2, 2, steps, 3, latent, generator=generator, dtype=torch.float64)
    strength = torch.full((), alpha, dtype=torch.float64).expand_as(forcing)
    compare(z1, forcing, strength, draw(2, latent, hidden), inputs, clipped)


def test_strengths_that_vary_and_missing_entries() -> None:
    z1, forcing = window(120, 3)
    alpha = torch.where(torch.rand(forcing.shape, generator=torch.Generator().manual_seed(4)) < 0.3, 0.0, 0.4).double()
    holes = torch.where(alpha == 0, float("nan"), forcing)
    compare(z1, holes, alpha, lorenz()[0], None, clipped=False)
    sparse = torch.zeros_like(forcing)
    sparse[:, ::5] = 1.0
    compare(z1, forcing, sparse, lorenz()[0], None, clipped=False)


@pytest.mark.parametrize(("alpha", "limit"), [(0.05, 8), (0.1, 8), (0.2, 7), (0.5, 6)])
@pytest.mark.parametrize("steps", [200, 2000])
def test_few_iterations_where_the_forcing_makes_the_map_contract(alpha: float, limit: int, steps: int) -> None:
    solution = solved(alpha, steps)
    assert solution.right == steps
    assert 1 <= solution.iterations <= limit


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_what_is_left_at_the_end_of_the_budget_is_done_step_by_step(budget: int) -> None:
    solution, exact = solved(0.05, 300, iterations=budget), solved(0.05, 300)
    assert solution.iterations == budget
    assert budget + 1 <= solution.right < 300
    torch.testing.assert_close(solution.z, exact.z, rtol=0, atol=1e-11)
    torch.testing.assert_close(solution.forced, exact.forced, rtol=0, atol=1e-11)


@pytest.mark.parametrize("junk", [float("inf"), float("nan"), 1e200])
def test_corrections_that_overflow_end_in_the_right_result(junk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, scan = solved(0.05, 300), newton.affine_scan

    def overflowing(matrices: Tensor, offsets: Tensor) -> Tensor:
        found = scan(matrices, offsets)
        found[:, 100:] = junk
        return found

    monkeypatch.setattr(newton, "affine_scan", overflowing)
    solution = solved(0.05, 300)
    assert 100 <= solution.right <= 101
    torch.testing.assert_close(solution.z, exact.z, rtol=0, atol=1e-11)


def test_corrections_that_overflow_once_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, calls = newton.affine_scan, []

    def overflowing(matrices: Tensor, offsets: Tensor) -> Tensor:
        found = scan(matrices, offsets)
        if matrices.shape[1] == 299:  # not the recursion
            calls.append(matrices)
            found[:, 100:] *= float("nan") if len(calls) == 1 else 1.0
        return found

    monkeypatch.setattr(newton, "affine_scan", overflowing)
    solution = solved(0.2, 300)
    assert solution.right == 300
    assert solution.iterations < 10


def test_too_weak_a_forcing_falls_back() -> None:
    z1, forcing = window(1000, 2)
    assert solved(0.005, 1000).right < 1000
    strength = torch.full((), 0.005, dtype=torch.float64).expand_as(forcing)
    compare(z1, forcing, strength, lorenz()[0], None, clipped=False, tol=1e-7)


def test_the_planted_map_is_chaotic() -> None:
    """A pair of free runs 1e-9 apart separates, and stays on the attractor."""
    (params, data), steps = lorenz(), 2500
    z1 = torch.stack([data[:1], data[:1] + 1e-9], dim=1)
    zero = torch.zeros(1, steps, 2, 3, dtype=torch.float64)
    run = loop(z1, zero, zero, params, None, clipped=False)
    assert float(run.abs().max()) < 4.0
    assert float((run[:, :, 0] - run[:, :, 1]).abs().max()) > 0.1


def test_single_precision() -> None:
    z1, forcing = window(500, 3)
    params = Shallow(*(part.float() for part in lorenz()[0]))
    alpha = torch.full((), 0.2).expand(forcing.shape)
    expected = loop(z1.float(), forcing.float(), alpha, params, None, clipped=False)
    found = newton.gtf_newton(z1.float(), forcing.float(), alpha, params, None, clipped=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_by_differences() -> None:
    params = draw(1, 2, 4)
    z1, forcing = torch.randn(1, 2, 2, dtype=torch.float64), torch.randn(1, 6, 2, 2, dtype=torch.float64)
    alpha = torch.full_like(forcing, 0.3)

    def run(z1: Tensor, *parts: Tensor) -> Tensor:
        return newton.gtf_newton(z1, forcing, alpha, Shallow(*parts), None, True)

    assert torch.autograd.gradcheck(run, [part.requires_grad_() for part in (z1, *params)])


def test_no_hidden_activation_is_kept() -> None:
    params = Shallow(*(part.requires_grad_() for part in draw(1, 2, 37)))
    forcing = torch.randn(1, 10, 3, 2, dtype=torch.float64)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        newton.gtf_newton(forcing[:, 0], forcing, torch.full_like(forcing, 0.3), params, None, True)
    assert torch.Size([1, 10, 3, 2]) in kept
    assert all(shape.numel() <= params.W1.numel() for shape in kept)


def test_a_free_run_is_refused() -> None:
    params, forcing = draw(1, 2, 3), torch.zeros(1, 5, 2, 2, dtype=torch.float64)
    for signal in (forcing, None):
        with pytest.raises(ModelError, match="alpha above 0"):
            newton.gtf_newton(forcing[:, 0], signal, torch.zeros_like(forcing), params, None, False)
