"""Metrics of reconstructed dynamics in one place, and the n-step prediction error PE(n).

Each returns a result that carries its configuration; ``float(result)`` is the value.

Source of PE(n): Hess et al. 2023 (arXiv 2306.04406): mean squared error at exactly step n. Koppe et al. average over
steps 1 .. n: that is the mean of ``PredictionError.per_step``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.power_spectrum import SpectralDistance, d_h, smoothed_spectrum
from tsforge.metrics.state_space_divergence import PRESETS, Divergence, DivergencePreset, StateSpaceReference, d_stsp

__all__ = [
    "PRESETS",
    "Divergence",
    "DivergencePreset",
    "PredictionError",
    "SpectralDistance",
    "StateSpaceReference",
    "d_h",
    "d_stsp",
    "prediction_error",
    "smoothed_spectrum",
]

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_STARTS = 16_384  # iterated together


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """PE(n) and what it depends on.

    Attributes:
        value: mean squared error at step ``steps`` over starts and variates; NaN when the model diverged.
        per_step: the same at steps 1 .. n, from the same starts.
        steps: n.
        starts: time points that predictions started from.
    """

    value: float
    per_step: tuple[float, ...]
    steps: int
    starts: int

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return value and configuration as plain values."""
        return dataclasses.asdict(self)


def prediction_error(
    step: Callable[..., Any],
    init: Callable[[Floats], Any],
    x: ArrayLike,
    n: int = 20,
    *,
    observe: Callable[[Any], Any] | None = None,
    inputs: ArrayLike | None = None,
) -> PredictionError:
    """Return the error of n-step predictions, each started from one observation alone (no warm-up).

    Args:
        step: the map, states [B, M] to states [B, M]; with ``inputs`` it also gets those of the target step [B, K].
        init: observations [B, N] to states [B, M].
        x: the data [T, N] in standardised units. A row with a NaN starts no prediction, a NaN cell is not compared.
        n: steps ahead.
        observe: states [B, M] to observations [B, N]; None takes the first N entries of the state.
        inputs: external inputs [T, K] of every row.

    Raises:
        DataError: x is not [T, N] with T > n, holds infinite values, or nothing of it can be compared.
        ConfigError: n is below 1.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1 step, got {n}")
    data = np.asarray(x, dtype=np.float64)
    if data.ndim != 2 or len(data) <= n:
        raise DataError(f"PE({n}) needs a series [T, N] of more than {n} rows, got shape {data.shape}")
    if np.isinf(data).any():
        raise DataError(f"{int(np.isinf(data).sum())} values of the series are infinite; mark them missing (NaN)")
    driven = None if inputs is None else np.asarray(inputs, dtype=np.float64)
    if driven is not None and (driven.ndim != 2 or len(driven) != len(data)):
        raise DataError(f"inputs must be [T, K] with the {len(data)} rows of the series, got {driven.shape}")
    starts = np.flatnonzero(~np.isnan(data[:-n]).any(axis=1))
    total, count = np.zeros(n), np.zeros(n, dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging model overflows: its error is then not finite
        for first in range(0, len(starts), _STARTS):
            part = starts[first : first + _STARTS]
            z = init(data[part])
            for k in range(n):
                target = data[part + k + 1]
                z = step(z) if driven is None else step(z, driven[part + k + 1])
                seen = np.asarray(z[:, : data.shape[1]] if observe is None else observe(z), dtype=np.float64)
                if seen.shape != target.shape:
                    raise DataError(f"predictions have shape {seen.shape}, the data {target.shape}; check observe")
                present = ~np.isnan(target)
                total[k] += np.sum((seen - target)[present] ** 2)
                count[k] += np.count_nonzero(present)
    if not count.all():
        raise DataError("no complete row has an observed value the asked number of steps later")
    per_step = total / count
    per_step[~np.isfinite(per_step)] = np.nan
    errors = tuple(float(error) for error in per_step)
    return PredictionError(value=errors[-1], per_step=errors, steps=n, starts=len(starts))
