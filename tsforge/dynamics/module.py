"""Training of several seeds side by side: one Lightning batch is the optimiser steps of one epoch.

So Lightning's work a batch is paid once an epoch, and between two epochs nothing waits for the device. A seed whose
loss or gradient is not finite skips that step; after the epoch it goes back to its state before the last epoch that
was all finite, with half the learning rate and a higher alpha. The counts are reported.

Source: Hess et al. (2023), arXiv 2306.04406, Algorithm 1, and its published settings; the recipe is in
``docs/dynamics.md``.
Deviation: the reference ends a training whose parameters are no numbers.

Legend: G groups (seeds).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from tsforge.core.errors import BackendError, ConfigError
from tsforge.dynamics.config import OptimConfig, ReconstructionConfig
from tsforge.dynamics.network import Reconstruction
from tsforge.dynamics.radam import GroupedRAdam
from tsforge.dynamics.training_noise import training_noise
from tsforge.dynamics.validation import Validation, ValidationSeries
from tsforge.dynamics.windows import RandomWindows
from tsforge.layers.forcing_interval import forcing_interval
from tsforge.training.descent import own_random_state, plain_interrupt, quiet_lightning

_TRACE = 200  # points of the traces that a training keeps
_REDRAW_SECONDS = 0.2
TRACED = ("loss", "alpha", "kappa", "gradient_norm", "max_abs_A", "failed_steps")
OnTrace = Callable[[int, dict[str, list[float]]], None]


class ReconstructionModule(pl.LightningModule):
    """Runs the optimiser steps of an epoch in one batch.

    Attributes:
        trace: epoch and, a list over groups each, ``TRACED``: loss and gradient norm before clipping (means over the
            steps of the epoch), alpha and the kappa that it last followed (NaN where there is none), largest |A|, and
            failed steps so far.
        failed_steps: (G,) steps that were skipped.
        restored: (G,) times a group was taken back.
    """

    def __init__(
        self,
        network: Reconstruction,
        train: OptimConfig,
        windows: RandomWindows,
        noise: Tensor,
        on_trace: OnTrace | None = None,
        validation: Validation | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.settings = train
        self.windows = windows
        self._noise = noise if bool(noise.any()) else None  # (N,)
        self.on_trace = on_trace
        self.validation = validation
        self.trace: list[dict[str, Any]] = []
        self._every = max(train.epochs // _TRACE, 1)
        self._steps = 0  # of the whole training
        self._optimiser: GroupedRAdam | None = None

    def configure_optimizers(self) -> None:
        """Leave the steps to ``GroupedRAdam``."""

    def on_train_start(self) -> None:
        """Make the parameters views of one tensor, after Lightning has moved them."""
        self._optimiser = GroupedRAdam(list(self.network.parameters()), self.settings.gradient_clip)
        self._good = self._optimiser.snapshot()
        groups = len(self.network.seeds)
        self.failed_steps = torch.zeros(groups, dtype=torch.int64, device=self.device)
        self.restored = torch.zeros(groups, dtype=torch.int64, device=self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run the steps of epoch ``batch_idx``."""
        assert self._optimiser is not None
        settings = self.settings
        rate = settings.learning_rate * (settings.learning_rate_end / settings.learning_rate) ** (
            batch_idx / settings.epochs
        )
        starts = self.windows.draw(settings.batches_per_epoch, settings.batch_size)
        complete = self.windows.is_complete
        bad = torch.zeros_like(self.failed_steps)
        total = torch.zeros(len(bad), device=self.device)
        norms = torch.zeros_like(total)
        saved = self._optimiser.snapshot()
        for step in range(1, settings.batches_per_epoch + 1):
            x = self.windows.gather(starts[step - 1])
            targets = x[:, 1:]
            if self._noise is not None:
                x = x + self._noise * self.windows.noise(x)
                if settings.noise_on == "window":
                    targets = x[:, 1:]
            inputs = self.windows.gather_inputs(starts[step - 1])
            series = self.windows.gather_series(starts[step - 1])
            self._steps += 1
            loss = self.network.loss(x, targets, settings, self._steps, complete, inputs, series)
            bad += self._optimiser.step(loss, rate)
            total += loss.detach()
            norms += self._optimiser.norm
        failed = bad > 0
        self._optimiser.restore(self._good, failed, 0.5)
        self._good = tuple(  # type: ignore[assignment]
            torch.where(failed.unsqueeze(1), old, new) for old, new in zip(self._good, saved, strict=True)
        )
        self.network.schedule.lift(failed)
        self.failed_steps += bad
        self.restored += failed
        if batch_idx % self._every == 0 or batch_idx + 1 == settings.epochs:
            self._note(batch_idx + 1, total / settings.batches_per_epoch, norms / settings.batches_per_epoch)
        self._validate(batch_idx + 1)

    def on_train_end(self) -> None:
        """Go back to the weights that validated best."""
        if self.validation is not None:
            assert self._optimiser is not None
            self.validation.restore(self.network, self._optimiser.values)

    def _validate(self, epoch: int) -> None:
        every = self.settings.validate_every
        if self.validation is None or every is None or (epoch % every and epoch != self.settings.epochs):
            return
        assert self._optimiser is not None
        found = self.validation.look(epoch, self.network, self._optimiser.values)
        if self.on_trace is not None:
            self.on_trace(epoch, {f"validation_{name}": values for name, values in found.items()})

    @torch.no_grad()
    def _note(self, epoch: int, loss: Tensor, norm: Tensor) -> None:
        row = {
            "loss": loss.tolist(),
            "alpha": self.network.schedule.alpha.tolist(),
            "kappa": self.network.last_kappa.tolist(),
            "gradient_norm": norm.tolist(),
            "max_abs_A": self.network.map.A.abs().amax(1).tolist(),
            "failed_steps": self.failed_steps.tolist(),
        }
        self.trace.append({"epoch": epoch, **row})
        if self.on_trace is not None:
            self.on_trace(epoch, row)


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A finished training of G seeds.

    Attributes:
        network: on the CPU.
        trace: see ``ReconstructionModule``.
        failed_steps, restored: a number for each seed.
        validation: what free runs on the validation rows showed and which epoch was kept; None without.
        seconds: wall time; steps: optimiser steps.
        device: what trained.
    """

    network: Reconstruction
    trace: list[dict[str, Any]]
    failed_steps: list[int]
    restored: list[int]
    validation: Validation | None
    seconds: float
    steps: int
    device: str


def train_seeds(
    trajectories: Sequence[np.ndarray[Any, np.dtype[np.float64]]],
    config: ReconstructionConfig,
    seeds: Sequence[int],
    *,
    inputs: Sequence[np.ndarray[Any, np.dtype[np.float64]]] | None = None,
    series: Sequence[str] | None = None,
    valid: ValidationSeries | None = None,
    progress: bool = False,
    on_trace: OnTrace | None = None,
) -> Training:
    """Train ``seeds`` side by side on standardised trajectories (R_i, N) and return them.

    Args:
        inputs: external inputs (R_i, K) of each trajectory, standardised and complete.
        series: name of the series that each trajectory is of, with ``model.features`` only.
        valid: what to validate on, as ``train.validate_every`` says; the weights are then the best ones of each seed.

    Raises:
        ConfigError: settings that contradict each other or the data.
        DataError: no trajectory holds a window, or none of a series.
        BackendError: the GPU asked for is not there.
        KeyboardInterrupt: Ctrl-C; nothing is returned.
    """
    train = config.train
    on_gpu = torch.cuda.is_available() and train.accelerator != "cpu"
    if train.accelerator == "gpu" and not on_gpu:
        raise BackendError("train.accelerator=gpu, but torch sees no CUDA device; use accelerator=auto or cpu")
    device = "cuda:0" if on_gpu else "cpu"
    rows = [torch.as_tensor(part, dtype=torch.float32) for part in trajectories]
    driven = None if inputs is None else [torch.as_tensor(part, dtype=torch.float32) for part in inputs]
    if (config.model.features > 0) != (series is not None):
        raise ConfigError("model.features needs the series of each trajectory, and these need it; give both")
    windows = RandomWindows(rows, train.sequence_length, seeds, device, inputs=driven, series=series)
    tau = _estimated_tau(trajectories, config)
    values = torch.cat(rows)
    finite = values[values.isfinite()]
    span = (float(finite.min()), float(finite.max()))
    network = Reconstruction(
        config.model,
        config.forcing,
        rows[0].shape[1],
        seeds,
        data_range=span,
        tau=tau,
        inputs=0 if driven is None else driven[0].shape[1],
        series=windows.names,
    )
    if (valid is None) != (train.validate_every is None):
        raise ConfigError("train.validate_every needs validation rows (data.valid), and these need it; give both")
    validation = None if valid is None else Validation(valid, config.evaluation.sigma, len(seeds))
    noise = torch.as_tensor(training_noise(trajectories, train.noise).added, dtype=torch.float32, device=device)
    module = ReconstructionModule(network, train, windows, noise, on_trace, validation)
    started = time.perf_counter()
    with quiet_lightning(), own_random_state(), plain_interrupt():
        warnings.filterwarnings("ignore", message=".*configure_optimizers.*returned `None`")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer = pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=train.epochs,
            callbacks=[EpochLine(train.epochs, seeds)] if progress else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, DataLoader(range(train.epochs), batch_size=None))  # type: ignore[arg-type]
        failed, restored = module.failed_steps.tolist(), module.restored.tolist()
    return Training(
        network=network.cpu(),
        trace=module.trace,
        failed_steps=failed,
        restored=restored,
        validation=validation,
        seconds=time.perf_counter() - started,
        steps=train.epochs * train.batches_per_epoch,
        device=torch.cuda.get_device_name(0) if on_gpu else "cpu",
    )


def _estimated_tau(
    trajectories: Sequence[np.ndarray[Any, np.dtype[np.float64]]], config: ReconstructionConfig
) -> int | None:
    """Return the interval of sparse forcing that the data show, None where it is set or another forcing is.

    Raises:
        ConfigError: it is as long as the windows, so that nothing would be forced.
    """
    if config.forcing.method != "sparse" or config.forcing.tau is not None:
        return None
    tau = forcing_interval(max(trajectories, key=len))
    if tau >= config.train.sequence_length:
        raise ConfigError(
            f"the data show an interval of sparse forcing of {tau} steps, and windows of train.sequence_length="
            f"{config.train.sequence_length} are not longer: nothing would be forced; lengthen them, or set forcing.tau"
        )
    return tau


class EpochLine(pl.Callback):
    """One line on standard error: epochs done, time left, the last loss and alpha noted."""

    def __init__(self, epochs: int, seeds: Sequence[int], console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._epochs = epochs
        self._text = f"seeds {', '.join(map(str, seeds))}"
        self._progress: Progress | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the line where there is a terminal."""
        if not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
        self._progress.start()
        self._task = self._progress.add_task(self._text, total=self._epochs, note="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        now = time.monotonic()
        if self._progress is None or now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        assert isinstance(pl_module, ReconstructionModule)
        last = pl_module.trace[-1]
        note = f"loss {np.median(last['loss']):.2e}  alpha {np.median(last['alpha']):.3f}"
        self._progress.update(self._task, completed=batch_idx + 1, note=note)
        self._progress.refresh()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the line before the message appears."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
