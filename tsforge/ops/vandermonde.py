"""Diagonal linear state space systems x_k = a x_{k-1} + b u_k, y_k = 2 Re(c x_k), stored as one mode of each conjugate
pair and computed in real arithmetic (S4D: Gu, Gupta, Goel, Re, 2022, arXiv 2206.11893).

Two levels: lag l = j s + i with block size s near sqrt(L), so a^l = (a^s)^j a^i. Tables of a^(s j) and a^i have
n (L/s + s) entries instead of n L, and their combination is one real matrix product a feature:
``K = [Re X, -Im X] [Re Y; Im Y]`` with X[j] = 2 w a^(s j), Y[i] = a^i. Phases are multiplied out and reduced modulo
2 pi in float64 before the trigonometric functions see them in the working precision; that keeps lags of 10^4 exact to
rounding at the price of float32.

Deviations: the paper writes a and b by their continuous form; here the logarithm of a comes in, so that every
discretisation shares this code.

Legend: B batch, M channels, H features, n modes, L steps; a complex quantity is a pair (real, imaginary) of tensors;
log_a [H, n], w = c b [M, H, n].
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import _vandermonde_compiled, _vandermonde_triton
from tsforge.ops.discretise import zoh_diagonal
from tsforge.ops.krylov import block_size

Complex: TypeAlias = tuple[Tensor, Tensor]
_TURN = 2.0 * math.pi


def multiply(first: Complex, second: Complex) -> Complex:
    """Return the product of two complex quantities."""
    (a, b), (c, d) = first, second
    return a * c - b * d, a * d + b * c


def _exact_powers(log_re: Tensor, log_im: Tensor, steps: Tensor, dtype: torch.dtype) -> Complex:
    """Return exp((log_re + i log_im) * steps), broadcast, with phases reduced in float64."""
    phase = log_im * steps
    if dtype != torch.float64:
        phase = phase.sub_((phase / _TURN).round_(), alpha=_TURN).to(dtype)
    size = (log_re * steps).to(dtype).exp_()
    return size * phase.cos(), phase.sin_().mul_(size)


class _Powers(torch.autograd.Function):
    """a^(stride k) for k < count, [H, count, n]; exponentials of 2 sqrt(count) exponents, products for the rest."""

    @staticmethod
    def forward(ctx: Any, log_re: Tensor, log_im: Tensor, stride: int, count: int, dtype: torch.dtype) -> Complex:
        fine = max(math.isqrt(count), 1)
        coarse = -(-count // fine)
        wide = (log_re.double().unsqueeze(-2), log_im.double().unsqueeze(-2))
        steps = torch.arange(max(fine, coarse, count), device=log_re.device, dtype=torch.float64).unsqueeze(-1)
        near = [part.unsqueeze(-3) for part in _exact_powers(*wide, steps[:fine] * stride, dtype)]  # [H, 1, fine, n]
        far = [part.unsqueeze(-2) for part in _exact_powers(*wide, steps[:coarse] * (stride * fine), dtype)]
        re = (far[0] * near[0]).sub_(far[1] * near[1]).flatten(-3, -2)[..., :count, :]
        im = (far[0] * near[1]).add_(far[1] * near[0]).flatten(-3, -2)[..., :count, :]
        ctx.save_for_backward(re, im, (steps[:count] * stride).to(dtype))
        ctx.dtypes = (log_re.dtype, log_im.dtype)
        return re, im

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        re, im, count = ctx.saved_tensors
        d_re, d_im = grads
        along = (d_re * re).addcmul_(d_im, im).mul_(count).sum(-2)
        turning = (d_im * re).sub_(d_re * im).mul_(count).sum(-2)
        return along.to(ctx.dtypes[0]), turning.to(ctx.dtypes[1]), None, None, None


def powers(log_a: Complex, count: int, dtype: torch.dtype, *, stride: int = 1) -> Complex:
    """Return a^(stride k) for k < count, real and imaginary part, each [H, count, n].

    Args:
        log_a: logarithm of a [H, n]; pass it in float64 where lags are long.
        count, stride: which powers.
        dtype: float32 or float64 of the table; phases are float64 either way.
    """
    table: Complex = _Powers.apply(*log_a, stride, count, dtype)  # type: ignore[no-untyped-call]
    return table


def vandermonde_kernel(log_a: Complex, weight: Complex, length: int) -> Tensor:
    """Return K[m, h, l] = 2 Re sum_n weight[m, h, n] a[h, n]^l for l < length; the fastest path there is.

    Compiled code on a CPU with a compiler, a Triton kernel on a GPU, else ``two_level_kernel``; all of them agree to
    rounding.

    Shapes:
        log_a two [H, n], weight two [M, H, n]; returns [M, H, length] in the dtype of ``weight``.

    Raises:
        ModelError: length below 1.
    """
    _check_length(length)
    if _vandermonde_triton.unavailable(weight[0]) is None:
        return _vandermonde_triton.triton_kernel(*log_a, *weight, length)
    if _vandermonde_compiled.unavailable(weight[0]) is None:
        return _vandermonde_compiled.compiled_kernel(*log_a, *weight, length)
    return two_level_kernel(log_a, weight, length)


def _check_length(length: int) -> None:
    if length < 1:
        raise ModelError(f"a kernel needs at least one step, asked for {length}")


def two_level_kernel(log_a: Complex, weight: Complex, length: int) -> Tensor:
    """Return ``vandermonde_kernel`` in plain torch."""
    _check_length(length)
    dtype = weight[0].dtype
    channels, features = weight[0].shape[:2]
    block = block_size(length)
    blocks = -(-length // block)
    right = torch.cat(powers(log_a, block, dtype), dim=-1).transpose(1, 2)  # [H, 2n, s]
    far = powers(log_a, blocks, dtype, stride=block)  # [H, q, n]
    w_re, w_im = (2.0 * part.transpose(0, 1).unsqueeze(2) for part in weight)  # [H, M, 1, n]
    re, im = multiply((w_re, w_im), (far[0].unsqueeze(1), far[1].unsqueeze(1)))
    left = torch.cat([re, im.neg()], dim=-1).flatten(1, 2)  # [H, M q, 2n]
    kernel = torch.bmm(left, right)  # [H, M q, s]
    return kernel.view(features, channels, blocks * block)[..., :length].transpose(0, 1).contiguous()


def vandermonde_kernel_reference(log_a: Complex, weight: Complex, length: int) -> Tensor:
    """Return the same from the complex matrix of all powers, [H, n, L] at once (slow, obvious)."""
    steps = torch.arange(length, device=log_a[0].device)
    table = torch.exp(torch.complex(*log_a).unsqueeze(-1) * steps)  # [H, n, L]
    return 2.0 * torch.einsum("mhn,hnl->mhl", torch.complex(*weight), table.to(torch.complex(*weight).dtype)).real


def last_output(kernel: Tensor, u: Tensor) -> Tensor:
    """Return only the last output [B, M, H] of the convolution of u [B, H, L] with kernel [M, H, L]."""
    return torch.einsum("bhl,mhl->bmh", u, kernel.flip(-1))


def diagonal_step(a: Complex, b: Complex, c: Complex, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and state after one input.

    Shapes:
        a, b [H, n], c [M, H, n] (pairs), u [B, H], state [B, H, n, 2]; returns [B, M, H] and [B, H, n, 2].
    """
    if not torch.is_grad_enabled():  # half the passes over the state; complex numbers would only bother a compiler
        after = torch.view_as_complex(state) * torch.complex(*a)
        after.addcmul_(torch.complex(*b), u.unsqueeze(-1).to(after.dtype))
        new = torch.view_as_real(after)
        readout = torch.stack([2.0 * c[0], -2.0 * c[1]], dim=-1).flatten(-2)  # [M, H, 2n]
        return torch.einsum("mhn,bhn->bmh", readout, new.flatten(-2)), new
    re, im = multiply(a, state.unbind(-1))  # type: ignore[arg-type]
    re, im = re + b[0] * u.unsqueeze(-1), im + b[1] * u.unsqueeze(-1)
    y = 2.0 * (torch.einsum("mhn,bhn->bmh", c[0], re) - torch.einsum("mhn,bhn->bmh", c[1], im))
    return y, torch.stack([re, im], dim=-1)


def diagonal_scan_reference(
    a: Complex, b: Complex, c: Complex, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, M, H, L] and the last state of u [B, H, L], one step after another (slow, obvious)."""
    state = u.new_zeros(*u.shape[:2], a[0].shape[-1], 2) if state is None else state
    outputs = []
    for value in u.unbind(-1):
        y, state = diagonal_step(a, b, c, value, state)
        outputs.append(y)
    return torch.stack(outputs, dim=-1), state


def chunked_scan(
    log_a: Complex, b: Complex, c: Complex, u: Tensor, state: Tensor | None = None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state of a sequence of any length, from any state.

    Inside a chunk the outputs are a Toeplitz matrix product; the states at chunk ends follow from a short recurrence;
    what a chunk inherits is one more matrix product. Memory grows with L, work with L (chunk + 4 n).

    Shapes:
        log_a, b [H, n], c [M, H, n] (pairs), u [B, H, L], state [B, H, n, 2] or None for zeros; returns [B, M, H, L]
        and [B, H, n, 2].
    """
    batch, features, length = u.shape
    size = min(chunk or 64, length)
    chunks = -(-length // size)
    pad = chunks * size - length  # zeros before the first input leave a zero state as it is ...
    if state is not None and pad:  # ... but would age a given one: the odd rest goes first, by itself
        rest = length - (chunks - 1) * size
        head, state = chunked_scan(log_a, b, c, u[..., :rest], state, chunk=rest)
        tail, state = chunked_scan(log_a, b, c, u[..., rest:], state, chunk=size)
        return torch.cat([head, tail], dim=-1), state
    channels, modes = c[0].shape[0], c[0].shape[-1]
    table = torch.stack(powers(log_a, size + 1, u.dtype), dim=2).permute(0, 3, 2, 1)  # [H, n, 2, s + 1]
    pieces = torch.nn.functional.pad(u, (pad, 0)).view(batch, features, chunks, size)
    kernel = _short_kernel(table, b, c, size)  # [M, H, s]
    within = torch.einsum("bhcj,mhij->bmhci", pieces, _toeplitz(kernel))
    drive = multiply(b_like(b, 1), (table[:, :, 0, :size], table[:, :, 1, :size]))  # a^i b [H, n, s]
    arriving = torch.einsum(
        "bhcj,hnpj->bhcnp", pieces.flip(-1), torch.stack(drive, dim=2)
    )  # state that each chunk adds at its end
    jump: Complex = (table[:, :, 0, size], table[:, :, 1, size])
    current = u.new_zeros(batch, features, modes, 2) if state is None else state
    inherited = []
    for added in arriving.unbind(2):
        inherited.append(current)
        current = torch.stack(multiply(jump, current.unbind(-1)), dim=-1) + added  # type: ignore[arg-type]
    before = torch.stack(inherited, dim=2)  # [B, H, c, n, 2]
    out = _readout(table[..., 1:], c)  # [M, H, n, 2, s]
    carried = torch.einsum("bhcnp,mhnpi->bmhci", before, out)
    y = (within + carried).reshape(batch, channels, features, chunks * size)[..., pad:]
    return y, current


def b_like(b: Complex, axes: int) -> Complex:
    """Return the pair with further trailing axes of size 1."""
    shape = (*b[0].shape, *([1] * axes))
    return b[0].view(shape), b[1].view(shape)


def _readout(table: Tensor, c: Complex) -> Tensor:
    """Return 2 c a^i as the weights [M, H, n, 2, s] of real and imaginary part of a state."""
    re, im = multiply(b_like(c, 1), (table[:, :, 0], table[:, :, 1]))
    return 2.0 * torch.stack([re, -im], dim=3)


def _short_kernel(table: Tensor, b: Complex, c: Complex, size: int) -> Tensor:
    re, im = multiply(c, b)
    return 2.0 * (
        torch.einsum("mhn,hni->mhi", re, table[:, :, 0, :size])
        - torch.einsum("mhn,hni->mhi", im, table[:, :, 1, :size])
    )


def _toeplitz(kernel: Tensor) -> Tensor:
    """Return the lower triangular matrices [M, H, s, s] with kernel[i - j] at (i, j)."""
    size = kernel.shape[-1]
    padded = torch.nn.functional.pad(kernel, (size - 1, 0))  # zeros for negative lags
    return padded.flip(-1).unfold(-1, size, 1).flip(-2)


def elapsed_scan(
    continuous: tuple[Complex, Complex], c: Complex, u: Tensor, elapsed: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state when every step takes its own time: zero-order hold over ``elapsed`` steps.

    x_k = exp(e_k z) x_{k-1} + (exp(e_k z) - 1) / z * g u_k, with z = dt lambda and g = dt B; e_k = 0 leaves the state
    alone, so rows that are no observations can be padded with it.

    Shapes:
        continuous: z [H, n] and g [H, n] (pairs), c [M, H, n] (pair), u [B, H, L], elapsed [B, L] >= 0, state
        [B, H, n, 2] or None; returns [B, M, H, L] and [B, H, n, 2].
    """
    z, g = continuous
    state = u.new_zeros(*u.shape[:2], z[0].shape[-1], 2) if state is None else state
    spans, which = torch.unique(elapsed, return_inverse=True)  # few on a grid: tables instead of a call a step
    time = spans.to(z[0].dtype).view(-1, 1, 1)
    size, turn = torch.exp(time * z[0]), time * z[1]
    decay = torch.stack([size * turn.cos(), size * turn.sin()], dim=-1).to(u.dtype)  # [U, H, n, 2]
    wide: Complex = (z[0].expand(len(spans), -1, -1), z[1].expand(len(spans), -1, -1))
    gain = torch.stack(multiply(zoh_diagonal(*wide, time), g), dim=-1).to(u.dtype)
    readout = torch.stack([2.0 * c[0], -2.0 * c[1]], dim=-1)
    outputs = []
    for value, index in zip(u.unbind(-1), which.unbind(-1), strict=True):
        kept = multiply(decay[index].unbind(-1), state.unbind(-1))  # type: ignore[arg-type]
        state = torch.stack(kept, dim=-1) + gain[index] * value[..., None, None]
        outputs.append(torch.einsum("mhnp,bhnp->bmh", readout, state))
    return torch.stack(outputs, dim=-1), state
