"""Chimera forecasters and batches that their tests share.

Settings are spelled out, so that nothing depends on a default.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import validate
from tsforge.models.chimera import Chimera, ChimeraConfig

L, H, V = 16, 5, 3
BASE: dict[str, Any] = {
    "d_model": 8,
    "d_state": 3,
    "num_layers": 2,
    "expand": 1,
    "dropout": 0.0,
    "heads": "both",
    "head_mix": "sum",
    "directions": "both",
    "coupling": "scan",
    "selective": True,
    "structure": "diagonal",
    "discretisation": "exact",
    "gate": True,
    "conv": 0,
    "decoder": "direct",
    "variate_embedding": False,
    "variate_order": "given",
    "reconstruct": False,
    "patch_length": 1,
    "normalisation": "none",
    "skip": "none",
}
COVARIATES = {"num_known": 2, "num_past": 1, "num_static": 2}
CLOSED = {"decoder": "closed_loop"}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": V, **sizes})


def make(spec: DataSpec, *, seed: int = 0, shaken: bool = True, **settings: Any) -> Chimera:
    """Return a model in evaluation mode, by default with noise in the parts that start at zero."""
    torch.manual_seed(seed)
    model = Chimera(validate(ChimeraConfig, BASE | settings, where="model"), spec)
    if shaken:
        with torch.no_grad():
            for key, part in model.named_parameters():
                if key.startswith(("head", "ahead", "spread")):
                    part.add_(0.3 * torch.randn_like(part))
                if key.endswith((".p2", ".p3")):
                    part.normal_()
    return model.eval()


def wide(batch: Batch) -> Batch:
    return Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)


@torch.no_grad()
def raw(model: Chimera, batch: Batch) -> Tensor:
    return model(batch._replace(target=None, target_mask=None)).raw


def shorter(model: Chimera, *, settings: dict[str, Any] | None = None, **sizes: int) -> Chimera:
    """Return the same weights for other window sizes; only a direct head depends on them."""
    config = model.config.model_copy(update=settings or {})
    other = Chimera(config, DataSpec(**{**vars(model.spec), **sizes})).to(model.embed.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()


def span(spec: DataSpec, *, rows: int = 150) -> TrainingSeries:
    rng = np.random.default_rng(5)
    season = np.sin(2 * np.pi * (np.arange(rows)[:, None] / 8 + np.arange(spec.num_variates) / 5))
    values = torch.from_numpy(season + 0.3 * rng.normal(size=season.shape))
    return TrainingSeries(values, torch.ones_like(values, dtype=torch.bool), torch.tensor([0, rows]), torch.tensor([0]))
