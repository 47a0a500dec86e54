"""Tables of the event store: anomalies, their incidents, rules that silence them, an audit trail only ever added to.

The database itself keeps the trail: triggers refuse to change or delete a row of it, whoever asks.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Double,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.types import TypeEngine

from tsforge.core.errors import BackendError
from tsforge.core.formats import check_version, version_in_text
from tsforge.data.sql import safe_url
from tsforge.data.store_records import lock
from tsforge.data.store_tables import INFO

FORMAT = 1
_FORMAT_KEY = "event_format"

METADATA = MetaData()
_ID: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers only INTEGER keys by itself

EVENTS = Table(
    "tsf_events",
    METADATA,
    Column("dataset", Text, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("series_id", Text, nullable=False),
    Column("has_integer_time", Boolean, nullable=False),
    Column("start", BigInteger, nullable=False),  # microseconds since 1970, or integer time; ends included
    Column("end", BigInteger, nullable=False),
    Column("peak_time", BigInteger),
    Column("peak_score", Double),
    Column("p_value", Double),
    Column("threshold", Double),
    Column("rule", Text, nullable=False),
    Column("state", String(10), nullable=False),  # open, closed: what the detector says
    Column("length", BigInteger),
    Column("continues", String(64)),
    Column("incident_id", String(64)),
    Column("variates", Text, nullable=False),  # JSON list, strongest first
    Column("human_state", String(14), nullable=False),  # new, acknowledged, dismissed, confirmed: what people say
    Column("acted_by", Text),
    Column("acted_at", DateTime),
    Column("suppressed_by", BigInteger),
    Column("source", Text, nullable=False),
    Column("artifact", Text, nullable=False),
    Column("facts", Text, nullable=False),
    Column("created", DateTime, nullable=False),
    Column("updated", DateTime, nullable=False),
    PrimaryKeyConstraint("dataset", "event_id"),
    Index("tsf_events_start", "dataset", "start"),
)

MEMBERS = Table(  # events by the incident that a source which tells them one by one has put them into
    "tsf_incident_members",
    METADATA,
    Column("dataset", Text, nullable=False),
    Column("scope", Text, nullable=False),  # whose incidents, by which grouping
    Column("event_id", String(64), nullable=False),
    Column("series_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),  # the span as that source told it
    Column("end", BigInteger, nullable=False),
    Column("rule", Text, nullable=False),
    Column("incident_id", String(64), nullable=False),
    PrimaryKeyConstraint("dataset", "scope", "event_id"),
    Index("tsf_incident_members_end", "dataset", "scope", "end"),
)

SUPPRESSIONS = Table(
    "tsf_suppressions",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("rule", Text, nullable=False),  # JSON of a SuppressionRule
    Column("author", Text, nullable=False),
    Column("created", DateTime, nullable=False),
    Column("lifted", DateTime),
    Column("lifted_by", Text),
    sqlite_autoincrement=True,
)

LOG = Table(
    "tsf_event_log",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("moment", DateTime, nullable=False),
    Column("actor", Text, nullable=False),
    Column("what", String(20), nullable=False),
    Column("dataset", Text),
    Column("event_id", String(64)),
    Column("before", Text),
    Column("after", Text),
    Column("suppression", BigInteger),
    Column("comment", Text),
    Index("tsf_event_log_event", "dataset", "event_id"),
    sqlite_autoincrement=True,
)

_REFUSAL = "the audit trail of events is append-only"
_SQLITE = [
    f"CREATE TRIGGER tsf_event_log_no_{verb.lower()} BEFORE {verb} ON tsf_event_log "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for verb in ("UPDATE", "DELETE")
] + [  # INSERT OR REPLACE deletes without calling a delete trigger
    "CREATE TRIGGER tsf_event_log_no_replace BEFORE INSERT ON tsf_event_log "
    "WHEN EXISTS (SELECT 1 FROM tsf_event_log WHERE id = NEW.id) "
    "BEGIN SELECT RAISE(ABORT, 'the audit trail of events is append-only'); END"
]
_POSTGRESQL = [
    "CREATE OR REPLACE FUNCTION tsf_event_log_keep() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    "CREATE TRIGGER tsf_event_log_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON tsf_event_log "
    "FOR EACH STATEMENT EXECUTE FUNCTION tsf_event_log_keep()",
]
for _dialect, _statements in (("sqlite", _SQLITE), ("postgresql", _POSTGRESQL)):
    for _statement in _statements:
        event.listen(LOG, "after_create", DDL(_statement).execute_if(dialect=_dialect))  # type: ignore[no-untyped-call]


def has_event_tables(connection: Connection) -> bool:
    """Return whether events were ever stored here."""
    return inspect(connection).has_table(EVENTS.name)


def make_event_tables(connection: Connection) -> None:
    """Create what is missing, in the caller's transaction.

    Raises:
        BackendError: a newer tsforge wrote the events.
    """
    lock(connection, "tsf_tables")  # two processes creating the same table would collide
    INFO.create(connection, checkfirst=True)
    METADATA.create_all(connection)
    check_format(connection)
    if connection.execute(select(INFO.c.value).where(INFO.c.key == _FORMAT_KEY)).scalar() is None:
        connection.execute(insert(INFO).values(key=_FORMAT_KEY, value=str(FORMAT)))


def check_format(connection: Connection) -> None:
    """Refuse events whose tables a newer tsforge made: it may mean something else by a column.

    Raises:
        BackendError: the format is newer than ours, or damaged.
    """
    found = connection.execute(select(INFO.c.value).where(INFO.c.key == _FORMAT_KEY)).scalar()
    if found is not None:
        what = f"the event store at {safe_url(connection.engine.url)}"
        check_version(version_in_text(found), FORMAT, what=what, kind="event format", error=BackendError)
