"""The run ledger: one row a (job, slot), claimed in a transaction, so that exactly one process works on each slot.

Any number of schedulers, cron entries or people may fire the same slot. A claim is held by a living process, which
gives signs of life; the claim of a dead one is taken over. Every claim of a slot gets the next attempt number, and only
the holder of the newest attempt may close it, so a process that lost its claim while it slept can never overwrite the
work of its successor.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tsforge.core.errors import BackendError, ConfigError, TsforgeError
from tsforge.core.logs import get_logger, log_event
from tsforge.core.owner import Owner
from tsforge.data.sql import open_engine, safe_url, transaction

LOGGER = get_logger(__name__)

Status = Literal["claimed", "done", "failed", "skipped", "interrupted"]
STATUSES: tuple[Status, ...] = get_args(Status)
SETTLED: frozenset[Status] = frozenset({"done", "skipped"})
_LOCK = 736_102_441  # any fixed number: PostgreSQL serialises the creation of our tables and exclusive claims on it
_MESSAGE_LIMIT = 16_000
_FAILURES = "failed_attempts"  # kept among the details: a column of its own would need a migration
_NOTE = "note"  # likewise


class _UtcTime(sa.TypeDecorator[datetime]):
    """Time-zone aware in Python, plain UTC with microseconds in every database."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


_METADATA = sa.MetaData()
_RUNS = sa.Table(
    "ledger_runs",
    _METADATA,
    sa.Column("job", sa.String(200), primary_key=True),
    sa.Column("slot", _UtcTime, primary_key=True),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("claimed_by", sa.String(300), nullable=False),
    sa.Column("heartbeat", _UtcTime, nullable=False),
    sa.Column("started", _UtcTime, nullable=False),
    sa.Column("finished", _UtcTime),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("output", sa.Text),
    sa.Column("rows", sa.BigInteger),
    sa.Column("details", sa.Text, nullable=False),
)
_FRONTIERS = sa.Table(
    "ledger_frontiers",
    _METADATA,
    sa.Column("job", sa.String(200), primary_key=True),
    sa.Column("registered", _UtcTime, nullable=False),
    sa.Column("settled_until", _UtcTime, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class LedgerRun:
    """One slot of one job as the ledger knows it.

    Attributes:
        job, slot: the unique key; the slot is the scheduled time or the as_of of a batch.
        status: ``claimed`` (being worked on), ``done``, ``failed``, ``skipped`` or ``interrupted`` (to be run again).
        attempt: how often it has been claimed.
        failures: how many attempts failed; interrupted and abandoned ones do not count.
        claimed_by, heartbeat: the latest holder and its last sign of life.
        started, finished: of the latest attempt.
        message: why it failed or was skipped, or the tail of the output.
        output: where the result lies (a batch: its manifest), or None.
        rows: rows published, or None.
        details: further numbers of the maker.
        is_damaged: the details, and with them the count of failures, could not be read; everything else is whole.
    """

    job: str
    slot: datetime
    status: Status
    attempt: int
    claimed_by: str
    heartbeat: datetime
    started: datetime
    finished: datetime | None = None
    message: str = ""
    output: str | None = None
    rows: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    failures: int = 0
    is_damaged: bool = False

    @property
    def seconds(self) -> float | None:
        """Wall time of the latest attempt, None while it runs."""
        return None if self.finished is None else (self.finished - self.started).total_seconds()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to work on a slot, valid until closed or taken over.

    Attributes:
        job, slot, attempt, owner: whose and what.
        failures: of earlier attempts.
        note: what this attempt, or else an earlier one, wrote down for those after it (``Ledger.note``).
    """

    job: str
    slot: datetime
    attempt: int
    owner: Owner
    failures: int = 0
    note: dict[str, Any] = field(default_factory=dict, compare=False)


def _aware(moment: datetime, what: str) -> datetime:
    if moment.tzinfo is None:
        raise ConfigError(f"{what} {moment.isoformat()} has no time zone; write it with one, such as 2026-03-01T06:00Z")
    return moment.astimezone(UTC)


class Ledger:
    """The ledger in one database.

    Args:
        database_url: SQLAlchemy URL, SQLite (one machine) or PostgreSQL (any number).
        stale_after: a claim from another host without a sign of life for so long is taken over. On the same host a
            dead process is recognised at once.
        clock: replaces the clock of the database (tests).

    Raises:
        BackendError: the database cannot be reached or written.
        ConfigError: the URL is malformed, names another kind of database or one in memory, or its driver is missing.
    """

    def __init__(
        self,
        database_url: str,
        *,
        stale_after: timedelta = timedelta(seconds=90),
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.stale_after = stale_after
        self._clock = clock
        self._engine = open_engine(database_url)
        self._shown = safe_url(self._engine.url)
        with transaction(self._engine, "make the tables of the run ledger in") as connection:
            if self._is_postgres:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            _METADATA.create_all(connection)

    @property
    def _is_postgres(self) -> bool:
        return self._engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Give back the database connections."""
        self._engine.dispose()

    def _transaction(self, *, read: bool = False) -> AbstractContextManager[sa.Connection]:
        """Yield a connection; without ``read`` it may write, and SQLite takes the lock for that before the first look.

        A transaction that turned from reading to writing would fail where another writer came between.
        """
        return transaction(self._engine, f"{'read' if read else 'write'} the run ledger in", write=not read)

    def now(self) -> datetime:
        """Return the time by the clock all holders share: that of the database."""
        if self._clock is not None:
            return self._clock()
        with self._transaction(read=True) as connection:
            return self._now(connection)

    def _now(self, connection: sa.Connection) -> datetime:
        if self._clock is not None:
            return self._clock()
        if self._is_postgres:
            moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
            return moment.astimezone(UTC)
        return datetime.now(UTC)  # SQLite serves one machine only

    def _insert(self, table: sa.Table, values: Mapping[str, Any]) -> Any:
        insert: Any = postgresql.insert if self._is_postgres else sqlite.insert
        return insert(table).values(**values).on_conflict_do_nothing()

    def claim(self, job: str, slot: datetime, *, again: bool = False, exclusive: bool = False) -> Claim | None:
        """Return the right to work on the slot, or None when it is settled or a living process works on it.

        Failed, interrupted and abandoned slots can be claimed.

        Args:
            job, slot: the key; the slot carries a time zone.
            again: claim a settled slot too.
            exclusive: also None while a living process works on another slot of the job (no overlap).
        """
        slot, owner = _aware(slot, "slot"), Owner.current()
        with self._transaction() as connection:
            now = self._now(connection)
            if exclusive and self._is_busy(connection, job, slot, now):
                return None
            fresh = _fresh(job, slot, str(owner), now)
            if connection.execute(self._insert(_RUNS, fresh).returning(_RUNS.c.attempt)).first() is not None:
                return Claim(job=job, slot=slot, attempt=1, owner=owner)
            row = connection.execute(sa.select(_RUNS).where(_key(job, slot)).with_for_update()).one()
            run = _record(row)
            if not self._claimable(run, now, again):
                return None
            note = {} if run.status in SETTLED else _note(row.details)
            fresh |= {"attempt": run.attempt + 1, "details": _unfinished(run.failures, note)}
            connection.execute(sa.update(_RUNS).where(_key(job, slot)).values(**fresh))
        if run.status == "claimed":
            log_event(LOGGER, "took over an abandoned run", job=job, slot=slot.isoformat(), previous=run.claimed_by)
        return Claim(job=job, slot=slot, attempt=run.attempt + 1, owner=owner, failures=run.failures, note=note)

    def note(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        """Write down what the next holder should know if this one does not come to the end, in place of earlier notes.

        Raises:
            BackendError: the claim was taken over meanwhile; nothing is written.
        """
        text = _unfinished(claim.failures, facts)
        with self._transaction() as connection:
            held = connection.execute(sa.update(_RUNS).where(_held(claim)).values(details=text)).rowcount == 1
        if not held:
            raise _taken_over(claim)
        claim.note.clear()
        claim.note.update(_note(text))

    def _is_busy(self, connection: sa.Connection, job: str, slot: datetime, now: datetime) -> bool:
        """Return whether another slot of the job is being worked on; claims of one job wait for each other here."""
        if self._is_postgres:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK, sa.func.hashtext(job))))
        others = (_RUNS.c.job == job) & (_RUNS.c.status == "claimed") & (_RUNS.c.slot != slot)
        rows = connection.execute(sa.select(_RUNS).where(others)).all()
        return any(not self.is_abandoned(_record(row), now) for row in rows)

    def _claimable(self, run: LedgerRun, now: datetime, again: bool) -> bool:
        if run.status == "claimed":
            return self.is_abandoned(run, now)
        return again or run.status not in SETTLED

    def is_abandoned(self, run: LedgerRun, now: datetime | None = None) -> bool:
        """Return whether a claimed run has no living holder any more."""
        if run.status != "claimed":
            return False
        silent = (now or self.now()) - run.heartbeat
        return silent > self.stale_after or Owner.parse(run.claimed_by).is_gone()

    def beat(self, claim: Claim) -> bool:
        """Record a sign of life; False when the claim is no longer held."""
        with self._transaction() as connection:
            statement = sa.update(_RUNS).where(_held(claim)).values(heartbeat=self._now(connection))
            return connection.execute(statement).rowcount == 1

    @contextmanager
    def keep_alive(self, claim: Claim) -> Iterator[None]:
        """Send signs of life from a thread while the block runs."""
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(self.stale_after.total_seconds() / 6):
                try:
                    held = self.beat(claim)
                except BackendError as error:
                    LOGGER.warning("no sign of life recorded for %s: %s", claim.job, error)
                    continue
                if not held:
                    LOGGER.warning("the claim on %s at %s was taken over", claim.job, claim.slot.isoformat())
                    return

        thread = threading.Thread(target=loop, name=f"heartbeat-{claim.job}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def on_record(self, claim: Claim) -> Iterator[None]:
        """Close the slot when the block fails or is interrupted; a block that comes through closes it by itself."""
        try:
            yield
        except TsforgeError as error:
            self.fail(claim, f"{type(error).__name__}: {error}")
            raise
        except KeyboardInterrupt:
            self.release(claim, "interrupted")
            raise
        except BaseException as error:
            self.fail(claim, f"{type(error).__name__}: {error} (a bug in tsforge)")
            raise

    def finish(
        self,
        claim: Claim,
        *,
        rows: int | None = None,
        output: str | None = None,
        message: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Close the slot as done.

        Raises:
            BackendError: the claim was taken over meanwhile; nothing is recorded.
        """
        text = json.dumps(dict(details or {}), default=str)
        place = None if output is None else _storable(output)
        self._close(claim, "done", message, rows=rows, output=place, details=text)

    def fail(self, claim: Claim, message: str) -> None:
        """Close the slot as failed; it can be claimed again (same errors as ``finish``)."""
        self._close(claim, "failed", message, details=_unfinished(claim.failures + 1, claim.note))

    def release(self, claim: Claim, message: str) -> None:
        """Give the slot back unfinished, to be run again (same errors as ``finish``)."""
        self._close(claim, "interrupted", message)

    def _close(self, claim: Claim, status: Status, message: str, **values: Any) -> None:
        with self._transaction() as connection:
            now = self._now(connection)
            told = _storable(message[-_MESSAGE_LIMIT:])
            values |= {"status": status, "message": told, "heartbeat": now, "finished": now}
            closed = connection.execute(sa.update(_RUNS).where(_held(claim)).values(**values)).rowcount
        if closed != 1:
            raise _taken_over(claim)

    def skip(self, job: str, slot: datetime, message: str) -> bool:
        """Settle a slot without running it; False when it has a row that is not merely interrupted or failed."""
        claim = self.claim(job, slot)
        if claim is None:
            return False
        self._close(claim, "skipped", message)
        return True

    def find(self, job: str, slot: datetime) -> LedgerRun | None:
        """Return the row of one slot, or None.

        Raises:
            BackendError: its details cannot be read, and who asks for one slot may be about to tell them.
        """
        with self._transaction(read=True) as connection:
            row = connection.execute(sa.select(_RUNS).where(_key(job, _aware(slot, "slot")))).one_or_none()
        run = None if row is None else _record(row)
        if run is not None and run.is_damaged:
            raise BackendError(
                f"the details of {job} at {run.slot.isoformat()} in the table {_RUNS.name} of {self._shown} cannot be "
                "read; restore that row from a backup, or set its details to {}"
            )
        return run

    def runs(
        self,
        job: str | None = None,
        *,
        statuses: Sequence[Status] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = 200,
    ) -> list[LedgerRun]:
        """Return runs, the latest slot first; one whose details cannot be read is among them (``is_damaged``).

        Args:
            job: only this job; a trailing ``*`` matches a prefix (``batch/*``).
            statuses: only these.
            since, until: bounds of the slot, both inclusive.
            limit: at most so many, None for all.
        """
        query = sa.select(_RUNS).order_by(_RUNS.c.slot.desc(), _RUNS.c.job)
        if job is not None:
            prefix = job.removesuffix("*")
            query = query.where(
                _RUNS.c.job.startswith(prefix, autoescape=True) if prefix != job else _RUNS.c.job == job
            )
        if statuses:
            query = query.where(_RUNS.c.status.in_(statuses))
        if since is not None:
            query = query.where(_RUNS.c.slot >= _aware(since, "since"))
        if until is not None:
            query = query.where(_RUNS.c.slot <= _aware(until, "until"))
        with self._transaction(read=True) as connection:
            return [_record(row) for row in connection.execute(query.limit(limit))]

    def frontier(self, job: str, start: datetime | None = None, *, register: bool = True) -> datetime:
        """Return the moment up to which no slot of the job is left to run.

        Args:
            job: the job.
            start: slots before it do not count, the one at it does. A job never seen before counts from here on
                (default: from now, so that nothing before is due); what is settled of one seen before stays settled.
            register: write the frontier of a job never seen before down, so that slots count from here on.
        """
        with self._transaction(read=not register) as connection:
            now = self._now(connection)
            first = now if start is None else _aware(start, "start") - timedelta(microseconds=1)
            if register:
                values = {"job": job, "registered": now, "settled_until": first}
                connection.execute(self._insert(_FRONTIERS, values))
            query = sa.select(_FRONTIERS.c.settled_until).where(_FRONTIERS.c.job == job)
            known: datetime | None = connection.execute(query).scalar_one_or_none()
            if known is None:
                return first
            return known if start is None else max(known, first)

    def advance(self, job: str, until: datetime) -> None:
        """Move the frontier of a registered job forward; it never moves back."""
        moment = _aware(until, "until")
        with self._transaction() as connection:
            where = (_FRONTIERS.c.job == job) & (_FRONTIERS.c.settled_until < moment)
            connection.execute(sa.update(_FRONTIERS).where(where).values(settled_until=moment))


def _fresh(job: str, slot: datetime, owner: str, now: datetime) -> dict[str, Any]:
    return {
        "job": job,
        "slot": slot,
        "status": "claimed",
        "attempt": 1,
        "claimed_by": owner,
        "heartbeat": now,
        "started": now,
        "finished": None,
        "message": "",
        "output": None,
        "rows": None,
        "details": "{}",
    }


def _unfinished(failures: int, note: Mapping[str, Any]) -> str:
    """Return the details of a row that is not done: what later attempts are to know."""
    return json.dumps({_FAILURES: failures, **({_NOTE: dict(note)} if note else {})}, default=str)


def _note(text: str) -> dict[str, Any]:
    """Return the note among the details of a row that is not done, empty where there is none."""
    found = (_details(text, 0) or {}).get(_NOTE)
    return found if isinstance(found, dict) else {}


def _storable(text: str) -> str:
    """Return what every database keeps: output of a command may hold zero bytes, a path bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def _taken_over(claim: Claim) -> BackendError:
    return BackendError(
        f"the claim on {claim.job} at {claim.slot.isoformat()} (attempt {claim.attempt}) was taken over by another "
        "process; its result counts, this one is not recorded"
    )


def _key(job: str, slot: datetime) -> sa.ColumnElement[bool]:
    return (_RUNS.c.job == job) & (_RUNS.c.slot == slot)


def _held(claim: Claim) -> sa.ColumnElement[bool]:
    return _key(claim.job, claim.slot) & (_RUNS.c.status == "claimed") & (_RUNS.c.attempt == claim.attempt)


def _record(row: sa.Row[Any]) -> LedgerRun:
    values = dict(row._mapping)
    # rows of versions that did not count failures, and damaged ones: every attempt is taken for one
    unknown = values["attempt"] if values["status"] == "failed" else 0
    details = _details(values.pop("details"), unknown)
    if details is None:
        return LedgerRun(**values, failures=unknown, is_damaged=True)
    if values["status"] != "done":
        details.pop(_NOTE, None)  # between attempts only
    return LedgerRun(**values, failures=details.pop(_FAILURES), details=details)


def _details(text: str, failures: int) -> dict[str, Any] | None:
    """Return the details of a row with its count of failures, ``failures`` where it has none; None if damaged."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return None
    if not isinstance(found, dict):
        return None
    details = {_FAILURES: failures, **found}
    return details if isinstance(details[_FAILURES], int) else None
