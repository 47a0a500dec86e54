"""What a batch must keep so that a data set stays readable: its grid, gaps that can be filled, whole static columns.

The limits are those of reading (``checks``), held against what is stored inside the transaction of the batch, mostly
by the extent of the data set alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from sqlalchemy import Connection, func, select

from tsforge.core.errors import DataError, listing
from tsforge.data import checks
from tsforge.data.grid import TIME_DTYPE, Frequency, parse_freq, show_time
from tsforge.data.store_bulk import count_distinct_rows, ends_of_series
from tsforge.data.store_tables import SERIES, Definition
from tsforge.data.vintages import History


def check_grid(connection: Connection, dataset: Definition, frame: History, new: pl.Series) -> None:
    """Refuse rows off the stored grid; ``new`` are the times that come with a value.

    Raises:
        DataError: no grid holds both.
    """
    stored = dataset.first_time
    if stored is None or not dataset.num_rows or not new.len():
        return
    if parse_freq(frame.grid.freq).kind == "month":
        _check_months(connection, dataset, new.cast(TIME_DTYPE))
        return
    if frame.grid.index_of_values(np.array([stored])) is not None:
        return
    raise DataError(
        f"the new rows (from {show_time(frame.grid.origin)}) lie between those that are stored (from "
        f"{_shown(dataset, stored)}, step {frame.grid.freq}); shift or resample them, or ingest under another name. "
        "Rows of local days stored by an older tsforge, which kept them in UTC, have to be ingested afresh"
    )


def _check_months(connection: Connection, dataset: Definition, new: pl.Series) -> None:
    """Refuse times that share no day of the month with the stored ones, as reading would.

    Any stored time says the day but the end of a month of less than 31 days. So the first and last one are looked at,
    then those of one series, and all of them only where none of these says it.
    """
    table = dataset.table()
    ends = stored = pl.Series([dataset.first_time, dataset.last_time], dtype=pl.Int64).cast(TIME_DTYPE)
    one = select(func.min(table.c.series_id)).scalar_subquery()
    for statement in (select(table.c.time).where(table.c.series_id == one), select(table.c.time).distinct()):
        day = stored.dt.day()
        if ((day == 31) | (day != stored.dt.month_end().dt.day())).any():
            break
        times = pl.Series(list(connection.execute(statement).scalars()), dtype=pl.Int64).cast(TIME_DTYPE)
        stored = pl.concat([ends, times])
    both = pl.concat([stored, new]).unique().sort()
    try:
        checks.on_grid(pl.DataFrame({"series_id": [dataset.name] * both.len(), "time": both}), dataset.schema)
    except DataError as error:
        low, high = (show_time(time) for time in (ends.min(), ends.max()))
        raise DataError(
            f"dataset '{dataset.name}': the new rows (from {show_time(new.min())}) lie on another day of the month, or "
            f"in other months, than those that are stored (from {low} to {high}, step {dataset.schema.freq}), and "
            f"nothing could read both; shift or resample them, ingest under another name, or afresh after tsforge data "
            f"remove {dataset.name}"
        ) from error


def _shown(dataset: Definition, time: int) -> str:
    return str(time) if dataset.schema.has_integer_time else show_time(datetime.fromtimestamp(time / 1e6, UTC))


def overlong_series(connection: Connection, dataset: Definition, series: Sequence[str]) -> frozenset[str]:
    """Return which of some series by themselves fill more rows than reading takes whatever their number of values."""
    if _filled_between(dataset) <= checks.MAX_FILL_ROWS:
        return frozenset()
    spans = _spans(connection, dataset, series)
    return frozenset(spans.filter(pl.col("filled") > checks.MAX_FILL_ROWS)["series_id"])


def check_spans(connection: Connection, dataset: Definition, frame: History, exempt: Collection[str]) -> None:
    """Refuse a batch after which reading would refuse to fill the gaps, by the limits of reading.

    The extent of the data set nearly always tells; else the first and last time of each series are looked up.

    Args:
        connection: in the transaction that wrote the batch.
        dataset: as it is after the batch.
        frame: the batch.
        exempt: series of it that may be too long by themselves, since they were before or are new.

    Raises:
        DataError: there is a time too far from the others.
    """
    most, factor = checks.MAX_FILL_ROWS, checks.MAX_FILL_FACTOR
    widest = _filled_between(dataset)
    series = connection.execute(select(func.count()).where(SERIES.c.dataset_id == dataset.id)).scalar_one()
    # publications are no rows, of which there may be far fewer
    enough = most if dataset.has_vintages else max(most, factor * dataset.num_rows)
    if widest <= most and widest * series <= enough:
        return
    spans = _spans(connection, dataset).sort("filled", descending=True)
    total = int(spans["filled"].sum())
    mine = spans.filter(pl.col("series_id").is_in(list(frame.series_ids)))
    if total > enough:
        rows = count_distinct_rows(connection, dataset.table()) if dataset.has_vintages else dataset.num_rows
        if total > max(most, factor * rows):
            raise _too_long(dataset, frame, mine.row(0, named=True) if mine.height else {}, total, rows)
    for span in mine.filter((pl.col("filled") > most) & ~pl.col("series_id").is_in(list(exempt))).to_dicts():
        rows = count_distinct_rows(connection, dataset.table(), span["series_id"])
        if span["filled"] > factor * rows:
            raise _too_long(dataset, frame, span, span["filled"], rows)


def _too_long(dataset: Definition, frame: History, span: Mapping[str, Any], total: int, rows: int) -> DataError:
    """Return the refusal of a batch whose times lie too far from those that are stored."""
    where = ""
    if span:
        given = pl.any_horizontal(pl.col(frame.schema.columns).is_not_null()) & (
            pl.col("series_id") == span["series_id"]
        )
        times = frame.table.filter(given)["time"]
        new = (
            f"has new rows from {show_time(times.min())} to {show_time(times.max())} and with them "
            if times.len()
            else ""
        )
        low, high = (_shown(dataset, span[end]) for end in ("low", "high"))
        where = f" (series '{span['series_id']}' {new}runs from {low} to {high})"
    return DataError(
        f"dataset '{dataset.name}': with the new rows, filling the gaps would take {total} rows for {rows} given "
        f"ones{where}, which reading refuses; repair the time, resample to a coarser freq, or ingest under another "
        f"name; what is stored goes with tsforge data remove {dataset.name}"
    )


def _spans(connection: Connection, dataset: Definition, series: Sequence[str] | None = None) -> pl.DataFrame:
    """Return ``series_id, low, high, filled``: first and last time of series (None: all), the grid rows in between."""
    ends = ends_of_series(connection, dataset.table(), dataset.id, series).drop_nulls()
    return ends.with_columns(_rows_between(parse_freq(dataset.schema.freq)).alias("filled"))


def _filled_between(dataset: Definition) -> int:
    """Return the grid rows from the first to the last stored time."""
    if dataset.first_time is None or dataset.last_time is None or not dataset.num_rows:
        return 0
    ends = pl.DataFrame({"low": [dataset.first_time], "high": [dataset.last_time]})
    return int(ends.select(_rows_between(parse_freq(dataset.schema.freq))).item())


def _rows_between(step: Frequency) -> pl.Expr:
    """Return the grid rows from ``low`` to ``high``, both on the grid, both counted; integers may lie far apart."""
    if step.kind != "month":
        return (pl.col("high").cast(pl.Int128) - pl.col("low")) // step.count + 1
    dates = (pl.col(name).cast(TIME_DTYPE).dt for name in ("low", "high"))
    low, high = (date.year().cast(pl.Int64) * 12 + date.month() for date in dates)
    return (high - low) // step.count + 1


def check_statics(
    dataset: Definition,
    known: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Mapping[str, Any]],
    frame: History,
) -> None:
    """Refuse a batch whose series (``given``: static values of each) lack a static column, or stored ones a new column.

    What a stored series of an older version lacks is no fault of a batch of others.

    Raises:
        DataError: which lack it.
    """
    values = {**known, **given}
    for column in dataset.schema.static:
        is_new = all(stored.get(column) is None for stored in known.values())
        asked = values if is_new else given
        without = sorted(name for name in asked if values[name].get(column) is None)
        if without:
            advice = "add the column to the source and to data.static"
            if column in frame.schema.static:
                everyone = "all series" if is_new else "each of these series"
                advice = f"give it for {everyone} in one batch, or leave it out of data.static"
            raise DataError(
                f"dataset '{dataset.name}': static column '{column}' would be missing for {len(without)} of "
                f"{len(values)} series ({listing(without)}), and nothing could read them; {advice}, or ingest under "
                "another name"
            )
