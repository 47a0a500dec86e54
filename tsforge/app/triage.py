"""What somebody on call asks about events and says of them: what waits, how it looked, what became of others.

Questions to tables and the event store, without a network; answers go into the store with the name of their author.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from tsforge.anomaly.health import HEALTH_RATIO, health_history
from tsforge.app.catalog_results import StoredDetection, list_detections
from tsforge.app.events import FROM, Action, act, add_maintenance, audit_trail, open_events
from tsforge.contracts.tables import JOINT
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.grid import parse_moment
from tsforge.data.suppressions import WEEKDAYS

__all__ = [
    "HEALTH_RATIO",
    "EventWindow",
    "act",
    "apart",
    "event_datasets",
    "event_window",
    "events_version",
    "find_detection",
    "health_history",
    "last_comments",
    "leading",
    "leading_text",
    "maintain",
    "members",
    "no_window",
    "queue",
    "read_events",
    "row_key",
    "similar_events",
    "stale_series",
    "stored_window",
]

HUMAN_STATES = ("new", "acknowledged", "confirmed", "dismissed")  # the least looked at first
LEADING_SHARE = 0.5  # variates with at least this share of the strongest contribution lead an event
NAMED = 3  # variates named in a line
_SHARE_OF_ERRORS = 0.99
_ALIKE = 0.25
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = (  # as a table keeps them; a year is left, since windows reach beyond an event
    (moment - _EPOCH) // timedelta(microseconds=1)
    for moment in (datetime(2, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
)


def queue(events: pl.DataFrame) -> pl.DataFrame:
    """Return one row an incident, or an event that is in none; what waits longest for a person comes last.

    Args:
        events: that can be shown (``apart``).

    Returns:
        ``key`` (unique), ``dataset, event_id`` (of the strongest event), ``start, end, series, events`` (how many),
        ``series_id, variates`` (of the strongest, as text), ``strength`` (peak score as a multiple of the threshold),
        ``length`` (its rows, None of an incident of several events or where nobody counted), ``state`` (open while one
        is), ``human_state`` (the least settled), ``suppressed`` (all of them are). New ones
        first, then acknowledged ones, each with the latest start first.
    """
    order = pl.Enum(HUMAN_STATES)
    threshold = pl.col("threshold")
    rows = events.with_columns(
        key=row_key(),
        human_state=pl.col("human_state").cast(order),
        strength=pl.when(threshold > 0).then(pl.col("peak_score") / threshold),
        variates=leading_text(),
    ).sort("peak_score", descending=True, nulls_last=True, maintain_order=True)
    grouped = rows.group_by("key", maintain_order=True).agg(
        pl.col("dataset", "event_id", "series_id", "variates").first(),
        pl.col("start").min(),
        pl.col("end").max(),
        series=pl.col("series_id").n_unique(),
        events=pl.len(),
        length=pl.when(pl.len() == 1).then(pl.col("length").first()),
        strength=pl.col("strength").max(),
        state=pl.when((pl.col("state") == "open").any()).then(pl.lit("open")).otherwise(pl.lit("closed")),
        human_state=pl.col("human_state").min(),
        suppressed=pl.col("suppressed_by").is_not_null().all(),
    )
    return grouped.sort("human_state", "start", descending=[False, True], maintain_order=True).with_columns(
        pl.col("human_state").cast(pl.String)
    )


def apart(events: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return the events that can be shown, and what is wrong with the others: ``DATASET/ID`` -> why.

    The store was damaged by other hands then: it writes neither such times nor such states.
    """
    times = [name for name in ("start", "end", "peak_time") if isinstance(events.schema[name], pl.Datetime)]
    faults = [
        pl.when(~pl.col(name).to_physical().is_between(_FIRST, _LAST)).then(
            pl.lit(f"{name} lies outside the years 2 to 9998")
        )
        for name in times
    ]
    state = pl.col("human_state")
    faults.append(pl.when(~state.is_in(HUMAN_STATES)).then(pl.format("human_state is '{}'", state)))
    judged = events.with_columns(fault=pl.concat_str(faults, separator=", ", ignore_nulls=True))
    wrong = judged.filter(pl.col("fault") != "")
    names = wrong.select(pl.concat_str("dataset", "event_id", separator="/"), "fault")
    return judged.filter(pl.col("fault") == "").drop("fault"), dict(names.iter_rows())


def row_key() -> pl.Expr:
    """Return the key of the row of ``queue`` that each event is in: ``DATASET/ID`` of its incident, else its own."""
    return pl.concat_str("dataset", pl.coalesce("incident_id", "event_id"), separator="/")


def members(events: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return the events of a row of ``queue`` by its key, in order of their start."""
    return events.filter(row_key() == key).sort("start", "series_id")


def leading() -> pl.Expr:
    """Return the names of the variates that lead each event: at least half as strong as the strongest."""
    parts = pl.col("variates")
    first = parts.list.first().struct.field("contribution")
    strong = parts.list.eval(
        pl.when(
            pl.element().struct.field("contribution") >= LEADING_SHARE * pl.element().struct.field("contribution").max()
        )
        .then(pl.element().struct.field("variate"))
        .drop_nulls()
    )
    return pl.when(first.is_not_null()).then(strong).otherwise(pl.lit([], dtype=pl.List(pl.String)))


def leading_text() -> pl.Expr:
    """Return the first leading variates of each event as text."""
    names = leading()
    more = names.list.len() - NAMED
    text = names.list.head(NAMED).list.join(", ")
    return pl.when(names.list.len() > NAMED).then(pl.format("{} and {} more", text, more)).otherwise(text)


def similar_events(events: pl.DataFrame, event: Mapping[str, Any], *, limit: int = 10) -> pl.DataFrame:
    """Return earlier events outside its incident that resemble one, the most alike first, with ``alike`` in (0, 1].

    ``alike`` is the share of leading variates that both have of those that either has (Jaccard), halved for another
    series; below a quarter an event is left out.
    """
    earlier = events.filter(
        pl.col("dataset") == event["dataset"],
        pl.col("start") < event["start"],
        pl.col("event_id") != event["event_id"],
        pl.col("incident_id").ne_missing(event["incident_id"]) | pl.col("incident_id").is_null(),
    ).with_columns(names=leading())
    mine = events.filter(pl.col("dataset") == event["dataset"], pl.col("event_id") == event["event_id"]).select(
        names=leading()
    )
    own = [] if mine.is_empty() else mine["names"][0].to_list()
    both = pl.col("names").list.set_intersection(pl.lit(own, dtype=pl.List(pl.String))).list.len()
    either = pl.col("names").list.set_union(pl.lit(own, dtype=pl.List(pl.String))).list.len()
    weight = pl.when(pl.col("series_id") == event["series_id"]).then(1.0).otherwise(0.5)
    found = earlier.with_columns(alike=pl.when(either > 0).then(weight * both / either).otherwise(0.0))
    return (
        found.filter(pl.col("alike") >= _ALIKE)
        .sort("alike", "start", descending=True)
        .head(limit)
        .with_columns(pl.col("alike").round(2), variates=leading_text())
        .drop("names")
    )


@dataclass(frozen=True, kw_only=True)
class EventWindow:
    """A series around an event.

    Attributes:
        values: ``time, variate, value`` and, where a detection kept them, ``expected, low, high`` (the range in which
            99 % of the errors outside events lie).
        scores: ``time, score, threshold`` of the joint score; empty where no detection kept them.
    """

    values: pl.DataFrame
    scores: pl.DataFrame


def find_detection(workspace: Workspace, event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record (of ``list_detections``) of the detection that found an event, else the newest of its data set.

    None without one. The newest one need not cover the event: ``event_window`` is empty then.
    """
    records = {item["id"]: item for item in list_detections(workspace) if item["dataset"] == event["dataset"]}
    kind, _, own = event["source"].partition(":")
    names = [own]
    if kind == "batch":  # what followed is in later batches, so all of them together come first
        job, _, moment = own.partition("@")
        names = [f"batch/{job}", f"batch/{job}/{moment.replace(':', '-')}"]
    return next((records[name] for name in [*names, *records] if name in records), None)


def event_window(
    detection: StoredDetection, event: Mapping[str, Any], variates: list[str], *, around: int = 72
) -> EventWindow:
    """Return some variates of the series of an event, from ``around`` rows before it to as many after it.

    Args:
        detection: that found the event; one that has no row of it gives an empty window.
        event: ``series_id, start, end``.
        variates: to show; those that the detection did not keep are left out.
        around: rows before and after.
    """
    mine = detection.scores.filter(pl.col("series_id") == event["series_id"])
    joint = mine.filter(pl.col("variate") == JOINT).sort("time")
    first, last = _around(joint["time"], event, around)
    near = joint.slice(first, last - first)
    inside = pl.col("time").is_between(near["time"].min(), near["time"].max())
    places = {name: place for place, name in enumerate(variates)}
    order = pl.col("variate").replace_strict(places, default=None, return_dtype=pl.Int64)
    own = mine.filter(pl.col("variate").is_in(variates)).sort(order, "time")
    if not {"value", "expected"} <= set(own.columns):
        return EventWindow(values=no_window(event).values, scores=near.select("time", "score", "threshold"))
    events = detection.events.filter(pl.col("series_id") == event["series_id"])
    usual = _usual_errors(own, events)
    values = own.filter(inside).join(usual, on="variate", how="left", maintain_order="left")
    values = values.with_columns(low=pl.col("expected") + pl.col("below"), high=pl.col("expected") + pl.col("above"))
    return EventWindow(
        values=values.select("time", "variate", "value", "expected", "low", "high"),
        scores=near.select("time", "score", "threshold"),
    )


def _around(times: pl.Series, event: Mapping[str, Any], around: int) -> tuple[int, int]:
    first, last = int((times < event["start"]).sum()), int((times <= event["end"]).sum())
    if first == last:  # no row of the event is here
        return 0, 0
    return max(first - around, 0), min(last + around, times.len())


def _usual_errors(own: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Return ``variate, below, above``: between these lie 99 % of the errors of rows that no event covers."""
    spans = events.select(pl.col("start").alias("time"), until=pl.col("end")).sort("time")
    spans = spans.with_columns(pl.col("until").cum_max())
    placed = own.sort("time").join_asof(spans, on="time", strategy="backward")
    error = (pl.col("value") - pl.col("expected")).alias("error")
    quiet = placed.filter(pl.col("until").is_null() | (pl.col("until") < pl.col("time")))
    tail = (1.0 - _SHARE_OF_ERRORS) / 2
    return (
        quiet.select("variate", error)
        .drop_nulls()
        .group_by("variate")
        .agg(below=pl.col("error").quantile(tail), above=pl.col("error").quantile(1.0 - tail))
    )


def stored_window(
    rows: pl.DataFrame, event: Mapping[str, Any], variates: list[str], *, around: int = 72
) -> EventWindow:
    """Return what ``event_window`` does from stored rows of the series alone: values, nothing expected, no score.

    Args:
        rows: ``time`` and a column a variate.
        event, variates, around: as there.
    """
    first, last = _around(rows["time"], event, around)
    near = rows.slice(first, last - first)
    names = [name for name in variates if name in rows.columns]
    values = near.unpivot(names, index="time", variable_name="variate", value_name="value")
    return EventWindow(values=values, scores=no_window(event).scores)


def no_window(event: Mapping[str, Any]) -> EventWindow:
    """Return the window of an event of which no row is known."""
    time = pl.Series([event["start"]]).dtype
    names = ("value", "expected", "low", "high")
    values: dict[str, Any] = {"time": time, "variate": pl.String, **dict.fromkeys(names, pl.Float64)}
    scores: dict[str, Any] = {"time": time, "score": pl.Float64, "threshold": pl.Float64}
    return EventWindow(values=pl.DataFrame(schema=values), scores=pl.DataFrame(schema=scores))


def stale_series(detection: StoredDetection) -> dict[str, float]:
    """Return the series whose calibration has gone stale and their multiple of the nominal alarm rate, worst first."""
    facts: Mapping[str, Mapping[str, Any]] = detection.metadata.get("series", {})
    found = {name: float(fact["alarm_rate_ratio"]) for name, fact in facts.items() if fact.get("is_stale")}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# --- the event store ---


def event_datasets(workspace: Workspace) -> list[dict[str, Any]]:
    """Return ``dataset, events, has_integer_time`` of the data sets that have events."""
    with open_events(workspace) as store:
        return store.datasets().to_dicts()


def events_version(workspace: Workspace) -> str:
    """Return a text that changes whenever an event or a word about one does."""
    with open_events(workspace) as store:
        return store.version()


def read_events(workspace: Workspace, dataset: str | None) -> pl.DataFrame:
    """Return all events of a data set, None for those of every one (columns: ``event_records.TABLE``).

    Raises:
        DataError: every one, where some have integer time and others not.
    """
    with open_events(workspace) as store:
        return store.events(dataset)


def last_comments(workspace: Workspace, events: pl.DataFrame) -> dict[str, str]:
    """Return the last comment of each event that has one, by its id; one question an event, so for a few events."""
    found = {}
    for event in events.filter(pl.col("comments") > 0).iter_rows(named=True):
        said = audit_trail(workspace, event["event_id"], event["dataset"])["comment"].drop_nulls()
        found[event["event_id"]] = said[-1]
    return found


def act_on_shown(
    workspace: Workspace, events: pl.DataFrame, action: Action, *, actor: str, comment: str | None = None
) -> tuple[int, list[str]]:
    """Let a person acknowledge, dismiss, confirm or reopen events; return how many that changed, and what was refused.

    An event from whose state the action does not lead is left as it is without a word (of an incident some events may
    have been confirmed before); one that somebody else has changed since it was shown is refused.

    Raises:
        ConfigError: nobody acts.
        BackendError: the database refused; events before it are changed.
    """
    changed, refused = 0, []
    meant = events.filter(pl.col("human_state").is_in(FROM[action]))
    for dataset in meant["dataset"].unique(maintain_order=True):
        seen = dict(meant.filter(dataset=dataset).select("event_id", "human_state").iter_rows())
        found = act(workspace, list(seen), action, by=actor, text=comment, dataset=dataset, expected=seen)
        changed += sum(not change.note for change in found.done)
        refused += [str(error) for error in found.refused.values()]
    return changed, refused


def maintain(
    workspace: Workspace,
    event: Mapping[str, Any],
    *,
    series: str,
    start: str,
    end: str,
    weekly: bool,
    reason: str,
    actor: str,
) -> int:
    """Silence events of a series that lie inside a window whole, once or every week; return the number of the rule.

    Args:
        workspace: whose.
        event: its data set is meant, and its kind of time.
        series: a shell-like pattern.
        start, end: ISO times (UTC where they have no offset), or numbers where time is a number; both included.
        weekly: on the weekday of ``start``, from its clock time to that of ``end``, every week, all of them in UTC.
        reason: why.
        actor: who.

    Raises:
        ConfigError: a time that is none, an end before its start, a weekly window longer than a day, no reason, nobody.
    """
    rule: dict[str, Any] = {"reason": reason, "dataset": event["dataset"], "series": series}
    if weekly:
        rule["weekly"] = _weekly(start, end)
    else:
        rule |= {"start": start, "end": end}
    return int(add_maintenance(workspace, rule, by=actor)["id"])


def _weekly(start: str, end: str) -> dict[str, Any]:
    """Return the settings of a weekly window; it goes by the clock of UTC, so ends with another offset are moved."""
    try:
        first, last = (parse_moment(text) for text in (start, end))
    except DataError as error:
        raise ConfigError(str(error)) from error
    if not timedelta() < last - first <= timedelta(days=1):
        raise ConfigError(f"a weekly window lasts up to a day; from {start} to {end} is no such window")
    if any(moment.second or moment.microsecond for moment in (first, last)):
        raise ConfigError(f"a weekly window opens and closes on whole minutes; round {start} and {end}")
    return {
        "weekdays": [WEEKDAYS[first.weekday()]],
        "opens": f"{first:%H:%M}",
        "closes": f"{last:%H:%M}",
        "timezone": "UTC",
    }
