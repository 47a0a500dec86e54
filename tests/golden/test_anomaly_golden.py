"""Anomaly metrics against numbers of independent implementations on one small example (checklist 1).

Provenance of the numbers: scikit-learn 1.x (AUC), TSB_AD 1.5 (VUS "tsb", PA, composite F1, affiliation), aeon 1.6 and
dtaianomaly 0.5.1 in compatibility mode (VUS "2022"), dtaianomaly (event-wise with penalty), tadpak 0.3.3
(PA%K), TSB_AD (range-based).
"""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import (
    auc_pr,
    auc_roc,
    best_adjusted_f1,
    best_f1,
    event_score,
    point_adjust,
    point_score,
)
from tsforge.metrics.range_based import range_score
from tsforge.metrics.vus import Variant, vus

N = 40
LABELS = np.zeros(N, dtype=int)
LABELS[10:15] = 1
LABELS[25:28] = 1
SCORES = (7 * np.arange(N) + 3) % 41 / 41 + 0.35 * LABELS
ALARMS = np.isin(np.arange(N), [5, 10, 11, 17, 26, 27, 28, 34])


def test_areas_under_curves() -> None:
    assert auc_pr(LABELS, SCORES) == pytest.approx(0.6520658263305322, abs=1e-12)
    assert auc_roc(LABELS, SCORES) == pytest.approx(0.83203125, abs=1e-12)


@pytest.mark.parametrize("thresholds", ["reference", "exact"])  # all scores are distinct and few: they coincide
@pytest.mark.parametrize(
    ("variant", "roc", "pr"),
    [("tsb", 0.8920276539655467, 0.7358080199126906), ("2022", 0.8330803746474151, 0.6579445212467064)],
)
def test_volume_under_the_surface(variant: Variant, roc: float, pr: float, thresholds: str) -> None:
    found = vus(LABELS, SCORES, width=8, variant=variant, thresholds=thresholds)  # type: ignore[arg-type]
    assert found.roc == pytest.approx(roc, abs=1e-12)
    assert found.pr == pytest.approx(pr, abs=1e-12)


def test_a_volume_without_width_is_the_area_where_the_best_scores_hit_both_events() -> None:
    found = vus(LABELS, SCORES, width=0)
    assert (found.roc, found.pr) == pytest.approx((0.83203125, 0.6520658263305322), abs=1e-12)


def test_best_f1_and_point_adjusted() -> None:
    assert best_f1(LABELS, SCORES).f1 == pytest.approx(0.56, abs=1e-12)
    adjusted = best_adjusted_f1(LABELS, SCORES, percents=(0, 50))
    assert adjusted.f1 == pytest.approx((1.0, 0.7619047619047619), abs=1e-12)


def test_grades_of_predictions() -> None:
    assert set(np.argsort(-SCORES)[:8]) == set(np.flatnonzero(ALARMS))
    points = point_score(LABELS, ALARMS)
    assert (points.precision, points.recall, points.f1) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)
    assert point_score(LABELS, point_adjust(LABELS, ALARMS)).f1 == pytest.approx(0.8, abs=1e-12)
    events = event_score(LABELS, ALARMS)
    assert (events.precision, events.recall) == pytest.approx((0.4, 1.0), abs=1e-12)
    assert (events.penalised_precision, events.f1) == pytest.approx((0.35, 0.5185185185185185), abs=1e-12)
    assert events.composite_f1 == pytest.approx(2 / 3, abs=1e-12)
    assert range_score(LABELS, ALARMS, "tsb").f1 == pytest.approx(0.43518518518518523, abs=1e-12)


def test_affiliation() -> None:
    found = affiliation(LABELS, ALARMS)
    assert found.precision == pytest.approx(0.734375, abs=1e-12)
    assert found.recall == pytest.approx(0.9491666666666667, abs=1e-12)
    assert found.f1 == pytest.approx(0.8280689271129805, abs=1e-12)
