"""Moving many rows in and out of a database: executemany for SQLite, COPY for PostgreSQL, one upsert for both."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl
from sqlalchemy import ColumnElement, Connection, Select, Table, and_, case, delete, exists, func, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from tsforge.data.store_tables import SERIES, observation_table

_CHUNK = 200_000
_FETCH = 50_000
_NAMED = 5_000  # databases limit the values of one statement
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


def drop_blank(connection: Connection, stage: Table, table: Table) -> int:
    """Leave out staged rows that have no value and no row of ``table`` to take one from; return how many."""
    keys, names = _split_columns(stage)
    has_row = exists().where(*(table.c[key] == stage.c[key] for key in keys))
    blank = [stage.c[name].is_(None) for name in names]
    return int(connection.execute(delete(stage).where(*blank, ~has_row)).rowcount)


def count_erased(connection: Connection, stage: Table, table: Table) -> int:
    """Return how many values of ``table`` have a missing one in their staged row."""
    keys, names = _split_columns(stage)
    gone = [case((and_(stage.c[name].is_(None), table.c[name].is_not(None)), 1), else_=0) for name in names]
    joined = stage.join(table, and_(*(stage.c[key] == table.c[key] for key in keys)))
    counts = connection.execute(select(*(func.sum(one) for one in gone)).select_from(joined)).one()
    return sum(int(count or 0) for count in counts)


def count_distinct_rows(connection: Connection, table: Table, series: str | None = None) -> int:
    """Return how many rows, that is series and times, ``table`` holds of one series or of all."""
    keys = select(table.c.series_id, table.c.time).distinct()
    keys = keys if series is None else keys.where(table.c.series_id == series)
    return int(connection.execute(select(func.count()).select_from(keys.subquery())).scalar_one())


def ends_of_series(
    connection: Connection, table: Table, dataset: int, series: Sequence[str] | None = None
) -> pl.DataFrame:
    """Return ``series_id, low, high``: first and last time of recorded series, two look-ups of the key each.

    Only of ``series`` where these are few enough to name them in a statement, else of all.
    """
    ends = [
        select(end(table.c.time)).where(table.c.series_id == SERIES.c.series_id).scalar_subquery()
        for end in (func.min, func.max)
    ]
    statement = select(SERIES.c.series_id, *ends).where(SERIES.c.dataset_id == dataset)
    if series is not None and len(series) <= _NAMED:
        statement = statement.where(SERIES.c.series_id.in_(list(series)))
    return fetch(connection, statement, {"series_id": pl.String(), "low": pl.Int64(), "high": pl.Int64()})


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
