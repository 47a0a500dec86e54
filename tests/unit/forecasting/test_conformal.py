"""Conformal calibration on plain arrays: ranks, coverage by simulation, too few scores, crossing."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.forecasting.conformal import apply_calibration, calibrated_levels, calibration_table
from tsforge.forecasting.conformal_scores import (
    conformal_margin,
    conformal_rank,
    interval_scores,
    nested,
    paired_levels,
)


@pytest.mark.parametrize(
    ("count", "coverage", "rank"),
    [
        (9, 0.9, 9),
        (10, 0.9, 10),
        (8, 0.9, 9),
        (19, 0.9, 18),
        (19, 0.95, 19),
        (18, 0.95, 19),
        (99, 0.9, 90),
        (3, 0.5, 2),
    ],
)
def test_rank_is_the_ceiling_of_n_plus_one_times_coverage(count: int, coverage: float, rank: int) -> None:
    assert conformal_rank(count, coverage) == rank


def test_rank_needs_a_coverage_between_0_and_1() -> None:
    with pytest.raises(ConfigError, match=r"coverage 1\.0"):
        conformal_rank(9, 1.0)


@pytest.mark.parametrize("count", [9, 10, 13, 25])
def test_coverage_of_small_calibration_sets_is_at_least_nominal(count: int) -> None:
    """Exchangeable draws: coverage is rank / (n + 1) exactly; n = 9 and alpha = 0.1 breaks index-based variants."""
    rng = np.random.default_rng(count)
    trials = 40_000
    draws = np.abs(rng.standard_t(3, (count + 1, trials)))
    margin, used = conformal_margin(draws[:count], np.ones((count, trials), dtype=bool), 0.9)
    covered = (draws[count] <= margin).mean()
    exact = math.ceil((count + 1) * 0.9 - 1e-9) / (count + 1)
    assert used.min() == count
    assert covered == pytest.approx(exact, abs=4 * math.sqrt(0.09 / trials))
    assert covered >= 0.9 - 4 * math.sqrt(0.09 / trials)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_too_few_scores_give_an_infinite_margin_never_a_collapsed_one(count: int) -> None:
    margin, _ = conformal_margin(np.ones((count, 2)), np.ones((count, 2), dtype=bool), 0.9)
    assert np.isinf(margin).all()


def test_masked_scores_do_not_count_per_cell() -> None:
    scores = np.arange(20.0)[:, None] * np.ones(2)
    mask = np.ones((20, 2), dtype=bool)
    mask[:12, 1] = False
    margin, used = conformal_margin(scores, mask, 0.9)
    assert used.tolist() == [20, 8]
    assert margin[0] == 18.0  # 19th smallest of 20
    assert math.isinf(margin[1])


def test_margin_equals_a_loop_per_step_and_variate() -> None:
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(size=(31, 3, 2)), rng.random((31, 3, 2)) > 0.2
    margin, used = conformal_margin(scores, mask, 0.8)
    for h in range(3):
        for v in range(2):
            kept = sorted(scores[i, h, v] for i in range(31) if mask[i, h, v])
            assert used[h, v] == len(kept)
            assert margin[h, v] == kept[conformal_rank(len(kept), 0.8) - 1]


def test_levels_must_come_in_mirrored_pairs() -> None:
    assert paired_levels((0.05, 0.25, 0.5, 0.75, 0.95)) == [(0.9, 0, 4), (0.5, 1, 3)]
    for bad in ((), (0.9, 0.1), (0.1, 0.1, 0.9), (0.0, 1.0)):
        with pytest.raises(ConfigError, match="ascend"):
            paired_levels(bad)
    with pytest.raises(ConfigError, match=r"0\.2 have no mirror image"):
        paired_levels((0.1, 0.2, 0.9))


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def heteroscedastic(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets [N, 4, 2] whose spread grows with the step and differs 100-fold between windows."""
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.1, 10.0], (count, 2))
    mean = rng.normal(size=(count, 4, 2))
    noise = rng.standard_t(4, (count, 4, 2)) * np.sqrt(np.arange(1, 5))[None, :, None]
    return mean + noise * scale[:, None, :], mean, scale


@pytest.mark.parametrize("kind", ["absolute", "cqr"])
def test_calibrated_intervals_cover_per_step_whatever_the_scale(kind: str) -> None:
    """CQR starts from quantiles 3 times too narrow, the absolute score from nothing but a mean."""
    spread = np.array([-0.5, -0.2, 0.0, 0.2, 0.5])

    def forecast(mean: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
        return None if kind == "absolute" else mean[..., None] + scale[:, None, :, None] * spread

    target, mean, scale = heteroscedastic(1500, 1)
    scores = interval_scores(target, mean, forecast(mean, scale), LEVELS, scale)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), LEVELS, ("a", "b"), kind)
    assert table.columns == ["step", "variate", "level", "n", "low", "high", "score", "status"]
    assert calibrated_levels(table) == LEVELS

    fresh, mean, scale = heteroscedastic(4000, 2)
    result = apply_calibration(table, mean, forecast(mean, scale), LEVELS, scale, ("a", "b"))
    assert (np.diff(result, axis=-1) >= 0).all()
    for (low, high), nominal in (((0, 4), 0.9), ((1, 3), 0.5)):
        inside = (result[..., low] <= fresh) & (fresh <= result[..., high])
        assert np.abs(inside.mean(axis=0) - nominal).max() < 0.05  # [step, variate]
        for calm in (True, False):
            rows = (scale[:, 0] < 1.0) == calm
            assert abs(inside[rows, :, 0].mean() - nominal) < 0.04


def test_cqr_shrinks_intervals_that_are_too_wide() -> None:
    target, mean, scale = heteroscedastic(500, 3)
    wide = mean[..., None] + scale[:, None, :, None] * np.array([-90.0, 0.0, 90.0])
    levels = (0.1, 0.5, 0.9)
    scores = interval_scores(target, mean, wide, levels, scale)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), levels, ("a", "b"), "cqr")
    assert (table["high"] < 0).all()
    result = apply_calibration(table, mean, wide, levels, scale, ("a", "b"))
    assert ((result[..., 2] - result[..., 0]) < 0.5 * (wide[..., 2] - wide[..., 0])).all()


def test_low_margin_moves_the_lower_bound_and_high_the_upper() -> None:
    table = pl.DataFrame(
        {"step": [1], "variate": ["a"], "level": [0.8], "n": [50], "low": [-3.0], "high": [1.0]}
        | {"score": ["cqr"], "status": ["ok"]}
    )
    quantiles = np.array([[[[0.0, 10.0]]]])
    result = apply_calibration(table, np.full((1, 1, 1), 5.0), quantiles, (0.1, 0.9), np.full((1, 1), 2.0), ("a",))
    assert result.ravel().tolist() == [-6.0, 12.0]


def test_margins_that_would_cross_push_the_outer_bound_outwards() -> None:
    row = {"step": 1, "variate": "a", "n": 50, "score": "cqr", "status": "ok"}
    inner, outer = {"level": 0.5, "low": -4.0, "high": 4.0}, {"level": 0.9, "low": 1.0, "high": -1.0}
    table = pl.DataFrame([row | inner, row | outer])
    quantiles = np.array([[[[-3.0, -1.0, 0.0, 1.0, 3.0]]]])
    result = apply_calibration(table, np.zeros((1, 1, 1)), quantiles, LEVELS, np.ones((1, 1)), ("a",))
    assert result.ravel().tolist() == [-5.0, -5.0, 0.0, 5.0, 5.0]


def test_too_few_windows_are_marked_and_cover_everything() -> None:
    target, mean, scale = heteroscedastic(8, 4)
    scores = interval_scores(target, mean, None, LEVELS, scale)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), LEVELS, ("a", "b"), "absolute")
    assert table.filter(level=0.9)["status"].unique().to_list() == ["too_few"]
    assert table.filter(level=0.5)["status"].unique().to_list() == ["ok"]
    result = apply_calibration(table, mean, None, LEVELS, scale, ("a", "b"))
    assert np.isneginf(result[..., 0]).all()
    assert np.isposinf(result[..., 4]).all()
    assert np.isfinite(result[..., 1:4]).all()
    assert np.array_equal(result[..., 2], mean)


def test_variates_are_matched_by_name_and_steps_may_be_fewer() -> None:
    target, mean, scale = heteroscedastic(300, 5)
    scores = interval_scores(target, mean, None, LEVELS, scale)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), LEVELS, ("a", "b"), "absolute")
    straight = apply_calibration(table, mean, None, LEVELS, scale, ("a", "b"))
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=1)
    swapped = apply_calibration(shuffled, mean[:, :2, ::-1], None, LEVELS, scale[:, ::-1], ("b", "a"))
    assert np.array_equal(swapped[:, :, ::-1], straight[:, :2])
    with pytest.raises(DataError, match="does not belong"):
        apply_calibration(table, mean, None, LEVELS, scale, ("a", "c"))


def test_uncalibrated_levels_and_foreign_scores_are_refused() -> None:
    target, mean, scale = heteroscedastic(30, 6)
    scores = interval_scores(target, mean, None, LEVELS, scale)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), LEVELS, ("a", "b"), "absolute")
    with pytest.raises(ConfigError, match=r"0\.1, 0\.9 are not calibrated; choose among 0\.05, 0\.25"):
        apply_calibration(table, mean, None, (0.1, 0.9), scale, ("a", "b"))
    with pytest.raises(ConfigError, match="holds 'absolute' scores, which rest on its mean alone"):
        apply_calibration(table, mean, np.zeros((*mean.shape, 5)), LEVELS, scale, ("a", "b"))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_nesting_only_ever_widens(number: int) -> None:
    raw = np.random.default_rng(number).normal(size=(200, number))
    result = nested(raw)
    assert (np.diff(result, axis=-1) >= 0).all()
    if number % 2:
        assert np.array_equal(result[:, number // 2], raw[:, number // 2])
        half = number // 2
        assert (result[:, :half] <= raw[:, :half]).all()
        assert (result[:, half + 1 :] >= raw[:, half + 1 :]).all()
    ordered = np.sort(raw, axis=-1)
    assert np.array_equal(nested(ordered), ordered)


def test_nesting_keeps_infinite_bounds() -> None:
    assert nested(np.array([-np.inf, np.inf])).tolist() == [-np.inf, np.inf]
    assert nested(np.array([-np.inf, 1.0, 2.0, 1.5, np.inf])).tolist() == [-np.inf, 1.0, 2.0, 2.0, np.inf]
