"""The event store: anomalies with what machines and people say about them, in the database of the series store.

A change and its line in the audit trail are one transaction. The detector's state of an event (``open``, ``closed``)
and people's (``new``, ``acknowledged``, ``dismissed``, ``confirmed``) are separate: neither overwrites the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import polars as pl
from sqlalchemy import Connection, Engine, and_, delete, func, insert, or_, select, update

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.data.event_incidents import Naming, forget_pruned, move_events, name_incidents
from tsforge.data.event_records import (
    HUMAN_STATES,
    MACHINE_STATES,
    TABLE,
    event_table,
    facts_of,
    incoming,
)
from tsforge.data.event_steps import (
    LOG_TABLE,
    RULE_TABLE,
    Recorded,
    Recording,
    checked_actor,
    checked_comment,
    comment_counts,
    compare_time,
    find_event,
    former_ids,
    is_named,
    keep_comment,
    key_of,
    last_words,
    log_line,
    rule_record,
    rules_in_force,
    write_log,
)
from tsforge.data.event_tables import EVENTS, LOG, SUPPRESSIONS, check_format, has_event_tables, make_event_tables
from tsforge.data.grid import TimeLike, time_number
from tsforge.data.sql import inserted_key, open_engine, transaction
from tsforge.data.store_records import lock, now
from tsforge.data.stored_json import stored_json
from tsforge.data.suppressions import SuppressionRule, control_signs, silenced_by

Action = Literal["acknowledged", "dismissed", "confirmed", "reopened"]
FROM: Mapping[str, tuple[str, ...]] = {
    "acknowledged": ("new",),
    "dismissed": ("new", "acknowledged"),
    "confirmed": ("new", "acknowledged"),
    "reopened": ("acknowledged", "dismissed", "confirmed"),
}
"""From which states each action is allowed; ``reopened`` leads back to ``new``."""

_LABEL = "label"
_LOCK = "tsf_events"  # one writer of events at a time: a rule and the events it silences must see each other


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an action did to an event; ``note`` says why nothing had to change, else empty."""

    dataset: str
    event_id: str
    before: str
    after: str
    actor: str
    note: str = ""


class EventStore:
    """Events in the database at ``database_url`` (SQLite or PostgreSQL); nothing is connected before the first call.

    Raises:
        ConfigError: the address is malformed or its driver is missing.
    """

    def __init__(self, database_url: str) -> None:
        self._engine = open_engine(database_url)
        self._is_ready = False

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for tests and administration."""
        return self._engine

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    @contextmanager
    def _writing(self, action: str) -> Iterator[Connection]:
        """Yield a connection in one transaction that no other writer of events shares."""
        with transaction(self._engine, action) as connection:
            if not self._is_ready:
                make_event_tables(connection)
            lock(connection, _LOCK)
            yield connection
        self._is_ready = True

    @contextmanager
    def _reading(self, action: str) -> Iterator[Connection | None]:
        """Yield a connection, or None where no event was ever stored."""
        with transaction(self._engine, action, write=False) as connection:
            is_there = self._is_ready or has_event_tables(connection)
            if is_there:
                check_format(connection)
            yield connection if is_there else None

    # --- what machines say ---

    def record(
        self,
        dataset: str,
        events: pl.DataFrame,
        *,
        source: str,
        artifact: str,
        facts: Mapping[str, Any] | None = None,
        incidents: Naming | None = None,
    ) -> Recorded:
        """Store what a detector found; storing the same again changes nothing.

        An event known by its id (or by the one of an older version, ``former_ids``) gets a later end, a higher peak, a
        smaller p-value, and goes from open to closed; never back, and what people said about it stays. New events that
        a suppression rule covers are stored with its number.

        Args:
            dataset: what the events are about.
            events: a table with the columns of ``AnomalyReport.events``; further columns are kept as facts.
            source: who found them, such as ``detect:ID`` or ``watch:NAME``; kept of the first report.
            artifact: id of the artifact that judged.
            facts: what else is worth keeping with each of the events.
            incidents: who puts these events into incidents, together with earlier ones of its scope, in the same
                transaction; None takes the table's ``incident_id`` where it has one.

        Raises:
            DataError: the table is no event table, or an id is stored with another series, start or rule.
            BackendError: the database refused; nothing is changed.
        """
        rows = incoming(dataset, events, facts or {})
        if not rows:
            return Recorded()
        with self._writing(f"record events of '{dataset}' in") as connection:
            former = former_ids(connection, dataset, rows)
            for row in rows:
                row |= {name: former.get(row[name], row[name]) for name in ("event_id", "continues")}
            named: dict[str, str | None] = {}
            if incidents is not None:
                named = name_incidents(connection, dataset, rows, incidents)
                rows = [{**row, "incident_id": named[row["event_id"]]} for row in rows]
            done = Recording(connection, dataset, checked_actor(source), artifact).take(rows)
            told = {row["event_id"] for row in rows}
            move_events(connection, dataset, {name: found for name, found in named.items() if name not in told})
        return replace(done, former=former)

    def silenced(self, dataset: str, events: pl.DataFrame) -> dict[str, int]:
        """Return which events of a table the rules in force would silence: id -> number of the rule.

        Raises:
            DataError: the table is no event table.
        """
        rows = incoming(dataset, events, {})
        with self._reading("read suppression rules of") as connection:
            rules = [] if connection is None else rules_in_force(connection)
        found = {str(row["event_id"]): silenced_by(facts_of(row), rules) for row in rows}
        return {name: rule for name, rule in found.items() if rule is not None}

    def events(
        self,
        dataset: str | None = None,
        *,
        state: str | Sequence[str] | None = None,
        since: TimeLike | None = None,
        series: str | Sequence[str] | None = None,
    ) -> pl.DataFrame:
        """Return stored events by start; columns: ``event_records.TABLE``.

        Args:
            dataset: only of this data set.
            state: only in these states: ``open``, ``closed`` (the detector's), ``new``, ``acknowledged``,
                ``dismissed``, ``confirmed`` (people's); with some of both kinds an event must be in one of each.
            since: only those that end at this time or later.
            series: names or shell-like patterns of series.

        Raises:
            DataError: an unknown state, or data sets with integer time and without are mixed.
            BackendError: the database did not answer.
        """
        statement = select(EVENTS)
        if dataset is not None:
            statement = statement.where(EVENTS.c.dataset == dataset)
        states = [state] if isinstance(state, str) else list(state or ())
        unknown = [name for name in states if name not in (*MACHINE_STATES, *HUMAN_STATES)]
        if unknown:
            raise DataError(
                f"no event state {listing(unknown)} (known: {listing((*MACHINE_STATES, *HUMAN_STATES), 6)})"
            )
        for column, names in ((EVENTS.c.state, MACHINE_STATES), (EVENTS.c.human_state, HUMAN_STATES)):
            wanted = [name for name in states if name in names]
            if wanted:
                statement = statement.where(column.in_(wanted))
        if since is not None:
            statement = statement.where(compare_time(EVENTS.c.end, since, ">="))
        with self._reading("read the events of") as connection:
            rows: list[dict[str, Any]] = []
            comments: dict[tuple[str, str], int] = {}
            if connection is not None:
                rows = [dict(row) for row in connection.execute(statement).mappings().all()]
                comments = comment_counts(connection, dataset)
        if series is not None:
            patterns = [series] if isinstance(series, str) else list(series)
            rows = [row for row in rows if any(_matches(row["series_id"], pattern) for pattern in patterns)]
        for row in rows:
            row["comments"] = comments.get((row["dataset"], row["event_id"]), 0)
        return event_table(rows)

    def event(self, event_id: str, *, dataset: str | None = None) -> dict[str, Any]:
        """Return one event as a record of ``events``, its facts as a dictionary.

        Raises:
            DataError: no such event, or several whose id begins like that.
        """
        with self._reading("read an event of") as connection:
            if connection is None:
                raise DataError(f"no event '{event_id}': no event was ever stored here; tsforge detect stores them")
            row = find_event(connection, event_id, dataset)
            counts = comment_counts(connection, row["dataset"])
        row["comments"] = counts.get((row["dataset"], row["event_id"]), 0)
        record = event_table([row]).row(0, named=True)
        where = f"the column facts of event '{row['event_id']}' of '{row['dataset']}' in the table {EVENTS.name}"
        return {**record, "facts": stored_json(record["facts"], dict, where)}

    def datasets(self) -> pl.DataFrame:
        """Return ``dataset, events, has_integer_time``, one row a data set that has events."""
        with self._reading("list the events of") as connection:
            found: Sequence[Any] = []
            if connection is not None:
                columns = (EVENTS.c.dataset, EVENTS.c.has_integer_time)
                found = connection.execute(select(*columns, func.count()).group_by(*columns)).all()
        schema = {"dataset": pl.String, "events": pl.Int64, "has_integer_time": pl.Boolean}
        rows = [(row[0], row[2], bool(row[1])) for row in found]
        return pl.DataFrame(rows, schema=schema, orient="row").sort("dataset", "has_integer_time")

    def version(self) -> str:
        """Return a text that changes whenever an event or a word about one does; the key of cached reads."""
        with self._reading("read the events of") as connection:
            if connection is None:
                return "nothing"
            said = connection.execute(select(func.max(LOG.c.id))).scalar()
            found = connection.execute(select(func.count(), func.max(EVENTS.c.updated))).one()
        return f"{said}-{found[0]}-{found[1]}"

    # --- what people say ---

    def set_state(
        self,
        event_id: str,
        state: Action,
        *,
        actor: str,
        comment: str | None = None,
        dataset: str | None = None,
        expected: str | None = None,
    ) -> Change:
        """Let a person acknowledge, dismiss, confirm or reopen an event.

        A state that the event already has is no error: the comment is kept, and ``note`` names who was first. A refused
        action keeps its comment too.

        Args:
            event_id: or the first signs of it, at least six.
            state: the action (``FROM`` says from which states it is allowed).
            actor: who.
            comment: why.
            dataset: needed only where the id occurs in several.
            expected: the state the person saw; the action is refused if it is another one by now.

        Raises:
            DataError: no such event, or the action is not allowed from the state it is in.
            BackendError: the database refused; nothing is changed.
        """
        if state not in get_args(Action):
            raise DataError(f"no action '{state}' (known: {listing(get_args(Action))})")
        who, text = checked_actor(actor), checked_comment(comment)
        refusal = None
        with self._writing("change an event of") as connection:
            row = find_event(connection, event_id, dataset)
            before, after = row["human_state"], "new" if state == "reopened" else str(state)
            by = "" if row["acted_by"] is None else f" (by {row['acted_by']}, {row['acted_at']:%Y-%m-%d %H:%M} UTC)"
            change = Change(dataset=row["dataset"], event_id=row["event_id"], before=before, after=after, actor=who)
            if before == after:
                keep_comment(connection, who, row, text)
                return Change(**{**vars(change), "note": f"was {before} already{by}; nothing changed"})
            if expected is not None and expected != before:
                refusal = f"event {row['event_id']} is {before} by now{by}, not {expected}; look at it again"
            elif before not in FROM[state]:
                refusal = f"event {row['event_id']} is {before}{by} and cannot be {state} from there; reopen it first"
            if refusal is None:
                values = {"human_state": after, "acted_by": who, "acted_at": now(), "updated": now()}
                connection.execute(update(EVENTS).where(key_of(row)).values(**values))
                write_log(connection, who, str(state), row, before=before, after=after, comment=text)
            else:
                keep_comment(connection, who, row, text)
        if refusal is not None:
            raise DataError(refusal + ("; your comment was kept" if text else ""))
        return change

    def comment(self, event_id: str, text: str, *, actor: str, dataset: str | None = None) -> None:
        """Add a comment to an event.

        Raises:
            DataError: no such event, or no text.
            BackendError: the database refused; nothing is changed.
        """
        who, words = checked_actor(actor), checked_comment(text)
        if words is None:
            raise DataError("the comment is empty; write what the next person should know")
        with self._writing("comment an event of") as connection:
            keep_comment(connection, who, find_event(connection, event_id, dataset), words)

    def label(
        self,
        dataset: str,
        series: str,
        start: TimeLike,
        end: TimeLike,
        *,
        actor: str,
        comment: str | None = None,
        variates: Sequence[str] = (),
        integer: bool = False,
    ) -> Change:
        """Store an anomaly that no detector reported, as a confirmed event; the same label again changes nothing.

        Args:
            dataset, series: where.
            start, end: first and last row, both included.
            actor, comment: who and why.
            variates: the ones to blame, worst first.
            integer: whether the data has integer time.

        Raises:
            DataError: the end lies before the start, or times are of the wrong kind.
            BackendError: the database refused; nothing is changed.
        """
        who, text = checked_actor(actor), checked_comment(comment)
        first, last = time_number(start, integer=integer), time_number(end, integer=integer)
        if last < first:
            raise DataError(f"the label ends ({end}) before it starts ({start}); exchange them")
        name = hashlib.sha256(f"{series}\n{first}\n{last}\n{_LABEL}".encode()).hexdigest()[:16]
        blank = dict.fromkeys(("contribution", "conditional", "additive"))
        row: dict[str, Any] = dict.fromkeys(TABLE)
        del row["comments"]
        row |= {
            "dataset": dataset,
            "event_id": name,
            "series_id": series,
            "has_integer_time": integer,
            "start": first,
            "end": last,
            "rule": _LABEL,
            "state": "closed",
            "human_state": "confirmed",
            "variates": json.dumps([{"variate": variate, **blank} for variate in variates]),
            "acted_by": who,
            "source": _LABEL,
            "artifact": "",
            "facts": "{}",
        }
        change = Change(dataset=dataset, event_id=name, before="", after="confirmed", actor=who)
        with self._writing(f"label an event of '{dataset}' in") as connection:
            key = and_(EVENTS.c.dataset == dataset, EVENTS.c.event_id == name)
            found = connection.execute(select(EVENTS).where(key)).mappings().one_or_none()
            if found is not None:
                known = dict(found)
                keep_comment(connection, who, known, text)
                state = known["human_state"]
                note = f"was labelled already by {known['acted_by']} and is {state}; nothing changed"
                return Change(**{**vars(change), "before": state, "after": state, "note": note})
            row |= dict.fromkeys(("acted_at", "created", "updated"), now())
            connection.execute(insert(EVENTS).values(**row))
            write_log(connection, who, "labelled", row, after="confirmed", comment=text)
        return change

    def log(self, event_id: str | None = None, *, dataset: str | None = None) -> pl.DataFrame:
        """Return the audit trail in order: columns ``event_steps.LOG_TABLE``.

        Args:
            event_id: only of this event, also one that was pruned (whole, or its first signs, at least six).
            dataset: only of this data set.

        Raises:
            DataError: nothing was ever written about that event.
            BackendError: the database did not answer.
        """
        statement = select(LOG).order_by(LOG.c.id)
        if dataset is not None:
            statement = statement.where(LOG.c.dataset == dataset)
        if event_id is not None:
            statement = statement.where(is_named(LOG.c.event_id, event_id))
        with self._reading("read the audit trail of") as connection:
            found: Sequence[Any] = [] if connection is None else connection.execute(statement).all()
        if event_id is not None and not found:
            raise DataError(f"the audit trail knows no event '{event_id}'; tsforge events list shows those stored")
        rows = [
            (
                *(row.id, row.moment.replace(tzinfo=UTC), row.actor, row.what, row.dataset, row.event_id),
                *(row.before, row.after, row.suppression, row.comment),
            )
            for row in found
        ]
        return pl.DataFrame(rows, schema=LOG_TABLE, orient="row")

    def confirmed(self, dataset: str, *, made_until: datetime | None = None) -> pl.DataFrame:
        """Return the confirmed spans of a data set, which leave calibration and rolling windows.

        Args:
            dataset: whose.
            made_until: as people had confirmed by then (UTC), by the audit trail; None = as it is now.

        Returns:
            ``series_id, start, end, event_id, confirmed_by, confirmed_at`` by series and start, ends included.
        """
        with self._reading("read the confirmed events of") as connection:
            rows: list[dict[str, Any]] = []
            if connection is not None:
                said = last_words(connection, dataset, made_until)
                statement = select(EVENTS).where(EVENTS.c.dataset == dataset)
                rows = [
                    {**row, "confirmed_by": said[row["event_id"]][0], "confirmed_at": said[row["event_id"]][1]}
                    for row in connection.execute(statement).mappings()
                    if row["event_id"] in said
                ]
        table = event_table(rows).select("series_id", "start", "end", "event_id")
        by = {row["event_id"]: (row["confirmed_by"], row["confirmed_at"].replace(tzinfo=UTC)) for row in rows}
        names = table["event_id"].to_list()
        return table.with_columns(
            pl.Series("confirmed_by", [by[name][0] for name in names], dtype=pl.String),
            pl.Series("confirmed_at", [by[name][1] for name in names], dtype=pl.Datetime("us", "UTC")),
        ).sort("series_id", "start", "event_id")

    def prune(self, before: TimeLike, *, actor: str, dataset: str | None = None) -> int:
        """Remove events that ended before a time and return how many; the audit trail stays whole.

        Confirmed ones stay, since calibrations rest on them, and so do open ones that nobody dismissed. Events
        that were pruned do not come back when old rows are judged again.

        Raises:
            BackendError: the database refused; nothing is changed.
        """
        who = checked_actor(actor)
        keep = or_(
            EVENTS.c.human_state == "confirmed",
            and_(EVENTS.c.state == "open", EVENTS.c.human_state != "dismissed"),
        )
        condition = and_(compare_time(EVENTS.c.end, before, "<"), ~keep)
        if dataset is not None:
            condition = and_(condition, EVENTS.c.dataset == dataset)
        with self._writing("prune the events of") as connection:
            rows = [dict(row) for row in connection.execute(select(EVENTS).where(condition)).mappings()]
            if rows:
                lines = [log_line(who, "pruned", row, before=row["human_state"]) for row in rows]
                connection.execute(insert(LOG), lines)
                connection.execute(delete(EVENTS).where(condition))
                forget_pruned(connection)
        return len(rows)

    # --- suppression rules and maintenance windows ---

    def suppress(self, rule: SuppressionRule | Mapping[str, Any], *, actor: str) -> int:
        """Put a rule into force and return its number; stored events that nobody has judged yet are silenced too.

        Raises:
            ConfigError: a setting of the rule is wrong (when given as plain values), or its reason is no plain text.
            BackendError: the database refused; nothing is changed.
        """
        wanted = rule if isinstance(rule, SuppressionRule) else validate(SuppressionRule, rule)
        if odd := control_signs(wanted.reason):
            raise ConfigError(f"reason: say why in plain text; it holds {len(odd)} control signs (first: {odd[0]!a})")
        who = checked_actor(actor)
        with self._writing("add a suppression rule to") as connection:
            values = {"rule": wanted.model_dump_json(), "author": who, "created": now()}
            result = connection.execute(insert(SUPPRESSIONS).values(**values))
            rule_id = inserted_key(result)
            write_log(connection, who, "rule added", None, suppression=rule_id, comment=wanted.reason)
            statement = select(EVENTS).where(EVENTS.c.human_state == "new", EVENTS.c.suppressed_by.is_(None))
            for row in [dict(found) for found in connection.execute(statement).mappings()]:
                if wanted.silences(facts_of(row)):
                    connection.execute(update(EVENTS).where(key_of(row)).values(suppressed_by=rule_id, updated=now()))
                    write_log(connection, who, "suppressed", row, suppression=rule_id)
        return rule_id

    def lift(self, rule: int, *, actor: str, comment: str | None = None) -> None:
        """End a rule: it silences nothing from now on. What it has silenced stays so until it goes on.

        Raises:
            DataError: no such rule, or it was lifted before.
            BackendError: the database refused; nothing is changed.
        """
        who, text = checked_actor(actor), checked_comment(comment)
        with self._writing("lift a suppression rule of") as connection:
            row = connection.execute(select(SUPPRESSIONS).where(SUPPRESSIONS.c.id == rule)).one_or_none()
            if row is None:
                known = connection.execute(select(SUPPRESSIONS.c.id).order_by(SUPPRESSIONS.c.id)).scalars()
                raise DataError(f"no suppression rule {rule} (known: {listing(known, 10) or 'none'})")
            if row.lifted is not None:
                raise DataError(f"rule {rule} was lifted already by {row.lifted_by}, {row.lifted:%Y-%m-%d %H:%M} UTC")
            key = SUPPRESSIONS.c.id == rule
            connection.execute(update(SUPPRESSIONS).where(key).values(lifted=now(), lifted_by=who))
            write_log(connection, who, "rule lifted", None, suppression=rule, comment=text)

    def suppressions(self, *, all: bool = False) -> pl.DataFrame:
        """Return the rules in force (with ``all`` also those lifted) and how many events each has silenced so far.

        Columns: ``id, kind, dataset, series, variate, score_below, start, end, weekdays, opens, closes, timezone,
        reason, author, created, lifted, lifted_by, hits``; ``start`` and ``end`` as text.
        """
        with self._reading("read the suppression rules of") as connection:
            found: Sequence[Any] = []
            hits: dict[int, int] = {}
            if connection is not None:
                found = connection.execute(select(SUPPRESSIONS).order_by(SUPPRESSIONS.c.id)).all()
                counted = select(LOG.c.suppression, func.count()).where(LOG.c.what == "suppressed")
                hits = {row[0]: row[1] for row in connection.execute(counted.group_by(LOG.c.suppression))}
        rows = [rule_record(row, hits.get(row.id, 0)) for row in found if all or row.lifted is None]
        return pl.DataFrame(rows, schema=RULE_TABLE)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
