"""How far every row lies from the forecasts made before it: the arrays a score model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.contexts import context_traces
from tsforge.anomaly.growth import free_runs
from tsforge.anomaly.residuals import tail_to_normal
from tsforge.anomaly.uncomparable import Uncomparable
from tsforge.anomaly.windowed import (
    FAR_OUT,
    UNCOMPARED,
    WindowJudge,
    fit_window_judge,
    trace_function,
    training_traces,
)
from tsforge.artifact import Artifact
from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.forecasting.rolling import Output, RollingForecasts, rolling_forecasts

FloatArray = NDArray[np.float64]
MAX_STEPS = 8
LONGEST_STEP = 24
BYTES_PER_CHUNK = 256_000_000
INTERVAL = 0.8


@dataclass(frozen=True)
class WindowedSeries:
    """The windowed score of a series, and the traces of the last ``reach + latency`` rows before the span's end."""

    judge: WindowJudge
    trail: FloatArray


@dataclass(frozen=True)
class Deviations:
    """Rows ``start, start + 1, ...`` of every series against their forecasts.

    Shapes:
        deviations [S, T, K, V] of K steps in the units of the kind of score (residuals in data units, normal deviates
        of the predictive tail, half-widths of an interval, ...); values and expected [S, T, V] in data units, expected
        by the nearest step. NaN where not observed or not forecast.

    Attributes:
        windowed: of windowed kinds, what judges the rows of each series.
        lacking: of these kinds, series without deviations, since their training rows hold too little.
    """

    series_ids: tuple[str, ...]
    start: int
    deviations: FloatArray
    values: FloatArray
    expected: FloatArray
    windowed: Mapping[str, WindowedSeries] = field(default_factory=dict)
    lacking: Mapping[str, Uncomparable] = field(default_factory=dict)


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
    seen: Panel | None = None,
) -> Deviations:
    """Return the deviations of absolute rows [start, stop); each forecast is made from rows before the one it is for.

    Of windowed kinds these are distances of the window that ends with a row, the same for all variates with
    ``regions`` and states that all variates share; nothing is expected then. Reconstructed rows are expected, with
    ``masked`` as the model tells hidden cells, with ``free_energy`` as it explains them.

    Args:
        artifact: the fitted network.
        frame: what the network sees.
        config: kind and steps of the deviations.
        span: absolute rows.
        observed: values to judge, on the artifact's grid; cells that the frame lacks (masked as impossible) count as
            far out.
        training: absolute rows that windows are compared with.
        seen: the frame as ``observed``, which is the default; values that it lacks say nothing of other rows.

    Raises:
        ModelError: ``tail``, ``interval`` or ``nll`` of an artifact that forecasts points only; ``regions``,
            ``growth``, ``masked``, ``latent`` or ``free_energy`` of a model that has nothing of the kind.
        DataError: a window that is too large.
    """
    if config.is_windowed:
        return _windowed(artifact, frame, config, span, observed, training, observed if seen is None else seen)
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
    seen: Panel,
) -> Deviations:
    start, stop = span
    ids, width = _present(observed), len(artifact.schema.targets)
    values = observed_values(observed, ids, start, stop)
    expected = np.full_like(values, np.nan)
    found = np.full((len(ids), stop - start, 1, width), np.nan)
    function = trace_function(artifact, config)
    learnt: dict[str, FloatArray] = {}
    if function is None:
        learnt = dict(zip(ids, seen_values(observed, seen, ids, *training), strict=True))
    elif config.kind not in UNCOMPARED:
        learnt = training_traces(artifact, frame, config, training, function)
    judges: dict[str, WindowJudge] = {}
    lacking: dict[str, Uncomparable] = {}
    for name in ids:
        try:
            judges[name] = fit_window_judge(config, learnt.get(name, np.empty((0, 1))))
        except Uncomparable as error:
            lacking[name] = error
    reach = max((judge.reach + judge.latency for judge in judges.values()), default=0)
    if function is None:
        traces = dict(zip(ids, seen_values(observed, seen, ids, start - reach, stop), strict=True))
    else:
        traces = context_traces(artifact, frame, (start - reach, stop), function)
    windowed: dict[str, WindowedSeries] = {}
    for place, name in enumerate(ids):
        if name in judges:
            judge, of_rows = judges[name], traces[name]
            until = max(stop - start - judge.latency, 0)  # the last rows have no score yet
            scored = judge.judge(of_rows[reach - judge.reach :], values[place, :until], start)
            found[place, :until, 0], expected[place, :until] = scored
            windowed[name] = WindowedSeries(judge, of_rows[len(of_rows) - judge.reach - judge.latency :])
    return Deviations(ids, start, found, values, expected, windowed, lacking)


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


def seen_values(observed: Panel, seen: Panel, series_ids: tuple[str, ...], start: int, stop: int) -> FloatArray:
    """Return ``observed_values`` without the cells that the network does not see: those masked as impossible."""
    values = observed_values(observed, series_ids, start, stop)
    return np.where(np.isnan(observed_values(seen, series_ids, start, stop)), np.nan, values)
