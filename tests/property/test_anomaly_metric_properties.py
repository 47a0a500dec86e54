"""Invariances of anomaly metrics on arbitrary labels and scores (checklist 2 and 3)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import auc_pr, auc_roc, best_adjusted_f1, best_f1, event_score, runs_of
from tsforge.metrics.range_based import range_score
from tsforge.metrics.vus import Thresholds, Variant, vus

Series = tuple[np.ndarray, np.ndarray]


@st.composite
def series(draw: st.DrawFn, *, one_event: bool = False) -> Series:
    """Labels of both kinds, and scores from few values, so that there are many ties."""
    n = draw(st.integers(4, 60))
    if one_event:
        start = draw(st.integers(0, n - 2))
        stop = draw(st.integers(start + 1, n - 1 if start == 0 else n))
        labels = np.zeros(n, dtype=int)
        labels[start:stop] = 1
    else:
        labels = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
        labels[draw(st.integers(0, n - 2))] = 1
        labels[n - 1] = draw(st.integers(0, 1))
        if labels.all():
            labels[0] = 0
    scores = np.array(draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n)), dtype=np.float64)
    return labels, scores


def numbers(labels: np.ndarray, scores: np.ndarray, width: int) -> list[float]:
    kinds: list[tuple[Variant, Thresholds]] = [("tsb", "exact"), ("tsb", "reference"), ("2022", "exact")]
    volumes = [vus(labels, scores, width=width, variant=variant, thresholds=kind) for variant, kind in kinds]
    found = [auc_pr(labels, scores), auc_roc(labels, scores), best_f1(labels, scores).f1]
    return [*found, *best_adjusted_f1(labels, scores).f1, *[part for one in volumes for part in (one.roc, one.pr)]]


@settings(max_examples=30, deadline=None)
@given(case=series(), width=st.integers(0, 12))
def test_strictly_increasing_transforms_change_nothing(case: Series, width: int) -> None:
    labels, scores = case
    plain = numbers(labels, scores, width)
    for bent in (np.exp(scores), 3.0 * scores**3 - 7.0):
        assert numbers(labels, bent, width) == plain


@settings(max_examples=30, deadline=None)
@given(case=series(), width=st.integers(0, 12), level=st.integers(-9, 9))
def test_time_reversal_changes_nothing_that_has_no_direction(case: Series, width: int, level: int) -> None:
    labels, scores = case
    ahead, back = (labels, scores), (labels[::-1], scores[::-1])
    assert auc_pr(*back) == auc_pr(*ahead)
    assert auc_roc(*back) == auc_roc(*ahead)
    first, second = vus(*ahead, width=width), vus(*back, width=width)
    assert (second.roc, second.pr) == pytest.approx((first.roc, first.pr), abs=1e-13)
    alarms = scores >= level
    for grade in (affiliation, event_score, range_score):
        forward: Any = grade(labels, alarms)
        backward: Any = grade(labels[::-1], alarms[::-1])
        pair = (forward.precision, forward.recall)
        assert (backward.precision, backward.recall) == pytest.approx(pair, abs=1e-12, nan_ok=True)


def test_time_reversal_changes_the_variant_of_2022() -> None:
    """Its buffer after an event is one row shorter than the one before."""
    labels, scores = np.zeros(30, dtype=int), np.arange(30.0)
    labels[12:16] = 1
    forward, backward = (vus(labels[::step], scores[::step], width=8, variant="2022").pr for step in (1, -1))
    plain = vus(labels[::-1], scores, width=8, variant="2022").pr
    assert abs(forward - backward) > 1e-3
    assert plain > 0.0


@settings(max_examples=30, deadline=None)
@given(case=series(one_event=True))
def test_without_a_buffer_one_event_gives_the_area_under_precision_and_recall(case: Series) -> None:
    labels, scores = case
    assert vus(labels, scores, width=0).pr == pytest.approx(auc_pr(labels, scores), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(case=series())
def test_without_a_buffer_several_events_hold_the_area_down(case: Series) -> None:
    """Existence x is a factor of recall R. The area falls short of AUC-PR by the sum of R_j (1 - x_j) (p_j - p_{j+1}).

    So it is at most AUC-PR where precision p never rises as the threshold falls. Not everywhere: see the next test.
    """
    labels, scores = case
    recall, existence, precision = [], [], []
    for level in np.unique(scores)[::-1]:
        alarms = scores >= level
        recall.append((alarms & (labels == 1)).sum() / labels.sum())
        existence.append(np.mean([alarms[a:b].any() for a, b in runs_of(labels)]))
        precision.append(recall[-1] * labels.sum() / alarms.sum())
    falls = -np.diff(precision)
    shortfall = float(np.sum((np.array(recall) * (1.0 - np.array(existence)))[:-1] * falls))
    found, whole = vus(labels, scores, width=0).pr, auc_pr(labels, scores)
    assert found == pytest.approx(whole - shortfall, abs=1e-12)
    assert (falls < 0).any() or found <= whole + 1e-12


def test_without_a_buffer_several_events_can_also_lift_it() -> None:
    """The second event comes last and precision rises there: half of the first event's recall is counted only then."""
    labels, scores = np.array([1, 0, 0, 0, 1]), np.array([0.5, 0.5, 0.5, 0.9, 0.1])
    assert auc_pr(labels, scores) == pytest.approx(0.5 * 0.25 + 0.5 * 0.4)
    assert vus(labels, scores, width=0).pr == pytest.approx(0.25 * 0.25 + 0.75 * 0.4)


@settings(max_examples=25, deadline=None)
@given(case=series())
def test_perfect_and_constant_scores(case: Series) -> None:
    labels, _ = case
    perfect, constant = labels.astype(np.float64), np.zeros(labels.size)
    assert auc_pr(labels, perfect) == auc_roc(labels, perfect) == best_f1(labels, perfect).f1 == 1.0
    assert vus(labels, perfect, width=0).pr == pytest.approx(1.0, abs=1e-12)
    assert auc_pr(labels, constant) == pytest.approx(labels.mean(), abs=1e-12)
    assert auc_roc(labels, constant) == pytest.approx(0.5, abs=1e-12)
    assert vus(labels, constant, width=0).roc == pytest.approx(0.5, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(case=series(), width=st.integers(0, 12))
def test_everything_lies_between_0_and_1(case: Series, width: int) -> None:
    labels, scores = case
    assert all(-1e-12 <= number <= 1.0 + 1e-12 for number in numbers(labels, scores, width))
    for level in (-5.0, 0.0, 5.0):
        alarms = scores >= level
        for found in (affiliation(labels, alarms), range_score(labels, alarms)):
            values = [found.precision, found.recall, found.f1]
            assert all(np.isnan(value) or -1e-12 <= value <= 1.0 + 1e-12 for value in values)


@settings(max_examples=25, deadline=None)
@given(case=series())
def test_runs_cover_exactly_the_labelled_rows(case: Series) -> None:
    labels, _ = case
    covered = np.zeros(labels.size, dtype=int)
    bounds = runs_of(labels)
    for start, stop in bounds:
        covered[start:stop] += 1
    assert (covered == labels).all()
    assert all(stop < start for (_, stop), (start, _) in pairwise(bounds))
