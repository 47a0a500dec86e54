"""Overview: what is stored, how fresh it is, what ran last and what needs a look."""

from __future__ import annotations

import streamlit as st

from dashboards.state import empty, page
from tsforge.app import catalog
from tsforge.core.workspace import Workspace


def show() -> None:
    """Draw the page."""
    page("Overview", _draw, lead="Data sets, their freshness, and the last runs.")


def _draw(workspace: Workspace) -> None:
    datasets = catalog.list_datasets(workspace)
    if not datasets:
        empty("data", "tsforge ingest data=nyc_weather")
        return
    artifacts = catalog.list_artifacts(workspace)
    detections = catalog.list_detections(workspace)
    jobs = catalog.job_runs(workspace)
    events = detections[0]["events"] if detections else None
    failed = sum(run["status"] == "failed" for run in jobs[:20])
    for column, (label, value) in zip(
        st.columns(4),
        (
            ("Data sets", len(datasets)),
            ("Fitted models", len(artifacts)),
            ("Events in the last detection", "none yet" if events is None else events),
            ("Failed jobs of the last 20", failed if jobs else "none yet"),
        ),
        strict=True,
    ):
        column.metric(label, value)
    st.subheader("Data sets")
    st.dataframe(
        datasets,
        width="stretch",
        hide_index=True,
        column_config={"rows": st.column_config.NumberColumn(format="localized")},
    )
    stale = [item["name"] for item in datasets if item.get("stale")]
    if stale:
        st.warning(f"Older than their stated maximum age: {', '.join(stale)}", icon=":material/schedule:")
    st.subheader("Fitted models")
    if artifacts:
        st.dataframe(artifacts[:20], width="stretch", hide_index=True)
    else:
        empty("fitted model", f"tsforge fit data={datasets[0]['name']} model=ar_net")
    st.subheader("Last scheduled runs")
    if jobs:
        st.dataframe(jobs[:20], width="stretch", hide_index=True)
    else:
        empty("scheduled run", "tsforge batch run batch/nyc_weather --as-of 2013-12-20")
