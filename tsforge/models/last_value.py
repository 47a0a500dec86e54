"""Last value: every step repeats the last observed value of the context (the naive forecast)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tsforge.contracts.model import Capabilities, ModelConfig
from tsforge.contracts.tensors import Batch, Prediction, SolveReport, TrainingSeries
from tsforge.models._ar_windows import NaiveForecaster, residual_scale
from tsforge.models.registry import register


class LastValueConfig(ModelConfig):
    """The last value has no settings."""

    name: Literal["last_value"] = "last_value"


def last_observed(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last observed value of each row [B, 1, V] and its position (-1 and value 0 where nothing is observed).

    Shapes:
        values [B, L, V], mask [B, L, V] bool.
    """
    steps = torch.arange(values.shape[1], device=values.device).view(1, -1, 1)
    place = torch.where(mask, steps, -1).amax(dim=1, keepdim=True)  # [B, 1, V]
    value = values.gather(1, place.clamp(min=0))
    return torch.where(place >= 0, value, 0.0), place


@register("last_value")
class LastValue(NaiveForecaster[LastValueConfig]):
    """Repeats the last observed value; a context without any forecasts the training mean (0 in scaled units)."""

    config_class = LastValueConfig
    capabilities = Capabilities(
        closed_form=True, trainable=False, probabilistic=False, scaling=("global", "series", "none")
    )
    source = "Definition: y_hat[t + h] = y[t] (optimal for a random walk)"

    def forward(self, batch: Batch) -> Prediction:
        """Return the location, and the spread of each series if it has one of its own, [B, H, V, 1 or K]."""
        value, _ = last_observed(batch.context, batch.context_mask)
        return self.prediction(value.expand(-1, self.spec.horizon, -1), batch)

    def solve(self, data: TrainingSeries) -> SolveReport:
        """Measure the error of each step on the training span; there is nothing to fit."""
        return SolveReport(finished=True, method="last value", residual_scale=residual_scale(self, data))
