"""What does a ridge penalty of 100 leave of short and smooth series, and what does the usual one of ``linear``?

    python benchmarks/short_spans.py [--quick] [--out benchmarks/results/short_spans_cpu2_DATE]

Generated monthly series, L = 24, h = 6, fitted by the default split and forecast once from their end: a trend with a
season, with little and with much noise; a noisy wave; an autoregression; a random walk; an exact trend of 600 rows.
Mean absolute error over seeds. ``1``: the same penalty for all, for comparison.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, tell, write
from numpy.typing import NDArray

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.predict import predict

Array = NDArray[np.float64]
CONTEXT, HORIZON, SEEDS = 24, 6, 12
RIDGES: tuple[float | str, ...] = (100.0, 1.0, "usual")


def seasonal(noise: float) -> Callable[[np.random.Generator, int], Array]:
    """Return a generator of a trend with a season of twelve months."""

    def made(rng: np.random.Generator, rows: int) -> Array:
        step, pattern = np.arange(rows), 10 * rng.normal(size=12)
        found: Array = 100 + 0.5 * step + pattern[step % 12] + noise * rng.normal(size=rows)
        return found

    return made


def autoregression(rng: np.random.Generator, rows: int) -> Array:
    """Return a stationary autoregression."""
    shocks, values = rng.normal(size=rows + 50), np.zeros(rows + 50)
    for row in range(1, rows + 50):
        values[row] = 0.5 * values[row - 1] + shocks[row]
    return values[50:]


KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "trend and season, noise 0.5": seasonal(0.5),
    "trend and season, noise 5": seasonal(5.0),
    "wave of 3, noise 3": lambda rng, rows: 3 * np.sin(2 * np.pi * np.arange(rows) / 12) + 3 * rng.normal(size=rows),
    "autoregression": autoregression,
    "random walk": lambda rng, rows: rng.normal(size=rows).cumsum(),
}


def error(values: Array, ridge: float | str) -> float:
    """Return the mean absolute error of the last rows, forecast from all others."""
    times = pl.Series("time", [datetime(2000 + k // 12, k % 12 + 1, 1) for k in range(len(values))])
    frame = SeriesFrame.from_wide(pl.DataFrame({"time": times, "y": values}), time="time", freq="1mo")
    settings = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear", "ridge": ridge},
        "window": {"context_length": CONTEXT, "horizon": HORIZON},
        "tracking": {"enabled": False},
    }
    past = frame.until(times[len(values) - HORIZON - 1])
    artifact, _ = fit_frame(past, validate(FitConfig, settings))
    return float(np.abs(predict(artifact, past).table["mean"].to_numpy() - values[-HORIZON:]).mean())


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the result page."""
    lines = [
        *heading("The penalty of linear on short spans", about),
        "",
        f"`benchmarks/short_spans.py`: mean absolute error over {rows[0]['seeds']} seeds, "
        f"L = {CONTEXT}, h = {HORIZON}.",
        "",
        "| series | rows | ridge 100 | 1 | usual |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kind']} | {row['rows']} | {row['100.0']:.3g} | {row['1.0']:.3g} | {row['usual']:.3g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every kind of series with every penalty."""
    given = arguments(__doc__)
    load_before = os.getloadavg()[0]
    logging.disable(logging.WARNING)
    seeds, rows = 2 if given.quick else SEEDS, []
    for size in (60, 72, 120, 144):
        for kind, make in KINDS.items():
            series = [make(np.random.default_rng(seed), size + HORIZON) for seed in range(seeds)]
            found = {str(ridge): float(np.mean([error(each, ridge) for each in series])) for ridge in RIDGES}
            rows.append({"kind": kind, "rows": size, "seeds": seeds, **found})
            tell(rows[-1])
    trend = 0.5 * np.arange(600.0 + HORIZON)
    rows.append(
        {"kind": "exact trend", "rows": 600, "seeds": 1, **{str(ridge): error(trend, ridge) for ridge in RIDGES}}
    )
    about = describe(given, load_before)
    write(given.out, {"about": about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
