"""Steps of a batch inside its transaction: lock, define, write rows, write the record."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from sqlalchemy import Connection, delete, func, insert, inspect, select, update

from tsforge.core.errors import BackendError, DataError, listing, nearest
from tsforge.core.formats import check_version, version_in_text
from tsforge.data import checks
from tsforge.data.grid import TIME_DTYPE, Frequency, parse_freq, show_time
from tsforge.data.sql import inserted_key, safe_url
from tsforge.data.store_bulk import (
    compare,
    count_distinct_rows,
    count_erased,
    drop_blank,
    ends_of_series,
    insert_rows,
    stage_rows,
    upsert,
)
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


def _check_grid(connection: Connection, dataset: Definition, frame: History, new: pl.Series) -> None:
    """Refuse rows off the stored grid; ``new`` are the times that come with a value."""
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
    _check_grid(connection, dataset, frame, given["time"])
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


def overlong_series(connection: Connection, dataset: Definition, series: Sequence[str]) -> frozenset[str]:
    """Return which of some series by themselves fill more rows than reading takes whatever their number of values."""
    if _filled_between(dataset) <= checks.MAX_FILL_ROWS:
        return frozenset()
    spans = _spans(connection, dataset, series)
    return frozenset(spans.filter(pl.col("filled") > checks.MAX_FILL_ROWS)["series_id"])


def check_spans(connection: Connection, name: str, frame: History, exempt: Collection[str]) -> None:
    """Refuse a batch after which reading would refuse to fill the gaps, by the limits of reading.

    The extent of the data set nearly always tells; else the first and last time of each series are looked up.

    Args:
        connection: in the transaction that wrote the batch.
        name: its dataset.
        frame: the batch.
        exempt: series of it that may be too long by themselves, since they were before or are new.

    Raises:
        DataError: there is a time too far from the others.
    """
    dataset = definition(connection, name)
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
    _check_statics(dataset, known, {name: known.get(name, {}) | given[name] for name in given}, frame)
    return frozenset(given) - frozenset(known)


def _check_statics(
    dataset: Definition,
    known: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Mapping[str, Any]],
    frame: History,
) -> None:
    """Refuse a batch whose series (``given``: static values of each) lack a static column, or stored ones a new column.

    What a stored series of an older version lacks is no fault of a batch of others.
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
