"""Rows of a context as steps of a state space model: irregular steps, and a window that moves on by any of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tsforge.contracts.model import State
from tsforge.contracts.tensors import Observation


def last_index(seen: Tensor) -> Tensor:
    """Return the place [R] of the last True of each row, -1 where there is none."""
    steps = torch.arange(seen.shape[1], device=seen.device)
    return torch.where(seen, steps, -1).amax(1)


def with_elapsed(inputs: Tensor, elapsed: Tensor) -> Tensor:
    """Return inputs whose last entry is the logarithm of the time a step took."""
    return torch.cat([inputs[..., :-1], torch.log1p(elapsed).unsqueeze(-1).to(inputs.dtype)], dim=-1)


def compact(inputs: Tensor, seen: Tensor, *, closes: bool = True) -> tuple[Tensor, Tensor]:
    """Return only the steps that hold an observation, and the grid steps since the one before.

    Args:
        inputs: [R, L, I].
        seen: [R, L].
        closes: the last grid step counts as a step even if it holds nothing, so that the state reaches the cutoff.

    Shapes:
        returns [R, T, I] and [R, T], T the most steps of any row; shorter rows begin with steps of length 0.
    """
    length = seen.shape[1]
    steps = seen.clone()
    if closes:
        steps[:, -1] = True
    place = torch.arange(length, device=seen.device)
    earlier = torch.where(seen, place, -1).cummax(1).values  # last observation up to here
    before = torch.cat([earlier.new_full((len(seen), 1), -1), earlier[:, :-1]], dim=1)
    elapsed = torch.where(before >= 0, place - before, 1).to(inputs.dtype)
    elapsed = torch.where(steps, elapsed, 0.0)
    count = max(int(steps.sum(1).max()), 1)
    order = steps.to(torch.int8).argsort(dim=1, stable=True)[:, -count:]  # steps last, in time order
    chosen = inputs.gather(1, order.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))
    took = elapsed.gather(1, order)
    holds = seen.gather(1, order).unsqueeze(-1)  # what only closes or fills up is an empty input
    chosen = torch.where(holds, chosen, 0.0)
    return with_elapsed(chosen, took), took


def shifted(state: State, row: Observation) -> tuple[Tensor, Tensor]:
    """Return the last L rows and their mask with one more row at the end, after ``elapsed`` steps."""
    context, mask = state["context"], state["context_mask"]
    values = torch.where(row.mask, row.values, 0.0).unsqueeze(1)
    if row.elapsed is None:
        return (
            torch.cat([context[:, 1:], values], dim=1),
            torch.cat([mask[:, 1:], row.mask.unsqueeze(1)], dim=1),
        )
    length = context.shape[1]
    place = torch.arange(length, device=context.device) + row.elapsed.long().unsqueeze(1)  # [B, L]
    inside = (place < length).unsqueeze(-1)
    index = place.clamp(max=length - 1).unsqueeze(-1).expand_as(context)
    moved = torch.where(inside, context.gather(1, index), 0.0)
    kept = mask.gather(1, index) & inside
    return torch.cat([moved[:, :-1], values], dim=1), torch.cat([kept[:, :-1], row.mask.unsqueeze(1)], dim=1)
