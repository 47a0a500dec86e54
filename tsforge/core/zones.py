"""Time zones by their IANA names."""

from __future__ import annotations

from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator

from tsforge.core.errors import ConfigError, nearest


def time_zone(name: str) -> ZoneInfo:
    """Return the IANA zone.

    Raises:
        ConfigError: no zone has that name.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        hint = nearest(name, available_timezones())
        raise ConfigError(f"unknown time zone '{name}'{hint}; use an IANA name such as Europe/Berlin or UTC") from error


def _known(name: str) -> str:
    try:
        time_zone(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


ZoneName = Annotated[str, AfterValidator(_known)]
"""Name of a time zone, such as Europe/Berlin; an unknown one is refused with the nearest."""
