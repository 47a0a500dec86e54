"""Point metrics against naive loops, published definitions and hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tsforge.core.errors import DataError
from tsforge.metrics.point import (
    ErrorSums,
    mae,
    mase,
    mse,
    msle,
    rmse,
    scored_cells,
    seasonal_scale,
    smape,
)


@pytest.fixture
def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    target = rng.normal(5.0, 3.0, (11, 4, 3))
    forecast = target + rng.normal(0.0, 1.0, target.shape)
    mask = rng.random(target.shape) > 0.3
    target[2, 1, 0] = np.nan
    mask[:, :, 2] &= np.arange(11)[:, None] < 0  # the last variate is never observed
    return target, forecast, mask


def loop_mean(target, forecast, mask, error, keep) -> tuple[float, int]:
    total, count = 0.0, 0
    for i in range(target.shape[0]):
        for h in range(target.shape[1]):
            for v in range(target.shape[2]):
                if keep(h, v) and mask[i, h, v] and not math.isnan(target[i, h, v]):
                    total += error(float(target[i, h, v]), float(forecast[i, h, v]))
                    count += 1
    return (total / count if count else math.nan), count


ERRORS = {
    "mse": (mse, lambda y, f: (y - f) ** 2),
    "mae": (mae, lambda y, f: abs(y - f)),
    "smape": (smape, lambda y, f: 200 * abs(y - f) / (abs(y) + abs(f))),
}


@pytest.mark.parametrize("name", ERRORS)
def test_means_equal_a_loop_overall_per_step_and_per_variate(name: str, windows) -> None:
    metric, error = ERRORS[name]
    target, forecast, mask = windows
    value, count = loop_mean(target, forecast, mask, error, lambda h, v: True)
    score = metric(target, forecast, mask)
    assert score.value == pytest.approx(value, rel=1e-13)
    assert score.count == count
    per_step, per_variate = metric(target, forecast, mask, axis=(0, 2)), metric(target, forecast, mask, axis=(0, 1))
    for h in range(4):
        value, count = loop_mean(target, forecast, mask, error, lambda step, v, h=h: step == h)
        assert per_step.value[h] == pytest.approx(value, rel=1e-13)
        assert per_step.count[h] == count
    assert math.isnan(per_variate.value[2])
    assert per_variate.count[2] == 0


def test_rmse_takes_the_root_last(windows) -> None:
    target, forecast, mask = windows
    assert rmse(target, forecast, mask).value == pytest.approx(math.sqrt(mse(target, forecast, mask).value))


def test_msle_takes_forecasts_below_zero_for_zero_and_refuses_such_targets() -> None:
    target, forecast = np.array([[0.0, 3.0], [7.0, np.nan]]), np.array([[-5.0, 4.0], [6.0, 1.0]])
    expected = [0.0, math.log(4 / 5) ** 2, math.log(8 / 7) ** 2]
    score = msle(target, forecast)
    assert score.value == pytest.approx(sum(expected) / 3)
    assert score.count == 3
    mask = np.array([[True, False], [True, True]])
    assert msle(target, forecast, mask, axis=0).value[0] == pytest.approx((expected[0] + expected[2]) / 2)
    with pytest.raises(DataError, match="1 scored targets are below 0"):
        msle(np.array([-1.0, 2.0]), np.array([1.0, 2.0]))


def test_smape_known_values() -> None:
    assert smape([100.0], [110.0]).value == pytest.approx(100 * 20 / 210)
    assert smape([0.0, 0.0], [0.0, 1.0]).value == pytest.approx(100.0)  # equal zeros score 0, opposite extremes 200


def test_missing_target_is_left_out_but_missing_forecast_is_not() -> None:
    assert mse([1.0, np.nan], [2.0, 5.0]).value == 1.0
    assert math.isnan(mse([1.0, 2.0], [2.0, np.nan]).value)
    assert mse([1.0, 2.0], [2.0, np.nan], mask=[True, False]).value == 1.0


def test_infinite_target_and_wrong_mask_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 observed targets are infinite"):
        mse([1.0, np.inf], [1.0, 1.0])
    with pytest.raises(DataError, match="mask has shape"):
        scored_cells(np.zeros((2, 3)), np.ones((3, 2), dtype=bool))


def test_mase_by_hand() -> None:
    # training 1 3 2 6, season 2: |2-1|, |6-3| -> mean 2; errors 1 and 5 -> 3 / 2
    scale = seasonal_scale([[1.0], [3.0], [2.0], [6.0]], 2)
    assert scale.value == pytest.approx([2.0])
    assert scale.count.tolist() == [2]
    assert mase([[10.0], [10.0]], [[11.0], [15.0]], scale.value).value == pytest.approx(1.5)


def test_seasonal_scale_skips_pairs_with_a_gap() -> None:
    scale = seasonal_scale([[1.0], [np.nan], [4.0], [5.0]], 1)
    assert scale.value == pytest.approx([1.0])
    assert scale.count.tolist() == [1]


def test_mase_is_undefined_for_constants_and_says_how_many_cells_it_used() -> None:
    training = np.column_stack([np.full(9, 7.0), np.arange(9.0)])
    scale = seasonal_scale(training, 1)
    assert math.isnan(scale.value[0])
    score = mase(np.zeros((5, 2)), np.ones((5, 2)), scale.value)
    assert (float(score.value), int(score.count)) == (1.0, 5)
    alone = mase(np.zeros((5, 1)), np.ones((5, 1)), scale.value[:1])
    assert math.isnan(alone.value)
    assert alone.count == 0


def test_a_span_shorter_than_the_season_has_no_scale() -> None:
    scale = seasonal_scale(np.arange(5.0)[:, None], 24)
    assert math.isnan(scale.value[0])
    assert scale.count[0] == 0
    with pytest.raises(DataError, match="at least 1"):
        seasonal_scale(np.zeros((3, 1)), 0)


def test_running_sums_equal_the_whole(windows) -> None:
    target, forecast, mask = windows
    sums = ErrorSums(4, 3)
    for part in (slice(0, 4), slice(4, 5), slice(5, 11)):
        sums.add(target[part].astype(np.float32), forecast[part].astype(np.float32), mask[part])
    assert sums.windows == 11
    assert sums.mse().value == pytest.approx(mse(target, forecast, mask).value, rel=1e-5)
    assert sums.mae().count == mae(target, forecast, mask).count
    assert sums.mae(axis=1).value == pytest.approx(mae(target, forecast, mask, axis=(0, 2)).value, rel=1e-5)


def test_running_sums_do_not_hide_a_missing_forecast() -> None:
    sums = ErrorSums(1, 1)
    sums.add([[[1.0]], [[2.0]]], [[[1.0]], [[np.nan]]])
    assert math.isnan(sums.mse().value)
