"""Residual blocks around the 2-D state space layer of Chimera, and a stack of them; whole, in parts or step by step.

Block: RMSNorm -> Linear to u and z -> (causal convolution along time) -> SiLU -> 2-D layer -> times SiLU(z) -> Linear
-> dropout -> add. A pass over T steps from a state gives the state after them; a step is a pass over one.

Deviations: what the sources say of the paper's block is a data-dependent gate, two heads and non-linearities between
layers; norm, activation, expansion and the place of the gate are chosen here.

Legend: b batch, N variates, T steps, D width, E channels of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, dropout, silu

from tsforge.core.errors import ConfigError
from tsforge.layers.chimera import Chimera2DSSM, LayerState

BlockState: TypeAlias = LayerState  # the heads' states and "conv", the last inputs of the convolution
Parts: TypeAlias = dict[str, Tensor]
_EPSILON = 1e-6


class Pass(NamedTuple):
    """What a pass over T steps gives.

    Shapes:
        x (b, N, T, D) the output; state (one a block) after the last step; ahead, the readouts of the next input,
        head -> (b, N, T, E), empty without such maps; parts, if asked for, name -> (b, N, T, D), adding up to x.
    """

    x: Tensor
    state: list[BlockState]
    ahead: Parts
    parts: Parts


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight along the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def gain(self, x: Tensor) -> Tensor:
        """Return what x is multiplied by; with it held fixed the norm is linear, so parts can be told apart."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x."""
        return x * self.gain(x)


class ChimeraBlock(nn.Module):
    """One residual block.

    Args:
        width: D.
        layer: the 2-D layer over E channels.
        gate: multiply by SiLU of a second branch.
        conv: width of the causal depthwise convolution along time, 0 for none.
        dropout: share of outputs left out in training.

    Raises:
        ConfigError: ``conv`` or ``dropout`` out of range.
    """

    def __init__(
        self, width: int, layer: Chimera2DSSM, *, gate: bool = True, conv: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout is {dropout:g}; it must be at least 0 and below 1")
        if conv < 0 or conv == 1:
            raise ConfigError(f"conv is {conv}; it must be 0 (none) or at least 2 steps")
        channels = layer.D_skip.shape[0]
        self.norm = RMSNorm(width)
        self.into = nn.Linear(width, 2 * channels if gate else channels)
        self.layer = layer
        self.out = nn.Linear(channels, width)
        self.gated, self.width, self.dropout = gate, conv, dropout
        if conv:
            self.conv = nn.Conv1d(channels, channels, conv, groups=channels)

    def _convolved(self, u: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the causal convolution of u (b, N, T, E) and its last inputs (b, N, width - 1, E)."""
        start = u.new_zeros(*u.shape[:2], self.width - 1, u.shape[-1]) if before is None else before.to(u.dtype)
        whole = torch.cat([start, u], dim=2)
        rows = conv1d(
            whole.flatten(0, 1).transpose(1, 2), self.conv.weight, self.conv.bias, groups=self.conv.groups
        ).transpose(1, 2)
        return rows.reshape(u.shape), whole[:, :, u.shape[2] :]

    def forward(
        self,
        x: Tensor,
        observed: Tensor | None = None,
        state: BlockState | None = None,
        *,
        with_parts: bool = False,
        with_state: bool = True,
    ) -> Pass:
        """Return x (b, N, T, D) plus what the block adds; see :class:`Pass`.

        Parts are the heads and ``rest`` (the input, the direct path and biases), each through gate and output map.
        """
        branches = self.into(self.norm(x)).chunk(2, dim=-1) if self.gated else (self.into(self.norm(x)), None)
        u, z = branches
        after: BlockState = {}
        if self.width:
            u, after["conv"] = self._convolved(u, None if state is None else state["conv"])
        found = self.layer(silu(u), observed, state, with_state=with_state)
        after |= found.state
        gate = None if z is None else silu(z)

        def mapped(y: Tensor, bias: Tensor | None) -> Tensor:
            inner = y.to(x.dtype) if gate is None else y.to(gate.dtype) * gate
            return nn.functional.linear(inner, self.out.weight, bias)

        added = mapped(found.y, self.out.bias)
        y = x + dropout(added, self.dropout, self.training)
        if not with_parts:
            return Pass(y, [after], found.ahead, {})
        parts = {name: mapped(part, None) for name, part in found.parts.items()}
        parts["rest"] = x + mapped(found.direct, self.out.bias)
        return Pass(y, [after], found.ahead, parts)

    def default_state(self, batch: int, variates: int) -> BlockState:
        """Return the state before the first step."""
        state = self.layer.default_state(batch, variates)
        if self.width:
            state["conv"] = self.conv.weight.new_zeros(batch, variates, self.width - 1, self.conv.in_channels)
        return state


class ChimeraStack(nn.Module):
    """Blocks one after another and a final norm.

    ``run`` goes through some of the blocks without the norm; the closed loop repeats only the last.
    """

    def __init__(self, blocks: Sequence[ChimeraBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(blocks[0].out.out_features)

    def each(self) -> list[ChimeraBlock]:
        """Return the blocks, first to last."""
        return [block for block in self.blocks if isinstance(block, ChimeraBlock)]

    def run(
        self,
        x: Tensor,
        observed: Tensor | None = None,
        states: Sequence[BlockState] | None = None,
        *,
        blocks: slice = slice(None),
        parts: Parts | None = None,
        with_states: bool = True,
    ) -> Pass:
        """Return the output of some blocks before the norm.

        Args:
            x: (b, N, T, D).
            observed: (b, N, T), None for all.
            states: one for each of these blocks, None for zeros.
            blocks: which of them.
            parts: of x, by name, to be carried through; None = not asked for. Every block adds its own to them.
            with_states: return the states; time-invariant layers are faster without.
        """
        after: list[BlockState] = []
        ahead: Parts = {}
        carried: Parts = {} if parts is None else dict(parts)
        for index, block in enumerate(self.each()[blocks]):
            given = None if states is None else states[index]
            found = block(x, observed, given, with_parts=parts is not None, with_state=with_states)
            for name, part in found.parts.items():
                own = part - x if name == "rest" else part
                carried[name] = carried[name] + own if name in carried else own
            x, ahead = found.x, found.ahead
            after += found.state
        return Pass(x, after, ahead, carried)

    def forward(self, x: Tensor, observed: Tensor | None = None, states: Sequence[BlockState] | None = None) -> Pass:
        """Return features (b, N, T, D) after all blocks and the norm."""
        found = self.run(x, observed, states)
        return found._replace(x=self.norm(found.x))

    def default_states(self, batch: int, variates: int) -> list[BlockState]:
        """Return the states before the first step, one a block."""
        return [block.default_state(batch, variates) for block in self.each()]
