"""State space layers of every kind and inputs that their tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsforge.layers.ssm import SSM, DiagonalSSM, LowRankSSM, StructuredSSM, UnitarySSM

KINDS = ("zoh", "bilinear", "lru", "s4", "lssl")


def build(
    kind: str, *, features: int = 4, states: int = 8, channels: int = 1, copies: int = 1, seed: int = 0, **settings: Any
) -> SSM:
    torch.manual_seed(seed)
    size = (features, states, channels)
    dt_range = settings.pop("dt_range", (0.01, 0.1))
    if kind == "lru":
        return UnitarySSM(*size, name="tested", **settings)
    if kind == "s4":
        return LowRankSSM(*size, name="tested", dt_range=dt_range, copies=copies, **settings)
    if kind == "lssl":
        return StructuredSSM(*size, name="tested", dt_range=dt_range, shares_a=copies == 1, **settings)
    return DiagonalSSM(*size, name="tested", dt_range=dt_range, copies=copies, discretisation=kind, **settings)  # type: ignore[arg-type]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def looped(layer: SSM, u: Tensor, state: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    outputs = []
    for value in u.unbind(-1):
        y, state = layer.step(value, state, **settings)
        outputs.append(y)
    return torch.stack(outputs, dim=-1), state
