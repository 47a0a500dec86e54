"""Rows of the event store: from an event table to what the database keeps, how a later report advances it, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from tsforge.contracts.tables import EVENT_COLUMNS
from tsforge.core.errors import DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.grid import TIME_DTYPE
from tsforge.data.suppressions import EventFacts

_LOG = get_logger(__name__)
MACHINE_STATES = ("open", "closed")
HUMAN_STATES = ("new", "acknowledged", "dismissed", "confirmed")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIMES = ("start", "end", "peak_time")
_MOMENTS = ("acted_at", "created", "updated")
_NUMBERS = ("peak_score", "p_value", "threshold")
_OPTIONAL = ("length", "continues", "incident_id")
_SAME = 1e-9  # relative: scores of the same rows cut into other updates may differ in their last digits

VARIATES = pl.List(
    pl.Struct({"variate": pl.String, "contribution": pl.Float64, "conditional": pl.Float64, "additive": pl.Float64})
)
TABLE: dict[str, Any] = {
    "dataset": pl.String,
    "event_id": pl.String,
    "series_id": pl.String,
    "start": pl.Int64,
    "end": pl.Int64,
    "peak_time": pl.Int64,
    "peak_score": pl.Float64,
    "p_value": pl.Float64,
    "threshold": pl.Float64,
    "rule": pl.String,
    "state": pl.String,
    "human_state": pl.String,
    "length": pl.Int64,
    "continues": pl.String,
    "incident_id": pl.String,
    "variates": VARIATES,
    "suppressed_by": pl.Int64,
    "comments": pl.Int64,
    "acted_by": pl.String,
    "acted_at": pl.Datetime("us", "UTC"),
    "source": pl.String,
    "artifact": pl.String,
    "facts": pl.String,
    "created": pl.Datetime("us", "UTC"),
    "updated": pl.Datetime("us", "UTC"),
}


def event_id(series_id: str, start: datetime | int, rule: str, measure: str = "") -> str:
    """Return 16 hex digits that name an event: what is the same in all arguments has the same id on every run.

    Args:
        series_id, start: where it begins.
        rule: that raised the alarm, as it describes itself.
        measure: what the score is; empty for the default one, so that its events keep the ids that older versions gave.
    """
    text = f"{series_id}\n{start}\n{rule}" + (f"\n{measure}" if measure else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def moment(value: int, *, integer: bool) -> datetime | int:
    """Return the time that a ``time_number`` was made from, in UTC."""
    return value if integer else _EPOCH + timedelta(microseconds=value)


def incoming(dataset: str, events: pl.DataFrame, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an event table as the database keeps them, what people say about them left out.

    Columns that the store does not know are kept with ``facts`` as JSON.

    Raises:
        DataError: a column is missing, times are neither UTC datetimes nor integers, an id or state is wrong, or an
            event ends before it starts.
    """
    absent = [name for name in EVENT_COLUMNS if name not in events.columns]
    if absent:
        raise DataError(f"the event table lacks {listing(absent)}; store what a detector returned")
    kinds = {events.schema[name] for name in _TIMES if events.height}
    if len(kinds) > 1 or not kinds <= {pl.Datetime("us", "UTC"), pl.Int64}:
        raise DataError(
            f"start, end and peak_time of events are {listing(kinds)}; use UTC datetimes or Int64, one of both"
        )
    plain = events.with_columns(pl.col(_TIMES).cast(pl.Int64)) if events.height else events
    integer = kinds == {pl.Int64}
    known = {*EVENT_COLUMNS, *_OPTIONAL}
    rows = [_row(dataset, record, known, facts, integer=integer) for record in plain.iter_rows(named=True)]
    wrong = [row["event_id"] for row in rows if row["end"] < row["start"] or row["state"] not in MACHINE_STATES]
    if wrong:
        raise DataError(
            f"{len(wrong)} events end before they start or are neither open nor closed: {listing(wrong)}; store what a "
            "detector returned"
        )
    return rows


def _row(
    dataset: str, record: Mapping[str, Any], known: set[str], facts: Mapping[str, Any], *, integer: bool
) -> dict[str, Any]:
    vague = [name for name in ("event_id", "series_id", "start", "end", "rule") if record[name] is None]
    if vague:
        raise DataError(f"an event of '{dataset}' has no {listing(vague)}; store what a detector returned")
    row: dict[str, Any] = {name: record[name] for name in EVENT_COLUMNS}
    row |= {name: record.get(name) for name in _OPTIONAL}
    row |= {name: None if record[name] is None or record[name] != record[name] else record[name] for name in _NUMBERS}
    more = {name: value for name, value in record.items() if name not in known and value is not None}
    return row | {
        "dataset": dataset,
        "has_integer_time": integer,
        "variates": json.dumps(record["variates"] or []),
        "facts": json.dumps({**facts, **more}, default=str, sort_keys=True),
    }


def advance(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a later report of the same event changes: end, peak and state only move forward.

    A shorter or lower report (of fewer rows, of an earlier moment) changes nothing.

    Raises:
        DataError: the id belongs to an event of another series, start or rule.
    """
    for name in ("series_id", "start", "rule", "has_integer_time"):
        if old[name] != new[name]:
            raise DataError(
                f"event {old['event_id']} is stored with {name} {old[name]} and cannot get {name} {new[name]}; events "
                "never change their start, and their id names series, start, score and rule"
            )
    changes: dict[str, Any] = {}
    grew = new["end"] > old["end"]
    if grew:
        changes |= {name: new[name] for name in ("end", "length", "variates")}
    if old["state"] == "open" and new["state"] == "closed" and new["end"] >= old["end"]:
        changes["state"] = "closed"
    if _beyond(new["peak_score"], old["peak_score"]):
        changes |= {name: new[name] for name in ("peak_time", "peak_score", "threshold", "variates")}
    if old["p_value"] is None or (new["p_value"] is not None and new["p_value"] < old["p_value"] * (1.0 - _SAME)):
        changes["p_value"] = new["p_value"]
    for name in ("continues", "incident_id"):
        if new[name] is not None:
            changes[name] = new[name]
    return {name: value for name, value in changes.items() if value != old[name]}


def _beyond(new: float | None, old: float | None) -> bool:
    if new is None or old is None:
        return old is None and new is not None
    return new > old + _SAME * abs(old)


def facts_of(row: Mapping[str, Any]) -> EventFacts:
    """Return what suppression rules look at in a row of the database.

    Where the variates of a row cannot be read none of them leads it, so that a rule about a variate never silences it.
    """
    integer = bool(row["has_integer_time"])
    ranked = _variates(row["variates"])
    return EventFacts(
        dataset=row["dataset"],
        series_id=row["series_id"],
        start=moment(row["start"], integer=integer),
        end=moment(row["end"], integer=integer),
        peak_score=row["peak_score"],
        variate=ranked[0]["variate"] if ranked else None,
    )


def event_table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Return rows of the database as the public table (``TABLE``), by start; times are UTC, or integers.

    Variates that cannot be read are null, and a warning names their events: everything else of these is known.

    Raises:
        DataError: some data sets have integer time and others not, so the times fit into no one column.
    """
    kinds = {bool(row["has_integer_time"]) for row in rows}
    if len(kinds) > 1:
        whole = listing(sorted({row["dataset"] for row in rows if row["has_integer_time"]}))
        raise DataError(f"{whole} have integer time and other data sets do not; ask for the events of one data set")
    plain: dict[str, Any] = {"variates": pl.String, **dict.fromkeys(_MOMENTS, pl.Datetime("us"))}
    table = pl.DataFrame({name: [row.get(name) for row in rows] for name in TABLE}, schema={**TABLE, **plain})
    table = table.with_columns(_ranked(table), pl.col(_MOMENTS).dt.replace_time_zone("UTC"))
    if kinds != {True}:
        table = table.with_columns(pl.col(_TIMES).cast(TIME_DTYPE))
    return table.sort("start", "dataset", "series_id", "event_id")


def _ranked(table: pl.DataFrame) -> pl.Series:
    """Return the ranked variates of each event from the text that the database keeps."""
    texts = table["variates"]
    with suppress(pl.exceptions.ComputeError):  # an infinite contribution: Python writes it, plain JSON has no word
        found = texts.str.json_decode(VARIATES)
        if found.list.eval(pl.element().struct.field("variate").is_not_null()).list.all().fill_null(False).all():
            return found
    ranked = [_variates(text) for text in texts]
    rows = zip(table["dataset"], table["event_id"], ranked, strict=True)
    damaged = [f"'{name}' of '{dataset}'" for dataset, name, found in rows if found is None]
    if damaged:
        _LOG.warning(
            "%d of %d events are shown without variates, which the table tsf_events holds damaged: %s; restore them "
            "from a backup of the database",
            len(damaged),
            len(ranked),
            listing(damaged),
        )
    return pl.Series(texts.name, ranked, dtype=VARIATES)


def _variates(text: str) -> list[dict[str, Any]] | None:
    """Return the ranked variates of an event, None where the text is not what ``_row`` wrote."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return None
    return found if isinstance(found, list) and all(map(_is_ranked, found)) else None


def _is_ranked(item: object) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("variate"), str):
        return False
    return all(isinstance(item.get(name), int | float | None) for name in ("contribution", "conditional", "additive"))
