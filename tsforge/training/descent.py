"""Gradient steps under Lightning: best weights, exact resumption, plain ways out of a signal.

Apart from ``loop``, so that a closed-form fit does not load Lightning.
"""

from __future__ import annotations

import errno
import logging
import math
import signal
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tsforge.core.config import fingerprint
from tsforge.core.errors import BackendError, listing
from tsforge.core.signals import Terminated
from tsforge.network import ForecastNetwork
from tsforge.training.callbacks import EpochCheckpoint, EpochRecord, LateStopping, ProgressLine, SnapshotTaker
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import OnEpoch
from tsforge.training.module import TrainModule, ValidatedModule
from tsforge.training.snapshots import keeps_snapshots, trained_alone
from tsforge.training.streams import EpochStream, Windows, annealed_at

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR)


def _accelerator(config: TrainConfig) -> str:
    has_gpu = torch.cuda.is_available()
    if config.accelerator == "gpu" and not has_gpu:
        raise BackendError("train.accelerator=gpu, but torch sees no CUDA device; use accelerator=auto or cpu")
    return "gpu" if has_gpu and config.accelerator != "cpu" else "cpu"


def _precision(config: TrainConfig, accelerator: str) -> str:
    if config.precision == "auto":
        return "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "32-true"
    return {"32": "32-true"}.get(config.precision, config.precision)


@dataclass(frozen=True)
class Descent:
    """Gradient training of one network: everything that stays the same from the first epoch to the last."""

    network: ForecastNetwork
    train: Windows
    valid: Windows | None
    config: TrainConfig
    start: dict[str, float] | None
    checkpoint: Path | None
    start_from: Mapping[str, torch.Tensor] | None

    def fingerprint(self) -> str:
        """Return what a checkpoint must agree with for a resumed run to end like an uninterrupted one."""
        scaling = {name: value.double().sum().item() for name, value in self.network.scaler.state_dict().items()}
        begun = {name: value.double().sum().item() for name, value in (self.start_from or {}).items()}
        return fingerprint(
            {
                **({"start_from": begun} if begun else {}),
                **({"whole_loss_from": self.first_epoch()} if self.first_epoch() else {}),
                "train": self.config.model_dump(mode="json"),
                "network": self.network.config.model_dump(mode="json"),
                "spec": asdict(self.network.spec),
                "windows": [len(self.train), 0 if self.valid is None else len(self.valid)],
                "scaling": scaling,
            }
        )

    def descend(self, *, resume: bool, on_epoch: OnEpoch | None, progress: bool) -> tuple[EpochRecord, str]:
        """Run gradient epochs, leave the best weights in the network, return the record and why it ended."""
        config, checkpoint = self.config, self.checkpoint
        start_from = checkpoint if resume and checkpoint is not None and checkpoint.exists() else None
        if start_from is not None:
            _check_readable(start_from)
            _check_same_parts(start_from, self.network)
        stream = EpochStream(
            self.train, config.batch_size, seed=config.seed, shuffle=True, limit=config.max_steps_per_epoch
        )
        keeper = keeps_snapshots(self.network.model)
        taker = None if keeper is None else SnapshotTaker(keeper, config)
        first = self.first_epoch()
        record = EpochRecord(stream, self.fingerprint(), on_epoch, keep_last=taker is not None, first_epoch=first)
        if self.start is not None:
            record.remember_start(self.network, self.start)
        stopper = self._stopper(first)
        callbacks: list[pl.Callback] = [
            *([taker] if taker else []),
            record,
            *([stopper] if stopper else []),
            *([ProgressLine()] if progress else []),
        ]
        kind = TrainModule if self.valid is None else ValidatedModule
        module = kind(self.network, config, total_steps=config.max_epochs * len(stream))
        with quiet_lightning(), own_random_state(), plain_interrupt(), _explained_disk_errors(checkpoint):
            if checkpoint is not None:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                callbacks.append(EpochCheckpoint(checkpoint))
            trainer = self._trainer(callbacks)
            device = trainer.strategy.root_device
            stream.windows = self.train.to(device)
            valid_stream = None
            if self.valid is not None:
                valid_stream = EpochStream(self.valid.to(device), config.eval_batch_size, seed=0, shuffle=False)
            self.network.train()
            with trained_alone(self.network.model):
                trainer.fit(module, stream, valid_stream, ckpt_path=start_from, weights_only=True)
        if taker is not None:
            taker.refuse_early(len(record.history))
        self.network.load_state_dict(record.best_state)
        self.network.cpu().eval()
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        if record.was_stopped:
            return record, "hook"
        early = stopper is not None and stopper.stopped_epoch > 0
        return record, "patience" if early else "max_epochs"

    def first_epoch(self) -> int:
        """Return the first epoch all of whose steps meet the whole loss, at most the last one."""
        epochs = self.config.max_epochs
        return min(math.ceil(annealed_at(self.network) * epochs), epochs - 1)

    def _stopper(self, first_epoch: int) -> EarlyStopping | None:
        config = self.config
        if self.valid is None or config.patience is None:
            return None
        if first_epoch:
            return LateStopping(first_epoch, patience=config.patience, min_delta=config.min_delta)
        return EarlyStopping("valid_loss", patience=config.patience, min_delta=config.min_delta, check_finite=False)

    def _trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        config = self.config
        accelerator = _accelerator(config)
        return pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=_precision(config, accelerator),  # type: ignore[arg-type]
            max_epochs=config.max_epochs,
            gradient_clip_val=config.gradient_clip,
            deterministic=config.deterministic or None,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=self.checkpoint is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def _check_readable(checkpoint: Path) -> None:
    """Refuse a truncated or altered checkpoint before torch trips over it."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise BackendError(f"the checkpoint {checkpoint} cannot be read ({error}); delete it to start anew") from error
    if broken is not None:
        raise BackendError(f"the checkpoint {checkpoint} is damaged ({broken}); delete it to start anew")


def _check_same_parts(checkpoint: Path, network: ForecastNetwork) -> None:
    """Refuse the checkpoint of a version whose model had other parameters: an optimiser has a state for each.

    Raises:
        BackendError: they are not those of ``network``.
    """
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    mine = {name for name, _ in network.named_parameters()}
    theirs = {name.removeprefix("network.") for name in stored}
    if lacking := sorted(mine - theirs):
        raise BackendError(
            f"the checkpoint {checkpoint} is of other settings or another version of tsforge (it has no "
            f"{listing(lacking)}); delete it to start anew"
        )


@contextmanager
def _explained_disk_errors(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if checkpoint is None or error.errno not in _DISK_ERRORS:
            raise
        raise BackendError(
            f"cannot keep checkpoints in {checkpoint.parent}: {error.strerror}; free space or choose another folder"
        ) from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hold back Lightning's tips, device listings and its own use of a deprecated torch name for the time of a fit."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Give training its own random numbers; the caller's state is the same afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def plain_interrupt() -> Iterator[None]:
    """Turn Lightning's ways out of Ctrl-C (status 1, signal ignored for good) and SIGTERM (status 0) into interrupts.

    Raises:
        KeyboardInterrupt: the one that came; ``Terminated`` for a SIGTERM that only Lightning caught.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error, SIGTERMException):
            raise Terminated("ended by signal SIGTERM") from None
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
