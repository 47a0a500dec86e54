"""The kernel of diagonal systems by ``csrc/vandermonde.cpp``, for CPUs of machines that have a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsforge.ops import compiled
from tsforge.ops.once import first_derivative_only

NAME = "vandermonde"
_STRIP = 32  # lags that the C++ code handles at once
_WORTH_A_THREAD = 2**21  # multiplications, H L n; starting a thread costs some ten microseconds


def unavailable(weight: Tensor) -> str | None:
    """Return why the compiled kernel cannot take this weight, or None."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return f"it reads float32 and float64 on a CPU, not {weight.dtype} on {weight.device.type}"
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    return compiled.unavailable_reason(NAME)


def _sizes(weight: Tensor, length: int) -> tuple[int, ...]:
    channels, features, modes = weight.shape
    block = _STRIP
    while block * block < length:  # near the square root: as many jumps as steps
        block += _STRIP
    jumps = -(-length // block)
    work = channels * features * modes * length
    return channels, features, modes, length, block, jumps, max(min(compiled.threads(), work // _WORTH_A_THREAD), 1)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
        size, turn = log_re.double().exp(), log_im.double()
        a_re, a_im = (size * turn.cos()).contiguous(), (size * turn.sin()).contiguous()
        w_re, w_im = w_re.contiguous(), w_im.contiguous()
        kernel = w_re.new_empty(*w_re.shape[:2], length)
        suffix = "f32" if w_re.dtype == torch.float32 else "f64"
        sizes = _sizes(w_re, length)
        compiled.call(NAME, f"vandermonde_forward_{suffix}", a_re, a_im, w_re, w_im, kernel, *sizes)
        ctx.save_for_backward(a_re, a_im, w_re, w_im)
        ctx.facts = (suffix, sizes, log_re.dtype, log_im.dtype)
        return kernel

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        a_re, a_im, w_re, w_im = ctx.saved_tensors
        suffix, sizes, re_dtype, im_dtype = ctx.facts
        dw_re, dw_im, dlog_re, dlog_im = (torch.empty_like(part) for part in (w_re, w_im, a_re, a_im))
        compiled.call(
            NAME,
            f"vandermonde_backward_{suffix}",
            *(a_re, a_im, w_re, w_im, grad.contiguous(), dw_re, dw_im, dlog_re, dlog_im),
            *sizes,
        )
        return dlog_re.to(re_dtype), dlog_im.to(im_dtype), dw_re, dw_im, None


def compiled_kernel(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    """Return the kernel [M, H, length] of log a [H, n] and w [M, H, n]; differentiable once in all four."""
    kernel: Tensor = _Kernel.apply(log_re, log_im, w_re, w_im, length)  # type: ignore[no-untyped-call]
    return kernel
