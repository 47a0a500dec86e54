"""Innovations of a linear state-space model: against the law they follow, another filter, and a known truth."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.linalg import block_diag, solve_discrete_lyapunov
from scipy.stats import chi2
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.state_space import LONGEST_WINDOW, SHORTEST_WINDOW, StateSpace, Told, stationary_covariance
from tsforge.anomaly.state_space_fit import LARGEST_RADIUS, fit_state_space, stable
from tsforge.anomaly.uncomparable import Uncomparable
from tsforge.anomaly.windowed import WindowJudge, fit_window_judge
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError

A = np.array([[0.9, 0.3], [-0.3, 0.85]])
C = np.array([[1.0, 0.2], [0.5, -1.0], [0.0, 0.7]])
K = np.array([[0.4, 0.1, 0.0], [0.0, -0.3, 0.2]])
S = np.array([[1.0, 0.5, 0.1], [0.5, 2.0, 0.0], [0.1, 0.0, 0.5]])


def true_model(window: int = 8) -> StateSpace:
    return StateSpace(
        center=np.array([5.0, -300.0, 0.0]),
        scale=np.array([1.0, 100.0, 0.01]),
        used=np.ones(3, dtype=bool),
        transition=A,
        loadings=C,
        gain=K,
        noise=S,
        window=window,
    )


def simulated(rows: int, seed: int, missing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the true model in data units, and its innovations."""
    generator, model = np.random.default_rng(seed), true_model()
    errors = generator.standard_normal((rows + 200, 3)) @ np.linalg.cholesky(S).T
    state, y = np.zeros(2), np.empty_like(errors)
    for t, e in enumerate(errors):
        y[t] = C @ state + e
        state = A @ state + K @ e
    values = y[200:] * model.scale + model.center
    values[generator.random(values.shape) < missing] = np.nan
    return values, errors[200:] * model.scale


def all_told(model: StateSpace, values: np.ndarray, first: int = 0) -> Told:
    """Return what is said of all rows, nothing being known before them."""
    before = np.full((model.reach, values.shape[1]), np.nan)
    return model.told(np.concatenate([before, values]), first)


def distances(model: StateSpace, told: Told) -> tuple[np.ndarray, np.ndarray]:
    """Return d' S^-1 d of the observed cells of each row, and their number."""
    z = told.deviations / model.scale
    seen = ~np.isnan(z)
    found = np.zeros(len(z))
    for n, (row, known) in enumerate(zip(z, seen, strict=True)):
        found[n] = row[known] @ np.linalg.solve(model.noise[np.ix_(known, known)], row[known])
    return found, seen.sum(axis=1)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_on_data_of_the_model_the_score_is_chi_square_with_a_degree_for_each_observed_cell(missing: float) -> None:
    """Spec 2.6: its mean is V."""
    model = true_model()
    values, _ = simulated(6_000, seed=1, missing=missing)
    values[::50] = np.nan
    score, degrees = distances(model, all_told(model, values))
    score, degrees = score[degrees > 0], degrees[degrees > 0]
    assert (degrees == 3).all() == (missing == 0.0)
    assert abs((score - degrees).sum()) < 4.0 * np.sqrt(2.0 * degrees.sum())
    p = chi2.cdf(score, degrees)
    for level in (0.1, 0.5, 0.9, 0.99):
        assert abs((p < level).mean() - level) < 4.0 * np.sqrt(level * (1.0 - level) / len(p))


def other_filter(model: StateSpace, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions [n, V] and their covariances [n, V, V] by another implementation, state (x, e)."""
    k, width = model.gain.shape
    noise = np.zeros((k + width, k + width))
    noise[k:, k:] = model.noise
    start = solve_discrete_lyapunov(model.transition, model.gain @ model.noise @ model.gain.T)
    other = KalmanFilter(k_endog=width, k_states=k + width)
    other.bind(np.asfortranarray(z.T))
    other["design"] = np.hstack([model.loadings, np.eye(width)])
    other["transition"] = np.vstack([np.hstack([model.transition, model.gain]), np.zeros((width, k + width))])
    other["selection"], other["state_cov"] = np.eye(k + width), noise
    other.initialize_known(np.zeros(k + width), block_diag(start, model.noise))
    found = other.filter()
    states, covariances = found.predicted_state[:, :-1], np.moveaxis(found.predicted_state_cov, -1, 0)[:-1]
    design = np.asarray(other["design"])
    return (design @ states).T, design @ covariances @ design.T


def test_predictions_and_scores_are_those_of_another_filter_begun_where_the_block_says() -> None:
    window, first, count = 5, 103, 31
    model = true_model(window)
    values, _ = simulated(model.reach + count, seed=2)
    generator = np.random.default_rng(0)
    values[generator.random(values.shape) < 0.3] = np.nan
    values[20:24] = np.nan
    values[33:] = simulated(len(values) - 33, seed=3)[0]  # a block without gaps
    told = model.told(values, first)
    score, degrees = distances(model, told)
    assert set(degrees) == {0, 1, 2, 3}
    z = (values - model.center) / model.scale
    for n in range(count):
        begin = (first + n) // window * window - window - (first - model.reach)
        means, covariances = other_filter(model, z[begin : model.reach + n + 1])
        expected = (told.expected[n] - model.center) / model.scale
        np.testing.assert_allclose(expected, means[-1], rtol=0, atol=1e-8)
        row = z[model.reach + n]
        known = ~np.isnan(row)
        nu, spread = (row - means[-1])[known], covariances[-1][np.ix_(known, known)]
        if known.any():
            assert score[n] == pytest.approx(nu @ np.linalg.solve(spread, nu), rel=1e-8, abs=1e-8)


def test_without_gaps_deviations_become_plain_residuals() -> None:
    model = true_model(60)
    values, errors = simulated(600, seed=4)
    told = all_told(model, values, 240)
    plain = values - told.expected
    for residual in (plain, errors):
        np.testing.assert_allclose((told.deviations - residual)[300:] / model.scale, 0.0, atol=1e-6)


@pytest.mark.parametrize("missing", [0.0, 0.03, 0.2])
def test_the_fit_errs_hardly_more_than_the_truth(missing: float) -> None:
    model = fit_state_space(simulated(5_000, seed=5, missing=missing)[0])
    later, errors = simulated(4_000, seed=6)
    residual = (later - all_told(model, later).expected)[100:]
    assert (np.square(residual).mean(axis=0) / np.square(errors[100:]).mean(axis=0) < 1.02).all()
    assert len(model.transition) == 2
    true = np.linalg.eigvals(A)
    found = np.linalg.eigvals(model.transition)
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(true), atol=0.03)
    noise = model.noise * np.outer(model.scale, model.scale)
    np.testing.assert_allclose(noise, S * np.outer(true_model().scale, true_model().scale), rtol=0.1, atol=0.1)
    score, degrees = distances(model, all_told(model, simulated(3_000, seed=7, missing=0.2)[0]))
    assert score.sum() / degrees.sum() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("most", [10_000, 2_000])
def test_missing_cells_of_variates_that_move_together_are_told_by_the_others(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments of pairs alone are far off here; of many rows with missing cells only pieces are learnt from."""
    monkeypatch.setattr("tsforge.anomaly.state_space_fit._MOST_FILLED", most)
    generator = np.random.default_rng(28)
    shared = generator.standard_normal((7_000, 1)) + 0.2 * generator.standard_normal((7_000, 3))
    state, values = np.zeros(2), np.empty_like(shared)
    for t, e in enumerate(shared):
        values[t] = C @ state + e
        state = A @ state + K @ e
    gappy = values[:4_000].copy()
    gappy[generator.random(gappy.shape) < 0.2] = np.nan
    model = fit_state_space(gappy)
    residual = values[4_000:] - all_told(model, values[4_000:]).expected
    ratio = np.square(residual[100:]).mean(axis=0) / np.square(shared[4_100:]).mean(axis=0)
    assert (ratio < (1.03 if most > 4_000 else 1.1)).all()


def test_noise_has_few_states_and_the_number_asked_for_is_taken_where_rows_hold_it() -> None:
    noise = np.random.default_rng(8).standard_normal((1_500, 4))
    assert len(fit_state_space(noise).transition) == 1
    values = simulated(800, seed=9)[0]
    assert [len(fit_state_space(values, order=order).transition) for order in (1, 3, 200)] == [1, 3, 38]
    assert fit_state_space(values, window=30).window == 30


def test_rows_after_a_gap_are_judged_by_how_much_the_gap_left_open() -> None:
    generator = np.random.default_rng(10)
    noise = generator.standard_normal(9_000)
    values = np.empty_like(noise)
    level = 0.0
    for t, e in enumerate(noise):
        level = values[t] = 0.995 * level + e
    model = fit_state_space(values[:5_000, None])
    gappy = values[5_000:, None].copy()
    ends = np.arange(130, 3_900, 60)
    for end in ends:
        gappy[end - 30 : end] = np.nan
    told = all_told(model, gappy, 5_000)
    first, usual = told.deviations[ends, 0], told.deviations[ends - 40, 0]
    assert np.sqrt(np.square(first).mean()) == pytest.approx(1.0, abs=0.3)
    assert np.sqrt(np.square(usual).mean()) == pytest.approx(1.0, abs=0.3)
    held = gappy[ends, 0] - gappy[ends - 31, 0]
    forecast = gappy[ends, 0] - told.expected[ends, 0]
    for plain in (held, forecast):
        assert np.sqrt(np.square(plain).mean()) > 4.0
    nothing = all_told(model, np.full((90, 1), np.nan))
    assert np.isnan(nothing.deviations).all()
    np.testing.assert_allclose(nothing.expected, model.center[0])


def test_a_row_changes_nothing_before_it_and_neither_what_it_was_expected_to_be() -> None:
    model = fit_state_space(simulated(1_000, seed=11, missing=0.05)[0])
    values, _ = simulated(200, seed=12, missing=0.1)
    before = all_told(model, values, 77)
    for change in (np.nan, 1e4):
        changed = values.copy()
        changed[120:] = change
        after = all_told(model, changed, 77)
        np.testing.assert_array_equal(before.deviations[:120], after.deviations[:120])
        np.testing.assert_array_equal(before.expected[:121], after.expected[:121])
        assert not np.array_equal(before.expected[121:], after.expected[121:])


@pytest.mark.parametrize(("variates", "window"), [(1, None), (3, None), (3, 2), (3, 37)])
def test_cut_anywhere_rows_give_the_same_bits(variates: int, window: int | None) -> None:
    training, values = simulated(600, seed=13)[0][:, :variates], simulated(300, seed=14, missing=0.05)[0][:, :variates]
    values[150:160] = np.nan
    config = validate(ScoreConfig, {"kind": "innovation", "window": window})
    judge = fit_window_judge(config, training)
    first, reach = 11, judge.reach
    whole = judge.judge(values, values[reach:], first + reach)
    judge = WindowJudge.restored(config, judge.state())
    generator = np.random.default_rng(15)
    inner = np.sort(generator.choice(np.arange(reach + 1, len(values)), 25, replace=False))
    edges = [reach, *(row for row in inner.tolist() for row in (row, min(row + 1, len(values)))), len(values)]
    parts = [
        judge.judge(values[low - reach : high].copy(), values[low:high], first + low)
        for low, high in pairwise(edges)
        if high > low
    ]
    for place in range(2):
        np.testing.assert_array_equal(np.concatenate([part[place] for part in parts]), whole[place])
    assert np.isfinite(whole.expected).all()
    assert np.isnan(whole.deviations).any()


def test_what_steps_are_kept_at_hand_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = simulated(400, seed=16, missing=0.3)[0]
    expected = all_told(true_model(), values)
    for name, size in (("_KEPT", 0), ("_BLOCK", 1)):
        monkeypatch.setattr(f"tsforge.anomaly.state_space.{name}", size)
        found = all_told(true_model(), values)
        np.testing.assert_array_equal(found.deviations, expected.deviations)
        np.testing.assert_array_equal(found.expected, expected.expected)


def test_constant_unseen_and_seldom_seen_variates_leave_the_others_alone() -> None:
    training, later = simulated(900, seed=17)[0], simulated(200, seed=18)[0]
    plain = fit_state_space(training)
    odd = np.full((900, 3), np.nan)
    odd[:, 0], odd[:40, 2] = 0.1, np.arange(40.0)
    model = fit_state_space(np.concatenate([odd, training], axis=1), window=plain.window)
    assert model.used.tolist() == [False, False, False, True, True, True]
    beside = np.tile([0.1, 7.0, 7.0], (200, 1))
    beside[50, 0] = 0.6
    told, alone = all_told(model, np.concatenate([beside, later], axis=1)), all_told(plain, later)
    np.testing.assert_array_equal(told.deviations[:, 3:], alone.deviations)
    np.testing.assert_array_equal(told.expected[:, 0], np.full(200, 0.1))
    assert np.flatnonzero(told.deviations[:, 0]).tolist() == [50]
    assert np.isnan(told.expected[:, 1:3]).all()
    assert np.isnan(told.deviations[:, 1:3]).all()
    still = fit_state_space(np.full((80, 2), 3.0))
    assert (still.window, still.transition.shape) == (SHORTEST_WINDOW, (0, 0))
    assert all_told(still, np.array([[3.0, 4.0], [np.nan, 3.0]])).deviations.tolist()[0] == [0.0, 1.0]


def test_variates_that_depend_on_each_other_and_single_ones_give_finite_scores() -> None:
    training, later = simulated(900, seed=19)[0], simulated(300, seed=20, missing=0.05)[0]
    for width in (1, 3):
        copies = [np.concatenate([part[:, :width], part[:, :1] * 2.0 + 1e-9], axis=1) for part in (training, later)]
        for columns in (slice(None), slice(0, width)):
            told = all_told(fit_state_space(copies[0][:, columns]), copies[1][:, columns])
            assert np.isfinite(told.expected).all()
            np.testing.assert_array_equal(np.isnan(told.deviations), np.isnan(copies[1][:, columns]))
            spread = np.nanstd(told.deviations, axis=0) / np.nanstd(copies[1][:, columns], axis=0)
            assert (spread < 1.0).all()


def test_small_steps_of_large_swings_are_learnt() -> None:
    """Innovations of a hundredth of a percent of the variance: nothing added to the moments may drown them."""
    generator = np.random.default_rng(27)
    noise = generator.standard_normal((7_000, 2))
    values = noise.copy()
    for t in range(2, 7_000):
        values[t] += 1.98 * np.cos(0.1) * values[t - 1] - 0.9801 * values[t - 2]
    model = fit_state_space(values[1_000:4_000])
    told = all_told(model, values[4_000:])
    assert values.var(axis=0).min() > 1_000.0
    error, true = (np.square(each[-2_900:]).mean(axis=0) for each in (told.deviations, noise))
    assert (error / true < 1.03).all()


@pytest.mark.parametrize(("factor", "offset"), [(1e6, 0.0), (1e-6, 0.0), (1e-3, 40.0)])
def test_units_change_no_deviation(factor: float, offset: float) -> None:
    training, later = simulated(900, seed=21, missing=0.01)[0], simulated(200, seed=22, missing=0.1)[0]
    model, moved = fit_state_space(training), fit_state_space(training * factor + offset)
    told, other = all_told(model, later), all_told(moved, later * factor + offset)
    np.testing.assert_allclose(other.deviations / factor, told.deviations, atol=1e-6 * np.nanstd(later, axis=0).max())
    np.testing.assert_allclose((other.deviations / factor)[:, 2], told.deviations[:, 2], atol=1e-5)


def test_series_that_never_come_back_are_followed() -> None:
    generator = np.random.default_rng(23)
    walk = np.cumsum(generator.standard_normal((3_000, 2)), axis=0)
    trend = np.arange(3_000.0)[:, None] * [0.05, -2.0] + generator.standard_normal((3_000, 2))
    for values in (walk, trend):
        model = fit_state_space(values[:2_000])
        for matrix in (model.transition, model.transition - model.gain @ model.loadings):
            assert np.abs(np.linalg.eigvals(matrix)).max() < LARGEST_RADIUS
        told = all_told(model, values)
        assert np.isfinite(told.deviations).all()
        assert np.std(told.deviations[100:2_000], axis=0).max() < 1.1
    doubled = np.exp(np.arange(400.0) / 40.0)[:, None] + 0.1 * generator.standard_normal((400, 1))
    assert np.isfinite(all_told(fit_state_space(doubled[:300]), doubled).deviations).all()


def test_unstable_matrices_are_scaled_down_and_the_rest_is_left() -> None:
    loadings = np.eye(2)
    a, c, k = stable(np.diag([1.2, 0.4]), loadings, np.diag([0.5, 3.0]))
    np.testing.assert_allclose(a, np.diag([1.0, 1.0 / 3.0]), atol=1e-5)
    assert c is loadings
    for matrix in (a, a - k @ c):
        assert np.abs(np.linalg.eigvals(matrix)).max() < LARGEST_RADIUS
    assert k[1, 1] / k[0, 0] == pytest.approx(6.0)
    assert 0.3 < k[0, 0] / 0.5 < 0.5
    same = stable(A, C, K)
    for found, given in zip(same, (A, C, K), strict=True):
        np.testing.assert_array_equal(found, given)
    noise = K @ S @ K.T
    np.testing.assert_allclose(stationary_covariance(A, noise), solve_discrete_lyapunov(A, noise), rtol=1e-10)
    slow = stationary_covariance(np.array([[LARGEST_RADIUS]]), np.array([[1.0]]))
    assert slow[0, 0] == pytest.approx(1.0 / (1.0 - LARGEST_RADIUS**2), rel=1e-6)


@pytest.mark.parametrize("kept", [0.2, 0.8, 0.95, 0.999])
def test_a_filter_that_forgets_slowly_looks_further_back(kept: float) -> None:
    """Until a prediction's variance is within a percent of that with all rows before; one state, one variate."""
    speed = 0.9995
    gain, noise, one = np.array([[speed - kept]]), np.array([[2.0]]), np.ones((1, 1))
    model = StateSpace(
        center=np.zeros(1),
        scale=np.ones(1),
        used=np.ones(1, dtype=bool),
        transition=speed * one,
        loadings=one,
        gain=gain,
        noise=noise,
        window=2,
    )
    p, rows = float(gain[0, 0] ** 2 * 2.0 / (1.0 - speed**2)), 0
    while p > 0.01 * 2.0:
        best = (speed * p + float(gain[0, 0]) * 2.0) / (p + 2.0)
        p = speed**2 * p + float(gain[0, 0] ** 2) * 2.0 - best**2 * (p + 2.0)
        rows += 1
    assert model.settled() == min(max(rows, SHORTEST_WINDOW), LONGEST_WINDOW)


def test_the_window_is_chosen_by_the_fit() -> None:
    generator = np.random.default_rng(24)
    level, steps = np.zeros(6_000), generator.standard_normal(6_000)
    for t in range(1, 6_000):
        level[t] = 0.995 * level[t - 1] + steps[t]
    slow, fast = level + 30.0 * generator.standard_normal(6_000), level
    windows = [fit_state_space(each[:, None]).window for each in (fast, slow)]
    assert windows[0] == SHORTEST_WINDOW < windows[1] <= LONGEST_WINDOW


def test_what_was_fitted_is_stored_as_arrays_and_plain_facts() -> None:
    config = validate(ScoreConfig, {"kind": "innovation"})
    judge = fit_window_judge(config, simulated(600, seed=25)[0])
    state = judge.state()
    assert state is not None
    assert set(state) == {each.name for each in fields(StateSpace)}
    assert {type(value) for value in state.values()} == {np.ndarray, int}


def test_what_is_refused() -> None:
    values = simulated(80, seed=26)[0]
    with pytest.raises(
        Uncomparable, match=r"40 training rows \(40 of them observed\) hold at most 39 pairs .*needs 50"
    ):
        fit_state_space(values[:40])
    with pytest.raises(Uncomparable, match=r"0 training rows \(0 of them"):
        fit_state_space(values[:0])
    with pytest.raises(Uncomparable, match="needs 150; give the detector all rows"):
        fit_state_space(np.tile(values, 10) + np.random.default_rng(0).standard_normal((80, 30)))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kind": "innovation", "order": 0}, "order"),
        ({"kind": "innovation", "joint": "consensus"}, "kind 'innovation' makes none; take joint: product"),
        ({"kind": "innovation", "steps": [1]}, "kind 'innovation' makes none"),
        ({"kind": "innovation", "stride": 2}, "stride has no effect"),
        ({"kind": "states", "order": 2}, "order has no effect with kind 'states'"),
    )
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            validate(ScoreConfig, settings)
    config = validate(ScoreConfig, {"kind": "innovation", "joint": "balanced", "ewma": 0.1})
    assert (config.is_windowed, config.is_one_sided, config.has_data_units, config.latency) == (True, False, True, 0)
