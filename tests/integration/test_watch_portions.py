"""Rows of a watch are read the same however they are cut into portions, and one that cannot be read costs itself."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from tsforge.app.watch.intake import Intake
from tsforge.app.watch.screening import Bounds, Refusal, wide_gaps
from tsforge.app.watch.settings import FolderSource, RowsConfig, StdinSource, TextMarks
from tsforge.app.watch.sources import Offer, salvage
from tsforge.app.watch.stdin import Lines
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.config import SqlSource
from tsforge.data.grid import TimeGrid
from tsforge.data.schema import SeriesSchema
from tsforge.data.sql_poll import KeyedTable

UTC_TIME = pl.Datetime("us", "UTC")
Row = dict[str, Any]


def taker(freq: str = "1h", known: tuple[str, ...] = (), bounds: Bounds = Bounds(), **rows: Any) -> Intake:
    """Return the intake of an artifact of which only columns, grid and series matter here."""
    origin = 0 if freq.endswith("i") else datetime(2024, 1, 1, tzinfo=UTC)
    artifact: Any = SimpleNamespace(
        schema=SeriesSchema(targets=("x", "y"), known=known, freq=freq),
        grid=TimeGrid(origin, freq),
        series_ids=("a", "b"),
    )
    return Intake(artifact, {}, RowsConfig(**rows), TextMarks(), "plant", bounds=bounds)


def ends(time: Any = None) -> pl.DataFrame:
    """Return the last row taken of series a, if there is one."""
    kind = pl.Int64 if isinstance(time, int) else UTC_TIME
    times = [] if time is None else [time]
    return pl.DataFrame({"series_id": ["a"] * len(times), "time": times}, schema={"series_id": pl.String, "time": kind})


def rows_of(times: Sequence[Any], **columns: Sequence[Any]) -> pl.DataFrame:
    plain = {"time": times, "series_id": ["a"] * len(times), "x": [1.0] * len(times), "y": [2.0] * len(times)}
    return pl.DataFrame(plain | columns, strict=False)


def read(intake: Intake, table: pl.DataFrame, after: pl.DataFrame | None = None) -> tuple[pl.DataFrame, list[Refusal]]:
    """Return the rows taken and those refused."""
    portions, refusals = salvage(intake, table, "here", ends() if after is None else after, is_text=False)
    return pl.concat([intake.nothing(), *(portion.table for portion in portions)]), refusals


def by_itself(intake: Intake, table: pl.DataFrame) -> tuple[pl.DataFrame, list[Refusal]]:
    """Return the same where every row is a portion."""
    found = [read(intake, table[at : at + 1]) for at in range(table.height)]
    return pl.concat([rows for rows, _ in found]), [refusal for _, refusals in found for refusal in refusals]


def piped(intake: Intake, text: str, **settings: Any) -> list[Offer]:
    """Return what standard input offers."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    lines = Lines(validate(StdinSource, {"kind": "stdin", **settings}), intake, reader)
    offers: list[Offer] = []
    while not (lines.has_ended and lines.rest() is None):
        offer = lines.next(offers[-1].position if offers else {}, ends(), 100)
        offers += [] if offer is None else [offer]
    os.close(reader)
    return offers


# --- times


@pytest.mark.parametrize("odd", ["abc", "6.5", "1e2", "9" * 30])
def test_an_odd_time_among_whole_numbers_costs_itself(odd: str) -> None:
    """One of them once refused the whole portion: without it alone are all of them numbers."""
    intake = taker("1i")
    for cells in (["6", odd, "7"], ["6", odd, " 7.0 ", None, ""]):
        found, refusals = read(intake, rows_of(cells))
        assert found["time"].to_list() == [6, 7]
        assert [(refusal.what, refusal.rows) for refusal in refusals] == [("here, row 2", 1)]
        assert "are no whole numbers" in refusals[0].reason
    (offer,) = piped(intake, f"time,series_id,x,y\n6,a,1,2\n{odd},a,1,2\n7,a,1,2\n")
    assert [portion.table["time"].to_list() for portion in offer.portions] == [[6, 7]]


def test_whole_numbers_written_as_fractions_are_whole() -> None:
    line = '{{"time": {}, "series_id": "a", "x": 1, "y": 2}}\n'.format
    (offer,) = piped(taker("1i"), "".join(map(line, ("6", "7.0", '"abc"', "8"))), format="jsonl")
    assert offer.portions[0].table["time"].to_list() == [6, 7, 8]
    intake = taker(time_format="epoch:s")
    (offer,) = piped(intake, "".join(map(line, ("1704070800", "1704074400.0", '"no"'))), format="jsonl")
    assert offer.portions[0].table["time"].dt.hour().to_list() == [1, 2]
    assert [refusal.rows for refusal in offer.refusals] == [1]
    found, refusals = read(intake, rows_of(["1704070800", "9" * 18]))
    assert (found.height, len(refusals)) == (1, 1)


@pytest.mark.parametrize(
    "cells",
    [
        ["2024-01-01 01:00:00+00", "2024-01-01 02:00:00"],
        ["2024-01-01 00:00:00+00:00", "2024-01-01 01:00:00+0000", "2024-01-01 02:00", "2024-01-01T03:00:00Z"],
        ["2024-01-02", "2024-01-02 01:00:00+00"],
        ["2024-01-02", "2024-01-02 01:00"],
        ["2024-02", "2024-02-01 01:00:00+00"],
    ],
)
def test_times_with_and_without_an_offset_are_read_beside_each_other(cells: list[str]) -> None:
    found, refusals = read(taker(), rows_of(cells))
    alone, _ = by_itself(taker(), rows_of(cells))
    assert refusals == []
    assert found.sort("time").equals(alone.sort("time"))
    assert found.height == len(cells)


@pytest.mark.parametrize("cell", ["2024-03-30", "2024/03/30", " 2024-03-30 "])
def test_a_date_is_a_local_midnight_whatever_stands_beside_it(cell: str) -> None:
    intake = taker(timezone="Europe/Berlin")
    midnight = datetime(2024, 3, 29, 23, tzinfo=UTC)
    for cells in ([cell], [cell, "2024-03-30 01:00"]):
        found, _ = read(intake, rows_of(cells))
        assert found["time"].to_list() == [midnight + timedelta(hours=at) for at in range(len(cells))]
    found, _ = read(taker(timezone="Europe/Berlin"), rows_of(["2024-03"]))
    assert found["time"].to_list() == [datetime(2024, 2, 29, 23, tzinfo=UTC)]
    found, _ = read(taker("1d", timezone="Europe/Berlin"), rows_of([cell]))
    assert found["time"].to_list() == [datetime(2024, 3, 30, tzinfo=UTC)]


def test_the_hour_that_clocks_show_twice_is_inferred_across_portions() -> None:
    """Each portion alone would take its second hour for the first, and lose it as late."""
    intake = taker("30m", timezone="Europe/Berlin", ambiguous="infer")
    shown = ("01:30", "02:00", "02:30", "02:00", "02:30", "03:00")
    table = rows_of([f"2024-10-27 {clock}" for clock in shown])
    wanted = [datetime(2024, 10, 26, 23, 30, tzinfo=UTC) + timedelta(minutes=30 * at) for at in range(6)]
    for size in (1, 2, 3, 4, 6):
        times: list[datetime] = []
        for start in range(0, 6, size):
            after = ends(times[-1]) if times else None
            times += read(intake, table[start : start + size], after)[0]["time"].to_list()
        assert times == wanted, size
    found, _ = read(intake, table[:4], ends(wanted[2]))  # sent again: all but the last is late
    assert found["time"].to_list() == wanted[3:4]


def test_local_times_left_out_are_refused_for_what_each_is() -> None:
    cells = ["2024-10-27 02:00", "2024-03-31 02:00", "2024-03-31 05:00", "2024-03-31 02:00"]
    found, refusals = read(taker(timezone="Europe/Berlin"), rows_of(cells))
    assert found.height == 1
    said = {refusal.rows: refusal.reason for refusal in refusals}
    assert "occur twice" in said[1]
    assert "set source.rows.ambiguous to infer" in said[1]
    assert "do not exist" in said[2]
    assert "set source.rows.nonexistent to shift or drop" in said[2]
    _, refusals = read(taker(timezone="Europe/Berlin", ambiguous="drop"), rows_of(cells))
    assert [refusal.rows for refusal in refusals] == [2], "what the settings leave out is no refusal"


def test_local_dates_for_a_grid_of_numbers_stop_no_watch() -> None:
    intake = taker("1i", timezone="Europe/Berlin", time_format="%Y-%m-%d %H:%M")
    found, refusals = read(intake, rows_of(["2024-10-27 02:00", "2024-10-27 05:00"]))
    assert (found.height, sum(refusal.rows for refusal in refusals)) == (0, 2)
    assert "are dates, not numbers, which does not fit freq 1i" in refusals[0].reason


# --- places


def test_rows_are_numbered_beyond_32_bits() -> None:
    first = 2**32 + 5
    table = rows_of([7, 6], x=["1", "1"], series_id=["a", "a"])
    _, refusals = salvage(taker("2i"), table, "here", ends(), is_text=False, numbers=range(first, first + 2))
    assert [refusal.what for refusal in refusals] == [f"here, row {first}"]


@pytest.mark.parametrize("cell", [float("nan"), -999.0, "", " ", "n", "inf", None])
def test_a_row_ahead_without_a_value_only_tells_known_covariates(cell: Any) -> None:
    """What the cleaning makes no value of is none for the clock either."""
    ahead = (datetime.now(UTC) + timedelta(days=30)).replace(minute=0, second=0, microsecond=0)
    table = rows_of([ahead], x=[cell], y=pl.Series([None], dtype=pl.Float64), k=[1.0])
    intake = taker(known=("k",), bounds=Bounds(max_ahead_seconds=60.0), sentinels={"x": (-999.0,)})
    found, refusals = read(intake, table)
    assert refusals == []
    assert found["k"].to_list() == [1.0]
    _, refusals = read(intake, table.with_columns(x=pl.lit(3)))
    assert "ahead of the clock" in refusals[0].reason


def test_only_series_of_a_portion_are_looked_at_for_gaps() -> None:
    """A portion of one row must not cost the more the more series a watch has."""
    looked = []
    grid = TimeGrid(0, "1i")
    spy: Any = SimpleNamespace(freq="1i", index_of=lambda times: (looked.append(len(times)), grid.index_of(times))[1])
    many = pl.DataFrame({"series_id": [f"s{at}" for at in range(1000)], "time": range(1000)})
    bad, reason = wide_gaps(pl.DataFrame({"series_id": ["s7"], "time": [100]}), many, spy, Bounds(max_gap=50))
    assert (bad.to_list(), looked) == ([True], [2])
    assert "comes 93 steps of 1i after" in reason


# --- cells


def test_cells_that_are_no_numbers_are_null_and_cost_a_row_only_where_it_has_no_other() -> None:
    table = rows_of(
        [1, 2, 3, 4, 5],
        x=["1", "1", "ERR", None, "ERR"],
        y=["ERR", "2", "2", "BAD", "BAD"],
    )
    for cut in (read, by_itself):
        found, refusals = cut(taker("1i"), table)
        assert found["time"].to_list() == [1, 2, 3]
        assert found["x"].to_list() == [1.0, 1.0, None]
        assert found["y"].to_list() == [None, 2.0, 2.0]
        assert sum(refusal.rows for refusal in refusals) == 2
    assert "no cell is a number (first: column 'y' holds 'BAD')" in refusals[0].reason
    portions, _ = salvage(taker("1i"), table, "here", ends(), is_text=False)
    notes = [portion.notes for portion in portions if portion.notes]
    assert notes == [{"replaced: unreadable cells in column 'y'": 1, "replaced: unreadable cells in column 'x'": 1}]
    assert sum(portion.rows_read for portion in portions) == 3


@pytest.mark.parametrize("cells", [[b"a", b"b", None], ["a", "b", ""], [[1], [2], None]])
def test_a_column_without_any_number_is_null(cells: list[Any]) -> None:
    found, refusals = read(taker("1i"), rows_of([1, 2, 3], x=cells))
    assert (found["x"].null_count(), found["y"].to_list(), refusals) == (3, [2.0] * 3, [])
    _, refusals = read(taker("1i"), rows_of([1, 2, 3], x=cells, y=pl.Series([None] * 3, dtype=pl.Float64)))
    assert [refusal.rows for refusal in refusals] == [2]


# --- lines


def test_columns_of_one_name_that_nobody_reads_stop_no_watch() -> None:
    for header in ("time,series_id,x,y,z,z", "time,series_id,x,y,,"):
        (offer,) = piped(taker("1i"), f"{header}\n1,a,3,4,5,6\n")
        assert offer.portions[0].table.select("x", "y").rows() == [(3.0, 4.0)]
    with pytest.raises(DataError, match=r"standard input has repeated column name\(s\): x; rename them"):
        piped(taker("1i"), "time,series_id,x,x,y\n1,a,3,4,5\n")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_are_named_by_the_line_they_stand_in(kind: str) -> None:
    """A line that was no row once moved the numbers of those below it."""
    row: Row = {"time": 2, "series_id": "a", "x": 1, "y": 2}
    if kind == "csv":
        lines = ["time,series_id,x,y", "junk", "2,a,1,2", "5,a,1,2"]
    else:
        lines = ["junk", json.dumps(row), json.dumps(row | {"time": 5})]
    (offer,) = piped(taker("2i"), "\n".join(lines) + "\n", format=kind)
    assert [refusal.what for refusal in offer.refusals] == [
        "standard input from row 1 on",
        "standard input, row 3",
    ]


# --- settings and keys


def test_marks_of_text_that_cannot_be_read_are_refused_at_the_start() -> None:
    folder, stdin = {"kind": "folder", "path": "."}, {"kind": "stdin"}
    for kind, source in ((FolderSource, folder), (StdinSource, stdin)):
        for marks, words in (({"encoding": "nope"}, "unknown encoding 'nope'"), ({"decimal": ","}, "must differ")):
            with pytest.raises(ConfigError, match=words):
                validate(kind, source | {"csv": marks})
    for encoding in ("utf-16", "utf-16-be", "utf-32", "cp037"):
        with pytest.raises(ConfigError, match="does not end lines with the byte 0A"):
            validate(StdinSource, stdin | {"csv": {"encoding": encoding}})
        assert validate(FolderSource, folder | {"csv": {"encoding": encoding}}).csv.encoding == encoding
    for encoding in ("utf-8", "utf-8-sig", "latin-1", "cp1252"):
        assert validate(StdinSource, stdin | {"csv": {"encoding": encoding}}).csv.encoding == encoding


@pytest.mark.parametrize("kind", ["DATETIME", "TIMESTAMP"])
def test_a_key_of_times_does_not_fall_below_itself(tmp_path: Path, kind: str) -> None:
    """SQLite compares texts, and ``12:00:00`` comes before ``12:00:00.000000``."""
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute(f"CREATE TABLE t (k {kind}, v REAL)")
        connection.execute("INSERT INTO t VALUES ('2024-01-01 12:00:00', 1.0)")
    connection.close()
    table = KeyedTable(SqlSource(path=str(tmp_path / "t.db"), table="t"), "k", ["v"])
    newest = table.newest()
    assert newest == datetime(2024, 1, 1, 12)
    assert not table.look(newest).has_fallen
    assert table.after(newest, newest, 10)[1] is None
    assert table.look(datetime(2024, 1, 1, 12, 0, 1)).has_fallen
    table.close()
