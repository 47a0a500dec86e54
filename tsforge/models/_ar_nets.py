"""The learnable maps of AR-Net: a linear layer from lags to steps, and ReLU layers that add to it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


def grouped(weight: Tensor, rows: Tensor) -> Tensor:
    """Return [B, V, out] from weight [G, out, in] and rows [B, V, in]; G = 1 is shared by all variates."""
    if weight.shape[0] == 1:
        return nn.functional.linear(rows, weight[0])
    return torch.bmm(rows.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


class HiddenLayers(nn.Module):
    """ReLU layers between lags and outputs, whose last layer starts at zero: at step 0 they change no forecast.

    Every layer is a registered parameter. Shapes: rows [B, V, in] to [B, V, out], weights [G, out, in].
    """

    def __init__(self, num_groups: int, inputs: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *hidden, outputs]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            last = layer == len(sizes) - 2
            limit = 0.0 if last else math.sqrt(6.0 / max(fan_in, 1))  # He et al. (2015), uniform form
            self.weights.append(nn.Parameter(torch.empty(num_groups, fan_out, fan_in).uniform_(-limit, limit)))
            self.biases.append(nn.Parameter(torch.zeros(num_groups, fan_out)))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the outputs of all layers."""
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = grouped(weight, rows) + bias
            if layer < last:
                rows = torch.relu(rows)
        return rows


class LagMap(nn.Module):
    """A linear map from lags to outputs, ``weight`` [G, out, in], with optional hidden layers beside it.

    The linear part is what closed-form solvers fill and what is read as coefficients. A skip connection rather than a
    chain of layers, so that a warm start is exact and the coefficients stay readable.
    """

    def __init__(
        self, num_groups: int, inputs: int, outputs: int, hidden: tuple[int, ...] = (), num_params: int = 1
    ) -> None:
        super().__init__()
        limit = 1.0 / math.sqrt(max(inputs, 1))
        self.outputs = outputs
        self.num_params = num_params
        self.weight = nn.Parameter(torch.empty(num_groups, outputs, inputs).uniform_(-limit, limit))
        self.hidden = HiddenLayers(num_groups, inputs, hidden, outputs * num_params) if hidden else None

    def forward(self, rows: Tensor) -> Tensor:
        """Return [B, out, V, K'] from rows [B, V, in]; K' is 1 without hidden layers."""
        linear = grouped(self.weight, rows).transpose(1, 2).unsqueeze(-1)  # [B, out, V, 1]
        if self.hidden is None:
            return linear
        extra = self.hidden(rows).unflatten(2, (self.outputs, self.num_params)).transpose(1, 2)  # [B, out, V, K]
        return torch.cat([linear + extra[..., :1], extra[..., 1:]], dim=-1)
