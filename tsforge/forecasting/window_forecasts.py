"""Forecasts of many windows as arrays: the one place where a network meets windows outside training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.contracts.tensors import Batch, is_complete
from tsforge.core.errors import DataError, ModelError
from tsforge.data.windows import WindowDataset
from tsforge.metrics.point import ErrorSums
from tsforge.network import ForecastNetwork

FloatArray = NDArray[np.float64]
CELLS_PER_BATCH = 4_000_000  # context and horizon cells of one forward pass: about 16 MB in single precision


@dataclass(frozen=True, kw_only=True)
class WindowForecasts:
    """Forecasts of N windows in data units, float64.

    Shapes:
        mean [N, H, V]; quantiles [N, H, V, Q] or None; target [N, H, V] and mask [N, H, V] (True = observed), None for
        windows without a future; scale [N, V], the unit in which the network saw each window; series_index [N] and
        cutoff_index [N], the absolute grid row of the first forecast step.
    """

    mean: FloatArray
    quantiles: FloatArray | None
    target: FloatArray | None
    mask: NDArray[np.bool_] | None
    scale: FloatArray
    series_index: NDArray[np.int64]
    cutoff_index: NDArray[np.int64]


def default_batch_size(network: ForecastNetwork) -> int:
    """Return how many windows fit one forward pass of bounded memory."""
    spec = network.spec
    columns = spec.num_variates * spec.num_params + spec.num_known + spec.num_past
    return int(np.clip(CELLS_PER_BATCH // ((spec.context_length + spec.horizon) * columns), 1, 2048))


@contextmanager
def evaluating(network: ForecastNetwork) -> Iterator[None]:
    """Switch dropout and the like off for a while."""
    if not network.training:  # switching goes through every module: too slow for a single row
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


def window_batches(
    network: ForecastNetwork,
    windows: WindowDataset,
    *,
    batch_size: int | None = None,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
) -> Iterator[Batch]:
    """Yield batches on the network's device: every item (or those at ``indices``) once, in order, nothing dropped.

    Args:
        network: decides device and memory.
        windows: aligned ones give all series of a cutoff in one batch.
        batch_size: windows a batch; default by memory.
        indices: items of ``windows``.
    """
    items = np.arange(len(windows)) if indices is None else np.asarray(indices, dtype=np.int64)
    step = max(1, (batch_size or default_batch_size(network)) // windows.rows_per_item)
    device = network.param_offset.device
    for start in range(0, len(items), step):
        yield to_device(windows.__getitems__(items[start : start + step]), device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on ``device``."""
    if all(part is None or part.device == device for part in batch):
        return batch
    parts = {name: part.to(device) for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**parts)


def forecast_batches(
    network: ForecastNetwork,
    windows: WindowDataset,
    quantile_levels: Sequence[float] = (),
    *,
    batch_size: int | None = None,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
) -> Iterator[WindowForecasts]:
    """Yield the forecasts of one batch after the other, for spans that do not fit memory as a whole.

    Raises:
        ModelError: a forecast is not finite; the message says how many.
    """
    with evaluating(network):
        for batch in window_batches(network, windows, batch_size=batch_size, indices=indices):
            yield forecast_batch(network, batch, quantile_levels)


def forecast_batch(network: ForecastNetwork, batch: Batch, quantile_levels: Sequence[float] = ()) -> WindowForecasts:
    """Return the forecasts of one batch; the network must be in evaluation mode.

    Raises:
        ModelError: a forecast is not finite; the message says how many.
    """
    predictive = network.predict(batch, tuple(quantile_levels))
    mean = as_array(predictive.mean)
    check_finite(network, mean)
    if batch.series_index is None or batch.cutoff_index is None:
        raise DataError("the batch does not say which windows it holds (series_index, cutoff_index)")
    _, scale = network.scaler.stats(batch)
    return WindowForecasts(
        mean=mean,
        quantiles=None if predictive.quantiles is None else as_array(predictive.quantiles),
        target=None if batch.target is None else as_array(batch.target),
        mask=None if batch.target_mask is None else batch.target_mask.cpu().numpy(),
        scale=as_array(scale[:, 0].expand(mean.shape[0], mean.shape[2])),
        series_index=batch.series_index.cpu().numpy(),
        cutoff_index=batch.cutoff_index.cpu().numpy(),
    )


def check_finite(network: ForecastNetwork, mean: FloatArray) -> None:
    """Check that every forecast [N, H, V] is a number.

    Raises:
        ModelError: it is not; the message says how many windows are affected.
    """
    bad = int((~np.isfinite(mean)).any(axis=(1, 2)).sum())
    if bad:
        raise ModelError(
            f"model '{network.config.model.name}' gave forecasts that are not finite for {bad} of {len(mean)} windows; "
            "its training diverged or its input lies far outside the training range"
        )


def predict_windows(
    network: ForecastNetwork,
    windows: WindowDataset,
    quantile_levels: Sequence[float] = (),
    batch_size: int | None = None,
    *,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
) -> WindowForecasts:
    """Return the forecasts of all items of ``windows`` (or of those at ``indices``), in order.

    Raises:
        DataError: there is no window.
        ModelError: a forecast is not finite.
    """
    parts = list(forecast_batches(network, windows, quantile_levels, batch_size=batch_size, indices=indices))
    if not parts:
        raise DataError("there is no window to forecast; the span is shorter than one horizon")
    return concatenate(parts)


@torch.no_grad()
def error_sums(network: ForecastNetwork, windows: WindowDataset, *, batch_size: int | None = None) -> ErrorSums:
    """Return squared and absolute errors of the mean forecast summed over all windows, per step and variate.

    Each batch is summed where the network lives and as precise as it computes, batches in double precision.

    Raises:
        DataError: the windows have no target.
        ModelError: a forecast is not finite.
    """
    sums = ErrorSums(network.spec.horizon, network.spec.num_variates)
    with evaluating(network):
        for batch in window_batches(network, windows, batch_size=batch_size):
            if batch.target is None or batch.target_mask is None:
                raise DataError("errors need windows with targets; these are for prediction only")
            error = network.predict(batch).mean - batch.target
            count = torch.full(error.shape[1:], len(error))
            if not is_complete(batch.target_mask):
                error, count = error.masked_fill_(~batch.target_mask, 0.0), batch.target_mask.sum(dim=0).cpu()
            absolute = as_array(error.abs().sum(dim=0))
            sums.add_sums(as_array(error.square_().sum(dim=0)), absolute, count.numpy(), len(error))
    if not np.isfinite(sums.squared).all():
        raise ModelError(
            f"model '{network.config.model.name}' gave forecasts that are not finite; its training diverged or its "
            "input lies far outside the training range"
        )
    return sums


def concatenate(parts: Sequence[WindowForecasts]) -> WindowForecasts:
    """Return the windows of all parts (at least one) in order."""
    joined: dict[str, Any] = {}
    for item in fields(WindowForecasts):
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = None if values[0] is None else np.concatenate(values)
    return WindowForecasts(**joined)


def as_array(values: Tensor) -> FloatArray:
    """Return a tensor as a float64 array on the host."""
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
