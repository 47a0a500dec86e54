"""The Lightning side of a network: one step, one validation step, the optimiser."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tsforge.contracts.model import OptimRule
from tsforge.contracts.tensors import Batch
from tsforge.network import ForecastNetwork
from tsforge.training.config import TrainConfig

_PLATEAU_FACTOR, _PLATEAU_PATIENCE, _PLATEAU_THRESHOLD = 0.95, 25, 0.1  # of ReGENN's released training


class TrainModule(pl.LightningModule):
    """Trains a ``ForecastNetwork``; sums of losses stay on the device, so no step waits for a number."""

    def __init__(self, network: ForecastNetwork, config: TrainConfig, total_steps: int) -> None:
        super().__init__()
        self.network = network
        self.settings = config
        self.total_steps = max(total_steps, 1)
        self.train_sum: dict[str, Tensor] = {}
        self.valid_sum: dict[str, Tensor] = {}
        self._anneals = network.anneals

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one batch in data units."""
        if self._anneals:
            self.network.model.anneal(min(self.trainer.global_step / self.total_steps, 1.0))
        parts = self.network.loss(batch)
        loss = parts["loss"]
        size = batch.context.shape[0]
        _add(self.train_sum, {"loss": loss.detach() * size, "windows": size})
        return loss

    def on_train_epoch_start(self) -> None:
        """Forget the sums of the last epoch."""
        self.train_sum = {}

    def on_train_epoch_end(self) -> None:
        """Let the rate fall on a plateau; the trainer would do it after the checkpoint, and a resumed run lose it."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, Plateau):
            scheduler.step(self.trainer.callback_metrics["valid_loss"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedules that know nothing of the validation loss."""
        if not isinstance(scheduler, Plateau):
            super().lr_scheduler_step(scheduler, metric)

    def train_loss(self) -> float:
        """Return the mean training loss of the epoch so far (the weights change while it is taken)."""
        return float(self.train_sum["loss"] / self.train_sum["windows"]) if self.train_sum else float("nan")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch as it is when it is already there: resident windows are gathered on the device."""
        if batch.context.device == device:
            return batch
        return Batch._make(None if part is None else part.to(device, non_blocking=True) for part in batch)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm here: the trainer refuses to with a fused optimiser in mixed precision.

        It fears scaled gradients; bf16, the only mixed precision there is here, has no scaler.
        """
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """Return AdamW (fused where the device has it) and the schedule asked for."""
        settings = self.settings
        groups = parameter_groups(self.network, settings.learning_rate, settings.weight_decay)
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=all(part.device.type in ("cpu", "cuda") for group in groups for part in group["params"]),
        )
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if settings.schedule == "constant":
            return optimizer
        if settings.schedule == "plateau":
            falling = Plateau(
                optimizer,
                factor=_PLATEAU_FACTOR if settings.plateau_factor is None else settings.plateau_factor,
                patience=_PLATEAU_PATIENCE if settings.plateau_patience is None else settings.plateau_patience,
                threshold=_PLATEAU_THRESHOLD,
                eps=1e-12,
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "monitor": "valid_loss"}}
        if settings.schedule == "cyclic_cosine" and settings.cycles is not None:
            # Loshchilov, Hutter (2017), Eq. (5); Huang et al. (2017), Eq. (2): whole epochs, so cycles divide the steps
            scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
                optimizer, T_0=max(self.total_steps // settings.cycles, 1)
            )
        elif settings.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.total_steps)
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=[group["lr"] for group in groups], total_steps=self.total_steps
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Lowers the rate on a plateau; a loss is better if it lies ``threshold`` times the size of the best below it.

    torch asks for the share ``1 - threshold`` of the best, which every loss near a negative one falls below.
    """

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take the validation loss of an epoch."""
        self.threshold = math.copysign(self.threshold, self.best)
        super().step(metrics, epoch)


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups that hold every trainable parameter once; those without a rule come first.

    A submodule's ``optim_rules`` (name of its parameter -> ``OptimRule``) caps the learning rate and sets the decay.
    """
    plain = (learning_rate, weight_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {plain: []}
    seen: set[int] = set()
    for owner in module.modules():
        rules = getattr(owner, "optim_rules", {})
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rule = rules.get(name, OptimRule())
            cap = math.inf if rule.max_learning_rate is None else rule.max_learning_rate
            decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            groups.setdefault((min(learning_rate, cap), decay), []).append(parameter)
    return [{"params": part, "lr": rate, "weight_decay": decay} for (rate, decay), part in groups.items() if part]


class ValidatedModule(TrainModule):
    """A ``TrainModule`` that is also validated after each epoch."""

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up losses and errors weighted by observed cells."""
        parts = self.network.evaluate(batch)
        cells = parts.pop("cells")
        _add(self.valid_sum, {name: value * cells for name, value in parts.items()} | {"cells": cells})

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self.valid_sum = {}

    def on_validation_epoch_end(self) -> None:
        """Publish the mean validation loss for early stopping."""
        self.log("valid_loss", self.valid_sum["loss"] / self.valid_sum["cells"].clamp(min=1))


def _add(total: dict[str, Any], parts: dict[str, Any]) -> None:
    for name, value in parts.items():
        total[name] = total[name] + value if name in total else value
