"""DLinear (Zeng, Chen, Zhang, Xu, 2023, AAAI, arXiv 2205.13504): a moving average splits the context into trend and
remainder; one linear map each, shared by all variates; the forecast is their sum.

Deviations: both maps are composed into one matrix before they meet the data (the moving average is linear too), which
gives the same forecast with a third of the work. Legend: A moving-average matrix [L, L], W maps [K * H, L].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.models.registry import register


class DLinearConfig(ModelConfig):
    """Settings of DLinear."""

    name: Literal["dlinear"] = "dlinear"
    kernel: int = tunable(25, choices=[5, 13, 25, 49], ge=1)
    """Steps of the moving average, odd (Sec. 4 and the released code: 25)."""
    bias: bool = True


@register("dlinear")
class DLinear(ForecastModel[DLinearConfig]):
    """Two linear maps on trend and remainder."""

    config_class = DLinearConfig
    capabilities = Capabilities()
    source = (
        "Zeng, Chen, Zhang, Xu (2023), Are Transformers Effective for Time Series Forecasting?, AAAI, arXiv 2205.13504"
    )
    test_configs = ({}, {"kernel": 1}, {"kernel": 5, "bias": False})

    def __init__(self, config: DLinearConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if config.kernel % 2 == 0:
            raise ConfigError(f"model.kernel: {config.kernel} is even; a centred moving average needs an odd number")
        outputs = spec.num_params * spec.horizon
        self.trend = nn.Linear(spec.context_length, outputs, bias=config.bias)
        self.remainder = nn.Linear(spec.context_length, outputs, bias=config.bias)

    def averaged(self, weight: Tensor) -> Tensor:
        """Return ``weight @ A``: what a map of the trend does to the raw context.

        ``A`` averages ``kernel`` steps of the context, extended at both ends by its edge values. Its transpose spreads
        each weight over ``kernel`` neighbours; what falls outside belongs to the edge value.
        """
        half = self.config.kernel // 2
        if half == 0:
            return weight
        spread = avg_pool1d(pad(weight, (2 * half, 2 * half)).unsqueeze(0), self.config.kernel, stride=1).squeeze(0)
        first = spread[:, : half + 1].sum(1, keepdim=True)
        last = spread[:, -half - 1 :].sum(1, keepdim=True)
        if weight.shape[1] == 1:
            return spread.sum(1, keepdim=True)
        return torch.cat([first, spread[:, half + 1 : -half - 1], last], dim=1)

    def composed(self) -> tuple[Tensor, Tensor | None]:
        """Return the one matrix [K * H, L] and bias [K * H] that DLinear amounts to."""
        difference = self.trend.weight - self.remainder.weight
        weight = self.remainder.weight + self.averaged(difference)
        return weight, self.trend.bias + self.remainder.bias if self.config.bias else None

    def _outputs(self, weight: Tensor, bias: Tensor | None, context: Tensor) -> Tensor:
        """Return raw parameters [B, H, V, K] of one linear map of the context [B, L, V]."""
        batch, length, variates = context.shape
        rows = context.transpose(1, 2).reshape(batch * variates, length)
        out = nn.functional.linear(rows, weight, bias)
        return out.view(batch, variates, self.spec.horizon, self.spec.num_params).transpose(1, 2)

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]."""
        return Prediction(self._outputs(*self.composed(), batch.context))

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the trend and the remainder contribute to the location, each [B, H, V]."""
        remainder = self.remainder.weight - self.averaged(self.remainder.weight)
        parts = {
            "trend": self._outputs(self.averaged(self.trend.weight), self.trend.bias, batch.context),
            "remainder": self._outputs(remainder, self.remainder.bias, batch.context),
        }
        return {name: part[..., 0] for name, part in parts.items()}
