"""The forecaster around a recurrent network; ``gru``, ``lstm``, ``slstm`` and ``aaren`` differ in the network only.

Context -> instance normalisation -> (patches) -> linear embedding with mask, covariates and variate -> network -> last
feature -> linear map to the horizon, beside a linear map of the context that is solved in closed form before the first
gradient step. Known covariates of the horizon enter step by step through a linear map of their own.

Legend: B batch, V variates, R rows a window (V when variates are independent, else 1), L context, H horizon, D width,
I inputs a step, K parameters.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from torch import Tensor

from tsforge.contracts.model import Capabilities, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction
from tsforge.core.config import tunable
from tsforge.models._residual import ResidualConfig
from tsforge.models._sequence_inputs import SequenceForecaster, States, check_patches, choose_patch


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
        check_patches(self.patch_length, self.patch_stride)
        super().model_post_init(context)


C = TypeVar("C", bound=RecurrentForecasterConfig)


class RecurrentForecaster(SequenceForecaster[C]):
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
        self.patch, self.stride = choose_patch(config.patch_length, config.patch_stride, spec)
        self._make_inputs(config.d_model, config.mixing)
        self.stack = self.make_network(self.num_tokens)
        self._make_outputs(config.d_model, spec.horizon)
        self.skip = self.make_skip()

    def make_network(self, steps: int) -> RecurrentNetwork:
        """Return the network (a module); ``steps`` is how many tokens a context has."""
        raise NotImplementedError

    def _tokens(self, batch: Batch, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the tokens [B R, T, D] of contexts of any length."""
        return self._embed(self._inputs_of(batch, loc, scale), batch.static)

    def _forecast(self, feature: Tensor, scale: Tensor, known: Tensor | None) -> Tensor:
        """Return residual parameters [B, H, V, K] of the last feature [B R, D] and known covariates [B, H, F]."""
        return self._read(feature, scale, self.spec.horizon) + self._known_part(known)

    # ---- the contract

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]."""
        loc, scale = self._statistics(batch)
        known = None if batch.known is None else batch.known[:, self.spec.context_length :]
        residual = self._forecast(self.stack.last(self._tokens(batch, loc, scale)), scale, known)
        return Prediction(self._compose(residual, loc, scale, self._linear(batch)))

    def hidden(self, batch: Batch) -> Tensor:
        """Return the features [B, R, D] after the contexts, from which the head forecasts."""
        feature = self.stack.last(self._tokens(batch, *self._statistics(batch)))
        return feature.view(-1, self.rows, feature.shape[-1])

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state before any observation, in the units of the training span."""
        self._need_recurrent()
        rows, weight = batch_size * self.rows, self.embed.weight
        rest = self._first_memories(batch_size, weight, static)
        return self._pack(weight.new_zeros(rows, self.config.d_model), self.stack.default_states(rows), rest)

    def warm_up(self, batch: Batch) -> State:
        """Return the state after a context; the statistics it was normalised with stay."""
        self._need_recurrent()
        loc, scale = self._statistics(batch)
        features, states = self.stack(self._tokens(batch, loc, scale))
        return self._pack(features[:, -1], states, self._memories(batch, loc, scale))

    def step(self, state: State, row: Observation) -> State:
        """Return the state after one more row; the work does not depend on how many came before."""
        self._need_recurrent()
        token = self._embed(self._row_inputs(state, row), state.get("static"))[:, 0]
        _, layers = self._unpack(state)
        return self._pack(*self.stack.step(token, layers), self._moved(state, row))

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, K] after the last row; the state stays as it is."""
        self._need_recurrent()
        feature, _ = self._unpack(state)
        residual = self._forecast(feature, state["scale"], known)
        return Prediction(self._compose(residual, state["loc"], state["scale"], self._remembered(state)))
