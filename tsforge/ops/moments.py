"""Second moments of all windows of a span without building a window, and least squares from them.

A window of width D starting at row t is z_t = (y[t], ..., y[t + D - 1]). Everything a linear model needs is
``gram = sum_t z_t z_t'`` and ``sums = sum_t z_t``. Neighbouring windows differ by one row in and one row out, so over m
windows in a row ``gram[j + 1, k + 1] = gram[j, k] + y[m + j] y[m + k] - y[j] y[k]``, and over several such runs the
changes add up. Only the first row of the gram needs a correlation over all rows. It is taken over all series at once,
with a weight of 1 on rows where a window starts and 0 elsewhere, so ten thousand series cost what one long series of as
many rows costs: O(n min(D, log D) + R D^2) against O(n D^2) for explicit windows.

Legend: n rows of the span, R runs of consecutive windows, D window width, T targets, p features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import next_fast_len, rfft
from torch import Tensor
from torch.nn.functional import pad

from tsforge.core.errors import ModelError

_FEW_LAGS = 64  # up to here a matrix product of rows laid side by side beats the FFT (5 to 20 against 25 ns a row)
_STEP = 32  # rows laid side by side in it
_CHUNK_VALUES = 1 << 19  # values at a time, 4 MB: fits a cache, and memory does not grow with the span


@dataclass(frozen=True)
class WindowMoments:
    """Sums over windows: gram [D, D], sums [D], and how many windows they hold. Moments of several series add up."""

    gram: Tensor
    sums: Tensor
    rows: float

    def __add__(self, other: WindowMoments) -> WindowMoments:
        return WindowMoments(self.gram + other.gram, self.sums + other.sums, self.rows + other.rows)

    def transform(self, matrix: Tensor) -> WindowMoments:
        """Return the moments of ``matrix @ z`` for every window z (matrix [E, D])."""
        return WindowMoments(matrix @ self.gram @ matrix.T, matrix @ self.sums, self.rows)

    def centered(self) -> Tensor:
        """Return the gram matrix [D, D] of windows whose column means were removed."""
        return self.gram - torch.outer(self.sums, self.sums) / self.rows


@dataclass(frozen=True)
class LeastSquares:
    """A linear fit from moments.

    Shapes:
        weight [T, p], bias [T], rss [T] residual sums of squares, leverage [p]: the factor that turns the residual
        variance into the variance of a coefficient. ``dof`` counts effective coefficients without the intercept.
    """

    weight: Tensor
    bias: Tensor
    rss: Tensor
    leverage: Tensor
    dof: float
    rows: float


class WindowStarts(NamedTuple):
    """Where windows start: ``rows[r]`` of them in consecutive rows from ``first[r]`` on, none across two runs.

    Shapes:
        first [R] int64, rows [R] int64 (at least 1 each), weight [N] float64: windows that start in each row.
    """

    first: Tensor
    rows: Tensor
    weight: Tensor

    @classmethod
    def of_runs(cls, runs: Sequence[tuple[int, int]], span: int, size: int, device: torch.device) -> WindowStarts:
        """Return the starts of all windows of ``span`` rows inside the runs [start, stop) of ``size`` rows."""
        edges = torch.tensor(list(runs), dtype=torch.int64, device=device).reshape(-1, 2)
        first, rows = edges[:, 0], edges[:, 1] - edges[:, 0] - span + 1
        first, rows = first[rows > 0], rows[rows > 0]
        return cls(first, rows, _count_inside(first, first + rows, size).to(torch.float64))

    def ends(self, series: Tensor, width: int, part: slice) -> tuple[Tensor, Tensor]:
        """Return the first ``width - 1`` values of some runs, and those that follow the start of their last window."""
        column = torch.arange(width - 1, device=series.device)
        first = self.first[part, None] + column
        return series[first], series[first + self.rows[part, None]]

    def parts(self, width: int) -> Iterator[slice]:
        """Yield the runs in parts of bounded memory."""
        step = max(_CHUNK_VALUES // width, 1)
        return (slice(start, start + step) for start in range(0, len(self.first), step))


def _count_inside(first: Tensor, last: Tensor, size: int) -> Tensor:
    """Return how many of the spans [first, last) hold each of ``size`` rows, int32."""
    change = torch.zeros(size + 1, dtype=torch.int32, device=first.device)
    one = torch.ones_like(first, dtype=torch.int32)
    return change.index_add_(0, first, one).index_add_(0, last, -one)[:-1].cumsum(0, dtype=torch.int32)


def _correlate(weight: Tensor, left: Tensor, right: Tensor, lags: int) -> Tensor:
    """Return ``sum_t weight[t] left[t] right[t + k]`` for k = 0 .. lags - 1, reading 0 after the end of a series."""
    count = min(weight.numel(), left.numel())
    if lags <= _FEW_LAGS:
        product = left.new_zeros(_STEP, _STEP + lags - 1)
        for before, after in _side_by_side(weight[:count], left, right, lags, _STEP):
            product += before.T @ after
        return product.as_strided((_STEP, lags), (_STEP + lags, 1)).sum(0)
    size = next_fast_len(min(8 * lags, count + lags - 1), real=True)  # no lag of a block wraps around
    spectrum = torch.zeros(size // 2 + 1, dtype=torch.complex128, device=left.device)
    for before, after in _side_by_side(weight[:count], left, right, lags, size - lags + 1):
        if left.device.type == "cpu":  # several times faster than torch's at lengths that are no power of two
            part = rfft(before.numpy(), size)
            part = np.conj(part, out=part)
            part *= rfft(after.numpy(), size)
            spectrum += torch.from_numpy(part.sum(0))
        else:
            spectrum += (torch.fft.rfft(before, size).conj() * torch.fft.rfft(after, size)).sum(0)
    correlation: Tensor = torch.fft.irfft(spectrum, size)
    return correlation[:lags]


def _side_by_side(weight: Tensor, left: Tensor, right: Tensor, lags: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``weight * left`` [q, step] in blocks of rows, and what they meet on the right [q, step + lags - 1]."""
    width = step + lags - 1
    count, rows = weight.numel(), max(_CHUNK_VALUES // width, 1) * step
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        blocks = -(-(stop - start) // step)
        before = _to_length(weight[start:stop] * left[start:stop], blocks * step)
        after = _to_length(right[start : start + blocks * step + lags - 1], blocks * step + lags - 1)
        yield before.view(blocks, step), after.unfold(0, width, step)


def _to_length(values: Tensor, length: int) -> Tensor:
    return values if len(values) == length else pad(values, (0, length - len(values)))


def cross_moments(left: Tensor, right: Tensor, starts: WindowStarts, left_width: int, right_width: int) -> Tensor:
    """Return ``C[j, k] = sum_t left[t + j] right[t + k]`` over window starts t, [left_width, right_width] float64.

    All values must be finite, those outside the windows too.

    Raises:
        ModelError: a series ends before a window does.
    """
    same = left is right
    left, right = left.to(torch.float64), right.to(torch.float64)
    last = int((starts.first + starts.rows).max()) if len(starts.first) else 0
    for series, width in ((left, left_width), (right, right_width)):
        if series.numel() < last + width - 1:
            raise ModelError(f"{series.numel()} values hold no window of width {width} from row {last - 1} on")
    result = torch.empty(left_width, right_width, dtype=torch.float64, device=left.device)
    result[0] = _correlate(starts.weight, left, right, right_width)
    if same and left_width == right_width:
        result[1:, 0] = result[0, 1:]
    elif left_width > 1:
        result[1:, 0] = _correlate(starts.weight, right, left, left_width)[1:]
    change = torch.zeros(left_width - 1, right_width - 1, dtype=torch.float64, device=left.device)
    for part in starts.parts(left_width + right_width):
        leaving, entering = starts.ends(left, left_width, part)
        others = starts.ends(right, right_width, part)
        change += torch.cat([-leaving, entering]).T @ torch.cat(others)
    for row in range(left_width - 1):
        torch.add(result[row, :-1], change[row], out=result[row + 1, 1:])
    return result


def _column_sums(series: Tensor, starts: WindowStarts, width: int) -> Tensor:
    """Return ``sum_t series[t + j]`` over window starts t for j = 0 .. width - 1."""
    count = min(starts.weight.numel(), series.numel())
    steps = series.new_zeros(width)
    steps[0] = torch.dot(starts.weight[:count], series[:count])
    for part in starts.parts(width):
        leaving, entering = starts.ends(series, width, part)
        steps[1:] += entering.sum(0) - leaving.sum(0)
    return steps.cumsum(0)


class Channel(NamedTuple):
    """One run of columns of a window: ``width`` consecutive rows of a series, beginning ``start`` rows into the window.

    Shapes:
        values [N], mask [N] bool or None when nothing is missing; all series one after another.
    """

    values: Tensor
    width: int
    start: int = 0
    mask: Tensor | None = None


def channel_moments(channels: Sequence[Channel], runs: Sequence[tuple[int, int]], span: int) -> WindowMoments:
    """Return the moments of windows whose columns are the channels side by side; no window crosses the end of a run.

    Centre the values first: sums of squares of an offset of 1e6 would lose the signal to rounding.

    Args:
        channels: what a window holds; ``start + width`` of each is at most ``span``.
        runs: [start, stop) rows without gaps (``observed_runs``); shorter ones than ``span`` add nothing.
        span: rows a window covers.

    Raises:
        ModelError: no run is long enough.
    """
    size, device = channels[0].values.numel(), channels[0].values.device
    starts = WindowStarts.of_runs(runs, span, size, device)
    if not len(starts.first):
        raise ModelError(
            f"no gap-free stretch of the training span has {span} rows (context plus horizon); "
            "use shorter windows or more data"
        )
    inside = _count_inside(starts.first, starts.first + starts.rows + span - 1, size) > 0
    parts = [channel.values.to(torch.float64).contiguous() for channel in channels]
    if not bool(inside.all()):  # what is in no window may be anything, NaN included
        parts = [torch.where(inside, part, 0.0) for part in parts]
    parts = [part[channel.start :] for part, channel in zip(parts, channels, strict=True)]
    widths = [channel.width for channel in channels]

    def block(i: int, j: int) -> Tensor:
        return cross_moments(parts[i], parts[j], starts, widths[i], widths[j])

    sums = torch.cat([_column_sums(part, starts, width) for part, width in zip(parts, widths, strict=True)])
    return WindowMoments(_blocks(channels, block), sums, float(starts.rows.sum()))


def _blocks(channels: Sequence[Channel], block: Callable[[int, int], Tensor]) -> Tensor:
    """Return the symmetric matrix whose block (i, j), i <= j, is ``block(i, j)``."""
    upper = {(i, j): block(i, j) for i in range(len(channels)) for j in range(i, len(channels))}
    return torch.cat(
        [
            torch.cat([upper[i, j] if i <= j else upper[j, i].T for j in range(len(channels))], dim=1)
            for i in range(len(channels))
        ]
    )


def observed_runs(mask: Tensor, bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the [start, stop) of every stretch without a gap; stretches end where a series ends.

    Args:
        mask: [N] bool, all series one after another.
        bounds: row where each series starts, plus the end of the last one.
    """
    edge = torch.zeros(len(mask) + 1, dtype=torch.bool, device=mask.device)
    edge[torch.as_tensor(bounds, dtype=torch.int64, device=mask.device)] = True
    seen = pad(mask, (1, 1))  # [N + 2]
    seen[: bounds[0] + 1], seen[bounds[-1] + 1 :] = False, False
    first = torch.nonzero(seen[1:-1] & (edge[:-1] | ~seen[:-2])).flatten()
    last = torch.nonzero(seen[1:-1] & (edge[1:] | ~seen[2:])).flatten() + 1
    return list(zip(first.tolist(), last.tolist(), strict=True))


def solve_gram(gram: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gram^-1 right`` and ``gram^-1`` for a symmetric non-negative matrix.

    Cholesky where the matrix is safely positive definite; otherwise the minimum-norm solution from eigenvalues, so
    that constant series and repeated covariates have an answer.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if int(info) == 0 and gram.numel() and float(diagonal.min()) > 1e-7 * float(diagonal.max()):
        return torch.cholesky_solve(right, factor), torch.cholesky_inverse(factor)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    largest = float(eigenvalues[-1]) if eigenvalues.numel() else 0.0
    keep = eigenvalues > max(largest, 1e-300) * 1e-13
    inverse = (vectors[:, keep] / eigenvalues[keep]) @ vectors[:, keep].T
    return inverse @ right, inverse


def least_squares(
    moments: WindowMoments, features: Tensor, targets: Tensor, *, ridge: float = 0.0, intercept: bool = True
) -> LeastSquares:
    """Return the least-squares fit of the target columns on the feature columns of a window.

    Args:
        moments: of windows that hold both.
        features: [p] int64 columns of the window used as inputs, in the order of the weights.
        targets: [T] int64 columns to be predicted.
        ridge: added to the diagonal of the feature gram, in units of the sum over windows; never on the intercept.
        intercept: fit a constant for each target.
    """
    gram = moments.centered() if intercept else moments.gram
    inner, cross = gram[features][:, features], gram[features][:, targets]  # [p, p], [p, T]
    spread = gram.diagonal()[targets]
    if ridge > 0.0:
        solution, inverse = solve_gram(inner + ridge * torch.eye(len(features), dtype=inner.dtype).to(inner), cross)
        hat = inverse @ inner
        leverage, dof = (hat * inverse).sum(1), float(hat.diagonal().sum())
    else:
        solution, inverse = solve_gram(inner, cross)
        leverage, dof = inverse.diagonal(), float(len(features))
    rss = spread - 2.0 * (solution * cross).sum(0) + (solution * (inner @ solution)).sum(0)
    weight = solution.T.contiguous()  # [T, p]
    bias = (moments.sums[targets] - weight @ moments.sums[features]) / moments.rows
    if not intercept:
        bias = torch.zeros_like(bias)
    return LeastSquares(weight, bias, rss.clamp(min=0.0), leverage.clamp(min=0.0), dof, moments.rows)


def ridge_by_gcv(
    moments: WindowMoments, features: Tensor, targets: Tensor, *, num_alphas: int = 25
) -> tuple[float, Tensor]:
    """Return the ridge (sum units) with the least generalised cross-validation error, and the errors of the path.

    One eigendecomposition serves every candidate: ``num_alphas`` values from 1e-8 to 1e2 times the mean feature
    variance. The error is ``rss / rows / (1 - dof / rows)^2``, summed over targets.
    """
    gram = moments.centered()
    inner, cross = gram[features][:, features], gram[features][:, targets]
    eigenvalues, vectors = torch.linalg.eigh(inner)
    eigenvalues = eigenvalues.clamp(min=0.0)
    rotated = vectors.T @ cross  # [p, T]
    total = gram.diagonal()[targets].sum()
    alphas = torch.logspace(-8, 2, num_alphas, dtype=torch.float64).to(gram) * inner.diagonal().mean().clamp(min=1e-300)
    errors = []
    for alpha in alphas:
        shrunk = 1.0 / (eigenvalues + alpha)
        explained = ((2.0 * shrunk - eigenvalues * shrunk**2)[:, None] * rotated**2).sum()
        dof = (eigenvalues * shrunk).sum() + 1.0
        share = (1.0 - dof / moments.rows).clamp(min=1e-3)
        errors.append((total - explained).clamp(min=0.0) / moments.rows / share**2)
    path = torch.stack(errors)
    return float(alphas[int(path.argmin())]), path
