"""Reconciled forecast tables: weights and margins from forecasts that were made, and graded, before the cutoff.

What decides the weights is a table of *held-out* forecasts: windows after the training span of the artifact whose whole
target lies before the cutoff. Nothing later is given to this module, so nothing later can matter. With conformal
intervals the earlier half of those windows decides the weights and the later half the margins: the margins then rest on
windows that the weights have not seen, and what the calibration of the artifact promised for base forecasts is replaced
by what the reconciled ones did. The first half of a fit's valid span may have stopped its training; that is the one
sense in which its errors are not quite held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import ndtri

from tsforge.artifact import Artifact
from tsforge.contracts.tables import quantile_column
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Bools, Ints
from tsforge.data.hierarchy import Hierarchy
from tsforge.data.panel import Panel
from tsforge.forecasting.conformal_scores import conformal_margin
from tsforge.forecasting.error_covariance import ErrorCovariance, Floats, error_correlation
from tsforge.forecasting.predict import mirrored_levels
from tsforge.forecasting.reconcile import NEEDS_ERRORS, SPLITTING, ReconcileConfig, Reconciliation, make_reconciliation
from tsforge.forecasting.report import BacktestReport

_LOG = get_logger(__name__)
_MAX_CELLS = 20_000_000  # held-out errors kept at once: 160 MB
MIN_WINDOWS = 4


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """A forecast table by node: one row of ``keys`` a cell, one column a node."""

    keys: pl.DataFrame
    cell: Ints
    node: Ints
    shape: tuple[int, int]

    def array(self, values: pl.Series) -> Floats:
        """Return a column as [cells, n], NaN where the table has no row or no value."""
        result = np.full(self.shape, np.nan)
        result[self.cell, self.node] = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
        return result


def _axes(hierarchy: Hierarchy) -> tuple[str, str]:
    """Return the column that names the nodes, and the one that tells separate hierarchies apart."""
    return ("series_id", "variate") if hierarchy.over == "series" else ("variate", "series_id")


def _cells(table: pl.DataFrame, hierarchy: Hierarchy) -> _Cells:
    node, other = _axes(hierarchy)
    place = {name: position for position, name in enumerate(hierarchy.nodes)}
    absent = sorted(set(hierarchy.nodes) - set(table[node].unique()))
    if absent:
        raise DataError(
            f"{len(absent)} of {len(place)} nodes of the hierarchy have no forecast ({listing(absent)}); forecast all "
            "of them (a history that is too short leaves one out)"
        )
    keys = [other, "cutoff", "step", "time"]
    found = table.select(keys).unique(maintain_order=True).with_row_index("cell")
    cell = table.select(keys).join(found, on=keys, how="left", maintain_order="left")["cell"]
    position = table[node].replace_strict(place, return_dtype=pl.Int64)
    return _Cells(
        keys=found.drop("cell"),
        cell=cell.cast(pl.Int64).to_numpy(),
        node=position.to_numpy(),
        shape=(found.height, len(place)),
    )


def held_out_cutoffs(
    artifact: Artifact, visible: SeriesFrame, steps: int, windows: int, nodes: int = 1
) -> tuple[NDArray[np.int64], bool]:
    """Return cutoffs (rows on the frame's grid) whose targets lie after the training span and before the data ends.

    Args:
        artifact: says where its training span ended.
        visible: the frame up to the cutoff that a forecast is wanted from.
        steps: horizon.
        windows: how many, evenly spaced, at most.
        nodes: nodes and variates together; the number of windows is bounded by memory.

    Returns:
        The cutoffs, and whether they are *in sample*: an artifact without a span after its training leaves only the
        rows it was trained on, which understate the errors; a warning says so.

    Raises:
        DataError: the rows are too few for 4 windows.
    """
    first_row, stop = Panel.from_frame(visible).span()
    shift = int(artifact.grid.index_of(pl.Series([visible.grid.time_at(0)], dtype=visible.table["time"].dtype))[0])
    last = stop - 1 - steps
    span = (artifact.provenance.get("span_rows") or {}).get("train")
    start = last + 1 if span is None else max(int(span[1]) - shift, first_row + artifact.window.context_length)
    in_sample = last - (start - 1) + 1 < MIN_WINDOWS
    if in_sample:
        start = first_row + artifact.window.context_length
        _LOG.warning(
            "artifact %s leaves fewer than %d windows between its training span and the cutoff: intervals and "
            "reconciliation rest on errors over rows it was trained on, which are too small",
            artifact.id,
            MIN_WINDOWS,
        )
    number = last - (start - 1) + 1
    if number < MIN_WINDOWS:
        raise DataError(
            f"reconciliation from past errors needs {MIN_WINDOWS} windows of {artifact.window.context_length} + "
            f"{steps} rows before the cutoff, the data has {max(number, 0)}; choose bottom_up, ols or "
            "wls_structural with intervals=none, or give more rows"
        )
    bound = max(MIN_WINDOWS, _MAX_CELLS // (steps * nodes))
    chosen = np.linspace(start - 1, last, min(number, windows, bound)).round().astype(np.int64)
    return np.unique(chosen), in_sample


def needs_held_out(config: ReconcileConfig, levels: Sequence[float]) -> bool:
    """Return whether a method rests on forecasts from before the cutoff."""
    return config.method in NEEDS_ERRORS or (bool(levels) and config.intervals != "none")


class Coherence:
    """What one artifact needs to publish coherent forecasts from one cutoff on.

    Args:
        hierarchy: the nodes.
        config: method and intervals.
        levels: quantile levels of the coherent table; ignored with ``intervals=none``.
        visible: the data up to the cutoff.
        held_out: forecasts with ``actual`` from windows before the cutoff, None where none are needed.
        in_sample: whether those were trained on.

    Raises:
        DataError: too few errors; ConfigError: the method does not fit the structure.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        config: ReconcileConfig,
        *,
        levels: Sequence[float],
        visible: SeriesFrame,
        held_out: pl.DataFrame | None = None,
        in_sample: bool = False,
    ) -> None:
        self.hierarchy, self.config = hierarchy, config
        self.levels = () if config.intervals == "none" else tuple(sorted(levels))
        self._other = _axes(hierarchy)[1]
        groups = visible.schema.targets if self._other == "variate" else visible.series_ids
        self._maps: dict[str, Reconciliation] = {}
        self._correlations: dict[str, ErrorCovariance] = {}
        self._margins: dict[str, dict[float, Floats]] = {}
        self.facts: dict[str, Any] = {
            "method": config.method,
            "nodes": len(hierarchy.nodes),
            "bottoms": hierarchy.num_bottoms,
            "intervals": config.intervals if self.levels else "none",
        }
        cells = None if held_out is None else _cells(held_out, hierarchy)
        shrinkage = {}
        for group in groups:
            weighed: Floats | None = None
            judged: tuple[Floats, Floats, Ints] | None = None
            if cells is not None and held_out is not None:
                weighed, judged = self._halves(group, cells, held_out)
            history = _history(visible, hierarchy, group) if self._splits_history else None
            found = make_reconciliation(config, hierarchy, errors=weighed, history=history)
            self._maps[group] = found
            if config.method == "mint" and found.covariance is not None:
                shrinkage[group] = round(found.covariance.shrinkage, 4)
            if self.levels and config.intervals == "gaussian" and weighed is not None:
                same = config.method == "mint" and bool(np.isfinite(weighed).all())
                self._correlations[group] = (
                    found.covariance if same and found.covariance else error_correlation(weighed)
                )
            if self.levels and config.intervals == "conformal" and judged is not None:
                self._margins[group] = self._calibrate(found, *judged)
        if shrinkage:
            self.facts["shrinkage"] = shrinkage
        if held_out is not None:
            self.facts |= {"held_out_windows": held_out["cutoff"].n_unique(), "in_sample": in_sample}
        self._warn_infinite()

    @property
    def _splits_history(self) -> bool:
        return self.config.method in SPLITTING and self.config.proportions == "historical"

    def _halves(
        self, group: str, cells: _Cells, held_out: pl.DataFrame
    ) -> tuple[Floats, tuple[Floats, Floats, Ints] | None]:
        """Return the errors that decide weights, and (base, actual, step) of the windows that decide margins."""
        mine = (cells.keys[self._other] == group).to_numpy()
        base, actual = (cells.array(held_out[name])[mine] for name in ("mean", "actual"))
        keys = cells.keys.filter(pl.Series(mine))
        cutoffs = keys["cutoff"].unique().sort()
        conformal = bool(self.levels) and self.config.intervals == "conformal"
        if not conformal:
            return actual - base, None
        use_all = self.config.method not in NEEDS_ERRORS
        middle = cutoffs[0] if use_all else cutoffs[len(cutoffs) // 2]
        late = (keys["cutoff"] >= middle).to_numpy()
        complete = np.isfinite(base).all(axis=1)
        rows = late & complete
        return (actual - base)[~late], (base[rows], actual[rows], keys["step"].to_numpy()[rows])

    def _calibrate(self, found: Reconciliation, base: Floats, actual: Floats, step: Ints) -> dict[float, Floats]:
        """Return the margin [H, n] of each central interval."""
        scores = np.abs(actual - found.apply(base))
        steps = int(step.max(initial=0))
        margins: dict[float, Floats] = {}
        for coverage in {round(abs(2.0 * level - 1.0), 9) for level in self.levels} - {0.0}:
            rows = [scores[step == number] for number in range(1, steps + 1)]
            margins[coverage] = np.stack([conformal_margin(part, np.isfinite(part), coverage)[0] for part in rows])
        return margins

    def _warn_infinite(self) -> None:
        bounds = [np.isinf(margin).mean() for table in self._margins.values() for margin in table.values()]
        if bounds and max(bounds) > 0:
            _LOG.warning(
                "%.0f%% of the margins of the reconciled intervals are infinite: too few held-out windows for their "
                "coverage; widen the valid span, raise reconcile.windows or ask for lower coverage",
                100.0 * float(np.mean(bounds)),
            )

    def apply(self, table: pl.DataFrame, *, drop_incomplete: bool = False) -> pl.DataFrame:
        """Return the table with coherent means and with the quantiles of ``levels``; other columns stay.

        Args:
            table: base forecasts of every node (``series_id, cutoff, step, time, variate, mean``), with their quantiles
                for Gaussian intervals.
            drop_incomplete: leave out times at which a node has no forecast, instead of refusing.

        Raises:
            DataError: nodes without a forecast.
            ConfigError: Gaussian intervals without base quantiles.
        """
        cells = _cells(table, self.hierarchy)
        base = cells.array(table["mean"])
        complete: Bools = np.asarray(np.isfinite(base).all(axis=1))
        if not complete.all() and not drop_incomplete:
            bad = [self.hierarchy.nodes[k] for k in np.flatnonzero(~np.isfinite(base).all(axis=0))]
            raise DataError(
                f"{int((~complete).sum())} of {len(base)} forecast times lack some node ({listing(bad)}); forecast all "
                "from one cutoff"
            )
        means = np.full(base.shape, np.nan)
        bounds = {level: np.full(base.shape, np.nan) for level in self.levels}
        deviation = self._deviation(table, cells) if self._correlations else None
        for group, found in self._maps.items():
            rows = complete & (cells.keys[self._other] == group).to_numpy()
            means[rows] = found.apply(base[rows])
            steps = cells.keys["step"].to_numpy()[rows]
            for level, spread in self._offsets(group, rows, steps, deviation).items():
                bound = means[rows] + spread
                bounds[level][rows] = np.maximum(bound, 0.0) if self.config.nonnegative else bound
        self._describe(base[complete], means[complete])
        names = [name for name in table.columns if name.startswith("q") and name[1:2].isdigit()]
        columns = {"mean": means, **{quantile_column(level): array for level, array in bounds.items()}}
        made = table.drop(names).with_columns(
            *(pl.Series(name, array[cells.cell, cells.node]).fill_nan(None) for name, array in columns.items())
        )
        order = [name for name in made.columns if name != "actual"] + (["actual"] if "actual" in made.columns else [])
        return made.select(order).filter(pl.Series(complete[cells.cell]))

    def _offsets(self, group: str, rows: Bools, steps: Ints, deviation: Floats | None) -> dict[float, Floats]:
        """Return what is added to the means [N, n] for each quantile level."""
        if group in self._correlations and deviation is not None:
            spread = self._maps[group].spread(deviation[rows], self._correlations[group])
            return {level: float(ndtri(level)) * spread for level in self.levels}
        offsets = {}
        for level in self.levels:
            coverage = round(abs(2.0 * level - 1.0), 9)
            margin = self._margins[group][coverage][steps - 1] if coverage else np.zeros((len(steps), 1))
            offsets[level] = np.broadcast_to(
                np.sign(level - 0.5) * margin if coverage else margin, (len(steps), len(self.hierarchy.nodes))
            )
        return offsets

    def _deviation(self, table: pl.DataFrame, cells: _Cells) -> Floats:
        """Return the standard deviation [cells, n] that the widest finite interval of the base would have if Normal."""
        offered = [name for name in table.columns if name.startswith("q") and name[1:2].isdigit()]
        levels = sorted(float(name[1:]) for name in offered)
        pairs = [(low, high) for low in levels for high in levels if low < 0.5 and abs(low + high - 1.0) < 1e-9]
        if not pairs:
            raise ConfigError("gaussian intervals need base forecasts with quantiles; choose intervals=conformal")
        result = np.full(cells.shape, np.nan)
        for low, high in pairs:
            width = cells.array(table[quantile_column(high)]) - cells.array(table[quantile_column(low)])
            found = width / (2.0 * ndtri(high))
            result = np.where(np.isfinite(result), result, np.where(np.isfinite(found), found, np.nan))
        if not np.isfinite(result).all():
            raise DataError("gaussian intervals need a finite base interval in every cell; choose intervals=conformal")
        return result

    def _describe(self, base: Floats, means: Floats) -> None:
        """Note by level how incoherent the base was, relative to the mean size of its forecasts."""
        first = self.hierarchy.num_aggregates
        gap = np.abs(self.hierarchy.incoherence(base))
        levels = np.array(self.hierarchy.levels[:first])
        self.facts["incoherence"] = {
            name: float(gap[:, levels == name].mean() / max(np.abs(base[:, :first][:, levels == name]).mean(), 1e-300))
            for name in dict.fromkeys(self.hierarchy.levels[:first])
        }
        self.facts["mean_change"] = float(np.abs(means - base).mean() / max(np.abs(base).mean(), 1e-300))


def _history(visible: SeriesFrame, hierarchy: Hierarchy, group: str) -> Floats:
    """Return the observed values [T, n] of all nodes in one variate (or series)."""
    if hierarchy.over == "variates":
        rows = visible.table.filter(pl.col("series_id") == group)
        return rows.select(hierarchy.nodes).fill_null(np.nan).to_numpy()
    indptr, offset = visible.indptr, visible.offset
    values = visible.table[group].fill_null(np.nan).to_numpy()
    place = {name: number for number, name in enumerate(visible.series_ids)}
    result = np.full((int((offset + np.diff(indptr)).max()), len(hierarchy.nodes)), np.nan)
    for column, name in enumerate(hierarchy.nodes):
        series = place[name]
        own = values[int(indptr[series]) : int(indptr[series + 1])]
        result[int(offset[series]) : int(offset[series]) + len(own), column] = own
    return result


def make_coherence(
    artifact: Artifact,
    visible: SeriesFrame,
    joint: tuple[Hierarchy, ReconcileConfig],
    wanted: tuple[int, Sequence[float]],
    forecasts: Callable[[NDArray[np.int64]], pl.DataFrame],
) -> Coherence:
    """Return the reconciliation of an artifact's forecasts from what was known at a cutoff.

    Args:
        artifact: the fitted network.
        visible: the data up to the cutoff, and nothing after it.
        joint: the nodes, and how they are reconciled.
        wanted: steps and quantile levels.
        forecasts: base forecasts of the artifact with ``actual`` from cutoffs on the grid of ``visible``.

    Raises:
        DataError: too few rows or errors; ConfigError: the method does not fit the structure.
    """
    hierarchy, config = joint
    steps, levels = wanted
    held_out, in_sample = None, False
    if needs_held_out(config, levels):
        nodes = len(visible.series_ids) * len(visible.schema.targets)
        cutoffs, in_sample = held_out_cutoffs(artifact, visible, steps, config.windows, nodes)
        held_out = forecasts(cutoffs)
    return Coherence(hierarchy, config, levels=levels, visible=visible, held_out=held_out, in_sample=in_sample)


def reconciled_name(model: str, config: ReconcileConfig) -> str:
    """Return what a report calls the reconciled forecasts of a model."""
    return f"{model}+{config.method}"


def base_levels(config: ReconcileConfig, offered: Sequence[float], asked: Sequence[float]) -> tuple[float, ...]:
    """Return the levels that base forecasts need: those of Gaussian intervals, else none."""
    if config.intervals != "gaussian" or not asked:
        return ()
    if not any(abs(low + high - 1.0) < 1e-9 for low in offered for high in offered if low < high):
        raise ConfigError("gaussian intervals need an artifact that offers quantiles; choose intervals=conformal")
    return mirrored_levels(offered)


def with_level_errors(report: BacktestReport, hierarchy: Hierarchy, config: ReconcileConfig) -> BacktestReport:
    """Return the report with the errors of every level before and after reconciliation, as settings and as notes."""
    models = report.leaderboard["model"].to_list()
    pairs = [(name, reconciled_name(name, config)) for name in models if reconciled_name(name, config) in models]
    records = level_errors(report.forecasts, hierarchy, pairs)
    notes = [
        f"{row['reconciled']}, level {row['level']}: mean absolute error {row['before']:.4g} before, "
        f"{row['after']:.4g} after reconciliation ({row['cells']} cells)"
        for row in records
    ]
    settings = {**report.settings, "reconciled_levels": records}
    return replace(report, settings=settings, notes=(*report.notes, *notes))


def level_errors(
    forecasts: pl.DataFrame, hierarchy: Hierarchy, pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return mean absolute errors by level before and after, over the observed cells that both have.

    A level of which nothing was observed has no record.

    Args:
        forecasts: ``model, series_id, variate, cutoff, step, mean, actual``.
        hierarchy: whose levels.
        pairs: (base model, reconciled model).
    """
    node, _ = _axes(hierarchy)
    level = pl.DataFrame({node: hierarchy.nodes, "level": hierarchy.levels})
    keys = ["series_id", "variate", "cutoff", "step"]
    records: list[dict[str, Any]] = []
    error = (pl.col("mean") - pl.col("actual")).abs()
    for base, after in pairs:
        before = forecasts.filter(model=base).select(*keys, before=error)
        both = forecasts.filter(model=after).select(*keys, after=error).join(before, on=keys).join(level, on=node)
        graded = both.drop_nulls(["before", "after"])
        grouped = graded.group_by("level", maintain_order=True).agg(pl.col("before", "after").mean(), cells=pl.len())
        order = {name: place for place, name in enumerate(hierarchy.level_names)}
        for row in sorted(grouped.to_dicts(), key=lambda row: order[row["level"]]):
            gain = None if not row["before"] else 1.0 - row["after"] / row["before"]
            records.append({"model": base, "reconciled": after, **row, "gain": gain})
    return records
