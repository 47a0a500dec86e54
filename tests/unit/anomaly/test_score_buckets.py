"""Calibration by hour of the week or operating mode: ranks kept in a bucket, one scale for all, small ones pooled."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.buckets import BucketScale, bucket_notice, fit_buckets, hour_of_week, row_buckets, smallest_bucket
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel

ALPHA = 0.02


def two_modes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return scores whose spread is ten times larger in mode 1, and modes; 5 % of the rows are of a rare mode 2."""
    generator = np.random.default_rng(seed)
    mode = generator.choice([0.0, 1.0, 2.0], p=[0.6, 0.35, 0.05], size=rows)
    return generator.gamma(2.0, size=rows) * np.where(mode == 1.0, 10.0, 1.0), mode


def test_alarm_rates_are_alike_in_all_modes_on_one_threshold() -> None:
    scores, mode = two_modes(20_000)
    scale = fit_buckets(scores, mode, ALPHA)
    later, later_mode = two_modes(50_000, seed=1)
    level = np.quantile(scale.apply(scores, mode), 1 - ALPHA)
    alarm = scale.apply(later, later_mode) > level
    rates = [alarm[later_mode == m].mean() for m in (0.0, 1.0)]
    assert rates == pytest.approx([ALPHA, ALPHA], rel=0.2)
    # pooled, the loud mode has all the alarms
    plain = later > np.quantile(scores, 1 - ALPHA)
    assert plain[later_mode == 0.0].mean() < 0.001
    assert plain[later_mode == 1.0].mean() > 2 * ALPHA


def test_a_score_becomes_the_pooled_score_of_its_rank_in_its_bucket() -> None:
    scores, mode = two_modes(20_000)
    scale = fit_buckets(scores, mode, ALPHA)
    own = np.sort(scores[mode == 1.0])
    middle = own[own.size // 2]
    assert scale.apply([middle], [1.0])[0] == pytest.approx(np.quantile(scores, 0.5), rel=0.01)
    for rank in (10, own.size // 3, own.size - 5):  # an order statistic, by hand
        expected = np.quantile(np.sort(scores), (rank + 0.5) / own.size, method="hazen")
        assert scale.apply([own[rank]], [1.0])[0] == pytest.approx(expected, rel=1e-12)


def test_the_map_rises_and_is_continuous_and_never_saturates() -> None:
    scores, mode = two_modes(5_000)
    scale = fit_buckets(scores, mode, ALPHA)
    for name in (0.0, 1.0):
        grid = np.linspace(-5.0, 3.0 * scores.max(), 200_001)
        mapped = scale.apply(grid, np.full(grid.size, name))
        assert (np.diff(mapped) >= 0.0).all()
        ends = scale.samples[name][[0, 0, -1, -1]] + np.array([-1.0, 1.0, -1.0, 1.0]) * 1e-9
        low, high = np.diff(scale.apply(ends, np.full(4, name)))[[0, 2]]
        assert max(low, high) < 1e-6  # no jump where the sample ends
        assert mapped[-1] > mapped[-100] > scale.pooled[-1]


def test_a_small_bucket_an_unknown_mode_and_a_missing_score_stay_as_they_are() -> None:
    scores, mode = two_modes(5_000)
    mode[:100] = np.nan
    scale = fit_buckets(scores, mode, ALPHA)
    assert smallest_bucket(ALPHA) == 500
    assert set(scale.samples) == {0.0, 1.0}
    assert scale.small[0] == 1
    assert scale.small[1] == (mode == 2.0).sum()
    np.testing.assert_array_equal(
        scale.apply([3.0, 4.0, 5.0, np.nan], [2.0, np.nan, 77.0, 0.0]), [3.0, 4.0, 5.0, np.nan]
    )
    notice = bucket_notice("mode", {"a": scale}, ALPHA)[0]
    assert "1 of 3 buckets" in notice
    assert "fewer than the 500 calibration scores" in notice
    assert bucket_notice("mode", {"a": BucketScale(scale.pooled, scale.samples)}, ALPHA) == []
    with pytest.raises(DataError, match="no calibration score is a number"):
        fit_buckets([np.nan], [0.0], ALPHA)


def test_all_rows_in_one_bucket_change_nothing() -> None:
    scores, _ = two_modes(2_000)
    scale = fit_buckets(scores, np.zeros(scores.size), ALPHA)
    later = two_modes(500, seed=2)[0] * 2.0
    np.testing.assert_allclose(scale.apply(later, np.zeros(500)), later, rtol=1e-12)


def panel(rows: int = 400) -> Panel:
    start = datetime(2024, 1, 3, 22)  # a Wednesday
    table = pl.DataFrame(
        {
            "id": ["a"] * rows,
            "time": [start + timedelta(minutes=30 * k) for k in range(rows)],
            "y": np.arange(rows, dtype=float),
            "mode": [None if k == 7 else float(k % 3) for k in range(rows)],
        }
    )
    return Panel.from_frame(SeriesFrame.from_long(table, time="time", series_id="id", targets=["y"], past=["mode"]))


def test_buckets_of_rows() -> None:
    whole = panel()
    hours = hour_of_week(whole.grid, 0, 400)
    expected = [(datetime(2024, 1, 3, 22) + timedelta(minutes=30 * k)) for k in range(400)]
    np.testing.assert_array_equal(hours, [24 * t.weekday() + t.hour for t in expected])
    np.testing.assert_array_equal(row_buckets("hour_of_week", whole, ("a",), 10, 20)[0], hours[10:20])
    modes = row_buckets("mode", whole, ("a",), 5, 402)[0]  # rows beyond the series have no mode
    np.testing.assert_array_equal(modes[:4], [2.0, 0.0, np.nan, 2.0])
    assert np.isnan(modes[-2:]).all()
    np.testing.assert_array_equal(row_buckets("y", whole, ("a",), 5, 8)[0], [5.0, 6.0, 7.0])
    with pytest.raises(ConfigError, match="'moed' is neither hour_of_week nor a column"):
        row_buckets("moed", whole, ("a",), 0, 5)


def test_hours_need_a_clock() -> None:
    table = pl.DataFrame({"id": ["a"] * 20, "time": np.arange(20), "y": np.arange(20.0)})
    counted = Panel.from_frame(SeriesFrame.from_long(table, time="time", series_id="id", targets=["y"]))
    with pytest.raises(ConfigError, match="needs a clock"):
        row_buckets("hour_of_week", counted, ("a",), 0, 5)
