"""The verification checklist of the recurrent baselines: Aaren (A) and LSTM, GRU, sLSTM (R).

Oracles share no code with what they check: loops over steps in numpy and float64, ``torch.nn`` with copied weights, and
a softmax over a masked matrix.
"""

from __future__ import annotations

import gc
import math
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsforge.contracts.tensors import DataSpec, Observation
from tsforge.layers.aaren import AarenBlock, AarenStack
from tsforge.layers.recurrent import Cell, RecurrentLayer
from tsforge.models.aaren import Aaren, AarenConfig
from tsforge.models.lstm import LSTM, LSTMConfig
from tsforge.models.slstm import SLSTM, SLSTMConfig
from tsforge.ops.prefix_attention import merge, nothing, prefix_attention, summarise, token

CELLS: tuple[Cell, ...] = ("lstm", "gru", "slstm")


def drawn(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.from_numpy(spread * np.random.default_rng(seed).normal(size=shape))


# ---- Aaren


def by_loop(scores: Tensor, values: Tensor) -> np.ndarray:
    """Return the outputs of the recurrence, token after token, as it is written down in the paper."""
    s, v = scores.numpy(), values.numpy()
    m, c = np.full(s.shape[:-1], -np.inf), np.zeros(s.shape[:-1])
    a = np.zeros((*s.shape[:-1], v.shape[-1]))
    outputs = []
    for i in range(s.shape[-1]):
        top = np.maximum(m, s[..., i])
        c = c * np.exp(m - top) + np.exp(s[..., i] - top)
        a = a * np.exp(m - top)[..., None] + v[..., i, :] * np.exp(s[..., i] - top)[..., None]
        m = top
        outputs.append(a / c[..., None])
    return np.stack(outputs, axis=-2)


def by_softmax(scores: Tensor, values: Tensor) -> Tensor:
    """Return masked softmax attention in which the one query stands at every position."""
    length = scores.shape[-1]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.unsqueeze(-2).expand(*scores.shape, length).masked_fill(ahead, -math.inf).softmax(-1) @ values


@pytest.mark.parametrize("length", [1, 96, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_A1_prefixes_equal_the_loop_and_the_masked_softmax(length: int, dtype: torch.dtype, tolerance: float) -> None:
    scores, values = drawn(2, 3, length, spread=3.0).to(dtype), drawn(2, 3, length, 5, seed=1).to(dtype)
    found, _ = prefix_attention(scores, values)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), by_loop(scores.double(), values.double()), atol=tolerance)
    torch.testing.assert_close(found, by_softmax(scores, values), rtol=0, atol=tolerance)


def test_A2_scores_of_any_size() -> None:
    scores, values = 2e4 * (torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) - 0.5), drawn(4, 300, 3)
    scores[0], scores[1] = scores[0].sort().values, scores[1].sort(descending=True).values
    scores[2, 7] = 1e4  # a chunk whose largest score is not its first: what comes before must not underflow
    scores[2, :7] = -1e4
    values = values.float().requires_grad_()
    scores.requires_grad_()
    found, _ = prefix_attention(scores, values)
    np.testing.assert_allclose(
        found.detach().double().numpy(), by_loop(scores.detach().double(), values.detach().double()), atol=1e-5
    )
    found.sum().backward()
    for part in (scores, values):
        assert part.grad is not None
        assert bool(torch.isfinite(part.grad).all())


def aaren_stack(position: Any, seed: int = 0) -> AarenStack:
    torch.manual_seed(seed)
    return AarenStack(8, 2, 2, position=position, span=20).double().eval()


@pytest.mark.parametrize("position", ["decay", "sinusoid", "none"])
@torch.no_grad()
def test_A3_step_by_step_equals_the_full_pass(position: str) -> None:
    stack, x = aaren_stack(position), drawn(3, 50, 8)
    whole, after = stack(x)
    states = stack.default_states(3)
    for i in range(50):
        feature, states = stack.step(x[:, i], states)
        torch.testing.assert_close(feature, whole[:, i], rtol=0, atol=1e-12)
    for stepped, full in zip(states, after, strict=True):
        torch.testing.assert_close(stepped, full, rtol=0, atol=1e-11)
    torch.testing.assert_close(stack.last(x), whole[:, -1], rtol=0, atol=1e-12)


def test_A4_prefix_and_suffix_merged_are_the_whole() -> None:
    scores, values = drawn(3, 200, spread=30.0), drawn(3, 200, 4, seed=1)
    for cut in (1, 64, 199):
        parts = [summarise(scores[:, part], values[:, part]) for part in (slice(0, cut), slice(cut, 200))]
        expected = by_loop(scores, values)[:, -1]
        np.testing.assert_allclose(merge(*parts).output().numpy(), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(merge(*parts[::-1]).output().numpy(), expected, rtol=0, atol=1e-12)
        empty = nothing((3,), 4, scores)
        np.testing.assert_allclose(merge(empty, merge(*parts)).output().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(
            make,
            steps,
            id=f"{name}-{steps}",
            marks=[pytest.mark.slow, pytest.mark.timeout(900)] if steps > 5000 else [],
        )
        for name, make in (
            (
                "aaren",
                lambda spec: Aaren(
                    AarenConfig(d_model=8, heads=2, num_layers=1, normalisation="none", skip="none"), spec
                ),
            ),
            ("lstm", lambda spec: LSTM(LSTMConfig(d_model=8, normalisation="none", skip="none"), spec)),
            ("slstm", lambda spec: SLSTM(SLSTMConfig(d_model=8, normalisation="none", skip="none"), spec)),
        )
        for steps in (500, 100_000)
    ],
)
@torch.no_grad()
def test_A5_memory_of_a_step_is_constant(make: Callable[[DataSpec], Any], steps: int) -> None:
    torch.manual_seed(0)
    model = make(DataSpec(context_length=8, horizon=2, num_variates=1)).eval()
    values, seen = drawn(steps, 1, 1).float(), torch.ones(1, 1, dtype=torch.bool)
    state = model.initial_state(1)
    sizes = {name: part.shape for name, part in state.items()}
    for i in range(100):
        state = model.step(state, Observation(values[i], seen))
    alive, resident = _tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(100, steps):  # a loop over the tensor itself would make all rows at once
        state = model.step(state, Observation(values[i], seen))
    assert {name: part.shape for name, part in state.items()} == sizes
    assert _tensors() <= alive + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 8192  # kB
    assert all(bool(torch.isfinite(part).all()) for part in state.values())
    storage = {name: part.untyped_storage().nbytes() for name, part in state.items()}
    assert all(size <= 4096 for size in storage.values()), storage  # no view keeps a growing sequence alive


def _tensors() -> int:
    gc.collect()
    return sum(type(found) is Tensor for found in gc.get_objects())


@torch.no_grad()
def test_A6_without_a_position_code_the_order_of_earlier_tokens_does_not_matter() -> None:
    x, order = drawn(2, 30, 8), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([x[:, order], x[:, 20:]], dim=1)
    torch.manual_seed(0)
    block = AarenBlock(8, 2).double()
    torch.testing.assert_close(block(mixed)[0][:, 20:], block(x)[0][:, 20:], rtol=0, atol=1e-12)
    for position in ("decay", "sinusoid"):
        stack = aaren_stack(position)
        assert float((stack(mixed)[0] - stack(x)[0])[:, 20:].abs().max()) > 1e-3, position


# ---- LSTM, GRU, sLSTM


def layer_of(cell: Cell, heads: int, *, inputs: int = 5, width: int = 8, seed: int = 0) -> RecurrentLayer:
    torch.manual_seed(seed)
    return RecurrentLayer(cell, inputs, width, heads).double()


def dense(layer: RecurrentLayer) -> Tensor:
    """Return the recurrent weights of a layer with heads as one matrix [G D, D] with zeros between heads."""
    heads, gates, each, _ = layer.weight_hh.shape
    out = layer.weight_hh.new_zeros(gates, heads, each, heads, each)
    for head in range(heads):
        out[:, head, :, head] = layer.weight_hh[head]
    return out.reshape(gates * heads * each, heads * each).detach()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_R1_cells_equal_torch_with_copied_weights(cell: Cell, heads: int) -> None:
    """Several heads are one dense recurrence whose matrix is block-diagonal."""
    ours = layer_of(cell, heads)
    theirs = (nn.LSTM if cell == "lstm" else nn.GRU)(5, 8, batch_first=True).double()
    theirs.weight_ih_l0.copy_(ours.weight_ih)
    theirs.weight_hh_l0.copy_(dense(ours))
    theirs.bias_ih_l0.copy_(ours.bias)
    theirs.bias_hh_l0.zero_()
    if cell == "gru":
        theirs.bias_hh_l0[16:].copy_(ours.bias_hh)
    x, state = drawn(3, 20, 5), drawn(3, ours.parts, 8, seed=1)
    given = [part.unsqueeze(0).contiguous() for part in state.unbind(1)]
    expected, last = theirs(x, tuple(given) if cell == "lstm" else given[0])
    found, after = ours(x, state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    last = torch.cat(last).transpose(0, 1) if cell == "lstm" else last.transpose(0, 1)
    torch.testing.assert_close(after, last, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_R1_one_head_is_the_layer_of_torch(cell: Cell) -> None:
    ours, x = layer_of(cell, 1), drawn(3, 20, 5)
    expected, _ = ours.inner(x)
    torch.testing.assert_close(ours(x)[0], expected, rtol=0, atol=0)
    state = ours.default_state(3)
    for i in range(20):
        y, state = ours.step(x[:, i], state)
        torch.testing.assert_close(y, expected[:, i], rtol=0, atol=1e-13)


def slstm_unstabilised(layer: RecurrentLayer, x: Tensor) -> np.ndarray:
    """Return the outputs from c = sig(f) c + e^i tanh(z), n = sig(f) n + e^i, h = sig(o) c / n with a dense matrix."""
    W, R, b = (part.detach().numpy() for part in (layer.weight_ih, dense(layer), layer.bias))
    h, c, n = (np.zeros((len(x), 8)) for _ in range(3))
    outputs = []
    for u in x.numpy().transpose(1, 0, 2):
        i, f, z, o = np.split(u @ W.T + b + h @ R.T, 4, axis=-1)
        c = c / (1 + np.exp(-f)) + np.exp(i) * np.tanh(z)
        n = n / (1 + np.exp(-f)) + np.exp(i)
        h = c / n / (1 + np.exp(-o))
        outputs.append(h)
    return np.stack(outputs, axis=1)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@torch.no_grad()
def test_R2_slstm_equals_the_unstabilised_recurrence(heads: int, spread: float) -> None:
    layer, x = layer_of("slstm", heads), drawn(3, 60, 5, spread=spread)
    torch.testing.assert_close(layer(x)[0], torch.from_numpy(slstm_unstabilised(layer, x)), rtol=0, atol=1e-12)


def test_R2_slstm_bears_gates_that_overflow() -> None:
    layer, x = layer_of("slstm", 2).float(), drawn(3, 60, 5, spread=3e3).float().requires_grad_()
    y, state = layer(x)
    y.sum().backward()
    assert x.grad is not None
    for part in (y, state, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)):
        assert bool(torch.isfinite(part).all())
    torch.testing.assert_close(
        y.detach().double(), layer.double()(x.detach().double())[0].detach(), rtol=0, atol=1e-2
    )  # gates of size 1e4 hold three digits in float32


@torch.no_grad()
def test_R3_one_head_is_dense() -> None:
    """A layer of one head, and one of two heads that has the same block-diagonal matrix, agree."""
    for cell in CELLS:
        two = layer_of(cell, 2)
        one = layer_of(cell, 1, seed=1)
        whole = dense(two)
        if cell == "slstm":
            one.weight_hh.copy_(whole.view(1, 4, 8, 8))
            one.weight_ih.copy_(two.weight_ih)
            one.bias.copy_(two.bias)
        else:
            one.inner.weight_hh_l0.copy_(whole)
            one.inner.weight_ih_l0.copy_(two.weight_ih)
            one.inner.bias_ih_l0.copy_(two.bias)
            one.inner.bias_hh_l0.zero_()
            if cell == "gru":
                one.inner.bias_hh_l0[16:].copy_(two.bias_hh)
        x = drawn(3, 20, 5)
        torch.testing.assert_close(one(x)[0], two(x)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_R4_gradients(cell: Cell, heads: int) -> None:
    layer = layer_of(cell, heads, inputs=2, width=4)
    names = [name for name, _ in layer.named_parameters()]
    state = layer(drawn(2, 3, 2, seed=7))[1].detach()
    parts = [drawn(2, 4, 2).requires_grad_(), state.requires_grad_(), *layer.parameters()]

    def outputs(x: Tensor, state: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, state))

    assert torch.autograd.gradcheck(outputs, parts)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_R5_state_carried_over_chunks_equals_one_pass(cell: Cell, heads: int) -> None:
    layer, x = layer_of(cell, heads), drawn(3, 40, 5)
    whole, after = layer(x)
    state, parts = None, []
    for part in x.split([1, 17, 22], dim=1):
        y, state = layer(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-13)
    assert after.shape == (3, layer.parts, 8)


def test_A1_the_step_is_the_merge_with_one_token() -> None:
    scores, values = drawn(3, 40, spread=5.0), drawn(3, 40, 4, seed=1)
    expected, state = by_loop(scores, values), nothing((3,), 4, scores)
    for i in range(40):
        state = merge(state, token(scores[:, i], values[:, i]))
        np.testing.assert_allclose(state.output().numpy(), expected[:, i], rtol=0, atol=1e-12)
