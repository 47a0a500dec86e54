"""Frame, splits and windows together: "repeat the last value" in the long-horizon protocol.

Source: table in shared/data/README.md (computed there from the same files, every test window kept, standardised with
the mean and population standard deviation of the training rows); the values at h = 96 agree with the "Repeat" row of
LTSF-Linear, Table 2, to 0.001. Tolerance: the three printed decimals.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.splits import literature_splits
from tsforge.data.windows import WindowDataset, WindowSpec

TABLE = [
    ("ETTh1", 96, 1.294, 0.713), ("ETTh1", 192, 1.325, 0.733),
    ("ETTh1", 336, 1.330, 0.746), ("ETTh1", 720, 1.335, 0.755),
    ("ETTh2", 96, 0.432, 0.422), ("ETTh2", 192, 0.534, 0.473),
    ("ETTh2", 336, 0.597, 0.511), ("ETTh2", 720, 0.594, 0.519),
    ("ETTm1", 96, 1.214, 0.665), ("ETTm1", 192, 1.261, 0.690),
    ("ETTm1", 336, 1.287, 0.707), ("ETTm1", 720, 1.322, 0.729),
    ("exchange_rate", 96, 0.081, 0.196), ("exchange_rate", 192, 0.167, 0.289),
    ("exchange_rate", 336, 0.306, 0.398), ("exchange_rate", 720, 0.810, 0.676),
    ("national_illness", 24, 6.213, 1.622), ("national_illness", 36, 7.714, 1.906),
    ("national_illness", 48, 7.851, 1.952), ("national_illness", 60, 6.885, 1.788),
]  # fmt: skip


@pytest.mark.parametrize(("name", "horizon", "mse", "mae"), TABLE)
def test_repeating_the_last_value(shared_data: Path, name: str, horizon: int, mse: float, mae: float) -> None:
    frame = SeriesFrame.from_wide(pl.scan_parquet(shared_data / "forecast" / f"{name}.parquet"), time="ds")
    panel = Panel.from_frame(frame)
    splits = literature_splits(name, frame.num_rows)
    scale = torch.from_numpy(panel.values[slice(*splits.train)].std(axis=0))
    windows = WindowDataset(panel, WindowSpec(context_length=96, horizon=horizon), *splits.test)
    assert len(windows) == splits.test[1] - splits.test[0] - horizon + 1
    squared = absolute = count = 0.0
    for batch in windows.batches(2048):
        assert batch.target is not None
        error = (batch.target - batch.context[:, -1:]).double() / scale
        squared += float(error.square().sum())
        absolute += float(error.abs().sum())
        count += error.numel()
    assert squared / count == pytest.approx(mse, abs=5.1e-4)
    assert absolute / count == pytest.approx(mae, abs=5.1e-4)
