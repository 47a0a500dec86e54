"""Tail models and p-values: recovered parameters, agreement with scipy, uniformity, continuity, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tsforge.anomaly.calibration import effective_size, fit_calibration, ranked_p_values, row_uniforms
from tsforge.anomaly.gpd import fit_tail
from tsforge.core.errors import DataError


@pytest.mark.parametrize("gamma", [-0.3, 0.0, 0.2, 0.4])
def test_shape_and_scale_are_recovered(gamma: float) -> None:
    """Checklist 8: within three standard errors."""
    excesses = stats.genpareto.rvs(gamma, scale=2.0, size=4000, random_state=3)
    scores = np.concatenate([np.linspace(-1.0, 0.0, 4001), excesses])
    found = fit_tail(scores, level=0.5)
    # asymptotic standard errors of the maximum-likelihood estimates (Smith 1987)
    error_gamma = (1 + gamma) / np.sqrt(found.num_excesses)
    error_sigma = 2.0 * np.sqrt(2 * (1 + gamma) / found.num_excesses)
    assert abs(found.gamma - gamma) < 3 * error_gamma
    assert abs(found.sigma - (2.0 + gamma * found.u)) < 3 * error_sigma
    reference, _, scale = stats.genpareto.fit(scores[scores > found.u] - found.u, floc=0)
    assert found.gamma == pytest.approx(reference, abs=2e-3)
    assert found.sigma == pytest.approx(scale, rel=2e-3)


def test_the_published_check_of_a_normal_sample() -> None:
    """Checklist 8: z_q is the number of spec 5.2."""
    # spec: u = 2.0408, ML gamma -0.264, sigma 0.405, z = 3.197; moments z = 3.178; true value 3.719
    scores = np.random.default_rng(0).standard_normal(5000)
    found = fit_tail(scores)
    assert (found.u, found.gamma, found.sigma) == pytest.approx((2.0408, -0.264, 0.405), abs=1e-3)
    assert found.quantile(1e-4) == pytest.approx(3.197, abs=1e-3)
    assert fit_tail(scores, method="moments").quantile(1e-4) == pytest.approx(3.178, abs=1e-3)
    safer = fit_tail(scores, shape="nonnegative")
    assert safer.gamma == 0.0
    assert safer.quantile(1e-4) == pytest.approx(3.719, abs=0.05)


def test_quantile_inverts_survival() -> None:
    for shape, sample in (("free", stats.norm), ("nonnegative", stats.t(3))):
        tail = fit_tail(sample.rvs(size=5000, random_state=1), shape=shape)  # type: ignore[arg-type]
        for risk in (1e-2, 1e-3, 1e-5):
            assert tail.survival([tail.quantile(risk)])[0] == pytest.approx(risk, rel=1e-9)


def test_beyond_a_finite_end_p_is_tiny_and_positive() -> None:
    tail = fit_tail(np.random.default_rng(0).standard_normal(5000))
    p = tail.survival([tail.u - tail.sigma / tail.gamma + 1.0])[0]
    assert 0.0 < p < 1e-200


def test_too_few_or_equal_excesses_are_refused() -> None:
    with pytest.raises(DataError, match="needs 50 scores above the 0.98 quantile, 1000 calibration scores leave 20"):
        fit_tail(np.random.default_rng(0).standard_normal(1000))
    with pytest.raises(DataError, match="do not differ"):
        fit_tail(np.concatenate([np.zeros(5000), np.ones(100)]), level=0.97)


def test_conformal_p_values_count_ties_against_the_alarm() -> None:
    p = ranked_p_values(np.array([1.0, 2.0, 2.0, 3.0]), [0.0, 2.0, 2.5, 3.0, 4.0, np.nan])
    np.testing.assert_allclose(p, [1.0, 4 / 5, 2 / 5, 2 / 5, 1 / 5, np.nan])


def test_random_tie_breaks_make_p_values_uniform() -> None:
    """Checklist 4: exactly uniform on exchangeable scores, ties or not; without them ties make p too large."""
    generator = np.random.default_rng(5)
    draws, conservative = [], []
    for row in range(3_000):
        sample = generator.poisson(2.0, 51).astype(float)  # heavy ties
        calibration = fit_calibration(sample[:50], method="conformal", seed=3)
        draws.append(calibration.p_values(sample[50:], [row])[0])
        conservative.append(ranked_p_values(np.sort(sample[:50]), sample[50:])[0])
    assert stats.kstest(draws, "uniform").pvalue > 0.01
    assert stats.kstest(conservative, "uniform").pvalue < 1e-6
    assert np.mean(conservative) > 0.55


def test_a_tie_falls_the_same_way_wherever_the_row_is_judged() -> None:
    rows = np.arange(-5, 20_000)
    u = row_uniforms(7, rows)
    np.testing.assert_array_equal(np.concatenate([row_uniforms(7, rows[:3]), row_uniforms(7, rows[3:])]), u)
    assert 0.0 < u.min() < u.max() < 1.0
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(u, row_uniforms(8, rows))[0, 1]) < 0.02
    with pytest.raises(DataError, match="need the row numbers"):
        fit_calibration([1.0, 2.0], method="conformal", seed=0).p_values([1.0])


def test_p_values_are_uniform_on_exchangeable_scores() -> None:
    """Checklist 4."""
    generator = np.random.default_rng(6)
    calibration = fit_calibration(generator.standard_normal(20_000))
    assert calibration.tail is not None
    assert stats.kstest(calibration.p_values(generator.standard_normal(4000)), "uniform").pvalue > 0.01


def test_p_falls_with_the_score_and_does_not_jump_where_the_tail_takes_over() -> None:
    """Checklist 8: p is continuous at u."""
    calibration = fit_calibration(np.random.default_rng(2).standard_t(4, 5000))
    assert calibration.tail is not None
    grid = np.linspace(-8, 60, 200_001)
    p = calibration.p_values(grid)
    assert (np.diff(p) <= 0).all()
    around = calibration.p_values([calibration.tail.u, np.nextafter(calibration.tail.u, np.inf)])
    assert 0.0 <= around[0] - around[1] <= 1.0 / 5001


def test_a_short_sample_falls_back_to_ranks_and_says_so() -> None:
    sample = np.random.default_rng(0).standard_normal(500)
    calibration = fit_calibration(sample)
    assert calibration.tail is None
    assert "calibrate on at least 2550 rows" in calibration.note
    assert calibration.p_values([99.0])[0] == pytest.approx(1 / 501)
    with pytest.raises(DataError, match="leave 10"):
        fit_calibration(sample, method="gpd")
    with pytest.raises(DataError, match="no calibration score"):
        fit_calibration([np.nan, np.nan])


def test_effective_size_of_autocorrelated_scores() -> None:
    generator = np.random.default_rng(0)
    shocks = generator.standard_normal(40_000)
    scores = np.empty_like(shocks)
    last = 0.0
    for i, shock in enumerate(shocks):
        last = scores[i] = 0.8 * last + shock
    expected = scores.size * (1 - 0.8) / (1 + 0.8)  # closed form of a first-order autoregression
    assert effective_size(scores) == pytest.approx(expected, rel=0.15)
    assert effective_size(shocks) == pytest.approx(shocks.size, rel=0.05)
    scores[generator.uniform(size=scores.size) < 0.3] = np.nan
    assert effective_size(scores) == pytest.approx(0.7 * expected * 1.3, rel=0.35)  # thinner, so less correlated
    assert effective_size(np.ones(10)) == 1.0
