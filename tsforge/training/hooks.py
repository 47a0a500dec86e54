"""What a caller hears of a training: a row an epoch, and how to end it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

OnEpoch = Callable[[int, dict[str, float]], None]


class StopTraining(Exception):
    """Raised by an ``on_epoch`` hook to end training normally: the best weights so far are kept."""


def mean_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return ``valid_loss``, ``valid_mse`` ... from sums weighted by cells; empty without validation."""
    if not sums:
        return {}
    cells = float(sums["cells"])
    return {f"valid_{name}": float(total) / max(cells, 1.0) for name, total in sums.items() if name != "cells"}
