"""The NAB score against a row-by-row loop, its fixed points, probation and profiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import runs_of
from tsforge.metrics.nab import PROFILES, Profile, nab_score, probation


def sigmoid(y: float) -> float:
    return -1.0 if y >= 3 else 2 / (1 + math.exp(5 * y)) - 1


def by_rows(labels: np.ndarray, alarms: np.ndarray, profile: str) -> float:
    """The raw score as the specification says it, going through the rows once."""
    weights = PROFILES[profile]
    windows = [(a, b - 1) for a, b in runs_of(labels)]  # both ends included
    start = min(math.floor(0.15 * labels.size), 750)
    best = {window: -weights.missed for window in windows if window[1] >= start}
    total, previous = 0.0, None
    for i in range(labels.size):
        inside = next((window for window in windows if window[0] <= i <= window[1]), None)
        if inside is not None:
            width = inside[1] - inside[0] + 1
            value = sigmoid(-(inside[1] - i + 1) / width) * weights.found / 0.9866142981514304
            if i >= start and alarms[i]:
                best[inside] = max(best[inside], value)
            if i == inside[1]:
                previous = inside
        elif alarms[i] and i >= start:
            width = 0 if previous is None else previous[1] - previous[0]
            total += weights.false_alarm * sigmoid(3.0 if not width else (i - previous[1]) / width)
    return total + sum(best.values())


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_raw_score_equals_a_loop_over_rows(profile: Profile) -> None:
    generator = np.random.default_rng(2)
    graded = 0
    for number in range(60):
        n = int(generator.integers(40, 300))
        labels = np.zeros(n, dtype=int)
        for _ in range(int(generator.integers(1, 5))):
            start = int(generator.integers(0, n))
            labels[start : start + int(generator.integers(1, 30))] = 1
        alarms = generator.uniform(size=n) < (0.02, 0.2)[number % 2]
        if not labels[probation(n) :].any():
            continue
        found = nab_score([(labels, alarms)], profile)
        assert found.raw == pytest.approx(by_rows(labels, alarms, profile), abs=1e-12)
        graded += 1
    assert graded > 40


def test_a_perfect_detector_gets_100_and_a_silent_one_0() -> None:
    labels = np.zeros(1000, dtype=int)
    labels[300:340] = labels[700:720] = 1
    first = np.zeros(1000, dtype=int)
    first[[300, 700]] = 1
    for profile in ("standard", "low_fp", "low_fn"):
        perfect = nab_score([(labels, first)], profile)
        assert perfect.score == pytest.approx(100.0, abs=1e-12)
        assert (perfect.num_windows, perfect.found, perfect.false_alarms) == (2, 2, 0)
        assert nab_score([(labels, np.zeros(1000, dtype=int))], profile).score == 0.0


def test_known_values() -> None:
    """One window of 10 rows: an alarm in its middle, one a window further on, one before any window."""
    labels = np.zeros(100, dtype=int)
    labels[50:60] = 1
    alarms = np.zeros(100, dtype=int)
    alarms[[20, 55, 68]] = 1  # the last is 9 rows after the window's last row: 1 width
    raw = sigmoid(-0.5) / sigmoid(-1.0) - 0.11 - 0.11 * 0.9866142981514304
    found = nab_score([(labels, alarms)])
    assert found.raw == pytest.approx(raw, abs=1e-12)
    assert found.score == pytest.approx(100 * (raw + 1) / 2, abs=1e-12)
    assert (found.num_windows, found.found, found.false_alarms) == (1, 1, 2)
    doubled = nab_score([(labels, alarms)], "low_fp")
    assert doubled.raw == pytest.approx(raw - 0.11 * 1.9866142981514304, abs=1e-12)
    silent = nab_score([(labels, 0 * labels)], "low_fn")
    assert (silent.null, silent.perfect) == (-2.0, 1.0)


def test_early_alarms_earn_more_and_only_the_first_counts() -> None:
    labels = np.zeros(200, dtype=int)
    labels[100:120] = 1

    def score(*rows: int) -> float:
        alarms = np.zeros(200, dtype=int)
        alarms[list(rows)] = 1
        return nab_score([(labels, alarms)]).score

    earned = [score(row) for row in range(100, 120)]
    assert earned == sorted(earned, reverse=True)
    assert score(103, 110, 119) == score(103)


def test_nothing_in_the_probation_is_graded() -> None:
    assert [probation(n) for n in (100, 5000, 20_000)] == [15, 750, 750]
    labels = np.zeros(200, dtype=int)
    labels[[5, 6, 100, 101]] = 1
    alarms = np.zeros(200, dtype=int)
    alarms[[1, 5, 20, 100]] = 1  # 30 rows of probation
    found = nab_score([(labels, alarms)])
    assert (found.num_windows, found.found, found.false_alarms) == (1, 1, 0)
    assert found.score == pytest.approx(100.0)


def test_series_are_summed_before_scaling() -> None:
    labels = np.zeros(100, dtype=int)
    labels[50:60] = 1
    first = np.zeros(100, dtype=int)
    first[50] = 1
    both = nab_score([(labels, first), (labels, 0 * first), (0 * labels, 0 * first)])
    assert both.score == pytest.approx(50.0)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(DataError, match="none of 1 series has a labelled window"):
        nab_score([([0] * 50, [0] * 50)])
    with pytest.raises(ConfigError, match="there is no profile 'cheap'"):
        nab_score([([0, 1], [0, 1])], "cheap")
    with pytest.raises(DataError, match="2 labels but 3 predictions"):
        nab_score([([0, 1], [0, 1, 0])])
