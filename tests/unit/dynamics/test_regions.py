"""Linear regions along an orbit: a tent map whose symbolic code is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tsforge.core.errors import ModelError
from tsforge.dynamics.piecewise import piecewise_linear
from tsforge.dynamics.regions import visited_regions
from tsforge.ops.plrnn import Shallow

# Slope s left of 0.5, -s right of it.
SLOPE = 1.9
TENT = Shallow(np.array([SLOPE]), np.array([[-2 * SLOPE]]), np.ones((1, 1)), np.zeros(1), np.array([-0.5]))


def tent_orbit(steps: int) -> np.ndarray:
    z, orbit = 0.3123, []
    for _ in range(steps):
        orbit.append(z)
        z = SLOPE * min(z, 1 - z)
    return np.array(orbit)[:, None]


def test_codes_counts_and_transitions_of_a_known_orbit() -> None:
    states = np.array([0.1, 0.7, 0.8, 0.2, 0.9, 0.6, 0.7])[:, None]
    visits = visited_regions(TENT, states)
    assert visits.codes.tolist() == [1, 0, 0, 1, 0, 0, 0]  # region 0, the most visited: right of 0.5
    assert visits.counts.tolist() == [5, 2]
    assert visits.patterns.tolist() == [[True], [False]]
    np.testing.assert_allclose(visits.transition_matrix(), [[0.75, 0.25], [1.0, 0.0]])
    share = np.array([5, 2]) / 7
    assert visits.entropy == pytest.approx(-(share * np.log(share)).sum())
    assert visits.entropy_rate == pytest.approx(4 / 6 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def block_entropy(codes: np.ndarray, length: int) -> float:
    """Return the entropy of words of ``length`` symbols in nats; its increments tend to the entropy rate."""
    counts = np.unique(np.lib.stride_tricks.sliding_window_view(codes, length), axis=0, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def test_entropy_of_the_code_tends_to_the_lyapunov_exponent_of_the_tent_map() -> None:
    visits = visited_regions(TENT, tent_orbit(60_000))
    rates = [block_entropy(visits.codes, n + 1) - block_entropy(visits.codes, n) for n in (1, 8)]
    assert rates[0] == pytest.approx(visits.entropy_rate, abs=1e-3)
    assert rates[1] == pytest.approx(math.log(SLOPE), abs=0.02)
    assert rates[0] > rates[1]


def test_a_clipped_map_has_the_regions_of_both_hyperplanes() -> None:
    params = Shallow(np.array([0.5]), np.array([[1.0]]), np.ones((1, 1)), np.zeros(1), np.array([0.4]))
    states = np.array([-1.0, -0.2, 0.3, 2.0])[:, None]
    visits = visited_regions(params, states, clipped=True)
    assert sorted(visits.patterns.tolist()) == [[False, False], [True, False], [True, True]]
    assert visits.counts.tolist() == [2, 1, 1]


def test_linear_units_of_an_almost_linear_map_make_no_regions() -> None:
    straight = np.array([[0.3, -0.3, 0.2], [0.1, -0.1, 0.4]])
    units = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    params = Shallow(torch.full((2,), 0.2), *map(torch.tensor, (straight, units)), torch.zeros(2), torch.zeros(3))
    visits = visited_regions(params, np.random.default_rng(0).normal(size=(300, 2)))
    assert visits.patterns.shape == (2, 1)
    linear = visited_regions(params._replace(W1=torch.zeros(2, 3)), np.zeros((4, 2)))
    assert linear.to_dict() == {
        "regions": 1,
        "largest_share": 1.0,
        "transitions": 1,
        "entropy": 0.0,
        "entropy_rate": 0.0,
    }


def test_affine_pieces_compose_to_the_map() -> None:
    rng = np.random.default_rng(2)
    params = Shallow(
        rng.normal(size=3) / 2,
        rng.normal(size=(3, 9)) / 3,
        rng.normal(size=(9, 3)),
        rng.normal(size=3),
        rng.normal(size=9),
    )
    mapping = piecewise_linear(params, clipped=True)
    orbit = mapping.orbit(rng.normal(size=(20, 3)), 5)
    product, shift = mapping.affine(np.moveaxis(mapping.pattern(orbit[:-1]), 0, 1))
    np.testing.assert_allclose((product @ orbit[0][..., None])[..., 0] + shift, orbit[-1], atol=1e-10)


def test_report_is_plain_and_wrong_input_is_refused() -> None:
    visits = visited_regions(TENT, tent_orbit(100))
    assert json.loads(json.dumps(visits.to_dict()))["regions"] == 2
    assert visited_regions(TENT, np.zeros((1, 1))).entropy_rate == 0.0
    with pytest.raises(ModelError, match="at least one row"):
        visited_regions(TENT, np.zeros((0, 1)))
    with pytest.raises(ModelError, match="not finite"):
        visited_regions(TENT, np.array([[np.nan]]))
