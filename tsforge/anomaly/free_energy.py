"""What it costs a generative model to explain a row, by error regression over the window that ends with it.

    score[t] = -log N(x[t]; x^[t], s^2) / V  +  sum_l w_l / Z_l KL(q[t] || p[t])

A high first part (*reconstruction*): the model cannot make such a row. A high second one (*divergence*): it can, but
only by a state that it took to be unlikely one row before; a surprise that it is able to follow.

Every variate has its own cost plus the divergence, which all share: their mean is the score above, and what tells one
variate from another is its reconstruction.

Source: free energy of the PV-RNN (Ahmadi, Tani 2019, arXiv 1811.01339), see :mod:`tsforge.layers.pvrnn`; the newest
row's part of it as a score is this project's. Costs are in nats and scaled units, so that only differences mean
something; the pipeline takes them about their median.

Legend: N rows, V variates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tsforge.anomaly.contexts import ContextFunction, FloatArray
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError

Part = Literal["both", "reconstruction", "divergence"]


@runtime_checkable
class Explaining(Protocol):
    """A model that explains the rows of a context instead of reading them."""

    def free_energy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return of the last row of each context of a scaled batch: reconstruction cost [B, V], weighted divergence
        [B], and the row as explained [B, V]."""
        ...


@dataclass(frozen=True)
class RowEnergies:
    """Costs of rows: reconstruction [N, V], divergence [N], expected [N, V] in data units.

    NaN where no whole context ends with a row; reconstruction also where the model saw no value.
    """

    reconstruction: FloatArray
    divergence: FloatArray
    expected: FloatArray

    @classmethod
    def of(cls, traces: FloatArray) -> RowEnergies:
        """Return the costs that ``energy_function`` told, side by side [N, 2 V + 1]; [N, 1] where it told none."""
        if traces.shape[1] == 1:
            return cls(traces, traces[:, 0], traces)
        width = traces.shape[1] // 2
        return cls(traces[:, :width], traces[:, width], traces[:, width + 1 :])

    def costs(self, values: FloatArray, part: Part, *, impossible: float) -> FloatArray:
        """Return the cost [N, V] of each cell of ``values`` [N, V]; NaN where not observed.

        Args:
            values: what is judged; NaN where not observed.
            part: of the cost.
            impossible: reconstruction cost of a value that the model was not shown (outside its declared range).
        """
        shared = np.broadcast_to(self.divergence[:, None], values.shape)
        own = np.where(np.isnan(self.reconstruction), impossible, self.reconstruction)
        parts = {"both": own + shared, "reconstruction": own, "divergence": shared}
        return np.where(np.isnan(values) | np.isnan(shared), np.nan, parts[part])


def energy_function(artifact: Artifact) -> ContextFunction:
    """Return what tells what the last row of a context costs the model: reconstruction [B, V], divergence [B], and the
    row as explained [B, V] in data units; by rows up to it alone.

    Raises:
        ModelError: the model has no free energy.
    """
    network = artifact.network
    model = network.model
    if not isinstance(model, Explaining):
        raise ModelError(
            f"model '{artifact.model_name}' has no free energy, it explains no rows; score.kind=free_energy needs an "
            "artifact of pvrnn"
        )

    def compute(batch: Batch, scaled: Batch) -> tuple[Tensor, ...]:
        reconstruction, divergence, expected = model.free_energy(scaled)
        loc, scale = network.scaler.stats(batch)
        last = reconstruction.masked_fill(~batch.context_mask[:, -1], np.nan)
        return last, divergence, expected * scale[:, 0] + loc[:, 0]

    return ContextFunction("free energy", compute)
