"""Steps of a change to the event store inside its transaction: find, record, write the audit trail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl
from pydantic import ValidationError
from sqlalchemy import Connection, and_, func, insert, or_, select, update

from tsforge.core.errors import BackendError, ConfigError, DataError, listing
from tsforge.data.event_records import advance, event_id, facts_of, moment
from tsforge.data.event_tables import EVENTS, LOG, SUPPRESSIONS
from tsforge.data.grid import TimeLike, show_time, time_number
from tsforge.data.store_records import now
from tsforge.data.stored_json import stored_json
from tsforge.data.suppressions import SuppressionRule, control_signs, silenced_by

SAID = ("acknowledged", "dismissed", "confirmed", "reopened", "labelled")
"""What people may say about an event, as the audit trail names it."""

_IN_LIMIT = 5_000  # databases limit the values of one statement
_LONGEST = 20_000  # signs of a comment


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a call of ``record`` did.

    Attributes:
        new, updated, unchanged: events stored for the first time, moved forward, or as they were.
        suppressed: of the new ones, those that a rule silences.
        pruned: events that were pruned earlier; they are not stored again.
        notify: ids worth telling somebody: new and not silenced, or just come out of a maintenance window.
        former: of events that an older version stored, the id they were given now -> the id they keep.
    """

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    suppressed: int = 0
    pruned: int = 0
    notify: tuple[str, ...] = ()
    former: Mapping[str, str] = field(default_factory=dict)


def former_ids(connection: Connection, dataset: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return which events are stored under an id without their measure: id -> the older id.

    Versions that left the measure out of the ids left it out of the facts too, so these tell them from events of a
    detector whose ids still have none. Kind and joint, which only some of them kept (``score``), must be the same.
    """
    older: dict[str, tuple[str, str]] = {}
    for row in rows:
        measure = json.loads(row["facts"]).get("measure")
        start = moment(row["start"], integer=bool(row["has_integer_time"]))
        name = event_id(row["series_id"], start, row["rule"])
        if measure and name != row["event_id"]:
            older[row["event_id"]] = (name, measure)
    names = list(dict.fromkeys([*older, *(name for name, _ in older.values())]))
    stored: dict[str, dict[str, Any] | None] = {}
    for low in range(0, len(names), _IN_LIMIT):
        found = select(EVENTS.c.event_id, EVENTS.c.facts).where(
            EVENTS.c.dataset == dataset, EVENTS.c.event_id.in_(names[low : low + _IN_LIMIT])
        )
        for kept in connection.execute(found):
            stored[kept.event_id] = None  # facts that cannot be read make nobody's older self
            with suppress(BackendError):
                stored[kept.event_id] = stored_json(kept.facts, dict, kept.event_id)
    return {
        new: name
        for new, (name, measure) in older.items()
        if new not in stored
        and (facts := stored.get(name)) is not None
        and facts.get("measure", measure) == measure
        and f"{measure}, ".startswith(f"{facts.get('score', measure)}, ")
    }


class Recording:
    """One call of ``record`` inside its transaction."""

    def __init__(self, connection: Connection, dataset: str, source: str, artifact: str) -> None:
        self.connection, self.dataset, self.source, self.artifact = connection, dataset, source, artifact
        self.rules = rules_in_force(connection)
        self.counts = dict.fromkeys(("new", "updated", "unchanged", "suppressed", "pruned"), 0)
        self.notify: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def take(self, rows: Sequence[dict[str, Any]]) -> Recorded:
        """Store the rows in order (``event_records.incoming``) and return what that did."""
        names = list(dict.fromkeys(str(row["event_id"]) for row in rows))
        known, pruned = self._known(names)
        stored = dict(known)
        for row in rows:
            name = row["event_id"]
            if name in stored:
                stored[name] = self._advanced(stored[name], row)
            elif name in pruned:
                self.counts["pruned"] += 1
            else:
                stored[name] = self._new(row)
        fresh = [row for name, row in stored.items() if name not in known]
        if fresh:
            self.connection.execute(insert(EVENTS), fresh)
        for name, row in known.items():
            if stored[name] is not row:
                self.connection.execute(update(EVENTS).where(key_of(row)).values(**stored[name]))
        if self.lines:
            self.connection.execute(insert(LOG), self.lines)
        counts = self.counts
        return Recorded(
            new=counts["new"],
            updated=counts["updated"],
            unchanged=counts["unchanged"],
            suppressed=counts["suppressed"],
            pruned=counts["pruned"],
            notify=tuple(self.notify),
        )

    def _known(self, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        stored: dict[str, dict[str, Any]] = {}
        pruned: set[str] = set()
        for low in range(0, len(names), _IN_LIMIT):
            some = names[low : low + _IN_LIMIT]
            mine = select(EVENTS).where(EVENTS.c.dataset == self.dataset, EVENTS.c.event_id.in_(some))
            stored |= {row["event_id"]: dict(row) for row in self.connection.execute(mine).mappings()}
            gone = select(LOG.c.event_id).where(LOG.c.dataset == self.dataset, LOG.c.event_id.in_(some))
            pruned |= set(self.connection.execute(gone.where(LOG.c.what == "pruned")).scalars())
        return stored, pruned

    def _new(self, row: dict[str, Any]) -> dict[str, Any]:
        rule = silenced_by(facts_of(row), self.rules)
        self._line("recorded", row, after=row["state"])
        self.counts["new"] += 1
        if rule is None:
            self.notify.append(row["event_id"])
        else:
            self.counts["suppressed"] += 1
            self._line("suppressed", row, suppression=rule)
        made = {**row, "human_state": "new", "suppressed_by": rule, "acted_by": None, "acted_at": None}
        made |= {"source": self.source, "artifact": self.artifact, **dict.fromkeys(("created", "updated"), now())}
        return made

    def _advanced(self, old: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        changes = advance(old, row)
        if not changes:
            self.counts["unchanged"] += 1
            return old
        moved = {**old, **changes, "updated": now()}
        # a growing event may leave its window, and then it has to be seen; one that is seen is never hidden again
        if old["suppressed_by"] is not None and silenced_by(facts_of(moved), self.rules) is None:
            moved["suppressed_by"] = None
            self.notify.append(row["event_id"])
            self._line("surfaced", row, suppression=old["suppressed_by"])
        # growth alone is no line of the trail: a fault of a week would write thousands
        if "state" in changes:
            self._line("closed", row, before=old["state"], after=moved["state"])
        elif "end" in changes and old["state"] == "closed":
            self._line("extended", row, before=_shown(old), after=_shown(moved))
        self.counts["updated"] += 1
        return moved

    def _line(self, what: str, row: Mapping[str, Any], **facts: Any) -> None:
        self.lines.append(log_line(self.source, what, row, **facts))


LOG_TABLE: dict[str, Any] = {
    "id": pl.Int64,
    "when": pl.Datetime("us", "UTC"),
    "actor": pl.String,
    "what": pl.String,
    "dataset": pl.String,
    "event_id": pl.String,
    "from": pl.String,
    "to": pl.String,
    "suppression": pl.Int64,
    "comment": pl.String,
}
RULE_TABLE: dict[str, Any] = {
    "id": pl.Int64,
    "kind": pl.String,
    "dataset": pl.String,
    "series": pl.String,
    "variate": pl.String,
    "score_below": pl.Float64,
    "start": pl.String,
    "end": pl.String,
    "weekdays": pl.String,
    "opens": pl.String,
    "closes": pl.String,
    "timezone": pl.String,
    "reason": pl.String,
    "author": pl.String,
    "created": pl.Datetime("us", "UTC"),
    "lifted": pl.Datetime("us", "UTC"),
    "lifted_by": pl.String,
    "hits": pl.Int64,
}


def rule_record(row: Any, hits: int) -> dict[str, Any]:
    """Return a stored rule as a record of ``RULE_TABLE``; one that cannot be read has the kind ``unreadable``."""
    about = {
        "id": row.id,
        "author": row.author,
        "created": row.created.replace(tzinfo=UTC),
        "lifted": None if row.lifted is None else row.lifted.replace(tzinfo=UTC),
        "lifted_by": row.lifted_by,
        "hits": hits,
    }
    try:
        rule = SuppressionRule.model_validate_json(row.rule)
    except ValidationError:
        return dict.fromkeys(RULE_TABLE) | about | {"kind": "unreadable"}
    weekly = rule.weekly
    return about | {
        "kind": rule.kind,
        "dataset": rule.dataset,
        "series": rule.series,
        "variate": rule.variate,
        "score_below": rule.score_below,
        "start": None if rule.start is None else show_time(rule.start),
        "end": None if rule.end is None else show_time(rule.end),
        "weekdays": None if weekly is None else ",".join(weekly.weekdays),
        "opens": None if weekly is None else weekly.opens,
        "closes": None if weekly is None else weekly.closes,
        "timezone": None if weekly is None else weekly.timezone,
        "reason": rule.reason,
    }


def rules_in_force(connection: Connection) -> list[tuple[int, SuppressionRule]]:
    """Return the rules that are not lifted, oldest first, with their numbers.

    Raises:
        BackendError: one of them cannot be read.
    """
    found = connection.execute(
        select(SUPPRESSIONS.c.id, SUPPRESSIONS.c.rule)
        .where(SUPPRESSIONS.c.lifted.is_(None))
        .order_by(SUPPRESSIONS.c.id)
    )
    return [(row.id, _readable(row.id, row.rule)) for row in found]


def _readable(rule: int, text: str) -> SuppressionRule:
    try:
        return SuppressionRule.model_validate_json(text)
    except ValidationError as error:
        fault = "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in error.errors())
        raise BackendError(
            f"suppression rule {rule} of the store cannot be read ({fault}); end it with `tsforge maintenance lift "
            f"{rule}` and add it anew"
        ) from error


def key_of(row: Mapping[str, Any]) -> Any:
    """Return the condition that picks one event."""
    return and_(EVENTS.c.dataset == row["dataset"], EVENTS.c.event_id == row["event_id"])


def is_named(column: Any, name: str) -> Any:
    """Return the condition that an id is this one or begins with it."""
    if len(name) < 6:
        raise DataError(f"'{name}' is too short for an event id; give at least six of its signs")
    return or_(column == name, column.startswith(name, autoescape=True))


def find_event(connection: Connection, event_id: str, dataset: str | None) -> dict[str, Any]:
    """Return the one stored event of that id.

    Raises:
        DataError: there is none, or several.
    """
    rows: list[dict[str, Any]] = []
    for named in (EVENTS.c.event_id == event_id, is_named(EVENTS.c.event_id, event_id)):  # a beginning is a long search
        statement = select(EVENTS).where(named)
        if dataset is not None:
            statement = statement.where(EVENTS.c.dataset == dataset)
        rows = [dict(row) for row in connection.execute(statement).mappings()]
        if rows:
            break
    if len(rows) == 1:
        return rows[0]
    if rows:
        names = listing(f"{row['event_id']} of '{row['dataset']}'" for row in rows)
        raise DataError(
            f"'{event_id}' names {len(rows)} events: {names}; give the whole id, and the data set (--dataset NAME)"
        )
    where = "" if dataset is None else f" in data set '{dataset}'"
    gone = select(LOG.c.moment).where(is_named(LOG.c.event_id, event_id), LOG.c.what == "pruned")
    when = connection.execute(gone).scalars().first()
    if when is not None:
        raise DataError(f"event '{event_id}' was pruned {when:%Y-%m-%d}; only its audit trail is left (events log)")
    raise DataError(f"no event '{event_id}'{where}; tsforge events list shows those stored")


def log_line(
    actor: str,
    what: str,
    row: Mapping[str, Any] | None,
    *,
    before: str | None = None,
    after: str | None = None,
    suppression: int | None = None,
    comment: str | None = None,
) -> dict[str, Any]:
    """Return one line of the audit trail."""
    return {
        "moment": now(),
        "actor": actor,
        "what": what,
        "dataset": None if row is None else row["dataset"],
        "event_id": None if row is None else row["event_id"],
        "before": before,
        "after": after,
        "suppression": suppression,
        "comment": comment,
    }


def write_log(connection: Connection, actor: str, what: str, row: Mapping[str, Any] | None, **facts: Any) -> None:
    """Add one line to the audit trail; nothing in this package changes or removes one."""
    connection.execute(insert(LOG).values(**log_line(actor, what, row, **facts)))


def keep_comment(connection: Connection, actor: str, row: Mapping[str, Any], comment: str | None) -> None:
    """Add a comment to the trail of an event, if there is one."""
    if comment is not None:
        write_log(connection, actor, "commented", row, comment=comment)


def comment_counts(connection: Connection, dataset: str | None) -> dict[tuple[str, str], int]:
    """Return how many comments each event has: (dataset, id) -> number."""
    statement = (
        select(LOG.c.dataset, LOG.c.event_id, func.count())
        .where(LOG.c.comment.is_not(None), LOG.c.event_id.is_not(None))
        .group_by(LOG.c.dataset, LOG.c.event_id)
    )
    if dataset is not None:
        statement = statement.where(LOG.c.dataset == dataset)
    return {(row[0], row[1]): row[2] for row in connection.execute(statement)}


def last_words(connection: Connection, dataset: str, until: datetime | None) -> dict[str, tuple[str, datetime]]:
    """Return who confirmed an event and when, for events whose last human word by then is a confirmation."""
    statement = (
        select(LOG.c.event_id, LOG.c.actor, LOG.c.moment, LOG.c.after)
        .where(LOG.c.dataset == dataset, LOG.c.what.in_(SAID))
        .order_by(LOG.c.id)
    )
    if until is not None:
        plain = until.astimezone(UTC).replace(tzinfo=None) if until.tzinfo is not None else until
        statement = statement.where(LOG.c.moment <= plain)
    last = {row.event_id: row for row in connection.execute(statement)}
    return {name: (row.actor, row.moment) for name, row in last.items() if row.after == "confirmed"}


def compare_time(column: Any, time: TimeLike, how: Literal["<", ">="]) -> Any:
    """Compare with a time of the kind it is: a number concerns data with integer time, anything else the others."""
    integer = isinstance(time, int)
    value = time_number(time, integer=integer)
    compared = column < value if how == "<" else column >= value
    return and_(EVENTS.c.has_integer_time == integer, compared)


def _shown(row: Mapping[str, Any]) -> str:
    return f"{row['state']}, until {show_time(moment(row['end'], integer=bool(row['has_integer_time'])))}"


def checked_actor(name: str) -> str:
    """Return who acts.

    Raises:
        ConfigError: nobody, or a name no line of text can hold.
    """
    clean = " ".join(name.split())
    if not clean or len(clean) > 200 or not clean.isprintable():
        raise ConfigError("say who acts, in at most 200 printable signs (--by NAME)")
    return clean


def checked_comment(text: str | None) -> str | None:
    """Return a comment without blanks around it, None when nothing is left.

    Raises:
        DataError: it is too long, or holds signs that are no text: a terminal that shows it would obey them.
    """
    plain = "" if text is None else text.replace("\r\n", "\n").strip()
    if not plain:
        return None
    if len(plain) > _LONGEST:
        raise DataError(f"a comment is plain text of at most {_LONGEST} signs; this one has {len(plain)}")
    if odd := control_signs(plain):
        raise DataError(
            f"a comment is plain text; this one holds {len(odd)} control signs (first: {odd[0]!a}): leave them out"
        )
    return plain
