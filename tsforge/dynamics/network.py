"""A map, its read-out and its forcing for G seeds side by side: the loss of a window, and runs from an observation.

    z_1 = initial(x_1),  z_k = F(z~_{k-1}) + C s_k,  z~ = (1 - alpha) z + alpha z_hat
    loss = mean (O(z_k) - x_k)^2, k = 2..T+1

External inputs s, if there are any, are those of the step that is predicted.
With features (``tsforge.layers.plrnn_hierarchical``) each window runs by the map of its series: windows are then the
groups of the recurrence. Read-out and alpha are shared; kappa is the largest of all windows. The loss is that of single
maps, not the likelihood with a variance of each series and variate of Brenner et al. (2024); one optimiser and learning
rate serves shared and individual numbers.

The loss compares the unforced prediction with the data. Source: Hess et al. (2023), arXiv 2306.04406, Algorithm 1.

Complete data take a short way that inverts the affine read-out once a step and never waits for the device.

Legend: G groups, B batch, T predicted steps, N variates, M latent units, K inputs, J series.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsforge.core.errors import ConfigError, ModelError, listing
from tsforge.dynamics.config import OptimConfig, PLRNNConfig
from tsforge.layers.plrnn import PLRNNMap, make_map
from tsforge.layers.plrnn_hierarchical import HierarchicalMaps
from tsforge.layers.plrnn_observation import AffineObservation, Forcing, Observation, make_observation
from tsforge.layers.teacher_forcing import AlphaSchedule, ForcingConfig
from tsforge.ops.plrnn import Backend, Shallow, free_run, gtf_loop, gtf_sequence
from tsforge.ops.plrnn_jacobian import kappa

_HIDDEN = 100


class Reconstruction(nn.Module):
    """G models of N variates.

    Args:
        model, forcing: see the config.
        observed: N.
        seeds: one a group; the first weights of a group depend on its seed alone.
        data_range: least and largest value of the data, between which thresholds of dendrites start.
        tau: interval of sparse forcing, if its config leaves it to the data.
        inputs: K, external inputs.
        series: names of the J series, for a model with features.

    Attributes:
        last_kappa: (G,) the last estimate that alpha followed, NaN before the first and without adaptive forcing.

    Raises:
        ConfigError: settings that contradict each other or the data.
    """

    def __init__(
        self,
        model: PLRNNConfig,
        forcing: ForcingConfig,
        observed: int,
        seeds: Sequence[int],
        *,
        data_range: tuple[float, float] | None = None,
        tau: int | None = None,
        inputs: int = 0,
        series: Sequence[str] = (),
    ) -> None:
        super().__init__()
        latent = observed if model.latent is None else model.latent
        hidden = model.hidden
        if hidden is None and (model.kind.endswith("shallow") or model.kind == "deep"):
            hidden = _HIDDEN
        if model.kind == "deep" and forcing.method == "adaptive":
            raise ConfigError(
                "adaptive forcing needs the Jacobians of a shallow form, which a deep PLRNN has not; "
                "set forcing.method=constant with forcing.start"
            )
        dendritic = model.kind.endswith("dendritic") and model.observation == "identity"
        self.map: PLRNNMap
        if model.features:
            assert isinstance(hidden, int)
            self.map = HierarchicalMaps(model.kind, len(series), latent, hidden, features=model.features, seeds=seeds)
        else:
            self.map = make_map(
                model.kind,
                latent,
                hidden,
                inputs=inputs,
                seeds=seeds,
                bases=model.bases,
                rectified=model.rectified,
                bounded=model.bounded,
                theta_range=data_range if dendritic else None,
            )
        self.series = tuple(series)
        self.observation: Observation = make_observation(
            model.observation, observed, latent, seeds=seeds, bias=model.bias
        )
        self.schedule = AlphaSchedule(forcing, len(seeds), tau=tau)
        self.seeds = tuple(seeds)
        self._partial = model.observation == "identity" and latent > observed
        self._last: tuple[Tensor, Tensor | None] | None = None  # forced states, and series of their windows
        self.last_kappa = torch.full((len(seeds),), torch.nan)

    @property
    def clipped(self) -> bool:
        """Whether the shallow form is the clipped one."""
        return self.map.clipped

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        train: OptimConfig,
        step: int,
        complete: bool,
        inputs: Tensor | None = None,
        series: Tensor | None = None,
    ) -> Tensor:
        """Return the loss (G,) of windows x (G, T + 1, B, N) against targets (G, T, B, N); updates alpha if it is due.

        Args:
            step: 1, 2, ... of the whole training.
            complete: no value is missing.
            inputs: (G, T, B, K) of the predicted steps, for a map with inputs.
            series: (G, B) indices of the series of the windows, for a map with features.
        """
        z1, forcing = self.inferred(x) if complete else (self.observation.initial(x[:, 0]), None)
        forced = forcing if forcing is not None else self.observation.forcing(x[:, 1:])
        params = None if self.map.kind == "deep" else self._shallow(series)
        if params is not None and self.schedule.due(step):
            self._estimate(params, forced, train.estimate_every)
        alpha = self.schedule.strength(forced.states.shape[1], forced.reach)
        pushes = None if inputs is None else self.map.input_term(inputs)
        if params is None:
            z = gtf_loop(self.map.step, z1, forced.states, alpha, pushes)
        else:
            options: dict[str, Any] = {"inputs": pushes, "clipped": self.clipped, "backend": train.backend}
            if series is None:
                z = gtf_sequence(z1, forced.states, alpha, params, **options)
            else:
                z = _window_by_window(z1, forced.states, alpha, params, options)
        if self._partial and self.schedule.due(step + 1):
            self._last = _mix(z.detach(), forced.states, alpha), series
        error = self.observation.observe(z) - targets
        if complete:
            loss = error.square().mean((1, 2, 3))
        else:
            seen = ~targets.isnan()
            squared = torch.where(seen, torch.nan_to_num(error), 0.0).square()
            loss = squared.sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)
        return self._penalised(loss, train)

    def _penalised(self, loss: Tensor, train: OptimConfig) -> Tensor:
        if train.lambda_lat:
            loss = loss + train.lambda_lat * self.map.penalty()
        if train.lambda_obs:
            loss = loss + train.lambda_obs * self.observation.penalty()
        if train.lambda_mar:
            loss = loss + train.lambda_mar * self.map.mar_penalty(train.mar_ratio)
        if train.lambda_self:
            loss = loss + train.lambda_self * self.map.self_penalty(train.self_limit)
        return loss

    def _estimate(self, params: Shallow, forced: Forcing, every: int) -> None:
        """Update alpha from the Jacobians at the forcing signals; at the last forced states where units are free.

        Zero-padded signals would be states that the model never visits.
        """
        states = forced.states
        if self._partial:
            if self._last is None:
                return
            states, series = self._last
            if series is not None:
                params = self._shallow(series)
        elif forced.reach.ndim == 4:
            states = torch.where(forced.reach > 0, states, torch.nan)
        method = self.schedule.config.estimator
        if self.series:
            found = kappa(params, _apart(states), method, clipped=self.clipped, every=every)
            found = found.view(len(states), -1).amax(1)
        else:
            found = kappa(params, states, method, clipped=self.clipped, every=every)
        self.last_kappa = found
        step = self.schedule.config.interval
        self.schedule.update(step, found)

    def inferred(self, x: Tensor) -> tuple[Tensor, Forcing]:
        """Return z_1 (G, B, M), differentiable, and what windows x (G, T + 1, B, N) without gaps force."""
        observation = self.observation
        if not isinstance(observation, AffineObservation):
            extra = observation.latent - observation.observed
            states = x[:, 1:] if not extra else nn.functional.pad(x[:, 1:], (0, extra))
            reach = (torch.arange(observation.latent, device=x.device) < observation.observed).to(x.dtype)
            L = getattr(observation, "L", None)
            first = x[:, 0]
            return (first if L is None else torch.cat([first, first @ L.mT], dim=-1)), Forcing(states, reach)
        if observation.b is not None:
            x = x - observation.b[:, None, None]
        inverse = _pseudo_inverse(observation.B)
        rows = x[:, 1:].detach()
        states = (rows.flatten(1, 2) @ inverse.detach().mT).view(*rows.shape[:-1], observation.latent)
        return x[:, 0] @ inverse.mT, Forcing(states, x.new_ones(observation.latent))

    def _shallow(self, series: Tensor | None) -> Shallow:
        """Return the map of each group; with features that of each window."""
        if (series is None) == bool(self.series):
            raise ModelError("a map with features needs the series of each window, another map has no use for them")
        if series is None:
            return self.map.shallow()
        assert isinstance(self.map, HierarchicalMaps)
        return self.map.shallow(series)

    def group(self, index: int, series: str | None = None) -> Model:
        """Return one trained model in float64 on the CPU; with features that of one series.

        Raises:
            ModelError: a series without features, the reverse, or an unknown one.
        """
        if (series is None) == bool(self.series) or (series is not None and series not in self.series):
            raise ModelError(f"the model has the series {listing(list(self.series)) or '(none)'}, asked for: {series}")
        return Model(self, index, series=series)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return every parameter of one group without its axis, float32, by name."""
        return {name: value[index].detach().float().contiguous() for name, value in self.named_parameters()}

    def features(self, index: int) -> dict[str, list[float]]:
        """Return the V numbers of every series of one group; empty without features."""
        if not isinstance(self.map, HierarchicalMaps):
            return {}
        return dict(zip(self.series, self.map.vectors[index].tolist(), strict=True))


def _pseudo_inverse(B: Tensor) -> Tensor:
    """Return pinv(B) (G, M, N). On a GPU by the normal equations in float64, since a decomposition waits for it."""
    if not B.is_cuda:
        inverse: Tensor = torch.linalg.pinv(B)
        return inverse
    exact = B.double()
    tall = B.shape[-2] >= B.shape[-1]
    gram = exact.mT @ exact if tall else exact @ exact.mT
    inverted: Tensor = torch.linalg.inv_ex(gram).inverse
    return (inverted @ exact.mT if tall else exact.mT @ inverted).to(B)


def _apart(values: Tensor) -> Tensor:
    """Return values (G, T, B, M) of windows as those of G B groups with one window each (G B, T, 1, M)."""
    return values.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def _window_by_window(z1: Tensor, states: Tensor, alpha: Tensor, params: Shallow, options: dict[str, Any]) -> Tensor:
    """Return ``gtf_sequence`` (G, T, B, M) of windows with a map each, the G B groups of ``params``."""
    groups, batch = z1.shape[:2]
    each = _apart(alpha) if alpha.ndim == 4 else alpha.repeat_interleave(batch, dim=0)
    z = gtf_sequence(z1.flatten(0, 1).unsqueeze(1), _apart(states), each, params, **options)
    return z.reshape(groups, batch, z.shape[1], z.shape[-1]).transpose(1, 2)


def _mix(z: Tensor, states: Tensor, alpha: Tensor) -> Tensor:
    """Return the forced states (G, T, B, M)."""
    if alpha.ndim == 2:
        alpha = alpha[:, None, None]
    elif alpha.ndim == 3:
        alpha = alpha[:, :, None]
    alpha = alpha.to(z)
    return torch.where(alpha == 0, z, (1 - alpha) * z + alpha * states)


class Model:
    """One trained model in float64 on the CPU: free runs and steps, as the evaluation needs them.

    Attributes:
        params: its shallow form without inputs, None for a deep map.
        alpha: the last strength of the forcing.
        inputs: K.
    """

    def __init__(
        self, parts: Reconstruction, index: int, backend: Backend = "auto", *, series: str | None = None
    ) -> None:
        self._parts = copy.deepcopy(parts).double().cpu()
        for name, parameter in self._parts.named_parameters():
            owner, _, last = name.rpartition(".")
            fixed = nn.Parameter(parameter.detach()[index : index + 1].clone(), requires_grad=False)
            setattr(self._parts.get_submodule(owner), last, fixed)
        self._parts.map.groups = self._parts.observation.groups = 1
        if isinstance(self._parts.map, HierarchicalMaps):
            assert series is not None
            self._parts.map = self._parts.map.alone(parts.series.index(series))
        self._backend = backend
        self.clipped = parts.clipped
        self.latent, self.inputs = parts.map.latent, parts.map.inputs
        self.alpha = float(parts.schedule.alpha[index])
        self.params: Shallow | None = None
        if parts.map.kind != "deep":
            self.params = Shallow(*(part[0].detach() for part in self._parts.map.shallow()))

    @property
    def is_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(part.isfinite().all()) for part in self._parts.parameters())

    def diagonal(self) -> Tensor:
        """Return A (M,)."""
        return self._parts.map.A[0].detach()

    def initial(self, x: Tensor) -> Tensor:
        """Return z (B, M) of observations x (B, N)."""
        return self._parts.observation.initial(x.unsqueeze(0))[0]

    def observe(self, z: Tensor) -> Tensor:
        """Return x (..., N) of states z (..., M)."""
        return self._parts.observation.observe(z.unsqueeze(0))[0]

    @torch.no_grad()
    def push(self, s: Tensor) -> Tensor:
        """Return C s (..., M) of inputs s (..., K)."""
        return self._parts.map.input_term(s.unsqueeze(0))[0]

    def held(self, s: Tensor) -> Shallow | None:
        """Return the shallow form of the map whose inputs stay at s (K,): C s joins h1. None for a deep map."""
        return None if self.params is None else self.params._replace(h1=self.params.h1 + self.push(s[None])[0])

    @torch.no_grad()
    def step(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        """Return F(z) for z (B, M), or F(z) + C s with the inputs s (B, K) of the target step."""
        after = self._parts.map.step(z.unsqueeze(0))[0]
        return after if s is None else after + self.push(s)

    @torch.no_grad()
    def run(self, z: Tensor, steps: int, every: int = 1, inputs: Tensor | None = None) -> Tensor:
        """Return the states (steps // every, B, M) of a free run from z (B, M), driven by inputs (steps, B, K)."""
        pushes = None if inputs is None else self.push(inputs)
        if self.params is not None:
            options: dict[str, Any] = {"inputs": pushes, "clipped": self.clipped, "backend": self._backend}
            return free_run(z, self.params, steps, every=every, **options)
        found = []
        for k in range(1, steps // every * every + 1):
            z = self.step(z) if pushes is None else self.step(z) + pushes[k - 1]
            if k % every == 0:
                found.append(z)
        return torch.stack(found)
