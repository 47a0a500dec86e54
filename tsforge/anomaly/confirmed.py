"""Spans that people confirmed as anomalous: they set no scale, calibrate nothing and enter no rolling window.

Only rows before the first scored one are left out, so no label can reach the judgement of the rows it is about. They
are still judged: an event under way keeps its start and id. Rows that a rule flagged and nobody confirmed stay in, or
alarms after a level shift would never end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.anomaly.spans import first_row_from
from tsforge.anomaly.thresholds import Decisions, ThresholdRule
from tsforge.core.errors import DataError, listing
from tsforge.data.grid import TimeGrid, show_time

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
COLUMNS = ("series_id", "start", "end")


@dataclass(frozen=True)
class ConfirmedRows:
    """Confirmed rows before the first scored one.

    Attributes:
        spans: series -> absolute rows ``[start, stop)``.
        late: ids of those confirmed after the first scored row was out: a run of that day could not have known them.
    """

    spans: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    late: tuple[str, ...] = ()

    def mask(self, series_id: str, start: int, length: int) -> BoolArray:
        """Return which of the absolute rows ``start, start + 1, ...`` [length] of a series are confirmed."""
        rows = np.zeros(length, dtype=bool)
        for low, high in self.spans.get(series_id, ()):
            rows[max(low - start, 0) : max(high - start, 0)] = True
        return rows

    def notices(self) -> list[str]:
        """Return what a reader has to know: labels that were made in hindsight."""
        if not self.late:
            return []
        return [
            f"{len(self.late)} of the confirmed events left out of calibration were confirmed after the first scored "
            f"row ({listing(self.late)}); a run made at that time could not have known"
        ]


def confirmed_rows(confirmed: pl.DataFrame | None, grid: TimeGrid, start: int) -> ConfirmedRows:
    """Return the confirmed rows before absolute row ``start``.

    Args:
        confirmed: ``series_id, start, end`` (both included) and, where known, ``event_id`` and ``confirmed_at``; spans
            that reach into the scored rows count up to them, later ones not at all.
        grid: of the artifact.
        start: first scored row.

    Raises:
        DataError: a column is missing, or its times are not of the grid's kind.
    """
    if confirmed is None:
        return ConfirmedRows()
    absent = [name for name in COLUMNS if name not in confirmed.columns]
    if absent:
        raise DataError(f"the confirmed spans lack {listing(absent)}; give {listing(COLUMNS)}")
    spans: dict[str, list[tuple[int, int]]] = {}
    late: list[str] = []
    first = grid.time_at(start)
    for row in confirmed.iter_rows(named=True):
        low, high = first_row_from(grid, row["start"]), min(grid.floor(row["end"]) + 1, start)
        if low >= high:
            continue
        spans.setdefault(row["series_id"], []).append((low, high))
        made = row.get("confirmed_at")
        if isinstance(first, datetime) and isinstance(made, datetime) and _aware(made) > _aware(first):
            late.append(str(row.get("event_id") or f"{row['series_id']} from {show_time(row['start'])}"))
    return ConfirmedRows({name: tuple(found) for name, found in spans.items()}, tuple(late))


def _aware(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def judge(rule: ThresholdRule, scores: FloatArray, confirmed: BoolArray) -> Decisions:
    """Judge scores [N] in time order; the rule does not learn from confirmed rows [N], but they may alarm.

    At a missing score a rule shows the levels that the next score will be judged by, and learns nothing.
    """
    if not confirmed.any():
        return rule.run(scores)
    found = rule.run(np.where(confirmed, np.nan, scores))
    with np.errstate(invalid="ignore"):
        alarm = found.alarm | (confirmed & (scores > found.threshold))
    return Decisions(alarm, found.threshold, found.low)


def left_out(confirmed: BoolArray, usable: BoolArray, parts: Mapping[str, slice]) -> dict[str, int]:
    """Return how many usable rows [N] each part of the rows would have had without its confirmed ones."""
    return {name: int((confirmed & usable)[part].sum()) for name, part in parts.items()}
