"""The interval of sparse teacher forcing, estimated from the data.

Of each variate, the smaller of two lags: where the autocorrelation first has a minimum or falls below 1/e, and where
the mutual information of x_t and x_{t+lag} first has a minimum; then the median over variates. With a known largest
Lyapunov exponent the time in which errors double (``predictability_interval``) is the better choice.

Sources: Mikhaeil, Monfared, Durstewitz (2022) for the predictability time; Brenner et al. (2022) for the two lags.

Legend: T steps, N variates.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ModelError

_SHORTEST = 8  # steps of a series below which no lag can be told


def predictability_interval(exponent: float) -> int:
    """Return ln 2 / lambda in whole steps, at least 1, for a largest Lyapunov exponent ``exponent`` a step.

    Raises:
        ModelError: the exponent is not positive: errors do not grow.
    """
    if not 0 < exponent < math.inf:
        raise ModelError(f"the Lyapunov exponent is {exponent:g}; the time of prediction needs a positive one")
    return max(1, round(math.log(2) / exponent))


def forcing_interval(series: NDArray[np.floating], *, max_lag: int = 100, bins: int = 64) -> int:
    """Return tau in steps, between 1 and ``max_lag``.

    Args:
        series: (T, N), NaN where missing; pairs with a missing end are left out.
        max_lag: longest lag.
        bins: of the histograms of the mutual information, a variate.

    Raises:
        ModelError: the shape is wrong, the series is too short, or every variate is constant.
    """
    if series.ndim != 2 or len(series) < _SHORTEST or max_lag < 1 or bins < 2:
        raise ModelError(
            f"an interval needs a series (T, N) of at least {_SHORTEST} steps, a lag of 1 and 2 bins; got shape "
            f"{series.shape}, max_lag = {max_lag}, bins = {bins}"
        )
    longest = min(max_lag, len(series) // 2)
    lags = [
        min(_correlation_lag(x, longest), _information_lag(x, longest, bins))
        for x in np.asarray(series, dtype=np.float64).T
        if np.nanmax(x, initial=-np.inf) > np.nanmin(x, initial=np.inf)
    ]
    if not lags:
        raise ModelError("every variate is constant or missing, so no interval of sparse forcing can be estimated")
    return max(1, round(float(np.median(lags))))


def _pairs(x: NDArray[np.float64], lag: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = x[: len(x) - lag], x[lag:]
    both = np.isfinite(first) & np.isfinite(second)
    return first[both], second[both]


def _first_minimum(values: list[float]) -> int:
    """Return the first lag below its neighbour before and not above the one after, or the last lag."""
    for lag in range(1, len(values) - 1):
        if values[lag] < values[lag - 1] and values[lag] <= values[lag + 1]:
            return lag
    return len(values) - 1


def _correlation_lag(x: NDArray[np.float64], longest: int) -> int:
    mean, variance = np.nanmean(x), np.nanvar(x)
    values = []
    for lag in range(longest + 1):
        first, second = _pairs(x, lag)
        values.append(float(np.mean((first - mean) * (second - mean)) / variance) if len(first) else 0.0)
    below = next((lag for lag, value in enumerate(values) if value < 1 / math.e), longest)
    return min(below, _first_minimum(values))


def _information_lag(x: NDArray[np.float64], longest: int, bins: int) -> int:
    edges = np.linspace(np.nanmin(x), np.nanmax(x), bins + 1)
    values = []
    for lag in range(longest + 1):
        joint = np.histogram2d(*_pairs(x, lag), bins=(edges, edges))[0]
        joint /= max(joint.sum(), 1.0)
        apart = np.outer(joint.sum(1), joint.sum(0))
        met = joint > 0
        values.append(float(np.sum(joint[met] * np.log(joint[met] / apart[met]))))
    return _first_minimum(values)
