"""The ReGENN verification checklist against loops in float64 that share no code with the model: the network.

Points 1 to 7, 10, 12 and 16; those of data, fits, storage and figures are in ``test_regenn_fit_checklist.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tsforge.app.fit import FitConfig
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import load, validate
from tsforge.layers.regenn import GraphEvolution, co_occurrence, cosine, window_counts
from tsforge.models._regenn_fit import count_graph
from tsforge.models.regenn import ReGENN, ReGENNConfig

Array = NDArray[np.float64]
FAITHFUL: dict[str, Any] = {  # the released network, all paths on
    "normalisation": "none",
    "network_gate": None,
    "mask_channel": False,
    "ar_init": "xavier",
    "evolution_init": "xavier",
    "ff_dim": 2048,
    "output_activation": "relu",
}


def make(spec: DataSpec, *, seed: int = 0, shake: float = 0.0, **settings: Any) -> ReGENN:
    """Return a float64 model in evaluation mode, its weights moved away from their start by ``shake``."""
    torch.manual_seed(seed)
    model = ReGENN(validate(ReGENNConfig, settings, where="model"), spec).double().eval()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(shake * torch.randn_like(part))
    return model


def batch_of(spec: DataSpec, size: int = 5, seed: int = 0, gaps: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, spec.context_length, spec.num_variates)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) >= gaps
    return Batch(torch.where(mask, values, 0.0), mask)


def series_of(values: Array, mask: NDArray[np.bool_] | None = None, lengths: tuple[int, ...] = ()) -> TrainingSeries:
    lengths = lengths or (len(values),)
    seen = np.ones(values.shape, dtype=bool) if mask is None else mask
    return TrainingSeries(
        values=torch.from_numpy(values),
        mask=torch.from_numpy(seen),
        indptr=torch.tensor([0, *np.cumsum(lengths)]),
        offset=torch.zeros(len(lengths), dtype=torch.int64),
    )


def graph_by_hand(x: Array, present: NDArray[np.bool_]) -> Array:
    variates = x.shape[1]
    graph = np.zeros((variates, variates))
    for b, c in product(range(variates), repeat=2):
        for row in range(len(x)):
            graph[b, c] += x[row, b] * present[row, c]
    return with_own_diagonal(graph)


def with_own_diagonal(graph: Array) -> Array:
    found = graph.copy()
    for b in range(len(graph)):
        found[b, b] = max(0.0, 2 * graph[b, b] - graph[b].sum())
    return found


# 1, 6: the graph


@pytest.mark.parametrize("variates", [2, 4])
def test_1_graph_equals_a_triple_loop(variates: int) -> None:
    rng = np.random.default_rng(variates)
    x = np.maximum(rng.normal(size=(30, variates)), 0.0)  # half of the cells are absent
    x[:, 0] *= 3.0
    found = co_occurrence(torch.from_numpy(x), torch.from_numpy(x > 0)).numpy()
    np.testing.assert_allclose(found, graph_by_hand(x, x > 0), rtol=1e-12)
    if variates == 2:  # the mass of b while the other is absent
        alone = [x[x[:, 1 - b] == 0, b].sum() for b in range(2)]
        np.testing.assert_allclose(np.diag(found), alone, rtol=1e-12)
        assert min(alone) > 0


@pytest.mark.parametrize("presence", ["observed", "positive"])
@pytest.mark.parametrize("by_windows", [False, True])
def test_1_counted_from_a_span_with_gaps(presence: str, by_windows: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.poisson(1.5, size=(40, 3)).astype(float)
    values[rng.random(values.shape) < 0.3] = 0.0
    mask = rng.random(values.shape) >= 0.25
    length, horizon, lengths = 5, 2, (25, 3, 12)  # the second series is too short for a window
    weight = np.zeros(40)
    first = 0
    for size in lengths:
        for start in range(size - length - horizon + 1):
            weight[first + start : first + start + length] += 1
        first += size
    counted = window_counts(torch.tensor([0, *np.cumsum(lengths)]), length, horizon).numpy()
    np.testing.assert_array_equal(counted, weight)
    raw = np.where(mask, values, np.inf).min(0)
    mass = np.where(mask, values - raw, 0.0)
    mass /= mass.max(0)
    present = mask & (values > 0) if presence == "positive" else mask
    graph = np.zeros((3, 3))
    for row in range(40):
        graph += np.outer(mass[row], present[row]) * (weight[row] if by_windows else 1.0)
    expected = with_own_diagonal(graph)
    poisoned = np.where(mask, values, np.nan)
    found = count_graph(
        series_of(poisoned, mask, lengths), presence=presence, by_windows=by_windows, sizes=(length, horizon)
    )
    np.testing.assert_allclose(found.numpy(), expected / np.abs(expected).max(), rtol=1e-12)


def test_1_graph_does_not_depend_on_units() -> None:
    rng = np.random.default_rng(0)
    celsius = rng.normal(size=(50, 3)) * [1, 5, 10]
    graphs = [
        count_graph(series_of(values), presence="observed", by_windows=False, sizes=(4, 2))
        for values in (celsius, 1.8 * celsius + 32)
    ]
    torch.testing.assert_close(graphs[0], graphs[1], rtol=1e-10, atol=1e-12)


def test_6_ten_times_the_graph_has_the_same_cosines() -> None:
    layer = GraphEvolution(4, steps=None, bias=False).double()
    graph = torch.rand(4, 4, dtype=torch.float64)
    (first, weights), (second, more) = layer.evolve(graph), layer.evolve(10 * graph)
    torch.testing.assert_close(cosine(first), cosine(second))
    torch.testing.assert_close(weights, more)
    torch.testing.assert_close(second, 10 * first)


# 2, 3: shapes and sizes

SWITCHES = [
    {"gate": gate, "sequencer": sequencer, "bidirectional_gate": both, "encoder": encoder, "ablate_gse": ablate}
    | {"bidirectional_sequencer": both and sequencer != "none", "paths": paths, "bias": bias}
    for gate, sequencer in (("lstm", "gru"), ("gru", "none"), ("rnn", "lstm"))
    for both in (False, True)
    for encoder in (False, True)
    for ablate in (False, True)
    for paths in ("both", "network")
    for bias in (False, True)
]


@pytest.mark.parametrize("settings", SWITCHES)
def test_2_shapes_for_all_switches(settings: dict[str, Any]) -> None:
    for size, length, horizon, variates in ((5, 7, 14, 3), (1, 1, 1, 2), (4, 6, 2, 5)):
        spec = DataSpec(context_length=length, horizon=horizon, num_variates=variates)
        model = make(spec, **settings, ff_dim=8) if settings["encoder"] else make(spec, **settings)
        raw = model(batch_of(spec, size)).raw
        assert raw.shape == (size, horizon, variates, 1)
        assert bool(torch.isfinite(raw).all())
        assert (model.source_layer is None) == settings["ablate_gse"]


NETS = list(product(("lstm", "gru", "rnn"), ("lstm", "gru", "rnn", "none")))


def shapes_seen(model: ReGENN, batch: Batch) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes that each part of the network takes in and gives out during one forecast."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    names = ("source_layer", "encoder", "gate", "sequencer", "target_layer")
    hooks = []
    for name in (*names, "drop"):
        part = getattr(model, name)

        def note(_: Any, given: tuple[Any, ...], found: Any, name: str = name) -> None:
            first = found[0] if isinstance(found, tuple) else found
            seen.setdefault(name, []).extend((tuple(given[0].shape), tuple(first.shape)))

        if part is not None:
            hooks.append(part.register_forward_hook(note))
    seen["output"] = [tuple(model(batch).raw.shape)]
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("attend", ["variables", "entities"])
@pytest.mark.parametrize(("gate", "sequencer"), NETS)
def test_2_shapes_of_every_step(gate: str, sequencer: str, attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of table 3.3, each seen where it happens: in the layers, not in the kernel that joins them."""
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    sizes = np.random.default_rng([*map(ord, gate + sequencer + attend)])
    for both, back in product((False, True), (False, True) if sequencer != "none" else (False,)):
        B, w, h, V = (int(sizes.integers(low, 8)) for low in (1, 1, 1, 2))
        settings: dict[str, Any] = {"gate": gate, "sequencer": sequencer, "attend": attend, "bidirectional_gate": both}
        spec = DataSpec(context_length=w, horizon=h, num_variates=V)
        model = make(spec, **settings, bidirectional_sequencer=back, ff_dim=4)
        seen = shapes_seen(model, batch_of(spec, B))
        rows = (B, V, w) if attend == "variables" else (V, B, w)  # one cutoff: the entities are the sequence
        expected = {
            "source_layer": [(B, w, V), (B, w, V)],
            "encoder": [rows, rows],
            "gate": [(B, V, w), (B, V, h * (1 + both))],
            "drop": [(B, h, V)] * (2 if sequencer == "none" else 4),  # 4b, 5 and 7: directions are already summed
            "sequencer": [(B, h, V), (B, h, V * (1 + back))],
            "target_layer": [(B, h, V), (B, h, V)],
            "output": [(B, h, V, 1)],
        }
        if sequencer == "none":
            del expected["sequencer"]
        assert seen == expected, (both, back)
        assert model.source_layer is not None
        assert model.source_layer(torch.zeros(B, w, V).double(), model.graph)[1].shape == (V, V)


@pytest.mark.parametrize(("length", "horizon", "variates", "ff_dim"), [(7, 14, 3, 2048), (5, 3, 4, 16)])
def test_3_parameter_count(length: int, horizon: int, variates: int, ff_dim: int) -> None:
    w, h, V = length, horizon, variates
    model = make(DataSpec(context_length=w, horizon=h, num_variates=V), **FAITHFUL | {"ff_dim": ff_dim})
    expected = {
        "source": 3 * V**2 + V + w**2 + w,
        "encoder": 4 * w**2 + 4 * w + 2 * ff_dim * w + ff_dim + w + 4 * w,
        "gate": 4 * h * w + 4 * h**2 + 8 * h,
        "sequencer": 8 * V**2 + 8 * V,
        "target": 3 * V**2 + V,
        "autoregression": w * h + h,
    }
    assert sum(part.numel() for part in model.parameters()) == sum(expected.values())
    if (w, h, V, ff_dim) == (7, 14, 3, 2048):
        assert sum(expected.values()) == 32_591


# 4, 5: the layer by hand, and what order means to it


def test_4_layer_that_changes_nothing() -> None:
    layer = GraphEvolution(3, steps=None, bias=True).double()
    with torch.no_grad():
        layer.W_A.copy_(torch.eye(3))
        layer.W_C.fill_(1.0)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    found, evolved = layer(x, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(evolved, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found, x)


def test_5_variates_permuted_with_their_weights() -> None:
    variates, order = 4, torch.tensor([2, 0, 3, 1])
    layer = GraphEvolution(variates, steps=6, bias=True).double()
    other = GraphEvolution(variates, steps=6, bias=True).double()
    graph = torch.rand(variates, variates, dtype=torch.float64)
    with torch.no_grad():
        for part in layer.parameters():
            part.add_(torch.randn_like(part))
        other.load_state_dict(layer.state_dict())
        assert other.b_A is not None
        assert other.B_C is not None
        for part in (other.W_A, other.W_C, other.B_C):
            part.copy_(part[order][:, order])
        other.b_A.copy_(other.b_A[order])
    x = torch.randn(5, 6, variates, dtype=torch.float64)
    torch.testing.assert_close(other(x[..., order], graph[order][:, order])[0], layer(x, graph)[0][..., order])


def test_5_autoregression_is_equivariant_and_the_whole_is_not() -> None:
    spec = DataSpec(context_length=6, horizon=3, num_variates=4)
    batch, order = batch_of(spec), torch.tensor([2, 0, 3, 1])
    turned = Batch(batch.context[..., order], batch.context_mask[..., order])
    straight = make(spec, shake=0.3, paths="autoregression")
    torch.testing.assert_close(straight(turned).raw, straight(batch).raw[:, :, order])
    whole = make(spec, shake=0.3, ablate_gse=True, sequencer="none", ff_dim=8)  # no weight is indexed by a variate
    assert float((whole(turned).raw - whole(batch).raw[:, :, order]).abs().max().detach()) > 1e-3


# the whole network against a derivation of its own


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _lstm(given: Array, back: Array, h: Array, c: Array) -> tuple[Array, Array]:
    i, f, g, o = np.split(given + back, 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(c), c


def _gru(given: Array, back: Array, h: Array, c: Array) -> tuple[Array, Array]:
    (r, z, n), (r_back, z_back, n_back) = np.split(given, 3), np.split(back, 3)
    new = np.tanh(n + _sigmoid(r + r_back) * n_back)
    keep = _sigmoid(z + z_back)
    return keep * h + (1 - keep) * new, c


def _elman(given: Array, back: Array, h: Array, c: Array) -> tuple[Array, Array]:
    return np.tanh(given + back), c


CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _elman}


def _recur(part: dict[str, Array], name: str, kind: str, rows: Array) -> Array:
    """Return the outputs of a recurrent net over rows, summed over its directions where it has two."""
    total = np.zeros((len(rows), part[f"{name}.weight_hh_l0"].shape[1]))
    for end in ("", "_reverse"):
        if f"{name}.weight_hh_l0{end}" not in part:
            continue
        w_x, w_h, b_x, b_h = (
            part[f"{name}.{what}_l0{end}"] for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, c = np.zeros(total.shape[1]), np.zeros(total.shape[1])
        for step in range(len(rows)) if not end else reversed(range(len(rows))):
            h, c = CELLS[kind](w_x @ rows[step] + b_x, w_h @ h + b_h, h, c)
            total[step] += h
    return total


def _norm(part: dict[str, Array], name: str, x: Array) -> Array:
    unit: Array = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    return part[f"{name}.weight"] * unit + part[f"{name}.bias"]


def _encoder(part: dict[str, Array], rows: Array) -> Array:
    width = rows.shape[1]
    q, k, v = np.split(rows @ part["encoder.self_attn.in_proj_weight"].T + part["encoder.self_attn.in_proj_bias"], 3, 1)
    out = []
    for i in range(len(rows)):
        score = np.exp([q[i] @ k[j] / math.sqrt(width) for j in range(len(rows))])
        mixed = sum(score[j] / score.sum() * v[j] for j in range(len(rows)))
        mixed = part["encoder.self_attn.out_proj.weight"] @ mixed + part["encoder.self_attn.out_proj.bias"]
        x = _norm(part, "encoder.norm1", rows[i] + mixed)
        wide = np.maximum(part["encoder.linear1.weight"] @ x + part["encoder.linear1.bias"], 0.0)
        back = part["encoder.linear2.weight"] @ wide + part["encoder.linear2.bias"]
        out.append(_norm(part, "encoder.norm2", x + back))
    return np.array(out)


def _evolve(part: dict[str, Array], name: str, graph: Array) -> tuple[Array, Array]:
    evolved = graph @ part[f"{name}.W_A"] + part.get(f"{name}.b_A", 0.0)
    V = len(graph)
    cos = np.zeros((V, V))
    for a, b in product(range(V), repeat=2):
        cos[a, b] = evolved[a] @ evolved[b] / (np.linalg.norm(evolved[a]) * np.linalg.norm(evolved[b]))
    return evolved, cos * part[f"{name}.W_C"] + part.get(f"{name}.B_C", 0.0)


BENT: dict[str, Any] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
}


def by_hand(model: ReGENN, x: Array, cutoffs: Array | None = None) -> Array:
    """Return the released network's forecast [S, H, V] of windows [S, L, V], written out from its equations.

    The rows of one cutoff stand for the entities of a mini-batch; without cutoffs all are of one.
    """
    part = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    config, horizon = model.config, model.spec.horizon
    count, length, variates = x.shape
    evolved, weights = _evolve(part, "source_layer", part["graph"])
    rows = np.zeros((count, variates, length))
    for s in range(count):
        mixed = np.array(
            [[sum(weights[a, b] * x[s, t, b] for b in range(variates)) for a in range(variates)] for t in range(length)]
        )
        bent = BENT[config.evolution_activation](mixed)
        rows[s] = (part["source_layer.W_T"].T @ bent + part.get("source_layer.b_T", 0.0)).T
    if config.encoder and config.attend == "variables":
        rows = np.array([_encoder(part, row) for row in rows])
    elif config.encoder:  # sequence first: the entities are what is attended to, for each variate alone
        same = np.zeros(count) if cutoffs is None else cutoffs
        whole = rows.copy()
        for cutoff in np.unique(same):
            for v in range(variates):
                rows[same == cutoff, v] = _encoder(part, whole[same == cutoff, v])
    _, weights = _evolve(part, "target_layer", evolved)
    out = np.zeros((count, horizon, variates))
    for s in range(count):
        t = _recur(part, "gate", config.gate, rows[s]).T  # [H, V]
        ahead = t if config.sequencer == "none" else _recur(part, "sequencer", config.sequencer, t) + t
        for d, a in product(range(horizon), range(variates)):  # what the target layer mixes, and the straight path
            out[s, d, a] = sum(weights[a, b] * ahead[d, b] for b in range(variates))
            if "ar_weight" in part:
                straight = sum(part["ar_weight"][step, d] * x[s, step, a] for step in range(length))
                out[s, d, a] += straight + part.get("ar_bias", np.zeros(horizon))[d]
    return np.maximum(out, 0.0)


CUTOFFS = torch.tensor([10, 20, 10, 30, 20, 10])  # entities of three cutoffs, one of them alone


def assert_released(model: ReGENN, seed: int = 0) -> None:
    """Compare a float64 model with the equations on rows of three cutoffs, at a random graph."""
    variates = model.spec.num_variates
    graph = np.random.default_rng(seed).uniform(size=(variates, variates))
    model.graph = torch.from_numpy(graph)
    batch = batch_of(model.spec, 6, seed)._replace(cutoff_index=CUTOFFS)
    found = model(batch).raw[..., 0].detach().numpy()
    expected = by_hand(model, batch.context.numpy(), CUTOFFS.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert 0.05 < (expected > 0).mean() < 0.95  # both sides of the clip were seen


@pytest.mark.parametrize("attend", ["variables", "entities"])
@pytest.mark.parametrize(("gate", "sequencer"), NETS)
def test_the_released_forward_pass_in_float64(gate: str, sequencer: str, attend: str) -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    for both, back in product((False, True), (False, True) if sequencer != "none" else (False,)):
        settings = {"gate": gate, "sequencer": sequencer, "attend": attend, "bidirectional_gate": both}
        settings |= {"bidirectional_sequencer": back, "ff_dim": 20}
        assert_released(make(spec, shake=0.4, **FAITHFUL | settings), seed=2 * both + back)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "selu"])
def test_the_released_activations_of_evolution(activation: str) -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    settings = {"evolution_activation": activation, "ff_dim": 20}
    assert_released(make(spec, shake=0.4, **FAITHFUL | settings))


@pytest.mark.parametrize("variates", [2, 3])
def test_the_shipped_preset_is_the_released_forward_pass(variates: int) -> None:
    """Exactly its settings: no autoregression, no bias, entities of a cutoff attend to each other, 7 to 14 steps."""
    shipped = load(FitConfig, "experiment/regenn_faithful")
    assert isinstance(shipped.model, ReGENNConfig)
    window = shipped.window
    spec = DataSpec(context_length=window.context_length, horizon=window.horizon, num_variates=variates)
    model = make(spec, shake=0.15, **shipped.model.model_dump(exclude={"name"}))
    assert model.config == shipped.model
    assert {"ar_weight", "source_layer.b_A", "source_layer.b_T"}.isdisjoint(model.state_dict())
    assert_released(model)


# 7: a row alone


def test_7_an_entity_alone_or_in_a_batch() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model, batch = make(spec, shake=0.3, ff_dim=8).float(), batch_of(spec, 7)
    batch = Batch(batch.context.float(), batch.context_mask)
    whole = model(batch).raw
    for row in range(7):
        alone = model(Batch(batch.context[row : row + 1], batch.context_mask[row : row + 1])).raw[0]
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-5)


def test_7_entities_attend_to_their_own_cutoff_only() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model, batch = make(spec, shake=0.3, ff_dim=8, attend="entities"), batch_of(spec, 6)
    cutoffs = torch.tensor([10, 20, 10, 20, 20, 30])
    batch = batch._replace(cutoff_index=cutoffs)
    moved = batch._replace(context=batch.context.clone())
    moved.context[1, 0] += 1.0
    change = (model(moved).raw - model(batch).raw).detach().abs().amax((1, 2, 3))
    assert bool((change[cutoffs == 20] > 1e-6).all())
    assert float(change[cutoffs != 20].max()) == 0.0


def test_7_an_absent_entity_is_not_attended_to() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model, batch = make(spec, shake=0.3, ff_dim=8, attend="entities"), batch_of(spec, 4)
    batch.context_mask[2] = False
    batch = batch._replace(context=torch.where(batch.context_mask, batch.context, 0.0))
    keep = torch.tensor([0, 1, 3])
    fewer = Batch(batch.context[keep], batch.context_mask[keep])
    torch.testing.assert_close(model(batch).raw[keep], model(fewer).raw)


# 10, 12: gradients


def test_10_the_target_layer_gives_no_gradient_to_the_graph() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model, batch = make(spec, shake=0.3, paths="network", network_gate=None, ff_dim=8), batch_of(spec)
    assert model.source_layer is not None
    model(batch).raw.square().sum().backward()
    grad = model.source_layer.W_A.grad
    assert grad is not None
    fixed = model.source_layer.evolve(model.graph)[0].detach().clone()

    class Constant(torch.nn.Module):
        """The same target layer on a graph that nobody can reach."""

        def __init__(self, layer: GraphEvolution) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, graph: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mixed, evolved = self.layer(x, fixed)
            return mixed, evolved

    through_data = grad.clone()
    model.zero_grad()
    assert model.target_layer is not None
    model.add_module("target_layer", Constant(model.target_layer))
    model(batch).raw.square().sum().backward()
    assert model.source_layer.W_A.grad is not None
    torch.testing.assert_close(model.source_layer.W_A.grad, through_data)
    assert float(through_data.abs().max()) > 0


def test_12_gradients_of_the_layer() -> None:
    layer = GraphEvolution(3, steps=4, activation="tanh", bias=True).double()
    names = [name for name, _ in layer.named_parameters()]
    graph = torch.rand(3, 3, dtype=torch.float64)

    def run(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = torch.func.functional_call(layer, dict(zip(names, parts, strict=True)), (x, graph))[0]
        return mixed

    parts = [torch.randn_like(part).requires_grad_() for part in layer.parameters()]
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parts))


# 16: precision and compilation


def test_16_bf16_keeps_the_cosines_in_single_precision() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model = make(spec, shake=0.3, ff_dim=8).float()
    batch = batch_of(spec)
    batch = Batch(batch.context.float(), batch.context_mask)
    exact = model(batch).raw
    assert model.source_layer is not None
    plain = model.source_layer.evolve(model.graph)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch).raw
        for found, wanted in zip(model.source_layer.evolve(model.graph), plain, strict=True):
            assert torch.equal(found, wanted)  # bf16 products would differ in the third digit
    assert bool(torch.isfinite(rough).all())
    assert bool((rough.float() - exact).abs().max() < 0.1 * exact.abs().max())
    assert not torch.equal(rough.float(), exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(is deprecated|should not be instantiated):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # all of them torch's own, in tracing
def test_16_compiles() -> None:
    spec = DataSpec(context_length=6, horizon=4, num_variates=3)
    model = make(spec, shake=0.3, ff_dim=8).float()
    batch = batch_of(spec)
    batch = Batch(batch.context.float(), batch.context_mask)
    torch.testing.assert_close(torch.compile(model)(batch).raw, model(batch).raw, rtol=1e-4, atol=1e-4)


def test_spec_and_config_of_one_variate_go_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    """Section 10, 8: the released network refuses one variate; here it is fitted without the layers, and says so."""
    spec = replace(DataSpec(context_length=6, horizon=4, num_variates=3), num_variates=1)
    model = make(spec)
    assert model.source_layer is None
    with caplog.at_level("WARNING"):
        model.prepare(series_of(np.random.default_rng(0).normal(size=(30, 1))))
    assert "one variate has no graph" in caplog.text
