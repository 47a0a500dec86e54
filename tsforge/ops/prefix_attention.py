"""Softmax attention of one fixed query over every prefix of a sequence, as a recurrence with constant state.

Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori (2024), Attention as an RNN, arXiv 2405.13956 (Sec. 3). A set of tokens
with scores s_j and values v_j is summarised by

    top = max s_j,    weight = sum e^(s_j - top),    total = sum e^(s_j - top) v_j,    output = total / weight

and two summaries are merged by moving both to the larger top. With a decay, a token counts e^(-decay) less for every
step that has passed since: a position code that knows no longest length.

Prefixes are computed in chunks: within one, the weights e^(s_j - top_i) of j <= i are a small triangular matrix, whose
rows each have the top of their own prefix; the summaries of the chunks are tokens again and go through the same
procedure, then each is merged into the next chunk. Work is O(n), depth O(log n).

Deviation: not a parallel scan over pairs, which takes log n passes over everything. Nor sums of e^(s - chunk top) along
a chunk, although they need less work: a token whose score is above the others' by more than the range of the exponent
(88 in float32) makes every output before it 0 / 0. Tops carry no gradient: outputs do not depend on them.

Legend: ... leading axes (rows, heads), n tokens, D entries of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tsforge.core.errors import ModelError

CHUNK = 16  # tokens; on a CPU 8 to 32 differ little, 64 takes twice as long


class Summary(NamedTuple):
    """What a set of tokens is to the query: top [...], weight [...], total [..., D]; an empty set is -inf, 0, 0."""

    top: Tensor
    weight: Tensor
    total: Tensor

    def output(self) -> Tensor:
        """Return the attention output [..., D]; 0 for an empty set."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0).unsqueeze(-1)


def token(score: Tensor, value: Tensor) -> Summary:
    """Return the summary of one token each: score [...], value [..., D]."""
    return Summary(score, torch.ones_like(score), value)


def nothing(shape: tuple[int, ...], width: int, like: Tensor) -> Summary:
    """Return empty summaries, top and weight ``shape``, total [*shape, width], with type and device of ``like``."""
    return Summary(like.new_full(shape, -torch.inf), like.new_zeros(shape), like.new_zeros(*shape, width))


def merge(first: Summary, second: Summary) -> Summary:
    """Return the summary of the tokens of both; associative and commutative."""
    top = torch.maximum(first.top, second.top).detach()
    base = _finite(top)
    one, two = (first.top - base).exp(), (second.top - base).exp()
    return Summary(
        top,
        first.weight * one + second.weight * two,
        first.total * one.unsqueeze(-1) + second.total * two.unsqueeze(-1),
    )


def later(summary: Summary, decay: Tensor | float | None, steps: Tensor | int) -> Summary:
    """Return a summary as it counts ``steps`` later; ``decay`` a step and ``steps`` broadcast to its ``top`` [...]."""
    return summary if decay is None else summary._replace(top=summary.top - decay * steps)


def summarise(scores: Tensor, values: Tensor, decay: Tensor | None = None, before: Summary | None = None) -> Summary:
    """Return the summary of all tokens, and of what came ``before``, at the time of the last.

    Shapes and errors are those of ``prefix_attention``: scores [..., n], values [..., n, D] -> a summary of [...].
    """
    scores, values, decay, before = _checked(scores, values, decay, before)
    length = scores.shape[-1]
    with torch.autocast(scores.device.type, enabled=False):
        if decay is not None:
            age = torch.arange(length - 1, -1, -1, device=scores.device, dtype=scores.dtype)
            scores = scores - decay.unsqueeze(-1) * age
        top = scores.detach().amax(-1)
        part = (scores - _finite(top).unsqueeze(-1)).exp()
        found = Summary(top, part.sum(-1), (part.unsqueeze(-2) @ values).squeeze(-2))
        return found if before is None else merge(later(before, decay, length), found)


def prefix_attention(
    scores: Tensor,
    values: Tensor,
    decay: Tensor | None = None,
    before: Summary | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Summary]:
    """Return the attention output of every prefix, and the summary of all tokens to go on from.

    Args:
        scores: [..., n], -inf for tokens that are not there.
        values: [..., n, D].
        decay: [...], not negative, broadcast over the leading axes: what the score of a token loses a step.
        before: summary of earlier tokens, None = none.
        chunk: tokens of a chunk, at least 2; changes nothing but speed.

    Returns:
        Outputs [..., n, D] in the type of ``values``, 0 before the first token that is there; the summary at the last
        token. Half precision is summed up in float32.

    Raises:
        ModelError: no tokens, scores and values of different lengths, or a chunk below 2.
    """
    if chunk < 2:
        raise ModelError(f"chunk is {chunk}; it must be at least 2")
    dtype = values.dtype
    scores, values, decay, before = _checked(scores, values, decay, before)
    with torch.autocast(scores.device.type, enabled=False):
        found = _prefixes(token(scores, values), decay, chunk)
        if before is not None:
            found = _continued(before, found, decay)
        return found.output().to(dtype), Summary(found.top[..., -1], found.weight[..., -1], found.total[..., -1, :])


def _prefixes(tokens: Summary, decay: Tensor | None, chunk: int) -> Summary:
    """Return the summaries of all prefixes of summaries [..., n], each at the time of its last one."""
    *lead, length = tokens.top.shape
    if length <= chunk:
        return _triangle(tokens, decay)
    count = -(-length // chunk)
    missing = count * chunk - length
    chunks = Summary(
        pad(tokens.top, (0, missing), value=-torch.inf).reshape(*lead, count, chunk),
        pad(tokens.weight, (0, missing)).reshape(*lead, count, chunk),
        pad(tokens.total, (0, 0, 0, missing)).reshape(*lead, count, chunk, tokens.total.shape[-1]),
    )
    inner = _triangle(chunks, None if decay is None else decay.unsqueeze(-1))
    ends = Summary(inner.top[..., :-1, -1], inner.weight[..., :-1, -1], inner.total[..., :-1, -1, :])
    carried = _prefixes(ends, None if decay is None else decay * chunk, chunk)
    carried = Summary(
        pad(carried.top, (1, 0), value=-torch.inf), pad(carried.weight, (1, 0)), pad(carried.total, (0, 0, 1, 0))
    )
    whole = _continued(carried, inner, None if decay is None else decay.unsqueeze(-1))
    return Summary(
        whole.top.flatten(-2)[..., :length],
        whole.weight.flatten(-2)[..., :length],
        whole.total.flatten(-3, -2)[..., :length, :],
    )


def _triangle(tokens: Summary, decay: Tensor | None) -> Summary:
    """Return the summaries of all prefixes by one product with a triangular matrix."""
    length = tokens.top.shape[-1]
    place = torch.arange(length, device=tokens.top.device)
    ahead = None if decay is None else decay.unsqueeze(-1) * (length - 1 - place)  # what a token has yet to lose
    scores = tokens.top if ahead is None else tokens.top - ahead
    top = scores.detach().cummax(-1).values
    after = place > place.unsqueeze(-1)
    parts = (scores.unsqueeze(-2) - _finite(top).unsqueeze(-1)).masked_fill(after, -torch.inf).exp()
    weight = (parts @ tokens.weight.unsqueeze(-1)).squeeze(-1)
    return Summary(top if ahead is None else top + ahead, weight, parts @ tokens.total)


def _continued(before: Summary, prefixes: Summary, decay: Tensor | None) -> Summary:
    """Return prefixes [..., n] that begin with what was summarised before [...]."""
    steps = torch.arange(1, prefixes.top.shape[-1] + 1, device=prefixes.top.device)
    held = Summary(before.top.unsqueeze(-1), before.weight.unsqueeze(-1), before.total.unsqueeze(-2))
    return merge(later(held, None if decay is None else decay.unsqueeze(-1), steps), prefixes)


def _finite(top: Tensor) -> Tensor:
    """Return tops to subtract: of an empty set the least number, so that -inf stays -inf."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def _checked(
    scores: Tensor, values: Tensor, decay: Tensor | None, before: Summary | None
) -> tuple[Tensor, Tensor, Tensor | None, Summary | None]:
    """Return the arguments in at least float32.

    Raises:
        ModelError: no tokens, or scores and values of different lengths.
    """
    if scores.ndim < 1 or values.ndim != scores.ndim + 1 or values.shape[-2] != scores.shape[-1]:
        raise ModelError(
            f"scores {tuple(scores.shape)} and values {tuple(values.shape)} do not fit: expected [..., n], [..., n, D]"
        )
    if scores.shape[-1] == 0:
        raise ModelError("no tokens: attention needs at least one")
    dtype = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    return (
        scores.to(dtype),
        values.to(dtype),
        None if decay is None else decay.to(dtype),
        None if before is None else Summary(*(part.to(dtype) for part in before)),
    )
