"""Every threshold rule: stream equals batch, restorable anywhere, blind to the future, monotone, unit-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.config import CalibrationConfig, DetectConfig
from tsforge.anomaly.fdr import benjamini_hochberg
from tsforge.anomaly.rule_base import Decision, Decisions, ThresholdRule
from tsforge.anomaly.thresholds import RULES, build_rule, restore_rule
from tsforge.core.config import validate

SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "value": 2.0},
    "quantile": {"kind": "quantile", "alpha": 0.01},
    "rolling": {"kind": "rolling_quantile", "alpha": 0.01, "window": 150},
    "rolling_capped": {"kind": "rolling_quantile", "alpha": 0.05, "window": 150, "exclude_flagged": 7},
    "pot": {"kind": "pot", "risk": 1e-3, "level": 0.9},
    "spot": {"kind": "spot", "risk": 1e-2, "level": 0.9, "max_excesses": 80, "exclude_flagged": 4},
    "spot_published": {"kind": "spot", "risk": 1e-3, "level": 0.9, "exclude_flagged": None, "tail_shape": "free"},
    "dspot": {"kind": "dspot", "risk": 1e-2, "level": 0.9, "depth": 10, "exclude_flagged": 4},
    "adaptive": {"kind": "adaptive", "alpha": 0.02, "gain": 0.05, "window": 150},
    "ew_normalised": {"kind": "ew_normalised", "alpha": 0.01, "half_life": 30},
    "lord": {"kind": "fdr", "procedure": "lord", "level": 0.3},
    "lord_decay": {"kind": "fdr", "procedure": "lord_decay", "level": 0.3},
    "e_lond": {"kind": "fdr", "procedure": "e_lond", "level": 0.5, "kappa": 0.2},
    "bh": {"kind": "fdr", "procedure": "bh", "level": 0.3, "block": 60},
    "e_bh": {"kind": "fdr", "procedure": "e_bh", "level": 0.5, "block": 30, "e_values": "direct", "power": 8},
}


def made(name: str, **changes: Any) -> ThresholdRule:
    config = validate(DetectConfig, {"rule": {**SETTINGS[name], **changes}})
    return build_rule(config.rule, calibration=CalibrationConfig(tail_level=0.9))


def drawn(seed: int, count: int, strange: float = 0.1, missing: float = 0.1) -> NDArray[np.float64]:
    """Positive scores with a share of large ones, in patches, and missing ones."""
    generator = np.random.default_rng(seed)
    scores = np.abs(generator.standard_normal(count))
    patch = np.repeat(generator.uniform(size=count // 5 + 1) < strange, 5)[:count]
    scores[patch] += generator.exponential(4.0, size=count)[patch]
    scores[generator.uniform(size=count) < 0.01] = np.inf
    scores[generator.uniform(size=count) < missing] = np.nan
    return scores


def same(left: Decisions, right: Decisions) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def stepped(rule: ThresholdRule, scores: NDArray[np.float64]) -> Decisions:
    rows = [rule.step(score) for score in scores.tolist()]
    return Decisions(*(np.array([row[i] for row in rows]) for i in range(3)))


def joined(*parts: Decisions) -> Decisions:
    return Decisions(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def test_every_rule_is_tried() -> None:
    assert {made(name).kind for name in SETTINGS} == set(RULES)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 700), cut=st.floats(0.0, 1.0))
def test_run_equals_step_across_cuts_and_restarts(name: str, seed: int, size: int, cut: float) -> None:
    """Checklist 7: bit for bit, with the state saved as JSON in the middle."""
    calibration = np.abs(np.random.default_rng([seed, 1]).standard_normal(620))
    scores = drawn(seed, size)
    batch, stream, parts = (made(name).fit(calibration) for _ in range(3))
    whole = batch.run(scores)
    same(whole, stepped(stream, scores))
    middle = int(cut * size)
    first = parts.run(scores[:middle])
    again = restore_rule(json.loads(json.dumps(parts.state())))
    assert again.describe() == parts.describe()
    same(whole, joined(first, again.run(scores[middle:])))
    assert json.dumps(batch.state()) == json.dumps(stream.state()) == json.dumps(again.state())
    assert not whole.alarm[np.isnan(scores)].any()
    assert not (whole.low > whole.threshold).any()


class SpanBH(ThresholdRule):
    """A saboteur: Benjamini-Hochberg over everything it is given, rows to come included."""

    kind = "saboteur"
    alpha = None

    def fit(self, calibration: ArrayLike) -> Self:
        self.sample = np.sort(np.asarray(calibration, dtype=np.float64))
        return self

    def run(self, scores: ArrayLike) -> Decisions:
        s = np.asarray(scores, dtype=np.float64)
        p = (1 + self.sample.size - np.searchsorted(self.sample, s)) / (self.sample.size + 1)
        alarm = benjamini_hochberg(np.where(np.isnan(s), 1.0, p), 0.3)
        return Decisions(alarm, np.zeros(s.size), np.zeros(s.size))

    def step(self, score: float) -> Decision:
        alarm, threshold, low = self.run([score])
        return Decision(bool(alarm[0]), float(threshold[0]), float(low[0]))

    def describe(self) -> str:
        return "saboteur()"

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        return cls()


def sees_the_future(rule: Callable[[], ThresholdRule]) -> bool:
    calibration, scores = np.abs(np.random.default_rng(1).standard_normal(620)), drawn(2, 600)
    changed = scores.copy()
    changed[400:] = 30.0
    left, right = (rule().fit(calibration).run(values) for values in (scores, changed))
    return any((a[:400] != b[:400]).any() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_later_scores_change_no_earlier_decision(name: str) -> None:
    """Checklist 5."""
    assert not sees_the_future(lambda: made(name))


def test_a_rule_that_judges_the_whole_span_is_caught() -> None:
    assert sees_the_future(SpanBH)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), by=st.floats(0.0, 50.0))
def test_a_stranger_score_alarms_if_a_less_strange_one_does(name: str, seed: int, by: float) -> None:
    rule = made(name).fit(np.abs(np.random.default_rng([seed, 1]).standard_normal(620)))
    rule.run(drawn(seed, 200))
    twin = restore_rule(rule.state())
    score = abs(float(np.random.default_rng([seed, 2]).standard_cauchy()))
    first, second = rule.step(score), twin.step(score + by)
    assert second.alarm >= first.alarm
    assert (second.threshold, second.low) == (first.threshold, first.low)  # levels come before the score


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "fixed"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), power=st.integers(-20, 20))
def test_another_unit_of_the_score_changes_no_alarm(name: str, seed: int, power: int) -> None:
    """Exact for powers of two, but for logarithms."""
    unit = 2.0**power
    calibration = np.abs(np.random.default_rng([seed, 1]).standard_normal(620))
    scores = drawn(seed, 400)
    left, right = made(name).fit(calibration).run(scores), made(name).fit(unit * calibration).run(unit * scores)
    np.testing.assert_allclose(right.threshold, unit * left.threshold, rtol=1e-7)
    np.testing.assert_array_equal(right.alarm, left.alarm)


@pytest.mark.parametrize(
    ("name", "setting", "small", "large"),
    [
        ("quantile", "alpha", 0.001, 0.05),
        ("rolling", "alpha", 0.001, 0.05),
        ("pot", "risk", 1e-5, 1e-3),
        ("lord", "level", 0.01, 0.3),
        ("lord_decay", "level", 0.01, 0.3),
        ("e_lond", "level", 0.01, 0.3),
        ("bh", "level", 0.01, 0.3),
        ("e_bh", "level", 0.01, 0.3),
    ],
)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_asking_for_more_alarms_gives_all_of_the_fewer_ones(
    name: str, setting: str, small: float, large: float, seed: int
) -> None:
    calibration = np.abs(np.random.default_rng([seed, 1]).standard_normal(620))
    scores = drawn(seed, 400)
    few, many = (made(name, **{setting: value}).fit(calibration).run(scores) for value in (small, large))
    assert not (few.alarm & ~many.alarm).any()
