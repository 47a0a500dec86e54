"""Rolling-origin backtest: forecast the past from many cutoffs, as it would have been done then.

A fit receives the frame cut off at its cutoff, so it cannot see what came later; a window ends at its cutoff. Scaling,
calibration and the units of scaled metrics belong to the fit, so they are taken anew with every refit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from tsforge.artifact import Artifact, match_frame
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import show_time
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.baselines import BASELINES, fit_baseline, frame_season
from tsforge.forecasting.predict import (
    forecast_table,
    network_levels,
    offered_levels,
    padded_panel,
    published_quantiles,
    published_windows,
)
from tsforge.forecasting.report import BacktestReport
from tsforge.forecasting.window_forecasts import FloatArray, predict_windows
from tsforge.metrics.point import seasonal_scale
from tsforge.metrics.ranking import leaderboard, skill_score
from tsforge.metrics.summary import metric_table, score_cells, summarise

_LOG = get_logger(__name__)

Fit = Callable[[SeriesFrame, Any], Artifact]


class BacktestConfig(Config):
    """Which cutoffs, and how often to fit again."""

    num_cutoffs: int = Field(10, ge=1)
    """Cutoffs; the last one leaves exactly one horizon of observed data."""
    stride: int | None = Field(None, ge=1)
    """Steps between cutoffs; default one horizon, so that no row is forecast twice."""
    refit_every: int = Field(0, ge=0)
    """Fit again at every k-th cutoff; 0 fits once, at the first."""
    horizon: int | None = Field(None, ge=1)
    """Steps to grade; default the trained horizon."""
    season_length: int | None = Field(None, ge=1)
    """Season of the naive forecast and of the scaled metrics; default from the frequency, else found in the data."""
    baselines: tuple[str, ...] = BASELINES
    """Naive forecasts beside the model; ``last_value`` is always among them."""
    quantile_levels: tuple[float, ...] | None = None
    """Default: every level the artifact offers."""

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in BASELINES]
        if unknown:
            raise ValueError(f"unknown baseline(s) {listing(unknown)} (known: {listing(BASELINES)})")
        return tuple(dict.fromkeys(("last_value", *names)))


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Cutoffs that share one fit: absolute rows of their last visible row."""

    number: int
    cutoffs: NDArray[np.int64]


def backtest(
    fit: Fit | Mapping[str, Fit],
    frame: SeriesFrame,
    config: BacktestConfig | None = None,
    *,
    horizon: int,
    progress: bool = False,
) -> BacktestReport:
    """Return forecasts and grades of one or several models and the naive forecasts from the same cutoffs.

    Only windows that every model could forecast are graded, so all numbers rest on the same cells.

    Args:
        fit: from a frame that ends at the cutoff, and that cutoff, to an artifact; or several of them by name.
        frame: the data, all series at once.
        config: cutoffs and refits.
        horizon: steps the fits forecast; ``config.horizon`` may grade fewer.
        progress: log a line for each fit.

    Raises:
        DataError: too few rows for the cutoffs, or no observed cell to grade.
        ConfigError: more steps than trained.
    """
    config = config or BacktestConfig()
    fits = dict(fit) if isinstance(fit, Mapping) else {"": fit}
    if not fits:
        raise ConfigError("there is no model to backtest")
    steps = config.horizon or horizon
    folds = _folds(frame, config, steps)
    season = frame_season(frame.until(frame.grid.time_at(int(folds[0].cutoffs[0]))), config.season_length)
    parts: list[pl.DataFrame] = []
    scales: list[pl.DataFrame] = []
    timings: list[dict[str, Any]] = []
    levels: dict[str, tuple[float, ...]] = {}
    for fold in folds:
        visible = frame.until(frame.grid.time_at(int(fold.cutoffs[0])))
        scales.append(_scales(visible, season, frame, fold))
        done: set[str] = set()
        for name, make in _makers(fits, visible, frame, config, (steps, season)):
            if name in done:  # an unnamed fit turned out to be this baseline
                continue
            asked = config.quantile_levels
            if asked is None and name not in fits:  # scores of quantiles compare at equal levels only
                asked = next((found for found in levels.values() if found), None)
            table, offered, timing = _run_fold(name, make, frame, fold, (steps, asked))
            done.add(timing["model"])
            levels[timing["model"]] = offered
            parts.append(table)
            timings.append(timing)
            if progress:
                log_event(_LOG, f"fold {fold.number + 1} of {len(folds)}", **timing)
    forecasts = pl.concat(parts, how="diagonal")
    return _report(forecasts, pl.concat(scales), levels, pl.DataFrame(timings), (config, steps, season))


def _folds(frame: SeriesFrame, config: BacktestConfig, steps: int) -> list[_Fold]:
    panel = Panel.from_frame(frame)
    first, stop = panel.span()
    stride = config.stride or steps
    last = stop - 1 - steps
    cutoffs = last - stride * np.arange(config.num_cutoffs)[::-1]
    if cutoffs[0] < first:
        possible = max(0, (last - first) // stride + 1)
        raise DataError(
            f"{config.num_cutoffs} cutoffs {stride} steps apart with horizon {steps} need "
            f"{stride * (config.num_cutoffs - 1) + steps + 1} rows, the data has {stop - first} "
            f"(from {show_time(frame.grid.time_at(first))}); at most {possible} cutoffs fit"
        )
    every = config.refit_every or config.num_cutoffs
    starts = range(0, len(cutoffs), every)
    return [_Fold(number=number, cutoffs=cutoffs[at : at + every]) for number, at in enumerate(starts)]


Maker = Callable[[], Artifact]


def _makers(
    fits: Mapping[str, Fit],
    visible: SeriesFrame,
    frame: SeriesFrame,
    config: BacktestConfig,
    sizes: tuple[int, int],
) -> list[tuple[str, Maker]]:
    """Return name and fit of every model and baseline for one fold; a single unnamed fit is named by its artifact."""
    steps, season = sizes
    cutoff = visible.table["time"].max()

    def of(fit: Fit) -> Maker:
        return lambda: fit(visible, cutoff)

    def naive(name: str) -> Maker:
        complete = len(frame.series_ids) > 1 and visible.series_ids == frame.series_ids
        return lambda: fit_baseline(
            name, visible, horizon=steps, season=season, context_length=max(season, 2), per_series=complete
        )

    return [(name, of(fit)) for name, fit in fits.items()] + [
        (name, naive(name)) for name in config.baselines if name not in fits
    ]


def _run_fold(
    name: str,
    make: Maker,
    frame: SeriesFrame,
    fold: _Fold,
    wanted: tuple[int, Sequence[float] | None],
) -> tuple[pl.DataFrame, tuple[float, ...], dict[str, Any]]:
    """Return the graded forecasts of one model over one fold, the levels in them, and what it cost."""
    started = time.perf_counter()
    artifact = make()
    fitted = time.perf_counter()
    steps, asked = wanted
    if steps > artifact.window.horizon:
        raise ConfigError(
            f"horizon {steps} is beyond the {artifact.window.horizon} steps of artifact {artifact.id}; fit with more"
        )
    offered = offered_levels(artifact)
    levels = offered if asked is None or not offered else tuple(asked)
    table = forecasts_at(artifact, frame, fold.cutoffs, steps=steps, levels=levels)
    label = name or artifact.model_name
    timing = {
        "model": label,
        "fold": fold.number,
        "cutoff": frame.grid.time_at(int(fold.cutoffs[0])),
        "num_cutoffs": len(fold.cutoffs),
        "artifact_id": artifact.id,
        "fit_seconds": fitted - started,
        "predict_seconds": time.perf_counter() - fitted,
    }
    return table.select(pl.lit(label).alias("model"), pl.all()), levels, timing


def forecasts_at(
    artifact: Artifact,
    frame: SeriesFrame,
    cutoffs: NDArray[np.int64],
    *,
    steps: int,
    levels: Sequence[float] = (),
) -> pl.DataFrame:
    """Return the forecasts of all series from every cutoff with their ``actual`` values (null where not observed).

    Args:
        artifact: the fitted network; windows end at their cutoff, whatever the frame holds after it.
        frame: the data.
        cutoffs: rows on the frame's grid of the last visible row; series too short there are left out, for a model that
            couples series those with nothing observed in the context (with a warning).
        steps: at most the trained horizon.
        levels: quantile levels, calibrated if the artifact is.
    """
    frame = match_frame(artifact, frame)
    shift = int(artifact.grid.index_of(pl.Series([frame.grid.time_at(0)], dtype=frame.table["time"].dtype))[0])
    first = np.asarray(cutoffs, dtype=np.int64) + 1 + shift
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    panel = padded_panel(artifact, frame, int(first.max()) + spec.horizon)
    windows = WindowDataset(
        panel,
        spec,
        int(first.min()),
        int(first.max()) + spec.horizon,
        aligned=artifact.network.capabilities.rows_coupled,
    )
    starts = windows.cutoff_index[:: windows.rows_per_item]
    chosen = np.flatnonzero(np.isin(starts, first))
    found = predict_windows(artifact.network, windows, network_levels(artifact, levels), indices=chosen)
    cut = replace(
        found,
        mean=found.mean[:, :steps],
        quantiles=None if found.quantiles is None else found.quantiles[:, :steps],
    )
    cut = replace(cut, quantiles=published_quantiles(artifact, cut, levels))
    actual = actual_values(panel, found.series_index, found.cutoff_index, steps)
    keep = published_windows(artifact, panel, found)
    table = forecast_table(cut, panel, levels, keep=keep)
    return table.with_columns(pl.Series("actual", actual[keep].ravel()).fill_nan(None))


def actual_values(panel: Panel, series: NDArray[np.int64], cutoff: NDArray[np.int64], steps: int) -> FloatArray:
    """Return observed targets [N, steps, V] in double precision from row ``cutoff`` on, NaN elsewhere."""
    rows = (panel.indptr[series] + cutoff - panel.offset[series])[:, None] + np.arange(steps)  # [N, H]
    inside = (rows >= panel.indptr[series][:, None]) & (rows < panel.indptr[series + 1][:, None])
    rows = np.where(inside, rows, 0)
    seen = panel.target_observed[rows] & inside[..., None]
    return np.where(seen, panel.values[rows][..., : panel.num_targets], np.nan)


def _scales(visible: SeriesFrame, season: int, frame: SeriesFrame, fold: _Fold) -> pl.DataFrame:
    """Return the MASE unit of every series and variate from the rows visible to the fit, for each cutoff of a fold."""
    panel = Panel.from_frame(visible)
    targets = panel.schema.targets
    records = []
    for index, name in enumerate(panel.series_ids):
        rows = slice(int(panel.indptr[index]), int(panel.indptr[index + 1]))
        unit = seasonal_scale(panel.values[rows, : len(targets)], season, panel.target_observed[rows]).value
        records += [{"series_id": name, "variate": v, "scale": float(u)} for v, u in zip(targets, unit, strict=True)]
    table = pl.DataFrame(records, schema={"series_id": pl.String, "variate": pl.String, "scale": pl.Float64})
    times = pl.DataFrame({"cutoff": frame.grid.time_at(fold.cutoffs)})
    return table.join(times, how="cross")


def _common_windows(forecasts: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the forecasts of windows that every model has, and a note about the others."""
    windows = forecasts.select("model", "series_id", "cutoff").unique()
    number = windows["model"].n_unique()
    shared = windows.group_by("series_id", "cutoff").len().filter(pl.col("len") == number).drop("len")
    common = forecasts.join(shared, on=["series_id", "cutoff"], how="semi", maintain_order="left")
    total = windows.select("series_id", "cutoff").unique().height
    if shared.height == total:
        return common, []
    return common, [f"{total - shared.height} of {total} windows are not graded: some model had too little history"]


def _report(
    forecasts: pl.DataFrame,
    scales: pl.DataFrame,
    levels: Mapping[str, tuple[float, ...]],
    timings: pl.DataFrame,
    about: tuple[BacktestConfig, int, int],
) -> BacktestReport:
    config, steps, season = about
    common, notes = _common_windows(forecasts)
    if not common["actual"].drop_nulls().len():
        raise DataError("no observed cell to grade: the series are too short for the context, or all missing there")
    models = list(levels)
    reference = "seasonal_naive" if season > 1 and "seasonal_naive" in models else "last_value"
    metrics, wide, losses = [], [], []
    for model in models:
        cells = score_cells(common.filter(model=model), levels[model], scales)
        metrics.append(metric_table(cells).select(pl.lit(model).alias("model"), pl.all()))
        wide.append(summarise(cells).select(pl.lit(model).alias("model"), pl.all()))
        rows = cells.group_by("series_id", "variate", "cutoff").agg(pl.col("absolute").mean().alias(model))
        losses.append(rows)
    table = losses[0]
    for other in losses[1:]:
        table = table.join(other, on=["series_id", "variate", "cutoff"])
    board = leaderboard(table, models, reference).select("model", "mean_rank", "win_share", "p_value")
    summary = pl.concat(wide, how="diagonal").join(board, on="model")
    costs = timings.group_by("model").agg(pl.col("fit_seconds", "predict_seconds").sum(), pl.len().alias("fits"))
    summary = _with_skill(summary.join(costs, on="model"), reference).sort("mean_rank", "model")
    if len({found for found in levels.values() if found}) > 1:
        notes.append("models offer different quantile levels: their wql and crps do not compare, set quantile_levels")
    if scales["scale"].is_nan().any():
        units = scales.select("series_id", "variate", "scale").unique(["series_id", "variate"])
        flat = int(units["scale"].is_nan().sum())
        notes.append(f"MASE is undefined for {flat} of {units.height} series-variates (constant or too short to fit)")
    settings = {
        **config.model_dump(mode="json"),
        "horizon": steps,
        "season_length": season,
        "reference": reference,
        "cutoffs": [str(item) for item in common["cutoff"].unique().sort().to_list()],
        "quantile_levels": {model: list(found) for model, found in levels.items()},
    }
    return BacktestReport(
        forecasts=forecasts,
        metrics=pl.concat(metrics),
        leaderboard=summary,
        folds=timings,
        settings=settings,
        notes=tuple(notes),
    )


def _with_skill(summary: pl.DataFrame, reference: str) -> pl.DataFrame:
    """Add ``skill_mae, skill_mse`` and, where there are quantiles, ``skill_crps`` against the reference."""
    base = summary.filter(model=reference)
    for name in ("mse", "mae", "crps"):
        if name in summary.columns:
            ours = summary[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
            theirs = base[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
            skill = pl.Series(f"skill_{name}", skill_score(ours, np.broadcast_to(theirs, ours.shape))).fill_nan(None)
            summary = summary.with_columns(skill)
    return summary
