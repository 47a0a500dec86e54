"""What a fitted ReGENN shows: its graphs before and after evolution, the weights that mix variates, its linear path."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsforge.layers.regenn import cosine

if TYPE_CHECKING:
    from tsforge.models.regenn import ReGENN

MOST_VARIATES = 64  # of matrices that are stored
MOST_WEIGHTS = 20_000  # of a kernel that is stored


@torch.no_grad()
def evolution_matrices(model: ReGENN) -> dict[tuple[str, str], Tensor]:
    """Return (layer, matrix) -> [V, V] for the source and the target layer; empty without graph layers.

    ``co_occurrence`` is the graph G that a layer starts from and ``similarity_before`` the cosine of its rows;
    ``evolved`` is A' = G W_A + b_A and ``similarity_after`` the cosine of its rows; ``change`` the difference of the
    two; ``evolution_weights`` is E, row = variate that receives, column = variate that gives.
    """
    if model.source_layer is None or model.target_layer is None:
        return {}
    found: dict[tuple[str, str], Tensor] = {}
    graph = model.graph
    for name, layer in (("source", model.source_layer), ("target", model.target_layer)):
        evolved, weights = layer.evolve(graph)
        before, after = cosine(graph.to(evolved.dtype)), cosine(evolved)
        found |= {
            (name, "co_occurrence"): graph,
            (name, "similarity_before"): before,
            (name, "evolved"): evolved,
            (name, "similarity_after"): after,
            (name, "change"): after - before,
            (name, "evolution_weights"): weights,
        }
        graph = evolved
    return found


def evolution_records(model: ReGENN) -> list[dict[str, Any]]:
    """Return every cell of the matrices as ``layer, matrix, row, column, value``; none beyond 64 variates."""
    variates = model.spec.num_variates
    if variates > MOST_VARIATES:
        return []
    return [
        {"layer": layer, "matrix": matrix, "row": row, "column": column, "value": values[row][column]}
        for (layer, matrix), found in evolution_matrices(model).items()
        for values in [found.tolist()]
        for row, column in product(range(variates), repeat=2)
    ]


def kernel_records(model: ReGENN) -> list[dict[str, Any]]:
    """Return the weights of the autoregressive path as ``lag`` (0 = last row of the context), ``step``, ``weight``.

    The last row is left out of anchored windows: it is 0 there, and its weight has no effect. None beyond 20,000
    weights, more than anyone looks at; they are in the weights of the artifact.
    """
    if model.ar_weight is None or model.ar_weight.numel() > MOST_WEIGHTS:
        return []
    length = model.spec.context_length
    used = model.ar_weight[: length - 1] if model.anchors else model.ar_weight
    return [
        {"lag": length - 1 - row, "step": step + 1, "weight": weight}
        for row, weights in enumerate(used.tolist())
        for step, weight in enumerate(weights)
    ]
