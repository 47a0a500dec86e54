"""What a model sees and returns. Axis letters: B batch, L context_length, H horizon, V variate, K param, F known
covariates, P past covariates, S static covariates, N grid rows of all series together.

Tuples rather than dataclasses: they survive device transfer, ``bf16-true``, ``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.core.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Sizes that follow from the data and the window; never hyper-parameters.

    Attributes:
        context_length: L, past steps a model sees.
        horizon: H, steps it forecasts.
        num_variates: V, targets forecast together.
        num_known: F, covariates known over context and horizon.
        num_past: P, covariates known over the context only.
        num_static: S, constants of a series.
        num_params: K, raw outputs a step and variate, asked for by the likelihood; the first is the location.
        train_length: grid rows of the training span, for models that place themselves in absolute time.
    """

    context_length: int
    horizon: int
    num_variates: int
    num_known: int = 0
    num_past: int = 0
    num_static: int = 0
    num_params: int = 1
    train_length: int = 0

    def __post_init__(self) -> None:
        for name in ("context_length", "horizon", "num_variates", "num_params"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_known", "num_past", "num_static", "train_length"):
            if getattr(self, name) < 0:
                raise ModelError(f"{name} is {getattr(self, name)}; it must not be negative")


class Batch(NamedTuple):
    """One batch of windows.

    Shapes:
        context [B, L, V] float, 0 where not observed once scaled; context_mask [B, L, V] bool, True = observed.
        target [B, H, V] and target_mask [B, H, V], None at prediction time; a forward pass must not read them.
        past [B, L, P], known [B, L + H, F], static [B, S], or None when the data has none; NaN where not observed in
        data units, 0 (the training mean) once scaled.
        series_index [B] and cutoff_index [B] int64: which series, and the absolute grid index of the first forecast
        step (steps since the artifact's time origin). Provenance, not inputs, unless ``Capabilities.absolute_time``.
    """

    context: Tensor
    context_mask: Tensor
    target: Tensor | None = None
    target_mask: Tensor | None = None
    past: Tensor | None = None
    known: Tensor | None = None
    static: Tensor | None = None
    series_index: Tensor | None = None
    cutoff_index: Tensor | None = None


def is_complete(mask: Tensor) -> bool:
    """Return whether every cell of a mask is True; on a CPU numpy tells in a fifth of torch's time."""
    seen = _numpy_of(mask)
    return bool(mask.all() if seen is None else seen.all())


def is_known_complete(mask: Tensor) -> bool:
    """Return ``is_complete`` where the answer is free; False on a GPU, which would have to wait, and when compiled."""
    seen = _numpy_of(mask)
    return seen is not None and bool(seen.all())


def _numpy_of(mask: Tensor) -> NDArray[np.bool_] | None:
    """Return the memory of a mask; None on a GPU, in a compilation, and of the wrappers of ``torch.func``."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return np.asarray(mask.numpy())
    except RuntimeError:
        return None


class Observation(NamedTuple):
    """One new row of B series, for models that are carried forward step by step.

    Shapes:
        values [B, V], whatever where not observed; mask [B, V] bool, True = observed.
        past [B, P] and known [B, F] covariates of this row, or None when the data has none.
        elapsed [B]: grid steps since the row before, None = 1 (for models that take irregular steps).
    """

    values: Tensor
    mask: Tensor
    past: Tensor | None = None
    known: Tensor | None = None
    elapsed: Tensor | None = None


class Prediction(NamedTuple):
    """What ``forward`` returns.

    Shapes:
        raw [B, H, V, K], unconstrained, in scaled units; parameter 0 is the location.
        context_raw [B, C, V, K] of the last C <= L steps, for models that also predict or reconstruct the context, else
            None.
        aux_losses: name -> scalar added to the loss, already weighted.
        context_weight: of the loss of ``context_raw``; that of ``raw`` has 1.
    """

    raw: Tensor
    context_raw: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    context_weight: float = 1.0


class TrainingSeries(NamedTuple):
    """The whole training span in scaled units, for models with a closed-form or moment-based fit.

    Shapes:
        values [N, V] (0 where not observed), mask [N, V] bool, past [N, P] or None, known [N, F] or None (0, the mean,
        where not observed),
        static [num_series, S] or None, indptr [num_series + 1] int64 (rows of series s: indptr[s]:indptr[s + 1]),
        offset [num_series] int64 (absolute grid index of each series' first row).
    """

    values: Tensor
    mask: Tensor
    indptr: Tensor
    offset: Tensor
    past: Tensor | None = None
    known: Tensor | None = None
    static: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """Outcome of ``ForecastModel.solve``.

    Attributes:
        finished: no gradient training is needed; False means the weights are a warm start.
        method: what was solved, for the log and the artifact (``"ols"``, ``"sparse"`` ...).
        residual_scale: [H, V] standard deviation of training residuals in scaled units; None where unknown or
            not needed (point outputs).
        details: numbers worth keeping (condition, non-zeros, iterations).
    """

    finished: bool
    method: str
    residual_scale: Tensor | None = None
    details: dict[str, float] | None = None
