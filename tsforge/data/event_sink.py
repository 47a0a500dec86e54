"""A table of event transitions in somebody's database: written again, a transition replaces itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Column, Float, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects import postgresql, sqlite

from tsforge.data.config import SqlSource
from tsforge.data.io import source_url
from tsforge.data.sql import open_engine, transaction

_TEXTS = ("dataset", "artifact", "series_id", "start", "end", "peak_time", "rule", "state", "continues")
_KEY = ("watch", "event_id", "transition")


class TransitionTable:
    """The table of a SQL sink, made on first use; times are ISO 8601 text in UTC, or integers as text.

    Raises:
        ConfigError: the named environment variable is not set, or the address is malformed.
    """

    def __init__(self, source: SqlSource) -> None:
        self._engine = open_engine(source_url(source))
        schema, _, name = (source.table or "").rpartition(".")
        self._table = Table(
            name,
            MetaData(),
            *(Column(column, String(200), primary_key=True) for column in _KEY),
            Column("seq", BigInteger, nullable=False),
            Column("generation", Integer, nullable=False),
            *(Column(column, Text) for column in _TEXTS),
            Column("length", BigInteger),
            *(Column(column, Float) for column in ("peak_score", "p_value", "threshold")),
            Column("suppressed_by", BigInteger),
            Column("emitted_at", Text),
            Column("variates", Text),
            schema=schema or None,
        )
        self._is_ready = False

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def upsert(self, records: Sequence[dict[str, Any]]) -> None:
        """Write transitions in one transaction.

        Raises:
            BackendError: the database refused; nothing is written.
        """
        dialect: Any = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        rows = [self._row(record) for record in records]
        statement = dialect.insert(self._table)
        changed = {column.name: statement.excluded[column.name] for column in self._table.c if not column.primary_key}
        with transaction(self._engine, "write events to") as connection:
            if not self._is_ready:
                self._table.create(connection, checkfirst=True)
            connection.execute(statement.on_conflict_do_update(index_elements=list(_KEY), set_=changed), rows)
        self._is_ready = True

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        row = {column.name: record.get(column.name) for column in self._table.c}
        for name in _TEXTS:
            row[name] = None if row[name] is None else str(row[name])
        return {**row, "variates": json.dumps(record.get("variates", []))}
