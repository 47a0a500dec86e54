"""Ranks against textbook examples."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

from tsforge.core.errors import DataError
from tsforge.metrics.ranking import (
    better,
    critical_difference,
    friedman,
    leaderboard,
    mean_ranks,
    skill_score,
)


def test_skill_score() -> None:
    assert skill_score([0.5, 2.0, 1.0], [1.0, 1.0, 0.0])[:2].tolist() == [0.5, -1.0]
    assert math.isnan(skill_score(1.0, 0.0))


def test_mean_ranks_share_ties_and_skip_incomplete_rows() -> None:
    losses = [[1.0, 2.0, 3.0], [5.0, 5.0, 1.0], [1.0, np.nan, 0.0]]
    assert mean_ranks(losses) == pytest.approx([(1 + 2.5) / 2, (2 + 2.5) / 2, (3 + 1) / 2])
    assert np.isnan(mean_ranks([[1.0, np.nan]])).all()


def test_differences_by_rounding_are_ties() -> None:
    exact = np.array([[1.0, 2.0, 0.5], [3.0, 3.0, 4.0], [0.1, 0.1, 0.1]])
    noise = 1.0 + 1e-12 * np.random.default_rng(0).normal(size=exact.shape)
    assert mean_ranks(exact * noise) == pytest.approx(mean_ranks(exact))
    assert friedman(exact * noise).p_value == pytest.approx(friedman(exact).p_value)
    naive = pl.Series("naive", [1.0, 2.0, 3.0, 4.0])
    losses = pl.DataFrame({"same": naive * (1 - 1e-9), "ahead": naive * (1 - 1e-4), "naive": naive})
    board = leaderboard(losses, ["same", "ahead", "naive"], "naive")
    assert dict(board.select("model", "win_share").iter_rows()) == {"ahead": 1.0, "same": 0.0, "naive": 0.0}
    assert dict(board.select("model", "mean_rank").iter_rows()) == {"ahead": 1.0, "same": 2.5, "naive": 2.5}
    assert better([1.0, -2.0, np.nan, 0.0], [2.0, -1.0, 1.0, 0.0]).tolist() == [True, True, False, False]


def test_critical_difference_equals_the_published_table() -> None:
    # Demsar (2006), Table 5: q(0.05) = 1.960, 2.343, 2.569, 2.728 for 2..5 classifiers; k=4, N=14: CD 1.25
    for models, q in ((2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728)):
        expected = q * math.sqrt(models * (models + 1) / (6 * 14))
        assert critical_difference(models, 14) == pytest.approx(expected, rel=1e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    with pytest.raises(DataError):
        critical_difference(1, 14)


def test_friedman_by_its_formula() -> None:
    losses = np.random.default_rng(0).normal(size=(12, 4)) + np.arange(4) * 0.7
    ranks = losses.argsort(axis=1).argsort(axis=1) + 1
    expected = 12 * 12 / (4 * 5) * ((ranks.mean(axis=0) ** 2).sum() - 4 * 25 / 4)
    outcome = friedman(losses)
    assert outcome.statistic == pytest.approx(expected)
    assert outcome.p_value == pytest.approx(stats.chi2.sf(expected, 3))
    assert math.isnan(friedman(losses[:, :2]).p_value)
    assert math.isnan(friedman(np.ones((5, 3))).p_value)


def test_leaderboard_orders_and_measures_against_the_baseline() -> None:
    rng = np.random.default_rng(6)
    naive = rng.random(20) + 1.0
    losses = pl.DataFrame({"good": naive * 0.5, "naive": naive, "bad": naive * 1.5}).vstack(
        pl.DataFrame({"good": [1.0], "naive": [None], "bad": [0.0]}, schema_overrides={"naive": pl.Float64})
    )
    board = leaderboard(losses, ["bad", "good", "naive"], "naive")
    assert board["model"].to_list() == ["good", "naive", "bad"]
    assert board["mean_rank"].to_list() == [1.0, 2.0, 3.0]
    assert board["skill"].to_list() == pytest.approx([0.5, 0.0, -0.5])
    assert board["win_share"].to_list() == [1.0, 0.0, 0.0]
    assert board["count"].to_list() == [20] * 3
    apart = leaderboard(losses, ["bad", "good"], "naive")
    assert apart["skill"].to_list() == pytest.approx([0.5, -0.5])
    with pytest.raises(DataError, match="no losses for ugly"):
        leaderboard(losses, ["ugly"], "naive")
