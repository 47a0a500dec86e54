"""Frequencies, absolute indices and frequency inference, against datetime arithmetic done by hand."""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.grid import TimeGrid, canonical_freq, infer_freq, parse_time, time_number


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "shortest"),
    [("60m", "1h"), ("90m", "90m"), ("24h", "1d"), ("7d", "1w"), ("3mo", "1q"), ("12mo", "1y"), ("2q", "2q"),
     ("1000ms", "1s"), ("1i", "1i"), ("24i", "24i")],
)  # fmt: skip
def test_equal_frequencies_have_one_name(given: str, shortest: str) -> None:
    assert canonical_freq(given) == shortest


@pytest.mark.parametrize("text", ["", "h", "0h", "-1h", "1.5h", "1h30m", "1 h", "1x", "1H"])
def test_a_wrong_frequency_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a frequency"):
        canonical_freq(text)


def test_a_word_for_a_frequency_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean '1h'"):
        canonical_freq("hourly")


@pytest.mark.parametrize(
    ("freq", "step"), [("15m", timedelta(minutes=15)), ("1d", timedelta(days=1)), ("2w", timedelta(14))]
)
def test_fixed_steps_equal_datetime_arithmetic(freq: str, step: timedelta) -> None:
    origin = utc(2023, 11, 5, 6, 30)
    grid = TimeGrid(origin, freq)
    for index in (-1000, -1, 0, 1, 12345):
        assert grid.time_at(index) == origin + index * step
        assert grid.index_of(pl.Series([origin + index * step])).tolist() == [index]
    assert grid.floor(origin + step - timedelta(microseconds=1)) == 0
    assert grid.floor(origin - timedelta(microseconds=1)) == -1


def test_months_fall_on_the_day_of_the_origin_or_the_last_of_shorter_months() -> None:
    grid = TimeGrid(utc(2023, 1, 31, 6), "1mo")
    times = grid.time_at(np.arange(-2, 15))
    for index, time in zip(range(-2, 15), times, strict=True):
        year, month = divmod(12 * 2023 + index, 12)
        day = min(31, calendar.monthrange(year, month + 1)[1])
        assert time == utc(year, month + 1, day, 6)
    assert grid.index_of(times).tolist() == list(range(-2, 15))


def test_month_end_grids_start_in_any_month() -> None:
    grid = TimeGrid(utc(2023, 2, 28), "1q", month_day=31)
    assert grid.time_at(np.arange(4)).to_list() == [
        utc(2023, 2, 28),
        utc(2023, 5, 31),
        utc(2023, 8, 31),
        utc(2023, 11, 30),
    ]


def test_a_monthly_grid_starts_on_its_day() -> None:
    assert TimeGrid(utc(2023, 2, 28), "1mo", 30).time_at(1) == utc(2023, 3, 30)
    with pytest.raises(ConfigError, match="on day 31 cannot start at 2023-03-30"):
        TimeGrid(utc(2023, 3, 30), "1mo", 31)


def test_years_pass_leap_days() -> None:
    grid = TimeGrid(utc(2020, 2, 29), "1y")
    assert grid.time_at(np.array([1, 4])).to_list() == [utc(2021, 2, 28), utc(2024, 2, 29)]


def test_integer_time() -> None:
    grid = TimeGrid(10, "5i")
    assert grid.time_at(np.array([0, 3])).to_list() == [10, 25]
    assert grid.index_of(pl.Series([5, 30])).tolist() == [-1, 4]
    with pytest.raises(DataError, match="1 of 2 times lie off the grid"):
        grid.index_of(pl.Series([10, 11]))


def test_kinds_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="cannot start"):
        TimeGrid(3, "1h")
    with pytest.raises(DataError, match="does not fit freq"):
        TimeGrid(utc(2023, 1, 1), "1h").index_of(pl.Series("t", [1, 2]))


def test_other_zones_and_units_mean_the_same_instant() -> None:
    grid = TimeGrid(utc(2023, 1, 1), "1h")
    local = pl.Series([utc(2023, 7, 1)]).dt.convert_time_zone("America/New_York")
    assert grid.index_of(local).tolist() == [181 * 24]
    assert grid.index_of(pl.Series([datetime(2023, 1, 2)], dtype=pl.Datetime("ns"))).tolist() == [24]
    assert grid.index_of(pl.Series([date(2023, 1, 2)])).tolist() == [24]


def test_nanoseconds_are_not_cut_silently() -> None:
    times = pl.Series("t", [1_500_000_000_000_000_001]).cast(pl.Datetime("ns"))
    with pytest.raises(DataError, match="below one microsecond"):
        TimeGrid(utc(2023, 1, 1), "1h").index_of(times)


@pytest.mark.parametrize("grid", [TimeGrid(utc(2023, 2, 28, 1, 2), "1mo", 30), TimeGrid(-7, "3i")])
def test_grids_survive_plain_types(grid: TimeGrid) -> None:
    assert TimeGrid.from_dict(grid.to_dict()) == grid


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2023-01-01", utc(2023, 1, 1)), ("2023-01-01T02:00+02:00", utc(2023, 1, 1)), (date(2023, 1, 1), utc(2023, 1, 1))],
)
def test_times_are_read_as_utc(value: object, expected: datetime) -> None:
    assert parse_time(value, integer=False) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "integer"), [("soon", False), (3, False), ("soon", True), (date(2023, 1, 1), True)])
def test_a_time_of_the_wrong_kind_is_refused(value: object, integer: bool) -> None:
    with pytest.raises(DataError):
        parse_time(value, integer=integer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "integer", "message"),
    [
        ("10000-01-01", False, "not an ISO date"),
        ("9999-12-31T23:30-05:00", False, "'9999-12-31T23:30-05:00' lies outside the years 1 to 9999"),
        ("0001-01-01T00:00+05:00", False, "lies outside the years 1 to 9999"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5))), False, "lies outside the years 1 to 9999"),
        ("9223372036854775808", True, "does not fit 64 bits"),
        (-(2**63) - 1, True, "does not fit 64 bits"),
        ("9" * 5000, True, "is not an integer"),
        ("--5", True, "is not an integer"),
    ],
)
def test_a_time_that_no_calendar_and_no_database_holds_is_refused(value: object, integer: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_time(value, integer=integer)  # type: ignore[arg-type]


def test_a_time_is_a_number_of_microseconds_or_itself() -> None:
    assert time_number(utc(1970, 1, 2), integer=False) == 86_400_000_000
    assert time_number("1969-12-31T23:59:59.999999", integer=False) == -1
    assert time_number("9999-12-31T23:59:59.999999", integer=False) == 253_402_300_799_999_999
    assert time_number("-7", integer=True) == -7
    with pytest.raises(DataError, match="integer time"):
        time_number("2023-01-01", integer=True)


@pytest.mark.parametrize("freq", ["1ms", "15m", "1h", "1d", "1w", "1mo", "1q", "1y"])
def test_inference_reads_what_polars_wrote(freq: str) -> None:
    times = pl.datetime_range(
        datetime(2021, 1, 15), datetime(2021, 1, 15) + timedelta(milliseconds=50), freq, eager=True
    )
    if len(times) < 2:
        times = pl.datetime_range(datetime(2021, 1, 15), datetime(2025, 1, 15), freq, eager=True)
    assert infer_freq(times) == freq


def test_inference_sees_month_ends_and_integers() -> None:
    ends = pl.Series([date(2023, 1, 31), date(2023, 2, 28), date(2023, 3, 31), date(2023, 4, 30)])
    assert infer_freq(ends) == "1mo"
    assert infer_freq(pl.Series([7, 1, 4, 13])) == "3i"


def test_inference_takes_steps_within_series_only() -> None:
    times = pl.Series([datetime(2023, 1, 1, hour) for hour in (0, 2, 4, 1, 3, 5)])
    assert infer_freq(times, pl.Series(["a"] * 3 + ["b"] * 3)) == "2h"


def test_gaps_and_repeats_do_not_hide_the_frequency() -> None:
    hours = [0, 1, 1, 2, 3, 7, 8, 30]
    assert infer_freq(pl.Series([datetime(2023, 1, 1) + timedelta(hours=h) for h in hours])) == "1h"


def test_irregular_times_name_the_two_most_frequent_steps() -> None:
    minutes = np.cumsum([0] + [60] * 6 + [25] * 4)
    times = pl.Series("ds", [datetime(2023, 1, 1) + timedelta(minutes=int(m)) for m in minutes])
    with pytest.raises(DataError, match=r"'ds' has no single frequency.*1h \(6 times\) and 25m \(4 times\)"):
        infer_freq(times)


def test_two_frequencies_are_not_taken_for_gaps() -> None:
    hours = np.concatenate([np.arange(40), 40 + 2 * np.arange(20)])
    times = pl.Series("ds", [datetime(2023, 1, 1) + timedelta(hours=int(h)) for h in hours])
    with pytest.raises(DataError, match=r"1h \(40 times\) and 2h \(19 times\)"):
        infer_freq(times)


def test_one_time_has_no_frequency() -> None:
    with pytest.raises(DataError, match="cannot infer the frequency from 1 row"):
        infer_freq(pl.Series([datetime(2023, 1, 1)]))
