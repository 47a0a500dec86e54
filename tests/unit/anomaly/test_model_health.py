"""Drift health (spec 4.5): alarm rate over the last 7 days or 5,000 rows beside the nominal one, now and over time."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.health import HEALTH_RATIO, alarm_health, health_history, health_window

START = datetime(2024, 1, 1)


def scores(alarm: np.ndarray, *, name: str = "a", step: timedelta | int = timedelta(hours=1)) -> pl.DataFrame:
    """Joint rows with a score each, and a row of one variate beside them that must not count."""
    times = [index if isinstance(step, int) else START + index * step for index in range(alarm.size)]
    joint = pl.DataFrame({"series_id": name, "time": times, "variate": "*", "score": 1.0, "alarm": alarm})
    return pl.concat([joint, joint.with_columns(variate=pl.lit("x"), alarm=pl.lit(True))])


def test_the_window_is_seven_days_or_five_thousand_rows() -> None:
    assert health_window(24.0) == 168
    assert health_window(1440.0) == 5000
    assert health_window(1 / 30) == 1
    assert health_window(None) == 5000


@pytest.mark.parametrize("alarms", [9, 10])
def test_stale_needs_five_times_the_rate_and_ten_alarms(alarms: int) -> None:
    alarm = np.zeros(1000, dtype=bool)
    alarm[-alarms:] = True
    found = alarm_health(alarm, np.ones(1000, dtype=bool), 0.001, 24.0)
    assert found["alarm_rate_observed"] == pytest.approx(alarms / 168)
    assert found["alarm_rate_ratio"] == pytest.approx(alarms / 168 / 0.001)
    assert found["is_stale"] is (alarms >= 10)
    slow = alarm_health(alarm, np.ones(1000, dtype=bool), alarms / 168 / HEALTH_RATIO, 24.0)
    assert slow["is_stale"] is False, "exactly five times is not above"
    assert alarm_health(alarm, np.ones(1000, dtype=bool), None, 24.0)["alarm_rate_ratio"] is None
    nothing = alarm_health(alarm, np.zeros(1000, dtype=bool), 0.001, 24.0)
    assert nothing == {"alarm_rate_observed": None, "alarm_rate_ratio": None, "is_stale": False}


def test_history_at_each_time_is_the_health_of_the_rows_up_to_then() -> None:
    rng = np.random.default_rng(2)
    alarm = rng.uniform(size=700) < np.linspace(0.0, 0.2, 700)
    table = pl.concat([scores(alarm), scores(~alarm[:333], name="b")])
    table = table.with_columns(score=pl.when(pl.int_range(pl.len()) % 7 == 3).then(None).otherwise(pl.col("score")))
    history = health_history(table, 0.01, points=50)
    assert history["series_id"].unique(maintain_order=True).to_list() == ["a", "b"]
    for name, whole in (("a", 700), ("b", 333)):
        mine = history.filter(series_id=name)
        joint = table.filter(pl.col("series_id") == name, pl.col("variate") == "*")
        assert 25 < mine.height <= 50
        assert mine["time"][-1] == joint["time"][-1], "the newest row is always there"
        flags, scored = joint["alarm"].to_numpy(), joint["score"].is_not_null().to_numpy()
        for row in mine.iter_rows(named=True):
            last = int((row["time"] - START) / timedelta(hours=1)) + 1
            naive = alarm_health(flags[:last] & scored[:last], scored[:last], 0.01, 24.0)
            assert last <= whole
            assert row["rate"] == pytest.approx(naive["alarm_rate_observed"])
            assert row["ratio"] == pytest.approx(naive["alarm_rate_ratio"])
            assert row["is_stale"] == naive["is_stale"]


def test_integer_time_and_fixed_levels_have_a_rate_but_no_ratio() -> None:
    history = health_history(scores(np.arange(20) % 4 == 0, step=1), None)
    assert history["rate"][-1] == 0.25
    assert history["ratio"].null_count() == history.height == 20
    assert not history["is_stale"].any()


def test_rows_without_scores_have_no_rate() -> None:
    table = scores(np.zeros(5, dtype=bool)).with_columns(score=pl.lit(None, dtype=pl.Float64))
    assert health_history(table, 0.01)["rate"].to_list() == [None] * 5
    assert health_history(table.clear(), 0.01).is_empty()
