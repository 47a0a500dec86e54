"""Linear fits under Huber and quantile loss by iteratively reweighted least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsforge.ops.moments import solve_gram

Chunks = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class RobustLoss:
    """``huber``: squared up to ``delta`` robust residual scales, linear beyond; ``quantile``: pinball at ``level``."""

    kind: Literal["huber", "quantile"] = "huber"
    delta: float = 1.345
    level: float = 0.5

    def weights(self, residual: Tensor, scale: Tensor) -> Tensor:
        """Return the least-squares weight of each residual [m, T]; ``scale`` [T] is the robust residual scale."""
        if self.kind == "huber":
            return (self.delta * scale / residual.abs().clamp(min=1e-300)).clamp(max=1.0)
        side = torch.where(residual >= 0.0, self.level, 1.0 - self.level)
        return side / residual.abs().clamp(min=1e-4 * scale.clamp(min=1e-300))


def reweighted_least_squares(
    chunks: Chunks, start_weight: Tensor, start_bias: Tensor, loss: RobustLoss, *, max_iterations: int = 50
) -> tuple[Tensor, Tensor, int]:
    """Return weight [T, p], bias [T] and the iterations used.

    Args:
        chunks: called once a pass; yields (features [c, p], targets [c, T]) in float64, so windows never lie in memory
            all at once.
        start_weight, start_bias: where to begin, usually least squares.
        loss: what to minimise.
        max_iterations: passes over the windows; stops when no coefficient moves by more than 1e-6 of the largest.
    """
    weight, bias = start_weight.clone(), start_bias.clone()
    num_targets, num_features = weight.shape
    for iteration in range(1, max_iterations + 1):
        scale = _residual_scale(chunks, weight, bias)
        gram = weight.new_zeros(num_targets, num_features + 1, num_features + 1)
        right = weight.new_zeros(num_targets, num_features + 1)
        for features, targets in chunks():
            design = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # [c, p + 1]
            factor = loss.weights(targets - features @ weight.T - bias, scale)  # [c, T]
            for target in range(num_targets):
                weighted = design * factor[:, target : target + 1]
                gram[target] += weighted.T @ design
                right[target] += weighted.T @ targets[:, target]
        solved = torch.stack([solve_gram(gram[t], right[t][:, None])[0][:, 0] for t in range(num_targets)])
        moved = float((solved[:, :-1] - weight).abs().max()) if num_features else 0.0
        moved = max(moved, float((solved[:, -1] - bias).abs().max()))
        weight, bias = solved[:, :-1].contiguous(), solved[:, -1].contiguous()
        if moved <= 1e-6 * max(float(solved.abs().max()), 1e-12):
            return weight, bias, iteration
    return weight, bias, max_iterations


def _residual_scale(chunks: Chunks, weight: Tensor, bias: Tensor) -> Tensor:
    """Return 1.4826 times the median absolute residual of each target, from at most about 100,000 windows."""
    sizes, kept = 0, []
    for features, targets in chunks():
        kept.append((targets - features @ weight.T - bias).abs())
        sizes += len(features)
        if sizes >= 100_000:
            break
    return 1.4826 * torch.cat(kept).median(dim=0).values.clamp(min=1e-12)
