"""Levinson, Burg and the partial autocorrelation map against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz, toeplitz

from tsforge.core.errors import ModelError
from tsforge.ops.ar_process import draw_weights, simulate
from tsforge.ops.stability import is_stationary
from tsforge.ops.toeplitz import (
    autocovariance,
    burg,
    levinson,
    pacf_to_weights,
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


def test_autocovariance_of_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match="no observed value"):
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
