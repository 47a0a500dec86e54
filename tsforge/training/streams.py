"""Where batches of a training come from: windows in memory, epoch after epoch in a repeatable order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from tsforge.contracts.tensors import Batch
from tsforge.core.seeding import derive_seed
from tsforge.data.panel import Panel
from tsforge.network import ForecastNetwork


class Windows(Protocol):
    """What training needs of a window dataset: whole batches gathered from resident tensors."""

    rows_per_item: int
    panel: Panel

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]: ...

    def to(self, device: torch.device | str) -> Windows: ...


def annealed_at(network: ForecastNetwork) -> float:
    """Return the share of training after which every part of the model meets its whole loss.

    A module whose loss rises over training says so with ``annealed_at``; 0 where none does.
    """
    return max(float(getattr(part, "annealed_at", 0.0)) for part in network.model.modules())


class EpochStream(Iterable[Batch]):
    """Batches of one epoch; the shuffle depends on seed and epoch only, so a resumed run sees the same order."""

    def __init__(
        self, windows: Windows, batch_size: int, *, seed: int, shuffle: bool, limit: int | None = None
    ) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.limit = limit
        self.epoch = 0

    def __len__(self) -> int:
        full = -(-len(self.windows) // self.batch_size)
        return full if self.limit is None else min(full, self.limit)

    def __iter__(self) -> Iterator[Batch]:
        # a generator: the epoch is read when the first batch is asked for, not when the iterator is made
        stream = self.windows.batches(
            self.batch_size, shuffle=self.shuffle, seed=derive_seed(self.seed, "shuffle", self.epoch)
        )
        for _, batch in zip(range(len(self)), stream, strict=False):
            yield batch
