"""Closed-form linear forecasts on ETTh1, ETTh2, ETTm1 and exchange: every test window, next to the baselines table.

Usage: python benchmarks/linear_table.py --data FOLDER --out benchmarks/results/linear_HARDWARE_DATE [--sets ETTh1,...]

Errors are those of the benchmark harness (``tsforge benchmark``). Seconds are wall and processor time of fit and
evaluation together; on a shared machine only the second says something. Writes OUT.json and OUT.md; goes on where it
stopped, since the harness caches every setting. With --again S, settings slower than S seconds are measured again and
the faster run counts (something else ran on the machine); the page says how many.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tsforge.app.benchmark import BenchmarkConfig, benchmark
from tsforge.artifact import collect_provenance
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace

HORIZONS = (96, 192, 336, 720)
MODELS = {
    "OLS": "linear:ridge=0:remove=none:offset=constant",
    "OLS+IN": "linear:ridge=1e-5:offset=window_scale",
    "ridge 5e4 + IN": "linear:ridge=5e4:offset=window_scale",
    "linear (default)": "linear",
}
# Baselines table, section 4.3 (mse, mae at h = 96, 192, 336, 720), measured on explicit windows.
EXPECTED: dict[tuple[str, str, int], list[tuple[float, float]]] = {
    ("ETTh1", "OLS", 336): [(0.370, 0.392), (0.404, 0.413), (0.433, 0.434), (0.471, 0.488)],
    ("ETTh1", "OLS+IN", 336): [(0.371, 0.392), (0.405, 0.412), (0.431, 0.429), (0.442, 0.457)],
    ("ETTh1", "OLS", 720): [(0.376, 0.399), (0.413, 0.422), (0.448, 0.448), (0.492, 0.505)],
    ("ETTh1", "OLS+IN", 720): [(0.376, 0.399), (0.413, 0.422), (0.446, 0.442), (0.464, 0.475)],
    ("ETTh1", "ridge 5e4 + IN", 720): [(0.366, 0.398), (0.400, 0.418), (0.424, 0.434), (0.430, 0.458)],
    ("ETTh2", "OLS", 336): [(0.302, 0.365), (0.397, 0.428), (0.486, 0.484), (0.741, 0.612)],
    ("ETTh2", "OLS+IN", 336): [(0.273, 0.335), (0.334, 0.377), (0.358, 0.400), (0.390, 0.429)],
    ("ETTh2", "OLS", 720): [(0.309, 0.373), (0.423, 0.444), (0.539, 0.512), (0.900, 0.672)],
    ("ETTh2", "OLS+IN", 720): [(0.270, 0.335), (0.331, 0.375), (0.354, 0.398), (0.382, 0.428)],
    ("ETTh2", "ridge 5e4 + IN", 720): [(0.271, 0.335), (0.331, 0.373), (0.352, 0.394), (0.379, 0.423)],
    ("ETTh1", "last value", 0): [(1.294, 0.713), (1.325, 0.733), (1.330, 0.746), (1.335, 0.755)],
    ("ETTh2", "last value", 0): [(0.432, 0.422), (0.534, 0.473), (0.597, 0.511), (0.594, 0.519)],
    ("ETTm1", "last value", 0): [(1.214, 0.665), (1.261, 0.690), (1.287, 0.707), (1.322, 0.729)],
    ("exchange_rate", "last value", 0): [(0.081, 0.196), (0.167, 0.289), (0.306, 0.398), (0.810, 0.676)],
}
SETS = ("ETTh1", "ETTh2", "ETTm1", "exchange_rate")


def faster(path: str, row: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Return the faster of a row and a fresh measurement of the same setting."""
    config = {
        "datasets": [path],
        "baselines": "naive",
        "models": [row["model"]],
        "context_lengths": [row["context_length"]],
        "horizons": [row["horizon"]],
        "refresh": True,
    }
    table = benchmark(validate(BenchmarkConfig, config), workspace).table
    second = table.filter(model=row["model"]).row(0, named=True)
    first = min((row, second), key=lambda item: item["fit_seconds"] + item["eval_seconds"])
    return {**first, "again": True}


def measure(folder: Path, sets: list[str], workspace: Workspace, again: float | None) -> list[dict[str, Any]]:
    """Return one record a setting, with what the table expects where it does."""
    names = {text: title for title, text in MODELS.items()} | {"last_value": "last value"}
    records = []
    for name in sets:
        config: dict[str, Any] = {
            "datasets": [str(folder / "forecast" / f"{name}.parquet")],
            "baselines": "naive",
            "models": list(MODELS.values()),
            "context_lengths": [336, 720],
            "horizons": list(HORIZONS),
        }
        table = benchmark(validate(BenchmarkConfig, config), workspace, progress=True).table
        for row in table.iter_rows(named=True):
            if again is not None and row["status"] == "ok" and row["fit_seconds"] + row["eval_seconds"] > again:
                row = faster(config["datasets"][0], row, workspace)
            title = names.get(row["model"], row["model"])
            length = 0 if title == "last value" else row["context_length"]
            wanted = EXPECTED.get((name, title, length))
            expected = wanted[HORIZONS.index(row["horizon"])] if wanted else (None, None)
            kept = ("horizon", "mse", "mae", "windows", "fit_seconds", "eval_seconds", "cpu_seconds", "peak_memory_mb")
            records.append(
                {
                    "data": name,
                    "model": title,
                    "context_length": row["context_length"],
                    **{key: row[key] for key in (*kept, "status", "error")},
                    "again": row.get("again", False),
                    "expected_mse": expected[0],
                    "expected_mae": expected[1],
                }
            )
    return records


def page(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the records as a page of tables, one a data set."""
    gaps = [abs(row["mse"] - row["expected_mse"]) for row in records if row["expected_mse"] is not None]
    times = [row["fit_seconds"] + row["eval_seconds"] for row in records]
    cpu = [row["cpu_seconds"] for row in records]
    again = sum(row["again"] for row in records)
    lines = [
        "# Closed-form linear forecasts",
        "",
        f"{about['made']}, {about['hardware']}, torch {about['torch']} on {about['threads']} thread(s), revision "
        f"{about['revision']}. Every test window, standardised units, mse / mae; in brackets the baselines table.",
        "",
        f"- {len(gaps)} cells have an expected value: largest difference {max(gaps, default=0):.4f} MSE",
        f"- fit + evaluation of one setting: at most {max(times):.1f} s wall, {max(cpu):.1f} s processor"
        f" (shared machine: slow settings are measured again, {again} of {len(records)} in this pass; "
        "the fastest run counts)",
    ]
    for name in dict.fromkeys(row["data"] for row in records):
        lines += ["", f"## {name}", "", "| model | L | 96 | 192 | 336 | 720 | s (wall) | s (cpu) |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in records:
            if row["data"] == name:
                groups.setdefault((row["model"], row["context_length"]), []).append(row)
        for (model, length), rows in groups.items():
            ordered = sorted(rows, key=lambda row: row["horizon"])
            wall = " ".join(f"{row['fit_seconds'] + row['eval_seconds']:.1f}" for row in ordered)
            used = " ".join(f"{row['cpu_seconds']:.1f}" for row in ordered)
            cells = " | ".join(cell(row) for row in ordered)
            lines.append(f"| {model} | {length} | {cells} | {wall} | {used} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    """Return one cell: measured, and expected in brackets."""
    if row["status"] != "ok":
        return str(row["error"])
    text = f"{row['mse']:.3f} / {row['mae']:.3f}"
    return text if row["expected_mse"] is None else f"{text} ({row['expected_mse']:.3f} / {row['expected_mae']:.3f})"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds forecast/")
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--home", type=Path, default=None, help="workspace of the cache")
    parser.add_argument("--again", type=float, default=None, help="seconds above which a setting is measured twice")
    options = parser.parse_args()
    records = measure(options.data, options.sets.split(","), Workspace.open(options.home), options.again)
    about = {
        "made": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
    }
    text = page(records, about)
    for ending, content in ((".json", json.dumps({**about, "rows": records}, indent=1)), (".md", text)):
        with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
            temporary.write_text(content)
    print(text)


if __name__ == "__main__":
    main()
