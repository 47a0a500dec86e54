"""Chimera layers, stacks and inputs in float64 that their tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsforge.layers.chimera import Chimera2DSSM
from tsforge.layers.chimera_block import ChimeraBlock, ChimeraStack
from tsforge.layers.chimera_heads import ChimeraOptions, DiagonalHead

E, S, D = 4, 3, 5


def options(**settings: Any) -> ChimeraOptions:
    return ChimeraOptions(**{"states": S, **settings})


def layer_of(*, seed: int = 0, features: int = E, looks_ahead: bool = False, **settings: Any) -> Chimera2DSSM:
    """Return a layer in float64 whose coupling is far from 0."""
    torch.manual_seed(seed)
    layer = Chimera2DSSM(features, options(**settings), looks_ahead=looks_ahead).double()
    with torch.no_grad():
        for _, head in layer.each():
            if head.coupled:
                head.p2.normal_()
                head.p3.normal_()
    return layer


def stack_of(*, seed: int = 0, blocks: int = 2, conv: int = 0, gate: bool = True, **settings: Any) -> ChimeraStack:
    made = [
        ChimeraBlock(D, layer_of(seed=seed + index, **settings), conv=conv, gate=gate).double()
        for index in range(blocks)
    ]
    return ChimeraStack(made).double()


def grid(*shape: int, seed: int = 0, features: int = E) -> Tensor:
    return torch.randn(*shape, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(layer: Chimera2DSSM, name: str = "trend") -> DiagonalHead:
    return dict(layer.each())[name]


STREAMED: list[dict[str, Any]] = [
    {},
    {"conv": 4},
    {"coupling": "pooled", "conv": 4},
    {"coupling": "none"},
    {"selective": False},
    {"head_mix": "residual", "directions": "forward"},
    {"looks_ahead": True},
    {"selective": False, "looks_ahead": True, "coupling": "pooled"},
    {"selective": False, "structure": "companion"},
    {"selective": False, "structure": "companion", "looks_ahead": True, "coupling": "none"},
]
