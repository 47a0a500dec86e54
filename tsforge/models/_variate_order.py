"""An order of variates that puts correlated ones beside each other, for models that are causal along that axis."""

from __future__ import annotations

import torch
from torch import Tensor


def correlation_order(values: Tensor, mask: Tensor) -> Tensor:
    """Return a permutation [V] of the variates of a span [N, V], a chain of nearest neighbours by |correlation|.

    The chain starts with the most correlated pair and takes in, at whichever end, the variate that is closest to an
    end; of its two directions the one that starts with the smaller number is returned. Correlations are over rows where
    both are observed; a variate without variance has none.
    """
    seen = mask.to(torch.float64)
    count = seen.sum(0).clamp(min=1)
    centred = torch.where(mask, values.double() - (torch.where(mask, values.double(), 0.0).sum(0) / count), 0.0)
    power = centred.square().T @ seen  # [i, j]: of i, over rows where j is observed
    size = (power * power.T).sqrt()
    close = torch.where(size > 0, (centred.T @ centred).abs() / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    variates = len(close)
    if variates == 1:
        return torch.zeros(1, dtype=torch.long)
    pairs = torch.ones_like(close, dtype=torch.bool).triu(1)  # each once: rounding must not choose between them
    first = int(torch.where(pairs, close, -1.0).argmax())
    chain = [first // variates, first % variates]
    left = torch.ones(variates, dtype=torch.bool)
    left[chain] = False
    while bool(left.any()):
        ends = torch.where(left, close[[chain[0], chain[-1]]], -1.0)
        place = int(ends.argmax())
        end, chosen = divmod(place, variates)
        chain.insert(0, chosen) if end == 0 else chain.append(chosen)
        left[chosen] = False
    return torch.tensor(chain if chain[0] < chain[-1] else chain[::-1])
