"""Overview: what is stored, how fresh it is, what ran last and what needs a look."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboards.state import asked, empty, left_out, page, table
from dashboards.text import plain
from tsforge.app import catalog, catalog_results
from tsforge.core.workspace import Workspace

_DATASETS = {
    "name": "data set",
    "freshness": "freshness",
    "age": "age of the newest row",
    "series": "series",
    "rows": "rows",
    "freq": "step",
    "start": "from",
    "end": "to",
    "updated": "last ingestion",
}
_MODELS = {
    "model": "model",
    "dataset": "fitted on",
    "created": "fitted at (UTC)",
    "context_length": "context",
    "horizon": "horizon",
    "valid_mae": "validation MAE",
    "test_mae": "test MAE",
    "id": "artifact",
}
JOBS = {
    "job": "job",
    "status": "status",
    "slot": "due (UTC)",
    "started": "started (UTC)",
    "seconds": "seconds",
    "rows": "rows",
    "message": "message",
}


def show() -> None:
    """Draw the page."""
    page("Overview", _draw, lead="Data sets and their freshness, fitted models, the last runs.")


def _draw(workspace: Workspace) -> None:
    datasets = asked("Data sets", catalog.list_datasets, workspace)
    if datasets == []:
        empty("data", "tsforge ingest data=nyc_weather")
        return
    artifacts = catalog.list_artifacts(workspace)
    broken = catalog.damaged_artifacts(workspace)
    for kind in (catalog_results.DETECTIONS, catalog_results.BACKTESTS):
        broken |= catalog_results.damaged_reports(workspace, kind)
    left_out(broken, "Make them again, or remove their folders.")
    detections = catalog_results.list_detections(workspace)
    jobs = asked("Last scheduled runs", lambda home: catalog.job_runs(home, limit=20), workspace)
    _cells(datasets, artifacts, detections, jobs)
    if datasets is not None:
        _datasets(datasets)
    st.subheader("Fitted models")
    if artifacts:
        table(artifacts[:20], _MODELS)
        st.caption("Errors are in standard deviations of each variate over the training span, so that models compare.")
    else:
        empty("fitted model", f"tsforge fit data={datasets[0]['name'] if datasets else 'NAME'} model=ar_net")
    if jobs is not None:
        _jobs(jobs)


def _cells(
    datasets: list[dict[str, Any]] | None,
    artifacts: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    jobs: list[dict[str, Any]] | None,
) -> None:
    failed = sum(run["status"] == "failed" for run in jobs or [])
    cells = {
        "Data sets": "unknown" if datasets is None else str(len(datasets)),
        "Fitted models": str(len(artifacts)),
        "Events in the last detection": str(detections[0]["events"]) if detections else "none yet",
        "Failed of the last jobs": f"{failed} of {len(jobs)}" if jobs else "unknown" if jobs is None else "none yet",
    }
    for column, (label, value) in zip(st.columns(4), cells.items(), strict=True):
        column.metric(label, value, border=True)


def _datasets(datasets: list[dict[str, Any]]) -> None:
    st.subheader("Data sets")
    table([{**item, "freshness": _freshness(item)} for item in datasets], _DATASETS, integers=("rows", "series"))
    stale = [item["name"] for item in datasets if item["stale"]]
    if stale:
        st.warning(f"Older than their stated maximum age: {plain(', '.join(stale))}", icon=":material/schedule:")


def _jobs(jobs: list[dict[str, Any]]) -> None:
    st.subheader("Last scheduled runs")
    if jobs:
        table(jobs, JOBS, integers=("rows",))
    else:
        empty("scheduled run", "tsforge batch run batch/nyc_weather --as-of 2013-12-20")


def _freshness(item: dict[str, Any]) -> str:
    return {None: "no limit stated", True: "stale", False: "fresh"}[item["stale"]]
