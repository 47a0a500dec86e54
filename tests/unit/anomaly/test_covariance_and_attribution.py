"""Covariances against scikit-learn and dense algebra; contributions against leave-one-out and their sum."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.covariance import LedoitWolf

from tsforge.anomaly.attribution import Extremes, contributions, leading_variates, rank_extremes
from tsforge.anomaly.covariance import (
    DenseCovariance,
    LowRankCovariance,
    fit_covariance,
    ledoit_wolf,
    squared_distance,
)
from tsforge.core.errors import DataError


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, width)) @ generator.standard_normal((width, width))


@pytest.mark.parametrize(("rows", "width"), [(30, 40), (100, 5), (2000, 12)])
def test_shrinkage_equals_scikit_learn(rows: int, width: int) -> None:
    x = correlated(rows, width) + 3.0
    matrix, rho = ledoit_wolf(x)
    oracle = LedoitWolf().fit(x)
    assert rho == pytest.approx(oracle.shrinkage_, abs=1e-12)
    np.testing.assert_allclose(matrix, oracle.covariance_, atol=1e-10)


def test_low_rank_inverse_equals_the_dense_one() -> None:
    generator = np.random.default_rng(1)
    noise, loadings = generator.uniform(0.5, 2.0, 30), generator.standard_normal((30, 4))
    fast = LowRankCovariance(noise, loadings)
    dense = DenseCovariance(np.diag(noise) + loadings @ loadings.T)
    r = generator.standard_normal((7, 30))
    np.testing.assert_allclose(fast.solve(r), dense.solve(r), atol=1e-10)
    np.testing.assert_allclose(fast.precision_diagonal, dense.precision_diagonal, atol=1e-10)
    np.testing.assert_allclose(fast.variances, dense.variances, atol=1e-12)
    keep = generator.uniform(size=30) < 0.5
    np.testing.assert_allclose(fast.subset(keep).solve(r[:, keep]), dense.subset(keep).solve(r[:, keep]), atol=1e-10)


def test_many_variates_or_few_rows_get_a_low_rank_covariance_that_sees_the_common_factor() -> None:
    generator = np.random.default_rng(2)
    factor = generator.standard_normal((120, 1))
    x = factor @ np.ones((1, 60)) + 0.3 * generator.standard_normal((120, 60))
    found = fit_covariance(x)
    assert isinstance(found, LowRankCovariance)
    assert found.loadings.shape[1] == 1
    np.testing.assert_allclose(found.variances, x.var(axis=0), rtol=1e-6)
    together, against = np.ones((1, 60)), np.where(np.arange(60) % 2, 1.0, -1.0)[None]
    assert squared_distance(found, against)[0] > 20 * squared_distance(found, together)[0]


def test_distance_is_the_naive_quadratic_form() -> None:
    x = correlated(500, 6)
    covariance = fit_covariance(x)
    assert isinstance(covariance, DenseCovariance)
    inverse = np.linalg.inv(covariance.matrix)
    expected = [row @ inverse @ row for row in x[:20]]
    np.testing.assert_allclose(squared_distance(covariance, x[:20]), expected, rtol=1e-8)


def test_missing_variates_use_their_submatrix_on_a_common_scale() -> None:
    x = correlated(2000, 5)
    covariance = fit_covariance(x)
    assert isinstance(covariance, DenseCovariance)
    partial = x[:50].copy()
    partial[:, 3] = np.nan
    keep = np.array([True, True, True, False, True])
    inverse = np.linalg.inv(covariance.matrix[np.ix_(keep, keep)])
    plain = np.array([row @ inverse @ row for row in partial[:, keep]])
    expected = chi2.isf(chi2.sf(plain, 4), 5)
    np.testing.assert_allclose(squared_distance(covariance, partial), expected, rtol=1e-8)
    extreme = np.array([[1e3, 0, 0, np.nan, 0], [1e4, 0, 0, np.nan, 0], [np.nan] * 5])
    found = squared_distance(covariance, extreme)
    assert found[1] > found[0] > 1e3  # still ordered where the chi-square tail is 0 in floating point
    assert np.isnan(found[2])


def test_missing_cells_do_not_shrink_variances() -> None:
    x = correlated(4000, 4)
    gappy = x.copy()
    gappy[np.random.default_rng(3).uniform(size=x.shape) < 0.6] = np.nan
    np.testing.assert_allclose(fit_covariance(gappy).variances, x.var(axis=0), rtol=0.1)
    gappy[1:, 0] = np.nan
    with pytest.raises(DataError, match="1 of 4 variates have fewer than 2"):
        fit_covariance(gappy)


def test_dependent_columns_can_still_be_factored() -> None:
    x = correlated(200, 3)
    assert np.isfinite(
        squared_distance(fit_covariance(np.column_stack([x, x[:, 0], np.zeros(200)])), np.ones((2, 5)))
    ).all()


def test_additive_sums_to_the_distance_and_conditional_is_the_leave_one_out_difference() -> None:
    x = correlated(800, 6)
    covariance = fit_covariance(x)
    assert isinstance(covariance, DenseCovariance)
    r = 3.0 * x[:10]
    parts = contributions(r, covariance)
    distance = squared_distance(covariance, r)
    np.testing.assert_allclose(parts.additive.sum(axis=1), distance, rtol=1e-10)
    for v in range(6):
        rest = [u for u in range(6) if u != v]
        inverse = np.linalg.inv(covariance.matrix[np.ix_(rest, rest)])
        without = np.array([row @ inverse @ row for row in r[:, rest]])
        np.testing.assert_allclose(parts.conditional[:, v], distance - without, atol=1e-8)
    np.testing.assert_allclose(parts.marginal, np.abs(r) / np.sqrt(np.diag(covariance.matrix)), rtol=1e-12)


def test_an_injected_fault_is_ranked_first_and_missing_variates_are_left_out() -> None:
    x = correlated(800, 5)
    covariance = fit_covariance(x)
    event = x[:6].copy()
    event[3, 2] += 40 * np.sqrt(covariance.variances[2])
    event[:, 4] = np.nan
    kept, parts = Extremes.nothing(5), contributions(event, covariance)
    for row in range(6):
        kept.add(parts, row, score=float(row == 3))
    ranked = rank_extremes("abcde", kept)
    assert ranked[0]["variate"] == "c"
    assert ranked[0]["contribution"] > 35
    assert ranked[0]["conditional"] == max(item["conditional"] for item in ranked)
    assert {item["variate"] for item in ranked} == {"a", "b", "c", "d"}
    assert leading_variates(ranked) == {"c"}
    assert leading_variates([]) == frozenset()
    assert rank_extremes("abcde", kept, limit=2) == ranked[:2]
    assert ranked[0]["additive"] == parts.additive[3, 2]


def test_constant_variates_stand_on_their_own() -> None:
    x = correlated(300, 2)
    constant = np.array([False, True, False])
    event = np.array([[0.0, 10.0, 0.0]])
    parts = contributions(event, fit_covariance(x), constant)
    assert parts.marginal[0].tolist() == [0.0, 10.0, 0.0]
    assert parts.additive[0, 1] == 100.0
