"""The linear region that a fitted model is in at each row, for models that go through such regions."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsforge.anomaly.contexts import context_outputs
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError
from tsforge.data.frame import SeriesFrame


@runtime_checkable
class Symbolic(Protocol):
    """A model that tells the region of its state at each step of a context."""

    def symbols(self, batch: Batch) -> Tensor:
        """Return regions [B, L] for a scaled batch, negative where unknown."""
        ...


def visited_regions(artifact: Artifact, frame: SeriesFrame, start: int, stop: int) -> dict[str, NDArray[np.int64]]:
    """Return the region [stop - start] of each absolute row by series; -1 where nothing was observed in the row, or no
    whole context ends with it.

    Each row has the context that ends with it, so that nothing after the row takes part.

    Raises:
        ModelError: the model has no regions that can be told apart.
    """
    model = artifact.network.model
    if not isinstance(model, Symbolic):
        raise ModelError(
            f"model '{artifact.model_name}' has no linear regions; score.kind=regions needs an artifact of model=plrnn "
            "model.kind=almost_linear"
        )
    names, batches = context_outputs(artifact, frame, (start, stop), lambda _, scaled: (model.symbols(scaled)[:, -1],))
    found = np.full((len(names), stop - start), -1, dtype=np.int64)
    for part in batches:
        found[part.series, part.row - start] = np.where(part.is_seen, part.outputs[0].cpu().numpy(), -1)
    return {name: found[place] for place, name in enumerate(names)}
