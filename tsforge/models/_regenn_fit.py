"""What ReGENN takes from the training span before its first gradient step: the graph and the autoregressive path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.layers.regenn import co_occurrence, window_counts
from tsforge.models._ar_windows import training_windows

if TYPE_CHECKING:
    from tsforge.models.regenn import ReGENN

_MOST_WINDOWS = 200_000  # of the least squares, a repeatable random choice beyond
_RIDGE = 1e-9  # of the mean power: the anchored last value is 0 in every window


def count_graph(data: TrainingSeries, *, presence: str, by_windows: bool, sizes: tuple[int, int]) -> Tensor:
    """Return the co-occurrence graph [V, V] of a span in data units, its largest entry 1 (all 0 if nothing occurs).

    Args:
        presence: ``observed`` cells are present, or only those that are ``positive``.
        by_windows: count a row once for every training window that shows it.
        sizes: context length and horizon of the windows.
    """
    values = torch.where(data.mask, data.values.double(), 0.0)
    floor = torch.where(data.mask, values, torch.inf).amin(0)
    mass = torch.where(data.mask, values - torch.where(floor.isfinite(), floor, 0.0), 0.0)
    peak = mass.amax(0)
    mass = mass / torch.where(peak > 0, peak, 1.0)
    present = data.mask if presence == "observed" else data.mask & (values > 0)
    weight = window_counts(data.indptr, *sizes).to(mass) if by_windows else None
    graph = co_occurrence(mass, present, weight)
    largest = graph.abs().max()
    return graph / largest if bool(largest > 0) else graph


def drift_weights(length: int, horizon: int) -> Tensor:
    """Return weights [L, H] that continue the line through the first and the last value of a window."""
    weights = torch.zeros(length, horizon, dtype=torch.float64)
    weights[-1] = 1.0
    if length > 1:
        slope = torch.arange(1, horizon + 1, dtype=torch.float64) / (length - 1)
        weights[-1] += slope
        weights[0] -= slope
    return weights


def least_squares_weights(model: ReGENN, data: TrainingSeries) -> tuple[Tensor, Tensor]:
    """Return weights [L, H] and bias [H] that all variates share, by least squares in the units of ``data``.

    The bias is 0 where the model has none.

    Raises:
        ModelError: fewer complete targets than weights.
    """
    length, horizon = model.spec.context_length, model.spec.horizon
    width = length + int(model.config.bias)
    power = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, horizon, dtype=torch.float64)
    rows = 0
    for batch in training_windows(data, model.spec, max_windows=_MOST_WINDOWS):
        x, y, unit = _rows(model, batch)
        design = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)[:, :width] * unit
        power += design.T @ design
        cross += design.T @ (y * unit)
        rows += len(x)
    if rows <= length:
        raise ModelError(
            f"model.ar_init=ols found {rows} windows of a variate with a complete target of {horizon} steps, and needs "
            f"more than {length}; bring more data or use ar_init=drift"
        )
    ridge = _RIDGE * power.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    found = torch.linalg.solve(power + ridge, cross)
    return found[:length], found[length:].sum(0)


def _rows(model: ReGENN, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs [N, L] and targets [N, H] in the model's own units and what such a unit is worth [N, 1]."""
    target, target_mask = batch.target, batch.target_mask
    if target is None or target_mask is None:
        raise ModelError("least squares need windows with a target")
    wide = (part.double() if isinstance(part, Tensor) and part.is_floating_point() else part for part in batch)
    inputs = Batch._make(wide)
    seen = model.normalise(inputs)
    own = (target.double() - seen.loc) / seen.scale if model.anchors else model.transform(target.double())
    whole = (target_mask.all(1) & batch.context_mask.any(1)).reshape(-1)  # [B V]
    x, y = (part.transpose(1, 2).flatten(0, 1)[whole] for part in (seen.x, own))
    return x, y, seen.scale.transpose(1, 2).reshape(-1, 1)[whole]
