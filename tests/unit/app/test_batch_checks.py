"""Checks against counts worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from tsforge.app.checks import (
    CheckConfig,
    FreshCheck,
    NonEmptyCheck,
    NullShareCheck,
    RangeCheck,
    run_checks,
)
from tsforge.core.config import Config, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.durations import before
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema

AS_OF = datetime(2026, 3, 2, tzinfo=UTC)


@pytest.fixture
def frame() -> SeriesFrame:
    """Two series of 48 hours up to as_of. ``a``: load 0..47, temp all 10. ``b``: load ends 30 h early, half its temps
    are missing, one temp is 99."""
    hours = [AS_OF - timedelta(hours=47 - hour) for hour in range(48)]
    a = pl.DataFrame({"series_id": "a", "time": hours, "load": [float(hour) for hour in range(48)], "temp": 10.0})
    b = pl.DataFrame(
        {
            "series_id": "b",
            "time": hours,
            "load": [float(hour) if hour < 18 else None for hour in range(48)],
            "temp": [99.0 if hour == 46 else (10.0 if hour % 2 == 0 and hour < 18 else None) for hour in range(48)],
        }
    )
    schema = SeriesSchema(targets=("load",), past=("temp",), freq="1h")
    return SeriesFrame(pl.concat([a, b]).with_columns(pl.col("time").dt.cast_time_unit("us")), schema)


def outcome(frame: SeriesFrame, check: CheckConfig) -> tuple[bool, str]:
    (result,) = run_checks(frame, [check], AS_OF)
    return result.passed, result.message


def test_non_empty_counts_observed_rows_of_each_series(frame: SeriesFrame) -> None:
    assert outcome(frame, NonEmptyCheck(min_rows=18)) == (True, "0 of 2 series have fewer than 18 observed row(s)")
    passed, message = outcome(frame, NonEmptyCheck(min_rows=19))
    assert not passed
    assert message == "1 of 2 series have fewer than 19 observed row(s): 'b' has 18"


def test_fresh_looks_at_the_newest_target_of_each_series(frame: SeriesFrame) -> None:
    assert outcome(frame, FreshCheck(max_age="30h"))[0]
    passed, message = outcome(frame, FreshCheck(max_age="29h"))
    assert not passed
    assert "1 of 2 series" in message
    assert "'b' ends at 2026-02-28 18:00" in message


def test_null_share_is_of_the_recent_span_only(frame: SeriesFrame) -> None:
    assert outcome(frame, NullShareCheck(span="48h", max_share=0.625))[0], "30 of 48 loads of b are missing"
    assert not outcome(frame, NullShareCheck(span="48h", max_share=0.62))[0]
    passed, message = outcome(frame, NullShareCheck(span="6h", max_share=0.9))
    assert not passed
    assert message.endswith("b.load 100%")
    assert not outcome(frame, NullShareCheck(span="48h", max_share=0.5, columns=("temp",)))[0]


def test_a_series_without_recent_rows_has_no_values(frame: SeriesFrame) -> None:
    table = frame.table.filter((pl.col("series_id") == "a") | (pl.col("load").is_not_null()))
    short = SeriesFrame(table, frame.schema)
    passed, message = outcome(short, NullShareCheck(span="6h", max_share=0.9))
    assert not passed
    assert "b has no row at all" in message


def test_range_ignores_missing_values_and_allows_a_share(frame: SeriesFrame) -> None:
    limits = {"temp": (0.0, 50.0)}
    passed, message = outcome(frame, RangeCheck(span="48h", limits=limits))
    assert not passed
    assert "b.temp 10.0%" in message, "1 of the 10 observed temperatures"
    assert outcome(frame, RangeCheck(span="48h", limits=limits, max_share=0.1))[0]
    assert outcome(frame, RangeCheck(span="48h", limits={"temp": (None, 99.0)}))[0]
    assert not outcome(frame, RangeCheck(span="48h", limits={"temp": (10.5, None)}))[0]


def test_unknown_columns_are_refused(frame: SeriesFrame) -> None:
    with pytest.raises(DataError, match="did you mean 'temp'"):
        outcome(frame, RangeCheck(limits={"temps": (0.0, 1.0)}))


def test_durations_are_checked_when_the_config_is_read() -> None:
    class Holder(Config):
        check: CheckConfig

    with pytest.raises(ConfigError, match="not a duration"):
        validate(Holder, {"check": {"kind": "fresh", "max_age": "soon"}})
    with pytest.raises(ConfigError, match="not a duration"):
        validate(Holder, {"check": {"kind": "null_share", "span": "7 days"}})
    with pytest.raises(ConfigError, match="kind"):
        validate(Holder, {"check": {"kind": "fresj", "max_age": "1d"}})


def test_before_follows_the_calendar() -> None:
    assert before(datetime(2026, 3, 31, tzinfo=UTC), "1mo") == datetime(2026, 2, 28, tzinfo=UTC)
    assert before(datetime(2026, 3, 31, 6, tzinfo=UTC), "36h") == datetime(2026, 3, 29, 18, tzinfo=UTC)
