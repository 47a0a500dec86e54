"""Gap filling: closed-form precision, conditional expectation and the Kalman filter agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autoregression_oracles import kalman_forecast
from statsmodels.tsa.statespace.sarimax import SARIMAX

from tsforge.core.errors import ModelError
from tsforge.ops import kalman
from tsforge.ops.ar_process import draw_weights
from tsforge.ops.kalman import conditional_fill, precision_matrix
from tsforge.ops.stability import impulse_response


def covariance(weight: np.ndarray, length: int) -> np.ndarray:
    """Autocovariances of unit noise from a long impulse response: an independent oracle."""
    psi = impulse_response(torch.from_numpy(weight), 4000).numpy()
    acov = [psi[: len(psi) - lag] @ psi[lag:] for lag in range(length)]
    return np.array([[acov[abs(i - j)] for j in range(length)] for i in range(length)])


@pytest.mark.parametrize(("order", "length"), [(1, 1), (1, 4), (3, 3), (3, 4), (4, 11)])
def test_precision_is_the_inverse_covariance(order: int, length: int) -> None:
    weight = draw_weights(order, np.random.default_rng(order), limit=0.8)
    product = precision_matrix(torch.from_numpy(weight), length).numpy() @ covariance(weight, length)
    np.testing.assert_allclose(product, np.eye(length), atol=1e-8)


def test_precision_refuses_more_lags_than_rows() -> None:
    with pytest.raises(ModelError, match="at least 3 rows"):
        precision_matrix(torch.tensor([0.1, 0.1, 0.1]), 2)


@pytest.mark.parametrize("missing", [0.2, 0.4, 0.8])
def test_fill_is_the_gaussian_conditional_mean(missing: float) -> None:
    rng = np.random.default_rng(0)
    weight = np.array([0.2, 0.3, -0.5])
    values, mask = rng.normal(size=(20, 9)), rng.random((20, 9)) > missing
    mask[0], mask[1] = True, False
    gamma = covariance(weight, 9)
    filled = conditional_fill(
        precision_matrix(torch.from_numpy(weight), 9),
        torch.from_numpy(np.where(mask, values, 99.0)),
        torch.from_numpy(mask),
    ).numpy()
    for row in range(20):
        seen = mask[row]
        expected = np.where(seen, values[row], 0.0)
        if seen.any():
            expected[~seen] = gamma[np.ix_(~seen, seen)] @ np.linalg.solve(gamma[np.ix_(seen, seen)], values[row, seen])
        np.testing.assert_allclose(filled[row], expected, atol=1e-9)


@pytest.mark.parametrize(("root", "sound"), [(0.99, True), (1.0, False)])
def test_rows_of_few_values_near_the_unit_circle(root: float, sound: bool) -> None:
    """The system of the values needs the covariance; where that does not exist, the one of the gaps stands in."""
    precision = precision_matrix(torch.tensor([root], dtype=torch.float64), 12)
    assert (kalman._covariance(precision) is not None) == sound
    values, mask = torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.bool)
    for row, place, value in ((0, 2, 3.0), (1, 2, 3.0), (1, 8, -1.0)):
        values[row, place], mask[row, place] = value, True
    many = conditional_fill(precision, values.repeat(4, 1), mask.repeat(4, 1)).numpy()  # enough for the covariance
    filled = conditional_fill(precision, values, mask).numpy()
    assert np.allclose(many, np.tile(filled, (4, 1)), atol=1e-9)
    assert filled[0] == pytest.approx(3.0 * root ** np.abs(np.arange(12) - 2))
    between = filled[1, 3:8]
    ahead, back = root ** np.arange(1, 6), root ** np.arange(5, 0, -1)
    gamma = np.array([[1.0, root**6], [root**6, 1.0]])
    expected = (
        np.stack([ahead, back], axis=1) @ np.linalg.solve(gamma, [3.0, -1.0]) if sound else np.linspace(3, -1, 7)[1:-1]
    )
    assert between == pytest.approx(expected)


def test_fill_in_blocks_equals_fill_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    precision = precision_matrix(torch.tensor([0.6, -0.2], dtype=torch.float64), 8)
    values, mask = torch.from_numpy(rng.normal(size=(30, 8))), torch.from_numpy(rng.random((30, 8)) > 0.5)
    whole = conditional_fill(precision, values, mask)
    monkeypatch.setattr(kalman, "_MAX_SOLVE_ENTRIES", 20)
    torch.testing.assert_close(conditional_fill(precision, values, mask), whole, atol=1e-12, rtol=0)


def test_filter_forecast_equals_forecast_from_filled_values() -> None:
    rng = np.random.default_rng(2)
    weight = np.array([0.5, 0.2, -0.3])
    values, mask = rng.normal(size=15), rng.random(15) > 0.4
    mask[-2:] = False  # a block of gaps right before the origin
    filled = conditional_fill(
        precision_matrix(torch.from_numpy(weight), 15), torch.from_numpy(values)[None], torch.from_numpy(mask)[None]
    )[0].numpy()
    path = list(filled)
    for _ in range(6):
        path.append(weight @ np.array(path[-1:-4:-1]))
    found = kalman_forecast(weight, 1.0, values, mask, 6)
    np.testing.assert_allclose(found.mean, path[15:], atol=1e-12)
    assert (np.diff(found.variance) > -1e-12).all()


def test_filter_forecast_equals_that_of_statsmodels() -> None:
    rng = np.random.default_rng(3)
    weight = np.array([0.5, 0.2, -0.3])
    values, mask = rng.normal(size=40), rng.random(40) > 0.3
    mask[-2:] = False
    model = SARIMAX(np.where(mask, values, np.nan), order=(3, 0, 0))
    expected = model.smooth(np.r_[weight, 2.0]).get_forecast(6)
    found = kalman_forecast(weight, 2.0, values, mask, 6)
    np.testing.assert_allclose(found.mean, expected.predicted_mean, atol=1e-8)
    np.testing.assert_allclose(found.variance, expected.var_pred_mean, rtol=1e-8)


def test_filter_variance_without_gaps_is_the_sum_of_squared_responses() -> None:
    weight = np.array([0.5, 0.2, -0.3])
    found = kalman_forecast(weight, 4.0, np.zeros(10), np.ones(10, dtype=bool), 5)
    psi = impulse_response(torch.from_numpy(weight), 5).numpy()
    np.testing.assert_allclose(found.variance, 4.0 * np.cumsum(psi**2), rtol=1e-9)
