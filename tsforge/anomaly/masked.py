"""The newest row as the network tells it with that row's cells hidden, one part of the variates after the other.

Each cell (row, variate) is told from its own past and from the other variates, the newest row's included: a variate
that stops following its neighbours is at odds with them at once, although a forecast from its own past may still fit.

Source: masked reconstruction of a window as anomaly score (Behrouz et al. 2024, Chimera, arXiv 2406.04320).
Deviation: cells are hidden from the network that tells them, since a cell that is its own input says nothing.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from tsforge.anomaly.contexts import ContextFunction
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError


@runtime_checkable
class Masked(Protocol):
    """A model that tells cells of a context from the others."""

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the context [B, L, V] of a scaled batch, no cell of it told from itself."""
        ...


def masked_function(artifact: Artifact) -> ContextFunction:
    """Return what tells the last row of a context [B, V] in data units, each cell hidden from the network.

    Raises:
        ModelError: the model tells no hidden cells, or was not fitted to.
    """
    network, model = artifact.network, artifact.network.model
    if not isinstance(model, Masked) or not getattr(model.config, "reconstruct", False):
        raise ModelError(
            f"model '{artifact.model_name}' was not fitted to tell hidden cells; score.kind=masked needs an artifact "
            "of model=chimera model.reconstruct=true"
        )

    def compute(batch: Batch, scaled: Batch) -> tuple[Tensor, ...]:
        loc, scale = network.scaler.stats(batch)
        return (model.reconstruct(scaled)[:, -1] * scale[:, 0] + loc[:, 0],)

    return ContextFunction("masked", compute)
