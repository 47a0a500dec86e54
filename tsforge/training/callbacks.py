"""What happens between epochs: history, best weights, the caller's hook, the progress bar."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tsforge.core.errors import ConfigError, ModelError
from tsforge.core.seeding import derive_seed
from tsforge.network import ForecastNetwork
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import OnEpoch, StopTraining, mean_metrics
from tsforge.training.module import TrainModule
from tsforge.training.snapshots import KeepsSnapshots
from tsforge.training.streams import EpochStream

_REDRAW_SECONDS = 0.1


def trainer_module(module: pl.LightningModule) -> TrainModule:
    """Return the module as what it is; Lightning's hooks are typed for any module."""
    if not isinstance(module, TrainModule):
        raise TypeError(f"these callbacks work on a TrainModule, not on a {type(module).__name__}")
    return module


class EpochRecord(pl.Callback):
    """Keeps history and best weights, seeds every epoch, calls the hook, stops on losses that are not finite.

    Its state is part of the checkpoint, so a resumed run continues the same history.

    Args:
        stream: training batches, told which epoch it is.
        fingerprint: of everything that must not change between a run and its resumption.
        on_epoch: called with the epoch (from 0) and its metrics.
        keep_last: keep the weights of the last epoch instead of the best.
        first_epoch: the first whose weights compete for the best; until then the latest are kept.
    """

    def __init__(
        self,
        stream: EpochStream,
        fingerprint: str,
        on_epoch: OnEpoch | None,
        *,
        keep_last: bool = False,
        first_epoch: int = 0,
    ) -> None:
        self.stream = stream
        self.fingerprint = fingerprint
        self.on_epoch = on_epoch
        self.keep_last = keep_last
        self.first_epoch = first_epoch
        self.history: list[dict[str, float]] = []
        self.best_epoch = -1
        self.best_loss = math.inf
        self.best_state: dict[str, Tensor] = {}
        self.start: dict[str, float] = {}
        self.train_seconds = 0.0
        self.windows_seen = 0
        self.was_stopped = False
        self._started = 0.0
        self._epoch_seconds = 0.0
        self._rate = math.nan

    def remember_start(self, network: ForecastNetwork, metrics: dict[str, float]) -> None:
        """Let the weights before the first step (a warm start) compete for the best; their epoch is -1."""
        self.start = dict(metrics)
        self.best_loss = metrics["valid_loss"]
        self._keep(network)

    def _keep(self, network: ForecastNetwork) -> None:
        self.best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def best_metrics(self) -> dict[str, float]:
        """Return the metrics of the weights that were kept."""
        if self.best_epoch < 0:
            return dict(self.start)
        row = next(row for row in self.history if row["epoch"] == self.best_epoch)
        return {name: value for name, value in row.items() if name != "epoch"}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tie the shuffle and every random draw of the epoch to seed and epoch."""
        self.stream.epoch = trainer.current_epoch
        torch.manual_seed(derive_seed(self.stream.seed, "epoch", trainer.current_epoch))
        self._started = time.perf_counter()
        self._epoch_seconds = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rate of the step: when the epoch ends, a schedule has set that of the next."""
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def _stop_clock(self, module: TrainModule) -> None:
        if self._started:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            self._epoch_seconds = time.perf_counter() - self._started
            self._started = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: training speed does not include validation."""
        self._stop_clock(trainer_module(pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one row of history, remember better weights, call the hook."""
        module = trainer_module(pl_module)
        self._stop_clock(module)
        windows = int(module.train_sum["windows"])
        self.train_seconds += self._epoch_seconds
        self.windows_seen += windows
        metrics = {"train_loss": module.train_loss(), **mean_metrics(module.valid_sum)}
        metrics["learning_rate"] = self._rate
        metrics["seconds"] = self._epoch_seconds
        metrics["windows_per_second"] = windows / max(self._epoch_seconds, 1e-9)
        self._refuse_nonfinite(metrics, trainer.current_epoch, module)
        self.history.append({"epoch": float(trainer.current_epoch), **metrics})
        loss = metrics.get("valid_loss", -float(trainer.current_epoch))  # without validation the last epoch is the best
        competes = trainer.current_epoch >= self.first_epoch
        if self.keep_last or not competes or loss < self.best_loss:
            self.best_loss, self.best_epoch = loss if competes else math.inf, trainer.current_epoch
            self._keep(module.network)
        if self.on_epoch is not None:
            try:
                self.on_epoch(trainer.current_epoch, dict(metrics))
            except StopTraining:
                self.was_stopped = True
                trainer.should_stop = True

    @staticmethod
    def _refuse_nonfinite(metrics: dict[str, float], epoch: int, module: TrainModule) -> None:
        bad = [name for name in ("train_loss", "valid_loss") if name in metrics and not math.isfinite(metrics[name])]
        if bad:
            shown = ", ".join(f"{name} is {metrics[name]}" for name in bad)
            raise ModelError(
                f"training broke down in epoch {epoch}: {shown}; lower train.learning_rate (now "
                f"{module.settings.learning_rate:g}), set train.gradient_clip (now {module.settings.gradient_clip}), "
                "or look for extreme values with the data report"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors for the checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "history": [dict(row) for row in self.history],
            "start": self.start,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "best_state": self.best_state,
            "train_seconds": self.train_seconds,
            "windows_seen": self.windows_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            ConfigError: the checkpoint belongs to other settings or other data.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the checkpoint was written with other settings or other data, so resuming would not repeat the run; "
                "restore them, or start anew with resume=False"
            )
        for name in ("history", "start", "best_epoch", "best_loss", "best_state", "train_seconds", "windows_seen"):
            setattr(self, name, state_dict[name])


class LateStopping(EarlyStopping):
    """Early stopping on ``valid_loss`` that looks at no epoch before ``first_epoch``."""

    def __init__(self, first_epoch: int, *, patience: int, min_delta: float) -> None:
        super().__init__(
            "valid_loss", patience=patience, min_delta=min_delta, check_finite=False, check_on_train_epoch_end=True
        )
        self.first_epoch = first_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the best, stop when patience ends."""
        if trainer.current_epoch >= self.first_epoch:
            super().on_train_epoch_end(trainer, pl_module)


class EpochCheckpoint(Checkpoint):
    """Writes the whole state of the run after each epoch, after every other callback; the file is replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the checkpoint."""
        trainer.save_checkpoint(self.path)


class ProgressLine(pl.Callback):
    """One line on standard error: epoch, batches, losses; redrawn at most ten times a second.

    Args:
        console: where to draw (default: standard error, nothing at all when it is no terminal).
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._task: Any = None
        self._drawn = 0.0
        self._losses = ""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch."""
        if not self._console.is_terminal:
            return
        total = int(trainer.num_training_batches)
        text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
            self._progress.start()
            self._task = self._progress.add_task(text, total=total, losses=self._losses)
        self._progress.reset(self._task, total=total, description=text, losses=self._losses)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance, without asking the device for a number."""
        now = time.monotonic()
        if self._progress is not None and now - self._drawn > _REDRAW_SECONDS:
            self._drawn = now
            self._progress.update(self._task, completed=batch_idx + 1)
            self._progress.refresh()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the losses of the finished epoch."""
        if self._progress is None:
            return
        module = trainer_module(pl_module)
        valid = mean_metrics(module.valid_sum).get("valid_loss")
        self._losses = f"train {module.train_loss():.4f}" + ("" if valid is None else f"  valid {valid:.4f}")
        self._progress.update(self._task, losses=self._losses)
        self._progress.refresh()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the line."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the line before the message appears."""
        self._close()


class SnapshotTaker(pl.Callback):
    """Takes a snapshot after the last epoch of each of the last cycles, before anything else sees that epoch's end.

    Snapshots are part of the model's state, so checkpoints hold those taken and a resumed run goes on from them.
    """

    def __init__(self, keeper: KeepsSnapshots, config: TrainConfig) -> None:
        if keeper.snapshots is None or config.cycles is None:
            raise ValueError("check_snapshots comes first")
        self.keeper = keeper
        self.snapshots = keeper.snapshots
        self.cycles = config.cycles
        self.epochs = config.max_epochs // config.cycles

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot if a cycle ends here."""
        cycle, rest = divmod(trainer.current_epoch + 1, self.epochs)
        index = cycle - 1 - (self.cycles - self.snapshots)
        if rest == 0 and index >= 0:
            self.keeper.take_snapshot(index)

    def refuse_early(self, epochs: int) -> None:
        """Refuse a training that a hook has ended before the last snapshot.

        Raises:
            ModelError: fewer epochs than planned.
        """
        if epochs < self.cycles * self.epochs:
            raise ModelError(
                f"a hook stopped the training after {epochs} of {self.cycles * self.epochs} epochs, before the last of "
                f"{self.snapshots} snapshots; lower train.max_epochs instead"
            )
