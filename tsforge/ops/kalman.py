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
    missing = ~mask
    counts = missing.sum(1)
    pull = clean @ precision  # [R, L]; at a gap: the pull of the observed values on it
    order = torch.argsort(missing.to(torch.int8), dim=1, descending=True, stable=True)  # gaps first
    rows = torch.nonzero(counts).flatten()
    rows = rows[torch.argsort(counts[rows])]  # similar sizes together
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * int(counts[rows[stop]]) ** 2 <= _MAX_SOLVE_ENTRIES:
            stop += 1
        block = rows[start:stop]
        width = int(counts[block].max())
        place = order[block, :width]  # [R', width]
        real = torch.arange(width, device=place.device) < counts[block, None]
        inner = precision[place[:, :, None], place[:, None, :]]
        inner = torch.where(real[:, :, None] & real[:, None, :], inner, 0.0)
        inner = inner + torch.diag_embed((~real).to(torch.float64))
        right = torch.where(real, -pull[block[:, None], place], 0.0)
        factor, info = torch.linalg.cholesky_ex(inner)
        if bool((info == 0).all()):
            solved = torch.cholesky_solve(right[..., None], factor)[..., 0]
        else:  # a root within rounding of the unit circle
            solved = torch.linalg.solve(inner, right)
        clean[block[:, None].expand_as(place)[real], place[real]] = solved[real]
        start = stop
    return clean.to(values.dtype)
