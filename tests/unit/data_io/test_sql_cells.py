"""Cells of a database arrive as the driver gives them, whatever type the column declares; queries run as they stand."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03"]


def stored(tmp_path: Path, columns: str, rows: list[tuple[Any, ...]]) -> dict[str, str]:
    """Make a table ``t`` of a SQLite file; return its address."""
    with sqlite3.connect(tmp_path / "data.db") as connection:
        connection.execute(f"CREATE TABLE t ({columns})")
        connection.executemany(f"INSERT INTO t VALUES ({', '.join('?' * len(rows[0]))})", rows)
    connection.close()
    return {"kind": "sql", "path": str(tmp_path / "data.db")}


def read(source: dict[str, str], **settings: Any) -> Dataset:
    chosen = source if {"table", "query"} & set(source) else source | {"table": "t"}
    return read_dataset(validate(DataConfig, {"name": "d", "source": chosen} | settings))


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("DECIMAL(10,2)", [1.23456, 2.5, 7]),
        ("NUMERIC", [1.5e-11, 3e-12, 1e-3]),
        ("NUMERIC(4,0)", [0.5, 1.5, 2.25]),
        ("BOOLEAN", [0, 4, 1]),
        ("FLOAT", [1.0, 2.0, 3.25]),
        ("INTEGER", [1, 2, 3]),
    ],
)
def test_declared_types_of_sqlite_change_no_number(tmp_path: Path, kind: str, cells: list[Any]) -> None:
    source = stored(tmp_path, f"ds TEXT, y {kind}", list(zip(DAYS, cells, strict=True)))
    assert read(source).frame.table["y"].to_list() == [float(cell) for cell in cells]
    by_query = read(source | {"query": "SELECT * FROM t"})
    assert by_query.frame.table["y"].to_list() == [float(cell) for cell in cells]


@pytest.mark.parametrize("kind", ["TIMESTAMP", "DATETIME", "DATE"])
def test_epochs_in_a_column_of_times_are_read_as_stated(tmp_path: Path, kind: str) -> None:
    rows = [(1_704_067_200 + 3600 * hour, hour) for hour in range(3)]
    source = stored(tmp_path, f"ds {kind}, y REAL", rows)
    got = read(source, time_format="epoch:s").frame.table["time"].to_list()
    assert got == [datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in range(3)]
    with pytest.raises(DataError, match="look like seconds since 1970; set time_format=epoch:s"):
        read(source)


@pytest.mark.parametrize("kind", ["DATE", "DATETIME", "TIMESTAMP", "TIME", "TEXT"])
def test_times_of_sqlite_are_text(tmp_path: Path, kind: str) -> None:
    source = stored(tmp_path, f"ds {kind}, y REAL", [(f"2024-01-01 0{hour}:00:00.000000", hour) for hour in range(3)])
    assert read(source).frame.schema.freq == "1h"
    (tmp_path / "days").mkdir()
    source = stored(tmp_path / "days", f"ds {kind}, y REAL", [(day, 1.0) for day in DAYS])
    days = read(source, timezone="Asia/Tokyo")
    assert days.frame.table["time"][0] == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("columns", "bad", "message"),
    [
        ("ds DATETIME, y REAL", ("01/01/2024 00:00", 1.0), r"1 of 3 unreadable times .*row 3: '01/01/2024 00:00'"),
        ("ds DATETIME, y REAL", ("", 1.0), r"1 of 3 unreadable times .*row 3: ''"),
        ("ds DATE, y REAL", ("2024-01-03 25:00", 1.0), r"1 of 3 unreadable times .*row 3: '2024-01-03 25:00'"),
        ("ds TEXT, y DECIMAL(10,2)", ("2024-01-03", "abc"), r"1 cells in 1 column.* are no numbers .*row 3: 'abc'"),
        ("ds TEXT, y BOOLEAN", ("2024-01-03", "yes"), r"1 cells in 1 column.* are no numbers .*row 3: 'yes'"),
        ("ds TEXT, y TIME", ("2024-01-03", "noon"), r"1 cells in 1 column.* are no numbers .*row 3: 'noon'"),
        ("ds TEXT, y JSON", ("2024-01-03", "{"), r"1 cells in 1 column.* are no numbers .*row 3: '\{'"),
    ],
)
def test_text_in_a_typed_column_is_left_to_the_checks(
    tmp_path: Path, columns: str, bad: tuple[Any, ...], message: str
) -> None:
    source = stored(tmp_path, columns, [("2024-01-01", 1), ("2024-01-02", 2), bad])
    with pytest.raises(DataError, match=message):
        read(source)
    got = read(source, bad_rows="drop", bad_cells="null").frame.table["y"].to_list()
    assert got in ([1.0, 2.0], [1.0, 2.0, None])


def test_names_of_any_kind_are_quoted(tmp_path: Path) -> None:
    columns = 'ds TEXT, "EWR.temp" REAL, "JFK.temp" DECIMAL(4,1), "a %(b)s :c ""d""" REAL, "select" REAL'
    source = stored(tmp_path, columns, [(day, 1.55, 2.55, 3.0, 4.0) for day in DAYS])
    for selection in ({"table": "t"}, {"query": "SELECT * FROM t"}):
        got = read(source | selection).frame
        assert got.schema.targets == ("EWR.temp", "JFK.temp", 'a %(b)s :c "d"', "select")
        assert got.table.row(0)[2:] == (1.55, 2.55, 3.0, 4.0)
    assert read(source | {"table": "main.t"}).frame.num_rows == 3
    with pytest.raises(DataError, match="has no table 'main.u'; check source.table"):
        read(source | {"table": "main.u"})


def test_a_view_is_a_table(tmp_path: Path) -> None:
    source = stored(tmp_path, "ds TEXT, y DECIMAL(10,2)", [(day, 0.125) for day in DAYS])
    with sqlite3.connect(tmp_path / "data.db") as connection:
        connection.execute("CREATE VIEW v AS SELECT ds, y * 3 AS z FROM t")
    connection.close()
    assert read(source | {"table": "v"}).frame.table["z"].to_list() == [0.375] * 3


QUERIES = [
    "SELECT ds, y FROM t WHERE ds LIKE '%:00'",
    "SELECT ds, y FROM t WHERE ds LIKE '2024-01-01 %' AND '%s %(x)s %%' <> ':a' -- 100% of them :b",
    "SELECT ds, CAST(y AS numeric) AS y FROM t WHERE y % 2 < 9;",
    "SELECT ds, y AS \"y:00\" FROM t WHERE 'a\\:b' LIKE '_\\:_'",
]


def test_a_colon_written_as_older_versions_wanted_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = stored(tmp_path, "ds TEXT, y INTEGER", list(zip(DAYS, [1, 2, 3], strict=True)))
    read(source | {"query": "SELECT ds, y FROM t WHERE ds <> 'a\\:b'"})
    assert "source.query holds \\: and is run as it stands" in caplog.text


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_query_is_run_as_it_stands(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    rows = [(f"2024-01-01 0{hour}:00", hour) for hour in range(3)]
    queries = list(QUERIES)
    if kind == "sqlite":
        source = stored(tmp_path, "ds TEXT, y INTEGER", rows)
    else:
        url = str(request.getfixturevalue("postgres_url"))
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE t (ds text, y integer)")
            for at, value in rows:
                connection.exec_driver_sql(f"INSERT INTO t VALUES ('{at}', {value})")
        engine.dispose()
        source = {"kind": "sql", "url": url}
        queries[3] = "SELECT ds, y::float8 AS \"y:00\" FROM t WHERE E'a\\\\:b' <> ''"
        queries.append("SELECT to_char(ds::timestamp, 'YYYY-MM-DD HH24:MI') AS ds, y FROM t WHERE ds ~ '^\\d{4}:?'")
    for query in queries:
        if kind == "sqlite" and "\\:_" in query:
            query = query.replace("'a\\:b' LIKE '_\\:_'", "'a\\:b' = 'a\\' || ':b'")
        got = read(source | {"query": query}).frame.table
        assert got.to_series(2).to_list() == [0.0, 1.0, 2.0], query
    with pytest.raises(DataError, match="the query failed"):
        read(source | {"query": "SELECT ds, y FROM t WHERE y = :limit"})


def test_numerics_of_postgresql_stay_exact(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.execution_options(no_parameters=True).begin() as connection:
        connection.exec_driver_sql(
            'CREATE TABLE "T" ("Id" numeric, ds timestamptz, y numeric, b boolean, "a %(x)s" numeric(10, 2))'
        )
        for day in (1, 2):
            connection.exec_driver_sql(
                f"INSERT INTO \"T\" VALUES (12345678901234567890, '2024-01-0{day}+00', 1.5e-11, true, 0.1)"
            )
    engine.dispose()
    source = {"kind": "sql", "url": postgres_url, "table": "T"}
    got = read(source, layout="long", series="Id").frame
    assert got.series_ids == ("12345678901234567890",)
    assert got.table.rows()[0][2:] == (1.5e-11, 1.0, 0.1)
    assert read(source | {"table": "public.T"}, layout="long", series="Id").frame.fingerprint() == got.fingerprint()
