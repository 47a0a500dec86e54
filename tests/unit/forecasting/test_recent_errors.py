"""Margins in units of recent errors: the unit against a loop of forecasts, coverage in calm and storm, no leak."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from streamed_data import untrained

import tsforge.forecasting.recent_errors as recent_module
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact, load_artifact, save_artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.vintages import VintageFrame
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal import apply_calibration
from tsforge.forecasting.conformal_calibration import Choices, calibrate
from tsforge.forecasting.predict import artifact_panel, predict
from tsforge.forecasting.recent_errors import PRIOR, earlier_cutoffs, known_steps, recent_errors, recent_unit
from tsforge.testing.vintages import revised_table

START = datetime(2024, 1, 1)
LEVELS = (0.1, 0.5, 0.9)


def hours(count: int) -> datetime:
    return START + timedelta(hours=count)


def loop_of_forecasts(
    artifact: Artifact, frame: SeriesFrame, series: str, cutoff: int, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of weighted errors and of weights [H, V] from one published forecast after the other."""
    coupled = artifact.network.capabilities.rows_coupled
    mine = frame.table.filter(series_id=series)
    given = frame if coupled else SeriesFrame(mine, frame.schema)
    actual = {(row["time"].replace(tzinfo=None), name): row[name] for row in mine.to_dicts() for name in ("y", "z")}
    begin = min(time for time, _ in actual)
    total, weight = np.zeros((6, 2)), np.zeros((6, 2))
    for back in range(2, 65, 2):  # eight horizons of 6 are fewer than 64 rows
        last = hours(cutoff - back - 1)
        context = [last - timedelta(hours=k) for k in range(48)]
        if context[-1] < begin or all(actual.get((time, name)) is None for time in context for name in "yz"):
            continue
        table = predict(artifact, given, cutoff=last).table.filter(series_id=series)
        for row in table.to_dicts():
            at, step, place = row["time"].replace(tzinfo=None), row["step"], "yz".index(row["variate"])
            value = actual.get((at, row["variate"]))
            if at < hours(cutoff) and at >= hours(first_row) and value is not None:
                share = 0.5 ** (back / 16)
                total[step - 1, place] += share * abs(value - row["mean"])
                weight[step - 1, place] += share
    return total, weight


@pytest.mark.parametrize("first_row", [None, 245])
def test_recent_errors_equal_a_loop_of_forecasts(frame, make_artifact, first_row: int | None) -> None:
    artifact = make_artifact("linear")
    panel = artifact_panel(artifact, frame)
    places = [("a", 250), ("c", 255), ("c", 225), ("b", 85), ("b", 60), ("a", 251), ("b", 300)]
    series = np.array([panel.series_ids.index(name) for name, _ in places])
    cutoff = np.array([row for _, row in places])
    total, weight = recent_errors(artifact.network, panel, artifact.window, series, cutoff, first_row=first_row)
    for number, (name, row) in enumerate(places):
        sums, weights = loop_of_forecasts(artifact, frame, name, row, first_row or 0)
        assert weight[number] == pytest.approx(weights, abs=1e-12)
        assert total[number] == pytest.approx(sums, rel=1e-4, abs=1e-5)
    assert (weight[4] == 0).all()  # 30 rows of history
    full = earlier_cutoffs(6)[1].sum() if first_row is None else weight[0, 0, 0]
    assert weight[0, 0] == pytest.approx(full)
    if first_row is None:
        assert (weight[2] < weight[0]).all()  # the hole of series c


def test_recent_errors_of_coupled_series_equal_a_loop_of_forecasts(frame) -> None:
    artifact = untrained(frame, {"name": "regenn", "attend": "entities", "ff_dim": 8})
    assert artifact.network.capabilities.rows_coupled
    panel = artifact_panel(artifact, frame)
    series, cutoff = np.array([0, 1, 2, 0]), np.array([255, 255, 255, 200])
    total, weight = recent_errors(artifact.network, panel, artifact.window, series, cutoff)
    for number, name in enumerate("abca"):
        sums, weights = loop_of_forecasts(artifact, frame, name, int(cutoff[number]))
        assert weight[number] == pytest.approx(weights, abs=1e-12)
        assert total[number] == pytest.approx(sums, rel=1e-4)


def test_work_in_parts_changes_nothing(frame, make_artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact("linear")
    panel = artifact_panel(artifact, frame)
    series, cutoff = np.array([2, 0, 1, 0, 2]), np.array([300, 310, 320, 100, 299])
    whole = recent_errors(artifact.network, panel, artifact.window, series, cutoff)
    monkeypatch.setattr(recent_module, "_CELLS", 1)
    parts = recent_errors(artifact.network, panel, artifact.window, series, cutoff)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert np.array_equal(parts[1], whole[1])


def test_earlier_cutoffs_and_the_unit_have_closed_forms() -> None:
    back, weight = earlier_cutoffs(24)
    assert back.tolist() == list(range(6, 193, 6))
    assert weight == pytest.approx(0.5 ** (back / 48))
    assert earlier_cutoffs(1)[0].tolist() == list(range(2, 65, 2))
    assert len(earlier_cutoffs(720)[0]) == 32
    assert [known_steps(3, 24), known_steps(96, 24)] == [3, 24]
    expected, scale = np.array([[2.0]]), np.array([[3.0], [5.0]])
    total, weights = np.array([8.0, 0.0]).reshape(2, 1, 1), np.array([4.0, 0.0]).reshape(2, 1, 1)
    unit = recent_unit(total, weights, expected, scale)
    assert unit[0, 0, 0] == pytest.approx((8.0 + PRIOR * 6.0) / (4.0 + PRIOR))
    assert unit[1, 0, 0] == pytest.approx(10.0)  # nothing known: the usual error
    assert recent_unit(total * 0, weights, expected * 0, scale)[0, 0, 0] == pytest.approx(3e-3)


def stormy(seed: int = 0, rows: int = 24 * 75) -> SeriesFrame:
    """Two series of noise whose spread wanders and is four times larger in the last third than before."""
    rng = np.random.default_rng(seed)
    parts = []
    for name in ("a", "b"):
        spread = np.exp(0.6 * np.sin(2 * np.pi * np.arange(rows) / 300 + rng.uniform(0, 6)))
        spread[2 * rows // 3 :] *= 4.0
        y = spread * rng.normal(size=rows)
        times = [hours(h) for h in range(rows)]
        parts.append(pl.DataFrame({"series_id": [name] * rows, "time": times, "y": y}))
    return SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["y"])


def calibrated(
    make_artifact: Callable[..., Artifact], frame: SeriesFrame, stop: int = 1190, **choices: Any
) -> Artifact:
    artifact = make_artifact("linear", scaling="global", data=frame.until(hours(399)))
    windows = WindowDataset(Panel.from_frame(frame), artifact.window, 400, stop)
    return replace(artifact, calibration=calibrate(artifact.network, windows, LEVELS, choices=Choices(**choices)))


def test_margins_in_units_of_recent_errors_cover_what_fixed_ones_miss(make_artifact) -> None:
    frame = stormy()
    cutoffs = np.arange(1199 + 64, 1780, 3)  # the storm has been felt
    cover = {}
    for method in ("absolute", "recent"):
        table = forecasts_at(calibrated(make_artifact, frame, method=method), frame, cutoffs, steps=6, levels=LEVELS)
        cover[method] = table.drop_nulls("actual").select(pl.col("actual").is_between("q0.1", "q0.9").mean()).item()
    assert cover["absolute"] < 0.5
    assert abs(cover["recent"] - 0.8) < 0.03


def test_auto_follows_recent_errors_where_held_out_cutoffs_reach_half_as_far_as_units_look_back(make_artifact) -> None:
    frame = stormy()
    short, enough = 406 + 31, 406 + 32  # ends of spans whose cutoffs lie 31 and 32 rows apart at most; units: 64
    for stop, expected in ((1190, "recent"), (enough, "recent"), (short, "absolute")):
        table = calibrated(make_artifact, frame, stop).calibration
        assert table is not None
        assert table["score"].unique().to_list() == [expected]
        assert table.equals(calibrated(make_artifact, frame, stop, method=expected).calibration)


def test_auto_of_a_distribution_and_of_a_carried_model_stays_as_it_was(frame, make_artifact) -> None:
    windows = WindowDataset(Panel.from_frame(frame), make_artifact("linear").window, 100, 300)
    for artifact, expected in (
        (make_artifact("linear", "normal"), "cqr"),
        (untrained(frame, {"name": "gru", "d_model": 4}), "absolute"),
        (untrained(frame, {"name": "dlinear"}), "recent"),
    ):
        assert artifact.network.model.recurrent == (expected == "absolute")
        table = calibrate(artifact.network, windows, LEVELS)
        assert table["score"].unique().to_list() == [expected]


@pytest.mark.parametrize("stop", [1190, 520])
def test_margins_are_ranks_of_errors_over_units(make_artifact, stop: int) -> None:
    frame = stormy()
    artifact = calibrated(make_artifact, frame, stop, method="recent")
    table = artifact.calibration
    assert table is not None
    assert table["score"].unique().to_list() == ["recent"]
    assert (table["low"] == -table["high"]).all()
    panel = artifact_panel(artifact, frame)
    # without the first cutoffs of the span, whose earlier ones lie before it: 64 of 785, but no more than a quarter
    cutoff = np.arange(400 + {1190: 64, 520: 28}[stop], stop - 5)
    series = np.repeat([0, 1], len(cutoff))
    found = predict_means(artifact, frame, cutoff)
    cutoff = np.tile(cutoff, 2)
    actual = np.stack([panel.values[panel.indptr[series] + cutoff + h, 0] for h in range(6)], axis=1)[..., None]
    errors = np.abs(actual - found)
    _, scale = artifact.network.scaler.stats(next(WindowDataset(panel, artifact.window, 400, 1190).batches(1)))
    usual = errors.mean(axis=0) / float(scale[0, 0, 0])
    assert table.sort("step")["expected"].to_numpy() == pytest.approx(usual[:, 0], rel=1e-4)
    total, weight = recent_errors(artifact.network, panel, artifact.window, series, cutoff, first_row=400)
    ratio = errors / recent_unit(total, weight, usual, np.full((len(series), 1), float(scale[0, 0, 0])))
    rank = int(np.ceil(0.8 * (len(series) + 1)))
    assert table.sort("step")["high"].to_numpy() == pytest.approx(np.sort(ratio[..., 0], axis=0)[rank - 1], rel=1e-4)
    assert table["n"].unique().to_list() == [len(series)]


def predict_means(artifact: Artifact, frame: SeriesFrame, cutoffs: np.ndarray) -> np.ndarray:
    """Return the means of series a, then b, from each cutoff [2 N, 6, 1]."""
    table = forecasts_at(replace(artifact, calibration=None), frame, cutoffs - 1, steps=6)
    return table.sort("series_id", "cutoff", "step")["mean"].to_numpy().reshape(-1, 6, 1)


@pytest.mark.parametrize("choices", [{}, {"bucket": "hour"}, {"pool": "horizon"}, {"half_life": 200.0}])
def test_a_stored_table_forecasts_the_same_and_few_steps_are_the_first_of_many(
    make_artifact, tmp_path, choices: dict[str, Any]
) -> None:
    frame = stormy()
    artifact = calibrated(make_artifact, frame, method="recent", **choices)
    table = predict(artifact, frame).table
    loaded = load_artifact(save_artifact(artifact, tmp_path).path)
    assert predict(loaded, frame).table.equals(table)
    assert predict(artifact, frame, horizon=2).table.equals(table.filter(pl.col("step") <= 2))
    rolled = predict(artifact, frame, horizon=9, rollout=True).table
    assert rolled.filter(pl.col("step") <= 6).select("q0.1", "q0.9").equals(table.select("q0.1", "q0.9"))
    assert rolled.filter(pl.col("step") > 6)["q0.1"].null_count() == 6


@pytest.mark.parametrize("peeks", [False, True])
def test_values_after_the_cutoff_change_nothing_and_a_unit_that_peeks_is_caught(
    make_artifact, monkeypatch: pytest.MonkeyPatch, peeks: bool
) -> None:
    frame = stormy()
    artifact = calibrated(make_artifact, frame, method="recent")
    if peeks:
        monkeypatch.setattr(recent_module, "known_steps", lambda back, horizon: min(back + 1, horizon))
    late = pl.col("time") > pl.lit(hours(1300)).dt.replace_time_zone("UTC")
    spoiled = SeriesFrame(
        frame.table.with_columns(pl.when(late).then(pl.col("y") * 90.0 + 7.0).otherwise("y").alias("y")), frame.schema
    )
    found = [
        forecasts_at(artifact, given, np.array([1300]), steps=6, levels=LEVELS).drop("actual")
        for given in (frame, spoiled)
    ]
    assert found[0].equals(found[1]) != peeks
    cut = predict(artifact, spoiled, cutoff=hours(1300)).table
    assert cut.equals(predict(artifact, frame, cutoff=hours(1300)).table)
    if not peeks:
        assert cut.select("q0.1", "q0.9").equals(found[0].select("q0.1", "q0.9"))


def test_without_history_before_the_context_the_usual_error_stands_and_a_warning_says_so(
    make_artifact, caplog: pytest.LogCaptureFixture
) -> None:
    frame = stormy()
    artifact = calibrated(make_artifact, frame, method="recent")
    short = SeriesFrame(frame.table.filter(pl.col("time").dt.replace_time_zone(None) < hours(48)), frame.schema)
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        table = predict(artifact, short).table
    assert "2 of 2 windows have no forecasts before them" in caplog.text
    assert "it takes 50 rows of history" in caplog.text
    assert artifact.calibration is not None
    usual = artifact.calibration.sort("step").select(pl.col("high") * pl.col("expected")).to_series()
    enough = SeriesFrame(frame.table.filter(pl.col("time").dt.replace_time_zone(None) < hours(50)), frame.schema)
    half = (table.filter(series_id="a")["q0.9"] - table.filter(series_id="a")["mean"]) / usual
    assert half.to_numpy() == pytest.approx(float(half[0]), rel=1e-5)  # the scale of the series, at every step
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        predict(artifact, enough)
        predict(artifact, frame)
    assert caplog.text == ""


def test_a_coupled_forecast_counts_only_series_with_rows(frame, caplog: pytest.LogCaptureFixture) -> None:
    artifact = untrained(frame, {"name": "regenn", "attend": "entities", "ff_dim": 8})
    panel = artifact_panel(artifact, frame)
    windows = WindowDataset(panel, artifact.window, 200, 300, aligned=True)
    table = calibrate(artifact.network, windows, LEVELS, choices=Choices(method="recent"))
    artifact = replace(artifact, calibration=table)
    some = frame.select_series(["a", "c"])
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        found = predict(artifact, some).table
    assert found["series_id"].unique().sort().to_list() == ["a", "c"]
    assert found["q0.9"].is_finite().all()
    assert (found["q0.9"] > found["q0.1"]).all()
    assert "forecasts before them" not in caplog.text


def test_plain_arrays_and_revised_data_refuse_it(make_artifact) -> None:
    frame = stormy()
    artifact = calibrated(make_artifact, frame, method="recent")
    assert artifact.calibration is not None
    with pytest.raises(ConfigError, match=r"method=recent looks at the windows themselves"):
        apply_calibration(artifact.calibration, np.zeros((1, 6, 1)), None, LEVELS, np.ones((1, 1)), ["y"])
    table = revised_table(400)
    values = {
        "data": {
            "name": "grid",
            "layout": "long",
            "series": "series_id",
            "time": "time",
            "published": "published",
            "targets": ["load"],
            "past": ["flow"],
            "known": ["wind"],
            "freq": "1h",
            "source": {"kind": "parquet", "path": "unused"},
        },
        "model": {"name": "linear"},
        "window": {"context_length": 24, "horizon": 6},
        "split": {"train": 0.7, "valid": 0.3, "test": 0.0},
        "calibration": {"method": "recent"},
        "tracking": {"enabled": False},
    }
    config = validate(FitConfig, values)
    revised = VintageFrame(table, SeriesSchema(targets=("load",), past=("flow",), known=("wind",), freq="1h"))
    with pytest.raises(ConfigError, match=r"method=recent reads what came of earlier forecasts"):
        fit_frame(revised, config)
    usual = fit_frame(revised, validate(FitConfig, values | {"calibration": {}}))[0].calibration
    assert usual is not None
    assert usual["score"].unique().to_list() == ["absolute"]
