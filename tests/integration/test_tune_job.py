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
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tsforge.app import catalog
from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.publish import promote
from tsforge.app.tune import TuneJobConfig, leaves, trial_space, tune, with_values
from tsforge.core.config import load, validate
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.tracking.registry import champion
from tsforge.tracking.runs import Tracker
from tsforge.tuning.space import Choice

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


def test_the_largest_error_is_no_aim_of_a_study(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"^study\.direction=maximize looks for the worst .* valid_mse is an error"):
        tune(job("study.direction=maximize", "study.metric=valid_mse"), workspace)
    assert not workspace.tuning.exists()


def test_weights_to_start_from_are_refused_before_the_first_trial(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"fit\.warm_start\.artifact=latest has no effect: trials begin at fresh"):
        tune(job("fit.warm_start.artifact=latest"), workspace)
    assert not workspace.tuning.exists()


def test_covariates_that_no_candidate_takes_are_refused_before_the_first_trial(workspace: Workspace) -> None:
    auto = ["fit.model={name: auto, minutes: 0, candidates: [last_value, linear]}", "fit.covariates=all"]
    searched = "study.space={model.folds: {choices: [1, 2]}"
    with pytest.raises(
        ConfigError, match=r"covariates=all: none of the 2 models .* takes the covariate\(s\) calendar\."
    ):
        tune(job(*auto, searched + "}"), workspace)
    assert not workspace.tuning.exists()
    leaving_out = job(*auto, searched + ", covariates: {choices: [usable]}}", "study.num_trials=1")
    assert tune(leaving_out, workspace).best.values["covariates"] == "usable"


def test_a_value_that_does_not_go_with_another_section_is_left_to_its_trial(workspace: Workspace) -> None:
    space = trial_space(job("study.space={scaling.kind: {choices: [global, window]}, model.ridge: null}"))
    assert "scaling.kind" in space
    bins = ("model=temporal", "fit.model.widths=[1,24]", "fit.window={context_length: 12, horizon: 24}")
    cured = trial_space(job(*bins, "study.space={window.context_length: {choices: [24, 48]}}"))
    assert "window.context_length" in cured, "the base config alone could not be fitted, every trial can"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "data.name: {choices: [other]}, data.timezone: {choices: [UTC]}",
            r"data\.name, data\.timezone cannot be searched: all trials share the data .*tune each data set by itself",
        ),
        (
            "window.horizon: {choices: [1, 12]}",
            r"window\.horizon cannot be searched: what is graded .* a study for each",
        ),
        ("window.min_observed: {low: 0.1, high: 0.9}", r"window\.min_observed cannot be searched: what is graded"),
        (
            "split.ends: {choices: [['2013-03-01', '2013-04-01', null]]}",
            r"split\.ends cannot be searched: what is graded",
        ),
        ("entities.held_out: {choices: [0.0, 0.5]}", r"entities\.held_out cannot be searched: what is graded"),
        (
            "model.name: {choices: [linear, var]}",
            r"model\.name cannot be searched: each model has settings .*model=auto",
        ),
        ("calibration.method: {choices: [cqr]}", r"calibration\.method cannot be searched: no error of a trial"),
        (
            "warm_start.artifact: {choices: [null, latest]}",
            r"warm_start\.artifact cannot be searched: trials begin at fresh",
        ),
        (
            "window.context_length: {choices: [abc, 48]}",
            r"window\.context_length cannot be 'abc' \(.*valid integer.*\); correct the space",
        ),
        (
            "window.context_length: {choices: [48, 0]}",
            r"window\.context_length cannot be 0 \(.*greater than or equal to 1",
        ),
        (
            "model.remove: {choices: [nonsense, none]}",
            r"model\.remove cannot be 'nonsense' \(.*'window_mean' or 'last'",
        ),
        ("model.ridge: {low: -1, high: 5, log: false}", r"model\.ridge cannot be -1\.0 \(.*a number from 0 on"),
        ("covariates: {choices: [some]}", r"covariates cannot be 'some' \(.*'usable' or 'all'"),
        (
            "scaling.unknown: {choices: [context]}",
            r"scaling\.unknown cannot be 'context' \(.*scaling\.kind=series only",
        ),
        ("train.cycles: {choices: [5]}", r"train\.cycles cannot be 5 \(train\.cycles has no effect with schedule"),
    ],
)
def test_fields_and_values_that_cannot_be_searched_are_refused_before_the_first_trial(
    workspace: Workspace, space: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"study\.space: {message}"):
        tune(job(f"study.space={{{space}}}"), workspace)
    assert not workspace.tuning.exists()


def test_of_several_refused_fields_every_reason_is_told_and_null_leaves_one_alone() -> None:
    with pytest.raises(ConfigError, match=r"data\.name cannot be .*\. window\.horizon cannot be "):
        trial_space(job("study.space={data.name: {choices: [a]}, window.horizon: {choices: [1, 2]}}"))
    space = trial_space(job("study.space={data.name: null, split.train: null, window.stride: {choices: [1, 12]}}"))
    assert list(space) == ["model.weights", "model.remove", "model.ridge", "window.stride"]
    with pytest.raises(ConfigError, match=r"model\.refit cannot be searched: what is graded"):
        trial_space(job("fit.model={name: auto}", "study.space={model.refit: {choices: [all, train]}}"))


def test_values_that_go_with_others_of_the_search_or_between_the_ends_of_a_range_stay() -> None:
    together = "train.schedule: {choices: [constant, cyclic_cosine]}, train.cycles: {choices: [null, 5]}"
    cycles = trial_space(job(f"study.space={{{together}}}"))["train.cycles"]
    assert isinstance(cycles, Choice)
    assert cycles.choices == (None, 5)
    cyclic = ["fit.train.schedule=cyclic_cosine", "fit.train.cycles=5"]
    epochs = trial_space(job(*cyclic, "study.space={train.max_epochs: {low: 11, high: 29}}"))["train.max_epochs"]
    assert epochs.describe() == "int 11..29", "10 is a multiple of neither, 15 goes"
    assert "scaling.unknown" in trial_space(
        job("study.space={scaling.unknown: {choices: [context]}, scaling.kind: {choices: [series]}}")
    )


def late_panel(workspace: Workspace, folder: Path, late: int) -> dict[str, object]:
    """Store two series of 300 hours, the second begins ``late`` hours after the first; return the settings of data."""
    times = [datetime(2026, 1, 1) + timedelta(hours=hour) for hour in range(300)]
    wave = np.sin(np.arange(300) * 2 * np.pi / 24) + np.random.default_rng(0).normal(size=300) * 0.1
    one = pl.DataFrame({"ds": times, "who": "early", "load": wave})
    pl.concat([one, one[late:].with_columns(who=pl.lit("late"))]).write_csv(folder / "late.csv")
    data: dict[str, object] = {
        "name": "late",
        "layout": "long",
        "series": "who",
        "source": {"kind": "csv", "path": str(folder / "late.csv")},
    }
    ingest(validate(IngestConfig, {"data": data}), workspace)
    return data


def test_context_lengths_with_which_fewer_windows_are_graded_are_refused(
    tracked_workspace: Workspace, tmp_path: Path
) -> None:
    data = late_panel(tracked_workspace, tmp_path, late=190)  # the valid span begins at row 210

    def searched(space: object, metric: str = "valid_mae", **fit: object) -> TuneJobConfig:
        window = {"context_length": 12, "horizon": 6}
        settings = {"data": data, "model": {"name": "linear"}, "window": window} | fit
        study = {"name": "late", "num_trials": 2, "metric": metric, "space": {"window.context_length": space}}
        return validate(TuneJobConfig, {"fit": settings, "study": study})

    refused = (
        r"context_length cannot be searched from 12 to 48: .* has 50 windows with the first and 25 with the last.*"
    )
    for space in ({"choices": [12, 48]}, {"low": 12, "high": 48}, {"choices": [48, 12, 5000]}):
        with pytest.raises(ConfigError, match=refused + "search up to 20, or leave those series out"):
            tune(searched(space), tracked_workspace)
    with pytest.raises(ConfigError, match="from 12 to 204: .*search up to 20"):  # more leave nothing to train on
        tune(searched({"low": 12, "high": 5000}), tracked_workspace)
    assert not tracked_workspace.tuning.exists()
    held_out = searched({"choices": [12, 48]}, entities={"held_out": ["late"]})
    assert len(tune(held_out, tracked_workspace).trials) == 2, "the late series is not graded"
    unseen = searched({"choices": [12, 48]}, "valid_unseen_mae", entities={"held_out": ["late"]})
    with pytest.raises(ConfigError, match="from 12 to 48: .*search up to 20"):  # it alone is, and what trains is not it
        tune(unseen, tracked_workspace)


def test_context_lengths_that_every_series_has_are_searched(tracked_workspace: Workspace, tmp_path: Path) -> None:
    data = late_panel(tracked_workspace, tmp_path, late=190)
    window = {"context_length": 12, "horizon": 6}
    study = {"name": "late", "num_trials": 2, "space": {"window.context_length": {"choices": [12, 20, 5000]}}}
    settings = {"fit": {"data": data, "model": {"name": "linear"}, "window": window}, "study": study}
    result = tune(validate(TuneJobConfig, settings), tracked_workspace)
    assert result.trials[0].values["window.context_length"] == 12


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
