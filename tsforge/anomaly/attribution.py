"""Which variates are behind an event: contributions to the distance of residuals, the largest over the event.

Legend: r residual row [V], S covariance, Q = S^-1, d2 = r' Q r.

| name | contribution of v | property |
|---|---|---|
| marginal | ``|r_v| / sqrt(S_vv)`` | which sensor is off |
| conditional | ``(Q r)_v^2 / Q_vv`` | d2 minus the distance without v: which sensor disagrees with the others |
| additive | ``r_v (Q r)_v`` | sums to d2; may be negative |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.covariance import Covariance, precision_products

FloatArray = NDArray[np.float64]
LEADING_SHARE = 0.5  # variates with at least this share of the strongest contribution lead an event


@dataclass(frozen=True)
class Contributions:
    """Three views of the same rows, all [N, V]; NaN where the variate was not observed."""

    marginal: FloatArray
    conditional: FloatArray
    additive: FloatArray


def contributions(
    residuals: ArrayLike, covariance: Covariance | None, constant: NDArray[np.bool_] | None = None
) -> Contributions:
    """Return the contributions of residual rows [N, V] (normalised, not winsorised: size is what is asked for).

    Args:
        residuals: NaN is missing; such a row uses the sub-matrix of its observed variates.
        covariance: of the variates that are not constant; None when there are none.
        constant: [V] variates kept out of the covariance, taken as independent with variance 1.
    """
    r = np.asarray(residuals, dtype=np.float64)
    own = np.zeros(r.shape[1], dtype=bool) if constant is None else constant
    marginal, conditional, additive = np.abs(r), np.square(r), np.square(r)
    if covariance is not None:
        inner = r[:, ~own]
        product, diagonal = precision_products(covariance, inner)
        marginal[:, ~own] = np.abs(inner) / np.sqrt(covariance.variances)
        conditional[:, ~own] = np.square(product) / diagonal
        additive[:, ~own] = inner * product
    return Contributions(marginal, conditional, additive)


@dataclass
class Extremes:
    """What is kept of the rows of an event, however many there are: enough to rank its variates at its end.

    Attributes:
        score, threshold, p_value: largest score, the threshold at it, and the smallest p-value.
    Shapes:
        marginal, conditional [V], the largest so far, -inf where never observed; additive [V] at the largest score.
    """

    marginal: FloatArray
    conditional: FloatArray
    additive: FloatArray
    score: float = -np.inf
    threshold: float = np.nan
    p_value: float = np.nan

    @classmethod
    def nothing(cls, width: int) -> Extremes:
        """Return the extremes of no row."""
        return cls(np.full(width, -np.inf), np.full(width, -np.inf), np.full(width, np.nan))

    def add(
        self, parts: Contributions, row: int, score: float, threshold: float = np.nan, p_value: float = np.nan
    ) -> None:
        """Take one row of contributions, later than those before; of equal scores the first is the peak."""
        np.fmax(self.marginal, parts.marginal[row], out=self.marginal)
        np.fmax(self.conditional, parts.conditional[row], out=self.conditional)
        if score > self.score:
            self.score, self.threshold, self.additive = score, threshold, parts.additive[row].copy()
        self.p_value = float(np.fmin(self.p_value, p_value))

    def join(self, later: Extremes) -> None:
        """Take all rows of ``later`` at once."""
        np.fmax(self.marginal, later.marginal, out=self.marginal)
        np.fmax(self.conditional, later.conditional, out=self.conditional)
        if later.score > self.score:
            self.score, self.threshold, self.additive = later.score, later.threshold, later.additive
        self.p_value = float(np.fmin(self.p_value, later.p_value))


def rank_extremes(names: Sequence[str], found: Extremes, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the variates of an event, strongest first, as records ``variate, contribution, conditional, additive``.

    ``contribution`` (marginal) and ``conditional`` are the largest over the event, since a mean dilutes; ``additive``
    is taken at the row of the largest score, where it sums to the distance. Variates never observed in the event are
    left out.
    """
    seen = found.marginal > -np.inf
    order = [int(v) for v in np.argsort(-found.marginal, kind="stable") if seen[v]][:limit]
    return [
        {
            "variate": names[v],
            "contribution": float(found.marginal[v]),
            "conditional": float(found.conditional[v]),
            "additive": None if np.isnan(found.additive[v]) else float(found.additive[v]),
        }
        for v in order
    ]


def leading_variates(ranked: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Return the variates that contribute at least half as much as the strongest one."""
    if not ranked:
        return frozenset()
    bound = LEADING_SHARE * ranked[0]["contribution"]
    return frozenset(item["variate"] for item in ranked if item["contribution"] >= bound)
