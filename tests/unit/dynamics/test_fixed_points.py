"""Fixed points and cycles: closed-form cases, exhaustive enumeration, verification of every find."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tsforge.core.errors import ModelError
from tsforge.dynamics.fixed_points import (
    Cycle,
    SearchBudget,
    enumerate_cycles,
    find_cycles,
    is_enumerable,
    search_cycles,
)
from tsforge.dynamics.piecewise import piecewise_linear
from tsforge.ops.plrnn import Shallow

QUICK = SearchBudget(patience=500, starts=2000, inner=100, batch=250)


def vanilla(a1: float, a2: float, w1: float) -> Shallow:
    """The two-unit PLRNN of the closed-form cases, as a shallow map with W2 = I."""
    weight = np.array([[0.0, w1], [0.52505308, 0.0]])
    return Shallow(np.array([a1, a2]), weight, np.eye(2), np.array([0.37298253, -0.97931491]), np.zeros(2))


CASES = {
    "stable node": (-0.0222311, 0.96461297, -0.64375),
    "flip": (0.7, -0.7, -0.14375),
    "sixteen": (0.8377689, 0.96461297, -0.64375),
    "twenty-seven": (0.9777689, 0.96461297, -0.14375),
}
STATES = np.random.default_rng(0).normal(size=(200, 2)) * 2.0


def apply(params: Shallow, z: np.ndarray, steps: int, clipped: bool = False) -> np.ndarray:
    """Plain iteration from the formula of the map."""
    for _ in range(steps):
        bent = np.maximum(params.W2 @ z + params.h2, 0)
        if clipped:
            bent = bent - np.maximum(params.W2 @ z, 0)
        z = params.A * z + params.W1 @ bent + params.h1
    return z


def passes(cycle: Cycle, point: tuple[float, float], tolerance: float) -> bool:
    return bool((np.abs(cycle.points - np.array(point)).max(axis=1) < tolerance).any())


@pytest.mark.parametrize(
    ("case", "point", "modulus", "tolerance"),
    [
        ("stable node", (0.365, -22.261), 0.96461297, 1e-3),
        ("flip", (1.243, -0.192), 0.7, 1e-3),
        ("sixteen", (1.872, 0.108), 1.0706, 1e-3),
        ("twenty-seven", (2.019, 2.282), 1.0093, 1e-3),
    ],
)
@pytest.mark.parametrize("exhaustive", [True, False])
def test_checklist_8_11_fixed_points_of_the_closed_form_cases(case, point, modulus, tolerance, exhaustive) -> None:
    mapping = piecewise_linear(vanilla(*CASES[case]))
    found = enumerate_cycles(mapping) if exhaustive else search_cycles(mapping, STATES, budget=QUICK)
    assert len(found) == 1
    np.testing.assert_allclose(found[0].points[0], point, atol=tolerance)
    assert found[0].modulus == pytest.approx(modulus, abs=1e-4)


def test_checklist_8_11_first_case_has_its_closed_form() -> None:
    a1, a2, w1 = CASES["stable node"]
    (point,) = find_cycles(vanilla(a1, a2, w1), STATES)
    first = 0.37298253 / (1 - a1)
    second = (0.52505308 * first - 0.97931491) / (1 - a2)
    np.testing.assert_allclose(point.points[0], [first, second], rtol=1e-12)
    assert point.kind == "stable"
    assert point.modulus == pytest.approx(a2, abs=1e-12)


def test_checklist_8_11_exactly_two_16_cycles() -> None:
    params = vanilla(*CASES["sixteen"])
    found = find_cycles(params, STATES, periods=(16,), budget=QUICK)
    assert len(found) == 2
    unstable, stable = found
    assert (unstable.kind, stable.kind) == ("saddle", "stable")
    assert passes(stable, (2.160, 0.136), 1e-3)
    assert passes(unstable, (1.504, -0.076), 1e-3)
    assert stable.modulus == pytest.approx(0.5189, abs=1e-4)
    assert unstable.modulus == pytest.approx(1.6102, abs=1e-4)
    for cycle in found:
        np.testing.assert_allclose(apply(params, cycle.points[0], 16), cycle.points[0], atol=1e-8)


def test_checklist_8_11_no_cycle_of_2_to_15_steps() -> None:
    assert find_cycles(vanilla(*CASES["sixteen"]), STATES, periods=range(2, 16), budget=QUICK) == ()


def test_checklist_8_11_exactly_two_27_cycles() -> None:
    params = vanilla(*CASES["twenty-seven"])
    found = find_cycles(params, STATES, periods=range(2, 28), budget=QUICK)
    assert [cycle.period for cycle in found] == [27, 27]  # and no shorter one but the fixed point
    assert [cycle.kind for cycle in found] == ["saddle", "stable"]
    assert [cycle.modulus for cycle in found] == pytest.approx([1.132, 0.6932], abs=1e-3)
    for cycle in found:
        np.testing.assert_allclose(apply(params, cycle.points[0], 27), cycle.points[0], atol=1e-8)


def almost_linear(seed: int, latent: int, rectified: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Shallow]:
    """Native A, W, h of an AL-RNN and its shallow form (linear units through relu(x) - relu(-x))."""
    rng = np.random.default_rng(seed)
    a, weight, h = rng.uniform(-0.9, 0.9, latent), rng.normal(size=(latent, latent)), rng.normal(size=latent)
    straight = latent - rectified
    w1 = np.concatenate([weight, -weight[:, :straight]], axis=1)
    w2 = np.concatenate([np.eye(latent), -np.eye(latent)[:straight]])
    return a, weight, h, Shallow(a, w1, w2, h, np.zeros(len(w2)))


@pytest.mark.parametrize(
    ("seed", "latent", "rectified"), [(0, 8, 4), (4, 8, 6), (5, 8, 4), (9, 8, 4), (3, 7, 6), (4, 3, 3)]
)
def test_checklist_8_11_almost_linear_enumeration_equals_the_search(seed, latent, rectified) -> None:
    a, weight, h, params = almost_linear(seed, latent, rectified)
    expected = []
    for signs in itertools.product([0.0, 1.0], repeat=rectified):  # from the native form, one region at a time
        gate = np.concatenate([np.ones(latent - rectified), signs])
        z = np.linalg.solve(np.eye(latent) - np.diag(a) - weight * gate, h)
        if ((z[latent - rectified :] > 0) == (gate[latent - rectified :] > 0)).all():
            expected.append(z)
    mapping = piecewise_linear(params)
    assert mapping.kinks == rectified  # the linear units leave no kink
    states = np.random.default_rng(seed).normal(size=(100, latent))
    for found in (enumerate_cycles(mapping), search_cycles(mapping, states, budget=QUICK)):
        points = sorted((cycle.points[0] for cycle in found), key=lambda z: z[0])
        assert len(points) == len(expected)
        np.testing.assert_allclose(points, sorted(expected, key=lambda z: z[0]), rtol=1e-8, atol=1e-9)


def test_the_almost_linear_cases_have_several_fixed_points() -> None:
    counts = [len(enumerate_cycles(piecewise_linear(almost_linear(s, m, p)[3]))) for s, m, p in [(0, 8, 4), (4, 8, 6)]]
    assert counts == [2, 5]


def cycles_by_hand(a: np.ndarray, weight: np.ndarray, h: np.ndarray, rectified: int, period: int) -> list[np.ndarray]:
    """Return the cycles [k, M] of an AL-RNN, of least period k, from the native form: every order of regions is tried.

    Each begins at its point of least first entry.
    """
    latent = len(a)
    straight = latent - rectified
    pieces = [
        np.diag(a) + weight * np.concatenate([np.ones(straight), signs])
        for signs in itertools.product([0.0, 1.0], repeat=rectified)
    ]
    found: list[np.ndarray] = []
    for order in itertools.product(pieces, repeat=period):
        product, shift = np.eye(latent), np.zeros(latent)
        for piece in order:
            product, shift = piece @ product, piece @ shift + h
        z = np.linalg.solve(np.eye(latent) - product, shift)
        points = [z]
        for piece in order:  # a point lies in the region that it was solved for if the map takes it the same way
            bent = np.concatenate([points[-1][:straight], np.maximum(points[-1][straight:], 0.0)])
            points.append(a * points[-1] + weight @ bent + h)
            if np.abs(points[-1] - (piece @ points[-2] + h)).max() > 1e-9:
                break
        else:
            orbit = np.array(points[:-1])
            gaps = np.abs(orbit[1:] - z).max(axis=1)
            orbit = np.roll(orbit, -int(orbit[:, 0].argmin()), axis=0)
            known = any(np.abs(orbit - other).max() < 1e-7 for other in found)
            if not known and not (gaps < 1e-7).any():
                found.append(orbit)
    return found


@pytest.mark.parametrize(
    ("seed", "latent", "rectified", "period", "count"),
    [(40, 2, 1, 3, 2), (183, 2, 2, 2, 2), (209, 3, 2, 2, 3), (97, 5, 2, 3, 3), (156, 3, 3, 3, 2), (212, 5, 3, 3, 6)],
)
def test_checklist_8_11_almost_linear_cycles_equal_the_search(seed, latent, rectified, period, count) -> None:
    a, weight, h, params = almost_linear(seed, latent, rectified)
    expected = sorted(cycles_by_hand(a, weight, h, rectified, period), key=lambda orbit: orbit[0, 0])
    assert len(expected) == count
    mapping = piecewise_linear(params)
    assert mapping.kinks == rectified
    states = np.random.default_rng(seed).normal(size=(100, latent))
    for found in (enumerate_cycles(mapping, period), search_cycles(mapping, states, period, budget=QUICK)):
        assert {cycle.period for cycle in found} == {period}
        orbits = [np.roll(cycle.points, -int(cycle.points[:, 0].argmin()), axis=0) for cycle in found]
        assert len(orbits) == len(expected)
        np.testing.assert_allclose(sorted(orbits, key=lambda orbit: orbit[0, 0]), expected, rtol=1e-8, atol=1e-9)


def clipped_map(seed: int, latent: int = 3, hidden: int = 50, gain: float = 1.0) -> Shallow:
    rng = np.random.default_rng(seed)
    return Shallow(
        rng.uniform(0.3, 0.9, latent),
        gain * rng.normal(size=(latent, hidden)) / math.sqrt(hidden),
        gain * rng.normal(size=(hidden, latent)),
        0.1 * rng.normal(size=latent),
        rng.normal(size=hidden),
    )


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("clipped", [False, True])
def test_checklist_8_11_every_find_of_a_random_map_returns_to_itself(period, clipped) -> None:
    params = clipped_map(3, gain=1.5)
    found = find_cycles(
        params, np.random.default_rng(1).normal(size=(300, 3)), periods=(period,), clipped=clipped, budget=QUICK
    )
    if clipped and period == 1:  # bounded, so it has a fixed point (Brouwer)
        assert found
    for cycle in found:
        assert cycle.period == period
        back = apply(params, cycle.points[0], period, clipped)
        assert np.abs(back - cycle.points[0]).max() < 1e-8 * max(1.0, np.abs(back).max())
        for shorter in range(1, period):  # the period is the least one
            assert np.abs(apply(params, cycle.points[0], shorter, clipped) - cycle.points[0]).max() > 1e-6
    firsts = [cycle.points for cycle in found]
    for one, other in itertools.combinations(firsts, 2):
        assert np.abs(one[:, None] - other[None]).max(axis=2).min() > 1e-6


def test_multipliers_are_those_of_a_finite_difference() -> None:
    params = clipped_map(3, gain=1.5)
    found = find_cycles(params, np.random.default_rng(1).normal(size=(300, 3)), periods=(1, 2), clipped=True)
    for cycle in found:
        step = 1e-7
        columns = [
            (apply(params, cycle.points[0] + step * e, cycle.period, True) - cycle.points[0]) / step for e in np.eye(3)
        ]
        values = np.linalg.eigvals(np.array(columns).T)
        np.testing.assert_allclose(np.sort(np.abs(values)), np.sort(np.abs(cycle.multipliers)), rtol=1e-4, atol=1e-6)


def test_search_finds_every_fixed_point_that_a_grid_of_starts_finds() -> None:
    """A map with two stable fixed points and a saddle between them, found also when the data show one side only."""
    params = Shallow(np.zeros(1), np.array([[2.0, -2.0]]), np.ones((2, 1)), np.array([-1.0]), np.array([0.5, -0.5]))
    one_side = np.full((20, 1), 1.0)
    found = search_cycles(piecewise_linear(params), one_side + 0.01 * np.arange(20)[:, None], budget=QUICK)
    np.testing.assert_allclose(sorted(cycle.points[0, 0] for cycle in found), [-1.0, 0.0, 1.0], atol=1e-12)
    assert sorted(cycle.kind for cycle in found) == ["stable", "stable", "unstable"]


@pytest.mark.parametrize("gain", [1.5, 3.0])
def test_no_fixed_point_of_a_bounded_map_is_missed_by_the_index_theorem(gain) -> None:
    """A bounded map has sum of sign det(I - J) = 1 over its fixed points, so one missing or doubled point shows."""
    states = np.random.default_rng(1).normal(size=(500, 3))
    counts = []
    for seed in range(6):
        found = find_cycles(clipped_map(seed, gain=gain), states, clipped=True)
        assert sum(np.sign(np.prod(1 - cycle.multipliers).real) for cycle in found) == 1
        counts.append(len(found))
    assert max(counts) >= 7


def test_points_closer_than_two_decimals_stay_apart() -> None:
    """A tent of height 1e-3 around the identity: three fixed points 0.002 apart."""
    params = Shallow(
        np.array([0.5]), np.array([[1.0, -1.0]]), np.ones((2, 1)), np.array([-0.001]), np.array([1e-3, -1e-3])
    )
    found = find_cycles(params, np.zeros((1, 1)))
    assert len(found) == 3
    assert len({round(float(cycle.points[0, 0]), 2) for cycle in found}) < 3


def test_merging_units_does_not_change_the_map() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(6, 3))
    w2 = np.concatenate([normal, -normal[:3], normal[3:5], np.zeros((1, 3))])
    h2 = rng.normal(size=6)
    h2 = np.concatenate([h2, -h2[:3], h2[3:5], [0.7]])
    params = Shallow(rng.normal(size=3), rng.normal(size=(3, 12)), w2, rng.normal(size=3), h2)
    for clipped in (False, True):
        mapping = piecewise_linear(params, clipped=clipped)
        z = rng.normal(size=(50, 3))
        np.testing.assert_allclose(mapping.step(z), [apply(params, row, 1, clipped) for row in z], atol=1e-12)
    assert piecewise_linear(params).kinks == 6


def test_report_of_a_cycle_is_plain() -> None:
    import json

    found = find_cycles(vanilla(*CASES["flip"]), STATES)
    record = json.loads(json.dumps(found[0].to_dict()))
    assert record["period"] == 1
    assert record["kind"] == "stable"
    assert record["residual"] < 1e-8


def test_wrong_input_is_refused() -> None:
    params = vanilla(*CASES["flip"])
    grouped = Shallow(*(np.stack([part, part]) for part in params))
    with pytest.raises(ModelError, match="pick one group"):
        find_cycles(grouped, STATES)
    with pytest.raises(ModelError, match=r"states must be \(T, 2\)"):
        find_cycles(params, np.zeros((5, 3)))
    with pytest.raises(ModelError, match="not finite"):
        find_cycles(params._replace(h1=np.array([np.nan, 0.0])), STATES)
    with pytest.raises(ModelError, match="period"):
        find_cycles(params, STATES, periods=(0,))
    with pytest.raises(ModelError, match="too many to enumerate"):
        enumerate_cycles(piecewise_linear(params), 7)
    with pytest.raises(ModelError, match="budget"):
        SearchBudget(patience=0)
    assert is_enumerable(piecewise_linear(params), 6)
    assert not is_enumerable(piecewise_linear(params), 7)
