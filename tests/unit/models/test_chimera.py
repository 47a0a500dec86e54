"""Chimera as a forecaster: settings, decoders, losses, order of variates, parts, streaming, explanation.

Settings are spelled out, so that nothing here depends on a default.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.artifact import create_artifact, load_artifact, match_frame, save_artifact
from tsforge.contracts.tensors import Batch, DataSpec, Observation, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.models._chimera_explain import coupling_matrix
from tsforge.models._variate_order import correlation_order
from tsforge.models.chimera import Chimera, ChimeraConfig
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.testing.generators import make_batch

L, H, V = 16, 5, 3
BASE: dict[str, Any] = {
    "d_model": 8,
    "d_state": 3,
    "num_layers": 2,
    "expand": 1,
    "dropout": 0.0,
    "heads": "both",
    "head_mix": "sum",
    "directions": "both",
    "coupling": "scan",
    "selective": True,
    "structure": "diagonal",
    "discretisation": "exact",
    "gate": True,
    "conv": 0,
    "decoder": "direct",
    "variate_embedding": False,
    "variate_order": "given",
    "reconstruct": False,
    "patch_length": 1,
    "normalisation": "none",
    "skip": "none",
}
COVARIATES = {"num_known": 2, "num_past": 1, "num_static": 2}
CLOSED = {"decoder": "closed_loop"}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": V, **sizes})


def make(spec: DataSpec, *, seed: int = 0, shaken: bool = True, **settings: Any) -> Chimera:
    """Return a model in evaluation mode, by default with noise in the parts that start at zero."""
    torch.manual_seed(seed)
    model = Chimera(validate(ChimeraConfig, BASE | settings, where="model"), spec)
    if shaken:
        with torch.no_grad():
            for key, part in model.named_parameters():
                if key.startswith(("head", "ahead", "spread")):
                    part.add_(0.3 * torch.randn_like(part))
                if key.endswith((".p2", ".p3")):
                    part.normal_()
    return model.eval()


def wide(batch: Batch) -> Batch:
    return Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)


@torch.no_grad()
def raw(model: Chimera, batch: Batch) -> Tensor:
    return model(batch._replace(target=None, target_mask=None)).raw


def ahead_of(batch: Batch) -> Tensor | None:
    return None if batch.known is None else batch.known[:, batch.context.shape[1] :]


def shorter(model: Chimera, *, settings: dict[str, Any] | None = None, **sizes: int) -> Chimera:
    """Return the same weights for other window sizes; only a direct head depends on them."""
    config = model.config.model_copy(update=settings or {})
    other = Chimera(config, DataSpec(**{**vars(model.spec), **sizes})).to(model.embed.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()


def span(spec: DataSpec, *, rows: int = 150) -> TrainingSeries:
    rng = np.random.default_rng(5)
    season = np.sin(2 * np.pi * (np.arange(rows)[:, None] / 8 + np.arange(spec.num_variates) / 5))
    values = torch.from_numpy(season + 0.3 * rng.normal(size=season.shape))
    return TrainingSeries(values, torch.ones_like(values, dtype=torch.bool), torch.tensor([0, rows]), torch.tensor([0]))


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


# ---- order of variates


def test_correlated_variates_come_beside_each_other() -> None:
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(400, 1))
    noise = rng.normal(size=(400, 5))
    values = np.empty((400, 5))
    for place, variate in enumerate((2, 0, 4, 1, 3)):  # a chain: each its predecessor with noise
        walk = walk + (0.6 * noise[:, place : place + 1] if place else 0)
        values[:, variate] = (walk if variate != 4 else -walk)[:, 0]
    mask = rng.random(values.shape) > 0.1
    found = correlation_order(torch.from_numpy(np.where(mask, values, 1e6)), torch.from_numpy(mask)).tolist()
    assert found == [2, 0, 4, 1, 3]
    assert correlation_order(torch.zeros(5, 1), torch.ones(5, 1, dtype=torch.bool)).tolist() == [0]
    flat = correlation_order(torch.zeros(5, 4), torch.ones(5, 4, dtype=torch.bool)).tolist()
    assert sorted(flat) == [0, 1, 2, 3]


@torch.no_grad()
def test_an_order_of_the_data_equals_permuted_data() -> None:
    """With the order kept in the weights the forecast is that of the reordered data, put back."""
    spec = spec_of(num_variates=4, **COVARIATES)
    for settings in ({}, CLOSED):
        model = make(spec, variate_order="corr", normalisation="window", **settings).double()
        order = torch.tensor([2, 0, 3, 1])
        model.order.copy_(order)
        plain = make(spec, normalisation="window", **settings).double()
        plain.load_state_dict({name: part for name, part in model.state_dict().items() if name != "order"})
        batch = wide(make_batch(spec))
        moved = batch._replace(context=batch.context[..., order], context_mask=batch.context_mask[..., order])
        torch.testing.assert_close(raw(model, batch)[:, :, order], raw(plain, moved), atol=1e-12, rtol=0)
        if model.closed:
            losses, other = model.train()(batch).aux_losses, plain.train()(moved).aux_losses
            for name, value in losses.items():
                torch.testing.assert_close(value, other[name], atol=1e-12, rtol=0)


def test_the_order_comes_from_the_training_span_and_stays_with_the_weights() -> None:
    spec = spec_of(num_variates=4)
    data = span(spec)
    values = data.values.clone()
    values[:, 3] = values[:, 0] + 0.01 * values[:, 1]
    data = data._replace(values=values)
    model = make(spec, variate_order="corr", skip="none")
    assert model.solve(data) is None
    found = model.order.tolist()
    assert found == correlation_order(data.values, data.mask).tolist()
    assert abs(found.index(0) - found.index(3)) == 1
    other = make(spec, variate_order="corr", seed=4)
    other.load_state_dict(model.state_dict())
    assert other.order.tolist() == found
    assert other.explain()["order"] == [{"position": i, "variate": variate} for i, variate in enumerate(found)]


def frame_of(targets: tuple[str, ...]) -> SeriesFrame:
    import polars as pl

    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=60) for name in ("a", "b", "c")}
    table = pl.DataFrame({"time": np.arange(60), **{name: columns[name] for name in targets}})
    return SeriesFrame.from_wide(table, time="time", targets=targets, freq="1i")


def test_another_order_of_variates_is_refused_by_the_artifact(tmp_path: Any) -> None:
    frame = frame_of(("a", "b", "c"))
    panel = Panel.from_frame(frame)
    window = WindowSpec(context_length=L, horizon=H)
    network: ForecastNetwork = build_network(
        NetworkConfig.model_validate({"model": {"name": "chimera", **BASE}}), spec_of()
    )
    network.fit_scaler(panel.training_series(None, 50))
    artifact = create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance={},
    )
    loaded = load_artifact(save_artifact(artifact, tmp_path).path)
    assert match_frame(loaded, frame).schema.targets == ("a", "b", "c")
    with pytest.raises(ArtifactError, match="reads targets in the order a, b, c, the data has c, a, b"):
        match_frame(loaded, frame_of(("c", "a", "b")))


# ---- missing values and reconstruction


@torch.no_grad()
def test_values_under_a_mask_change_nothing() -> None:
    spec = spec_of()
    for settings in ({"patch_length": 4}, {"reconstruct": True}, CLOSED):
        model, batch = make(spec, normalisation="window", **settings), make_batch(spec, gaps=0.3)
        dirty = batch._replace(context=torch.where(batch.context_mask, batch.context, 1e6))
        assert torch.equal(raw(model, batch), raw(model, dirty))


@torch.no_grad()
def test_a_cell_with_any_observation_counts_as_observed() -> None:
    spec = spec_of(context_length=8)
    model = make(spec, patch_length=4)
    mask = torch.zeros(1, 8, V, dtype=torch.bool)
    mask[0, 5, 1] = True
    _, observed = model._tokens(torch.zeros(1, 8, V), mask, None, None, None)
    assert observed.tolist() == [[[False, False], [False, True], [False, False]]]


@torch.no_grad()
def test_a_reconstructed_cell_is_told_from_the_others() -> None:
    """By hand: each cell from a pass without it and its fold, in scaled units; its own value cannot enter."""
    spec = spec_of()
    settings = {"reconstruct": True, "normalisation": "window", "patch_length": 3, "variate_order": "corr"}
    model, batch = make(spec, **settings), make_batch(spec)
    model.order.copy_(torch.tensor([2, 0, 1]))
    loc, scale = model._statistics(batch)
    z = torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0)
    found = model.reconstruct(batch)
    for t, v in ((0, 0), (6, 1), (L - 1, 2)):
        cell = (t + 2) // 3  # the first patch holds one step
        blind = batch.context_mask.clone()
        for step in range(L):
            for variate in range(V):
                if ((step + 2) // 3 + variate) % 4 == (cell + v) % 4:
                    blind[:, step, variate] = False
        tokens, observed = model._tokens(torch.where(blind, z, 0.0), blind, None, None, None)
        column = model.rebuild(model.stack(tokens, observed).x)[:, [1, 2, 0][v], cell]
        expected = column[:, (t + 2) % 3] * scale[:, 0, v] + loc[:, 0, v]
        torch.testing.assert_close(found[:, t, v], expected, atol=1e-6, rtol=1e-5)
    frozen = shorter(model, settings={"normalisation": "none"})
    changed = batch.context.clone()
    changed[:, 6, 1] += 5.0
    gap = (frozen.reconstruct(batch._replace(context=changed)) - frozen.reconstruct(batch)).abs().amax(0)
    seen = batch.context_mask[:, 6, 1].any()
    assert bool(seen)
    assert float(gap[6, 1]) == 0.0
    assert float(gap[7:].max()) > 1e-3
    with pytest.raises(ModelError, match=r"fit with model\.reconstruct=true"):
        make(spec).reconstruct(batch)


def test_training_hides_a_quarter_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    model, batch = make(spec, reconstruct=True, patch_length=4), make_batch(spec, size=64, gaps=0.0)
    seen: list[Tensor] = []
    original = model._tokens

    def tokens(z: Tensor, mask: Tensor, *rest: Any) -> Any:
        seen.append(mask)
        assert not z[~mask].any()
        return original(z, mask, *rest)

    monkeypatch.setattr(model, "_tokens", tokens)
    assert model.train()(batch).context_raw is not None
    assert bool(seen[0].all())  # the forecast itself sees everything
    share = float((~seen[1]).double().mean())
    assert 0.2 < share < 0.3
    whole = seen[1].view(64, 4, 4, V)
    assert torch.equal(whole.any(2), whole.all(2))  # patches are hidden whole
    assert model.eval()(batch).context_raw is None


# ---- parts


@pytest.mark.parametrize(
    "settings",
    [
        {"normalisation": "window"},
        {"skip": "closed_form", "ridge": 10.0, "normalisation": "window", "patch_length": 4},
        {"decoder": "closed_loop", "patch_length": 2, "normalisation": "last"},
        {"head_mix": "residual", "gate": False, "variate_order": "corr", "conv": 4},
        {"heads": "seasonal", "coupling": "pooled", "expand": 2},
        {"selective": False, "decoder": "closed_loop"},
    ],
    ids=str,
)
@torch.no_grad()
def test_components_add_up_to_the_forecast(settings: dict[str, Any]) -> None:
    spec = spec_of(num_params=2, **COVARIATES)
    model, batch = make(spec, **settings), make_batch(spec, size=4)
    model.solve(span(spec))
    parts = model.components(batch)
    heads = ("trend", "seasonal") if model.config.heads == "both" else ("seasonal",)
    assert {*heads, "rest"} <= set(parts)
    assert all(part.shape == (4, H, V) for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)
    for name in heads:
        assert float(parts[name].abs().max()) > 1e-4


@torch.no_grad()
def test_a_head_that_is_not_read_has_no_part() -> None:
    """C of the trend heads at zero: their part vanishes, and nothing else of the forecast is theirs."""
    spec = spec_of()
    for settings in ({}, CLOSED):
        model, batch = make(spec, **settings), make_batch(spec)
        before = model.components(batch)
        assert bool(before["trend"].any())
        for block in model.stack.each():
            head = dict(block.layer.each())["trend"]
            maps = head.project[:, 2 * head.rank :]
            each = maps.view(maps.shape[0], head.count, 3, -1)
            for index in range(head.count):
                if index % (head.count // 2):  # C and D, not B
                    each[:, index] = 0.0
        parts = model.components(batch)
        assert not parts["trend"].any()
        torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_fed_back_input_counts_by_its_heads() -> None:
    """Trend heads that only predict the next input, C at zero but not D, have a part from the second step on."""
    spec = spec_of()
    model, batch = make(spec, num_layers=1, **CLOSED), make_batch(spec)
    head = dict(model.stack.each()[0].layer.each())["trend"]
    maps = head.project[:, 2 * head.rank :].view(2, 6, 3, -1)  # B1, C1, D1, B2, C2, D2
    maps[:, [1, 4]] = 0.0
    parts = model.components(batch)
    assert not parts["trend"][:, 0].any()
    assert float(parts["trend"][:, 1:].abs().amax((0, 2)).min()) > 1e-6
    torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)


# ---- explanation


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_length": 4, "directions": "forward"},
        {"coupling": "none"},
        {"selective": False, "structure": "companion"},
        {"heads": "trend", "coupling": "pooled", **CLOSED},
    ],
    ids=str,
)
def test_explanation(settings: dict[str, Any]) -> None:
    model = make(spec_of(**COVARIATES), **settings).train()
    found = model.explain()
    assert model.training
    assert set(found) == {"time_scales", "coupling"}
    heads = len(model.config.options(1).names)
    assert len(found["time_scales"]) == 2 * heads * (1 if settings.get("directions") == "forward" else 2)
    coupled = settings.get("coupling") != "none"
    for record in found["time_scales"]:
        assert 0 < record["memory_p10"] <= record["memory"] <= record["memory_p90"]
        turns = record["head"] == "seasonal" and "structure" not in settings
        assert (record["period"] is not None) == turns
        assert (record["reach"] is not None) == coupled
        assert (record["into_time"] is not None) == coupled
    assert len(found["coupling"]) == (V * V if coupled else 0)


def test_time_scales_by_hand() -> None:
    model = make(spec_of(), patch_length=4, num_layers=1, directions="forward", d_state=1)
    head = dict(model.stack.each()[0].layer.each())["seasonal"]
    with torch.no_grad():
        head.dt_bias[:, 0] = float(np.log(np.expm1(0.5)))
        head.dt_bias[:, 1] = float(np.log(np.expm1(0.25)))
        head.p1.fill_(float(np.log(0.2)))
        head.w1.fill_(-2.0)
        head.p4.fill_(0.0)
        head.p2.fill_(-0.5)
    record = next(part for part in model.explain()["time_scales"] if part["head"] == "seasonal")
    assert record["memory"] == pytest.approx(4 / (0.5 * 0.2))
    assert record["period"] == pytest.approx(4 * 2 * np.pi / (0.5 * 2.0))
    assert record["reach"] == pytest.approx(4.0)
    assert record["into_time"] == pytest.approx(0.95 * np.tanh(0.5))


@torch.no_grad()
def test_the_coupling_matrix_is_what_an_impulse_moves() -> None:
    spec = spec_of()
    model = make(spec, normalisation="window", directions="forward")
    found = coupling_matrix(model)
    frozen = shorter(model, settings={"normalisation": "none"})
    quiet = torch.zeros(1, L, V)
    mask = torch.ones(1, L, V, dtype=torch.bool)
    for i in range(V):
        loud = quiet.clone()
        loud[0, -1, i] = 1.0
        moved = raw(frozen, Batch(loud, mask)) - raw(frozen, Batch(quiet, mask))
        torch.testing.assert_close(found[i], moved[0, ..., 0].square().mean(0).sqrt(), atol=1e-6, rtol=1e-4)
    assert bool((found.tril(-1) == 0).all())  # forward only: nothing moves the variates before
    assert bool((found.triu() > 0)[torch.ones(V, V).triu().bool()].all())
    uncoupled = coupling_matrix(make(spec, coupling="none"))
    assert torch.equal(uncoupled, uncoupled.diag().diag())


# ---- streaming

STREAMS: list[dict[str, Any]] = [
    {"skip": "closed_form", "ridge": 10.0},
    {"conv": 4, "coupling": "pooled"},
    {"selective": False, "heads": "seasonal", "skip": "learned"},
    {"selective": False, "structure": "companion", "num_layers": 1},
    CLOSED,
    {**CLOSED, "coupling": "none", "variate_embedding": True, "conv": 4},
    {"variate_order": "corr", "head_mix": "residual"},
]


@torch.no_grad()
def streamed(model: Chimera, batch: Batch) -> Tensor:
    state = model.initial_state(len(batch.context), batch.static)
    for t in range(batch.context.shape[1]):
        row = Observation(
            batch.context[:, t],
            batch.context_mask[:, t],
            None if batch.past is None else batch.past[:, t],
            None if batch.known is None else batch.known[:, t],
        )
        state = model.step(state, row)
    return model.free_run(state, ahead_of(batch)).raw


@pytest.mark.parametrize("settings", STREAMS, ids=str)
@torch.no_grad()
def test_checklist_5_8_streaming_equals_one_forward_pass(settings: dict[str, Any]) -> None:
    spec = spec_of(context_length=40, num_params=2, **COVARIATES)
    model = make(spec, **settings)
    if settings.get("skip") == "closed_form" or settings.get("variate_order") == "corr":
        model.solve(span(spec))
    model = model.double()
    batch = wide(make_batch(spec, size=2, gaps=0.3))
    assert model.recurrent
    expected = raw(model, batch)
    torch.testing.assert_close(streamed(model, batch), expected, atol=1e-10, rtol=0)
    warm = model.warm_up(batch)
    kept = {name: part.clone() for name, part in warm.items()}
    torch.testing.assert_close(model.free_run(warm, ahead_of(batch)).raw, expected, atol=1e-10, rtol=0)
    assert all(torch.equal(warm[name], part) for name, part in kept.items())
    zero = model.initial_state(2, batch.static)
    assert {name: part.shape for name, part in zero.items()} == {name: part.shape for name, part in warm.items()}
    alone = {name: part[1:] for name, part in warm.items()}
    ahead = ahead_of(batch)
    torch.testing.assert_close(
        model.free_run(alone, None if ahead is None else ahead[1:]).raw, expected[1:], atol=1e-10, rtol=0
    )


@torch.no_grad()
def test_a_warm_up_keeps_its_statistics() -> None:
    spec = spec_of(**COVARIATES)
    for normalisation in ("window", "last"):
        model, batch = make(spec, normalisation=normalisation, **CLOSED), make_batch(spec, gaps=0.3)
        state = model.warm_up(batch)
        torch.testing.assert_close(model.free_run(state, ahead_of(batch)).raw, raw(model, batch), atol=1e-5, rtol=1e-4)
        row = Observation(batch.context[:, 0], batch.context_mask[:, 0], batch.past[:, 0], batch.known[:, 0])
        after = model.step(state, row)
        assert torch.equal(after["loc"], state["loc"])
        assert torch.equal(after["scale"], state["scale"])


def test_patches_cannot_stream() -> None:
    model = make(spec_of(), patch_length=4)
    assert not model.recurrent
    for call in (
        lambda: model.initial_state(2),
        lambda: model.warm_up(make_batch(spec_of())),
        lambda: model.free_run({}),
        lambda: model.step({}, Observation(torch.zeros(1, V), torch.ones(1, V, dtype=torch.bool))),
    ):
        with pytest.raises(ModelError, match=r"patches of 4 steps .* model\.patch_length=1"):
            call()
