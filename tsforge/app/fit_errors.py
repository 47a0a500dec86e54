"""Errors of a fit on its held-out parts, and the unit they count in: the same for every model, scaling and likelihood.

Legend: S series, V variates.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.contracts.tensors import TrainingSeries
from tsforge.core.errors import DataError
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.metrics.point import ErrorSums
from tsforge.network import ForecastNetwork

FloatArray = NDArray[np.float64]


def held_out_errors(
    network: ForecastNetwork, graded: Mapping[str, WindowDataset | None], unit: FloatArray
) -> dict[str, float]:
    """Return ``NAME_mse`` and ``NAME_mae`` of every part that has windows, in a unit [V], or [S, V] of each series.

    Raises:
        DataError: windows without a target.
    """
    metrics: dict[str, float] = {}
    for name, windows in graded.items():
        if windows is None:
            continue
        sums = ErrorSums(network.spec.horizon, network.spec.num_variates)
        for batch in forecast_batches(network, windows):
            if batch.target is None:
                raise DataError(f"the {name} windows have no target")
            size = unit if unit.ndim == 1 else unit[batch.series_index][:, None]
            sums.add(batch.target / size, batch.mean / size, batch.mask)
        metrics[f"{name}_mse"] = float(sums.mse().value)
        metrics[f"{name}_mae"] = float(sums.mae().value)
    return metrics


def error_unit(series: TrainingSeries, *, diverse: bool) -> FloatArray:
    """Return deviations of the training span: of each variate [V], or of each series of a diverse panel [S, V].

    Where a series has no value, or a constant, it is that of all series together.
    """
    together = training_unit(series)
    if not diverse:
        return together
    values, mask = series.values.numpy(), series.mask.numpy()
    own = np.stack([_deviation(values[a:b], mask[a:b]) for a, b in pairwise(series.indptr.tolist())])
    return np.where(own > 0, own, together)


def training_unit(series: TrainingSeries) -> FloatArray:
    """Return the standard deviation [V] of the observed training values of each variate, 1 for a constant one."""
    deviation = _deviation(series.values.numpy(), series.mask.numpy())
    return np.where(deviation > 0, deviation, 1.0)


def _deviation(values: NDArray[Any], mask: NDArray[np.bool_]) -> FloatArray:
    """Return the standard deviation [V] of observed rows, 0 where there are none."""
    count = np.maximum(mask.sum(axis=0), 1)
    mean = np.where(mask, values, 0.0).sum(axis=0) / count
    return np.asarray(np.sqrt(np.where(mask, (values - mean) ** 2, 0.0).sum(axis=0) / count), dtype=np.float64)
