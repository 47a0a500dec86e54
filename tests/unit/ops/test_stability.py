"""Roots, impulse response and multi-step weights against matrix powers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsforge.ops.ar_process import draw_weights
from tsforge.ops.stability import companion, forecast_scale, impulse_response, multi_step_weights, roots


@pytest.mark.parametrize("order", [1, 2, 5])
def test_multi_step_weights_are_first_rows_of_companion_powers(order: int) -> None:
    weight = draw_weights(order, np.random.default_rng(order))
    found = multi_step_weights(torch.from_numpy(weight), 7).numpy()
    for step in range(7):
        np.testing.assert_allclose(found[step], np.linalg.matrix_power(companion(weight), step + 1)[0], atol=1e-12)


def test_multi_step_weights_have_exact_gradients_and_no_lags_is_allowed() -> None:
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: multi_step_weights(w, 4), (weight,))
    assert multi_step_weights(torch.zeros(2, 0), 4).shape == (2, 4, 0)
    assert impulse_response(torch.zeros(2, 0), 3).tolist() == [[1.0, 0.0, 0.0]] * 2


def test_impulse_response_is_the_answer_to_one_shock() -> None:
    weight = np.array([0.5, -0.3, 0.2])
    values = [0.0, 0.0, 0.0, 1.0]
    for _ in range(9):
        values.append(weight @ np.array(values[-1:-4:-1]))
    np.testing.assert_allclose(impulse_response(torch.from_numpy(weight), 10).numpy(), values[3:], atol=1e-14)


def test_forecast_scale_of_ar1_is_the_geometric_sum() -> None:
    scale = forecast_scale(torch.tensor([0.8], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64), 5)
    expected = [2.0 * np.sqrt(sum(0.8 ** (2 * k) for k in range(h + 1))) for h in range(5)]
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-12)


def test_roots_give_cycle_and_half_life() -> None:
    modulus, cycle = 0.9, 12.0
    angle = 2 * np.pi / cycle
    found = roots(np.array([2 * modulus * np.cos(angle), -(modulus**2), 0.0]))  # a trailing zero adds no root
    assert len(found) == 1
    assert found[0].modulus == pytest.approx(modulus)
    assert found[0].cycle_length == pytest.approx(cycle)
    assert found[0].half_life == pytest.approx(np.log(0.5) / np.log(modulus))
    assert roots(np.array([-0.5]))[0].cycle_length == pytest.approx(2.0)
    assert roots(np.array([1.0]))[0].half_life == np.inf
    assert roots(np.zeros(3)) == []
