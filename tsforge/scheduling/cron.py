"""Cron expressions in a time zone: which instants they name, also across daylight-saving changes.

APScheduler parses the fields and finds matching wall-clock minutes; two of its habits are corrected here, both measured
on 3.11.3: it counts weekdays from Monday where cron counts from Sunday, and around clock changes it runs a fixed-hour
job twice (clock set back) or not at all (midnight skipped). Our rules, those of the classic cron daemon:

* fixed hour (``30 2 * * *``): exactly once a day. A skipped wall time runs at the same distance after the gap, a
  repeated one runs the first time only.
* wildcard hour (``0 * * * *``, ``*/30 */2 * * *``): follows elapsed time. A skipped wall time does not run, a repeated
  one runs both times.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from apscheduler.triggers.cron import CronTrigger

from tsforge.core.errors import ConfigError, listing
from tsforge.core.zones import time_zone

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_REACH = timedelta(hours=3)  # no clock change moves wall time further
_HORIZON = timedelta(days=366 * 9)  # 29 February is at most eight years away


def _weekdays(field: str) -> str:
    """Return a cron weekday field (0 and 7 are Sunday) as the day names APScheduler understands."""
    if field == "*":
        return "*"
    chosen: set[int] = set()
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        low, dash, high = span.partition("-")
        try:
            first = 0 if span == "*" else _day_number(low)
            last = 6 if span == "*" or (step and not dash) else _day_number(high if dash else low)
            stride = int(step) if step else 1
        except ValueError:
            stride = 0
        if stride < 1:
            raise ConfigError(f"'{part}' is no weekday of a cron expression; write 0-7 (0 and 7 are Sunday) or mon-sun")
        last += 7 if last < first else 0  # fri-mon runs over the end of the week
        chosen.update(day % 7 for day in range(first, last + 1, stride))
    return ",".join(_DAYS[day] for day in sorted(chosen))


def _day_number(text: str) -> int:
    if text in _DAYS:
        return _DAYS.index(text)
    number = int(text)
    if not 0 <= number <= 7:
        raise ValueError(text)
    return number


class Cron:
    """A five-field cron expression (or ``@daily`` and the like) in a time zone.

    Raises:
        ConfigError: the expression or the zone is not valid, or the expression never matches.
    """

    def __init__(self, expression: str, zone: str = "UTC") -> None:
        self.expression = expression.strip()
        self.zone = time_zone(zone)
        fields = _MACROS.get(self.expression, self.expression).split()
        if len(fields) != 5:
            raise ConfigError(
                f"cron '{expression}' has {len(fields)} fields; write minute hour day month weekday, "
                f"or one of {listing(_MACROS, 7)}"
            )
        minute, hour, day, month, weekday = fields
        day, weekday = ("*" if field == "?" else field for field in (day, weekday))  # APScheduler does not know it
        names = _weekdays(weekday)
        days = [(day, names)]
        if not day.startswith("*") and not weekday.startswith("*"):  # cron joins two restricted day fields by "or"
            days = [(day, "*"), ("*", names)]
        try:
            self._triggers = [
                CronTrigger(minute=minute, hour=hour, day=day, month=month, day_of_week=names, timezone=UTC)
                for day, names in days
            ]
        except ValueError as error:
            raise ConfigError(f"cron '{expression}': {error}") from error
        self._elapsed = "*" in hour
        if self.next_after(datetime(2000, 1, 1, tzinfo=UTC)) is None:
            raise ConfigError(f"cron '{expression}' never matches a date")

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """Yield matching wall-clock minutes from ``start`` on; they carry UTC only to be comparable."""
        stop = start + _HORIZON

        def walk(trigger: CronTrigger) -> Iterator[datetime]:
            now = start
            while (found := trigger.get_next_fire_time(None, now)) is not None and found <= stop:
                yield found
                now = found + timedelta(minutes=1)

        return heapq.merge(*(walk(trigger) for trigger in self._triggers))

    def _instants(self, wall: datetime) -> list[datetime]:
        """Return the instants a wall-clock minute stands for: none or one in a gap, one or two where it repeats."""
        local = wall.replace(tzinfo=self.zone)
        first, second = local.astimezone(UTC), local.replace(fold=1).astimezone(UTC)
        if not self._elapsed or first == second:
            return [first]
        exists = first.astimezone(self.zone).replace(tzinfo=None) == wall.replace(tzinfo=None)
        return [first, second] if exists else []

    def between(self, after: datetime, until: datetime) -> list[datetime]:
        """Return every instant in (after, until], in UTC, in order, each once."""
        after, until = after.astimezone(UTC), until.astimezone(UTC)
        found: set[datetime] = set()
        stop = until.astimezone(self.zone).replace(tzinfo=UTC) + _REACH
        for wall in self._walls(after.astimezone(self.zone).replace(tzinfo=UTC) - _REACH):
            if wall > stop:
                break
            found.update(instant for instant in self._instants(wall) if after < instant <= until)
        return sorted(found)

    def next_after(self, after: datetime) -> datetime | None:
        """Return the first instant later than ``after``, in UTC, or None when there is none within nine years."""
        after = after.astimezone(UTC)
        best: datetime | None = None
        stop: datetime | None = None
        for wall in self._walls(after.astimezone(self.zone).replace(tzinfo=UTC) - _REACH):
            if stop is not None and wall > stop:
                break
            later = [instant for instant in self._instants(wall) if instant > after]
            if later and (best is None or min(later) < best):
                best = min(later)
                stop = wall + _REACH
        return best
