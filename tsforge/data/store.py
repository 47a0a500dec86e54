"""The series store: datasets, their observations and the record of every batch, in one SQL database.

A batch is one transaction: either all of its rows and its record are there, or none, also after a kill or a power cut.
Writing the same rows again changes nothing; a corrected value replaces the older one; a missing value does not erase an
older one unless asked to. A row without any value is not stored: it is a gap, and reading puts gaps back on the grid.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import polars as pl
from sqlalchemy import ColumnElement, Connection, Engine, Numeric, Table, case, cast, delete, exists, func, or_, select

from tsforge.core.errors import BackendError, DataError, EmptySpanError, TsforgeError
from tsforge.data.findings import IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TIME_DTYPE, TimeLike, show_time, time_number
from tsforge.data.sql import open_engine, transaction
from tsforge.data.store_bulk import fetch, stage_rows
from tsforge.data.store_limits import check_spans, overlong_series
from tsforge.data.store_records import (
    BatchRecord,
    close_batch,
    close_orphans,
    define,
    definition,
    has_tables,
    label_variates,
    lock,
    make_tables,
    open_batch,
    statics,
    write_labels,
    write_rows,
    write_series,
)
from tsforge.data.store_tables import BATCHES, DATASETS, LABELS, SERIES, Definition
from tsforge.data.vintages import VintageFrame

_IN_LIMIT = 5_000  # more series than this are filtered after reading: databases limit the values of one statement


class Extent(NamedTuple):
    """What is stored of a series up to a time: rows with a value, publications of them, and a digest of the values.

    Where publications are stored, the digest is that of the last value of each cell.
    """

    rows: int
    publications: int
    digest: int


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What a data set holds up to given times, and what came into it lately, in one snapshot.

    Attributes:
        made: when the data set was made, which tells it from an earlier one of its name.
        batch: number of the last batch before any that is still at work; 0 for none.
        news: batches after a given one that brought anything: number, new rows, changed rows.
        extents: by series and time; none where nothing is stored up to then, or nothing was counted.
    """

    made: str
    batch: int
    news: tuple[tuple[int, int, int], ...]
    extents: Mapping[tuple[str, int], Extent]


class SeriesStore:
    """Datasets in the database at ``database_url`` (SQLite or PostgreSQL); nothing is connected before the first call.

    Raises:
        ConfigError: the address is malformed or its driver is missing.
    """

    def __init__(self, database_url: str) -> None:
        self._engine = open_engine(database_url)

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for tests and administration."""
        return self._engine

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def write(
        self,
        name: str,
        frame: SeriesFrame | VintageFrame,
        *,
        report: IngestReport | None = None,
        config: Mapping[str, Any] | None = None,
        nulls: Literal["keep", "erase"] = "keep",
        labels: pl.DataFrame | None = None,
        present: pl.DataFrame | None = None,
    ) -> BatchRecord:
        """Bring a frame into dataset ``name`` in one transaction and return the record of it.

        Args:
            name: the dataset, made on its first batch.
            frame: the rows, or all publications of them.
            report: how they were read; what is erased is added to its findings.
            config: settings of the dataset as plain types, kept beside it.
            nulls: whether a missing value leaves an older one (``keep``) or removes it (``erase``).
            labels: known anomalies (``series_id, start, end, kind, variates``); they replace those of the same series.
            present: ``series_id, time`` of the rows of the source, which alone erase; None = all rows of the frame, the
                gaps that it filled among them.

        Raises:
            DataError: frequency, a role or the lack of publication times contradicts what is stored, or nothing could
                read the dataset afterwards (another grid, a stray time, series without a static value); recorded as a
                refused batch.
            BackendError: the database refused; nothing is changed.
        """
        report = report or IngestReport("frame", frame.num_rows, frame.num_rows)
        batch = self._begin(name, report)
        try:
            with transaction(self._engine, f"write dataset '{name}' to") as connection:
                lock(connection, name)
                close_orphans(connection, name, batch)
                dataset = define(connection, name, frame, config)
                too_long = overlong_series(connection, dataset, frame.series_ids)
                done = write_rows(connection, dataset, frame, erase=nulls == "erase", present=present)
                added = write_series(connection, dataset, frame)
                check_spans(connection, definition(connection, name), frame, too_long | added)
                if labels is not None:
                    write_labels(connection, dataset, labels)
                report.add("replaced", "stored values erased by missing ones (nulls=erase)", done.erased)
                report.add("note", "stored rows left without a value", done.removed)
                return close_batch(
                    connection,
                    batch,
                    status="done",
                    fingerprint=frame.fingerprint(),
                    counts=done[:3],
                    findings=report.to_dict()["findings"],
                )
        except BaseException as error:
            self._abandon(batch, error)
            raise

    def record_refusal(self, name: str, report: IngestReport, reason: str) -> BatchRecord:
        """Record a batch that never reached the store (unreadable source, blocking check) and return its record.

        Raises:
            BackendError: the database refused.
        """
        batch = self._begin(name, report)
        with transaction(self._engine, f"record a refused batch of '{name}' in") as connection:
            return close_batch(connection, batch, status="refused", error=reason)

    def _begin(self, name: str, report: IngestReport) -> int:
        with transaction(self._engine, f"write dataset '{name}' to") as connection:
            make_tables(connection)
            return open_batch(connection, name, report.to_dict())

    def _abandon(self, batch: int, error: BaseException) -> None:
        """Mark a batch that did not end well; when even that fails, the next batch marks it."""
        status = "refused" if isinstance(error, DataError) else "failed"
        if not isinstance(error, TsforgeError):
            status = "interrupted"
        try:
            with transaction(self._engine, "record a failed batch in") as connection:
                close_batch(connection, batch, status=status, error=str(error) or type(error).__name__)
        except BackendError:
            return

    def read(
        self,
        name: str,
        *,
        series: Sequence[str] | None = None,
        start: TimeLike | None = None,
        end: TimeLike | None = None,
    ) -> SeriesFrame:
        """Return the stored rows of a dataset, all of them or some series and a span (both ends included).

        Where publications are stored, a row holds the last value of each cell.

        Raises:
            DataError: the dataset or a series is unknown, or no row lies in the span.
            BackendError: the database did not answer.
        """
        dataset, rows, constants = self._rows(name, series, start, end)
        if dataset.has_vintages:
            return VintageFrame(rows, dataset.schema, constants, require_targets=False).latest()
        return SeriesFrame(rows, dataset.schema, constants, require_targets=False)

    def has_vintages(self, name: str) -> bool:
        """Return whether a dataset keeps publications.

        Raises:
            DataError: the dataset is unknown.
        """
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            return definition(connection, name).has_vintages

    def read_vintages(self, name: str, *, series: Sequence[str] | None = None) -> VintageFrame:
        """Return all publications of a dataset, or those of some series.

        Raises:
            DataError: the dataset or a series is unknown, or it keeps one value a cell.
            BackendError: the database did not answer.
        """
        dataset, rows, constants = self._rows(name, series, None, None)
        if not dataset.has_vintages:
            raise DataError(
                f"dataset '{name}' keeps one value a cell; ingest it with the column of publication times (published) "
                "under another name"
            )
        return VintageFrame(rows, dataset.schema, constants, require_targets=False)

    def _rows(
        self, name: str, series: Sequence[str] | None, start: TimeLike | None, end: TimeLike | None
    ) -> tuple[Definition, pl.DataFrame, pl.DataFrame | None]:
        """Return what the store knows of a dataset, its rows with their keys, and its static values."""
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            dataset = definition(connection, name)
            constants = statics(connection, dataset, series)
            table = dataset.table()
            integer = dataset.schema.has_integer_time
            keys = [column.name for column in table.primary_key.columns]
            statement = select(table).order_by(*(table.c[key] for key in keys))
            if series is not None and len(series) <= _IN_LIMIT:
                statement = statement.where(table.c.series_id.in_(list(series)))
            if start is not None:
                statement = statement.where(table.c.time >= time_number(start, integer=integer))
            if end is not None:
                statement = statement.where(table.c.time <= time_number(end, integer=integer))
            dtypes: dict[str, pl.DataType] = {column.name: pl.Float64() for column in table.columns}
            clocks = {key: pl.Int64() for key in keys[1:]}
            rows = fetch(connection, statement, dtypes | {"series_id": pl.String()} | clocks)
        if series is not None and len(series) > _IN_LIMIT:
            rows = rows.filter(pl.col("series_id").is_in(list(series)))
        if not rows.height:
            if (
                start is not None
                and end is not None
                and time_number(end, integer=integer) < time_number(start, integer=integer)
            ):
                raise DataError(f"end {end} lies before start {start}")
            raise EmptySpanError(f"dataset '{name}' has no rows between {start or 'its start'} and {end or 'its end'}")
        if not integer:
            rows = rows.with_columns(pl.col(keys[1:]).cast(TIME_DTYPE))
        return dataset, rows.rename({column: variate for variate, column in dataset.columns.items()}), constants

    def config(self, name: str) -> dict[str, Any]:
        """Return the settings kept with a dataset (plain types, empty if none were given)."""
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            return dict(definition(connection, name).config)

    def series_ids(self, name: str) -> frozenset[str]:
        """Return the series of a dataset, none where it is unknown."""
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            if not has_tables(connection):
                return frozenset()
            of_it = select(DATASETS.c.id).where(DATASETS.c.name == name).scalar_subquery()
            return frozenset(
                connection.execute(select(SERIES.c.series_id).where(SERIES.c.dataset_id == of_it)).scalars()
            )

    def labels(self, name: str) -> pl.DataFrame:
        """Return the known anomalies of a dataset: ``series_id, start, end, kind, variates`` (no rows if none)."""
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            dataset = definition(connection, name)
            rows = connection.execute(
                select(LABELS).where(LABELS.c.dataset_id == dataset.id).order_by(LABELS.c.series_id, LABELS.c.start)
            ).all()
        time = pl.Int64() if dataset.schema.has_integer_time else TIME_DTYPE
        return pl.DataFrame(
            {
                "series_id": pl.Series([row.series_id for row in rows], dtype=pl.String),
                "start": pl.Series([row.start for row in rows], dtype=pl.Int64).cast(time),
                "end": pl.Series([row.end for row in rows], dtype=pl.Int64).cast(time),
                "kind": pl.Series([row.kind for row in rows], dtype=pl.String),
                "variates": pl.Series(
                    [label_variates(name, row.series_id, row.variates) for row in rows], dtype=pl.List(pl.String)
                ),
            }
        )

    def datasets(self) -> pl.DataFrame:
        """Return one row a dataset: ``name, freq, series, rows, columns, start, end, created, updated``."""
        with transaction(self._engine, "list the datasets of", write=False) as connection:
            found: Sequence[Any] = []
            counts: dict[int, int] = {}
            if has_tables(connection):
                found = connection.execute(select(DATASETS).order_by(DATASETS.c.name)).all()
                per_dataset = select(SERIES.c.dataset_id, func.count()).group_by(SERIES.c.dataset_id)
                counts = {row[0]: row[1] for row in connection.execute(per_dataset)}
        records = []
        for row in found:
            item = Definition.from_row(row)
            records.append(
                {
                    "name": item.name,
                    "freq": item.schema.freq,
                    "series": counts.get(item.id, 0),
                    "rows": item.num_rows,
                    "columns": len(item.schema.columns),
                    "start": _shown(item.first_time, item),
                    "end": _shown(item.last_time, item),
                    "created": row.created,
                    "updated": row.updated,
                }
            )
        return pl.DataFrame(records, schema=_DATASET_COLUMNS).with_columns(_utc("created"), _utc("updated"))

    def batches(self, name: str | None = None) -> pl.DataFrame:
        """Return the batch records of a dataset (or of all), newest first; the columns of ``BatchRecord``."""
        with transaction(self._engine, "list the batches of", write=False) as connection:
            records: list[dict[str, Any]] = []
            if has_tables(connection):
                statement = select(BATCHES).order_by(BATCHES.c.id.desc())
                if name is not None:
                    statement = statement.where(BATCHES.c.dataset == name)
                records = [dict(row) for row in connection.execute(statement).mappings()]
        return pl.DataFrame(records, schema=_BATCH_COLUMNS).with_columns(_utc("started"), _utc("finished"))

    def changed(self, name: str) -> str:
        """Return what is another text whenever a batch has reached a dataset, or it was made anew; one short query.

        Raises:
            DataError: the dataset is unknown.
            BackendError: the database did not answer.
        """
        moments = select(DATASETS.c.created, DATASETS.c.updated).where(DATASETS.c.name == name)
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            row = connection.execute(moments).one_or_none() if has_tables(connection) else None
            if row is None:
                definition(connection, name)  # says what there is
        assert row is not None
        return f"{row.created.isoformat()} {row.updated.isoformat()}"

    def stock(
        self, name: str, ends: pl.DataFrame, columns: Sequence[str], *, after: int = 0, only_if_news: bool = False
    ) -> Stock:
        """Return what is stored of series up to some times, and the batches after number ``after``.

        Args:
            name: the dataset.
            ends: ``series_id, time``, times as the store keeps them (microseconds since 1970, or integer time).
            columns: whose values to watch; those that are not stored are left out, all of them where none is.
            after: number of a batch.
            only_if_news: count nothing where nothing came after it: counting reads the whole history.

        Raises:
            DataError: the dataset is unknown.
            BackendError: the database did not answer.
        """
        with transaction(self._engine, f"read dataset '{name}' from", write=False) as connection:
            dataset = definition(connection, name)
            made = connection.execute(select(DATASETS.c.created).where(DATASETS.c.id == dataset.id)).scalar_one()
            fields = (BATCHES.c.id, BATCHES.c.status, BATCHES.c.rows_new, BATCHES.c.rows_changed)
            since = select(*fields).where(BATCHES.c.dataset == name, BATCHES.c.id > after).order_by(BATCHES.c.id)
            batches = connection.execute(since).all()
            done = [row for row in batches if row.status == "done" and (row.rows_new or row.rows_changed)]
            news = tuple((row.id, row.rows_new, row.rows_changed) for row in done)
            counted = {} if only_if_news and not news else _extents(connection, dataset, ends, columns)
        at_work = min((row.id for row in batches if row.status == "running"), default=None)
        ended = [row.id for row in batches if at_work is None or row.id < at_work]
        return Stock(made=made.isoformat(), batch=max(ended, default=after), news=news, extents=counted)

    def remove(self, name: str) -> None:
        """Remove a dataset with its rows, series and labels; its batch records stay.

        Raises:
            DataError: the dataset is unknown.
        """
        with transaction(self._engine, f"remove dataset '{name}' from") as connection:
            lock(connection, name)
            dataset = definition(connection, name)
            dataset.table().drop(connection)
            for table in (SERIES, LABELS):
                connection.execute(delete(table).where(table.c.dataset_id == dataset.id))
            connection.execute(delete(DATASETS).where(DATASETS.c.id == dataset.id))


_WEIGHTS = 1_009  # a prime: neighbours in time differ in weight, so that values which changed places are seen


def _extents(
    connection: Connection, dataset: Definition, ends: pl.DataFrame, columns: Sequence[str]
) -> dict[tuple[str, int], Extent]:
    """Return what is stored up to some times, by one grouped query over the key of the table."""
    table = dataset.table()
    watched = [dataset.columns[name] for name in columns if name in dataset.columns] or list(dataset.columns.values())
    stage = stage_rows(connection, [], ends.select("series_id", "time").unique(), has_vintages=False)
    rows = func.count(table.c.time.distinct()) if dataset.has_vintages else func.count()
    sums = [_sum(connection, _cell(table, name), table.c.time) for name in watched]
    statement = (
        select(stage.c.series_id, stage.c.time, rows, func.count(), *sums)
        .join_from(stage, table, (stage.c.series_id == table.c.series_id) & (table.c.time <= stage.c.time))
        .where(or_(*(table.c[name].is_not(None) for name in watched)))
        .group_by(stage.c.series_id, stage.c.time)
    )
    found = connection.execute(statement).all()
    stage.drop(connection)
    return {(row[0], row[1]): _extent(*row[2:]) for row in map(tuple, found)}


_NO_VALUE = 0.618  # stands for a missing value, which is not 0


def _cell(table: Table, name: str) -> ColumnElement[Any]:
    """Return a value less what a missing one stands for, 0 for those of a cell that are not its last publication."""
    value = func.coalesce(table.c[name] - _NO_VALUE, 0.0)
    if "published" not in table.c:
        return value
    newer = table.alias()
    same = (newer.c.series_id == table.c.series_id) & (newer.c.time == table.c.time)
    is_old = exists().where(same, newer.c.published > table.c.published, newer.c[name].is_not(None))
    return case((is_old, 0.0), else_=value)


def _sum(connection: Connection, value: ColumnElement[Any], time: ColumnElement[int]) -> ColumnElement[Any]:
    """Return a sum that a changed, added or removed value changes, and the order of summing does not.

    PostgreSQL sums in any order, so the numbers are decimal ones there; SQLite sums in the order of its key.
    """
    weight = func.abs(time % _WEIGHTS) + 1
    exact = cast(value, Numeric) if connection.dialect.name == "postgresql" else value
    return func.sum(exact * weight)


def _extent(rows: int, publications: int, *sums: object) -> Extent:
    return Extent(rows, publications, zlib.crc32(" ".join(map(str, sums)).encode()))


_DATASET_COLUMNS: dict[str, Any] = {
    "name": pl.String,
    "freq": pl.String,
    "series": pl.Int64,
    "rows": pl.Int64,
    "columns": pl.Int64,
    "start": pl.String,
    "end": pl.String,
    "created": pl.Datetime("us"),
    "updated": pl.Datetime("us"),
}
_BATCH_COLUMNS: dict[str, Any] = {
    "id": pl.Int64,
    "dataset": pl.String,
    "status": pl.String,
    "started": pl.Datetime("us"),
    "finished": pl.Datetime("us"),
    "source": pl.String,
    "fingerprint": pl.String,
    "rows_in": pl.Int64,
    "rows_new": pl.Int64,
    "rows_changed": pl.Int64,
    "rows_unchanged": pl.Int64,
    "rows_refused": pl.Int64,
    "reasons": pl.String,
}


def _utc(column: str) -> pl.Expr:
    return pl.col(column).dt.replace_time_zone("UTC")


def _shown(value: int | None, dataset: Definition) -> str | None:
    if value is None or dataset.schema.has_integer_time:
        return None if value is None else str(value)
    return show_time(pl.Series([value], dtype=pl.Int64).cast(TIME_DTYPE)[0])
