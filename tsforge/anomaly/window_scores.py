"""Changed dynamics without outliers: what a trailing window of rows does, against what the training rows did.

    spectrum   Hellinger distance D_H of the window's power spectrum from the mean spectrum of training windows
    states     divergence KL(window || training) of the states (x[t], x[t - lag]) that a variate visits
    regions    mean of -ln p(region, region before) over the window, p by counts of training

The marginal distribution may stay what it was: frequencies, transitions and regions tell. Windows end at the rows whose
absolute number is a multiple of ``stride``; a row has the score of the last of them, so that it depends on a bounded
number of rows up to it and on nothing else. A window that is observed to less than 90 % has no score (NaN). Every
window is worked out by itself: whatever stands beside it, its score has the same bits.

Sources: D_H and the divergence of visited states as in Mikhaeil et al. (2022) and Hess et al. (2023), arXiv 2306.04406;
see :mod:`tsforge.metrics`. Deviations: the reference is a mean of normalised spectra of windows, because a window is
shorter than the training rows; states are those of one variate in delay coordinates, so that every variate has a score;
counts of the reference are smoothed by half a count a cell, states outside its range belong to the outermost cells.

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

from tsforge.core.errors import DataError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
MIN_OBSERVED = 0.9
_PRIOR = 0.5
_MARGIN = 0.1  # share of the standard deviation by which cells reach beyond the training range
_MOST_CELLS = 1 << 23  # numbers of all windows held at once
_FLAT = 1e-9


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
        roots: [V, F], square roots of the mean of normalised spectra.
    """

    windows: Windows
    roots: Floats

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.windows.reach

    def scores(self, values: Floats, first: int) -> Floats:
        """Return D_H [N, V] of each row's window, in [0, 1]; a window that does not move at all has 1.

        Args:
            values: [reach + N, V] in time order, NaN where not observed.
            first: absolute row of the first scored one.
        """
        found = np.empty((max(len(values) - self.reach, 0), values.shape[1]))
        for variate, root in enumerate(self.roots):
            told = [_spectra(block) for block in self.windows.blocks(values[:, variate], first)]
            # a sum a window, no matrix product: that would round by how many there are
            distances = [np.sqrt(np.clip(1.0 - (np.sqrt(part) * root).sum(axis=1), 0.0, 1.0)) for part in told]
            found[:, variate] = self.windows.held(distances, len(found), first)
        return found


def fit_spectrum(reference: Floats, *, window: int, stride: int) -> SpectrumScore:
    """Return the spectra of training rows [R, V], NaN where not observed; window and stride in rows.

    Spectra are smoothed by a Gaussian of window / 64 frequency bins.

    Raises:
        DataError: no training window of a variate is observed well enough.
    """
    roots = []
    for series in reference.T:
        every = np.empty((0, window))
        if len(series) >= window:
            every = np.lib.stride_tricks.sliding_window_view(series, window)[:: max(window // 2, 1)]
        spectra = _spectra(every)
        spectra = spectra[~np.isnan(spectra).any(axis=1) & (spectra.sum(axis=1) > 0)]
        if not len(spectra):
            raise DataError(_too_short(len(reference), window))
        roots.append(np.sqrt(spectra.mean(axis=0)))
    return SpectrumScore(Windows(window, stride), np.stack(roots))


def _spectra(block: Floats) -> Floats:
    """Return smoothed spectra [K, F] of sum 1 of windows [K, window]; zeros where flat, NaN where unobserved."""
    window = block.shape[1]
    seen = ~np.isnan(block)
    count = seen.sum(axis=1, keepdims=True)
    mean = np.where(seen, block, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(seen, block - mean, 0.0)  # a missing row counts as the mean
    size = np.abs(centred).max(axis=1, keepdims=True, initial=0.0)
    centred = np.ascontiguousarray(centred / np.where(size > 0.0, size, 1.0))
    power = np.abs(np.asarray(scipy.fft.rfft(centred, axis=1))) ** 2
    power = gaussian_filter1d(power, window / 64, axis=1, mode="reflect", truncate=4.0) if len(power) else power
    power = np.clip(power, 0.0, None)
    flat = size <= _FLAT * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
    power = np.where(flat, 0.0, power / np.maximum(power.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny))
    return np.where(count >= MIN_OBSERVED * window, power, np.nan)


@dataclass(frozen=True)
class StatesScore:
    """States visited in training.

    Attributes:
        lags: [V] rows between the two delay coordinates. low, high: [V], range of the cells.
        log_reference: [V, bins * bins], ln p of each cell.
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

    @cached_property
    def bins(self) -> int:
        """Cells an axis."""
        return math.isqrt(self.log_reference.shape[1])

    def scores(self, values: Floats, first: int) -> Floats:
        """Return the divergence [N, V] of each row's window in nats, 0 or more; arguments as of ``SpectrumScore``."""
        found = np.empty((max(len(values) - self.reach, 0), values.shape[1]))
        for variate, expected in enumerate(self.log_reference):
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
        DataError: a variate has fewer than ``window`` observed training pairs.
    """
    found = []
    for series in reference.T:
        delay = memory(series, window // 4) if lag is None else lag
        low, high = _range(series, window)
        codes = _codes(series, delay, low, high, bins)
        if (codes >= 0).sum() < window:
            raise DataError(_too_short(len(reference), window))
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


def _range(training: Floats, window: int) -> tuple[float, float]:
    seen = training[~np.isnan(training)]
    if seen.size < window:
        raise DataError(_too_short(len(training), window))
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
        DataError: fewer than ``window`` transitions of training are known.
    """
    pairs = _pairs(reference)
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    if len(pairs) < window:
        raise DataError(_too_short(len(reference), window))
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    total = counts.sum() + _PRIOR * (len(kinds) + 1)
    costs = -np.log((counts + _PRIOR) / total)
    return RegionsScore(Windows(window, stride, before=1), kinds, costs, float(-np.log(_PRIOR / total)))


def _pairs(regions: Floats) -> Floats:
    """Return (region before, region) [R - 1, 2] of each row but the first."""
    return np.concatenate([regions[:-1], regions[1:]], axis=1)


def _too_short(rows: int, window: int) -> str:
    return (
        f"{rows} training rows do not hold a window of {window} rows that is observed to {MIN_OBSERVED:.0%}; lower "
        "score.window"
    )
