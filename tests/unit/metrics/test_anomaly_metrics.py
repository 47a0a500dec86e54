"""Anomaly metrics against scikit-learn and naive loops, their invariances, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import (
    auc_pr,
    auc_roc,
    best_adjusted_f1,
    best_f1,
    detection_delays,
    event_score,
    hit_rate,
    point_adjust,
    point_score,
    runs_of,
)
from tsforge.metrics.vus import vus


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
    for labels, scores in CASES[:40]:
        for percent in (0.0, 50.0, 100.0):
            tried = [
                point_score(labels, point_adjust(labels, scores >= t, percent=percent)).f1 for t in np.unique(scores)
            ]
            assert best_adjusted_f1(labels, scores, percent=percent) == pytest.approx(max(tried), abs=1e-12)


def naive_vus(labels: np.ndarray, scores: np.ndarray, width: int) -> tuple[float, float]:
    """The "tsb" definition, threshold by threshold."""
    n, events = labels.size, runs_of(labels)
    rocs, prs = [], []
    for w in range(width + 1):
        h = w // 2
        soft = np.zeros(n)
        for start, stop in events:
            for d in range(1, h + 1):
                for t in (start - d, stop - 1 + d):
                    if 0 <= t < n:
                        soft[t] += np.sqrt(1 - d / w)
        soft = np.where(labels == 1, 1.0, np.minimum(soft, 1.0))
        ranges: list[list[int]] = []
        for start, stop in events:
            if ranges and not ranges[-1][1] + h < start - h:
                ranges[-1][1] = stop - 1
            else:
                ranges.append([start, stop - 1])
        tprs, fprs, precisions = [], [], []
        for threshold in np.unique(scores)[::-1]:
            alarm = scores >= threshold
            inside, outside = (alarm & (labels == 1)).sum(), soft[alarm & (labels == 0)].sum()
            widened = labels.sum() + outside / 2
            hit = np.mean([alarm[max(a - h, 0) : b + h + 1].any() for a, b in ranges])
            tprs.append(min((inside + outside) / widened, 1) * hit)
            fprs.append((alarm.sum() - inside - outside) / (n - widened))
            precisions.append((inside + outside) / alarm.sum())
        assert (np.diff(tprs) >= -1e-12).all()
        assert (np.diff(fprs) >= -1e-12).all()
        rocs.append(np.trapezoid([0, *tprs, 1], [0, *fprs, 1]))
        prs.append(sum((t - s) * p for s, t, p in zip([0, *tprs], tprs, precisions, strict=False)))
    return float(np.mean(rocs)), float(np.mean(prs))


def test_vus_equals_a_threshold_by_threshold_loop() -> None:
    for labels, scores in CASES[:30]:
        found = vus(labels, scores, width=9)
        assert (found.roc, found.pr) == pytest.approx(naive_vus(labels, scores, 9), abs=1e-12)


def test_invariance_under_increasing_transforms_and_time_reversal() -> None:
    for labels, scores in CASES[:20]:
        bent = np.exp(3 * scores) - 7
        flipped = labels[::-1], scores[::-1]
        assert auc_pr(labels, bent) == pytest.approx(auc_pr(labels, scores), abs=1e-12)
        for variant in ("tsb", "2022"):
            plain = vus(labels, scores, width=6, variant=variant)  # type: ignore[arg-type]
            other = vus(labels, bent, width=6, variant=variant)  # type: ignore[arg-type]
            assert (other.roc, other.pr) == pytest.approx((plain.roc, plain.pr), abs=1e-12)
        forward, backward = vus(labels, scores, width=6), vus(*flipped, width=6)
        assert (forward.roc, forward.pr) == pytest.approx((backward.roc, backward.pr), abs=1e-12)
        alarms = scores > 0.6
        if alarms.any():
            ahead, behind = affiliation(labels, alarms), affiliation(labels[::-1], alarms[::-1])
            assert (ahead.precision, ahead.recall) == pytest.approx((behind.precision, behind.recall), abs=1e-12)


def test_limits_of_vus_and_areas() -> None:
    labels = np.zeros(300, dtype=int)
    labels[100:120] = 1
    scores = np.random.default_rng(0).uniform(size=300) + 0.5 * labels
    assert vus(labels, scores, width=0).pr == pytest.approx(auc_pr(labels, scores), abs=1e-12)
    assert auc_pr(labels, labels.astype(float)) == 1.0
    assert auc_pr(labels, np.zeros(300)) == pytest.approx(20 / 300)
    assert auc_roc(labels, np.zeros(300)) == pytest.approx(0.5)


def test_reference_thresholds_distort_short_events() -> None:
    labels = np.zeros(20_000, dtype=int)
    labels[5_000:5_020] = 1
    scores = np.random.default_rng(0).uniform(size=20_000) + 2.0 * labels  # perfect
    assert vus(labels, scores, width=20, thresholds="exact").pr > 0.6
    assert vus(labels, scores, width=20, thresholds="reference").pr < 0.4


def naive_affiliation(labels: np.ndarray, alarms: np.ndarray, fine: int = 200) -> tuple[float, float]:
    """Integrals as midpoint sums on a fine grid."""
    events, n = runs_of(labels), labels.size
    borders = [0.0, *((a[1] + b[0]) / 2 for a, b in pairwise(events)), float(n)]
    t = (np.arange(n * fine) + 0.5) / fine
    on = np.repeat(alarms, fine)
    precisions, recalls = [], []
    for (j0, j1), e0, e1 in zip(events, borders, borders[1:], strict=False):
        zone = (t > e0) & (t < e1)
        x = t[zone & on]
        if not x.size:
            recalls.append(0.0)
            continue
        d = np.maximum(np.maximum(j0 - x, x - j1), 0)
        m = min(j0 - e0, e1 - j1)
        precisions.append(np.mean(np.where(d == 0, 1, 1 - (np.minimum(d, m) + d + j1 - j0) / (e1 - e0))))
        y = t[(t > j0) & (t < j1)]
        gap = np.array([np.abs(x - v).min() for v in y]) - 0.5 / fine
        gap = np.where(on[(t > j0) & (t < j1)], 0, np.maximum(gap, 0))
        margin = np.minimum(y - e0, e1 - y)
        recalls.append(np.mean(np.where(gap == 0, 1, 1 - (np.minimum(gap, margin) + gap) / (e1 - e0))))
    return float(np.mean(precisions)), float(np.mean(recalls))


def test_affiliation_equals_its_integrals() -> None:
    for labels, scores in CASES[:8]:
        alarms = scores > np.quantile(scores, 0.8)
        found = affiliation(labels, alarms)
        assert (found.precision, found.recall) == pytest.approx(naive_affiliation(labels, alarms), abs=0.01)


def test_a_detector_that_always_alarms_is_penalised() -> None:
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


def test_hit_rate_floors_and_averages_over_events() -> None:
    ranked = [["a", "b", "c", "d"], ["d", "a", "b"], []]
    expected = [["a", "c"], ["d"], ["a"]]
    assert hit_rate(ranked, expected) == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert hit_rate(ranked, expected, percent=150) == pytest.approx((1.0 + 1.0 + 0.0) / 3)
    with pytest.raises(DataError, match="1 rankings for 2 events"):
        hit_rate([["a"]], [["a"], ["b"]])


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
    with pytest.raises(DataError, match="undefined without a labelled event"):
        affiliation([0, 0], [0, 1])
    with pytest.raises(ConfigError, match="width is -1"):
        vus([0, 1], [0.0, 1.0], width=-1)
