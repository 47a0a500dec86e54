"""Long polars tables that leave the system: forecasts, scores, anomaly reports; pandas opens them too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tsforge.core.errors import DataError, listing

FORECAST_COLUMNS = ("series_id", "cutoff", "step", "time", "variate", "mean")
PATH_COLUMNS = ("series_id", "cutoff", "step", "time", "variate", "path", "value")
AGGREGATE_COLUMNS = ("series_id", "cutoff", "first_time", "last_time", "steps", "variate", "aggregate", "mean")
SCORE_COLUMNS = ("series_id", "time", "variate", "score", "p_value", "threshold", "alarm")
EVENT_COLUMNS = (
    "event_id",
    "series_id",
    "start",
    "end",
    "peak_time",
    "peak_score",
    "p_value",
    "threshold",
    "rule",
    "state",
    "variates",
)
JOINT = "*"  # variate name of a score over all variates


def quantile_column(level: float) -> str:
    """Return the column name of a quantile level: ``0.05`` -> ``q0.05``."""
    return f"q{level:g}"


def _require(table: pl.DataFrame, columns: tuple[str, ...], what: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"{what} lacks the column(s) {listing(missing)}; it has {listing(table.columns, 20)}")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecasts of any number of series, variates, cutoffs and steps, in data units.

    Attributes:
        table: ``series_id, cutoff`` (time of the last row the model may have seen), ``step`` (1..H), ``time, variate,
            mean`` and one column per quantile level (``q0.05`` ...); one row per combination. Quantiles never cross.
        quantile_levels: ascending levels present in the table.
        paths: sample paths, if asked for: ``series_id, cutoff, step, time, variate, path, value``.
        aggregates: of the horizon, if asked for: ``series_id, cutoff, first_time, last_time, steps, variate, aggregate,
            mean`` and the quantile columns.
        metadata: model name, artifact id and whatever the maker adds.

    Raises:
        DataError: a column is missing, or quantiles cross.
    """

    table: pl.DataFrame
    quantile_levels: tuple[float, ...] = ()
    paths: pl.DataFrame | None = None
    aggregates: pl.DataFrame | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> pl.DataFrame:
        """The table that was asked for: aggregates of the horizon, else sample paths, else the forecast."""
        if self.aggregates is not None:
            return self.aggregates
        return self.table if self.paths is None else self.paths

    def __post_init__(self) -> None:
        names = tuple(quantile_column(level) for level in self.quantile_levels)
        _require(self.table, FORECAST_COLUMNS + names, "a forecast table")
        if self.paths is not None:
            _require(self.paths, PATH_COLUMNS, "a table of sample paths")
        if self.aggregates is not None:
            _require(self.aggregates, AGGREGATE_COLUMNS + names, "a table of aggregates")
        for low, high in itertools.pairwise(names):
            crossed = int((self.table[low] > self.table[high]).sum())
            if crossed:
                raise DataError(f"{crossed} of {self.table.height} forecast rows have {low} above {high}")


@dataclass(frozen=True, kw_only=True)
class ScoreFrame:
    """Anomaly scores: larger = stranger, null = not scorable (never 0, never filled forward).

    Attributes:
        table: ``series_id, time, variate`` (``*`` for the joint score), ``score, p_value, threshold, alarm``.
        metadata: scorer, rule, calibration span, health.
    """

    table: pl.DataFrame
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.table, SCORE_COLUMNS, "a score table")


@dataclass(frozen=True, kw_only=True)
class AnomalyReport:
    """What a detector found in a span.

    Attributes:
        scores: every scored row.
        events: one row an event: ``event_id`` (stable over re-runs), ``series_id, start, end`` (inclusive),
            ``peak_time, peak_score, p_value, threshold, rule, state, variates`` (a list of structs ``variate,
            contribution, conditional``, strongest first); detectors add ``measure``, what the score is.
        metadata: artifact id, rule, calibration span and size, observed and nominal alarm rate, notices.
    """

    scores: ScoreFrame
    events: pl.DataFrame
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.events, EVENT_COLUMNS, "an event table")
