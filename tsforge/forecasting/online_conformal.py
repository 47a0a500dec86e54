"""Intervals that go on learning: online conformal inference on top of published forecast quantiles.

For every series (or all together), step, variate and central interval a cell keeps the last n scores and a number that
answers to its own misses. The score of a target y is how far it lies outside the published interval [l, u], in widths
of it: max(l - y, y - u) / (u - l) (Sesia & Candes 2020, CQR-r). It is free of units, never below -1/2, and needs no
network: forecasts and what came are enough, so any model can be adapted afterwards.

What is learned. With ``method=tracking`` (``online_rules``) the logarithm of a correction of the margin. With
``method=aci`` a level: alpha <- alpha + rate (miss rate wanted - missed) (Gibbs & Candes 2021, Eq. 2), and several
side by side are aggregated as in Gibbs & Candes (2024, JMLR 25, "DtACI", Algorithm 1): experts are
weighted by the pinball loss of their alpha against beta, the level at which the interval would just have missed; the
alpha used is the weighted mean (their deterministic variant). With one rate this is plain ACI.

Delay. The target of step h is known h steps after the cutoff, so an interval issued at a cutoff is judged when its
target is there, never before, against the alpha and the sample it was issued with. With d intervals of a cell
outstanding, alpha stays within [-(1 + d) rate, 1 + (1 + d) rate], so that plain ACI misses within
(max(alpha_1, 1 - alpha_1) + (1 + d) rate) / (rate T) of the rate wanted over T judged intervals, whatever the data
(Prop. 4.1 with a delay; d = 0 is the proposition).

Deviations. (1) Pooled series learn once per cutoff, by the mean of their misses. (2) Until a cell has enough scores,
the published interval stands and what is learned rests. (3) ``cap`` replaces infinite intervals by the largest score
and keeps alpha in [0, 1]; the bound above is lost. (4) Bounds that would cross between levels are pushed outwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.atomic import atomic_directory
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, DataError
from tsforge.forecasting.conformal_scores import nested
from tsforge.forecasting.online_rules import (
    FloatArray,
    IntArray,
    OnlineConfig,
    corrected,
    least,
    next_correction,
    position,
    stored_settings,
    weight_rate,
)
from tsforge.metrics.summary import central_intervals, quantile_name

FORMAT = 2
STATUSES = ("static", "adapted", "infinite", "capped", "none")
_KEY = ("series_id", "variate", "step", "level")
_ISSUE = ("series_id", "variate", "step", "level", "cutoff")
_CHUNK = 4_000_000  # scores gathered at once


@dataclass(frozen=True)
class _Levels:
    """The central intervals of a table, widest first, and the columns of their bounds."""

    coverage: tuple[float, ...]
    low: tuple[str, ...]
    high: tuple[str, ...]
    median: str | None

    @classmethod
    def of(cls, table: pl.DataFrame) -> _Levels:
        levels = sorted(float(name[1:]) for name in table.columns if _is_quantile(name))
        found = central_intervals(levels)
        if not found:
            raise DataError(
                "the forecasts hold no interval to adapt: no pair of quantile columns such as q0.1 and q0.9"
            )
        return cls(
            coverage=tuple(cover for cover, _, _ in found),
            low=tuple(quantile_name(low) for _, low, _ in found),
            high=tuple(quantile_name(high) for _, _, high in found),
            median=quantile_name(0.5) if 0.5 in levels else None,
        )

    @property
    def columns(self) -> list[str]:
        """Quantile columns in ascending order."""
        return [*self.low, *([self.median] if self.median else []), *self.high[::-1]]


def _is_quantile(name: str) -> bool:
    try:
        return name[:1] == "q" and 0.0 < float(name[1:]) < 1.0
    except ValueError:
        return False


@dataclass
class OnlineConformal:
    """State of all cells and of the intervals that wait for their target; ``update`` and ``issue`` take turns.

    Attributes:
        config: how it learns.
        cells: one row a cell: ``series_id`` ("" when pooled), ``variate, step, level`` (nominal coverage).
        alpha, weight: [C, K], what each rate has learned (a level, or the logarithm of a correction) and its weight.
        scores: [C, capacity], ring of the newest scores: the i-th ever sits at i modulo capacity.
        count: [C], scores ever taken in.
        pending: issued, not yet judged: keys, ``time, expires, cell, low, high`` (base), ``seen`` (scores at issue),
            ``adapted`` and ``alpha`` (list, at issue).
        tally: how many intervals had which status, were judged, or given up.
    """

    config: OnlineConfig = field(default_factory=OnlineConfig)
    cells: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_CELLS))
    alpha: FloatArray = field(init=False)
    weight: FloatArray = field(init=False)
    scores: FloatArray = field(init=False)
    count: IntArray = field(init=False)
    pending: pl.DataFrame | None = None
    _last: tuple[tuple[float, ...], pl.DataFrame, IntArray] | None = field(default=None, init=False, repr=False)
    tally: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*STATUSES, "judged", "given_up"), 0))

    def __post_init__(self) -> None:
        number, rates = self.cells.height, len(self.config.steps)
        self.alpha = self.config.beginning(1.0 - self.cells["level"].to_numpy())
        self.weight = np.full((number, rates), 1.0 / rates)
        self.scores = np.zeros((number, self.config.window))
        self.count = np.zeros(number, dtype=np.int64)

    # ---- learning

    def update(self, actuals: pl.DataFrame, now: Any, *, series: Sequence[str] | None = None) -> int:
        """Judge the waiting intervals whose target is there and return how many.

        Args:
            actuals: ``series_id, variate, time, actual``; missing values are null.
            now: last time that is known; targets not there a while after their time are given up.
            series: those whose clock shows ``now``; the intervals of others are left alone. Default all.

        Raises:
            DataError: ``actuals`` holds values later than ``now``.
        """
        late = actuals.filter(pl.col("time") > now).height
        if late:
            raise DataError(f"{late} of {actuals.height} actual values are later than {now}; nothing later may be read")
        if self.pending is None or not self.pending.height:
            return 0
        known = actuals.drop_nulls("actual").filter(pl.col("actual").is_finite())
        concerned, others = self.pending, self.pending.clear()
        if series is not None:
            mine = pl.col("series_id").is_in(list(series))
            concerned, others = self.pending.filter(mine), self.pending.filter(~mine)
        found = concerned.join(
            known.select("series_id", "variate", "time", "actual").unique(["series_id", "variate", "time"]),
            on=["series_id", "variate", "time"],
            how="left",
            maintain_order="left",
        )
        arrived = found.filter(pl.col("actual").is_not_null())
        self._make_room(arrived["cell"].to_numpy())
        waiting = found.filter(pl.col("actual").is_null()).drop("actual")
        kept = waiting.filter(pl.col("expires") >= now)
        self.pending = pl.concat([others, kept])
        self.tally["given_up"] += waiting.height - kept.height
        for part in arrived.sort("cutoff", "cell", "series_id").partition_by("cutoff", maintain_order=True):
            self._learn(part)
        self.tally["judged"] += arrived.height
        return arrived.height

    def _learn(self, part: pl.DataFrame) -> None:
        """Take in the targets of one cutoff."""
        cell, seen = part["cell"].to_numpy(), part["seen"].to_numpy()
        low, high, actual = (part[name].to_numpy() for name in ("low", "high", "actual"))
        score = np.maximum(low - actual, actual - high) / _width(low, high)
        judged = np.flatnonzero(part["adapted"].to_numpy())
        if len(judged):
            alpha = part["alpha"].to_numpy()[judged]
            self._adjust(cell[judged], seen[judged], score[judged], alpha)
        order = np.argsort(cell, kind="stable")  # several series of a pool may fall into one cell
        cell, score = cell[order], score[order]
        first = np.r_[True, cell[1:] != cell[:-1]]
        rank = np.arange(len(cell)) - np.maximum.accumulate(np.where(first, np.arange(len(cell)), 0))
        self.scores[cell, (self.count[cell] + rank) % self.scores.shape[1]] = score
        np.add.at(self.count, cell, 1)

    def _adjust(self, cell: IntArray, seen: IntArray, score: FloatArray, alpha: FloatArray) -> None:
        """Let these cells learn, each from the mean over its rows; ``alpha``: what an interval was issued with."""
        level = self.cells["level"].to_numpy()
        missed, loss = self._judge(cell, seen, score, alpha, 1.0 - level[cell][:, None])
        where, index, times = np.unique(cell, return_inverse=True, return_counts=True)
        missed_share, mean_loss = np.zeros((len(where), alpha.shape[1])), np.zeros((len(where), alpha.shape[1]))
        np.add.at(missed_share, index, missed)
        np.add.at(mean_loss, index, loss)
        missed_share, mean_loss = missed_share / times[:, None], mean_loss / times[:, None]
        target = 1.0 - level[where][:, None]
        if self.config.method == "tracking":
            since = np.bincount(index, weights=self.count[cell] - seen) / times  # scores of the cell since the issue
            step = self.config.steps[0] / (1.0 + since / times)
            self.alpha[where] = next_correction(self.alpha[where], missed_share, target, step[:, None])
            return
        weight = self.weight[where] * np.exp(-weight_rate(target, self.config) * mean_loss)
        weight /= weight.sum(axis=1, keepdims=True)
        mixing = 1.0 / (2.0 * self.config.memory)
        self.weight[where] = (1.0 - mixing) * weight + mixing / alpha.shape[1]
        moved = self.alpha[where] + np.asarray(self.config.steps) * (target - missed_share)
        self.alpha[where] = np.clip(moved, 0.0, 1.0) if self.config.cap else moved

    def _judge(
        self, cell: IntArray, seen: IntArray, score: FloatArray, alpha: FloatArray, wanted: FloatArray
    ) -> tuple[NDArray[np.bool_], FloatArray]:
        """Return which intervals missed as each rate had issued them, and the loss of the rates, both [M, K]."""
        size = np.minimum(seen, self.config.window)
        if self.config.method == "tracking":
            margin = corrected(self._quantile(cell, seen, 1.0 - wanted[:, 0]), alpha[:, 0])
            return (score > margin)[:, None], np.zeros_like(alpha)
        at_least = np.empty(len(cell), dtype=np.int64)
        for rows in _chunks(len(cell), self.config.window):
            sample = self._samples(cell[rows], seen[rows])
            at_least[rows] = ((sample >= score[rows, None]) & np.isfinite(sample)).sum(axis=1)
        beta = ((1 + at_least) / (size + 1))[:, None]
        # alpha >= beta, with the rounding of the rank, so that what is judged is the interval that was issued
        missed = position(size[:, None], alpha) <= (size - at_least)[:, None]
        if self.config.cap:
            missed |= (at_least == 0)[:, None]
        return missed, wanted * (beta - alpha) - np.minimum(0.0, beta - alpha)

    def _samples(self, cell: IntArray, seen: IntArray) -> FloatArray:
        """Return the newest scores [M, window] that a cell had when ``seen`` of them had come; infinite where none."""
        back = np.arange(1, self.config.window + 1)
        index = seen[:, None] - back
        return np.where(index >= 0, self.scores[cell[:, None], index % self.scores.shape[1]], np.inf)

    def _make_room(self, arrived: IntArray) -> None:
        """Let the rings hold every score that a waiting interval was issued with while new ones come in."""
        if self.pending is None or not self.pending.height:
            return
        more = np.bincount(arrived, minlength=self.cells.height)
        cell, seen = self.pending["cell"].to_numpy(), self.pending["seen"].to_numpy()
        needed = self.config.window + int((self.count[cell] + more[cell] - seen).max())
        capacity = self.scores.shape[1]
        if needed > capacity:
            self._relay(max(needed, 2 * capacity))

    def _relay(self, capacity: int) -> None:
        old = self.scores.shape[1]
        ring = np.zeros((len(self.count), capacity))
        index = self.count[:, None] - np.arange(1, old + 1)
        row, column = np.nonzero(index >= 0)
        ring[row, index[row, column] % capacity] = self.scores[row, index[row, column] % old]
        self.scores = ring

    # ---- issuing

    def issue(self, forecasts: pl.DataFrame, *, wait: bool = True) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the forecasts with adapted quantiles, and the status of every interval; their targets are waited for.

        Args:
            forecasts: ``series_id, cutoff, step, time, variate`` and quantile columns in pairs; rows with a missing
                quantile stay as they are.
            wait: False for intervals that nothing is learned from: their targets are not waited for, and the tally
                does not count them.

        Returns:
            The table, and ``series_id, cutoff, step, time, variate`` with a column ``status_C`` for each central
            interval of C percent: ``static`` (too few scores yet), ``adapted``, ``infinite`` (``aci``: alpha asks for
            more than the sample holds), ``capped``, ``none`` (no finite interval to start from).

        Raises:
            DataError: no pair of quantile columns.
        """
        levels = _Levels.of(forecasts)
        low, high = _bases(forecasts, levels)
        bounds = np.stack([forecasts[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in levels.columns], 1)
        usable = np.isfinite(low) & np.isfinite(high)
        rows = self._locate(forecasts, levels)
        statuses = {}
        waiting = []
        for place, coverage in enumerate(levels.coverage):
            use = np.flatnonzero(usable[:, place] & ~np.isnan(bounds[:, place]))
            cell = rows[use, place]
            margin, status, used = self._margins(cell, coverage)
            width = _width(low[use, place], high[use, place])
            found = np.full(forecasts.height, STATUSES.index("none"))
            found[use] = status
            statuses[f"status_{100 * coverage:g}"] = pl.Series(STATUSES).gather(found)
            changed = status != STATUSES.index("static")
            bounds[use[changed], place] = (low[use, place] - margin * width)[changed]
            bounds[use[changed], -1 - place] = (high[use, place] + margin * width)[changed]
            if not wait:
                continue
            waiting.append(self._waiting(forecasts[use], coverage, cell, low[use, place], high[use, place], used))
            for code, name in enumerate(STATUSES):
                self.tally[name] += int((found == code).sum())
        whole = ~np.isnan(bounds).any(axis=1)
        bounds[whole] = nested(bounds[whole])
        if wait:
            self._wait(pl.concat(waiting))
        adapted = forecasts.with_columns(
            pl.Series(name, bounds[:, place]).fill_nan(None) for place, name in enumerate(levels.columns)
        )
        status_table = forecasts.select("series_id", "cutoff", "step", "time", "variate").with_columns(**statuses)
        return adapted, status_table

    def _margins(self, cell: IntArray, coverage: float) -> tuple[FloatArray, IntArray, NDArray[np.bool_]]:
        """Return margin in widths, status and whether alpha counts, for cells of one coverage."""
        seen = self.count[cell]
        size = np.minimum(seen, self.config.window)
        adapted = size >= max(self.config.start, least(coverage))
        status = np.where(adapted, STATUSES.index("adapted"), STATUSES.index("static"))
        if self.config.method == "tracking":
            margin = np.zeros(len(cell))
            use = np.flatnonzero(adapted)
            quantile = self._quantile(cell[use], seen[use], np.full(len(use), coverage))
            margin[use] = corrected(quantile, self.alpha[cell[use], 0])
            return margin, status, adapted
        alpha = (self.weight[cell] * self.alpha[cell]).sum(axis=1)
        rank = np.ceil(position(size, alpha)).astype(np.int64)
        margin = np.where(rank <= 0, -0.5, self._ranked(cell, seen, rank))
        beyond = adapted & (rank > size)
        if not self.config.cap:
            margin = np.where(beyond, np.inf, margin)
        status[beyond] = STATUSES.index("capped" if self.config.cap else "infinite")
        return margin, status, adapted

    def _quantile(self, cell: IntArray, seen: IntArray, coverage: FloatArray) -> FloatArray:
        """Return the conformal quantile [M] of the scores that cells had when ``seen`` of them had come."""
        size = np.minimum(seen, self.config.window)
        return self._ranked(cell, seen, np.ceil(position(size, 1.0 - coverage)).astype(np.int64))

    def _ranked(self, cell: IntArray, seen: IntArray, rank: IntArray) -> FloatArray:
        """Return the score of each rank [M], the least and the largest for ranks outside."""
        found, size = np.empty(len(cell)), np.minimum(seen, self.config.window)
        for rows in _chunks(len(cell), self.config.window):
            ordered = np.sort(self._samples(cell[rows], seen[rows]), axis=1)
            top = np.clip(np.minimum(rank[rows], size[rows]) - 1, 0, None)
            found[rows] = np.take_along_axis(ordered, top[:, None], axis=1)[:, 0]
        return found

    def _locate(self, forecasts: pl.DataFrame, levels: _Levels) -> IntArray:
        """Return the cell of every row and interval [R, P]; new ones are added."""
        group = pl.lit("") if self.config.pool == "series" else pl.col("series_id")
        keys = forecasts.select(group.alias("series_id"), "variate", pl.col("step").cast(pl.Int32))
        if self._last is not None and self._last[0] == levels.coverage and self._last[1].equals(keys):
            return self._last[2]  # one cutoff asks for the same cells as the one before
        wanted = keys.join(pl.DataFrame({"level": levels.coverage}), how="cross", maintain_order="left_right")
        fresh = wanted.unique(maintain_order=True).join(self.cells, on=_KEY, how="anti", maintain_order="left")
        if fresh.height:
            self.cells = pl.concat([self.cells, fresh.select(_KEY)])
            rates = len(self.config.steps)
            self.alpha = np.concatenate([self.alpha, self.config.beginning(1.0 - fresh["level"].to_numpy())])
            self.weight = np.concatenate([self.weight, np.full((fresh.height, rates), 1.0 / rates)])
            self.scores = np.concatenate([self.scores, np.zeros((fresh.height, self.scores.shape[1]))])
            self.count = np.concatenate([self.count, np.zeros(fresh.height, dtype=np.int64)])
        found = wanted.join(self.cells.with_row_index("cell"), on=_KEY, how="left", maintain_order="left")
        places = found["cell"].cast(pl.Int64).to_numpy().reshape(forecasts.height, len(levels.coverage))
        self._last = levels.coverage, keys, places
        return places

    def _waiting(
        self,
        rows: pl.DataFrame,
        coverage: float,
        cell: IntArray,
        low: FloatArray,
        high: FloatArray,
        adapted: NDArray[np.bool_],
    ) -> pl.DataFrame:
        columns = {
            "level": pl.Series(np.full(rows.height, coverage)),
            "cell": pl.Series(cell),
            "low": pl.Series(low),
            "high": pl.Series(high),
            "seen": pl.Series(self.count[cell]),
            "adapted": pl.Series(adapted),
            "alpha": pl.Series(self.alpha[cell], dtype=pl.Array(pl.Float64, self.alpha.shape[1])),
        }
        span = pl.col("time").max().over("series_id", "cutoff") - pl.col("cutoff")
        keys = rows.select(
            "series_id",
            "variate",
            pl.col("step").cast(pl.Int32),
            "cutoff",
            "time",
            (pl.col("time") + span * self.config.patience).alias("expires"),
        )
        return keys.with_columns(**columns).select(
            *_ISSUE, "time", "expires", "cell", "low", "high", "seen", "adapted", "alpha"
        )

    def _wait(self, issued: pl.DataFrame) -> None:
        """Remember what was issued; a forecast from a cutoff that waits already is not counted a second time."""
        if self.pending is None or not self.pending.height:
            self.pending = issued
            return
        fresh = issued.join(self.pending, on=_ISSUE, how="anti", maintain_order="left")
        self.pending = pl.concat([self.pending, fresh])

    # ---- keeping

    def copy(self) -> OnlineConformal:
        """Return a state that goes on from here and leaves this one as it is."""
        other = copy.copy(self)  # tables are never changed in place
        other.alpha, other.weight = self.alpha.copy(), self.weight.copy()
        other.scores, other.count = self.scores.copy(), self.count.copy()
        other.tally = dict(self.tally)
        return other

    def tables(self) -> dict[str, pl.DataFrame]:
        """Return the whole state as two long tables, ``cells`` and ``pending``; ``from_tables`` takes them back."""
        oldest = self.count - self.config.window
        if self.pending is not None and self.pending.height:
            cell, seen = self.pending["cell"].to_numpy(), self.pending["seen"].to_numpy()
            np.minimum.at(oldest, cell, seen - self.config.window)
        oldest = np.maximum(oldest, 0)
        capacity = self.scores.shape[1]
        kept = [
            self.scores[row, np.arange(first, last) % capacity].tolist()
            for row, (first, last) in enumerate(zip(oldest, self.count, strict=True))
        ]
        numbers = pl.Array(pl.Float64, self.alpha.shape[1])
        cells = self.cells.with_columns(
            pl.Series("alpha", self.alpha, dtype=numbers),
            pl.Series("weight", self.weight, dtype=numbers),
            pl.Series("scores", kept, dtype=pl.List(pl.Float64)),
            pl.Series("count", self.count),
        )
        return {"cells": cells, "pending": pl.DataFrame() if self.pending is None else self.pending}

    @classmethod
    def from_tables(
        cls, config: OnlineConfig, tables: Mapping[str, pl.DataFrame], tally: Mapping[str, int] | None = None
    ) -> OnlineConformal:
        """Return the state that ``tables`` described; it goes on bit for bit like the one they came from.

        Raises:
            ArtifactError: the tables belong to other rates.
        """
        cells, pending = tables["cells"], tables["pending"]
        state = cls(config=config, cells=cells.select(_KEY), pending=pending if pending.width else None)
        if tally is not None:
            state.tally.update(tally)
        if not cells.height:
            return state
        state.alpha, state.weight = cells["alpha"].to_numpy().copy(), cells["weight"].to_numpy().copy()
        if state.alpha.shape != (cells.height, len(config.steps)):
            raise ArtifactError(
                f"the online state holds {state.alpha.shape[-1]} rates, the settings {len(config.steps)}; start anew"
            )
        state.count = cells["count"].to_numpy().copy()
        kept = cells["scores"].list.len().cast(pl.Int64).to_numpy()
        state.scores = np.zeros((cells.height, max(config.window, int(kept.max()))))
        row = np.repeat(np.arange(cells.height), kept)
        age = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)  # place within the kept scores of its cell
        index = (state.count - kept)[row] + age
        state.scores[row, index % state.scores.shape[1]] = cells["scores"].explode().drop_nulls().to_numpy()
        return state

    def save(self, path: Path) -> None:
        """Write the state as a folder, whole or not at all; an older one is replaced.

        Raises:
            BackendError: the place is read-only or the disk is full; the older folder stays.
        """
        with atomic_directory(Path(path), replace=True) as folder:
            hashes = {}
            for name, table in self.tables().items():
                table.write_parquet(folder / f"{name}.parquet")
                hashes[name] = hashlib.sha256((folder / f"{name}.parquet").read_bytes()).hexdigest()
            about = {"format": FORMAT, "config": self.config.model_dump(mode="json"), "tally": self.tally}
            (folder / "online.json").write_text(json.dumps({**about, "sha256": hashes}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> OnlineConformal:
        """Return the state in a folder.

        Raises:
            ArtifactError: missing, damaged, or of a newer format.
        """
        path = Path(path)
        try:
            about = json.loads((path / "online.json").read_text())
            contents = {name: (path / f"{name}.parquet").read_bytes() for name in about["sha256"]}
            version, hashes = int(about["format"]), about["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} holds no readable online state ({error}); restore a copy or start") from error
        if version > FORMAT:
            raise ArtifactError(f"{path} has format {version}; this tsforge reads up to {FORMAT}, upgrade it")
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != hashes[name]:
                raise ArtifactError(f"{path / name}.parquet is damaged: its SHA-256 differs; restore a copy")
        tables = {name: pl.read_parquet(content) for name, content in contents.items()}
        return cls.from_tables(validate(OnlineConfig, stored_settings(about["config"])), tables, about["tally"])


_CELLS: dict[str, type[pl.DataType]] = {
    "series_id": pl.String,
    "variate": pl.String,
    "step": pl.Int32,
    "level": pl.Float64,
}


def _width(low: FloatArray, high: FloatArray) -> FloatArray:
    """Return the width of base intervals, kept from 0 so that scores stay finite."""
    return np.maximum(high - low, 1e-9 * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1e-30))


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, _CHUNK // width)
    return [slice(first, first + step) for first in range(0, rows, step)]


def _bases(forecasts: pl.DataFrame, levels: _Levels) -> tuple[FloatArray, FloatArray]:
    """Return base bounds [R, P]: those published, or where infinite those of the widest finite interval within."""
    low = np.stack([forecasts[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in levels.low], axis=1)
    high = np.stack([forecasts[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in levels.high], axis=1)
    for place in range(low.shape[1] - 2, -1, -1):  # widest first: from the inside outwards
        infinite = np.isinf(low[:, place]) | np.isinf(high[:, place])
        low[infinite, place], high[infinite, place] = low[infinite, place + 1], high[infinite, place + 1]
    return low, high
