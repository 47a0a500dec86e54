"""Fitting a network: closed form first, then gradient steps under Lightning with best weights and exact resumption."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tsforge.contracts.tensors import SolveReport, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.core.logs import get_logger, log_event
from tsforge.layers.likelihoods import Point
from tsforge.network import ForecastNetwork
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import OnEpoch, StopTraining, mean_metrics
from tsforge.training.snapshots import check_snapshots
from tsforge.training.streams import Windows, annealed_at
from tsforge.training.warm_start import compare

if TYPE_CHECKING:
    from tsforge.training.callbacks import EpochRecord

LOGGER = get_logger(__name__)
CHECKPOINT = "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a fit went. The network itself holds the best weights, on the CPU, in evaluation mode.

    Attributes:
        epochs: epochs of gradient training; 0 for a closed-form fit.
        history: one row an epoch: ``epoch, train_loss, valid_loss, valid_mse, valid_mae, learning_rate, seconds,
            windows_per_second`` (losses in scaled units, the rate of the epoch's last step).
        best_epoch: the epoch whose weights were kept (the last with snapshots); -1 for a closed-form fit or a warm
            start that no epoch clearly improved (``TrainConfig.start_margin``).
        metrics: the row of the kept weights; errors after the model has settled, where it does, and of the mean of
            snapshots, where it takes some.
        solve: what the closed form reported, or None.
        stopped_by: ``solved``, ``untrainable``, ``max_epochs``, ``patience`` or ``hook``.
        seconds: wall time of everything.
        windows_per_second: training speed over all epochs without validation; 0 for a closed-form fit.
    """

    epochs: int
    history: tuple[dict[str, float], ...]
    best_epoch: int
    metrics: dict[str, float]
    solve: SolveReport | None
    stopped_by: str
    seconds: float
    windows_per_second: float


def fit_network(
    network: ForecastNetwork,
    train: Windows,
    valid: Windows | None,
    config: TrainConfig,
    *,
    series: TrainingSeries,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    progress: bool = True,
    start_from: Mapping[str, torch.Tensor] | None = None,
) -> TrainResult:
    """Fit ``network`` in place and return how it went.

    Scaling statistics, ``prepare`` and the closed form come first; gradient steps follow unless that finished the job.

    Args:
        network: built for the sizes of the windows.
        train, valid: windows in data units; without ``valid`` every epoch runs and the last weights are kept.
        config: see ``TrainConfig``.
        series: the training span, unscaled; scaler and closed form see nothing else.
        checkpoint_dir: where the state after each epoch is kept until the run ends well.
        resume: continue from that state, if there is one, to the same result as an uninterrupted run.
        on_epoch: hook called after each epoch with its metrics; may raise ``StopTraining`` or anything else.
        progress: draw a progress line when standard error is a terminal.
        start_from: part of a ``state_dict`` to begin at, over what the closed form found; it competes like that.

    Raises:
        ModelError: no window to train on, losses that are not finite, or a hook that stops before the last snapshot.
        ConfigError: resuming with other settings, unaligned windows for a model that couples rows, a schedule or
            patience that gives a model no snapshots, a loss that nothing minimises, settings without effect.
        BackendError: the accelerator is missing, or the checkpoint cannot be read.
        KeyboardInterrupt: after the state of the last whole epoch is safe on disk.
    """
    started = time.perf_counter()
    _refuse_idle(network)
    _check_windows(network, train, valid)
    if config.schedule == "plateau" and valid is None:
        raise ConfigError(
            "train.schedule=plateau follows the validation loss; give a validation span or another schedule"
        )
    check_snapshots(network.model, config)
    if resume and checkpoint_dir is None:
        raise ConfigError("resume=True needs checkpoint_dir, the folder of the interrupted run")
    network.fit_scaler(series)
    network.prepare(series)
    report = network.solve(series)
    reason = done_without_steps(network, report)
    if start_from is not None:
        _take(network, start_from, reason)
    if reason is not None:
        network.eval()
        _set_spread(network, report, train, config)
        metrics = evaluate_windows(network, valid if valid is not None else train, config.eval_batch_size)
        _tell(on_epoch, metrics)
        return TrainResult(
            epochs=0,
            history=({"epoch": 0.0, **metrics},),
            best_epoch=-1,
            metrics=metrics,
            solve=report,
            stopped_by=reason,
            seconds=time.perf_counter() - started,
            windows_per_second=0.0,
        )
    start = None
    before: dict[str, torch.Tensor] = {}
    has_start = report is not None or start_from is not None
    if has_start and valid is not None and not annealed_at(network):  # a start has not met a loss that is yet to rise
        start = evaluate_windows(network.eval(), valid, config.eval_batch_size)
        before = {name: value.clone() for name, value in network.state_dict().items()}
    checkpoint = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    from tsforge.training.descent import Descent  # Lightning takes seconds to load, and a closed form needs none

    run = Descent(network, train, valid, config, start=start, checkpoint=checkpoint, start_from=start_from)
    record, stopped_by = run.descend(resume=resume, on_epoch=on_epoch, progress=progress)
    if start is not None and valid is not None and record.best_epoch >= 0:
        _confirm(network, before, valid, config, record)
    metrics = record.best_metrics()
    if network.settles:
        network.settle((train if valid is None else valid).batches(config.eval_batch_size))
    if valid is not None and (network.settles or record.keep_last):
        metrics |= evaluate_windows(network, valid, config.eval_batch_size)
    if not network.capabilities.probabilistic:
        _set_spread(network, None, train, config)
    speed = record.windows_seen / record.train_seconds if record.train_seconds else 0.0
    log_event(
        LOGGER, "trained", epochs=len(record.history), best_epoch=record.best_epoch, windows_per_second=round(speed)
    )
    return TrainResult(
        epochs=len(record.history),
        history=tuple(record.history),
        best_epoch=record.best_epoch,
        metrics=metrics,
        solve=report,
        stopped_by=stopped_by,
        seconds=time.perf_counter() - started,
        windows_per_second=speed,
    )


def _confirm(
    network: ForecastNetwork,
    before: dict[str, torch.Tensor],
    valid: Windows,
    config: TrainConfig,
    record: EpochRecord,
) -> None:
    """Go back to the start (closed form, or weights given) unless training has clearly improved on it."""
    if config.start_margin == 0 and not record.keep_last:
        return  # the best epoch was better than the start, which is all that is asked
    found = compare(network, before, valid, config.eval_batch_size)
    kept = not (found.is_clear(config.start_margin) if config.start_margin else found.gain > 0)
    if kept:
        network.load_state_dict(before)
        record.best_epoch = -1
    log_event(
        LOGGER,
        "kept the start" if kept else "improved on the start",
        gain=round(found.gain, 6),
        standard_error=round(found.error, 6),
        blocks=found.blocks,
    )
    if kept and config.start_margin and found.is_too_short:
        LOGGER.warning(
            "training lowered the validation loss by %.0f %% and was taken back all the same: the validation span "
            "holds %d stretch(es) of %d rows, too few to tell that from luck; what only training learns (covariates, "
            "what is not linear) has no effect in this artifact; give a longer validation span, or "
            "train.start_margin=0",
            100.0 * found.gain / abs(found.before),
            found.blocks,
            network.spec.horizon,
        )


def _take(network: ForecastNetwork, weights: Mapping[str, torch.Tensor], reason: str | None) -> None:
    """Put weights to begin at into the network; refuse them where no training follows."""
    if reason is not None:
        raise ConfigError(
            f"weights to start from have no effect: model '{network.config.model.name}' takes no gradient steps "
            f"({reason})"
        )
    try:
        unknown = network.load_state_dict(dict(weights), strict=False).unexpected_keys
    except RuntimeError as error:
        raise ModelError(f"weights to start from do not fit the model: {' '.join(str(error).split())}") from error
    if unknown:
        raise ModelError(f"weights to start from do not fit the model: it has no {', '.join(unknown)}")


def _refuse_idle(network: ForecastNetwork) -> None:
    """Refuse settings that would have no effect; here and not where they are read, so that stored fits still load."""
    likelihood, scaling = network.config.likelihood, network.config.scaling
    point = likelihood if isinstance(likelihood, Point) else Point()
    if point.loss != "huber" and point.huber_delta != Point().huber_delta:
        raise ConfigError(
            f"likelihood.huber_delta has no effect with likelihood.loss={point.loss}; leave it out, or set "
            "likelihood.loss=huber"
        )
    if scaling.robust and scaling.kind in ("none", "series_max"):
        raise ConfigError(f"scaling.robust has no effect with scaling.kind={scaling.kind}; leave it out")


def _check_windows(network: ForecastNetwork, train: Windows, valid: Windows | None) -> None:
    for name, windows in (("training", train), ("validation", valid)):
        if windows is None:
            continue
        if len(windows) == 0:
            spec = network.spec
            raise ModelError(
                f"the {name} span holds no window of {spec.context_length} + {spec.horizon} steps; shorten "
                "context_length or horizon, widen the span, or lower min_observed"
            )
        if network.capabilities.rows_coupled and windows.rows_per_item != windows.panel.num_series:
            raise ConfigError(
                f"model '{network.config.model.name}' couples the rows of a batch; build its {name} windows aligned"
            )


def done_without_steps(network: ForecastNetwork, report: SolveReport | None) -> str | None:
    """Return why a fit takes no gradient steps (``solved``, ``untrainable``), None where it takes some.

    Raises:
        ConfigError: it takes none, and a loss was asked for that only they minimise.
    """
    trains = network.capabilities.trainable and any(parameter.requires_grad for parameter in network.parameters())
    reason = "solved" if report is not None and report.finished else None if trains else "untrainable"
    likelihood = network.config.likelihood
    if reason is not None and isinstance(likelihood, Point) and likelihood.loss != "mse":
        what = "a loss of logarithms" if network.likelihood.in_data_units else f"likelihood.loss={likelihood.loss}"
        raise ConfigError(
            f"{what} has no effect: model '{network.config.model.name}' takes no gradient steps ({reason}); leave "
            "likelihood.loss out, or choose a model or solver that is trained, such as model.solver=sgd of linear and "
            "ar_net (whose model.solver=irls has a model.loss of its own)"
        )
    return reason


def _set_spread(network: ForecastNetwork, report: SolveReport | None, train: Windows, config: TrainConfig) -> None:
    """Give a model that forecasts only locations the spread of its training residuals."""
    if network.spec.num_params > 1 and (report is None or report.residual_scale is None):
        network.fit_residual_scale(train.batches(config.eval_batch_size))


def _tell(on_epoch: OnEpoch | None, metrics: dict[str, float]) -> None:
    if on_epoch is not None:
        try:
            on_epoch(0, dict(metrics))
        except StopTraining:
            return


def evaluate_windows(network: ForecastNetwork, windows: Windows, batch_size: int) -> dict[str, float]:
    """Return ``valid_loss``, ``valid_nll``, ``valid_mse``, ``valid_mae`` over all windows (scaled units)."""
    sums: dict[str, torch.Tensor] = {}
    for batch in windows.batches(batch_size):
        parts = network.evaluate(batch)
        cells = parts.pop("cells")
        for name, value in {**{key: value * cells for key, value in parts.items()}, "cells": cells}.items():
            sums[name] = sums[name] + value if name in sums else value
    return mean_metrics(sums)
