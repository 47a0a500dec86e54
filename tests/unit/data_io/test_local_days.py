"""Days of a local clock: what ``resample`` cuts, and which time stamps stand for dates."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.cleaning import Dataset, read_dataset
from tsforge.data.config import DataConfig
from tsforge.data.report import data_report
from tsforge.data.store import SeriesStore

BERLIN = "Europe/Berlin"
YEAR = [date(2022, 1, 1) + timedelta(days=day) for day in range(365)]


def read(tmp_path: Path, stamps: list[Any], values: list[float], **settings: Any) -> Dataset:
    path = tmp_path / "data.csv"
    path.write_text("ds,x\n" + "".join(f"{at},{value}\n" for at, value in zip(stamps, values, strict=True)))
    source = settings.pop("source", {"kind": "csv", "path": str(path)})
    return read_dataset(validate(DataConfig, {"name": "d", "source": source} | settings))


def by_date(dataset: Dataset) -> dict[date, float | None]:
    """Return the values by the dates they are stored under; every time must be a midnight in UTC."""
    table = dataset.frame.table
    assert (table["time"].dt.time() == datetime.min.time()).all()
    return dict(zip(table["time"].dt.date().to_list(), table["x"].to_list(), strict=True))


def hours(zone: str, first: date, days: int) -> list[datetime]:
    """Return every hour of some local days, as instants."""
    clock = ZoneInfo(zone)
    at = datetime(first.year, first.month, first.day, tzinfo=clock).astimezone(UTC)
    last = first + timedelta(days=days)
    end = datetime(last.year, last.month, last.day, tzinfo=clock).astimezone(UTC)
    return [at + timedelta(hours=hour) for hour in range(int((end - at) / timedelta(hours=1)))]


def local(instants: list[datetime], zone: str) -> list[datetime]:
    return [at.astimezone(ZoneInfo(zone)).replace(tzinfo=None) for at in instants]


DAILY = {"every": "1d", "default": "sum"}


@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Asia/Kolkata", "Pacific/Apia", "Australia/Lord_Howe"])
def test_hours_become_the_local_days_they_lie_in(tmp_path: Path, zone: str) -> None:
    """An hour counts by the local date of its instant; days of 23 and 25 hours are one row each."""
    instants = hours(zone, date(2022, 1, 1), 365)
    stamps = local(instants, zone)
    got = read(
        tmp_path, stamps, [1.0] * len(stamps), timezone=zone, resample=DAILY, ambiguous="infer", duplicates="first"
    )
    expected: dict[date, float] = {}
    for at in dict.fromkeys(instants):
        day = at.astimezone(ZoneInfo(zone)).date()
        expected[day] = expected.get(day, 0.0) + 1.0
    assert by_date(got) == expected
    assert list(expected) == YEAR
    if zone == BERLIN:
        assert (expected[date(2022, 3, 27)], expected[date(2022, 10, 30)]) == (23.0, 25.0)


def test_working_days_stay_on_their_weekdays(tmp_path: Path) -> None:
    """The Monday of a shop is stored as Monday, and its Sunday holds nothing."""
    instants = [at for at in hours(BERLIN, date(2022, 1, 3), 42) if at.astimezone(ZoneInfo(BERLIN)).weekday() < 6]
    got = read(tmp_path, local(instants, BERLIN), [100.0] * len(instants), timezone=BERLIN, resample=DAILY, freq="1d")
    found = {day.weekday(): value for day, value in by_date(got).items() if day < date(2022, 1, 10)}
    assert found == {0: 2400.0, 1: 2400.0, 2: 2400.0, 3: 2400.0, 4: 2400.0, 5: 2400.0, 6: None}
    frame = add_calendar(got.frame, CalendarConfig(features=("weekend",), timezone=BERLIN)).table
    assert frame.filter(pl.col("x").is_null())["calendar.weekend"].unique().to_list() == [1.0]
    report = data_report(got.frame).row(0, named=True)
    assert (report["rows"], report["start"].date(), report["end"].date()) == (41, date(2022, 1, 3), date(2022, 2, 12))


@pytest.mark.parametrize(
    ("every", "label"),
    [
        ("1w", lambda day: day - timedelta(days=day.weekday())),
        ("1mo", lambda day: day.replace(day=1)),
        ("1q", lambda day: day.replace(month=1 + (day.month - 1) // 3 * 3, day=1)),
        ("1y", lambda day: day.replace(month=1, day=1)),
        ("2d", lambda day: day - timedelta(days=(day - date(1970, 1, 1)).days % 2)),
        ("48h", lambda day: day - timedelta(days=(day - date(1970, 1, 1)).days % 2)),
    ],
)
@pytest.mark.parametrize("zone", [BERLIN, "America/New_York"])
def test_longer_steps_start_on_the_local_date(
    tmp_path: Path, every: str, label: Callable[[date], date], zone: str
) -> None:
    instants = hours(zone, date(2020, 1, 1), 3 * 366)
    stamps = local(instants, zone)
    values = [1.0] * len(stamps)
    given = {"timezone": zone, "ambiguous": "infer", "resample": {"every": every, "default": "sum"}}
    expected: dict[date, float] = {}
    for at in stamps:
        expected[label(at.date())] = expected.get(label(at.date()), 0.0) + 1.0
    assert by_date(read(tmp_path, stamps, values, **given)) == expected


def test_times_with_an_offset_and_epochs_become_days_of_the_stated_zone(tmp_path: Path) -> None:
    instants = hours(BERLIN, date(2022, 3, 25), 4)
    counts = {date(2022, 3, 25): 24.0, date(2022, 3, 26): 24.0, date(2022, 3, 27): 23.0, date(2022, 3, 28): 24.0}
    ones = [1.0] * len(instants)
    texts = [at.isoformat() for at in instants]
    assert by_date(read(tmp_path, texts, ones, timezone=BERLIN, resample=DAILY)) == counts
    seconds = [int(at.timestamp()) for at in instants]
    given = {"timezone": BERLIN, "resample": DAILY, "time_format": "epoch:s"}
    assert by_date(read(tmp_path, seconds, ones, **given)) == counts
    with pytest.raises(DataError, match="carries its own zone, so timezone=Europe/Berlin has no effect"):
        read(tmp_path, texts, ones, timezone=BERLIN, resample={"every": "3h"})


def test_without_a_zone_days_are_those_of_utc(tmp_path: Path) -> None:
    instants = hours("UTC", date(2022, 3, 25), 4)
    got = read(tmp_path, [at.replace(tzinfo=None) for at in instants], [1.0] * len(instants), resample=DAILY)
    assert set(by_date(got).values()) == {24.0}


def test_steps_below_a_day_are_cut_on_the_utc_clock(tmp_path: Path) -> None:
    """India is half an hour off: its full hours lie between the rows."""
    stamps = [datetime(2022, 1, 1) + timedelta(minutes=30 * half) for half in range(48)]
    got = read(tmp_path, stamps, [1.0] * 48, timezone="Asia/Kolkata", resample={"every": "1h", "default": "sum"})
    assert got.frame.table["time"][0] == datetime(2021, 12, 31, 18, tzinfo=UTC)
    assert got.frame.table["x"].to_list() == [1.0] + [2.0] * 23 + [1.0]


@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Asia/Kolkata", "America/Havana"])
@pytest.mark.parametrize("settings", [{}, {"freq": "1d"}, {"resample": {"every": "1d"}}], ids=str)
def test_local_midnights_are_dates(tmp_path: Path, zone: str, settings: dict[str, Any]) -> None:
    """Also where clocks change at midnight, so that one does not exist and another comes twice."""
    stamps = [f"{day} 00:00" for day in YEAR]
    values = [float(at) for at in range(365)]
    got = read(tmp_path, stamps, values, timezone=zone, **settings)
    assert by_date(got) == dict(zip(YEAR, values, strict=True))
    assert got.frame.schema.freq == "1d"
    assert any("local days of" in str(finding) for finding in got.report.findings)
    plain = read(tmp_path, list(YEAR), values, timezone=zone, **settings)
    assert plain.frame.fingerprint() == got.frame.fingerprint()


def test_weeks_and_months_of_a_local_clock_are_dates(tmp_path: Path) -> None:
    for days, freq in (([date(2022, month, 1) for month in range(1, 13)], "1mo"), (YEAR[2::7], "1w")):
        got = read(tmp_path, [f"{day} 00:00" for day in days], [1.0] * len(days), timezone=BERLIN)
        assert list(by_date(got)) == days
        assert got.frame.schema.freq == freq


def test_midnights_of_a_finer_grid_are_times(tmp_path: Path) -> None:
    given = {"timezone": BERLIN, "freq": "1h"}
    got = read(tmp_path, ["2022-01-02 00:00"], [1.0], **given)
    assert got.frame.table["time"].to_list() == [datetime(2022, 1, 1, 23, tzinfo=UTC)]
    mixed = read(tmp_path, ["2022-01-02 00:00", "2022-01-02 12:00", "2022-01-03 00:00"], [1.0] * 3, timezone=BERLIN)
    assert mixed.frame.table["time"][0] == datetime(2022, 1, 1, 23, tzinfo=UTC)
    epochs = read(tmp_path, [1640991600, 1641078000], [1.0] * 2, timezone=BERLIN, time_format="epoch:s")
    assert epochs.frame.table["time"][0] == datetime(2021, 12, 31, 23, tzinfo=UTC)  # instants, not local stamps


def test_one_stray_time_does_not_turn_dates_into_times(tmp_path: Path) -> None:
    """With a stated frequency of days only the stray row is off the grid."""
    stamps = [f"{day} 00:00" for day in YEAR[:9]] + [f"{YEAR[9]} 12:00"]
    with pytest.raises(DataError, match="1 of 10 times of the 1d grid are no midnights of Europe/Berlin"):
        read(tmp_path, stamps, [1.0] * 10, timezone=BERLIN, freq="1d")


def test_a_time_that_is_midnight_in_utc_is_no_date_of_another_zone(tmp_path: Path) -> None:
    """20:00 in New York is a midnight of UTC: on the grid of dates, but of the day after."""
    stamps = [f"2024-06-0{day} 00:00" for day in range(1, 9)] + ["2024-06-08 20:00"]
    with pytest.raises(DataError, match="1 of 9 times of the 1d grid are no midnights of America/New_York"):
        read(tmp_path, stamps, [1.0] * 9, timezone="America/New_York", freq="1d")


def test_other_hours_of_the_day_are_told_to_resample_and_that_helps(tmp_path: Path) -> None:
    stamps = [f"{day} 06:00" for day in YEAR]
    with pytest.raises(DataError, match="no single frequency.*or resample"):
        read(tmp_path, stamps, [1.0] * 365, timezone=BERLIN)
    assert list(by_date(read(tmp_path, stamps, [1.0] * 365, timezone=BERLIN, resample=DAILY))) == YEAR


def test_midnights_with_publication_times_keep_one_clock(tmp_path: Path) -> None:
    def published(days: list[date], form: str) -> Dataset:
        path = tmp_path / "revised.csv"
        lines = [f"{day:{form}},{day:{form}},1\n" for day in days]
        path.write_text("ds,out,x\n" + "".join(lines))
        source = {"kind": "csv", "path": str(path)}
        given = {"name": "d", "source": source, "published": "out", "timezone": BERLIN}
        return read_dataset(validate(DataConfig, given))

    winter = published(YEAR[:30], "%Y-%m-%d 00:00").vintages
    assert winter is not None
    assert (winter.table["published"] == winter.table["time"]).all()
    with pytest.raises(DataError, match=r"23 or 25 hours apart where clocks change; write plain dates"):
        published(YEAR, "%Y-%m-%d 00:00")
    assert published(YEAR, "%Y-%m-%d").vintages is not None


def test_batches_and_a_database_follow_the_same_rule(tmp_path: Path) -> None:
    """Half a year and then all of it is what all of it is; a table of local times as well as a file."""
    instants = hours(BERLIN, YEAR[0], 365)
    stamps, values = local(instants, BERLIN), [float(at % 24) for at in range(len(instants))]
    given = {"timezone": BERLIN, "resample": DAILY, "ambiguous": "infer"}
    whole = read(tmp_path, stamps, values, **given)
    half = len(hours(BERLIN, YEAR[0], 181))
    store = SeriesStore(f"sqlite:///{tmp_path / 'store.db'}")
    for part in (read(tmp_path, stamps[:half], values[:half], **given), whole):
        record = store.write("d", part.frame, report=part.report, config={}, nulls="keep")
    assert (record.rows_new, record.rows_changed, record.rows_unchanged) == (365 - 181, 0, 181)
    assert store.read("d").table.equals(whole.frame.table)
    store.close()
    place = tmp_path / "source.db"
    with sqlite3.connect(place) as connection:
        connection.execute("CREATE TABLE readings (ds TEXT, x REAL)")
        rows = [(str(at), value) for at, value in zip(stamps, values, strict=True)]
        connection.executemany("INSERT INTO readings VALUES (?, ?)", rows)
    connection.close()
    source = {"kind": "sql", "path": str(place), "table": "readings"}
    assert read(tmp_path, [], [], source=source, **given).frame.fingerprint() == whole.frame.fingerprint()
