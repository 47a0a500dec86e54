"""Ingest: read a source, check it, bring it into the store; and read stored data back the way models want it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from tsforge.app.checks import TIMELESS, CheckConfig, CheckResult, NonEmptyCheck, run_checks
from tsforge.app.fitted_data import FittedData
from tsforge.core.config import Config, validate
from tsforge.core.errors import BackendError, ConfigError, DataError, listing, nearest
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.aggregates import with_aggregates
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.cleaning import Dataset, covariates_alone, read_dataset
from tsforge.data.config import DataConfig
from tsforge.data.durations import before
from tsforge.data.findings import IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.hierarchy import HierarchyConfig, is_aggregate
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore
from tsforge.data.store_records import BatchRecord
from tsforge.data.vintages import Delays, History, seen_from

_LOG = get_logger(__name__)


class IngestConfig(Config):
    """What to ingest and what it must satisfy."""

    data: DataConfig
    checks: tuple[CheckConfig, ...] = (NonEmptyCheck(),)
    """A failed check of severity ``block`` keeps the whole batch out of the store."""
    as_of: datetime | None = None
    """Moment the checks count ages back from; None = now."""


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """What an ingestion did.

    Attributes:
        record: the batch as the store holds it.
        report: what reading did to the rows.
        checks: results of the checks, all of the blocking ones passed.
        seconds: wall time.
    """

    record: BatchRecord
    report: IngestReport
    checks: tuple[CheckResult, ...]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return the facts of the batch for a terminal or a log."""
        record = self.record
        return {
            "dataset": record.dataset,
            "batch": record.id,
            "source": record.source,
            "rows_in": record.rows_in,
            "rows_new": record.rows_new,
            "rows_changed": record.rows_changed,
            "rows_unchanged": record.rows_unchanged,
            "rows_refused": record.rows_refused,
            "warnings": [check.message for check in self.checks if not check.passed],
            "fingerprint": record.fingerprint,
            "seconds": round(self.seconds, 2),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per flaw that was found and what was done about it."""
        return [
            {"done": item.kind, "count": item.count, "what": item.what, "examples": listing(item.examples, 3)}
            for item in self.report.findings
        ]


def ingest(config: IngestConfig, workspace: Workspace, *, progress: bool = False) -> IngestResult:
    """Read, check and store one batch, and return what it did; running it again changes nothing.

    Every attempt leaves a batch record, a refused one with the reason.

    Args:
        config: the dataset and its checks.
        workspace: whose store to write.
        progress: show the step at work on standard error.

    Raises:
        DataError: the source is unreadable or a blocking check failed; nothing was stored.
        BackendError: the database or disk did not do its part; nothing was stored.
    """
    started = datetime.now(UTC)
    name = config.data.name
    with closing(SeriesStore(workspace.database_url)) as store, _steps(progress) as step:
        step(f"reading {name}")
        stored = store.series_ids(name) if config.data.known else frozenset()
        dataset = _read(config.data, store, stored)
        step(f"checking {name}")
        ahead = covariates_alone(dataset.frame) & stored
        checks = _check(config, dataset, store, config.as_of or started, ahead)
        step(f"storing {dataset.report.rows_out} rows of {name}")
        record = store.write(
            name,
            dataset.vintages or dataset.frame,
            report=dataset.report,
            config=config.data.model_dump(mode="json"),
            nulls=config.data.nulls,
            labels=dataset.labels,
            present=dataset.present,
        )
    seconds = (datetime.now(UTC) - started).total_seconds()
    result = IngestResult(record=record, report=dataset.report, checks=checks, seconds=seconds)
    for finding in dataset.report.findings:
        log_event(_LOG, str(finding), dataset=name)
    facts = {key: value for key, value in result.summary().items() if key != "warnings"}
    log_event(_LOG, "ingested", **facts)
    return result


@contextmanager
def _steps(progress: bool) -> Iterator[Any]:
    """Yield a function that shows the step at work, or does nothing."""
    if not progress:
        with nullcontext():
            yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


def _read(data: DataConfig, store: SeriesStore, stored: frozenset[str]) -> Dataset:
    try:
        return read_dataset(data, stored)
    except (DataError, BackendError) as error:
        _record_refusal(store, data.name, IngestReport(f"{data.source.kind} source"), error)
        raise


def _record_refusal(store: SeriesStore, name: str, report: IngestReport, error: Exception) -> None:
    try:
        record = store.record_refusal(name, report, str(error))
    except BackendError as second:  # the first error is the one to hear about
        _LOG.warning("the refused batch could not be recorded: %s", second)
        return
    log_event(_LOG, "refused", dataset=name, batch=record.id)


def _check(
    config: IngestConfig, dataset: Dataset, store: SeriesStore, as_of: datetime, ahead: set[str]
) -> tuple[CheckResult, ...]:
    try:
        return _demand(config, dataset.frame, as_of, ahead)
    except DataError as error:
        _record_refusal(store, config.data.name, dataset.report, error)
        raise


def _demand(config: IngestConfig, frame: SeriesFrame, as_of: datetime, ahead: set[str]) -> tuple[CheckResult, ...]:
    """Return the results of all checks; a failed one of severity ``block`` is an error.

    Of series that only bring known covariates (``ahead``) no targets are demanded.
    """
    name = config.data.name
    timed = [check.kind for check in config.checks if check.kind not in TIMELESS]
    if timed and frame.schema.has_integer_time:
        raise DataError(f"dataset '{name}' has integer time; remove the check(s) {listing(timed)}")
    moment = as_of if as_of.tzinfo else as_of.replace(tzinfo=UTC)
    results = tuple(run_checks(frame, config.checks, moment, ahead))
    failed = [result for result in results if not result.passed]
    for result in failed:
        if result.severity == "warn":
            _LOG.warning("check %s: %s", result.kind, result.message)
    blocking = [f"{result.kind}: {result.message}" for result in failed if result.severity == "block"]
    if blocking:
        first = results.index(next(result for result in failed if result.severity == "block"))
        raise DataError(
            f"dataset '{name}': {len(blocking)} blocking check(s) failed ({listing(blocking, 3)}); nothing was stored, "
            f"repair the source or let the checks warn (checks.{first}.severity=warn)"
        )
    return results


def check_stored(config: IngestConfig, workspace: Workspace) -> tuple[CheckResult, ...]:
    """Return the results of the checks on what the store holds, without reading the source.

    Raises:
        DataError: the dataset is not in the store, or a check does not fit it.
        BackendError: the database did not answer.
    """
    frame = load_dataset(workspace, config.data.name)
    moment = config.as_of or datetime.now(UTC)
    return tuple(run_checks(frame, config.checks, moment if moment.tzinfo else moment.replace(tzinfo=UTC)))


def remove_dataset(workspace: Workspace, name: str, *, confirmed: bool) -> dict[str, Any]:
    """Remove a stored dataset whole and return what went: ``removed, rows, series``.

    Events, batch records, artifacts and runs that refer to it stay.

    Raises:
        ConfigError: not ``confirmed``; the message says what would go.
        DataError: the dataset is not in the store.
        BackendError: the database did not do its part; nothing was removed.
    """
    with closing(SeriesStore(workspace.database_url)) as store:
        store.config(name)  # says what there is instead
        record = store.datasets().row(by_predicate=pl.col("name") == name, named=True)
        if not confirmed:
            raise ConfigError(
                f"data remove {name} would remove {record['rows']} rows of {record['series']} series and their labels "
                "for good; events, batch records and artifacts stay; give --yes to do it"
            )
        store.remove(name)
    facts = {"removed": name, "rows": record["rows"], "series": record["series"]}
    log_event(_LOG, "removed", dataset=name, rows=record["rows"], series=record["series"])
    return facts


def load_dataset(
    workspace: Workspace,
    data: str | DataConfig | FittedData,
    *,
    series: Sequence[str] | None = None,
    start: TimeLike | None = None,
    end: TimeLike | None = None,
    cutoff: TimeLike | None = None,
    masked: bool = False,
    extend: int = 0,
) -> SeriesFrame:
    """Return stored data with its calendar features, values outside the valid range still visible.

    A cell that was published several times has its last value, a covariate that comes later than the targets is moved
    down (``publication_delay``).

    Args:
        workspace: whose store to read.
        data: name of the dataset, then its stored settings hold; a config, whose roles, ranges and calendar hold; or
            the data set as an artifact reads it, for whatever is done with that artifact.
        series, start, end: only these series and this span, both ends included.
        cutoff: last row that may be seen: where publications are kept, every cell as of its moment; has no effect else.
        extend: rows added after the last observed target of each series, with their calendar features: a horizon to
            forecast.
        masked: hide values outside ``valid_range``, as for training (see ``mask_invalid``).

    Raises:
        DataError: the dataset, a series or a column is not in the store; the message says what to run.
        BackendError: the database did not answer.
    """
    name = data if isinstance(data, str) else data.name
    if cutoff is not None:
        history = load_history(workspace, data, series=series, masked=masked, extend=extend)
        return seen_from(history, cutoff)
    with closing(SeriesStore(workspace.database_url)) as store:
        settings, calendar = _settings(store, data)
        structure = _structure(settings)
        chosen = None if structure is not None else series  # a sum needs all its parts
        later = settings.get(_DELAY) is not None  # cut after the shift, which reads earlier rows
        frame = store.read(name, series=chosen, start=None if later else start, end=end)
        if structure is not None and structure.over == "series" and start is not None and not later:
            later = store.series_ids(name) != set(frame.series_ids)
            if later:  # a sum lacks the members that have no rows any more: all of them say which they are
                frame = store.read(name, end=end)
    schema = _wanted_schema(frame.schema, data)
    if schema != frame.schema:
        frame = SeriesFrame(frame.table, schema, frame.static, require_targets=False)
    frame = frame.extend(extend) if extend else frame
    frame = Delays.of(settings.get(_DELAY), schema, frame.grid, strict=False).shift(frame)
    if structure is not None:
        frame = _with_sums(frame, structure, settings)
    if later and start is not None:
        frame = frame.between(start)
    if structure is not None:
        frame = frame if series is None else frame.select_series(series)
    frame = add_calendar(frame, _fitting(calendar, data, schema))
    return _masked(frame, settings, name) if masked else frame


def load_history(
    workspace: Workspace,
    data: str | DataConfig | FittedData,
    *,
    series: Sequence[str] | None = None,
    masked: bool = False,
    extend: int = 0,
) -> History:
    """Return stored data as ``load_dataset`` does; where the store keeps publications, all of them.

    Raises:
        DataError, BackendError: as ``load_dataset``.
    """
    name = data if isinstance(data, str) else data.name
    with closing(SeriesStore(workspace.database_url)) as store:
        kept = store.has_vintages(name)
        if kept:
            settings, calendar = _settings(store, data)
            vintages = store.read_vintages(name, series=series)
    if not kept:
        return load_dataset(workspace, data, series=series, masked=masked, extend=extend)
    schema = _wanted_schema(vintages.schema, data)
    delays = Delays.of(settings.get(_DELAY), schema, vintages.grid, strict=False)
    if schema != vintages.schema or delays != Delays():
        vintages = vintages.with_roles(schema, delays)
    if masked:
        vintages, counts = vintages.mask_outside(_ranges(settings, schema.columns))
        _note_hidden(counts, name)
    return vintages.with_calendar(_fitting(calendar, data, schema), extend=extend)


_DELAY = "publication_delay"


def _settings(store: SeriesStore, data: str | DataConfig | FittedData) -> tuple[Mapping[str, Any], CalendarConfig]:
    """Return the settings that hold for a dataset, plain types, and its calendar: stored ones for a name."""
    if isinstance(data, DataConfig):
        delay = store.config(data.name).get(_DELAY)
        if data.publication_delay != delay:  # forecasts read the stored one: a fit with another would not fit them
            raise DataError(
                f"dataset '{data.name}' was ingested with publication_delay {delay or 'none'}, the config says "
                f"{data.publication_delay or 'none'}; ingest it again with the one that holds"
            )
        return data.model_dump(mode="json"), data.calendar
    name = data if isinstance(data, str) else data.name
    stored: Mapping[str, Any] = store.config(name)
    settings = stored if isinstance(data, str) else data.settings(stored)
    return settings, validate(CalendarConfig, settings.get("calendar", {}), where=f"dataset {name}.calendar")


def _fitting(calendar: CalendarConfig, data: str | DataConfig | FittedData, schema: SeriesSchema) -> CalendarConfig:
    """Return the calendar, none where an artifact's meets integer times: what does not fit is said of the artifact."""
    return CalendarConfig() if isinstance(data, FittedData) and schema.has_integer_time else calendar


def _wanted_schema(stored: SeriesSchema, data: str | DataConfig | FittedData) -> SeriesSchema:
    """Return the schema with the roles a config or a fit states; without stated targets the stored roles hold."""
    if isinstance(data, FittedData):
        return data.schema(stored)
    if isinstance(data, str) or not data.targets:
        return stored
    wanted = SeriesSchema(
        targets=data.targets, past=data.past, known=data.known, static=data.static, freq=data.freq or stored.freq
    )
    known = (*stored.columns, *stored.static)
    missing = [name for name in (*wanted.columns, *wanted.static) if name not in known]
    if missing:
        raise DataError(
            f"dataset '{data.name}' holds no column {listing(map(repr, missing))}{nearest(missing[0], known)} "
            f"(it has {listing(known, 20)}); ingest it with that column first"
        )
    if wanted.freq != stored.freq:
        raise DataError(f"dataset '{data.name}' is stored with freq {stored.freq}, the config says {wanted.freq}")
    return wanted


def mask_invalid(
    frame: SeriesFrame, data: str | DataConfig | FittedData, workspace: Workspace | None = None
) -> SeriesFrame:
    """Return the frame with values outside the dataset's ``valid_range`` hidden; the counts are logged.

    Args:
        frame: rows of the dataset.
        data: its config; its name, or the data set as an artifact reads it, for which ``workspace`` is needed.
        workspace: whose store knows the settings of a named dataset.

    Raises:
        DataError: the named dataset is not in the store.
    """
    if isinstance(data, DataConfig):
        return _masked(frame, data.model_dump(mode="json"), data.name)
    with closing(SeriesStore((workspace or Workspace.open()).database_url)) as store:
        settings, _ = _settings(store, data)
    return _masked(frame, settings, data if isinstance(data, str) else data.name)


def _masked(frame: SeriesFrame, settings: Mapping[str, Any], name: str) -> SeriesFrame:
    ranges = _ranges(settings, frame.schema.columns)
    if not ranges:
        return frame
    masked, counts = frame.mask_outside(ranges)
    structure = _structure(settings)
    if structure is not None and structure.over == "series":  # a range of a shop is none of a country
        sums = pl.col("series_id").is_in([name for name in frame.series_ids if is_aggregate(structure, name)])
        table = pl.concat([masked.table.filter(~sums), frame.table.filter(sums)])
        masked = SeriesFrame(table, frame.schema, frame.static, require_targets=False)
        counts = {column: masked.table[column].null_count() - frame.table[column].null_count() for column in ranges}
    _note_hidden(counts, name)
    return masked


def _structure(settings: Mapping[str, Any]) -> HierarchyConfig | None:
    plain = settings.get("hierarchy")
    return None if plain is None else validate(HierarchyConfig, plain, where="hierarchy")


def _with_sums(frame: SeriesFrame, structure: HierarchyConfig, settings: Mapping[str, Any]) -> SeriesFrame:
    """Return the frame with the sums of its valid values; the values themselves stay, invalid ones too."""
    ranges = _ranges(settings, frame.schema.columns)
    if not ranges:
        return with_aggregates(frame, structure)
    whole = with_aggregates(_masked(frame, settings, "of the sums"), structure)
    if structure.over == "variates":
        made = [name for name in whole.schema.targets if name not in frame.schema.targets]
        table = frame.table.with_columns(whole.table.select(made).get_columns())
        return SeriesFrame(table, whole.schema, frame.static, require_targets=False)
    kept = (
        set(frame.series_ids)
        if structure.given != "rebuild"
        else {name for name in frame.series_ids if not is_aggregate(structure, name)}
    )
    own = pl.col("series_id").is_in(list(kept))
    table = pl.concat([frame.table.filter(own), whole.table.filter(~own)])
    return SeriesFrame(table, whole.schema, whole.static, require_targets=False)


def dataset_hierarchy(workspace: Workspace, name: str) -> HierarchyConfig:
    """Return the hierarchy of a stored dataset.

    Raises:
        ConfigError: it was ingested without one.
        DataError: the dataset is not in the store.
    """
    structure = stored_hierarchy(workspace, name)
    if structure is None:
        raise ConfigError(f"dataset '{name}' has no hierarchy to reconcile; state data.hierarchy and ingest it again")
    return structure


def stored_hierarchy(workspace: Workspace, name: str) -> HierarchyConfig | None:
    """Return the hierarchy of a stored dataset, None where it was ingested without one.

    Raises:
        DataError: the dataset is not in the store.
    """
    with closing(SeriesStore(workspace.database_url)) as store:
        return _structure(store.config(name))


def _ranges(settings: Mapping[str, Any], columns: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    ranges = dict(settings.get("valid_range", {}))
    return {column: (low, high) for column, (low, high) in ranges.items() if column in columns}


def _note_hidden(counts: Mapping[str, int], name: str) -> None:
    hidden = {column: count for column, count in counts.items() if count}
    if hidden:
        log_event(_LOG, "values outside their valid range hidden", dataset=name, **hidden)


def max_age(settings: Mapping[str, Any]) -> timedelta | None:
    """Return the ``max_age`` of a dataset's stored settings, None where none is stated.

    Older versions stored some that are no duration above zero: a warning names it, and it counts as not stated.
    """
    text = settings.get("max_age")
    if not text:
        return None
    start = datetime(2001, 1, 1, tzinfo=UTC)
    try:
        return start - before(start, text)
    except DataError as error:
        name = settings.get("name")
        _LOG.warning("max_age '%s' of dataset '%s' counts as not stated: %s; ingest it again", text, name, error)
        return None
