"""The leak check of ``tsforge.testing`` passes honest fits and catches those that hold the future."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting import backtest_folds as module
from tsforge.forecasting.backtest import BacktestConfig, Fit
from tsforge.forecasting.baselines import fit_baseline, fit_solved
from tsforge.network import NetworkConfig
from tsforge.testing.leaks import assert_no_future_leak

WINDOW = WindowSpec(context_length=24, horizon=6)
CONFIG = BacktestConfig(num_cutoffs=4, refit_every=2, regimes=("volatility", "level", "hour"), regime_column="load")


@pytest.fixture
def frame() -> SeriesFrame:
    rng = np.random.default_rng(0)
    hour = np.arange(300)
    parts = []
    for number, name in enumerate(("a", "b", "c")):
        wave = number + 2.0 * np.sin(2 * np.pi * hour / 24) + 0.1 * rng.normal(size=300).cumsum()
        times = [datetime(2024, 1, 1) + timedelta(hours=int(h)) for h in hour]
        columns = {"ds": times, "y": wave, "load": (hour // 50 + number) % 3.0, "plan": np.cos(hour / 9.0)}
        parts.append(pl.DataFrame(columns).with_columns(pl.lit(name).alias("id")))
    return SeriesFrame.from_long(
        pl.concat(parts), time="ds", series_id="id", targets=("y",), past=("load",), known=("plan",), freq="1h"
    )


def solved(name: str, of: Callable[[SeriesFrame], SeriesFrame] = lambda visible: visible) -> Fit:
    def fit(visible: SeriesFrame, cutoff: Any) -> Artifact:
        if name == "seasonal_naive":
            return fit_baseline(name, of(visible), horizon=6, season=24, context_length=24)
        plain = of(visible).with_covariates()
        return fit_solved(plain, validate(NetworkConfig, {"model": name}), WINDOW)

    return fit


@pytest.mark.parametrize("name", ["linear", "ar_net", "seasonal_naive"])
def test_honest_fits_pass(name: str, frame: SeriesFrame) -> None:
    table = frame.table
    assert_no_future_leak({name: solved(name)}, frame, CONFIG, horizon=6)
    assert frame.table.equals(table), "the data is put back"


def test_the_whole_fit_use_case_with_calibration_and_early_stopping_passes(frame: SeriesFrame) -> None:
    settings = {
        "data": {"name": "made_up", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "ar_net", "lags": 12},
        "window": {"context_length": 24, "horizon": 6},
        "split": {"train": 0.8, "valid": 0.2, "test": 0.0},
        "calibration": {"quantile_levels": [0.25, 0.5, 0.75]},
    }
    config = validate(FitConfig, settings)
    assert_no_future_leak(lambda visible, cutoff: fit_frame(visible, config)[0], frame, CONFIG, horizon=6)


def test_a_fit_that_trains_on_the_frame_in_its_closure_is_caught(frame: SeriesFrame) -> None:
    with pytest.raises(AssertionError, match=r"the data after 2024-.* changed: forecasts of 'linear' change at"):
        assert_no_future_leak(solved("linear", lambda visible: frame), frame, CONFIG, horizon=6)


def test_a_fit_that_takes_one_number_from_the_future_is_caught(frame: SeriesFrame) -> None:
    def shifted(visible: SeriesFrame) -> SeriesFrame:
        """Honest rows, but a hundredth of the last value of all is mixed in."""
        last = frame.table["y"].drop_nulls()[-1]
        return SeriesFrame(visible.table.with_columns(pl.col("y") + 0.01 * last), visible.schema)

    with pytest.raises(AssertionError, match="forecasts of 'ar_net' change"):
        assert_no_future_leak({"ar_net": solved("ar_net", shifted)}, frame, CONFIG, horizon=6)


def test_labels_that_read_the_whole_frame_are_caught(frame: SeriesFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.window_labels
    monkeypatch.setattr(
        module,
        "window_labels",
        lambda visible, cutoff, kinds, **settings: honest(frame, frame.table["time"].max(), kinds, **settings),
    )
    with pytest.raises(AssertionError, match="regime labels change"):
        assert_no_future_leak(solved("last_value"), frame, CONFIG, horizon=6)


def test_a_fit_that_is_not_reproducible_is_refused(frame: SeriesFrame) -> None:
    rng = np.random.default_rng(0)

    def fit(visible: SeriesFrame, cutoff: Any) -> Artifact:
        noise = pl.Series(rng.normal(size=visible.num_rows))
        return solved("linear")(SeriesFrame(visible.table.with_columns(pl.col("y") + noise), visible.schema), cutoff)

    with pytest.raises(AssertionError, match="the same data twice: forecasts of 'linear' change at 4 cutoff"):
        assert_no_future_leak(fit, frame, CONFIG, horizon=6)


def test_the_data_is_put_back_when_a_fit_fails(frame: SeriesFrame) -> None:
    table, calls = frame.table, []

    def fit(visible: SeriesFrame, cutoff: Any) -> Artifact:
        calls.append(cutoff)
        if len(calls) > 4:  # in the first run on changed data
            raise DataError("broken")
        return solved("last_value")(visible, cutoff)

    with pytest.raises(DataError, match="broken"):
        assert_no_future_leak(fit, frame, CONFIG, horizon=6)
    assert frame.table.equals(table)
