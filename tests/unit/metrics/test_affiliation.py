"""Affiliation against brute-force integration, chance, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tsforge.core.errors import DataError
from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import runs_of

PARTS = 4  # all kinks of the integrands lie at quarters of a row: the midpoint rule on quarters is exact


def by_integration(labels: np.ndarray, alarms: np.ndarray) -> tuple[float, float]:
    """Integrals of the definitions, as sums over quarters of a row."""
    events, n = runs_of(labels), labels.size
    borders = [0.0, *((a[1] + b[0]) / 2 for a, b in pairwise(events)), float(n)]
    t = (np.arange(n * PARTS) + 0.5) / PARTS
    on = np.repeat(alarms.astype(bool), PARTS)
    precisions, recalls = [], []
    for (j0, j1), e0, e1 in zip(events, borders, borders[1:], strict=False):
        x = t[(t > e0) & (t < e1) & on]
        if not x.size:
            recalls.append(0.0)
            continue
        d = np.maximum(np.maximum(j0 - x, x - j1), 0)
        m = min(j0 - e0, e1 - j1)
        precisions.append(np.mean(np.where(d == 0, 1, 1 - (np.minimum(d, m) + d + j1 - j0) / (e1 - e0))))
        y = t[(t > j0) & (t < j1)]
        parts = [(max(a, e0), min(b, e1)) for a, b in runs_of(alarms) if b > e0 and a < e1]
        d = np.min([np.maximum(np.maximum(a - y, y - b), 0) for a, b in parts], axis=0)
        m = np.minimum(y - e0, e1 - y)
        recalls.append(np.mean(np.where(d == 0, 1, 1 - (np.minimum(d, m) + d) / (e1 - e0))))
    return float(np.mean(precisions)), float(np.mean(recalls))


def test_closed_forms_equal_brute_force_integration() -> None:
    generator = np.random.default_rng(1)
    for _ in range(150):
        n = int(generator.integers(3, 90))
        labels, alarms = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        for flags, most in ((labels, 9), (alarms, 6)):
            for _ in range(int(generator.integers(1, 6))):
                start = int(generator.integers(0, n))
                flags[start : start + int(generator.integers(1, most))] = 1
        found = affiliation(labels, alarms)
        assert (found.precision, found.recall) == pytest.approx(by_integration(labels, alarms), abs=1e-12)


def test_a_random_prediction_has_precision_one_half() -> None:
    """So values of any detector crowd above it: never a headline."""
    generator = np.random.default_rng(0)
    labels = np.zeros(50_000, dtype=int)
    for start in range(1000, 50_000, 2500):
        labels[start : start + 20] = 1
    alarms = generator.uniform(size=50_000) < 0.01
    found = affiliation(labels, alarms)
    assert found.precision == pytest.approx(0.5, abs=0.03)
    assert 0.62 < found.f1 < 0.72


def test_nothing_predicted_has_no_precision_and_no_recall() -> None:
    found = affiliation([0, 1, 1, 0], [0, 0, 0, 0])
    assert np.isnan(found.precision)
    assert found.recall == 0.0
    assert affiliation([0, 1, 1, 0], [0, 1, 1, 0]).f1 == 1.0


def test_impossible_input_is_refused() -> None:
    with pytest.raises(DataError, match="undefined without a labelled event"):
        affiliation([0, 0], [0, 1])
    with pytest.raises(DataError, match="2 labels but 3 predictions"):
        affiliation([0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="predictions must be 0 or 1"):
        affiliation([0, 1], [0.2, 0.9])
