"""Steps of a batch inside its transaction: lock, define, write rows, write the record."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import polars as pl
from sqlalchemy import Connection, delete, func, insert, inspect, select, update

from tsforge.core.errors import BackendError, DataError, listing, nearest
from tsforge.core.formats import check_version, version_in_text
from tsforge.data.sql import inserted_key, safe_url
from tsforge.data.store_bulk import (
    compare,
    count_erased,
    drop_blank,
    insert_rows,
    stage_rows,
    upsert,
)
from tsforge.data.store_limits import check_grid, check_statics
from tsforge.data.store_tables import (
    BATCHES,
    DATASETS,
    FORMAT,
    INFO,
    LABELS,
    METADATA,
    PLAIN_FORMAT,
    SERIES,
    Definition,
    merge_schemas,
    place_columns,
    schema_text,
)
from tsforge.data.stored_json import stored_json
from tsforge.data.vintages import History, VintageFrame


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """What one batch did.

    Attributes:
        id: number of the batch.
        dataset: its dataset.
        status: ``done``, ``refused`` (by the data or its checks), ``failed`` (by the database), ``interrupted``.
        started, finished: UTC.
        source: where the rows came from, without secrets.
        fingerprint: content of the frame, see ``SeriesFrame.fingerprint``.
        rows_in: rows of the source; the others count rows of the store: series and time.
        rows_new, rows_changed, rows_unchanged: what the batch did to the store.
        rows_refused: source rows left out.
        reasons: findings of the reading, and the error of a batch that was not done.
    """

    id: int
    dataset: str
    status: str
    started: datetime
    finished: datetime
    source: str
    fingerprint: str | None
    rows_in: int
    rows_new: int
    rows_changed: int
    rows_unchanged: int
    rows_refused: int
    reasons: Mapping[str, Any]


class Written(NamedTuple):
    """What a batch did to the rows of a store.

    Attributes:
        new, changed, unchanged: rows of the batch.
        erased: stored values that a missing one removed.
        removed: stored rows that were left without a value.
    """

    new: int
    changed: int
    unchanged: int
    erased: int
    removed: int


def now() -> datetime:
    """Return the time as records hold it: UTC without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def has_tables(connection: Connection) -> bool:
    """Return whether a store was ever written here.

    Raises:
        BackendError: a newer tsforge wrote it, so that its tables may mean something else, or its format is damaged.
    """
    if not inspect(connection).has_table(DATASETS.name):
        return False
    _check_format(connection)
    return True


def _check_format(connection: Connection) -> bool:
    """Return whether the store states its format, after checking that it is one we know."""
    found = connection.execute(select(INFO.c.value).where(INFO.c.key == "format")).scalar()
    if found is not None:
        what = f"the store at {safe_url(connection.engine.url)}"
        check_version(version_in_text(found), FORMAT, what=what, kind="store format", error=BackendError)
    return found is not None


def make_tables(connection: Connection) -> None:
    """Create what is missing.

    Raises:
        BackendError: a newer tsforge wrote the store, or its format is damaged.
    """
    lock(connection, "tsf_tables")  # two processes creating the same table would collide
    METADATA.create_all(connection)
    if not _check_format(connection):
        connection.execute(insert(INFO).values(key="format", value=str(PLAIN_FORMAT)))


def lock(connection: Connection, name: str) -> None:
    """Let one writer at a time into a dataset until the transaction ends (SQLite locks the file already)."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(0x7466, zlib.crc32(name.encode()) - 2**31)))


def close_orphans(connection: Connection, name: str, batch: int) -> None:
    """Mark batches of a dataset that say they run although the lock is ours: their process was killed.

    One that merely waits for the lock is marked too and sets its true state when it ends.
    """
    connection.execute(
        update(BATCHES)
        .where(BATCHES.c.dataset == name, BATCHES.c.status == "running", BATCHES.c.id != batch)
        .values(status="interrupted", finished=now())
    )


def definition(connection: Connection, name: str) -> Definition:
    """Return what the store knows of a dataset.

    Raises:
        DataError: nothing has that name.
    """
    names: list[str] = []
    if has_tables(connection):
        row = connection.execute(select(DATASETS).where(DATASETS.c.name == name)).one_or_none()
        if row is not None:
            return Definition.from_row(row)
        names = list(connection.execute(select(DATASETS.c.name).order_by(DATASETS.c.name)).scalars())
    known = f" (known: {listing(names, 10)})" if names else " (the store is empty; ingest it first)"
    raise DataError(f"no dataset '{name}' in the store{nearest(name, names)}{known}")


def define(connection: Connection, name: str, frame: History, config: Mapping[str, Any] | None) -> Definition:
    """Return the definition of a dataset that has room for ``frame``, made or widened if need be.

    Raises:
        DataError: frequency or roles contradict what is stored, or only one of both has publication times.
    """
    row = connection.execute(select(DATASETS).where(DATASETS.c.name == name)).one_or_none()
    has_vintages = isinstance(frame, VintageFrame)
    if row is None:
        if has_vintages:  # so that a version that knows of no publications writes nothing beside them
            connection.execute(update(INFO).where(INFO.c.key == "format").values(value=str(FORMAT)))
        connection.execute(
            insert(DATASETS).values(
                name=name,
                schema=schema_text(frame.schema, has_vintages=has_vintages),
                columns=json.dumps(place_columns(frame.schema, {})),
                config=json.dumps(dict(config or {})),
                num_rows=0,
                created=now(),
                updated=now(),
            )
        )
        made = definition(connection, name)
        made.table().create(connection)
        return made
    old = Definition.from_row(row)
    if old.has_vintages != has_vintages:
        have, come = ("publication times", "come without") if old.has_vintages else ("one value a cell", "have them")
        raise DataError(
            f"dataset '{name}' is stored with {have}, the new rows {come} (setting published); keep the setting, or "
            "ingest under another name"
        )
    schema = merge_schemas(name, old.schema, frame.schema)
    columns = place_columns(schema, old.columns)
    quote = connection.dialect.identifier_preparer.quote
    kind = "DOUBLE PRECISION"
    for column in list(columns.values())[len(old.columns) :]:
        connection.exec_driver_sql(f"ALTER TABLE {quote(old.table().name)} ADD COLUMN {quote(column)} {kind}")
    text = schema_text(schema, has_vintages=has_vintages)
    changes: dict[str, Any] = {"schema": text, "columns": json.dumps(columns)}
    if config is not None:
        changes["config"] = json.dumps(dict(config))
    connection.execute(update(DATASETS).where(DATASETS.c.id == old.id).values(**changes))
    return definition(connection, name)


def write_rows(
    connection: Connection, dataset: Definition, frame: History, *, erase: bool, present: pl.DataFrame | None = None
) -> Written:
    """Bring the rows in and return what that did.

    Args:
        connection: in a transaction.
        dataset: as ``define`` returned it.
        frame: the rows.
        erase: whether a missing value removes a stored one.
        present: ``series_id, time`` of the rows that may erase, those without a value among them, which the frame need
            not hold; None = every row of the frame. Of no meaning for publications.

    Raises:
        DataError: they lie between the rows that are stored, so that nothing could read both.
    """
    variates = list(frame.schema.columns)
    columns = [dataset.columns[name] for name in variates]
    clocks = ["time", *(["published"] if dataset.has_vintages else [])]
    whole = frame.table.select(
        "series_id", pl.col(clocks).cast(pl.Int64), *(pl.col(name).alias(dataset.columns[name]) for name in variates)
    )
    rows = given = whole.filter(pl.any_horizontal(pl.col(columns).is_not_null()))
    check_grid(connection, dataset, frame, given["time"])
    table = dataset.table()
    if dataset.num_rows == 0:
        absent = [column.name for column in table.columns if column.name not in rows.columns]
        full = rows.with_columns(pl.lit(None, pl.Float64).alias(name) for name in absent)
        insert_rows(connection, table, full.select([column.name for column in table.columns]))
        _note_extent(connection, dataset, rows, rows.height, removed=0)
        return Written(rows.height, 0, 0, 0, 0)
    if erase:
        keys = None if present is None else present.select("series_id", pl.col("time").cast(pl.Int64))
        rows = whole if keys is None else keys.join(whole, on=["series_id", "time"], how="left")
    stage = stage_rows(connection, columns, rows, has_vintages=dataset.has_vintages)
    staged = rows.height - (drop_blank(connection, stage, table) if erase else 0)
    erased = count_erased(connection, stage, table) if erase else 0
    new, changed = compare(connection, stage, table, erase=erase)
    if new or changed:
        upsert(connection, stage, table, erase=erase)
    removed = _drop_empty(connection, dataset) if erased else 0
    stage.drop(connection)
    _note_extent(connection, dataset, given, dataset.num_rows + new - removed, removed=removed)
    return Written(new, changed, staged - new - changed, erased, removed)


def _drop_empty(connection: Connection, dataset: Definition) -> int:
    table = dataset.table()
    empty = [table.c[column].is_(None) for column in dataset.columns.values()]
    return int(connection.execute(delete(table).where(*empty)).rowcount)


def _note_extent(
    connection: Connection, dataset: Definition, rows: pl.DataFrame, num_rows: int, *, removed: int
) -> None:
    """Note what is stored now; where rows were removed, their times may have been the outer ones."""
    times: list[int] = []
    if removed:
        clock = dataset.table().c.time
        times += [
            time for time in connection.execute(select(func.min(clock), func.max(clock))).one() if time is not None
        ]
    elif num_rows:
        times += [value for value in (dataset.first_time, dataset.last_time) if value is not None and dataset.num_rows]
        times += rows.select(low=pl.col("time").min(), high=pl.col("time").max()).row(0) if rows.height else ()
    connection.execute(
        update(DATASETS)
        .where(DATASETS.c.id == dataset.id)
        .values(
            num_rows=num_rows, first_time=min(times, default=None), last_time=max(times, default=None), updated=now()
        )
    )


def write_series(connection: Connection, dataset: Definition, frame: History) -> frozenset[str]:
    """Record the series of a frame with their static values and return the new ones; newer values replace older ones.

    Raises:
        DataError: a series would lack a static value, so that nothing could read it.
    """
    given: dict[str, dict[str, float]] = {name: {} for name in frame.series_ids}
    if frame.static is not None:
        for record in frame.static.to_dicts():
            given[record.pop("series_id")] = record
    mine = SERIES.c.dataset_id == dataset.id
    known = {
        row.series_id: _static(dataset, row.series_id, row.static)
        for row in connection.execute(select(SERIES.c.series_id, SERIES.c.static).where(mine))
    }
    added = [
        {"dataset_id": dataset.id, "series_id": name, "static": json.dumps(given[name])}
        for name in given
        if name not in known
    ]
    if added:
        connection.execute(insert(SERIES), added)
    for name, values in given.items():
        merged = known.get(name, {}) | values
        if name in known and merged != known[name]:
            connection.execute(update(SERIES).where(mine, SERIES.c.series_id == name).values(static=json.dumps(merged)))
    check_statics(dataset, known, {name: known.get(name, {}) | given[name] for name in given}, frame)
    return frozenset(given) - frozenset(known)


def _static(dataset: Definition, series: str, text: str) -> dict[str, Any]:
    what = f"dataset '{dataset.name}': the column static of series '{series}' in the table {SERIES.name}"
    return stored_json(text, dict, what)


def write_labels(connection: Connection, dataset: Definition, labels: pl.DataFrame) -> None:
    """Replace the known anomalies of the series that ``labels`` names."""
    names = labels["series_id"].unique().to_list()
    for part in range(0, len(names), 5_000):
        some = names[part : part + 5_000]
        connection.execute(delete(LABELS).where(LABELS.c.dataset_id == dataset.id, LABELS.c.series_id.in_(some)))
    plain = labels.with_columns(pl.col("start", "end").cast(pl.Int64))
    rows = [
        {
            "dataset_id": dataset.id,
            "series_id": row["series_id"],
            "start": row["start"],
            "end": row["end"],
            "kind": row["kind"],
            "variates": json.dumps(list(row["variates"])),
        }
        for row in plain.iter_rows(named=True)
    ]
    if rows:
        connection.execute(insert(LABELS), rows)


def label_variates(dataset: str, series: str, text: str) -> list[Any]:
    """Return the variates that a label of ``LABELS`` blames.

    Raises:
        BackendError: the text is no JSON list.
    """
    what = f"dataset '{dataset}': the column variates of a label of series '{series}' in the table {LABELS.name}"
    return stored_json(text, list, what)


def statics(connection: Connection, dataset: Definition, series: Sequence[str] | None) -> pl.DataFrame | None:
    """Return ``series_id`` and the static columns of a dataset, or None when it has none.

    Raises:
        DataError: a name in ``series`` is unknown.
    """
    rows = connection.execute(
        select(SERIES.c.series_id, SERIES.c.static).where(SERIES.c.dataset_id == dataset.id)
    ).all()
    if series is not None:
        names = {row.series_id for row in rows}
        unknown = [name for name in series if name not in names]
        if unknown:
            hint = nearest(str(unknown[0]), names)
            raise DataError(
                f"dataset '{dataset.name}' has no series {listing(unknown)}{hint} (known: {listing(sorted(names), 10)})"
            )
    if not dataset.schema.static:
        return None
    values = [_static(dataset, row.series_id, row.static) for row in rows]
    return pl.DataFrame(
        {"series_id": pl.Series([row.series_id for row in rows], dtype=pl.String)}
        | {name: pl.Series([item.get(name) for item in values], dtype=pl.Float64) for name in dataset.schema.static}
    )


def open_batch(connection: Connection, name: str, report: Mapping[str, Any]) -> int:
    """Insert the record of a batch that begins and return its number."""
    result = connection.execute(
        insert(BATCHES).values(
            dataset=name,
            status="running",
            started=now(),
            source=report["origin"],
            rows_in=report["rows_in"],
            rows_refused=report["rows_refused"],
            reasons=json.dumps(report),
        )
    )
    return inserted_key(result)


def close_batch(
    connection: Connection,
    batch: int,
    *,
    status: str,
    counts: tuple[int, int, int] = (0, 0, 0),
    fingerprint: str | None = None,
    error: str | None = None,
    findings: Sequence[Mapping[str, Any]] | None = None,
) -> BatchRecord:
    """Complete the record of a batch and return it; ``findings`` replace those it began with."""
    row = connection.execute(select(BATCHES).where(BATCHES.c.id == batch)).one()
    kept = stored_json(row.reasons, dict, f"the column reasons of batch {batch} in the table {BATCHES.name}")
    reasons = kept | ({"error": error} if error else {}) | ({} if findings is None else {"findings": list(findings)})
    values = dict(zip(("rows_new", "rows_changed", "rows_unchanged"), counts, strict=True))
    connection.execute(
        update(BATCHES)
        .where(BATCHES.c.id == batch)
        .values(status=status, finished=now(), fingerprint=fingerprint, reasons=json.dumps(reasons), **values)
    )
    done = connection.execute(select(BATCHES).where(BATCHES.c.id == batch)).one()
    return BatchRecord(**{**done._mapping, "reasons": reasons})
