"""Reconstruction of rows from the rest of their window: against conditional means of a joint normal, masked, causal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.reconstruction import Overlap, WindowPca, fit_window_pca
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.scoring import fit_score_model
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import auc_pr

W = 5


def coupled(rows: int, seed: int = 0) -> np.ndarray:
    """Return three variates: two follow one oscillation, the third is slow noise; different units."""
    generator = np.random.default_rng(seed)
    t = np.arange(rows)
    wave = np.sin(2 * np.pi * t / 17) + 0.05 * generator.standard_normal(rows)
    slow = np.convolve(generator.standard_normal(rows + 9), np.ones(10) / 3.0, mode="valid")
    noise = 0.05 * generator.standard_normal((rows, 3))
    return (np.stack([wave, 0.7 * wave, slow], axis=1) + noise) * [1.0, 100.0, 0.01] + [5.0, 0.0, 1.0]


def by_hand(model: WindowPca, values: np.ndarray, window: int, place: int) -> np.ndarray:
    """Return the conditional mean of row ``place`` of one window [V] from the whole covariance of its cells."""
    width = values.shape[1]
    loadings = model.loadings.reshape(-1, model.loadings.shape[2])
    covariance = loadings @ loadings.T + model.noise * np.eye(len(loadings))
    x = ((values[window : window + W] - model.center) / model.scale).ravel()
    wanted = np.zeros(W * width, dtype=bool)
    wanted[place * width : (place + 1) * width] = True
    given = ~wanted & ~np.isnan(x)
    if given.sum() < 0.5 * (W - 1) * width:
        return np.full(width, np.nan)
    mean = covariance[np.ix_(wanted, given)] @ np.linalg.inv(covariance[np.ix_(given, given)]) @ x[given]
    return mean * model.scale + model.center


def gappy(rows: int = 60) -> np.ndarray:
    values = coupled(rows, seed=1)
    values[7, 1] = values[20:23] = values[40, :2] = values[30:39, 2] = np.nan
    values[50:56] = np.nan
    return values


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_row_is_told_as_the_conditional_mean_of_the_joint_normal_given_the_other_rows(place: int) -> None:
    model, values = fit_window_pca(coupled(800), W), gappy()
    expected = np.stack([by_hand(model, values, n, place) for n in range(len(values) - W + 1)])
    assert np.isnan(expected).any()
    np.testing.assert_allclose(model.told(values, place), expected, rtol=1e-8, atol=1e-10)


def test_windows_that_hold_a_row_are_joined_and_rows_without_all_of_them_are_left_out() -> None:
    model, values = fit_window_pca(coupled(800), W), gappy()
    joins: tuple[tuple[Overlap, Any], ...] = (("mean", np.nanmean), ("median", np.nanmedian))
    for overlap, join in joins:
        found = model.expected(values, overlap)
        assert np.isnan(found[: W - 1]).all()
        assert np.isnan(found[len(values) - W + 1 :]).all()
        for row in (W - 1, 12, 18, 45, len(values) - W):
            parts = np.stack([by_hand(model, values, row - place, place) for place in range(W)])
            np.testing.assert_allclose(found[row], join(parts, axis=0), rtol=1e-8, atol=1e-10)
    last = model.expected(values)
    np.testing.assert_array_equal(last[W - 1 :], model.told(values, W - 1))
    assert np.isnan(last[: W - 1]).all()


def test_a_constant_that_moves_spoils_no_row_beside_it_however_its_mean_rounds() -> None:
    training, later = coupled(800), coupled(60, seed=2)
    training[:, 1], later[:, 1] = 0.1, 0.1
    assert training.sum(axis=0)[1] / 800 != 0.1
    model = fit_window_pca(training, W)
    assert (model.center[1], model.scale[1]) == (0.1, 1.0)
    before = model.expected(later)
    later[30, 1] = 0.6
    np.testing.assert_allclose(model.expected(later), before, atol=1e-9)


def test_a_variate_that_is_seldom_observed_is_left_out_alone() -> None:
    training = coupled(800)
    whole = fit_window_pca(np.delete(training, 1, axis=1), W)
    training[5:, 1] = np.nan
    model = fit_window_pca(training, W)
    assert np.isnan(model.center).tolist() == [place == 1 for place in range(training.shape[1])]
    later = coupled(60, seed=2)
    found = model.expected(later)
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(np.delete(found, 1, axis=1), whole.expected(np.delete(later, 1, axis=1)), atol=1e-9)


def test_components_hold_the_share_asked_for_and_noise_is_what_they_leave_over() -> None:
    training = coupled(800)
    model = fit_window_pca(training, W, explained=0.9)
    z = (training - training.mean(0)) / training.std(0)
    rows = np.stack([z[n : n + W].ravel() for n in range(len(z) - W + 1)])
    values = np.sort(np.linalg.eigvalsh(rows.T @ rows / len(rows)))[::-1]
    k = model.loadings.shape[2]
    assert values[: k - 1].sum() / values.sum() < 0.9 <= values[:k].sum() / values.sum()
    assert model.noise == pytest.approx(values[k:].mean(), rel=1e-9)
    flat = model.loadings.reshape(-1, k)
    np.testing.assert_allclose(np.sort((flat**2).sum(0))[::-1], values[:k] - model.noise, rtol=1e-8)


def test_a_told_row_never_reads_itself_and_last_never_reads_later_rows() -> None:
    """Checklist 5: perturb the row and the future; ``mean`` reads exactly ``window - 1`` later rows."""
    model, values = fit_window_pca(coupled(800), W), coupled(60, seed=2)
    changed = values.copy()
    changed[30:] += 100.0
    reaches: tuple[tuple[Overlap, int], ...] = (("last", 0), ("mean", W - 1), ("median", W - 1))
    for overlap, reach in reaches:
        before, after = model.expected(values, overlap), model.expected(changed, overlap)
        first = 30 - reach
        np.testing.assert_array_equal(before[:first], after[:first])
        # row 30 itself is changed, but not what its rows before say of it
        assert np.array_equal(before[30], after[30]) == (overlap == "last")
        if reach:
            assert not np.allclose(before[first], after[first])
        config = validate(ScoreConfig, {"kind": "reconstruction", "window": W, "overlap_reduction": overlap})
        assert config.latency == reach


def graded(residual: np.ndarray, values: np.ndarray, labels: np.ndarray, split: int) -> float:
    config = validate(ScoreConfig, {"kind": "reconstruction", "joint": "mean_abs"})
    model = fit_score_model(residual[:split, None], values[:split], TrainingRange.of(values[:split]), config)
    scores = model.score(residual[split:, None], values[split:]).joint
    kept = ~np.isnan(scores)
    return auc_pr(labels[split:][kept], scores[kept])


def test_the_identity_map_gets_a_bad_grade_and_ours_a_good_one() -> None:
    """Checklist 5: a reconstructor that hands its input on sees no anomaly, whatever its rounding errors look like."""
    training, values, split = coupled(1_500), coupled(2_000, seed=3), 500
    labels = np.zeros(2_000, dtype=bool)
    for start in range(600, 1_950, 150):
        values[start : start + 8, 1] += 60.0  # inside the range of the variate, against its neighbour
        labels[start : start + 8] = True
    window = 16
    model = fit_window_pca(training, window)
    masked = graded(values - model.expected(values), values, labels, split)
    # all components and no mask: what goes in comes out, but for rounding
    z = (values - model.center) / model.scale
    rows = np.stack([z[n : n + window].ravel() for n in range(len(z) - window + 1)])
    vectors = np.linalg.svd(rows, full_matrices=False)[2]
    handed_on = np.full_like(values, np.nan)
    handed_on[window - 1 :] = (rows @ vectors.T @ vectors)[:, -3:] * model.scale + model.center
    assert np.nanmax(np.abs(handed_on - values)) < 1e-9
    identity, rate = graded(values - handed_on, values, labels, split), labels[split:].mean()
    assert masked > 0.8
    assert identity < 2 * rate


def test_a_variate_that_was_never_observed_in_training_is_as_if_it_were_not_there() -> None:
    training, values = coupled(800), gappy()
    training[:, 1] = np.nan
    others = [0, 2]
    model, alone = fit_window_pca(training, W), fit_window_pca(training[:, others], W)
    overlaps: tuple[Overlap, ...] = ("last", "mean")
    for overlap in overlaps:
        told = model.expected(values, overlap)
        assert np.isnan(told[:, 1]).all()
        np.testing.assert_allclose(told[:, others], alone.expected(values[:, others], overlap), atol=1e-9)


def test_constant_variates_missing_history_and_what_is_refused() -> None:
    training = coupled(800)
    training[:, 2] = 3.0
    model = fit_window_pca(training, W)
    told = model.expected(coupled(30, seed=4) * [1, 1, 0] + [0, 0, 3.0])
    np.testing.assert_allclose(told[W - 1 :, 2], 3.0)
    assert np.isfinite(told[W - 1 :]).all()
    assert model.expected(coupled(3)).shape == (3, 3)
    assert np.isnan(model.expected(coupled(3))).all()
    assert np.isnan(model.expected(coupled(8), "mean")).all()
    with pytest.raises(DataError, match="hold 5 complete windows of 5 rows, reconstruction needs 10; .*, to 2 for"):
        fit_window_pca(coupled(9), W)
    with pytest.raises(DataError, match=r"900 training rows \(0 of them observed\) hold 0 .*; no score\.window helps"):
        fit_window_pca(np.full((900, 3), np.nan), W)
    with pytest.raises(DataError, match=r"1600 rows of 3 variates has 4800 cells; .* lower score.window to 1365"):
        fit_window_pca(coupled(4_000), 1_600)
    for wrong, message in (
        ({"kind": "normalised", "overlap_reduction": "mean"}, "overlap_reduction has no effect"),
        ({"kind": "reconstruction", "steps": [1]}, "kind 'reconstruction' makes none"),
        ({"kind": "spectrum", "window": 8}, "window 8 is too short"),
        ({"kind": "reconstruction", "stride": 2}, "stride has no effect"),
        ({"kind": "tail", "explained": 0.9}, "explained has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ScoreConfig, wrong)
