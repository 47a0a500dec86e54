"""How long does a backtest of a global model over 1,000 series with 20 refits take, here and with its peers?

    python benchmarks/backtest_speed.py [--quick] [--threads 1] [--workers 2] [--rounds 3] [--peers PYTHON] [--out FILE]

The panel has 1,000 hourly series of 1,500 rows: level, daily and weekly season with amplitudes and phases of their
own, autoregressive noise. From each of 20 cutoffs, 24 rows apart, the next 24 rows are forecast from the last 168, by a
model fitted again on everything before the cutoff.

- *tsforge*: the use-case ``backtest`` of ``linear`` on the stored data set: reading it, 20 closed-form fits on all
  series, conformal calibration of each, the three naive forecasts with their intervals, all metrics, tests, regimes,
  and the report on disk. In a process of its own each round, and once more with ``--workers`` processes that fit side
  by side.
- *Darts* and *neuralforecast* (``--peers``, the interpreter of an environment that has both): the same rows, cutoffs,
  look-back and horizon; forecasts only, no intervals, no metrics, no report. Where a peer would take hours it runs on
  the first series or the last cutoffs only, and its time is scaled up by their number; the page says so.

Forecasts of all are compared on the cells that all of them made: as many as asked for, and with the same error measure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import describe, heading, tell, write

START = datetime(2024, 1, 1)
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the panel and of the backtest, and how much of it a peer runs."""

    num_series: int = 1_000
    num_rows: int = 1_500
    context_length: int = 168
    horizon: int = 24
    num_cutoffs: int = 20
    darts_series: int = 10
    darts_global_series: int = 100
    darts_global_cutoffs: int = 4
    dlinear_steps: int = 200

    @property
    def cutoffs(self) -> list[int]:
        """Last visible row of each cutoff."""
        last = self.num_rows - 1 - self.horizon
        return [last - self.horizon * back for back in reversed(range(self.num_cutoffs))]


QUICK = Plan(
    num_series=20,
    num_rows=400,
    context_length=48,
    num_cutoffs=4,
    darts_series=4,
    darts_global_series=20,
    darts_global_cutoffs=2,
    dlinear_steps=20,
)


def make_values(plan: Plan) -> np.ndarray:
    """Return the panel [series, rows]."""
    rng = np.random.default_rng(0)
    hour, shape = np.arange(plan.num_rows), (plan.num_series, 1)
    amplitude, phase = rng.uniform(2.0, 10.0, shape), rng.uniform(0.0, 2 * np.pi, shape)
    season = amplitude * np.sin(2 * np.pi * hour / 24 + phase) + 2.0 * np.sin(2 * np.pi * hour / 168 + 2 * phase)
    noise = rng.normal(size=(plan.num_series, plan.num_rows))
    for row in range(1, plan.num_rows):
        noise[:, row] += 0.7 * noise[:, row - 1]
    return rng.uniform(-50.0, 50.0, shape) + season + noise


def make_table(values: np.ndarray) -> pl.DataFrame:
    """Return the panel as a long table."""
    count, rows = values.shape
    times = pl.datetime_range(START, START + timedelta(hours=rows - 1), "1h", time_unit="us", eager=True)
    names = pl.Series([f"s{number:04d}" for number in range(count)])
    return pl.DataFrame(
        {
            "series_id": names.gather(np.repeat(np.arange(count), rows)),
            "ds": times.gather(np.tile(np.arange(rows), count)),
            "y": values.ravel(),
        }
    )


# ---- ours, in a process of its own


def job(plan: Plan, table: Path) -> dict[str, Any]:
    """Return the settings of the backtest."""
    source = {"kind": "parquet", "path": str(table)}
    return {
        "data": {
            "name": "panel",
            "source": source,
            "layout": "long",
            "series": "series_id",
            "time": "ds",
            "freq": "1h",
        },
        "model": {"name": "linear"},
        "window": {"context_length": plan.context_length, "horizon": plan.horizon},
        "backtest": {"num_cutoffs": plan.num_cutoffs, "refit_every": 1},
    }


def run_ours(folder: Path, plan: Plan, threads: int, workers: int) -> dict[str, Any]:
    """Run the backtest in this process, write its forecasts, return what it cost."""
    import torch

    from tsforge.app.backtest import BacktestJobConfig, backtest
    from tsforge.core.config import validate
    from tsforge.core.workspace import Workspace

    torch.set_num_threads(threads)
    config = validate(BacktestJobConfig, job(plan, folder / "panel.parquet") | {"workers": workers})
    workspace = Workspace.open(folder / "home")
    started, used = time.perf_counter(), time.process_time()
    report = backtest(config, workspace)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    own = report.forecasts.filter(model="linear").sort("series_id", "cutoff", "step")
    shape = (plan.num_series, plan.num_cutoffs, plan.horizon)
    np.savez(folder / "ours.npz", forecasts=own["mean"].to_numpy().reshape(shape), cutoffs=np.array(plan.cutoffs))
    board = report.leaderboard.row(by_predicate=pl.col("model") == "linear", named=True)
    fitting = report.folds.filter(model="linear")
    return {
        "workers": workers,
        "seconds": seconds,
        "cpu_seconds": used,
        "fit_seconds": fitting["fit_seconds"].sum(),
        "predict_seconds": fitting["predict_seconds"].sum(),
        "baseline_seconds": float(
            report.folds.filter(pl.col("model") != "linear")
            .select(pl.col("fit_seconds") + pl.col("predict_seconds"))
            .sum()
            .item()
        ),
        "fits": fitting.height,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "mae": board["mae"],
        "coverage_90": board["coverage_90"],
        "cells": board["count"],
        "report_bytes": sum(part.stat().st_size for part in (report.path or Path()).iterdir()),
    }


def prepare(folder: Path, plan: Plan) -> np.ndarray:
    """Write the panel and store it as a data set; return its values."""
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate
    from tsforge.core.workspace import Workspace

    values = make_values(plan)
    np.savez(folder / "panel.npz", values=values)
    make_table(values).write_parquet(folder / "panel.parquet")
    ingest(
        validate(IngestConfig, {"data": job(plan, folder / "panel.parquet")["data"]}), Workspace.open(folder / "home")
    )
    return values


def measure_ours(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the backtest once a round, each in a process of its own."""
    rounds = []
    for _ in range(given.rounds):
        for workers in sorted({1, given.workers}, reverse=True):  # the file of forecasts is that of one process
            command = [sys.executable, __file__, "--child", str(folder), "--threads", str(given.threads)]
            command += ["--workers", str(workers), *(["--quick"] if given.quick else [])]
            rounds.append(_answer(command, given.threads))
            tell({"method": "tsforge", **rounds[-1]})
    return rounds


# ---- peers


def peer_tasks(plan: Plan) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return script and task by name."""
    whole = {"num_series": plan.num_series, "num_cutoffs": plan.num_cutoffs}
    some = {"num_series": plan.darts_series, "num_cutoffs": plan.num_cutoffs, "way": "historical_forecasts"}
    loop = {"num_series": plan.darts_global_series, "num_cutoffs": plan.darts_global_cutoffs, "way": "global"}
    return {
        "Darts LinearRegressionModel, historical_forecasts (a fit each series)": ("backtest_darts.py", some),
        "Darts LinearRegressionModel, fit and predict on all series": ("backtest_darts.py", loop),
        f"neuralforecast DLinear ({plan.dlinear_steps} steps), cross_validation": (
            "backtest_neuralforecast.py",
            {**whole, "max_steps": plan.dlinear_steps},
        ),
    }


def measure_peer(
    folder: Path, plan: Plan, interpreter: str, script: str, task: dict[str, Any], threads: int
) -> dict[str, Any]:
    """Run one peer and return its cost, scaled to the whole panel, and its forecasts."""
    task = {
        **{name: getattr(plan, name) for name in ("context_length", "horizon", "cutoffs")},
        **task,
        "stride": plan.horizon,
        "start": START.isoformat(),
        "data": str(folder / "panel.npz"),
        "out": str(folder / "peer.npz"),
    }
    (folder / "task.json").write_text(json.dumps(task))
    found = _answer([interpreter, str(PEERS / script), str(folder / "task.json")], threads)
    answer = np.load(folder / "peer.npz")
    share = task["num_series"] * task["num_cutoffs"] / (plan.num_series * plan.num_cutoffs)
    return {
        **found,
        "num_series": task["num_series"],
        "num_cutoffs": task["num_cutoffs"],
        "whole_seconds": found["seconds"] / share,
        "whole_cpu_seconds": found["cpu_seconds"] / share,
        "forecasts": answer["forecasts"],
        "cutoffs": answer["cutoffs"],
    }


def _answer(command: list[str], threads: int) -> dict[str, Any]:
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **count})
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def errors(
    values: np.ndarray, plan: Plan, forecasts: np.ndarray, cutoffs: np.ndarray, like: np.ndarray
) -> dict[str, Any]:
    """Return the mean absolute error of a peer and of ours on the peer's cells, and how many of them it made."""
    count = len(forecasts)
    rows = np.asarray(cutoffs)[:, None] + np.arange(1, plan.horizon + 1)
    actual = values[:count][:, rows]
    places = [plan.cutoffs.index(int(cutoff)) for cutoff in cutoffs]
    return {
        "forecasts": int(np.isfinite(forecasts).sum()),
        "asked": int(actual.size),
        "mae": float(np.abs(forecasts - actual).mean()),
        "mae_ours": float(np.abs(like[:count][:, places] - actual).mean()),
    }


# ---- the page


def page(about: dict[str, Any], plan: Plan, ours: list[dict[str, Any]], peers: dict[str, dict[str, Any]]) -> str:
    """Return the result page."""
    alone = [row for row in ours if row["workers"] == 1]
    together = [row["seconds"] for row in ours if row["workers"] > 1]
    middle = {name: statistics.median(row[name] for row in alone) for name in alone[0]}
    seconds = [row["seconds"] for row in alone]
    lines = heading("Backtest of a global model with refits", about)
    lines += [
        "",
        f"{plan.num_series:,} hourly series x {plan.num_rows:,} rows, {plan.num_cutoffs} cutoffs {plan.horizon} rows "
        f"apart, a fit at each, look-back {plan.context_length}, horizon {plan.horizon}. How it was measured: "
        "`benchmarks/backtest_speed.py`.",
        "",
        f"tsforge, everything included (reading, {middle['fits']:.0f} fits, calibration, 3 naive forecasts, metrics, "
        f"tests, report): **{middle['seconds']:.1f} s** (median of {len(alone)}; {min(seconds):.1f} to "
        f"{max(seconds):.1f}), {middle['cpu_seconds']:.1f} s of processor time, "
        f"{middle['peak_bytes'] / 2**30:.2f} GiB at most. Of it the fits take {middle['fit_seconds']:.1f} s, their "
        f"forecasts {middle['predict_seconds']:.1f} s, the naive forecasts {middle['baseline_seconds']:.1f} s. "
        f"{middle['cells']:,.0f} cells graded, coverage of the 90 % interval {100 * middle['coverage_90']:.1f} %.",
        "",
    ]
    if together:
        lines += [
            f"The same with {max(row['workers'] for row in ours)} processes that fit side by side: "
            f"**{statistics.median(together):.1f} s** (median of {len(together)}; {min(together):.1f} to "
            f"{max(together):.1f}), {middle['seconds'] / statistics.median(together):.2f} times as fast.",
            "",
        ]
    if not peers:
        return "\n".join([*lines, "Peers were not measured (no `--peers`)."]) + "\n"
    lines += [
        "| method | measured on | s there | whole panel, s | times tsforge | processor time, times tsforge | forecasts "
        "| MAE | MAE of tsforge there |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in peers.items():
        scaled = row["num_series"] < plan.num_series or row["num_cutoffs"] < plan.num_cutoffs
        where = f"{row['num_series']:,} series, {row['num_cutoffs']} cutoffs"
        lines.append(
            f"| {name} | {where} | {row['seconds']:.1f} | "
            f"{row['whole_seconds']:.0f}{' (scaled up)' if scaled else ''} | "
            f"{row['whole_seconds'] / middle['seconds']:.3g} | "
            f"{row['whole_cpu_seconds'] / middle['cpu_seconds']:.3g} | "
            f"{row['errors']['forecasts']:,} of {row['errors']['asked']:,} | "
            f"{row['errors']['mae']:.4f} | {row['errors']['mae_ours']:.4f} |"
        )
    lines += [
        "",
        "Scaled up: time is taken to grow with the number of series and cutoffs, which overstates it by what a process "
        "does only once. Processor time says more where the machine was busy (see its load). "
        "Peers give point forecasts only; tsforge's time holds everything listed above.",
    ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that fit side by side, measured too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="interpreter of an environment with darts and neuralforecast")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.device = "cpu"
    return given


def main() -> None:
    """Run all and write the page."""
    given = arguments()
    plan = QUICK if given.quick else Plan()
    if given.child is not None:
        sys.stdout.write(json.dumps(run_ours(given.child, plan, given.threads, given.workers)) + "\n")
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        values = prepare(folder, plan)
        ours = measure_ours(folder, given)
        own = np.load(folder / "ours.npz")["forecasts"]
        peers = {}
        for name, (script, task) in peer_tasks(plan).items() if given.peers else ():
            row = measure_peer(folder, plan, given.peers, script, task, given.threads)
            row["errors"] = errors(values, plan, row.pop("forecasts"), row.pop("cutoffs"), own)
            peers[name] = row
            tell({"method": name, **row})
    about = describe(given, before)
    result = {"about": about, "plan": asdict(plan), "tsforge": ours, "peers": peers}
    write(given.out, result, page(about, plan, ours, peers))


if __name__ == "__main__":
    main()
