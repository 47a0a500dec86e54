"""``model=auto`` end to end: what it chooses, what it may not see, and everything that is done with its artifact."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.anomaly.detector import detect
from tsforge.app import auto, auto_candidates
from tsforge.app.fit import FitConfig, fit, fit_frame
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.artifact import Artifact, load_artifact, save_artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.ensemble import EnsembleNetwork
from tsforge.forecasting.attribution import AttributionConfig, attribute
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.predict import predict
from tsforge.forecasting.stream import Stream

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 500
QUICK = ["last_value", "seasonal_naive", "linear"]


def table(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    """Two series of two variates: a daily wave and an autoregression."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, name in enumerate("ab"):
        noise = rng.normal(size=(rows, 2))
        slow = np.zeros((rows, 2))
        for row in range(1, rows):
            slow[row] = 0.9 * slow[row - 1] + 0.4 * noise[row]
        wave = 2.0 * np.sin(2 * np.pi * np.arange(rows) / 6 + number)[:, None]
        values = 5.0 * number + wave + slow
        columns = {"time": [START + timedelta(hours=4 * row) for row in range(rows)], "series_id": [name] * rows}
        parts.append(pl.DataFrame({**columns, "x": values[:, 0], "y": values[:, 1]}))
    return pl.concat(parts)


def as_frame(data: pl.DataFrame, **roles: Any) -> SeriesFrame:
    return SeriesFrame.from_long(data, time="time", series_id="series_id", targets=["x", "y"], **roles)


def config(model: dict[str, Any] | None = None, **changes: Any) -> FitConfig:
    plain = {
        "data": {"name": "made", "source": {"kind": "csv", "path": "made.csv"}, "time": "time", "targets": ["x", "y"]},
        "model": {"name": "auto", "minutes": 0, "folds": 2, "candidates": QUICK, **(model or {})},
        "window": {"context_length": 12, "horizon": 3},
        "train": {"max_epochs": 3, "max_steps_per_epoch": 20},
        "tracking": {"enabled": False},
        **changes,
    }
    return validate(FitConfig, plain)


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    return as_frame(table())


@pytest.fixture(scope="module")
def artifact(frame: SeriesFrame) -> Artifact:
    return fit_frame(frame, config())[0]


def race_of(artifact: Artifact) -> dict[str, dict[str, Any]]:
    return {record["candidate"]: record for record in artifact.explanation["race"]}


def test_the_leaderboard_says_who_won_and_why(artifact: Artifact) -> None:
    records = artifact.explanation["race"]
    network = artifact.network
    assert isinstance(network, EnsembleNetwork)
    members = [record for record in records if record["weight"]]
    assert len(members) == len(network.members)
    assert sum(record["weight"] for record in members) == pytest.approx(1.0, abs=1e-3)
    assert records[: len(members)] == members  # members come first
    assert all(record["why"] for record in records)
    assert all(record["folds"] == 2 for record in members)
    best = min((r for r in records if r["folds"] == 2), key=lambda record: record["error"])
    assert best["candidate"].startswith("linear")
    naive = next(record for record in records if record["candidate"].startswith("last_value"))
    assert naive["weight"] == 0.0
    assert naive["error"] > 2 * best["error"]
    assert {record["stage"] for record in records} == {"closed form"}  # minutes=0


def test_it_is_no_worse_than_what_it_is_made_of(frame: SeriesFrame, artifact: Artifact) -> None:
    rest = {"likelihood": {"name": "point"}}
    single = fit_frame(frame, config(**rest).model_copy(update={"model": config().model}))[0].metrics["test_mse"]
    linear = fit_frame(frame, validate(FitConfig, {**config().model_dump(), "model": "linear"}))[0].metrics["test_mse"]
    naive = fit_frame(frame, validate(FitConfig, {**config().model_dump(), "model": "last_value"}))[0].metrics
    assert single == artifact.metrics["test_mse"]  # and it repeats exactly
    assert artifact.metrics["test_mse"] < 1.02 * linear
    assert artifact.metrics["test_mse"] < 0.6 * naive["test_mse"]


def test_spans_say_which_rows_were_used(frame: SeriesFrame, artifact: Artifact) -> None:
    rows = artifact.provenance["span_rows"]
    assert rows == {"train": [0, 375], "valid": [375, 400], "test": [400, 500]}
    kept = fit_frame(frame, config({"refit": "train"}))[0]
    assert kept.provenance["span_rows"] == {"train": [0, 350], "valid": [350, 400], "test": [400, 500]}
    assert artifact.calibration is not None
    assert artifact.calibration["n"].max() == 2 * (25 - 3 + 1)  # only windows that nobody was fitted or chosen on
    short = fit_frame(frame, config(split={"train": 0.79, "valid": 0.01, "test": 0.2}))[0]  # too short for two parts
    assert short.provenance["span_rows"]["train"] == [0, 395]


def spoil(data: pl.DataFrame, row: int) -> SeriesFrame:
    """Change every value from a row on."""
    late = pl.col("time") >= pl.lit(START + timedelta(hours=4 * row))
    noise = pl.Series(np.random.default_rng(5).normal(0, 50, data.height))
    return as_frame(data.with_columns(pl.when(late).then(pl.col(n) + noise).otherwise(pl.col(n)) for n in ("x", "y")))


def same_network(one: Artifact, two: Artifact) -> bool:
    first, second = one.network.state_dict(), two.network.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weights", ["global", "variate", "series"])
def test_no_row_after_the_selection_span_changes_the_mixture(frame: SeriesFrame, weights: str) -> None:
    settings = config({"weights": weights})
    before = fit_frame(frame, settings)[0]
    assert same_network(before, fit_frame(spoil(table(), 375), settings)[0])
    assert not same_network(before, fit_frame(spoil(table(), 374), settings)[0])
    assert before.network.weights.shape[0] == (3 if weights == "series" else 1)
    assert before.network.weights.shape[-1] == (2 if weights == "variate" else 1)


def test_a_saboteur_that_chooses_by_test_errors_is_caught(frame: SeriesFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = auto._folds

    def leaky(data: Any) -> Any:
        return [*honest(data)[:-1], auto._fold(data, 400, 500)]

    monkeypatch.setattr(auto, "_folds", leaky)
    before = fit_frame(frame, config({"refit": "train"}))[0]
    assert not same_network(before, fit_frame(spoil(table(), 410), config({"refit": "train"}))[0])


def test_values_after_a_cutoff_change_no_forecast_of_a_backtest() -> None:
    def made(frame: SeriesFrame, cutoff: Any) -> Artifact:
        return fit_frame(frame, config(split={"train": 0.85, "valid": 0.15, "test": 0.0}))[0]

    settings = BacktestConfig(num_cutoffs=3, stride=6, refit_every=2)
    before = backtest(made, as_frame(table()), settings, horizon=3).forecasts
    middle = before["cutoff"].unique().sort()[1]
    row = int((middle - START).total_seconds() // (4 * 3600)) + 1
    after = backtest(made, spoil(table(), row), settings, horizon=3).forecasts
    early = pl.col("cutoff") <= middle
    assert before.filter(early).drop("actual").equals(after.filter(early).drop("actual"))
    assert not before.filter(~early)["mean"].equals(after.filter(~early)["mean"])


def test_its_artifact_does_everything_that_others_do(frame: SeriesFrame, artifact: Artifact, tmp_path: Path) -> None:
    loaded = load_artifact(save_artifact(artifact, tmp_path).path)
    assert loaded.explanation == artifact.explanation
    forecast = predict(loaded, frame)
    assert forecast.table.equals(predict(artifact, frame).table)
    assert forecast.table["q0.05"].is_not_null().all()
    longer = predict(loaded, frame, horizon=7, rollout=True).table
    assert longer["step"].max() == 7
    with pytest.raises(ModelError, match="rollout"):
        predict(loaded, frame, horizon=7)
    report = detect(loaded, frame, start=START + timedelta(hours=4 * 480))
    assert report.scores.table.height > 0
    stream = Stream.start(loaded, frame.until(START + timedelta(hours=4 * 450)))
    assert stream.forecast().table.equals(predict(loaded, frame, cutoff=START + timedelta(hours=4 * 450)).table)
    with pytest.raises(ModelError, match=r"'auto' .* cannot be carried"):
        Stream.start(loaded, frame, mode="carried")
    from tsforge.tracking.pyfunc import _load_pyfunc

    served = _load_pyfunc(str(save_artifact(artifact, tmp_path / "other").path)).predict(
        frame.table.with_columns(pl.col("time").dt.replace_time_zone(None)).to_pandas()
    )
    assert np.allclose(served["mean"], forecast.table["mean"])


def test_tails_of_a_mixture_of_distributions_feed_detection(frame: SeriesFrame) -> None:
    artifact = fit_frame(frame, config(likelihood={"name": "normal"}))[0]
    assert artifact.network.likelihood.has_distribution
    report = detect(artifact, frame, start=START + timedelta(hours=4 * 480))
    assert report.scores.table["score"].is_not_null().any()
    table_ = predict(artifact, frame, quantile_levels=(0.1, 0.5, 0.9)).table
    assert (table_["q0.1"] < table_["q0.9"]).all()


def test_covariates_go_to_the_members_that_take_them() -> None:
    rows = ROWS
    data = table()
    rng = np.random.default_rng(3)
    push = np.concatenate([rng.normal(size=rows), rng.normal(size=rows)])
    data = data.with_columns(push=pl.Series(push)).with_columns(x=pl.col("x") + 3.0 * pl.col("push"))
    frame = as_frame(data, known=["push"])
    artifact = fit_frame(frame, config({"candidates": ["linear", "ar_net"]}))[0]
    members = {member.config.model.name: member for member in artifact.network.members}
    assert members["ar_net"].spec.num_known == 1
    assert artifact.network.spec.num_known == 1
    weight = {record["candidate"].split()[0]: record["weight"] for record in reversed(artifact.explanation["race"])}
    assert weight["ar_net"] > 0.6
    future = frame.extend(0)
    cut = START + timedelta(hours=4 * 450)
    error = (
        predict(artifact, future, cutoff=cut)
        .table.filter(variate="x")
        .join(data.unpivot(["x"], index=["series_id", "time"]), on=["series_id", "time"])
    )
    assert (error["mean"] - error["value"]).abs().mean() < 1.0


def pushed(rows: int = ROWS) -> pl.DataFrame:
    """``table`` with a known covariate that moves x, and a static one."""
    data = table(rows).with_columns(push=pl.Series(np.random.default_rng(3).normal(size=2 * rows)))
    size = pl.when(pl.col("series_id") == "a").then(1.0).otherwise(2.0)
    return data.with_columns(x=pl.col("x") + 3.0 * pl.col("push"), size=size)


@pytest.mark.parametrize(("names", "left_out"), [(["linear"], "push, size"), (["linear", "ar_net"], "size")])
def test_covariates_that_no_member_reads_are_left_out_of_the_artifact(
    names: list[str], left_out: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    frame = as_frame(pushed(), known=["push"], static=["size"])
    settings = config({"candidates": names})
    artifact = fit_frame(frame, settings)[0]
    told = f"no chosen member of model 'auto' takes the covariate(s) {left_out}; fitted without them"
    assert caplog.text.count(told) == 1
    known = ("push",) if "ar_net" in names else ()
    assert (artifact.schema.known, artifact.schema.static) == (known, ())
    assert artifact.network.spec.num_known == len(known)
    back = load_artifact(save_artifact(artifact, tmp_path).path or tmp_path)
    future = frame if known else as_frame(pushed())  # nobody knows the future of push, and nothing reads it
    cutoff = START + timedelta(hours=4 * (450 if known else ROWS - 1))
    said = (
        predict(back, future, cutoff=cutoff, quantile_levels=()).table.filter(series_id="a", variate="x").sort("step")
    )
    for method in ("auto", "occlusion"):
        found = attribute(back, future, validate(AttributionConfig, {"method": method}), cutoff=cutoff).table
        assert set(found.filter(pl.col("source_series") == "a")["source"]) <= {"x", "y", *known}
        parts = found.filter(pl.col("kind") != "component").group_by("step").agg(pl.col("contribution").sum())
        assert parts.sort("step")["contribution"].to_list() == pytest.approx(said["mean"].to_list(), rel=1e-3, abs=1e-3)


def test_covariates_that_no_candidate_can_take_are_refused_before_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = as_frame(pushed(), known=["push"], static=["size"])

    def told(model: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            fit_frame(frame, config(model, covariates="all"))

    # one could, but there is no time for it
    told(
        {"minutes": 1e-4, "candidates": ["linear", "gru"]},
        r"no chosen member .* takes the covariate\(s\) push, size, and covariates=all refuses",
    )
    with monkeypatch.context() as patch:
        patch.setattr(auto_candidates, "build", lambda *_: pytest.fail("a candidate was built"))
        both, static = r"covariates=all: none of the 2 models .* takes the covariate\(s\) push, size;", r"\(s\) size;"
        told({"candidates": ["linear", "last_value"]}, both)
        told({"candidates": ["linear", "ar_net"]}, static)
        told({"candidates": None}, static)
        told({"candidates": ["linear", "gru", "ar_net"]}, static)  # no minutes to train it
        told({"minutes": 1, "max_trials": 0, "candidates": ["linear", "gru"]}, both.replace("2", "1"))
    with pytest.raises(ModelError, match="nothing to choose from"):
        fit_frame(frame, config({"candidates": ["gru"]}, covariates="all"))


def test_an_older_artifact_that_still_lists_unread_covariates_is_explained() -> None:
    frame = as_frame(pushed(), known=["push"], static=["size"])
    artifact = replace(fit_frame(frame, config({"candidates": ["linear"]}))[0], schema=frame.schema)
    cutoff = START + timedelta(hours=4 * 450)
    for method in ("auto", "occlusion"):
        found = attribute(artifact, frame, validate(AttributionConfig, {"method": method}), cutoff=cutoff)
        assert set(found.by_source()["source"]) == {"x", "y"}


def test_a_trained_model_is_let_in_when_it_clearly_helps(frame: SeriesFrame) -> None:
    settings = config({"minutes": 5, "candidates": ["last_value", "dlinear"]}, train={"max_epochs": 4, "seed": 1})
    artifact, training = fit_frame(frame, settings)
    race = race_of(artifact)
    assert race["dlinear L=12"]["weight"] + race["dlinear L=6"]["weight"] > 0.5
    assert race["dlinear L=12"]["stage"] == "trained"
    assert training.epochs > 0
    again = fit_frame(frame, settings)[0]
    assert same_network(artifact, again)  # nothing depends on the clock where there is time enough
    late = fit_frame(spoil(table(), 375), settings)[0]
    assert same_network(artifact, late)


def test_a_trained_model_that_adds_nothing_clear_stays_out(frame: SeriesFrame) -> None:
    quick = {"max_epochs": 1, "max_steps_per_epoch": 2}
    artifact = fit_frame(frame, config({"minutes": 5, "candidates": ["linear", "dlinear"]}, train=quick))[0]
    race = race_of(artifact)
    assert race["dlinear L=12"]["weight"] == 0.0
    assert "adds nothing clear" in race["dlinear L=12"]["why"] or "stopped" in race["dlinear L=12"]["why"]


def test_nothing_is_begun_that_cannot_end_in_time(frame: SeriesFrame, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    artifact = fit_frame(frame, config({"minutes": 1e-4, "candidates": ["last_value", "dlinear"]}))[0]
    assert time.monotonic() - started < 20
    trained = [record for record in artifact.explanation["race"] if record["stage"] == "trained"]
    assert trained
    assert all("time is spent" in record["why"] for record in trained)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [
        "2 of 2 candidates that need training were not begun within model.minutes=0.0001: dlinear L=12, dlinear L=6"
    ]


def test_too_short_a_time_for_a_few_epochs_is_told_once(
    frame: SeriesFrame, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "step_seconds", lambda data, candidate: 1e3)
    settings = config({"minutes": 1, "candidates": ["last_value", "dlinear"]})
    race = race_of(fit_frame(frame, settings)[0])
    assert race["dlinear L=12"]["why"].startswith("not begun: a step takes 1e+03 s, 3 short epochs do not fit")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert told[0].startswith("2 of 2 candidates that need training were not begun")


def test_an_experimental_model_is_tried_only_where_it_is_named(frame: SeriesFrame) -> None:
    usual = fit_frame(frame, config({"minutes": 1e-4, "candidates": None}))[0]
    named = fit_frame(frame, config({"minutes": 1e-4, "candidates": ["last_value", "pvrnn"]}))[0]
    assert any(name.startswith("gru ") for name in race_of(usual))
    assert not any(name.startswith("pvrnn") for name in race_of(usual))
    assert any(name.startswith("pvrnn ") for name in race_of(named))


def test_variates_that_tell_of_each_other_are_given_to_var() -> None:
    """y follows x of the row before; alone, neither can be told."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=ROWS)
    y = np.concatenate([[0.0], x[:-1]]) + 0.1 * rng.normal(size=ROWS)
    times = [START + timedelta(hours=4 * row) for row in range(ROWS)]
    data = as_frame(pl.DataFrame({"time": times, "series_id": ["a"] * ROWS, "x": x, "y": y}))
    window = {"context_length": 12, "horizon": 1}
    race = race_of(fit_frame(data, config({"candidates": [*QUICK, "var"]}, window=window))[0])
    assert race["var L=12"]["weight"] > 0.9
    assert race["var L=12"]["error"] < 0.7 * min(part["error"] for name, part in race.items() if "var" not in name)
    assert not any(name.startswith("var") for name in race_of(fit_frame(data, config(window=window))[0]))


def moved_level(rows: int = ROWS) -> SeriesFrame:
    """A series about one level while models are chosen, and about another one from the test on."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(rows, 2)).cumsum(axis=0) * 0.05 + rng.normal(size=(rows, 2))
    values[int(0.8 * rows) :] += 6.0
    times = [START + timedelta(hours=4 * row) for row in range(rows)]
    return as_frame(pl.DataFrame({"time": times, "series_id": ["a"] * rows, "x": values[:, 0], "y": values[:, 1]}))


def test_it_leans_on_a_model_that_follows_the_level() -> None:
    """While nothing moves, one that knows the level by heart is ahead, but not clearly."""
    found = {}
    for anchor in (True, False):
        model = {"candidates": ["linear"], "anchor": anchor}
        race = race_of(fit_frame(moved_level(), config(model, window={"context_length": 24, "horizon": 6}))[0])
        name = "linear L=24 remove=auto ridge=None weights=auto"
        found[anchor] = race[name]["weight"]
        assert race[name]["folds"] == 2
    assert found[True] > found[False] + 0.1
    without = config({"candidates": ["last_value", "seasonal_naive"]})
    assert fit_frame(moved_level(), without)[0].explanation["race"]  # no such model among the candidates


@pytest.mark.slow
def test_more_folds_than_fit_are_as_many_as_do(frame: SeriesFrame, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    many = race_of(fit_frame(frame, config({"folds": 400}))[0])
    told = re.search(r"model\.folds is 400; 350 training rows hold (\d+) with a window before them", caplog.text)
    assert told is not None
    assert 2 < max(record["folds"] for record in many.values()) <= int(told[1]) < 400
    assert not any("failed" in record["why"] for record in many.values())
    assert "weight=" not in caplog.text  # unknown while the race is on


def test_trained_candidates_without_time_for_them_are_refused(frame: SeriesFrame) -> None:
    with pytest.raises(ModelError, match=r"dlinear must be trained, and model\.minutes=0 leaves no time for it"):
        fit_frame(frame, config({"minutes": 0, "candidates": ["dlinear"]}))


def test_closed_forms_tell_that_another_loss_is_not_theirs(
    frame: SeriesFrame, caplog: pytest.LogCaptureFixture
) -> None:
    fit_frame(frame, config(likelihood={"name": "point", "loss": "mae"}))
    assert "closed forms of the race minimise the squared error; likelihood.loss=mae is that of trained" in caplog.text
    caplog.clear()
    fit_frame(frame, config(likelihood={"name": "point"}))
    assert "minimise the squared error" not in caplog.text


def test_a_committee_leaves_out_covariates_that_its_member_cannot_take() -> None:
    data = table(200).with_columns(push=pl.lit(1.0), x=pl.col("x") + 1.0)
    for name in ("committee", "temporal"):
        model = {"name": name, "member": {"name": "dlinear"}}
        plain = {**config().model_dump(), "model": model, "train": {"max_epochs": 1, "max_steps_per_epoch": 2}}
        fitted = fit_frame(as_frame(data, known=["push"]), validate(FitConfig, plain))[0]
        assert fitted.network.spec.num_known == 0, name


def test_a_failing_candidate_is_reported_and_skipped(frame: SeriesFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = auto_candidates.solve

    def fragile(data: Any, candidate: Any, stop: int) -> Any:
        if candidate.model == "linear" or names == "all":
            raise ModelError("it is broken today")
        return honest(data, candidate, stop)

    names = "linear"
    monkeypatch.setattr(auto, "solve", fragile)
    artifact = fit_frame(frame, config())[0]
    broken = [record for record in artifact.explanation["race"] if record["candidate"].startswith("linear")]
    assert broken
    assert all(record["why"] == "failed: it is broken today" and not record["weight"] for record in broken)
    names = "all"
    with pytest.raises(ModelError, match=r"none of the candidates could be fitted.*broken today"):
        fit_frame(frame, config())


def test_bad_settings_are_named(frame: SeriesFrame) -> None:
    with pytest.raises(ConfigError, match="unknown model 'lineal'"):
        fit_frame(frame, config({"candidates": ["lineal"]}))
    with pytest.raises(ConfigError, match="auto is itself a mixture"):
        fit_frame(frame, config({"candidates": ["auto"]}))
    with pytest.raises(ConfigError, match="resume"):
        fit_frame(frame, config(), resume=True)
    with pytest.raises(ConfigError, match=r"entities\.watch"):
        fit_frame(frame, config(entities={"held_out": ["b"], "watch": "unseen_valid"}))
    with pytest.raises(ConfigError, match="minutes"):
        config({"minutes": -1})
    with pytest.raises(DataError):
        fit_frame(frame, config(window={"context_length": 12, "horizon": 200}))


def test_held_out_series_take_no_part(frame: SeriesFrame) -> None:
    settings = config({"weights": "series"}, entities={"held_out": ["b"]})
    one = fit_frame(frame, settings)[0]
    other = table().with_columns(
        pl.when(pl.col("series_id") == "b").then(pl.col(n) * -7.0 + 3.0).otherwise(pl.col(n)).alias(n)
        for n in ("x", "y")
    )
    assert same_network(one, fit_frame(as_frame(other), settings)[0])
    assert "test_unseen_mse" in one.metrics
    with pytest.raises(ConfigError, match="held-out"):
        fit_frame(frame, config(entities={"held_out": ["b"]}, scaling={"kind": "series"}))


def test_ctrl_c_leaves_nothing_behind_and_a_fit_is_stored(
    site: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace.open(site.home)
    ingest(validate(IngestConfig, {"data": site.data()}), workspace)
    settings = validate(FitConfig, {**config().model_dump(), "data": site.data()})
    stored = sorted(path.name for path in workspace.artifacts.iterdir())

    def interrupted(*values: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(auto, "_closed_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(settings, workspace)
    assert sorted(path.name for path in workspace.artifacts.iterdir()) == stored
    result = fit(settings, workspace)
    assert result.rows() == result.artifact.explanation["race"]
    assert result.artifact.id.startswith("auto-")
    from tsforge.app.catalog import artifact_facts

    facts = artifact_facts(workspace, result.artifact.id)
    assert facts["model"] == "auto"
    assert facts["explanation"]["race"] == result.rows()


def test_benchmark_entry_chooses_on_the_whole_validation_span(frame: SeriesFrame) -> None:
    from tsforge.app.auto import fit_for_benchmark
    from tsforge.data.splits import Splits
    from tsforge.data.windows import WindowSpec
    from tsforge.training.config import TrainConfig

    panel = Panel.from_frame(as_frame(table().filter(pl.col("series_id") == "a")))
    splits = Splits(train=(0, 350), valid=(350, 400), test=(400, 500))
    cut = replace(panel, values=panel.values[:400], observed=panel.observed[:400], indptr=np.array([0, 400]))
    options = {"minutes": 0, "candidates": QUICK}
    network = fit_for_benchmark(
        cut, splits, WindowSpec(context_length=12, horizon=3), options, train=TrainConfig(), seed=0, progress=False
    )
    assert isinstance(network, EnsembleNetwork)
    with pytest.raises(ConfigError, match=r"auto\.minuets"):
        fit_for_benchmark(
            cut,
            splits,
            WindowSpec(context_length=12, horizon=3),
            {"minuets": 1},
            train=TrainConfig(),
            seed=0,
            progress=False,
        )
