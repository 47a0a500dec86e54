"""Rolling backtest with neuralforecast; runs in an environment of its own, started by ``benchmarks/backtest_speed.py``.

``cross_validation`` of DLinear over all series, fitted again at every cutoff (``refit=1``). Only that call is timed.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

os.environ["NIXTLA_ID_AS_COL"] = "1"
warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

from neuralforecast import NeuralForecast  # noqa: E402 - after the switches it reads
from neuralforecast.models import DLinear  # noqa: E402


def main() -> None:
    """Read the task, run it, write forecasts and cost."""
    task = json.loads(Path(sys.argv[1]).read_text())
    values = np.load(task["data"])["values"][: task["num_series"]]
    horizon, count = task["horizon"], task["num_cutoffs"]
    index = pd.date_range(task["start"], periods=values.shape[1], freq="h")
    names = np.array([f"s{number:04d}" for number in range(len(values))])
    long = {"unique_id": names.repeat(values.shape[1]), "ds": np.tile(index, len(values)), "y": values.ravel()}
    model = DLinear(
        h=horizon,
        input_size=task["context_length"],
        max_steps=task["max_steps"],
        learning_rate=1e-3,
        scaler_type="standard",
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
    )
    table = pd.DataFrame(long)
    started, used = time.perf_counter(), time.process_time()
    answer = NeuralForecast(models=[model], freq="h").cross_validation(
        table, n_windows=count, step_size=task["stride"], refit=1
    )
    seconds, used = time.perf_counter() - started, time.process_time() - used
    answer = answer.sort_values(["unique_id", "cutoff", "ds"])
    found = answer["DLinear"].to_numpy().reshape(len(values), count, horizon)
    cutoffs = index.get_indexer(answer["cutoff"].drop_duplicates())
    np.savez(task["out"], forecasts=found, cutoffs=cutoffs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
