"""The scheduler with the real pipelines as children: YAML in, batches published, outside schedulers served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from tsforge.app import published
from tsforge.app.ingest import load_dataset
from tsforge.app.schedule import ScheduleConfig, job_status, run_scheduler, status
from tsforge.core.config import config_dir, load
from tsforge.core.workspace import Workspace
from tsforge.scheduling.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]


def schedule(site: Any, **changes: Any) -> Path:
    """Write a schedule of one job whose slots are the two last hours, and its batch config; return the schedule.

    The model was fitted on dates of the site's data; the batch stands at the present, long after them.
    """
    batch = site.home.parent / "daily.yaml"
    settings = site.batch(detect=None, checks=[{"kind": "fresh", "max_age": "10y"}])
    batch.write_text(yaml.safe_dump(settings))
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    job = {
        "name": "hourly",
        "cron": "0 * * * *",
        "run": "batch",
        "config": str(batch),
        "catch_up": "all",
        "start": (now - timedelta(hours=2, minutes=-1)).isoformat(),
        "max_delay_seconds": 86400,
    }
    path = site.home.parent / "schedule.yaml"
    path.write_text(yaml.safe_dump({"jobs": [job | changes], "poll_seconds": 1, "stop_seconds": 20}))
    return path


def test_run_once_does_what_is_due_and_then_nothing(site: Any) -> None:
    config = load(ScheduleConfig, str(schedule(site)))
    workspace = Workspace.open()
    (before,) = job_status(config, workspace)
    due = list(before.due)
    assert len(due) in (2, 3), "three when the hour turned meanwhile"
    assert run_scheduler(config, workspace, once=True) == 0
    slots = [partition.as_of for partition in published.partitions(workspace, "daily")]
    assert slots[: len(due)] == due
    (record,) = status(config, workspace)
    assert record["last_status"] == "done"
    assert record["due"] == 0 or slots[-1] < datetime.now(UTC) - timedelta(hours=1)
    ledger = Ledger(workspace.database_url)
    run = ledger.find("schedule/hourly", due[0])
    ledger.close()
    assert run is not None
    assert '"status": "published"' in run.message
    assert Path(str(run.output)).is_file()


def test_a_failing_batch_is_reported_with_its_message(site: Any) -> None:
    config = load(ScheduleConfig, str(schedule(site, overrides=["model=no-such-artifact@champion", "ingest=false"])))
    workspace = Workspace.open()
    assert run_scheduler(config, workspace, once=True) == 1
    (found,) = job_status(config, workspace)
    assert {run.status for run in found.last} == {"failed"}
    assert "error: " in found.last[0].message
    assert "no-such-artifact" in found.last[0].message


def test_a_scheduled_ingest_runs_whatever_lies_in_the_current_directory(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder ``pipelines`` there is not ours, and relative paths are relative to it."""
    folder = site.home.parent
    (folder / "ingest.yaml").write_text(yaml.safe_dump({"data": site.data()}))
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    monkeypatch.chdir(folder)
    path = schedule(site, run="ingest", config="ingest.yaml", catch_up="latest", overrides=["data.name=again"])
    workspace = Workspace.open()
    code = run_scheduler(load(ScheduleConfig, str(path)), workspace, once=True)
    (found,) = job_status(load(ScheduleConfig, str(path)), workspace)
    assert code == 0, found.last[0].message
    assert load_dataset(workspace, "again").num_rows == pl.read_parquet(site.source).height * 2


def test_the_service_publishes_and_stops_on_sigterm(site: Any) -> None:
    path = schedule(site)
    script = (
        "import sys; from tsforge.app.schedule import ScheduleConfig, run_scheduler;"
        "from tsforge.core.config import load; from tsforge.core.logs import configure_logging;"
        "from tsforge.core.workspace import Workspace; configure_logging(as_json=True);"
        "sys.exit(run_scheduler(load(ScheduleConfig, sys.argv[1]), Workspace.open()))"
    )
    service = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    workspace, deadline = Workspace.open(), time.monotonic() + 200
    try:
        while len(published.partitions(workspace, "daily")) < 2:
            assert service.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        os.kill(service.pid, signal.SIGTERM)
        _, errors = service.communicate(timeout=60)
    assert service.returncode == 0
    messages = [json.loads(line)["message"] for line in errors.splitlines()]
    assert messages[0] == "scheduler started"
    assert messages[-1] == "scheduler stopped"
    assert "slot done" in messages


@pytest.mark.parametrize("path", sorted(config_dir().glob("schedule*.yaml")), ids=lambda path: path.stem)
def test_shipped_schedules_load_and_name_configs_that_load(path: Path) -> None:
    from tsforge.app.batch import BatchConfig
    from tsforge.app.ingest import IngestConfig
    from tsforge.app.retrain import RetrainConfig

    classes = {"batch": BatchConfig, "retrain": RetrainConfig, "ingest": IngestConfig}
    for job in load(ScheduleConfig, path.stem).jobs:
        load(classes[job.run], job.config, job.overrides)


@pytest.mark.parametrize("path", sorted((config_dir() / "batch").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_batches_load(path: Path) -> None:
    from tsforge.app.batch import BatchConfig

    assert load(BatchConfig, f"batch/{path.stem}").name == path.stem
