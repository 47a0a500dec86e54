"""The gain of a state observer, chosen on a trained model by the errors it makes on held-out windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch

GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0)
_MOST_WINDOWS = 512


def thinned(batches: Iterable[Batch], most: int = _MOST_WINDOWS) -> Batch | None:
    """Return at most ``most`` of the windows of all batches, spread evenly over them; None if there are none."""
    kept: list[tuple[Tensor, Batch]] = []  # places in the whole, windows
    every, total = 1, 0
    for batch in batches:
        places = torch.arange(total, total + len(batch.context), device=batch.context.device)
        total += len(places)
        kept.append((places, batch))
        while -(-total // every) > most:
            every *= 2
        kept = [_each(places, part, every) for places, part in kept]
    if not total:
        return None
    parts = zip(*(part for _, part in kept), strict=True)
    return Batch._make(None if part[0] is None else torch.cat(part) for part in parts)


def _each(places: Tensor, batch: Batch, every: int) -> tuple[Tensor, Batch]:
    chosen = places % every == 0
    return places[chosen], Batch._make(None if part is None else part[chosen] for part in batch)


def choose_gain(
    errors: Callable[[Batch, Tensor], Tensor],
    windows: Batch,
    like: Tensor,
    *,
    by_variate: bool,
    fixed: Tensor | None = None,
) -> Tensor:
    """Return the gain (G, N), or (G, 1), with the least error.

    A grid is tried with one gain for all variates. With ``by_variate`` each variate's own best of it is tried together
    and taken where their sum is less: the gain of one variate acts on the errors of the others.

    Args:
        errors: (windows, gain) -> mean squared errors (G, N).
        like: a tensor of the shape to return.
        fixed: a gain that is not to be chosen.
    """
    if fixed is not None:
        return fixed
    found = torch.stack([errors(windows, torch.full_like(like, value)) for value in GRID])  # (grid, G, N)
    found = torch.where(found.isfinite(), found, torch.inf)
    grid = like.new_tensor(GRID)
    total = found.sum(-1)
    shared = grid[total.argmin(0)].unsqueeze(-1).expand_as(like)
    if not by_variate:
        return shared.clone()
    own = grid[found.argmin(0)]
    better = errors(windows, own).sum(-1) < total.amin(0)
    return torch.where(better.unsqueeze(-1), own, shared)
