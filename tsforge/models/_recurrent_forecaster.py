"""The forecaster around a recurrent network; ``gru``, ``lstm``, ``slstm`` and ``aaren`` differ in the network only.

Context -> instance normalisation -> (patches) -> linear embedding with mask, covariates and variate -> network -> last
feature -> linear map to the horizon, beside a linear map of the context that is solved in closed form before the first
gradient step. Known covariates of the horizon enter step by step through a linear map of their own.

Legend: B batch, V variates, R rows a window (V when variates are independent, else 1), L context, H horizon, D width,
I inputs a step, K parameters.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tsforge.contracts.model import Capabilities, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.models._residual import ResidualConfig, ResidualForecaster
from tsforge.models._ssm_rows import shifted

_PATCHED_FROM = 96  # context length from which patches are the default
_PATCH = 16
States = list[Tensor]


class RecurrentNetwork(Protocol):
    """What carries rows over time: features [B R, T, D], and states that begin with the axis of rows."""

    def __call__(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Return the features [B R, T, D] of tokens [B R, T, D] and the states after the last."""
        ...

    def last(self, x: Tensor) -> Tensor:
        """Return the feature [B R, D] of the last step."""
        ...

    def step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Return feature [B R, D] and states after one token [B R, D]."""
        ...

    def default_states(self, rows: int) -> States:
        """Return the states before the first token."""
        ...


class RecurrentForecasterConfig(ResidualConfig):
    """Settings shared by the recurrent forecasters."""

    d_model: int = tunable(64, choices=[32, 64, 128], ge=1)
    """Width of tokens and of the state."""
    num_layers: int = tunable(1, low=1, high=3, ge=1)
    dropout: float = tunable(0.1, low=0.0, high=0.5, ge=0.0, lt=1.0)
    """Share of features left out in training, the same ones at every step of a window."""
    mixing: Literal["independent", "mixed"] = tunable("independent", choices=["independent", "mixed"])
    """Every variate by itself with shared weights, or all of them (and covariates) as one input."""
    patch_length: int | None = None
    """Steps read as one input; default 16 for contexts of at least 96 steps, else 1. Streaming needs 1."""
    patch_stride: int | None = None
    """Steps between patches; default a whole patch."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that contradict each other or have no effect."""
        patch = self.patch_length
        if patch is not None and patch < 1:
            raise ConfigError(f"model.patch_length: {patch} must be at least 1")
        if self.patch_stride is not None and (patch is None or not 1 <= self.patch_stride <= patch):
            raise ConfigError("model.patch_stride: give it together with patch_length, between 1 and that")
        super().model_post_init(context)


C = TypeVar("C", bound=RecurrentForecasterConfig)


class RecurrentForecaster(ResidualForecaster[C]):
    """Base of the recurrent forecasters; a subclass makes the network."""

    part_name = "recurrent"
    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        closed_form=True,
        starts_closed=True,
        variate_coupling=True,
        scaling=("global", "series", "none"),
    )

    def __init__(self, config: C, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.patch, self.stride = self._choose_patch()
        self.rows = spec.num_variates if config.mixing == "independent" else 1
        per_row = spec.num_variates // self.rows
        self.embed = nn.Linear(self.patch * (2 * per_row + spec.num_past + spec.num_known), config.d_model)
        if self.rows > 1:
            self.variate = nn.Parameter(torch.randn(self.rows, config.d_model) * 0.02)
        if spec.num_static:
            self.static = nn.Linear(spec.num_static, config.d_model, bias=False)
        self.stack = self.make_network(-(-(spec.context_length - self.patch) // self.stride) + 1)
        self.head = nn.Linear(config.d_model, spec.horizon * per_row * spec.num_params)
        nn.init.zeros_(self.head.weight)  # training starts at the linear map
        nn.init.zeros_(self.head.bias)
        if self.normalises and spec.num_params > 1:
            # the spread must know the scale that normalisation removed; the location must not
            self.spread = nn.Linear(per_row, spec.horizon * per_row * (spec.num_params - 1), bias=False)
            nn.init.zeros_(self.spread.weight)
        if spec.num_known:
            self.ahead = nn.Linear(spec.num_known, per_row * spec.num_params, bias=False)
            nn.init.zeros_(self.ahead.weight)
        self.skip = self.make_skip()

    def make_network(self, steps: int) -> RecurrentNetwork:
        """Return the network (a module); ``steps`` is how many tokens a context has."""
        raise NotImplementedError

    def _choose_patch(self) -> tuple[int, int]:
        length = self.config.patch_length
        if length is None:
            length = _PATCH if self.spec.context_length >= _PATCHED_FROM else 1
        if length > self.spec.context_length:
            raise ConfigError(f"model.patch_length: {length} exceeds context_length {self.spec.context_length}")
        return length, self.config.patch_stride or length

    # ---- inputs and outputs

    def _tokens(self, batch: Batch, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the tokens [B R, T, D] of contexts of any length."""
        context, mask = batch.context, batch.context_mask
        z = torch.where(mask, (context - loc) / scale, 0.0)
        own = torch.stack([z, mask.to(z.dtype)], dim=-1)  # [B, L, V, 2]
        parts = [own.transpose(1, 2) if self.rows > 1 else own.flatten(2).unsqueeze(1)]  # [B, R, L, 2 V / R]
        known = None if batch.known is None else batch.known[:, : z.shape[1]]
        shared = [part for part in (batch.past, known) if part is not None]
        parts += [part.unsqueeze(1).expand(-1, self.rows, -1, -1) for part in shared]
        inputs = torch.cat(parts, dim=-1).flatten(0, 1)
        if self.patch > 1:
            missing = -(inputs.shape[1] - self.patch) % self.stride
            inputs = (
                pad(inputs, (0, 0, missing, 0)).unfold(1, self.patch, self.stride).flatten(2)
            )  # end at the last step
        tokens: Tensor = self.embed(inputs)
        if self.rows > 1:
            tokens = tokens + self.variate.repeat(len(context), 1).unsqueeze(1)
        if batch.static is not None and self.spec.num_static:
            tokens = tokens + self.static(batch.static).repeat_interleave(self.rows, dim=0).unsqueeze(1)
        return tokens

    def _read(self, feature: Tensor, scale: Tensor, known: Tensor | None) -> Tensor:
        """Return residual parameters [B, H, V, K] of the last feature [B R, D] and known covariates [B, H, F]."""
        size, (horizon, variates, params) = len(scale), self._output_shape
        out = self.head(feature).view(size, self.rows, horizon, variates // self.rows, params)
        if self.normalises and params > 1:
            added = self.spread(scale[:, 0].log().view(size, self.rows, -1))
            added = added.view(size, self.rows, horizon, variates // self.rows, params - 1)
            out = torch.cat([out[..., :1], out[..., 1:] + added], dim=-1)
        raw: Tensor = out.transpose(1, 2).reshape(size, horizon, variates, params)
        if known is None or not self.spec.num_known:
            return raw
        raw += self.ahead(known).view(size, horizon, -1, params)
        return raw

    @property
    def _output_shape(self) -> tuple[int, int, int]:
        return self.spec.horizon, self.spec.num_variates, self.spec.num_params

    # ---- the contract

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]."""
        loc, scale = self._statistics(batch)
        known = None if batch.known is None else batch.known[:, self.spec.context_length :]
        residual = self._read(self.stack.last(self._tokens(batch, loc, scale)), scale, known)
        return Prediction(self._compose(residual, loc, scale, self._linear(batch)))

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state before any observation, in the units of the training span."""
        self._need_recurrent()
        rows, weight = batch_size * self.rows, self.embed.weight
        rest = self._first_memories(batch_size, weight, static)
        return self._pack(weight.new_zeros(rows, self.config.d_model), self.stack.default_states(rows), rest)

    def _pack(self, feature: Tensor, states: States, rest: State) -> State:
        named = {"feature": feature, **{f"layer{index}": part for index, part in enumerate(states)}}
        return {name: part.reshape(-1, self.rows, *part.shape[1:]) for name, part in named.items()} | rest

    def warm_up(self, batch: Batch) -> State:
        """Return the state after a context; the statistics it was normalised with stay."""
        self._need_recurrent()
        loc, scale = self._statistics(batch)
        rest: State = {"loc": loc, "scale": scale}
        if self.skip is not None:
            rest |= {"context": batch.context, "context_mask": batch.context_mask}
        if batch.static is not None and self.spec.num_static:
            rest["static"] = batch.static
        features, states = self.stack(self._tokens(batch, loc, scale))
        return self._pack(features[:, -1], states, rest)

    def step(self, state: State, row: Observation) -> State:
        """Return the state after one more row; the work does not depend on how many came before."""
        self._need_recurrent()
        rest = {name: part for name, part in state.items() if name != "feature" and not name.startswith("layer")}
        if self.skip is not None:
            rest["context"], rest["context_mask"] = shifted(state, row)
        past, known = (None if part is None else part.unsqueeze(1) for part in (row.past, row.known))
        one = Batch(row.values.unsqueeze(1), row.mask.unsqueeze(1), past=past, known=known, static=state.get("static"))
        token = self._tokens(one, state["loc"], state["scale"])[:, 0]
        return self._pack(*self.stack.step(token, self._layers(state)), rest)

    def _layers(self, state: State) -> States:
        names = sorted((name for name in state if name.startswith("layer")), key=lambda name: int(name[5:]))
        return [state[name].flatten(0, 1) for name in names]

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, K] after the last row; the state stays as it is."""
        self._need_recurrent()
        loc, scale = state["loc"], state["scale"]
        linear = None if self.skip is None else self._linear(Batch(state["context"], state["context_mask"]))
        residual = self._read(state["feature"].flatten(0, 1), scale, known)
        return Prediction(self._compose(residual, loc, scale, linear))
