"""The 2-D selective scan on NVIDIA GPUs: one fused Triton kernel a pass (scheme e of the specification, section 2.6).

One program carries a block of channels of one series through the whole grid, with the states of one outer step in
global memory (they stay in the L2 cache) and everything else in registers; no factor of size [..., D, S] for a cell is
ever stored. With gradients the states of every ceil(sqrt(outer))-th outer step are kept; the backward pass recomputes
the segments between them, last to first, and runs the adjoint recurrence. "Outer" is the longer axis of the grid.

Sums over channels (gradients of B, C) and over series (of A) are written by block and added up by ``torch.sum``: no
atomics, so results repeat bitwise. Computation is in the dtype of x throughout. Works in Triton's interpreter
(``TRITON_INTERPRET=1``, tensors on the CPU), which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import triton_support
from tsforge.ops.once import first_derivative_only

Pair: TypeAlias = tuple[Tensor, Tensor]
Tile: TypeAlias = tuple[int, int]
"""Channels of a program and its warps."""
_PARTIALS = 2**30


def unavailable(x: Tensor, A: tuple[Tensor, ...]) -> str | None:
    """Return why the kernel cannot run on tensors like x [B, N, T, D] and A (four of [D, S]), or None when it can."""
    if x.dtype not in (torch.float32, torch.float64):
        return f"the dtype is {x.dtype}, the kernel computes in float32 or float64"
    wanted = {x.dtype, x.dtype.to_complex()}
    if any(part.dtype not in wanted or part.device != x.device for part in A):
        return f"A is {A[0].dtype} on {A[0].device}, x is {x.dtype} on {x.device}"
    return triton_support.unavailable_reason(x.device)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Sizes of one call in the kernel's terms; ``time_outer`` says which axis the outer loop runs over."""

    batch: int
    outer: int
    inner: int
    channels: int
    groups: int
    states: int
    every: int
    time_outer: bool
    is_complex: bool

    @property
    def parts(self) -> int:
        return 2 if self.is_complex else 1

    @property
    def planes(self) -> tuple[int, int, int, int]:
        return 2, self.parts, self.channels, self.states

    @property
    def slots(self) -> int:
        return -(-self.outer // self.every) + 1

    def blocks(self, tile: Tile) -> int:
        return -(-(self.channels // self.groups) // tile[0])

    def sizes(self, tile: Tile, *rest: int) -> tuple[int, ...]:
        steps = (1, self.outer) if self.time_outer else (self.inner, 1)
        return (
            self.outer,
            self.inner,
            *steps,
            self.channels,
            self.groups,
            self.every,
            self.blocks(tile),
            *rest,
        )

    def default_tile(self, *, backward: bool) -> Tile:
        """Return channels and warps of a program: enough programs to fill a GPU first, then wide ones.

        A warp has 32 lanes. Wider programs load B and C fewer times, and in the backward pass write fewer partial
        gradients of B and C: on an H200 they were slower all the same, so they are taken where partials would fill
        more than ``_PARTIALS`` bytes.
        """
        states = _power_of_2(self.states)
        widest = _power_of_2(self.channels // self.groups)
        block = min(widest, max(1, 32 // states))
        wanted, most = (132, 64) if backward else (528, 128)  # programs; states of a program
        while block < widest and 2 * block * states <= most:
            if self.batch * self.groups * self.blocks((2 * block, 1)) < wanted:
                break
            block *= 2
        while backward and block < widest and self._partial_bytes(block) > _PARTIALS:
            block *= 2
        return block, min(8, max(1, block * states // 128))

    def _partial_bytes(self, block: int) -> int:
        """Return the size of the partial gradients of B1, B2, C1, C2 in float32."""
        cells = self.batch * self.outer * self.inner
        return 16 * self.parts * self.blocks((block, 1)) * cells * self.groups * self.states


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _real(tensor: Tensor) -> Tensor:
    """Return contiguous real storage; a complex tensor becomes (real, imaginary) interleaved."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj().contiguous()) if tensor.is_complex() else tensor.contiguous()


def _to_planes(states: tuple[Tensor, ...]) -> Tensor:
    """Return states, each [..., D, S], as [..., len(states), parts, D, S]."""
    stacked = torch.stack([state.detach() for state in states], dim=-3)
    if not stacked.is_complex():
        return stacked.unsqueeze(-3).contiguous()
    return torch.view_as_real(stacked).movedim(-1, -3).contiguous()


def _from_planes(planes: Tensor) -> list[Tensor]:
    """Return the inverse of ``_to_planes``."""
    if planes.shape[-3] == 1:
        return list(planes.squeeze(-3).unbind(-3))
    return list(torch.complex(planes[..., 0, :, :], planes[..., 1, :, :]).unbind(-3))


def _launch(name: str, tensors: tuple[Any, Any], plan: _Plan, tile: Tile, flags: tuple[bool, bool], *rest: int) -> None:
    from tsforge.ops import _scan2d_triton_kernels as kernels

    device = tensors[0][0].device
    programs = plan.batch * plan.groups * plan.blocks(tile)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        getattr(kernels, name)[(programs,)](
            *tensors,
            plan.sizes(tile, *rest),
            S=plan.states,
            S_P2=_power_of_2(plan.states),
            BLOCK_D=tile[0],
            COMPLEX=plan.is_complex,
            HAS_EDGE=flags[0],
            HAS_LAST=flags[1],
            num_warps=tile[1],
            num_stages=1,
        )


class _Scan(torch.autograd.Function):
    """Arguments after the plan and the tiles: x, dt1, dt2, A1..A4, B1, B2, C1, C2, left h1, h2, top h1, h2 (or None).

    Inside, whatever belongs to time comes first when time is the outer axis and last when it is the inner one, so one
    order serves both: P before Q.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, tiles: tuple[Tile, Tile], *args: Any) -> tuple[Tensor, ...]:
        x, *given = args
        turn = 1 if plan.time_outer else -1
        dt, B, C = given[:2][::turn], given[6:8][::turn], given[8:10][::turn]
        own, cross, cross_back, own_back = given[2:6][::turn]  # A_p, A_pq, A_qp, A_q
        left, top = given[10:12][::turn], given[12:14][::turn]
        start, edge = (left, top) if plan.time_outer else (top, left)
        A = (own, cross, own.reciprocal(), own_back, cross_back, own_back.reciprocal())
        cells = tuple(_real(tensor) for tensor in (x, *dt, *B, *C))
        coef = _to_planes(A)
        rows = cells[0].new_empty(plan.batch, plan.slots, plan.inner, *plan.planes)
        rows[:, 0] = 0.0 if start[0] is None else _to_planes(tuple(start))
        edges = cells[0] if edge[0] is None else _to_planes(tuple(edge))
        y = torch.empty_like(cells[0])
        last = y if plan.time_outer else y.new_empty(plan.batch, plan.outer, *plan.planes)
        flags = (edge[0] is not None, not plan.time_outer)
        _launch("forward", ((*cells, coef, edges), (y, rows, last)), plan, tiles[0], flags)
        ctx.save_for_backward(*cells, coef, edges, rows)
        ctx.plan, ctx.tile, ctx.flags, ctx.has_start = plan, tiles[1], flags, start[0] is not None
        right = _from_planes(rows[:, -1] if plan.time_outer else last)[::turn]
        return y, *(part.clone() for part in right)  # not views: they would keep every row alive

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, tile, (has_edge, has_last) = ctx.plan, ctx.tile, ctx.flags
        turn = 1 if plan.time_outer else -1
        *cells, coef, edges, rows = ctx.saved_tensors
        x = cells[0]
        blocks = plan.blocks(tile)
        gy = _real(grads[0])
        right = _to_planes(tuple(grads[1:][::turn]))
        adjoint = right if plan.time_outer else x.new_zeros(plan.batch, plan.inner, *plan.planes)
        d_cells = [torch.empty_like(tensor) for tensor in cells[:3]]
        d_bc = [tensor.new_empty(blocks, *tensor.shape) for tensor in cells[3:]]
        d_coef = x.new_empty(plan.batch, 4, plan.parts, plan.channels, plan.states)
        d_edge = torch.empty_like(edges) if has_edge else x
        work = x.new_empty(plan.batch, plan.every + 1, plan.inner + 1, *plan.planes)
        inputs = (*cells, coef, edges, gy, right, rows)
        outputs = (*d_cells, *d_bc, d_coef, d_edge, adjoint, work)
        _launch("backward", (inputs, outputs), plan, tile, (has_edge, has_last), cells[3].numel())
        summed = [part[0] if blocks == 1 else part.sum(0) for part in d_bc]
        d_bc = [torch.view_as_complex(part) if plan.is_complex else part for part in summed]
        own, cross, own_back, cross_back = _from_planes(d_coef.sum(0))
        d_start = _from_planes(adjoint)[::turn] if ctx.has_start else [None, None]
        d_edges = _from_planes(d_edge)[::turn] if has_edge else [None, None]
        left_top = (d_start, d_edges) if plan.time_outer else (d_edges, d_start)
        d_A = (own, cross, cross_back, own_back)[::turn]
        d_B, d_C = d_bc[:2][::turn], d_bc[2:][::turn]
        return None, None, d_cells[0], *d_cells[1:][::turn], *d_A, *d_B, *d_C, *left_top[0], *left_top[1]


def scan2d_triton(
    x: Tensor,
    dt: Pair,
    A: tuple[Tensor, Tensor, Tensor, Tensor],
    B: Pair,
    C: Pair,
    left: Pair | None,
    top: Pair | None,
    *,
    tiles: tuple[Tile, Tile] | None = None,
    every: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, N, T, D] and the states h1, h2 [B, N, D, S] at the last time step; differentiable once.

    Shapes, the recurrence ("exact" discretisation) and its source are those of ``scan2d``, which checks its arguments;
    here they are taken as valid.

    Args:
        x, dt, A, B, C, left, top: as in ``scan2d``; left and top may be None (zeros).
        tiles: channels (a power of 2) and warps of a program, of the forward and of the backward pass; chosen by size
            when None. Only speed depends on it.
        every: outer steps between the states kept for the backward pass, ceil(sqrt(outer)) when None.

    Raises:
        ModelError: the kernel cannot run here (see ``unavailable``).
    """
    reason = unavailable(x, A)
    if reason:
        raise ModelError(f"the Triton scan cannot run: {reason}; use another backend")
    batch, variates, steps, channels = x.shape
    parts = (x, *dt, *A, *B, *C, *(left or (None, None)), *(top or (None, None)))
    outer, inner = max(steps, variates), min(steps, variates)
    keeps = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    plan = _Plan(
        batch=batch,
        outer=outer,
        inner=inner,
        channels=channels,
        groups=B[0].shape[-2],
        states=A[0].shape[-1],
        every=min(every or math.isqrt(outer - 1) + 1, outer) if keeps else outer,
        time_outer=steps >= variates,
        is_complex=A[0].is_complex(),
    )
    chosen = tiles or (plan.default_tile(backward=False), plan.default_tile(backward=True))
    result: tuple[Tensor, Tensor, Tensor] = _Scan.apply(plan, chosen, *parts)  # type: ignore[no-untyped-call]
    return result
