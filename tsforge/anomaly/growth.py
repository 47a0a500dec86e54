"""The error of a free run against how far it was expected to be off, for models that know how errors grow.

A forecast n rows ahead of a chaotic system is far off as a rule; by how much depends on where the run started. The
deviation of a row is its error divided by what the product of Jacobians along the run makes of a one-step error.

Source: spec of PLRNN scores (error growth), see :mod:`tsforge.models._plrnn_growth`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tsforge.anomaly.contexts import ContextFunction, FloatArray, context_outputs
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError
from tsforge.data.frame import SeriesFrame


@runtime_checkable
class Growing(Protocol):
    """A model that tells how far its free run is expected to be off."""

    def growth(self, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
        """Return the free run [B, steps, V] after the contexts of a scaled batch, and the deviation of its error."""
        ...


def growth_function(artifact: Artifact, steps: int) -> ContextFunction:
    """Return what tells the free run [B, steps, V] after a context and how far it is expected to be off, in data units.

    Raises:
        ModelError: the model does not tell.
    """
    network = artifact.network
    model = network.model
    if not isinstance(model, Growing):
        raise ModelError(
            f"model '{artifact.model_name}' does not tell how errors grow; score.kind=growth needs an artifact of plrnn"
        )

    def compute(batch: Batch, scaled: Batch) -> tuple[Tensor, ...]:
        told, spread = model.growth(scaled, steps)
        loc, scale = network.scaler.stats(batch)
        blind = ~batch.context_mask.flatten(1).any(dim=1)[:, None, None]  # as for forecasts: no expectation
        return (told * scale + loc).masked_fill(blind, torch.nan), spread * scale

    return ContextFunction(f"growth of {steps} steps", compute)


def free_runs(
    artifact: Artifact, frame: SeriesFrame, rows: tuple[int, int], steps: tuple[int, ...]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Return by series what free runs told of absolute rows [start, stop), and how far they were expected to be off.

    Entry ``[t, k]`` of both, [T, K, V] in data units, is of the run that began ``steps[k]`` rows before row
    ``start + t``; NaN where no whole context reaches.

    Raises:
        ModelError: the model does not tell.
    """
    start, stop = rows
    function = growth_function(artifact, max(steps))
    names, blocks = context_outputs(artifact, frame, (start - max(steps), stop - min(steps)), function)
    shape = (len(names), stop - start, len(steps), len(artifact.schema.targets))
    told, spread = np.full(shape, np.nan), np.full(shape, np.nan)
    for part in blocks:
        for place, step in enumerate(steps):
            row = part.row + step - start
            inside = (row >= 0) & (row < stop - start)
            for found, output in zip((told, spread), part.outputs, strict=True):
                found[part.series[inside], row[inside], place] = output[inside, step - 1]
    by_name = [{name: found[number] for number, name in enumerate(names)} for found in (told, spread)]
    return by_name[0], by_name[1]
