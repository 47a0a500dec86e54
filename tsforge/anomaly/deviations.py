"""How far every row lies from the forecasts made before it: the arrays a score model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import DEFAULT_WINDOW, RECONSTRUCTED_ROWS, ScoreConfig
from tsforge.anomaly.free_energy import RowEnergies, free_energies
from tsforge.anomaly.growth import free_runs
from tsforge.anomaly.latent import latent_distances
from tsforge.anomaly.reconstruction import EXPLAINED, fit_window_pca
from tsforge.anomaly.regions import visited_regions
from tsforge.anomaly.residuals import tail_to_normal
from tsforge.anomaly.window_scores import region_scores, spectrum_scores, state_scores
from tsforge.artifact import Artifact
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.forecasting.rolling import Output, RollingForecasts, rolling_forecasts

FloatArray = NDArray[np.float64]
MAX_STEPS = 8
LONGEST_STEP = 24
BYTES_PER_CHUNK = 256_000_000
INTERVAL = 0.8
FAR_OUT = 50.0  # normal deviate of a value that the declared range calls impossible


@dataclass(frozen=True)
class Deviations:
    """Rows ``start, start + 1, ...`` of every series against their forecasts.

    Shapes:
        deviations [S, T, K, V] of K steps in the units of the kind of score (residuals in data units, normal deviates
        of the predictive tail, half-widths of an interval, ...); values and expected [S, T, V] in data units, expected
        by the nearest step. NaN where not observed or not forecast.
    """

    series_ids: tuple[str, ...]
    start: int
    deviations: FloatArray
    values: FloatArray
    expected: FloatArray


def used_steps(config: ScoreConfig, horizon: int) -> tuple[int, ...]:
    """Return the forecast steps whose deviations are used; none of windowed kinds.

    Raises:
        ConfigError: a step beyond the artifact's horizon.
    """
    if config.is_windowed:
        return ()
    if config.steps is not None:
        if max(config.steps) > horizon:
            raise ConfigError(f"score.steps: {max(config.steps)} is beyond the artifact's horizon of {horizon}")
        return tuple(sorted(config.steps))
    longest = min(horizon, LONGEST_STEP)
    return tuple(dict.fromkeys(int(step) for step in np.rint(np.linspace(1, longest, min(MAX_STEPS, longest)))))


def collect_deviations(
    artifact: Artifact,
    frame: SeriesFrame,
    config: ScoreConfig,
    span: tuple[int, int],
    observed: Panel,
    training: tuple[int, int],
) -> Deviations:
    """Return the deviations of absolute rows [start, stop); each forecast is made from rows before the one it is for.

    Of windowed kinds these are distances of the window that ends with a row, the same for all variates with
    ``regions`` and states that all variates share; nothing is expected then. Reconstructed rows are expected, with
    ``free_energy`` as the model explains them.

    Args:
        artifact: the fitted network.
        frame: what the network sees.
        config: kind and steps of the deviations.
        span: absolute rows.
        observed: values to judge, on the artifact's grid; cells that the frame lacks (masked as impossible) count as
            far out.
        training: absolute rows that windows are compared with.

    Raises:
        ModelError: ``tail``, ``interval`` or ``nll`` of an artifact that forecasts points only; ``regions``,
            ``growth``, ``latent`` or ``free_energy`` of a model that has nothing of the kind.
        DataError: too few training rows for a window.
    """
    if config.is_windowed:
        return _windowed(artifact, frame, config, span, observed, training)
    if config.kind == "growth":
        return _growth(artifact, frame, config, span, observed)
    return _forecast(artifact, frame, config, span, observed)


def _forecast(
    artifact: Artifact, frame: SeriesFrame, config: ScoreConfig, span: tuple[int, int], observed: Panel
) -> Deviations:
    start, stop = span
    steps = used_steps(config, artifact.window.horizon)
    place = np.array(steps) - 1
    width = len(artifact.schema.targets)
    per_row = observed.num_series * steps[-1] * width * 8 * 3
    size = max(int(BYTES_PER_CHUNK // per_row), steps[-1])
    outputs, levels = forecast_outputs(config)
    found: list[RollingForecasts] = []
    parts: list[FloatArray] = []
    for low in range(start, stop, size):
        part = rolling_forecasts(
            artifact,
            frame,
            low,
            min(low + size, stop),
            steps=steps[-1],
            quantile_levels=levels,
            outputs=outputs,
        )
        values = observed_values(observed, part.series_ids, low, min(low + size, stop))
        parts.append(compared(part, values, place, config.kind))
        found.append(part)
    ids = found[0].series_ids
    return Deviations(
        series_ids=ids,
        start=start,
        deviations=np.concatenate(parts, axis=1),
        values=observed_values(observed, ids, start, stop),
        expected=np.concatenate([part.mean[:, :, steps[0] - 1] for part in found], axis=1),
    )


def forecast_outputs(config: ScoreConfig) -> tuple[tuple[Output, ...], tuple[float, ...]]:
    """Return which outputs and quantile levels of a forecast a kind of score compares with, besides the mean."""
    outputs: dict[str, tuple[Output, ...]] = {"tail": ("log_tail",), "nll": ("log_density",)}
    share = config.interval or INTERVAL
    levels = (0.5 - share / 2, 0.5 + share / 2) if config.kind == "interval" else ()
    return outputs.get(config.kind, ()), levels


def compared(part: RollingForecasts, values: FloatArray, place: NDArray[np.int64], kind: str) -> FloatArray:
    """Return the deviations [S, T, K, V] of values [S, T, V] from the forecasts at steps ``place + 1``."""
    residual = values[:, :, None] - part.mean[:, :, place]
    impossible = (np.isnan(part.target) & ~np.isnan(values))[:, :, None]
    if part.log_tail is not None:
        deviate = tail_to_normal(np.copysign(np.maximum(-part.log_tail[:, :, place], 0.0), residual))
        return np.asarray(np.where(impossible, np.copysign(FAR_OUT, residual), deviate))
    if part.log_density is not None:
        # a value that cannot be costs as much as one 50 standard deviations out of a normal distribution
        return np.asarray(np.where(impossible, 0.5 * FAR_OUT**2, -part.log_density[:, :, place]))
    if part.quantiles is not None:
        low, high = np.moveaxis(part.quantiles[:, :, place], -1, 0)
        # max(low - y, y - high) = |y - middle| - half: in half-widths, the interval score plus one, with a sign
        half = np.maximum(0.5 * (high - low), np.finfo(np.float64).tiny)
        return np.asarray((values[:, :, None] - 0.5 * (low + high)) / half)
    return residual


def _growth(
    artifact: Artifact, frame: SeriesFrame, config: ScoreConfig, span: tuple[int, int], observed: Panel
) -> Deviations:
    steps = used_steps(config, artifact.window.horizon)
    told, spread = free_runs(artifact, frame, span, steps)
    ids = _present(observed)
    values = observed_values(observed, ids, *span)
    run = np.stack([told[name] for name in ids])
    return Deviations(
        series_ids=ids,
        start=span[0],
        deviations=(values[:, :, None] - run) / np.stack([spread[name] for name in ids]),
        values=values,
        expected=run[:, :, 0],
    )


def _present(observed: Panel) -> tuple[str, ...]:
    return tuple(name for name, rows in zip(observed.series_ids, observed.lengths, strict=True) if rows)


def _windowed(
    artifact: Artifact,
    frame: SeriesFrame,
    config: ScoreConfig,
    span: tuple[int, int],
    observed: Panel,
    training: tuple[int, int],
) -> Deviations:
    start, stop = span
    ids, width = _present(observed), len(artifact.schema.targets)
    values = observed_values(observed, ids, start, stop)
    expected = np.full_like(values, np.nan)
    found = np.full((len(ids), stop - start, 1, width), np.nan)
    latent: dict[str, FloatArray] = {}
    energies: dict[str, RowEnergies] = {}
    symbols: dict[str, NDArray[np.int64]] = {}
    window = config.window or (RECONSTRUCTED_ROWS if config.kind == "reconstruction" else DEFAULT_WINDOW)
    first = start - window + 1  # rows before the span only fill its first windows
    early = min(first, training[0])
    if config.kind == "latent":
        latent = latent_distances(artifact, frame, span, training, config.explained or EXPLAINED)
    if config.kind == "free_energy":
        energies = free_energies(artifact, frame, span)
    if config.kind == "regions":
        symbols = visited_regions(artifact, frame, early, stop)
    for place, name in enumerate(ids):
        try:
            if config.kind == "latent":
                scores = latent[name]
            elif config.kind == "free_energy":
                expected[place] = energies[name].expected
                scores = energies[name].costs(values[place], config.part or "both", impossible=0.5 * FAR_OUT**2)
            elif config.kind == "reconstruction":
                rows = observed_values(observed, (name,), first, stop)[0]
                model = fit_window_pca(
                    observed_values(observed, (name,), *training)[0], window, config.explained or EXPLAINED
                )
                expected[place] = model.expected(rows, config.overlap_reduction or "last")[window - 1 :]
                scores = values[place] - expected[place]
            elif config.kind == "regions":
                known = symbols[name]
                sizes = _sizes(config, window)
                scores = region_scores(
                    known[first - early :], known[training[0] - early : training[1] - early], **sizes
                )
                scores = scores[window - 1 :, None]
            else:
                scores = _dynamics(config, observed, name, (first, stop), training)[window - 1 :]
        except DataError as error:
            raise DataError(f"series '{name}': {error}") from error
        found[place, :, 0] = scores
    return Deviations(ids, start, found, values, expected)


def _sizes(config: ScoreConfig, window: int) -> dict[str, int]:
    return {"window": window, "stride": config.stride or max(window // 50, 1)}


def _dynamics(
    config: ScoreConfig, observed: Panel, name: str, rows: tuple[int, int], training: tuple[int, int]
) -> FloatArray:
    """Return the scores [T, V] of spectra or visited states."""
    values, reference = (observed_values(observed, (name,), *part)[0] for part in (rows, training))
    sizes = _sizes(config, config.window or DEFAULT_WINDOW)
    if config.kind == "spectrum":
        return spectrum_scores(values, reference, **sizes)
    return state_scores(values, reference, **sizes, bins=config.bins or 12, lag=config.lag)


def observed_values(panel: Panel, series_ids: tuple[str, ...], start: int, stop: int) -> FloatArray:
    """Return the targets of absolute rows [start, stop) as [S, T, V]; NaN where not observed or beyond the series."""
    rows, indptr, offset = panel.rows(start, stop)
    width = panel.num_targets
    values = np.full((panel.num_series, stop - start, width), np.nan)
    series = np.repeat(np.arange(panel.num_series), np.diff(indptr))
    place = offset[series] - start + np.arange(len(rows)) - indptr[series]
    values[series, place] = np.where(panel.target_observed[rows], panel.values[rows, :width], np.nan)
    number = {name: index for index, name in enumerate(panel.series_ids)}
    return values[[number[name] for name in series_ids]]
