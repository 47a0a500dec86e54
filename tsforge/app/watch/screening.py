"""Rows that cannot be taken, found by looking at each: they cost themselves, and the time it takes does not grow.

What is looked at in turn: the time (readable, on the grid), the series id, rows that came before, times too far ahead,
and columns in which no cell of a portion is a number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.data.config import EPOCH_FORMATS, DataConfig
from tsforge.data.findings import ROW, Finding, IngestReport
from tsforge.data.grid import TimeGrid, show_time
from tsforge.data.timestamps import read_times

_OFFSET = r":\d{2}.*(?:[zZ]|[+-]\d{2}:?\d{2})\s*$"  # a time of day with its offset from UTC
_LARGEST_TIME = 2**62
_EPOCH_UNITS = {"epoch:s": 1_000_000, "epoch:ms": 1_000, "epoch:us": 1}  # in microseconds
_BY_POLICY = ": drop"  # ends what is said of local times that a policy left out


class Refusal(NamedTuple):
    """Something that was not taken: where, why, and how many rows it has as far as that is known."""

    what: str
    reason: str
    rows: int = 0


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
        notes: rows left out without more words: what is wrong with them, and how many.
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
        origin: for messages. first: number of the first row there.
        config: how they are read; ``config.series`` is a column of the table.
        grid: of the artifact.
    """

    def __init__(self, table: pl.DataFrame, origin: str, first: int, config: DataConfig, grid: TimeGrid) -> None:
        self._rows = table.with_columns(pl.int_range(first, first + table.height, dtype=pl.UInt32).alias(ROW))
        self._origin = origin
        self._config = config
        self._grid = grid
        self._group = config.series or ""
        self._refusals: list[Refusal] = []
        self._notes: list[Finding] = []
        self._late = 0

    def run(
        self, ends: pl.DataFrame, bounds: Bounds, targets: Sequence[str], columns: Sequence[str], decimal: str
    ) -> Screened:
        """Return what is left.

        Args:
            ends: ``series_id, time`` of the last row that each series has taken.
            bounds: how far rows may lie ahead.
            targets, columns: columns of numbers, as the table calls them.
            decimal: decimal mark of numbers in text.
        """
        self._read_times()
        self._check_grid()
        self._check_ids()
        if self._rows.height:
            self._check_places(ends, bounds, targets)
        self._check_numbers([name for name in columns if name in self._rows.columns], decimal)
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

    def _parsed(self, rows: pl.DataFrame, *, is_part: bool = False) -> list[pl.DataFrame]:
        """Return ``ROW`` and the time of rows that have one; text with and without an offset is read apart."""
        name = self._config.time
        if not rows.height:
            return []
        report = IngestReport(self._origin)
        try:
            read = self._read(rows, self._config, report)
        except DataError as error:
            cells = rows[name]
            has_offset = None
            if cells.dtype == pl.String and self._config.time_format not in EPOCH_FORMATS and not is_part:
                has_offset = cells.str.contains(_OFFSET).fill_null(False)
            if has_offset is not None and has_offset.any() and not has_offset.all():
                parts = (rows.filter(has_offset), rows.filter(~has_offset))
                return [read for part in parts for read in self._parsed(part, is_part=True)]
            return self._without_local(rows, str(error))
        if read[name].dtype.is_integer() != self._grid.is_integer:
            kind = "numbers, not dates" if read[name].dtype.is_integer() else "dates, not numbers"
            self._refuse(
                self._rows[ROW].is_in(rows[ROW].implode()),
                f"times in column '{name}' are {kind}, which does not fit freq {self._grid.freq}; set "
                "source.rows.time_format",
            )
            return []
        self._notes += _left_out(report)
        return [read]

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
        found = _left_out(report)
        plain = [finding for finding in found if not finding.what.endswith(_BY_POLICY)]
        local = sum(finding.count for finding in found) - sum(finding.count for finding in plain)
        where = f"{self._origin}, {local} of rows {rows[ROW][0]} to {rows[ROW][-1]}"
        self._refusals.append(Refusal(where, reason, local))
        self._notes += plain
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

    def _check_places(self, ends: pl.DataFrame, bounds: Bounds, targets: Sequence[str]) -> None:
        """Leave out rows that came before, and set those apart that lie too far ahead."""
        rows = self._places(targets)
        if ends.height:
            end = rows.join(ends.rename({"time": "end"}), on="series_id", how="left", maintain_order="left")["end"]
            late = (rows["time"] <= end).fill_null(False)
            self._late = int(late.sum())
            self._rows = self._rows.filter(~late)
        for find in (wide_gaps, ahead_of_clock):
            if self._rows.height:
                self._refuse(*find(self._places(targets), ends, self._grid, bounds))

    def _places(self, targets: Sequence[str]) -> pl.DataFrame:
        held = [pl.col(name).is_not_null() for name in targets if name in self._rows.columns]
        return self._rows.select(
            pl.col(self._group).cast(pl.String).fill_null("").alias("series_id"),
            pl.col(self._config.time).alias("time"),
            pl.any_horizontal(held or [pl.lit(True)]).alias("is_seen"),
        )

    def _check_numbers(self, columns: Sequence[str], decimal: str) -> None:
        """Set rows apart whose column holds no number in any row: cleaning takes that for a wrong setting."""
        count = -1
        while count != len(self._refusals):  # without some rows, another column may be left without numbers
            count = len(self._refusals)
            for name in columns:
                bad = _unreadable(self._rows[name], decimal)
                if bad.any() and bool((bad | self._rows[name].is_null()).all()):
                    reason = f"column '{name}' holds {self._rows[name].dtype}, no cell is a number"
                    self._refuse(bad, f"{reason}; encode it as numbers or leave it out")


def _left_out(report: IngestReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.kind == "refused"]


def wide_gaps(rows: pl.DataFrame, ends: pl.DataFrame, grid: TimeGrid, bounds: Bounds) -> tuple[pl.Series, str]:
    """Return which rows come too long after the one before of their series, or after such a row, and words for it.

    A time so far ahead can only be wrong: the rows between would all be taken as missing.

    Args:
        rows: ``series_id, time``. ends: the same of the last row taken of each series.
    """
    keys = ["series_id", "time"]
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


def _unreadable(cells: pl.Series, decimal: str) -> pl.Series:
    """Return which cells hold something that is no number."""
    kind = cells.dtype
    if kind.is_numeric() or kind in (pl.Boolean, pl.Null):
        return pl.Series([False]).new_from_index(0, len(cells))
    if kind not in (pl.String, pl.Categorical, pl.Enum):
        return cells.is_not_null()
    text = cells.cast(pl.String).str.strip_chars()
    plain = text.str.replace(",", ".", literal=True) if decimal == "," else text
    return (plain.cast(pl.Float64, strict=False).is_null() & text.is_not_null() & (text != "")).fill_null(False)
