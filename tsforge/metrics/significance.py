"""Paired tests of forecasters: is the difference in loss more than chance?

Two kinds of evidence. *Diebold-Mariano* takes losses in time order and allows for their autocorrelation; over a panel
the differences of all series are averaged at every cutoff first, so that what moves all series at once counts once.
*Wilcoxon* takes units that are independent of each other (series, or cutoffs whose forecasts do not overlap). Many
models against one are corrected with Holm's step-down rule. Losses that differ by less than a millionth are equal to
every test, as they are a tie to ranks: so small a difference is rounding, not skill, however regular it is. Nor does
Diebold-Mariano decide on differences that are all the same up to a ten-thousandth: their variance is rounding as well.

The long-run variance of n loss differences d has two estimates:

- ``rectangular`` sums the autocovariances up to lag h - 1, all that h-step forecasts of an optimal forecaster have. It
  may come out negative; then the Bartlett estimate is taken, and the result says so (``kernel``).
- ``bartlett`` (Newey, West 1987) weighs lag j with 1 - j / (L + 1) and is never negative. L + 1 = ceil(1.3 sqrt(n)),
  the rule of Lazarus et al. (2018), and at least h. So wide a kernel has little bias but much variance, which a normal
  distribution would ignore: for independent losses the estimate is a quadratic form d'Ad, whose mean and variance are
  known, so it is divided by its mean under independence and compared with a t distribution that has Satterthwaite's
  degrees of freedom, 2 E^2 / Var = tr(A)^2 / tr(A^2). With L = 0 that is the t test of Student. The critical
  values follow those of fixed-b asymptotics (Kiefer, Vogelsang 2005) within 6 % while L + 1 is below 0.3 n.

Deviation: fixed-b critical values come from a polynomial fitted to simulations; the two moments here need no table,
hold for small n, and give p-values.

Sources: Diebold, Mariano (1995), J. Business & Economic Statistics 13:253-263; Harvey, Leybourne, Newbold (1997), Int.
J. Forecasting 13:281-291, Eq. (9); Newey, West (1987), Econometrica 55:703-708; Kiefer, Vogelsang (2005), Econometric
Theory 21:1130-1164; Lazarus, Lewis, Stock, Watson (2018), J. Business & Economic Statistics 36:541-559; Coroneo, Iacone
(2020), J. Applied Econometrics 35:391-409 (fixed-b for Diebold-Mariano); Satterthwaite (1946), Biometrics Bulletin
2:110-114; Holm (1979), Scandinavian J. Statistics 6:65-70.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr

from tsforge.core.errors import DataError
from tsforge.metrics.point import FloatArray

Kernel = Literal["rectangular", "bartlett"]
ROUNDING = 1e-6  # relative: the same forecasts summed in another order differ by less, forecasters by more
# relative: single-precision forecasts round by more of a difference that is small beside them
STEADY = 100.0 * ROUNDING


@dataclass(frozen=True, kw_only=True)
class Significance:
    """Outcome of a test: its statistic, two-sided p-value and the number of rows it used; NaN when undecidable."""

    statistic: float
    p_value: float
    count: int


@dataclass(frozen=True, kw_only=True)
class MeanDifference(Significance):
    """Outcome of a Diebold-Mariano test.

    Attributes:
        difference: mean loss of the first less that of the second; negative: the first is better.
        kernel: of the variance in use; not the one asked for where that estimate was not positive.
        lags: highest lag with a weight.
        dof: degrees of freedom of the t distribution.
    """

    difference: float
    kernel: Kernel
    lags: int
    dof: float


def wilcoxon(first: ArrayLike, second: ArrayLike) -> Significance:
    """Test whether paired losses of independent units differ (signed ranks, two-sided); NaN when all pairs are equal.

    Pairs with a missing loss are left out; equal pairs are split between both sides.

    Source: Wilcoxon (1945); Demsar (2006), JMLR 7:1-30, section 3.1.3.
    """
    difference = _differences(first, second)
    if not (difference != 0).any():
        return Significance(statistic=np.nan, p_value=np.nan, count=len(difference))
    from scipy.stats import wilcoxon as signed_ranks  # takes half a second to load, and few ask

    outcome = signed_ranks(difference, zero_method="zsplit", method="auto")
    return Significance(statistic=float(outcome.statistic), p_value=float(outcome.pvalue), count=len(difference))


def holm(p_values: ArrayLike) -> FloatArray:
    """Return p-values adjusted for their number (Holm 1979): below alpha exactly where the step-down rule rejects.

    A missing p-value (NaN) stays missing and does not count as a test.

    Shapes:
        p_values [tests] -> [tests].
    """
    given = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(given.shape, np.nan)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def automatic_lags(count: int, horizon: int = 1) -> int:
    """Return the highest lag L of the Bartlett kernel: L + 1 = ceil(1.3 sqrt(n)), at least h, at most n - 1.

    Source: Lazarus et al. (2018), the rule they recommend.
    """
    return min(max(math.ceil(1.3 * math.sqrt(count)), horizon) - 1, max(count - 2, 0))


def diebold_mariano(
    first: ArrayLike,
    second: ArrayLike,
    horizon: int = 1,
    *,
    kernel: Kernel = "rectangular",
    lags: int | None = None,
) -> MeanDifference:
    """Test whether two sequences of losses in time order have equal means, allowing for autocorrelation.

    Args:
        first, second: losses [T]; times where one is missing are left out.
        horizon: neighbouring losses that share rows; those of h-step forecasts made at every step share h.
        kernel: how autocovariances are weighed, see the module.
        lags: highest lag of the Bartlett kernel instead of the automatic one.

    Returns:
        NaN when the losses never differ, when they always differ by the same amount (its spread below a
        ten-thousandth of it is rounding), or when there are no more of them than ``horizon``.

    Raises:
        DataError: ``horizon`` is below 1, ``lags`` below 0, or ``lags`` is given for the rectangular kernel.
    """
    if horizon < 1 or (lags is not None and lags < 0):
        raise DataError(f"horizon is {horizon} and lags {lags}; they must be at least 1 and 0")
    if lags is not None and kernel == "rectangular":
        raise DataError("lags belong to the Bartlett kernel; the rectangular one sums up to lag horizon - 1")
    difference = _differences(first, second)
    number = len(difference)
    mean = float(difference.mean()) if number else np.nan
    chosen = (horizon - 1) if kernel == "rectangular" else automatic_lags(number, horizon) if lags is None else lags
    if number <= horizon or number < 2 or np.ptp(difference) <= STEADY * abs(mean):
        return _undecidable(mean, number, kernel, chosen)
    if kernel == "rectangular":
        variance = _weighted_autocovariance(difference, np.ones(horizon - 1)) / number
        if variance > 0.0:
            correction = (number + 1 - 2 * horizon + horizon * (horizon - 1) / number) / number
            statistic = mean / math.sqrt(variance) * math.sqrt(max(correction, 0.0))
            return _outcome(mean, statistic, number, "rectangular", chosen, number - 1.0)
        chosen = automatic_lags(number, horizon)
    chosen = min(chosen, number - 1)
    weights = 1.0 - np.arange(1, chosen + 1) / (chosen + 1.0)
    expected, dof = _bartlett_moments(number, chosen)
    variance = _weighted_autocovariance(difference, weights) / expected  # n times that of the mean
    return _outcome(mean, mean / math.sqrt(variance / number), number, "bartlett", chosen, dof)


def panel_diebold_mariano(
    first: ArrayLike, second: ArrayLike, horizon: int = 1, *, kernel: Kernel = "bartlett"
) -> MeanDifference:
    """Test the loss difference averaged over series at each cutoff, so that series may depend on each other in any way.

    Series are averaged as they are: bring losses of different units to one scale first. A pair with a missing loss is
    left out, and so is a cutoff without any pair.

    Shapes:
        first, second [series, cutoffs], cutoffs in time order.
    Raises:
        DataError: shapes differ, or are not two-dimensional.

    Source: Timmermann, Zhu (2019), Comparing Forecasting Performance with Panel Data (the cross-sectional average,
    tested as a time series).
    """
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if ours.ndim != 2 or ours.shape != theirs.shape:
        raise DataError(
            f"panel losses need two tables [series, cutoffs] of one shape, given {ours.shape, theirs.shape}"
        )
    difference = _difference(ours, theirs)
    seen = ~np.isnan(difference)
    count = seen.sum(axis=0)
    average = np.where(seen, difference, 0.0).sum(axis=0)[count > 0] / count[count > 0]
    return diebold_mariano(average, np.zeros(len(average)), horizon, kernel=kernel)


def _differences(first: ArrayLike, second: ArrayLike) -> FloatArray:
    difference = _difference(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    return np.asarray(difference[~np.isnan(difference)])


def _difference(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return first - second of any shape, 0 where they differ by rounding only."""
    difference = first - second
    rounding = np.abs(difference) <= ROUNDING * np.minimum(np.abs(first), np.abs(second))
    return np.where(rounding, 0.0, difference)


def _weighted_autocovariance(values: FloatArray, weights: FloatArray) -> float:
    """Return ``g[0] + 2 sum_j weights[j - 1] g[j]`` with autocovariances g that divide by n."""
    centred = values - values.mean()
    number = len(centred)
    total = float(centred @ centred)
    total += 2.0 * sum(
        float(weight * (centred[lag:] @ centred[: number - lag])) for lag, weight in enumerate(weights, 1)
    )
    return total / number


def _bartlett_moments(number: int, lags: int) -> tuple[float, float]:
    """Return mean (in units of the variance) and Satterthwaite's degrees of freedom of the estimate, white noise.

    The estimate is d'CKCd / n with K the Toeplitz matrix of the weights and C = I - 11'/n, so the traces of A = CKC
    need
    only the sum of K, of K1 squared and of K squared: O(n + L).
    """
    weights = 1.0 - np.arange(lags + 1) / (lags + 1.0)
    pairs = number - np.arange(lags + 1, dtype=np.float64)
    ahead = np.concatenate([[0.0], np.cumsum(weights[1:])])[
        np.minimum(np.arange(number), lags)
    ]  # weights towards row 0
    row_sums = weights[0] + ahead + ahead[::-1]  # K1
    total = float(row_sums.sum())  # 1'K1
    squares = float(number * weights[0] ** 2 + 2.0 * (pairs[1:] * weights[1:] ** 2).sum())  # tr(K^2)
    trace = number - total / number
    trace_squared = squares - 2.0 * float(row_sums @ row_sums) / number + (total / number) ** 2
    return trace / number, trace**2 / trace_squared


def _outcome(mean: float, statistic: float, count: int, kernel: Kernel, lags: int, dof: float) -> MeanDifference:
    return MeanDifference(
        statistic=statistic,
        p_value=float(2.0 * stdtr(dof, -abs(statistic))),
        count=count,
        difference=mean,
        kernel=kernel,
        lags=lags,
        dof=dof,
    )


def _undecidable(mean: float, count: int, kernel: Kernel, lags: int) -> MeanDifference:
    return MeanDifference(
        statistic=np.nan, p_value=np.nan, count=count, difference=mean, kernel=kernel, lags=lags, dof=np.nan
    )
