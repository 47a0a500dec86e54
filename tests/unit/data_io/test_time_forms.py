"""Times that could be read as others: two-digit years, epochs of another unit, fractions, clocks that go back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from test_reading_sources import HEADER, read, times, values

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig

YORK = "America/New_York"
START = 1_704_067_200  # 2024-01-01


def of(tmp_path: Path, cells: list[Any], **settings: Any) -> Dataset:
    return read(tmp_path, HEADER + "".join(f"{cell},{at}\n" for at, cell in enumerate(cells)), **settings)


def held(tmp_path: Path, cells: pl.Series, **settings: Any) -> Dataset:
    pl.DataFrame([cells.alias("ds")]).with_row_index("x").write_parquet(tmp_path / "data.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "data.parquet")}
    return read_dataset(validate(DataConfig, {"name": "d", "source": source} | settings))


# --- years


@pytest.mark.parametrize(
    "cell", ["01/01/24", "24/01/01", "1-1-24", "01-01-24 10:00", "24-01-01T10:00:00Z", "224-01-01"]
)
def test_years_of_fewer_than_four_digits_are_no_iso_dates(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError, match=r"2 of 2 unreadable times in column 'ds' .*set time_format, for example"):
        of(tmp_path, [cell, cell.replace("24", "25")])
    with pytest.raises(DataError, match=rf"1 of 3 unreadable times in column 'ds' \(row 2: '{cell}'\)"):
        of(tmp_path, ["2024-01-01", cell, "2024-01-02"])


@pytest.mark.parametrize(
    ("form", "short", "long"),
    [
        ("%d.%m.%Y", "02.01.24", "02.01.2024"),
        ("%d%m%Y", "020124", "02012024"),
        ("%Y/%m/%d %H:%M", "24/01/02 00:00", "2024/01/02 00:00"),
        ("%F", "24-01-02", "2024-01-02"),
        ("%+", "24-01-02T00:00:00+00:00", "2024-01-02T00:00:00+00:00"),
        ("%d.%m.%Y", "02.01.924", "02.01.2024"),
    ],
)
def test_a_four_digit_year_needs_four_digits(tmp_path: Path, form: str, short: str, long: str) -> None:
    first = long.replace("02", "01", 1) if form[1] == "d" else long.replace("-02", "-01").replace("/02", "/01")
    assert times(of(tmp_path, [first, long], time_format=form))[1] == datetime(2024, 1, 2, tzinfo=UTC)
    with pytest.raises(DataError, match=r"2 of 2 times with a year of fewer than four digits .*write %y"):
        of(tmp_path, [short, short], time_format=form)
    with pytest.raises(DataError, match=rf"1 of 2 times .*\(row 2: '{short.replace('+', '.')}'\); .*%y.*bad_rows=drop"):
        of(tmp_path, [first, short], time_format=form)
    got = of(tmp_path, [first, short, long], time_format=form, bad_rows="drop")
    assert values(got) == [0.0, 2.0]
    assert [item.count for item in got.report.findings if item.kind == "refused"] == [1]


def test_early_years_and_two_digit_formats_are_read(tmp_path: Path) -> None:
    assert times(of(tmp_path, ["0024-01-01", "0024-01-02"]))[0].year == 24
    assert times(of(tmp_path, ["01.01.0024", "02.01.0024"], time_format="%d.%m.%Y"))[0].year == 24
    assert times(of(tmp_path, ["01.01.24", "02.01.24"], time_format="%d.%m.%y"))[0].year == 2024
    assert times(of(tmp_path, [f"{START}", f"{START + 60}"], time_format="%s"))[0].year == 2024


# --- epochs


@pytest.mark.parametrize(
    ("unit", "name", "advice"),
    [
        (10**3, "milli", "set time_format=epoch:ms"),
        (10**6, "micro", "set time_format=epoch:us"),
        (10**9, "nano", "divide them by 1000 and set time_format=epoch:us"),
    ],
)
def test_epochs_of_any_unit_are_no_steps(tmp_path: Path, unit: int, name: str, advice: str) -> None:
    cells = [(START + 3600 * hour) * unit for hour in range(4)]
    with pytest.raises(DataError, match=rf"look like {name}seconds since 1970; {advice}, or freq=1i if they count"):
        of(tmp_path, cells)
    assert of(tmp_path, cells, freq=f"{3600 * unit}i").frame.num_rows == 4


@pytest.mark.parametrize("kind", ["text", "integers", "floats"])
def test_an_epoch_beyond_64_bits_is_unreadable(tmp_path: Path, kind: str) -> None:
    """The product would wrap around to some other year."""
    hours = [1000 * (START + 3600 * hour) for hour in range(3)]
    cells = [*hours, (START + 9 * 3600) * 10**9, -(2**63), 2**63 - 1]
    settings = {"time_format": "epoch:ms"}

    def got(cells: list[int], **more: Any) -> Dataset:
        if kind == "text":
            return of(tmp_path, cells, **settings, **more)
        return held(
            tmp_path, pl.Series(cells, dtype=pl.Int64 if kind == "integers" else pl.Float64), **settings, **more
        )

    with pytest.raises(DataError, match=r"3 of 6 unreadable times in column 'ds' \(row 4: .*bad_rows=drop"):
        got(cells)
    assert times(got(cells, bad_rows="drop"))[2] == datetime(2024, 1, 1, 2, tzinfo=UTC)
    with pytest.raises(DataError, match="time_format=epoch:ms fits none of them"):
        got([cell * 10**6 for cell in hours])


@pytest.mark.parametrize(
    "cells",
    [
        pl.Series([START, START + 60, float("nan"), START + 180], dtype=pl.Float64),
        pl.Series([START, START + 60, float("inf"), START + 180], dtype=pl.Float64),
        pl.Series([START, START + 60, 1e19, START + 180], dtype=pl.Float64),
        pl.Series([START, START + 60, 2**63, START + 180], dtype=pl.UInt64),
        pl.Series([START, START + 60, 2**80, START + 180], dtype=pl.Int128),
    ],
)
@pytest.mark.parametrize("settings", [{"time_format": "epoch:s"}, {"freq": "1i"}], ids=["epochs", "steps"])
def test_numbers_that_are_no_times_follow_the_policy(
    tmp_path: Path, cells: pl.Series, settings: dict[str, str]
) -> None:
    with pytest.raises(DataError, match=r"1 of 4 unreadable times in column 'ds' \(row 3: .*bad_rows=drop"):
        held(tmp_path, cells, **settings)
    got = held(tmp_path, cells, bad_rows="drop", **settings)
    assert [value for value in values(got) if value is not None] == [0.0, 1.0, 3.0]
    with pytest.raises(DataError, match="look like seconds since 1970"):
        held(tmp_path, cells, bad_rows="drop")


@pytest.mark.parametrize("kind", [pl.Float64, pl.Decimal(12, 2)])
def test_fractions_among_numbers_are_named(tmp_path: Path, kind: Any) -> None:
    cells = pl.Series([1.0, 2.0, 3.5, 4.25]).cast(kind)
    with pytest.raises(DataError, match=r"holds fractions \(first: 3\.50?\)"):
        held(tmp_path, cells)


@pytest.mark.parametrize(
    ("cells", "step"),
    [
        ([-(2**63), 2**63 - 1], 1),
        ([-(2**63), 5, 2**63 - 1], 1),
        ([-(2**63), 2**63 - 6], 2),
        ([-(2**63), 0], 1),
        ([-5, 2**63 - 8], 5),
        ([0, 2**63 - 1], 1),
    ],
)
def test_gaps_of_any_length_are_refused(tmp_path: Path, cells: list[int], step: int) -> None:
    rows = (cells[-1] - cells[0]) // step + 1
    widest = max(after - before for before, after in pairwise(cells)) // step
    told = f"would take {rows} rows for {len(cells)} given ones; the widest gap has {widest} steps of {step}i"
    with pytest.raises(DataError, match=told):
        of(tmp_path, cells, freq=f"{step}i")


# --- nanoseconds


@pytest.mark.parametrize("zone", [None, "UTC", YORK])
def test_fractions_below_a_microsecond_are_refused(tmp_path: Path, zone: str | None) -> None:
    base = START * 10**9
    cells = pl.Series([base, base + 1_000, base + 2_500, base + 3_000]).cast(pl.Datetime("ns", zone))
    with pytest.raises(DataError, match=r"1 of 4 .* a fraction below one microsecond.*row 3: .*2500.*bad_rows=drop"):
        held(tmp_path, cells)
    got = held(tmp_path, cells, bad_rows="drop")
    assert values(got) == [0.0, 1.0, None, 3.0]
    with pytest.raises(DataError, match=r"2 of 2 .* a fraction below one microsecond"):
        held(tmp_path, pl.Series([base + 1_500, base + 2_500]).cast(pl.Datetime("ns", zone)), bad_rows="drop")
    assert held(tmp_path, cells.filter(pl.Series([True, True, False, True]))).frame.schema.freq == "1us"


# --- clocks that go back


def autumn(minutes: int, hours: int = 6) -> list[datetime]:
    """Return instants around 2024-11-03 01:00 EDT, which comes twice in New York."""
    first = datetime(2024, 11, 3, 3, tzinfo=UTC)
    return [first + timedelta(minutes=at) for at in range(0, 60 * hours, minutes)]


def on_clock(instants: list[datetime]) -> list[datetime]:
    return [at.astimezone(ZoneInfo(YORK)).replace(tzinfo=None) for at in instants]


def inferred(tmp_path: Path, instants: list[datetime], **settings: Any) -> list[tuple[datetime, float]]:
    """Return times and values of instants that a file tells by the local clock; the value is the position."""
    table = of(tmp_path, on_clock(instants), timezone=YORK, ambiguous="infer", **settings).frame.table
    return [(time, value) for _, time, value in table.drop_nulls().rows()]


@pytest.mark.parametrize("minutes", [60, 30, 15, 1])
def test_repeated_hours_are_told_apart_in_either_direction(tmp_path: Path, minutes: int) -> None:
    instants = autumn(minutes)
    assert inferred(tmp_path, instants) == [(time, float(at)) for at, time in enumerate(instants)]
    newest = list(reversed(instants))
    assert inferred(tmp_path, newest) == sorted((time, float(at)) for at, time in enumerate(newest))


@pytest.mark.parametrize("step", [1, -1])
def test_repeated_hours_with_gaps(tmp_path: Path, step: int) -> None:
    """Of the first pass, the second one or both; what cannot be seen is taken for the first."""
    instants = autumn(15)
    for lost in ([9], [10], [9, 10], [12, 13], [8, 11, 14], [12, 13, 14, 15]):
        kept = [time for at, time in enumerate(instants) if at not in lost][::step]
        assert inferred(tmp_path, kept, freq="15m") == sorted((time, float(at)) for at, time in enumerate(kept)), lost


def test_rows_sorted_by_the_local_clock_take_turns(tmp_path: Path) -> None:
    for back in (False, True):
        clocks = sorted(on_clock(autumn(30)), reverse=back)
        got = of(tmp_path, clocks, timezone=YORK, ambiguous="infer").frame.table
        assert got["time"].to_list() == autumn(30)
        assert got["x"].to_list()[2 * 2 : 2 * 4] == ([7.0, 5.0, 6.0, 4.0] if back else [4.0, 6.0, 5.0, 7.0])


def test_every_series_has_its_own_direction(tmp_path: Path) -> None:
    instants = autumn(30)
    lines = [
        f"{name},{clock},{at}\n"
        for up, down in zip(enumerate(on_clock(instants)), reversed(list(enumerate(on_clock(instants)))), strict=True)
        for name, (at, clock) in (("a", up), ("b", down))
    ]
    settings = {"layout": "long", "series": "s", "timezone": YORK, "ambiguous": "infer"}
    got = read(tmp_path, "s,ds,x\n" + "".join(lines), **settings).frame.table
    assert got["time"].to_list() == instants * 2
    assert got["x"].to_list() == [float(at) for at in range(12)] * 2


def test_two_rows_alone_follow_the_rest_of_their_series(tmp_path: Path) -> None:
    clocks = [f"2024-11-0{day} 01:00" for day in (1, 2, 3, 3)]
    for step in (1, -1):
        got = of(tmp_path, clocks[::step], timezone=YORK, ambiguous="infer", freq="1h").frame.table.drop_nulls("x")
        assert got["x"].to_list() == [0.0, 1.0, 2.0, 3.0][::step]
    alone = of(tmp_path, clocks[2:], timezone=YORK, ambiguous="infer", freq="1h").frame.table
    assert alone["x"].to_list() == [0.0, 1.0]


def test_several_autumns_each_have_their_hour(tmp_path: Path) -> None:
    hour = timedelta(hours=1)
    instants = [datetime(2022, 1, 1, tzinfo=UTC) + hour * at for at in range(3 * 8766)]
    for order in (instants, instants[::-1]):
        assert [time for time, _ in inferred(tmp_path, order)] == instants


def test_repeats_in_no_order_are_refused(tmp_path: Path) -> None:
    instants = autumn(60)
    mixed = [instants[at] for at in (0, 3, 1, 5, 2, 4)]
    with pytest.raises(
        DataError, match=r"2 of 6 local times .* occur twice .*1 series.* in no order of time .*row 2: 2024-11-03 01:00"
    ) as caught:
        inferred(tmp_path, mixed)
    assert "set ambiguous to earliest, latest or drop" in str(caught.value)
    appended = [*instants, instants[2], instants[3]]  # corrections at the end
    with pytest.raises(DataError, match="4 of 8 local times"):
        inferred(tmp_path, appended, duplicates="last")
    elsewhere = [*instants, instants[0], instants[5]]  # mixed, but not beside the repeats
    with pytest.raises(DataError, match="2 of 8 rows repeat the time"):
        inferred(tmp_path, elsewhere)
    assert [value for _, value in inferred(tmp_path, elsewhere, duplicates="first")] == [0, 1, 2, 3, 4, 5]


def test_publications_of_a_repeated_hour_are_told_apart_within_each(tmp_path: Path) -> None:
    """Every issue holds the repeated hour; in the order of time every row stands beside that of the other issue."""
    instants = autumn(30)
    rows = [
        (clock, f"2024-11-0{day}T12:00:00Z", 100 * day + at)
        for day in (4, 5)
        for at, clock in enumerate(on_clock(instants))
    ]
    settings = {"timezone": YORK, "ambiguous": "infer", "published": "out", "targets": ["x"]}
    for order in (rows, [row for pair in zip(rows[:12], rows[12:], strict=True) for row in pair], rows[::-1]):
        content = "ds,out,x\n" + "".join(f"{clock},{out},{value}\n" for clock, out, value in order)
        vintages = read(tmp_path, content, **settings).vintages
        assert vintages is not None
        got = vintages.table.sort("published", "time")
        assert got["time"].to_list() == instants * 2
        assert got["x"].to_list() == [float(100 * day + at) for day in (4, 5) for at in range(12)]


def test_publication_times_that_occur_twice_are_refused_where_rows_share_them(tmp_path: Path) -> None:
    content = "ds,out,x\n" + "".join(f"2024-11-0{day},2024-11-03 01:00,1\n" for day in range(1, 7))
    settings = {"timezone": YORK, "ambiguous": "infer", "published": "out", "targets": ["x"]}
    with pytest.raises(DataError, match="6 of 6 local times that occur twice .*in no order of time"):
        read(tmp_path, content, **settings)
