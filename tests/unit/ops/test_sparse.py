"""Sparse solvers: against scikit-learn's lasso, the definition of the objective, and known supports."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from tsforge.ops.sparse import (
    Moments,
    Penalty,
    _descend,
    extended_bic,
    information_path,
    matching_pursuit,
    objective,
    paper_strength,
    refit,
    reweighted_l1,
)


def problem(targets: int = 1, seed: int = 0, rows: int = 400) -> tuple[Moments, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 12)) @ (np.eye(12) + 0.3 * rng.normal(size=(12, 12)))
    truth = np.zeros((targets, 12))
    truth[:, [1, 4]] = rng.uniform(0.5, 1.0, (targets, 2))
    y = x @ truth.T + rng.normal(size=(rows, targets))
    return Moments(x.T @ x / rows, y.T @ x / rows, (y**2).mean(0), float(rows)), x, y, truth


def test_coordinate_descent_equals_scikit_learn_lasso() -> None:
    moments, x, y, _ = problem(targets=3)
    found = _descend(moments, np.zeros((3, 12)), np.full((3, 12), 0.1), group=False, max_sweeps=500)
    expected = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y).coef_
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.array_equal(found == 0.0, np.abs(expected) < 1e-9)


def test_objective_is_mean_squared_error_plus_penalty() -> None:
    moments, x, y, truth = problem(targets=2)
    expected = ((y - x @ truth.T) ** 2).mean(0).sum() + 0.3 * sum(
        2 / (1 + np.exp(-3 * abs(v) ** (1 / 3))) - 1 for v in truth.ravel() if v
    )
    assert objective(moments, truth, 0.3, Penalty()) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("group", [False, True])
def test_reweighting_never_raises_the_objective_and_shares_support_by_group(group: bool) -> None:
    moments, x, y, _ = problem(targets=3, seed=1)
    start = np.linalg.lstsq(x, y, rcond=None)[0].T
    fit = reweighted_l1(moments, start, 0.02, group=group)
    assert (np.diff(fit.objective) <= 1e-12).all()
    assert fit.objective[-1] < fit.objective[0]
    assert fit.objective[-1] == pytest.approx(objective(moments, fit.theta, 0.02, Penalty(), group=group), abs=1e-12)
    if group:
        support = fit.theta != 0.0
        assert (support == support[0]).all()


@pytest.mark.parametrize("group", [False, True])
def test_path_and_pursuit_find_the_true_support(group: bool) -> None:
    moments, x, y, truth = problem(targets=2, seed=2)
    start = np.linalg.lstsq(x, y, rcond=None)[0].T
    for theta in (information_path(moments, start, group=group).theta, matching_pursuit(moments, group=group).theta):
        assert np.array_equal(theta != 0.0, truth != 0.0)
        for target in range(2):
            chosen = np.flatnonzero(truth[target])
            expected = np.linalg.lstsq(x[:, chosen], y[:, target], rcond=None)[0]
            np.testing.assert_allclose(theta[target, chosen], expected, atol=1e-8)


def test_pursuit_respects_its_limit_and_finds_nothing_in_noise() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(500, 30)), rng.normal(size=(500, 1))
    moments = Moments(x.T @ x / 500, y.T @ x / 500, (y**2).mean(0), 500.0)
    assert not matching_pursuit(moments).theta.any()
    signal, _, _, _ = problem()
    assert (matching_pursuit(signal, max_lags=1).theta != 0.0).sum() == 1


def test_refit_keeps_zeros_and_gives_the_leverage_of_the_support() -> None:
    moments, x, _, _ = problem()
    theta = np.zeros((1, 12))
    theta[0, [1, 4]] = 0.1
    refitted, leverage = refit(moments, theta)
    assert np.array_equal(refitted != 0.0, theta != 0.0)
    expected = np.linalg.inv(x[:, [1, 4]].T @ x[:, [1, 4]]).diagonal()
    np.testing.assert_allclose(leverage[0, [1, 4]], expected, rtol=1e-9)


def test_repeated_features_do_not_break_the_solvers() -> None:
    moments, _, _, _ = problem()
    gram = np.block([[moments.gram, moments.gram], [moments.gram, moments.gram]])
    double = Moments(gram, np.tile(moments.cross, 2), moments.power, moments.rows)
    start = np.tile(np.linalg.solve(moments.gram, moments.cross[0]) / 2, 2)[None]
    assert np.isfinite(information_path(double, start).theta).all()
    assert (matching_pursuit(double).theta != 0.0).sum() == 2


def test_extended_bic_prices_the_choice_and_density_one_is_no_penalty() -> None:
    assert extended_bic(1.0, 100.0, 1, 1000) - extended_bic(1.0, 100.0, 0, 1000) == pytest.approx(
        np.log(100.0) + 2 * np.log(1000.0)
    )
    assert paper_strength(1.0, 50, 0.01) == 0.0
    assert paper_strength(3 / 1000, 1000, 0.01) == pytest.approx(0.01 * (1000 / 3 - 1) / 1000)
