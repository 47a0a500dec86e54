"""Regression of a row on the one before, and the score that asks for agreement: a loop, scipy, gaps, cuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from tsforge.anomaly.baselines import Var1Residual
from tsforge.anomaly.config import ScoreConfig, ScoreKind
from tsforge.anomaly.covariance import fit_covariance
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.row_regression import fit_row_regression
from tsforge.anomaly.scorers import consensus, mahalanobis
from tsforge.anomaly.scoring import ScoreModel, fit_score_model
from tsforge.core.errors import DataError

NAN = math.nan


def course(rows: int, seed: int = 0) -> np.ndarray:
    """Three variates that move on from row to row, the third constant."""
    rng = np.random.default_rng(seed)
    y = np.zeros((rows, 3))
    for t in range(1, rows):
        y[t, 0] = 0.8 * y[t - 1, 0] + 0.3 * y[t - 1, 1] + rng.normal()
        y[t, 1] = 0.5 * y[t - 1, 1] + rng.normal()
    return y * [2.0, 30.0, 0.0] + [5.0, -100.0, 7.0]


def test_the_weights_minimise_the_penalised_squares() -> None:
    train = course(200)
    found = fit_row_regression(train, smallest=0.01)
    np.testing.assert_array_equal(found.used, [True, True, False])
    z = (train[:, :2] - train[:, :2].mean(axis=0)) / train[:, :2].std(axis=0)

    def cost(flat: np.ndarray) -> float:
        a = flat.reshape(2, 2)
        left = sum(float(np.sum((z[t] - a @ z[t - 1]) ** 2)) for t in range(1, len(z)))
        return left + 0.01 * (len(z) - 1) * float(np.sum(a**2))

    best = minimize(cost, np.zeros(4), tol=1e-12).x.reshape(2, 2)
    np.testing.assert_allclose(found.weights[:2, :2], best, atol=1e-5)
    assert not found.weights[2].any()
    assert not found.weights[:, 2].any()


def test_residuals_are_those_of_the_plain_scorer_where_nothing_is_missing() -> None:
    train, test = course(300), course(50, seed=1)
    found = fit_row_regression(train, smallest=0.01)
    r, _ = found.residuals(test, found.nothing_before())
    assert np.isnan(r[:, 2]).all()  # constant in training: judged elsewhere
    plain = Var1Residual("mean_abs").fit(train[:, :2]).score(test[:, :2])
    np.testing.assert_allclose(np.abs(r[:, :2]).mean(axis=1), plain, rtol=1e-10)


def test_a_missing_value_is_the_last_one_before_it_and_says_nothing_itself() -> None:
    train, test = course(300), course(12, seed=2)
    test[0, 1], test[3:6], test[8, 0] = NAN, NAN, NAN
    found = fit_row_regression(train, smallest=0.01)
    r, _ = found.residuals(test, found.nothing_before())
    held = [NAN, NAN]
    for t, row in enumerate(test):
        z = [(row[v] - found.mean[v]) / found.deviation[v] for v in range(2)]
        now = [held[v] if math.isnan(z[v]) else z[v] for v in range(2)]
        past = [(0.0 if math.isnan(now[v]) else now[v]) if math.isnan(held[v]) else held[v] for v in range(2)]
        for v in range(2):
            if math.isnan(row[v]):
                assert math.isnan(r[t, v])
            else:
                told = sum(found.weights[v, w] * past[w] for w in range(2))
                assert r[t, v] == pytest.approx(z[v] - told, rel=1e-9, abs=1e-12)
        held = now


def test_an_impossible_value_is_judged_and_says_nothing_of_later_rows() -> None:
    train, test = course(300), course(12, seed=2)
    test[4:6, 0] = -9999.0
    missing = np.where(test == -9999.0, NAN, test)
    found = fit_row_regression(train, smallest=0.01)
    r, after = found.residuals(test, found.nothing_before(), test == -9999.0)
    expected, held = found.residuals(missing, found.nothing_before())
    np.testing.assert_array_equal(np.where(np.isnan(expected), expected, r), expected)
    np.testing.assert_array_equal(after, held)
    assert (r[4:6, 0] < -15).all()


def test_rows_across_a_gap_teach_nothing_and_never_observed_variates_take_no_part() -> None:
    train = course(300)
    train[:, 2] = NAN
    gap = np.concatenate([train[:150], np.full((400, 3), NAN), train[150:]])
    found = fit_row_regression(gap, smallest=[0.01, 0.01, NAN])
    apart = [fit_row_regression(part, smallest=0.01) for part in (train[:150], train[150:])]
    assert not found.used[2]
    low, high = (min(float(one.weights[0, 0]) for one in apart), max(float(one.weights[0, 0]) for one in apart))
    assert low - 0.02 < found.weights[0, 0] < high + 0.02  # 400 rows of no change would pull it to 1
    nothing = fit_row_regression(np.full((5, 2), NAN), smallest=NAN)
    assert not nothing.used.any()


def test_a_constant_takes_no_part_however_its_mean_rounds() -> None:
    """The mean of many 0.1 is not 0.1, and what missing cells count as must not make it move."""
    train = course(300)
    train[:, 2] = 0.1
    train[::7, 2] = NAN
    assert np.nansum(train, axis=0)[2] / np.count_nonzero(~np.isnan(train[:, 2])) != 0.1
    assert fit_row_regression(train, smallest=0.0).used.tolist() == [True, True, False]


def test_rows_cut_anywhere_give_the_same_bits() -> None:
    train, test = course(300), course(400, seed=3)
    rng = np.random.default_rng(0)
    test[rng.random(test.shape) < 0.2] = NAN
    test[50:70] = NAN
    found = fit_row_regression(train, smallest=0.01)
    whole, end = found.residuals(test, found.nothing_before())
    before, parts = found.nothing_before(), []
    for low, high in zip([0, 1, 2, 7, 60, 200], [1, 2, 7, 60, 200, 400], strict=True):
        part, before = found.residuals(test[low:high], before)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(before, end)


def test_consensus_is_the_geometric_mean_of_three_sizes() -> None:
    rng = np.random.default_rng(4)
    z, plain = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    z[3, 1], z[7], plain[9] = NAN, NAN, NAN
    covariance = fit_covariance(rng.normal(size=(400, 2)) @ [[1.0, 0.4], [0.0, 0.9]])
    constant = np.array([False, True, False])
    told = consensus(z, plain, covariance, constant)
    distance = np.sqrt(mahalanobis(z, covariance, constant))
    for row in range(40):
        sizes = [float(distance[row]), float(np.nanmean(np.abs(z[row])))] if row != 7 else [NAN]
        if row != 9:
            sizes.append(float(np.nanmean(np.abs(plain[row]))))
        expected = math.prod(sizes) ** (1.0 / len(sizes))
        assert told[row] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def fitted(values: np.ndarray, deviations: np.ndarray, config: ScoreConfig) -> ScoreModel:
    """The score model of 300 training and 200 scale rows."""
    span = TrainingRange.of(values[:300])
    regression = fit_row_regression(values[:300], smallest=0.01)
    training = TrainingRange(low=span.low, high=span.high, deviation=span.deviation, regression=regression)
    return fit_score_model(deviations[300:500], values[300:500], training, config)


def test_consensus_holds_back_what_one_of_the_three_finds_usual_and_never_looks_ahead() -> None:
    values = course(800, seed=5)
    deviations = np.random.default_rng(6).normal(size=(800, 1, 3))
    model = fitted(values, deviations, ScoreConfig(joint="consensus"))
    assert model.facts()["variates_in_regression"] == 2
    plain = model.score(deviations[500:], values[500:])
    both, one = deviations[500:].copy(), deviations[500:].copy()
    both[200, 0, :2] += 30.0
    moved = values[500:].copy()
    moved[200, :2] += [60.0, 900.0]  # the row before knew nothing of it either
    agreed = model.score(both, moved)
    assert int(np.argmax(agreed.joint)) == 200
    np.testing.assert_array_equal(agreed.joint[:200], plain.joint[:200])
    one[200, 0, :2] += 30.0
    alone = model.score(one, values[500:])
    assert alone.joint[200] < 0.6 * agreed.joint[200]


def test_consensus_is_for_forecasts_and_needs_its_regression() -> None:
    kinds: tuple[ScoreKind, ...] = ("spectrum", "reconstruction", "innovation", "latent")
    for kind in kinds:
        with pytest.raises(ValueError, match=f"kind '{kind}' makes none; take joint: product"):
            ScoreConfig(kind=kind, joint="consensus")
    values = course(100)
    with pytest.raises(DataError, match="needs the regression of the training rows"):
        fit_score_model(values[:, None], values, TrainingRange.of(values), ScoreConfig(joint="consensus"))
