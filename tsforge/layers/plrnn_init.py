"""Initial values of piecewise-linear recurrent networks, drawn for each group from a generator of its own.

A group of a run with many seeds starts from the very numbers that its seed gives alone. Draws happen on the CPU.

Source: the values that Hess, Monfared, Brenner, Durstewitz (2023), arXiv 2306.04406, and Brenner et al. (2024),
almost-linear RNNs, used in their experiments. Deviations: the layers of the deep PLRNN (Glorot uniform, biases 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tsforge.core.errors import ConfigError

Values: TypeAlias = dict[str, Tensor]
Stream: TypeAlias = Literal["map", "observation"]
_STREAMS: dict[Stream, int] = {"map": 0, "observation": 1}  # a map and its read-out never share draws


def group_seeds(groups: int | None, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """Return one seed for each group: those given, or ``groups`` (1 if None) drawn from torch's global generator.

    Raises:
        ConfigError: a seed is negative, there are none, or their number contradicts ``groups``.
    """
    if seeds is None:
        count = 1 if groups is None else groups
        if count < 1:
            raise ConfigError(f"groups is {count}; it must be at least 1")
        return tuple(torch.randint(0, 2**31, (count,)).tolist())
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"seeds are {list(seeds)}; give at least one, none of them negative")
    if groups is not None and groups != len(seeds):
        raise ConfigError(f"groups is {groups} but there are {len(seeds)} seeds; leave groups out")
    return tuple(seeds)


def per_group(seeds: Sequence[int], stream: Stream, draw: Callable[[torch.Generator], Values]) -> Values:
    """Return what ``draw`` gives for every seed, stacked along a leading axis of groups."""
    drawn = [draw(torch.Generator().manual_seed(len(_STREAMS) * seed + _STREAMS[stream])) for seed in seeds]
    return {name: torch.stack([values[name] for values in drawn]) for name in drawn[0]}


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return draws between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def symmetric(generator: torch.Generator, count: int, *shape: int) -> Tensor:
    """Return draws from U(-1/sqrt(count), 1/sqrt(count))."""
    bound = 1 / math.sqrt(count)
    return uniform(generator, -bound, bound, *shape)


def glorot(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Return a matrix of Glorot and Bengio's uniform draws, bound sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / (rows + columns))
    return uniform(generator, -bound, bound, rows, columns)


def normalised_positive_definite(generator: torch.Generator, latent: int) -> Tensor:
    """Return (R'R/M + I) / lambda_max with R (M, M) standard normal: symmetric, eigenvalues in (0, 1]."""
    R = torch.randn(latent, latent, generator=generator)
    K = R.T @ R / latent + torch.eye(latent)
    largest: Tensor = torch.linalg.eigvalsh(K)[-1]
    return K / largest
