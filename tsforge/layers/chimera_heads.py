"""Heads of the 2-D state space layer of Chimera: what all share, and the selective head.

A head folds a grid of variates and steps as its coupling wants it, runs the directions along variates as groups of one
scan, averages them and keeps the states. Source, equations and deviations: :mod:`tsforge.layers.chimera`.

Legend: b batch, N variates, T steps, E channels, S states, G directions (groups of a scan).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tsforge.contracts.model import OptimRule
from tsforge.core.errors import ConfigError
from tsforge.ops.scan2d import Discretisation, Four, Pair, scan2d

Coupling: TypeAlias = Literal["scan", "none", "pooled"]
HeadName: TypeAlias = Literal["trend", "seasonal"]
Span: TypeAlias = tuple[float, float]

RHO = 0.95  # share of the stability limit that the coupling can reach
_LOG_DECAY = (-12.0, 8.0)  # clamp of p1, p4: exp stays finite whatever the optimiser does
_COUPLING_SPREAD = 0.1  # of p2, p3 at the start: nearly independent variates
_CHANNELS_A_RANK = 16
KEPT = OptimRule(weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class ChimeraOptions:
    """What the systems of a layer are.

    Attributes:
        states: S, states a channel.
        heads: trend and seasonal, or one of them.
        directions: along variates, each with its own parameters, averaged; or forward only.
        coupling: ``scan`` the 2-D recurrence, ``none`` A2 = A3 = 0 and C2 = 0, ``pooled`` through the mean of variates.
        selective: B, C and dt are functions of the cell; False: parameters of each channel.
        structure: ``companion`` for A1 and A2 in discrete time, without steps along time; not selective.
        discretisation: see :func:`tsforge.ops.scan2d.discrete_factors`; other than ``exact`` for study, with a warning.
        head_mix: ``sum``, or ``residual``: the seasonal head reads what the trend head left.
        dt_trend, dt_seasonal, dt_variate: ranges of the initial steps along time and along variates.

    Raises:
        ConfigError: a range is empty, or the settings contradict each other.
    """

    states: int = 8
    heads: Literal["both", "trend", "seasonal"] = "both"
    directions: Literal["both", "forward"] = "both"
    coupling: Coupling = "scan"
    selective: bool = True
    structure: Literal["diagonal", "companion"] = "diagonal"
    discretisation: Discretisation = "exact"
    head_mix: Literal["sum", "residual"] = "sum"
    dt_trend: Span = (1e-3, 1e-2)
    dt_seasonal: Span = (1e-2, 1.0)
    dt_variate: Span = (1e-2, 1.0)

    def __post_init__(self) -> None:
        if self.states < 1:
            raise ConfigError(f"d_state is {self.states}; it must be at least 1")
        for name in ("dt_trend", "dt_seasonal", "dt_variate"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high < math.inf:
                raise ConfigError(
                    f"{name} is {low:g} to {high:g}; the lower end must be positive and not above the upper"
                )
        if self.head_mix == "residual" and self.heads != "both":
            raise ConfigError(f"head_mix 'residual' needs both heads, not only '{self.heads}'")
        if self.structure == "companion" and (self.selective or self.discretisation != "exact"):
            raise ConfigError(
                "structure 'companion' is a discrete, time-invariant system; use it with selective false and "
                "discretisation exact"
            )
        if self.discretisation != "exact" and self.coupling == "none":
            raise ConfigError(
                f"discretisation '{self.discretisation}' cannot switch the coupling off (A2 = 0 becomes a factor of "
                "1); use discretisation exact with coupling none"
            )

    @property
    def names(self) -> tuple[HeadName, ...]:
        """The heads in order."""
        return ("trend", "seasonal") if self.heads == "both" else (self.heads,)

    @property
    def groups(self) -> int:
        """G, directions along variates."""
        return 2 if self.directions == "both" else 1


def inverse_softplus(value: Tensor) -> Tensor:
    """Return b with softplus(b) = value > 0, also for values so small that softplus is an exponential."""
    return value + torch.log(-torch.expm1(-value))


def log_uniform(shape: tuple[int, ...], span: Span) -> Tensor:
    """Return draws that are uniform in the logarithm between the ends of ``span``."""
    return torch.empty(shape).uniform_(math.log(span[0]), math.log(span[1])).exp()


class HeadOutput(NamedTuple):
    """Readout y, readout of the next input (None without its maps), both (b, N, T, E), and the state or None."""

    y: Tensor
    ahead: Tensor | None
    state: Tensor | None


class Scales(NamedTuple):
    """What a head's systems are like at zero codes, each (G, E, S) or None where there is none.

    ``memory`` steps and ``reach`` variates until 1 / e is left; ``turn`` radians a step; ``into_time`` and
    ``into_variates`` the strength of A2 and A3 as a share of the stability limit.
    """

    memory: Tensor
    turn: Tensor | None
    reach: Tensor | None
    into_time: Tensor | None
    into_variates: Tensor | None


class ChimeraHead(nn.Module):
    """Base of the heads: grid, directions and states; a subclass gives the scan.

    Args:
        features: E.
        options: see :class:`ChimeraOptions`.
        name: which head.
        looks_ahead: also read the states with maps D1, D2: the prediction of the next input (closed loop).

    Attributes:
        complex: states are complex.
        coupled: variates read each other.
        axes: kinds of states that take part, 1 without coupling.
        count: maps of a group: B, C (and D) of each axis.
    """

    optim_rules: ClassVar[dict[str, OptimRule]] = dict.fromkeys(("p1", "p2", "p3", "p4", "w1", "w4", "dt_bias"), KEPT)

    def __init__(self, features: int, options: ChimeraOptions, name: HeadName, *, looks_ahead: bool = False) -> None:
        super().__init__()
        self.features, self.options, self.name = features, options, name
        self.complex = name == "seasonal" and options.structure == "diagonal"
        self.coupled = options.coupling != "none"
        self.axes = 2 if self.coupled else 1
        self.looks_ahead = looks_ahead
        self.count = self.axes * (3 if looks_ahead else 2)

    # ---- what a subclass says

    def scan(
        self, source: Tensor, entering: Tensor, left: Pair | None, *, with_state: bool
    ) -> tuple[list[Tensor], Pair | None]:
        """Return readouts (b', N', T, G E), one or with D two, and the last states (b', N', G E, S) if asked for.

        Args:
            source: (b', N', T, G, E), what parameters are computed from.
            entering: the same where observed, else 0: what enters.
            left: states before the first step.
            with_state: return the states.
        """
        raise NotImplementedError

    def scales(self) -> Scales:
        """Return time-scales and strengths of the systems."""
        raise NotImplementedError

    # ---- the grid

    def _grid(self, u: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what parameters are computed from and what enters, (b', N', T, E) each, as the coupling has it."""
        x = u if observed is None else torch.where(observed.unsqueeze(-1), u, 0.0)
        if self.options.coupling == "scan":
            return u, x
        rows = (u.flatten(0, 1), x.flatten(0, 1))
        if self.options.coupling == "none":
            return rows[0].unsqueeze(1), rows[1].unsqueeze(1)
        total = x.sum(1)
        if observed is None:
            pooled = total / u.shape[1]
        else:
            pooled = total / observed.sum(1).clamp(min=1).unsqueeze(-1).to(u.dtype)
        pooled = pooled.repeat_interleave(u.shape[1], dim=0)
        return torch.stack([pooled, rows[0]], dim=1), torch.stack([pooled, rows[1]], dim=1)

    def _directed(self, grid: Tensor) -> Tensor:
        """Return (b', N', T, G, E): the second group sees the variates in reverse, where their order means anything."""
        if self.options.groups == 1:
            return grid.unsqueeze(3)
        other = grid.flip(1) if self.options.coupling == "scan" else grid
        return torch.stack([grid, other], dim=3)

    def _merged(self, y: Tensor, batch: int) -> Tensor:
        """Return the mean over directions (b, N, T, E) of outputs (b', N', T, G E)."""
        groups = y.chunk(self.options.groups, dim=-1)
        if self.options.coupling == "scan":
            merged = groups[0] if len(groups) == 1 else (groups[0] + groups[1].flip(1)) / 2
        else:  # rows are variates, the last of a grid is the variate itself
            merged = torch.stack(groups).mean(0)[:, -1]
        return merged.reshape(batch, -1, *merged.shape[-2:])

    def forward(
        self,
        u: Tensor,
        observed: Tensor | None = None,
        state: Tensor | None = None,
        *,
        with_state: bool = True,
    ) -> HeadOutput:
        """Return readouts and state of inputs (b, N, T, E), of which ``observed`` (b, N, T) says what enters."""
        batch = u.shape[0]
        source, entering = (self._directed(part) for part in self._grid(u, observed))
        left = None if state is None else self._unpack(state)
        readouts, right = self.scan(source, entering, left, with_state=with_state)
        merged = [self._merged(part, batch) for part in readouts]
        after = None if right is None else self._pack(right, batch)
        return HeadOutput(merged[0], merged[1] if self.looks_ahead else None, after)

    # ---- the state

    def _pack(self, states: Pair, batch: int) -> Tensor:
        """Return real (b, rows, axes, G E, S (2)) of the states (b', N', G E, S); without coupling h2 stays 0."""
        packed = torch.stack(states[: self.axes], dim=2)
        if self.complex:
            packed = torch.view_as_real(packed)
        return packed.reshape(batch, -1, *packed.shape[2:])

    def _unpack(self, state: Tensor) -> Pair:
        rows = {"scan": state.shape[1], "none": 1, "pooled": 2}[self.options.coupling]
        parts = state.reshape(-1, rows, *state.shape[2:])
        if self.complex:
            parts = torch.view_as_complex(parts.contiguous())
        return parts[:, :, 0], parts[:, :, 1] if self.axes == 2 else torch.zeros_like(parts[:, :, 0])

    def default_state(self, batch: int, variates: int) -> Tensor:
        """Return the zero state."""
        rows = 2 * variates if self.options.coupling == "pooled" else variates
        tail = (2,) if self.complex else ()
        channels = self.options.groups * self.features
        like = next(self.parameters())
        return like.new_zeros(batch, rows, self.axes, channels, self.options.states, *tail)


class DiagonalHead(ChimeraHead):
    """Base of the heads with diagonal transitions in continuous time.

    Shapes:
        p1..p4, w1, w4 (G, E, S), dt_bias (G, axes, E).
    """

    def __init__(self, features: int, options: ChimeraOptions, name: HeadName, *, looks_ahead: bool = False) -> None:
        super().__init__(features, options, name, looks_ahead=looks_ahead)
        shape = (options.groups, features, options.states)
        decay = torch.arange(1.0, options.states + 1).log().expand(shape)  # S4D-real: -1 .. -S
        turn = math.pi * torch.arange(float(options.states)).expand(shape)  # S4D-Lin: -1/2 + i pi n
        self.p1 = nn.Parameter(torch.full(shape, math.log(0.5)) if self.complex else decay.clone())
        if self.complex:
            self.w1 = nn.Parameter(turn.clone())
        if self.coupled:
            self.p2 = nn.Parameter(_COUPLING_SPREAD * torch.randn(shape))
            self.p3 = nn.Parameter(_COUPLING_SPREAD * torch.randn(shape))
            self.p4 = nn.Parameter(decay.clone())
            if self.complex:
                self.w4 = nn.Parameter(torch.zeros(shape))
        spans = (options.dt_trend if name == "trend" else options.dt_seasonal, options.dt_variate)[: self.axes]
        steps = torch.stack([log_uniform(shape[:2], span) for span in spans], dim=1)
        self.dt_bias = nn.Parameter(inverse_softplus(steps))

    def transitions(self) -> Four:
        """Return A1, A2, A3, A4, each (G E, S); without coupling A2 = A3 = 0."""
        a1 = -self.p1.clamp(*_LOG_DECAY).exp()
        if self.coupled:
            a4 = -self.p4.clamp(*_LOG_DECAY).exp()
            a2, a3 = RHO * self.p2.tanh() * a1.abs(), RHO * self.p3.tanh() * a4.abs()
        else:
            a2, a3, a4 = torch.zeros_like(a1), torch.zeros_like(a1), a1.detach()
        if self.complex:
            turns = self.w4 if self.coupled else torch.zeros_like(a4)
            a1, a4 = torch.complex(a1, self.w1), torch.complex(a4, turns)
            a2, a3 = torch.complex(a2, torch.zeros_like(a2)), torch.complex(a3, torch.zeros_like(a3))
        return a1.flatten(0, 1), a2.flatten(0, 1), a3.flatten(0, 1), a4.flatten(0, 1)

    def mean_steps(self) -> Tensor:
        """Return the steps (axes, G, E) at zero codes; they do not depend on any input."""
        return softplus(self.dt_bias).transpose(0, 1)

    def scales(self) -> Scales:
        """Return time-scales and strengths at the steps of zero codes."""
        a1, a2, a3, a4 = (part.view(self.options.groups, self.features, -1) for part in self.transitions())
        steps = self.mean_steps().unsqueeze(-1)  # (axes, G, E, 1)
        turn = (steps[0] * a1.imag).abs() if self.complex else None
        if not self.coupled:
            return Scales(1 / (steps[0] * a1.real.abs()), turn, None, None, None)
        return Scales(
            1 / (steps[0] * a1.real.abs()),
            turn,
            1 / (steps[1] * a4.real.abs()),
            (a2.real / a1.real).abs(),
            (a3.real / a4.real).abs(),
        )

    def grid_scan(
        self, x: Tensor, dt: list[Tensor], maps: list[Tensor], left: Pair | None
    ) -> tuple[list[Tensor], Pair]:
        """Return readouts and last states of inputs (b', N', T, G E) with steps an axis and maps of each cell."""
        A = self.transitions()
        first, second = maps[: self.count // self.axes], maps[self.count // self.axes :]
        if not self.coupled:
            dt, second = [dt[0], dt[0]], [torch.zeros_like(part) for part in first]
        B: Pair = (first[0], second[0])
        C: Pair = (first[1], second[1])
        channels = x.shape[-1]
        if self.looks_ahead:  # the same states read twice: as the output and as the next input
            x, dt = torch.cat([x, x], dim=-1), [torch.cat([part, part], dim=-1) for part in dt]
            A = tuple(torch.cat([part, part]) for part in A)  # type: ignore[assignment]
            B = tuple(torch.cat([part, part], dim=3) for part in B)  # type: ignore[assignment]
            C = tuple(torch.cat(pair, dim=3) for pair in ((first[1], first[2]), (second[1], second[2])))  # type: ignore[assignment]
            left = None if left is None else tuple(torch.cat([part, part], dim=2) for part in left)  # type: ignore[assignment]
        y, right = scan2d(x, (dt[0], dt[1]), A, B, C, left=left, discretisation=self.options.discretisation)
        readouts = [y[..., :channels], y[..., channels:]] if self.looks_ahead else [y]
        return readouts, (right[0][:, :, :channels], right[1][:, :, :channels])


class SelectiveHead(DiagonalHead):
    """B, C and the steps are functions of the cell, as in Mamba: one linear map, rank r for the steps.

    Shapes:
        project (G, codes, E), dt_weight (G, axes, E, r); complex maps as pairs (real, imaginary) of codes.
    """

    def __init__(self, features: int, options: ChimeraOptions, name: HeadName, *, looks_ahead: bool = False) -> None:
        super().__init__(features, options, name, looks_ahead=looks_ahead)
        self.rank = -(-features // _CHANNELS_A_RANK)
        codes = self.axes * self.rank + self.count * options.states * (2 if self.complex else 1)
        limit, narrow = 1.0 / math.sqrt(features), 1.0 / math.sqrt(self.rank)
        self.project = nn.Parameter(torch.empty(options.groups, codes, features).uniform_(-limit, limit))
        self.dt_weight = nn.Parameter(
            torch.empty(options.groups, self.axes, features, self.rank).uniform_(-narrow, narrow)
        )

    def _system(self, u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the steps, one (b, N, T, G E) an axis, and the maps (b, N, T, G, S) of inputs (b, N, T, G, E).

        Maps are B1, C1, (D1,) B2, C2, (D2).
        """
        codes = torch.einsum("bntge,gce->bntgc", u, self.project)
        ends = self.axes * self.rank
        steps, rest = codes[..., :ends].reshape(*codes.shape[:-1], self.axes, self.rank), codes[..., ends:]
        dt = [
            softplus(torch.einsum("bntgr,ger->bntge", steps[..., axis, :], self.dt_weight[:, axis]) + bias).flatten(3)
            for axis, bias in enumerate(self.dt_bias.unbind(1))
        ]
        if self.complex:
            rest = torch.view_as_complex(rest.reshape(*rest.shape[:-1], -1, 2).contiguous())
        return dt, list(rest.reshape(*rest.shape[:-1], self.count, self.options.states).unbind(-2))

    def scan(
        self, source: Tensor, entering: Tensor, left: Pair | None, *, with_state: bool
    ) -> tuple[list[Tensor], Pair | None]:
        """Return the readouts and the last states, which come with them."""
        dt, maps = self._system(source)
        readouts, right = self.grid_scan(entering.flatten(3), dt, maps, left)
        return readouts, right if with_state else None
