"""What is known at the cutoff of a window and may decide which margins it gets: calendar, series, level, volatility.

Conditional on any label known before the target, split conformal keeps its guarantee within each label (Mondrian
conformal prediction: Vovk, Gammerman, Shafer (2005), *Algorithmic Learning in a Random World*, section 4.5). Calendar
labels are those of the forecast time, in UTC, which the cutoff and the step fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError
from tsforge.data.panel import Panel

FloatArray = NDArray[np.float64]
BucketKind = Literal["none", "hour", "weekday", "month", "level", "volatility", "series"]
_CALENDAR = ("hour", "weekday", "month")
_CELLS = 4_000_000
_THIRDS = ("low", "middle", "high")


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where N windows end, over a panel whose rows before ``cutoff_index`` they may know; nothing later is read.

    Attributes:
        panel: rows, names and grid.
        series_index: [N], into ``panel.series_ids``.
        cutoff_index: [N], absolute row of the first forecast step.
        context_length: rows a window looks back.
    """

    panel: Panel
    series_index: NDArray[np.int64]
    cutoff_index: NDArray[np.int64]
    context_length: int

    def level(self) -> FloatArray:
        """Return the mean of the observed context values [N, V], data units; NaN where nothing was observed."""
        values = np.where(self.panel.target_observed, self.panel.values[:, : self.panel.num_targets], 0.0)
        return self._mean(values, self.panel.target_observed, 0)

    def volatility(self) -> FloatArray:
        """Return the root mean square step between neighbouring observed context values [N, V], data units."""
        seen = self.panel.target_observed
        values = self.panel.values[:, : self.panel.num_targets]
        pair = np.zeros_like(seen)
        pair[1:] = seen[1:] & seen[:-1]
        step = np.zeros_like(values)
        step[1:] = np.where(pair[1:], values[1:] - values[:-1], 0.0)
        return np.sqrt(self._mean(step**2, pair, 1))

    def _mean(self, values: FloatArray, counts: NDArray[np.bool_], lag: int) -> FloatArray:
        """Return the mean of the cells that count over each context; ``lag`` = rows a cell looks back by itself."""
        low, high = self.panel.indptr[self.series_index], self.panel.indptr[self.series_index + 1]
        stop = np.clip(low + self.cutoff_index - self.panel.offset[self.series_index], low, high)
        start = np.clip(stop - self.context_length, low, high) + lag
        start = np.minimum(start, stop)
        total = np.empty((len(stop), values.shape[1]))
        count = np.zeros(total.shape, dtype=np.int64)
        chunk = max(1, _CELLS // (self.context_length * values.shape[1]))
        for first in range(0, len(stop), chunk):  # sums of the rows themselves: running sums round with what is around
            part = slice(first, first + chunk)
            rows = start[part, None] + np.arange(self.context_length)
            inside = rows < stop[part, None]
            rows = np.where(inside, rows, 0)
            use = counts[rows] & inside[..., None]
            total[part] = np.where(use, values[rows], 0.0).sum(axis=1)
            count[part] = use.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def labels(self, kind: BucketKind, steps: int, edges: Mapping[str, Sequence[float]]) -> NDArray[np.str_]:
        """Return the label of every cell [N, H, V].

        Args:
            kind: not ``none``.
            steps: H.
            edges: variate -> the two edges between thirds, for ``level`` and ``volatility``.

        Raises:
            ConfigError: a calendar label on integer time.
        """
        shape = (len(self.series_index), steps, self.panel.num_targets)
        if kind == "series":
            names = np.asarray(self.panel.series_ids)[self.series_index]
            return np.broadcast_to(names[:, None, None], shape)
        if kind in _CALENDAR:
            return np.broadcast_to(self._calendar(kind, steps)[..., None], shape)
        numbers = self.level() if kind == "level" else self.volatility()
        found = np.empty(numbers.shape, dtype="<U6")
        for place, variate in enumerate(self.panel.schema.targets):
            third = np.searchsorted(np.asarray(edges.get(variate, ())), numbers[:, place], side="right")
            found[:, place] = np.where(np.isnan(numbers[:, place]), "", np.asarray(_THIRDS)[third])
        return np.broadcast_to(found[:, None, :], shape)

    def _calendar(self, kind: BucketKind, steps: int) -> NDArray[np.str_]:
        first = int(self.cutoff_index.min())
        every = np.arange(first, int(self.cutoff_index.max()) + steps)
        times = pl.Series(self.panel.grid.time_at(every))
        if not isinstance(times.dtype, pl.Datetime):
            raise ConfigError(f"calibration.bucket is '{kind}', but the data has integer time; choose another label")
        numbers = getattr(times.dt, kind)().to_numpy()
        names = np.char.zfill(numbers.astype(str), 2)
        return np.asarray(names[self.cutoff_index[:, None] - first + np.arange(steps)])


def third_edges(kind: BucketKind, origins: Origins) -> dict[str, tuple[float, float]]:
    """Return the edges between thirds of the context statistic of each variate; {} for other kinds of label."""
    if kind not in ("level", "volatility"):
        return {}
    numbers = origins.level() if kind == "level" else origins.volatility()
    result = {}
    for place, variate in enumerate(origins.panel.schema.targets):
        seen = numbers[:, place][~np.isnan(numbers[:, place])]
        low, high = np.quantile(seen, [1 / 3, 2 / 3]) if len(seen) else (0.0, 0.0)
        result[variate] = (float(low), float(high))
    return result


def lower_edge(label: str, edges: Sequence[float]) -> float | None:
    """Return where a third begins (None for the lowest, and for labels that are no thirds)."""
    if not edges or label not in _THIRDS[1:]:
        return None
    return float(edges[_THIRDS.index(label) - 1])
