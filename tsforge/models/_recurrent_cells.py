"""The forecasters ``gru``, ``lstm`` and ``slstm`` but for their names: a stack of recurrent layers of one kind."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.recurrent import Cell, RecurrentLayer, RecurrentStack
from tsforge.models._recurrent_forecaster import RecurrentForecaster, RecurrentForecasterConfig


class CellConfig(RecurrentForecasterConfig):
    """Settings of a stack of recurrent layers."""

    heads: int = tunable(1, choices=[1, 2, 4], ge=1)
    """Recurrences side by side within a layer, each of d_model / heads features: the recurrent weights are
    block-diagonal. One head of LSTM or GRU is the kernel of torch, several are a loop over steps."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse heads that do not divide the width."""
        if self.d_model % self.heads:
            raise ConfigError(f"model.heads: {self.heads} does not divide model.d_model {self.d_model}")
        super().model_post_init(context)


C = TypeVar("C", bound=CellConfig)


class CellForecaster(RecurrentForecaster[C]):
    """Base of the forecasters on recurrent layers; a subclass names the cell."""

    cell: ClassVar[Cell]

    def make_network(self, steps: int) -> RecurrentStack:
        """Return the layers."""
        width = self.config.d_model
        layers = [RecurrentLayer(self.cell, width, width, self.config.heads) for _ in range(self.config.num_layers)]
        return RecurrentStack(layers, self.config.dropout)
