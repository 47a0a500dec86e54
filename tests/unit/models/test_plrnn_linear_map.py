"""The PLRNN forecaster beside a linear map: the share of each, chosen on held-out windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plrnn_forecaster_cases import BASE, V, batch_of, make, spec_of, without_target
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.config import validate
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models.linear import Linear
from tsforge.models.plrnn import PLRNN, PLRNNForecastConfig
from tsforge.network import NetworkConfig, build_network
from tsforge.testing.generators import make_series, seasonal_panel
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

# ---- beside a linear map


def beside(spec: DataSpec, **settings: Any) -> PLRNN:
    """Return a model whose linear map is solved."""
    model = make(spec, **{"skip": "closed_form", "ridge": 10.0, **settings})
    model.solve(make_series(spec))
    return model


def linear_of(model: PLRNN, batch: Batch) -> Tensor:
    """Return the forecasts [B, H, V] of the linear forecaster by itself."""
    found = Linear(model.skip.config, model.spec).double()
    found.solve(make_series(model.spec))
    return found.eval()(Batch(batch.context, batch.context_mask)).raw[..., 0]


def alone(model: PLRNN) -> PLRNN:
    """Return the same network without a linear map."""
    config = model.config.model_copy(update={"skip": "none", "ridge": None})
    found = PLRNN(config, model.spec).double()
    found.load_state_dict({name: part for name, part in model.state_dict().items() if not name.startswith("skip")})
    return found.eval()


@pytest.mark.parametrize("normalisation", ["window", "last", "none"])
@pytest.mark.parametrize("ridge", [10.0, None])
def test_a_forecast_lies_between_linear_and_free_run(normalisation: str, ridge: float | None) -> None:
    spec = spec_of(num_known=1, num_static=1)
    batch = without_target(batch_of(spec, size=5, gaps=0.2))
    model = beside(spec, normalisation=normalisation, ridge=ridge)
    share = torch.tensor([0.0, 0.4, 1.0]).double()
    with torch.no_grad():
        free, linear = alone(model)(batch).raw[..., 0], linear_of(model, batch)
        torch.testing.assert_close(model(batch).raw[..., 0], free)  # before anything was chosen
        model.share.copy_(share)
        found = model(batch).raw[..., 0]
        parts = model.components(batch)
    torch.testing.assert_close(found, (1 - share) * linear + share * free)
    torch.testing.assert_close(sum(parts.values()), found)
    assert set(parts) > {"lags", "free_run"}
    assert [row["share"] for row in model.explain()["observer"]] == pytest.approx(share.tolist())


@pytest.mark.parametrize("objective", ["gtf", "horizon"])
def test_training_does_not_see_the_linear_map(objective: str) -> None:
    model, batch = beside(spec_of(), objective=objective), batch_of(size=6)
    model.share.fill_(0.3)
    ours, theirs = model.train()(batch), alone(model).train()(batch)
    assert torch.equal(ours.raw, theirs.raw)
    assert torch.equal(ours.context_raw, theirs.context_raw)
    assert not any(part.requires_grad for part in model.skip.parameters())


def windows_with(model: PLRNN, share: Tensor) -> Batch:
    """Return windows whose targets lie between both forecasts, away from them by what neither explains."""
    batch = batch_of(model.spec, size=12, gaps=0.3)
    with torch.no_grad():
        free, linear = alone(model)(without_target(batch)).raw[..., 0], linear_of(model, batch)
    assert batch.target_mask is not None
    target = linear + share * (free - linear)
    return batch._replace(target=torch.where(batch.target_mask, target, 1e3))


def test_the_share_is_the_best_on_held_out_windows() -> None:
    share = torch.tensor([0.25, 0.0, 1.0]).double()
    model = beside(spec_of(), gain=0.5)
    model.settle([windows_with(model, share)])
    torch.testing.assert_close(model.share, share, atol=1e-9, rtol=0.0)
    model.settle([windows_with(model, torch.tensor([-0.5, 1.5, 0.5]).double())])  # never beyond either
    torch.testing.assert_close(model.share, torch.tensor([0.0, 1.0, 0.5]).double(), atol=1e-9, rtol=0.0)


def test_a_variate_without_targets_and_a_run_that_diverges_leave_the_linear_forecast() -> None:
    model = beside(spec_of(), gain=0.5)
    batch = windows_with(model, torch.ones(V).double())
    assert batch.target_mask is not None
    mask = batch.target_mask.clone()
    mask[..., 1] = False
    model.settle([batch._replace(target_mask=mask)])
    assert model.share.tolist() == pytest.approx([1.0, 0.0, 1.0])
    torch.nn.init.constant_(model.map.h1, torch.inf)
    model.settle([batch])
    assert model.share.tolist() == [0.0] * V
    with torch.no_grad():
        torch.testing.assert_close(model(without_target(batch)).raw[..., 0], linear_of(model, batch))


def test_a_fit_is_no_worse_than_its_linear_map_on_the_validation_span() -> None:
    panel = seasonal_panel(num_rows=400)
    window = WindowSpec(context_length=24, horizon=3)
    train, valid = WindowDataset(panel, window, None, 300), WindowDataset(panel, window, 300, 400)
    series = panel.training_series(None, 300)
    found = {}
    for name, model in {"plrnn": {**BASE, "skip": "closed_form", "ridge": 10.0}, "linear": {"ridge": 10.0}}.items():
        config = NetworkConfig.model_validate({"model": {"name": name, **model}, "likelihood": {"name": "point"}})
        network = build_network(config, DataSpec(context_length=24, horizon=3, num_variates=2))
        result = fit_network(
            network, train, valid, TrainConfig(max_epochs=2, accelerator="cpu"), series=series, progress=False
        )
        found[name] = result.metrics["valid_mse"]
        if name == "plrnn":
            assert result.epochs == 2
            assert result.solve is None
            assert bool(((network.model.share >= 0) & (network.model.share < 1)).all())
    assert found["plrnn"] <= found["linear"] * (1 + 1e-5)


def test_a_linear_map_goes_with_windows_normalised_by_themselves() -> None:
    def config(**settings: Any) -> PLRNNForecastConfig:
        return validate(PLRNNForecastConfig, BASE | settings, where="model")

    cases = {("auto", "window"): True, ("auto", "last"): True, ("auto", "none"): False, ("closed_form", "none"): True}
    for (skip, normalisation), has in (cases | {("none", "window"): False}).items():
        settings = config(skip=skip, normalisation=normalisation)
        assert (PLRNN(settings, spec_of()).skip is not None) == has
        assert PLRNN.capabilities_of(settings).closed_form == has
    assert PLRNN(config(skip="none"), spec_of()).components(batch_of()) == {}
