"""Windows cut from a training span, for residual scales and for fits that need explicit windows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.model import ForecastModel
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries

_BLOCK_VALUES = 8_000_000  # context and target values gathered at once, 32 MB in float32


def series_bounds(data: TrainingSeries) -> list[int]:
    """Return the row where each series starts, plus the end of the last one."""
    return [int(row) for row in data.indptr.tolist()]


def training_windows(data: TrainingSeries, spec: DataSpec, *, max_windows: int | None = None) -> Iterator[Batch]:
    """Yield batches of windows that lie inside one series each, a repeatable random choice if there are too many.

    A random choice rather than every k-th window: a fixed step would see only some phases of a season.
    """
    length, horizon = spec.context_length, spec.horizon
    bounds = series_bounds(data)
    origins = [np.arange(first + length, last - horizon + 1) for first, last in pairwise(bounds)]
    series = np.repeat(np.arange(len(origins)), [len(part) for part in origins])
    rows = np.concatenate(origins) if origins else np.zeros(0, dtype=np.int64)
    if max_windows is not None and len(rows) > max_windows:
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), max_windows, replace=False))
        rows, series = rows[chosen], series[chosen]
    size = max(_BLOCK_VALUES // ((length + horizon) * max(spec.num_variates, 1)), 1)
    for start in range(0, len(rows), size):
        yield _gather(data, spec, torch.from_numpy(rows[start : start + size]), series[start : start + size])


def _gather(data: TrainingSeries, spec: DataSpec, origin: Tensor, series: np.ndarray[Any, Any]) -> Batch:
    device = data.values.device
    span = torch.arange(-spec.context_length, spec.horizon)
    place = (origin[:, None] + span).to(device)  # [B, L + H]
    past, future = place[:, : spec.context_length], place[:, spec.context_length :]
    which = torch.from_numpy(np.asarray(series, dtype=np.int64)).to(device)
    return Batch(
        context=data.values[past],
        context_mask=data.mask[past],
        target=data.values[future],
        target_mask=data.mask[future],
        past=None if data.past is None else data.past[past],
        known=None if data.known is None else data.known[place],
        static=None if data.static is None else data.static[which],
        series_index=which,
        cutoff_index=data.offset[which] + origin.to(device) - data.indptr[which],
    )


def residual_scale(model: ForecastModel[Any], data: TrainingSeries, *, max_windows: int = 2048) -> Tensor | None:
    """Return ``training_error`` [H, V], None for point outputs, which have no spread to start from it."""
    return None if model.spec.num_params == 1 else training_error(model, data, max_windows=max_windows)


@torch.no_grad()
def training_error(model: ForecastModel[Any], data: TrainingSeries, *, max_windows: int = 2048) -> Tensor | None:
    """Return the root mean squared error [H, V] of the model's own forecasts inside the training span.

    Cells that were never observed borrow the mean of their variate, else of all; None when there is no window or no
    observed target at all.
    """
    spec = model.spec
    total = torch.zeros(spec.horizon, spec.num_variates, dtype=torch.float64)
    count = torch.zeros_like(total)
    dtype = next((value.dtype for value in model.parameters()), torch.float64)
    for batch in training_windows(data, spec, max_windows=max_windows):
        if batch.target is None or batch.target_mask is None:
            continue
        inputs = Batch(*(_cast(value, dtype) for value in batch._replace(target=None, target_mask=None)))
        error = (model(inputs).raw[..., 0].double() - batch.target.double()).square()
        total += torch.where(batch.target_mask, error, 0.0).sum(0).cpu()
        count += batch.target_mask.sum(0).cpu()
    if not bool((count > 0).any()):
        return None
    overall = total.sum() / count.sum()
    by_variate = torch.where(count.sum(0) > 0, total.sum(0) / count.sum(0).clamp(min=1), overall)
    return torch.where(count > 0, total / count.clamp(min=1), by_variate.expand_as(total)).sqrt()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
