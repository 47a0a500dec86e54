"""Sample paths from a fit to a table: published marginals, totals that cover, scores, storage, and no look ahead."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import tsforge.app.fit as fit_module
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.forecast import PredictConfig
from tsforge.artifact import Artifact, load_artifact, save_artifact
from tsforge.cli import app
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.dependence import (
    Dependence,
    artifact_dependence,
    estimate_dependence,
    independent,
    marginal_levels,
)
from tsforge.forecasting.predict import predict
from tsforge.forecasting.report import load_report
from tsforge.forecasting.sample_paths import (
    SCORED_WINDOWS,
    Aggregate,
    draw_paths,
    joint_scores,
    path_scores,
    predict_paths,
)

PHI, STEPS, ROWS = 0.9, 12, 3000
VALID_STOP = 2100  # rows of the training and the validation span


def autoregression(rows: int = ROWS, seed: int = 1) -> np.ndarray:
    """AR(1) with unit innovations, in its stationary state."""
    noise = np.random.default_rng(seed).normal(size=rows + 200)
    values = np.zeros(rows + 200)
    for row in range(1, rows + 200):
        values[row] = PHI * values[row - 1] + noise[row]
    return values[200:]


def as_frame(columns: dict[str, np.ndarray], series: str = "a") -> SeriesFrame:
    rows = len(next(iter(columns.values())))
    table = pl.DataFrame({"series_id": [series] * rows, "time": np.arange(rows), **columns})
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=list(columns))


def settings(**changes: Any) -> FitConfig:
    plain = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": 24, "horizon": STEPS},
        "split": {"train": 0.4, "valid": 0.3, "test": 0.3},
    }
    return validate(FitConfig, plain | changes)


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    return as_frame({"y": autoregression()})


@pytest.fixture(scope="module")
def artifact(frame: SeriesFrame) -> Artifact:
    return fit_frame(frame, settings())[0]


def error_correlation() -> tuple[np.ndarray, np.ndarray]:
    """Correlation and standard deviation of the errors of the optimal forecast of an AR(1) over the steps."""
    step = np.arange(1, STEPS + 1)
    variance = (1 - PHI ** (2 * step)) / (1 - PHI**2)
    early, late = np.minimum.outer(step, step), np.maximum.outer(step, step)
    covariance = PHI ** (late - early) * variance[early - 1]
    deviation = np.sqrt(variance)
    return covariance / np.outer(deviation, deviation), deviation


def test_the_dependence_of_an_autoregression_comes_back(artifact: Artifact) -> None:
    truth, deviation = error_correlation()
    found = artifact_dependence(artifact)
    assert found.kind == "gaussian"
    assert 50 < found.effective < 80
    assert np.abs(found.correlation() - truth).mean() < 0.08
    total = np.sqrt(deviation @ found.correlation() @ deviation)
    assert total == pytest.approx(np.sqrt(deviation @ truth @ deviation), rel=0.08)
    assert np.sqrt(deviation @ deviation) < 0.5 * total  # what independent steps would say


def test_paths_have_the_published_quantiles(artifact: Artifact, frame: SeriesFrame) -> None:
    forecast = predict_paths(artifact, frame, 400, seed=3)
    assert forecast.paths is not None
    assert forecast.paths.height == 400 * STEPS
    assert forecast.answer is forecast.paths
    for level in forecast.quantile_levels:
        found = forecast.paths.group_by("step", maintain_order=True).agg(pl.col("value").quantile(level, "linear"))
        spread = (forecast.table["q0.95"] - forecast.table["q0.05"]).to_numpy()
        gap = (found["value"].to_numpy() - forecast.table[f"q{level:g}"].to_numpy()) / spread
        assert np.abs(gap).max() < 0.01, level
    truth, _ = error_correlation()
    wide = forecast.paths.pivot(on="step", index="path", values="value").drop("path").to_numpy()
    assert np.abs(np.corrcoef(wide, rowvar=False) - truth).mean() < 0.12


@pytest.mark.parametrize("kind", ["gaussian", "empirical"])
def test_intervals_of_totals_cover_and_those_of_independent_steps_do_not(frame: SeriesFrame, kind: str) -> None:
    fitted = fit_frame(frame, settings(calibration={"dependence": kind}))[0]
    levels = marginal_levels(fitted)
    cutoffs = np.arange(VALID_STOP, ROWS - STEPS, 3)
    table = forecasts_at(fitted, frame, cutoffs, steps=STEPS, levels=levels)
    quantiles = np.stack([table[f"q{level:g}"].to_numpy() for level in levels], axis=-1)
    quantiles = quantiles.reshape(len(cutoffs), STEPS, 1, -1)
    actual = table["actual"].to_numpy().reshape(len(cutoffs), STEPS).sum(axis=1)
    joint = artifact_dependence(fitted)
    assert joint.kind == kind
    apart = independent(STEPS, 1)
    inside = {}
    for name, dependence in (("joint", joint), ("apart", apart)):
        totals = draw_paths(quantiles, levels, dependence, 300, range(len(cutoffs)))[..., 0].sum(axis=-1)
        low, high = np.quantile(totals, [0.05, 0.95], axis=1)
        inside[name] = ((actual >= low) & (actual <= high)).mean()
    assert inside["joint"] == pytest.approx(0.9, abs=0.06)  # about 75 windows without overlap
    assert inside["apart"] < 0.65
    scores = {name: path_scores(table, levels, item, ("y",)) for name, item in (("joint", joint), ("apart", apart))}
    assert scores["joint"]["energy"].mean() < scores["apart"]["energy"].mean()
    assert scores["joint"]["variogram"].mean() < 0.7 * scores["apart"]["variogram"].mean()


def test_totals_come_from_the_paths(artifact: Artifact, frame: SeriesFrame) -> None:
    paths = predict_paths(artifact, frame, 500, seed=1).paths
    assert paths is not None
    names: tuple[Aggregate, ...] = ("sum", "mean", "max", "min")
    for name in names:
        forecast = predict_paths(artifact, frame, 500, seed=1, aggregate=name, quantile_levels=(0.1, 0.9))
        row = forecast.answer.row(0, named=True)
        values = paths.group_by("path").agg(getattr(pl.col("value"), name)())["value"].to_numpy()
        assert row["mean"] == pytest.approx(values.mean())
        assert [row["q0.1"], row["q0.9"]] == pytest.approx(np.quantile(values, [0.1, 0.9]))
        assert (row["steps"], row["first_time"], row["last_time"]) == (STEPS, ROWS, ROWS + STEPS - 1)
    short = predict_paths(artifact, frame, 100, aggregate="sum", horizon=3).answer.row(0, named=True)
    assert (short["steps"], short["last_time"]) == (3, ROWS + 2)


def test_paths_depend_on_the_seed_and_not_on_the_other_series(artifact: Artifact, frame: SeriesFrame) -> None:
    both = pl.concat([frame.table, frame.table.with_columns(pl.lit("b").alias("series_id"))])
    two = SeriesFrame.from_long(both, time="time", series_id="series_id", targets=["y"])
    fitted = fit_frame(two, settings())[0]

    def drawn(data: SeriesFrame, seed: int = 5) -> pl.DataFrame:
        found = predict_paths(fitted, data, 20, seed=seed).paths
        assert found is not None
        return found

    alone, together = drawn(two.select_series(["b"])), drawn(two)
    np.testing.assert_allclose(alone["value"], together.filter(series_id="b")["value"], atol=1e-4)
    assert not together.filter(series_id="a")["value"].equals(together.filter(series_id="b")["value"])
    other = drawn(two.select_series(["b"]), seed=6)
    assert np.abs(alone["value"].to_numpy() - other["value"].to_numpy()).max() > 1.0


@pytest.mark.parametrize("likelihood", ["normal", "student_t", "quantiles"])
def test_an_uncalibrated_likelihood_gives_paths_too(frame: SeriesFrame, likelihood: str) -> None:
    config = settings(likelihood={"name": likelihood}, calibration={"enabled": False})
    fitted = fit_frame(frame, config)[0]
    assert fitted.calibration is None
    forecast = predict_paths(fitted, frame, 1000, quantile_levels=(0.1, 0.5, 0.9))
    assert forecast.paths is not None
    found = forecast.paths.group_by("step", maintain_order=True).agg(pl.col("value").quantile(0.9, "linear"))
    np.testing.assert_allclose(found["value"], forecast.table["q0.9"], atol=0.02)


def test_variates_are_drawn_together(frame: SeriesFrame) -> None:
    y = frame.table["y"].to_numpy()
    other = y + np.random.default_rng(0).normal(0, 0.2, ROWS)
    data = as_frame({"y": y, "z": other})
    found = predict_paths(fit_frame(data, settings())[0], data, 300).paths
    assert found is not None
    totals = found.group_by("path", "variate").agg(pl.col("value").sum()).pivot(on="variate", index="path")
    assert np.corrcoef(totals["y"], totals["z"])[0, 1] > 0.85


def test_an_artifact_keeps_its_dependence_and_older_ones_have_none(
    artifact: Artifact, frame: SeriesFrame, tmp_path: Path
) -> None:
    stored = save_artifact(artifact, tmp_path)
    assert stored.path is not None
    assert (stored.path / "dependence.safetensors").stat().st_size < 10_000
    again = load_artifact(stored.path)
    first, second = (predict_paths(item, frame, 50).answer for item in (artifact, again))
    np.testing.assert_allclose(first["value"], second["value"], atol=1e-4)
    older = load_artifact(save_artifact(replace(artifact, id="older", dependence=None), tmp_path).path or tmp_path)
    assert older.dependence is None
    assert predict(older, frame).table.height == STEPS
    with pytest.raises(ConfigError, match=r"calibration\.dependence=gaussian"):
        predict_paths(older, frame)


def test_what_cannot_be_estimated_is_said(frame: SeriesFrame, caplog: pytest.LogCaptureFixture) -> None:
    assert fit_frame(frame, settings(calibration={"dependence": "none"}))[0].dependence is None
    short = as_frame({"y": autoregression(200)})
    with caplog.at_level(logging.WARNING):
        fitted = fit_frame(short, settings(split={"train": 0.85, "valid": 0.15, "test": 0.0}))[0]
    assert fitted.dependence is None
    assert "no sample paths and totals" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_frame(frame, settings(calibration={"enabled": False, "dependence": "empirical"}))
    assert "calibration.dependence=empirical has no effect" in caplog.text


def test_more_steps_or_no_paths_are_refused(artifact: Artifact, frame: SeriesFrame) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        predict_paths(artifact, frame, 0)
    for wrong, message in (({"seed": 1}, "no effect"), ({"paths": 5, "rollout": True}, "no paths")):
        with pytest.raises(ConfigError, match=message):
            validate(PredictConfig, wrong)
    table = predict(artifact, frame).table.with_columns(pl.lit(0.0).alias("actual"))
    with pytest.raises(DataError, match="every window needs all cells"):
        path_scores(
            table.head(STEPS - 1).vstack(table.with_columns(pl.lit("b").alias("series_id"))).drop("mean"),
            (0.1, 0.5, 0.9),
            artifact_dependence(artifact),
            ("y",),
        )


def test_a_backtest_reports_calibration_and_the_horizon_as_a_whole(frame: SeriesFrame, tmp_path: Path) -> None:
    config = settings(split={"train": 0.6, "valid": 0.4, "test": 0.0})
    report = backtest(
        lambda visible, cutoff: fit_frame(visible, config)[0],
        frame,
        BacktestConfig(num_cutoffs=40, refit_every=20),
        horizon=STEPS,
    )
    fits = report.folds.filter(model="linear")
    assert fits["joint_windows"].to_list() == [20, 20]
    row = report.leaderboard.filter(model="linear").row(0, named=True)
    assert row["energy"] == pytest.approx(fits["energy"].mean())
    assert row["energy"] < row["energy_apart"]
    assert row["variogram"] < 0.7 * row["variogram_apart"]
    assert report.leaderboard.filter(model="last_value")["energy"].to_list() == [None]
    mine = report.forecasts.filter(model="linear")
    table = report.pit.filter(model="linear")
    assert table["count"].sum() == pytest.approx(40 * STEPS)
    below = table.filter(pl.col("high") <= 0.5)["count"].sum() / (40 * STEPS)
    assert below == pytest.approx((mine["actual"] <= mine["q0.5"]).mean())
    page = report.markdown()
    assert "## Calibration" in page
    assert "## The horizon as a whole" in page
    saved = report.save(tmp_path / "report")
    assert load_report(saved.path or tmp_path).pit.equals(report.pit)


def test_scored_windows_do_not_grow_with_the_backtest(artifact: Artifact, frame: SeriesFrame) -> None:
    levels = marginal_levels(artifact)
    table = forecasts_at(artifact, frame, np.arange(VALID_STOP, VALID_STOP + 100), steps=STEPS, levels=levels)
    found = joint_scores(artifact, table, levels)
    assert found["joint_windows"] == SCORED_WINDOWS
    assert joint_scores(artifact, table, levels[:2])["joint_windows"] == 0


Fit = Callable[[SeriesFrame], Artifact]


def assert_no_look_ahead(fit: Fit, values: np.ndarray) -> None:
    """Check that nothing after the validation span reaches the dependence, the paths or the totals at its end."""
    changed = values.copy()
    changed[VALID_STOP:] = 50.0 * np.random.default_rng(0).normal(size=ROWS - VALID_STOP)
    found = []
    for column in (values, changed):
        data = as_frame({"y": column})
        fitted = fit(data)
        assert fitted.dependence is not None
        found.append((fitted.dependence, predict_paths(fitted, data, 20, cutoff=VALID_STOP - 1).answer))
    for name, stored in found[0][0].items():
        np.testing.assert_array_equal(stored, found[1][0][name], err_msg=f"{name} saw what came after the cutoff")
    assert found[0][1].equals(found[1][1])


def fitted_on(data: SeriesFrame) -> Artifact:
    return fit_frame(data, settings())[0]


def test_nothing_after_the_cutoff_reaches_the_paths() -> None:
    assert_no_look_ahead(fitted_on, autoregression())


def test_a_dependence_that_looks_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur estimates on all windows up to the end of the data, the test span among them."""

    def leaky(artifact: Artifact, windows: WindowDataset, kind: Any) -> Dependence | None:
        panel: Panel = windows.panel
        first, stop = panel.span()
        return estimate_dependence(artifact, WindowDataset(panel, artifact.window, first + 24, stop), kind)

    monkeypatch.setattr(fit_module, "estimate_dependence", leaky)
    with pytest.raises(AssertionError, match="saw what came after the cutoff"):
        assert_no_look_ahead(fitted_on, autoregression())


def test_the_command_line_prints_and_writes_paths_and_totals(
    fitted_site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSFORGE_HOME", str(fitted_site.home))
    run = CliRunner()
    target = tmp_path / "paths.parquet"
    arguments = ["predict", f"artifact={fitted_site.artifact}", "--home", str(fitted_site.home)]
    written = run.invoke(app, [*arguments, "paths=7", "seed=2", "--output", str(target)])
    assert written.exit_code == 0, written.output
    table = pl.read_parquet(target)
    assert table.columns == ["series_id", "cutoff", "step", "time", "variate", "path", "value"]
    assert table["path"].n_unique() == 7
    told = run.invoke(app, [*arguments, "aggregate=sum", "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout.splitlines()[-1])["rows"]
    assert {row["aggregate"] for row in rows} == {"sum"}
    assert len(rows) == 4
