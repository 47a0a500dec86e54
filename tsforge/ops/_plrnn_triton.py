"""The forced shallow PLRNN on NVIDIA GPUs: one Triton kernel a pass, all steps inside it.

The recurrence is that of ``tsforge.ops.plrnn`` (Hess et al., arXiv 2306.04406, Algorithm 1). One program carries a few
samples of one group through time; groups and samples run side by side. Hidden units are computed again in the backward
pass from the states; nothing of size H is stored over time. Three regimes, by the size of a weight matrix:

    small   weights and their gradients stay in registers; gradients are written by program and added up by torch
    middle  weights stay in registers; the backward pass writes the gradients of the states, from which those of the
            weights follow by large matrix products, a stretch of time after another
    large   as middle, but every step reads the weights from the caches, a tile of hidden units at a time

No atomics, so results repeat bitwise. Computation is in the dtype of z1 throughout: the kernel's float32 is never
rounded to TF32; the matrix products of the backward pass follow torch's setting for that (off by default). Works in
Triton's interpreter (``TRITON_INTERPRET=1``, tensors on the CPU), which is how it is tested where there is no GPU.

Deviations: none. The bounds below are set from register counts and from the code made for compute capability 9.0; the
speed has not been measured.

Legend: G groups, T steps, B batch, M latent units, H hidden units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import triton_support
from tsforge.ops.once import first_derivative_only
from tsforge.ops.plrnn import Shallow

# In numbers of 4 bytes; a float64 counts twice.
_ACCUMULATED = 8192  # weights of a layer whose gradients too fit the registers of a program: four tiles of this size
_RESIDENT = 16384  # weights of a layer that fit the registers of a program
_STREAMED = 8192  # a tile over samples, hidden and latent units where the weights do not fit
_PROGRAMS = 2112  # warps that fill a large GPU: 132 multiprocessors, 16 each
_MOST_LATENT = 4096
_PARTIALS = 2**26  # gradients of a layer, all programs together; with more they are computed by matrix products
_STRETCH = 2**24  # hidden values of a stretch of time in these products


def unavailable(z1: Tensor, params: Shallow) -> str | None:
    """Return why the kernel cannot run on z1 (G, B, M) and such parameters, or None when it can."""
    if z1.dtype not in (torch.float32, torch.float64):
        return f"the dtype is {z1.dtype}, the kernel computes in float32 or float64"
    if any(part.dtype != z1.dtype or part.device != z1.device for part in params):
        return f"W1 is {params.W1.dtype} on {params.W1.device}, z1 is {z1.dtype} on {z1.device}"
    if z1.shape[-1] > _MOST_LATENT:
        return f"there are {z1.shape[-1]} latent units, the kernel takes {_MOST_LATENT}"
    return triton_support.unavailable_reason(z1.device)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program takes: samples and hidden units at a time (powers of 2), its warps, where the weights live."""

    samples: int
    hidden: int
    warps: int
    resident: bool
    accumulate: bool = False


def default_tile(sizes: tuple[int, int, int, int], itemsize: int, *, backward: bool) -> Tile:
    """Return the tile for (G, B, M, H) and numbers of ``itemsize`` bytes."""
    groups, batch, latent, hidden = sizes
    columns, words = _power_of_2(latent), itemsize // 4
    weights = columns * _power_of_2(hidden) * words
    if weights > _RESIDENT:
        samples = min(4, _power_of_2(batch))
        units = max(1, _STREAMED // (samples * columns * words))
        return Tile(samples=samples, hidden=min(units, _power_of_2(hidden)), warps=8, resident=False)
    accumulate = backward and weights <= _ACCUMULATED
    # registers of a thread for one tile of weights: 16 beside three others, else 32
    share = 512 if accumulate else 1024
    warps = min(16, max(1, weights // share))
    samples = 1
    while (
        samples < batch and 2 * samples * weights <= share * warps and groups * -(-batch // samples) * warps > _PROGRAMS
    ):
        samples *= 2
    if groups * -(-batch // samples) * hidden * latent > _PARTIALS:
        accumulate = False
    return Tile(samples=samples, hidden=_power_of_2(hidden), warps=warps, resident=True, accumulate=accumulate)


def gtf_triton(
    z1: Tensor,
    forcing: Tensor | None,
    alpha: Tensor,
    params: Shallow,
    inputs: Tensor | None,
    clipped: bool,
    *,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """Return the unforced states (G, T, B, M); grouped arguments as of ``gtf_sequence``, which checks them, with alpha
    (G, T, B, M) of any strides. Differentiable once.

    Args:
        tiles: of the forward and of the backward pass; chosen by size when None. Only speed and rounding depend on it.

    Raises:
        ModelError: the kernel cannot run here (see ``unavailable``).
    """
    reason = unavailable(z1, params)
    if reason:
        raise ModelError(f"the Triton kernel of the PLRNN cannot run: {reason}; use backend 'auto'")
    if tiles is None:
        sizes = (*z1.shape, params.h2.shape[-1])
        tiles = tuple(default_tile(sizes, z1.element_size(), backward=back) for back in (False, True))  # type: ignore[assignment]
    signals = None if forcing is None else forcing.detach()
    result: Tensor = _Sequence.apply(clipped, tiles, signals, alpha.detach(), inputs, z1, *params)  # type: ignore[no-untyped-call]
    return result


class _Sequence(torch.autograd.Function):
    """Arguments: clipped, tiles, forcing, alpha, inputs, z1, A, W1, W2, h1, h2."""

    @staticmethod
    def forward(
        ctx: Any,
        clipped: bool,
        tiles: tuple[Tile, Tile],
        forcing: Tensor | None,
        alpha: Tensor,
        inputs: Tensor | None,
        *given: Tensor,
    ) -> Tensor:
        z1, A, W1, W2, h1, h2 = given
        call = _Call(z1.contiguous(), forcing, alpha, inputs, Shallow(*map(_plain, (A, W1.mT, W2, h1, h2))), clipped)
        found = z1.new_empty(alpha.shape)
        _launch("forward", tiles[0], call, found, HAS_INPUTS=inputs is not None)
        # the inputs themselves are not needed again
        ctx.save_for_backward(found, forcing, alpha, call.z1, *call.params)
        ctx.clipped, ctx.tile = clipped, tiles[1]
        return found

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        found, forcing, alpha, z1, *params = ctx.saved_tensors
        call = _Call(z1, forcing, alpha, None, Shallow(*params), ctx.clipped)
        wants_params = any(ctx.needs_input_grad[6:])
        wants_inputs = ctx.needs_input_grad[4]
        tile = ctx.tile if wants_params else replace(ctx.tile, accumulate=False)
        groups, batch, latent = z1.shape
        programs, hidden = -(-batch // tile.samples), params[4].shape[-1]
        keep = wants_inputs or (wants_params and not tile.accumulate)
        delta = torch.empty_like(found) if keep else z1
        d_z1 = torch.empty_like(z1)
        rows = ((hidden, latent), (hidden, latent), (hidden,), (latent,), (latent,))
        parts = [z1.new_empty(groups, programs, *row) if tile.accumulate else z1 for row in rows]
        both = (found, _plain(d_found))
        outputs = (d_z1, delta, *parts)
        _launch("backward", tile, call, both, outputs, ACCUMULATE=tile.accumulate, KEEP_DELTA=keep)
        d_params: tuple[Tensor | None, ...] = (None,) * 5
        if tile.accumulate:
            d_w1, d_w2, d_h2, d_A, d_h1 = (part.sum(1) for part in parts)
            d_params = (d_A, d_w1.mT, d_w2, d_h1, d_h2)
        elif wants_params:
            d_params = _by_products(call, found, delta)
        return None, None, None, None, delta if wants_inputs else None, d_z1, *d_params


@dataclass(frozen=True)
class _Call:
    """Arguments of one call in the kernel's layout; W1 of ``params`` is turned: (G, H, M)."""

    z1: Tensor
    forcing: Tensor | None
    alpha: Tensor
    inputs: Tensor | None
    params: Shallow
    clipped: bool

    def numbers(self, programs: int) -> tuple[int, ...]:
        """Return ``sizes`` of the kernels."""
        strides = [(0, 0, 0, 0) if part is None else part.stride() for part in (self.forcing, self.alpha, self.inputs)]
        return (self.alpha.shape[1], self.z1.shape[1], programs, *(one for part in strides for one in part))


def _launch(name: str, tile: Tile, call: _Call, *tensors: Any, **flags: bool) -> None:
    from tsforge.ops import _plrnn_triton_kernels as kernels

    groups, batch, latent = call.z1.shape
    programs = -(-batch // tile.samples)
    placed = [call.z1 if part is None else part.resolve_neg() for part in (call.forcing, call.alpha, call.inputs)]
    device = call.z1.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        getattr(kernels, name)[(groups * programs,)](
            (call.z1, *placed),
            tuple(call.params),
            *tensors,
            call.numbers(programs),
            H=call.params.h2.shape[-1],
            M=latent,
            M_P2=_power_of_2(latent),
            BLOCK_B=tile.samples,
            BLOCK_H=tile.hidden,
            CLIPPED=call.clipped,
            FORCED=call.forcing is not None,
            RESIDENT=tile.resident,
            num_warps=tile.warps,
            num_stages=1,
            **flags,
        )


def _by_products(call: _Call, found: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of A, W1, W2, h1, h2 from those of the states, delta (G, T, B, M)."""
    A, turned, W2, h1, h2 = call.params
    d_A, d_W1, d_W2, d_h1, d_h2 = (torch.zeros_like(part) for part in (A, turned.mT, W2, h1, h2))
    for z, back in _stretches(call, found, delta):
        drive = z @ W2.mT
        raised = drive + h2.unsqueeze(1)
        hidden, pull = torch.relu(raised), back @ turned.mT
        to_h2 = pull * (raised > 0)
        to_drive = to_h2
        if call.clipped:
            hidden = hidden - torch.relu(drive)
            to_drive = to_h2 - pull * (drive > 0)
        d_A += (back * z).sum(1)
        d_W1 += back.mT @ hidden
        d_W2 += to_drive.mT @ z
        d_h1 += back.sum(1)
        d_h2 += to_h2.sum(1)
    return d_A, d_W1, d_W2, d_h1, d_h2


def _stretches(call: _Call, found: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the forced states before the steps of a stretch of time and delta of these, each (G, steps * B, M)."""
    groups, steps, batch, latent = found.shape
    size = max(1, _STRETCH // (groups * batch * call.params.h2.shape[-1]))
    for start in range(0, steps, size):
        stop = min(start + size, steps)
        before = slice(max(start - 1, 0), stop - 1)
        z = found[:, before]
        if call.forcing is not None:
            alpha = call.alpha[:, before]
            z = torch.where(alpha == 0, z, (1 - alpha) * z + alpha * call.forcing[:, before])
        if start == 0:
            z = torch.cat([call.z1.unsqueeze(1), z], dim=1)
        yield z.reshape(groups, -1, latent), delta[:, start:stop].reshape(groups, -1, latent)


def _plain(values: Tensor) -> Tensor:
    return values.detach().resolve_neg().contiguous()


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
