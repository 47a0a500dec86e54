"""Energy and variogram score of samples against loops, closed forms and what they must prefer; CRPS of a Student-t."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import t as student_t

from tsforge.core.errors import DataError
from tsforge.metrics.quantile import crps_samples, crps_student_t
from tsforge.metrics.samples import energy_score, variogram_score


def naive_energy(y: np.ndarray, draws: np.ndarray, seen: np.ndarray, *, fair: bool) -> float:
    """Equation (22), one pair at a time."""
    count = len(draws)
    error = sum(math.dist(draw[seen], y[seen]) for draw in draws) / count
    pairs = sum(math.dist(a[seen], b[seen]) for a in draws for b in draws)
    return error - 0.5 * pairs / (count * (count - 1) if fair else count**2)


def naive_variogram(y: np.ndarray, draws: np.ndarray, seen: np.ndarray, order: float) -> float:
    total = weights = 0.0
    for i in range(len(y)):
        for j in range(i + 1, len(y)):
            if seen[i] and seen[j]:
                expected = sum(abs(draw[i] - draw[j]) ** order for draw in draws) / len(draws)
                total += (abs(y[i] - y[j]) ** order - expected) ** 2 / (j - i)
                weights += 1.0 / (j - i)
    return total / weights


@pytest.fixture
def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    y, draws = 100.0 + rng.normal(size=(3, 2, 6)), 100.0 + rng.normal(size=(3, 2, 9, 6))
    seen = rng.random((3, 2, 6)) > 0.25
    return y, draws, seen


@pytest.mark.parametrize("fair", [True, False])
def test_energy_score_equals_the_loop(windows: tuple[np.ndarray, ...], fair: bool) -> None:
    y, draws, seen = windows
    found = energy_score(y, draws, seen, fair=fair)
    for place in np.ndindex(3, 2):
        assert found[place] == pytest.approx(naive_energy(y[place], draws[place], seen[place], fair=fair), abs=1e-9)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_variogram_score_equals_the_loop(windows: tuple[np.ndarray, ...], order: float) -> None:
    y, draws, seen = windows
    found = variogram_score(y, draws, seen, order=order)
    for place in np.ndindex(3, 2):
        assert found[place] == pytest.approx(naive_variogram(y[place], draws[place], seen[place], order))


def test_a_level_far_from_zero_costs_no_digits() -> None:
    rng = np.random.default_rng(1)
    y, draws = rng.normal(size=(2, 5)), rng.normal(size=(2, 20, 5))
    np.testing.assert_allclose(energy_score(1e8 + y, 1e8 + draws), energy_score(y, draws), rtol=1e-6)


def test_energy_score_of_one_step_is_the_crps() -> None:
    rng = np.random.default_rng(5)
    y, draws = rng.normal(size=7), rng.normal(size=(7, 30))
    for fair in (True, False):
        found = energy_score(y[:, None], draws[..., None], fair=fair)
        np.testing.assert_allclose(found, crps_samples(y, draws, fair=fair), atol=1e-9)


def test_fair_energy_score_is_unbiased_and_the_plain_one_is_not() -> None:
    """E|X| and E|X - X'| of a standard Normal in D dimensions are known: sqrt(2) and 2 Gamma((D+1)/2) / Gamma(D/2)."""
    size, count, trials = 5, 4, 20_000
    rng = np.random.default_rng(11)
    norm = math.sqrt(2.0) * math.exp(gammaln((size + 1) / 2) - gammaln(size / 2))
    exact = norm - 0.5 * math.sqrt(2.0) * norm
    draws = rng.normal(size=(trials, count, size))
    fair = energy_score(np.zeros((trials, size)), draws)
    error = fair.std() / math.sqrt(trials)
    assert fair.mean() == pytest.approx(exact, abs=4 * error)
    plain = energy_score(np.zeros((trials, size)), draws, fair=False).mean()
    assert plain - exact == pytest.approx(0.5 * math.sqrt(2.0) * norm / count, abs=5 * error)


def test_scores_prefer_the_true_dependence() -> None:
    rng = np.random.default_rng(2)
    size, trials = 8, 400
    factor = np.linalg.cholesky(0.8 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size))))
    y = rng.normal(size=(trials, size)) @ factor.T
    joint = rng.normal(size=(trials, 60, size)) @ factor.T
    apart = rng.normal(size=(trials, 60, size))
    for score in (energy_score, variogram_score):
        gain = score(y, apart) - score(y, joint)
        assert gain.mean() > 4 * gain.std() / math.sqrt(trials)


def test_windows_without_values_have_no_score_and_shapes_are_checked() -> None:
    y, draws = np.array([[np.nan, np.nan], [1.0, np.nan]]), np.zeros((2, 3, 2))
    energy = energy_score(y, draws)
    assert np.isnan(energy[0])
    assert energy[1] == pytest.approx(1.0)
    assert np.isnan(variogram_score(y, draws)).all()
    with pytest.raises(DataError, match="do not fit"):
        energy_score(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(DataError, match="too few"):
        energy_score(np.zeros(2), np.zeros((1, 2)))
    with pytest.raises(DataError, match="must be positive"):
        variogram_score(np.zeros(2), np.zeros((2, 2)), order=0.0)


@pytest.mark.parametrize(
    ("mean", "scale", "df", "y"), [(0.0, 1.0, 3.0, 0.7), (2.0, 0.5, 1.5, -4.0), (0.0, 3.0, 30.0, 2.0)]
)
def test_crps_of_a_student_t_equals_the_integral(mean: float, scale: float, df: float, y: float) -> None:
    def cdf(x: float) -> float:
        return float(student_t.cdf(x, df, loc=mean, scale=scale))

    below = quad(lambda x: cdf(x) ** 2, -np.inf, y)[0]
    above = quad(lambda x: (1.0 - cdf(x)) ** 2, y, np.inf)[0]
    assert float(crps_student_t(y, mean, scale, df)) == pytest.approx(below + above, rel=1e-6)
    assert float(crps_student_t(y, mean, 0.0, df)) == abs(y - mean)


def test_crps_of_a_student_t_needs_a_mean() -> None:
    with pytest.raises(DataError, match="more than 1 degree"):
        crps_student_t(0.0, 0.0, 1.0, 1.0)
