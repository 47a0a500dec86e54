"""Rules that silence events: patterns over series, variates and scores, and maintenance windows, once or every week.

A silenced event is stored all the same. A window silences events that lie inside it whole: a fault that outlasts the
maintenance comes to the surface with its first row after the end.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from fnmatch import fnmatchcase
from typing import Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import DataError
from tsforge.core.zones import ZoneName
from tsforge.data.grid import parse_time, reads_as_integer

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Weekly(Config):
    """A window that returns every week, by the clock of a time zone."""

    weekdays: tuple[Weekday, ...] = Field(min_length=1)
    """Days on which it opens."""
    opens: str
    """``22:00``."""
    closes: str
    """First moment after it; at or before ``opens`` it lies on the next day (equal: 24 hours)."""
    timezone: ZoneName = "UTC"

    @field_validator("opens", "closes")
    @classmethod
    def _is_clock(cls, value: str) -> str:
        return _clock(value).strftime("%H:%M")

    def covers(self, first: datetime, last: datetime) -> bool:
        """Return whether one window holds both moments (aware), the closing moment itself excluded."""
        return any(opens <= first and last < closes for opens, closes in self._around(first))

    def _around(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Yield the windows that may hold a moment: those that open on its local day and on the day before.

        An hour that summer time skips or repeats counts as the zone's own rules say (``fold=0``).
        """
        zone = ZoneInfo(self.timezone)
        opens, closes = _clock(self.opens), _clock(self.closes)
        today = moment.astimezone(zone).date()
        for day in (today - timedelta(days=1), today):
            if WEEKDAYS[day.weekday()] in self.weekdays:
                last = day if closes > opens else day + timedelta(days=1)
                yield (
                    datetime.combine(day, opens, zone).astimezone(UTC),
                    datetime.combine(last, closes, zone).astimezone(UTC),
                )


def _clock(text: str) -> time:
    hour, _, minute = text.partition(":")
    if not (hour.isdecimal() and (minute or "0").isdecimal() and int(hour) < 24 and int(minute or 0) < 60):
        raise ValueError(f"'{text}' is not a time of day such as 22:00")
    return time(int(hour), int(minute or 0))


class SuppressionRule(Config):
    """Which events are silenced, and why. Patterns are shell-like (``*``, ``?``, ``[ab]``)."""

    reason: str = Field(min_length=1, max_length=2_000)
    dataset: str | None = None
    """Name of one data set (null: all)."""
    series: str = "*"
    variate: str | None = None
    """Pattern of the variate ranked first: an event is silenced only where the blame lies."""
    score_below: float | None = Field(None, gt=0.0)
    """Only events whose peak score stays below this."""
    start: datetime | int | None = None
    end: datetime | int | None = None
    """First and last moment, both included, on the clock of the data: UTC times, or numbers where time is a number."""
    weekly: Weekly | None = None

    @field_validator("reason")
    @classmethod
    def _says_why(cls, value: str) -> str:
        value = value.replace("\r\n", "\n")
        if not value.strip():
            raise ValueError("say why in words: whoever finds the rule in a year must understand it")
        if "\x00" in value:  # no database keeps it; other control signs stand in stored rules, which go on silencing
            raise ValueError("say why in plain text, without NUL")
        return value.strip()

    @field_validator("start", "end", mode="before")
    @classmethod
    def _moment(cls, value: object) -> object:
        """Read a whole number as integer time, other text as an ISO time."""
        if not isinstance(value, str | int | date):
            return value
        integer = isinstance(value, int) or (isinstance(value, str) and reads_as_integer(value))
        try:
            return parse_time(value, integer=integer)
        except DataError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _consistent(self) -> SuppressionRule:
        kinds = {type(bound) for bound in (self.start, self.end) if bound is not None}
        if len(kinds) > 1:
            raise ValueError("start and end must both be times or both be numbers")
        if self.start is not None and self.end is not None and self.end < self.start:  # type: ignore[operator]
            raise ValueError(f"end {self.end} lies before start {self.start}")
        if self.weekly is not None and int in kinds:
            raise ValueError("a weekly window needs times, not numbers, for start and end")
        unbounded = self.start is None and self.end is None and self.weekly is None
        open_names = all(name is None or not name.strip("*?") for name in (self.series, self.variate))
        if unbounded and open_names and self.score_below is None:
            raise ValueError(
                "this would hide every event for ever; state a series pattern, a variate, score_below, or a time"
            )
        return self

    @property
    def kind(self) -> Literal["rule", "maintenance"]:
        """``maintenance`` where time bounds it, else ``rule``."""
        timed = self.start is not None or self.end is not None or self.weekly is not None
        return "maintenance" if timed else "rule"

    def silences(self, event: EventFacts) -> bool:
        """Return whether the rule covers an event."""
        if self.dataset is not None and self.dataset != event.dataset:
            return False
        if not fnmatchcase(event.series_id, self.series):
            return False
        if self.variate is not None and not (event.variate is not None and fnmatchcase(event.variate, self.variate)):
            return False
        if self.score_below is not None and not (event.peak_score is not None and event.peak_score < self.score_below):
            return False
        return self._at(event.start, event.end)

    def _at(self, first: datetime | int, last: datetime | int) -> bool:
        """Return whether the span lies inside the bounds; times and numbers never compare, so they do not match."""
        if isinstance(first, datetime) and isinstance(last, datetime):
            if isinstance(self.start, int) or isinstance(self.end, int):
                return False
            inside = (self.start is None or self.start <= first) and (self.end is None or last <= self.end)
            return inside and (self.weekly is None or self.weekly.covers(first, last))
        if isinstance(first, datetime) or isinstance(last, datetime) or self.weekly is not None:
            return False
        if isinstance(self.start, datetime) or isinstance(self.end, datetime):
            return False
        return (self.start is None or self.start <= first) and (self.end is None or last <= self.end)


@dataclass(frozen=True, kw_only=True)
class EventFacts:
    """What a rule looks at: times are aware, or numbers; ``variate`` is the one ranked first."""

    dataset: str
    series_id: str
    start: datetime | int
    end: datetime | int
    peak_score: float | None
    variate: str | None


def control_signs(text: str) -> list[str]:
    """Return the control signs of a text but line breaks and tabs: a terminal that shows them would obey."""
    return [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"]


def silenced_by(event: EventFacts, rules: Sequence[tuple[int, SuppressionRule]]) -> int | None:
    """Return the number of the first rule that covers an event, None if none does."""
    return next((number for number, rule in rules if rule.silences(event)), None)
