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
import yaml
from safetensors.torch import load_file

from tsforge.app import reconstruct as use_case
from tsforge.app.catalog_dynamics import cycle_table, load_reconstruction, seed_rank
from tsforge.app.reconstruct import ReconstructConfig, best_seed, reconstruct
from tsforge.app.reconstruct_data import read_trajectories
from tsforge.cli import main
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace
from tsforge.dynamics import evaluation
from tsforge.dynamics.config import TrajectoryConfig
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


def test_a_command_whose_seeds_all_failed_says_so_by_its_status(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [f"train.{name}={value}" for name, value in TRAIN.items()]
    settings += [f"evaluation.{name}={value}" for name, value in EVALUATION.items()]
    arguments = ["reconstruct", "reconstruct", f"data.path={source}", *settings, "seeds=2", "tracking.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["tsforge", *arguments, "--json"])

    def status() -> object:
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    assert status() == 0
    folder = Path(json.loads(capfd.readouterr().out)["path"])
    for seed, expected in ((0, 0), (1, 4)):  # one seed of two that failed is a result
        place = folder / "seeds" / str(seed) / "result.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"failed": "the free run diverged"}))
        assert status() == expected


def test_a_metric_that_fails_keeps_the_seed_and_is_told(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **options: Any) -> float:
        raise DataError("too rough")

    monkeypatch.setattr(evaluation, "d_h", broken)
    result = reconstruct(config(source, seeds=[0]), Workspace.open(workspace_root))
    (row,) = json.loads((result.path / "result.json").read_text())["seeds"]
    assert (row["d_h"], row["unjudged"], row["failed"]) == (None, {"d_h": "too rough"}, "")
    assert row["d_stsp"] is not None
    assert (result.path / "seeds" / "0" / "weights.safetensors").is_file()
    assert row["spread"].keys() == {"x", "y"}
    assert not result.failed


def test_times_and_forcing_are_told(source: Path, workspace_root: Path) -> None:
    table = pl.read_parquet(source)
    table.select(Time=pl.col("step") * 0.1, x="x", y="y").write_parquet(source)
    workspace = Workspace.open(workspace_root)
    result = reconstruct(config(source, seeds=[0], forcing={"method": "sparse"}), workspace)
    assert any("rows are 0.1 apart" in note and "dt=0.1" in note for note in result.facts["notes"])
    assert any("fewer than 400 rows" in note for note in result.facts["notes"])
    assert 1 <= result.seeds[0]["tau"] < 20
    told = reconstruct(config(source, seeds=[0], dt=0.1), workspace)
    assert not any("apart" in note for note in told.facts["notes"])
    assert "tau" not in told.seeds[0]
    wrong = reconstruct(config(source, seeds=[0], dt=0.5), workspace)
    assert any("dt=0.5, but rows are 0.1 apart" in note for note in wrong.facts["notes"])


def test_missing_test_values_are_told_of_the_spectral_distance(source: Path, workspace_root: Path) -> None:
    table = pl.read_parquet(source).with_columns(x=pl.when(pl.col("step") == 440).then(None).otherwise("x"))
    table.write_parquet(source)
    result = reconstruct(config(source, seeds=[0]), Workspace.open(workspace_root))
    assert result.seeds[0]["d_h"] is not None
    assert "longest stretch of test rows without missing values (wave: 159 of 180)" in result.facts["notes"][-1]
    table.with_columns(x=pl.when(pl.col("step") % 9 == 0).then(None).otherwise("x")).write_parquet(source)
    result = reconstruct(config(source, seeds=[0]), Workspace.open(workspace_root))
    assert result.seeds[0]["d_h"] is None
    told = "no D_H of wave: missing values leave no stretch of test rows that is long enough"
    assert result.facts["notes"][-1] == told


def test_refresh_and_unreadable_seeds_train_again_and_nothing_else(
    source: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.open(workspace_root)
    trained: list[int] = []

    def noted(trajectories: Any, settings: Any, seeds: list[int], **options: Any) -> Any:
        trained.extend(seeds)
        return train_seeds(trajectories, settings, seeds, **options)

    monkeypatch.setattr(use_case, "train_seeds", noted)
    folder = reconstruct(config(source), workspace).path
    (folder / "seeds" / "1" / "result.json").write_text("{")
    reconstruct(config(source, seeds=[0, 1, 2]), workspace)
    assert trained == [0, 1, 1, 2]
    reconstruct(config(source, refresh=True), workspace)
    assert trained == [0, 1, 1, 2, 0, 1]


def test_a_result_holds_every_seed_that_is_stored(source: Path, workspace_root: Path) -> None:
    workspace = Workspace.open(workspace_root)
    reconstruct(config(source), workspace)
    further = reconstruct(config(source, seeds=[3]), workspace)
    assert [row["seed"] for row in further.seeds] == [0, 1, 3]
    assert "stored before and counted too: seeds 0, 1" in further.facts["notes"]
    document = json.loads((further.path / "result.json").read_text())
    assert [row["seed"] for row in document["seeds"]] == [0, 1, 3]
    assert pl.read_parquet(further.path / "metrics.parquet")["seed"].unique().sort().to_list() == [0, 1, 3]
    stored = yaml.safe_load((further.path / "config.yaml").read_text())
    assert stored["seeds"] == [0, 1, 3]


def test_other_data_never_meet_a_stored_result(source: Path, tmp_path: Path) -> None:
    """Same numbers cut elsewhere, under other names or in other units."""

    def key(table: pl.DataFrame, **data: Any) -> str:
        place = tmp_path / "changed.parquet"
        table.write_parquet(place)
        plain = {"path": str(place), "split": 0.7, "standardise": False}
        return read_trajectories(validate(TrajectoryConfig, plain | data)).fingerprint

    table = pl.read_parquet(source).drop("step")
    cut = table.with_columns(name=pl.Series(["p"] * 300 + ["q"] * 300))
    keys = [
        key(table),
        key(table, split=0.5),
        key(table.rename({"x": "temperature"})),
        key(table, standardise=True),
        key(table * 1024.0, standardise=True),  # the same once standardised
        key(cut, columns=["x", "y"], in_sample=True, split=None),
        key(cut, columns=["x", "y"], in_sample=True, split=None, series="name"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(table) == keys[0]


def test_a_csv_file_may_hold_dates(source: Path, tmp_path: Path) -> None:
    table = pl.read_parquet(source)
    minutes = pl.datetime(2024, 1, 1) + pl.duration(minutes=pl.col("step"))
    place = tmp_path / "dated.csv"
    table.select(time=minutes, x="x", y="y").write_csv(place)
    found = read_trajectories(validate(TrajectoryConfig, {"path": str(place), "split": 0.7}))
    assert found.columns == ("x", "y")
    assert len(found.train) == 1


def test_a_second_column_of_times_is_told(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "two.parquet"
    pl.read_parquet(source).with_columns(time=pl.col("step") * 0.1).write_parquet(place)
    found = read_trajectories(validate(TrajectoryConfig, {"path": str(place), "split": 0.7}))
    assert found.columns == ("x", "y", "time")
    assert "the column(s) time are taken as variates, since 'step' holds the times" in found.notes[0]
    named = {"path": str(place), "split": 0.7, "columns": ["x", "y"]}
    assert read_trajectories(validate(TrajectoryConfig, named)).notes == ()


def test_rows_sorted_by_time_instead_of_series_are_refused(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "mixed.parquet"
    table = pl.read_parquet(source).drop("step")
    table.with_columns(name=pl.Series(["p", "q", "r"] * 200)).write_parquet(place)
    data = {"path": str(place), "split": 0.7, "series": "name"}
    told = "3 series lie in 600 pieces, half of at most 1 rows.*sort the file by 'name'"
    with pytest.raises(DataError, match=told):
        read_trajectories(validate(TrajectoryConfig, data))
    last = pl.Series(["p", "q", "r"] * 180 + ["r"] * 60)  # the longest series ends alone
    table.with_columns(name=last).write_parquet(place)
    with pytest.raises(DataError, match="sort the file by 'name'"):
        read_trajectories(validate(TrajectoryConfig, data))


def test_what_is_stored_of_each_seed_is_its_own_and_in_its_units(source: Path, workspace_root: Path) -> None:
    workspace = Workspace.open(workspace_root)
    slow, fast = (reconstruct(config(source, dt=dt), workspace) for dt in (1.0, 0.5))
    weights = [load_file(slow.path / "seeds" / str(seed) / "weights.safetensors") for seed in (0, 1)]
    assert not torch.equal(weights[0]["map.W1"], weights[1]["map.W1"])
    for one, other in zip(slow.seeds, fast.seeds, strict=True):
        assert one["lambda_1"] == pytest.approx(other["lambda_1"] * 0.5)  # exponents are per unit of dt
        spectra = pl.read_parquet(fast.path / "seeds" / str(one["seed"]) / "spectra.parquet")
        x = spectra.filter(pl.col("variate") == "x")
        assert x["data"].sum() == pytest.approx(1.0)
        assert x["frequency"][x["data"].arg_max()] == pytest.approx(0.3 / (2 * np.pi) / 0.5, abs=0.02)
    measured = {row["healthy"] for row in slow.seeds}
    assert slow.facts["healthy_share"] == sum(bool(row["healthy"]) for row in slow.seeds) / 2
    assert measured <= {True, False}
    drawn = pl.read_parquet(slow.path / "seeds" / "1" / "trajectory.parquet").filter(pl.col("kind") == "free_run")
    columns = json.loads((slow.path / "result.json").read_text())["observation"]
    data = read_trajectories(config(source).data)
    model = train_seeds(data.train, config(source), [0, 1]).network.group(1)
    expected = free_comparison(model, data.test) * columns["scale"] + columns["loc"]
    np.testing.assert_allclose(drawn.select("x", "y").to_numpy(), expected, rtol=1e-9)


def test_fixed_points_are_stored_as_the_read_out_shows_them(source: Path, workspace_root: Path) -> None:
    settings = config(source, model={"hidden": 8, "latent": 3, "observation": "affine", "bias": True}, seeds=[0])
    result = reconstruct(settings, Workspace.open(workspace_root))
    document = json.loads((result.path / "result.json").read_text())
    (row,) = document["seeds"]
    loc, scale = (np.array(document["observation"][name]) for name in ("loc", "scale"))
    parts = load_file(result.path / "seeds" / "0" / "weights.safetensors")
    B, b = parts["observation.B"].double().numpy(), parts["observation.b"].double().numpy()
    assert row["findings"]["cycles"]
    for cycle in row["findings"]["cycles"]:
        expected = (np.array(cycle["points"]) @ B.T + b) * scale + loc
        np.testing.assert_allclose(cycle["observed"], expected)
    report = load_reconstruction(Workspace.open(workspace_root), result.path.name)
    table = cycle_table(report, 0)
    first = row["findings"]["cycles"][0]["observed"][0]
    np.testing.assert_allclose(table.select("x", "y").row(0), first)


def test_validation_keeps_an_epoch_and_decides_which_seed_is_best(
    source: Path, tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []
    original = evaluation.examine

    def examine(params: Any, states: torch.Tensor, **options: Any) -> Any:
        judged.append(len(states))
        return original(params, states, **options)

    monkeypatch.setattr(evaluation, "examine", examine)
    plain = {
        "data": {"path": str(source), "split": 0.7, "valid": 0.25, "gap": 5},
        "train": TRAIN | {"validate_every": 2},
        "tracking": {},
    }
    result = reconstruct(config(source, **plain), tracked_workspace)
    assert judged == [100, 100]  # of 420 rows that do not test, a quarter less the gap
    assert result.facts["valid_steps"] == 100
    table = pl.read_parquet(result.path / "seeds" / "1" / "validation.parquet")
    assert table["epoch"].to_list() == [2, 4]
    least = table.sort("score").row(0, named=True)
    record = json.loads((result.path / "seeds" / "1" / "result.json").read_text())
    assert record["validation"] == {"epoch": least["epoch"], "score": least["score"]}
    assert [row["kept_epoch"] for row in result.rows()] == [row["validation"]["epoch"] for row in result.seeds]
    trace = pl.read_parquet(result.path / "seeds" / "1" / "trace.parquet")
    assert trace.columns == ["epoch", "loss", "alpha", "kappa", "gradient_norm", "max_abs_A", "failed_steps"]
    assert not any(trace.null_count().row(0))
    from tsforge.tracking.runs import Tracker

    (run,) = Tracker.open(tracked_workspace).runs()
    curves = {"loss", "alpha", "kappa", "gradient_norm", "max_abs_A", "validation_score", "validation_d_stsp"}
    assert {f"seed_1.{name}" for name in curves} <= run["metrics"].keys()
    assert run["metrics"]["seed_1.validation_score"] == pytest.approx(table["score"][-1])


def test_seeds_with_a_validation_score_are_ranked_without_the_test_series() -> None:
    """By health and lost free runs (from the validation rows), then by the score; never by what the test run did."""
    fine: dict[str, Any] = {"healthy": True, "captured": 0.0, "failed": "", "d_stsp": 0.1}
    first = {**fine, "seed": 0, "validation": {"epoch": 4, "score": 0.3}, "d_stsp": 9.0}
    second = {**fine, "seed": 1, "validation": {"epoch": 2, "score": 0.5}}
    lost = {**fine, "seed": 2, "validation": {"epoch": 2, "score": 0.1}, "captured": 0.4}
    ill = {**fine, "seed": 3, "validation": {"epoch": 2, "score": 0.1}, "healthy": False}
    failed = {**fine, "seed": 4, "validation": {"epoch": None, "score": None}}
    order = sorted([failed, ill, lost, second, first], key=seed_rank)
    assert [row["seed"] for row in order] == [0, 1, 2, 3, 4]
    assert best_seed([second, {**first, "failed": "the free run diverged", "d_stsp": None}]) == 0
    assert best_seed([failed]) is None
    plain = [{**row, "validation": None} for row in (first, second)]
    assert best_seed(plain) == 1


def test_settings_that_came_later_leave_stored_keys_alone(source: Path) -> None:
    """A default of a later setting is not in the key, another value is."""
    plain = use_case._decisive(config(source))
    assert not {"lambda_self", "self_limit", "validate_every"} & set(plain["train"])
    assert "near_zero" not in plain["evaluation"]
    changed = config(source, evaluation=EVALUATION | {"near_zero": 1e-4})
    assert use_case._decisive(changed)["evaluation"]["near_zero"] == 1e-4
    assert "features" not in plain["model"]
    data = {"path": str(source), "valid": 0.2}
    validated = use_case._decisive(config(source, data=data, train=TRAIN | {"validate_every": 3}))
    assert validated["train"]["validate_every"] == 3


def test_the_noise_of_the_windows_is_automatic_said_and_stored(source: Path, workspace_root: Path) -> None:
    workspace = Workspace.open(workspace_root)
    result = reconstruct(config(source, seeds=[0]), workspace)
    noise = json.loads((result.path / "result.json").read_text())["training_noise"]
    assert noise["automatic"] is True
    spread = pl.read_parquet(source).head(420).std().row(0, named=True)
    for name in ("x", "y"):  # 1 % noise is in the data
        assert noise["measured"][name] == pytest.approx(0.01 / spread[name], rel=0.15)
        assert noise["added"][name] == pytest.approx((0.05**2 - noise["measured"][name] ** 2) ** 0.5, rel=0.01)
    assert result.summary()["training_noise"] == max(noise["added"].values())
    off = reconstruct(config(source, seeds=[0], train=TRAIN | {"noise": 0}), workspace)
    assert off.path != result.path
    assert off.summary()["training_noise"] == 0.0
    assert off.seeds[0]["pe"] != result.seeds[0]["pe"]


def test_a_driven_system_is_trained_judged_and_said_to_be_driven(source: Path, workspace_root: Path) -> None:
    pl.read_parquet(source).with_columns(u=(pl.col("step") * 0.05).sin()).write_parquet(source)
    data = {"path": str(source), "split": 0.7, "inputs": ["u"]}
    result = reconstruct(config(source, data=data, seeds=[0]), Workspace.open(workspace_root))
    document = json.loads((result.path / "result.json").read_text())
    assert document["columns"] == ["x", "y"]
    assert [item["name"] for item in document["inputs"]] == ["u"]
    assert "recorded inputs" in document["definition"]["free_run"]
    assert "mean inputs" in document["definition"]["fixed_points"]
    (row,) = document["seeds"]
    assert (row["healthy"], row["captured"], row["lyapunov_steps"]) == (None, None, 180 - 20 - 18)
    assert row["d_stsp"] is not None
    assert result.facts["healthy_share"] is None
    weights = load_file(result.path / "seeds" / "0" / "weights.safetensors")
    assert weights["map.C"].shape == (2, 1)
    plain = reconstruct(config(source, seeds=[0], data=data | {"inputs": []}), Workspace.open(workspace_root))
    assert plain.path != result.path


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
        (["reconstruct", "reconstruct", "data.path=SOURCE", "name=../../escaped"], 2, "name: String should match"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "model.latent=1"], 2, "latent >= 2"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "data.valid=0.2"], 2, "belong together"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "data.inputs=[speed]"], 2, "no column 'speed'"),
        (["reconstruct", "reconstruct", "data.path=SOURCE", "data.columns=[y,y]"], 2, "twice: ['y']"),
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
