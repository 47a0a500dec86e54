"""Exact prediction of a stationary autoregression from values with gaps.

The conditional expectation that a Kalman filter gives, as a batched solve with the inverse covariance of L consecutive
values, which has a closed form in the coefficients. Values are deviations from the process mean; no row after the L is
ever looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsforge.core.errors import ModelError

_MAX_SOLVE_ENTRIES = 20_000_000  # float64 values of one block of batched solves, 160 MB
_SOUND = 1e-6  # largest entry by which an inverse times its matrix may differ from the unit matrix


def _lower_toeplitz(column: Tensor) -> Tensor:
    size = column.numel()
    place = torch.arange(size, device=column.device)
    shift = place[:, None] - place[None, :]
    return torch.where(shift >= 0, column[shift.clamp(min=0)], column.new_zeros(()))


def precision_matrix(weight: Tensor, length: int) -> Tensor:
    """Return the inverse covariance [length, length] of consecutive values of a stationary AR, for unit noise variance.

    Coefficients beyond ``length`` lags cannot be used and must be absent.

    Source:
        Gohberg and Semencul (1972) for the autoregressive case: ``A A' - B B'`` with lower-triangular Toeplitz A of
        (1, -w_1, .., -w_p, 0, ..) and B of (0, .., 0, -w_p, .., -w_1), both of ``length`` entries.

    Raises:
        ModelError: more lags than ``length``.
    """
    order = weight.numel()
    if order > length:
        raise ModelError(f"an autoregression of {order} lags needs a context of at least {order} rows, not {length}")
    filter_ = torch.cat([weight.new_ones(1), -weight, weight.new_zeros(length)])[: length + 1]
    first = _lower_toeplitz(filter_[:length])
    second = _lower_toeplitz(filter_[1:].flip(0))
    return first @ first.T - second @ second.T


def conditional_fill(precision: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return ``values`` [R, L] with every gap replaced by its expectation given the observed values of the same row.

    Feeding the result to any linear forecaster of the process gives its exact conditional forecast, because the
    expectation of a linear function is the function of the expectation.

    Args:
        precision: [L, L] inverse covariance of a row up to a factor, from ``precision_matrix``.
        values: deviations from the mean, anything where not observed.
        mask: [R, L] bool.
    """
    clean = torch.where(mask, values.to(torch.float64), 0.0)
    if bool(mask.all()):
        return clean.to(values.dtype)
    counts = (~mask).sum(1)
    length = float(mask.shape[1])
    sparse = 2 * counts > length  # more gaps than values: the smaller system is that of the values
    gaps = counts[sparse].double()
    if float((gaps**3 - (length - gaps) ** 3).sum()) > 3.0 * length**3:  # what it saves pays for the covariance
        covariance = _covariance(precision)
        if covariance is not None:
            rows = torch.nonzero(sparse).flatten()
            weights = _solve_at(covariance, clean[rows], mask[rows])
            clean[rows] = torch.where(mask[rows], clean[rows], weights @ covariance)
            counts = torch.where(sparse, 0, counts)
    rows = torch.nonzero(counts).flatten()
    if len(rows):
        pull = clean[rows] @ precision  # at a gap: the pull of the observed values on it
        clean[rows] += _solve_at(precision, -pull, ~mask[rows])
    return clean.to(values.dtype)


def _covariance(precision: Tensor) -> Tensor | None:
    """Return the inverse of a precision matrix, None where a root near the unit circle spoils it."""
    found, info = torch.linalg.inv_ex(precision)
    if bool(info) or not bool(torch.isfinite(found).all()):
        return None
    product = precision @ found
    product.diagonal().sub_(1.0)
    return (found + found.T) / 2 if bool(product.abs().max() < _SOUND) else None


def _solve_at(matrix: Tensor, right: Tensor, where: Tensor) -> Tensor:
    """Return x [R, L], 0 outside ``where`` [R, L], with ``(matrix x)[where] = right[where]`` row by row."""
    found = torch.zeros_like(right)
    counts = where.sum(1)
    order = torch.argsort(where.to(torch.int8), dim=1, descending=True, stable=True)  # these first
    rows = torch.nonzero(counts).flatten()
    rows = rows[torch.argsort(counts[rows])]  # similar sizes together
    sizes = counts[rows].tolist()
    start = 0
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes) and (stop + 1 - start) * sizes[stop] ** 2 <= _MAX_SOLVE_ENTRIES:
            stop += 1
        block, width = rows[start:stop], sizes[stop - 1]
        place = order[block, :width]  # [R', width]
        real = torch.arange(width, device=place.device) < counts[block, None]
        inner = matrix[place[:, :, None], place[:, None, :]]
        inner = torch.where(real[:, :, None] & real[:, None, :], inner, 0.0)
        inner = inner + torch.diag_embed((~real).to(torch.float64))
        side = torch.where(real, right[block[:, None], place], 0.0)
        factor, info = torch.linalg.cholesky_ex(inner)
        if bool((info == 0).all()):
            solved = torch.cholesky_solve(side[..., None], factor)[..., 0]
        else:  # a root within rounding of the unit circle
            solved = torch.linalg.solve(inner, side)
        found[block[:, None].expand_as(place)[real], place[real]] = solved[real]
        start = stop
    return found
