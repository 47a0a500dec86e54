"""Causal convolution by real FFTs, with a backward pass that stays in frequency space.

The gradient of a kernel is a sum over the batch; summing the spectra first leaves one inverse transform for the kernel
instead of one a sequence. Sequences run along the last axis: transforms along a strided axis cost up to twice as much.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tsforge.ops.once import first_derivative_only

_RECOMPUTE_VALUES = 2**26  # above this many input values spectra are computed again in the backward pass, not kept


@lru_cache(maxsize=1024)
def fft_length(least: int) -> int:
    """Return the transform length to use for at least ``least`` points: a multiple of 8 with no factor above 7.

    Odd lengths, even smooth ones, are several times slower than their even neighbours on common CPU libraries; the next
    power of two is the upper end.
    """
    size = max(8, -(-least // 8) * 8)
    while True:
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 8


class _CausalConvolution(torch.autograd.Function):
    """y[b, m, h] = first L points of u[b, h] * k[m, h]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, keeps_spectra: bool) -> Tensor:
        length, taps = u.shape[-1], kernel.shape[-1]
        size = fft_length(length + taps - 1)
        u_f, k_f = torch.fft.rfft(u, n=size), torch.fft.rfft(kernel, n=size)
        ctx.sizes = (size, length, taps)
        ctx.keeps_spectra = keeps_spectra
        ctx.save_for_backward(*((u_f, k_f) if keeps_spectra else (u, kernel)))
        if kernel.shape[0] == 1:  # one product without a broadcast axis
            single: Tensor = torch.fft.irfft(u_f * k_f[0], n=size)
            return single[..., :length].unsqueeze(1)
        whole: Tensor = torch.fft.irfft(u_f.unsqueeze(1) * k_f, n=size)
        return whole[..., :length]

    @staticmethod
    @first_derivative_only  # spectra that were kept are no part of the graph: a second derivative would be wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        size, length, taps = ctx.sizes
        first, second = ctx.saved_tensors
        u_f, k_f = (
            (first, second) if ctx.keeps_spectra else (torch.fft.rfft(first, n=size), torch.fft.rfft(second, n=size))
        )
        grad_f = torch.fft.rfft(grad, n=size)  # [B, M, H, F]
        du = dk = None
        if ctx.needs_input_grad[0]:
            if k_f.shape[0] == 1:
                spectrum = grad_f[:, 0] * k_f[0].conj()
            else:
                spectrum = torch.einsum("bmhf,mhf->bhf", grad_f, k_f.conj())
            du = torch.fft.irfft(spectrum, n=size)[..., :length]
        if ctx.needs_input_grad[1]:
            spectrum = (grad_f * u_f.conj().unsqueeze(1)).sum(0)  # [M, H, F]
            dk = torch.fft.irfft(spectrum, n=size)[..., :taps]
        return du, dk, None


def causal_convolution(u: Tensor, kernel: Tensor, *, keeps_spectra: bool | None = None) -> Tensor:
    """Return y[b, m, h, t] = sum_s kernel[m, h, s] u[b, h, t - s], with u = 0 before its start.

    Args:
        u: [B, H, L] inputs.
        kernel: [M, H, T] impulse responses; T may differ from L.
        keeps_spectra: keep both spectra for the backward pass (faster) or the inputs (half the memory, 10-30 % slower);
            default by size.

    Shapes:
        returns [B, M, H, L], in the dtype of the inputs (float32 or float64).
    """
    if keeps_spectra is None:
        keeps_spectra = u.numel() <= _RECOMPUTE_VALUES
    result: Tensor = _CausalConvolution.apply(u, kernel, keeps_spectra)  # type: ignore[no-untyped-call]
    return result


def causal_convolution_reference(u: Tensor, kernel: Tensor) -> Tensor:
    """Return the same by one shifted product a tap (slow, obvious)."""
    total = u.new_zeros(u.shape[0], kernel.shape[0], *u.shape[1:])
    for lag in range(min(kernel.shape[-1], u.shape[-1])):
        shifted = torch.nn.functional.pad(u, (lag, 0))[..., : u.shape[-1]]
        total = total + kernel[..., lag : lag + 1] * shifted.unsqueeze(1)
    return total
