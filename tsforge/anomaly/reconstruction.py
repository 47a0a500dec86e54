"""Rows told from the rest of the window they stand in, by principal components of training windows.

A window x of w rows and V variates, standardised and laid out as one vector, is taken as x = W s + e, s ~ N(0, I),
e ~ N(0, sigma^2 I): W holds the components of 95 % of the variance, sigma^2 what they leave over. The row j of a window
is told without looking at it,

    E[x_j | x_o] = W_j (sigma^2 I + W_o' W_o)^-1 W_o' x_o,   o: the observed cells of the other rows,

so that a map that hands its input on scores nothing: its own row is never in its input. Missing cells are left out of
o, nothing is filled in; a variate with too few complete windows of its own is left out and has no score. ``last``
tells a row from the rows before it (latency 0). ``mean`` and ``median`` join the errors of all windows that hold the
row and read up to w - 1 later rows.

Every window is told by itself, so that its bits do not depend on how many are told together.

Source: Tipping, Bishop (1999), Probabilistic principal component analysis, eqs. (7)-(8) for W and sigma^2; the
conditional mean is that of a joint normal with the hidden row integrated out. Deviations: 95 % of the variance picks
the number of components; at most 5,000 training windows, spread evenly, are taken.

Legend: N rows, w window, V variates, k components.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.covariance import by_row
from tsforge.anomaly.uncomparable import Uncomparable, window_advice
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
Overlap = Literal["last", "mean", "median"]
EXPLAINED = 0.95
MOST_WINDOWS = 5_000
MOST_CELLS = 4_096  # cells of a window whose covariance is still decomposed in seconds
FEWEST_SEEN = 0.5  # share of a window's other cells that must be observed
_FLOOR = 1e-6  # least share of the variance that is noise: exactly dependent cells must not be infinitely certain
_BLOCK = 1 << 22  # numbers held at once


@dataclass(frozen=True)
class WindowPca:
    """Standardisation [V] of rows, and the model of their windows: loadings [w, V, k] and noise variance sigma^2.

    The center of a variate that was never observed is NaN, so that none of its cells is ever a condition.
    """

    center: FloatArray
    scale: FloatArray
    loadings: FloatArray
    noise: float

    @property
    def window(self) -> int:
        """Rows of a window."""
        return len(self.loadings)

    def told(self, values: FloatArray, place: int) -> FloatArray:
        """Return row ``place`` of each window of ``values`` [N, V] told from its other rows, [N - w + 1, V].

        In data units; NaN where less than half of the other cells are observed.
        """
        w, width, _ = self.loadings.shape
        z = (values - self.center) / self.scale
        if len(z) < w:
            return np.empty((0, width))
        others = np.delete(np.arange(w), place)
        seen = ~np.isnan(z)
        hand_over = self._hand_overs[place]
        found = np.empty((len(z) - w + 1, width))
        size = max(_BLOCK // hand_over.shape[1], 1)
        for start in range(0, len(found), size):
            rows = np.arange(start, min(start + size, len(found)))
            cells = z[rows[:, None] + others].reshape(len(rows), -1)
            known = seen[rows[:, None] + others].reshape(len(rows), -1)
            complete = known.all(axis=1)
            found[rows[complete]] = by_row(hand_over, cells[complete])
            if not complete.all():
                found[rows[~complete]] = self._told_partly(cells[~complete], known[~complete], place)
        return found * self.scale + self.center

    @cached_property
    def _hand_overs(self) -> tuple[FloatArray, ...]:
        """What tells each place [V, (w - 1) V] from complete other rows."""
        w, width, _ = self.loadings.shape
        everything = np.ones((w - 1) * width, dtype=bool)
        return tuple(self._hand_over(place, everything) for place in range(w))

    def _hand_over(self, place: int, known: NDArray[np.bool_]) -> FloatArray:
        """Return what tells the row at ``place`` from the known ones [(w - 1) V] of the other cells: [V, n]."""
        own = np.delete(self.loadings, place, axis=0).reshape(-1, self.loadings.shape[2])[known]
        inner = self.noise * np.eye(own.shape[1]) + own.T @ own
        return np.ascontiguousarray(self.loadings[place] @ np.linalg.solve(inner, own.T))

    def _told_partly(self, cells: FloatArray, known: NDArray[np.bool_], place: int) -> FloatArray:
        """Return the row told from the known ones of ``cells`` [n, (w - 1) V], solved once for each pattern of them."""
        found = np.full((len(cells), self.loadings.shape[1]), np.nan)
        patterns, which = np.unique(known, axis=0, return_inverse=True)
        told_by = (self.window - 1) * int((~np.isnan(self.center)).sum())
        for number, pattern in enumerate(patterns):
            if pattern.sum() < FEWEST_SEEN * told_by:
                continue
            rows = which.ravel() == number
            found[rows] = by_row(self._hand_over(place, pattern), cells[np.ix_(rows, pattern)])
        return found

    def expected(self, values: FloatArray, overlap: Overlap = "last") -> FloatArray:
        """Return what each row of ``values`` [N, V] should have been, told from the windows that hold it.

        ``last`` has the window that ends with a row. ``mean`` and ``median`` join what all w windows say; a row that
        some of them do not reach, at either end, is NaN. The joined error is the error of the joined value.
        """
        w = self.window
        found = np.full_like(values, np.nan)
        if overlap == "last":
            found[w - 1 :] = self.told(values, w - 1)
            return found
        count = len(values) - 2 * (w - 1)  # rows that stand in w windows
        if count <= 0:
            return found
        # window n tells row n + place at its place: row r is told by windows r - place
        parts = np.stack([self.told(values, place)[w - 1 - place :][:count] for place in range(w)], axis=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # rows that no window tells stay NaN, as documented
            joined = np.nanmedian(parts, axis=-1) if overlap == "median" else np.nanmean(parts, axis=-1)
        found[w - 1 : w - 1 + count] = joined
        return found


@dataclass(frozen=True)
class ReconstructionScore:
    """Rows told from the rest of their windows, as ``overlap`` says."""

    pca: WindowPca
    overlap: Overlap

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return self.pca.window - 1

    @property
    def latency(self) -> int:
        """Rows after a row that its score reads."""
        return 0 if self.overlap == "last" else self.pca.window - 1

    def expected(self, values: FloatArray) -> FloatArray:
        """Return what each row should have been, [N, V].

        Args:
            values: [reach + N + latency, V] in time order, NaN where not observed.
        """
        return self.pca.expected(values, self.overlap)[self.reach : len(values) - self.latency]


def fit_window_pca(training: FloatArray, window: int, explained: float = EXPLAINED) -> WindowPca:
    """Return the model of training rows [N, V], NaN where not observed.

    Args:
        training: in time order.
        window: rows of a window, at least 2.
        explained: share of the variance that components hold.

    Raises:
        DataError: too many cells in a window.
        Uncomparable: too few complete windows.
    """
    width = training.shape[1]
    if window * width > MOST_CELLS:
        raise DataError(
            f"a window of {window} rows of {width} variates has {window * width} cells; reconstruction takes at most "
            f"{MOST_CELLS}: lower score.window to {max(MOST_CELLS // width, 1)}"
        )
    seen = ~np.isnan(training)
    known = _known(seen, window)
    counts = np.where(known, seen.sum(axis=0), np.nan)
    center = np.where(seen, training, 0.0).sum(axis=0) / counts
    lowest = np.where(seen, training, np.inf).min(axis=0, initial=np.inf)
    still = known & (lowest == np.where(seen, training, -np.inf).max(axis=0, initial=-np.inf))
    center = np.where(still, lowest, center)  # a mean rounds away from equal numbers, and the spread from 0
    spread = np.sqrt(np.square(np.where(seen, training - center, 0.0)).sum(axis=0) / counts)
    scale = np.where(spread > 0.0, spread, 1.0)
    z = np.ascontiguousarray(((training - center) / scale)[:, known])
    whole = np.flatnonzero(_complete(seen[:, known], window))
    if len(whole) < 2 * window:  # as ``_suffices`` says
        observed = int(seen.any(axis=1).sum())
        raise Uncomparable(
            f"{len(training)} training rows ({observed} of them observed) hold {len(whole)} complete windows of "
            f"{window} rows, reconstruction needs {2 * window}",
            observed=observed,
            advice=window_advice(window, 2, lambda size: _suffices(seen[:, _known(seen, size)], size)),
        )
    chosen = whole[np.unique(np.linspace(0, len(whole) - 1, MOST_WINDOWS).astype(np.int64))]
    rows = z[chosen[:, None] + np.arange(window)].reshape(len(chosen), -1)
    values, directions = np.linalg.eigh(rows.T @ rows / len(rows))
    values, directions = np.maximum(values[::-1], 0.0), directions[:, ::-1]
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    count = int(np.searchsorted(np.cumsum(values) / total, explained * (1.0 - 1e-12))) + 1
    count = min(count, len(values) - 1)
    noise = max(float(values[count:].mean()), _FLOOR * total / len(values), np.finfo(np.float64).tiny)
    loadings = directions[:, :count] * np.sqrt(np.maximum(values[:count] - noise, 0.0))
    # products round by the order in memory: that of what is stored and read again
    every = np.zeros((window, width, count))
    every[:, known] = loadings.reshape(window, -1, count)
    return WindowPca(center, scale, every, noise)


def _known(seen: NDArray[np.bool_], window: int) -> NDArray[np.bool_]:
    """Return which variates [V] have windows enough of their own: the others would leave none to the rest.

    Where none has, all that were ever observed.
    """
    enough = np.array([_suffices(seen[:, [v]], window) for v in range(seen.shape[1])], dtype=bool)
    return enough if enough.any() else np.asarray(seen.any(axis=0))


def _suffices(seen: NDArray[np.bool_], window: int) -> bool:
    """Return whether rows [N, V] hold as many complete windows as a reconstruction needs."""
    return int(_complete(seen, window).sum()) >= 2 * window


def _complete(seen: NDArray[np.bool_], window: int) -> NDArray[np.bool_]:
    """Return which windows [N - w + 1] have all cells, none of no variates."""
    whole = (seen.all(axis=1) & seen.any(axis=1)).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(whole)])
    return np.asarray(sums[window:] - sums[:-window] == window) if len(seen) >= window else np.zeros(0, dtype=bool)
