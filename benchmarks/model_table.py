"""Trained models against the closed-form linear forecaster they start from, every test window of real data sets.

Usage: python benchmarks/model_table.py --data FOLDER --out benchmarks/results/model_table_HARDWARE_DATE
       [--sets ETTh1,...] [--models closed,s4,chimera] [--seeds 3] [--workers 2] [--minutes M] [--beside OTHER.json]

Errors are those of the benchmark harness (``tsforge benchmark``): literature splits, standardised by the training
rows, no window dropped. Every setting is kept in the workspace (``--home``) once it is done, so a run goes on where it
stopped; ``--minutes`` begins no setting after that time. ``--calendar hour,weekday,dayofyear`` gives these features to
models that take known covariates. Published rows come from the papers' tables with their own look-back and are for
orientation only. ``--models`` names presets, listed with their settings in ``PRESETS``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsforge.app.benchmark import BenchmarkConfig, benchmark
from tsforge.app.benchmark_sets import published_results
from tsforge.artifact import collect_provenance
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace

STATIONS = (
    "Aotizhongxin", "Changping", "Dingling", "Dongsi", "Guanyuan", "Gucheng", "Huairou", "Nongzhanguan", "Shunyi",
    "Tiantan", "Wanliu", "Wanshouxigong",
)  # fmt: skip
FEWER = ("Aotizhongxin", "Changping", "Dongsi", "Shunyi")
SETS: dict[str, tuple[str, ...] | None] = {  # columns; None: all of them
    "ETTh1": None,
    "ETTh2": None,
    "ETTm1": None,
    "exchange_rate": None,
    "beijing_air_pm25": tuple(f"{station}.PM2.5" for station in STATIONS),
    "beijing_air": tuple(f"{station}.{part}" for part in ("PM2.5", "WSPM") for station in STATIONS),
    "beijing_air_4_stations": tuple(f"{station}.PM2.5" for station in FEWER),
}
HORIZONS = (96, 192, 336, 720)
LINEAR, CHOSEN = "linear", "linear, ridge and level chosen"
_TRAIN = (
    ":train.max_steps_per_epoch=80:train.batch_size=64:train.schedule=one_cycle:train.weight_decay=0.01"
    ":train.learning_rate=1e-3:train.max_epochs=3:train.patience=2"
)
_LONG = _TRAIN.replace("epoch=80", "epoch=250").replace("epochs=3", "epochs=12").replace("patience=2", "patience=4")
_PLRNN = (
    ":train.max_steps_per_epoch=40:train.schedule=cosine:train.weight_decay=0.1:train.learning_rate=5e-4"
    ":train.max_epochs=8:train.patience=3"
)
_CHIMERA = "chimera:d_model=32:d_state=8:num_layers=2:dropout=0.2"


@dataclass(frozen=True)
class Preset:
    """A model with its look-backs."""

    entry: str
    lengths: tuple[int, ...]


PRESETS = {
    LINEAR: Preset("linear", (96, 336, 720)),
    CHOSEN: Preset("linear:ridge=null:remove=auto:weights=auto", (96, 336, 720)),
    "temporal": Preset("temporal", (96, 336, 720)),
    "temporal, structural": Preset("temporal:weights=structural", (96, 336, 720)),
    "s4": Preset(
        "s4:d_model=32:d_state=32:num_layers=1:dropout=0.2:patch_length=16:patch_stride=8" + _TRAIN,
        (336, 720),
    ),
    "chimera": Preset(_CHIMERA + _TRAIN, (96, 336)),
    "chimera, longer": Preset(_CHIMERA + _LONG, (96, 336)),
    "chimera alone": Preset(_CHIMERA + ":skip=none" + _TRAIN, (96, 336)),
    "chimera alone, longer": Preset(_CHIMERA + ":skip=none" + _LONG, (96, 336)),
    "chimera alone, longer: no coupling": Preset(_CHIMERA + ":skip=none:coupling=none" + _LONG, (96, 336)),
    "chimera alone: no coupling": Preset(_CHIMERA + ":skip=none:coupling=none" + _TRAIN, (96, 336)),
    "chimera alone: pooled": Preset(_CHIMERA + ":skip=none:coupling=pooled" + _TRAIN, (96,)),
    "chimera alone: forward only": Preset(_CHIMERA + ":skip=none:directions=forward" + _TRAIN, (96,)),
    "chimera alone: trend only": Preset(_CHIMERA + ":skip=none:heads=trend" + _TRAIN, (96,)),
    "chimera alone: seasonal only": Preset(_CHIMERA + ":skip=none:heads=seasonal" + _TRAIN, (96,)),
    "chimera alone: no gate": Preset(_CHIMERA + ":skip=none:gate=false" + _TRAIN, (96,)),
    "chimera alone: not selective": Preset(_CHIMERA + ":skip=none:selective=false" + _TRAIN, (96,)),
    "plrnn (1 member)": Preset("plrnn:skip=none:ensemble=1:train.batch_size=32" + _PLRNN, (96,)),
    "plrnn (4 members)": Preset("plrnn:skip=none:ensemble=4:train.batch_size=128" + _PLRNN, (96,)),
    "plrnn (1 member) beside linear": Preset("plrnn:ensemble=1:train.batch_size=32" + _PLRNN, (96,)),
    "plrnn (4 members; free run)": Preset(
        "plrnn:skip=none:ensemble=4:objective=horizon:train.batch_size=128" + _PLRNN,
        (96,),
    ),
    **{
        f"{name}{title}": Preset(f"{name}:dropout=0.2{rest}", (336,))
        for name in ("gru", "lstm", "slstm", "aaren")
        for title, rest in (("", _TRAIN), (" alone", ":skip=none" + _LONG))
    },
    "committee of 4 gru alone": Preset(  # batches and steps of a member as those of one model
        "committee:size=4:member.name=gru:member.dropout=0.2:member.skip=none"
        + _LONG.replace("batch_size=64", "batch_size=256").replace("epochs=12", "epochs=48").replace("ce=4", "ce=16"),
        (336,),
    ),
    # the time of one network: its training without a stop, and the same number of steps in four falls of the rate
    "gru alone, no stop": Preset("gru:dropout=0.2:skip=none" + _LONG.replace("patience=4", "patience=null"), (336,)),
    "4 snapshots of gru alone": Preset(
        "committee:snapshots=4:member.name=gru:member.dropout=0.2:member.skip=none"
        + _LONG.replace("patience=4", "patience=null").replace("one_cycle", "cyclic_cosine:train.cycles=4"),
        (336,),
    ),
    "aaren alone: sinusoid": Preset("aaren:dropout=0.2:skip=none:position=sinusoid" + _LONG, (336,)),
}
GROUPS = {
    "recurrent": tuple(name for name in PRESETS if name.split()[0] in ("gru", "lstm", "slstm", "aaren")),
    "plrnn": tuple(name for name in PRESETS if name.startswith("plrnn")),
    "ablations": tuple(name for name in PRESETS if name.startswith("chimera alone") and ", longer" not in name),
    "closed": (LINEAR, CHOSEN),
    "snapshots": ("gru alone, no stop", "4 snapshots of gru alone"),
    "temporal": ("temporal", "temporal, structural"),
    "longer": tuple(name for name in PRESETS if ", longer" in name),
}
KEPT = (
    "context_length", "horizon", "seed", "mse", "mae", "windows", "fit_seconds", "eval_seconds", "cpu_seconds",
    "parameters", "epochs", "device", "status", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One model on one data set with one look-back and horizon, all seeds."""

    data: str
    length: int
    horizon: int
    model: str


def plan(sets: list[str], models: list[str], lengths: list[int], horizons: list[int]) -> list[Job]:
    """Return all jobs: those that take longest first, so that no worker is left with one at the end."""
    jobs = [
        Job(data, length, horizon, model)
        for model in models
        for data in sets
        for length in lengths
        for horizon in horizons
        if length in PRESETS[model].lengths
    ]
    return sorted(jobs, key=lambda job: (-job.length, job.model, -job.horizon))


def file_of(name: str) -> str:
    """Return the name of the file that holds a set: its columns tell sets of one file apart."""
    return "beijing_air" if name.startswith("beijing_air") else name


def run(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record a seed, and the naive forecasts' records with those of the linear model."""
    torch.set_num_threads(options.threads)
    config: dict[str, Any] = {
        "datasets": [str(options.data / "forecast" / f"{file_of(job.data)}.parquet")],
        "baselines": "naive",
        "models": [PRESETS[job.model].entry],
        "context_lengths": [job.length],
        "horizons": [job.horizon],
        "seeds": options.seeds,
        "calendar": [name for name in options.calendar.split(",") if name],
    }
    columns = SETS[job.data]
    if columns is not None:
        config["columns"] = list(columns)
    table = benchmark(validate(BenchmarkConfig, config), Workspace.open(options.home), progress=False).table
    rows = []
    for row in table.iter_rows(named=True):
        own = row["model"] == PRESETS[job.model].entry
        if own or job.model == LINEAR:
            title = job.model if own else row["model"]
            rows.append({"data": job.data, "model": title, **{key: row[key] for key in KEPT}})
    return rows


def measure(jobs: list[Job], options: argparse.Namespace, save: Any) -> list[dict[str, Any]]:
    """Return the records of all jobs begun in time, saved as they come."""
    began = time.monotonic()
    records: list[dict[str, Any]] = []
    waiting = list(jobs)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[list[dict[str, Any]]], Job] = {}
        while waiting or running:
            late = options.minutes is not None and time.monotonic() - began > 60 * options.minutes
            if late:
                waiting = []
            while waiting and len(running) < options.workers:
                job = waiting.pop(0)
                running[pool.submit(run, job, options)] = job
            for done in as_completed(list(running)):
                job = running.pop(done)
                records += done.result()
                save(records)
                print(f"{time.monotonic() - began:6.0f} s {job} {len(waiting)} waiting", flush=True)
                break
    return records


def errors(records: list[dict[str, Any]], **match: Any) -> tuple[list[float], list[float]]:
    """Return the MSEs and MAEs of the runs that match."""
    rows = [row for row in records if row["status"] == "ok" and all(row[key] == value for key, value in match.items())]
    return [row["mse"] for row in rows], [row["mae"] for row in rows]


def page(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the records as a page: a table a data set, then the comparison asked for."""
    lines = [
        "# Trained models beside the linear forecaster they start from",
        "",
        "Every test window, standardised units, MSE / MAE; mean over seeds, in brackets the spread of the MSE (largest "
        "- smallest).",
        "",
    ]
    for part in (*about["beside"], about):
        lines += [
            f"{part['made']}, {part['hardware']}, torch {part['torch']}, {part['workers']} runs at a time, up to "
            f"{part['seeds']} seeds, {'calendar features ' + part['calendar'] + ', ' if part.get('calendar') else ''}"
            f"revision {part['revision']}:",
            "",
            *[f"- `{name}` is `{preset['entry']}`" for name, preset in part["models"].items()],
            "",
        ]
    order = list(PRESETS)
    names = [name for name in SETS if any(row["data"] == name for row in records)]
    for name in names:
        horizons = sorted({row["horizon"] for row in records if row["data"] == name})
        lines += ["", f"## {name}", "", f"| model | L | {' | '.join(map(str, horizons))} | mean | s (fit, mean) |"]
        lines.append("|---|---|" + "---|" * len(horizons) + "---|---|")
        found = dict.fromkeys(row["model"] for row in records if row["data"] == name)
        models = sorted(found, key=lambda model: order.index(model) if model in order else -1)
        for length in sorted({row["context_length"] for row in records}):
            for model in models:
                match = {"data": name, "model": model, "context_length": length}
                cells = [_cell(records, horizon=horizon, **match) for horizon in horizons]
                if all(cell == "" for cell in cells):
                    continue
                seconds = [row["fit_seconds"] for row in records if all(row[key] == match[key] for key in match)]
                means = [np.mean(mse) for h in horizons for mse in [errors(records, horizon=h, **match)[0]] if mse]
                mean = f"{np.mean(means):.4f}" if len(means) == len(horizons) else ""
                spent = [value for value in seconds if value is not None]
                lines.append(
                    f"| {model} | {length} | {' | '.join(cells)} | {mean} | {np.mean(spent) if spent else 0:.0f} |"
                )
        if tuple(horizons) != HORIZONS:
            continue
        for row in published_results().of(name):
            values = row.mse.get(name)
            if values is not None and row.horizons == HORIZONS:
                cells = [f"{value:.3f}" for value in values]
                lines.append(f"| {row.title} | | {' | '.join(cells)} | {np.mean(values):.3f} | |")
            elif name in row.mean_mse:
                lines.append(f"| {row.title} | | | | | | {row.mean_mse[name]:.3f} | |")
    failed = [row for row in records if row["status"] != "ok"]
    lines += ["", f"{len(failed)} runs failed." if failed else "No run failed."]
    lines += [f"- {row['data']} {row['model']}: {row['error']}" for row in failed[:10]]
    return "\n".join([*lines, *_summary(records, names)]) + "\n"


def _cell(records: list[dict[str, Any]], **match: Any) -> str:
    mse, mae = errors(records, **match)
    if not mse:
        return ""
    spread = f" [{max(mse) - min(mse):.4f}]" if len(mse) > 1 else ""
    return f"{np.mean(mse):.4f} / {np.mean(mae):.4f}{spread}"


def _summary(records: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Return, for every trained model, how it stands against the closed form."""
    lines = [
        "",
        "## Against the closed form",
        "",
        "A run in which training gave nothing clear is the closed form itself (`train.start_margin`): the last column "
        "counts the others.",
        "",
        "| model | data | L | mean MSE linear | chosen | model | model / linear | model / chosen | worst cell against "
        "linear | against chosen | runs that differ from chosen |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, preset in PRESETS.items():
        for name in names:
            for length in preset.lengths if model not in (LINEAR, CHOSEN) else ():
                match = {"data": name, "context_length": length}
                columns = [
                    [errors(records, model=title, horizon=horizon, **match)[0] for horizon in HORIZONS]
                    for title in (LINEAR, CHOSEN, model)
                ]
                if any(not cell for column in columns for cell in column):
                    continue
                linear, chosen, ours = (np.array([np.mean(cell) for cell in column]) for column in columns)
                runs = [abs(mse - base) > 1e-6 for cell, base in zip(columns[2], chosen, strict=True) for mse in cell]
                lines.append(
                    f"| {model} | {name} | {length} | {linear.mean():.4f} | {chosen.mean():.4f} | {ours.mean():.4f} | "
                    f"{ours.mean() / linear.mean():.4f} | {ours.mean() / chosen.mean():.4f} | "
                    f"{(ours / linear).max():.4f} | {(ours / chosen).max():.4f} | {sum(runs)} of {len(runs)} |"
                )
    return lines


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds forecast/")
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--lengths", default="96,336,720", help="look-backs, of those that a preset names")
    parser.add_argument(
        "--horizons", default=",".join(map(str, HORIZONS)), help="steps; published rows need the usual four"
    )
    parser.add_argument(
        "--models",
        default="closed,s4,chimera",
        help="presets by commas; 'ablations', 'longer', 'plrnn', 'recurrent', 'snapshots' and 'closed' for several",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calendar", default="", help="features of the time stamp for models with known covariates")
    parser.add_argument("--home", type=Path, default=None, help="workspace of the cache")
    parser.add_argument("--workers", type=int, default=1, help="settings at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="results (JSON) to show in the same page")
    parser.add_argument("--minutes", type=float, default=None, help="begin no setting after this time")
    options = parser.parse_args()
    asked = options.models.split(",")
    models = [name for item in asked for name in GROUPS.get(item, (item,))]
    for kind, given, known in (("model", models, PRESETS), ("data set", options.sets.split(","), SETS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    numbers = [[int(item) for item in text.split(",")] for text in (options.lengths, options.horizons)]
    jobs = plan(options.sets.split(","), models, *numbers)
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in options.beside]
    gpu = torch.cuda.is_available()
    about = {
        "made": datetime.now(UTC).date().isoformat(),
        "hardware": (f"{torch.cuda.get_device_name()} and " if gpu else "")
        + f"{os.cpu_count()} {platform.machine()} cores",
        "torch": torch.__version__,
        "workers": options.workers,
        "calendar": options.calendar,
        "seeds": options.seeds,
        "models": {name: asdict(PRESETS[name]) for name in models},
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
        "beside": [{key: value for key, value in result.items() if key != "rows"} for result in earlier],
    }
    begun = [row for result in earlier for row in result["rows"]]

    def save(records: list[dict[str, Any]]) -> None:
        for ending, content in (
            (".json", json.dumps({**about, "rows": records}, indent=1)),
            (".md", page(records, about)),
        ):
            with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
                temporary.write_text(content, encoding="utf-8")

    save(begun)
    print(page(begun + measure(jobs, options, lambda records: save(begun + records)), about))


if __name__ == "__main__":
    main()
