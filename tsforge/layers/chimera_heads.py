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
LOG_DECAY = (-12.0, 8.0)  # clamp of p1, p4: exp stays finite whatever the optimiser does
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


class Grid(NamedTuple):
    """What heads scan, (b', N', T, G, E) each: what parameters are computed from, and the same where observed, else 0:
    what enters. ``batch`` is b."""

    source: Tensor
    entering: Tensor
    batch: int


def folded(u: Tensor, observed: Tensor | None, options: ChimeraOptions) -> Grid:
    """Return the grid of inputs (b, N, T, E), of which ``observed`` (b, N, T) says what enters, as the coupling has it.

    The second direction sees the variates in reverse, where their order means anything.
    """
    batch, variates = u.shape[:2]
    if options.coupling == "scan":
        source = _directed(u, options)
        if observed is None:
            return Grid(source, source, batch)
        return Grid(source, torch.where(_directed(observed.unsqueeze(-1), options), source, 0.0), batch)
    x = u if observed is None else torch.where(observed.unsqueeze(-1), u, 0.0)
    rows = [part.flatten(0, 1).unsqueeze(1) for part in (u, x)]
    if options.coupling == "pooled":
        seen: Tensor | int = variates if observed is None else observed.sum(1).clamp(min=1).unsqueeze(-1).to(u.dtype)
        pooled = (x.sum(1) / seen).repeat_interleave(variates, dim=0).unsqueeze(1)
        rows = [torch.cat([pooled, part], dim=1) for part in rows]
    source, entering = (part.unsqueeze(3).expand(-1, -1, -1, options.groups, -1) for part in rows)
    return Grid(source, entering, batch)


def _directed(grid: Tensor, options: ChimeraOptions) -> Tensor:
    """Return (b, N, T, G, ...) of (b, N, T, ...)."""
    return grid.unsqueeze(3) if options.groups == 1 else torch.stack([grid, grid.flip(1)], dim=3)


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

    def _merged(self, y: Tensor, batch: int) -> Tensor:
        """Return the mean over directions (b, N, T, E) of outputs (b', N', T, G E)."""
        groups = y.chunk(self.options.groups, dim=-1)
        scans = self.options.coupling == "scan"
        if not scans:  # rows are variates, the last of a grid is the variate itself
            groups = tuple(part[:, -1] for part in groups)
        merged = groups[0]
        if len(groups) == 2:
            merged = 0.5 * (merged + (groups[1].flip(1) if scans else groups[1]))
        return merged.reshape(batch, -1, *merged.shape[-2:])

    def forward(self, grid: Grid, state: Tensor | None = None, *, with_state: bool = True) -> HeadOutput:
        """Return readouts and state of a grid from :func:`folded`."""
        left = None if state is None else self._unpack(state)
        readouts, right = self.scan(grid.source, grid.entering, left, with_state=with_state)
        merged = [self._merged(part, grid.batch) for part in readouts]
        after = None if right is None else self._pack(right, grid.batch)
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
        given: list[Tensor] = [self.p1, self.p4] if self.coupled else [self.p1]
        decay = torch.stack(given).flatten(1, 2).clamp(*LOG_DECAY).exp()
        if self.coupled:
            a2, a3 = (RHO * torch.stack([self.p2, self.p3]).flatten(1, 2).tanh() * decay).unbind(0)
            rates = [-decay[0], a2, a3, -decay[1]]
        else:
            still = torch.zeros_like(decay[0])
            rates = [-decay[0], still, still, -decay[0].detach()]
        if not self.complex:
            return rates[0], rates[1], rates[2], rates[3]
        still = torch.zeros_like(decay[0])
        turns = [self.w1.flatten(0, 1), still, still, self.w4.flatten(0, 1) if self.coupled else still]
        a1, a2, a3, a4 = torch.complex(torch.stack(rates), torch.stack(turns)).unbind(0)
        return a1, a2, a3, a4

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
            # steps of no effect and maps of zeros, which take no memory
            dt, second = [dt[0], dt[0].detach()], [part.new_zeros(()).expand_as(part) for part in first]
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
        cells, groups = u.shape[:3], u.shape[3]
        codes = torch.bmm(u.flatten(0, 2).transpose(0, 1), self.project.transpose(1, 2))  # (G, b N T, codes)
        ends = self.axes * self.rank
        low, rest = torch.split(codes, [ends, codes.shape[-1] - ends], dim=-1)
        # both directions in one product: what one reads of the other's codes has weight 0
        low = low.reshape(groups, -1, self.axes, self.rank).permute(2, 1, 0, 3).flatten(2)
        own = torch.eye(groups, dtype=u.dtype, device=u.device)[:, None, :, None]
        weight = self.dt_weight.permute(1, 0, 3, 2).unsqueeze(3) * own  # (axes, G, r, G, E)
        bias = self.dt_bias.transpose(0, 1).flatten(1).unsqueeze(1)
        steps = softplus(torch.baddbmm(bias, low, weight.flatten(3).flatten(1, 2)))
        if self.complex:
            rest = rest.view(*rest.shape[:-1], -1, 2)
            # read where it lies if pairs stay whole; torch's compiler cannot follow such a view
            copied = ends % 2 == 1 or torch.compiler.is_compiling()
            rest = torch.view_as_complex(rest.contiguous() if copied else rest)
        maps = rest.view(groups, *cells, self.count, -1).movedim(0, 3)
        return [part.view(*cells, -1) for part in steps.unbind(0)], list(maps.unbind(-2))

    def scan(
        self, source: Tensor, entering: Tensor, left: Pair | None, *, with_state: bool
    ) -> tuple[list[Tensor], Pair | None]:
        """Return the readouts and the last states, which come with them."""
        dt, maps = self._system(source)
        readouts, right = self.grid_scan(entering.flatten(3), dt, maps, left)
        return readouts, right if with_state else None
