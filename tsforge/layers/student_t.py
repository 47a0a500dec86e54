"""Student-t tail and quantile functions in plain torch: torch ships no incomplete beta function.

Legend: v degrees of freedom, t standardised value, I_x(a, b) regularised incomplete beta function.
Sources: continued fraction of I_x(a, b), DLMF 8.17.22, evaluated by the modified Lentz algorithm; start value of the
quantile, G. W. Hill (1970), "Algorithm 396: Student's t-quantiles", CACM 13(10).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_TINY = 1e-300
_MAX_TERMS = 500


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Return the continued fraction of I_x(a, b); converges fast for x < (a + 1) / (a + b + 2)."""
    c = torch.ones_like(x)
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / torch.where(d.abs() < _TINY, _TINY, d)
    value = d
    for m in range(1, _MAX_TERMS + 1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            d = 1 / torch.where(d.abs() < _TINY, _TINY, d)
            c = 1 + term / c
            c = torch.where(c.abs() < _TINY, _TINY, c)
            step = c * d
            value = value * step
        if bool(((step - 1).abs() < 1e-13).all()):
            break
    return value


def log_two_sided(t: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log P(|T| > |t|) = log I_x(v/2, 1/2) with x = v / (v + t^2); finite far beyond the reach of 1 - cdf."""
    t, v = t.double(), v.double()
    a, b = v / 2, torch.full_like(v, 0.5)
    square = t.square()
    log_x, log_rest = -torch.log1p(square / v), torch.log(square / (v + square))
    x = torch.exp(log_x)
    front = a * log_x + b * log_rest - _log_beta(a, b)
    direct = x < (a + 1) / (a + b + 2)
    tail = front + torch.log(_fraction(a, b, torch.where(direct, x, 0.5 * (a + 1) / (a + b + 2)))) - torch.log(a)
    swapped = torch.where(direct, 0.0, 1 - x)
    centre = torch.exp(torch.where(direct, -torch.inf, front)) * _fraction(b, a, swapped) / b
    return torch.where(direct, tail, torch.log1p(-centre.clamp(max=1.0)))


def cdf(t: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return P(T <= t) in float64."""
    half = 0.5 * torch.exp(log_two_sided(t, v))
    return torch.where(t > 0, 1 - half, half)


def _start(p: Tensor, v: Tensor) -> Tensor:
    """Return Hill's approximation of the positive t with P(|T| > t) = p, for v > 2."""
    a = 1 / (v - 0.5)
    b = 48 / a.square()
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * torch.sqrt(a * (math.pi / 2)) * v
    y = (d * p) ** (2 / v)
    # body: a Cornish-Fisher correction of the Normal quantile
    x = torch.special.ndtri((p / 2).clamp(min=_TINY))
    c_body = torch.where(v < 5, c + 0.3 * (v - 4.5) * (x + 0.6), c)
    c_body = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c_body
    square = x.square()
    body = (((((0.4 * square + 6.3) * square + 36) * square + 94.5) / c_body - square - 3) / b + 1) * x
    body = torch.expm1(a * body.square())
    # far tail: a power series in (d p)^(2/v)
    tail = ((1 / (((v + 6) / (v * y) - 0.089 * d - 0.822) * (v + 2) * 3) + 0.5 / (v + 4)) * y - 1) * (v + 1) / (
        v + 2
    ) + 1 / y
    return torch.sqrt(v * torch.where(y > 0.05 + a, body, tail).clamp(min=0.0))


def quantile(p: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return t with P(T <= t) = p in float64, for v > 2: Hill's start, then Newton steps on the log tail."""
    p, v = p.double(), v.double()
    two_sided = 2 * torch.minimum(p, 1 - p)
    log_goal = torch.log(two_sided)
    t = _start(two_sided, v).clamp(min=1e-12)
    log_norm = torch.lgamma((v + 1) / 2) - torch.lgamma(v / 2) - 0.5 * torch.log(math.pi * v)
    for _ in range(3):
        log_tail = log_two_sided(t, v)
        log_density = log_norm - (v + 1) / 2 * torch.log1p(t.square() / v)
        slope = 2 * torch.exp(log_density - log_tail)  # - d log_tail / dt
        t = (t + (log_tail - log_goal) / slope).clamp(min=0.0)
    t = torch.where(two_sided == 1, 0.0, t)
    return torch.where(p < 0.5, -t, t)
