"""Autocovariances and the recursions on them: Levinson-Durbin, Burg, and the map between partial
autocorrelations and coefficients. Everything is float64 numpy; each costs O(p^2) after one FFT, except where rows have
long gaps.

There neither the pairs seen nor lines over the gaps need say anything of the process: lines as long as a season leave
out the season. Its autocovariances are iterated instead (expectation maximisation): gaps take their expectation given
every row seen, under the autoregression of the round before, and the conditional covariance of that, without which
every round would find a smoother process. Deviations from the algorithm as published, each for a reason: the maximising
step solves the Yule-Walker equations, which is stationary always and one recursion, where the exact one is neither; the
conditional covariance is that of a few draws, the same in all rounds, since its exact inverse costs more than all else
and a sum over thousands of rows does not need it. Neither is sure to raise the likelihood, so the first round that
hardly does ends it (more of them fit the noise of short series), and lines stay, unchanged, where that is the first.

Legend: y_t = sum_i w[i] y_{t-1-i} + e_t; phi[k]: partial autocorrelation of lag k + 1; N rows, M missing ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.linalg import LinAlgError, cho_solve_banded, cholesky_banded, hankel, solve_banded, solve_toeplitz, toeplitz

from tsforge.core.errors import ModelError

Array = NDArray[np.float64]
_SOUND = 0.9  # least share of the lines' one-step variance that sound pairs leave: lines leave too little, not too much
_CELLS = 1 << 17  # of one batch of transforms: larger ones leave the cache
_SHORT = 6  # rows of a gap that a line bridges well, and no more than this part of the lags:
_SHORT_SHARE = 16
_ROUNDS = 20
_GAIN = 5e-3  # least gain of a round in log-likelihood a value seen; less is within what draws change
_DRAWS = 2
_MOST_VALUES = 8_000_000  # rows times lags of the stretches that are filled: 64 MB, enough for any number of lags
_STRETCH = 50  # orders, the length of stretches to choose from: what they taper is little


@dataclass(frozen=True)
class Levinson:
    """Result of an order recursion.

    Shapes:
        weight [p] coefficients of the full order, pacf [p] partial autocorrelations,
        variances [p + 1] one-step error variance of every order 0 .. p.
    """

    weight: Array
    pacf: Array
    variances: Array

    def order(self, criterion: str, rows: float) -> int:
        """Return the order with the least ``"aic"`` or ``"bic"``, free by-products of the recursion."""
        price = {"aic": 2.0, "bic": float(np.log(rows))}[criterion]
        orders = np.arange(len(self.variances))
        return int(np.argmin(rows * np.log(np.maximum(self.variances, 1e-300)) + price * orders))


def lagged_products(
    values: NDArray[Any], mask: NDArray[np.bool_] | None, spans: NDArray[np.int64], max_lag: int
) -> Array:
    """Return ``sum_t values[t] values[t + d]`` within each span, summed over spans, for d = 0 .. ``max_lag``.

    Spans whose transforms have one length go through the FFT together, all variates at once, and come back as one sum.

    Shapes:
        values [N, V] of any number type, mask [N, V] (False counts as 0; None = all True), spans [S, 2]: first row and
        row after the last. Returns [V, max_lag + 1].
    """
    variates = values.shape[1]
    size = spans[:, 1] - spans[:, 0]
    width = np.array([_transform_length(int(rows) + max_lag) for rows in size], dtype=np.int64)
    result = np.zeros((variates, max_lag + 1))
    for length in np.unique(width[size > 0]):
        group = np.flatnonzero((width == length) & (size > 0))
        power: Any = 0.0
        batches = min(len(group), -(-len(group) * int(length) * variates // _CELLS))
        for part in np.array_split(group, batches):
            block = np.zeros((len(part), int(size[part].max()), variates))
            for place, (start, stop) in enumerate(spans[part].tolist()):
                where = True if mask is None else mask[start:stop]
                np.copyto(block[place, : stop - start], values[start:stop], where=where)
            spectrum = rfft(block, int(length), axis=1, overwrite_x=True)
            power = power + (spectrum.real**2 + spectrum.imag**2).sum(axis=0)
        result += irfft(power, int(length), axis=0)[: max_lag + 1].T
    return result


def _transform_length(least: int) -> int:
    """Return an even length of at least ``least``, with small factors, one of few: series share inverse transforms."""
    power = 2
    while 30 * power < least:
        power *= 2
    return next(step * power for step in (16, 18, 20, 24, 27, 30) if step * power >= least)


def autocovariance(values: Array, mask: NDArray[np.bool_], bounds: Sequence[int], max_lag: int) -> Array:
    """Return autocovariances of lag 0 .. ``max_lag`` pooled over series, from observed pairs only.

    Without gaps this is the usual biased estimator ``sum y[t] y[t + d] / n`` of one centred series (its Toeplitz matrix
    is positive definite). With gaps each lag's mean product is taken over the pairs seen and keeps the same taper.

    Shapes:
        values [N] or [N, V] centred (anything where not observed), mask alike, bounds [num_series + 1] rows. Returns
        [max_lag + 1] or [V, max_lag + 1].

    Raises:
        ModelError: nothing of a variate is observed.
    """
    if values.ndim == 1:
        single: Array = autocovariance(values[:, None], mask[:, None], bounds, max_lag)[0]
        return single
    unseen = int((~mask.any(axis=0)).sum())
    if unseen:
        raise ModelError(f"no observed value of {unseen} of {mask.shape[1]} variates in the training span")
    edges = np.asarray(bounds, dtype=np.int64)
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    lags = np.arange(max_lag + 1)
    pairs = np.maximum(np.diff(edges)[:, None] - lags, 0)  # [S, max_lag + 1]
    whole = np.array([mask[start:stop].all() for start, stop in spans.tolist()], dtype=bool)
    counts = pairs[whole].sum(axis=0) + np.round(lagged_products(mask, None, spans[~whole], max_lag))
    full = pairs.sum(axis=0)
    result: Array = lagged_products(values, mask, spans, max_lag) / np.maximum(counts, 1.0) * full / full[0]
    return result


def sound_autocovariance(values: Array, mask: NDArray[np.bool_], bounds: Sequence[int], max_lag: int) -> Array:
    """Return ``autocovariance``, of rows with bridged gaps for a variate whose observed pairs contradict each other.

    Pairs are consistent, but lags are averaged over different rows: where neighbouring rows are nearly equal, the
    disagreement outweighs what is new in a row, and together the lags are the autocovariances of no process. Straight
    lines over the gaps always are, if a little too smooth ones. So pairs are taken where their recursion runs through
    and leaves about as much variance as that of the lines, or more. Else lines are, and where they bridge a long gap
    they are the first guess of an iteration, see the module docstring.

    Shapes:
        as in ``autocovariance`` with values [N, V].
    """
    found = autocovariance(values, mask, bounds, max_lag)
    for variate in np.flatnonzero(~mask.all(axis=0)):
        pairs = levinson(found[variate])
        seen = mask[:, variate]
        lines = bridged(values[:, variate], seen, bounds)
        other = autocovariance(lines, np.ones_like(seen), bounds, max_lag)
        left, through = pairs.variances[-1] / max(pairs.variances[0], 1e-300), bool((pairs.pacf != 0.0).all())
        recursion = levinson(other)
        if not through or left < _SOUND * recursion.variances[-1] / max(recursion.variances[0], 1e-300):
            found[variate] = other
            if _longest_gap(seen, bounds) > short_gap(max_lag):
                found[variate] = _iterated(np.where(seen, values[:, variate], 0.0), seen, bounds, other)
    return found


def short_gap(lags: int) -> int:
    """Return the most rows of a gap that a straight line may bridge for an autoregression of so many lags."""
    return min(_SHORT, lags // _SHORT_SHARE)


def _longest_gap(seen: NDArray[np.bool_], bounds: Sequence[int]) -> int:
    """Return the most rows in a row without a value, up to the ends of each series that has one."""
    longest = 0
    for first, last in pairwise(bounds):
        rows = np.flatnonzero(seen[first:last])
        if len(rows):
            longest = max(longest, int(np.diff(rows, prepend=-1, append=last - first).max()) - 1)
    return longest


def _iterated(values: Array, seen: NDArray[np.bool_], bounds: Sequence[int], start: Array) -> Array:
    """Return the autocovariances [p + 1] under which the values seen are likeliest, ``start`` or those of a round.

    Shapes:
        values [N] centred, 0 where not seen, seen [N], start [p + 1] autocovariances of a process.

    Source:
        Dempster, Laird, Rubin (1977), J. R. Stat. Soc. B 39; deviations in the module docstring.
    """
    rows, edges = _stretches(seen, bounds, len(start) - 1)
    values, seen = values[rows], seen[rows]
    whole = np.ones((len(rows), 1 + _DRAWS), dtype=bool)
    best, top, current = start, -np.inf, start
    for _ in range(_ROUNDS):
        recursion = levinson(current)
        if recursion.variances[-1] <= 0.0:
            break
        try:
            mean, draws, noise, likelihood = _conditional(recursion, values, seen, edges, _DRAWS)
        except LinAlgError:  # a root within rounding of the unit circle
            break
        if noise <= 0.0 or likelihood <= top + _GAIN * seen.sum():
            break
        best, top = current, likelihood
        # Expected products: a draw and its negative are as likely, so that products of mean and draw cancel.
        found = autocovariance(np.column_stack([mean, draws]), whole, edges.tolist(), len(start) - 1)
        current = found[0] + noise * found[1:].mean(axis=0)
    return best


def _stretches(
    seen: NDArray[np.bool_], bounds: Sequence[int], order: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows between the first and the last one seen of each series, and their bounds among each other.

    Where that is more than can be filled, a random choice of stretches stands for all.
    """
    spans = [
        (first + int(rows[0]), first + int(rows[-1]) + 1)
        for first, last in pairwise(bounds)
        if len(rows := np.flatnonzero(seen[first:last]))
    ]
    most = _MOST_VALUES // (order + 1)
    if sum(stop - start for start, stop in spans) > most:
        size = _STRETCH * (order + 1)
        parts = [(a, min(a + size, stop)) for start, stop in spans for a in range(start, stop, size)]
        parts = [(start, stop) for start, stop in parts if seen[start:stop].any()]
        shuffled = np.random.default_rng(0).permutation(len(parts))
        total = np.cumsum([parts[k][1] - parts[k][0] for k in shuffled])
        spans = [parts[k] for k in np.sort(shuffled[: max(int(np.searchsorted(total, most, side="right")), 1)])]
    rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
    return rows, np.cumsum([0, *(stop - start for start, stop in spans)])


def _conditional(
    process: Levinson, values: Array, seen: NDArray[np.bool_], bounds: NDArray[np.int64], draws: int
) -> tuple[Array, Array, float, float]:
    """Return what a stationary autoregression expects of every row given those seen, and how likely those are.

    The precision of consecutive rows has a band of p diagonals, and so has that of the missing ones among them: one
    banded Cholesky factor gives expectation, draws and likelihood of whole series in O(M p^2). Series lie side by side
    with p zeros after each, which keeps filters apart; one of fewer than p rows is one with missing rows after it.

    Shapes:
        values [N], 0 where not seen, seen [N], bounds [S + 1]. Returns the expectation [N], ``draws`` deviations
        [N, draws] from it for unit noise, 0 where seen, the likeliest noise variance, and the log-likelihood for that
        but for a constant.

    Source:
        Gohberg and Semencul (1972) as in ``precision_matrix``, whose two factors are filters here.
    """
    from scipy.signal import lfilter

    order, size = len(process.weight), np.diff(bounds)
    length = np.maximum(size, order)
    offset = np.cumsum(length + order) - length - order
    place = np.arange(len(values)) + np.repeat(offset - bounds[:-1], size)
    within = np.full(int((length + order).sum()), -1)
    for first, rows in zip(offset.tolist(), length.tolist(), strict=True):
        within[first : first + rows] = np.arange(rows)
    inside = within >= 0
    full, missing = np.zeros(len(inside)), inside.copy()
    full[place] = values
    missing[place[seen]] = False
    gaps = np.flatnonzero(missing)
    taps = np.concatenate([[1.0], -process.weight])
    tail = toeplitz(taps[:0:-1], np.zeros(order))  # of the last p rows, on the first p entries of the other factor
    last = (offset + length)[:, None] + np.arange(-order, 0)

    def factors(rows: Array) -> tuple[Array, Array]:
        forward = np.where(inside, lfilter(taps, 1.0, rows[::-1])[::-1], 0.0)
        return forward, rows[last] @ tail

    deviation, upper = np.zeros((len(inside), draws)), None
    if len(gaps):
        forward, ends = factors(full)
        pull = lfilter(taps, 1.0, forward)
        pull[last] -= ends @ tail.T
        band = _precision_band(taps, gaps, within[gaps], np.repeat(length, length + order)[gaps])
        upper = cholesky_banded(band, overwrite_ab=True)
        full[gaps] = cho_solve_banded((upper, False), -pull[gaps])
        noise = np.random.default_rng(0).standard_normal((len(gaps), draws))  # the same for every process
        deviation[gaps] = solve_banded((0, len(upper) - 1), upper, noise)
    forward, ends = factors(full)
    count = int(seen.sum())
    variance = (float(forward @ forward) - float((ends**2).sum())) / count
    volume = len(size) * float(np.log(process.variances[:-1] / process.variances[-1]).sum())
    volume += 0.0 if upper is None else 2.0 * float(np.log(upper[-1]).sum())
    likelihood = -0.5 * (count * float(np.log(max(variance, 1e-300))) + volume)
    return full[place], deviation[place], variance, likelihood


def _precision_band(
    taps: Array, gaps: NDArray[np.int64], within: NDArray[np.int64], length: NDArray[np.int64]
) -> Array:
    """Return the upper band [b + 1, M] of the precision between missing rows, for ``cholesky_banded``.

    Shapes:
        taps [p + 1] (1, -w), gaps [M] rows ascending, more than p apart if of different series, within [M] and
        length [M]: each one's row in its series, and that one's rows.
    """
    order = len(taps) - 1
    shifted = hankel(taps, np.zeros(order + 1))  # [d, k]: tap k + d, if any
    sums = np.cumsum(taps * shifted, axis=1)  # [d, k]: of the first k + 1 products of taps d apart
    width = int((np.searchsorted(gaps, gaps + order, side="right") - np.arange(len(gaps))).max())
    band = np.zeros((width, len(gaps)))
    for step in range(width):
        lag = gaps[step:] - gaps[: len(gaps) - step]
        near = lag <= order
        lag = lag[near]
        start, most = within[: len(gaps) - step][near], order - lag
        stop = length[: len(gaps) - step][near] - 1 - lag - start
        entry = sums[lag, np.minimum(start, most)] + sums[lag, np.minimum(stop, most)] - sums[lag, most]
        band[width - 1 - step, step:][near] = entry
    return band


def bridged(values: Array, mask: NDArray[np.bool_], bounds: Sequence[int]) -> Array:
    """Return values [N] with straight lines over the gaps of each series, its nearest value at the ends, 0 in one that
    observed nothing.
    """
    result = np.zeros(len(values))
    for first, last in pairwise(bounds):
        seen = np.flatnonzero(mask[first:last])
        if len(seen):
            result[first:last] = np.interp(np.arange(last - first), seen, values[first:last][seen])
    return result


def levinson(acov: Array) -> Levinson:
    """Return the autoregression of order ``len(acov) - 1`` that matches these autocovariances.

    The recursion adds one lag at a time; a partial autocorrelation at or beyond 1 (possible with gaps) stops it, and
    the remaining lags get zero, which keeps the result stationary.

    Source:
        Durbin (1960), Rev. Inst. Int. Stat. 28; equals the Toeplitz solve of the Yule-Walker equations.
    """
    order = len(acov) - 1
    weight, pacf = np.zeros(order), np.zeros(order)
    variances = np.empty(order + 1)
    variances[0] = max(float(acov[0]), 0.0)
    for k in range(order):
        variances[k + 1 :] = variances[k]
        if variances[k] <= 0.0:
            break
        reflection = (acov[k + 1] - weight[:k] @ acov[k:0:-1]) / variances[k]
        if abs(reflection) >= 1.0:
            break
        weight[:k] -= reflection * weight[:k][::-1].copy()
        weight[k] = pacf[k] = reflection
        variances[k + 1] = variances[k] * (1.0 - reflection**2)
    return Levinson(weight, pacf, variances)


def yule_walker_direct(acov: Array, order: int, horizon: int) -> Array:
    """Return weights [horizon, order] of the best linear forecast of each step given ``order`` lags.

    ``acov`` holds lags 0 .. order + horizon - 1.
    """
    right = np.stack([acov[step : step + order] for step in range(1, horizon + 1)], axis=1)  # [order, horizon]
    return np.asarray(solve_toeplitz(acov[:order], right), dtype=np.float64).T


def burg(segments: Sequence[Array], order: int) -> Levinson:
    """Return the autoregression that minimises forward and backward errors, lag by lag, pooled over segments.

    More accurate than Yule-Walker on short series, and always stationary. Segments are gap-free and centred.

    Source:
        Burg (1967), 37th meeting of the Society of Exploration Geophysicists; pooled sums over segments.

    Raises:
        ModelError: no segment is longer than ``order``.
    """
    forward = [np.asarray(part, dtype=np.float64).copy() for part in segments if len(part) > 1]
    if not forward or max(len(part) for part in forward) <= order:
        longest = max((len(part) for part in forward), default=0)
        raise ModelError(f"Burg's method needs a gap-free stretch longer than {order} lags; the longest has {longest}")
    backward = [part.copy() for part in forward]
    weight, pacf = np.zeros(order), np.zeros(order)
    variances = np.empty(order + 1)
    variances[0] = sum(float(part @ part) for part in forward) / sum(len(part) for part in forward)
    for k in range(order):
        pairs = [(f[1:], b[:-1]) for f, b in zip(forward, backward, strict=True) if len(f) > 1]
        power = sum(float(f @ f + b @ b) for f, b in pairs)
        reflection = 2.0 * sum(float(f @ b) for f, b in pairs) / power if power > 0.0 else 0.0
        forward = [f - reflection * b for f, b in pairs]
        backward = [b - reflection * f for f, b in pairs]
        weight[:k] -= reflection * weight[:k][::-1].copy()
        weight[k] = pacf[k] = reflection
        variances[k + 1] = variances[k] * (1.0 - reflection**2)
    return Levinson(weight, pacf, variances)


def pacf_to_weights(pacf: Array) -> Array:
    """Return AR coefficients with these partial autocorrelations; stationary whenever all lie inside (-1, 1)."""
    weight = np.zeros(len(pacf))
    for k, reflection in enumerate(pacf):
        weight[:k] -= reflection * weight[:k][::-1].copy()
        weight[k] = reflection
    return weight


def weights_to_pacf(weight: Array) -> Array:
    """Return the partial autocorrelations of an AR model (step-down recursion).

    The process is stationary exactly when all of them lie inside (-1, 1); where one does not, the recursion stops and
    the lower lags come back as NaN.
    """
    current = np.asarray(weight, dtype=np.float64).copy()
    pacf = np.full(len(current), np.nan)
    for k in range(len(current) - 1, -1, -1):
        reflection = pacf[k] = current[k]
        if abs(reflection) >= 1.0:
            break
        current = (current[:k] + reflection * current[:k][::-1]) / (1.0 - reflection**2)
    return pacf
