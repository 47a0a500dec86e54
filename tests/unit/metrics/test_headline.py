"""The reported row: its numbers are those of the metrics, a random score stands beside each, policies are printed."""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import auc_pr, best_f1, delay_summary, event_score
from tsforge.metrics.headline import HEADLINE, SECONDARY, GradeSetting, headline, mean_of
from tsforge.metrics.vus import vus

GENERATOR = np.random.default_rng(5)
LABELS = np.zeros(3000, dtype=int)
LABELS[400:440] = LABELS[1500:1510] = LABELS[2900:] = 1
SCORES = GENERATOR.uniform(size=3000) + 0.5 * LABELS
ALARMS = (SCORES > 1.0).astype(int)
ALARMS[[10, 11, 398, 1498, 2000, 2898]] = 1  # three of them early warnings


def test_numbers_are_those_of_the_metrics() -> None:
    found = headline(LABELS, SCORES, ALARMS, GradeSetting(rows_per_day=1440, width=20, lead=2))
    events, near = event_score(LABELS, ALARMS), affiliation(LABELS, ALARMS)
    volume = vus(LABELS, SCORES, width=20)
    expected = {
        "auc_pr": auc_pr(LABELS, SCORES),
        "vus_pr": volume.pr,
        "event_precision": events.precision,
        "event_recall": events.recall,
        "false_events_per_day": 5 / (3000 / 1440),
        "median_delay_rows": delay_summary(LABELS, ALARMS, lead=2).median,
        "event_precision_penalised": events.penalised_precision,
        "vus_roc": volume.roc,
        "affiliation_precision": near.precision,
        "affiliation_recall": near.recall,
        "best_f1": best_f1(LABELS, SCORES).f1,
    }
    assert found.values == expected
    assert found.values["median_delay_rows"] == 0.0 < delay_summary(LABELS, ALARMS).median
    assert tuple(found.values) == HEADLINE + SECONDARY
    assert (found.num_rows, found.num_events, found.num_missing) == (3000, 3, 0)


def test_random_stands_beside_every_number_and_wins_none() -> None:
    found = headline(LABELS, SCORES, ALARMS, GradeSetting(rows_per_day=1440, width=20))
    assert found.random.keys() == found.values.keys()
    assert found.row().keys() == {f"{name}{end}" for name in found.values for end in ("", "_random")}
    assert found.random["auc_pr"] == pytest.approx(LABELS.mean(), abs=0.02)
    for name in ("auc_pr", "vus_pr", "event_precision", "event_precision_penalised", "vus_roc", "best_f1"):
        assert found.values[name] > found.random[name] + 0.1
    assert found.values["false_events_per_day"] < found.random["false_events_per_day"] / 5
    again = headline(LABELS, SCORES, ALARMS, GradeSetting(rows_per_day=1440, width=20))
    assert again.random == found.random  # seeded
    other = headline(LABELS, SCORES, ALARMS, GradeSetting(rows_per_day=1440, width=20, seed=1))
    assert other.random != found.random
    assert other.values == found.values


def test_random_is_graded_on_the_rows_that_count() -> None:
    scores = np.where(LABELS == 1, SCORES, np.nan)
    scores[:150] = 0.1  # as many normal rows as anomalous ones: chance is one half
    found = headline(LABELS, scores, ALARMS, GradeSetting(missing="drop", width=4))
    assert found.num_missing == 2850 - 150
    assert found.random["auc_pr"] == pytest.approx(0.5, abs=0.1)


def test_what_the_numbers_depend_on_is_printed() -> None:
    scores = SCORES.copy()
    scores[100:130] = np.nan
    with pytest.raises(DataError, match="30 of 3000 scores are missing"):
        headline(LABELS, scores, ALARMS)
    setting = GradeSetting(width=16, variant="2022", thresholds="reference", missing="drop", lead=3, draws=1)
    text = str(headline(LABELS, scores, ALARMS, setting))
    assert "rows 3000, events 3, without a score 30 (drop)" in text
    assert "W = 16, variant 2022, reference thresholds; delay: lead 3 rows" in text
    assert "1 uniform scores, seed 0" in text
    assert all(name in text for name in HEADLINE + SECONDARY)


def test_without_a_clock_and_without_alarms_nothing_is_made_up() -> None:
    found = headline(LABELS, SCORES, 0 * ALARMS, GradeSetting(width=4, draws=1))
    for name in ("event_precision", "false_events_per_day", "median_delay_rows", "affiliation_precision"):
        assert np.isnan(found.values[name])
    assert found.values["event_recall"] == 0.0


def test_means_leave_out_what_is_undefined() -> None:
    nan = float("nan")
    found = mean_of([{"a": 1.0, "b": nan, "c": nan}, {"a": 3.0, "b": 4.0, "c": nan}])
    assert (found["a"], found["b"]) == (2.0, 4.0)
    assert np.isnan(found["c"])
    with pytest.raises(DataError, match="the same numbers in all"):
        mean_of([{"a": 1.0}, {"b": 1.0}])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws is 0"):
        GradeSetting(draws=0)
    with pytest.raises(ConfigError, match="rows_per_day is 0"):
        GradeSetting(rows_per_day=0)
    with pytest.raises(DataError, match="2 labels but 1 predictions"):
        headline([0, 1], [0.1, 0.2], [1])
    with pytest.raises(DataError, match="a metric needs rows of both kinds"):
        headline([0, 0], [0.1, 0.2], [1, 0])
