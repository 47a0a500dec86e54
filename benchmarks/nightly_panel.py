"""What do a first fit and the nights after it cost on 10,000 daily series? Every step is a command of its own.

    python benchmarks/nightly_panel.py [--quick] [--threads 2] [--out FILE]

The panel has 10,000 daily series of 730 rows, levels from below 1 to over 1,000, with weekly and yearly seasons and
steps that add up; a fifth of them begins up to 300 days late and 0.5 % of all cells are missing. Steps: ``ingest`` of a
Parquet file with everything; ``fit`` of the global linear model with calibrated intervals; the first night (``batch
run``: forecast 14 days, detect over the last 30, publish), and the second one, which begins with the ingestion of one
new row a series. Given are wall and processor seconds and the largest memory of each process, one run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from _measure import describe, heading, tell, write

FIRST = date(2024, 1, 1)
CONTEXT, HORIZON, SPAN = 56, 14, "30d"


def make_table(num_series: int, num_rows: int) -> pl.DataFrame:
    """Return the long table ``date, store, units``."""
    rng = np.random.default_rng(0)
    day = np.arange(num_rows)
    level = rng.lognormal(3.0, 1.5, num_series)[:, None]
    week = rng.normal(0.0, 0.2, (num_series, 7))[:, day % 7]
    year = 0.2 * np.sin(2.0 * np.pi * (day / 365.25 + rng.random((num_series, 1))))
    walk = 0.02 * rng.standard_normal((num_series, num_rows)).cumsum(axis=1)
    values = np.maximum(level * (1.0 + week + year + walk), 0.0).round(2)
    begins = rng.integers(0, min(300, num_rows // 2), num_series) * (rng.random(num_series) < 0.2)
    kept = (day >= begins[:, None]) & (rng.random(values.shape) >= 0.005)
    series, row = np.nonzero(kept)
    return pl.DataFrame(
        {
            "date": pl.Series([FIRST + timedelta(days=int(each)) for each in day]).gather(row),
            "store": pl.Series([f"store_{each:05d}" for each in range(num_series)]).gather(series),
            "units": values[kept],
        }
    )


def timed(name: str, arguments: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """Run a command to its end and return what it cost."""
    count = {each: str(threads) for each in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **count, "TSFORGE_HOME": str(folder / "home"), "POLARS_MAX_THREADS": str(threads)}
    with (folder / "out").open("wb") as out, (folder / "errors").open("wb") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "tsforge", *arguments], stdout=out, stderr=errors, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"tsforge {' '.join(arguments)} failed:\n{(folder / 'errors').read_text()[-3000:]}")
    answer = json.loads((folder / "out").read_text().strip().splitlines()[-1])
    row = {
        "step": name,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        **{key: value for key, value in answer.items() if key in ("rows_new", "forecasts", "events", "new_events")},
    }
    tell(row)
    return row


def measure(folder: Path, num_series: int, num_rows: int, threads: int) -> list[dict[str, Any]]:
    """Return the cost of each step."""
    table = make_table(num_series, num_rows)
    last = FIRST + timedelta(days=num_rows - 1)
    table.filter(pl.col("date") < last).write_parquet(folder / "all.parquet")
    table.filter(pl.col("date") == last).write_parquet(folder / "new.parquet")
    data = {
        "name": "sales",
        "source": {"kind": "parquet", "path": str(folder / "all.parquet")},
        "time": "date",
        "layout": "long",
        "series": "store",
        "targets": ["units"],
        "freq": "1d",
    }
    settings = {
        "data": data,
        "model": {"name": "linear"},
        "window": {"context_length": CONTEXT, "horizon": HORIZON},
        "tracking": {"enabled": False},
    }
    rows = []
    for name, content in (("ingest", {"data": data}), ("fit", settings)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        rows.append(timed(name, [name, "--config", str(folder / f"{name}.yaml"), "--json"], folder, threads))
    (artifact,) = (path.name for path in (folder / "home" / "artifacts").iterdir() if path.is_dir())
    for night, source in ((1, None), (2, folder / "new.parquet")):
        job: dict[str, Any] = {"name": "nightly", "data": data, "model": artifact, "ingest": source is not None}
        if source is not None:
            job["data"] = data | {"source": {"kind": "parquet", "path": str(source)}}
        job |= {"detect": {"span": SPAN}, "checks": [{"kind": "fresh", "max_age": "3d"}]}
        (folder / "night.yaml").write_text(yaml.safe_dump(job))
        as_of = (last + timedelta(days=night - 1)).isoformat()
        command = ["batch", "run", str(folder / "night.yaml"), "--as-of", as_of, "--json"]
        rows.append(timed(f"night {night}", command, folder, threads))
        (published,) = (folder / "home" / "published" / "nightly").glob(f"as_of={as_of}*/manifest.json")
        rows[-1]["stages"] = json.loads(published.read_text())["seconds"]
    return rows


def page(about: dict[str, Any], sizes: tuple[int, int], rows: list[dict[str, Any]]) -> str:
    """Return the result page."""
    lines = heading("Nights of a large panel", about)
    lines += [
        "",
        f"{sizes[0]:,} daily series x {sizes[1]:,} rows, look-back {CONTEXT}, horizon {HORIZON}, detection over the "
        f"last {SPAN}; each step a process of its own, one run. How it was measured: `benchmarks/nightly_panel.py`.",
        "",
        "| step | s | processor s | GiB at most |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['step']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['peak_bytes'] / 2**30:.2f} |"
        for row in rows
    ]
    stages = {row["step"]: row["stages"] for row in rows if "stages" in row}
    lines += ["", *(f"Stages of {step}, s: " + _listed(seconds) for step, seconds in stages.items())]
    return "\n".join(lines) + "\n"


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()) + "."


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.device = "cpu"
    sizes = (50, 730) if given.quick else (10_000, 730)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), *sizes, given.threads)
    about = describe(given, load)
    write(given.out, {"about": about, "sizes": sizes, "steps": rows}, page(about, sizes, rows))


if __name__ == "__main__":
    main()
