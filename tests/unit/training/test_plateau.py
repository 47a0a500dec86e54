"""Schedule plateau: what counts as better, whatever the sign of the validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network
from tsforge.training.module import TrainModule


def rates(losses: Sequence[float], patience: int = 1) -> list[float]:
    """Return the rate after each of the validation losses; it begins at 1 and is halved."""
    network = build_network(
        validate(NetworkConfig, {"model": "dlinear"}), DataSpec(context_length=30, horizon=3, num_variates=1)
    )
    plain = {"learning_rate": 1.0, "schedule": "plateau", "plateau_factor": 0.5, "plateau_patience": patience}
    found = TrainModule(network, validate(TrainConfig, plain), total_steps=9).configure_optimizers()
    seen = []
    for loss in losses:
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step(loss)
        seen.append(found["optimizer"].param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 7,
        [-2.0] * 7,
        [0.0] * 7,
        [-2.0, -1.99, -1.9, -1.7, -1.4, -1.0, 0.3],  # rising
        [-2.0, -2.05, -2.1, -2.15, -2.19, -2.199, -2.0],  # never a tenth of 2 below
        [2.0, 1.95, 1.9, 1.85, 1.82, 1.801, 2.0],
        [-0.1, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
    ],
)
def test_a_loss_that_does_not_fall_by_a_tenth_halves_the_rate_every_second_epoch(losses: list[float]) -> None:
    assert rates(losses) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("losses", [[3.0, 2.6, 2.3], [0.2, -0.1, -3.0], [-1.0, -1.11, -1.3], [-100.0, -111.0, -123.0]])
def test_a_tenth_of_the_size_of_the_best_below_it_is_better(losses: list[float]) -> None:
    assert rates([part for loss in losses for part in (loss, loss)]) == [1.0] * 6


def test_positive_losses_keep_their_rule_to_the_bit() -> None:
    """0.9 times the best, as torch has it."""
    edge = 3.0 * (1.0 - 0.1)
    assert rates([3.0, edge], patience=0) == [1.0, 0.5]
    assert rates([3.0, edge * (1 - 1e-15)], patience=0) == [1.0, 1.0]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(stop_after: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=160)
    frame = SeriesFrame.from_wide(pl.DataFrame({"time": np.arange(160), "y": values}), time="time", freq="1i")
    panel, window = Panel.from_frame(frame), WindowSpec(context_length=30, horizon=3)
    plain = {"learning_rate": 1e-9, "schedule": "plateau", "plateau_factor": 0.5, "plateau_patience": 1}
    config = validate(TrainConfig, plain | {"max_epochs": 7, "patience": None, "accelerator": "cpu"})

    def run(**options: Any) -> list[float]:
        network = build_network(
            validate(NetworkConfig, {"model": "dlinear"}), DataSpec(context_length=30, horizon=3, num_variates=1)
        )
        train, valid = WindowDataset(panel, window, None, 100), WindowDataset(panel, window, 100, None)
        series = panel.training_series(None, 100)
        result = fit_network(network, train, valid, config, series=series, progress=False, **options)
        return [row["learning_rate"] for row in result.history]

    def die(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == stop_after:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(checkpoint_dir=tmp_path, on_epoch=die)
    expected = [1e-9, 1e-9, 1e-9, 5e-10, 5e-10, 2.5e-10, 2.5e-10]
    assert run() == pytest.approx(expected, rel=1e-6)
    assert run(checkpoint_dir=tmp_path, resume=True) == pytest.approx(expected, rel=1e-6)
