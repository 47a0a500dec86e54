"""What a detector knows before the first row it scores: residuals, calibration rows, the rule; for batch and stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tsforge.anomaly.buckets import row_buckets
from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.confirmed import ConfirmedRows
from tsforge.anomaly.deviations import WindowedSeries, collect_deviations, observed_values, seen_values
from tsforge.anomaly.health import HEALTH_ROWS
from tsforge.anomaly.monitor import Monitor
from tsforge.anomaly.residuals import MIN_OBSERVED, TrainingRange
from tsforge.anomaly.row_regression import fit_row_regression
from tsforge.anomaly.series import SeriesRows, fit_monitor
from tsforge.anomaly.spans import ScoredSpan, SeriesSpans, series_spans
from tsforge.anomaly.thresholds import ThresholdRule, build_rule
from tsforge.anomaly.uncomparable import Uncomparable
from tsforge.artifact import Artifact
from tsforge.core.errors import DataError, listing
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, parse_freq, show_time
from tsforge.data.panel import Panel

MICROSECONDS_PER_DAY = 86_400_000_000
DAYS_PER_MONTH = 365.2425 / 12
MOST_REASONS = 3  # told of series that cannot be compared, or fitted


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows of every series that can be calibrated, up to the last scored one.

    Attributes:
        calibrated: rows of a series, and which of them scale and calibrate.
        new_rule: makes an unfitted threshold rule.
        notices: series and variates left out.
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
        DataError: no row between training and scoring, or too few to calibrate any series, or to compare any with.
        ModelError: a kind of score that the artifact cannot give.
    """
    first = max(span.train_stop, panel.span()[0])
    if first >= span.start:
        raise DataError(
            f"no row lies between training (up to {show_time(panel.grid.time_at(span.train_stop - 1))}) and scoring "
            f"(from {show_time(panel.grid.time_at(span.start))}); at least {config.calibration.min_rows} are needed"
            " to calibrate"
        )
    strangers = [name for name in frame.series_ids if name not in panel.series_ids]
    seen = Panel.from_frame(frame, grid=panel.grid, series_ids=(*panel.series_ids, *strangers))
    found = collect_deviations(
        artifact, frame, config.score, (first, span.stop), panel, (span.train_start, span.train_stop), seen
    )
    hidden = np.isnan(observed_values(seen, found.series_ids, first, span.stop)) & ~np.isnan(found.values)

    before, late = span.start - first, config.score.window_latency
    if late:  # scores of the rows just before scoring read scored rows: nothing may rest on them
        found.deviations[:, max(before - late, 0) : before] = np.nan

    def new_rule() -> ThresholdRule:
        return _rule(config, panel.grid, len(found.series_ids))

    new_rule()  # an impossible budget is an error before the work, not after
    training = _training_ranges(panel, seen, span, found.series_ids, config.score, confirmed)
    by = config.calibration.by
    buckets = None
    if by is not None:  # modes in single precision, as the rows of a stream have them
        buckets = row_buckets(by, panel, found.series_ids, first, span.stop).astype(np.float32).astype(np.float64)
    calibrated: list[tuple[SeriesRows, SeriesSpans]] = []
    lacking: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(found.series_ids):
        if name in found.lacking:
            continue
        rows = SeriesRows(
            series_id=name,
            start=first,
            deviations=found.deviations[place],
            values=found.values[place],
            expected=found.expected[place],
            training=training[name],
            confirmed=confirmed.mask(name, first, span.stop - first),
            buckets=None if buckets is None else buckets[place],
            impossible=hidden[place],
        )
        usable = np.asarray((~np.isnan(rows.possible(slice(before))[0])).any(axis=(1, 2)))
        usable &= ~rows.confirmed[:before]
        usable[max(before - config.score.latency, 0) :] = False  # their scores are not known before scoring
        spans = series_spans(
            usable, first, panel.num_targets, config.calibration, remembered=config.score.remembered_rows
        )
        if isinstance(spans, int):
            lacking[name] = (int(usable.sum()), spans)
        else:
            calibrated.append((rows, spans))
    notices = _left_out(panel.grid, span, found.lacking, lacking, len(found.series_ids))
    notices += _blind(calibrated, before, artifact.schema.targets)
    return Prepared(calibrated=calibrated, new_rule=new_rule, notices=notices, windowed=found.windowed)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A series with the monitor that judges it from the first scored row on."""

    rows: SeriesRows
    spans: SeriesSpans
    monitor: Monitor


def fit_monitors(
    ready: Prepared, start: int, config: DetectConfig, names: tuple[str, ...], *, recent: int = HEALTH_ROWS
) -> tuple[list[Fitted], list[str]]:
    """Return the monitors of all series that can be fitted, and notices of those that cannot.

    One series whose calibration scores do not suit the rule, such as a sensor that stood still, leaves the others be.

    Args:
        ready: rows of every series.
        start, config, names, recent: as of ``fit_monitor``.

    Raises:
        ConfigError: as ``fit_monitor``.
        DataError: no series can be fitted.
    """
    fitted: list[Fitted] = []
    failed: dict[str, DataError] = {}
    for rows, spans in ready.calibrated:
        try:
            monitor = fit_monitor(rows, spans, start, config, ready.new_rule, names, recent=recent)
        except DataError as error:
            failed[rows.series_id] = error
        else:
            fitted.append(Fitted(rows=rows, spans=spans, monitor=monitor))
    if not failed:
        return fitted, []
    reasons = _alike({name: str(error) for name, error in failed.items()})
    if not fitted:
        if len(failed) == 1:
            raise next(iter(failed.values()))
        raise DataError(f"no series can be scored: {reasons}") from next(iter(failed.values()))
    return fitted, [f"{len(failed)} of {len(ready.calibrated)} series are not scored: {reasons}"]


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
    panel: Panel,
    seen: Panel,
    span: ScoredSpan,
    series_ids: tuple[str, ...],
    score: ScoreConfig,
    confirmed: ConfirmedRows,
) -> dict[str, TrainingRange]:
    """Return what the training rows of each series say of its variates, impossible values left out.

    A series with fewer than 20 observed training rows in the frame takes all rows before scoring but confirmed ones:
    its floor is needed, whatever it rests on. Confirmed rows never tell how a row follows the one before.
    """
    train = seen_values(panel, seen, series_ids, span.train_start, span.train_stop)
    is_few = (~np.isnan(train)).any(axis=2).sum(axis=1) < MIN_OBSERVED
    few = tuple(name for name, lacks in zip(series_ids, is_few, strict=True) if lacks)
    instead = dict(zip(few, seen_values(panel, seen, few, span.train_start, span.start), strict=True)) if few else {}
    ranges = {}
    for place, name in enumerate(series_ids):
        values = instead.get(name, train[place])
        spared = confirmed.mask(name, span.train_start, len(values))[:, None]
        normal = np.where(spared, np.nan, values)
        ranges[name] = TrainingRange.of(normal if is_few[place] else values)
        if score.joint == "consensus":
            found = ranges[name]
            regression = fit_row_regression(normal, smallest=score.scale_floor * (found.high - found.low))
            ranges[name] = replace(found, regression=regression)
    return ranges


def _left_out(
    grid: TimeGrid,
    span: ScoredSpan,
    uncomparable: Mapping[str, Uncomparable],
    lacking: Mapping[str, tuple[int, int]],
    total: int,
) -> list[str]:
    """Return notices about series that cannot be scored; all of them is an error.

    Args:
        grid, span: of the rows.
        uncomparable: series with too little in the training rows.
        lacking: rows that calibrate, and rows that are needed, of series with too few of them.
        total: series there are.
    """
    texts, advice = [], []
    if uncomparable:
        texts.append(
            f"{len(uncomparable)} of {total} series cannot be compared with the rows that trained the artifact "
            f"({show_time(grid.time_at(span.train_start))} to {show_time(grid.time_at(span.train_stop - 1))}): "
            f"{_reasons(uncomparable)}"
        )
        # of the one that is nearest to what it needs: that helps at least one
        advice.append(max(uncomparable.values(), key=lambda error: error.observed).advice)
    if lacking:
        name, (found, needed) = next(iter(lacking.items()))
        texts.append(
            f"{len(lacking)} of {total} series cannot be calibrated: between training (up to "
            f"{show_time(grid.time_at(span.train_stop - 1))}) and scoring (from {show_time(grid.time_at(span.start))}) "
            f"at least {needed} rows with a forecast and a value are needed, '{name}' has {found}"
        )
        advice.append("score later rows, fit on earlier ones, or lower calibration.min_rows")
    if texts and len(uncomparable) + len(lacking) == total:
        raise DataError("; ".join(part for pair in zip(texts, advice, strict=True) for part in pair))
    named = [names for names in (uncomparable, lacking) if names]
    return [f"{text}; not scored: {listing(names)}" for text, names in zip(texts, named, strict=True)]


def _reasons(uncomparable: Mapping[str, Uncomparable]) -> str:
    """Return what series lack, those that lack the same together; the most frequent reasons."""
    return _alike({name: error.lack for name, error in uncomparable.items()})


def _alike(lacks: Mapping[str, str]) -> str:
    """Return texts about series, each with the names of those it is about."""
    alike: dict[str, list[str]] = {}
    for name, lack in lacks.items():
        alike.setdefault(lack, []).append(f"'{name}'")
    groups = sorted(alike.items(), key=lambda item: -len(item[1]))
    parts = [f"{listing(names, 3)}: {lack}" for lack, names in groups[:MOST_REASONS]]
    rest = sum(len(names) for _, names in groups[MOST_REASONS:])
    return "; ".join(parts) + (f"; {rest} more series in the same way" if rest else "")


def _blind(calibrated: list[tuple[SeriesRows, SeriesSpans]], before: int, names: tuple[str, ...]) -> list[str]:
    """Return a notice about variates that have values before scoring and no score of any of them."""
    found = {}
    for rows, _ in calibrated:
        seen = ~np.isnan(rows.values[:before]).all(axis=0) & ~rows.training.constant
        blind = seen & np.isnan(rows.possible(slice(before))[0]).all(axis=(0, 1))
        if blind.any():
            found[rows.series_id] = listing(f"'{names[place]}'" for place in np.flatnonzero(blind))
    if not found:
        return []
    named = listing(f"{variates} of '{name}'" for name, variates in found.items())
    return [
        f"variates of {len(found)} series are not scored, because what they hold in training, or since, is too little "
        f"to compare: {named}"
    ]
