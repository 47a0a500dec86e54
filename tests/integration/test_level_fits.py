"""Fits on series of very different levels, on short ones, and on rows that deserve a warning."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app.fit import CalibrationConfig, FitConfig, fit_frame
from tsforge.app.fit_errors import error_unit, training_unit
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.vintages import Delays
from tsforge.forecasting.predict import predict

FAST = {"max_epochs": 3, "batch_size": 128, "learning_rate": 0.01, "accelerator": "cpu"}
LEVELS = {"small": 1.0, "middle": 100.0, "large": 10_000.0}


def levelled(names: tuple[str, ...] = tuple(LEVELS)) -> SeriesFrame:
    """Return one wave with noise for each name, its amplitude and noise in proportion to its level."""
    parts = []
    time = np.arange(420)
    for number, name in enumerate(names):
        rng = np.random.default_rng([7, number])
        wave = 5.0 + np.sin(2 * np.pi * time / 12 + number) + 0.05 * rng.normal(size=len(time))
        parts.append(pl.DataFrame({"entity": name, "day": time, "sales": LEVELS.get(name, 30.0) * wave}))
    return SeriesFrame.from_long(pl.concat(parts), time="day", series_id="entity", targets=["sales"])


def relative_errors(artifact: Artifact, frame: SeriesFrame, cut: int = 400) -> dict[str, tuple[float, float]]:
    """Return the mean error and the mean width of 90 % intervals of each series after a cut, in parts of its level."""
    found = predict(artifact, frame.until(cut - 1)).table.join(
        frame.table, left_on=["series_id", "time"], right_on=["series_id", "time"]
    )
    return {
        name: (
            np.abs(part["mean"].to_numpy() - part["sales"].to_numpy()).mean() / LEVELS.get(name, 30.0),
            (part["q0.95"].to_numpy() - part["q0.05"].to_numpy()).mean() / LEVELS.get(name, 30.0),
        )
        for (name,), part in found.group_by("series_id")
    }


def levelled_fit(model: str | dict[str, Any], frame: SeriesFrame, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": model} if isinstance(model, str) else model,
        "window": {"context_length": 36, "horizon": 6},
        "split": {"train": 0.8, "valid": 0.2, "test": 0.0},
        "tracking": {"enabled": False},
    }
    return fit_frame(frame, validate(FitConfig, settings | changes))[0]


@pytest.mark.parametrize(
    "model", ["ar_net", "linear", "var", {"name": "auto", "minutes": 0, "candidates": ["ar_net", "linear"]}], ids=str
)
def test_a_small_series_beside_large_ones_gets_its_own_forecast_and_its_own_width(model: Any) -> None:
    frame = levelled()
    found = relative_errors(levelled_fit(model, frame.until(399)), frame)
    assert set(found) == set(LEVELS)
    for error, width in found.values():
        assert error < 0.12  # noise 0.05, amplitude 1, level 5
        assert 0.08 < width < 0.6
    shared = relative_errors(levelled_fit("linear", frame.until(399), scaling={"kind": "global"}), frame)
    assert shared["small"][1] > 20 * found["small"][1]  # what one scale for all gives


def test_a_new_series_of_a_diverse_panel_is_scaled_by_its_context() -> None:
    frame = levelled()
    artifact = levelled_fit("ar_net", frame.until(399))
    assert (artifact.network.scaling, artifact.network.config.scaling.unknown) == ("series", "context")
    later = levelled(("small", "fresh"))
    found = relative_errors(artifact, later)
    assert found["fresh"][0] < 0.15
    assert 0.08 < found["fresh"][1] < 0.8
    strict = levelled_fit("ar_net", frame.until(399), scaling={"kind": "series"})
    with pytest.raises(ArtifactError, match=r"scaling.unknown=context"):
        predict(strict, later.until(399))


def test_a_panel_of_alike_series_keeps_one_scale() -> None:
    kept = levelled(("one", "two", "three"))
    assert levelled_fit("linear", kept.until(399)).network.scaling == "global"
    assert levelled_fit("regenn", levelled().until(399), train=FAST).network.scaling == "global"


def test_a_variate_without_a_value_to_learn_from_is_named(caplog: pytest.LogCaptureFixture) -> None:
    frame = levelled()
    late = frame.table.with_columns(dead=pl.when(pl.col("time") >= 350).then(pl.col("sales")))
    both = SeriesFrame.from_long(late, time="time", series_id="series_id", targets=["sales", "dead"])
    artifact = levelled_fit("ar_net", both)
    assert "1 of 2 variates have no observed value in the training span (dead)" in caplog.text
    assert predict(artifact, both).table.filter(variate="sales")["mean"].null_count() == 0
    caplog.clear()
    levelled_fit("ar_net", frame)
    assert "no observed value" not in caplog.text


def test_a_covariate_that_is_published_after_the_training_span_is_named(caplog: pytest.LogCaptureFixture) -> None:
    table = levelled().table.with_columns(late=pl.col("time").cast(pl.Float64), early=pl.lit(1.0))
    both = SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["sales"], past=["early", "late"])
    delayed = Delays.of({"late": "380i"}, both.schema, both.grid).shift(both)
    artifact = levelled_fit("ar_net", delayed)
    assert "1 covariate(s) have no value in the training span (late)" in caplog.text
    assert artifact.schema.past == ("early", "late")
    caplog.clear()
    levelled_fit("ar_net", both)
    levelled_fit("last_value", delayed)  # reads none
    assert "have no value in the training span" not in caplog.text


def test_no_large_series_chooses_the_mixture_for_the_others() -> None:
    """What ``auto`` is made of depends on no unit: multiplying one series by 1,000 changes no weight."""
    frame = levelled()
    factor = pl.when(pl.col("series_id") == "middle").then(1000.0).otherwise(1.0)
    larger = SeriesFrame.from_long(
        frame.table.with_columns(pl.col("sales") * factor), time="time", series_id="series_id", targets=["sales"]
    )
    settings = {"name": "auto", "minutes": 0, "candidates": ["ar_net", "linear", "seasonal_naive"]}
    one, other = (levelled_fit(settings, each.until(399)) for each in (frame, larger))
    rows = [{row["candidate"]: row for row in found.explanation["race"]} for found in (one, other)]
    assert set(rows[0]) == set(rows[1])
    assert len(rows[0]) > 3
    for name, row in rows[0].items():
        assert rows[1][name]["weight"] == pytest.approx(row["weight"], abs=0.02), name


def test_units_of_series_are_their_deviations_over_the_training_span() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, np.nan], [100.0, 7.0], [140.0, 7.0]])
    mask = ~np.isnan(values)
    series = TrainingSeries(
        values=torch.from_numpy(np.nan_to_num(values)),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, 3, 3, 5]),
        offset=torch.tensor([0, 0, 0]),
    )
    together = [np.std(values[:, 0]), np.std([5.0, 5.0, 7.0, 7.0])]
    expected = [[np.std([1.0, 3.0, 8.0]), together[1]], together, [20.0, together[1]]]
    np.testing.assert_allclose(error_unit(series, diverse=True), expected, rtol=1e-12)
    np.testing.assert_allclose(training_unit(series), together, rtol=1e-12)
    np.testing.assert_array_equal(error_unit(series, diverse=False), training_unit(series))


def test_errors_of_a_diverse_panel_count_in_deviations_of_each_series() -> None:
    frame = levelled()
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "ar_net"},
        "window": {"context_length": 36, "horizon": 6},
        "split": {"kind": "counts", "counts": [300, 60, 60]},
        "calibration": {"enabled": False},
        "tracking": {"enabled": False},
    }
    artifact, _ = fit_frame(frame, validate(FitConfig, settings))
    squares = []
    for _, part in frame.table.group_by("series_id"):
        values = part.sort("time")["sales"].to_numpy()
        unit = values[:300].std()
        single = frame.table.filter(series_id=part["series_id"][0])
        one = SeriesFrame.from_long(single, time="time", series_id="series_id", targets=["sales"], freq="1i")
        for cutoff in range(360, 415):
            mean = predict(artifact, one.until(cutoff - 1)).table["mean"].to_numpy()
            squares.append(np.mean(((mean - values[cutoff : cutoff + 6]) / unit) ** 2))
    assert artifact.metrics["test_mse"] == pytest.approx(np.mean(squares), rel=1e-4)


@pytest.mark.parametrize(
    "model", [{"name": "auto", "minutes": 0, "candidates": ["ar_net", "linear"]}, "gru", "linear"], ids=str
)
def test_a_valid_span_below_two_horizons_chooses_and_calibrates(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A network or a race had no interval at all there; the closed form needs no rows to choose."""
    frame = levelled(("one",))
    split = {"kind": "counts", "counts": [300, 11, 20]}
    train = FAST if model == "gru" else {}
    artifact = levelled_fit(model, frame.until(330), split=split, train=train)
    assert artifact.calibration is not None
    assert artifact.calibration["high"].is_finite().all()
    assert set(artifact.calibration["status"]) == {"ok", "pooled"}
    shared = "too short to choose by one half and calibrate on the other"
    assert (shared in caplog.text) == (model != "linear")
    assert relative_errors(artifact, frame, cut=331)["one"][1] > 0
    caplog.clear()
    longer = levelled_fit(model, frame.until(330), split={**split, "counts": [299, 12, 20]}, train=train)
    assert longer.calibration is not None
    windows = longer.calibration.filter(status="ok")["n"].unique().to_list()
    assert windows == ([7] if model == "linear" else [1])  # a half that calibrates is one horizon
    assert shared not in caplog.text
    caplog.clear()
    levelled_fit(model, frame.until(330), split=split, train=train, calibration={"enabled": False})
    assert shared not in caplog.text


def test_other_series_that_stop_a_training_share_no_row_with_the_calibration(caplog: pytest.LogCaptureFixture) -> None:
    split = {"kind": "counts", "counts": [300, 11, 20]}
    apart = {"held_out": ["two"], "watch": "unseen_valid"}
    levelled_fit("gru", levelled(("one", "two")).until(330), split=split, train=FAST, entities=apart)
    assert "too short to choose by one half" not in caplog.text


def test_settings_of_a_stored_calibration_that_was_off_are_still_read() -> None:
    whole = {"method": "auto", "bucket": "none", "half_life": None, "dependence": "gaussian"}
    for pool in ("step", "auto"):  # the default of then and of now
        assert not validate(CalibrationConfig, {**whole, "enabled": False, "pool": pool}).enabled
    with pytest.raises(ConfigError, match="pool has no effect with enabled=false"):
        validate(CalibrationConfig, {"enabled": False, "pool": "horizon"})


def test_a_value_that_alone_rules_scale_and_coefficients_is_named(caplog: pytest.LogCaptureFixture) -> None:
    frame = levelled(("small", "large"))
    levelled_fit("linear", frame)
    assert "hold most of the variance" not in caplog.text
    for row in (350, 77):  # the first is no training row
        assert "hold most of the variance" not in caplog.text
        at = (pl.col("series_id") == "small") & (pl.col("time") == row)
        wild = frame.table.with_columns(sales=pl.when(at).then(-4e4).otherwise(pl.col("sales")))
        levelled_fit("linear", SeriesFrame.from_long(wild, time="time", series_id="series_id", targets=["sales"]))
    assert "1 value(s) hold most of the variance of their variate in training" in caplog.text
    assert "sales of 'small' at 77: -40000, median" in caplog.text
