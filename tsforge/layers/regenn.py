"""Graph soft evolution: a co-occurrence graph of variates becomes a matrix that mixes them.

Spadon, Hong, Brandoli, Matwin, Rodrigues-Jr, Sun (2022), Pay Attention to Evolution: Time Series Forecasting with Deep
Graph-Evolution Learning, IEEE TPAMI 44(9), arXiv 2008.12833.

Deviations. The graph is counted once, by one matrix product, from the training rows in data units. The mass of a
variate is measured from its least training value and divided by the largest mass, and the graph by its largest entry,
so that weights and biases of the layer live on one scale and a graph does not depend on units; for counts that were 0
once it is the paper's graph up to a factor for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tsforge.core.errors import ModelError

Activation = Literal["none", "relu", "tanh", "sigmoid", "selu"]
Start = Literal["identity", "xavier"]
_LEAST_NORM = 1e-12
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "selu": torch.selu,
}


def co_occurrence(mass: Tensor, present: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the co-occurrence graph A [V, V] of rows: the mass of variate b while variate c is present.

        A[b, c] = sum_n w[n] mass[n, b] present[n, c];    A[b, b] <- max(0, 2 A[b, b] - sum_c A[b, c])

    Args:
        mass: [N, V], what each variate weighs in a row; 0 where it is not observed.
        present: [N, V] bool.
        weight: [N], how often a row counts; None = once.
    """
    weighted = mass if weight is None else mass * weight.unsqueeze(1)
    graph = weighted.T @ present.to(mass.dtype)
    alone = (2 * graph.diagonal() - graph.sum(1)).clamp(min=0)
    return graph - torch.diag(graph.diagonal()) + torch.diag(alone)


def window_counts(indptr: Tensor, length: int, horizon: int) -> Tensor:
    """Return [N]: in how many training windows' contexts each row of the series stands.

    Windows are ``length + horizon`` consecutive rows of one series, one a row (Sec. "overlap" of the released code: an
    inner row counts up to ``length`` times).
    """
    parts = []
    for size in torch.diff(indptr).tolist():
        starts = size - length - horizon + 1
        row = torch.arange(size)
        first, last = (row - length + 1).clamp(min=0), torch.minimum(row, torch.tensor(starts - 1))
        parts.append((last - first + 1).clamp(min=0))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def cosine(rows: Tensor) -> Tensor:
    """Return the cosine similarity [V, V] of the rows of a matrix [V, V]; 0 for a row of zeros."""
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)
    return unit @ unit.T


class GraphEvolution(nn.Module):
    """Mixes variates by evolution weights E that a fixed graph G and learned matrices give.

        A' = G W_A + b_A,    C = cos(rows of A'),    E = C * W_C + B_C,    o[t, a] = sum_b E[a, b] x[t, b]

    and, where times are mixed, o[d, a] = sum_t W_T[t, d] o[t, a] + b_T[d]. Dropout comes before the activation, as
    alpha dropout for ``selu``.

    Args:
        variates: V.
        steps: times that are mixed linearly among themselves, None = they are not.
        activation, dropout: of the mixed variates.
        bias: False fixes b_A, B_C and b_T at 0.
        start: ``identity`` begins with W_C and W_T as unit matrices, so E = I and every variate and step passes as it
            is (a cosine of a row with itself is 1); ``xavier`` with random numbers.
    """

    def __init__(
        self,
        variates: int,
        *,
        steps: int | None,
        activation: Activation = "none",
        dropout: float = 0.0,
        bias: bool,
        start: Start = "xavier",
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.dropout = nn.AlphaDropout(dropout) if activation == "selu" else nn.Dropout(dropout)
        self.W_A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(variates, variates)))
        self.W_C = _square(variates, start)
        self.b_A = nn.Parameter(torch.zeros(variates, 1)) if bias else None
        self.B_C = nn.Parameter(torch.zeros(variates, variates)) if bias else None
        self.W_T = None if steps is None else _square(steps, start)
        self.b_T = nn.Parameter(torch.zeros(steps, 1)) if bias and steps is not None else None

    def evolve(self, graph: Tensor) -> tuple[Tensor, Tensor]:
        """Return the evolved graph A' and the evolution weights E, both [V, V], of a graph [V, V]; never in bf16."""
        with torch.autocast(graph.device.type, enabled=False):
            evolved = graph.to(self.W_A.dtype) @ self.W_A
            if self.b_A is not None:
                evolved = evolved + self.b_A
            weights = cosine(evolved) * self.W_C
            return evolved, weights if self.B_C is None else weights + self.B_C

    def forward(self, x: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed variates [B, T, V] of x [B, T, V], and the evolved graph [V, V] without its gradient.

        Raises:
            ModelError: the graph has another number of variates.
        """
        if graph.shape != self.W_A.shape:
            raise ModelError(f"the graph is {tuple(graph.shape)}, the layer mixes {len(self.W_A)} variates")
        evolved, weights = self.evolve(graph)
        mixed = self.activation(self.dropout(x @ weights.T))
        if self.W_T is not None:
            mixed = torch.einsum("bta,td->bda", mixed, self.W_T)
            if self.b_T is not None:
                mixed = mixed + self.b_T
        return mixed, evolved.detach()


def _square(size: int, start: Start) -> nn.Parameter:
    weights = torch.eye(size) if start == "identity" else nn.init.xavier_uniform_(torch.empty(size, size))
    return nn.Parameter(weights)
