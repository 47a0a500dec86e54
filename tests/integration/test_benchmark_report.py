"""Benchmark over several data sets: workers, baselines, known sets, published rows, report, peers, hooks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app import benchmark_run
from tsforge.app.benchmark import BenchmarkConfig, BenchmarkResult, benchmark
from tsforge.app.benchmark_data import drift_steps, read_benchmark_data
from tsforge.app.benchmark_html import document, name_text
from tsforge.app.benchmark_peers import RUNNER, PeerHost, peer_forecasts
from tsforge.app.benchmark_report import NOT_BETTER
from tsforge.app.benchmark_run import Setting
from tsforge.app.benchmark_sets import known_sets, locate, published_results
from tsforge.app.benchmark_svg import horizon_plot
from tsforge.app.worker_pool import Job, JobQueue, WorkerPool
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.windows import WindowDataset, WindowSpec

REAL_PEERS = "TSFORGE_PEERS_PYTHON"


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


def hourly(path: Path, rows: int = 480, seed: int = 0, slope: float = 0.0) -> Path:
    rng = np.random.default_rng(seed)
    hours = np.arange(rows)
    columns: dict[str, Any] = {"ds": [datetime(2024, 1, 1) + timedelta(hours=int(hour)) for hour in hours]}
    for name in ("a", "b"):
        wave = np.sin(2 * np.pi * hours / 24) + 0.2 * rng.normal(size=rows) + slope * hours
        columns[name] = np.where(rng.random(rows) < 0.02, np.nan, wave)
    pl.DataFrame(columns).write_parquet(path)
    return path


def run(workspace: Workspace, *paths: Path | str, **settings: Any) -> BenchmarkResult:
    plain = {
        "datasets": [str(path) for path in paths],
        "models": ["linear"],
        "context_lengths": [24],
        "horizons": [6],
    }
    return benchmark(validate(BenchmarkConfig, plain | settings), workspace)


# ---- baselines, several sets, report


def test_baselines_stand_at_the_same_and_at_the_best_look_back(workspace: Workspace, tmp_path: Path) -> None:
    result = run(workspace, hourly(tmp_path / "one.parquet"), context_lengths=[24, 48], models=["dlinear"], train={
        "max_epochs": 1, "max_steps_per_epoch": 2,
    })  # fmt: skip
    table = result.table
    for label in ("OLS+IN", "ridge+IN"):
        rows = table.filter(model=label)
        assert sorted(rows["context_length"].to_list()) == [24, 48]
        best = table.filter(model=f"{label}, best look-back").row(0, named=True)
        candidates = rows.sort("valid_mse")
        assert best["valid_mse"] == candidates["valid_mse"][0]
        assert best["context_length"] in (24, 48, 96)
        assert "chosen on validation" in best["note"]
    assert "does not beat ridge+IN" in (result.path / "report.md").read_text()


def test_the_choice_of_a_look_back_does_not_see_the_test_rows(workspace: Workspace, tmp_path: Path) -> None:
    first = run(workspace, hourly(tmp_path / "one.parquet"), context_lengths=[24, 48])
    table = pl.read_parquet(tmp_path / "one.parquet")
    last = pl.int_range(pl.len()) >= len(table) - int(0.2 * len(table))
    table.with_columns(pl.when(last).then(-7.0).otherwise(pl.col("a")).alias("a")).write_parquet(
        tmp_path / "two.parquet"
    )
    second = run(workspace, tmp_path / "two.parquet", context_lengths=[24, 48])
    for label in ("OLS+IN", "ridge+IN"):
        one, two = (item.table.filter(model=f"{label}, best look-back").row(0, named=True) for item in (first, second))
        assert one["context_length"] == two["context_length"]
        assert one["valid_mse"] == pytest.approx(two["valid_mse"], rel=1e-9)
        assert one["mse"] != two["mse"]


def test_drift_joins_where_the_training_rows_trend(workspace: Workspace, tmp_path: Path) -> None:
    flat = read_benchmark_data(hourly(tmp_path / "flat.parquet"))
    steep = read_benchmark_data(hourly(tmp_path / "steep.parquet", slope=0.2))
    assert drift_steps(flat, 24, 48) is None
    assert drift_steps(steep, 24, 48) is not None
    models = run(workspace, tmp_path / "steep.parquet", horizons=[24], context_lengths=[48]).table["model"]
    assert models.str.starts_with("drift:").any()


def test_two_sets_two_workers_give_what_one_process_gives(workspace: Workspace, tmp_path: Path) -> None:
    paths = [hourly(tmp_path / f"{name}.parquet", seed=seed) for seed, name in enumerate(("one", "two"))]
    settings = {"models": ["linear", "dlinear"], "train": {"max_epochs": 1, "max_steps_per_epoch": 2}, "seeds": 2}
    single = run(workspace, *paths, **settings)
    double = run(workspace, *paths, **settings, workers=2, refresh=True)
    keys = ["data", "model", "context_length", "horizon", "seed", "mse", "mae"]
    assert single.table.select(keys[:-2]).equals(double.table.select(keys[:-2]))
    np.testing.assert_allclose(single.table["mse"], double.table["mse"], rtol=1e-5)
    assert set(single.table["data"]) == {"one", "two"}
    assert run(workspace, *paths, **settings, workers=2).summary()["from_cache"] == double.table.height
    page = (double.path / "report.html").read_text()
    assert page.count("<svg") >= 2
    assert "prefers-color-scheme" in page
    assert not [part for part in ("http://", "https://", "<script", "src=") if part in page]
    text = (double.path / "report.md").read_text()
    for part in ("## one", "## two", "mean rank", "Friedman", NOT_BETTER):
        assert part in text


def test_published_rows_stand_beside_ours_with_their_defects(workspace: Workspace, tmp_path: Path) -> None:
    path = hourly(tmp_path / "exchange_rate.parquet", rows=900)
    text = (run(workspace, path, horizons=[96, 192]).path / "report.md").read_text()
    assert "| iTransformer (published, L=96, from memory) | 96 | 0.086 | 0.177 |" in text
    assert "drop_last" in text
    assert "LTSF-Linear benchmark file, commit 0c11366" in text
    assert published_results().of("etth1")[0].mse["etth1"][0] == 0.374
    assert published_results().of("nothing") == []


def test_known_sets_are_found_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSFORGE_DATA", raising=False)
    with pytest.raises(ConfigError, match="data_folder"):
        locate("ETTh1", None)
    with pytest.raises(DataError, match="ETTh1"):
        locate("ETTh1", str(tmp_path))
    (tmp_path / "forecast").mkdir()
    hourly(tmp_path / "forecast" / "beijing_air.parquet")
    place = locate("beijing_air_pm25", str(tmp_path))
    assert place is not None
    assert place[0].name == "beijing_air.parquet"
    assert locate("plant", None) is None
    for known in known_sets().values():
        assert known.season <= max(known.context_length, known.season)
        assert known.source
        assert known.flaws


def test_unknown_names_are_one_error_with_the_nearest(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ETTh1'"):
        run(workspace, "ETTh11")


def test_names_of_files_are_text_in_both_reports(workspace: Workspace, tmp_path: Path) -> None:
    folder = run(workspace, hourly(tmp_path / "na|me <b>x*.parquet"), baselines="naive").path
    text, html = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert text.startswith("# Benchmark: na\\|me \\<b\\>x\\*\n")
    assert "over 1 pair of data set and horizon" in text
    assert "<b>" not in text
    assert "<b>" not in html


def test_names_in_tables_break_between_their_parts_only() -> None:
    assert name_text("linear:ridge=1 & <b>") == "linear:<wbr>ridge=<wbr>1 &amp; &lt;b&gt;"
    assert "anywhere" not in document("t", [])


def test_a_plot_keeps_names_as_text() -> None:
    drawn = horizon_plot([1, 2], {"<b>&": [1.0, 2.0], "none": [None, None]})
    assert "&lt;b&gt;&amp;" in drawn
    assert "<b>" not in drawn


# ---- workers


def test_a_worker_that_dies_is_a_failed_row(tmp_path: Path) -> None:
    data = read_benchmark_data(hourly(tmp_path / "one.parquet"))
    base = {"kind": "fitter", "name": "dies", "label": "x", "context_length": 24, "horizon": 6}
    queue = JobQueue()
    for seed in range(2):
        queue.push(Job(data=data, setting=Setting(**base, seed=seed), cost=float(seed)))
    with WorkerPool(1, threads=1, peers=None) as pool:
        results = pool.results(queue)
        _, first = next(results)  # an unknown entry: an ordinary failure
        assert first["status"] == "failed"
        queue.push(Job(data=data, setting=Setting(**base, seed=2), cost=0.0))
        pool._hand_out(queue)
        os.kill(pool._workers[0].process.pid or 0, signal.SIGKILL)
        outcomes = [outcome for _, outcome in results]
    assert any("SIGKILL" in outcome["error"] for outcome in outcomes)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_ctrl_c_stops_promptly_keeps_the_cache_and_leaves_nobody(tmp_path: Path, workspace_root: Path) -> None:
    path = hourly(tmp_path / "one.parquet")
    slow = "dlinear:train.max_epochs=100000:train.patience=100000"
    command = [sys.executable, "-m", "tsforge", "benchmark", "--data", str(path), "--models", f"{slow},linear"]
    command += ["--context-length", "24", "--horizons", "6", "--workers", "2", "--home", str(workspace_root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(workspace_root.rglob("cache/linear-*.json")):
        time.sleep(0.2)
        assert process.poll() is None
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert children
    deadline = time.monotonic() + 10  # the standard library's own tracker leaves last
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in children if alive(pid)] == []
    assert list(workspace_root.rglob("cache/linear-*.json"))


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    if not tasks.exists():
        pytest.skip("needs the list of children that Linux keeps")
    return [int(child) for child in tasks.read_text().split()]


def alive(pid: int) -> bool:
    place = Path(f"/proc/{pid}/stat")
    return place.exists() and place.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---- peers


def test_a_peer_gets_the_same_grade_as_ours(workspace: Workspace, tmp_path: Path) -> None:
    """The project's own interpreter stands in for the peers' environment: the way there and back is what is tested."""
    result = run(
        workspace,
        hourly(tmp_path / "one.parquet"),
        models=["plain/last_value", "plain/seasonal_naive", "plain/nothing", "neuralforecast/NHITS:max_steps=1"],
        peers={"python": sys.executable},
    )
    rows = {row["model"]: row for row in result.table.iter_rows(named=True)}
    assert rows["plain/last_value"]["mse"] == pytest.approx(rows["last_value"]["mse"], rel=1e-6)
    assert rows["plain/last_value"]["cells"] == rows["last_value"]["cells"]
    assert rows["plain/last_value"]["mae"] == pytest.approx(rows["last_value"]["mae"], rel=1e-6)
    assert rows["plain/last_value"]["role"] == "peer"
    assert "python" in rows["plain/last_value"]["versions"]
    assert "plain has last_value" in rows["plain/nothing"]["error"]
    missing = rows["neuralforecast/NHITS:max_steps=1"]
    assert missing["status"] == "failed"
    assert "neuralforecast is not installed" in missing["error"]


def test_peers_need_an_interpreter(workspace: Workspace, tmp_path: Path) -> None:
    path = hourly(tmp_path / "one.parquet")
    with pytest.raises(ConfigError, match="--peers PYTHON"):
        run(workspace, path, models=["plain/last_value"])
    with pytest.raises(ConfigError, match="nowhere"):
        run(workspace, path, models=["plain/last_value"], peers={"python": "/nowhere/python"})


def test_a_peer_sees_no_row_of_a_horizon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the peer's folder holds stays the same when every target that no context covers is changed."""
    seen: list[dict[str, Any]] = []

    def spy(folder: Path, host: PeerHost, name: str) -> None:
        context = np.load(folder / "context.npy")
        seen.append({"train": np.load(folder / "train.npy"), "context": context, "files": sorted(os.listdir(folder))})
        np.save(folder / "forecast.npy", np.zeros((context.shape[0], 6, context.shape[2]), dtype=np.float32))
        (folder / "done.json").write_text(json.dumps({"fit_seconds": 0, "eval_seconds": 0, "versions": {}}))

    monkeypatch.setattr("tsforge.app.benchmark_peers._run", spy)
    data = read_benchmark_data(hourly(tmp_path / "one.parquet"))
    setting = Setting(kind="peer", name="plain/last_value", label="x", context_length=24, horizon=6, seed=0)
    host = PeerHost(python="", versions={}, budget_seconds=None, threads=1)
    spec, (first, stop) = WindowSpec(context_length=24, horizon=6), data.splits.test
    windows = WindowDataset(data.panel, spec, first, stop)
    peer_forecasts(data, setting, windows, host)
    assert seen[0]["files"] == ["context.npy", "spec.json", "train.npy"]
    assert len(seen[0]["train"]) == first
    values = np.where(data.panel.observed, data.panel.values, np.nan).astype(np.float32)
    for number, context in enumerate(seen[0]["context"]):
        np.testing.assert_array_equal(context, values[first + number - 24 : first + number])
    data.panel.values[stop - 6 :] += 100.0  # rows that are targets only
    data.panel._resident.clear()
    peer_forecasts(data, setting, WindowDataset(data.panel, spec, first, stop), host)
    for part in ("train", "context"):
        np.testing.assert_array_equal(seen[0][part], seen[1][part])


def test_the_runner_ends_with_its_caller(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(RUNNER.parent)!r}); import runner, time; "
    code += "runner.end_with_the_caller(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 4


@pytest.mark.slow
def test_real_peers_agree_with_the_closed_form(workspace: Workspace, tmp_path: Path) -> None:
    python = os.environ.get(REAL_PEERS)
    if not python:
        pytest.skip(f"{REAL_PEERS} names no interpreter with neuralforecast, statsforecast and Darts")
    models = ["statsforecast/SeasonalNaive", "darts/LinearRegressionModel", "neuralforecast/DLinear:max_steps=5"]
    ours = "linear:ridge=0:remove=none:offset=constant"
    table = hourly(tmp_path / "one.parquet")
    pl.read_parquet(table).with_columns(pl.col("a", "b").fill_nan(0.5)).write_parquet(table)
    result = run(workspace, table, models=[*models, ours], peers={"python": python})
    mse = dict(zip(result.table["model"], result.table["mse"], strict=True))
    assert result.failed == 0, result.table["error"].drop_nulls().to_list()
    assert mse[models[0]] == pytest.approx(mse["seasonal_naive:season_length=24"], rel=1e-6)
    assert mse[models[1]] == pytest.approx(mse[ours], rel=1e-3)


# ---- entries that are no registered model


def test_an_entry_of_fitters_is_graded_and_sees_nothing_of_the_test(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def fit(panel: Any, splits: Any, spec: Any, options: dict[str, Any], **_: Any) -> Any:
        rows.append(panel.num_rows)
        assert options == {"minutes": 1}
        horizon = spec.horizon

        def predict(batch: Any) -> Any:
            assert batch.target is None
            seen = batch.context_mask
            last = torch.where(seen, torch.arange(seen.shape[1]).view(1, -1, 1), -1).amax(1, keepdim=True)
            return SimpleNamespace(mean=batch.context.gather(1, last).expand(-1, horizon, -1))

        return SimpleNamespace(predict=predict)

    module = SimpleNamespace(fit=fit)
    monkeypatch.setitem(sys.modules, "pretend_auto", module)  # type: ignore[arg-type]
    monkeypatch.setitem(benchmark_run.FITTERS, "pretend", "pretend_auto:fit")
    result = run(workspace, hourly(tmp_path / "one.parquet"), models=["pretend:minutes=1"], baselines="naive")
    mse = dict(zip(result.table["model"], result.table["mse"], strict=True))
    assert mse["pretend:minutes=1"] == pytest.approx(mse["last_value"], rel=1e-6)
    assert rows == [480 - int(0.2 * 480)]
