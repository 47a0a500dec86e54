"""Any wide table as a benchmark: standardised by its training rows, split as the literature does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.data.calendar import CalendarConfig, Feature, add_calendar
from tsforge.data.config import CsvSource, ParquetSource
from tsforge.data.frame import SeriesFrame
from tsforge.data.io import read_source
from tsforge.data.panel import Panel
from tsforge.data.splits import SplitConfig, Splits, literature_splits, make_splits
from tsforge.forecasting.seasons import season_length

_ROW = "row"


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """A data set ready to be measured on.

    Attributes:
        name: file name without ending, or the name it is known by.
        fingerprint: changes with the values, the columns taken and the split.
        panel: one series, standardised per variate with mean and population standard deviation of the training rows.
        with_calendar: the same with calendar features as known covariates; the panel itself if none were asked for.
        splits: spans of rows.
        season: steps of a season.
        notes: what was left out or assumed.
    """

    name: str
    fingerprint: str
    panel: Panel
    with_calendar: Panel
    splits: Splits
    season: int
    notes: tuple[str, ...]


def read_benchmark_data(
    path: str | Path,
    *,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    split: SplitConfig | None = None,
    season: int | None = None,
    calendar: tuple[Feature, ...] = (),
    name: str | None = None,
) -> BenchmarkData:
    """Return a wide Parquet or CSV file as a benchmark.

    Args:
        path: the file.
        time: its time column; default ``ds``, else the first datetime column, else rows are numbered.
        columns: variates; default every numeric column (others are dropped with a note).
        split: default the literature's for this file name (ETT by months, others 7:1:2).
        season: steps of a season; default from the frequency, else from the data.
        calendar: features of the time stamp.
        name: what the tables call it; default the file name without ending.

    Raises:
        DataError: missing, empty or unreadable file, no numeric column, too few rows.
        ConfigError: a column that does not exist, another file type.
        DataError: calendar features without time stamps.
    """
    place = Path(path).expanduser()
    table = _read(place)
    if time is not None and time not in table.columns:
        raise ConfigError(f"{place} has no column '{time}'; it has {listing(table.columns, 20)}")
    stamp = time or _time_column(table)
    title = name or place.stem
    return _prepare(table, stamp, title, columns=columns, split=split, season=season, calendar=calendar)


def stored_benchmark_data(
    frame: SeriesFrame,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    split: SplitConfig | None = None,
    season: int | None = None,
    calendar: tuple[Feature, ...] = (),
) -> BenchmarkData:
    """Return stored data as a benchmark: the targets of all series side by side, named ``SERIES.COLUMN``.

    Raises:
        DataError, ConfigError: as ``read_benchmark_data``.
    """
    targets = frame.schema.targets
    parts = [
        frame.table.filter(pl.col("series_id") == series).select(
            "time", *(pl.col(column).alias(f"{series}.{column}") for column in targets)
        )
        for series in frame.series_ids
    ]
    table = parts[0].rename(dict(zip(parts[0].columns[1:], targets, strict=True))) if len(parts) == 1 else parts[0]
    for part in parts[1:]:
        table = table.join(part, on="time", how="full", coalesce=True)
    table = table.sort("time").with_row_index(_ROW).with_columns(pl.col(_ROW).cast(pl.Int64))
    return _prepare(table, "time", name, columns=columns, split=split, season=season, calendar=calendar)


def drift_steps(data: BenchmarkData, horizon: int, context_length: int) -> int | None:
    """Return the look-back k for which drift(k) beats the last value on the training rows, None where none does.

    Compared is the squared error of the last step of the horizon, over every start in the training rows: the data are
    trending where the line helps. No later row is read.
    """
    rows = slice(*data.splits.train)
    values = np.where(data.panel.observed[rows], data.panel.values[rows], np.nan)
    candidates = sorted({k for k in (7, 14, 28, data.season, 4 * data.season) if 1 < k < context_length})
    usable = [k for k in candidates if len(values) > k + horizon]
    if not usable:
        return None
    first = max(usable)  # the same starts for every candidate
    now, ahead = values[first:-horizon], values[first + horizon :]
    errors: dict[int | None, float] = {None: float(np.nanmean((ahead - now) ** 2))}
    for k in usable:
        slope = (now - values[first - k : len(values) - horizon - k]) / k
        errors[k] = float(np.nanmean((ahead - now - horizon * slope) ** 2))
    return min(errors, key=lambda k: errors[k])


def _prepare(
    table: pl.DataFrame,
    stamp: str,
    name: str,
    *,
    columns: Sequence[str] | None,
    split: SplitConfig | None,
    season: int | None,
    calendar: tuple[Feature, ...],
) -> BenchmarkData:
    table, notes = _numeric(table, stamp, columns)
    frame, more = _regular(table, stamp)
    notes += more
    panel = Panel.from_frame(frame)
    splits = literature_splits(name, panel.num_rows) if split is None else make_splits(panel, split)
    panel, more = _with_values(panel, splits, asked=columns is not None)
    notes += more
    panel, more = _standardise(panel, splits)
    notes += more
    with_calendar = _with_calendar(panel, frame, calendar)
    rows = slice(*splits.train)
    training = np.where(panel.observed[rows], panel.values[rows], np.nan)
    return BenchmarkData(
        name=name,
        fingerprint=_fingerprint(with_calendar, splits),
        panel=panel,
        with_calendar=with_calendar,
        splits=splits,
        season=season_length(frame.schema.freq, training, declared=season),
        notes=tuple(notes),
    )


def _read(place: Path) -> pl.DataFrame:
    """Return the whole file with its row numbers as a further column."""
    kind = place.suffix.lower()
    if kind in (".parquet", ".pq"):
        table = _collect(read_source(ParquetSource(path=str(place))).frame, place)
    elif kind in (".csv", ".txt"):
        read_source(CsvSource(path=str(place)))  # existence, encoding and delimiter are checked there
        table = _collect(pl.scan_csv(place, try_parse_dates=True, infer_schema_length=10_000), place)
    else:
        raise ConfigError(f"{place}: cannot tell the type from '{kind}'; give a .parquet or .csv file")
    if not table.height:
        raise DataError(f"{place} has no rows")
    return table.with_row_index(_ROW).with_columns(pl.col(_ROW).cast(pl.Int64))


def _collect(lazy: pl.LazyFrame, place: Path) -> pl.DataFrame:
    try:
        return lazy.collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{place} cannot be read: {str(error).splitlines()[0]}") from error


def _time_column(table: pl.DataFrame) -> str:
    """Return ``ds``, else the first column of dates, else the row numbers."""
    times = [name for name, kind in table.schema.items() if isinstance(kind, pl.Datetime) or kind == pl.Date]
    return "ds" if "ds" in times else next(iter(times), _ROW)


def _numeric(table: pl.DataFrame, stamp: str, columns: Sequence[str] | None) -> tuple[pl.DataFrame, list[str]]:
    """Return time and variates as Float64, infinities as missing."""
    notes: list[str] = []
    candidates = [name for name in table.columns if name not in (stamp, _ROW)]
    numeric = [name for name in candidates if table.schema[name].is_numeric() or table.schema[name] == pl.Boolean]
    if columns is not None:
        unknown = [name for name in columns if name not in candidates]
        if unknown:
            raise ConfigError(f"columns: {listing(unknown)} do not exist; the file has {listing(candidates, 20)}")
        text = [name for name in columns if name not in numeric]
        if text:
            raise DataError(f"column(s) {listing(text)} are not numeric and cannot be forecast; leave them out")
        numeric = list(columns)
    else:
        dropped = [name for name in candidates if name not in numeric]
        if dropped:
            notes.append(f"dropped {len(dropped)} column(s) that are not numeric: {listing(dropped)}")
    if not numeric:
        raise DataError(f"no numeric column to forecast: {listing(candidates, 20)} hold text or nothing")
    values = table.select(stamp, *(pl.col(name).cast(pl.Float64) for name in numeric))
    finite = values.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in numeric)
    infinite = sum(int(values[name].is_infinite().sum()) for name in numeric)
    if infinite:
        notes.append(f"{infinite} infinite cells count as missing")
    return finite, notes


def _regular(table: pl.DataFrame, stamp: str) -> tuple[SeriesFrame, list[str]]:
    """Return the frame on its time grid, or on row numbers when the times are no grid."""
    values = [name for name in table.columns if name != stamp]
    safe = {name: f"v.{name}" if name in ("series_id", "time") else name for name in values}
    plain = table.rename(safe)
    repeated = table.height - table[stamp].n_unique()
    if 3 * repeated > table.height:  # fewer may be flaws of one series
        raise DataError(
            f"{repeated} of {table.height} rows repeat a time in '{stamp}': the table holds several series below each "
            "other; ingest it (data.layout=long data.series=COLUMN) and name the data set, or give one column a series"
        )
    try:
        frame = SeriesFrame.from_wide(plain.rename({stamp: "time"}), time="time", targets=list(safe.values()))
    except DataError as error:
        if stamp == _ROW:
            raise
        rows = plain.sort(stamp, maintain_order=True).drop(stamp).with_row_index("time")
        rows = rows.with_columns(pl.col("time").cast(pl.Int64))
        frame = SeriesFrame.from_wide(rows, time="time", targets=list(safe.values()), freq="1i")
        return frame, [f"the times are no regular grid, rows are taken as equally spaced ({error})"]
    gaps = frame.num_rows - table.height
    if gaps < 0:
        return frame, [f"{-gaps} rows without any value at the ends were left out"]
    if gaps:
        return frame, [f"{gaps} missing time stamps became rows without values"]
    return frame, ["no time column: rows are taken as equally spaced"] if stamp == _ROW else []


def _with_values(panel: Panel, splits: Splits, *, asked: bool) -> tuple[Panel, list[str]]:
    """Return the panel without variates that no model could learn: nothing observed in the training rows."""
    keep = np.asarray(panel.observed[slice(*splits.train)].any(axis=0))
    if keep.all():
        return panel, []
    names = [name for name, has in zip(panel.schema.targets, keep.tolist(), strict=True) if not has]
    if asked or not keep.any():
        raise DataError(f"column(s) {listing(names)} hold no value in the {splits.train[1]} training rows")
    targets = tuple(name for name, has in zip(panel.schema.targets, keep.tolist(), strict=True) if has)
    kept = replace(
        panel,
        values=np.ascontiguousarray(panel.values[:, keep]),
        observed=np.ascontiguousarray(panel.observed[:, keep]),
        schema=replace(panel.schema, targets=targets),
    )
    return kept, [f"dropped {len(names)} column(s) without values in the training rows: {listing(names)}"]


def _standardise(panel: Panel, splits: Splits) -> tuple[Panel, list[str]]:
    rows = slice(*splits.train)
    seen, values = panel.observed[rows], panel.values[rows]
    count = seen.sum(axis=0)
    loc = np.where(seen, values, 0.0).sum(axis=0) / count
    deviation = np.sqrt(np.where(seen, (values - loc) ** 2, 0.0).sum(axis=0) / count)
    constant = deviation <= 1e-9 * np.maximum(1.0, np.abs(loc))
    scale = np.where(constant, 1.0, deviation)
    notes = []
    if constant.any():
        names = [name for name, flat in zip(panel.schema.targets, constant, strict=True) if flat]
        notes.append(
            f"{len(names)} column(s) are constant over the training rows and keep their unit: {listing(names)}"
        )
    missing = int((~panel.observed).sum())
    if missing:
        notes.append(f"{missing} of {panel.observed.size} cells are missing and not scored")
    standard = np.where(panel.observed, (panel.values - loc) / scale, 0.0)
    return replace(panel, values=standard), notes


def _with_calendar(panel: Panel, frame: SeriesFrame, features: tuple[Feature, ...]) -> Panel:
    """Return the panel with calendar features of the frame's times as known covariates."""
    if not features:
        return panel
    added = Panel.from_frame(add_calendar(frame, CalendarConfig(features=features)))
    known, first = added.schema.known, added.num_targets
    return replace(
        panel,
        values=np.concatenate([panel.values, added.values[:, first:]], axis=1),
        observed=np.concatenate([panel.observed, added.observed[:, first:]], axis=1),
        schema=replace(panel.schema, known=known),
    )


def _fingerprint(panel: Panel, splits: Splits) -> str:
    schema = (panel.schema.targets, panel.schema.freq, *([panel.schema.known] if panel.schema.known else []))
    digest = hashlib.sha256(repr((*schema, splits.to_dict())).encode())
    digest.update(np.ascontiguousarray(panel.values).tobytes())
    digest.update(np.packbits(panel.observed).tobytes())
    return digest.hexdigest()[:16]
