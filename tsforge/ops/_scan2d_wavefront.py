"""The 2-D scan along antidiagonals: cells with the same v + t depend on earlier diagonals only, so each diagonal is a
handful of elementwise operations over (states, channels, cells of the diagonal, batch).

The state axis is the shorter one, so a step holds 2 min(N, T) b D S states; a grid with T < N is scanned with the axes
exchanged, which exchanges dt1, B1, C1, A1, A2, left with dt2, B2, C2, A4, A3, top. Only cells inside the grid are
computed: each diagonal is a run of the state axis. Inputs are skewed once (cell (v, t) to row v + t, column v), with
the batch innermost, so that every operation runs over contiguous memory and broadcasts scalars or whole runs.

The forward pass keeps the states of every ceil(sqrt(K))-th of the K = N + T - 1 diagonals; the backward pass computes
those between again, together with g = expm1(dt A) / A and q = A1 h1' + A2 h2' + B x, and walks the adjoint

    l1 = C1 dy + (l1 + m1 A1) of the right neighbour + m2 A3 of the one below,    m1 = l1 g1, m2 = l2 g2,

and alike l2, back. The gradient of A1 is (sum r dt - A2 sum m h2' - sum m B x) / A1 with r = l q (1 + g A1): one pass
over the states less than the sum of its parts. Complex tensors run through the same lines: the adjoint is kept
conjugated, so that no factor has to be.

Legend: V cells of the shorter axis, L of the longer, K diagonals; G groups of P channels each; a trailing pair (cells,
batch) everywhere. ``own`` is (A1, A4), ``cross`` is (A2, A3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tsforge.ops.once import first_derivative_only

Pair: TypeAlias = tuple[Tensor, Tensor]
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def scan2d_wavefront(
    x: Tensor,
    dt: Pair,
    A: Four,
    B: Pair,
    C: Pair,
    left: Pair | None,
    top: Pair | None,
    *,
    every: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (b, N, T, D) and the last states h1, h2 (b, N, D, S); arguments as of ``scan2d``, not checked.

    Args:
        every: diagonals between states kept for the backward pass, default ceil(sqrt(K)); 1 keeps all.
    """
    edges = (*(left or (None, None)), *(top or (None, None)))
    result: tuple[Tensor, Tensor, Tensor] = _Wavefront.apply(torch.is_grad_enabled(), every, x, *dt, *A, *B, *C, *edges)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of a scan, in the frame whose state axis is the shorter one."""

    V: int
    L: int
    b: int
    G: int
    P: int
    S: int
    swapped: bool

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> _Shape:
        """Return the sizes for inputs x (b, N, T, D) and maps B (b, N, T, G, S)."""
        batch, variates, steps, channels = x.shape
        groups, states = B.shape[3:]
        shorter, longer = min(variates, steps), max(variates, steps)
        return cls(shorter, longer, batch, groups, channels // groups, states, swapped=steps < variates)

    @property
    def K(self) -> int:
        return self.V + self.L - 1

    def active(self, k: int) -> tuple[int, int]:
        """Return the first cell and the number of cells of diagonal k."""
        first = max(0, k - self.L + 1)
        return first, min(self.V, k + 1) - first

    def last_cell(self, k: int) -> tuple[int, int] | None:
        """Return the cell of diagonal k at the end of the time axis: its column, and its index along that end."""
        if self.swapped:
            return (self.V - 1, k - self.V + 1) if k >= self.V - 1 else None
        return (k - self.L + 1, k - self.L + 1) if k >= self.L - 1 else None


class _Packed(NamedTuple):
    """Inputs of a scan: skewed x [K, 1, G, P, V, b], dt [K, 2, 1, G, P, V, b], B and C [K, 2, S, G, 1, V, b];
    own, its inverse and cross [2, S, G, P, 1, 1]; states at the beginning of the longer axis, start [2, S, G, P, V, b],
    and beside the first cell of the shorter one, side [2, S, G, P, L, b], or None for zeros. All of one dtype, as
    operations on real and complex tensors would copy the real ones; real_dt is dt as it came."""

    x: Tensor
    dt: Tensor
    real_dt: Tensor
    B: Tensor
    C: Tensor
    own: Tensor
    inverse: Tensor
    cross: Tensor
    start: Tensor | None
    side: Tensor | None


# ---- layout


def _lanes_first(grid: Tensor, shape: _Shape, *, states: bool) -> Tensor:
    """Return (b, N, T, D) as (V, L, 1, G, P, b), or (b, N, T, G, S) as (V, L, S, G, 1, b)."""
    lanes = grid.reshape(shape.b, -1).t().contiguous().view(*grid.shape[1:], shape.b)  # the fast way to transpose
    lanes = lanes.transpose(0, 1) if shape.swapped else lanes
    return lanes.transpose(2, 3).unsqueeze(4) if states else lanes.view(*lanes.shape[:2], 1, shape.G, shape.P, shape.b)


def _diagonals(skewed: Tensor, length: int) -> Tensor:
    """Return the cells [V, L, ..., b] that lie in skewed rows [K, ..., V, b], as a view."""
    row, *inner, cell, batch = skewed.stride()
    sizes = (skewed.shape[-2], length, *skewed.shape[1:-2], skewed.shape[-1])
    return skewed.as_strided(sizes, (row + cell, row, *inner, batch), skewed.storage_offset())


def _skew(grids: tuple[Tensor, ...], shape: _Shape, kind: torch.dtype, *, states: bool) -> Tensor:
    """Return grids as rows [K, len(grids), S or 1, G, 1 or P, V, b]."""
    tail = (shape.S, shape.G, 1) if states else (1, shape.G, shape.P)
    skewed = torch.empty(shape.K, len(grids), *tail, shape.V, shape.b, dtype=kind, device=grids[0].device)
    for index, grid in enumerate(grids):
        _diagonals(skewed[:, index], shape.L).copy_(_lanes_first(grid, shape, states=states))
    return skewed


def _unskew(skewed: Tensor, shape: _Shape, grid: torch.Size, *, states: bool) -> Tensor:
    """Return rows [K, S or 1, G, 1 or P, V, b] as a grid (b, N, T, G, S) or (b, N, T, D)."""
    cells = _diagonals(skewed, shape.L)
    if states:
        cells = cells.transpose(2, 3)
    if shape.swapped:
        cells = cells.transpose(0, 1)
    return cells.reshape(-1, shape.b).t().contiguous().view(grid)


def _pack_transitions(parts: Pair, shape: _Shape) -> Tensor:
    """Return two (D, S) as [2, S, G, P, 1, 1]."""
    return torch.stack(parts).view(2, shape.G, shape.P, shape.S).permute(0, 3, 1, 2)[..., None, None].contiguous()


def _unpack_transitions(packed: Tensor, shape: _Shape) -> Tensor:
    """Return [2, S, G, P] as [2, D, S]."""
    return packed.permute(0, 2, 3, 1).reshape(2, shape.G * shape.P, shape.S)


def _pack_states(parts: Pair, shape: _Shape) -> Tensor:
    """Return two (b, cells, D, S) as [2, S, G, P, cells, b]."""
    cells = parts[0].shape[1]
    return torch.stack(parts).view(2, shape.b, cells, shape.G, shape.P, shape.S).permute(0, 5, 3, 4, 2, 1).contiguous()


def _unpack_states(packed: Tensor, shape: _Shape) -> Tensor:
    """Return [2, S, G, P, cells, b] as [2, b, cells, D, S]."""
    return packed.permute(0, 5, 4, 2, 3, 1).reshape(2, shape.b, -1, shape.G * shape.P, shape.S)


def _pack(
    shape: _Shape, x: Tensor, dt: Pair, A: Four, B: Pair, C: Pair, left: Pair | None, top: Pair | None
) -> _Packed:
    """Return the inputs in the layout of the scan."""
    if shape.swapped:
        dt, A, B, C = dt[::-1], A[::-1], B[::-1], C[::-1]
        left, top = (None if edge is None else edge[::-1] for edge in (top, left))
    kind = A[0].dtype
    real_dt = _skew(dt, shape, x.dtype, states=False)
    own = _pack_transitions((A[0], A[3]), shape)
    return _Packed(
        x=_skew((x,), shape, kind, states=False)[:, 0],
        dt=real_dt.to(kind),
        real_dt=real_dt,
        B=_skew(B, shape, kind, states=True),
        C=_skew(C, shape, kind, states=True),
        own=own,
        inverse=own.reciprocal(),
        cross=_pack_transitions((A[1], A[2]), shape),
        start=None if left is None else _pack_states(left, shape),
        side=None if top is None else _pack_states(top, shape),
    )


# ---- one diagonal


class _Buffer:
    """Cells [2, ..., cells, b] of both states. Views of a run of cells are made once: on small grids they cost more
    than what is done with them."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return cells first to first + count: of both states, of the first and of the second."""
        views = self._views.get((first, count))
        if views is None:
            both = _cut(self.data, first, count)
            views = self._views[first, count] = (both, both[0], both[1])
        return views


def _cut(part: Tensor, first: int, count: int) -> Tensor:
    return part if part.shape[-2] == count else part.narrow(-2, first, count)


class _Scan:
    """The recurrence on packed inputs, one diagonal at a time."""

    def __init__(self, p: _Packed, shape: _Shape) -> None:
        self.p, self.shape = p, shape
        self.x, self.dt, self.B = p.x.unbind(0), p.real_dt.unbind(0), p.B.unbind(0)
        self.own, self.cross = p.own.unbind(0), p.cross.unbind(0)
        self.lanes = p.own.shape[:-2]

    def buffer(self, *, states: bool = False) -> _Buffer:
        """Return room for all cells of a diagonal; for states with a column before the first cell, zeros there."""
        room = self.p.own.new_empty(*self.lanes, self.shape.V + states, self.shape.b)
        if states:
            room.select(-2, 0).zero_()
        return _Buffer(room)

    def enter(self, k: int, states: _Buffer) -> None:
        """Write the states outside the grid that diagonal k reads into the states before it, of which cell v lies in
        column v + 1."""
        if k < self.shape.V:
            column = states.data.select(-2, k + 1)
            column.zero_() if self.p.start is None else column.copy_(self.p.start.select(-2, k))
        if self.p.side is not None and k < self.shape.L:
            states.data.select(-2, 0).copy_(self.p.side.select(-2, k))

    def advance(self, k: int, before: _Buffer, after: _Buffer, work: tuple[_Buffer, _Buffer]) -> Tensor:
        """Compute diagonal k from the states before it; leave g and q in ``work`` and return its states."""
        self.enter(k, before)
        first, count = self.shape.active(k)
        (g, g1, g2), (q, q1, q2) = (part.at(first, count) for part in work)
        _gain(self.p, _cut(self.dt[k], first, count), g)
        torch.mul(_cut(self.B[k], first, count), _cut(self.x[k], first, count), out=q)
        _, beside1, beside2 = before.at(first + 1, count)
        _, above1, above2 = before.at(first, count)
        now, now1, now2 = after.at(first + 1, count)
        q1.addcmul_(beside1, self.own[0]).addcmul_(beside2, self.cross[0])
        q2.addcmul_(above2, self.own[1]).addcmul_(above1, self.cross[1])
        torch.addcmul(beside1, g1, q1, out=now1)
        torch.addcmul(above2, g2, q2, out=now2)
        return now


def _gain(p: _Packed, dt: Tensor, out: Tensor) -> None:
    """Write g = expm1(dt A) / A."""
    if out.is_complex():  # several times faster than the complex function, and as exact near 0
        grown = (dt * p.own.real).expm1_()
        half = dt * (0.5 * p.own.imag)
        sine = half.sin()
        turned = torch.addcmul(sine, grown, sine).mul_(2.0)  # 2 e^Re sin(Im / 2)
        torch.complex(grown.addcmul_(turned, sine, value=-1.0), turned.mul_(half.cos_()), out=out)
    else:
        torch.mul(dt, p.own, out=out).expm1_()
    out.mul_(p.inverse)


class _Adjoint:
    """The walk back: conjugated adjoints of one diagonal at a time, gradients of all inputs.

    An adjoint has cell v in column v + 1, as states have; columns that lie outside the grid are gradients of the
    states there.
    """

    def __init__(self, scan: _Scan, dy: Tensor | None, ends: Tensor | None) -> None:
        self.scan, self.ends = scan, ends
        p, self.shape = scan.p, scan.shape
        self.x, self.dt, self.B, self.C = (part.unbind(0) for part in (p.x, p.dt, p.B, p.C))
        self.dy = (
            torch.zeros_like(p.x) if dy is None else _skew((dy,), self.shape, p.x.dtype, states=False)[:, 0]
        ).unbind(0)
        self.adjoint, self.next = scan.buffer(states=True), scan.buffer(states=True)
        self.m, self.kept, self.product = scan.buffer(), scan.buffer(), scan.buffer()
        self.of_own, self.of_cross = scan.buffer(), scan.buffer()
        self.of_own.data.zero_()
        self.of_cross.data.zero_()
        self.grids = [torch.empty_like(part) for part in (p.x, p.dt, p.B, p.C)]
        self.dx, self.ddt, self.dB, self.dC = (part.unbind(0) for part in self.grids)
        self.dstart = None if p.start is None else torch.empty_like(p.start)
        self.dside = None if p.side is None else torch.empty_like(p.side)
        self._read(self.shape.K - 1, self.adjoint)

    def _read(self, k: int, adjoint: _Buffer) -> None:
        """Start the adjoint of diagonal k with what reads its states: y, and the ends of the time axis."""
        first, count = self.shape.active(k)
        C, dy = _cut(self.C[k], first, count), _cut(self.dy[k], first, count)
        torch.mul(C, dy, out=adjoint.at(first + 1, count)[0])
        cell = None if self.ends is None else self.shape.last_cell(k)
        if cell is not None and self.ends is not None:
            adjoint.data.select(-2, cell[0] + 1).add_(self.ends.select(-2, cell[1]))

    def retreat(self, k: int, before: _Buffer, after: _Buffer, work: tuple[_Buffer, _Buffer]) -> None:
        """Take the gradients of diagonal k, whose adjoint is complete, and pass it on to diagonal k - 1."""
        first, count = self.shape.active(k)
        x, dt, B, dy = (_cut(part[k], first, count) for part in (self.x, self.dt, self.B, self.dy))
        dx, ddt, dB, dC = (_cut(part[k], first, count) for part in (self.dx, self.ddt, self.dB, self.dC))
        g, q = (part.at(first, count)[0] for part in work)
        (m, m1, m2), (kept, kept1, kept2) = self.m.at(first, count), self.kept.at(first, count)
        product, of_own = self.product.at(first, count)[0], self.of_own.at(first, count)[0]
        _, of_cross1, of_cross2 = self.of_cross.at(first, count)
        full = self.adjoint.at(first + 1, count)[0]
        torch.mul(full, g, out=m)
        torch.addcmul(full, m, self.scan.p.own, out=kept)  # l e^(dt A): to the neighbour along the own axis
        q.mul_(kept)  # r
        torch.sum(q, 1, keepdim=True, out=ddt)
        of_own.addcmul_(q, dt)
        torch.mul(m, x, out=product)
        torch.sum(product, 3, keepdim=True, out=dB)
        torch.mul(m, B, out=product)
        torch.sum(product, (0, 1), keepdim=True, out=dx[None])
        of_own.addcmul_(product, x, value=-1.0)
        torch.mul(after.at(first + 1, count)[0], dy, out=product)
        torch.sum(product, 3, keepdim=True, out=dC)
        of_cross1.addcmul_(m1, before.at(first + 1, count)[2])
        of_cross2.addcmul_(m2, before.at(first, count)[1])
        self._pass_on(k, (kept1, kept2), (m1, m2))

    def _pass_on(self, k: int, kept: Pair, m: Pair) -> None:
        """Add to the adjoint of diagonal k - 1 what diagonal k took from it."""
        shape, target, cross = self.shape, self.next, self.scan.cross
        first, count = shape.active(k)
        if k > 0:
            self._read(k - 1, target)
        if self.dside is not None and k < shape.L:
            target.data.select(-2, 0).zero_()
        if self.dstart is not None and k < shape.V:
            target.data.select(-2, k + 1).zero_()
        _, beside1, beside2 = target.at(first + 1, count)
        _, above1, above2 = target.at(first, count)
        beside1.add_(kept[0])
        beside2.addcmul_(m[0], cross[0])
        above2.add_(kept[1])
        above1.addcmul_(m[1], cross[1])
        if self.dside is not None and k < shape.L:
            self.dside.select(-2, k).copy_(target.data.select(-2, 0))
        if self.dstart is not None and k < shape.V:
            self.dstart.select(-2, k).copy_(target.data.select(-2, k + 1))
        self.adjoint, self.next = target, self.adjoint

    def gradients(self, grid: torch.Size, maps: torch.Size) -> list[Tensor | None]:
        """Return the gradients of x, dt, A, B, C, left and top, in this order and in the layout they came in."""
        p, shape = self.scan.p, self.shape
        of_own, of_cross = (part.data.sum((-2, -1)) for part in (self.of_own, self.of_cross))
        of_own = (of_own - p.cross[..., 0, 0] * of_cross) * p.inverse[..., 0, 0]
        own, other = (_unpack_transitions(part.conj(), shape) for part in (of_own, of_cross))
        x, dt, B, C = self.grids
        dx, *ddt = (_unskew(_real(part), shape, grid, states=False) for part in (x, *dt.unbind(1)))
        dB = [_unskew(part.conj(), shape, maps, states=True) for part in B.unbind(1)]
        dC = [_unskew(part.conj(), shape, maps, states=True) for part in C.unbind(1)]
        dA = [own[0], other[0], other[1], own[1]]
        start, side = (
            [None, None] if part is None else list(_unpack_states(part.conj(), shape))
            for part in (self.dstart, self.dside)
        )
        if shape.swapped:
            ddt, dA, dB, dC, start, side = ddt[::-1], dA[::-1], dB[::-1], dC[::-1], side[::-1], start[::-1]
        return [dx, *ddt, *dA, *dB, *dC, *start, *side]


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


class _Wavefront(torch.autograd.Function):
    """y and the states at the end of the time axis."""

    @staticmethod
    def forward(ctx: Any, differentiates: bool, every: int | None, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, dt, A, B, C = tensors[0], tensors[1:3], tensors[3:7], tensors[7:9], tensors[9:11]
        left, top = (None if pair[0] is None else pair for pair in (tensors[11:13], tensors[13:15]))
        shape = _Shape.of(x, B[0])
        every = every or math.isqrt(shape.K - 1) + 1
        scan = _Scan(_pack(shape, x, dt, A, B, C, left, top), shape)
        keeps = differentiates and any(ctx.needs_input_grad)
        before, after = scan.buffer(states=True), scan.buffer(states=True)
        work = (scan.buffer(), scan.buffer())
        y = x.new_empty(shape.K, 1, shape.G, shape.P, shape.V, shape.b)
        last = x.new_empty(*scan.lanes, shape.L if shape.swapped else shape.V, shape.b, dtype=A[0].dtype)
        kept = []
        for k, (C_k, row) in enumerate(zip(scan.p.C.unbind(0), y.unbind(0), strict=True)):
            if keeps and k % every == 0:
                kept.append(before.data.clone())
            now = scan.advance(k, before, after, work)
            first, count = shape.active(k)
            read = torch.mul(_cut(C_k, first, count), now, out=work[1].at(first, count)[0])
            row = _cut(row, first, count)
            if read.is_complex():
                row.copy_(read.sum((0, 1)).real)
            else:
                torch.sum(read, (0, 1), keepdim=True, out=row[None])
            cell = shape.last_cell(k)
            if cell is not None:
                last.select(-2, cell[1]).copy_(after.data.select(-2, cell[0] + 1))
            before, after = after, before
        ctx.save_for_backward(*scan.p, *kept)
        ctx.shape, ctx.every, ctx.grid, ctx.maps = shape, every, x.shape, B[0].shape
        ctx.set_materialize_grads(False)
        ends = _unpack_states(last, shape)
        return _unskew(y, shape, x.shape, states=False), *(ends.flip(0) if shape.swapped else ends)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor | None, dh1: Tensor | None, dh2: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, every, saved = ctx.shape, ctx.every, ctx.saved_tensors
        p, kept = _Packed(*saved[: len(_Packed._fields)]), saved[len(_Packed._fields) :]
        scan, ends = _Scan(p, shape), None
        given = dh1 if dh1 is not None else dh2
        if given is not None:
            first, second = (torch.zeros_like(given) if part is None else part.conj() for part in (dh1, dh2))
            ends = _pack_states((second, first) if shape.swapped else (first, second), shape)
        adjoint = _Adjoint(scan, dy, ends)
        states = [scan.buffer(states=True) for _ in range(min(every, shape.K) + 1)]
        work = [(scan.buffer(), scan.buffer()) for _ in range(min(every, shape.K))]
        for segment in reversed(range(len(kept))):
            start, stop = segment * every, min((segment + 1) * every, shape.K)
            states[0].data.copy_(kept[segment])
            for k in range(start, stop):
                scan.advance(k, states[k - start], states[k - start + 1], work[k - start])
            for k in reversed(range(start, stop)):
                adjoint.retreat(k, states[k - start], states[k - start + 1], work[k - start])
        return None, None, *adjoint.gradients(ctx.grid, ctx.maps)
