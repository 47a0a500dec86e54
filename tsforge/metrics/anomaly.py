"""Grades of anomaly scores and alarms against labels, in float64.

Every metric says whether it takes ``scores`` (threshold-free) or ``predictions`` (alarms at a threshold chosen
elsewhere); metrics that look for the best threshold on the labels are called ``best_*``: no result of a detector.
An event is a maximal run of rows labelled 1. A missing score is NaN; every metric of scores refuses it unless told how
to treat it. Point adjustment is here for old tables only: a random score wins with it.

Legend: labels, scores and predictions [N], one a row of one series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Missing = Literal["refuse", "drop", "lowest"]


def runs_of(mask: ArrayLike) -> list[tuple[int, int]]:
    """Return [start, stop) of every maximal run of true rows."""
    flags = np.asarray(mask, dtype=bool)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def scored_rows(
    labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse"
) -> tuple[BoolArray, FloatArray, BoolArray]:
    """Return labels and scores of all rows, and which of them a metric counts.

    Args:
        labels: [N] of 0 and 1. scores: [N], larger = stranger.
        missing: what a missing score (NaN) is: an error (``refuse``), a row that is not counted (``drop``), or the
            lowest score of all (``lowest``). State it, and how many rows it concerns.

    Returns:
        labels [N], scores [N] (minus infinity where missing), counted [N].

    Raises:
        ConfigError: an unknown ``missing``.
        DataError: different lengths, labels other than 0 and 1, no counted row of one kind, or missing scores to be
            refused.
    """
    y, s = _flags(labels, "labels"), np.asarray(scores, dtype=np.float64).ravel()
    if y.size != s.size:
        raise DataError(f"{y.size} labels but {s.size} scores; they must be of the same rows")
    if missing not in ("refuse", "drop", "lowest"):
        raise ConfigError(f"missing is {missing!r}; there are 'refuse', 'drop' and 'lowest'")
    absent = np.isnan(s)
    if absent.any():
        if missing == "refuse":
            raise DataError(
                f"{int(absent.sum())} of {s.size} scores are missing; say missing='drop' or 'lowest' and report it"
            )
        s = np.where(absent, -np.inf, s)
    counted = ~absent if missing == "drop" else np.ones(s.size, dtype=bool)
    if not y[counted].any() or y[counted].all():
        raise DataError(
            f"{int(y[counted].sum())} of {int(counted.sum())} rows are labelled anomalous; "
            "a metric needs rows of both kinds"
        )
    return y, s, counted


def labelled_scores(
    labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse"
) -> tuple[BoolArray, FloatArray]:
    """Return labels and scores of the rows that count, ready for a metric; see ``scored_rows``."""
    y, s, counted = scored_rows(labels, scores, missing=missing)
    return y[counted], s[counted]


def auc_pr(labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse") -> float:
    """Return average precision ``sum_j (R_j - R_{j-1}) P_j`` over the distinct thresholds (step-wise, ties together).

    Threshold-free. The trapezoid under the same points would be optimistic. Chance level: the share of anomalous rows.

    Raises:
        ConfigError, DataError: see ``scored_rows``.
    """
    y, s = labelled_scores(labels, scores, missing=missing)
    hits, alarms = _counts(y, s)
    return float(np.sum(np.diff(hits, prepend=0) / y.sum() * (hits / alarms)))


def auc_roc(labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse") -> float:
    """Return the probability that an anomalous row scores higher than a normal one, ties counting half.

    Threshold-free. Chance level: 0.5.

    Raises:
        ConfigError, DataError: see ``scored_rows``.
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


def best_f1(labels: ArrayLike, scores: ArrayLike, *, missing: Missing = "refuse") -> BestF1:
    """Return the largest point F1 over all thresholds: an oracle, it reads the labels.

    Raises:
        ConfigError, DataError: see ``scored_rows``.
    """
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
    """Return point-wise precision, recall and F1 of predictions.

    Raises:
        DataError: see ``label_pair``.
    """
    y, p = label_pair(labels, predictions)
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

    Raises:
        DataError: see ``label_pair``.
    """
    y, p = label_pair(labels, predictions)
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
        f1=harmonic_mean(penalised, recall),
        composite_f1=harmonic_mean(point_precision, recall),
    )


def detection_delays(labels: ArrayLike, predictions: ArrayLike, *, lead: int = 0) -> FloatArray:
    """Return, for every event [E], rows from its start to the first alarm inside it; NaN where it was missed.

    Args:
        lead: an alarm up to so many rows before the start, but after the event before, counts as delay 0 (an early
            warning); state it when used.

    Raises:
        ConfigError: negative lead.
        DataError: different lengths, or values other than 0 and 1.
    """
    if lead < 0:
        raise ConfigError(f"lead is {lead}; it counts rows before an event and must not be negative")
    y, p = label_pair(labels, predictions)
    delays, earlier = [], 0
    for start, stop in runs_of(y):
        first = np.flatnonzero(p[max(start - lead, earlier) : stop])
        delays.append(max(float(first[0]) + max(start - lead, earlier) - start, 0.0) if first.size else np.nan)
        earlier = stop
    return np.array(delays, dtype=np.float64)


@dataclass(frozen=True)
class DelaySummary:
    """Median rows until the first alarm over the detected events (NaN without any), their share, and the lead used."""

    median: float
    detected: float
    lead: int


def delay_summary(labels: ArrayLike, predictions: ArrayLike, *, lead: int = 0) -> DelaySummary:
    """Return how late events were detected and how many; the median alone favours a detector that misses the hard ones.

    Raises:
        ConfigError, DataError: no labelled event, or see ``detection_delays``.
    """
    delays = detection_delays(labels, predictions, lead=lead)
    if not delays.size:
        raise DataError("there is no labelled event; a delay is undefined")
    seen = delays[~np.isnan(delays)]
    return DelaySummary(float(np.median(seen)) if seen.size else float("nan"), seen.size / delays.size, lead)


def point_adjust(labels: ArrayLike, predictions: ArrayLike, *, percent: float = 0.0) -> BoolArray:
    """Return predictions in which an event with more than ``percent`` % of its rows predicted counts as all predicted.

    For comparison with old tables only, never a headline: with percent 0 a uniform random score reaches 0.98 on PSM.

    Source: Xu et al. (2018) for 0, Kim et al. (AAAI 2022) for PA%K.

    Raises:
        DataError: see ``label_pair``.
    """
    y, p = label_pair(labels, predictions)
    out = p.copy()
    for start, stop in runs_of(y):
        out[start:stop] |= 100 * int(p[start:stop].sum()) > percent * (stop - start)
    return out


@dataclass(frozen=True)
class AdjustedF1:
    """Point-adjusted F1 of a score, never without that of a random one.

    Attributes:
        percents: K of PA%K; 0 is plain point adjustment, 100 none.
        f1: [K] the largest F1 over all thresholds at each. random: [K] the same of a uniform random score.
        threshold_rule: how thresholds were found: on the labels of the graded rows.
    """

    percents: tuple[float, ...]
    f1: tuple[float, ...]
    random: tuple[float, ...]
    threshold_rule: str = "best over all thresholds, chosen on the labels"

    def __str__(self) -> str:
        """Return one line a percentage."""
        rows = zip(self.percents, self.f1, self.random, strict=True)
        lines = [f"PA%{k:g}: {f1:.3f} (random score: {chance:.3f})" for k, f1, chance in rows]
        return "\n".join([*lines, f"threshold: {self.threshold_rule}"])


PERCENTS = (0.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0)


def best_adjusted_f1(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    percents: Sequence[float] = PERCENTS,
    missing: Missing = "refuse",
    seed: int = 0,
) -> AdjustedF1:
    """Return the largest point-adjusted F1 over all thresholds for each percentage, with a random score's beside it.

    For old tables only; see ``point_adjust``. An oracle, it reads the labels.

    Args:
        seed: of the random score.

    Raises:
        ConfigError: a percentage outside [0, 100].
        DataError: see ``labelled_scores``.
    """
    wrong = [percent for percent in percents if not 0.0 <= percent <= 100.0]
    if wrong:
        raise ConfigError(f"percents {wrong} lie outside [0, 100]")
    y, s = labelled_scores(labels, scores, missing=missing)
    random = np.random.default_rng(seed).uniform(size=s.size)
    found, chance = (_adjusted_f1(y, values, percents) for values in (s, random))
    return AdjustedF1(tuple(float(percent) for percent in percents), found, chance)


def _adjusted_f1(y: BoolArray, s: FloatArray, percents: Sequence[float]) -> tuple[float, ...]:
    """Return the largest adjusted F1 for each percentage, from the counts of alarmed rows at every distinct score."""
    thresholds = _distinct(s)
    gained = np.zeros((len(percents), thresholds.size))
    limits = np.array(percents, dtype=np.float64)[:, None]
    for start, stop in runs_of(y):
        inside = np.sort(s[start:stop])
        alarmed = inside.size - np.searchsorted(inside, thresholds, side="left")
        gained += np.where(100 * alarmed > limits * inside.size, inside.size, alarmed)
    ordered = np.sort(s[~y])
    false = ordered.size - np.searchsorted(ordered, thresholds, side="left")
    return tuple(np.max(2.0 * gained / (gained + false + y.sum()), axis=1).tolist())


def hit_rate(ranked: Sequence[Sequence[str]], expected: Sequence[Sequence[str]], *, percent: float = 100.0) -> float:
    """Return HitRate@P%: the mean of ``hit_share`` over all events, also undetected ones (give those an empty ranking).

    Chance: ``hit_rate_chance``.

    Raises:
        DataError: not one ranking an event, no event, or an event without expected variates.
    """
    if len(ranked) != len(expected) or not expected:
        raise DataError(f"{len(ranked)} rankings for {len(expected)} events; give one for each of at least one event")
    return float(
        np.mean([hit_share(order, wanted, percent=percent) for order, wanted in zip(ranked, expected, strict=True)])
    )


def hit_share(ranked: Sequence[str], expected: Sequence[str], *, percent: float = 100.0) -> float:
    """Return the share of an event's expected variates G among its first ``floor(P |G| / 100)`` ranked.

    Source: Su et al. (2019), InterFusion's ``cal_IPS``.

    Raises:
        DataError: no expected variate.
    """
    wanted = set(expected)
    if not wanted:
        raise DataError("an event without expected variates cannot be graded; leave it out")
    return len(wanted.intersection(ranked[: int(percent * len(wanted) // 100)])) / len(wanted)


def hit_rate_chance(expected: Sequence[Sequence[str]], num_variates: int, *, percent: float = 100.0) -> float:
    """Return the expected HitRate@P% of variates in random order; at 100 % the mean of |G| / V.

    Raises:
        DataError: no event, or more expected variates in one than there are.
    """
    sizes = [len(set(wanted)) for wanted in expected]
    if not sizes or max(sizes) > num_variates:
        raise DataError(f"{len(sizes)} events with up to {max(sizes, default=0)} of {num_variates} variates expected")
    return float(np.mean([min(percent * size // 100, num_variates) / num_variates for size in sizes]))


def _flags(values: ArrayLike, what: str) -> BoolArray:
    raw = np.asarray(values).ravel()
    if raw.dtype != np.bool_ and not np.isin(raw, (0, 1)).all():
        raise DataError(f"{what} must be 0 or 1, found {np.unique(raw[~np.isin(raw, (0, 1))])[:3].tolist()}")
    return raw.astype(bool)


def label_pair(labels: ArrayLike, predictions: ArrayLike) -> tuple[BoolArray, BoolArray]:
    """Return labels and predictions [N] as flags.

    Raises:
        DataError: different lengths, or values other than 0 and 1.
    """
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


def harmonic_mean(a: float, b: float) -> float:
    """Return the harmonic mean of two shares, 0 if both are."""
    return 0.0 if a == 0.0 and b == 0.0 else 2.0 * a * b / (a + b)
