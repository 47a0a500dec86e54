"""The 2-D scan by the C++ lane kernel ``csrc/scan2d.cpp``: one lane a (batch, channel, state), sequential over the
grid, the carried states of one row or column in a cache, factors computed in registers.

The forward pass keeps the carried states of every ``interval``-th column of the longer axis (about its square root,
more where the states between fit a cache); the backward pass computes those between again, a segment at a time, and
runs the adjoint of the recurrence. Gradients of A, B and C are summed in an order that does not depend on the number of
threads. B and C are read where they lie, also as parts of a wider tensor. Without a second axis (A2, A3, B2, C2 and the
states h2 at the edges are 0) the states h2 are left out.

Deviations: none from ``exact`` with a held input, the only form this kernel knows. exp is a polynomial with a relative
error of a few roundings; phases dt Im A beyond 10^6 (float32) are cut there, where rounding has long taken them.

Legend: as in ``scan2d``; p parts of a number, 1 if real, 2 if complex. The kernel names the axes outer and inner, the
outer one is the longer; ``swapped`` means that this is the axis of the variates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import compiled

Pair: TypeAlias = tuple[Tensor, Tensor]
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
_Any = TypeVar("_Any")

_KERNEL = "scan2d"
_WORK_PER_THREAD = 1 << 17  # cells times channels times states; with less a thread costs more than it brings


def unavailable(x: Tensor, A: Tensor) -> str | None:
    """Return why this kernel cannot take tensors like x and A, or None; builds it on first use."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64) or A.dtype not in (x.dtype, x.dtype.to_complex()):
        return f"it takes float32 or float64 and complex numbers of the same precision, got x {x.dtype}, A {A.dtype}"
    return compiled.unavailable_reason(_KERNEL)


def scan2d_compiled(
    x: Tensor, dt: Pair, A: Four, B: Pair, C: Pair, left: Pair | None, top: Pair | None, *, interval: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the last states h1, h2; arguments and results as in ``scan2d``, not checked here.

    Args:
        interval: columns of the longer axis between states kept for the backward pass, 0 for the kernel's own choice.

    Raises:
        ModelError: in the backward pass, when it is asked for a graph of its own (``create_graph``).
    """
    edges = [None if pair is None else torch.stack(pair, dim=2) for pair in (left, top)]  # (b, length, 2, D, S)
    result: tuple[Tensor, Tensor, Tensor]
    result = _Scan.apply(torch.is_grad_enabled(), interval, *edges, x, *dt, *A, *B, *C)  # type: ignore[no-untyped-call]
    return result


class _Scan(torch.autograd.Function):
    """Arguments: whether a backward pass may follow, interval, left, top, x, dt1, dt2, A1..A4, B1, B2, C1, C2."""

    @staticmethod
    def forward(
        ctx: Any, recorded: bool, interval: int, left: Tensor | None, top: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, A1 = inputs[0], inputs[3]
        one_sided = _one_sided(inputs, left, top)
        maps, strides = _shared(inputs[7:], one_sided)
        plan = _plan(x, A1, inputs[7], interval, strides, one_sided)
        packed = [*_pack(inputs, plan.swapped), *_maps_by_role(maps, plan.swapped)]
        left, top = (None if edge is None else _pack_states(edge) for edge in (left, top))
        kept = x.new_empty(plan.checkpoints) if recorded and any(ctx.needs_input_grad) else None
        y, right = torch.empty_like(packed[0]), _pack_states(A1.new_empty(*x.shape[:2], 2, *A1.shape))
        edges, ends = _by_role(left, top, plan.swapped), _by_role(right, None, plan.swapped)
        scratch = x.new_empty(plan.forward_scratch)
        pointers = [_start(part) for part in packed]
        compiled.call(_KERNEL, "scan2d_forward", plan.numbers, *pointers, *edges, kept, scratch, y, *ends)
        if kept is not None:
            ctx.save_for_backward(*packed, kept, left, top)
            ctx.plan = plan
            ctx.set_materialize_grads(False)
        h1, h2 = (_unpack_states(part, plan.parts) for part in right.unbind(2))
        return y, h1, h2

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, *d_right: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; torch's own guard would pass some second derivatives as zero
            raise ModelError(
                "the compiled 2-D scan has no second derivative; choose backend 'rows' where create_graph is needed"
            )
        plan = ctx.plan
        *packed, kept, left, top = ctx.saved_tensors
        x = packed[0]
        d_y = torch.zeros_like(x) if d_y is None else _real(d_y)
        if plan.one_sided and d_right[1] is not None and bool(d_right[1].any()):
            plan, packed = _two_sided(plan, packed)
        d_ends = None
        given = [part for part in d_right if part is not None]
        if given:
            both = [torch.zeros_like(given[0]) if part is None else part for part in d_right]
            d_ends = _pack_states(torch.stack(both, dim=2).conj())  # the kernel's gradients are conjugated
        # what a one-sided scan leaves out is 0
        new = [torch.empty_like, torch.zeros_like if plan.one_sided else torch.empty_like]
        d_grids = [torch.empty_like(x), torch.empty_like(x), new[1](x)]
        d_shared = [new[k % 2](part, memory_format=torch.contiguous_format) for k, part in enumerate(packed[4:])]
        d_rates = x.new_empty(x.shape[0], 4, *packed[3].shape[1:])  # of each batch element; their sum in the first
        d_left, d_top = (None if edge is None else torch.empty_like(edge) for edge in (left, top))
        compiled.call(
            _KERNEL,
            "scan2d_backward",
            plan.numbers,
            *[_start(part) for part in packed],
            *_by_role(left, top, plan.swapped),
            kept,
            x.new_empty(plan.backward_scratch),
            d_y,
            *_by_role(d_ends, None, plan.swapped),
            *d_grids,
            d_rates,
            *d_shared,
            *_by_role(d_left, d_top, plan.swapped),
        )
        d_dt = _by_role(d_grids[1], d_grids[2], plan.swapped)
        d_maps = tuple(_maps_by_role(d_shared, plan.swapped))
        d_A = _unpack_states(d_rates[0], plan.parts).conj().unbind(0)
        if plan.parts == 2:
            d_maps = tuple(torch.view_as_complex(part).conj() for part in d_maps)
        d_edges = [None if edge is None else _unpack_states(edge, plan.parts).conj() for edge in (d_left, d_top)]
        return None, None, *d_edges, d_grids[0], *d_dt, *_rates_by_role(d_A, plan.swapped), *d_maps


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes of a scan as the kernel counts them; ``numbers`` is its own table, the rest in real numbers."""

    numbers: Tensor
    swapped: bool
    one_sided: bool
    parts: int
    checkpoints: int
    forward_scratch: int
    backward_scratch: int


def _plan(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    interval: int,
    strides: tuple[int, int] | None = None,
    one_sided: bool = False,
) -> _Plan:
    """Return the plan; ``strides`` of B and C from cell to cell and group to group in reals, None if contiguous."""
    batch, variates, steps, channels = x.shape
    groups, states = B.shape[3:]
    swapped, parts = variates > steps, 1 + A.is_complex()
    # strides in cells of the outer and the inner axis
    axes = (variates, steps, steps, 1) if swapped else (steps, variates, 1, steps)
    threads = max(1, min(compiled.threads(), x.numel() * states // _WORK_PER_THREAD))
    cell_stride, group_stride = strides or (groups * states * parts, states * parts)
    asked = [batch, *axes[:2], groups, channels // groups, states, *axes[2:], swapped, x.element_size(), parts, threads]
    asked += [cell_stride, group_stride, one_sided]
    numbers = torch.tensor([*asked, 0, interval, 0, 0, 0], dtype=torch.int64)
    compiled.call(_KERNEL, "scan2d_plan", numbers)
    checkpoints, forward, backward = numbers[17:].tolist()
    return _Plan(numbers, swapped, one_sided, parts, checkpoints, forward, backward)


def _one_sided(inputs: tuple[Tensor, ...], left: Tensor | None, top: Tensor | None) -> bool:
    """Return whether h2 is 0 everywhere and nothing reads it, so that it, its steps and its maps can be left out.

    Only where the time axis is the outer one, which is so without variates beside each other. Steps dt2 that are no
    numbers go unseen then.
    """
    x, A2, A3, B2, C2 = inputs[0], inputs[4], inputs[5], inputs[8], inputs[10]
    edges = [edge[:, :, 1] for edge in (left, top) if edge is not None]
    return x.shape[1] <= x.shape[2] and not any(bool(part.any()) for part in (A2, A3, *edges, B2, C2))


def _shared(maps: tuple[Tensor, ...], one_sided: bool) -> tuple[list[Tensor], tuple[int, int]]:
    """Return B1, B2, C1, C2 as real numbers, and their strides from cell to cell and from group to group.

    They are read where they are if they lie alike, with the numbers of a cell and group side by side and cells at equal
    distances; else they are copied. A one-sided scan takes B1 and C1 for B2 and C2, which it does not read.
    """
    if one_sided:
        maps = (maps[0], maps[0], maps[2], maps[2])
    plain = [part.resolve_conj().resolve_neg() for part in maps]
    views = [torch.view_as_real(part) if part.is_complex() else part for part in plain]
    first = views[0]
    variates, steps, groups, states = maps[0].shape[1:]
    cell, group = first.stride(2), first.stride(3)
    parts = first[0, 0, 0, 0].numel() // states
    alike = all(part.stride() == first.stride() for part in views)
    inner = (parts, 1) if parts == 2 else (1,)
    even = first.stride()[:2] == (variates * steps * cell, steps * cell) and first.stride()[4:] == inner
    if alike and even:
        return views, (cell, group)
    return [part.contiguous() for part in views], (groups * states * parts, states * parts)


def _two_sided(plan: _Plan, packed: list[Tensor]) -> tuple[_Plan, list[Tensor]]:
    """Return what a scan that was one-sided needs as a whole one, for a gradient that comes in through h2."""
    first = [part.contiguous() for part in packed[4::2]]
    numbers = plan.numbers.clone()
    groups, states = numbers[3], numbers[5]
    numbers[12:15] = torch.stack([groups * states * plan.parts, states * plan.parts, torch.zeros_like(groups)])
    whole = [*packed[:4], first[0], torch.zeros_like(first[0]), first[1], torch.zeros_like(first[1])]
    return replace(plan, numbers=numbers, one_sided=False), whole


def _by_role(first: _Any, second: _Any, swapped: bool) -> tuple[_Any, _Any]:
    """Return what belongs to time and to variates as what belongs to the outer and to the inner axis, or back."""
    return (second, first) if swapped else (first, second)


def _rates_by_role(A: tuple[Tensor, ...], swapped: bool) -> tuple[Tensor, ...]:
    return A[::-1] if swapped else A


def _maps_by_role(maps: Sequence[Tensor], swapped: bool) -> list[Tensor]:
    return [maps[1], maps[0], maps[3], maps[2]] if swapped else list(maps)


def _pack(inputs: tuple[Tensor, ...], swapped: bool) -> list[Tensor]:
    """Return x, two steps and the rates with 1 / A1 and 1 / A4 [6, S, p, D], all contiguous and real."""
    x, dt1, dt2 = (_real(part) for part in inputs[:3])
    A = _rates_by_role(inputs[3:7], swapped)
    return [x, *_by_role(dt1, dt2, swapped), _pack_states(torch.stack([*A, 1.0 / A[0], 1.0 / A[3]]))]


def _start(values: Tensor) -> Tensor:
    """Return the first number, for a kernel that knows the strides of the rest."""
    return values.as_strided((1,), (1,))


def _real(values: Tensor) -> Tensor:
    """Return the numbers as they lie in contiguous memory, complex ones as pairs."""
    values = values.resolve_conj().resolve_neg().contiguous()
    return torch.view_as_real(values) if values.is_complex() else values


def _pack_states(states: Tensor) -> Tensor:
    """Return (..., S, p, D), contiguous and real, from (..., D, S): lanes are neighbouring channels."""
    if states.is_complex():
        return torch.view_as_real(states.resolve_conj()).movedim(-3, -1).contiguous()
    return states.resolve_neg().transpose(-1, -2).unsqueeze(-2).contiguous()


def _unpack_states(packed: Tensor, parts: int) -> Tensor:
    """Return (..., D, S) from (..., S, p, D)."""
    if parts == 2:
        return torch.view_as_complex(packed.movedim(-1, -3).contiguous())
    return packed.squeeze(-2).transpose(-1, -2)
