"""Piecewise-linear recurrent network (PLRNN) with generalized teacher forcing as a forecaster.

Hess, Monfared, Brenner, Durstewitz (2023), Generalized Teacher Forcing for Learning Chaotic Dynamics, ICML, arXiv
2306.04406; the maps and their sources are in :mod:`tsforge.layers.plrnn`.

    z[t] = F(z~[t-1]) + C s[t],    z~[t] = (1 - alpha) z[t] + alpha z^[t],    x[t] = O(z[t])

z^ is the state that an observation implies, s the known covariates of the step that is predicted. Over the context the
state is forced with the strength of a state observer (``gain``), over the horizon it runs freely. Missing entries are
not forced and not in the loss, so nothing has to be filled in.

Members of the ensemble are models side by side in one recurrence. While training, each member takes its own part of a
batch, so that a step costs as much as that of one member; a forecast is their mean.

Beside a linear map (``skip``) the forecast is y = linear + share (free run - linear), a share from 0 to 1 for each
variate. The linear map is solved before training, which goes on without it; the share is then the one with the least
squared error on held-out windows, where the forecast is thus no worse than either part. The state has no linear part.

Deviations. Each window is normalised by its own context, on top of the usual scaling. Objective ``gtf`` forces with the
data over the horizon too, as in the paper; its loss weighs every step alike, and the trainer clips gradients and uses
AdamW instead of RAdam. Objective ``horizon`` (warm-up, free run, loss on the free run) is not from the paper. Adaptive
forcing estimates kappa after a step and at the forced states, which exist for units that are never observed, and uses
it from the next step on. ``bounded`` maps, the tuned gain, per variate, the cut of innovations and the linear map are
additions.

Legend: B batch, G members, b rows of a member, L context, H horizon, T steps, N variates, M latent units, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import pad

from tsforge.contracts.model import Capabilities, OptimRule, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, TrainingSeries
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.plrnn import AlmostLinearMap, MapKind, make_map
from tsforge.layers.plrnn_observation import ObservationKind, make_observation
from tsforge.layers.teacher_forcing import AlphaSchedule, ForcingConfig
from tsforge.models._plrnn_gain import choose_gain, thinned
from tsforge.models._plrnn_growth import error_growth
from tsforge.models._residual import ResidualConfig, ResidualForecaster
from tsforge.models._ssm_rows import shifted
from tsforge.models.registry import register
from tsforge.ops.plrnn import gtf_loop, gtf_sequence
from tsforge.ops.plrnn_jacobian import kappa

_HIDDEN = 256
_LATENT, _EXTRA = 64, 32  # latent units by default: at least so many, and so many beside the variates
_MOST_CELLS = 1 << 25  # numbers of all states that a forecast without gradients holds at once
_CONTEXT_WEIGHT = 0.1
_ESTIMATE_EVERY = 4  # steps between those that an estimate of kappa looks at
_MOST_RECTIFIED = 12  # rectified units up to which regions are told apart


class PLRNNForecastConfig(ResidualConfig):
    """Settings of the PLRNN forecaster; ``skip: auto`` is the closed form, none where ``normalisation`` is none."""

    name: Literal["plrnn"] = "plrnn"
    kind: MapKind = "clipped_shallow"
    """The map, see ``tsforge.layers.plrnn``."""
    latent: int | None = Field(default=None, ge=1)
    """Latent units M; default 64, and 32 more than variates for the identity read-out."""
    hidden: int | tuple[int, ...] | None = None
    """Hidden units of shallow kinds (default 256); widths of the deep one."""
    bases: int | None = Field(default=None, ge=1)
    """Bases of dendritic kinds."""
    rectified: int | None = Field(default=None, ge=0)
    """Rectified units of ``almost_linear``."""
    bounded: bool = True
    """Keep |A| below 1: a clipped map can then not diverge."""
    observation: ObservationKind = "identity"
    """The first units are the variates, or an affine read-out (for many variates)."""
    ensemble: int = tunable(4, choices=[1, 2, 4, 8], ge=1)
    """Members, trained side by side on parts of each batch."""
    objective: Literal["gtf", "horizon"] = tunable("gtf", choices=["gtf", "horizon"])
    """Loss of forced steps of the whole window, or of the free run over the horizon after a forced context."""
    context_weight: float | None = Field(default=None, ge=0.0)
    """Weight of the loss over the context with ``objective: horizon``; default 0.1."""
    forcing: ForcingConfig = ForcingConfig(method="constant", start=0.1)
    """Strength of the forcing while training; ``forcing.start`` alone is a constant one."""
    gain: Literal["innovation", "horizon"] | Annotated[float, Field(ge=0.0, le=1.0)] = "innovation"
    """Strength of the forcing by the context of a forecast: chosen after training by the one-step error (for each
    variate with the identity read-out) or by the error over the horizon, or a number."""
    innovation_clip: float | None = Field(default=None, gt=0.0)
    """Cut innovations at so many deviations of the one-step error when a forecast is made, so that an outlier does not
    enter the state; null cuts nothing."""

    @field_validator("gain", mode="before")
    @classmethod
    def _name_or_number(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("innovation", "horizon"):
            raise ValueError(f"'{value}' is neither innovation, horizon nor a number from 0 to 1")
        return value

    @field_validator("forcing", mode="before")
    @classmethod
    def _constant_by_default(cls, value: Any) -> Any:
        return {"method": "constant", "start": 0.1, **value} if _lacks_method(value) else value

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that contradict each other or have no effect."""
        super().model_post_init(context)
        if self.skip == "learned":
            raise ConfigError("model.skip: the PLRNN is trained without the linear map; use closed_form or none")
        if self.ridge is not None and not self.mixes:
            raise ConfigError("model.ridge has no effect with normalisation 'none' unless skip is closed_form")
        if self.context_weight is not None and self.objective != "horizon":
            raise ConfigError("model.context_weight has no effect with objective 'gtf', which weighs all steps alike")
        if self.kind == "deep" and self.forcing.method == "adaptive":
            raise ConfigError(
                "model.forcing: adaptive forcing needs Jacobians of a shallow form, which kind 'deep' has not; use "
                "method constant"
            )
        if self.forcing.method == "sparse" and self.forcing.tau is None:
            raise ConfigError("model.forcing.tau: sparse forcing needs the interval between forced steps")
        if self.observation == "affine" and self.innovation_clip is not None:
            raise ConfigError("model.innovation_clip cuts innovations of variates and needs observation 'identity'")

    @property
    def mixes(self) -> bool:
        """True when there is a linear map beside the free run."""
        return self.skip == "closed_form" or (self.skip == "auto" and self.normalisation != "none")


def _lacks_method(value: Any) -> bool:
    return isinstance(value, dict) and "method" not in value


class _Forced(NamedTuple):
    """Unforced predictions z (G, T, b, M) of forced steps, and the forced state (G, b, M) after the last."""

    z: Tensor
    state: Tensor


@register("plrnn")
class PLRNN(ResidualForecaster[PLRNNForecastConfig]):
    """A recurrent map that follows the context as a state observer and then runs freely."""

    config_class = PLRNNForecastConfig
    capabilities = Capabilities(
        known_covariates=True,
        static_covariates=True,
        context_outputs=True,
        variate_coupling=True,
        teacher_forced=True,
        probabilistic=False,
        scaling=("global", "series", "none"),
    )
    source = (
        "Hess, Monfared, Brenner, Durstewitz (2023), Generalized Teacher Forcing for Learning Chaotic Dynamics, ICML, "
        "arXiv 2306.04406"
    )
    test_configs = (
        {"latent": 12, "hidden": 24, "ensemble": 2, "forcing": {"start": 0.3}},
        {"latent": 12, "hidden": 24, "ensemble": 2, "objective": "horizon", "normalisation": "none"}
        | {"skip": "closed_form"},
        {"kind": "almost_linear", "latent": 12, "rectified": 4, "ensemble": 1, "objective": "horizon"}
        | {"observation": "affine", "gain": 0.5, "normalisation": "none"},
        {"latent": 12, "hidden": 24, "ensemble": 2, "forcing": {"method": "adaptive", "interval": 2}}
        | {"innovation_clip": 3.0, "normalisation": "last"},
        {"kind": "deep", "latent": 12, "hidden": [24], "ensemble": 1, "objective": "horizon", "gain": "horizon"}
        | {"skip": "none"},
    )
    patch = 1
    part_name = "free_run"
    gain: Tensor
    innovation: Tensor
    settled: Tensor
    share: Tensor
    steps: Tensor

    def __init__(self, config: PLRNNForecastConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        layered = config.kind.endswith("shallow") or config.kind == "deep"
        hidden = _HIDDEN if config.hidden is None and layered else config.hidden
        latent = config.latent
        if latent is None:
            latent = _LATENT if config.observation == "affine" else max(_LATENT, spec.num_variates + _EXTRA)
        seeds = torch.randint(2**31, (config.ensemble,)).tolist()
        self.map = make_map(
            config.kind,
            latent,
            hidden,
            inputs=spec.num_known + spec.num_static,
            seeds=seeds,
            bases=config.bases,
            rectified=config.rectified,
            bounded=config.bounded,
        )
        self.map.optim_rules = {"raw_A": OptimRule(weight_decay=0.0)}  # type: ignore[assignment]
        self.observation = make_observation(config.observation, spec.num_variates, latent, seeds=seeds)
        self.schedule = AlphaSchedule(config.forcing, config.ensemble)
        tuned = spec.num_variates if config.observation == "identity" else 1
        fixed = config.gain if isinstance(config.gain, float) else None
        self.register_buffer("gain", torch.full((config.ensemble, tuned), 1.0 if fixed is None else fixed))
        self.register_buffer("innovation", torch.full((config.ensemble, spec.num_variates), torch.inf))
        self.register_buffer("settled", torch.tensor(fixed is not None))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.skip = self.make_skip("closed_form" if config.mixes else "none")
        if self.skip is not None:
            self.skip.requires_grad_(False)
        self.register_buffer("share", torch.ones(spec.num_variates))

    @classmethod
    def capabilities_of(cls, config: PLRNNForecastConfig) -> Capabilities:
        """Return ``capabilities``, with a linear map also that of solving it."""
        return replace(cls.capabilities, closed_form=config.mixes, starts_closed=config.mixes)

    def solve(self, data: TrainingSeries) -> None:
        """Solve the linear map; training starts from the network alone, so there is no start to report."""
        super().solve(data)

    # ---- one pass over a window

    def forward(self, batch: Batch) -> Prediction:
        """Return raw locations [B, H, V, 1].

        While training, every member forecasts its own part of the batch, the context but its first step is told too,
        and with ``objective: gtf`` the horizon is forced by the target, if there is one.
        """
        rows = self.spec.context_length + self.spec.horizon
        most = max(1, _MOST_CELLS // (self.config.ensemble * rows * self.map.latent))
        if torch.is_grad_enabled() or len(batch.context) <= most:
            found = self._locations(batch)
        else:
            pieces = [slice(start, start + most) for start in range(0, len(batch.context), most)]
            parts = [Batch._make(None if part is None else part[piece] for part in batch) for piece in pieces]
            found = torch.cat([self._locations(part) for part in parts])
        found, known = found.unsqueeze(-1), self.spec.context_length - 1
        context_raw = found[:, :known] if known and self.training else None  # which weights are best says the horizon
        return Prediction(found[:, known:], context_raw, context_weight=self._context_weight)

    @property
    def _context_weight(self) -> float:
        if self.config.objective == "gtf":  # every step alike
            return (self.spec.context_length - 1) / self.spec.horizon
        return _CONTEXT_WEIGHT if self.config.context_weight is None else self.config.context_weight

    def _locations(self, batch: Batch) -> Tensor:
        """Return the predictions [B, L - 1 + H, N] of all steps but the first, in scaled units."""
        loc, scale = self._statistics(batch)
        x = _rows(batch.context, batch.context_mask, loc, scale)
        if self.training and self.config.objective == "gtf" and batch.target is not None:
            mask = torch.ones_like(batch.target, dtype=torch.bool) if batch.target_mask is None else batch.target_mask
            x = torch.cat([x, _rows(batch.target, mask, loc, scale)[:, :-1]], dim=1)
        steps = self.spec.context_length - 1 + self.spec.horizon
        with torch.autocast(x.device.type, enabled=False):
            pushes = self._pushes(batch.known, batch.static, slice(1, steps + 1))
            x = self._members(x)
            known = x.shape[2] - 1
            forced = self._follow(x, None if pushes is None else pushes[:, :known])
            ahead = self._run_freely(forced.state, steps - known, None if pushes is None else pushes[:, known:])
            told = self.observation.observe(torch.cat([forced.z, ahead], dim=1)).transpose(1, 2)  # (G, b, T, N)
        merged = told.flatten(0, 1)[: len(loc)] if self.training else told.mean(0)
        found = merged * scale + loc
        if self.skip is None or self.training:
            return found
        return torch.cat([found[:, :known], self._mixed(found[:, known:], batch)], dim=1)

    def _mixed(self, told: Tensor, context: Batch) -> Tensor:
        """Return forecasts [B, H, N] of linear map and free run from those of the free run, in scaled units."""
        linear = self._linear(context)
        if linear is None:
            return told
        linear = linear[..., 0]
        return torch.where(self.share == 0, linear, linear + self.share * (told - linear))

    def _members(self, rows: Tensor) -> Tensor:
        """Return rows (G, b, ...) of the members of rows (B, ...): all of them, or while training a part of each.

        Parts are filled up with rows from the start, whose forecasts are dropped.
        """
        members = self.config.ensemble
        if not self.training:
            return rows.expand(members, *rows.shape)
        size = -(-len(rows) // members)
        if size * members > len(rows):
            rows = rows[torch.arange(size * members, device=rows.device) % len(rows)]
        return rows.view(members, size, *rows.shape[1:])

    def _pushes(self, known: Tensor | None, static: Tensor | None, steps: slice) -> Tensor | None:
        """Return what covariates add to the predicted steps (G, T, b, M): known [B, R, F] at ``steps``, and static."""
        if not self.map.inputs:
            return None
        parts = []
        if self.spec.num_known:
            assert known is not None  # the network refuses batches without them
            parts.append(known[:, steps])
        if self.spec.num_static:
            assert static is not None
            length = parts[0].shape[1] if parts else steps.stop - (steps.start or 0)
            parts.append(static.unsqueeze(1).expand(-1, length, -1))
        return self.map.input_term(self._members(torch.cat(parts, dim=-1)).transpose(1, 2))

    def _follow(self, x: Tensor, pushes: Tensor | None) -> _Forced:
        """Run through observations x (G, b, R, N), NaN where missing, from the first of them."""
        z1 = self.observation.initial(x[:, :, 0])
        if x.shape[2] == 1:
            return _Forced(z1.new_zeros(z1.shape[0], 0, *z1.shape[1:]), z1)
        if self.config.innovation_clip is not None and not self.training:
            z, states = self._step_by_step(z1, x, pushes)
            return _Forced(z, states[:, -1])
        states, reach = self.observation.forcing(x[:, :, 1:].transpose(1, 2))
        alpha = self._strength(states.shape[1], reach)
        z = self._sequence(z1, states, alpha, pushes)
        if self.training:
            self._adapt(z, states, alpha)
        last = alpha.unsqueeze(1) if alpha.ndim == 2 else alpha[:, -1:] if alpha.ndim == 3 else alpha[:, -1]
        return _Forced(z, _mix(z[:, -1], states[:, -1], last))

    def _step_by_step(self, z1: Tensor, x: Tensor, pushes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return predictions z (G, R - 1, b, M) and forced states (G, R, b, M), the first of which is z1."""
        states, found = [z1], []
        for step in range(1, x.shape[2]):
            found.append(self._advance(states[-1], None if pushes is None else pushes[:, step - 1]))
            states.append(self._correct(found[-1], x[:, :, step]))
        nothing = z1.new_zeros(z1.shape[0], 0, *z1.shape[1:])
        return torch.stack(found, dim=1) if found else nothing, torch.stack(states, dim=1)

    def _context(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return observations x (G, b, L, N) of a context, what covariates add to its steps, and its statistics."""
        loc, scale = self._statistics(batch)
        x = self._members(_rows(batch.context, batch.context_mask, loc, scale))
        return x, self._pushes(batch.known, batch.static, slice(1, self.spec.context_length)), loc, scale

    def _advance(self, state: Tensor, push: Tensor | None) -> Tensor:
        """Return the prediction (G, b, M) of the step after a state."""
        z = self.map.step(state)
        return z if push is None else z + push

    def _correct(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the forced state (G, b, M) of a prediction z after an observation x (G, b, N), NaN where missing."""
        if self.config.innovation_clip is not None:
            told = self.observation.observe(z)
            most = self.config.innovation_clip * self.innovation.to(z).unsqueeze(1)
            x = told + (x - told).clamp(-most, most)
        states, reach = self.observation.forcing(x.unsqueeze(1))
        alpha = self._strength(1, reach)
        return _mix(z, states[:, 0], alpha[:, 0] if alpha.ndim == 4 else alpha.unsqueeze(1))

    def _run_freely(self, state: Tensor, steps: int, pushes: Tensor | None) -> Tensor:
        """Return the states (G, steps, b, M) after a state (G, b, M)."""
        alpha = state.new_zeros(state.shape[0], steps, state.shape[2])
        return self._sequence(state, None, alpha, pushes)

    def _sequence(self, z1: Tensor, states: Tensor | None, alpha: Tensor, pushes: Tensor | None) -> Tensor:
        if self.map.kind == "deep":
            return gtf_loop(self.map.step, z1, states, alpha, pushes)
        return gtf_sequence(z1, states, alpha, self.map.shallow(), inputs=pushes, clipped=self.map.clipped)

    def _strength(self, steps: int, reach: Tensor) -> Tensor:
        """Return alpha (G, M), (G, T, M) or (G, T, b, M): that of training, or the gain of a forecast."""
        if self.training:
            return self.schedule.strength(steps, reach)
        gain = self._gain().to(reach)
        width = self.map.latent - gain.shape[1]
        units = pad(gain, (0, width)) if self.config.observation == "identity" else gain.expand(-1, self.map.latent)
        return units * reach if reach.ndim == 1 else units[:, None, None] * reach

    def _gain(self) -> Tensor:
        """Return the gain in use: the one chosen, before that the strength of training (1 where it has none)."""
        if self.config.forcing.method in ("sparse", "none"):
            return self.gain
        return torch.where(self.settled, self.gain, self.schedule.alpha.to(self.gain).unsqueeze(1))

    @torch.no_grad()
    def _adapt(self, z: Tensor, states: Tensor, alpha: Tensor) -> None:
        """Update the strength of adaptive forcing, if it is due, from this step's forced states."""
        if self.config.forcing.method != "adaptive":
            return
        self.steps += 1
        step = int(self.steps)
        if self.schedule.due(step):
            full = alpha[:, None, None] if alpha.ndim == 2 else alpha.unsqueeze(2) if alpha.ndim == 3 else alpha
            found = kappa(
                self.map.shallow(),
                _mix(z, states, full),
                self.config.forcing.estimator,
                clipped=self.map.clipped,
                every=_ESTIMATE_EVERY,
            )
            self.schedule.update(step, found)

    # ---- the gain

    @torch.no_grad()
    def settle(self, batches: Iterable[Batch]) -> None:
        """Choose the gain by held-out windows, measure the one-step error under it, and choose the share."""
        windows = thinned(batches)
        if windows is None:
            return
        if self.spec.context_length > 1:
            self._settle_gain(windows)
        if self.skip is not None:
            self.share.fill_(1.0)
            self.share.copy_(self._best_share(windows))

    def _settle_gain(self, windows: Batch) -> None:
        by_variate = self.config.observation == "identity" and self.config.gain == "innovation"
        fixed = self.gain.clone() if isinstance(self.config.gain, float) else None
        self.settled.fill_(True)
        self.innovation.fill_(torch.inf)
        chosen = choose_gain(self._errors, windows, self.gain, by_variate=by_variate, fixed=fixed)
        self.gain.copy_(chosen)
        squared, count = self._innovations(windows)
        self.innovation.copy_(torch.where(count > 0, squared / count.clamp(min=1), torch.inf).sqrt())

    def _best_share(self, windows: Batch) -> Tensor:
        """Return the share (N,) of the free run with the least squared error; 0 where nothing is known."""
        free, linear = self(windows).raw[..., 0], self._linear(windows)
        assert linear is not None  # asked for with a linear map only
        assert windows.target is not None  # settle has windows with targets
        added, wanted = free - linear[..., 0], windows.target - linear[..., 0]
        if windows.target_mask is not None:
            added, wanted = (torch.where(windows.target_mask, part, 0.0) for part in (added, wanted))
        found = (added * wanted).sum((0, 1)) / added.square().sum((0, 1))
        return torch.nan_to_num(found, nan=0.0).clamp(0.0, 1.0)

    def _errors(self, windows: Batch, gain: Tensor) -> Tensor:
        """Return the mean squared errors (G, N) under a gain, by which it is chosen; 0 where nothing is known."""
        self.gain.copy_(gain)
        squared, count = self._misses(windows) if self.config.gain == "horizon" else self._innovations(windows)
        return squared / count.clamp(min=1)

    def _innovations(self, windows: Batch) -> tuple[Tensor, Tensor]:
        """Return sums of squared one-step errors (G, N) in normalised units and their count, after a quarter of L."""
        x, pushes, _, _ = self._context(windows)
        first = x.shape[2] // 4
        told = self.observation.observe(self._follow(x, pushes).z).transpose(1, 2)
        return _squares(told[:, :, first:] - x[:, :, first + 1 :])

    def _misses(self, windows: Batch) -> tuple[Tensor, Tensor]:
        """Return sums of squared errors over the horizon (G, N) in scaled units and their count."""
        assert windows.target is not None  # settle has windows with targets
        state, length = self.warm_up(windows), self.spec.context_length
        ahead = None if windows.known is None else windows.known[:, length:]
        told = self._ahead(state, ahead)
        mask = torch.ones_like(windows.target, dtype=torch.bool) if windows.target_mask is None else windows.target_mask
        return _squares(torch.where(mask, told - windows.target, torch.nan))

    # ---- streaming

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state before any observation; the first row becomes the first state."""
        weight = self.map.raw_A
        return {
            "z": weight.new_zeros(batch_size, self.config.ensemble, self.map.latent),
            "begun": torch.zeros(batch_size, dtype=torch.bool, device=weight.device),
            **self._first_memories(batch_size, weight, static),
        }

    def warm_up(self, batch: Batch) -> State:
        """Return the forced state after a context; the statistics it was normalised with stay."""
        x, pushes, loc, scale = self._context(batch)
        z = self._follow(x, pushes).state.transpose(0, 1)
        found: State = {"z": z, "begun": torch.ones_like(z[:, 0, 0], dtype=torch.bool), "loc": loc, "scale": scale}
        if self.skip is not None:
            found |= {"context": batch.context, "context_mask": batch.context_mask}
        if batch.static is not None and self.spec.num_static:
            found["static"] = batch.static
        return found

    def step(self, state: State, row: Observation) -> State:
        """Return the forced state after one more row."""
        x = torch.where(row.mask, (row.values - state["loc"][:, 0]) / state["scale"][:, 0], torch.nan)
        x = self._members(x)
        known = None if row.known is None else row.known.unsqueeze(1)
        pushes = self._pushes(known, state.get("static"), slice(0, 1))
        z = self._advance(state["z"].transpose(0, 1), None if pushes is None else pushes[:, 0])
        forced = self._correct(z, x)
        begun = state["begun"].unsqueeze(-1)
        z = torch.where(begun, forced, self.observation.initial(x)).transpose(0, 1)
        after = {**state, "z": z, "begun": torch.ones_like(state["begun"])}
        if self.skip is not None:
            after["context"], after["context_mask"] = shifted(state, row)
        return after

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, 1] after the last row; the state stays as it is."""
        told = self._ahead(state, known).mean(0)
        if self.skip is not None:
            told = self._mixed(told, Batch(state["context"], state["context_mask"]))
        return Prediction(told.unsqueeze(-1))

    def _ahead(self, state: State, known: Tensor | None) -> Tensor:
        """Return the free run of every member (G, B, H, N) in scaled units."""
        pushes = self._pushes(known, state.get("static"), slice(0, self.spec.horizon))
        z = state["z"].transpose(0, 1).contiguous()
        told = self.observation.observe(self._run_freely(z, self.spec.horizon, pushes)).transpose(1, 2)
        return told * state["scale"] + state["loc"]

    # ---- what it shows

    @torch.no_grad()
    def growth(self, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
        """Return the free run [B, steps, N] after a context and the deviation of its error that a one-step error before
        it leads to by the Jacobians along it, both in scaled units; without the linear map.

        Raises:
            ModelError: kind deep has no such Jacobians, or the one-step error was not measured.
        """
        if self.map.kind == "deep" or not bool(self.innovation.isfinite().all()):
            raise ModelError(
                "error growth needs Jacobians, which kind 'deep' has not, and the one-step error of each variate, "
                "which a fit measures on its validation span: fit again with one"
            )
        x, pushes, loc, scale = self._context(batch)
        known = None if batch.known is None else batch.known[:, self.spec.context_length :]
        ahead = self._pushes(known, batch.static, slice(0, steps))
        state = self._follow(x, pushes).state
        told, spread = error_growth(self.map, self.observation, state, self.innovation.to(state), steps, ahead)
        return told * scale + loc, spread * scale

    @torch.no_grad()
    def explain(self) -> dict[str, Any]:
        """Return gain and one-step error of each variate and what its free run counts beside the linear map, and the
        strength of the forcing of each member."""
        gain = self._gain().expand(-1, self.spec.num_variates).mean(0)
        error = self.innovation.mean(0)
        return {
            "observer": [
                {"variate": variate, "gain": float(gain[variate])}
                | ({"one_step_error": float(error[variate])} if bool(error[variate].isfinite()) else {})
                | ({} if self.skip is None else {"share": float(self.share[variate])})
                for variate in range(self.spec.num_variates)
            ],
            "members": [
                {"member": member, "forcing": float(alpha), "largest_A": float(self.map.A[member].abs().max())}
                for member, alpha in enumerate(self.schedule.alpha)
            ],
        }

    @torch.no_grad()
    def symbols(self, batch: Batch) -> Tensor:
        """Return the linear region [B, L] that the forced state of the first member is in at each step of the context.

        A region is a number whose bits say which rectified units are on.

        Raises:
            ModelError: the map is not ``almost_linear``, or has too many rectified units to tell regions apart.
        """
        if not isinstance(self.map, AlmostLinearMap):
            raise ModelError(
                f"regions are told apart for model.kind=almost_linear only, this model is '{self.config.kind}'"
            )
        if self.map.rectified > _MOST_RECTIFIED:
            raise ModelError(
                f"this model has {self.map.rectified} rectified units; regions are told apart for up to "
                f"{_MOST_RECTIFIED} (model.rectified)"
            )
        x, pushes, _, _ = self._context(batch)
        states = self._step_by_step(self.observation.initial(x[:, :, 0]), x, pushes)[1][0].transpose(0, 1)
        on = states[..., self.map.latent - self.map.rectified :] > 0
        return (on.long() << torch.arange(self.map.rectified, device=on.device)).sum(-1)


def _rows(values: Tensor, mask: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Return normalised values [B, R, V], NaN where not observed."""
    return torch.where(mask, (values - loc) / scale, torch.nan)


def _mix(z: Tensor, states: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(alpha == 0, z, (1 - alpha) * z + alpha * states)


def _squares(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of squares (G, N) of errors (G, B, T, N), NaN where unknown, and their count."""
    known = ~errors.isnan()
    return torch.where(known, errors, 0.0).square().sum((1, 2)), known.sum((1, 2))
