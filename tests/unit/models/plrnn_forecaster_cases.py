"""PLRNN forecasters and batches in float64 that their tests share."""

from __future__ import annotations

from typing import Any

import torch

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.config import validate
from tsforge.models.plrnn import PLRNN, PLRNNForecastConfig
from tsforge.testing.generators import make_batch

L, H, V = 10, 4, 3
BASE: dict[str, Any] = {
    "kind": "clipped_shallow",
    "latent": 5,
    "hidden": 7,
    "bounded": True,
    "observation": "identity",
    "ensemble": 2,
    "objective": "gtf",
    "forcing": {"method": "constant", "start": 0.3},
    "gain": "innovation",
    "normalisation": "window",
    "skip": "none",
}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": V, **sizes})


def make(spec: DataSpec | None = None, *, seed: int = 0, **settings: Any) -> PLRNN:
    """Return a float64 model in evaluation mode whose biases are not 0."""
    torch.manual_seed(seed)
    model = PLRNN(validate(PLRNNForecastConfig, BASE | settings, where="model"), spec or spec_of()).double()
    with torch.no_grad():
        for name, part in model.named_parameters():
            if not name.startswith("skip"):
                part.add_(0.2 * torch.randn_like(part))
    return model.eval()


def batch_of(spec: DataSpec | None = None, **options: Any) -> Batch:
    batch = make_batch(spec or spec_of(), **options)
    return Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)


def without_target(batch: Batch) -> Batch:
    return batch._replace(target=None, target_mask=None)
