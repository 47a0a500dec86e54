"""AR-Net: the verification checklist, one test a point.

Sources: Triebe, Laptev, Rajagopal (2019), arXiv 1911.12436 (sTPE of figures 2 and 4: 0.3 to 0.8); the other numbers are
closed forms or come from numpy, scipy and statsmodels. Tolerances stand beside each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from autoregression_oracles import kalman_forecast
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.linalg import solve_toeplitz
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.metrics.recovery import stpe
from tsforge.models.ar_net import ARNet, ARNetConfig
from tsforge.ops.ar_process import draw_weights, simulate
from tsforge.ops.moments import Channel, WindowMoments, channel_moments
from tsforge.ops.sparse import Penalty, objective, reweighted_l1
from tsforge.ops.stability import companion
from tsforge.ops.toeplitz import autocovariance, levinson

TRUTH = np.array([0.2, 0.3, -0.5])
Array = NDArray[np.float64]


def series(
    values: Array, *, mask: NDArray[np.bool_] | None = None, lengths: tuple[int, ...] | None = None
) -> TrainingSeries:
    table = torch.from_numpy(np.ascontiguousarray(values.reshape(len(values), -1)))
    seen = torch.ones_like(table, dtype=torch.bool) if mask is None else torch.from_numpy(mask.reshape(table.shape))
    ends = np.concatenate([[0], np.cumsum(lengths or (len(values),))])
    starts = torch.zeros(len(ends) - 1, dtype=torch.int64)
    return TrainingSeries(values=table, mask=seen, indptr=torch.from_numpy(ends), offset=starts)


def fitted(data: TrainingSeries, lags: int, horizon: int = 1, **settings: Any) -> ARNet:
    """Return a float64 model solved on ``data``."""
    context, params = settings.pop("context_length", max(lags, 1)), settings.pop("params", 1)
    spec = DataSpec(context_length=context, horizon=horizon, num_variates=data.values.shape[1], num_params=params)
    model = ARNet(ARNetConfig(lags=lags, **settings), spec).double()
    model.solve(data)
    return model


def coefficients(model: ARNet, step: int = 0) -> Array:
    return model.ar.weight[0, step].detach().numpy()


def constant(model: ARNet) -> float:
    weight = model.ar.weight[0, 0].detach()
    return float((model.gaps.center[0] * (1.0 - weight.sum()) + model.bias[0, 0]).detach())


def lag_table(values: Array, lags: int, horizon: int = 1) -> tuple[Array, Array]:
    """Return explicit inputs (lag 1 first, then a one) and targets: the slow oracle."""
    windows = sliding_window_view(values, lags + horizon)
    inputs = np.column_stack([windows[:, :lags][:, ::-1], np.ones(len(windows))])
    return inputs, windows[:, lags:]


def forecast(model: ARNet, context: Array, mask: NDArray[np.bool_] | None = None) -> Array:
    values = torch.from_numpy(np.ascontiguousarray(context))[None, :, None]
    seen = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.from_numpy(mask)[None, :, None]
    with torch.no_grad():
        return model(Batch(context=torch.where(seen, values, 0.0), context_mask=seen)).raw[0, :, 0, 0].numpy()


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize(("size", "lags"), [(200, 3), (5000, 50), (20_000, 200)])
def test_checklist_01_moments_equal_dense_least_squares(size: int, lags: int, offset: float) -> None:
    values = simulate(TRUTH, size, np.random.default_rng(size))
    inputs, targets = lag_table(values, lags)
    expected = np.linalg.lstsq(inputs, targets[:, 0], rcond=None)[0]
    model = fitted(series(values + offset), lags)
    # 1e6 + noise carries 2^-33 of rounding in the data themselves
    assert np.abs(coefficients(model) - expected[:-1]).max() < 1e-10
    shifted = expected[-1] + offset * (1.0 - expected[:-1].sum())
    assert constant(model) == pytest.approx(shifted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("lags", [1, 5, 30])
def test_checklist_02_equals_statsmodels_autoreg(lags: int) -> None:
    from statsmodels.tsa.ar_model import AutoReg

    values = simulate(TRUTH, 3000, np.random.default_rng(lags)) + 2.0
    reference = AutoReg(values, lags, trend="c").fit()
    model = fitted(series(values), lags)
    assert np.abs(coefficients(model) - reference.params[1:]).max() < 1e-8
    assert abs(constant(model) - reference.params[0]) < 1e-8
    # AutoReg divides by the rows, the model by rows less coefficients less intercept (unbiased)
    rows = len(values) - lags
    assert float(model.noise[0, 0]) ** 2 * (rows - lags - 1) / rows == pytest.approx(reference.sigma2, rel=1e-8)
    errors = reference.bse[1:] * np.sqrt(rows / (rows - lags - 1))
    np.testing.assert_allclose(model.error[0, 0].numpy(), errors, rtol=1e-6)


def test_checklist_03_levinson_equals_toeplitz_solve_and_is_stable() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        order, size = int(rng.integers(1, 12)), int(rng.integers(30, 300))
        values = np.cumsum(rng.normal(size=size)) if rng.random() < 0.5 else rng.normal(size=size)
        acov = autocovariance(values - values.mean(), np.ones(size, dtype=bool), [0, size], order)
        weight = levinson(acov).weight
        np.testing.assert_allclose(weight, solve_toeplitz(acov[:order], acov[1:]), atol=1e-8)
        assert np.abs(np.linalg.eigvals(companion(weight))).max() < 1.0


def test_checklist_04_recovers_the_process() -> None:
    dense, sparse = [], {100: [], 1000: []}
    for seed in range(20):
        values = simulate(TRUTH, 100_000, np.random.default_rng(seed))
        dense.append(stpe(coefficients(fitted(series(values), 3)), TRUTH))
        if seed >= 3:
            continue
        for lags, errors in sparse.items():
            model = fitted(series(values), lags, solver="sparse", expected_nonzero=3)
            weight = coefficients(model)
            assert np.flatnonzero(weight).tolist() == [0, 1, 2]
            errors.append(stpe(weight, TRUTH))
    assert np.mean(dense) < 1.0
    assert np.mean(dense) == pytest.approx(0.34, abs=0.1)  # 100 * 3 * 0.8 * 0.0028 / 2, errors of normal coefficients
    assert max(np.mean(errors) for errors in sparse.values()) < 0.6


@pytest.mark.parametrize("settings", [{"solver": "sparse"}, {"solver": "omp"}])
def test_checklist_04_small_sample_supports(settings: dict[str, str]) -> None:
    """1000 rows, lags 1, 3 and 10 of 20: the paper reports 3.2, dense least squares gives about 20."""
    weight = np.zeros(10)
    weight[[0, 2, 9]] = [0.3, 0.3, -0.4]
    chosen, dense = [], []
    for seed in range(5):
        data = series(simulate(weight, 1000, np.random.default_rng(100 + seed)))
        chosen.append(stpe(coefficients(fitted(data, 20, **settings)), weight))
        dense.append(stpe(coefficients(fitted(data, 20)), weight))
    assert np.mean(chosen) < 6.0 < 15.0 < np.mean(dense)


def window_moments(values: torch.Tensor, width: int) -> WindowMoments:
    return channel_moments([Channel(values, width)], [(0, len(values))], width)


def test_checklist_05_sparse_objective_never_rises_and_penalty_is_bounded() -> None:
    from tsforge.models._ar_layout import LagLayout
    from tsforge.models._ar_solvers import scale_free
    from tsforge.ops.moments import least_squares

    values = simulate(TRUTH, 5000, np.random.default_rng(5))
    layout = LagLayout(40, 2)
    moments = window_moments(torch.from_numpy(values - values.mean()), 42)
    small, _ = scale_free(moments, layout)
    start = least_squares(moments, layout.features, layout.targets).weight.numpy()
    for strength in (1e-4, 1e-2, 1.0):
        fit = reweighted_l1(small, start, strength)
        assert (np.diff(fit.objective) <= 1e-13).all()
        assert objective(small, fit.theta, strength, Penalty()) <= objective(small, start, strength, Penalty())
    penalty = Penalty()
    assert penalty.value(np.zeros(1))[0] == 0.0
    assert penalty.value(np.array([1e6]))[0] == pytest.approx(1.0, abs=1e-9)
    assert np.isfinite(penalty.slope(np.zeros(1))).all()
    step = 1e-6
    for point in (0.01, 0.3, 2.0):  # the slope is the derivative of the value
        numeric = (penalty.value(np.array([point + step])) - penalty.value(np.array([point - step]))) / (2 * step)
        assert penalty.slope(np.array([point]))[0] == pytest.approx(numeric[0], rel=1e-5)
    spec = DataSpec(context_length=4, horizon=2, num_variates=1)
    model = ARNet(ARNetConfig(solver="sgd", density=0.5), spec)
    with torch.no_grad():
        model.ar.weight.zero_()
    batch = Batch(context=torch.randn(3, 4, 1), context_mask=torch.ones(3, 4, 1, dtype=torch.bool))
    losses = model(batch).aux_losses
    assert losses is not None
    losses["sparsity"].backward()
    assert torch.isfinite(model.ar.weight.grad).all()


def test_checklist_06_stpe() -> None:
    assert stpe([0.2, 0.3], [0.2, 0.3]) == 0.0
    assert stpe([0.2, -0.3], [-0.2, 0.3]) == 100.0
    assert stpe([0.2, 0.3, 0.0], [0.2, 0.3]) == 0.0
    assert stpe([0.2], [0.2, 0.2]) == pytest.approx(100 * 0.2 / 0.6)


def descend(model: ARNet, values: Array, lags: int, *, epochs: int, rate: float, seed: int = 0) -> list[float]:
    """Train by AdamW with a one-cycle rate on explicit windows; return the loss of every epoch."""
    windows = torch.from_numpy(values).unfold(0, lags + 1, 1)
    steps = epochs * (len(windows) // 512)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        order, total = torch.randperm(len(windows), generator=generator), 0.0
        for start in range(0, len(windows) - 511, 512):
            chosen = windows[order[start : start + 512]].to(model.bias.dtype)
            batch = Batch(chosen[:, :lags, None], torch.ones(512, lags, 1, dtype=torch.bool))
            loss = (model(batch).raw[:, 0, 0, 0] - chosen[:, lags]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total)
    return losses


def test_checklist_07_gradient_training_reaches_least_squares() -> None:
    torch.manual_seed(0)
    values = simulate(TRUTH, 100_000, np.random.default_rng(7))
    exact = coefficients(fitted(series(values), 10))
    spec = DataSpec(context_length=10, horizon=1, num_variates=1)
    model = ARNet(ARNetConfig(lags=10, solver="sgd", warm_start=False), spec)
    report = model.solve(series(values))
    assert not report.finished
    start = stpe(coefficients(model), exact)
    descend(model, values, 10, epochs=2, rate=0.02)
    assert start > 20.0
    assert stpe(coefficients(model), exact) < 2.0


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(made)
            if torch.is_tensor(leaf)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return made


def test_checklist_08_work_grows_slowly_with_the_order() -> None:
    """No table of all windows is made, at any order; seconds are measured by benchmarks/arnet.py."""
    tensor = torch.from_numpy(simulate(TRUTH, 100_000, np.random.default_rng(8)))
    with LargestTensor() as short:
        known = window_moments(tensor, 251)
    with LargestTensor() as long:
        window_moments(tensor, 1001)
    with LargestTensor() as explicit:
        windows = tensor.unfold(0, 251, 1) * 1.0
        assert torch.allclose(windows.T @ windows, known.gram)
    assert explicit.elements >= 251 * (100_000 - 250)
    assert max(short.elements, long.elements) < 4 * 100_000 + 2 * 1001**2


def test_checklist_09_direct_equals_separate_regressions() -> None:
    values = simulate(TRUTH, 2000, np.random.default_rng(9))
    model = fitted(series(values), 6, horizon=4, mode="direct")
    inputs, targets = lag_table(values, 6, 4)
    for step in range(4):
        expected = np.linalg.lstsq(inputs, targets[:, step], rcond=None)[0]
        assert np.abs(coefficients(model, step) - expected[:-1]).max() < 1e-9
    np.testing.assert_allclose(
        forecast(model, values[-6:]),
        np.append(values[-6:][::-1], 1) @ np.linalg.lstsq(inputs, targets, rcond=None)[0],
        atol=1e-9,
    )


def test_checklist_09_recursive_equals_companion_power() -> None:
    values = simulate(TRUTH, 2000, np.random.default_rng(10)) + 5.0
    model = fitted(series(values), 4, horizon=60, params=2)
    assert not model.is_direct  # beyond 48 steps the recursive form is the default
    weight, offset = coefficients(model), constant(model)
    state, expected = values[-4:][::-1].copy(), []
    push = np.array([offset, 0.0, 0.0, 0.0])
    for _ in range(60):
        state = companion(weight) @ state + push
        expected.append(state[0])
    np.testing.assert_allclose(forecast(model, values[-4:]), expected, atol=1e-9)
    report = model.solve(series(values))
    assert report.residual_scale is not None
    psi = [np.linalg.matrix_power(companion(weight), k)[0, 0] for k in range(60)]
    exact = float(model.noise[0, 0]) * np.sqrt(np.cumsum(np.square(psi)))
    np.testing.assert_allclose(report.residual_scale[:, 0].numpy(), exact, rtol=1e-9)


def test_checklist_10_two_series_equal_stacked_windows() -> None:
    rng = np.random.default_rng(11)
    first, second = simulate(TRUTH, 300, rng), simulate(TRUTH, 180, rng)
    both = np.concatenate([first, second])
    centre = both.mean()
    model = fitted(series(both, lengths=(300, 180)), 5)
    tables = [lag_table(part - centre, 5) for part in (first, second)]
    inputs, targets = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    expected = np.linalg.lstsq(inputs, targets[:, 0], rcond=None)[0]
    seam = np.linalg.lstsq(*(part[:, 0] if i else part for i, part in enumerate(lag_table(both, 5))), rcond=None)[0]
    assert np.abs(coefficients(model) - expected[:-1]).max() < 1e-10
    assert np.abs(coefficients(model) - seam[:-1]).max() > 1e-4


@pytest.mark.parametrize("rule", ["auto", "windows", "filled"])
def test_checklist_11_random_gaps_move_coefficients_within_error(rule: str) -> None:
    rng = np.random.default_rng(12)
    values = simulate(TRUTH, 20_000, rng)
    whole = fitted(series(values), 5)
    mask = rng.random(len(values)) > 0.2
    holed = fitted(series(np.where(mask, values, 1e9), mask=mask), 5, missing=rule)
    distance = np.abs(coefficients(holed) - coefficients(whole))
    errors = np.maximum(holed.error[0, 0].numpy(), whole.error[0, 0].numpy())
    assert (distance < 3.0 * errors).all()


def test_checklist_11_gaps_before_the_origin_give_the_kalman_forecast() -> None:
    rng = np.random.default_rng(13)
    values = simulate(TRUTH, 5000, rng)
    model = fitted(series(values), 3, horizon=60, context_length=20)
    context, mask = values[-20:], np.ones(20, dtype=bool)
    mask[[3, 4, 11, 17, 18, 19]] = False  # a block right before the origin among others
    centre = float(model.gaps.center[0])
    expected = kalman_forecast(coefficients(model), 1.0, context - centre, mask, 60).mean + centre
    level = float(model.bias[0, 0].detach())
    drift = level * np.cumsum([np.linalg.matrix_power(companion(coefficients(model)), k)[0, 0] for k in range(60)])
    np.testing.assert_allclose(forecast(model, context, mask), expected + drift, atol=1e-8)
    poisoned = np.where(mask, context, np.nan)
    np.testing.assert_array_equal(forecast(model, poisoned, mask), forecast(model, context, mask))


def test_checklist_11_no_future_value_is_read() -> None:
    values = simulate(TRUTH, 500, np.random.default_rng(14))
    model = fitted(series(values), 3, horizon=4, context_length=10)
    context = torch.from_numpy(values[-10:])[None, :, None]
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[:, 4:7] = False
    plain = Batch(context, mask)
    future = plain._replace(target=torch.full((1, 4, 1), torch.nan), target_mask=torch.ones(1, 4, 1, dtype=torch.bool))
    assert torch.equal(model(plain).raw, model(future).raw)


def test_checklist_12_hidden_layers_are_registered_start_at_ols_and_learn() -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(15)
    noise, values = rng.normal(size=6000) * 0.3, np.zeros(6000)
    for t in range(1, 6000):  # a process that no linear model fits
        values[t] = 0.8 * abs(values[t - 1]) - 0.5 + noise[t]
    spec = DataSpec(context_length=2, horizon=1, num_variates=1)
    model = ARNet(ARNetConfig(lags=2, hidden=(16, 8)), spec)
    names = {name for name, _ in model.named_parameters()}
    assert {f"ar.hidden.weights.{layer}" for layer in range(3)} <= names
    report = model.solve(series(values))
    assert not report.finished
    plain = fitted(series(values), 2)
    np.testing.assert_allclose(forecast(model.double(), values[-2:]), forecast(plain, values[-2:]), atol=1e-6)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = descend(model, values, 2, epochs=15, rate=0.01)
    assert losses[-1] < 0.85 * losses[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {f"ar.hidden.weights.{layer}" for layer in range(3)} <= moved


def test_checklist_13_quantiles_never_cross() -> None:
    from tsforge.layers.likelihoods import Quantiles
    from tsforge.network import ForecastNetwork, NetworkConfig

    torch.manual_seed(2)
    values = 10.0 + 3.0 * simulate(TRUTH, 3000, np.random.default_rng(16))
    spec = DataSpec(context_length=5, horizon=3, num_variates=1)
    levels = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    config = NetworkConfig(model=ARNetConfig(lags=5, hidden=(8,)), likelihood=Quantiles(levels=levels))
    network = ForecastNetwork(config, spec)
    data = series(values)
    network.fit_scaler(data)
    network.solve(data)
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    context = torch.from_numpy(values[:2000].reshape(-1, 5, 1)).float()
    quantiles = network.predict(Batch(context, torch.ones_like(context, dtype=torch.bool)), levels).quantiles
    assert quantiles is not None
    assert bool((quantiles.diff(dim=-1) >= 0).all())


def test_checklist_13_conformal_coverage_with_nine_scores() -> None:
    from tsforge.forecasting.conformal_scores import conformal_margin

    rng = np.random.default_rng(17)
    scores = np.abs(rng.normal(size=(9, 20_000)))
    margin, count = conformal_margin(scores, np.ones_like(scores, dtype=bool), 0.9)
    covered = (np.abs(rng.normal(size=20_000)) <= margin).mean()
    assert (count == 9).all()
    assert covered >= 0.9 - 3 * np.sqrt(0.09 / 20_000)  # exactly 0.9 in expectation; the reference's rule gives 0.1


def test_checklist_14_weekly_sine_is_fitted_by_the_fourier_block() -> None:
    time_steps = np.arange(24 * 7 * 20)
    rng = np.random.default_rng(18)
    values = 3.0 * np.sin(2 * np.pi * time_steps / 168 + 0.7) + 0.01 * rng.normal(size=len(time_steps))
    data = series(values)
    model = fitted(data, 0, horizon=24, season_lengths=(168.0,))
    residual = model._residual(data)[:, 0].numpy()
    assert 1.0 - residual.var() / values.var() > 0.999
    effects = {record["column"]: record["value"] for record in model.explain()["effects"]}
    assert effects["sin 1"] == pytest.approx(3.0 * np.cos(0.7), abs=1e-3)
    assert effects["cos 1"] == pytest.approx(3.0 * np.sin(0.7), abs=1e-3)
    batch = Batch(
        torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.bool),
        cutoff_index=torch.tensor([len(values) + 5]),
    )  # fmt: skip
    ahead = 3.0 * np.sin(2 * np.pi * (len(values) + 5 + np.arange(24)) / 168 + 0.7)
    np.testing.assert_allclose(model(batch).raw[0, :, 0, 0].detach().numpy(), ahead, atol=5e-3)


def test_generators_differ_as_stated() -> None:
    rng = np.random.default_rng(19)
    assert draw_weights(1, rng, "paper")[0] == 0.0  # the paper's recipe makes order 1 white noise
    assert abs(draw_weights(1, rng)[0]) > 0.0
