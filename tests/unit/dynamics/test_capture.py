"""Capture test: maps whose long run is known, one for each kind of end."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tsforge.core.errors import ModelError
from tsforge.dynamics.capture import KINDS, CaptureSettings, capture_test
from tsforge.dynamics.findings import judge
from tsforge.ops.plrnn import Shallow

SMALL = CaptureSettings(runs=40, steps=3000, tangent_steps=1000)
SLOPE = 1.9
# A tent map on [0, 1]; left of -1 the slope is 0.5, which makes -2.8 an attracting fixed point of everything below 0.
TENT = Shallow(
    np.array([SLOPE]), np.array([[-2 * SLOPE, 1.4]]), np.array([[1.0], [-1.0]]), np.zeros(1), np.array([-0.5, -1.0])
)
INSIDE = np.linspace(0.05, 0.95, 200)[:, None]


def turning(modulus: float, angle: float = 1.0, stretch: float = 1.0) -> Shallow:
    """A turn by ``angle`` with a factor, its side part through relu(x) - relu(-x); along ellipses ``stretch`` long."""
    side = modulus * math.sin(angle) * np.array([[0.0, -stretch], [1.0 / stretch, 0.0]])
    return Shallow(
        np.full(2, modulus * math.cos(angle)),
        np.concatenate([side, -side], axis=1),
        np.concatenate([np.eye(2), -np.eye(2)]),
        np.zeros(2),
        np.zeros(4),
    )


def test_chaos_expands_at_its_lyapunov_exponent() -> None:
    capture = capture_test(TENT, INSIDE, settings=SMALL)
    assert capture.share("expanding") == 1.0
    np.testing.assert_allclose(capture.growth, math.log(SLOPE), atol=1e-12)
    assert not capture.beyond.any()
    assert not capture.periods.any()


def test_runs_of_a_bistable_map_are_told_apart() -> None:
    states = np.concatenate([INSIDE[:150], np.full((50, 1), -0.5)])
    capture = capture_test(TENT, states, settings=SMALL)
    assert capture.share("fixed") == pytest.approx(0.25, abs=0.03)
    assert capture.share("expanding") == pytest.approx(0.75, abs=0.03)
    fixed = capture.kinds == KINDS.index("fixed")
    np.testing.assert_allclose(capture.ends[fixed], -2.8, atol=1e-9)
    np.testing.assert_allclose(capture.growth[fixed], math.log(0.5), atol=1e-12)
    assert (capture.beyond == fixed).all()
    report = capture.to_dict()
    assert report["kept"]["expanding"] == report["expanding"]
    assert report["fixed"] > 0.2
    assert report["kept"]["fixed"] == 0.0


def test_a_stable_cycle_contracts_and_shows_its_period() -> None:
    weight = np.array([[0.0, -0.64375], [0.52505308, 0.0]])
    params = Shallow(
        np.array([0.8377689, 0.96461297]), weight, np.eye(2), np.array([0.37298253, -0.97931491]), np.zeros(2)
    )
    capture = capture_test(params, np.random.default_rng(0).normal(size=(40, 2)) + 2.0, settings=SMALL)
    assert capture.share("contracting") == 1.0
    assert set(capture.periods.tolist()) == {16}
    np.testing.assert_allclose(capture.growth, math.log(0.5189) / 16, atol=2e-3)
    assert capture.to_dict()["settled"] == {"16": 1.0}


@pytest.mark.parametrize("steps", [101, 105, 111, 255, 1001])
def test_growth_is_exact_for_any_number_of_steps(steps: int) -> None:
    settings = CaptureSettings(runs=20, steps=600, tangent_steps=steps)
    capture = capture_test(turning(0.999), np.random.default_rng(0).normal(size=(20, 2)), settings=settings)
    np.testing.assert_allclose(capture.growth, math.log(0.999), rtol=1e-6)


@pytest.mark.parametrize(("modulus", "kind"), [(1.0, "near_zero"), (0.998, "contracting"), (0.9, "fixed")])
def test_turning_maps(modulus: float, kind: str) -> None:
    settings = CaptureSettings(runs=40, steps=1000, tangent_steps=1000)
    capture = capture_test(turning(modulus), np.random.default_rng(0).normal(size=(40, 2)), settings=settings)
    assert capture.share(kind) == 1.0
    np.testing.assert_allclose(capture.growth, math.log(modulus), atol=1e-6)


def test_slow_chaos_is_told_by_a_smaller_rate_and_noted_before() -> None:
    slope = 1.0007  # grows by 7e-4 a step
    tent = Shallow(
        np.array([slope]), np.array([[-2 * slope, 0.0]]), np.array([[1.0], [-1.0]]), np.zeros(1), np.array([-0.5, -1.0])
    )
    states = np.linspace(0.45, 0.5, 200)[:, None]
    usual = capture_test(tent, states, settings=SMALL)
    assert usual.share("near_zero") == 1.0
    (note,) = [text for text in judge((), usual)[1] if "slow chaos" in text]
    assert "all grow, by 0.0007 a step" in note
    exact = capture_test(tent, states, settings=replace(SMALL, near_zero=1e-4))
    assert exact.share("expanding") == 1.0
    turn = capture_test(turning(1.0), np.random.default_rng(0).normal(size=(40, 2)), settings=SMALL)
    assert not any("slow chaos" in text for text in judge((), turn)[1])


def test_a_cycle_that_stretches_deviations_within_each_turn_is_neither_growing_nor_shrinking() -> None:
    """A turn takes 1,100 steps and swells a deviation up to a million times, so the two ends of 5,000 steps differ."""
    rng = np.random.default_rng(0)
    phase = rng.uniform(0.0, 2.0 * math.pi, 60)
    states = np.column_stack([1e6 * np.cos(phase), np.sin(phase)])
    settings = CaptureSettings(runs=60, steps=3000, tangent_steps=5000)
    capture = capture_test(turning(1.0, 2.0 * math.pi / 1100.0, 1e6), states, settings=settings)
    assert capture.share("near_zero") == 1.0


def test_divergence_is_reported_also_when_it_comes_late() -> None:
    states = np.random.default_rng(0).normal(size=(40, 2))
    early = capture_test(turning(1.5), states, settings=SMALL)  # 1.5^3000 overflows in the free run
    late = capture_test(turning(1.2), states, settings=SMALL)  # 1.2^3000 does not, 1.2^4100 does
    for capture in (early, late):
        assert capture.share("diverged") == 1.0
        assert capture.beyond.all()
        assert capture.to_dict()["growth"] is None


def test_a_deviation_may_vanish_exactly() -> None:
    constant = Shallow(np.zeros(1), np.zeros((1, 1)), np.ones((1, 1)), np.full(1, 0.3), np.zeros(1))
    capture = capture_test(constant, INSIDE, settings=SMALL)
    assert capture.share("fixed") == 1.0
    json.dumps(capture.to_dict(), allow_nan=False)


def test_clipped_tensors_give_the_result_of_their_plain_form() -> None:
    rng = np.random.default_rng(5)
    arrays = [rng.uniform(0.2, 0.8, 3), rng.normal(size=(3, 8)), rng.normal(size=(8, 3)), rng.normal(size=3)]
    h2 = rng.normal(size=8)
    clipped = Shallow(*(torch.tensor(part) for part in (*arrays, h2)))
    a, w1, w2, h1 = arrays
    plain = Shallow(a, np.concatenate([w1, -w1], 1), np.concatenate([w2, w2]), h1, np.concatenate([h2, np.zeros(8)]))
    states = rng.normal(size=(30, 3))
    one = capture_test(clipped, states, clipped=True, settings=SMALL)
    other = capture_test(plain, states, settings=SMALL)
    assert one.to_dict()["settled"] == other.to_dict()["settled"]
    np.testing.assert_allclose(one.growth, other.growth, atol=1e-2)


def test_shares_add_up_and_the_report_is_plain() -> None:
    record = json.loads(json.dumps(capture_test(TENT, INSIDE, settings=SMALL).to_dict(), allow_nan=False))
    assert sum(record[kind] for kind in KINDS) == pytest.approx(1.0)
    assert record["runs"] == 40


def test_wrong_settings_and_states_are_refused() -> None:
    for wrong in ({"runs": 0}, {"steps": 100}, {"tangent_steps": 5}, {"near_zero": -1.0}, {"far": 0.0}):
        with pytest.raises(ModelError, match="capture test needs"):
            CaptureSettings(**wrong)
    with pytest.raises(ModelError, match=r"\(T, 1\)"):
        capture_test(TENT, np.zeros((5, 2)), settings=SMALL)
