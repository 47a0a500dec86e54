"""Publications: what reading them as of a moment costs, and what training on what was known at the time is worth.

    python benchmarks/vintages.py [--quick] [--seeds 3] [--out benchmarks/results/vintages_cpu2_DATE]

Speed: a million publications of one column (20 of each of 50,000 hours): building, 100 frames as of a moment, and
batches of windows with and without publications, in turns. Worth: a made-up load follows the wind, of which only
forecasts are known ahead, the worse the further, and its own first releases are too high until they are revised a day
later. The same models are fitted in two ways and forecast the same moments from what was known then: *own* lets every
training window see what was published at its own time, *last* trains on the last values as of the fit.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, write

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.core.config import validate
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.vintage_panel import attach
from tsforge.data.vintages import VintageFrame
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.testing.vintages import START, revised_table

ROWS, VERSIONS, MOMENTS, ROUNDS = 50_000, 20, 100, 5
SCHEMA = SeriesSchema(targets=("load",), past=("flow",), known=("wind",), freq="1h")
MODELS: dict[str, dict[str, Any]] = {
    "ar_net, trained (16 hidden)": {"name": "ar_net", "hidden": [16]},
    "gru": {"name": "gru"},
}


def seconds(call: Callable[[], Any]) -> float:
    """Return wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def million(rows: int) -> pl.DataFrame:
    """Return ``VERSIONS`` publications of the value of each hour: a million of all ``ROWS``."""
    hours = np.repeat(np.arange(rows), VERSIONS)
    start = pl.lit(START).cast(pl.Datetime("us", "UTC"))
    values = np.random.default_rng(0).normal(size=len(hours))
    table = pl.DataFrame({"hour": hours, "out": hours + np.tile(np.arange(VERSIONS), rows), "y": values})
    return table.select(
        pl.lit("a").alias("series_id"),
        (start + pl.duration(hours=pl.col("hour"))).alias("time"),
        (start + pl.duration(hours=pl.col("out"))).alias("published"),
        "y",
    )


def speed(rows: int) -> dict[str, float]:
    """Return medians over rounds."""
    table, schema = million(rows), SeriesSchema(targets=("y",), freq="1h")
    build = [seconds(lambda: VintageFrame(table, schema)) for _ in range(3)]
    frame = VintageFrame(table, schema)
    moments = [START + timedelta(hours=int(hour)) for hour in np.linspace(100, rows, MOMENTS)]
    frames = [seconds(lambda: [frame.as_of(moment) for moment in moments]) for _ in range(3)]
    panel = Panel.from_frame(frame.latest())
    spec = WindowSpec(context_length=168, horizon=24)
    windows = {"plain": WindowDataset(panel, spec), "as of": WindowDataset(attach(frame, panel), spec)}
    items = np.random.default_rng(1).integers(0, len(windows["plain"]), (50, 256))

    def gather(kind: str) -> Callable[[], Any]:
        return lambda: [windows[kind].__getitems__(some) for some in items]

    spent: dict[str, list[float]] = {kind: [] for kind in windows}
    for turn in range(ROUNDS):
        for kind in list(windows)[:: 1 if turn % 2 == 0 else -1]:
            spent[kind].append(seconds(gather(kind)))
    return {
        "build_seconds": statistics.median(build),
        "hundred_frames_seconds": statistics.median(frames),
        "batch_plain_ms": 1e3 * statistics.median(spent["plain"]) / len(items),
        "batch_as_of_ms": 1e3 * statistics.median(spent["as of"]) / len(items),
    }


def worth(model: dict[str, Any], seed: int, error: float, revision: float, *, quick: bool) -> float:
    """Return how many times the error of *own* the model makes when trained on the last values."""
    frame = VintageFrame(revised_table(2000, seed=seed, error=error, revision=revision), SCHEMA)
    settings = {
        "data": {"name": "made_up", "source": {"kind": "parquet", "path": "none"}},
        "model": model,
        "window": {"context_length": 24, "horizon": 12},
        "split": {"train": 0.85, "valid": 0.15, "test": 0.0},
        "train": {"max_epochs": 1 if quick else 12, "accelerator": "cpu", "seed": seed},
        "calibration": {"enabled": False},
        "tracking": {"enabled": False},
    }
    config = validate(FitConfig, settings)
    fits = {
        "own": lambda given, cutoff: fit_frame(given, config)[0],
        "last": lambda given, cutoff: fit_frame(given.latest(), config)[0],
    }
    report = backtest(fits, frame, BacktestConfig(num_cutoffs=40, stride=11, baselines=("last_value",)), horizon=12)
    board = {row["model"]: row for row in report.leaderboard.to_dicts()}
    return float(board["last"]["mse"] / board["own"]["mse"])


def main() -> None:
    """Measure, print and write the dated result."""
    given = arguments(__doc__, numbers={"seeds": 3})
    before = os.getloadavg()[0]
    rows = 2_000 if given.quick else ROWS
    found = speed(rows)
    lines = [
        f"{rows * VERSIONS:,} publications: built in {found['build_seconds']:.2f} s, {MOMENTS} frames as of moments in "
        f"{found['hundred_frames_seconds']:.2f} s. A batch of 256 windows (168 + 24 rows): "
        f"{found['batch_plain_ms']:.2f} ms, as of their moments {found['batch_as_of_ms']:.2f} ms.",
        "",
        "MSE of training on the last values over that of training on those of the time, 40 cutoffs, the last value of",
        "load as truth:",
        "",
        "| model | error of wind an hour ahead | revision of load | ratio, by seed |",
        "|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {}
    for name, model in MODELS.items():
        for error, revision in ((0.2, 0.0), (0.0, 0.5), (0.2, 0.5)):
            values = [worth(model, seed, error, revision, quick=given.quick) for seed in range(given.seeds)]
            ratios[f"{name}, {error}, {revision}"] = values
            lines.append(f"| {name} | {error} | {revision} | {', '.join(f'{value:.2f}' for value in values)} |")
            print(lines[-1], flush=True)
    about = describe(given, before)
    page = [*heading("Publications: cost and worth", about), "", *(__doc__ or "").strip().splitlines()[4:], "", *lines]
    record = {"about": about, "speed": found, "mse_last_over_own": ratios, "seeds": given.seeds}
    write(given.out, record, "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
