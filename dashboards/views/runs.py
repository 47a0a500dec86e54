"""Runs: trainings from the tracking store and jobs from the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import streamlit as st

from dashboards import model_charts
from dashboards.state import MINUTE, choose, empty, labels, page, section, table
from dashboards.text import plain
from dashboards.views.overview import JOBS
from tsforge.app import catalog
from tsforge.core.errors import listing
from tsforge.core.workspace import Workspace

_RUNS = {
    "name": "run",
    "state": "status",
    "started": "started (UTC)",
    "seconds": "seconds",
    "valid_mae": "validation MAE",
    "test_mae": "test MAE",
    "trials": "trials",
    "error": "why it failed",
}
_ENDED = ": it ended before its second epoch."
_WHY = {
    "running": " yet: it is still running, and they begin with its second epoch.",
    "scheduled": " yet: it has not begun.",
    "finished": ": it was solved in closed form, or had a single epoch.",
}
_MOST = 100  # runs in the list
_SPEED = ("seconds", "windows_per_second")  # of the machine, not of the model


def show() -> None:
    """Draw the page."""
    page("Runs", _draw, lead="Trainings as tracked, scheduled jobs as recorded in the ledger.")


def _draw(workspace: Workspace) -> None:
    section("Trainings", _trainings)
    section("Scheduled jobs", _jobs)


def _trainings(workspace: Workspace) -> None:
    runs = catalog.tracking_runs(workspace, _MOST + 1)
    if not runs:
        empty("tracked run", "tsforge fit data=nyc_weather model=dlinear")
        return
    if len(runs) > _MOST:
        st.caption(
            f"The newest {_MOST} runs; older ones are in MLflow's own pages. Trials are listed with their study."
        )
        runs = runs[:_MOST]
    headings = {name: heading for name, heading in _RUNS.items() if name != "trials" or any(map(_is_study, runs))}
    table([{**run, "state": run["status"].lower()} for run in runs], headings)
    names = labels(runs, lambda run: f"{run['name']}, {run['started']:{MINUTE}} ({run['status'].lower()})")
    chosen = choose("Run", list(names), "run", names=names, lasting=True)
    run = next(run for run in runs if run["id"] == chosen)
    if error := run["error"]:
        st.warning(plain(error), icon=":material/error:")
    if _is_study(run):
        _study(workspace, run)
    else:
        _curves(workspace, run)


def _is_study(run: Mapping[str, Any]) -> bool:
    return run.get("study") is not None


def _study(workspace: Workspace, study: dict[str, Any]) -> None:
    """List the trials of a study, name the best one, and draw the curves of a chosen one."""
    trials = catalog.trial_runs(workspace, study)
    if not trials:
        st.caption("No trial has begun.")
        return
    metric = study["metric"] or "value"
    best = next((trial for trial in trials if str(trial["trial"]) == study["best_trial"]), None)
    if best is not None:
        values = listing([f"{name} = {value}" for name, value in best["values"].items()], 8)
        told = "" if best["value"] is None else f" with {plain(metric)} {best['value']:.4g}"
        st.success(f"Best: trial {best['trial']}{told}" + (f" ({plain(values)})." if values else "."))
    rows = [{**trial, **trial["values"], "state": trial["status"].lower()} for trial in trials]
    columns = {"trial": "trial", "state": "status", "value": metric, "seconds": "seconds"}
    table(rows, {**columns, **{name: name for name in trials[0]["values"]}, "error": "why it failed or was stopped"})
    names = {trial["id"]: f"trial {trial['trial']} ({trial['status'].lower()})" for trial in trials}
    first = [trial["id"] for trial in (best,) if trial is not None]
    chosen = choose("Curves of", list(dict.fromkeys([*first, *names])), "trial", names=names)
    _curves(workspace, next(trial for trial in trials if trial["id"] == chosen))


def _curves(workspace: Workspace, run: dict[str, Any]) -> None:
    history = catalog.run_history(workspace, run["id"])
    if history.is_empty():
        st.caption(f"This run has no curves{_WHY.get(run['status'].lower(), _ENDED)}")
        return
    changing = history.filter(pl.col("value").n_unique().over("name") > 1, ~pl.col("name").is_in(_SPEED))
    st.plotly_chart(model_charts.history_chart(changing), width="stretch", key="history")


def _jobs(workspace: Workspace) -> None:
    jobs = catalog.job_runs(workspace)
    if jobs:
        table(jobs, JOBS, integers=("rows",))
    else:
        empty("job run", "tsforge batch run batch/nyc_weather --as-of 2013-12-20")
