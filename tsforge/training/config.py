"""Settings of the training loop; nothing here says anything about the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tsforge.core.config import Config, Seed, tunable
from tsforge.core.errors import ConfigError


class TrainConfig(Config):
    """How gradient training runs. Models that are solved in closed form use only the batch size and the device."""

    max_epochs: int = Field(default=50, ge=1)
    batch_size: int = tunable(64, choices=[16, 32, 64, 128, 256], ge=1)
    """Windows a step; a window holds every variate."""
    learning_rate: float = tunable(1e-3, low=1e-4, high=1e-2, log=True, gt=0)
    """Peak rate of AdamW."""
    weight_decay: float = tunable(1e-4, low=1e-6, high=1e-1, log=True, ge=0)
    schedule: Literal["constant", "cosine", "cyclic_cosine", "one_cycle", "plateau"] = "constant"
    """Course of the learning rate over all planned steps: unchanged, cosine to 0, the same again and again from the
    peak in ``cycles`` equal parts, up for 30 % and down, or multiplied by ``plateau_factor`` after
    ``plateau_patience`` epochs without a validation loss that lies 10 % of the size of the best below it."""
    cycles: int | None = Field(default=None, ge=1)
    """Cosine cycles of schedule cyclic_cosine, which needs it; ``max_epochs`` must be a multiple, so that each cycle
    ends with an epoch."""
    plateau_factor: float | None = Field(default=None, gt=0, lt=1)
    """Default 0.95; only with schedule plateau."""
    plateau_patience: int | None = Field(default=None, ge=0)
    """Default 25; only with schedule plateau."""
    patience: int | None = Field(default=5, ge=1)
    """Epochs without a better validation loss before training stops; null trains every epoch."""
    min_delta: float = Field(default=0.0, ge=0)
    """Least drop of the validation loss that counts as better for the patience."""
    start_margin: float = Field(default=2.0, ge=0)
    """Standard errors, over stretches of one horizon of the validation span, by which training must improve on a
    closed-form start; else the start is kept. 0 takes any improvement."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null switches clipping off."""
    max_steps_per_epoch: int | None = Field(default=None, ge=1)
    """Ends an epoch early, after a fresh shuffle; for large data."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "32", "bf16-mixed"] = "auto"
    """``auto``: bf16 mixed on GPUs that have it, else 32 bit."""
    eval_batch_size: int = Field(default=512, ge=1)
    """Windows a validation step; changes speed only."""
    deterministic: bool = False
    """Refuse GPU kernels that sum in varying order (slower); CPU runs repeat exactly either way."""
    seed: Seed = 0

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings of another schedule, and cycles that end within an epoch."""
        given = [name for name in ("plateau_factor", "plateau_patience") if getattr(self, name) is not None]
        if given and self.schedule != "plateau":
            raise ConfigError(f"train.{given[0]} has no effect with schedule '{self.schedule}'")
        if self.schedule != "cyclic_cosine":
            if self.cycles is not None:
                raise ConfigError(f"train.cycles has no effect with schedule '{self.schedule}'")
            return
        if self.cycles is None:
            raise ConfigError("train.schedule=cyclic_cosine needs train.cycles, the number of its cosine cycles")
        if self.max_epochs % self.cycles:
            near = max(round(self.max_epochs / self.cycles), 1) * self.cycles
            raise ConfigError(
                f"train.max_epochs is {self.max_epochs}, not a multiple of train.cycles={self.cycles}; cycles end with "
                f"an epoch: set train.max_epochs={near}"
            )
