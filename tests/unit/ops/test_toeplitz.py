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


def test_without_gaps_sound_autocovariances_are_the_usual_ones() -> None:
    values = np.random.default_rng(12).normal(size=(300, 2)).cumsum(axis=0)
    mask = np.ones_like(values, dtype=bool)
    expected = autocovariance(values, mask, [0, 120, 300], 12)
    np.testing.assert_array_equal(sound_autocovariance(values, mask, [0, 120, 300], 12), expected)


def test_bridged_rows_stay_within_their_series() -> None:
    values = np.array([9.0, 1.0, 9.0, 3.0, 9.0, 9.0, 9.0, 7.0])
    mask = np.array([False, True, False, True, False, False, False, True])
    np.testing.assert_array_equal(bridged(values, mask, [0, 4, 6, 8]), [1.0, 1.0, 2.0, 3.0, 0.0, 0.0, 7.0, 7.0])
