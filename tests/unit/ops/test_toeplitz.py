"""Levinson, Burg and the partial autocorrelation map against scipy and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz, toeplitz

from tsforge.core.errors import ModelError
from tsforge.ops import toeplitz as toeplitz_module
from tsforge.ops.ar_process import draw_weights, simulate
from tsforge.ops.stability import is_stationary
from tsforge.ops.toeplitz import (
    autocovariance,
    bridged,
    burg,
    lagged_products,
    levinson,
    pacf_to_weights,
    short_gap,
    sound_autocovariance,
    weights_to_pacf,
    yule_walker_direct,
)


def naive_autocovariance(values: np.ndarray, mask: np.ndarray, max_lag: int) -> np.ndarray:
    size, result = len(values), []
    for lag in range(max_lag + 1):
        pairs = [values[t] * values[t + lag] for t in range(size - lag) if mask[t] and mask[t + lag]]
        result.append(np.mean(pairs) * (size - lag) / size)
    return np.array(result)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_autocovariance_equals_a_double_loop(missing: float) -> None:
    rng = np.random.default_rng(3)
    values, mask = rng.normal(size=120), rng.random(120) >= missing
    expected = naive_autocovariance(values, mask, 7)
    np.testing.assert_allclose(autocovariance(values, mask, [0, 120], 7), expected, atol=1e-12)


def test_autocovariance_pools_series_without_crossing_the_seam() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=50), rng.normal(size=70)
    mask = np.ones(120, dtype=bool)
    pooled = autocovariance(np.concatenate([a, b]), mask, [0, 50, 120], 3)
    sums = [sum((part[: len(part) - lag] * part[lag:]).sum() for part in (a, b)) for lag in range(4)]
    np.testing.assert_allclose(pooled, np.array(sums) / 120, atol=1e-12)


def pooled_by_definition(values: np.ndarray, mask: np.ndarray, bounds: list[int], max_lag: int) -> np.ndarray:
    """Return mean products over the pairs seen in any series, tapered as if nothing were missing."""
    found = []
    for lag in range(max_lag + 1):
        pairs = [
            values[t] * values[t + lag]
            for start, stop in pairwise(bounds)
            for t in range(start, stop - lag)
            if mask[t] and mask[t + lag]
        ]
        full = sum(max(stop - start - lag, 0) for start, stop in pairwise(bounds))
        found.append(math.fsum(pairs) / max(len(pairs), 1) * full / bounds[-1])
    return np.array(found)


@pytest.mark.parametrize("cells", [1 << 17, 200])  # all series at once, and in many batches
def test_autocovariance_of_a_panel_equals_the_definition(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(toeplitz_module, "_CELLS", cells)
    rng = np.random.default_rng(8)
    sizes = [40, 41, 1, 0, 40, 77, 3, 25, 40, 135]
    bounds = np.cumsum([0, *sizes]).tolist()
    values = rng.normal(size=(bounds[-1], 3)) * np.array([1e-3, 1.0, 1e5])
    mask = np.ones_like(values, dtype=bool)
    mask[:, 1] = rng.random(bounds[-1]) > 0.3
    mask[50:60] = False
    found = autocovariance(np.where(mask, values, np.nan), mask, bounds, 30)
    for variate in range(3):
        expected = pooled_by_definition(values[:, variate], mask[:, variate], bounds, 30)
        assert np.abs(found[variate] - expected).max() < 1e-12 * expected[0]
        alone = autocovariance(values[:, variate], mask[:, variate], bounds, 30)
        np.testing.assert_allclose(alone, found[variate], rtol=0, atol=1e-14 * expected[0])


def test_lagged_products_stay_within_their_spans() -> None:
    values = np.arange(1.0, 10.0)[:, None]
    spans = np.array([[1, 4], [6, 8]])  # 2 3 4 and 7 8
    expected = [2 * 2 + 3 * 3 + 4 * 4 + 7 * 7 + 8 * 8, 2 * 3 + 3 * 4 + 7 * 8, 2 * 4, 0]
    np.testing.assert_allclose(lagged_products(values, None, spans, 3)[0], expected, atol=1e-12)
    assert not lagged_products(values, None, spans[:0], 3).any()


def test_transforms_have_few_even_lengths() -> None:
    found = [toeplitz_module._transform_length(least) for least in range(1, 20_000)]
    assert all(least <= length <= max(1.21 * least, 32) for least, length in enumerate(found, start=1))
    assert all(length % 2 == 0 for length in found)
    assert len(set(found)) < 70


def test_autocovariance_of_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match="no observed value of 1 of 1 variates"):
        autocovariance(np.zeros(5), np.zeros(5, dtype=bool), [0, 5], 1)


def test_levinson_error_variances_equal_schur_complements() -> None:
    rng = np.random.default_rng(5)
    acov = autocovariance(simulate(np.array([0.5, -0.3]), 400, rng), np.ones(400, dtype=bool), [0, 400], 6)
    found = levinson(acov)
    for order in range(1, 7):
        matrix = toeplitz(acov[:order])
        explained = acov[1 : order + 1] @ np.linalg.solve(matrix, acov[1 : order + 1])
        assert found.variances[order] == pytest.approx(acov[0] - explained, rel=1e-10)


def test_levinson_of_a_constant_series_is_zero() -> None:
    found = levinson(np.zeros(4))
    assert not found.weight.any()
    assert not found.variances.any()


def test_order_by_bic_finds_the_true_order() -> None:
    rng = np.random.default_rng(6)
    values = simulate(np.array([0.2, 0.3, -0.5]), 20_000, rng)
    acov = autocovariance(values - values.mean(), np.ones(20_000, dtype=bool), [0, 20_000], 20)
    assert levinson(acov).order("bic", 20_000) == 3


def test_direct_yule_walker_solves_one_toeplitz_system_a_step() -> None:
    rng = np.random.default_rng(7)
    acov = autocovariance(rng.normal(size=200), np.ones(200, dtype=bool), [0, 200], 12)
    weights = yule_walker_direct(acov, 5, 4)
    for step in range(4):
        np.testing.assert_allclose(weights[step], solve_toeplitz(acov[:5], acov[step + 1 : step + 6]), atol=1e-12)


def test_burg_equals_statsmodels() -> None:
    from statsmodels.regression.linear_model import burg as reference

    values = simulate(np.array([0.6, -0.2]), 300, np.random.default_rng(8))
    values -= values.mean()
    rho, sigma2 = reference(values, order=4, demean=False)
    found = burg([values], 4)
    np.testing.assert_allclose(found.weight, rho, atol=1e-12)
    assert found.variances[-1] == pytest.approx(sigma2, rel=0.02)  # they average the last errors over fewer rows
    assert found.variances[-1] == pytest.approx(values @ values / 300 * np.prod(1 - found.pacf**2), rel=1e-12)


def test_burg_pools_segments_and_refuses_short_ones() -> None:
    rng = np.random.default_rng(9)
    weight = np.array([0.5, -0.4])
    parts = [simulate(weight, 40, rng) for _ in range(200)]
    np.testing.assert_allclose(burg(parts, 2).weight, weight, atol=0.05)
    with pytest.raises(ModelError, match="longer than 40 lags"):
        burg(parts, 40)


def test_partial_autocorrelations_and_coefficients_are_inverse_maps() -> None:
    rng = np.random.default_rng(10)
    for order in range(8):
        pacf = rng.uniform(-0.95, 0.95, order)
        np.testing.assert_allclose(weights_to_pacf(pacf_to_weights(pacf)), pacf, atol=1e-9)


def test_stationarity_agrees_with_the_roots() -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        weight = rng.uniform(-1.2, 1.2, 3)
        inside = np.abs(np.roots([1.0, *-weight])).max() < 1.0
        assert is_stationary(weight) == inside


@pytest.mark.parametrize("generator", ["pacf", "paper"])
def test_drawn_processes_are_stationary(generator: str) -> None:
    rng = np.random.default_rng(12)
    drawn = [draw_weights(4, rng, generator) for _ in range(50)]
    assert all(np.abs(np.roots([1.0, *-weight])).max() < 1.0 for weight in drawn)
    sums = np.array([weight.sum() for weight in drawn])
    assert (np.abs(sums) < 1e-12).all() == (generator == "paper")  # the recipe's flaw: coefficients sum to 0


def test_sound_autocovariances_are_those_of_pairs_for_rough_and_of_lines_for_smooth_data() -> None:
    rng = np.random.default_rng(11)
    noise = rng.normal(size=(4200, 2))
    values = np.zeros((4200, 2))
    for t in range(2, len(values)):
        values[t, 0] = 0.5 * values[t - 1, 0] + noise[t, 0]
        values[t, 1] = 1.94 * values[t - 1, 1] - 0.945 * values[t - 2, 1] + noise[t, 1]
    values = values[200:] - values[200:].mean(axis=0)
    mask = rng.random(values.shape) > 0.3
    bounds = [0, 1500, 4000]
    found = sound_autocovariance(np.where(mask, values, 1e9), mask, bounds, 40)
    pairs = autocovariance(values, mask, bounds, 40)
    np.testing.assert_array_equal(found[0], pairs[0])
    lines = np.concatenate(
        [
            np.interp(np.arange(a, b), np.arange(a, b)[mask[a:b, 1]], values[a:b, 1][mask[a:b, 1]])
            for a, b in pairwise(bounds)
        ]
    )
    np.testing.assert_allclose(found[1], autocovariance(lines, np.ones(4000, dtype=bool), bounds, 40), atol=1e-12)
    size = toeplitz(found[1])
    assert np.linalg.eigvalsh(size).min() > 0.0  # autocovariances of a process, which the pairs are not
    assert np.linalg.eigvalsh(toeplitz(pairs[1])).min() < 0.0


def season(rows: int, noise: float, seed: int) -> np.ndarray:
    t = np.arange(rows)
    wave = 5 * np.sin(2 * np.pi * t / 12) + 3 * np.sin(2 * np.pi * t / 24)
    return np.asarray(wave + noise * np.random.default_rng(seed).normal(size=rows))


def season_autocovariance(noise: float, max_lag: int) -> np.ndarray:
    lags = np.arange(max_lag + 1)
    return np.asarray(
        12.5 * np.cos(2 * np.pi * lags / 12) + 4.5 * np.cos(2 * np.pi * lags / 24) + noise**2 * (lags == 0)
    )


def blocks(rows: int, seed: int) -> np.ndarray:
    """Return False on one block of 11 to 20 rows in every 30, always on the second ten of them."""
    rng, seen = np.random.default_rng(seed), np.ones(rows, dtype=bool)
    for start in range(0, rows, 30):
        seen[start + rng.integers(0, 10) : start + 20] = False
    return seen


def lines_over(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    rows = np.arange(len(values))
    return np.asarray(np.interp(rows, rows[seen], values[seen]))


def test_gaps_of_whole_series_are_filled_and_judged_as_dense_algebra_does() -> None:
    weight, order = np.array([0.5, -0.3, 0.2, 0.25]), 4
    response = np.zeros(5000)
    response[0] = 1.0
    for t in range(1, len(response)):
        response[t] = sum(weight[i] * response[t - 1 - i] for i in range(min(order, t)))
    acov = np.array([response[: len(response) - lag] @ response[lag:] for lag in range(40)])
    rng = np.random.default_rng(20)
    bounds = np.array([0, 30, 33, 34, 60])  # two series of fewer rows than lags
    values, seen = rng.normal(size=60), rng.random(60) > 0.5
    seen[[0, 29, 30, 32, 33, 34, 59]] = True
    seen[5:14] = False
    draws = 40_000
    found = toeplitz_module._conditional(levinson(acov[: order + 1]), np.where(seen, values, 0.0), seen, bounds, draws)
    mean, deviation, variance, likelihood = found
    squares, volume, count = 0.0, 0.0, int(seen.sum())
    for first, last in pairwise(bounds.tolist()):
        covariance, known = toeplitz(acov[: last - first]), seen[first:last]
        inner, cross = covariance[np.ix_(known, known)], covariance[np.ix_(known, ~known)]
        observed = values[first:last][known]
        np.testing.assert_allclose(mean[first:last][~known], cross.T @ np.linalg.solve(inner, observed), atol=1e-10)
        np.testing.assert_array_equal(mean[first:last][known], observed)
        assert not deviation[first:last][known].any()
        left = covariance[np.ix_(~known, ~known)] - cross.T @ np.linalg.solve(inner, cross)
        part = deviation[first:last][~known]
        np.testing.assert_allclose(part @ part.T / draws, left, atol=0.05)
        squares += observed @ np.linalg.solve(inner, observed)
        volume += np.linalg.slogdet(inner)[1]
    assert variance == pytest.approx(squares / count, rel=1e-10)
    assert likelihood == pytest.approx(-0.5 * (count * math.log(squares / count) + volume), rel=1e-10)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_autocovariances_of_a_season_survive_gaps_of_half_of_it(noise: float) -> None:
    max_lag, bounds = 48, [0, 1500, 1530, 1600, 4000]
    values, seen = season(4000, noise, 21), blocks(4000, 22)
    seen[:25] = False  # a series that begins late, one of fewer rows than lags, and one without a value
    seen[1530:1600] = False
    expected = season_autocovariance(noise, max_lag)
    taper = 1.0 - 3 * np.arange(max_lag + 1) / 4000
    lines = np.concatenate([lines_over(values[a:b], seen[a:b]) for a, b in ((0, 1500), (1500, 1530), (1600, 4000))])
    straight = autocovariance(lines, np.ones(len(lines), dtype=bool), [0, 1500, 1530, len(lines)], max_lag)
    assert np.abs(straight - expected * taper).max() > 0.4 * expected[0]
    table, mask = np.where(seen, values, 1e9)[:, None], seen[:, None]
    found = sound_autocovariance(table, mask, bounds, max_lag)[0]
    assert np.abs(found - expected * taper).max() < 0.03 * expected[0]
    np.testing.assert_array_equal(sound_autocovariance(table, mask, bounds, max_lag)[0], found)  # the same draws
    recursion = levinson(found)
    assert recursion.pacf.all()
    noise_left = recursion.variances[-1]
    whole = levinson(autocovariance(values, np.ones(4000, dtype=bool), bounds, max_lag)).variances[-1]
    assert noise_left < 1.5 * whole
    assert noise_left > 0.7 * whole


def test_lines_over_long_gaps_stay_where_nothing_is_likelier() -> None:
    noise = np.random.default_rng(11).normal(size=4200)
    values = np.zeros(4200)
    for t in range(2, len(values)):
        values[t] = 1.94 * values[t - 1] - 0.945 * values[t - 2] + noise[t]
    values, seen = values[200:] - values[200:].mean(), blocks(4000, 23)
    expected = autocovariance(lines_over(values, seen), np.ones(4000, dtype=bool), [0, 4000], 40)
    found = sound_autocovariance(values[:, None], seen[:, None], [0, 4000], 40)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])


def test_short_gaps_are_bridged_whatever_the_data() -> None:
    assert [short_gap(lags) for lags in (0, 15, 16, 48, 95, 96, 1000)] == [0, 0, 1, 3, 5, 6, 6]
    values, seen = season(1500, 0.1, 24), np.ones(1500, dtype=bool)
    for start in range(4, 1490, 7):
        seen[start : start + 3] = False
    expected = autocovariance(lines_over(values, seen), np.ones(1500, dtype=bool), [0, 1500], 48)
    found = sound_autocovariance(values[:, None], seen[:, None], [0, 1500], 48)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])
    seen[707] = False  # one more row makes a gap of four, and all are filled
    found = sound_autocovariance(values[:, None], seen[:, None], [0, 1500], 48)[0]
    truth = season_autocovariance(0.1, 48) * (1 - np.arange(49) / 1500)
    assert np.abs(found - truth).max() < 0.2 * np.abs(expected - truth).max()


def test_stretches_that_stand_for_all_lie_within_the_series(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, seen = [0, 900, 1000, 1040, 3000], blocks(3000, 25)
    seen[:100] = seen[1000:1040] = seen[2900:] = False
    rows, edges = toeplitz_module._stretches(seen, bounds, 3)
    inner = [range(100 + int(seen[100:].argmax()), 900), range(900, 1000), range(1040, 2900)]
    expected = [
        row for part in inner for row in part if seen[part.start : row + 1].any() and seen[row : part.stop].any()
    ]
    assert rows.tolist() == expected
    assert np.flatnonzero(np.diff(rows) > 1).tolist() == [edges[2] - 1]
    monkeypatch.setattr(toeplitz_module, "_MOST_VALUES", 4 * 1100)
    rows, edges = toeplitz_module._stretches(seen, bounds, 3)
    assert 900 <= len(rows) <= 1100
    assert set(rows.tolist()) <= set(expected)
    for first, last in pairwise(edges.tolist()):
        assert last - first <= 200
        assert rows[last - 1] - rows[first] == last - first - 1
        assert seen[rows[first:last]].any()
    monkeypatch.setattr(toeplitz_module, "_MOST_VALUES", 49 * 6000)
    values, seen = season(20_000, 0.1, 26), blocks(20_000, 27)
    found = sound_autocovariance(values[:, None], seen[:, None], [0, 20_000], 48)[0]
    assert np.abs(found - season_autocovariance(0.1, 48)).max() < 0.05 * 17.0


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_series_without_noise_or_without_variance_have_finite_autocovariances(noise: float) -> None:
    seen = blocks(900, 28)
    for values in (season(900, noise, 29), np.zeros(900)):
        found = sound_autocovariance(values[:, None], seen[:, None], [0, 900], 48)[0]
        assert np.isfinite(found).all()
        assert np.abs(levinson(found).pacf).max() < 1.0


def test_without_gaps_sound_autocovariances_are_the_usual_ones() -> None:
    values = np.random.default_rng(12).normal(size=(300, 2)).cumsum(axis=0)
    mask = np.ones_like(values, dtype=bool)
    expected = autocovariance(values, mask, [0, 120, 300], 12)
    np.testing.assert_array_equal(sound_autocovariance(values, mask, [0, 120, 300], 12), expected)


def test_bridged_rows_stay_within_their_series() -> None:
    values = np.array([9.0, 1.0, 9.0, 3.0, 9.0, 9.0, 9.0, 7.0])
    mask = np.array([False, True, False, True, False, False, False, True])
    np.testing.assert_array_equal(bridged(values, mask, [0, 4, 6, 8]), [1.0, 1.0, 2.0, 3.0, 0.0, 0.0, 7.0, 7.0])
