"""Rolling forecasts against one prediction after the other, and their causality."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy import stats
from streamed_data import untrained

from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.predict import predict
from tsforge.forecasting.rolling import rolling_forecasts

START = datetime(2024, 1, 1)


def test_every_entry_equals_the_prediction_made_that_many_rows_earlier(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    start, stop, steps = 340, 352, 3
    rolled = rolling_forecasts(artifact, frame, start, stop, steps=steps, quantile_levels=(0.1, 0.9))
    assert rolled.series_ids == ("a", "b", "c")
    assert rolled.mean.shape == (3, 12, 3, 2)
    checked = 0
    for row in range(start, stop):
        for step in range(1, steps + 1):
            cutoff = START + timedelta(hours=row - step)
            table = predict(artifact, frame, cutoff=cutoff, quantile_levels=(0.1, 0.9)).table.filter(step=step)
            for found in table.iter_rows(named=True):
                n, v = rolled.series_ids.index(found["series_id"]), rolled.variates.index(found["variate"])
                place = (n, row - start, step - 1, v)
                assert rolled.mean[place] == pytest.approx(found["mean"], rel=1e-5)
                assert rolled.quantiles[place] == pytest.approx([found["q0.1"], found["q0.9"]], rel=1e-5)
                checked += 1
    assert checked == 12 * 3 * 3 * 2


def test_probabilities_are_those_of_the_forecast_distribution(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    rolled = rolling_forecasts(
        artifact, frame, 300, 310, steps=2, quantile_levels=(0.1, 0.5, 0.9), outputs=("cdf", "log_tail")
    )
    spread = (rolled.quantiles[..., 2] - rolled.quantiles[..., 0]) / (2 * stats.norm.ppf(0.9))
    z = (rolled.target[:, :, None, :] - rolled.mean) / spread
    assert np.allclose(rolled.cdf, stats.norm.cdf(z), atol=1e-4)
    assert np.allclose(rolled.log_tail, np.log(2 * stats.norm.sf(np.abs(z))), atol=1e-3)


def test_the_end_of_the_data_and_its_beginning_are_covered_as_far_as_possible(frame, make_artifact) -> None:
    artifact = make_artifact("last_value", context_length=24)
    rolled = rolling_forecasts(artifact, frame, 0, 400, steps=2)
    one, two = rolled.mean[0, :, 0, 0], rolled.mean[0, :, 1, 0]
    y = rolled.target[0, :, 0]
    assert np.isnan(one[:24]).all()
    assert np.isnan(two[:25]).all()
    assert np.allclose(one[24:], y[23:399], atol=1e-5)
    assert np.allclose(two[25:], y[23:398], atol=1e-5)
    b = rolled.series_ids.index("b")
    assert np.isnan(rolled.target[b, :30]).all()
    assert np.isnan(rolled.mean[b, : 30 + 24, 0]).all()
    assert np.isfinite(rolled.mean[b, 30 + 24 : 360, 0]).all()
    c = rolled.series_ids.index("c")
    assert np.isnan(rolled.target[c, 200:211]).all()
    assert np.allclose(rolled.mean[c, 201:211, 0], rolled.mean[c, 200, 0])  # the last value before the hole


def test_targets_of_a_row_never_move_its_own_forecasts(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    before = rolling_forecasts(artifact, frame, 300, 320, steps=3)
    hit = (pl.col("time") >= pl.lit(START + timedelta(hours=310)).dt.replace_time_zone("UTC")) & (
        pl.col("series_id") == "a"
    )
    spoiled = frame.table.with_columns(pl.when(hit).then(pl.col("y") + 50).otherwise(pl.col("y")).alias("y"))
    after = rolling_forecasts(artifact, SeriesFrame(spoiled, frame.schema), 300, 320, steps=3)
    for step in range(3):
        assert np.array_equal(before.mean[0, : 11 + step, step], after.mean[0, : 11 + step, step])
        assert not np.allclose(before.mean[0, 11 + step, step, 0], after.mean[0, 11 + step, step, 0])
    assert np.array_equal(before.mean[1:], after.mean[1:])


def test_nobody_with_enough_history_gives_nan_not_an_error(frame, make_artifact) -> None:
    artifact = make_artifact("linear", context_length=48)
    rolled = rolling_forecasts(artifact, frame, 5, 20)
    assert np.isnan(rolled.mean).all()
    assert np.isfinite(rolled.target[0]).all()


def test_bad_requests_are_refused(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    with pytest.raises(ConfigError, match="1 to 6 steps"):
        rolling_forecasts(artifact, frame, 300, 310, steps=7)
    with pytest.raises(ConfigError, match="empty"):
        rolling_forecasts(artifact, frame, 310, 310)
    with pytest.raises(ModelError, match="probabilities"):
        rolling_forecasts(artifact, frame, 300, 310, outputs=("cdf",))


@pytest.mark.parametrize("attend", [None, "entities"])
def test_a_context_without_a_value_of_the_series_is_no_reason_to_expect_one(frame, make_artifact, attend) -> None:
    """An outage of 60 rows with contexts of 48: no forecast is given from where nothing is left to see."""
    artifact = make_artifact("linear", "normal")
    if attend:
        artifact = untrained(frame, {"name": "regenn", "attend": attend, "ff_dim": 8}, likelihood={"name": "normal"})
    dark = pl.col("time").is_between(
        *(pl.lit(START + timedelta(hours=row)).dt.replace_time_zone("UTC") for row in (240, 299))
    )
    dark &= pl.col("series_id") == "a"
    holed = SeriesFrame(
        frame.table.with_columns(pl.when(~dark).then(pl.col(name)).alias(name) for name in ("y", "z")), frame.schema
    )
    rolled = rolling_forecasts(artifact, holed, 230, 320, steps=2, quantile_levels=(0.1,), outputs=("log_tail",))
    for found in (rolled.mean[0, ..., 0], rolled.quantiles[0, ..., 0, 0]):
        for step in (1, 2):
            last_seen = np.arange(230, 320) - step
            blind = (last_seen >= 240 + 47) & (last_seen < 300)
            assert np.array_equal(np.isnan(found[:, step - 1]), blind)
    assert np.isnan(rolled.log_tail[0, 70, 0]).all()  # row 300 is there, and nothing was expected of it
    assert not np.isnan(rolled.target[0, 70]).any()
    assert np.isfinite(rolled.log_tail[0, 71, 0]).all()
    assert np.isfinite(rolled.mean[1, :, 0]).all()
