"""Backtest leaderboard: models against the naive forecasts, overall, by step, by series."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import MINUTE, backtest, choose, empty, labels, page, table
from tsforge.app import catalog_results
from tsforge.app.catalog_results import StoredBacktest
from tsforge.core.workspace import Workspace

_NAMES = {
    "mase": "MASE",
    "mae": "MAE",
    "rmse": "RMSE",
    "mse": "MSE",
    "smape": "sMAPE",
    "wql": "weighted quantile loss",
    "crps": "CRPS",
}
_ERRORS = {"model": "model", "mean_rank": "mean rank", **_NAMES, "wql": "WQL"}
_RANKS = {
    "skill_mae": "MAE skill",
    "win_share": "wins",
    "p_value": "p-value",
    "fit_seconds": "fit s",
    "predict_seconds": "predict s",
}


def show() -> None:
    """Draw the page."""
    page("Backtests", _draw, lead="Forecasts from rolling cutoffs of the past, graded beside the naive forecasts.")


def _draw(workspace: Workspace) -> None:
    backtests = catalog_results.list_backtests(workspace)
    if not backtests:
        empty("backtest", "tsforge backtest data=nyc_weather model=ar_net")
        return
    names = labels(backtests, lambda item: f"{item['dataset']}, {item['model']}, {item['created']:{MINUTE}}")
    left, right = st.columns([2, 1])
    chosen = choose("Backtest", list(names), "backtest", names=names, where=left)
    report = backtest(chosen)
    metric_names = {name: _metric_name(name) for name in report.metrics}
    metric = choose("Metric", list(report.metrics), "metric", names=metric_names, where=right)
    _verdict(report, metric)
    left, right = st.columns(2)
    left.plotly_chart(
        charts.leaderboard_chart(report.summary, metric=metric, name=metric_names[metric]),
        width="stretch",
        key="leaderboard",
    )
    right.plotly_chart(
        charts.error_by_step(report.by_step, metric=metric, name=metric_names[metric]), width="stretch", key="by-step"
    )
    st.subheader("All metrics")
    intervals = {
        name: f"inside {name.removeprefix('coverage_')} %"
        for name in report.summary.columns
        if name.startswith("coverage_")
    }
    shares = (*intervals, "win_share", "skill_mae")
    table(report.summary, {**_ERRORS, **intervals, **_RANKS}, percentages=shares)
    st.caption(
        f"Skill is 1 - error / error of {report.metadata['reference']}; ranks and wins count series, variates and "
        "cutoffs; the p-value tests the ranks against the reference."
    )
    st.subheader("By series, worst first")
    _by_series(report, metric)
    for note in report.metadata["notes"]:
        st.info(str(note))
    with st.expander("How this was measured"):
        st.json(report.metadata, expanded=1)


def _metric_name(name: str) -> str:
    return _NAMES.get(name) or f"scaled interval score {name.removeprefix('msis_')} %"


def _verdict(report: StoredBacktest, metric: str) -> None:
    """Say when the model is no better than doing next to nothing."""
    model, naive = report.metadata["model"], report.metadata["baselines"]
    scores = dict(report.summary.select("model", metric).iter_rows())
    own = scores.get(model)
    rivals = {name: scores[name] for name in naive if name != model and scores.get(name) is not None}
    if own is None or not rivals:
        return
    best = min(rivals, key=lambda name: rivals[name])
    if own >= rivals[best]:
        st.warning(
            f"{model} does not beat {best} on {_metric_name(metric)}: {own:.4g} against {rivals[best]:.4g}.",
            icon=":material/trending_down:",
        )


def _by_series(report: StoredBacktest, metric: str) -> None:
    """Show one row a series and one column a model, the series on which our model does worst on top."""
    wide = report.by_series.pivot(on="model", index="series_id", values=metric, maintain_order=True)
    models = [name for name in report.summary["model"] if name in wide.columns]
    first = report.metadata["model"] if report.metadata["model"] in models else models[0]
    ordered = [first, *(name for name in models if name != first)]
    headings = {"series_id": "series"} | {name: name for name in ordered}
    table(wide.sort(pl.col(first), descending=True, nulls_last=True), headings)
