"""Quantile and distribution metrics against loops, numerical integration and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from tsforge.core.errors import DataError
from tsforge.metrics.quantile import (
    coverage,
    crps_normal,
    crps_quantiles,
    crps_samples,
    crps_student_t,
    interval_score,
    interval_width,
    level_weights,
    msis,
    pinball,
    pinball_loss,
    weighted_quantile_loss,
)

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    target = rng.normal(2.0, 4.0, (7, 3, 2))
    quantiles = np.sort(rng.normal(2.0, 4.0, (7, 3, 2, 5)), axis=-1)
    return target, quantiles, rng.random(target.shape) > 0.25


def test_pinball_and_wql_equal_a_loop(cells) -> None:
    target, quantiles, mask = cells
    loss, size, count = 0.0, 0.0, 0
    for index in np.ndindex(target.shape):
        if not mask[index]:
            continue
        count += 1
        size += abs(target[index])
        for position, level in enumerate(LEVELS):
            gap = target[index] - quantiles[(*index, position)]
            loss += level * gap if gap >= 0 else (level - 1) * gap
    plain = pinball_loss(target, quantiles, LEVELS, mask)
    assert plain.value == pytest.approx(loss / count / len(LEVELS))
    weighted = weighted_quantile_loss(target, quantiles, LEVELS, mask)
    assert weighted.value == pytest.approx(2 * loss / len(LEVELS) / size)
    assert weighted.count == count


def test_wql_of_the_median_alone_is_the_normalised_absolute_error(cells) -> None:
    target, quantiles, _ = cells
    score = weighted_quantile_loss(target, quantiles[..., 2:3], (0.5,))
    assert score.value == pytest.approx(np.abs(target - quantiles[..., 2]).sum() / np.abs(target).sum())


def test_wql_without_any_size_is_undefined() -> None:
    assert math.isnan(weighted_quantile_loss(np.zeros(3), np.ones((3, 1)), (0.5,)).value)


def test_pinball_is_least_at_the_true_quantile() -> None:
    draws = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    guesses = stats.norm.ppf(0.9) + np.array([-0.2, 0.0, 0.2])
    losses = [pinball_loss(draws, np.full((4000, 1), guess), (0.9,)).value for guess in guesses]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize(("mean", "scale", "y"), [(0.0, 1.0, 0.3), (2.0, 0.5, -1.0), (-4.0, 7.0, -4.0)])
def test_crps_normal_equals_the_integral(mean: float, scale: float, y: float) -> None:
    def integrand(x: float) -> float:
        return (stats.norm.cdf(x, mean, scale) - (x >= y)) ** 2

    below, _ = integrate.quad(integrand, mean - 12 * scale - 5, y)
    above, _ = integrate.quad(integrand, y, mean + 12 * scale + 5)
    assert float(crps_normal(y, mean, scale)) == pytest.approx(below + above, abs=1e-7)


def test_crps_normal_without_spread_is_the_absolute_error() -> None:
    assert crps_normal([1.0, 4.0], [3.0, 4.0], [0.0, 0.0]).tolist() == [2.0, 0.0]
    with pytest.raises(DataError, match="negative"):
        crps_normal(0.0, 0.0, -1.0)


def test_crps_of_a_missing_spread_is_missing() -> None:
    scales = [np.nan, 0.0, 1.0]
    for found in (crps_normal(1.0, 0.0, scales), crps_student_t(1.0, 0.0, scales, 5.0)):
        assert np.isnan(found).tolist() == [True, False, False]
        assert found[1] == 1.0


def test_crps_from_quantiles_tends_to_the_closed_form() -> None:
    y = np.array([-1.5, 0.0, 0.4, 2.2])
    exact = crps_normal(y, 0.0, 1.0)
    gaps = []
    for number in (19, 199, 1999):
        levels = (np.arange(number) + 0.5) / number
        quantiles = np.broadcast_to(stats.norm.ppf(levels), (4, number))
        gaps.append(np.abs(crps_quantiles(y, quantiles, levels) - exact).max())
    assert gaps[0] < 0.02
    assert gaps[2] < 1e-4
    assert gaps[1] < gaps[0] / 5


def test_level_weights_share_out_the_unit_interval() -> None:
    assert level_weights((0.05, 0.25, 0.5, 0.75, 0.95)) == pytest.approx([0.15, 0.225, 0.25, 0.225, 0.15])
    assert level_weights((0.5,)) == pytest.approx([1.0])


@pytest.mark.parametrize("fair", [True, False])
def test_crps_samples_equals_all_pairs(fair: bool) -> None:
    rng = np.random.default_rng(1)
    draws, y = rng.normal(size=(3, 17)), rng.normal(size=3)
    for row in range(3):
        distance = np.mean([abs(x - y[row]) for x in draws[row]])
        pairs = sum(abs(a - b) for a in draws[row] for b in draws[row])
        expected = distance - pairs / (2 * 17 * (16 if fair else 17))
        assert crps_samples(y, draws, fair=fair)[row] == pytest.approx(expected)


def test_fair_crps_of_samples_is_unbiased_for_the_closed_form() -> None:
    draws = np.random.default_rng(2).normal(size=(40_000, 5))
    estimate = crps_samples(np.full(40_000, 0.7), draws)
    error = estimate.std() / math.sqrt(40_000)
    assert estimate.mean() == pytest.approx(float(crps_normal(0.7, 0.0, 1.0)), abs=4 * error)


def test_crps_samples_needs_samples() -> None:
    with pytest.raises(DataError, match="too few"):
        crps_samples([0.0], [[1.0]])
    assert crps_samples([0.0], [[1.0]], fair=False) == pytest.approx([1.0])


def test_coverage_and_width_count_bounds_as_inside() -> None:
    low, high = np.array([0.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 3.0])
    y = np.array([0.0, 1.0, 1.1, np.nan])
    assert coverage(y, low, high).value == pytest.approx(2 / 3)
    assert interval_width(y, low, high).value == pytest.approx(1.0)
    assert interval_width(y, low, high).count == 3


def test_infinite_bounds_cover_and_missing_bounds_spoil() -> None:
    assert coverage([5.0], [-np.inf], [np.inf]).value == 1.0
    assert interval_width([5.0], [-np.inf], [np.inf]).value == np.inf
    assert math.isnan(coverage([5.0], [np.nan], [9.0]).value)
    assert pinball(0.0, [-np.inf, np.inf], (0.1, 0.9)).tolist() == [np.inf, np.inf]


def test_interval_score_by_hand_and_msis_scale() -> None:
    # width 2, 0.5 below the interval at alpha 0.2: 2 + 10 * 0.5
    assert interval_score([-0.5, 1.0, 2.25], [0.0] * 3, [2.0] * 3, 0.2) == pytest.approx([7.0, 2.0, 4.5])
    assert msis([-0.5, 1.0], [0.0] * 2, [2.0] * 2, 0.2, scale=2.0).value == pytest.approx(2.25)
    assert math.isnan(msis([1.0], [0.0], [2.0], 0.2, scale=np.nan).value)
    with pytest.raises(DataError, match="alpha"):
        interval_score([0.0], [0.0], [1.0], 0.0)


def test_interval_score_is_the_two_pinballs() -> None:
    rng = np.random.default_rng(8)
    y, low = rng.normal(size=50), rng.normal(-1.0, 0.3, 50)
    high = low + rng.random(50)
    both = pinball(y, np.column_stack([low, high]), (0.1, 0.9)).sum(axis=-1)
    assert interval_score(y, low, high, 0.2) == pytest.approx(both * 2 / 0.2)


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (0.9, 0.1), (0.0, 0.5), (0.5, 1.0)])
def test_bad_levels_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="quantile levels"):
        pinball([0.0], np.zeros((1, len(levels))), levels)
    with pytest.raises(DataError, match="3 quantiles"):
        pinball([0.0], np.zeros((1, 3)), (0.1, 0.9))
