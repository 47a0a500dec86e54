"""All steps of a forced PLRNN at once by Newton's iterations: DEER, arXiv 2309.12252, for the map of Hess et al., arXiv
2306.04406.

The forced states x_k (x_0 = z1, x_{k+1} = z~_k) solve x_{k+1} = b_k (F(x_k) + u_k) + c_k with b = 1 - alpha and
c = alpha forcing. Newton's correction of a guess x with the defects r is the affine recurrence

    s_{k+1} = b_k J(x_k) s_k + r_{k+1},    s_0 = 0,

found by a scan over time of matrices M x M. The map is piecewise linear: once no hidden unit changes its sign the
correction is exact, and the defects are down to rounding. Forcing signals are the first guess; the stronger the
forcing, the fewer iterations. An iteration costs about 1 + M / 2 forward passes, so this pays on a GPU for long T and
M <= 16.

Rule where it does not converge: after 30 iterations the steps before the first with a defect stand, and the rest is
computed one step after another. The result is right either way; a free run (no alpha above 0) is refused.

The adjoint is linear: one scan back in time, no iteration. Hidden activations are computed again for it.

Deviations from DEER: the exact Jacobian of all units, corrections instead of new states (so rounding does not pile up),
and the sequential rest.

Legend: G groups, T steps, B batch, M latent units, H hidden units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.once import first_derivative_only
from tsforge.ops.plrnn import Shallow, shallow_map

_ITERATIONS = 30
# Defects relative to 1 + |state|, in units of the rounding of the dtype: done at once, and done where no better is had.
_TIGHT, _LOOSE = 64.0, 4096.0


class Solution(NamedTuple):
    """Forced states x (G, T, B, M) from x_0 = z1 on, the unforced z (G, T, B, M), the iterations taken, and the number
    of leading steps that they got right (T if all)."""

    forced: Tensor
    z: Tensor
    iterations: int
    right: int


def gtf_newton(
    z1: Tensor, forcing: Tensor | None, alpha: Tensor, params: Shallow, inputs: Tensor | None, clipped: bool
) -> Tensor:
    """Return the unforced states (G, T, B, M); grouped arguments as of ``gtf_sequence``, alpha (G, T, B, M).

    Raises:
        ModelError: nothing is forced, so the iterations would not converge.
    """
    if forcing is None or not bool((alpha > 0).any()):
        raise ModelError(
            "backend 'newton' of the PLRNN needs a forcing strength alpha above 0 somewhere: it solves all steps at "
            "once, which converges only where forcing makes the map contract; use backend 'auto' for a free run"
        )
    keep = 1.0 - alpha.detach()
    pull = torch.where(alpha == 0, 0.0, alpha * forcing).detach()
    guess = forcing.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    result: Tensor = _Newton.apply(z1, inputs, keep, pull, guess, clipped, *params)  # type: ignore[no-untyped-call]
    return result


def solve(
    z1: Tensor,
    inputs: Tensor | None,
    keep: Tensor,
    pull: Tensor,
    guess: Tensor,
    params: Shallow,
    clipped: bool,
    iterations: int = _ITERATIONS,
) -> Solution:
    """Return the states for b = keep and c = pull (G, T, B, M), by Newton's iterations from the forced states guess."""
    steps = keep.shape[1]
    start = torch.cat([z1.unsqueeze(1), guess[:, :-1]], dim=1)
    keep, pull = keep[:, :-1], pull[:, :-1]  # the last step is not forced
    unit = torch.finfo(z1.dtype).eps
    x, before, taken = start, float("inf"), 0
    while True:
        z = _step(x, params, clipped, inputs)
        defect = torch.cat([z1.unsqueeze(1), keep * z[:, :-1] + pull], dim=1) - x
        size = defect.abs() / (unit * (1.0 + x.abs()))
        worst = float(size.amax())
        if worst <= _TIGHT or (worst <= _LOOSE and worst > 0.5 * before):
            return Solution(x, z, taken, steps)
        if taken == iterations:
            break
        matrices = keep.unsqueeze(-1) * _jacobians(x[:, :-1], params, clipped)
        moved = x[:, 1:] + affine_scan(matrices, defect[:, 1:])
        x = torch.cat([x[:, :1], torch.where(moved.isfinite(), moved, start[:, 1:])], dim=1)
        before, taken = worst, taken + 1
    wrong = ~(size <= _LOOSE).amin((0, 2, 3))
    right = int(wrong.to(torch.int8).argmax())
    forced = list(x[:, :right].unbind(1))
    for k in range(right, steps):  # x_0 = z1 is right
        last = forced[k - 1]
        reached = shallow_map(last, params, clipped)
        if inputs is not None:
            reached = reached + inputs[:, k - 1]
        forced.append(keep[:, k - 1] * reached + pull[:, k - 1])
    x = torch.stack(forced, dim=1)
    return Solution(x, _step(x, params, clipped, inputs), taken, right)


def affine_scan(matrices: Tensor, offsets: Tensor) -> Tensor:
    """Return s_k = K_k s_{k-1} + r_k with s_{-1} = 0, for matrices K (G, T, B, M, M) and offsets r (G, T, B, M).

    Pairs of steps become one step, by recursion: 2 log2 T batched products, T of matrices in all.
    """
    steps = offsets.shape[1]
    if steps <= 1:
        return offsets
    pairs = steps // 2 * 2
    first, second = matrices[:, 0:pairs:2], matrices[:, 1:pairs:2]
    joint = _apply(second, offsets[:, 0:pairs:2]) + offsets[:, 1:pairs:2]
    odd = affine_scan(second @ first, joint)
    found = torch.empty_like(offsets)
    found[:, 1::2] = odd
    found[:, 0] = offsets[:, 0]
    found[:, 2::2] = _apply(matrices[:, 2::2], odd[:, : (steps - 1) // 2]) + offsets[:, 2::2]
    return found


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _step(x: Tensor, params: Shallow, clipped: bool, inputs: Tensor | None) -> Tensor:
    """Return F(x) + inputs for all states x (G, T, B, M)."""
    z = shallow_map(x.flatten(1, 2), params, clipped).view_as(x)
    return z if inputs is None else z + inputs


def _masks(points: Tensor, params: Shallow, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return for points (G, N, M) the hidden activations, and their derivatives by h2 and by W2 z, each (G, N, H)."""
    drive = points @ params.W2.mT
    shifted = drive + params.h2.unsqueeze(1)
    by_threshold = (shifted > 0).to(drive.dtype)
    hidden = shifted.clamp_(min=0.0)
    if not clipped:
        return hidden, by_threshold, by_threshold
    return hidden - drive.clamp(min=0.0), by_threshold, by_threshold - (drive > 0).to(drive.dtype)


def _jacobians(x: Tensor, params: Shallow, clipped: bool) -> Tensor:
    """Return J(x) (G, T, B, M, M) at states x (G, T, B, M): one product of the masks with outer products."""
    A, W1, W2 = params[:3]
    outer = (W1.mT.unsqueeze(3) * W2.unsqueeze(2)).flatten(2)  # (G, H, M M)
    mask = _masks(x.flatten(1, 2), params, clipped)[2]
    flat = torch.baddbmm(torch.diag_embed(A).flatten(1).unsqueeze(1), mask, outer)
    return flat.view(*x.shape, x.shape[-1])


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        inputs: Tensor | None,
        keep: Tensor,
        pull: Tensor,
        guess: Tensor,
        clipped: bool,
        *parts: Tensor,
    ) -> Tensor:
        solution = solve(z1, inputs, keep, pull, guess, Shallow(*parts), clipped)
        ctx.save_for_backward(solution.forced, keep, *parts)
        ctx.clipped, ctx.driven = clipped, inputs is not None
        return solution.z

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, *parts = ctx.saved_tensors
        params = Shallow(*parts)
        # z_k reaches z_{k+1} through x_{k+1} = b_k z_k + c_k: its adjoint is grad_k + b_k J(x_{k+1})' adjoint_{k+1}
        matrices = _jacobians(x, params, ctx.clipped).mT
        turned = (keep[:, :-1].unsqueeze(-1) * matrices[:, 1:]).flip(1)
        turned = torch.cat([torch.zeros_like(matrices[:, :1]), turned], dim=1)  # the last step has none after it
        adjoint = affine_scan(turned, grad.flip(1)).flip(1)
        points, flow = x.flatten(1, 2), adjoint.flatten(1, 2)
        hidden, by_threshold, by_drive = _masks(points, params, ctx.clipped)
        back = flow @ params.W1
        gradients = Shallow(
            A=(flow * points).sum(1),
            W1=flow.mT @ hidden,
            W2=(back * by_drive).mT @ points,
            h1=flow.sum(1),
            h2=(back * by_threshold).sum(1),
        )
        first = _apply(matrices[:, 0], adjoint[:, 0])
        return first, adjoint if ctx.driven else None, None, None, None, None, *gradients
