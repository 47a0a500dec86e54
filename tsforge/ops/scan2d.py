"""Selective scan over a grid of N variates by T steps: the 2-D state space model in Roesser form behind Chimera
(Behrouz, Santacatterina, Zabih, NeurIPS 2024, arXiv 2406.04320), by several algorithms that compute the same numbers.

    h1[v, t] = a1 h1[v, t-1] + a2 h2[v, t-1] + b1 B1[v, t] x[v, t]        memory along time
    h2[v, t] = a3 h1[v-1, t] + a4 h2[v-1, t] + b2 B2[v, t] x[v, t]        memory along variates
    y[v, t]  = Re sum_s C1[v, t] h1[v, t] + C2[v, t] h2[v, t]

The factors belong to the cell that is entered. By default they are the true zero-order hold (the other state and the
input are held during a step): with ``g1 = expm1(dt1 A1) / A1``, ``a1 = 1 + g1 A1``, ``a2 = g1 A2``, ``b1 = g1``, and
the same along variates with dt2, A4, A3.

Algorithms (``backend``):
    reference   one cell after another, under plain autograd: the definition, slow
    rows        one row (or column) after another, each by a prefix scan of Hillis and Steele: fewest steps, most work
    wavefront   one antidiagonal after another, states recomputed in the backward pass: least work and memory in torch
    compiled    a C++ kernel on the CPU;  triton  a kernel on the GPU

Deviations: no official code is known and the paper's operator for a parallel 2-D scan was not seen; a summary of fixed
size is exact along one axis or with one-way coupling only, so these algorithms parallelise rows, antidiagonals or
lanes. The paper's reading with one exponential a matrix is ``discretisation="separate"``; it grows with the number of
lattice paths and cannot switch the coupling off, so it is not the default. Indices: the current input enters, the
other state is that of the neighbour.

Legend: b batch, N variates, T steps, D channels, S states a channel, G groups of channels that share B and C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from tsforge.core.errors import ModelError, nearest

Discretisation: TypeAlias = Literal["exact", "separate", "separate_avg"]
InputDisc: TypeAlias = Literal["zoh", "euler"]
Backend: TypeAlias = Literal["auto", "reference", "rows", "wavefront", "compiled", "triton"]
Pair: TypeAlias = tuple[Tensor, Tensor]
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

# Levels of the prefix scan times the states of an average diagonal, below which rows take less time than the wavefront:
# there the number of steps, not of operations, is what counts. Measured on one CPU core, (1..8, 7, 96, 16, 8),
# (1..2, 7, 12, 64, 16), (1, 32..64, 96, 16, 8), (8, 321, 1, 32, 8); even between 12 000 and 22 000.
_FEW_STATES = 15_000


class Scan2D(NamedTuple):
    """Outputs y (b, N, T, D) and the states (h1, h2), each (b, N, D, S), after the last step of every variate."""

    y: Tensor
    right: Pair


class Factors(NamedTuple):
    """Discrete factors of both axes, each (..., D, S); b1 and b2 multiply B1 x and B2 x."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    a3: Tensor
    a4: Tensor
    b2: Tensor


def discrete_factors(
    dt: Pair, A: Four, discretisation: Discretisation = "exact", input_disc: InputDisc = "zoh"
) -> Factors:
    """Return the discrete factors for steps dt (two tensors (..., D)) and transitions A (four tensors (D, S)).

    ``exact`` is the zero-order hold of the coupled system; ``separate`` takes one exponential a matrix and
    ``separate_avg`` half of it; ``euler`` gives the input the factor dt instead of (exp(dt A) - 1) / A.
    """
    dt1, dt2 = (step.unsqueeze(-1) for step in dt)
    A1, A2, A3, A4 = A
    g1, g2 = torch.expm1(dt1 * A1) / A1, torch.expm1(dt2 * A4) / A4
    if discretisation == "exact":
        a1, a2, a3, a4 = 1.0 + g1 * A1, g1 * A2, g2 * A3, 1.0 + g2 * A4
    else:
        a1, a2, a3, a4 = torch.exp(dt1 * A1), torch.exp(dt1 * A2), torch.exp(dt2 * A3), torch.exp(dt2 * A4)
        if discretisation == "separate_avg":
            a1, a2, a3, a4 = 0.5 * a1, 0.5 * a2, 0.5 * a3, 0.5 * a4
    if input_disc == "euler":
        g1, g2 = dt1.expand_as(g1).to(g1.dtype), dt2.expand_as(g2).to(g2.dtype)
    return Factors(a1, a2, g1, a3, a4, g2)


def scan2d(
    x: Tensor,
    dt: Pair,
    A: Four,
    B: Pair,
    C: Pair,
    *,
    left: Pair | None = None,
    top: Pair | None = None,
    discretisation: Discretisation = "exact",
    input_disc: InputDisc = "zoh",
    backend: Backend = "auto",
) -> Scan2D:
    """Scan a grid of variates by time steps; differentiable in every tensor, through ``y`` and through ``right``.

    Shapes:
        x (b, N, T, D) float32 or float64; dt two (b, N, T, D), at least 0; A four (D, S); B and C two (b, N, T, G, S)
        each, channel d belongs to group d // (D // G); left two (b, N, D, S), the states at t = -1, and top two
        (b, T, D, S), the states at v = -1, both 0 if not given. Transitions, B, C and states are real of the dtype of
        x, or all complex of the same precision. Returns y (b, N, T, D), real, and right, two (b, N, D, S).

    Args:
        dt: step sizes (dt1 along time, dt2 along variates). With ``exact`` a cell whose two steps are 0 passes
            h1 on along time and h2 on along variates unchanged: padding.
        A: (A1, A2, A3, A4); the real parts of A1 and A4 are negative.
        discretisation, input_disc: see :func:`discrete_factors`; other than ``exact`` and ``zoh`` only on the backends
            ``reference`` and ``rows``.
        backend: ``auto`` takes the fastest that can run here: a kernel, else rows for few states, else the wavefront.

    A call with T = 1 is one step of a stream: ``right`` of one call is ``left`` of the next.
    Signs of dt and A are checked on the CPU only: on a GPU the check would wait for the device.

    Raises:
        ModelError: shapes, dtypes or devices do not fit, a sign is wrong, or the backend cannot run, with the reason.
    """
    if torch.compiler.is_compiling():
        # The scan stays outside the graph, which would hold every diagonal as nodes of its own. A decorator would do
        # the same, but load torch's compiler whenever this module is imported.
        eager = torch.compiler.disable(scan2d)  # type: ignore[no-untyped-call]
        options = {"discretisation": discretisation, "input_disc": input_disc, "backend": backend}
        return eager(x, dt, A, B, C, left=left, top=top, **options)  # type: ignore[no-any-return]
    _check(x, dt, A, B, C, left, top)
    _check_choice("discretisation", discretisation, Discretisation)
    _check_choice("input_disc", input_disc, InputDisc)
    _check_choice("backend", backend, Backend)
    plain = discretisation == "exact" and input_disc == "zoh"
    chosen = _choose(backend, x, A, plain)
    if chosen == "reference":
        return scan2d_reference(
            x, dt, A, B, C, left=left, top=top, discretisation=discretisation, input_disc=input_disc
        )
    if chosen == "rows":
        return _row_scan(x, dt, A, B, C, (left, top), discretisation, input_disc)
    y, h1, h2 = _kernel(chosen)(x, dt, A, B, C, left, top)
    return Scan2D(y, (h1, h2))


def scan2d_reference(
    x: Tensor,
    dt: Pair,
    A: Four,
    B: Pair,
    C: Pair,
    *,
    left: Pair | None = None,
    top: Pair | None = None,
    discretisation: Discretisation = "exact",
    input_disc: InputDisc = "zoh",
) -> Scan2D:
    """Return the same as :func:`scan2d`, one cell after another (slow, obvious); same shapes, nothing is checked."""
    batch, variates, steps, channels = x.shape
    zero = A[0].new_zeros(batch, channels, A[0].shape[-1])
    above = [(zero, zero) if top is None else (top[0][:, t], top[1][:, t]) for t in range(steps)]
    rows, ends = [], []
    for v in range(variates):
        beside = (zero, zero) if left is None else (left[0][:, v], left[1][:, v])
        outputs = []
        for t in range(steps):
            f = discrete_factors((dt[0][:, v, t], dt[1][:, v, t]), A, discretisation, input_disc)
            u = x[:, v, t].unsqueeze(-1)
            b1, b2, c1, c2 = (_per_channel(part[:, v, t], channels) for part in (*B, *C))
            h1 = f.a1 * beside[0] + f.a2 * beside[1] + f.b1 * b1 * u
            h2 = f.a3 * above[t][0] + f.a4 * above[t][1] + f.b2 * b2 * u
            outputs.append(_real((c1 * h1 + c2 * h2).sum(-1)))
            beside = above[t] = (h1, h2)
        rows.append(torch.stack(outputs, dim=1))
        ends.append(beside)
    right = tuple(torch.stack([end[which] for end in ends], dim=1) for which in range(2))
    return Scan2D(torch.stack(rows, dim=1), right)  # type: ignore[arg-type]


def _per_channel(grouped: Tensor, channels: int) -> Tensor:
    """Return (..., D, S) from (..., G, S): every channel gets the row of its group."""
    return grouped.repeat_interleave(channels // grouped.shape[-2], dim=-2)


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


# ---- choice of the algorithm


def _choose(backend: Backend, x: Tensor, A: Four, plain: bool) -> Backend:
    """Return the backend to run, or say why the one asked for cannot."""
    if backend == "auto":
        if not plain:
            return "rows"
        kernel: Backend = "triton" if x.is_cuda else "compiled"
        if _unavailable(kernel, x, A) is None:
            return kernel
        variates, steps = x.shape[1:3]
        states = x.shape[0] * variates * steps * A[0].numel()
        levels = _doublings(steps if _along_time(variates, steps) else variates)
        return "rows" if states * levels < _FEW_STATES * (variates + steps - 1) else "wavefront"
    if backend in ("reference", "rows"):
        return backend
    if not plain:
        raise ModelError(
            f"backend {backend!r} of the 2-D scan knows the exact discretisation with a held input only; use backend "
            "'auto', 'rows' or 'reference' for other discretisations"
        )
    reason = _unavailable(backend, x, A)
    if reason is not None:
        raise ModelError(f"backend {backend!r} of the 2-D scan cannot run here: {reason}; use backend 'auto'")
    return backend


def _unavailable(backend: Backend, x: Tensor, A: Four) -> str | None:
    """Return why a backend cannot run on these tensors, or None."""
    if backend == "compiled":
        from tsforge.ops._scan2d_compiled import unavailable as compiled_unavailable  # builds on first use

        return compiled_unavailable(x, A[0])
    if backend == "triton":
        from tsforge.ops._scan2d_triton import unavailable as triton_unavailable  # triton is optional

        return triton_unavailable(x, A)
    return None


_Kernel: TypeAlias = Callable[[Tensor, Pair, Four, Pair, Pair, "Pair | None", "Pair | None"], tuple[Tensor, ...]]


def _kernel(backend: Backend) -> _Kernel:
    """Return the function of a backend that is available."""
    if backend == "compiled":
        from tsforge.ops._scan2d_compiled import scan2d_compiled

        return scan2d_compiled
    if backend == "triton":
        from tsforge.ops._scan2d_triton import scan2d_triton

        return scan2d_triton
    from tsforge.ops._scan2d_wavefront import scan2d_wavefront

    return scan2d_wavefront


# ---- validation


def _check_choice(name: str, value: str, kind: object) -> None:
    choices = get_args(kind)
    if value not in choices:
        raise ModelError(
            f"{name} of the 2-D scan is {value!r}; choose one of {', '.join(choices)}{nearest(value, choices)}"
        )


def _check(x: Tensor, dt: Pair, A: Four, B: Pair, C: Pair, left: Pair | None, top: Pair | None) -> None:
    """Refuse tensors that do not fit each other."""
    if x.ndim != 4 or 0 in x.shape:
        raise ModelError(f"x of the 2-D scan needs shape (b, N, T, D) without empty axes, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ModelError(f"the 2-D scan computes in float32 or float64, x is {x.dtype}; cast it first")
    batch, variates, steps, channels = x.shape
    if len(A) != 4 or A[0].ndim != 2 or A[0].shape[0] != channels or A[0].shape[1] < 1:
        raise ModelError(f"A of the 2-D scan needs four tensors (D, S) with D = {channels}, the channels of x")
    states = A[0].shape[1]
    groups = B[0].shape[3] if B[0].ndim == 5 else 0
    if groups < 1 or channels % groups:
        raise ModelError(
            f"B of the 2-D scan needs shape (b, N, T, G, S) where G divides the {channels} channels, "
            f"got {tuple(B[0].shape)}"
        )
    kind = x.dtype.to_complex() if A[0].is_complex() else x.dtype
    cells = (batch, variates, steps)
    expected: list[tuple[str, tuple[Tensor, ...], int, tuple[int, ...], torch.dtype]] = [
        ("dt", dt, 2, x.shape, x.dtype),
        ("A", A, 4, (channels, states), kind),
        ("B", B, 2, (*cells, groups, states), kind),
        ("C", C, 2, (*cells, groups, states), kind),
    ]
    if left is not None:
        expected.append(("left", left, 2, (batch, variates, channels, states), kind))
    if top is not None:
        expected.append(("top", top, 2, (batch, steps, channels, states), kind))
    for name, parts, count, shape, dtype in expected:
        if len(parts) != count:
            raise ModelError(f"{name} of the 2-D scan needs {count} tensors, got {len(parts)}")
        for index, part in enumerate(parts, start=1):
            if part.shape != shape or part.dtype != dtype or part.device != x.device:
                raise ModelError(
                    f"{name}{index} of the 2-D scan needs shape {tuple(shape)}, {dtype}, on {x.device}; "
                    f"got {tuple(part.shape)}, {part.dtype}, on {part.device}"
                )
    _check_signs(dt, A)


def _check_signs(dt: Pair, A: Four) -> None:
    if dt[0].device.type != "cpu":
        return
    for index in (0, 3):
        growing = int((_real(A[index].detach()) >= 0.0).sum())
        if growing:
            raise ModelError(
                f"A{index + 1} of the 2-D scan needs a negative real part, {growing} of {A[index].numel()} entries "
                "have none; such a state would grow without bound"
            )
    for index, step in enumerate(dt, start=1):
        negative = int((step.detach() < 0.0).sum())
        if negative:
            raise ModelError(f"dt{index} of the 2-D scan has {negative} negative steps; steps are 0 or more")


# ---- rows


def _row_scan(
    x: Tensor,
    dt: Pair,
    A: Four,
    B: Pair,
    C: Pair,
    edges: tuple[Pair | None, Pair | None],
    discretisation: Discretisation,
    input_disc: InputDisc,
) -> Scan2D:
    """Scan row by row along the axis that takes fewer steps: given the row above, h2 of a row is elementwise and h1 a
    first-order recurrence along it."""
    variates, steps, channels = x.shape[1:]
    swapped = not _along_time(variates, steps)
    left, top = edges
    factors = discrete_factors(dt, A, discretisation, input_disc)
    u = x.unsqueeze(-1)
    push1, push2 = factors.b1 * (_per_channel(B[0], channels) * u), factors.b2 * (_per_channel(B[1], channels) * u)
    if swapped:  # the same system with the roles of both axes, and of both states, exchanged
        grids = (factors.a4, factors.a3, push2, factors.a2, factors.a1, push1)
        left, top = (None if edge is None else edge[::-1] for edge in (top, left))
    else:
        grids = (factors.a1, factors.a2, push1, factors.a3, factors.a4, push2)
    order = (2, 1, 0, 3, 4) if swapped else (1, 2, 0, 3, 4)
    a1, a2, push1, a3, a4, push2 = (grid.permute(order) for grid in grids)  # (rows, length, b, D, S)
    zero = a1.new_zeros(1, 1, 1, 1, 1)
    above1, above2 = (zero[0], zero[0]) if top is None else (part.transpose(0, 1) for part in top)
    beside = (zero, zero) if left is None else tuple(part.transpose(0, 1).unsqueeze(1) for part in left)
    first1, first2 = (part.expand(len(a1), 1, *a1.shape[2:]) for part in beside)
    reach = [level.unbind(0) for level in _reach(a1)]
    rows = zip(*(grid.unbind(0) for grid in (first1, first2, a1, a2, push1, a3, a4, push2)), strict=True)
    states1, states2 = [], []
    for v, (start1, start2, keep1, couple1, drive1, couple2, keep2, drive2) in enumerate(rows):
        h2 = couple2 * above1 + keep2 * above2 + drive2
        h1 = couple1 * torch.cat([start2, h2[:-1]]) + drive1
        h1 = torch.cat([h1[:1] + keep1[:1] * start1, h1[1:]])
        for level, weights in enumerate(reach):
            shift = 2**level
            h1 = torch.cat([h1[:shift], torch.addcmul(h1[shift:], weights[v], h1[:-shift])])
        above1, above2 = h1, h2
        states1.append(h1)
        states2.append(h2)
    h1, h2 = torch.stack(states1), torch.stack(states2)  # (rows, length, b, D, S)
    ends = (h2[-1], h1[-1]) if swapped else (h1[:, -1], h2[:, -1])
    back = (2, 1, 0, 3, 4) if swapped else (2, 0, 1, 3, 4)
    h1, h2 = (h.permute(back) for h in ((h2, h1) if swapped else (h1, h2)))
    y = _real((_per_channel(C[0], channels) * h1 + _per_channel(C[1], channels) * h2).sum(-1))
    return Scan2D(y, (ends[0].transpose(0, 1), ends[1].transpose(0, 1)))


def _along_time(variates: int, steps: int) -> bool:
    """Return whether rows along time take fewer steps than columns along the variates."""
    return variates * _doublings(steps) <= steps * _doublings(variates)


def _doublings(length: int) -> int:
    """Return the steps of a prefix scan, at least 1: a row costs something even where it has one cell."""
    return max((length - 1).bit_length(), 1)


def _reach(keep: Tensor) -> list[Tensor]:
    """Return for every level j of the prefix scan the products of 2^j neighbouring factors of keep (rows, length, ...),
    [rows, length - 2^j, ...]: what a state carries over to the one 2^j cells later. They do not depend on the states,
    so all rows share the work."""
    levels, shift, length = [], 1, keep.shape[1]
    while shift < length:
        levels.append(keep[:, shift:])
        # cells nearer to the start than the shift keep their product: what lies before the row is 0
        keep = torch.cat([keep[:, :shift], keep[:, shift:] * keep[:, :-shift]], dim=1)
        shift *= 2
    return levels
