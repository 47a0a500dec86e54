"""Chimera: 2-D state space layers over variates and time, beside a closed-form linear map.

Behrouz, Santacatterina, Zabih (2024), Chimera: Effectively Modeling Multivariate Time Series with 2-Dimensional State
Space Models, NeurIPS, arXiv 2406.04320.

Context -> instance normalisation -> patches -> linear embedding with mask and covariates -> blocks of 2-D layers
(:mod:`tsforge.layers.chimera_block`) -> decoder. ``direct`` reads the last column of features. ``closed_loop`` reads
the next patch, lets the last layer predict its own next input from its states (maps D1, D2) and feeds it back; it is
trained by three losses: the forecast, the next patch over the context, and the predicted next inputs.

Deviations: no official code is known and the full paper could not be read; docs/models/chimera.md says what is derived.
The linear map, the instance normalisation and the patches are this project's. The losses of the closed loop follow
SpaceTime (Zhang et al. 2023, ICLR, arXiv 2303.09489), with the true next inputs held fixed, so that they cannot become
easy to predict by vanishing.

Legend: b batch, N variates, L context, T patches, P their length, H horizon, D width, K parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tsforge.contracts.model import Capabilities, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.chimera import Chimera2DSSM
from tsforge.layers.chimera_block import BlockState, ChimeraBlock, ChimeraStack, Parts, Pass
from tsforge.layers.chimera_heads import ChimeraOptions
from tsforge.models._chimera_explain import coupling_records, timescale_records
from tsforge.models._residual import ResidualConfig, ResidualForecaster
from tsforge.models._ssm_rows import shifted
from tsforge.models._variate_order import correlation_order
from tsforge.models.registry import register

_PATCHED_FROM, _PATCH = 96, 8  # context length from which patches are the default, and their length
_OPEN_LOOP, _NEXT_INPUT = 0.5, 0.5  # weights of the further losses of the closed loop
_LAST = slice(-1, None)
_FOLDS = 4  # passes of a reconstruction, each hiding one cell in so many


class ChimeraConfig(ResidualConfig):
    """Settings of Chimera."""

    name: Literal["chimera"] = "chimera"
    d_model: int = tunable(32, choices=[16, 32, 64], ge=1)
    """Width of a cell of the grid of variates and patches."""
    d_state: int = tunable(8, choices=[4, 8, 16], ge=1)
    """States a channel, head, direction and axis."""
    num_layers: int = tunable(2, low=1, high=3, ge=1)
    expand: int = tunable(1, choices=[1, 2], ge=1)
    """Channels of the 2-D layers, as a multiple of the width."""
    dropout: float = tunable(0.1, low=0.0, high=0.5, ge=0.0, lt=1.0)
    heads: Literal["both", "trend", "seasonal"] = "both"
    """Trend: small steps, real transitions; seasonal: larger steps, complex ones."""
    head_mix: Literal["sum", "residual"] = tunable("sum", choices=["sum", "residual"])
    """Both heads read the input, or the seasonal one what the trend head left."""
    directions: Literal["both", "forward"] = "both"
    """Along variates; both directions are averaged."""
    coupling: Literal["scan", "none", "pooled"] = tunable("scan", choices=["scan", "none", "pooled"])
    """Among variates: by the 2-D recurrence in their order, not at all, or through their mean whatever their order."""
    selective: bool = True
    """Input-dependent B, C and steps; false: one linear time-invariant system a channel."""
    structure: Literal["diagonal", "companion"] = "diagonal"
    discretisation: Literal["exact", "separate", "separate_avg"] = "exact"
    gate: bool = True
    conv: Literal[0, 4] = 0
    """Width of a causal convolution along time before each 2-D layer; 0: none."""
    decoder: Literal["direct", "closed_loop"] = "direct"
    variate_embedding: bool = tunable(False, choices=[False, True])
    """A learnt vector for each variate; without it all parameters are shared."""
    variate_order: Literal["given", "corr"] = "given"
    """The order that the coupling runs along: that of the data, or one that puts correlated variates beside each other,
    taken from the training span and kept with the weights."""
    reconstruct: bool = False
    """Also learn to tell a quarter of the cells of the context, hidden at random, from the rest (a second pass a step).
    Every cell's features reach its output directly, so reading back what was given would be learnt at once."""
    patch_length: int | None = None
    """Steps read as one cell; default 8 for contexts of 96 steps or more, else 1. Streaming needs 1."""
    dt_trend: tuple[float, float] = (1e-3, 1e-2)
    """Range of the initial steps of the trend head along time, for one grid step."""
    dt_seasonal: tuple[float, float] = (1e-2, 1.0)
    """The same of the seasonal head."""
    dt_variate: tuple[float, float] = (1e-2, 1.0)
    """Range of the initial steps along variates, of both heads: the smaller, the further variates reach."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that contradict each other or have no effect."""
        super().model_post_init(context)
        if self.patch_length is not None and self.patch_length < 1:
            raise ConfigError(f"model.patch_length: {self.patch_length} must be at least 1")
        if self.decoder == "closed_loop" and self.skip in ("closed_form", "learned"):
            raise ConfigError("model.skip: a closed loop predicts one patch at a time; use skip none")
        if self.variate_order == "corr" and self.coupling != "scan":
            raise ConfigError(f"model.variate_order has no effect with coupling '{self.coupling}'")
        usual = type(self).model_fields
        for name in ("dt_trend", "dt_seasonal"):
            if self.structure == "companion" and getattr(self, name) != usual[name].default:
                raise ConfigError(f"model.{name} has no effect with structure companion, which has no steps along time")
        try:
            self.options(1)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from error

    def options(self, patch: int) -> ChimeraOptions:
        """Return what the layers are made of; steps along time are those of a patch."""
        return ChimeraOptions(
            states=self.d_state,
            heads=self.heads,
            directions=self.directions,
            coupling=self.coupling,
            selective=self.selective,
            structure=self.structure,
            discretisation=self.discretisation,
            head_mix=self.head_mix,
            dt_trend=(self.dt_trend[0] * patch, self.dt_trend[1] * patch),
            dt_seasonal=(self.dt_seasonal[0] * patch, self.dt_seasonal[1] * patch),
            dt_variate=self.dt_variate,
        )


class _Column(NamedTuple):
    """One column of the last block before the norm (b, N, D), and its parts by name (empty unless asked for)."""

    x: Tensor
    parts: Parts


@register("chimera")
class Chimera(ResidualForecaster[ChimeraConfig]):
    """Trend and seasonal 2-D state space heads over all variates."""

    config_class = ChimeraConfig
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
    source = (
        "Behrouz, Santacatterina, Zabih (2024), Chimera: Effectively Modeling Multivariate Time Series with "
        "2-Dimensional State Space Models, NeurIPS, arXiv 2406.04320"
    )
    test_configs = (
        {"d_model": 16, "d_state": 4, "num_layers": 1},
        {"d_model": 16, "d_state": 4, "decoder": "closed_loop", "directions": "forward", "num_layers": 1}
        | {"normalisation": "none"},
        {"d_model": 16, "d_state": 4, "coupling": "pooled", "head_mix": "residual", "patch_length": 4, "expand": 2}
        | {"reconstruct": True, "conv": 4, "num_layers": 1, "skip": "none"},
        {"d_model": 16, "d_state": 4, "selective": False, "variate_order": "corr", "gate": False, "skip": "learned"}
        | {"normalisation": "last", "heads": "seasonal", "num_layers": 1},
        {"d_model": 16, "d_state": 4, "coupling": "none", "num_layers": 1, "normalisation": "none"}
        | {"variate_embedding": True},
    )
    order: Tensor

    @classmethod
    def capabilities_of(cls, config: ChimeraConfig) -> Capabilities:
        """Return ``capabilities``; only a model that reconstructs also tells the steps of the context."""
        return replace(cls.capabilities, context_outputs=config.reconstruct)

    def __init__(self, config: ChimeraConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.patch = self._choose_patch()
        width, params = config.d_model, spec.num_params
        self.embed = nn.Linear(self.patch * (2 + spec.num_past + spec.num_known), width)
        if config.variate_embedding:
            self.variate = nn.Parameter(torch.randn(spec.num_variates, width) * 0.02)
        if spec.num_static:
            self.static = nn.Linear(spec.num_static, width, bias=False)
        if config.variate_order == "corr":
            self.register_buffer("order", torch.arange(spec.num_variates))
        self.closed = config.decoder == "closed_loop"
        options, channels = config.options(self.patch), config.expand * width
        self.stack = ChimeraStack(
            [
                ChimeraBlock(
                    width,
                    Chimera2DSSM(channels, options, looks_ahead=self.closed and index + 1 == config.num_layers),
                    gate=config.gate,
                    conv=config.conv,
                    dropout=config.dropout,
                )
                for index in range(config.num_layers)
            ]
        )
        steps = self.patch if self.closed else spec.horizon
        self.head = _zeros(nn.Linear(width, steps * params))
        if self.normalises and params > 1:
            # the spread must know the scale that normalisation removed; the location must not
            self.spread = _zeros(nn.Linear(1, spec.horizon * (params - 1), bias=False))
        if spec.num_known:
            self.ahead = _zeros(nn.Linear(spec.num_known, params, bias=False))
        if self.closed:
            self.next_token = nn.Linear(channels, width)
        if config.reconstruct:
            self.rebuild = nn.Linear(width, self.patch * params)
        self.skip = self.make_skip("none" if self.closed else "closed_form")

    def _choose_patch(self) -> int:
        length = self.config.patch_length
        if length is None:
            length = _PATCH if self.spec.context_length >= _PATCHED_FROM else 1
        if length > self.spec.context_length:
            raise ConfigError(f"model.patch_length: {length} exceeds context_length {self.spec.context_length}")
        return length

    # ---- inputs

    def _normalised(self, batch: Batch, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0)

    def _patched(self, rows: Tensor) -> Tensor:
        """Return (b, N, T, P I) of rows (b, N, L, I); patches end at the last step, the first is filled up with 0."""
        filled = pad(rows, (0, 0, -rows.shape[2] % self.patch, 0))
        return filled.reshape(*rows.shape[:2], -1, self.patch * rows.shape[-1])

    def _tokens(
        self, z: Tensor, mask: Tensor, past: Tensor | None, known: Tensor | None, static: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return cells (b, N, T, D) of normalised values (b, L, N), and which of them hold an observation (b, N, T)."""
        batch, length, variates = z.shape
        if past is None and self.spec.num_past:
            past = z.new_zeros(batch, length, self.spec.num_past)
        parts = [torch.stack([z, mask.to(z.dtype)], dim=-1).transpose(1, 2)]
        parts += [part.unsqueeze(1).expand(-1, variates, -1, -1) for part in (past, known) if part is not None]
        tokens: Tensor = self.embed(self._patched(torch.cat(parts, dim=-1)))
        if self.config.variate_embedding:
            tokens = tokens + self.variate.unsqueeze(1)
        if static is not None and self.spec.num_static:
            tokens = tokens + self.static(static)[:, None, None]
        observed = self._patched(mask.transpose(1, 2).unsqueeze(-1)).any(-1)
        return self._ordered(tokens), self._ordered(observed)

    def _ordered(self, cells: Tensor) -> Tensor:
        """Return cells (b, N, ...) in the order that the coupling runs along."""
        return cells[:, self.order] if self.config.variate_order == "corr" else cells

    def _given(self, cells: Tensor) -> Tensor:
        """Return cells (b, N, ...) in the order of the data."""
        return cells[:, self.order.argsort()] if self.config.variate_order == "corr" else cells

    # ---- decoders

    def _next(self, ahead: Parts, *, with_parts: bool) -> tuple[Tensor, Parts | None]:
        """Return the predicted next inputs (b, N, T, D) of the last block, and their parts if asked for."""
        token: Tensor = self.next_token(torch.stack(list(ahead.values())).sum(0))
        if not with_parts:
            return token, None
        parts = {name: linear(part, self.next_token.weight) for name, part in ahead.items()}
        return token, {**parts, "rest": self.next_token.bias.expand_as(token)}

    def _loop(self, first: _Column, token: Tensor, parts: Parts | None, state: list[BlockState]) -> list[_Column]:
        """Return the columns that the patches of the horizon are read from: each prediction is the next input."""
        columns = [first]
        while len(columns) * self.patch < self.spec.horizon:
            found = self.stack.run(token, None, state, blocks=_LAST, parts=parts)
            columns.append(_last(found))
            token, parts = self._next(found.ahead, with_parts=parts is not None)
            state = found.state
        return columns

    def _columns(self, found: Pass, *, with_parts: bool = False) -> list[_Column]:
        """Return the columns that are read for the horizon after a pass over the context."""
        if not self.closed:
            return [_last(found)]
        ahead = {name: part[:, :, -1:] for name, part in found.ahead.items()}
        token, parts = self._next(ahead, with_parts=with_parts)
        return self._loop(_last(found), token, parts, found.state[_LAST])

    def _read(self, columns: list[_Column], scale: Tensor, known: Tensor | None) -> Tensor:
        """Return residual parameters [B, H, V, K] in normalised units."""
        horizon, params = self.spec.horizon, self.spec.num_params
        out = torch.cat([self.head(self.stack.norm(column.x)) for column in columns], dim=-1)
        out = self._given(out).reshape(*out.shape[:2], -1, params)[:, :, :horizon].transpose(1, 2)
        if self.normalises and params > 1:
            added = self.spread(scale[:, 0].log().unsqueeze(-1)).reshape(*out.shape[:1], -1, horizon, params - 1)
            out = torch.cat([out[..., :1], out[..., 1:] + added.transpose(1, 2)], dim=-1)
        return out if known is None else out + self.ahead(known).unsqueeze(2)

    def _ahead_of(self, known: Tensor | None) -> Tensor | None:
        """Return the known covariates of the horizon [B, H, F]."""
        return None if known is None or not self.spec.num_known else known[:, -self.spec.horizon :]

    # ---- the contract

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K].

        While training, a closed loop adds its further losses in scaled units, and a model that reconstructs gives the
        context too, some cells of it hidden at random.
        """
        loc, scale = self._statistics(batch)
        z = self._normalised(batch, loc, scale)
        found, inner = self._pass(batch, z, with_states=self.closed)
        residual = self._read(self._columns(found), scale, self._ahead_of(batch.known))
        context_raw, losses = None, None
        if self.config.reconstruct and self.training:
            shape = (z.shape[0], self._cells, z.shape[2])
            hidden = torch.rand(shape, device=z.device) < 1 / _FOLDS
            context_raw = self._compose(self._rebuilt(batch, z, hidden), loc, scale, None)
        if self.closed and self.training:
            losses = self._losses(found, inner, z, batch.context_mask, scale)
        return Prediction(self._compose(residual, loc, scale, self._linear(batch)), context_raw, losses)

    def residual(self, batch: Batch, z: Tensor, scale: Tensor) -> Tensor:
        """Return what the network adds [B, H, V, K] for normalised values z [B, L, V], in normalised units."""
        found, _ = self._pass(batch, z)
        return self._read(self._columns(found), scale, self._ahead_of(batch.known))

    def hidden(self, batch: Batch) -> Tensor:
        """Return the cells [B, N, D] of the last column, from which the head forecasts."""
        found, _ = self._pass(batch, self._normalised(batch, *self._statistics(batch)), with_states=False)
        return self._given(self.stack.norm(_last(found).x))

    def _pass(
        self, batch: Batch, z: Tensor, *, with_parts: bool = False, with_states: bool = True
    ) -> tuple[Pass, Tensor]:
        """Return the pass over the context with the states of all blocks, and the input of the last block."""
        known = None if batch.known is None or not self.spec.num_known else batch.known[:, : z.shape[1]]
        tokens, observed = self._tokens(z, batch.context_mask, batch.past, known, batch.static)
        parts: Parts | None = {"rest": tokens} if with_parts else None
        early = self.stack.run(tokens, observed, blocks=slice(0, -1), parts=parts, with_states=with_states)
        parts = early.parts if with_parts else None
        final = self.stack.run(early.x, observed, blocks=_LAST, parts=parts, with_states=with_states)
        return final._replace(state=[*early.state, *final.state]), early.x

    @property
    def _cells(self) -> int:
        """T, cells of a context."""
        return -(-self.spec.context_length // self.patch)

    def _rebuilt(self, batch: Batch, z: Tensor, hidden: Tensor) -> Tensor:
        """Return the context [B, L, V, K] in normalised units, told without the hidden cells (b, T, N)."""
        length = self.spec.context_length
        hides = hidden.repeat_interleave(self.patch, dim=1)[:, -length:]
        blind = batch._replace(context_mask=batch.context_mask & ~hides)
        found, _ = self._pass(blind, torch.where(hides, 0.0, z), with_states=False)
        out = self._given(self.rebuild(self.stack.norm(found.x)))
        return out.reshape(*out.shape[:2], -1, self.spec.num_params)[:, :, -length:].transpose(1, 2)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the context [B, L, V] in scaled units, each cell told from the others by four passes.

        Pass k hides the cells with (variate + cell in time) mod 4 = k. A cell is told from its own past and from the
        past and present of the other variates; normalisation reads all observed values. The squared distance to what
        was observed is an anomaly score of every step and variate.

        Raises:
            ModelError: the model was not fitted to reconstruct.
        """
        if not self.config.reconstruct:
            raise ModelError("this model was not fitted to reconstruct its context; fit with model.reconstruct=true")
        loc, scale = self._statistics(batch)
        z = self._normalised(batch, loc, scale)
        count = torch.arange(self._cells, device=z.device).unsqueeze(1) + torch.arange(z.shape[2], device=z.device)
        told = torch.zeros_like(z)
        for fold in range(_FOLDS):
            hidden = (count % _FOLDS == fold).expand(z.shape[0], -1, -1)
            context_raw = self._compose(self._rebuilt(batch, z, hidden), loc, scale, None)
            hides = hidden.repeat_interleave(self.patch, dim=1)[:, -z.shape[1] :]
            told = torch.where(hides, context_raw[..., 0], told)
        return told

    def _losses(self, found: Pass, inner: Tensor, z: Tensor, mask: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the loss of the next patch over the context and that of the predicted next inputs, weighted."""
        if found.x.shape[2] < 2:
            return {}
        ahead = self.head(self.stack.norm(found.x[:, :, :-1]))[..., :: self.spec.num_params]  # (b, N, T - 1, P)
        true = self._ordered(self._patched(z.transpose(1, 2).unsqueeze(-1)))[:, :, 1:]
        seen = self._ordered(self._patched(mask.transpose(1, 2).unsqueeze(-1)))[:, :, 1:]
        error = (ahead - true) * self._ordered(scale.transpose(1, 2)).unsqueeze(-1)
        open_loop = torch.where(seen, error.square(), 0.0).sum() / seen.sum().clamp(min=1)
        token, _ = self._next(found.ahead, with_parts=False)
        following = (token[:, :, :-1] - inner[:, :, 1:].detach()).square().mean()
        return {"open_loop": _OPEN_LOOP * open_loop, "next_input": _NEXT_INPUT * following}

    @torch.no_grad()
    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Set the order of variates, where it is to follow the data, and the linear map."""
        if self.config.variate_order == "corr":
            self.order.copy_(correlation_order(data.values, data.mask))
        return super().solve(data)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the forecast [B, H, V]: those of the linear map, ``trend``, ``seasonal`` and ``rest``.

        A head's part is all that its readouts add to the features that are read, over all blocks, with gates, norms
        and what later blocks make of it held as they are: the last norm is a product with a fixed gain then, and the
        head is linear. A fed-back input counts by its heads. ``rest`` is the embedding, the direct paths, biases and
        known covariates of the horizon.
        """
        loc, scale = self._statistics(batch)
        found, _ = self._pass(batch, self._normalised(batch, loc, scale), with_parts=True)
        params, horizon = self.spec.num_params, self.spec.horizon
        weight = self.head.weight[::params]
        parts: dict[str, list[Tensor]] = {}
        for column in self._columns(found, with_parts=True):
            gain = self.stack.norm.gain(column.x)
            for name, part in column.parts.items():
                bias = self.head.bias[::params] if name == "rest" else None
                parts.setdefault(name, []).append(linear(part * gain, weight, bias))
        read = {name: self._given(torch.cat(part, -1))[..., :horizon].transpose(1, 2) for name, part in parts.items()}
        known = self._ahead_of(batch.known)
        if known is not None:
            read["rest"] = read["rest"] + self.ahead(known)[..., :1]
        own = {name: read[name] * scale for name in (*self.config.options(1).names, "rest")}
        if self.skip is None:
            return {"window": loc.expand_as(own["rest"]), **own} if self.normalises else own
        return {**self.skip.components(Batch(batch.context, batch.context_mask)), **own}

    @torch.no_grad()
    def explain(self) -> dict[str, Any]:
        """Return time-scales of the heads and how far variates move each other; see :mod:`._chimera_explain`.

        With ``variate_order: corr`` also the order that the coupling runs along.
        """
        found: dict[str, Any] = {
            "time_scales": timescale_records(self.stack, self.patch),
            "coupling": coupling_records(self) if self.config.coupling != "none" else [],
        }
        if self.config.variate_order == "corr":
            places = enumerate(self.order.tolist())
            found["order"] = [{"position": place, "variate": variate} for place, variate in places]
        return found

    # ---- streaming

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state before any observation, in the units of the training span."""
        self._need_recurrent()
        weight, variates = self.embed.weight, self.spec.num_variates
        rest = self._first_memories(batch_size, weight, static)
        column = weight.new_zeros(batch_size, variates, self.config.d_model)
        token = self.next_token.bias.expand_as(column) if self.closed else None
        return self._pack(column, token, self.stack.default_states(batch_size, variates), rest)

    def _pack(self, column: Tensor, token: Tensor | None, states: list[BlockState], rest: State) -> State:
        blocks = {f"block{i}.{name}": part for i, state in enumerate(states) for name, part in state.items()}
        following = {} if token is None else {"next": token}
        return {"column": column, **following, **blocks, **rest}

    def _after(self, found: Pass, rest: State) -> State:
        token: Tensor | None = None
        if self.closed:
            ahead = {name: part[:, :, -1] for name, part in found.ahead.items()}
            token, _ = self._next(ahead, with_parts=False)
        return self._pack(found.x[:, :, -1], token, found.state, rest)

    def _blocks_of(self, state: State) -> list[BlockState]:
        named: list[BlockState] = [{} for _ in range(self.config.num_layers)]
        for name, part in state.items():
            block, _, key = name.partition(".")
            if key:
                named[int(block.removeprefix("block"))][key] = part
        return named

    def warm_up(self, batch: Batch) -> State:
        """Return the state after a context; the statistics it was normalised with stay."""
        self._need_recurrent()
        loc, scale = self._statistics(batch)
        rest: State = {"loc": loc, "scale": scale}
        if self.skip is not None:
            rest |= {"context": batch.context, "context_mask": batch.context_mask}
        if batch.static is not None and self.spec.num_static:
            rest["static"] = batch.static
        found, _ = self._pass(batch, self._normalised(batch, loc, scale))
        return self._after(found, rest)

    def step(self, state: State, row: Observation) -> State:
        """Return the state after one more row; the work does not depend on how many came before."""
        self._need_recurrent()
        rest: State = {name: part for name, part in state.items() if name in ("loc", "scale", "static")}
        z = torch.where(row.mask, (row.values - state["loc"][:, 0]) / state["scale"][:, 0], 0.0).unsqueeze(1)
        past = None if row.past is None else row.past.unsqueeze(1)
        known = None if row.known is None else row.known.unsqueeze(1)
        tokens, observed = self._tokens(z, row.mask.unsqueeze(1), past, known, state.get("static"))
        if self.skip is not None:
            rest["context"], rest["context_mask"] = shifted(state, row)
        return self._after(self.stack.run(tokens, observed, self._blocks_of(state)), rest)

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, K] after the last row; the state stays as it is."""
        self._need_recurrent()
        columns = [_Column(state["column"], {})]
        if self.closed:
            columns = self._loop(columns[0], state["next"].unsqueeze(2), None, self._blocks_of(state)[_LAST])
        residual = self._read(columns, state["scale"], self._ahead_of(known))
        skip = self._linear(Batch(state["context"], state["context_mask"])) if self.skip is not None else None
        return Prediction(self._compose(residual, state["loc"], state["scale"], skip))


def _last(found: Pass) -> _Column:
    return _Column(found.x[:, :, -1], {name: part[:, :, -1] for name, part in found.parts.items()})


def _zeros(layer: nn.Linear) -> nn.Linear:
    """Return the layer with weights at zero: what it adds starts at nothing."""
    for part in layer.parameters():
        nn.init.zeros_(part)
    return layer
