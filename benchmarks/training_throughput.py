"""How many training windows a second: DLinear under our trainer against neuralforecast's DLinear, in one run.

A *channel window* is one (series, cutoff) of one variate: neuralforecast treats every column as a series of its own and
draws channel windows; one of our windows holds every variate, so it counts once for each. Both train the same model
(moving average 25, two linear maps, context 336, horizon 96, MSE, Adam family) on the same rows with the same number of
channel windows a step, one thread, precision 32. Timed is everything a step costs (window gathering, forward, backward,
optimiser, trainer) after a warm-up: our second epoch, their steps after the fifth; not set-up, not validation.

    python benchmarks/training_throughput.py --peer-python PEER/bin/python [--data ETTh1.parquet] [--output FOLDER]

``--peer-python`` belongs to an environment of its own with ``pip install torch==2.13.0 neuralforecast``. Without
``--data`` a random walk of the same shape is used: speed does not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tsforge.contracts.tensors import DataSpec
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

CONTEXT, HORIZON, VARIATES, ROWS, WARM = 336, 96, 7, 8640, 5
PEER = """
import json, os, sys, time, warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import pandas as pd, torch
torch.set_num_threads(1)
from importlib.metadata import version
from pytorch_lightning.callbacks import Callback
from neuralforecast import NeuralForecast
from neuralforecast.models import DLinear
path, context, horizon, windows, steps, warm, repeats = sys.argv[1], *map(int, sys.argv[2:])

seen = {}  # outside the callback: models are copied with their callbacks

class Clock(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == warm:
            seen["begin"] = time.perf_counter()
        seen.update(end=time.perf_counter(), count=trainer.global_step - warm)

wide = pd.read_parquet(path)
table = wide.melt(id_vars="ds", var_name="unique_id", value_name="y")[["unique_id", "ds", "y"]]
speeds = []
for repeat in range(repeats):
    model = DLinear(h=horizon, input_size=context, moving_avg_window=25, max_steps=warm + steps, learning_rate=1e-3,
        batch_size=wide.shape[1] - 1, windows_batch_size=windows, scaler_type="identity", random_seed=repeat,
        val_check_steps=10**6, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[Clock()])
    NeuralForecast(models=[model], freq="h").fit(table, val_size=0)
    speeds.append(seen["count"] * windows / (seen["end"] - seen["begin"]))
print("RESULT" + json.dumps({"speeds": speeds, "neuralforecast": version("neuralforecast"),
    "torch": version("torch"), "lightning": version("pytorch_lightning")}))
"""


def make_table(data: Path | None, place: Path) -> Path:
    """Write the training rows as a wide parquet with a ``ds`` column, standardised, and return its path."""
    if data is None:
        walk = np.random.default_rng(0).normal(size=(ROWS, VARIATES)).cumsum(axis=0)
        hours = [datetime(2016, 7, 1) + timedelta(hours=step) for step in range(ROWS)]
        columns = {f"x{index}": walk[:, index] for index in range(VARIATES)}
        table = pl.DataFrame({"ds": hours, **columns})
    else:
        table = pl.read_parquet(data).head(ROWS)
    names = [name for name in table.columns if name != "ds"]
    scaled = [((pl.col(name) - pl.col(name).mean()) / pl.col(name).std()).cast(pl.Float32) for name in names]
    path = place / "table.parquet"
    table.with_columns(scaled).write_parquet(path)
    return path


def measure_ours(path: Path, windows: int, steps: int, repeats: int) -> list[float]:
    """Return channel windows a second of the second epoch of ``fit_network``, with ``windows`` of them a step."""
    panel = Panel.from_frame(SeriesFrame.from_wide(pl.read_parquet(path), time="ds"))
    train = WindowDataset(panel, WindowSpec(context_length=CONTEXT, horizon=HORIZON))
    spec = DataSpec(context_length=CONTEXT, horizon=HORIZON, num_variates=panel.num_targets)
    config = TrainConfig(
        max_epochs=2, batch_size=windows // panel.num_targets, max_steps_per_epoch=steps, accelerator="cpu"
    )
    speeds = []
    for repeat in range(repeats):
        network = build_network(NetworkConfig.model_validate({"model": "dlinear"}), spec, seed=repeat)
        series = panel.training_series(None, None)
        result = fit_network(network, train, None, config, series=series, progress=False)
        speeds.append(result.history[1]["windows_per_second"] * panel.num_targets)
    return speeds


def measure_peer(python: str, path: Path, windows: int, steps: int, repeats: int) -> dict[str, Any]:
    """Return speeds and versions of neuralforecast, run by its own interpreter."""
    command = [python, "-c", PEER, str(path), *map(str, (CONTEXT, HORIZON, windows, steps, WARM, repeats))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        raise SystemExit(f"the peer run failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT"))
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides for every batch size, alternating, and return the report."""
    torch.set_num_threads(1)
    rows, versions = [], {name: version(name) for name in ("torch", "lightning", "polars")}
    peer_versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_table(arguments.data, Path(folder))
        for windows in arguments.windows:
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(arguments.repeats):  # in turns, so that a busy spell of the machine hits both
                ours += measure_ours(path, windows, arguments.steps, 1)
                if arguments.peer_python:
                    peer = measure_peer(arguments.peer_python, path, windows, arguments.peer_steps, 1)
                    theirs += peer["speeds"]
                    peer_versions = {name: value for name, value in peer.items() if name != "speeds"}
            row: dict[str, Any] = {
                "channel_windows_a_step": windows,
                "ours": ours,
                "ours_median": statistics.median(ours),
            }
            if theirs:
                row |= {"peer": theirs, "peer_median": statistics.median(theirs)}
                row |= {"ratio": row["ours_median"] / row["peer_median"], "load_average": os.getloadavg()[0]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {
        "question": "channel windows a second in training, DLinear, context 336, horizon 96, one thread",
        "data": arguments.data.name if arguments.data else "random walk",
        "rows": ROWS,
        "load_average": os.getloadavg(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "peer_versions": peer_versions,
        "results": rows,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Training throughput: DLinear, ours against neuralforecast",
        "",
        f"Data: {report['data']}, first {report['rows']} rows, 7 variates; context 336, horizon 96; one thread of "
        f"{report['cores']} shared cores (load average {report['load_average'][0]:.1f} at the end); medians.",
        "A channel window is one (series, cutoff) of one variate; ours hold 7 at once and count 7 times.",
        f"Versions: {report['versions']}; peer {report['peer_versions']}.",
        "",
        "| channel windows a step | ours, channel windows/s | ours, windows/s (7 variates) | neuralforecast | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        peer, ratio = row.get("peer_median"), row.get("ratio")
        shown = f"{peer:,.0f} | {ratio:.0f}x" if peer and ratio else "- | -"
        speed = row["ours_median"]
        lines.append(f"| {row['channel_windows_a_step']} | {speed:,.0f} | {speed / VARIATES:,.0f} | {shown} |")
    lines += [
        "",
        "Where the difference comes from: neuralforecast cuts every window of every series anew in each step and draws "
        "from them, so its step costs the same for few as for many; ours gathers only its own windows from resident "
        "tensors, and composes the moving average and both linear maps into one matrix product.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of an environment with neuralforecast")
    parser.add_argument("--data", type=Path, help="wide parquet with a ds column; default: a random walk")
    parser.add_argument("--windows", type=int, nargs="+", default=[224, 896, 3584], help="channel windows a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peer-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="path without suffix; .json and .md are written")
    arguments = parser.parse_args()
    report = run(arguments)
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
