"""S4 against the closed-form linear forecaster it starts from, every test window of ETTh1, ETTh2, ETTm1 and exchange.

Usage: python benchmarks/ssm_table.py --data FOLDER --out benchmarks/results/ssm_HARDWARE_DATE [--sets ETTh1,...]
       [--seeds 3] [--model s4:...]

Errors are those of the benchmark harness (``tsforge benchmark``): literature splits, standardised by the training
rows, no window dropped. It goes on where it stopped; several processes can share the work with --part I/N, each on
its own share of the settings, before a last call without --part writes the page. Published rows come from the papers'
tables with their own look-back and are for orientation only.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsforge.app.benchmark import BenchmarkConfig, benchmark
from tsforge.artifact import collect_provenance
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace

SETS = ("ETTh1", "ETTh2", "ETTm1", "exchange_rate")
LENGTHS = (336, 720)
HORIZONS = (96, 192, 336, 720)
LINEAR = "linear"
CHOSEN = "linear:ridge=null:remove=auto:weights=auto"
STATE_SPACE = (
    "s4:d_model=32:d_state=32:num_layers=1:dropout=0.2:patch_length=16:patch_stride=8"
    ":train.max_epochs=3:train.patience=2:train.max_steps_per_epoch=80:train.batch_size=64"
    ":train.learning_rate=1e-3:train.schedule=one_cycle:train.weight_decay=0.01"
)
# Published MSE at 96, 192, 336, 720 steps, each with its own look-back, for orientation: PatchTST/42 (look-back 336;
# Nie et al. 2023, ICLR, Table 3) and iTransformer (look-back 96; Liu et al. 2024, ICLR, Table 10), as remembered; the
# LTSF-Linear file (look-back 336) as listed in its repository, whose loader drops the last incomplete batch.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "ETTh1": {
        "NLinear (published, L=336)": (0.374, 0.408, 0.429, 0.440),
        "DLinear (published, L=336)": (0.375, 0.405, 0.439, 0.472),
        "PatchTST/42 (published, L=336, from memory)": (0.375, 0.414, 0.431, 0.449),
        "iTransformer (published, L=96, from memory)": (0.386, 0.441, 0.487, 0.503),
    },
    "ETTh2": {
        "NLinear (published, L=336)": (0.277, 0.344, 0.357, 0.394),
        "DLinear (published, L=336)": (0.289, 0.383, 0.448, 0.605),
        "PatchTST/42 (published, L=336, from memory)": (0.274, 0.339, 0.331, 0.379),
        "iTransformer (published, L=96, from memory)": (0.297, 0.380, 0.428, 0.427),
    },
    "ETTm1": {
        "NLinear (published, L=336)": (0.306, 0.349, 0.375, 0.433),
        "DLinear-I (published, L=336)": (0.286, 0.327, 0.366, 0.427),
        "PatchTST/42 (published, L=336, from memory)": (0.290, 0.332, 0.366, 0.420),
        "iTransformer (published, L=96, from memory)": (0.334, 0.377, 0.426, 0.491),
    },
    "exchange_rate": {
        "NLinear (published)": (0.081, 0.157, 0.305, 0.643),
        "iTransformer (published, L=96, from memory)": (0.086, 0.177, 0.331, 0.847),
    },
}


def measure(folder: Path, options: argparse.Namespace, workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a run."""
    part, parts = options.part
    records: list[dict[str, Any]] = []
    number = 0
    for name in options.sets.split(","):
        for length in LENGTHS:
            for horizon in HORIZONS:
                number += 1
                if number % parts != part:
                    continue
                config = {
                    "path": str(folder / "forecast" / f"{name}.parquet"),
                    "models": [LINEAR, CHOSEN, options.model],
                    "context_lengths": [length],
                    "horizons": [horizon],
                    "seeds": options.seeds,
                }
                table = benchmark(validate(BenchmarkConfig, config), workspace, progress=True).table
                titles = {LINEAR: "linear", CHOSEN: "linear, ridge and level chosen", options.model: "s4"}
                kept = (
                    "context_length", "horizon", "seed", "mse", "mae", "windows", "fit_seconds", "eval_seconds",
                    "cpu_seconds", "parameters", "epochs", "status", "error",
                )  # fmt: skip
                records += [
                    {"data": name, "model": titles.get(row["model"], row["model"]), **{key: row[key] for key in kept}}
                    for row in table.iter_rows(named=True)
                ]
    return records


def errors(records: list[dict[str, Any]], **match: Any) -> tuple[list[float], list[float]]:
    """Return the MSEs and MAEs of the runs that match."""
    rows = [row for row in records if row["status"] == "ok" and all(row[key] == value for key, value in match.items())]
    return [row["mse"] for row in rows], [row["mae"] for row in rows]


def page(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the records as a page: a table a data set, then the comparison asked for."""
    lines = [
        "# S4 beside the linear forecaster it starts from",
        "",
        f"{about['made']}, {about['hardware']}, torch {about['torch']} on {about['threads']} thread(s), revision "
        f"{about['revision']}. Every test window, standardised units, MSE / MAE; s4: mean of {about['seeds']} seeds, "
        "in brackets the spread of the MSE (largest - smallest).",
        "",
        f"s4 is `{about['model']}`.",
    ]
    summary = [
        "",
        "## Against the closed form",
        "",
        "| data | L | mean MSE linear | chosen | s4 | s4 / linear | s4 / chosen | worst cell against linear | "
        "against chosen | runs in which the stack was kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["data"] for row in records):
        lines += ["", f"## {name}", "", "| model | L | 96 | 192 | 336 | 720 | s (cpu, mean) |"]
        lines.append("|---|---|---|---|---|---|---|")
        models = list(dict.fromkeys(row["model"] for row in records if row["data"] == name))
        for length in LENGTHS:
            for model in models:
                match = {"data": name, "model": model, "context_length": length}
                cells = [_cell(records, horizon=horizon, **match) for horizon in HORIZONS]
                if all(cell == "" for cell in cells):
                    continue
                seconds = [
                    row["cpu_seconds"] for row in records
                    if row["data"] == name and row["model"] == model and row["context_length"] == length
                ]  # fmt: skip
                lines.append(f"| {model} | {length} | {' | '.join(cells)} | {np.mean(seconds):.0f} |")
            summary.append(_against(records, name, length))
        for title, values in PUBLISHED.get(name, {}).items():
            lines.append(f"| {title} | | {' | '.join(f'{value:.3f}' for value in values)} | |")
    return "\n".join([*lines, *summary]) + "\n"


def _cell(records: list[dict[str, Any]], **match: Any) -> str:
    mse, mae = errors(records, **match)
    if not mse:
        return ""
    spread = f" [{max(mse) - min(mse):.4f}]" if len(mse) > 1 else ""
    return f"{np.mean(mse):.4f} / {np.mean(mae):.4f}{spread}"


def _against(records: list[dict[str, Any]], name: str, length: int) -> str:
    columns: dict[str, list[float]] = {}
    for model in ("linear", "linear, ridge and level chosen", "s4"):
        found = [errors(records, data=name, model=model, horizon=h, context_length=length)[0] for h in HORIZONS]
        columns[model] = [float(np.mean(mse)) if mse else float("nan") for mse in found]
    linear, chosen, ours = (np.array(part) for part in columns.values())
    kept = total = 0
    for horizon, base in zip(HORIZONS, chosen, strict=True):
        for mse in errors(records, data=name, model="s4", horizon=horizon, context_length=length)[0]:
            total += 1
            kept += abs(mse - base) > 1e-6
    return (
        f"| {name} | {length} | {linear.mean():.4f} | {chosen.mean():.4f} | {ours.mean():.4f} | "
        f"{ours.mean() / linear.mean():.4f} | {ours.mean() / chosen.mean():.4f} | {(ours / linear).max():.4f} | "
        f"{(ours / chosen).max():.4f} | {kept} of {total} |"
    )


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds forecast/")
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default=STATE_SPACE)
    parser.add_argument("--home", type=Path, default=None, help="workspace of the cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default=None, help="I/N: measure only this share and write no page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = options.part is not None
    options.part = tuple(int(item) for item in options.part.split("/")) if only else (0, 1)
    workspace = Workspace.open(options.home)
    records = measure(options.data, options, workspace)
    if only:
        return
    about = {
        "made": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seeds": options.seeds,
        "model": options.model,
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
    }
    text = page(records, about)
    for ending, content in ((".json", json.dumps({**about, "rows": records}, indent=1)), (".md", text)):
        with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
            temporary.write_text(content)
    print(text)


if __name__ == "__main__":
    main()
