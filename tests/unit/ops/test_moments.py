"""Window moments and least squares against explicit windows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.errors import ModelError
from tsforge.ops import moments
from tsforge.ops.moments import (
    Channel,
    WindowMoments,
    WindowStarts,
    channel_moments,
    cross_moments,
    least_squares,
    observed_runs,
    ridge_by_gcv,
    solve_gram,
)


def starts_of(runs: list[tuple[int, int]], span: int, size: int) -> WindowStarts:
    return WindowStarts.of_runs(runs, span, size, torch.device("cpu"))


def moments_of(parts: list[torch.Tensor], width: int) -> WindowMoments:
    """Return the moments of every window inside each part."""
    bounds = [0, *itertools.accumulate(len(part) for part in parts)]
    return channel_moments([Channel(torch.cat(parts), width)], list(itertools.pairwise(bounds)), width)


@pytest.mark.parametrize(
    ("rows", "left", "right"),
    [(1, 1, 1), (5, 3, 7), (63, 4, 4), (64, 1, 9), (500, 12, 5), (40, 70, 3), (300, 5, 90), (3, 66, 66)],
)
@pytest.mark.parametrize("chunk", [1, 4000, 1 << 19])  # many parts, some, one
def test_cross_moments_equal_a_double_loop(
    rows: int, left: int, right: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_CHUNK_VALUES", chunk)
    rng = np.random.default_rng(rows)
    a, b = rng.normal(size=rows + left - 1), rng.normal(size=rows + right + 3)
    expected = [[sum(a[t + j] * b[t + k] for t in range(rows)) for k in range(right)] for j in range(left)]
    starts = starts_of([(0, rows)], 1, max(len(a), len(b)))
    found = cross_moments(torch.from_numpy(a), torch.from_numpy(b), starts, left, right)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)


def test_cross_moments_refuse_too_few_values() -> None:
    with pytest.raises(ModelError, match="6 values hold no window of width 3 from row 4 on"):
        cross_moments(torch.ones(6), torch.ones(7), starts_of([(0, 5)], 1, 7), 3, 3)


def test_cross_moments_read_a_strided_view() -> None:
    table = torch.randn(300, 3, dtype=torch.float64)
    starts = starts_of([(0, 280)], 1, 300)
    strided = cross_moments(table[:, 1], table[:, 2], starts, 5, 6)
    assert torch.equal(strided, cross_moments(table[:, 1].clone(), table[:, 2].clone(), starts, 5, 6))


def random_panel(seed: int) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds, mask and two channels of series with gaps; some are empty, of one row or shorter than a window."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, 150, 1, 1, 7, 0, *rng.integers(1, 400, size=6), 2, 0]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    mask = rng.random(bounds[-1]) > rng.choice([0.0, 0.01, 0.05])
    values = np.where(mask, rng.normal(size=bounds[-1]).cumsum(), np.nan)
    return bounds, torch.from_numpy(mask), torch.from_numpy(values), torch.from_numpy(rng.normal(size=bounds[-1]))


def windows_by_loop(channels: list[Channel], bounds: list[int], mask: torch.Tensor, span: int) -> torch.Tensor:
    """Return every window of ``span`` observed rows of one series, one after the other."""
    rows = []
    for first, last in itertools.pairwise(bounds):
        for t in range(first, last - span + 1):
            if bool(mask[t : t + span].all()):
                rows.append(torch.cat([c.values[t + c.start : t + c.start + c.width] for c in channels]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("own", "other", "horizon"), [(14, 3, 7), (1, 1, 1), (70, 20, 5)])
@pytest.mark.parametrize("chunk", [600, 1 << 19])
def test_many_series_with_gaps_equal_a_loop_over_windows(
    seed: int, own: int, other: int, horizon: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_CHUNK_VALUES", chunk)
    bounds, mask, values, covariate = random_panel(seed)
    span = own + horizon
    channels = [Channel(values, span, 0, mask), Channel(covariate, other, own - other)]
    windows = windows_by_loop(channels, bounds, mask, span)
    found = channel_moments(channels, observed_runs(mask, bounds), span)
    scale = float(windows.square().sum())
    assert found.rows == len(windows)
    torch.testing.assert_close(found.gram, windows.T @ windows, atol=1e-14 * scale, rtol=0)
    torch.testing.assert_close(found.sums, windows.sum(0), atol=1e-14 * scale, rtol=0)


def test_the_work_does_not_grow_with_the_number_of_series(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    correlate = moments._correlate

    def count(*given: Any) -> torch.Tensor:
        calls.append(given)
        return correlate(*given)

    monkeypatch.setattr(moments, "_correlate", count)
    moments_of([torch.randn(50 + number % 9, dtype=torch.float64) for number in range(300)], 10)
    assert len(calls) == 1


def test_moments_equal_explicit_windows_and_no_window_crosses_a_seam() -> None:
    parts = [torch.randn(size, dtype=torch.float64) for size in (400, 9, 90)]
    found = moments_of(parts, 10)
    windows = torch.cat([part.unfold(0, 10, 1) for part in parts if len(part) >= 10])
    assert found.rows == len(windows) == 391 + 0 + 81
    torch.testing.assert_close(found.gram, windows.T @ windows, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.sums, windows.sum(0), atol=1e-10, rtol=0)


def test_moments_need_one_window() -> None:
    with pytest.raises(ModelError, match="no gap-free stretch"):
        moments_of([torch.zeros(4)], 5)


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
    assert observed_runs(torch.ones(9, dtype=torch.bool), [2, 2, 3, 8, 8]) == [(2, 3), (3, 8)]
    assert observed_runs(torch.zeros(0, dtype=torch.bool), [0, 0]) == []


def test_solve_gram_gives_the_minimum_norm_solution_of_a_singular_system() -> None:
    design = np.random.default_rng(0).normal(size=(50, 3))
    design = np.column_stack([design, design[:, 0]])  # a repeated column
    answer = design @ np.array([1.0, 2.0, 3.0, 0.0])
    found, _ = solve_gram(torch.from_numpy(design.T @ design), torch.from_numpy(design.T @ answer)[:, None])
    np.testing.assert_allclose(found[:, 0].numpy(), np.linalg.pinv(design) @ answer, atol=1e-8)


def test_least_squares_matches_scikit_learn_ridge_with_intercept() -> None:
    from sklearn.linear_model import Ridge

    values = torch.randn(800, dtype=torch.float64).cumsum(0) * 0.1 + 3.0
    known = moments_of([values], 9)
    fit = least_squares(known, torch.arange(6), torch.tensor([6, 8]), ridge=2.5)
    windows = values.unfold(0, 9, 1).numpy()
    expected = Ridge(alpha=2.5).fit(windows[:, :6], windows[:, [6, 8]])
    np.testing.assert_allclose(fit.weight.numpy(), expected.coef_, atol=1e-8)
    np.testing.assert_allclose(fit.bias.numpy(), expected.intercept_, atol=1e-8)
    residual = windows[:, [6, 8]] - expected.predict(windows[:, :6])
    np.testing.assert_allclose(fit.rss.numpy(), (residual**2).sum(0), rtol=1e-9)


def test_ridge_by_gcv_equals_the_explicit_hat_matrix() -> None:
    values = torch.randn(60, dtype=torch.float64)
    known = moments_of([values], 21)
    _, path = ridge_by_gcv(known, torch.arange(20), torch.tensor([20]), num_alphas=3)
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
