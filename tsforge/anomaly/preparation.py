"""What a detector knows before the first row it scores: residuals, calibration rows, the rule; for batch and stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tsforge.anomaly.buckets import row_buckets
from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.confirmed import ConfirmedRows
from tsforge.anomaly.deviations import WindowedSeries, collect_deviations, observed_values
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.row_regression import fit_row_regression
from tsforge.anomaly.series import SeriesRows
from tsforge.anomaly.spans import ScoredSpan, SeriesSpans, series_spans
from tsforge.anomaly.thresholds import ThresholdRule, build_rule
from tsforge.artifact import Artifact
from tsforge.core.errors import DataError, listing
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, parse_freq, show_time
from tsforge.data.panel import Panel

MICROSECONDS_PER_DAY = 86_400_000_000
DAYS_PER_MONTH = 365.2425 / 12


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows of every series that can be calibrated, up to the last scored one.

    Attributes:
        calibrated: rows of a series, and which of them scale and calibrate.
        new_rule: makes an unfitted threshold rule.
        notices: series left out.
        windowed: of windowed kinds of score, what judges the rows of each series.
    """

    calibrated: list[tuple[SeriesRows, SeriesSpans]]
    new_rule: Callable[[], ThresholdRule]
    notices: list[str]
    windowed: Mapping[str, WindowedSeries]


def prepare(
    artifact: Artifact,
    frame: SeriesFrame,
    panel: Panel,
    config: DetectConfig,
    span: ScoredSpan,
    confirmed: ConfirmedRows,
) -> Prepared:
    """Return everything that fits need, and the deviations of the rows to score.

    Args:
        artifact: the fitted network.
        frame: what the network sees, matched to the artifact.
        panel: values to judge, on the artifact's grid.
        config: of the detector.
        span: rows that trained the network and rows to score; these may be none.
        confirmed: rows before those to score that nothing may rest on.

    Raises:
        ConfigError: an impossible budget, steps beyond the horizon.
        DataError: no row between training and scoring, or too few to calibrate any series.
        ModelError: a kind of score that the artifact cannot give.
    """
    first = max(span.train_stop, panel.span()[0])
    if first >= span.start:
        raise DataError(
            f"no row lies between training (up to {show_time(panel.grid.time_at(span.train_stop - 1))}) and scoring "
            f"(from {show_time(panel.grid.time_at(span.start))}); at least {config.calibration.min_rows} are needed"
            " to calibrate"
        )
    found = collect_deviations(
        artifact, frame, config.score, (first, span.stop), panel, (span.train_start, span.train_stop)
    )

    before, late = span.start - first, config.score.window_latency
    if late:  # scores of the rows just before scoring read scored rows: nothing may rest on them
        found.deviations[:, max(before - late, 0) : before] = np.nan

    def new_rule() -> ThresholdRule:
        return _rule(config, panel.grid, len(found.series_ids))

    new_rule()  # an impossible budget is an error before the work, not after
    training = _training_ranges(panel, span, found.series_ids, config.score)
    by = config.calibration.by
    buckets = None
    if by is not None:  # modes in single precision, as the rows of a stream have them
        buckets = row_buckets(by, panel, found.series_ids, first, span.stop).astype(np.float32).astype(np.float64)
    calibrated: list[tuple[SeriesRows, SeriesSpans]] = []
    lacking: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(found.series_ids):
        rows = SeriesRows(
            series_id=name,
            start=first,
            deviations=found.deviations[place],
            values=found.values[place],
            expected=found.expected[place],
            training=training[name],
            confirmed=confirmed.mask(name, first, span.stop - first),
            buckets=None if buckets is None else buckets[place],
        )
        usable = np.asarray((~np.isnan(rows.deviations[:before])).any(axis=(1, 2)))
        usable &= ~rows.confirmed[:before]
        usable[max(before - config.score.latency, 0) :] = False  # their scores are not known before scoring
        spans = series_spans(
            usable, first, panel.num_targets, config.calibration, remembered=config.score.remembered_rows
        )
        if isinstance(spans, int):
            lacking[name] = (int(usable.sum()), spans)
        else:
            calibrated.append((rows, spans))
    notices = _lacking(panel.grid, span, lacking, len(found.series_ids))
    return Prepared(calibrated=calibrated, new_rule=new_rule, notices=notices, windowed=found.windowed)


def points_per_day(grid: TimeGrid) -> float | None:
    """Return rows a day of a grid, None where time is a plain number."""
    step = parse_freq(grid.freq)
    if step.kind == "integer":
        return None
    if step.kind == "month":
        return 1.0 / (step.count * DAYS_PER_MONTH)
    return MICROSECONDS_PER_DAY / step.count


def _rule(config: DetectConfig, grid: TimeGrid, num_series: int) -> ThresholdRule:
    per_day = points_per_day(grid)
    season = config.season_length or (None if per_day is None else max(2, round(7 * per_day)))
    return build_rule(
        config.rule,
        low_factor=config.events.low_factor,
        points_per_day=per_day,
        season_length=season,
        num_series=num_series,
        calibration=config.calibration,
    )


def _training_ranges(
    panel: Panel, span: ScoredSpan, series_ids: tuple[str, ...], score: ScoreConfig
) -> dict[str, TrainingRange]:
    """Return what the training rows of each series say of its variates.

    A series without training rows in the frame takes those before scoring: its floor is needed, whatever it rests on.
    """
    train = observed_values(panel, series_ids, span.train_start, span.train_stop)
    ranges = {}
    for place, name in enumerate(series_ids):
        values = train[place]
        if np.isnan(values).all():
            values = observed_values(panel, (name,), span.train_stop, span.start)[0]
        ranges[name] = TrainingRange.of(values)
        if score.joint == "consensus":
            found = ranges[name]
            regression = fit_row_regression(values, smallest=score.scale_floor * (found.high - found.low))
            ranges[name] = replace(found, regression=regression)
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
