"""Forecasts of every row of a span from each of the cutoffs just before it: what detection compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel
from tsforge.data.windows import NoWindowError, WindowDataset
from tsforge.forecasting.fixed_blocks import block_size, padded
from tsforge.forecasting.predict import padded_panel
from tsforge.forecasting.window_forecasts import FloatArray, as_array, evaluating, to_device
from tsforge.network import ForecastNetwork

Output = Literal["cdf", "log_tail", "log_density"]


@dataclass(frozen=True, kw_only=True)
class RollingForecasts:
    """For every series n, absolute row ``start + t`` and step h: the forecast of that row made h rows earlier.

    Entry ``[n, t, h - 1]`` comes from the window whose last visible row is ``start + t - h``: no forecast of a row has
    seen it. NaN where no window reaches: too little history before the cutoff, nothing observed in the context (an
    outage longer than it), or rows the series lacks.

    Shapes:
        target [S, T, V] (NaN where not observed); mean [S, T, K, V] with K steps; quantiles [S, T, K, V, Q], cdf,
        log_tail and log_density of the target [S, T, K, V], or None when not asked for; scale [S, T, K, V], the unit in
        which the network saw the window.
    Units:
        data units; cdf is a probability, log_tail = log(2 min(F, 1 - F)), log_density per data unit.
    """

    series_ids: tuple[str, ...]
    variates: tuple[str, ...]
    grid: TimeGrid
    start: int
    stop: int
    target: FloatArray
    mean: FloatArray
    scale: FloatArray
    quantile_levels: tuple[float, ...]
    quantiles: FloatArray | None
    cdf: FloatArray | None
    log_tail: FloatArray | None
    log_density: FloatArray | None = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Absolute grid rows [T]."""
        return np.arange(self.start, self.stop)


def rolling_forecasts(
    artifact: Artifact,
    frame: SeriesFrame,
    start: int,
    stop: int,
    *,
    steps: int = 1,
    quantile_levels: Sequence[float] = (),
    outputs: Sequence[Output] = (),
) -> RollingForecasts:
    """Return the forecasts of rows ``[start, stop)`` made 1 to ``steps`` rows ahead, for all series of the frame.

    Quantiles and probabilities are the network's own, without conformal calibration: scores get their own.
    Known covariates that the frame does not hold count as 0, as everywhere in windows.

    Args:
        artifact: the fitted network.
        frame: must also hold the rows before ``start`` that contexts look back to; later targets are never read.
        start, stop: absolute rows on the artifact's grid.
        steps: largest step ahead, at most the trained horizon.
        quantile_levels: levels of the network's quantiles.
        outputs: ``cdf``, ``log_tail`` and ``log_density`` of each observed target under its forecast.

    Raises:
        ArtifactError: the frame does not fit the artifact.
        ConfigError: an empty span, or more steps than the trained horizon.
        ModelError: quantiles or probabilities of a point likelihood, forecasts that are not finite.
    """
    frame = match_frame(artifact, frame)
    horizon = artifact.window.horizon
    if not 1 <= steps <= horizon:
        raise ConfigError(f"steps is {steps}; the artifact forecasts 1 to {horizon} steps ahead")
    if stop <= start:
        raise ConfigError(f"the span of rows [{start}, {stop}) is empty")
    panel = padded_panel(artifact, frame, stop + horizon)
    length, variates = stop - start, panel.num_targets
    rows = (panel.num_series, length, steps, variates)
    result = {name: np.full(rows, np.nan) for name in ("mean", "scale", *outputs)}
    if quantile_levels:
        result["quantiles"] = np.full((*rows, len(quantile_levels)), np.nan)
    target = _targets(panel, start, stop)
    for series, cutoff, values in _window_outputs(artifact, panel, start, stop, steps, (quantile_levels, outputs)):
        place = cutoff[:, None] + np.arange(steps) - start  # [B, K]: row of each step
        inside = (place >= 0) & (place < length)
        window, step = np.nonzero(inside)
        for name, found in values.items():
            result[name][series[window], place[window, step], step] = found[window, step]
    present = np.flatnonzero(panel.lengths > 0)
    picked = {name: value[present] for name, value in result.items()}
    return RollingForecasts(
        series_ids=tuple(panel.series_ids[index] for index in present),
        variates=artifact.schema.targets,
        grid=panel.grid,
        start=start,
        stop=stop,
        target=target[present],
        mean=picked["mean"],
        scale=picked["scale"],
        quantile_levels=tuple(quantile_levels),
        quantiles=picked.get("quantiles"),
        cdf=picked.get("cdf"),
        log_tail=picked.get("log_tail"),
        log_density=picked.get("log_density"),
    )


def _targets(panel: Panel, start: int, stop: int) -> FloatArray:
    """Return observed targets [S, T, V], NaN elsewhere."""
    target = np.full((panel.num_series, stop - start, panel.num_targets), np.nan)
    rows, indptr, offset = panel.rows(start, stop)
    series = np.repeat(np.arange(panel.num_series), np.diff(indptr))
    place = offset[series] - start + np.arange(len(rows)) - indptr[series]
    values = np.where(panel.target_observed[rows], panel.values[rows, : panel.num_targets], np.nan)
    target[series, place] = values
    return target


def _window_outputs(
    artifact: Artifact,
    panel: Panel,
    start: int,
    stop: int,
    steps: int,
    wanted: tuple[Sequence[float], Sequence[Output]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], dict[str, FloatArray]]]:
    """Yield series [B], cutoff row [B] and outputs [B, K, ...] of all windows that forecast a row of the span."""
    network, (levels, outputs) = artifact.network, wanted
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    coupled = network.capabilities.rows_coupled
    first, last = start - steps + 1, stop - 1 + spec.horizon
    try:
        windows = WindowDataset(panel, spec, first, last, aligned=coupled)
    except NoWindowError:  # nobody has enough history: every forecast stays NaN
        return
    with evaluating(network), torch.no_grad():
        for batch in windows.batches(block_size(network, windows.rows_per_item)):
            values = block_outputs(network, batch, steps, (levels, outputs), windows.rows_per_item)
            scale = as_array(network.scaler.stats(to_device(batch, network.param_offset.device))[1])
            values["scale"] = np.broadcast_to(scale, (len(scale), network.spec.horizon, scale.shape[-1]))[:, :steps]
            if batch.series_index is None or batch.cutoff_index is None:
                raise DataError("rolling windows lost their index")
            yield batch.series_index.numpy(), batch.cutoff_index.numpy(), values


def block_outputs(
    network: ForecastNetwork,
    batch: Batch,
    steps: int,
    wanted: tuple[Sequence[float], Sequence[Output]] = ((), ()),
    together: int = 1,
) -> dict[str, FloatArray]:
    """Return ``mean`` and what else is asked for, [B, K, ...], of at most one block of windows.

    The network, evaluating and without gradients, sees ``block_size(network)`` windows whatever B is: the same window
    gives the same bits in any company. NaN where nothing of a series was observed in its context: what is left, the
    level of the training or what other series suggest, is no expectation of it.

    Args:
        network: on any device.
        batch: B windows in data units; with targets where ``outputs`` are asked for.
        steps: K.
        wanted: quantile levels and outputs, as in ``rolling_forecasts``.
        together: windows that belong together, see ``block_size``.
    """
    count, (levels, outputs) = len(batch.context), wanted
    blind = ~batch.context_mask.cpu().numpy().reshape(count, -1).any(axis=1)  # numpy: torch is slow on one row a window
    batch = to_device(padded(batch, block_size(network, together), together), network.param_offset.device)
    found = network.predict(batch, tuple(levels))
    values = {"mean": as_array(found.mean[:count, :steps])}
    if found.quantiles is not None:
        values["quantiles"] = as_array(found.quantiles[:count, :steps])
    for name in outputs:
        if batch.target is None or batch.target_mask is None:
            raise DataError(f"the {name} of targets needs windows with targets")
        score = as_array(getattr(network, name)(batch, batch.target))
        values[name] = np.where(batch.target_mask.cpu().numpy(), score, np.nan)[:count, :steps]
    if not blind.any():
        return values
    return {name: np.where(blind.reshape(-1, *[1] * (part.ndim - 1)), np.nan, part) for name, part in values.items()}
