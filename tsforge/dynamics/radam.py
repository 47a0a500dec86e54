"""RAdam for groups of models side by side, in one flat tensor: a step is a dozen small operations for all of them.

Source: Liu et al. (2020), "On the variance of the adaptive learning rate and beyond"; formulas and defaults of torch's
RAdam (0.9, 0.999, 1e-8). Additions: each group has its learning rate and its gradient norm is clipped alone; a group
whose loss or gradient is not finite skips the step. Nothing here waits for the device.

Legend: G groups, P parameters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_RHO_INF = 2 / (1 - _BETA2) - 1


class GroupedRAdam:
    """Moves parameters (G, ...) that become views of ``values`` (G, P).

    Attributes:
        values: all parameters.
        rate_scale: (G, 1) factor of the learning rate of each group.
        norm: (G,) gradient norms of the last step, before clipping.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float | None) -> None:
        self.parameters = list(parameters)
        with torch.no_grad():
            self.values = torch.cat([part.flatten(1) for part in self.parameters], dim=1)
            first = 0
            for part in self.parameters:
                size = part[0].numel()
                part.data = self.values[:, first : first + size].view(part.shape)
                first += size
        self._mean = torch.zeros_like(self.values)
        self._square = torch.zeros_like(self.values)
        self.rate_scale = self.values.new_ones(len(self.values), 1)
        self.norm = self.values.new_zeros(len(self.values))
        self._clip = clip
        self._taken = 0

    @torch.no_grad()
    def step(self, loss: Tensor, rate: float) -> Tensor:
        """Differentiate ``loss`` (G,) and move every group that can move; return which did not (G,) bool."""
        with torch.enable_grad():
            total = loss.sum()
        gradients = torch.autograd.grad(total, self.parameters)
        gradient = torch.cat([part.flatten(1) for part in gradients], dim=1)
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        self.norm = norm.squeeze(1)
        fine = torch.isfinite(norm + loss.detach().unsqueeze(1))
        if self._clip is not None:
            gradient.mul_((self._clip / (norm + 1e-6)).clamp_(max=1.0))
        gradient = torch.where(fine, gradient, 0.0)
        self._taken += 1
        t = self._taken
        self._mean.lerp_(gradient, 1 - _BETA1)
        self._square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        rest = 1 - _BETA2**t
        rho = _RHO_INF - 2 * t * _BETA2**t / rest
        rate = rate / (1 - _BETA1**t)
        scale = torch.where(fine, self.rate_scale, 0.0)
        if rho > 5:
            rectified = math.sqrt((rho - 4) * (rho - 2) * _RHO_INF / ((_RHO_INF - 4) * (_RHO_INF - 2) * rho) * rest)
            move = self._mean / self._square.sqrt().add_(_EPS)
            self.values.addcmul_(move, scale, value=-rate * rectified)
        else:
            self.values.addcmul_(self._mean, scale, value=-rate)
        return ~fine.squeeze(1)

    @torch.no_grad()
    def snapshot(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return a copy of the values and both moments."""
        return self.values.clone(), self._mean.clone(), self._square.clone()

    @torch.no_grad()
    def restore(self, saved: tuple[Tensor, Tensor, Tensor], groups: Tensor, rate_factor: float) -> None:
        """Take the marked groups (G,) back to ``saved`` and lower their learning rate."""
        marked = groups.unsqueeze(1)
        for place, old in zip((self.values, self._mean, self._square), saved, strict=True):
            place.copy_(torch.where(marked, old, place))
        self.rate_scale.copy_(torch.where(marked, self.rate_scale * rate_factor, self.rate_scale))
