"""HiPPO state matrices: dense, as diagonal plus low rank, and in structured trainable form.

A HiPPO system ``x' = A x + B u`` keeps in x [N] the coefficients of its input's past on orthogonal polynomials:

- ``legs``: Legendre polynomials in ``e^{-age}``, an exponentially fading past. With ``A / t`` and ``B / t`` in place of
  A and B it is the uniform memory of everything since the start.
- ``lagt``: Laguerre functions of the age.
- ``legt``: Legendre polynomials on a sliding window of length ``window``.

Every one of them is a normal matrix minus a matrix of rank 1 or 2, so a unitary change of basis makes it diagonal plus
low rank. The eigenvectors of A itself are useless: their condition number grows exponentially with N.

Sources: A. Gu et al., "Combining recurrent, convolutional and continuous-time models with linear state space layers"
(arXiv 2110.13985), appendix E.2 for the structured form; A. Gu, K. Goel, C. Re, "Efficiently modeling long sequences
with structured state spaces" (arXiv 2111.00396), appendix C.1 for the matrices and their low-rank corrections.
Deviations: the legs matrix has the stable (negative) sign everywhere; legt has unit window by default, without the
factor 1/2 of the authors' library; eigenvector phases are fixed instead of left to LAPACK.

Legend: N order (state size), n = N / 2 conjugate pairs of modes, r rank of the correction, L samples. All tensors are
float64 (complex128) unless a function says otherwise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tsforge.core.errors import ConfigError, ModelError, nearest

HippoKind = Literal["legs", "legt", "lagt"]


class DiagonalPlusLowRank(NamedTuple):
    """A HiPPO system in the eigenbasis of its normal part: ``x' = (diag(eigenvalues) - sum_r P_r P_r^*) x + B u``.

    Only the modes with positive imaginary part are held, by rising frequency; the whole system of order N = 2 n is
    these modes and their complex conjugates, and ``P_r P_r^*`` runs over all N of them.

    Shapes:
        eigenvalues [n], low_rank [r, n] (the rows P_r), input [n] (B, real and positive by the choice of phases); all
        complex128.
    """

    eigenvalues: Tensor
    low_rank: Tensor
    input: Tensor


class StructuredFactors(NamedTuple):
    """Initial factors of ``A = -P (D + T^-1) P``: T tridiagonal, D = diag(shift), P = diag(scale).

    Shapes:
        diagonal [N], upper [N - 1] and lower [N - 1] of T, shift [N], scale [N]. ``B = scale`` (times a trainable
        vector of ones).
    """

    diagonal: Tensor
    upper: Tensor
    lower: Tensor
    shift: Tensor
    scale: Tensor


def hippo_matrix(kind: HippoKind, order: int, *, window: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return A [N, N] and B [N] of ``x' = A x + B u``.

    Args:
        kind: which memory, see the module.
        order: N, at least 1.
        window: length of the sliding window of ``legt`` in units of time; the others have none.

    Raises:
        ConfigError: unknown kind, order below 1, a window that is not positive, or a window for legs or lagt.
    """
    _check(kind, order, window)
    root = _roots(order)
    outer = root[:, None] * root[None, :]
    if kind == "legs":
        return -outer.tril(-1) - torch.diag(_index(order) + 1.0), root
    if kind == "lagt":
        return -_ones(order, order).tril(-1) - 0.5 * torch.eye(order, dtype=torch.float64), _ones(order)
    sign = 1.0 - 2.0 * torch.remainder(_index(order), 2.0)  # (-1)^n
    alternating = outer * sign[:, None] * sign[None, :]
    return -(outer.tril() + alternating.triu(1)) / window, root / window


def low_rank(kind: HippoKind, order: int, *, window: float = 1.0) -> Tensor:
    """Return P [r, N] such that ``A + P^T P`` is normal.

    The sum is ``-1/2 I`` plus a skew-symmetric matrix for legs and skew-symmetric for lagt and legt; r is 2 for legt
    and 1 otherwise.

    Raises:
        ConfigError: as ``hippo_matrix``.
    """
    _check(kind, order, window)
    if kind == "legs":
        return (_index(order) + 0.5).sqrt()[None, :]
    if kind == "lagt":
        return math.sqrt(0.5) * _ones(1, order)
    root, odd = _roots(order), torch.remainder(_index(order), 2.0)
    return torch.stack([root * (1.0 - odd), root * odd]) / math.sqrt(window)


def skew_modes(skew: Tensor) -> tuple[Tensor, Tensor]:
    """Return the frequencies w [n] > 0, rising, and the eigenvectors V [N, n] of a real skew-symmetric matrix [N, N].

    ``skew = sum_n (i w_n v_n v_n^*) + conjugate`` with orthonormal columns v_n, whose phases are arbitrary. Works in
    the precision of its input; the values lose about ``eps * max(w)``, so start from float64.

    Raises:
        ModelError: the order is odd, which leaves one mode without a partner.
    """
    order = skew.shape[-1]
    if order % 2:
        raise ModelError(f"a skew-symmetric matrix of odd order {order} has a mode at 0; use an even order")
    values, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))  # -i S is Hermitian
    return values[order // 2 :], vectors[:, order // 2 :]


def diagonal_plus_low_rank(kind: HippoKind, order: int) -> DiagonalPlusLowRank:
    """Return the diagonal-plus-low-rank form of a HiPPO matrix (legt: unit window).

    Each eigenvector is rotated until its entry of ``V^* B`` is real and positive, so the result does not depend on the
    phases LAPACK happens to return. Real parts of the eigenvalues are exactly -1/2 (legs) or 0 (lagt, legt): there the
    damping comes from the low-rank term alone.

    Raises:
        ConfigError: unknown kind, or an order that is not even and positive.
    """
    _check(kind, order, 1.0)
    if order % 2:
        raise ConfigError(f"order {order} is odd, but modes come in conjugate pairs: use {order + 1}")
    matrix, entry = hippo_matrix(kind, order)
    correction = low_rank(kind, order)
    real_part = -0.5 if kind == "legs" else 0.0
    normal = matrix + correction.T @ correction - real_part * torch.eye(order, dtype=torch.float64)
    frequencies, vectors = skew_modes(0.5 * (normal - normal.T))
    adjoint = vectors.conj().T  # [n, N]
    projected = adjoint @ entry.to(adjoint.dtype)
    size = projected.abs()
    rotation = (projected / size).conj()
    return DiagonalPlusLowRank(
        torch.complex(torch.full_like(frequencies, real_part), frequencies),
        (rotation[:, None] * (adjoint @ correction.T.to(adjoint.dtype))).T.contiguous(),
        torch.complex(size, torch.zeros_like(size)),
    )


def structured_factors(kind: HippoKind, order: int) -> StructuredFactors:
    """Return the factors with which ``structured_matrix`` gives the HiPPO matrix (legt: unit window).

    ``structured_matrix(f.diagonal, f.upper, f.lower, f.shift, f.scale, f.scale)``.

    Raises:
        ConfigError: unknown kind or order below 1.
    """
    _check(kind, order, 1.0)
    beside = max(order - 1, 0)
    if kind == "legt":
        diagonal = torch.zeros(order, dtype=torch.float64)
        diagonal[0] += 0.5
        diagonal[-1] += 0.5  # the same entry when N = 1
        half = 0.5 * _ones(beside)
        return StructuredFactors(diagonal, half, -half, torch.zeros_like(diagonal), _roots(order))
    upper, lower = torch.zeros(beside, dtype=torch.float64), -_ones(beside)
    if kind == "lagt":
        return StructuredFactors(_ones(order), upper, lower, -0.5 * _ones(order), _ones(order))
    index = _index(order)
    return StructuredFactors(_ones(order), upper, lower, -index / (2.0 * index + 1.0), _roots(order))


def structured_matrix(
    diagonal: Tensor, upper: Tensor, lower: Tensor, shift: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """Return ``A = -P (D + T^-1) Q`` [..., N, N], differentiable and in the precision of its inputs.

    One dense solve of T: O(N^3), cheap beside everything done with A for N up to a few hundred.

    Args:
        diagonal: [..., N], main diagonal of T.
        upper: [..., N - 1], above it.
        lower: [..., N - 1], below it.
        shift: [..., N], diagonal of D.
        left: [..., N], diagonal of P.
        right: [..., N], diagonal of Q. Leading axes of all six broadcast.

    Raises:
        ModelError: lengths do not fit together, or T is singular.
    """
    order = diagonal.shape[-1]
    sizes = [part.shape[-1] for part in (upper, lower, shift, left, right)]
    if sizes != [order - 1, order - 1, order, order, order]:
        raise ModelError(
            f"a structured matrix of order {order} needs upper, lower of {order - 1} and shift, left, right of {order} "
            f"values, not {sizes}"
        )
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(upper, offset=1) + torch.diag_embed(lower, offset=-1)
    identity = torch.eye(order, dtype=tridiagonal.dtype, device=tridiagonal.device).expand_as(tridiagonal)
    try:
        inverse: Tensor = torch.linalg.solve(tridiagonal, identity)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"the tridiagonal factor of order {order} became singular; lower the learning rate of the state matrix"
        ) from error
    return -left[..., :, None] * (inverse + torch.diag_embed(shift)) * right[..., None, :]


def _check(kind: str, order: int, window: float) -> None:
    """Raise unless the three describe one of the matrices."""
    kinds = get_args(HippoKind)
    if kind not in kinds:
        raise ConfigError(f"unknown HiPPO matrix '{kind}'; choose from {', '.join(kinds)}{nearest(kind, kinds)}")
    if order < 1:
        raise ConfigError(f"order {order} of a HiPPO matrix must be at least 1")
    if not 0.0 < window < math.inf:
        raise ConfigError(f"window {window} must be a positive length")
    if kind != "legt" and window != 1.0:
        raise ConfigError(f"window {window} was given, but only legt has a window, not {kind}; leave it at 1")


def _index(order: int) -> Tensor:
    return torch.arange(order, dtype=torch.float64)


def _roots(order: int) -> Tensor:
    """Return ``sqrt(2n + 1)`` [N], the norms that make shifted Legendre polynomials orthonormal."""
    return (2.0 * _index(order) + 1.0).sqrt()


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)
