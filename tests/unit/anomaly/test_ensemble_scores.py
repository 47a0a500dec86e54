"""Surprises and their sum against written-out loops; leaks, missing members, the way through an artifact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.baselines import PcaResidual
from tsforge.anomaly.covariance import fit_covariance
from tsforge.anomaly.ensemble import (
    EnsembleConfig,
    combine,
    ensemble_scores,
    filled,
    fit_surprise,
    plain_members,
    recentred,
)
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema

FIT, KNOWN, ROWS = 700, 1000, 1400


def surprise_by_hand(sample: np.ndarray, score: float) -> float:
    """Source: the module docstring; counts, Hill's mean, no shared code."""
    level = float(np.quantile(sample, 0.98))
    if score <= level:
        rank = sum(1 for value in sample if value >= score)
        return min(-math.log((1 + rank) / (len(sample) + 1)), -math.log(0.02))
    excess = [math.log(value) - math.log(level) for value in sample if value > level]
    rate = max(sum(excess) / len(excess), 0.02)
    return -math.log(0.02) + (math.log(score) - math.log(level)) / rate


def test_surprise_equals_the_definition_and_never_falls() -> None:
    rng = np.random.default_rng(0)
    sample = rng.chisquare(3, 400)
    scores = np.concatenate([rng.chisquare(3, 200), np.linspace(0.0, 200.0, 300), sample[:20]])
    found = fit_surprise(sample).of(scores)
    np.testing.assert_allclose(found, [surprise_by_hand(sample, score) for score in scores], rtol=1e-12)
    ordered = np.sort(scores)
    assert (np.diff(fit_surprise(sample).of(ordered)) >= -1e-12).all()
    assert np.isnan(fit_surprise(sample).of([np.nan])[0])
    alike = 1.0 + 1e-3 * rng.random(400)  # excesses of about a millionth: the rate has a floor
    beyond = np.linspace(1.0, 1.5, 40)
    by_hand = [surprise_by_hand(alike, score) for score in beyond]
    np.testing.assert_allclose(fit_surprise(alike).of(beyond), by_hand, rtol=1e-9)
    assert by_hand[-1] < 30.0


def test_surprise_is_exponential_on_rows_like_those_that_calibrated() -> None:
    """-log of a uniform p is exponential with mean 1: shares beyond a and b within four standard errors."""
    rng = np.random.default_rng(1)
    sample, fresh = rng.pareto(2.5, 5_000) + 1.0, rng.pareto(2.5, 20_000) + 1.0
    found = fit_surprise(sample).of(fresh)
    for limit in (1.0, 3.0, 6.0):
        share = math.exp(-limit)
        spread = 4 * math.sqrt(share * (1 - share) / 5_000)
        assert abs((found > limit).mean() - share) < spread


def test_the_sum_is_the_mean_surprise_smoothed() -> None:
    rng = np.random.default_rng(2)
    members = {"a": rng.chisquare(2, 500), "b": 100.0 * rng.chisquare(5, 500)}
    found = combine(members, 300, join="surprise", smoothing=0.2)
    level = None
    for row in range(500):
        mean = np.mean([surprise_by_hand(values[:300], values[row]) for values in members.values()])
        level = mean if level is None else 0.2 * mean + 0.8 * level
        assert found[row] == pytest.approx(level, rel=1e-12)
    assert np.array_equal(
        combine({"a": members["a"]}, 300, join="surprise", smoothing=None),
        fit_surprise(members["a"][:300]).of(members["a"]),
    )


def test_ratio_is_the_mean_in_units_of_the_usual_score_smoothed() -> None:
    rng = np.random.default_rng(8)
    members = {"a": rng.chisquare(2, 300), "b": 100.0 * rng.chisquare(5, 300)}
    found = combine(members, 200, smoothing=0.1)
    level = None
    for row in range(300):
        usual = [sum(sorted(values[:200])[99:101]) / 2 for values in members.values()]
        mean = sum(values[row] / unit for values, unit in zip(members.values(), usual, strict=True)) / 2
        level = mean if level is None else 0.1 * mean + 0.9 * level
        assert found[row] == pytest.approx(level, rel=1e-12)
    with pytest.raises(DataError, match="member b is 0 on half"):
        combine({"a": members["a"], "b": np.zeros(300)}, 200, smoothing=None)


def test_recentring_subtracts_the_mean_of_the_rows_before() -> None:
    rng = np.random.default_rng(9)
    scores = rng.normal(size=60) + 5.0
    scores[20:23] = np.nan
    found, level, weight = recentred(scores, 10.0), None, 1.0 - 0.5**0.1
    for row in range(60):
        if np.isnan(scores[row]):
            assert np.isnan(found[row])
            continue
        assert found[row] == pytest.approx(0.0 if level is None else scores[row] - level, abs=1e-12)
        level = scores[row] if level is None else weight * scores[row] + (1.0 - weight) * level
    members = {"a": rng.chisquare(3, 300)}
    plain = combine(members, 200, smoothing=0.1)
    expected = recentred(np.log(plain), 50.0)
    np.testing.assert_allclose(combine(members, 200, smoothing=0.1, recentre=50.0), expected, rtol=1e-12)


@pytest.mark.parametrize("join", ["ratio", "surprise"])
def test_a_unit_of_a_member_changes_nothing(join: Any) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.chisquare(2, 400), rng.chisquare(4, 400)
    first, second = (combine({"a": a, "b": factor * b}, 200, join=join, smoothing=0.1) for factor in (1.0, 1e6))
    np.testing.assert_allclose(first, second, rtol=1e-9)


def test_missing_members_are_left_out_and_rows_without_any_have_no_score() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.chisquare(2, 300), rng.chisquare(2, 300)
    a[250:260], b[255:260] = np.nan, np.nan
    found = combine({"a": a, "b": b}, 200, join="surprise", smoothing=None)
    assert np.isnan(found[255:260]).all()
    np.testing.assert_array_equal(found[250:255], fit_surprise(b[:200]).of(b[250:255]))


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="at least 50 rows"):
        fit_surprise(np.arange(10.0))
    with pytest.raises(DataError, match="different rows"):
        combine({"a": np.ones(80), "b": np.ones(90)}, 60, smoothing=None)
    with pytest.raises(DataError, match="at least one"):
        combine({}, 60, smoothing=None)
    with pytest.raises(ConfigError, match="twice"):
        validate(EnsembleConfig, {"members": ["mean_abs", "mean_abs"]})
    with pytest.raises(ConfigError, match="joint mahalanobis"):
        validate(EnsembleConfig, {"score": {"joint": "mean_abs"}})


def test_filled_takes_the_value_before_and_looks_ahead_only_where_there_is_none() -> None:
    nan = np.nan
    rows = np.array([[nan, 1.0, nan], [2.0, nan, nan], [nan, 3.0, nan]])
    assert np.array_equal(filled(rows), [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 3.0, 0.0]])


def test_pca_mahalanobis_is_the_distance_of_what_is_left_over() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(600, 2)) @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(600, 5))
    train, test = rows[:400], rows[400:]
    scale = np.maximum(train.std(axis=0), 0.01)
    z, later = (train - train.mean(axis=0)) / scale, (test - train.mean(axis=0)) / scale
    values, vectors = np.linalg.eigh(z.T @ z)
    order = np.argsort(-values)
    count = int(np.searchsorted(np.cumsum(values[order]) / values.sum(), 0.95)) + 1
    kept = vectors[:, order[:count]]
    rest, rest_later = z - z @ kept @ kept.T, later - later @ kept @ kept.T
    spread = np.maximum(rest.std(axis=0), 0.01)
    matrix = fit_covariance(rest / spread).matrix
    away = rest_later / spread - (rest / spread).mean(axis=0)
    expected = np.einsum("nv,vw,nw->n", away, np.linalg.inv(matrix), away)
    np.testing.assert_allclose(PcaResidual(joint="mahalanobis").fit(train).score(test), expected, rtol=1e-6)


# ---- through an artifact


def frame_of(values: np.ndarray) -> SeriesFrame:
    names = tuple(f"v{place}" for place in range(values.shape[1]))
    table = pl.DataFrame({name: values[:, place] for place, name in enumerate(names)}).fill_nan(None)
    table = table.with_columns(series_id=pl.lit("s"), time=pl.int_range(len(values), dtype=pl.Int64))
    return SeriesFrame(table, SeriesSchema(targets=names, freq="1i"))


def rows(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(ROWS, 3))
    out = np.zeros((ROWS, 3))
    for row in range(1, ROWS):
        out[row] = 0.8 * out[row - 1] + noise[row]
    out[:, 2] = out[:, 0] + 0.1 * noise[:, 2]
    return out


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "ar_net"},
        "window": {"context_length": 8, "horizon": 1},
        "split": {"kind": "counts", "counts": [FIT, KNOWN - FIT, 0]},
    }
    return fit_frame(frame_of(rows()[:KNOWN]), validate(FitConfig, settings))[0]


def test_an_artifact_and_plain_scorers_judge_the_same_rows(artifact: Artifact) -> None:
    values = rows()
    values[1200:1230, 2] *= -1.0  # each value usual, the relation broken
    found = ensemble_scores(artifact, frame_of(values), start=KNOWN)[0]
    assert found.known == (KNOWN - FIT) // 2
    assert len(found.scores) == found.known + ROWS - KNOWN
    assert found.times[found.known] == KNOWN
    inside = found.scores[found.known :][200:230]
    assert np.median(inside) > np.quantile(np.delete(found.scores[found.known :], slice(195, 260)), 0.99)
    config = EnsembleConfig()
    own = plain_members(config.plain, values[:FIT], values)
    for name, scores in own.items():
        np.testing.assert_allclose(found.members[name], scores[FIT + (KNOWN - FIT) // 2 :], rtol=1e-10)
    expected = combine(
        found.members, found.known, join=config.join, smoothing=config.smoothing, recentre=config.recentre
    )
    assert np.array_equal(found.scores, expected)


def test_a_series_that_never_moved_in_training_is_refused_by_name(artifact: Artifact) -> None:
    values = rows()
    values[:FIT] = 1.0
    with pytest.raises(DataError, match=rf"'s' is constant over its {FIT} training rows.*residual_mahalanobis"):
        ensemble_scores(artifact, frame_of(values), start=KNOWN)


def test_what_comes_later_changes_no_earlier_score(artifact: Artifact) -> None:
    """Checklist 5: perturb the future; a sum smoothed from the other end is caught by the same comparison."""
    values = rows()
    changed = values.copy()
    changed[1201:] += 50.0
    before, after = (ensemble_scores(artifact, frame_of(x), start=KNOWN)[0].scores for x in (values, changed))
    at = 1200 - KNOWN + (KNOWN - FIT) // 2
    assert np.array_equal(before[: at + 1], after[: at + 1])
    assert not np.array_equal(before[at + 1 :], after[at + 1 :])
    leaky = [np.convolve(scores, np.ones(5) / 5, mode="same") for scores in (before, after)]  # centred: sees 2 rows
    assert not np.array_equal(leaky[0][: at + 1], leaky[1][: at + 1])
