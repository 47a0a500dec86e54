"""Reading sources: every flaw is one message with place, count and remedy; every policy does what it says."""

from __future__ import annotations

import sqlite3
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sqlalchemy import create_engine, text

from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, DataError, TsforgeError
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig
from tsforge.data.io import from_pandas, to_pandas

HEADER = "ds,x\n"
GOOD = HEADER + "2024-01-01,1\n2024-01-02,2\n"


def hours(count: int, *, start: datetime = datetime(2024, 1, 1), value: float = 1.0) -> str:
    return "".join(f"{start + timedelta(hours=at)},{value + at}\n" for at in range(count))


def read(tmp_path: Path, content: str | bytes, source: dict[str, Any] | None = None, **settings: Any) -> Dataset:
    path = tmp_path / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"kind": "csv", "path": str(path)} | (source or {})
    return read_dataset(validate(DataConfig, {"name": "d", "source": given, **settings}))


def values(dataset: Dataset, column: str = "x") -> list[float | None]:
    return dataset.frame.table[column].to_list()


def times(dataset: Dataset) -> list[Any]:
    return dataset.frame.table["time"].to_list()


BAD_FILES: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "empty": ("", {}, r"is empty \(0 bytes\)"),
    "only blank lines": ("\n\n", {}, "has no header line"),
    "header only": (HEADER, {}, r"has a header \(2 columns\) and no rows"),
    "semicolons": ("ds;x\n2024-01-01;1\n", {}, "separated by semicolon; set source.separator=';'"),
    "tabs": ("ds\tx\n2024-01-01\t1\n", {}, r"separated by tab; set source.separator='\\t'"),
    "latin-1": (
        "ds,x\n2024-01-01,1\n2024-01-02,é\n".encode("latin-1"),
        {},
        r"byte 0xe9 at offset 29 \(line 3\).*cp1252",
    ),
    "utf-16": (GOOD.encode("utf-16"), {}, "is not utf-8.*for example utf-16"),
    "utf-32": (GOOD.encode("utf-32"), {}, "is not utf-8.*for example utf-32"),
    "repeated column": ("ds,x,x\n2024-01-01,1,2\n", {}, r"repeated column name\(s\): 'x'"),
    "long row": (HEADER + "2024-01-01,1\n2024-01-02,1,2\n", {}, "more fields than the header"),
    "open quote": (HEADER + '2024-01-01,"1\n2024-01-02,1\n', {}, "a quoted cell is not closed"),
    "endless cell": (
        HEADER + '2024-01-01,\n"' + "x" * 200_000 + '",1\n',
        {},
        r"larger than field limit .*\(line 3\); a quote seems not to be closed",
    ),
    "no time column": ("date,x\n2024-01-01,1\n", {}, r"no column 'ds' \(it has date, x\); set time"),
    "unknown target": (GOOD, {"targets": ["xx"]}, r"roles: no column 'xx'; did you mean 'x'\? \(it has x\)"),
    "unknown sentinel column": (GOOD, {"sentinels": {"y": [-1]}}, "sentinels: no column 'y'"),
    "unknown range column": (GOOD, {"valid_range": {"y": [0, 1]}}, "valid_range: no column 'y'"),
    "mixed types": (
        HEADER + "2024-01-01,1\n2024-01-02,abc\n2024-01-03,3\n2024-01-04,1 000\n",
        {},
        r"2 cells in 1 column\(s\) are no numbers \('x' 2 times: row 2: 'abc', row 4: '1 000'\).*bad_cells=null",
    ),
    "text": (
        HEADER + "2024-01-01,a\n2024-01-02,b\n",
        {"targets": ["x"]},
        r"'x' holds text, no cell is a number \(row 1: 'a'",
    ),
    "nothing numeric": (HEADER + "2024-01-01,a\n2024-01-02,b\n", {}, "no numeric column is left to be a target"),
    "infinite": (
        HEADER + "2024-01-01,1\n2024-01-02,inf\n2024-01-03,-inf\n",
        {},
        r"2 cells in 1 column\(s\) are infinite \('x' 2 times: row 2: 'inf', row 3: '-inf'\)",
    ),
    "impossible dates": (
        HEADER + "2024-01-01,1\n2024-02-30,2\nfoo,3\n",
        {},
        r"2 of 3 unreadable times in column 'ds' \(row 2: '2024-02-30', row 3: 'foo'\); repair them.*bad_rows=drop",
    ),
    "year 0": (
        HEADER + "0000-01-01,1\n0000-01-02,2\n0001-01-03,3\n",
        {},
        r"2 of 3 unreadable times in column 'ds' \(row 1: '0000-01-01', row 2: '0000-01-02'\); repair them",
    ),
    "year 0 in UTC": (
        HEADER + "0001-01-01 00:00,1\n2024-01-02 00:00,2\n",
        {"timezone": "Asia/Kolkata"},
        "1 of 2 unreadable times",
    ),
    "a 60th second": (
        HEADER + "2016-12-31T23:59:59,1\n2016-12-31T23:59:60,2\n2017-01-01T00:00:00,3\n",
        {},
        r"1 of 3 unreadable times in column 'ds' \(row 2: '2016-12-31T23:59:60'\); repair them.*bad_rows=drop",
    ),
    "a 60th second with an offset": (
        HEADER + "2016-12-31 23:59:60.5+00:00,2\n2017-01-01 00:00:00+00:00,3\n",
        {},
        "1 of 2 unreadable times",
    ),
    "a 60th second of a compact form": (
        HEADER + "20161231235960,2\n20170101000000,3\n",
        {"time_format": "%Y%m%d%H%M%S"},
        "1 of 2 unreadable times",
    ),
    "short rows": (
        "ds,x,y\n2024-01-01,1,1\n2024-01-02,2\n2024-01-03,3,\n2024-01-04\n2024-01-05,5,5\n",
        {},
        r"2 of 5 rows have fewer cells than the header \(row 2: 2, row 4: 1\).*cut off; repair them.*bad_rows=drop",
    ),
    "ambiguous day and month": (
        HEADER + "01/02/2024,1\n02/02/2024,2\n",
        {},
        "2 of 2 unreadable.*set time_format, for example",
    ),
    "format that fits nothing": (
        HEADER + "01.02.2024,1\n",
        {"time_format": "%Y/%m/%d"},
        "time_format=%Y/%m/%d fits none of them",
    ),
    "missing time": (
        HEADER + "2024-01-01,1\n,2\n2024-01-03,3\n",
        {},
        r"1 of 3 rows have no time in column 'ds' \(row 2\)",
    ),
    "seconds since 1970": (
        HEADER + "1704067200,1\n1704070800,2\n",
        {},
        "look like seconds since 1970; set time_format=epoch:s",
    ),
    "compact dates": (
        HEADER + "20240101,1\n20240102,2\n",
        {},
        "look like dates such as 20240131; set time_format=%Y%m%d",
    ),
    "offset and none": (
        HEADER + "2024-01-01T00:00:00Z,1\n2024-01-01T01:00:00,2\n",
        {},
        "mixes times with an offset and without",
    ),
    "zone of zoned times": (
        HEADER + "2024-01-01T00:00:00Z,1\n2024-01-01T01:00:00Z,2\n",
        {"timezone": "Europe/Berlin"},
        "carries its own zone, so timezone=Europe/Berlin has no effect",
    ),
    "duplicate keys": (
        HEADER + "2024-01-01,1\n2024-01-02,2\n2024-01-02,2\n2024-01-02,3\n",
        {},
        r"2 of 4 rows repeat the time of an earlier row .*row 3: 2024-01-02.*1 of them with equal values\); set dup",
    ),
    "two frequencies": (
        HEADER + hours(30) + "".join(f"2024-02-{day:02d} 00:00,1\n" for day in range(1, 29)),
        {},
        r"no single frequency.*1h \(29 times\) and 1d \(27 times\)",
    ),
    "irregular": (
        HEADER + "2024-01-01 00:00,1\n2024-01-01 00:07,2\n2024-01-01 00:31,3\n",
        {},
        "no single frequency.*resample",
    ),
    "off the stated grid": (
        HEADER + "2024-01-01 00:00,1\n2024-01-01 00:30,2\n",
        {"freq": "1h"},
        "1 of 2 times.*off the 1h grid",
    ),
    "all-null target": (
        HEADER + "2024-01-01,\n2024-01-02,\n",
        {},
        r"target column\(s\) x hold no value in any of 2 rows",
    ),
    "all-null by sentinel": (
        HEADER + "2024-01-01,-9\n2024-01-02,-9\n",
        {"sentinels": {"*": [-9]}},
        "hold no value in any",
    ),
    "one row": (HEADER + "2024-01-01,1\n", {}, r"cannot infer the frequency from 1 row\(s\).*give freq"),
    "separator in no name": (
        "ds,A,B\n2024-01-01,1,2\n",
        {"separator": "."},
        "no column name contains the separator '.'",
    ),
    "no series id": (
        "s,ds,x\na,2024-01-01,1\n,2024-01-02,2\n",
        {"layout": "long", "series": "s"},
        r"1 of 2 rows have no series id in column 's' \(row 2\)",
    ),
    "series of two frequencies": (
        "s,ds,x\n"
        + "".join(f"a,2024-01-{1 + at // 24:02d} {at % 24:02d}:00,1\n" for at in range(200))
        + "".join(f"b,2024-01-{day:02d} 00:00,1\n" for day in range(1, 9)),
        {"layout": "long", "series": "s"},
        r"1 of 2 series have another frequency than 1h \(first: 'b' with 1d\)",
    ),
    "static that changes": (
        "s,ds,x,k\na,2024-01-01,1,1\na,2024-01-02,2,2\n",
        {"layout": "long", "series": "s", "targets": ["x"], "static": ["k"]},
        "static column 'k' changes within 1 of 1 series",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_flaw_is_one_message(tmp_path: Path, case: str) -> None:
    content, settings, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content, **settings)
    assert str(caught.value).startswith("dataset 'd': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent.csv", "there is no file"), ("absent-*.csv", "no file matches"), ("folder", "holds no CSV file")],
)
def test_a_missing_source_is_one_message(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        read_dataset(validate(DataConfig, {"name": "d", "source": {"kind": "csv", "path": str(tmp_path / path)}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "1st"}, "name: a dataset name is a letter"),
        ({"timezone": "Mars/Olympus"}, "timezone: unknown time zone 'Mars/Olympus'"),
        ({"timezone": "../etc/passwd"}, "unknown time zone"),
        ({"source": {"kind": "csv", "path": "x", "separator": ",", "decimal": ","}}, "they must differ"),
        ({"source": {"kind": "csv", "path": "x", "encoding": "utf-99"}}, "unknown encoding 'utf-99'"),
        ({"source": {"kind": "sql", "path": "x"}}, "give either table or query"),
        ({"source": {"kind": "sql", "table": "t"}}, "exactly one of url_env, url, path"),
        (
            {"source": {"kind": "sql", "url": "postgresql://me:secret@host/db", "table": "t"}},
            "url holds a password; put the URL in an environment variable",
        ),
        (
            {"source": {"kind": "sql", "url": "postgresql://host/db?user=me&password=secret", "table": "t"}},
            "url holds a password; put the URL in an environment variable",
        ),
        (
            {"source": {"kind": "sql", "url": "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret", "table": "t"}},
            "url holds a password; put the URL in an environment variable",
        ),
        (
            {"source": {"kind": "sql", "url": "postgresql://host:secret/db", "table": "t"}},
            "url is not a database URL",
        ),
        ({"targets": ["x"], "past": ["x"]}, r"more than one role: x"),
        ({"series": "s"}, "series has no effect with the wide layout"),
        ({"layout": "long", "separator": "."}, "separator has no effect with the long layout"),
        ({"resample": {"every": "fast"}}, "resample.every: freq 'fast' is not a frequency"),
        ({"valid_range": {"x": [2, 1]}}, "its low end lies above its high end"),
        ({"tragets": ["x"]}, "tragets: unknown key; did you mean 'targets'?"),
        ({"source": {"kind": "synthetic"}, "targets": ["x"]}, "targets has no effect with a synthetic source"),
    ],
)
def test_a_contradicting_config_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(DataConfig, {"name": "d", "source": {"kind": "csv", "path": "x"}, **settings})
    assert "secret" not in str(caught.value)


def test_a_byte_order_mark_an_index_column_and_blank_cells_are_harmless(tmp_path: Path) -> None:
    got = read(tmp_path, "\ufeff,ds,x\n0, 2024-01-01 ,1\n1,2024-01-02,NA\n2,2024-01-03, 3 \n")
    assert values(got) == [1.0, None, 3.0]
    assert got.frame.schema.targets == ("x",)
    assert "note 1: columns without a name left out" in [str(item) for item in got.report.findings]


def test_european_numbers_and_another_encoding(tmp_path: Path) -> None:
    content = "ds;température\n01.01.2024;1,5\n02.01.2024;-2,25\n".encode("cp1252")
    got = read(tmp_path, content, {"separator": ";", "decimal": ",", "encoding": "cp1252"}, time_format="%d.%m.%Y")
    assert values(got, "température") == [1.5, -2.25]
    assert got.frame.schema.freq == "1d"


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"]
)
def test_encodings_of_several_bytes(tmp_path: Path, encoding: str) -> None:
    content = GOOD.replace("x", "温度")
    for end in ("", "2024-01-03,3"):  # a last line without its end is one all the same
        got = read(tmp_path, (content + end).encode(encoding), {"encoding": encoding})
        assert values(got, "温度") == [1.0, 2.0, 3.0][: 3 if end else 2]
    with pytest.raises(DataError, match=r"ends in the middle of a line \(1 of 2 cells\)"):
        read(tmp_path, (content + "2024-01-03").encode(encoding), {"encoding": encoding})
    if "16" in encoding or "32" in encoding:
        with pytest.raises(DataError, match=f"is not {encoding}"):
            read(tmp_path, content.encode(encoding)[:-1], {"encoding": encoding})


def test_short_rows_can_be_left_out(tmp_path: Path) -> None:
    """Of several files too, where cells hold separators and line ends, and where the last column has no name."""
    (tmp_path / "a.csv").write_text('ds,x,y,\n2024-01-01,1,1\n2024-01-02,2,"1,5\n",\n2024-01-03,3\n2024-01-04,4,\n')
    (tmp_path / "b.csv").write_text('ds,x,y,\n"2024-01-05,","5"\n2024-01-06,6,6,\n')
    settings = {"name": "d", "source": {"kind": "csv", "path": str(tmp_path)}, "bad_rows": "drop", "bad_cells": "null"}
    got = read_dataset(validate(DataConfig, {**settings, "freq": "1d"}))
    assert values(got) == [1.0, 2.0, None, 4.0, None, 6.0]
    assert ("refused", 2, ("row 3: 2", "row 5: 2")) in {
        (item.kind, item.count, item.examples) for item in got.report.findings
    }


def test_several_files_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("x,ds\n3,2024-01-03\n")
    (tmp_path / "a.csv").write_text(GOOD)
    config = {"name": "d", "source": {"kind": "csv", "path": str(tmp_path)}}
    assert values(read_dataset(validate(DataConfig, config))) == [1.0, 2.0, 3.0]
    (tmp_path / "c.csv").write_text("ds,z\n2024-01-04,4\n")
    with pytest.raises(DataError, match=r"different columns \(in one of them only: x, z\)"):
        read_dataset(validate(DataConfig, config))


def test_bad_cells_and_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    content = HEADER + "2024-01-01,1\nnever,2\n2024-01-03,abc\n2024-01-04,inf\n,5\n2024-01-06,NaN\n2024-01-07,7\n"
    got = read(tmp_path, content, bad_cells="null", bad_rows="drop")
    assert values(got) == [1.0, None, None, None, None, None, 7.0]
    assert got.report.rows_in == 7
    assert got.report.rows_refused == 2
    assert got.report.rows_out == 2
    found = {(item.kind, item.count, item.examples) for item in got.report.findings}
    assert ("refused", 1, ("row 2: 'never'",)) in found
    assert ("refused", 1, ("row 5",)) in found
    assert ("replaced", 1, ("row 3: 'abc'",)) in found
    assert ("replaced", 1, ("row 4: 'inf'",)) in found


@pytest.mark.parametrize(("policy", "kept"), [("mean", 3.0), ("first", 2.0), ("last", 5.0)])
def test_duplicate_policies(tmp_path: Path, policy: str, kept: float) -> None:
    content = HEADER + "2024-01-02,2\n2024-01-01,1\n2024-01-02,2\n2024-01-02,5\n"
    got = read(tmp_path, content, duplicates=policy)
    assert values(got) == [1.0, kept]
    assert [(item.kind, item.count) for item in got.report.findings] == [("sorted", 1), ("merged", 2)]


def test_rows_in_any_order_are_sorted_and_that_is_recorded(tmp_path: Path) -> None:
    got = read(
        tmp_path, "s,ds,x\nb,2024-01-02,4\na,2024-01-02,2\nb,2024-01-01,3\na,2024-01-01,1\n", layout="long", series="s"
    )
    assert got.frame.table.select("series_id", "x").rows() == [("a", 1.0), ("a", 2.0), ("b", 3.0), ("b", 4.0)]
    assert [str(item) for item in got.report.findings] == [
        "sorted 2: rows whose time lies before the row above (row 3: 2024-01-01 00:00, row 4: 2024-01-01 00:00)"
    ]


def test_sentinels_become_null_also_in_four_byte_columns(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "ds": [date(2024, 1, day) for day in (1, 2, 3)],
            "x": pl.Series([1.0, -9999.9, 3.0], dtype=pl.Float32),
            "n": pl.Series([-1, 5, 255], dtype=pl.Int32),
        }
    )
    table.write_parquet(tmp_path / "data.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "data.parquet")}
    settings = {"name": "d", "source": source, "sentinels": {"x": [-9999.9], "*": [-1, 255, 0.5]}}
    got = read_dataset(validate(DataConfig, settings))
    assert values(got) == [1.0, None, 3.0]
    assert values(got, "n") == [None, 5.0, None]
    assert sum(item.count for item in got.report.findings if item.kind == "replaced") == 3


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [6.0, None, None, 4.0]),
        ("mean", [2.0, None, None, 4.0]),
        ("max", [3.0, None, None, 4.0]),
        ("first", [1.0, None, None, 4.0]),
        ("last", [3.0, None, None, 4.0]),
        ("median", [2.0, None, None, 4.0]),
    ],
)
def test_irregular_rows_are_resampled_on_request(tmp_path: Path, how: str, expected: list[float | None]) -> None:
    content = (
        HEADER + "2024-01-01 00:31,3\n2024-01-01 00:00,1\n2024-01-01 00:07,2\n2024-01-01 01:30,\n2024-01-01 03:02,4\n"
    )
    got = read(tmp_path, content, resample={"every": "1h", "columns": {"x": how}})
    assert values(got) == expected
    assert got.frame.schema.freq == "1h"
    assert got.frame.table["time"][0] == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cells", "settings", "expected"),
    [
        (["2024-01-01 00:00:00", "2024-01-01T01:00:00.000"], {}, [0, 3600]),
        (["2024-01-01T00:00Z", "2024-01-01 03:00:00+02:00"], {}, [0, 3600]),
        (["01/01/2024 00:00", "01/01/2024 01:00"], {"time_format": "%d/%m/%Y %H:%M"}, [0, 3600]),
        (["2024-01-01 00:00 +0100", "2024-01-01 01:00 +0100"], {"time_format": "%Y-%m-%d %H:%M %z"}, [-3600, 0]),
        (["1704067200", "1704070800"], {"time_format": "epoch:s"}, [0, 3600]),
        (["1704067200000", "1704070800000"], {"time_format": "epoch:ms"}, [0, 3600]),
        (["2024-01-01 00:00", "2024-01-01 01:00"], {"timezone": "Asia/Kolkata"}, [-19800, -16200]),
        (["2024-01-01 01:00", "2024-01-01 02:00"], {"time_shift": "-1h"}, [0, 3600]),
        (["2024-01", "2024-02"], {}, [0, 31 * 86400]),
        (["20240101", "20240102"], {"time_format": "%Y%m%d"}, [0, 86400]),
        # a day is a day: its midnight is not moved to another zone's
        (["2024-01-01", "2024-01-02"], {"timezone": "America/New_York"}, [0, 86400]),
    ],
)
def test_forms_of_time(tmp_path: Path, cells: list[str], settings: dict[str, Any], expected: list[int]) -> None:
    got = read(tmp_path, HEADER + "".join(f"{cell},1\n" for cell in cells), **settings)
    origin = datetime(2024, 1, 1, tzinfo=UTC)
    rows = got.frame.table.drop_nulls("x")["time"].to_list()
    assert [(time - origin).total_seconds() for time in rows] == expected


def test_integers_count_steps(tmp_path: Path) -> None:
    got = read(tmp_path, HEADER + "0,1\n1,2\n3,4\n")
    assert (times(got), values(got), got.frame.schema.freq) == ([0, 1, 2, 3], [1.0, 2.0, None, 4.0], "1i")


FALL = HEADER + "".join(f"2024-11-03 {hour:02d}:00,{at}\n" for at, hour in enumerate([0, 1, 1, 2]))
SPRING = HEADER + "".join(f"2024-03-10 {hour:02d}:00,{at}\n" for at, hour in enumerate([0, 1, 2, 4]))


def test_repeated_local_times_need_a_policy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 4 local times that occur twice.*row 2: 2024-11-03 01:00.*set ambiguous"):
        read(tmp_path, FALL, timezone="America/New_York")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # 2024-11-03 01:00 in New York is 05:00 UTC, then again 06:00 UTC
        ("infer", {4: 0.0, 5: 1.0, 6: 2.0, 7: 3.0}),
        ("earliest", {4: 0.0, 5: 1.5, 6: None, 7: 3.0}),
        ("latest", {4: 0.0, 5: None, 6: 1.5, 7: 3.0}),
        ("drop", {4: 0.0, 5: None, 6: None, 7: 3.0}),
    ],
)
def test_policies_for_repeated_local_times(tmp_path: Path, policy: str, expected: dict[int, float | None]) -> None:
    got = read(tmp_path, FALL, timezone="America/New_York", ambiguous=policy, duplicates="mean", freq="1h")
    assert dict(zip((time.hour for time in times(got)), values(got), strict=True)) == expected


def test_repeated_local_times_are_told_apart_within_each_series(tmp_path: Path) -> None:
    lines = [f"{name},2024-11-03 {hour:02d}:00,{at}\n" for at, hour in enumerate([0, 1, 1, 2]) for name in "ab"]
    got = read(
        tmp_path, "s,ds,x\n" + "".join(lines), layout="long", series="s", timezone="America/New_York", ambiguous="infer"
    )
    assert values(got) == [0.0, 1.0, 2.0, 3.0] * 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # 02:00 does not exist on 2024-03-10; on the clock before the change it is 07:00 UTC, and 04:00 EDT is 08:00 UTC
        ("shift", {5: 0.0, 6: 1.0, 7: 2.0, 8: 3.0}),
        ("drop", {5: 0.0, 6: 1.0, 7: None, 8: 3.0}),
    ],
)
def test_policies_for_local_times_that_do_not_exist(
    tmp_path: Path, policy: str, expected: dict[int, float | None]
) -> None:
    with pytest.raises(DataError, match=r"1 of 4 local times that do not exist in America/New_York.*set nonexistent"):
        read(tmp_path, SPRING, timezone="America/New_York")
    got = read(tmp_path, SPRING, timezone="America/New_York", nonexistent=policy)
    assert dict(zip((time.hour for time in times(got)), values(got), strict=True)) == expected


def test_a_year_of_local_hours_is_a_regular_grid_of_utc_hours(tmp_path: Path) -> None:
    utc = [datetime(2023, 1, 1, 5, tzinfo=UTC) + timedelta(hours=at) for at in range(8760)]
    from zoneinfo import ZoneInfo

    local = [moment.astimezone(ZoneInfo("America/New_York")).replace(tzinfo=None) for moment in utc]
    content = HEADER + "".join(f"{clock},{at}\n" for at, clock in enumerate(local))
    got = read(tmp_path, content, timezone="America/New_York", ambiguous="infer")
    assert times(got) == utc
    assert values(got) == [float(at) for at in range(8760)]


def test_wide_columns_become_series(tmp_path: Path) -> None:
    content = "ds,A.x,A.y,B.x,load\n2024-01-01,1,5,2,7\n2024-01-02,3,6,4,8\n"
    got = read(tmp_path, content, separator=".", targets=["x"], past=["y"], known=["load"])
    assert got.frame.table.rows() == [
        ("A", datetime(2024, 1, 1, tzinfo=UTC), 1.0, 5.0, 7.0),
        ("A", datetime(2024, 1, 2, tzinfo=UTC), 3.0, 6.0, 8.0),
        ("B", datetime(2024, 1, 1, tzinfo=UTC), 2.0, None, 7.0),
        ("B", datetime(2024, 1, 2, tzinfo=UTC), 4.0, None, 8.0),
    ]
    assert got.report.rows_in == 2


def test_wide_and_long_layouts_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(20, 2)).round(6)
    stamps = [datetime(2024, 1, 1) + timedelta(hours=at) for at in range(20)]
    wide = "ds,A.x,B.x\n" + "".join(f"{time},{a},{b}\n" for time, (a, b) in zip(stamps, data, strict=True))
    long = "s,ds,x\n" + "".join(
        f"{name},{time},{row[at]}\n" for time, row in zip(stamps, data, strict=True) for at, name in enumerate("AB")
    )
    first = read(tmp_path, wide, separator=".").frame
    second = read(tmp_path, long, layout="long", series="s").frame
    assert first.fingerprint() == second.fingerprint()


def test_columns_that_are_no_numbers_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    got = read(tmp_path, "ds,x,sky\n2024-01-01,1,clear\n2024-01-02,2,rain\n")
    assert got.frame.schema.targets == ("x",)
    assert "columns without numbers left out (sky)" in str(got.report.findings[0])


def test_an_empty_target_can_be_kept(tmp_path: Path) -> None:
    got = read(tmp_path, "ds,x,y\n2024-01-01,1,\n2024-01-02,2,\n", targets=["x", "y"], empty_targets="keep")
    assert values(got, "y") == [None, None]


def test_a_partitioned_parquet_folder_is_read_whole(tmp_path: Path) -> None:
    for year in (2023, 2024):
        folder = tmp_path / "data" / f"year={year}" / "site=7"
        folder.mkdir(parents=True)
        days = [date(year, 12, 30), date(year, 12, 31)] if year == 2023 else [date(2024, 1, 1), date(2024, 1, 2)]
        pl.DataFrame({"ds": days, "x": [float(year), year + 0.5]}).write_parquet(folder / "part.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "data")}
    settings = {"name": "d", "source": source, "layout": "long", "series": "site", "targets": ["x"], "known": ["year"]}
    got = read_dataset(validate(DataConfig, settings))
    assert got.frame.series_ids == ("7",)
    assert values(got) == [2023.0, 2023.5, 2024.0, 2024.5]
    assert values(got, "year") == [2023.0, 2023.0, 2024.0, 2024.0]


def test_a_damaged_parquet_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pl.DataFrame({"ds": [date(2024, 1, 1)] * 50, "x": [1.0] * 50}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        read_dataset(validate(DataConfig, {"name": "d", "source": {"kind": "parquet", "path": str(path)}}))
    assert "\n" not in str(caught.value)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A database with a table of readings; returns the address part of a source."""
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgres_url"))
        kind = "timestamptz"
    else:
        url, kind = f"sqlite:///{tmp_path / 'source.db'}", "text"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE readings (meter integer, ds {kind}, power numeric(9, 3))"))
        for meter in (1, 2):
            for hour in range(3):
                connection.execute(
                    text("INSERT INTO readings VALUES (:meter, :time, :power)"),
                    {"meter": meter, "time": f"2024-01-01 {hour:02d}:00:00+00:00", "power": meter + hour / 8},
                )
    engine.dispose()
    monkeypatch.setenv("METERS_URL", url)
    return {"kind": "sql", "url_env": "METERS_URL"}


@pytest.mark.parametrize("selection", [{"table": "readings"}, {"query": "SELECT * FROM readings WHERE meter < 100"}])
def test_a_table_and_a_query_are_read(database: dict[str, str], selection: dict[str, str]) -> None:
    settings = {
        "name": "d",
        "source": {**database, **selection},
        "layout": "long",
        "series": "meter",
        "targets": ["power"],
    }
    got = read_dataset(validate(DataConfig, settings))
    assert got.frame.series_ids == ("1", "2")
    assert values(got, "power") == [1.0, 1.125, 1.25, 2.0, 2.125, 2.25]
    assert got.frame.schema.freq == "1h"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"table": "redings"}, "has no table 'redings'; check source.table"),
        ({"query": "SELECT nonsense FROM readings"}, "the query failed"),
        ({"query": "SELECT power, power FROM readings"}, r"repeated column\(s\) power; give them aliases"),
        ({"query": "SELECT * FROM readings WHERE meter > 5"}, "and no rows"),
    ],
)
def test_an_unusable_query_is_one_message(database: dict[str, str], selection: dict[str, str], message: str) -> None:
    settings = {
        "name": "d",
        "source": {**database, **selection},
        "layout": "long",
        "series": "meter",
        "targets": ["power"],
    }
    with pytest.raises(TsforgeError, match=message) as caught:
        read_dataset(validate(DataConfig, settings))
    assert "\n" not in str(caught.value)


def test_a_source_database_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "source.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (ds text, x real)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [("2024-01-01", 1.0), ("2024-01-02", "2,5")])
    connection.close()
    before = path.read_bytes()
    source = {"kind": "sql", "path": str(path), "table": "t"}
    with pytest.raises(DataError, match="are no numbers.*row 2: '2,5'"):
        read_dataset(validate(DataConfig, {"name": "d", "source": source}))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["source.db"]
    with pytest.raises(BackendError, match=r"(?i)read-?only"):
        read_dataset(
            validate(DataConfig, {"name": "d", "source": {"kind": "sql", "path": str(path), "query": "DROP TABLE t"}})
        )


def test_addresses_keep_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"kind": "sql", "url_env": "NOWHERE_URL", "table": "t"}
    config = validate(DataConfig, {"name": "d", "source": source})
    monkeypatch.delenv("NOWHERE_URL", raising=False)
    with pytest.raises(ConfigError, match="environment variable NOWHERE_URL is not set"):
        read_dataset(config)
    monkeypatch.setenv("NOWHERE_URL", "postgresql+psycopg://me:hunter2@127.0.0.1:1/db?connect_timeout=2")
    with pytest.raises(BackendError, match="does not answer") as caught:
        read_dataset(config)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in config.model_dump_json()


def test_pandas_goes_out_and_comes_in(tmp_path: Path) -> None:
    import pandas as pd

    frame = read(tmp_path, HEADER + "2024-01-01,1\n2024-01-02,\n2024-01-03,3\n").frame
    table = to_pandas(frame)
    assert list(table.columns) == ["series_id", "time", "x"]
    assert str(table["time"].dtype) == "datetime64[us, UTC]"
    assert table["x"].isna().tolist() == [False, True, False]
    assert from_pandas(table).equals(frame.table)
    assert from_pandas(table.set_index("time")).columns == ["time", "series_id", "x"]
    with pytest.raises(DataError, match="column names must be strings"):
        from_pandas(pd.DataFrame({0: [1.0]}))
