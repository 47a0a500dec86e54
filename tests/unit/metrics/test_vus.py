"""VUS against a threshold-by-threshold loop for both definitions, its limits, and rows without a score."""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import auc_pr, auc_roc, runs_of
from tsforge.metrics.vus import Variant, leaderboard_width, vus


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with events of 1 to 8 rows, some touching a border or each other's buffers; ties in every other."""
    generator = np.random.default_rng(number)
    n = int(generator.integers(6, 80))
    labels = np.zeros(n, dtype=int)
    for _ in range(int(generator.integers(1, 5))):
        start = int(generator.integers(0, n))
        labels[start : start + int(generator.integers(1, 9))] = 1
    labels[int(generator.integers(0, n))] = 0
    labels[int(generator.integers(0, n // 2)) + n // 2] = 1
    if labels.all():
        labels[0] = 0
    scores = generator.uniform(size=n) + 0.3 * labels
    return labels, np.round(scores, 1) if number % 2 else scores


def soft_labels(labels: np.ndarray, w: int, variant: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return soft labels, and the ranges that count as found by any alarm in them, ends included."""
    n, events, h = labels.size, [(a, b - 1) for a, b in runs_of(labels)], w // 2
    soft = np.zeros(n)
    for start, stop in events:
        for d in range(1, h + 1):
            if start - d >= 0:
                soft[start - d] += np.sqrt(1 - d / w)
            if stop + d < n and (variant == "tsb" or d <= h - 1):
                soft[stop + d] += np.sqrt(1 - d / w)
    soft = np.where(labels == 1, 1.0, np.minimum(soft, 1.0))
    if variant == "2022":
        return soft, [(a, b - 1) for a, b in runs_of(soft > 0)]
    ranges: list[tuple[int, int]] = []
    for start, stop in events:
        if ranges and not ranges[-1][1] - h + h < start - h:
            ranges[-1] = (ranges[-1][0], min(stop + h, n - 1))
        else:
            ranges.append((max(start - h, 0), min(stop + h, n - 1)))
    return soft, ranges


def naive_vus(
    labels: np.ndarray, scores: np.ndarray, width: int, variant: str, counted: np.ndarray | None = None
) -> tuple[float, float]:
    """The definition, threshold by threshold, over the counted rows."""
    counted = np.ones(labels.size, dtype=bool) if counted is None else counted
    event, n = (labels == 1) & counted, int(counted.sum())
    rocs, prs = [], []
    for w in range(width + 1):
        soft, ranges = soft_labels(labels, w, variant)
        outside = np.where((labels == 0) & counted, soft, 0.0)
        ranges = [(a, b) for a, b in ranges if counted[a : b + 1].any()]
        tprs, fprs, precisions = [], [], []
        for threshold in np.unique(scores[counted])[::-1]:
            alarm = counted & (scores >= threshold)
            found = event[alarm].sum() + outside[alarm].sum()
            widened = event.sum() + (outside[alarm].sum() if variant == "tsb" else outside.sum()) / 2
            hit = np.mean([alarm[a : b + 1].any() for a, b in ranges])
            tprs.append(min(found / widened, 1) * hit)
            fprs.append((alarm.sum() - found) / (n - widened))
            precisions.append(found / alarm.sum())
        assert (np.diff(tprs) >= -1e-12).all()
        assert (np.diff(fprs) >= -1e-12).all()
        rocs.append(np.trapezoid([0, *tprs, 1], [0, *fprs, 1]))
        if variant == "tsb":
            prs.append(sum((t - s) * p for s, t, p in zip([0, *tprs], tprs, precisions, strict=False)))
        else:
            prs.append(np.trapezoid([1, *precisions], [0, *tprs]))
    return float(np.mean(rocs)), float(np.mean(prs))


@pytest.mark.parametrize("variant", ["tsb", "2022"])
def test_equals_a_threshold_by_threshold_loop(variant: Variant) -> None:
    for number in range(40):
        labels, scores = draw(number)
        width = (0, 1, 2, 5, 12)[number % 5]
        found = vus(labels, scores, width=width, variant=variant)
        assert (found.roc, found.pr) == pytest.approx(naive_vus(labels, scores, width, variant), abs=1e-12)


@pytest.mark.parametrize("variant", ["tsb", "2022"])
def test_dropped_rows_keep_their_place_in_time(variant: Variant) -> None:
    graded = 0
    for number in range(25):
        labels, scores = draw(number)
        counted = np.random.default_rng(number).uniform(size=labels.size) > 0.3
        if not labels[counted].any() or labels[counted].all():
            continue
        given = np.where(counted, scores, np.nan)
        found = vus(labels, given, width=7, variant=variant, missing="drop")
        expected = naive_vus(labels, scores, 7, variant, counted)
        assert (found.roc, found.pr) == pytest.approx(expected, abs=1e-12)
        lowest = vus(labels, given, width=7, variant=variant, missing="lowest")
        expected = naive_vus(labels, np.where(counted, scores, -9.0), 7, variant)
        assert (lowest.roc, lowest.pr) == pytest.approx(expected, abs=1e-12)
        graded += 1
    assert graded > 18


def test_limits() -> None:
    """Checklist 3: one event without a buffer gives the plain areas; perfect scores tend to 1 as the buffer shrinks."""
    labels = np.zeros(300, dtype=int)
    labels[100:120] = 1
    scores = np.random.default_rng(0).uniform(size=300) + 0.5 * labels
    assert vus(labels, scores, width=0).pr == pytest.approx(auc_pr(labels, scores), abs=1e-12)
    # with one event, existence is 1 from the first event row on, and before it recall is 0
    assert vus(labels, scores, width=0).roc == pytest.approx(auc_roc(labels, scores), abs=1e-12)
    perfect = [vus(labels, labels + 0.1 * scores, width=w).pr for w in (40, 20, 10, 5, 1, 0)]
    assert perfect == sorted(perfect)
    assert perfect[-1] == pytest.approx(1.0, abs=1e-12)
    constant = vus(labels, np.zeros(300), width=0)
    assert constant.pr == pytest.approx(20 / 300, abs=1e-12)
    assert constant.roc == pytest.approx(0.5, abs=1e-12)


def test_reference_thresholds_distort_short_events() -> None:
    """A perfect detector of 50 rows in 100,000: the specification gives 0.142, and 0.998 with dense thresholds."""
    labels = np.zeros(100_000, dtype=int)
    labels[50_000:50_050] = 1
    scores = np.random.default_rng(0).uniform(size=100_000) + 2.0 * labels
    assert vus(labels, scores, thresholds="exact").pr > 0.998
    assert vus(labels, scores, thresholds="reference").pr == pytest.approx(0.142, abs=0.005)


def test_the_width_of_a_series_is_its_period_or_125() -> None:
    rows = np.arange(5000)
    assert leaderboard_width(np.sin(2 * np.pi * rows / 48)) == 48
    assert leaderboard_width(np.sin(2 * np.pi * rows / 4)) != 4  # too short to be one
    for flat in (np.ones(500), np.arange(500.0), np.arange(4.0), np.zeros(0)):
        assert leaderboard_width(flat) == 125
    with pytest.raises(DataError, match="without missing or infinite values"):
        leaderboard_width([1.0, np.nan, 2.0])
    with pytest.raises(DataError, match="one variate"):
        leaderboard_width(np.ones((5, 2)))


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="width is -1"):
        vus([0, 1], [0.0, 1.0], width=-1)
    with pytest.raises(ConfigError, match="variant 'mine', thresholds 'exact'"):
        vus([0, 1], [0.0, 1.0], variant="mine")
    with pytest.raises(DataError, match="1 of 2 scores are missing"):
        vus([0, 1], [0.0, np.nan])
    with pytest.raises(DataError, match="a metric needs rows of both kinds"):
        vus([1, 1], [0.0, 1.0])
