"""Chimera layers and stacks are causal, symmetric in their variates, and stream column by column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chimera_layer_cases import STREAMED, D, E, S, grid, layer_of, stack_of

# ---- 5.6 causality


@pytest.mark.parametrize("settings", [{}, {"coupling": "pooled"}, {"selective": False}, {"head_mix": "residual"}])
@torch.no_grad()
def test_checklist_5_6_later_inputs_change_nothing_before(settings: dict[str, Any]) -> None:
    stack, x = stack_of(conv=4, **settings), grid(2, 4, 12, features=D)
    before = stack(x).x
    for start in (1, 5, 11):
        changed = x.clone()
        changed[:, :, start:] = grid(2, 4, 12, seed=9, features=D)[:, :, start:]
        after = stack(changed).x
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert not torch.allclose(after[:, :, start:], before[:, :, start:], atol=1e-3)


@torch.no_grad()
def test_checklist_5_6_one_direction_is_causal_along_variates_and_two_are_not() -> None:
    x = grid(2, 5, 8, features=D)
    changed = x.clone()
    changed[:, 3:] += 1.0
    one = stack_of(directions="forward")
    assert torch.equal(one(changed).x[:, :3], one(x).x[:, :3])
    both = stack_of()
    assert float((both(changed).x[:, :3] - both(x).x[:, :3]).abs().max()) > 1e-3


@torch.no_grad()
def test_checklist_5_6_a_truncated_history_gives_the_same_features() -> None:
    stack, x = stack_of(conv=4), grid(2, 4, 12, features=D)
    torch.testing.assert_close(stack(x[:, :, :7]).x, stack(x).x[:, :, :7], atol=1e-12, rtol=0)


# ---- 5.7 symmetry


@pytest.mark.parametrize("selective", [True, False])
@torch.no_grad()
def test_checklist_5_7_reversed_variates_and_swapped_directions_reverse_the_output(selective: bool) -> None:
    layer, u = layer_of(selective=selective), grid(2, 5, 8)
    swapped = layer_of(seed=3, selective=selective)
    swapped.load_state_dict(layer.state_dict())
    for _, head in swapped.each():
        for part in head.parameters():
            part.copy_(part.flip(0))
    assert torch.equal(swapped(u.flip(1)).y.flip(1), layer(u).y)
    assert not torch.allclose(layer(u.flip(1)).y.flip(1), layer(u).y, atol=1e-3)


@pytest.mark.parametrize(("coupling", "equivariant"), [("none", True), ("pooled", True), ("scan", False)])
@torch.no_grad()
def test_checklist_5_7_permuted_variates(coupling: str, equivariant: bool) -> None:
    stack, x = stack_of(coupling=coupling), grid(2, 5, 8, features=D)
    order = torch.tensor([3, 0, 4, 1, 2])
    gap = float((stack(x[:, order]).x - stack(x).x[:, order]).abs().max())
    assert gap < 1e-12 if equivariant else gap > 1e-3


@torch.no_grad()
def test_pooled_variates_read_each_other_and_uncoupled_ones_do_not() -> None:
    x = grid(2, 5, 8, features=D)
    changed = x.clone()
    changed[:, 4] += 1.0
    for coupling, reads in (("pooled", True), ("none", False), ("scan", True)):
        stack = stack_of(coupling=coupling)
        gap = float((stack(changed).x - stack(x).x)[:, :4].abs().max())
        assert gap > 1e-4 if reads else gap == 0.0


@torch.no_grad()
def test_checklist_5_7_windows_of_a_batch_are_independent() -> None:
    stack, x = stack_of().float(), grid(6, 4, 9, features=D).float()
    whole, order = stack(x).x, torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(stack(x[order]).x, whole[order], atol=1e-6, rtol=0)
    parts = torch.cat([stack(part).x for part in x.split([1, 3, 2])])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


# ---- 5.8 streaming


@pytest.mark.parametrize("settings", STREAMED, ids=str)
@torch.no_grad()
def test_checklist_5_8_column_by_column_equals_the_full_pass(settings: dict[str, Any]) -> None:
    stack, x = stack_of(**settings), grid(2, 3, 11, features=D)
    observed = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(2)) > 0.2
    whole = stack(x, observed)
    for cuts in (range(1, 11), (4,), (1, 10), (3, 6)):
        states, outputs, ahead = stack.default_states(2, 3), [], []
        for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
            part = stack(x[:, :, start:stop], observed[:, :, start:stop], states)
            states = part.state
            outputs.append(part.x)
            ahead.append(part.ahead)
        torch.testing.assert_close(torch.cat(outputs, dim=2), whole.x, atol=1e-12, rtol=0)
        for name, found in whole.ahead.items():
            torch.testing.assert_close(torch.cat([part[name] for part in ahead], dim=2), found, atol=1e-12, rtol=0)
        for own, expected in zip(states, whole.state, strict=True):
            assert own.keys() == expected.keys()
            for name, value in own.items():
                torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=0)


def test_checklist_5_8_the_state_holds_two_states_a_variate_channel_and_direction() -> None:
    layer = layer_of()
    state = layer(grid(2, 3, 4)).state
    assert state["trend"].shape == (2, 3, 2, 2 * E, S)
    assert state["seasonal"].shape == (2, 3, 2, 2 * E, S, 2)
    zero = layer.default_state(2, 3)
    assert {name: part.shape for name, part in zero.items()} == {name: part.shape for name, part in state.items()}
    assert not any(part.any() for part in zero.values())
