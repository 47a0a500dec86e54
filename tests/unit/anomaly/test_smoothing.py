"""Scores with memory: each smoother against a naive loop, cut anywhere, through its stored state, across gaps."""

import json
from itertools import pairwise

import numpy as np
import pytest

from tsforge.anomaly.config import FixedRule, ScoreConfig
from tsforge.anomaly.smoothing import (
    CumulativeSum,
    Exponential,
    MovingMedian,
    Smoother,
    TwoSided,
    build_smoother,
    restore_smoother,
    smooth_and_judge,
)
from tsforge.anomaly.thresholds import Fixed, build_rule
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError

NAN = np.nan
SETTINGS: tuple[object, ...] = (
    0.25,
    {"kind": "exponential", "weight": 0.25, "gaps": "decay"},
    {"kind": "median", "window": 7},
    {"kind": "cusum", "shift": 1.5},
)


def noisy(rows: int = 300, seed: int = 0) -> np.ndarray:
    """Return scores with ties, single gaps and a long gap."""
    generator = np.random.default_rng(seed)
    s = np.round(generator.gamma(2.0, size=rows), 1)
    s[generator.uniform(size=rows) < 0.05] = NAN
    s[100:120] = NAN
    return s


def fresh(setting: object) -> Smoother:
    smoother = build_smoother(validate(ScoreConfig, {"smoothing": setting}))
    assert smoother is not None
    return smoother.fit(noisy(seed=1))


def test_exponential_starts_at_the_first_score_and_resets_or_decays_over_a_gap() -> None:
    s = np.array([2.0, 4.0, NAN, NAN, 10.0, 0.0])
    np.testing.assert_array_equal(Exponential(0.25).run(s), [2.0, 2.5, NAN, NAN, 10.0, 7.5])
    # two rows missed: the level 2.5 keeps 0.75 ** 3 of its weight
    kept = 0.75**3
    back = (1 - kept) * 10.0 + kept * 2.5
    np.testing.assert_allclose(
        Exponential(0.25, "decay").run(s), [2.0, 2.5, NAN, NAN, back, 0.75 * back], rtol=0, atol=1e-15
    )
    # a gap after which the same level is seen again changes nothing; a long gap forgets
    assert Exponential(0.25, "decay").run([3.0, NAN, 3.0])[-1] == pytest.approx(3.0, abs=1e-15)
    assert Exponential(0.25, "decay").run([100.0, *[NAN] * 200, 3.0])[-1] == pytest.approx(3.0, abs=1e-12)


def test_moving_median_equals_the_median_of_the_observed_rows_of_each_trailing_window() -> None:
    s = noisy()
    for window in (2, 7, 64, 1_000):
        expected = [
            NAN if np.isnan(s[t]) else float(np.nanmedian(s[max(0, t - window + 1) : t + 1])) for t in range(s.size)
        ]
        np.testing.assert_array_equal(MovingMedian(window).run(s), expected)


def test_cumulative_sum_equals_its_recursion_with_k_from_the_calibration_scores() -> None:
    calibration = np.random.default_rng(2).normal(5.0, 2.0, 4_001)
    calibration[3] = NAN
    smoother = CumulativeSum(1.0).fit(calibration)
    seen = calibration[~np.isnan(calibration)]
    k = np.median(seen) + 0.5 * (np.percentile(seen, 75) - np.percentile(seen, 25)) / 1.349
    assert smoother.reference == pytest.approx(k, abs=1e-12)
    assert smoother.reference == pytest.approx(6.0, abs=0.15)  # half a shift of one standard deviation, 2, above 5
    s, total, expected = noisy() + 4.0, 0.0, []
    for value in s:
        if np.isnan(value):
            expected.append(NAN)
        else:
            total = max(0.0, total + value - k)
            expected.append(total)
    np.testing.assert_allclose(smoother.run(s), expected, rtol=0, atol=1e-9)


def test_cumulative_sum_finds_a_small_lasting_shift_that_no_single_score_shows() -> None:
    generator = np.random.default_rng(3)
    normal, shifted = generator.normal(size=5_000), generator.normal(0.8, 1.0, 300)
    smoother = CumulativeSum(0.8).fit(normal)
    usual = smoother.run(normal)
    level = np.quantile(usual, 0.999)
    assert (shifted > np.quantile(normal, 0.999)).mean() < 0.03
    assert (smoother.run(shifted)[100:] > level).mean() > 0.95


def around(s: np.ndarray, weight: float, reach: int) -> np.ndarray:
    """Return the two-sided mean of every row by its definition; NaN of the last rows, whose mean is not known."""
    expected = np.full(s.size, NAN)
    for t in range(s.size - reach):
        if np.isnan(s[t]):
            continue
        near = np.arange(max(0, t - reach), t + reach + 1)
        near = near[~np.isnan(s[near])]
        expected[t] = np.average(s[near], weights=(1.0 - weight) ** np.abs(near - t))
    return expected


def test_two_sided_mean_weighs_the_observed_rows_around_a_row_and_is_told_late() -> None:
    for rows, weight, reach in (
        (300, 0.1, 30),
        (300, 0.4, 3),
        (300, 0.05, 250),
        (20, 0.2, 15),
        (7, 0.2, 15),
        (7, 0.5, 6),
    ):
        s = noisy()[-rows:]
        told = TwoSided(weight, reach).run(s)
        assert told.size == max(rows - reach, 0)
        np.testing.assert_allclose(told, around(s, weight, reach)[: told.size], rtol=1e-13)
    # nothing lags: turned around in time, complete scores give means turned around
    s = np.random.default_rng(1).gamma(2.0, size=200)
    inner, reverse = TwoSided(0.2, 15).run(s)[15:], TwoSided(0.2, 15).run(s[::-1])[15:]
    np.testing.assert_allclose(inner, reverse[::-1], rtol=1e-12)
    stepped = TwoSided(0.2, 15)
    np.testing.assert_array_equal([stepped.step(score) for score in s], [*[NAN] * 15, *TwoSided(0.2, 15).run(s)])


@pytest.mark.parametrize(("weight", "reach"), [(0.1, 30), (0.4, 3), (0.1, 149), (0.3, 400)])
def test_two_sided_rows_cut_anywhere_and_stored_between_keep_their_bits(weight: float, reach: int) -> None:
    """Checklist 7, the smoother's part, with rows that wait in the state."""
    s = noisy()
    whole = TwoSided(weight, reach).run(s)
    for cuts in ([0, 1, 2, 99, 100, 110, 121, 300], [0, 150, 150, 300], list(range(301))):
        smoother: Smoother = TwoSided(weight, reach)
        parts = []
        for start, stop in pairwise(cuts):
            smoother = restore_smoother(json.loads(json.dumps(smoother.state())))
            parts.append(smoother.run(s[start:stop]))
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert len(json.dumps(smoother.state())) < 40 * (2 * reach + 1) + 200


def test_two_sided_scores_depend_on_no_row_beyond_their_reach() -> None:
    """Checklist 5: perturb what comes later."""
    s, reach = noisy(), 12
    changed = s.copy()
    changed[200:] = 1_000.0
    told, moved = TwoSided(0.2, reach).run(s), TwoSided(0.2, reach).run(changed)
    np.testing.assert_array_equal(told[: 200 - reach], moved[: 200 - reach])
    assert (
        told[200 - reach : 200] < moved[200 - reach : 200]
    ).sum() > 8  # it does read so far, where a row has a score


def test_two_sided_mean_finds_both_edges_of_a_fault_where_exponential_smoothing_lags() -> None:
    generator = np.random.default_rng(4)
    s = generator.gamma(2.0, size=4_000)
    s[2_000:2_100] += 6.0
    level = 4.5  # between usual (2) and fault (8)

    def span(scores: np.ndarray) -> tuple[int, int]:
        found = np.flatnonzero(scores[1_900:2_300] > level) + 1_900
        return int(found[0]), int(found[-1]) + 1

    lag, center = span(Exponential(0.1).run(s)), span(TwoSided(0.1, 30).run(s))
    assert lag[1] - 2_100 >= 5
    assert abs(center[0] - 2_000) <= 3
    assert abs(center[1] - 2_100) <= 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_cutting_the_rows_and_storing_the_state_between_changes_no_bit(setting: object) -> None:
    """Checklist 7, the smoother's part: a state goes through JSON at every cut."""
    s = noisy()
    whole = fresh(setting).run(s)
    for cuts in ([0, 1, 2, 99, 100, 110, 121, 300], list(range(301))):
        smoother, parts = fresh(setting), []
        for start, stop in pairwise(cuts):
            smoother = restore_smoother(json.loads(json.dumps(smoother.state())))
            parts.append(smoother.run(s[start:stop]))
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("setting", SETTINGS)
def test_smoothed_scores_depend_on_no_later_row(setting: object) -> None:
    """Checklist 5: perturb the future."""
    s = noisy()
    changed = s.copy()
    changed[200:] = 1_000.0
    np.testing.assert_array_equal(fresh(setting).run(changed)[:200], fresh(setting).run(s)[:200])
    assert not np.array_equal(fresh(setting).run(changed)[200:], fresh(setting).run(s)[200:], equal_nan=True)


def test_an_alarm_restarts_the_cumulative_sum_before_the_next_row() -> None:
    smoother = CumulativeSum(1.0).fit([0.0, 1.0, 2.0, 3.0, 4.0])
    k = smoother.reference
    assert k is not None
    scores, decisions = smooth_and_judge([k + 3.0, k + 3.0, NAN, k + 1.0], smoother, Fixed(5.0))
    np.testing.assert_allclose(scores, [3.0, 6.0, NAN, 1.0], atol=1e-12)
    np.testing.assert_array_equal(decisions.alarm, [False, True, False, False])


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_smoothing_and_judging_in_pieces_is_the_same_as_at_once(setting: object) -> None:
    s = noisy()

    def start() -> tuple[Smoother | None, Fixed]:
        return (None if setting is None else fresh(setting)), build_rule(FixedRule(value=2.2))

    scores, decisions = smooth_and_judge(s, *start())
    smoother, rule = start()
    parts = [smooth_and_judge(s[a:b], smoother, rule) for a, b in ((0, 130), (130, 131), (131, 300))]
    np.testing.assert_array_equal(np.concatenate([p for p, _ in parts]), scores)
    np.testing.assert_array_equal(np.concatenate([d.alarm for _, d in parts]), decisions.alarm)
    assert decisions.alarm.any()


def test_settings_and_what_they_refuse() -> None:
    assert build_smoother(ScoreConfig()) is None
    assert validate(ScoreConfig, {"smoothing": 0.1}) == validate(
        ScoreConfig, {"smoothing": {"kind": "exponential", "weight": 0.1}}
    )
    stored = validate(ScoreConfig, {"smoothing": 0.1}).model_dump(mode="json")
    assert validate(ScoreConfig, stored).smoothing == validate(ScoreConfig, {"smoothing": 0.1}).smoothing
    for wrong, message in (
        (1.5, "weight"),
        ({"kind": "median"}, "window"),
        ({"kind": "cusum", "shift": -1.0}, "shift"),
        ({"window": 5}, "kind"),
        ({"kind": "two_sided", "reach": 0}, "reach"),
        ({"kind": "two_sided", "weight": 1.0}, "weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ScoreConfig, {"smoothing": wrong})
    for two_sided, rows in (({}, 30), ({"weight": 0.3}, 10), ({"weight": 0.07}, 43), ({"reach": 4}, 4)):
        config = validate(ScoreConfig, {"smoothing": {"kind": "two_sided", **two_sided}})
        assert (config.latency, config.smoothing_latency, config.window_latency) == (rows, rows, 0)
        smoother = build_smoother(config)
        assert smoother is not None
        assert smoother.latency == rows
    late = {"kind": "reconstruction", "window": 6, "overlap_reduction": "mean", "smoothing": {"kind": "two_sided"}}
    assert validate(ScoreConfig, late).latency == 35
    with pytest.raises(DataError, match="half of the 3 calibration scores are equal"):
        CumulativeSum(1.0).fit([1.0, 1.0, 1.0])
    with pytest.raises(DataError, match="none that is a number"):
        CumulativeSum(1.0).fit([NAN])
    with pytest.raises(DataError, match="call fit"):
        CumulativeSum(1.0).run([1.0])
    with pytest.raises(DataError, match="lacks 'gaps'"):
        restore_smoother({"kind": "exponential", "weight": 0.1})
    with pytest.raises(DataError, match="unknown smoother 'kalman'"):
        restore_smoother({"kind": "kalman"})
