"""Where lags, covariates and targets lie in one training window of a linear model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsforge.ops.moments import Channel


@dataclass(frozen=True)
class LagLayout:
    """Columns of one training window: own lags, lags of each past covariate, then the steps to be predicted.

    Attributes:
        lags: p own lags.
        horizon: steps predicted by the fit (1 for a recursive model).
        covariate_lags: q lags of each past covariate.
        num_past: P past covariates.
    """

    lags: int
    horizon: int
    covariate_lags: int = 0
    num_past: int = 0

    @property
    def reach(self) -> int:
        """Rows before the origin that a window needs."""
        return max(self.lags, self.covariate_lags if self.num_past else 0)

    @property
    def span(self) -> int:
        """Rows a window covers."""
        return self.reach + self.horizon

    @property
    def features(self) -> Tensor:
        """Columns of the inputs: own lags newest first, then each covariate's lags newest first."""
        own = torch.arange(self.lags - 1, -1, -1)
        base = self.lags + self.horizon
        newest_first = torch.arange(self.covariate_lags - 1, -1, -1)
        return torch.cat([own, *(base + j * self.covariate_lags + newest_first for j in range(self.num_past))])

    @property
    def targets(self) -> Tensor:
        """Columns of the steps to be predicted."""
        return torch.arange(self.lags, self.lags + self.horizon)

    def channels(self, values: Tensor, mask: Tensor, past: Tensor | None) -> list[Channel]:
        """Return the columns as channels of one variate's values [N] and the past covariates [N, P]."""
        own = Channel(values, self.lags + self.horizon, self.reach - self.lags, mask)
        if past is None or not self.num_past:
            return [own]
        start = self.reach - self.covariate_lags
        return [own, *(Channel(past[:, j], self.covariate_lags, start) for j in range(self.num_past))]
