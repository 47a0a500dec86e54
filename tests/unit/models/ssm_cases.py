"""State space forecasters, batches and streams that their tests share.

Settings are spelled out, so that nothing depends on a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.model import ForecastModel
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, TrainingSeries
from tsforge.core.config import validate
from tsforge.models._ssm_forecaster import SSMForecaster
from tsforge.models.lssl import LSSL, LSSLConfig
from tsforge.models.s4 import S4, S4Config
from tsforge.testing.generators import make_batch

Model = SSMForecaster[Any]
L, H = 24, 5
BASE: dict[str, Any] = {
    "d_model": 12,
    "d_state": 8,
    "num_layers": 2,
    "num_channels": 1,
    "dropout": 0.1,
    "mixing": "independent",
    "head": "direct",
    "normalisation": "none",
    "patch_length": 1,
    "skip": "none",
    "missing": "mask",
}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": 2, **sizes})


COVARIATES = {"num_known": 2, "num_past": 1, "num_static": 2}


def make(spec: DataSpec, *, seed: int = 0, shaken: bool = True, name: str = "s4", **settings: Any) -> Model:
    """Return a model in evaluation mode, by default with noise in the parts that start at zero."""
    torch.manual_seed(seed)
    model: Model
    if name == "lssl":
        model = LSSL(validate(LSSLConfig, BASE | settings, where="model"), spec)
    else:
        model = S4(validate(S4Config, BASE | settings, where="model"), spec)
    if shaken:
        with torch.no_grad():
            for key, part in model.named_parameters():
                if key.startswith(("head", "ahead", "spread", "skip.spread")):
                    part.add_(0.3 * torch.randn_like(part))
    return model.eval()


@torch.no_grad()
def raw(model: ForecastModel[Any], batch: Batch) -> Tensor:
    return model(batch).raw


def span(spec: DataSpec) -> TrainingSeries:
    """Return a training span of two series without gaps: a season, its drift and noise."""
    rng = np.random.default_rng(5)
    rows = 2 * (spec.context_length + spec.horizon) + 100
    season = np.sin(2 * np.pi * (np.arange(2 * rows)[:, None] / 8 + np.arange(spec.num_variates) / 5))
    values = torch.from_numpy(
        season + 0.05 * rng.normal(size=season.shape).cumsum(0) + 0.3 * rng.normal(size=season.shape)
    )
    return TrainingSeries(
        values, torch.ones_like(values, dtype=torch.bool), torch.tensor([0, rows, 2 * rows]), torch.tensor([0, 0])
    )


def whole(spec: DataSpec, *, size: int = 3, seed: int = 0) -> Batch:
    """Return a batch without gaps."""
    return make_batch(spec, size=size, seed=seed, gaps=0.0)


def rows_of(batch: Batch) -> Iterator[Observation]:
    for t in range(batch.context.shape[1]):
        yield Observation(
            batch.context[:, t],
            batch.context_mask[:, t],
            None if batch.past is None else batch.past[:, t],
            None if batch.known is None else batch.known[:, t],
        )


def ahead_of(batch: Batch) -> Tensor | None:
    return None if batch.known is None else batch.known[:, batch.context.shape[1] :]


@torch.no_grad()
def streamed(model: Model, batch: Batch, state: dict[str, Tensor] | None = None) -> Prediction:
    state = model.initial_state(len(batch.context), batch.static) if state is None else state
    for row in rows_of(batch):
        state = model.step(state, row)
    return model.free_run(state, ahead_of(batch))


HEADS = [
    {"head": "direct"},
    {"head": "direct", "patch_length": 4, "patch_stride": 2},
    {"head": "direct", "missing": "skip"},
    {"head": "masked"},
    {"head": "masked", "missing": "skip"},
    {"head": "rollout"},
    {"head": "rollout", "missing": "skip"},
]


def ids_of(settings: list[dict[str, Any]]) -> list[str]:
    return ["-".join(str(value) for value in case.values()) for case in settings]


def shorter(model: Model, *, settings: dict[str, Any] | None = None, **sizes: int) -> Model:
    """Return the same weights for other window sizes; only a direct head depends on them."""
    config = model.config.model_copy(update=settings or {})
    other = type(model)(config, DataSpec(**{**vars(model.spec), **sizes}))
    other.load_state_dict(model.state_dict())
    return other.eval()
