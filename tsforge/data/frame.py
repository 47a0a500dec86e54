"""The one table everything else reads: validated once, never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from tsforge.core.errors import DataError, EmptySpanError, listing, nearest
from tsforge.data.checks import check_static, check_table, checked_columns, positions
from tsforge.data.grid import Ints, TimeGrid, TimeLike, parse_time, show_time
from tsforge.data.layout import long_table, wide_table
from tsforge.data.schema import SeriesSchema


class SeriesFrame:
    """A long table of one or many series on one regular grid, wrapped around a polars frame.

    Guarantees: sorted by ``series_id, time``; keys unique; every step between a series' first and last row is there,
    gaps as null rows; value columns Float64 without NaN or infinities; time UTC ``Datetime("us")`` or Int64. Rows after
    the last observed target are allowed: they carry known covariates of the future. Operations return new frames.

    Args:
        table: ``series_id``, ``time`` and ``schema.columns`` in any order of rows; other columns are left out.
        schema: roles and frequency.
        static: ``series_id`` and ``schema.static``, one row a series.
        require_targets: refuse a target column without any value.

    Raises:
        DataError: the table breaks the contract; the message says what, where, how many and what to do.
    """

    __slots__ = ("_grid", "_indptr", "_offset", "_schema", "_static", "_table")

    def __init__(
        self,
        table: pl.DataFrame | pl.LazyFrame,
        schema: SeriesSchema,
        static: pl.DataFrame | None = None,
        *,
        require_targets: bool = True,
    ) -> None:
        plain = table.collect() if isinstance(table, pl.LazyFrame) else table
        checked = check_table(plain, schema, require_targets=require_targets)
        self._table = checked.table
        self._schema = schema
        self._grid = checked.grid
        self._indptr = checked.indptr
        self._offset = checked.offset
        self._static = check_static(static, schema, self.series_ids)

    @classmethod
    def from_long(
        cls,
        table: pl.DataFrame | pl.LazyFrame,
        *,
        time: str,
        series_id: str | None = None,
        targets: Sequence[str],
        past: Sequence[str] = (),
        known: Sequence[str] = (),
        static: Sequence[str] = (),
        freq: str | None = None,
    ) -> SeriesFrame:
        """Return the frame of a table with one row per series and time.

        Args:
            table: the long table.
            time, series_id: its key columns; without ``series_id`` all rows belong to one series named ``series``.
            targets, past, known, static: columns by role; static ones are constant within a series.
            freq: step of the grid, inferred when absent.

        Raises:
            DataError: see the class; also a frequency that cannot be inferred, or a static column that varies.
        """
        roles = {"targets": tuple(targets), "past": tuple(past), "known": tuple(known), "static": tuple(static)}
        plain, schema, constants = long_table(table, series_id=series_id, time=time, roles=roles, freq=freq)
        return cls(plain, schema, constants)

    @classmethod
    def from_wide(
        cls,
        table: pl.DataFrame | pl.LazyFrame,
        *,
        time: str,
        targets: Sequence[str] | None = None,
        past: Sequence[str] = (),
        known: Sequence[str] = (),
        freq: str | None = None,
        separator: str | None = None,
        series_id: str = "series",
    ) -> SeriesFrame:
        """Return the frame of a table with one row per time.

        Args:
            table: the wide table.
            time: its time column.
            targets, past, known: columns by role; without ``targets`` every other column is one.
            freq: step of the grid, inferred when absent.
            separator: splits column names at its first occurrence into series and variate (``EWR.temp``); roles then
                name variates, a series that lacks one gets nulls, and columns without the separator belong to all.
            series_id: name of the one series when there is no separator.

        Raises:
            DataError: see the class; also a separator that no column contains.
        """
        roles = {"targets": None if targets is None else tuple(targets), "past": tuple(past), "known": tuple(known)}
        plain, schema = wide_table(table, time=time, roles=roles, freq=freq, separator=separator, series_id=series_id)
        return cls(plain, schema)

    @classmethod
    def _trusted(
        cls, table: pl.DataFrame, schema: SeriesSchema, static: pl.DataFrame | None, grid: TimeGrid
    ) -> SeriesFrame:
        """Wrap rows that are known to keep the guarantees (taken from a valid frame)."""
        frame = object.__new__(cls)
        frame._table = table
        frame._schema = schema
        frame._indptr = positions(table)
        times = table["time"]
        frame._grid = TimeGrid(times.min(), schema.freq, grid.month_day)  # type: ignore[arg-type]
        frame._offset = frame._grid.index_of(times.gather(frame._indptr[:-1]))
        ids = pl.DataFrame({"series_id": frame.series_ids})
        frame._static = None if static is None else ids.join(static, on="series_id", how="left", maintain_order="left")
        return frame

    def _with(self, table: pl.DataFrame, what: str) -> SeriesFrame:
        if not table.height:
            start, end = self._table["time"].min(), self.last_observed()["time"].max()
            if end is None:  # later rows than the last observed one may be a horizon that was only added
                end = self._table["time"].max()
            raise EmptySpanError(f"no rows {what}; the data runs from {show_time(start)} to {show_time(end)}")
        return SeriesFrame._trusted(table, self._schema, self._static, self._grid)

    @property
    def table(self) -> pl.DataFrame:
        """The rows: ``series_id, time`` and ``schema.columns`` (a shallow copy, so the frame stays as it is)."""
        return self._table.clone()

    @property
    def schema(self) -> SeriesSchema:
        """Roles of the columns and the frequency."""
        return self._schema

    @property
    def static(self) -> pl.DataFrame | None:
        """``series_id`` and the static columns, one row a series, or None."""
        return None if self._static is None else self._static.clone()

    @property
    def grid(self) -> TimeGrid:
        """The grid with its origin at the earliest time of the frame."""
        return self._grid

    @property
    def indptr(self) -> Ints:
        """int64 [num_series + 1]: rows of series s are ``indptr[s]:indptr[s + 1]``."""
        return self._indptr.copy()

    @property
    def offset(self) -> Ints:
        """int64 [num_series]: index of each series' first row on ``grid``."""
        return self._offset.copy()

    @property
    def series_ids(self) -> tuple[str, ...]:
        """Names of the series, ascending."""
        return tuple(self._table["series_id"].gather(self._indptr[:-1]).to_list())

    @property
    def num_rows(self) -> int:
        """Rows of all series together, gaps included."""
        return self._table.height

    def __repr__(self) -> str:
        start, end = show_time(self._table["time"].min()), show_time(self._table["time"].max())
        columns = f"{len(self._schema.targets)} targets of {len(self._schema.columns)} columns"
        rows = f"{len(self.series_ids)} series, {self.num_rows} rows"
        return f"SeriesFrame({rows}, {columns}, {start} .. {end}, {self._schema.freq})"

    def select_series(self, ids: Sequence[str]) -> SeriesFrame:
        """Return the rows of some series.

        Raises:
            DataError: a series is unknown.
        """
        known = self.series_ids
        there = set(known)
        unknown = [name for name in ids if name not in there]
        if unknown:
            hint = nearest(str(unknown[0]), known)
            raise DataError(f"unknown series {listing(unknown)}{hint} (known: {listing(known, 10)})")
        return self._with(self._table.filter(pl.col("series_id").is_in(list(ids))), "for an empty list of series")

    def between(self, start: TimeLike | None = None, end: TimeLike | None = None) -> SeriesFrame:
        """Return the rows from ``start`` to ``end``, both included (datetimes, ISO text or integers; None = open).

        Raises:
            DataError: no row lies in between.
        """
        integer = self._schema.has_integer_time
        rows = pl.lit(True)
        if start is not None:
            rows &= pl.col("time") >= parse_time(start, integer=integer)
        if end is not None:
            rows &= pl.col("time") <= parse_time(end, integer=integer)
        return self._with(self._table.filter(rows), f"between {start} and {end}")

    def until(self, cutoff: TimeLike, *, keep_known: bool = False) -> SeriesFrame:
        """Return what is known at ``cutoff``: rows up to it, included.

        Args:
            cutoff: last time that may be seen.
            keep_known: also keep later rows of series that have begun, with targets and past covariates removed.

        Raises:
            DataError: every row lies after the cutoff.
        """
        if not keep_known:
            return self.between(end=cutoff)
        last = parse_time(cutoff, integer=self._schema.has_integer_time)
        hidden = [*self._schema.targets, *self._schema.past]
        begun = self._table.filter(pl.col("time").min().over("series_id") <= last)
        shown = begun.with_columns(pl.when(pl.col("time") <= last).then(pl.col(name)).alias(name) for name in hidden)
        return self._with(shown, f"up to {cutoff}")

    def last_observed(self) -> pl.DataFrame:
        """Return ``series_id, time`` of each series' last row with any observed target (null where there is none)."""
        return self._observed(pl.Expr.max)

    def first_observed(self) -> pl.DataFrame:
        """Return ``series_id, time`` of each series' first row with any observed target (null where there is none)."""
        return self._observed(pl.Expr.min)

    def _observed(self, which: Callable[[pl.Expr], pl.Expr]) -> pl.DataFrame:
        seen = pl.any_horizontal(pl.col(self._schema.targets).is_not_null())
        times = which(pl.col("time").filter(seen))
        return self._table.lazy().group_by("series_id", maintain_order=True).agg(times).collect()

    def extend(self, steps: int) -> SeriesFrame:
        """Return a frame in which each series has at least ``steps`` rows after its last observed target.

        Rows that exist (with known covariates) stay as they are; new ones are null. A series without any observed
        target counts from its last row.

        Raises:
            DataError: ``steps`` is negative.
        """
        if steps < 0:
            raise DataError(f"cannot extend by {steps} steps; give 0 or more")
        end = self._offset + np.diff(self._indptr)
        seen = self.last_observed()["time"]
        last = seen.fill_null(self._grid.time_at(end - 1))
        return self._longer(self._grid.index_of(last) + 1 + steps - end)

    def extend_to(self, stop: int) -> SeriesFrame:
        """Return a frame in which the rows of each series reach at least to row ``stop`` of the grid, not included.

        Rows that exist stay as they are; new ones are null.
        """
        return self._longer(stop - self._offset - np.diff(self._indptr))

    def _longer(self, missing: Ints) -> SeriesFrame:
        """Return a frame with so many null rows more at the end of each series; none where negative."""
        missing, end = np.maximum(missing, 0), self._offset + np.diff(self._indptr)
        if not missing.any():
            return self
        owner = np.repeat(np.arange(len(missing)), missing)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(missing) - missing, missing)
        ids = pl.Series("series_id", self.series_ids).gather(owner)
        future = pl.DataFrame([ids, self._grid.time_at(end[owner] + within)])
        both = pl.concat([self._table, future], how="diagonal").sort("series_id", "time")
        return SeriesFrame._trusted(both, self._schema, self._static, self._grid)

    def with_known(self, columns: Sequence[pl.Series]) -> SeriesFrame:
        """Return the frame with more known covariates: one finite or missing number a row, in the order of ``table``.

        Raises:
            ConfigError: a column of that name exists.
            DataError: a column has another length, is not numeric or holds infinite values.
        """
        schema = replace(self._schema, known=self._schema.known + tuple(column.name for column in columns))
        return SeriesFrame._trusted(
            self._table.with_columns(checked_columns(columns, self.num_rows)), schema, self._static, self._grid
        )

    def with_covariates(
        self, *, past: Sequence[str] = (), known: Sequence[str] = (), static: Sequence[str] = ()
    ) -> SeriesFrame:
        """Return the frame with only these of its covariates, in this order; targets stay.

        Raises:
            DataError: the frame has no covariate of that name and role.
        """
        wanted = {"past": tuple(past), "known": tuple(known), "static": tuple(static)}
        for role, names in wanted.items():
            missing = [name for name in names if name not in getattr(self._schema, role)]
            if missing:
                have = listing(getattr(self._schema, role)) or "none"
                raise DataError(f"the data has no {role} covariate {listing(missing)} (it has {have})")
        schema = replace(self._schema, past=wanted["past"], known=wanted["known"], static=wanted["static"])
        constants = (
            None if self._static is None or not schema.static else self._static.select("series_id", *schema.static)
        )
        table = self._table.select("series_id", "time", *schema.columns)
        return SeriesFrame._trusted(table, schema, constants, self._grid)

    def mask_outside(
        self, ranges: Mapping[str, tuple[float | None, float | None]]
    ) -> tuple[SeriesFrame, dict[str, int]]:
        """Return a frame without values outside ``{column: (low, high)}`` (None = open), and how many went per column.

        Raises:
            DataError: a column is unknown, or a range is empty.
        """
        changes: list[pl.Expr] = []
        for name, (low, high) in ranges.items():
            if name not in self._schema.columns:
                hint = nearest(name, self._schema.columns)
                raise DataError(f"unknown column '{name}'{hint} (known: {listing(self._schema.columns, 20)})")
            if low is not None and high is not None and low > high:
                raise DataError(f"the range of column '{name}' is empty: {low} to {high}")
            inside = pl.lit(True)
            if low is not None:
                inside &= pl.col(name) >= low
            if high is not None:
                inside &= pl.col(name) <= high
            changes.append(pl.when(inside).then(pl.col(name)).alias(name))
        masked = self._table.with_columns(changes)
        counts = {name: masked[name].null_count() - self._table[name].null_count() for name in ranges}
        return SeriesFrame._trusted(masked, self._schema, self._static, self._grid), counts

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any value, key, role or the frequency."""
        digest = hashlib.sha256(json.dumps(self._schema.to_dict(), sort_keys=True).encode())
        digest.update("\0".join(self.series_ids).encode())
        digest.update(self._indptr.tobytes())
        starts = self._table["time"].gather(self._indptr[:-1]).to_physical().cast(pl.Int64)
        digest.update(starts.to_numpy().tobytes())
        tables = [self._table.select(self._schema.columns)]
        if self._static is not None:
            tables.append(self._static.select(self._schema.static))
        for column in (column for table in tables for column in table.get_columns()):
            digest.update(np.packbits(column.is_null().to_numpy()).tobytes())
            digest.update(column.fill_null(0.0).to_numpy().tobytes())
        return digest.hexdigest()[:16]
