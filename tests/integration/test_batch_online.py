"""Online intervals of recurring batches: handed on, killed, repeated, backfilled; and beside a backtest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app import published
from tsforge.app.batch import BatchConfig, BatchResult, backfill, run_batch
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.conformal_calibration import calibrate
from tsforge.network import NetworkConfig

AS_OF = datetime(2026, 3, 4, 6, tzinfo=UTC)
STEP = timedelta(hours=12)
ONLINE = {"quantile_levels": [0.1, 0.5, 0.9], "online": {"start": 4, "window": 30}}
ACI = {"start": 4, "window": 30, "method": "aci", "rates": [0.05]}


def run(site: Any, number: int, *, force: bool = False, **forecast: Any) -> BatchResult:
    config = validate(BatchConfig, site.batch(detect=None, forecast={**ONLINE, **forecast}))
    return run_batch(config, AS_OF + number * STEP, Workspace.open(), force=force)


def hashes() -> dict[str, dict[str, str]]:
    found = published.partitions(Workspace.open(), "daily")
    return {item.path.name: {name: facts["sha256"] for name, facts in item.manifest["files"].items()} for item in found}


@pytest.mark.parametrize(("settings", "statuses"), [(ONLINE["online"], {"adapted"}), (ACI, {"adapted", "infinite"})])
def test_each_batch_learns_from_what_came_since_the_one_before(
    site: Any, settings: dict[str, Any], statuses: set[str]
) -> None:
    results = [run(site, number, online=settings) for number in range(6)]
    facts = [result.partition.manifest["online"] for result in results]
    assert facts[0]["from"] is None
    assert [item["from"] for item in facts[1:]] == [(AS_OF + number * STEP).isoformat() for number in range(5)]
    assert facts[0]["judged"] == 0
    assert {item["judged"] for item in facts[1:]} == {2 * 2 * 12}, "series x variates x steps, each once"
    assert {item["waiting"] for item in facts} == {2 * 2 * 12}
    last = results[-1].partition
    forecast, online, cells = (last.table(name) for name in ("forecast", "online", "online_cells"))
    assert forecast is not None
    assert online is not None
    assert cells is not None
    assert cells["count"].unique().to_list() == [5]
    # aci: one miss among four scores leaves alpha at 0.16, and five scores hold no more than 1/6
    assert set(online["status_80"]) == statuses
    static = online.select("q0.1", "q0.9").to_numpy()
    assert not np.allclose(forecast.select("q0.1", "q0.9").to_numpy(), static)
    assert forecast["q0.5"].equals(online["q0.5"])
    plain = validate(BatchConfig, site.batch(name="plain", detect=None, forecast={"quantile_levels": [0.1, 0.5, 0.9]}))
    other = run_batch(plain, AS_OF + 5 * STEP, Workspace.open()).partition.table("forecast")
    assert other is not None
    assert np.array_equal(other.select("q0.1", "q0.9").to_numpy(), static)


def test_a_state_published_before_tracking_goes_on_as_aci_and_tracking_starts_anew(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(site, 0, online=ACI)
    path = first.partition.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["online"]["settings"]["method"], manifest["online"]["settings"]["rate"]
    manifest["online"]["format"] = 1
    path.write_text(json.dumps(manifest))
    again = run(site, 1, online=ACI).partition.manifest["online"]
    assert (again["from"], again["judged"]) == (AS_OF.isoformat(), 2 * 2 * 12)
    assert "start anew" not in caplog.text
    anew = run(site, 1, online={"start": 4}, force=True).partition.manifest["online"]
    assert (anew["from"], anew["judged"]) == (None, 0)
    assert "the online intervals of daily start anew" in caplog.text


def test_repeated_and_backfilled_batches_are_byte_for_byte_those_of_the_nights(site: Any) -> None:
    for number in range(4):
        run(site, number)
    nightly = hashes()
    run(site, 2, force=True)
    assert hashes() == nightly
    workspace = Workspace.open()
    (workspace.published / "daily").rename(workspace.published / "nights")
    config = validate(BatchConfig, site.batch(detect=None, forecast=ONLINE))
    for item in (workspace.published / "nights").iterdir():
        assert item.name in nightly
    backfill(config, AS_OF, AS_OF + 3 * STEP, "12h", workspace)
    assert hashes() == nightly


_KILLED = """
import json, os, signal, sys
from datetime import datetime
from tsforge.app import batch_online
from tsforge.app.batch import BatchConfig, run_batch
from tsforge.core import atomic
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace

moment, adapt, rename = sys.argv[3], batch_online.adapt, os.rename

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def adapting(*arguments):
    if moment == "before adapting":
        die()
    found = adapt(*arguments)
    if moment == "after adapting":
        die()
    return found

def renaming(source, target, **options):
    if moment == "publishing" and "as_of=" in str(target):
        die()
    rename(source, target, **options)
    if moment == "between the renames" and str(target).endswith(".old"):
        die()

if moment == "between the renames":
    atomic._exchange = lambda first, second: False  # as where two names cannot be exchanged in one step
batch_online.adapt, os.rename = adapting, renaming
config = validate(BatchConfig, json.loads(sys.argv[1]))
run_batch(config, datetime.fromisoformat(sys.argv[2]), Workspace.open(), force=True)
"""


def test_a_killed_batch_loses_and_repeats_nothing(site: Any, tmp_path: Path) -> None:
    for number in range(3):
        run(site, number)
    undisturbed = hashes()
    workspace = Workspace.open()
    (workspace.published / "daily").rename(tmp_path / "aside")
    (workspace.published / "daily").mkdir()
    first = min(undisturbed)
    (tmp_path / "aside" / first).rename(workspace.published / "daily" / first)
    script = tmp_path / "one.py"
    script.write_text(_KILLED)
    config = validate(BatchConfig, site.batch(detect=None, forecast=ONLINE)).model_dump_json()
    for number, moment in ((1, "before adapting"), (1, "after adapting"), (1, "publishing"), (2, "publishing")):
        command = [sys.executable, str(script), config, (AS_OF + number * STEP).isoformat(), moment]
        child = subprocess.run(command, env=dict(os.environ), timeout=120, check=False)
        assert child.returncode == -signal.SIGKILL, f"{moment}: not killed"
        for item in published.partitions(workspace, "daily"):
            published.verify_partition(item)
        assert len(published.partitions(workspace, "daily")) == number, f"{moment}: a killed batch is published"
        if moment == "publishing":
            run(site, number)
    assert hashes() == undisturbed


def test_a_batch_killed_while_it_exchanges_its_folder_is_not_left_out(site: Any, tmp_path: Path) -> None:
    for number in range(2):
        run(site, number)
    before = hashes()
    script = tmp_path / "one.py"
    script.write_text(_KILLED)
    config = validate(BatchConfig, site.batch(detect=None, forecast=ONLINE)).model_dump_json()
    command = [sys.executable, str(script), config, (AS_OF + STEP).isoformat(), "between the renames"]
    child = subprocess.run(command, env=dict(os.environ), timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    workspace = Workspace.open()
    path = published.partition_path(workspace, "daily", AS_OF + STEP)
    assert not path.exists()
    assert hashes().keys() == {"as_of=2026-03-04T06-00-00Z", next(path.parent.glob(".as_of=*.old")).name}
    assert run(site, 2).partition.manifest["online"]["from"] == (AS_OF + STEP).isoformat()
    assert path.exists()
    assert before.items() <= hashes().items()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, r"newer tsforge \(online format 3, this one reads up to 2\); upgrade tsforge"),
        ("x", "is damaged: it states no valid format version .*; publish that batch again with --force"),
        (None, "is damaged"),
        (0, "is damaged"),
        (True, "is damaged"),
    ],
)
def test_a_newer_or_damaged_state_is_refused(site: Any, version: object, message: str) -> None:
    path = run(site, 0).partition.path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "online": {**manifest["online"], "format": version}}))
    with pytest.raises(ArtifactError, match=message):
        run(site, 1)


def test_other_settings_start_anew_and_a_changed_state_is_refused(site: Any) -> None:
    run(site, 0)
    partition = run(site, 1).partition
    assert run(site, 2, online={"start": 5}).partition.manifest["online"]["from"] is None
    path = partition.path / "online_cells.parquet"
    table = pl.read_parquet(path).with_columns(pl.col("count") + 1)
    table.write_parquet(path)
    workspace = Workspace.open()
    later = published.partition_path(workspace, "daily", AS_OF + 2 * STEP)
    later.rename(later.with_name("other"))
    with pytest.raises(ArtifactError, match=r"online_cells\.parquet was changed"):
        run(site, 2, force=True)
    with pytest.raises(DataError, match="hold none"):
        run(site, 0, force=True, quantile_levels=[])


def drifting_frame() -> SeriesFrame:
    """Hourly noise around a day's wave that grows 2.5 times after two thirds of the rows."""
    hour = np.arange(900)
    noise = np.random.default_rng(0).normal(0, 0.3, 900) * np.where(hour > 600, 2.5, 1.0)
    stamps = [datetime(2026, 1, 1) + timedelta(hours=int(item)) for item in hour]
    table = pl.DataFrame({"series_id": ["a"] * 900, "time": stamps, "y": 2.0 * np.sin(2 * np.pi * hour / 24) + noise})
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"])


def fit_calibrated(frame: SeriesFrame, cutoff: Any) -> Artifact:
    window = WindowSpec(context_length=24, horizon=4)
    panel = Panel.from_frame(frame)
    middle = panel.span()[1] * 2 // 3
    early = frame.until(frame.grid.time_at(middle - 1))
    artifact = fit_solved(early, validate(NetworkConfig, {"model": {"name": "linear"}}), window)
    windows = WindowDataset(panel, window, middle, panel.span()[1])
    return replace(artifact, calibration=calibrate(artifact.network, windows, (0.1, 0.5, 0.9)))


def test_a_backtest_grades_online_intervals_beside_the_static_ones() -> None:
    frame = drifting_frame()
    settings = {"num_cutoffs": 120, "stride": 2, "baselines": ["last_value"], "regimes": []}
    plain = backtest(fit_calibrated, frame, validate(BacktestConfig, settings), horizon=4)
    report = backtest(fit_calibrated, frame, validate(BacktestConfig, {**settings, "online": True}), horizon=4)
    assert report.leaderboard.drop("fit_seconds", "predict_seconds").equals(
        plain.leaderboard.drop("fit_seconds", "predict_seconds")
    )
    overall = report.by("overall")
    cover = dict(zip(overall["model"], overall["coverage_80"], strict=True))
    assert abs(cover["linear+online"] - 0.8) < abs(cover["linear"] - 0.8) - 0.02
    means = report.forecasts.filter(pl.col("model").is_in(["linear", "linear+online"]))
    assert means.group_by("series_id", "cutoff", "step", "variate").agg(pl.col("mean").n_unique())["mean"].max() == 1
    assert any(note.startswith("linear+online: coverage of 80 %") for note in report.notes)
    assert set(report.by("step").filter(model="linear+online")["step"]) == {1, 2, 3, 4}
    with pytest.raises(ConfigError, match="rates"):
        validate(BacktestConfig, {"online": {"method": "aci", "rates": []}})
