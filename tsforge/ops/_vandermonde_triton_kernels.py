"""Triton kernels of the diagonal system's impulse response and its adjoint; imported on demand.

Layout: logs [2, H, n] float64 (real and imaginary part of log a), weights [2, M, H, n], kernel and grad [M, H, L],
parts [splits, 4, M, H, n]: gradients of Re w, Im w, Re log a, Im log a from one run of blocks.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the annotations of a jitted function, so only tl.constexpr may stand there.


@triton.jit
def _powers(log_re, log_im, steps):
    """Return a^steps in float32; the phase is reduced to one turn in float64."""
    phase = log_im * steps
    phase = phase - tl.floor(phase * 0.15915494309189535 + 0.5) * 6.283185307179586
    angle = phase.to(tl.float32)
    size = tl.exp((log_re * steps).to(tl.float32))
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def forward_kernel(logs, weights, kernel, channels, features, modes, length, BLOCK: tl.constexpr, MODES: tl.constexpr):
    """One feature and one block of lags a program; all channels."""
    h = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    n = tl.arange(0, MODES)
    i = tl.arange(0, BLOCK)
    here = n < modes
    log_re = tl.load(logs + h * modes + n, mask=here, other=0.0)
    log_im = tl.load(logs + (features + h) * modes + n, mask=here, other=0.0)
    fine_re, fine_im = _powers(log_re[None, :], log_im[None, :], i[:, None].to(tl.float64))
    far_re, far_im = _powers(log_re, log_im, first.to(tl.float64))
    for m in range(channels):
        at = (m * features + h) * modes
        w_re = tl.load(weights + at + n, mask=here, other=0.0)
        w_im = tl.load(weights + channels * features * modes + at + n, mask=here, other=0.0)
        re = 2.0 * (w_re * far_re - w_im * far_im)
        im = 2.0 * (w_re * far_im + w_im * far_re)
        value = tl.sum(re[None, :] * fine_re - im[None, :] * fine_im, axis=1)
        tl.store(kernel + (m * features + h) * length + first + i, value, mask=first + i < length)


@triton.jit
def backward_kernel(
    logs,
    weights,
    grad,
    parts,
    channels,
    features,
    modes,
    length,
    per_split,
    BLOCK: tl.constexpr,
    MODES: tl.constexpr,
):
    """One feature, one channel and one run of blocks a program: S = sum g_l a^l and T = sum l g_l a^l of the run."""
    h = tl.program_id(0)
    m = tl.program_id(1)
    split = tl.program_id(2)
    n = tl.arange(0, MODES)
    i = tl.arange(0, BLOCK)
    here = n < modes
    log_re = tl.load(logs + h * modes + n, mask=here, other=0.0)
    log_im = tl.load(logs + (features + h) * modes + n, mask=here, other=0.0)
    fine_re, fine_im = _powers(log_re[None, :], log_im[None, :], i[:, None].to(tl.float64))
    s_re = tl.zeros([MODES], dtype=tl.float32)
    s_im = tl.zeros([MODES], dtype=tl.float32)
    t_re = tl.zeros([MODES], dtype=tl.float32)
    t_im = tl.zeros([MODES], dtype=tl.float32)
    for block in range(split * per_split, (split + 1) * per_split):
        first = block * BLOCK
        g = tl.load(grad + (m * features + h) * length + first + i, mask=first + i < length, other=0.0)
        late = g * i.to(tl.float32)
        u_re = tl.sum(g[:, None] * fine_re, axis=0)
        u_im = tl.sum(g[:, None] * fine_im, axis=0)
        v_re = tl.sum(late[:, None] * fine_re, axis=0) + first * u_re
        v_im = tl.sum(late[:, None] * fine_im, axis=0) + first * u_im
        far_re, far_im = _powers(log_re, log_im, first.to(tl.float64))
        s_re += far_re * u_re - far_im * u_im
        s_im += far_re * u_im + far_im * u_re
        t_re += far_re * v_re - far_im * v_im
        t_im += far_re * v_im + far_im * v_re
    plane = channels * features * modes
    at = (m * features + h) * modes + n
    w_re = tl.load(weights + at, mask=here, other=0.0)
    w_im = tl.load(weights + plane + at, mask=here, other=0.0)
    out = parts + split * 4 * plane + at
    tl.store(out, 2.0 * s_re, mask=here)
    tl.store(out + plane, -2.0 * s_im, mask=here)
    tl.store(out + 2 * plane, 2.0 * (w_re * t_re - w_im * t_im), mask=here)
    tl.store(out + 3 * plane, -2.0 * (w_re * t_im + w_im * t_re), mask=here)
