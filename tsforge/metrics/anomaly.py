"""Grades of anomaly scores and alarms against labels, in float64.

Every metric says whether it takes ``scores`` (threshold-free) or ``predictions`` (alarms at a threshold chosen
elsewhere); metrics that look for the best threshold on the labels are called ``best_*``: no result of a detector.
An event is a maximal run of rows labelled 1. Point adjustment is here for old tables only: a random score wins with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def runs_of(mask: ArrayLike) -> list[tuple[int, int]]:
    """Return [start, stop) of every maximal run of true rows."""
    flags = np.asarray(mask, dtype=bool)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def labelled_scores(
    labels: ArrayLike, scores: ArrayLike, *, missing: Literal["refuse", "drop", "lowest"] = "refuse"
) -> tuple[BoolArray, FloatArray]:
    """Return labels and scores ready for a metric.

    Args:
        labels: [N] of 0 and 1. scores: [N], larger = stranger.
        missing: what a missing score (NaN) is: an error, a row left out, or the lowest score of all.

    Raises:
        DataError: different lengths, labels other than 0 and 1, no row of one kind, or missing scores to be refused.
    """
    y, s = _flags(labels, "labels"), np.asarray(scores, dtype=np.float64).ravel()
    if y.size != s.size:
        raise DataError(f"{y.size} labels but {s.size} scores; they must be of the same rows")
    absent = np.isnan(s)
    if absent.any():
        if missing == "refuse":
            raise DataError(
                f"{int(absent.sum())} of {s.size} scores are missing; say missing='drop' or 'lowest' and report it"
            )
        if missing == "drop":
            y, s = y[~absent], s[~absent]
        else:
            s = np.where(absent, -np.inf, s)
    if not y.any() or y.all():
        raise DataError(f"{int(y.sum())} of {y.size} rows are labelled anomalous; a metric needs rows of both kinds")
    return y, s


def auc_pr(labels: ArrayLike, scores: ArrayLike, *, missing: Literal["refuse", "drop", "lowest"] = "refuse") -> float:
    """Return average precision ``sum_j (R_j - R_{j-1}) P_j`` over the distinct thresholds (step-wise, ties together).

    Threshold-free. The trapezoid under the same points would be optimistic. Chance level: the share of anomalous rows.
    """
    y, s = labelled_scores(labels, scores, missing=missing)
    hits, alarms = _counts(y, s)
    return float(np.sum(np.diff(hits, prepend=0) / y.sum() * (hits / alarms)))


def auc_roc(labels: ArrayLike, scores: ArrayLike, *, missing: Literal["refuse", "drop", "lowest"] = "refuse") -> float:
    """Return the probability that an anomalous row scores higher than a normal one, ties counting half.

    Threshold-free. Chance level: 0.5.
    """
    y, s = labelled_scores(labels, scores, missing=missing)
    hits, alarms = _counts(y, s)
    recall = np.concatenate(([0.0], hits / y.sum()))
    false_rate = np.concatenate(([0.0], (alarms - hits) / (~y).sum()))
    return float(np.trapezoid(recall, false_rate))


@dataclass(frozen=True)
class BestF1:
    """The largest point F1 over all thresholds, and the threshold (alarm if score >= it) that gives it."""

    f1: float
    threshold: float


def best_f1(labels: ArrayLike, scores: ArrayLike, *, missing: Literal["refuse", "drop", "lowest"] = "refuse") -> BestF1:
    """Return the largest point F1 over all thresholds: an oracle, it reads the labels."""
    y, s = labelled_scores(labels, scores, missing=missing)
    hits, alarms = _counts(y, s)
    f1 = 2.0 * hits / (alarms + y.sum())
    best = int(np.argmax(f1))
    return BestF1(float(f1[best]), float(_distinct(s)[best]))


@dataclass(frozen=True)
class PointScore:
    """Point-wise precision, recall and their harmonic mean; precision is NaN without any alarm."""

    precision: float
    recall: float
    f1: float


def point_score(labels: ArrayLike, predictions: ArrayLike) -> PointScore:
    """Return point-wise precision, recall and F1 of predictions."""
    y, p = _pair(labels, predictions)
    hits = int((y & p).sum())
    return PointScore(_share(hits, int(p.sum())), _share(hits, int(y.sum())), _share(2 * hits, int(p.sum() + y.sum())))


@dataclass(frozen=True)
class EventScore:
    """Grades by events: how many were found, how many alarms were for nothing.

    Attributes:
        num_events, found: labelled events, and those overlapped by a predicted segment.
        num_segments, false_segments: predicted segments, and those overlapping no event.
        precision, recall: ``found / (found + false_segments)`` and ``found / num_events``.
        penalised_precision: precision times the share of normal rows without an alarm; a detector that always alarms
            makes one segment over everything, whose plain precision is 1.
        f1: harmonic mean of penalised precision and recall. composite_f1: of event recall and point precision.
    """

    num_events: int
    found: int
    num_segments: int
    false_segments: int
    precision: float
    recall: float
    penalised_precision: float
    f1: float
    composite_f1: float


def event_score(labels: ArrayLike, predictions: ArrayLike) -> EventScore:
    """Return event-wise precision and recall of predictions; NaN where a share has nothing to be of.

    Source: penalty after El Amine Sehili and Zhang (2023) as in ``dtaianomaly``; composite F1 of Garg et al. (2021).
    """
    y, p = _pair(labels, predictions)
    events, segments = runs_of(y), runs_of(p)
    found = sum(bool(p[a:b].any()) for a, b in events)
    false = sum(not y[a:b].any() for a, b in segments)
    precision, recall = _share(found, found + false), _share(found, len(events))
    normal = int((~y).sum())
    penalised = precision * (1.0 - _share(int((p & ~y).sum()), normal) if normal else 1.0)
    point_precision = _share(int((p & y).sum()), int(p.sum()))
    return EventScore(
        num_events=len(events),
        found=found,
        num_segments=len(segments),
        false_segments=false,
        precision=precision,
        recall=recall,
        penalised_precision=penalised,
        f1=_harmonic(penalised, recall),
        composite_f1=_harmonic(point_precision, recall),
    )


def detection_delays(labels: ArrayLike, predictions: ArrayLike, *, lead: int = 0) -> FloatArray:
    """Return, for every event, rows from its start to the first alarm inside it; NaN where it was missed.

    Args:
        lead: an alarm up to so many rows before the start counts as delay 0 (an early warning); state it when used.
    """
    y, p = _pair(labels, predictions)
    delays = []
    for start, stop in runs_of(y):
        first = np.flatnonzero(p[max(start - lead, 0) : stop])
        delays.append(max(float(first[0]) - min(lead, start), 0.0) if first.size else np.nan)
    return np.array(delays, dtype=np.float64)


def point_adjust(labels: ArrayLike, predictions: ArrayLike, *, percent: float = 0.0) -> BoolArray:
    """Return predictions in which an event with more than ``percent`` % of its rows predicted counts as all predicted.

    For comparison with old tables only, never a headline: with percent 0 a uniform random score reaches 0.98 on PSM.

    Source: Xu et al. (2018) for 0, Kim et al. (AAAI 2022) for PA%K.
    """
    y, p = _pair(labels, predictions)
    out = p.copy()
    for start, stop in runs_of(y):
        out[start:stop] |= 100.0 * p[start:stop].mean() > percent
    return out


def best_adjusted_f1(labels: ArrayLike, scores: ArrayLike, *, percent: float = 0.0) -> float:
    """Return the largest point-adjusted F1 over all thresholds (alarm if score >= threshold); see ``point_adjust``."""
    y, s = labelled_scores(labels, scores)
    thresholds = _distinct(s)
    gained = np.zeros(thresholds.size)
    for start, stop in runs_of(y):
        inside = np.sort(s[start:stop])
        alarmed = inside.size - np.searchsorted(inside, thresholds, side="left")
        gained += np.where(100.0 * alarmed / inside.size > percent, inside.size, alarmed)
    ordered = np.sort(s[~y])
    false = ordered.size - np.searchsorted(ordered, thresholds, side="left")
    return float(np.max(2.0 * gained / (gained + false + y.sum())))


def hit_rate(ranked: Sequence[Sequence[str]], expected: Sequence[Sequence[str]], *, percent: float = 100.0) -> float:
    """Return HitRate@P%: the share of an event's expected variates G among its first ``floor(P |G| / 100)`` ranked.

    Averaged over all events, also undetected ones (give those an empty ranking). Chance level: mean of |G| / V.

    Source: Su et al. (2019), InterFusion's ``cal_IPS``.
    """
    if len(ranked) != len(expected) or not expected:
        raise DataError(f"{len(ranked)} rankings for {len(expected)} events; give one for each of at least one event")
    shares = []
    for order, wanted in zip(ranked, expected, strict=True):
        if not wanted:
            raise DataError("an event without expected variates cannot be graded; leave it out")
        top = set(order[: int(percent / 100.0 * len(set(wanted)))])
        shares.append(len(top & set(wanted)) / len(set(wanted)))
    return float(np.mean(shares))


def _flags(values: ArrayLike, what: str) -> BoolArray:
    raw = np.asarray(values).ravel()
    if raw.dtype != np.bool_ and not np.isin(raw, (0, 1)).all():
        raise DataError(f"{what} must be 0 or 1, found {np.unique(raw[~np.isin(raw, (0, 1))])[:3].tolist()}")
    return raw.astype(bool)


def _pair(labels: ArrayLike, predictions: ArrayLike) -> tuple[BoolArray, BoolArray]:
    y, p = _flags(labels, "labels"), _flags(predictions, "predictions")
    if y.size != p.size:
        raise DataError(f"{y.size} labels but {p.size} predictions; they must be of the same rows")
    return y, p


def _distinct(scores: FloatArray) -> FloatArray:
    return np.unique(scores)[::-1]


def _counts(labels: BoolArray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return anomalous rows and all rows at or above each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return np.cumsum(labels[order], dtype=np.float64)[last], (last + 1).astype(np.float64)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _harmonic(a: float, b: float) -> float:
    return 0.0 if a == 0.0 and b == 0.0 else 2.0 * a * b / (a + b)
