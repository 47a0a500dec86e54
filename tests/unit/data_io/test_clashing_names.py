"""Columns whose names clash are refused in one message that names them; static columns are not averaged."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig
from tsforge.data.frame import SeriesFrame


def read(tmp_path: Path, content: str, **settings: Any) -> Dataset:
    path = tmp_path / "data.csv"
    path.write_text(content)
    source = {"kind": "csv", "path": str(path)}
    return read_dataset(validate(DataConfig, {"name": "d", "source": source, **settings}))


TWO = ("2024-01-01", "2024-01-02")


@pytest.mark.parametrize("name", ["time", "series_id"])
@pytest.mark.parametrize(
    ("header", "settings"),
    [
        ("ds,x,{}", {}),
        ("ds,x,{}", {"targets": ["x"], "known": ["{}"]}),
        ("ds,A.x,A.{}", {"separator": "."}),
        ("ds,A.x,{}", {"separator": "."}),
        ("ds,s,{}", {"layout": "long", "series": "s"}),
        ("ds,s,{}", {"layout": "long", "series": "s", "targets": ["{}"]}),
    ],
)
def test_a_value_column_with_a_reserved_name(tmp_path: Path, name: str, header: str, settings: dict[str, Any]) -> None:
    given = {
        key: [one.format(name) for one in value] if isinstance(value, list) else value
        for key, value in settings.items()
    }
    content = header.format(name) + "".join(f"\n{day},1,{at}" for at, day in enumerate(TWO)) + "\n"
    with pytest.raises(DataError, match=rf"dataset 'd': column name '{name}' is reserved.*rename.*query or file"):
        read(tmp_path, content, **given)


@pytest.mark.parametrize("name", ["time", "series_id"])
def test_a_key_may_have_its_own_name(tmp_path: Path, name: str) -> None:
    rows = "".join(f"\n{day},1,2" for day in TWO) + "\n"
    settings = {"time": "time", "layout": "long", "series": "series_id"}
    assert read(tmp_path, "time,series_id,x" + rows, **settings).frame.num_rows == 2
    assert read(tmp_path, f"ds,x,{name}" + rows, targets=["x"]).frame.schema.targets == ("x",)


def test_reserved_names_in_tables_of_python() -> None:
    table = pl.DataFrame({"ds": [datetime(2024, 1, 1), datetime(2024, 1, 2)], "time": [1.0, 2.0], "id": ["a", "a"]})
    with pytest.raises(DataError, match="column name 'time' is reserved"):
        SeriesFrame.from_wide(table.drop("id"), time="ds")
    with pytest.raises(DataError, match="column name 'time' is reserved"):
        SeriesFrame.from_long(table, time="ds", series_id="id", targets=["time"])


@pytest.mark.parametrize(
    ("header", "settings", "shared", "own"),
    [
        ("ds,load,north.temp,south.temp,north.load", {}, "load", "north.load"),
        ("ds,north.load,load,south.load,south.temp", {}, "load", "north.load, south.load"),
        ("ds,c,x.c,x.d,x.e", {}, "c", "x.c"),
        ("ds,c,x.c,x.d,x.e", {"targets": ["d"], "known": ["c"]}, "c", "x.c"),
    ],
)
def test_a_shared_column_that_a_series_has_itself(
    tmp_path: Path, header: str, settings: dict[str, Any], shared: str, own: str
) -> None:
    rows = "".join(f"\n{day},1,2,3,4" for day in TWO) + "\n"
    with pytest.raises(DataError, match=rf"column '{shared}' belongs to every series.*own: {own}; rename"):
        read(tmp_path, header + rows, separator=".", **settings)


def test_a_clash_of_columns_without_a_role_harms_nothing(tmp_path: Path) -> None:
    rows = "".join(f"\n{day},1,2,3" for day in TWO) + "\n"
    assert read(tmp_path, "ds,c,x.c,x.d" + rows, separator=".", targets=["d"]).frame.schema.columns == ("d",)


STATIC = {"layout": "long", "series": "s", "targets": ["x"], "static": ["area"]}
HEADER = "s,ds,x,area\n"


@pytest.mark.parametrize("settings", [{"resample": {"every": "1d"}}, {"duplicates": "mean"}])
def test_static_columns_are_not_averaged(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The mean of three times 0.1 is 0.10000000000000002."""
    stamps = ["2024-01-01 00:00"] * 4 + ["2024-01-02 00:00"]
    if "resample" in settings:
        stamps = [f"2024-01-01 0{hour}:00" for hour in range(4)] + ["2024-01-02 00:00"]
    content = HEADER + "".join(f"a,{stamp},{at},{'' if at == 0 else 0.1}\n" for at, stamp in enumerate(stamps))
    got = read(tmp_path, content, freq="1d", **STATIC, **settings)
    assert got.frame.static is not None
    assert got.frame.static["area"].to_list() == [0.1]
    assert got.frame.table["x"].to_list() == [1.5, 4.0]


@pytest.mark.parametrize("how", ["mean", "sum", "last"])
@pytest.mark.parametrize("policy", ["resample", "duplicates"])
def test_static_columns_that_change_are_refused_before_rows_are_merged(tmp_path: Path, policy: str, how: str) -> None:
    stamps = ("00:00", "00:00") if policy == "duplicates" else ("00:00", "01:00")
    content = HEADER + "".join(f"a,{day} {stamp},1,{at}\n" for day in TWO for at, stamp in enumerate(stamps))
    settings: dict[str, Any] = {"duplicates": "mean"}
    if policy == "resample":
        settings = {"resample": {"every": "1d", "columns": {"area": how}}}
    with pytest.raises(DataError, match=r"static column 'area' changes within 1 of 1 series \(a\)"):
        read(tmp_path, content, freq="1d", **STATIC, **settings)


def test_a_policy_may_choose_the_row_with_the_right_static_value(tmp_path: Path) -> None:
    content = HEADER + "a,2024-01-01,1,7\na,2024-01-01,2,8\na,2024-01-02,3,8\n"
    got = read(tmp_path, content, duplicates="last", **STATIC)
    assert got.frame.static is not None
    assert got.frame.static["area"].to_list() == [8.0]


def test_rows_of_the_source_are_told_where_missing_values_erase(tmp_path: Path) -> None:
    content = "ds,x\n2024-01-01 00:00,1\n2024-01-01 03:00,\n2024-01-01 05:00,6\n"
    got = read(tmp_path, content, freq="1h", nulls="erase")
    assert got.frame.num_rows == 6
    assert got.present is not None
    assert got.present.columns == ["series_id", "time"]
    assert got.present["time"].dt.hour().to_list() == [0, 3, 5]
    assert got.present.schema == got.frame.table.select("series_id", "time").schema
    assert read(tmp_path, content, freq="1h").present is None
    cut = read(tmp_path, "ds,A.x,B.x\n2024-01-01,,1\n2024-01-02,2,\n", separator=".", freq="1d", nulls="erase")
    assert cut.frame.num_rows == 2
    assert cut.present is not None
    assert [(name, time.day) for name, time in cut.present.rows()] == [("A", 1), ("A", 2), ("B", 1), ("B", 2)]
    long = "s,t,x\n7,0,1\n7,3,2\n8,1,1\n"
    whole = read(tmp_path, long, layout="long", series="s", time="t", freq="1i", nulls="erase")
    assert whole.present is not None
    assert whole.present.rows() == [("7", 0), ("7", 3), ("8", 1)]
