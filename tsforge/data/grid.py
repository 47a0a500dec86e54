"""Regular time grids: frequencies, the absolute index of a time, and inference of the frequency from times.

A frequency is a polars offset of one unit: ``us ms s m h d w mo q y`` for datetimes, ``i`` for integer time. Datetimes
are UTC with microseconds, so that ``1d`` is always 24 hours; months follow the calendar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, lru_cache
from typing import Any, TypeAlias, overload

import numpy as np
import polars as pl

from tsforge.core.errors import ConfigError, DataError, nearest

TIME_DTYPE = pl.Datetime("us", "UTC")
TimeLike: TypeAlias = datetime | date | int | str
Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECONDS = {
    "w": 604_800_000_000,
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
    "us": 1,
}
_MONTHS = {"y": 12, "q": 3, "mo": 1}
_WORDS = {
    "hourly": "1h",
    "daily": "1d",
    "weekly": "1w",
    "monthly": "1mo",
    "H": "1h",
    "D": "1d",
    "min": "1m",
    "MS": "1mo",
}
_SHORTEST_MONTH = 28 * _MICROSECONDS["d"]
_SECOND_STEP_SHARE = 0.25  # a rival step above this share (and count) means two frequencies rather than gaps
_SECOND_STEP_COUNT = 10
_SHOWN_SIGNS = 40  # of text that is no time, in messages


@dataclass(frozen=True)
class Frequency:
    """A parsed frequency: ``count`` of ``kind`` (``"fixed"`` in microseconds, ``"month"`` or ``"integer"``)."""

    count: int
    kind: str

    @property
    def is_whole_days(self) -> bool:
        """Whether a step is a day, several or calendar months, so that a row stands for a date."""
        return self.kind == "month" or (self.kind == "fixed" and self.count % _MICROSECONDS["d"] == 0)

    @property
    def text(self) -> str:
        """The shortest offset string with this meaning; ``60m`` and ``1h`` share one."""
        if self.kind == "integer":
            return f"{self.count}i"
        units = _MONTHS if self.kind == "month" else _MICROSECONDS
        unit = next(name for name, size in units.items() if self.count % size == 0)
        return f"{self.count // units[unit]}{unit}"


def parse_freq(text: str) -> Frequency:
    """Return the meaning of an offset string such as ``15m``, ``1mo`` or ``1i``.

    Raises:
        ConfigError: not a positive count with one known unit.
    """
    found = _parsed(text) if isinstance(text, str) else None
    if found is not None:
        return found
    hint = (
        f"; did you mean '{_WORDS[text]}'?" if text in _WORDS else nearest(str(text), ["1h", "15m", "1d", "1w", "1mo"])
    )
    raise ConfigError(
        f"freq '{text}' is not a frequency{hint}; write a count and one unit of us ms s m h d w mo q y (or i for "
        "integer time), for example 15m, 1h, 1d, 1mo, 1i"
    )


@lru_cache(maxsize=256)
def _parsed(text: str) -> Frequency | None:
    """Return the meaning of an offset string, None where it has none; asked for with every row of a stream."""
    match = re.fullmatch(r"([1-9]\d*)([a-z]+)", text)
    count, unit = (int(match[1]), match[2]) if match else (0, "")
    if unit == "i":
        return Frequency(count, "integer")
    if unit in _MONTHS:
        return Frequency(count * _MONTHS[unit], "month")
    if unit in _MICROSECONDS:
        return Frequency(count * _MICROSECONDS[unit], "fixed")
    return None


def canonical_freq(text: str) -> str:
    """Return the shortest string for a frequency, so that equal frequencies compare equal (``60m`` -> ``1h``)."""
    return parse_freq(text).text


def normalise_time(times: pl.Series) -> pl.Series:
    """Return times as ``Datetime("us", "UTC")`` (dates and zone-less datetimes are taken as UTC) or ``Int64``.

    Raises:
        DataError: another type, or nanoseconds that microseconds cannot hold.
    """
    kind = times.dtype
    if kind.is_integer():
        return times.cast(pl.Int64)
    if kind == pl.Date:
        return times.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if not isinstance(kind, pl.Datetime):
        sample = times.drop_nulls().head(1).to_list()
        raise DataError(
            f"time column '{times.name}' has type {kind} (first value: {sample[0] if sample else None!r}); "
            "give datetimes, dates or integers"
        )
    if kind.time_unit == "ns":
        lost = int((times.to_physical() % 1000 != 0).sum())
        if lost:
            raise DataError(
                f"{lost} of {times.len()} values of time column '{times.name}' have a fraction below one microsecond; "
                "round them or use integer time"
            )
    plain = times.dt.replace_time_zone("UTC") if kind.time_zone is None else times.dt.convert_time_zone("UTC")
    return plain.cast(TIME_DTYPE)


def parse_time(value: TimeLike, *, integer: bool) -> datetime | int:
    """Return one time as the grid holds it: an aware UTC datetime, or an integer of 64 bits.

    Args:
        value: a datetime or date (zone-less: UTC), an ISO 8601 string, or an integer; blanks around text do not count.
        integer: whether the grid counts integers.

    Raises:
        DataError: the value is of the other kind, no ISO date, or further away than UTC or 64 bits reach.
    """
    return _parse_integer(value) if integer else parse_moment(value)


def parse_moment(value: TimeLike) -> datetime:
    """Return one time of the calendar, aware and in UTC (what it may be, and errors: ``parse_time``)."""
    given = value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError as error:
            raise DataError(f"time '{value}' is not an ISO date such as 2013-01-31T06:00") from error
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise DataError(f"time {value!r} is not a date, but the data has datetimes")
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as error:
        raise DataError(f"time '{given}' lies outside the years 1 to 9999 of UTC") from error


def _parse_integer(value: TimeLike) -> int:
    try:
        number = None if isinstance(value, date | bool) else int(value)
    except (ValueError, OverflowError):  # text, nan; inf
        number = None
    if number is None:
        shown = str(value)
        shown = shown if len(shown) <= _SHOWN_SIGNS else f"{shown[:_SHOWN_SIGNS]}..."
        raise DataError(f"time '{shown}' is not an integer, but the data has integer time")
    if not -(2**63) <= number < 2**63:
        raise DataError(f"time {number} does not fit 64 bits; use integers below 2^63")
    return number


def reads_as_integer(text: str) -> bool:
    """Return whether text is a whole number rather than a date, where the kind of time is not known otherwise."""
    return re.fullmatch(r"\s*-?\d+\s*", text) is not None


def time_number(time: TimeLike, *, integer: bool) -> int:
    """Return a time as a database keeps it: microseconds since 1970, or the integer itself.

    Raises:
        DataError: as ``parse_time``.
    """
    value = parse_time(time, integer=integer)
    return value if isinstance(value, int) else (value - _EPOCH) // timedelta(microseconds=1)


def show_time(value: object) -> str:
    """Return a time the way messages print it: minutes unless seconds matter, zone left out because it is UTC."""
    if not isinstance(value, datetime):
        return str(value)
    text = value.replace(tzinfo=None).isoformat(sep=" ")
    return text.removesuffix(":00")


def _physical(times: pl.Series) -> Ints:
    values: Ints = times.to_physical().cast(pl.Int64).to_numpy()
    return values


def _month_parts(micros: Ints) -> tuple[Ints, Ints, Ints]:
    """Split microseconds since 1970 into months since 1970, day of the month from 0, microseconds of the day."""
    days = np.floor_divide(micros, _MICROSECONDS["d"])
    months = days.astype("datetime64[D]").astype("datetime64[M]")
    first = months.astype("datetime64[D]").astype(np.int64)
    return months.astype(np.int64), days - first, micros - days * _MICROSECONDS["d"]


def _last_days(months: Ints) -> Ints:
    """Return the day of the month from 0 on which each month ends."""
    starts = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    ends: Ints = (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    return ends - starts - 1


def month_day(times: pl.Series) -> int:
    """Return the day of the month that monthly times stand for: 31 when all end their month, else the latest."""
    months, days, _ = _month_parts(_physical(normalise_time(times.drop_nulls())))
    return 31 if np.array_equal(days, _last_days(months)) else int(days.max()) + 1


@dataclass(frozen=True)
class TimeGrid:
    """A regular grid: step ``k`` lies at ``origin + k * freq``.

    Attributes:
        origin: time of index 0, an aware UTC datetime, or an integer with ``freq`` in ``i``.
        freq: the step, see the module.
        month_day: day on which monthly steps fall, the last day in shorter months (31: always the last); by default
            the origin's day. Of no meaning for other steps.

    Raises:
        ConfigError: ``origin`` and ``freq`` are of different kinds, or the origin does not fall on ``month_day``.
    """

    origin: datetime | int
    freq: str
    month_day: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "freq", canonical_freq(self.freq))
        if self.is_integer != (isinstance(self.origin, int) and not isinstance(self.origin, bool)):
            raise ConfigError(f"a grid with freq '{self.freq}' cannot start at {self.origin!r}")
        if isinstance(self.origin, datetime):
            object.__setattr__(self, "origin", parse_time(self.origin, integer=False))
        if parse_freq(self.freq).kind != "month" or not isinstance(self.origin, datetime):
            object.__setattr__(self, "month_day", None)
            return
        day = self.origin.day if self.month_day is None else self.month_day
        object.__setattr__(self, "month_day", day)
        if not 1 <= day <= 31 or self._values_at(np.zeros(1, dtype=np.int64))[0] != self._origin_value:
            raise ConfigError(f"a monthly grid on day {day} cannot start at {show_time(self.origin)}")

    @property
    def is_integer(self) -> bool:
        """Whether times are plain integers."""
        return parse_freq(self.freq).kind == "integer"

    @cached_property
    def _origin_value(self) -> int:
        if isinstance(self.origin, int):
            return self.origin
        return (self.origin - _EPOCH) // timedelta(microseconds=1)

    def _values_at(self, index: Ints) -> Ints:
        step = parse_freq(self.freq)
        if step.kind != "month":
            return self._origin_value + index * step.count
        (month,), _, (rest,) = _month_parts(np.array([self._origin_value], dtype=np.int64))
        months = month + index * step.count
        days = np.minimum((self.month_day or 31) - 1, _last_days(months))
        starts = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
        values: Ints = (starts + days) * _MICROSECONDS["d"] + rest
        return values

    def _floor(self, values: Ints) -> Ints:
        """Return the index of the last grid time at or before each value."""
        step = parse_freq(self.freq)
        if step.kind != "month":
            below: Ints = np.floor_divide(values - self._origin_value, step.count)
            return below
        months = _month_parts(values)[0] - _month_parts(np.array([self._origin_value], dtype=np.int64))[0]
        index: Ints = np.floor_divide(months, step.count)
        return index - (self._values_at(index) > values)

    def _times(self, times: pl.Series) -> pl.Series:
        plain = normalise_time(times)
        if plain.dtype.is_integer() != self.is_integer:
            raise DataError(
                f"time column '{times.name}' has type {times.dtype}, which does not fit freq '{self.freq}'; "
                f"use {'a freq such as 1i' if plain.dtype.is_integer() else 'a freq such as 1h'}"
            )
        if plain.null_count():
            raise DataError(f"{plain.null_count()} of {plain.len()} times of column '{times.name}' are missing")
        return plain

    def locate(self, times: pl.Series) -> tuple[Ints, Bools]:
        """Return the index at or before each time [N], and whether the time lies exactly on the grid [N].

        Raises:
            DataError: times are missing or of the other kind.
        """
        values = _physical(self._times(times))
        index = self._floor(values)
        return index, self._values_at(index) == values

    def index_of(self, times: pl.Series) -> Ints:
        """Return the absolute index of each time [N] (negative before the origin).

        Raises:
            DataError: a time lies off the grid.
        """
        index, fits = self.locate(times)
        if not fits.all():
            off = times.filter(pl.Series(~fits))
            raise DataError(
                f"{off.len()} of {times.len()} times lie off the grid of step {self.freq} from "
                f"{show_time(self.origin)} (first: {show_time(off[0])}); resample the data or give the freq it has"
            )
        return index

    def index_of_values(self, values: Ints) -> Ints | None:
        """Return the absolute index of each time [N] given as microseconds since 1970 (UTC) or integers.

        None where a time lies off the grid, or the step is a month: ``index_of`` then says what is wrong.
        """
        step = parse_freq(self.freq)
        if step.kind == "month":
            return None
        index: Ints
        index, rest = np.divmod(values - self._origin_value, step.count)
        return None if rest.any() else index

    def floor(self, time: TimeLike) -> int:
        """Return the index of the last grid time at or before ``time``."""
        value = parse_time(time, integer=self.is_integer)
        series = pl.Series([value], dtype=pl.Int64 if self.is_integer else TIME_DTYPE)
        return int(self.locate(series)[0][0])

    @overload
    def time_at(self, index: int | np.integer[Any]) -> datetime | int: ...

    @overload
    def time_at(self, index: Ints) -> pl.Series: ...

    def time_at(self, index: Ints | int | np.integer[Any]) -> pl.Series | datetime | int:
        """Return the time of an index: a series named ``time`` for an array, a datetime or integer for one index."""
        values = self._values_at(np.atleast_1d(np.asarray(index, dtype=np.int64)))
        series = pl.Series("time", values, dtype=pl.Int64)
        if not self.is_integer:
            series = series.cast(TIME_DTYPE)
        if isinstance(index, np.ndarray):
            return series
        single: datetime | int = series[0]
        return single if isinstance(single, int) else single.astimezone(UTC)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that ``from_dict`` reads back."""
        origin = self.origin if isinstance(self.origin, int) else self.origin.isoformat()
        return {"origin": origin, "freq": self.freq, "month_day": self.month_day}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TimeGrid:
        """Return the grid that ``to_dict`` described."""
        origin = values["origin"]
        return cls(
            origin if isinstance(origin, int) else datetime.fromisoformat(origin),
            values["freq"],
            values.get("month_day"),
        )


def _show_step(step: int, *, integer: bool, months: bool = False) -> str:
    return Frequency(step, "integer" if integer else "month" if months else "fixed").text


def _sorted_steps(values: Ints, groups: pl.Series | None) -> pl.DataFrame:
    """Return the distinct steps between neighbours of each group and their counts, most frequent first."""
    table = pl.DataFrame({"value": values})
    if groups is not None:
        table = table.with_columns(group=groups)
        table = table.sort("group", "value").with_columns(
            step=pl.when(pl.col("group") == pl.col("group").shift()).then(pl.col("value").diff())
        )
    else:
        table = table.sort("value").with_columns(step=pl.col("value").diff())
    steps = table.filter(pl.col("step") > 0).group_by("step").len("count")
    return steps.sort("count", "step", descending=[True, False])


def describe_steps(times: pl.Series, groups: pl.Series | None = None) -> str:
    """Return the two most frequent steps with their counts, for messages: ``"1h (6 times) and 30m (4 times)"``."""
    plain = normalise_time(times.drop_nulls())
    keep = groups.filter(times.is_not_null()) if groups is not None else None
    steps = _sorted_steps(_physical(plain), keep)
    parts = [
        f"{_show_step(step, integer=plain.dtype.is_integer())} ({count} times)"
        for step, count in steps.head(2).iter_rows()
    ]
    return " and ".join(parts) if parts else "none"


def infer_freq(times: pl.Series, groups: pl.Series | None = None) -> str:
    """Return the frequency of regular times: the most frequent step, if all others are its multiples (gaps).

    Args:
        times: datetimes, dates or integers in any order; repeats count once.
        groups: series of each time; steps are only taken inside a series.

    Raises:
        DataError: fewer than two different times in every series, steps that are no multiples of the most frequent
            one, or a second step so common that the data has two frequencies.
    """
    if times.null_count():
        raise DataError(f"{times.null_count()} of {times.len()} times of column '{times.name}' are missing")
    plain = normalise_time(times)
    values = _physical(plain)
    integer = plain.dtype.is_integer()
    steps = _sorted_steps(values, groups)
    if steps.is_empty():
        raise DataError(
            f"cannot infer the frequency from {times.len()} row(s): no series has two different times; give freq"
        )
    months = False
    if not integer and steps["step"][0] >= _SHORTEST_MONTH:
        number, day, rest = _month_parts(values)
        same_day = np.array_equal(day, np.minimum(day.max(), _last_days(number)))
        if same_day and len(np.unique(rest)) == 1:
            months, steps = True, _sorted_steps(number, groups)
    modal = int(steps["step"][0])
    rival = int(steps["count"][1]) if steps.height > 1 else 0
    total = int(steps["count"].sum())
    two = rival >= _SECOND_STEP_COUNT and rival > _SECOND_STEP_SHARE * total
    if two or bool((steps["step"] % modal != 0).any()):
        shown = " and ".join(
            f"{_show_step(step, integer=integer, months=months)} ({count} times)"
            for step, count in steps.head(2).iter_rows()
        )
        raise DataError(
            f"time column '{times.name}' has no single frequency: the most frequent of {steps.height} different steps "
            f"are {shown}; give freq to keep them as gaps of a finer grid, or resample"
        )
    return _show_step(modal, integer=integer, months=months)
