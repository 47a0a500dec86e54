"""Windows with filled gaps: equal to explicit least squares step by step, and sound where pairs of rows are not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import toeplitz
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.models import _ar_filled
from tsforge.models._ar_filled import filled_moments
from tsforge.models._ar_gaps import GapFiller
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import MissingRule, bridge_short, lag_moments
from tsforge.models.ar_net import ARNet, ARNetConfig
from tsforge.models.linear import Linear, LinearConfig
from tsforge.ops.moments import least_squares

Array = NDArray[np.float64]


def smooth(rows: int, seed: int = 0) -> Array:
    """Return a series whose neighbouring rows are nearly equal, as pressures and tides are."""
    noise = np.random.default_rng(seed).normal(size=rows + 200)
    values = np.zeros(rows + 200)
    for t in range(2, len(values)):
        values[t] = 1.93 * values[t - 1] - 0.94 * values[t - 2] + noise[t]
    values = values[200:]
    return (values - values.mean()) / values.std()


def gaps(rows: int, share: float, seed: int = 1) -> NDArray[np.bool_]:
    return np.asarray(np.random.default_rng(seed).random(rows) > share)


def tensors(values: Array, mask: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.where(mask, values, 0.0))[:, None], torch.from_numpy(mask)[:, None]


def expected_context(context: Array, seen: NDArray[np.bool_], covariance: Array) -> Array:
    """Return one context with gaps at their Gaussian expectation, from the covariance of its rows."""
    filled = context.copy()
    gap = ~seen
    weight = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, gap)])
    filled[gap] = context[seen] @ weight
    return filled


def ar_covariance(weight: Array, size: int) -> Array:
    """Return the autocovariances of an autoregression for unit noise, from a long impulse response."""
    response = np.zeros(20_000)
    response[0] = 1.0
    for t in range(1, len(response)):
        past = response[max(t - len(weight), 0) : t][::-1]
        response[t] = past @ weight[: len(past)]
    return np.array(toeplitz([response[: len(response) - k] @ response[k:] for k in range(size)]))


def test_without_gaps_moments_are_those_of_whole_windows() -> None:
    values, mask = tensors(smooth(300), np.ones(300, dtype=bool))
    past = torch.from_numpy(np.random.default_rng(3).normal(size=(300, 2)))
    bounds = [0, 110, 300]
    for layout, covariates in ((LagLayout(7, 3), None), (LagLayout(7, 3, covariate_lags=9, num_past=2), past)):
        scaled = covariates is None
        whole, _ = lag_moments(layout, values, mask, bounds, past=covariates, missing="windows", uses_scale=scaled)
        found = filled_moments(layout, values, mask, bounds, past=covariates, uses_scale=scaled)
        assert found.rows == whole.rows
        torch.testing.assert_close(found.gram, whole.gram, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.sums, whole.sums, atol=1e-9, rtol=1e-9)


def test_every_step_is_least_squares_on_the_windows_that_observed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ar_filled, "_SETTLED", 1e-12)
    monkeypatch.setattr(_ar_filled, "_ROUNDS", 200)
    monkeypatch.setattr(_ar_filled, "_STEADY", 0.0)
    lags, horizon = 5, 3
    values, seen = smooth(400), gaps(400, 0.25)
    layout, (table, mask) = LagLayout(lags, horizon), tensors(values, seen)
    moments = filled_moments(layout, table, mask, [0, 180, 400])
    fit = least_squares(moments, torch.arange(lags), layout.targets)
    weight = _ar_filled.fill_weights(table, mask, [0, 180, 400], lags).numpy()
    covariance = ar_covariance(weight, lags)
    rows, answers, known = [], [], []
    for first, last in ((0, 180), (180, 400)):
        for t in range(first, last - lags - horizon + 1):
            context, target = slice(t, t + lags), slice(t + lags, t + lags + horizon)
            if seen[context].any() and seen[target].any():
                rows.append(expected_context(np.where(seen, values, 0.0)[context], seen[context], covariance))
                answers.append(values[target])
                known.append(seen[target])
    design = np.column_stack([np.array(rows), np.ones(len(rows))])
    for step in range(horizon):
        on = np.array(known)[:, step]
        target = np.array(answers)[on, step]
        solution, squared = np.linalg.lstsq(design[on], target, rcond=None)[:2]
        np.testing.assert_allclose(fit.weight[step].numpy(), solution[:-1], atol=2e-6)
        assert float(fit.bias[step]) == pytest.approx(solution[-1], abs=2e-6)
        error = float(fit.rss[step]) / fit.rows  # mean squared error of the observed targets
        assert error == pytest.approx(float(squared[0]) / on.sum(), rel=1e-6)
    assert moments.rows == pytest.approx(np.array(known).mean() * len(rows))


@pytest.mark.parametrize("missing", ["auto", "filled"])
@pytest.mark.parametrize("name", ["ar_net", "linear"])
def test_gaps_in_smooth_data_cost_little(name: str, missing: MissingRule) -> None:
    values = smooth(2500, seed=5)
    train, test = values[:2000], values[2000:]
    seen = gaps(2000, 0.12, seed=6)
    spec = DataSpec(context_length=48, horizon=8, num_variates=1)

    def error(mask: NDArray[np.bool_]) -> float:
        table, observed = tensors(train, mask)
        data = TrainingSeries(table, observed, torch.tensor([0, 2000]), torch.zeros(1, dtype=torch.int64))
        linear = Linear(LinearConfig(ridge=1e-3, missing=missing), spec)
        model = (ARNet(ARNetConfig(missing=missing), spec) if name == "ar_net" else linear).double()
        report = model.solve(data)
        assert report is not None
        assert report.details is not None
        assert report.details["gaps_filled"] == float(missing == "filled")  # lines bridge gaps of up to three rows
        windows = np.lib.stride_tricks.sliding_window_view(test, 56)
        context = torch.from_numpy(windows[:, :48].copy())[..., None]
        with torch.no_grad():
            found = model(Batch(context, torch.ones_like(context, dtype=torch.bool))).raw[..., 0, 0]
        return float(np.square(found.numpy() - windows[:, 48:]).mean())

    assert error(seen) < 1.15 * error(np.ones(2000, dtype=bool))


@pytest.mark.parametrize("name", ["ar_net", "linear"])
def test_a_season_is_learnt_from_rows_with_gaps_of_half_of_it(name: str) -> None:
    rows, rng = 3000, np.random.default_rng(31)
    t = np.arange(rows + 400)
    wave = 5 * np.sin(2 * np.pi * t / 12) + 3 * np.sin(2 * np.pi * t / 24)
    values = wave + 0.1 * rng.normal(size=len(t))
    seen = np.ones(rows, dtype=bool)
    for start in range(0, rows, 30):
        seen[start + rng.integers(0, 10) : start + 20] = False
    spec = DataSpec(context_length=48, horizon=12, num_variates=1)
    linear = Linear(LinearConfig(ridge=1e-3), spec)
    model = (ARNet(ARNetConfig(), spec) if name == "ar_net" else linear).double()
    table, observed = tensors(values[:rows], seen)
    report = model.solve(TrainingSeries(table, observed, torch.tensor([0, rows]), torch.zeros(1, dtype=torch.int64)))
    assert report is not None
    assert report.details is not None
    assert report.details["gaps_filled"] == 1.0
    errors, season = [], []
    for origin in range(rows + 48, rows + 388, 7):
        context = torch.from_numpy(values[origin - 48 : origin])[None, :, None]
        with torch.no_grad():
            found = model(Batch(context, torch.ones_like(context, dtype=torch.bool))).raw[0, :, 0, 0].numpy()
        target = wave[origin : origin + 12]
        errors.append(np.abs(found - target).mean())
        season.append(np.abs(values[origin - 24 : origin - 12] - target).mean())
    assert np.mean(errors) < 1.5 * np.mean(season)  # twelve times as much with lines over the gaps


def test_lines_bridge_short_gaps_within_a_series() -> None:
    rng = np.random.default_rng(12)
    for most in (0, 1, 3, 50):
        seen, values, bounds = rng.random(200) > 0.5, rng.normal(size=200), [0, 3, 90, 91, 200]
        expected, whole = values.copy(), seen.copy()
        for first, last in pairwise(bounds):
            rows = [row for row in range(first, last) if seen[row]]
            for left, right in pairwise(rows):
                if right - left - 1 <= most:
                    for row in range(left + 1, right):
                        share = (row - left) / (right - left)
                        expected[row] = (1.0 - share) * values[left] + share * values[right]
                        whole[row] = True
        found, mask = bridge_short(torch.from_numpy(values), torch.from_numpy(seen), bounds, most)
        np.testing.assert_array_equal(mask.numpy(), whole)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_long_gaps_are_filled_and_not_bridged() -> None:
    values, seen = smooth(900), np.ones(900, dtype=bool)
    for start in range(40, 880, 60):
        seen[start : start + 7] = False
    layout, (table, mask) = LagLayout(112, 1), tensors(values, seen)
    assert lag_moments(layout, table, mask, [0, 900])[1]
    for start in range(40, 880, 60):
        seen[start] = True  # six rows are left
    moments, filled = lag_moments(layout, *tensors(values, seen), [0, 900])
    assert not filled
    assert moments.rows == 900 - 113 + 1


def test_more_windows_than_fit_are_a_choice_that_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = smooth(4000), gaps(4000, 0.3)
    layout, (table, mask) = LagLayout(6, 2), tensors(values, seen)
    everything = filled_moments(layout, table, mask, [0, 4000])
    monkeypatch.setattr(_ar_filled, "MOST_VALUES", 8 * 1500)
    some = filled_moments(layout, table, mask, [0, 4000])
    again = filled_moments(layout, table, mask, [0, 4000])
    assert torch.equal(some.gram, again.gram)  # the same choice every time
    assert some.rows == pytest.approx(everything.rows, rel=0.02)
    assert not torch.equal(some.gram, everything.gram)
    torch.testing.assert_close(some.gram / some.rows, everything.gram / everything.rows, atol=0.06, rtol=0)


def test_one_set_of_weights_is_fitted_on_whole_and_on_filled_variates_together() -> None:
    rng = np.random.default_rng(7)
    both = np.stack([smooth(600, 1), smooth(600, 2)], axis=1)
    seen = np.stack([np.ones(600, dtype=bool), rng.random(600) > 0.3], axis=1)
    values, mask = torch.from_numpy(np.where(seen, both, 0.0)), torch.from_numpy(seen)
    layout = LagLayout(12, 2)
    total, filled = lag_moments(layout, values, mask, [0, 600])
    parts = [lag_moments(layout, values[:, [v]], mask[:, [v]], [0, 600]) for v in range(2)]
    assert filled
    assert [part[1] for part in parts] == [False, True]
    torch.testing.assert_close(total.gram, parts[0][0].gram + parts[1][0].gram)
    assert total.rows == parts[0][0].rows + parts[1][0].rows


def test_spans_without_a_usable_window_are_refused() -> None:
    layout = LagLayout(6, 3)
    table, mask = tensors(smooth(30), np.ones(30, dtype=bool))
    with pytest.raises(ModelError, match=r"no series of the training span has 9 rows \(context plus horizon\)"):
        filled_moments(layout, table, mask, [0, 8, 16, 24, 30])
    seen = np.zeros(30, dtype=bool)
    seen[0] = True
    with pytest.raises(ModelError, match="no window of 6 lags and 3 steps of the training span observed"):
        filled_moments(layout, *tensors(smooth(30), seen), [0, 30])


def test_a_model_without_lags_is_fitted_on_observed_targets_alone() -> None:
    rng = np.random.default_rng(8)
    past = rng.normal(size=(500, 1))
    values = 3.0 * np.roll(past[:, 0], 1)  # the covariate of the row before
    seen = gaps(500, 0.6)
    layout = LagLayout(0, 1, covariate_lags=2, num_past=1)
    table, mask = tensors(values, seen)
    moments = filled_moments(layout, table, mask, [0, 500], past=torch.from_numpy(past))
    fit = least_squares(moments, layout.features, layout.targets)
    np.testing.assert_allclose(fit.weight.numpy(), [[3.0, 0.0]], atol=1e-2)


def test_gaps_are_filled_as_well_as_by_an_autoregression_of_complete_rows() -> None:
    values = smooth(3000, seed=9)
    train, test = values[:2400], values[2400:]
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(test, 60).copy())[..., None]
    seen = torch.from_numpy(gaps(windows.numel(), 0.3, seed=10)).view(windows.shape)

    def error(mask: NDArray[np.bool_]) -> float:
        filler = GapFiller(1, 48, 1)
        filler.fit(*tensors(train, mask), [0, 2400])
        return float((filler(torch.where(seen, windows, 0.0), seen) - windows)[~seen].square().mean())

    complete = error(np.ones(2400, dtype=bool))
    assert complete < 0.05  # of a variance of 1
    assert error(gaps(2400, 0.3, seed=11)) < 1.5 * complete
