"""Triage: the queue of events, one of them in detail, and what people say about it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import quote

import polars as pl
import streamlit as st

from dashboards import address, event_panel
from dashboards.event_actions import bulk_bar, said
from dashboards.state import choose, detection, empty, flag, left_out, page, stored_events
from dashboards.text import code, plain
from tsforge.app import catalog_results, triage
from tsforge.app.catalog import in_words
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace

_EVERYTHING = "*"
_SHOWN = {
    "todo": ("To do: new and acknowledged", ("new", "acknowledged")),
    "new": ("New", ("new",)),
    "acknowledged": ("Acknowledged", ("acknowledged",)),
    "confirmed": ("Confirmed", ("confirmed",)),
    "dismissed": ("Dismissed", ("dismissed",)),
    "all": ("All", ("new", "acknowledged", "confirmed", "dismissed")),
}
_SINCE = {"any": "Any time", "24h": "Last 24 hours", "7d": "Last 7 days", "30d": "Last 30 days"}
_SPANS = {"24h": timedelta(days=1), "7d": timedelta(days=7), "30d": timedelta(days=30)}
_MOST = 2_000  # rows of the queue that are drawn
_REFRESH = 20  # seconds between two looks at the store


def show() -> None:
    """Draw the page."""
    page("Triage", _draw, lead="What alarmed, what lies behind it, and what people have said about it.")


def _draw(workspace: Workspace) -> None:
    datasets = triage.event_datasets(workspace)
    if not datasets:
        empty("event", "tsforge detect artifact=latest")
        return
    version = triage.events_version(workspace)
    said()
    first, *others = st.columns(4)
    events, damaged = triage.apart(_chosen_events(datasets, version, first))
    left_out(damaged, "Restore their rows of the table `tsf_events` from a backup of the database.")
    rows = _filtered(events, others)
    silenced = int(rows["suppressed"].sum())
    with st.container(horizontal=True, vertical_alignment="center"):
        _counts(events)
        several = flag("Select several", "several", help="Tick rows of the list, then act on all of them at once.")
        if silenced and not flag(f"Silenced ({silenced})", "silenced", help="Also events that a rule keeps quiet."):
            rows = rows.filter(~pl.col("suppressed"))
        if flag("Refresh", "refresh", help=f"Looks every {_REFRESH} s whether there is anything new."):
            _wait_for_news(version)
    _health(workspace, events)
    if several:
        _several(workspace, rows, events)
    else:
        _one(workspace, rows, events)


@st.fragment(run_every=_REFRESH)
def _wait_for_news(version: str) -> None:
    """Draw the page again once the store has changed; what is half typed stays."""
    if triage.events_version(Workspace.open()) != version:
        st.rerun()


def _chosen_events(datasets: list[dict[str, Any]], version: str, where: Any) -> pl.DataFrame:
    """Return the events of the chosen data set, or of all that have one kind of time."""
    names = {item["dataset"]: f"{item['dataset']} ({item['events']})" for item in datasets}
    if len(names) > 1 and len({item["has_integer_time"] for item in datasets}) == 1:
        names = {_EVERYTHING: f"All data sets ({sum(item['events'] for item in datasets)})", **names}
    name = choose("Data set", list(names), "dataset", names=names, where=where, lasting=True)
    return stored_events(None if name == _EVERYTHING else name, version)


def _filtered(events: pl.DataFrame, where: list[Any]) -> pl.DataFrame:
    """Return the rows of the queue that the filters leave (an incident whole, if any of its events passes)."""
    shown = choose("Show", list(_SHOWN), "show", names={key: text for key, (text, _) in _SHOWN.items()}, where=where[0])
    found = events
    if isinstance(events.schema["start"], pl.Datetime):
        since = choose("When", list(_SINCE), "since", names=_SINCE, where=where[1])
        if since in _SPANS:
            found = found.filter(pl.col("end") >= datetime.now(UTC) - _SPANS[since])
    address.adopt("triage-series", address.get("series"))
    wanted = where[2].text_input("Series", key="triage-series", placeholder="a part of its name, or a*b")
    address.put("series", wanted.strip())
    if wanted.strip():
        pattern = (wanted.strip() if "*" in wanted else f"*{wanted.strip()}*").replace("[", "[[]")
        names = [name for name in found["series_id"].unique() if fnmatchcase(name.lower(), pattern.lower())]
        found = found.filter(pl.col("series_id").is_in(names))
    keys = found.select(triage.row_key().unique()).to_series()
    rows = triage.queue(events)
    return rows.filter(pl.col("human_state").is_in(_SHOWN[shown][1]), pl.col("key").is_in(keys.implode()))


def _counts(events: pl.DataFrame) -> None:
    loud = events.filter(pl.col("suppressed_by").is_null())
    counts: dict[str, int] = dict(loud.group_by("human_state").len().iter_rows())
    for state, colour in event_panel.STATE_COLOURS.items():
        st.badge(f"{counts.get(state, 0)} {state}", color=colour)
    going = loud.filter(pl.col("state") == "open", pl.col("human_state") != "dismissed").height
    if going:
        st.badge(f"{going} still going on", icon=":material/sensors:", color="blue")


def _health(workspace: Workspace, events: pl.DataFrame) -> None:
    """Say which models alarm because they are out of date, rather than because something is wrong."""
    newest: dict[str, dict[str, Any]] = {}
    for record in catalog_results.list_detections(workspace):
        newest.setdefault(record["dataset"], record)
    for name in events["dataset"].unique(maintain_order=True):
        if name not in newest:
            continue
        try:
            stale = triage.stale_series(detection(newest[name]))
        except BackendError:  # a damaged report: the page of detections says so
            continue
        if stale:
            worst, ratio = next(iter(stale.items()))
            more = "" if len(stale) == 1 else f" and {len(stale) - 1} more series"
            detected, series = (quote(text, safe="") for text in (newest[name]["id"], worst))
            st.warning(
                f"**Model health of {plain(name)}:** {plain(worst)}{more} alarmed {ratio:.0f} times as often as "
                "normal data should. The data have moved away from the model: fit again before working through the "
                "list. "
                f"[How the rate moved](anomalies?detection={detected}&series={series})",
                icon=":material/monitor_heart:",
            )


def _table(rows: pl.DataFrame, mode: Literal["multi-row", "single-row-required"], chosen: int) -> list[int]:
    """Draw the queue and return the positions that are selected."""
    shown = rows.head(_MOST)
    frame = pl.DataFrame(
        {
            "state": shown["human_state"],
            "from": _plain(shown["start"]),
            "lasted": [_lasted(row) for row in shown.iter_rows(named=True)],
            "series": shown["series_id"],
            "in series": shown["series"],
            "variates": shown["variates"],
            "strength": shown["strength"],
            "events": shown["events"],
        }
    )
    if shown["series"].max() == 1:
        frame = frame.drop("in series")
    if rows["dataset"].n_unique() > 1:
        frame.insert_column(3, shown["dataset"].alias("data set"))
    key = f"queue-{mode}-{hashlib.sha256(chr(10).join(shown['key']).encode()).hexdigest()[:12]}"
    st.session_state["triage-table"] = key
    if mode == "single-row-required" and address.is_news():
        _select(chosen)  # of the address come back to, not the row last ticked
    state = st.dataframe(
        frame,
        key=key,
        on_select="rerun",
        selection_mode=mode,
        hide_index=True,
        width="stretch",
        height=min(38 + 35 * frame.height, 38 + 35 * 8),
        column_config={
            "state": st.column_config.TextColumn(width=115),
            "events": st.column_config.NumberColumn(width=60),
            "in series": st.column_config.NumberColumn(
                width=70, help="Series of the incident; the one named has most events of it."
            ),
            "from": st.column_config.DatetimeColumn("from (UTC)", format="YYYY-MM-DD HH:mm")
            if isinstance(frame.schema["from"], pl.Datetime)
            else "from",
            "strength": st.column_config.NumberColumn(
                "strength", format="%.1f x", help="Highest score of the event as a multiple of the threshold."
            ),
        },
        placeholder="–",
        selection_default=None if mode == "multi-row" else {"selection": {"rows": [chosen]}},
    )
    if rows.height > _MOST:
        st.caption(f"The first {_MOST:,} of {rows.height:,} rows; narrow the filters to see the others.")
    return [int(place) for place in state["selection"]["rows"] if place < shown.height]


def _plain(times: pl.Series) -> pl.Series:
    return times.dt.replace_time_zone(None) if isinstance(times.dtype, pl.Datetime) else times


def _lasted(row: dict[str, Any]) -> str:
    span, rows = row["end"] - row["start"], row["length"]
    if rows is None and not isinstance(span, timedelta):
        rows = span + 1
    elif rows is None and not span:
        rows = 1
    counted = "" if rows is None else f"{rows} row{'s' if rows != 1 else ''}"
    lasted = in_words(span) if isinstance(span, timedelta) and span else ""
    text = ", ".join(filter(None, (counted, lasted)))
    return f"{text}, going on" if row["state"] == "open" else text


def _select(place: int) -> None:
    """Tick a row of the queue."""
    st.session_state[st.session_state["triage-table"]] = {"selection": {"rows": [place], "columns": [], "cells": []}}


def _nothing(events: pl.DataFrame) -> None:
    """Say that the queue is empty; only if no series was asked for is that good news."""
    wanted = address.get("series")
    if wanted and events.height:
        st.info(f"No event of a series like {code(wanted)} passes these filters.", icon=":material/filter_alt:")
    else:
        st.success("Nothing to do: no event passes these filters.", icon=":material/check_circle:")


def _several(workspace: Workspace, rows: pl.DataFrame, events: pl.DataFrame) -> None:
    if rows.is_empty():
        _nothing(events)
        return
    chosen = _table(rows, "multi-row", 0)
    keys = rows["key"].gather(chosen)
    bulk_bar(workspace, events.filter(triage.row_key().is_in(keys.implode())), len(chosen))


def _one(workspace: Workspace, rows: pl.DataFrame, events: pl.DataFrame) -> None:
    """Draw the queue and, below, the chosen row of it (or an event of a link that the filters hide)."""
    wanted = address.get("event")
    hidden = _key_of(events, wanted)
    is_gone = bool(wanted) and hidden is None
    keys = rows["key"].head(_MOST).to_list()
    place = keys.index(hidden) if hidden in keys else min(int(st.session_state.get("triage-place", 0)), len(keys) - 1)
    if rows.is_empty():
        _nothing(events)
    else:
        selected = _table(rows, "single-row-required", max(place, 0))
        if selected and (hidden is None or hidden in keys or selected[0] != max(place, 0)):
            place, hidden = selected[0], keys[selected[0]]
        _walk(keys, place)
    if is_gone:
        st.warning(f"The link names event '{plain(wanted)}', which is not here; it may have been pruned.")
    key = hidden if hidden is not None else (keys[max(place, 0)] if keys else None)
    if key is None:
        return
    st.session_state["triage-place"] = max(place, 0)
    if _key_of(events, address.get("event")) != key:
        address.put("event", key)
    if key not in keys:
        st.caption("The filters above hide this event; it is shown because the link names it.")
    event_panel.draw(workspace, triage.members(events, key), events)


def _key_of(events: pl.DataFrame, wanted: str) -> str | None:
    """Return the key of the row of the queue that an address means: of a row, or of any event in it."""
    if not wanted:
        return None
    own = pl.concat_str("dataset", "event_id", separator="/") == wanted
    found = events.filter(own | (triage.row_key() == wanted)).select(key=triage.row_key())["key"]
    return found[0] if found.len() else None


def _walk(keys: list[str], place: int) -> None:
    """Draw the buttons that lead through the queue; J and K do the same."""
    with st.container(horizontal=True, vertical_alignment="center"):
        for label, step, shortcut in (("Previous", -1, "K"), ("Next", 1, "J")):
            target = place + step
            st.button(
                label,
                key=f"walk-{label}",
                shortcut=shortcut,
                disabled=not 0 <= target < len(keys),
                on_click=_go,
                args=(keys[target] if 0 <= target < len(keys) else "", target),
            )
        st.caption(f"{place + 1} of {len(keys)}")


def _go(key: str, place: int) -> None:
    if key:
        address.put("event", key)
        _select(place)
