"""Scores of trailing windows: spectra, visited states, visited regions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tsforge.anomaly import window_scores as module
from tsforge.anomaly.window_scores import (
    RegionsScore,
    SpectrumScore,
    StatesScore,
    fit_regions,
    fit_spectrum,
    fit_states,
    memory,
)
from tsforge.core.errors import DataError
from tsforge.metrics.power_spectrum import smoothed_spectrum

W = 128
Scores = Callable[..., np.ndarray]


def of_all_rows(score: SpectrumScore | StatesScore | RegionsScore, values: np.ndarray) -> np.ndarray:
    """Return the scores [T, V] of all rows, the first of which is absolute row 0, with nothing before it."""
    before = np.full((score.reach, values.shape[1]), np.nan)
    return score.scores(np.concatenate([before, values]), 0)


def spectrum_scores(values: np.ndarray, reference: np.ndarray, **settings: int) -> np.ndarray:
    return of_all_rows(fit_spectrum(reference, **settings), values)


def state_scores(values: np.ndarray, reference: np.ndarray, **settings: int) -> np.ndarray:
    return of_all_rows(fit_states(reference, **settings), values)


def region_scores(regions: np.ndarray, reference: np.ndarray, **settings: int) -> np.ndarray:
    """Return scores [T] of regions that are whole numbers, negative where unknown."""
    known, trained = (np.where(part < 0, np.nan, part)[:, None] for part in (regions, reference))
    return of_all_rows(fit_regions(trained, **settings), known)[:, 0]


def walk(rows: int, seed: int = 0, variates: int = 2) -> np.ndarray:
    """Stationary noise with memory."""
    rng = np.random.default_rng(seed)
    values = np.zeros((rows, variates))
    for t in range(1, rows):
        values[t] = 0.8 * values[t - 1] + rng.normal(size=variates)
    return values


def test_spectrum_is_the_hellinger_distance_of_the_metrics_room() -> None:
    values, reference = walk(300), walk(700, seed=1)
    found = spectrum_scores(values, reference, window=W, stride=1)
    parts = [smoothed_spectrum(reference[s : s + W], W / 64) for s in range(0, 700 - W + 1, W // 2)]
    mean = np.mean(parts, axis=0)
    for row in (W - 1, 200, 299):
        p = smoothed_spectrum(values[row - W + 1 : row + 1], W / 64)
        expected = np.sqrt(0.5 * ((np.sqrt(p) - np.sqrt(mean / mean.sum(axis=0))) ** 2).sum(axis=0))
        np.testing.assert_allclose(found[row], expected, atol=1e-7)
    few = math.ceil(0.9 * W) - 1  # rows before the first that its window is observed to 90 %
    assert np.isnan(found[:few]).all()
    assert np.isfinite(found[few:]).all()


def test_states_are_the_divergence_counted_by_hand() -> None:
    values, reference = walk(260), walk(600, seed=1)
    bins, lag = 5, 3
    found = state_scores(values, reference, window=W, stride=1, bins=bins, lag=lag)
    for v in range(2):
        low = reference[:, v].min() - 0.1 * reference[:, v].std()
        high = reference[:, v].max() + 0.1 * reference[:, v].std()

        def cell(x: float, low: float = low, high: float = high) -> int:
            return min(max(math.floor((x - low) / (high - low) * bins), 0), bins - 1)

        trained = Counter((cell(reference[t, v]), cell(reference[t - lag, v])) for t in range(lag, 600))
        total = 597 + 0.5 * bins * bins
        for row in (W + lag, 259):
            rows = range(row - W + 1, row + 1)
            seen = Counter((cell(values[t, v]), cell(values[t - lag, v])) for t in rows)
            expected = sum(
                n / W * (math.log(n / W) - math.log((trained[pair] + 0.5) / total)) for pair, n in seen.items()
            )
            assert found[row, v] == pytest.approx(expected, rel=1e-9)


def test_regions_are_the_mean_rarity_counted_by_hand() -> None:
    rng = np.random.default_rng(0)
    reference, symbols = rng.integers(0, 3, 400), rng.integers(0, 4, 200)  # region 3 was never visited
    found = region_scores(symbols, reference, window=32, stride=1)
    counts = Counter(zip(reference[:-1].tolist(), reference[1:].tolist(), strict=True))
    total = 399 + 0.5 * (len(counts) + 1)
    for row in (32, 100, 199):
        pairs = [(int(symbols[t - 1]), int(symbols[t])) for t in range(row - 31, row + 1)]
        expected = np.mean([-math.log((counts.get(pair, 0) + 0.5) / total) for pair in pairs])
        assert found[row] == pytest.approx(expected)


def test_regions_are_ordered_in_time() -> None:
    reference = np.tile([0, 1, 2], 100)
    forwards, backwards = np.tile([0, 1, 2], 20), np.tile([2, 1, 0], 20)
    score = {
        name: region_scores(symbols, reference, window=30, stride=1)[-1]
        for name, symbols in (("forwards", forwards), ("backwards", backwards))
    }
    assert score["forwards"] < 1.2
    assert score["backwards"] > 5


@pytest.mark.parametrize("scores", [spectrum_scores, state_scores])
def test_scores_do_not_see_the_future_and_hold_between_strides(scores: Scores) -> None:
    values, reference = walk(400), walk(600, seed=1)
    whole = scores(values, reference, window=W, stride=10)
    changed = values.copy()
    changed[300:] = 50.0
    other = scores(changed, reference, window=W, stride=10)
    np.testing.assert_array_equal(whole[:300], other[:300])
    assert not np.array_equal(whole[310:], other[310:])
    every = scores(values, reference, window=W, stride=1)
    for row in (W + 4, W + 8, W + 9, W + 12, 389, 390, 399):
        np.testing.assert_array_equal(whole[row], every[row // 10 * 10])


@pytest.mark.parametrize("fit", [fit_spectrum, fit_states, fit_regions])
@pytest.mark.parametrize("stride", [1, 7])
def test_a_row_has_the_same_bits_whatever_rows_are_scored_with_it(fit: Callable[..., Any], stride: int) -> None:
    """A score reads ``reach`` rows before its row; how many are worked out at once, and from where, shows nowhere."""
    values, reference = walk(300), walk(600, seed=1)
    if fit is fit_regions:
        values, reference = (np.round(part[:, :1]) for part in (values, reference))
    values[80:90, 0] = values[200, 0] = np.nan
    score = fit(reference, window=40, stride=stride)
    whole = score.scores(values[20:], 20 + score.reach)
    assert np.isfinite(whole).sum() > whole.size / 2
    edges = [20 + score.reach, *range(150, 175), 181, 299, 300]
    parts = [score.scores(values[a - score.reach : b], a) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    blinded = values.copy()
    blinded[: 170 - score.reach] = 1e3  # nothing before the reach is read
    np.testing.assert_array_equal(score.scores(blinded[20:], 20 + score.reach)[170 - 300 :], whole[170 - 300 :])


@pytest.mark.parametrize("scores", [spectrum_scores, state_scores])
def test_windows_with_many_gaps_have_no_score(scores: Scores) -> None:
    values, reference = walk(400), walk(600, seed=1)
    values[200:220, 0] = np.nan  # 20 of 128
    values[200:205, 1] = np.nan
    found = scores(values, reference, window=W, stride=1)
    assert np.isnan(found[219:300, 0]).all()
    assert np.isfinite(found[W + 40 :, 1]).all()
    assert np.isfinite(found[219 + W :, 0]).all()


def test_a_missing_row_is_no_spike_of_a_spectrum() -> None:
    """It lies on the line between its neighbours, at an end of a window on the nearest one."""
    rng = np.random.default_rng(0)
    values = 10 + 3 * np.sin(2 * np.pi * np.arange(900) / 24)[:, None] + rng.normal(0, 0.4, (900, 1))
    holes, by_hand = values[500:].copy(), values[500:].copy()
    holes[200], holes[300:302] = np.nan, np.nan
    by_hand[200] = (values[699] + values[701]) / 2
    for place in (0, 1):
        by_hand[300 + place] = values[799] + (values[802] - values[799]) * (place + 1) / 3
    whole, told, expected = (
        spectrum_scores(part, values[:500], window=48, stride=1)[:, 0] for part in (values[500:], holes, by_hand)
    )
    inner = [row for row in range(48, 400) if not {row, row - 47} & {200, 300, 301}]  # windows without a hole at an end
    np.testing.assert_allclose(told[inner], expected[inner], atol=1e-12)
    ends = by_hand.copy()
    ends[200] = values[699]
    np.testing.assert_allclose(told[200], spectrum_scores(ends, values[:500], window=48, stride=1)[200, 0], atol=1e-12)
    assert np.abs(told - whole)[48:].max() < 0.5 * whole[48:].std() + 0.05


@pytest.mark.parametrize(("fit", "most"), [(fit_spectrum, 1.0), (fit_states, None)])
def test_the_largest_score_is_one_that_no_window_passes(fit: Callable[..., Any], most: float | None) -> None:
    reference = walk(600)
    reference[:, 1] = np.nan
    score = fit(reference, window=W, stride=1)
    assert np.isnan(score.largest[1])
    odd = np.tile(np.array([[1e3], [-1e3]]), (200, 2)) + walk(400)
    assert np.nanmax(of_all_rows(score, odd)) <= score.largest[0]
    if most is None:  # all rows in the rarest cell
        most = float(-score.log_reference[0].min())
    assert score.largest[0] == most


def test_regions_with_many_gaps_have_no_score() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 3, 200)
    symbols[100:110] = -1
    found = region_scores(symbols, rng.integers(0, 3, 300), window=40, stride=1)
    assert np.isnan(found[110:138]).all()
    assert np.isfinite(found[160:]).all()


def test_changed_speed_with_the_same_values_is_seen() -> None:
    rows = np.arange(3000)
    reference = np.sin(2 * np.pi * rows / 40)[:, None]
    same, fast = np.sin(2 * np.pi * (rows[:600] + 7) / 40)[:, None], np.sin(2 * np.pi * rows[:600] / 25)[:, None]
    for scores in (spectrum_scores, state_scores):
        assert (
            scores(fast, reference, window=200, stride=5)[-1, 0]
            > 3 * scores(same, reference, window=200, stride=5)[-1, 0]
        )


def test_a_series_that_stands_still_has_the_largest_spectral_distance() -> None:
    reference = walk(600)
    nearly = 0.1 + 1e-16 * np.random.default_rng(0).integers(-1, 2, size=(200, 2))  # rounding is no motion
    for still in (np.full((200, 2), 3.0), nearly):
        found = spectrum_scores(still, reference, window=W, stride=1)
        assert (found[W - 1 :] == 1.0).all()


@pytest.mark.parametrize("stride", [1, 6])
def test_a_variate_that_was_constant_in_training_has_distance_0_until_it_moves(stride: int) -> None:
    values, reference = walk(400), walk(600, seed=1)
    reference[:, 1], values[:, 1] = 5.0, 5.0
    values[300, 1] = 5.5
    values[:20, 1] = np.nan
    score = fit_spectrum(reference, window=W, stride=stride)
    found = of_all_rows(score, values)
    np.testing.assert_array_equal(
        found[:, :1], spectrum_scores(values[:, :1], reference[:, :1], window=W, stride=stride)
    )
    assert np.isnan(found[: W - 1, 1]).all()
    assert (found[W + 20 : 300, 1] == 0.0).all()
    assert (found[300 + stride - 1 :, 1] == 1.0).all()
    edges = [score.reach, *range(280, 310), 333, 400]
    parts = [score.scores(values[a - score.reach : b], a) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), found[score.reach :])


@pytest.mark.parametrize("scores", [spectrum_scores, state_scores])
def test_a_variate_with_too_little_in_training_has_no_score_and_the_others_keep_theirs(scores: Scores) -> None:
    values, reference = walk(400, variates=3), walk(600, seed=1, variates=3)
    reference[:, 0] = np.nan
    reference[40:, 2] = np.nan
    found = scores(values, reference, window=W, stride=5)
    assert np.isnan(found[:, [0, 2]]).all()
    np.testing.assert_array_equal(found[:, 1:2], scores(values[:, 1:2], reference[:, 1:2], window=W, stride=5))


def test_values_beyond_training_count_in_the_outermost_cells() -> None:
    reference = walk(600)
    found = state_scores(np.full((200, 2), 1e6), reference, window=W, stride=1, lag=2)
    assert (found[W + 2 :] > 3.0).all()


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values, reference = walk(400), walk(600, seed=1)
    whole = [scores(values, reference, window=W, stride=3) for scores in (spectrum_scores, state_scores)]
    monkeypatch.setattr(module, "_MOST_CELLS", 5 * W)
    for scores, expected in zip((spectrum_scores, state_scores), whole, strict=True):
        np.testing.assert_array_equal(scores(values, reference, window=W, stride=3), expected)


def test_memory_is_the_lag_of_the_autocorrelation() -> None:
    series = walk(20_000, variates=1)[:, 0]
    assert memory(series, 50) in (4, 5, 6)  # 0.8^k < 1/e from k = 5
    holes = series.copy()
    holes[np.random.default_rng(0).random(len(series)) < 0.2] = np.nan
    assert memory(holes, 50) in (4, 5, 6)
    assert memory(np.linspace(0, 1, 200), 20) == 20


@pytest.mark.parametrize("scores", [spectrum_scores, state_scores])
def test_too_few_training_rows_are_refused(scores: Scores) -> None:
    with pytest.raises(DataError, match=r"100 training rows .* lower score\.window"):
        scores(walk(300), walk(100), window=W, stride=1)
    hidden = walk(400)
    hidden[::2] = np.nan
    with pytest.raises(DataError, match=r"100 training rows \(100 of them observed\) .*, to 64 for example"):
        scores(walk(300), walk(100), window=W, stride=1)  # the halves of a window that are long enough to be counted
    with pytest.raises(
        DataError, match=r"200 training rows \(0 of them observed\) .* no score\.window helps: give the"
    ):
        scores(walk(300), np.full((200, 2), np.nan), window=W, stride=1)
    with pytest.raises(DataError, match="400 training rows"):
        scores(walk(300), hidden, window=W * 2, stride=1)


def test_too_few_training_regions_are_refused() -> None:
    with pytest.raises(DataError, match="training rows"):
        region_scores(np.zeros(100, dtype=np.int64), np.zeros(20, dtype=np.int64), window=40, stride=1)
