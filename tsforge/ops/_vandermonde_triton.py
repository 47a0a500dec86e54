"""The kernel of diagonal systems on NVIDIA GPUs: one Triton kernel a pass instead of some forty small ones.

A program takes a run of lags of one feature: powers of the run's first lag come from one float64 phase a mode, those
inside it from a small table, as in ``vandermonde.py``. The adjoint writes one partial sum a run of blocks, added up by
``torch.sum``: no atomics, so results repeat.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64  # lags of a tile
_SPLITS = 8  # runs of blocks in the adjoint: more programs than one a feature


def unavailable(weight: Tensor) -> str | None:
    """Return why the Triton kernel cannot take this weight, or None."""
    if not weight.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it is for NVIDIA GPUs, not for {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"it computes in float32, not {weight.dtype}"
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
        from tsforge.ops import _vandermonde_triton_kernels as kernels

        channels, features, modes = w_re.shape
        logs = torch.stack([log_re, log_im]).double()  # [2, H, n]
        weights = torch.stack([w_re, w_im])  # [2, M, H, n]
        kernel = w_re.new_empty(channels, features, length)
        grid = (features, -(-length // _BLOCK))
        kernels.forward_kernel[grid](
            logs, weights, kernel, channels, features, modes, length, BLOCK=_BLOCK, MODES=_power(modes)
        )
        ctx.save_for_backward(logs, weights)
        ctx.facts = (length, log_re.dtype, log_im.dtype)
        return kernel

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        from tsforge.ops import _vandermonde_triton_kernels as kernels

        logs, weights = ctx.saved_tensors
        length, re_dtype, im_dtype = ctx.facts
        channels, features, modes = weights.shape[1:]
        blocks = -(-length // _BLOCK)
        per_split = -(-blocks // min(_SPLITS, blocks))
        splits = -(-blocks // per_split)
        parts = weights.new_empty(splits, 4, channels, features, modes)
        kernels.backward_kernel[(features, channels, splits)](
            *(logs, weights, grad.contiguous(), parts),
            *(channels, features, modes, length, per_split),
            BLOCK=_BLOCK,
            MODES=_power(modes),
        )
        total = parts.sum(0)
        by_log = total[2:].sum(1)
        return by_log[0].to(re_dtype), by_log[1].to(im_dtype), total[0], total[1], None


def triton_kernel(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    """Return the kernel [M, H, length] of log a [H, n] and w [M, H, n]; differentiable once in all four."""
    kernel: Tensor = _Kernel.apply(log_re, log_im, w_re, w_im, length)  # type: ignore[no-untyped-call]
    return kernel
