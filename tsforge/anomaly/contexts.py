"""What a fitted model makes of the context that ends with each row: for scores that judge no plain forecast.

Passes through the network hold a constant number of windows (``forecasting.fixed_blocks``), tried out on the function
at hand, so that a row's outputs do not depend on which rows share its pass: stored rows and a stream give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import NoWindowError, WindowDataset
from tsforge.forecasting.fixed_blocks import block_size, padded
from tsforge.forecasting.predict import padded_panel
from tsforge.forecasting.window_forecasts import evaluating, to_device
from tsforge.network import ForecastNetwork

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ContextFunction:
    """What is computed of contexts.

    Attributes:
        name: tells functions of one network apart.
        compute: batch in data units, the same scaled, neither with a target -> tensors, windows along the first axis.
        needs_row: rows in which nothing was observed have no outputs.
    """

    name: str
    compute: Callable[[Batch, Batch], tuple[Tensor, ...]]
    needs_row: bool = False


class ContextOutputs(NamedTuple):
    """Outputs of some contexts: series names' numbers [B], the absolute row [B] that each context ends with, and what
    was computed, float64 [B, ...]."""

    series: NDArray[np.int64]
    row: NDArray[np.int64]
    outputs: tuple[FloatArray, ...]


def context_outputs(
    artifact: Artifact, frame: SeriesFrame, rows: tuple[int, int], function: ContextFunction, *, stride: int = 1
) -> tuple[tuple[str, ...], Iterator[ContextOutputs]]:
    """Return the names of the series and, block by block, the outputs of the context ending with each row.

    Args:
        artifact: the fitted network.
        frame: must also hold the rows before that contexts look back to; rows after a context are never read.
        rows: absolute rows [start, stop).
        function: what is computed.
        stride: rows between two contexts.

    Raises:
        ModelError: an ensemble, or a model whose series influence each other.
    """
    network = artifact.network
    check_apart(artifact)
    spec = replace(artifact.window, stride=stride, min_observed=0.0)
    start, stop = rows
    panel = padded_panel(artifact, frame, stop + spec.horizon)

    def blocks() -> Iterator[ContextOutputs]:
        try:
            windows = WindowDataset(panel, spec, start + 1, stop + spec.horizon)
        except NoWindowError:  # nobody has enough history
            return
        for batch in windows.batches(context_block(network, function)):
            if batch.series_index is None or batch.cutoff_index is None:
                raise DataError("windows lost their index")
            found = block_context_outputs(network, batch, function)
            yield ContextOutputs(batch.series_index.cpu().numpy(), batch.cutoff_index.cpu().numpy() - 1, found)

    return panel.series_ids, blocks()


def check_apart(artifact: Artifact) -> None:
    """Check that the states of the model are those of one series.

    Raises:
        ModelError: its series influence each other.
    """
    if artifact.network.capabilities.rows_coupled:
        raise ModelError(
            f"model '{artifact.model_name}' reads several series at once; its states are not those of one series"
        )


def context_block(network: ForecastNetwork, function: ContextFunction) -> int:
    """Return how many windows a pass of the function holds."""
    return block_size(network, of=function.name, compute=lambda batch: _computed(network, batch, function))


def block_context_outputs(network: ForecastNetwork, batch: Batch, function: ContextFunction) -> tuple[FloatArray, ...]:
    """Return the outputs [B, ...] of at most one block of windows, NaN where a row that must be observed was not.

    The same window gives the same bits in any company.

    Args:
        network: on any device.
        batch: B windows in data units.
        function: what is computed.
    """
    count = len(batch.context)
    seen = batch.context_mask[:, -1].any(dim=-1).cpu().numpy()
    with evaluating(network), torch.no_grad():
        found = _computed(network, padded(batch, context_block(network, function)), function)
    outputs = tuple(part[:count].double().cpu().numpy() for part in found)
    if function.needs_row:
        for part in outputs:
            part[~seen] = np.nan
    return outputs


def _computed(network: ForecastNetwork, batch: Batch, function: ContextFunction) -> tuple[Tensor, ...]:
    blind = to_device(batch, network.param_offset.device)._replace(target=None, target_mask=None)
    return function.compute(blind, network.scaler.scale(blind))


def context_traces(
    artifact: Artifact, frame: SeriesFrame, rows: tuple[int, int], function: ContextFunction, *, stride: int = 1
) -> dict[str, FloatArray]:
    """Return by series the outputs at absolute rows [start, stop): [T, ...], several ones side by side as [T, C].

    NaN where no whole context ends with a row, where ``stride`` passes it over, and where the function needs a row that
    was not observed. [T, 1] where no series has a whole context.

    Args:
        artifact, frame, rows, function, stride: as in ``context_outputs``.

    Raises:
        ModelError: a model whose series influence each other, or one that lacks what the function asks for.
    """
    names, blocks = context_outputs(artifact, frame, rows, function, stride=stride)
    found: FloatArray | None = None
    for part in blocks:
        traces = joined(part.outputs)
        if found is None:
            found = np.full((len(names), rows[1] - rows[0], *traces.shape[1:]), np.nan)
        found[part.series, part.row - rows[0]] = traces
    if found is None:
        found = np.full((len(names), rows[1] - rows[0], 1), np.nan)
    return {name: found[place] for place, name in enumerate(names)}


def joined(outputs: tuple[FloatArray, ...]) -> FloatArray:
    """Return one output as it is, several [B, ...] side by side as [B, C]."""
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([part.reshape(len(part), -1) for part in outputs], axis=1)
