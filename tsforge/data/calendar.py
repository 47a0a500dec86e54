"""Known covariates that follow from the time alone: clock and calendar as sine and cosine, holidays with windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any, Literal

import polars as pl
from pydantic import Field, field_validator, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.core.zones import ZoneName
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import parse_freq
from tsforge.data.schema import SeriesSchema

Feature = Literal["minute", "hour", "weekday", "month", "dayofyear", "weekend"]
PREFIX = "calendar."


class CalendarConfig(Config):
    """Which calendar features to append as known covariates; none by default."""

    features: tuple[Feature, ...] = ()
    """Each becomes a sine and a cosine of its phase (``weekend``: 0 or 1)."""
    timezone: ZoneName | None = None
    """Zone of the clock the features follow (``America/New_York``), daylight saving included; None = UTC."""
    holidays: str | None = None
    """Country code, or country and subdivision, of public holidays (``US``, ``DE-BY``)."""
    holiday_names: tuple[str, ...] = ()
    """One column for each of these holidays instead of one for all."""
    holiday_window: tuple[int, int] = Field(default=(0, 0))
    """First and last day offset around a holiday; every offset is a column of its own (``(-1, 2)`` gives four)."""

    @field_validator("holidays")
    @classmethod
    def _known_country(cls, value: str | None) -> str | None:
        if value is not None:  # told before it is stored with a data set, which then could not be read
            try:
                _country_days(value, range(0))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("features", "holiday_names")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names an entry twice: {listing(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> CalendarConfig:
        if self.holidays is None and (self.holiday_names or self.holiday_window != (0, 0)):
            raise ValueError("holiday_names and holiday_window need holidays, a country code")
        if not self.holiday_window[0] <= 0 <= self.holiday_window[1]:
            raise ValueError(f"holiday_window {self.holiday_window} must start at or before 0 and end at or after it")
        return self

    @property
    def is_empty(self) -> bool:
        """Whether no column would be added."""
        return not self.features and self.holidays is None


def add_calendar(frame: SeriesFrame, config: CalendarConfig) -> SeriesFrame:
    """Return the frame with the features as known columns (``calendar.hour.sin``), for future rows too.

    The clock is the local one of ``config.timezone``. Where a step is a day or longer a row stands for a date, which is
    taken as it is.

    Raises:
        DataError: integer time has no calendar.
        ConfigError: unknown holiday name, or a column of that name exists.
    """
    if config.is_empty:
        return frame
    check_calendar(config, frame.schema)
    table = frame.table
    times = _local(table["time"], frame.schema.freq, config.timezone)
    columns = [column for feature in config.features for column in _feature(times, feature)]
    if config.holidays is not None:
        columns += _holiday_columns(times.dt.date(), config)
    return frame.with_known(columns)


def check_calendar(config: CalendarConfig, schema: SeriesSchema) -> None:
    """Refuse features of times that are no dates.

    Raises:
        DataError: integer time has no calendar.
    """
    if schema.has_integer_time and not config.is_empty:
        raise DataError("integer time has no calendar; give datetimes or switch the calendar features off")


def calendar_columns(config: CalendarConfig) -> tuple[str, ...]:
    """Return the names of the columns that ``add_calendar`` appends, in order."""
    names: list[str] = []
    for feature in config.features:
        names += (
            [f"{PREFIX}{feature}"] if feature == "weekend" else [f"{PREFIX}{feature}.{part}" for part in ("sin", "cos")]
        )
    if config.holidays is not None:
        names += [
            _holiday_column(name, day) for name in config.holiday_names or ("holiday",) for day in _window(config)
        ]
    return tuple(names)


def _local(times: pl.Series, freq: str, timezone: str | None) -> pl.Series:
    if timezone is None or parse_freq(freq).is_whole_days:
        return times
    return times.dt.convert_time_zone(timezone)


def _feature(times: pl.Series, feature: Feature) -> list[pl.Series]:
    """Return the columns of one feature; phases run from 0 at the start of the cycle to 1 at its end."""
    clock = times.dt
    if feature == "weekend":
        return [(clock.weekday() >= 6).cast(pl.Float64).alias(f"{PREFIX}weekend")]
    seconds = clock.minute().cast(pl.Float64) * 60 + clock.second()
    if feature == "minute":
        phase = seconds / 3600
    elif feature == "hour":
        phase = (clock.hour().cast(pl.Float64) * 3600 + seconds) / 86400
    elif feature == "weekday":
        phase = (clock.weekday().cast(pl.Float64) - 1) / 7
    elif feature == "month":
        phase = (clock.month().cast(pl.Float64) - 1) / 12
    else:
        phase = (clock.ordinal_day().cast(pl.Float64) - 1) / (365 + clock.is_leap_year().cast(pl.Float64))
    angle = phase * (2 * math.pi)
    return [angle.sin().alias(f"{PREFIX}{feature}.sin"), angle.cos().alias(f"{PREFIX}{feature}.cos")]


def _window(config: CalendarConfig) -> range:
    return range(config.holiday_window[0], config.holiday_window[1] + 1)


def _holiday_column(name: str, day: int) -> str:
    return f"{PREFIX}{name}" + (f"{day:+d}" if day else "")


def _holiday_columns(dates: pl.Series, config: CalendarConfig) -> list[pl.Series]:
    first, last = dates.dt.year().min(), dates.dt.year().max()
    # a year more on both sides for windows that cross New Year
    found = _country_days(config.holidays or "", range(first - 1, last + 2))  # type: ignore[arg-type,operator]
    groups: dict[str, list[date]] = {}
    if not config.holiday_names:
        groups["holiday"] = list(found)
    for wanted in config.holiday_names:
        # several holidays on one day are joined by "; " in the calendar
        groups[wanted] = [day for day, names in found.items() if wanted in names.split("; ")]
        if not groups[wanted]:
            known = sorted({name for names in found.values() for name in names.split("; ")})
            hint = nearest(wanted, known)
            raise ConfigError(
                f"'{wanted}' is no holiday of {config.holidays} in these years{hint} (known: {listing(known, 20)})"
            )
    return [
        dates.is_in([day + timedelta(days=offset) for day in days])
        .cast(pl.Float64)
        .alias(_holiday_column(name, offset))
        for name, days in groups.items()
        for offset in _window(config)
    ]


def _country_days(code: str, years: range) -> Mapping[date, str]:
    """Return the public holidays of a country.

    Raises:
        ConfigError: unknown country or subdivision.
    """
    import holidays

    country, _, subdivision = code.partition("-")
    try:
        found: Any = holidays.country_holidays(country, subdiv=subdivision or None, years=years)
    except NotImplementedError as error:
        known = holidays.list_supported_countries()
        choices = known.get(country)
        if choices is None:
            raise ConfigError(f"no holidays are known for country '{country}'{nearest(country, known)}") from error
        raise ConfigError(
            f"'{subdivision}' is no subdivision of {country}{nearest(subdivision, choices)} "
            f"(known: {listing(choices, 20)})"
        ) from error
    return dict(found)
