"""Snapshots: weights of one training at the ends of its last cycles of the learning rate, kept inside the model.

The model decides where they go (``KeepsSnapshots``); this says when they are taken and what does not go with them.
Source: Huang et al. (2017), Snapshot Ensembles: Train 1, Get M for Free, ICLR, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn

from tsforge.core.errors import ConfigError
from tsforge.training.config import TrainConfig


@runtime_checkable
class KeepsSnapshots(Protocol):
    """A model that can hold earlier states of itself and forecast their mean."""

    @property
    def snapshots(self) -> int | None:
        """How many it holds; None = it is trained as any model."""
        ...

    def train_alone(self, alone: bool) -> None:
        """Forecast with the network that is trained, alone (True), or with the mean of the snapshots."""
        ...

    def take_snapshot(self, index: int) -> None:
        """Keep the present state as snapshot ``index``, from 0."""
        ...


def keeps_snapshots(model: nn.Module) -> KeepsSnapshots | None:
    """Return the model if its settings ask for snapshots, else None."""
    return model if isinstance(model, KeepsSnapshots) and model.snapshots is not None else None


def check_snapshots(model: nn.Module, config: TrainConfig) -> None:
    """Refuse a training that does not give the snapshots a model asks for.

    Raises:
        ConfigError: another schedule, fewer cycles than snapshots, or early stopping.
    """
    keeper = keeps_snapshots(model)
    if keeper is None or keeper.snapshots is None:
        return
    if config.schedule != "cyclic_cosine" or config.cycles is None:
        raise ConfigError(
            f"model.snapshots are taken where cycles of the learning rate end, and schedule '{config.schedule}' has "
            "none; set train.schedule=cyclic_cosine and train.cycles (or train=snapshots)"
        )
    if config.cycles < keeper.snapshots:
        raise ConfigError(
            f"model.snapshots={keeper.snapshots} needs as many cycles of the learning rate, train.cycles is "
            f"{config.cycles}"
        )
    if config.patience is not None:
        raise ConfigError(
            f"train.patience={config.patience} could stop before the last snapshot is taken; set train.patience=null"
        )


@contextmanager
def trained_alone(model: nn.Module) -> Iterator[None]:
    """Let a model with snapshots forecast without them for the time of its training."""
    keeper = keeps_snapshots(model)
    if keeper is None:
        yield
        return
    keeper.train_alone(True)
    try:
        yield
    finally:
        keeper.train_alone(False)
