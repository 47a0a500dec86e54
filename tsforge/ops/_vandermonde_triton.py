"""The kernel of diagonal systems on NVIDIA GPUs: a few Triton kernels a pass instead of some hundred small ones.

A program takes a run of lags of one feature: powers of the run's first lag come from one float64 phase a mode, those
inside it from a small table, as in ``vandermonde.py``. The adjoint writes one partial sum a run of blocks, added up by
``torch.sum``: no atomics, so results repeat.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from tsforge.ops import triton_support
from tsforge.ops.once import first_derivative_only

Limits: TypeAlias = tuple[tuple[float, float], tuple[float, float]]
Parameters: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_BLOCK = 64  # lags of a tile
_SPLITS = 8  # runs of blocks in the adjoint: more programs than one a feature


def unavailable(weight: Tensor) -> str | None:
    """Return why the Triton kernel cannot take this weight, or None."""
    if weight.dtype != torch.float32:
        return f"it computes in float32, not {weight.dtype}"
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    return triton_support.unavailable_reason(weight.device)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _response(logs: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return the kernel [M, H, L] of logs [2, H, n] and weights [2, M, H, n]."""
    from tsforge.ops import _vandermonde_triton_kernels as kernels

    channels, features, modes = weights.shape[1:]
    kernel = weights.new_empty(channels, features, length)
    grid = (features, -(-length // _BLOCK))
    sizes = (channels, features, modes, length)
    kernels.forward_kernel[grid](logs, weights, kernel, sizes, BLOCK=_BLOCK, MODES=_power(modes))
    return kernel


def _adjoint(logs: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """Return gradients [splits, 4, M, H, n] of Re w, Im w, Re log a, Im log a, to be summed over runs of blocks."""
    from tsforge.ops import _vandermonde_triton_kernels as kernels

    channels, features, modes = weights.shape[1:]
    length = grad.shape[-1]
    blocks = -(-length // _BLOCK)
    per_split = -(-blocks // min(_SPLITS, blocks))
    splits = -(-blocks // per_split)
    parts = weights.new_empty(splits, 4, channels, features, modes)
    kernels.backward_kernel[(features, channels, splits)](
        *(logs, weights, grad.contiguous(), parts, (channels, features, modes, length), per_split),
        BLOCK=_BLOCK,
        MODES=_power(modes),
    )
    return parts


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
        logs, weights = torch.stack([log_re, log_im]).double(), torch.stack([w_re, w_im])
        ctx.save_for_backward(logs, weights)
        ctx.dtypes = (log_re.dtype, log_im.dtype)
        return _response(logs, weights, length)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        logs, weights = ctx.saved_tensors
        total = _adjoint(logs, weights, grad).sum(0)
        by_log = total[2:].sum(1)
        return by_log[0].to(ctx.dtypes[0]), by_log[1].to(ctx.dtypes[1]), total[0], total[1], None


class _HeldKernel(torch.autograd.Function):
    """S4D with zero-order hold from its parameters on: the discretisation and its chain rule are one kernel each."""

    @staticmethod
    def forward(ctx: Any, length: int, rate: float, limits: Limits, *parameters: Tensor) -> Tensor:
        from tsforge.ops import _vandermonde_triton_kernels as kernels

        kept = tuple(part.contiguous() for part in parameters)
        C = kept[-1]
        channels, features, modes = C.shape[:3]
        logs = C.new_empty(2, features, modes, dtype=torch.float64)
        weights = C.new_empty(2, channels, features, modes)
        sizes = (channels, features, modes, features // len(kept[1]))
        bounds = (float(rate), *limits[0], *limits[1])
        kernels.discretise_kernel[(features,)](kept, logs, weights, sizes, bounds, MODES=_power(modes))
        ctx.save_for_backward(*kept, logs, weights)
        ctx.facts = (sizes, bounds)
        return _response(logs, weights, length)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from tsforge.ops import _vandermonde_triton_kernels as kernels

        *kept, logs, weights = ctx.saved_tensors
        sizes, bounds = ctx.facts
        _, features, modes, per_copy = sizes
        log_dt, C = kept[0], kept[-1]
        parts = _adjoint(logs, weights, grad)
        d_dt, d_own, d_C = torch.empty_like(log_dt), C.new_empty(features, 4, modes), torch.empty_like(C)
        kernels.chain_kernel[(features,)](
            tuple(kept), parts, d_dt, d_own, d_C, sizes, len(parts), bounds, MODES=_power(modes)
        )
        shared = d_own.view(features // per_copy, per_copy, 4, modes).sum(1)
        return None, None, None, d_dt, shared[:, 0], shared[:, 1], shared[:, 2:].transpose(1, 2), d_C


def held_kernel(parameters: Parameters, length: int, rate: float, limits: Limits) -> Tensor:
    """Return the kernel [M, H, length] of S4D with zero-order hold, differentiable once in its parameters.

    Args:
        parameters: log dt [H], log decay and frequency [S, n], B [S, n, 2], C [M, H, n, 2], float32; S divides H.
        length: L.
        rate: factor of dt.
        limits: least and largest log dt, and the same of log decay; beyond them they count as the limit.
    """
    kernel: Tensor = _HeldKernel.apply(length, rate, limits, *parameters)  # type: ignore[no-untyped-call]
    return kernel


def triton_kernel(log_re: Tensor, log_im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
    """Return the kernel [M, H, length] of log a [H, n] and w [M, H, n]; differentiable once in all four."""
    kernel: Tensor = _Kernel.apply(log_re, log_im, w_re, w_im, length)  # type: ignore[no-untyped-call]
    return kernel
