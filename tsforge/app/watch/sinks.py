"""Where transitions go: a file of JSON lines, a SQL table, the event store. Each may get one again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from tsforge.app.watch.incidents import Grouping
from tsforge.app.watch.settings import JsonlSink, StoreSink, TableSink, WebhookSink
from tsforge.app.watch.webhook import DeliveryError, Webhook
from tsforge.contracts.tables import EVENT_COLUMNS
from tsforge.core.atomic import sync
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace
from tsforge.data.event_sink import TransitionTable
from tsforge.data.event_store import EventStore
from tsforge.data.watch_state import Outgoing

BATCH = 500
_TIMES = ("start", "end", "peak_time")


class Sink(Protocol):
    """Takes transitions in order. ``batch`` is how many at a time."""

    batch: int

    def send(self, items: Sequence[Outgoing], mark: int) -> int:
        """Deliver all items or raise ``DeliveryError``; return the sink's new mark (see ``Cursor``)."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class JsonlFile:
    """Appends one line a transition, each exactly once.

    The mark is the length of the file after the last acknowledged line. What stands behind it was written by a run
    that was killed before it acknowledged: whole lines of this outbox count as delivered, half a line is cut off.
    """

    batch = BATCH

    def __init__(self, settings: JsonlSink) -> None:
        self._path = Path(settings.path).expanduser()

    def send(self, items: Sequence[Outgoing], mark: int) -> int:
        """Append the items that do not stand in the file yet and flush them to the disk."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            with self._path.open("a+b") as handle:
                size = os.fstat(handle.fileno()).st_size
                handle.seek(mark if size >= mark else 0)  # a shorter file was put in the place of the old one
                left = self._left(handle.read(), items, handle)
                handle.seek(0, os.SEEK_END)
                handle.write(b"".join(_line(item) for item in left))
                handle.flush()
                os.fsync(handle.fileno())
                length = handle.tell()
            if is_new:
                sync(self._path.parent)
        except OSError as error:
            raise DeliveryError(f"cannot write {self._path}: {error.strerror or error}") from error
        return length

    @staticmethod
    def _left(tail: bytes, items: Sequence[Outgoing], handle: Any) -> list[Outgoing]:
        """Return the items that the end of the file lacks; a part of a line of theirs is cut off, others stay."""
        *lines, rest = tail.split(b"\n")
        present = set(lines)
        left = [item for item in items if _line(item)[:-1] not in present]
        if rest and left and _line(left[0]).startswith(rest):
            handle.truncate(handle.tell() - len(rest))
        elif rest:
            handle.seek(0, os.SEEK_END)
            handle.write(b"\n")
        return left

    def close(self) -> None:
        """Hold nothing."""


def _line(item: Outgoing) -> bytes:
    return item.record.encode() + b"\n"


class SqlTable:
    """Writes one row a watch, event and transition; a second delivery replaces the row by itself."""

    batch = BATCH

    def __init__(self, settings: TableSink) -> None:
        self._table = TransitionTable(settings)

    def send(self, items: Sequence[Outgoing], mark: int) -> int:
        """Write the items in one transaction."""
        try:
            self._table.upsert([json.loads(item.record) for item in items])
        except BackendError as error:
            raise DeliveryError(str(error)) from error
        return mark

    def close(self) -> None:
        """Close the database."""
        self._table.close()


class StoredEvents:
    """Records events in the event store, which keeps one row an event and only lets its machine state advance.

    Attributes:
        grouping: which events share an incident; None names none. Events and their incidents are one transaction.
    """

    batch = BATCH

    def __init__(self, workspace: Workspace) -> None:
        self._store = EventStore(workspace.database_url)
        self.grouping: Grouping | None = None

    def send(self, items: Sequence[Outgoing], mark: int) -> int:
        """Record the last word on every event."""
        records = [json.loads(item.record) for item in items]
        parts: dict[tuple[str, str, str, int], dict[str, dict[str, Any]]] = {}
        for record in records:
            key = (record["dataset"], record["watch"], record["artifact"], record["generation"])
            events = parts.setdefault(key, {})
            events.pop(record["event_id"], None)
            events[record["event_id"]] = record
        try:
            for (dataset, watch, artifact, generation), events in parts.items():
                naming = None if self.grouping is None else self.grouping.of(watch, generation, artifact)
                self._store.record(
                    dataset,
                    event_frame(list(events.values())),
                    source=f"watch:{watch}",
                    artifact=artifact,
                    incidents=naming,
                )
        except BackendError as error:
            raise DeliveryError(str(error)) from error
        return mark

    def close(self) -> None:
        """Close the database."""
        self._store.close()


def event_frame(records: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Return records as an event table, times as datetimes again."""
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*EVENT_COLUMNS, "length", "continues", "measure"]):
        cells = [record.get(name) for record in records]
        if name in _TIMES:
            cells = [datetime.fromisoformat(cell) if isinstance(cell, str) else cell for cell in cells]
        columns[name] = cells
    kinds = dict.fromkeys(("p_value", "threshold", "peak_score"), pl.Float64)
    texts = dict.fromkeys(("continues", "measure"), pl.String)
    table = pl.DataFrame(columns, schema_overrides={**kinds, **texts, "length": pl.Int64})
    zoned = [name for name in _TIMES if table[name].dtype != pl.Int64]
    return table.with_columns(pl.col(name).cast(pl.Datetime("us", "UTC")) for name in zoned)


def open_sink(settings: JsonlSink | TableSink | StoreSink | WebhookSink, workspace: Workspace, watch: str) -> Sink:
    """Return a sink ready to send.

    Raises:
        ConfigError: an environment variable is not set, or an address is malformed.
    """
    match settings:
        case JsonlSink():
            return JsonlFile(settings)
        case TableSink():
            return SqlTable(settings)
        case StoreSink():
            return StoredEvents(workspace)
        case WebhookSink():
            return Webhook(settings, watch)
