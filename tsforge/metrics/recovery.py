"""How well known coefficients were recovered."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def stpe(estimate: ArrayLike, truth: ArrayLike) -> float:
    """Return the symmetric total percentage error of a coefficient vector, 0 (equal) to 100 (opposite signs).

    ``100 * sum |estimate - truth| / sum (|estimate| + |truth|)``; the shorter vector is padded with zeros, and two
    all-zero vectors are equal.

    Source:
        Triebe, Laptev, Rajagopal (2019), arXiv 1911.12436, section 3.2, without the constant in the denominator.
    """
    first = np.atleast_1d(np.asarray(estimate, dtype=np.float64))
    second = np.atleast_1d(np.asarray(truth, dtype=np.float64))
    size = max(len(first), len(second))
    first, second = (np.pad(vector, (0, size - len(vector))) for vector in (first, second))
    total = float(np.abs(first).sum() + np.abs(second).sum())
    return 100.0 * float(np.abs(first - second).sum()) / total if total > 0.0 else 0.0
