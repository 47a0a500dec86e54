from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tsforge.core.config import Config
from tsforge.core.errors import ArtifactError, BackendError
from tsforge.core.owner import Owner
from tsforge.core.workspace import Workspace
from tsforge.tracking import runs as tracking_runs
from tsforge.tracking.client import open_client
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.registry import _store
from tsforge.tracking.runs import Tracker, flatten, outcome


class InnerConfig(Config):
    lags: int = 3
    levels: tuple[float, ...] = (0.1, 0.9)
    note: str | None = None


class OuterConfig(Config):
    model: InnerConfig = InnerConfig()
    source: str = "postgresql://ann:s3cr3t@db/x"
    long: str = "x" * 2000


@pytest.fixture
def tracker(tracked_workspace: Workspace) -> Tracker:
    return Tracker.open(tracked_workspace)


def read(tracker: Tracker, run_id: str | None) -> Any:
    return open_client(tracker.tracking_uri).get_run(run_id)


def files(tracker: Tracker, run_id: str | None, folder: str | None = None) -> dict[str, Path]:
    client = open_client(tracker.tracking_uri)
    return {
        item.path: Path(client.download_artifacts(run_id, item.path))
        for item in client.list_artifacts(run_id, folder)
        if not item.is_dir
    }


def test_nested_settings_become_flat_texts() -> None:
    flat = flatten({"model": {"lags": 3, "on": True, "none": None, "hidden": [64, 32]}, "a[b]": "text", "empty": {}})
    assert flat == {
        "model.lags": "3",
        "model.on": "true",
        "model.none": "null",
        "model.hidden": "[64, 32]",
        "a_b_": "text",
        "empty": "{}",
    }
    assert flatten({"long": "y" * 900})["long"] == "y" * 499 + "…"


def test_a_run_records_settings_metrics_data_and_environment(tracker: Tracker, tracked_workspace: Workspace) -> None:
    with tracker.start("first", config=OuterConfig(), tags={"model": "linear"}) as run:
        for epoch in range(3):
            run.log_epoch(epoch, {"train_loss": 1.0 / (epoch + 1), "mae[h=96]": float(epoch)})
        run.log_metrics({"test_mae": 0.25, "undefined": math.nan})
        run.log_data("etth1", "0123abcd" * 8, source="sqlite:///x.db", profile={"rows": 17420})
    stored = read(tracker, run.id)
    assert stored.info.status == "FINISHED"
    assert stored.info.end_time >= stored.info.start_time
    assert stored.data.params["model.lags"] == "3"
    assert stored.data.params["model.levels"] == "[0.1, 0.9]"
    assert stored.data.params["model.note"] == "null"
    assert len(stored.data.params["long"]) == 500
    assert stored.data.metrics["test_mae"] == 0.25
    assert math.isnan(stored.data.metrics["undefined"])
    history = open_client(tracker.tracking_uri).get_metric_history(run.id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert stored.data.metrics["mae_h_96_"] == 2.0
    assert stored.data.tags["tsforge.data_fingerprint"] == "0123abcd" * 8
    dataset = stored.inputs.dataset_inputs[0].dataset
    assert (dataset.name, json.loads(dataset.profile)) == ("etth1", {"rows": 17420})
    found = files(tracker, run.id)
    config = yaml.safe_load(found["config.yaml"].read_text(encoding="utf-8"))
    assert config["long"] == "x" * 2000
    environment = json.loads(found["environment.json"].read_text(encoding="utf-8"))
    assert {"tsforge", "torch", "mlflow"} <= set(environment["packages"])
    assert stored.info.artifact_uri.startswith((tracked_workspace.mlflow_artifacts / "tsforge").as_uri())


def test_no_secret_reaches_the_store(
    tracker: Tracker, tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAREHOUSE_PASSWORD", "s3cr3t-from-env")
    with pytest.raises(RuntimeError), tracker.start("x", config=OuterConfig(), tags={"a": "http://u:s3cr3t@h"}) as run:
        run.log_data("d", "f", source="mysql://u:s3cr3t@h/db")
        run.log_text("log.txt", "tried s3cr3t-from-env")
        run.set_tags({"note": "used s3cr3t-from-env"})
        raise RuntimeError("cannot reach postgresql://ann:s3cr3t@db/x with s3cr3t-from-env")
    held = [path for path in tracked_workspace.root.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert held == []
    assert "postgresql://ann:***@db/x" in read(tracker, run.id).data.tags["tsforge.error"]


def test_a_failed_run_says_so_and_why(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match="bad lags"), tracker.start("fails") as run:
        run.log_epoch(0, {"loss": 2.0})
        raise ValueError("bad lags\nsecond line")
    stored = read(tracker, run.id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["tsforge.error"] == "ValueError: bad lags"
    assert stored.data.metrics == {"loss": 2.0}, "metrics before the failure are kept"


def test_ctrl_c_marks_the_run_and_its_parts_as_killed(tracker: Tracker) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        tracker.start("study") as parent,
        tracker.start("trial", parent=parent) as run,
    ):
        raise KeyboardInterrupt
    assert [read(tracker, item.id).info.status for item in (parent, run)] == ["KILLED", "KILLED"]
    assert read(tracker, run.id).data.tags["mlflow.parentRunId"] == parent.id


def exit_after_interrupt() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)  # what a trainer makes of Ctrl-C


def test_endings_are_told_apart() -> None:
    assert outcome(None) == ("FINISHED", "")
    assert outcome(SystemExit(0))[0] == "FINISHED"
    assert outcome(SystemExit(3))[0] == "FAILED"
    assert outcome(KeyboardInterrupt()) == ("KILLED", "interrupted by Ctrl-C")
    with pytest.raises(SystemExit) as caught:
        exit_after_interrupt()
    assert outcome(caught.value)[0] == "KILLED"


CHILD = """
import sys, time
from tsforge.core.workspace import Workspace
from tsforge.tracking.runs import Tracker
with Tracker.open(Workspace.open(sys.argv[1])).start("child") as run:
    run.log_epoch(0, {"loss": 1.0})
    run.flush()
    print(run.id, flush=True)
    time.sleep(60)
"""


def child(workspace: Workspace, number: int) -> tuple[str, int]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(workspace.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.send_signal(number)
    code = process.wait(timeout=30)
    process.stdout.close()
    return run_id, code


def test_sigterm_marks_the_run_as_killed(tracker: Tracker, tracked_workspace: Workspace) -> None:
    run_id, code = child(tracked_workspace, signal.SIGTERM)
    stored = read(tracker, run_id)
    assert code != 0
    assert stored.info.status == "KILLED"
    assert stored.data.tags["tsforge.error"] == "ended by signal SIGTERM"


def test_a_run_left_open_by_kill_9_is_closed_by_the_next_one(tracker: Tracker, tracked_workspace: Workspace) -> None:
    run_id, _ = child(tracked_workspace, signal.SIGKILL)
    assert read(tracker, run_id).info.status == "RUNNING"
    with tracker.start("next") as own:
        stored = read(tracker, run_id)
        assert stored.info.status == "KILLED"
        assert "ended without closing" in stored.data.tags["tsforge.error"]
        assert stored.data.metrics == {"loss": 1.0}
        assert Tracker.open(tracked_workspace).mark_stale_runs() == [], "a live run was called stale"
        assert read(tracker, own.id).info.status == "RUNNING"


def test_owners_of_other_hosts_and_reused_process_ids_are_judged_rightly() -> None:
    me = Owner.current()
    assert Owner.parse(str(me)) == me
    assert not me.is_gone()
    assert Owner(me.host, me.pid, "1").is_gone(), "the id belongs to a later process"
    assert not Owner("elsewhere/1", 999_999_999, "1").is_gone(), "another host cannot be judged"
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert Owner(me.host, int(finished.stdout), me.mark).is_gone()
    with pytest.raises(BackendError, match="damaged"):
        Owner.parse("nonsense")


def test_an_earlier_run_is_continued_under_its_id(tracker: Tracker) -> None:
    with pytest.raises(KeyboardInterrupt), tracker.start("study") as first:
        raise KeyboardInterrupt
    with tracker.start("study", resume=first.id) as again:
        assert again.id == first.id
        assert read(tracker, first.id).info.status == "RUNNING"
    stored = read(tracker, first.id)
    assert (stored.info.status, stored.data.tags["tsforge.error"]) == ("FINISHED", "")
    with tracker.start("study", resume="0" * 32) as fresh:
        assert fresh.id not in (None, first.id)


def test_without_tracking_nothing_is_written_and_mlflow_is_not_loaded(tmp_path: Path) -> None:
    code = """
import sys
from tsforge.core.workspace import Workspace
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.registry import _store
from tsforge.tracking.runs import Tracker
tracker = Tracker.open(Workspace.open(sys.argv[1]), TrackingConfig(enabled=False))
with tracker.start("x", config={"a": 1}) as run:
    run.log_epoch(0, {"loss": 1.0}); run.set_tags({"a": 1}); run.log_text("a", "b"); run.log_data("a", "b")
    run.log_figure("f.png", None); run.log_folder(None, "x"); run.flush()
assert run.id is None and tracker.runs() == [] and tracker.mark_stale_runs() == []
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_in_the_middle_does_not_end_the_work(
    tracker: Tracker, tracked_workspace: Workspace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tracked_workspace.root / "mlflow.db"
    with tracker.start("survivor") as run:
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE metrics RENAME TO gone")
        for epoch in range(700):
            run.log_epoch(epoch, {"loss": float(epoch)})
            run.flush()
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE gone RENAME TO metrics")
        connection.close()
    warnings = [record.getMessage() for record in caplog.records if "did not take" in record.getMessage()]
    assert len(warnings) == 1, "one warning, not one an epoch"
    stored = read(tracker, run.id)
    assert stored.info.status == "FINISHED"
    history = open_client(tracker.tracking_uri).get_metric_history(run.id, "loss")
    assert [point.value for point in history] == [float(epoch) for epoch in range(700)], (
        "kept metrics are sent when it is back"
    )


def test_a_deleted_experiment_is_reported(tracker: Tracker, tracked_workspace: Workspace) -> None:
    with tracker.start("one"):
        pass
    client = open_client(tracker.tracking_uri)
    client.delete_experiment(client.get_experiment_by_name("tsforge").experiment_id)
    with pytest.raises(BackendError, match="was deleted"), Tracker.open(tracked_workspace).start("two"):
        pass


def test_runs_come_back_as_records_newest_first(tracked_workspace: Workspace) -> None:
    tracker = Tracker.open(tracked_workspace, TrackingConfig(experiment="weather [nyc]"))
    for name in ("a", "b"):
        with tracker.start(name, config={"lags": 3}) as run:
            run.log_metrics({"mae": 1.0})
        time.sleep(0.01)
    newest, oldest = tracker.runs()
    assert (newest["name"], oldest["name"]) == ("b", "a")
    assert newest["status"] == "FINISHED"
    assert newest["parameters"] == {"lags": "3"}
    assert newest["metrics"] == {"mae": 1.0}
    assert newest["error"] is None
    assert not any(key.startswith("mlflow.") for key in newest["tags"])


@pytest.mark.parametrize("is_old", [False, True])
def test_parts_of_runs_can_be_left_out_or_asked_for(
    tracker: Tracker, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracker.start("study") as study:
        for number in range(3):
            with tracker.start(f"trial {number}", parent=study):
                pass
    with tracker.start("fit"):
        pass
    if is_old:  # a server that does not know how to ask for a tag that is not there
        client, exceptions = tracker._client, tracking_runs.import_mlflow().exceptions
        ask = client.search_runs

        def refuse(experiments: Any, wanted: str = "", **settings: Any) -> Any:
            if "IS NULL" in wanted:
                raise exceptions.MlflowException("Invalid clause(s) in filter string")
            return ask(experiments, wanted, **settings)

        monkeypatch.setattr(client, "search_runs", refuse)
    assert {run["name"] for run in tracker.runs(whole=True)} == {"study", "fit"}
    assert len(tracker.runs(1, whole=True)) == 1
    assert {run["name"] for run in tracker.runs(part_of=study.id)} == {f"trial {number}" for number in range(3)}
    assert len(tracker.runs()) == 5


def test_hundreds_of_settings_and_thousands_of_metrics_arrive(tracker: Tracker) -> None:
    start = time.monotonic()
    with tracker.start("big", config={f"key{number}": number for number in range(250)}) as run:
        for epoch in range(600):
            run.log_epoch(epoch, {"a": float(epoch), "b": -float(epoch)})
    seconds = time.monotonic() - start
    stored = read(tracker, run.id)
    assert len(stored.data.params) == 250
    history = open_client(tracker.tracking_uri).get_metric_history(run.id, "a")
    assert [point.value for point in history] == [float(epoch) for epoch in range(600)]
    assert seconds < 20, "metrics are sent in batches"
    assert os.path.exists(tracker.artifact_root)


class ClientError(Exception):
    """What the driver of a file store raises; no OSError."""


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_files_that_cannot_be_stored_cost_neither_numbers_nor_the_end(
    tracker: Tracker, tracked_workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    tracked_workspace.mlflow_artifacts.parent.mkdir(parents=True, exist_ok=True)
    tracked_workspace.mlflow_artifacts.write_text("in the way", encoding="utf-8")
    with tracker.start("no files", config={"lags": 3}) as run:
        for epoch in range(3):
            run.log_epoch(epoch, {"loss": 1.0 / (epoch + 1)})
        run.log_data("d", "fingerprint")
        run.log_folder(tracked_workspace.root, "artifact")
        run.set_tags({"tsforge.artifact_id": "a1"})
        run.log_metrics({"final_valid_mae": 0.5})
    stored = read(tracker, run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics == {"loss": 1 / 3, "final_valid_mae": 0.5}
    assert stored.data.params == {"lags": "3"}
    assert stored.data.tags["tsforge.artifact_id"] == "a1"
    assert stored.data.tags["tsforge.data"] == "d"
    (message,) = warned(caplog)
    assert "did not take config.yaml" in message


def test_labels_and_the_end_outlive_a_database_that_takes_no_numbers(
    tracker: Tracker, tracked_workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="bad lags"), tracker.start("no numbers") as run:
        with sqlite3.connect(tracked_workspace.root / "mlflow.db") as connection:
            connection.execute("ALTER TABLE metrics RENAME TO gone")
        connection.close()
        run.log_epoch(0, {"loss": 1.0})
        run.flush()
        run.set_tags({"tsforge.artifact_id": "a1", "odd[name]": 1})
        raise ValueError("bad lags")
    stored = read(tracker, run.id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["tsforge.error"] == "ValueError: bad lags"
    assert stored.data.tags["tsforge.artifact_id"] == "a1"
    assert stored.data.tags["odd_name_"] == "1"
    (message,) = warned(caplog)
    assert "did not take metrics" in message


def test_an_error_of_the_driver_of_a_file_store_costs_one_warning(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ClientError("AccessDenied: token=abcdef")

    tracker.experiment_id()
    monkeypatch.setattr(tracker._client, "log_text", refuse)
    monkeypatch.setattr(tracker._client, "log_artifact", refuse)
    with tracker.start("x", config={"lags": 3}) as run:
        for epoch in range(2):
            run.log_epoch(epoch, {"loss": 1.0})
    assert read(tracker, run.id).info.status == "FINISHED"
    (message,) = warned(caplog)
    assert "AccessDenied: token=***" in message


def test_a_fault_of_the_program_is_no_failure_of_the_store(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise TypeError("a bug")

    tracker.experiment_id()
    monkeypatch.setattr(tracker._client, "log_text", fault)
    with pytest.raises(TypeError, match="a bug"), tracker.start("x", config={"lags": 3}):
        pass
    (record,) = tracker.runs()
    assert (record["status"], record["error"]) == ("FAILED", "TypeError: a bug"), "a run was left open"


@pytest.mark.parametrize(
    ("location", "module", "package"),
    [
        ("s3://bucket/x", "boto3", "boto3"),
        ("gs://bucket/x", "google.cloud.storage", "google-cloud-storage"),
        ("wasbs://c@a.blob.core.windows.net/x", "azure.storage.blob", "azure-storage-blob"),
        ("sftp://me:s3cr3t@host/x", "pysftp", "pysftp"),
    ],
)
def test_a_file_store_without_its_driver_is_told_before_a_run_starts(
    tracked_workspace: Workspace, location: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    open_client(tracked_workspace.tracking_uri).create_experiment("far", artifact_location=location)
    tracker = Tracker.open(tracked_workspace, TrackingConfig(experiment="far"))
    scheme = location.partition(":")[0]
    for _ in range(2):
        with (
            pytest.raises(
                BackendError, match=rf"'far' keeps its files at {scheme}://.*pip install .*{package}"
            ) as caught,
            tracker.start("x"),
        ):
            pass
        assert "s3cr3t" not in str(caught.value)
    assert tracker.runs() == []
    assert tracker.find("a", "b") is None


def test_a_store_that_refuses_searches_ends_no_work(
    tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = tracking_runs.import_mlflow()

    def refuse(*_: Any, **__: Any) -> None:
        raise mlflow.exceptions.MlflowException("403 Forbidden")

    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", refuse)
    tracker = Tracker.open(tracked_workspace)
    with tracker.start("x") as run:
        run.log_metrics({"mae": 1.0})
    assert read(tracker, run.id).info.status == "FINISHED"
    (message,) = warned(caplog)
    assert "left open" in message
    assert "403 Forbidden" in message
    for ask in (
        tracker.runs,
        tracker.mark_stale_runs,
        lambda: tracker.runs(whole=True),
        lambda: tracker.find("a", "b"),
    ):
        with pytest.raises(BackendError, match="the tracking store .*403 Forbidden"):
            ask()
    monkeypatch.setattr(mlflow.MlflowClient, "search_experiments", refuse)
    with pytest.raises(BackendError, match="the tracking store .*403 Forbidden"):
        tracker.runs(every_experiment=True)


def test_the_registry_tells_an_error_of_a_driver_in_one_line(tracked_workspace: Workspace) -> None:
    with pytest.raises(BackendError, match="the model registry .*AccessDenied"), _store(tracked_workspace):
        raise ClientError("AccessDenied")
    with pytest.raises(TypeError), _store(tracked_workspace):
        raise TypeError("a bug")
    with pytest.raises(ArtifactError), _store(tracked_workspace):
        raise ArtifactError("damaged")
