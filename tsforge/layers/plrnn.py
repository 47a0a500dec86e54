"""Piecewise-linear recurrent networks (PLRNN): the maps, their parameters and their penalties.

    plrnn                A z + W relu(z) + h                                    W (M, M) with a zero diagonal
    mean_centred         A z + W relu(z - mean(z)) + h                          the same
    dendritic            A z + W phi(z) + h                                     phi_i = sum_b a_b relu(z_i - theta_ib)
    clipped_dendritic    the same                                phi_i = sum_b a_b [relu(z_i - theta_ib) - relu(z_i)]
    shallow              A z + W1 relu(W2 z + h2) + h1
    clipped_shallow      A z + W1 [relu(W2 z + h2) - relu(W2 z)] + h1
    almost_linear        A z + W psi(z) + h                   psi: relu of the last P units; W keeps its diagonal
    deep                 A z + MLP(z)                         relu between the layers

A is diagonal, kept as a vector. External inputs of the step that is predicted enter as C s. A clipped map with
|A_i| < 1 (``bounded``) cannot diverge: |z_i| ends at most (sum_j |W1_ij| |h2_j| + |h1_i|) / (1 - |A_i|).

:meth:`PLRNNMap.shallow` brings every kind but the deep one into the form that :mod:`tsforge.ops.plrnn` runs;
:meth:`PLRNNMap.step` is the formula above and shares no code with it.

Sources: Durstewitz (2017) for the PLRNN; Brenner et al. (2022) for dendrites and mean-centring; Hess et al. (2023),
arXiv 2306.04406, for the (clipped) shallow PLRNN; Brenner et al. (2024) for the almost-linear RNN.

Deviations: W keeps a zero diagonal by a mask and not by zeroed gradients; ``bounded`` is an addition here; so are
penalties of kinds for which no published formula was at hand (slopes and thresholds of dendrites carry none). The
penalty on the linear part of an almost-linear map follows its published implementation: the 2-norm, not squared.

Legend: G groups (models side by side; every parameter carries this axis), B batch, T steps, M latent units, H hidden
units, K inputs, Bs bases of a dendrite, P rectified units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from tsforge.core.errors import ConfigError, ModelError, nearest
from tsforge.layers.plrnn_init import (
    Values,
    glorot,
    group_seeds,
    normalised_positive_definite,
    per_group,
    symmetric,
    uniform,
)
from tsforge.ops.plrnn import Shallow

MapKind: TypeAlias = Literal[
    "plrnn", "mean_centred", "dendritic", "clipped_dendritic", "shallow", "clipped_shallow", "almost_linear", "deep"
]
A_MAX = 0.999  # largest |A_i| of a bounded map
_START = 0.99  # share of A_MAX at which a bounded map may start: the slope of tanh is nearly 0 beyond
_AL_SPREAD = 0.01  # standard deviation of W of the almost-linear RNN at the start


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return weight x for x (G, ..., K) and weight (G or 1, M, K); (G, ..., M)."""
    return (x.flatten(1, -2) @ weight.mT).reshape(*x.shape[:-1], weight.shape[-2])


def beside(value: Tensor, like: Tensor) -> Tensor:
    """Return value (G, M) with axes of size 1 after the first, to meet ``like`` (G, ..., M)."""
    return value.reshape(value.shape[0], *(1,) * (like.ndim - 2), value.shape[-1])


class PLRNNMap(nn.Module):
    """A map F of M latent units for G groups; build one by :func:`make_map`.

    Attributes:
        kind, latent, groups, inputs: the name, M, G and K.
        clipped: :meth:`shallow` is in the clipped form.
    """

    clipped = False
    C: Tensor | None

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool) -> None:
        super().__init__()
        self.kind, self.bounded = kind, bounded
        A = values.pop("A")
        self.groups, self.latent = A.shape
        self.inputs = values["C"].shape[-1] if "C" in values else 0
        if bounded:
            A = torch.atanh((A / A_MAX).clamp(-_START, _START))
        self.raw_A = nn.Parameter(A)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))
        if "C" not in values:
            self.register_parameter("C", None)

    @property
    def A(self) -> Tensor:
        """The diagonal (G, M): the parameter, or A_MAX tanh of it if ``bounded``."""
        return A_MAX * torch.tanh(self.raw_A) if self.bounded else self.raw_A

    def shallow(self) -> Shallow:
        """Return the map in the grouped form of :mod:`tsforge.ops.plrnn`, differentiable.

        Raises:
            ModelError: the map is deep.
        """
        raise NotImplementedError

    def step(self, z: Tensor) -> Tensor:
        """Return F(z) for z (G, ..., M); same shape."""
        raise NotImplementedError

    def coupling(self) -> tuple[Tensor, Tensor]:
        """Return what drives each unit besides A: the rows of weights (G, M, ...) and the constants (G, M)."""
        raise NotImplementedError

    def penalised(self) -> list[Tensor]:
        """Return the parameters besides A and C that :meth:`penalty` draws to 0."""
        return list(self.coupling())

    def input_term(self, s: Tensor) -> Tensor:
        """Return C s, (G, ..., M), for inputs s (G, ..., K) of the predicted steps.

        Raises:
            ModelError: the map has no inputs, or another number of them or of groups.
        """
        if self.C is None:
            raise ModelError("this PLRNN was built without external inputs; build it with inputs = K")
        if s.shape[0] != self.groups or s.shape[-1] != self.inputs or s.ndim < 2:
            raise ModelError(
                f"inputs of the PLRNN need shape ({self.groups}, ..., {self.inputs}), got {tuple(s.shape)}"
            )
        return grouped_linear(s, self.C)

    def penalty(self) -> Tensor:
        """Return |1 - A|^2 + |W1|^2 + |W2|^2 + |h1|^2 + |h2|^2 + |C|^2 (G,), or the like for other kinds."""
        parts = [1 - self.A, *self.penalised()] + ([] if self.C is None else [self.C])
        return torch.stack([part.square().flatten(1).sum(1) for part in parts]).sum(0)

    def mar_penalty(self, ratio: float) -> Tensor:
        """Return ||1 - A|| + ||W rows|| + ||h|| (G,) of the last ``ratio`` M units: drawn to lines of fixed points.

        The manifold-attractor penalty, for long time scales; the number of units is rounded up.

        Raises:
            ConfigError: ``ratio`` is not above 0 and at most 1.
        """
        if not 0 < ratio <= 1:
            raise ConfigError(f"the ratio of regularised units is {ratio:g}; it must be above 0 and at most 1")
        first = self.latent - math.ceil(ratio * self.latent - 1e-9)
        W, h = self.coupling()
        parts = (1 - self.A[:, first:], W[:, first:], h[:, first:])
        return torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts]).sum(0)

    def self_penalty(self, limit: float) -> Tensor:
        """Return ||relu(A + diag W - limit)|| (G,): what a unit takes over from itself is kept below ``limit``.

        Raises:
            ConfigError: the map is of another kind than ``almost_linear``, whose units alone have both terms.
        """
        raise ConfigError(f"a PLRNN of kind '{self.kind}' has no penalty on A + diag W; it is for 'almost_linear'")


class SquareMap(PLRNNMap):
    """``plrnn`` and ``mean_centred``: one hidden unit for each latent one."""

    W: Tensor
    h: Tensor
    off_diagonal: Tensor

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool) -> None:
        super().__init__(kind, values, bounded=bounded)
        keep = torch.ones(self.latent, self.latent)
        if kind != "almost_linear":
            keep.fill_diagonal_(0)
        self.register_buffer("off_diagonal", keep, persistent=False)

    @property
    def weights(self) -> Tensor:
        """W (G, M, M) with its diagonal masked; whole for the almost-linear RNN."""
        return self.W * self.off_diagonal

    def coupling(self) -> tuple[Tensor, Tensor]:
        """Return W and h."""
        return self.weights, self.h

    def shallow(self) -> Shallow:
        """Return W1 = W and W2 = I, or I - 11'/M with mean-centring."""
        W2 = torch.eye(self.latent, dtype=self.h.dtype, device=self.h.device)
        if self.kind == "mean_centred":
            W2 = W2 - 1 / self.latent
        return Shallow(self.A, self.weights, W2.expand_as(self.W), self.h, torch.zeros_like(self.h))

    def _drive(self, z: Tensor) -> Tensor:
        return torch.relu(z - z.mean(-1, keepdim=True) if self.kind == "mean_centred" else z)

    def step(self, z: Tensor) -> Tensor:
        """Return F(z) by its formula."""
        pushed = torch.einsum("gij,g...j->g...i", self.weights, self._drive(z))
        return beside(self.A, z) * z + pushed + beside(self.h, z)


class AlmostLinearMap(SquareMap):
    """``almost_linear``: the last P units are rectified, the others enter W as they are."""

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool, rectified: int) -> None:
        super().__init__(kind, values, bounded=bounded)
        self.rectified = rectified

    def shallow(self) -> Shallow:
        """Return 2 M - P hidden units: a linear unit is x = relu(x) - relu(-x)."""
        linear = self.latent - self.rectified
        eye = torch.eye(self.latent, dtype=self.h.dtype, device=self.h.device)
        W2 = torch.cat([eye, -eye[:linear]]).expand(self.groups, -1, -1)
        W1 = torch.cat([self.W, -self.W[..., :linear]], dim=-1)
        return Shallow(self.A, W1, W2, self.h, self.h.new_zeros(self.groups, W2.shape[1]))

    def _drive(self, z: Tensor) -> Tensor:
        linear = self.latent - self.rectified
        return torch.cat([z[..., :linear], torch.relu(z[..., linear:])], dim=-1)

    def self_penalty(self, limit: float) -> Tensor:
        """Return the penalty; its gradient is 0 where every unit is below the limit."""
        beyond = torch.relu(self.A + self.W.diagonal(dim1=1, dim2=2) - limit)
        size: Tensor = torch.linalg.vector_norm(beyond, dim=1)
        return size


class DendriticMap(SquareMap):
    """``dendritic`` and ``clipped_dendritic``: Bs bases a unit, slopes a (G, Bs), thresholds theta (G, M, Bs)."""

    a: Tensor
    theta: Tensor

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool) -> None:
        super().__init__(kind, values, bounded=bounded)
        self.clipped = kind == "clipped_dendritic"

    def shallow(self) -> Shallow:
        """Return M Bs hidden units, one for each unit and basis, with h2 = -theta."""
        bases = self.a.shape[-1]
        W1 = (self.weights.unsqueeze(-1) * self.a[:, None, None]).flatten(2)
        eye = torch.eye(self.latent, dtype=self.h.dtype, device=self.h.device)
        W2 = eye.repeat_interleave(bases, dim=0).expand(self.groups, -1, -1)
        return Shallow(self.A, W1, W2, self.h, -self.theta.flatten(1))

    def _drive(self, z: Tensor) -> Tensor:
        theta = self.theta.reshape(self.groups, *(1,) * (z.ndim - 2), *self.theta.shape[1:])
        basis = torch.relu(z.unsqueeze(-1) - theta)
        if self.clipped:
            basis = basis - torch.relu(z).unsqueeze(-1)
        return torch.einsum("gb,g...b->g...", self.a, basis)


class ShallowMap(PLRNNMap):
    """``shallow`` and ``clipped_shallow``: W1 (G, M, H), W2 (G, H, M), h1 (G, M), h2 (G, H)."""

    W1: Tensor
    W2: Tensor
    h1: Tensor
    h2: Tensor

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool) -> None:
        super().__init__(kind, values, bounded=bounded)
        self.clipped = kind == "clipped_shallow"

    def coupling(self) -> tuple[Tensor, Tensor]:
        """Return W1 and h1."""
        return self.W1, self.h1

    def penalised(self) -> list[Tensor]:
        """Return all weights and biases."""
        return [self.W1, self.W2, self.h1, self.h2]

    def shallow(self) -> Shallow:
        """Return the parameters."""
        return Shallow(self.A, self.W1, self.W2, self.h1, self.h2)

    def step(self, z: Tensor) -> Tensor:
        """Return F(z) by its formula."""
        seen = torch.einsum("ghi,g...i->g...h", self.W2, z)
        hidden = torch.relu(seen + beside(self.h2, z))
        if self.clipped:
            hidden = hidden - torch.relu(seen)
        return beside(self.A, z) * z + torch.einsum("gih,g...h->g...i", self.W1, hidden) + beside(self.h1, z)


class DeepMap(PLRNNMap):
    """``deep``: weight0, bias0, weight1, ... of an MLP from M back to M."""

    def __init__(self, kind: MapKind, values: Values, *, bounded: bool) -> None:
        self.depth = sum(name.startswith("weight") for name in values)
        super().__init__(kind, values, bounded=bounded)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.get_parameter(f"weight{i}"), self.get_parameter(f"bias{i}")) for i in range(self.depth)]

    def coupling(self) -> tuple[Tensor, Tensor]:
        """Return the last layer."""
        return self._layers()[-1]

    def penalised(self) -> list[Tensor]:
        """Return all weights and biases."""
        return [part for layer in self._layers() for part in layer]

    def shallow(self) -> Shallow:
        """Refuse."""
        raise ModelError("a deep PLRNN has no shallow form; run its step by tsforge.ops.plrnn.gtf_loop")

    def step(self, z: Tensor) -> Tensor:
        """Return F(z) by its formula."""
        y = z
        for i, (weight, bias) in enumerate(self._layers()):
            y = torch.einsum("gij,g...j->g...i", weight, torch.relu(y) if i else y) + beside(bias, z)
        return beside(self.A, z) * z + y


# ---- construction


def make_map(
    kind: MapKind,
    latent: int,
    hidden: int | Sequence[int] | None = None,
    *,
    inputs: int = 0,
    groups: int | None = None,
    seeds: Sequence[int] | None = None,
    bases: int | None = None,
    rectified: int | None = None,
    bounded: bool = False,
    theta_range: tuple[float, float] | None = None,
) -> PLRNNMap:
    """Return a map with fresh parameters in torch's default dtype, on the CPU.

    Args:
        kind: see the module.
        latent: M.
        hidden: H of the (clipped) shallow kinds; widths of the hidden layers of the deep one (a number: one layer).
        inputs: K, external inputs.
        groups, seeds: one seed a group, or a number of groups that draw seeds from torch's global generator. Initial
            values of a group depend on its seed alone.
        bases: Bs of the dendritic kinds.
        rectified: P of the almost-linear kind.
        bounded: keep |A| below ``A_MAX``; with a clipped kind, free runs are then bounded.
        theta_range: least and largest value of the data, between which thresholds of dendrites start (for the
            identity read-out); standard normal without.

    Raises:
        ConfigError: a setting is out of range, missing, or belongs to another kind.
    """
    if kind not in get_args(MapKind):
        choices = get_args(MapKind)
        raise ConfigError(f"kind of PLRNN is {kind!r}; choose one of {', '.join(choices)}{nearest(kind, choices)}")
    if latent < 1 or inputs < 0:
        raise ConfigError(f"a PLRNN needs latent >= 1 and inputs >= 0, got latent = {latent} and inputs = {inputs}")
    widths = () if hidden is None else (hidden,) if isinstance(hidden, int) else tuple(hidden)
    dendritic, layered = kind.endswith("dendritic"), kind.endswith("shallow") or kind == "deep"
    _belongs(kind, "hidden", hidden, wanted=layered, needed=layered)
    _belongs(kind, "bases", bases, wanted=dendritic, needed=dendritic)
    _belongs(kind, "rectified", rectified, wanted=kind == "almost_linear", needed=kind == "almost_linear")
    _belongs(kind, "theta_range", theta_range, wanted=dendritic, needed=False)
    if any(width < 1 for width in widths) or (layered and not widths) or (kind != "deep" and len(widths) > 1):
        raise ConfigError(f"model.hidden is {hidden}; it must be at least 1, and one number unless the kind is 'deep'")
    if bases is not None and bases < 1:
        raise ConfigError(f"model.bases is {bases}; it must be at least 1")
    if rectified is not None and not 0 <= rectified <= latent:
        raise ConfigError(f"model.rectified is {rectified}; it must be between 0 and model.latent = {latent}")
    if theta_range is not None and not -math.inf < theta_range[0] <= theta_range[1] < math.inf:
        raise ConfigError(f"theta_range is {theta_range}; it must be finite, the lower end first")

    def draw(generator: torch.Generator) -> Values:
        values = _draw(kind, generator, latent, widths)
        if bases is not None:
            values["a"] = symmetric(generator, bases, bases)
            values["theta"] = (
                torch.randn(latent, bases, generator=generator)
                if theta_range is None
                else uniform(generator, *theta_range, latent, bases)
            )
        if inputs:
            values["C"] = glorot(generator, latent, inputs)
        return values

    values = per_group(group_seeds(groups, seeds), "map", draw)
    if rectified is not None:
        return AlmostLinearMap(kind, values, bounded=bounded, rectified=rectified)
    chosen = DendriticMap if dendritic else DeepMap if kind == "deep" else ShallowMap if layered else SquareMap
    return chosen(kind, values, bounded=bounded)


def _belongs(kind: str, name: str, value: object, *, wanted: bool, needed: bool) -> None:
    """Refuse a setting of another kind, and a missing one; both networks call theirs ``model.NAME``."""
    if value is not None and not wanted:
        raise ConfigError(f"model.{name} does not belong to a PLRNN of kind '{kind}'; leave it out")
    if value is None and needed:
        example = {"hidden": 50, "bases": 5, "rectified": 3}[name]
        raise ConfigError(f"a PLRNN of kind '{kind}' needs model.{name} (for example model.{name}={example})")


def _draw(kind: str, generator: torch.Generator, latent: int, widths: tuple[int, ...]) -> Values:
    """Return the first values of one group, apart from those of dendrites and inputs."""
    K = normalised_positive_definite(generator, latent)
    values: Values = {"A": K.diagonal().clone()}
    if kind == "deep":
        sizes = (latent, *widths, latent)
        for i, (before, after) in enumerate(itertools.pairwise(sizes)):
            values[f"weight{i}"] = glorot(generator, after, before)
            values[f"bias{i}"] = torch.zeros(after)
    elif widths:
        (hidden,) = widths
        values["W1"] = symmetric(generator, hidden, latent, hidden)
        values["W2"] = symmetric(generator, latent, hidden, latent)
        values["h1"] = torch.zeros(latent)
        # thresholds of 0 would make the clipped nonlinearity vanish
        values["h2"] = symmetric(generator, hidden, hidden) if kind == "clipped_shallow" else torch.zeros(hidden)
    else:
        almost = kind == "almost_linear"
        values["W"] = _AL_SPREAD * torch.randn(latent, latent, generator=generator) if almost else K
        values["h"] = torch.zeros(latent)
    return values
