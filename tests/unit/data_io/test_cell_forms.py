"""Numbers and folders that look like others: marks of thousands, codes, keys with zeros, packed files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_reading_sources import HEADER, read, values

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig

COMMA = {"separator": ";", "decimal": ","}


def parquet(path: Path, **settings: Any) -> Dataset:
    source = {"kind": "parquet", "path": str(path)}
    return read_dataset(validate(DataConfig, {"name": "d", "source": source} | settings))


def test_a_point_beside_decimal_commas_is_no_decimal_mark(tmp_path: Path) -> None:
    content = "ds;x\n2024-01-01;1,5\n2024-01-02;1.234\n2024-01-03;1.234,5\n2024-01-04;-2e1\n"
    with pytest.raises(DataError, match=r"2 cells in 1 column.* are no numbers .*row 2: '1.234', row 3: '1.234,5'"):
        read(tmp_path, content, COMMA)
    assert values(read(tmp_path, content, COMMA, bad_cells="null")) == [1.5, None, None, -20.0]
    with pytest.raises(DataError, match=r"no cell is a number \(row 1: '1.5'.*decimal mark is ','"):
        read(tmp_path, "ds;x\n2024-01-01;1.5\n2024-01-02;2.5\n", COMMA, targets=["x"])
    both = "ds;x;y\n2024-01-01;1,5;1.5\n2024-01-02;2,5;2.5\n2024-01-03;3,5;\n"
    with pytest.raises(DataError, match=r"column 'y' holds numbers with a point \(row 1: '1.5'.* name data.targets"):
        read(tmp_path, both, COMMA)
    assert values(read(tmp_path, both, COMMA, targets=["x"])) == [1.5, 2.5, 3.5]
    with pytest.raises(DataError, match=r"1 cells in 1 column.* are no numbers .*row 1: '1,234'"):
        read(tmp_path, "ds;x\n2024-01-01;1,234\n2024-01-02;2.5\n", {"separator": ";"})


@pytest.mark.parametrize("kind", [pl.Int64, pl.Int32, pl.UInt16, pl.Decimal(10, 1)])
def test_codes_that_an_integer_column_does_not_hold_are_none_of_its_codes(tmp_path: Path, kind: Any) -> None:
    cells = [0, 5, 1, 999]
    days = [date(2024, 1, day) for day in range(1, 5)]
    table = pl.DataFrame({"ds": days, "x": pl.Series(cells).cast(kind)})
    table.write_parquet(tmp_path / "data.parquet")
    codes = [-999.9, 999.25, 0.55, 1e300, 5]
    got = parquet(tmp_path / "data.parquet", sentinels={"*": codes})
    assert values(got) == [0.0, None, 1.0, 999.0]
    assert [item.count for item in got.report.findings if item.kind == "replaced"] == [1]


def parts(root: Path, *names: str) -> Path:
    for at, name in enumerate(names):
        (root / name).mkdir(parents=True)
        days = [date(2024, 1, 1), date(2024, 1, 2)]
        pl.DataFrame({"ds": days, "x": [float(at), at + 0.5]}).write_parquet(root / name / "part.parquet")
    return root


def test_keys_of_folders_are_text(tmp_path: Path) -> None:
    for names, ids in ((("07", "7"), ("07", "7")), (("7", "a%3D1"), ("7", "a=1"))):
        place = parts(tmp_path / ids[1], *(f"site={name}" for name in names))
        got = parquet(place, layout="long", series="site", targets=["x"]).frame
        assert got.series_ids == ids
        assert got.table["x"].to_list() == [0.0, 0.5, 1.0, 1.5]


def test_keys_of_folders_are_numbers_and_times_where_asked_for(tmp_path: Path) -> None:
    for at, day in enumerate(("2024-01-01", "2024-01-02")):
        place = tmp_path / "data" / f"day={day}" / f"level=0{at}.5"
        place.mkdir(parents=True)
        pl.DataFrame({"x": [at]}).write_parquet(place / "part.parquet")
    got = parquet(tmp_path / "data", time="day").frame
    assert got.schema.freq == "1d"
    assert got.table["level"].to_list() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("site=a=1", "site=b"),
            "folder 'site=a=1' has more than one '='; write %3D for one that belongs to the value",
        ),
        (("site=b", "site=c=1"), "folder 'site=c=1' has more than one '='"),
        (("plain", "site=2"), r"lie under different keys \(none; site\)"),
        (("site=1", "site=2/year=3"), r"lie under different keys \(site; site, year\)"),
    ],
)
def test_folders_of_several_kinds_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parquet(parts(tmp_path / "data", *names), targets=["x"])


def zipped(content: bytes) -> bytes:
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("data.csv", content)
    return place.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (gzip.compress, "gzip"),
        (zipped, r"zip \(so are Excel workbooks\)"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, "zstd"),
        (lzma.compress, "xz"),
        (bz2.compress, "bzip2"),
    ],
)
def test_a_packed_file_is_named_for_what_it_is(tmp_path: Path, pack: Any, name: str, encoding: str) -> None:
    content = pack((HEADER + "2024-01-01,1\n2024-01-02,2\n").encode())
    with pytest.raises(DataError, match=rf"data.csv is compressed with {name}; unpack it first"):
        read(tmp_path, content, {"encoding": encoding})
    assert values(read(tmp_path, "BZh1,ds,x\n1,2024-01-01,1\n2,2024-01-02,2\n", targets=["x"])) == [1.0, 2.0]
