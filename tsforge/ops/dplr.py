"""Kernels of diagonal-plus-low-rank systems ``x' = A x + B u``, ``y = 2 Re(C x)``, ``A = diag(lambda) - sum P P^*``.

Discretisation is the bilinear rule. Sources: S4 (arXiv 2111.00396; generating function, Lemma C.3) and the tied form
``Q = P`` of arXiv 2202.09729, which is stable for every P as long as Re lambda <= 0. Deviations:

- The kernel is evaluated on half angles: with ``z = e^{-2it}`` the resolvent is ``(2i sin t - dt lambda cos t)^-1``,
  which has no pole at z = -1 and needs no powers of a root of unity.
- C is the parameter, not ``C (I - A^L)``, so that one set of weights serves every length and the recurrence.
- Conjugate pairs are summed in real arithmetic; complex numbers appear inside the inverse FFT only.

Legend: H features, n = N / 2 stored modes (the other half are their conjugates), r rank, M outputs a feature, L steps.
Shapes everywhere: re, im [H, n] parts of lambda; low_rank [r, H, n, 2]; B [H, n, 2]; C [M, H, n, 2] (last axis: real
and imaginary part; no conjugate in y = 2 Re(C x)); dt [H] > 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.once import first_derivative_only

_TABLE = 1 << 15  # entries: a few such tables fit the second-level cache
_STRIDES = 16  # the last factor of a power is reached by products with vectors, which cost N times less than a square


def dplr_real_form(re: Tensor, im: Tensor, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same continuous system on ``[Re x; Im x]``: A [H, 2n, 2n], B [H, 2n], C [M, H, 2n] with ``y = C x``.

    ``P^* x`` of both modes of a pair is a real part twice, so the low-rank term is ``2 [Re P; Im P] [Re P; Im P]^T``.
    Discretised, it takes all of ``tsforge.ops.krylov``: any length, states, steps, no complex numbers.
    """
    columns = _stacked(low_rank)  # [r, H, 2n]
    A = _complex_diagonal(re, im) - 2.0 * torch.einsum("rhi,rhj->hij", columns, columns)
    return A, _stacked(B), _real_output(C)


def dplr_discretise(
    re: Tensor, im: Tensor, low_rank: Tensor, B: Tensor, C: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bilinear step of the real form, A_bar [H, 2n, 2n], B_bar [H, 2n], C [M, H, 2n], in the dtype of C.

    Equals ``gbt`` on ``dplr_real_form``, without a dense solve. What belongs to single modes is computed in float64.
    """
    own, left, right = _bilinear_gap(re, im, low_rank, dt)
    scaled = dt.double()[:, None, None] * B.double()
    # (I - dt A / 2)^-1 = I - gap / 2
    spread = (left @ (right @ _stacked(scaled).unsqueeze(-1))).squeeze(-1)
    B_bar = _stacked(scaled - 0.5 * _multiply(own, scaled)) - 0.5 * spread
    unit = torch.tensor([1.0, 0.0], dtype=own.dtype, device=own.device)
    dtype = C.dtype
    A_bar = _assemble((unit - own).to(dtype), -left.to(dtype), right.to(dtype))
    return A_bar, B_bar.to(dtype), _real_output(C)


def dplr_kernel(re: Tensor, im: Tensor, low_rank: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return ``2 Re(C A_bar^k B_bar)`` for k = 0 .. L - 1, [M, H, L], in the dtype of C.

    O(n L) work a feature, plus ``C A_bar^L`` by repeated squares of the real form. That power is formed even where it
    is negligible: to know so takes its norm on the host, which stalls a GPU and makes the graph depend on data.

    Args:
        length: L, at least 1; odd, even, with or without large prime factors.

    Raises:
        ModelError: ``length`` is below 1.
    """
    if length < 1:
        raise ModelError(f"a kernel of {length} steps does not exist; use a length of at least 1")
    dtype = C.dtype
    gap = _assemble(*(part.to(dtype) for part in _bilinear_gap(re, im, low_rank, dt)))
    left = torch.cat([_conjugate(low_rank), _truncated(C, gap, length)])  # [r + M, H, n, 2]
    right = torch.cat([low_rank, B.unsqueeze(0)]) * dt[:, None, None]  # [r + 1, H, n, 2]
    a, b = (dt.double()[:, None] * re.double()).to(dtype), (dt.double()[:, None] * im.double()).to(dtype)
    angle = torch.arange(length // 2 + 1, dtype=torch.float64, device=C.device) * (math.pi / length)
    sine, cosine = angle.sin().to(dtype), angle.cos().to(dtype)
    alpha, beta = _pair_weights(left, right, a, b)
    value_re, value_im = _Resolvent.apply(alpha, beta, a, b, sine, cosine)  # type: ignore[no-untyped-call]
    value_re, value_im = _eliminate(value_re, value_im, cosine, len(low_rank), len(C))  # [M, H, K]
    spectrum = torch.complex(value_re * cosine - value_im * sine, value_re * sine + value_im * cosine)
    kernel: Tensor = torch.fft.irfft(spectrum, n=length)
    return kernel


def dplr_kernel_reference(
    re: Tensor, im: Tensor, low_rank: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int
) -> Tensor:
    """Return what ``dplr_kernel`` returns by the published Cauchy form in complex128 (slow, for tests).

    The pole at z = -1 is left out by evaluating the generating function ``C~ (I - z A_bar)^-1 B_bar`` there.
    """
    order = 2 * re.shape[-1]
    eigenvalues = _both(torch.stack([re, im], dim=-1))  # [H, N]
    P, b, c = _both(low_rank), _both(B), _both(C)  # [r, H, N], [H, N], [M, H, N]
    step = dt.to(torch.complex128)
    identity = torch.eye(order, dtype=torch.complex128, device=re.device)
    A = torch.diag_embed(eigenvalues) - torch.einsum("rhi,rhj->hij", P, P.conj())
    implicit = identity - 0.5 * step[:, None, None] * A
    A_bar = torch.linalg.solve(implicit, identity + 0.5 * step[:, None, None] * A)
    B_bar = torch.linalg.solve(implicit, step[:, None] * b)
    c = c - torch.einsum("mhi,hij->mhj", c, torch.linalg.matrix_power(A_bar, length))  # C~

    k = torch.arange(length, dtype=torch.float64, device=re.device)
    z = torch.polar(torch.ones_like(k), -2.0 * math.pi * k / length)
    pole = 2 * torch.arange(length, device=re.device) == length
    z = torch.where(pole, 1.0, z)  # any other point: the value is replaced below
    nodes = 2.0 / step[:, None] * (1.0 - z) / (1.0 + z)  # [H, L]
    R = 1.0 / (nodes.unsqueeze(-1) - eigenvalues.unsqueeze(1))  # [H, L, N]
    direct = torch.einsum("mhn,hln,hn->mhl", c, R, b)
    inner = torch.einsum("rhn,hln,shn->hlrs", P.conj(), R, P) + torch.eye(len(P), dtype=R.dtype, device=R.device)
    right = torch.einsum("rhn,hln,hn->hlr", P.conj(), R, b)
    left = torch.einsum("mhn,hln,rhn->mhlr", c, R, P)
    values = 2.0 / (1.0 + z) * (direct - (left * torch.linalg.solve(inner, right)).sum(-1))
    at_pole = torch.einsum("mhn,hn->mh", c, torch.linalg.solve(identity + A_bar, B_bar))
    kernel: Tensor = torch.fft.ifft(torch.where(pole, at_pole.unsqueeze(-1), values)).real
    return kernel


def _both(part: Tensor) -> Tensor:
    """Return the stored modes and their conjugates, [..., 2n] complex128, from [..., n, 2]."""
    half = torch.complex(part[..., 0].double(), part[..., 1].double())
    return torch.cat([half, half.conj()], dim=-1)


def _stacked(part: Tensor) -> Tensor:
    """Return ``[Re; Im]``, [..., 2n], from [..., n, 2]."""
    return torch.cat([part[..., 0], part[..., 1]], dim=-1)


def _real_output(C: Tensor) -> Tensor:
    """Return the row vectors, [M, H, 2n], that read ``2 Re(C x)`` from ``[Re x; Im x]``."""
    return 2.0 * _stacked(_conjugate(C))


def _conjugate(part: Tensor) -> Tensor:
    return torch.stack([part[..., 0], -part[..., 1]], dim=-1)


def _complex_diagonal(re: Tensor, im: Tensor) -> Tensor:
    """Return multiplication by diag(re + i im) as a real matrix on ``[Re x; Im x]``, [H, 2n, 2n]."""
    same, other = torch.diag_embed(re), torch.diag_embed(im)
    return torch.cat([torch.cat([same, -other], dim=-1), torch.cat([other, same], dim=-1)], dim=-2)


def _multiply(first: Tensor, second: Tensor) -> Tensor:
    """Return the product of complex numbers held as [..., 2]."""
    (a, b), (c, d) = first.unbind(-1), second.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], dim=-1)


def _bilinear_gap(re: Tensor, im: Tensor, low_rank: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``I - A_bar = -dt A (I - dt A / 2)^-1`` as a diagonal [H, n, 2] plus left [H, 2n, r] right [H, r, 2n].

    Float64, and exact for small steps too. The inverse of diagonal plus low rank is diagonal plus low rank again
    (Woodbury), so nothing larger than r by r is solved; left and right act on ``[Re x; Im x]``.
    """
    step = dt.double()[:, None, None]
    scaled = step * torch.stack([re, im], dim=-1).double()  # dt lambda
    rest = 1.0 - 0.5 * scaled[..., 0]
    size = rest * rest + 0.25 * scaled[..., 1] ** 2
    inverse = torch.stack([rest, 0.5 * scaled[..., 1]], dim=-1) / size.unsqueeze(-1)  # of 1 - dt lambda / 2
    columns = low_rank.double()
    left = _stacked(_multiply(inverse, columns)).movedim(0, -1)
    right = _stacked(_multiply(_conjugate(inverse), columns)).transpose(0, 1)  # P^T times the real form of the inverse
    inner = _stacked(columns).transpose(0, 1) @ left  # [H, r, r]
    identity = torch.eye(len(low_rank), dtype=torch.float64, device=dt.device)
    return -_multiply(scaled, inverse), 2.0 * step * left, torch.linalg.solve(identity + step * inner, right)


class _Assembled(torch.autograd.Function):
    """Multiplication by a complex diagonal [H, n, 2] as a real matrix, plus left right, [H, 2n, 2n]."""

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        modes = diagonal.shape[1]
        re, im = diagonal.unbind(-1)
        total = left @ right
        total.diagonal(dim1=-2, dim2=-1).add_(torch.cat([re, re], dim=-1))
        total.diagonal(modes, dim1=-2, dim2=-1).sub_(im)
        total.diagonal(-modes, dim1=-2, dim2=-1).add_(im)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = ctx.saved_tensors
        modes = left.shape[1] // 2
        both = grad.diagonal(dim1=-2, dim2=-1)
        d_re = both[:, :modes] + both[:, modes:]
        d_im = grad.diagonal(-modes, dim1=-2, dim2=-1) - grad.diagonal(modes, dim1=-2, dim2=-1)
        return torch.stack([d_re, d_im], dim=-1), grad @ right.mT, left.mT @ grad


def _assemble(diagonal: Tensor, left: Tensor, right: Tensor) -> Tensor:
    matrix: Tensor = _Assembled.apply(diagonal, left, right)  # type: ignore[no-untyped-call]
    return matrix


class _Lost(torch.autograd.Function):
    """``rows (I - A^k)``, [H, M, N], from rows [H, M, N] and the gap ``E = I - A`` [H, N, N].

    With ``E_k = I - A^k`` two stretches combine by ``E_{j+k} = E_j + (I - E_j) E_k``. Working on the power itself and
    subtracting at the end would cancel where the system forgets little (measured in float32: an error of 1e-4 of the
    kernel instead of 1e-6).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gap: Tensor, exponent: int) -> Tensor:
        gaps, strides = [gap], []  # strides[k]: how often the gap of 2^k steps is applied
        while exponent > _STRIDES:
            strides.append(exponent % 2)
            gaps.append(torch.baddbmm(gaps[-1], gaps[-1], gaps[-1], beta=2.0, alpha=-1.0))
            exponent //= 2
        strides.append(exponent)
        lost, kept = torch.zeros_like(rows), []
        for level, count in enumerate(strides):
            for _ in range(count):
                kept.append(rows - lost)
                lost = torch.baddbmm(lost, kept[-1], gaps[level])
        ctx.strides, ctx.outputs = strides, rows.shape[1]
        ctx.save_for_backward(torch.cat(kept, dim=1), *gaps)
        return lost

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        kept, *gaps = ctx.saved_tensors
        adjoint, stop, d_gap = grad, kept.shape[1], torch.zeros_like(gaps[-1])
        for level in range(len(gaps) - 1, -1, -1):
            gap = gaps[level]
            if level < len(gaps) - 1:  # the gap of twice as many steps is 2 E - E E
                d_gap = torch.baddbmm(d_gap, gap.mT, d_gap, beta=2.0, alpha=-1.0).sub_(d_gap @ gap.mT)
            adjoints = []
            for _ in range(ctx.strides[level]):
                adjoints.append(adjoint)
                adjoint = torch.baddbmm(adjoint, adjoint, gap.mT, alpha=-1.0)
            start = stop - len(adjoints) * ctx.outputs
            if adjoints:
                d_gap.baddbmm_(kept[:, start:stop].mT, torch.cat(adjoints[::-1], dim=1))
            stop = start
        return grad - adjoint, d_gap, None


def _truncated(C: Tensor, gap: Tensor, length: int) -> Tensor:
    """Return ``C (I - A_bar^L)``, [M, H, n, 2]: with it in place of C the generating function ends after L terms."""
    rows = _stacked(_conjugate(C)).transpose(0, 1)  # [H, M, 2n], row vectors of the real form
    lost: Tensor = _Lost.apply(rows, gap, length)  # type: ignore[no-untyped-call]
    re, im = lost.transpose(0, 1).chunk(2, dim=-1)
    return torch.stack([re, -im], dim=-1)


class _Resolvent(torch.autograd.Function):
    """``sum_n (c alpha + i s beta) / ((2 i s - a c)^2 + (b c)^2)``, real and imaginary part, [H, p, K].

    alpha, beta [H, p, n]; a, b [H, n]; s, c [K] sines and cosines. The table of all denominators [H, n, K] is made for
    a few features at a time, small enough for the cache, and again in the backward pass instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, beta: Tensor, a: Tensor, b: Tensor, sine: Tensor, cosine: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(alpha, beta, a, b, sine, cosine)
        value_re, value_im = (alpha.new_empty(*alpha.shape[:2], len(sine)) for _ in range(2))
        for part in _parts(a, len(sine)):
            table_re, table_im = _inverse_table(a[part], b[part], sine, cosine)
            value_re[part] = (alpha[part] @ table_re) * cosine - (beta[part] @ table_im) * sine
            value_im[part] = (alpha[part] @ table_im) * cosine + (beta[part] @ table_re) * sine
        return value_re, value_im

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_re: Tensor, d_im: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        alpha, beta, a, b, sine, cosine = ctx.saved_tensors
        d_alpha, d_beta, d_a, d_b = (torch.empty_like(part) for part in (alpha, beta, a, b))
        for part in _parts(a, len(sine)):
            w_re, w_im = _inverse_table(a[part], b[part], sine, cosine)
            re_c, im_c, re_s, im_s = d_re[part] * cosine, d_im[part] * cosine, d_re[part] * sine, d_im[part] * sine
            d_alpha[part] = re_c @ w_re.mT + im_c @ w_im.mT
            d_beta[part] = im_s @ w_re.mT - re_s @ w_im.mT
            weights = torch.cat([alpha[part], beta[part]], dim=1).mT  # [h, n, 2 p]
            g_re, g_im = weights @ torch.cat([re_c, im_s], dim=1), weights @ torch.cat([im_c, -re_s], dim=1)
            square, twice = w_re * w_re - w_im * w_im, 2.0 * w_re * w_im  # of the table, whose derivative is -w^2
            along = (square * g_re).addcmul_(twice, g_im) @ (cosine * cosine)  # both negative
            across = (square * g_im).addcmul_(twice, g_re, value=-1.0) @ (sine * cosine)
            d_a[part] = 4.0 * across - 2.0 * a[part] * along
            d_b[part] = -2.0 * b[part] * along
        return d_alpha, d_beta, d_a, d_b, None, None


def _parts(a: Tensor, nodes: int) -> list[slice]:
    """Return runs of features whose tables have about ``_TABLE`` entries together."""
    features, modes = a.shape
    size = max(1, (_TABLE if a.device.type == "cpu" else 128 * _TABLE) // (modes * nodes))
    return [slice(first, first + size) for first in range(0, features, size)]


def _inverse_table(a: Tensor, b: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``1 / ((2 i s - a c)^2 + (b c)^2)``, real and imaginary part [h, n, K]."""
    product, twice = b.unsqueeze(-1) * cosine, 2.0 * sine
    real = (a.unsqueeze(-1) * cosine).square_().sub_((twice - product).mul_(product.add_(twice)))
    imag = (4.0 * a).unsqueeze(-1) * (sine * cosine)  # negative: the inverse has the opposite sign
    inverse = (real * real).addcmul_(imag, imag).reciprocal_()
    return real.mul_(inverse), imag.mul_(inverse)


def _pair_weights(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha, beta [H, p, n] of all p products v of a left [l, H, n, 2] and a right [k, H, n, 2] vector.

    A mode and its conjugate contribute ``(c alpha + i s beta) / ((2 i s - a c)^2 + (b c)^2)`` to ``q(v)``.
    """
    l_re, l_im = left.unsqueeze(1).unbind(-1)
    r_re, r_im = right.unsqueeze(0).unbind(-1)
    v_re = (l_re * r_re - l_im * r_im).flatten(0, 1).transpose(0, 1)
    v_im = (l_re * r_im + l_im * r_re).flatten(0, 1).transpose(0, 1)
    return -2.0 * (v_re * a.unsqueeze(1) + v_im * b.unsqueeze(1)), 4.0 * v_re


def _eliminate(re: Tensor, im: Tensor, cosine: Tensor, rank: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Return ``q00 - c q01 (I + c q11)^-1 q10``, [M, H, K], from all q [H, (r + M)(r + 1), K], by Gaussian elimination.

    The real part of ``c q11`` is non-negative for a stable system, so every pivot is at least 1 in size.
    """
    features, _, nodes = re.shape
    unit = torch.eye(rank + outputs, rank + 1, dtype=re.dtype, device=re.device)
    unit[rank:, rank:] = 0.0
    weight = torch.ones(rank + 1, nodes, dtype=re.dtype, device=re.device)
    weight[:rank] = cosine
    re = re.view(features, rank + outputs, rank + 1, nodes) * weight + unit.unsqueeze(-1)
    im = im.view(features, rank + outputs, rank + 1, nodes) * weight
    for _ in range(rank):
        p_re, p_im = re[:, :1, :1], im[:, :1, :1]
        size = p_re * p_re + p_im * p_im
        f_re = (re[:, 1:, :1] * p_re + im[:, 1:, :1] * p_im) / size
        f_im = (im[:, 1:, :1] * p_re - re[:, 1:, :1] * p_im) / size
        r_re, r_im = re[:, :1, 1:], im[:, :1, 1:]
        re, im = re[:, 1:, 1:] - (f_re * r_re - f_im * r_im), im[:, 1:, 1:] - (f_re * r_im + f_im * r_re)
    return re[:, :, 0].transpose(0, 1), im[:, :, 0].transpose(0, 1)
