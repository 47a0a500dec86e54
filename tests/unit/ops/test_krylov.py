"""Dense linear systems: kernels, states and steps against powers and loops written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.krylov import (
    block_size,
    dense_final_state,
    dense_free_response,
    dense_scan_reference,
    dense_step,
    krylov_kernel,
    krylov_kernel_reference,
    krylov_tables,
)

System = tuple[Tensor, Tensor, Tensor]


def random_system(features: int, order: int, outputs: int = 1, *, shared: bool = False, seed: int = 0) -> System:
    """A, B, C in float64 with the largest singular value of A at 0.99, so that it remembers some hundred steps."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(1 if shared else features, order, order))
    A *= 0.99 / np.linalg.norm(A, ord=2, axis=(1, 2), keepdims=True)
    parts = (A, rng.normal(size=(features, order)), rng.normal(size=(outputs, features, order)))
    return tuple(torch.from_numpy(part) for part in parts)  # type: ignore[return-value]


def legs_system(order: int, steps: tuple[float, ...] = (1e-3, 1e-2, 1e-1), outputs: int = 1) -> System:
    """HiPPO-LegS by the bilinear rule, one feature a step size: far from normal, as in the layer."""
    n = np.arange(order)
    root = np.sqrt(2.0 * n + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    implicit = np.stack([np.eye(order) - 0.5 * step * A for step in steps])
    explicit = np.stack([np.eye(order) + 0.5 * step * A for step in steps])
    A_bar = np.linalg.solve(implicit, explicit)
    B_bar = np.linalg.solve(implicit, np.stack([step * root for step in steps])[..., None])[..., 0]
    C = np.random.default_rng(order).normal(size=(outputs, len(steps), order))
    return torch.from_numpy(A_bar), torch.from_numpy(B_bar), torch.from_numpy(C)


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape))


def powering(system: System, length: int) -> np.ndarray:
    A, B, C = (part.double().numpy() for part in system)
    x, values = B[..., None], []
    for _ in range(length):
        values.append(np.einsum("mhn,hn->mh", C, x[..., 0]))
        x = A @ x
    return np.stack(values, axis=-1)


def simulate(system: System, u: Tensor, state: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    A, B, C = (part.double().numpy() for part in system)
    A = np.broadcast_to(A, (len(B), *A.shape[1:]))
    x = np.zeros((len(u), *B.shape)) if state is None else state.double().numpy()
    outputs = []
    for k in range(u.shape[-1]):
        x = np.einsum("hij,shj->shi", A, x) + B * u[:, :, k].double().numpy()[..., None]
        outputs.append(np.einsum("mhn,shn->smh", C, x))
    return np.stack(outputs, axis=-1), x


def worst_row(found: Tensor, expected: np.ndarray) -> float:
    """Largest error of a kernel relative to the largest value of its row."""
    error = np.abs(found.detach().double().numpy() - expected).max(-1)
    return float((error / np.abs(expected).max(-1)).max())


def convolve(kernel: Tensor, u: Tensor) -> Tensor:
    """Causal convolution [S, M, H, L] as a sum over lags."""
    length = u.shape[-1]
    shifted = [
        torch.nn.functional.pad(u, (lag, 0))[:, None, :, :length] * kernel[..., lag, None] for lag in range(length)
    ]
    return torch.stack(shifted).sum(0)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 1), (2, 1), (3, 2), (17, 4), (336, 16), (337, 16), (1024, 32), (16384, 128)]
)
def test_block_size_is_the_power_of_two_nearest_to_the_root(length: int, expected: int) -> None:
    assert block_size(length) == expected


@pytest.mark.parametrize("order", [4, 16, 64])
def test_checklist_10_two_level_kernel_equals_powering(order: int) -> None:
    system = legs_system(order)
    expected = powering(system, 4096)
    for length in (1, 2, 3, 17, 336, 337, 1024, 4096):
        kernel = krylov_kernel(*system, length)
        assert kernel.shape == (1, 3, length)
        assert worst_row(kernel, expected[..., :length]) < 1e-12, length
    assert worst_row(krylov_kernel_reference(*system, 337), expected[..., :337]) < 1e-13


def test_checklist_10_float32_kernel_is_accurate_to_rounding() -> None:
    exact = legs_system(64)
    single: System = tuple(part.float() for part in exact)  # type: ignore[assignment]
    arithmetic, whole = powering(single, 4096), powering(exact, 4096)
    for length in (336, 1024, 4096):
        kernel = krylov_kernel(*single, length)
        assert kernel.dtype == torch.float32
        assert worst_row(kernel, arithmetic[..., :length]) < 5e-6, length  # measured 5e-7
        assert worst_row(kernel, whole[..., :length]) < 5e-6, length  # with A, B, C rounded: measured 5e-7


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 31, 33, 100, 600])
def test_checklist_12_any_length_several_outputs_and_a_shared_matrix(length: int, shared: bool) -> None:
    system = random_system(3, 5, outputs=4, shared=shared, seed=length)
    kernel = krylov_kernel(*system, length)
    assert kernel.shape == (4, 3, length)
    assert worst_row(kernel, powering(system, length)) < 1e-12
    torch.testing.assert_close(krylov_kernel(*system, 600)[..., :length], kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_tables_hold_powers_and_grow_with_the_root_of_the_length(shared: bool) -> None:
    A, B, C = random_system(2, 3, outputs=2, shared=shared)
    tables = krylov_tables(A, B, C, 1000)  # 32 columns, 32 rows
    assert tables.columns.shape == (2, 3, 32)
    assert tables.rows.shape == (2, 2, 32, 3)
    assert tables.jump.shape == A.shape
    for h in range(2):
        a = A[0 if shared else h].numpy()
        np.testing.assert_allclose(tables.jump[0 if shared else h].numpy(), np.linalg.matrix_power(a, 32), atol=1e-13)
        for i in (0, 1, 17, 31):
            expected = np.linalg.matrix_power(a, i) @ B[h].numpy()
            np.testing.assert_allclose(tables.columns[h, :, i].numpy(), expected, atol=1e-13)
            late = C[:, h].numpy() @ np.linalg.matrix_power(a, 32 * i)
            np.testing.assert_allclose(tables.rows[:, h, i].numpy(), late, atol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 17, 64, 336, 337])
def test_final_state_and_free_response_equal_a_loop(length: int, batch: int, shared: bool) -> None:
    system = random_system(3, 4, outputs=2, shared=shared, seed=length)
    A, B, C = system
    u, state = noise(batch, 3, length), noise(batch, 3, 4)
    for start in (None, state):
        expected, end = simulate(system, u, start)
        np.testing.assert_allclose(dense_final_state(A, B, u, start).numpy(), end, atol=1e-12)
        y, last = dense_scan_reference(A, B, C, u, start)
        np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(last.numpy(), end, atol=1e-12)
    silent, _ = simulate(system, torch.zeros_like(u), state)
    np.testing.assert_allclose(dense_free_response(A, C, state, length).numpy(), silent, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_checklist_14_convolution_equals_recurrence_equals_step(dtype: torch.dtype, tolerance: float) -> None:
    for system in (random_system(3, 8, outputs=2), random_system(3, 8, outputs=2, shared=True), legs_system(16)):
        A, B, C = (part.to(dtype) for part in system)
        u = noise(2, 3, 200).to(dtype)
        y = convolve(krylov_kernel(A, B, C, 200), u)
        looped, end = dense_scan_reference(A, B, C, u)
        state, steps = torch.zeros_like(end), []
        for k in range(200):
            value, state = dense_step(A, B, C, u[..., k], state)
            steps.append(value)
        scale = float(looped.abs().max())
        assert y.dtype == state.dtype == dtype
        torch.testing.assert_close(y, looped, rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(torch.stack(steps, dim=-1), looped, rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(state, end, rtol=0, atol=tolerance * float(end.abs().max()))
        torch.testing.assert_close(
            dense_final_state(A, B, u, None), end, rtol=0, atol=tolerance * float(end.abs().max())
        )


def test_random_chunks_equal_one_pass() -> None:
    system = A, B, C = random_system(2, 6, outputs=2, seed=4)
    rng = np.random.default_rng(4)
    u = torch.from_numpy(rng.normal(size=(3, 2, 400)))
    expected, end = simulate(system, u, None)
    for _ in range(5):
        bounds = [0, *sorted(rng.choice(np.arange(1, 400), size=6, replace=False)), 400]
        state, parts = torch.zeros(3, 2, 6, dtype=torch.float64), []
        for first, last in pairwise(bounds):
            piece = u[..., first:last]
            own = convolve(krylov_kernel(A, B, C, int(last - first)), piece)
            parts.append(own + dense_free_response(A, C, state, int(last - first)))
            state = dense_final_state(A, B, piece, state)
        np.testing.assert_allclose(torch.cat(parts, dim=-1).numpy(), expected, atol=1e-11)
        np.testing.assert_allclose(state.numpy(), end, atol=1e-11)


def _trainable(system: System) -> System:
    return tuple(part.clone().requires_grad_() for part in system)  # type: ignore[return-value]


@pytest.mark.parametrize("shared", [False, True])
def test_checklist_13_gradients(shared: bool) -> None:
    A, B, C = _trainable(random_system(2, 3, outputs=2, shared=shared))
    u, state = noise(2, 2, 9).requires_grad_(), noise(2, 2, 3).requires_grad_()
    cases: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (lambda *args: krylov_kernel(*args, 1), (A, B, C)),
        (lambda *args: krylov_kernel(*args, 2), (A, B, C)),
        (lambda *args: krylov_kernel(*args, 23), (A, B, C)),
        (lambda *args: tuple(krylov_tables(*args, 23)), (A, B, C)),
        (lambda *args: dense_free_response(*args, 11), (A, C, state)),
        (dense_final_state, (A, B, u, state)),
        (lambda *args: dense_final_state(*args, None), (A, B, u)),
        (dense_step, (A, B, C, u[..., 0], state)),
        (dense_scan_reference, (A, B, C, u[..., :3], state)),
        (lambda *args: krylov_kernel_reference(*args, 4), (A, B, C)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("shared", [False, True])
def test_checklist_13_gradients_through_all_powers_equal_those_of_the_loop(shared: bool) -> None:
    system = _trainable(random_system(3, 4, outputs=2, shared=shared))  # 1300 steps: squares among the rows as well
    weight = noise(2, 3, 1300)
    found = torch.autograd.grad(krylov_kernel(*system, 1300), system, weight)
    expected = torch.autograd.grad(krylov_kernel_reference(*system, 1300), system, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_output_alone_when_the_rest_is_frozen() -> None:
    A, B, C = random_system(2, 3)
    C.requires_grad_()
    krylov_kernel(A, B, C, 50).sum().backward()
    found = C.grad
    C.grad = None
    krylov_kernel_reference(A, B, C, 50).sum().backward()
    torch.testing.assert_close(found, C.grad, rtol=1e-12, atol=1e-12)
    assert A.grad is None


def test_strided_inputs_give_the_same() -> None:
    A, B, C = random_system(3, 4, outputs=2)
    u, state = noise(5, 3, 40), noise(5, 3, 4)
    loose = [A.mT.contiguous().mT, B.T.contiguous().T, C.movedim(0, 2).contiguous().movedim(2, 0)]
    u_loose, state_loose = (
        u.transpose(1, 2).contiguous().transpose(1, 2),
        state.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )
    assert not any(part.is_contiguous() for part in (*loose, u_loose, state_loose))
    pairs = [
        (krylov_kernel(A, B, C, 40), krylov_kernel(*loose, 40)),
        (dense_free_response(A, C, state, 40), dense_free_response(loose[0], loose[2], state_loose, 40)),
        (dense_final_state(A, B, u, state), dense_final_state(loose[0], loose[1], u_loose, state_loose)),
        (dense_step(A, B, C, u[..., 0], state), dense_step(*loose, u_loose[..., 0], state_loose)),
    ]
    for tight, strided in pairs:
        torch.testing.assert_close(tight, strided, rtol=0, atol=1e-13)


def test_wrong_shapes_and_lengths_are_refused() -> None:
    A, B, C = random_system(3, 4)
    with pytest.raises(ModelError, match="a sequence of 0 steps"):
        krylov_kernel(A, B, C, 0)
    with pytest.raises(ModelError, match=r"A is \[2, 4, 4\].*\[3 or 1, 4, 4\]"):
        krylov_kernel(A[:2], B, C, 5)
    with pytest.raises(ModelError, match=r"C is \[1, 3, 2\]"):
        krylov_tables(A, B, C[..., :2], 5)
    with pytest.raises(ModelError, match=r"the vectors are \[3, 2\]"):
        dense_free_response(A, C, torch.zeros(1, 3, 2, dtype=torch.float64), 5)
    with pytest.raises(ModelError, match="0 steps"):
        dense_final_state(A, B, torch.zeros(1, 3, 0, dtype=torch.float64), None)
