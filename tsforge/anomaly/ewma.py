"""Residuals that add up: an exponential mean of each variate's deviate, sign and all, before variates are joined.

    S[t] = a z[t] + (1 - a) S[t-1],  S = 0 before the first row,  told: S[t] / s

A fault that pushes a variate in one direction for many rows adds up, noise cancels: of independent rows the standard
deviation falls to sqrt(a / (2 - a)) while a lasting shift stays whole. Smoothing the joint score (``smoothing``)
forgets the sign first, so that noise stays. With ``joint: mahalanobis`` the score is a multivariate EWMA chart.

Source: Lowry, Woodall, Champ & Rigdon (1992), Technometrics 34 (1), Eq. 2. Deviations: the scale s and the covariance
of S come from normal rows instead of the closed form for independent ones, since residuals of real forecasts are not
independent, and s is never below that form: residuals that cancel out are no reason to scream at a small shift.
Deviates are cut at ``winsor`` first, so that one broken row is forgotten. A missing value counts as a usual one (S
decays) and its row tells nothing of that variate. Variates that were constant in training keep their own deviate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.config import settling_rows
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]


@dataclass(eq=False, kw_only=True)
class Ewma:
    """Memory of one series: ``spread`` [V] is fitted, ``level`` [V] (S of the last row) moves with every row.

    ``run`` over rows cut anywhere gives the same bits.
    """

    weight: float
    spread: FloatArray
    level: FloatArray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.level.size:
            self.level = np.zeros_like(self.spread)

    def run(self, z: ArrayLike) -> FloatArray:
        """Return S / s of the next rows [N, V] in time order; NaN stays NaN."""
        values = np.asarray(z, dtype=np.float64)
        levels = _levels(self.weight, values, self.level)
        if len(values):
            self.level = levels[-1].copy()
        return np.asarray(np.where(np.isnan(values), np.nan, levels / self.spread))

    def fresh(self) -> Self:
        """Return the same with no row behind it."""
        return type(self)(weight=self.weight, spread=self.spread)


def fit_ewma(weight: float, z: ArrayLike) -> Ewma:
    """Return the memory whose spread is that of S over normal rows z [N, V], about 0.

    Rows near the beginning count for what they are of a settled S.

    Raises:
        DataError: fewer rows than ``settling_rows``.
    """
    values = np.asarray(z, dtype=np.float64)
    needed = settling_rows(weight)
    if len(values) < needed:
        raise DataError(
            f"score.ewma {weight:g} remembers about {1.0 / weight:.0f} rows and needs {needed} to learn how far they "
            f"add up, but {len(values)} set the scale; give a larger weight, or more rows with "
            "calibration.max_scale_rows and calibration.scale_share"
        )
    levels = _levels(weight, values, np.zeros(values.shape[1]))
    settled = 1.0 - (1.0 - weight) ** (2.0 * np.arange(1, len(values) + 1))
    white = np.sqrt(weight / (2.0 - weight))
    spread = np.sqrt((levels**2).sum(axis=0) / settled.sum())
    return Ewma(weight=weight, spread=np.maximum(spread, white))


def _levels(weight: float, z: FloatArray, level: FloatArray) -> FloatArray:
    pushed = np.where(np.isnan(z), 0.0, z)
    if not len(z):
        return pushed
    from scipy.signal import lfilter

    return np.asarray(lfilter([weight], [1.0, weight - 1.0], pushed, axis=0, zi=(1.0 - weight) * level[None])[0])
