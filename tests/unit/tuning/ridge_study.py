"""A real objective, small enough to run hundreds of times: ridge regression on noisy seasonal data.

Run as a program it is the study that tests interrupt: ``python ridge_study.py FOLDER TRIALS [SECONDS_A_TRIAL]``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tsforge.tuning.config import TuneConfig
from tsforge.tuning.space import Range, Space
from tsforge.tuning.study import Trial, tune

SPACE: Space = {"lags": Range(1, 40, False, True), "ridge": Range(1e-4, 1e4, True)}
DEFAULTS = {"lags": 1, "ridge": 1.0}


def make_series() -> np.ndarray:
    rng = np.random.default_rng(7)
    steps = np.arange(500)
    return np.asarray(np.sin(2 * np.pi * steps / 24) + 0.5 * rng.standard_normal(500))


SERIES = make_series()


def valid_error(lags: int, ridge: float) -> float:
    """Fit one-step ridge autoregression on the first 300 steps, return the mean absolute error on the rest."""
    rows = np.lib.stride_tricks.sliding_window_view(SERIES, lags + 1)
    train, valid = rows[: 300 - lags], rows[300 - lags :]
    weights = np.linalg.solve(train[:, :-1].T @ train[:, :-1] + ridge * np.eye(lags), train[:, :-1].T @ train[:, -1])
    return float(np.abs(valid[:, :-1] @ weights - valid[:, -1]).mean())


def objective(values: dict[str, Any], trial: Trial) -> float:
    return valid_error(values["lags"], values["ridge"])


def main(folder: str, trials: str, seconds: str = "0") -> None:
    def slow(values: dict[str, Any], trial: Trial) -> float:
        print(trial.number, flush=True)
        time.sleep(float(seconds))
        return objective(values, trial)

    config = TuneConfig(name="ridge", num_trials=int(trials), num_startup_trials=5)
    try:
        result = tune(slow, SPACE, config, directory=Path(folder), defaults=DEFAULTS)
    except KeyboardInterrupt as stop:
        print("interrupted", type(stop).__name__, flush=True)
        sys.exit(130)
    print("best", result.best.value, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
