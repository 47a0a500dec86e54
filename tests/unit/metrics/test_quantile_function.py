"""Distributions from a few quantiles: a Normal comes back, inverse functions, tails, atoms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from tsforge.core.errors import DataError
from tsforge.metrics.quantile_function import probability_at, quantile_at

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def test_a_normal_comes_back_between_the_outermost_levels() -> None:
    known = norm.ppf(LEVELS, loc=3.0, scale=2.0)
    asked = np.linspace(0.05, 0.95, 41)
    np.testing.assert_allclose(quantile_at(known, LEVELS, asked), norm.ppf(asked, loc=3.0, scale=2.0), atol=1e-12)


def test_tails_are_exponential_through_the_two_outermost_quantiles() -> None:
    """An exponential distribution is its own tail: every quantile beyond the outermost level is exact."""
    known = -np.log1p(-np.array(LEVELS))
    asked = np.array([0.96, 0.99, 0.99999])
    np.testing.assert_allclose(quantile_at(known, LEVELS, asked), -np.log1p(-asked))
    mirrored = -known[::-1]
    np.testing.assert_allclose(quantile_at(mirrored, LEVELS, 1.0 - asked), np.log1p(-asked))


def test_cells_may_be_asked_for_probabilities_of_their_own() -> None:
    rng = np.random.default_rng(0)
    known = np.sort(rng.normal(size=(4, 3, len(LEVELS))), axis=-1)
    asked = rng.uniform(0.001, 0.999, (4, 3, 5))
    found = quantile_at(known, LEVELS, asked)
    for place in np.ndindex(4, 3):
        np.testing.assert_allclose(found[place], quantile_at(known[place], LEVELS, asked[place]))


def test_the_distribution_function_is_the_inverse() -> None:
    rng = np.random.default_rng(1)
    known = np.sort(rng.normal(size=(50, len(LEVELS))), axis=-1)
    asked = rng.uniform(1e-4, 1.0 - 1e-4, (50, 20))
    values = quantile_at(known, LEVELS, asked)
    for column in range(20):
        before, after = probability_at(known, LEVELS, values[:, column])
        np.testing.assert_allclose(before, asked[:, column], atol=1e-9)
        np.testing.assert_array_equal(before, after)


def test_an_atom_is_a_jump_and_takes_the_tail_when_it_is_outermost() -> None:
    known = np.array([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 3.0])
    values = np.array([-0.1, 0.0, 2.0, 1.0])
    before, after = probability_at(np.tile(known, (4, 1)), LEVELS, values)
    np.testing.assert_allclose(before, [0.0, 0.0, 0.75, 0.5])
    np.testing.assert_allclose(after, [0.0, 0.25, 0.9, 0.5])


def test_missing_parts_give_nan_and_bad_probabilities_are_refused() -> None:
    known = np.array([[0.0, 1.0, 2.0], [0.0, np.nan, 2.0]])
    before, after = probability_at(known, (0.1, 0.5, 0.9), [np.nan, 1.0])
    assert np.isnan(before).all()
    assert np.isnan(after).all()
    with pytest.raises(DataError, match="strictly between 0 and 1"):
        quantile_at([0.0, 1.0], (0.2, 0.8), [1.0])
    with pytest.raises(DataError, match="two or more levels"):
        quantile_at([0.0], (0.5,), [0.3])
