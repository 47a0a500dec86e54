"""Following a SQL table by a key that only grows: bound parameters, whole groups of equal keys, whole rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
from sqlalchemy import MetaData, Table, false, func, select, type_coerce
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.types import NullType, TypeEngine

from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.config import SqlSource
from tsforge.data.io import source_url, typed_column
from tsforge.data.sql import open_engine, safe_url, transaction

Key = int | float | str | datetime | date
_KINDS = "use a whole number, a float, text or a time"


@dataclass(frozen=True)
class Look:
    """What the keys of a table say.

    Attributes:
        newest: the greatest key, None where the table is empty.
        has_fallen: whether it lies below the last one that was taken.
        keyless: rows whose key is NULL.
    """

    newest: Key | None
    has_fallen: bool = False
    keyless: int = 0


class KeyedTable:
    """Rows of a table in the order of a key; nothing is connected before the first call.

    Args:
        source: address and table.
        key: column that grows with every row inserted.
        columns: what to read.

    Raises:
        ConfigError: the named environment variable is not set, or the address is malformed.
    """

    def __init__(self, source: SqlSource, key: str, columns: Sequence[str]) -> None:
        self._engine = open_engine(source_url(source), read_only=True)
        self._name = source.table or ""
        self.key = key
        self._columns = list(dict.fromkeys(columns))
        self._found: Table | None = None
        self.origin = f"{safe_url(self._engine.url)} {self._name}"

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def newest(self) -> Key | None:
        """Return the greatest key, None where the table is empty.

        Raises:
            DataError: no such table or column, or a key that has no order.
            BackendError: the database did not answer.
        """
        return self.look(None).newest

    def look(self, last: Key | None) -> Look:
        """Return what the keys say after ``last`` was taken; the database compares, by its own order of texts.

        Raises:
            DataError, BackendError: as for ``newest``.
        """
        with transaction(self._engine, "read", write=False) as connection:
            column = self._table(connection).c[self.key]
            top = func.max(column)
            newest, fell = connection.execute(select(top, top < last if last is not None else false())).one()
            missing = select(func.count()).where(column.is_(None))  # apart: an index answers both at once
            keyless = connection.execute(missing).scalar() if column.nullable else 0
        found = self._plain(newest)
        # SQLite compares times as texts: one written without fractions comes before itself as it is bound, with them
        return Look(found, has_fallen=bool(fell) and found != last, keyless=int(keyless or 0))

    def after(self, last: Key | None, upto: Key, limit: int) -> tuple[pl.DataFrame, Key | None]:
        """Return rows with keys in (last, upto] by key, and the last of them (None where there is none).

        At most ``limit`` rows, except that rows with equal keys are never parted.

        Raises:
            DataError, BackendError: as for ``newest``.
        """
        with transaction(self._engine, "read", write=False) as connection:
            table = self._table(connection)
            key = table.c[self.key]
            # untyped: types of SQLite are a hint, and read by them 1.25 of a DECIMAL(10,1) would come out as 1.2
            chosen = [key.label("key"), *(type_coerce(table.c[name], NullType()) for name in self._columns)]
            span = select(*chosen).where(key <= upto).order_by(key)
            if last is not None:
                span = span.where(key > last)
            rows = list(connection.execute(span.limit(limit + 1)).all())
            if len(rows) > limit:
                beyond = rows[-1][0]
                whole = [row for row in rows if row[0] != beyond]
                rows = whole or list(connection.execute(select(*chosen).where(key == beyond)).all())
        cells = list(zip(*rows, strict=True)) if rows else [()] * (len(self._columns) + 1)
        series = [typed_column(name, list(cells[at + 1])) for at, name in enumerate(self._columns)]
        return pl.DataFrame(series), self._plain(rows[-1][0]) if rows else None

    def _table(self, connection: Any) -> Table:
        """Return the table as the database describes it, looked up once."""
        if self._found is not None:
            return self._found
        schema, _, name = self._name.rpartition(".")
        try:
            found = Table(name, MetaData(), schema=schema or None, autoload_with=connection)
        except NoSuchTableError as error:
            raise DataError(f"{safe_url(self._engine.url)} has no table '{self._name}'; check source.table") from error
        missing = [column for column in (self.key, *self._columns) if column not in found.c]
        if missing:
            names = list(found.c.keys())
            hint = nearest(missing[0], names)
            raise DataError(
                f"{self.origin} lacks column(s) {listing(missing)}{hint} (it has {listing(names, 20)}); "
                "set source.key and source.rows"
            )
        self._check_kind(found.c[self.key].type)
        self._found = found
        return found

    def _check_kind(self, kind: TypeEngine[Any]) -> None:
        """Refuse a column that no database orders as numbers, texts or times, before one is asked for its greatest."""
        try:
            found = kind.python_type
        except NotImplementedError:  # a type of the database's own: its values will show
            return
        if found is bool or not issubclass(found, int | float | Decimal | str | datetime | date):
            raise DataError(f"{self.origin}: key '{self.key}' is of type {kind}; {_KINDS}")

    def _plain(self, key: Any) -> Key | None:
        if isinstance(key, float | Decimal) and not math.isfinite(key):
            raise DataError(
                f"{self.origin}: key '{self.key}' is {key} in a row, beside which no key grows; give that row a number "
                "greater than all before, or delete it"
            )
        if isinstance(key, Decimal) and key == int(key):
            return int(key)
        if isinstance(key, Decimal):
            raise DataError(f"{self.origin}: key '{self.key}' holds decimal fractions ({key}); {_KINDS}")
        if key is None or (isinstance(key, int | float | str | datetime | date) and not isinstance(key, bool)):
            return key
        raise DataError(f"{self.origin}: key '{self.key}' holds {type(key).__name__}; {_KINDS}")


def write_key(key: Key | None) -> dict[str, Any]:
    """Return a key as plain JSON types."""
    if isinstance(key, datetime):
        return {"datetime": key.isoformat()}
    if isinstance(key, date):
        return {"date": key.isoformat()}
    return {} if key is None else {"plain": key}


def read_key(stored: dict[str, Any]) -> Key | None:
    """Return the key that ``write_key`` wrote."""
    if "datetime" in stored:
        return datetime.fromisoformat(stored["datetime"])
    if "date" in stored:
        return date.fromisoformat(stored["date"])
    return stored.get("plain")
