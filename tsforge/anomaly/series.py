"""Detection in one series: what is fitted on the rows before scoring, and what is found in the rows scored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.buckets import BucketScale, fit_buckets
from tsforge.anomaly.calibration import Calibration, fit_calibration
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.confirmed import left_out
from tsforge.anomaly.health import HEALTH_ROWS
from tsforge.anomaly.monitor import EventRow, Judged, Monitor, Waiting
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.rule_base import LEAD_ROWS
from tsforge.anomaly.scoring import ScoreModel, Scores, fit_score_model
from tsforge.anomaly.smoothing import build_smoother
from tsforge.anomaly.spans import SeriesSpans
from tsforge.anomaly.tables import ScoredRows
from tsforge.anomaly.thresholds import Decisions, ThresholdRule
from tsforge.core.errors import ConfigError, listing

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SeriesRows:
    """What is known of one series, from the first row after training to the last scored one.

    Shapes:
        deviations [T, K, V], values and expected [T, V]; the first row is absolute row ``start``. confirmed [T] marks
        rows that people confirmed as anomalous: judged, but nothing rests on them (never a scored one). buckets [T],
        where scores are compared within buckets. impossible [T, V] marks values that the network does not see: judged,
        but nothing else rests on them; None = none.
    """

    series_id: str
    start: int
    deviations: FloatArray
    values: FloatArray
    expected: FloatArray
    training: TrainingRange
    confirmed: NDArray[np.bool_]
    buckets: FloatArray | None = None
    impossible: NDArray[np.bool_] | None = None

    def possible(self, part: slice) -> tuple[FloatArray, FloatArray]:
        """Return deviations and values of some rows, NaN where impossible: what may be learnt from."""
        deviations, values = self.deviations[part], self.values[part]
        if self.impossible is None or not self.impossible[part].any():
            return deviations, values
        hidden = self.impossible[part]
        return np.where(hidden[:, None], np.nan, deviations), np.where(hidden, np.nan, values)


@dataclass(frozen=True, kw_only=True)
class SeriesResult:
    """Everything found in the scored rows of one series, the first of which is absolute row ``start``.

    Attributes:
        guarded: rows with values hidden from later forecasts, None where contexts are not guarded.
    """

    series_id: str
    start: int
    judged: Judged
    events: list[EventRow]
    spans: SeriesSpans
    calibration: Calibration
    buckets: BucketScale | None
    model: ScoreModel
    rule: ThresholdRule
    confirmed_left_out: dict[str, int]
    guarded: int | None = None

    @property
    def scored(self) -> ScoredRows:
        """The rows as ``score_table`` takes them."""
        return ScoredRows(series_id=self.series_id, start=self.start, judged=self.judged)

    @property
    def joint(self) -> FloatArray:
        """Joint scores [N]."""
        return self.judged.joint

    @property
    def decisions(self) -> Decisions:
        """What the rule said of each row."""
        return self.judged.decisions


def fit_monitor(
    rows: SeriesRows,
    spans: SeriesSpans,
    start: int,
    config: DetectConfig,
    new_rule: Callable[[], ThresholdRule],
    names: tuple[str, ...],
    *,
    recent: int = HEALTH_ROWS,
) -> Monitor:
    """Return a monitor of one series that has judged the rows just before absolute row ``start``, which comes next.

    Args:
        rows: deviations and values after training; those from ``start`` on are not read.
        spans: which of them scale and which calibrate.
        start: first row to score.
        config: everything else.
        new_rule: makes an unfitted threshold rule.
        names: of the variates.
        recent: rows that count for the health of the model.

    Raises:
        ConfigError: scores by bucket under a rule that promises no rate; a joint score of more variates than there are.
        DataError: too few residuals or calibration scores.
    """
    if config.score.top_k is not None and config.score.top_k > len(names):
        raise ConfigError(
            f"detector.score.top_k is {config.score.top_k}, and there are {len(names)} variates ({listing(names)}); "
            f"give 1 to {len(names)}"
        )
    scale = slice(spans.scale[0] - rows.start, spans.scale[1] - rows.start)
    normal = ~rows.confirmed[scale]
    deviations, values = rows.possible(scale)
    model = fit_score_model(deviations[normal], values[normal], rows.training, config.score)
    known = slice(spans.calibration[0] - rows.start, start - rows.start)
    confirmed = rows.confirmed[known]
    size = known.stop - known.start
    lead = min(LEAD_ROWS, size // 2)
    before = size - lead
    early, leading = slice(known.start, known.stop - lead), slice(known.stop - lead, known.stop)
    memory = model.memory()
    parts = [model.raw(*rows.possible(early), memory)]
    kept = copy.deepcopy(memory)  # of the monitor, which judges the leading rows again
    parts.append(model.raw(*rows.possible(leading), memory))
    scores = Scores(*(np.concatenate(each) for each in zip(*((p.z, p.joint) for p in parts), strict=True)))
    rule, smoother, settings = new_rule(), build_smoother(config.score), config.calibration
    joint, buckets = scores.joint, None
    if rows.buckets is not None:
        if rule.alpha is None:
            raise ConfigError(f"calibration.by has no effect with rule {rule.describe()}: it promises no alarm rate")
        buckets = fit_buckets(np.where(confirmed, np.nan, joint), rows.buckets[known], rule.alpha)
        joint = buckets.apply(joint, rows.buckets[known])
    judged, waiting = before, None
    if smoother is not None:
        smoother.fit(np.where(confirmed, np.nan, joint))
        smoothed = smoother.run(joint[:before])
        judged = smoothed.size
        joint = np.concatenate([smoothed, copy.deepcopy(smoother).run(joint[before:])])
        if smoother.latency:
            waits = slice(known.start + judged, known.start + before)
            waiting = Waiting(
                z=parts[0].z[judged:],
                values=rows.values[waits],
                expected=rows.expected[waits],
                confirmed=rows.confirmed[waits],
            )
        rule.latency = smoother.latency
    sample = np.where(confirmed[: joint.size], np.nan, joint)
    rule.fit(sample[:judged] if rule.learns else sample)  # first: where rows are too few, a rule that learns needs most
    calibration = fit_calibration(
        sample,
        method=settings.method,
        level=settings.tail_level,
        shape=settings.tail_shape,
        seed=settings.seed if settings.ties == "random" else None,
    )
    monitor = Monitor(
        series_id=rows.series_id,
        names=names,
        config=config.events,
        model=model,
        memory=kept,
        buckets=buckets,
        calibration=calibration,
        smoother=smoother,
        rule=rule,
        samples=_variate_samples(scores.z[~confirmed]) if config.keep_variate_scores else None,
        row=start - lead - (before - judged),
        start=start,
        recent=recent,
        waiting=waiting,
    )
    monitor.run(**_inputs(rows, leading), confirmed=rows.confirmed[leading])
    return monitor


def detect_series(
    rows: SeriesRows, spans: SeriesSpans, monitor: Monitor, start: int, config: DetectConfig
) -> SeriesResult:
    """Return scores and events of the rows from absolute row ``start`` on; the monitor is of ``fit_monitor``.

    The last rows of a score with latency are not judged yet: they end no event, as they end none in a stream.
    """
    first = start - rows.start
    complete = max(len(rows.values) - config.score.window_latency, first)
    before = max(start - monitor.row, 0)
    found = monitor.run(**_inputs(rows, slice(first, complete))).since(before)
    late = len(rows.values) - first - found.joint.size
    if late:
        waiting = Judged.nothing(len(monitor.names), late, by_variate=monitor.samples is not None)
        waiting = replace(waiting, values=rows.values[-late:], expected=rows.expected[-late:])
        found = Judged.join([found, waiting])
    return series_result(rows, spans, monitor, ScoredRows(series_id=rows.series_id, start=start, judged=found))


def series_result(
    rows: SeriesRows, spans: SeriesSpans, monitor: Monitor, scored: ScoredRows, *, guarded: int | None = None
) -> SeriesResult:
    """Return what was found in one series.

    Args:
        rows: at least those before the scored ones.
        spans: which of them scale and calibrate.
        monitor: that has judged the scored rows.
        scored: these.
        guarded: rows with values hidden from later forecasts, None where contexts are not guarded.
    """
    current, found, first = monitor.current(), scored.judged, scored.start - rows.start
    parts = {
        "scale": slice(spans.scale[0] - rows.start, spans.scale[1] - rows.start),
        "calibration": slice(spans.calibration[0] - rows.start, first),
    }
    usable = np.asarray((~np.isnan(rows.deviations)).any(axis=(1, 2)))
    return SeriesResult(
        series_id=rows.series_id,
        start=scored.start,
        judged=found,
        events=found.closed + ([] if current is None else [current]),
        spans=spans,
        calibration=monitor.calibration,
        buckets=monitor.buckets,
        model=monitor.model,
        rule=monitor.rule,
        confirmed_left_out=left_out(rows.confirmed, usable, parts),
        guarded=guarded,
    )


def _inputs(rows: SeriesRows, part: slice) -> dict[str, Any]:
    return {
        "deviations": rows.deviations[part],
        "values": rows.values[part],
        "buckets": None if rows.buckets is None else rows.buckets[part],
        "expected": rows.expected[part],
        "impossible": None if rows.impossible is None else rows.impossible[part],
    }


def _variate_samples(z: FloatArray) -> tuple[FloatArray, ...]:
    """Return the sorted sizes of normal deviates of each variate, missing ones left out."""
    return tuple(np.sort(size[~np.isnan(size)]) for size in np.abs(z).T)
