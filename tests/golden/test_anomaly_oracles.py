"""Anomaly metrics against other implementations on 100 random cases each (checklist 1).

The numbers of the others are in ``anomaly_oracles.json``, written by ``write_anomaly_oracles.py`` where their packages
are installed; none is needed here. Conventions that differ: a share of nothing is NaN here and 0 or 1 there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomaly_cases import PERCENTS, RANGE_SETTINGS, Case, cases, one_event, periodic

from tsforge.core.errors import DataError
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
from tsforge.metrics.range_based import RangeSetting, range_score
from tsforge.metrics.ucr import ucr_correct
from tsforge.metrics.vus import Thresholds, Variant, leaderboard_width, vus

CASES = cases()
STORED = json.loads(Path(__file__).with_name("anomaly_oracles.json").read_text(encoding="utf-8"))["cases"]
LEAST = {"tsb ranges": 90, "tsb composite": 60, "tsb adjusted": 60}  # others: 100 cases


def areas(case: Case) -> list[float]:
    return [auc_pr(case.labels, case.scores), auc_roc(case.labels, case.scores), best_f1(case.labels, case.scores).f1]


def volumes(variant: Variant) -> Callable[[Case], list[float]]:
    def grade(case: Case) -> list[float]:
        kinds: list[Thresholds] = ["reference"]
        if case.labels.size <= 250:  # every distinct score is one of the 250 quantiles
            kinds.append("exact")
        found = [vus(case.labels, case.scores, width=case.width, variant=variant, thresholds=kind) for kind in kinds]
        assert all((one.roc, one.pr) == pytest.approx((found[0].roc, found[0].pr), abs=1e-12) for one in found)
        return [found[0].roc, found[0].pr]

    return grade


def events(case: Case) -> list[float]:
    found = event_score(case.labels, case.alarms)
    return [found.penalised_precision, found.recall, found.f1]


def ranges(case: Case) -> list[float]:
    values = []
    for alpha, bias, cardinality in RANGE_SETTINGS:
        setting = RangeSetting(alpha=alpha, bias=bias, precision_bias=bias, cardinality=cardinality)
        found = range_score(case.labels, case.alarms, setting)
        values += [found.precision, found.recall]
    return values


def near(case: Case) -> list[float]:
    found = affiliation(case.labels, case.alarms)
    return [found.precision, found.recall]


def adjusted(case: Case) -> list[float]:
    return [point_score(case.labels, point_adjust(case.labels, case.alarms, percent=k)).f1 for k in PERCENTS]


GRADES: dict[str, Callable[[Case], list[float]]] = {
    "scikit-learn": areas,
    "tsb vus": volumes("tsb"),
    "vus vus": volumes("tsb"),
    "aeon vus": volumes("2022"),
    "dtaianomaly vus": volumes("2022"),
    "tadpak": lambda case: list(best_adjusted_f1(case.labels, case.scores, percents=PERCENTS).f1),
    "tadpak of alarms": adjusted,
    "dtaianomaly events": events,
    "prts": ranges,
    "dtaianomaly ranges": ranges,
    "tsb ranges": lambda case: [range_score(case.labels, case.alarms, "tsb").f1],
    "tsb composite": lambda case: [event_score(case.labels, case.alarms).composite_f1],
    "tsb adjusted": lambda case: adjusted(case)[:1],
    "tsb affiliation": near,
    "telemeval affiliation": near,
}


def test_the_same_cases_are_drawn_as_were_graded() -> None:
    assert len(STORED) == len(CASES)
    assert [row["checksum"] for row in STORED] == pytest.approx([case.checksum for case in CASES], abs=1e-6)
    found: dict[str, set[Any]] = {"kinds": {case.kind for case in CASES}}
    assert found["kinds"] == {"borders", "neighbours", "single rows", "all", "mixed"}
    assert set(GRADES) == {name for row in STORED for name in row} - {"checksum", "dtaianomaly ucr", "tsb width"}


@pytest.mark.parametrize("oracle", sorted(GRADES))
def test_grades_equal_the_other_implementation(oracle: str) -> None:
    graded = 0
    for case, row in zip(CASES, STORED, strict=True):
        if oracle not in row:
            continue
        found, expected = np.array(GRADES[oracle](case)), np.array(row[oracle])
        # TSB_AD adds 1e-15 to the divisor of a harmonic mean
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=f"{oracle}, {case.kind}: {case}")
        graded += 1
    assert graded >= LEAST.get(oracle, 100)


def test_highest_scores_are_where_the_other_implementation_sees_them() -> None:
    expected = [row["dtaianomaly ucr"][0] for row in STORED]
    assert 0.2 < np.mean(expected) < 0.8
    assert [float(ucr_correct(*one_event(number))) for number in range(len(STORED))] == expected


def test_widths_are_those_of_the_leaderboard() -> None:
    expected = [int(row["tsb width"][0]) for row in STORED]
    assert len(set(expected)) > 50
    assert [leaderboard_width(periodic(number)) for number in range(len(STORED))] == expected


def test_all_anomalous_labels_are_refused_by_threshold_free_metrics() -> None:
    """An area needs rows of both kinds; the other packages give 1, NaN with a warning, or an error."""
    case = next(case for case in CASES if case.kind == "all")
    for metric in (auc_pr, auc_roc, best_f1, vus, best_adjusted_f1):
        with pytest.raises(DataError, match="a metric needs rows of both kinds"):
            metric(case.labels, case.scores)
