"""Time-invariant heads of the 2-D state space layer of Chimera: a whole pass is one 2-D convolution.

Diagonal heads have constant B, C and steps; companion heads are discrete from the start, A1 and A2 companion matrices
with a column of 1-norm r (:func:`tsforge.ops.scan2d_lti.companion`), A3 and A4 diagonal. With q = r^(1/S), A2 scaled by
s = rho tanh(p2) (1 - q) / q, A4 = exp(-exp(p4)) and |A3| up to rho (1 - max A4) the joint system is stable.

Deviations: in the sources a companion A1 has a column of any norm or of norm 1; a norm below 1 (0.99 in the trend head,
0.9 in the seasonal one) is what leaves room for a coupling that stays stable.

Legend: b batch, N variates, T steps, E channels, S states, G directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tsforge.layers.chimera_heads import (
    LOG_DECAY,
    RHO,
    ChimeraHead,
    ChimeraOptions,
    DiagonalHead,
    HeadName,
    Scales,
    log_uniform,
)
from tsforge.ops.scan2d import Pair
from tsforge.ops.scan2d_lti import LTISystem2D, companion, lti_kernel2d, lti_scan2d, lti_step2d, lti_system2d

_COLUMN_NORM = {"trend": 0.99, "seasonal": 0.9}


def _initial_maps(head: ChimeraHead) -> Tensor:
    """Return random maps (G, count, E, S (2)) whose products over the states have variance 1."""
    tail = (2,) if head.complex else ()
    options = head.options
    drawn = torch.randn(options.groups, head.count, head.features, options.states, *tail)
    return drawn / math.sqrt(math.sqrt(options.states))


def _convolved(head: ChimeraHead, systems: list[LTISystem2D], entering: Tensor) -> list[Tensor]:
    """Return the readouts (b', N', T, G E) by systems that share their states and differ in C."""
    x = entering.flatten(3)
    kernels = [lti_kernel2d(system, x.shape[1], x.shape[2]) for system in systems]
    return [lti_scan2d(x, kernel) for kernel in kernels]


class InvariantHead(DiagonalHead):
    """Diagonal systems with constant B, C and steps.

    Shapes:
        maps (G, count, E, S), with a last axis of 2 (real, imaginary) where transitions are complex.
    """

    def __init__(self, features: int, options: ChimeraOptions, name: HeadName, *, looks_ahead: bool = False) -> None:
        super().__init__(features, options, name, looks_ahead=looks_ahead)
        self.maps = nn.Parameter(_initial_maps(self))

    def _constants(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the steps (G E), one an axis, and the maps (G E, S)."""
        stored = torch.view_as_complex(self.maps) if self.complex else self.maps
        return [softplus(part).flatten() for part in self.dt_bias.unbind(1)], [
            part.flatten(0, 1) for part in stored.unbind(1)
        ]

    def scan(
        self, source: Tensor, entering: Tensor, left: Pair | None, *, with_state: bool
    ) -> tuple[list[Tensor], Pair | None]:
        """Return the readouts by one convolution; by the recurrence where states come in or are asked for."""
        dt, maps = self._constants()
        if left is not None or with_state:
            cells = entering.shape[:3]
            return self.grid_scan(
                entering.flatten(3),
                [part.expand(*cells, -1) for part in dt],
                [part.expand(*cells, -1, -1) for part in maps],
                left,
            )
        first, second = maps[: self.count // self.axes], maps[self.count // self.axes :]
        if not self.coupled:
            dt, second = [dt[0], dt[0]], [torch.zeros_like(part) for part in first]
        systems = [
            lti_system2d(
                (dt[0], dt[1]),
                self.transitions(),
                (first[0], second[0]),
                (first[read], second[read]),
                discretisation=self.options.discretisation,
            )
            for read in range(1, len(first))
        ]
        return _convolved(self, systems, entering), None


class CompanionHead(ChimeraHead):
    """Discrete systems whose A1 and A2 are companion matrices: a row can be an autoregression of order S.

    Shapes:
        column1, column2 (G E, S), p2 (G, E, 1), p3, p4 (G, E, S), maps (G, count, E, S).
    """

    def __init__(self, features: int, options: ChimeraOptions, name: HeadName, *, looks_ahead: bool = False) -> None:
        super().__init__(features, options, name, looks_ahead=looks_ahead)
        groups, states = options.groups, options.states
        self.norm = _COLUMN_NORM[name]
        self.column1 = nn.Parameter(torch.randn(groups * features, states))
        if self.coupled:
            self.column2 = nn.Parameter(torch.randn(groups * features, states))
            self.p2 = nn.Parameter(0.1 * torch.randn(groups, features, 1))
            self.p3 = nn.Parameter(0.1 * torch.randn(groups, features, states))
            self.p4 = nn.Parameter(log_uniform((groups, features, states), options.dt_variate).log())
        self.maps = nn.Parameter(_initial_maps(self))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A1, A2 (G E, S, S) and A3, A4 (G E, S); without coupling A2 = A3 = 0."""
        a1 = companion(self.column1, self.norm)
        if not self.coupled:
            still = torch.zeros_like(self.column1)
            return a1, torch.zeros_like(a1), still, still
        shrinks = self.norm ** (1 / self.options.states)
        strength = RHO * self.p2.tanh() * (1 - shrinks) / shrinks
        a2 = strength.reshape(-1, 1, 1) * companion(self.column2, self.norm)
        a4 = torch.exp(-self.p4.clamp(*LOG_DECAY).exp())
        a3 = RHO * self.p3.tanh() * (1 - a4.amax(-1, keepdim=True))
        return a1, a2, a3.flatten(0, 1), a4.flatten(0, 1)

    def _systems(self) -> list[LTISystem2D]:
        maps = [part.flatten(0, 1) for part in self.maps.unbind(1)]
        first, second = maps[: self.count // self.axes], maps[self.count // self.axes :]
        second = second or [torch.zeros_like(part) for part in first]
        matrices = self.matrices()
        return [LTISystem2D(*matrices, first[0], second[0], first[read], second[read]) for read in range(1, len(first))]

    def scan(
        self, source: Tensor, entering: Tensor, left: Pair | None, *, with_state: bool
    ) -> tuple[list[Tensor], Pair | None]:
        """Return the readouts by one convolution; column by column where states come in or are asked for."""
        systems = self._systems()
        if left is None and not with_state:
            return _convolved(self, systems, entering), None
        x = entering.flatten(3)
        zero = x.new_zeros(*x.shape[:2], x.shape[3], self.options.states)
        state = (zero, zero) if left is None else left
        columns: list[list[Tensor]] = [[] for _ in systems]
        for u in x.unbind(2):
            before = state
            for system, outputs in zip(systems, columns, strict=True):
                y, state = lti_step2d(system, u, before)
                outputs.append(y)
        return [torch.stack(outputs, dim=2) for outputs in columns], state

    def scales(self) -> Scales:
        """Return the decay that the column's norm bounds, and the strengths; companion systems have no step size."""
        memory = self.options.states / -math.log(self.norm)
        shape = (self.options.groups, self.features, self.options.states)
        still = self.column1.new_full(shape, memory)
        if not self.coupled:
            return Scales(still, None, None, None, None)
        decay = self.p4.clamp(*LOG_DECAY).exp()
        return Scales(still, None, 1 / decay, RHO * self.p2.tanh().abs(), RHO * self.p3.tanh().abs())
