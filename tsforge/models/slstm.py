"""sLSTM: the LSTM with an exponential input gate and a normaliser, in heads that do not mix.

Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter (2024), xLSTM: Extended Long
Short-Term Memory, NeurIPS, arXiv 2405.04517 (Sec. 2.2, App. A).

Deviations: plain layers, without the convolution, norms and up-projection of the paper's blocks; the forget gate is a
sigmoid; the forecaster around it reads patches of 16 steps where contexts are long and stands beside a closed-form
linear map (``skip: none`` leaves that out).
"""

from __future__ import annotations

from typing import Literal

from tsforge.core.config import tunable
from tsforge.models._recurrent_cells import CellConfig, CellForecaster
from tsforge.models.registry import register


class SLSTMConfig(CellConfig):
    """Settings of sLSTM."""

    name: Literal["slstm"] = "slstm"
    heads: int = tunable(4, choices=[1, 2, 4], ge=1)
    """Recurrences side by side within a layer, each of d_model / heads features: the recurrent weights are
    block-diagonal."""


@register("slstm")
class SLSTM(CellForecaster[SLSTMConfig]):
    """Long short-term memory with exponential gating."""

    config_class = SLSTMConfig
    cell = "slstm"
    source = "Beck et al. (2024), xLSTM: Extended Long Short-Term Memory, NeurIPS, arXiv 2405.04517"
    test_configs = (
        {"d_model": 16, "dropout": 0.0, "normalisation": "none"},
        {"d_model": 16, "heads": 1, "patch_length": 4, "mixing": "mixed", "num_layers": 2, "skip": "none"},
    )
