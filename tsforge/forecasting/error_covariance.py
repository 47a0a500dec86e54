"""Covariance of the forecast errors of many nodes from few windows: shrunk, kept as a diagonal and a thin factor.

W = lambda D + (1 - lambda) E'E / T with D = diag(E'E / T): Wickramasuriya, Athanasopoulos, Hyndman (2019), JASA 114:
804-819, Section 2.4. The intensity is that of Schaefer and Strimmer (2005), SAGMB 4:32, for shrunk correlations,

    lambda = sum_{i != j} Var(r_ij) / sum_{i != j} r_ij^2,   Var(r_ij) = sum_k (w_kij - r_ij)^2 / (T (T - 1)),

with w_kij = x_ki x_kj of standardised errors and r_ij their mean over k. Both sums over pairs follow from T x T
products (n x n where there are fewer nodes than errors),

    sum_ij r_ij^2 = |X X'|_F^2 / T^2,   sum_ij sum_k w_kij^2 = sum_k (sum_i x_ki^2)^2,

so no n x n matrix is ever formed: O(T^2 n) time and O(T n) memory for n nodes.

Deviations: second moments are taken about zero, as in the paper, though held-out errors may have a bias (a biased node
is then trusted less). A missing error counts as its expectation, zero, after standardising: correlations shrink with
the share that is missing, and W stays positive definite. That serves weights but takes variance away, so correlations
that spread intervals are those of the rows without any gap (``error_correlation``). Errors of neighbouring steps and
overlapping windows are dependent, which makes the intensity too small; it is a choice, not a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tsforge.core.errors import DataError
from tsforge.core.logs import get_logger

_LOG = get_logger(__name__)
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
LEAST_SHRINKAGE = 1e-6  # keeps W positive definite however many windows there are
MIN_ERRORS = 4


@dataclass(frozen=True, eq=False)
class ErrorCovariance:
    """W = lambda diag(v) + (1 - lambda) diag(v)^1/2 X'X / T diag(v)^1/2.

    Attributes:
        variance: [n] v, mean squared error of each node.
        standardised: [T, n] X, errors over their root mean square; None for a diagonal W.
        shrinkage: lambda; 1 for a diagonal W.
    """

    variance: Floats
    standardised: Floats | None = None
    shrinkage: float = 1.0

    def factor(self) -> Floats | None:
        """Return F [T, n] with W = lambda diag(v) + F'F, None for a diagonal W."""
        if self.standardised is None:
            return None
        weight = np.sqrt((1.0 - self.shrinkage) / len(self.standardised))
        return np.asarray(weight * self.standardised * np.sqrt(self.variance))

    def dense(self) -> Floats:
        """Return W [n, n]; for few nodes."""
        diagonal = np.diag(self.shrinkage * self.variance)
        factor = self.factor()
        return diagonal if factor is None else diagonal + factor.T @ factor


def error_variance(errors: Floats) -> Floats:
    """Return the mean squared error of each node [n] from errors [T, n], NaN where missing.

    A node that was always right gets a millionth of the smallest other variance: it is trusted, not divided by.

    Raises:
        DataError: a node has no error at all.
    """
    count = np.isfinite(errors).sum(axis=0)
    if not len(errors) or not count.all():
        none = int((count == 0).sum()) if len(errors) else errors.shape[1]
        raise DataError(
            f"{none} of {errors.shape[1]} nodes have no held-out forecast error before the cutoff; give the fit a "
            "valid span with observed targets, or choose method bottom_up, ols or wls_structural, which need none"
        )
    variance = np.nansum(errors * errors, axis=0) / count
    positive = variance[variance > 0]
    least = float(positive.min()) * 1e-6 if len(positive) else 1.0
    return np.asarray(np.where(variance > 0, variance, least))


def shrunk_covariance(errors: Floats) -> ErrorCovariance:
    """Return the shrunk covariance of errors [T, n], NaN where missing.

    Raises:
        DataError: fewer than 4 rows, or a node without any error.
    """
    if len(errors) < MIN_ERRORS:
        raise DataError(
            f"a covariance needs at least {MIN_ERRORS} held-out errors a node, there are {len(errors)}; widen the "
            "valid span, or choose wls_structural"
        )
    variance = error_variance(errors)
    scaled = np.nan_to_num(errors / np.sqrt(variance), nan=0.0)
    return ErrorCovariance(variance=variance, standardised=scaled, shrinkage=shrinkage_intensity(scaled))


def error_correlation(errors: Floats) -> ErrorCovariance:
    """Return the shrunk covariance whose correlations spread intervals, from errors [T, n], NaN where missing.

    Only rows without any gap are taken. Where there are fewer than 4 it is ``shrunk_covariance``, which is too small
    then; a warning says so.

    Raises:
        DataError: as ``shrunk_covariance``.
    """
    whole = np.isfinite(errors).all(axis=1)
    if whole.sum() >= MIN_ERRORS:
        return shrunk_covariance(errors[whole])
    found = shrunk_covariance(errors)
    _LOG.warning(
        "gaussian intervals: only %d of %d held-out errors are there for all %d nodes, too few for correlations; gaps "
        "count as no error and the intervals are too narrow: choose intervals=conformal, or widen the valid span",
        whole.sum(),
        *errors.shape,
    )
    return found


def shrinkage_intensity(scaled: Floats) -> float:
    """Return lambda in [1e-6, 1] for standardised errors [T, n] (see the module)."""
    number = len(scaled)
    gram = scaled @ scaled.T if number <= scaled.shape[1] else scaled.T @ scaled  # of equal norm
    squares = scaled * scaled
    own = squares.mean(axis=0)
    correlation = float((gram * gram).sum()) / number**2 - float((own * own).sum())
    products = float((squares.sum(axis=1) ** 2).sum()) - float((squares * squares).sum())
    variance = (products - number * correlation) / (number * (number - 1))
    if correlation <= 0.0:
        return 1.0
    return float(np.clip(variance / correlation, LEAST_SHRINKAGE, 1.0))
