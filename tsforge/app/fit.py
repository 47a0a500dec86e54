"""Fit: a stored data set and a config become a tracked run and an artifact.

Spans in time order: *train* (weights, scaler), *valid* (early stopping, then conformal calibration), *test* (graded,
never used). A closed-form fit needs no early stopping, so its whole valid span calibrates; otherwise the first half of
it stops the training and the second half calibrates.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, field_validator

from tsforge.app.ingest import load_dataset, mask_invalid
from tsforge.artifact import Artifact, collect_provenance, create_artifact, save_artifact
from tsforge.contracts.model import ModelConfig
from tsforge.contracts.tensors import DataSpec, TrainingSeries
from tsforge.core.config import Config, fingerprint
from tsforge.core.errors import DataError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.core.workspace import Workspace
from tsforge.data.config import DataConfig
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.splits import SplitConfig, Splits, make_splits
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.conformal import DEFAULT_LEVELS, calibrate
from tsforge.forecasting.predict import predict
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.layers.likelihoods import LikelihoodConfig, Point
from tsforge.layers.scaling import ScalingConfig
from tsforge.metrics.point import ErrorSums
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network, resolve_model_config
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.figures import forecast_figure
from tsforge.tracking.registry import register
from tsforge.tracking.runs import Run, Tracker
from tsforge.training.config import TrainConfig
from tsforge.training.loop import TrainResult, fit_network

_LOG = get_logger(__name__)
_COVARIATES = ("past", "known", "static")


class WindowConfig(Config):
    """What one training example is."""

    context_length: int = Field(168, ge=1)
    """Past steps the model sees."""
    horizon: int = Field(24, ge=1)
    """Steps it forecasts."""
    stride: int = Field(1, ge=1)
    """Distance between the cutoffs of neighbouring training windows."""
    min_observed: float = Field(0.5, ge=0, le=1)
    """Share of target cells that must be observed for a window to count."""


class CalibrationConfig(Config):
    """Split-conformal intervals, fitted on the valid span and stored with the artifact."""

    enabled: bool = True
    quantile_levels: tuple[float, ...] = DEFAULT_LEVELS
    """Levels of every forecast of the artifact; each low level needs its mirror image."""


class FitConfig(Config):
    """Everything that decides a fit."""

    data: DataConfig
    model: SerializeAsAny[ModelConfig]
    window: WindowConfig = WindowConfig()
    split: SplitConfig = SplitConfig()
    likelihood: LikelihoodConfig = Point()
    scaling: ScalingConfig = ScalingConfig()
    train: TrainConfig = TrainConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    covariates: Literal["usable", "all"] = "usable"
    """``usable`` leaves out, with a warning, the kinds of covariates that the model cannot take; ``all`` refuses."""
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _resolve_model(cls, value: Any) -> ModelConfig:
        return resolve_model_config(value)

    @property
    def network(self) -> NetworkConfig:
        """The part that the network is built from."""
        return NetworkConfig(model=self.model, likelihood=self.likelihood, scaling=self.scaling)

    @property
    def window_spec(self) -> WindowSpec:
        """The windows of training and prediction."""
        return WindowSpec(**self.window.model_dump())


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A finished fit.

    Attributes:
        artifact: saved below ``workspace.artifacts``.
        training: epochs, curves, speed, or the closed-form report.
        metrics: ``valid_*`` and ``test_*`` errors in data units and standardised units.
        run_id: tracking run, None when tracking is off.
        version: registered model version, None when nothing was registered.
    """

    artifact: Artifact
    training: TrainResult
    metrics: dict[str, float]
    run_id: str | None
    version: str | None

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        return {
            "artifact": self.artifact.id,
            "path": str(self.artifact.path),
            "epochs": self.training.epochs,
            "seconds": round(self.training.seconds, 2),
            **self.metrics,
            "run": self.run_id,
            "version": self.version,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return no table: the curves are in the tracking store."""
        return []


@dataclass(frozen=True, kw_only=True)
class _Spans:
    """Windows of each part; ``stop`` and ``calibration`` are the halves of ``valid``. None = no rows, or too few."""

    train: WindowDataset
    valid: WindowDataset | None
    stop: WindowDataset | None
    calibration: WindowDataset | None
    test: WindowDataset | None


def _make_spans(panel: Panel, config: FitConfig, splits: Splits, *, aligned: bool) -> _Spans:
    spec = config.window_spec
    dense = replace(spec, stride=1)

    def part(span: tuple[int, int], name: str) -> WindowDataset | None:
        if span[1] <= span[0]:
            return None
        try:
            return WindowDataset(panel, dense, *span, aligned=aligned)
        except DataError as error:
            raise DataError(f"the {name} span: {error}") from error

    first, last = splits.valid
    middle = first + (last - first) // 2
    halves = last - first >= 2 * spec.horizon
    return _Spans(
        train=WindowDataset(panel, spec, *splits.train, aligned=aligned),
        valid=part(splits.valid, "valid"),
        stop=part((first, middle) if halves else splits.valid, "valid"),
        calibration=part((middle, last), "valid") if halves else None,
        test=part(splits.test, "test"),
    )


def _usable(frame: SeriesFrame, model: str) -> SeriesFrame:
    """Return the frame without the kinds of covariates that the model cannot take; each is named once."""
    can = MODELS.get(model).capabilities
    schema = frame.schema
    kept = {kind: getattr(schema, kind) if getattr(can, f"{kind}_covariates") else () for kind in _COVARIATES}
    left_out = [name for kind in _COVARIATES for name in getattr(schema, kind) if name not in kept[kind]]
    if not left_out:
        return frame
    _LOG.warning("model '%s' cannot take the covariate(s) %s; fitted without them", model, listing(left_out, 10))
    return frame.with_covariates(**kept)


def _data_spec(panel: Panel, config: FitConfig, splits: Splits) -> DataSpec:
    schema = panel.schema
    return DataSpec(
        context_length=config.window.context_length,
        horizon=config.window.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        num_past=len(schema.past),
        num_static=len(schema.static),
        train_length=splits.train[1] - splits.train[0],
    )


def _span_times(panel: Panel, span: list[int]) -> list[str] | None:
    """Return first and last time of a span of rows as text, None when it is empty."""
    if span[1] <= span[0]:
        return None
    return [str(panel.grid.time_at(row)) for row in (span[0], span[1] - 1)]


def _grade(network: ForecastNetwork, spans: _Spans, series: TrainingSeries) -> dict[str, float]:
    """Return errors on the valid and test windows, in standard deviations of each variate over the training span.

    The unit is the same for every model, scaling and likelihood, so that fits can be compared and tuned.
    """
    unit = training_unit(series)
    metrics: dict[str, float] = {}
    for name, windows in (("valid", spans.valid), ("test", spans.test)):
        if windows is None:
            continue
        sums = ErrorSums(network.spec.horizon, network.spec.num_variates)
        for batch in forecast_batches(network, windows):
            if batch.target is None:
                raise DataError(f"the {name} windows have no target")
            sums.add(batch.target / unit, batch.mean / unit, batch.mask)
        metrics[f"{name}_mse"] = float(sums.mse().value)
        metrics[f"{name}_mae"] = float(sums.mae().value)
    return metrics


def training_unit(series: TrainingSeries) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the standard deviation [V] of the observed training values of each variate, 1 for a constant one."""
    values, mask = series.values.numpy(), series.mask.numpy()
    count = np.maximum(mask.sum(axis=0), 1)
    mean = np.where(mask, values, 0.0).sum(axis=0) / count
    deviation = np.sqrt(np.where(mask, (values - mean) ** 2, 0.0).sum(axis=0) / count)
    return np.asarray(np.where(deviation > 0, deviation, 1.0), dtype=np.float64)


def fit_frame(
    frame: SeriesFrame,
    config: FitConfig,
    *,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = False,
) -> tuple[Artifact, TrainResult]:
    """Fit on ``frame`` and return the unsaved artifact and the training's record; nothing is tracked or stored.

    Args:
        frame: the data, ending where knowledge ends; the parts follow from ``config.split``.
        config: everything that decides the fit.
        checkpoint_dir, resume: where an interrupted training goes on from.
        on_epoch: called after each epoch with its number and metrics.
        progress: show a bar.

    Raises:
        DataError: too few rows for one window in a part (the message says how many are needed).
        ConfigError, ModelError: model and data do not fit each other, or the training failed.
    """
    seed = config.train.seed
    seed_everything(seed)
    if config.covariates == "usable":
        frame = _usable(frame, config.model.name)
    panel = Panel.from_frame(frame)
    splits = make_splits(panel, config.split)
    network = build_network(config.network, _data_spec(panel, config, splits), seed=derive_seed(seed, "weights"))
    series = panel.training_series(None, splits.train[1])
    spans = _make_spans(panel, config, splits, aligned=network.capabilities.rows_coupled)
    training = fit_network(
        network,
        spans.train,
        spans.stop,
        config.train,
        series=series,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        on_epoch=on_epoch,
        progress=progress,
    )
    calibration = spans.valid if training.epochs == 0 else spans.calibration
    table = None
    if config.calibration.enabled and calibration is not None:
        table = calibrate(network, calibration, config.calibration.quantile_levels)
    metrics = _grade(network, spans, series)
    artifact = create_artifact(
        network,
        config=config.model_dump(mode="json"),
        schema=frame.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=config.window_spec,
        calibration=table,
        metrics=metrics,
        provenance={
            **collect_provenance(data_fingerprint=frame.fingerprint(), seeds={"train": seed}),
            "dataset": config.data.name,
            "spans": {name: _span_times(panel, span) for name, span in splits.to_dict().items()},
            "span_rows": splits.to_dict(),
            "training": {
                "epochs": training.epochs,
                "best_epoch": training.best_epoch,
                "stopped_by": training.stopped_by,
                "seconds": round(training.seconds, 3),
                "windows_per_second": round(training.windows_per_second, 1),
            },
        },
    )
    return artifact, training


def fit(
    config: FitConfig,
    workspace: Workspace,
    *,
    progress: bool = False,
    resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    parent: Run | None = None,
) -> FitResult:
    """Fit on a stored data set, track the run, save the artifact and register it if asked.

    Args:
        config: everything that decides the fit.
        workspace: where data, artifacts and runs live.
        progress: show a bar.
        resume: go on with the interrupted training of the same config; without one it is a fresh fit.
        on_epoch: called after each epoch, besides tracking.
        parent: the run this fit is a part of.

    Raises:
        DataError: the data set is not in the store, or too short.
        ConfigError, ModelError, BackendError: see ``fit_frame`` and the tracker.
    """
    frame = mask_invalid(load_dataset(workspace, config.data), config.data)
    checkpoint_dir = workspace.checkpoints / fingerprint(config)
    name = f"{config.model.name} on {config.data.name}"
    tags = {"tsforge.model": config.model.name, "tsforge.dataset": config.data.name}
    with Tracker.open(workspace, config.tracking).start(name, config=config, tags=tags, parent=parent) as run:
        run.log_data(config.data.name, frame.fingerprint(), profile={"rows": frame.num_rows})

        def after_epoch(epoch: int, metrics: dict[str, float]) -> None:
            run.log_epoch(epoch, metrics)
            if on_epoch is not None:
                on_epoch(epoch, metrics)

        artifact, training = fit_frame(
            frame, config, checkpoint_dir=checkpoint_dir, resume=resume, on_epoch=after_epoch, progress=progress
        )
        artifact = save_artifact(artifact, workspace.artifacts)
        # names of their own: the curves of the epochs carry the plain ones, in scaled units
        run.log_metrics({f"final_{key}": value for key, value in artifact.metrics.items() if np.isfinite(value)})
        run.log_artifact(artifact)
        _log_plot(run, artifact, frame)
        version = None
        if config.tracking.enabled and config.tracking.register_as is not None:
            version = register(artifact, config.tracking.register_as, config.tracking.alias, workspace, run=run)
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    log_event(_LOG, "fitted", model=config.model.name, dataset=config.data.name, artifact=artifact.id)
    return FitResult(
        artifact=artifact, training=training, metrics=dict(artifact.metrics), run_id=run.id, version=version
    )


def _log_plot(run: Run, artifact: Artifact, frame: SeriesFrame) -> None:
    """Record what the artifact says one horizon before the end of the data, beside what came."""
    if run.id is None:
        return
    last = Panel.from_frame(frame).span()[1] - 1
    try:
        forecast = predict(artifact, frame, cutoff=frame.grid.time_at(last - artifact.window.horizon))
    except TsforgeError as error:  # a series may be too short there; the fit itself is fine
        _LOG.warning("no forecast plot for the run: %s", error)
        return
    run.log_figure("plots/forecast.png", forecast_figure(frame.table, forecast))
