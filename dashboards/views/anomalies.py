"""Anomaly timeline: events over values and scores, and which variates are to blame."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from dashboards import charts, triage_charts
from dashboards.state import (
    MINUTE,
    choose,
    detection,
    empty,
    health,
    labels,
    left_out,
    moment,
    page,
    series_table,
    span,
    table,
)
from dashboards.text import plain
from tsforge.app import catalog_results, triage
from tsforge.app.catalog_results import StoredDetection
from tsforge.contracts.tables import JOINT
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace

_AROUND = 72  # rows shown before and after an event
_EVENTS = {
    "start": "from (UTC)",
    "end": "to (UTC)",
    "length": "rows",
    "peak_score": "peak score",
    "threshold": "threshold",
    "p_value": "p-value",
    "first": "first variate",
    "state": "state",
}

_HEALTH = {
    "series_id": "series",
    "ratio": "times nominal",
    "rate": "alarm rate",
    "alarms": "alarm rows",
    "rows": "scored rows",
    "is_stale": "stale",
}


def show() -> None:
    """Draw the page."""
    page("Anomalies", _draw, lead="Events, their score against the threshold, and the variates behind them.")


def _draw(workspace: Workspace) -> None:
    detections = catalog_results.list_detections(workspace)
    damaged = catalog_results.damaged_reports(workspace, catalog_results.DETECTIONS)
    left_out(damaged, "Run `tsforge detect` again.")
    if not detections:
        empty("detection", "tsforge detect artifact=latest")
        return
    names = labels(
        detections,
        lambda item: (
            f"{item['dataset']}, {item['model']}: {item['source']}, {item['created']:{MINUTE}}"
            f" ({_count(item['events'])})"
        ),
    )
    left, right = st.columns([2, 1])
    chosen = choose("Detection", list(names), "detection", names=names, where=left, damaged=damaged, lasting=True)
    record = next(item for item in detections if item["id"] == chosen)
    report = detection(record)
    if report.scores.is_empty():
        raise BackendError(f"detection '{chosen}' holds no score: it is damaged, or nothing was scored; make it again")
    series = _choose_series(report, right)
    for notice in report.metadata["notices"]:
        st.warning(plain(notice), icon=":material/monitor_heart:")
    events = report.events.filter(pl.col("series_id") == series).sort("peak_score", descending=True)
    if events.is_empty():
        st.success("No event in this series: every score stayed below its threshold.", icon=":material/check_circle:")
        _timeline(report, series, None, None)
    else:
        event = _choose_event(events)
        _timeline(report, series, event, events)
        _one_event(event)
        with st.expander(f"All events of {plain(series)} ({events.height})", expanded=True):
            first = events.with_columns(first=pl.col("variates").list.first().struct.field("variate"))
            table(first.sort("start"), _EVENTS)
            st.download_button("Download CSV", events.drop("variates").write_csv(), file_name=f"events-{series}.csv")
    _health(health(record), report.metadata.get("alarm_rate_nominal"))
    _method(report.metadata)


def _count(events: int) -> str:
    return "1 event" if events == 1 else f"{events} events"


def _choose_series(report: StoredDetection, where: Any) -> str:
    """Return the chosen series; the one with most events comes first."""
    counts: dict[str, int] = dict(report.events.group_by("series_id").len().iter_rows())
    ids = report.scores["series_id"].unique(maintain_order=True).to_list()
    ids.sort(key=lambda name: -counts.get(name, 0))
    names = {name: f"{name} ({_count(counts.get(name, 0))})" for name in ids}
    return choose("Series", ids, "series", names=names, where=where)


def _choose_event(events: pl.DataFrame) -> dict[str, Any]:
    rows = {row["event_id"]: row for row in events.iter_rows(named=True)}
    names = {key: f"{span(row)}, peak {row['peak_score']:.3g}, first {_first(row)}" for key, row in rows.items()}
    return rows[choose("Event (strongest first)", list(rows), "event", names=names)]


def _first(event: dict[str, Any]) -> str:
    return event["variates"][0]["variate"] if event["variates"] else "unknown"


def _timeline(report: StoredDetection, series: str, event: dict[str, Any] | None, events: pl.DataFrame | None) -> None:
    rows = series_table(report.metadata["dataset"], series)
    variates = [name for name in report.metadata["variates"] if name in rows.columns]
    if event is not None:
        ranked = [item["variate"] for item in event["variates"] or []]
        variates.sort(key=lambda name: ranked.index(name) if name in ranked else len(ranked))
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    variate = choose("Variate shown", variates, "variate", where=left)
    scores = report.scores.filter(pl.col("series_id") == series)
    joint = scores.filter(pl.col("variate") == JOINT).sort("time")
    own = scores.filter(pl.col("variate") == variate).sort("time")
    drawn = joint if joint.height else own
    if event is not None and right.toggle("Zoom to the event", value=True):
        position = int((drawn["time"] < event["start"]).sum())
        length = int(((drawn["time"] >= event["start"]) & (drawn["time"] <= event["end"])).sum())
        drawn = drawn.slice(max(position - _AROUND, 0), length + 2 * _AROUND)
    first, last = drawn["time"].min(), drawn["time"].max()
    inside = pl.col("time").is_between(first, last)
    values = rows.filter(inside).select("time", pl.col(variate).alias("value"))
    if own["expected"].count() if "expected" in own.columns else False:
        values = values.join(own.filter(inside).select("time", "expected"), on="time", how="left").sort("time")
    near = report.events.clear() if events is None else events.filter(pl.col("end") >= first, pl.col("start") <= last)
    st.plotly_chart(
        charts.anomaly_timeline(values, drawn, near, variate=variate), width="stretch", key="anomaly-timeline"
    )


def _one_event(event: dict[str, Any]) -> None:
    left, right = st.columns(2)
    left.plotly_chart(charts.attribution_chart(event["variates"]), width="stretch", key="attribution")
    facts = {
        "strongest at": moment(event["peak_time"]),
        "score there": f"{event['peak_score']:.4g}",
        "threshold": f"{event['threshold']:.4g}" if event["threshold"] is not None else "none",
        "p-value": f"{event['p_value']:.2g}" if event["p_value"] is not None else "none",
        "rows": str(event.get("length") or ""),
        "state": "open: still going on at the end of the data" if event["state"] == "open" else "closed",
    }
    with right:
        st.markdown(f"**Event of {span(event)}**")
        table([{"fact": name, "value": value} for name, value in facts.items() if value])
        st.caption(f"Rule: {plain(event['rule'])}")


def _health(history: pl.DataFrame, nominal: float | None) -> None:
    """Show how often each series alarmed over time beside how often normal data should."""
    if not history["rate"].count():
        return
    st.subheader("Model health")
    figure = triage_charts.health_chart(history, bound=triage.HEALTH_RATIO)
    st.plotly_chart(figure, width="stretch", key="health")
    last = history.group_by("series_id", maintain_order=True).last().sort("rate", descending=True, nulls_last=True)
    stale = last.filter(pl.col("is_stale"))["series_id"].to_list()
    said = "Share of alarm rows in the last 7 days or 5,000 rows, whichever is less."
    if nominal:
        names = f"{plain(', '.join(stale[:5]))}{' ...' * (len(stale) > 5)}"
        said += f" {nominal:.3%} of normal rows should alarm. " + (
            f"Stale: {names}." if stale else "No series is stale."
        )
        said += (
            f" Above {triage.HEALTH_RATIO:g} times the nominal rate the data have moved away from the model: fit again."
        )
    else:
        said += " Which rate is normal is not known here: the level is a fixed one, or a batch did not keep it."
    st.caption(said)
    if last.height > 1:
        with st.expander(f"All {last.height} series"):
            table(last, _HEALTH, integers=("alarms", "rows"))


def _method(facts: dict[str, Any]) -> None:
    """Show what was scored with what, and the grade where the truth is known."""
    grade = facts.get("grade")
    if grade:
        st.subheader("Graded against the known anomalies")
        shown = {name: value for name, value in grade["overall"].items() if isinstance(value, int | float)}
        table([{"measure": name.replace("_", " "), "value": float(value)} for name, value in shown.items()])
        if grade.get("kinds"):
            table(grade["kinds"])
    with st.expander("How this was measured"):
        st.json({name: value for name, value in facts.items() if name not in ("notices", "grade")}, expanded=1)
