"""Volume under the surface: AUC-ROC and AUC-PR with soft borders around events, averaged over the border's width.

Two definitions in use give different numbers for the same input; both are here and a result always names its own.

Source: Paparrizos et al. (PVLDB 2022); ``tsb`` as in the TSB-AD leaderboard, ``2022`` as in ``aeon``.
Legend: w buffer width, h = w // 2 rows on each side, b soft label, A alarmed event rows, B alarmed soft label outside.

Between two thresholds at which rows in or near an event are added, only normal rows are: A, B and the found ranges
stand still and the curves move along a straight line. So the curves need one point a distinct score of the rows near
events, and the point just before it, however many other rows there are. These rows are the same for all widths and are
ordered once; after that a width costs sums over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import BoolArray, Missing, runs_of, scored_rows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
REFERENCE_THRESHOLDS = 250
WIDTH_ROWS, WIDTH_LAGS, WIDTH_FIRST, WIDTH_SPAN, WIDTH_FALLBACK = 20_000, 400, 3, (3, 300), 125
Variant = Literal["tsb", "2022"]
Thresholds = Literal["reference", "exact"]


@dataclass(frozen=True)
class Vus:
    """Mean areas over widths 0 .. ``width``; they mean nothing without width, variant and a random score's value."""

    roc: float
    pr: float
    width: int
    variant: Variant
    thresholds: Thresholds


def vus(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    width: int = 100,
    variant: Variant = "tsb",
    thresholds: Thresholds = "exact",
    missing: Missing = "refuse",
) -> Vus:
    """Return VUS-ROC and VUS-PR. Threshold-free.

    Args:
        labels, scores: [N].
        width: largest buffer W; the chance level depends on it.
        variant: which definition.
        thresholds: ``exact`` uses every distinct score; ``reference`` the 250 quantiles of the published code, which
            distort data with short events (a perfect detector of one 50-row event in 100,000 rows gets 0.142).
        missing: what a missing score is, see ``scored_rows``. Dropped rows count nowhere but keep their place in
            time: rows on both sides of a gap do not become neighbours.

    Raises:
        ConfigError: negative width, unknown variant or unknown kind of thresholds.
        DataError: see ``scored_rows``.
    """
    if width < 0:
        raise ConfigError(f"width is {width}; the buffer must not be negative")
    if variant not in ("tsb", "2022") or thresholds not in ("exact", "reference"):
        raise ConfigError(
            f"variant {variant!r}, thresholds {thresholds!r}; there are 'tsb' and '2022', 'exact' and 'reference'"
        )
    y, s, counted = scored_rows(labels, scores, missing=missing)
    near = _near_rows(y, s, counted, width // 2, variant)
    curve = _curve(near, np.sort(s[counted]), thresholds)
    total = np.zeros(2)
    for half in range(width // 2 + 1):
        existence = near.existence(half, curve.num_near)
        for w in range(2 * half, min(2 * half + 1, width) + 1):
            soft = np.append(0.0, np.cumsum(near.soft_labels(w)))[curve.num_near]
            total += _areas(curve, soft, existence, variant)
    roc, pr = total / (width + 1)
    return Vus(float(roc), float(pr), width, variant, thresholds)


def leaderboard_width(values: ArrayLike) -> int:
    """Return the W that TSB-AD takes for a series: the lag of the highest peak of its autocorrelation.

    It looks at the graded series itself: acceptable for a metric, but print it with the number.

    Args:
        values: [N] the first variate of the graded series; its first 20,000 rows count.

    Returns:
        a lag from 6 to 303, or 125 where no lag up to 400 is a peak or the highest one is out of that span.

    Raises:
        DataError: missing or infinite values, or more than one variate.

    Source: TSB-AD, ``utils/slidingWindows.py``; autocovariances divided by N at every lag.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise DataError(f"a width needs one variate [N] without missing or infinite values, given shape {x.shape}")
    x = x[:WIDTH_ROWS]
    if x.size <= WIDTH_FIRST + 2 or x.min() == x.max():
        return WIDTH_FALLBACK
    spectrum = np.fft.rfft(x - x.mean(), 1 << (2 * x.size).bit_length())
    covariance = np.fft.irfft(np.abs(spectrum) ** 2)[: min(WIDTH_LAGS + 1, x.size)]
    late = covariance[WIDTH_FIRST:]
    peaks = np.flatnonzero((late[1:-1] > late[:-2]) & (late[1:-1] > late[2:])) + 1
    if not peaks.size:
        return WIDTH_FALLBACK
    highest = int(peaks[np.argmax(late[peaks])])
    return highest + WIDTH_FIRST if WIDTH_SPAN[0] <= highest <= WIDTH_SPAN[1] else WIDTH_FALLBACK


@dataclass(frozen=True)
class _NearRows:
    """The M counted rows in events or within the largest buffer; a row's rank is its place among them, strangest first.

    Attributes:
        scores, is_event: [M], by rank.
        entry_rank, entry_distance, entry_half: [T], one entry an event, side and distance d: the row there that belongs
            to no event, and the smallest h whose buffer reaches it; ordered by h.
        gaps: [E-1] normal rows between neighbouring events.
        best: [H+1, E] smallest rank in an event widened by h rows on each side; M where no row of it is counted.
    """

    scores: FloatArray
    is_event: BoolArray
    entry_rank: IntArray
    entry_distance: IntArray
    entry_half: IntArray
    gaps: IntArray
    best: IntArray

    def soft_labels(self, w: int) -> FloatArray:
        """Return [M] soft labels outside events, 0 inside."""
        size = self.scores.size
        count = int(np.searchsorted(self.entry_half, w // 2, side="right"))
        if not count:
            return np.zeros(size)
        weight = np.sqrt(1.0 - np.arange(w // 2 + 1) / w)
        soft = np.bincount(self.entry_rank[:count], weights=weight[self.entry_distance[:count]], minlength=size)
        return np.minimum(soft, 1.0)

    def existence(self, half: int, num_near: IntArray) -> FloatArray:
        """Return the share of merged ranges that have one of the first ``num_near`` rows, for each entry of it."""
        # ranges meet when fewer than 2 h rows lie between: in "tsb" they must overlap, in "2022", where the right side
        # is one row shorter, touch
        firsts = np.flatnonzero(np.append(True, self.gaps >= 2 * half))
        peaks = np.sort(np.minimum.reduceat(self.best[half], firsts))
        peaks = peaks[peaks < self.scores.size]
        return np.searchsorted(peaks, num_near, side="left") / peaks.size


def _near_rows(y: BoolArray, scores: FloatArray, counted: BoolArray, largest: int, variant: Variant) -> _NearRows:
    bounds = np.array(runs_of(y), dtype=np.int64)
    starts, stops = bounds[:, 0], bounds[:, 1]
    distance = np.arange(1, largest + 1)
    # a side of an event: rows from its border outwards [E, H], and how much larger h must be than the distance
    sides = ((starts[:, None] - distance, 0), (stops[:, None] - 1 + distance, 0 if variant == "tsb" else 1))
    usable = [(rows >= 0) & (rows < y.size) for rows, _ in sides]
    for mask, (rows, _) in zip(usable, sides, strict=True):
        mask[mask] = (counted & ~y)[rows[mask]]
    near = y & counted
    for mask, (rows, _) in zip(usable, sides, strict=True):
        near[rows[mask]] = True
    index = np.flatnonzero(near)
    index = index[np.argsort(-scores[index], kind="stable")]
    rank = np.full(y.size, index.size)
    rank[index] = np.arange(index.size)

    best = np.empty((largest + 1, starts.size), dtype=np.int64)
    best[:] = np.minimum.reduceat(np.append(rank, index.size), bounds.ravel())[::2]
    entries = []
    for mask, (rows, late) in zip(usable, sides, strict=True):
        ranks = np.full(rows.shape, index.size)
        ranks[mask] = rank[rows[mask]]
        reach = np.minimum.accumulate(ranks, axis=1).T[: max(largest - late, 0)]
        best[1 + late :] = np.minimum(best[1 + late :], reach)
        distances = np.broadcast_to(distance, rows.shape)[mask]
        entries.append((ranks[mask], distances, distances + late))
    entry_rank, entry_distance, entry_half = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    order = np.argsort(entry_half, kind="stable")
    return _NearRows(
        scores=scores[index],
        is_event=y[index],
        entry_rank=entry_rank[order],
        entry_distance=entry_distance[order],
        entry_half=entry_half[order],
        gaps=starts[1:] - stops[:-1],
        best=best,
    )


@dataclass(frozen=True)
class _Curve:
    """What all widths share at the L thresholds; entry 0 is before the first alarm.

    Attributes:
        alarmed, num_near, hits: [L+1] rows, near rows and event rows with an alarm.
        before: [L] rows alarmed at the threshold just above, when nothing near an event has been added yet.
        size: rows.
    """

    alarmed: IntArray
    num_near: IntArray
    hits: FloatArray
    before: IntArray
    size: int


def _curve(near: _NearRows, ascending: FloatArray, thresholds: Thresholds) -> _Curve:
    size = ascending.size
    if thresholds == "reference":
        levels = ascending[::-1][np.linspace(0, size - 1, REFERENCE_THRESHOLDS).astype(np.int64)]
        num_near = near.scores.size - np.searchsorted(near.scores[::-1], levels, side="left")
    else:
        num_near = np.flatnonzero(np.append(near.scores[1:] != near.scores[:-1], True)) + 1
        levels = near.scores[num_near - 1]
    alarmed = np.append(0, size - np.searchsorted(ascending, levels, side="left"))
    num_near = np.append(0, num_near)
    return _Curve(
        alarmed=alarmed,
        num_near=num_near,
        hits=np.append(0.0, np.cumsum(near.is_event, dtype=np.float64))[num_near],
        before=alarmed[:-1] if thresholds == "reference" else size - np.searchsorted(ascending, levels, side="right"),
        size=size,
    )


def _areas(curve: _Curve, soft: FloatArray, existence: FloatArray, variant: Variant) -> tuple[float, float]:
    """Return the areas under ROC and PR for one width from the alarmed soft label outside events [L+1]."""
    found = curve.hits + soft
    widened = curve.hits[-1] + (soft if variant == "tsb" else soft[-1]) / 2.0
    recall = np.minimum(found / widened, 1.0) * existence
    normal = np.broadcast_to(curve.size - widened, recall.shape)
    false_rate = (curve.alarmed - found) / normal
    ahead = (curve.before - found[:-1]) / normal[:-1]
    gain, level = np.diff(recall), recall[:-1]
    # sums of products, not inner products: those of long vectors start threads
    roc = float(np.sum(level * np.diff(false_rate)) + np.sum(gain * (false_rate[1:] - ahead)) / 2.0)
    end = float((curve.size - found[-1]) / normal[-1])
    roc += float(recall[-1]) * (end - float(false_rate[-1])) + (1.0 + float(recall[-1])) / 2.0 * (1.0 - end)
    precision = found[1:] / curve.alarmed[1:]
    if variant == "tsb":
        return roc, float(np.sum(gain * precision))
    earlier = np.divide(found[:-1], curve.before, out=np.ones_like(precision), where=curve.before > 0)
    return roc, float(np.sum(gain * (precision + earlier))) / 2.0
