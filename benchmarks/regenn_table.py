"""ReGENN on panels: rolling origins and several seeds beside drift, linear and S4, with and without its graph.

Usage: python benchmarks/regenn_table.py --data FOLDER --out benchmarks/results/regenn_table_HARDWARE_DATE
    [--sets sars_cov2,beijing_air] [--models "drift;regenn"] [--seeds 5] [--origins 8] [--shift 0] [--workers 2]
    [--minutes 30] [--work FOLDER]

For every origin the data end there: models are fitted on what came before and graded on what follows. Trained models
keep the epoch with the least error over the last rows before the origin, which then do not train; "more dev" takes
every window of a horizon whose target is half known there, "all rows" trains on them too and runs every epoch. Every
cell of all series counts once, on the scale of the page. A run leaves a file below --work, so the same command goes on
where it stopped. Origins are paired: a model is compared with the drift by Wilcoxon's signed ranks of the origins'
errors, seeds averaged first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tsforge.app.benchmark import parse_entry
from tsforge.app.fit_errors import training_unit
from tsforge.artifact import collect_provenance
from tsforge.contracts.tensors import DataSpec
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.metrics.point import mae, msle, rmse
from tsforge.metrics.significance import wilcoxon
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

_EQUAL = 1e-4  # relative difference of errors that is rounding


@dataclass(frozen=True, kw_only=True)
class PanelSet:
    """One panel and how it is cut: steps of context, horizon and validation, rows between origins and in a test."""

    read: Callable[[Path], SeriesFrame]
    context: int
    long_context: int
    horizon: int
    valid: int
    stride: int
    test: int
    train: int | None
    counts: bool
    scaling: str
    options: str
    training: dict[str, Any]


def _sars(data: Path) -> SeriesFrame:
    table = pl.read_parquet(data / "regenn" / "sars_cov2_188x120.parquet")
    return SeriesFrame.from_long(
        table, time="date", series_id="country", targets=("confirmed", "deaths", "recovered"), freq="1d"
    )


def _beijing(data: Path) -> SeriesFrame:
    table = pl.read_parquet(data / "forecast" / "beijing_air.parquet")
    return SeriesFrame.from_wide(table, time="ds", separator=".", freq="1h")


SETS: dict[str, PanelSet] = {
    "sars_cov2": PanelSet(
        read=_sars, context=8, long_context=14, horizon=14, valid=7, stride=7, test=14, train=None, counts=True,
        scaling="none", options="",
        training={"max_epochs": 25, "batch_size": 256},
    ),
    "beijing_air": PanelSet(
        read=_beijing, context=48, long_context=48, horizon=24, valid=14 * 24, stride=30 * 24, test=14 * 24,
        train=365 * 24, counts=False, scaling="global", options=":ar_init=ols",
        training={"max_epochs": 5, "batch_size": 512, "max_steps_per_epoch": 40},
    ),
}  # fmt: skip
TRAINED = {"learning_rate": 2e-3, "schedule": "cosine", "gradient_clip": 10.0, "patience": None, "start_margin": 0.0}
# as the product trains: the start, which is the drift here, is left only where the dev span clearly improves on it
KEPT = {name: value for name, value in TRAINED.items() if name != "start_margin"}
S4 = {"learning_rate": 1e-3, "schedule": "cosine", "patience": None, "start_margin": 0.0}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model: its settings, its training (None: closed form), whether it sees more context and a dev span."""

    text: str
    training: dict[str, Any] | None = None
    longer: bool = False
    dev: bool = False
    more_dev: bool = False

    @property
    def own(self) -> bool:
        """True for the model that the table is about: it has the panel's options, and the absolute error as loss."""
        return self.text.startswith("regenn")


MODELS = {
    "last value": Entry(text="last_value"),
    "drift": Entry(text="drift:steps=7"),
    "linear": Entry(text="linear"),
    "linear longer": Entry(text="linear", longer=True),
    "s4": Entry(text="s4:d_model=32:d_state=32:num_layers=1", training=S4, longer=True, dev=True),
    "autoregression only": Entry(text="regenn:paths=autoregression", training=TRAINED, dev=True),
    "regenn without graph": Entry(text="regenn:ablate_gse=true", training=TRAINED, dev=True),
    "regenn": Entry(text="regenn", training=TRAINED, dev=True),
    "regenn, random graph start": Entry(text="regenn:evolution_init=xavier", training=TRAINED, dev=True),
    "regenn, more dev": Entry(text="regenn", training=TRAINED, dev=True, more_dev=True),
    "regenn, start kept": Entry(text="regenn", training=KEPT, dev=True),
    "autoregression only, all rows": Entry(text="regenn:paths=autoregression", training=TRAINED),
}


@dataclass(frozen=True)
class Job:
    """One fit."""

    data: str
    origin: int
    model: str
    seed: int

    def place(self, work: Path) -> Path:
        """Return the file of its result: another one once its settings change."""
        part = SETS[self.data]
        settings = json.dumps(
            [
                {k: v for k, v in vars(MODELS[self.model]).items() if k != "more_dev" or v},
                part.options,
                part.training,
                part.context,
                part.horizon,
            ],
            default=str,
        )
        key = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return (
            work / f"{self.data}-{self.origin}-{self.model.replace(' ', '_').replace(',', '')}-{self.seed}-{key}.json"
        )


def run(job: Job, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """Fit, grade and keep one job."""
    place = job.place(work)
    if place.exists():
        return dict(json.loads(place.read_text()))
    torch.set_num_threads(threads)
    started = time.perf_counter()
    part = SETS[job.data]
    frame = part.read(data)
    entry = MODELS[job.model]
    length = part.long_context if entry.longer else part.context
    spec = WindowSpec(context_length=length, horizon=part.horizon)
    visible = frame.until(frame.grid.time_at(job.origin - 1)).extend(part.horizon)  # nothing beyond the origin
    panel = Panel.from_frame(visible, grid=frame.grid)
    kept = max(part.valid, part.horizon) if entry.more_dev else part.valid
    middle = job.origin - (kept if entry.dev else 0)
    first = None if part.train is None else middle - part.train
    train = WindowDataset(panel, spec, first, middle)
    stop = job.origin + part.horizon // 2 if entry.more_dev else max(job.origin, middle + part.horizon)
    valid = WindowDataset(panel, spec, middle, stop) if entry.dev else None
    series = panel.training_series(first, middle)
    named = parse_entry(entry.text + (part.options if entry.own else ""))
    settings = {"name": named["name"], **named.get("model", {})}
    network_config = validate(
        NetworkConfig,
        {"model": settings, "likelihood": {"name": "point", "loss": "mae" if entry.own else "mse"}}
        | {"scaling": {"kind": part.scaling if entry.own else "auto"}},
    )
    size = DataSpec(context_length=length, horizon=part.horizon, num_variates=panel.num_targets)
    seed_everything(job.seed)
    network = build_network(network_config, size, seed=derive_seed(job.seed, "weights"))
    config = validate(TrainConfig, {**part.training, **(entry.training or {}), "seed": job.seed, "accelerator": "cpu"})
    result = fit_network(network, train, valid, config, series=series, progress=False)
    whole = Panel.from_frame(frame)
    tests = WindowDataset(whole, spec, job.origin, job.origin + part.test)
    record = {
        **vars(job),
        **grade(network, tests, part, series),
        "best_epoch": result.best_epoch,
        "parameters": sum(value.numel() for value in network.model.parameters() if value.requires_grad),
        "seconds": time.perf_counter() - started,
    }
    with atomic_file(place) as temporary:
        temporary.write_text(json.dumps(record))
    return record


def grade(network: Any, windows: WindowDataset, part: PanelSet, series: Any) -> dict[str, Any]:
    """Return errors over all cells: data units for counts (no forecast below 0), else training deviations."""
    targets, means, masks = [], [], []
    for batch in forecast_batches(network, windows):
        if batch.target is None or batch.mask is None:
            raise SystemExit("test windows lost their targets")
        targets.append(batch.target)
        means.append(batch.mean)
        masks.append(batch.mask)
    target, mean, mask = (np.concatenate(found) for found in (targets, means, masks))
    if part.counts:
        mean = np.maximum(mean, 0.0)
    else:
        unit = training_unit(series)
        target, mean = target / unit, mean / unit
    return {
        "mae": float(mae(target, mean, mask).value),
        "rmse": float(rmse(target, mean, mask).value),
        "msle": float(msle(target, mean, mask).value) if part.counts else None,
        "mae_by_variate": mae(target, mean, mask, axis=(0, 1)).value.tolist(),
        "cells": int(np.asarray(mask).sum()),
    }


def plan(options: argparse.Namespace) -> list[Job]:
    """Return all jobs, quick models first, then origin by origin."""
    jobs = []
    for name in options.sets.split(","):
        part = SETS[name]
        stop = Panel.from_frame(part.read(options.data)).span()[1]
        latest = stop - part.test - options.shift
        origins = [latest - part.stride * back for back in range(options.origins)][::-1]
        for model in options.models.split(";"):
            seeds = range(options.seeds if MODELS[model].training else 1)
            jobs += [Job(name, origin, model, seed) for seed in seeds for origin in origins]
    return jobs


def measure(jobs: list[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the records of all jobs begun in time."""
    options.work.mkdir(parents=True, exist_ok=True)
    records = [
        dict(json.loads(job.place(options.work).read_text())) for job in jobs if job.place(options.work).exists()
    ]
    waiting = [job for job in jobs if not job.place(options.work).exists()]
    began = time.monotonic()
    if not waiting:
        return records
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], Job] = {}
        while waiting or running:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                waiting = []
            while waiting and len(running) < options.workers:
                job = waiting.pop(0)
                running[pool.submit(run, job, options.data, options.work, options.threads)] = job
            done = next(as_completed(list(running))) if running else None
            if done is None:
                break
            job = running.pop(done)
            records.append(done.result())
            print(
                f"{time.monotonic() - began:6.0f} s {job} mae {records[-1]['mae']:.5g}, {len(waiting)} left", flush=True
            )
    return records


def by_origin(records: Iterable[dict[str, Any]], data: str, model: str, metric: str) -> dict[int, list[float]]:
    """Return origin -> the values of its seeds."""
    found: dict[int, list[float]] = {}
    for row in records:
        if row["data"] == data and row["model"] == model and row[metric] is not None:
            found.setdefault(row["origin"], []).append(row[metric])
    return found


def _paired(first: dict[int, list[float]], second: dict[int, list[float]]) -> tuple[Any, Any]:
    """Return the means over seeds at the origins that both have; what differs by rounding only is made equal."""
    shared = sorted(set(first) & set(second))
    ours, theirs = (np.array([np.mean(found[origin]) for origin in shared]) for found in (first, second))
    return np.where(np.abs(ours / theirs - 1) < _EQUAL, theirs, ours), theirs


def table(records: list[dict[str, Any]], data: str) -> list[str]:
    """Return the table of one panel, then its errors origin by origin."""
    part = SETS[data]
    models = [name for name in MODELS if by_origin(records, data, name, "mae")]
    base = by_origin(records, data, "drift", "mae")
    metrics = ("mae", "rmse", "msle") if part.counts else ("mae", "rmse")
    unit = "data units, forecasts not below 0" if part.counts else "deviations of the training rows"
    lines = [
        "",
        f"## {data}",
        "",
        f"Context {part.context} ({part.long_context} for longer), horizon {part.horizon}, tests of {part.test} rows, "
        f"{len(base)} origins {part.stride} rows apart; {unit}. Ratio: geometric mean over origins of the MAE against "
        "the drift's; sd: of the MAE over seeds, mean over origins; p: Wilcoxon, two-sided, origins as pairs.",
        "",
        f"| model | {' | '.join(map(str.upper, metrics))} | sd | ratio | better at | p | seeds | s a fit |",
        "|---|" + "---|" * (len(metrics) + 6),
    ]
    for model in models:
        errors = by_origin(records, data, model, "mae")
        ours, theirs = _paired(errors, base)
        cells = []
        for metric in metrics:
            found = by_origin(records, data, model, metric)
            cells.append(f"{np.mean([np.mean(found[origin]) for origin in found]):.4g}")
        spread = [np.std(values, ddof=1) for values in errors.values() if len(values) > 1]
        p = wilcoxon(ours, theirs).p_value if model != "drift" and len(ours) > 1 else np.nan
        seconds = np.mean([row["seconds"] for row in records if row["data"] == data and row["model"] == model])
        lines.append(
            f"| {model} | {' | '.join(cells)} | {f'{np.mean(spread):.3g}' if spread else ''} | "
            f"{np.exp(np.mean(np.log(ours / theirs))):.3f} | {int((ours < theirs).sum())} of {len(ours)} | "
            f"{'' if np.isnan(p) else f'{p:.3f}'} | {min(map(len, errors.values()))} | {seconds:.1f} |"
        )
    lines += _pairs(records, data)
    lines += ["", "MAE at each origin (row of the first forecast), mean over seeds:", ""]
    origins = sorted(base)
    lines += [f"| model | {' | '.join(map(str, origins))} |", "|---|" + "---|" * len(origins)]
    for model in models:
        errors = by_origin(records, data, model, "mae")
        cells = [f"{np.mean(errors[origin]):.4g}" if origin in errors else "" for origin in origins]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _pairs(records: list[dict[str, Any]], data: str) -> list[str]:
    """Return what each part of the model brings: paired over origins, and over origins and seeds."""
    lines = []
    for ours, theirs in (
        ("regenn", "regenn without graph"),
        ("regenn without graph", "autoregression only"),
        ("regenn", "autoregression only"),
        ("regenn, more dev", "drift"),
        ("regenn, start kept", "drift"),
        ("regenn", "linear"),
        ("regenn", "s4"),
    ):
        first, second = (by_origin(records, data, name, "mae") for name in (ours, theirs))
        means = _paired(first, second)
        if len(means[0]) < 2:
            continue
        ratio = np.exp(np.mean(np.log(means[0] / means[1])))
        better, count = int((means[0] < means[1]).sum()), len(means[0])
        lines.append(
            f"- {ours} against {theirs}: MAE {ratio:.4f} times, better at {better} of {count} origins, equal at "
            f"{int((means[0] == means[1]).sum())}, p {wilcoxon(*means).p_value:.3f}"
        )
    return ["", *lines] if lines else []


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds regenn/ and forecast/")
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--models", default=";".join(MODELS), help="by semicolons")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--origins", type=int, default=8)
    parser.add_argument("--shift", type=int, default=0, help="rows by which all origins lie earlier")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None, help="begin no fit after this time")
    parser.add_argument("--work", type=Path, default=Path("regenn_table_work"), help="where finished fits are kept")
    options = parser.parse_args()
    checks: list[tuple[str, str, str, dict[str, Any]]] = [
        ("model", options.models, ";", MODELS),
        ("panel", options.sets, ",", SETS),
    ]
    for kind, given, separator, known in checks:
        unknown = [name for name in given.split(separator) if name not in known]
        if unknown:
            raise SystemExit(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    records = measure(plan(options), options)
    about = {
        "made": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} {platform.machine()} cores, {options.workers} fits at a time",
        "torch": torch.__version__,
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
        "models": {name: MODELS[name].text for name in options.models.split(";")},
    }
    page = [
        "# ReGENN on panels, rolling origins",
        "",
        f"{about['made']}, {about['hardware']}, torch {about['torch']}, revision {about['revision']}. Models: "
        + "; ".join(f"`{entry}` ({name})" for name, entry in about["models"].items())
        + ".",
    ]
    for name in options.sets.split(","):
        own = SETS[name].options
        page += table(records, name)
        page += ["", f"regenn with `{own[1:]}` here."] if own else []
    for ending, content in (
        (".json", json.dumps({**about, "rows": records}, indent=1)),
        (".md", "\n".join(page) + "\n"),
    ):
        with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
