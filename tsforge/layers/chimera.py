"""The 2-D state space layer of Chimera: heads x variate directions of selective or input-independent systems.

Behrouz, Santacatterina, Zabih (2024), Chimera: Effectively Modeling Multivariate Time Series with 2-Dimensional State
Space Models, NeurIPS, arXiv 2406.04320. A head is a 2-D system over the grid of variates and steps
(:mod:`tsforge.ops.scan2d`); the trend head starts with small steps along time and real transitions, the seasonal head
with larger steps and complex ones. Both directions along variates run as groups of one scan and are averaged.

Transitions A1 = -exp(p1) (+ i w1), A4 = -exp(p4) (+ i w4), A2 = rho tanh(p2) |Re A1|, A3 = rho tanh(p3) |Re A4| with
rho = 0.95 keep |A2 A3| < |Re A1 Re A4|, under which the states stay bounded whatever the steps.

``coupling="pooled"`` replaces the variate before, v-1, by one row c that holds the mean over the observed variates:

    c[t] = mean_u u[u, t],   h2[v, t] = a3 h1[c, t] + a4 h2[c, t] + b2 B2[v, t] u[v, t]

with h1 as always: a grid of two rows for each variate, equivariant to permutations, of constant depth along variates.

Deviations: the full text of the paper could not be read and no official code is known. The recurrence, heads,
directions and input-dependent B, C, dt follow what its abstract and retellings say; rank and sharing of the selective
maps, initial ranges, the mean of directions, complex seasonal transitions, rho tanh and the pooled coupling are derived
or chosen here.

Legend: b batch, N variates, T steps, E channels, S states, G directions (groups of a scan).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tsforge.core.errors import ConfigError
from tsforge.layers.chimera_heads import ChimeraHead, ChimeraOptions, SelectiveHead, folded
from tsforge.layers.chimera_lti import CompanionHead, InvariantHead

LayerState: TypeAlias = dict[str, Tensor]


class LayerOutput(NamedTuple):
    """What a layer gives: ``parts`` and ``ahead`` (may be empty), head -> (b, N, T, E), ``direct`` D u, states."""

    parts: dict[str, Tensor]
    direct: Tensor
    ahead: dict[str, Tensor]
    state: LayerState

    @property
    def y(self) -> Tensor:
        """The output, the sum of the heads and the direct path."""
        y = self.direct
        for part in self.parts.values():
            y = y + part
        return y


class Chimera2DSSM(nn.Module):
    """Trend and seasonal heads over a grid of variates and steps, and a direct path D u.

    Args:
        features: E.
        options: see :class:`ChimeraOptions`.
        looks_ahead: also predict the next input of every cell (closed loop).

    Shapes:
        u (b, N, T, E) -> (b, N, T, E), in the dtype of the parameters; autocast is off inside, since half precision
        has no place in products of a whole grid.
    """

    def __init__(self, features: int, options: ChimeraOptions, *, looks_ahead: bool = False) -> None:
        super().__init__()
        if features < 1:
            raise ConfigError(f"a 2-D state space layer needs at least 1 feature, got {features}")
        if options.discretisation != "exact":
            warnings.warn(
                f"discretisation '{options.discretisation}' is for study: 'separate' grows with the number of paths "
                "through the grid, 'separate_avg' halves its memory of time at every step; 'exact' does neither",
                stacklevel=2,
            )
        self.options = options
        self.heads = nn.ModuleDict(
            {name: _head_class(options)(features, options, name, looks_ahead=looks_ahead) for name in options.names}
        )
        self.D_skip = nn.Parameter(torch.ones(features))

    def forward(
        self,
        u: Tensor,
        observed: Tensor | None = None,
        state: LayerState | None = None,
        *,
        with_state: bool = True,
    ) -> LayerOutput:
        """Return outputs and state; cells that are not ``observed`` (b, N, T) add no input and pass the state on.

        Time-invariant heads are faster without a state in and out (``with_state`` False).
        """
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D_skip.dtype)
            parts: dict[str, Tensor] = {}
            after: LayerState = {}
            ahead: dict[str, Tensor] = {}
            grid = folded(u, observed, self.options)
            for name, head in self.heads.items():
                if parts and self.options.head_mix == "residual":
                    grid = folded(u - next(iter(parts.values())), observed, self.options)
                found = head(grid, None if state is None else state[name], with_state=with_state)
                parts[name] = found.y
                if found.state is not None:
                    after[name] = found.state
                if found.ahead is not None:
                    ahead[name] = found.ahead
            return LayerOutput(parts, self.D_skip * u, ahead, after)

    def default_state(self, batch: int, variates: int) -> LayerState:
        """Return the zero state of every head."""
        return {name: head.default_state(batch, variates) for name, head in self.each()}

    def each(self) -> list[tuple[str, ChimeraHead]]:
        """Return the heads with their names."""
        return [(name, head) for name, head in self.heads.items() if isinstance(head, ChimeraHead)]


def _head_class(options: ChimeraOptions) -> type[ChimeraHead]:
    if options.selective:
        return SelectiveHead
    return InvariantHead if options.structure == "diagonal" else CompanionHead
