"""Whether gradient steps improved on a closed-form start: standard errors over blocks of validation windows.

Neighbouring windows share most of their rows, so single windows are no independent evidence; means over stretches of
one horizon nearly are. Choosing the best of many epochs on a short or drifting validation span finds improvements
that do not last, and the start is the safer forecaster then.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor

from tsforge.network import ForecastNetwork
from tsforge.training.streams import Windows

FEWEST_BLOCKS = 3


class Comparison(NamedTuple):
    """Mean improvement of the loss over blocks, its standard error (NaN below two blocks), and how many there were.

    Attributes:
        before: mean loss of the start over the same blocks.
    """

    gain: float
    error: float
    blocks: int
    before: float = math.nan

    def is_clear(self, margin: float) -> bool:
        """Return whether the gain exceeds ``margin`` standard errors.

        Two blocks hardly know their standard error: there the quantile of Student's t with one degree of freedom takes
        the place of ``margin``, a quantile of the normal distribution. One block knows none.
        """
        needed = margin if self.blocks >= FEWEST_BLOCKS else float(stdtrit(max(self.blocks - 1, 1), ndtr(margin)))
        return self.blocks > 1 and self.gain > needed * self.error

    @property
    def is_too_short(self) -> bool:
        """Return whether blocks lack to tell a gain that is large: a tenth of the loss of the start."""
        return self.blocks < FEWEST_BLOCKS and self.gain > 0.1 * abs(self.before)


@torch.no_grad()
def compare(network: ForecastNetwork, before: dict[str, Tensor], windows: Windows, batch_size: int) -> Comparison:
    """Return how much the weights in ``network`` improve on ``before``; the network is left as it came.

    Args:
        network: evaluating, with the new weights, on the device of the windows.
        before: state of the start.
        windows: validation windows, data units.
        batch_size: windows at a time.
    """
    after = {name: value.clone() for name, value in network.state_dict().items()}
    new, places = _losses(network, windows, batch_size)
    network.load_state_dict(before)
    try:
        old, _ = _losses(network, windows, batch_size)
    finally:
        network.load_state_dict(after)
    gain = old - new
    _, block = np.unique(places // network.spec.horizon, return_inverse=True)
    counts = np.bincount(block)
    whole = counts >= 0.5 * counts.max()  # the ends of the span may hold a window or two
    full = (np.bincount(block, weights=gain) / counts)[whole]
    start = (np.bincount(block, weights=old) / counts)[whole]
    spread = float(full.std(ddof=1) / math.sqrt(len(full))) if len(full) > 1 else math.nan
    return Comparison(gain=float(full.mean()), error=spread, blocks=len(full), before=float(start.mean()))


def _losses(network: ForecastNetwork, windows: Windows, batch_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the loss and the absolute row of the first step of every window."""
    losses, places = [], []
    for batch in windows.batches(batch_size):
        losses.append(network.window_losses(batch).double().cpu().numpy())
        if batch.cutoff_index is None:
            raise ValueError("windows of a panel say where they are")
        places.append(batch.cutoff_index.cpu().numpy())
    return np.concatenate(losses), np.concatenate(places)
