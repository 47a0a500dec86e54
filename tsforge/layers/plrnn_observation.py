"""Read-outs of piecewise-linear recurrent networks: from states to observations and, to force the model, back.

    identity   x = z[:N], M >= N;        z_1 = [x_1; L x_1] with a trained L (M - N, N)
    affine     x = B z (+ b);            z_1 = pinv(B) (x_1 - b), forced states pinv(B) (x_t - b)

Forced states carry no gradient; z_1 does, to L and B.

Missing entries (NaN). Identity: exactly these units are not forced. Affine: least squares on the observed rows of B,
as long as they determine the state as well as all rows do (at least min(N, M) of them), else the step is not forced.
A first state has to exist: what is missing counts as 0 (identity), or the least-norm solution is taken (affine).

Source: Hess et al. (2023), arXiv 2306.04406, and the initial values of its experiments. Deviation: with M > N the
identity read-out forces the observed units only, whatever their number.

Legend: G groups, B batch, T steps, N observed variates, M latent units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from tsforge.core.errors import ConfigError, ModelError, nearest
from tsforge.layers.plrnn_init import glorot, group_seeds, per_group

ObservationKind: TypeAlias = Literal["identity", "affine"]


class Forcing(NamedTuple):
    """What a model is forced with, without gradient.

    Shapes:
        states (G, T, B, M), 0 where nothing is forced; reach, 1 where a unit is forced and 0 elsewhere: (M,), or
        (G, T, B, M) if entries are missing. Strength times reach is the alpha of the primitive.
    """

    states: Tensor
    reach: Tensor


class Observation(nn.Module):
    """A read-out of N variates from M latent units for G groups; build one by :func:`make_observation`."""

    kind: ObservationKind

    def __init__(self, groups: int, observed: int, latent: int) -> None:
        super().__init__()
        self.groups, self.observed, self.latent = groups, observed, latent

    def observe(self, z: Tensor) -> Tensor:
        """Return x (G, ..., N) of states z (G, ..., M)."""
        raise NotImplementedError

    def initial(self, x1: Tensor) -> Tensor:
        """Return z_1 (G, B, M) of the first observations x1 (G, B, N), NaN where missing."""
        raise NotImplementedError

    def forcing(self, x: Tensor) -> Forcing:
        """Return the forced states of observations x (G, T, B, N), NaN where missing."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """Return the term (G,) that lambda_obs weighs; 0 for the identity."""
        raise NotImplementedError

    def _check(self, x: Tensor, ndim: int) -> None:
        if x.ndim != ndim or x.shape[0] != self.groups or x.shape[-1] != self.observed:
            axes = "B" if ndim == 3 else "T, B"
            raise ModelError(
                f"observations need shape (G, {axes}, N) with G = {self.groups} and N = {self.observed}, "
                f"got {tuple(x.shape)}"
            )


class IdentityObservation(Observation):
    """The first N latent units are observed."""

    kind = "identity"
    nothing: Tensor

    def __init__(self, observed: int, latent: int, seeds: Sequence[int]) -> None:
        super().__init__(len(seeds), observed, latent)
        self.register_buffer("nothing", torch.zeros(self.groups), persistent=False)
        extra = latent - observed
        drawn = per_group(seeds, "observation", lambda generator: {"L": glorot(generator, extra, observed)})
        self.L = nn.Parameter(drawn["L"]) if extra else None

    def observe(self, z: Tensor) -> Tensor:
        """Return the first N units."""
        return z[..., : self.observed]

    def initial(self, x1: Tensor) -> Tensor:
        """Return [x_1; L x_1]."""
        self._check(x1, 3)
        x1 = torch.nan_to_num(x1, nan=0.0)
        return x1 if self.L is None else torch.cat([x1, x1 @ self.L.mT], dim=-1)

    def forcing(self, x: Tensor) -> Forcing:
        """Return x and 0 for the units that are not observed."""
        self._check(x, 4)
        x = x.detach()
        missing = torch.isnan(x)
        extra = self.latent - self.observed
        states = nn.functional.pad(torch.where(missing, 0.0, x), (0, extra))
        if bool(missing.any()):
            return Forcing(states, nn.functional.pad((~missing).to(x.dtype), (0, extra)))
        return Forcing(states, (torch.arange(self.latent, device=x.device) < self.observed).to(x.dtype))

    def penalty(self) -> Tensor:
        """Return zeros."""
        return self.nothing


class AffineObservation(Observation):
    """A linear map, with an offset if ``bias``."""

    kind = "affine"

    def __init__(self, observed: int, latent: int, seeds: Sequence[int], *, bias: bool = False) -> None:
        super().__init__(len(seeds), observed, latent)
        drawn = per_group(
            seeds,
            "observation",
            lambda generator: {"B": math.sqrt(2 / latent) * torch.randn(observed, latent, generator=generator)},
        )
        self.B = nn.Parameter(drawn["B"])
        self.b = nn.Parameter(torch.zeros(self.groups, observed)) if bias else None

    def observe(self, z: Tensor) -> Tensor:
        """Return B z + b."""
        x = (z.flatten(1, -2) @ self.B.mT).reshape(*z.shape[:-1], self.observed)
        return x if self.b is None else x + self.b.reshape(self.groups, *(1,) * (z.ndim - 2), self.observed)

    def initial(self, x1: Tensor) -> Tensor:
        """Return pinv(B) (x_1 - b)."""
        self._check(x1, 3)
        return self._inverse(x1.unsqueeze(1)).states.squeeze(1)

    def forcing(self, x: Tensor) -> Forcing:
        """Return pinv(B) (x - b); see the module for missing entries."""
        self._check(x, 4)
        with torch.no_grad():
            states, reach = self._inverse(x)
            return Forcing(torch.where(reach == 0, 0.0, states), reach)

    def penalty(self) -> Tensor:
        """Return (1 - s_max / s_min)^2 with the singular values of B: the condition number is drawn to 1."""
        values = torch.linalg.svdvals(self.B)
        condition: Tensor = values[:, 0] / values[:, -1]
        return (1 - condition).square()

    def _inverse(self, x: Tensor) -> Forcing:
        """Return least-norm least squares of x (G, T, B, N), and which of them determine their state."""
        residual = x if self.b is None else x - self.b[:, None, None]
        missing = torch.isnan(x)
        if not bool(missing.any()):
            states = (residual.flatten(1, 2) @ torch.linalg.pinv(self.B).mT).reshape(*x.shape[:-1], self.latent)
            return Forcing(states, x.new_ones(self.latent))
        # rows of B that are 0 have no part in a pseudo-inverse; few patterns of missing entries recur
        patterns, which = torch.unique(~missing.flatten(0, 2), dim=0, return_inverse=True)
        masked = self.B.unsqueeze(1) * patterns.to(x.dtype).unsqueeze(-1)
        inverse = torch.linalg.pinv(masked)
        filled = torch.where(missing, 0.0, residual)
        which = which.reshape(self.groups, -1)
        rows = filled.flatten(1, 2)
        states = rows.new_zeros(*rows.shape[:-1], self.latent)
        for pattern in range(len(patterns)):
            here = (which == pattern).unsqueeze(-1)
            states = torch.where(here, rows @ inverse[:, pattern].mT, states)
        enough = (~missing).sum(-1, keepdim=True) >= min(self.observed, self.latent)
        reach = enough.to(x.dtype).expand(*x.shape[:-1], self.latent)
        return Forcing(states.reshape(*x.shape[:-1], self.latent), reach)


def make_observation(
    kind: ObservationKind,
    observed: int,
    latent: int,
    *,
    groups: int | None = None,
    seeds: Sequence[int] | None = None,
    bias: bool = False,
) -> Observation:
    """Return a read-out with fresh parameters; groups and seeds as :func:`tsforge.layers.plrnn.make_map`.

    Raises:
        ConfigError: the kind is unknown, sizes are out of range, or ``bias`` with the identity.
    """
    if kind not in get_args(ObservationKind):
        choices = get_args(ObservationKind)
        raise ConfigError(f"observation is {kind!r}; choose one of {', '.join(choices)}{nearest(kind, choices)}")
    if observed < 1 or latent < 1:
        raise ConfigError(f"a read-out needs sizes of at least 1, got observed = {observed} and latent = {latent}")
    if kind == "affine":
        return AffineObservation(observed, latent, group_seeds(groups, seeds), bias=bias)
    if bias:
        raise ConfigError("the identity read-out has no bias; leave it out or take observation 'affine'")
    if latent < observed:
        raise ConfigError(
            f"the identity read-out needs latent >= {observed} variates, got {latent}; take observation 'affine'"
        )
    return IdentityObservation(observed, latent, group_seeds(groups, seeds))
