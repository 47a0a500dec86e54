"""Scores of sample paths as a whole: they see the dependence between steps, which scores of single cells cannot.

Float64. A step that was not observed is left out of its window; a window with none observed scores NaN. The score of a
single cell from samples is ``quantile.crps_samples``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError
from tsforge.metrics.point import FloatArray

_CELLS = 4_000_000  # distances held at a time: 32 MB


def energy_score(
    target: ArrayLike, samples: ArrayLike, mask: ArrayLike | None = None, *, fair: bool = True
) -> FloatArray:
    """Return the energy score of every window, in data units; smaller is better, proper for the joint distribution.

    ES = mean_m |X_m - y| - 1/2 mean_(m, m') |X_m - X_m'|, Euclidean norms over the axes of a window. In one dimension
    it is the CRPS. It tells a wrong location or spread well and a wrong dependence weakly; ``variogram_score`` is the
    sharper test of that.

    Args:
        mask: True = observed; default where the target is not NaN.
        fair: divide the second term by M (M - 1), unbiased for the distribution that independent paths come from;
            otherwise by M^2, the score of the paths taken as the forecast itself.

    Shapes:
        target [..., D], samples [..., M, D], mask [..., D] -> [...].
    Raises:
        DataError: fewer than two samples with ``fair``, none, or shapes that do not fit.
    Source: Gneiting and Raftery (2007), JASA 102:359-378, Eq. (22) with beta = 1; fair: Ferro (2014), QJRMS
        140:1917-1923.
    """
    y, draws, seen, shape = _windows(target, samples, mask, 2 if fair else 1)
    count = draws.shape[1]
    pairs = count * (count - 1) if fair else count * count
    result = np.empty(len(y))
    step = max(1, _CELLS // max(count * count, count * y.shape[1]))
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        points = np.where(seen[part, None, :], draws[part], 0.0)
        centre = points.mean(axis=1, keepdims=True)
        error = np.linalg.norm(points - np.where(seen[part], y[part], 0.0)[:, None], axis=-1).mean(axis=-1)
        points = points - centre  # distances from inner products lose digits far from the origin
        squared = np.square(points).sum(axis=-1)
        distance = squared[:, :, None] + squared[:, None, :] - 2.0 * points @ points.transpose(0, 2, 1)
        diagonal = np.arange(count)
        distance[:, diagonal, diagonal] = 0.0
        spread = np.sqrt(np.maximum(distance, 0.0)).sum(axis=(1, 2)) / pairs
        result[part] = np.where(seen[part].any(axis=-1), error - 0.5 * spread, np.nan)
    return result.reshape(shape)


def variogram_score(
    target: ArrayLike, samples: ArrayLike, mask: ArrayLike | None = None, *, order: float = 0.5
) -> FloatArray:
    """Return the variogram score of every window: how well the paths know the differences between steps.

    Mean over pairs i < j of w_ij (|y_i - y_j|^p - mean_m |X_mi - X_mj|^p)^2 with w_ij proportional to 1 / (j - i): near
    steps say most about the dependence. It does not see a bias that all steps share; read it beside the energy score.

    Args:
        order: the power p.

    Shapes:
        target [..., D], samples [..., M, D], mask [..., D] -> [...]; NaN with fewer than two steps observed.
    Raises:
        DataError: no sample, an order that is not positive, or shapes that do not fit.
    Source: Scheuerer and Hamill (2015), Monthly Weather Review 143:1321-1334; weights scaled to sum to one, so that
        windows of different length compare.
    """
    if not order > 0.0:
        raise DataError(f"the order of a variogram score is {order}; it must be positive")
    y, draws, seen, shape = _windows(target, samples, mask, 1)
    total, weights = np.zeros(len(y)), np.zeros(len(y))
    for lag in range(1, y.shape[1]):
        both = seen[:, lag:] & seen[:, :-lag]
        expected = (np.abs(draws[..., lag:] - draws[..., :-lag]) ** order).mean(axis=1)
        actual = np.abs(y[:, lag:] - y[:, :-lag]) ** order
        total += np.where(both, np.square(actual - expected), 0.0).sum(axis=-1) / lag
        weights += both.sum(axis=-1) / lag
    with np.errstate(invalid="ignore"):
        return np.where(weights > 0, total / weights, np.nan).reshape(shape)


def _windows(
    target: ArrayLike, samples: ArrayLike, mask: ArrayLike | None, least: int
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], tuple[int, ...]]:
    """Return target [N, D], samples [N, M, D], mask [N, D] and the shape of the leading axes."""
    y, draws = np.asarray(target, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if draws.ndim != y.ndim + 1 or draws.shape[:-2] != y.shape[:-1] or draws.shape[-1] != y.shape[-1]:
        raise DataError(f"samples {draws.shape} do not fit a target {y.shape}: they need one more axis before the last")
    if draws.shape[-2] < least:
        raise DataError(f"{draws.shape[-2]} samples a window are too few for this score")
    seen = ~np.isnan(y)
    if mask is not None:
        seen &= np.broadcast_to(np.asarray(mask, dtype=bool), y.shape)
    size = y.shape[-1]
    return y.reshape(-1, size), draws.reshape(-1, *draws.shape[-2:]), seen.reshape(-1, size), y.shape[:-1]
