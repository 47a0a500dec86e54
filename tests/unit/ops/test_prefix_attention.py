"""Prefix attention beyond its checklist (``tests/golden/test_recurrent_checklist.py``): decay, absent tokens, types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsforge.core.errors import ModelError
from tsforge.ops.prefix_attention import Summary, later, merge, nothing, prefix_attention, summarise, token

HALF = torch.tensor([0.02, 0.7], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.from_numpy(spread * np.random.default_rng(seed).normal(size=shape))


def by_rows(scores: Tensor, values: Tensor, decay: Tensor | None = None) -> Tensor:
    """Return the outputs from a softmax of every prefix, one after another, in numpy and float64."""
    s, v = scores.detach().double().numpy(), values.detach().double().numpy()
    rows = []
    for i in range(s.shape[-1]):
        seen = s[..., : i + 1]
        if decay is not None:
            seen = seen - decay.detach().double().numpy()[..., None] * np.arange(i, -1, -1)
        with np.errstate(invalid="ignore"):
            part = np.exp(seen - seen.max(-1, keepdims=True))
        part = np.where(np.isneginf(seen), 0.0, part)
        whole = part.sum(-1, keepdims=True)
        part = part / np.where(whole > 0, whole, 1.0)
        rows.append((part[..., None] * v[..., : i + 1, :]).sum(-2))
    return torch.from_numpy(np.stack(rows, axis=-2))


@pytest.mark.parametrize("chunk", [2, 3, 16])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 130, 257])
@pytest.mark.parametrize("decay", [None, HALF], ids=["no decay", "decay"])
def test_any_length_and_chunk_with_and_without_decay(length: int, chunk: int, decay: Tensor | None) -> None:
    scores, values = drawn(3, 2, length), drawn(3, 2, length, 4, seed=1)
    found, after = prefix_attention(scores, values, decay, chunk=chunk)
    expected = by_rows(scores, values, decay)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(after.output(), expected[..., -1, :], rtol=0, atol=1e-13)
    torch.testing.assert_close(summarise(scores, values, decay).output(), expected[..., -1, :], rtol=0, atol=1e-13)


def test_a_long_decaying_sequence_in_single_precision() -> None:
    """Ages are told within chunks: scores less 1,200 x 0.7 would be rounded to 1e-4."""
    scores, values = drawn(1, 2, 1200).float(), drawn(1, 2, 1200, 3, seed=1).float()
    found, _ = prefix_attention(scores, values, HALF.float())
    torch.testing.assert_close(found.double(), by_rows(scores, values, HALF.float()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("decay", [None, HALF], ids=["no decay", "decay"])
def test_earlier_tokens_are_continued(decay: Tensor | None) -> None:
    scores, values = drawn(3, 2, 70), drawn(3, 2, 70, 4, seed=1)
    expected = by_rows(scores, values, decay)
    before: Summary | None = None
    for start, stop in ((0, 1), (1, 40), (40, 70)):
        part = scores[..., start:stop], values[..., start:stop, :]
        last = summarise(*part, decay, before)
        found, before = prefix_attention(*part, decay, before)
        torch.testing.assert_close(found, expected[..., start:stop, :], rtol=0, atol=1e-13)
        torch.testing.assert_close(last.output(), before.output(), rtol=0, atol=1e-13)


@torch.no_grad()
def test_one_token_at_a_time_with_decay() -> None:
    scores, values = drawn(3, 2, 70), drawn(3, 2, 70, 4, seed=1)
    expected = by_rows(scores, values, HALF)
    state = nothing((3, 2), 4, scores)
    assert torch.equal(state.output(), torch.zeros(3, 2, 4, dtype=torch.float64))
    for i in range(70):
        state = merge(later(state, HALF, 1), token(scores[..., i], values[..., i, :]))
        torch.testing.assert_close(state.output(), expected[..., i, :], rtol=0, atol=1e-13)


def test_merging_is_associative_and_commutative() -> None:
    scores, values = drawn(4, 30, spread=40.0), drawn(4, 30, 3, seed=1)
    a, b, c = (summarise(scores[:, cut], values[:, cut]) for cut in (slice(0, 7), slice(7, 8), slice(8, 30)))
    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        torch.testing.assert_close(other.output(), by_rows(scores, values)[:, -1], rtol=0, atol=1e-13)


def test_absent_tokens_are_left_out() -> None:
    scores, values = drawn(2, 50), drawn(2, 50, 3, seed=1)
    scores[0, :20], scores[1, 5::3] = -torch.inf, -torch.inf
    scores.requires_grad_()
    values.requires_grad_()
    found, _ = prefix_attention(scores, values)
    torch.testing.assert_close(found, by_rows(scores, values), rtol=0, atol=1e-13)
    assert torch.equal(found[0, :20], torch.zeros(20, 3, dtype=torch.float64))
    found.square().sum().backward()
    for part in (scores, values):
        assert part.grad is not None
        assert bool(torch.isfinite(part.grad).all())
    assert float(values.grad[0, :20].abs().max()) == 0.0  # type: ignore[index]


@pytest.mark.parametrize("length", [1, 5, 19])
def test_gradients(length: int) -> None:
    before = Summary(drawn(2, seed=3), drawn(2, seed=4).abs(), drawn(2, 2, seed=5))
    parts = [drawn(2, length), drawn(2, length, 2, seed=1), HALF.clone(), *before]
    for part in parts:
        part.requires_grad_()

    def outputs(scores: Tensor, values: Tensor, decay: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        found, after = prefix_attention(scores, values, decay, Summary(*state), chunk=3)
        # a top is a choice of units, without gradient: what a state means does not depend on it
        return found, after.output(), after.weight.log() + after.top, summarise(scores, values, decay).output()

    def meant(scores: Tensor, values: Tensor, decay: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        return outputs(scores, values, decay, parts[3].detach(), weight, total)[:2]

    assert torch.autograd.gradcheck(meant, (*parts[:3], *parts[4:]))


def test_gradients_of_huge_scores_equal_the_softmax() -> None:
    scores, values = drawn(2, 60, spread=3e3), drawn(2, 60, 3, seed=1)
    factors = drawn(2, 60, 3, seed=2)
    gradients = []
    for naive in (False, True):
        s, v = scores.clone().requires_grad_(), values.clone().requires_grad_()
        if naive:
            ahead = torch.ones(60, 60, dtype=torch.bool).triu(1)
            found = s.unsqueeze(-2).expand(2, 60, 60).masked_fill(ahead, -torch.inf).softmax(-1) @ v
        else:
            found, _ = prefix_attention(s, v)
        (found * factors).sum().backward()
        gradients.append((s.grad, v.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_up_in_single() -> None:
    scores, values = drawn(1, 2000, spread=0.5), drawn(1, 2000, 2, seed=1) + 3.0
    expected = by_rows(scores.bfloat16(), values.bfloat16())
    found, after = prefix_attention(scores.bfloat16(), values.bfloat16())
    assert found.dtype == torch.bfloat16
    assert after.weight.dtype == torch.float32
    torch.testing.assert_close(after.output().double(), expected[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = prefix_attention(scores.float(), values.float())
        last = summarise(scores.float(), values.float()).output()
    torch.testing.assert_close(last.double(), by_rows(scores, values)[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.double(), by_rows(scores, values), rtol=0, atol=1e-5)


class _Entries(TorchDispatchMode):
    """Counts the entries of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(part.numel() for part in torch.utils._pytree.tree_leaves(out) if isinstance(part, Tensor))
        return out


def test_work_grows_with_the_length_not_its_square() -> None:
    counts = []
    for length in (2048, 8192):
        scores, values = torch.zeros(1, length, requires_grad=True), torch.ones(1, length, 2, requires_grad=True)
        with _Entries() as seen:
            prefix_attention(scores, values)[0].sum().backward()
        counts.append(seen.count)
    assert 3.9 < counts[1] / counts[0] < 4.1


@pytest.mark.parametrize(
    ("scores", "values", "chunk", "message"),
    [
        ((2, 5), (2, 4, 3), 16, r"scores \(2, 5\) and values \(2, 4, 3\) do not fit"),
        ((2, 5), (2, 5), 16, "do not fit"),
        ((2, 0), (2, 0, 3), 16, "no tokens"),
        ((2, 5), (2, 5, 3), 1, "chunk is 1; it must be at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    scores: tuple[int, ...], values: tuple[int, ...], chunk: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        prefix_attention(torch.zeros(scores), torch.zeros(values), chunk=chunk)
