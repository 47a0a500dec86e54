"""The forecaster around a stack of state space layers; ``lssl`` and ``s4`` differ only in the layer they put in.

Context -> instance normalisation -> (patches) -> linear embedding with mask, covariates and variate -> causal stack ->
head, plus a linear map from look-back to horizon that is solved in closed form before the first gradient step, so that
training starts at the linear baseline and adds to it.

Heads: ``direct`` reads the last feature; ``masked`` runs on over the horizon with empty inputs, a flag and the known
covariates (Gu, Goel, Re 2022, App. D.3.5); ``rollout`` predicts one step from the last feature and the covariates known
for that step, and feeds its own means back.

Legend: B batch, V variates, R rows a window (V when variates are independent, else 1), L context, H horizon, D width,
I inputs a step, K parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tsforge.contracts.model import Capabilities, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.ssm import SSM
from tsforge.layers.ssm_block import SSMBlock, SSMStack, States, memory_lengths
from tsforge.models._residual import ResidualConfig
from tsforge.models._sequence_inputs import SequenceForecaster, check_patches, choose_patch
from tsforge.models._ssm_rows import compact, last_index, with_elapsed

_SHOWN_FEATURES, _SHOWN_LAGS = 6, 256


class SSMForecasterConfig(ResidualConfig):
    """Settings shared by the state space forecasters."""

    d_model: int = tunable(64, choices=[32, 64, 128], ge=1)
    """Width: features that each layer runs a system for."""
    d_state: int = tunable(64, choices=[16, 32, 64, 128], ge=2)
    """N, real states of a system; even."""
    num_layers: int = tunable(2, low=1, high=4, ge=1)
    num_channels: int = tunable(1, choices=[1, 2], ge=1)
    """M, outputs of each system."""
    dropout: float = tunable(0.1, low=0.0, high=0.5, ge=0.0, lt=1.0)
    """Share of features left out in training, the same ones at every step of a window."""
    mixing: Literal["independent", "mixed"] = tunable("independent", choices=["independent", "mixed"])
    """Every variate by itself with shared weights, or all of them (and covariates) as one input."""
    head: Literal["auto", "direct", "masked", "rollout"] = "auto"
    """``auto``: masked where covariates are known over the horizon, else direct."""
    patch_length: int | None = None
    """Steps read as one input; default 16 for a direct head and long contexts, else 1. Streaming needs 1."""
    patch_stride: int | None = None
    """Steps between patches; default half a patch."""
    missing: Literal["mask", "skip"] = "mask"
    """Unobserved steps are inputs of 0 with a mask, or no steps at all: the state then lives through the time between
    two observations (irregular sampling)."""
    dt_min: float | None = None
    """Least initial step size; default from the context length."""
    dt_max: float | None = None

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that contradict each other or have no effect."""
        if self.d_state % 2:
            raise ConfigError(f"model.d_state: {self.d_state} is odd; states come in conjugate pairs")
        patch = self.patch_length
        check_patches(patch, self.patch_stride)
        if patch is not None and patch > 1 and (self.head in ("masked", "rollout") or self.missing == "skip"):
            raise ConfigError("model.patch_length: patches need head direct and missing mask; use patch_length=1")
        if self.head == "rollout" and self.skip in ("closed_form", "learned"):
            raise ConfigError("model.skip: a rollout head predicts one step; use skip none")
        super().model_post_init(context)


class _Rows(NamedTuple):
    """A context as the stack reads it: inputs [B R, T, I], elapsed [B R, T] or None, loc and scale [B, 1, V]."""

    inputs: Tensor
    elapsed: Tensor | None
    loc: Tensor
    scale: Tensor


C = TypeVar("C", bound=SSMForecasterConfig)


class SSMForecaster(SequenceForecaster[C]):
    """Base of the state space forecasters; a subclass makes the layers."""

    part_name = "state_space"
    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        context_outputs=True,
        closed_form=True,
        starts_closed=True,
        variate_coupling=True,
        scaling=("global", "series", "none"),
    )

    def __init__(self, config: C, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.head_kind = self._choose_head()
        can = self.head_kind == "direct" and config.missing == "mask"
        self.patch, self.stride = choose_patch(config.patch_length, config.patch_stride, spec, overlap=2, may=can)
        self.skips_missing = config.missing == "skip"
        flags = int(self.head_kind == "masked") + int(self.skips_missing)
        self._make_inputs(config.d_model, config.mixing, flags)
        span = self._dt_range()
        layers = [self.make_layer(index, span) for index in range(config.num_layers)]
        self.stack = SSMStack([SSMBlock(layer, dropout=config.dropout) for layer in layers])
        steps = spec.horizon if self.head_kind == "direct" else 1
        self._make_outputs(config.d_model, steps, ahead=self.head_kind != "masked")
        self.skip = self.make_skip("none" if self.head_kind == "rollout" else "closed_form")

    @classmethod
    def capabilities_of(cls, config: C) -> Capabilities:
        """Return ``capabilities``; only a rollout head over all grid steps also tells the steps of the context."""
        return replace(cls.capabilities, context_outputs=config.head == "rollout" and config.missing == "mask")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Read also rollout heads of versions that had no map of the covariates known for a step: it adds nothing."""
        if self.head_kind == "rollout" and self._reads_ahead:
            state_dict.setdefault(f"{prefix}ahead.weight", torch.zeros_like(self.ahead.weight))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def make_layer(self, index: int, dt_range: tuple[float, float]) -> SSM:
        """Return the state space layer of block ``index``; ``dt_range`` fits the number of steps it runs over."""
        raise NotImplementedError

    # ---- what follows from config and sizes

    def _choose_head(self) -> str:
        if self.config.head != "auto":
            return self.config.head
        patched = self.config.patch_length is not None and self.config.patch_length > 1
        return "masked" if self.spec.num_known and not patched else "direct"

    def _dt_range(self) -> tuple[float, float]:
        low = min(max(1e-4, 1.0 / (4 * self.num_tokens)), 0.1)
        low = low if self.config.dt_min is None else self.config.dt_min
        return low, min(100.0 * low, 1.0) if self.config.dt_max is None else self.config.dt_max

    @property
    def takes_elapsed(self) -> bool:
        """True when ``step`` reads ``Observation.elapsed``."""
        return self.skips_missing

    # ---- inputs

    def _rows_of(self, batch: Batch, loc: Tensor, scale: Tensor) -> _Rows:
        """Return the context of a batch as rows of inputs."""
        inputs = self._inputs_of(batch, loc, scale)
        if not self.skips_missing:
            return _Rows(inputs, None, loc, scale)
        seen = self._seen(batch.context_mask)  # [B R, L]
        steps, elapsed = compact(inputs, seen)
        regular = bool((elapsed == 1).all())  # nothing is missing: the convolution does the same
        return _Rows(steps, None if regular else elapsed, loc, scale)

    def _seen(self, mask: Tensor) -> Tensor:
        """Return whether a step [B, L, V] holds an observation of a row [B R, L]."""
        if self.rows == 1:
            return mask.any(-1)
        return mask.transpose(1, 2).flatten(0, 1)

    def _inputs(self, z: Tensor, mask: Tensor, past: Tensor | None, known: Tensor | None, future: int = 0) -> Tensor:
        """Return [B R, T, I]: values, mask, covariates, flag of the horizon; elapsed time is put in later."""
        shared = [part for part in (past, known) if part is not None]
        if past is None and self.spec.num_past:
            shared.insert(0, z.new_zeros(*z.shape[:2], self.spec.num_past))
        if self.head_kind == "masked":
            shared.append(z.new_full((*z.shape[:2], 1), float(future)))
        if self.skips_missing:
            shared.append(z.new_zeros(*z.shape[:2], 1))
        return self._joined(z, mask, shared)

    # ---- the contract

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]; with a rollout head also those of every context step."""
        length = self.spec.context_length
        rows = self._rows_of(batch, *self._statistics(batch))
        known = None if batch.known is None else batch.known[:, length:]
        tokens = self._embed(rows.inputs, batch.static)
        context_raw = None
        if self.head_kind == "rollout":
            features, states = self.stack(tokens, elapsed=rows.elapsed, with_states=True)
            residual = self._roll(features[:, -1], states, rows, known, batch.static)
            if not self.skips_missing:  # else there is no feature at steps that hold nothing
                context_raw = self._context_raw(features, rows, batch.known)
        elif self.head_kind == "masked":
            ahead = self._embed(self._future(batch.context, known), batch.static)
            whole = torch.cat([tokens, ahead], dim=1)
            elapsed = None if rows.elapsed is None else pad(rows.elapsed, (0, self.spec.horizon), value=1.0)
            features, _ = self.stack(whole, elapsed=elapsed)
            residual = self._read(features[:, -self.spec.horizon :], rows.scale, 1)
        else:
            residual = self._read(self._last(tokens, rows), rows.scale, self.spec.horizon) + self._known_part(known)
        return Prediction(self._compose(residual, rows.loc, rows.scale, self._linear(batch)), context_raw)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the features [B, R, D] after the contexts, from which the head forecasts."""
        rows = self._rows_of(batch, *self._statistics(batch))
        feature = self._last(self._embed(rows.inputs, batch.static), rows)
        return feature.view(-1, self.rows, feature.shape[-1])

    def _last(self, tokens: Tensor, rows: _Rows) -> Tensor:
        """Return the feature [B R, D] of the last token."""
        if rows.elapsed is None:
            return self.stack.last(tokens)
        features, _ = self.stack(tokens, elapsed=rows.elapsed)
        last: Tensor = features[:, -1]
        return last

    def _future(self, like: Tensor, known: Tensor | None) -> Tensor:
        """Return the empty inputs [B R, H, I] of the horizon."""
        shape = (like.shape[0], self.spec.horizon, self.spec.num_variates)
        inputs = self._inputs(like.new_zeros(shape), like.new_zeros(shape), None, known, future=1)
        return with_elapsed(inputs, inputs.new_ones(inputs.shape[:2])) if self.skips_missing else inputs

    def _context_raw(self, features: Tensor, rows: _Rows, known: Tensor | None) -> Tensor:
        """Return the one-step forecasts [B, L, V, K] of every context step; nothing is known before the first."""
        own = None if known is None else known[:, 1 : features.shape[1]]  # of the step that is told
        ahead = self._read(features[:, :-1], rows.scale, 1) + self._known_part(own)
        return self._compose(pad(ahead, (0, 0, 0, 0, 1, 0)), rows.loc, rows.scale, None)

    def _roll(
        self, feature: Tensor, states: States, rows: _Rows, known: Tensor | None, static: Tensor | None
    ) -> Tensor:
        """Return residual parameters [B, H, V, K] of a free run: each mean is the next input."""
        outputs = []
        for step in range(self.spec.horizon):
            own = None if known is None else known[:, step : step + 1]
            output = self._read(feature.unsqueeze(1), rows.scale, 1) + self._known_part(own)  # [B, 1, V, K]
            outputs.append(output)
            if step + 1 == self.spec.horizon:
                break
            mean = output[..., 0]
            inputs = self._inputs(mean, torch.ones_like(mean), None, own)
            elapsed = None
            if self.skips_missing:
                elapsed = inputs.new_ones(inputs.shape[:2])
                inputs = with_elapsed(inputs, elapsed)
            feature, states = self._advance(inputs, static, states, elapsed)
        return torch.cat(outputs, dim=1)

    def _advance(
        self, inputs: Tensor, static: Tensor | None, states: States, elapsed: Tensor | None
    ) -> tuple[Tensor, States]:
        """Return features [B R, D] and states after one step of inputs [B R, 1, I]."""
        token = self._embed(inputs, static)
        if elapsed is None:
            return self.stack.step(token[:, 0], states)
        features, after = self.stack(token, states, elapsed=elapsed)
        return features[:, 0], after

    @torch.no_grad()
    def explain(self) -> dict[str, Any]:
        """Return what the layers learnt: effective memory and time-scales of each, and some of the kernels.

        Lags and time-scales are in grid steps; with patches a layer moves ``patch_stride`` of them at once.
        """
        memory, scales, kernels = [], [], []
        steps = self.num_tokens
        was_training = self.training
        self.eval()
        for index, layer in enumerate(self.stack.layers()):
            kernel = layer.kernel(steps)
            reach = (memory_lengths(kernel).double() * self.stride).clamp(max=self.spec.context_length)
            low, middle, high = torch.quantile(reach, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
            memory.append({"layer": index, "p10": low, "median": middle, "p90": high, "longest": float(reach.max())})
            dt = layer.dt(1.0)
            scales += [
                {"layer": index, "feature": feature, "dt": float(dt[feature]), "memory": float(reach[feature])}
                for feature in range(layer.features)
            ]
            order = reach.argsort(stable=True)
            chosen = order[torch.linspace(0, len(order) - 1, min(_SHOWN_FEATURES, len(order))).round().long()]
            thin = max(kernel.shape[-1] // _SHOWN_LAGS, 1)
            for feature in chosen.tolist():
                curve = kernel[0, feature, ::thin]
                kernels += [
                    {"layer": index, "feature": feature, "lag": lag * thin * self.stride, "weight": float(value)}
                    for lag, value in enumerate(curve)
                ]
        self.train(was_training)
        return {"memory": memory, "timescales": scales, "kernels": kernels}

    # ---- streaming

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state before any observation, in the units of the training span."""
        self._need_recurrent()
        weight = self.embed.weight
        rest = self._first_memories(batch_size, weight, static)
        if self.skips_missing:
            rest["pending"] = weight.new_zeros(batch_size, self.rows)
            rest["seen"] = torch.zeros(batch_size, self.rows, dtype=torch.bool, device=weight.device)
        return self._pack(
            weight.new_zeros(batch_size * self.rows, self.config.d_model),
            self.stack.default_states(batch_size * self.rows),
            rest,
        )

    def warm_up(self, batch: Batch) -> State:
        """Return the state after a context; the statistics it was normalised with stay."""
        self._need_recurrent()
        rows = self._rows_of(batch, *self._statistics(batch))
        size = batch.context.shape[0]
        rest = self._memories(batch, rows.loc, rows.scale)
        inputs, elapsed = rows.inputs, rows.elapsed
        if self.skips_missing:
            seen = self._seen(batch.context_mask)
            inputs, elapsed = compact(self._inputs_of(batch, rows.loc, rows.scale), seen, closes=False)
            last = last_index(seen)
            rest["pending"] = (seen.shape[1] - 1 - last).to(inputs.dtype).view(size, self.rows)
            rest["seen"] = seen.any(1).view(size, self.rows)
        features, states = self.stack(self._embed(inputs, batch.static), elapsed=elapsed, with_states=True)
        return self._pack(features[:, -1], states, rest)

    def step(self, state: State, row: Observation) -> State:
        """Return the state after one more row; the work does not depend on how many came before."""
        self._need_recurrent()
        feature, states = self._unpack(state)
        rest, inputs, static = self._moved(state, row), self._row_inputs(state, row), state.get("static")
        if not self.skips_missing:
            return self._pack(*self._advance(inputs, static, states, None), rest)
        seen = self._seen(row.mask.unsqueeze(1))[:, 0].view(-1, self.rows)
        gap = state["pending"] + (1.0 if row.elapsed is None else row.elapsed.to(inputs.dtype).unsqueeze(1))
        took = torch.where(seen, torch.where(state["seen"], gap, 1.0), 0.0)
        elapsed = took.view(-1, 1)
        found, after = self._advance(with_elapsed(inputs, elapsed), static, states, elapsed)
        feature = torch.where(seen.view(-1, 1), found, feature)
        rest["pending"] = torch.where(seen, 0.0, gap)
        rest["seen"] = state["seen"] | seen
        return self._pack(feature, after, rest)

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, K] after the last row; the state stays as it is."""
        self._need_recurrent()
        feature, states = self._unpack(state)
        loc, scale, static = state["loc"], state["scale"], state.get("static")
        if self.skips_missing:
            feature, states = self._caught_up(state, feature, states)
        if self.head_kind == "masked":
            inputs = self._future(loc.expand(-1, self.spec.horizon, -1), known)
            elapsed = inputs.new_ones(inputs.shape[:2]) if self.skips_missing else None
            features, _ = self.stack(self._embed(inputs, static), states, elapsed=elapsed)
            residual = self._read(features, scale, 1)
        elif self.head_kind == "rollout":
            residual = self._roll(feature, states, _Rows(feature, None, loc, scale), known, static)
        else:
            residual = self._read(feature, scale, self.spec.horizon) + self._known_part(known)
        return Prediction(self._compose(residual, loc, scale, self._remembered(state)))

    def _caught_up(self, state: State, feature: Tensor, states: States) -> tuple[Tensor, States]:
        """Return feature and states moved to the last row, where that row held no observation."""
        pending = state["pending"].view(-1, 1)
        if not bool((pending > 0).any()):
            return feature, states
        size, steps = len(state["loc"]), pending.clone()
        steps[~state["seen"].view(-1)] = 1.0
        empty = pending.new_zeros(size, 1, self.spec.num_variates)
        known = pending.new_zeros(size, 1, self.spec.num_known) if self.spec.num_known else None
        inputs = with_elapsed(self._inputs(empty, empty, None, known), steps)
        found, after = self._advance(inputs, state.get("static"), states, steps)
        late = pending > 0
        moved = [
            torch.where(late.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(after, states, strict=True)
        ]
        return torch.where(late, found, feature), moved
