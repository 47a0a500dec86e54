"""The copula over a horizon from PIT values: known correlations come back, always positive definite, ranks, storage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from tsforge.core.errors import ArtifactError, DataError
from tsforge.forecasting.dependence import (
    Dependence,
    cholesky,
    effective_windows,
    fit_dependence,
    shrunk_correlation,
    window_blocks,
)

STEPS = 8


def decaying(phi: float, size: int = STEPS) -> np.ndarray:
    """phi to the power of the lag."""
    return phi ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))


def pit_of(correlation: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """PIT values [count, steps, 1] of a Gaussian copula."""
    scores = np.random.default_rng(seed).normal(size=(count, len(correlation))) @ np.linalg.cholesky(correlation).T
    return ndtr(scores)[..., None]


def fit(pit: np.ndarray, kind: str = "gaussian") -> Dependence:
    return fit_dependence(pit, np.arange(len(pit)) * 10 // len(pit), float(len(pit)), kind)  # type: ignore[arg-type]


def test_a_known_correlation_comes_back() -> None:
    truth = decaying(0.8)
    found = fit(pit_of(truth, 4000))
    assert np.abs(found.correlation() - truth).max() < 0.04
    assert found.shrinkage[0] > 0.5  # constant along diagonals: the target is right
    growing = np.sqrt(
        np.minimum.outer(np.arange(1, STEPS + 1), np.arange(1, STEPS + 1)) ** 2
        / np.outer(*[np.arange(1, STEPS + 1)] * 2)
    )
    random_walk = fit(pit_of(growing, 4000))
    assert np.abs(random_walk.correlation() - growing).max() < 0.04
    assert random_walk.shrinkage[0] < 0.1  # not constant along diagonals: the sample is kept


def test_shrinkage_helps_when_windows_are_few() -> None:
    truth = decaying(0.8)
    errors = np.zeros(2)
    for seed in range(40):
        scores = ndtri(pit_of(truth, 20, seed)[..., 0])
        sample = scores.T @ scores
        sample /= np.sqrt(np.outer(np.diag(sample), np.diag(sample)))
        shrunk, _ = shrunk_correlation(scores, np.ones(scores.shape, dtype=bool), np.arange(20) // 2)
        errors += [np.square(sample - truth).sum(), np.square(shrunk - truth).sum()]
    assert errors[1] < 0.85 * errors[0]


def test_shrunk_correlation_equals_a_loop() -> None:
    rng = np.random.default_rng(6)
    mask = rng.random((400, 5)) > 0.2
    scores = np.where(mask, rng.normal(size=(400, 5)).cumsum(axis=1), 0.0)
    blocks = np.arange(400) // 80
    found, weight = shrunk_correlation(scores, mask, blocks)
    size, unit = 5, [np.sqrt(scores[mask[:, i], i] @ scores[mask[:, i], i] / mask[:, i].sum()) for i in range(5)]

    def matrix(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sample, target = np.eye(size), np.eye(size)
        for i in range(size):
            for j in range(size):
                both = rows & mask[:, i] & mask[:, j]
                if i != j:
                    sample[i, j] = np.mean(scores[both, i] * scores[both, j]) / unit[i] / unit[j]
        for i in range(size):
            for j in range(size):
                if i != j:
                    target[i, j] = np.mean([sample[a, a + abs(i - j)] for a in range(size - abs(i - j))])
        return sample, target

    sample, target = matrix(np.ones(400, dtype=bool))
    noise = 0.0
    for block in range(5):
        own, smooth = matrix(blocks == block)
        for i in range(size):
            for j in range(size):
                both = mask[:, i] & mask[:, j]
                share = (both & (blocks == block)).sum() / both.sum()
                noise += (share * (own[i, j] - smooth[i, j] - sample[i, j] + target[i, j])) ** 2
    expected = min(1.0, noise * 5 / 4 / np.square(sample - target).sum())
    assert 0.0 < weight < 1.0
    assert weight == pytest.approx(expected)
    np.testing.assert_allclose(found, (1 - expected) * sample + expected * target, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_factors_exist_for_any_matrix(seed: int) -> None:
    """Correlations from pairs of different windows need not be positive definite."""
    rng = np.random.default_rng(seed)
    wild = np.tril(rng.uniform(-1, 1, (7, 7)), -1)
    wild = wild + wild.T + np.eye(7)
    factor = cholesky(wild)
    rebuilt = factor @ factor.T
    assert np.linalg.eigvalsh(rebuilt).min() > 0
    np.testing.assert_allclose(np.diag(rebuilt), 1.0)
    np.testing.assert_allclose(cholesky(decaying(0.5)) @ cholesky(decaying(0.5)).T, decaying(0.5), atol=2e-3)


def test_a_bias_that_all_steps_share_counts_as_dependence() -> None:
    """Independent steps that are all biased alike: the second moment of their total is that of dependent ones."""
    rng = np.random.default_rng(1)
    found = fit(ndtr(rng.normal(size=(4000, STEPS, 1)) + 0.5))
    off = found.correlation()[~np.eye(STEPS, dtype=bool)]
    assert off.mean() == pytest.approx(0.25 / 1.25, abs=0.03)


def test_missing_cells_are_left_out_pair_by_pair() -> None:
    truth = decaying(0.7)
    pit = pit_of(truth, 6000)
    rng = np.random.default_rng(8)
    pit[rng.random(pit.shape) < 0.3] = np.nan
    pit[:, 3, 0] = np.where(np.arange(6000) % 2, pit[:, 3, 0], np.nan)
    assert np.abs(fit(pit).correlation() - truth).max() < 0.06


def test_a_step_that_was_never_observed_gets_the_correlation_of_its_lags() -> None:
    truth = decaying(0.7)
    pit = pit_of(truth, 3000)
    pit[:, 3] = np.nan
    assert np.abs(fit(pit).correlation() - truth).max() < 0.06


def test_variates_hang_together_too() -> None:
    """Innovations of two variates correlate by 0.6, each variate has its own correlation over steps."""
    rng = np.random.default_rng(2)
    together = np.linalg.cholesky(np.array([[1.0, 0.6], [0.6, 1.0]]))
    innovations = rng.normal(size=(3000, STEPS, 2)) @ together.T
    factors = [np.linalg.cholesky(decaying(phi)) for phi in (0.9, 0.3)]
    scores = np.stack([innovations[..., v] @ factors[v].T for v in range(2)], axis=-1)
    found = fit(ndtr(scores))
    drawn = ndtri(found.uniforms(6000, STEPS, np.random.default_rng(0)).clip(1e-9, 1 - 1e-9))
    flat = np.corrcoef(drawn.transpose(0, 2, 1).reshape(6000, -1), rowvar=False)
    expected = np.block([[factors[v] @ factors[w].T * (1.0 if v == w else 0.6) for w in range(2)] for v in range(2)])
    assert np.abs(flat - expected).max() < 0.07


def test_draws_are_uniform_and_fewer_steps_are_the_first_ones() -> None:
    for kind in ("gaussian", "empirical"):
        found = fit(pit_of(decaying(0.8), 500), kind)
        drawn = found.uniforms(5000, 3, np.random.default_rng(0))
        assert drawn.shape == (5000, 3, 1)
        assert ((drawn > 0) & (drawn < 1)).all()
        for step in range(3):
            gap = np.abs(np.sort(drawn[:, step, 0]) - (np.arange(5000) + 0.5) / 5000).max()
            assert gap < 1.63 / np.sqrt(5000)
        scores = ndtri(drawn[..., 0])
        assert np.corrcoef(scores[:, 0], scores[:, 2])[0, 1] == pytest.approx(0.64, abs=0.08)


def test_templates_keep_a_dependence_that_no_correlation_can_say() -> None:
    """Second step = plus or minus the first: uncorrelated, far from independent."""
    rng = np.random.default_rng(3)
    first = rng.normal(size=400)
    pit = ndtr(np.stack([first, first * rng.choice([-1.0, 1.0], 400)], axis=1))[..., None]
    sizes = {}
    for kind in ("gaussian", "empirical"):
        drawn = np.abs(ndtri(fit(pit, kind).uniforms(400, 2, rng)[..., 0]))
        sizes[kind] = np.corrcoef(drawn.T)[0, 1]
    assert sizes["empirical"] > 0.9
    assert abs(sizes["gaussian"]) < 0.2


def test_no_template_is_used_twice_before_all_were_used_once() -> None:
    found = fit(pit_of(decaying(0.8), 30), "empirical")
    drawn = found.uniforms(30, STEPS, np.random.default_rng(0))
    for step in range(STEPS):
        assert sorted((drawn[:, step, 0] * 30).astype(int)) == list(range(30))


@pytest.mark.parametrize("kind", ["gaussian", "empirical"])
def test_stored_tensors_give_the_same_draws(kind: str) -> None:
    found = fit(pit_of(decaying(0.6), 100), kind)
    again = Dependence.from_tensors(found.tensors(), horizon=STEPS, num_variates=1)
    assert (again.kind, again.windows, again.effective) == (kind, 100, 100.0)
    first, second = (item.uniforms(50, STEPS, np.random.default_rng(4)) for item in (found, again))
    np.testing.assert_allclose(first, second, atol=1e-6)
    with pytest.raises(ArtifactError, match="does not fit 9 steps"):
        Dependence.from_tensors(found.tensors(), horizon=STEPS + 1, num_variates=1)


def test_too_little_to_go_on_is_refused() -> None:
    pit = pit_of(decaying(0.5), 50)
    with pytest.raises(DataError, match=r"span 2\.5 horizons"):
        fit_dependence(pit, np.zeros(50, dtype=np.int64), 2.5, "gaussian")
    pit[10:, 0] = np.nan
    with pytest.raises(DataError, match="10 of 50 held-out windows are complete"):
        fit(pit, "empirical")


def test_windows_that_overlap_count_by_the_horizons_they_span() -> None:
    series = np.array([0] * 49 + [1])
    cutoff = np.concatenate([np.arange(49), [200]])
    assert effective_windows(series, cutoff, 24) == pytest.approx(4.0)
    blocks = window_blocks(np.zeros(97, dtype=np.int64), np.arange(97), 24)
    assert np.bincount(blocks).tolist() == [25, 24, 24, 24]
    many = window_blocks(np.arange(100), np.zeros(100, dtype=np.int64), 24)  # one cutoff: series are the blocks
    assert len(np.unique(many)) == 12


def test_one_matrix_serves_all_variates_when_there_would_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsforge.forecasting.dependence.MAX_STORED", STEPS * STEPS)
    pit = np.concatenate([pit_of(decaying(0.8), 1000, seed) for seed in range(3)], axis=2)
    found = fit(pit)
    assert found.steps is not None
    assert found.steps.shape == (1, STEPS, STEPS)
    assert np.abs(found.correlation(2) - decaying(0.8)).max() < 0.05
    drawn = ndtri(found.uniforms(3000, STEPS, np.random.default_rng(0)).clip(1e-9, 1 - 1e-9))
    assert np.abs(np.corrcoef(drawn[..., 2], rowvar=False) - decaying(0.8)).max() < 0.08
