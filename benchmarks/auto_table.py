"""``model=auto`` against what it chooses from, on the test windows of the benchmark protocol.

Usage: python benchmarks/auto_table.py --data FOLDER --out benchmarks/results/auto_HARDWARE_DATE [--sets ETTh1,...]
    [--minutes 0] [--seed 0]

Beside the mixture: the mixture that the folds alone would have chosen (``model.anchor=false``); each of its members
alone, fitted as it is inside (on training and validation rows); the candidate first on all folds; ``linear`` with its
defaults and ``ar_net`` on the training rows; seasonal naive. ``best member`` is chosen by the test errors, which nobody
could have known. Sets may be written with look-back and horizon, ``los_speed:336:48``. Errors are in deviations
of the training rows, over all test windows. Seconds are wall time on a machine that also did other things.
Writes OUT.json and OUT.md, goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tsforge.app.auto import fit_for_benchmark
from tsforge.app.benchmark_data import BenchmarkData, read_benchmark_data
from tsforge.app.benchmark_run import rows_before
from tsforge.artifact import collect_provenance
from tsforge.contracts.tensors import DataSpec
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.ensemble import EnsembleNetwork
from tsforge.forecasting.window_forecasts import error_sums
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig

SETS = {  # look-back, horizon
    "ETTh1": (336, 96),
    "ETTh2": (336, 96),
    "exchange_rate": (96, 96),
    "national_illness": (104, 24),
    "epf_np": (168, 24),
    "bike_sharing": (168, 24),
    "nyc_weather": (168, 24),
}


def graded(network: ForecastNetwork, data: BenchmarkData, horizon: int) -> tuple[float, float]:
    """Return mse and mae over all test windows."""
    spec = WindowSpec(context_length=network.spec.context_length, horizon=horizon)
    sums = error_sums(network, WindowDataset(data.panel, spec, *data.splits.test))
    return float(sums.mse().value), float(sums.mae().value)


def single(data: BenchmarkData, model: dict[str, Any], length: int, horizon: int) -> dict[str, Any]:
    """Return the errors of one closed form fitted on the training rows."""
    spec = DataSpec(
        context_length=length,
        horizon=horizon,
        num_variates=data.panel.num_targets,
        train_length=data.splits.train[1] - data.splits.train[0],
    )
    network = build_network(validate(NetworkConfig, {"model": model}), spec)
    series = data.panel.training_series(*data.splits.train)
    network.fit_scaler(series)
    network.solve(series)
    mse, mae = graded(network.eval(), data, horizon)
    return {"mse": mse, "mae": mae}


def mixture(
    data: BenchmarkData, length: int, horizon: int, *, minutes: float, seed: int, anchor: bool
) -> EnsembleNetwork:
    """Return what auto makes of the rows before the test."""
    return fit_for_benchmark(
        rows_before(data.panel, data.splits.test[0]),
        data.splits,
        WindowSpec(context_length=length, horizon=horizon),
        {"minutes": minutes, "anchor": anchor},
        train=TrainConfig(),
        seed=seed,
        progress=anchor,
    )


def measure(path: Path, length: int, horizon: int, *, minutes: float, seed: int) -> dict[str, Any]:
    """Return the row of one data set."""
    data = read_benchmark_data(path)
    free = graded(mixture(data, length, horizon, minutes=minutes, seed=seed, anchor=False), data, horizon)
    started = time.perf_counter()
    network = mixture(data, length, horizon, minutes=minutes, seed=seed, anchor=True)
    seconds = time.perf_counter() - started
    mse, mae = graded(network, data, horizon)
    race = network.model.explain()["race"]
    chosen = [record for record in race if record["weight"]]
    whole = max(record["folds"] for record in race)
    members = []
    for name, member in zip(network.member_names, network.members, strict=True):
        own = graded(member, data, horizon)
        members.append({"name": name, "mse": own[0], "mae": own[1]})
    first = min((record for record in chosen if record["folds"] == whole), key=lambda record: record["error"])
    row = {
        "data": data.name,
        "context_length": length,
        "horizon": horizon,
        "minutes": minutes,
        "seed": seed,
        "seconds": round(seconds, 1),
        "auto": {"mse": mse, "mae": mae},
        "folds_alone": {"mse": free[0], "mae": free[1]},
        "members": members,
        "first_on_folds": first["candidate"],
        "linear": single(data, {"name": "linear"}, length, horizon),
        "ar_net": single(data, {"name": "ar_net"}, length, horizon),
        "race": race,
    }
    season = data.season
    if 1 < season <= length:
        row["seasonal_naive"] = single(data, {"name": "seasonal_naive", "season_length": season}, length, horizon)
    return row


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# model=auto against its own members",
        "",
        f"Made by `benchmarks/auto_table.py` on {facts['date']}, {facts['machine']}, torch {facts['torch']}, one "
        "thread, on a machine that also did other things (seconds are an upper bound).",
        "mse over all test windows in training deviations; `auto` and its members are fitted on training and "
        "validation rows, `linear`, `ar_net` (defaults) and seasonal naive on training rows. The best member is chosen "
        "with hindsight.",
        "",
        "| data | L | h | minutes | auto | folds alone | auto / folds alone | best member | worst member | members | "
        "linear | ar_net | seasonal naive | auto / best member | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = [member["mse"] for member in row["members"]]
        best = min(row["members"], key=lambda member: member["mse"])
        naive = row.get("seasonal_naive")
        lines.append(
            f"| {row['data']} | {row['context_length']} | {row['horizon']} | {row['minutes']:g} | "
            f"{row['auto']['mse']:.4f} | {row['folds_alone']['mse']:.4f} | "
            f"{row['auto']['mse'] / row['folds_alone']['mse']:.3f} | {best['mse']:.4f} ({best['name']}) | "
            f"{max(errors):.4f} | {len(errors)} | "
            f"{row['linear']['mse']:.4f} | {row['ar_net']['mse']:.4f} | "
            f"{'' if naive is None else format(naive['mse'], '.4f')} | {row['auto']['mse'] / best['mse']:.3f} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = options.out.with_suffix(".json")
    rows = json.loads(place.read_text())["rows"] if place.exists() else []
    for text in options.sets.split(","):
        name, *sizes = text.split(":")
        length, horizon = (int(size) for size in sizes) if sizes else SETS[name]
        key = (name, horizon, options.minutes, options.seed)
        if any((row["data"], row["horizon"], row["minutes"], row["seed"]) == key for row in rows):
            continue
        row = measure(options.data / f"{name}.parquet", length, horizon, minutes=options.minutes, seed=options.seed)
        rows.append(row)
        facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "provenance": collect_provenance(data_fingerprint="", seeds={"auto": options.seed}),
        }
        with atomic_file(place) as temporary:
            temporary.write_text(json.dumps({**facts, "rows": rows}, indent=1, default=str))
        with atomic_file(options.out.with_suffix(".md")) as temporary:
            temporary.write_text(page(rows, facts))
        print(f"{name}: auto {row['auto']['mse']:.4f} in {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
