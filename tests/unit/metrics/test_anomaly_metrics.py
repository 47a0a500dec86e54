"""Anomaly metrics against scikit-learn and naive loops, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import (
    auc_pr,
    auc_roc,
    best_adjusted_f1,
    best_f1,
    delay_summary,
    detection_delays,
    event_score,
    hit_rate,
    hit_rate_chance,
    hit_share,
    point_adjust,
    point_score,
)


def cases(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random labels with events at borders, adjacent and single-row ones; scores with and without ties."""
    generator = np.random.default_rng(0)
    found = []
    while len(found) < count:
        n = int(generator.integers(5, 80))
        labels = np.zeros(n, dtype=int)
        for _ in range(int(generator.integers(1, 5))):
            start = int(generator.integers(0, n))
            labels[start : start + int(generator.integers(1, 9))] = 1
        if 0 < labels.sum() < n:
            scores = generator.uniform(size=n) + 0.3 * labels
            found.append((labels, np.round(scores, 1) if len(found) % 2 else scores))
    return found


CASES = cases(100)


def test_areas_equal_scikit_learn() -> None:
    for labels, scores in CASES:
        assert auc_pr(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert auc_roc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))
        assert best_f1(labels, scores).f1 == pytest.approx(f1, abs=1e-12)
        best = best_f1(labels, scores)
        assert point_score(labels, scores >= best.threshold).f1 == pytest.approx(best.f1, abs=1e-12)


def test_best_adjusted_f1_equals_trying_every_threshold() -> None:
    for labels, scores in CASES[:20]:
        percents = (0.0, 50.0, 100.0)
        found = best_adjusted_f1(labels, scores, percents=percents, seed=3)
        noise = np.random.default_rng(3).uniform(size=labels.size)
        for values, f1 in ((scores, found.f1), (noise, found.random)):
            tried = [
                max(point_score(labels, point_adjust(labels, values >= t, percent=k)).f1 for t in np.unique(values))
                for k in percents
            ]
            assert f1 == pytest.approx(tried, abs=1e-12)


def test_areas_of_perfect_and_constant_scores() -> None:
    """Checklist 3."""
    labels = np.zeros(300, dtype=int)
    labels[100:120] = 1
    assert auc_pr(labels, labels.astype(float)) == 1.0
    assert auc_pr(labels, np.zeros(300)) == pytest.approx(20 / 300)
    assert auc_roc(labels, np.zeros(300)) == pytest.approx(0.5)
    assert best_f1(labels, np.zeros(300)).f1 == pytest.approx(2 * 20 / 320)


def test_a_detector_that_always_alarms_is_penalised() -> None:
    """Checklist 5."""
    labels = np.zeros(1000, dtype=int)
    labels[400:410] = 1
    always = event_score(labels, np.ones(1000, dtype=int))
    assert (always.precision, always.recall) == (1.0, 1.0)
    assert always.penalised_precision == 0.0
    assert always.f1 == 0.0
    never = event_score(labels, np.zeros(1000, dtype=int))
    assert np.isnan(never.precision)
    assert never.recall == 0.0


def test_delays_and_declared_early_warnings() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1])
    alarms = np.array([0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_allclose(detection_delays(labels, alarms), [2, 0, np.nan])
    np.testing.assert_allclose(detection_delays(labels, alarms, lead=1), [0, 0, np.nan])


def test_an_alarm_in_the_event_before_is_no_early_warning() -> None:
    labels = np.array([0, 1, 1, 0, 1, 1, 1])
    alarms = np.array([0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_allclose(detection_delays(labels, alarms, lead=5), [1, 1])
    alarms[3] = 1
    np.testing.assert_allclose(detection_delays(labels, alarms, lead=5), [1, 0])
    with pytest.raises(ConfigError, match="lead is -1"):
        detection_delays(labels, alarms, lead=-1)


def test_delay_summary_says_how_many_were_found() -> None:
    labels = np.array([0, 1, 1, 1, 0, 1, 1, 0, 1])
    alarms = np.array([0, 0, 0, 1, 0, 1, 0, 0, 0])
    found = delay_summary(labels, alarms)
    assert (found.median, found.detected, found.lead) == (1.0, pytest.approx(2 / 3), 0)
    none = delay_summary(labels, 0 * alarms)
    assert np.isnan(none.median)
    assert none.detected == 0.0
    with pytest.raises(DataError, match="no labelled event"):
        delay_summary(0 * labels, alarms)


def test_pak_is_strict_whatever_the_rounding_of_shares() -> None:
    """Exactly K % of an event's rows do not adjust it; 7 % of 100 is 7.000000000000001 % in floating point."""
    labels = np.zeros(120, dtype=int)
    labels[10:110] = 1
    for k in range(1, 100):
        alarms = np.zeros(120, dtype=int)
        alarms[10 : 10 + k] = 1
        assert point_adjust(labels, alarms, percent=k).sum() == k
        assert point_adjust(labels, alarms, percent=k - 1).sum() == 100


def test_point_adjusted_f1_never_comes_without_that_of_a_random_score() -> None:
    generator = np.random.default_rng(0)
    labels = np.zeros(20_000, dtype=int)
    for start in generator.integers(0, 19_000, size=20):
        labels[start : start + 300] = 1
    found = best_adjusted_f1(labels, generator.uniform(size=20_000), percents=(0, 20, 50, 100))
    assert found.random[0] > 0.9  # a random score wins
    assert list(found.random) == sorted(found.random, reverse=True)
    assert found.f1 == pytest.approx(found.random, abs=0.05)
    assert "PA%0: 0.9" in str(found)
    assert "(random score: 0.9" in str(found)
    assert "chosen on the labels" in str(found)
    with pytest.raises(ConfigError, match=r"percents \[101\] lie outside"):
        best_adjusted_f1(labels, generator.uniform(size=20_000), percents=(0, 101))


def test_hit_rate_floors_and_averages_over_events() -> None:
    assert hit_rate([[f"v{i}" for i in range(100)]], [[f"v{i}" for i in range(100)]], percent=29) == 0.29
    for size in range(1, 60):  # 100 and 150 % never round; 29 % of 100 is 28.999999999999996 in floating point
        names = [f"v{i}" for i in range(2 * size)]
        assert hit_share(names, names[:size]) == 1.0
        assert hit_share(names, names[-size:], percent=150) == (3 * size // 2 - size) / size
    expected_sets = [["a", "b", "c"], ["d"]]
    assert hit_rate_chance(expected_sets, 6) == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert hit_rate_chance(expected_sets, 6, percent=150) == pytest.approx((4 / 6 + 1 / 6) / 2)
    with pytest.raises(DataError, match="up to 3 of 2 variates"):
        hit_rate_chance(expected_sets, 2)
    ranked = [["a", "b", "c", "d"], ["d", "a", "b"], []]
    expected = [["a", "c"], ["d"], ["a"]]
    assert hit_rate(ranked, expected) == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert hit_rate(ranked, expected, percent=150) == pytest.approx((1.0 + 1.0 + 0.0) / 3)
    with pytest.raises(DataError, match="1 rankings for 2 events"):
        hit_rate([["a"]], [["a"], ["b"]])
    with pytest.raises(DataError, match="without expected variates"):
        hit_share(["a"], [])


def test_missing_scores_are_refused_unless_told() -> None:
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, np.nan, np.nan])
    with pytest.raises(DataError, match="2 of 4 scores are missing"):
        auc_pr(labels, scores)
    assert auc_pr(labels, scores, missing="drop") == 1.0
    assert auc_pr(labels, scores, missing="lowest") == pytest.approx(0.5 + 0.5 * 2 / 4)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(DataError, match="0 of 3 rows are labelled"):
        auc_roc([0, 0, 0], [1, 2, 3])
    with pytest.raises(DataError, match="2 labels but 3 scores"):
        auc_pr([0, 1], [1, 2, 3])
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        auc_pr([0, 2], [1, 2])
    with pytest.raises(ConfigError, match="missing is 'zero'"):
        auc_pr([0, 1], [1, 2], missing="zero")
