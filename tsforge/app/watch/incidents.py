"""Incidents of a watch: events reach the store one by one and end up in the incidents that ``detect`` would name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import polars as pl

from tsforge.anomaly.incidents import continue_incidents
from tsforge.data.event_incidents import Naming
from tsforge.data.grid import TimeGrid

_FIRST = datetime(1, 1, 2, tzinfo=UTC)  # gaps that reach further back reach everything


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How a watch groups the events that its artifact finds.

    Attributes:
        artifact: its id; what an earlier one found is left as it is.
        grid: of its times.
        groups: label by series, as ``group_labels`` gave them when the watch was started.
        group_by, gap: the settings (``EventConfig``).
    """

    artifact: str
    grid: TimeGrid
    groups: Mapping[str, str] = field(repr=False)
    group_by: str
    gap: int

    def of(self, watch: str, generation: int, artifact: str) -> Naming | None:
        """Return who names the incidents of a generation, None for events of another artifact."""
        if artifact != self.artifact:
            return None
        scope = f"watch:{watch} generation {generation} group_by {self.group_by} group_gap {self.gap}"
        return _Scoped(scope=scope, grouping=self)


@dataclass(frozen=True, kw_only=True)
class _Scoped:
    scope: str
    grouping: Grouping

    def reach(self, start: datetime | int) -> datetime | int:
        grid = self.grouping.grid
        row = grid.floor(start) - self.grouping.gap
        return grid.time_at(row if grid.is_integer else max(row, grid.floor(_FIRST) + 1))

    def name(self, new: pl.DataFrame, near: pl.DataFrame) -> pl.DataFrame:
        return continue_incidents(new, near, self.grouping.groups, self.grouping.gap, self.grouping.grid)
