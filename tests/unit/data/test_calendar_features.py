"""Calendar features against datetime and zoneinfo, over changes of the clock and holidays."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.calendar import CalendarConfig, add_calendar, calendar_columns
from tsforge.data.frame import SeriesFrame


def frame(start: datetime, rows: int, step: timedelta = timedelta(hours=1)) -> SeriesFrame:
    times = [start + number * step for number in range(rows)]
    return SeriesFrame.from_wide(pl.DataFrame({"ds": times, "y": np.arange(float(rows))}), time="ds")


def phases(local: datetime) -> dict[str, float]:
    year = 366 if local.year % 4 == 0 else 365
    return {
        "minute": (local.minute * 60 + local.second) / 3600,
        "hour": (local.hour * 3600 + local.minute * 60 + local.second) / 86400,
        "weekday": local.weekday() / 7,
        "month": (local.month - 1) / 12,
        "dayofyear": (local.timetuple().tm_yday - 1) / year,
    }


@pytest.mark.parametrize("start", [datetime(2024, 3, 9, 22, 30), datetime(2024, 11, 2, 22, 30), datetime(2024, 12, 30)])
@pytest.mark.parametrize("zone", [None, "America/New_York", "Australia/Lord_Howe"])
def test_features_follow_the_local_clock(start: datetime, zone: str | None) -> None:
    config = CalendarConfig(features=("minute", "hour", "weekday", "month", "dayofyear", "weekend"), timezone=zone)
    table = add_calendar(frame(start, 60, timedelta(minutes=30)), config).table
    for row in table.iter_rows(named=True):
        local = row["time"].astimezone(ZoneInfo(zone or "UTC"))
        for name, phase in phases(local).items():
            assert row[f"calendar.{name}.sin"] == pytest.approx(math.sin(2 * math.pi * phase), abs=1e-12)
            assert row[f"calendar.{name}.cos"] == pytest.approx(math.cos(2 * math.pi * phase), abs=1e-12)
        assert row["calendar.weekend"] == float(local.weekday() >= 5)


def test_days_are_dates_whatever_the_zone() -> None:
    days = frame(datetime(2024, 1, 1), 7, timedelta(days=1))
    table = add_calendar(days, CalendarConfig(features=("weekend",), timezone="America/New_York")).table
    assert table["calendar.weekend"].to_list() == [0, 0, 0, 0, 0, 1, 1]  # 2024-01-01 is a Monday


def test_future_rows_get_features_too() -> None:
    table = add_calendar(frame(datetime(2024, 1, 1), 3).extend(5), CalendarConfig(features=("hour",))).table
    assert table.height == 8
    assert table["calendar.hour.sin"].null_count() == 0


def test_holidays_are_local_days() -> None:
    # Independence Day in New York runs from 04:00 UTC to 04:00 UTC
    table = add_calendar(
        frame(datetime(2023, 7, 3), 72), CalendarConfig(holidays="US", timezone="America/New_York")
    ).table
    days = [time.replace(tzinfo=None) for time in table.filter(pl.col("calendar.holiday") == 1)["time"]]
    assert days == [datetime(2023, 7, 4, 4) + timedelta(hours=hour) for hour in range(24)]


def test_windows_around_holidays_are_columns_of_their_own() -> None:
    config = CalendarConfig(holidays="US", holiday_names=("New Year's Day", "Christmas Day"), holiday_window=(-1, 1))
    table = add_calendar(frame(datetime(2023, 12, 20), 12, timedelta(days=1)), config).table

    def days(column: str) -> list[tuple[int, int]]:
        return [(time.month, time.day) for time in table.filter(pl.col(column) == 1)["time"]]

    assert days("calendar.Christmas Day-1") == [(12, 24)]
    assert days("calendar.Christmas Day") == [(12, 25)]
    assert days("calendar.Christmas Day+1") == [(12, 26)]
    assert days("calendar.New Year's Day-1") == [(12, 31)]  # from the next year's calendar
    assert days("calendar.New Year's Day") == []


def test_subdivisions_have_their_own_days() -> None:
    table = add_calendar(frame(datetime(2023, 1, 1), 365, timedelta(days=1)), CalendarConfig(holidays="DE-BY")).table
    days = {(time.month, time.day) for time in table.filter(pl.col("calendar.holiday") == 1)["time"]}
    assert (1, 6) in days  # Epiphany, in Bavaria but not in Berlin
    assert (3, 8) not in days


def test_names_are_known_before_the_columns_exist() -> None:
    config = CalendarConfig(features=("hour", "weekend"), holidays="US", holiday_window=(0, 1))
    assert add_calendar(frame(datetime(2024, 1, 1), 3), config).schema.known == calendar_columns(config)


def test_nothing_asked_for_changes_nothing() -> None:
    data = frame(datetime(2024, 1, 1), 3)
    assert add_calendar(data, CalendarConfig()) is data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timezone": "Mars/Base"}, "unknown time zone"),
        ({"features": ("hour", "hour")}, "twice"),
        ({"holiday_window": (0, 1)}, "need holidays"),
        ({"holidays": "US", "holiday_window": (1, 2)}, "start at or before 0"),
        ({"holidays": "XX"}, "no holidays are known for country 'XX'"),
        ({"holidays": "US-QQ"}, "'QQ' is no subdivision of US"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CalendarConfig(**values)


def test_unknown_holidays_are_refused() -> None:
    config = CalendarConfig(holidays="US", holiday_names=("Chrismas Day",))
    with pytest.raises(ConfigError, match="did you mean 'Christmas Day'"):
        add_calendar(frame(datetime(2024, 1, 1), 3), config)


def test_integer_time_has_no_calendar() -> None:
    data = SeriesFrame.from_wide(pl.DataFrame({"step": [0, 1, 2], "y": [1.0, 2, 3]}), time="step")
    with pytest.raises(DataError, match="integer time has no calendar"):
        add_calendar(data, CalendarConfig(features=("hour",)))
