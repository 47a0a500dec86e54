"""From a continuous state space to steps: generalised bilinear transform and zero-order hold, dense and diagonal.

``x' = A x + B u`` becomes ``x_k = A_bar x_{k-1} + B_bar u_k``. Formally u_k is the mean of the input over the step;
with the sample at its end instead, every rule here is only of first order in the step.

Everything is differentiable, broadcasts over leading axes and keeps the dtype of its inputs. Cast to float64 *before*
calling (``dt.double()``), not after: the product ``dt * A`` is where float32 loses the slow modes. Complex numbers are
pairs of real tensors because TorchInductor does not compile complex operators.

Sources: A. Gu et al. (arXiv 2110.13985), section 2 and appendix C.1.3 for the bilinear family; A. Gu et al., "On the
parameterization and initialization of diagonal state space models" (arXiv 2206.11893) for the diagonal rules.
Deviations: ``exp(z) - 1`` is formed without cancellation, and the slope of its quotient by z comes from a series
near 0.

Legend: N state size, dt step in the time unit of A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.once import first_derivative_only

_SERIES_BELOW = 1e-2  # |z| under which the slope of (e^z - 1) / z is summed: the quotient loses eps / |z|
_SERIES_TERMS = 7  # the first one left out is 8 _SERIES_BELOW^7 / 9! = 2e-19


def gbt(A: Tensor, B: Tensor, dt: Tensor, alpha: float = 0.5, lower_triangular: bool = False) -> tuple[Tensor, Tensor]:
    """Return the step by the generalised bilinear transform.

    ``A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A)`` and ``B_bar = (I - alpha dt A)^-1 dt B``, by one solve.
    alpha 0 is the explicit, 1 the implicit Euler rule, 1/2 the bilinear (Tustin) rule.

    Args:
        A: [..., N, N].
        B: [..., N].
        dt: [...].
        alpha: weight of the new state, in [0, 1].
        lower_triangular: A has nothing above its diagonal (legs, lagt), so the solve may be a substitution. Whatever
            is there would be ignored in the solve without notice.

    Returns:
        A_bar [..., N, N] and B_bar [..., N] with the broadcast leading axes of all three.

    Raises:
        ModelError: alpha outside [0, 1]; alpha below 1/2 with ``(1 - 2 alpha) dt max|A_nn| >= 2``, where a decaying
            real mode of a triangular A would stop decaying (for a full A this is a necessary sign, not a proof); or
            ``I - alpha dt A`` is singular.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ModelError(f"alpha {alpha} of the bilinear transform must lie in [0, 1]; 0.5 keeps stability")
    if alpha < 0.5:
        _check_explicit_step(A, dt, alpha)
    step = dt[..., None, None]
    scaled, gain = step * A, step * B[..., :, None]  # [..., N, N], [..., N, 1]
    batch = torch.broadcast_shapes(scaled.shape[:-2], gain.shape[:-2])  # type: ignore[no-untyped-call]
    identity = torch.eye(A.shape[-1], dtype=scaled.dtype, device=scaled.device)
    explicit = identity + (1.0 - alpha) * scaled
    right = torch.cat([explicit.expand(*batch, -1, -1), gain.expand(*batch, -1, -1)], dim=-1)  # [..., N, N + 1]
    stepped = _solve(identity - alpha * scaled, right, lower_triangular) if alpha > 0.0 else right
    return stepped[..., :-1], stepped[..., -1]


def _check_explicit_step(A: Tensor, dt: Tensor, alpha: float) -> None:
    """Raise when a rule that leans on the old state would amplify the fastest mode."""
    fastest = A.detach().diagonal(dim1=-2, dim2=-1).abs().amax(dim=-1)
    load = (1.0 - 2.0 * alpha) * dt.detach().abs() * fastest
    if bool((load >= 2.0).any()):
        raise ModelError(
            f"alpha {alpha} is unstable for {int((load >= 2.0).sum())} of {load.numel()} steps: "
            f"(1 - 2 alpha) dt max|A_nn| is {float(load.max()):.3g}, not below 2; use alpha 0.5 or a smaller step"
        )


def _solve(left: Tensor, right: Tensor, lower_triangular: bool) -> Tensor:
    """Return ``left^-1 right``; a singular matrix is an error of the model."""
    if lower_triangular:
        solution: Tensor = torch.linalg.solve_triangular(left.expand(*right.shape[:-1], -1), right, upper=False)
        return solution
    try:
        solution = torch.linalg.solve(left, right)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ModelError(
            "I - alpha dt A is singular: A has an eigenvalue 1 / (alpha dt), so it grows; keep A stable or shorten dt"
        ) from error
    return solution


def zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step for an input held constant: ``exp(dt A)`` and ``(integral_0^dt exp(s A) ds) B``.

    Both are blocks of one exponential, ``exp(dt [[A, B], [0, 0]])``, so A may be singular.

    Args:
        A: [..., N, N].
        B: [..., N].
        dt: [...].

    Returns:
        A_bar [..., N, N] and B_bar [..., N] with the broadcast leading axes of all three.
    """
    step = dt[..., None, None]
    scaled, gain = step * A, step * B[..., :, None]
    batch = torch.broadcast_shapes(scaled.shape[:-2], gain.shape[:-2])  # type: ignore[no-untyped-call]
    upper = torch.cat([scaled.expand(*batch, -1, -1), gain.expand(*batch, -1, -1)], dim=-1)  # [..., N, N + 1]
    augmented = torch.nn.functional.pad(upper, (0, 0, 0, 1))
    # A lone matrix of small norm goes through a polynomial with a wrong coefficient (pytorch issue 196592: 1e-11 off in
    # float64, 1e-5 in float32); a pair does not.
    pair = augmented.expand(2, *augmented.shape)
    power = torch.linalg.matrix_exp(pair)[0] if math.prod(batch) == 1 else torch.linalg.matrix_exp(augmented)
    return power[..., :-1, :-1], power[..., :-1, -1]


def expm1_complex(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary part of ``exp(re + i im) - 1``, without cancellation near 0.

    ``Re = expm1(re) cos(im) - 2 sin^2(im / 2)``, ``Im = exp(re) sin(im)``. Shapes broadcast.
    """
    half = torch.sin(0.5 * im)
    return torch.expm1(re) * torch.cos(im) - 2.0 * half * half, torch.exp(re) * torch.sin(im)


def zoh_diagonal(re: Tensor, im: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input gain ``(exp(dt lambda) - 1) / lambda`` of held inputs, for ``lambda = re + i im``.

    It tends to dt as lambda tends to 0, and so do its gradients. The step itself is ``exp(dt lambda)``.

    Args:
        re: real parts, any shape.
        im: imaginary parts, broadcast against re.
        dt: steps, broadcast against re (a caller with one step per feature passes ``dt[..., None]``).

    Returns:
        Real and imaginary part, of the broadcast shape; differentiable once.
    """
    gain: tuple[Tensor, Tensor] = _HeldGain.apply(re, im, dt)  # type: ignore[no-untyped-call]
    return gain


class _HeldGain(torch.autograd.Function):
    """dt f(dt lambda) with f(z) = (e^z - 1) / z; by hand, because autograd would divide by z twice, and in ten times as
    many small kernels, which is what a GPU would spend its time on.
    """

    @staticmethod
    def forward(ctx: Any, re: Tensor, im: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.complex(*torch.broadcast_tensors(dt * re, dt * im))  # type: ignore[no-untyped-call]
        less = torch.complex(*expm1_complex(z.real, z.imag))
        ratio = torch.where(z == 0, 1.0, less / z)
        ctx.save_for_backward(z, less, ratio, dt)
        ctx.shapes = (re.shape, im.shape)
        gain = dt * ratio
        return gain.real, gain.imag

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, less, ratio, dt = ctx.saved_tensors
        grad = torch.complex(*grads)
        slope = torch.where(z.abs() < _SERIES_BELOW, _gain_slope_series(z), (less + 1.0 - ratio) / z)  # f'(z)
        by_lambda = grad * (dt * dt * slope).conj()
        by_dt = (grad * (less + 1.0).conj()).real
        shapes = ctx.shapes
        return by_lambda.real.sum_to_size(shapes[0]), by_lambda.imag.sum_to_size(shapes[1]), by_dt.sum_to_size(dt.shape)


def _gain_slope_series(z: Tensor) -> Tensor:
    """Return the derivative of ``(e^z - 1) / z``, ``sum_k (k + 1) z^k / (k + 2)!``, for small z by Horner's rule."""
    total = torch.full_like(z, _SERIES_TERMS / math.factorial(_SERIES_TERMS + 1))
    for k in range(_SERIES_TERMS - 1, 0, -1):
        total = total * z + k / math.factorial(k + 1)
    return total


def bilinear_diagonal(re: Tensor, im: Tensor, dt: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return step and input gain by the bilinear rule for ``lambda = re + i im``.

    With ``w = dt lambda / 2`` they are ``(1 + w) / (1 - w)`` and ``dt / (1 - w)``.

    Args:
        re: real parts, not positive; any shape.
        im: imaginary parts, broadcast against re.
        dt: steps, broadcast against re.

    Returns:
        (A_bar real, imaginary), (gain real, imaginary), of the broadcast shape.
    """
    w_re, w_im = 0.5 * dt * re, 0.5 * dt * im
    rest = 1.0 - w_re
    square = rest * rest + w_im * w_im
    step = ((1.0 - w_re * w_re - w_im * w_im) / square, 2.0 * w_im / square)
    return step, (dt * rest / square, dt * w_im / square)
