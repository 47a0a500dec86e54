"""Backtests end to end: leakage of any registered model, refits, grades against loops, baselines, the stored report."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, Fit, backtest
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.conformal_calibration import calibrate
from tsforge.forecasting.report import load_report
from tsforge.models.registry import MODELS
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

START = datetime(2024, 1, 1)
WINDOW = WindowSpec(context_length=24, horizon=6)


def make_frame(rows: int = 300, seed: int = 0) -> SeriesFrame:
    rng = np.random.default_rng(seed)
    hour = np.arange(rows)
    parts = []
    for number, name in enumerate(("a", "b")):
        y = 5.0 * number + 2.0 * np.sin(2 * np.pi * hour / 24) + rng.normal(0, 0.3, rows).cumsum() * 0.3
        table = pl.DataFrame({"series_id": [name] * rows, "time": [START + timedelta(hours=int(h)) for h in hour]})
        parts.append(table.with_columns(y=pl.Series(y), z=pl.Series(rng.normal(0, 1, rows))))
    table = pl.concat(parts)
    gap = (pl.col("series_id") == "b") & (pl.col("time") == START + timedelta(hours=rows - 3))
    return SeriesFrame.from_long(
        table.with_columns(pl.when(~gap).then(pl.col("y")).alias("y")),
        time="time",
        series_id="series_id",
        targets=["y", "z"],
    )


def fit_any(name: str, seen: list[Any] | None = None, **settings: Any) -> Fit:
    """Return a fit of a registered model: closed form, or two quick epochs."""
    network = validate(NetworkConfig, {"model": {"name": name, **settings}})

    def fit(frame: SeriesFrame, cutoff: Any) -> Artifact:
        if seen is not None:
            seen.append((cutoff, frame.table["time"].max()))
        panel = Panel.from_frame(frame)
        series = panel.training_series(None, None)
        if name == "auto":
            return mixture(frame)
        built = fit_solved_or_none(frame, network)
        if built is not None:
            return built
        from tsforge.artifact import collect_provenance, create_artifact
        from tsforge.contracts.tensors import DataSpec

        spec = DataSpec(
            context_length=WINDOW.context_length,
            horizon=WINDOW.horizon,
            num_variates=2,
            train_length=panel.span()[1],
        )
        fitted = build_network(network, spec)
        windows = WindowDataset(panel, WINDOW, aligned=fitted.capabilities.rows_coupled)
        fit_network(
            fitted, windows, None, TrainConfig(max_epochs=1, max_steps_per_epoch=3), series=series, progress=False
        )
        return create_artifact(
            fitted,
            config={},
            schema=frame.schema,
            grid=panel.grid,
            series_ids=panel.series_ids,
            window=WINDOW,
            provenance=collect_provenance(data_fingerprint="", seeds={}),
        )

    return fit


def mixture(frame: SeriesFrame) -> Artifact:
    """Return the choice among a few quick models; ``tests/integration/test_auto.py`` looks at it more closely."""
    from tsforge.app.fit import FitConfig, fit_frame

    model = {"name": "auto", "minutes": 0, "folds": 1, "candidates": ["last_value", "ar_net"]}
    data = {"name": "made", "source": {"kind": "csv", "path": "made.csv"}, "time": "time", "targets": ["y", "z"]}
    window = {"context_length": WINDOW.context_length, "horizon": WINDOW.horizon}
    split = {"train": 0.85, "valid": 0.15, "test": 0.0}
    return fit_frame(frame, validate(FitConfig, {"data": data, "model": model, "window": window, "split": split}))[0]


def fit_solved_or_none(frame: SeriesFrame, network: NetworkConfig) -> Artifact | None:
    from tsforge.core.errors import ModelError

    try:
        return fit_solved(frame, network, WINDOW)
    except ModelError as error:
        if "gradient" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", MODELS.names())
def test_perturbing_the_future_changes_no_forecast(name: str) -> None:
    """Values after a cutoff may change the grades of its forecasts, never the forecasts."""
    frame = make_frame()
    config = BacktestConfig(num_cutoffs=3, stride=12, refit_every=2)
    before = backtest(fit_any(name), frame, config, horizon=6).forecasts
    last = pl.lit(before["cutoff"].max())
    rng = np.random.default_rng(1)
    noise = pl.Series("noise", rng.normal(0, 100, frame.num_rows))
    table = frame.table.with_columns(noise)
    spoiled = table.with_columns(
        pl.when(pl.col("time") > last).then(pl.col(n) + pl.col("noise")).otherwise(pl.col(n)).alias(n)
        for n in ("y", "z")
    )
    after = backtest(fit_any(name), SeriesFrame(spoiled.drop("noise"), frame.schema), config, horizon=6).forecasts
    assert before.drop("actual").equals(after.drop("actual"))
    assert not before["actual"].equals(after["actual"])
    middle = before["cutoff"].unique().sort()[1]  # and for earlier cutoffs, whatever follows them
    spoiled = table.with_columns(
        pl.when(pl.col("time") > pl.lit(middle)).then(pl.col("y") + pl.col("noise")).otherwise(pl.col("y")).alias("y")
    )
    after = backtest(fit_any(name), SeriesFrame(spoiled.drop("noise"), frame.schema), config, horizon=6).forecasts
    early = pl.col("cutoff") <= middle
    assert before.filter(early).drop("actual").equals(after.filter(early).drop("actual"))
    assert not before.filter(~early)["mean"].equals(after.filter(~early)["mean"])


@pytest.mark.parametrize(("every", "fits"), [(0, 1), (1, 5), (2, 3), (3, 2)])
def test_fits_see_nothing_after_their_cutoff(every: int, fits: int) -> None:
    seen: list[Any] = []
    report = backtest(
        fit_any("linear", seen), make_frame(), BacktestConfig(num_cutoffs=5, refit_every=every), horizon=6
    )
    assert len(seen) == fits
    assert all(cutoff == last for cutoff, last in seen)
    cutoffs = report.forecasts["cutoff"].unique().sort()
    assert cutoffs.to_list()[:: every or 5] == [cutoff for cutoff, _ in seen]
    assert cutoffs.diff().drop_nulls().unique().to_list() == [timedelta(hours=6)]
    assert cutoffs[-1] + timedelta(hours=6) == report.forecasts["time"].max()
    assert report.folds.filter(model="linear")["num_cutoffs"].sum() == 5


def test_grades_equal_a_loop_over_the_frame() -> None:
    frame = make_frame()
    report = backtest(
        fit_any("last_value"), frame, BacktestConfig(num_cutoffs=4, baselines=("seasonal_naive",)), horizon=6
    )
    lookup = {
        (row["series_id"], row["time"], name): row[name]
        for row in frame.table.iter_rows(named=True)
        for name in ("y", "z")
    }
    hour = timedelta(hours=1)
    first = min(report.forecasts["cutoff"])
    errors: dict[str, list[float]] = {"last_value": [], "seasonal_naive": []}
    scaled: list[float] = []
    times = frame.table.filter(series_id="a")["time"]
    for series in ("a", "b"):
        for variate in ("y", "z"):
            known = [lookup[series, time, variate] for time in times if time <= first]
            unit = np.mean([abs(x - y) for x, y in zip(known[24:], known, strict=False)])
            for number in range(4):
                cutoff = first + 6 * number * hour
                for step in range(1, 7):
                    actual = lookup[series, cutoff + step * hour, variate]
                    if actual is None:
                        continue
                    naive = abs(actual - lookup[series, cutoff, variate])
                    errors["last_value"].append(naive)
                    errors["seasonal_naive"].append(abs(actual - lookup[series, cutoff + (step - 24) * hour, variate]))
                    scaled.append(naive / unit)
    board = {row["model"]: row for row in report.leaderboard.iter_rows(named=True)}
    assert len(scaled) == 2 * 2 * 4 * 6 - 1
    for name, found in errors.items():
        assert board[name]["count"] == len(found)
        assert board[name]["mae"] == pytest.approx(np.mean(found), rel=1e-5)
        assert board[name]["mse"] == pytest.approx(np.mean(np.square(found)), rel=1e-5)
    assert board["last_value"]["mase"] == pytest.approx(np.mean(scaled), rel=1e-5)
    skill = 1 - np.mean(errors["last_value"]) / np.mean(errors["seasonal_naive"])
    assert board["last_value"]["skill_mae"] == pytest.approx(skill, rel=1e-4)
    assert board["seasonal_naive"]["skill_mae"] == 0.0
    per_step = report.metrics.filter(model="last_value", scope="step", metric="mae").sort("step")
    assert per_step["count"].sum() == len(scaled)
    weights = per_step["count"] / len(scaled)
    assert (per_step["value"] * weights).sum() == pytest.approx(np.mean(errors["last_value"]), rel=1e-5)


def test_naive_forecasts_are_always_there_with_intervals() -> None:
    report = backtest(fit_any("linear"), make_frame(), BacktestConfig(num_cutoffs=6), horizon=6)
    assert set(report.leaderboard["model"]) == {"linear", "last_value", "seasonal_naive", "drift"}
    assert report.settings["season_length"] == 24
    assert report.settings["reference"] == "seasonal_naive"
    naive = report.leaderboard.filter(model="drift").row(0, named=True)
    assert naive["crps"] > 0
    assert 0.5 < naive["coverage_90"] <= 1
    point = report.leaderboard.filter(model="linear").row(0, named=True)
    assert point["crps"] is None
    assert BacktestConfig(baselines=()).baselines == ("last_value",)
    with pytest.raises(ConfigError, match="unknown baseline"):
        validate(BacktestConfig, {"baselines": ["magic"]})


def test_calibrated_intervals_of_a_real_forecaster_cover() -> None:
    def fit(frame: SeriesFrame, cutoff: Any) -> Artifact:
        from dataclasses import replace

        panel = Panel.from_frame(frame)
        start = panel.span()[1] - 120
        artifact = fit_solved(
            frame.until(panel.grid.time_at(start - 1)), validate(NetworkConfig, {"model": "linear"}), WINDOW
        )
        windows = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), WINDOW, start, None)
        return replace(artifact, calibration=calibrate(artifact.network, windows, (0.1, 0.5, 0.9)))

    report = backtest(fit, make_frame(900, seed=3), BacktestConfig(num_cutoffs=60, refit_every=20), horizon=6)
    row = report.leaderboard.filter(model="linear").row(0, named=True)
    assert 0.74 < row["coverage_80"] < 0.86
    assert row["skill_crps"] > 0
    assert report.settings["quantile_levels"]["linear"] == [0.1, 0.5, 0.9]


def test_only_windows_that_every_model_has_are_graded() -> None:
    frame = make_frame()
    late = frame.table.filter(
        (pl.col("series_id") == "a")
        | (pl.col("time") >= pl.lit(START + timedelta(hours=255)).dt.replace_time_zone("UTC"))
    )
    report = backtest(
        {"short": fit_any("last_value"), "long": fit_any("linear")},
        SeriesFrame(late, frame.schema),
        BacktestConfig(num_cutoffs=6, season_length=3),
        horizon=6,
    )
    counts = report.leaderboard["count"].unique().to_list()
    assert len(counts) == 1
    assert any("are not graded" in note for note in report.notes)
    assert set(report.leaderboard["model"]) == {"short", "long", "last_value", "seasonal_naive", "drift"}


def test_constant_series_have_no_scaled_error_and_a_note() -> None:
    frame = make_frame()
    flat = SeriesFrame(frame.table.with_columns(z=pl.lit(4.0)), frame.schema)
    report = backtest(fit_any("last_value"), flat, BacktestConfig(num_cutoffs=2), horizon=6)
    assert any("MASE is undefined for 2 of 4" in note for note in report.notes)
    scaled = report.metrics.filter(model="last_value", scope="variate", metric="mase", variate="z")
    assert scaled["value"].to_list() == [None]
    assert scaled["count"].to_list() == [0]


def test_too_many_cutoffs_say_how_many_fit() -> None:
    with pytest.raises(
        DataError, match=r"100 cutoffs 6 steps apart with horizon 6 need 601 rows, the data has 300 .* at most 49"
    ):
        backtest(fit_any("last_value"), make_frame(), BacktestConfig(num_cutoffs=100), horizon=6)
    with pytest.raises(ConfigError, match="horizon 9 is beyond the 6 steps"):
        backtest(fit_any("last_value"), make_frame(), BacktestConfig(num_cutoffs=2, horizon=9), horizon=6)
    with pytest.raises(ConfigError, match="no model"):
        backtest({}, make_frame(), horizon=6)


def test_the_report_is_stored_whole_and_read_back(tmp_path: Path) -> None:
    report = backtest(fit_any("linear"), make_frame(), BacktestConfig(num_cutoffs=3), horizon=6)
    saved = report.save(tmp_path / "report")
    back = load_report(saved.path)
    for name in ("forecasts", "metrics", "leaderboard", "folds"):
        assert getattr(back, name).equals(getattr(report, name))
    assert back.summary() == saved.summary()
    assert json.loads((saved.path / "report.json").read_text())["settings"]["horizon"] == 6
    page = (saved.path / "report.md").read_text()
    assert "| linear |" in page
    assert "by step" in page
    with pytest.raises(BackendError, match="exists already"):
        report.save(saved.path)
    (saved.path / "metrics.parquet").unlink()
    with pytest.raises(BackendError, match=r"metrics\.parquet missing"):
        load_report(saved.path)


def test_notes_name_series_that_are_not_graded_and_covariates_that_were_missing() -> None:
    """``a`` goes on, ``b`` ends before the first cutoff, one known value of ``a`` ahead of a cutoff is missing."""
    rng = np.random.default_rng(0)
    parts = []
    for name, rows in (("a", 300), ("b", 200)):
        promo = rng.random(rows)
        table = pl.DataFrame({"series_id": [name] * rows, "time": [START + timedelta(hours=h) for h in range(rows)]})
        parts.append(table.with_columns(y=pl.Series(rng.normal(size=rows) + 3 * promo), promo=pl.Series(promo)))
    hole = (pl.col("series_id") == "a") & (pl.col("time") == START + timedelta(hours=290))
    table = pl.concat(parts).with_columns(pl.when(~hole).then(pl.col("promo")).alias("promo"))
    frame = SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"], known=["promo"])
    network = validate(NetworkConfig, {"model": {"name": "ar_net", "lags": 6}})

    def fit(visible: SeriesFrame, cutoff: Any) -> Artifact:
        return fit_solved(visible, network, WINDOW)

    settings = {"num_cutoffs": 5, "stride": 6, "baselines": ["last_value"], "regimes": []}
    report = backtest({"ar": fit}, frame, validate(BacktestConfig, settings), horizon=6)
    assert any(note.startswith("1 of 2 series are not graded") and note.endswith(": b") for note in report.notes)
    told = [note for note in report.notes if "no value of a known covariate" in note]
    assert len(told) == 1
    lacking = int(report.folds.filter(model="ar")["known_missing"].sum())
    assert told[0].startswith(f"ar: {lacking} forecast rows")
    rows = report.forecasts.filter(model="ar").select("series_id", "cutoff", "time").unique()
    hour = pl.lit(START + timedelta(hours=290)).dt.replace_time_zone("UTC")
    gone = rows.filter(series_id="b").height  # rows of ``b`` after its end, which has no covariates either
    assert lacking == gone + rows.filter(pl.col("time") == hour, series_id="a").height
    whole = SeriesFrame.from_long(
        table.filter(pl.col("series_id") == "a").with_columns(pl.col("promo").fill_null(0.5)),
        time="time",
        series_id="series_id",
        targets=["y"],
        known=["promo"],
    )
    assert backtest({"ar": fit}, whole, validate(BacktestConfig, settings), horizon=6).notes == ()
