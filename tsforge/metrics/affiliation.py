"""Affiliation precision and recall: how near predictions lie to events, against what a random prediction would get.

Values of any detector crowd between 0.7 and 1, a random one gets precision 0.5: never a headline.

Source: Huet, Navarro, Rossi (KDD 2022). Row i stands for the interval [i, i + 1); all integrals are in closed form.
Legend: J = [j0, j1) event, E = [e0, e1) its zone (borders halfway between neighbouring events), d distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from tsforge.core.errors import DataError
from tsforge.metrics.anomaly import label_pair, runs_of

Interval = tuple[float, float]


@dataclass(frozen=True)
class Affiliation:
    """Mean precision over zones with predictions (NaN without any), mean recall over all events, harmonic mean."""

    precision: float
    recall: float
    f1: float


def affiliation(labels: ArrayLike, predictions: ArrayLike) -> Affiliation:
    """Return affiliation precision, recall and F1 of predictions [N] against labels [N].

    Raises:
        DataError: no labelled event (undefined), different lengths, or values other than 0 and 1.
    """
    y, p = label_pair(labels, predictions)
    events, segments = runs_of(y), runs_of(p)
    if not events:
        raise DataError("affiliation is undefined without a labelled event")
    borders = [0.0, *((a[1] + b[0]) / 2.0 for a, b in pairwise(events)), float(y.size)]
    precisions, recalls = [], []
    for event, low, high in zip(events, borders, borders[1:], strict=False):
        inside = [(max(float(a), low), min(float(b), high)) for a, b in segments if b > low and a < high]
        if inside:
            precisions.append(_precision(inside, event, (low, high)))
        recalls.append(_recall(inside, event, (low, high)) if inside else 0.0)
    precision = float(np.mean(precisions)) if precisions else float("nan")
    recall = float(np.mean(recalls))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0.0 else 0.0
    return Affiliation(precision, recall, float("nan") if np.isnan(precision) else f1)


def _precision(parts: list[Interval], event: tuple[int, int], zone: Interval) -> float:
    """Return the mean over predicted x of P(random point of the zone is at least as far from the event as x)."""
    j0, j1 = event
    margin = min(j0 - zone[0], zone[1] - j1)
    total = 0.0
    for a, b in parts:
        total += max(min(b, j1) - max(a, j0), 0.0)
        for near, far in (_distances(a, min(b, j0), j0, -1), _distances(max(a, j1), b, j1, 1)):
            if far > near:
                covered = _integral_min(near, far, margin) + (far**2 - near**2) / 2.0 + (j1 - j0) * (far - near)
                total += (far - near) - covered / (zone[1] - zone[0])
    return total / sum(b - a for a, b in parts)


def _distances(a: float, b: float, border: float, side: int) -> Interval:
    """Return the distances to ``border`` covered by [a, b) on one side of it; (0, 0) when empty."""
    if b <= a:
        return 0.0, 0.0
    return (border - b, border - a) if side < 0 else (a - border, b - border)


def _integral_min(near: float, far: float, limit: float) -> float:
    """Return the integral of min(d, limit) over [near, far]."""
    middle = min(max(limit, near), far)
    return (middle**2 - near**2) / 2.0 + limit * (far - middle)


def _recall(parts: list[Interval], event: tuple[int, int], zone: Interval) -> float:
    """Return the mean over the event's y of P(random point of the zone is at least as far from y as the prediction)."""
    j0, j1 = event
    total = 0.0
    gaps = [(zone[0], parts[0][0]), *((a[1], b[0]) for a, b in pairwise(parts))]
    gaps.append((parts[-1][1], zone[1]))
    for a, b in parts:
        total += max(min(b, j1) - max(a, j0), 0.0)
    for number, (low, high) in enumerate(gaps):
        a, b = max(low, float(j0)), min(high, float(j1))
        if b <= a:
            continue
        # which ends of the gap are predictions: the zone's own borders are not
        has_left, has_right = number > 0, number < len(gaps) - 1
        cuts = sorted({a, b, *(c for c in ((low + high) / 2.0, (zone[0] + zone[1]) / 2.0) if a < c < b)})
        for x, y in pairwise(cuts):
            total += _recall_piece(x, y, (low, high), (has_left, has_right), zone)
    return total / (j1 - j0)


def _recall_piece(x: float, y: float, gap: Interval, ends: tuple[bool, bool], zone: Interval) -> float:
    """Return the integral of 1 - (min(d, m) + d) / |E| over y in [x, y], where d, m and min(d, m) are linear.

    They are: inside a gap between predictions d <= m; in one at an end of the zone d = m in the gap's middle, a cut.
    """
    low, high = gap
    covered = 0.0
    for t in (x, y):
        distance = min(t - low if ends[0] else np.inf, high - t if ends[1] else np.inf)
        covered += (min(distance, t - zone[0], zone[1] - t) + distance) / 2.0
    return (y - x) * (1.0 - covered / (zone[1] - zone[0]))
