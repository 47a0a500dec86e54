"""Detection with a fitted artifact: forecasts, scores, p-values, alarms, events and the variates behind them.

Latency 0: a score depends on values up to its own row. Nothing is fitted on the scored rows; a rolling rule adapts to
rows already judged, which is part of its state and named in the report.
"""

from __future__ import annotations

import numpy as np

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.deviations import collect_deviations, observed_values, used_steps
from tsforge.anomaly.report import ReportContext, build_report
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.series import SeriesResult, SeriesRows, detect_series
from tsforge.anomaly.spans import ScoredSpan, choose_span, series_spans
from tsforge.anomaly.thresholds import ThresholdRule, build_rule
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import AnomalyReport
from tsforge.core.errors import DataError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, TimeLike, parse_freq, show_time
from tsforge.data.panel import Panel
from tsforge.forecasting.predict import artifact_panel

_LOG = get_logger(__name__)
MICROSECONDS_PER_DAY = 86_400_000_000
DAYS_PER_MONTH = 365.2425 / 12


def points_per_day(grid: TimeGrid) -> float | None:
    """Return rows a day of a grid, None where time is a plain number."""
    step = parse_freq(grid.freq)
    if step.kind == "integer":
        return None
    if step.kind == "month":
        return 1.0 / (step.count * DAYS_PER_MONTH)
    return MICROSECONDS_PER_DAY / step.count


def detect(
    artifact: Artifact,
    frame: SeriesFrame,
    config: DetectConfig | None = None,
    *,
    start: TimeLike | None = None,
    stop: TimeLike | None = None,
    values: SeriesFrame | None = None,
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

    Raises:
        ArtifactError: the frame does not fit the artifact, or the artifact does not say what trained it.
        ConfigError: a budget without a clock, or steps beyond the horizon.
        DataError: too few rows before ``start``; the message says how many are needed.
        ModelError: tail scores of an artifact that forecasts points only, regions of a model that has none.
    """
    settings = config or DetectConfig()
    judged = match_frame(artifact, frame if values is None else values)
    frame = match_frame(artifact, frame)
    panel = artifact_panel(artifact, judged)
    data_start, data_stop = panel.span()
    span = choose_span(artifact, data_start, data_stop - 1, start, stop)
    first = max(span.train_stop, data_start)
    if first >= span.start:
        raise DataError(
            f"no row lies between training (up to {show_time(panel.grid.time_at(span.train_stop - 1))}) and scoring "
            f"(from {show_time(panel.grid.time_at(span.start))}); at least {settings.calibration.min_rows} are needed"
            " to calibrate"
        )
    found = collect_deviations(
        artifact, frame, settings.score, (first, span.stop), panel, (span.train_start, span.train_stop)
    )
    training = _training_ranges(panel, span, found.series_ids)
    context = ReportContext(
        artifact=artifact,
        config=settings,
        grid=panel.grid,
        steps=used_steps(settings.score, artifact.window.horizon),
        rows=(span.start, span.stop),
        training=(span.train_start, span.train_stop),
        points_per_day=points_per_day(panel.grid),
    )

    def new_rule() -> ThresholdRule:
        return _rule(context, len(found.series_ids))

    new_rule()  # an impossible budget is an error before the work, not after
    results: list[SeriesResult] = []
    lacking: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(found.series_ids):
        rows = SeriesRows(
            series_id=name,
            start=first,
            deviations=found.deviations[place],
            values=found.values[place],
            expected=found.expected[place],
            training=training[name],
        )
        usable = np.asarray((~np.isnan(rows.deviations[: span.start - first])).any(axis=(1, 2)))
        spans = series_spans(usable, first, panel.num_targets, settings.calibration)
        if isinstance(spans, int):
            lacking[name] = (int(usable.sum()), spans)
            continue
        results.append(detect_series(rows, spans, span.start, settings, new_rule, artifact.schema.targets))
    report = build_report(context, results, _lacking(panel.grid, span, lacking, len(found.series_ids)))
    for notice in report.metadata["notices"]:
        _LOG.warning("%s", notice)
    log_event(_LOG, "detected", artifact=artifact.id, rows=report.scores.table.height, events=report.events.height)
    return report


def _rule(context: ReportContext, num_series: int) -> ThresholdRule:
    config, per_day = context.config, context.points_per_day
    season = config.season_length or (None if per_day is None else max(2, round(7 * per_day)))
    return build_rule(
        config.rule,
        low_factor=config.events.low_factor,
        points_per_day=per_day,
        season_length=season,
        num_series=num_series,
    )


def _training_ranges(panel: Panel, span: ScoredSpan, series_ids: tuple[str, ...]) -> dict[str, TrainingRange]:
    """Return the range of each variate in the training rows of each series.

    A series without training rows in the frame takes those before scoring: its floor is needed, whatever it rests on.
    """
    train = observed_values(panel, series_ids, span.train_start, span.train_stop)
    ranges = {}
    for place, name in enumerate(series_ids):
        values = train[place]
        if np.isnan(values).all():
            values = observed_values(panel, (name,), span.train_stop, span.start)[0]
        ranges[name] = TrainingRange.of(values)
    return ranges


def _lacking(grid: TimeGrid, span: ScoredSpan, lacking: dict[str, tuple[int, int]], total: int) -> list[str]:
    """Return a notice about series that could not be calibrated; all of them is an error."""
    if not lacking:
        return []
    name, (found, needed) = next(iter(lacking.items()))
    text = (
        f"{len(lacking)} of {total} series cannot be calibrated: between training (up to "
        f"{show_time(grid.time_at(span.train_stop - 1))}) and scoring (from {show_time(grid.time_at(span.start))}) at "
        f"least {needed} rows with a forecast and a value are needed, '{name}' has {found}"
    )
    if len(lacking) == total:
        raise DataError(f"{text}; score later rows, fit on earlier ones, or lower calibration.min_rows")
    return [f"{text}; not scored: {listing(lacking)}"]
