"""Settings of likelihood and scaling that a fit would not read are refused, with how to go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.contracts.tensors import DataSpec
from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import TrainResult, fit_network

LENGTH, HORIZON = 12, 3


@pytest.fixture(scope="module")
def panel() -> Panel:
    values = np.random.default_rng(0).exponential(1.0, 160) ** 2
    table = pl.DataFrame({"time": np.arange(160), "y": values})
    return Panel.from_frame(SeriesFrame.from_wide(table, time="time", freq="1i"))


def fitted(panel: Panel, model: Any, **parts: Any) -> tuple[ForecastNetwork, TrainResult]:
    spec = WindowSpec(context_length=LENGTH, horizon=HORIZON)
    network = build_network(
        NetworkConfig.model_validate({"model": model, **parts}),
        DataSpec(context_length=LENGTH, horizon=HORIZON, num_variates=1),
        seed=1,
    )
    train = TrainConfig(max_epochs=2, batch_size=16, learning_rate=0.01, start_margin=0.0, accelerator="cpu")
    windows = (WindowDataset(panel, spec, None, 110), WindowDataset(panel, spec, 110, None))
    result = fit_network(network, *windows, train, series=panel.training_series(None, 110), progress=False)
    return network, result


def point(**settings: Any) -> dict[str, Any]:
    return {"name": "point", **settings}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("linear", "solved"),
        ("last_value", "solved"),
        ({"name": "ar_net", "lags": 4}, "solved"),
        ({"name": "ar_net", "lags": 4, "solver": "irls"}, "solved"),
        ("var", "solved"),
    ],
)
@pytest.mark.parametrize("likelihood", [point(loss="mae"), point(loss="huber", huber_delta=0.1)])
def test_closed_forms_refuse_a_loss_they_do_not_minimise(
    panel: Panel, model: Any, reason: str, likelihood: dict[str, Any]
) -> None:
    loss = likelihood["loss"]
    with pytest.raises(
        ConfigError, match=rf"^likelihood\.loss={loss} has no effect: .*\({reason}\); leave .*solver=sgd .*irls"
    ):
        fitted(panel, model, likelihood=likelihood)


@pytest.mark.parametrize(
    "model",
    [
        "dlinear",
        {"name": "linear", "solver": "sgd"},
        {"name": "ar_net", "lags": 4, "solver": "sgd"},
        {"name": "ar_net", "lags": 4, "hidden": [4]},
        {"name": "s4", "d_model": 4, "d_state": 4, "num_layers": 1, "patch_length": 1},
        {"name": "regenn", "ff_dim": 4},
        {"name": "committee", "size": 2, "member": {"name": "gru", "d_model": 4}},
    ],
)
def test_a_closed_form_that_is_only_a_start_is_trained_by_the_loss(panel: Panel, model: Any) -> None:
    states = []
    for likelihood in (point(), point(loss="mae"), point(loss="huber", huber_delta=0.1)):
        network, result = fitted(panel, model, likelihood=likelihood)
        assert result.epochs == 2
        states.append(torch.cat([value.flatten() for value in network.model.parameters()]))
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["normal", "student_t", "quantiles"])
def test_closed_forms_keep_distributions(panel: Panel, name: str) -> None:
    assert fitted(panel, "linear", likelihood={"name": name})[1].stopped_by == "solved"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"likelihood": point(huber_delta=0.01)}, r"^likelihood\.huber_delta has no effect with likelihood\.loss=mse"),
        ({"likelihood": point(loss="mae", huber_delta=2.0)}, r"huber_delta .* likelihood\.loss=mae; .*loss=huber"),
        ({"scaling": {"kind": "none", "robust": True}}, r"^scaling\.robust has no effect with scaling\.kind=none"),
        ({"scaling": {"kind": "series_max", "robust": True}}, r"scaling\.robust has no effect .*kind=series_max"),
    ],
)
def test_settings_of_another_loss_or_scaling_are_refused_by_a_fit(
    panel: Panel, parts: dict[str, Any], message: str
) -> None:
    model = {"name": "regenn", "ff_dim": 4}
    with pytest.raises(ConfigError, match=message):
        fitted(panel, model, **parts)
    stored = NetworkConfig.model_validate({"model": model, **parts})
    assert (
        NetworkConfig.model_validate(stored.model_dump(mode="json")) == stored
    )  # what earlier fits stored still loads
    defaults = {"likelihood": point(huber_delta=1.0), "scaling": {"kind": "none", "robust": False}}
    assert fitted(panel, model, **defaults)[1].epochs == 2
