"""What a row says of the next one: a ridge regression of each standardised row on the row before, a VAR(1).

    r[t] = z[t] - A z[t-1],   z = (y - mean) / deviation, cut at 20,   A = argmin sum |r|^2 + ridge N |A|^2

Plain and blind to anything longer than a row, so it errs elsewhere than a model with a context does: what ``joint:
consensus`` asks beside it. Learnt from the training rows of a series alone. A missing value counts as the last one
before it; of its own it says nothing. Variates that were constant in training take no part. The plain scorer
``baselines.Var1Residual`` is the same regression of complete rows at once, with the fixed floor of published tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve

from tsforge.anomaly.covariance import by_row

FloatArray = NDArray[np.float64]
CLIP = 20.0
RIDGE = 0.01  # a row


@dataclass(frozen=True, kw_only=True)
class RowRegression:
    """Fitted on one series.

    Shapes:
        mean, deviation [V] of training rows, 1 for variates that take no part; weights [V, V] = A, 0 there; used [V].
    """

    mean: FloatArray
    deviation: FloatArray
    weights: FloatArray
    used: NDArray[np.bool_]

    def residuals(
        self, values: ArrayLike, before: FloatArray, impossible: NDArray[np.bool_] | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return r of rows [N, V] in time order, NaN where nothing was observed, and what the row after them needs.

        A row that nothing was observed before counts as unchanged there. Rows cut anywhere give the same bits.

        Args:
            before: [V] of the rows before, from here or ``nothing_before``.
            impossible: [N, V] values that count as missing to the rows after them; none by default.
        """
        z = np.where(self.used, self._standard(values), 0.0)
        seen = ~np.isnan(z)
        held = hold(z if impossible is None else np.where(impossible, np.nan, z), before)
        past = np.concatenate([before[None], held[:-1]])
        r = np.where(seen, z, held) - by_row(
            self.weights, np.where(np.isnan(past), np.where(np.isnan(held), 0.0, held), past)
        )
        return np.where(seen & self.used, r, np.nan), held[-1].copy() if len(held) else before

    def nothing_before(self) -> FloatArray:
        """Return what ``residuals`` takes at the first row of a series."""
        return np.full_like(self.mean, np.nan)

    def _standard(self, values: ArrayLike) -> FloatArray:
        return np.clip((np.asarray(values, dtype=np.float64) - self.mean) / self.deviation, -CLIP, CLIP)


def fit_row_regression(training: ArrayLike, *, smallest: ArrayLike) -> RowRegression:
    """Return the regression of training rows [N, V] in time order; NaN is missing.

    Args:
        smallest: [V] or one number, floor of the standard deviation.
    """
    x = np.asarray(training, dtype=np.float64)
    seen = ~np.isnan(x)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, x, 0.0).sum(axis=0) / count
    apart = np.where(seen, x - mean, 0.0)
    low = np.where(seen, x, np.inf).min(axis=0, initial=np.inf)
    high = np.where(seen, x, -np.inf).max(axis=0, initial=-np.inf)
    used = high > low  # a mean rounds away from equal numbers
    deviation = np.fmax(np.sqrt(np.square(apart).sum(axis=0) / count), np.asarray(smallest, dtype=np.float64))
    deviation = np.where(used, deviation, 1.0)
    z = np.clip(np.where(used, (x - mean) / deviation, 0.0), -CLIP, CLIP)
    held = np.nan_to_num(hold(z, np.full(x.shape[1], np.nan)), nan=0.0)
    there: NDArray[np.bool_] = np.asarray(seen.any(axis=1))
    pairs = there[1:] & there[:-1]  # across a gap a row says nothing of the next
    past, now = held[:-1][pairs], held[1:][pairs]
    gram = past.T @ past + RIDGE * max(len(past), 1) * np.eye(x.shape[1])
    return RowRegression(
        mean=np.where(used, mean, 0.0),
        deviation=deviation,
        weights=np.asarray(cho_solve(cho_factor(gram), past.T @ now)).T,
        used=used,
    )


def hold(z: FloatArray, before: FloatArray) -> FloatArray:
    """Return rows [N, V] where a missing value is the last one before it, from ``before`` [V] at the start."""
    if not np.isnan(z).any():
        return z
    whole = np.concatenate([before[None], z])
    last = np.maximum.accumulate(np.where(np.isnan(whole), 0, np.arange(len(whole))[:, None]), axis=0)
    return np.take_along_axis(whole, last, axis=0)[1:]
