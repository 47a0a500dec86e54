"""How far every row lies from the forecasts made before it: the arrays a score model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import DEFAULT_WINDOW, ScoreConfig
from tsforge.anomaly.regions import visited_regions
from tsforge.anomaly.residuals import tail_to_normal
from tsforge.anomaly.window_scores import region_scores, spectrum_scores, state_scores
from tsforge.artifact import Artifact
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.forecasting.rolling import RollingForecasts, rolling_forecasts

FloatArray = NDArray[np.float64]
MAX_STEPS = 8
LONGEST_STEP = 24
BYTES_PER_CHUNK = 256_000_000
FAR_OUT = 50.0  # normal deviate of a value that the declared range calls impossible


@dataclass(frozen=True)
class Deviations:
    """Rows ``start, start + 1, ...`` of every series against their forecasts.

    Shapes:
        deviations [S, T, K, V] of K steps: residuals in data units, or normal deviates of the predictive tail; values
        and expected [S, T, V] in data units, expected by the nearest step. NaN where not observed or not forecast.
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
    ``regions``; nothing is expected then.

    Args:
        artifact: the fitted network.
        frame: what the network sees.
        config: kind and steps of the deviations.
        span: absolute rows.
        observed: values to judge, on the artifact's grid; cells that the frame lacks (masked as impossible) count as
            far out.
        training: absolute rows that windows are compared with.

    Raises:
        ModelError: ``kind: tail`` with an artifact that forecasts points only, ``regions`` of a model without them.
        DataError: too few training rows for a window.
    """
    if config.is_windowed:
        return _windowed(artifact, frame, config, span, observed, training)
    start, stop = span
    steps = used_steps(config, artifact.window.horizon)
    place = np.array(steps) - 1
    width = len(artifact.schema.targets)
    per_row = observed.num_series * steps[-1] * width * 8 * 3
    size = max(int(BYTES_PER_CHUNK // per_row), steps[-1])
    found: list[RollingForecasts] = []
    parts: list[FloatArray] = []
    for low in range(start, stop, size):
        part = rolling_forecasts(
            artifact,
            frame,
            low,
            min(low + size, stop),
            steps=steps[-1],
            outputs=("log_tail",) if config.kind == "tail" else (),
        )
        values = observed_values(observed, part.series_ids, low, min(low + size, stop))
        mean = part.mean[:, :, place]
        residual = values[:, :, None] - mean
        if config.kind == "tail" and part.log_tail is not None:
            deviate = tail_to_normal(np.copysign(np.maximum(-part.log_tail[:, :, place], 0.0), residual))
            impossible = (np.isnan(part.target) & ~np.isnan(values))[:, :, None]
            residual = np.where(impossible, np.copysign(FAR_OUT, residual), deviate)
        parts.append(residual)
        found.append(part)
    ids = found[0].series_ids
    return Deviations(
        series_ids=ids,
        start=start,
        deviations=np.concatenate(parts, axis=1),
        values=observed_values(observed, ids, start, stop),
        expected=np.concatenate([part.mean[:, :, steps[0] - 1] for part in found], axis=1),
    )


def _windowed(
    artifact: Artifact,
    frame: SeriesFrame,
    config: ScoreConfig,
    span: tuple[int, int],
    observed: Panel,
    training: tuple[int, int],
) -> Deviations:
    start, stop = span
    window = config.window or DEFAULT_WINDOW
    sizes = {"window": window, "stride": config.stride or max(window // 50, 1)}
    ids = tuple(name for name, rows in zip(observed.series_ids, observed.lengths, strict=True) if rows)
    first = start - window + 1  # rows before the span only fill its first windows
    width = len(artifact.schema.targets)
    found = np.full((len(ids), stop - start, 1, width), np.nan)
    symbols: dict[str, NDArray[np.int64]] = {}
    if config.kind == "regions":
        early = min(first, training[0])
        symbols = visited_regions(artifact, frame, early, stop)
    for place, name in enumerate(ids):
        try:
            if config.kind == "regions":
                known = symbols[name]
                reference = known[training[0] - early : training[1] - early]
                scores = region_scores(known[first - early :], reference, **sizes)[:, None]
            else:
                values = observed_values(observed, (name,), first, stop)[0]
                reference_values = observed_values(observed, (name,), *training)[0]
                if config.kind == "spectrum":
                    scores = spectrum_scores(values, reference_values, **sizes)
                else:
                    scores = state_scores(values, reference_values, **sizes, bins=config.bins or 12, lag=config.lag)
        except DataError as error:
            raise DataError(f"series '{name}': {error}") from error
        found[place, :, 0] = scores[window - 1 :]
    values = observed_values(observed, ids, start, stop)
    return Deviations(ids, start, found, values, np.full_like(values, np.nan))


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
