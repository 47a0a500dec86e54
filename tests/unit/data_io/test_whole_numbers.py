"""Whole numbers that become Float64: those it does not hold are counted, wherever they come from."""

from __future__ import annotations

import sqlite3
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from test_reading_sources import HEADER, read, values

from tsforge.core.config import validate
from tsforge.data.cleaning import read_dataset
from tsforge.data.config import DataConfig

BIG = 2**53


@pytest.mark.parametrize("kind", ["csv", "signed", "unsigned", "decimal", "sqlite"])
def test_whole_numbers_that_a_float_does_not_hold_are_counted(tmp_path: Path, kind: str) -> None:
    days = [date(2024, 1, day) for day in range(1, 5)]
    numbers = [BIG + 1, -BIG, 7, 2**63 - 1]
    if kind == "csv":
        rows = zip(days, [str(BIG + 1), f"-{BIG}.0", "7.5", f"+{2**63 - 1}.00"], strict=True)
        got = read(tmp_path, HEADER + "".join(f"{day},{cell}\n" for day, cell in rows))
        numbers = [BIG + 1, -BIG, 7.5, 2**63 - 1]
    elif kind == "sqlite":
        with sqlite3.connect(tmp_path / "data.db") as connection:
            connection.execute("CREATE TABLE t (ds TEXT, x INTEGER)")
            connection.executemany(
                "INSERT INTO t VALUES (?, ?)", [(str(day), value) for day, value in zip(days, numbers, strict=True)]
            )
        connection.close()
        source = {"kind": "sql", "path": str(tmp_path / "data.db"), "table": "t"}
        got = read_dataset(validate(DataConfig, {"name": "d", "source": source}))
    else:
        types = {"signed": pl.Int64(), "unsigned": pl.UInt64(), "decimal": pl.Decimal(38, 2)}
        numbers = [abs(value) for value in numbers]
        column = pl.Series("x", numbers, dtype=pl.Int64).cast(types[kind])
        pl.DataFrame({"ds": days, "x": column}).write_parquet(tmp_path / "data.parquet")
        source = {"kind": "parquet", "path": str(tmp_path / "data.parquet")}
        got = read_dataset(validate(DataConfig, {"name": "d", "source": source}))
    assert values(got) == [float(value) for value in numbers]
    (note,) = got.report.findings
    assert (note.kind, note.count) == ("note", 2)
    assert "column 'x' with more digits than a Float64 holds" in note.what
    assert [example.partition(": ")[2].strip("'+")[:16] for example in note.examples] == [
        "9007199254740993",
        "9223372036854775",
    ]


def test_whole_numbers_longer_than_any_integer_are_counted_too(tmp_path: Path) -> None:
    got = read(tmp_path, HEADER + f"2024-01-01,{10**45 + 1}\n2024-01-02,2e45\n2024-01-03,-99\n", sentinels={"x": [-99]})
    assert [str(item)[:40] for item in got.report.findings] == [
        "replaced 1: sentinel values in column 'x'"[:40],
        "note 1: whole numbers in column 'x' with more digits"[:40],
    ]
