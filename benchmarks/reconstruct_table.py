"""Reconstruction of the published dynamics data: several seeds a set, beside the published figures.

Usage: python benchmarks/reconstruct_table.py --data FOLDER --out benchmarks/results/reconstruct_HARDWARE_DATE
    [--sets lorenz63_noise05,...] [--seeds 5] [--epochs 2000] [--workers 16] [--minutes 9] [--work FOLDER]

One process a set and seed, one thread each. A finished seed is a file below --work, written whole: run the same
command again to go on. With --minutes, what is not finished by then is ended and run again next time. Writes OUT.json
and OUT.md of everything finished so far, with medians, median absolute deviations and the share of failed seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from polars import selectors

from tsforge.core.atomic import atomic_file

ECG = {"kind": "clipped_shallow", "latent": 5, "hidden": 250, "observation": "affine"}
EEG = {"kind": "clipped_shallow", "latent": 16, "hidden": 512, "observation": "affine"}
SMALL = {"kind": "clipped_shallow", "hidden": 100}
# Settings of the sources where there are any; "own" marks those chosen here. Slowest first.
SETS: dict[str, dict[str, Any]] = {
    "eeg": {
        "data": {"path": "eeg.parquet", "in_sample": True},
        "model": EEG,
        "forcing": {"method": "constant", "start": 0.1},
        "train": {"sequence_length": 50, "lambda_lat": 1e-4, "lambda_obs": 1e-6},
        "note": "in sample: the published training and test files are the same",
    },
    "ecg": {
        "data": {"path": "ecg_train.parquet", "test": "ecg_test.parquet"},
        "model": ECG,
        "forcing": {"method": "constant", "start": 0.3},
        "train": {"lambda_lat": 0.0, "lambda_obs": 1e-7},
        "note": "trained in deviations of the training rows",
    },
    "ecg_file_units": {
        "data": {"path": "ecg_train.parquet", "test": "ecg_test.parquet", "standardise": False},
        "model": ECG,
        "forcing": {"method": "constant", "start": 0.3},
        "train": {"lambda_lat": 0.0, "lambda_obs": 1e-7},
        "note": "in the units of the file, as in the source: its deviation is 0.824, all other sets have 1",
    },
    "ecg_adaptive": {
        "data": {"path": "ecg_train.parquet", "test": "ecg_test.parquet"},
        "model": ECG,
        "train": {"lambda_lat": 1e-5, "lambda_obs": 1e-6, "estimate_every": 4},
    },
    "lorenz96": {
        "data": {
            "path": "lorenz96_n10_dt001_train.parquet",
            "test": "lorenz96_n10_dt004_test.parquet",
            "every": 4,
            "test_rows": 25_000,
        },
        "model": {"kind": "clipped_shallow", "hidden": 200},
        "train": {"sequence_length": 100, "estimate_every": 4},
        "dt": 0.04,
        "note": "own settings; every 4th training row against the first 25,000 test rows",
    },
    "burstingneuron": {
        "data": {"path": "burstingneuron_train.parquet", "test": "burstingneuron_test.parquet"},
        "model": {"kind": "clipped_shallow", "hidden": 200},
        "forcing": {"estimator": "arithmetic_mean"},
        "train": {"sequence_length": 300, "estimate_every": 4},
        "evaluation": {"expected": "oscillation"},
        "note": "own settings: estimator and length of roessler",
    },
    "lorenz63_noise05": {
        "data": {"path": "lorenz63_noise05_train.parquet", "test": "lorenz63_test.parquet"},
        "model": SMALL,
        "dt": 0.01,
        "evaluation": {"expected": "chaos"},
    },
    "lorenz63_noise10": {
        "data": {"path": "lorenz63_noise10_train.parquet", "test": "lorenz63_test.parquet"},
        "model": SMALL,
        "dt": 0.01,
        "evaluation": {"expected": "chaos"},
    },
    "roessler": {
        "data": {"path": "roessler.parquet", "split": 0.5},
        "model": SMALL,
        "forcing": {"estimator": "arithmetic_mean"},
        "train": {"noise": 0.05, "sequence_length": 300},
        "dt": 0.08,
        "evaluation": {"expected": "chaos"},
        "note": "own settings; first half against second; 5 % noise while training, since the data have none",
    },
}
# These compare the error ahead in the units of their file: the source scales neither the data nor the error.
PUBLISHED_IN_FILE_UNITS = ("ecg", "ecg_adaptive", "ecg_file_units")
# Medians and deviations of D_stsp, D_H, PE(20): arXiv 2306.04406, Table 1 (20 runs); Lorenz-63: single seeds of an
# earlier replication of ours.
PUBLISHED: dict[str, str] = {
    "eeg": "2.1 +- 0.2 / 0.11 +- 0.01 / 0.55 +- 0.01 (GTF, in sample)",
    "ecg": "4.3 +- 0.6 / 0.34 +- 0.02 / 2.4e-3 +- 1e-4 (GTF)",
    "ecg_file_units": "4.3 +- 0.6 / 0.34 +- 0.02 / 2.4e-3 +- 1e-4 (GTF)",
    "ecg_adaptive": "4.5 +- 0.4 / 0.34 +- 0.02 / 2.4e-3 +- 2e-4 (aGTF)",
    "lorenz63_noise05": "0.285 / 0.068 / 9.7e-4 (replication, H=50; H=100: 0.171 and 0.218 / - / 5e-4)",
}


def settings(name: str, data: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Return the config of one seed of a set."""
    plain = json.loads(json.dumps(SETS[name]))
    plain.pop("note", None)
    for key in ("path", "test"):
        if key in plain["data"]:
            plain["data"][key] = str(data / plain["data"][key])
    plain["train"] = {"accelerator": "cpu", "epochs": epochs, "noise": 0.0, **plain.get("train", {})}
    return {**plain, "name": name, "seeds": [seed], "tracking": {"enabled": False}}


def place_of(work: Path, name: str, seed: int, epochs: int) -> Path:
    """Return the file that says that a seed is finished."""
    return work / "finished" / f"{name}-{epochs}-{seed}.json"


def run_one(name: str, args: argparse.Namespace) -> None:
    """Run one seed in this process and keep its record."""
    import torch

    from tsforge.app.reconstruct import ReconstructConfig, reconstruct
    from tsforge.core.config import validate
    from tsforge.core.workspace import Workspace

    torch.set_num_threads(1)
    config = validate(ReconstructConfig, settings(name, args.data, args.one_seed, args.epochs))
    # a workspace a seed: nothing is written by two processes
    workspace = Workspace.open(args.work / "homes" / f"{name}-{args.one_seed}")
    started, cpu = time.perf_counter(), time.process_time()
    result = reconstruct(config, workspace)
    record = {
        **result.seeds[0],
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "settings": config.model_dump(mode="json", exclude={"data", "tracking"}),
    }
    with atomic_file(place_of(args.work, name, args.one_seed, args.epochs)) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def run_all(names: list[str], args: argparse.Namespace) -> list[str]:
    """Run what is not finished, so many processes at a time; return what went wrong."""
    jobs = [
        (name, seed)
        for name in names
        for seed in range(args.seeds)
        if not place_of(args.work, name, seed, args.epochs).exists()
    ]
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    problems = []
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while jobs or running:
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    state = "done" if process.returncode == 0 else f"failed ({process.returncode})"
                    print(f"{job[0]} seed {job[1]}: {state}, {len(jobs)} waiting, {len(running)} running", flush=True)
                    if process.returncode:
                        problems.append(f"{job[0]} seed {job[1]}: see {logs / f'{job[0]}-{job[1]}.txt'}")
            if deadline is not None and time.monotonic() > deadline:
                problems.append(f"out of time: {len(running)} ended, {len(jobs)} not begun; run the same command again")
                break
            while jobs and len(running) < args.workers:
                job = jobs.pop(0)
                running[job] = _start(job, args, logs)
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return problems


def _start(job: tuple[str, int], args: argparse.Namespace, logs: Path) -> subprocess.Popen[bytes]:
    name, seed = job
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--one-seed", str(seed)]
    command += ["--data", str(args.data), "--work", str(args.work), "--epochs", str(args.epochs)]
    environment = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", **os.environ}
    with (logs / f"{name}-{seed}.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def collect(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a set: its settings' note, the summary over the seeds that are finished, and each of them."""
    from tsforge.dynamics.evaluation import summarise

    rows = []
    for name in names:
        places = [place_of(args.work, name, seed, args.epochs) for seed in range(args.seeds)]
        seeds = [_without_points(json.loads(place.read_text())) for place in places if place.exists()]
        if seeds:
            about = {"set": name, "note": SETS[name].get("note", ""), "published": PUBLISHED.get(name, "")}
            healthy = sum(bool(seed["healthy"]) for seed in seeds) / len(seeds)
            row = {**about, **summarise(seeds), "healthy_share": healthy, "runs": seeds}
            if name in PUBLISHED_IN_FILE_UNITS:
                row |= in_file_units(row, name, args.data)
            rows.append(row)
    return rows


def in_file_units(row: dict[str, Any], name: str, data: Path) -> dict[str, Any]:
    """Return the squared error ahead of a row in the units of its file, and the variance of the training rows.

    A mean over variates is converted by one number: right where they have one deviation, as delays of one series do.
    """
    source = SETS[name]["data"]
    frame = pl.read_parquet(data / source["path"]).select(selectors.matches("^x[0-9]+$"))
    variances = [float(variance) for variance in frame.to_numpy().var(axis=0)]
    if max(variances) > 1.02 * min(variances):
        raise ValueError(f"{name}: variances of the variates from {min(variances):.3g} to {max(variances):.3g}")
    scale = sum(variances) / len(variances) if source.get("standardise", True) else 1.0
    if row["pe"] is None:  # every seed failed
        return {"file_variance": scale}
    return {"pe_file_units": row["pe"] * scale, "pe_file_units_mad": row["pe_mad"] * scale, "file_variance": scale}


def _without_points(seed: dict[str, Any]) -> dict[str, Any]:
    """Return the record without the coordinates of its cycles: thousands of numbers that nobody compares."""
    findings = seed.get("findings") or {}
    kept = [
        {key: value for key, value in cycle.items() if key not in ("points", "observed", "multipliers")}
        for cycle in findings.get("cycles") or []
    ]
    return {**seed, "findings": {**findings, "cycles": kept}}


def _pair(row: dict[str, Any], name: str) -> str:
    return "-" if row.get(name) is None else f"{row[name]:.3g} +- {row[f'{name}_mad']:.2g}"


def page(rows: list[dict[str, Any]], args: argparse.Namespace, problems: list[str]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"# Reconstruction of dynamics, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"{args.epochs} epochs of 50 steps, median +- median absolute deviation over seeds, {platform.machine()}, "
        f"one thread a seed, {args.workers} at a time. Failed: parameters or free run not finite. Captured: median "
        "share of free runs from data states that end elsewhere than the data do. Healthy: seeds without a warning.",
        "",
        "| set | seeds | failed | D_stsp | D_H | PE(20) | the same in units of the file | lambda_1 | captured "
        "| healthy | seconds a seed | published D_stsp / D_H / PE(20) | note |",
        "|" + "---|" * 13,
    ]
    for row in rows:
        seconds = sorted(seed["wall_seconds"] for seed in row["runs"])[len(row["runs"]) // 2]
        cells = [row["set"], row["seeds"], f"{row['failed_share']:.0%}"]
        cells += [_pair(row, name) for name in ("d_stsp", "d_h", "pe", "pe_file_units", "lambda_1")]
        captured = "-" if row["captured"] is None else f"{row['captured']:.1%}"
        cells += [captured, f"{row['healthy_share']:.0%}", f"{seconds:.0f}", row["published"], row["note"]]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, help="result files without ending")
    parser.add_argument("--work", type=Path, default=Path(".tsforge/reconstruct_table"), help="where seeds are kept")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 1) - 1, 1))
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--one-seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data, args.work = args.data.resolve(), args.work.resolve()
    if args.one:
        run_one(args.one, args)
        return
    names = [name.strip() for name in args.sets.split(",")]
    unknown = [name for name in names if name not in SETS]
    if unknown or args.out is None:
        parser.error(f"unknown sets {unknown}; known: {', '.join(SETS)}" if unknown else "--out is missing")
    problems = run_all(names, args)
    rows = collect(names, args)
    for ending, text in ((".json", json.dumps(rows, indent=1)), (".md", page(rows, args, problems))):
        with atomic_file(args.out.with_name(args.out.name + ending)) as temporary:
            temporary.write_text(text)
    print(page(rows, args, problems))


if __name__ == "__main__":
    main()
