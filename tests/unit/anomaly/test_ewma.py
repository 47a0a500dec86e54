"""Residuals that add up: against a written-out loop, the closed form of a chart on white noise, lasting shifts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.ewma import Ewma, fit_ewma
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.scoring import fit_score_model
from tsforge.anomaly.series import SeriesRows, fit_monitor
from tsforge.anomaly.smoothing import Exponential
from tsforge.anomaly.spans import SeriesSpans
from tsforge.anomaly.thresholds import Quantile
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import auc_pr


def written_out(weight: float, z: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return S / s row after row; a missing value pushes nothing and tells nothing."""
    level, out = [0.0] * z.shape[1], np.full(z.shape, np.nan)
    for row, values in enumerate(z):
        for v, value in enumerate(values):
            pushed = 0.0 if np.isnan(value) else float(value)
            level[v] = weight * pushed + (1.0 - weight) * level[v]
            if not np.isnan(value):
                out[row, v] = level[v] / spread[v]
    return out


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.7])
def test_rows_cut_anywhere_are_those_of_the_loop(weight: float) -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=(600, 5))
    z[rng.random(z.shape) < 0.1] = np.nan
    z[200:240] = np.nan
    memory = fit_ewma(weight, z[:200])
    whole = memory.fresh().run(z)
    assert whole == pytest.approx(written_out(weight, z, memory.spread), rel=1e-12, nan_ok=True)
    parts, place = [], 0
    while place < len(z):
        size = int(rng.integers(0, 9))
        parts.append(memory.run(z[place : place + size]))
        place += size
    assert np.array_equal(np.concatenate(parts), whole, equal_nan=True)
    assert memory.level.shape == (5,)


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_the_spread_of_white_noise_is_its_closed_form_from_few_rows_on(weight: float) -> None:
    z = np.random.default_rng(0).normal(size=(200_000, 3))
    white = np.sqrt(weight / (2.0 - weight))
    assert fit_ewma(weight, z).spread == pytest.approx(np.full(3, white), rel=0.02)
    # rows near the beginning count for what they are: over many short spans no bias is left but that of the floor
    variances = [fit_ewma(weight, part).spread ** 2 for part in np.random.default_rng(1).normal(size=(400, 60, 50)) * 3]
    assert np.mean(variances) == pytest.approx(9.0 * white**2, rel=0.02)


def test_residuals_that_cancel_out_do_not_scream_and_those_that_wander_are_expected_to() -> None:
    noise = np.random.default_rng(5).normal(size=(4000, 1))
    white = np.sqrt(0.1 / 1.9)
    assert fit_ewma(0.1, np.diff(noise, axis=0)).spread == pytest.approx([white])
    wandering = np.zeros((4000, 1))
    for row in range(1, 4000):
        wandering[row] = 0.9 * wandering[row - 1] + noise[row]
    assert fit_ewma(0.1, wandering).spread[0] > 5.0 * white


def test_with_mahalanobis_it_is_the_multivariate_chart() -> None:
    """On correlated normal rows T^2 has the mean V, as Lowry et al. say of a settled chart."""
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(4, 4))
    rows = rng.normal(size=(60_000, 4)) @ mixing
    config = ScoreConfig(joint="mahalanobis", ewma=0.2)
    model = fit_score_model(rows[:30_000, None], rows[:30_000], TrainingRange.of(rows), config)
    found = model.score(rows[30_000:, None], rows[30_000:]).joint[100:]
    assert found.mean() == pytest.approx(4.0, rel=0.05)
    # the chart written out, with the covariance that independent rows have
    level, told = np.zeros(4), []
    inverse = np.linalg.inv(0.2 / 1.8 * mixing.T @ mixing)
    for row in rows[30_000:]:
        level = 0.2 * row + 0.8 * level
        told.append(level @ inverse @ level)
    assert np.corrcoef(found, told[100:])[0, 1] > 0.99


def test_a_small_lasting_shift_is_found_that_smoothed_sizes_do_not_show() -> None:
    rng = np.random.default_rng(11)
    rows, labels = rng.normal(size=(8_000, 6)), np.zeros(8_000, dtype=bool)
    for start in range(3_000, 8_000, 1_000):
        labels[start : start + 100] = True
    rows[labels] += 0.45 * np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    areas = {}
    for name, config in {
        "ewma": ScoreConfig(joint="mean_abs", ewma=0.1),
        "smoothing": ScoreConfig.model_validate({"joint": "mean_abs", "smoothing": 0.1}),
    }.items():
        model = fit_score_model(rows[:2_000, None], rows[:2_000], TrainingRange.of(rows[:2_000]), config)
        areas[name] = auc_pr(labels[2_000:], model.score(rows[2_000:, None], rows[2_000:]).joint)
    assert areas["ewma"] > 0.8
    assert areas["smoothing"] < 0.6


def test_one_broken_row_is_forgotten_and_constant_variates_stay_as_they_are() -> None:
    rng = np.random.default_rng(2)
    values = np.column_stack([rng.normal(size=400), np.full(400, 3.0)])
    config = ScoreConfig(joint="max_abs", ewma=0.1, winsor=50.0)
    model = fit_score_model(values[:300, None] - [0.0, 3.0], values[:300], TrainingRange.of(values[:300]), config)
    later = values[300:].copy()
    later[10, 0], later[50, 1] = 1e9, 4.0
    z = model.score(later[:, None] - [0.0, 3.0], later).z
    assert model.ewma is not None
    spread = model.ewma.spread[0]
    assert z[10, 0] == pytest.approx(0.1 * 50.0 / spread, abs=2.0)
    assert abs(z[60, 0]) < 4.0  # 0.9^50 of it is left
    assert z[50, 1] == config.constant_score
    assert np.count_nonzero(z[:, 1]) == 1


def test_smoothing_comes_after_it() -> None:
    rows = np.random.default_rng(4).normal(size=(500, 2))
    plain, both = (
        ScoreConfig.model_validate({"joint": "mean_abs", "ewma": 0.2, **more}) for more in ({}, {"smoothing": 0.3})
    )
    found = [
        fit_score_model(rows[:300, None], rows[:300], TrainingRange.of(rows[:300]), config).score(
            rows[300:, None], rows[300:]
        )
        for config in (plain, both)
    ]
    assert np.array_equal(Exponential(0.3).run(found[0].joint), found[1].joint)
    assert np.array_equal(found[0].z, found[1].z)


def test_too_few_rows_for_its_memory_are_refused_with_the_number() -> None:
    with pytest.raises(DataError, match=r"score\.ewma 0\.01 remembers about 100 rows .* needs 200 .* 60 set the scale"):
        fit_ewma(0.01, np.zeros((60, 2)))
    assert fit_ewma(0.05, np.zeros((40, 2))).spread == pytest.approx(np.full(2, np.sqrt(0.05 / 1.95)))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"score": {"ewma": 0.1, "kind": "nll"}}, "kind 'nll' has none; use smoothing"),
        ({"score": {"ewma": 0.1, "kind": "spectrum"}}, "kind 'spectrum' has none"),
        ({"score": {"ewma": 1.0}}, r"score\.ewma: .*less than 1"),
        ({"score": {"ewma": 0.1}, "guard": True}, r"guard hides values by the residual of their own row"),
    ],
)
def test_settings_it_cannot_go_with_are_refused(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DetectConfig, plain)


def test_a_memory_without_rows_behind_it_begins_at_nothing() -> None:
    memory = Ewma(weight=0.5, spread=np.ones(2))
    assert memory.run(np.array([[4.0, np.nan]])) == pytest.approx(np.array([[2.0, np.nan]]), nan_ok=True)
    assert memory.run(np.empty((0, 2))).shape == (0, 2)
    assert memory.level.tolist() == [2.0, 0.0]
    assert memory.fresh().level.tolist() == [0.0, 0.0]


def test_a_monitor_knows_the_rows_before_the_first_one_to_judge_once() -> None:
    """The last of them are judged twice, for events under way; the second time from where the first began."""
    deviations = np.random.default_rng(6).normal(size=(160, 2)).cumsum(axis=0) * 0.3
    values, start = np.zeros((160, 2)), 120
    training = TrainingRange(low=np.full(2, -1.0), high=np.ones(2), deviation=np.full(2, 0.5))
    rows = SeriesRows(
        series_id="one",
        start=0,
        deviations=deviations[:, None],
        values=values,
        expected=values,
        training=training,
        confirmed=np.zeros(160, dtype=bool),
    )
    spans = SeriesSpans(scale=(0, 100), calibration=(100, 120), is_shared=False)
    config = validate(DetectConfig, {"score": {"ewma": 0.05}, "rule": {"kind": "quantile", "alpha": 0.1}})
    monitor = fit_monitor(rows, spans, start, config, lambda: Quantile(0.1, low_factor=2.0), ("x", "y"))
    told = monitor.run(deviations[start:, None], values[start:]).z
    model = fit_score_model(deviations[:100, None], values[:100], training, config.score)
    whole = model.raw(deviations[100:, None], values[100:], model.memory()).z
    assert np.array_equal(told, whole[20:])
