"""The predictive-coding-inspired variational recurrent network (PV-RNN): its recurrence, free energy and inference.

Levels l go from fast (the first, which is read out) to slow; d = tanh(h); every level has a stochastic z of its own:

    h[t] = (1 - 1/tau) h[t-1] + (1/tau) (W d[t-1] + W_z z[t] + W_top d_above[t] (+ W_bottom d_below[t-1]) + b)
    prior      p[t] = N(tanh(U d[t-1] + b), exp(U' d[t-1] + b')),   p[1] = N(0, 1)
    posterior  q[t] = N(tanh(V d[t-1] + v + a[t]), exp(V' d[t-1] + v' + a'[t]))
    read-out   x[t] ~ N(R d_fast[t] + r, s^2)

There is no encoder: what was observed never enters forward. The free vectors a of a window are found by descending its
free energy (*error regression*),

    F = sum_t [ -log N(x[t]; x^[t], s^2) / V + sum_l w_l / Z_l KL(q[t] || p[t]) ].

Source: Ahmadi, Tani (2019), A Novel Predictive-Coding-Inspired Variational RNN Model for Online Prediction and
Recognition, Neural Computation 31 (11), arXiv 1811.01339. Choices where the paper leaves or makes others: Gaussian
read-out with a learnt s for each variate (instead of a softmax over bins), the state of the level above is that of the
same step, the first step has a weight of its own, and v, v' are a learnt common start of the free vectors, which begin
at 0.

Legend: B windows, T steps, V variates, D units and Z latents of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SIGMA = 0.1  # deviation of z at the start of training, prior and posterior alike
_FIRST_NOISE = 0.5  # deviation of the read-out at the start of training
_LEAST_NOISE = 0.01  # and at least: a variate that never moves must not be infinitely certain
_BETAS = (0.9, 0.999)
_EPSILON = 1e-4  # inside the root: what is inferred is then smooth in what was observed


class LevelState(NamedTuple):
    """Potential h and activity d of a level, both [B, D]."""

    h: Tensor
    d: Tensor


class Gaussians(NamedTuple):
    """Diagonal normal distributions: mean and logarithm of the deviation, same shape."""

    mean: Tensor
    log_sigma: Tensor

    def at(self, noise: Tensor | None) -> Tensor:
        """Return the value that standard normal noise stands for, the mean without."""
        return self.mean if noise is None else torch.addcmul(self.mean, self.log_sigma.exp(), noise)


class Path(NamedTuple):
    """A pass under the posterior: activity [B, T, D] of the fast level, posteriors and priors [B, T, Z] by level, and
    the states after the last step."""

    fast: Tensor
    posteriors: tuple[Gaussians, ...]
    priors: tuple[Gaussians, ...]
    states: tuple[LevelState, ...]


class FreeEnergy(NamedTuple):
    """Parts of F: the cost of every cell [B, T, V], 0 where not observed, and the weighted divergence [B, T]."""

    reconstruction: Tensor
    divergence: Tensor

    def total(self) -> Tensor:
        """Return F [B]."""
        return (self.reconstruction.mean(-1) + self.divergence).sum(-1)


def divergence(q: Gaussians, p: Gaussians) -> Tensor:
    """Return KL(q || p) in nats, summed over the last axis."""
    ratio = q.log_sigma - p.log_sigma
    gap = (q.mean - p.mean) * torch.exp(-p.log_sigma)
    return (0.5 * (torch.exp(2 * ratio) + gap.square() - 1) - ratio).sum(-1)


class Level(nn.Module):
    """Leaky units of one time constant, and the distributions of their z.

    Args:
        units, latents: D and Z. above, below: units of the neighbours that it hears.
        tau: time constant in steps, at least 1; 1 is a plain recurrent network.
    """

    def __init__(self, units: int, latents: int, tau: float, *, above: int = 0, below: int = 0) -> None:
        super().__init__()
        self.units, self.latents, self.rate = units, latents, 1.0 / tau
        self.prior = nn.Linear(units, 2 * latents)
        self.posterior = nn.Linear(units, 2 * latents)
        self.drive = nn.Linear(units + latents + above + below, units)
        for moments in (self.prior, self.posterior):
            with torch.no_grad():
                moments.bias[latents:] = math.log(_SIGMA)

    def priors(self, d: Tensor) -> Gaussians:
        """Return the prior after activity d [..., D]."""
        return _bounded(self.prior(d))

    def advance(self, state: LevelState, heard: Sequence[Tensor]) -> LevelState:
        """Return the state after a step that heard d, z and the neighbours, each [B, ...]."""
        h = torch.lerp(state.h, self.drive(torch.cat([state.d, *heard], dim=-1)), self.rate)
        return LevelState(h, torch.tanh(h))


def _bounded(raw: Tensor) -> Gaussians:
    mean, log_sigma = raw.chunk(2, dim=-1)
    return Gaussians(torch.tanh(mean), log_sigma)


class PredictiveCodingNetwork(nn.Module):
    """Levels, read-out and inference.

    Args:
        variates: V.
        units, latents, time_constants: of every level, fast to slow.
        meta_prior: weight w of the divergence of every level.
        first_weight: weight of the first step, whose prior is N(0, 1).
        bottom_up: levels hear the one below them too.
        params: numbers read out for a step and variate, the first is the location.
    """

    def __init__(
        self,
        variates: int,
        units: Sequence[int],
        latents: Sequence[int],
        time_constants: Sequence[float],
        *,
        meta_prior: Sequence[float],
        first_weight: float,
        bottom_up: bool = False,
        params: int = 1,
    ) -> None:
        super().__init__()
        self.variates, self.params, self.bottom_up = variates, params, bottom_up
        self.meta_prior, self.first_weight = tuple(meta_prior), first_weight
        self.levels = nn.ModuleList(
            Level(
                units[level],
                latents[level],
                time_constants[level],
                above=units[level + 1] if level + 1 < len(units) else 0,
                below=units[level - 1] if bottom_up and level else 0,
            )
            for level in range(len(units))
        )
        self.read = nn.Linear(units[0], variates * params)
        self.log_sigma = nn.Parameter(torch.full((variates,), math.log(_FIRST_NOISE)))

    # ---- forward

    def free_vectors(self, windows: int, steps: int) -> Tensor:
        """Return free vectors [B, T, sum of 2 Z] before any inference: zeros."""
        return self.log_sigma.new_zeros(windows, steps, 2 * sum(level.latents for level in self._levels))

    def follow(self, free: Tensor, *, sample: bool = False) -> Path:
        """Return the pass of windows under the posterior of their free vectors, from a state of zeros.

        Args:
            free: [B, T, sum of 2 Z], level by level mean and log deviation.
            sample: draw z, else take its mean.
        """
        windows, steps = free.shape[:2]
        states = self._rest(windows, free)
        sizes = [2 * level.latents for level in self._levels]
        starts = torch.cat([level.posterior.bias for level in self._levels])
        parts = [part.unbind(1) for part in torch.split(free + starts, sizes, dim=-1)]
        noise = self._noise(windows, steps, sample)
        before: list[list[Tensor]] = [[] for _ in self._levels]
        chosen: list[list[Tensor]] = [[] for _ in self._levels]
        fast: list[Tensor] = []
        for step in range(steps):
            drawn = []
            for place, level in enumerate(self._levels):
                raw = torch.addmm(parts[place][step], states[place].d, level.posterior.weight.t())
                before[place].append(states[place].d)
                chosen[place].append(raw)
                drawn.append(_bounded(raw).at(noise[place][step]))
            states = self._advance(states, drawn)
            fast.append(states[0].d)
        posteriors, priors = [], []
        for place, level in enumerate(self._levels):
            posteriors.append(_bounded(torch.stack(chosen[place], dim=1)))
            later = level.priors(torch.stack(before[place], dim=1)[:, 1:])
            priors.append(Gaussians(*(nn.functional.pad(part, (0, 0, 1, 0)) for part in later)))  # first: N(0, 1)
        return Path(torch.stack(fast, dim=1), tuple(posteriors), tuple(priors), tuple(states))

    def roll(self, states: Sequence[LevelState], steps: int, *, sample: bool = False) -> Tensor:
        """Return the activity [B, steps, D] of the fast level when z follows its prior after ``states``."""
        found = []
        noise = self._noise(len(states[0].d), steps, sample)
        for step in range(steps):
            drawn = [level.priors(states[place].d).at(noise[place][step]) for place, level in enumerate(self._levels)]
            states = self._advance(states, drawn)
            found.append(states[0].d)
        return torch.stack(found, dim=1)

    def read_out(self, fast: Tensor) -> Tensor:
        """Return parameters [B, T, V, K] of activities [B, T, D]."""
        read: Tensor = self.read(fast)
        return read.reshape(*read.shape[:-1], self.variates, self.params)

    @property
    def _levels(self) -> list[Level]:
        return [level for level in self.levels if isinstance(level, Level)]

    def _noise(self, windows: int, steps: int, sample: bool) -> list[tuple[Tensor | None, ...]]:
        """Return by level the standard normal noise [B, Z] of every step, None where the mean is followed."""
        if not sample:
            return [(None,) * steps for _ in self._levels]
        sizes = [level.latents for level in self._levels]
        noise = torch.randn(windows, steps, sum(sizes), dtype=self.log_sigma.dtype, device=self.log_sigma.device)
        return [part.unbind(1) for part in torch.split(noise, sizes, dim=-1)]

    def _rest(self, windows: int, like: Tensor) -> list[LevelState]:
        zeros = [like.new_zeros(windows, level.units) for level in self._levels]
        return [LevelState(part, part) for part in zeros]

    def _advance(self, states: Sequence[LevelState], drawn: Sequence[Tensor]) -> list[LevelState]:
        """Return the states after a step: slow levels first, each tells the one below."""
        found: list[LevelState] = []
        for place in reversed(range(len(self._levels))):
            heard = [drawn[place], *(state.d for state in found[-1:])]
            if self.bottom_up and place:
                heard.append(states[place - 1].d)
            found.append(self._levels[place].advance(states[place], heard))
        return found[::-1]

    # ---- free energy and inference

    def sigma(self) -> Tensor:
        """Return the deviation s [V] of the read-out, in the units of the data."""
        return _LEAST_NOISE + self.log_sigma.exp()

    def energy(self, path: Path, x: Tensor, mask: Tensor) -> FreeEnergy:
        """Return the free energy of windows x [B, T, V], observed where ``mask`` is True, along a pass."""
        sigma = self.sigma()
        error = torch.where(mask, x - self.read_out(path.fast)[..., 0], 0.0) / sigma
        cost = 0.5 * error.square() + sigma.log() + 0.5 * math.log(2 * math.pi)
        weighted = cost.new_zeros(cost.shape[:2])
        levels = zip(path.posteriors, path.priors, self.meta_prior, self._levels, strict=True)
        for posterior, prior, weight, level in levels:
            weights = cost.new_full(cost.shape[1:2], weight)
            weights[0] = self.first_weight
            weighted = weighted + weights / level.latents * divergence(posterior, prior)
        return FreeEnergy(torch.where(mask, cost, 0.0), weighted)

    def infer(
        self, x: Tensor, mask: Tensor, *, steps: int, rate: float, sample: bool = False, through: bool = False
    ) -> Tensor:
        """Return the free vectors of windows after ``steps`` steps of Adam on F from zeros; weights stay.

        Args:
            x, mask: [B, T, V]; cells that are not observed are not read.
            steps, rate: of the descent, the same for every window, whatever stands beside it.
            sample: draw z afresh in every step, else its mean is followed.
            through: keep the graph, so that the result is differentiable in x.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x
            mask = mask.clone() if mask.is_inference() else mask
            free = self.free_vectors(*x.shape[:2]).requires_grad_()
            mean, square = torch.zeros_like(free), torch.zeros_like(free)
            for step in range(1, steps + 1):
                total = self.energy(self.follow(free, sample=sample), x, mask).total()
                (slope,) = torch.autograd.grad(total.sum(), free, create_graph=through)
                mean = torch.lerp(slope, mean, _BETAS[0])
                square = torch.lerp(slope.square(), square, _BETAS[1])
                size = (square / (1 - _BETAS[1] ** step) + _EPSILON**2).sqrt()
                free = free - rate * mean / (1 - _BETAS[0] ** step) / size
                if not through:
                    free = free.detach().requires_grad_()
        return free if through else free.detach()
