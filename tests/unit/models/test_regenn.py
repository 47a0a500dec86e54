"""ReGENN beside its checklist: gaps, anchors, starts, what it shows, settings that contradict each other."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.app.fit import FitConfig
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.likelihoods import Point
from tsforge.models import regenn
from tsforge.models._regenn_fit import drift_weights
from tsforge.models.regenn import ReGENN, ReGENNConfig
from tsforge.models.registry import MODELS
from tsforge.network import NetworkConfig, build_network
from tsforge.ops.encoder_lstm import encoder_lstm, unavailable
from tsforge.testing.generators import make_batch, make_series, series_batch

L, H, V = 6, 4, 3
SPEC = DataSpec(context_length=L, horizon=H, num_variates=V)


def make(spec: DataSpec = SPEC, *, shake: float = 0.0, **settings: Any) -> ReGENN:
    torch.manual_seed(0)
    model = ReGENN(validate(ReGENNConfig, settings, where="model"), spec).double().eval()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(shake * torch.randn_like(part))
    return model


def batch_of(spec: DataSpec = SPEC, **options: Any) -> Batch:
    batch = make_batch(spec, **options)._replace(target=None, target_mask=None)
    return batch._replace(context=batch.context.double())


def span(values: np.ndarray[Any, Any], mask: np.ndarray[Any, Any] | None = None) -> TrainingSeries:
    seen = np.ones(values.shape, dtype=bool) if mask is None else mask
    return TrainingSeries(
        values=torch.from_numpy(values),
        mask=torch.from_numpy(seen),
        indptr=torch.tensor([0, len(values)]),
        offset=torch.tensor([0]),
    )


# windows in the model's own units


def test_gaps_repeat_the_value_before_and_the_anchor_is_the_last_observation() -> None:
    nan = float("nan")
    rows = torch.tensor([[nan, 3.0, nan, 7.0, 6.0, nan], [nan] * 6, [2.0] * 6], dtype=torch.float64).T
    mask = ~torch.isnan(rows)
    batch = Batch(torch.where(mask, rows, 99.0).unsqueeze(0), mask.unsqueeze(0))  # what is hidden must not matter
    model = make()
    seen = model.normalise(batch)
    back = seen.x * seen.scale + seen.loc
    assert back[0, :, 0].tolist() == pytest.approx([3, 3, 3, 7, 6, 6])
    assert back[0, :, 1].tolist() == [0.0] * 6
    assert seen.loc[0, 0].tolist() == [6.0, 0.0, 2.0]
    assert float(seen.scale[0, 0, 0]) == pytest.approx(5 / 3)  # up 4, down 1, from the second to the fifth row
    assert seen.scale[0, 0, 1:].tolist() == model.floor[1:].tolist()


def test_a_series_that_stands_still_is_forecast_to_stand_still() -> None:
    model = make(shake=0.5, ff_dim=8)
    still = Batch(torch.full((2, L, V), 5.0, dtype=torch.float64), torch.ones(2, L, V, dtype=torch.bool))
    torch.testing.assert_close(model(still).raw, torch.full((2, H, V, 1), 5.0, dtype=torch.float64), rtol=0, atol=1e-3)


def test_the_floor_follows_the_training_span() -> None:
    model = make(paths="autoregression")
    values = np.random.default_rng(0).normal(size=(80, V)) * [1.0, 100.0, 0.0]
    model.solve(span(values))
    expected = np.where(values.std(0) > 0, values.std(0), 1.0) * 1e-6
    np.testing.assert_allclose(model.floor.numpy(), expected, rtol=1e-6)


def test_the_network_is_told_what_was_missing() -> None:
    model = make(shake=0.4, ff_dim=8)
    rows = torch.tensor([1.0, 2.0, 2.0, 3.0, 5.0, 4.0], dtype=torch.float64).view(1, L, 1).expand(1, L, V)
    whole = Batch(rows, torch.ones(1, L, V, dtype=torch.bool))
    gap = Batch(rows, whole.context_mask.clone())
    gap.context_mask[0, 2] = False  # filled by the 2 before it: the rows are the same
    assert torch.equal(model.normalise(gap).x, model.normalise(whole).x)
    assert not torch.allclose(model(gap).raw, model(whole).raw)
    before = model(whole).raw
    with torch.no_grad():
        model.where_missing.weight.zero_()
    torch.testing.assert_close(model(whole).raw, before)  # without gaps there is nothing to tell
    deaf = make(shake=0.4, ff_dim=8, mask_channel=False)
    torch.testing.assert_close(deaf(gap).raw, deaf(whole).raw)


# starts


def test_it_starts_from_the_drift_of_the_window() -> None:
    batch = batch_of(gaps=0.0)
    x = batch.context.numpy()
    slope = (x[:, -1] - x[:, 0]) / (L - 1)
    expected = x[:, -1:] + slope[:, None] * np.arange(1, H + 1)[None, :, None]
    for settings in ({}, {"normalisation": "none"}, {"ablate_gse": True}, {"paths": "autoregression"}):
        np.testing.assert_allclose(make(**settings)(batch).raw[..., 0].detach().numpy(), expected, atol=1e-6)
    assert drift_weights(1, 2).tolist() == [[1.0, 1.0]]


def test_least_squares_without_a_bias_have_no_intercept() -> None:
    """The level of a trending panel must not be taken up by an intercept that the model then lacks."""
    rng = np.random.default_rng(0)
    values = np.arange(120)[:, None] * [1.0, 2.0, 3.0] + rng.normal(size=(120, V))
    model = make(ar_init="ols", paths="autoregression", bias=False, normalisation="none").double()
    model.solve(span(values, np.ones_like(values, dtype=bool)))
    windows = np.lib.stride_tricks.sliding_window_view(values, L + H, axis=0)  # [N, V, L + H]
    rows = windows.reshape(-1, L + H)
    expected = np.linalg.lstsq(rows[:, :L], rows[:, L:], rcond=None)[0]
    best = np.square(rows[:, :L] @ expected - rows[:, L:]).mean()
    found = np.square(rows[:, :L] @ model.ar_weight.detach().numpy() - rows[:, L:]).mean()
    assert found == pytest.approx(best, rel=1e-3)


def test_least_squares_equal_those_of_numpy() -> None:
    """Shared by variates, in the units of the data: rows of lively windows weigh more than those of calm ones."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(120, V)).cumsum(0) * [1, 2, 3]
    mask = rng.random(values.shape) > 0.02
    model = make(ar_init="ols", paths="autoregression")
    report = model.solve(span(np.where(mask, values, np.nan), mask))
    assert report is not None
    assert (report.finished, report.method) == (False, "ols")
    design, target = [], []
    for start in range(120 - L - H + 1):
        for v in range(V):
            rows, seen = values[start : start + L, v], mask[start : start + L, v]
            if not seen.any() or not mask[start + L : start + L + H, v].all():
                continue
            filled, places = rows.copy(), np.flatnonzero(seen)
            for t in range(L):
                before = places[places <= t]
                filled[t] = rows[before[-1]] if len(before) else rows[places[0]]
            size = max(np.abs(np.diff(filled)).sum() / max(places[-1] - places[0], 1), float(model.floor[v]))
            x = np.append((filled - filled[-1]) / size, 1.0)
            design.append(x * size)
            target.append(values[start + L : start + L + H, v] - filled[-1])
    expected = np.linalg.lstsq(np.array(design), np.array(target), rcond=None)[0]
    assert model.ar_weight is not None
    assert model.ar_bias is not None
    np.testing.assert_allclose(model.ar_weight.detach().numpy()[:-1], expected[:-2], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(model.ar_bias.detach().numpy(), expected[-1], rtol=1e-3, atol=1e-4)


def test_least_squares_need_enough_windows() -> None:
    model = make(ar_init="ols")
    mask = np.ones((40, V), dtype=bool)
    mask[::3] = False
    with pytest.raises(ModelError, match=r"found 0 windows .* needs more than 6; bring more data or use ar_init=drift"):
        model.solve(span(np.ones((40, V)), mask))


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, True),
        ({"paths": "autoregression"}, True),
        ({"ar_init": "xavier"}, False),
        ({"network_gate": None}, False),
        ({"network_gate": 0.5}, False),
        ({"paths": "network"}, False),
    ],
)
def test_a_start_competes_with_training_only_where_the_network_begins_silent(
    settings: dict[str, Any], start: bool
) -> None:
    report = make(replace(SPEC, num_params=2), **settings).solve(make_series(SPEC))
    assert (report is not None) == start
    if report is not None:
        assert report.residual_scale is not None
        assert bool((report.residual_scale > 0).all())


def test_random_starts_differ_and_the_drift_does_not() -> None:
    torch.manual_seed(1)
    first, second = (ReGENN(ReGENNConfig(), SPEC) for _ in range(2))
    assert first.ar_weight is not None
    assert second.ar_weight is not None
    assert torch.equal(first.ar_weight, second.ar_weight)
    assert not torch.equal(first.gate.weight_ih_l0, second.gate.weight_ih_l0)


# logarithms and counts


def test_log1p_is_undone_and_needs_sizes() -> None:
    model = make(normalisation="log1p", ar_init="xavier", paths="autoregression")
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, size=(60, V)).astype(float)
    model.solve(span(counts))
    np.testing.assert_allclose(model.log_peak.numpy(), np.log1p(counts.max(0)), rtol=1e-6)
    with torch.no_grad():
        assert model.ar_weight is not None
        model.ar_weight.zero_()
        model.ar_weight[-1] = 1.0
    batch = Batch(torch.from_numpy(counts[:L]).unsqueeze(0), torch.ones(1, L, V, dtype=torch.bool))
    expected = np.broadcast_to(counts[L - 1], (1, H, V))
    np.testing.assert_allclose(model(batch).raw[..., 0].detach().numpy(), expected, rtol=1e-6)
    assert model.components(batch) == {}
    assert model.contributions(batch) is None
    counts[3, 1] = -1.0
    with pytest.raises(ModelError, match="1 training cells are negative"):
        model.solve(span(counts))


def test_relu_clips_in_the_units_of_the_data_and_shows_it() -> None:
    model = make(shake=0.5, ff_dim=8, output_activation="relu")
    batch = batch_of(gaps=0.0)
    raw = model(batch).raw[..., 0]
    assert float(raw.detach().min()) == 0.0
    parts = model.components(batch)
    assert list(parts) == ["anchor", "autoregression", "network", "output_activation"]
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), raw)
    assert float(parts["output_activation"].detach().max()) > 0


# what it shows


@pytest.mark.parametrize("settings", [{}, {"network_gate": None}, {"normalisation": "none"}])
def test_contributions_add_up_to_the_part_of_the_network(settings: dict[str, Any]) -> None:
    model, batch = make(shake=0.4, ff_dim=8, **settings), batch_of()
    found = model.contributions(batch)
    assert found is not None
    assert found.shape == (len(batch.context), H, V, V)
    torch.testing.assert_close(found.sum(-1), model.components(batch)["network"])
    assert not torch.allclose(found.sum(-2), found.sum(-1))


def test_contributions_in_data_units_through_the_network() -> None:
    network = build_network(validate(NetworkConfig, {"model": {"name": "regenn", "network_gate": 1.0}}), SPEC).eval()
    data = make_series(SPEC)
    network.fit_scaler(data)
    network.prepare(data)
    network.solve(data)
    batch = series_batch(SPEC, data)
    found = network.contributions(batch)
    assert found is not None
    torch.testing.assert_close(found.sum(-1), network.components(batch)["network"], rtol=1e-4, atol=1e-4)
    plain = build_network(validate(NetworkConfig, {"model": "linear"}), SPEC).eval()
    plain.fit_scaler(data)
    assert plain.contributions(batch) is None


def test_attention_is_that_of_the_forecast() -> None:
    model, batch = make(shake=0.4, ff_dim=8), batch_of()
    found = model.attention(batch)
    assert found is not None
    torch.testing.assert_close(found.sum(-1), torch.ones(len(batch.context), V, dtype=torch.float64))
    rows = model._encoder_input(batch, model.normalise(batch).x)[0]
    query, key, _ = (rows @ model.encoder.self_attn.in_proj_weight.T + model.encoder.self_attn.in_proj_bias).chunk(
        3, -1
    )
    expected = torch.softmax(query @ key.mT / L**0.5, dim=-1)
    torch.testing.assert_close(found, expected)
    for settings in ({"encoder": False}, {"attend": "entities"}, {"paths": "autoregression"}):
        assert make(**settings).attention(batch) is None


def test_every_matrix_is_told_and_names_its_axes() -> None:
    model = make(shake=0.4, ff_dim=8)
    model.prepare(make_series(SPEC))
    told = model.explain()
    cells = {(row["layer"], row["matrix"], row["row"], row["column"]): row["value"] for row in told["evolution"]}
    assert len(cells) == len(told["evolution"]) == 2 * 6 * V * V
    assert model.source_layer is not None
    evolved, weights = model.source_layer.evolve(model.graph)
    assert cells["source", "co_occurrence", 2, 1] == pytest.approx(float(model.graph[2, 1]))
    assert cells["source", "evolution_weights", 0, 2] == pytest.approx(float(weights[0, 2].detach()))
    assert cells["target", "co_occurrence", 1, 2] == pytest.approx(float(evolved[1, 2].detach()))
    for layer in ("source", "target"):
        before, after, change = (
            cells[layer, name, 0, 1] for name in ("similarity_before", "similarity_after", "change")
        )
        assert change == pytest.approx(after - before)
        assert cells[layer, "similarity_after", 1, 1] == pytest.approx(1.0)
    for settings in ({}, {"normalisation": "none"}):
        plain = make(shake=0.4, paths="autoregression", **settings)
        kernel = {(row["lag"], row["step"]): row["weight"] for row in plain.explain()["autoregressive_kernel"]}
        first = 0 if settings else 1  # the last row of an anchored window is 0: no weight of it has an effect
        assert min(kernel) == (first, 1)
        assert len(kernel) == (L - first) * H
        assert plain.ar_weight is not None
        assert kernel[first, 1] == pytest.approx(float(plain.ar_weight[L - 1 - first, 0].detach()))
        assert kernel[L - 1, H] == pytest.approx(float(plain.ar_weight[0, -1].detach()))
    wide = make(DataSpec(context_length=L, horizon=H, num_variates=65), ff_dim=8)
    assert wide.explain()["evolution"] == []
    long = make(DataSpec(context_length=201, horizon=100, num_variates=2), paths="autoregression")
    assert long.explain()["autoregressive_kernel"] == []
    assert make(paths="network", ablate_gse=True).explain() == {"evolution": [], "autoregressive_kernel": []}


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": "preset"}, "model.graph_matrix must be given"),
        ({"graph_matrix": [[1.0]]}, "model.graph_matrix must be given"),
        ({"paths": "autoregression", "dropout": 0.2}, "model.dropout has no effect with paths 'autoregression'"),
        ({"paths": "network", "ar_init": "ols"}, "model.ar_init has no effect with paths 'network'"),
        ({"encoder": False, "ff_dim": 8}, "model.ff_dim has no effect with encoder false"),
        ({"sequencer": "none", "bidirectional_sequencer": True}, "no effect with sequencer 'none'"),
        ({"graph": "identity", "count": "windows"}, "model.count has no effect with graph 'identity'"),
        ({"ablate_gse": True, "presence": "positive"}, "model.presence has no effect with no graph layer"),
        ({"normalisation": "log1p"}, "the drift of logarithms is no drift"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ReGENNConfig, settings, where="model")


def test_a_preset_graph_must_fit_the_variates() -> None:
    rows = [[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    model = make(graph="preset", graph_matrix=rows)
    assert model.graph.tolist() == rows
    model.prepare(make_series(SPEC))
    assert model.graph.tolist() == rows
    with pytest.raises(ModelError, match="must be 3 rows of 3 numbers"):
        make(graph="preset", graph_matrix=[[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("settings", "kind", "allowed"),
    [
        ({"normalisation": "log1p", "ar_init": "ols"}, "global", "none"),
        ({"output_activation": "relu"}, "global", "none, series_max"),
    ],
)
def test_zero_keeps_its_meaning(settings: dict[str, Any], kind: str, allowed: str) -> None:
    plain = {"model": {"name": "regenn", **settings}, "scaling": {"kind": kind}}
    with pytest.raises(ConfigError, match=f"does not support scaling '{kind}'; use one of {allowed}"):
        build_network(validate(NetworkConfig, plain), SPEC)
    network = build_network(validate(NetworkConfig, plain | {"scaling": {"kind": "auto"}}), SPEC)
    assert network.scaling == "none"


def test_attention_to_entities_couples_rows() -> None:
    model = MODELS.get("regenn")
    coupled = model.capabilities_of(validate(ReGENNConfig, {"attend": "entities"}))
    assert coupled.rows_coupled
    assert coupled.absolute_time
    assert not model.capabilities_of(ReGENNConfig()).rows_coupled


def test_the_faithful_preset_is_the_released_behaviour_without_its_leak() -> None:
    config = load(FitConfig, "experiment/regenn_faithful")
    assert config.model == ReGENNConfig(
        ff_dim=2048,
        attend="entities",
        bias=False,
        paths="network",
        output_activation="relu",
        presence="positive",
        count="windows",
        normalisation="none",
        mask_channel=False,
        network_gate=None,
        evolution_init="xavier",
    )

    assert (config.scaling.kind, config.likelihood) == ("series_max", Point(loss="mae"))
    train = config.train
    assert (train.max_epochs, train.patience, train.learning_rate, train.weight_decay) == (2500, 250, 1e-3, 0.0)
    assert (train.schedule, train.gradient_clip, train.start_margin) == ("plateau", 10.0, 0.0)


@pytest.mark.parametrize(("start", "same"), [("identity", True), ("xavier", False)])
def test_the_graph_layers_begin_by_changing_nothing(start: str, same: bool) -> None:
    whole = make(paths="network", network_gate=None, evolution_init=start)
    whole.prepare(make_series(SPEC))
    bare = make(paths="network", network_gate=None, ablate_gse=True)
    bare.load_state_dict(whole.state_dict(), strict=False)
    batch = batch_of()
    assert torch.allclose(whole(batch).raw, bare(batch).raw, atol=1e-12) is same
    gradient = torch.autograd.grad(whole(batch).raw.square().sum(), list(whole.parameters()), allow_unused=True)
    found = dict(zip((name for name, _ in whole.named_parameters()), gradient, strict=True))
    for layer in ("source_layer", "target_layer"):  # they learn from the first step
        assert found[f"{layer}.W_C"].abs().max() > 0


# encoder and recurrent nets in one compiled kernel


CHAINED = [{}, {"sequencer": "none"}, {"encoder": False}, {"ablate_gse": True, "d_model": 5}]
NOT_CHAINED = [{"gate": "gru"}, {"bidirectional_gate": True}, {"attend": "entities"}, {"sequencer": "rnn"}]


def need_kernel() -> None:
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")
    assert unavailable(torch.zeros(1), 1) is None


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return what collects the dropout of each call; the kernel still runs."""
    seen: list[float] = []

    def watched(*parts: Any, dropout: float) -> torch.Tensor:
        seen.append(dropout)
        return encoder_lstm(*parts, dropout=dropout)

    monkeypatch.setattr(regenn, "encoder_lstm", watched)
    return seen


@pytest.mark.parametrize("settings", CHAINED)
def test_the_kernel_gives_what_the_layers_give(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    seen = calls_of_the_kernel(monkeypatch)
    model = make(shake=0.3, dropout=0.0, **settings)
    batch = batch_of(gaps=0.2)
    found = model(batch).raw
    gradient = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
    assert seen == [0.0]
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    plain = model(batch).raw
    torch.testing.assert_close(found, plain, atol=1e-11, rtol=1e-11)
    for ours, theirs in zip(
        gradient, torch.autograd.grad(plain.square().sum(), list(model.parameters()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("settings", NOT_CHAINED)
def test_what_the_kernel_does_not_know_goes_through_the_layers(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a kernel that could run and would be wrong: every layer is called, with the kernel's place left empty."""
    model, batch = make(shake=0.3, ff_dim=8, dropout=0.0, **settings), batch_of()
    monkeypatch.setattr(regenn, "unavailable", lambda *_: "nothing is available")
    plain = model(batch).raw
    called: list[str] = []
    for name in ("encoder", "gate", "sequencer"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: called.append(name))

    def wrong(rows: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        called.append("kernel")
        return rows.new_zeros(len(rows), H, V)

    monkeypatch.setattr(regenn, "unavailable", lambda *_: None)
    monkeypatch.setattr(regenn, "encoder_lstm", wrong)
    assert torch.equal(model(batch).raw, plain)
    assert called == ["encoder", "gate", "sequencer"]


def test_the_kernel_drops_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    seen = calls_of_the_kernel(monkeypatch)
    model = make(shake=0.3, ff_dim=8, dropout=0.2)
    batch = batch_of()
    assert torch.equal(model(batch).raw, model(batch).raw)
    model.train()
    assert not torch.equal(model(batch).raw, model(batch).raw)
    assert seen == [0.0, 0.0, 0.2, 0.2]


def test_a_window_without_gaps_is_taken_as_it_is() -> None:
    model = make(normalisation="none")
    batch = batch_of()
    whole = model.normalise(batch._replace(context_mask=torch.ones_like(batch.context_mask)))
    assert torch.equal(whole.x, batch.context)
    assert make().normalise(batch._replace(context_mask=torch.ones_like(batch.context_mask))).x[:, -1].abs().max() == 0
