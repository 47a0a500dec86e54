"""Online intervals by tracking: a naive loop as oracle, never infinite, the bound, restarts, and states of before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from online_cases import START, forecasts, times

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.forecasting.online_backtest import online_forecasts
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig

SETTINGS: dict[str, Any] = {"rate": 0.3, "window": 20, "start": 9}


def naive(values: np.ndarray, horizon: int, stride: int, coverage: float) -> tuple[dict[tuple[int, int], float], float]:
    """Half widths by (cutoff, step) of intervals published as [-1, 1], and the largest correction."""
    result: dict[tuple[int, int], float] = {}
    largest = 0.0
    for step in range(1, horizon + 1):
        correction, scores, waiting = 0.0, [], []
        for cutoff in range(0, len(values) - horizon, stride):
            for issued in [item for item in waiting if item["due"] <= cutoff]:
                waiting.remove(issued)
                y = values[issued["due"]]
                if math.isnan(y):
                    continue
                if issued["adapted"]:
                    delay = 1 + len(scores) - issued["seen"]
                    missed = float(abs(y) > issued["half"])
                    correction = max(-1.0, correction + SETTINGS["rate"] / delay * (missed - (1.0 - coverage)))
                    largest = max(largest, abs(correction))
                scores.append(abs(y) / 2.0)  # distance from the middle in widths: the score and a half
            sample = sorted(scores[-SETTINGS["window"] :])
            adapted = len(sample) >= SETTINGS["start"]
            half = 1.0
            if adapted:
                rank = math.ceil(round((len(sample) + 1) * coverage, 9))
                half = 2.0 * max(sample[rank - 1], 0.01) * math.exp(correction)
            waiting.append({"due": cutoff + step, "half": half, "adapted": adapted, "seen": len(scores)})
            result[cutoff, step] = half
    return result, largest


@pytest.mark.parametrize(("stride", "horizon"), [(1, 1), (1, 4), (3, 7)])
def test_intervals_equal_a_loop_that_waits_for_each_target(stride: int, horizon: int) -> None:
    rng = np.random.default_rng(horizon)
    values = rng.standard_t(3, 200) * np.where(np.arange(200) > 100, 4.0, 1.0)
    values[rng.random(200) < 0.1] = np.nan
    state = OnlineConformal(OnlineConfig(**SETTINGS))
    found, status = online_forecasts(forecasts(values, horizon, stride), state)
    expected, largest = naive(values, horizon, stride, 0.8)
    assert found.height == len(expected)
    for row in found.iter_rows(named=True):
        half = expected[int((row["cutoff"] - START).total_seconds() // 3600), row["step"]]
        assert row["q0.1"] == pytest.approx(-half, rel=1e-12)
        assert row["q0.9"] == pytest.approx(half, rel=1e-12)
    assert set(status["status_80"]) == {"static", "adapted"}
    assert largest > 0.5, "hardly anything was corrected"


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("rate", [0.1, 0.8])
def test_an_adversary_causes_no_more_misses_than_the_bound_and_no_infinite_interval(rate: float, delay: int) -> None:
    """In blocks the adversary leaves any interval that is not too wide already, or takes its middle."""
    coverage, rounds, reach = 0.8, 500, 1e4
    state = OnlineConformal(OnlineConfig(rate=rate, window=50, start=10))
    blank = forecasts(np.zeros(rounds + delay + 2), delay + 1).filter(pl.col("step") == delay + 1)
    waiting: list[tuple[pl.DataFrame, float, bool]] = []
    missed, scores = [], []
    rng = np.random.default_rng(0)
    for number, part in enumerate(blank.partition_by("cutoff", maintain_order=True)[:rounds]):
        now = part["cutoff"][0]
        for row, value, adapted in [item for item in waiting if item[0]["time"][0] <= now]:
            state.update(row.select("series_id", "variate", "time").with_columns(actual=pl.lit(value)), now)
            scores.append(abs(value) / 2.0)
            if adapted:
                missed.append(not row["q0.1"][0] <= value <= row["q0.9"][0])
        waiting = [item for item in waiting if item[0]["time"][0] > now]
        issued, status = state.issue(part.drop("actual"))
        high = issued["q0.9"][0]
        assert math.isfinite(high)
        hostile = (number // 25) % 2 == 0 and high < reach
        value = high * 2.0 + 1.0 if hostile else rng.normal() * 1e-1
        waiting.append((issued, value, status["status_80"][0] == "adapted"))
    largest = math.log(max(scores) / 0.01)
    bound = (largest + rate) * (1 + delay) / (rate * len(missed))
    assert len(missed) > 450
    assert np.mean(missed) - (1.0 - coverage) <= bound
    assert np.mean(missed) > 0.15, "the adversary hardly hit"


def test_coverage_returns_after_errors_have_doubled() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=1200) * np.where(np.arange(1200) > 600, 2.0, 0.8)
    table = forecasts(values, 1, coverage=0.9, half=1.64)
    found, _ = online_forecasts(table, OnlineConformal(OnlineConfig()))
    late = found.filter(pl.col("cutoff") > times([620])[0])
    inside = float(late["actual"].is_between(late["q0.05"], late["q0.95"]).mean())  # type: ignore[arg-type]
    static = float(late["actual"].is_between(-1.64, 1.64).mean())  # type: ignore[arg-type]
    assert static < 0.65
    assert inside == pytest.approx(0.9, abs=0.01)


def test_a_target_that_never_misses_winds_nothing_down_without_end() -> None:
    values = np.zeros(400)
    state = OnlineConformal(OnlineConfig(start=10, window=20))
    found, _ = online_forecasts(forecasts(values, 1), state)
    assert state.alpha[0, 0] == -1.0
    assert found["q0.9"][-1] == pytest.approx(2.0 * 0.01 * math.exp(-1.0))
    assert found["q0.1"][-1] < 0.0 < found["q0.9"][-1]


@pytest.mark.parametrize("pool", ["own", "series"])
def test_a_restart_at_any_moment_changes_nothing(tmp_path: Path, pool: Any) -> None:
    rng = np.random.default_rng(5)
    parts = [forecasts(rng.standard_t(3, 60) * scale, 3, series=name) for name, scale in (("a", 1.0), ("b", 4.0))]
    table = pl.concat(parts).with_columns(**{"q0.25": pl.lit(-0.3), "q0.75": pl.lit(0.4)})
    config = OnlineConfig(window=12, start=10, pool=pool)
    straight, _ = online_forecasts(table, OnlineConformal(config))
    known = table.select("series_id", "variate", "time", "actual").unique(maintain_order=True)
    state, rows = OnlineConformal(config), []
    for part in table.sort("cutoff", maintain_order=True).partition_by("cutoff", maintain_order=True):
        now = part["cutoff"][0]
        state.update(known.filter(pl.col("time") <= now), now)
        state.save(tmp_path / "state")
        state = OnlineConformal.load(tmp_path / "state")
        rows.append(state.issue(part)[0])
        state.save(tmp_path / "state")
        state = OnlineConformal.load(tmp_path / "state")
    assert pl.concat(rows).equals(straight)


def test_pooled_series_move_one_correction_by_the_mean_of_their_misses_and_a_delay_in_cutoffs() -> None:
    values = np.random.default_rng(1).normal(size=(2, 60))
    values[1] *= 3.0
    horizon = 3
    tables = [
        forecasts(values[number], horizon, series=name).filter(pl.col("step") == horizon)
        for number, name in enumerate("ab")
    ]
    state = OnlineConformal(OnlineConfig(rate=0.3, window=30, start=12, pool="series"))
    online_forecasts(pl.concat(tables), state)
    correction, scores, waiting = 0.0, [], []
    for cutoff in range(0, 60 - horizon):
        for due, half, seen in [item for item in waiting if item[0] <= cutoff]:
            new = [abs(y) / 2.0 for y in values[:, due]]
            if half is not None:
                share = np.mean([score > half for score in new])
                delay = 1 + (len(scores) - seen) / 2
                correction = max(-1.0, correction + 0.3 / delay * (share - 0.2))
            scores += new
        waiting = [item for item in waiting if item[0] > cutoff]
        sample = sorted(scores[-30:])
        half = None
        if len(sample) >= 12:
            half = sample[math.ceil(round((len(sample) + 1) * 0.8, 9)) - 1] * math.exp(correction)
        waiting.append((cutoff + horizon, half, len(scores)))
    assert state.cells.height == 1
    assert abs(correction) > 0.05
    assert state.alpha[0, 0] == pytest.approx(correction, abs=1e-12)


def test_perturbing_the_future_changes_no_interval() -> None:
    values = np.random.default_rng(2).normal(size=100)
    other = np.where(np.arange(100) > 60, values * 50.0 + 9.0, values)
    found = []
    for given in (values, other):
        result, _ = online_forecasts(forecasts(given, 5), OnlineConformal(OnlineConfig(start=10)))
        found.append(result.drop("actual"))
    upto = pl.col("cutoff") <= times([60])[0]
    assert found[0].filter(upto).equals(found[1].filter(upto))
    assert not found[0].filter(~upto).equals(found[1].filter(~upto))


def test_settings_of_one_method_are_refused_by_the_other() -> None:
    for given, message in (
        ({"rates": [0.05]}, "only method aci has rates; add method: aci, or remove rates"),
        ({"cap": True, "memory": 50}, "only method aci has cap, memory"),
        ({"method": "aci", "rate": 0.4}, "only method tracking has a rate"),
        ({"rate": 0.0}, "greater than 0"),
        ({"method": "pid"}, "tracking"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(OnlineConfig, given)
    assert validate(OnlineConfig, {}).steps == (0.4,)
    assert validate(OnlineConfig, {"method": "aci"}).steps == (0.05,)
    for config in (OnlineConfig(), OnlineConfig(method="aci", rates=(0.1, 0.2), cap=True, memory=50)):
        assert validate(OnlineConfig, config.model_dump(mode="json")) == config


def test_a_state_stored_before_tracking_goes_on_as_aci(tmp_path: Path) -> None:
    state = OnlineConformal(OnlineConfig(method="aci", rates=(0.1,), start=10, window=20))
    online_forecasts(forecasts(np.random.default_rng(0).normal(size=40), 1), state)
    state.save(tmp_path / "state")
    about = json.loads((tmp_path / "state" / "online.json").read_text())
    del about["config"]["method"], about["config"]["rate"]
    about["format"] = 1
    (tmp_path / "state" / "online.json").write_text(json.dumps(about))
    again = OnlineConformal.load(tmp_path / "state")
    assert again.config == state.config
    part = forecasts(np.zeros(3), 1).head(1).drop("actual")
    assert again.issue(part)[0].equals(state.issue(part)[0])
