"""HiPPO matrices against closed forms of scipy, matrices written out by hand and eigenvectors made by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import expm, solve_triangular
from scipy.special import eval_laguerre, eval_legendre
from torch import Tensor

from tsforge.core.errors import ConfigError, ModelError
from tsforge.ops.discretise import gbt
from tsforge.ops.hippo import (
    HippoKind,
    diagonal_plus_low_rank,
    hippo_matrix,
    low_rank,
    skew_modes,
    structured_factors,
    structured_matrix,
)

KINDS: tuple[HippoKind, ...] = ("legs", "legt", "lagt")


def entries(kind: str, order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The table of the papers, entry by entry."""
    matrix = np.zeros((order, order))
    for n in range(order):
        for k in range(order):
            roots = math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1)
            if kind == "legs":
                matrix[n, k] = -roots if n > k else (-(n + 1) if n == k else 0)
            elif kind == "lagt":
                matrix[n, k] = -1 if n > k else (-0.5 if n == k else 0)
            else:
                matrix[n, k] = -roots if n >= k else -((-1) ** (n - k)) * roots
    return matrix, np.array([1.0 if kind == "lagt" else math.sqrt(2 * n + 1) for n in range(order)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 4, 64])
def test_checklist_01_entries_equal_the_table(kind: HippoKind, order: int) -> None:
    matrix, entry = hippo_matrix(kind, order)
    assert matrix.dtype == entry.dtype == torch.float64
    expected, expected_entry = entries(kind, order)
    np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-13, rtol=0)
    np.testing.assert_allclose(entry.numpy(), expected_entry, atol=1e-14, rtol=0)


def test_checklist_01_legs_of_order_four_by_hand() -> None:
    matrix, entry = hippo_matrix("legs", 4)
    by_hand = [
        [-1.0, 0.0, 0.0, 0.0],
        [-math.sqrt(3), -2.0, 0.0, 0.0],
        [-math.sqrt(5), -math.sqrt(15), -3.0, 0.0],
        [-math.sqrt(7), -math.sqrt(21), -math.sqrt(35), -4.0],
    ]
    np.testing.assert_allclose(matrix.numpy(), by_hand, atol=1e-14, rtol=0)
    np.testing.assert_allclose(entry.numpy(), [1.0, math.sqrt(3), math.sqrt(5), math.sqrt(7)], atol=1e-15, rtol=0)


def test_legt_moves_the_legendre_coefficients_of_a_ramp_along_its_window() -> None:
    # Of u(t) = t on [t - 2.5, t] they are (t - 1.25, 2.5 / (2 sqrt 3), 0, ...): an exact solution of x' = A x + B u.
    matrix, entry = hippo_matrix("legt", 6, window=2.5)
    for now in (0.0, 3.0):
        state = torch.tensor([now - 1.25, 2.5 / (2 * math.sqrt(3)), 0, 0, 0, 0], dtype=torch.float64)
        expected = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(matrix @ state + entry * now, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("order", [1, 4, 16])
@pytest.mark.parametrize("time", [0.1, 0.7, 2.0])
def test_checklist_02_impulse_responses_are_legendre_and_laguerre(order: int, time: float) -> None:
    degree = np.arange(order)
    matrix, entry = hippo_matrix("legs", order)
    expected = np.sqrt(2 * degree + 1) * np.exp(-time) * eval_legendre(degree, 2 * np.exp(-time) - 1)
    np.testing.assert_allclose(expm(time * matrix.numpy()) @ entry.numpy(), expected, atol=1e-12, rtol=0)
    matrix, entry = hippo_matrix("lagt", order)
    expected = np.exp(-time / 2) * eval_laguerre(degree, time)
    np.testing.assert_allclose(expm(time * matrix.numpy()) @ entry.numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 64])
def test_checklist_03_structured_factors_give_the_matrix(kind: HippoKind, order: int) -> None:
    factors = structured_factors(kind, order)
    found = structured_matrix(*factors, factors.scale)
    expected, entry = entries(kind, order)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(factors.scale.numpy(), entry, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("kind", "rank", "trace"), [("legs", 1, -1.0), ("lagt", 1, 0.0), ("legt", 2, 0.0)])
def test_checklist_03_low_rank_correction_leaves_a_normal_matrix(kind: HippoKind, rank: int, trace: float) -> None:
    correction = low_rank(kind, 64)
    assert correction.shape == (rank, 64)
    normal = torch.from_numpy(entries(kind, 64)[0]) + correction.T @ correction
    torch.testing.assert_close(normal + normal.T, trace * torch.eye(64, dtype=torch.float64), atol=1e-12, rtol=0)


def test_low_rank_correction_follows_the_window() -> None:
    correction = low_rank("legt", 8, window=0.3)
    normal = hippo_matrix("legt", 8, window=0.3)[0] + correction.T @ correction
    torch.testing.assert_close(normal, -normal.T, atol=1e-12, rtol=0)


def rebuilt(kind: HippoKind, order: int) -> NDArray[np.complex128]:
    """The dense matrix of the modes and their conjugates, in eigenvectors that numpy makes of the table."""
    modes = diagonal_plus_low_rank(kind, order)
    matrix, entry = entries(kind, order)
    correction = low_rank(kind, order).numpy()
    normal = matrix + correction.T @ correction
    vectors = np.linalg.eigh(-0.5j * (normal - normal.T))[1][:, order // 2 :]
    phases = vectors.conj().T @ entry
    vectors = vectors * (phases / np.abs(phases))
    basis = np.concatenate([vectors, vectors.conj()], axis=1)
    values = modes.eigenvalues.numpy()
    factors = modes.low_rank.numpy()
    factors = np.concatenate([factors, factors.conj()], axis=1)  # [r, N]
    core = np.diag(np.concatenate([values, values.conj()])) - factors.T @ factors.conj()
    result: NDArray[np.complex128] = basis @ core @ basis.conj().T
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 64, 256])
def test_checklist_04_modes_and_conjugates_rebuild_the_matrix(kind: HippoKind, order: int) -> None:
    expected = entries(kind, order)[0]
    assert np.linalg.norm(rebuilt(kind, order) - expected) < 1e-13 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_checklist_04_construction_in_both_precisions(kind: HippoKind, dtype: torch.dtype, tolerance: float) -> None:
    for order in (64, 256):
        expected = torch.from_numpy(entries(kind, order)[0])
        correction = low_rank(kind, order).to(dtype)
        shift = -0.5 * (kind == "legs") * torch.eye(order, dtype=dtype)
        frequencies, vectors = skew_modes(expected.to(dtype) + correction.T @ correction - shift)
        assert frequencies.dtype == dtype
        half = (vectors * (1j * frequencies)) @ vectors.conj().T
        found = (2.0 * half.real + shift - correction.T @ correction).to(torch.float64)
        assert torch.linalg.norm(found - expected) < tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_have_the_transfer_function_of_the_dense_system(kind: HippoKind) -> None:
    modes, (matrix, entry) = diagonal_plus_low_rank(kind, 32), entries(kind, 32)
    both = [np.concatenate([part.numpy(), part.numpy().conj()], axis=-1) for part in modes]
    core = np.diag(both[0]) - both[1].T @ both[1].conj()
    for s in (0.1 + 0.2j, 1.0, 3.0 - 7.0j, 50j):
        dense = entry @ np.linalg.solve(s * np.eye(32) - matrix, entry)
        modal = both[2].conj() @ np.linalg.solve(s * np.eye(32) - core, both[2])
        assert abs(modal - dense) < 1e-11 * abs(dense)


@pytest.mark.parametrize(("order", "largest"), [(16, 81), (64, 1303), (256, 20860)])
def test_largest_frequency_of_legs(order: int, largest: float) -> None:
    assert float(diagonal_plus_low_rank("legs", order).eigenvalues.imag.max()) == pytest.approx(largest, abs=0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_checklist_05_phases_are_fixed(kind: HippoKind) -> None:
    first, second = diagonal_plus_low_rank(kind, 64), diagonal_plus_low_rank(kind, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [part.dtype for part in first] == [torch.complex128] * 3
    assert bool((first.input.imag == 0.0).all())
    assert bool((first.input.real > 0.0).all())
    assert bool((first.eigenvalues.imag > 0.0).all())
    assert bool((first.eigenvalues.imag.diff() > 0.0).all())
    assert bool((first.eigenvalues.real == (-0.5 if kind == "legs" else 0.0)).all())
    # B is a multiple of P (legs, lagt: sqrt 2) or the sum of both rows (legt), which only the right phases keep.
    scale = 1.0 if kind == "legt" else math.sqrt(2.0)
    torch.testing.assert_close(scale * first.low_rank.sum(0), first.input, atol=1e-12, rtol=0)


def test_structured_matrix_broadcasts_every_factor() -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    # Three copies of order three: a stack of vectors must not be taken for a matrix, nor the reverse.
    diagonal, upper, lower = 3.0 + random(3, 3), random(2), random(1, 2)
    shift, left, right = random(3, 3), random(3), random(2, 1, 3)
    found = structured_matrix(diagonal, upper, lower, shift, left, right)
    assert found.shape == (2, 3, 3, 3)
    for a in range(2):
        for h in range(3):
            tridiagonal = np.diag(diagonal[h]) + np.diag(upper, 1) + np.diag(lower[0], -1)
            middle = np.diag(shift[h]) + np.linalg.inv(tridiagonal)
            expected = -np.diag(left) @ middle @ np.diag(right[a, 0])
            np.testing.assert_allclose(found[a, h].numpy(), expected, atol=1e-13, rtol=0)
    assert structured_matrix(*(part.float() for part in (diagonal, upper, lower, shift, left, right))).dtype == (
        torch.float32
    )


def test_implicit_euler_of_a_structured_matrix_equals_the_tridiagonal_identity() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = [0.1 * torch.randn(size, dtype=torch.float64, generator=generator) for size in (12, 11, 11, 12, 12, 12)]
    factors = structured_factors("legs", 12)
    parts = [a + b for a, b in zip((*factors, factors.scale), noise, strict=True)]
    diagonal, upper, lower, shift, left, right = (part.numpy() for part in parts)
    # (I + d P (D + T^-1) Q)^-1 = Q^-1 (T P^-1 Q^-1 + d T D + d I)^-1 T P^-1, with no inverse of T.
    step = 0.05
    tridiagonal = np.diag(diagonal) + np.diag(upper, 1) + np.diag(lower, -1)
    inner = tridiagonal @ np.diag(1 / (left * right)) + step * tridiagonal @ np.diag(shift) + step * np.eye(12)
    expected = np.diag(1 / right) @ np.linalg.inv(inner) @ tridiagonal @ np.diag(1 / left)
    found, _ = gbt(structured_matrix(*parts), factors.scale, torch.tensor(step, dtype=torch.float64), alpha=1.0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-11, rtol=0)


def test_structured_matrix_has_right_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    factors = structured_factors("legt", 4)
    parts = [
        (part + 0.1 * torch.randn(2, *part.shape, dtype=torch.float64, generator=generator)).requires_grad_()
        for part in (*factors, factors.scale)
    ]
    assert torch.autograd.gradcheck(structured_matrix, parts)


def test_structured_matrix_refuses_what_does_not_fit() -> None:
    ones = torch.ones(4)
    with pytest.raises(ModelError, match=r"order 4 needs .* not \[4, 3, 4, 4, 4\]"):
        structured_matrix(ones, ones, ones[:3], ones, ones, ones)
    with pytest.raises(ModelError, match="order 4 became singular"):
        structured_matrix(0.0 * ones, ones[:3], 0.0 * ones[:3], ones, ones, ones)


def waves(place: Tensor) -> Tensor:
    return torch.sin(2 * torch.pi * 2 * place) + 0.5 * torch.cos(2 * torch.pi * 5 * place + 0.3)


def memory_error(order: int, length: int) -> float:
    """Return the relative error of a signal read back from x' = (A x + B u) / t, bilinear: no step size enters."""
    matrix, entry = (part.numpy() for part in hippo_matrix("legs", order))
    place = torch.arange(1, length + 1, dtype=torch.float64) / length
    signal, identity = waves(place).numpy(), np.eye(order)
    state = np.zeros(order)
    for k in range(1, length + 1):  # I + A/2k = 2 I - (I - A/2k): one solve, no product with A
        right = 2.0 * k * state + entry * signal[k - 1]
        state = solve_triangular(k * identity - 0.5 * matrix, right, lower=True) - state
    scaled = state * np.sqrt(2 * np.arange(order) + 1)  # orthonormal Legendre series on [0, 1]
    found = np.polynomial.legendre.legval(2 * place.numpy() - 1, scaled)
    return float(np.sqrt(np.square(found - signal).mean() / np.square(signal).mean()))


def test_checklist_18_time_varying_legs_remembers_the_whole_signal() -> None:
    long, short, coarse = memory_error(64, 2000), memory_error(64, 500), memory_error(16, 2000)
    assert long < 1e-2
    assert coarse > 0.1
    assert 1e-2 < short < 2e-2


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown HiPPO matrix 'leg'; choose from legs, legt, lagt; did you mean"):
        hippo_matrix("leg", 4)  # type: ignore[arg-type]
    for build in (hippo_matrix, low_rank, structured_factors, diagonal_plus_low_rank):
        with pytest.raises(ConfigError, match="order 0 of a HiPPO matrix must be at least 1"):
            build("legs", 0)
    with pytest.raises(ConfigError, match="only legt has a window, not lagt"):
        hippo_matrix("lagt", 4, window=2.0)
    with pytest.raises(ConfigError, match="only legt has a window, not legs"):
        low_rank("legs", 4, window=0.5)
    for window in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="must be a positive length"):
            hippo_matrix("legt", 4, window=window)
    with pytest.raises(ConfigError, match="order 5 is odd, .* use 6"):
        diagonal_plus_low_rank("legs", 5)
    with pytest.raises(ModelError, match="odd order 3"):
        skew_modes(torch.zeros(3, 3))
