"""How a new value compares with what was expected of it: interval, score, table.

A score here needs no calibration span: it reads the interval the artifact already has. ``tsforge.anomaly`` fits its
scale, threshold and p-values on rows of their own and remains the detector to alarm with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.artifact import Artifact
from tsforge.data.panel import Panel
from tsforge.forecasting.predict import calibrated_quantiles, network_levels, offered_levels
from tsforge.forecasting.window_forecasts import FloatArray, WindowForecasts

SCORE_COLUMNS = ("series_id", "time", "variate", "value", "expected", "low", "high", "score", "outside")


def interval_levels(artifact: Artifact) -> tuple[float, ...]:
    """Return the two quantile levels of the widest central interval with finite bounds one step ahead, or ().

    A calibrated artifact gives the widest coverage that has enough held-out windows for the most variates; others the
    outermost levels of their likelihood. Points without calibration have no interval.
    """
    if artifact.calibration is None:
        levels = offered_levels(artifact)
        return () if len(levels) < 2 else (levels[0], levels[-1])
    first = artifact.calibration.filter(pl.col("step") == 1)
    counts = first.group_by("level").agg(pl.col("high").is_finite().sum().alias("variates"))
    best = counts.filter(pl.col("variates") > 0).sort("variates", "level").tail(1)
    if not best.height:
        return ()
    half = float(best["level"][0]) / 2.0
    return (round(0.5 - half, 9), round(0.5 + half, 9))


def expectations(
    artifact: Artifact,
    forecasts: WindowForecasts,
    levels: Sequence[float],
    steps: NDArray[np.int64],
    panel: Panel | None = None,
) -> FloatArray:
    """Return mean, low and high [B, 3, V] of one step of each forecast; NaN beyond the horizon or without interval.

    Args:
        artifact: its calibration applies, as in ``predict``.
        forecasts: B windows, with quantiles at ``network_levels(artifact, levels)``.
        levels: low and high of ``interval_levels``, or ().
        steps: [B], from 0.
        panel: what the windows lie in, for a calibration that looks at it.
    """
    horizon = forecasts.mean.shape[1]
    reach = int(np.minimum(steps, horizon - 1).max(initial=0)) + 1
    near = first_steps(forecasts, reach)
    bounds = interval_bounds(artifact, near, levels, panel) if levels else np.full((*near.mean.shape, 2), np.nan)
    found = np.stack([near.mean, bounds[..., 0], bounds[..., 1]], axis=2)  # [B, reach, 3, V]
    picked = found[np.arange(len(found)), np.minimum(steps, reach - 1)]
    return np.where((np.isfinite(picked)) & (steps < horizon)[:, None, None], picked, np.nan)


def interval_bounds(
    artifact: Artifact, forecasts: WindowForecasts, levels: Sequence[float], panel: Panel | None = None
) -> FloatArray:
    """Return the quantiles [B, H, V, Q] that are published of windows, calibrated where the artifact is.

    Args:
        artifact, forecasts, panel: as in ``expectations``.
        levels: ascending; each with its mirror image where the artifact is calibrated.

    Raises:
        ConfigError: the calibration looks at the windows, and there is no panel.
    """
    if artifact.calibration is not None:
        return calibrated_quantiles(artifact, forecasts, levels, panel, tell=False)
    return np.full((*forecasts.mean.shape, len(levels)), np.nan) if forecasts.quantiles is None else forecasts.quantiles


def first_steps(forecasts: WindowForecasts, count: int) -> WindowForecasts:
    """Return the first ``count`` steps of windows without a future."""
    quantiles = None if forecasts.quantiles is None else forecasts.quantiles[:, :count]
    return replace(forecasts, mean=forecasts.mean[:, :count], quantiles=quantiles)


def asked_of_network(artifact: Artifact, levels: Sequence[float]) -> tuple[float, ...]:
    """Return the levels to ask of the network for an interval at ``levels``."""
    return network_levels(artifact, levels) if levels else ()


def score_table(
    ids: pl.Series, times: pl.Series, variates: Sequence[str], values: FloatArray, expected: FloatArray, coverage: float
) -> pl.DataFrame:
    """Return one row a judged cell, in the order of rows and variates; columns ``SCORE_COLUMNS``.

    ``score`` = |value - expected| / (half the interval / normal quantile of its coverage): about |z| of a normal law.
    Zero width scores 0 where value and expectation are equal, else infinity; infinite width gives no score.

    Args:
        ids, times: of the rows [N].
        variates: names along V.
        values: [N, V], NaN = nothing to judge.
        expected: mean, low, high [N, 3, V].
        coverage: of the interval.
    """
    row, column = np.nonzero(~np.isnan(values))
    value, (mean, low, high) = values[row, column], np.moveaxis(expected, 1, 0)[:, row, column]
    unit = (high - low) / 2.0 / (NormalDist().inv_cdf((1.0 + coverage) / 2.0) if coverage > 0 else 1.0)
    distance = np.abs(value - mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where((unit == 0) & (distance == 0), 0.0, distance / unit)
    score[np.isinf(unit)] = np.nan
    numbers = {"value": value, "expected": mean, "low": low, "high": high, "score": score}
    columns = [
        ids.gather(row).alias("series_id"),
        times.gather(row).alias("time"),
        pl.Series("variate", variates, dtype=pl.String).gather(column),
        *(pl.Series(name, found, dtype=pl.Float64).fill_nan(None) for name, found in numbers.items()),
    ]
    outside = (pl.col("value") < pl.col("low")) | (pl.col("value") > pl.col("high"))
    return pl.DataFrame(columns).with_columns(outside.alias("outside"))
