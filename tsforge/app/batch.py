"""One batch: ingest, check, forecast, detect, publish, for one ``as_of``.

Running a batch again does nothing; running it after a crash completes it; two processes that start the same batch do it
once. Three things make that true: the claim in the run ledger, the one rename that publishes, and the rule that no row
after ``as_of`` is ever read, so that the same ``as_of`` means the same result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import polars as pl

from tsforge.anomaly.detector import detect
from tsforge.app import batch_online, published
from tsforge.app.batch_config import BatchConfig, DetectStage, ForecastStage
from tsforge.app.checks import CheckResult, run_checks
from tsforge.app.events import Recorded, confirmed_spans, record_report
from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import IngestConfig, ingest, load_history, mask_invalid
from tsforge.artifact import Artifact, load_artifact, match_frame
from tsforge.core.config import fingerprint
from tsforge.core.errors import BackendError, ConfigError, DataError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.signals import interrupts_held
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.config import DataConfig
from tsforge.data.durations import before
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TIME_DTYPE, parse_moment
from tsforge.data.vintages import Delays, History, VintageFrame, later, newest, published_by
from tsforge.forecasting.coherent_predict import predict_coherent
from tsforge.forecasting.cold_start import ColdStartConfig, history_rows, predict_cold
from tsforge.forecasting.predict import predict
from tsforge.scheduling.jobs import BUSY_EXIT_CODE
from tsforge.scheduling.ledger import Claim, Ledger
from tsforge.tracking.registry import resolve

__all__ = [
    "BackfillResult",
    "BatchBusy",
    "BatchConfig",
    "BatchInterrupted",
    "BatchResult",
    "DetectStage",
    "ForecastStage",
    "backfill",
    "changed_settings",
    "data_seen_until",
    "parse_as_of",
    "published_until",
    "run_batch",
]
LOGGER = get_logger(__name__)
MOST_BATCHES = 100_000  # of one backfill: every minute for two months; more is a slip of the unit


class BatchBusy(BackendError):
    """Another living process works on the same batch; ask again later."""

    exit_code = BUSY_EXIT_CODE


class BatchInterrupted(TsforgeError):
    """Ctrl-C or SIGTERM came when the batch was being published already, so it was completed."""

    exit_code = 130  # the shell's status of an interrupted command


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What one batch came to.

    Attributes:
        status: ``published`` now, ``adopted`` (a killed run had published it, the ledger now knows) or ``unchanged``.
        partition: the published folder with its manifest.
        checks: what the checks found; empty unless published now.
        other_settings: those of the job that differ from the ones it was published with.
    """

    status: Literal["published", "adopted", "unchanged"]
    partition: published.Partition
    checks: tuple[CheckResult, ...] = ()
    other_settings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        manifest = self.partition.manifest
        return {
            "status": self.status,
            "job": self.partition.job,
            "as_of": self.partition.as_of.isoformat(),
            "path": str(self.partition.path),
            "artifact": manifest["artifact"],
            **manifest["counts"],
            "warnings": sum(not check.passed for check in self.checks),
            **({} if self.status == "published" else {"other_settings": list(self.other_settings)}),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the published files, one record each."""
        return [{"file": name, "rows": facts["rows"]} for name, facts in self.partition.manifest["files"].items()]


@dataclass
class _Work:
    """State handed from stage to stage."""

    config: BatchConfig
    as_of: datetime
    workspace: Workspace
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and log one line for it; the block adds counts to the yielded record."""
        facts: dict[str, Any] = {}
        started = time.monotonic()
        status = "failed"
        try:
            yield facts
            status = "ok"
        finally:
            self.seconds[name] = round(time.monotonic() - started, 4)
            when = self.as_of.isoformat()
            log_event(
                LOGGER,
                "batch stage",
                job=self.config.name,
                as_of=when,
                stage=name,
                status=status,
                seconds=self.seconds[name],
                **facts,
            )


def parse_as_of(text: str | datetime | None) -> datetime:
    """Return the moment a batch stands at, in UTC and whole seconds; None = now. Text without a zone is UTC.

    Raises:
        ConfigError: not an ISO time, finer than a second, or in the future.
    """
    now = datetime.now(UTC)
    if text is None:
        return now.replace(microsecond=0)
    try:
        moment = parse_moment(text)
    except DataError as error:
        raise ConfigError(f"as-of: {error}") from error
    if moment.microsecond:
        raise ConfigError(f"as-of {moment.isoformat()} is finer than a second; round it")
    if moment > now + timedelta(minutes=1):
        raise ConfigError(
            f"as-of {moment.isoformat()} lies in the future (now {now:%Y-%m-%dT%H:%M:%SZ}); data is missing"
        )
    return moment


def run_batch(config: BatchConfig, as_of: datetime, workspace: Workspace, force: bool = False) -> BatchResult:
    """Run one batch, unless it is published already, and return what it came to.

    Args:
        config: the job.
        as_of: where it stands; rows after it are never read (``parse_as_of``).
        workspace: store, ledger, artifacts and published folders.
        force: publish again what is published already.

    Raises:
        BatchBusy: another living process works on it (exit code 75).
        BatchInterrupted: Ctrl-C or SIGTERM came while it was being published; it is published and recorded.
        DataError: a blocking check failed, or the data does not reach the model; nothing is published.
        TsforgeError: of the stages; nothing is published, the ledger keeps the message.
    """
    as_of = parse_as_of(as_of)
    ledger = Ledger(workspace.database_url)
    path = published.partition_path(workspace, config.name, as_of)
    try:
        if not force and (found := _published(ledger, config, as_of, path)) is not None:
            return _kept("unchanged", found, config)
        claim = ledger.claim(config.key, as_of, again=True)
        if claim is None:
            raise BatchBusy(f"another process works on {config.name} as of {as_of.isoformat()}; ask again later")
        with ledger.keep_alive(claim):
            return _claimed(ledger, claim, _Work(config, as_of, workspace), path, force)
    finally:
        ledger.close()


def _published(ledger: Ledger, config: BatchConfig, as_of: datetime, path: Path) -> published.Partition | None:
    """Return the partition when ledger and folder agree that it is done.

    Raises:
        ArtifactError: it is damaged; ``force`` publishes it again.
    """
    run = ledger.find(config.key, as_of)
    if run is None or run.status != "done":
        return None
    partition = published.read_partition(path)
    if partition is None:
        LOGGER.warning("%s is recorded as published, but the folder is gone; publishing it again", path)
        return None
    published.verify_partition(partition)
    return partition


def _kept(status: Literal["adopted", "unchanged"], found: published.Partition, config: BatchConfig) -> BatchResult:
    """Return the result of a batch that stays as it was published; told where the job has other settings now."""
    stored = found.manifest.get("config", {}).get("resolved", {})
    changed = tuple(changed_settings(stored, config.model_dump(mode="json")))
    if changed:
        LOGGER.warning(
            "%s stays as it was published, with other settings than now (%s); --force publishes it again",
            found.path,
            listing(changed),
        )
    return BatchResult(status=status, partition=found, other_settings=changed)


def changed_settings(stored: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings that differ; those that came after the stored ones are not known."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() & now.keys()):
            yield from changed_settings(stored[key], now[key], f"{name}.{key}" if name else key)
    elif stored != now:
        yield name


def _claimed(ledger: Ledger, claim: Claim, work: _Work, path: Path, force: bool) -> BatchResult:
    """Do the work under a claim and close it in the ledger, whatever happens short of a kill."""
    with ledger.on_record(claim):
        leftovers = published.recover(path)
        if leftovers:
            log_event(LOGGER, "removed unfinished folders", job=work.config.name, folders=leftovers)
        _recover_earlier(ledger, work)
        found = None if force else published.read_partition(path)
        if found is not None:
            published.verify_partition(found)
        made = _make(work) if found is None else ({}, [])
        with interrupts_held() as came:  # what is published is recorded as published, and no message says otherwise
            if found is None:
                result = _publish(work, path, *made, replace=force and path.exists())
            else:
                result = _kept("adopted", found, work.config)
            rows = sum(facts["rows"] for facts in result.partition.manifest["files"].values())
            ledger.finish(
                claim,
                rows=rows,
                output=str(result.partition.path / "manifest.json"),
                message=result.status,
                details={**result.partition.manifest["counts"], "artifact": result.partition.manifest["artifact"]},
            )
    log_event(LOGGER, f"batch {result.status}", job=work.config.name, as_of=work.as_of.isoformat(), rows=rows)
    if came:
        raise BatchInterrupted(
            f"interrupted when {work.config.name} as of {work.as_of.isoformat()} was being published: that batch is "
            f"complete ({result.partition.path}); run the same command again to go on"
        )
    return result


def _recover_earlier(ledger: Ledger, work: _Work) -> None:
    """Give batches that killed runs had set aside their names back, before anything is read of them."""
    config = work.config

    def is_free(as_of: datetime) -> bool:
        run = ledger.find(config.key, as_of)
        return as_of != work.as_of and (run is None or run.status != "claimed" or ledger.is_abandoned(run))

    back = published.recover_others(work.workspace, config.name, is_free)
    if back:
        log_event(LOGGER, "brought back published folders", job=config.name, folders=listing(back))


def _make(work: _Work) -> tuple[dict[str, Any], list[CheckResult]]:
    """Run the stages before publishing and return manifest and check results; the tables lie with ``work``."""
    config = work.config
    with work.stage("ingest") as facts:
        try:
            artifact = load_artifact(resolve(config.model, work.workspace))
        except TsforgeError:
            _ingest(work, facts)  # a source may offer its rows only once
            raise
        own = FittedData.of(artifact, config.data.name)
        own.check_delay(config.data.publication_delay)  # before that of the data set is stored anew
        _ingest(work, facts)
        fitted = own.applied_to(config.data)
        history = _stored(work, fitted)
        raw = _known_at(work, history, facts)
    with work.stage("check") as facts:
        steps = config.forecast.horizon if config.forecast is not None else None
        raw = add_calendar(raw.extend(max(steps or 0, artifact.window.horizon)), fitted.calendar)
        seen = mask_invalid(raw, fitted)
        frame = match_frame(artifact, seen)
        trained_until = _check_model(artifact, history, config, work.as_of)
        checks = _check_data(raw.until(work.as_of), work, facts)
    if config.forecast is not None:
        with work.stage("forecast") as facts:
            table = _forecast(artifact, seen, work, config.forecast)
            work.tables["forecast"] = table
            facts["rows"] = work.counts["forecasts"] = table.height
            if config.forecast.online is not None:
                known = frame.until(work.as_of)
                made, about = batch_online.adapt(
                    table, known, config.forecast.online, work.workspace, config.name, work.as_of
                )
                work.tables |= made
                work.facts[batch_online.FACT] = about
                facts["judged"] = work.counts["judged"] = about["judged"]
    if config.detect is not None:
        with work.stage("detect") as facts:
            recorded = _detect(artifact, frame.until(work.as_of), raw.until(work.as_of), work)
            facts.update(stored=recorded.new, suppressed=recorded.suppressed)
            facts.update(rows=work.tables["scores"].height, events=work.counts["events"], new=work.counts["new_events"])
    return _manifest(work, artifact, frame, checks) | {"trained_until": trained_until}, checks


def _publish(
    work: _Work, path: Path, manifest: dict[str, Any], checks: list[CheckResult], *, replace: bool
) -> BatchResult:
    """Run the last stage."""
    with work.stage("publish") as facts:
        partition = published.write_partition(path, work.tables, manifest, replace=replace)
        facts["files"] = len(partition.manifest["files"])
    return BatchResult(status="published", partition=partition, checks=tuple(checks))


def _forecast(artifact: Artifact, frame: SeriesFrame, work: _Work, stage: ForecastStage) -> pl.DataFrame:
    """Return the forecast table; what reconciliation or a cold start did goes to the manifest."""
    asked: dict[str, Any] = {"quantile_levels": stage.quantile_levels, "horizon": stage.horizon}
    structure = work.config.data.hierarchy
    if stage.cold_start is not None:
        cold = predict_cold(artifact, frame, _still_new(stage.cold_start, frame, work), **asked)
        work.facts["cold_start"] = cold.metadata["cold_start"]
        return cold.table
    if stage.reconcile is None or structure is None:
        return predict(artifact, frame, **asked).table
    forecast = predict_coherent(artifact, frame, structure, stage.reconcile, **asked)
    work.facts["reconcile"] = forecast.metadata["reconcile"]
    return forecast.table


def _still_new(config: ColdStartConfig, frame: SeriesFrame, work: _Work) -> ColdStartConfig:
    """Return the settings without new series that have rows by now: a job outlives the day they begin."""
    rows = history_rows(frame)
    begun = [name for name in config.like if rows.get(name)]
    if not begun:
        return config
    LOGGER.warning(
        "%s: forecast.cold_start.like of %s has no effect any more: there are rows of it; leave it out",
        work.config.name,
        listing(begun),
    )
    return config.model_copy(update={"like": {name: like for name, like in config.like.items() if name not in begun}})


def _ingest(work: _Work, facts: dict[str, Any]) -> None:
    if work.config.ingest:
        record = ingest(IngestConfig(data=work.config.data, checks=(), as_of=work.as_of), work.workspace).record
        facts.update(rows_in=record.rows_in, rows_new=record.rows_new, rows_changed=record.rows_changed)


def _stored(work: _Work, fitted: DataConfig) -> History:
    """Return what the store holds, all publications where they are kept.

    Values outside their range are not hidden and calendar features not added yet; sums are made of valid values, by the
    ranges of the data set and of the model alike (``fitted``).
    """
    plain = fitted.model_copy(update={"calendar": CalendarConfig()})  # added once the frame reaches the horizon
    history = load_history(work.workspace, plain)
    if history.schema.has_integer_time:
        raise DataError(f"data set '{fitted.name}' has integer time; a batch stands at a calendar time")
    return history


def _known_at(work: _Work, history: History, facts: dict[str, Any]) -> SeriesFrame:
    """Return what was known at as_of: rows up to it, and later values of known covariates only.

    Where publications are kept, values are those published by as_of; where targets are declared to come late, the rows
    that were not out yet are hidden.
    """
    delays = Delays.of(work.config.data.publication_delay, history.schema, history.grid, strict=False)
    known = newest(published_by(history, work.as_of, delays))
    work.counts["rows_known"] = known.until(work.as_of).num_rows
    facts["rows_known"] = work.counts["rows_known"]
    return known


def data_seen_until(artifact: Artifact) -> datetime | None:
    """Return the last time the fit of an artifact has seen (training and validation), None when it does not say.

    Only for artifacts of calendar time. When the values of that time came out is ``published_until``.
    """
    spans = artifact.provenance.get("spans") or {}
    ends = [datetime.fromisoformat(str(spans[part][1])) for part in ("train", "valid") if spans.get(part)]
    return max((end.replace(tzinfo=UTC) if end.tzinfo is None else end for end in ends), default=None)


def published_until(artifact: Artifact, history: History, data: DataConfig) -> datetime | None:
    """Return when the newest value that the fit of an artifact has seen came out, None when it does not say.

    That is the time of the last row of training and validation, after the ``publication_delay`` of the targets, the
    longer one where fit and data set declare two. Where publications are kept, it is that of the last value of any cell
    up to this row, as the fit noted it. One of an earlier version noted nothing: there the values count that came out
    before it was made, a bound that is never too early, and later than need be for a fit that was given old values on
    purpose, as a retraining gives them.

    Args:
        artifact: of calendar time.
        history: the data set, not cut at any moment.
        data: its settings.
    """
    last = data_seen_until(artifact)
    if last is None:
        return None
    settings = ((artifact.config.get("data") or {}).get("publication_delay"), data.publication_delay)
    moments = [_after_delay(last, setting, artifact.schema.targets) for setting in settings]
    if noted := artifact.provenance.get("published_until"):
        moments.append(parse_moment(noted))
    elif isinstance(history, VintageFrame):
        made = str(artifact.provenance.get("created") or datetime.now(UTC).isoformat())
        found = history.newest_publication(last, artifact.series_ids, artifact.schema.columns, by=made)
        moments += [found] if isinstance(found, datetime) else []
    return max(moments)


def _after_delay(last: datetime, setting: str | Mapping[str, str] | None, targets: tuple[str, ...]) -> datetime:
    named = dict.fromkeys(targets, setting) if isinstance(setting, str) else setting or {}
    moved = (later(pl.Series([last], dtype=TIME_DTYPE), named.get(target))[0] for target in targets)
    return max(moved, default=last)


def _check_model(artifact: Artifact, history: History, config: BatchConfig, as_of: datetime) -> str | None:
    """Return when the newest value came out that the model has seen; refuse a model that knows the future of as_of."""
    moment = published_until(artifact, history, config.data)
    if moment is None:
        return None
    if moment > as_of and not config.allow_future_model:
        last = data_seen_until(artifact)
        out = "" if last is None or last == moment else f"{last.isoformat()}, published until "
        raise DataError(
            f"artifact {artifact.id} was fitted on data up to {out}{moment.isoformat()}, after as_of "
            f"{as_of.isoformat()}: its results would look better than they could have been; fit an older model, or set "
            "allow_future_model=true"
        )
    return moment.isoformat()


def _check_data(observed: SeriesFrame, work: _Work, facts: dict[str, Any]) -> list[CheckResult]:
    """Run the checks on what was observed; refuse when a blocking one fails."""
    results = run_checks(observed, work.config.checks, work.as_of)
    failed = [result for result in results if not result.passed]
    facts.update(checks=len(results), failed=len(failed))
    for result in failed:
        LOGGER.warning("check %s of %s: %s", result.kind, work.config.name, result.message)
    blocking = [f"{result.kind}: {result.message}" for result in failed if result.severity == "block"]
    if blocking:
        raise DataError(
            f"{len(blocking)} check(s) of {work.config.name} as of {work.as_of.isoformat()} failed, nothing published; "
            + "; ".join(blocking)
        )
    return results


def _detect(artifact: Artifact, seen: SeriesFrame, judged: SeriesFrame, work: _Work) -> Recorded:
    """Score the last span, store its events, and note which of them no earlier batch has published.

    Args:
        artifact: the model.
        seen: what the network reads, values outside their range hidden.
        judged: the same rows with those values: the first thing a detector should report.
        work: gets the tables and counts.

    Returns:
        What was new to the event store.
    """
    stage = work.config.detect or DetectStage()
    start = before(work.as_of, stage.span)
    dataset = work.config.data.name
    # what people had confirmed by then: a later confirmation must not change what a backfill of that day finds
    confirmed = confirmed_spans(work.workspace, dataset, made_until=work.as_of)
    report = detect(artifact, seen, stage.detector, start=start, stop=work.as_of, values=judged, confirmed=confirmed)
    # before publishing: a batch killed in between records the same again, one killed after it would never record
    recorded = record_report(
        work.workspace, dataset, report, source=f"batch:{work.config.name}@{work.as_of:%Y-%m-%dT%H:%M:%SZ}"
    )
    work.facts["confirmed_rows_left_out"] = report.metadata["confirmed_rows_left_out"]
    named = ("alarm_rate_observed", "alarm_rate_ratio", "is_stale")
    series = {name: {key: fact[key] for key in named} for name, fact in report.metadata["series"].items()}
    work.facts["health"] = {"alarm_rate_nominal": report.metadata["alarm_rate_nominal"], "series": series}
    earlier = published.events(work.workspace, work.config.name, until=work.as_of - timedelta(seconds=1))
    old = [] if earlier is None else earlier["event_id"].to_list()
    work.tables["scores"] = report.scores.table
    work.tables["events"] = report.events.with_columns(is_new=~pl.col("event_id").is_in(old))
    work.counts["events"] = report.events.height
    work.counts["new_events"] = int(work.tables["events"]["is_new"].sum())
    return recorded


def _manifest(work: _Work, artifact: Artifact, frame: SeriesFrame, checks: list[CheckResult]) -> dict[str, Any]:
    return {
        "job": work.config.name,
        "as_of": work.as_of.isoformat(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": artifact.id,
        "model": artifact.model_name,
        "data": {"name": work.config.data.name, "fingerprint": frame.fingerprint()},
        "config": {"fingerprint": fingerprint(work.config), "resolved": work.config.model_dump(mode="json")},
        "counts": dict(work.counts),
        "checks": [vars(check) for check in checks],
        "seconds": dict(work.seconds),
        **work.facts,
    }


@dataclass(frozen=True, kw_only=True)
class BackfillResult:
    """The batches of a range, in order."""

    results: tuple[BatchResult, ...]

    def summary(self) -> dict[str, Any]:
        """Return how many batches ended how."""
        statuses = [result.status for result in self.results]
        return {"batches": len(statuses), **{name: statuses.count(name) for name in dict.fromkeys(statuses)}}

    def rows(self) -> list[dict[str, Any]]:
        """Return one record a batch."""
        return [result.summary() for result in self.results]


def backfill(
    config: BatchConfig, start: str | datetime, stop: str | datetime, every: str, workspace: Workspace
) -> BackfillResult:
    """Run the batches from ``start`` to ``stop`` (both included) in order; those published already are left alone.

    Args:
        config: the job.
        start, stop: first and last as_of.
        every: step (``6h``, ``1d``, ``1mo``) in UTC.
        workspace: as for ``run_batch``.

    Raises:
        ConfigError: an empty range, a bad step, one that is no whole seconds, or one so short that there are more than
            100,000 batches.
        TsforgeError: of the first batch that fails; earlier ones stay published, the same command goes on from there.
    """
    first, last = parse_as_of(start), parse_as_of(stop)
    if last < first:
        raise ConfigError(f"the range {first.isoformat()} to {last.isoformat()} is empty; exchange from and to")
    moments = _moments(first, last, every)
    return BackfillResult(results=tuple(run_batch(config, moment, workspace) for moment in moments))


def _moments(first: datetime, last: datetime, every: str) -> list[datetime]:
    """Return every as_of of a backfill; their number is checked before they are made."""
    start = pl.lit(first)
    try:
        step = pl.select((start.dt.offset_by(every) - start).dt.total_microseconds()).item()
    except pl.exceptions.PolarsError as error:
        raise ConfigError(f"'{every}' is not a step such as 6h, 1d or 1mo") from error
    if step <= 0:
        raise ConfigError(f"'{every}' is not a step such as 6h, 1d or 1mo: it must lead forward")
    number = (last - first) // timedelta(microseconds=1) // step + 1
    if number > MOST_BATCHES:
        raise ConfigError(
            f"a step of {every} from {first.isoformat()} to {last.isoformat()} makes about {number:,} batches, more "
            f"than {MOST_BATCHES:,}; take a longer step or a shorter range"
        )
    if step % 1_000_000:
        raise ConfigError(
            f"a step of {every} is no number of whole seconds, and batches stand at whole seconds; round it"
        )
    return pl.datetime_range(first, last, every, time_zone="UTC", eager=True).to_list()
