"""Anomaly timeline: events over values and scores, and which variates are to blame."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import choose, empty, page, series_table
from tsforge.app import catalog
from tsforge.contracts.tables import JOINT
from tsforge.core.workspace import Workspace


def show() -> None:
    """Draw the page."""
    page("Anomalies", _draw, lead="Events, their score against the threshold, and the variates behind them.")


def _draw(workspace: Workspace) -> None:
    detections = catalog.list_detections(workspace)
    if not detections:
        empty("detection", "tsforge detect data=nyc_weather artifact=ID")
        return
    names = {
        item["id"]: f"{item['dataset']}, {item['model']}, {item['created']:%Y-%m-%d %H:%M} ({item['events']} events)"
        for item in detections
    }
    left, right = st.columns([2, 1])
    chosen = choose("Detection", list(names), "detection", names=names, where=left)
    report = catalog.load_detection(workspace, chosen)
    for notice in report.metadata.get("notices", []):
        st.warning(str(notice), icon=":material/monitor_heart:")
    all_series = report.scores["series_id"].unique(maintain_order=True).to_list()
    counts = dict(report.events.group_by("series_id").len().iter_rows())
    labels = {name: f"{name} ({counts.get(name, 0)} events)" for name in all_series}
    series = choose("Series", all_series, "series", names=labels, where=right)
    events = report.events.filter(pl.col("series_id") == series).sort("peak_score", descending=True)
    if events.is_empty():
        st.success("No event in this series: every score stayed below its threshold.", icon=":material/check_circle:")
        _timeline(report, series, None, None)
        return
    event = _choose_event(events)
    _timeline(report, series, event, events)
    left, right = st.columns(2)
    left.plotly_chart(charts.attribution_chart(event["variates"]), width="stretch", key="attribution")
    with right:
        st.markdown(f"**Event {event['event_id']}**")
        st.dataframe(
            [{"": name, "value": str(event[name])} for name in event if name not in ("variates", "event_id")],
            width="stretch",
            hide_index=True,
        )
    with st.expander(f"All {events.height} events of {series}"):
        st.dataframe(events.drop("variates"), width="stretch", hide_index=True)
        st.download_button("Download CSV", events.drop("variates").write_csv(), file_name=f"events-{series}.csv")


def _choose_event(events: pl.DataFrame) -> dict[str, Any]:
    rows = {row["event_id"]: row for row in events.iter_rows(named=True)}
    names = {
        key: f"{row['start']} to {row['end']}, peak {row['peak_score']:.3g}, first {row['variates'][0]['variate']}"
        for key, row in rows.items()
    }
    return rows[choose("Event (strongest first)", list(rows), "event", names=names)]


def _timeline(report: Any, series: str, event: dict[str, Any] | None, events: pl.DataFrame | None) -> None:
    table = series_table(report.metadata["dataset"], series)
    variates = [name for name in report.metadata["variates"] if name in table.columns]
    if event is not None:
        ranked = [item["variate"] for item in event["variates"]]
        variates = sorted(variates, key=lambda name: ranked.index(name) if name in ranked else len(ranked))
    variate = choose("Variate shown", variates, "variate")
    scores = report.scores.filter(pl.col("series_id") == series)
    scores = scores.filter(pl.col("variate") == (JOINT if JOINT in scores["variate"].unique() else variate))
    if event is not None and st.toggle("Zoom to the event", value=True):
        position = int((scores["time"] < event["start"]).sum())
        length = int(((scores["time"] >= event["start"]) & (scores["time"] <= event["end"])).sum())
        scores = scores.slice(max(position - 72, 0), length + 144)
    first, last = scores["time"].min(), scores["time"].max()
    values = table.filter(pl.col("time").is_between(first, last)).select("time", pl.col(variate).alias("value"))
    shown = report.events.head(0) if events is None else events.filter(pl.col("end") >= first, pl.col("start") <= last)
    st.plotly_chart(
        charts.anomaly_timeline(values, scores, shown, variate=variate), width="stretch", key="anomaly-timeline"
    )
