"""Normalised residuals and joint scores: robust scale, floors, constant channels, steps, missing cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from tsforge.anomaly.calibration import fit_calibration
from tsforge.anomaly.config import ScoreConfig, ScoreKind
from tsforge.anomaly.covariance import DenseCovariance, fit_covariance, squared_distance
from tsforge.anomaly.residuals import TrainingRange, fit_residual_scale, reduce_horizon, tail_to_normal
from tsforge.anomaly.scorers import balanced, fisher, mahalanobis, max_abs, mean_abs, product, runs, top_k, winsorise
from tsforge.anomaly.scoring import fit_score_model
from tsforge.core.errors import DataError

NAN = math.nan


def test_scale_is_robust_and_per_step() -> None:
    generator = np.random.default_rng(0)
    residuals = generator.normal(size=(4000, 2, 1)) * np.array([1.0, 5.0])[:, None] + 2.0
    residuals[:40] = 1e6  # 1 % nonsense
    training = TrainingRange.of(np.array([[0.0], [10.0]]))
    scale = fit_residual_scale(residuals, training, smallest=0.0)
    np.testing.assert_allclose(scale.scale[:, 0], [1.0, 5.0], rtol=0.06)
    np.testing.assert_allclose(scale.location[:, 0], [2.0, 2.0], atol=0.2)
    z = scale.normalise(residuals[100:], np.zeros((3900, 1)))
    assert z[:, 0].std() == pytest.approx(z[:, 1].std(), rel=0.1)


def test_a_nearly_constant_channel_meets_the_floor() -> None:
    training = TrainingRange.of(np.array([[0.0], [10.0]]))
    scale = fit_residual_scale(np.zeros((50, 1, 1)), training, smallest=0.01 * 10.0)
    assert scale.normalise(np.array([[[0.5]]]), np.zeros((1, 1)))[0, 0, 0] == pytest.approx(5.0)


def test_a_constant_channel_is_judged_by_its_constant() -> None:
    training = TrainingRange.of(np.array([[7.0, 0.0], [7.0, 1.0]]))
    assert training.constant.tolist() == [True, False]
    scale = fit_residual_scale(
        np.random.default_rng(0).normal(size=(50, 1, 2)), training, smallest=0.1, constant_score=10.0
    )
    values = np.array([[7.0, 0.0], [7.0 + 1e-7, 0.0], [9.0, 0.0], [5.0, 0.0], [NAN, 0.0]])
    z = scale.normalise(np.full((5, 1, 2), 0.3), values)[:, 0, 0]
    np.testing.assert_allclose(z, [0, 0, 10, -10, NAN])


def test_too_few_residuals_are_never_scored() -> None:
    residuals = np.full((50, 1, 2), NAN)
    residuals[:19, 0, 0] = 1.0
    residuals[:, 0, 1] = np.arange(50)
    training = TrainingRange.of(np.array([[0.0, 0.0], [1.0, 1.0]]))
    scale = fit_residual_scale(residuals, training, smallest=0.1)
    assert scale.scored.tolist() == [False, True]
    assert np.isnan(scale.normalise(residuals, np.zeros((50, 2)))[:, 0, 0]).all()
    with pytest.raises(DataError, match="no variate with 20 residuals"):
        fit_residual_scale(residuals[:, :, :1], TrainingRange.of(np.array([[0.0], [1.0]])), smallest=0.1)


def test_training_range_of_a_never_observed_variate() -> None:
    found = TrainingRange.of(np.array([[NAN, 1.0], [NAN, 2.0]]))
    assert np.isnan(found.low[0])
    assert np.isnan(found.deviation[0])
    assert found.deviation[1] == 0.5
    assert found.constant.tolist() == [False, False]


def test_horizon_reductions() -> None:
    z = np.array([[[1.0], [-5.0], [2.0]], [[NAN], [3.0], [NAN]], [[NAN], [NAN], [NAN]]])
    assert reduce_horizon(z, "first")[:2, 0].tolist() == [1.0, 3.0]
    assert reduce_horizon(z, "last")[:2, 0].tolist() == [2.0, 3.0]
    assert reduce_horizon(z, "median")[:2, 0].tolist() == [1.0, 3.0]
    assert reduce_horizon(z, "max")[:2, 0].tolist() == [-5.0, 3.0]
    for how in ("first", "last", "median", "max"):
        assert np.isnan(reduce_horizon(z, how)[2, 0])  # type: ignore[arg-type]


def test_tail_scores_become_normal_deviates_without_saturating() -> None:
    z = np.array([-30.0, -3.0, -0.5, 0.0, 1.0, 8.0, 34.0])
    tail = -np.sign(z) * (np.log(2) + norm.logsf(np.abs(z)))
    np.testing.assert_allclose(tail_to_normal(tail), z, atol=1e-6)
    far = tail_to_normal([599.0, 600.0, 601.0, 1e4, 1e8, NAN])
    assert (np.diff(far[:5]) > 0).all()
    assert far[3] == pytest.approx(math.sqrt(2e4), rel=0.01)
    assert np.isnan(far[5])


def test_joint_scores_on_a_small_table() -> None:
    z = np.array([[1.0, -4.0, 2.0], [NAN, 3.0, NAN], [NAN, NAN, NAN]])
    np.testing.assert_allclose(mean_abs(z), [7 / 3, 3.0, NAN])
    np.testing.assert_allclose(max_abs(z), [4.0, 3.0, NAN])
    np.testing.assert_allclose(top_k(z, 2), [3.0, 3.0, NAN])
    np.testing.assert_allclose(fisher(np.array([[0.1, 0.5], [0.1, NAN]])), [-2 * np.log(0.05), -4 * np.log(0.1)])
    np.testing.assert_allclose(winsorise(np.array([[1e9, -1e9, NAN]]), 50), [[50, -50, NAN]])
    with pytest.raises(DataError, match="from 1 to the number of variates, 3"):
        top_k(z, 4)


def test_constant_variates_add_their_square_to_the_distance() -> None:
    x = np.random.default_rng(0).standard_normal((100, 2))
    covariance = fit_covariance(x)
    z = np.column_stack([x[:5], np.array([0.0, 10.0, NAN, 0.0, -10.0])])
    constant = np.array([False, False, True])
    expected = squared_distance(covariance, x[:5]) + np.array([0.0, 100.0, 0.0, 0.0, 100.0])
    np.testing.assert_allclose(mahalanobis(z, covariance, constant), expected)
    np.testing.assert_allclose(mahalanobis(z[:, 2:], None, np.array([True]))[:2], [0.0, 100.0])
    with pytest.raises(DataError, match="2 of 3 variates need a covariance"):
        mahalanobis(z, None, constant)


def test_product_and_balanced_by_hand() -> None:
    """Row by row with an explicit inverse: missing and constant variates, cuts in either unit."""
    generator = np.random.default_rng(4)
    covariance = DenseCovariance(np.array([[1.0, 0.8], [0.8, 1.0]]))
    constant, share = np.array([False, True, False]), np.array([0.1, 1.0, 4.0])
    z = generator.normal(0, 3, size=(8, 3))
    z[1, 0], z[2, 1], z[3] = NAN, NAN, NAN
    z[4], z[5] = [400.0, 0.0, 1.0], [1.0, 10.0, 15.0]
    limit, inverse = 50.0, np.linalg.inv(covariance.matrix)
    for row, told, other in zip(
        z, balanced(z, share, covariance, constant, limit=limit), product(z, covariance, constant), strict=True
    ):
        seen = [v for v in range(3) if not math.isnan(row[v])]
        if not seen:
            assert math.isnan(told)
            assert math.isnan(other)
            continue
        sizes = [math.sqrt(min(abs(row[v]), limit) * min(abs(row[v]) * share[v], limit)) for v in seen]
        cut = np.clip(row, -limit, limit)
        distances = []
        for values in (cut, row):
            square = float(mahalanobis(values[None], covariance, constant)[0])
            if len(seen) == 3:
                pair = values[[0, 2]]
                assert square == pytest.approx(float(pair @ inverse @ pair) + values[1] ** 2)
            distances.append(math.sqrt(square))
        assert told == pytest.approx(sum(sizes) / len(sizes) * math.sqrt(distances[0]), rel=1e-9)
        assert other == pytest.approx(sum(abs(row[v]) for v in seen) / len(seen) * distances[1], rel=1e-9)


@pytest.mark.parametrize("ewma", [None, 0.2])
def test_balanced_measures_residuals_between_their_scale_and_the_spread_of_training(ewma: float | None) -> None:
    generator = np.random.default_rng(8)
    deviations = generator.normal(size=(2000, 3, 3)) * [0.5, 2.0, 1e-9] * np.array([1.0, 2.0, 3.0])[:, None]
    values = generator.normal(size=(2000, 3)) * [5.0, 2.0, 7.0]
    values[values[:, 0] > 20.0] = NAN
    config = ScoreConfig(joint="balanced", ewma=ewma)
    model = fit_score_model(deviations, values, TrainingRange.of(values), config)
    unit = np.array([1.0, 4.0, 0.01 * np.ptp(values[:, 2])])  # scales of the middle step, or their floor
    if ewma is not None:
        assert model.ewma is not None
        unit = unit * model.ewma.spread
    assert model.share == pytest.approx(unit / values.std(axis=0), rel=0.05)
    found = model.score(deviations[:50], values[:50])
    assert model.share is not None
    told = balanced(found.z, model.share, model.covariance, model.constant)
    np.testing.assert_array_equal(found.joint, told)


def test_balanced_keeps_the_floor_of_a_nearly_constant_variate_and_needs_units_of_the_data() -> None:
    noise = np.random.default_rng(9).normal(size=400)
    deviations = np.column_stack([np.zeros(400), noise, np.zeros(400)])[:, None]
    training = TrainingRange(
        low=np.array([0.0, -3.0, 2.0]), high=np.array([5.0, 3.0, 2.0]), deviation=np.array([1e-4, 1.0, 0.0])
    )
    model = fit_score_model(deviations, deviations[:, 0], training, ScoreConfig(joint="balanced"))
    assert model.share is not None
    assert model.share[0] == 1.0  # a hundredth of its range over the same
    assert model.share[1] == pytest.approx(1.0, abs=0.15)
    assert model.share[2] == 1.0  # constant: judged by itself
    left = model.score(np.zeros((2, 1, 3)), np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 3.0]])).joint
    assert left[0] < 0.05
    assert left[1] == pytest.approx(10.0 / 3 * math.sqrt(10.0), rel=0.01)
    without: tuple[ScoreKind, ...] = ("tail", "nll", "interval", "latent")
    for kind in without:
        with pytest.raises(ValueError, match=f"kind '{kind}' has none in units of the data; take joint: product"):
            ScoreConfig(kind=kind, joint="balanced")


def test_runs() -> None:
    assert runs(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert runs(np.zeros(3, dtype=bool)) == []


@pytest.mark.parametrize("joint", ["mahalanobis", "mean_abs", "product", "balanced", "max_abs", "top_k", "fisher"])
def test_every_joint_score_flags_a_fault_and_never_looks_ahead(joint: str) -> None:
    generator = np.random.default_rng(1)
    deviations, values = generator.normal(size=(600, 2, 4)), generator.normal(size=(600, 4))
    training = TrainingRange.of(values)
    config = ScoreConfig(joint=joint, top_k=2 if joint == "top_k" else None, smoothing=0.5)  # type: ignore[arg-type]
    model = fit_score_model(deviations[:300], values[:300], training, config)
    plain = model.score(deviations[300:], values[300:])
    broken = deviations[300:].copy()
    broken[200, :, 1] += 30.0
    scores = model.score(broken, values[300:])
    assert int(np.argmax(scores.joint)) == 200
    np.testing.assert_array_equal(scores.joint[:200], plain.joint[:200])
    assert scores.z[200, 1] > 20
    p = fit_calibration(plain.joint[:150]).p_values(scores.joint[200:201])
    assert p[0] <= 1 / 150


def test_one_broken_sensor_does_not_drown_the_rest_but_keeps_its_size_for_attribution() -> None:
    generator = np.random.default_rng(2)
    deviations, values = generator.normal(size=(200, 1, 3)), np.zeros((200, 3))
    values[0] = 1.0
    model = fit_score_model(deviations, values, TrainingRange.of(values), ScoreConfig(joint="mean_abs"))
    found = model.score(np.array([[[1e9, 0.0, 0.0]]]), np.zeros((1, 3)))
    assert found.joint[0] < 20
    assert found.z[0, 0] > 1e8
