"""Intervals of a stream that go on learning: the cells of ``online_conformal``, fed row by row.

Before a row of a series is taken, the forecast from the row before it is issued with the intervals as they are then;
the row is looked at afterwards. So nothing that an interval rests on is later than its cutoff, and rows may come in any
portions. Every ``every``-th row of the artifact's grid is a cutoff whose intervals wait for their targets; the others
show what the cells know and teach them nothing.

Every series keeps its own clock here, so series may only share cells (``pool: series``) where a model couples them to
one clock: otherwise what a series learned from another would depend on which of them came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.artifact import Artifact
from tsforge.contracts.tables import quantile_column
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError, listing
from tsforge.data.grid import show_time
from tsforge.data.panel import Panel
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig, stored_settings
from tsforge.forecasting.predict import forecast_table, offered_levels
from tsforge.forecasting.stream_buffer import Buffer
from tsforge.forecasting.stream_carried import pick
from tsforge.forecasting.stream_rows import Ints, NewRows
from tsforge.forecasting.stream_scores import first_steps, interval_bounds, interval_levels
from tsforge.forecasting.window_forecasts import FloatArray, WindowForecasts
from tsforge.metrics.summary import central_intervals

FORMAT = 2
_NAMES = ("series_id", "variate")
_ORDER = ("series_id", "variate", "step", "level")
_TIMES = ("cutoff", "time", "expires")


@dataclass(eq=False)
class OnlineIntervals:
    """What the intervals of a stream have learned.

    Attributes:
        artifact: what forecasts.
        state: cells and waiting intervals.
        levels: quantile levels that are adapted, all that the artifact offers.
        every: a row is a cutoff to learn from where its number on the artifact's grid is a multiple of this.
    """

    artifact: Artifact
    state: OnlineConformal
    levels: tuple[float, ...]
    every: int = 1

    @classmethod
    def begin(cls, artifact: Artifact, config: OnlineConfig, every: int = 1) -> OnlineIntervals:
        """Return intervals that have learned nothing yet.

        Raises:
            ConfigError: the artifact has no central interval, ``every`` is below 1, or series with clocks of their own
                are to share cells.
        """
        if every < 1:
            raise ConfigError(f"online_every is {every}; it must be at least 1")
        levels, shown = offered_levels(artifact), interval_levels(artifact)
        if not shown or abs(sum(shown) - 1.0) > 1e-9:
            raise ConfigError(
                f"online adapts central intervals, and artifact {artifact.id} has none one step ahead (it offers the "
                f"levels {listing(levels) or 'none'}); calibrate it, or choose a likelihood with "
                "mirrored levels"
            )
        if config.pool == "series" and not artifact.network.capabilities.rows_coupled:
            raise ConfigError(
                "online.pool=series needs one clock, and every series of this stream keeps its own: what they learn "
                "from each other would depend on which comes first; take pool=own, or adapt a recurring batch"
            )
        return cls(artifact, OnlineConformal(config), levels, every)

    def copy(self) -> OnlineIntervals:
        """Return intervals that go on from here and leave these as they are."""
        return replace(self, state=self.state.copy())

    def adapted(self, table: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
        """Return a forecast table with adapted quantiles, and how many intervals have which status; learns nothing.

        Args:
            table: with a column for each of ``levels``.
        """
        found, status = self.state.copy().issue(table, wait=False)
        columns = [name for name in status.columns if name.startswith("status_")]
        counts = pl.concat([status[name].alias("status") for name in columns]).value_counts(sort=True)
        return found, dict(counts.sort("status").iter_rows())

    def summary(self) -> dict[str, int]:
        """Return how many intervals were issued with which status, judged and given up, and how many wait."""
        return {**self.state.tally, "waiting": 0 if self.state.pending is None else self.state.pending.height}

    # ---- keeping

    def facts(self) -> dict[str, Any]:
        """Return the plain part of the state; ``tensors`` holds the rest."""
        settings = self.state.config.model_dump(mode="json")
        return {"format": FORMAT, "settings": settings, "every": self.every, "tally": self.state.tally}

    def tensors(self, series: Sequence[str]) -> dict[str, Tensor]:
        """Return cells and waiting intervals by name, in an order that does not depend on how rows came in.

        Args:
            series: of the stream; they and the variates become numbers.
        """
        tables = self.state.tables()
        cells = self._numbered(tables["cells"], series).with_row_index("old").sort(_ORDER)
        columns = {f"cells.{name}": _tensor(cells[name]) for name in (*_ORDER, "alpha", "weight", "count")}
        columns["cells.kept"] = _tensor(cells["scores"].list.len().cast(pl.Int64))
        columns["cells.scores"] = _tensor(cells["scores"].explode().drop_nulls())
        pending = tables["pending"]
        if pending.height:
            moved = np.argsort(cells["old"].to_numpy())
            pending = self._numbered(pending, series).sort(*_ORDER, "cutoff")
            pending = pending.with_columns(pl.Series("cell", moved[pending["cell"].to_numpy()], dtype=pl.Int64))
            pending = pending.with_columns(pl.col(_TIMES).to_physical().cast(pl.Int64))
            columns |= {f"pending.{name}": _tensor(pending[name]) for name in pending.columns}
        return columns

    def _numbered(self, table: pl.DataFrame, series: Sequence[str]) -> pl.DataFrame:
        names = {"series_id": ["", *series], "variate": self.artifact.schema.targets}
        return table.with_columns(
            pl.col(column).replace_strict(list(known), range(len(known)), return_dtype=pl.Int64)
            for column, known in names.items()
        )

    @classmethod
    def of(
        cls, artifact: Artifact, series: Sequence[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> OnlineIntervals:
        """Return the intervals whose ``facts`` (of a format that was checked) and ``tensors`` these are, to the bit.

        Raises:
            ArtifactError: not those of these series.
        """
        try:
            config = validate(OnlineConfig, stored_settings(facts["settings"]), where="online")
            parts = {name: value.numpy() for name, value in tensors.items()}
            rates = pl.Array(pl.Float64, len(config.steps))
            kept = parts.pop("cells.kept")
            scores = np.split(parts.pop("cells.scores"), np.cumsum(kept)[:-1]) if len(kept) else []
            cells = _table(parts, "cells.", rates).with_columns(
                pl.Series("scores", [part.tolist() for part in scores], dtype=pl.List(pl.Float64))
            )
            pending = _table(parts, "pending.", rates)
            names = {"series_id": ["", *series], "variate": artifact.schema.targets}
            tables = {"cells": cells, "pending": pending}
            for key, table in tables.items():
                if table.width:
                    tables[key] = table.with_columns(
                        pl.Series(known, dtype=pl.String).gather(table[column]).alias(column)
                        for column, known in names.items()
                    )
            if pending.width:
                kind = artifact.grid.time_at(np.zeros(1, dtype=np.int64)).dtype
                tables["pending"] = tables["pending"].with_columns(pl.col(_TIMES).cast(kind))
            state = OnlineConformal.from_tables(config, tables, facts["tally"])
        except (KeyError, ValueError, ConfigError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(f"its online intervals cannot be read: {str(error).splitlines()[0]}") from error
        return cls(artifact, state, offered_levels(artifact), int(facts["every"]))


def _tensor(column: pl.Series) -> Tensor:
    values = torch.from_numpy(np.array(column.to_numpy()))
    return values.clone(memory_format=torch.contiguous_format)  # numpy gives nothing at all a stride of 0


def _table(parts: Mapping[str, NDArray[Any]], prefix: str, rates: pl.DataType) -> pl.DataFrame:
    """Return the columns that begin with ``prefix``, in their order."""
    found = {name.removeprefix(prefix): value for name, value in parts.items() if name.startswith(prefix)}
    order = [*_ORDER, *(_TIMES if "cutoff" in found else ()), "cell", "low", "high", "seen", "adapted"]
    order = [name for name in (*order, "alpha", "weight", "count") if name in found]
    return pl.DataFrame(
        [pl.Series(name, found[name], dtype=rates if name in ("alpha", "weight") else None) for name in order]
    )


@dataclass(eq=False, kw_only=True)
class Learner:
    """One update of a stream: gives the rows their intervals and then learns from them, in the order of time.

    Called with forecasts of rows, at most a few of each series at once but always later ones in later calls; ``finish``
    takes in what came after the last of them.

    Attributes:
        online: is changed on the way.
        buffer, new: the stream before the update, and the rows to take.
        shown: low and high level of the interval of the score table.
        panel: the rows of both, for a calibration that looks at them.
    """

    online: OnlineIntervals
    buffer: Buffer
    new: NewRows
    shown: tuple[float, ...]
    panel: Panel | None = None
    _learned: Ints = field(init=False)

    def __post_init__(self) -> None:
        self._learned = np.zeros(len(self.buffer.series), dtype=np.int64)
        self._check_known()

    @cached_property
    def cutoff(self) -> Ints:
        """Absolute row before each new one [N]."""
        last: Ints = self.buffer.last.numpy()[self.new.owner.numpy()] + self.new.done.numpy()
        return last

    @cached_property
    def teaches(self) -> NDArray[np.bool_]:
        """Whether the forecast before each new row [N] is one to learn from: on the beat, and of something observed."""
        found: NDArray[np.bool_] = (self.cutoff % self.online.every == 0) & self.buffer.seen_before(self.new)
        return found

    @cached_property
    def wanted(self) -> NDArray[np.bool_]:
        """New rows [N] that need the forecast before them."""
        found: NDArray[np.bool_] = self.teaches | ~np.isnan(self.new.judged).all(axis=1)
        return found

    @cached_property
    def _actual(self) -> FloatArray:
        """Targets [N, V] as the model sees them, NaN where not observed; in double precision where that is at hand."""
        seen = self.new.values.numpy()[:, : self.new.judged.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            same = self.new.judged.astype(np.float32) == seen
        return np.where(same, self.new.judged, seen.astype(np.float64))

    @cached_property
    def _names(self) -> Panel:
        return self.buffer.names()

    @cached_property
    def _status(self) -> str:
        """Column that says how the interval shown came about."""
        named = [float(quantile_column(level)[1:]) for level in (*self.online.levels, self.shown[0])]
        pairs = central_intervals(named[:-1])  # the state knows levels by the six digits of their columns
        return next(f"status_{100 * cover:g}" for cover, low, _ in pairs if low == named[-1])

    def _check_known(self) -> None:
        """Check that every forecast to learn from has its known covariates over the whole horizon."""
        if self.new.known is None:
            return
        horizon, owner = self.buffer.artifact.window.horizon, self.new.owner.numpy()
        lacks = np.isnan(self.new.known.numpy()).any(axis=1)
        running = np.concatenate([[0], np.cumsum(lacks)])
        first = self.new.start.numpy()[owner] + owner * horizon + self.new.done.numpy()
        short = np.flatnonzero(self.teaches & (running[first + horizon] > running[first]))
        if not len(short):
            return
        row = short[0]
        step = int(lacks[first[row] : first[row] + horizon].argmax())
        time = self.buffer.artifact.grid.time_at(int(self.cutoff[row]) + 1 + step)
        raise DataError(
            f"online intervals learn from whole forecasts, and known covariates are missing over the horizon of "
            f"{len(short)} of {int(self.teaches.sum())} of them (first: '{self.buffer.series[owner[row]]}' at "
            f"{show_time(time)}); give their values for {horizon} rows after each new one (known=...)"
        )

    def __call__(self, found: WindowForecasts, rows: Ints, steps: Ints) -> FloatArray:
        """Return mean, low and high [B, 3, V] of the first step of each forecast, as ``expectations`` does.

        Args:
            found: B forecasts, with quantiles as asked of the network for ``online.levels``.
            rows: [B], new row that each is for.
            steps: [B], from 0; always 0, since rows are taken one by one.
        """
        assert not steps.any()  # models that jump over rows are not carried with online intervals
        placed = self.buffer.located(found, self.new.owner.numpy()[rows])
        bounds = interval_bounds(self.buffer.artifact, placed, self.online.levels, self.panel)
        found = replace(found, quantiles=bounds)
        band = np.full((len(rows), 3, self.new.judged.shape[1]), np.nan)
        for cutoff in np.unique(self.cutoff[rows]):
            here = np.flatnonzero(self.cutoff[rows] == cutoff)
            self._learn(rows[here])
            for waits in (True, False):
                part = here[self.teaches[rows[here]] == waits]
                if len(part):
                    band[part] = self._issue(pick(found, part), rows[part], waits)
        return band

    def finish(self) -> OnlineIntervals:
        """Learn from the rows left and return what is known after all of them."""
        count = self.new.count.numpy()
        ends = self.buffer.last.numpy() + count
        for end in np.unique(ends[count > self._learned]):
            who = np.flatnonzero((ends == end) & (count > self._learned))
            self._take(who, count[who], int(end))
        return self.online

    def _learn(self, rows: Ints) -> None:
        """Look at what came before these new rows, all of one cutoff."""
        done, who = self.new.done.numpy()[rows], self.new.owner.numpy()[rows]
        if self.buffer.coupled:  # one clock: series that get no forecast here have moved on all the same
            who = np.arange(len(self.buffer.series))
            done = np.full(len(who), done[0])
        self._take(who, done, int(self.cutoff[rows[0]]))

    def _take(self, who: Ints, done: Ints, now: int) -> None:
        """Judge what series ``who`` showed in the first ``done`` of their new rows, as far as that is news."""
        first = self._learned[who]
        count = done - first
        self._learned[who] = done
        if not count.any():
            return
        owner = np.repeat(who, count)
        turn = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count - first, count)
        grid, variates = self.buffer.artifact.grid, self.buffer.artifact.schema.targets
        actual = self._actual[self.new.start.numpy()[owner] + turn]
        row, column = np.nonzero(~np.isnan(actual))
        names = pl.Series("series_id", self.buffer.series, dtype=pl.String)
        table = pl.DataFrame(
            [
                names.gather(owner[row]),
                pl.Series("variate", variates, dtype=pl.String).gather(column),
                grid.time_at(self.buffer.last.numpy()[owner[row]] + 1 + turn[row]),
                pl.Series("actual", actual[row, column]),
            ]
        )
        self.online.state.update(table, grid.time_at(now), series=names.gather(who).to_list())

    def _issue(self, found: WindowForecasts, rows: Ints, waits: bool) -> FloatArray:
        """Return mean and interval [B, 3, V] of the first step; all steps wait for their targets where ``waits``.

        The forecasts hold published quantiles.
        """
        if not waits:
            found = first_steps(found, 1)
        levels = self.online.levels
        told = replace(
            found,
            series_index=self.new.owner.numpy()[rows],
            cutoff_index=self.cutoff[rows] + 1,
        )
        table = forecast_table(told, self._names, levels)
        adapted, status = self.online.state.issue(table, wait=waits)
        shape = found.mean.shape
        infinite = (status[self._status] == "infinite").to_numpy().reshape(shape)[:, 0]
        bounds = []
        for column in (quantile_column(level) for level in self.shown):
            bound, given = (part[column].to_numpy().reshape(shape)[:, 0] for part in (adapted, table))
            known = infinite | np.isfinite(bound) | np.isfinite(given)  # else it was infinite from the start
            bounds.append(np.where(known, bound, np.nan))
        return np.stack([found.mean[:, 0], *bounds], axis=1)
