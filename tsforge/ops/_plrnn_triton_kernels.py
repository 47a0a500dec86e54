"""Triton kernels of the PLRNN recurrence, forward and adjoint; imported on demand by ``_plrnn_triton``.

One program carries BLOCK_B samples of one group through all steps. Products with the weights are sums over tiles
[BLOCK_B, BLOCK_H, M_P2] (plain multiply-adds, no tensor cores, whose float32 would be rounded): a sum over the last
axis gives hidden units, a sum over the middle one states, and each result already lies where the next product wants it.

Memory. Parameters and z1, Z, its gradient and the outputs are contiguous; W1 is turned, so that both matrices are
[G, H, M]. forcing, alpha and inputs are [G, T, B, M] with any strides (0 where constant):

    sizes   T, B, programs of a group, then the four strides of forcing, of alpha and of inputs (S below)
    parts   [G * programs, H, M], [..., H, M], [..., H], [..., M], [..., M]: gradients of W1 (turned), W2, h2, A, h1 by
            program

RESIDENT keeps the weights in registers for all steps (then BLOCK_H covers H), else every step reads them tile by tile
(they stay in the caches). ACCUMULATE sums the gradients of the parameters in registers too. Lanes beyond B, H or M
hold zeros where they meet others: their weights and gradients are 0. Time offsets are int64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-not-found,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the annotations of a jitted function, so only tl.constexpr may stand there. No argument of a kernel may
# be called "params": the code that Triton 3.7 makes for a launch uses that name itself (the interpreter does not mind).

_FORCING = tl.constexpr(3)  # where the strides start in sizes
_ALPHA = tl.constexpr(7)
_INPUTS = tl.constexpr(11)


@triton.jit
def _relu(x):
    """Return max(x, 0); a NaN stays one, which maximum would lose."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _place(sizes, BLOCK_B: tl.constexpr, M_P2: tl.constexpr):
    """Return the group, samples [BLOCK_B, 1] and latent units [1, M_P2] of this program."""
    program = tl.program_id(0)
    group = program // sizes[2]
    sample = (program % sizes[2]) * BLOCK_B + tl.arange(0, BLOCK_B)
    return group.to(tl.int64), sample.to(tl.int64)[:, None], tl.arange(0, M_P2)[None, :]


@triton.jit
def _load_weights(weights, group, low, H: tl.constexpr, M: tl.constexpr, BLOCK_H: tl.constexpr, M_P2: tl.constexpr):
    """Return W1, W2 [BLOCK_H, M_P2] and h2 [BLOCK_H] of hidden units from ``low``; weights: A, W1, W2, h1, h2."""
    unit = low + tl.arange(0, BLOCK_H)
    latent = tl.arange(0, M_P2)
    there = (unit[:, None] < H) & (latent[None, :] < M)
    cell = group * H * M + unit[:, None] * M + latent[None, :]
    w1 = tl.load(weights[1] + cell, mask=there, other=0.0)
    w2 = tl.load(weights[2] + cell, mask=there, other=0.0)
    return w1, w2, tl.load(weights[4] + group * H + unit, mask=unit < H, other=0.0)


@triton.jit
def _at(ptr, sizes, FIRST: tl.constexpr, group, step, sample, latent, mask):
    """Load one step of forcing, alpha or inputs, zeros where masked; FIRST: where its strides stand in sizes."""
    offset = group * sizes[FIRST] + step * sizes[FIRST + 1] + sample * sizes[FIRST + 2] + latent * sizes[FIRST + 3]
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def _mix(z, forcing, alpha):
    """Return the forced state; a forcing of strength 0 is not read (it may be NaN)."""
    return tl.where(alpha == 0.0, z, (1.0 - alpha) * z + alpha * forcing)


@triton.jit
def _push(z, w1, w2, h2, CLIPPED: tl.constexpr):
    """Return the summands [BLOCK_B, BLOCK_H, M_P2] of W1 phi(z), to be summed over hidden units."""
    drive = tl.sum(z[:, None, :] * w2[None, :, :], axis=2)
    hidden = _relu(drive + h2[None, :])
    if CLIPPED:
        hidden = hidden - _relu(drive)
    return hidden[:, :, None] * w1[None, :, :]


@triton.jit
def forward(
    inputs,
    weights,
    result,
    sizes,
    H: tl.constexpr,
    M: tl.constexpr,
    M_P2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CLIPPED: tl.constexpr,
    FORCED: tl.constexpr,
    HAS_INPUTS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Run all steps; inputs: z1, forcing, alpha, inputs; weights: A, W1 (turned), W2, h1, h2; result: Z."""
    group, sample, latent = _place(sizes, BLOCK_B, M_P2)
    steps, batch = sizes[0], sizes[1]
    mask = (sample < batch) & (latent < M)
    decay = tl.load(weights[0] + group * M + latent, mask=latent < M, other=0.0)
    shift = tl.load(weights[3] + group * M + latent, mask=latent < M, other=0.0)
    z = tl.load(inputs[0] + (group * batch + sample) * M + latent, mask=mask, other=0.0)
    if RESIDENT:
        w1, w2, h2 = _load_weights(weights, group, 0, H, M, BLOCK_H, M_P2)
    for step in range(0, steps):
        k = group * 0 + step  # int64; the interpreter's step is a plain number
        if RESIDENT:
            total = _push(z, w1, w2, h2, CLIPPED)
        else:
            total = tl.zeros([BLOCK_B, BLOCK_H, M_P2], dtype=z.dtype)
            for low in range(0, H, BLOCK_H):
                v1, v2, g2 = _load_weights(weights, group, low, H, M, BLOCK_H, M_P2)
                total += _push(z, v1, v2, g2, CLIPPED)
        z = decay * z + tl.sum(total, axis=1) + shift
        if HAS_INPUTS:
            z += _at(inputs[3], sizes, _INPUTS, group, k, sample, latent, mask)
        tl.store(result + ((group * steps + k) * batch + sample) * M + latent, z, mask=mask)
        if FORCED:
            alpha = _at(inputs[2], sizes, _ALPHA, group, k, sample, latent, mask)
            z = _mix(z, _at(inputs[1], sizes, _FORCING, group, k, sample, latent, mask), alpha)


@triton.jit
def _pull(z, delta, w1, w2, h2, CLIPPED: tl.constexpr):
    """Return of one tile: hidden activity, d loss / d (W2 z), d loss / d h2, each [BLOCK_B, BLOCK_H]."""
    drive = tl.sum(z[:, None, :] * w2[None, :, :], axis=2)
    back = tl.sum(delta[:, None, :] * w1[None, :, :], axis=2)
    raised = drive + h2[None, :]
    hidden = _relu(raised)
    to_h2 = tl.where(raised > 0.0, back, 0.0)
    to_drive = to_h2
    if CLIPPED:
        hidden = hidden - _relu(drive)
        to_drive = to_h2 - tl.where(drive > 0.0, back, 0.0)
    return hidden, to_drive, to_h2


@triton.jit
def backward(
    inputs,
    weights,
    found,
    outputs,
    sizes,
    H: tl.constexpr,
    M: tl.constexpr,
    M_P2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CLIPPED: tl.constexpr,
    FORCED: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    KEEP_DELTA: tl.constexpr,
):
    """Run the adjoint from the last step to the first.

    inputs, weights: as ``forward``; found: Z and its gradient; outputs: gradient of z1, delta (the gradient of every
    z_k, which is that of the inputs; written with KEEP_DELTA), and ``parts`` (written with ACCUMULATE).
    """
    group, sample, latent = _place(sizes, BLOCK_B, M_P2)
    steps, batch = sizes[0], sizes[1]
    mask = (sample < batch) & (latent < M)
    decay = tl.load(weights[0] + group * M + latent, mask=latent < M, other=0.0)
    cell = (group * batch + sample) * M + latent
    z1 = tl.load(inputs[0] + cell, mask=mask, other=0.0)
    carry = tl.zeros_like(z1)
    if RESIDENT:
        w1, w2, h2 = _load_weights(weights, group, 0, H, M, BLOCK_H, M_P2)
    if ACCUMULATE:
        d_w1 = tl.zeros_like(w1)
        d_w2 = d_w1
        d_h2 = tl.zeros_like(h2)
        d_decay = tl.sum(carry, axis=0)
        d_shift = d_decay
    for gone in range(0, steps):
        step = steps - 1 - gone
        k = group * 0 + step
        offset = ((group * steps + k) * batch + sample) * M + latent
        delta = tl.load(found[1] + offset, mask=mask, other=0.0) + carry
        if KEEP_DELTA:
            tl.store(outputs[1] + offset, delta, mask=mask)
        # the forced state before this step: of the step before it, or z1
        later = mask & (step > 0)
        z = tl.load(found[0] + offset - batch * M, mask=later, other=0.0)
        kept = 1.0
        if FORCED:
            alpha = _at(inputs[2], sizes, _ALPHA, group, k - 1, sample, latent, later)
            z = _mix(z, _at(inputs[1], sizes, _FORCING, group, k - 1, sample, latent, later), alpha)
            kept = 1.0 - alpha
        z = tl.where(step > 0, z, z1)
        if RESIDENT:
            hidden, to_drive, to_h2 = _pull(z, delta, w1, w2, h2, CLIPPED)
            total = to_drive[:, :, None] * w2[None, :, :]
            if ACCUMULATE:
                d_w1 += tl.sum(hidden[:, :, None] * delta[:, None, :], axis=0)
                d_w2 += tl.sum(to_drive[:, :, None] * z[:, None, :], axis=0)
                d_h2 += tl.sum(to_h2, axis=0)
                d_decay += tl.sum(delta * z, axis=0)
                d_shift += tl.sum(delta, axis=0)
        else:
            total = tl.zeros([BLOCK_B, BLOCK_H, M_P2], dtype=z.dtype)
            for low in range(0, H, BLOCK_H):
                v1, v2, g2 = _load_weights(weights, group, low, H, M, BLOCK_H, M_P2)
                _activity, drawn, _to_h2 = _pull(z, delta, v1, v2, g2, CLIPPED)
                total += drawn[:, :, None] * v2[None, :, :]
        carry = (decay * delta + tl.sum(total, axis=1)) * kept
    tl.store(outputs[0] + cell, carry, mask=mask)
    if ACCUMULATE:
        program = tl.program_id(0).to(tl.int64)
        unit = tl.arange(0, BLOCK_H)
        one = tl.arange(0, M_P2)
        there = (unit[:, None] < H) & (one[None, :] < M)
        place = program * H * M + unit[:, None] * M + one[None, :]
        tl.store(outputs[2] + place, d_w1, mask=there)
        tl.store(outputs[3] + place, d_w2, mask=there)
        tl.store(outputs[4] + program * H + unit, d_h2, mask=unit < H)
        tl.store(outputs[5] + program * M + one, d_decay, mask=one < M)
        tl.store(outputs[6] + program * M + one, d_shift, mask=one < M)
