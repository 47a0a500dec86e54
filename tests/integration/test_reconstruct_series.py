"""``tsforge reconstruct`` with features: one map for several series, each judged by its own rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from tsforge.app import reconstruct as use_case
from tsforge.app.catalog_dynamics import cycle_table, load_reconstruction, load_seed
from tsforge.app.reconstruct import ReconstructConfig, reconstruct
from tsforge.app.reconstruct_data import read_trajectories
from tsforge.cli import main
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace
from tsforge.dynamics.evaluation import METRICS, free_comparison
from tsforge.dynamics.module import train_seeds

SPEEDS = {"left": 0.2, "right": 0.35, "middle": 0.27}
TRAIN = {"epochs": 4, "batches_per_epoch": 10, "batch_size": 4, "sequence_length": 20, "accelerator": "cpu"}
EVALUATION = {
    "capture_runs": 5,
    "capture_steps": 500,
    "capture_tangent_steps": 100,
    "lyapunov_steps": 200,
    "lyapunov_transient": 20,
}


def waves(rows: int, shift: float = 0.0, names: tuple[str, ...] = tuple(SPEEDS)) -> pl.DataFrame:
    tables = []
    for index, name in enumerate(names):
        phase = np.arange(rows) * SPEEDS[name] + shift
        noise = np.random.default_rng(index).normal(size=(2, rows)) * 0.01
        values = {"x": 3 + np.sin(phase) + noise[0], "y": np.cos(phase) + noise[1]}
        tables.append(pl.DataFrame({"step": np.arange(rows), "run": [name] * rows, **values}))
    return pl.concat(tables)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "waves.parquet"
    waves(300).write_parquet(place)
    return place


def config(source: Path, data: dict[str, Any] | None = None, **changes: Any) -> ReconstructConfig:
    plain = {
        "data": {"path": str(source), "series": "run", **({"split": 0.7} if data is None else data)},
        "model": {"hidden": 8, "features": 3},
        "train": TRAIN,
        "evaluation": EVALUATION,
        "seeds": [0, 1],
        "tracking": {"enabled": False},
    }
    return validate(ReconstructConfig, plain | changes)


def test_every_series_is_judged_by_its_own_map_and_rows(source: Path, workspace_root: Path) -> None:
    workspace = Workspace.open(workspace_root)
    settings = config(source)
    result = reconstruct(settings, workspace)
    document = json.loads((result.path / "result.json").read_text())
    assert list(document["series"]) == list(SPEEDS)
    data = read_trajectories(settings.data, by_series=True)
    network = train_seeds(data.train, settings, [0, 1], series=data.train_series).network
    loc, scale = (np.array(document["observation"][name]) for name in ("loc", "scale"))
    table = waves(300)
    for index, row in enumerate(document["seeds"]):
        assert list(row["series"]) == list(SPEEDS)
        for metric in ("d_stsp", "pe", "lambda_1", "captured"):
            values = [row["series"][name][metric] for name in SPEEDS]
            assert row[metric] == pytest.approx(np.median(values))
        drawn = pl.read_parquet(result.path / "seeds" / str(index) / "series_trajectory.parquet")
        for name in SPEEDS:
            own = table.filter(pl.col("run") == name).tail(90).select("x", "y").to_numpy()
            shown = drawn.filter(series=name, kind="data").select("x", "y").to_numpy()
            np.testing.assert_allclose(shown, own, rtol=1e-9)
            run = free_comparison(network.group(index, name), (own - loc) / scale) * scale + loc
            shown = drawn.filter(series=name, kind="free_run").select("x", "y").to_numpy()
            np.testing.assert_allclose(shown, run, rtol=1e-6)
        weights = load_file(result.path / "seeds" / str(index) / "weights.safetensors")
        assert weights["map.vectors"].shape == (3, 3)
        assert row["parameters"] == sum(part.numel() for part in weights.values())
        features = pl.read_parquet(result.path / "features.parquet").filter(seed=index)
        assert torch.equal(weights["map.vectors"].flatten(), torch.tensor(features["value"].to_list()))
        assert features["series"].to_list() == [name for name in SPEEDS for _ in range(3)]
        assert features["feature"].to_list() == [1, 2, 3] * 3
    for name in SPEEDS:
        of_seeds = [row["series"][name]["pe"] for row in document["seeds"]]
        assert document["series"][name]["pe"] == pytest.approx(np.median(of_seeds))
    assert result.table.columns == ["seed", "series", "metric", "value"]
    assert result.table.height == 2 * 3 * len(METRICS)
    assert result.summary()["series"] == 3
    assert any("medians over 3 series" in note and "'left'" in note for note in result.summary()["notes"])
    report = load_reconstruction(workspace, result.path.name)  # what the page reads
    first = load_seed(workspace, result.path.name, 1).trajectory
    assert first.equals(drawn.filter(series="left").drop("series"))
    assert cycle_table(report, 0).columns[-2:] == ["x", "y"]


def test_a_failed_series_fails_its_seed_and_is_named(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsforge.app import reconstruct_record

    original, judged = reconstruct_record.evaluate, [0]

    def broken(model: Any, test: Any, *args: Any, **options: Any) -> Any:
        judged[0] += 1
        if judged[0] != 2:
            return original(model, test, *args, **options)
        with torch.no_grad():
            model._parts.map.raw_A.fill_(float("nan"))
        return original(model, test, *args, **options)

    monkeypatch.setattr(reconstruct_record, "evaluate", broken)
    result = reconstruct(config(source, seeds=[0]), Workspace.open(workspace_root))
    (row,) = result.seeds
    assert row["failed"] == "series right: parameters"
    assert row["series"]["right"]["pe"] is None
    assert row["pe"] == pytest.approx((row["series"]["left"]["pe"] + row["series"]["middle"]["pe"]) / 2)
    assert not row["healthy"]
    assert result.facts["failed_share"] == 1.0


def test_an_interrupted_run_goes_on_and_the_tables_hold_all_seeds(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.open(workspace_root)
    trained: list[int] = []

    def interrupted(trajectories: Any, settings: Any, seeds: list[int], **options: Any) -> Any:
        if seeds == [1] and trained == [0]:
            raise KeyboardInterrupt
        trained.extend(seeds)
        return train_seeds(trajectories, settings, seeds, **options)

    monkeypatch.setattr(use_case, "train_seeds", interrupted)
    settings = config(source, seeds_at_once=1)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(settings, workspace)
    (folder,) = (workspace.reports / "reconstruct").iterdir()
    assert pl.read_parquet(folder / "features.parquet")["seed"].unique().to_list() == [0]
    trained.append(-1)
    result = reconstruct(settings, workspace)
    assert trained == [0, -1, 1]
    assert pl.read_parquet(folder / "features.parquet")["seed"].unique().sort().to_list() == [0, 1]
    trained.clear()
    assert reconstruct(settings, workspace).facts == result.facts
    other = reconstruct(config(source, model={"hidden": 8, "features": 2}, seeds=[0]), workspace)
    single = reconstruct(config(source, model={"hidden": 8}, seeds=[0]), workspace)
    assert len({other.path, single.path, result.path}) == 3
    assert not (single.path / "features.parquet").exists()
    assert "series" not in single.seeds[0]


def test_a_test_file_brings_rows_of_the_same_series_in_any_order(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "later.parquet"
    waves(80, 1.0, ("middle", "left", "right")).write_parquet(other)
    data = read_trajectories(config(source, {"test": str(other)}).data, by_series=True)
    assert list(data.tests) == list(SPEEDS)
    assert data.train_series == tuple(SPEEDS)
    for name, rows in data.tests.items():
        own = pl.read_parquet(other).filter(run=name).select("x", "y").to_numpy()
        np.testing.assert_allclose(rows * data.scale + data.loc, own)
    sample = read_trajectories(config(source, {"in_sample": True}).data, by_series=True)
    assert all(np.array_equal(part, rows) for part, rows in zip(sample.train, sample.tests.values(), strict=True))
    swapped = pl.read_parquet(source).with_columns(pl.col("run").replace({"left": "right", "right": "left"}))
    swapped.write_parquet(tmp_path / "swapped.parquet")
    renamed = read_trajectories(config(tmp_path / "swapped.parquet", {"in_sample": True}).data, by_series=True)
    assert renamed.fingerprint != sample.fingerprint


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (("left", "right"), "later.parquet lacks 1 series .*middle"),
        ((*SPEEDS, "new"), "waves.parquet lacks 1 series .*new"),
    ],
)
def test_series_of_one_file_only_are_refused(
    names: tuple[str, ...], fragment: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEEDS, "new", 0.5)
    other = tmp_path / "later.parquet"
    waves(80, 1.0, names).write_parquet(other)
    with pytest.raises(DataError, match=fragment):
        read_trajectories(config(source, {"test": str(other)}).data, by_series=True)


def test_series_that_cannot_be_told_or_judged_are_refused(source: Path, tmp_path: Path) -> None:
    settings = config(source).data
    table = pl.read_parquet(source)
    table.filter(run="left").write_parquet(source)
    with pytest.raises(DataError, match="one series only"):
        read_trajectories(settings, by_series=True)
    table.with_columns(run=pl.when(pl.col("step") < 5).then(None).otherwise("run")).write_parquet(source)
    with pytest.raises(DataError, match="15 row.s. have no name"):
        read_trajectories(settings, by_series=True)
    table.filter((pl.col("run") != "right") | (pl.col("step") < 40)).write_parquet(source)
    with pytest.raises(DataError, match="test series of 'right' has 12 rows"):
        read_trajectories(settings, by_series=True)
    table.with_columns(x=pl.when(run="right", step=210).then(None).otherwise("x")).write_parquet(source)
    data = read_trajectories(settings, by_series=True)
    assert {name: len(rows) for name, rows in data.tests.items()} == {"left": 90, "right": 89, "middle": 90}
    assert (
        "the test series of 'right' begins at its first complete row: 1 of 90 rows before it are left out" in data.notes
    )


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["model.features=2"], 2, "data.series"),
        (["model.features=2", "data.series=run", "model.bounded=true"], 2, "model.bounded"),
        (["model.features=2", "data.series=run", "data.split=0.1", "train.sequence_length=40"], 3, "hold"),
    ],
)
def test_a_mistake_with_features_is_one_line(
    arguments: list[str],
    code: int,
    fragment: str,
    source: Path,
    workspace_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["reconstruct", "reconstruct", f"data.path={source}", "model.hidden=4", *arguments]
    monkeypatch.setattr(sys, "argv", ["tsforge", *words, "tracking.enabled=false"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capfd.readouterr()
    assert fragment in captured.err
    assert "Traceback" not in captured.err
    assert stop.value.code == code
