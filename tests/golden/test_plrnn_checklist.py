"""Numbers of the PLRNN verification checklist that need the real data and minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsforge.app.reconstruct_data import read_trajectories
from tsforge.core.config import validate
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.evaluation import evaluate
from tsforge.dynamics.module import train_seeds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_checklist_8_13_lorenz_is_reconstructed(shared_data: Path) -> None:
    """Best of three seeds by the capture test after 500 epochs: never a single seed, some are captured."""
    folder = shared_data / "dynamics"
    plain = {
        "data": {
            "path": str(folder / "lorenz63_noise05_train.parquet"),
            "test": str(folder / "lorenz63_test.parquet"),
        },
        "model": {"hidden": 100},
        "train": {"epochs": 500, "lambda_lat": 1e-5, "accelerator": "cpu"},
        "evaluation": {"expected": "chaos"},
        "seeds": [0, 1, 2],
        "dt": 0.01,
    }
    config = validate(ReconstructionConfig, plain)
    data = read_trajectories(config.data)
    network = train_seeds(data.train, config, config.seeds).network
    judged = [evaluate(network.group(index), data.test, config.evaluation, config.dt) for index in range(3)]
    best = min(judged, key=lambda item: (item.metrics["captured"], item.metrics["d_stsp"]))
    assert best.metrics["d_stsp"] < 1
    assert 0.7 < best.metrics["lambda_1"] < 1.1
