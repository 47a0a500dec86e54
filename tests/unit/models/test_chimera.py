"""Chimera as a forecaster: settings, shapes, causality and symmetry, the closed loop and its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chimera_cases import BASE, CLOSED, COVARIATES, H, L, V, make, raw, shorter, span, spec_of, wide

from tsforge.contracts.tensors import Batch
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.models.chimera import ChimeraConfig
from tsforge.network import NetworkConfig, build_network
from tsforge.testing.generators import make_batch

# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, r"model\.d_model: "),
        ({"d_state": 0}, r"model\.d_state: "),
        ({"dropout": 1.0}, r"model\.dropout: "),
        ({"conv": 3}, r"model\.conv: "),
        ({"coupling": "some"}, r"model\.coupling: "),
        ({"patch_length": 0}, r"model\.patch_length: 0 must be at least 1"),
        ({**CLOSED, "skip": "closed_form"}, r"model\.skip: a closed loop predicts one patch at a time"),
        ({**CLOSED, "skip": "learned"}, r"model\.skip: a closed loop"),
        ({"skip": "none", "ridge": 3.0}, r"model\.ridge has no effect with skip 'none'"),
        ({"variate_order": "corr", "coupling": "none"}, r"model\.variate_order has no effect with coupling 'none'"),
        ({"variate_order": "corr", "coupling": "pooled"}, r"model\.variate_order has no effect"),
        ({"head_mix": "residual", "heads": "seasonal"}, "model.head_mix 'residual' needs both heads"),
        ({"coupling": "none", "discretisation": "separate"}, "cannot switch the coupling off"),
        ({"structure": "companion"}, "model.structure 'companion'"),
        (
            {"structure": "companion", "selective": False, "dt_trend": (0.1, 0.2)},
            r"model\.dt_trend has no effect with structure companion",
        ),
        ({"dt_seasonal": (0.5, 0.1)}, r"dt_seasonal is 0\.5 to 0\.1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ChimeraConfig, BASE | settings, where="model")


def test_a_patch_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"model\.patch_length: {L + 1} exceeds context_length {L}"):
        make(spec_of(), patch_length=L + 1)


def test_patches_follow_the_context() -> None:
    assert make(spec_of(context_length=95), patch_length=None).patch == 1
    assert make(spec_of(context_length=96), patch_length=None).patch == 8


def test_steps_of_patches_are_longer() -> None:
    options = ChimeraConfig(dt_trend=(0.01, 0.02), dt_seasonal=(0.1, 0.2), dt_variate=(0.3, 0.4)).options(8)
    assert options.dt_trend == pytest.approx((0.08, 0.16))
    assert options.dt_seasonal == pytest.approx((0.8, 1.6))
    assert options.dt_variate == (0.3, 0.4)


def test_linear_part_by_decoder() -> None:
    assert make(spec_of(), skip="auto").skip is not None
    assert make(spec_of(), skip="auto", **CLOSED).skip is None


# ---- shapes

DECODERS: list[dict[str, Any]] = [
    {},
    {"patch_length": 5},
    {"patch_length": 4, "selective": False, "structure": "companion"},
    CLOSED,
    {**CLOSED, "patch_length": 3, "coupling": "pooled"},
    {**CLOSED, "patch_length": 16, "conv": 4, "coupling": "none"},
    {"reconstruct": True, "patch_length": 3},
    {"variate_order": "corr", "variate_embedding": True},
]


@pytest.mark.parametrize("params", [1, 3])
@pytest.mark.parametrize("settings", DECODERS, ids=str)
def test_checklist_5_10_shapes(settings: dict[str, Any], params: int) -> None:
    spec = spec_of(num_params=params, **COVARIATES)
    model = make(spec, normalisation="window", **settings)
    for training in (False, True):
        found = model.train(training)(make_batch(spec, size=4))
        assert found.raw.shape == (4, H, V, params)
        assert bool(torch.isfinite(found.raw).all())
        rebuilds = training and settings.get("reconstruct", False)
        assert (found.context_raw is not None) == rebuilds
        if rebuilds:
            assert found.context_raw.shape == (4, L, V, params)
        assert (found.aux_losses is not None) == (training and "decoder" in settings)


@torch.no_grad()
def test_checklist_5_10_patches_end_at_the_last_step() -> None:
    """A context that fills no whole number of patches is filled up with unobserved steps in front."""
    spec = spec_of(context_length=7)
    model, batch = make(spec, patch_length=5), make_batch(spec, size=3)
    longer = shorter(model, context_length=10)
    filled = Batch(
        torch.cat([torch.zeros(3, 3, V), batch.context], dim=1),
        torch.cat([torch.zeros(3, 3, V, dtype=torch.bool), batch.context_mask], dim=1),
    )
    torch.testing.assert_close(raw(model, batch), raw(longer, filled), atol=1e-6, rtol=0)


def test_the_untrained_network_adds_nothing() -> None:
    spec = spec_of(num_known=1)
    batch = make_batch(spec)
    for settings in ({}, CLOSED, {"patch_length": 4}):
        for normalisation in ("none", "window", "last"):
            model = make(spec, shaken=False, normalisation=normalisation, **settings)
            loc, _ = model._statistics(batch)
            assert torch.equal(raw(model, batch)[..., 0], loc.expand(-1, H, -1))
    model = make(spec, shaken=False, skip="closed_form", ridge=10.0)
    model.solve(span(spec))
    assert torch.equal(raw(model, batch), model.skip(Batch(batch.context, batch.context_mask)).raw)


# ---- 5.6 causality, 5.7 symmetry


@torch.no_grad()
def test_checklist_5_6_a_truncated_history_gives_the_forecast_of_that_history() -> None:
    """The next step read inside a longer context is the forecast of the context that ends there."""
    spec = spec_of()
    model = make(spec, **CLOSED).double()
    batch = wide(make_batch(spec, size=3))
    found, _ = model._pass(batch, batch.context)
    inside = model.head(model.stack.norm(found.x)).transpose(1, 2)
    for t in (1, 4, 11):
        past = Batch(batch.context[:, :t], batch.context_mask[:, :t])
        expected = raw(shorter(model, context_length=t, horizon=1), past)[..., 0]
        torch.testing.assert_close(inside[:, t - 1 : t, :, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("coupling", "equivariant"), [("none", True), ("pooled", True), ("scan", False)])
@pytest.mark.parametrize("decoder", ["direct", "closed_loop"])
def test_checklist_5_7_permuted_variates(coupling: str, equivariant: bool, decoder: str) -> None:
    spec = spec_of(num_variates=5, num_known=1)
    model, batch = make(spec, coupling=coupling, decoder=decoder).double(), wide(make_batch(spec))
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = batch._replace(context=batch.context[..., order], context_mask=batch.context_mask[..., order])
    gap = float((raw(model, permuted) - raw(model, batch)[:, :, order]).abs().max())
    assert gap < 1e-12 if equivariant else gap > 1e-4


# ---- the closed loop


@pytest.mark.parametrize("settings", [{}, {"coupling": "pooled"}, {"conv": 4, "num_layers": 1}, {"selective": False}])
@torch.no_grad()
def test_checklist_5_8_the_closed_loop_is_a_pass_over_its_own_inputs(settings: dict[str, Any]) -> None:
    """The last block over context and fed-back inputs in one pass reads the same columns; steps too."""
    spec = spec_of(num_variates=4)
    model, batch = make(spec, **CLOSED, **settings).double(), wide(make_batch(spec, size=2))
    tokens, observed = model._tokens(batch.context, batch.context_mask, None, None, None)
    inner = model.stack.run(tokens, observed, blocks=slice(0, -1)).x
    columns = []
    seen = observed
    for _ in range(H):  # everything anew for each step
        found = model.stack.run(inner, seen, blocks=slice(-1, None))
        columns.append(model.head(model.stack.norm(found.x[:, :, -1])))
        following = model.next_token(sum(part[:, :, -1:] for part in found.ahead.values()))
        inner = torch.cat([inner, following], dim=2)
        seen = torch.cat([seen, torch.ones_like(seen[:, :, :1])], dim=2)
    expected = torch.stack(columns, dim=1)  # (b, H, N, 1)
    torch.testing.assert_close(raw(model, batch), expected, atol=1e-12, rtol=0)
    assert float((expected[:, 1:] - expected[:, :-1]).abs().max()) > 1e-4


@torch.no_grad()
def test_losses_of_the_closed_loop_by_hand() -> None:
    spec = spec_of(num_variates=2)
    model, batch = make(spec, normalisation="window", **CLOSED), make_batch(spec, size=3)
    losses = model.train()(batch).aux_losses
    assert set(losses) == {"open_loop", "next_input"}
    loc, scale = model._statistics(batch)
    z = torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0)
    found, inner = model._pass(batch, z)
    total, count = 0.0, 0
    for t in range(L - 1):
        step = model.head(model.stack.norm(found.x[:, :, t]))[..., 0] * scale[:, 0] + loc[:, 0]
        mask = batch.context_mask[:, t + 1]
        total += float(((step - batch.context[:, t + 1]).square() * mask).sum())
        count += int(mask.sum())
    assert float(losses["open_loop"]) == pytest.approx(0.5 * total / count, rel=1e-4)
    predicted = model.next_token(sum(found.ahead.values()))[:, :, :-1]
    assert float(losses["next_input"]) == pytest.approx(
        0.5 * float((predicted - inner[:, :, 1:]).square().mean()), rel=1e-4
    )
    assert model.eval()(batch).aux_losses is None


def test_losses_enter_training_and_leave_true_inputs_alone() -> None:
    spec = spec_of()
    config = NetworkConfig.model_validate({"model": {"name": "chimera", **BASE, **CLOSED, "num_layers": 1}})
    network = build_network(config, spec).train()
    network.fit_scaler(span(spec))
    batch = make_batch(spec)
    parts = {name: value.detach() for name, value in network.loss(batch).items()}
    assert set(parts) == {"loss", "nll", "open_loop", "next_input"}
    assert float(parts["loss"]) == pytest.approx(
        float(parts["nll"] + parts["open_loop"] + parts["next_input"]), rel=1e-5
    )
    assert set(network.eval().loss(batch)) == {"loss", "nll"}
    model = network.model.train()
    model(batch).aux_losses["next_input"].backward()
    grown = {name for name, part in model.named_parameters() if part.grad is not None and part.grad.any()}
    assert "next_token.weight" in grown
    assert not any(name.startswith("head") for name in grown)
    model.zero_grad()
    with torch.no_grad():
        model.next_token.weight.zero_()  # now only the true inputs depend on the embedding
    model(batch).aux_losses["next_input"].backward()
    assert model.embed.weight.grad is None or not model.embed.weight.grad.any()
