"""Changed dynamics without outliers: what a trailing window of rows does, against what the training rows did.

    spectrum   Hellinger distance D_H of the window's power spectrum from the mean spectrum of training windows
    states     divergence KL(window || training) of the states (x[t], x[t - lag]) that a variate visits
    regions    mean of -ln p(region, region before) over the window, p by counts of training

The marginal distribution may stay what it was: frequencies, transitions and regions tell. Windows end at the rows whose
absolute number is a multiple of ``stride``; a row has the score of the last of them, so that it depends on a bounded
number of rows up to it and on nothing else. A window that is observed to less than 90 % has no score (NaN). Every
window is worked out by itself: whatever stands beside it, its score has the same bits. A variate of which training rows
hold too little has no score; where that is so of all, nothing can be compared.

Sources: D_H and the divergence of visited states as in Mikhaeil et al. (2022) and Hess et al. (2023), arXiv 2306.04406;
see :mod:`tsforge.metrics`. Deviations: the reference is a mean of normalised spectra of windows, because a window is
shorter than the training rows; states are those of one variate in delay coordinates, so that every variate has a score;
counts of the reference are smoothed by half a count a cell, states outside its range belong to the outermost cells; a
variate that never moved in training has spectral distance 0 while it stands still, and 1 when it moves.

Legend: N scored rows, R training rows, V variates, K windows, F frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from tsforge.anomaly.uncomparable import Uncomparable, window_advice

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
MIN_OBSERVED = 0.9
_PRIOR = 0.5
_MARGIN = 0.1  # share of the standard deviation by which cells reach beyond the training range
_MOST_CELLS = 1 << 21  # numbers of all windows held at once
_FLAT = 1e-9
_SHORTEST = 16  # rows of a window that a config takes


@dataclass(frozen=True)
class Windows:
    """Which windows judge which rows: ``window`` rows long, ending at every row that ``stride`` divides.

    Attributes:
        before: rows before a window that its numbers are made of too.
    """

    window: int
    stride: int
    before: int = 0

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.window - 1 + self.stride - 1 + self.before

    def blocks(self, series: NDArray[Any], first: int) -> Iterator[NDArray[Any]]:
        """Yield the windows [K, window] of the rows from absolute row ``first`` on, many at a time.

        Args:
            series: [reach + N], the first one ``reach`` rows before row ``first``.
        """
        count = len(series) - self.reach
        if count <= 0:
            return
        skipped = first % self.stride
        every = np.lib.stride_tricks.sliding_window_view(series, self.window)
        every = every[self.reach - self.window + 1 - skipped :: self.stride]
        size = max(_MOST_CELLS // self.window, 1)
        for start in range(0, len(every), size):
            yield every[start : start + size]

    def held(self, scores: list[Floats], count: int, first: int) -> Floats:
        """Return the scores [N] of ``count`` rows from those of the blocks, each held until the next window."""
        skipped = first % self.stride
        return np.repeat(np.concatenate(scores), self.stride)[skipped : skipped + count] if scores else np.empty(0)


@dataclass(frozen=True)
class SpectrumScore:
    """Spectra of training windows.

    Attributes:
        roots: [V, F], square roots of the mean of normalised spectra; zeros of a variate that never moved, NaN of one
            without a training window.
    """

    windows: Windows
    roots: Floats

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.windows.reach

    @property
    def largest(self) -> Floats:
        """The largest score [V] there is, NaN where there is none."""
        return np.where(np.isnan(self.roots).any(axis=1), np.nan, 1.0)

    def scores(self, values: Floats, first: int) -> Floats:
        """Return D_H [N, V] of each row's window, in [0, 1].

        A window that does not move at all has 1, but 0 where no training window moved either.

        Args:
            values: [reach + N, V] in time order, NaN where not observed.
            first: absolute row of the first scored one.
        """
        found = np.empty((max(len(values) - self.reach, 0), values.shape[1]))
        for variate, root in enumerate(self.roots):
            told = [_spectra(block) for block in self.windows.blocks(values[:, variate], first)]
            found[:, variate] = self.windows.held([_hellinger(part, root) for part in told], len(found), first)
        return found


def fit_spectrum(reference: Floats, *, window: int, stride: int) -> SpectrumScore:
    """Return the spectra of training rows [R, V], NaN where not observed; window and stride in rows.

    Spectra are smoothed by a Gaussian of window / 64 frequency bins.

    Raises:
        Uncomparable: no training window of any variate is observed well enough.
    """
    if not _holds_window(reference, window):
        raise _too_short(
            reference,
            f"hold no window of {window} rows that is observed to {MIN_OBSERVED:.0%}, spectrum needs one",
            window_advice(window, _SHORTEST, lambda size: _holds_window(reference, size)),
        )
    roots = []
    for series in reference.T:
        every = np.lib.stride_tricks.sliding_window_view(series, window)[:: max(window // 2, 1)]
        spectra = _spectra(every)
        spectra = spectra[~np.isnan(spectra).any(axis=1)]
        moving = spectra[spectra.sum(axis=1) > 0]
        nothing = np.full(spectra.shape[1], 0.0 if len(spectra) else np.nan)
        roots.append(np.sqrt(moving.mean(axis=0)) if len(moving) else nothing)
    return SpectrumScore(Windows(window, stride), np.stack(roots))


def _holds_window(reference: Floats, window: int) -> bool:
    """Return whether a window that ``fit_spectrum`` takes is observed well enough in any variate of rows [R, V]."""
    seen = np.cumsum(np.pad(~np.isnan(reference), ((1, 0), (0, 0))), axis=0)
    count = (seen[window:] - seen[:-window])[:: max(window // 2, 1)]
    return bool((count >= MIN_OBSERVED * window).any())


def _hellinger(spectra: Floats, root: Floats) -> Floats:
    """Return D_H [K] of normalised spectra [K, F] from the one with square roots [F]."""
    if not root.any():  # nothing moved in training: two spectra without power are the same
        return np.asarray(np.where(np.isnan(spectra).any(axis=1), np.nan, spectra.any(axis=1)))
    # a sum a window, no matrix product: that would round by how many there are
    return np.asarray(np.sqrt(np.clip(1.0 - (np.sqrt(spectra) * root).sum(axis=1), 0.0, 1.0)))


def _spectra(block: Floats) -> Floats:
    """Return smoothed spectra [K, F] of sum 1 of windows [K, window]; zeros where flat, NaN where unobserved."""
    window = block.shape[1]
    seen = ~np.isnan(block)
    count = seen.sum(axis=1, keepdims=True)
    whole = _bridged(block, seen)
    mean = whole.sum(axis=1, keepdims=True) / window
    centred = whole - mean
    size = np.abs(centred).max(axis=1, keepdims=True, initial=0.0)
    centred = np.ascontiguousarray(centred / np.where(size > 0.0, size, 1.0))
    power = np.abs(np.asarray(scipy.fft.rfft(centred, axis=1))) ** 2
    power = gaussian_filter1d(power, window / 64, axis=1, mode="reflect", truncate=4.0) if len(power) else power
    power = np.clip(power, 0.0, None)
    flat = size <= _FLAT * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
    power = np.where(flat, 0.0, power / np.maximum(power.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny))
    return np.where(count >= MIN_OBSERVED * window, power, np.nan)


def _bridged(block: Floats, seen: NDArray[np.bool_]) -> Floats:
    """Return windows [K, window] whose missing rows lie on the line between those around them, at an end on the next.

    A row put at the mean would be a spike of its own, which no window of training had.
    """
    if seen.all():
        return block
    place, last = np.arange(block.shape[1]), block.shape[1] - 1
    before = np.maximum.accumulate(np.where(seen, place, -1), axis=1)
    after = np.minimum.accumulate(np.where(seen, place, last + 1)[:, ::-1], axis=1)[:, ::-1]
    before, after = np.where(before < 0, after, before), np.where(after > last, before, after)
    low, high = (np.take_along_axis(block, np.clip(there, 0, last), axis=1) for there in (before, after))
    return np.asarray(low + (high - low) * ((place - before) / np.maximum(after - before, 1)))


@dataclass(frozen=True)
class StatesScore:
    """States visited in training.

    Attributes:
        lags: [V] rows between the two delay coordinates. low, high: [V], range of the cells.
        log_reference: [V, bins * bins], ln p of each cell; NaN of a variate with too few training pairs.
    """

    windows: Windows
    lags: Ints
    low: Floats
    high: Floats
    log_reference: Floats

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.windows.reach

    @property
    def largest(self) -> Floats:
        """The largest score [V] there is, of a window in the rarest cell alone; NaN where there is none."""
        return np.asarray(-self.log_reference.min(axis=1))

    @cached_property
    def bins(self) -> int:
        """Cells an axis."""
        return math.isqrt(self.log_reference.shape[1])

    def scores(self, values: Floats, first: int) -> Floats:
        """Return the divergence [N, V] of each row's window in nats, 0 or more; arguments as of ``SpectrumScore``."""
        found = np.empty((max(len(values) - self.reach, 0), values.shape[1]))
        for variate, expected in enumerate(self.log_reference):
            if np.isnan(expected).any():
                found[:, variate] = np.nan
                continue
            low, high = float(self.low[variate]), float(self.high[variate])
            codes = _codes(values[:, variate], int(self.lags[variate]), low, high, self.bins)
            divergences = [_divergence(block, expected) for block in self.windows.blocks(codes, first)]
            found[:, variate] = self.windows.held(divergences, len(found), first)
        return found


def fit_states(reference: Floats, *, window: int, stride: int, bins: int = 12, lag: int | None = None) -> StatesScore:
    """Return the states that training rows [R, V] visit.

    Args:
        reference, window, stride: as in :func:`fit_spectrum`.
        bins: cells an axis.
        lag: rows between the two delay coordinates; default the first lag at which the autocorrelation of the training
            rows is below 1/e, at most a quarter of the window.

    Raises:
        Uncomparable: no variate has ``window`` observed training pairs.
    """

    def pairs(series: Floats, size: int) -> tuple[int, int]:
        delay = memory(series, size // 4) if lag is None else lag
        seen = ~np.isnan(series)
        return delay, int((seen[delay:] & seen[: max(len(seen) - delay, 0)]).sum())

    most = max(pairs(series, window)[1] for series in reference.T)
    if most < window:
        raise _too_short(
            reference,
            f"hold {most} pairs of rows to count states by, a window of {window} rows needs as many",
            window_advice(
                window, _SHORTEST, lambda size: any(pairs(series, size)[1] >= size for series in reference.T)
            ),
        )
    found = []
    for series in reference.T:
        delay, count = pairs(series, window)
        if count < window:
            found.append((lag or 1, np.nan, np.nan, np.full(bins * bins, np.nan)))
            continue
        low, high = _range(series)
        codes = _codes(series, delay, low, high, bins)
        counts = np.bincount(codes[codes >= 0], minlength=bins * bins) + _PRIOR
        found.append((delay, low, high, np.log(counts / counts.sum())))
    lags, lows, highs, expected = zip(*found, strict=True)
    windows = Windows(window, stride, before=max(lags))
    return StatesScore(windows, np.array(lags), np.array(lows), np.array(highs), np.stack(expected))


def _divergence(block: Ints, expected: Floats) -> Floats:
    """Return KL(window || training) [K] of windows of cells [K, window], at least 0; NaN where unobserved."""
    seen, cells = block >= 0, len(expected)
    rows = np.arange(len(block))[:, None] * cells
    held = np.bincount((block + rows)[seen], minlength=len(block) * cells).reshape(len(block), -1)
    share = held / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    terms = share * (np.log(np.where(share > 0, share, 1.0)) - expected)
    return np.where(seen.mean(axis=1) >= MIN_OBSERVED, np.clip(terms.sum(axis=1), 0.0, None), np.nan)


def memory(series: Floats, longest: int) -> int:
    """Return the first lag at which the autocorrelation of a series (NaN where missing) falls below 1/e, 1..longest."""
    seen = ~np.isnan(series)
    centred = np.where(seen, series - (series[seen].mean() if seen.any() else 0.0), 0.0)
    length = scipy.fft.next_fast_len(2 * len(series), real=True)

    def correlate(rows: Floats) -> Floats:
        transform = scipy.fft.rfft(rows, length)
        return np.asarray(scipy.fft.irfft(np.abs(transform) ** 2, length))[: longest + 1]

    products, pairs = correlate(centred), correlate(seen.astype(np.float64))
    covariance = products / np.maximum(pairs, 1.0)
    below = np.flatnonzero(covariance[1:] < covariance[0] / np.e)
    return int(below[0]) + 1 if below.size else max(longest, 1)


def _range(training: Floats) -> tuple[float, float]:
    seen = training[~np.isnan(training)]
    margin = _MARGIN * float(seen.std())
    return float(seen.min()) - margin, float(seen.max()) + margin


def _codes(series: Floats, lag: int, low: float, high: float, bins: int) -> Ints:
    """Return the cell [T] of (x[t], x[t - lag]); -1 where either is missing."""
    width = (high - low) / bins or 1.0
    place = np.where(np.isnan(series), -1, np.clip((np.nan_to_num(series) - low) / width, 0, bins - 1)).astype(np.int64)
    before = np.full(len(place), -1)
    before[lag:] = place[: max(len(place) - lag, 0)]
    return np.where((place >= 0) & (before >= 0), place * bins + before, -1)


@dataclass(frozen=True)
class RegionsScore:
    """Transitions between regions in training.

    Attributes:
        pairs: [M, 2], region before and region of each transition seen. costs: [M], -ln p of each.
        unseen: -ln p of any other.
    """

    windows: Windows
    pairs: Floats
    costs: Floats
    unseen: float

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.windows.reach

    @cached_property
    def _cost(self) -> dict[tuple[float, float], float]:
        return {(a, b): cost for (a, b), cost in zip(self.pairs.tolist(), self.costs.tolist(), strict=True)}

    def scores(self, regions: Floats, first: int) -> Floats:
        """Return the mean of -ln p [N, 1] of the transitions in each row's window.

        Args:
            regions: [reach + N, 1] of each row, NaN where unknown. first: absolute row of the first scored one.
        """
        each = np.full(len(regions), np.nan)
        each[1:] = [
            self._cost.get((a, b), self.unseen) if a == a and b == b else np.nan for a, b in _pairs(regions).tolist()
        ]
        means = []
        for block in self.windows.blocks(each, first):
            seen = ~np.isnan(block)
            mean = np.where(seen, block, 0.0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
            means.append(np.where(seen.mean(axis=1) >= MIN_OBSERVED, mean, np.nan))
        return self.windows.held(means, max(len(regions) - self.reach, 0), first)[:, None]


def fit_regions(reference: Floats, *, window: int, stride: int) -> RegionsScore:
    """Return the transitions between the regions [R, 1] of training rows, NaN where unknown.

    Raises:
        Uncomparable: fewer than ``window`` transitions of training are known.
    """
    pairs = _pairs(reference)
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    if len(pairs) < window:
        raise _too_short(
            reference,
            f"hold {len(pairs)} known steps from region to region, a window of {window} rows needs as many",
            window_advice(window, _SHORTEST, lambda size: len(pairs) >= size),
            known="in a known region",
        )
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    total = counts.sum() + _PRIOR * (len(kinds) + 1)
    costs = -np.log((counts + _PRIOR) / total)
    return RegionsScore(Windows(window, stride, before=1), kinds, costs, float(-np.log(_PRIOR / total)))


def _pairs(regions: Floats) -> Floats:
    """Return (region before, region) [R - 1, 2] of each row but the first."""
    return np.concatenate([regions[:-1], regions[1:]], axis=1)


def _too_short(reference: Floats, lack: str, advice: str, known: str = "observed") -> Uncomparable:
    count = int((~np.isnan(reference)).any(axis=1).sum())
    return Uncomparable(
        f"{len(reference)} training rows ({count} of them {known}) {lack}", observed=count, advice=advice
    )
