"""Events from alarms: each step by hand, and a row-by-row tracker with saved state against the one-pass function."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsforge.anomaly.config import DetectConfig, EventConfig
from tsforge.anomaly.segments import SegmentTracker, find_segments, is_continuation
from tsforge.anomaly.thresholds import Decisions
from tsforge.core.config import validate
from tsforge.data.event_records import event_id


def decide(scores: np.ndarray, threshold: float = 2.0, low: float = 1.0) -> Decisions:
    with np.errstate(invalid="ignore"):
        return Decisions(scores > threshold, np.full(scores.size, threshold), np.full(scores.size, low))


def spans(values: list[float], **settings: int) -> list[tuple[int, int, int, bool]]:
    scores = np.array(values)
    found = find_segments(scores, decide(scores), EventConfig(**settings))  # type: ignore[arg-type]
    return [(item.start, item.end, item.peak, item.is_open) for item in found]


def test_hysteresis_opens_at_the_alarm_and_closes_below_the_low_level() -> None:
    assert spans([0, 1.5, 3, 1.5, 4, 1.2, 0.5, 1.5, 0]) == [(2, 5, 4, False)]


def test_patience_bridges_quiet_rows_that_hysteresis_merging_needs_an_alarm_for() -> None:
    values = [0, 3, 0.5, 1.5, 0, 0, 0]
    assert spans(values) == [(1, 1, 1, False)]
    assert spans(values, patience=2) == [(1, 3, 1, False)]
    assert spans(values, merge_gap=1) == [(1, 1, 1, False)]


def test_merge_minimum_length_and_open_events() -> None:
    values = [3, 0, 3, 0, 0, 3]
    assert spans(values) == [(0, 0, 0, False), (2, 2, 2, False), (5, 5, 5, True)]
    assert spans(values, merge_gap=1) == [(0, 2, 0, False), (5, 5, 5, True)]
    assert spans(values, merge_gap=2) == [(0, 5, 0, True)]
    assert spans(values, merge_gap=1, min_length=2) == [(0, 2, 0, False)]


def test_a_missing_row_ends_an_event_unless_the_merge_gap_says_so() -> None:
    values = [0, 3, np.nan, np.nan, 3, 0, 0, 0, 0]
    assert spans(values, patience=3) == [(1, 1, 1, False), (4, 4, 4, False)]
    assert spans(values, merge_gap=1) == [(1, 1, 1, False), (4, 4, 4, False)]
    assert spans(values, merge_gap=2) == [(1, 4, 1, False)]


def test_nothing_scored_or_no_alarm_is_no_event() -> None:
    assert spans([np.nan] * 5) == []
    assert spans([1.5] * 5) == []
    assert spans([]) == []


@given(
    scores=st.lists(st.one_of(st.just(float("nan")), st.sampled_from([0.0, 0.5, 1.1, 1.5, 2.5, 3.0])), max_size=60),
    patience=st.integers(1, 3),
    merge_gap=st.integers(0, 3),
    min_length=st.integers(1, 3),
    saves=st.sets(st.integers(0, 59)),
)
def test_row_by_row_with_saved_state_equals_one_pass(
    scores: list[float], patience: int, merge_gap: int, min_length: int, saves: set[int]
) -> None:
    config = EventConfig(patience=patience, merge_gap=merge_gap, min_length=min_length)
    values = np.array(scores, dtype=float)
    decisions = decide(values)
    tracker, found = SegmentTracker(config), []
    for i, score in enumerate(scores):
        if i in saves:
            tracker = SegmentTracker.restore(config, json.loads(json.dumps(tracker.state())))
        ended = tracker.step(score, bool(decisions.alarm[i]), float(decisions.low[i]))
        found += [ended] if ended is not None else []
    found += [tracker.current] if tracker.current is not None else []
    assert find_segments(values, decisions, config) == found


def test_ids_depend_on_series_start_rule_and_measure_only() -> None:
    assert event_id("a", "2013-02-12", "quantile(alpha=0.01)") == event_id("a", "2013-02-12", "quantile(alpha=0.01)")
    others = [
        ("b", "2013-02-12", "q"),
        ("a", "2013-02-13", "q"),
        ("a", "2013-02-12", "r"),
        ("a", "2013-02-12", "q", "m"),
    ]
    assert len({event_id(*item) for item in [*others, ("a", "2013-02-12", "q")]}) == 5
    assert event_id("a", "2013-02-12", "quantile(alpha=0.01)") == "0f3cdaceb2d86805", "as older versions named it"


@pytest.mark.parametrize(
    ("settings", "measure"),
    [
        ({}, "normalised, mahalanobis"),
        ({"rule": {"kind": "fixed", "value": 3}, "events": {"merge_gap": 3}}, "normalised, mahalanobis"),
        ({"calibration": {"min_rows": 50}}, "normalised, mahalanobis"),
        ({"score": {"joint": "max_abs", "ewma": 0.1}}, "normalised, max_abs, ewma=0.1"),
        ({"score": {"joint": "top_k", "top_k": 2, "steps": [1, 3]}}, "normalised, top_k, top_k=2, steps=(1, 3)"),
        ({"score": {"horizon_reduction": "first"}}, "normalised, mahalanobis, horizon_reduction=first"),
        ({"score": {"smoothing": 0.2}}, "normalised, mahalanobis, smoothing=(exponential, weight=0.2)"),
        ({"score": {"smoothing": {"kind": "cusum"}}}, "normalised, mahalanobis, smoothing=(cusum)"),
        (
            {"score": {"smoothing": {"kind": "median", "window": 9}}},
            "normalised, mahalanobis, smoothing=(median, window=9)",
        ),
        ({"score": {"kind": "spectrum", "window": 64}}, "spectrum, mahalanobis, window=64"),
        ({"calibration": {"by": "hour_of_week"}}, "normalised, mahalanobis, by=hour_of_week"),
        ({"guard": True}, "normalised, mahalanobis, guard=()"),
        ({"guard": {"max_rows": 48}}, "normalised, mahalanobis, guard=(max_rows=48)"),
    ],
)
def test_a_measure_names_what_changes_the_number_and_nothing_else(settings: dict[str, Any], measure: str) -> None:
    assert validate(DetectConfig, settings).measure == measure


@pytest.mark.parametrize(
    ("cooldown", "expected"), [(0, [False] * 3), (3, [False, False, False]), (4, [True, True, False])]
)
def test_events_go_on_soon_after_one_of_the_same_variates(cooldown: int, expected: list[bool]) -> None:
    events = [(0, 2, "a"), (6, 8, "ab"), (12, 12, "b"), (15, 16, "c")]
    found = [
        is_continuation(start, frozenset(leading), last_end, frozenset(last), cooldown)
        for (_, last_end, last), (start, _, leading) in pairwise(events)
    ]
    assert found == expected
