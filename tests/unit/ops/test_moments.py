"""Window moments and least squares against explicit windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsforge.core.errors import ModelError
from tsforge.ops.moments import (
    Channel,
    channel_moments,
    cross_moments,
    least_squares,
    observed_runs,
    pairwise_moments,
    ridge_by_gcv,
    solve_gram,
    window_moments,
    window_moments_reference,
)


@pytest.mark.parametrize(("rows", "left", "right"), [(1, 1, 1), (5, 3, 7), (63, 4, 4), (64, 1, 9), (500, 12, 5)])
def test_cross_moments_equal_a_double_loop(rows: int, left: int, right: int) -> None:
    rng = np.random.default_rng(rows)
    a, b = rng.normal(size=rows + left - 1), rng.normal(size=rows + right + 3)
    expected = [[sum(a[t + j] * b[t + k] for t in range(rows)) for k in range(right)] for j in range(left)]
    found = cross_moments(torch.from_numpy(a), torch.from_numpy(b), rows, left, right)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)


def test_cross_moments_refuse_too_few_values() -> None:
    with pytest.raises(ModelError, match="hold no 5 windows of width 3"):
        cross_moments(torch.ones(6), torch.ones(7), 5, 3, 3)


def test_cross_moments_read_a_strided_view() -> None:
    table = torch.randn(300, 3, dtype=torch.float64)
    strided = cross_moments(table[:, 1], table[:, 2], 280, 5, 6)
    assert torch.equal(strided, cross_moments(table[:, 1].clone(), table[:, 2].clone(), 280, 5, 6))


def test_window_moments_equal_explicit_windows_and_no_window_crosses_a_seam() -> None:
    parts = [torch.randn(size, dtype=torch.float64) for size in (400, 9, 90)]
    fast, slow = window_moments(parts, 10), window_moments_reference(parts, 10)
    assert fast.rows == slow.rows == 391 + 0 + 81
    torch.testing.assert_close(fast.gram, slow.gram, atol=1e-10, rtol=0)
    torch.testing.assert_close(fast.sums, slow.sums, atol=1e-10, rtol=0)


def test_window_moments_need_one_window() -> None:
    with pytest.raises(ModelError, match="no gap-free stretch"):
        window_moments([torch.zeros(4)], 5)


def test_channels_stand_side_by_side() -> None:
    a, b = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    found = channel_moments([Channel(a, 4, 1), Channel(b, 2, 3)], [(0, 90), (95, 200)], 6)
    windows = [
        torch.cat([a[t + 1 : t + 5], b[t + 3 : t + 5]])
        for first, last in ((0, 90), (95, 200))
        for t in range(first, last - 5)
    ]
    stacked = torch.stack(windows)
    torch.testing.assert_close(found.gram, stacked.T @ stacked, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.sums, stacked.sum(0), atol=1e-10, rtol=0)


def test_observed_runs_end_at_gaps_and_at_series() -> None:
    mask = torch.tensor([True, True, False, True, True, True, False, False, True])
    assert observed_runs(mask, [0, 5, 9]) == [(0, 2), (3, 5), (5, 6), (8, 9)]
    assert observed_runs(torch.zeros(3, dtype=torch.bool), [0, 3]) == []


def test_pairwise_moments_without_gaps_are_the_whole_window_moments() -> None:
    values = torch.randn(300, dtype=torch.float64)
    whole = window_moments([values], 6)
    pairs = pairwise_moments([Channel(values, 6)], [0, 300], 6)
    torch.testing.assert_close(pairs.gram, whole.gram, atol=1e-8, rtol=0)
    assert pairs.rows == whole.rows


def test_pairwise_moments_are_positive_definite_with_many_gaps() -> None:
    rng = np.random.default_rng(1)
    values = torch.from_numpy(np.cumsum(rng.normal(size=120)))
    mask = torch.from_numpy(rng.random(120) > 0.6)
    moments = pairwise_moments([Channel(values - values[mask].mean(), 12, 0, mask)], [0, 120], 12)
    assert float(torch.linalg.eigvalsh(moments.gram).min()) > 0.0


def test_pairwise_moments_refuse_a_lag_that_was_never_seen() -> None:
    mask = torch.arange(100) % 5 == 0  # only lags that are multiples of 5
    with pytest.raises(ModelError, match="no observed pair"):
        pairwise_moments([Channel(torch.randn(100), 4, 0, mask)], [0, 100], 4)


def test_solve_gram_gives_the_minimum_norm_solution_of_a_singular_system() -> None:
    design = np.random.default_rng(0).normal(size=(50, 3))
    design = np.column_stack([design, design[:, 0]])  # a repeated column
    answer = design @ np.array([1.0, 2.0, 3.0, 0.0])
    found, _ = solve_gram(torch.from_numpy(design.T @ design), torch.from_numpy(design.T @ answer)[:, None])
    np.testing.assert_allclose(found[:, 0].numpy(), np.linalg.pinv(design) @ answer, atol=1e-8)


def test_least_squares_matches_scikit_learn_ridge_with_intercept() -> None:
    from sklearn.linear_model import Ridge

    values = torch.randn(800, dtype=torch.float64).cumsum(0) * 0.1 + 3.0
    moments = window_moments([values], 9)
    fit = least_squares(moments, torch.arange(6), torch.tensor([6, 8]), ridge=2.5)
    windows = values.unfold(0, 9, 1).numpy()
    expected = Ridge(alpha=2.5).fit(windows[:, :6], windows[:, [6, 8]])
    np.testing.assert_allclose(fit.weight.numpy(), expected.coef_, atol=1e-8)
    np.testing.assert_allclose(fit.bias.numpy(), expected.intercept_, atol=1e-8)
    residual = windows[:, [6, 8]] - expected.predict(windows[:, :6])
    np.testing.assert_allclose(fit.rss.numpy(), (residual**2).sum(0), rtol=1e-9)


def test_ridge_by_gcv_equals_the_explicit_hat_matrix() -> None:
    values = torch.randn(60, dtype=torch.float64)
    moments = window_moments([values], 21)
    _, path = ridge_by_gcv(moments, torch.arange(20), torch.tensor([20]), num_alphas=3)
    windows = values.unfold(0, 21, 1).numpy()
    x = windows[:, :20] - windows[:, :20].mean(0)
    y = windows[:, 20] - windows[:, 20].mean()
    alphas = np.logspace(-8, 2, 3) * np.diag(x.T @ x).mean()
    expected = []
    for alpha in alphas:
        hat = x @ np.linalg.inv(x.T @ x + alpha * np.eye(20)) @ x.T
        residual = y - hat @ y
        expected.append(residual @ residual / 40 / (1.0 - (np.trace(hat) + 1.0) / 40) ** 2)
    np.testing.assert_allclose(path.numpy(), expected, rtol=1e-6)
