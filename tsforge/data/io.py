"""Reading sources as they are: CSV, Parquet, SQL and embedded files become one lazy table; pandas in and out.

Nothing is interpreted yet: text stays text, so that ``cleaning`` can say which cell of which row is wrong.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import URL, ColumnClause, Connection, CursorResult, column, inspect, select, table
from sqlalchemy.exc import NoSuchTableError, OperationalError, ProgrammingError
from sqlalchemy.sql import quoted_name

from tsforge.core.errors import BackendError, ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.config import CsvSource, EmbeddedSource, ParquetSource, SqlSource
from tsforge.data.embedded import load_embedded
from tsforge.data.frame import SeriesFrame
from tsforge.data.sql import explained, open_engine, safe_url

_LOG = get_logger(__name__)

if TYPE_CHECKING:
    import pandas as pd

_TAIL = 1 << 16  # bytes in which the last line of a file is looked for
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_FETCH_ROWS = 50_000
_MOST_DIGITS = 38  # of a whole number that may be an id
_PACKED = {  # how compressed files begin
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip (so are Excel workbooks)",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
}
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_SQLITE_MISTAKE = re.compile(r"no such|syntax error|incomplete input|ambiguous column")  # not told apart by class


@dataclass(frozen=True)
class RawTable:
    """A table as its source holds it.

    Attributes:
        frame: lazy table, columns as named by the source.
        origin: where it came from, without secrets, for messages and batch records.
        decimal: decimal mark of numbers in text.
        short: cells of every row that has fewer than the header, by its number (from 1 below the header).
    """

    frame: pl.LazyFrame
    origin: str
    decimal: str = "."
    short: Mapping[int, int] = field(default_factory=dict)


def read_source(source: CsvSource | ParquetSource | SqlSource | EmbeddedSource) -> RawTable:
    """Return the raw table of a source.

    Raises:
        DataError: missing or empty file, wrong delimiter, other encoding, damaged file, unknown table.
        BackendError: the database or the disk did not answer.
        ConfigError: the named environment variable is not set, or a driver is missing.
    """
    match source:
        case CsvSource():
            return _read_csv(source)
        case ParquetSource():
            return _read_parquet(source.path)
        case SqlSource():
            return _read_sql(source)
        case EmbeddedSource():
            return _read_parquet(str(load_embedded(source.dataset)), origin=f"embedded:{source.dataset}")


def collect(raw: RawTable, columns: Iterable[str]) -> pl.DataFrame:
    """Return the named columns of a raw table; reading errors become one ``DataError``."""
    try:
        return raw.frame.select(list(columns)).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{raw.origin}: {_reason(error)}") from error
    except OSError as error:
        raise BackendError(f"cannot read {raw.origin}: {error.strerror or error}") from error


def column_types(raw: RawTable) -> dict[str, pl.DataType]:
    """Return name -> type of every column without reading the rows."""
    try:
        return dict(raw.frame.collect_schema())
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{raw.origin}: {_reason(error)}") from error


def _reason(error: pl.exceptions.PolarsError) -> str:
    message = str(error).strip().splitlines()[0]
    lowered = message.lower()
    if "parquet" in lowered or "par1" in lowered:
        return f"not a readable Parquet file ({message})"
    if "more fields than defined" in lowered:
        return "a row has more fields than the header; quote cells that hold the separator, or repair the row"
    if "could not parse" in lowered:
        return f"a quoted cell is not closed ({message})"
    return message


def _files(path: str, pattern: str, kind: str) -> list[Path]:
    """Return the files behind a path: the file itself, a glob, or a folder searched through."""
    place = Path(path).expanduser()
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(item for item in place.rglob(pattern) if item.is_file())
        if not found:
            raise DataError(f"the folder {path} holds no {kind} file ({pattern})")
    else:
        found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
        if not found:
            what = "no file matches" if glob.has_magic(path) else "there is no file"
            raise DataError(f"{what} {path} (looked from {Path.cwd()}); check source.path")
    for item in found:
        if not os.access(item, os.R_OK):
            raise DataError(f"{item} cannot be read: permission denied")
        if item.stat().st_size == 0:
            raise DataError(f"{item} is empty (0 bytes)")
    return found


def _read_csv(source: CsvSource) -> RawTable:
    files = _files(source.path, "*.csv", "CSV")
    frames = []
    header: list[str] | None = None
    short: dict[int, int] = {}
    above = 0
    for item in files:
        _refuse_packed(item)
        columns = _header(item, source)
        if header is not None and set(columns) != set(header):
            other = sorted(set(columns) ^ set(header))
            raise DataError(f"{item} and {files[0]} have different columns (in one of them only: {listing(other)})")
        header = header or columns
        _check_end(item, source, columns)
        frames.append(_scan_one_csv(item, source))
        height, found = _short_rows(item, frames[-1], source, columns)
        short |= {above + row: cells for row, cells in found.items()}
        above += height
    frame = frames[0] if len(frames) == 1 else pl.concat(frames, how="diagonal")
    return RawTable(frame, _origin(files), decimal=source.decimal, short=short)


def _origin(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"


def _refuse_packed(item: Path) -> None:
    """Name compression for what it is: to a reader of text it is another encoding, or one long column name."""
    with item.open("rb") as handle:
        start = handle.read(10)
    name = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    name = "bzip2" if _BZIP2.match(start) else name
    if name is not None:
        raise DataError(f"{item} is compressed with {name}; unpack it first, and give the path of the text")


def _header(item: Path, source: CsvSource) -> list[str]:
    """Return the column names of a CSV file, after looking for the usual mistakes."""
    try:
        with item.open(encoding=source.encoding, newline="") as handle:
            for _ in range(source.skip_lines):
                handle.readline()
            rows = csv.reader(handle, delimiter=source.separator)
            columns = next(rows, [])
            has_rows = next(rows, None) is not None
    except UnicodeError as error:
        raise _wrong_encoding(item, source.encoding) from error
    except csv.Error as error:  # a cell of more than 131,072 characters
        raise DataError(f"{item}: {error} (line {rows.line_num}); a quote seems not to be closed") from error
    columns = [name.removeprefix("\ufeff") for name in columns]
    if not any(name.strip() for name in columns):
        raise DataError(f"{item} has no header line")
    if len(columns) == 1:
        rivals = [mark for mark in _SEPARATORS if mark != source.separator and mark in columns[0]]
        if rivals:
            rival = max(rivals, key=columns[0].count)
            raise DataError(
                f"{item} has one column named {columns[0]!r}: the cells seem to be separated by {_SEPARATORS[rival]}; "
                f"set source.separator={rival!r}"
            )
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise DataError(f"{item} has repeated column name(s): {listing(map(repr, repeated))}; rename them")
    if not has_rows:
        raise DataError(f"{item} has a header ({len(columns)} columns) and no rows")
    return columns


def _check_end(item: Path, source: CsvSource, columns: list[str]) -> None:
    """Refuse a file that ends in the middle of a line: a number cut off would count as one, the rest as missing."""
    tail = _tail(item, source.encoding)
    if not tail or tail.endswith(("\n", "\r")) or "\n" not in tail:
        return
    cells = next(csv.reader([tail.rpartition("\n")[2]], delimiter=source.separator), [])
    if len(cells) < len(columns):
        raise DataError(
            f"{item} ends in the middle of a line ({len(cells)} of {len(columns)} cells): it is not written to its "
            "end; wait for the rest, or remove that line"
        )


def is_ended(path: Path, encoding: str) -> bool:
    """Return whether a text file ends with the end of a line (an empty one does).

    Raises:
        DataError: it is text of another encoding.
    """
    tail = _tail(path, encoding)
    return not tail or tail.endswith(("\n", "\r"))


def _tail(item: Path, encoding: str) -> str:
    """Return the end of a file as text."""
    if _is_utf8(encoding):
        with item.open("rb") as handle:
            handle.seek(max(0, item.stat().st_size - _TAIL))
            return handle.read().decode(errors="replace")
    try:  # where a character has several bytes, only reading from the start tells where one begins
        return item.read_bytes().decode(encoding)[-_TAIL:]
    except UnicodeError as error:
        raise _wrong_encoding(item, encoding) from error


def _short_rows(item: Path, frame: pl.LazyFrame, source: CsvSource, columns: list[str]) -> tuple[int, dict[int, int]]:
    """Return the number of rows of a file, and the cells of those that have fewer than the header names.

    Their missing cells would be read as nulls, and a number cut off as one. Blank lines are rows without a time.
    """
    width = max(at + 1 for at, name in enumerate(columns) if name.strip())  # rows may leave out what has no name
    try:
        is_null = frame.select(pl.nth(width - 1)).collect().to_series().is_null()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{item}: {_reason(error)}") from error
    if not is_null.any():  # so no row is short: it is not read a second time
        return len(is_null), {}
    with item.open(encoding=source.encoding, newline="") as handle:
        for _ in range(source.skip_lines):
            handle.readline()
        rows = csv.reader(handle, delimiter=source.separator)
        next(rows)
        try:
            counts = {row: len(cells) for row, cells in enumerate(rows, 1) if 0 < len(cells) < width}
        except csv.Error as error:  # a cell of more than 131,072 characters
            raise DataError(f"{item}: {error} (line {rows.line_num}); a quote seems not to be closed") from error
    return len(is_null), {row: count for row, count in counts.items() if row <= len(is_null) and is_null[row - 1]}


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig", "ascii")


def _wrong_encoding(item: Path, encoding: str) -> DataError:
    content = item.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
        hint = next((name for mark, name in marks.items() if content.startswith(mark)), "cp1252")
        return DataError(
            f"{item} is not {encoding}: byte {content[error.start]:#04x} at offset {error.start} (line {line}); "
            f"set source.encoding, for example {hint}"
        )
    except UnicodeError as error:
        return DataError(f"{item} is not {encoding}: {error}; set source.encoding")
    return DataError(f"{item} cannot be decoded as {encoding}; set source.encoding")


def _scan_one_csv(item: Path, source: CsvSource) -> pl.LazyFrame:
    if _is_utf8(source.encoding):
        _check_utf8(item, source.encoding)
        data: Path | io.BytesIO = item
    else:
        try:
            data = io.BytesIO(item.read_bytes().decode(source.encoding).encode())
        except UnicodeError as error:
            raise _wrong_encoding(item, source.encoding) from error
    return pl.scan_csv(
        data,
        separator=source.separator,
        infer_schema=False,
        null_values=list(source.null_values),
        skip_lines=source.skip_lines,
        encoding="utf8",
        glob=False,
    )


def _check_utf8(item: Path, encoding: str) -> None:
    """Refuse other encodings before the scan, which would only say that some byte is wrong."""
    with item.open(encoding=encoding, newline="") as handle:
        try:
            while handle.read(1 << 22):
                pass
        except UnicodeError as error:
            raise _wrong_encoding(item, encoding) from error


def _read_parquet(path: str, origin: str | None = None) -> RawTable:
    place = Path(path).expanduser()
    files = _files(path, "*.parquet", "Parquet")
    if place.is_dir():  # handed over whole: its key=value parts become columns, of text: 07 and 7 are two series
        keys = dict.fromkeys(_hive_keys(place, files), pl.String())
        frame = pl.scan_parquet(place, hive_partitioning=bool(keys), hive_schema=keys or None)
    else:
        frame = pl.scan_parquet(files)
    raw = RawTable(frame, origin or (str(place) if place.is_dir() else _origin(files)))
    column_types(raw)
    return raw


def _hive_keys(place: Path, files: list[Path]) -> tuple[str, ...]:
    """Return the keys of a folder's key=value parts, outermost first.

    Raises:
        DataError: a part has several marks, or files lie under different keys: they would be read without any.
    """
    found: dict[tuple[str, ...], Path] = {}
    for item in files:
        parts = [part for part in item.relative_to(place).parent.parts if "=" in part]
        odd = [part for part in parts if part.count("=") > 1]
        if odd:
            raise DataError(
                f"{item}: the folder '{odd[0]}' has more than one '='; write %3D for one that belongs to the value"
            )
        found.setdefault(tuple(part.partition("=")[0] for part in parts), item)
    if len(found) > 1:
        (some, first), (others, second) = list(found.items())[:2]
        raise DataError(
            f"{first} and {second} lie under different keys ({listing(some) or 'none'}; {listing(others) or 'none'}); "
            "give every part of the folder the same ones, or the path of one kind"
        )
    return next(iter(found))


def source_url(source: SqlSource) -> str | URL:
    """Return the database URL of a source; from its environment variable where it names one.

    Raises:
        ConfigError: the variable is not set.
    """
    if source.path is not None:
        return URL.create("sqlite", database=source.path)  # a path may hold what means something in a URL
    if source.url is not None:
        return source.url
    name = source.url_env or ""
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name} is not set; it should hold the URL of the database")
    return value


def _read_sql(source: SqlSource) -> RawTable:
    url = source_url(source)
    engine = open_engine(url, read_only=True)
    origin = f"{safe_url(engine.url)} {source.table or 'query'}"
    try:
        with explained(engine, "read"), engine.connect() as connection:
            try:
                result = _run(source, connection)
            except (ProgrammingError, OperationalError) as error:
                reason = str(error.orig).strip().splitlines()[0]
                if isinstance(error, OperationalError) and not _SQLITE_MISTAKE.search(reason):
                    raise
                raise DataError(f"{origin}: the query failed: {reason}") from error
            names = [str(name) for name in result.keys()]  # noqa: SIM118 - a result is no mapping
            columns: list[list[Any]] = [[] for _ in names]
            for rows in result.partitions(_FETCH_ROWS):
                for cells, values in zip(columns, zip(*rows, strict=True), strict=True):
                    cells.extend(values)
    finally:
        engine.dispose()
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{origin}: the query returns repeated column(s) {listing(repeated)}; give them aliases")
    series = [typed_column(name, cells) for name, cells in zip(names, columns, strict=True)]
    return RawTable(pl.DataFrame(series).lazy(), origin)


def _run(source: SqlSource, connection: Connection) -> CursorResult[Any]:
    """Start a query as it stands, or one for all of a table; cells arrive as the driver gives them.

    The declared types of a SQLite table say nothing about its cells: read by them, DECIMAL(10,2) rounds 1.23456.
    """
    options = {"stream_results": True, "sqlite_raw_colnames": True}  # raw: EWR.temp is no column of a table EWR
    if source.query is not None:  # without parameters neither : nor % has a meaning
        if "\\:" in source.query:  # how older versions wanted a colon written
            _LOG.warning("source.query holds \\: and is run as it stands; write : alone where a plain colon is meant")
        return connection.execution_options(**options, no_parameters=True).exec_driver_sql(source.query)
    name = source.table or ""
    schema, _, plain = name.rpartition(".")
    try:
        found = inspect(connection).get_columns(plain, schema=schema or None)
    except NoSuchTableError as error:
        raise DataError(f"{safe_url(connection.engine.url)} has no table '{name}'; check source.table") from error
    whole = table(quoted_name(plain, quote=True), schema=quoted_name(schema, quote=True) if schema else None)
    columns: list[ColumnClause[Any]] = [column(quoted_name(item["name"], quote=True)) for item in found]
    return connection.execution_options(**options).execute(select(*columns).select_from(whole))


def typed_column(name: str, cells: list[Any]) -> pl.Series:
    """Return cells as one column.

    Decimals become whole numbers where all are (text where one is beyond 64 bits: it may be an id), else floats, which
    hold NaN, infinities and any number of digits. SQLite may mix types in a column, then its cells become text for the
    cell checks; so do addresses and UUIDs.
    """
    try:
        column = pl.Series(name, _without_decimals(cells), strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        column = None
    if column is None or column.dtype == pl.Object:
        return pl.Series(name, [None if cell is None else str(cell) for cell in cells], dtype=pl.String)
    return column


def _without_decimals(cells: list[Any]) -> list[Any]:
    decimals = [cell for cell in cells if isinstance(cell, Decimal)]
    if not decimals:
        return cells
    kind: Callable[[Decimal], Any] = float
    if all(cell.is_finite() and cell == cell.to_integral_value() for cell in decimals):
        if all(-(2**63) <= cell < 2**63 for cell in decimals):
            kind = int
        elif all(cell.adjusted() < _MOST_DIGITS for cell in decimals):
            kind = _digits
    return [kind(cell) if isinstance(cell, Decimal) else cell for cell in cells]


def _digits(whole: Decimal) -> str:
    return f"{whole.to_integral_value():f}"  # 12.00 is the id 12


def to_pandas(frame: SeriesFrame | pl.DataFrame) -> pd.DataFrame:
    """Return the long table as pandas: ``series_id``, ``time`` (UTC) and one float column a variate."""
    table = frame.table if isinstance(frame, SeriesFrame) else frame
    return table.to_pandas()


def from_pandas(table: pd.DataFrame) -> pl.DataFrame:
    """Return a pandas table as polars, times with a zone in UTC; an index that carries names becomes columns.

    Raises:
        DataError: a column name is not a string.
    """
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    odd = [name for name in table.columns if not isinstance(name, str)]
    if odd:
        raise DataError(f"column names must be strings (not {listing(map(repr, odd))}); rename them")
    zoned = [str(name) for name, kind in table.dtypes.items() if getattr(kind, "tz", None) is not None]
    plain = table.assign(**{name: table[name].dt.tz_convert(None) for name in zoned})  # UTC, without saying so
    return pl.from_pandas(plain).with_columns(pl.col(name).dt.replace_time_zone("UTC") for name in zoned)
