"""Data as it was known at a moment: values that were published late, and revised.

A *vintage* is one publication of a cell (series, time, column). ``VintageFrame`` keeps all; ``as_of(moment)`` is
the ``SeriesFrame`` of what was out by then, so nothing later can reach whoever gets it. Real-time data in this sense:
Croushore and Stark (2001), Journal of Econometrics 105(1):111-130; that a model should be fitted on what was known at
each date in the sample, not on the last vintage: Koenig, Dolmas and Piger (2003), Review of Economics and Statistics
85(3):618-628.

A forecast whose last visible row is r is made at the *moment of r*: its time, plus the delay with which its targets are
published, where one is declared. A covariate of the past with a longer delay is moved down by as many rows as it comes
later: row r then holds the newest value that is known when the targets of row r are. That is exact in every window,
in training as in forecasting, and for closed-form fits too, which see no windows; masking the newest rows of a context
instead would leave a closed form with weights on values that no forecast has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import (
    TIME_DTYPE,
    Bools,
    Ints,
    TimeGrid,
    TimeLike,
    normalise_time,
    parse_time,
    show_time,
    time_number,
)
from tsforge.data.schema import SeriesSchema

KEYS = ("series_id", "time", "published")
_CYCLE = 61  # grid rows that see every length of month, a leap year among them

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
History: TypeAlias = "SeriesFrame | VintageFrame"


@dataclass(frozen=True)
class Delays:
    """How much later than its time a value is published.

    Attributes:
        targets: of all targets, a duration, or None.
        past: rows by which covariates of the past come later than the targets (only those above 0).
    """

    targets: str | None = None
    past: Mapping[str, int] | None = None

    @classmethod
    def of(
        cls, setting: str | Mapping[str, str] | None, schema: SeriesSchema, grid: TimeGrid, *, strict: bool = True
    ) -> Delays:
        """Return the delays of a data set.

        Args:
            setting: one duration for all targets and covariates of the past, or one by column.
            schema, grid: of the data set.
            strict: refuse columns that the schema lacks; False where it holds a part of the data set only.

        Raises:
            DataError: a column is unknown or known ahead, targets of several delays, or a unit that does not fit the
                time.
        """
        if not setting:
            return cls()
        named = dict.fromkeys((*schema.targets, *schema.past), setting) if isinstance(setting, str) else setting
        wrong = [name for name in named if name not in (*schema.targets, *schema.past)]
        ahead = [name for name in wrong if name in (*schema.known, *schema.static)]
        if ahead:
            raise DataError(
                f"publication_delay: {listing(ahead)} is known ahead by its role and cannot be late; make it a past "
                "covariate, or keep its publication times with published"
            )
        if wrong and strict:
            have = listing((*schema.targets, *schema.past), 20)
            raise DataError(f"publication_delay: no target or past covariate {listing(wrong)} (there are: {have})")
        of_targets = {named.get(name) for name in schema.targets}
        if len(of_targets) > 1:
            shown = listing(f"{name}: {named.get(name, 'none')}" for name in schema.targets)
            raise DataError(
                f"publication_delay: targets are forecast together from one moment, so all need one delay ({shown}); "
                "give the longest for all of them"
            )
        target = next(iter(of_targets))
        past = {name: _rows_late(named[name], target, grid) for name in schema.past if name in named}
        return cls(target, {name: rows for name, rows in past.items() if rows})

    def shift(self, frame: SeriesFrame) -> SeriesFrame:
        """Return the frame with its late covariates moved down: each row holds the newest value known at its moment."""
        late = {name: rows for name, rows in (self.past or {}).items() if name in frame.schema.past}
        if not late:
            return frame
        moved = (pl.col(name).shift(rows).over("series_id") for name, rows in late.items())
        return SeriesFrame._trusted(frame.table.with_columns(moved), frame.schema, frame.static, frame.grid)


def _rows_late(delay: str, target: str | None, grid: TimeGrid) -> int:
    """Return how many rows later than the targets a column comes, at most (months differ in length)."""
    rows = np.arange(_CYCLE + 1)
    times = grid.time_at(rows)
    out, moments = physical(later(times, delay)), physical(later(times, target))
    reach = max(0, int((out - moments).max() // np.diff(physical(times)).min()) + 2)
    moments = physical(later(grid.time_at(np.arange(_CYCLE + 1 + reach)), target))
    return max(0, int((np.searchsorted(moments, out) - rows).max()))


def later(times: pl.Series, delay: str | None) -> pl.Series:
    """Return times moved by a duration (``2d``; ``3i`` for integer time).

    Raises:
        DataError: a duration of the other kind of time.
    """
    if not delay:
        return times
    whole = re.fullmatch(r"(-?\d+)i", delay)
    if times.dtype.is_integer() != (whole is not None):
        kind = "integers: give rows such as 2i" if times.dtype.is_integer() else "datetimes: give a span such as 2h"
        raise DataError(f"publication_delay {delay} does not fit times that are {kind}")
    return times + int(whole[1]) if whole else times.dt.offset_by(delay)


def physical(times: pl.Series) -> Ints:
    """Return times as int64: microseconds since 1970, or integer time."""
    values: Ints = times.to_physical().cast(pl.Int64).to_numpy()
    return values


@dataclass(frozen=True, eq=False)
class Column:
    """Publications of one column, by row and then time of publication.

    Attributes:
        row: int64 [M], row of ``VintageFrame.rows``.
        published: int64 [M].
        value: [M], NaN = published, but not to be seen.
        starts: int64 [K + 1], where the publications of each row that has any begin.
        rows: int64 [K], these rows.
    """

    row: Ints
    published: Ints
    value: Floats
    starts: Ints
    rows: Ints

    @classmethod
    def of(cls, row: Ints, published: Ints, value: Floats) -> Column:
        """Return the column of sorted publications."""
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        return cls(row, published, value, np.append(starts, len(row)), row[starts])

    def at(self, moment: int | None, num_rows: int) -> Floats:
        """Return [num_rows]: the last value published by ``moment`` (None = ever) in each row, NaN where none was."""
        result = np.full(num_rows, np.nan)
        first, stop = self.starts[:-1], self.starts[1:]
        if moment is not None:
            seen = np.concatenate([[0], np.cumsum(self.published <= moment)])
            stop = first + seen[stop] - seen[first]  # sorted by publication: what is out comes first
        some = stop > first
        result[self.rows[some]] = self.value[stop[some] - 1]
        return result

    def first(self, num_rows: int) -> Floats:
        """Return [num_rows]: the first value that was ever published of each row."""
        result = np.full(num_rows, np.nan)
        result[self.rows] = self.value[self.starts[:-1]]
        return result

    def until(self, moment: int) -> Column:
        """Return the publications up to a moment."""
        out = self.published <= moment
        return Column.of(self.row[out], self.published[out], self.value[out])


class VintageFrame:
    """All publications of one or many series on one grid.

    Args:
        table: ``series_id, time, published`` and ``schema.columns``; one row a publication. A missing value says
            nothing about its cell.
        schema: roles and frequency.
        static: as in ``SeriesFrame``.
        require_targets: refuse a target column without any value.
        delays: of the data set; late covariates are moved down by their rows.

    Raises:
        DataError: what ``SeriesFrame`` refuses; publication times that are missing or of another kind than the times;
            the same publication twice; targets or covariates of the past published before their time.
    """

    def __init__(
        self,
        table: pl.DataFrame,
        schema: SeriesSchema,
        static: pl.DataFrame | None = None,
        *,
        require_targets: bool = True,
        delays: Delays | None = None,
    ) -> None:
        if "published" not in table.columns:
            raise DataError(f"the table lacks the column published (it has {listing(table.columns, 20)})")
        missing = table["published"].null_count()
        if missing:
            raise DataError(f"{missing} of {table.height} rows have no publication time; repair or drop them")
        keys = SeriesFrame(table.unique(["series_id", "time"]), schema, static, require_targets=False)
        empty_rows = keys.table.with_columns(pl.lit(None, pl.Float64).alias(name) for name in schema.columns)
        self._skeleton = SeriesFrame._trusted(empty_rows, schema, keys.static, keys.grid)
        self._delays = delays or Delays()
        self._calendar: CalendarConfig | None = None
        self._extend = 0
        self._limit: int | None = None
        plain = table.with_columns(pl.col(schema.columns).cast(pl.Float64).fill_nan(None)).select(
            *KEYS, *schema.columns
        )
        published, time = normalise_time(plain["published"]), normalise_time(plain["time"])
        if published.dtype != time.dtype:
            kind = "integers" if published.dtype.is_integer() else "datetimes"
            raise DataError(f"publication times are {kind}, the times are not; give both on one clock")
        self._table = plain.with_columns(pl.col("series_id").cast(pl.String), time, published).sort(KEYS)
        self._check(schema)
        rows, out = self._positions(), physical(self._table["published"])
        self._columns = {name: self._column(name, rows, out) for name in schema.columns}
        if require_targets:
            empty = [name for name in schema.targets if not np.isfinite(self._columns[name].value).any()]
            if empty:
                raise DataError(f"target column(s) {listing(empty)} hold no value in any of {plain.height} rows")

    def _check(self, schema: SeriesSchema) -> None:
        table = self._table
        twice = table.select(pl.struct(KEYS).is_duplicated()).to_series()
        if twice.any():
            raise DataError(
                f"{int(twice.sum())} of {table.height} rows share series, time and publication time with another "
                f"(first: {_place(table.filter(twice))}); keep one of them, or choose a duplicate policy such as last"
            )
        hidden = [*schema.targets, *schema.past]
        any_value = pl.any_horizontal(pl.col(hidden).is_not_null())
        early = table.filter((pl.col("published") < pl.col("time")) & any_value)
        if early.height:
            raise DataError(
                f"{early.height} of {table.height} rows hold targets or past covariates published before their time "
                f"(first: {_place(early)}); what is published ahead is a known covariate, else repair the times"
            )
        for name in schema.columns:
            infinite = table.filter(pl.col(name).is_infinite())
            if infinite.height:
                raise DataError(
                    f"column '{name}' has {infinite.height} infinite value(s) (first: {_place(infinite)}); replace "
                    "them by missing values"
                )

    def _positions(self) -> Ints:
        """Return of each row of the table its row in the skeleton."""
        codes = self._table["series_id"].rle_id().to_numpy().astype(np.int64)
        index = self._skeleton.grid.index_of(self._table["time"])
        rows: Ints = self._skeleton.indptr[codes] + index - self._skeleton.offset[codes]
        return rows

    def _column(self, name: str, rows: Ints, published: Ints) -> Column:
        value = self._table[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        given = ~np.isnan(value)
        late = (self._delays.past or {}).get(name, 0)
        if late:
            indptr = self._skeleton.indptr
            stop = indptr[np.searchsorted(indptr, rows, side="right")]  # the end of each row's series
            given = given & (rows + late < stop)
        return Column.of(rows[given] + late, published[given], value[given])

    @property
    def schema(self) -> SeriesSchema:
        """Roles of the stored columns and the frequency; ``as_of`` adds calendar features."""
        return self._skeleton.schema

    @property
    def static(self) -> pl.DataFrame | None:
        """As in ``SeriesFrame``."""
        return self._skeleton.static

    @property
    def grid(self) -> TimeGrid:
        """The grid with its origin at the earliest time of any publication."""
        return self._skeleton.grid

    @property
    def series_ids(self) -> tuple[str, ...]:
        """Names of the series, ascending."""
        return self._skeleton.series_ids

    @property
    def table(self) -> pl.DataFrame:
        """The publications as they were given: ``series_id, time, published`` and the columns, sorted."""
        return self._table.clone()

    @property
    def num_rows(self) -> int:
        """Publications, a row each."""
        return self._table.height

    @property
    def rows(self) -> SeriesFrame:
        """Every row that any publication is about, without values."""
        return self._skeleton

    @property
    def columns(self) -> Mapping[str, Column]:
        """Publications by column."""
        return self._columns

    @property
    def delays(self) -> Delays:
        """Declared delays."""
        return self._delays

    def __repr__(self) -> str:
        low, high = (show_time(value) for value in (self._table["published"].min(), self._table["published"].max()))
        return f"VintageFrame({self.num_rows} publications from {low} to {high} of {self._skeleton!r})"

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any value, key, publication time or role and not with row order."""
        digest = hashlib.sha256(json.dumps(self.schema.to_dict(), sort_keys=True).encode())
        digest.update(self._skeleton.fingerprint().encode())
        digest.update(self._table["series_id"].rle_id().to_numpy().tobytes())
        for name in ("time", "published"):
            digest.update(physical(self._table[name]).tobytes())
        for name in self.schema.columns:
            digest.update(self._table[name].fill_null(np.nan).to_numpy().tobytes())
        return digest.hexdigest()[:16]

    def moment(self, time: TimeLike) -> datetime | int:
        """Return when a forecast is made whose last visible row has this time: the time and the delay of targets."""
        value = parse_time(time, integer=self.schema.has_integer_time)
        kind = pl.Int64() if self.schema.has_integer_time else TIME_DTYPE
        result: datetime | int = later(pl.Series([value], dtype=kind), self._delays.targets)[0]
        return result

    def newest_publication(
        self, last: TimeLike, series: Collection[str], columns: Collection[str], *, by: TimeLike | None = None
    ) -> datetime | int | None:
        """Return when the newest value of the rows up to ``last`` came out, None where they hold no value.

        Args:
            last: time of the last row that counts.
            series, columns: that count.
            by: moment after which publications do not count.
        """
        rows = self._skeleton.table
        used = (physical(rows["time"]) <= self._number(last)) & rows["series_id"].is_in(list(series)).to_numpy()
        limit = None if by is None else self._number(by)
        found: list[int] = []
        for name, column in self._columns.items():
            if name in columns:
                out = column.published[used[column.row] & ~np.isnan(column.value)]
                out = out if limit is None else out[out <= limit]
                found += [int(out.max())] if len(out) else []
        if not found:
            return None
        kind = pl.Int64() if self.schema.has_integer_time else TIME_DTYPE
        moment: datetime | int = pl.Series([max(found)], dtype=pl.Int64).cast(kind)[0]
        return moment

    def as_of(self, moment: TimeLike) -> SeriesFrame:
        """Return what was known at a moment: of each cell the last value published by then.

        Rows run from the first to the last one with any such value, known covariates of the future among them; series
        of which nothing up to the moment was published are not there.

        Raises:
            DataError: nothing was published by then.
        """
        last = self._number(moment)
        values = {name: column.at(last, self._skeleton.num_rows) for name, column in self._columns.items()}
        return self._frame(values, last)

    def latest(self) -> SeriesFrame:
        """Return the last value of every cell."""
        values = {name: column.at(None, self._skeleton.num_rows) for name, column in self._columns.items()}
        return self._frame(values, self._limit)

    def first(self) -> SeriesFrame:
        """Return the first value that was published of every cell."""
        values = {name: column.first(self._skeleton.num_rows) for name, column in self._columns.items()}
        return self._frame(values, self._limit)

    def until(self, moment: TimeLike) -> VintageFrame:
        """Return the publications up to a moment; its ``latest()`` is ``as_of(moment)``.

        Raises:
            DataError: nothing was published by then.
        """
        last = self._number(moment)
        chosen = self._copy({name: column.until(last) for name, column in self._columns.items()})
        chosen._limit = last
        kind = pl.Int64() if self.schema.has_integer_time else TIME_DTYPE
        chosen._table = self._table.filter(pl.col("published") <= pl.lit(last, pl.Int64).cast(kind))
        if not chosen._table.height:
            raise self._nothing(moment)
        return chosen

    def frozen(self, time: TimeLike) -> VintageFrame:
        """Return the publications without those that came after ``time`` for rows up to it.

        Rows until then stay as they were known at the moment of ``time``; later ones are complete.
        """
        last = self._number(self.moment(time))
        start = self._number(time)
        rows = physical(self._skeleton.table["time"])
        columns = {}
        for name, column in self._columns.items():
            kept = (column.published <= last) | (rows[column.row] > start)
            columns[name] = Column.of(column.row[kept], column.published[kept], column.value[kept])
        return self._copy(columns)

    def with_roles(self, schema: SeriesSchema, delays: Delays) -> VintageFrame:
        """Return the same publications with other roles, some of the columns only, and their delays."""
        other = VintageFrame(self._table, schema, self.static, require_targets=False, delays=delays)
        other._calendar, other._extend = self._calendar, self._extend
        return other

    def with_calendar(self, calendar: CalendarConfig, *, extend: int = 0) -> VintageFrame:
        """Return a frame whose ``as_of`` has calendar features, and ``extend`` rows after the last observed target."""
        result = self._copy(self._columns)
        result._calendar, result._extend = calendar, extend
        return result

    def mask_outside(
        self, ranges: Mapping[str, tuple[float | None, float | None]]
    ) -> tuple[VintageFrame, dict[str, int]]:
        """Return a frame that shows no value outside ``{column: (low, high)}``, and how many publications went."""
        columns, counts = dict(self._columns), {}
        for name, (low, high) in ranges.items():
            old = columns[name]
            bad = np.zeros(len(old.value), dtype=bool)
            if low is not None:
                bad |= old.value < low
            if high is not None:
                bad |= old.value > high
            columns[name] = replace(old, value=np.where(bad, np.nan, old.value))
            counts[name] = int(bad.sum())
        return self._copy(columns), counts

    def _copy(self, columns: dict[str, Column]) -> VintageFrame:
        other = object.__new__(VintageFrame)
        other.__dict__ = {**self.__dict__, "_columns": columns}
        return other

    def _number(self, moment: TimeLike) -> int:
        return time_number(moment, integer=self.schema.has_integer_time)

    def _nothing(self, moment: object) -> DataError:
        first = show_time(self._table["published"].min()) if self._table.height else "never"
        return DataError(f"nothing was published by {moment}; the first publication is of {first}")

    def _frame(self, values: dict[str, Floats], last: int | None) -> SeriesFrame:
        """Return the frame of these values, without empty ends of series."""
        skeleton = self._skeleton
        keep = self._span(np.logical_or.reduce([~np.isnan(value) for value in values.values()]), last)
        if not keep.any():
            raise self._nothing("that moment")
        given = [pl.Series(name, value[keep]).fill_nan(None) for name, value in values.items()]
        table = skeleton.table.select("series_id", "time").filter(pl.Series(keep)).with_columns(given)
        frame = SeriesFrame._trusted(table, skeleton.schema, skeleton.static, skeleton.grid)
        if self._extend:
            frame = frame.extend(self._extend)
        return frame if self._calendar is None else add_calendar(frame, self._calendar)

    def _span(self, seen: Bools, last: int | None) -> Bools:
        """Return which rows lie between the first and the last seen one of their series, series that began only."""
        indptr = self._skeleton.indptr
        places = np.flatnonzero(seen)
        low, high = np.searchsorted(places, indptr[:-1]), np.searchsorted(places, indptr[1:])
        begun = high > low
        begin = places[np.where(begun, low, 0)] if len(places) else np.zeros_like(low)
        end = places[np.where(begun, high, 1) - 1] if len(places) else np.zeros_like(low)
        if last is not None:
            begun &= physical(self._skeleton.table["time"].gather(begin)) <= last
        series = np.repeat(np.arange(len(begun)), np.diff(indptr))
        rows = np.arange(len(seen))
        keep: Bools = begun[series] & (rows >= begin[series]) & (rows <= end[series])
        return keep


def _place(table: pl.DataFrame) -> str:
    row = table.row(0, named=True)
    return f"'{row['series_id']}' at {show_time(row['time'])}, published {show_time(row['published'])}"


def newest(history: History) -> SeriesFrame:
    """Return the last value of every cell, be it a frame or the publications of one."""
    return history.latest() if isinstance(history, VintageFrame) else history


def known_at(history: History, time: TimeLike) -> SeriesFrame:
    """Return what a forecast has whose last visible row is that of ``time``: rows up to it, as they were known then.

    Raises:
        DataError: nothing was known yet.
    """
    if isinstance(history, VintageFrame):
        return history.as_of(history.moment(time)).until(time)
    return history.until(time)


def published_by(history: History, moment: TimeLike, delays: Delays) -> History:
    """Return what was out by a moment: publications up to it, or rows whose late targets were out by then.

    Known covariates of later rows stay.

    Raises:
        DataError: nothing was.
    """
    if isinstance(history, VintageFrame):
        return history.until(moment)
    value = parse_time(moment, integer=history.schema.has_integer_time)
    if delays.targets:
        kind = pl.Int64() if history.schema.has_integer_time else TIME_DTYPE
        value = later(pl.Series([value], dtype=kind), f"-{delays.targets}")[0]
    return history.until(value, keep_known=True)


def seen_from(history: History, cutoff: TimeLike | None) -> SeriesFrame:
    """Return the frame to forecast from: as of the moment of ``cutoff`` where publications are kept, else all of it."""
    if isinstance(history, VintageFrame) and cutoff is not None:
        return history.as_of(history.moment(cutoff))
    return newest(history)
