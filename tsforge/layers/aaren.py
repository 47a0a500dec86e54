"""Aaren: a Transformer block whose self-attention is that of one learned query a head over all tokens so far.

Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori (2024), Attention as an RNN, arXiv 2405.13956 (Sec. 3.3). Work is linear
in the steps and the state of a layer has one size however many tokens it has seen (``tsforge.ops.prefix_attention``).

Block: x + out(attention(norm(x))), then x + feed-forward(norm(x)); a last norm after the stack (pre-norm). Outputs do
not depend on the order of earlier tokens, so a position code is needed: ``decay`` lowers the score of a token by a
learned amount a step, one a head, which knows no longest length; ``sinusoid`` adds sines and cosines of the step to
the tokens (Vaswani et al. 2017, arXiv 1706.03762, Sec. 3.5), counted from the first.

Deviations: pre-norm and GELU; the decay is ours (a slope a head as in ALiBi, Press, Smith, Lewis 2022, ICLR, arXiv
2108.12409, but learned). Keys have no bias: a softmax does not see it.

Legend: B rows, T steps, D width, N heads, E = D / N.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout1d, softplus

from tsforge.core.errors import ConfigError
from tsforge.ops.prefix_attention import Summary, later, merge, nothing, prefix_attention, summarise, token

States: TypeAlias = list[Tensor]
Position: TypeAlias = Literal["decay", "sinusoid", "none"]
_WIDER = 2  # hidden units of the feed-forward part for each feature


class AarenBlock(nn.Module):
    """One block.

    Args:
        width: D, a multiple of ``heads``.
        heads: N, queries.
        half_lives: [N] steps after which a token counts half at the start of training; None = tokens do not age.
        dropout: share of features left out in training, the same ones at every step of a row.

    Shapes:
        x [B, T, D] -> [B, T, D]; a state is [B, N, E + 2]: top, weight and total of every head.

    Raises:
        ConfigError: ``width`` is no multiple of ``heads``.
    """

    def __init__(self, width: int, heads: int, half_lives: Tensor | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"{heads} heads do not divide a width of {width}; choose a divisor of it")
        self.heads, self.each = heads, width // heads
        self.dropout = dropout
        self.query = nn.Parameter(torch.randn(heads, self.each))
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.wide_norm = nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Linear(width, _WIDER * width), nn.GELU(), nn.Linear(_WIDER * width, width))
        self.raw_decay: nn.Parameter | None = None
        if half_lives is not None:
            self.raw_decay = nn.Parameter(torch.expm1(math.log(2.0) / half_lives).log())  # inverse of softplus

    def decay(self) -> Tensor | None:
        """Return what the score of a token loses a step [N], or None."""
        return None if self.raw_decay is None else softplus(self.raw_decay)

    def half_lives(self) -> Tensor | None:
        """Return after how many steps a token counts half [N], or None."""
        decay = self.decay()
        return None if decay is None else math.log(2.0) / decay

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, N, T] and values [B, N, T, E]."""
        normed = self.norm(x)
        keys = self.key(normed).unflatten(-1, (self.heads, self.each))
        scores = (keys * self.query).sum(-1) / math.sqrt(self.each)
        return scores.transpose(1, 2), self.value(normed).unflatten(-1, (self.heads, self.each)).transpose(1, 2)

    def _tail(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return what x [B, T, D] becomes with the outputs [B, N, T, E] of the heads."""
        x = x + self._thinned(self.out(attended.to(x.dtype).transpose(1, 2).flatten(2)))
        return x + self._thinned(self.wide(self.wide_norm(x)))

    def _thinned(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        return dropout1d(x.transpose(1, 2), self.dropout).transpose(1, 2)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, D] and the state after the last step."""
        before = None if state is None else _unpacked(state)
        attended, after = prefix_attention(*self._tokens(x), self.decay(), before)
        return self._tail(x, attended), _packed(after)

    def last(self, x: Tensor) -> Tensor:
        """Return the output [B, D] at the last step only: one softmax instead of prefixes."""
        attended = summarise(*self._tokens(x), self.decay()).output()
        return self._tail(x[:, -1:], attended.unsqueeze(2))[:, 0]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, D] and state after one step [B, D]."""
        scores, values = self._tokens(x.unsqueeze(1))
        after = merge(later(_unpacked(state), self.decay(), 1), token(scores[..., 0], values[..., 0, :]))
        return self._tail(x.unsqueeze(1), after.output().unsqueeze(2))[:, 0], _packed(after)

    def default_state(self, rows: int) -> Tensor:
        """Return the state [B, N, E + 2] before the first token."""
        return _packed(nothing((rows, self.heads), self.each, self.query))


def _packed(summary: Summary) -> Tensor:
    return torch.cat([summary.top.unsqueeze(-1), summary.weight.unsqueeze(-1), summary.total], dim=-1)


def _unpacked(state: Tensor) -> Summary:
    return Summary(state[..., 0], state[..., 1], state[..., 2:])


class AarenStack(nn.Module):
    """Blocks one after another, position code in front, a final norm.

    Args:
        width, heads, layers, dropout: see ``AarenBlock``.
        position: code of the order of tokens.
        span: tokens of a usual sequence; half-lives start between 2 and that.

    Shapes:
        x [B, T, D] -> [B, T, D]; states: one a block, and with ``sinusoid`` the number of tokens so far [B].
    """

    def __init__(
        self, width: int, heads: int, layers: int, *, position: Position = "decay", span: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__()
        half_lives = None
        if position == "decay":
            half_lives = torch.logspace(math.log10(2.0), math.log10(max(float(span), 2.0)), heads)
        self.width, self.position = width, position
        self.blocks = nn.ModuleList(AarenBlock(width, heads, half_lives, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def _placed(self, x: Tensor, counted: Tensor | None) -> Tensor:
        """Return tokens [B, T, D] with their position, the first of them being number ``counted`` [B] (None: 0)."""
        if self.position != "sinusoid":
            return x
        place = torch.arange(x.shape[1], device=x.device)
        if counted is not None:
            place = place + counted.unsqueeze(1)
        rate = torch.exp(torch.arange(0, self.width, 2, device=x.device).double() * (-math.log(1e4) / self.width))
        turn = place.unsqueeze(-1).double() * rate  # float64: a sine of step 100,000 in float32 is off by a hundredth
        return x + torch.stack([turn.sin(), turn.cos()], dim=-1).flatten(-2)[..., : self.width].to(x.dtype)

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Return features [B, T, D] and the states after the last step."""
        counted = states[-1] if states is not None and self.position == "sinusoid" else None
        length, after = x.shape[1], []
        x = self._placed(x, counted)
        for index, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[index])
            after.append(state)
        return self.norm(x), after + self._counted(counted, x, length)

    def _counted(self, counted: Tensor | None, x: Tensor, steps: int) -> States:
        if self.position != "sinusoid":
            return []
        before = torch.zeros(len(x), dtype=torch.int64, device=x.device) if counted is None else counted
        return [before + steps]

    def last(self, x: Tensor) -> Tensor:
        """Return the feature [B, D] of the last step; the last block is computed there only."""
        x = self._placed(x, None)
        *front, final = self.blocks
        for block in front:
            x, _ = block(x)
        assert isinstance(final, AarenBlock)
        normed: Tensor = self.norm(final.last(x))
        return normed

    def step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Return feature [B, D] and states after one step [B, D]."""
        counted = states[-1] if self.position == "sinusoid" else None
        x = self._placed(x.unsqueeze(1), counted)[:, 0]
        after: States = []
        for block, state in zip(self.blocks, states[: len(self.blocks)], strict=True):
            assert isinstance(block, AarenBlock)
            x, state = block.step(x, state)
            after.append(state)
        return self.norm(x), after + self._counted(counted, x, 1)

    def default_states(self, rows: int) -> States:
        """Return the states before the first token."""
        states = [block.default_state(rows) for block in self.blocks if isinstance(block, AarenBlock)]
        return states + self._counted(None, self.norm.weight.expand(rows, -1), 0)
