"""Detection row by row: the same scores, alarms and events as a batch run, from a state that a file holds.

``OnlineDetector.start`` fits scale, calibration and rule on the rows before the first one to score, by the functions
that ``detect`` uses. ``update`` takes new rows, any number of any series. However rows are cut into updates, scores and
events are the same to the last bit, and those of ``detect`` over the same rows: networks see passes of one shape
(``forecasting.fixed_blocks``), all after them looks at single rows or windows, or advances a state (``Monitor``). A
score that reads ``latency`` later rows is told when these have come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.anomaly.buckets import HOUR_OF_WEEK, bucket_notice, hour_of_week
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.confirmed import confirmed_rows
from tsforge.anomaly.deviations import MAX_STEPS
from tsforge.anomaly.guard import Guard
from tsforge.anomaly.health import alarm_health, health_window
from tsforge.anomaly.monitor import EventRow, Judged, Monitor
from tsforge.anomaly.online_intake import plain_rows
from tsforge.anomaly.online_rows import Compared, Recent, RecentRows
from tsforge.anomaly.online_windows import RecentWindows
from tsforge.anomaly.preparation import Fitted, Prepared, fit_monitors, points_per_day, prepare
from tsforge.anomaly.segments import Segment
from tsforge.anomaly.spans import ScoredSpan, first_row_from, training_rows
from tsforge.anomaly.tables import ScoredRows, event_table, score_table
from tsforge.artifact import Artifact, match_frame
from tsforge.core.errors import DataError, ModelError
from tsforge.core.logs import get_logger, log_event
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, TimeLike
from tsforge.forecasting.predict import artifact_panel
from tsforge.forecasting.stream_rows import NewRows, collect_rows
from tsforge.forecasting.window_forecasts import FloatArray

CELLS_AT_ONCE = 4_000_000  # deviations held while many rows are taken at once
Event: TypeAlias = tuple[str, str, EventRow]  # series, rule, event
SIGN_OF_LIFE_SECONDS = 10.0  # a long update that goes row by row says so often how far it is
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class OnlineResult:
    """What an update found; tables are made when they are asked for.

    The event tables have the columns of ``AnomalyReport.events`` except ``incident_id``: incidents join events of many
    series and are named by whoever stores them.

    Attributes:
        measure: what the score is.
        former: see ``OnlineDetector``.
        health: one notice a series of this update whose alarm rate says that the model no longer fits, as of now.
    """

    grid: TimeGrid
    names: tuple[str, ...]
    measure: str
    former: Mapping[str, int]
    by_variate: bool
    scored: Sequence[ScoredRows]
    opened_events: Sequence[Event]
    closed_events: Sequence[Event]
    changed_events: Sequence[Event]
    health: tuple[str, ...] = ()

    @cached_property
    def scores(self) -> pl.DataFrame:
        """The rows judged of watched series, columns of ``AnomalyReport.scores.table``: those taken, or as many from
        ``latency`` rows before."""
        rows = self.scored or [ScoredRows.nothing(len(self.names))]
        return score_table(rows, self.grid, self.names, by_variate=self.by_variate)

    @cached_property
    def opened(self) -> pl.DataFrame:
        """Events that opened in this update, ``state`` open, or closed where they ended in it too."""
        return self._table(self.opened_events)

    @cached_property
    def closed(self) -> pl.DataFrame:
        """Events that ended in this update; final."""
        return self._table(self.closed_events)

    @cached_property
    def changed(self) -> pl.DataFrame:
        """Events that were open before and still are, with a later end or another peak."""
        return self._table(self.changed_events)

    def _table(self, events: Sequence[Event]) -> pl.DataFrame:
        return event_table(events, self.grid, self.measure, self.former)


@dataclass(eq=False)
class OnlineDetector:
    """A detector that takes rows as they come. Not for several threads at once.

    Made by ``OnlineDetector.start`` or ``OnlineDetector.load``.

    Attributes:
        config: what ``start`` was given.
        recent: the last rows of every series.
        monitors: state of every watched series.
        announced: first row of the open event that each series has reported.
        former: the events that were ``announced`` in a state of an older version: they keep their ids without measure.
        notices: what ``start`` found: series that cannot be calibrated and are taken without being scored, buckets too
            small for a calibration of their own.
        guard: keeps alarms out of later contexts, where they are guarded.
        is_torn: an update failed half-way; the state is no longer that of any row.
    """

    config: DetectConfig
    recent: Recent
    monitors: dict[str, Monitor]
    announced: dict[str, int] = field(default_factory=dict)
    former: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    guard: Guard | None = None
    is_torn: bool = False
    _watched: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self._watched = np.array([name in self.monitors for name in self.recent.buffer.series], dtype=bool)

    @classmethod
    def start(
        cls,
        artifact: Artifact,
        frame: SeriesFrame,
        config: DetectConfig | None = None,
        *,
        start: TimeLike | None = None,
        values: SeriesFrame | None = None,
        confirmed: pl.DataFrame | None = None,
    ) -> OnlineDetector:
        """Return a detector that has seen the rows before ``start`` and fitted scale, calibration and rule on them.

        Args:
            artifact: the fitted network; its provenance says which rows trained it.
            frame: history from the first training row that is to be looked at; rows from ``start`` on are not read,
                except known covariates.
            config: scores, calibration, rule, events.
            start: first time to score; default: right after the last observed row of the frame.
            values: what is judged, when it differs from what the network sees.
            confirmed: spans that people confirmed as anomalous, as in ``detect``.

        Raises:
            ArtifactError, ConfigError, DataError, ModelError: as ``detect``.
        """
        settings = config or DetectConfig()
        guard = Guard.of(settings, artifact)
        judged = match_frame(artifact, frame if values is None else values)
        frame = match_frame(artifact, frame)
        grid = artifact.grid
        begin = artifact_panel(artifact, judged).span()[1] if start is None else first_row_from(grid, start)
        until = grid.time_at(begin - 1)
        past, judged = frame.until(until, keep_known=True), judged.until(until)
        train_start, train_stop = training_rows(artifact)
        if begin < train_stop:
            raise DataError(
                f"watching from row {begin} would reach into the rows that fitted artifact {artifact.id} (up to row "
                f"{train_stop - 1}); start later or fit on earlier rows"
            )
        span = ScoredSpan(train_start, train_stop, begin, begin)
        spared = confirmed_rows(confirmed, grid, begin)
        ready = prepare(artifact, past, artifact_panel(artifact, judged), settings, span, spared)
        fitted, left_out = fit_monitors(
            ready, begin, settings, artifact.schema.targets, recent=health_window(points_per_day(grid))
        )
        notices = (*left_out, *spared.notices())
        return cls.prepared(artifact, past, ready, fitted, settings, begin, guard=guard, notices=notices)

    @classmethod
    def prepared(
        cls,
        artifact: Artifact,
        frame: SeriesFrame,
        ready: Prepared,
        fitted: Sequence[Fitted],
        config: DetectConfig,
        begin: int,
        *,
        guard: Guard | None,
        notices: Sequence[str] = (),
    ) -> OnlineDetector:
        """Return the detector of what ``prepare`` and ``fit_monitors`` found; ``begin`` is the row that comes next.

        Args:
            artifact, config: as of ``start``.
            frame: history, matched to the artifact.
            ready: rows before ``begin`` that scale and calibrate.
            fitted: what judges each series.
            begin: first absolute row to judge.
            guard: that of the config.
            notices: more to tell than what series and buckets lack.

        Raises:
            ConfigError, DataError, ModelError: as ``start``.
        """
        monitors = {one.rows.series_id: one.monitor for one in fitted}
        told = (*ready.notices, *notices, *_small_buckets(monitors, config.calibration.by))
        kept: Recent
        if config.score.is_windowed:
            windowed = {name: ready.windowed[name] for name in monitors}
            kept = RecentWindows.of_frame(artifact, frame, begin, config.score, windowed)
        else:
            kept = RecentRows.of_frame(artifact, frame, begin, config.score)
        return cls(config, kept, monitors, notices=told, guard=guard)

    @property
    def artifact(self) -> Artifact:
        """What forecasts."""
        return self.recent.buffer.artifact

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the watched series."""
        return tuple(self.monitors)

    def ends(self) -> pl.DataFrame:
        """Return ``series_id, time``: the last row that each series has taken."""
        return self.recent.buffer.ends()

    def update(
        self, rows: pl.DataFrame, *, judged: pl.DataFrame | None = None, known: pl.DataFrame | None = None
    ) -> OnlineResult:
        """Take new rows, any number of any series, and return their scores and what became of events.

        Rows must follow the last row of their series; grid rows between are taken as not observed. Nothing changes when
        anything is wrong with the rows.

        Args:
            rows: ``series_id, time`` and every column of the artifact's schema; null = not observed.
            judged: ``series_id, time`` and targets to judge in place of those in ``rows``, for values that are masked
                for the network but must be judged all the same.
            known: ``series_id, time`` and known covariates of rows after these. A forecast uses what was told before
                its first row came; it is the one of a batch run when the whole horizon was.

        Raises:
            DataError: columns missing, unknown series, times off the grid, twice, or not after the last row of their
                series; nothing was changed.
            ModelError: an earlier update failed half-way; load the saved state again.
        """
        if self.is_torn:
            raise ModelError("an earlier update failed half-way, so this state is torn; load the one saved before it")
        place = self.recent.buffer.place
        new = None if known is not None else plain_rows(rows, place, judged)
        if new is None:
            new = collect_rows(rows, place, known=known, judged=judged)
        self.is_torn = True
        parts: dict[str, list[Judged]] = {}
        before: dict[str, Segment | None] = {}
        if self.guard is None:
            self._judge(new, parts, before)
            self.recent.take(new)
        else:
            self._judge_guarded(new, parts, before, self.guard)
        result = self._result([self._joined(name, pieces) for name, pieces in parts.items()], before)
        self.is_torn = False
        return result

    def _judge(
        self, new: NewRows, parts: dict[str, list[Judged]], before: dict[str, Segment | None]
    ) -> list[tuple[int, Judged]]:
        """Judge the rows of watched series that can be judged now; return them with the positions of their series.

        A long update goes in stretches. ``parts`` gets the rows of each series, ``before`` the event it was in.
        """
        series, watched = self.recent.buffer.series, self._watched
        longest = int(new.count.numpy()[watched].max(initial=0))
        size = max(CELLS_AT_ONCE // self._cells_a_turn, 64)
        modes = self._modes(new)
        told = []
        for low in range(0, longest, size):
            found = self.recent.compare(new, range(low, min(low + size, longest)), watched, modes)
            places = found.series
            edges = [*np.flatnonzero(np.diff(places, prepend=-1)).tolist(), len(places)]
            for start, stop in pairwise(edges):
                name, part = series[places[start]], slice(start, stop)
                monitor = self.monitors[name]
                before.setdefault(name, monitor.tracker.current)
                buckets = self._buckets(found, part, monitor)
                judged = monitor.run(
                    found.deviations[part],
                    found.values[part],
                    buckets,
                    expected=found.expected[part],
                    impossible=None if found.impossible is None else found.impossible[part],
                )
                parts.setdefault(name, []).append(judged)
                told.append((int(places[start]), judged))
        return told

    def _judge_guarded(
        self, new: NewRows, parts: dict[str, list[Judged]], before: dict[str, Segment | None], guard: Guard
    ) -> None:
        """Judge and take rows one of each series at a time: a forecast depends on the alarms before it."""
        told = time.monotonic()
        for number, turn in enumerate(new.turns()):
            self._hide(turn, self._judge(turn, parts, before), guard)
            self.recent.take(turn)
            if time.monotonic() - told > SIGN_OF_LIFE_SECONDS:
                told = time.monotonic()
                log_event(_LOG, "rows judged one by one", done=number + 1, of=int(new.count.max()))

    def _hide(self, turn: NewRows, told: Sequence[tuple[int, Judged]], guard: Guard) -> None:
        """Put forecasts in the place of values that later ones must not see; ``turn`` holds one row a series."""
        start, values = turn.start.numpy(), turn.values.numpy()
        for place, judged in told:
            row = values[start[place], : judged.expected.shape[1]]
            # what the network does not see needs no hiding
            expected = np.where(np.isnan(row), np.nan, judged.expected[0])
            alarm = bool(judged.decisions.alarm[0])
            hidden = guard.hidden(self.recent.buffer.series[place], judged.z[0], expected, alarm)
            row[hidden] = expected[hidden]

    @cached_property
    def _cells_a_turn(self) -> int:
        """Deviations of one row of every series."""
        return len(self.artifact.schema.targets) * MAX_STEPS * max(len(self.recent.buffer.series), 1)

    def _joined(self, name: str, pieces: list[Judged]) -> ScoredRows:
        """Return the rows judged of a series; the first ones may lie before the start, where nobody asked for them."""
        judged, monitor = Judged.join(pieces), self.monitors[name]
        first = monitor.row - judged.joint.size
        early = min(max(monitor.start - first, 0), judged.joint.size)
        return ScoredRows(series_id=name, start=first + early, judged=judged.since(early))

    def _modes(self, new: NewRows) -> FloatArray | None:
        """Return the operating mode of every new row, None where scores are not compared by one."""
        by, schema = self.config.calibration.by, self.artifact.schema
        if by is None or by == HOUR_OF_WEEK:
            return None
        if by in schema.targets:
            return new.judged[:, schema.targets.index(by)].astype(np.float32).astype(np.float64)
        return new.values.numpy()[:, schema.columns.index(by)].astype(np.float64)

    def _buckets(self, found: Compared, part: slice, monitor: Monitor) -> FloatArray | None:
        """Return the bucket of each row of one series, None where scores are not compared by bucket."""
        if self.config.calibration.by == HOUR_OF_WEEK:
            row = monitor.next_row
            return hour_of_week(self.artifact.grid, row, row + part.stop - part.start)
        return None if found.modes is None else found.modes[part]

    def _result(self, scored: Sequence[ScoredRows], before: dict[str, Segment | None]) -> OnlineResult:
        opened: list[Event] = []
        closed: list[Event] = []
        changed: list[Event] = []
        for rows in scored:
            name, monitor = rows.series_id, self.monitors[rows.series_id]
            rule = monitor.rule.describe()
            for event in rows.judged.closed:
                if self.announced.pop(name, None) != event.segment.start:
                    opened.append((name, rule, event))
                closed.append((name, rule, event))
            current, earlier = monitor.current(), before[name]
            if current is None:
                continue
            if self.announced.get(name) != current.segment.start:
                self.announced[name] = current.segment.start
                opened.append((name, rule, current))
            elif current.segment != earlier:
                changed.append((name, rule, current))
        return OnlineResult(
            grid=self.artifact.grid,
            names=self.artifact.schema.targets,
            measure=self.config.measure,
            former=self.former,
            by_variate=self.config.keep_variate_scores,
            scored=scored,
            opened_events=opened,
            closed_events=closed,
            changed_events=changed,
            health=self.health(before),
        )

    def health(self, series: Iterable[str] | None = None) -> tuple[str, ...]:
        """Return one notice a series (default all) that alarms far more often than its rule aims at."""
        per_day = points_per_day(self.artifact.grid)
        facts = {
            name: alarm_health(monitor.alarms, monitor.scored, monitor.rule.alpha, per_day)
            for name, monitor in self.monitors.items()
            if series is None or name in series
        }
        return tuple(
            f"model health: {name} raised alarms on {fact['alarm_rate_observed']:.1%} of recent rows, "
            f"{fact['alarm_rate_ratio']:.0f} times the nominal rate; the data have moved away from the model: fit again"
            for name, fact in facts.items()
            if fact["is_stale"]
        )

    def save(self, path: Path) -> None:
        """Write the state as one file, whole or not at all; an older one is replaced.

        Raises:
            BackendError: the disk is full or read-only; the older file stays.
        """
        from tsforge.anomaly.online_state import save_detector

        save_detector(self, path)

    def to_bytes(self) -> bytes:
        """Return what ``save`` writes, for a database column."""
        from tsforge.anomaly.online_state import detector_bytes

        return detector_bytes(self)

    @classmethod
    def load(cls, stored: Path | bytes, artifact: Artifact) -> OnlineDetector:
        """Return the detector whose state this is; it goes on to the bit as if it had never been away.

        Raises:
            ArtifactError: missing, damaged, of a newer format, or the state of another artifact.
        """
        from tsforge.anomaly.online_state import load_detector

        return load_detector(stored, artifact)


def _small_buckets(monitors: dict[str, Monitor], by: str | None) -> list[str]:
    """Return a notice on buckets of series that were too small, empty when none was."""
    scales = {name: monitor.buckets for name, monitor in monitors.items() if monitor.buckets is not None}
    alpha = next((monitor.rule.alpha for monitor in monitors.values()), None)
    return bucket_notice(str(by), scales, alpha) if scales and alpha is not None else []
