"""Cells of a PostgreSQL database that have no plain counterpart: numerics of any size, NaN, UUIDs, addresses, keys; and
cells of SQLite that are not what their column says."""

from __future__ import annotations

import math
import sqlite3
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sqlalchemy import Connection, create_engine, text

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.cleaning import read_dataset
from tsforge.data.config import DataConfig, SqlSource
from tsforge.data.io import typed_column
from tsforge.data.sql_poll import KeyedTable


@pytest.fixture
def database(postgres_url: str) -> Iterator[Connection]:
    """A connection to an empty database."""
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def table(database: Connection, columns: str, rows: int = 24) -> None:
    database.execute(text("DROP TABLE IF EXISTS readings"))
    database.execute(
        text(
            "CREATE TABLE readings AS SELECT 'a' AS meter, timestamptz '2025-01-01 00:00+00' + h * interval '1 hour' "
            f"AS time, {columns} FROM generate_series(0, {rows - 1}) h"
        )
    )
    database.commit()


def read(url: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "name": "d",
        "source": {"kind": "sql", "url": url, "table": "readings"},
        "time": "time",
        "layout": "long",
        "series": "meter",
        "targets": ["power"],
    }
    return read_dataset(validate(DataConfig, settings | changes))


@pytest.mark.parametrize("odd", ["'NaN'::numeric", "1e40::numeric", "1e-45::numeric", "repeat('1', 60)::numeric"])
def test_numerics_of_any_kind_in_a_column_nobody_reads_harm_nothing(
    postgres_url: str, database: Connection, odd: str
) -> None:
    table(database, f"h * 0.5::numeric AS power, CASE WHEN h = 5 THEN {odd} ELSE h + 0.5 END AS note")
    got = read(postgres_url).frame.table
    assert got["power"].to_list() == [hour / 2 for hour in range(24)]


def test_a_numeric_nan_is_missing_and_an_infinity_is_refused_with_its_place(
    postgres_url: str, database: Connection
) -> None:
    table(database, "CASE WHEN h = 5 THEN 'NaN'::numeric ELSE h + 0.25 END AS power")
    got = read(postgres_url).frame.table["power"]
    assert got[5] is None
    assert got.null_count() == 1
    assert got[6] == 6.25
    table(database, "CASE WHEN h = 5 THEN 'Infinity'::numeric ELSE h END AS power")
    with pytest.raises(DataError, match=r"1 cells in 1 column.* are infinite .*row 6: inf"):
        read(postgres_url)


def test_uuids_and_addresses_are_series_ids(postgres_url: str, database: Connection) -> None:
    table(database, "h * 1.5 AS power, CASE WHEN h < 12 THEN 'b58e1f2e-93a0-4bb2-b4ea-cf41ec0d71c4'::uuid END AS id")
    database.execute(text("UPDATE readings SET id = '0c9a1ff3-66b1-4d1f-8f2c-1f0a7a4d9e10' WHERE id IS NULL"))
    database.commit()
    ids = read(postgres_url, series="id").frame.series_ids
    assert sorted(ids) == ["0c9a1ff3-66b1-4d1f-8f2c-1f0a7a4d9e10", "b58e1f2e-93a0-4bb2-b4ea-cf41ec0d71c4"]
    table(database, "h * 1.5 AS power, '10.0.0.7'::inet AS host")
    assert read(postgres_url, series="host").frame.series_ids == ("10.0.0.7",)


def test_whole_numbers_beyond_64_bits_are_ids_of_their_own_and_values_all_the_same(
    postgres_url: str, database: Connection
) -> None:
    table(database, "h * 1e20::numeric AS power, 12345678901234567890::numeric + h / 12 AS id")
    got = read(postgres_url, series="id").frame
    assert got.series_ids == ("12345678901234567890", "12345678901234567891")
    assert got.table["power"].max() == 23e20


@pytest.mark.parametrize(
    ("cells", "kind", "told"),
    [
        ([Decimal("3"), None, Decimal("-7.000")], pl.Int64, [3, None, -7]),
        ([Decimal("0.5"), Decimal("2")], pl.Float64, [0.5, 2.0]),
        ([Decimal(2**63), Decimal(1), None], pl.String, [str(2**63), "1", None]),  # two ids stay two
        ([Decimal("12.00"), Decimal(2**63)], pl.String, ["12", str(2**63)]),
        ([Decimal("1E+40"), Decimal(3)], pl.Float64, [1e40, 3.0]),
        ([Decimal(-(2**63)), Decimal(2**63 - 1)], pl.Int64, [-(2**63), 2**63 - 1]),
        ([Decimal("1E+40"), Decimal("1E-45")], pl.Float64, [1e40, 1e-45]),
        ([Decimal("Infinity"), Decimal("-Infinity")], pl.Float64, [math.inf, -math.inf]),
        ([uuid.UUID(int=1), None], pl.String, ["00000000-0000-0000-0000-000000000001", None]),
        ([1, "a", None], pl.String, ["1", "a", None]),
    ],
)
def test_cells_become_one_column(cells: list[Any], kind: Any, told: list[Any]) -> None:
    column = typed_column("x", cells)
    assert (column.dtype, column.to_list()) == (kind, told)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("CASE WHEN h = 5 THEN 'NaN'::float8 ELSE h END", "is nan in a row, beside which no key grows"),
        ("CASE WHEN h = 5 THEN 'NaN'::numeric ELSE h END", "is NaN in a row, beside which no key grows"),
        ("CASE WHEN h = 5 THEN 'Infinity'::float8 ELSE h END", "is inf in a row, beside which no key grows"),
        ("h + 0.25", r"holds decimal fractions \(23.25\); use a whole number"),
        ("gen_random_uuid()", "is of type UUID; use a whole number"),
        ("h > 3", "is of type BOOLEAN; use a whole number"),
        ("jsonb_build_object('a', h)", "is of type JSONB; use a whole number"),
    ],
)
def test_keys_without_an_order_are_refused(postgres_url: str, database: Connection, key: str, message: str) -> None:
    table(database, f"h AS power, {key} AS k")
    source = validate(SqlSource, {"kind": "sql", "url": postgres_url, "table": "readings"})
    followed = KeyedTable(source, "k", ["time", "power"])
    with pytest.raises(DataError, match=f"key 'k' {message}"):
        followed.newest()
    followed.close()


def test_whole_decimals_are_keys(postgres_url: str, database: Connection) -> None:
    table(database, "h + 0.5 AS power, (h * 10)::numeric(12, 2) AS k")
    followed = KeyedTable(
        validate(SqlSource, {"kind": "sql", "url": postgres_url, "table": "readings"}), "k", ["power"]
    )
    assert followed.newest() == 230
    rows, last = followed.after(210, 230, 10)
    assert (rows["power"].to_list(), last) == ([22.5, 23.5], 230)
    followed.close()


def test_a_followed_sqlite_table_is_read_as_it_is_stored(tmp_path: Path) -> None:
    """Types of SQLite columns are hints: nothing is rounded to their scale or made a truth value of."""
    place = tmp_path / "a.db"
    with sqlite3.connect(place) as connection:
        connection.execute("CREATE TABLE readings (k INTEGER, ds TIMESTAMP, y DECIMAL(10, 2), on_off BOOLEAN)")
        connection.executemany(
            "INSERT INTO readings VALUES (?, ?, ?, ?)",
            [(1, 1704067200, 1.23456, 4), (2, "2024-01-01 01:00:00", 1.5e-11, 1), (3, "", "abc", 0)],
        )
    connection.close()
    source = validate(SqlSource, {"kind": "sql", "path": str(place), "table": "readings"})
    followed = KeyedTable(source, "k", ["ds", "y", "on_off"])
    rows, last = followed.after(None, 3, 10)
    followed.close()
    assert last == 3
    assert rows["ds"].to_list() == ["1704067200", "2024-01-01 01:00:00", ""]
    assert rows["y"].to_list() == ["1.23456", "1.5e-11", "abc"]
    assert rows["on_off"].to_list() == [4, 1, 0]
