"""Aggregated series made from the bottoms of a hierarchy, and the check of those that the data already holds.

An aggregate is missing wherever one of its bottoms is: a sum over some of its parts would be a level shift that no
model could tell from a real one. Covariates of an aggregated series are the mean over the bottoms that have a value
(exactly the common value where all agree, as for a calendar); so are static columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Ints, show_time
from tsforge.data.hierarchy import Floats, Hierarchy, HierarchyConfig, build_hierarchy

_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SumCheck:
    """How well one given aggregate equals what its bottoms make it.

    Attributes:
        node: its name.
        cells: observed cells that could be compared.
        violations: how many of them differ by more than the tolerance.
        worst: largest difference, in data units.
        where: variate (or series) and time of that cell.
    """

    node: str
    cells: int
    violations: int
    worst: float
    where: str


def frame_hierarchy(frame: SeriesFrame, config: HierarchyConfig) -> Hierarchy:
    """Return the hierarchy of a frame's series or target variates.

    Raises:
        DataError: see ``build_hierarchy``.
    """
    names = frame.series_ids if config.over == "series" else frame.schema.targets
    return build_hierarchy(config, names, frame.static)


def with_aggregates(frame: SeriesFrame, config: HierarchyConfig) -> SeriesFrame:
    """Return the frame with every aggregate of the hierarchy; those it holds are checked against their bottoms.

    Raises:
        DataError: given aggregates differ from their bottoms (``config.given`` decides), one that is to be made has no
            row at which all its bottoms are observed, or the hierarchy does not fit the data.
    """
    hierarchy = frame_hierarchy(frame, config)
    held = set(frame.series_ids if config.over == "series" else frame.schema.targets)
    given = [name for name in hierarchy.nodes[: hierarchy.num_aggregates] if name in held]
    if given and config.given != "rebuild":
        _judge([check for check in check_sums(frame, hierarchy, config.tolerance) if check.violations], config)
    made = [
        name for name in hierarchy.nodes[: hierarchy.num_aggregates] if name not in held or config.given == "rebuild"
    ]
    if not made:
        return frame
    return (_add_series if config.over == "series" else _add_variates)(frame, hierarchy, made)


def _judge(failed: Sequence[SumCheck], config: HierarchyConfig) -> None:
    if not failed:
        return
    worst = max(failed, key=lambda check: check.worst)
    text = (
        f"hierarchy: {len(failed)} given aggregate(s) differ from their bottoms "
        f"({listing([f'{check.node}: {check.violations} of {check.cells} cells' for check in failed], 3)}; worst "
        f"{worst.worst:.6g} at {worst.where})"
    )
    if config.given == "error":
        raise DataError(f"{text}; repair the data, or set hierarchy.given=warn or rebuild, or a larger tolerance")
    _LOG.warning("%s", text)


def check_sums(frame: SeriesFrame, hierarchy: Hierarchy, tolerance: float) -> list[SumCheck]:
    """Return for each aggregate in the frame how many observed cells differ from what the bottoms make them.

    Args:
        frame: the data; cells of which a bottom or the aggregate is missing cannot be compared.
        hierarchy: what adds up to what.
        tolerance: relative to the weighted sum of absolute values of the bottoms.
    """
    held = set(frame.series_ids if hierarchy.over == "series" else frame.schema.targets)
    given = [n for n, name in enumerate(hierarchy.nodes[: hierarchy.num_aggregates]) if name in held]
    if not given:
        return []
    targets = list(frame.schema.targets)
    if hierarchy.over == "variates":
        values = frame.table.select(hierarchy.bottoms).fill_null(np.nan).to_numpy()
        weights = hierarchy.summing[given]
        made, size = np.asarray((weights @ values.T).T), np.asarray((weights @ np.abs(values).T).T)
        held_values = frame.table.select([hierarchy.nodes[n] for n in given]).fill_null(np.nan).to_numpy()
        keys = frame.table.select("series_id", "time")
        return [
            _compared(hierarchy.nodes[n], held_values[:, k], made[:, k], size[:, k], tolerance, keys)
            for k, n in enumerate(given)
        ]
    signed, _ = _summed(frame, hierarchy, np.array(given), targets)
    absolute, _ = _summed(frame, hierarchy, np.array(given), targets, absolute=True)
    indptr, offset = frame.indptr, frame.offset
    place = {name: number for number, name in enumerate(frame.series_ids)}
    checks = []
    for k, node in enumerate(given):
        series = place[hierarchy.nodes[node]]
        rows = frame.table[int(indptr[series]) : int(indptr[series + 1])]
        held_values = rows.select(targets).fill_null(np.nan).to_numpy()
        span = slice(int(offset[series]), int(offset[series]) + rows.height)
        keys = pl.DataFrame(
            {
                "series_id": np.tile(targets, rows.height),
                "time": rows["time"].gather(np.repeat(np.arange(rows.height), len(targets))),
            }
        )
        checks.append(
            _compared(
                hierarchy.nodes[node],
                held_values.ravel(),
                signed[span, k].ravel(),
                absolute[span, k].ravel(),
                tolerance,
                keys,
            )
        )
    return checks


def _compared(node: str, held: Floats, made: Floats, size: Floats, tolerance: float, keys: pl.DataFrame) -> SumCheck:
    both = np.isfinite(held) & np.isfinite(made)
    difference = np.where(both, np.abs(np.nan_to_num(held) - np.nan_to_num(made)), 0.0)
    wrong = both & (difference > tolerance * np.maximum(np.nan_to_num(size), np.finfo(np.float64).tiny))
    worst = int(difference.argmax()) if len(difference) else 0
    where = f"{keys['series_id'][worst]}, {show_time(keys['time'][worst])}" if wrong.any() else ""
    return SumCheck(
        node=node,
        cells=int(both.sum()),
        violations=int(wrong.sum()),
        worst=float(difference.max(initial=0.0)),
        where=where,
    )


def _summed(
    frame: SeriesFrame, hierarchy: Hierarchy, nodes: Ints, columns: Sequence[str], *, absolute: bool = False
) -> tuple[Floats, int]:
    """Return the sums [T, nodes, columns] over bottoms on the frame's grid, NaN where one is missing, and T."""
    indptr, offset = frame.indptr, frame.offset
    place = {name: number for number, name in enumerate(frame.series_ids)}
    length = int((offset + np.diff(indptr)).max())
    sums = np.zeros((length, len(nodes), len(columns)))
    count = np.zeros(sums.shape, dtype=np.int32)
    weights = hierarchy.summing[nodes].tocsc()
    values = frame.table.select(columns).to_numpy()
    for bottom, name in enumerate(hierarchy.bottoms):
        series = place[name]
        part = slice(weights.indptr[bottom], weights.indptr[bottom + 1])
        inside, weight = weights.indices[part], weights.data[part]
        own = values[int(indptr[series]) : int(indptr[series + 1])]
        seen = np.isfinite(own)
        own = np.where(seen, np.abs(own) if absolute else own, 0.0)
        first = int(offset[series])
        for node, factor in zip(inside, weight, strict=True):
            sums[first : first + len(own), node] += factor * own
            count[first : first + len(own), node] += seen
    sizes = np.diff(hierarchy.summing[nodes].indptr)
    return np.where(count == sizes[None, :, None], sums, np.nan), length


def _covariates(frame: SeriesFrame, members: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Return ``time`` and the mean over some series of their covariates, exact where all agree."""
    rows = frame.table.lazy().filter(pl.col("series_id").is_in(list(members)))
    return rows.group_by("time").agg(map(_shared, columns)).collect()


def _shared(name: str) -> pl.Expr:
    low, high = pl.col(name).min(), pl.col(name).max()
    return pl.when(low == high).then(low).otherwise(pl.col(name).mean()).alias(name)


def _add_series(frame: SeriesFrame, hierarchy: Hierarchy, made: Sequence[str]) -> SeriesFrame:
    place = {name: position for position, name in enumerate(hierarchy.nodes)}
    nodes = np.array([place[name] for name in made], dtype=np.int64)
    schema = frame.schema
    sums, length = _summed(frame, hierarchy, nodes, schema.targets)
    times = frame.grid.time_at(np.arange(length))
    others = [*schema.past, *schema.known]
    replaced = set(made)
    tables = [frame.table.filter(~pl.col("series_id").is_in(list(replaced)))]
    own = np.asarray(frame.indptr), np.asarray(frame.offset), {n: k for k, n in enumerate(frame.series_ids)}
    empty = []
    for k, node in enumerate(nodes):
        name = hierarchy.nodes[node]
        found = np.flatnonzero(np.isfinite(sums[:, k]).any(axis=1))
        if not len(found):
            empty.append(name)
            continue
        members = [hierarchy.bottoms[j] for j in hierarchy.summing[[node]].indices]
        ends = [int(own[1][own[2][m]] + own[0][own[2][m] + 1] - own[0][own[2][m]]) for m in members]
        span = slice(int(found[0]), max(ends))  # rows after the last sum carry known covariates of the future
        values = {column: pl.Series(sums[span, k, c]).fill_nan(None) for c, column in enumerate(schema.targets)}
        table = pl.DataFrame({"time": times[span], **values}).with_columns(series_id=pl.lit(name))
        if others:
            table = table.join(_covariates(frame, members, others), on="time", how="left")
        tables.append(table.select("series_id", "time", *schema.columns))
    if empty:
        raise DataError(
            f"hierarchy: {len(empty)} aggregate(s) have no row at which all their bottoms are observed "
            f"({listing(empty)}); drop the bottoms that begin late or end early, or those levels"
        )
    return SeriesFrame(pl.concat(tables), schema, _static(frame, hierarchy, made), require_targets=False)


def _static(frame: SeriesFrame, hierarchy: Hierarchy, made: Sequence[str]) -> pl.DataFrame | None:
    if frame.static is None:
        return None
    place = {name: position for position, name in enumerate(hierarchy.nodes)}
    tables = [frame.static.filter(~pl.col("series_id").is_in(list(made)))]
    for name in made:
        members = [hierarchy.bottoms[j] for j in hierarchy.summing[[place[name]]].indices]
        rows = frame.static.filter(pl.col("series_id").is_in(members))
        tables.append(rows.select(pl.lit(name).alias("series_id"), *map(_shared, frame.schema.static)))
    return pl.concat(tables)


def _add_variates(frame: SeriesFrame, hierarchy: Hierarchy, made: Sequence[str]) -> SeriesFrame:
    place = {name: position for position, name in enumerate(hierarchy.nodes)}
    nodes = [place[name] for name in made]
    values = frame.table.select(hierarchy.bottoms).fill_null(np.nan).to_numpy()
    sums = np.asarray((hierarchy.summing[nodes] @ values.T).T)  # a missing variate spreads to its own sums only
    empty = [name for k, name in enumerate(made) if not np.isfinite(sums[:, k]).any()]
    if empty:
        raise DataError(f"hierarchy: no row has all variates that make up {listing(empty)}")
    columns = [pl.Series(name, sums[:, k]).fill_nan(None) for k, name in enumerate(made)]
    new = [name for name in made if name not in frame.schema.targets]
    schema = replace(frame.schema, targets=(*new, *frame.schema.targets))
    return SeriesFrame(frame.table.with_columns(columns), schema, frame.static, require_targets=False)
