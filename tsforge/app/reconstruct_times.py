"""Times of trajectories: which column holds them, where they break, and how far apart the rows are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import DataError, listing

_PLAIN = ("step", "time", "t")  # taken as they are
_NAMES = (*_PLAIN, "timestamp", "datetime", "date", "index")  # in any case of letters, where they read as times
_DOUBTFUL = ("T", "index", "INDEX", "Index")  # a temperature, an index of prices: only where rows are equally far apart
_PANDAS = re.compile(r"__index_level_\d+__")
_SECONDS = {"ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_BREAK = 1.5  # usual spacings from which a gap ends a trajectory
_UNEVEN = 0.01  # of the spacing
_MOST_BREAKS = 0.05  # share of gaps
_MOST_FALLS = 0.25
_WEEKEND = 5.0  # usual gaps that dates may leave out again and again, such as weekends and holidays
_SAME = 0.05  # intervals of two files that count as equal differ by less than this share
_FEW = 20  # rows from which a column can be told to be a clock


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock:
    """What the times of a table say.

    Attributes:
        breaks: (R,) rows that begin a trajectory.
        name: of the column.
        spacing: between two rows; None without times, or with one row a trajectory.
        is_date: the spacing is in seconds, of dates; else in the unit of the column.
    """

    breaks: NDArray[np.bool_]
    name: str
    spacing: float | None = None
    is_date: bool = False

    @property
    def is_count(self) -> bool:
        """Whether the times may only count the rows, and say nothing of the interval."""
        return self.spacing == 1.0 and not self.is_date


def find_clock(table: pl.DataFrame, taken: Iterable[str | None]) -> str | None:
    """Return the column of times by its name, else the only column of dates, else None.

    Args:
        taken: columns that are something else.
    """
    known = set(taken)
    free = [name for name in table.columns if name not in known]
    named = clock_names(table, free)
    if named:
        return named[0]
    dates = [name for name in free if table[name].dtype in (pl.Date, pl.Datetime)]
    return dates[0] if len(dates) == 1 else None


def clock_names(table: pl.DataFrame, columns: Iterable[str]) -> list[str]:
    """Return the columns that their name says are times, the likeliest first."""
    names = list(columns)
    found = [name for name in _PLAIN if name in names]
    others = [name for wanted in _NAMES for name in names if name.lower() == wanted and name not in found]
    others += [name for name in names if is_row_index(name)]
    others = [name for name in others if _may(table[name])]
    # a date says what it is, a letter hardly does
    return sorted(found + others, key=lambda name: 0 if name in _PLAIN[:2] else 2 - table[name].dtype.is_temporal())


def is_row_index(name: str) -> bool:
    """Whether pandas gave the column this name: an index of rows that had none."""
    return _PANDAS.fullmatch(name) is not None


def _may(values: pl.Series) -> bool:
    """Return whether values can be times: dates, or numbers that run on from row to row."""
    if _dates(values) is not None:
        return True
    if not values.dtype.is_numeric():
        return False
    gaps = np.diff(values.cast(pl.Float64).to_numpy())
    if not (gaps > 0).any() or float(np.mean(gaps > 0)) <= 1 - _MOST_FALLS:
        return False
    usual = float(np.median(gaps[gaps > 0]))
    if values.name in _DOUBTFUL:
        return float(np.mean(np.abs(gaps - usual) <= _SAME * usual)) > 1 - _MOST_BREAKS
    return float(np.mean(gaps > _BREAK * usual)) <= _MOST_BREAKS


def _dates(values: pl.Series) -> pl.Series | None:
    """Return dates, also those written as text or as integers such as 20240131; None where one of them is none."""
    if values.dtype.is_temporal():
        return values
    compact = _compact_dates(values)
    if compact is not None or values.dtype != pl.String:
        return compact
    try:
        return values.str.to_datetime(time_unit="us")
    except pl.exceptions.PolarsError:
        return None


def _compact_dates(values: pl.Series) -> pl.Series | None:
    """Return integers or digits such as 20240131 as dates, None where one of them is none.

    As numbers they would jump by 70 at the end of each month, and every month would be a trajectory.
    """
    if not (values.dtype.is_integer() or values.dtype == pl.String) or not len(values):
        return None
    text = values.cast(pl.String)
    if not text.str.contains(r"^(19|20)\d{6}$").all():
        return None
    dates = text.str.to_date("%Y%m%d", strict=False)
    return dates if dates.null_count() == values.null_count() else None


def read_clock(times: pl.Series, fresh: NDArray[np.bool_], file: str, notes: list[str]) -> Clock:
    """Return where trajectories begin and how far apart rows are; uneven times are noted.

    A gap ends a trajectory if it is longer than 1.5 usual ones, or if the times do not rise.

    Args:
        fresh: (R,) rows that begin a trajectory anyway.
        file: for messages.

    Raises:
        DataError: no times, missing ones, rows that are not sorted, or breaks everywhere.
    """
    values, seconds = _moments(times, file)
    gaps = np.diff(values)
    inside = gaps[~fresh[1:]]
    unit = "" if seconds is None else " s"
    scale = 1.0 if seconds is None else seconds
    if not len(inside):
        return Clock(breaks=fresh, name=times.name, is_date=seconds is not None)
    falls = float(np.mean(inside <= 0))
    if falls > _MOST_FALLS:
        way = "sort the file by it (of several series by their name first, see data.series)"
        if not (inside < 0).any():
            way = "it repeats where the rows go on"
        raise DataError(
            f"{file}: the column of times '{times.name}' does not rise in {falls:.0%} of the rows; {way}, name another "
            "column with data.step, or the variates with data.columns"
        )
    spacing = float(np.median(inside[inside > 0]))
    jumps = float(np.mean(inside > _BREAK * spacing))
    if jumps > _MOST_BREAKS and seconds is not None and not falls and inside.max() <= _WEEKEND * spacing:
        notes.append(
            f"the dates in '{times.name}' leave out up to {inside.max() / spacing - 1:.3g} of {spacing * scale:.6g} s "
            f"at {jumps:.0%} of the rows, as working days do; rows are taken as evenly spaced"
        )
        return Clock(breaks=fresh, name=times.name, spacing=spacing * scale, is_date=True)
    if jumps > _MOST_BREAKS:
        raise DataError(
            f"{file}: the times in '{times.name}' are uneven or not sorted: {jumps:.0%} of the gaps are longer than "
            f"{_BREAK} times the usual {spacing * scale:g}{unit}, and {falls:.0%} do not rise; sort the rows, bring "
            "them to one interval, or name a column that counts the rows with data.step"
        )
    breaks = fresh.copy()
    breaks[1:] |= (gaps <= 0) | (gaps > _BREAK * spacing)
    kept = gaps[~breaks[1:]]
    off = float(np.mean(np.abs(kept - spacing) > _UNEVEN * spacing))
    if off:
        extent = f"{kept.min() * scale:.6g} to {kept.max() * scale:.6g}"
        notes.append(
            f"the times in '{times.name}' are uneven: {off:.1%} of the gaps are not the usual "
            f"{spacing * scale:.6g}{unit} ({extent}); rows are taken as evenly spaced"
        )
        spacing = float(kept.mean())
    return Clock(breaks=breaks, name=times.name, spacing=spacing * scale, is_date=seconds is not None)


def _moments(times: pl.Series, file: str) -> tuple[NDArray[np.int64] | NDArray[np.float64], float | None]:
    """Return times as numbers, in their own integers where they are whole, and the seconds of one of dates."""
    missing = times.null_count()
    if missing:
        raise DataError(
            f"{file}: the column of times '{times.name}' has {missing} missing value(s); fill them, or name another "
            "column with data.step"
        )
    dates = _dates(times)
    if dates is None and times.dtype.is_numeric():
        dates = times
    if dates is None:
        raise DataError(f"{file}: the column of times '{times.name}' holds {times.dtype}, not numbers or dates")
    kind, seconds = dates.dtype, None
    if kind.is_temporal():
        seconds = 86_400.0 if kind == pl.Date else _SECONDS[getattr(kind, "time_unit", None) or "ns"]
        dates = dates.to_physical()
    try:
        values = dates.cast(pl.Int64 if dates.dtype.is_integer() else pl.Float64).to_numpy()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file}: the times in '{times.name}' are beyond the range of whole numbers") from error
    if not np.isfinite(values).all():
        raise DataError(f"{file}: the column of times '{times.name}' has values that are not finite; mend them")
    return values, seconds


def check_same_interval(train: Clock, every: int, test: Clock, test_every: int, file: str) -> None:
    """Refuse two files whose rows are not equally far apart.

    Columns that count the rows say nothing of it, nor do numbers beside dates.

    Raises:
        DataError: the intervals differ by more than 5 %.
    """
    if train.spacing is None or test.spacing is None or train.is_date != test.is_date:
        return
    if (train.is_count and test.is_count) or (train.name != test.name and (train.is_count or test.is_count)):
        return
    one, other = every * train.spacing, test_every * test.spacing
    if abs(one - other) > _SAME * max(one, other):
        raise DataError(
            f"rows that train are {one:.6g} apart (data.every={every}), those of {file} {other:.6g} "
            f"(data.test_every={test_every}): a model steps one interval; choose these two so that both are the same"
        )


def interval_note(spacing: float | None, is_date: bool, dt: float | None) -> str | None:
    """Return what to say of ``dt`` beside the interval of the rows that train, None for nothing.

    Args:
        spacing: after ``data.every``; in seconds where ``is_date``.
        dt: None where nobody set it.
    """
    if spacing is None:
        return None
    unit = " s" if is_date else ""
    if dt is None:
        return (
            f"rows are {spacing:.6g}{unit} apart: exponents and frequencies are per row; dt={spacing:.6g} makes them "
            f"per {'second' if is_date else 'unit of time'}"
        )
    if is_date or abs(dt - spacing) <= _SAME * max(dt, spacing):
        return None
    return f"dt={dt:g}, but rows are {spacing:.6g} apart in the column of times; exponents are per unit of dt"


def suspect_variates(table: pl.DataFrame, columns: Iterable[str], *, has_clock: bool) -> list[str]:
    """Return notes on variates that look like times or like names of trajectories."""
    clocks, names = [], []
    for name in columns:
        values = table[name].cast(pl.Float64).drop_nulls().to_numpy()
        values = values[np.isfinite(values)]
        if len(values) < _FEW:
            continue
        gaps = np.diff(values)
        usual = float(np.median(gaps))
        even = usual != 0 and float(np.mean(np.abs(gaps - usual) <= _SAME * abs(usual))) > 1 - _MOST_BREAKS
        if even or (gaps > 0).all() or (gaps < 0).all():
            clocks.append(name)
        elif (values == np.round(values)).all() and 0 < np.count_nonzero(gaps) < len(values) / _FEW:
            names.append(name)
    notes = []
    if clocks:
        way = "" if has_clock else f"data.step={clocks[0]} if it holds the times, "
        notes.append(
            f"taken as variates, but they run on from row to row as times do: {listing(clocks)}; {way}data.columns to "
            "leave it out"
        )
    if names:
        notes.append(
            f"taken as variates, but they are whole numbers that rarely change: {listing(names)}; "
            f"data.series={names[0]} if it names the trajectory of each row, data.columns to leave it out"
        )
    return notes
