"""What a fitted autoregression does over time: companion form, roots, impulse response, exact multi-step weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.ops.toeplitz import weights_to_pacf

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Root:
    """One root of the characteristic polynomial (an eigenvalue of the companion matrix).

    Attributes:
        real, imaginary: of the root; a conjugate pair appears once, with positive imaginary part.
        modulus: below 1 the mode dies out, above 1 it explodes.
        cycle_length: steps of one turn, infinite for a positive real root, 2 for a negative one.
        half_life: steps until the mode has halved, infinite at or beyond the unit circle.
    """

    real: float
    imaginary: float
    modulus: float
    cycle_length: float
    half_life: float


def companion(weight: Array) -> Array:
    """Return the companion matrix [p, p]: it maps (y_{t-1}, ..., y_{t-p}) to (y_t, ..., y_{t-p+1})."""
    order = len(weight)
    matrix = np.eye(order, k=-1)
    if order:
        matrix[0] = weight
    return matrix


def roots(weight: Array) -> list[Root]:
    """Return the roots of ``z^p - w_1 z^(p-1) - ... - w_p`` by falling modulus; trailing zeros add none."""
    used = np.trim_zeros(np.asarray(weight, dtype=np.float64), "b")
    values = np.linalg.eigvals(companion(used)) if len(used) else np.zeros(0)
    found = []
    for value in values[values.imag >= 0]:
        modulus, angle = float(abs(value)), float(abs(np.angle(value)))
        cycle = 2.0 * np.pi / angle if angle > 1e-12 else np.inf
        half = np.log(0.5) / np.log(modulus) if 0.0 < modulus < 1.0 else (0.0 if modulus == 0.0 else np.inf)
        found.append(Root(float(value.real), float(value.imag), modulus, float(cycle), float(half)))
    return sorted(found, key=lambda root: -root.modulus)


def is_stationary(weight: Array) -> bool:
    """Return whether every root lies inside the unit circle, in O(p^2) and without computing roots."""
    return bool(np.all(np.abs(np.nan_to_num(weights_to_pacf(weight), nan=2.0)) < 1.0))


def multi_step_weights(weight: Tensor, horizon: int) -> Tensor:
    """Return the weights of the recursive forecast of each step on the last p values, [..., horizon, p].

    Row h is the first row of the h-th power of the companion matrix C. From ``c_{h+1} = c_h C`` follows
    ``c_{h+1}[j] = c_h[0] w[j] + c_h[j + 1]``, so each step costs O(p) and gradients flow to ``weight`` [..., p].
    """
    rows, current = [], torch.zeros_like(weight)
    if weight.shape[-1]:
        current = torch.cat([torch.ones_like(weight[..., :1]), current[..., 1:]], dim=-1)
    for _ in range(horizon):
        shifted = torch.cat([current[..., 1:], torch.zeros_like(current[..., :1])], dim=-1)
        current = current[..., :1] * weight + shifted
        rows.append(current)
    return torch.stack(rows, dim=-2)


def impulse_response(weight: Tensor, length: int) -> Tensor:
    """Return psi_0 .. psi_{length-1}, the response to one unit shock, [..., length]."""
    one = torch.ones_like(weight[..., :1]) if weight.shape[-1] else weight.new_ones(*weight.shape[:-1], 1)
    if length == 1 or not weight.shape[-1]:
        return torch.cat([one, one.new_zeros(*one.shape[:-1], length - 1)], dim=-1)
    return torch.cat([one, multi_step_weights(weight, length - 1)[..., 0]], dim=-1)


def forecast_scale(weight: Tensor, noise_scale: Tensor, horizon: int) -> Tensor:
    """Return the standard deviation of the forecast error of each step, [..., horizon].

    ``noise_scale`` [...] is the one-step standard deviation; the variance of step h is its square times the sum of
    squares of psi_0 .. psi_{h-1}.
    """
    return noise_scale[..., None] * impulse_response(weight, horizon).square().cumsum(-1).sqrt()
