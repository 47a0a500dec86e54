"""The linear region that a fitted model is in at each row, for models that go through such regions."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.predict import padded_panel
from tsforge.forecasting.window_forecasts import default_batch_size, evaluating, to_device


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
    network = artifact.network
    if not isinstance(network.model, Symbolic):
        raise ModelError(
            f"model '{artifact.model_name}' has no linear regions; score.kind=regions needs an artifact of model=plrnn "
            "model.kind=almost_linear"
        )
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    panel = padded_panel(artifact, frame, stop + spec.horizon)
    found = np.full((panel.num_series, stop - start), -1, dtype=np.int64)
    names = {name: found[place] for place, name in enumerate(panel.series_ids)}
    try:
        windows = WindowDataset(panel, spec, start + 1, stop + spec.horizon)
    except DataError:  # nobody has enough history
        return names
    device = network.param_offset.device
    with evaluating(network), torch.no_grad():
        for batch in windows.batches(default_batch_size(network)):
            scaled = network.scaler.scale(to_device(batch, device))
            told = network.model.symbols(scaled._replace(target=None, target_mask=None))[:, -1].cpu().numpy()
            told = np.where(batch.context_mask[:, -1].any(-1).cpu().numpy(), told, -1)
            assert batch.series_index is not None
            assert batch.cutoff_index is not None
            found[batch.series_index.cpu().numpy(), batch.cutoff_index.cpu().numpy() - 1 - start] = told
    return names
