"""One row of the triage queue in detail: the series around it, who is to blame, others like it, the audit trail."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl
import streamlit as st

from dashboards import address, triage_charts
from dashboards.event_actions import action_bar
from dashboards.state import detection, moment, series_table, span, table
from dashboards.text import code, plain
from tsforge.app import triage
from tsforge.app.events import audit_trail, list_maintenance
from tsforge.core.errors import TsforgeError
from tsforge.core.workspace import Workspace

_AROUND = (24, 72, 288)
_PANELS = 3
STATE_COLOURS: dict[str, Literal["red", "orange", "violet", "gray"]] = {
    "new": "red",
    "acknowledged": "orange",
    "confirmed": "violet",
    "dismissed": "gray",
}
_SIMILAR = {
    "start": "from (UTC)",
    "series_id": "series",
    "variates": "variates",
    "peak_score": "peak score",
    "human_state": "people said",
    "acted_by": "who",
    "comment": "comment",
    "alike": "alike",
}
_TRAIL = {"when": "when (UTC)", "actor": "who", "what": "what", "from": "from", "to": "to", "comment": "comment"}


def draw(workspace: Workspace, mine: pl.DataFrame, events: pl.DataFrame) -> None:
    """Draw the events of a row of the queue; ``events`` are all there are, for comparison."""
    shown = _choose(mine)
    _head(workspace, shown, mine)
    action_bar(workspace, mine, shown)
    left, right = st.columns([2, 1])
    with left:
        _around(workspace, shown, mine, events)
    with right:
        st.markdown("**Which variates are strange**")
        if shown["variates"]:
            bars = triage_charts.contribution_chart(shown["variates"])
            st.plotly_chart(bars, width="stretch", key="contributions")
        elif shown["variates"] is None:
            st.caption("Which variates are behind it cannot be read: its row of the table `tsf_events` is damaged.")
        else:
            st.caption("Nobody said which variates are behind it.")
    _similar(workspace, shown, events)
    _trail(workspace, shown)
    _origin(shown)


def _choose(mine: pl.DataFrame) -> dict[str, Any]:
    """Return the event in detail: the one chosen of an incident, at first the strongest that waits for somebody."""
    waits = pl.col("human_state").is_in(["new", "acknowledged"])
    ranked = mine.sort(waits, "peak_score", descending=True, nulls_last=True).to_dicts()
    if len(ranked) == 1:
        return ranked[0]
    st.markdown(f"#### Incident of {len(ranked)} events in {mine['series_id'].n_unique()} series")
    rows = {row["event_id"]: row for row in ranked}
    names = {
        key: f"{row['series_id']}, {span(row)}, {row['human_state']}, peak {row['peak_score'] or 0:.3g}"
        for key, row in rows.items()
    }
    named, state = address.get("event").rpartition("/")[2], f"member-{ranked[0]['event_id']}"
    first = named if named in rows else ranked[0]["event_id"]
    address.adopt(state, first, valid=st.session_state.get(state) in rows)
    chosen = st.selectbox("Event of the incident", list(rows), format_func=lambda key: names[key], key=state)
    if chosen != first:
        address.put("event", f"{rows[chosen]['dataset']}/{chosen}")
    return rows[chosen]


def _head(workspace: Workspace, event: dict[str, Any], mine: pl.DataFrame) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"{'#####' if mine.height > 1 else '####'} {plain(event['series_id'])}, {span(event)}")
        st.badge(event["human_state"], color=STATE_COLOURS[event["human_state"]])
        if event["state"] == "open":
            st.badge("still going on", icon=":material/sensors:", color="blue")
        if event["suppressed_by"] is not None:
            st.badge(f"silenced by rule {event['suppressed_by']}", icon=":material/notifications_off:", color="gray")
    st.caption(_sentence(event))
    if event["acted_by"] is not None:
        st.caption(
            f"{event['human_state'].capitalize()} by {plain(event['acted_by'])}, {moment(event['acted_at'])} UTC"
        )
    if event["suppressed_by"] is not None:
        for rule in list_maintenance(workspace, lifted=True).filter(id=event["suppressed_by"]).to_dicts():
            st.caption(f"Rule {rule['id']} by {plain(rule['author'])}: {plain(rule['reason'])}")


def _around(workspace: Workspace, event: dict[str, Any], mine: pl.DataFrame, events: pl.DataFrame) -> None:
    """Draw the series around the event with what was expected of it, where a detection kept that."""
    names = [item["variate"] for item in event["variates"] or []]
    strong = _leading(event)[:_PANELS]
    places = st.columns([2, 1], vertical_alignment="bottom")
    chosen = places[0].multiselect("Variates drawn", names, default=strong, key=f"drawn-{event['event_id']}")
    around = places[1].selectbox("Rows around it", _AROUND, index=1, key="rows-around")
    window, origin = _window(workspace, event, chosen or strong, around)
    if window.values.is_empty() and window.scores.is_empty():
        st.info("No row of this series is stored around the event.", icon=":material/inbox:")
        return
    times = window.scores["time"] if window.scores.height else window.values["time"]
    others = events.filter(
        pl.col("dataset") == event["dataset"],
        pl.col("series_id") == event["series_id"],
        pl.col("event_id") != event["event_id"],
        pl.col("end") >= times.min(),
        pl.col("start") <= times.max(),
    )
    figure = triage_charts.event_chart(window.values, window.scores, event, others)
    st.plotly_chart(figure, width="stretch", key="around-event")
    st.caption(origin)


def _leading(event: dict[str, Any]) -> list[str]:
    names: list[str] = (
        pl.DataFrame([event], schema_overrides={"variates": _variates()})
        .select(triage.leading())["variates"][0]
        .to_list()
    )
    return names


def _variates() -> Any:
    return pl.List(pl.Struct({"variate": pl.String, "contribution": pl.Float64, "conditional": pl.Float64}))


def _window(
    workspace: Workspace, event: dict[str, Any], variates: list[str], around: int
) -> tuple[triage.EventWindow, str]:
    """Return the rows around an event and where they come from."""
    record = triage.find_detection(workspace, event)
    if record is not None:
        try:
            window = triage.event_window(detection(record), event, variates, around=around)
        except TsforgeError as error:  # a damaged report must not hide the event: its values are in the store
            st.warning(plain(error))
        else:
            if window.scores.height and window.values.height:
                shade = "Red: this event; orange: others of the series. Shaded blue: expected value and usual error."
                return window, f"{shade} Scores of {plain(record['source'])} ({plain(record['id'])})."
    try:
        rows = series_table(event["dataset"], event["series_id"])
    except TsforgeError:  # events of rows that were never stored: what is known of the event is shown all the same
        return triage.no_window(event), ""
    window = triage.stored_window(rows, event, variates, around=around)
    return window, "Stored values only: no detection kept scores and expected values of these rows."


def _sentence(event: dict[str, Any]) -> str:
    """Return what happened in a line."""
    words = [] if event["length"] is None else [f"{event['length']} row{'s' * (event['length'] != 1)}"]
    if event["peak_score"] is not None:
        at = "" if event["peak_time"] is None else f" at {moment(event['peak_time'])}"
        words.append(f"score up to {event['peak_score']:.4g}{at}")
    if event["threshold"] is not None:
        words.append(f"threshold {event['threshold']:.4g}")
    if event["p_value"] is not None:
        words.append(f"p-value {event['p_value']:.2g}")
    return ", ".join(words)


def _origin(event: dict[str, Any]) -> None:
    facts = {
        "data set": event["dataset"],
        "event": event["event_id"],
        "rule": event["rule"],
        "found by": event["source"],
        "model": event["artifact"],
    }
    st.caption(", ".join(f"{name} {code(value)}" for name, value in facts.items() if value))


def _similar(workspace: Workspace, event: dict[str, Any], events: pl.DataFrame) -> None:
    found = triage.similar_events(events, event)
    st.markdown("**Earlier events like it**")
    if found.is_empty():
        st.caption("None: no earlier event of this data set shares a leading variate with it.")
        return
    counts: dict[str, int] = dict(found.group_by("human_state").len().iter_rows())
    words = [f"{counts[state]} {text}" for state, text in _WORDS.items() if state in counts]
    st.caption(f"Of {found.height} most alike: {', '.join(words)}.")
    comments = triage.last_comments(workspace, found)
    said = [comments.get(name) for name in found["event_id"]]
    table(found.with_columns(comment=pl.Series(said, dtype=pl.String)), _SIMILAR, percentages=("alike",))


_WORDS = {
    "confirmed": "confirmed",
    "dismissed": "dismissed",
    "acknowledged": "acknowledged",
    "new": "not looked at",
}


def _trail(workspace: Workspace, event: dict[str, Any]) -> None:
    st.markdown("**Audit trail**")
    trail = audit_trail(workspace, event["event_id"], event["dataset"])
    table(trail.sort("id", descending=True), _TRAIL)
