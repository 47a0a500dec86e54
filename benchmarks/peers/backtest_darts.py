"""Rolling backtest with Darts; runs in an environment of its own, started by ``benchmarks/backtest_speed.py``.

Two ways: ``historical_forecasts`` with ``retrain=True``, which fits every series by itself at every cutoff, and a loop
that fits one model to all series at once at every cutoff and predicts, which is what the two others do. Only making the
``TimeSeries``, fitting and forecasting are timed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from darts import TimeSeries
from darts.models import LinearRegressionModel

warnings.filterwarnings("ignore")


def main() -> None:
    """Read the task, run it, write forecasts and cost."""
    task = json.loads(Path(sys.argv[1]).read_text())
    data = np.load(task["data"])
    values = data["values"][: task["num_series"]]
    cutoffs = task["cutoffs"][-task["num_cutoffs"] :]
    context, horizon, stride = task["context_length"], task["horizon"], task["stride"]
    started, used = time.perf_counter(), time.process_time()
    index = pd.date_range(task["start"], periods=values.shape[1], freq="h")
    series = [TimeSeries.from_times_and_values(index, row) for row in values]
    found = np.full((len(values), len(cutoffs), horizon), np.nan)
    if task["way"] == "historical_forecasts":
        model = LinearRegressionModel(lags=context, output_chunk_length=horizon)
        first = index[cutoffs[0] + 1]
        answers = model.historical_forecasts(
            series, start=first, forecast_horizon=horizon, stride=stride, retrain=True, last_points_only=False
        )
        for place, parts in enumerate(answers):
            found[place] = [part.values()[:, 0] for part in parts]
    else:
        for place, cutoff in enumerate(cutoffs):
            seen = [part[: cutoff + 1] for part in series]
            model = LinearRegressionModel(lags=context, output_chunk_length=horizon)
            model.fit(seen)
            found[:, place] = [part.values()[:, 0] for part in model.predict(horizon, series=seen)]
    seconds, used = time.perf_counter() - started, time.process_time() - used
    np.savez(task["out"], forecasts=found, cutoffs=np.array(cutoffs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
