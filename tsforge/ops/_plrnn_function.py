"""The forced shallow PLRNN in torch alone, with a backward pass of its own: two small products a step each way.

The recurrence is that of ``tsforge.ops.plrnn`` (Hess et al., arXiv 2306.04406, Algorithm 1). With g_k the gradient of
the result, x_k the state that step k starts from and J its Jacobian, the adjoint runs back in time,

    delta_k = g_k + (1 - alpha_k) J(x_{k+1})' delta_{k+1},

and the gradients of the parameters are large products over all steps and samples. The forward pass keeps the states
only. The backward pass computes the hidden units again, a stretch of time at a time: at most ``_HIDDEN`` values each of
what has the size of H, however long the sequence.

A clipped unit is one clamp: relu(u + h) - relu(u) = sign(h) clamp(u, min(-h, 0), max(-h, 0)) + relu(h), where sign and
constant go into W1 and h1.

Deviations: none.

Legend: G groups, T steps, B batch, M latent units, H hidden units. One group is computed without its axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.plrnn import Shallow

_HIDDEN = 1 << 18  # hidden values of a stretch of time in the backward pass


def gtf_function(
    z1: Tensor, forcing: Tensor | None, alpha: Tensor, params: Shallow, inputs: Tensor | None, clipped: bool
) -> Tensor:
    """Return the unforced states (G, T, B, M); grouped arguments as of ``gtf_sequence``, alpha (G, T, B, M) of any
    strides, not checked here.

    Raises:
        ModelError: in the backward pass, when it is asked for a graph of its own (``create_graph``).
    """
    keep = pull = None
    if forcing is not None:
        keep = 1.0 - _spread_once(alpha)
        pull = torch.where(alpha == 0, 0.0, alpha * forcing)  # 0 times a missing value is no number
    one = z1.shape[0] == 1
    given = [None if part is None else part.squeeze(0) if one else part for part in (keep, pull, inputs, z1, *params)]
    steps = alpha.shape[1]
    found: Tensor = _Sequence.apply(steps, clipped, *given)  # type: ignore[no-untyped-call]
    return found.unsqueeze(0) if one else found


def free_function(z1: Tensor, params: Shallow, steps: int, inputs: Tensor | None, clipped: bool, every: int) -> Tensor:
    """Return the states after each ``every`` steps of the free run, (G, steps // every, B, M), without a graph."""
    with torch.no_grad():
        one = z1.shape[0] == 1
        z, *maps = (part.squeeze(0) if one else part for part in (z1, *params))
        units = _units(Shallow(*maps), clipped)
        pushes = None if inputs is None else (inputs.squeeze(0) if one else inputs)
        found = []
        for k in range(1, steps // every * every + 1):
            z = _step(z, units, units.offset if pushes is None else units.offset + pushes.select(-3, k - 1))
            if k % every == 0:
                found.append(z)
        result = torch.stack(found, dim=-3)
    return result.unsqueeze(0) if one else result


class _Units(NamedTuple):
    """Parameters as the steps use them; vectors (1, M) or (G, 1, M). ``low`` and ``high`` bound a clipped unit."""

    A: Tensor
    rise: Tensor  # W1 (M, H), with the signs of clipped units
    read: Tensor  # W2 (H, M)
    offset: Tensor
    bias: Tensor  # h2
    low: Tensor | None
    high: Tensor | None


def _units(params: Shallow, clipped: bool) -> _Units:
    A, W1, W2, h1, h2 = params
    A, h1, h2 = (part.unsqueeze(-2) for part in (A, h1, h2))
    if not clipped:
        return _Units(A, W1, W2, h1, h2, None, None)
    offset = h1 + h2.relu() @ W1.mT
    return _Units(A, W1 * h2.sign(), W2, offset, h2, (-h2).clamp(max=0.0), (-h2).clamp(min=0.0))


def _step(z: Tensor, units: _Units, offset: Tensor) -> Tensor:
    """Return F(z) for z (B, M) or (G, B, M); offset is that of the map and what the inputs add."""
    add_product = torch.addmm if z.ndim == 2 else torch.baddbmm
    if units.low is None:
        hidden = add_product(units.bias, z, units.read.mT).relu_()
    else:
        hidden = (z @ units.read.mT).clamp_(units.low, units.high)
    return add_product(torch.addcmul(offset, units.A, z), hidden, units.rise.mT)


class _Sequence(torch.autograd.Function):
    """Arguments: steps, clipped, keep = 1 - alpha, pull = alpha forcing, inputs, z1, A, W1, W2, h1, h2; one group has
    no axis of groups."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: int,
        clipped: bool,
        keep: Tensor | None,
        pull: Tensor | None,
        inputs: Tensor | None,
        z1: Tensor,
        *params: Tensor,
    ) -> Tensor:
        units = _units(Shallow(*params), clipped)
        if inputs is None:
            offsets: tuple[Tensor, ...] = (units.offset,) * steps
        else:
            offsets = (units.offset.unsqueeze(-3) + inputs).unbind(-3)
        forced, found = z1, []
        if keep is None or pull is None:
            for offset in offsets:
                forced = _step(forced, units, offset)
                found.append(forced)
        else:
            for offset, kept, pulled in zip(offsets, _steps(keep, steps), pull.unbind(-3), strict=True):
                z = _step(forced, units, offset)
                found.append(z)
                forced = torch.addcmul(pulled, kept, z)
        result = torch.stack(found, dim=-3)
        ctx.save_for_backward(result, keep, pull, z1, *params)
        ctx.clipped = clipped
        return result

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise ModelError(
                "the PLRNN's own backward pass has no second derivative; choose backend 'reference' where create_graph "
                "is needed"
            )
        found, keep, pull, z1, *maps = ctx.saved_tensors
        params = Shallow(*maps)
        states = found if keep is None else torch.addcmul(pull, keep, found)
        states = torch.cat([z1.unsqueeze(-3), states.narrow(-3, 0, states.shape[-3] - 1)], dim=-3)
        units, sums = _units(params, ctx.clipped), Shallow(*(torch.zeros_like(part) for part in params))
        steps, batch = states.shape[-3:-1]
        size = max(1, _HIDDEN // (batch * params.h2.numel()))
        gradients = d_found.unbind(-3)
        kept = None if keep is None else _steps(keep, steps)
        back, deltas = None, []
        for stop in range(steps, 0, -size):
            start = max(0, stop - size)
            hidden = _hidden(states.narrow(-3, start, stop - start), units)
            back, part, passed = _adjoint(back, gradients, kept, hidden.slope, units, start)
            _accumulate(sums, states.narrow(-3, start, stop - start), part, passed, hidden, params)
            deltas.append(part)
        d_inputs = torch.cat(deltas[::-1], dim=-3) if ctx.needs_input_grad[4] else None
        return None, None, None, None, d_inputs, back, *sums


class _Hidden(NamedTuple):
    """Hidden units of a stretch (..., steps, B, H): values, their slopes in W2 z, and for clipped ones their slopes in
    h2. Those of clipped units are without the signs and constants that ``_Units`` holds."""

    values: Tensor
    slope: Tensor
    shift: Tensor | None


def _hidden(states: Tensor, units: _Units) -> _Hidden:
    drive = states.flatten(-3, -2) @ units.read.mT
    drive = drive.view(*states.shape[:-1], drive.shape[-1])
    bias = units.bias.unsqueeze(-3)
    if units.low is None or units.high is None:
        drive += bias
        return _Hidden(drive.relu(), (drive > 0).to(drive.dtype), None)
    low, high = units.low.unsqueeze(-3), units.high.unsqueeze(-3)
    slope = (drive > low).logical_and_(drive <= high).to(drive.dtype)
    shift = (drive > -bias).to(drive.dtype)
    return _Hidden(drive.clamp_(low, high), slope, shift)


def _adjoint(
    back: Tensor | None,
    gradients: tuple[Tensor, ...],
    kept: tuple[Tensor, ...] | None,
    slope: Tensor,
    units: _Units,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the adjoint back over the stretch of ``slope`` from step ``start``; ``back`` is J' delta of the step after.

    Returns J' delta of the first step, delta (..., steps, B, M), and W1' delta times the slopes (..., steps, B, H).
    """
    add_product = torch.addmm if gradients[0].ndim == 2 else torch.baddbmm
    passed = torch.empty_like(slope)
    slopes, places = slope.unbind(-3), passed.unbind(-3)
    deltas = []
    for k in reversed(range(len(slopes))):
        delta = gradients[start + k]
        if back is not None:
            delta = delta + back if kept is None else torch.addcmul(delta, kept[start + k], back)
        through = torch.mul(delta @ units.rise, slopes[k], out=places[k])
        back = add_product(units.A * delta, through, units.read)
        deltas.append(delta)
    assert back is not None
    return back, torch.stack(deltas[::-1], dim=-3), passed


def _accumulate(
    sums: Shallow, states: Tensor, deltas: Tensor, passed: Tensor, hidden: _Hidden, params: Shallow
) -> None:
    """Add the gradients of the parameters over a stretch of time to ``sums``."""
    x, delta, through, values = (part.flatten(-3, -2) for part in (states, deltas, passed, hidden.values))
    total = delta.sum(-2)
    sums.A.add_((delta * x).sum(-2))
    sums.h1.add_(total)
    sums.W2.add_(through.mT @ x)
    products = delta.mT @ values
    if hidden.shift is None:
        sums.W1.add_(products)
        sums.h2.add_(through.sum(-2))
        return
    h2 = params.h2.unsqueeze(-2)
    sums.W1.add_(h2.sign() * products + total.unsqueeze(-1) * h2.relu())
    sums.h2.add_((params.W1 * (delta.mT @ hidden.shift.flatten(-3, -2))).sum(-2))


def _spread_once(alpha: Tensor) -> Tensor:
    """Return alpha with axes of length 1 where it repeats itself, so that what is computed of it stays small."""
    for axis, stride in enumerate(alpha.stride()):
        if stride == 0 and axis > 0:
            alpha = alpha.narrow(axis, 0, 1)
    return alpha


def _steps(keep: Tensor, steps: int) -> tuple[Tensor, ...]:
    """Return the entries of each step, which may be the same for all."""
    return keep.unbind(-3) if keep.shape[-3] == steps else keep.unbind(-3) * steps
