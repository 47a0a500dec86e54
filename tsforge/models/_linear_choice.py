"""Penalty and level of a linear forecaster chosen by blocked cross-validation, from moments alone.

Every series is cut into blocks of time; each block is forecast from a fit on the rows before and after it. The held-out
squared error follows from the block's moments, so no window is built. A choice replaces the usual one only where its
mean gain over the blocks, in logarithms, exceeds one standard error: blocks of drifting data disagree, and then nothing
is to be learnt from them (the one-standard-error rule of Breiman et al. 1984, Sec. 3.4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.models._ar_moments import LagLayout, MissingRule, lag_moments
from tsforge.ops.moments import WindowMoments

USUAL_RIDGE = 100.0
RIDGES = (1e1, 1e2, 1e3, 1e4, 3e4, 1e5, 1e6, 1e8)
BLOCKS = 5
_FEWEST = 3


class Choice(NamedTuple):
    """What to remove and the penalty; ``gain`` is the mean held-out gain over the usual choice (log of the error)."""

    remove: str
    ridge: float
    gain: float


def held_out_error(weight: Tensor, moments: WindowMoments, layout: LagLayout) -> float:
    """Return the mean squared error of ``weight`` [H, L] on level-free windows with these moments."""
    length = layout.lags
    gram = moments.gram[: length + layout.horizon, : length + layout.horizon]
    xx, yx, yy = gram[:length, :length], gram[length:, :length], gram[length:, length:]
    total = yy.diagonal().sum() - 2.0 * (weight * yx).sum() + ((weight @ xx) * weight).sum()
    return float(total / (moments.rows * layout.horizon))


def choose(
    values: Tensor,
    mask: Tensor,
    bounds: Sequence[int],
    layout: LagLayout,
    *,
    removes: Sequence[str],
    ridges: Sequence[float],
    missing: MissingRule,
    fit: Callable[[WindowMoments, str, float], Tensor],
    free: Callable[[WindowMoments, str], WindowMoments],
) -> Choice:
    """Return the candidate that forecasts held-out blocks best, or the first one where that is not clear.

    Args:
        values, mask: [N, V] centred training span; ``bounds`` rows where series start, plus the end.
        layout: sizes of a window.
        removes, ridges: candidates; the first ``remove`` with ``USUAL_RIDGE`` (or the only ridge) is the usual choice.
        missing: rule of the moments.
        fit: weight [H, L] of moments for a candidate.
        free: moments after the level of the context was removed.
    """
    usual = (removes[0], USUAL_RIDGE if USUAL_RIDGE in ridges else ridges[0])
    candidates = [usual, *((name, ridge) for name in removes for ridge in ridges if (name, ridge) != usual)]

    def moments(spans: Sequence[tuple[int, int]]) -> WindowMoments | None:
        long = [(first, last) for first, last in spans if last - first >= layout.span]
        rows = torch.cat([torch.arange(first, last) for first, last in long]) if long else torch.zeros(0).long()
        edges = [0, *torch.tensor([last - first for first, last in long]).cumsum(0).tolist()] if long else [0]
        try:
            return lag_moments(layout, values[rows], mask[rows], edges, missing=missing)[0] if long else None
        except ModelError:  # no gap-free stretch is long enough: this part says nothing
            return None

    logs = []
    for block in range(BLOCKS):
        held, rest = _cut(bounds, block, layout.reach)
        test, train = moments(held), moments(rest)
        if test is None or train is None:
            continue
        share = train.rows / max(float(train.rows + test.rows), 1.0)
        errors = [
            held_out_error(fit(train, name, ridge * share), free(test, name), layout) for name, ridge in candidates
        ]
        logs.append([math.log(max(error, 1e-12)) for error in errors])
    if len(logs) < _FEWEST:
        return Choice(*usual, 0.0)
    gains = torch.tensor(logs, dtype=torch.float64)
    gains = gains[:, :1] - gains  # [blocks, candidates]
    mean = gains.mean(0)
    best = int(mean.argmax())
    clear = float(mean[best]) > float(gains[:, best].std() / math.sqrt(len(logs)))
    return Choice(*candidates[best], float(mean[best])) if best and clear else Choice(*usual, 0.0)


def _cut(bounds: Sequence[int], block: int, reach: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the spans of rows that a block holds out, with the context it looks back on, and those around it."""
    held, rest = [], []
    for first, last in pairwise(bounds):
        size = last - first
        start, stop = first + size * block // BLOCKS, first + size * (block + 1) // BLOCKS
        held.append((max(first, start - reach), stop))
        rest += [(first, start), (stop, last)]
    return held, rest
