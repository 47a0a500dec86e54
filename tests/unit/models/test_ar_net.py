"""AR-Net beyond the checklist: additive parts, covariates, solvers, explanations, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models._ar_windows import training_windows
from tsforge.models.ar_net import ARNet, ARNetConfig
from tsforge.ops.ar_process import simulate

TRUTH = np.array([0.2, 0.3, -0.5])


def training(
    size: int = 3000, *, variates: int = 2, known: int = 0, past: int = 0, seed: int = 0, split: bool = True
) -> TrainingSeries:
    """AR(3) noise, a daily sine, a trend, 0.5 times each known column, 0.4 times each past column two steps late."""
    rng = np.random.default_rng(seed)
    step = np.arange(size)
    values = np.stack([0.3 * simulate(TRUTH, size, rng) for _ in range(variates)], axis=1)
    values += np.sin(2 * np.pi * step / 24)[:, None] + 2.0 * (step / size)[:, None]
    columns = rng.normal(size=(size, known))
    lagged = rng.normal(size=(size, past))
    values += 0.5 * columns.sum(1, keepdims=True)
    values[2:] += 0.4 * lagged[:-2].sum(1, keepdims=True)
    cut = size // 2
    return TrainingSeries(
        values=torch.from_numpy(values),
        mask=torch.ones(size, variates, dtype=torch.bool),
        indptr=torch.tensor([0, cut, size] if split else [0, size]),
        offset=torch.tensor([0, cut] if split else [0]),  # the second series goes on where the first ends
        past=torch.from_numpy(lagged) if past else None,
        known=torch.from_numpy(columns) if known else None,
    )


def build(data: TrainingSeries, *, length: int = 30, horizon: int = 4, params: int = 1, **settings: Any) -> ARNet:
    spec = DataSpec(
        context_length=length,
        horizon=horizon,
        num_variates=data.values.shape[1],
        num_known=0 if data.known is None else data.known.shape[1],
        num_past=0 if data.past is None else data.past.shape[1],
        num_params=params,
    )
    return ARNet(ARNetConfig(**settings), spec).double()


def solved(data: TrainingSeries, **settings: Any) -> tuple[ARNet, SolveReport]:
    model = build(data, **settings)
    return model, model.solve(data)


def windows(model: ARNet, data: TrainingSeries, count: int = 400) -> Batch:
    return next(training_windows(data, model.spec, max_windows=count))


def error(model: ARNet, batch: Batch) -> float:
    with torch.no_grad():
        return float((model(batch).raw[..., 0] - batch.target).square().mean().sqrt())


def test_effects_are_recovered_and_lags_work_on_what_is_left() -> None:
    data = training(known=2, size=6000)
    model, report = solved(data, lags=3, trend="linear", season_lengths=(24,))
    effects = {(row["variate"], row["column"]): row["value"] for row in model.explain()["effects"]}
    for variate in range(2):
        assert effects[variate, "sin 1"] == pytest.approx(1.0, abs=0.02)
        assert effects[variate, "slope"] == pytest.approx(2.0, abs=0.05)
        assert effects[variate, "known 0"] == pytest.approx(0.5, abs=0.02)
        np.testing.assert_allclose(model.ar.weight[variate, 0].detach().numpy(), TRUTH, atol=0.05)
    assert report.finished
    assert float(model.noise[0, 0]) == pytest.approx(0.3, rel=0.05)


def test_forecast_is_the_written_equation() -> None:
    data = training(known=1, past=1, split=False)
    model, _ = solved(data, lags=3, covariate_lags=2, trend="linear", season_lengths=(24,), season_orders=(1,))
    origin, columns = 1234, model.additive.center.numpy()
    known, past = data.known[:, 0].numpy(), data.past[:, 0].numpy()
    effects = model.additive.weight.detach().numpy()

    def g(row: int, variate: int) -> float:
        angle = 2 * np.pi * row / 24
        return float(effects[variate] @ (np.array([row / 3000, np.cos(angle), np.sin(angle), known[row]]) - columns))

    place = torch.arange(origin - 30, origin + 4)
    batch = Batch(
        context=data.values[place[:30]][None],
        context_mask=torch.ones(1, 30, 2, dtype=torch.bool),
        past=data.past[place[:30]][None],
        known=data.known[place][None],
        cutoff_index=torch.tensor([origin]),
    )
    found = model(batch).raw[0, :, :, 0].detach().numpy()
    weight, bias = model.ar.weight.detach().numpy(), model.bias.detach().numpy()
    lagged = model.covariates.weight.detach().numpy()
    mean = model.gaps.center.numpy()
    for variate in range(2):
        history = [
            data.values[origin - lag, variate].item() - g(origin - lag, variate) - mean[variate] for lag in (1, 2, 3)
        ]
        for step in range(4):
            expected = g(origin + step, variate) + mean[variate] + bias[variate, step]
            expected += weight[variate, step] @ history + lagged[variate, step] @ past[[origin - 1, origin - 2]]
            assert found[step, variate] == pytest.approx(expected, abs=1e-10)


def test_training_windows_know_their_place() -> None:
    data = training(size=120, variates=1)._replace(offset=torch.tensor([7, 500]))
    model = build(data, length=50)
    batch = next(training_windows(data, model.spec))
    assert batch.series_index.tolist() == [0] * 7 + [1] * 7
    assert batch.cutoff_index.tolist() == [*range(57, 64), *range(550, 557)]
    assert torch.equal(batch.target[8], data.values[111:115])


def test_joint_fit_of_effects_is_the_regression_with_autocorrelated_errors() -> None:
    """One step, one variate: the minimiser over effects and lags together, found by a general optimiser."""
    from scipy.optimize import least_squares

    data = training(size=400, variates=1, known=1, split=False)
    model, report = solved(data, lags=2, horizon=1, mode="recursive")
    y, x = data.values[:, 0].numpy(), data.known[:, 0].numpy()

    def innovations(theta: np.ndarray) -> np.ndarray:
        level, beta, first, second = theta
        r = y - level - beta * x
        return r[2:] - first * r[1:-1] - second * r[:-2]

    best = least_squares(innovations, np.zeros(4), xtol=1e-14, ftol=1e-14).x
    found = [float(model.additive.weight[0, 0].detach()), *model.ar.weight[0, 0].tolist()]
    np.testing.assert_allclose(found, best[1:], atol=1e-4)
    assert report.details["effects_rounds"] >= 1


def test_past_covariates_enter_with_their_lag() -> None:
    data = training(past=2)
    model, _ = solved(data, lags=4, covariate_lags=5, season_lengths=(24,), trend="linear")
    weight = model.covariates.weight[0, 0].detach().numpy().reshape(2, 5)  # step 1: lag 2 of the covariate acts
    np.testing.assert_allclose(weight[:, 1], 0.4, atol=0.05)
    bare, _ = solved(data._replace(past=None), lags=4, season_lengths=(24,), trend="linear")
    batch = windows(model, data)
    assert error(model, batch) < 0.9 * error(bare, batch._replace(past=None))
    shares = [row["share"] for row in model.explain()["covariates"] if row["variate"] == 0]
    assert sum(shares) == pytest.approx(1.0)


def test_lags_and_covariates_are_one_joint_regression() -> None:
    data = training(past=1, variates=1, size=600, split=False)
    model, _ = solved(data, lags=3, covariate_lags=4, horizon=2)
    y, x = data.values[:, 0].numpy(), data.past[:, 0].numpy()
    rows = range(4, 600 - 1)
    inputs = np.array([[*y[t - 3 : t][::-1], *x[t - 4 : t][::-1], 1.0] for t in rows])
    expected = np.linalg.lstsq(inputs, np.array([[y[t], y[t + 1]] for t in rows]), rcond=None)[0].T
    np.testing.assert_allclose(model.ar.weight[0].detach().numpy(), expected[:, :3], atol=1e-9)
    np.testing.assert_allclose(model.covariates.weight[0].detach().numpy(), expected[:, 3:7], atol=1e-9)


def test_events_act_around_their_step_also_at_the_edge_of_the_window() -> None:
    size = 2000
    flags = np.zeros(size)
    flags[np.random.default_rng(1).choice(size - 5, 120, replace=False) + 2] = 1.0
    shape = {-1: 0.5, 0: 2.0, 1: 1.0}
    values = np.zeros(size)
    for offset, effect in shape.items():
        values += effect * np.roll(flags, offset)
    values += 0.01 * np.random.default_rng(2).normal(size=size)
    data = TrainingSeries(
        values=torch.from_numpy(values[:, None]),
        mask=torch.ones(size, 1, dtype=torch.bool),
        indptr=torch.tensor([0, size]),
        offset=torch.tensor([0]),
        known=torch.from_numpy(flags[:, None]),
    )
    model, _ = solved(data, lags=0, events=(0,), event_offsets=(-1, 1), horizon=3, length=5)
    effects = {row["column"]: row["value"] for row in model.explain()["effects"]}
    for offset, effect in shape.items():
        assert effects[f"event 0 at {offset:+d}"] == pytest.approx(effect, abs=0.01)
    known = torch.zeros(1, 8, 1, dtype=torch.float64)
    known[0, 4] = 1.0  # on the last context row: its after-effect is the first step
    batch = Batch(torch.zeros(1, 5, 1).double(), torch.ones(1, 5, 1, dtype=torch.bool), known=known)
    base = model(batch._replace(known=torch.zeros_like(known))).raw
    np.testing.assert_allclose((model(batch).raw - base)[0, :, 0, 0].detach().numpy(), [1.0, 0.0, 0.0], atol=0.01)


def test_piecewise_trend_follows_a_break() -> None:
    step = np.arange(1000.0)
    values = np.where(step < 400, step, 400 + 3 * (step - 400)) / 400
    data = training(size=1000, variates=1, split=False)._replace(values=torch.from_numpy(values[:, None]))
    model, _ = solved(data, lags=0, trend="piecewise", changepoints=9, changepoint_range=1.0, horizon=5, length=4)
    effects = {row["column"]: row["value"] for row in model.explain()["effects"]}
    assert effects["change at 0.400"] == pytest.approx(2 * 1000 / 400, rel=1e-6)
    batch = Batch(
        torch.zeros(1, 4, 1).double(), torch.ones(1, 4, 1, dtype=torch.bool), cutoff_index=torch.tensor([1000])
    )
    expected = (400 + 3 * (1000 + np.arange(5) - 400)) / 400
    np.testing.assert_allclose(model(batch).raw[0, :, 0, 0].detach().numpy(), expected, rtol=1e-8)


def test_overlapping_seasons_keep_each_frequency_once() -> None:
    model = build(training(), season_lengths=(24, 168), season_orders=(3, 14), lags=2)
    frequencies = {round(frequency, 12) for _, frequency, _ in model.additive.plan.waves()}
    assert len(frequencies) == 3 + 14 - 2  # 7/168 and 14/168 are 1/24 and 2/24
    alone = build(training(), season_lengths=(4,), lags=2)  # two steps a turn: no sine
    assert [kind for _, _, kind in alone.additive.plan.waves()] == ["cos", "sin", "cos"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": "shared", "solver": "sparse", "lags": 6},
        {"hidden": (4,), "trend": "piecewise", "season_lengths": (24,)},
        {"covariate_lags": 3, "covariate_hidden": (4,)},
    ],
)
def test_components_sum_to_the_location_for_all_parts(settings: dict[str, Any]) -> None:
    data = training(known=2, past=1, size=900)
    model, _ = solved(data, params=3, events=(1,), event_offsets=(0, 1), **settings)
    batch = windows(model, data, 20)
    prediction: Prediction = model(batch)
    assert prediction.raw.shape == (20, 4, 2, 3)
    parts = model.components(batch)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), prediction.raw[..., 0])
    assert {"lags", "mean", "known", "events", "covariates"} <= set(parts)


@pytest.mark.parametrize("solver", ["ols", "ridge", "sparse", "omp", "irls", "yule_walker", "burg"])
def test_every_solver_forecasts_an_ar_process_near_its_noise(solver: str) -> None:
    rng = np.random.default_rng(4)
    data = training(size=5000, variates=1)._replace(values=torch.from_numpy(simulate(TRUTH, 5000, rng)[:, None]))
    model, report = solved(data, solver=solver, lags=6, horizon=1, params=2)
    assert report.method == solver
    assert report.finished
    assert error(model, windows(model, data, 2000)) == pytest.approx(1.0, abs=0.05)
    assert float(report.residual_scale[0, 0]) == pytest.approx(1.0, abs=0.05)


def test_irls_beats_least_squares_under_heavy_tailed_shocks() -> None:
    from scipy.signal import lfilter

    distance = {"irls": 0.0, "ols": 0.0}
    for seed in range(8):
        shocks = np.random.default_rng(seed).standard_t(1.5, size=600)
        values = lfilter([1.0], [1.0, *-TRUTH], shocks)
        data = training(size=600, variates=1, split=False)._replace(values=torch.from_numpy(values[:, None]))
        for solver in distance:
            model, _ = solved(data, solver=solver, lags=3, horizon=1)
            distance[solver] += np.abs(model.ar.weight[0, 0].detach().numpy() - TRUTH).sum()
    assert distance["irls"] < 0.7 * distance["ols"]


def test_auto_uses_ridge_when_there_are_few_windows() -> None:
    _, report = solved(training(size=120, variates=1, split=False), horizon=1)
    assert report.method == "ridge"
    assert report.details["ridge_0" if "ridge_0" in report.details else "ridge"] > 0.0
    assert solved(training(size=2000, variates=1, split=False), horizon=1)[1].method == "ols"


def test_shared_weights_are_the_sum_over_variates() -> None:
    data = training(variates=3, split=False)
    shared, _ = solved(data, weights="shared", lags=4, horizon=2)
    stacked = data.values - data.values.mean(0)
    one = TrainingSeries(
        values=stacked.T.reshape(-1, 1),
        mask=torch.ones(9000, 1, dtype=torch.bool),
        indptr=torch.tensor([0, 3000, 6000, 9000]),
        offset=torch.zeros(3, dtype=torch.int64),
    )
    single, _ = solved(one, lags=4, horizon=2)
    torch.testing.assert_close(shared.ar.weight, single.ar.weight, atol=1e-10, rtol=0)


def test_gaps_with_additive_parts_and_all_missing_context() -> None:
    data = training(size=3000)
    model, _ = solved(data, lags=5, trend="linear", season_lengths=(24,))
    batch = windows(model, data)
    mask = torch.rand(batch.context_mask.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    poisoned = torch.where(mask, batch.context, 1e9)
    holed = batch._replace(context=poisoned, context_mask=mask)
    assert error(model, holed) < 1.1 * error(model, batch)
    nothing = batch._replace(context=torch.zeros_like(batch.context), context_mask=torch.zeros_like(mask))
    assert error(model, nothing) < 0.5  # trend and season alone: the process itself has deviation 0.4


def test_a_loaded_model_forecasts_and_explains_the_same() -> None:
    data = training(known=1, past=1)
    model, _ = solved(data, trend="linear", season_lengths=(24,), lags=6)
    other = build(data, trend="linear", season_lengths=(24,), lags=6)
    other.load_state_dict(model.state_dict())
    batch = windows(model, data, 30)
    assert torch.equal(model(batch).raw, other(batch).raw)
    assert model.explain() == other.explain()


def test_time_stays_exact_in_float32() -> None:
    data = training(split=False)
    data = data._replace(offset=torch.tensor([50_000_000]))
    model, _ = solved(data, season_lengths=(24,), lags=3)
    batch = windows(model, data, 50)
    exact = model(batch).raw
    single = model.float()(Batch(*(v.float() if v is not None and v.is_floating_point() else v for v in batch))).raw
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=0)


def test_explanation_of_a_sparse_cycle() -> None:
    angle, modulus = 2 * np.pi / 12, 0.95
    weight = np.array([2 * modulus * np.cos(angle), -(modulus**2)])
    values = simulate(weight, 20_000, np.random.default_rng(6))
    data = training(size=20_000, variates=1, split=False)._replace(values=torch.from_numpy(values[:, None]))
    model, _ = solved(data, solver="sparse", lags=20, horizon=1)
    shown = model.explain()
    assert [row["lag"] for row in shown["lags"]] == [1, 2]
    chosen = [row for row in shown["coefficients"] if row["selected"]]
    assert all(row["post_selection"] and 0.001 < row["standard_error"] < 0.01 for row in chosen)
    for row, truth in zip(chosen, weight, strict=True):
        assert abs(row["value"] - truth) < 4 * row["standard_error"]
    root = shown["roots"][0]
    assert root["stable"]
    assert root["cycle_length"] == pytest.approx(12, rel=0.02)
    assert root["half_life"] == pytest.approx(np.log(0.5) / np.log(modulus), rel=0.1)
    assert shown["pacf"][1]["value"] == pytest.approx(-(modulus**2), abs=0.02)
    assert abs(shown["pacf"][5]["value"]) < 3 * shown["pacf"][5]["bound"]
    assert shown["impulse_response"][1]["value"] == pytest.approx(weight[0], abs=0.02)
    assert shown["residuals"][0]["p_value"] > 0.001
    short, _ = solved(data, lags=1, horizon=1)
    assert short.explain()["residuals"][0]["p_value"] < 1e-6  # one lag leaves structure behind


def test_penalty_rises_with_progress_and_changes_no_weight() -> None:
    data = training(size=500)
    model, report = solved(data, solver="sgd", density=0.2, lags=5)
    assert not report.finished
    before = model.ar.weight.detach().clone()
    sizes = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        model.anneal(progress)
        sizes.append(float(model(windows(model, data, 4)).aux_losses["sparsity"].detach()))
    assert sizes[0] == 0.0
    assert sizes[1] == pytest.approx(sizes[2] / 4)
    assert sizes[2] == pytest.approx(sizes[3])
    expected = (
        0.01 * (1 / 0.2 - 1) * (2 * torch.sigmoid(3 * (before.abs() + 1e-9) ** (1 / 3)) - 1).mean(2).sum(1).mean()
    )
    assert sizes[3] == pytest.approx(float(expected))
    assert torch.equal(model.ar.weight, before)
    assert model.eval()(windows(model, data, 4)).aux_losses is None  # a validation loss that rose would end training


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "burg", "lags": 3}, {"trend": "linear", "lags": 3}, {"weights": "shared"}]
)
def test_a_variate_without_any_observation_forecasts_the_mean(settings: dict[str, Any]) -> None:
    data = training(size=600, split=False)
    mask = data.mask.clone()
    mask[:, 1] = False
    holed = data._replace(mask=mask, values=torch.where(mask, data.values, 0.0))
    model, report = solved(holed, params=2, **settings)
    assert report.residual_scale is not None
    assert bool(torch.isfinite(report.residual_scale).all())
    batch = windows(model, holed, 5)
    assert torch.isfinite(model(batch).raw).all()
    if settings.get("weights") != "shared":
        assert float(model(batch).raw[:, :, 1].abs().max().detach()) < 1e-9
        alone, _ = solved(data._replace(values=data.values[:, :1], mask=data.mask[:, :1]), **settings)
        torch.testing.assert_close(alone.ar.weight[0], model.ar.weight[0])


def test_solving_twice_gives_the_same_model() -> None:
    data = training(known=1)
    model, _ = solved(data, trend="piecewise", season_lengths=(24,), lags=5)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    model.solve(data)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ols", "expected_nonzero": 3}, "no effect with solver 'ols'"),
        ({"solver": "sparse", "ridge": 0.1}, "no effect with solver 'sparse'"),
        ({"solver": "sparse", "hidden": (4,)}, "cannot train it"),
        ({"hidden": (4,), "mode": "recursive"}, "exact for linear models only"),
        ({"solver": "burg", "mode": "direct"}, "one-step"),
        ({"season_lengths": (24,), "season_orders": (1, 2)}, "2 entries"),
        ({"season_lengths": (1.5,)}, "season_lengths"),
        ({"solver": "sparse", "density": 0.1, "expected_nonzero": 2}, "not both"),
        ({"solver": "sparse", "density": 1.5}, "density"),
        ({"event_offsets": (1, 0)}, "event_offsets"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ARNetConfig(**settings)


def test_settings_that_contradict_the_data_are_refused() -> None:
    with pytest.raises(ModelError, match=r"lags is 31, but context_length is 30"):
        build(training(), lags=31)
    with pytest.raises(ModelError, match="named|names known"):
        build(training(known=1), events=(1,))
    with pytest.raises(ModelError, match="knows no covariates"):
        build(training(past=1), solver="burg")
    with pytest.raises(ModelError, match="future values of past covariates"):
        build(training(past=1), mode="recursive")
    with pytest.raises(ModelError, match="cutoff_index"):
        model = build(training(), trend="linear")
        model(Batch(torch.zeros(1, 30, 2).double(), torch.ones(1, 30, 2, dtype=torch.bool)))
    with pytest.raises(ModelError, match="no gap-free stretch"):
        solved(training(size=40))
