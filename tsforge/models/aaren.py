"""Aaren: Transformer blocks whose attention is a recurrence, so that serving takes constant memory and time a step.

Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori (2024), Attention as an RNN, arXiv 2405.13956 (Sec. 3).

Deviations: see ``tsforge.layers.aaren`` and ``tsforge.ops.prefix_attention``; the forecaster around it reads patches of
16 steps where contexts are long and stands beside a closed-form linear map (``skip: none`` leaves that out).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.aaren import AarenBlock, AarenStack
from tsforge.models._recurrent_forecaster import RecurrentForecaster, RecurrentForecasterConfig
from tsforge.models.registry import register


class AarenConfig(RecurrentForecasterConfig):
    """Settings of Aaren."""

    name: Literal["aaren"] = "aaren"
    num_layers: int = tunable(2, low=1, high=4, ge=1)
    heads: int = tunable(4, choices=[2, 4, 8], ge=1)
    """Learned queries a layer, each over d_model / heads features."""
    position: Literal["decay", "sinusoid"] = tunable("decay", choices=["decay", "sinusoid"])
    """How the order of steps is told: a learned loss of score a step in each head, which holds for any length, or sines
    of the step number, counted from the first row of a context (or of a stream)."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse heads that do not divide the width."""
        if self.d_model % self.heads:
            raise ConfigError(f"model.heads: {self.heads} does not divide model.d_model {self.d_model}")
        super().model_post_init(context)


@register("aaren")
class Aaren(RecurrentForecaster[AarenConfig]):
    """Attention of learned queries over all steps so far."""

    config_class = AarenConfig
    stack: AarenStack
    source = "Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori (2024), Attention as an RNN, arXiv 2405.13956"
    test_configs = (
        {"d_model": 16, "normalisation": "none"},
        {"d_model": 16, "normalisation": "none", "skip": "none", "position": "sinusoid", "num_layers": 1, "heads": 2},
        {"d_model": 16, "mixing": "mixed", "patch_length": 4, "patch_stride": 2},
    )

    def make_network(self, steps: int) -> AarenStack:
        """Return the blocks."""
        config = self.config
        return AarenStack(
            config.d_model,
            config.heads,
            config.num_layers,
            position=config.position,
            span=steps,
            dropout=config.dropout,
        )

    @torch.no_grad()
    def explain(self) -> dict[str, Any]:
        """Return after how many grid steps a step counts half, for every head; nothing with sinusoids."""
        rows = []
        for index, block in enumerate(self.stack.blocks):
            assert isinstance(block, AarenBlock)
            lives = block.half_lives()
            if lives is not None:
                rows += [
                    {"layer": index, "head": head, "half_life": float(life) * self.stride}
                    for head, life in enumerate(lives)
                ]
        return {"half_lives": rows} if rows else {}
