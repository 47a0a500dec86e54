"""The forced shallow PLRNN and its free run by the C++ kernel ``csrc/plrnn.cpp``.

The map and the forcing are those of Hess et al., arXiv 2306.04406 (sections 2 and 3); see ``tsforge.ops.plrnn`` for the
equations. The kernel walks blocks of samples through time with neighbouring hidden units in the lanes; the backward
pass computes the hidden values again from the states and keeps them for a few steps only. Nothing of size H is stored
over time.

Deviations: none. Gradients are summed in an order that does not depend on the number of threads.

Legend: G groups, T steps, B batch, M latent units, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import compiled
from tsforge.ops.plrnn import Shallow

_KERNEL = "plrnn"
_WORK_PER_THREAD = 1 << 17  # weights of a layer times samples times steps; with less a thread costs more than it brings


def unavailable(z1: Tensor, params: Shallow) -> str | None:
    """Return why this kernel cannot take such tensors, or None; builds it on first use."""
    if z1.device.type != "cpu":
        return f"it runs on the CPU, z1 is on {z1.device}"
    if z1.dtype not in (torch.float32, torch.float64) or any(part.dtype != z1.dtype for part in params):
        return f"it takes float32 or float64, the same everywhere, got z1 {z1.dtype}, W1 {params.W1.dtype}"
    return compiled.unavailable_reason(_KERNEL)


def gtf_compiled(
    z1: Tensor, forcing: Tensor | None, alpha: Tensor, params: Shallow, inputs: Tensor | None, clipped: bool
) -> Tensor:
    """Return the unforced states (G, T, B, M); grouped arguments as of ``gtf_sequence``, alpha (G, T, B, M) of any
    strides; T is that of forcing, else of inputs, else of alpha.

    Raises:
        ModelError: in the backward pass, when it is asked for a graph of its own (``create_graph``).
    """
    result: Tensor = _Sequence.apply(clipped, forcing, alpha, inputs, z1, *params)  # type: ignore[no-untyped-call]
    return result


def free_compiled(z1: Tensor, params: Shallow, steps: int, inputs: Tensor | None, clipped: bool, every: int) -> Tensor:
    """Return the states after each ``every`` steps of the free run, (G, steps // every, B, M), without a graph."""
    numbers = _plan(z1, params.W1, steps, None, clipped, every)
    tensors = [_plain(part.detach()) for part in (z1, *params)]
    pushes = None if inputs is None else _plain(inputs.detach())
    return _forward(numbers, tensors, None, None, pushes)


class _Sequence(torch.autograd.Function):
    """Arguments: clipped, forcing, alpha, inputs, z1, A, W1, W2, h1, h2."""

    @staticmethod
    def forward(
        ctx: Any, clipped: bool, forcing: Tensor | None, alpha: Tensor, inputs: Tensor | None, *given: Tensor
    ) -> Tensor:
        tensors = [_plain(part) for part in given]
        alpha = alpha.to(given[0].dtype)
        numbers = _plan(given[0], given[2], alpha.shape[1], alpha, clipped, 1)
        signals, pushes = (None if part is None else _plain(part) for part in (forcing, inputs))
        found = _forward(numbers, tensors, signals, alpha, pushes)
        ctx.save_for_backward(found, signals, alpha, *tensors)
        ctx.numbers = numbers
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise ModelError(
                "the compiled PLRNN has no second derivative; choose backend 'reference' where create_graph is needed"
            )
        found, signals, alpha, *tensors = ctx.saved_tensors
        d_inputs = torch.empty_like(found) if ctx.needs_input_grad[3] else None
        d_tensors = [torch.empty_like(part) for part in tensors]
        compiled.call(
            _KERNEL,
            "plrnn_backward",
            ctx.numbers,
            tensors[0],
            signals,
            _start(alpha),
            *tensors[1:],
            None,
            found.new_empty(int(ctx.numbers[14])),
            found,
            _plain(d_found),
            d_tensors[0],
            d_inputs,
            *d_tensors[1:],
        )
        return None, None, None, d_inputs, *d_tensors


def _forward(
    numbers: Tensor, tensors: list[Tensor], signals: Tensor | None, alpha: Tensor | None, pushes: Tensor | None
) -> Tensor:
    z1 = tensors[0]
    groups, batch, latent = z1.shape
    found = z1.new_empty(groups, int(numbers[2]) // int(numbers[6]), batch, latent)
    start = None if alpha is None else _start(alpha)
    scratch = z1.new_empty(int(numbers[13]))
    compiled.call(_KERNEL, "plrnn_forward", numbers, z1, signals, start, *tensors[1:], pushes, scratch, found)
    return found


def _plan(z1: Tensor, W1: Tensor, steps: int, alpha: Tensor | None, clipped: bool, every: int) -> Tensor:
    """Return the kernel's table of sizes: groups, batch, steps, latent, hidden, clipped, every, bytes, threads, strides
    of alpha, and the sizes of scratch of both passes, which the kernel fills in."""
    groups, batch, latent = z1.shape
    work = W1.numel() * batch * steps
    threads = max(1, min(compiled.threads(), work // _WORK_PER_THREAD))
    strides = (0, 0, 0, 0) if alpha is None else alpha.stride()
    sizes = (groups, batch, steps, latent, W1.shape[-1], int(clipped), every, z1.element_size(), threads)
    numbers = torch.tensor([*sizes, *strides, 0, 0], dtype=torch.int64)
    compiled.call(_KERNEL, "plrnn_plan", numbers)
    return numbers


def _plain(values: Tensor) -> Tensor:
    return values.resolve_neg().contiguous()


def _start(values: Tensor) -> Tensor:
    """Return the first number, for a kernel that knows the strides of the rest."""
    return values.as_strided((min(1, values.numel()),), (1,))
