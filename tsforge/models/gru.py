"""GRU: a gated recurrent network that reads the context, and a linear map from its last state to the horizon.

Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio (2014), Learning Phrase Representations using RNN
Encoder-Decoder for Statistical Machine Translation, EMNLP, arXiv 1406.1078 (Eq. 5-8).

Deviations: the reset gate acts after the recurrent product (as cuDNN has it); the forecaster around it reads patches of
16 steps where contexts are long and stands beside a closed-form linear map (``skip: none`` leaves that out).
"""

from __future__ import annotations

from typing import Literal

from tsforge.models._recurrent_cells import CellConfig, CellForecaster
from tsforge.models.registry import register


class GRUConfig(CellConfig):
    """Settings of GRU."""

    name: Literal["gru"] = "gru"


@register("gru")
class GRU(CellForecaster[GRUConfig]):
    """Gated recurrent units."""

    config_class = GRUConfig
    cell = "gru"
    source = "Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder, EMNLP, arXiv 1406.1078"
    test_configs = (
        {"d_model": 16, "dropout": 0.0, "normalisation": "none", "skip": "none"},
        {"d_model": 16, "heads": 2, "num_layers": 2, "patch_length": 4, "patch_stride": 3},
    )
