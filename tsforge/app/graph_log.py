"""Graphs of a model while it trains, kept every so many epochs: how the co-occurrence of variates evolved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor, nn

from tsforge.core.atomic import atomic_file
from tsforge.core.errors import ConfigError
from tsforge.network import ForecastNetwork

OnEpoch = Callable[[int, dict[str, float]], None]
NAME = "evolution_epochs"  # of the table in an artifact
KEPT = ("evolved", "evolution_weights")
MOST_CELLS = 1_000_000  # of a table: more than a page draws, and 10 MB
_FOLDER = "graphs"


@runtime_checkable
class HasGraphs(Protocol):
    """A model that mixes variates by graphs it learns."""

    @property
    def has_graph(self) -> bool:
        """True when these settings and sizes leave a graph."""
        ...

    def evolution(self) -> dict[tuple[str, str], Tensor]:
        """Return (layer, matrix) -> [V, V] as they are now."""
        ...


class GraphLog:
    """Keeps the evolved graph and the evolution weights of a model after epochs ``every - 1``, ``2 every - 1`` ...

    Where there is a folder for checkpoints each epoch is a file in it, so that a resumed training goes on with the
    table that it began.

    Args:
        network: that is trained.
        every: epochs.
        epochs: the most that may come.
        folder: of checkpoints, None = keep them in memory only.
        resume: go on with what the folder holds; otherwise it is emptied.

    Raises:
        ConfigError: the model has no graph, or the table would be too large.
    """

    def __init__(
        self, network: ForecastNetwork, *, every: int, epochs: int, folder: Path | None = None, resume: bool = False
    ) -> None:
        model: nn.Module = network.model
        if not isinstance(model, HasGraphs) or not model.has_graph:
            name = network.config.model.name
            raise ConfigError(f"log_graphs={every} has no effect: model '{name}' with these settings learns no graph")
        self.every = every
        self._model = model
        self._found: dict[int, NDArray[np.float32]] = {}
        self._keys: list[tuple[str, str]] = [key for key in model.evolution() if key[1] in KEPT]
        cells = len(self._keys) * network.spec.num_variates**2
        if cells * (epochs // every) > MOST_CELLS:
            least = -(-epochs * cells // MOST_CELLS)
            raise ConfigError(
                f"log_graphs={every} could keep {cells * (epochs // every):,} cells of graphs ({cells:,} an epoch), "
                f"more than {MOST_CELLS:,}; set log_graphs={least} or higher, or lower train.max_epochs"
            )
        self._folder = None if folder is None else Path(folder) / _FOLDER
        if self._folder is not None and self._folder.is_dir():
            if resume:
                self._found = {int(place.stem): np.load(place) for place in self._folder.glob("*.npy")}
            else:
                shutil.rmtree(self._folder)

    def then(self, on_epoch: OnEpoch | None) -> OnEpoch:
        """Return a hook that keeps the graphs of an epoch and calls ``on_epoch``."""

        def hook(epoch: int, metrics: dict[str, float]) -> None:
            if (epoch + 1) % self.every == 0:
                self._keep(epoch)
            if on_epoch is not None:
                on_epoch(epoch, metrics)

        return hook

    def _keep(self, epoch: int) -> None:
        matrices = self._model.evolution()
        values = np.stack([matrices[key].detach().float().cpu().numpy() for key in self._keys])
        self._found[epoch] = values
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._folder / f"{epoch}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, values)

    def table(self, run: str, variates: Sequence[str], epochs: int) -> pl.DataFrame:
        """Return ``run, epoch, layer, matrix, row, column, value``, one row a cell.

        Args:
            run: id of the artifact.
            variates: names of rows and columns.
            epochs: how many were trained; later ones, of an interrupted run that went further, are left out.
        """
        kept = sorted(epoch for epoch in self._found if epoch < epochs)
        layers, matrices = ([key[part] for key in self._keys] for part in (0, 1))
        cells = len(variates) ** 2
        rows, columns = zip(*product(variates, repeat=2), strict=True)
        shown = len(kept) * len(self._keys)
        values = np.stack([self._found[epoch] for epoch in kept]).ravel() if kept else np.zeros(0, dtype=np.float32)
        return pl.DataFrame(
            {
                "run": pl.Series([run], dtype=pl.String).new_from_index(0, shown * cells),
                "epoch": pl.Series(np.repeat(kept, len(self._keys) * cells), dtype=pl.Int64),
                "layer": pl.Series(layers * len(kept), dtype=pl.String).gather(np.repeat(np.arange(shown), cells)),
                "matrix": pl.Series(matrices * len(kept), dtype=pl.String).gather(np.repeat(np.arange(shown), cells)),
                "row": pl.Series(rows, dtype=pl.String).gather(np.tile(np.arange(cells), shown)),
                "column": pl.Series(columns, dtype=pl.String).gather(np.tile(np.arange(cells), shown)),
                "value": pl.Series(values, dtype=pl.Float64),
            }
        )
