"""Second moments of all windows of a series without building a window, and least squares from them.

A window of width D starting at row t is z_t = (y[t], ..., y[t + D - 1]). Everything a linear model needs is
``gram = sum_t z_t z_t'`` and ``sums = sum_t z_t``. Neighbouring windows differ by one row in and one row out, so
``gram[j + 1, k + 1] = gram[j, k] + y[m + j] y[m + k] - y[j] y[k]``; only the first row needs a correlation over the
whole series, and that is one FFT. Cost O(n log n + D^2) against O(n D^2) for explicit windows.

Legend: n rows of a series, m = n - D + 1 windows, D window width, T targets, p features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import irfft, next_fast_len, rfft
from torch import Tensor

from tsforge.core.errors import ModelError

_DIRECT_ROWS = 64  # below this many windows a plain matrix product beats the FFT


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


def _correlate(left: Tensor, right: Tensor, lags: int) -> Tensor:
    """Return ``sum_t left[t] right[t + k]`` for k = 0 .. lags - 1 (right holds len(left) + lags - 1 values)."""
    size = next_fast_len(right.numel(), real=True)  # what wraps around lies beyond the last lag
    if left.device.type == "cpu":  # several times faster than torch's at lengths that are no power of two
        spectrum = rfft(left.numpy(), size)
        spectrum = np.conj(spectrum, out=spectrum) * rfft(right.numpy(), size)
        return torch.from_numpy(irfft(spectrum, size)[:lags])
    product = torch.fft.rfft(left, size).conj() * torch.fft.rfft(right, size)
    correlation: Tensor = torch.fft.irfft(product, size)
    return correlation[:lags]


def cross_moments(left: Tensor, right: Tensor, rows: int, left_width: int, right_width: int) -> Tensor:
    """Return ``C[j, k] = sum_{t < rows} left[t + j] right[t + k]``, [left_width, right_width] float64.

    Raises:
        ModelError: a series is shorter than ``rows + width - 1``.
    """
    same = left is right
    left, right = left.to(torch.float64), right.to(torch.float64)
    for series, width in ((left, left_width), (right, right_width)):
        if rows < 1 or series.numel() < rows + width - 1:
            raise ModelError(f"{series.numel()} values hold no {rows} windows of width {width}")
    if rows < _DIRECT_ROWS:
        return left.unfold(0, left_width, 1)[:rows].T @ right.unfold(0, right_width, 1)[:rows]
    result = torch.empty(left_width, right_width, dtype=torch.float64, device=left.device)
    result[0] = _correlate(left[:rows], right[: rows + right_width - 1], right_width)
    if same and left_width == right_width:
        result[1:, 0] = result[0, 1:]
    else:
        result[1:, 0] = _correlate(right[:rows], left[: rows + left_width - 1], left_width)[1:]
    entering, leaving = right[rows : rows + right_width - 1], right[: right_width - 1]
    head = torch.stack([left[rows : rows + left_width - 1], -left[: left_width - 1]], dim=1)  # [left_width - 1, 2]
    change = head @ torch.stack([entering, leaving])  # [left_width - 1, right_width - 1]
    for row in range(left_width - 1):
        torch.add(result[row, :-1], change[row], out=result[row + 1, 1:])
    return result


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

    Args:
        channels: what a window holds; ``start + width`` of each is at most ``span``.
        runs: [start, stop) rows without gaps (``observed_runs``); shorter ones than ``span`` add nothing.
        span: rows a window covers.

    Raises:
        ModelError: no run is long enough.
    """
    total: WindowMoments | None = None
    for first, last in runs:
        if last - first >= span:
            parts = [channel.values[first + channel.start : last].to(torch.float64) for channel in channels]
            moments = _run_moments(channels, parts, last - first - span + 1)
            total = moments if total is None else total + moments
    if total is None:
        raise ModelError(
            f"no gap-free stretch of the training span has {span} rows (context plus horizon); "
            "use shorter windows or more data"
        )
    return total


def _run_moments(channels: Sequence[Channel], parts: Sequence[Tensor], rows: int) -> WindowMoments:
    """Return the moments of the ``rows`` windows of one run; each part begins where its channel's first column does."""

    def block(i: int, j: int) -> Tensor:
        return cross_moments(parts[i], parts[j], rows, channels[i].width, channels[j].width)

    sums = []
    for channel, part in zip(channels, parts, strict=True):
        cumulative = torch.cat([part.new_zeros(1), part[: rows + channel.width - 1].cumsum(0)])
        sums.append(cumulative[rows:] - cumulative[: channel.width])
    return WindowMoments(_blocks(channels, block), torch.cat(sums), float(rows))


def _blocks(channels: Sequence[Channel], block: Callable[[int, int], Tensor]) -> Tensor:
    """Return the symmetric matrix whose block (i, j), i <= j, is ``block(i, j)``."""
    upper = {(i, j): block(i, j) for i in range(len(channels)) for j in range(i, len(channels))}
    return torch.cat(
        [
            torch.cat([upper[i, j] if i <= j else upper[j, i].T for j in range(len(channels))], dim=1)
            for i in range(len(channels))
        ]
    )


def window_moments(segments: Iterable[Tensor], width: int) -> WindowMoments:
    """Return the moments of every window of ``width`` rows inside each segment; no window crosses a seam.

    Segments shorter than ``width`` add nothing. Centre the values first: sums of squares of an offset of 1e6 would
    lose the signal to rounding.

    Raises:
        ModelError: no segment is long enough.
    """
    parts = list(segments)
    ends = [0, *accumulate(part.numel() for part in parts)]
    values = torch.cat(parts) if parts else torch.zeros(0)
    return channel_moments([Channel(values, width)], list(pairwise(ends)), width)


def window_moments_reference(segments: Iterable[Tensor], width: int) -> WindowMoments:
    """Return what ``window_moments`` returns, from explicit windows (slow, for tests)."""
    windows = torch.cat([part.double().unfold(0, width, 1) for part in segments if part.numel() >= width])
    return WindowMoments(windows.T @ windows, windows.sum(0), float(windows.shape[0]))


def observed_runs(mask: Tensor, bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the [start, stop) of every stretch without a gap; stretches end where a series ends.

    Args:
        mask: [N] bool, all series one after another.
        bounds: row where each series starts, plus the end of the last one.
    """
    runs: list[tuple[int, int]] = []
    for start, stop in pairwise(bounds):
        part = mask[start:stop].to(torch.int8)
        edges = torch.diff(part, prepend=part.new_zeros(1), append=part.new_zeros(1))
        first = (torch.nonzero(edges == 1).flatten() + start).tolist()
        last = (torch.nonzero(edges == -1).flatten() + start).tolist()
        runs += list(zip(first, last, strict=True))
    return runs


def pairwise_moments(channels: Sequence[Channel], bounds: Sequence[int], span: int) -> WindowMoments:
    """Return window moments from every observed pair, for data with too many gaps for whole windows.

    Each entry is the mean product of the pairs seen at that place, shrunk towards its mean over the diagonal (a
    stationary series has equal diagonals) by the missing share, then eigenvalues are clipped at a small positive value,
    because pairwise moments need not be a covariance. Values must be centred; ``sums`` come back as 0, and ``rows`` is
    the smallest number of pairs behind an entry.

    Raises:
        ModelError: no series has ``span`` rows, or a pair of columns was never seen together.
    """
    seen = [torch.ones_like(c.values, dtype=torch.bool) if c.mask is None else c.mask for c in channels]
    clean = [torch.where(mask, c.values.to(torch.float64), 0.0) for c, mask in zip(channels, seen, strict=True)]
    counted = [mask.to(torch.float64) for mask in seen]
    fits = [(first, last) for first, last in pairwise(bounds) if last - first >= span]
    if not fits:
        raise ModelError(f"no series of the training span has {span} rows (context plus horizon); use shorter windows")
    fewest: list[float] = []

    def block(i: int, j: int) -> Tensor:
        left, right = channels[i], channels[j]
        products = torch.zeros(left.width, right.width, dtype=torch.float64, device=left.values.device)
        counts = torch.zeros_like(products)
        for first, last in fits:
            rows = last - first - span + 1
            a, b = slice(first + left.start, last), slice(first + right.start, last)
            products += cross_moments(clean[i][a], clean[j][b], rows, left.width, right.width)
            counts += cross_moments(counted[i][a], counted[j][b], rows, left.width, right.width).round()
        shrink = 1.0 - min(float(counted[i].mean()), float(counted[j].mean()))
        fewest.append(float(counts[counts > 0].min()) if bool((counts > 0).any()) else 0.0)
        return _shrunk_means(products, counts, shrink)

    mixed = _blocks(channels, block)
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (mixed + mixed.T))
    clipped = eigenvalues.clamp(min=1e-6 * float(eigenvalues[-1].clamp(min=1e-12)))
    rows_seen = min(fewest)
    gram = (vectors * clipped) @ vectors.T * rows_seen
    return WindowMoments(gram, gram.new_zeros(len(gram)), rows_seen)


def _shrunk_means(products: Tensor, counts: Tensor, shrink: float) -> Tensor:
    """Return mean products, drawn towards their diagonal's mean by ``shrink``; an unseen entry takes that mean."""
    rows, columns = products.shape
    place = torch.arange(columns, device=products.device)[None, :] - torch.arange(rows, device=products.device)[:, None]
    place = place + rows - 1  # 0 .. rows + columns - 2, one value a diagonal
    size = rows + columns - 1
    totals = products.new_zeros(size).index_add_(0, place.flatten(), products.flatten())
    pairs = products.new_zeros(size).index_add_(0, place.flatten(), counts.flatten())
    if not bool((pairs > 0).all()):
        missing = int((pairs <= 0).sum())
        raise ModelError(f"{missing} of {size} lags have no observed pair in the training span; use shorter windows")
    toeplitz = (totals / pairs)[place]
    own = torch.where(counts > 0, products / counts.clamp(min=1.0), toeplitz)
    return (1.0 - shrink) * own + shrink * toeplitz


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
