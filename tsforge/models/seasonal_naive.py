"""Seasonal naive(m): every step repeats the latest observed value of the same phase of the season."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import pad

from tsforge.contracts.model import Capabilities, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import tunable
from tsforge.core.errors import ModelError
from tsforge.models._ar_windows import NaiveForecaster, residual_scale
from tsforge.models.last_value import last_observed
from tsforge.models.registry import register


class SeasonalNaiveConfig(ModelConfig):
    """Settings of the seasonal naive forecast."""

    name: Literal["seasonal_naive"] = "seasonal_naive"
    season_length: int = tunable(24, choices=[7, 12, 24, 48, 96, 168], ge=1)
    """Steps m of one season: 24 for a day of hourly data, 7 for a week of days, 12 for a year of months."""


@register("seasonal_naive")
class SeasonalNaive(NaiveForecaster[SeasonalNaiveConfig]):
    """Repeats the last season of the context.

    A missing value is replaced by the one a season earlier, and so on through the context; a phase that was never
    observed takes the last observed value of any phase, and 0 (the training mean) when there is none.
    """

    config_class = SeasonalNaiveConfig
    capabilities = Capabilities(
        closed_form=True, trainable=False, probabilistic=False, scaling=("global", "series", "none")
    )
    source = "Definition: y_hat[t + h] = y[t + h - m ceil(h / m)]"
    test_configs = ({"season_length": 1},)

    def __init__(self, config: SeasonalNaiveConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if config.season_length > spec.context_length:
            raise ModelError(
                f"season_length {config.season_length} does not fit into context_length {spec.context_length}; "
                "use a longer context or a shorter season"
            )

    def forward(self, batch: Batch) -> Prediction:
        """Return the location, and the spread of each series if it has one of its own, [B, H, V, 1 or K]."""
        season, horizon = self.config.season_length, self.spec.horizon
        rows, length, variates = batch.context.shape
        seasons = -(-length // season)
        front = seasons * season - length  # whole seasons, the newest last
        values = pad(batch.context, (0, 0, front, 0)).view(rows, seasons, season, variates)
        seen = pad(batch.context_mask, (0, 0, front, 0)).view(rows, seasons, season, variates)
        order = torch.arange(1, seasons + 1, device=values.device).view(1, -1, 1, 1)
        newest = torch.where(seen, order, 0).amax(dim=1, keepdim=True)  # [B, 1, m, V]
        phase = values.gather(1, (newest - 1).clamp(min=0)).squeeze(1)  # [B, m, V]
        fallback, _ = last_observed(batch.context, batch.context_mask)
        phase = torch.where(newest.squeeze(1) > 0, phase, fallback)
        step = torch.arange(horizon, device=values.device) % season
        return self.prediction(phase[:, step], batch)

    def solve(self, data: TrainingSeries) -> SolveReport:
        """Measure the error of each step on the training span; there is nothing to fit."""
        return SolveReport(finished=True, method="seasonal naive", residual_scale=residual_scale(self, data))
