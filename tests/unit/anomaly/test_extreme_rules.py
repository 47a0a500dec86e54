"""Extreme-value rules against a naive loop, their counts, the cap on exclusions, what they refuse, what a row costs."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.extreme_rules import ALIKE, Dspot, Pot, Spot
from tsforge.anomaly.gpd import fit_excesses
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError


def naive_spot(calibration: np.ndarray, scores: np.ndarray, risk: float, depth: int) -> tuple[list[float], list[bool]]:
    """Levels and alarms by the definition: lists, means and tails worked out again for every row; depth 0 = spot."""
    seen = [s for s in calibration if not np.isnan(s)]
    window = seen[:depth]
    distances = []
    for score in seen[depth:]:
        distances.append(score - (np.mean(window[-depth:]) if depth else 0.0))
        window.append(score)
    u = float(np.quantile(distances, 0.98))
    excesses = [x - u for x in distances if x > u]
    count = len(distances)

    def level() -> float:
        tail = fit_excesses(np.array(excesses), u=u, num_excesses=len(excesses), num_scores=count, shape="free")
        return max(tail.quantile(risk), u)

    z, levels, alarms = level(), [], []
    for score in scores:
        mean = float(np.mean(window[-depth:])) if depth else 0.0
        levels.append(mean + z)
        alarms.append(bool(score - mean > z))
        if np.isnan(score) or alarms[-1]:
            continue
        count += 1
        window.append(score)
        if score - mean > u:
            excesses.append(score - mean - u)
            z = level()
    return levels, alarms


@pytest.mark.parametrize("depth", [0, 25])
def test_streaming_rules_equal_the_definition(depth: int) -> None:
    generator = np.random.default_rng(4)
    drift = 2.0 * np.sin(np.arange(5500) / 300) if depth else 0.0
    scores = np.abs(generator.standard_normal(5500)) + drift
    scores[generator.uniform(size=scores.size) < 0.02] = np.nan
    scores[4100:5500:90] += 4.0
    calibration, rest = scores[:4000], scores[4000:]
    settings = {"shape": "free", "exclude_flagged": None, "max_excesses": 500}
    rule = Dspot(1e-3, depth, **settings) if depth else Spot(1e-3, **settings)
    found = rule.fit(calibration).run(rest)
    levels, alarms = naive_spot(calibration, rest, 1e-3, depth)
    np.testing.assert_allclose(found.threshold, levels, rtol=1e-6)  # two searches for a flat maximum
    assert found.alarm.tolist() == alarms
    assert 10 < sum(alarms) < 30


def test_alarms_leave_no_trace_and_the_report_says_how_many_excesses_there_are() -> None:
    """Checklist 8."""
    rule = Spot(1e-4).fit(np.random.default_rng(0).standard_normal(5000))
    before = rule.facts()
    assert before["num_excesses"] == before["excesses_fitted"] == 100
    assert rule.run([50.0, np.inf, np.nan, 50.0]).alarm.tolist() == [True, True, False, True]
    assert rule.facts() == before
    rule.step(2.5)
    after = rule.facts()
    assert (after["num_excesses"], after["num_scores"]) == (101, 5001)


def test_memory_is_bounded_while_all_excesses_count() -> None:
    generator = np.random.default_rng(1)
    rule = Spot(1e-3, level=0.9, max_excesses=60).fit(generator.standard_normal(600))
    scores = generator.standard_normal(1000)
    found = rule.run(scores)
    facts = rule.facts()
    assert facts["excesses_fitted"] == len(rule.state()["excesses"]) == 60
    assert facts["num_excesses"] == 60 + ((scores > facts["u"]) & ~found.alarm).sum() > 120


@pytest.mark.parametrize("depth", [None, 50])
def test_after_a_level_shift_the_cap_ends_what_is_published_as_endless(depth: int | None) -> None:
    """Checklist 6: the variant without a cap shows the runaway; capped, alarms stop about 120 rows after the shift."""
    generator = np.random.default_rng(3)
    calibration, shifted = np.abs(generator.standard_normal(5000)), np.abs(generator.standard_normal(5000)) + 8.0

    def rate(cap: int | None) -> float:
        rule = Spot(1e-3, exclude_flagged=cap) if depth is None else Dspot(1e-3, depth, exclude_flagged=cap)
        return float(rule.fit(calibration).run(shifted).alarm[1000:].mean())

    assert rate(None) == 1.0
    assert rate(120) < 0.005


@pytest.mark.parametrize("depth", [None, 10])
def test_exactly_so_many_alarms_in_a_row_are_left_out_and_infinite_ones_always(depth: int | None) -> None:
    generator = np.random.default_rng(10)
    calibration = np.abs(generator.standard_normal(4000))

    def made() -> Spot:
        rule = Spot(1e-3, exclude_flagged=4) if depth is None else Dspot(1e-3, depth, exclude_flagged=4)
        return rule.fit(calibration)

    rule, taken = made(), []
    for score in [9.0, 9.1, np.inf, 9.2, np.nan, 9.3, np.inf, 9.4, np.inf, 0.5, 60.0]:
        before = rule.state()["num_scores"]
        rule.step(score)
        taken.append(rule.state()["num_scores"] - before)
    assert taken == [0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0]
    fresh = made().state()
    assert rule.fit(calibration).state() == fresh


@pytest.mark.parametrize("depth", [None, 10])
def test_a_state_stored_in_a_run_of_alarms_knows_how_many_were_left_out(depth: int | None) -> None:
    """Checklist 7, at every cut of a run that is longer than the cap; the tail is fitted after the same excess."""
    generator = np.random.default_rng(11)
    calibration = np.abs(generator.standard_normal(4000))
    scores = np.abs(generator.standard_normal(60))
    scores[10:40] += 8.0
    scores[45:] += 1.5
    settings = {"level": 0.9, "exclude_flagged": 6}
    rules = [Spot(1e-3, **settings) if depth is None else Dspot(1e-3, depth, **settings) for _ in range(2)]
    whole = rules[0].fit(calibration).run(scores)
    rules[1].fit(calibration)
    left_out, unfitted = set(), set()
    for cut in range(60):
        state = json.loads(json.dumps(rules[1].state()))
        left_out.add(state["excluded"])
        unfitted.add(state["unfitted"])
        again = type(rules[1]).restore(state)
        assert again.state() == state
        np.testing.assert_array_equal(again.run(scores[cut:]).threshold, whole.threshold[cut:])
        rules[1].step(float(scores[cut]))
    assert left_out == set(range(7))
    assert len(unfitted) > 3


def test_dspot_follows_a_drift_that_leaves_spot_blind() -> None:
    generator = np.random.default_rng(5)
    drifting = np.abs(generator.standard_normal(5000)) + np.linspace(0.0, 6.0, 5000)
    calibration = np.abs(generator.standard_normal(5000))
    plain, following = Spot(1e-4).fit(calibration), Dspot(1e-4, 100).fit(calibration)
    assert plain.run(drifting).alarm.mean() < 0.02  # every row of the drift is learnt as an excess
    assert following.run(drifting).alarm.mean() < 2e-3
    far = 7.0 + 6.0
    assert not plain.step(far).alarm
    assert following.step(far).alarm


def test_the_running_mean_does_not_drift_and_infinite_scores_do_not_spoil_it() -> None:
    generator = np.random.default_rng(6)
    rule = Dspot(1e-3, 30, level=0.9).fit(1e9 + generator.standard_normal(700))
    rule.run(np.concatenate([1e9 + generator.standard_normal(5000), [-np.inf, np.inf]]))
    state = rule.state()
    assert state["sum"] == pytest.approx(math.fsum(state["recent"]), rel=1e-15)
    assert np.isfinite(rule.run([0.0]).threshold[0])
    rule.step(-np.inf)
    assert np.isfinite(rule.step(0.0).threshold)


def test_the_level_never_falls_below_the_start_of_the_tail() -> None:
    rule = Spot(0.05, level=0.9).fit(np.random.default_rng(7).standard_normal(1000))
    rule.run(np.full(100_000, -1.0))  # the share of excesses falls far below the risk
    rule.step(rule.state()["u"] + 1e-3)
    assert rule.step(0.0).threshold == rule.state()["u"]


def test_a_sensor_that_sticks_in_the_tail_keeps_the_shape() -> None:
    rule = Spot(1e-4, level=0.9, max_excesses=50).fit(np.random.default_rng(8).standard_normal(600))
    stuck = rule.state()["u"] + 0.1
    rule.run(np.full(49, stuck))
    shape = rule.facts()["gamma"], rule.facts()["sigma"]
    rule.run(np.full(200, stuck))
    assert np.ptp(rule.state()["excesses"]) <= ALIKE * 0.1
    assert rule.facts()["num_excesses"] == 60 + 249
    assert np.isfinite(shape).all()
    assert np.isfinite(rule.step(0.0).threshold)


def test_low_levels_are_risks_too() -> None:
    calibration = np.random.default_rng(9).standard_normal(5000)
    for rule in (Pot(1e-3, low_factor=5.0), Spot(1e-3, low_factor=5.0)):
        decision = rule.fit(calibration).step(0.0)
        assert decision.low == pytest.approx(Pot(5e-3).fit(calibration).threshold)
    below = Pot(1e-3, low_factor=100.0).fit(calibration)  # a share of 0.1, outside the tail: the plain quantile
    assert below.low == np.sort(calibration)[-500]
    assert Spot(1e-3, low_factor=100.0).fit(calibration).step(0.0).low == below.low


def test_too_few_excesses_are_refused_with_the_number_needed() -> None:
    calibration = np.random.default_rng(0).standard_normal(1000)
    more = r" \({} to fit on, and the newest 1000, which are judged\)"
    for rule, needed in (
        (Pot(1e-4), "2550 rows, lower"),
        (Spot(1e-4), f"3550 rows{more.format(2550)}"),
        (Dspot(1e-4, 10), f"3560 rows{more.format(2560)}"),
    ):
        with pytest.raises(DataError, match=f"rule {rule.kind} needs 50 .* leave 20; calibrate on at least {needed}"):
            rule.fit(calibration)
    for depth in (2000, 1000):
        with pytest.raises(DataError, match=f"more calibration scores than its depth of {depth}, got 1000"):
            Dspot(1e-4, depth).fit(calibration)
    for unfitted in (Spot(1e-4), Dspot(1e-4, 10)):
        with pytest.raises(DataError, match="not fitted"):
            unfitted.step(1.0)
        with pytest.raises(DataError, match="not fitted"):
            unfitted.run([1.0])


def test_a_risk_inside_the_bulk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"risk 0\.03 must be below 1 - level = 0\.02"):
        validate(DetectConfig, {"rule": {"kind": "spot", "risk": 0.03}})


def test_a_row_costs_little() -> None:
    scores = np.random.default_rng(0).standard_normal(25_000)
    for rule in (Spot(1e-4), Dspot(1e-4, 100)):
        rule.fit(scores[:5000])
        start = time.process_time()
        for score in scores[5000:10_000].tolist():
            rule.step(score)
        assert (time.process_time() - start) / 5000 < 1e-4
        start = time.process_time()
        rule.run(scores[10_000:])
        assert (time.process_time() - start) / 15_000 < 1e-4
