"""Which slots run and which are given up, by policy; pure functions, no clock, no database."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.scheduling.jobs import JobConfig, Plan, ScheduleConfig, Seen, make_plan
from tsforge.scheduling.ledger import LedgerRun, Status

DAY = datetime(2026, 3, 1, tzinfo=UTC)
NOW = DAY + timedelta(hours=10, minutes=0, seconds=20)


def hour(number: int) -> datetime:
    return DAY + timedelta(hours=number)


def job(**settings: Any) -> JobConfig:
    return JobConfig(name="demo", cron="0 * * * *", run="batch", config="batch/demo", **settings)


def row(
    number: int, status: Status, attempt: int = 1, finished: datetime | None = None, failures: int = 0
) -> LedgerRun:
    return LedgerRun(
        job="schedule/demo",
        slot=hour(number),
        status=status,
        attempt=attempt,
        claimed_by="h:1:1",
        heartbeat=hour(number),
        started=hour(number),
        finished=finished,
        failures=failures,
    )


def plan(config: JobConfig, frontier: datetime, *rows: LedgerRun, abandoned: tuple[int, ...] = ()) -> Plan:
    schedule = ScheduleConfig(jobs=(config,))
    seen = Seen(runs={run.slot: run for run in rows}, abandoned=frozenset(hour(number) for number in abandoned))
    return make_plan(config, schedule.cron_of(config), frontier, NOW, seen)


def hours(slots: Any) -> list[int]:
    return [int((slot - DAY).total_seconds() // 3600) for slot in slots]


def test_nothing_is_due_before_the_first_slot() -> None:
    assert plan(job(), NOW) == Plan()


def test_all_runs_every_missed_slot_in_order() -> None:
    found = plan(job(catch_up="all"), hour(6))
    assert hours(found.run) == [7, 8, 9, 10]
    assert found.skips == ()
    assert found.settled_until is None


def test_latest_runs_the_last_and_gives_up_the_rest_with_one_record() -> None:
    found = plan(job(catch_up="latest"), hour(6))
    assert hours(found.run) == [10]
    assert [hours(skip.slots) for skip in found.skips] == [[7]]
    assert "2 more until 2026-03-01 09:00" in found.skips[0].reason
    assert found.settled_until == hour(9)
    assert hours(plan(job(catch_up="latest", grace_seconds=1), hour(6)).run) == [10], "however late it is"


def test_none_runs_only_what_is_on_time() -> None:
    assert hours(plan(job(catch_up="none"), hour(6)).run) == [10]
    late = plan(job(catch_up="none", grace_seconds=10), hour(6))
    assert late.run == ()
    assert late.settled_until == hour(10)


def test_slots_beyond_the_delay_are_given_up_without_listing_them() -> None:
    found = plan(job(catch_up="all", max_delay_seconds=2.5 * 3600), hour(0))
    assert hours(found.run) == [8, 9, 10]
    assert hours(found.skips[0].slots) == [1]
    assert found.settled_until == NOW - timedelta(hours=2.5)


def test_a_decade_of_downtime_of_a_minutely_job_is_planned_quickly() -> None:
    config = JobConfig(name="demo", cron="* * * * *", run="batch", config="x", catch_up="latest", max_delay_seconds=600)
    found = make_plan(config, ScheduleConfig(jobs=(config,)).cron_of(config), hour(-90_000), NOW, Seen())
    assert found.run == (NOW - timedelta(seconds=20),)
    assert len(found.skips) == 2


def test_settled_slots_move_the_frontier_up_to_the_first_hole() -> None:
    found = plan(job(catch_up="all"), hour(5), row(6, "done"), row(7, "skipped"), row(9, "done"))
    assert hours(found.run) == [8, 10]
    assert found.settled_until == hour(7)


def test_interrupted_and_abandoned_slots_run_again_a_living_one_does_not() -> None:
    rows = (row(8, "interrupted"), row(9, "claimed"), row(10, "claimed"))
    assert hours(plan(job(catch_up="all"), hour(7), *rows, abandoned=(9,)).run) == [8, 9]


def test_given_up_slots_that_have_a_record_are_recorded_one_by_one() -> None:
    rows = (row(8, "interrupted"), row(9, "interrupted"))
    found = plan(job(catch_up="latest"), hour(6), *rows)
    assert hours(found.run) == [10]
    assert hours(found.skips[0].slots) == [7, 8, 9]


def test_a_slot_being_worked_on_is_never_given_up() -> None:
    found = plan(job(catch_up="latest"), hour(8), row(9, "claimed"))
    assert hours(found.run) == [10]
    assert found.skips == ()
    assert found.settled_until is None


@pytest.mark.parametrize(("retries", "failures", "again"), [(0, 1, False), (1, 1, True), (1, 2, False), (3, 3, True)])
def test_failed_slots_run_again_while_retries_last(retries: int, failures: int, again: bool) -> None:
    """The attempts beyond the failures were interrupted."""
    found = plan(job(retries=retries), hour(9), row(10, "failed", attempt=7, finished=NOW, failures=failures))
    assert hours(found.run) == ([10] if again else [])
    assert found.settled_until == (None if again else hour(10))


@pytest.mark.parametrize(
    "tried",
    [
        row(9, "failed", finished=hour(9), failures=1),
        row(9, "interrupted", finished=hour(9)),
        row(9, "claimed"),
    ],
    ids=["failed", "interrupted", "abandoned"],
)
def test_without_catch_up_a_slot_that_was_tried_is_not_late(tried: LedgerRun) -> None:
    """It came on time; a look every five minutes is a longer pause than ``grace_seconds``."""
    config = job(catch_up="none", retries=2, grace_seconds=1)
    found = plan(config, hour(7), tried, row(10, "done"), abandoned=(9,))
    assert hours(found.run) == [9]
    assert [hours(skip.slots) for skip in found.skips] == [[8]], "nobody tried that one"
    bounded = plan(job(catch_up="none", retries=2, max_delay_seconds=600), hour(7), tried, row(10, "done"))
    assert bounded.run == ()


def test_latest_gives_up_a_slot_with_retries_left_once_a_newer_one_is_due() -> None:
    found = plan(job(catch_up="latest", retries=5), hour(8), row(9, "failed", finished=NOW, failures=1))
    assert hours(found.run) == [10]
    assert [hours(skip.slots) for skip in found.skips] == [[9]]


def test_the_command_names_the_slot_in_utc() -> None:
    command = job(overrides=("horizon=12",)).command(hour(6))
    expected = ["-P", "-m", "pipelines.batch_forecast", "batch/demo", "--as-of", "2026-03-01T06:00:00Z", "horizon=12"]
    assert command == [sys.executable, *expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cron": "0 25 * * *"}, r"jobs.0.cron: .*25"),
        ({"timezone": "Mars/Olympus"}, r"jobs.0.timezone: unknown time zone"),
        ({"name": "batch/demo"}, r"jobs.0.name"),
        ({"timeout_seconds": 0}, r"jobs.0.timeout_seconds"),
        ({"catch_up": "some"}, r"jobs.0.catch_up"),
        ({"max_delay_seconds": 1e11}, r"jobs.0.max_delay_seconds"),
        ({"grace_seconds": 1e20}, r"jobs.0.grace_seconds"),
        ({"start": "9999-12-31T00:00Z"}, r"jobs.0.start"),
        ({"start": "2026-01-01T00:00"}, r"jobs.0.start: .*timezone"),
        ({"catchup": "all"}, r"jobs.0.catchup: unknown key; did you mean 'catch_up'"),
    ],
)
def test_mistakes_name_their_place(change: dict[str, Any], message: str) -> None:
    settings = {"name": "demo", "cron": "0 * * * *", "run": "batch", "config": "batch/demo"} | change
    with pytest.raises(ConfigError, match=message):
        validate(ScheduleConfig, {"jobs": [settings]})


def test_the_longest_durations_can_be_planned_with() -> None:
    longest = 100 * 366 * 86400
    config = job(max_delay_seconds=longest, grace_seconds=longest, catch_up="none")
    assert hours(plan(config, hour(8)).run) == [9, 10]
    for field in ("poll_seconds", "stop_seconds", "stale_seconds"):
        with pytest.raises(ConfigError, match=field):
            validate(ScheduleConfig, {"jobs": [job().model_dump()], field: 10 * longest})


def test_names_are_unique_and_there_is_a_job() -> None:
    with pytest.raises(ConfigError, match="at least one job"):
        validate(ScheduleConfig, {"jobs": []})
    with pytest.raises(ConfigError, match="demo named more than once"):
        validate(ScheduleConfig, {"jobs": [job().model_dump(), job().model_dump()]})
