"""Detect: a fitted artifact and the stored data become scores, events and, where labels are known, a grade."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect as detect_frame
from tsforge.anomaly.grading import Grade, grade
from tsforge.app.events import Recorded, confirmed_spans, record_report
from tsforge.app.fitted_data import FittedData
from tsforge.app.forecast import LATEST, find_artifact
from tsforge.app.ingest import load_dataset
from tsforge.artifact import load_artifact
from tsforge.contracts.tables import AnomalyReport, ScoreFrame
from tsforge.core.atomic import atomic_directory
from tsforge.core.config import Config
from tsforge.core.errors import BackendError, ConfigError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore

__all__ = ["DetectJobConfig", "Detection", "detect", "grade", "list_detections", "read_detection"]
_LOG = get_logger(__name__)
FOLDER = "detections"


class DetectJobConfig(Config):
    """What to score with which artifact, and how."""

    artifact: str = LATEST
    """An artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``: the newest artifact of the workspace."""
    dataset: str | None = None
    """Stored data set; default the one the artifact was fitted on."""
    series: tuple[str, ...] | None = Field(None, min_length=1)
    """Only these series; default all."""
    start: str | int | None = None
    """First time to score; default the row after the artifact's validation span."""
    stop: str | int | None = None
    """Last time to score; default the last observed row. Where publications are kept, values are of that moment."""
    detector: DetectConfig = DetectConfig()
    confirmed: bool = True
    """Leave spans that people confirmed as anomalous out of calibration and rolling windows."""
    save: bool = True
    """Keep the report below ``reports/detections`` and its events in the event store."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A finished detection.

    Attributes:
        report: scores, events, facts. grade: against the data set's labels, None where it has none.
        path: folder it was saved to, None if it was not. recorded: what was new to the event store.
    """

    report: AnomalyReport
    grade: Grade | None = None
    path: Path | None = None
    recorded: Recorded | None = None

    @property
    def id(self) -> str | None:
        """Name of the stored detection."""
        return None if self.path is None else self.path.name

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        facts, series = self.report.metadata, self.report.metadata["series"]
        found = {
            "detection": self.id,
            "artifact": facts["artifact_id"],
            "dataset": facts.get("dataset"),
            "rule": facts["rule"],
            "from": facts["scored"][0],
            "to": facts["scored"][1],
            "series": len(series),
            "rows_scored": sum(item["rows_scored"] for item in series.values()),
            "rows_not_scorable": sum(item["rows_not_scorable"] for item in series.values()),
            "events": self.report.events.height,
            **({"rows_guarded": self._rows_guarded()} if facts["config"].get("guard") else {}),
            **({} if self.recorded is None else {"new_events": self.recorded.new}),
            **({} if self.recorded is None else {"suppressed": self.recorded.suppressed}),
            "confirmed_rows_left_out": facts["confirmed_rows_left_out"],
            **self._incidents(),
            "notices": list(facts["notices"]),
        }
        if self.grade is None:
            return found
        kinds = [f"{row['kind']} {row['found']} of {row['labelled']}" for row in self.grade.rows()]
        overall = {f"grade_{name}": rounded(value) for name, value in self.grade.overall.items()}
        return {**found, "found": kinds, **overall}

    def _rows_guarded(self) -> int:
        return sum(item["rows_guarded"] for item in self.report.metadata["series"].values())

    def _incidents(self) -> dict[str, int]:
        """Return how many incidents there are, nothing where no key groups series."""
        if self.report.metadata["config"]["events"]["group_by"] is None:
            return {}
        return {"incidents": self.report.events["incident_id"].drop_nulls().n_unique()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one record an event, strongest first, with its three first-ranked variates."""
        shown = self.report.events.sort("peak_score", descending=True)
        former = {} if self.recorded is None else self.recorded.former
        grouped = bool(self._incidents())
        return [
            {
                "event_id": former.get(row["event_id"], row["event_id"]),
                "series_id": row["series_id"],
                "start": row["start"],
                "end": row["end"],
                "peak_score": round(row["peak_score"], 2),
                "p_value": row["p_value"],
                "state": row["state"],
                **({"incident_id": row["incident_id"]} if grouped else {}),
                "variates": ", ".join(item["variate"] for item in row["variates"][:3]),
            }
            for row in shown.iter_rows(named=True)
        ]


def detect(config: DetectJobConfig, workspace: Workspace) -> Detection:
    """Return scores and events of stored data; the network sees masked values, the detector judges the raw ones.

    Raises:
        ArtifactError: no such artifact, or one that does not fit the data.
        DataError: no such data set or series, too few rows before the first one to score.
        ConfigError, ModelError: settings that the artifact or data do not allow.
        BackendError: the report could not be written.
    """
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    if config.series is not None and artifact.network.capabilities.rows_coupled:
        raise ConfigError(
            f"series={listing(config.series)}: this {artifact.model_name} forecasts all series together, so the scores "
            "of one depend on the others; leave series out"
        )
    fitted = FittedData.of(artifact, dataset)
    seen = load_dataset(workspace, fitted, series=config.series, cutoff=config.stop, masked=True)
    raw = load_dataset(workspace, fitted, series=config.series, cutoff=config.stop)
    report = detect_frame(
        artifact,
        seen,
        config.detector,
        start=config.start,
        stop=config.stop,
        values=raw,
        confirmed=confirmed_spans(workspace, dataset) if config.confirmed else None,
    )
    created = datetime.now(UTC)
    about = {
        "dataset": dataset,
        "created": created.isoformat(timespec="seconds"),
        "data_fingerprint": raw.fingerprint(),
        "variates": list(artifact.schema.targets),
        **report.metadata,
    }
    report = replace(report, metadata=about)
    with closing(SeriesStore(workspace.database_url)) as store:
        labels = store.labels(dataset)
    graded = None
    if labels.height and _overlaps(labels, report):
        graded = grade(report, labels, artifact.grid)
    path = recorded = None
    if config.save:
        path = workspace.reports / FOLDER / f"{dataset}-{artifact.model_name}-{created:%Y%m%dT%H%M%S%f}Z"
        _save(report, graded, path)
        recorded = record_report(workspace, dataset, report, source=f"detect:{path.name}")
    log_event(_LOG, "detection finished", dataset=dataset, artifact=artifact.id, events=report.events.height)
    return Detection(report=report, grade=graded, path=path, recorded=recorded)


def rounded(value: Any) -> Any:
    """Return a value of a table as it is shown: a float with four digits after the point, anything else as it is."""
    return round(value, 4) if isinstance(value, float) else value


def _overlaps(labels: pl.DataFrame, report: AnomalyReport) -> bool:
    times = report.scores.table["time"]
    inside = (labels["end"] >= times.min()) & (labels["start"] <= times.max())
    return bool((inside & labels["series_id"].is_in(report.scores.table["series_id"].unique().to_list())).any())


def _save(report: AnomalyReport, graded: Grade | None, path: Path) -> None:
    """Write the folder of a detection whole or not at all."""
    about = {**report.metadata, "events": report.events.height}
    if graded is not None:
        about["grade"] = {"overall": graded.overall, "kinds": graded.rows()}
    with atomic_directory(path) as folder:
        report.scores.table.write_parquet(folder / "scores.parquet")
        report.events.write_parquet(folder / "events.parquet")
        (folder / "report.json").write_text(json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8")


def list_detections(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a stored detection, newest first: ``id, dataset, model, created, events``; no damaged ones."""
    records = []
    for place in (workspace.reports / FOLDER).glob("*/report.json"):
        try:
            facts = json.loads(place.read_bytes())
            created = datetime.fromisoformat(facts["created"])
            shown = {name: facts[name] for name in ("dataset", "model", "events")}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        records.append({"id": place.parent.name, "created": created, **shown})
    return sorted(records, key=lambda record: (record["created"], record["id"]), reverse=True)


def read_detection(workspace: Workspace, name: str) -> AnomalyReport:
    """Return a stored detection; its metadata holds the grade where there is one.

    Raises:
        BackendError: it is not here, or damaged.
    """
    folder = workspace.reports / FOLDER / name
    if Path(name).name != name or not folder.is_dir():
        known = [record["id"] for record in list_detections(workspace)]
        raise BackendError(f"no detection '{name}' (known: {listing(known) or 'none'})")
    try:
        facts = json.loads((folder / "report.json").read_bytes())
        scores = pl.read_parquet(folder / "scores.parquet")
        events = pl.read_parquet(folder / "events.parquet")
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"detection {folder} is damaged ({error}); run tsforge detect again") from error
    return AnomalyReport(
        scores=ScoreFrame(table=scores, metadata={"rule": facts["rule"]}), events=events, metadata=facts
    )
