"""Forecasts beyond the trained horizon: the block of H steps is repeated on its own mean forecasts.

Only means are rolled. The spread of a rolled step would need the joint distribution of the steps before it, which no
likelihood here claims to know, so quantiles end at the trained horizon instead of being made up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError
from tsforge.network import ForecastNetwork


def check_rollout(network: ForecastNetwork, horizon: int) -> None:
    """Check that a network can be rolled to ``horizon`` steps.

    Raises:
        ModelError: it reads past covariates, whose future nobody forecasts.
    """
    spec = network.spec
    if horizon > spec.horizon and spec.num_past:
        raise ModelError(
            f"the model was trained for {spec.horizon} steps and reads {spec.num_past} past covariate(s), which are "
            f"not known beyond the cutoff, so it cannot be rolled to {horizon} steps; fit with horizon={horizon}"
        )


@torch.no_grad()
def roll(network: ForecastNetwork, batch: Batch, horizon: int) -> Tensor:
    """Return mean forecasts [B, horizon, V] in data units, any number of steps.

    Args:
        network: in evaluation mode.
        batch: windows in data units; ``known`` must cover L + horizon rows.
        horizon: steps wanted.

    Raises:
        ModelError: past covariates, or known covariates too short.
    """
    check_rollout(network, horizon)
    spec = network.spec
    length, block = spec.context_length, spec.horizon
    blocks = -(-horizon // block)
    known = batch.known
    if known is not None and known.shape[1] < length + horizon:
        raise ModelError(
            f"known covariates cover {known.shape[1] - length} steps after the cutoff; rolling needs {horizon}"
        )
    if known is not None and known.shape[1] < length + blocks * block:  # the last block may reach past the horizon
        missing = length + blocks * block - known.shape[1]
        known = torch.cat([known, known.new_full((known.shape[0], missing, known.shape[2]), torch.nan)], dim=1)
    values, mask, means = batch.context, batch.context_mask, []
    for number in range(blocks):
        shift = number * block
        current = batch._replace(
            context=values[:, shift:],
            context_mask=mask[:, shift:],
            target=None,
            target_mask=None,
            known=None if known is None else known[:, shift : shift + length + block],
            cutoff_index=None if batch.cutoff_index is None else batch.cutoff_index + shift,
        )
        mean = network.predict(current).mean
        means.append(mean)
        values = torch.cat([values, mean.to(values.dtype)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mean, dtype=torch.bool)], dim=1)
    return torch.cat(means, dim=1)[:, :horizon]
