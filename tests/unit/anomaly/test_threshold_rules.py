"""Threshold rules: order statistics against a naive loop, stream equals batch, state, alarm rates, the runaway."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from tsforge.anomaly.config import BudgetRule, DetectConfig, FixedRule, QuantileRule, RollingQuantileRule
from tsforge.anomaly.rule_base import upper_rank
from tsforge.anomaly.thresholds import (
    Fixed,
    Quantile,
    RollingQuantile,
    ThresholdRule,
    budget_alpha,
    build_rule,
    default_window,
    restore_rule,
)
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError


def naive_level(window: np.ndarray, alpha: float) -> float:
    rank = int(np.ceil((1 - alpha) * (window.size + 1) - 1e-9))
    return float(np.sort(window)[min(rank, window.size) - 1])


SAMPLES = {
    "normal": lambda g, n: g.standard_normal(n),
    "ties": lambda g, n: g.poisson(1.0, n).astype(float),
    "walk": lambda g, n: np.cumsum(g.standard_normal(n)),
    "huge": lambda g, n: g.choice([0.0, 1e300, np.inf, -3.0], n),
    "constant": lambda g, n: np.zeros(n),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("alpha", [0.001, 0.02, 0.2])
def test_rolling_levels_equal_a_naive_loop_and_stream_equals_batch(kind: str, alpha: float) -> None:
    generator = np.random.default_rng([list(SAMPLES).index(kind), int(1000 * alpha)])
    for calibration_size, window in ((3, 100), (150, 100), (40, 130)):
        sample = SAMPLES[kind](generator, calibration_size + 400)
        calibration, scores = sample[:calibration_size], sample[calibration_size:].copy()
        scores[generator.uniform(size=scores.size) < 0.1] = np.nan
        batch = RollingQuantile(alpha, window).fit(calibration)
        stream = RollingQuantile(alpha, window).fit(calibration)
        found = batch.run(scores)
        seen = list(calibration)
        for i, score in enumerate(scores.tolist()):
            past = np.array(seen[-window:])
            decision = stream.step(score)
            assert decision.threshold == naive_level(past, alpha) == found.threshold[i]
            assert decision.low == naive_level(past, min(0.5, 5 * alpha)) == found.low[i]
            assert decision.alarm == bool(score > decision.threshold) == found.alarm[i]
            if not np.isnan(score):
                seen.append(score)
        assert batch.state() == stream.state()


@pytest.mark.parametrize(
    "rule", [RollingQuantile(0.01, 200), Quantile(0.01), Fixed(2.0)], ids=["rolling", "quantile", "fixed"]
)
def test_state_survives_json_in_the_middle(rule: ThresholdRule) -> None:
    generator = np.random.default_rng(0)
    rule.fit(generator.standard_normal(150))
    rule.run(generator.standard_normal(180))
    again = restore_rule(json.loads(json.dumps(rule.state())))
    rest = generator.standard_normal(300)
    for left, right in zip(rule.run(rest), again.run(rest), strict=True):
        np.testing.assert_array_equal(left, right)
    assert again.describe() == rule.describe()


def test_restoring_nonsense_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="unknown rule 'magic'"):
        restore_rule({"kind": "magic"})
    with pytest.raises(DataError, match="lacks 'window'"):
        restore_rule({"kind": "rolling_quantile", "alpha": 0.1})


@pytest.mark.parametrize(("alpha", "size"), [(0.01, 999), (0.1, 9), (0.05, 19), (0.2, 4), (0.001, 5000)])
def test_rank_is_exact_where_floating_point_is_not(alpha: float, size: int) -> None:
    from fractions import Fraction

    exact = Fraction(str(alpha))
    rank = -((-(1 - exact) * (size + 1)) // 1)  # ceil((1 - alpha)(n + 1))-th smallest
    assert upper_rank(alpha, size) == max(1, size - rank + 1)


def test_alarm_rate_on_exchangeable_scores_is_nominal() -> None:
    generator = np.random.default_rng(1)
    alpha, rows = 0.01, 40_000
    for rule in (Quantile(alpha), RollingQuantile(alpha, 5_000)):
        rate = rule.fit(generator.standard_normal(5_000)).run(generator.standard_normal(rows)).alarm.mean()
        # binomial error of the rows and of the calibration sample
        assert abs(rate - alpha) < 4 * np.sqrt(alpha / rows + alpha / 5_000)


def test_a_level_shift_is_learnt_within_one_window_while_leaving_flagged_rows_out_runs_away() -> None:
    generator = np.random.default_rng(2)
    alpha, window = 0.01, 1_000
    calibration = generator.standard_normal(window)
    shifted = generator.standard_normal(6_000) + 6.0

    def rate(excluded: int) -> float:
        """Checklist 6."""
        rule = RollingQuantile(alpha, window, exclude_flagged=excluded).fit(calibration)
        return float(rule.run(shifted).alarm[window:].mean())

    assert rate(0) < 3 * alpha
    assert rate(10**9) > 0.9  # the prudent-looking variant, the reason for the default
    assert 3 * alpha < rate(5) < 0.8  # a cap helps, but little


def test_only_so_many_alarms_in_a_row_stay_outside_the_window() -> None:
    generator = np.random.default_rng(3)
    calibration, scores = generator.standard_normal(80), generator.standard_normal(500)
    scores[::7] += 4.0
    scores[100:130] += 9.0
    scores[110:113] = np.nan
    found = RollingQuantile(0.05, 100, exclude_flagged=4).fit(calibration).run(scores)
    seen, excluded = list(calibration), 0
    for i, score in enumerate(scores.tolist()):
        level = naive_level(np.array(seen[-100:]), 0.05)
        assert found.threshold[i] == level
        assert found.alarm[i] == (score > level)
        if score > level and excluded < 4:
            excluded += 1
        elif not np.isnan(score):
            seen.append(score)
            excluded = excluded if score > level else 0
    assert 40 < found.alarm.sum() < 120


def test_a_state_stored_in_a_run_of_alarms_knows_how_many_were_left_out() -> None:
    """Checklist 7, at every cut of a run that is longer than the cap."""
    generator = np.random.default_rng(4)
    calibration, scores = generator.standard_normal(80), generator.standard_normal(40)
    scores[10:25] += 9.0
    whole = RollingQuantile(0.05, 100, exclude_flagged=6).fit(calibration).run(scores)
    left_out = set()
    for cut in range(8, 27):
        rule = RollingQuantile(0.05, 100, exclude_flagged=6).fit(calibration)
        rule.run(scores[:cut])
        left_out.add(rule.state()["excluded"])
        again = restore_rule(json.loads(json.dumps(rule.state())))
        np.testing.assert_array_equal(again.run(scores[cut:]).threshold, whole.threshold[cut:])
    assert left_out == set(range(7))


def test_fitting_again_forgets_what_was_judged() -> None:
    generator = np.random.default_rng(5)
    calibration, scores = generator.standard_normal(80), generator.standard_normal(30) + 9.0
    for rule in (RollingQuantile(0.05, 100, exclude_flagged=40), RollingQuantile(0.05, 100), Quantile(0.05)):
        fresh = rule.fit(calibration).state()
        rule.run(scores)
        assert rule.fit(calibration).state() == fresh


def test_a_window_longer_than_any_stream_costs_what_the_rows_cost() -> None:
    rng = np.random.default_rng(3)
    calibration, scores = rng.normal(size=300), rng.normal(size=4_000)
    endless = RollingQuantile(0.01, 10**15).fit(calibration)
    enough = RollingQuantile(0.01, 4_300).fit(calibration)
    one_by_one = RollingQuantile(0.01, 10**15).fit(calibration)
    expected = enough.run(scores)
    found = endless.run(scores)
    steps = [one_by_one.step(score) for score in scores]
    for name in ("alarm", "threshold", "low"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert np.array_equal([getattr(step, name) for step in steps], getattr(expected, name)), name


def test_missing_scores_neither_alarm_nor_enter_the_memory() -> None:
    rule = RollingQuantile(0.1, 100).fit(np.arange(50.0))
    before = rule.state()
    found = rule.run(np.full(20, np.nan))
    assert not found.alarm.any()
    assert rule.state() == before
    for other in (Quantile(0.1).fit(np.arange(50.0)), Fixed(1.0)):
        assert not other.run([np.nan, np.nan]).alarm.any()


def test_rules_need_calibration() -> None:
    with pytest.raises(DataError, match="not fitted"):
        RollingQuantile(0.1, 100).step(1.0)
    with pytest.raises(DataError, match="not fitted"):
        RollingQuantile(0.1, 100).run([1.0])
    with pytest.raises(DataError, match="needs calibration scores"):
        Quantile(0.1).fit([np.nan])


def test_a_million_rows_take_seconds() -> None:
    scores = np.random.default_rng(0).standard_normal(1_005_000) ** 2
    for window in (5_000, 172_800):  # two days of seconds
        rule = RollingQuantile(0.001, window).fit(scores[:5_000])
        start = time.perf_counter()
        rule.run(scores[5_000:])
        assert time.perf_counter() - start < 10  # 0.2 to 0.5 s on one free core


def test_default_window() -> None:
    assert default_window(0.01, None) == 5_000
    assert default_window(0.0001, None) == 100_000
    assert default_window(0.01, 10_080) == 20_160


def test_a_budget_is_a_rate_of_the_grid() -> None:
    assert budget_alpha(BudgetRule(alarms_per_day=0.24), 24.0, 5) == pytest.approx(0.01)
    assert budget_alpha(BudgetRule(alarms_per_day=0.24, scope="total"), 24.0, 5) == pytest.approx(0.002)
    assert budget_alpha(BudgetRule(points_per_day=1440), None, 1) == pytest.approx(0.2 / 1440)
    with pytest.raises(ConfigError, match=r"rule\.points_per_day: needed where time is a plain number"):
        budget_alpha(BudgetRule(), None, 1)
    with pytest.raises(ConfigError, match="would flag 100% of normal rows; ask for at most 0.2"):
        budget_alpha(BudgetRule(alarms_per_day=1.0), 1.0, 1)


def test_rules_are_built_from_config() -> None:
    rule = build_rule(BudgetRule(alarms_per_day=0.24), points_per_day=24.0, season_length=168, num_series=2)
    assert rule.describe() == "rolling_quantile(alpha=0.01,window=5000)"
    assert build_rule(RollingQuantileRule(alpha=0.05, window=300)).describe().endswith("window=300)")
    assert build_rule(QuantileRule(alpha=0.05)).alpha == 0.05
    assert build_rule(FixedRule(value=3.0)).alpha is None
    capped = build_rule(RollingQuantileRule(alpha=0.05, window=300, exclude_flagged=7))
    assert capped.describe() == "rolling_quantile(alpha=0.05,window=300,exclude_flagged=7)"


def test_a_rule_without_a_kind_is_a_budget_and_mistakes_are_named() -> None:
    assert validate(DetectConfig, {"rule": {"alarms_per_day": 2}}).rule == BudgetRule(alarms_per_day=2)
    with pytest.raises(ConfigError, match="top_k is needed by joint: top_k and has no effect without it"):
        validate(DetectConfig, {"score": {"top_k": 3}})
    with pytest.raises(ConfigError, match="alpha"):
        validate(DetectConfig, {"rule": {"kind": "quantile", "alpha": 0.5}})
    with pytest.raises(ConfigError, match="min_rows 500 exceeds max_rows 200"):
        validate(DetectConfig, {"calibration": {"min_rows": 500, "max_rows": 200}})
