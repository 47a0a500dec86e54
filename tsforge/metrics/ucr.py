"""Accuracy of the UCR anomaly archive: does the highest score lie in or near the only anomaly of each series.

Not comparable with F1 on the same data: nothing is said about any other row, and no threshold is chosen.

Source: Wu and Keogh (TKDE 2021); an event is widened on each side by the larger of its length and 100 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tsforge.core.errors import DataError
from tsforge.metrics.anomaly import Missing, runs_of, scored_rows

TOLERANCE = 100


@dataclass(frozen=True)
class UcrAccuracy:
    """Share of series with the highest score in the right place, and what a random score gets on average."""

    accuracy: float
    chance: float
    num_series: int


def ucr_correct(labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse") -> bool:
    """Return whether the highest score lies in the widened event; where several rows share it, all must.

    Raises:
        DataError: not exactly one event, or see ``labelled_scores``.
    """
    return _graded(labels, scores, missing)[0]


def ucr_accuracy(series: Sequence[tuple[ArrayLike, ArrayLike]], *, missing: Missing = "refuse") -> UcrAccuracy:
    """Return the accuracy over series, each with labels and scores [N] of its own N. Threshold-free.

    Raises:
        DataError: no series, or one that ``ucr_correct`` refuses.
    """
    if not series:
        raise DataError("there is no series to grade")
    graded = [_graded(labels, scores, missing) for labels, scores in series]
    correct, chance = (float(np.mean(column)) for column in zip(*graded, strict=True))
    return UcrAccuracy(correct, chance, len(graded))


def _graded(labels: ArrayLike, scores: ArrayLike, missing: Missing) -> tuple[bool, float]:
    """Return whether a series is right, and the share of its scored rows that would be."""
    y, s, kept = scored_rows(labels, scores, missing=missing)
    events = runs_of(y)
    if len(events) != 1:
        raise DataError(f"a series of the UCR archive has one labelled event, this one has {len(events)}")
    start, stop = events[0]
    margin = max(stop - start, TOLERANCE)
    right = np.zeros(y.size, dtype=bool)
    right[max(start - margin, 0) : stop + margin] = True
    return bool(right[kept & (s == s[kept].max())].all()), float(right[kept].mean())
