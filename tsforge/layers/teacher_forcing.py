"""How strongly a model is forced while it learns: generalized, adaptive and sparse teacher forcing.

Every ``interval``-th optimiser step of the training, the adaptive rule estimates what the Jacobians on the data would
grow by, kappa, and with a = max(0, 1 - 1/kappa) sets

    alpha = a                                     if a > alpha           raised at once
    alpha = decay alpha + (1 - decay) a           otherwise              lowered slowly

Sparse forcing replaces the state every tau-th step and leaves it alone otherwise: with t = 1 for the first state,
forced fully where (t - 1) mod tau = 0.

Sources: Hess et al. (2023), arXiv 2306.04406, Algorithm 1 (adaptive); Mikhaeil et al. (2022) (sparse). Deviation: a
kappa that is no number changes nothing, an infinite one gives a = 1.

Legend: G groups, T steps, B batch, M latent units.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, ModelError

_OF_METHOD = {
    "estimator": ("adaptive",),
    "decay": ("adaptive",),
    "interval": ("adaptive",),
    "start": ("adaptive", "constant"),
    "tau": ("sparse",),
}


class ForcingConfig(Config):
    """Settings of teacher forcing.

    Attributes:
        method: ``adaptive``, ``constant`` (alpha = start), ``sparse`` (each tau-th step) or ``none``.
        estimator: of kappa, see :func:`tsforge.ops.plrnn_jacobian.kappa`; adaptive.
        start: alpha at the start; adaptive (1) and constant, which has no default.
        decay: gamma of the adaptive rule.
        interval: optimiser steps between estimates; adaptive.
        tau: interval of sparse forcing in steps; None leaves it to the data (see
            :func:`tsforge.layers.forcing_interval.forcing_interval`).
    """

    method: Literal["adaptive", "constant", "sparse", "none"] = "adaptive"
    estimator: Literal["arithmetic_mean", "product_upper_bound", "batch_maximum", "jacobian_upper_bound"] = (
        "product_upper_bound"
    )
    start: float | None = Field(None, ge=0.0, le=1.0)
    decay: float = Field(0.999, ge=0.0, lt=1.0)
    interval: int = Field(5, ge=1)
    tau: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> ForcingConfig:
        for name, methods in _OF_METHOD.items():
            differs = getattr(self, name) != type(self).model_fields[name].default
            if differs and self.method not in methods:
                raise ValueError(f"{name} has no part in method '{self.method}'; leave it out")
        if self.method == "constant" and self.start is None:
            raise ValueError("method 'constant' needs start, the strength of the forcing")
        return self


class AlphaSchedule(nn.Module):
    """The strength of the forcing of G groups, kept in the buffer ``alpha`` (G,) and so in checkpoints.

    Args:
        config: see :class:`ForcingConfig`.
        groups: G.
        tau: interval of sparse forcing if the config leaves it open.

    Raises:
        ConfigError: sparse forcing without tau, tau given twice or for another method, or groups below 1.
    """

    alpha: Tensor

    def __init__(self, config: ForcingConfig, groups: int = 1, *, tau: int | None = None) -> None:
        super().__init__()
        if groups < 1:
            raise ConfigError(f"groups is {groups}; it must be at least 1")
        if tau is not None and (config.method != "sparse" or config.tau is not None or tau < 1):
            raise ConfigError(f"tau = {tau} is for sparse forcing whose config leaves tau open, and at least 1")
        self.config = config
        self.tau = config.tau if tau is None else tau
        if config.method == "sparse" and self.tau is None:
            raise ConfigError("sparse forcing needs tau; set it, or estimate it from the data")
        start = 1.0 if config.start is None else config.start
        value = start if config.method in ("adaptive", "constant") else 0.0
        self.register_buffer("alpha", torch.full((groups,), value, dtype=torch.float64))

    def due(self, step: int) -> bool:
        """Return whether optimiser step ``step`` = 1, 2, ... of the training needs an estimate of kappa."""
        return self.config.method == "adaptive" and step % self.config.interval == 0

    @torch.no_grad()
    def update(self, step: int, kappa: Tensor) -> None:
        """Apply the adaptive rule with kappa () or (G,) before optimiser step ``step``; nothing unless it is due.

        Raises:
            ModelError: kappa has another shape.
        """
        if not self.due(step):
            return
        if kappa.shape not in ((), self.alpha.shape):
            raise ModelError(f"kappa needs shape () or {tuple(self.alpha.shape)}, got {tuple(kappa.shape)}")
        found = (1 - 1 / kappa.detach().to(self.alpha)).clamp(min=0.0)
        lowered = self.config.decay * self.alpha + (1 - self.config.decay) * found
        changed = torch.where(found > self.alpha, found, lowered)
        self.alpha.copy_(torch.where(torch.isnan(found), self.alpha, changed))

    @torch.no_grad()
    def lift(self, groups: Tensor, share: float = 0.1) -> bool:
        """Raise alpha of the marked groups (G,) by ``share`` of the way to 1, after a failed step.

        Returns:
            whether the method has a strength to raise (not for sparse and none).
        """
        if self.config.method in ("sparse", "none"):
            return False
        self.alpha.copy_(torch.where(groups.to(self.alpha.device), self.alpha + share * (1 - self.alpha), self.alpha))
        return True

    def alpha_for(self, steps: int) -> Tensor:
        """Return (G,), or for sparse forcing (T,) of 0 and 1: entry k follows the prediction of state t = k + 2."""
        if self.config.method != "sparse":
            return self.alpha.clone()  # later updates leave it alone
        assert self.tau is not None
        taken = torch.arange(1, steps + 1, device=self.alpha.device)
        return (taken % self.tau == 0).to(self.alpha.dtype)

    def strength(self, steps: int, reach: Tensor | None = None) -> Tensor:
        """Return alpha for :func:`tsforge.ops.plrnn.gtf_sequence` with groups.

        Args:
            steps: T.
            reach: (M,) or (G, T, B, M) of an observation, 1 where a unit is forced; None forces all (not for sparse).

        Returns:
            (G,), (G, M), (G, T, M) or (G, T, B, M), whatever is least.

        Raises:
            ModelError: the reach has another shape, or is missing for sparse forcing.
        """
        alpha = self.alpha_for(steps)
        groups, sparse = len(self.alpha), self.config.method == "sparse"
        if reach is None:
            if sparse:
                raise ModelError("sparse forcing needs the reach of the observation for the number of latent units")
            return alpha
        if reach.ndim == 1:
            if sparse:
                return (alpha[:, None].to(reach) * reach).expand(groups, -1, -1)
            return alpha[:, None].to(reach) * reach
        if reach.ndim != 4 or reach.shape[:2] != (groups, steps):
            raise ModelError(
                f"reach needs shape (M,) or (G, T, B, M) with G = {groups} and T = {steps}, got {tuple(reach.shape)}"
            )
        return (alpha[:, None, None] if sparse else alpha[:, None, None, None]).to(reach) * reach
