"""Season lengths and the naive forecasts every report holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact, load_artifact, save_artifact
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.baselines import BASELINES, fit_baseline, fit_solved, frame_season
from tsforge.forecasting.predict import predict
from tsforge.forecasting.seasons import autocorrelation, find_season, season_length
from tsforge.network import NetworkConfig


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        ("1h", 24),
        ("15m", 96),
        ("30m", 48),
        ("1m", 1440),
        ("1d", 7),
        ("1w", 52),
        ("1mo", 12),
        ("1q", 4),
        ("1i", 1),
        ("7h", 1),
    ],
)
def test_frequencies_imply_seasons(freq: str, season: int) -> None:
    assert season_length(freq) == season
    assert season_length(freq, declared=5) == 5


def test_a_declared_season_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="season_length is 0"):
        season_length("1h", declared=0)


@pytest.mark.parametrize("period", [4, 7, 12, 24, 50])
def test_a_season_without_frequency_is_found(period: int) -> None:
    rng = np.random.default_rng(period)
    shape = rng.normal(size=period)
    values = (
        np.tile(shape, 600 // period + 1)[:600, None] + 0.3 * rng.normal(size=(600, 2)) + np.arange(600)[:, None] * 0.01
    )
    values[rng.random(values.shape) < 0.1] = np.nan
    assert find_season(values) == period
    assert season_length("1i", values) == period


def test_a_smooth_wave_in_noise_is_no_short_season() -> None:
    rng = np.random.default_rng(3)
    wave = np.sin(2 * np.pi * np.arange(500) / 24)
    for noise in (0.0, 0.05, 0.1):
        assert find_season((wave + noise * rng.normal(size=500))[:, None]) == 24


@pytest.mark.parametrize("unit", [1e-150, 1e-6, 1.0, 1e9])
def test_a_season_is_the_same_in_any_unit_and_beside_variates_that_rest(unit: float) -> None:
    rng = np.random.default_rng(2)
    wave = unit * (np.sin(2 * np.pi * np.arange(500) / 12) + 0.05 * rng.normal(size=500))[:, None]
    assert find_season(wave) == 12
    for dead in (0.0, 0.1 * unit, np.nan):
        assert find_season(np.hstack([wave, np.full((500, 5), dead)])) == 12
    ramps = 0.1 * unit * np.arange(500)[:, None] * np.arange(1.0, 6.0)
    assert find_season(np.hstack([wave, ramps])) == 12
    assert find_season(1e13 * unit + wave) == 12  # far from 0
    hum = 1.0 + 1e-15 * np.tile([0.0, 1.0, 1.0], 167)[:500, None]  # rounding with a beat of 3 rows is no season
    assert find_season(hum) == 1


def test_noise_walks_constants_and_short_series_have_no_season() -> None:
    rng = np.random.default_rng(0)
    assert find_season(rng.normal(size=(500, 1))) == 1
    assert find_season(rng.normal(size=(500, 1)).cumsum(axis=0)) == 1
    assert find_season(np.full((500, 1), 3.0)) == 1
    assert find_season(np.full((500, 1), np.nan)) == 1
    assert find_season(np.zeros((5, 1))) == 1


def test_autocorrelation_equals_a_loop_over_present_pairs() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=60)
    values[rng.random(60) < 0.2] = np.nan
    centred = values - np.nanmean(values)
    variance = np.nanmean(centred**2)
    for lag, found in enumerate(autocorrelation(values, 10)):
        products = centred[lag:] * centred[: 60 - lag]
        assert found == pytest.approx(np.nanmean(products) / variance)


def test_naive_forecasts_follow_their_definitions(frame) -> None:
    known = frame.select_series(["a"])
    y = known.table["y"].to_numpy()
    expected = {
        "last_value": np.full(30, y[-1]),
        "seasonal_naive": y[-24:][np.arange(30) % 24],
        "drift": y[-1] + np.arange(1, 31) * (y[-1] - y[-48]) / 47,
    }
    assert set(expected) == set(BASELINES)
    for name, values in expected.items():
        artifact = fit_baseline(name, known, horizon=30, season=24, context_length=48)
        table = predict(artifact, known).table.filter(variate="y")
        assert np.allclose(table["mean"], values, atol=1e-4)
        assert (table["q0.95"] > table["q0.05"]).all()


def test_baselines_ignore_covariates(frame) -> None:
    with_known = SeriesFrame.from_long(
        frame.table.with_columns(k=pl.lit(1.0)), time="time", series_id="series_id", targets=["y", "z"], known=["k"]
    )
    artifact = fit_baseline("last_value", with_known, horizon=3, season=24, context_length=24)
    assert artifact.schema.columns == ("y", "z")
    assert predict(artifact, with_known).table.equals(predict(artifact, frame).table)


def test_a_long_season_lengthens_the_context(frame) -> None:
    artifact = fit_baseline("seasonal_naive", frame, horizon=3, season=168, context_length=24)
    assert artifact.window.context_length == 168


def test_frame_season_looks_at_the_frequency_then_at_the_data(frame) -> None:
    assert frame_season(frame) == 24
    assert frame_season(frame, declared=12) == 12
    numbered = (
        frame.select_series(["a"]).table.with_row_index("row").select(pl.col("row").cast(pl.Int64).alias("time"), "y")
    )
    assert frame_season(SeriesFrame.from_wide(numbered, time="time")) == 24


def test_models_that_need_gradients_are_refused(frame) -> None:
    config = NetworkConfig.model_validate({"model": {"name": "linear", "solver": "sgd"}})
    with pytest.raises(ModelError, match="gradient training"):
        fit_solved(frame, config, WindowSpec(context_length=24, horizon=3))


def test_nothing_observed_is_refused(frame) -> None:
    empty = frame.table.with_columns(y=pl.lit(None, dtype=pl.Float64), z=pl.lit(None, dtype=pl.Float64))
    hollow = SeriesFrame(empty, frame.schema, require_targets=False)
    with pytest.raises((DataError, ModelError)):
        fit_baseline("last_value", hollow, horizon=3, season=24, context_length=24)


def unlike_panel(rows: int = 240) -> SeriesFrame:
    """A clean daily wave, a loud series, a random walk, one with a variate that is never observed, a very short one."""
    rng = np.random.default_rng(0)
    hour = np.arange(rows)
    columns = {
        "clean": 100.0 + 50.0 * np.sin(2 * np.pi * hour / 24) + 0.5 * rng.normal(size=rows),
        "loud": 100.0 + 50.0 * rng.normal(size=rows),
        "walk": rng.normal(size=rows).cumsum(),
        "blind": rng.normal(size=rows),
        "young": rng.normal(size=20),
    }
    parts = [
        pl.DataFrame({"series_id": [name] * len(y), "time": hour[: len(y)], "y": y, "z": -2.0 * y})
        for name, y in columns.items()
    ]
    z = pl.when(pl.col("series_id") != "blind").then(pl.col("z")).alias("z")
    table = pl.concat(parts).with_columns(z)
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y", "z"], freq="1i")


def spreads(artifact: Artifact, frame: SeriesFrame) -> pl.DataFrame:
    wide = predict(artifact, frame).table.with_columns(sd=(pl.col("q0.95") - pl.col("q0.05")) / (2 * 1.6448536))
    return wide.select("series_id", "variate", "step", "sd")


@pytest.mark.parametrize("name", BASELINES)
def test_the_spread_of_a_series_is_that_of_its_own_errors(name: str, tmp_path: Path) -> None:
    panel = unlike_panel().select_series(["clean", "loud", "walk"])
    sizes = {"horizon": 6, "season": 24, "context_length": 24}
    artifact = fit_baseline(name, panel, per_series=True, **sizes)  # type: ignore[arg-type]
    found = spreads(artifact, panel)
    for series in panel.series_ids:
        alone = panel.select_series([series])
        expected = spreads(fit_baseline(name, alone, **sizes), alone)  # type: ignore[arg-type]
        mine = found.filter(series_id=series)
        assert mine.drop("sd").equals(expected.drop("sd"))
        assert np.allclose(mine["sd"], expected["sd"], rtol=1e-3), series
    back = load_artifact(save_artifact(artifact, tmp_path).path)  # type: ignore[arg-type]
    assert spreads(back, panel).equals(found), "the spreads travel with the weights"


def test_a_series_without_a_window_takes_the_spread_of_all_in_its_own_units() -> None:
    panel = unlike_panel()
    artifact = fit_baseline("last_value", panel, horizon=6, season=1, context_length=24, per_series=True)
    found = spreads(artifact, panel.select_series(["clean", "blind"]))
    assert found["sd"].is_finite().all()
    assert (found["sd"] > 0).all()
    network = artifact.network
    own = network.model.series_spread
    assert own is not None
    assert own.shape == (5, 6, 2, 1)
    young = panel.series_ids.index("young")
    assert not own[young].any(), "20 rows hold no window of 30"
    assert own[panel.series_ids.index("blind"), :, 0].any()
    assert not own[panel.series_ids.index("blind"), :, 1].any()


def test_series_that_begin_later_take_the_spread_of_all_in_units_of_their_context() -> None:
    panel = unlike_panel()
    early = panel.select_series(["clean", "loud"])
    artifact = fit_baseline("last_value", early, horizon=6, season=1, context_length=24, per_series=True)
    together = spreads(artifact, panel.select_series(["clean", "loud", "walk"]))
    assert together.filter(series_id="clean")["sd"].equals(spreads(artifact, early).filter(series_id="clean")["sd"])
    late = together.filter(series_id="walk", variate="y")["sd"]
    assert late.max() < 10.0, "a walk of unit steps"  # type: ignore[operator]


def test_artifacts_of_one_spread_have_no_further_buffer(tmp_path: Path) -> None:
    panel = unlike_panel().select_series(["clean", "loud"])
    artifact = fit_baseline("drift", panel, horizon=6, season=1, context_length=24)
    assert not any("series_spread" in name for name in artifact.network.state_dict())
    back = load_artifact(save_artifact(artifact, tmp_path).path)  # type: ignore[arg-type]
    assert spreads(back, panel).equals(spreads(artifact, panel))
