"""The detect use-case on a stored data set: what is saved and read back, the grade of labels, the real sensor error."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.grading import grade
from tsforge.app.detect import DetectJobConfig, detect, list_detections, read_detection
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.artifact import save_artifact
from tsforge.contracts.tables import EVENT_COLUMNS, JOINT, SCORE_COLUMNS
from tsforge.core.config import load, validate
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.event_records import event_id
from tsforge.data.event_store import EventStore
from tsforge.data.store import SeriesStore


def prepare(workspace: Workspace, data: dict[str, Any], **settings: Any) -> str:
    """Ingest, fit the closed-form linear model, and return the artifact's id."""
    ingest(validate(IngestConfig, {"data": data}), workspace)
    config = validate(FitConfig, {"data": data, "model": {"name": "linear"}, **settings})
    frame = load_dataset(workspace, config.data, masked=True)
    return save_artifact(fit_frame(frame, config)[0], workspace.artifacts).id


def test_the_shipped_config_is_all_defaults() -> None:
    assert load(DetectJobConfig, "detect") == DetectJobConfig()
    changed = load(DetectJobConfig, "detect", ["detector.rule.alarms_per_day=1", "detector.score.joint=max_abs"])
    assert changed.detector.rule.alarms_per_day == 1  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"detector\.score\.jont"):
        load(DetectJobConfig, "detect", ["detector.score.jont=max_abs"])


def test_a_detection_is_saved_listed_and_read_back(site: Any) -> None:
    workspace = Workspace.open(site.home)
    assert list_detections(workspace) == []
    done = detect(DetectJobConfig(stop="2026-03-05"), workspace)
    assert done.grade is None
    # a.x jumps for five hours on day 61
    best = done.rows()[0]
    assert (best["series_id"], str(best["start"])[:16]) == ("a", "2026-03-03 05:00")
    assert best["variates"].split(", ")[0] == "x"
    assert done.summary()["artifact"] == site.artifact
    listed = list_detections(workspace)
    assert [item["id"] for item in listed] == [done.id]
    assert listed[0]["events"] == done.report.events.height
    again = read_detection(workspace, str(done.id))
    assert again.events.equals(done.report.events)
    assert again.scores.table.equals(done.report.scores.table)
    assert again.metadata["dataset"] == "plant"
    assert again.metadata["variates"] == ["x", "y"]
    assert set(EVENT_COLUMNS) <= set(again.events.columns)
    assert set(SCORE_COLUMNS) <= set(again.scores.table.columns)
    json.dumps(done.summary(), default=str)
    assert detect(DetectJobConfig(stop="2026-03-05", save=False), workspace).path is None
    assert len(list_detections(workspace)) == 1


BY_RANK = {"kind": "quantile", "alpha": 0.02}
MAX_ABS = {"rule": BY_RANK, "score": {"joint": "max_abs"}}


def stored_events(workspace: Workspace) -> pl.DataFrame:
    with closing(EventStore(workspace.database_url)) as store:
        return store.events("plant")


def test_detectors_with_other_scores_have_events_of_their_own(site: Any) -> None:
    workspace = Workspace.open(site.home)
    runs = [detect(validate(DetectJobConfig, {"detector": plain}), workspace) for plain in (MAX_ABS, {"rule": BY_RANK})]
    starts = [run.report.events.select("series_id", "start") for run in runs]
    assert starts[0].join(starts[1], on=["series_id", "start"], how="semi").height > 0
    for run in runs:
        events = run.report.events
        assert run.recorded is not None
        assert run.recorded.new == events.height > 0
        stored = stored_events(workspace).join(events.select("event_id"), on="event_id", how="semi")
        assert stored["source"].unique().to_list() == [f"detect:{run.id}"]
        for name in ("peak_score", "threshold"):
            assert dict(stored.select("event_id", name).rows()) == dict(events.select("event_id", name).rows())
        measures = {json.loads(facts)["measure"] for facts in stored["facts"]}
        assert measures == {run.report.metadata["score"]}
    again = detect(validate(DetectJobConfig, {"detector": MAX_ABS}), workspace)
    assert again.recorded is not None
    assert (again.recorded.new, again.recorded.unchanged) == (0, runs[0].report.events.height)


def test_events_stored_before_the_measure_was_in_their_ids_go_on(site: Any) -> None:
    """An older version kept kind and joint as ``score``, of what a watch told not even that."""
    workspace = Workspace.open(site.home)
    config = validate(DetectJobConfig, {"detector": MAX_ABS, "save": False})
    events = detect(config, workspace).report.events
    ids = [event_id(*row) for row in events.select("series_id", "start", "rule").iter_rows()]
    older = events.drop("measure").with_columns(pl.Series("event_id", ids), pl.lit("open").alias("state"))
    facts: list[dict[str, Any]] = [{"score": "normalised, max_abs"}, {}, {"score": "normalised, mahalanobis"}]
    with closing(EventStore(workspace.database_url)) as store:
        for place, about in enumerate(facts):
            store.record("plant", older[place::3], source="detect:1", artifact="a", facts=about)
        store.set_state(ids[0], "dismissed", actor="eva")
    done = detect(config.model_copy(update={"save": True}), workspace)
    others = len(ids[2::3])  # what a detector with another score found is not this one's
    assert done.recorded is not None
    assert 0 < done.recorded.new == others < len(ids)
    now = stored_events(workspace)
    assert now.height == len(ids) + others
    mine = [name for place, name in enumerate(ids) if place % 3 != 2]
    assert set(now.filter(pl.col("event_id").is_in(mine))["state"]) == {"closed"}
    assert now.filter(event_id=ids[0])["human_state"].item() == "dismissed"
    assert {row["event_id"] for row in done.rows()} <= set(now["event_id"]), "the ids that are shown can be looked up"


def test_the_log_counts_rows_as_the_summary_does(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tsforge"):
        done = detect(DetectJobConfig(save=False), Workspace.open(site.home))
    said = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "detected"]
    assert [fields["rows"] for fields in said] == [done.summary()["rows_scored"]]


def test_a_stop_before_the_start_is_named(site: Any) -> None:
    with pytest.raises(DataError, match="stop 2026-03-02 lies before start 2026-03-05"):
        detect(DetectJobConfig(start="2026-03-05", stop="2026-03-02"), Workspace.open(site.home))


def test_damaged_or_unknown_detections_are_named(site: Any) -> None:
    workspace = Workspace.open(site.home)
    done = detect(DetectJobConfig(series=("a",)), workspace)
    assert done.path is not None
    with pytest.raises(BackendError, match=f"no detection 'nope' \\(known: {done.id}\\)"):
        read_detection(workspace, "nope")
    (done.path / "events.parquet").write_bytes(b"not parquet")
    with pytest.raises(BackendError, match="is damaged"):
        read_detection(workspace, str(done.id))
    (done.path / "report.json").write_text("{")
    assert list_detections(workspace) == []


def test_unknown_artifacts_data_sets_and_series_are_refused(site: Any) -> None:
    workspace = Workspace.open(site.home)
    with pytest.raises(ArtifactError, match="nothing-like-it"):
        detect(DetectJobConfig(artifact="nothing-like-it"), workspace)
    with pytest.raises(DataError, match="elsewhere"):
        detect(DetectJobConfig(dataset="elsewhere"), workspace)
    with pytest.raises(DataError, match="unknown series|zz"):
        detect(DetectJobConfig(series=("zz",)), workspace)


def test_a_read_only_reports_folder_is_one_clear_error_and_leaves_nothing(site: Any) -> None:
    workspace = Workspace.open(site.home)
    workspace.reports.mkdir(exist_ok=True)
    (workspace.reports / "detections").write_text("a file where the folder should be")
    with pytest.raises(BackendError, match="cannot write"):
        detect(DetectJobConfig(series=("a",)), workspace)


def test_generated_labels_are_graded(workspace_root: Path) -> None:
    workspace = Workspace.open()
    generator = {"num_series": 2, "num_rows": 3000, "num_anomalies": 6, "anomalies": ["spike", "missing_burst"]}
    data = {"name": "made", "source": {"kind": "synthetic", "generator": {**generator, "anomaly_strength": 20.0}}}
    prepare(
        workspace,
        data,
        window={"context_length": 48, "horizon": 3},
        split={"kind": "fractions", "train": 0.4, "valid": 0.2, "test": 0.4},
    )
    done = detect(DetectJobConfig(), workspace)
    assert done.grade is not None
    kinds = {row["kind"]: row for row in done.grade.rows()}
    assert kinds["spike"]["recall"] == 1.0
    assert kinds["spike"]["median_delay"] == 0.0
    assert kinds["spike"]["right_variate"] == 1.0
    assert kinds["missing_burst"]["recall"] < 0.5  # nothing to score there: the data report finds those
    assert kinds["all"]["labelled"] == 12
    overall = done.grade.overall
    assert overall["auc_pr"] is not None
    assert overall["event_precision_penalised"] <= overall["event_precision"]
    assert read_detection(workspace, str(done.id)).metadata["grade"]["overall"] == pytest.approx(overall)
    with pytest.raises(DataError, match="labels lack the column"):
        grade(done.report, pl.DataFrame({"start": [1]}), load_dataset(workspace, "made").grid)


def test_a_random_score_is_graded_as_chance(workspace_root: Path) -> None:
    """The grade itself must not flatter: events at random rows hit labels about as often as chance allows."""
    workspace = Workspace.open()
    data = {"name": "made", "source": {"kind": "synthetic", "generator": {"num_series": 1, "num_rows": 4000}}}
    prepare(
        workspace, data, window={"context_length": 24, "horizon": 1}, split={"train": 0.4, "valid": 0.2, "test": 0.4}
    )
    done = detect(DetectJobConfig(), workspace)
    assert done.grade is not None
    table = done.report.scores.table
    random = pl.Series("score", np.random.default_rng(0).uniform(size=table.height))
    noise = table.with_columns(pl.when(pl.col("variate") == JOINT).then(random).alias("score"))
    report = replace(done.report, scores=replace(done.report.scores, table=noise), events=done.report.events.head(0))
    with closing(SeriesStore(workspace.database_url)) as store:
        chance = grade(report, store.labels("made"), load_dataset(workspace, "made").grid).overall
    assert chance["auc_pr"] == pytest.approx(chance["auc_pr_chance"], abs=0.08)
    assert chance["event_recall"] == 0.0


def test_the_real_sensor_error_is_an_event_of_wind_speed(workspace_root: Path) -> None:
    """EWR reported a wind of 1,048 mph on 2013-02-12 08:00 UTC; everything fitted lies before it."""
    workspace = Workspace.open()
    ingest(load(IngestConfig, "ingest", ["data=nyc_weather"]), workspace)
    config = load(FitConfig, "experiment/demo_sensor", ["model=linear"])
    artifact = fit_frame(load_dataset(workspace, config.data, masked=True), config)[0]
    identity = save_artifact(artifact, workspace.artifacts).id
    done = detect(DetectJobConfig(artifact=identity, stop="2013-02-20"), workspace)
    best = done.report.events.sort("peak_score", descending=True).to_dicts()[0]
    assert best["series_id"] == "EWR"
    assert str(best["peak_time"])[:16] == "2013-02-12 08:00"
    assert best["start"] == best["end"] == best["peak_time"]  # nothing rings on: the network never saw the value
    first, second = best["variates"][:2]
    assert first["variate"] == "wind_speed"
    assert first["contribution"] > 20 * second["contribution"]
    row = done.report.scores.table.filter(
        (pl.col("series_id") == "EWR") & (pl.col("time") == best["peak_time"]) & (pl.col("variate") == "wind_speed")
    )
    assert row["value"][0] == pytest.approx(1048.36, abs=0.01)
    assert 0 < row["expected"][0] < 40
