"""Read-only questions that the dashboard and the ``data`` and ``models`` commands ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.ingest import load_dataset, mask_invalid, max_age
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.errors import ArtifactError, listing
from tsforge.core.workspace import Workspace
from tsforge.data.panel import Panel
from tsforge.data.report import data_report
from tsforge.data.store import SeriesStore
from tsforge.data.windows import last_windows
from tsforge.forecasting.predict import artifact_panel, predict
from tsforge.models.registry import MODELS
from tsforge.scheduling.ledger import Ledger
from tsforge.tracking.runs import Tracker


@dataclass(frozen=True, kw_only=True)
class LiveForecast:
    """A forecast made on demand, and its additive parts (columns ``variate, time, component, value``)."""

    table: pl.DataFrame
    components: pl.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredDetection:
    """Scores, events and facts of a stored detection."""

    scores: pl.DataFrame
    events: pl.DataFrame
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredBacktest:
    """Tables of a stored backtest: overall, by step, by series, and the metrics they have in common."""

    summary: pl.DataFrame
    by_step: pl.DataFrame
    by_series: pl.DataFrame
    metrics: tuple[str, ...]
    metadata: dict[str, Any]


def list_models() -> list[dict[str, Any]]:
    """Return every registered model with its paper and what it can take; this imports all of them."""
    rows = []
    for name in MODELS.names():
        model = MODELS.get(name)
        can = model.capabilities
        takes = [kind for kind in ("known", "past", "static") if getattr(can, f"{kind}_covariates")]
        rows.append(
            {
                "model": name,
                "source": model.source,
                "fit": _fit_kind(closed_form=can.closed_form, trainable=can.trainable),
                "covariates": ", ".join(takes) or "none",
            }
        )
    return rows


def _fit_kind(*, closed_form: bool, trainable: bool) -> str:
    if not trainable:
        return "nothing to fit"
    return "closed form or gradient" if closed_form else "gradient"


def list_datasets(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a stored data set, with ``age`` of its newest row and whether that is ``stale``."""
    with _store(workspace) as store:
        records = store.datasets().to_dicts()
        for record in records:
            allowed = max_age(store.config(record["name"]))
            record["age"], record["stale"] = _age(record["end"], allowed)
    return records


def _age(end: str | None, allowed: Any) -> tuple[str, bool | None]:
    """Return how old a time is in words, and whether it exceeds ``allowed`` (None = no limit stated)."""
    try:
        moment = datetime.fromisoformat(str(end))
    except ValueError:
        return "", None
    age = datetime.now(UTC) - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    days, seconds = age.days, age.seconds
    words = f"{days} d" if days else f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return words, None if allowed is None else age > allowed


class _store:
    """A series store that is closed at the end of the block."""

    def __init__(self, workspace: Workspace) -> None:
        self._store = SeriesStore(workspace.database_url)

    def __enter__(self) -> SeriesStore:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def dataset_version(workspace: Workspace, name: str) -> str:
    """Return a text that changes whenever the data set does; the key of every cached read."""
    with _store(workspace) as store:
        batches = store.batches(name)
    return f"{name}-{batches['id'].max() if batches.height else 0}"


def dataset_batches(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return what each ingestion of a data set added, changed and refused, newest first."""
    with _store(workspace) as store:
        store.config(name)  # an unknown name is an error, not an empty table
        return store.batches(name)


def dataset_report(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return span, gaps, missing shares, constants, outliers and freshness per series and column."""
    with _store(workspace) as store:
        return data_report(store.read(name), max_age=max_age(store.config(name)))


def read_series(workspace: Workspace, name: str, series: str) -> pl.DataFrame:
    """Return the stored rows of one series: ``time`` and one column per variate and covariate."""
    with _store(workspace) as store:
        return store.read(name, series=[series]).table.drop("series_id")


def list_artifacts(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a fitted model, newest first; folders that are no complete artifact are left out."""
    records = []
    for path in workspace.artifacts.glob("*/manifest.json"):
        facts = _facts(path.parent)
        if facts is not None:
            shown = ("id", "model", "dataset", "created", "horizon", "context_length")
            records.append({**{name: facts[name] for name in shown}, **facts["metrics"]})
    return sorted(records, key=lambda record: record["created"], reverse=True)


def _facts(path: Path) -> dict[str, Any] | None:
    """Return what is shown of an artifact without loading its network, None when the folder is incomplete."""
    try:
        parts = {name: json.loads((path / f"{name}.json").read_bytes()) for name in _FACT_FILES}
    except (OSError, ValueError):
        return None
    window, provenance = parts["spec"]["window"], parts["provenance"]
    return {
        "id": path.name,
        "model": parts["spec"]["network"]["model"]["name"],
        "dataset": provenance.get("dataset", ""),
        "created": datetime.fromisoformat(provenance["created"]),
        "horizon": window["horizon"],
        "context_length": window["context_length"],
        "series": parts["schema"]["series_ids"],
        "variates": parts["schema"]["schema"]["targets"],
        "metrics": parts["metrics"],
        "explanation": parts["explanation"],
        "provenance": provenance,
    }


_FACT_FILES = ("spec", "schema", "metrics", "explanation", "provenance")


def artifact_facts(workspace: Workspace, artifact: str) -> dict[str, Any]:
    """Return sizes, series, variates, metrics, explanation and provenance of a fitted model.

    Raises:
        ArtifactError: it is not here.
    """
    facts = _facts(workspace.artifacts / artifact)
    if facts is None:
        known = [record["id"] for record in list_artifacts(workspace)]
        raise ArtifactError(f"no artifact '{artifact}' in {workspace.artifacts} (known: {listing(known) or 'none'})")
    return facts


def live_forecast(workspace: Workspace, artifact: str, series: str, cutoff: object) -> LiveForecast:
    """Return what a fitted model says from ``cutoff`` on, for one series, with the data up to then."""
    facts = artifact_facts(workspace, artifact)
    model = load_artifact(workspace.artifacts / artifact)
    frame = mask_invalid(load_dataset(workspace, facts["dataset"]).select_series([series]), facts["dataset"], workspace)
    forecast = predict(model, frame, cutoff=cutoff)  # type: ignore[arg-type]
    parts = _components(model, artifact_panel(model, frame), series, forecast.table)
    return LiveForecast(table=forecast.table, components=parts, metadata=dict(forecast.metadata))


def _components(model: Artifact, panel: Panel, series: str, table: pl.DataFrame) -> pl.DataFrame:
    windows = last_windows(panel, model.window, table["cutoff"][0], aligned=model.network.capabilities.rows_coupled)
    rows = [index for index, number in enumerate(windows.series_index) if panel.series_ids[number] == series]
    batch = windows.__getitems__(range(len(windows)))
    times = table.filter(pl.col("variate") == model.schema.targets[0]).sort("step")["time"]
    tables = [
        pl.DataFrame(
            {"time": times, "component": name, "variate": variate, "value": values[rows[0], :, place].double()}
        )
        for name, values in model.network.components(batch).items()
        for place, variate in enumerate(model.schema.targets)
    ]
    empty = pl.DataFrame(
        schema={"time": times.dtype, "component": pl.String, "variate": pl.String, "value": pl.Float64}
    )
    return pl.concat(tables) if tables else empty


def job_runs(workspace: Workspace, limit: int = 100) -> list[dict[str, Any]]:
    """Return runs of scheduled and batch jobs, latest slot first."""
    ledger = Ledger(workspace.database_url)
    try:
        runs = ledger.runs(limit=limit)
    finally:
        ledger.close()
    return [
        {
            "job": run.job,
            "slot": run.slot,
            "status": run.status,
            "attempt": run.attempt,
            "started": run.started,
            "seconds": run.seconds,
            "rows": run.rows,
            "message": run.message,
        }
        for run in runs
    ]


def tracking_runs(workspace: Workspace, limit: int = 100) -> list[dict[str, Any]]:
    """Return tracked runs, newest first: name, status, start, seconds, headline metrics."""
    records = []
    for run in Tracker.open(workspace).runs(limit):
        start, end = run["start"], run["end"]
        records.append(
            {
                "run_id": run["id"],
                "name": run["name"],
                "status": run["status"],
                "started": datetime.fromtimestamp(start / 1000, UTC),
                "seconds": None if end is None else (end - start) / 1000,
                "valid_mae": run["metrics"].get("valid_mae"),
                "test_mae": run["metrics"].get("test_mae"),
                "error": run["error"],
            }
        )
    return records


def run_history(workspace: Workspace, run_id: str) -> pl.DataFrame:
    """Return the curves of a tracked run: columns ``epoch, name, value``."""
    records: Sequence[dict[str, Any]] = Tracker.open(workspace).history(run_id)
    schema = {"epoch": pl.Int64, "name": pl.String, "value": pl.Float64}
    return pl.DataFrame(records, schema=schema).filter(pl.len().over("name") > 1)
