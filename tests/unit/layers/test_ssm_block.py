"""Residual blocks and stacks of them: whole, in chunks, step by step, and never ahead of time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, layer_norm

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.ssm import SSM, DiagonalSSM, LowRankSSM, StructuredSSM, UnitarySSM
from tsforge.layers.ssm_block import SSMBlock, SSMStack, States, memory_lengths

WIDTH = 6
LAYERS = {"s4d": DiagonalSSM, "s4": LowRankSSM, "lru": UnitarySSM, "lssl": StructuredSSM}


def layer_of(kind: str, channels: int = 1) -> SSM:
    return LAYERS[kind](WIDTH, 8, channels, name=kind, dt_range=(0.01, 0.1))


def stack_of(*kinds: str, channels: int = 2, dropout: float = 0.1, seed: int = 0) -> SSMStack:
    torch.manual_seed(seed)
    return SSMStack([SSMBlock(layer_of(kind, channels), dropout=dropout) for kind in kinds]).double().eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class HandMade(SSM):
    """A layer with a kernel written down, and no direct term."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__(kernel.shape[1], 2, kernel.shape[0], name="hand")
        self.given = kernel
        with torch.no_grad():
            self.D.zero_()

    def make_kernel(self, length: int, rate: float) -> Tensor:
        return self.given[..., :length]

    def facts(self) -> str:
        return "by hand"


def tail_of(block: SSMBlock, x: Tensor, y: Tensor) -> Tensor:
    """Return x plus what the outputs y [B, M, D, L] of its layers become, from the formula of the paper."""
    flat = y.reshape(len(y), -1, y.shape[-1]).transpose(1, 2)
    return x + glu(gelu(flat) @ block.out.weight.T + block.out.bias, dim=-1)


def normed(block: SSMBlock, x: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,), block.norm.weight, block.norm.bias).transpose(1, 2)


# ---- one block


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    kernel = drawn(2, WIDTH, 20)
    block = SSMBlock(HandMade(kernel)).double()
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2.0)
        block.norm.bias.uniform_(-1.0, 1.0)
        x = drawn(3, 20, WIDTH, seed=1)
        u = normed(block, x).numpy()
        y = [
            [[np.convolve(u[b, h], kernel[m, h].numpy())[:20] for h in range(WIDTH)] for m in range(2)]
            for b in range(3)
        ]
        expected = tail_of(block, x, torch.from_numpy(np.array(y)))
        found, state = block(x)
    assert state is None
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_dropout_leaves_out_the_same_features_at_every_step() -> None:
    torch.manual_seed(0)
    block = SSMBlock(layer_of("s4d"), dropout=0.5)
    x = torch.randn(40, 30, WIDTH)
    added = block(x)[0] - x
    silent = added.abs().amax(1) < 1e-6  # [B, D]
    assert 0.3 < float(silent.double().mean()) < 0.7
    assert bool((added.abs().amin(1)[~silent] > 0.0).all())
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])
    with torch.no_grad():
        expected = tail_of(block, x, block.ssm(normed(block, x))[0])
    torch.testing.assert_close(block(x)[0].detach(), expected, atol=1e-5, rtol=0)


def test_dropout_acts_before_and_after_the_readout() -> None:
    """With a readout that passes features on, both masks show: 1 - 0.5^2 of the features are left out at all steps."""
    torch.manual_seed(0)
    block = SSMBlock(layer_of("s4d"), dropout=0.5)
    with torch.no_grad():
        block.out.weight.copy_(torch.cat([torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)]))
        block.out.bias[:WIDTH], block.out.bias[WIDTH:] = 0.0, 50.0  # gate open
        x = torch.randn(200, 30, WIDTH)
        added = block(x)[0] - x
        silent = added == 0.0
        assert 0.7 < float(silent[:, 0].double().mean()) < 0.8
        assert bool((silent == silent[:, :1]).all())
        whole = block.eval()(x)[0] - x
        torch.testing.assert_close(added[~silent], 4.0 * whole[~silent], atol=1e-4, rtol=1e-4)


def test_dropout_keeps_the_mean_of_what_a_block_adds() -> None:
    """With the readout linear in what enters it, dropping and scaling up cancel on average."""
    torch.manual_seed(0)
    block = SSMBlock(layer_of("s4d"), dropout=0.3)
    with torch.no_grad():
        block.out.weight[WIDTH:], block.out.bias[WIDTH:] = 0.0, 50.0  # gate open: glu passes its first half on
        x = torch.randn(1, 10, WIDTH)
        mean = (block(x.expand(20_000, -1, -1))[0] - x).mean(0)
        added = (block.eval()(x)[0] - x)[0]
    assert float((mean - added).abs().max()) < 0.05 * float(added.abs().max())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0])
def test_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ConfigError, match=r"dropout is .*; it must be at least 0 and below 1"):
        SSMBlock(layer_of("s4d"), dropout=dropout)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_block_steps_and_ends_like_it_runs(kind: str) -> None:
    torch.manual_seed(0)
    block = SSMBlock(layer_of(kind, 2), dropout=0.2).double().eval()
    x = drawn(2, 50, WIDTH)
    with torch.no_grad():
        whole, state = block(x, with_state=True)
        torch.testing.assert_close(block(x)[0], whole, atol=1e-11, rtol=0)
        torch.testing.assert_close(block.last(x), whole[:, -1], atol=1e-11, rtol=0)
        carried, outputs = block.ssm.default_state(2), []
        for row in x.unbind(1):
            y, carried = block.step(row, carried)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(carried, state, atol=1e-11, rtol=0)


# ---- causality


def changes_before(block: SSMBlock, t: int) -> float:
    """Return how much outputs up to step t change with the inputs after it."""
    x = drawn(1, 60, WIDTH)
    changed = x.clone()
    changed[:, t + 1 :] += drawn(1, 59 - t, WIDTH, seed=1)
    with torch.no_grad():
        difference = (block(changed)[0] - block(x)[0]).abs()
    assert float(difference[:, t + 1 :].max()) > 1e-3  # the rest does change
    return float(difference[:, : t + 1].max())


def gradient_ahead(block: SSMBlock, t: int) -> float:
    """Return the largest derivative of the output at step t by any later input."""
    x = drawn(1, 60, WIDTH).requires_grad_()
    (gradient,) = torch.autograd.grad(block(x)[0][:, t].sum(), x)
    assert float(gradient[:, : t + 1].abs().max()) > 1e-3
    return float(gradient[:, t + 1 :].abs().max())


@pytest.mark.parametrize("kind", LAYERS)
def test_checklist_16_a_block_is_causal(kind: str) -> None:
    torch.manual_seed(0)
    block = SSMBlock(layer_of(kind)).double()
    assert block.causal
    for t in (0, 30, 58):
        assert changes_before(block, t) < 1e-12
        assert gradient_ahead(block, t) < 1e-12


def bidirectional() -> SSMBlock:
    torch.manual_seed(0)
    return SSMBlock(layer_of("s4d"), backward=layer_of("s4d")).double()


def test_checklist_16_a_bidirectional_block_fails_that_and_is_refused() -> None:
    block = bidirectional()
    assert not block.causal
    assert changes_before(block, 30) > 1e-3
    assert gradient_ahead(block, 30) > 1e-3
    with pytest.raises(ModelError, match=r"block 1 looks ahead \(bidirectional\); a forecaster would read the future"):
        SSMStack([SSMBlock(layer_of("s4d")), block])
    x = drawn(1, 9, WIDTH)
    for run in (lambda: block.last(x), lambda: block.step(x[:, 0], block.ssm.default_state(1))):
        with pytest.raises(ModelError, match="cannot forecast or stream"):
            run()
    for settings in ({"with_state": True}, {"state": block.ssm.default_state(1)}, {"elapsed": torch.ones(1, 9)}):
        with pytest.raises(ModelError, match="no state to carry"):
            block(x, **settings)


def test_checklist_16_the_backward_kernel_is_not_off_by_one() -> None:
    """The output at t reads strictly later inputs s with weight k[s - t - 1]; input t counts once, looking back."""
    ahead, back = drawn(1, WIDTH, 12, seed=2), drawn(1, WIDTH, 12, seed=3)
    torch.manual_seed(0)
    block = SSMBlock(HandMade(back), backward=HandMade(ahead)).double()
    x = drawn(2, 12, WIDTH)
    with torch.no_grad():
        u = normed(block, x)
        y = torch.zeros(2, 1, WIDTH, 12, dtype=torch.float64)
        for t in range(12):
            for s in range(t + 1):
                y[:, 0, :, t] += back[0, :, t - s] * u[:, :, s]
            for s in range(t + 1, 12):
                y[:, 0, :, t] += ahead[0, :, s - t - 1] * u[:, :, s]
        torch.testing.assert_close(block(x)[0], tail_of(block, x, y), atol=1e-12, rtol=0)


# ---- stacks

STACKS = [("s4d", "s4d"), ("s4", "s4d", "lru"), ("lssl", "lssl")]


def chunked(stack: SSMStack, x: Tensor, sizes: list[int]) -> tuple[Tensor, States]:
    parts, states = [], stack.default_states(len(x))
    for piece in x.split(sizes, dim=1):
        y, states = stack(piece, states)
        parts.append(y)
    return torch.cat(parts, dim=1), states


@pytest.mark.parametrize("kinds", STACKS)
@torch.no_grad()
def test_checklist_15_a_stack_streams_what_it_runs(kinds: tuple[str, ...]) -> None:
    stack, x = stack_of(*kinds), drawn(2, 200, WIDTH)
    whole, none = stack(x)
    assert none == []
    states, outputs = stack.default_states(2), []
    for row in x.unbind(1):
        y, states = stack.step(row, states)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(stack.last(x), whole[:, -1], atol=1e-10, rtol=0)
    end = stack(x, with_states=True)[1]
    for found, expected in zip(states, end, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kinds", STACKS)
@torch.no_grad()
def test_checklist_15_chunks_of_any_size_equal_one_pass(kinds: tuple[str, ...]) -> None:
    stack, x = stack_of(*kinds), drawn(2, 200, WIDTH)
    whole, end = stack(x, with_states=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        cuts = np.sort(rng.choice(np.arange(1, 200), size=rng.integers(1, 12), replace=False))
        y, states = chunked(stack, x, np.diff([0, *cuts, 200]).tolist())
        torch.testing.assert_close(y, whole, atol=1e-10, rtol=0)
        for found, expected in zip(states, end, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kinds", STACKS)
@torch.no_grad()
def test_checklist_15_weights_and_states_survive_a_file(kinds: tuple[str, ...], tmp_path: Path) -> None:
    stack, x = stack_of(*kinds), drawn(2, 60, WIDTH)
    _, states = stack(x, with_states=True)
    save_file(stack.state_dict(), tmp_path / "weights.safetensors")
    save_file({str(index): state.contiguous() for index, state in enumerate(states)}, tmp_path / "states.safetensors")
    other = stack_of(*kinds, seed=1)
    assert not torch.allclose(other(x)[0], stack(x)[0])
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    stored = load_file(tmp_path / "states.safetensors")
    loaded = [stored[str(index)] for index in range(len(states))]
    following = drawn(2, 40, WIDTH, seed=1)
    found, expected = other(following, loaded), stack(following, states)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(one, two) for one, two in zip(found[1], expected[1], strict=True))


@torch.no_grad()
def test_irregular_steps_go_through_every_block() -> None:
    stack, x = stack_of("s4d", "s4d"), drawn(2, 30, WIDTH)
    whole, end = stack(x, with_states=True)
    ones = torch.ones(2, 30, dtype=torch.float64)
    y, states = stack(x, elapsed=ones)
    torch.testing.assert_close(y, whole, atol=1e-10, rtol=0)
    assert len(states) == 2
    noise = torch.cat([1e3 * drawn(2, 5, WIDTH, seed=4), x], dim=1)  # steps of no time, whatever stands there
    padded, after = stack(noise, elapsed=torch.nn.functional.pad(ones, (5, 0)))
    torch.testing.assert_close(padded[:, 5:], whole, atol=1e-10, rtol=0)
    for found, expected in zip(after, end, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert not torch.allclose(stack(x, elapsed=2.0 * ones)[0], whole, atol=1e-3)


def test_a_stack_lists_its_layers_and_ends_with_a_norm() -> None:
    stack = stack_of("s4d", "lssl")
    assert [layer.name for layer in stack.layers()] == ["s4d", "lssl"]
    assert [tuple(state.shape) for state in stack.default_states(3)] == [(3, WIDTH, 4, 2), (3, WIDTH, 8)]
    y = stack(drawn(1, 10, WIDTH))[0].detach()
    torch.testing.assert_close(y.mean(-1), torch.zeros(1, 10, dtype=torch.float64), atol=1e-9, rtol=0)
    assert isinstance(stack.norm, nn.LayerNorm)


# ---- memory


def test_memory_by_hand() -> None:
    kernel = torch.zeros(1, 5, 16)
    kernel[0, 0, 0] = -3.0  # only the newest step
    kernel[0, 1] = 1.0  # all the same: 12 of 16 hold three quarters
    kernel[0, 2, 9] = 1e-3  # one step, nine back
    kernel[0, 3] = 0.5 ** torch.arange(16)  # 1 + 1/2 of nearly 2
    kernel[0, 3, 1::2] *= -1.0  # and the last one has no weight at all
    assert memory_lengths(kernel, 0.75).tolist() == [1, 12, 10, 2, 1]
    assert memory_lengths(kernel)[1] == 16  # 95 % of 16 are 15.2 steps
    assert memory_lengths(kernel).dtype == torch.int64


def test_memory_adds_the_channels() -> None:
    kernel = torch.zeros(2, 1, 8)
    kernel[0, 0, 0], kernel[1, 0, 5] = 1.0, -3.0
    assert memory_lengths(kernel, 0.2).tolist() == [1]
    assert memory_lengths(kernel, 0.5).tolist() == [6]


@pytest.mark.parametrize("length", [1, 7, 8, 200])
def test_the_map_of_features_is_the_linear_one_in_either_layout(length: int) -> None:
    """Short sequences go through the layer itself, long ones keep features in front of steps."""
    torch.manual_seed(0)
    block = SSMBlock(DiagonalSSM(16, 4)).double()
    mixed = torch.randn(3, 16, length, dtype=torch.float64, requires_grad=True)
    found, expected = block._map(mixed), block.out(mixed.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = [mixed, *block.out.parameters()]
    pairs = zip(*(torch.autograd.grad(part.square().sum(), inputs) for part in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
