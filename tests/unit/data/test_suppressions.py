"""Rules that silence events: patterns, bounds, and weekly windows by the clock of a time zone."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.data.suppressions import EventFacts, SuppressionRule, silenced_by

NOON = datetime(2026, 3, 7, 12, tzinfo=UTC)  # a Saturday


def rule(**settings: Any) -> SuppressionRule:
    return validate(SuppressionRule, {"reason": "known", **settings})


def event(start: datetime | int = NOON, end: datetime | int | None = None, **changes: Any) -> EventFacts:
    facts: dict[str, Any] = {"dataset": "plant", "series_id": "pump_1", "peak_score": 9.0, "variate": "flow"}
    return EventFacts(**{**facts, "start": start, "end": start if end is None else end, **changes})


@pytest.mark.parametrize(
    ("settings", "silences"),
    [
        ({"series": "pump_*"}, True),
        ({"series": "PUMP_*"}, False),
        ({"series": "pump_?"}, True),
        ({"series": "fan*"}, False),
        ({"variate": "fl*"}, True),
        ({"variate": "temp*"}, False),
        ({"score_below": 9.5}, True),
        ({"score_below": 9.0}, False),
        ({"series": "pump_*", "dataset": "plant"}, True),
        ({"series": "pump_*", "dataset": "other"}, False),
        ({"series": "pump_*", "variate": "temp*"}, False),
    ],
)
def test_patterns(settings: dict[str, Any], silences: bool) -> None:
    assert rule(**settings).silences(event()) is silences


def test_an_event_without_variates_or_score_fits_no_rule_about_them() -> None:
    bare = event(variate=None, peak_score=None)
    assert not rule(variate="*", dataset="plant", series="p*").silences(bare)
    assert not rule(score_below=1e9).silences(bare)


def test_a_window_silences_what_lies_inside_it_whole() -> None:
    window = rule(start="2026-03-07T10:00", end="2026-03-07T14:00")
    hour = timedelta(hours=1)
    assert window.kind == "maintenance"
    assert window.silences(event(NOON - 2 * hour, NOON + 2 * hour))  # both ends are included
    assert not window.silences(event(NOON - 3 * hour, NOON)), "it began before the maintenance"
    assert not window.silences(event(NOON, NOON + 3 * hour)), "it outlasts the maintenance"
    offset = rule(start="2026-03-07T12:00+02:00", end="2026-03-07T16:00+02:00")
    assert (offset.start, offset.end) == (window.start, window.end)


def test_numbers_and_times_never_fit_each_other() -> None:
    numbers = rule(start=100, end=200)
    assert numbers.silences(event(100, 200))
    assert not numbers.silences(event(100, 201))
    assert not numbers.silences(event(NOON))
    assert not rule(start="2026-03-07").silences(event(100))
    assert not rule(weekly={"weekdays": ["sat"], "opens": "00:00", "closes": "00:00"}).silences(event(100))
    assert rule(series="pump*").silences(event(100))


def weekly(days: list[str], hours: str, zone: str = "UTC", **more: Any) -> SuppressionRule:
    opens, closes = hours.split("-")
    return rule(weekly={"weekdays": days, "opens": opens, "closes": closes, "timezone": zone}, **more)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("settings", "start", "end", "silences"),
    [
        (weekly(["sat"], "11:00-13:00"), "2026-03-07T11:00", "2026-03-07T12:59", True),
        (weekly(["sat"], "11:00-13:00"), "2026-03-07T11:00", "2026-03-07T13:00", False),  # closed by then
        (weekly(["sun"], "11:00-13:00"), "2026-03-07T11:00", "2026-03-07T12:00", False),
        (weekly(["sat"], "22:00-02:00"), "2026-03-07T23:00", "2026-03-08T01:59", True),  # over midnight
        (weekly(["sat"], "22:00-02:00"), "2026-03-07T01:00", "2026-03-07T01:30", False),  # Friday's night
        (weekly(["fri"], "22:00-02:00"), "2026-03-07T01:00", "2026-03-07T01:30", True),
        (weekly(["sat"], "06:00-06:00"), "2026-03-07T06:00", "2026-03-08T05:59", True),  # 24 hours
        # New York is 5 hours behind in winter and 4 in summer: 08:00 there is 13:00, then 12:00
        (weekly(["sat"], "08:00-09:00", "America/New_York"), "2026-03-07T13:00", "2026-03-07T13:30", True),
        (weekly(["sat"], "08:00-09:00", "America/New_York"), "2026-03-14T13:00", "2026-03-14T13:30", False),
        (weekly(["sat"], "08:00-09:00", "America/New_York"), "2026-03-14T12:00", "2026-03-14T12:30", True),
        # Friday night in Auckland is Friday noon in UTC; the day is the local one
        (weekly(["sat"], "00:00-03:00", "Pacific/Auckland"), "2026-03-06T11:30", "2026-03-06T12:00", True),
        # the night on which clocks go forward (29 March in Berlin): 22:00-03:30 is 4.5 hours long
        (weekly(["sat"], "22:00-03:30", "Europe/Berlin"), "2026-03-28T21:00", "2026-03-29T01:29", True),
        (weekly(["sat"], "22:00-03:30", "Europe/Berlin"), "2026-03-28T21:00", "2026-03-29T01:30", False),
        # bounds of a rule that returns
        (weekly(["sat"], "11:00-13:00", start="2026-03-08"), "2026-03-07T11:00", "2026-03-07T12:00", False),
        (weekly(["sat"], "11:00-13:00", end="2026-03-08"), "2026-03-07T11:00", "2026-03-07T12:00", True),
    ],
)
def test_weekly_windows(settings: SuppressionRule, start: str, end: str, silences: bool) -> None:
    assert settings.silences(event(utc(start), utc(end))) is silences


def test_the_oldest_rule_that_fits_is_named() -> None:
    rules = [(3, rule(series="fan*")), (4, rule(series="pump*")), (7, rule(variate="flow"))]
    assert silenced_by(event(), rules) == 4
    assert silenced_by(event(series_id="x"), rules) == 7
    assert silenced_by(event(series_id="x", variate=None), rules) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reason": "  "}, "say why"),
        ({}, "would hide every event for ever"),
        ({"series": "**"}, "would hide every event for ever"),
        ({"series": "?*"}, "would hide every event for ever"),
        ({"variate": "*"}, "would hide every event for ever"),
        ({"score_below": float("inf")}, "score_below: Input should be a finite number"),
        ({"start": "2026-03-02", "end": "2026-03-01"}, "lies before start"),
        ({"start": "2026-03-02", "end": 5}, "both be times or both be numbers"),
        ({"start": "soon"}, "not an ISO date"),
        ({"start": "--5"}, "not an ISO date"),
        ({"end": "9999-12-31T23:30-05:00"}, "lies outside the years 1 to 9999"),
        ({"end": "9223372036854775808"}, "does not fit 64 bits"),
        ({"end": 2**63}, "does not fit 64 bits"),
        ({"weekly": {"weekdays": ["sat"], "opens": "25:00", "closes": "1:00"}}, "not a time of day"),
        (
            {"weekly": {"weekdays": ["sat"], "opens": "22", "closes": "1:00", "timezone": "Mars/North"}},
            "unknown time zone",
        ),
        ({"weekly": {"weekdays": ["caturday"], "opens": "22", "closes": "1:00"}}, "weekdays"),
        ({"weekly": {"weekdays": [], "opens": "22", "closes": "1:00"}}, "weekdays"),
        ({"start": 5, "weekly": {"weekdays": ["sat"], "opens": "22", "closes": "1"}}, "needs times"),
        ({"serie": "x"}, "did you mean 'series'"),
    ],
)
def test_bad_rules_are_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**settings)


def test_bounds_of_any_kind_are_aware() -> None:
    for start in ("2026-03-01", "2026-03-01T02:00+02:00", date(2026, 3, 1), datetime(2026, 3, 1)):
        assert rule(start=start).start == utc("2026-03-01")
    assert (rule(start="-3").start, rule(start=-3).start) == (-3, -3)


def test_a_rule_survives_json() -> None:
    made = weekly(["sat", "sun"], "22:00-2:00", "Europe/Berlin", series="a*", score_below=4.5, start="2026-03-01")
    assert SuppressionRule.model_validate_json(made.model_dump_json()) == made
    numbers = rule(start=100, end=200)
    assert SuppressionRule.model_validate_json(numbers.model_dump_json()) == numbers
