"""Reconciliation: errors before and after on real sums and means, and speed beside the dense formula.

Usage: python benchmarks/reconcile.py --data FOLDER [--out benchmarks/results/reconcile_HARDWARE_DATE] [--quick]

FOLDER holds ``forecast/household_power.parquet`` and ``forecast/beijing_air.parquet``. Household: hourly watt-hours of
three sub-meters and of the rest, which add up to what the house took. Beijing: PM2.5 of twelve stations and their mean,
which is missing wherever a station is. Base forecasts: closed-form linear maps, one for each node
(``weights=per_variate``), so that they do not add up; context 168, horizon 24; fitted once on the first 70 % of the
rows. Weights of a method come from daily windows of the next 15 %, errors are those of daily cutoffs in the last 15 %.
The interval of each gain is a bootstrap over blocks of seven cutoffs.

Speed: regions, districts and shops; weights and one day of hourly forecasts. The dense formula is
S (S' W^-1 S)^-1 S' W^-1 by Cholesky in double precision; both in one process, in turns, and equal to 1e-6. At 10,000
bottoms ours is timed alone: the dense formula would hold several matrices of 800 MB.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import polars as pl
import torch
from scipy import linalg

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.aggregates import frame_hierarchy, with_aggregates
from tsforge.data.frame import SeriesFrame
from tsforge.data.hierarchy import Hierarchy, HierarchyConfig, build_hierarchy
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.coherent import Coherence
from tsforge.forecasting.error_covariance import shrunk_covariance
from tsforge.forecasting.reconcile import ReconcileConfig, make_reconciliation
from tsforge.network import NetworkConfig

CONTEXT, HORIZON = 168, 24
ALONE = 10_000
METHODS = ("bottom_up", "top_down", "ols", "wls_structural", "wls_variance", "mint")


@dataclass(frozen=True)
class Pace:
    """How the methods are timed."""

    device: torch.device
    rounds: int
    least_seconds: float = 0.0


def household(folder: Path) -> tuple[SeriesFrame, HierarchyConfig]:
    """Return hourly watt-hours: three sub-meters, the rest, and the whole."""
    table = pl.read_parquet(folder / "forecast" / "household_power.parquet")
    names = {f"Sub_metering_{k}": name for k, name in ((1, "kitchen"), (2, "laundry"), (3, "heating"))}
    minutes = table.select(
        "ds",
        *(pl.col(old).cast(pl.Float64).alias(new) for old, new in names.items()),
        whole=pl.col("Global_active_power").cast(pl.Float64) * 1000.0 / 60.0,
    ).with_columns(rest=pl.col("whole") - pl.sum_horizontal(names.values()))
    parts = [*names.values(), "rest"]
    hours = minutes.group_by_dynamic("ds", every="1h").agg(
        pl.when(pl.col(part).count() >= 55).then(pl.col(part).mean() * 60.0).alias(part) for part in parts
    )
    structure = HierarchyConfig(
        over="variates",
        children={
            "house": tuple(parts),
        },
    )
    return with_aggregates(SeriesFrame.from_wide(hours, time="ds", freq="1h"), structure), structure


def beijing(folder: Path) -> tuple[SeriesFrame, HierarchyConfig]:
    """Return PM2.5 of twelve stations and their mean."""
    table = pl.read_parquet(folder / "forecast" / "beijing_air.parquet")
    stations = [name for name in table.columns if name.endswith(".PM2.5")]
    structure = HierarchyConfig(over="variates", aggregate="mean", children={"city": tuple(stations)})
    frame = SeriesFrame.from_wide(table.select("ds", *stations), time="ds")
    return with_aggregates(frame, structure), structure


def fitted(frame: SeriesFrame, rows: int) -> Artifact:
    """Return one linear map a node, fitted on the first rows."""
    model = {"name": "linear", "weights": "per_variate"}
    seen = frame.until(frame.grid.time_at(rows - 1))
    return fit_solved(
        seen, validate(NetworkConfig, {"model": model}), WindowSpec(context_length=CONTEXT, horizon=HORIZON)
    )


def gain(before: pl.DataFrame, after: pl.DataFrame) -> dict[str, float]:
    """Return mean absolute errors and the relative change with a 95 % interval over blocks of seven cutoffs."""
    keys = ["variate", "cutoff", "step"]
    error = (pl.col("mean") - pl.col("actual")).abs()
    both = before.select(*keys, one=error).join(after.select(*keys, two=error), on=keys).drop_nulls()
    daily = both.group_by("cutoff").agg(pl.col("one", "two").sum(), n=pl.len()).sort("cutoff")
    sums = daily.select("one", "two", "n").to_numpy()
    blocks = np.array([part.sum(axis=0) for part in np.array_split(sums, max(len(sums) // 7, 2))])
    rng = np.random.default_rng(0)
    drawn = blocks[rng.integers(len(blocks), size=(2000, len(blocks)))].sum(axis=1)
    low, high = np.percentile(1.0 - drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    one, two, number = sums.sum(axis=0)
    return {"before": one / number, "after": two / number, "gain": 1.0 - two / one, "low": low, "high": high}


def accuracy(name: str, frame: SeriesFrame, structure: HierarchyConfig, quick: bool) -> list[dict[str, Any]]:
    """Return errors before and after by method and level."""
    rows = frame.num_rows
    train, valid = int(0.7 * rows), int(0.85 * rows)
    artifact = fitted(frame, 2000 if quick else train)
    hierarchy = frame_hierarchy(frame, structure)
    visible = frame.until(frame.grid.time_at(valid - 1))
    stop = valid + 400 if quick else rows
    held = forecasts_at(artifact, visible, np.arange(train, valid - HORIZON, HORIZON), steps=HORIZON)
    test = forecasts_at(artifact, frame, np.arange(valid, stop - HORIZON, HORIZON), steps=HORIZON)
    found = []
    for method in METHODS:
        config = validate(ReconcileConfig, {"method": method, "intervals": "none"})
        coherence = Coherence(hierarchy, config, levels=(), visible=visible, held_out=held)
        table = coherence.apply(test)
        for level in hierarchy.level_names:
            nodes = [hierarchy.nodes[k] for k in hierarchy.at_level(level)]
            parts = [one.filter(pl.col("variate").is_in(nodes)) for one in (test, table)]
            found.append({"data": name, "method": method, "level": level, **gain(*parts)})
        found[-1]["incoherence"] = coherence.facts["incoherence"]
        _measure.tell(found[-1])
    return found


def dense(hierarchy: Hierarchy, weights: Any, base: Any) -> Any:
    """Return the textbook formula for a covariance [n, n] or its diagonal [n]."""
    summing = hierarchy.summing.toarray()
    diagonal = weights.ndim == 1
    scaled = summing / weights[:, None] if diagonal else linalg.cho_solve(linalg.cho_factor(weights), summing)
    bottoms = linalg.cho_solve(linalg.cho_factor(summing.T @ scaled), scaled.T @ base.T)
    return (summing @ bottoms).T


def speed(bottoms: int, method: str, rounds: int) -> dict[str, Any]:
    """Return milliseconds of ours and of the dense formula."""
    ids = tuple(f"r{k % 20}/d{k % 200}/s{k}" for k in range(bottoms))
    hierarchy = build_hierarchy(HierarchyConfig(levels=("region", "district", "shop"), separator="/"), ids)
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(200, len(hierarchy.nodes))) + rng.normal(size=(200, 1))
    base = rng.normal(size=(24, len(hierarchy.nodes)))
    results: dict[str, Any] = {}

    def ours() -> None:
        config = validate(ReconcileConfig, {"method": method})
        results["ours"] = make_reconciliation(config, hierarchy, errors=errors).apply(base)

    def textbook() -> None:
        weights = (errors**2).mean(axis=0) if method == "wls_variance" else shrunk_covariance(errors).dense()
        results["dense"] = dense(hierarchy, weights, base)

    if bottoms >= ALONE:
        times = _measure.in_turns({"ours": ours}, Pace(torch.device("cpu"), rounds))
        row = {"bottoms": bottoms, "method": method, **_measure.summarise(times, "ours")}
        _measure.tell(row)
        return row
    times = _measure.in_turns({"dense": textbook, "ours": ours}, Pace(torch.device("cpu"), rounds))
    if not np.allclose(results["ours"], results["dense"], atol=1e-6):
        raise SystemExit(f"the two differ for {method} at {bottoms} bottoms")
    row = {"bottoms": bottoms, "method": method, **_measure.summarise(times, "dense")}
    _measure.tell(row)
    return row


def main() -> None:
    """Measure, write and print."""
    given = _measure.arguments(__doc__, data=True)
    load = os.getloadavg()[0]
    rows = []
    for name, read in (("household", household), ("beijing", beijing)):
        rows += accuracy(name, *read(given.data), given.quick)
    sizes = (200, 400) if given.quick else (1000, 3000, ALONE)
    paces = [speed(size, method, 3) for size in sizes for method in ("wls_variance", "mint")]
    about = _measure.describe(given, load)
    lines = [
        *_measure.heading("Reconciliation: errors before and after, and speed", about),
        "",
        f"Closed-form linear maps, one a node, context {CONTEXT}, horizon {HORIZON}; mean absolute error over daily "
        "cutoffs of the last 15 % of the rows, in data units; gain with a 95 % bootstrap interval over blocks of seven "
        "cutoffs.",
        "",
        "| data | method | level | before | after | gain | interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            f"{row['before']:.4g} | {row['after']:.4g} | {row['gain']:+.2%} | {row['low']:+.2%} .. {row['high']:+.2%}"
        )
        lines.append(f"| {row['data']} | {row['method']} | {row['level']} | {cells} |")
    lines += ["", "| bottoms | method | dense formula, ms | ours, ms | times faster |", "|---|---|---|---|---|"]
    for row in paces:
        alone = "dense" not in row
        cells = "not run" if alone else f"{row['dense']['ms']:,.0f}"
        cells += f" | {row['ours']['ms']:,.1f} | {'' if alone else _measure.ratio_cell(row['ours'])}"
        lines.append(f"| {row['bottoms']} | {row['method']} | {cells} |")
    _measure.write(given.out, {**about, "accuracy": rows, "speed": paces}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
