"""Detection with a fitted artifact: forecasts, scores, p-values, alarms, events and the variates behind them.

Latency 0: a score depends on values up to its own row (reconstruction may ask for more, which the report says). Nothing
is fitted on the scored rows; a rolling rule adapts to rows already judged, which is part of its state and named in the
report.
"""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.confirmed import confirmed_rows
from tsforge.anomaly.deviations import used_steps
from tsforge.anomaly.guard import Guard
from tsforge.anomaly.health import health_window
from tsforge.anomaly.incidents import group_labels
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.preparation import Prepared, fit_monitors, points_per_day, prepare
from tsforge.anomaly.report import ReportContext, build_report
from tsforge.anomaly.series import SeriesResult, detect_series, series_result
from tsforge.anomaly.spans import ScoredSpan, choose_span
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import AnomalyReport
from tsforge.core.logs import get_logger, log_event
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.forecasting.predict import artifact_panel

_LOG = get_logger(__name__)


def detect(
    artifact: Artifact,
    frame: SeriesFrame,
    config: DetectConfig | None = None,
    *,
    start: TimeLike | None = None,
    stop: TimeLike | None = None,
    values: SeriesFrame | None = None,
    confirmed: pl.DataFrame | None = None,
) -> AnomalyReport:
    """Return scores and events of the rows from ``start`` to ``stop`` (both included), for all series of the frame.

    Rows between the artifact's training span and ``start`` set the scale of residuals and calibrate the score, series
    by series; they are assumed free of anomalies, which the report says. An event under way at ``start`` keeps the
    start it had before, so that repeated runs give it the same id.

    Args:
        artifact: the fitted network; its provenance says which rows trained it.
        frame: what the network sees: from before the first calibration row up to the scored rows.
        config: scores, calibration, rule, events.
        start: first time to score (default: after the artifact's validation span).
        stop: last time to score (default: the last observed row).
        values: what is judged, when it differs from what the network sees: values outside a declared range are masked
            for forecasting, but they are the first thing a detector should report.
        confirmed: spans that people confirmed as anomalous (``EventStore.confirmed``); their rows before ``start`` set
            no scale, calibrate nothing and enter no rolling window.

    Raises:
        ArtifactError: the frame does not fit the artifact, or the artifact does not say what trained it.
        ConfigError: a budget without a clock, steps beyond the horizon, or a grouping key that no series has.
        DataError: too few rows before ``start``; the message says how many are needed.
        ModelError: tail scores of an artifact that forecasts points only, regions of a model that has none.
    """
    settings = config or DetectConfig()
    guard = Guard.of(settings, artifact)
    given = frame if values is None else values
    groups = group_labels(given.series_ids, given.static, settings.events.group_by)  # by columns no network need read
    judged = match_frame(artifact, given)
    frame = match_frame(artifact, frame)
    panel = artifact_panel(artifact, judged)
    data_start, data_stop = panel.span()
    span = choose_span(artifact, data_start, data_stop - 1, start, stop)
    context = ReportContext(
        artifact=artifact,
        config=settings,
        grid=panel.grid,
        steps=used_steps(settings.score, artifact.window.horizon),
        rows=(span.start, span.stop),
        training=(span.train_start, span.train_stop),
        points_per_day=points_per_day(panel.grid),
        groups=groups,
        confirmed=confirmed_rows(confirmed, panel.grid, span.start),
    )
    if guard is None:
        ready = prepare(artifact, frame, panel, settings, span, context.confirmed)
        fitted, left_out = fit_monitors(ready, span.start, settings, artifact.schema.targets)
        results = [detect_series(one.rows, one.spans, one.monitor, span.start, settings) for one in fitted]
    else:
        ready = prepare(artifact, frame, panel, settings, replace(span, stop=span.start), context.confirmed)
        results, left_out = _row_by_row(artifact, frame, judged, settings, span, ready, guard)
    report = build_report(context, results, [*ready.notices, *left_out])
    for notice in report.metadata["notices"]:
        _LOG.warning("%s", notice)
    scored = sum(facts["rows_scored"] for facts in report.metadata["series"].values())
    log_event(_LOG, "detected", artifact=artifact.id, rows=scored, events=report.events.height)
    return report


def _row_by_row(
    artifact: Artifact,
    frame: SeriesFrame,
    judged: SeriesFrame,
    config: DetectConfig,
    span: ScoredSpan,
    ready: Prepared,
    guard: Guard,
) -> tuple[list[SeriesResult], list[str]]:
    """Return what a stream finds, and series left out: guarded contexts depend on the alarms before them."""
    fitted, left_out = fit_monitors(
        ready, span.start, config, artifact.schema.targets, recent=health_window(points_per_day(artifact.grid))
    )
    detector = OnlineDetector.prepared(artifact, frame, ready, fitted, config, span.start, guard=guard)
    first, last = artifact.grid.time_at(span.start), artifact.grid.time_at(span.stop - 1)
    columns, watched = artifact.schema, detector.recent.buffer.series

    def part(table: pl.DataFrame, *names: str) -> pl.DataFrame:
        ours = table.filter(pl.col("series_id").is_in(watched) & (pl.col("time") >= first))
        return ours.select("series_id", "time", *names)

    new = part(frame.table, *columns.columns).filter(pl.col("time") <= last)
    ends = pl.DataFrame({"series_id": watched}).with_columns(pl.lit(last).cast(new.schema["time"]).alias("time"))
    new = pl.concat([new, ends.join(new, on=["series_id", "time"], how="anti")], how="diagonal")  # all end together
    values = part(judged.table, *columns.targets).filter(pl.col("time") <= last)
    found = detector.update(new, judged=values, known=part(frame.table, *columns.known) if columns.known else None)
    scored = {item.series_id: item for item in found.scored}
    results = [
        series_result(one.rows, one.spans, one.monitor, scored[name], guarded=guard.rows.get(name, 0))
        for one in fitted
        for name in (one.rows.series_id,)
    ]
    return results, left_out
