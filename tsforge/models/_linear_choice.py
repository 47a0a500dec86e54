"""Penalty, level and sharing of a linear forecaster chosen by blocked cross-validation, from moments alone.

Every series is cut into blocks of time; each block is forecast from a fit on the rows before and after it. The held-out
squared error follows from the block's moments, so no window is built. A choice replaces the usual one only where its
mean gain over the blocks, in logarithms, exceeds one standard error: blocks of drifting data disagree, and then nothing
is to be learnt from them (the one-standard-error rule of Breiman et al. 1984, Sec. 3.4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import MissingRule, lag_moments
from tsforge.ops.moments import WindowMoments

USUAL_RIDGE = 100.0
USUAL_SHARE = 0.1  # of the mean diagonal of X'X without levels: where 100 is more, the data say how much they bear
MOST_DOF = 0.5  # of the windows, that a fit chosen by generalised cross-validation may use up
_ALPHAS = torch.logspace(-6, 2, 33, dtype=torch.float64)
RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5, 1e8)
BLOCKS = 5
FACTORS = (1.0, 10.0)  # of the shared penalty a row, tried for a matrix of each variate's own
_FEWEST = 3
_FILLED = 400_000  # values of windows filled for a block: hundreds of fits are compared


class Choice(NamedTuple):
    """What to remove, the penalty, whether every variate gets a matrix of its own, and the log gains over the usual."""

    remove: str
    ridge: float
    separate: bool
    gain: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """A training span and how candidates are fitted on it.

    Attributes:
        values, mask: [N, V], centred.
        bounds: rows where series start, plus the end.
        layout: sizes of a window.
        missing: rule of the moments.
        fit: weight [H, L] of moments for a level and a penalty.
        free: moments after the level of the context was removed.
    """

    values: Tensor
    mask: Tensor
    bounds: Sequence[int]
    layout: LagLayout
    missing: MissingRule
    fit: Callable[[WindowMoments, str, float], Tensor]
    free: Callable[[WindowMoments, str], WindowMoments]

    def moments(self, spans: Sequence[tuple[int, int]], variates: slice) -> WindowMoments | None:
        """Return the moments of some stretches of rows, None where none holds a window."""
        long = torch.tensor([(first, last) for first, last in spans if last - first >= self.layout.span])
        if not len(long):
            return None
        sizes = long[:, 1] - long[:, 0]
        ends = sizes.cumsum(0)
        rows = torch.arange(int(ends[-1])) + (long[:, 1] - ends).repeat_interleave(sizes)
        edges = [0, *ends.tolist()]
        values, mask = self.values[:, variates][rows], self.mask[:, variates][rows]
        if not bool(mask.any()):
            return None
        try:
            return lag_moments(self.layout, values, mask, edges, missing=self.missing, most_values=_FILLED)[0]
        except ModelError:  # no gap-free stretch is long enough: this part says nothing
            return None

    def blocks(self, variates: slice) -> Iterator[tuple[int, WindowMoments, WindowMoments]]:
        """Yield number, training and held-out moments of every block that has both."""
        for block in range(BLOCKS):
            held, rest = cut(self.bounds, block, self.layout.reach)
            test, train = self.moments(held, variates), self.moments(rest, variates)
            if test is not None and train is not None:
                yield block, train, test

    def error(self, train: WindowMoments, test: WindowMoments, remove: str, ridge: float) -> float:
        """Return the summed squared held-out error of a candidate; the penalty shrinks with the rows fitted on."""
        share = train.rows / max(float(train.rows + test.rows), 1.0)
        weight = self.fit(train, remove, ridge * share)
        return held_out_error(weight, self.free(test, remove), self.layout) * float(test.rows)


def held_out_error(weight: Tensor, moments: WindowMoments, layout: LagLayout) -> float:
    """Return the mean squared error of ``weight`` [H, L] on level-free windows with these moments."""
    length = layout.lags
    gram = moments.gram[: length + layout.horizon, : length + layout.horizon]
    xx, yx, yy = gram[:length, :length], gram[length:, :length], gram[length:, length:]
    total = yy.diagonal().sum() - 2.0 * (weight * yx).sum() + ((weight @ xx) * weight).sum()
    return float(total / (moments.rows * layout.horizon))


def usual_ridge(free: WindowMoments, length: int, horizon: int) -> float:
    """Return ``USUAL_RIDGE``; where that would rule the fit (few windows, or smooth ones) what the data say, if less.

    They say it by generalised cross-validation, rss / (1 - dof / rows)^2, among 33 multiples of the mean diagonal whose
    effective coefficients are at most half as many as the windows. These overlap, so more could not be told apart.

    Args:
        free: moments after the level of the context was removed.
        length, horizon: columns of the context, and of the target after them.
    """
    inner, cross = free.gram[:length, :length], free.gram[:length, length : length + horizon]
    mean = float(inner.diagonal().mean())
    if USUAL_SHARE * mean >= USUAL_RIDGE or mean <= 0.0:
        return USUAL_RIDGE
    eigenvalues, vectors = torch.linalg.eigh(inner)
    eigenvalues = eigenvalues.clamp(min=0.0)
    alphas = _ALPHAS * mean
    shrunk = 1.0 / (eigenvalues + alphas[:, None])  # [candidates, length]
    explained = (2.0 * shrunk - eigenvalues * shrunk.square()) @ (vectors.T @ cross).square().sum(1)
    share = (eigenvalues * shrunk).sum(1) / float(free.rows)
    errors = (free.gram.diagonal()[length : length + horizon].sum() - explained).clamp(min=0.0) / (1.0 - share).square()
    allowed = share <= MOST_DOF
    if not bool(allowed.any()):
        return USUAL_RIDGE
    return min(USUAL_RIDGE, float(alphas[torch.where(allowed, errors, torch.inf).argmin()]))


def choose(
    span: Span,
    removes: Sequence[str],
    ridges: Sequence[float],
    *,
    default: float = USUAL_RIDGE,
    may_separate: bool = False,
) -> Choice:
    """Return the candidate that forecasts held-out blocks best, or the usual one where that is not clear.

    Args:
        span: the data.
        removes, ridges: candidates; the first ``remove`` with the usual (or the only) ridge is the usual choice.
        default: that ridge.
        may_separate: also try a matrix of its own for every variate.
    """
    usual = (removes[0], default if default in ridges else ridges[0])
    candidates = [usual, *((name, ridge) for name in removes for ridge in ridges if (name, ridge) != usual)]
    everything = slice(None)
    if len(candidates) == 1 and not may_separate:
        return Choice(*usual, False, 0.0)
    found = {
        block: [span.error(train, test, *candidate) for candidate in candidates]
        for block, train, test in span.blocks(everything)
    }
    if len(found) < _FEWEST:
        return Choice(*usual, False, 0.0)
    logs = torch.tensor(list(found.values()), dtype=torch.float64).clamp(min=1e-12).log()
    best, gain = _clear_best(logs[:, :1] - logs)
    remove, ridge = candidates[best]
    if not may_separate or span.values.shape[1] == 1:
        return Choice(remove, ridge, False, gain)
    shared = logs[:, best]
    own = _separate_errors(span, remove, ridge, list(found)).clamp(min=1e-12).log()  # [blocks, factors]
    factor, more = _clear_best(torch.cat([torch.zeros_like(shared)[:, None], shared[:, None] - own], dim=1))
    if factor == 0:
        return Choice(remove, ridge, False, gain)
    return Choice(remove, ridge / span.values.shape[1] * FACTORS[factor - 1], True, gain + more)


def _clear_best(gains: Tensor) -> tuple[int, float]:
    """Return the column of gains [blocks, candidates] with the best mean if clear, else the first; and its mean."""
    mean = gains.mean(0)
    best = int(mean.argmax())
    error = float(gains[:, best].std()) / math.sqrt(len(gains))
    return (best, float(mean[best])) if best and float(mean[best]) > error else (0, 0.0)


def _separate_errors(span: Span, remove: str, ridge: float, blocks: Sequence[int]) -> Tensor:
    """Return the summed held-out errors [blocks, factors] of one matrix a variate."""
    variates = span.values.shape[1]
    total = torch.zeros(len(blocks), len(FACTORS), dtype=torch.float64)
    for variate in range(variates):
        for block, train, test in span.blocks(slice(variate, variate + 1)):
            if block in blocks:
                row = blocks.index(block)
                for column, factor in enumerate(FACTORS):
                    total[row, column] += span.error(train, test, remove, ridge / variates * factor)
    return total


def cut(bounds: Sequence[int], block: int, reach: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the spans of rows that a block holds out, with the context it looks back on, and those around it."""
    held, rest = [], []
    for first, last in pairwise(bounds):
        size = last - first
        start, stop = first + size * block // BLOCKS, first + size * (block + 1) // BLOCKS
        held.append((max(first, start - reach), stop))
        rest += [(first, start), (stop, last)]
    return held, rest
