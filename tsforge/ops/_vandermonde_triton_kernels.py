"""Triton kernels of the diagonal system's impulse response and its adjoint; imported on demand.

Layout: logs [2, H, n] float64 (real and imaginary part of log a), weights [2, M, H, n], kernel and grad [M, H, L],
parts [splits, 4, M, H, n]: gradients of Re w, Im w, Re log a, Im log a from one run of blocks. Of S4D: log_dt [H],
log_decay and frequency [S, n], B [S, n, 2] for S copies of H / S features each, C [M, H, n, 2].
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-not-found,import-untyped"

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
def forward_kernel(logs, weights, kernel, sizes, BLOCK: tl.constexpr, MODES: tl.constexpr):
    """One feature and one block of lags a program; all channels."""
    channels, features, modes, length = sizes
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
def backward_kernel(logs, weights, grad, parts, sizes, per_split, BLOCK: tl.constexpr, MODES: tl.constexpr):
    """One feature, one channel and one run of blocks a program: S = sum g_l a^l and T = sum l g_l a^l of the run."""
    channels, features, modes, length = sizes
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


@triton.jit
def _expm1(x):
    """Return e^x - 1 in float64 for x <= 0; a series where the difference would cancel."""
    small = tl.where(x > -0.5, x, 0.0)
    term = 1.0 + small / 14.0
    for k in tl.static_range(13, 1, -1):
        term = 1.0 + small / k * term
    return tl.where(x > -0.5, small * term, tl.exp(x) - 1.0)


@triton.jit
def _held(log_dt, log_decay, frequency, limits):
    """Return, in float64, dt, lambda, z = dt lambda, e^z - 1 and the gain (e^z - 1) / lambda of held inputs."""
    rate, low_dt, high_dt, low_decay, high_decay = limits
    dt = tl.exp(tl.minimum(tl.maximum(log_dt.to(tl.float64), low_dt), high_dt)) * rate
    lam_re = -tl.exp(tl.minimum(tl.maximum(log_decay.to(tl.float64), low_decay), high_decay))
    lam_im = frequency.to(tl.float64)
    z_re = dt * lam_re
    z_im = dt * lam_im
    half = tl.sin(0.5 * z_im)
    top_re = _expm1(z_re) * tl.cos(z_im) - 2.0 * half * half
    top_im = tl.exp(z_re) * tl.sin(z_im)
    square = lam_re * lam_re + lam_im * lam_im
    gain_re = (top_re * lam_re + top_im * lam_im) / square
    gain_im = (top_im * lam_re - top_re * lam_im) / square
    return dt, lam_re, lam_im, z_re, z_im, top_re, top_im, gain_re, gain_im


@triton.jit
def discretise_kernel(parameters, logs, weights, sizes, limits, MODES: tl.constexpr):
    """From the parameters of S4D to log a and w = C gain B; one feature a program."""
    log_dt, log_decay, frequency, B, C = parameters
    channels, features, modes, per_copy = sizes
    h = tl.program_id(0)
    n = tl.arange(0, MODES)
    here = n < modes
    own = h // per_copy * modes + n
    raw_decay = tl.load(log_decay + own, mask=here, other=0.0)
    held = _held(tl.load(log_dt + h), raw_decay, tl.load(frequency + own, mask=here, other=0.0), limits)
    z_re, z_im = held[3], held[4]
    gain_re, gain_im = held[7], held[8]
    tl.store(logs + h * modes + n, z_re, mask=here)
    tl.store(logs + (features + h) * modes + n, z_im, mask=here)
    b_re = tl.load(B + 2 * own, mask=here, other=0.0).to(tl.float64)
    b_im = tl.load(B + 2 * own + 1, mask=here, other=0.0).to(tl.float64)
    g_re = (gain_re * b_re - gain_im * b_im).to(tl.float32)
    g_im = (gain_re * b_im + gain_im * b_re).to(tl.float32)
    for m in range(channels):
        at = (m * features + h) * modes + n
        c_re = tl.load(C + 2 * at, mask=here, other=0.0)
        c_im = tl.load(C + 2 * at + 1, mask=here, other=0.0)
        tl.store(weights + at, c_re * g_re - c_im * g_im, mask=here)
        tl.store(weights + channels * features * modes + at, c_re * g_im + c_im * g_re, mask=here)


@triton.jit
def chain_kernel(parameters, parts, d_dt, d_own, d_C, sizes, splits, limits, MODES: tl.constexpr):
    """From the gradients of w and log a to those of S4D's parameters; one feature a program.

    d_dt [H], d_own [H, 4, n] (log decay, frequency, real and imaginary part of B, by feature), d_C [M, H, n, 2].
    """
    log_dt, log_decay, frequency, B, C = parameters
    channels, features, modes, per_copy = sizes
    _, low_dt, high_dt, low_decay, high_decay = limits
    h = tl.program_id(0)
    n = tl.arange(0, MODES)
    here = n < modes
    own = h // per_copy * modes + n
    raw_dt = tl.load(log_dt + h)
    raw_decay = tl.load(log_decay + own, mask=here, other=0.0)
    dt, lam_re, lam_im, z_re, z_im, top_re, top_im, gain_re, gain_im = _held(
        raw_dt, raw_decay, tl.load(frequency + own, mask=here, other=0.0), limits
    )
    b_re = tl.load(B + 2 * own, mask=here, other=0.0).to(tl.float64)
    b_im = tl.load(B + 2 * own + 1, mask=here, other=0.0).to(tl.float64)
    g_re = (gain_re * b_re - gain_im * b_im).to(tl.float32)
    g_im = (gain_re * b_im + gain_im * b_re).to(tl.float32)
    dg_re = tl.zeros([MODES], dtype=tl.float64)
    dg_im = tl.zeros([MODES], dtype=tl.float64)
    dz_re = tl.zeros([MODES], dtype=tl.float64)
    dz_im = tl.zeros([MODES], dtype=tl.float64)
    plane = channels * features * modes
    for m in range(channels):
        at = (m * features + h) * modes + n
        w_re = tl.zeros([MODES], dtype=tl.float32)
        w_im = tl.zeros([MODES], dtype=tl.float32)
        for split in range(splits):
            part = parts + split * 4 * plane + at
            w_re += tl.load(part, mask=here, other=0.0)
            w_im += tl.load(part + plane, mask=here, other=0.0)
            dz_re += tl.load(part + 2 * plane, mask=here, other=0.0).to(tl.float64)
            dz_im += tl.load(part + 3 * plane, mask=here, other=0.0).to(tl.float64)
        c_re = tl.load(C + 2 * at, mask=here, other=0.0)
        c_im = tl.load(C + 2 * at + 1, mask=here, other=0.0)
        tl.store(d_C + 2 * at, g_re * w_re + g_im * w_im, mask=here)
        tl.store(d_C + 2 * at + 1, g_re * w_im - g_im * w_re, mask=here)
        dg_re += (c_re * w_re + c_im * w_im).to(tl.float64)
        dg_im += (c_re * w_im - c_im * w_re).to(tl.float64)
    # g = gain B
    out = d_own + h * 4 * modes + n
    tl.store(out + 2 * modes, (gain_re * dg_re + gain_im * dg_im).to(tl.float32), mask=here)
    tl.store(out + 3 * modes, (gain_re * dg_im - gain_im * dg_re).to(tl.float32), mask=here)
    up_re = b_re * dg_re + b_im * dg_im
    up_im = b_re * dg_im - b_im * dg_re
    # gain = dt f(z) with f(z) = (e^z - 1) / z: by dt it moves by e^z, by lambda with dt^2 f'(z)
    far = z_re * z_re + z_im * z_im > 1e-4
    safe_re = tl.where(far, z_re, 1.0)
    safe_im = tl.where(far, z_im, 0.0)
    square = safe_re * safe_re + safe_im * safe_im
    e_re = top_re + 1.0
    rest_re = e_re - gain_re / dt
    rest_im = top_im - gain_im / dt
    slope_re = (rest_re * safe_re + rest_im * safe_im) / square
    slope_im = (rest_im * safe_re - rest_re * safe_im) / square
    near_re = tl.zeros([MODES], dtype=tl.float64) + 1.0 / 5760.0  # sum (k + 1) z^k / (k + 2)!, k up to 6
    near_im = tl.zeros([MODES], dtype=tl.float64)
    for k in tl.static_range(5, -1, -1):
        held = z_re * near_re - z_im * near_im
        near_im = z_re * near_im + z_im * near_re
        if k == 5:
            near_re = held + 1.0 / 840.0
        elif k == 4:
            near_re = held + 1.0 / 144.0
        elif k == 3:
            near_re = held + 1.0 / 30.0
        elif k == 2:
            near_re = held + 1.0 / 8.0
        elif k == 1:
            near_re = held + 1.0 / 3.0
        else:
            near_re = held + 0.5
    slope_re = dt * dt * tl.where(far, slope_re, near_re)
    slope_im = dt * dt * tl.where(far, slope_im, near_im)
    dlam_re = dt * dz_re + slope_re * up_re + slope_im * up_im
    dlam_im = dt * dz_im + slope_re * up_im - slope_im * up_re
    by_dt = lam_re * dz_re + lam_im * dz_im + e_re * up_re + top_im * up_im
    moves = (raw_decay >= low_decay) & (raw_decay <= high_decay)
    tl.store(out, tl.where(moves, lam_re * dlam_re, 0.0).to(tl.float32), mask=here)  # d lambda / d log decay = lambda
    tl.store(out + modes, dlam_im.to(tl.float32), mask=here)
    total = dt * tl.sum(tl.where(here, by_dt, 0.0), axis=0)
    inside = (raw_dt >= low_dt) & (raw_dt <= high_dt)
    tl.store(d_dt + h, tl.where(inside, total, 0.0).to(tl.float32))
