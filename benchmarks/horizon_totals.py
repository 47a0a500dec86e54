"""Intervals of a total over the horizon: from sample paths, and from the same quantiles with independent steps.

    python benchmarks/horizon_totals.py --data FOLDER [--out RESULT] [--quick]

FOLDER holds ``bike_sharing.parquet`` and the others. The closed-form linear model is fitted once (70 % training, 15 %
held out for intervals and dependence, 15 % graded); from every 7th row of the last part it forecasts a week of hours
(or 24 steps), and the total of that horizon is held against its 80 and 90 % intervals. *steps* is the coverage of the
single steps, which all three share: what is missing there no dependence can mend. The first set is made: an AR(1),
whose forecast and dependence are known. Overhead: a fit with and without the dependence, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from _measure import describe, heading, tell, write

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.dependence import artifact_dependence, independent, marginal_levels
from tsforge.forecasting.sample_paths import draw_paths, path_scores

SETS: dict[str, tuple[tuple[str, ...], int, int]] = {  # columns, context, horizon
    "bike_sharing": (("users",), 336, 168),
    "vic_electricity": (("Demand", "Temperature"), 336, 168),
    "epf_np": (("OT",), 336, 168),
    "ETTh1": (("HUFL", "MUFL", "LUFL", "OT"), 336, 168),
    "exchange_rate": (("0", "3", "OT"), 96, 24),
}
PATHS, STRIDE, ROUNDS = 300, 7, 5
COVERAGES = ((80, 0.1, 0.9), (90, 0.05, 0.95))


def made(rows: int = 12_000, phi: float = 0.9) -> pl.DataFrame:
    """Return an AR(1) with unit innovations."""
    noise = np.random.default_rng(1).normal(size=rows + 200)
    values = np.zeros(rows + 200)
    for row in range(1, rows + 200):
        values[row] = phi * values[row - 1] + noise[row]
    return pl.DataFrame({"y": values[200:]})


def frame_of(table: pl.DataFrame, columns: tuple[str, ...], most: int) -> SeriesFrame:
    """Return the last rows on an integer grid: a total is of steps, whatever the clock says."""
    rows = table.select(pl.col(columns).cast(pl.Float64)).tail(most)
    long = rows.with_columns(pl.lit("all").alias("series_id"), pl.int_range(pl.len()).alias("time"))
    return SeriesFrame.from_long(long, time="time", series_id="series_id", targets=list(columns))


def settings(kind: str, context: int, horizon: int) -> FitConfig:
    """Return the fit."""
    plain: dict[str, Any] = {
        "data": {"name": "totals", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": context, "horizon": horizon},
        "split": {"train": 0.7, "valid": 0.15, "test": 0.15},
        "calibration": {"dependence": kind},
    }
    return validate(FitConfig, plain)


def graded(artifact: Artifact, frame: SeriesFrame, which: str) -> dict[str, Any]:
    """Return coverage and width of totals, and joint scores, of one structure; ``independent`` is none of the fit."""
    steps, targets, levels = artifact.window.horizon, artifact.schema.targets, marginal_levels(artifact)
    cutoffs = np.arange(int(frame.num_rows * 0.85), frame.num_rows - steps - 1, STRIDE)
    table = forecasts_at(artifact, frame, cutoffs, steps=steps, levels=levels)
    shape = (len(cutoffs), steps, len(targets))
    quantiles = np.stack([table[f"q{level:g}"].to_numpy().reshape(shape) for level in levels], axis=-1)
    actual = table["actual"].to_numpy().reshape(shape)
    dependence = independent(steps, len(targets)) if which == "independent" else artifact_dependence(artifact)
    drawn = [
        draw_paths(quantiles[i : i + 1], levels, dependence, PATHS, [i])[0].sum(axis=1) for i in range(len(cutoffs))
    ]
    totals, truth = np.stack(drawn), actual.sum(axis=1)
    result: dict[str, Any] = {"windows": len(cutoffs), "apart": (len(cutoffs) * STRIDE) // steps}
    for name, low, high in COVERAGES:
        bottom, top = np.quantile(totals, [low, high], axis=1)
        result[f"total_{name}"] = float(((bottom <= truth) & (truth <= top)).mean())
        bottom, top = quantiles[..., levels.index(low)], quantiles[..., levels.index(high)]
        result[f"step_{name}"] = float(((bottom <= actual) & (actual <= top)).mean())
    bottom, top = np.quantile(totals, [0.05, 0.95], axis=1)
    result["width"] = float((top - bottom).mean(axis=0).sum())
    scores = path_scores(table, levels, dependence, targets)
    return result | {name: float(scores[name].mean()) for name in ("energy", "variogram")}  # type: ignore[arg-type]


def measured(name: str, table: pl.DataFrame, sizes: tuple[tuple[str, ...], int, int], most: int) -> dict[str, Any]:
    """Return the grades of every structure on one set, and what the Gaussian one costs a fit."""
    columns, context, horizon = sizes
    frame = frame_of(table, columns, most)
    rows = {}
    for kind in ("gaussian", "empirical"):
        artifact = fit_frame(frame, settings(kind, context, horizon))[0]
        rows[kind] = graded(artifact, frame, kind)
        if kind == "gaussian":
            rows["independent"] = graded(artifact, frame, "independent")
    spent: dict[str, list[float]] = {"none": [], "gaussian": []}
    for _ in range(ROUNDS):
        for kind, found in spent.items():
            start = time.perf_counter()
            fit_frame(frame, settings(kind, context, horizon))
            found.append(time.perf_counter() - start)
    middle = {kind: statistics.median(found) for kind, found in spent.items()}
    return {
        "set": name,
        "rows": frame.num_rows,
        "horizon": horizon,
        "variates": len(columns),
        "fit_seconds": middle,
        "structures": rows,
    }


def page(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = heading("Intervals of a total over the horizon", result["about"])
    lines += [
        "",
        f"Linear model, {PATHS} paths a window, a forecast every {STRIDE} rows of the last 15 %; *apart*: how many of "
        "these windows do not overlap. Width: of the 90 % interval of the total, against that of independent steps. "
        "Fit: seconds with the dependence over seconds without, medians.",
        "",
        "| set | horizon | apart | structure | steps 80 / 90 % | total 80 / 90 % | width | energy | variogram | fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        base = row["structures"]["independent"]
        ratio = row["fit_seconds"]["gaussian"] / row["fit_seconds"]["none"]
        for kind, found in row["structures"].items():
            lines.append(
                f"| {row['set']} | {row['horizon']} | {found['apart']} | {kind} | {100 * found['step_80']:.1f} / "
                f"{100 * found['step_90']:.1f} | {100 * found['total_80']:.1f} / {100 * found['total_90']:.1f} | "
                f"{found['width'] / base['width']:.2f} | {found['energy'] / base['energy']:.3f} | "
                f"{found['variogram'] / base['variogram']:.3f} | {f'{ratio:.2f}' if kind == 'gaussian' else ''} |"
            )
    return "\n".join([*lines, "", "Energy and variogram score against independent steps; below 1 is better."]) + "\n"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="the last 4000 rows of two sets")
    given = parser.parse_args()
    given.device, given.threads = "cpu", 1
    torch.set_num_threads(1)
    before, most = os.getloadavg()[0], 4000 if given.quick else 20_000
    rows = [measured("AR(1), made", made(), (("y",), 48, 24), most)]
    tell(rows[-1])
    for name, sizes in list(SETS.items())[: 1 if given.quick else None]:
        rows.append(measured(name, pl.read_parquet(given.data / f"{name}.parquet"), sizes, most))
        tell(rows[-1])
    result = {"about": describe(given, before), "rows": rows}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
