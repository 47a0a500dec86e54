"""From an artifact and a table to a forecast table: what shells, batches and the dashboard call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import Forecast, quantile_column
from tsforge.core.errors import ConfigError, ModelError, listing
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, TimeLike
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, last_windows
from tsforge.forecasting.conformal import (
    apply_calibration,
    calibrated_levels,
    check_calibration,
    needs_quantiles,
    needs_recent_errors,
)
from tsforge.forecasting.conformal_buckets import Origins
from tsforge.forecasting.recent_errors import calibrated_unit
from tsforge.forecasting.rollout import check_rollout, roll
from tsforge.forecasting.window_forecasts import (
    FloatArray,
    WindowForecasts,
    as_array,
    check_finite,
    concatenate,
    evaluating,
    forecast_batch,
    predict_windows,
    window_batches,
)
from tsforge.layers.likelihoods import DEFAULT_LEVELS, Quantiles

__all__ = ["WindowForecasts", "artifact_panel", "forecast_table", "offered_levels", "predict", "predict_windows"]

_LOG = get_logger(__name__)


def predict(
    artifact: Artifact,
    frame: SeriesFrame,
    *,
    quantile_levels: Sequence[float] | None = None,
    cutoff: TimeLike | None = None,
    horizon: int | None = None,
    rollout: bool = False,
) -> Forecast:
    """Return the forecast of every series of the frame from one cutoff each.

    A model that couples series reads all of them, but a series with no observed target in its context gets no forecast;
    a warning says how many these are.

    Args:
        artifact: the fitted network and what it was fitted on.
        frame: history (and known covariates over the horizon, where the model uses any).
        quantile_levels: levels wanted; default all that ``offered_levels`` lists, () for none.
        cutoff: last time that may be seen, for all series; later targets are hidden. Default: the last row of each
            series with an observed target.
        horizon: steps wanted; default the trained horizon, fewer cut it short.
        rollout: allow more steps than trained by repeating the block on its own means; those steps have null quantiles
            and ``metadata["rolled_from_step"]`` names the first of them.

    Raises:
        ArtifactError: the frame's columns, frequency or series do not fit the artifact.
        ConfigError: levels that the artifact does not offer.
        DataError: too short a history, nothing observed in it (for a model that couples series: in that of none), or
            known covariates missing; series are named.
        ModelError: more steps than trained without ``rollout``, or a model that cannot be rolled.
    """
    trained = artifact.window.horizon
    steps = _steps(artifact, horizon, rollout)
    levels = offered_levels(artifact) if quantile_levels is None else checked_levels(artifact, quantile_levels)
    panel, windows = prediction_windows(artifact, frame, cutoff, max(steps, trained))
    if levels:
        _tell_late_starts(artifact, panel, windows)
    forecasts = (_rolled if steps > trained else direct_forecasts)(artifact, windows, levels, steps)
    table = forecast_table(forecasts, panel, levels, keep=published_windows(artifact, panel, forecasts))
    metadata = {
        "model": artifact.model_name,
        "artifact_id": artifact.id,
        "freq": artifact.schema.freq,
        "horizon": steps,
        "calibrated": artifact.calibration is not None and bool(levels),
        "rolled_from_step": trained + 1 if steps > trained else None,
    }
    return Forecast(table=table, quantile_levels=levels, metadata=metadata)


def _tell_late_starts(artifact: Artifact, panel: Panel, windows: WindowDataset) -> None:
    """Warn of new series that begin within their window: its leading rows are there, but nothing is observed in them.

    Series without those rows are refused. A gap is a gap to the model, so these are not, but their intervals are those
    of a whole history. Series of the fit began before: the frame may hold no more than their last context.
    """
    if artifact.network.capabilities.rows_coupled:
        return  # aligned windows are masked where a series has not begun
    series = windows.series_index
    low, high = panel.indptr[series], panel.indptr[series + 1]
    first = low + windows.cutoff_index - panel.offset[series] - artifact.window.context_length
    running = np.concatenate([[0], np.cumsum(panel.target_observed.any(axis=1))])
    late = running[np.clip(first + 1, low, high)] == running[low]
    fitted = set(artifact.series_ids)
    late &= np.array([panel.series_ids[index] not in fitted for index in series], dtype=bool)
    if late.any():
        _LOG.warning(
            "%d of %d series have no observed target in the first of the %d rows up to the cutoff, nor before (%s); "
            "their intervals are as narrow as those of a whole history, cold_start=pad gives wider ones",
            int(late.sum()),
            len(series),
            artifact.window.context_length,
            listing([panel.series_ids[index] for index in series[late]]),
        )


def prediction_windows(
    artifact: Artifact, frame: SeriesFrame, cutoff: TimeLike | None, steps: int
) -> tuple[Panel, WindowDataset]:
    """Return the rows that may be seen and the last window of every series before the cutoff.

    Args:
        artifact, frame, cutoff: as in ``predict``.
        steps: horizon of the windows, at least the trained one.

    Raises:
        ArtifactError, DataError: as in ``predict``.
    """
    frame = match_frame(artifact, frame)
    visible = frame if cutoff is None else frame.until(cutoff, keep_known=True)
    panel = artifact_panel(artifact, visible)
    if visible.schema.known:
        panel = artifact_panel(artifact, visible.extend(steps))
    coupled = artifact.network.capabilities.rows_coupled
    return panel, last_windows(panel, replace(artifact.window, horizon=steps), cutoff, aligned=coupled)


def offered_levels(artifact: Artifact) -> tuple[float, ...]:
    """Return the quantile levels an artifact gives by default: the calibrated ones, else those of its likelihood."""
    if artifact.calibration is not None:
        return calibrated_levels(artifact.calibration)
    if not artifact.network.likelihood.has_distribution:
        return ()
    likelihood = artifact.network.config.likelihood
    return likelihood.levels if isinstance(likelihood, Quantiles) else DEFAULT_LEVELS


def artifact_panel(artifact: Artifact, frame: SeriesFrame) -> Panel:
    """Return the frame as dense rows on the artifact's grid; series numbered as in training, new ones after them."""
    known = set(artifact.series_ids)
    strangers = tuple(name for name in frame.series_ids if name not in known)
    return Panel.from_frame(frame, grid=artifact.grid, series_ids=artifact.series_ids + strangers)


def padded_panel(artifact: Artifact, frame: SeriesFrame, stop: int) -> Panel:
    """Return the panel with every series reaching at least to row ``stop``, so that windows may end after the data."""
    origin = pl.Series([frame.grid.time_at(0)], dtype=frame.table["time"].dtype)
    shift = int(artifact.grid.index_of(origin)[0])
    return artifact_panel(artifact, frame.extend_to(stop - shift))


def published_windows(artifact: Artifact, panel: Panel, forecasts: WindowForecasts) -> NDArray[np.bool_]:
    """Return which windows [N] get rows in a table; those of a model that couples series may hold blind ones.

    Aligned windows hold every series, masked where it has no data. A series without rows at all is left out silently,
    one with nothing observed in its context with a warning: its forecast would rest on the other series alone.
    """
    series, cutoff = forecasts.series_index, forecasts.cutoff_index
    low, high = panel.indptr[series], panel.indptr[series + 1]
    present: NDArray[np.bool_] = high > low
    if not artifact.network.capabilities.rows_coupled:
        return present
    stop, length = low + cutoff - panel.offset[series], artifact.window.context_length
    running = np.concatenate([[0], np.cumsum(panel.target_observed.any(axis=1))])
    seen: NDArray[np.bool_] = running[np.clip(stop, low, high)] > running[np.clip(stop - length, low, high)]
    return without_blind(artifact, present, seen, series, panel.series_ids)


def without_blind(
    artifact: Artifact,
    present: NDArray[np.bool_],
    seen: NDArray[np.bool_],
    series: NDArray[np.int64],
    ids: Sequence[str],
) -> NDArray[np.bool_]:
    """Return which of the windows that are ``present`` [N] get a forecast: not those of a model that couples series in
    which nothing of their own series was ``seen`` [N]; a warning names these.

    Args:
        artifact, present, seen: see above.
        series: [N], number of the series of each window among ``ids``.
        ids: names of series.
    """
    if not artifact.network.capabilities.rows_coupled:
        return present
    blind = present & ~seen
    if blind.any():
        _LOG.warning(
            "no forecast for %d of %d windows (%d series: %s): no observed target in the %d rows up to the cutoff",
            int(blind.sum()),
            int(present.sum()),
            len(np.unique(series[blind])),
            listing([ids[index] for index in np.unique(series[blind])]),
            artifact.window.context_length,
        )
    kept: NDArray[np.bool_] = present & seen
    return kept


def network_levels(artifact: Artifact, levels: Sequence[float]) -> tuple[float, ...]:
    """Return the levels to ask of the network itself: none where intervals are all calibration, around the mean."""
    if not artifact.network.likelihood.has_distribution:
        return ()
    if artifact.calibration is None:
        return tuple(levels)
    return mirrored_levels(levels) if needs_quantiles(artifact.calibration) else ()


def published_quantiles(
    artifact: Artifact,
    forecasts: WindowForecasts,
    levels: Sequence[float],
    panel: Panel | None = None,
    *,
    tell: bool = True,
) -> FloatArray | None:
    """Return quantiles [N, H, V, Q] at ``levels``, calibrated if the artifact is; None without levels.

    Args:
        artifact: its calibration applies.
        forecasts: of the artifact's network, with quantiles at ``network_levels(artifact, levels)``.
        levels: ascending, checked.
        panel: what the windows were cut from, for a calibration that depends on calendar, series, context or errors.
        tell: warn of infinite bounds, and of windows with too short a history for the calibration.

    Raises:
        ConfigError: there is such a calibration, and no panel.
    """
    if not levels:
        return None
    if artifact.calibration is None:
        return forecasts.quantiles
    both = mirrored_levels(levels)
    calibrated = calibrated_quantiles(artifact, forecasts, both, panel, tell=tell)
    chosen = calibrated[..., [both.index(round(level, 9)) for level in levels]]
    infinite = float(np.isinf(chosen).mean())
    if infinite and tell:
        _LOG.warning(
            "%.0f%% of the interval bounds of artifact %s are infinite: too few held-out windows for their coverage",
            100.0 * infinite,
            artifact.id,
        )
    return chosen


def calibrated_quantiles(
    artifact: Artifact,
    forecasts: WindowForecasts,
    levels: Sequence[float],
    panel: Panel | None = None,
    *,
    tell: bool = True,
) -> FloatArray:
    """Return the quantiles [N, H, V, Q] of a calibrated artifact at ``levels``.

    Args:
        artifact, forecasts, panel: as in ``published_quantiles``.
        levels: ascending, each with its mirror image.
        tell: warn of windows with too short a history for the calibration.

    Raises:
        ConfigError: the artifact is not calibrated, or its calibration needs a panel and there is none.
    """
    if artifact.calibration is None:
        raise ConfigError(f"artifact {artifact.id} has no calibration")
    origins = recent = None
    if panel is not None:
        origins = Origins(
            panel=panel,
            series_index=forecasts.series_index,
            cutoff_index=forecasts.cutoff_index,
            context_length=artifact.window.context_length,
        )
        if needs_recent_errors(artifact.calibration):
            unit = calibrated_unit(
                artifact.network,
                panel,
                artifact.window,
                forecasts.series_index,
                forecasts.cutoff_index,
                forecasts.scale,
                artifact.calibration,
                tell=tell,
            )
            recent = unit[:, : forecasts.mean.shape[1]]
    return apply_calibration(
        artifact.calibration,
        forecasts.mean,
        forecasts.quantiles,
        levels,
        forecasts.scale,
        artifact.schema.targets,
        origins=origins,
        recent=recent,
    )


def forecast_table(
    forecasts: WindowForecasts, panel: Panel, levels: Sequence[float], *, keep: NDArray[np.bool_] | None = None
) -> pl.DataFrame:
    """Return window forecasts as a long table: one row a window, step and variate, in that order.

    Args:
        forecasts: arrays in data units; missing quantiles (NaN) become null.
        panel: names of series and variates, and the grid.
        levels: one column each, from the last axis of the quantiles.
        keep: windows to take [N], default all.
    """
    chosen = np.flatnonzero(keep) if keep is not None else np.arange(len(forecasts.mean))
    count, steps, variates = len(chosen), forecasts.mean.shape[1], forecasts.mean.shape[2]
    shape = (count, steps, variates)
    first = forecasts.cutoff_index[chosen]
    rows = first[:, None] + np.arange(steps)
    windows = np.repeat(np.arange(count), steps * variates)
    times = _times(panel.grid, rows.ravel())
    columns = {
        "series_id": pl.Series(panel.series_ids, dtype=pl.String).gather(forecasts.series_index[chosen][windows]),
        "cutoff": _times(panel.grid, first - 1).gather(windows),
        "step": pl.Series(np.broadcast_to(np.arange(1, steps + 1)[None, :, None], shape).ravel(), dtype=pl.Int32),
        "time": times.gather(np.repeat(np.arange(count * steps), variates)),
        "variate": pl.Series(panel.schema.targets, dtype=pl.String).gather(np.tile(np.arange(variates), count * steps)),
        "mean": pl.Series(forecasts.mean[chosen].ravel()),
    }
    for position, level in enumerate(levels):
        if forecasts.quantiles is None:
            raise ConfigError("quantile columns were asked for, but the forecasts hold no quantiles")
        values = pl.Series(forecasts.quantiles[chosen][..., position].ravel())
        columns[quantile_column(level)] = values.fill_nan(None)
    return pl.DataFrame(columns)


def _times(grid: TimeGrid, index: NDArray[np.int64]) -> pl.Series:
    return grid.time_at(np.asarray(index, dtype=np.int64))


def _steps(artifact: Artifact, horizon: int | None, rollout: bool) -> int:
    trained = artifact.window.horizon
    steps = trained if horizon is None else horizon
    if steps < 1:
        raise ConfigError(f"horizon is {steps}; it must be at least 1")
    if steps > trained and not rollout:
        raise ModelError(
            f"artifact {artifact.id} was trained for {trained} steps, asked for {steps}; fit with horizon={steps}, ask "
            f"for at most {trained}, or allow rollout (rollout=true: means only, errors accumulate)"
        )
    check_rollout(artifact.network, steps)
    return steps


def checked_levels(artifact: Artifact, levels: Sequence[float]) -> tuple[float, ...]:
    """Return the levels asked for in ascending order, after a check that the artifact can give them."""
    asked = tuple(sorted(float(level) for level in levels))
    if not asked:
        return ()
    distribution = artifact.network.likelihood.has_distribution
    if artifact.calibration is not None:
        check_calibration(artifact.calibration, asked, has_quantiles=bool(network_levels(artifact, asked)))
    elif not distribution:
        raise ConfigError(
            f"artifact {artifact.id} gives points only: its likelihood is 'point' and it has no calibration; fit with "
            "a validation span (it calibrates), or with likelihood normal, student_t or quantiles"
        )
    return asked


def direct_forecasts(
    artifact: Artifact, windows: WindowDataset, levels: tuple[float, ...], steps: int
) -> WindowForecasts:
    """Return the first steps of the trained horizon with published quantiles."""
    found = predict_windows(artifact.network, windows, network_levels(artifact, levels))
    cut = replace(
        found,
        mean=found.mean[:, :steps],
        quantiles=None if found.quantiles is None else found.quantiles[:, :steps],
    )
    return replace(cut, quantiles=published_quantiles(artifact, cut, levels, windows.panel))


def _rolled(artifact: Artifact, windows: WindowDataset, levels: tuple[float, ...], steps: int) -> WindowForecasts:
    """Return rolled means; quantiles as trained for the first block, NaN after it."""
    network, parts = artifact.network, []
    length, trained = artifact.window.context_length, artifact.window.horizon
    with evaluating(network):
        for batch in window_batches(network, windows):
            known = None if batch.known is None else batch.known[:, : length + trained]
            block = forecast_batch(network, batch._replace(known=known), network_levels(artifact, levels))
            mean = as_array(roll(network, batch, steps))
            check_finite(network, mean)
            quantiles = published_quantiles(artifact, block, levels, windows.panel)
            if quantiles is not None:
                quantiles = np.pad(quantiles, ((0, 0), (0, steps - trained), (0, 0), (0, 0)), constant_values=np.nan)
            parts.append(replace(block, mean=mean, quantiles=quantiles))
    return concatenate(parts)


def mirrored_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the levels together with their mirror images at 0.5, ascending: calibration works on intervals."""
    both = {round(level, 9) for level in levels} | {round(1.0 - level, 9) for level in levels}
    return tuple(sorted(both))
