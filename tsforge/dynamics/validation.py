"""Validation while seeds train: free runs on a part that neither trains nor tests, and the best weights of each seed.

Every few epochs, and after the last one, each model runs freely from the first sample of the validation series as in
the final judgement. Its score is D_stsp + D_h (D_stsp alone where values of the series are missing); the weights and
the alpha with the least score are kept. A run that is not finite has no score; a seed without any keeps its last
weights.

Deviation: the published protocol has no validation part and judges the last weights. This is off unless asked for.

Legend: G groups (seeds), V validation steps, N variates, K inputs, P parameters of a group.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.dynamics.evaluation import free_comparison
from tsforge.dynamics.network import Model, Reconstruction
from tsforge.metrics.dynamics import d_h, d_stsp

Array = NDArray[np.float64]
FIGURES = ("score", "d_stsp", "d_h", "free_run_range")


class ValidationSeries(NamedTuple):
    """A standardised series (V, N), its first row complete, and its external inputs (V, K) or None."""

    values: Array
    inputs: Array | None = None


class Validation:
    """Keeps the best weights of G groups.

    Args:
        series: to run on.
        sigma: smoothing of the spectra of D_h in bins.
        groups: G.

    Attributes:
        history: epoch and, a list over groups each, ``FIGURES``; ``free_run_range`` is the largest distance from the
            mean of a training variate that the free run reaches, in standard deviations.
        epochs: of each group, that of the weights kept; None where no run was finite.
        scores: of each group, the least one; infinite where no run was finite.
    """

    def __init__(self, series: ValidationSeries, sigma: float, groups: int) -> None:
        self._series, self._sigma = series, sigma
        self.history: list[dict[str, Any]] = []
        self.epochs: list[int | None] = [None] * groups
        self.scores = [math.inf] * groups
        self._values: list[Tensor | None] = [None] * groups
        self._alpha = [0.0] * groups

    def look(self, epoch: int, network: Reconstruction, values: Tensor) -> dict[str, list[float]]:
        """Judge every group now, keep what is better than before, and return ``FIGURES``, NaN where there is none.

        Args:
            values: (G, P) all parameters of the network.
        """
        found: dict[str, list[float]] = {name: [] for name in FIGURES}
        for index in range(len(values)):
            figures = self.judge(network.group(index))
            for name in FIGURES:
                found[name].append(figures[name])
            if figures["score"] < self.scores[index]:  # never true of NaN
                self.scores[index], self.epochs[index] = figures["score"], epoch
                self._values[index] = values[index].detach().clone()
                self._alpha[index] = float(network.schedule.alpha[index])
        self.history.append({"epoch": epoch, **found})
        return found

    def judge(self, model: Model) -> dict[str, float]:
        """Return ``FIGURES`` of one model, NaN where its parameters or its run are not finite."""
        nothing = dict.fromkeys(FIGURES, math.nan)
        if not model.is_finite:
            return nothing
        data, inputs = self._series
        run = free_comparison(model, data, inputs)
        if not np.isfinite(run).all():
            return nothing
        complete = np.isfinite(data).all(axis=1)
        divergence = float(d_stsp(data[complete], run))
        spectral = float(d_h(data, run, sigma=self._sigma)) if complete.all() else math.nan
        score = divergence + (spectral if complete.all() else 0.0)
        return {"score": score, "d_stsp": divergence, "d_h": spectral, "free_run_range": float(np.abs(run).max())}

    @torch.no_grad()
    def restore(self, network: Reconstruction, values: Tensor) -> None:
        """Write the weights and the alpha kept back."""
        for index, kept in enumerate(self._values):
            if kept is not None:
                values[index] = kept
                network.schedule.alpha[index] = self._alpha[index]
