"""Recurrent layers and Aaren blocks beyond their checklist (``tests/golden/test_recurrent_checklist.py``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from tsforge.core.errors import ConfigError
from tsforge.layers.aaren import AarenBlock, AarenStack
from tsforge.layers.recurrent import Cell, RecurrentLayer, RecurrentStack
from tsforge.ops.prefix_attention import summarise

CELLS: tuple[Cell, ...] = ("lstm", "gru", "slstm")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def stacks(dropout: float = 0.0) -> dict[str, Any]:
    """Return one stack of two layers of every kind, width 8."""
    torch.manual_seed(0)
    found: dict[str, Any] = {
        f"{cell}, {heads} heads": RecurrentStack([RecurrentLayer(cell, 8, 8, heads) for _ in range(2)], dropout)
        for cell in CELLS
        for heads in (1, 2)
    }
    for position in ("decay", "sinusoid"):
        found[f"aaren, {position}"] = AarenStack(8, 2, 2, position=position, span=20, dropout=dropout)  # type: ignore[arg-type]
    return {name: stack.double() for name, stack in found.items()}


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide_the_width(heads: int) -> None:
    for make in (lambda: RecurrentLayer("gru", 4, 8, heads), lambda: AarenBlock(8, heads)):
        with pytest.raises(ConfigError, match=f"{heads} heads do not divide a width of 8"):
            make()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("with_state", [False, True])
def test_cells_of_torch_stay_in_single_precision_on_a_cpu(cell: Cell, with_state: bool) -> None:
    """A processor without AVX-512 has no LSTM in bf16: torch's own call fails there, and rounds elsewhere."""
    torch.manual_seed(0)
    layer, x = RecurrentLayer(cell, 3, 4), torch.randn(2, 5, 3)
    state = torch.randn(2, layer.parts, 4) if with_state else None
    exact = layer(x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, state)
        rough = layer(x.bfloat16(), None if state is None else state.bfloat16())
    for part, wanted, near in zip(found, exact, rough, strict=True):
        assert torch.equal(part, wanted)
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", stacks())
@torch.no_grad()
def test_stacks_run_whole_in_chunks_and_step_by_step(name: str) -> None:
    stack, x = stacks()[name].eval(), drawn(3, 30, 8)
    whole, after = stack(x)
    torch.testing.assert_close(stack.last(x), whole[:, -1], rtol=0, atol=1e-12)
    first, states = stack(x[:, :13])
    second, states = stack(x[:, 13:], states)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
    states = stack.default_states(3)
    for i in range(30):
        feature, states = stack.step(x[:, i], states)
        torch.testing.assert_close(feature, whole[:, i], rtol=0, atol=1e-12)
    for ours, theirs in zip(states, after, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


# ---- causality


@torch.no_grad()
def leak(stack: nn.Module, at: int = 12) -> float:
    """Return by how much features before step ``at`` change when everything from there on does."""
    stack.eval()
    x = drawn(3, 30, 8)
    other = x.clone()
    other[:, at:] = 10.0 * drawn(3, 30 - at, 8, seed=1)
    return float((stack(x)[0] - stack(other)[0])[:, :at].abs().max())


class SeesAll(AarenBlock):
    """Broken on purpose: every position is given the attention over the whole sequence."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        attended = summarise(*self._tokens(x), self.decay()).output()
        return self._tail(x, attended.unsqueeze(2).expand(-1, -1, x.shape[1], -1)), x[:, -1]


class Backwards(RecurrentLayer):
    """Broken on purpose: reads the sequence from its end."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, after = super().forward(x.flip(1), state)
        return y.flip(1), after


@pytest.mark.parametrize("name", stacks())
def test_features_do_not_depend_on_later_steps(name: str) -> None:
    assert leak(stacks()[name]) == 0.0


def test_layers_that_look_ahead_are_caught() -> None:
    torch.manual_seed(0)
    attention = AarenStack(8, 2, 1)
    attention.blocks[0] = SeesAll(8, 2)
    for broken in (attention, RecurrentStack([Backwards("gru", 8, 8)]), RecurrentStack([Backwards("slstm", 8, 8)])):
        assert leak(broken.double()) > 1e-3


# ---- recurrent layers


@torch.no_grad()
def test_forget_gates_start_open() -> None:
    for layer in (RecurrentLayer("lstm", 4, 64), RecurrentLayer("lstm", 4, 64, 2), RecurrentLayer("slstm", 4, 64, 2)):
        bias = layer.bias if layer.own else layer.inner.bias_ih_l0 + layer.inner.bias_hh_l0
        gates = bias.view(4, 64).mean(1)
        assert float(gates[1]) == pytest.approx(1.0, abs=0.15)
        assert float(gates[[0, 2, 3]].abs().max()) < 0.15


@torch.no_grad()
def test_a_normaliser_begun_with_zeros_is_held_at_one() -> None:
    """From zeros, as the reference implementation starts, the stabiliser is l and not i where i is small."""
    torch.manual_seed(0)
    layer = RecurrentLayer("slstm", 3, 4).double()
    x, state = drawn(5, 3), torch.zeros(5, 4, 4, dtype=torch.float64)
    y, after = layer.step(x, state)
    i, f, z, o = np.split(x.numpy() @ layer.weight_ih.numpy().T + layer.bias.numpy(), 4, axis=-1)
    kept = -np.log1p(np.exp(-f))
    top = np.maximum(i, kept)
    n = np.maximum(np.exp(i - top), 1.0)
    assert (np.exp(i - top) < 1.0).any()  # the clamp acts
    expected = np.exp(i - top) * np.tanh(z) / n / (1.0 + np.exp(-o))
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(after.numpy()[:, 2], n, atol=1e-14)


@torch.no_grad()
def test_the_normaliser_never_needs_the_clamp_from_the_usual_start() -> None:
    torch.manual_seed(0)
    layer = RecurrentLayer("slstm", 3, 4).float()
    state = layer.default_state(50)
    for row in (20.0 * drawn(200, 50, 3)).float():
        state = layer.step(row, state)[1]
        assert float(state[:, 2].min()) >= 1.0


@pytest.mark.parametrize("name", ["gru, 1 heads", "slstm, 2 heads"])
@torch.no_grad()
def test_dropout_leaves_out_the_same_features_at_every_step(name: str) -> None:
    torch.manual_seed(1)
    stack, x = stacks(dropout=0.5)[name].train(), drawn(16, 9, 8)
    features, _ = stack(x)
    out = features == 0.0
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert 0.3 < float(out[:, 0].double().mean()) < 0.7
    again, _ = stack.eval()(x)
    assert not bool((again == 0.0).any())


# ---- Aaren blocks


@torch.no_grad()
def test_an_aaren_block_is_a_transformer_block_with_one_query() -> None:
    torch.manual_seed(0)
    block, x = AarenBlock(6, 2, torch.tensor([2.0, 5.0])).double().eval(), drawn(2, 9, 6)
    assert block.raw_decay is not None
    torch.testing.assert_close(block.half_lives(), torch.tensor([2.0, 5.0], dtype=torch.float64), rtol=1e-6, atol=0)
    u = layer_norm(x, (6,), block.norm.weight, block.norm.bias)
    keys, values = u @ block.key.weight.T, u @ block.value.weight.T + block.value.bias
    rows = torch.zeros(2, 9, 6, dtype=torch.float64)
    for head, life in enumerate((2.0, 5.0)):
        cut = slice(3 * head, 3 * head + 3)
        scores = keys[..., cut] @ block.query[head] / math.sqrt(3.0)  # [2, 9]
        for i in range(9):
            age = torch.arange(i, -1, -1, dtype=torch.float64)
            weight = scores[:, : i + 1].exp() * 0.5 ** (age / life)
            rows[:, i, cut] = (weight.unsqueeze(1) @ values[:, : i + 1, cut]).squeeze(1) / weight.sum(1, keepdim=True)
    y = x + rows @ block.out.weight.T + block.out.bias
    first, _, second = block.wide
    hidden = gelu(layer_norm(y, (6,), block.wide_norm.weight, block.wide_norm.bias) @ first.weight.T + first.bias)
    torch.testing.assert_close(block(x)[0], y + hidden @ second.weight.T + second.bias, rtol=0, atol=1e-6)


def test_half_lives_start_between_two_steps_and_the_sequence() -> None:
    stack = AarenStack(16, 4, 1, span=54)
    lives = stack.blocks[0].half_lives()
    assert lives.tolist() == pytest.approx([2.0, 6.0, 18.0, 54.0], rel=1e-4)


@torch.no_grad()
def test_sines_hold_at_late_steps() -> None:
    """A stream may have run for long: the position of step 1,000,000 must not be rounded."""
    stack = AarenStack(6, 2, 1, position="sinusoid")
    placed = stack._placed(torch.zeros(2, 2, 6), torch.tensor([0, 1_000_000]))
    for row, first in enumerate((0, 1_000_000)):
        for step in range(2):
            angles = (first + step) * 1e4 ** (-np.arange(0, 6, 2) / 6)
            expected = np.stack([np.sin(angles), np.cos(angles)], axis=-1).ravel()
            np.testing.assert_allclose(placed[row, step].numpy(), expected, atol=1e-6)


def test_aaren_drops_the_same_features_at_every_step() -> None:
    torch.manual_seed(1)
    stack, x = AarenStack(8, 2, 1, dropout=0.5).train(), drawn(16, 9, 8).float()
    block = stack.blocks[0]
    assert isinstance(block, AarenBlock)
    out = block._thinned(x) == 0.0
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert 0.3 < float(out[:, 0].float().mean()) < 0.7
    assert torch.equal(block.eval()._thinned(x), x)
