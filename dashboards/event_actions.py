"""What a person may say about events on the triage page: buttons, the comment that goes with them, what came of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import polars as pl
import streamlit as st

from dashboards import address
from dashboards.state import MINUTE
from dashboards.text import plain
from tsforge.app import triage
from tsforge.app.events import FROM, Action, comment
from tsforge.core.errors import TsforgeError
from tsforge.core.workspace import Workspace

_SAID = "triage-said"
_AUTHOR = "triage-author"
_WORDS = "triage-words"
_VERBS: dict[Action, tuple[str, str, str, str]] = {
    "acknowledged": ("Acknowledge", "A", ":material/visibility:", "I am looking at it."),
    "dismissed": (
        "Dismiss",
        "D",
        ":material/close:",
        "Nothing is wrong: it may alarm again, and counts as normal data.",
    ),
    "confirmed": (
        "Confirm",
        "Y",
        ":material/flag:",
        "It is an anomaly: its rows leave calibration and rolling windows.",
    ),
    "reopened": ("Reopen", "O", ":material/undo:", "Back to new."),
}
_DONE = ("acknowledged", "dismissed", "confirmed")  # the row leaves its place: the next one comes up


def said() -> None:
    """Say once what the last action came to."""
    for kind, text in st.session_state.pop(_SAID, []):
        if kind == "error":
            st.error(text, icon=":material/error:")
        else:
            st.success(text, icon=":material/check:")


def drop_event() -> None:
    """Forget which event the address names, so that the queue decides."""
    address.put("event", "")


def _say(kind: str, text: str) -> None:
    """Keep Markdown for ``said``."""
    st.session_state.setdefault(_SAID, []).append((kind, text))


def author_and_words() -> tuple[str, str]:
    """Draw who speaks and what about; the name is remembered for the visit."""
    left, right = st.columns([1, 3])
    name = left.text_input(
        "Your name", value=st.session_state.get("author", ""), key=_AUTHOR, placeholder="for the trail"
    )
    words = right.text_input("Comment (optional)", key=_WORDS, placeholder="goes with the next button you press")
    st.session_state["author"] = name.strip()
    return name.strip(), words.strip()


def action_bar(workspace: Workspace, events: pl.DataFrame, shown: dict[str, Any]) -> None:
    """Draw the actions on the events of a row of the queue, ``shown`` being the one in detail."""
    with st.container(border=True):
        name, words = author_and_words()
        with st.container(horizontal=True, vertical_alignment="center"):
            _buttons(workspace, events, name, key="row")
            st.button(
                "Comment",
                key="act-comment",
                icon=":material/chat:",
                disabled=not (name and words),
                on_click=_comment,
                args=(workspace, shown),
                help="Adds the comment to this event and changes nothing.",
            )
            with st.popover("Maintenance ...", icon=":material/build:", disabled=not name):
                _maintenance(workspace, shown, name)
        if not name:
            st.caption("Write your name first: every action is kept with it in the audit trail.")


def bulk_bar(workspace: Workspace, events: pl.DataFrame, rows: int) -> None:
    """Draw the actions on the events of all selected rows."""
    with st.container(border=True):
        name, _ = author_and_words()
        with st.container(horizontal=True, vertical_alignment="center"):
            _buttons(workspace, events, name, key="bulk")
        if not rows:
            st.caption("Tick rows in the list; the box in its head ticks all of them.")
        else:
            st.caption(f"{_count(rows, 'row')} with {_count(events.height, 'event')} selected.")


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"


def _buttons(workspace: Workspace, events: pl.DataFrame, name: str, *, key: str) -> None:
    for action, (label, shortcut, icon, help) in _VERBS.items():
        fitting = events.filter(pl.col("human_state").is_in(FROM[action])).height
        st.button(
            label if events.height <= 1 else f"{label} {fitting}",
            key=f"act-{key}-{action}",
            icon=icon,
            shortcut=shortcut,
            type="primary" if action == "acknowledged" and fitting else "secondary",
            disabled=not (name and fitting),
            help=help,
            on_click=_act,
            args=(workspace, events, action),
        )


def _act(workspace: Workspace, events: pl.DataFrame, action: Action) -> None:
    words = st.session_state.get(_WORDS, "").strip() or None
    try:
        changed, refused = triage.act_on_shown(
            workspace, events, action, actor=st.session_state[_AUTHOR], comment=words
        )
    except TsforgeError as error:
        _say("error", plain(error))
        return
    for text in refused[:3]:
        _say("error", plain(text))
    if changed:
        _say("done", f"{_count(changed, 'event')} {action}.")
        st.session_state[_WORDS] = ""
        if action in _DONE:
            drop_event()


def _comment(workspace: Workspace, event: dict[str, Any]) -> None:
    try:
        words, name = st.session_state[_WORDS], st.session_state[_AUTHOR]
        comment(workspace, event["event_id"], words, by=name, dataset=event["dataset"])
    except TsforgeError as error:
        _say("error", plain(error))
        return
    st.session_state[_WORDS] = ""


def _maintenance(workspace: Workspace, event: dict[str, Any], name: str) -> None:
    """Draw the form of a maintenance window around an event."""
    start, end = event["start"], event["end"]
    timed = isinstance(start, datetime)
    if timed:
        start, end = start.replace(minute=0), (end + timedelta(hours=2)).replace(minute=0)
    with st.form("maintenance", border=False):
        st.markdown("**Silence events that lie inside a window**")
        series = st.text_input(
            "Series (* = any text)", value=event["series_id"], key=f"window-series-{event['event_id']}"
        )
        left, right = st.columns(2)
        first = left.text_input("From (UTC)", value=f"{start:{MINUTE}}" if timed else str(start))
        last = right.text_input("To (UTC)", value=f"{end:{MINUTE}}" if timed else str(end))
        weekly = st.checkbox("Every week on that day, at these times", disabled=not timed)
        reason = st.text_input("Reason", placeholder="whoever finds the rule in a year must understand it")
        if not st.form_submit_button("Set up"):
            return
    pattern = series.strip() or "*"
    try:
        number = triage.maintain(
            workspace, event, series=pattern, start=first, end=last, weekly=weekly, reason=reason, actor=name
        )
    except TsforgeError as error:
        st.error(plain(error))
        return
    _say(
        "done",
        f"Rule {number} is in force: {plain(pattern)} is silent from {plain(first)} to {plain(last)}"
        f"{', every week' * weekly}.",
    )
    st.rerun()
