"""Drift(k): the last value plus the mean change a step over the last k steps, continued."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tsforge.contracts.model import Capabilities, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import tunable
from tsforge.core.errors import ModelError
from tsforge.models._ar_windows import NaiveForecaster, residual_scale
from tsforge.models.last_value import last_observed
from tsforge.models.registry import register


class DriftConfig(ModelConfig):
    """Settings of the drift forecast."""

    name: Literal["drift"] = "drift"
    steps: int | None = tunable(None, choices=[None, 7, 14, 28], ge=1)
    """Look-back k of the slope; default the whole context (L - 1)."""


@register("drift")
class Drift(NaiveForecaster[DriftConfig]):
    """Continues the line through the last observed value and the one k steps earlier.

    Where the earlier end is not observed, the nearest observed value before it is used, else the first observed one
    after it, and the slope is taken over the true distance. One observed value gives a flat forecast.
    """

    config_class = DriftConfig
    capabilities = Capabilities(
        closed_form=True, trainable=False, probabilistic=False, scaling=("global", "series", "none")
    )
    source = "Definition: y_hat[t + h] = y[t] + h (y[t] - y[t - k]) / k"

    def __init__(self, config: DriftConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        longest = spec.context_length - 1
        if config.steps is not None and config.steps > longest:
            raise ModelError(
                f"drift over {config.steps} steps needs a context of {config.steps + 1} rows, "
                f"but context_length is {spec.context_length}"
            )
        self.steps = longest if config.steps is None else config.steps

    def _parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the last value [B, 1, V] and the drift from it [B, H, V]."""
        values, mask = batch.context, batch.context_mask
        last, place = last_observed(values, mask)
        steps = torch.arange(values.shape[1], device=values.device).view(1, -1, 1)
        wanted = place - self.steps
        before = torch.where(mask & (steps <= wanted), steps, -1).amax(dim=1, keepdim=True)
        after = torch.where(mask & (steps > wanted), steps, values.shape[1]).amin(dim=1, keepdim=True)
        anchor = torch.where(before >= 0, before, after.clamp(max=values.shape[1] - 1))
        distance = (place - anchor).to(values.dtype)
        slope = torch.where(distance > 0, (last - values.gather(1, anchor)) / distance.clamp(min=1.0), 0.0)
        ahead = torch.arange(1, self.spec.horizon + 1, device=values.device).view(1, -1, 1)
        return last, slope * (ahead + (values.shape[1] - 1 - place)).to(values.dtype)

    def forward(self, batch: Batch) -> Prediction:
        """Return the location, and the spread of each series if it has one of its own, [B, H, V, 1 or K]."""
        last, change = self._parts(batch)
        return self.prediction(last + change, batch)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the last value and the drift from it."""
        last, change = self._parts(batch)
        return {"last_value": last.expand_as(change), "drift": change}

    def solve(self, data: TrainingSeries) -> SolveReport:
        """Measure the error of each step on the training span; there is nothing to fit."""
        return SolveReport(finished=True, method="drift", residual_scale=residual_scale(self, data))
