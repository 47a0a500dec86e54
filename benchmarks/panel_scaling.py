"""What is one scale for all series of a panel worth, beside a scale for each, where levels differ?

    python benchmarks/panel_scaling.py --data FOLDER [--quick] [--out benchmarks/results/panel_scaling_cpu2_DATE]

Hourly series of the M4 competition (``forecast/m4_hourly.parquet``; levels from tens to hundreds of thousands), the
first 60 with at least 300 rows, cut to the same length. Models are fitted once on all rows before the last five
cutoffs, 24 steps apart, with a context of 48 rows; the last fifth of these rows calibrates. MASE: mean absolute error
over that of the seasonal naive within the training rows, mean over series. Coverage of nominal 90 % intervals series by
series.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, tell, write

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest_forecasts import forecasts_at

SERIES, LEAST, CONTEXT, HORIZON, CUTOFFS, SEASON = 60, 300, 48, 24, 5, 24
MODELS: tuple[dict[str, Any], ...] = (
    {"name": "seasonal_naive", "season_length": SEASON},
    {"name": "linear"},
    {"name": "ar_net"},
    {"name": "var"},
    {"name": "auto", "minutes": 0},
)
SCALINGS = ("global", "auto")


def panel(folder: Path, series: int) -> SeriesFrame:
    """Return the last rows of the first series that are long enough, numbered alike."""
    table = pl.read_parquet(folder / "forecast" / "m4_hourly.parquet").with_columns(pl.col("y").cast(pl.Float64))
    long = table.group_by("unique_id").len().filter(pl.col("len") >= LEAST).sort("unique_id").head(series)
    table = table.join(long, on="unique_id").sort("unique_id", "step")
    size = min(long["len"].to_list())
    row = pl.int_range(pl.len()).over("unique_id") - (pl.col("len") - size)
    table = table.with_columns(row=row).filter(pl.col("row") >= 0)
    return SeriesFrame.from_long(
        table.select("unique_id", "row", "y"), series_id="unique_id", time="row", targets=["y"]
    )


def units(frame: SeriesFrame) -> dict[str, float]:
    """Return the mean absolute error of the seasonal naive within the rows of each series."""
    found = {}
    for (name,), part in frame.table.group_by("series_id"):
        values = part.sort("time")["y"].to_numpy()
        found[str(name)] = float(np.abs(values[SEASON:] - values[:-SEASON]).mean())
    return found


def measure(frame: SeriesFrame, model: dict[str, Any], scaling: str) -> dict[str, Any]:
    """Return errors and coverage of one model."""
    last = max(frame.table["time"].to_list())
    cutoffs = np.array([last - HORIZON * k for k in range(CUTOFFS, 0, -1)])
    past = frame.until(int(cutoffs[0]))
    settings = {
        "data": {"name": "m4", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": model,
        "scaling": {"kind": scaling},
        "window": {"context_length": CONTEXT, "horizon": HORIZON},
        "split": {"train": 0.8, "valid": 0.2, "test": 0.0},
        "tracking": {"enabled": False},
    }
    at = time.perf_counter()
    artifact, _ = fit_frame(past, validate(FitConfig, settings))
    seconds = time.perf_counter() - at
    table = forecasts_at(artifact, frame, cutoffs, steps=HORIZON, levels=(0.05, 0.5, 0.95))
    inside = (pl.col("actual") >= pl.col("q0.05")) & (pl.col("actual") <= pl.col("q0.95"))
    by_series = table.group_by("series_id").agg(
        covered=inside.mean(), error=(pl.col("mean") - pl.col("actual")).abs().mean()
    )
    unit = units(past)
    mase = np.array([row["error"] / unit[row["series_id"]] for row in by_series.to_dicts()])
    covered = by_series["covered"].to_numpy()
    return {
        "model": model["name"],
        "scaling": scaling,
        "series": len(mase),
        "mase": float(mase.mean()),
        "worst_mase": float(mase.max()),
        "coverage": float(covered.mean()),
        "worst_coverage": float(covered.min()),
        "below_75": float((covered < 0.75).mean()),
        "always": float((covered == 1.0).mean()),
        "seconds": seconds,
    }


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the result page."""
    lines = [
        *heading("One scale for a panel, or one a series", about),
        "",
        f"`benchmarks/panel_scaling.py`: {rows[0]['series']} hourly series of M4, L = {CONTEXT}, h = {HORIZON}, "
        f"{CUTOFFS} cutoffs, nominal 90 %. `auto` is `series` here, since levels differ.",
        "",
        "| model | scaling | MASE, mean | worst series | coverage, mean | worst series | series below 75 % | "
        "at 100 % | fit, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['scaling']} | {row['mase']:.3f} | {row['worst_mase']:.2f} | {row['coverage']:.3f} | "
        f"{row['worst_coverage']:.2f} | {row['below_75']:.0%} | {row['always']:.0%} | {row['seconds']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model with both scalings."""
    given = arguments(__doc__, data=True)
    load_before = os.getloadavg()[0]
    logging.disable(logging.WARNING)
    frame = panel(given.data, 8 if given.quick else SERIES)
    rows = []
    for model in MODELS:
        for scaling in SCALINGS:
            rows.append(measure(frame, model, scaling))
            tell(rows[-1])
    about = describe(given, load_before)
    write(given.out, {"about": about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
