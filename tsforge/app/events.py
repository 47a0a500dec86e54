"""Events of a workspace: record what a detector found, list, judge, comment, label, export, prune; maintenance windows.

Every change names who made it. Texts given for times are read by the clock of the data set they are about.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from tsforge.contracts.tables import AnomalyReport
from tsforge.core.errors import ConfigError, DataError, TsforgeError, listing, nearest
from tsforge.core.workspace import Workspace
from tsforge.data.event_steps import Recorded
from tsforge.data.event_store import FROM, Action, Change, EventStore
from tsforge.data.grid import parse_time, reads_as_integer
from tsforge.data.store import SeriesStore

__all__ = [
    "FROM",
    "Action",
    "Change",
    "EventTable",
    "Recorded",
    "act",
    "actor",
    "add_maintenance",
    "audit_trail",
    "comment",
    "confirmed_spans",
    "export_table",
    "label",
    "lift_maintenance",
    "list_events",
    "list_maintenance",
    "open_events",
    "prune",
    "record_report",
    "show_event",
]


def actor(name: str | None = None) -> str:
    """Return who acts: the given name, else the user of the operating system.

    Raises:
        ConfigError: neither is known.
    """
    if name is not None:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise ConfigError("the system does not say who you are; give --by NAME") from error


@contextmanager
def open_events(workspace: Workspace) -> Iterator[EventStore]:
    """Yield the event store of a workspace."""
    with closing(EventStore(workspace.database_url)) as store:
        yield store


def record_report(workspace: Workspace, dataset: str, report: AnomalyReport, *, source: str) -> Recorded:
    """Store the events of a report; the same report again changes nothing.

    Each event keeps the spans its judgement rests on (``scale``, ``calibration``) as facts.

    Raises:
        BackendError: the database refused; nothing is changed.
    """
    facts = report.metadata["series"]
    events = report.events.with_columns(
        pl.Series(
            part,
            [" to ".join(facts[name][part]) if name in facts else None for name in report.events["series_id"]],
            dtype=pl.String,
        )
        for part in ("scale", "calibration")
    )
    with open_events(workspace) as store:
        return store.record(
            dataset,
            events,
            source=source,
            artifact=str(report.metadata["artifact_id"]),
            facts={"model": report.metadata["model"], "score": report.metadata["score"]},
        )


def confirmed_spans(workspace: Workspace, dataset: str, *, made_until: datetime | None = None) -> pl.DataFrame:
    """Return the spans that people confirmed (``EventStore.confirmed``)."""
    with open_events(workspace) as store:
        return store.confirmed(dataset, made_until=made_until)


@dataclass(frozen=True, kw_only=True)
class EventTable:
    """Events as a shell prints them.

    Attributes:
        table: columns ``event_records.TABLE``.
    """

    table: pl.DataFrame

    def summary(self) -> dict[str, Any]:
        """Return how many events and incidents there are, and in which state people left the events."""
        silenced = self.table["suppressed_by"].is_not_null()
        counts = dict(self.table.filter(~silenced).group_by("human_state").len().sort("human_state").iter_rows())
        incidents = {"incidents": self.table["incident_id"].drop_nulls().n_unique()} if self._has_incidents else {}
        return {"events": self.table.height, **incidents, **counts, "suppressed": int(silenced.sum())}

    @property
    def _has_incidents(self) -> bool:
        return self.table["incident_id"].null_count() < self.table.height

    def rows(self) -> list[dict[str, Any]]:
        """Return one record an event, by start; with its incident where any of them is in one."""
        shown = ["event_id", "dataset", "series_id", "start", "end", "peak_score", "state"]
        more = ["suppressed_by", "comments", *(["incident_id"] if self._has_incidents else [])]
        said, by = pl.col("human_state").alias("said"), pl.col("acted_by").alias("by")
        return self.table.select(*shown, said, by, *more, _names_of(pl.col("variates").list.head(3))).to_dicts()


def _names_of(variates: pl.Expr) -> pl.Expr:
    """Return the names of ranked variates as one text."""
    return variates.list.eval(pl.element().struct.field("variate")).list.join(", ")


def list_events(
    workspace: Workspace,
    *,
    dataset: str | None = None,
    states: Sequence[str] = (),
    since: str | None = None,
    series: Sequence[str] = (),
    suppressed: bool = True,
) -> EventTable:
    """Return stored events.

    Args:
        workspace: whose store.
        dataset, states, series: only these (``EventStore.events``).
        since: only events that end at this time or later.
        suppressed: False leaves out those that a rule silences.

    Raises:
        DataError: an unknown state or data set, or a time of the wrong kind.
    """
    with open_events(workspace) as store:
        _check_dataset(store, dataset)
        time = None if since is None else _moment(store, dataset, since)
        table = store.events(dataset, state=states or None, since=time, series=series or None)
    return EventTable(table=table if suppressed else table.filter(pl.col("suppressed_by").is_null()))


def show_event(workspace: Workspace, event_id: str, dataset: str | None = None) -> dict[str, Any]:
    """Return everything about one event: its record, ranked variates, facts and its lines of the audit trail.

    Raises:
        DataError: no such event.
    """
    with open_events(workspace) as store:
        row = store.event(event_id, dataset=dataset)
        trail = store.log(row["event_id"], dataset=row["dataset"]).drop("dataset", "event_id")
    return {**row, "log": trail.to_dicts()}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an action did to several events.

    Attributes:
        done: one entry an event that was acted upon.
        refused: event id -> why not.
    """

    done: tuple[Change, ...]
    refused: dict[str, TsforgeError]

    def summary(self) -> dict[str, Any]:
        """Return how many events changed."""
        return {"changed": sum(not change.note for change in self.done), "refused": len(self.refused)}

    def rows(self) -> list[dict[str, Any]]:
        """Return one record an event."""
        done = [vars(change) for change in self.done]
        return done + [{"event_id": name, "note": str(error)} for name, error in self.refused.items()]


def act(
    workspace: Workspace,
    event_ids: Sequence[str],
    state: Action,
    *,
    by: str | None = None,
    text: str | None = None,
    dataset: str | None = None,
    expected: Mapping[str, str] | None = None,
) -> Changes:
    """Acknowledge, dismiss, confirm or reopen events, each in a transaction of its own.

    One that is refused does not keep the others from being done.

    Args:
        workspace: whose store.
        event_ids: ids, or beginnings of ids.
        state: what to say of them.
        by, text: who, and why.
        dataset: of the events, where ids alone are not clear.
        expected: event id -> state it was seen in; refused where somebody else has changed it since.

    Raises:
        ConfigError: nobody acts.
        BackendError: the database refused; events before it are changed.
    """
    who = actor(by)
    done: list[Change] = []
    refused: dict[str, TsforgeError] = {}
    with open_events(workspace) as store:
        for event_id in event_ids:
            try:
                seen = None if expected is None else expected[event_id]
                done.append(store.set_state(event_id, state, actor=who, comment=text, dataset=dataset, expected=seen))
            except DataError as error:
                refused[event_id] = error
    return Changes(done=tuple(done), refused=refused)


def comment(
    workspace: Workspace, event_id: str, text: str, *, by: str | None = None, dataset: str | None = None
) -> dict[str, Any]:
    """Add a comment to an event and return what it is now.

    Raises:
        DataError: no such event, or no text.
    """
    with open_events(workspace) as store:
        store.comment(event_id, text, actor=actor(by), dataset=dataset)
        row = store.event(event_id, dataset=dataset)
    return {name: row[name] for name in ("dataset", "event_id", "state", "human_state", "comments")}


def label(
    workspace: Workspace,
    dataset: str,
    series: str,
    span: tuple[str, str],
    *,
    variates: Sequence[str] = (),
    by: str | None = None,
    text: str | None = None,
) -> Change:
    """Store an anomaly that no detector reported, as a confirmed event.

    Args:
        workspace: whose store.
        dataset, series: where; both must be in the series store.
        span: first and last time, both included; at least one stored row lies in it.
        variates: the ones to blame, worst first.
        by, text: who and why.

    Raises:
        DataError: no such data set, series, row or variate.
    """
    start, end = span
    with closing(SeriesStore(workspace.database_url)) as stored:
        frame = stored.read(dataset, series=(series,), start=start, end=end)
    unknown = [name for name in variates if name not in frame.schema.targets]
    if unknown:
        hint = nearest(unknown[0], frame.schema.targets)
        known = listing(frame.schema.targets, 10)
        raise DataError(f"data set '{dataset}' has no target {listing(unknown)}{hint} (known: {known})")
    with open_events(workspace) as store:
        return store.label(
            dataset,
            series,
            start,
            end,
            actor=actor(by),
            comment=text,
            variates=variates,
            integer=frame.schema.has_integer_time,
        )


def export_table(events: EventTable, *, flat: bool) -> pl.DataFrame:
    """Return events as a table for other programs; ``flat`` writes the ranked variates as text, as CSV needs it."""
    if not flat:
        return events.table
    return events.table.with_columns(_names_of(pl.col("variates")))


def audit_trail(workspace: Workspace, event_id: str | None = None, dataset: str | None = None) -> pl.DataFrame:
    """Return the audit trail, oldest line first (``EventStore.log``)."""
    with open_events(workspace) as store:
        return store.log(event_id, dataset=dataset)


def prune(workspace: Workspace, before: str, *, by: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    """Remove events that ended before a time and return how many; the audit trail stays (``EventStore.prune``)."""
    with open_events(workspace) as store:
        _check_dataset(store, dataset)
        removed = store.prune(_moment(store, dataset, before), actor=actor(by), dataset=dataset)
    return {"removed": removed, "before": before}


def add_maintenance(workspace: Workspace, rule: dict[str, Any], *, by: str | None = None) -> dict[str, Any]:
    """Put a suppression rule or maintenance window into force and return it (settings: ``SuppressionRule``).

    Raises:
        ConfigError: a setting is wrong, or it would hide every event for ever, or none.
    """
    for name in ("dataset", "series", "variate"):
        if isinstance(rule.get(name), str) and not rule[name].strip():
            raise ConfigError(f"{name} is empty and would match no event; give a name or a pattern, or leave it out")
    with open_events(workspace) as store:
        number = store.suppress(rule, actor=actor(by))
        return store.suppressions().row(by_predicate=pl.col("id") == number, named=True)


def list_maintenance(workspace: Workspace, *, lifted: bool = False) -> pl.DataFrame:
    """Return the rules in force (``lifted``: also those that were lifted) with the events each has silenced."""
    with open_events(workspace) as store:
        return store.suppressions(all=lifted)


def lift_maintenance(
    workspace: Workspace, number: int, *, by: str | None = None, text: str | None = None
) -> dict[str, Any]:
    """End a rule and return it.

    Raises:
        DataError: no such rule, or it was lifted before.
    """
    with open_events(workspace) as store:
        store.lift(number, actor=actor(by), comment=text)
        return store.suppressions(all=True).row(by_predicate=pl.col("id") == number, named=True)


def _check_dataset(store: EventStore, dataset: str | None) -> None:
    names = store.datasets()["dataset"].to_list()
    if dataset is not None and dataset not in names:
        known = listing(names, 10) or "none"
        raise DataError(f"no events of data set '{dataset}'{nearest(dataset, names)} (data sets with events: {known})")


def _moment(store: EventStore, dataset: str | None, text: str) -> datetime | int:
    """Return a time given as text, as the data sets it is about count time; where both kinds occur, as it looks."""
    table = store.datasets()
    kinds = set(table.filter(pl.col("dataset") == dataset if dataset else True)["has_integer_time"])
    return parse_time(text, integer=kinds == {True} or (kinds != {False} and reads_as_integer(text)))
