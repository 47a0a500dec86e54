"""Windows cut from a training span, for residual scales and for fits that need explicit windows.

``NaiveForecaster`` is the base of the models that are nothing but a rule and those residual scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.contracts.model import C, ForecastModel
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, TrainingSeries
from tsforge.core.errors import ModelError

_BLOCK_VALUES = 8_000_000  # context and target values gathered at once, 32 MB in float32
_LEAST_WINDOWS = 64  # of every series by itself: tells its root mean squared error to about 9 %


def series_bounds(data: TrainingSeries) -> list[int]:
    """Return the row where each series starts, plus the end of the last one."""
    return [int(row) for row in data.indptr.tolist()]


def training_windows(
    data: TrainingSeries, spec: DataSpec, *, max_windows: int | None = None, of_each: int | None = None
) -> Iterator[Batch]:
    """Yield batches of windows that lie inside one series each, a repeatable random choice if there are too many.

    A random choice rather than every k-th window: a fixed step would see only some phases of a season.

    Args:
        data: the training span.
        spec: look-back and horizon.
        max_windows: of all series together, None = no limit.
        of_each: of every series at most, None = no limit.
    """
    length, horizon = spec.context_length, spec.horizon
    bounds = series_bounds(data)
    origins = [np.arange(first + length, last - horizon + 1) for first, last in pairwise(bounds)]
    if of_each is not None:
        places = {size: _some(np.arange(size), of_each) for size in {len(part) for part in origins} if size > of_each}
        origins = [part[places[len(part)]] if len(part) in places else part for part in origins]
    series = np.repeat(np.arange(len(origins)), [len(part) for part in origins])
    rows = np.concatenate(origins) if origins else np.zeros(0, dtype=np.int64)
    if max_windows is not None and len(rows) > max_windows:
        chosen = _some(np.arange(len(rows)), max_windows)
        rows, series = rows[chosen], series[chosen]
    size = max(_BLOCK_VALUES // ((length + horizon) * max(spec.num_variates, 1)), 1)
    for start in range(0, len(rows), size):
        yield _gather(data, spec, torch.from_numpy(rows[start : start + size]), series[start : start + size])


def _some(values: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).choice(values, number, replace=False))


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
    for error, seen, _ in _squared_errors(model, training_windows(data, spec, max_windows=max_windows)):
        total += torch.where(seen, error, 0.0).sum(0).cpu()
        count += seen.sum(0).cpu()
    if not bool((count > 0).any()):
        return None
    overall = total.sum() / count.sum()
    by_variate = torch.where(count.sum(0) > 0, total.sum(0) / count.sum(0).clamp(min=1), overall)
    return torch.where(count > 0, total / count.clamp(min=1), by_variate.expand_as(total)).sqrt()


@torch.no_grad()
def series_error(model: ForecastModel[Any], data: TrainingSeries, *, max_windows: int = 20_000) -> Tensor | None:
    """Return the root mean squared error [num_series, H, V] of the model's own forecasts of each series by itself.

    Cells that were never observed borrow the mean of their series and variate, NaN where nothing of it was; None when
    there is no window at all. Every series gives an equal share of ``max_windows``, and at least 64 if it has them.
    """
    spec, number = model.spec, len(series_bounds(data)) - 1
    total = torch.zeros(number, spec.horizon, spec.num_variates, dtype=torch.float64)
    count = torch.zeros_like(total)
    share = max(max_windows // max(number, 1), _LEAST_WINDOWS)
    for error, seen, which in _squared_errors(model, training_windows(data, spec, of_each=share)):
        total.index_add_(0, which.cpu(), torch.where(seen, error, 0.0).cpu())
        count.index_add_(0, which.cpu(), seen.double().cpu())
    if not bool((count > 0).any()):
        return None
    by_variate = total.sum(1, keepdim=True) / count.sum(1, keepdim=True)  # 0 / 0 is NaN
    return torch.where(count > 0, total / count, by_variate).sqrt()


def _squared_errors(model: ForecastModel[Any], windows: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield squared errors [B, H, V], which of them count, and the series [B] of batches of windows."""
    dtype = next((value.dtype for value in model.parameters()), torch.float64)
    for batch in windows:
        if batch.target is None or batch.target_mask is None or batch.series_index is None:
            continue
        inputs = Batch(*(_cast(value, dtype) for value in batch._replace(target=None, target_mask=None)))
        error = (model(inputs).raw[..., 0].double() - batch.target.double()).square()
        yield error, batch.target_mask, batch.series_index


class NaiveForecaster(ForecastModel[C]):
    """A rule without parameters; with one spread for all series, or with one for each.

    Shapes:
        series_spread [num_series, H, V, K - 1]: what a series adds to the raw parameters beside the location; None (and
            nothing among the stored weights) where all series share one spread. Series beyond it add nothing.
    """

    series_spread: Tensor | None

    def __init__(self, config: C, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("series_spread", None)

    def prediction(self, location: Tensor, batch: Batch) -> Prediction:
        """Return the location [B, H, V] with the spreads of the series of the batch, if there are some.

        Raises:
            ModelError: they are needed, and the batch does not say which series it holds.
        """
        raw = location.unsqueeze(-1)
        if self.series_spread is None:
            return Prediction(raw)
        if batch.series_index is None:
            raise ModelError("every series has a spread of its own, but the batch does not say which series it holds")
        known = (batch.series_index >= 0) & (batch.series_index < len(self.series_spread))
        own = self.series_spread[torch.where(known, batch.series_index, 0)].to(raw.dtype)
        return Prediction(torch.cat([raw, torch.where(known[:, None, None, None], own, 0.0)], dim=-1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "series_spread")  # the number of series is known only to the stored weights
        self.series_spread = None if stored is None else torch.empty_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
