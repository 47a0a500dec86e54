"""Volume under the surface: AUC-ROC and AUC-PR with soft borders around events, averaged over the border's width.

Two definitions in use give different numbers for the same input; both are here and a result always names its own.

Source: Paparrizos et al. (PVLDB 2022); ``tsb`` as in the TSB-AD leaderboard, ``2022`` as in ``aeon``.
Legend: w buffer width, h = w // 2 rows on each side, b soft label, A alarmed event rows, B alarmed soft label outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError
from tsforge.metrics.anomaly import labelled_scores, runs_of

FloatArray = NDArray[np.float64]
REFERENCE_THRESHOLDS = 250
Variant = Literal["tsb", "2022"]


@dataclass(frozen=True)
class Vus:
    """Mean areas over widths 0 .. ``width``; they mean nothing without width, variant and a random score's value."""

    roc: float
    pr: float
    width: int
    variant: Variant
    thresholds: Literal["reference", "exact"]


def vus(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    width: int = 100,
    variant: Variant = "tsb",
    thresholds: Literal["reference", "exact"] = "exact",
) -> Vus:
    """Return VUS-ROC and VUS-PR.

    Args:
        labels, scores: [N].
        width: largest buffer W; the chance level depends on it.
        variant: which definition.
        thresholds: ``exact`` uses every distinct score; ``reference`` the 250 quantiles of the published code, which
            distort data with short events (a perfect detector of one 50-row event in 100,000 rows gets 0.142).

    Raises:
        ConfigError: negative width.
        DataError: see ``labelled_scores``.
    """
    if width < 0:
        raise ConfigError(f"width is {width}; the buffer must not be negative")
    y, s = labelled_scores(labels, scores)
    order = np.argsort(-s, kind="stable")
    ordered = s[order]
    if thresholds == "reference":
        levels = ordered[np.linspace(0, s.size - 1, REFERENCE_THRESHOLDS).astype(np.int64)]
    else:
        levels = np.unique(s)[::-1]
    alarmed = s.size - np.searchsorted(ordered[::-1], levels, side="left")
    hits = np.cumsum(y[order], dtype=np.float64)[alarmed - 1]
    events = runs_of(y)
    areas = []
    for w in range(width + 1):
        soft, ranges = _soft_labels(events, s.size, w, variant)
        outside = np.where(y, 0.0, soft)
        extra = np.cumsum(outside[order])[alarmed - 1]
        peaks = np.sort([s[a:b].max() for a, b in ranges])
        existence = (len(ranges) - np.searchsorted(peaks, levels, side="left")) / len(ranges)
        area = _areas_tsb if variant == "tsb" else _areas_2022
        areas.append(area(hits, extra, alarmed, existence, (int(y.sum()), float(outside.sum()), s.size)))
    roc, pr = np.mean(areas, axis=0)
    return Vus(float(roc), float(pr), width, variant, thresholds)


def _soft_labels(
    events: list[tuple[int, int]], size: int, w: int, variant: Variant
) -> tuple[FloatArray, list[tuple[int, int]]]:
    """Return soft labels [N] and the ranges [start, stop) whose discovery counts."""
    soft = np.zeros(size)
    half = w // 2
    left, right = (half, half) if variant == "tsb" else ((half, half - 1) if w > 1 else (0, 0))
    weight = np.sqrt(1.0 - np.arange(1, half + 1) / max(w, 1))
    for start, stop in events:
        before, after = min(left, start), min(right, size - stop)
        soft[start - before : start] += weight[:before][::-1]
        soft[stop : stop + after] += weight[:after]
    for start, stop in events:
        soft[start:stop] = 1.0
    soft = np.minimum(soft, 1.0)
    if variant == "2022":
        return soft, runs_of(soft > 0.0)
    ranges: list[tuple[int, int]] = []
    for start, stop in events:
        low, high = max(start - half, 0), min(stop + half, size)
        # joined unless b_i + h < a_{i+1} - h with inclusive ends
        if ranges and not ranges[-1][1] - 1 < start - half:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return soft, ranges


Sizes = tuple[int, float, int]


def _areas_tsb(
    hits: FloatArray, extra: FloatArray, alarmed: NDArray[np.int64], existence: FloatArray, sizes: Sizes
) -> tuple[float, float]:
    positives, _, size = sizes
    found = hits + extra
    widened = positives + extra / 2.0
    recall = np.minimum(found / widened, 1.0) * existence
    false_rate = (alarmed - found) / (size - widened)
    precision = found / alarmed
    return _under_roc(recall, false_rate), float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _areas_2022(
    hits: FloatArray, extra: FloatArray, alarmed: NDArray[np.int64], existence: FloatArray, sizes: Sizes
) -> tuple[float, float]:
    positives, soft, size = sizes
    found = hits + extra
    widened = positives + soft / 2.0
    recall = np.minimum(found / widened, 1.0) * existence
    false_rate = np.minimum((alarmed - found) / (size - widened), 1.0)
    precision = found / alarmed
    area = np.trapezoid(np.append(1.0, precision), np.append(0.0, recall))
    return _under_roc(recall, false_rate), float(area)


def _under_roc(recall: FloatArray, false_rate: FloatArray) -> float:
    y, x = np.concatenate(([0.0], recall, [1.0])), np.concatenate(([0.0], false_rate, [1.0]))
    return float(np.trapezoid(y, x))
