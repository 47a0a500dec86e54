"""From rows as a source has them to what a detector takes: read, cleaned, new to it, with the covariates it knows."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.watch.settings import RowsConfig, TextMarks
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.data.calendar import PREFIX, CalendarConfig, add_calendar
from tsforge.data.cleaning import clean
from tsforge.data.config import DataConfig, ParquetSource
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import show_time
from tsforge.data.io import RawTable, read_source, typed_column
from tsforge.data.schema import SeriesSchema

FILE_KINDS = (".csv", ".parquet", ".jsonl", ".ndjson")
_OF_STORE = ("hierarchy", "publication_delay", "published")


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Rows that a source offers.

    Attributes:
        table: ``series_id, time`` and columns of the artifact, one row a series and time, by time.
        rows_read: rows of the source behind it, for the count.
        ahead: ``series_id, time`` and known covariates of later rows, where the source knows them.
        notes: what the cleaning left out or changed: words -> count.
    """

    table: pl.DataFrame
    rows_read: int
    ahead: pl.DataFrame | None = None
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """What a detector takes of a portion, and what it does not: see ``OnlineDetector.update``.

    Attributes:
        rows, judged, known: arguments of the update.
        late: rows at or before the last one taken of their series.
        strangers: rows of series that the detector does not know, by name.
    """

    rows: pl.DataFrame
    judged: pl.DataFrame | None
    known: pl.DataFrame | None
    late: int
    strangers: dict[str, int]


def json_table(lines: Sequence[str], columns: Sequence[str]) -> tuple[pl.DataFrame, list[str]]:
    """Return the named keys of JSON lines as a table, and what is wrong with lines that were left out.

    Every line must be an object with all the keys (null = no value); further keys are ignored.
    """
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    wrong = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            wrong.append(f"line {number} is no JSON ({error})")
            continue
        missing = [name for name in columns if not isinstance(record, dict) or name not in record]
        if missing:
            wrong.append(f"line {number} lacks {listing(missing)}")
            continue
        for name, values in cells.items():
            values.append(record[name])
    return pl.DataFrame([typed_column(name, values) for name, values in cells.items()]), wrong


def csv_table(lines: Sequence[str], header: Sequence[str], marks: TextMarks) -> tuple[pl.DataFrame, list[str]]:
    """Return lines of delimited text below a header as a table of text, and what is wrong with lines left out.

    Each line is read by itself, so that an open quote spoils no other.
    """
    rows, wrong = [], []
    for number, line in enumerate(lines, start=1):
        cells = next(csv.reader([line], delimiter=marks.separator), [])
        if len(cells) == len(header):
            rows.append([None if cell in marks.null_values else cell for cell in cells])
        elif cells:
            wrong.append(f"line {number} has {len(cells)} cells, the header {len(header)}")
    return pl.DataFrame(rows, schema=dict.fromkeys(header, pl.String), orient="row"), wrong


class Intake:
    """Reads and cleans rows for one artifact.

    Args:
        artifact: what they are for.
        stored: settings of the data set that the history comes from: valid ranges, calendar.
        rows: how the source writes them; None for rows of the store, which are clean.
        marks: of CSV text.
        name: of the data set, for messages.
        max_gap: most grid steps from one row of a series to the next.

    Raises:
        ConfigError: the stored data set is not what its source has (sums, publications, delays), or rows name no
            series although the artifact knows several.
    """

    def __init__(
        self,
        artifact: Artifact,
        stored: Mapping[str, Any],
        rows: RowsConfig | None,
        marks: TextMarks,
        name: str,
        *,
        max_gap: int = 100_000,
    ) -> None:
        self.artifact = artifact
        self._max_gap = max_gap
        self.marks = marks
        self.mapping = rows
        self._name = name
        ranges = stored.get("valid_range", {}) or {}
        self._ranges = {key: (low, high) for key, (low, high) in ranges.items() if key in artifact.schema.columns}
        self._calendar = validate(CalendarConfig, stored.get("calendar") or {}, where=f"dataset {name}.calendar")
        schema = artifact.schema
        plain = tuple(column for column in schema.known if not column.startswith(PREFIX))
        self.schema = SeriesSchema(targets=schema.targets, past=schema.past, known=plain, freq=schema.freq)
        self._made = len(plain) < len(schema.known)
        if rows is not None:
            self._check(rows, stored)

    def _check(self, rows: RowsConfig, stored: Mapping[str, Any]) -> None:
        made = [key for key in _OF_STORE if stored.get(key)]
        if made:
            raise ConfigError(
                f"data set '{self._name}' was ingested with {listing(made)}, which other sources do not have; ingest "
                "new rows and watch the data set (source.kind=dataset)"
            )
        unknown = [name for name in rows.columns if name not in self.schema.columns]
        if unknown:
            raise ConfigError(
                f"source.rows.columns: the artifact reads no {listing(unknown)} (but {listing(self.schema.columns)})"
            )
        taken = [self.schema.columns.index(name) for name in rows.columns]
        read = [rows.columns.get(name, name) for name in self.schema.columns]
        twice = sorted({read[at] for at in taken if read.count(read[at]) > 1})
        if twice:
            raise ConfigError(f"source.rows.columns: column(s) {listing(twice)} of the source would be two variates")
        if rows.series is None and len(self.artifact.series_ids) != 1:
            raise ConfigError(
                f"the artifact knows {len(self.artifact.series_ids)} series; name the column of series ids with "
                "source.rows.series"
            )

    @property
    def wanted(self) -> dict[str, str]:
        """Columns of the source that are read -> what they are called in the cleaning."""
        assert self.mapping is not None
        names = {self.mapping.time: self.mapping.time}
        if self.mapping.series is not None:
            names[self.mapping.series] = self.mapping.series
        return names | {self.mapping.columns.get(name, name): name for name in self.schema.columns}

    def read_file(self, path: Path) -> Portion:
        """Return the rows of a CSV, Parquet or JSON lines file.

        Raises:
            DataError: unreadable, or its rows are refused; a line of JSON that is no row refuses the whole file.
            BackendError: the disk did not answer.
        """
        if path.suffix.lower() == ".parquet":
            raw = read_source(ParquetSource(path=str(path)))
        elif path.suffix.lower() == ".csv":
            raw = read_source(self.marks.as_source(str(path)))
        else:
            try:
                lines = path.read_text(encoding=self.marks.encoding).splitlines()
            except UnicodeError as error:
                raise DataError(f"{path} is not {self.marks.encoding} text ({error})") from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
            table, wrong = json_table(lines, list(self.wanted))
            if wrong:
                raise DataError(f"{path}: {len(wrong)} of {len(lines)} lines are no rows ({listing(wrong, 2)})")
            raw = RawTable(table.lazy(), str(path))
        return self.clean(raw)

    def clean(self, raw: RawTable) -> Portion:
        """Return clean rows of a raw table.

        Raises:
            DataError: columns are missing, nothing is left, or rows are refused by the settings.
        """
        assert self.mapping is not None
        names = raw.frame.collect_schema().names()
        wanted = {old: new for old, new in self.wanted.items() if old in names}
        frame = raw.frame.select(pl.col(old).alias(new) for old, new in wanted.items())
        if self.mapping.series is None:
            frame = frame.with_columns(pl.lit(self.artifact.series_ids[0]).alias("series_id"))
        config = self._settings()
        found = clean(replace(raw, frame=frame), config)
        self.artifact.grid.index_of(found.frame.table["time"])
        notes: Counter[str] = Counter()
        for item in found.report.findings:
            if item.kind in ("refused", "replaced", "merged"):
                notes[f"{item.kind}: {item.what}"] += item.count
        holds = pl.any_horizontal(pl.col(self.schema.columns).is_not_null())  # rows between that never came go
        table = found.frame.table.filter(holds).select("series_id", "time", *self.schema.columns)
        table = table.sort("time", maintain_order=True)
        return Portion(table=table, rows_read=found.report.rows_in, notes=dict(notes))

    def _settings(self) -> DataConfig:
        assert self.mapping is not None
        return self.mapping.as_data(self._name, self.schema, ParquetSource(path="rows"))

    def split(self, portion: Portion, ends: pl.DataFrame) -> NewRows:
        """Return what a detector takes of a portion.

        Rows after the last one with a target are left for later: they only tell known covariates.

        Args:
            portion: the rows.
            ends: ``series_id, time`` of the last row that each series has taken.

        Raises:
            DataError: times off the grid, or further ahead than ``max_gap``.
        """
        bounds = ends.rename({"time": "end"})
        table = portion.table.join(bounds, on="series_id", how="left", maintain_order="left")
        foreign = table.filter(pl.col("end").is_null())["series_id"].value_counts()
        strangers = dict(zip(foreign["series_id"].to_list(), foreign["count"].to_list(), strict=True))
        new = table.filter(pl.col("time") > pl.col("end")).drop("end")
        late = table.height - new.height - sum(strangers.values())
        self._check_gaps(new, ends)
        known = [name for name in self.artifact.schema.known if name in new.columns]
        if not new.height:
            nothing = pl.DataFrame(schema=self._row_types(ends))
            return NewRows(rows=nothing, judged=None, known=None, late=late, strangers=strangers)
        schema = SeriesSchema(
            targets=self.schema.targets, past=self.schema.past, known=tuple(known), freq=self.schema.freq
        )
        frame = SeriesFrame(new, schema, require_targets=False)
        if self._made and len(known) < len(self.artifact.schema.known):
            frame = add_calendar(frame.extend(self.artifact.window.horizon), self._calendar)
        reached = frame.last_observed().rename({"time": "reached"})
        seen = frame.mask_outside(self._ranges)[0] if self._ranges else frame
        inside = pl.col("time") <= pl.col("reached")
        rows = seen.table.join(reached, on="series_id", maintain_order="left").filter(inside)
        judged = None
        if self._ranges:
            raw = frame.table.join(reached, on="series_id", maintain_order="left").filter(inside)
            judged = raw.select("series_id", "time", *self.schema.targets)
        told = portion.ahead
        if told is None and self.artifact.schema.known:
            told = frame.table.select("series_id", "time", *self.artifact.schema.known)
        return NewRows(rows=self._columns(rows), judged=judged, known=told, late=late, strangers=strangers)

    def _check_gaps(self, new: pl.DataFrame, ends: pl.DataFrame) -> None:
        """Refuse a time so far ahead that it can only be wrong: the rows between would all be taken as missing."""
        times = pl.concat([ends, new.select("series_id", "time")])
        index = pl.Series("index", self.artifact.grid.index_of(times["time"]))
        steps = times.with_columns(index).sort("series_id", "index")
        gap = pl.col("index").diff().over("series_id")
        wide = steps.with_columns(gap.alias("gap")).filter(pl.col("gap") > self._max_gap)
        if wide.height:
            row = wide.row(0, named=True)
            raise DataError(
                f"a row of '{row['series_id']}' at {show_time(row['time'])} comes {row['gap']} steps of "
                f"{self.schema.freq} after the one before; more than {self._max_gap} are taken for a wrong time: "
                "correct it, or raise max_gap"
            )

    def _columns(self, table: pl.DataFrame) -> pl.DataFrame:
        return table.select("series_id", "time", *self.artifact.schema.columns)

    def _row_types(self, ends: pl.DataFrame) -> dict[str, Any]:
        columns = dict.fromkeys(self.artifact.schema.columns, pl.Float64)
        return {"series_id": pl.String, "time": ends["time"].dtype, **columns}
