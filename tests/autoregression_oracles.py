"""What closed forms of autoregressions are compared with: a Kalman filter, one series at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_discrete_lyapunov

from tsforge.ops.stability import companion

Array = NDArray[np.float64]


class KalmanForecast(NamedTuple):
    """Forecast means and variances [H]."""

    mean: Array
    variance: Array


def kalman_forecast(
    weight: Array, noise_variance: float, values: Array, mask: NDArray[np.bool_], horizon: int
) -> KalmanForecast:
    """Return the forecast of a stationary AR process given some of its past values, by its companion form.

    Args:
        weight: [p] coefficients, lag 1 first, at least one.
        noise_variance: of the innovations.
        values: [n] deviations from the process mean, anything where ``mask`` [n] is False.
        horizon: steps to forecast.
    """
    transition = companion(weight)
    noise = np.zeros_like(transition)
    noise[0, 0] = noise_variance
    state, covariance = np.zeros(len(weight)), solve_discrete_lyapunov(transition, noise)  # newest first
    for step, (value, seen) in enumerate(zip(values, mask, strict=True)):
        if step:
            state, covariance = transition @ state, transition @ covariance @ transition.T + noise
        if seen and covariance[0, 0] > 0.0:
            gain = covariance[:, 0] / covariance[0, 0]
            state = state + gain * (value - state[0])
            covariance = covariance - np.outer(gain, covariance[0])
            covariance = 0.5 * (covariance + covariance.T)
    means, variances = np.empty(horizon), np.empty(horizon)
    for step in range(horizon):
        state, covariance = transition @ state, transition @ covariance @ transition.T + noise
        means[step], variances[step] = state[0], covariance[0, 0]
    return KalmanForecast(means, variances)
