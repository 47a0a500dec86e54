"""The network: what it refuses, what models see, units in and out, components, distributions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import Config, search_space, validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models.registry import MODELS, resolve_model_config
from tsforge.network import NetworkConfig, build_network

LIKELIHOODS = ["point", "normal", "student_t", "quantiles"]
SCALINGS = ["none", "global", "series", "window", "window_mean", "last"]


class _Fit(Config):
    network: NetworkConfig


class ProbeConfig(ModelConfig):
    """No settings."""

    name: Literal["probe"] = "probe"


class Probe(ForecastModel[ProbeConfig]):
    """Forecasts zeros (the scaled location) and remembers what it saw."""

    config_class = ProbeConfig
    capabilities = Capabilities(closed_form=True, probabilistic=False)
    seen: ClassVar[list[Any]] = []

    def __init__(self, config: ProbeConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Prediction:
        Probe.seen.append(batch)
        shape = (batch.context.shape[0], self.spec.horizon, self.spec.num_variates, 1)
        return Prediction(self.bias.expand(shape), aux_losses={"extra": self.bias * 0 + 0.25})

    def solve(self, data: TrainingSeries) -> SolveReport:
        Probe.seen.append(data)
        spread = torch.arange(1.0, 13.0).reshape(6, 2)
        return SolveReport(finished=True, method="probe", residual_scale=spread)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> type[Probe]:
    monkeypatch.setitem(MODELS._classes, "probe", Probe)
    Probe.seen.clear()
    return Probe


@pytest.fixture
def batch(windows) -> Batch:
    return windows.__getitems__([0, 1, 100, 250])


# configuration


def test_model_config_is_resolved_through_the_registry() -> None:
    for given in ("dlinear", {"name": "dlinear"}, {"name": "dlinear", "kernel": 25}):
        assert NetworkConfig.model_validate({"model": given}).model.model_dump() == {
            "name": "dlinear",
            "kernel": 25,
            "bias": True,
        }
    config = NetworkConfig.model_validate({"model": {"name": "dlinear", "kernel": 5}})
    again = validate(NetworkConfig, config.model_dump(mode="json"))
    assert again == config
    assert type(again.model) is type(config.model)
    assert search_space(config)["model.kernel"]["choices"] == [5, 13, 25, 49]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "dlinear", "kernle": 5}, r"model\.kernle: unknown key; did you mean 'kernel'\?"),
        ({"name": "dlinear", "kernel": "wide"}, r"model\.kernel: .*integer"),
        ({"name": "dlinear", "kernel": -1}, r"model\.kernel: .*greater than or equal to 1"),
        ("dlinera", r"unknown model 'dlinera'; did you mean 'dlinear'\?"),
        ({"kernel": 5}, r"needs a 'name'"),
        (None, r"needs a 'name'"),
    ],
)
def test_mistakes_in_the_model_config_are_named(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(_Fit, {"network": {"model": model}})
    with pytest.raises(ConfigError, match=message):
        resolve_model_config(model)


def test_unknown_likelihood_and_scaling_are_refused() -> None:
    with pytest.raises(ConfigError, match="likelihood"):
        validate(NetworkConfig, {"model": "dlinear", "likelihood": {"name": "gamma"}})
    with pytest.raises(ConfigError, match=r"scaling\.kind"):
        validate(NetworkConfig, {"model": "dlinear", "scaling": {"kind": "minmax"}})


@pytest.mark.parametrize("kind", ["known", "past", "static"])
def test_covariates_the_model_cannot_use_are_refused(kind: str) -> None:
    spec = DataSpec(context_length=24, horizon=6, num_variates=2, **{f"num_{kind}": 2})
    with pytest.raises(
        ConfigError, match=rf"'dlinear' cannot use the 2 {kind} covariate.* drop them from data\.{kind}"
    ):
        build_network(NetworkConfig.model_validate({"model": "dlinear"}), spec)


def test_scaling_the_model_does_not_allow_is_refused(monkeypatch: pytest.MonkeyPatch, probe: type[Probe]) -> None:
    monkeypatch.setattr(probe, "capabilities", Capabilities(scaling=("series", "none")))
    spec = DataSpec(context_length=24, horizon=6, num_variates=2)
    assert build_network(NetworkConfig.model_validate({"model": "probe"}), spec).scaling == "series"
    with pytest.raises(ConfigError, match="'probe' does not support scaling 'window'; use one of series, none"):
        build_network(NetworkConfig.model_validate({"model": "probe", "scaling": {"kind": "window"}}), spec)


# what a model sees


def test_models_see_scaled_values_zeros_for_gaps_and_no_target(probe, make_network, batch) -> None:
    network = make_network(model="probe")
    network.loss(batch)
    seen = probe.seen[-1]
    assert seen.target is None
    assert seen.target_mask is None
    assert seen.cutoff_index is None  # the model does not declare absolute time
    assert seen.context[~batch.context_mask].abs().max() == 0
    expected = (batch.context - network.scaler.global_loc) / network.scaler.global_scale
    torch.testing.assert_close(seen.context[batch.context_mask], expected[batch.context_mask])


def test_aux_losses_are_added(probe, make_network, batch) -> None:
    parts = make_network(model="probe").loss(batch)
    assert set(parts) == {"loss", "nll", "extra"}
    assert parts["loss"].item() == pytest.approx(parts["nll"].item() + 0.25)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_sum_of_a_loss_has_at_least_single_precision(probe, make_network, batch, dtype, expected) -> None:
    network = make_network(model="probe")
    forward = network.model.forward

    def cast(given: Batch) -> Prediction:
        raw = forward(given).raw.to(dtype)
        return Prediction(raw, aux_losses={"extra": torch.tensor(0.1, dtype=dtype)})

    network.model.forward = cast
    if dtype == torch.float64:
        network = network.double()
    parts = network.loss(batch)
    assert parts["loss"].dtype == expected
    torch.testing.assert_close(parts["loss"], (parts["nll"] + parts["extra"]).to(expected), rtol=1e-15, atol=0)


def test_closed_form_sees_the_scaled_span_and_sets_the_spread(probe, make_network, panel, batch) -> None:
    network = make_network(model="probe", likelihood={"name": "normal"})
    series = panel.training_series(None, 200)
    report = network.solve(series)
    assert report is not None
    assert report.finished
    scaled = probe.seen[-1].values[series.mask[:, 0], 0]
    assert scaled.mean().item() == pytest.approx(0, abs=1e-6)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    # a location-only model gets Normal output with the reported spread, in data units
    low, high = network.predict(batch, [0.15865525393145707, 0.8413447460685429]).quantiles.unbind(-1)
    expected = 2 * report.residual_scale * network.scaler.global_scale
    torch.testing.assert_close(high - low, expected.expand_as(low), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["window", "window_mean", "last"])
def test_closed_form_refuses_scalings_that_differ_by_window(probe, make_network, panel, kind) -> None:
    network = make_network(model="probe", scaling={"kind": kind})
    with pytest.raises(ConfigError, match=f"closed form and cannot use scaling '{kind}'"):
        network.solve(panel.training_series(None, 200))


@pytest.mark.parametrize("name", LIKELIHOODS[1:])
def test_residual_spread_from_windows(probe, make_network, windows, name) -> None:
    """The probe forecasts scaled zeros, so its residuals are the scaled targets themselves."""
    network = make_network(model="probe", likelihood={"name": name})
    network.fit_residual_scale(windows.batches(64))
    whole = network.scaler.scale(windows.__getitems__(range(len(windows))))
    seen = whole.target_mask
    expected = ((whole.target.square() * seen).sum(0) / seen.sum(0)).sqrt()
    offset = network.likelihood.initial_raw(expected.double()).float()
    torch.testing.assert_close(network.param_offset, offset, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"must be \(6, 2\)"):
        network.set_residual_scale(torch.ones(2, 6))


# units


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "none"])
@pytest.mark.parametrize("robust", [False, True])
def test_forecasts_follow_a_change_of_units(kind: str, likelihood: str, robust: bool, make_network, panel) -> None:
    """y -> a y + b with a > 0, refitted: mean, quantiles, probabilities and components follow."""
    from dataclasses import replace

    from tsforge.data.windows import WindowDataset, WindowSpec

    a, b = 4.0, -100.0
    num = panel.num_targets
    values = panel.values.copy()
    values[:, :num] = np.where(panel.target_observed, a * panel.values[:, :num] + b, 0.0)
    other = replace(panel, values=values)
    settings = {"likelihood": {"name": likelihood}, "scaling": {"kind": kind, "robust": robust}}
    spec = WindowSpec(context_length=24, horizon=6)
    levels = [] if likelihood == "point" else [0.02, 0.3, 0.5, 0.9]
    results = []
    for data in (panel, other):
        network = make_network(seed=3, data=data, **settings)
        batch = WindowDataset(data, spec).__getitems__([3, 40, 300])
        forecast = network.predict(batch, levels)
        probability = None if not levels else network.cdf(batch, batch.target)
        results.append((forecast, probability, network.components(batch)))
    (first, p_first, parts_first), (second, p_second, parts_second) = results
    tolerance = {"rtol": 1e-4, "atol": 5e-3}
    torch.testing.assert_close(a * first.mean + b, second.mean, **tolerance)
    torch.testing.assert_close(a * sum(parts_first.values()) + b, sum(parts_second.values()), **tolerance)
    if levels:
        torch.testing.assert_close(a * first.quantiles + b, second.quantiles, **tolerance)
        seen = WindowDataset(panel, spec).__getitems__([3, 40, 300]).target_mask
        torch.testing.assert_close(p_first[seen], p_second[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("likelihood", LIKELIHOODS[1:])
def test_quantiles_ascend_and_agree_with_probabilities(likelihood: str, make_network, batch) -> None:
    network = make_network(seed=5, likelihood={"name": likelihood}, scaling={"kind": "window"})
    levels = [0.01, 0.05, 0.5, 0.8, 0.99]
    forecast = network.predict(batch, levels)
    assert forecast.quantiles.shape == (4, 6, 2, 5)
    assert bool((forecast.quantiles.diff(dim=-1) >= 0).all())
    for index, level in enumerate(levels):
        found = network.cdf(batch, forecast.quantiles[..., index])
        torch.testing.assert_close(found, torch.full_like(found, level), rtol=1e-2, atol=1e-3)
        tail = network.log_tail(batch, forecast.quantiles[..., index]).exp()
        torch.testing.assert_close(tail, torch.full_like(tail, 2 * min(level, 1 - level)), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("levels", [[0.5, 0.1], [0.0, 0.5], [0.5, 1.0], [0.1, 0.1]])
def test_bad_levels_are_refused(levels, make_network, batch) -> None:
    with pytest.raises(ModelError, match="ascend strictly between 0 and 1"):
        make_network(likelihood={"name": "normal"}).predict(batch, levels)


@pytest.mark.parametrize("kind", SCALINGS)
def test_components_sum_to_the_location_in_data_units(kind: str, make_network, batch) -> None:
    network = make_network(scaling={"kind": kind})
    parts = network.components(batch)
    assert list(parts) == ["level", "trend", "remainder"]
    torch.testing.assert_close(sum(parts.values()), network.predict(batch).mean, rtol=1e-5, atol=1e-4)


def test_losses_of_window_scaling_are_in_units_of_the_series(make_network, batch) -> None:
    """With mean squared error the loss equals that of the data-unit error over the series' training deviation."""
    network = make_network(scaling={"kind": "window"})
    error = network.predict(batch).mean - batch.target
    reference = network.scaler.series_scale[batch.series_index].unsqueeze(1)
    expected = (error / reference)[batch.target_mask].square().mean()
    assert network.loss(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", SCALINGS)
def test_hidden_cells_change_nothing(kind: str, likelihood: str, make_network, batch) -> None:
    network = make_network(likelihood={"name": likelihood}, scaling={"kind": kind})
    poisoned = batch._replace(
        context=torch.where(batch.context_mask, batch.context, torch.nan),
        target=torch.where(batch.target_mask, batch.target, torch.inf),
    )
    assert not bool(batch.context_mask.all())
    assert not bool(batch.target_mask.all())
    torch.testing.assert_close(network(batch).raw, network(poisoned).raw, rtol=0, atol=0)
    assert network.loss(batch)["loss"].item() == network.loss(poisoned)["loss"].item()


def test_evaluate_equals_a_plain_loop(make_network, batch) -> None:
    network = make_network()
    found = network.evaluate(batch)
    error = ((network.predict(batch).mean - batch.target) / network.scaler.global_scale)[batch.target_mask]
    assert found["cells"].item() == batch.target_mask.sum().item()
    assert found["mse"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert found["mae"].item() == pytest.approx(error.abs().mean().item(), rel=1e-4)


# shapes, seeds, state


def test_wrong_shapes_and_missing_parts_are_explained(make_network, batch) -> None:
    network = make_network()
    with pytest.raises(ModelError, match=r"reads \(batch, 24, 2\)"):
        network.predict(batch._replace(context=batch.context[:, 1:], context_mask=batch.context_mask[:, 1:]))
    with pytest.raises(ModelError, match="with a target"):
        network.loss(batch._replace(target=None, target_mask=None))
    with pytest.raises(ModelError, match="3 variates, the network was built for 2"):
        network.fit_scaler(
            TrainingSeries(torch.ones(4, 3), torch.ones(4, 3).bool(), torch.tensor([0, 4]), torch.tensor([0]))
        )
    with pytest.raises(ModelError, match="fit_scaler"):
        make_network(fit=False).predict(batch)


def test_weights_depend_on_the_seed_alone(make_network) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (make_network(seed=seed).model.trend.weight for seed in (7, 7, 8))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def _naive_dlinear(network, context: Tensor, kernel: int) -> Tensor:
    """The definition in float64: pad with edge values, average, two maps, one variate after the other."""
    half = kernel // 2
    rows = context.double().numpy()
    weights = {name: value.double().numpy() for name, value in network.model.state_dict().items()}
    out = np.zeros((rows.shape[0], network.spec.horizon, rows.shape[2]))
    for window in range(rows.shape[0]):
        for variate in range(rows.shape[2]):
            x = rows[window, :, variate]
            padded = np.concatenate([np.full(half, x[0]), x, np.full(half, x[-1])])
            trend = np.array([padded[start : start + kernel].mean() for start in range(len(x))])
            out[window, :, variate] = (
                weights["trend.weight"] @ trend
                + weights["trend.bias"]
                + weights["remainder.weight"] @ (x - trend)
                + weights["remainder.bias"]
            )
    return torch.from_numpy(out)


def test_gradients_of_torch_func_pass_masks_without_memory(make_network, batch) -> None:
    network = make_network(model={"name": "linear"})
    context = batch.context.clone()

    def first(values: Tensor) -> Tensor:
        inside = batch._replace(context=values, context_mask=torch.isfinite(values), target=None, target_mask=None)
        return network.location(inside)[0, 0, 0]

    found = torch.func.grad(first)(context)
    context.requires_grad_()
    (expected,) = torch.autograd.grad(first(context), context)
    torch.testing.assert_close(found, expected)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("kernel", [1, 3, 25, 47, 61])
def test_dlinear_equals_its_definition(kernel: int, make_network, batch) -> None:
    network = make_network(model={"name": "dlinear", "kernel": kernel})
    scaled = network.scaler.scale(batch)
    found = network.model(scaled).raw[..., 0].double()
    torch.testing.assert_close(found, _naive_dlinear(network, scaled.context, kernel), rtol=1e-5, atol=1e-5)
    parts = network.model.components(scaled)
    torch.testing.assert_close(parts["trend"] + parts["remainder"], found.float(), rtol=1e-4, atol=1e-5)


def test_dlinear_gradient_and_refusals(make_network) -> None:
    model = make_network().model.double()
    weight = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(model.averaged, (weight,))
    with pytest.raises(ConfigError, match="24 is even"):
        make_network(model={"name": "dlinear", "kernel": 24})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gpu_agrees_with_cpu(likelihood: str, make_network, batch) -> None:
    network = make_network(likelihood={"name": likelihood}, scaling={"kind": "window"})
    levels = [] if likelihood == "point" else [0.05, 0.5, 0.95]
    here = network.predict(batch, levels)
    there = network.cuda().predict(Batch._make(None if part is None else part.cuda() for part in batch), levels)
    torch.testing.assert_close(here.mean, there.mean.cpu(), rtol=1e-4, atol=1e-4)
    if levels:
        torch.testing.assert_close(here.quantiles, there.quantiles.cpu(), rtol=1e-4, atol=1e-4)
