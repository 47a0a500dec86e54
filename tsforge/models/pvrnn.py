"""PV-RNN (experimental): a variational recurrent network without an encoder; inference explains what was observed.

Ahmadi, Tani (2019), A Novel Predictive-Coding-Inspired Variational RNN Model for Online Prediction and Recognition,
Neural Computation 31 (11), arXiv 1811.01339; equations in :mod:`tsforge.layers.pvrnn`.

A forecast is error regression over the last ``window`` rows of the context (free vectors from zeros,
``inference_steps`` steps on the free energy, weights fixed); then the prior runs on from the state reached.

Deviations. (1) The paper learns one free vector for every step of every training sequence, together with the weights.
Training here sees overlapping windows in random order without an identity, and vectors for all of them would be many
times the data; those of a batch are inferred afresh (``training_steps``), then the weights take one step on the free
energy at what was found. (2) The gradient of that step goes through the inference: few steps stop short of the
optimum, where it would not matter, and without it a few steps are not enough to learn from (the conformance check that
overfits one batch then fails). (3) Over the horizon z follows the prior in training too and the loss of the likelihood
is added: the free energy of the whole window with q = p where a forecast has nothing to look at. (4) z is drawn in
training; a forecast and a score follow its mean, the same in every run and every batch. (5) Read-out: a Gaussian with
a learnt deviation for each variate (the paper's has a softmax over bins).

Legend: B batch, L context, H horizon, V variates, K parameters, W rows of the window.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.pvrnn import FreeEnergy, Path, PredictiveCodingNetwork
from tsforge.models.registry import register

_WINDOW = 16


class PVRNNConfig(ModelConfig):
    """Settings of the PV-RNN; lists go from the fast level, which is read out, to the slow ones."""

    name: Literal["pvrnn"] = "pvrnn"
    units: tuple[int, ...] = (32, 16)
    """Units of every level."""
    latents: tuple[int, ...] = (4, 2)
    """Stochastic units z of every level."""
    time_constants: tuple[float, ...] = (2.0, 8.0)
    """Steps over which a level leaks; 1 is a plain recurrent network."""
    meta_prior: float | tuple[float, ...] = 0.1
    """Weight w of the divergence, one for all levels or one each. Large: nearly deterministic; small: z explains every
    row by itself."""
    first_weight: float = Field(0.01, ge=0.0)
    """Weight of the divergence of the first step of a window, which sets the state to start from."""
    bottom_up: bool = False
    """Levels hear the one below them too."""
    window: int | None = Field(None, ge=1)
    """Rows at the end of the context that are explained (default 16, or the whole context where it is shorter)."""
    inference_steps: int = Field(40, ge=1)
    """Steps of inference for a forecast and a score."""
    training_steps: int = Field(5, ge=1)
    """Steps of inference for a batch in training: each costs a pass forward and backward through the window."""
    inference_rate: float = tunable(0.1, low=0.03, high=0.3, log=True, gt=0.0)
    """How far a step of inference moves."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse levels that do not match."""
        count = len(self.units)
        for name in ("latents", "time_constants"):
            if len(getattr(self, name)) != count:
                raise ConfigError(
                    f"model.{name} has {len(getattr(self, name))} entries, model.units has {count}: one a level each"
                )
        if count == 0 or min((*self.units, *self.latents)) < 1:
            raise ConfigError("model.units and model.latents need at least one level, each of at least 1")
        if min(self.time_constants) < 1.0:
            raise ConfigError(f"model.time_constants: {min(self.time_constants)} is below 1 step")
        weights = self.weights
        if len(weights) != count:
            raise ConfigError(f"model.meta_prior has {len(weights)} entries, model.units has {count}")
        if min(weights) < 0.0:
            raise ConfigError(f"model.meta_prior: {min(weights)} is negative")

    @property
    def weights(self) -> tuple[float, ...]:
        """The meta-prior of every level."""
        return self.meta_prior if isinstance(self.meta_prior, tuple) else (self.meta_prior,) * len(self.units)


class Explained(NamedTuple):
    """What inference makes of the last row of a context: reconstruction cost [B, V] (0 where not observed), weighted
    divergence [B], and what the row should have been [B, V], in scaled units."""

    reconstruction: Tensor
    divergence: Tensor
    expected: Tensor


@register("pvrnn")
class PVRNN(ForecastModel[PVRNNConfig]):
    """A generative network that is fitted to the end of each context and then runs on by its prior."""

    config_class = PVRNNConfig
    capabilities = Capabilities(variate_coupling=True)
    source = (
        "Ahmadi, Tani (2019), A Novel Predictive-Coding-Inspired Variational RNN Model for Online Prediction and "
        "Recognition, Neural Computation, arXiv 1811.01339"
    )
    test_configs = (
        {"units": [16], "latents": [3], "time_constants": [2.0], "window": 6, "inference_steps": 4}
        | {"training_steps": 2, "inference_rate": 0.3},
    )

    def __init__(self, config: PVRNNConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if config.window is not None and config.window > spec.context_length:
            raise ConfigError(
                f"model.window: {config.window} rows are more than the context of {spec.context_length}; lower it or "
                "raise window.context_length"
            )
        self.window = min(_WINDOW, spec.context_length) if config.window is None else config.window
        self.network = PredictiveCodingNetwork(
            spec.num_variates,
            config.units,
            config.latents,
            config.time_constants,
            meta_prior=config.weights,
            first_weight=config.first_weight,
            bottom_up=config.bottom_up,
            params=spec.num_params,
        )

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]; while training also the free energy, a row of the window on average."""
        x, mask = self._observed(batch)
        with torch.autocast(x.device.type, enabled=False):
            path = self._explain(x, mask)
            fast = self.network.roll(path.states, self.spec.horizon, sample=self.training)
            raw = self.network.read_out(fast)
            if not self.training:
                return Prediction(raw)
            energy = self.network.energy(path, x, mask).total().mean() / self.window
        return Prediction(raw, aux_losses={"free_energy": energy})

    def _observed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rows [B, W, V] to explain and which of their cells were observed."""
        dtype = self.network.log_sigma.dtype
        return batch.context[:, -self.window :].to(dtype), batch.context_mask[:, -self.window :]

    def _explain(self, x: Tensor, mask: Tensor) -> Path:
        """Return the pass under the posterior that inference finds."""
        free = self.network.infer(
            x,
            mask,
            steps=self.config.training_steps if self.training else self.config.inference_steps,
            rate=self.config.inference_rate,
            sample=self.training,
            through=torch.is_grad_enabled() and (self.training or x.requires_grad),
        )
        return self.network.follow(free, sample=self.training)

    def free_energy(self, batch: Batch) -> Explained:
        """Return the parts of the free energy of the last row of each context of a scaled batch."""
        x, mask = self._observed(batch)
        with torch.autocast(x.device.type, enabled=False):
            path = self._explain(x, mask)
            found: FreeEnergy = self.network.energy(path, x, mask)
            expected = self.network.read_out(path.fast[:, -1:])[:, 0, :, 0]
        return Explained(found.reconstruction[:, -1], found.divergence[:, -1], expected)
