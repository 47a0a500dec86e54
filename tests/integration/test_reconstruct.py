"""``tsforge reconstruct`` from a file to stored, tracked results, and back after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app import reconstruct as use_case
from tsforge.app.reconstruct import ReconstructConfig, reconstruct
from tsforge.cli import main
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace
from tsforge.dynamics.evaluation import free_comparison
from tsforge.dynamics.module import train_seeds

TRAIN = {"epochs": 4, "batches_per_epoch": 10, "batch_size": 4, "sequence_length": 20, "accelerator": "cpu"}
EVALUATION = {
    "capture_runs": 5,
    "capture_steps": 500,
    "capture_tangent_steps": 100,
    "lyapunov_steps": 200,
    "lyapunov_transient": 20,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = np.arange(600)
    place = tmp_path / "wave.parquet"
    noise = np.random.default_rng(0).normal(size=(2, 600)) * 0.01
    columns = {"step": rows, "x": 3 + np.sin(rows * 0.3) + noise[0], "y": np.cos(rows * 0.3) + noise[1]}
    pl.DataFrame(columns).write_parquet(place)
    return place


def config(source: Path, **changes: Any) -> ReconstructConfig:
    plain = {
        "data": {"path": str(source), "split": 0.7},
        "model": {"hidden": 8},
        "train": TRAIN,
        "evaluation": EVALUATION,
        "seeds": [0, 1],
        "seeds_at_once": 2,
        "tracking": {"enabled": False},
    }
    return validate(ReconstructConfig, plain | changes)


def test_the_command_stores_tracks_and_prints(
    source: Path, tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [f"train.{name}={value}" for name, value in TRAIN.items()]
    settings += [f"evaluation.{name}={value}" for name, value in EVALUATION.items()]
    arguments = ["reconstruct", "reconstruct", f"data.path={source}", "model.hidden=8", "seeds=2", *settings, "--json"]
    monkeypatch.setattr(sys, "argv", ["tsforge", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert [row["seed"] for row in printed["rows"]] == [0, 1]
    folder = Path(printed["path"])
    assert json.loads((folder / "result.json").read_text())["summary"]["seeds"] == 2
    assert pl.read_parquet(folder / "metrics.parquet").height == 2 * 7
    drawn = pl.read_parquet(folder / "seeds" / "0" / "trajectory.parquet")
    data = drawn.filter(pl.col("kind") == "data")
    original = pl.read_parquet(source).tail(data.height)
    np.testing.assert_allclose(data["x"], original["x"], rtol=1e-9)
    from tsforge.tracking.runs import Tracker

    (run,) = Tracker.open(tracked_workspace).runs()
    assert run["status"] == "FINISHED"
    assert {"pe", "failed_share"} <= run["metrics"].keys()
    assert run["parameters"]["model.hidden"] == "8"


def test_an_interrupted_run_keeps_what_is_complete_and_goes_on(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.open(workspace_root)
    trained: list[int] = []

    def interrupted(trajectories: Any, settings: Any, seeds: list[int], **options: Any) -> Any:
        if 1 in seeds and len(trained) == 1:
            raise KeyboardInterrupt
        trained.extend(seeds)
        return train_seeds(trajectories, settings, seeds, **options)

    monkeypatch.setattr(use_case, "train_seeds", interrupted)
    one_by_one = config(source, seeds_at_once=1)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(one_by_one, workspace)
    (folder,) = (workspace.reports / "reconstruct").iterdir()
    assert [path.name for path in (folder / "seeds").iterdir()] == ["0"]
    trained.append(-1)
    result = reconstruct(one_by_one, workspace)
    assert trained == [0, -1, 1]
    assert [row["seed"] for row in result.seeds] == [0, 1]
    trained.clear()
    assert reconstruct(config(source), workspace).facts == result.facts  # how many at once changes nothing
    assert trained == []
    reconstruct(config(source, dt=0.5), workspace)
    assert trained == [0, 1]


def test_checklist_8_15_a_free_run_reads_the_first_sample_only(source: Path) -> None:
    settings = config(source)
    series = np.random.default_rng(1).normal(size=(200, 2))
    model = train_seeds([series], settings, [0]).network.group(0)
    other = series.copy()
    other[1:] = 1e6
    np.testing.assert_array_equal(free_comparison(model, series), free_comparison(model, other))
    other[0] += 1
    assert not np.array_equal(free_comparison(model, series), free_comparison(model, other))
    start = model.initial(torch.from_numpy(series[:1]))
    np.testing.assert_allclose(free_comparison(model, series)[-1], model.observe(model.run(start, 250)[-1, 0]))


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["reconstruct", "nowhere"], 2, "no config"),
        (["reconstruct", "reconstruct", "data.path=/nowhere.parquet"], 3, "does not exist"),
        (["reconstruct", "reconstruct", "data.path=a.parquet", "model.hiden=3"], 2, "did you mean 'hidden'"),
        (["reconstruct", "reconstruct", "data.path=a.parquet", "train.epochs=0"], 2, "train.epochs"),
        (["reconstruct", "reconstruct", "data.path=a.parquet", "data.test=b", "data.in_sample=true"], 2, "exclude"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "model.latent=1"], 2, "latent >= 2"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "train.sequence_length=5000"], 3, "sequence_length"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    code: int,
    fragment: str,
    source: Path,
    workspace_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [word.replace("SOURCE", str(source)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["tsforge", *words, "tracking.enabled=false"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capfd.readouterr()
    assert fragment in captured.err
    assert "Traceback" not in captured.err
    assert stop.value.code == code
