"""Backtest and predict as use-cases on a stored data set."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.backtest import BacktestJobConfig, _FoldData, _FoldTask, backtest
from tsforge.app.catalog_results import list_backtests, load_backtest
from tsforge.app.detect import DetectJobConfig
from tsforge.app.fit import FitConfig
from tsforge.app.forecast import PredictConfig, find_artifact, predict
from tsforge.app.ingest import load_history
from tsforge.app.worker_pool import WorkerPool
from tsforge.core.config import compose, load, validate
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, DataError, ModelError
from tsforge.core.workspace import Workspace
from tsforge.forecasting.report import load_report


def job(site: Any, **changes: Any) -> BacktestJobConfig:
    settings = {
        "data": site.data(),
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 12},
        "backtest": {"num_cutoffs": 6, "refit_every": 3},
        "calibration": {"quantile_levels": [0.1, 0.5, 0.9]},
    }
    return validate(BacktestJobConfig, settings | changes)


def test_a_backtest_is_graded_stored_and_listed(site: Any) -> None:
    workspace = Workspace.open()
    assert list_backtests(workspace) == []
    report = backtest(job(site, compare=["dlinear"], train={"max_epochs": 1}), workspace)
    assert set(report.leaderboard["model"]) == {"linear", "dlinear", "last_value", "seasonal_naive", "drift"}
    assert report.folds.filter(model="linear").height == 2
    best = report.summary()
    assert best["best"] == "linear"  # the made-up data is waves plus noise
    row = report.leaderboard.filter(model="linear").row(0, named=True)
    assert row["skill_mae"] > 0.2
    assert row["skill_crps"] > 0.2
    assert 0.6 < row["coverage_80"] <= 1.0
    assert {tuple(found) for found in report.settings["quantile_levels"].values()} == {(0.1, 0.5, 0.9)}
    assert tuple(report.rows()[0])[:2] == ("model", "mean_rank")
    (listed,) = list_backtests(workspace)
    assert (listed["dataset"], listed["model"]) == ("plant", "linear")
    assert load_backtest(workspace, listed["id"]).summary.equals(report.leaderboard)
    back = load_report(workspace.reports / "backtests" / listed["id"])
    assert back.forecasts.equals(report.forecasts)
    assert back.by("step").filter(model="linear")["step"].to_list() == list(range(1, 13))
    assert back.by("series")["series_id"].unique().sort().to_list() == ["a", "b"]
    json.dumps(report.rows(), default=str)
    with pytest.raises(DataError, match="no scope 'moon'"):
        back.by("moon")


def test_folds_side_by_side_give_the_report_of_folds_in_turn(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A network that is trained, a seasonal naive whose season is found at the first cutoff, calibration, regimes."""
    settings = {
        "model": {"name": "gru", "d_model": 4},
        "compare": ["seasonal_naive"],
        "train": {"max_epochs": 2, "max_steps_per_epoch": 3, "accelerator": "cpu"},
        "backtest": {"num_cutoffs": 6, "refit_every": 2, "regimes": ["volatility", "hour"]},
    }
    alone = backtest(job(site, **settings), Workspace.open())
    told = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tsforge"):
        report = backtest(job(site, **settings, workers=2), Workspace.open(), progress=True)
    for name in ("forecasts", "metrics", "tests", "regimes", "regime_labels"):
        assert getattr(report, name).equals(getattr(alone, name)), name
    assert report.folds.drop("fit_seconds", "predict_seconds", "artifact_id").equals(
        alone.folds.drop("fit_seconds", "predict_seconds", "artifact_id")
    )
    assert {record.getMessage() for record in caplog.records if record.levelname == "WARNING"} == told
    assert len([record for record in caplog.records if record.getMessage().startswith("fold 3 of 3")]) == 5


def test_workers_without_a_second_fit_are_refused_and_an_error_in_one_is_the_error_of_the_job(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="workers=2 has no effect with a single fit for 10 cutoffs"):
        job(site, backtest={}, workers=2)
    task = _FoldTask(config=job(site), number=1, season=24, called={})
    history = load_history(Workspace.open(), "plant", masked=True)
    short = _FoldData(name="plant", fingerprint="short", history=history.until(history.grid.time_at(30)))
    found = task.measure(short, progress=False)
    kind, text = found["error"]
    assert (kind, "6 cutoffs 12 steps apart" in text) == ("DataError", True)
    monkeypatch.setattr(WorkerPool, "results", lambda self, queue: iter([(queue.pop(), {**found, "status": "ok"})]))
    with pytest.raises(DataError, match="6 cutoffs 12 steps apart"):
        backtest(job(site, workers=2), Workspace.open())
    dead = {"status": "failed", "error": "its process died (signal SIGKILL)"}
    monkeypatch.setattr(WorkerPool, "results", lambda self, queue: iter([(queue.pop(), dead)]))
    with pytest.raises(BackendError, match="fold 2 failed: its process died"):
        backtest(job(site, workers=2), Workspace.open())
    assert list_backtests(Workspace.open()) == []


def test_settings_without_effect_are_refused(site: Any) -> None:
    with pytest.raises(ConfigError, match="split has no effect"):
        job(site, split={"train": 0.8, "valid": 0.1, "test": 0.1})
    with pytest.raises(ConfigError, match="linear would be measured twice"):
        job(site, compare=["linear"])
    with pytest.raises(ConfigError, match=r"backtest\.season_length is 9999: .* needs 10011 rows before the first"):
        backtest(job(site, backtest={"season_length": 9999, "num_cutoffs": 2}), Workspace.open())


@pytest.mark.parametrize("declared", [None, 12, 60])
def test_a_seasonal_naive_without_a_season_takes_that_of_the_report(site: Any, declared: int | None) -> None:
    """As main model and to compare with; a season of 60 rows does not fit into the window of 48 and widens it."""
    season = declared or 24
    cutoffs = {"num_cutoffs": 6, "refit_every": 3, "season_length": declared, "regimes": []}
    main = backtest(job(site, backtest=cutoffs, model="seasonal_naive"), Workspace.open())
    beside = backtest(job(site, backtest=cutoffs, compare=["seasonal_naive"]), Workspace.open())
    plain = backtest(job(site, backtest=cutoffs), Workspace.open())
    order = ["series_id", "cutoff", "variate", "step"]
    naive = plain.forecasts.filter(model="seasonal_naive").sort(order)["mean"]
    for found in (main, beside):
        assert found.settings["season_length"] == season
        reference = found.settings["reference"]
        assert reference == ("seasonal_naive" if season == 60 else "seasonal_naive@baseline"), "of one season, or of 48"
        assert np.allclose(found.forecasts.filter(model=reference).sort(order)["mean"], naive, rtol=1e-5, atol=1e-5)
        rows = found.forecasts.filter(model="seasonal_naive").sort(order)["mean"]
        assert np.isclose(rows, naive, rtol=1e-5, atol=1e-5).mean() > 0.95, "all but where a value is missing"
    skills = [found.leaderboard.filter(model="linear")["skill_mae"].item() for found in (plain, beside)]
    assert skills[0] == pytest.approx(skills[1], rel=1e-5)


def test_a_seasonal_naive_with_a_season_keeps_it_beside_the_reference(site: Any) -> None:
    cutoffs = {"num_cutoffs": 3, "season_length": 12, "regimes": []}
    own = backtest(job(site, backtest=cutoffs, model={"name": "seasonal_naive", "season_length": 24}), Workspace.open())
    plain = backtest(job(site, backtest=cutoffs), Workspace.open())
    assert own.settings["reference"] == "seasonal_naive@baseline"
    assert own.settings["model"] == "seasonal_naive"
    for name, same in (("seasonal_naive@baseline", True), ("seasonal_naive", False)):
        mine, theirs = (
            found.forecasts.filter(model=label)["mean"] for found, label in ((own, name), (plain, "seasonal_naive"))
        )
        assert mine.equals(theirs) is same


@pytest.mark.parametrize("config", ["predict", "detect"])
@pytest.mark.parametrize("choice", ["csv", "plant"])
def test_a_group_that_a_command_has_no_place_for_is_named(config: str, choice: str) -> None:
    with pytest.raises(ConfigError, match=f"config '{config}': there is no choice of 'data' in it"):
        compose(config, [f"data={choice}"])


def test_a_setting_named_like_a_group_is_a_setting(tmp_path: Path) -> None:
    """``model`` of a batch is an artifact; where a file has a mapping there, no choice can take its place."""
    place = tmp_path / "night.yaml"
    place.write_text("name: night\nmodel: plant@champion\n")
    assert compose(str(place), ["model=other@challenger"])["model"] == "other@challenger"
    place.write_text("name: night\nmodel: {name: linear}\n")
    with pytest.raises(ConfigError, match="there is no choice of 'model' in it"):
        compose(str(place), ["model=ar_net"])


@pytest.mark.parametrize("settings", [{"series": []}, {"series": "a"}])
def test_no_series_at_all_and_one_that_is_no_list_are_refused(settings: dict[str, Any]) -> None:
    for kind in (PredictConfig, DetectJobConfig):
        with pytest.raises(ConfigError, match=r"series: (Tuple should have at least 1 item|it is a list; write)"):
            validate(kind, settings)


def test_the_shipped_config_composes() -> None:
    config = load(BacktestJobConfig, "backtest", ["model=linear", "backtest.num_cutoffs=3", "compare=[drift]"])
    assert config.backtest.num_cutoffs == 3
    fit = config.fit_config()
    assert type(fit) is FitConfig
    assert (fit.split.train, fit.split.valid, fit.split.test) == (0.85, 0.15, 0.0)
    assert config.fit_config("drift").model.name == "drift"


def test_new_series_are_graded_on_demand(site: Any) -> None:
    overrides = ["model=linear", "backtest.cold_start.rows=[8]", "backtest.cold_start.groups=2", "data.name=x"]
    assert load(BacktestJobConfig, "backtest", overrides).backtest.cold_start is not None
    assert load(BacktestJobConfig, "backtest", ["backtest.cold_start=true"]).backtest.cold_start is not None
    report = backtest(job(site, backtest={"num_cutoffs": 2, "cold_start": {"rows": 8, "groups": 2}}), Workspace.open())
    assert {"linear", "linear@all", "linear@8", "naive@8"} <= set(report.leaderboard["model"])
    (eight, every) = report.settings["cold_start_rows"]
    assert (eight["rows"], every["rows"]) == ("8", "all")
    assert eight["of_naive"] > 0.0
    assert "coverage_80" in eight
    assert report.path is not None
    assert "## Cold start" in (report.path / "report.md").read_text()
    assert json.loads((report.path / "report.json").read_text())["settings"]["cold_start_rows"][0]["rows"] == "8"


def test_predict_takes_static_features_of_a_new_series() -> None:
    config = load(PredictConfig, "predict", ["cold_start.like.fresh.size=3", "cold_start.categories=[kind]"])
    assert config.cold_start is not None
    assert config.cold_start.like == {"fresh": {"size": 3.0}}


def test_predict_uses_the_newest_artifact_and_its_own_data(site: Any) -> None:
    workspace = Workspace.open()
    forecast = predict(PredictConfig(), workspace)
    assert forecast.metadata["artifact_id"] == site.artifact
    assert forecast.metadata["dataset"] == "plant"
    assert forecast.table.height == 2 * 2 * 12
    named = predict(PredictConfig(artifact=site.artifact, series=("a",), horizon=3, quantile_levels=(0.5,)), workspace)
    same = forecast.table.filter(pl.col("series_id") == "a", pl.col("step") <= 3)
    assert np.allclose(named.table["mean"], same["mean"], rtol=1e-6)
    assert named.table.columns[-1] == "q0.5"
    early = predict(PredictConfig(cutoff="2026-02-20T05:00"), workspace).table
    assert early["time"].min().isoformat() == "2026-02-20T06:00:00+00:00"
    with pytest.raises(ModelError, match="asked for 40"):
        predict(PredictConfig(horizon=40), workspace)
    assert predict(PredictConfig(horizon=40, rollout=True), workspace).table["step"].max() == 40


def test_missing_things_are_named(site: Any, tmp_path: Any) -> None:
    workspace = Workspace.open()
    with pytest.raises(DataError, match="nowhere"):
        predict(PredictConfig(dataset="nowhere"), workspace)
    with pytest.raises(DataError, match="zz"):
        predict(PredictConfig(series=("zz",)), workspace)
    with pytest.raises(ArtifactError, match="run tsforge fit first"):
        find_artifact("latest", Workspace.open(tmp_path / "empty"))
