"""Moving many rows in and out of a database: executemany for SQLite, COPY for PostgreSQL, one upsert for both."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import polars as pl
from sqlalchemy import ColumnElement, Connection, Select, Table, and_, case, func, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from tsforge.data.store_tables import observation_table

_CHUNK = 200_000
_FETCH = 50_000
_STAGE = "tsf_stage"


def insert_rows(connection: Connection, table: Table, rows: pl.DataFrame) -> None:
    """Insert rows whose columns stand in the order of the table."""
    if connection.dialect.name == "postgresql":
        _copy_in(connection, table, rows)
        return
    marks = ", ".join("?" * rows.width)
    driver: Any = connection.connection.driver_connection
    driver.executemany(f"INSERT INTO {_quoted(connection, table)} VALUES ({marks})", rows.iter_rows())  # noqa: S608


def _quoted(connection: Connection, table: Table) -> str:
    return connection.dialect.identifier_preparer.quote(table.name)


def _copy_in(connection: Connection, table: Table, rows: pl.DataFrame) -> None:
    quote = connection.dialect.identifier_preparer.quote
    columns = ", ".join(quote(column.name) for column in table.columns)
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {_quoted(connection, table)} ({columns}) FROM STDIN (FORMAT csv)"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for part in rows.iter_slices(_CHUNK):
            buffer = io.BytesIO()
            part.write_csv(buffer, include_header=False, quote_style="non_numeric", null_value="")
            copy.write(buffer.getbuffer())


def stage_rows(connection: Connection, columns: Iterable[str], rows: pl.DataFrame, *, has_vintages: bool) -> Table:
    """Return a temporary table that holds ``rows``; it goes with the transaction or the connection."""
    stage = observation_table(_STAGE, list(columns), has_vintages=has_vintages, prefixes=("TEMPORARY",))
    statement = str(CreateTable(stage).compile(dialect=connection.dialect)).strip()
    connection.exec_driver_sql(f"{statement} ON COMMIT DROP" if connection.dialect.name == "postgresql" else statement)
    insert_rows(connection, stage, rows)
    if connection.dialect.name == "postgresql":  # it plans a join without statistics for a handful of rows
        connection.exec_driver_sql(f"ANALYZE {_quoted(connection, stage)}")
    return stage


def _split_columns(table: Table) -> tuple[list[str], list[str]]:
    """Return the names of keys and of values."""
    keys = [column.name for column in table.primary_key.columns]
    return keys, [column.name for column in table.columns if column.name not in keys]


def _differs(new: ColumnElement[Any], old: ColumnElement[Any], *, erase: bool) -> ColumnElement[bool]:
    if erase:
        return new.is_distinct_from(old)
    return and_(new.is_not(None), new.is_distinct_from(old))


def compare(connection: Connection, stage: Table, table: Table, *, erase: bool) -> tuple[int, int]:
    """Return how many staged rows are new to ``table`` and how many would change one of its rows."""
    keys, names = _split_columns(stage)
    differs = or_(*(_differs(stage.c[name], table.c[name], erase=erase) for name in names))
    absent = table.c.series_id.is_(None)
    joined = stage.outerjoin(table, and_(*(stage.c[key] == table.c[key] for key in keys)))
    new, changed = connection.execute(
        select(
            func.coalesce(func.sum(case((absent, 1), else_=0)), 0),
            func.coalesce(func.sum(case((and_(~absent, differs), 1), else_=0)), 0),
        ).select_from(joined)
    ).one()
    return int(new), int(changed)


def upsert(connection: Connection, stage: Table, table: Table, *, erase: bool) -> None:
    """Bring staged rows into ``table``: new ones are added, values replace older ones, the rest is not touched."""
    keys, names = _split_columns(stage)
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert: Any = dialect.insert(table)
    # the WHERE keeps SQLite's parser from reading ON CONFLICT as the ON of a join
    statement = insert.from_select([column.name for column in stage.columns], select(stage).where(true()))
    given = statement.excluded
    statement = statement.on_conflict_do_update(
        index_elements=keys,
        set_={name: given[name] if erase else func.coalesce(given[name], table.c[name]) for name in names},
        where=or_(*(_differs(given[name], table.c[name], erase=erase) for name in names)),
    )
    connection.execute(statement)


def fetch(connection: Connection, statement: Select[Any], dtypes: dict[str, pl.DataType]) -> pl.DataFrame:
    """Return the rows of a query as polars columns of the given types, in order."""
    compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"render_postcompile": True})
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "postgresql":
        return _copy_out(driver, str(compiled), compiled.params, dtypes)
    # plain tuples from the driver: wrapping two million rows one by one took three times as long as reading them
    cursor = driver.execute(str(compiled), [compiled.params[name] for name in compiled.positiontup or ()])
    parts = []
    while rows := cursor.fetchmany(_FETCH):
        parts.append(pl.DataFrame(rows, schema=dtypes, orient="row"))
    return pl.concat(parts) if parts else pl.DataFrame(schema=dtypes)


def _copy_out(driver: Any, statement: str, params: Any, dtypes: dict[str, pl.DataType]) -> pl.DataFrame:
    buffer = io.BytesIO()
    with driver.cursor() as cursor, cursor.copy(f"COPY ({statement}) TO STDOUT (FORMAT csv)", params) as copy:
        for block in copy:
            buffer.write(block)
    if not buffer.tell():
        return pl.DataFrame(schema=dtypes)
    buffer.seek(0)
    return pl.read_csv(buffer, has_header=False, schema=dtypes, empty_string_is_null=True)
