"""Recurrent layers with one or several heads: LSTM, GRU, sLSTM, and a plain stack of them.

    gates g = W x_t + b + R h_{t-1},  R block-diagonal over heads
    LSTM   c' = sig(f) c + sig(i) tanh(z);             h' = sig(o) tanh(c')
    GRU    r, u = sig(.);  z = tanh(x_z + r (R_z h + b_z));   h' = u h + (1 - u) z
    sLSTM  l = logsig(f) + m;  m' = max(i, l);  c' = e^(l-m') c + e^(i-m') tanh(z);  n' = max(e^(l-m') n + e^(i-m'), 1)
           h' = sig(o) c' / n'

Hochreiter, Schmidhuber (1997), Neural Computation 9(8); Cho et al. (2014), EMNLP, arXiv 1406.1078; Beck et al. (2024),
xLSTM, NeurIPS, arXiv 2405.04517 (Eq. 8-17, App. A); heads, layout and the clamp of n as in Poeppel, Beck, Hochreiter
(2024), FlashRNN, arXiv 2412.07752.

Deviations: the reset gate of the GRU acts after the product with R (the cuDNN variant); m of the sLSTM starts at -inf,
which is ``m' = i`` at the first step of every row. With that start n >= 1 holds by itself, even in rounding: one of
the two summands of n' has the factor 1, and n was at least 1. The forget gate of the sLSTM is a sigmoid (the paper
allows an exponential too). One head of LSTM or GRU runs through torch (cuDNN, oneDNN),
on a CPU never in bf16.

Legend: B rows, T steps, I inputs, D width, N heads, E = D / N, G gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from tsforge.core.errors import ConfigError

Cell: TypeAlias = Literal["lstm", "gru", "slstm"]
States: TypeAlias = list[Tensor]
_GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "slstm": 4}
_PARTS: dict[Cell, int] = {"lstm": 2, "gru": 1, "slstm": 4}  # tensors of a state; the first is the output
_FORGET_BIAS = 1.0


def run_torch_cell(cell: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Return what an LSTM, GRU or RNN of torch gives for x and a state (a tensor or a pair of them, None = zeros).

    Never in bf16 on a CPU: oneDNN refuses such an LSTM where the processor lacks AVX-512, with an error of its own.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        found: tuple[Tensor, Any] = cell(x, state)
        return found
    if state is not None:
        state = tuple(part.float() for part in state) if isinstance(state, tuple) else state.float()
    with torch.autocast("cpu", enabled=False):
        found = cell(x.float(), state)
    return found


class RecurrentLayer(nn.Module):
    """One layer over time.

    Args:
        cell: what happens at a step.
        inputs: I.
        width: D, a multiple of ``heads``.
        heads: recurrences side by side that do not see each other's outputs within the layer.

    Shapes:
        x [B, T, I] -> [B, T, D]; a state is [B, S, D], S = 2 (h, c), 1 (h), 4 (h, c, n, m).

    Raises:
        ConfigError: ``width`` is no multiple of ``heads``.
    """

    def __init__(self, cell: Cell, inputs: int, width: int, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"{heads} heads do not divide a width of {width}; choose a divisor of it")
        self.cell, self.width, self.heads = cell, width, heads
        self.own = cell == "slstm" or heads > 1
        if self.own:
            gates, bound = _GATES[cell], 1.0 / math.sqrt(width // heads)
            self.weight_ih = nn.Parameter(torch.empty(gates * width, inputs).uniform_(-bound, bound))
            self.weight_hh = nn.Parameter(
                torch.empty(heads, gates, width // heads, width // heads).uniform_(-bound, bound)
            )
            self.bias = nn.Parameter(torch.empty(gates * width).uniform_(-bound, bound))
            if cell == "gru":
                self.bias_hh = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        else:
            kind = nn.LSTM if cell == "lstm" else nn.GRU
            self.inner = kind(inputs, width, batch_first=True)
        self._remember()

    @torch.no_grad()
    def _remember(self) -> None:
        """Start with forget gates that keep: without it a cell loses what is a few steps back before it learns."""
        if self.cell == "gru":
            return
        bias = self.bias if self.own else self.inner.get_parameter("bias_ih_l0")
        bias[self.width : 2 * self.width] += _FORGET_BIAS

    @property
    def parts(self) -> int:
        """S, tensors of width D in a state."""
        return _PARTS[self.cell]

    def default_state(self, rows: int) -> Tensor:
        """Return the state [B, S, D] before the first step."""
        like = next(self.parameters())
        state = like.new_zeros(rows, self.parts, self.width)
        if self.cell == "slstm":
            state[:, 3] = -torch.inf
        return state

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, D] and the state after the last step; ``state`` None is the default."""
        return self._loop(x, state) if self.own else self._by_torch(x, state)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, D] and state after one step [B, I]."""
        y, state = self.forward(x.unsqueeze(1), state)
        return y[:, 0], state

    def _by_torch(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        given = None if state is None else [part.unsqueeze(0).contiguous() for part in state.unbind(1)]
        if self.cell == "gru":
            y, after = run_torch_cell(self.inner, x, None if given is None else given[0])
            return y, after.transpose(0, 1)
        y, pair = run_torch_cell(self.inner, x, None if given is None else tuple(given))
        return y, torch.cat(pair).transpose(0, 1)

    def _loop(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, steps, _ = x.shape
        heads, each = self.heads, self.width // self.heads
        gates = _GATES[self.cell]
        driven = linear(x, self.weight_ih, self.bias).view(rows, steps, gates, heads, each)
        driven = driven.permute(1, 3, 0, 2, 4)  # [T, N, B, G, E]: the products with R are one batched product a step
        weight = self.weight_hh.flatten(1, 2).transpose(1, 2)  # [N, E, G E]
        first = self.default_state(rows) if state is None else state
        parts = list(first.to(driven.dtype).view(rows, self.parts, heads, each).permute(1, 2, 0, 3).unbind(0))
        outputs = []
        for drive in driven.unbind(0):
            pushed = torch.bmm(parts[0], weight.to(drive.dtype)).view(heads, rows, gates, each)
            parts = self._advance(drive, pushed, parts)
            outputs.append(parts[0])
        y = torch.stack(outputs).permute(2, 0, 1, 3).reshape(rows, steps, self.width)
        return y, torch.stack(parts).permute(2, 0, 1, 3).reshape(rows, self.parts, self.width)

    def _advance(self, drive: Tensor, pushed: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """Return the parts [N, B, E] of the next state from what inputs and outputs give to the gates [N, B, G, E]."""
        if self.cell == "gru":
            reset, update = (drive[:, :, :2] + pushed[:, :, :2]).sigmoid().unbind(2)
            bias = self.bias_hh.view(self.heads, 1, -1)
            new = (drive[:, :, 2] + reset * (pushed[:, :, 2] + bias)).tanh()
            return [new + update * (parts[0] - new)]
        i, f, z, o = (drive + pushed).unbind(2)
        if self.cell == "lstm":
            c = f.sigmoid() * parts[1] + i.sigmoid() * z.tanh()
            return [o.sigmoid() * c.tanh(), c]
        _, c, n, m = parts
        kept = logsigmoid(f) + m
        top = torch.maximum(i, kept)
        old, new = (kept - top).exp(), (i - top).exp()
        c = old * c + new * z.tanh()
        n = (old * n + new).clamp(min=1.0)  # acts only on a state that was begun with zeros
        return [o.sigmoid() * c / n, c, n, top]


class RecurrentStack(nn.Module):
    """Layers one after another, features left out between them and after the last.

    Shapes:
        x [B, T, D] -> [B, T, D]; states: one [B, S, D] a layer.
    """

    def __init__(self, layers: Sequence[RecurrentLayer], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Return features [B, T, D] and the states after the last step."""
        after: States = []
        for index, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[index])
            after.append(state)
            if self.training and self.dropout > 0.0:
                x = nn.functional.dropout1d(x.transpose(1, 2), self.dropout).transpose(1, 2)
        return x, after

    def last(self, x: Tensor) -> Tensor:
        """Return the feature [B, D] of the last step."""
        return self.forward(x)[0][:, -1]

    def step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Return feature [B, D] and states after one step [B, D]."""
        y, states = self.forward(x.unsqueeze(1), states)
        return y[:, 0], states

    def default_states(self, rows: int) -> States:
        """Return the states before the first step."""
        return [layer.default_state(rows) for layer in self.layers if isinstance(layer, RecurrentLayer)]
