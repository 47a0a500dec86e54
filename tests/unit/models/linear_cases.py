"""Windows of a training span, made one by one, for the tests of linear models."""

from __future__ import annotations

import torch
from torch import Tensor

from tsforge.contracts.tensors import TrainingSeries
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import explicit_windows
from tsforge.models._ar_windows import series_bounds


def windows_of(data: TrainingSeries, length: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Return every gap-free window of a training span, contexts [m, L] oldest first and targets [m, H]."""
    layout = LagLayout(length, horizon)
    parts = list(explicit_windows(layout, data.values.double(), data.mask, series_bounds(data)))
    return torch.cat([features for features, _ in parts]).flip(1), torch.cat([targets for _, targets in parts])
