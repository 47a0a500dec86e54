"""LSTM: a recurrent network with a gated memory that reads the context, and a linear map from its last state.

Hochreiter, Schmidhuber (1997), Long Short-Term Memory, Neural Computation 9(8):1735-1780; forget gate: Gers,
Schmidhuber, Cummins (2000), Learning to Forget, Neural Computation 12(10):2451-2471.

Deviations: no peepholes; the bias of the forget gate starts one higher; the forecaster around it reads patches of 16
steps where contexts are long and stands beside a closed-form linear map (``skip: none`` leaves that out).
"""

from __future__ import annotations

from typing import Literal

from tsforge.models._recurrent_cells import CellConfig, CellForecaster
from tsforge.models.registry import register


class LSTMConfig(CellConfig):
    """Settings of LSTM."""

    name: Literal["lstm"] = "lstm"


@register("lstm")
class LSTM(CellForecaster[LSTMConfig]):
    """Long short-term memory."""

    config_class = LSTMConfig
    cell = "lstm"
    source = "Hochreiter, Schmidhuber (1997), Long Short-Term Memory, Neural Computation 9(8)"
    test_configs = (
        {"d_model": 16, "dropout": 0.0},
        {"d_model": 32, "heads": 2, "patch_length": 3, "mixing": "mixed", "normalisation": "last", "skip": "none"},
    )
