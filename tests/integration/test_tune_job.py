"""Tuning on real data from the store: trials are nested runs, the best config is what ``fit`` accepts."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from tsforge.app import catalog
from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.publish import promote
from tsforge.app.tune import TuneJobConfig, leaves, trial_space, tune, with_values
from tsforge.core.config import load
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.tracking.registry import champion
from tsforge.tracking.runs import Tracker

FAST = [
    "fit.window.context_length=48",
    "fit.window.horizon=12",
    "fit.split.kind=times",
    "fit.split.ends=['2013-03-01','2013-04-01','2013-05-01']",
    "fit.data.targets=[temp]",
    "fit.data.valid_range={}",
]


@pytest.fixture
def workspace(tracked_workspace: Workspace) -> Workspace:
    ingest(load(IngestConfig, "ingest", ["data=nyc_weather"]), tracked_workspace)
    return tracked_workspace


def job(*overrides: str, config: str = "tune/linear") -> TuneJobConfig:
    return load(TuneJobConfig, config, [*FAST, *overrides])


def test_the_best_config_is_what_fit_accepts_and_repeats_the_value(workspace: Workspace) -> None:
    result = tune(job("study.num_trials=8"), workspace)
    assert [trial.state for trial in result.trials] == ["complete"] * 8
    assert result.trials[0].values == {"model.weights": "shared", "model.remove": "window_mean", "model.ridge": 100.0}
    assert result.best.value is not None
    assert result.best.value <= result.trials[0].value  # type: ignore[operator]
    assert list(workspace.artifacts.glob("*")) == [], "trials leave no artifacts"
    assert result.best_config == workspace.tuning / "linear-on-nyc_weather-best.yaml"
    config = load(FitConfig, str(result.best_config), ["tracking.register_as=weather"])
    assert {name: leaves(config.model_dump(mode="json"))[name] for name in result.best.values} == result.best.values
    fitted = fit(config, workspace)
    assert fitted.metrics["valid_mae"] == result.best.value
    assert fitted.artifact.calibration is not None, "trials go without intervals, the fit has them"
    assert promote("weather", fitted.artifact.id, workspace=workspace)["version"] == "1"
    assert champion("weather", workspace) == fitted.artifact.path


def test_a_metric_that_no_fit_reports_is_refused_before_the_first_trial(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"study\.metric=valid_mape: no fit reports it; did you mean 'valid_mae'"):
        tune(job("study.metric=valid_mape"), workspace)
    with pytest.raises(ConfigError, match=r"known: valid_mae, valid_mse\)$"):
        tune(job("study.metric=valid_unseen_mae"), workspace)
    assert not workspace.tuning.exists()


def test_trials_leave_the_settings_of_intervals_to_the_best_config(workspace: Workspace) -> None:
    result = tune(job("study.num_trials=1", "fit.calibration.half_life=500"), workspace)
    assert [trial.state for trial in result.trials] == ["complete"]
    assert load(FitConfig, str(result.best_config)).calibration.half_life == 500


def test_every_trial_is_a_nested_run_and_the_study_one_run(workspace: Workspace) -> None:
    tune(job("study.num_trials=3"), workspace)
    result = tune(job("study.num_trials=5"), workspace)
    runs = {run["name"]: run for run in Tracker.open(workspace).runs()}
    study = runs.pop("tune linear-on-nyc_weather")
    assert len(runs) == 5
    assert {run["parent"] for run in runs.values()} == {study["id"]}
    assert {run["status"] for run in [study, *runs.values()]} == {"FINISHED"}
    for trial in result.trials:
        run = runs[f"linear-on-nyc_weather {trial.number}"]
        assert run["id"] == trial.notes["run_id"]
        assert run["metrics"]["final_valid_mae"] == trial.value
        assert float(run["parameters"]["model.ridge"]) == pytest.approx(trial.values["model.ridge"])
        assert not any(name.startswith("test_") for name in run["metrics"]), "the test span decides nothing"
    assert study["metrics"]["best_valid_mae"] == result.best.value
    assert study["tags"]["tsforge.trials"] == "5 complete"


def test_hopeless_trainings_are_stopped_early_and_their_runs_say_so(workspace: Workspace) -> None:
    settings = ["study.num_trials=9", "study.num_warmup_reports=1", "fit.train.max_epochs=4", "fit.train.patience=null"]
    settings += ["fit.split.ends=['2013-01-20','2013-01-30','2013-02-05']"]
    space = ["study.space={train.learning_rate: {low: 1.0e-6, high: 1.0e-2, log: true}, model.kernel: null}"]
    result = tune(job(*settings, *space, "fit.train.max_steps_per_epoch=20", config="tune/dlinear"), workspace)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned
    assert all(2 <= trial.num_reports < 4 for trial in pruned)
    runs = {run["id"]: run for run in Tracker.open(workspace).runs()}
    for trial in pruned:
        run = runs[trial.notes["run_id"]]
        assert (run["status"], run["tags"]["tsforge.outcome"]) == ("FINISHED", "pruned")
        assert "train_loss" in run["metrics"]
    shown = {trial["trial"]: trial for trial in catalog.trial_runs(workspace, catalog.tracking_runs(workspace)[0])}
    for trial in result.trials:
        assert shown[trial.number]["status"] == ("PRUNED" if trial.state == "pruned" else "FINISHED")
        curve = catalog.run_history(workspace, trial.notes["run_id"]).filter(name="valid_mae")
        assert curve["epoch"].to_list() == list(range(trial.num_reports)), "the last number is no second point of it"


def test_failed_trials_are_failed_runs_and_the_study_goes_on(workspace: Workspace) -> None:
    space = (
        "study.space={fit: null, model.remove: null, model.weights: null, window.context_length: {choices: [48, 9000]}}"
    )
    with pytest.raises(ConfigError, match=r"space\.fit"):
        tune(job(space), workspace)
    result = tune(job(space.replace("fit: null, ", ""), "study.num_trials=8"), workspace)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert {trial.values["window.context_length"] for trial in failed} == {9000}
    runs = {run["id"]: run for run in Tracker.open(workspace).runs()}
    assert {runs[trial.notes["run_id"]]["status"] for trial in failed} == {"FAILED"}
    assert all(runs[trial.notes["run_id"]]["error"] for trial in failed)


def test_changed_data_or_settings_are_not_mixed_into_a_study(workspace: Workspace) -> None:
    tune(job("study.num_trials=1"), workspace)
    with pytest.raises(ConfigError, match=r"other settings \(fit\.window\)"):
        tune(job("study.num_trials=2", "fit.window.horizon=6"), workspace)
    with pytest.raises(ConfigError, match=r"other settings \(data\)"):
        tune(job("study.num_trials=2", "fit.data.targets=[temp,dewp]"), workspace)
    with pytest.raises(ConfigError, match=r"other settings \(study\.seed\)"):
        tune(job("study.num_trials=2", "study.seed=1"), workspace)


def test_other_values_to_start_from_are_the_next_trial(workspace: Workspace) -> None:
    tune(job("study.num_trials=2"), workspace)
    result = tune(job("study.num_trials=3", "fit.model.ridge=0.125"), workspace)
    assert result.trials[2].values["model.ridge"] == pytest.approx(0.125)


def test_a_refusal_leaves_the_run_of_the_study_as_it_was(workspace: Workspace) -> None:
    def of_study() -> dict[str, object]:
        (run,) = [run for run in Tracker.open(workspace).runs() if run["parent"] is None]
        return run

    tune(job("study.num_trials=1"), workspace)
    before = of_study()
    assert before["status"] == "FINISHED"
    with pytest.raises(ConfigError, match="other settings"):
        tune(job("study.num_trials=2", "fit.window.horizon=6"), workspace)
    assert of_study() == before
    lock = workspace.tuning / ".linear-on-nyc_weather.lock"
    with closing(sqlite3.connect(lock, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # as a process that works on the study
        with pytest.raises(BackendError, match="another process is working on it"):
            tune(job("study.num_trials=2"), workspace)
    assert of_study() == before


def test_trials_do_not_warn_of_what_they_switch_off_themselves(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    tune(job("study.num_trials=2"), workspace)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in warnings if "calibration" in text] == []


def test_settings_of_gradient_training_are_searched_only_where_they_act() -> None:
    assert not any(name.startswith("train.") for name in trial_space(job()))
    assert "train.learning_rate" in trial_space(job(config="tune/dlinear"))
    assert "train.batch_size" in trial_space(job("study.space.train.batch_size.choices=[16,32]"))
    for name in ("s4", "chimera", "regenn", "plrnn"):  # a closed form at most where training begins
        assert "train.learning_rate" in trial_space(job(f"fit.model={{name:{name}}}")), name


def test_values_are_set_in_their_place_and_checked() -> None:
    base = job().fit
    changed = with_values(base, {"model.ridge": 5.0, "window.horizon": 7})
    assert (leaves(changed.model_dump(mode="json"))["model.ridge"], changed.window.horizon) == (5.0, 7)
    with pytest.raises(ConfigError, match="model.ridge"):
        with_values(base, {"model.ridge": -1.0})


def test_a_data_set_that_is_not_stored_is_reported(tracked_workspace: Workspace) -> None:
    with pytest.raises(DataError, match="nyc_weather"):
        tune(job(), tracked_workspace)
    assert not tracked_workspace.tuning.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_finished_trials_runs_and_the_best_config(workspace: Workspace) -> None:
    settings = [*FAST, "study.num_trials=200", "study.name=cut"]
    command = [sys.executable, "-m", "tsforge", "tune", "--config", "tune/linear", "--json", *settings]
    environment = {**os.environ, "TSFORGE_HOME": str(workspace.root)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    best = workspace.tuning / "cut-best.yaml"
    deadline = time.monotonic() + 120
    while not best.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert b"Traceback" not in errors
    runs = Tracker.open(workspace).runs(1000)
    (study,) = [run for run in runs if run["parent"] is None]
    assert study["status"] == "KILLED"
    finished = [run for run in runs if run["status"] == "FINISHED"]
    assert finished
    assert not [run for run in runs if run["status"] == "RUNNING"]
    load(FitConfig, str(best))
    result = tune(job("study.name=cut", f"study.num_trials={len(finished) + 1}"), workspace)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(complete) == len(finished) + 1
    runs_now = {run["id"]: run for run in Tracker.open(workspace).runs(1000)}
    assert runs_now[study["id"]]["status"] == "FINISHED", "the study's run was continued"


def test_histories_open_as_tables(workspace: Workspace, tmp_path: Path) -> None:
    result = tune(job("study.num_trials=3"), workspace)
    result.history().write_csv(tmp_path / "trials.csv")
    table = pl.read_csv(tmp_path / "trials.csv")
    assert table.columns[:4] == ["trial", "state", "value", "best"]
    assert table["value"].to_list() == [trial.value for trial in result.trials]
