"""Rolling-origin backtest: forecast the past from many cutoffs, as it would have been done then.

A fit receives the frame cut off at its cutoff, so it cannot see what came later; a window ends at its cutoff. Scaling,
calibration and the units of scaled metrics belong to the fit, so they are taken anew with every refit.

Of data that was revised or published late (``VintageFrame``) a fit receives the publications up to the moment of its
cutoff, and every forecast is made from the frame as of the moment of its own cutoff: one frame a cutoff, so that
nothing that reads a frame can see a later value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.hierarchy import HierarchyConfig
from tsforge.data.vintages import History
from tsforge.forecasting.backtest_cold import (
    with_cold_start,
)
from tsforge.forecasting.backtest_folds import BacktestConfig, Fit, FoldOutcome, plan_folds
from tsforge.forecasting.coherent import with_level_errors
from tsforge.forecasting.comparison import KEYS, common_windows, compare, window_losses
from tsforge.forecasting.online_backtest import with_online
from tsforge.forecasting.regimes import block_rows, regime_table
from tsforge.forecasting.report import BacktestReport
from tsforge.forecasting.sample_paths import mean_joint_scores
from tsforge.metrics.pit import PIT_SCHEMA, pit_table
from tsforge.metrics.ranking import leaderboard, skill_score
from tsforge.metrics.summary import metric_table, score_cells, summarise

__all__ = ["BacktestConfig", "Elsewhere", "Fit", "backtest"]
_LOG = get_logger(__name__)

Elsewhere = Callable[[Sequence[int], int, Mapping[str, str]], Iterator[FoldOutcome]]
"""From numbers of folds, the season of the report and the names of its baselines, to their outcomes in any order."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What grading needs beside the forecasts, all of it from before the cutoffs."""

    scales: pl.DataFrame
    labels: pl.DataFrame
    levels: Mapping[str, tuple[float, ...]]
    folds: pl.DataFrame
    baselines: Mapping[str, str]
    """What the report calls each baseline."""


def backtest(
    fit: Fit | Mapping[str, Fit],
    frame: History,
    config: BacktestConfig | None = None,
    *,
    horizon: int,
    progress: bool = False,
    structure: HierarchyConfig | None = None,
    elsewhere: Elsewhere | None = None,
) -> BacktestReport:
    """Return forecasts and grades of one or several models and the naive forecasts from the same cutoffs.

    Only windows that every model could forecast are graded, so all numbers rest on the same cells.

    Args:
        fit: from a frame that ends at the cutoff, and that cutoff, to an artifact; or several of them by name.
        frame: the data, all series at once; with all publications, each cutoff sees what was out at its moment.
        config: cutoffs and refits.
        horizon: steps the fits forecast; ``config.horizon`` may grade fewer.
        progress: log a line for each fit.
        structure: what adds up to what, for ``config.reconcile``.
        elsewhere: runs the folds after the first in other processes; default one after the other in this one.

    Raises:
        DataError: too few rows for the cutoffs, or no observed cell to grade.
        ConfigError: more steps than trained, another truth where nothing was revised, or no cold start possible.
    """
    plan = plan_folds(fit, frame, config or BacktestConfig(), horizon, structure)
    outcomes = [plan.run(0, progress=progress)]
    rest = range(1, len(plan.folds))
    if elsewhere is None or not rest:
        outcomes += [plan.run(number, progress=progress) for number in rest]
    else:
        for outcome in elsewhere(rest, plan.season, outcomes[0].called):
            if progress:
                plan.tell(outcome.number, outcome.timings)
            outcomes.append(outcome)
    outcomes.sort(key=lambda outcome: outcome.number)
    forecasts = pl.concat([table for outcome in outcomes for table in outcome.forecasts], how="diagonal")
    levels = {name: offered for outcome in outcomes for name, offered in outcome.levels.items()}
    costs = pl.DataFrame([timing for outcome in outcomes for timing in outcome.timings], infer_schema_length=None)
    scales = pl.concat([outcome.scales for outcome in outcomes])
    labels = pl.concat([outcome.labels for outcome in outcomes])
    known = _Known(scales=scales, labels=labels, levels=levels, folds=costs, baselines=plan.called)
    report = _report(forecasts, known, (plan.config, plan.steps, plan.season), plan.frame.series_ids)
    report = with_cold_start(report, [name or next(iter(levels)) for name in plan.fits], plan.config.cold_start)
    report = report if plan.joint is None else with_level_errors(report, *plan.joint)
    return with_online(report, plan.config.online, known.scales)


def _report(
    forecasts: pl.DataFrame, known: _Known, about: tuple[BacktestConfig, int, int], series: Sequence[str]
) -> BacktestReport:
    config, steps, season = about
    common, notes = common_windows(forecasts)
    graded = common.filter(pl.col("actual").is_not_null())["series_id"].unique()
    if not graded.len():
        raise DataError("no observed cell to grade: the series are too short for the context, or all missing there")
    absent = sorted(set(series) - set(graded))
    if absent:
        notes.append(
            f"{len(absent)} of {len(series)} series are not graded, nothing is observed of them after a cutoff with a "
            f"context: {listing(absent)}"
        )
    models = list(known.levels)
    naive = "seasonal_naive" if season > 1 and "seasonal_naive" in config.baselines else "last_value"
    reference = known.baselines[naive]
    scaled = bool(known.scales["scale"].is_not_nan().any())
    metrics, wide, regimes, pit = [], [], [], []
    losses: dict[str, pl.DataFrame] = {}
    absolute: pl.DataFrame | None = None
    for model in models:
        cells = score_cells(common.filter(model=model), known.levels[model], known.scales)
        named = pl.lit(model).alias("model")
        metrics.append(metric_table(cells).select(named, pl.all()))
        wide.append(summarise(cells).select(named, pl.all()))
        if known.levels[model]:
            pit.append(pit_table(common.filter(model=model), known.levels[model]).select(named, pl.all()))
        regimes.append(regime_table(cells, known.labels, config.regimes, config.regime_column).select(named, pl.all()))
        losses[model] = window_losses(cells, scaled=scaled)
        rows = window_losses(cells, scaled=False).rename({"loss": model})
        absolute = rows if absolute is None else absolute.join(rows, on=KEYS)
    if absolute is None:
        raise ConfigError("there is no model to grade")
    board = leaderboard(absolute, models, reference).select("model", "mean_rank", "win_share")
    found = compare(
        losses,
        reference,
        board["model"][0],
        loss="absolute error in units of MASE" if scaled else "absolute error",
        overlap=-(-steps // (config.stride or steps)),
    )
    p_values = found.tests.filter(against=reference).select("model", p_dm="dm_p_holm", p_wilcoxon="wilcoxon_p_holm")
    summary = pl.concat(wide, how="diagonal").join(board, on="model").join(p_values, on="model", how="left")
    costs = known.folds.group_by("model").agg(
        pl.col("fit_seconds", "predict_seconds").sum(), pl.len().alias("fits"), *mean_joint_scores()
    )
    summary = _with_skill(summary.join(costs, on="model"), reference).sort("mean_rank", "model")
    settings = {
        **config.model_dump(mode="json"),
        "model": models[0],
        "baselines": list(known.baselines.values()),
        "horizon": steps,
        "season_length": season,
        "regime_rows": config.regime_rows or block_rows(season, steps),
        "reference": reference,
        "cutoffs": [str(item) for item in common["cutoff"].unique().sort().to_list()],
        "quantile_levels": {model: list(offered) for model, offered in known.levels.items()},
        "comparison": found.facts,
    }
    return BacktestReport(
        forecasts=forecasts,
        metrics=pl.concat(metrics),
        leaderboard=summary,
        folds=known.folds,
        tests=found.tests,
        pit=pl.concat(pit) if pit else pl.DataFrame(schema={"model": pl.String, **PIT_SCHEMA}),
        regimes=_with_skill(pl.concat(regimes, how="diagonal"), reference, ["kind", "regime"]),
        regime_labels=known.labels.select("series_id", "variate", "cutoff", "kind", "regime"),
        settings=settings,
        notes=(*notes, *_notes(known)),
    )


def _notes(known: _Known) -> list[str]:
    """Return what a reader of the report must know about its numbers."""
    notes = []
    if len({found for found in known.levels.values() if found}) > 1:
        notes.append("models offer different quantile levels: their wql and crps do not compare, set quantile_levels")
    if known.scales["scale"].is_nan().any():
        units = known.scales.select("series_id", "variate", "scale").unique(["series_id", "variate"])
        flat = int(units["scale"].is_nan().sum())
        notes.append(f"MASE is undefined for {flat} of {units.height} series-variates (constant or too short to fit)")
        if flat < units.height:
            notes[-1] += "; the tests leave them out"
    for model, lacking in known.folds.group_by("model", maintain_order=True).agg(pl.col("known_missing").sum()).rows():
        if lacking:
            notes.append(
                f"{model}: {lacking} forecast rows had no value of a known covariate, the training mean stood in for "
                "it; predict refuses such rows"
            )
    return notes


def _with_skill(summary: pl.DataFrame, reference: str, by: Sequence[str] = ()) -> pl.DataFrame:
    """Add ``skill_mae, skill_mse`` and, where there are quantiles, ``skill_crps`` against the reference, by group."""
    for name in ("mse", "mae", "crps"):
        if name in summary.columns:
            theirs = summary.filter(model=reference).select(*by, pl.col(name).alias("_reference"))
            both = (
                summary.join(theirs, on=list(by), how="left", maintain_order="left")
                if by
                else (summary.join(theirs, how="cross", maintain_order="left"))
            )
            values = (both[column].cast(pl.Float64).fill_null(np.nan).to_numpy() for column in (name, "_reference"))
            summary = summary.with_columns(pl.Series(f"skill_{name}", skill_score(*values)).fill_nan(None))
    return summary
