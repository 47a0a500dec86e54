"""The 2-D state space model with constant parameters: impulse response and 2-D FFT, one column of a stream at a time.

With A, B, C and steps that do not depend on the input the grid map of ``scan2d`` is a causal 2-D convolution. Its
kernel is the response to one impulse, by the recurrence itself: exact at cost N (N + T - 1) D S, whatever the batch.
Sampling the frequency response on the unit circle instead would wrap the infinite response around.

Two structures: diagonal (continuous time, discretised as in ``scan2d``) and companion (discrete time: A1 and A2 are
companion matrices per channel, A3 and A4 diagonal), in which a row can be an autoregressive model of order S. Source:
the paper restricts A1, A2 to structured forms (Behrouz, Santacatterina, Zabih, NeurIPS 2024, arXiv 2406.04320); the
normalised companion column is that of SpaceTime (Zhang et al., ICLR 2023, arXiv 2303.09489).

Deviations: the paper recalls a companion form in selective mode as well; here it is for constant parameters only, as
the exponential of a companion matrix for every cell would cost S^3.

Legend: b batch, N variates, T steps, D channels, S states a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.fftconv import fft_length
from tsforge.ops.scan2d import Discretisation, Four, InputDisc, Pair, Scan2D, discrete_factors


class LTISystem2D(NamedTuple):
    """Discrete factors: a1, a2 (D, S) or matrices (D, S, S); a3, a4, b1, b2, c1, c2 (D, S); all real or all complex."""

    a1: Tensor
    a2: Tensor
    a3: Tensor
    a4: Tensor
    b1: Tensor
    b2: Tensor
    c1: Tensor
    c2: Tensor


def lti_system2d(
    dt: Pair,
    A: Four,
    B: Pair,
    C: Pair,
    *,
    discretisation: Discretisation = "exact",
    input_disc: InputDisc = "zoh",
) -> LTISystem2D:
    """Return the discrete system of constant steps dt, two (D,), and of A, B, C, each tensor (D, S)."""
    f = discrete_factors(dt, A, discretisation, input_disc)
    return LTISystem2D(f.a1, f.a2, f.a3, f.a4, f.b1 * B[0], f.b2 * B[1], C[0], C[1])


def companion(column: Tensor, size: float = 1.0) -> Tensor:
    """Return companion matrices (D, S, S): ones below the diagonal, and ``column`` (D, S) scaled to 1-norm ``size``.

    With size r <= 1 the matrix has no eigenvalue beyond r^(1/S): in the norm sum_i r^(i/S) |h_i| it shrinks every
    vector to r^(1/S) or less. A pair A1, A2 = s A with the same r is therefore stable in both axes if
    s r^(1/S) max|A3| < (1 - r^(1/S)) (1 - max|A4|); the caller keeps to it.

    Raises:
        ModelError: size outside (0, 1].
    """
    if not 0.0 < size <= 1.0:
        raise ModelError(f"the column of a companion matrix needs a 1-norm above 0 and up to 1, got {size}")
    tiny = torch.finfo(column.dtype).tiny
    scaled = column * (size / column.abs().sum(-1, keepdim=True).clamp_min(tiny))
    states = column.shape[-1]
    shift = torch.diag(column.new_ones(states - 1), -1)
    last = torch.zeros_like(shift[0])
    last[-1] = 1.0
    return shift + scaled.unsqueeze(-1) * last


def lti_kernel2d(system: LTISystem2D, variates: int, steps: int) -> Tensor:
    """Return the outputs (D, N, T) after an impulse of 1 at the first step of the first variate.

    One antidiagonal after another, along the shorter axis.

    Raises:
        ModelError: a grid without cells, or factors that do not fit each other.
    """
    if variates < 1 or steps < 1:
        raise ModelError(f"a grid needs at least one variate and one step, asked for {variates} by {steps}")
    _check_system(system)
    a1, a2, a3, a4, b1, b2, c1, c2 = system
    swapped = steps < variates
    first, last = min(variates, steps), max(variates, steps)
    pad = b1.new_zeros(first - 1, *b1.shape)
    h1, h2 = torch.cat([b1.unsqueeze(0), pad]), torch.cat([b2.unsqueeze(0), pad])  # cell of the shorter axis, D, S
    zero = b1.new_zeros(1, *b1.shape)
    outputs = []
    for k in range(first + last - 1):
        if k > 0:
            onward, across = _mix(a1, h1, a2, h2), _mix(a3, h1, a4, h2)
            if swapped:  # the shorter axis is time: what goes on along it moves to the next cell
                h1, h2 = torch.cat([zero, onward[:-1]]), across
            else:
                h1, h2 = onward, torch.cat([zero, across[:-1]])
        y = (c1 * h1 + c2 * h2).sum(-1)
        outputs.append(y.real if y.is_complex() else y)
    skewed = torch.stack(outputs)  # (K, cells of the shorter axis, D)
    cell = torch.arange(first, device=skewed.device)[:, None]
    grid = skewed[cell + torch.arange(last, device=skewed.device), cell]  # (shorter, longer, D)
    return grid.permute(2, 1, 0) if swapped else grid.permute(2, 0, 1)


def lti_scan2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the causal 2-D convolution of x (b, N, T, D) with a kernel (D, N, T) or larger, as (b, N, T, D).

    Both axes are padded to twice their length at least, so nothing wraps around.

    Raises:
        ModelError: the kernel has other channels, or covers fewer variates or steps than x.
    """
    variates, steps, channels = x.shape[1:]
    if kernel.shape[0] != channels or kernel.shape[1] < variates or kernel.shape[2] < steps:
        raise ModelError(
            f"the kernel of shape {tuple(kernel.shape)} does not cover {channels} channels, {variates} variates and "
            f"{steps} steps; make it with lti_kernel2d for this grid"
        )
    size = (fft_length(2 * variates - 1), fft_length(2 * steps - 1))
    spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2).contiguous(), s=size)
    spectrum = spectrum * torch.fft.rfft2(kernel[:, :variates, :steps], s=size)
    y: Tensor = torch.fft.irfft2(spectrum, s=size)[..., :variates, :steps]
    return y.permute(0, 2, 3, 1).contiguous()


def lti_step2d(system: LTISystem2D, x: Tensor, state: Pair, top: Pair | None = None) -> tuple[Tensor, Pair]:
    """Return outputs (b, N, D) and states of one more column x (b, N, D); state and result two (b, N, D, S).

    h1 is elementwise; h2 is a first-order recurrence along the variates with a constant factor, so a prefix scan needs
    only its powers. ``top``, two (b, D, S), are the states at v = -1 of this step, default 0.
    """
    a1, a2, a3, a4, b1, b2, c1, c2 = system
    u = x.unsqueeze(-1)
    h1 = _mix(a1, state[0], a2, state[1]) + b1 * u
    above = torch.zeros_like(h1[:, :1]) if top is None else top[0].unsqueeze(1)
    h2 = a3 * torch.cat([above, h1[:, :-1]], dim=1) + b2 * u
    if top is not None:
        h2 = torch.cat([h2[:, :1] + a4 * top[1].unsqueeze(1), h2[:, 1:]], dim=1)
    shift, factor = 1, a4
    while shift < x.shape[1]:
        h2 = torch.cat([h2[:, :shift], torch.addcmul(h2[:, shift:], factor, h2[:, :-shift])], dim=1)
        shift, factor = 2 * shift, factor * factor
    y = (c1 * h1 + c2 * h2).sum(-1)
    return (y.real if y.is_complex() else y), (h1, h2)


def lti_scan2d_reference(
    x: Tensor, system: LTISystem2D, *, left: Pair | None = None, top: Pair | None = None
) -> Scan2D:
    """Return outputs and last states of x (b, N, T, D), one cell after another (slow, obvious); states as in scan2d."""
    batch, variates, steps, channels = x.shape
    a1, a2, a3, a4, b1, b2, c1, c2 = system
    zero = b1.new_zeros(batch, channels, b1.shape[-1])
    h1: dict[tuple[int, int], Tensor] = {}
    h2: dict[tuple[int, int], Tensor] = {}
    for v in range(variates):
        h1[v, -1], h2[v, -1] = (zero, zero) if left is None else (left[0][:, v], left[1][:, v])
    for t in range(steps):
        h1[-1, t], h2[-1, t] = (zero, zero) if top is None else (top[0][:, t], top[1][:, t])
    rows = []
    for v in range(variates):
        outputs = []
        for t in range(steps):
            u = x[:, v, t].unsqueeze(-1)
            h1[v, t] = _mix(a1, h1[v, t - 1], a2, h2[v, t - 1]) + b1 * u
            h2[v, t] = a3 * h1[v - 1, t] + a4 * h2[v - 1, t] + b2 * u
            y = (c1 * h1[v, t] + c2 * h2[v, t]).sum(-1)
            outputs.append(y.real if y.is_complex() else y)
        rows.append(torch.stack(outputs, dim=1))
    ends = tuple(torch.stack([h[v, steps - 1] for v in range(variates)], dim=1) for h in (h1, h2))
    return Scan2D(torch.stack(rows, dim=1), ends)  # type: ignore[arg-type]


def _mix(first: Tensor, h1: Tensor, second: Tensor, h2: Tensor) -> Tensor:
    """Return first h1 + second h2 of states (..., D, S); factors (D, S) act elementwise, (D, S, S) as matrices."""
    if first.ndim == 2:
        return first * h1 + second * h2
    whole = torch.cat([first, second], dim=-1)  # (D, S, 2S)
    both = torch.cat([h1, h2], dim=-1)
    flat = both.reshape(-1, *both.shape[-2:]).transpose(0, 1)  # (D, rows, 2S)
    with torch.autocast(flat.device.type, enabled=False):  # states would grow coarse in half precision
        return torch.bmm(flat, whole.mT).transpose(0, 1).reshape(h1.shape)


def _check_system(system: LTISystem2D) -> None:
    """Refuse factors that do not fit each other."""
    lanes = system.b1.shape
    if len(lanes) != 2:
        raise ModelError(f"b1 of a 2-D system needs shape (D, S), got {tuple(lanes)}")
    square = (*lanes, lanes[1])
    mixing = square if system.a1.ndim == 3 else lanes
    for name, part in system._asdict().items():
        shape = mixing if name in ("a1", "a2") else lanes
        if part.shape != shape or part.dtype != system.b1.dtype:
            raise ModelError(
                f"{name} of a 2-D system needs shape {tuple(shape)} and {system.b1.dtype} here, "
                f"got {tuple(part.shape)}, {part.dtype}"
            )
