"""Gaps in the context of a linear model: replaced by their expectation given what was observed before the origin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tsforge.contracts.tensors import is_complete
from tsforge.ops.kalman import conditional_fill, precision_matrix
from tsforge.ops.stability import is_stationary
from tsforge.ops.toeplitz import Levinson, levinson, sound_autocovariance


class GapFiller(nn.Module):
    """Fills gaps by a stationary autoregression, the exact Gaussian conditional expectation within each window.

    Before ``fit`` (or ``set``) it fills with the centre, 0.

    Shapes:
        weight [G, p] (G = 1: shared by all variates, else one row a variate), center [V].
    """

    weight: Tensor
    center: Tensor

    def __init__(self, num_groups: int, order: int, num_variates: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_groups, order, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(num_variates, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, values: Tensor, mask: Tensor, bounds: list[int]) -> list[Levinson]:
        """Take centre and autocovariances from a training span [N, V]; return the order recursion of each group."""
        count = mask.sum(0).clamp(min=1)
        center = torch.where(mask, values.double(), 0.0).sum(0) / count
        self.center.copy_(center)
        groups, order = self.weight.shape
        seen = mask.any(0)
        acov = np.zeros((values.shape[1], order + 1))
        if bool(seen.any()):
            part = (values[:, seen].double() - center[seen]).cpu().numpy()
            acov[seen.cpu().numpy()] = sound_autocovariance(part, mask[:, seen].cpu().numpy(), bounds, order)
        found = []
        for group in range(groups):
            found.append(levinson(acov.sum(axis=0) if groups == 1 else acov[group]))
            self.weight[group] = torch.from_numpy(found[-1].weight)
        return found

    @torch.no_grad()
    def set(self, weight: Tensor, whole: Sequence[bool]) -> None:
        """Use these coefficients [G, p] wherever they are stationary and were fitted on ``whole`` [G] windows.

        Elsewhere the fitted ones stay: coefficients fitted on windows that those filled expect them to.
        """
        for group, row in enumerate(weight.double().cpu()):
            if whole[group] and is_stationary(row.numpy()):
                self.weight[group] = row.to(self.weight.device)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return ``values`` [B, L, V] with gaps filled; observed cells are untouched."""
        if is_complete(mask):
            return values
        center = self.center.to(values.dtype)
        centred = torch.where(mask, values - center, 0.0)
        length = values.shape[1]
        columns = []
        for group in range(self.weight.shape[0]):
            part = slice(None) if self.weight.shape[0] == 1 else slice(group, group + 1)
            rows = centred[:, :, part].transpose(1, 2).reshape(-1, length)
            seen = mask[:, :, part].transpose(1, 2).reshape(-1, length)
            if not bool(seen.all()):
                rows = conditional_fill(precision_matrix(self.weight[group].double(), length), rows, seen)
            columns.append(rows.view(values.shape[0], -1, length).transpose(1, 2))
        return torch.where(mask, values, torch.cat(columns, dim=2) + center)
