"""Season lengths: declared by the user, implied by the frequency, or found in the data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError
from tsforge.data.grid import parse_freq

_DAY = 86_400_000_000  # microseconds
_MIN_CORRELATION = 0.2  # a weaker echo would make the seasonal naive forecast noise
_ROUNDING = 16 * float(np.finfo(np.float64).eps)  # relative: a variate that moves by less is constant


def season_length(freq: str, values: NDArray[np.floating] | None = None, *, declared: int | None = None) -> int:
    """Return the steps of the shortest natural season.

    Args:
        freq: the step of the grid.
        values: [N, V] of one series, to look for a season where the frequency implies none (integer time, odd steps).
        declared: the user's word, which is taken as it is.

    Returns:
        ``declared``; else a day for steps that divide it, 7 for days, 52 for weeks, a year for months; else the lag of
        the strongest echo in ``values``; else 1.

    Raises:
        ConfigError: ``declared`` is below 1.
    """
    if declared is not None:
        if declared < 1:
            raise ConfigError(f"season_length is {declared}; it must be at least 1")
        return declared
    step = parse_freq(freq)
    if step.kind == "month" and 12 % step.count == 0:
        return 12 // step.count
    if step.kind == "fixed":
        if step.count < _DAY and _DAY % step.count == 0:
            return _DAY // step.count
        if step.count == _DAY:
            return 7
        if step.count == 7 * _DAY:
            return 52
    return 1 if values is None else find_season(values)


def find_season(values: NDArray[np.floating], max_lag: int = 1000) -> int:
    """Return the lag with the strongest echo at its multiples in the differenced series, else 1.

    Echoes are averaged over the variates that vary. Seasons of 3 steps up to a sixth of the rows are looked for.

    Shapes:
        values [N, V], NaN where missing.
    """
    values = np.asarray(values, dtype=np.float64)
    change = np.diff(values, axis=0)
    number = len(change)
    longest = min(max_lag, number // 6)
    if longest < 4:
        return 1
    size = np.abs(np.nan_to_num(values)).max(axis=0)
    varies = np.abs(np.nan_to_num(change)).max(axis=0) > _ROUNDING * size
    found = [autocorrelation(column, 3 * longest + 3) for column in change.T[varies]]
    found = [lags for lags in found if lags[0] > 0.0]  # a ramp changes by the same number everywhere
    if not found:
        return 1
    correlation = np.mean(found, axis=0)
    inner = correlation[3 : longest + 1]
    valley = np.minimum.accumulate(correlation[2:longest])  # lag 1 left out: differencing noise digs one of its own
    peaks = (inner > correlation[2:longest]) & (inner >= correlation[4 : longest + 2]) & (valley < 0.5 * inner)
    lags = [int(lag) for lag in np.flatnonzero(peaks) + 3]
    refined = [max((lag - 1, lag, lag + 1), key=lambda near: _echo(correlation, near)) for lag in lags]
    echoes = [_echo(correlation, lag) for lag in refined]
    if not echoes or max(echoes) < max(_MIN_CORRELATION, 3.0 / np.sqrt(number)):
        return 1
    loud = 0.8 * max(echoes)  # multiples of a season echo about as loudly as the season itself
    return next(lag for lag, echo in zip(refined, echoes, strict=True) if echo >= loud)


def _echo(correlation: NDArray[np.float64], lag: int) -> float:
    """Return the mean correlation at the first three multiples of a lag: noise moves one peak, not all of them."""
    return float(correlation[lag : 3 * lag + 1 : lag].mean())


def autocorrelation(values: NDArray[np.float64], max_lag: int) -> NDArray[np.float64]:
    """Return correlations at lags 0..max_lag over pairs with both values present [max_lag + 1]; zeros for constants."""
    present = np.isfinite(values)
    if not present.any():
        return np.zeros(max_lag + 1)
    centred = np.where(present, values - values[present].mean(), 0.0)
    size = 1 << int(2 * len(values) - 1).bit_length()

    def correlate(signal: NDArray[np.float64]) -> NDArray[np.float64]:
        spectrum = np.fft.rfft(signal, size)
        return np.asarray(np.fft.irfft(spectrum * spectrum.conj(), size)[: max_lag + 1])

    sums, counts = correlate(centred), np.round(correlate(present.astype(np.float64)))
    variance = sums[0] / counts[0]
    if variance <= 1e-12 * float(np.abs(values[present]).max()) ** 2:
        return np.zeros(max_lag + 1)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1.0), 0.0) / variance)
