"""Runs: trainings from the tracking store and jobs from the ledger."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import MINUTE, choose, empty, labels, page, table
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
        error = next(run["error"] for run in runs if run["id"] == chosen)
        if error:
            st.warning(error, icon=":material/error:")
        history = catalog.run_history(workspace, chosen)
        if history.is_empty():
            st.caption("This run has no curves: it was solved in closed form, or it ended before the second epoch.")
        else:
            changing = history.filter(pl.col("value").n_unique().over("name") > 1, ~pl.col("name").is_in(_SPEED))
            st.plotly_chart(charts.history_chart(changing), width="stretch", key="history")
    else:
        empty("tracked run", "tsforge fit data=nyc_weather model=dlinear")
    st.subheader("Scheduled jobs")
    jobs = catalog.job_runs(workspace)
    if jobs:
        table(jobs, JOBS, integers=("rows",))
    else:
        empty("job run", "tsforge batch run batch/nyc_weather --as-of 2013-12-20")
