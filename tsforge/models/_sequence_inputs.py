"""What forecasters share that carry a context over time as a sequence of tokens: inputs, embedding, outputs, streaming.

A row is one variate with the covariates, or all variates at once. Context -> rows of values, masks and covariates ->
(patches) -> linear embedding with variate and static covariates; then, after the network of a subclass, features ->
residual parameters, beside a linear map of the known covariates of the horizon.

Legend: B batch, V variates, R rows a window (V when variates are independent, else 1), L context, H horizon, D width,
I inputs a step, K parameters.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tsforge.contracts.model import State
from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.core.errors import ConfigError
from tsforge.models._residual import ResidualConfig, ResidualForecaster
from tsforge.models._ssm_rows import shifted

_PATCH, _PATCHED_FROM = 16, 96  # default patch, and the context length from which it is used
States = list[Tensor]
C = TypeVar("C", bound=ResidualConfig)


def check_patches(length: int | None, stride: int | None) -> None:
    """Refuse a patch without steps, and a stride without or beyond a patch (``ConfigError``)."""
    if length is not None and length < 1:
        raise ConfigError(f"model.patch_length: {length} must be at least 1")
    if stride is not None and (length is None or not 1 <= stride <= length):
        raise ConfigError("model.patch_stride: give it together with patch_length, between 1 and that")


def choose_patch(
    length: int | None, stride: int | None, spec: DataSpec, *, overlap: int = 1, may: bool = True
) -> tuple[int, int]:
    """Return length and stride of the patches.

    Args:
        length: as set; None takes 16 steps for contexts of at least 96, else 1.
        stride: as set; None takes ``length / overlap``.
        spec: sizes of the data.
        overlap: patches that hold a step, by default.
        may: whether patches are possible where none were asked for.

    Raises:
        ConfigError: a patch is longer than the context.
    """
    if length is None:
        length = _PATCH if may and spec.context_length >= _PATCHED_FROM else 1
    if length > spec.context_length:
        raise ConfigError(f"model.patch_length: {length} exceeds context_length {spec.context_length}")
    return length, stride or max(length // overlap, 1)


class SequenceForecaster(ResidualForecaster[C]):
    """Base of forecasters over tokens; a subclass sets ``patch`` and ``stride``, makes its parts in the order
    ``_make_inputs``, network, ``_make_outputs``, and says what the network reads.

    Attributes:
        stride: steps between patches.
        rows: R.
    """

    stride: int
    rows: int

    @property
    def num_tokens(self) -> int:
        """Tokens that a context has."""
        return -(-(self.spec.context_length - self.patch) // self.stride) + 1

    # ---- parts

    def _make_inputs(self, width: int, mixing: Literal["independent", "mixed"], flags: int = 0) -> None:
        """Make the embedding of values, masks, covariates and ``flags`` further inputs a step."""
        spec = self.spec
        self.rows = spec.num_variates if mixing == "independent" else 1
        num_inputs = 2 * (spec.num_variates // self.rows) + spec.num_past + spec.num_known + flags
        self.embed = nn.Linear(self.patch * num_inputs, width)
        if self.rows > 1:
            self.variate = nn.Parameter(torch.randn(self.rows, width) * 0.02)
        if spec.num_static:
            self.static = nn.Linear(spec.num_static, width, bias=False)

    def _make_outputs(self, width: int, steps: int, *, ahead: bool = True) -> None:
        """Make the maps from a feature to ``steps`` steps; they start at zero, so training starts at the linear map."""
        spec, per_row = self.spec, self.spec.num_variates // self.rows
        self.head = nn.Linear(width, steps * per_row * spec.num_params)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.normalises and spec.num_params > 1:
            # the spread must know the scale that normalisation removed; the location must not
            self.spread = nn.Linear(per_row, steps * per_row * (spec.num_params - 1), bias=False)
            nn.init.zeros_(self.spread.weight)
        self._reads_ahead = ahead and spec.num_known > 0
        if self._reads_ahead:
            self.ahead = nn.Linear(spec.num_known, per_row * spec.num_params, bias=False)
            nn.init.zeros_(self.ahead.weight)

    # ---- inputs

    def _inputs_of(self, batch: Batch, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the inputs [B R, T, I] of contexts of any length T."""
        z = torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0)
        known = None if batch.known is None else batch.known[:, : z.shape[1]]
        return self._inputs(z, batch.context_mask, batch.past, known)

    def _inputs(self, z: Tensor, mask: Tensor, past: Tensor | None, known: Tensor | None) -> Tensor:
        """Return the inputs [B R, T, I] of normalised values and mask [B, T, V] and covariates [B, T, F]."""
        return self._joined(z, mask, [part for part in (past, known) if part is not None])

    def _joined(self, z: Tensor, mask: Tensor, shared: list[Tensor]) -> Tensor:
        """Return [B R, T, I]: values and mask [B, T, V] of each row, then what all rows share, each [B, T, F]."""
        own = torch.stack([z, mask.to(z.dtype)], dim=-1)  # [B, T, V, 2]
        parts = [own.transpose(1, 2) if self.rows > 1 else own.flatten(2).unsqueeze(1)]  # [B, R, T, 2 V / R]
        parts += [part.unsqueeze(1).expand(-1, self.rows, -1, -1) for part in shared]
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def _embed(self, inputs: Tensor, static: Tensor | None) -> Tensor:
        """Return tokens [B R, T', D] of inputs [B R, T, I] and static covariates [B, F]."""
        if self.patch > 1:
            missing = -(inputs.shape[1] - self.patch) % self.stride
            padded = pad(inputs, (0, 0, missing, 0))  # patches end at the last step
            inputs = padded.unfold(1, self.patch, self.stride).flatten(2)
        tokens: Tensor = self.embed(inputs)
        offset: Tensor | None = None
        if self.rows > 1:
            offset = self.variate.repeat(tokens.shape[0] // self.rows, 1)
        if static is not None and self.spec.num_static:
            by_row = self.static(static).repeat_interleave(self.rows, dim=0)
            offset = by_row if offset is None else offset + by_row
        return tokens if offset is None else tokens + offset.unsqueeze(1)

    # ---- outputs

    def _read(self, features: Tensor, scale: Tensor, steps: int) -> Tensor:
        """Return residual parameters [B, T, V, K]: of T = 1 feature [B R, D] with ``steps``, or of [B R, T, D]."""
        batch = features.shape[0] // self.rows
        variates, params = self.spec.num_variates, self.spec.num_params
        steps = steps if features.ndim == 2 else features.shape[1]
        out = self.head(features).view(batch, self.rows, steps, variates // self.rows, params)
        if self.normalises and params > 1:
            added = self.spread(scale[:, 0].log().view(batch, self.rows, -1))  # [B, R, (steps) V / R (K - 1)]
            added = added.view(batch, self.rows, -1, variates // self.rows, params - 1)
            out = torch.cat([out[..., :1], out[..., 1:] + added], dim=-1)
        ordered: Tensor = out.permute(0, 2, 1, 3, 4).reshape(batch, steps, variates, params)
        return ordered

    def _known_part(self, known: Tensor | None) -> Tensor | float:
        """Return what known covariates over the horizon [B, H, F] add to the residual parameters [B, H, V, K]."""
        if known is None or not self._reads_ahead:
            return 0.0
        per_row = self.spec.num_variates // self.rows
        added: Tensor = self.ahead(known).view(*known.shape[:2], per_row, self.spec.num_params)
        return added.expand(-1, -1, self.spec.num_variates, -1)

    # ---- streaming

    def _pack(self, feature: Tensor, states: States, rest: State) -> State:
        """Return a state whose tensors all begin with the axis of series."""
        named = {"feature": feature, **{f"layer{index}": part for index, part in enumerate(states)}}
        return {name: part.reshape(-1, self.rows, *part.shape[1:]) for name, part in named.items()} | rest

    def _unpack(self, state: State) -> tuple[Tensor, States]:
        """Return the last feature [B R, D] and the states of the network."""
        names = sorted((name for name in state if name.startswith("layer")), key=lambda name: int(name[5:]))
        return state["feature"].flatten(0, 1), [state[name].flatten(0, 1) for name in names]

    def _memories(self, batch: Batch, loc: Tensor, scale: Tensor) -> State:
        """Return what a state holds beside that of the network, after a context."""
        rest: State = {"loc": loc, "scale": scale}
        if self.skip is not None:
            rest |= {"context": batch.context, "context_mask": batch.context_mask}
        if batch.static is not None and self.spec.num_static:
            rest["static"] = batch.static
        return rest

    def _moved(self, state: State, row: Observation) -> State:
        """Return what a state holds beside that of the network, after one more row."""
        rest = {name: part for name, part in state.items() if name != "feature" and not name.startswith("layer")}
        if self.skip is not None:
            rest["context"], rest["context_mask"] = shifted(state, row)
        return rest

    def _row_inputs(self, state: State, row: Observation) -> Tensor:
        """Return the inputs [B R, 1, I] of one row, in the units of the state."""
        past, known = (None if part is None else part.unsqueeze(1) for part in (row.past, row.known))
        one = Batch(row.values.unsqueeze(1), row.mask.unsqueeze(1), past=past, known=known)
        return self._inputs_of(one, state["loc"], state["scale"])

    def _remembered(self, state: State) -> Tensor | None:
        """Return what the linear map alone forecasts [B, H, V, K] from the context a state holds."""
        return None if self.skip is None else self._linear(Batch(state["context"], state["context_mask"]))
