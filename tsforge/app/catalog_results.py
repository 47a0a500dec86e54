"""Read-only questions about results: detections, backtests and published batches, without loading a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app import published
from tsforge.contracts.tables import JOINT
from tsforge.core.errors import ArtifactError, BackendError, listing
from tsforge.core.workspace import Workspace
from tsforge.forecasting.report import load_report, worst_first

DETECTIONS = "detections"
BACKTESTS = "backtests"
BATCHES_SHOWN = 30  # of each job; the newest
_BATCH = "batch"
_BATCH_FACTS = {"data", "model", "artifact", "created", "counts", "checks"}
# best known first; coverage and width are shown beside them, but no ranking follows from them alone
_RANKING = ("mase", "mae", "rmse", "mse", "smape", "wql", "crps")


@dataclass(frozen=True, kw_only=True)
class StoredDetection:
    """Scores, events and facts of a detection; ``dataset, model, source, variates, notices`` are always among them."""

    scores: pl.DataFrame
    events: pl.DataFrame
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredBacktest:
    """Tables of a stored backtest, the metrics that rank models, settings and notes.

    ``tests``, ``pit`` and ``regimes`` are those of the report; ``worst`` holds, for each ranking metric, the series of
    the model with their skill against the reference, worst first.
    """

    summary: pl.DataFrame
    by_step: pl.DataFrame
    tests: pl.DataFrame
    pit: pl.DataFrame
    regimes: pl.DataFrame
    worst: Mapping[str, pl.DataFrame]
    metrics: tuple[str, ...]
    metadata: dict[str, Any]


def list_detections(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a detection, newest first: ``id, source, dataset, model, created, events``.

    Detections come from ``tsforge detect`` and from published batches; a job with several batches is also listed as a
    whole, with every event once. Damaged folders are left out.
    """
    records = []
    for place in _reports(workspace, DETECTIONS):
        record = _report_record(place)
        if record is not None:
            records.append({**record, "source": "tsforge detect"})
    for job in published.jobs(workspace):
        records += _batch_records(workspace, job)
    return sorted(records, key=lambda record: (record["created"], record["id"]), reverse=True)


def _batch_records(workspace: Workspace, job: str) -> list[dict[str, Any]]:
    batches = [batch for batch in _batches(workspace, job) if "events.parquet" in batch.manifest["files"]]
    records = [
        {**_batch_facts(batch), "id": _batch_id(batch), "events": batch.manifest["counts"]["events"]}
        for batch in batches
    ]
    if len(batches) > 1:
        whole = {"id": f"{_BATCH}/{job}", "source": f"batches {job}, the last {len(batches)}"}
        with suppress(OSError, pl.exceptions.PolarsError):  # of a damaged one: told where that batch is chosen
            records.append({**_batch_facts(batches[0]), **whole, "events": _all_events(batches).height})
    return records


def _batches(workspace: Workspace, job: str) -> list[published.Partition]:
    """Return the newest readable batches of a job, newest first."""
    found = []
    for path in list(reversed(published.batch_folders(workspace, job).values()))[:BATCHES_SHOWN]:
        try:
            batch = published.read_partition(path)
        except ArtifactError:  # damaged, or of a newer format: the next one may be readable
            continue
        if batch is not None and batch.manifest.keys() >= _BATCH_FACTS:
            found.append(batch)
    return found


def _batch_id(batch: published.Partition) -> str:
    return f"{_BATCH}/{batch.job}/{batch.as_of:%Y-%m-%dT%H-%M-%SZ}"


def _batch_facts(batch: published.Partition) -> dict[str, Any]:
    return {
        "source": f"batch {batch.job} as of {batch.as_of:%Y-%m-%d %H:%M}",
        "dataset": batch.manifest["data"]["name"],
        "model": batch.manifest["model"],
        "created": datetime.fromisoformat(batch.manifest["created"]),
    }


def _all_events(batches: list[published.Partition]) -> pl.DataFrame:
    """Return every event of batches (newest first) once, as the newest batch that saw it describes it."""
    tables = [table for batch in batches if (table := batch.table("events")) is not None]
    return pl.concat(tables, how="diagonal_relaxed").unique("event_id", keep="first", maintain_order=True)


def load_detection(workspace: Workspace, name: str) -> StoredDetection:
    """Return a detection of ``list_detections`` by its id.

    Raises:
        BackendError: it is not here, or damaged.
    """
    if name.startswith(f"{_BATCH}/"):
        return _load_batches(workspace, name)
    folder = workspace.reports / DETECTIONS / name
    facts = _json(folder / "report.json") if Path(name).name == name else None
    if facts is None:
        raise _unknown("detection", name, list_detections(workspace))
    try:
        scores, events = (pl.read_parquet(folder / f"{table}.parquet") for table in ("scores", "events"))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"detection {folder} is damaged ({error}); run tsforge detect again") from error
    return StoredDetection(
        scores=scores, events=events, metadata={"source": "tsforge detect", **_complete(facts, scores)}
    )


def _load_batches(workspace: Workspace, name: str) -> StoredDetection:
    job = name.removeprefix(f"{_BATCH}/").split("/")[0]
    here = _batches(workspace, job) if job in published.jobs(workspace) else []
    chosen = [
        batch
        for batch in here
        if name in (_batch_id(batch), f"{_BATCH}/{job}") and "events.parquet" in batch.manifest["files"]
    ]
    if not chosen:
        raise _unknown("batch", name, list_detections(workspace))
    try:
        tables = [table for batch in chosen if (table := batch.table("scores")) is not None]
        events = _all_events(chosen)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"a batch of {job} is damaged ({error}); publish it again with batch run --force") from error
    keys = ["series_id", "time", "variate"]
    scores = pl.concat(tables, how="diagonal_relaxed").unique(keys, keep="first").sort(keys)
    newest = chosen[0]
    facts = {
        **_batch_facts(newest),
        "artifact_id": newest.manifest["artifact"],
        "as_of": newest.as_of.isoformat(),
        **newest.manifest.get("health", {}),
        "notices": [check["message"] for check in newest.manifest["checks"] if not check["passed"]],
    }
    if len(chosen) > 1:
        facts["source"] = f"batches {job}, the last {len(chosen)}"
    return StoredDetection(scores=scores, events=events, metadata=_complete(facts, scores))


def _complete(facts: Mapping[str, Any], scores: pl.DataFrame) -> dict[str, Any]:
    variates = [name for name in scores["variate"].unique(maintain_order=True) if name != JOINT]
    return {"variates": variates, "notices": [], **facts}


def list_forecasts(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a published forecast, newest first: ``id, source, dataset, model, created, artifact, rows``."""
    records = [
        {
            **_batch_facts(batch),
            "id": _batch_id(batch),
            "artifact": batch.manifest["artifact"],
            "rows": batch.manifest["files"]["forecast.parquet"]["rows"],
        }
        for job in published.jobs(workspace)
        for batch in _batches(workspace, job)
        if "forecast.parquet" in batch.manifest["files"]
    ]
    return sorted(records, key=lambda record: (record["created"], record["id"]), reverse=True)


def load_forecast(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return the table of a published forecast of ``list_forecasts`` by its id (columns as in ``Forecast.table``).

    Raises:
        BackendError: it is not here, or damaged.
    """
    job = name.removeprefix(f"{_BATCH}/").split("/")[0]
    here = _batches(workspace, job) if job in published.jobs(workspace) else []
    for batch in here:
        if _batch_id(batch) == name:
            try:
                table = batch.table("forecast")
            except (OSError, pl.exceptions.PolarsError) as error:
                why = f"{batch.path} is damaged ({error}); publish it again with batch run --force"
                raise BackendError(why) from error
            if table is not None:
                return table
    raise _unknown("published forecast", name, list_forecasts(workspace))


def list_backtests(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a backtest, newest first: ``id, dataset, model, created``; damaged ones are left out."""
    records = [record for place in _reports(workspace, BACKTESTS) if (record := _report_record(place)) is not None]
    return sorted(records, key=lambda record: (record["created"], record["id"]), reverse=True)


def load_backtest(workspace: Workspace, name: str) -> StoredBacktest:
    """Return a backtest of ``list_backtests`` by its id.

    Raises:
        BackendError: it is not here, or damaged.
    """
    folder = workspace.reports / BACKTESTS / name
    if Path(name).name != name or not folder.is_dir():
        raise _unknown("backtest", name, list_backtests(workspace))
    report = load_report(folder)
    known = [metric for metric in report.leaderboard.columns if metric.startswith("msis_")]
    metrics = tuple(
        metric
        for metric in (*_RANKING, *known)
        if metric in report.leaderboard.columns and report.leaderboard[metric].count()
    )
    return StoredBacktest(
        summary=report.leaderboard,
        by_step=report.by("step"),
        tests=report.tests,
        pit=report.pit,
        regimes=report.regimes,
        worst={
            metric: worst_first(report.metrics, report.settings["model"], report.settings["reference"], metric=metric)
            for metric in metrics
        },
        metrics=metrics,
        metadata={**report.settings, "notes": list(report.notes)},
    )


def damaged_reports(workspace: Workspace, kind: str) -> dict[str, str]:
    """Return the detections or backtests (``DETECTIONS, BACKTESTS``) left out of the lists, with what is wrong."""
    broken = (place.parent.name for place in _reports(workspace, kind) if _report_record(place) is None)
    return dict.fromkeys(sorted(broken), "report.json cannot be used")


def _reports(workspace: Workspace, kind: str) -> Iterable[Path]:
    return (workspace.reports / kind).glob("*/report.json")


def _report_record(place: Path) -> dict[str, Any] | None:
    """Return the record of a detection or backtest, None where its report is damaged."""
    facts = _json(place)
    if place.parent.parent.name == DETECTIONS:
        return _record(place, facts, ("dataset", "model", "created", "events"))
    return _record(place, (facts or {}).get("settings", {}), ("dataset", "model", "created"))


def _json(place: Path) -> dict[str, Any] | None:
    """Return the object in a file, None when it is missing or no JSON object."""
    try:
        facts = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _record(place: Path, facts: Mapping[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the named facts with the id of the folder they lie in, None when one is missing or makes no sense."""
    try:
        record = {name: (facts or {})[name] for name in names}
        return {"id": place.parent.name, **record, "created": datetime.fromisoformat(record["created"])}
    except (KeyError, TypeError, ValueError):
        return None


def _unknown(what: str, name: str, records: list[dict[str, Any]]) -> BackendError:
    known = listing([record["id"] for record in records])
    return BackendError(f"no {what} '{name}' in this workspace (known: {known or 'none'}); it may have been removed")
