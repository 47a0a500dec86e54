"""Hellinger distance D_H of smoothed power spectra: whether a model oscillates at the frequencies of the data.

Source: Mikhaeil et al. 2022, Hess et al. 2023 (arXiv 2306.04406): sigma 20, all frequencies. Deviation: a generated
variate that moves by less than a hundredth of the data's deviation has no spectrum. The z-score would blow the last
tremor of a dead model up to the size of the data, and smoothing over a short series make the two alike.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter1d

from tsforge.core.errors import ConfigError, DataError

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
_DEAD = 1e-2  # of the deviation of the data


@dataclass(frozen=True, kw_only=True)
class SpectralDistance:
    """D_H and what it depends on.

    Attributes:
        value: mean over variates, in [0, 1]; NaN when the generated series is not finite.
        per_variate: one distance each.
        sigma: of the smoothing, in frequency bins: its width in hertz depends on ``length``.
        length: time points of both series.
        frequencies: number of lowest frequencies compared; None = all.
    """

    value: float
    per_variate: tuple[float, ...]
    sigma: float
    length: int
    frequencies: int | None

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return value and configuration as plain values."""
        return dataclasses.asdict(self)


def d_h(
    true: ArrayLike, generated: ArrayLike, sigma: float = 20.0, *, frequencies: int | None = None
) -> SpectralDistance:
    """Return the mean distance of the power spectra of true and generated, both [T, N].

    Per variate: z-score, |rfft|^2 over the whole length, Gaussian smoothing (cut at 4 sigma, reflecting edges), sum 1,
    then ``sqrt(sum (sqrt p - sqrt q)^2 / 2)``. A constant variate, true or generated, has no spectrum: 1. Constant
    means a standard deviation at the rounding level of the series' own number type; for generated also one below
    0.01 of the true one, the only way in which the two sides differ. Any length works; those with small prime factors
    (100,000, say) are fastest.

    Args:
        true: the data; finite.
        generated: a free run of the model, cut to the same length.
        sigma: of the smoothing in bins; 20 in the GTF paper, 1 in others.
        frequencies: compare only this many lowest frequencies (of the smoothed spectrum); None = all.

    Raises:
        DataError: shapes differ, fewer than 4 rows, or true is not finite.
        ConfigError: a negative sigma, or no frequencies.
    """
    if not sigma >= 0.0:
        raise ConfigError(f"sigma must be 0 or more frequency bins, got {sigma}")
    if frequencies is not None and frequencies < 1:
        raise ConfigError(f"frequencies must be at least 1, got {frequencies}")
    x, y = np.asarray(true), np.asarray(generated)
    if x.ndim != 2 or x.shape != y.shape or len(x) < 4 or not x.shape[1]:
        raise DataError(
            f"D_H needs two series [T, N] of one shape with T >= 4, got {x.shape} and {y.shape}; cut the longer one"
        )
    if not np.isfinite(x).all():
        raise DataError("the true series of D_H holds values that are not finite; use a stretch without gaps")
    distances = np.full(x.shape[1], np.nan)
    if np.isfinite(y).all():
        p, x_constant = _spectrum(x, sigma, frequencies)
        q, y_constant = _spectrum(y, sigma, frequencies)
        distances = np.sqrt(0.5 * np.sum((np.sqrt(p) - np.sqrt(q)) ** 2, axis=0))
        distances[x_constant | y_constant | (deviations(y) < _DEAD * deviations(x))] = 1.0
    return SpectralDistance(
        value=float(distances.mean()),
        per_variate=tuple(float(distance) for distance in distances),
        sigma=float(sigma),
        length=len(x),
        frequencies=frequencies,
    )


def smoothed_spectrum(series: ArrayLike, sigma: float = 20.0, *, frequencies: int | None = None) -> Floats:
    """Return the smoothed power spectrum of series [T, N], sum 1 over frequencies k / T, as [T // 2 + 1, N].

    The one ``d_h`` compares (for plots); 0 everywhere for a constant variate. The series must be finite.
    """
    return _spectrum(np.asarray(series), sigma, frequencies)[0]


def deviations(series: ArrayLike) -> Floats:
    """Return the standard deviation [N] of series [T, N], whose squares cannot overflow."""
    values = np.asarray(series, dtype=np.float64)
    size = np.abs(values).max(axis=0)
    unit = np.where(size > 0.0, size, 1.0)
    found: Floats = (values / unit).std(axis=0) * unit
    return found


def _spectrum(series: np.ndarray[Any, Any], sigma: float, frequencies: int | None) -> tuple[Floats, Any]:
    """Return the spectrum and which variates are constant."""
    kind = series.dtype if np.issubdtype(series.dtype, np.floating) else np.dtype(np.float64)
    values = series.astype(np.float64)
    size = np.abs(values).max(axis=0)
    values = values / np.where(size > 0.0, size, 1.0)  # so that squares cannot overflow
    spread = values.std(axis=0)
    constant = spread <= 4.0 * float(np.finfo(kind).eps)
    scores = (values - values.mean(axis=0)) / np.where(constant, 1.0, spread)
    power = np.abs(np.asarray(scipy.fft.rfft(scores, axis=0))) ** 2
    if sigma > 0.0:
        power = np.clip(gaussian_filter1d(power, sigma, axis=0, mode="reflect", truncate=4.0), 0.0, None)
    power = power[:frequencies]
    power[:, constant] = 0.0
    total = power.sum(axis=0)
    if not all(math.isfinite(value) for value in total):
        raise DataError("the power spectrum is not finite; check the series for values beyond the number range")
    spectrum: Floats = power / np.where(total > 0.0, total, 1.0)
    return spectrum, constant
