"""Baseline scorers: what each sees, against naive arithmetic, and that none learns from the rows it scores."""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.anomaly.baselines import BASELINES, SeasonalNaive, build_baseline
from tsforge.core.errors import ConfigError, DataError


def rows(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * np.arange(count) / 24)[:, None]
    common = generator.standard_normal((count, 1))
    return np.hstack([wave + 0.2 * common, wave - common, 2 * common, generator.standard_normal((count, 1))])


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_scores_rows_by_training_statistics_only(name: str) -> None:
    train, test = rows(600), rows(240, seed=1)
    scorer = build_baseline(name, season_length=24).fit(train)
    scores = scorer.score(test)
    assert scores.shape == (240,)
    assert np.isfinite(scores).all()
    later = test.copy()
    later[120:] += 50.0
    np.testing.assert_array_equal(scorer.score(later)[:120], scores[:120])
    if name != "random":
        assert scorer.score(later)[120:].mean() > 2 * scores[120:].mean()


def test_mean_abs_is_the_mean_of_clipped_z_scores() -> None:
    train, test = rows(300), rows(20, seed=2)
    z = np.clip((test - train.mean(axis=0)) / train.std(axis=0), -20, 20)
    np.testing.assert_allclose(build_baseline("mean_abs").fit(train).score(test), np.abs(z).mean(axis=1))
    np.testing.assert_allclose(build_baseline("max_abs").fit(train).score(test), np.abs(z).max(axis=1))


def test_pca_residual_sees_a_broken_correlation_that_z_scores_do_not() -> None:
    train, test = rows(2000), rows(200, seed=3)
    test[100, 2] *= -1.0  # plausible alone, impossible beside the variates it moves with
    test[100, 2] += np.sign(test[100, 2]) * 2.0
    rank = (-build_baseline("pca_residual").fit(train).score(test)).argsort()
    assert rank[0] == 100
    assert (-build_baseline("mean_abs").fit(train).score(test)).argsort()[0] != 100


def test_var1_weights_solve_the_ridge_equations() -> None:
    train, test = rows(400), rows(50, seed=4)
    scorer = build_baseline("var1_mean_abs").fit(train)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    z = np.clip((train - mean) / deviation, -20, 20)
    weights = np.linalg.inv(z[:-1].T @ z[:-1] + 0.01 * 399 * np.eye(4)) @ z[:-1].T @ z[1:]
    t = np.clip((test - mean) / deviation, -20, 20)
    expected = [np.abs(t[i] - t[max(i - 1, 0)] @ weights).mean() for i in range(50)]
    np.testing.assert_allclose(scorer.score(test), expected, rtol=1e-9)


def test_seasonal_naive_looks_back_into_training_and_not_further_than_a_season() -> None:
    values = np.tile(np.arange(6.0)[:, None], (20, 1))
    scorer = SeasonalNaive(6).fit(values[:60])
    assert scorer.score(values[60:]).max() == 0.0
    broken = values[60:].copy()
    broken[10] += 5
    assert set(np.flatnonzero(scorer.score(broken))) == {10, 16}


def test_random_is_seeded() -> None:
    a, b = (build_baseline("random", seed=seed).fit([[0.0]]).score(np.zeros((5, 1))) for seed in (1, 2))
    assert (a == build_baseline("random", seed=1).score(np.zeros((5, 1)))).all()
    assert not (a == b).all()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown baseline 'pca_resid'; did you mean 'pca_residual'"):
        build_baseline("pca_resid")
    with pytest.raises(ConfigError, match="needs a season_length"):
        build_baseline("seasonal_naive")
    with pytest.raises(DataError, match="no two seasons of 24"):
        build_baseline("seasonal_naive", season_length=24).fit(rows(40))
    with pytest.raises(DataError, match="without missing or infinite values"):
        build_baseline("mean_abs").fit([[np.nan]])
