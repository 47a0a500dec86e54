"""Location and scale that a model takes from each context by itself."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch

Normalisation: TypeAlias = Literal["window", "last", "none"]
_LEAST_SCALE = 1e-5


def window_statistics(batch: Batch, kind: Normalisation) -> tuple[Tensor, Tensor]:
    """Return location and scale [B, 1, V] of each context.

    Args:
        kind: ``window`` is mean and deviation of what was observed, ``last`` the last observed value, ``none`` 0 and 1;
            so are they where nothing was observed.
    """
    context, mask = batch.context, batch.context_mask
    zero = torch.zeros_like(context[:, :1])
    if kind == "none":
        return zero, torch.ones_like(zero)
    count = mask.sum(1, keepdim=True).clamp(min=1).to(context.dtype)
    mean = torch.where(mask, context, 0.0).sum(1, keepdim=True) / count
    deviation = (torch.where(mask, context - mean, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    scale = torch.where(deviation > _LEAST_SCALE, deviation, torch.ones_like(deviation))
    if kind == "window":
        return mean, scale
    steps = torch.arange(context.shape[1], device=context.device).view(1, -1, 1)
    last = torch.where(mask, steps, 0).amax(1, keepdim=True)
    return torch.where(mask.any(1, keepdim=True), context.gather(1, last), zero), scale
