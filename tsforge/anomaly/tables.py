"""Scores and events of one series as tables: the same for a report and for a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.monitor import EventRow, Judged
from tsforge.contracts.tables import JOINT
from tsforge.data.event_records import event_id
from tsforge.data.grid import TimeGrid

FloatArray = NDArray[np.float64]
VARIATE_TYPE = pl.Struct(
    {"variate": pl.String, "contribution": pl.Float64, "conditional": pl.Float64, "additive": pl.Float64}
)


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Rows of one series from absolute row ``start`` on, judged."""

    series_id: str
    start: int
    judged: Judged

    @classmethod
    def nothing(cls, width: int) -> ScoredRows:
        """Return no rows of ``width`` variates."""
        return cls(series_id="", start=0, judged=Judged.nothing(width))


def score_table(parts: Sequence[ScoredRows], grid: TimeGrid, names: Sequence[str], *, by_variate: bool) -> pl.DataFrame:
    """Return one record a row and, if asked for, one a row and variate, part by part; NaN becomes null.

    Columns: ``series_id, time, variate`` (``*`` for the joint score), ``score, p_value, threshold, alarm, value,
    expected``. Of a part, at least one, come the joint scores first, then variate by variate.
    """
    found: list[tuple[FloatArray, ...]] = []  # of each part and variate
    alarms, places, codes, lengths = [], [], [], []  # code 0: the joint score
    for rows in parts:
        judged, size = rows.judged, rows.judged.joint.size
        nothing = np.full(size, np.nan)
        found.append((judged.joint, judged.p_values, judged.decisions.threshold, nothing, nothing))
        shown = 0
        if by_variate and judged.variate_p_values is not None:
            shown = len(names)
            found += [
                (np.abs(judged.z[:, v]), judged.variate_p_values[:, v], nothing, judged.values[:, v], expected)
                for v, expected in enumerate(judged.expected.T)
            ]
        alarms.append(np.pad(np.asarray(judged.decisions.alarm, dtype=bool), (0, shown * size)))
        places.append(np.tile(np.arange(rows.start, rows.start + size), 1 + shown))
        codes.append(np.repeat(np.arange(1 + shown), size))
        lengths.append(size * (1 + shown))
    code = np.concatenate(codes)
    columns = zip(*found, strict=True)
    score, p_value, threshold, value, expected = (pl.Series(np.concatenate(each)).fill_nan(None) for each in columns)
    return pl.DataFrame(
        {
            "series_id": pl.Series([rows.series_id for rows in parts], dtype=pl.String).gather(
                np.repeat(np.arange(len(parts)), lengths)
            ),
            "time": grid.time_at(np.concatenate(places)),
            "variate": pl.Series([JOINT, *names], dtype=pl.String).gather(code),
            "score": score,
            "p_value": p_value,
            "threshold": threshold,
            "alarm": pl.Series(np.concatenate(alarms), dtype=pl.Boolean).set(pl.Series(code > 0), None),
            "value": value,
            "expected": expected,
        }
    )


def event_table(
    events: Sequence[tuple[str, str, EventRow]], grid: TimeGrid, measure: str, former: Mapping[str, int] | None = None
) -> pl.DataFrame:
    """Return one record an event.

    Args:
        events: series, rule (``describe()``) and event.
        grid: of the times.
        measure: what the score is (``DetectConfig.measure``); part of the ids unless it is the default one.
        former: first row, by series, of an event that was told under an id without the measure, which it keeps.
    """
    rows = [event for _, _, event in events]
    named, kept = "" if measure == DetectConfig().measure else measure, former or {}

    def times(places: Sequence[int]) -> pl.Series:
        return grid.time_at(np.array(places, dtype=np.int64))

    def ids(places: Sequence[int]) -> list[str]:
        return [
            event_id(series, time, rule, "" if kept.get(series) == place else named)
            for (series, rule, _), place, time in zip(events, places, times(places), strict=True)
        ]

    starts = [event.segment.start for event in rows]
    origins = [event.segment.start if event.continues is None else event.continues for event in rows]
    chains = [None if event.continues is None else name for event, name in zip(rows, ids(origins), strict=True)]
    return pl.DataFrame(
        {
            "event_id": pl.Series(ids(starts), dtype=pl.String),
            "series_id": pl.Series([series for series, _, _ in events], dtype=pl.String),
            "start": times(starts),
            "end": times([event.segment.end for event in rows]),
            "peak_time": times([event.segment.peak for event in rows]),
            "peak_score": pl.Series([event.peak_score for event in rows], dtype=pl.Float64),
            "p_value": pl.Series([event.p_value for event in rows], dtype=pl.Float64),
            "threshold": pl.Series([event.threshold for event in rows], dtype=pl.Float64),
            "rule": pl.Series([rule for _, rule, _ in events], dtype=pl.String),
            "state": pl.Series(["open" if event.segment.is_open else "closed" for event in rows], dtype=pl.String),
            "length": pl.Series([event.segment.length for event in rows], dtype=pl.Int64),
            "continues": pl.Series(chains, dtype=pl.String),
            "measure": pl.Series([measure] * len(rows), dtype=pl.String),
            "variates": pl.Series([event.variates for event in rows], dtype=pl.List(VARIATE_TYPE)),
        }
    )
