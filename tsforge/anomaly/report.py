"""The report of a detection: long tables of scores and events, and the facts that let a reader judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.segments import event_id
from tsforge.anomaly.series import SeriesResult
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT, AnomalyReport, ScoreFrame
from tsforge.data.grid import TimeGrid, show_time

HEALTH_DAYS = 7
HEALTH_ROWS = 5_000
HEALTH_RATIO = 5.0
HEALTH_MIN_ALARMS = 10  # fewer alarm rows say nothing about a rate
VARIATE_TYPE = pl.Struct(
    {"variate": pl.String, "contribution": pl.Float64, "conditional": pl.Float64, "additive": pl.Float64}
)


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What all series of a report share."""

    artifact: Artifact
    config: DetectConfig
    grid: TimeGrid
    steps: tuple[int, ...]
    rows: tuple[int, int]
    training: tuple[int, int]
    points_per_day: float | None


def build_report(context: ReportContext, results: Sequence[SeriesResult], notices: Sequence[str]) -> AnomalyReport:
    """Return the report of at least one series.

    Args:
        context: what all series share.
        results: one a series.
        notices: what a reader has to know already; stale calibrations and short samples are added.
    """
    facts = {result.series_id: _facts(context, result) for result in results}
    rule = results[0].rule
    metadata = {
        "artifact_id": context.artifact.id,
        "model": context.artifact.model_name,
        "rule": rule.describe(),
        "rule_learns_from_scored_rows": rule.learns,
        "alarm_rate_nominal": rule.alpha,
        "score": f"{context.config.score.kind}, {context.config.score.joint}",
        "steps": list(context.steps),
        "latency": 0,
        "assumed_clean": True,
        "training": _times(context.grid, context.training),
        "scored": _times(context.grid, context.rows),
        "series": facts,
        "notices": [*notices, *_notices(context, results, facts)],
        "config": context.config.model_dump(mode="json"),
    }
    tables = [_score_table(context, result) for result in results]
    events = pl.concat([_event_table(context, result) for result in results])
    return AnomalyReport(
        scores=ScoreFrame(table=pl.concat(tables), metadata={"rule": rule.describe()}), events=events, metadata=metadata
    )


def _times(grid: TimeGrid, rows: tuple[int, int]) -> list[str]:
    return [str(grid.time_at(rows[0])), str(grid.time_at(rows[1] - 1))]


def _score_table(context: ReportContext, result: SeriesResult) -> pl.DataFrame:
    """Return the joint rows and, if kept, those of every variate; NaN becomes null."""
    times = context.grid.time_at(np.arange(result.start, result.start + result.joint.size))
    nothing = np.full(result.joint.size, np.nan)
    decisions = result.decisions
    columns = [(JOINT, result.joint, result.p_values, decisions.threshold, nothing, nothing)]
    if context.config.keep_variate_scores:
        columns += [
            (name, np.abs(result.z[:, v]), result.variate_p_values[:, v], nothing, result.values[:, v], expected)
            for v, (name, expected) in enumerate(zip(context.artifact.schema.targets, result.expected.T, strict=True))
        ]
    tables = [
        pl.DataFrame(
            {
                "series_id": [result.series_id] * times.len(),
                "time": times,
                "variate": [variate] * times.len(),
                "score": score,
                "p_value": p_value,
                "threshold": threshold,
                "alarm": decisions.alarm if variate == JOINT else [None] * times.len(),
                "value": value,
                "expected": expected,
            },
            schema_overrides={"alarm": pl.Boolean},
        )
        for variate, score, p_value, threshold, value, expected in columns
    ]
    return pl.concat(tables).with_columns(pl.col("score", "p_value", "threshold", "value", "expected").fill_nan(None))


def _event_table(context: ReportContext, result: SeriesResult) -> pl.DataFrame:
    grid, rule = context.grid, result.rule.describe()
    rows = result.events
    starts, ends, peaks = (
        grid.time_at(np.array([getattr(event.segment, name) for event in rows], dtype=np.int64))
        for name in ("start", "end", "peak")
    )
    ids = [event_id(result.series_id, start, rule) for start in starts]
    return pl.DataFrame(
        {
            "event_id": pl.Series(ids, dtype=pl.String),
            "series_id": pl.Series([result.series_id] * len(rows), dtype=pl.String),
            "start": starts,
            "end": ends,
            "peak_time": peaks,
            "peak_score": pl.Series([event.peak_score for event in rows], dtype=pl.Float64),
            "p_value": pl.Series([event.p_value for event in rows], dtype=pl.Float64),
            "threshold": pl.Series([event.threshold for event in rows], dtype=pl.Float64),
            "rule": pl.Series([rule] * len(rows), dtype=pl.String),
            "state": pl.Series(["open" if event.segment.is_open else "closed" for event in rows], dtype=pl.String),
            "length": pl.Series([event.segment.length for event in rows], dtype=pl.Int64),
            "continues": pl.Series(
                [None if event.continues is None else ids[event.continues] for event in rows], dtype=pl.String
            ),
            "variates": pl.Series([event.variates for event in rows], dtype=pl.List(VARIATE_TYPE)),
        }
    )


def _facts(context: ReportContext, result: SeriesResult) -> dict[str, Any]:
    alarm = result.decisions.alarm
    scored = ~np.isnan(result.joint)
    return {
        "scale": _times(context.grid, result.spans.scale),
        "calibration": _times(context.grid, result.spans.calibration),
        "scale_and_calibration_shared": result.spans.is_shared,
        **result.calibration.to_dict(),
        **result.model.facts(),
        "rows_scored": int(scored.sum()),
        "rows_not_scorable": int((~scored).sum()),
        "alarm_rows": int(alarm.sum()),
        **_health(alarm, scored, result.rule.alpha, context.points_per_day),
    }


def _health(
    alarm: NDArray[np.bool_], scored: NDArray[np.bool_], nominal: float | None, per_day: float | None
) -> dict[str, Any]:
    """Return the alarm rate over the last 7 days or 5,000 rows, whichever is less, and its ratio to the nominal one."""
    recent = HEALTH_ROWS if per_day is None else max(1, min(HEALTH_ROWS, round(HEALTH_DAYS * per_day)))
    alarms, rows = int(alarm[-recent:].sum()), int(scored[-recent:].sum())
    rate = alarms / rows if rows else None
    ratio = None if rate is None or not nominal else rate / nominal
    stale = ratio is not None and ratio > HEALTH_RATIO and alarms >= HEALTH_MIN_ALARMS
    return {"alarm_rate_observed": rate, "alarm_rate_ratio": ratio, "is_stale": stale}


def _notices(context: ReportContext, results: Sequence[SeriesResult], facts: dict[str, dict[str, Any]]) -> list[str]:
    notices = [
        f"model health: {name} raised alarms on {fact['alarm_rate_observed']:.1%} of recent rows, "
        f"{fact['alarm_rate_ratio']:.0f} times the nominal rate; the data have moved away from the model: fit again"
        for name, fact in facts.items()
        if fact["is_stale"]
    ]
    alpha = results[0].rule.alpha
    short = [] if alpha is None else [r for r in results if r.calibration.sample.size + 1 < 1.0 / alpha]
    if short and alpha is not None:
        fewest = min(result.calibration.sample.size for result in short)
        notices.append(
            f"{len(short)} of {len(results)} series are calibrated on fewer rows than the alarm rate needs (fewest: "
            f"{fewest}, needed: {int(np.ceil(1.0 / alpha))}); at first up to {1.0 / (fewest + 1):.2%} of normal rows "
            f"alarm instead of {alpha:.2%}"
        )
    first = results[0].spans.scale
    if any(result.spans.is_shared for result in results):
        notices.append(
            f"scale and calibration share their rows (from {show_time(context.grid.time_at(first[0]))}) in "
            f"{sum(result.spans.is_shared for result in results)} series; p-values are slightly too small"
        )
    return notices
