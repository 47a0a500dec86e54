"""Durations as settings write them: counts with units of ``us ms s m h d w mo q y``, several in a row (``2h30m``)."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

import polars as pl
from pydantic import AfterValidator

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.grid import parse_freq

_DAYS = {
    **{"us": 1 / 86_400_000_000, "ms": 1 / 86_400_000, "s": 1 / 86_400, "m": 1 / 1440, "h": 1 / 24, "d": 1.0, "w": 7.0},
    **{"mo": 31.0, "q": 92.0, "y": 366.0},
}
_PART = re.compile(rf"(\d+)({'|'.join(sorted(_DAYS, key=len, reverse=True))})")
_MOST_DAYS = 366_000.0  # a thousand years: longer than anybody means, and times can still be moved by it


def _days(text: str) -> float | None:
    """Return about how long a duration is, None where the text is none."""
    if not re.fullmatch(rf"({_PART.pattern})+", text):
        return None
    return sum(float(count) * _DAYS[unit] for count, unit in _PART.findall(text))


def _span(text: str) -> str:
    days = _days(text)
    if days is None or not 0 < days <= _MOST_DAYS:
        raise ValueError(f"'{text}' is not a duration such as 6h, 7d or 1mo, of at most a thousand years")
    return text


def _shift(text: str) -> str:
    days = _days(text.removeprefix("-"))
    if days is None or days > _MOST_DAYS:
        raise ValueError(f"'{text}' is not a duration such as -1h or 15m, of at most a thousand years")
    return text


def check_delay(text: str) -> None:
    """Refuse what is no duration from zero on: ``2d``, ``0d``, and ``2i`` for integer time.

    Raises:
        ValueError: it is none, or longer than a thousand years.
    """
    days = 0.0 if re.fullmatch(r"\d{1,9}i", text) else _days(text)
    if days is None or days > _MOST_DAYS:
        raise ValueError(f"'{text}' is not a duration such as 2d (2i for integer time), of at most a thousand years")


def _step(text: str) -> str:
    try:
        parse_freq(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


Span = Annotated[str, AfterValidator(_span)]
"""A duration above zero: 6h, 7d, 1mo."""
Shift = Annotated[str, AfterValidator(_shift)]
"""A duration in either direction: -1h."""
Step = Annotated[str, AfterValidator(_step)]
"""A frequency (``data.grid``): 15m, 1h, 1mo; 1i for integer time."""


def before(moment: datetime, span: str) -> datetime:
    """Return the moment one span (``6h``, ``7d``, ``1mo``) earlier, by the calendar.

    Raises:
        DataError: the span is not a duration above zero, or reaches back beyond the year 1.
    """
    try:
        earlier: datetime = pl.select(pl.lit(moment).dt.offset_by(f"-{_span(span)}")).item()
    except (ValueError, OverflowError) as error:
        raise DataError(str(error)) from error
    return earlier
