"""The linear region that a fitted model is in at each row, for models that go through such regions."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from tsforge.anomaly.contexts import ContextFunction
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError


@runtime_checkable
class Symbolic(Protocol):
    """A model that tells the region of its state at each step of a context."""

    def symbols(self, batch: Batch) -> Tensor:
        """Return regions [B, L] for a scaled batch, negative where unknown."""
        ...


def region_function(artifact: Artifact) -> ContextFunction:
    """Return what tells the region [B, 1] at the last row of a context.

    Raises:
        ModelError: the model has no regions that can be told apart.
    """
    model = artifact.network.model
    if not isinstance(model, Symbolic):
        raise ModelError(
            f"model '{artifact.model_name}' has no linear regions; score.kind=regions needs an artifact of model=plrnn "
            "model.kind=almost_linear"
        )
    return ContextFunction("regions", lambda _, scaled: (model.symbols(scaled)[:, -1:],), needs_row=True)
