"""How much Gaussian noise a window gets while training: as much as the data lack of 5 % of their spread.

Noise-free trajectories leave open what the map does beside the attractor, and free runs leave it. Noise on the windows
shows the map the way back; data that are noisy already need none.

The noise in the data is estimated from differences of order k within a trajectory. Those of white noise of standard
deviation s have variance C(2k, k) s^2, while those of a signal that is smooth from row to row vanish as k grows; so

    s = min over k = 2 .. 10 of rms(Delta^k x) / sqrt(C(2k, k))

A signal that is rough from row to row (a map, a series sampled too coarsely) counts as noise, and then gets less or
none: the estimate is an upper bound. Noise that is correlated over several rows is not seen.

Source: difference-based estimates of the residual variance, Hall, Kay, Titterington (1990), Biometrika 77; binomial
weights. The 5 % are those of the published runs of simulated systems (Brenner et al. 2022, dendritic PLRNN; 2024,
almost-linear RNN). Choice of our own: the least over k, and no noise below 1 %, which would change the total by 2 % at
most.

Legend: R rows, N variates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TARGET = 0.05
_LEAST = 0.01
_ORDERS = range(2, 11)
_FEWEST = 20  # differences that an estimate needs


class TrainingNoise(NamedTuple):
    """Standard deviations in the units of the training rows.

    Attributes:
        measured: (N,) of the noise that the rows hold, NaN where too few neighbouring rows are there to tell.
        added: (N,) of what a window gets.
    """

    measured: Array
    added: Array


def observation_noise(trajectories: Sequence[Array]) -> Array:
    """Return the standard deviation (N,) of white noise in trajectories (R_i, N), NaN where missing.

    No difference reaches over the end of a trajectory or a missing value. NaN where no order has 20 of them.
    """
    found = np.full(trajectories[0].shape[1], np.nan)
    parts = [np.diff(part, axis=0) for part in trajectories]
    for order in _ORDERS:
        parts = [np.diff(part, axis=0) for part in parts]
        counts = sum(np.isfinite(part).sum(axis=0) for part in parts)
        squares = sum(np.nansum(np.square(part), axis=0) for part in parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            estimate = np.sqrt(squares / counts / math.comb(2 * order, order))
        found = np.fmin(found, np.where(counts < _FEWEST, np.nan, estimate))
    return found


def training_noise(trajectories: Sequence[Array], noise: float | None) -> TrainingNoise:
    """Return the noise for windows of trajectories (R_i, N).

    Args:
        noise: of every variate; None tops the measured noise up to 0.05 of the standard deviation of the rows, and adds
            nothing where it could not be measured.
    """
    measured = observation_noise(trajectories)
    if noise is not None:
        return TrainingNoise(measured, np.full(len(measured), float(noise)))
    spread = np.nanstd(np.concatenate(list(trajectories)), axis=0)
    lacking = np.sqrt(np.clip((TARGET * spread) ** 2 - np.nan_to_num(measured, nan=np.inf) ** 2, 0.0, None))
    return TrainingNoise(measured, np.where(lacking < _LEAST * spread, 0.0, lacking))
