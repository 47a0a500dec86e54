"""Durations in settings: which spans, shifts and delays are taken, and how a span is measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tsforge.app.checks import CheckConfig
from tsforge.app.ingest import max_age
from tsforge.core.config import Config, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.config import DataConfig
from tsforge.data.durations import before


class Holder(Config):
    check: CheckConfig


def data(**settings: Any) -> DataConfig:
    return validate(DataConfig, {"name": "d", "source": {"kind": "csv", "path": "x"}, **settings})


@pytest.mark.parametrize(
    "text", ["", "-2h", "0h", "0h0m", "1i", "2h1i", "h", "2", "2 h", "soon", "1000001d", "9" * 30 + "us"]
)
def test_an_age_or_a_span_is_a_duration_of_the_calendar_above_zero(text: str) -> None:
    with pytest.raises(ConfigError, match=f"max_age: '{text}' is not a duration such as 6h, 7d or 1mo"):
        data(max_age=text)
    with pytest.raises(ConfigError, match=r"max_age: .* is not a duration such as 6h, 7d or 1mo"):
        validate(Holder, {"check": {"kind": "fresh", "max_age": text}})
    with pytest.raises(ConfigError, match=r"span: .* is not a duration such as 6h, 7d or 1mo"):
        validate(Holder, {"check": {"kind": "null_share", "span": text}})
    with pytest.raises(DataError, match="is not a duration"):
        before(datetime(2026, 3, 1, tzinfo=UTC), text)


@pytest.mark.parametrize("text", ["1us", "2h30m", "7d", "1mo", "10y"])
def test_spans_that_are_taken(text: str) -> None:
    assert data(max_age=text).max_age == text
    validate(Holder, {"check": {"kind": "fresh", "max_age": text}})
    assert before(datetime(2026, 3, 1, tzinfo=UTC), text) < datetime(2026, 3, 1, tzinfo=UTC)


def test_only_a_shift_has_a_sign() -> None:
    assert data(time_shift="-1h").time_shift == "-1h"
    assert data(time_shift="1h30m").time_shift == "1h30m"
    for name, text in (("time_shift", "--1h"), ("time_shift", "1i"), ("publication_delay", "-1d")):
        with pytest.raises(ConfigError, match=f"{name}: '{text}' is not a duration"):
            data(**{name: text})
    for name in ("freq", "max_age"):
        with pytest.raises(ConfigError, match=name):
            data(**{name: "-1h"})


def test_a_delay_may_be_none_at_all_or_rows() -> None:
    for text in ("0d", "2i", "1d12h"):
        assert data(publication_delay={"x": text}).publication_delay == {"x": text}
    with pytest.raises(ConfigError, match=r"publication_delay.*'2i3h' is not a duration"):
        data(publication_delay={"x": "2i3h"})


@pytest.mark.parametrize("text", ["-1h", "0h", "MS", "1h30m"])
def test_a_frequency_that_is_none_is_told_before_anything_is_read(text: str) -> None:
    with pytest.raises(ConfigError, match=f"freq: .*'{text}' is not a frequency"):
        data(freq=text)
    with pytest.raises(ConfigError, match=f"resample.every: .*'{text}' is not a frequency"):
        data(resample={"every": text})


def test_a_stored_age_of_an_older_version_that_is_none_counts_as_not_stated(caplog: pytest.LogCaptureFixture) -> None:
    assert max_age({"max_age": "1d"}) == timedelta(days=1)
    for text in ("-2h", "1i"):
        assert max_age({"name": "sales", "max_age": text}) is None
        assert f"max_age '{text}' of dataset 'sales'" in caplog.text
