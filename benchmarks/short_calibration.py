"""What do intervals of short series cover, whose steps have too few held-out windows for a margin of their own?

    python benchmarks/short_calibration.py --data FOLDER [--quick] [--out benchmarks/results/short_calibration_DATE]

Spans of 180 rows, each fitted alone with the default split (the tenth that validates also calibrates) and a context of
26 rows, forecast from every row of the last fifth: the first 60 series of ``m4_weekly`` that are long enough, 13 weeks
ahead, and the eight currencies of ``exchange_rate`` as means of 21 trading days (a month), 12 steps ahead, its first
and its last 180 of them. ``step``: margins for every step or none, the former default; ``auto``: those over all steps
where a step has too few. Figures are means over spans, cutoffs and steps; an infinite interval covers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, tell, write

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest_forecasts import forecasts_at

ROWS, CONTEXT, SERIES, MONTH = 180, 26, 60, 21
MODELS = ("linear", "ar_net")
POOLS = ("step", "auto")
NOMINAL = ((90, "q0.05", "q0.95"), (80, "q0.1", "q0.9"))
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
HORIZONS = {"m4_weekly": 13, "exchange_rate, monthly": 12}


def spans(name: str, folder: Path, count: int) -> Iterator[SeriesFrame]:
    """Yield spans of one series each."""
    if name == "m4_weekly":
        table = pl.read_parquet(folder / "forecast" / "m4_weekly.parquet")
        long = table.group_by("unique_id").len().filter(pl.col("len") >= ROWS).sort("unique_id").head(count)
        for series in long["unique_id"]:
            yield made(table.filter(unique_id=series).sort("step")["y"].to_numpy()[-ROWS:])
        return
    table = pl.read_parquet(folder / "forecast" / "exchange_rate.parquet")
    for column in [c for c, kind in table.schema.items() if kind.is_float()][:count]:
        values = table[column].to_numpy().astype(np.float64)
        months = values[: len(values) // MONTH * MONTH].reshape(-1, MONTH).mean(axis=1)
        for part in (months[:ROWS], months[-ROWS:]):
            yield made(part)


def made(values: np.ndarray) -> SeriesFrame:
    """Return one series as a frame."""
    table = pl.DataFrame({"time": np.arange(len(values)), "y": values.astype(np.float64)})
    return SeriesFrame.from_wide(table, time="time", freq="1i")


def measure(frame: SeriesFrame, model: str, pool: str, horizon: int) -> pl.DataFrame:
    """Return the forecasts of a span from every cutoff that no fit has seen."""
    settings = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": model},
        "window": {"context_length": CONTEXT, "horizon": horizon},
        "calibration": {"pool": pool, "quantile_levels": list(LEVELS)},
        "tracking": {"enabled": False},
    }
    artifact, _ = fit_frame(frame, validate(FitConfig, settings))
    cutoffs = np.arange(int(0.8 * ROWS) - 1, ROWS - horizon)
    return forecasts_at(artifact, frame, cutoffs, steps=horizon, levels=LEVELS)


def figures(table: pl.DataFrame, horizon: int) -> dict[str, float]:
    """Return coverage over all steps, the first and the last third, and the share of infinite intervals."""
    found: dict[str, float] = {}
    for nominal, low, high in NOMINAL:
        inside = ((pl.col(low) <= pl.col("actual")) & (pl.col("actual") <= pl.col(high))).cast(pl.Float64)
        part = table.drop_nulls("actual").with_columns(inside=inside, endless=pl.col(high).is_infinite())
        third = horizon // 3
        found |= {
            f"covered_{nominal}": float(part["inside"].to_numpy().mean()),
            f"first_{nominal}": float(part.filter(pl.col("step") <= third)["inside"].to_numpy().mean()),
            f"last_{nominal}": float(part.filter(pl.col("step") > horizon - third)["inside"].to_numpy().mean()),
            f"infinite_{nominal}": float(part["endless"].cast(pl.Float64).to_numpy().mean()),
        }
    return found


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the result page."""
    lines = [*heading("Intervals of short series", about), "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [
        "| set | model | pool | 90 %: covered | first, last third of the steps | infinite | 80 %: covered | infinite |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['set']} ({row['spans']} spans) | {row['model']} | {row['pool']} | {row['covered_90']:.3f} | "
            f"{row['first_90']:.3f}, {row['last_90']:.3f} | {row['infinite_90']:.0%} | {row['covered_80']:.3f} | "
            f"{row['infinite_80']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    given = arguments(__doc__, data=True)
    load_before = os.getloadavg()[0]
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for name, horizon in HORIZONS.items():
        frames = list(spans(name, given.data, 3 if given.quick else SERIES))
        for model in MODELS:
            for pool in POOLS:
                table = pl.concat([measure(frame, model, pool, horizon) for frame in frames])
                row = {"set": name, "spans": len(frames), "model": model, "pool": pool} | figures(table, horizon)
                tell(row)
                rows.append(row)
    about = describe(given, load_before)
    write(given.out, {"about": about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
