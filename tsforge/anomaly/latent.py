"""How unfamiliar the state is that a model forecasts from: it says "unfamiliar regime", not "bad forecast".

The hidden state h that enters the output layer after the context ending with a row is compared with those of training,

    d = sqrt((P'(h - m))' L^-1 P'(h - m)),   m mean, P principal directions of 95 % of the variance, L their variances.

A model with one state a variate (independent variates, Chimera) gives a distance a variate, else all share one.

Source: spec of latent scores; a Mahalanobis distance in principal components is Hotelling's T^2 (Jackson, Mudholkar
1979, Technometrics 21), of which this is the root. Deviation: at most 5,000 training states, spread evenly, are taken.

Legend: N rows, R states a row (V or 1), D width of a state, k components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tsforge.anomaly.contexts import ContextFunction, FloatArray
from tsforge.anomaly.covariance import by_row
from tsforge.anomaly.uncomparable import Uncomparable
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ModelError

EXPLAINED = 0.95
MOST_STATES = 5_000
FEWEST_STATES = 50


@runtime_checkable
class Latent(Protocol):
    """A model whose forecast is read from a hidden state."""

    def hidden(self, batch: Batch) -> Tensor:
        """Return the states [B, R, D] after the contexts of a scaled batch, R = 1 or one a variate."""
        ...


@dataclass(frozen=True)
class LatentScale:
    """Where training states lie: mean [R, D], and for each r directions [k, D] divided by their deviations.

    A state that never moved has no direction and no distance: nothing is known of how far is far.
    """

    mean: FloatArray
    whitening: tuple[FloatArray, ...]

    def distances(self, states: FloatArray) -> FloatArray:
        """Return the distance [N, R] of states [N, R, D], each by itself; NaN where a state is, or all are ([N, 1])."""
        if states.ndim < 3:
            return np.full((len(states), len(self.mean)), np.nan)
        found = np.full(states.shape[:2], np.nan)
        for r, white in enumerate(self.whitening):
            if len(white):
                found[:, r] = np.sqrt(np.square(by_row(white, states[:, r] - self.mean[r])).sum(axis=1))
        return found


def fit_latent(states: FloatArray, explained: float = EXPLAINED) -> LatentScale:
    """Return the scale of training states [N, R, D]; rows with NaN are left out, and all of anything but states.

    Raises:
        Uncomparable: fewer than 50 states, or states that never move.
    """
    seen = states[~np.isnan(states).any(axis=(1, 2))] if states.ndim == 3 else states[:0]
    if len(seen) < FEWEST_STATES:
        raise Uncomparable(
            f"latent scores need {FEWEST_STATES} training rows with a whole context before them, {len(seen)} have one",
            observed=len(seen),
        )
    mean, whitening = seen.mean(axis=0), []
    for r in range(states.shape[1]):
        centred = seen[:, r] - mean[r]
        values, directions = np.linalg.eigh(centred.T @ centred / (len(centred) - 1))
        values, directions = values[::-1], directions[:, ::-1]
        if (seen[:, r] == seen[0, r]).all() or values[0] <= 0.0:  # a mean may round away from equal numbers
            whitening.append(np.empty((0, states.shape[2])))
            continue
        share = np.cumsum(values) / values.sum()
        count = int(np.searchsorted(share, explained * (1.0 - 1e-12))) + 1
        whitening.append(np.ascontiguousarray((directions[:, :count] / np.sqrt(values[:count])).T))
    if not any(len(white) for white in whitening):
        raise Uncomparable(
            "the hidden state of the model never moves in training, so latent scores mean nothing for it",
            observed=len(seen),
            advice="take another score.kind",
        )
    return LatentScale(mean=mean, whitening=tuple(whitening))


def hidden_function(artifact: Artifact) -> ContextFunction:
    """Return what tells the states [B, R, D] after a context.

    Raises:
        ModelError: the model has no hidden state.
    """
    model = artifact.network.model
    if not isinstance(model, Latent):
        raise ModelError(
            f"model '{artifact.model_name}' has no hidden state that its forecast is read from; score.kind=latent "
            "needs an artifact of s4, lssl, chimera or a recurrent model"
        )
    return ContextFunction("hidden", lambda _, scaled: (model.hidden(scaled),), needs_row=True)
