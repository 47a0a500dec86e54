"""What a watch must not lose, in one SQLite file: the detector, the place in its source, and events on their way out.

``commit`` puts the three of them into one transaction (write-ahead log, ``synchronous=FULL``): after a kill at any
moment all of a chunk is there or nothing of it. Sinks are fed from the outbox and acknowledge by sequence number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    func,
    insert,
    inspect,
    literal,
    select,
    update,
)

from tsforge.core.errors import BackendError
from tsforge.core.formats import check_version
from tsforge.data.sql import inserted_key, open_engine, transaction
from tsforge.data.stored_json import stored_json

FORMAT_VERSION = 1
UNNAMED = "not delivered when the sink was no longer named"  # why what it had still to get is a dead letter
KEPT_REFUSALS = 1_000  # newest refusals kept in words; their number is counted elsewhere

_META = MetaData()
_WATCH = Table(
    "watch",
    _META,
    Column("id", Integer, primary_key=True),
    Column("format", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("identity", Text, nullable=False),
    Column("detector", LargeBinary, nullable=False),
    Column("position", Text, nullable=False),
    Column("facts", Text, nullable=False),
    Column("committed", String(40), nullable=False),
)
_OUTBOX = Table(
    "outbox",
    _META,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("generation", Integer, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("transition", String(16), nullable=False),
    Column("record", Text, nullable=False),
    UniqueConstraint("generation", "event_id", "transition"),
    sqlite_autoincrement=True,  # a number is never given twice, also after rows are gone
)
_SINKS = Table(
    "sinks",
    _META,
    Column("name", String(100), primary_key=True),
    Column("acked", BigInteger, nullable=False),
    Column("mark", BigInteger, nullable=False),
    Column("delivered", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_try", Float, nullable=False),
    Column("error", Text),
)
_DROPPED = Table(
    "dropped_sinks",
    _META,
    Column("name", String(100), primary_key=True),
    Column("acked", BigInteger, nullable=False),  # all up to this one is delivered or a dead letter
)
_DEAD = Table(
    "dead_letters",
    _META,
    Column("sink", String(100), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("generation", Integer, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("transition", String(16), nullable=False),
    Column("record", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("buried", String(40), nullable=False),
)
_FILES = Table(
    "files",
    _META,
    Column("name", Text, primary_key=True),
    Column("stamp", Text, nullable=False),
    Column("refused", Integer, nullable=False),
)
_REFUSED = Table(
    "refused",
    _META,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("what", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", String(40), nullable=False),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A watch as of its last commit; ``generation`` counts how often it was started anew."""

    identity: dict[str, Any]
    generation: int
    detector: bytes
    position: dict[str, Any]
    facts: dict[str, Any]
    committed: str


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A transition on its way: ``record`` is what sinks write, as JSON text."""

    seq: int
    generation: int
    event_id: str
    transition: str
    record: str


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that was read or refused; ``stamp`` says which state of it."""

    name: str
    stamp: str
    refused: bool


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a sink is: ``mark`` is its own number (bytes of a file), ``next_try`` seconds since 1970."""

    acked: int = 0
    mark: int = 0
    delivered: int = 0
    attempts: int = 0
    next_try: float = 0.0
    error: str | None = None


def now_text() -> str:
    """Return the present in UTC as records write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class WatchState:
    """The state file of one watch; one process writes it at a time, others may look.

    Args:
        path: of the SQLite file; it is made where it is missing.
        read_only: only look; the file must exist.

    Raises:
        BackendError: the file cannot be made or opened, or was made by a newer tsforge.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._engine = open_engine(URL.create("sqlite", database=str(path)), read_only=read_only)
        if not read_only:
            with transaction(self._engine, "make the tables of") as connection:
                _META.create_all(connection)

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def snapshot(self) -> Snapshot | None:
        """Return what was committed last, None where nothing was.

        Raises:
            BackendError: the file is of a newer format, or does not answer.
        """
        with transaction(self._engine, "read the watch from", write=False) as connection:
            is_made = inspect(connection).has_table(_WATCH.name)  # somebody may look while it is being made
            row = connection.execute(select(_WATCH)).one_or_none() if is_made else None
        if row is None:
            return None
        check_version(row.format, FORMAT_VERSION, what=str(self.path), kind="watch format", error=BackendError)
        return Snapshot(
            identity=self._kept(row, "identity"),
            generation=row.generation,
            detector=row.detector,
            position=self._kept(row, "position"),
            facts=self._kept(row, "facts"),
            committed=row.committed,
        )

    def _kept(self, row: Row[Any], name: str) -> dict[str, Any]:
        return stored_json(getattr(row, name), dict, f"{self.path}: the column {name} of the table {_WATCH.name}")

    def begin(self, identity: Mapping[str, Any], detector: bytes, facts: Mapping[str, Any]) -> Snapshot:
        """Start the watch, or start it anew: no place in the source; transitions still on their way stay on it."""
        with transaction(self._engine, "start a watch in") as connection:
            generation = (connection.execute(select(_WATCH.c.generation)).scalar() or 0) + 1
            for table in (_WATCH, _FILES, _REFUSED):
                connection.execute(delete(table))
            connection.execute(
                insert(_WATCH).values(
                    id=1,
                    format=FORMAT_VERSION,
                    generation=generation,
                    identity=json.dumps(identity),
                    detector=detector,
                    position="{}",
                    facts=json.dumps(facts),
                    committed=now_text(),
                )
            )
        found = self.snapshot()
        assert found is not None
        return found

    def commit(
        self,
        *,
        generation: int,
        position: Mapping[str, Any],
        facts: Mapping[str, Any],
        detector: bytes | None = None,
        transitions: Sequence[tuple[str, str, Mapping[str, Any]]] = (),
        files: Iterable[SourceFile] = (),
        forgotten: Iterable[str] = (),
        refusals: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Store a chunk whole: detector, place in the source, counts, and transitions for the sinks.

        Args:
            generation: of the snapshot that this one follows.
            position: where the source goes on.
            facts: counts and what a status shows.
            detector: its state; None = as before.
            transitions: event id, transition, record of it; sinks get the record with its sequence number.
            files: read or refused by now. forgotten: names that are gone from the folder.
            refusals: what was refused, and why.

        Raises:
            BackendError: the disk refused; nothing of the chunk is stored.
        """
        moment = now_text()
        values: dict[str, Any] = {
            "position": json.dumps(position),
            "facts": json.dumps(facts),
            "committed": moment,
        }
        if detector is not None:
            values["detector"] = detector
        with transaction(self._engine, "commit a chunk to") as connection:
            connection.execute(update(_WATCH).where(_WATCH.c.generation == generation).values(**values))
            for event_id, transition, record in transitions:
                key = {"generation": generation, "event_id": event_id, "transition": transition}
                result = connection.execute(insert(_OUTBOX).values(**key, record=""))
                seq = inserted_key(result)
                text = json.dumps({"seq": seq, **record}, allow_nan=False, ensure_ascii=False)
                connection.execute(update(_OUTBOX).where(_OUTBOX.c.seq == seq).values(record=text))
            for item in files:
                connection.execute(delete(_FILES).where(_FILES.c.name == item.name))
                connection.execute(insert(_FILES).values(name=item.name, stamp=item.stamp, refused=int(item.refused)))
            for name in forgotten:
                connection.execute(delete(_FILES).where(_FILES.c.name == name))
            for what, reason in refusals:
                connection.execute(insert(_REFUSED).values(what=what, reason=reason, at=moment))
            newest = select(func.max(_REFUSED.c.id) - KEPT_REFUSALS).scalar_subquery()
            connection.execute(delete(_REFUSED).where(_REFUSED.c.id <= newest))
            _prune(connection)

    def files(self) -> dict[str, SourceFile]:
        """Return the files that were read or refused, by name."""
        with transaction(self._engine, "read the files of", write=False) as connection:
            rows = connection.execute(select(_FILES)).all()
        return {row.name: SourceFile(name=row.name, stamp=row.stamp, refused=bool(row.refused)) for row in rows}

    def refusals(self, limit: int = 20) -> list[dict[str, str]]:
        """Return the newest refusals: ``what, reason, at``."""
        with transaction(self._engine, "read the refusals of", write=False) as connection:
            rows = connection.execute(select(_REFUSED).order_by(_REFUSED.c.id.desc()).limit(limit)).all()
        return [{"what": row.what, "reason": row.reason, "at": row.at} for row in rows]

    # --- the way out ---

    def enlist(self, names: Iterable[str]) -> dict[str, int]:
        """Make these the sinks: new ones get what is still in the outbox and all that follows, others are dropped.

        What a dropped sink had still to get becomes its dead letters. Named again, it goes on after all that there was
        by then, so that it gets none twice.

        Returns:
            Sinks that were dropped with transitions to get, and how many.
        """
        wanted = list(names)
        with transaction(self._engine, "list the sinks in") as connection:
            rows = connection.execute(select(_SINKS.c.name, _SINKS.c.acked)).all()
            gone = [row for row in rows if row.name not in wanted]
            left = {row.name: _bury_rest(connection, row.name, row.acked) for row in gone}
            first, last = connection.execute(select(func.min(_OUTBOX.c.seq), func.max(_OUTBOX.c.seq))).one()
            for row in gone:
                connection.execute(delete(_DROPPED).where(_DROPPED.c.name == row.name))
                connection.execute(insert(_DROPPED).values(name=row.name, acked=max(row.acked, last or 0)))
            connection.execute(delete(_SINKS).where(_SINKS.c.name.not_in(wanted)))
            for name in set(wanted) - {row.name for row in rows}:
                buried = connection.execute(select(func.max(_DEAD.c.seq)).where(_DEAD.c.sink == name)).scalar()
                dropped = connection.execute(select(_DROPPED.c.acked).where(_DROPPED.c.name == name)).scalar()
                connection.execute(delete(_DROPPED).where(_DROPPED.c.name == name))
                acked = max(0 if first is None else first - 1, buried or 0, dropped or 0)
                blank = {"mark": 0, "delivered": 0, "attempts": 0, "next_try": 0.0}
                connection.execute(insert(_SINKS).values(name=name, acked=acked, **blank))
            _prune(connection)
        return {name: count for name, count in left.items() if count}

    def cursors(self) -> dict[str, Cursor]:
        """Return how far every sink is."""
        with transaction(self._engine, "read the sinks of", write=False) as connection:
            rows = connection.execute(select(_SINKS)).mappings().all()
        return {row["name"]: Cursor(**{key: value for key, value in row.items() if key != "name"}) for row in rows}

    def pending(self, sink: str, limit: int) -> list[Outgoing]:
        """Return the next transitions for a sink, in order."""
        acked = select(_SINKS.c.acked).where(_SINKS.c.name == sink).scalar_subquery()
        statement = select(_OUTBOX).where(_OUTBOX.c.seq > acked).order_by(_OUTBOX.c.seq).limit(limit)
        with transaction(self._engine, "read the outbox of", write=False) as connection:
            return [Outgoing(**row) for row in connection.execute(statement).mappings()]

    def depths(self) -> dict[str, int]:
        """Return how many transitions each sink still has to get."""
        count = select(func.count()).where(_OUTBOX.c.seq > _SINKS.c.acked).scalar_subquery()
        with transaction(self._engine, "read the outbox of", write=False) as connection:
            return {row[0]: row[1] for row in connection.execute(select(_SINKS.c.name, count))}

    def acknowledge(self, sink: str, seq: int, *, mark: int = 0, delivered: int = 1) -> None:
        """Note that a sink has everything up to ``seq``; what all sinks have leaves the outbox."""
        values = {"acked": seq, "mark": mark, "attempts": 0, "next_try": 0.0, "error": None}
        with transaction(self._engine, "acknowledge a delivery in") as connection:
            connection.execute(
                update(_SINKS).where(_SINKS.c.name == sink).values(**values, delivered=_SINKS.c.delivered + delivered)
            )
            _prune(connection)

    def postpone(self, sink: str, *, attempts: int, next_try: float, error: str) -> None:
        """Note a failed try and when the next one is due."""
        with transaction(self._engine, "note a failed delivery in") as connection:
            values = {"attempts": attempts, "next_try": next_try, "error": error}
            connection.execute(update(_SINKS).where(_SINKS.c.name == sink).values(**values))

    def bury(self, sink: str, item: Outgoing, reason: str) -> None:
        """Lay a transition aside that a sink does not take, and go on with the next one."""
        with transaction(self._engine, "bury a delivery in") as connection:
            dead = {**vars(item), "sink": sink, "reason": reason, "buried": now_text()}
            connection.execute(delete(_DEAD).where(_DEAD.c.sink == sink, _DEAD.c.seq == item.seq))
            connection.execute(insert(_DEAD).values(**dead))
            values = {"acked": item.seq, "attempts": 0, "next_try": 0.0, "error": reason}
            connection.execute(update(_SINKS).where(_SINKS.c.name == sink).values(**values))
            _prune(connection)

    def dead_letters(self) -> list[dict[str, Any]]:
        """Return what was laid aside, in order: the fields of ``Outgoing``, ``sink, reason, buried``."""
        with transaction(self._engine, "read the dead letters of", write=False) as connection:
            return [dict(row) for row in connection.execute(select(_DEAD).order_by(_DEAD.c.seq)).mappings()]

    def discard(self, sink: str) -> int:
        """Remove all dead letters of a sink, which nobody will get; return how many."""
        with transaction(self._engine, "discard dead letters in") as connection:
            return int(connection.execute(delete(_DEAD).where(_DEAD.c.sink == sink)).rowcount)

    def revive(self, sink: str, seqs: Sequence[int], *, delivered: int) -> None:
        """Remove dead letters that are dealt with; so many of them were delivered after all."""
        with transaction(self._engine, "remove dead letters from") as connection:
            connection.execute(delete(_DEAD).where(_DEAD.c.sink == sink, _DEAD.c.seq.in_(seqs)))
            total = _SINKS.c.delivered + delivered
            connection.execute(update(_SINKS).where(_SINKS.c.name == sink).values(delivered=total))
            # what went wrong before is over, unless another transition fails right now
            is_quiet = (_SINKS.c.name == sink) & (_SINKS.c.attempts == 0)
            connection.execute(update(_SINKS).where(is_quiet).values(error=None))

    def keep_dead(self, sink: str, seqs: Sequence[int], reason: str) -> None:
        """Note why dead letters stay that were sent once more; where the sink is with the others does not change."""
        with transaction(self._engine, "note a failed delivery in") as connection:
            letters = (_DEAD.c.sink == sink) & _DEAD.c.seq.in_(seqs)
            connection.execute(update(_DEAD).where(letters).values(reason=reason, buried=now_text()))


def _bury_rest(connection: Any, sink: str, acked: int) -> int:
    """Make dead letters of what a sink had still to get; return how many."""
    connection.execute(delete(_DEAD).where(_DEAD.c.sink == sink, _DEAD.c.seq > acked))  # of an earlier one of its name
    waiting = select(
        literal(sink),
        _OUTBOX.c.seq,
        _OUTBOX.c.generation,
        _OUTBOX.c.event_id,
        _OUTBOX.c.transition,
        _OUTBOX.c.record,
        literal(UNNAMED),
        literal(now_text()),
    ).where(_OUTBOX.c.seq > acked)
    return int(connection.execute(insert(_DEAD).from_select([column.name for column in _DEAD.c], waiting)).rowcount)


def _prune(connection: Any) -> None:
    """Remove from the outbox what every sink has; without sinks, everything."""
    least = connection.execute(select(func.min(_SINKS.c.acked))).scalar()
    statement = delete(_OUTBOX)
    connection.execute(statement if least is None else statement.where(_OUTBOX.c.seq <= least))
