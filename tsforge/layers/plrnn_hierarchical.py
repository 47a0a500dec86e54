"""One (clipped) shallow PLRNN for many series: all weights are linear in a small vector of each series.

    A_j = p_j P_A,   W1_j = p_j P_W1,   W2_j = p_j P_W2,   h1_j = p_j P_h1,   h2_j = p_j P_h2

The tensors P are shared, the vector p_j (V numbers) and the log-variances of the observations belong to series j. A new
series needs only these (:meth:`HierarchicalMap.adapted`). Series selected for a batch are the groups of the primitive.

Source: Brenner et al. (2024), hierarchical dynamical systems reconstruction, and the initial values of its code (P
Xavier uniform with gain 0.1 as matrices of V rows, all p_j equal, from U(-1, 1)). Deviation: none known; the full text
could not be read.

:class:`HierarchicalMap` is one model, :class:`HierarchicalMaps` several seeds of it side by side, for training.

Legend: J series, V numbers of a series, G selected series (of the maps: seeds), B windows, N variates, M latent units,
H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.plrnn import MapKind, PLRNNMap, ShallowMap
from tsforge.layers.plrnn_init import uniform
from tsforge.ops.plrnn import Shallow

_GAIN = 0.1
_SHARED = ("P_A", "P_W1", "P_W2", "P_h1", "P_h2")


def _mixed(p: Tensor, shared: Sequence[Tensor], latent: int, hidden: int) -> Shallow:
    """Return the maps of vectors p (..., V), linear in the shared tensors (V, .), or (G, V, .) for p (G, ..., V)."""
    A, W1, W2, h1, h2 = (p @ part for part in shared)
    ahead = p.shape[:-1]
    return Shallow(A, W1.reshape(*ahead, latent, hidden), W2.reshape(*ahead, hidden, latent), h1, h2)


class HierarchicalMap(nn.Module):
    """Maps of J series.

    Args:
        series: J.
        observed: N, for the variances.
        latent, hidden: M and H.
        features: V.
        clipped: the clipped map.
        seed: of the initial values; None draws one from torch's global generator.

    Raises:
        ConfigError: a size is below 1.
    """

    def __init__(
        self,
        series: int,
        observed: int,
        latent: int,
        hidden: int,
        *,
        features: int = 10,
        clipped: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if min(series, observed, latent, hidden, features) < 1:
            raise ConfigError("a hierarchical PLRNN needs at least 1 series, variate, latent, hidden unit and feature")
        self.latent, self.hidden, self.clipped = latent, hidden, clipped
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)

        def shared(count: int) -> nn.Parameter:
            bound = _GAIN * math.sqrt(6 / (features + count))
            return nn.Parameter(uniform(generator, -bound, bound, features, count))

        self.P_A, self.P_h1, self.P_h2 = shared(latent), shared(latent), shared(hidden)
        self.P_W1, self.P_W2 = shared(latent * hidden), shared(hidden * latent)
        self.vectors = nn.Parameter(uniform(generator, -1.0, 1.0, features).repeat(series, 1))
        self.log_variance = nn.Parameter(torch.zeros(series, observed))

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the tensors P."""
        yield from (getattr(self, name) for name in _SHARED)

    def individual_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the vectors and the log-variances, which have a learning rate of their own."""
        yield from (self.vectors, self.log_variance)

    def shallow(self, series: Tensor | None = None) -> Shallow:
        """Return the maps of the series with indices ``series`` (G,), all if None, grouped and differentiable.

        Raises:
            ModelError: ``series`` is no list of indices of series.
        """
        p = self._selected(self.vectors, series)
        return _mixed(p, list(self.shared_parameters()), self.latent, self.hidden)

    def step(self, z: Tensor, series: Tensor | None = None) -> Tensor:
        """Return F(z), z (G, B, M): row g by the map of series g, summed over the V shared maps; no weights built."""
        p = self._selected(self.vectors, series)
        W1 = self.P_W1.reshape(-1, self.latent, self.hidden)
        W2 = self.P_W2.reshape(-1, self.hidden, self.latent)
        seen = torch.einsum("gv,vhi,gbi->gbh", p, W2, z)
        hidden = torch.relu(seen + torch.einsum("gv,vh->gh", p, self.P_h2)[:, None])
        if self.clipped:
            hidden = hidden - torch.relu(seen)
        kept = torch.einsum("gv,vi,gbi->gbi", p, self.P_A, z)
        return kept + torch.einsum("gv,vih,gbh->gbi", p, W1, hidden) + torch.einsum("gv,vi->gi", p, self.P_h1)[:, None]

    def nll(self, x: Tensor, predicted: Tensor, series: Tensor | None = None) -> Tensor:
        """Return the mean Gaussian negative log-likelihood (G,) of x and ``predicted`` (G, ..., N) where x is no NaN.

        A series without any observation gives 0.
        """
        log_variance = self._selected(self.log_variance, series)
        log_variance = log_variance.reshape(len(log_variance), *(1,) * (x.ndim - 2), -1)
        present = ~torch.isnan(x)
        error = torch.where(present, x, 0.0) - torch.where(present, predicted, 0.0)
        each = 0.5 * (log_variance + error.square() * torch.exp(-log_variance) + math.log(2 * math.pi))
        count = present.flatten(1).sum(1).clamp(min=1)
        return torch.where(present, each, 0.0).flatten(1).sum(1) / count

    def adapted(self, series: int) -> HierarchicalMap:
        """Return a copy for ``series`` new series: shared tensors frozen, vectors at the mean of the known ones.

        Log-variances start at their mean as well.
        """
        observed, features = self.log_variance.shape[1], self.vectors.shape[1]
        found = HierarchicalMap(
            series, observed, self.latent, self.hidden, features=features, clipped=self.clipped, seed=0
        ).to(self.vectors)
        with torch.no_grad():
            for mine, theirs in zip(self.shared_parameters(), found.shared_parameters(), strict=True):
                theirs.copy_(mine)
                theirs.requires_grad_(False)
            for mine, theirs in zip(self.individual_parameters(), found.individual_parameters(), strict=True):
                theirs.copy_(mine.mean(0, keepdim=True))
        return found

    def _selected(self, values: Tensor, series: Tensor | None) -> Tensor:
        if series is None:
            return values
        if series.ndim != 1 or series.dtype not in (torch.int32, torch.int64):
            raise ModelError(f"series need integer indices of shape (G,), got {series.dtype} {tuple(series.shape)}")
        return values[series]


class HierarchicalMaps(PLRNNMap):
    """Maps of J series for G seeds side by side; a seed starts from the numbers that it gives a ``HierarchicalMap``.

    Args:
        kind: ``shallow`` or ``clipped_shallow``.
        series: J.
        latent, hidden: M and H.
        features: V.
        seeds: G of them.

    Attributes:
        vectors: (G, J, V); the shared tensors are ``P_A`` (G, V, M) and so on.

    Raises:
        ConfigError: a size is below 1, or a map of another kind.
    """

    vectors: Tensor

    def __init__(
        self, kind: MapKind, series: int, latent: int, hidden: int, *, features: int, seeds: Sequence[int]
    ) -> None:
        if kind not in ("shallow", "clipped_shallow"):
            raise ConfigError(f"features of series are for the shallow and the clipped shallow PLRNN, not for '{kind}'")
        nn.Module.__init__(self)  # A is no parameter here
        self.kind, self.bounded, self.clipped = kind, False, kind == "clipped_shallow"
        self.groups, self.latent, self.hidden, self.inputs = len(seeds), latent, hidden, 0
        self.register_parameter("C", None)
        first = [HierarchicalMap(series, 1, latent, hidden, features=features, seed=seed) for seed in seeds]
        for name in (*_SHARED, "vectors"):
            self.register_parameter(name, nn.Parameter(torch.stack([getattr(one, name).detach() for one in first])))

    @property
    def A(self) -> Tensor:
        """The diagonals of all series (G, J M)."""
        found: Tensor = self._maps(self.vectors).A.flatten(1)
        return found

    def shallow(self, series: Tensor | None = None) -> Shallow:
        """Return the maps of windows of the series with indices ``series`` (G, B) as G B groups; None: of all J."""
        p = self.vectors
        if series is not None:
            p = torch.take_along_dim(p, series.unsqueeze(-1), dim=1)
        return Shallow(*(part.flatten(0, 1) for part in self._maps(p)))

    def penalty(self) -> Tensor:
        """Return the penalty of a shallow map, mean over the series (G,)."""
        A, *others = self._maps(self.vectors)
        parts = [1 - A, *others]
        return torch.stack([part.square().flatten(2).sum(2) for part in parts]).sum(0).mean(1)

    def alone(self, series: int) -> ShallowMap:
        """Return the maps of one series as shallow ones that know nothing of the others."""
        A, W1, W2, h1, h2 = (part[:, 0].detach().clone() for part in self._maps(self.vectors[:, series : series + 1]))
        return ShallowMap(self.kind, {"A": A, "W1": W1, "W2": W2, "h1": h1, "h2": h2}, bounded=False)

    def _maps(self, p: Tensor) -> Shallow:
        """Return the maps of vectors p (G, B, V)."""
        return _mixed(p, [getattr(self, name) for name in _SHARED], self.latent, self.hidden)
