"""Changed dynamics without outliers: what a trailing window of rows does, against what the training rows did.

    spectrum   Hellinger distance D_H of the window's power spectrum from the mean spectrum of training windows
    states     divergence KL(window || training) of the states (x[t], x[t - lag]) that a variate visits
    regions    mean of -ln p(region, region before) over the window, p by counts of training

The marginal distribution may stay what it was: frequencies, transitions and regions tell. Row t is judged by the rows
t - window + 1 .. t alone; scores are computed at every ``stride``-th row and held in between. A window that is observed
to less than 90 % has no score (NaN).

Sources: D_H and the divergence of visited states as in Mikhaeil et al. (2022) and Hess et al. (2023), arXiv 2306.04406;
see :mod:`tsforge.metrics`. Deviations: the reference is a mean of normalised spectra of windows, because a window is
shorter than the training rows; states are those of one variate in delay coordinates, so that every variate has a score;
counts of the reference are smoothed by half a count a cell, states outside its range belong to the outermost cells.

Legend: T rows, R training rows, V variates, K windows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from tsforge.core.errors import DataError

Floats: TypeAlias = NDArray[np.float64]
MIN_OBSERVED = 0.9
_PRIOR = 0.5
_MARGIN = 0.1  # share of the standard deviation by which cells reach beyond the training range
_MOST_CELLS = 1 << 23  # numbers of all windows held at once
_FLAT = 1e-9


def spectrum_scores(values: Floats, reference: Floats, *, window: int, stride: int) -> Floats:
    """Return D_H [T, V] of each row's window, in [0, 1]; a window that does not move at all has 1.

    Args:
        values: [T, V] in time order, NaN where not observed; the first ``window - 1`` rows get no score.
        reference: [R, V], training rows.
        window, stride: rows. Spectra are smoothed by a Gaussian of window / 64 frequency bins.

    Raises:
        DataError: no training window of a variate is observed well enough.
    """
    found = np.full(values.shape, np.nan)
    for variate in range(values.shape[1]):
        spectra = _spectra(reference[:, variate], window, max(window // 2, 1))
        spectra = spectra[~np.isnan(spectra).any(axis=1) & (spectra.sum(axis=1) > 0)]
        if not len(spectra):
            raise DataError(_too_short(len(reference), window))
        root = np.sqrt(spectra.mean(axis=0))
        told = _spectra(values[:, variate], window, stride)
        distances = np.sqrt(np.clip(1.0 - np.sqrt(told) @ root, 0.0, 1.0))
        found[:, variate] = _held(distances, len(values), window, stride)
    return found


def _spectra(series: Floats, window: int, stride: int) -> Floats:
    """Return smoothed spectra [K, F] of sum 1 of the windows of a series; zeros where flat, NaN where unobserved."""
    sigma, parts = window / 64, []
    for block in _windows(series, window, stride):
        seen = ~np.isnan(block)
        count = seen.sum(axis=1, keepdims=True)
        mean = np.where(seen, block, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        centred = np.where(seen, block - mean, 0.0)  # a missing row counts as the mean
        size = np.abs(centred).max(axis=1, keepdims=True)
        centred = centred / np.where(size > 0.0, size, 1.0)
        power = np.abs(np.asarray(scipy.fft.rfft(centred, axis=1))) ** 2
        power = np.clip(gaussian_filter1d(power, sigma, axis=1, mode="reflect", truncate=4.0), 0.0, None)
        flat = size <= _FLAT * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
        power = np.where(flat, 0.0, power / np.maximum(power.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny))
        parts.append(np.where(count >= MIN_OBSERVED * window, power, np.nan))
    return np.concatenate(parts) if parts else np.empty((0, window // 2 + 1))


def state_scores(
    values: Floats, reference: Floats, *, window: int, stride: int, bins: int = 12, lag: int | None = None
) -> Floats:
    """Return the divergence [T, V] of each row's window in nats, 0 or more.

    Args:
        values, reference, window, stride: as in :func:`spectrum_scores`.
        bins: cells an axis.
        lag: rows between the two delay coordinates; default the first lag at which the autocorrelation of the training
            rows is below 1/e, at most a quarter of the window.

    Raises:
        DataError: a variate has fewer than ``window`` observed training pairs.
    """
    found = np.full(values.shape, np.nan)
    for variate in range(values.shape[1]):
        training = reference[:, variate]
        delay = memory(training, window // 4) if lag is None else lag
        low, high = _range(training, window)
        codes = _codes(training, delay, low, high, bins)
        if (codes >= 0).sum() < window:
            raise DataError(_too_short(len(reference), window))
        counts = np.bincount(codes[codes >= 0], minlength=bins * bins) + _PRIOR
        log_reference = np.log(counts / counts.sum())
        divergences = []
        for block in _windows(_codes(values[:, variate], delay, low, high, bins), window, stride):
            seen = block >= 0
            rows = np.arange(len(block))[:, None] * bins * bins
            held = np.bincount((block + rows)[seen], minlength=len(block) * bins * bins)
            held = held.reshape(len(block), -1)
            share = held / np.maximum(seen.sum(axis=1, keepdims=True), 1)
            terms = share * (np.log(np.where(share > 0, share, 1.0)) - log_reference)
            divergences.append(np.where(seen.mean(axis=1) >= MIN_OBSERVED, terms.sum(axis=1), np.nan))
        told = np.concatenate(divergences) if divergences else np.empty(0)
        found[:, variate] = _held(np.clip(told, 0.0, None), len(values), window, stride)
    return found


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


def _codes(series: Floats, lag: int, low: float, high: float, bins: int) -> NDArray[np.int64]:
    """Return the cell [T] of (x[t], x[t - lag]); -1 where either is missing."""
    width = (high - low) / bins or 1.0
    place = np.where(np.isnan(series), -1, np.clip((np.nan_to_num(series) - low) / width, 0, bins - 1)).astype(np.int64)
    before = np.full(len(place), -1)
    before[lag:] = place[: max(len(place) - lag, 0)]
    return np.where((place >= 0) & (before >= 0), place * bins + before, -1)


def region_scores(symbols: NDArray[np.int64], reference: NDArray[np.int64], *, window: int, stride: int) -> Floats:
    """Return the mean of -ln p [T] of the transitions in each row's window.

    Args:
        symbols: [T] region of each row, negative where unknown.
        reference: [R] regions of the training rows.
        window, stride: rows.

    Raises:
        DataError: fewer than ``window`` transitions of training are known.
    """
    pairs, known = _pairs(reference), _pairs(symbols)
    pairs = pairs[pairs[:, 0] >= 0]
    if len(pairs) < window:
        raise DataError(_too_short(len(reference), window))
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    total = counts.sum() + _PRIOR * (len(kinds) + 1)
    cost = {(int(a), int(b)): -np.log((n + _PRIOR) / total) for (a, b), n in zip(kinds, counts, strict=True)}
    unseen = -np.log(_PRIOR / total)
    each = np.array([np.nan if b < 0 else cost.get((int(a), int(b)), unseen) for b, a in known[:, ::-1]])
    means = []
    for block in _windows(each, window, stride):
        seen = ~np.isnan(block)
        mean = np.where(seen, block, 0.0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        means.append(np.where(seen.mean(axis=1) >= MIN_OBSERVED, mean, np.nan))
    return _held(np.concatenate(means) if means else np.empty(0), len(symbols), window, stride)


def _pairs(symbols: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (region before, region) [T, 2] of each row; -1, -1 where either is unknown."""
    before = np.concatenate([[-1], symbols[:-1]])
    found = np.stack([before, symbols], axis=1)
    found[(found < 0).any(axis=1)] = -1
    return found


def _windows(series: NDArray[Any], window: int, stride: int) -> list[NDArray[Any]]:
    """Return the windows [K, window] of a series in blocks; the first ends at row window - 1."""
    if len(series) < window:
        return []
    every = np.lib.stride_tricks.sliding_window_view(series, window)[::stride]
    size = max(_MOST_CELLS // window, 1)
    return [every[start : start + size] for start in range(0, len(every), size)]


def _held(scores: Floats, rows: int, window: int, stride: int) -> Floats:
    """Return scores [rows] held from the row where they were computed until the next."""
    found = np.full(rows, np.nan)
    if len(scores):
        found[window - 1 :] = np.repeat(scores, stride)[: rows - window + 1]
    return found


def _too_short(rows: int, window: int) -> str:
    return (
        f"{rows} training rows do not hold a window of {window} rows that is observed to {MIN_OBSERVED:.0%}; lower "
        "score.window"
    )
