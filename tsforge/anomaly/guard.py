"""Guarded contexts: a value that raised an alarm is hidden from later forecasts behind the forecast it was judged by.

Without a guard a model reads a fault as its newest history and begins to follow it, so that only the edges of a long
event score high. With one the event stays visible, and so does a change that is here to stay: after ``max_rows`` rows
the guard gives way until an ordinary row comes.

A guard makes forecasts depend on alarms before them: rows go through a detector one at a time, stored ones too, and a
run that starts inside an event does not know what an earlier one hid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import DetectConfig, GuardConfig
from tsforge.artifact import Artifact
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.grid import TimeGrid
from tsforge.forecasting.seasons import season_length

FloatArray = NDArray[np.float64]


@dataclass(eq=False)
class Guard:
    """What is hidden, and for how long already.

    Attributes:
        min_score: size of a value's own normal deviate from which on it is hidden.
        max_rows: rows of a series in which something is hidden, one after another.
        in_a_row: how many of these each series has just had; none before its first.
        rows: how many of each series there were since the start.
    """

    min_score: float
    max_rows: int
    in_a_row: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DetectConfig, artifact: Artifact) -> Guard | None:
        """Return the guard of a detector, None where contexts are not guarded.

        Raises:
            ConfigError: neither the settings nor the grid say how long a season is.
            ModelError: the model reads several series at once.
        """
        if config.guard is None:
            return None
        if artifact.network.capabilities.rows_coupled:
            raise ModelError(
                f"model '{artifact.model_name}' reads several series at once; guarded contexts (guard) need one that "
                "forecasts each from its own rows"
            )
        return cls(config.guard.min_score, _longest(config.guard, config.season_length, artifact.grid))

    def hidden(self, series: str, z: FloatArray, expected: FloatArray, alarm: bool) -> NDArray[np.bool_]:
        """Return which values [V] of the next row of a series later forecasts must not see.

        Args:
            series: its name.
            z: normal deviates [V] of the row; NaN where nothing was compared: such a row ends no stretch.
            expected: forecasts [V] that stand in; a value without one stays.
            alarm: what the rule said of the row.
        """
        nothing = np.zeros(len(z), dtype=bool)
        if not alarm:
            if not np.isnan(z).all():
                self.in_a_row.pop(series, None)
            return nothing
        strange = (np.abs(z) >= self.min_score) & ~np.isnan(expected)
        stretch = self.in_a_row.get(series, 0)
        if stretch >= self.max_rows or not strange.any():
            return nothing
        self.in_a_row[series] = stretch + 1
        self.rows[series] = self.rows.get(series, 0) + 1
        return strange

    def state(self) -> dict[str, dict[str, int]]:
        """Return what changes from row to row."""
        return {"in_a_row": dict(self.in_a_row), "rows": dict(self.rows)}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on where ``state`` was asked for."""
        self.in_a_row, self.rows = (
            {name: int(count) for name, count in state[part].items()} for part in ("in_a_row", "rows")
        )


def _longest(config: GuardConfig, season: int | None, grid: TimeGrid) -> int:
    """Return the most rows hidden one after another."""
    if config.max_rows is not None:
        return config.max_rows
    found = season_length(grid.freq, declared=season)
    if found == 1:
        raise ConfigError(
            f"guard hides at most one season of rows, and a grid of '{grid.freq}' does not say how long one is; give "
            "guard.max_rows or season_length"
        )
    return found
