"""Backtest leaderboard: models against the naive forecasts, overall, by step, by series."""

from __future__ import annotations

import streamlit as st

from dashboards import charts
from dashboards.state import choose, empty, page
from tsforge.app import catalog
from tsforge.core.workspace import Workspace


def show() -> None:
    """Draw the page."""
    page("Backtests", _draw, lead="Forecasts from rolling cutoffs of the past, graded beside the naive forecasts.")


def _draw(workspace: Workspace) -> None:
    backtests = catalog.list_backtests(workspace)
    if not backtests:
        empty("backtest", "tsforge backtest data=nyc_weather model=ar_net")
        return
    names = {item["id"]: f"{item['dataset']}, {item['model']}, {item['created']:%Y-%m-%d %H:%M}" for item in backtests}
    left, right = st.columns([2, 1])
    chosen = choose("Backtest", list(names), "backtest", names=names, where=left)
    report = catalog.load_backtest(workspace, chosen)
    metric = choose("Metric", list(report.metrics), "metric", where=right)
    model = report.metadata["model"]
    naive = report.summary.filter(report.summary["model"] != model)[metric].min()
    own = report.summary.filter(report.summary["model"] == model)[metric].min()
    if isinstance(naive, float) and isinstance(own, float) and own >= naive:
        st.warning(f"{model} does not beat the best naive forecast on {metric}: {own:.4g} against {naive:.4g}.")
    left, right = st.columns(2)
    left.plotly_chart(charts.leaderboard_chart(report.summary, metric=metric), width="stretch", key="leaderboard")
    if metric in report.by_step.columns:
        right.plotly_chart(charts.error_by_step(report.by_step, metric=metric), width="stretch", key="by-step")
    else:
        right.caption(f"{metric} is not computed by step.")
    st.subheader("All metrics")
    st.dataframe(report.summary, width="stretch", hide_index=True)
    st.subheader("Worst series first")
    table = report.by_series
    st.dataframe(
        table.sort(metric, descending=True, nulls_last=True) if metric in table.columns else table,
        width="stretch",
        hide_index=True,
    )
    with st.expander("How this was measured"):
        st.json(report.metadata)
