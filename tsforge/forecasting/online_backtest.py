"""Adapt the intervals of a finished backtest as they would have been adapted then: forecasts in time order, each judged
once its target was there. No model is asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import polars as pl

from tsforge.core.errors import DataError
from tsforge.forecasting.comparison import common_windows
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.report import BacktestReport
from tsforge.metrics.summary import metric_table, score_cells, summarise

SUFFIX = "+online"


def online_forecasts(forecasts: pl.DataFrame, state: OnlineConformal) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the forecasts of one model with adapted quantiles, and the status of every interval.

    Before the forecasts of a cutoff are adapted, the state learns from the actual values up to that cutoff, and from no
    later one.

    Args:
        forecasts: ``series_id, cutoff, step, time, variate, mean, q..., actual``, at least one pair of quantiles.
        state: learns on the way.

    Returns:
        Tables of ``OnlineConformal.issue``, in the order of cutoffs.

    Raises:
        DataError: no forecast, or no interval to adapt.
    """
    if not forecasts.height:
        raise DataError("there is no forecast to adapt")
    known = forecasts.select("series_id", "variate", "time", "actual").unique(["series_id", "variate", "time"])
    known = known.sort("time", "series_id", "variate")
    tables, statuses, seen = [], [], 0
    for part in forecasts.sort("cutoff", maintain_order=True).partition_by("cutoff", maintain_order=True):
        cutoff = part["cutoff"][0]
        upto = int(known["time"].search_sorted(cutoff, side="right"))
        state.update(known.slice(seen, upto - seen), cutoff)
        seen = upto
        adapted, status = state.issue(part)
        tables.append(adapted)
        statuses.append(status)
    return pl.concat(tables), pl.concat(statuses)


def with_online(report: BacktestReport, config: OnlineConfig | None, scales: pl.DataFrame) -> BacktestReport:
    """Return the report with adapted intervals beside those of every model that has some; as it is without ``config``.

    Forecasts and metrics gain rows of a model ``NAME+online``: the same means, other quantiles, graded on the same
    cells. Ranks stay as they are, since the means do. A note for each model compares coverages.

    Args:
        report: a finished backtest.
        config: how intervals learn; None adapts nothing.
        scales: units of the scaled metrics, as in ``score_cells``.

    Raises:
        DataError: no model has intervals.
    """
    if config is None:
        return report
    levels: Mapping[str, list[float]] = report.settings["quantile_levels"]
    able = [model for model, found in levels.items() if len(found) > 1]
    if not able:
        raise DataError("online intervals need forecasts with intervals; calibrate, or choose a likelihood")
    common, _ = common_windows(report.forecasts)
    forecasts, metrics, notes = [report.forecasts], [report.metrics], list(report.notes)
    for model in able:
        table = report.forecasts.filter(model=model)
        empty = [name for name in table.columns if name.startswith("q") and table[name].null_count() == table.height]
        state = OnlineConformal(config)
        adapted, _ = online_forecasts(table.drop("model", *empty), state)
        name = model + SUFFIX
        forecasts.append(adapted.select(pl.lit(name).alias("model"), pl.all()))
        graded = common.filter(model=model)
        cells = score_cells(adapted.join(graded, on=["series_id", "cutoff"], how="semi"), levels[model], scales)
        static = score_cells(graded, levels[model])
        metrics.append(metric_table(cells).select(pl.lit(name).alias("model"), pl.all()))
        notes.append(_note(name, static, cells, state.tally))
    settings = dict(report.settings)
    settings["quantile_levels"] = {**levels, **{model + SUFFIX: levels[model] for model in able}}
    return replace(
        report,
        forecasts=pl.concat(forecasts, how="diagonal"),
        metrics=pl.concat(metrics),
        settings=settings,
        notes=tuple(notes),
    )


def _note(name: str, static: pl.DataFrame, cells: pl.DataFrame, tally: Mapping[str, int]) -> str:
    """Return one line: coverage after and before, and how many intervals were what."""
    after, before = summarise(cells).row(0, named=True), summarise(static).row(0, named=True)
    covered = [key for key in after if key.startswith("coverage_")]
    parts = [f"{key.removeprefix('coverage_')} %: {after[key]:.1%} (static {before[key]:.1%})" for key in covered]
    issued = sum(tally[key] for key in ("static", "adapted", "infinite", "capped", "none"))
    shares = ", ".join(f"{key} {tally[key] / issued:.1%}" for key in ("static", "infinite", "capped") if tally[key])
    return f"{name}: coverage of {'; '.join(parts)}; of {issued} intervals {shares or 'all adapted'}"
