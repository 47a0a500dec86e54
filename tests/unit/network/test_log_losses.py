"""Losses of logarithms: against a float64 loop in data units for every scaling, negative forecasts, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.contracts.tensors import Batch, DataSpec, Prediction
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.layers.likelihoods import log_or_line
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network
from tsforge.training.warm_start import compare

L, H, V = 12, 4, 2
LOSSES = ("msle", "male")
SCALINGS = ("none", "global", "series", "window", "window_mean", "last")


def make_panel(shift: float = 0.0) -> Panel:
    """Two series of counts whose sizes differ by hundreds, with gaps and zeros."""
    rng = np.random.default_rng(0)
    parts = []
    for number, size in enumerate((2.0, 500.0)):
        values = rng.poisson(size * np.exp(0.4 * rng.normal(size=(160, V)))).astype(float) + shift
        values[rng.random(values.shape) < 0.1] = np.nan
        table = pl.DataFrame({"id": [f"s{number}"] * 160, "t": np.arange(160), "a": values[:, 0], "b": values[:, 1]})
        parts.append(table.with_columns(pl.col("a", "b").fill_nan(None)))
    return Panel.from_frame(
        SeriesFrame.from_long(pl.concat(parts), time="t", series_id="id", targets=["a", "b"], freq="1i")
    )


@pytest.fixture(scope="module")
def panel() -> Panel:
    return make_panel()


@pytest.fixture(scope="module")
def windows(panel: Panel) -> WindowDataset:
    return WindowDataset(panel, WindowSpec(context_length=L, horizon=H), None, 120)


def make_network(panel: Panel, model: Any, loss: str, scaling: str = "global") -> ForecastNetwork:
    settings = {"model": model, "likelihood": {"name": "point", "loss": loss}, "scaling": {"kind": scaling}}
    network = build_network(
        validate(NetworkConfig, settings), DataSpec(context_length=L, horizon=H, num_variates=V), seed=1
    )
    network.fit_scaler(panel.training_series(None, 120))
    return network


def batch_of(windows: WindowDataset) -> Batch:
    batch = next(iter(windows.batches(40, shuffle=True)))
    assert batch.target is not None
    assert batch.target_mask is not None
    wild = torch.where(batch.target_mask, batch.target, -77.0)  # what is not observed must not matter
    return batch._replace(target=wild)


def log(value: float) -> float:
    return math.log1p(value) if value > 0 else value


def loop(network: ForecastNetwork, batch: Batch, loss: str) -> list[tuple[float, int]]:
    """Return sum and number of the errors of every window."""
    with torch.no_grad():
        scaled = network(batch).raw[..., 0].double()
        loc, scale = (part.double() for part in network.scaler.stats(batch))
    found = []
    for b in range(len(scaled)):
        total, cells = 0.0, 0
        for h in range(H):
            for v in range(V):
                if bool(batch.target_mask[b, h, v]):
                    forecast = float(scaled[b, h, v]) * float(scale[b, 0, v]) + float(loc[b, 0, v])
                    error = log(forecast) - math.log1p(float(batch.target[b, h, v]))
                    total += error**2 if loss == "msle" else abs(error)
                    cells += 1
        found.append((total, cells))
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_equals_a_loop_in_data_units(panel: Panel, windows: WindowDataset, loss: str, scaling: str) -> None:
    network = make_network(panel, "dlinear", loss, scaling).double().eval()
    batch = batch_of(windows)
    batch = batch._replace(context=batch.context.double(), target=batch.target.double())
    expected = loop(network, batch, loss)
    total, cells = (sum(part) for part in zip(*expected, strict=True))
    assert network.loss(batch)["loss"].item() == pytest.approx(total / cells, rel=1e-12)
    assert float(network.evaluate(batch)["loss"]) == pytest.approx(total / cells, rel=1e-12)
    each = [part / max(count, 1) for part, count in expected]
    assert network.window_losses(batch).tolist() == pytest.approx(each, rel=1e-12)
    single = make_network(panel, "dlinear", loss, scaling).eval()
    assert single.loss(batch_of(windows))["loss"].item() == pytest.approx(total / cells, rel=1e-3)


def test_the_loss_of_the_context_is_one_of_logarithms_too(panel: Panel, windows: WindowDataset) -> None:
    network = make_network(panel, "dlinear", "msle").double().eval()
    forward = network.model.forward

    def with_context(batch: Batch) -> Prediction:
        raw = forward(batch).raw
        return Prediction(raw, context_raw=torch.full((len(raw), 3, V, 1), 0.5, dtype=raw.dtype), context_weight=2.0)

    network.model.forward = with_context
    batch = batch_of(windows)
    batch = batch._replace(context=batch.context.double(), target=batch.target.double())
    with pytest.raises(ModelError, match="'dlinear' fills context_raw but does not declare context_outputs"):
        network.loss(batch)
    network.capabilities = replace(network.capabilities, context_outputs=True)
    loc, scale = network.scaler.stats(batch)
    errors = [
        (log(0.5 * float(scale[b, 0, v]) + float(loc[b, 0, v])) - math.log1p(float(batch.context[b, t, v]))) ** 2
        for b in range(len(loc))
        for t in range(L - 3, L)
        for v in range(V)
        if bool(batch.context_mask[b, t, v])
    ]
    assert network.loss(batch)["context_nll"].item() == pytest.approx(2 * sum(errors) / len(errors), rel=1e-12)


def test_below_zero_the_logarithm_goes_on_as_its_tangent() -> None:
    x = torch.tensor([-1e6, -3.0, -1e-9, 0.0, 1e-9, 2.0, 1e9], dtype=torch.float64, requires_grad=True)
    y = log_or_line(x)
    y.sum().backward()
    expected = [-1e6, -3.0, -1e-9, 0.0, 1e-9, math.log(3), math.log1p(1e9)]
    assert y.tolist() == pytest.approx(expected, rel=1e-12)
    assert x.grad.tolist() == pytest.approx([1, 1, 1, 1, 1, 1 / 3, 1e-9], rel=1e-6)
    assert torch.autograd.gradcheck(
        log_or_line, torch.tensor([-2.0, -0.1, 0.1, 5.0], dtype=torch.float64).requires_grad_()
    )


def test_the_best_constant_is_the_mean_of_logarithms() -> None:
    values = torch.tensor([0.0, 3.0, 10.0, 1000.0], dtype=torch.float64)
    best = torch.expm1(values.log1p().mean()).requires_grad_()
    (log_or_line(best) - log_or_line(values)).square().sum().backward()
    assert abs(float(best.grad)) < 1e-12


@pytest.mark.parametrize("model", [{"name": "dlinear"}, {"name": "regenn", "ff_dim": 8}])
def test_training_lowers_the_error_of_logarithms_more_than_the_squared_error_does(panel: Panel, model: Any) -> None:
    found = {}
    train, valid = (
        WindowDataset(panel, WindowSpec(context_length=L, horizon=H), *at) for at in ((None, 120), (120, 160))
    )
    for loss in ("msle", "mse"):
        network = make_network(panel, model, loss)
        plain = {"max_epochs": 12, "batch_size": 64, "learning_rate": 0.01, "start_margin": 0.0, "accelerator": "cpu"}
        series = panel.training_series(None, 120)
        fit_network(network, train, valid, validate(TrainConfig, plain), series=series, progress=False)
        judge = make_network(panel, model, "msle")
        judge.load_state_dict(network.state_dict())
        found[loss] = float(np.mean([float(judge.eval().evaluate(part)["loss"]) for part in valid.batches(512)]))
        assert not math.isnan(compare(judge, network.state_dict(), valid, 64).gain)
    assert found["msle"] < 0.95 * found["mse"]


def test_negative_data_and_fits_without_steps_are_refused() -> None:
    below = make_panel(-3.0)
    network = make_network(below, "dlinear", "msle")
    with pytest.raises(
        ModelError, match=r"loss=msle compares logarithms .* \d+ of \d+ training cells are negative .*0, 1"
    ):
        network.prepare(below.training_series(None, 120))
    hidden = below.training_series(None, 120)
    network.prepare(hidden._replace(mask=hidden.mask & (hidden.values >= 0)))  # a cell that is not observed is no value
    make_network(below, "dlinear", "mae").prepare(hidden)
    panel = make_panel()
    train = WindowDataset(panel, WindowSpec(context_length=L, horizon=H), None, 120)
    for model, reason in (("linear", "solved"), ("last_value", "solved")):
        network = make_network(panel, model, "male", "none")
        with pytest.raises(ConfigError, match=rf"a loss of logarithms has no effect: model '{model}' .*\({reason}\)"):
            fit_network(network, train, None, TrainConfig(), series=panel.training_series(None, 120), progress=False)
