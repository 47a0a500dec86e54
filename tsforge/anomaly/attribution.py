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


def rank_variates(
    names: Sequence[str], parts: Contributions, peak: int, *, limit: int | None = None
) -> list[dict[str, Any]]:
    """Return the variates of an event, strongest first, as records ``variate, contribution, conditional, additive``.

    ``contribution`` (marginal) and ``conditional`` are the largest over the event, since a mean dilutes; ``additive``
    is taken at row ``peak``, where it sums to the distance. Variates never observed in the event are left out.
    """
    seen = np.asarray(~np.isnan(parts.marginal).all(axis=0))
    largest = np.where(np.isnan(parts.marginal), -np.inf, parts.marginal).max(axis=0)
    disagreement = np.where(np.isnan(parts.conditional), -np.inf, parts.conditional).max(axis=0)
    order = [int(v) for v in np.argsort(-largest, kind="stable") if seen[v]][:limit]
    return [
        {
            "variate": names[v],
            "contribution": float(largest[v]),
            "conditional": float(disagreement[v]),
            "additive": None if np.isnan(parts.additive[peak, v]) else float(parts.additive[peak, v]),
        }
        for v in order
    ]


def leading_variates(ranked: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Return the variates that contribute at least half as much as the strongest one."""
    if not ranked:
        return frozenset()
    bound = LEADING_SHARE * ranked[0]["contribution"]
    return frozenset(item["variate"] for item in ranked if item["contribution"] >= bound)
