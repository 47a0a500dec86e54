"""Random stationary autoregressions and their samples, for tests and benchmarks."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ModelError
from tsforge.ops.stability import is_stationary
from tsforge.ops.toeplitz import pacf_to_weights

Array = NDArray[np.float64]


def draw_weights(
    order: int, rng: np.random.Generator, generator: Literal["pacf", "paper"] = "pacf", limit: float = 0.99
) -> Array:
    """Return coefficients [order] of a stationary process.

    ``"pacf"`` draws partial autocorrelations uniformly inside (-limit, limit) and maps them by the Levinson recursion:
    stationary by construction, every stationary process reachable. ``"paper"`` repeats the recipe behind the AR-Net
    experiments, which subtracts the mean of the coefficients: they always sum to 0, and order 1 is white noise.

    Raises:
        ModelError: the paper's recipe found no stationary draw in 100 tries.
    """
    if generator == "pacf":
        return pacf_to_weights(rng.uniform(-limit, limit, order))
    for _ in range(100):
        weight = rng.uniform(-1.0, 1.0, order)
        total = np.abs(weight).sum()
        if total > 1.0:
            weight *= rng.uniform(0.5, 1.0) / total
        weight -= weight.mean()
        if is_stationary(weight):
            return weight
    raise ModelError(f"no stationary process of order {order} in 100 tries; use generator='pacf'")


def simulate(
    weight: Array, length: int, rng: np.random.Generator, *, noise_scale: float = 1.0, burn_in: int = 1000
) -> Array:
    """Return ``length`` values of the process with normal innovations, after ``burn_in`` discarded ones."""
    from scipy.signal import lfilter

    noise = rng.normal(0.0, noise_scale, length + burn_in)
    values = lfilter([1.0], np.concatenate([[1.0], -np.asarray(weight, dtype=np.float64)]), noise)
    return np.asarray(values[burn_in:], dtype=np.float64)


def ljung_box(autocorrelation: Array, rows: float, num_weights: int) -> tuple[float, float]:
    """Return the portmanteau statistic of residual autocorrelations of lag 1 .. K and its p-value.

    A small p-value says that the residuals still hold linear structure. Degrees of freedom are K minus the fitted
    lags, at least 1.

    Source:
        Ljung and Box (1978), Biometrika 65(2), equation (2).
    """
    from scipy.stats import chi2

    lags = np.arange(1, len(autocorrelation) + 1)
    statistic = float(rows * (rows + 2.0) * (autocorrelation**2 / np.maximum(rows - lags, 1.0)).sum())
    return statistic, float(chi2.sf(statistic, max(len(autocorrelation) - num_weights, 1)))
