"""Covariances of residuals that can always be inverted, and distances that cope with missing variates.

Legend: X residuals [N, V], S covariance [V, V], Q = S^-1 precision, d2 squared Mahalanobis distance.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import chdtrc, chdtri

from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
DENSE_LIMIT = 200  # variates up to which a full covariance is factored
ROWS_PER_VARIATE = 5
_SMALLEST_TAIL = 1e-250
_PARTS_KEPT = 64  # sub-matrices of missing variates


class Covariance(Protocol):
    """What distances and attributions need of a covariance."""

    @property
    def variances(self) -> FloatArray:
        """Return diag(S) [V]."""
        ...

    @property
    def precision_diagonal(self) -> FloatArray:
        """Return diag(S^-1) [V]."""
        ...

    def solve(self, residuals: FloatArray) -> FloatArray:
        """Return S^-1 r of every row: [N, V] -> [N, V]."""
        ...

    def subset(self, keep: NDArray[np.bool_]) -> Covariance:
        """Return the covariance of the variates marked in ``keep``."""
        ...


class DenseCovariance:
    """A full matrix, factored once.

    Rows are solved one by one (a stack of matrix-vector products): a row gets the same bits in any company, as streams
    need it.
    """

    def __init__(self, matrix: ArrayLike) -> None:
        self.matrix = np.asarray(matrix, dtype=np.float64)
        factor = cho_factor(self.matrix, lower=True)
        self._precision = np.asarray(cho_solve(factor, np.eye(len(self.matrix))))
        self._parts: dict[bytes, DenseCovariance] = {}

    @property
    def variances(self) -> FloatArray:
        """Return diag(S) [V]."""
        return np.diag(self.matrix).copy()

    @property
    def precision_diagonal(self) -> FloatArray:
        """Return diag(S^-1) [V]."""
        return np.diag(self._precision).copy()

    def solve(self, residuals: FloatArray) -> FloatArray:
        """Return S^-1 r of every row: [N, V] -> [N, V]."""
        return by_row(self._precision, residuals)

    def subset(self, keep: NDArray[np.bool_]) -> DenseCovariance:
        """Return the covariance of the variates marked in ``keep``; the latest ones asked for are kept at hand."""
        name = keep.tobytes()
        if name not in self._parts:
            if len(self._parts) >= _PARTS_KEPT:
                self._parts.clear()
            self._parts[name] = DenseCovariance(self.matrix[np.ix_(keep, keep)])
        return self._parts[name]


class LowRankCovariance:
    """``S = diag(noise) + B B'``, inverted through a k x k matrix (Woodbury); for many variates or few rows."""

    def __init__(self, noise: ArrayLike, loadings: ArrayLike) -> None:
        self.noise = np.asarray(noise, dtype=np.float64)
        self.loadings = np.asarray(loadings, dtype=np.float64)
        weighted = self.loadings / self.noise[:, None]
        inner = np.eye(self.loadings.shape[1]) + self.loadings.T @ weighted
        self._weighted = weighted
        self._inner_precision = None
        if inner.size:
            self._inner_precision = np.asarray(cho_solve(cho_factor(inner, lower=True), np.eye(len(inner))))

    @property
    def variances(self) -> FloatArray:
        """Return diag(S) [V]."""
        return np.asarray(self.noise + np.square(self.loadings).sum(axis=1))

    @property
    def precision_diagonal(self) -> FloatArray:
        """Return diag(S^-1) [V]."""
        if self._inner_precision is None:
            return 1.0 / self.noise
        explained = (self._weighted.T * (self._inner_precision @ self._weighted.T)).sum(axis=0)
        return np.asarray(1.0 / self.noise - explained)

    def solve(self, residuals: FloatArray) -> FloatArray:
        """Return S^-1 r of every row: [N, V] -> [N, V]."""
        plain = residuals / self.noise
        if self._inner_precision is None:
            return plain
        inner = by_row(self._inner_precision, by_row(self._weighted.T, residuals))
        return np.asarray(plain - by_row(self._weighted, inner))

    def subset(self, keep: NDArray[np.bool_]) -> LowRankCovariance:
        """Return the covariance of the variates marked in ``keep``."""
        return LowRankCovariance(self.noise[keep], self.loadings[keep])


def by_row(matrix: FloatArray, rows: FloatArray) -> FloatArray:
    """Return ``matrix @ r`` of every row: [M, V], [N, V] -> [N, M], each row by itself."""
    return np.asarray(np.matmul(matrix, rows[:, :, None])[:, :, 0])


def ledoit_wolf(residuals: ArrayLike) -> tuple[FloatArray, float]:
    """Return the shrunk covariance ``(1 - rho) C + rho m I`` of complete rows [N, V], and rho.

    Source: Ledoit, Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices, Lemma 3.2-3.4:
    m = tr(C)/V, d^2 = |C - m I|^2 / V, b^2 = min(d^2, sum_k |x_k x_k' - C|^2 / (N^2 V)), rho = b^2 / d^2, where C is
    the covariance about the mean with divisor N.
    """
    x = np.asarray(residuals, dtype=np.float64)
    rows, width = x.shape
    x = x - x.mean(axis=0)
    c = x.T @ x / rows
    m = float(np.trace(c)) / width
    distance = (float(np.square(c).sum()) - width * m**2) / width
    # sum_k |x_k x_k' - C|^2 = sum_k |x_k|^4 - N |C|^2
    spread = (float(np.square(np.square(x).sum(axis=1)).sum()) - rows * float(np.square(c).sum())) / (rows**2 * width)
    rho = 1.0 if distance <= 0.0 else min(max(spread, 0.0), distance) / distance
    return (1.0 - rho) * c + rho * m * np.eye(width), rho


def fit_covariance(residuals: ArrayLike) -> Covariance:
    """Return a covariance of normalised residuals [N, V] about 0-centred columns; NaN marks missing cells.

    Up to 200 variates with at least 5 V complete rows: Ledoit-Wolf. Otherwise diagonal plus rank k, where k counts the
    eigenvalues of the correlation matrix above the Marchenko-Pastur edge (1 + sqrt(V/N))^2. Where too few rows are
    complete, missing cells are set to the column mean and the variances corrected for it: correlations shrink.

    Raises:
        DataError: a column has fewer than two numbers.
    """
    x = np.asarray(residuals, dtype=np.float64)
    seen = ~np.isnan(x)
    counts = seen.sum(axis=0)
    if (counts < 2).any():
        raise DataError(
            f"{int((counts < 2).sum())} of {x.shape[1]} variates have fewer than 2 residuals for a covariance"
        )
    complete = seen.all(axis=1)
    width = x.shape[1]
    enough = int(complete.sum()) >= max(ROWS_PER_VARIATE * width, 2)
    if enough and width <= DENSE_LIMIT:
        matrix, _ = ledoit_wolf(x[complete])
        return DenseCovariance(_lift(matrix))
    mean = np.where(seen, x, 0.0).sum(axis=0) / counts
    filled = np.where(seen, x - mean, 0.0)
    variances = _positive(np.square(filled).sum(axis=0) / counts)
    if len(x) >= ROWS_PER_VARIATE * width and width <= DENSE_LIMIT:
        matrix, _ = ledoit_wolf(filled)
        rescale = np.sqrt(variances / _positive(np.diag(matrix)))
        return DenseCovariance(_lift(matrix * np.outer(rescale, rescale)))
    return _low_rank(filled, variances)


def _positive(variances: FloatArray) -> FloatArray:
    """Return variances with zeros replaced by a small share of the mean, so that nothing divides by 0."""
    mean = float(variances.mean())
    return np.maximum(variances, 1e-6 * mean if mean > 0.0 else 1.0)


def _lift(matrix: FloatArray) -> FloatArray:
    """Return the matrix with a diagonal that can be factored even when residuals are exactly dependent or constant."""
    diagonal = np.diag(matrix)
    return matrix + np.diag(_positive(diagonal) * 1e-9 + (_positive(diagonal) - diagonal))


def _low_rank(filled: FloatArray, variances: FloatArray) -> LowRankCovariance:
    rows, width = filled.shape
    standard = filled / np.sqrt(np.maximum(np.square(filled).mean(axis=0), 1e-300))
    _, singular, vectors = np.linalg.svd(standard / np.sqrt(rows), full_matrices=False)
    eigenvalues = np.square(singular)
    edge = (1.0 + np.sqrt(width / rows)) ** 2
    k = int(min((eigenvalues > edge).sum(), max(rows // ROWS_PER_VARIATE, 1), max(width - 1, 0)))
    rest = float((width - eigenvalues[:k].sum()) / max(width - k, 1))
    loadings = vectors[:k].T * np.sqrt(np.maximum(eigenvalues[:k] - rest, 0.0))
    noise = np.maximum(1.0 - np.square(loadings).sum(axis=1), 0.05)
    scale = np.sqrt(variances / (noise + np.square(loadings).sum(axis=1)))
    return LowRankCovariance(noise * scale**2, loadings * scale[:, None])


def squared_distance(covariance: Covariance, residuals: ArrayLike) -> FloatArray:
    """Return ``d2 = r' S^-1 r`` of every row [N, V] -> [N], brought to V degrees of freedom where variates are missing.

    A row with k observed variates uses their sub-matrix; its d2 is mapped through the chi-square distribution of k to
    the one of V. That only makes rows comparable: d2 is never judged by a chi-square table. No variate gives NaN.
    """
    r = np.asarray(residuals, dtype=np.float64)
    width = r.shape[1]
    seen = ~np.isnan(r)
    if width and seen.all():
        r = np.ascontiguousarray(r)  # sums round by the order in memory
        return np.asarray(np.einsum("nv,nv->n", r, covariance.solve(r)))
    out = np.full(len(r), np.nan)
    for pattern, rows in _patterns(seen):
        if not pattern.any():
            continue
        part = covariance if pattern.all() else covariance.subset(pattern)
        block = r[np.ix_(rows, np.flatnonzero(pattern))]
        d2 = np.einsum("nv,nv->n", block, part.solve(block))
        out[rows] = d2 if pattern.all() else _same_degrees(d2, int(pattern.sum()), width)
    return out


def precision_products(covariance: Covariance, residuals: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return ``Q r`` and ``diag(Q)`` of every row [N, V], with Q of the row's observed variates; NaN where missing."""
    r = np.asarray(residuals, dtype=np.float64)
    product, diagonal = np.full_like(r, np.nan), np.full_like(r, np.nan)
    for pattern, rows in _patterns(~np.isnan(r)):
        if not pattern.any():
            continue
        part = covariance if pattern.all() else covariance.subset(pattern)
        cells = np.ix_(rows, np.flatnonzero(pattern))
        product[cells] = part.solve(r[cells])
        diagonal[cells] = part.precision_diagonal
    return product, diagonal


def _patterns(seen: NDArray[np.bool_]) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Return each distinct pattern of observed variates with its rows."""
    if not len(seen):
        return []
    if seen.all():
        return [(np.ones(seen.shape[1], dtype=bool), np.arange(len(seen)))]
    distinct, inverse = np.unique(np.packbits(seen, axis=1), axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    bounds = np.searchsorted(inverse.ravel()[order], np.arange(len(distinct) + 1))
    groups = [order[bounds[i] : bounds[i + 1]] for i in range(len(distinct))]
    return [(seen[rows[0]], rows) for rows in groups]


def _same_degrees(d2: FloatArray, observed: int, width: int) -> FloatArray:
    """Return the chi-square quantile with ``width`` degrees at the tail probability of d2 with ``observed`` degrees.

    Beyond the smallest representable tail both grow in proportion, so the map stays continuous and increasing.
    """
    limit = float(chdtri(observed, _SMALLEST_TAIL))
    inner = chdtri(width, chdtrc(observed, np.minimum(d2, limit)))
    return np.asarray(inner * np.maximum(d2 / limit, 1.0))
