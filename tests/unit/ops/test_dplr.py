"""Diagonal-plus-low-rank kernels against powers of the full complex system written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsforge.core.errors import ModelError
from tsforge.ops.discretise import gbt
from tsforge.ops.dplr import dplr_discretise, dplr_kernel, dplr_kernel_reference, dplr_real_form
from tsforge.ops.hippo import diagonal_plus_low_rank
from tsforge.ops.krylov import dense_scan_reference, krylov_kernel

STEPS = (1e-3, 1e-2, 1e-1)
LENGTHS = (1, 2, 3, 17, 336, 337, 1024)


class System(NamedTuple):
    """Arguments of ``dplr_kernel`` before the length: one feature a step size."""

    re: Tensor
    im: Tensor
    low_rank: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor

    def to(self, dtype: torch.dtype) -> System:
        return System(*(part.to(dtype) for part in self))

    def trainable(self) -> System:
        return System(*(part.clone().requires_grad_() for part in self))


def pairs(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([values.real, values.imag], axis=-1))


def complex_normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def random_system(order: int, rank: int, *, outputs: int = 1, steps: tuple[float, ...] = STEPS) -> System:
    """Damped modes at integer frequencies with random low-rank terms, another one for every feature."""
    rng = np.random.default_rng(10 * order + rank)
    n, features = order // 2, len(steps)
    re = -rng.uniform(0.2, 1.0, size=(features, n))
    im = np.pi * np.arange(n) + rng.uniform(0.0, 1.0, size=(features, n))
    return System(
        torch.from_numpy(re),
        torch.from_numpy(im),
        pairs(complex_normal(rng, rank, features, n)),
        pairs(complex_normal(rng, features, n)),
        pairs(complex_normal(rng, outputs, features, n)),
        torch.tensor(steps, dtype=torch.float64),
    )


def hippo_system(kind: Any, order: int, *, outputs: int = 1, steps: tuple[float, ...] = STEPS) -> System:
    form = diagonal_plus_low_rank(kind, order)
    features, n = len(steps), order // 2
    C = complex_normal(np.random.default_rng(order), outputs, features, n)
    return System(
        form.eigenvalues.real.expand(features, n),
        form.eigenvalues.imag.expand(features, n),
        torch.view_as_real(form.low_rank)[:, None].expand(-1, features, n, 2),
        torch.view_as_real(form.input).expand(features, n, 2),
        pairs(C),
        torch.tensor(steps, dtype=torch.float64),
    )


def full_form(system: System) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear step of all N modes: A_bar [H, N, N], B_bar [H, N], C [M, H, N], complex."""
    re, im, low_rank, B, C, dt = (part.detach().double().numpy() for part in system)

    def both(half: np.ndarray) -> np.ndarray:
        return np.concatenate([half, half.conj()], axis=-1)

    eigenvalues = both(re + 1j * im)
    P, b, c = (both(part[..., 0] + 1j * part[..., 1]) for part in (low_rank, B, C))
    A = np.stack([np.diag(row) for row in eigenvalues])
    for column in P:
        A = A - column[:, :, None] * column[:, None, :].conj()
    step, identity = dt[:, None, None], np.eye(A.shape[-1])
    implicit = identity - 0.5 * step * A
    A_bar = np.linalg.solve(implicit, identity + 0.5 * step * A)
    return A_bar, np.linalg.solve(implicit, step * b[..., None])[..., 0], c


def powering(system: System, length: int) -> np.ndarray:
    A_bar, B_bar, C = full_form(system)
    x, values = B_bar[..., None], []
    for _ in range(length):
        values.append(np.einsum("mhn,hn->mh", C, x[..., 0]))
        x = A_bar @ x
    kernel = np.stack(values, axis=-1)
    assert np.abs(kernel.imag).max() < 1e-9 * np.abs(kernel).max()  # conjugate pairs: 2 Re(C x) is the whole sum
    return kernel.real


def dense_kernel(system: System, length: int) -> Tensor:
    A, B, C = dplr_real_form(*system[:5])
    return krylov_kernel(*gbt(A, B, system.dt), C, length)


def discretised_kernel(system: System, length: int) -> Tensor:
    return krylov_kernel(*dplr_discretise(*system), length)


def worst_row(found: Tensor, expected: np.ndarray) -> float:
    """Largest error of a kernel relative to the largest value of its row."""
    assert found.shape == expected.shape
    error = np.abs(found.detach().double().numpy() - expected).max(-1)
    return float((error / np.abs(expected).max(-1)).max())


SYSTEMS: dict[str, Callable[[int], System]] = {
    "legs": lambda order: hippo_system("legs", order),
    "lagt": lambda order: hippo_system("lagt", order),
    "legt": lambda order: hippo_system("legt", order),  # rank 2
    "random1": lambda order: random_system(order, 1, outputs=2),
    "random2": lambda order: random_system(order, 2, outputs=2),
}


@pytest.mark.parametrize("order", [4, 16, 64])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_checklist_10_every_route_equals_powering(name: str, order: int) -> None:
    system = SYSTEMS[name](order)
    expected = powering(system, max(LENGTHS))
    for length in LENGTHS:
        for route in (
            dplr_kernel(*system, length),
            dplr_kernel_reference(*system, length),
            dense_kernel(system, length),
            discretised_kernel(system, length),
        ):
            assert route.dtype == torch.float64
            assert worst_row(route, expected[..., :length]) < 1e-10, length


@pytest.mark.parametrize("order", [4, 16, 64])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_checklist_10_float32_accuracy(name: str, order: int) -> None:
    system = SYSTEMS[name](order).to(torch.float32)
    expected = powering(system, 1024)
    for length in (17, 336, 337, 1024):
        half_angle, dense = dplr_kernel(*system, length), discretised_kernel(system, length)
        assert half_angle.dtype == dense.dtype == torch.float32
        assert worst_row(half_angle, expected[..., :length]) < 2e-5, length  # measured 6e-6
        assert worst_row(dense, expected[..., :length]) < 1e-4, length  # A_bar itself is rounded: measured 3e-5


def test_float32_kernel_of_a_system_that_forgets_nothing_within_its_length() -> None:
    system = hippo_system("lagt", 4, steps=(1e-3,)).to(torch.float32)
    for length in (2, 17, 336):  # C - C A^L in float32 would leave 1e-4
        assert worst_row(dplr_kernel(*system, length), powering(system, length)) < 2e-6, length


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_real_form_and_its_step_act_as_the_complex_system(rank: int) -> None:
    system = random_system(6, rank, outputs=2)
    re, im, low_rank, B, C, dt = (part.numpy() for part in system)
    A_r, B_r, C_r = dplr_real_form(*system[:5])
    rng = np.random.default_rng(0)
    x = complex_normal(rng, 3, 3)
    P = low_rank[..., 0] + 1j * low_rank[..., 1]
    moved = (re + 1j * im) * x - sum(p * 2.0 * (p.conj() * x).sum(-1, keepdims=True).real for p in P)
    stacked = np.concatenate([x.real, x.imag], axis=-1)
    found = np.einsum("hij,hj->hi", A_r.numpy(), stacked)
    np.testing.assert_allclose(found, np.concatenate([moved.real, moved.imag], axis=-1), atol=1e-12)
    np.testing.assert_array_equal(B_r.numpy(), np.concatenate([B[..., 0], B[..., 1]], axis=-1))
    y = 2.0 * ((C[..., 0] + 1j * C[..., 1]) * x).sum(-1).real
    np.testing.assert_allclose((C_r.numpy() * stacked).sum(-1), y, atol=1e-12)

    A_bar, B_bar, C_bar = dplr_discretise(*system)
    identity = np.eye(6)
    for h, step in enumerate(dt):
        implicit = identity - 0.5 * step * A_r[h].numpy()
        np.testing.assert_allclose(implicit @ A_bar[h].numpy(), 2.0 * identity - implicit, atol=1e-13)
        np.testing.assert_allclose(implicit @ B_bar[h].numpy(), step * B_r[h].numpy(), atol=1e-13)
    assert torch.equal(C_bar, C_r)


def test_discretisation_of_hippo_equals_a_dense_solve_and_keeps_the_dtype() -> None:
    for kind in ("legs", "legt"):
        system = hippo_system(kind, 64)
        A, B, _ = dplr_real_form(*system[:5])
        expected = gbt(A, B, system.dt)
        torch.testing.assert_close(dplr_discretise(*system)[:2], expected, rtol=1e-12, atol=1e-12)
        single = dplr_discretise(*system.to(torch.float32))
        assert {part.dtype for part in single} == {torch.float32}
        rounded = tuple(part.float() for part in expected)
        torch.testing.assert_close(single[:2], rounded, rtol=1e-6, atol=1e-6)


def test_without_a_low_rank_term_the_kernel_is_a_sum_of_geometric_series() -> None:
    system = random_system(6, 0)
    re, im, _, B, C, dt = (part.numpy() for part in system)
    half = 0.5 * dt[:, None] * (re + 1j * im)
    ratio, gain = (1.0 + half) / (1.0 - half), dt[:, None] / (1.0 - half)
    weight = (C[..., 0] + 1j * C[..., 1]) * (B[..., 0] + 1j * B[..., 1]) * gain
    expected = 2.0 * np.einsum("mhn,hnl->mhl", weight, ratio[..., None] ** np.arange(50)).real
    assert worst_row(dplr_kernel(*system, 50), expected) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 97, 500])
def test_checklist_12_lengths_and_outputs(length: int) -> None:
    system = random_system(8, 1, outputs=3)
    kernel = dplr_kernel(*system, length)
    assert kernel.shape == (3, 3, length)
    torch.testing.assert_close(dplr_kernel(*system, 501)[..., :length], kernel, rtol=0, atol=1e-11)
    for m in range(3):
        alone = dplr_kernel(*system._replace(C=system.C[m : m + 1]), length)
        torch.testing.assert_close(kernel[m : m + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_checklist_13_gradients(rank: int) -> None:
    system = random_system(4, rank, outputs=3 - rank, steps=(1e-2, 0.3)).trainable()
    for length in (1, 2, 19):  # 19: a square of the gap
        assert torch.autograd.gradcheck(lambda *args: dplr_kernel(*args, length), tuple(system))  # noqa: B023
    assert torch.autograd.gradcheck(dplr_discretise, tuple(system))
    assert torch.autograd.gradcheck(dplr_real_form, tuple(system[:5]))
    assert torch.autograd.gradcheck(lambda *args: dplr_kernel_reference(*args, 4), tuple(system))


@pytest.mark.parametrize("kind", ["legs", "legt"])
def test_checklist_13_gradients_equal_those_of_the_dense_route(kind: str) -> None:
    system = hippo_system(kind, 16).trainable()  # 10000 nodes and 8 modes: the features go one by one
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 10000)))
    found = torch.autograd.grad(dplr_kernel(*system, 10000), system, weight)
    expected = torch.autograd.grad(dense_kernel(system, 10000), system, weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_checklist_14_convolution_equals_recurrence(dtype: torch.dtype, tolerance: float) -> None:
    for system in (hippo_system("legs", 16, outputs=2).to(dtype), random_system(16, 2).to(dtype)):
        u = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 150))).to(dtype)
        looped, _ = dense_scan_reference(*dplr_discretise(*system), u)
        for kernel in (dplr_kernel(*system, 150), discretised_kernel(system, 150)):
            size = 300
            product = torch.fft.rfft(u[:, None].double(), size) * torch.fft.rfft(kernel.double(), size)
            y = torch.fft.irfft(product, size)[..., :150]
            torch.testing.assert_close(y, looped.double(), rtol=0, atol=tolerance * float(looped.abs().max()))


def test_strided_and_expanded_inputs_give_the_same() -> None:
    shared = hippo_system("legs", 8)  # expanded over features
    tight = System(*(part.contiguous() for part in shared))
    assert not shared.re.is_contiguous()
    loose = System(*(part.movedim(0, -1).contiguous().movedim(-1, 0) for part in random_system(8, 2, outputs=2)))
    packed = System(*(part.contiguous() for part in loose))
    assert not loose.C.is_contiguous()
    for strided, contiguous in ((shared, tight), (loose, packed)):
        torch.testing.assert_close(dplr_kernel(*strided, 50), dplr_kernel(*contiguous, 50), rtol=0, atol=1e-13)
        for a, b in zip(dplr_discretise(*strided), dplr_discretise(*contiguous), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


class _ComplexOperators(TorchDispatchMode):
    """Collects the names of the operators that read or return a complex tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(part, Tensor) and part.is_complex() for part in (*args, result)):
            self.seen.add(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("rank", [1, 2])
def test_complex_numbers_appear_in_the_inverse_transform_only(rank: int) -> None:
    system = random_system(6, rank).trainable()
    with _ComplexOperators() as operators:
        dplr_kernel(*system, 20).sum()
        dplr_discretise(*system)
    assert operators.seen == {"complex", "_fft_c2r"}


def test_a_kernel_without_steps_is_refused() -> None:
    with pytest.raises(ModelError, match="a kernel of 0 steps"):
        dplr_kernel(*random_system(4, 1), 0)
