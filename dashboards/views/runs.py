"""Runs: trainings from the tracking store and jobs from the ledger."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import model_charts
from dashboards.state import MINUTE, choose, empty, labels, page, table
from dashboards.text import plain
from dashboards.views.overview import JOBS
from tsforge.app import catalog
from tsforge.core.workspace import Workspace

_RUNS = {
    "name": "run",
    "state": "status",
    "started": "started (UTC)",
    "seconds": "seconds",
    "valid_mae": "validation MAE",
    "test_mae": "test MAE",
    "error": "why it failed",
}
_ENDED = ": it ended before its second epoch."
_WHY = {
    "running": " yet: it is still running, and they begin with its second epoch.",
    "scheduled": " yet: it has not begun.",
    "finished": ": it was solved in closed form, or had a single epoch.",
}
_SPEED = ("seconds", "windows_per_second")  # of the machine, not of the model


def show() -> None:
    """Draw the page."""
    page("Runs", _draw, lead="Trainings as tracked, scheduled jobs as recorded in the ledger.")


def _draw(workspace: Workspace) -> None:
    st.subheader("Trainings")
    runs = catalog.tracking_runs(workspace)
    if runs:
        table([{**run, "state": run["status"].lower()} for run in runs], _RUNS)
        names = labels(runs, lambda run: f"{run['name']}, {run['started']:{MINUTE}} ({run['status'].lower()})")
        chosen = choose("Run", list(names), "run", names=names)
        run = next(run for run in runs if run["id"] == chosen)
        if error := run["error"]:
            st.warning(plain(error), icon=":material/error:")
        history = catalog.run_history(workspace, chosen)
        if history.is_empty():
            st.caption(f"This run has no curves{_WHY.get(run['status'].lower(), _ENDED)}")
        else:
            changing = history.filter(pl.col("value").n_unique().over("name") > 1, ~pl.col("name").is_in(_SPEED))
            st.plotly_chart(model_charts.history_chart(changing), width="stretch", key="history")
    else:
        empty("tracked run", "tsforge fit data=nyc_weather model=dlinear")
    st.subheader("Scheduled jobs")
    jobs = catalog.job_runs(workspace)
    if jobs:
        table(jobs, JOBS, integers=("rows",))
    else:
        empty("job run", "tsforge batch run batch/nyc_weather --as-of 2013-12-20")
