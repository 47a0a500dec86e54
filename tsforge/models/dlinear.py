"""DLinear (Zeng, Chen, Zhang, Xu, 2023, AAAI, arXiv 2205.13504): a moving average splits the context into trend and
remainder; one linear map each, shared by all variates; the forecast is their sum.

Deviations: both maps are composed into one matrix before they meet the data (the moving average is linear too), which
gives the same forecast with a third of the work. Legend: A moving-average matrix [L, L], W maps [K * H, L].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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


def _moving_sum(rows: Tensor, kernel: int) -> Tensor:
    """Return sums over ``kernel`` neighbouring columns, one for each full stretch of them."""
    sums = pad(rows.cumsum(-1), (1, 0))
    return sums[..., kernel:] - sums[..., :-kernel]


class _Averaged(torch.autograd.Function):
    """``weight @ A`` in O(L) a row; ``A`` averages ``kernel`` steps of a context extended by its edge values."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kernel: int) -> Tensor:
        """Spread each weight over its neighbours; what falls outside the context belongs to the edge value."""
        ctx.kernel = kernel
        half, length = kernel // 2, weight.shape[-1]
        spread = _moving_sum(pad(weight, (2 * half, 2 * half)), kernel) / kernel  # [.., L + 2 half]
        inner = spread[..., half : half + length].clone()
        inner[..., 0] += spread[..., :half].sum(-1)
        inner[..., -1] += spread[..., half + length :].sum(-1)
        return inner

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return ``grad @ A.T``: the moving average of each row, extended by its edge values."""
        half = ctx.kernel // 2
        extended = torch.cat(
            [grad[..., :1].expand(*grad.shape[:-1], half), grad, grad[..., -1:].expand(*grad.shape[:-1], half)], dim=-1
        )
        return _moving_sum(extended, ctx.kernel) / ctx.kernel, None


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
        """Return ``weight @ A``: what a map of the trend does to the raw context."""
        if self.config.kernel == 1:
            return weight
        averaged: Tensor = _Averaged.apply(weight, self.config.kernel)  # type: ignore[no-untyped-call]
        return averaged

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
        return out.view(batch, variates, self.spec.horizon, self.spec.num_params).transpose(1, 2).contiguous()

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
