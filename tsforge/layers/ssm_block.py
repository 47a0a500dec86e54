"""Residual blocks around a state space layer, and a stack of them that runs whole, in chunks or step by step.

Block: Norm -> SSM + D u -> GELU -> dropout (one mask for all steps) -> Linear to twice the width -> GLU -> dropout ->
add (Gu, Goel, Re 2022, arXiv 2111.00396; pre-norm, a final norm after the last block). LayerNorm works on each step
alone, so streaming and batch agree.

Legend: B batch, L steps, D width, M channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout1d, gelu, glu, pad

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.ssm import SSM

States: TypeAlias = list[Tensor]


class SSMBlock(nn.Module):
    """One residual block.

    Args:
        ssm: the layer that looks back.
        dropout: share of features left out, the same ones at every step of a sequence.
        backward: a second layer that looks ahead; then the block is no longer causal and cannot forecast or stream.

    Shapes:
        x [B, L, D] -> [B, L, D].
    """

    def __init__(self, ssm: SSM, *, dropout: float = 0.0, backward: SSM | None = None) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout is {dropout:g}; it must be at least 0 and below 1")
        width = ssm.features
        self.norm = nn.LayerNorm(width)
        self.ssm = ssm
        self.backward_ssm = backward
        self.out = nn.Linear(ssm.channels * width, 2 * width)
        self.dropout = dropout

    @property
    def causal(self) -> bool:
        """False when outputs depend on later inputs."""
        return self.backward_ssm is None

    def _tail(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x [B, L, D] plus what the outputs y [B, M, D, L] of the layer become."""
        mixed = gelu(y.flatten(1, 2).to(x.dtype))
        if self.training and self.dropout > 0.0:
            mixed = dropout1d(mixed, self.dropout)
        gated = glu(self._map(mixed), dim=1)
        if self.training and self.dropout > 0.0:
            gated = dropout1d(gated, self.dropout)
        return x + gated.transpose(1, 2)

    def _map(self, mixed: Tensor) -> Tensor:
        """Return the linear map of features [B, M D, L], [B, 2 D, L]."""
        weight, bias = self.out.weight, self.out.bias
        length, width = mixed.shape[-1], mixed.shape[1]
        if 2 * length < width:  # the gradient of one weight a sequence would be larger than the sequences
            return self.out(mixed.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        size = (len(mixed), -1, -1)  # features stay in front of steps: no copy of what the convolution gave
        return torch.baddbmm(bias[:, None].expand(len(mixed), -1, length), weight.expand(size), mixed)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, elapsed: Tensor | None = None, with_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and, where a state was given or asked for, the state after the last step.

        Args:
            x: [B, L, D].
            state: of the layer, None for zeros.
            elapsed: [B, L] grid steps that each step took; None = 1 each.
            with_state: return the state even if none was given.
        """
        u = self.norm(x).transpose(1, 2)
        after: Tensor | None
        if elapsed is not None:
            y, after = self.ssm.irregular(u, elapsed, state)
        else:
            y, after = self.ssm(u, state, with_state=with_state)
        if self.backward_ssm is not None:
            if after is not None:
                raise ModelError("a block that looks ahead has no state to carry; build it without the backward layer")
            later, _ = self.backward_ssm(
                pad(u, (0, 1))[..., 1:].flip(-1)
            )  # strictly later inputs: no step counts twice
            y = y + later.flip(-1)
        return self._tail(x, y), after

    def last(self, x: Tensor) -> Tensor:
        """Return the output [B, D] at the last step only."""
        self._need_causal()
        y = self.ssm.last(self.norm(x).transpose(1, 2))
        return self._tail(x[:, -1:], y.unsqueeze(-1))[:, 0]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, D] and state after one step [B, D]."""
        self._need_causal()
        y, state = self.ssm.step(self.norm(x), state)
        return self._tail(x.unsqueeze(1), y.unsqueeze(-1))[:, 0], state

    def _need_causal(self) -> None:
        if not self.causal:
            raise ModelError("a block that looks ahead cannot forecast or stream; build it without the backward layer")


class SSMStack(nn.Module):
    """Blocks one after another, and a final norm; causal.

    Raises:
        ModelError: a block looks ahead.
    """

    def __init__(self, blocks: Sequence[SSMBlock]) -> None:
        super().__init__()
        ahead = [index for index, block in enumerate(blocks) if not block.causal]
        if ahead:
            raise ModelError(
                f"block {ahead[0]} looks ahead (bidirectional); a forecaster would read the future with it"
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(blocks[0].ssm.features)

    def forward(
        self, x: Tensor, states: States | None = None, *, elapsed: Tensor | None = None, with_states: bool = False
    ) -> tuple[Tensor, States]:
        """Return features [B, L, D] and the states (empty unless given or asked for)."""
        after: States = []
        for index, block in enumerate(self.blocks):
            given = None if states is None else states[index]
            x, state = block(x, given, elapsed=elapsed, with_state=with_states)
            if state is not None:
                after.append(state)
        return self.norm(x), after

    def last(self, x: Tensor) -> Tensor:
        """Return features [B, D] of the last step; the last block is computed there only."""
        for block in list(self.blocks)[:-1]:
            x, _ = block(x)
        final = self.blocks[-1]
        assert isinstance(final, SSMBlock)
        normed: Tensor = self.norm(final.last(x))
        return normed

    def step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Return features [B, D] and states after one step [B, D]."""
        after: States = []
        for block, state in zip(self.blocks, states, strict=True):
            assert isinstance(block, SSMBlock)
            x, state = block.step(x, state)
            after.append(state)
        return self.norm(x), after

    def default_states(self, batch: int) -> States:
        """Return the zero states of all blocks."""
        return [block.ssm.default_state(batch) for block in self.blocks if isinstance(block, SSMBlock)]

    def layers(self) -> list[SSM]:
        """Return the state space layers, first to last."""
        return [block.ssm for block in self.blocks if isinstance(block, SSMBlock)]


def memory_lengths(kernel: Tensor, share: float = 0.95) -> Tensor:
    """Return for each feature [H] how many steps back hold ``share`` of the kernel's absolute weight [M, H, L]."""
    weight = kernel.detach().double().abs().sum(0).cumsum(-1)
    return (weight < share * weight[..., -1:]).sum(-1) + 1
