"""From rows as a source has them to what a detector takes: read, cleaned, new to it, with the covariates it knows."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.watch.screening import Bounds, RowsRefused, Screen, Screened, ahead_of_clock, wide_gaps
from tsforge.app.watch.settings import RowsConfig
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.data.calendar import PREFIX, CalendarConfig, add_calendar
from tsforge.data.cleaning import clean
from tsforge.data.config import CsvSource, DataConfig, ParquetSource, TextMarks
from tsforge.data.findings import ROW, Finding, IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TIME_DTYPE
from tsforge.data.io import RawTable, collect, read_source, typed_column
from tsforge.data.schema import SeriesSchema
from tsforge.data.timestamps import read_times

FILE_KINDS = (".csv", ".parquet", ".jsonl", ".ndjson")
_INTEGER_BITS = 63
OF_STORE = ("hierarchy", "publication_delay", "published")


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Rows that a source offers.

    Attributes:
        table: ``series_id, time`` and columns of the artifact, one row a series and time, by time.
        rows_read: rows of the source behind it, for the counts; those below are among them and not in the table.
        refused: rows left out by the cleaning. late: rows at or before the last one taken of their series, or that
            repeat the time of another. empty: rows without any value.
        ahead: ``series_id, time`` and known covariates of later rows, where the source knows them.
        notes: what the cleaning left out or changed: words -> count.
    """

    table: pl.DataFrame
    rows_read: int
    refused: int = 0
    late: int = 0
    empty: int = 0
    ahead: pl.DataFrame | None = None
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """What a detector takes of a portion, and what it does not: see ``OnlineDetector.update``.

    Attributes:
        rows, judged, known: arguments of the update.
        taken: how many of ``rows`` came from the source; the others fill the grid between them.
        ahead: rows that only tell known covariates of times to come.
        late: rows at or before the last one taken of their series.
        strangers: rows of series that the detector does not know, by name.
        blank: ``series_id, time`` and covariates of the rows that came without one of these.
    """

    rows: pl.DataFrame
    judged: pl.DataFrame | None
    known: pl.DataFrame | None
    taken: int
    ahead: int
    late: int
    strangers: dict[str, int]
    blank: pl.DataFrame


def json_table(lines: Sequence[str], columns: Sequence[str]) -> tuple[pl.DataFrame, list[int], list[str]]:
    """Return the named keys of JSON lines as a table, the number of each line in it, and what is wrong with the others.

    Every line must be an object with all the keys (null = no value); further keys are ignored.
    """
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    kept: list[int] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not is_text(line):
            wrong.append(f"line {number} is not text of the encoding that the settings name")
            continue
        try:
            record = json.loads(line)
        except RecursionError:
            wrong.append(f"line {number} is no row (brackets within brackets, too many to read)")
            continue
        except ValueError as error:
            wrong.append(f"line {number} is no JSON ({error})")
            continue
        missing = [name for name in columns if not isinstance(record, dict) or name not in record]
        if missing:
            wrong.append(f"line {number} lacks {listing(missing)}")
            continue
        odd = [f"{name} {fault}" for name in columns if (fault := _odd(record[name]))]
        if odd:
            wrong.append(f"line {number} is no row: {listing(odd)}")
            continue
        for name, values in cells.items():
            values.append(record[name])
        kept.append(number)
    return pl.DataFrame([typed_column(name, values) for name, values in cells.items()]), kept, wrong


def _odd(value: object) -> str:
    """Return what keeps a value of JSON from being a cell; empty where nothing does."""
    if isinstance(value, list | dict):
        return "is a list or an object"
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        return "is a whole number beyond 64 bits"
    if isinstance(value, str) and not is_text(value):
        return "holds signs that are no characters"
    return ""


def is_text(line: str) -> bool:
    """Return whether a text holds characters only: no half of a pair, no byte that could not be decoded."""
    try:
        return line.isascii() or bool(line.encode())
    except UnicodeEncodeError:
        return False


def csv_table(
    lines: Sequence[str], header: Sequence[str], marks: TextMarks
) -> tuple[pl.DataFrame, list[int], list[str]]:
    """Return lines of delimited text below a header as a table of text, the number of each line in it, and what is
    wrong with the others.

    Each line is read by itself, so that an open quote spoils no other. Of columns of one name the first is kept.
    """
    places = {name: header.index(name) for name in header}
    rows: list[list[str | None]] = []
    kept: list[int] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not is_text(line):
            wrong.append(f"line {number} is not text of the encoding that the settings name")
            continue
        try:
            cells = next(csv.reader([line], delimiter=marks.separator), [])
        except csv.Error as error:  # a cell of more than 131,072 characters, or a line break within one
            wrong.append(f"line {number} cannot be read ({error})")
            continue
        if len(cells) == len(header):
            rows.append([None if cells[at] in marks.null_values else cells[at] for at in places.values()])
            kept.append(number)
        elif cells:
            wrong.append(f"line {number} has {len(cells)} cells, the header {len(header)}")
    return pl.DataFrame(rows, schema=dict.fromkeys(places, pl.String), orient="row"), kept, wrong


def noted(findings: Iterable[Finding]) -> dict[str, int]:
    """Return what the cleaning left out or changed: words -> count."""
    notes: Counter[str] = Counter()
    for item in findings:
        if item.kind in ("refused", "replaced", "merged"):
            notes[f"{item.kind}: {item.what}"] += item.count
    return dict(notes)


class Intake:
    """Reads and cleans rows for one artifact.

    Args:
        artifact: what they are for.
        stored: settings of the data set that the history comes from, with what holds for the artifact: valid ranges,
            calendar.
        rows: how the source writes them; None for rows of the store, which are clean.
        marks: of CSV text.
        name: of the data set, for messages.
        bounds: how far rows may lie ahead.

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
        bounds: Bounds = Bounds(),
    ) -> None:
        self.artifact = artifact
        self._bounds = bounds
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
        made = [key for key in OF_STORE if stored.get(key)]
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
            raw = read_source(CsvSource(path=str(path), **self.marks.model_dump()))
        else:
            try:
                lines = path.read_text(encoding=self.marks.encoding).rstrip("\n").split("\n")
            except UnicodeError as error:
                raise DataError(f"{path} is not {self.marks.encoding} text ({error})") from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
            table, _, wrong = json_table(lines, list(self.wanted))
            if wrong:
                reason = f"{path}: {len(wrong)} of {len(lines)} lines are no rows ({listing(wrong, 2)})"
                raise RowsRefused(reason, sum(bool(line.strip()) for line in lines))
            raw = RawTable(table.lazy(), str(path))
        return self.clean(raw)

    def clean(self, raw: RawTable) -> Portion:
        """Return clean rows of a raw table.

        Raises:
            DataError: columns are missing, nothing is left, or rows are refused by the settings.
        """
        return self._clean(raw, self._settings())

    def screen(
        self, raw: pl.DataFrame, ends: pl.DataFrame, origin: str, numbers: Sequence[int], *, is_text: bool
    ) -> Screened:
        """Return raw rows that can be cleaned together, their times read already, and what became of the others.

        Args:
            raw: rows as the source holds them. origin: for messages. numbers: of the rows there.
            ends: ``series_id, time`` of the last row that each series has taken.
            is_text: every cell is text.
        """
        config = self._settings()
        one = self.mapping is not None and self.mapping.series is None
        table = raw.with_columns(pl.lit(self.artifact.series_ids[0]).alias("series_id")) if one else raw
        names = {new: old for old, new in self.wanted.items()}
        columns = {name: names[name] for name in self.schema.columns}
        screen = Screen(table, origin, numbers, config, self.artifact.grid)
        return screen.run(ends, self._bounds, columns, self.marks.decimal if is_text else ".")

    def clean_screened(self, raw: RawTable) -> Portion:
        """Return clean rows of a table whose times were read; raises as ``clean`` does."""
        as_read = {"timezone": "UTC", "time_format": None}
        return self._clean(raw, self._settings().model_copy(update=as_read))

    def nothing(self) -> pl.DataFrame:
        """Return the table of a portion without rows."""
        kind = pl.Int64 if self.artifact.grid.is_integer else TIME_DTYPE
        return pl.DataFrame(
            schema={"series_id": pl.String, "time": kind, **dict.fromkeys(self.schema.columns, pl.Float64)}
        )

    def _clean(self, raw: RawTable, config: DataConfig) -> Portion:
        assert self.mapping is not None
        names = raw.frame.collect_schema().names()
        wanted = {old: new for old, new in self.wanted.items() if old in names}
        frame = raw.frame.select(pl.col(old).alias(new) for old, new in wanted.items())
        if self.mapping.series is None:
            frame = frame.with_columns(pl.lit(self.artifact.series_ids[0]).alias("series_id"))
        chosen = replace(raw, frame=frame)
        try:
            found = clean(chosen, config)
            self.artifact.grid.index_of(found.frame.table["time"])
        except pl.exceptions.PolarsError as error:  # a number that no time can be, in a column of numbers
            raise DataError(f"{raw.origin}: {str(error).strip().splitlines()[0]}") from error
        except DataError as error:
            raise self._refusal(chosen, config, error) from error
        report = found.report
        holds = pl.any_horizontal(pl.col(self.schema.columns).is_not_null())  # rows between that never came go
        table = found.frame.table.filter(holds).select("series_id", "time", *self.schema.columns)
        table = table.sort("time", maintain_order=True)
        repeats = sum(item.count for item in report.findings if item.kind == "merged")
        return Portion(
            table=table,
            rows_read=report.rows_in,
            refused=report.rows_refused,
            late=repeats,
            empty=report.rows_in - report.rows_refused - repeats - table.height,
            notes=noted(report.findings),
        )

    def _refusal(self, raw: RawTable, config: DataConfig, error: DataError) -> DataError:
        """Return why rows are refused, and how many.

        The cleaning takes the phase of most rows for that of the grid, so that it may blame the others.
        """
        assert config.series is not None
        try:
            table = collect(raw, [config.time, config.series]).with_row_index(ROW, offset=1)
        except DataError:  # one of these columns is missing
            return error
        try:
            times = read_times(table, config.series, config, IngestReport(raw.origin))[0][config.time]
        except (DataError, pl.exceptions.PolarsError):
            return RowsRefused(str(error), table.height)
        grid = self.artifact.grid
        try:
            if times.dtype.is_integer() == grid.is_integer:
                grid.index_of(times)
        except DataError as off:
            return RowsRefused(f"{raw.origin}: {off}", table.height)
        return RowsRefused(str(error), table.height)

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
            DataError: times off the grid, or further ahead than the bounds allow.
        """
        bounds = ends.rename({"time": "end"})
        table = portion.table.join(bounds, on="series_id", how="left", maintain_order="left")
        foreign = table.filter(pl.col("end").is_null())["series_id"].value_counts()
        strangers = dict(zip(foreign["series_id"].to_list(), foreign["count"].to_list(), strict=True))
        new = table.filter(pl.col("time") > pl.col("end")).drop("end")
        late = table.height - new.height - sum(strangers.values())
        self._check_places(new, ends)
        known = [name for name in self.artifact.schema.known if name in new.columns]
        if not new.height:
            rows = pl.DataFrame(schema=self._row_types(ends))
            counts = {"taken": 0, "ahead": 0, "late": late}
            return NewRows(rows=rows, judged=None, known=None, strangers=strangers, blank=rows, **counts)
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
        came = new.filter(pl.any_horizontal(pl.col(self.schema.columns).is_not_null()))
        taken = came.join(reached, on="series_id").filter(inside)
        covariates = [*self.schema.past, *self.schema.known]
        return NewRows(
            rows=self._columns(rows),
            judged=judged,
            known=told,
            taken=taken.height,
            ahead=came.height - taken.height,
            late=late,
            strangers=strangers,
            blank=taken.select("series_id", "time", *covariates).filter(
                pl.any_horizontal(pl.col(covariates).is_null()) if covariates else pl.lit(False)
            ),
        )

    def _check_places(self, new: pl.DataFrame, ends: pl.DataFrame) -> None:
        """Refuse times too far ahead; rows of the store may be of any clock."""
        seen = pl.any_horizontal(pl.col(self.schema.targets).is_not_null()).alias("is_seen")
        rows = new.select("series_id", "time", seen)
        finders = (wide_gaps,) if self.mapping is None else (wide_gaps, ahead_of_clock)
        for find in finders:
            bad, reason = find(rows, ends, self.artifact.grid, self._bounds)
            if bad.any():
                raise DataError(reason)

    def _columns(self, table: pl.DataFrame) -> pl.DataFrame:
        return table.select("series_id", "time", *self.artifact.schema.columns)

    def _row_types(self, ends: pl.DataFrame) -> dict[str, Any]:
        columns = dict.fromkeys(self.artifact.schema.columns, pl.Float64)
        return {"series_id": pl.String, "time": ends["time"].dtype, **columns}
