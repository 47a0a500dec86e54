"""Every setting that names a time zone knows the same names and helps with a slip the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tsforge.app.watch.settings import RowsConfig
from tsforge.core.config import Config, validate
from tsforge.core.errors import ConfigError
from tsforge.data.calendar import CalendarConfig
from tsforge.data.config import DataConfig
from tsforge.data.suppressions import SuppressionRule
from tsforge.scheduling.cron import Cron
from tsforge.scheduling.jobs import JobConfig, ScheduleConfig

JOB = {"name": "daily", "cron": "0 6 * * *", "run": "batch", "config": "batch/x"}


def config(kind: type[Config], **settings: Any) -> Callable[[str], Any]:
    return lambda zone: validate(kind, {**settings, "timezone": zone})


def weekly(zone: str) -> Any:
    window = {"weekdays": ["sat"], "opens": "22:00", "closes": "2:00", "timezone": zone}
    return validate(SuppressionRule, {"reason": "known", "weekly": window})


PLACES: dict[str, Callable[[str], Any]] = {
    "cron": lambda zone: Cron("0 6 * * *", zone),
    "job": config(JobConfig, **JOB),
    "schedule": config(ScheduleConfig, jobs=[JOB]),
    "calendar": config(CalendarConfig, features=["hour"]),
    "data": config(DataConfig, name="d", source={"kind": "csv", "path": "x"}),
    "rows of a watch": config(RowsConfig),
    "weekly window": weekly,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_slip_in_a_zone_is_told_with_the_nearest(place: str) -> None:
    PLACES[place]("Europe/Berlin")
    with pytest.raises(ConfigError, match="unknown time zone 'Europe/Berln'; did you mean 'Europe/Berlin'"):
        PLACES[place]("Europe/Berln")


@pytest.mark.parametrize("name", ["", "Europe", "../etc/passwd", "/etc/localtime", "a\0b", "Mars/Olympus", "x" * 5000])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_zone_is_one_message(place: str, name: str) -> None:
    with pytest.raises(ConfigError, match="unknown time zone"):
        PLACES[place](name)
