"""Sample paths: futures drawn jointly over the horizon and the variates, whose every step has the published quantiles.

A path is one draw of the copula that the artifact stores (``dependence``), taken through the quantile function of each
cell (``metrics.quantile_function``: linear in Normal scores between the published levels, exponential beyond them). By
default the draws are stratified: in every cell the k-th smallest of P becomes the quantile at (k - 1/2) / P, so that
even few paths have the published quantiles, while their order, and with it the dependence, stays random. Series are
drawn independently of each other; the paths of a series depend on the seed, its name and the cutoff, not on what else
is drawn.

Aggregates over the horizon (a total, a mean, a peak) come from paths: their quantiles are not those of the steps added.

Source: Schefzik, Thorarinsdottir, Gneiting (2013), Statistical Science 28:616-640 (marginals and a copula of ranks);
Stein (1987), Technometrics 29:143-151 (stratified draws with dependence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.artifact import Artifact
from tsforge.contracts.tables import Forecast, quantile_column
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.seeding import derive_seed
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.panel import Panel
from tsforge.forecasting.dependence import (
    Dependence,
    artifact_dependence,
    finite_marginals,
    independent,
    marginal_levels,
)
from tsforge.forecasting.predict import direct_forecasts, forecast_table, predict, prediction_windows, published_windows
from tsforge.forecasting.window_forecasts import WindowForecasts
from tsforge.metrics.quantile_function import quantile_at
from tsforge.metrics.samples import energy_score, variogram_score
from tsforge.metrics.summary import quantile_name

FloatArray = NDArray[np.float64]
Aggregate = Literal["sum", "mean", "max", "min"]

PATHS = 200
_DRAWN = 2_000_000  # values of paths held at a time while scoring
_JOINT = ("energy", "energy_apart", "variogram", "variogram_apart")
SCORED_WINDOWS = 60  # of a fit in a backtest
SCORED_PATHS = 64  # of the scores of a backtest: the fair energy score is unbiased whatever the number


def draw_paths(
    quantiles: FloatArray,
    levels: Sequence[float],
    dependence: Dependence,
    paths: int,
    seeds: Sequence[int],
    *,
    stratified: bool = True,
) -> FloatArray:
    """Return sample paths of N windows.

    Args:
        quantiles: of the marginals, ascending, finite.
        levels: where they are known, at least two.
        dependence: the copula; its first H steps are used.
        paths: number of draws P.
        seeds: one a window.
        stratified: marginals exact for any P; False: independent draws, which unbiased scores need.

    Shapes:
        quantiles [N, H, V, Q] -> [N, P, H, V].
    Raises:
        ConfigError: no path is asked for, or more steps than the copula has.
    """
    count, steps, number, _ = quantiles.shape
    if paths < 1:
        raise ConfigError(f"{paths} sample paths were asked for; ask for at least 1")
    if steps > dependence.horizon:
        raise ConfigError(f"paths of {steps} steps were asked for, the dependence covers {dependence.horizon}")
    result = np.empty((count, paths, steps, number))
    grid = (np.arange(paths) + 0.5) / paths
    for index in range(count):
        uniforms = dependence.uniforms(paths, steps, np.random.default_rng(seeds[index]))
        if stratified:
            values = np.moveaxis(quantile_at(quantiles[index], levels, grid), -1, 0)
            ranks = uniforms.argsort(axis=0).argsort(axis=0)
            result[index] = np.take_along_axis(values, ranks, axis=0)
        else:
            inner = np.clip(np.moveaxis(uniforms, 0, -1), 1e-12, 1.0 - 1e-12)
            result[index] = np.moveaxis(quantile_at(quantiles[index], levels, inner), -1, 0)
    return result


def predict_paths(
    artifact: Artifact,
    frame: SeriesFrame,
    paths: int = PATHS,
    *,
    seed: int = 0,
    aggregate: Aggregate | None = None,
    quantile_levels: Sequence[float] | None = None,
    cutoff: TimeLike | None = None,
    horizon: int | None = None,
) -> Forecast:
    """Return the forecast of ``predict`` together with sample paths or with an aggregate over the horizon.

    Args:
        artifact: with a dependence structure.
        frame, quantile_levels, cutoff, horizon: as in ``predict``; a horizon beyond the trained one has no quantiles,
            so no paths.
        paths: draws a series and cutoff.
        seed: same seed, same paths.
        aggregate: ``sum, mean, max`` or ``min`` over the steps; the forecast then has ``aggregates``, not ``paths``.

    Raises:
        ConfigError: the artifact has no dependence structure, or gives points only.
        ArtifactError, DataError, ModelError: as in ``predict``; DataError also when fewer than three levels are finite.
    """
    dependence = artifact_dependence(artifact)
    forecast = predict(artifact, frame, quantile_levels=quantile_levels, cutoff=cutoff, horizon=horizon)
    steps = int(forecast.metadata["horizon"])
    panel, windows = prediction_windows(artifact, frame, cutoff, artifact.window.horizon)
    levels = marginal_levels(artifact)
    found = direct_forecasts(artifact, windows, levels, steps)
    kept = published_windows(artifact, panel, found)
    found = WindowForecasts(
        mean=found.mean[kept],
        quantiles=None if found.quantiles is None else found.quantiles[kept],
        target=None,
        mask=None,
        scale=found.scale[kept],
        series_index=found.series_index[kept],
        cutoff_index=found.cutoff_index[kept],
    )
    quantiles, levels = finite_marginals(found.quantiles, levels)
    names = [panel.series_ids[index] for index in found.series_index]
    seeds = [derive_seed(seed, name, int(row)) for name, row in zip(names, found.cutoff_index, strict=True)]
    values = draw_paths(quantiles, levels, dependence, paths, seeds)
    facts = {**forecast.metadata, "paths": paths, "seed": seed, "dependence": dependence.kind}
    if aggregate is not None:
        table = aggregate_table(values, found, panel, aggregate, forecast.quantile_levels)
        return replace(forecast, aggregates=table, metadata={**facts, "aggregate": aggregate})
    return replace(forecast, paths=path_table(values, found, panel), metadata=facts)


def path_table(values: FloatArray, forecasts: WindowForecasts, panel: Panel) -> pl.DataFrame:
    """Return paths [N, P, H, V] as a table: ``series_id, cutoff, step, time, variate, path`` (from 0) and ``value``."""
    number = values.shape[1]
    cells = forecast_table(forecasts, panel, ()).drop("mean")
    order = np.moveaxis(values, 1, -1).reshape(-1, number)  # [cells, P]
    table = cells.select(pl.all().repeat_by(number).explode()).with_columns(
        pl.Series("path", np.tile(np.arange(number, dtype=np.int32), len(order))), pl.Series("value", order.ravel())
    )
    return table


def aggregate_table(
    values: FloatArray,
    forecasts: WindowForecasts,
    panel: Panel,
    aggregate: Aggregate,
    levels: Sequence[float],
) -> pl.DataFrame:
    """Return one row a window and variate with the quantiles of an aggregate over the paths [N, P, H, V].

    Columns ``series_id, cutoff, first_time, last_time, steps, variate, aggregate, mean`` and one a level.
    """
    totals: FloatArray = getattr(values, aggregate)(axis=2)  # [N, P, V]
    ends = forecast_table(forecasts, panel, ()).group_by("series_id", "cutoff", "variate", maintain_order=True)
    table = ends.agg(
        pl.col("time").first().alias("first_time"),
        pl.col("time").last().alias("last_time"),
        pl.len().cast(pl.Int32).alias("steps"),
    )
    columns = {"mean": totals.mean(axis=1).ravel()}
    if levels:
        found = np.quantile(totals, list(levels), axis=1)
        columns |= {quantile_column(level): found[place].ravel() for place, level in enumerate(levels)}
    keys = ("series_id", "cutoff", "first_time", "last_time", "steps", "variate")
    return table.select(*keys, pl.lit(aggregate).alias("aggregate")).with_columns(
        pl.Series(name, column) for name, column in columns.items()
    )


def path_scores(
    forecasts: pl.DataFrame,
    levels: Sequence[float],
    dependence: Dependence,
    variates: Sequence[str],
    *,
    paths: int = SCORED_PATHS,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how good the joint forecast of every window was, from its published quantiles and the copula.

    Args:
        forecasts: long, of one model: ``series_id, cutoff, step, variate, actual`` and one ``q...`` column a level;
            every window has all steps and variates.
        levels: ascending levels present; those with infinite bounds are left out.
        dependence: of the artifact that made the forecasts.
        variates: its targets, in the order of the dependence.
        paths: independent draws a window.
        seed: same seed, same scores.

    Returns:
        ``series_id, cutoff, variate, energy`` (fair energy score over the horizon, data units), ``variogram`` (order
        0.5) and ``cells`` (steps observed); windows with none are left out.

    Raises:
        DataError: a window lacks cells, or fewer than three levels are finite.
    """
    order = {name: place for place, name in enumerate(variates)}
    table = forecasts.with_columns(pl.col("variate").replace_strict(order, return_dtype=pl.Int32).alias("_place"))
    table = table.sort("series_id", "cutoff", "step", "_place")
    steps, number = table["step"].n_unique(), len(variates)
    windows = table.select("series_id", "cutoff").unique(maintain_order=True)
    if table.height != windows.height * steps * number:
        raise DataError(
            f"{windows.height} windows of {steps} steps and {number} variates have {table.height} rows; every window "
            "needs all cells"
        )
    shape = (windows.height, steps, number)
    parts = [table[quantile_name(level)].cast(pl.Float64).fill_null(np.nan).to_numpy() for level in levels]
    finite = [place for place, part in enumerate(parts) if np.isfinite(part).all()]
    if len(finite) < 3:
        raise DataError(f"{len(finite)} of {len(parts)} quantile levels are finite, a distribution needs three")
    quantiles = np.stack([parts[place] for place in finite], axis=-1).reshape(*shape, len(finite))
    actual = table["actual"].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(shape)
    kept = [levels[place] for place in finite]
    seeds = [derive_seed(seed, *row) for row in windows.iter_rows()]
    energy, variogram = np.empty((shape[0], number)), np.empty((shape[0], number))
    chunk = max(1, _DRAWN // (paths * steps * number))
    for start in range(0, shape[0], chunk):  # paths of all windows would not fit
        part = slice(start, start + chunk)
        drawn = draw_paths(quantiles[part], kept, dependence, paths, seeds[part], stratified=False)
        target, samples = actual[part].transpose(0, 2, 1), drawn.transpose(0, 3, 1, 2)
        energy[part], variogram[part] = energy_score(target, samples), variogram_score(target, samples)
    scored = windows.select(pl.all().repeat_by(number).explode()).with_columns(
        pl.Series("variate", list(variates) * shape[0], dtype=pl.String),
        pl.Series("energy", energy.ravel()).fill_nan(None),
        pl.Series("variogram", variogram.ravel()).fill_nan(None),
        pl.Series("cells", (~np.isnan(actual)).sum(axis=1).ravel()),
    )
    return scored.filter(pl.col("cells") > 0)


def joint_scores(artifact: Artifact, forecasts: pl.DataFrame, levels: Sequence[float]) -> dict[str, float | int | None]:
    """Return mean scores of the joint forecast of one fit, and of the same quantiles with independent steps.

    Args:
        artifact: that made the forecasts.
        forecasts: as in ``path_scores``; at most ``SCORED_WINDOWS`` evenly spaced windows count.
        levels: ascending levels present.

    Returns:
        ``energy, energy_apart, variogram, variogram_apart`` and ``joint_windows`` (windows and variates behind them);
        None and 0 where the artifact has no dependence structure or fewer than three finite levels.
    """
    scores: dict[str, float | int | None] = dict.fromkeys(_JOINT)
    scores["joint_windows"] = 0
    finite = [level for level in levels if forecasts[quantile_name(level)].is_finite().all()]
    if artifact.dependence is None or len(finite) < 3:
        return scores
    windows = forecasts.select("series_id", "cutoff").unique(maintain_order=True)
    places = np.unique(np.linspace(0, windows.height - 1, min(windows.height, SCORED_WINDOWS)).round().astype(int))
    chosen = forecasts.join(windows[places], on=["series_id", "cutoff"], how="semi")
    joint = artifact_dependence(artifact)
    for suffix, dependence in (("", joint), ("_apart", independent(joint.horizon, len(artifact.schema.targets)))):
        found = path_scores(chosen, finite, dependence, artifact.schema.targets)
        scores["joint_windows"] = found.height
        for name in ("energy", "variogram"):
            scores[name + suffix] = found.select(pl.col(name).mean()).item()
    return scores


def mean_joint_scores() -> list[pl.Expr]:
    """Return the means over fits of what ``joint_scores`` gave, each fit by its windows; null where there are none."""
    weight = pl.col("joint_windows")
    total = pl.when(weight.sum() > 0).then(weight.sum())
    return [((pl.col(name) * weight).sum() / total).alias(name) for name in _JOINT]
