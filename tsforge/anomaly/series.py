"""Detection in one series: score model, calibration, rule and events from its deviations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.attribution import contributions, leading_variates, rank_variates
from tsforge.anomaly.calibration import Calibration, conformal_p_values, fit_calibration
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.scoring import ScoreModel, Scores, fit_score_model
from tsforge.anomaly.segments import Segment, find_segments, mark_continuations
from tsforge.anomaly.spans import SeriesSpans
from tsforge.anomaly.thresholds import Decisions, ThresholdRule

FloatArray = NDArray[np.float64]
LEAD_ROWS = 1_000  # rows before the scored ones that are judged too, so that an event under way keeps its start and id


@dataclass(frozen=True, kw_only=True)
class SeriesRows:
    """What is known of one series, from the first row after training to the last scored one.

    Shapes:
        deviations [T, K, V], values and expected [T, V]; the first row is absolute row ``start``.
    """

    series_id: str
    start: int
    deviations: FloatArray
    values: FloatArray
    expected: FloatArray
    training: TrainingRange


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """One event in absolute rows, with its ranked variates; ``continues`` = position of the event it goes on with."""

    segment: Segment
    peak_score: float
    p_value: float
    threshold: float
    variates: list[dict[str, Any]]
    continues: int | None


@dataclass(frozen=True, kw_only=True)
class SeriesResult:
    """Everything found in the scored rows of one series, the first of which is absolute row ``start``.

    Shapes:
        joint, p_values [N]; z, variate_p_values, values, expected [N, V].
    """

    series_id: str
    start: int
    joint: FloatArray
    z: FloatArray
    p_values: FloatArray
    variate_p_values: FloatArray
    decisions: Decisions
    values: FloatArray
    expected: FloatArray
    events: list[EventRow]
    spans: SeriesSpans
    calibration: Calibration
    model: ScoreModel
    rule: ThresholdRule


def detect_series(
    rows: SeriesRows,
    spans: SeriesSpans,
    start: int,
    config: DetectConfig,
    new_rule: Callable[[], ThresholdRule],
    names: tuple[str, ...],
) -> SeriesResult:
    """Return scores and events of the rows from absolute row ``start`` on.

    Args:
        rows: deviations and values after training.
        spans: which of them scale and which calibrate.
        start: first row to score.
        config: everything else.
        new_rule: makes an unfitted threshold rule.
        names: of the variates.
    """
    scale = slice(spans.scale[0] - rows.start, spans.scale[1] - rows.start)
    model = fit_score_model(rows.deviations[scale], rows.values[scale], rows.training, config.score)
    first = spans.calibration[0] - rows.start
    scores = model.score(rows.deviations[first:], rows.values[first:])
    known = start - spans.calibration[0]
    settings = config.calibration
    calibration = fit_calibration(
        scores.joint[:known], method=settings.method, level=settings.tail_level, shape=settings.tail_shape
    )
    rule = new_rule()
    lead = min(LEAD_ROWS, known // 2)
    rule.fit(scores.joint[: known - lead] if rule.learns else scores.joint[:known])
    judged = Scores(scores.z[known - lead :], scores.joint[known - lead :])
    decisions = rule.run(judged.joint)
    p_values = calibration.p_values(judged.joint)
    segments = [found for found in find_segments(judged.joint, decisions, config.events) if found.end >= lead]
    events = _events(segments, judged, p_values, decisions, model, config, names)
    return SeriesResult(
        series_id=rows.series_id,
        start=start,
        joint=judged.joint[lead:],
        z=judged.z[lead:],
        p_values=p_values[lead:],
        variate_p_values=_variate_p_values(scores.z, known),
        decisions=Decisions(decisions.alarm[lead:], decisions.threshold[lead:], decisions.low[lead:]),
        values=rows.values[first + known :],
        expected=rows.expected[first + known :],
        events=[_shifted(event, start - lead) for event in events],
        spans=spans,
        calibration=calibration,
        model=model,
        rule=rule,
    )


def _events(
    segments: list[Segment],
    judged: Scores,
    p_values: FloatArray,
    decisions: Decisions,
    model: ScoreModel,
    config: DetectConfig,
    names: tuple[str, ...],
) -> list[EventRow]:
    ranked = []
    for segment in segments:
        parts = contributions(judged.z[segment.start : segment.end + 1], model.covariance, model.constant)
        ranked.append(rank_variates(names, parts, segment.peak - segment.start, limit=config.events.ranked_variates))
    origins = mark_continuations(segments, [leading_variates(found) for found in ranked], config.events.cooldown)
    return [
        EventRow(
            segment=segment,
            peak_score=float(judged.joint[segment.peak]),
            p_value=float(np.nanmin(p_values[segment.start : segment.end + 1])),
            threshold=float(decisions.threshold[segment.peak]),
            variates=variates,
            continues=origin,
        )
        for segment, variates, origin in zip(segments, ranked, origins, strict=True)
    ]


def _shifted(event: EventRow, by: int) -> EventRow:
    found = event.segment
    moved = Segment(found.start + by, found.end + by, found.peak + by, found.is_open)
    return EventRow(**{**vars(event), "segment": moved})


def _variate_p_values(z: FloatArray, known: int) -> FloatArray:
    """Return the conformal p-value of |z| of every scored row and variate, by the rows before; NaN where unknown."""
    size = np.abs(z)
    out = np.full_like(size[known:], np.nan)
    for v in range(size.shape[1]):
        if (~np.isnan(size[:known, v])).any():
            out[:, v] = conformal_p_values(size[:known, v], size[known:, v])
    return out
