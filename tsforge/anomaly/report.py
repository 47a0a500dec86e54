"""The report of a detection: long tables of scores and events, and the facts that let a reader judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsforge.anomaly.buckets import bucket_notice
from tsforge.anomaly.config import ANSWERS, DetectConfig
from tsforge.anomaly.confirmed import ConfirmedRows
from tsforge.anomaly.health import alarm_health
from tsforge.anomaly.incidents import ungrouped_notice, with_incidents
from tsforge.anomaly.series import SeriesResult
from tsforge.anomaly.tables import event_table, score_table
from tsforge.artifact import Artifact
from tsforge.contracts.tables import AnomalyReport, ScoreFrame
from tsforge.data.grid import TimeGrid, show_time


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
    groups: Mapping[str, str] = field(default_factory=dict)  # of series that share incidents with others
    confirmed: ConfirmedRows = field(default_factory=ConfirmedRows)


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
        "score_answers": ANSWERS.get(context.config.score.kind, "bad forecast"),
        "latency": context.config.score.latency,
        "assumed_clean": True,
        "confirmed_rows_left_out": sum(_left_out(result) for result in results),
        "confirmed_in_hindsight": list(context.confirmed.late),
        "training": _times(context.grid, context.training),
        "scored": _times(context.grid, context.rows),
        "series": facts,
        "notices": [
            *notices,
            *context.confirmed.notices(),
            *ungrouped_notice(list(facts), context.groups, context.config.events.group_by),
            *_notices(context, results, facts),
        ],
        "config": context.config.model_dump(mode="json"),
    }
    scores = score_table(
        [result.scored for result in results],
        context.grid,
        context.artifact.schema.targets,
        by_variate=context.config.keep_variate_scores,
    )
    found = [(result.series_id, result.rule.describe(), event) for result in results for event in result.events]
    events = event_table(found, context.grid, context.config.measure)
    events = with_incidents(events, context.groups, context.config.events.group_gap, context.grid)
    return AnomalyReport(
        scores=ScoreFrame(table=scores, metadata={"rule": rule.describe()}), events=events, metadata=metadata
    )


def _times(grid: TimeGrid, rows: tuple[int, int]) -> list[str]:
    return [str(grid.time_at(rows[0])), str(grid.time_at(rows[1] - 1))]


def _left_out(result: SeriesResult) -> int:
    parts = result.confirmed_left_out
    return parts["calibration"] if result.spans.is_shared else sum(parts.values())


def _facts(context: ReportContext, result: SeriesResult) -> dict[str, Any]:
    alarm = result.decisions.alarm
    scored = ~np.isnan(result.joint)
    return {
        "scale": _times(context.grid, result.spans.scale),
        "calibration": _times(context.grid, result.spans.calibration),
        "scale_and_calibration_shared": result.spans.is_shared,
        "confirmed_rows_left_out": result.confirmed_left_out,
        **result.calibration.to_dict(),
        **result.model.facts(),
        "rule": result.rule.facts(),
        "rows_scored": int(scored.sum()),
        "rows_not_scorable": int((~scored).sum()),
        "alarm_rows": int(alarm.sum()),
        **({} if result.guarded is None else {"rows_guarded": result.guarded}),
        **alarm_health(alarm, scored, result.rule.alpha, context.points_per_day),
    }


def _notices(context: ReportContext, results: Sequence[SeriesResult], facts: dict[str, dict[str, Any]]) -> list[str]:
    notices = [
        f"model health: {name} raised alarms on {fact['alarm_rate_observed']:.1%} of recent rows, "
        f"{fact['alarm_rate_ratio']:.0f} times the nominal rate; the data have moved away from the model: fit again"
        for name, fact in facts.items()
        if fact["is_stale"]
    ]
    alpha = results[0].rule.alpha
    is_limited = alpha is not None and not results[0].rule.extrapolates
    short = [r for r in results if alpha and is_limited and r.calibration.sample.size + 1 < 1.0 / alpha]
    if short and alpha is not None:
        fewest = min(result.calibration.sample.size for result in short)
        notices.append(
            f"{len(short)} of {len(results)} series are calibrated on fewer rows than the alarm rate needs (fewest: "
            f"{fewest}, needed: {int(np.ceil(1.0 / alpha))}); at first up to {1.0 / (fewest + 1):.2%} of normal rows "
            f"alarm instead of {alpha:.2%}"
        )
    scales = {result.series_id: result.buckets for result in results if result.buckets is not None}
    if scales and alpha is not None:
        notices += bucket_notice(str(context.config.calibration.by), scales, alpha)
    if context.config.score.latency:
        notices.append(
            f"each score reads {context.config.score.latency} later rows: as many rows at the end have none, and an "
            "event is known that much later"
        )
    unable = {result.series_id: result.rule.warning() for result in results if result.rule.warning()}
    if unable:
        name, text = next(iter(unable.items()))
        notices.append(f"{len(unable)} of {len(results)} series, the first '{name}': {text}")
    first = results[0].spans.scale
    if any(result.spans.is_shared for result in results):
        notices.append(
            f"scale and calibration share their rows (from {show_time(context.grid.time_at(first[0]))}) in "
            f"{sum(result.spans.is_shared for result in results)} series; p-values are slightly too small"
        )
    return notices
