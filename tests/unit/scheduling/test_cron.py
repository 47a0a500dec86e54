"""Cron slots against a brute-force reading of the expression, minute by minute of the wall clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from tsforge.core.errors import ConfigError
from tsforge.scheduling.cron import Cron


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def local(moments: list[datetime], zone: str) -> list[str]:
    return [moment.astimezone(ZoneInfo(zone)).strftime("%m-%d %H:%M%z") for moment in moments]


def allowed(field: str, low: int, high: int) -> set[int]:
    """Values a purely numeric cron field names; weekdays count from Sunday = 0."""
    values: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = ("", "", "") if span == "*" else span.partition("-")
        start = low if span == "*" else int(first)
        stop = high if span == "*" else int(last or first)
        values |= set(range(start, stop + 1, int(step or 1)))
    return values


def brute_force(expression: str, after: datetime, until: datetime) -> list[datetime]:
    """Every minute of UTC that the five fields name."""
    minute, hour, day, month, weekday = expression.split()
    found, moment = [], after + timedelta(minutes=1)
    while moment <= until:
        on_day = moment.day in allowed(day, 1, 31)
        on_weekday = moment.isoweekday() % 7 in {value % 7 for value in allowed(weekday, 0, 7)}
        days_match = (on_day or on_weekday) if "*" not in (day[0], weekday[0]) else (on_day and on_weekday)
        if (
            moment.minute in allowed(minute, 0, 59)
            and moment.hour in allowed(hour, 0, 23)
            and moment.month in allowed(month, 1, 12)
            and days_match
        ):
            found.append(moment)
        moment += timedelta(minutes=1)
    return found


@pytest.mark.parametrize(
    "expression",
    [
        "0 6 * * 1",
        "*/15 * * * *",
        "5,35 3-5 * * *",
        "0 0 1 * *",
        "30 12 13 * 5",  # the 13th or a Friday
        "30 12 */2 * 1",  # a Monday with an odd date: a field that begins with a star restricts the other one
        "0 9 1-7 * */2",
        "0 */7 * 2,3 *",
        "10 4 * * 1-5",
        "10 4 * * 5-7",
        "10 4 * * 0",
        "10 4 * * 7",
        "10 4 * * */2",
        "59 23 28-31 * *",
    ],
)
def test_slots_equal_the_brute_force_reading(expression: str) -> None:
    after, until = instant("2024-02-20 00:00"), instant("2024-03-20 00:00")
    assert Cron(expression).between(after, until) == brute_force(expression, after, until)


@pytest.mark.parametrize("expression", ["0 6 * * 1", "*/15 * * * *", "30 12 13 * 5", "0 0 29 2 *"])
def test_next_after_walks_the_same_slots(expression: str) -> None:
    cron, moment, until = Cron(expression), instant("2023-12-30 11:07"), instant("2024-03-05 00:00")
    walked = []
    while (following := cron.next_after(moment)) is not None and following <= until and len(walked) < 500:
        walked.append(following)
        moment = following
    assert walked == cron.between(instant("2023-12-30 11:07"), until)[: len(walked)]
    assert walked


def test_between_excludes_its_start_and_includes_its_end() -> None:
    cron = Cron("0 * * * *")
    assert cron.between(instant("2026-01-01 00:00"), instant("2026-01-01 02:00")) == [
        instant("2026-01-01 01:00"),
        instant("2026-01-01 02:00"),
    ]


def test_names_and_wrapping_weekdays() -> None:
    after, until = instant("2026-11-22 00:00"), instant("2026-12-06 00:00")
    by_name = Cron("0 6 * * fri-mon").between(after, until)
    assert by_name == brute_force("0 6 * * 0,1,5,6", after, until)
    assert Cron("@weekly").between(after, until) == brute_force("0 0 * * 0", after, until)


@pytest.mark.parametrize(
    ("asked", "plain"), [("0 6 ? * 1", "0 6 * * 1"), ("0 6 13 * ?", "0 6 13 * *"), ("0 6 ? * ?", "0 6 * * *")]
)
def test_a_question_mark_for_a_day_means_any(asked: str, plain: str) -> None:
    after, until = instant("2024-02-20 00:00"), instant("2024-03-20 00:00")
    assert Cron(asked).between(after, until) == brute_force(plain, after, until)


class TestDaylightSaving:
    """Transitions: Berlin 2026-03-29 01:00 UTC (+1 to +2) and 2026-10-25 01:00 UTC (back); Sao Paulo 2018-11-04
    skipped 00:00-01:00; Lord Howe shifts by half an hour."""

    def test_a_daily_job_in_the_gap_runs_once_an_hour_later_on_the_clock(self) -> None:
        slots = Cron("30 2 * * *", "Europe/Berlin").between(instant("2026-03-28 00:00"), instant("2026-03-30 23:00"))
        assert local(slots, "Europe/Berlin") == ["03-28 02:30+0100", "03-29 03:30+0200", "03-30 02:30+0200"]

    def test_a_daily_job_in_the_repeated_hour_runs_once(self) -> None:
        slots = Cron("30 2 * * *", "Europe/Berlin").between(instant("2026-10-24 00:00"), instant("2026-10-26 23:00"))
        assert local(slots, "Europe/Berlin") == ["10-24 02:30+0200", "10-25 02:30+0200", "10-26 02:30+0100"]

    def test_a_daily_job_at_a_skipped_midnight_is_not_lost(self) -> None:
        zone = "America/Sao_Paulo"
        slots = Cron("15 0 * * *", zone).between(instant("2018-11-03 00:00"), instant("2018-11-05 12:00"))
        assert local(slots, zone) == ["11-03 00:15-0300", "11-04 01:15-0200", "11-05 00:15-0200"]

    @pytest.mark.parametrize(
        ("zone", "after", "until"),
        [
            ("Europe/Berlin", "2026-03-28 12:00", "2026-03-29 12:00"),
            ("Europe/Berlin", "2026-10-24 12:00", "2026-10-25 12:00"),
            ("America/New_York", "2026-11-01 00:00", "2026-11-02 00:00"),
            ("Australia/Lord_Howe", "2026-04-04 00:00", "2026-04-05 12:00"),
            ("Australia/Lord_Howe", "2026-10-03 06:00", "2026-10-04 00:00"),
        ],
    )
    def test_an_hourly_job_follows_elapsed_time(self, zone: str, after: str, until: str) -> None:
        slots = Cron("0 * * * *", zone).between(instant(after), instant(until))
        moment, expected = instant(after), []
        while moment < instant(until):
            moment += timedelta(minutes=1)
            if moment.astimezone(ZoneInfo(zone)).minute == 0:
                expected.append(moment)
        assert slots == expected

    def test_next_after_crosses_the_changes(self) -> None:
        cron = Cron("30 2 * * *", "Europe/Berlin")
        assert cron.next_after(instant("2026-10-25 00:30")) == instant("2026-10-26 01:30")
        assert cron.next_after(instant("2026-10-25 00:29")) == instant("2026-10-25 00:30")
        assert cron.next_after(instant("2026-03-29 01:29")) == instant("2026-03-29 01:30")

    def test_two_wall_times_that_meet_after_the_gap_are_one_slot(self) -> None:
        slots = Cron("30 2,3 * * *", "Europe/Berlin").between(instant("2026-03-29 00:00"), instant("2026-03-29 20:00"))
        assert local(slots, "Europe/Berlin") == ["03-29 03:30+0200"]


@pytest.mark.parametrize(
    ("expression", "zone", "message"),
    [
        ("0 6 * *", "UTC", "4 fields"),
        ("61 6 * * *", "UTC", "61"),
        ("0 6 * * 8", "UTC", "0-7"),
        ("0 6 * * mo", "UTC", "mon-sun"),
        ("0 6 * * */0", "UTC", "weekday"),
        ("0 0 31 2 *", "UTC", "never matches"),
        ("0 6 * * *", "Europe/Berlinn", "Europe/Berlin"),
        ("0 6 * * *", "../etc/passwd", "unknown time zone"),
    ],
)
def test_mistakes_are_named(expression: str, zone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cron(expression, zone)
