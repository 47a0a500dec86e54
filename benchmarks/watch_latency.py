"""How long does a row take in an online detector, and how many rows a second come through, beside a batch run?

    python benchmarks/watch_latency.py [--quick] [--out benchmarks/results/watch_latency_cpu2_DATE]

38 variates (as in server metrics), a context of 96 rows, 24 steps of which 8 are scored, mahalanobis scores. An update
is ``OnlineDetector.update`` on a table of new rows, checks included; its events are looked at, its score table is not
made. Given are wall time and the time of the processor spent, which a busy machine disturbs less. Batch rows a second
are those of ``detect`` over the same rows, fits left out.
"""

from __future__ import annotations

import gc
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, tell, write

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame

VARIATES, CONTEXT, HORIZON = 38, 96, 24
TRAIN, BEGIN = 1_000, 2_000
MODELS = ("linear", "ar_net")
START = datetime(2024, 1, 1, tzinfo=UTC)
NAMES = [f"v{place}" for place in range(VARIATES)]


def made(series: int, rows: int, seed: int = 0) -> pl.DataFrame:
    """Return waves with noise, one row a minute."""
    generator = np.random.default_rng(seed)
    minute = np.arange(rows)
    times = pl.datetime_range(START, START + timedelta(minutes=rows - 1), "1m", eager=True, time_zone="UTC").alias(
        "time"
    )
    parts = []
    for number in range(series):
        wave = 3 * np.sin(2 * np.pi * (minute[:, None] + 7 * number) / 60 + np.arange(VARIATES))
        values = wave + generator.normal(0, 0.5, (rows, VARIATES))
        columns = {name: values[:, place] for place, name in enumerate(NAMES)}
        parts.append(pl.DataFrame({"series_id": [f"m{number:03d}"] * rows, "time": times, **columns}))
    return pl.concat(parts)


def fitted(frame: SeriesFrame, model: str) -> Artifact:
    """Return a model fitted on the first rows."""
    settings = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": model},
        "window": {"context_length": CONTEXT, "horizon": HORIZON},
        "split": {"kind": "times", "ends": [str(minute(row - 1)) for row in (TRAIN, TRAIN + 200, BEGIN)]},
    }
    return fit_frame(frame, validate(FitConfig, settings))[0]


def as_frame(table: pl.DataFrame) -> SeriesFrame:
    """Return the table as a frame."""
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=NAMES)


def minute(row: int) -> datetime:
    """Return the time of a row."""
    return START + timedelta(minutes=row)


def timed(detector: OnlineDetector, updates: list[pl.DataFrame]) -> dict[str, float]:
    """Return milliseconds an update, wall and processor, median and 99th percentile; the first tenth only warms up."""
    wall, busy = [], []
    gc.disable()
    for rows in updates:
        at, cpu = time.perf_counter(), time.thread_time()
        found = detector.update(rows)
        assert found.opened_events is not None
        busy.append(1e3 * (time.thread_time() - cpu))
        wall.append(1e3 * (time.perf_counter() - at))
    gc.enable()
    skip = len(updates) // 10
    names = ("wall_median", "wall_p99", "processor_median", "processor_p99")
    values = [float(np.quantile(part[skip:], q)) for part in (wall, busy) for q in (0.5, 0.99)]
    return dict(zip(names, values, strict=True))


def measure(model: str, *, quick: bool) -> dict[str, Any]:
    """Return the figures of one model."""
    few, many, long = (60, 20, 500) if quick else (1_000, 100, 20_000)
    config = validate(DetectConfig, {"keep_variate_scores": False})
    one = made(1, BEGIN + max(few, long))
    artifact = fitted(as_frame(one), model)
    rows = [one[BEGIN + place : BEGIN + place + 1] for place in range(few)]
    single = timed(OnlineDetector.start(artifact, as_frame(one), config, start=minute(BEGIN)), rows)

    series = 10 if quick else 100
    crowd = made(series, BEGIN + many)
    wide = fitted(as_frame(crowd), model)
    detector = OnlineDetector.start(wide, as_frame(crowd), config, start=minute(BEGIN))
    together = timed(detector, [crowd.filter(pl.col("time") == minute(BEGIN + place)) for place in range(many)])
    state = detector.to_bytes()

    detector = OnlineDetector.start(artifact, as_frame(one), config, start=minute(BEGIN))
    at = time.thread_time()
    detector.update(one[BEGIN : BEGIN + long])
    stream_rate = long / (time.thread_time() - at)
    spans = {}
    for stop in (BEGIN + 1, BEGIN + long - 1):
        at = time.thread_time()
        detect(artifact, as_frame(one), config, start=minute(BEGIN), stop=minute(stop))
        spans[stop] = time.thread_time() - at
    batch_rate = (long - 2) / (spans[BEGIN + long - 1] - spans[BEGIN + 1])
    return {
        "model": model,
        "one row of one series, ms": single,
        f"one row of each of {series} series, ms": together,
        "series": series,
        "stream rows a second": stream_rate,
        "batch rows a second": batch_rate,
        "state bytes a series": len(state) / series,
    }


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the result page."""
    series = rows[0]["series"]
    lines = [
        *heading("Latency of online detection", about),
        "",
        f"`benchmarks/watch_latency.py`: {VARIATES} variates, context {CONTEXT}, {HORIZON} steps (8 scored), "
        "mahalanobis, scores of single variates not kept; ms are wall / processor; rows a second of processor time.",
        "",
        f"| model | 1 row, median | 1 row, p99 | 1 row of {series} series, median | a row of those | stream rows/s, "
        "one update | batch rows/s | state, KB a series |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, all_of = row["one row of one series, ms"], row[f"one row of each of {series} series, ms"]
        lines.append(
            f"| {row['model']} | {one['wall_median']:.2f} / {one['processor_median']:.2f} | {one['wall_p99']:.2f} / "
            f"{one['processor_p99']:.2f} | {all_of['wall_median']:.1f} / {all_of['processor_median']:.1f} | "
            f"{all_of['wall_median'] / series:.3f} / {all_of['processor_median'] / series:.3f} | "
            f"{row['stream rows a second']:,.0f} | {row['batch rows a second']:,.0f} | "
            f"{row['state bytes a series'] / 1e3:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    given = arguments(__doc__)
    load = os.getloadavg()[0]
    rows = []
    for model in MODELS:
        rows.append(measure(model, quick=given.quick))
        tell(rows[-1])
    about = describe(given, load)
    write(given.out, {"about": about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
