"""The inputs of one forecast, what they are compared with, and the straight path between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.forecasting.window_forecasts import FloatArray, as_array
from tsforge.network import ForecastNetwork

KINDS = ("context", "past", "known", "static")
SHRUNK = 0.01  # share of its moves that a baseline keeps: a constant window has no unit for a model that normalises
Baseline = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One item of windows (R rows: 1, or all series of a model that couples them) and its baseline.

    Attributes:
        batch: the windows, no target.
        values, base, seen: by kind (``context past known static``, those the network reads): what was observed, what it
            is compared with, and which cells were observed; [R, L, V], [R, L, P], [R, L + H, F], [R, S].
    """

    batch: Batch
    values: dict[str, Tensor]
    base: dict[str, Tensor]
    seen: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """Windows that are forecast together."""
        return int(self.batch.context.shape[0])

    @property
    def delta(self) -> dict[str, Tensor]:
        """Observed minus baseline, 0 where nothing was observed."""
        return {kind: torch.where(self.seen[kind], self.values[kind] - self.base[kind], 0.0) for kind in self.values}

    def hidden(self, kind: str, row: int, place: int, span: slice) -> Tensor:
        """Return the values of a kind with column ``place`` of a window at its baseline over ``span``."""
        changed = self.values[kind].clone()
        where = (row, place) if kind == "static" else (row, span, place)
        changed[where] = torch.where(self.seen[kind][where], self.base[kind][where], changed[where])
        return changed

    def batch_of(self, variants: dict[str, Tensor]) -> Batch:
        """Return the batch of k variants [k * R, ...] of the inputs; kinds that are not given stay as they are."""
        count = next(iter(variants.values())).shape[0] // self.rows
        parts = {
            name: part.repeat(count, *[1] * (part.ndim - 1))
            for name, part in self.batch._asdict().items()
            if part is not None
        }
        return Batch(**{**parts, **variants})

    def at(self, alphas: Tensor) -> dict[str, Tensor]:
        """Return leaves [k * R, ...] on the path from the baseline (0) to what was observed (1)."""
        delta, leaves = self.delta, {}
        for kind, value in self.values.items():
            steps = alphas.to(value.dtype).reshape(-1, *[1] * value.ndim)
            point = torch.where(self.seen[kind], self.base[kind] + steps * delta[kind], value)
            leaves[kind] = point.flatten(0, 1).requires_grad_()
        return leaves


def read_inputs(network: ForecastNetwork, batch: Batch, baseline: Baseline) -> Inputs:
    """Return the inputs of a batch of one item.

    Args:
        network: says which kinds of covariates it reads, and their training means, the baseline.
        batch: windows without a target; kinds that the network does not read are left out of it.
        baseline: level of the history of each variate: ``mean`` of its observed rows in the window, or the ``last``
            one; ``SHRUNK`` of the moves about it stay.
    """
    spec = network.spec
    batch = batch._replace(
        target=None,
        target_mask=None,
        past=batch.past if spec.num_past else None,
        known=batch.known if spec.num_known else None,
        static=batch.static if spec.num_static else None,
    )
    values = {kind: getattr(batch, kind) for kind in KINDS if getattr(batch, kind) is not None}
    seen = {kind: batch.context_mask if kind == "context" else ~torch.isnan(value) for kind, value in values.items()}
    levels = {
        kind: _level(batch, baseline) if kind == "context" else getattr(network.scaler, f"{kind}_loc").to(value)
        for kind, value in values.items()
    }
    base = {kind: level + SHRUNK * (values[kind] - level) for kind, level in levels.items()}
    return Inputs(batch=batch, values=values, base=base, seen=seen)


def _level(batch: Batch, baseline: Baseline) -> Tensor:
    """Return the level [R, 1, V] of every window; 0, never read, where nothing was observed."""
    context, mask = batch.context, batch.context_mask
    if baseline == "mean":
        total = torch.where(mask, context, 0.0).double().sum(1, keepdim=True)
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(context.dtype)
    steps = torch.arange(context.shape[1], device=context.device).view(1, -1, 1)
    last = torch.where(mask, steps, 0).amax(dim=1, keepdim=True)
    return torch.where(mask.any(1, keepdim=True), context.gather(1, last), 0.0)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Which numbers of a forecast are explained: a window, some steps (from 0), a variate."""

    row: int
    steps: NDArray[np.int64]
    variate: int

    def of(self, network: ForecastNetwork, batch: Batch, rows: int) -> Tensor:
        """Return these numbers [k, steps] for k variants of the inputs."""
        forecast = network.location(batch)
        cells = forecast.reshape(-1, rows, *forecast.shape[1:])[:, self.row]
        return cells[:, torch.as_tensor(self.steps, device=cells.device), self.variate]


def path_integral(
    network: ForecastNetwork, inputs: Inputs, output: Output, nodes: FloatArray, weights: FloatArray, *, chunk: int
) -> dict[str, FloatArray]:
    """Return by kind [steps, R, ...]: the weighted sum over nodes of d forecast / d input, times observed - baseline.

    Args:
        network: in evaluation mode.
        inputs, output: what is explained by what.
        nodes, weights: of a quadrature rule over [0, 1].
        chunk: nodes a forward pass; a model that couples rows gets one at a time.
    """
    total = {
        kind: torch.zeros((len(output.steps), *part.shape), dtype=torch.float64, device=part.device)
        for kind, part in inputs.values.items()
    }
    step = 1 if network.capabilities.rows_coupled else chunk
    with torch.enable_grad():
        for first in range(0, len(nodes), step):
            part = slice(first, first + step)
            leaves = inputs.at(torch.as_tensor(nodes[part], device=inputs.batch.context.device))
            cells = output.of(network, inputs.batch_of(leaves), inputs.rows)
            share = torch.as_tensor(weights[part], dtype=cells.dtype, device=cells.device)
            for place in range(len(output.steps)):
                slopes = torch.autograd.grad(
                    cells[:, place] @ share, list(leaves.values()), retain_graph=True, allow_unused=True
                )
                for kind, slope in zip(leaves, slopes, strict=True):
                    if slope is not None:
                        shape = (-1, *inputs.values[kind].shape)
                        total[kind][place] += slope.reshape(shape).double().sum(0)
    return {kind: as_array(part * inputs.delta[kind].double()) for kind, part in total.items()}
