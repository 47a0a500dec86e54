"""Adaptive and log-standardised rules against their recursions, the promised rate, level shifts, what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsforge.anomaly.adaptive_rules import Adaptive, EwNormalised
from tsforge.anomaly.rule_base import ThresholdRule
from tsforge.core.errors import DataError


def test_adaptive_follows_its_recursion() -> None:
    generator = np.random.default_rng(0)
    alpha, gain, window = 0.05, 0.02, 120
    calibration, scores = generator.standard_normal(100), generator.standard_normal(800) + np.linspace(0.0, 2.0, 800)
    found = Adaptive(alpha, gain, window).fit(calibration).run(scores)
    share, seen = alpha, calibration.tolist()
    for i, score in enumerate(scores.tolist()):
        past = np.sort(seen[-window:])
        rank = max(1, math.floor(share * (past.size + 1) + 1e-9))
        level = past[-rank] if share > 0.0 else np.inf
        assert found.threshold[i] == level
        assert found.alarm[i] == (score > level)
        share += gain * (alpha - found.alarm[i])
        seen.append(score)
    assert 0.02 < found.alarm.mean() < 0.08


def test_after_a_quiet_time_ordinary_rows_do_not_alarm_to_make_up_for_it() -> None:
    rule = Adaptive(0.02, 0.5, 100, low_factor=2.0).fit(np.arange(100.0))
    assert not rule.run(-np.arange(200.0)).alarm.any()
    assert rule.facts()["share_now"] == 0.5
    decision = rule.step(-200.0)
    assert (decision.alarm, decision.low) == (False, decision.threshold)


SCORES = st.lists(st.floats(-1e6, 1e6) | st.floats(0.0, 1.0), min_size=50, max_size=300)


@settings(max_examples=30, deadline=None)
@given(scores=SCORES, alpha=st.floats(0.001, 0.2), gain=st.floats(0.001, 0.5))
def test_the_share_of_alarms_is_bounded_for_any_scores(scores: list[float], alpha: float, gain: float) -> None:
    alarms = Adaptive(alpha, gain, 100).fit(np.arange(20.0)).run(scores).alarm
    assert alarms.mean() <= alpha + (alpha + gain) / (gain * len(scores)) + 1e-12


def test_every_record_alarms_without_correction_and_keeps_to_alpha_with_it() -> None:
    """A steady trend in the score, where each row is a record (spec 5.6)."""
    calibration, records = np.arange(1000.0), np.arange(1000.0, 21_000.0)
    assert Adaptive(0.01, 1e-9, 1000).fit(calibration).run(records).alarm.mean() > 0.99
    assert Adaptive(0.01, 0.05, 1000).fit(calibration).run(records).alarm.mean() == pytest.approx(0.01, rel=0.02)


def test_log_scores_are_standardised_by_the_rows_before() -> None:
    generator = np.random.default_rng(1)
    calibration, scores = np.exp(generator.standard_normal(500)), np.exp(generator.standard_normal(400) + 0.5)
    rule = EwNormalised(0.02, 50.0)
    found = rule.fit(calibration).run(scores)
    weight = 1.0 - 0.5 ** (1.0 / 50.0)
    logs = np.log(calibration)
    mean, variance, standardised = logs.mean(), logs.var(), []
    thresholds = []
    for x in np.maximum(np.concatenate([logs, np.log(scores)]), logs.min()):
        deviation = math.sqrt(variance)
        standardised.append((x - mean) / deviation)
        thresholds.append((mean, deviation))
        step = float(np.clip(x - mean, -3.0 * deviation, 3.0 * deviation))
        mean += weight * step
        variance = (1.0 - weight) * (variance + weight * step**2)
    level = np.sort(standardised[:500])[math.ceil(0.98 * 501) - 1]
    expected = [math.exp(m + level * d) for m, d in thresholds[500:]]
    np.testing.assert_allclose(found.threshold, expected, rtol=1e-10)
    np.testing.assert_array_equal(found.alarm, scores > np.array(expected))


def test_half_a_life_later_a_score_counts_half() -> None:
    rule = EwNormalised(0.02, 40.0).fit(np.exp(np.random.default_rng(2).standard_normal(300)))
    before = rule.facts()["log_mean"]
    target = math.exp(before + 0.1)
    rule.run(np.full(40, target))
    assert rule.facts()["log_mean"] == pytest.approx(before + 0.05, rel=1e-6)


@pytest.mark.parametrize(
    "rule", [Adaptive(0.01, 0.005, 1000), EwNormalised(0.01, 300.0)], ids=["adaptive", "ew_normalised"]
)
def test_a_level_shift_is_learnt(rule: ThresholdRule) -> None:
    """Checklist 6: the scores become twenty times as large."""
    generator = np.random.default_rng(3)
    found = rule.fit(np.abs(generator.standard_normal(3000))).run(20.0 * np.abs(generator.standard_normal(6000)))
    assert found.alarm[:100].any()
    assert found.alarm[1000:].mean() < 0.03


def test_alarm_rate_on_exchangeable_scores_is_nominal() -> None:
    """Checklist 4."""
    generator = np.random.default_rng(4)
    alpha, rows = 0.01, 40_000
    for rule in (Adaptive(alpha, 0.005, 5000), EwNormalised(alpha, 720.0)):
        rate = rule.fit(generator.chisquare(3, 5000)).run(generator.chisquare(3, rows)).alarm.mean()
        assert abs(rate - alpha) < 4 * np.sqrt(alpha / rows + alpha / 5000)


def test_zeros_negative_and_constant_scores() -> None:
    generator = np.random.default_rng(5)
    some_zero = np.concatenate([np.zeros(50), np.exp(generator.standard_normal(500))])
    rule = EwNormalised(0.01, 100.0).fit(some_zero)
    assert not rule.run(np.zeros(10_000)).alarm.any()
    assert rule.step(1e9).alarm
    logs = np.log(np.maximum(some_zero, some_zero[some_zero > 0.0].min()))
    quiet = EwNormalised(0.01, 100.0).fit(some_zero)
    quiet.run(np.zeros(10_000))
    assert quiet.facts()["log_deviation"] == pytest.approx(0.01 * logs.std())
    with pytest.raises(DataError, match="1 of 3 calibration scores are negative"):
        EwNormalised(0.01, 100.0).fit([1.0, -1.0, 2.0])
    for constant in ([2.0, 2.0, 2.0], [0.0, 0.0], [0.0, 3.0, 3.0]):
        with pytest.raises(DataError, match="do not differ"):
            EwNormalised(0.01, 100.0).fit(constant)


def test_rules_need_calibration() -> None:
    for rule in (Adaptive(0.01, 0.005, 100), EwNormalised(0.01, 100.0)):
        with pytest.raises(DataError, match="not fitted"):
            rule.step(1.0)
        with pytest.raises(DataError, match="needs calibration scores"):
            rule.fit([np.nan])


@pytest.mark.parametrize(
    "rule", [Adaptive(0.05, 0.02, 60), EwNormalised(0.05, 20.0)], ids=["adaptive", "ew_normalised"]
)
def test_missing_scores_change_nothing_and_a_stored_state_goes_on(rule: ThresholdRule) -> None:
    """Checklist 7."""
    generator = np.random.default_rng(6)
    fresh = rule.fit(generator.chisquare(3, 50)).state()
    rule.run(generator.chisquare(4, 40))
    state = json.loads(json.dumps(rule.state()))
    assert state != fresh
    assert not rule.run(np.full(9, np.nan)).alarm.any()
    assert rule.state() == state
    again = type(rule).restore(state)
    assert again.state() == state
    rest = generator.chisquare(3, 100)
    for left, right in zip(rule.run(rest), again.run(rest), strict=True):
        np.testing.assert_array_equal(left, right)
