"""What the dashboard asks: real stores, real folders, and damaged ones beside them."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tsforge.app import catalog, catalog_results, published
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, BackendError, DataError
from tsforge.core.workspace import Workspace
from tsforge.scheduling.ledger import Ledger
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.runs import Tracker

FITS = {"last_value": "nothing to fit", "var": "closed form", "linear": "closed form or gradient"}
AS_OF = datetime(2026, 3, 1, 6, tzinfo=UTC)


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


def ingest_hours(workspace: Workspace, last: datetime, *, rows: int = 10, **settings: Any) -> None:
    source = workspace.root / "plant.parquet"
    times = [last - timedelta(hours=rows - 1 - hour) for hour in range(rows)]
    pl.DataFrame({"ds": times, "a.x": [float(hour) for hour in range(rows)], "b.x": [1.0] * rows}).write_parquet(source)
    data = {"name": "plant", "source": {"kind": "parquet", "path": str(source)}, "separator": ".", "freq": "1h"}
    ingest(validate(IngestConfig, {"data": data | settings}), workspace)


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


@pytest.mark.parametrize(("hours", "limit", "stale"), [(3, "1d", False), (30, "1d", True), (30, None, None)])
def test_freshness_counts_from_the_newest_row(workspace: Workspace, hours: int, limit: Any, stale: Any) -> None:
    ingest_hours(workspace, this_hour() - timedelta(hours=hours), **({"max_age": limit} if limit else {}))
    [record] = catalog.list_datasets(workspace)
    assert (record["name"], record["series"], record["rows"]) == ("plant", 2, 20)
    assert record["stale"] is stale
    assert record["age"].startswith({3: "3 h", 30: "1 d 6 h"}[hours])


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (timedelta(seconds=-5), "0 min"),
        (timedelta(minutes=59, seconds=59), "59 min"),
        (timedelta(hours=23, minutes=5), "23 h 5 min"),
        (timedelta(days=13, hours=23), "13 d 23 h"),
        (timedelta(days=400), "400 d"),
        (timedelta(days=4711), "12.9 years"),
    ],
)
def test_spans_in_words(span: timedelta, words: str) -> None:
    assert catalog.in_words(span) == words


def test_version_changes_with_every_ingestion(workspace: Workspace) -> None:
    before = catalog.dataset_version(workspace, "plant")
    ingest_hours(workspace, this_hour())
    first = catalog.dataset_version(workspace, "plant")
    ingest_hours(workspace, this_hour() + timedelta(hours=1))
    assert len({before, first, catalog.dataset_version(workspace, "plant")}) == 3


def test_series_report_and_batches_of_a_dataset(workspace: Workspace) -> None:
    ingest_hours(workspace, this_hour())
    rows = catalog.read_series(workspace, "plant", "a")
    assert rows.columns == ["time", "x"]
    assert rows["x"].to_list() == [float(hour) for hour in range(10)]
    report = catalog.dataset_report(workspace, "plant")
    assert dict(report.select("series_id", "constant").iter_rows()) == {"a": False, "b": True}
    assert catalog.dataset_batches(workspace, "plant")["rows_new"].to_list() == [20]
    for question in (catalog.dataset_report, catalog.dataset_batches):
        with pytest.raises(DataError, match="vanished"):
            question(workspace, "vanished")


SUM = {"children": {"total": ["a", "b"]}}


def test_aggregates_are_made_of_the_stored_series(workspace: Workspace) -> None:
    ingest_hours(workspace, this_hour(), hierarchy=SUM, valid_range={"x": [0, 8]}, calendar={"features": ["hour"]})
    assert catalog.made_series(workspace, "plant") == ["total"]
    total = catalog.read_series(workspace, "plant", "total")
    assert total.columns == ["time", "x"]
    assert total["x"].to_list() == [*(hour + 1.0 for hour in range(9)), None], "no sum of a value that cannot be"
    assert catalog.read_series(workspace, "plant", "a")["x"].to_list() == [float(hour) for hour in range(10)]
    assert catalog.dataset_report(workspace, "plant")["series_id"].to_list() == ["a", "b"], "what is stored"
    with pytest.raises(DataError, match="gone"):
        catalog.read_series(workspace, "plant", "gone")


def test_sums_of_variates_are_columns_of_every_series(workspace: Workspace) -> None:
    hierarchy = {"over": "variates", "children": {"all": ["a.x", "b.x"]}}
    ingest_hours(workspace, this_hour(), separator=None, hierarchy=hierarchy)
    [series] = catalog.dataset_report(workspace, "plant")["series_id"].unique()
    assert catalog.made_series(workspace, "plant") == []
    rows = catalog.read_series(workspace, "plant", series)
    assert rows["all"].to_list() == [hour + 1.0 for hour in range(10)]


def test_the_hierarchy_that_a_model_was_fitted_with_holds_for_its_series(workspace: Workspace) -> None:
    ingest_hours(workspace, this_hour())
    assert catalog.made_series(workspace, "plant") == []
    source = {"kind": "parquet", "path": "plant.parquet"}
    data = {"name": "plant", "source": source, "separator": ".", "freq": "1h", "targets": ["x"], "hierarchy": SUM}
    folder = store_artifact(workspace, "summed", "2026-01-01T00:00:00+00:00")
    (folder / "config.yaml").write_text(json.dumps({"data": data}))
    assert catalog.read_series(workspace, "plant", "total", artifact="summed")["x"].to_list()[:2] == [1.0, 2.0]
    with pytest.raises(DataError, match="total"):
        catalog.read_series(workspace, "plant", "total")


def store_artifact(workspace: Workspace, name: str, created: str) -> Path:
    folder = workspace.artifacts / name
    folder.mkdir(parents=True)
    columns = {"targets": ["x"], "known": ["calendar.hour.sin", "price"], "past": [], "static": [], "freq": "1h"}
    parts = {
        "spec": {"network": {"model": {"name": "linear"}}, "window": {"horizon": 4, "context_length": 8}},
        "schema": {"schema": columns, "series_ids": ["a", "b"]},
        "metrics": {"test_mae": 0.5},
        "explanation": {},
        "provenance": {"created": created, "dataset": "plant"},
    }
    for part, content in (parts | {"manifest": {}}).items():
        (folder / f"{part}.json").write_text(json.dumps(content))
    return folder


def test_artifacts_newest_first_without_incomplete_ones(workspace: Workspace) -> None:
    store_artifact(workspace, "older", "2026-01-01T00:00:00+00:00")
    store_artifact(workspace, "newer", "2026-02-01T00:00:00+00:00")
    (store_artifact(workspace, "lacking", "2026-03-01T00:00:00+00:00") / "schema.json").unlink()
    (store_artifact(workspace, "garbled", "2026-03-01T00:00:00+00:00") / "spec.json").write_text("{}")
    records = catalog.list_artifacts(workspace)
    assert [record["id"] for record in records] == ["newer", "older"]
    assert records[0]["test_mae"] == 0.5
    facts = catalog.artifact_facts(workspace, "older")
    assert facts["known"] == ["price"], "calendar features can be made for any time"
    assert facts["covariates"]["known"] == ["calendar.hour.sin", "price"]
    assert facts["freq"] == "1h"
    with pytest.raises(ArtifactError, match=r"no artifact 'gone'.*newer, older"):
        catalog.artifact_facts(workspace, "gone")
    with pytest.raises(ArtifactError, match=r"lacking is damaged \(schema.json is missing\)"):
        catalog.artifact_facts(workspace, "lacking")


def test_damaged_results_are_named_with_the_reason(workspace: Workspace) -> None:
    store_artifact(workspace, "whole", "2026-01-01T00:00:00+00:00")
    (store_artifact(workspace, "lacking", "2026-03-01T00:00:00+00:00") / "schema.json").unlink()
    (store_artifact(workspace, "broken", "2026-03-01T00:00:00+00:00") / "metrics.json").write_text("{")
    (store_artifact(workspace, "garbled", "2026-03-01T00:00:00+00:00") / "spec.json").write_text("{}")
    found = catalog.damaged_artifacts(workspace)
    assert list(found) == ["broken", "garbled", "lacking"]
    assert found["lacking"] == "schema.json is missing"
    assert found["broken"] == "metrics.json cannot be read"
    assert "network" in found["garbled"]
    for kind in (catalog_results.DETECTIONS, catalog_results.BACKTESTS):
        (workspace.reports / kind / "torn").mkdir(parents=True)
        (workspace.reports / kind / "torn" / "report.json").write_text("{")
        assert list(catalog_results.damaged_reports(workspace, kind)) == ["torn"]


@pytest.mark.parametrize(
    ("part", "content", "why"),
    [
        ("manifest", None, "manifest.json is missing"),
        ("manifest", "[]", "manifest.json holds no JSON object"),
        ("provenance", "[1, 2]", "provenance.json holds no JSON object"),
        ("provenance", '{"created": "2026-01-01"}', "no usable created"),
        ("provenance", '{"created": [], "dataset": "plant"}', "lack something"),
        ("metrics", "[]", "metrics.json holds no JSON object"),
        ("metrics", '{"test_mae": "x"}', "no usable metrics"),
        ("schema", '{"schema": {}, "series_ids": []}', "lack something"),
        ("explanation", "3", "explanation.json holds no JSON object"),
    ],
)
def test_an_artifact_of_damaged_content_is_named_and_the_others_are_listed(
    workspace: Workspace, part: str, content: str | None, why: str
) -> None:
    store_artifact(workspace, "whole", "2026-01-01T00:00:00+00:00")
    place = store_artifact(workspace, "torn", "2026-02-01T00:00:00+00:00") / f"{part}.json"
    place.unlink() if content is None else place.write_text(content)
    assert [record["id"] for record in catalog.list_artifacts(workspace)] == ["whole"]
    assert catalog.damaged_artifacts(workspace).keys() == {"torn"}
    assert why in catalog.damaged_artifacts(workspace)["torn"]
    with pytest.raises(ArtifactError, match=r"artifact .*torn is damaged \(.*\); fit again"):
        catalog.artifact_facts(workspace, "torn")


def test_a_half_written_artifact_is_neither_listed_nor_damaged(workspace: Workspace) -> None:
    store_artifact(workspace, ".whole.x1y2.tmp", "2026-01-01T00:00:00+00:00")
    (workspace.artifacts / ".older.17.old").mkdir()
    (workspace.artifacts / "a file").touch()
    assert catalog.list_artifacts(workspace) == []
    assert catalog.damaged_artifacts(workspace) == {}
    for name in ("", ".", "..", ".whole.x1y2.tmp", "a file"):
        with pytest.raises(ArtifactError, match="no artifact"):
            catalog.artifact_facts(workspace, name)


def test_a_number_of_the_fit_never_hides_what_the_artifact_is(workspace: Workspace) -> None:
    folder = store_artifact(workspace, "whole", "2026-01-01T00:00:00+00:00")
    (folder / "metrics.json").write_text('{"created": 3}')
    assert catalog.list_artifacts(workspace)[0]["created"] == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("config", "garbage"),
        ("config", "3"),
        ("schema", "[]"),
        ("schema", '{"targets": ["x"]}'),
        ("schema", '{"targets": ["x"], "freq": "often"}'),
        ("schema", '{"targets": 3, "freq": "1h"}'),
        ("columns", "[]"),
        ("columns", "{}"),
    ],
)
def test_a_damaged_record_of_a_dataset_is_one_message(workspace: Workspace, column: str, text: str) -> None:
    ingest_hours(workspace, this_hour())
    damage(workspace, f"UPDATE tsf_datasets SET {column} = :text", text=text)
    message = rf"dataset 'plant': the column {column} of its row in the table tsf_datasets cannot be read \("
    for question in (catalog.list_datasets, lambda home: catalog.read_series(home, "plant", "a")):
        with pytest.raises(BackendError, match=message):
            question(workspace)


def test_a_run_with_damaged_details_is_listed_and_said_to_be(workspace: Workspace) -> None:
    ledger = Ledger(workspace.database_url)
    for hour in range(2):
        claim = ledger.claim("demo", AS_OF + timedelta(hours=hour))
        assert claim is not None
        ledger.finish(claim, message="published")
    ledger.close()
    damage(workspace, "UPDATE ledger_runs SET details = :text WHERE slot < '2026-03-01 06:30'", text="garbage")
    newest, torn = catalog.job_runs(workspace)
    assert (newest["status"], newest["message"]) == ("done", "published")
    assert (torn["status"], torn["slot"]) == ("done", AS_OF)
    assert torn["message"] == "published (its details in the table ledger_runs cannot be read)"


def damage(workspace: Workspace, statement: str, **values: str) -> None:
    """Change the database behind the back of the stores."""
    with closing(sqlite3.connect(workspace.database_url.removeprefix("sqlite:///"))) as database, database:
        database.execute(statement, values)


def test_runs_of_all_experiments_and_their_curves(tracked_workspace: Workspace) -> None:
    for name in ("one", "two"):
        with Tracker.open(tracked_workspace, TrackingConfig(experiment=name)).start(f"run {name}") as run:
            for epoch, loss in enumerate((3.0, 2.0)):
                run.log_epoch(epoch, {"valid_loss": loss, "valid_mae": loss})
            run.flush()
            run.log_metrics({"final_valid_mae": 0.25, "final_test_mae": 0.5})
    runs = catalog.tracking_runs(tracked_workspace)
    assert {run["name"] for run in runs} == {"run one", "run two"}
    assert runs[0]["test_mae"] == 0.5
    curves = catalog.run_history(tracked_workspace, runs[0]["id"])
    assert set(curves["name"]) == {"valid_loss", "valid_mae"}, "a number logged once is no curve"
    assert curves.filter(name="valid_mae").sort("epoch")["value"].to_list() == [3.0, 2.0]
    with pytest.raises(BackendError):
        catalog.run_history(tracked_workspace, "0" * 32)


def track_study(workspace: Workspace) -> None:
    """Track a fit, then a study of four trials: two complete, one stopped early, one failed."""
    tracker = Tracker.open(workspace)
    with tracker.start("a fit") as run:
        run.log_metrics({"final_valid_mae": 0.5})
    settings = {"study": {"metric": "valid_mae"}}
    with tracker.start("tune small", config=settings, tags={"tsforge.study": "small"}) as study:
        for number in range(4):
            tags = {"tsforge.study.trial": number}
            config = {"model": {"ridge": 10.0**number, "kind": "same"}}
            with (
                suppress(ValueError),
                tracker.start(f"small {number}", config=config, tags=tags, parent=study) as run,
            ):
                if number == 2:
                    run.set_tags({"tsforge.outcome": "pruned", "tsforge.note": "stopped at step 1"})
                elif number == 3:
                    raise ValueError("a bad combination")
                for epoch in range(3):
                    run.log_epoch(epoch, {"valid_mae": 1.0 / (1 + epoch)})
                if number < 2:
                    run.log_metrics({"final_valid_mae": 0.3 - 0.1 * number})
        study.log_metrics({"best_valid_mae": 0.2})
        study.set_tags({"tsforge.best_trial": 1, "tsforge.trials": "2 complete, 1 failed, 1 pruned"})


def test_trials_are_listed_with_their_study(tracked_workspace: Workspace) -> None:
    track_study(tracked_workspace)
    runs = {run["name"]: run for run in catalog.tracking_runs(tracked_workspace)}
    assert set(runs) == {"a fit", "tune small"}
    study = runs["tune small"]
    assert (study["valid_mae"], study["trials"]) == (0.2, "2 complete, 1 failed, 1 pruned")
    assert (study["study"], study["best_trial"], runs["a fit"]["study"]) == ("small", "1", None)
    trials = catalog.trial_runs(tracked_workspace, study)
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3]
    assert [trial["status"] for trial in trials] == ["FINISHED", "FINISHED", "PRUNED", "FAILED"]
    assert [trial["value"] for trial in trials] == [0.3, pytest.approx(0.2), None, None]
    assert [trial["error"] for trial in trials] == [None, None, "stopped at step 1", "ValueError: a bad combination"]
    assert trials[1]["values"] == {"model.ridge": "10.0"}, "what is the same in all trials says nothing"


def test_looking_for_runs_makes_no_tracking_store(workspace: Workspace) -> None:
    assert catalog.tracking_runs(workspace) == []
    assert not (workspace.root / "mlflow.db").exists()


def scores(hours: int, first: int = 0) -> pl.DataFrame:
    times = [AS_OF + timedelta(hours=first + hour) for hour in range(hours)]
    parts = {"*": 1.0, "x": 2.0}
    return pl.concat(
        pl.DataFrame({"series_id": ["a"] * hours, "time": times, "variate": [name] * hours, "score": [score] * hours})
        for name, score in parts.items()
    )


def events(**ends: int) -> pl.DataFrame:
    rows = [{"event_id": name, "series_id": "a", "end": AS_OF + timedelta(hours=end)} for name, end in ends.items()]
    return pl.DataFrame(rows, schema={"event_id": pl.String, "series_id": pl.String, "end": pl.Datetime("us", "UTC")})


def publish(workspace: Workspace, day: int, found: pl.DataFrame, *, passed: bool = True) -> None:
    as_of = AS_OF + timedelta(days=day)
    manifest = {
        "job": "nightly",
        "as_of": as_of.isoformat(),
        "created": (as_of + timedelta(hours=1)).isoformat(),
        "model": "linear",
        "artifact": "linear-1",
        "data": {"name": "plant"},
        "counts": {"events": found.height},
        "checks": [{"kind": "fresh", "passed": passed, "message": "2 series are old"}],
    }
    tables = {"scores": scores(3, first=day), "events": found, "forecast": pl.DataFrame({"mean": [float(day)]})}
    published.write_partition(published.partition_path(workspace, "nightly", as_of), tables, manifest)


def store_detection(workspace: Workspace, name: str = "plant-linear-1", **facts: Any) -> Path:
    folder = workspace.reports / catalog_results.DETECTIONS / name
    folder.mkdir(parents=True)
    about = {"dataset": "plant", "model": "linear", "created": "2026-02-01T00:00:00+00:00", "events": 1} | facts
    (folder / "report.json").write_text(json.dumps(about))
    scores(4).write_parquet(folder / "scores.parquet")
    events(e=1).write_parquet(folder / "events.parquet")
    return folder


def test_detections_of_both_sources_newest_first(workspace: Workspace) -> None:
    store_detection(workspace)
    (store_detection(workspace, "damaged") / "report.json").write_text("{")
    store_detection(workspace, "undated", created="yesterday")
    publish(workspace, 0, events(e=1))
    publish(workspace, 1, events(e=9, f=2))
    records = catalog_results.list_detections(workspace)
    assert [(record["id"], record["events"]) for record in records] == [
        ("batch/nightly/2026-03-02T06-00-00Z", 2),
        ("batch/nightly", 2),  # e was seen twice
        ("batch/nightly/2026-03-01T06-00-00Z", 1),
        ("plant-linear-1", 1),
    ]
    assert records[0]["source"] == "batch nightly as of 2026-03-02 06:00"


def test_a_job_as_a_whole_has_each_row_and_event_once(workspace: Workspace) -> None:
    publish(workspace, 0, events(e=1))
    publish(workspace, 1, events(e=9, f=2), passed=False)
    whole = catalog_results.load_detection(workspace, "batch/nightly")
    assert whole.scores.height == 2 * 4  # hours 0..2 and 1..3, joint and one variate
    assert dict(whole.events.select("event_id", "end").iter_rows())["e"] == AS_OF + timedelta(hours=9), "newest version"
    assert whole.metadata["variates"] == ["x"]
    assert whole.metadata["dataset"] == "plant"
    assert whole.metadata["notices"] == ["2 series are old"]
    first = catalog_results.load_detection(workspace, "batch/nightly/2026-03-01T06-00-00Z")
    assert first.events["event_id"].to_list() == ["e"]
    assert first.metadata["notices"] == []


def test_an_unreadable_batch_hides_no_other(workspace: Workspace) -> None:
    publish(workspace, 0, events(e=1))
    publish(workspace, 1, events(e=1))
    newest = published.partition_path(workspace, "nightly", AS_OF + timedelta(days=1))
    (newest / "manifest.json").write_text("{}")
    assert [record["id"] for record in catalog_results.list_detections(workspace)] == [
        "batch/nightly/2026-03-01T06-00-00Z"
    ]


def test_damaged_events_of_a_batch_hide_no_other_one(workspace: Workspace) -> None:
    publish(workspace, 0, events(e=1))
    publish(workspace, 1, events(e=1))
    oldest = published.partition_path(workspace, "nightly", AS_OF)
    (oldest / "events.parquet").write_bytes(b"PAR1xx")
    assert [record["id"] for record in catalog_results.list_detections(workspace)] == [
        "batch/nightly/2026-03-02T06-00-00Z",
        "batch/nightly/2026-03-01T06-00-00Z",
    ]
    with pytest.raises(BackendError, match="is damaged .* publish it again with batch run --force"):
        catalog_results.load_detection(workspace, "batch/nightly/2026-03-01T06-00-00Z")


def test_detection_is_read_back_with_its_facts(workspace: Workspace) -> None:
    store_detection(workspace, notices=["stale"], variates=["x"], rule="fixed")
    found = catalog_results.load_detection(workspace, "plant-linear-1")
    assert found.scores.equals(scores(4))
    assert found.metadata["notices"] == ["stale"]
    assert found.metadata["rule"] == "fixed"


@pytest.mark.parametrize("name", ["gone", "batch/gone", "batch/nightly/gone", "../plant", "batch/../x", ""])
def test_unknown_results_are_refused_by_name(workspace: Workspace, name: str) -> None:
    publish(workspace, 0, events(e=1))
    for load in (catalog_results.load_detection, catalog_results.load_backtest, catalog_results.load_forecast):
        with pytest.raises(BackendError, match="may have been removed"):
            load(workspace, name)


def test_damaged_scores_say_what_to_do(workspace: Workspace) -> None:
    (store_detection(workspace) / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(BackendError, match="run tsforge detect again"):
        catalog_results.load_detection(workspace, "plant-linear-1")


def test_published_forecasts(workspace: Workspace) -> None:
    publish(workspace, 0, events())
    publish(workspace, 1, events())
    newest, oldest = catalog_results.list_forecasts(workspace)
    assert (newest["rows"], newest["artifact"], newest["dataset"]) == (1, "linear-1", "plant")
    assert catalog_results.load_forecast(workspace, oldest["id"])["mean"].to_list() == [0.0]


def test_catalog_loads_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; from tsforge.app import catalog, catalog_results; import dashboards.views.forecasts;"
        "print([n for n in ('torch', 'lightning', 'mlflow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_models_say_how_they_are_fitted() -> None:
    told = {row["model"]: row["fit"] for row in catalog.list_models()}
    assert {name: told[name] for name in FITS} == FITS
    assert [name for name, kind in told.items() if kind == "nothing to fit"] == [
        "drift",
        "last_value",
        "seasonal_naive",
    ]
