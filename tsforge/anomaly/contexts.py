"""What a fitted model makes of the context that ends with each row: for scores that judge no plain forecast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

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

FloatArray = NDArray[np.float64]


class ContextOutputs(NamedTuple):
    """Outputs of one batch of contexts: series names' numbers [B], the absolute row [B] that each context ends with,
    whether anything was observed in that row [B], and what was computed."""

    series: NDArray[np.int64]
    row: NDArray[np.int64]
    is_seen: NDArray[np.bool_]
    outputs: tuple[Tensor, ...]


def context_outputs(
    artifact: Artifact,
    frame: SeriesFrame,
    rows: tuple[int, int],
    compute: Callable[[Batch, Batch], tuple[Tensor, ...]],
    *,
    stride: int = 1,
) -> tuple[tuple[str, ...], Iterator[ContextOutputs]]:
    """Return the names of the series and, batch by batch, what ``compute`` makes of the context ending with each row.

    Args:
        artifact: the fitted network.
        frame: must also hold the rows before that contexts look back to; rows after a context are never read.
        rows: absolute rows [start, stop).
        compute: batch in data units, the same scaled, neither with a target -> tensors, windows along the first axis.
        stride: rows between two contexts.

    Raises:
        ModelError: an ensemble, or a model whose series influence each other.
    """
    network = artifact.network
    if network.capabilities.rows_coupled:
        raise ModelError(
            f"model '{artifact.model_name}' reads several series at once; its states are not those of one series"
        )
    spec = replace(artifact.window, stride=stride, min_observed=0.0)
    start, stop = rows
    panel = padded_panel(artifact, frame, stop + spec.horizon)

    def batches() -> Iterator[ContextOutputs]:
        try:
            windows = WindowDataset(panel, spec, start + 1, stop + spec.horizon)
        except DataError:  # nobody has enough history
            return
        device = network.param_offset.device
        with evaluating(network), torch.no_grad():
            for batch in windows.batches(default_batch_size(network)):
                blind = to_device(batch, device)._replace(target=None, target_mask=None)
                found = compute(blind, network.scaler.scale(blind))
                if batch.series_index is None or batch.cutoff_index is None:
                    raise DataError("windows lost their index")
                yield ContextOutputs(
                    batch.series_index.cpu().numpy(),
                    batch.cutoff_index.cpu().numpy() - 1,
                    batch.context_mask[:, -1].any(-1).cpu().numpy(),
                    found,
                )

    return panel.series_ids, batches()
