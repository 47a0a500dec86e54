"""Incidents of events that are told one by one: later ones continue, join or move the incidents of earlier ones.

Who tells events gives a ``Naming``, which decides; the store keeps what was decided (``MEMBERS``) and reads no more of
it than new events can reach. Scopes do not see each other's events: another watch, a watch that was started anew, and
another grouping each have a scope of their own, whatever else was recorded about the same events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import polars as pl
from sqlalchemy import Connection, and_, delete, exists, insert, or_, select, update

from tsforge.data.event_records import moment
from tsforge.data.event_tables import EVENTS, MEMBERS
from tsforge.data.grid import TIME_DTYPE, time_number
from tsforge.data.store_records import now

_SPAN = ("event_id", "series_id", "start", "end", "rule")


class Naming(Protocol):
    """Decides which events share an incident."""

    @property
    def scope(self) -> str:
        """Whose incidents these are, and by which grouping; events of other scopes are never looked at."""
        ...

    def reach(self, start: datetime | int) -> datetime | int:
        """Return the earliest end of an event that can share an incident with one that starts at ``start``."""
        ...

    def name(self, new: pl.DataFrame, near: pl.DataFrame) -> pl.DataFrame:
        """Return ``event_id, incident_id`` (null: in none) of all new events and of near ones that move.

        Args:
            new: ``event_id, series_id, start, end, rule`` of the events told now.
            near: the same and ``incident_id`` of earlier events of the scope that end at ``reach`` or later, by start.
        """
        ...


def name_incidents(
    connection: Connection, dataset: str, rows: Sequence[Mapping[str, Any]], naming: Naming
) -> dict[str, str | None]:
    """Put events into incidents and keep that; the same events again change nothing.

    Args:
        connection: in a transaction that no other writer of events shares.
        dataset: what the events are about.
        rows: of the database (``event_records.incoming``), at least one, all with the same kind of time.
        naming: who decides.

    Returns:
        The incident of each of the rows, and of each earlier event that moves into another one, by event id.
    """
    integer = bool(rows[0]["has_integer_time"])
    first = moment(min(row["start"] for row in rows), integer=integer)
    reach = time_number(naming.reach(first), integer=integer)
    mine = and_(MEMBERS.c.dataset == dataset, MEMBERS.c.scope == naming.scope)
    near_by = select(MEMBERS).where(mine, MEMBERS.c.end >= reach).order_by(MEMBERS.c.start, MEMBERS.c.event_id)
    near = {row["event_id"]: dict(row) for row in connection.execute(near_by).mappings()}
    new: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["event_id"]
        earlier = new.get(name, near.get(name))  # an event never shrinks, as in ``event_records.advance``
        end = row["end"] if earlier is None else max(row["end"], earlier["end"])
        new[name] = {**{column: row[column] for column in _SPAN}, "end": end}
    spans = _frame(list(new.values()), integer=integer)
    found = naming.name(spans, _frame(list(near.values()), integer=integer, named=True))
    incidents: dict[str, str | None] = dict(found.select("event_id", "incident_id").iter_rows())
    key = {"dataset": dataset, "scope": naming.scope}
    fresh = []
    for name, incident in incidents.items():
        before = near.get(name)
        member = {**(before or key), **new.get(name, {}), "incident_id": incident}
        if incident is None or member == before:
            continue
        if before is None:
            fresh.append(member)
        else:
            connection.execute(update(MEMBERS).where(mine, MEMBERS.c.event_id == name).values(**member))
    if fresh:
        connection.execute(insert(MEMBERS), fresh)
    return incidents


def _frame(rows: list[dict[str, Any]], *, integer: bool, named: bool = False) -> pl.DataFrame:
    """Return spans of events with times as detectors write them."""
    schema: dict[str, Any] = {name: pl.Int64 if name in ("start", "end") else pl.String for name in _SPAN}
    table = pl.DataFrame(rows, schema={**schema, **({"incident_id": pl.String} if named else {})})
    return table if integer else table.with_columns(pl.col("start", "end").cast(TIME_DTYPE))


def move_events(connection: Connection, dataset: str, incidents: Mapping[str, str | None]) -> None:
    """Write the incidents of stored events; those that are in them already are left alone."""
    for name, incident in incidents.items():
        this = and_(EVENTS.c.dataset == dataset, EVENTS.c.event_id == name)
        other = or_(EVENTS.c.incident_id.is_(None), EVENTS.c.incident_id != incident)
        connection.execute(update(EVENTS).where(this, other).values(incident_id=incident, updated=now()))


def forget_pruned(connection: Connection) -> None:
    """Remove what is kept of the incidents of events that are no longer stored."""
    stored = exists().where(EVENTS.c.dataset == MEMBERS.c.dataset, EVENTS.c.event_id == MEMBERS.c.event_id)
    connection.execute(delete(MEMBERS).where(~stored))
