"""Rows that cannot be taken, found by looking at each: they cost themselves, and the time it takes does not grow.

What is looked at in turn: the time (readable, on the grid), the series id, rows that came before, times too far ahead,
and cells that are no numbers. What becomes of a row does not depend on the rows that came in one portion with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.data.config import EPOCH_FORMATS, DataConfig
from tsforge.data.findings import ROW, Finding, IngestReport
from tsforge.data.grid import TimeGrid, parse_freq, show_time
from tsforge.data.numbers import codes_as, from_text
from tsforge.data.timestamps import read_times

_OFFSET = r":\d{2}.*(?:[zZ]|[+-]\d{2}(?::?\d{2})?)\s*$"  # a time of day with its offset from UTC
_DATE = r"^\s*(\d{4}[-/]\d{1,2}[-/]\d{1,2})\s*$"  # without a time of day
_MONTH = r"^\s*(\d{4}-\d{1,2})\s*$"
_LARGEST_TIME = 2**62
_EPOCH_UNITS = {"epoch:s": 1_000_000, "epoch:ms": 1_000, "epoch:us": 1}  # in microseconds
_BY_POLICY = ": drop"  # ends what is said of local times that a policy left out
_CHOICES = {  # what says which policy left them out, and what else it may be
    "ambiguous": ("occur twice", "infer, earliest, latest or drop"),
    "nonexistent": ("do not exist", "shift or drop"),
}


class Refusal(NamedTuple):
    """Something that was not taken: where, why, and how many rows it has as far as that is known."""

    what: str
    reason: str
    rows: int = 0


class RowsRefused(DataError):
    """Rows that were read are refused together; ``rows`` is how many."""

    def __init__(self, reason: str, rows: int) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far a row may lie ahead.

    Attributes:
        max_gap: most grid steps from one row of a series to the next.
        max_ahead_seconds: of a row with a target, ahead of the clock, and a grid step more; None = any.
    """

    max_gap: int = 100_000
    max_ahead_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Rows that can be cleaned together, with times as the grid holds them, and what became of the others.

    Attributes:
        table: the rows. refusals: rows set apart, and why.
        notes: rows left out and cells made null without more words: what is wrong with them, and how many.
        late: rows at or before the last one taken of their series.
    """

    table: pl.DataFrame
    refusals: tuple[Refusal, ...]
    notes: tuple[Finding, ...]
    late: int


class Screen:
    """Sets rows of one portion apart.

    Args:
        table: rows as the source holds them.
        origin: for messages. numbers: of the rows there.
        config: how they are read; ``config.series`` is a column of the table.
        grid: of the artifact.
    """

    def __init__(
        self, table: pl.DataFrame, origin: str, numbers: Sequence[int], config: DataConfig, grid: TimeGrid
    ) -> None:
        self._rows = table.with_columns(pl.Series(ROW, numbers, dtype=pl.Int64))
        self._origin = origin
        self._config = config
        self._grid = grid
        self._group = config.series or ""
        self._refusals: list[Refusal] = []
        self._notes: list[Finding] = []
        self._late = 0

    def run(self, ends: pl.DataFrame, bounds: Bounds, columns: Mapping[str, str], decimal: str) -> Screened:
        """Return what is left.

        Args:
            ends: ``series_id, time`` of the last row that each series has taken.
            bounds: how far rows may lie ahead.
            columns: variate -> column of its numbers, which the table may lack.
            decimal: decimal mark of numbers in text.
        """
        held = {variate: name for variate, name in columns.items() if name in self._rows.columns}
        self._read_times()
        self._check_grid()
        self._check_ids()
        if self._rows.height:
            self._read_second_hour(ends)
            self._check_places(ends, bounds, held, decimal)
        self._check_numbers(held, decimal)
        table = self._rows.drop(ROW)
        return Screened(table=table, refusals=tuple(self._refusals), notes=tuple(self._notes), late=self._late)

    def _refuse(self, bad: pl.Series, reason: str) -> None:
        """Set rows apart."""
        count = int(bad.sum())
        if count:
            numbers = self._rows[ROW].filter(bad).to_list()
            self._refusals.append(Refusal(f"{self._origin}, row{'s' * (count > 1)} {listing(numbers)}", reason, count))
            self._rows = self._rows.filter(~bad)

    def _read_times(self) -> None:
        """Put times of the grid in the place of what the source holds, and leave out rows that have none."""
        name = self._config.time
        if self._rows[name].dtype == pl.String:
            self._complete_text()
        cells = self._rows[name]
        if cells.dtype.is_numeric():
            largest = _LARGEST_TIME // _EPOCH_UNITS.get(self._config.time_format or "", 1)
            self._refuse(~_is_whole(cells, largest), f"times in column '{name}' are no whole numbers, or too large")
            self._rows = self._rows.with_columns(pl.col(name).cast(pl.Int64))
        names = self._rows.columns
        kept = self._parsed(self._rows)
        if kept:
            self._rows = self._rows.drop(name).join(pl.concat(kept), on=ROW, maintain_order="left").select(names)
        else:
            self._rows = self._rows.clear()

    def _complete_text(self) -> None:
        """Put what does not depend on other rows in the place of text: whole numbers, dates with their midnight."""
        name, form = self._config.time, self._config.time_format
        cells = self._rows[name].str.strip_chars()
        if form in EPOCH_FORMATS or (form is None and self._grid.is_integer):
            # 7.0: a number among whole ones in JSON, and in a column of SQLite that mixes types
            whole = cells.str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)
            bad = (whole.is_null() & (cells != "")).fill_null(False)
            self._rows = self._rows.with_columns(whole.alias(name))
            self._refuse(bad, f"times in column '{name}' are no whole numbers")
        elif form is None and self._config.timezone != "UTC" and not parse_freq(self._grid.freq).is_whole_days:
            # without times of day beside them dates would be read as days of UTC
            days = cells.str.replace(_MONTH, "${1}-01 00:00:00").str.replace(_DATE, "${1} 00:00:00")
            self._rows = self._rows.with_columns(days.alias(name))

    def _parsed(self, rows: pl.DataFrame, *, is_part: bool = False) -> list[pl.DataFrame]:
        """Return ``ROW`` and the time of rows that have one; text with and without an offset is read apart."""
        name = self._config.time
        if not rows.height:
            return []
        parts: list[pl.DataFrame] = []
        cells = rows[name]
        if cells.dtype == pl.String and not is_part:
            has_offset = cells.str.contains(_OFFSET).fill_null(False)
            if has_offset.any() and not has_offset.all():
                parts = [rows.filter(has_offset), rows.filter(~has_offset)]
                # beside dates alone, times with an offset would be taken for no times
                if self._config.time_format is None and cells.str.contains(f"{_DATE}|{_MONTH}").any():
                    return [read for part in parts for read in self._parsed(part, is_part=True)]
        report = IngestReport(self._origin)
        try:
            read = self._read(rows, self._config, report)
        except DataError as error:
            if parts:
                return [read for part in parts for read in self._parsed(part, is_part=True)]
            return self._without_local(rows, str(error))
        if not self._is_of_grid(rows, read):
            return []
        self._notes += _left_out(report)
        return [read]

    def _is_of_grid(self, rows: pl.DataFrame, read: pl.DataFrame) -> bool:
        """Return whether times are numbers where the grid's are; else set the rows apart."""
        name = self._config.time
        if read[name].dtype.is_integer() == self._grid.is_integer:
            return True
        kind = "numbers, not dates" if read[name].dtype.is_integer() else "dates, not numbers"
        self._refuse(
            self._rows[ROW].is_in(rows[ROW].implode()),
            f"times in column '{name}' are {kind}, which does not fit freq {self._grid.freq}; set "
            "source.rows.time_format",
        )
        return False

    def _read(self, rows: pl.DataFrame, config: DataConfig, report: IngestReport) -> pl.DataFrame:
        keys = rows.select(ROW, config.time, self._group)
        return read_times(keys, self._group, config, report)[0].select(ROW, config.time)

    def _without_local(self, rows: pl.DataFrame, reason: str) -> list[pl.DataFrame]:
        """Return times after those that clocks show twice or never are set apart; all are, where that is no help."""
        config = self._config
        policies = {name: "drop" for name in ("ambiguous", "nonexistent") if getattr(config, name) == "error"}
        report = IngestReport(self._origin)
        inside = self._rows[ROW].is_in(rows[ROW].implode())
        try:
            read = self._read(rows, config.model_copy(update=policies), report)
        except DataError:
            self._refuse(inside, reason)
            return []
        if not self._is_of_grid(rows, read):
            return []
        for finding in _left_out(report):
            setting = next((name for name in policies if _CHOICES[name][0] in finding.what), None)
            if setting is None or not finding.what.endswith(_BY_POLICY):
                self._notes.append(finding)
                continue
            where = f"{self._origin}, {finding.count} of rows {rows[ROW][0]} to {rows[ROW][-1]}"
            found = f"{finding.what.removesuffix(_BY_POLICY)} ({listing(finding.examples)})"
            why = f"{finding.count} {found}; set source.rows.{setting} to {_CHOICES[setting][1]}"
            self._refusals.append(Refusal(where, why, finding.count))
        return [read]

    def _check_grid(self) -> None:
        times = self._rows[self._config.time]
        if not times.len():
            return
        fits = pl.Series(self._grid.locate(times)[1])
        try:
            self._grid.index_of(times)
        except DataError as error:  # in its words
            self._refuse(~fits, str(error))

    def _check_ids(self) -> None:
        """Give ids one type; rows without one are left to the cleaning, unless none has one."""
        name = self._group
        ids = self._rows[name]
        if ids.dtype.is_numeric() and not ids.dtype.is_integer():
            self._refuse(
                ~_is_whole(ids, _LARGEST_TIME), f"series ids in column '{name}' are fractions; give text or integers"
            )
            self._rows = self._rows.with_columns(pl.col(name).cast(pl.Int64))
        elif not (ids.dtype.is_integer() or ids.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
            self._refuse(
                ids.is_not_null(), f"series ids in column '{name}' have type {ids.dtype}; give text or integers"
            )
            self._rows = self._rows.with_columns(pl.lit(None, pl.String).alias(name))
        ids = self._rows[name].cast(pl.String)
        blank = (ids.is_null() | (ids.str.strip_chars() == "")).fill_null(True)
        if blank.all():
            self._refuse(blank, f"no series id in column '{name}'")

    def _read_second_hour(self, ends: pl.DataFrame) -> None:
        """With ``ambiguous: infer``, take a local time that clocks show twice for the second one where its series has
        passed the first in another portion; within one, the reading saw to that.

        Rows sent again from before that hour on are known by those: they repeat the first one.
        """
        config = self._config
        if config.ambiguous != "infer" or config.timezone == "UTC" or self._grid.is_integer:
            return
        if parse_freq(self._grid.freq).is_whole_days or not ends.height:
            return
        times = self._rows[config.time]
        local = times.dt.convert_time_zone(config.timezone).dt.replace_time_zone(None)
        later = local.dt.replace_time_zone(config.timezone, ambiguous="latest").dt.convert_time_zone("UTC")
        keys = self._rows.select(pl.col(self._group).cast(pl.String).alias("series_id"))
        end = keys.join(ends, on="series_id", how="left", maintain_order="left")["time"]
        again = ((times == later) & (times <= end)).fill_null(False)  # a row before that hour that was taken already
        is_replay = keys.with_columns(again=again).select(pl.col("again").cum_max().over("series_id")).to_series()
        passed = ((times < later) & (times <= end) & (later > end)).fill_null(False) & ~is_replay
        self._rows = self._rows.with_columns(times.zip_with(~passed, later).alias(config.time))

    def _check_places(self, ends: pl.DataFrame, bounds: Bounds, columns: Mapping[str, str], decimal: str) -> None:
        """Leave out rows that came before, and set those apart that lie too far ahead."""
        rows = self._places(columns, decimal)
        if ends.height:
            end = rows.join(ends.rename({"time": "end"}), on="series_id", how="left", maintain_order="left")["end"]
            late = (rows["time"] <= end).fill_null(False)
            self._late = int(late.sum())
            self._rows = self._rows.filter(~late)
        for find in (wide_gaps, ahead_of_clock):
            if self._rows.height:
                self._refuse(*find(self._places(columns, decimal), ends, self._grid, bounds))

    def _places(self, columns: Mapping[str, str], decimal: str) -> pl.DataFrame:
        codes = self._config.sentinels
        held = [
            _holds_value(self._rows[columns[name]], decimal, (*codes.get(name, ()), *codes.get("*", ()))).alias(name)
            for name in self._config.targets
            if name in columns
        ]
        return self._rows.select(
            pl.col(self._group).cast(pl.String).fill_null("").alias("series_id"),
            pl.col(self._config.time).alias("time"),
            pl.any_horizontal(held or [pl.lit(True)]).alias("is_seen"),
        )

    def _check_numbers(self, columns: Mapping[str, str], decimal: str) -> None:
        """Set rows apart that hold something and no number, and make other cells null that are none.

        The cleaning takes a column without any number for a wrong setting, which a portion of few rows does not show.
        """
        if not columns:
            return
        bad = {name: _unreadable(self._rows[name], decimal) for name in columns.values()}
        read = self._rows.select(
            is_bad=pl.any_horizontal(list(bad.values())),
            has_number=pl.any_horizontal(~cells & _given(self._rows[name]) for name, cells in bad.items()),
        )
        spoilt = read["is_bad"] & ~read["has_number"]
        if spoilt.any():
            at = int(spoilt.arg_max() or 0)
            name = next(name for name, cells in bad.items() if cells[at])
            cell = self._rows[name]
            shown = repr(cell[at])[:40] if cell.dtype == pl.String else str(cell.dtype)
            self._refuse(spoilt, f"no cell is a number (first: column '{name}' holds {shown})")
        for variate, name in columns.items():
            cells, wrong = self._rows[name], bad[name].filter(~spoilt)
            if wrong.any():
                what = f"unreadable cells in column '{variate}'"  # as the cleaning says it of a file
                self._notes.append(Finding("replaced", what, int(wrong.sum())))
            kept = cells.cast(pl.String).set(wrong, None) if _is_text(cells) else _numbers(cells, decimal)
            self._rows = self._rows.with_columns(kept.alias(name))


def _left_out(report: IngestReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.kind == "refused"]


def wide_gaps(rows: pl.DataFrame, ends: pl.DataFrame, grid: TimeGrid, bounds: Bounds) -> tuple[pl.Series, str]:
    """Return which rows come too long after the one before of their series, or after such a row, and words for it.

    A time so far ahead can only be wrong: the rows between would all be taken as missing.

    Args:
        rows: ``series_id, time``. ends: the same of the last row taken of each series.
    """
    keys = ["series_id", "time"]
    ends = ends.join(rows.select("series_id").unique(), on="series_id", how="semi")  # those of all others say nothing
    both = pl.concat([ends.select(keys), rows.select(keys)]) if ends.height else rows.select(keys)
    above = both.height - rows.height
    steps = both.with_columns(pl.Series("index", grid.index_of(both["time"]))).with_row_index("at")
    steps = steps.sort("series_id", "index", "at").with_columns(pl.col("index").diff().over("series_id").alias("gap"))
    far = (pl.col("gap") > bounds.max_gap).fill_null(False).cast(pl.Int8).cum_max().over("series_id") == 1
    found = steps.filter(far)
    bad = pl.int_range(rows.height, eager=True).is_in((found["at"].cast(pl.Int64) - above).implode())
    if not found.height:
        return bad, ""
    row = found.filter(pl.col("gap") > bounds.max_gap).row(0, named=True)
    return bad, (
        f"a row of '{row['series_id']}' at {show_time(row['time'])} comes {row['gap']} steps of {grid.freq} after the "
        f"one before; more than {bounds.max_gap} are taken for a wrong time: correct it, or raise max_gap"
    )


def ahead_of_clock(rows: pl.DataFrame, ends: pl.DataFrame, grid: TimeGrid, bounds: Bounds) -> tuple[pl.Series, str]:
    """Return which rows lie too far ahead of the clock, and words for it.

    Every true row that follows one would be late. Rows of a simulated clock, which the rows taken lie ahead of already,
    are let through, and so are integer times.

    Args:
        rows: ``series_id, time, is_seen``: whether a target has a value; known covariates may lie ahead.
        ends: ``series_id, time`` of the last row taken of each series.
    """
    none = pl.Series([False]).new_from_index(0, rows.height)
    if bounds.max_ahead_seconds is None or grid.is_integer:
        return none, ""
    now = datetime.fromtimestamp(time.time(), UTC)
    last = grid.floor(now + timedelta(seconds=bounds.max_ahead_seconds)) + 1
    if ends.height and int(grid.index_of(ends["time"]).max()) > last:
        return none, ""
    bad = rows["is_seen"] & pl.Series(grid.locate(rows["time"])[0] > last)
    if not bad.any():
        return bad, ""
    row = rows.filter(bad).row(0, named=True)
    return bad, (
        f"a row of '{row['series_id']}' at {show_time(row['time'])} lies more than {bounds.max_ahead_seconds:g} s and "
        f"a step of {grid.freq} ahead of the clock ({show_time(now.replace(microsecond=0))} UTC), which is taken for a "
        "wrong time: correct it, or raise max_ahead_seconds"
    )


def _is_whole(cells: pl.Series, largest: int) -> pl.Series:
    """Return which numbers are whole and not beyond ``largest``; so is a missing one."""
    fits = cells.is_between(-largest, largest)
    if not cells.dtype.is_integer():
        fits &= cells.cast(pl.Float64) == cells.cast(pl.Float64).round()
    return fits.fill_null(True)


def _is_text(cells: pl.Series) -> bool:
    return cells.dtype in (pl.String, pl.Categorical, pl.Enum)


def _given(cells: pl.Series) -> pl.Series:
    """Return which cells hold anything."""
    return ((cells.cast(pl.String).str.strip_chars() != "") if _is_text(cells) else cells.is_not_null()).fill_null(
        False
    )


def _numbers(cells: pl.Series, decimal: str) -> pl.Series:
    """Return the numbers of cells, null where there is none, in their own type where they are none of text."""
    if _is_text(cells):
        text = cells.cast(pl.String).str.strip_chars()
        return from_text(text, decimal).cast(pl.Float64, strict=False)
    if cells.dtype.is_numeric() or cells.dtype in (pl.Boolean, pl.Null):
        return cells
    return pl.Series([None], dtype=pl.Float64).new_from_index(0, len(cells))


def _unreadable(cells: pl.Series, decimal: str) -> pl.Series:
    """Return which cells hold something that is no number."""
    return _given(cells) & _numbers(cells, decimal).is_null()


def _holds_value(cells: pl.Series, decimal: str, codes: Sequence[float]) -> pl.Series:
    """Return which cells the cleaning leaves a value: finite, and no code for a missing one."""
    numbers = _numbers(cells, decimal)
    held = numbers.is_not_null()
    if numbers.dtype.is_float():
        held &= numbers.is_finite().fill_null(False)
    if codes and numbers.dtype.is_numeric():  # in the type of the cells, as the cleaning compares them
        held &= ~numbers.is_in(codes_as(codes, numbers.dtype).implode()).fill_null(False)
    return held
