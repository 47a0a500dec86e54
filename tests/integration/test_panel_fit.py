"""Fits on ragged panels of many entities: forecasts and backtests of all, and entities kept from the fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app.detect import DetectJobConfig, detect
from tsforge.app.fit import FitConfig, FitResult, fit, fit_frame
from tsforge.app.forecast import PredictConfig
from tsforge.app.forecast import predict as forecast_stored
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.predict import predict, predict_windows
from tsforge.models.registry import MODELS
from tsforge.training.loop import TrainResult, evaluate_windows

# first and last row of each entity; the spans are: train 0-209, valid 210-239, test 240-299
ENTITIES = {
    "athens": (0, 300),
    "berlin": (0, 300),
    "cairo": (40, 300),  # begins late
    "delhi": (0, 225),  # ends within the valid span
    "essen": (0, 150),  # ends within the training span
    "fargo": (200, 300),  # too few rows for a training window
    "geneva": (245, 300),  # begins within the test span
    "havana": (0, 300),
}
WINDOW = {"context_length": 12, "horizon": 4}
FAST = {"max_epochs": 3, "batch_size": 128, "learning_rate": 0.01, "accelerator": "cpu"}


def table(changed: dict[str, float] | None = None, covariates: bool = False) -> pl.DataFrame:
    """Two waves an entity with noise and gaps, long; ``changed`` adds a number to all values of an entity."""
    parts = []
    for number, (name, (first, stop)) in enumerate(ENTITIES.items()):
        rng = np.random.default_rng(number)
        time = np.arange(first, stop)
        columns: dict[str, Any] = {"entity": [name] * len(time), "day": time}
        for place, variate in enumerate(("cases", "tests")):
            wave = np.sin(time / (3 + place) + number) + 0.1 * rng.normal(size=len(time)) + 0.2 * number
            wave = np.where(rng.random(len(time)) < 0.05, np.nan, wave)
            columns[variate] = wave + (changed or {}).get(name, 0.0)
        if covariates:
            columns["traffic"] = rng.normal(size=len(time)) + (changed or {}).get(name, 0.0)
            columns["height"] = np.full(len(time), 1.0 + number + (changed or {}).get(name, 0.0))
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts).with_columns(pl.col(pl.Float64).fill_nan(None))


def panel_frame(changed: dict[str, float] | None = None, *, covariates: bool = False) -> SeriesFrame:
    roles: dict[str, Any] = {"past": ["traffic"], "static": ["height"]} if covariates else {}
    return SeriesFrame.from_long(
        table(changed, covariates), time="day", series_id="entity", targets=["cases", "tests"], freq="1i", **roles
    )


def config(model: str, **changes: Any) -> FitConfig:
    settings = {
        "data": {"name": "cities", "source": {"kind": "parquet", "path": "cities.parquet"}},
        "model": {"name": model},
        "window": WINDOW,
        "train": FAST,
        "split": {"train": 0.7, "valid": 0.1, "test": 0.2},
        "calibration": {"quantile_levels": [0.1, 0.5, 0.9]},
        "tracking": {"enabled": False},
    }
    return validate(FitConfig, settings | changes)


def fitted(model: str, frame: SeriesFrame | None = None, **changes: Any) -> tuple[Artifact, TrainResult]:
    return fit_frame(panel_frame() if frame is None else frame, config(model, **changes))


HELD_OUT = ("berlin", "fargo", "havana")


@pytest.fixture(scope="module")
def artifacts() -> dict[str, Artifact]:
    """One artifact a model, fitted without three entities."""
    return {model: fitted(model, entities={"held_out": list(HELD_OUT)})[0] for model in ("linear", "dlinear")}


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Everything the network holds but the statistics by series, whose rows follow the numbering of all series."""
    return {key: part for key, part in artifact.network.state_dict().items() if ".series_" not in key}


# --- ragged panels


@pytest.mark.parametrize("model", ["linear", "dlinear"])
def test_every_entity_of_a_ragged_panel_is_forecast_from_its_own_end(model: str) -> None:
    frame = panel_frame()
    artifact, _ = fitted(model, frame)
    assert artifact.series_ids == tuple(ENTITIES)
    assert set(artifact.metrics) == {"valid_mse", "valid_mae", "test_mse", "test_mae"}
    found = predict(artifact, frame).table
    ends = dict(frame.last_observed().rows())
    assert dict(found.group_by("series_id").agg(pl.col("cutoff").first()).rows()) == ends
    assert found.group_by("series_id").len()["len"].to_list() == [2 * 4] * len(ENTITIES)
    assert found["mean"].is_finite().all()
    # all at one time: entities without rows there are named
    with pytest.raises(DataError, match=r"2 of 7 series have no observed target .*\(delhi, essen\)"):
        predict(artifact, frame, cutoff=240)
    early = predict(artifact, frame.select_series(["athens", "cairo", "fargo"]), cutoff=230).table
    assert early["time"].unique().sort().to_list() == [231, 232, 233, 234]


@pytest.mark.parametrize("model", ["linear", "dlinear"])
def test_a_backtest_grades_the_entities_that_are_there(model: str) -> None:
    frame = panel_frame()
    settings = config(model, split={"train": 0.8, "valid": 0.2, "test": 0.0})
    report = backtest(
        lambda visible, cutoff: fit_frame(visible, settings)[0],
        frame,
        BacktestConfig(num_cutoffs=4, stride=20, refit_every=2),
        horizon=4,
    )
    own = report.forecasts.filter(model=model)
    for cutoff, rows in own.drop_nulls("actual").partition_by("cutoff", as_dict=True).items():
        (at,) = cutoff
        there = [name for name, (first, stop) in ENTITIES.items() if first + 12 <= at + 1 < stop]
        assert rows["series_id"].unique().sort().to_list() == there, at
    assert own["cutoff"].n_unique() == 4
    assert report.leaderboard.filter(model=model)["mae"][0] < report.leaderboard.filter(model="last_value")["mae"][0]


def test_a_model_that_couples_entities_sees_those_that_are_missing_as_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    dlinear = MODELS.get("dlinear")
    forward = dlinear.forward

    def spy(self: Any, batch: Any) -> Any:
        seen.append((len(batch.context), batch.context_mask.any(dim=(1, 2))))
        return forward(self, batch)

    monkeypatch.setattr(dlinear, "capabilities", replace(dlinear.capabilities, rows_coupled=True))
    monkeypatch.setattr(dlinear, "forward", spy)
    frame = panel_frame()
    artifact, _ = fitted("dlinear", frame, window=WINDOW | {"min_observed": 0.3})
    assert {size % len(ENTITIES) for size, _ in seen} == {0}
    assert any(not bool(there.all()) for _, there in seen)
    found = predict(artifact, frame).table  # from one cutoff for all
    assert found["cutoff"].unique().to_list() == [299]
    assert found["mean"].is_finite().all()
    report = backtest(
        lambda visible, cutoff: artifact, frame, BacktestConfig(num_cutoffs=2, stride=10, baselines=()), horizon=4
    )
    assert report.forecasts["actual"].drop_nulls().len() > 0


# --- entities kept from the fit


def own_errors(artifact: Artifact, frame: SeriesFrame, span: tuple[int, int]) -> tuple[float, float]:
    """Return mean squared and absolute error over the windows of a frame, computed plainly."""
    seen = panel_frame().select_series([name for name in ENTITIES if name not in HELD_OUT]).table
    train = seen.filter(pl.col("time") < 210)
    unit = np.array([train[name].drop_nulls().to_numpy().std() for name in ("cases", "tests")])
    panel = Panel.from_frame(frame, grid=artifact.grid)
    windows = WindowDataset(panel, WindowSpec(**WINDOW, min_observed=0.5), *span)
    found = predict_windows(artifact.network, windows)
    assert found.target is not None
    assert found.mask is not None
    error = ((found.target - found.mean) / unit)[found.mask]
    return float((error**2).mean()), float(np.abs(error).mean())


@pytest.mark.parametrize("model", ["linear", "dlinear"])
def test_six_sets_of_errors_are_those_of_their_entities_and_spans(artifacts: dict[str, Artifact], model: str) -> None:
    artifact, frame = artifacts[model], panel_frame()
    groups = {"": [name for name in ENTITIES if name not in HELD_OUT], "_unseen": list(HELD_OUT)}
    spans = {"train": (0, 210), "valid": (210, 240), "test": (240, 300)}
    expected: dict[str, float] = {}
    for suffix, names in groups.items():
        for span, rows in spans.items():
            mse, mae = own_errors(artifact, frame.select_series(names), rows)
            expected |= {f"{span}{suffix}_mse": mse, f"{span}{suffix}_mae": mae}
    assert artifact.metrics == pytest.approx(expected, rel=1e-5)
    assert artifact.provenance["entities"] == {"held_out": list(HELD_OUT), "watch": "seen_valid"}


@pytest.mark.parametrize("model", ["linear", "dlinear"])
def test_a_fit_without_some_entities_is_the_fit_on_the_others(artifacts: dict[str, Artifact], model: str) -> None:
    others = panel_frame().select_series([name for name in ENTITIES if name not in HELD_OUT])
    alone, _ = fitted(model, others)
    held = artifacts[model]
    left, right = weights(held), weights(alone)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert held.calibration is not None
    assert alone.calibration is not None
    assert held.calibration.equals(alone.calibration)
    assert {name: held.metrics[name] for name in alone.metrics} == alone.metrics
    assert predict(held, others).table.equals(predict(alone, others).table)
    assert set(predict(held, panel_frame()).table["series_id"]) == set(ENTITIES)


@pytest.mark.parametrize(("model", "kind"), [("linear", "global"), ("dlinear", "global"), ("dlinear", "window")])
def test_values_of_held_out_entities_change_nothing_of_the_others(model: str, kind: str) -> None:
    settings = {
        "entities": {"held_out": list(HELD_OUT)},
        "scaling": {"kind": kind},
        "likelihood": {"name": "normal"},  # its spread comes from training residuals
        "train": FAST | {"max_epochs": 2},
    }
    plain, moved = (panel_frame(change) for change in (None, dict.fromkeys(HELD_OUT, 1e6)))
    before, after = (fitted(model, frame, **settings)[0] for frame in (plain, moved))
    left, right = before.network.state_dict(), after.network.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert before.calibration is not None
    assert after.calibration is not None
    assert before.calibration.equals(after.calibration)
    seen = [name for name in ENTITIES if name not in HELD_OUT]
    assert predict(before, plain.select_series(seen)).table.equals(predict(after, moved.select_series(seen)).table)
    own = [name for name in before.metrics if "unseen" not in name]
    assert {name: before.metrics[name] for name in own} == {name: after.metrics[name] for name in own}
    assert before.metrics["test_unseen_mae"] != after.metrics["test_unseen_mae"]


def test_covariates_of_held_out_entities_change_no_statistic() -> None:
    plain, moved = (panel_frame(change, covariates=True) for change in (None, dict.fromkeys(HELD_OUT, 1e6)))
    panels = [Panel.from_frame(frame) for frame in (plain, moved)]
    only = np.array([name not in HELD_OUT for name in panels[0].series_ids])
    first, second = (panel.training_series(None, 210, only) for panel in panels)
    assert first.past is not None
    for name, part in first._asdict().items():
        other = getattr(second, name)
        assert (part is None and other is None) or torch.equal(part.nan_to_num(7.0), other.nan_to_num(7.0)), name
    assert first.static is not None
    assert first.static[:, 0].isnan().tolist() == (~only).tolist()
    assert torch.diff(first.indptr)[torch.from_numpy(~only)].tolist() == [0, 0, 0]


SPANS = {"seen_valid": (210, 225), "unseen_valid": (210, 225), "seen_train": (0, 210), "unseen_train": (0, 210)}


@pytest.mark.parametrize("watch", list(SPANS))
def test_the_watched_loss_is_that_of_its_entities_and_span(watch: Any) -> None:
    frame = panel_frame()
    settings = {"entities": {"held_out": list(HELD_OUT), "watch": watch}, "train": FAST | {"learning_rate": 0.3}}
    artifact, training = fitted("dlinear", frame, **settings)
    names = HELD_OUT if watch.startswith("unseen") else [name for name in ENTITIES if name not in HELD_OUT]
    panel = Panel.from_frame(frame.select_series(names), grid=artifact.grid)
    windows = WindowDataset(panel, WindowSpec(**WINDOW, min_observed=0.5), *SPANS[watch])
    expected = evaluate_windows(artifact.network, windows, 512)
    assert training.metrics["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)
    losses = [row["valid_loss"] for row in training.history]
    assert training.best_epoch == int(np.argmin(losses))
    # what no epoch was chosen by is left for the intervals
    assert artifact.calibration is not None
    rows = (210, 240) if watch.endswith("train") else (225, 240)
    spec = WindowSpec(**WINDOW, min_observed=0.5)
    seen = Panel.from_frame(frame.select_series([name for name in ENTITIES if name not in HELD_OUT]))
    mask = next(iter(WindowDataset(seen, spec, *rows).batches(10_000))).target_mask
    assert mask is not None
    counts = artifact.calibration.filter(variate="cases", level=0.8).sort("step")["n"].to_list()
    assert counts == mask[:, :, 0].sum(dim=0).tolist()


def test_a_watch_that_nothing_follows_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fitted("linear", entities={"held_out": 0.3, "watch": "unseen_valid"})
    assert "entities.watch=unseen_valid has no effect: model 'linear' took no gradient steps" in caplog.text


def test_held_out_entities_that_a_span_lacks_are_not_graded_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        artifact, _ = fitted("linear", entities={"held_out": ["essen"]})
    assert {name for name in artifact.metrics if "unseen" in name} == {"train_unseen_mse", "train_unseen_mae"}
    assert "not graded: the valid span of the held-out series: no window fits" in caplog.text
    with pytest.raises(DataError, match=r"the valid span of the held-out series: .* longest of 1 series has 150"):
        fitted("dlinear", entities={"held_out": ["essen"], "watch": "unseen_valid"})
    with pytest.raises(ConfigError, match="watch is 'unseen_train', but there is no window of that kind"):
        fitted("dlinear", entities={"held_out": ["geneva"], "watch": "unseen_train"})
    with pytest.raises(ConfigError, match="watch is 'unseen_valid', but there is no window of that kind"):
        fitted(
            "dlinear",
            split={"train": 0.8, "valid": 0.0, "test": 0.2},
            entities={"held_out": ["berlin"], "watch": "unseen_valid"},
        )


def test_what_cannot_forecast_unknown_entities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"scaling 'series' .* none of the 2 held-out ones; choose scaling.kind=.*glob"
    ):
        fitted("dlinear", scaling={"kind": "series"}, entities={"held_out": 0.3})
    with pytest.raises(DataError, match=r"data lacks \(berln; did you mean 'berlin'\?\)"):
        fitted("linear", entities={"held_out": ["berln"]})
    with pytest.raises(DataError, match="leaves none to hold out"):
        fitted("linear", entities={"held_out": 0.01})
    with pytest.raises(DataError, match=r"one series \(athens\), so none can be held out"):
        fitted("linear", panel_frame().select_series(["athens"]), entities={"held_out": 0.5})
    dlinear = MODELS.get("dlinear")
    monkeypatch.setattr(dlinear, "capabilities", replace(dlinear.capabilities, rows_coupled=True))
    with pytest.raises(ConfigError, match="couples the series of a panel"):
        fitted("dlinear", entities={"held_out": 0.3})


# --- as a user meets it


def test_entities_are_held_out_by_dotted_keys_and_the_choice_is_stored(workspace_root: Path, tmp_path: Path) -> None:
    source = tmp_path / "cities.parquet"
    table().write_parquet(source)
    data = [
        "data=parquet",
        "data.name=cities",
        f"data.source.path={source}",
        "data.time=day",
        "data.series=entity",
        "data.targets=[cases,tests]",
        "data.freq=1i",
    ]
    workspace = Workspace.open()
    ingest(load(IngestConfig, "ingest", data), workspace)
    small = ["window.context_length=12", "window.horizon=4", "train.max_epochs=2", "tracking.enabled=false"]
    asked = ["model=dlinear", "train=fast", "entities.held_out=0.25", "entities.seed=1", "entities.watch=unseen_valid"]
    result: FitResult = fit(load(FitConfig, "fit", [*data, *asked, *small]), workspace)
    assert result.artifact.path is not None
    stored = load_artifact(result.artifact.path)
    chosen = stored.provenance["entities"]
    assert chosen["watch"] == "unseen_valid"
    assert len(chosen["held_out"]) == 2
    assert set(chosen["held_out"]) < set(ENTITIES)
    assert stored.series_ids == tuple(ENTITIES)
    assert result.summary()["valid_unseen_mse"] == stored.metrics["valid_unseen_mse"]
    named = load(FitConfig, "fit", [*data, "model=linear", "entities.held_out=[berlin,havana]", *small])
    assert fit(named, workspace).artifact.provenance["entities"]["held_out"] == ["berlin", "havana"]
    json.dumps(result.summary())


def test_some_series_of_a_joint_forecast_are_forecast_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "home"))
    table().write_parquet(tmp_path / "cities.parquet")
    data = ["data=parquet", "data.name=cities", f"data.source.path={tmp_path / 'cities.parquet'}", "data.layout=long"]
    data += ["data.time=day", "data.series=entity", "data.targets=[cases,tests]", "data.freq=1i"]
    workspace = Workspace.open()
    ingest(load(IngestConfig, "ingest", data), workspace)
    model = ["model=regenn", "model.attend=entities", "model.ff_dim=8", "train=fast", "train.max_epochs=2"]
    model += ["train.learning_rate=0.02", "train.start_margin=0", "window.context_length=12", "window.horizon=4"]
    fit(load(FitConfig, "fit", [*data, *model, "train.batch_size=8", "tracking.enabled=false"]), workspace)
    for asked in ([], ["paths=3"], ["aggregate=sum"]):
        whole = forecast_stored(load(PredictConfig, "predict", asked), workspace).answer
        some = forecast_stored(load(PredictConfig, "predict", [*asked, "series=[cairo,berlin]"]), workspace).answer
        assert some.equals(whole.filter(pl.col("series_id").is_in(["berlin", "cairo"])))
        assert set(some["series_id"]) == {"berlin", "cairo"}
    with pytest.raises(DataError, match="no forecast of essen: all series are forecast from one cutoff"):
        forecast_stored(load(PredictConfig, "predict", ["series=[essen,cairo]"]), workspace)
    with pytest.raises(DataError, match="nowhere"):
        forecast_stored(load(PredictConfig, "predict", ["series=[nowhere]"]), workspace)
    with pytest.raises(ConfigError, match="forecasts all series together.*leave series out"):
        detect(load(DetectJobConfig, "detect", ["series=[cairo]"]), workspace)
