"""Jacobians of shallow PLRNN maps, and the estimates of their largest singular value that set the strength of adaptive
generalized teacher forcing: Hess, Monfared, Brenner, Durstewitz, ICML 2023, arXiv 2306.04406 (Propositions 1
and 2, Algorithm 1).

    J(z) = diag(A) + W1 diag(d) W2,    d = 1[W2 z + h2 > 0], for a clipped map less 1[W2 z > 0]
    alpha = max(0, 1 - 1 / kappa)

Fast forms: the mean of J over time needs only the mean of d; for small M the matrices J come from one product of d with
the outer products of W1 and W2, and their norms from repeated squares of J'J; for M > 16 power iterations go through
the factors and no J is built.

Deviations: the estimate ``explog`` (exp of the mean of matrix logarithms) is left out, as the logarithm of a Jacobian
may be complex. Norms from squares (M <= 8) and power iterations (M > 16) are lower bounds, on random maps within
1e-3 and 1e-2 of the singular value. States with missing entries are left out of the means.

Legend: G groups (models side by side), T steps, B batch, M latent units, H hidden units, N = T B points.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tsforge.core.errors import ModelError, nearest
from tsforge.ops.plrnn import Shallow

Estimator: TypeAlias = Literal["arithmetic_mean", "product_upper_bound", "batch_maximum", "jacobian_upper_bound"]

# Measured on one CPU core at N = 3200: squares beat torch.linalg.eigvalsh up to M = 8 or so, 3.5 times at M = 3.
_SQUARES_UP_TO = 8
_MATRICES_UP_TO = 16
_SQUARES = 8
_POWER_ITERATIONS = 20
_CACHED = 2**17  # entries of masks made at once on the CPU: larger ones leave its cache, measured up to 4 times slower


def jacobians(params: Shallow, z: Tensor, *, clipped: bool = False) -> Tensor:
    """Return J(z) (..., M, M) at states z (..., M), differentiable in A, W1 and W2.

    With parameters of G groups z is (G, ..., M). At a kink, where a hidden unit is exactly 0, its derivative is 0.

    Raises:
        ModelError: z does not fit the parameters.
    """
    _check(params, z, 1)
    A, W1, W2 = params[:3]
    grouped = A.ndim == 2
    points = z.reshape(A.shape[0], -1, z.shape[-1]) if grouped else z.reshape(-1, z.shape[-1])
    mask = _mask(params, points, clipped)
    if grouped:
        A, W1, W2 = A.unsqueeze(1), W1.unsqueeze(1), W2.unsqueeze(1)
    found = torch.diag_embed(A) + W1 @ (mask.unsqueeze(-1) * W2)
    return found.reshape(*z.shape, z.shape[-1])


@torch.no_grad()
def kappa(
    params: Shallow, states: Tensor, method: Estimator = "product_upper_bound", *, clipped: bool = False, every: int = 1
) -> Tensor:
    """Return an estimate of the largest singular value of the Jacobians at the forcing signals, without gradient.

    Shapes: states (T, B, M), result (); with parameters of G groups states (G, T, B, M), result (G,).

    Args:
        method: for one sequence ``arithmetic_mean`` is the norm of the mean Jacobian, ``product_upper_bound`` the
            geometric mean of the norms, ``batch_maximum`` the largest norm; kappa is the largest of the batch.
            ``jacobian_upper_bound`` is max |A| + |W1| |W2|, whatever the states. Norms are spectral.
        every: take only each ``every``-th step.

    A state with an entry that is not a number is left out; with no other state kappa is 0, which gives alpha = 0.

    Source: arXiv 2306.04406, section 4.

    Raises:
        ModelError: the method is unknown, every is below 1, or states do not fit the parameters.
    """
    choices = get_args(Estimator)
    if method not in choices:
        raise ModelError(
            f"the estimate of alpha is {method!r}; choose one of {', '.join(choices)}{nearest(method, choices)}"
        )
    if every < 1:
        raise ModelError(f"the estimate of alpha takes each every-th step, every is {every}; give 1 or more")
    grouped = params.A.ndim == 2
    _check(params, states, 3)
    maps = params if grouped else Shallow(*(part.unsqueeze(0) for part in params))
    states = (states if grouped else states.unsqueeze(0))[:, ::every]
    if method == "jacobian_upper_bound":
        found = maps.A.abs().amax(-1) + _norm(maps.W1) * _norm(maps.W2)
    elif method == "arithmetic_mean":
        found = _mean_norms(maps, states, clipped)[0].amax(-1)
    else:
        groups, steps, batch = states.shape[:3]
        norms = _point_norms(maps, states, clipped).view(groups, steps, batch)
        seen = states.isfinite().all(-1)
        if method == "batch_maximum":
            found = torch.where(seen, norms, 0.0).amax((1, 2))
        else:
            logs = torch.where(seen, norms.log(), 0.0).sum(1)
            count = seen.sum(1)
            found = torch.where(count > 0, (logs / count.clamp(min=1)).exp(), 0.0).amax(-1)
    return found if grouped else found.squeeze(0)


def _mask(params: Shallow, points: Tensor, clipped: bool) -> Tensor:
    """Return d (..., N, H) at points (..., N, M)."""
    drive = points @ params.W2.detach().mT
    mask = drive > -params.h2.detach().unsqueeze(-2)  # the same as W2 z + h2 > 0, without a pass for the sum
    if clipped:
        return (mask.view(torch.int8) - (drive > 0).view(torch.int8)).to(drive.dtype)
    return mask.to(drive.dtype)


def _parts(states: Tensor, params: Shallow) -> list[Tensor]:
    """Return states (G, T, B, .) cut along T so that the masks of a part fit the cache."""
    groups, steps, batch = states.shape[:3]
    size = steps if states.is_cuda else max(1, _CACHED // (groups * batch * params.h2.shape[-1]))
    return [states[:, first : first + size] for first in range(0, steps, size)]


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return norm


def _mean_norms(params: Shallow, states: Tensor, clipped: bool) -> tuple[Tensor, Tensor]:
    """Return the norm of the mean Jacobian of each sequence (G, B) and its right singular vector (G, B, M)."""
    groups, batch = states.shape[0], states.shape[2]
    seen = states.isfinite().all(-1, keepdim=True).to(states.dtype)
    total = states.new_zeros(groups, batch, params.h2.shape[-1])
    for part, known in zip(_parts(states, params), _parts(seen, params), strict=True):
        mask = _mask(params, part.flatten(1, 2), clipped).view(groups, -1, batch, total.shape[-1])
        total += mask.mul_(known).sum(1)
    count = seen.sum(1)
    mean = total / count.clamp(min=1.0)
    A, W1, W2 = (part.unsqueeze(1) for part in params[:3])
    squares, vectors = torch.linalg.eigh(_gram(torch.diag_embed(A) + W1 @ (mean.unsqueeze(-1) * W2)))
    norms = squares[..., -1].clamp(min=0.0).sqrt()
    return torch.where(count[..., 0] > 0, norms, 0.0), vectors[..., -1]


def _gram(matrix: Tensor) -> Tensor:
    return matrix.mT @ matrix


def _point_norms(params: Shallow, states: Tensor, clipped: bool) -> Tensor:
    """Return the norm of the Jacobian at every state, (G, N) for states (G, T, B, M)."""
    latent = states.shape[-1]
    if latent > _MATRICES_UP_TO:
        start = _mean_norms(params, states, clipped)[1]
        mask = _mask(params, states.flatten(1, 2), clipped)
        return _power_norms(params, mask, start.repeat(1, states.shape[1], 1))
    A, W1, W2 = params[:3]
    outer = (W1.mT.unsqueeze(3) * W2.unsqueeze(2)).flatten(2)  # (G, H, M M)
    diagonal = torch.diag_embed(A).flatten(1).unsqueeze(1)
    masks = (_mask(params, part.flatten(1, 2), clipped) for part in _parts(states, params))
    if latent <= _SQUARES_UP_TO:
        lanes = torch.cat([torch.baddbmm(diagonal.mT, outer.mT, mask.mT) for mask in masks], dim=-1)  # (G, M M, N)
        return torch.stack([_lane_norms(group.view(latent, latent, -1)) for group in lanes])
    built = torch.cat([torch.baddbmm(diagonal, mask, outer) for mask in masks], dim=1)
    squares: Tensor = torch.linalg.eigvalsh(_gram(built.view(*built.shape[:2], latent, latent)))
    return squares[..., -1].clamp(min=0.0).sqrt()


def _lane_norms(J: Tensor) -> Tensor:
    """Return the norms (N,) of matrices J (M, M, N), points last: a product is M operations over long rows.

    The largest column of (J'J)^(2^8) is nearly the right singular vector of the largest singular value.
    """
    power = _lane_gram(J)
    for _ in range(_SQUARES):
        trace = power.diagonal().sum(-1).clamp_(min=torch.finfo(J.dtype).tiny)
        power = _lane_gram(power.mul_(trace.reciprocal_()))
    # torch is slow at argmax along a strided axis and at norms along the first one
    column = power.diagonal().contiguous().argmax(-1)  # (N,)
    vector = power.gather(0, column.expand(1, len(J), -1))[0]
    image = (J * vector).sum(1)
    length = (vector * vector).sum(0).clamp_(min=torch.finfo(J.dtype).tiny)  # of a matrix of zeros both are 0
    return ((image * image).sum(0) / length).sqrt()


def _lane_gram(J: Tensor) -> Tensor:
    """Return J'J (M, M, N); the square of a symmetric J."""
    gram = J[0].unsqueeze(1) * J[0].unsqueeze(0)
    for row in J[1:]:
        gram.addcmul_(row.unsqueeze(1), row.unsqueeze(0))
    return gram


def _power_norms(params: Shallow, mask: Tensor, vector: Tensor) -> Tensor:
    """Return the norms (G, N) at masks (G, N, H) by power iterations through the factors from vectors (G, N, M)."""
    A, W1, W2 = params.A.unsqueeze(1), params.W1, params.W2
    tiny = torch.finfo(mask.dtype).tiny
    norms = mask.new_zeros(mask.shape[:2])
    for _ in range(_POWER_ITERATIONS):
        image = A * vector + (mask * (vector @ W2.mT)) @ W1.mT
        norms = image.norm(dim=-1)
        vector = A * image + (mask * (image @ W1)) @ W2
        vector = vector / vector.norm(dim=-1, keepdim=True).clamp_(min=tiny)
    return norms


def _check(params: Shallow, z: Tensor, axes: int) -> None:
    lead = params.A.shape[:-1]
    axes += len(lead)
    fits = z.ndim >= axes if axes <= 2 else z.ndim == axes
    if not fits or z.shape[-1] != params.A.shape[-1] or z.shape[: len(lead)] != lead or 0 in z.shape:
        raise ModelError(
            f"states for the Jacobians of a PLRNN need {axes} axes, groups {tuple(lead)} first and "
            f"{params.A.shape[-1]} latent units last, none empty; got {tuple(z.shape)}"
        )
    if z.dtype != params.A.dtype or z.device != params.A.device:
        raise ModelError(
            f"states for the Jacobians of a PLRNN are {z.dtype} on {z.device}, its parameters {params.A.dtype} on "
            f"{params.A.device}; cast the states"
        )
