"""Fit: a stored data set and a config become a tracked run and an artifact.

Spans in time order: *train* (weights, scaler), *valid* (early stopping, then conformal calibration), *test* (graded,
never used). A closed-form fit needs no early stopping, so its whole valid span calibrates; otherwise the first half of
it stops the training and the second half calibrates, or all of it does both where it is shorter than two horizons.

Beside the spans in time, whole series can be held out (``entities``): no weight, scaling statistic, closed form,
residual spread or calibration rests on them. They are graded in all three spans, and ``entities.watch`` may let their
loss stop the training. The spans are those of all series; intervals are calibrated on the series of the fit, so their
coverage for others is measured (``test_unseen_*``, a backtest), not promised. The same division of errors into seen and
unseen entities in training, validation and test time: Spadon et al. (2022), IEEE TPAMI 44(9):5368-5384.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from tsforge.app.auto import AUTO, RaceData, race
from tsforge.app.auto_candidates import check_readers
from tsforge.app.fit_checks import check_held_out, check_settings
from tsforge.app.fit_errors import FloatArray, error_unit, held_out_errors
from tsforge.app.fit_spans import Spans, choosing_span, make_spans, span_times
from tsforge.app.fit_warnings import warn_of_rows, warn_of_shared_rows
from tsforge.app.graph_log import NAME as GRAPH_TABLE
from tsforge.app.graph_log import GraphLog
from tsforge.app.ingest import load_history
from tsforge.app.warm_start import WarmStartConfig, check_blind, earlier_fit, starting_weights
from tsforge.artifact import Artifact, collect_provenance, create_artifact, save_artifact
from tsforge.contracts.model import ModelConfig
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import Config, QuantileLevel, fingerprint
from tsforge.core.errors import ConfigError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.core.workspace import Workspace
from tsforge.data.config import DataConfig
from tsforge.data.entities import EntityConfig, choose_held_out
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Bools
from tsforge.data.panel import Panel
from tsforge.data.splits import SplitConfig, Splits, make_splits
from tsforge.data.vintage_panel import panel_of
from tsforge.data.vintages import History, VintageFrame, newest, seen_from
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.conformal import Pool
from tsforge.forecasting.conformal_buckets import BucketKind
from tsforge.forecasting.conformal_calibration import DEFAULT_LEVELS, Choices, Method, calibrate
from tsforge.forecasting.dependence import DependenceKind, estimate_dependence
from tsforge.forecasting.predict import predict
from tsforge.layers.likelihoods import LikelihoodConfig, Point
from tsforge.layers.scaling import ScalingConfig, is_diverse, scaling_for
from tsforge.models.auto import AutoConfig
from tsforge.models.registry import MODELS, resolve_model_config
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.figures import forecast_figure
from tsforge.tracking.registry import register
from tsforge.tracking.runs import Run, Tracker
from tsforge.training.config import TrainConfig
from tsforge.training.loop import CHECKPOINT, TrainResult, fit_network

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
    quantile_levels: tuple[QuantileLevel, ...] = DEFAULT_LEVELS
    """Levels of every forecast of the artifact; each low level needs its mirror image."""
    dependence: DependenceKind = "gaussian"
    """How errors over a horizon hang together, for sample paths and totals; estimated on the same windows."""
    method: Method = "auto"
    """What a margin is added to, and its unit: ``auto`` is ``cqr`` for a distribution and for points ``recent``, where
    it can be had, else ``absolute``; ``cqr_asymmetric`` gives each side its own margin, ``scaled`` stretches the
    network's own spread (points: that of the context), ``recent`` the errors of forecasts from shortly before."""
    pool: Pool = "auto"
    """``step``: margins of their own for every step ahead; ``horizon``: one over all steps, where windows are few;
    ``auto``: the first, and the second where a step has too few windows for a coverage."""
    bucket: BucketKind = "none"
    """A label known at the cutoff that gets margins of its own."""
    half_life: float | None = Field(None, gt=0)
    """Rows after which a held-out window counts half; None counts all alike."""

    @model_validator(mode="after")
    def _has_effect(self) -> CalibrationConfig:
        usual: dict[str, tuple[Any, ...]] = {name: (field.default,) for name, field in type(self).model_fields.items()}
        usual["pool"] = ("auto", "step")  # the second was the default once, and stands in stored configs
        for name in ("quantile_levels", "method", "pool", "bucket", "half_life"):  # dependence is estimated without
            if not self.enabled and getattr(self, name) not in usual[name]:
                raise ValueError(f"{name} has no effect with enabled=false; leave it out")
        return self

    @property
    def choices(self) -> Choices:
        """How scores become margins."""
        return Choices(method=self.method, pool=self.pool, bucket=self.bucket, half_life=self.half_life)


class FitConfig(Config):
    """Everything that decides a fit."""

    data: DataConfig
    model: SerializeAsAny[ModelConfig]
    window: WindowConfig = WindowConfig()
    split: SplitConfig = SplitConfig()
    entities: EntityConfig = EntityConfig()
    likelihood: LikelihoodConfig = Point()
    scaling: ScalingConfig = ScalingConfig()
    train: TrainConfig = TrainConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    covariates: Literal["usable", "all"] = "usable"
    """``usable`` leaves out, with a warning, the kinds of covariates that the model cannot take; ``all`` refuses."""
    warm_start: WarmStartConfig = WarmStartConfig()
    log_graphs: int = Field(0, ge=0)
    """Keep the graphs of a model that learns some after every so many epochs, in the artifact; 0 = only the last."""
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _resolve_model(cls, value: Any) -> ModelConfig:
        return resolve_model_config(value)

    @model_validator(mode="after")
    def _scaling_has_effect(self) -> FitConfig:
        if self.scaling.robust and self.scaling.kind == "none":
            raise ValueError("scaling.robust has no effect with scaling.kind=none; leave it out")
        return self

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
        metrics: ``valid_mse, valid_mae, test_mse, test_mae``; with held-out series also ``train_*`` and, of those,
            ``*_unseen_mse`` and ``*_unseen_mae`` for each of the three. In standard deviations of the training span,
            each series of a diverse panel in its own.
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
        """Return the leaderboard of ``model=auto``, else no table: the curves are in the tracking store."""
        records: list[dict[str, Any]] = self.artifact.explanation.get("race", [])
        return records


def settled(network: NetworkConfig, *, diverse: bool) -> NetworkConfig:
    """Return the settings of a network with what ``scaling.kind=auto`` means for a panel."""
    if isinstance(network.model, AutoConfig):
        return network
    can = MODELS.get(network.model.name).capabilities_of(network.model)
    return network.model_copy(update={"scaling": scaling_for(network.scaling, can, diverse=diverse)})


def _spans_of(panel: Panel, config: FitConfig, splits: Splits, held_out: Bools, network: ForecastNetwork) -> Spans:
    aligned = network.capabilities.rows_coupled
    return make_spans(panel, config.window_spec, config.entities.watch, splits, held_out, aligned=aligned)


def _fitted_rows(config: FitConfig, splits: Splits) -> tuple[int, int]:
    """Return the rows that weights rest on: the training span; with ``model=auto`` also what chose, if more is left."""
    chose = choosing_span(splits, config.window.horizon)
    whole = isinstance(config.model, AutoConfig) and config.model.refit == "all" and chose[1] < splits.valid[1]
    return (splits.train[0], chose[1]) if whole else splits.train


def _margins(
    network: ForecastNetwork, learnt: WindowDataset, held_out: WindowDataset | None, config: CalibrationConfig
) -> pl.DataFrame | None:
    if not config.enabled or held_out is None:
        return None
    return calibrate(network, held_out, config.quantile_levels, choices=config.choices, learnt=learnt)


def _race(
    panel: Panel, config: FitConfig, splits: Splits, unit: FloatArray, *, held_out: Bools, progress: bool
) -> tuple[ForecastNetwork, TrainResult]:
    """Choose among all models; what calibrates is not looked at."""
    select = choosing_span(splits, config.window.horizon)
    data = RaceData(
        final_stop=_fitted_rows(config, splits)[1],
        panel=panel,
        train=splits.train,
        select=select if select[1] - select[0] >= config.window.horizon else None,
        window=config.window_spec,
        network=config.network,
        training=config.train,
        unit=unit,
        diverse=unit.ndim == 2,
        only=~held_out if held_out.any() else None,
    )
    if config.covariates == "all":
        check_readers(data)
    return race(data, progress=progress)


def _start(
    network: ForecastNetwork,
    config: FitConfig,
    earlier: Artifact | None,
    panel: Panel,
    held_out: tuple[str, ...],
) -> dict[str, torch.Tensor] | None:
    """Return the weights that training begins at, None for fresh ones."""
    if earlier is None:
        if config.warm_start.artifact is not None:
            raise ConfigError(
                f"warm_start.artifact={config.warm_start.artifact} works with tsforge fit and retrain only: "
                "elsewhere it would know rows that are forecast; leave it out"
            )
        return None
    check_blind(earlier, panel, make_splits(panel, config.split).train[1], held_out, config.data)
    return starting_weights(network, earlier, config.warm_start.dropout, seed=config.train.seed)


def _graph_log(
    network: ForecastNetwork, config: FitConfig, checkpoint_dir: Path | None, *, resume: bool
) -> GraphLog | None:
    """Return what keeps the graphs of a training, None where nobody asked."""
    if not config.log_graphs:
        return None
    epochs = config.train.max_epochs
    return GraphLog(network, every=config.log_graphs, epochs=epochs, folder=checkpoint_dir, resume=resume)


def _kept(frame: SeriesFrame, takes: Mapping[str, bool]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return by kind the covariates that are taken, all or none, and the names of the others in words."""
    schema = frame.schema
    kept: dict[str, tuple[str, ...]] = {kind: getattr(schema, kind) if takes[kind] else () for kind in _COVARIATES}
    return kept, listing([name for kind in _COVARIATES for name in getattr(schema, kind) if name not in kept[kind]], 10)


def _usable(frame: SeriesFrame, config: FitConfig) -> SeriesFrame:
    """Return the frame without the kinds of covariates that the model cannot take, if it may be; each is named once."""
    if config.covariates == "all":
        return frame
    model = config.model
    can = MODELS.get(model.name).capabilities_of(model)
    kept, left_out = _kept(frame, {kind: getattr(can, f"{kind}_covariates") for kind in _COVARIATES})
    if not left_out:
        return frame
    _LOG.warning("model '%s' cannot take the covariate(s) %s; fitted without them", model.name, left_out)
    return frame.with_covariates(**kept)


def _read_by(network: ForecastNetwork, frame: SeriesFrame, config: FitConfig) -> SeriesFrame:
    """Return the frame without the kinds of covariates that no chosen member reads: else a forecast would demand them.

    Raises:
        ConfigError: there are some, and ``config.covariates`` is ``all``.
    """
    kept, left_out = _kept(frame, {kind: getattr(network.spec, f"num_{kind}") > 0 for kind in _COVARIATES})
    if not left_out:
        return frame
    told = f"no chosen member of model '{config.model.name}' takes the covariate(s) {left_out}"
    if config.covariates == "all":
        raise ConfigError(
            f"{told}, and covariates=all refuses a fit without them; name models that take them in model.candidates, "
            "or set covariates=usable"
        )
    _LOG.warning("%s; fitted without them", told)
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


def fit_frame(
    history: History,
    config: FitConfig,
    *,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = False,
    earlier: Artifact | None = None,
) -> tuple[Artifact, TrainResult]:
    """Fit on data and return the unsaved artifact and the training's record; nothing is tracked or stored.

    Args:
        history: the data, ending where knowledge ends; the parts follow from ``config.split``. With all publications,
            each window of training and calibration sees what was out at its moment; closed forms, which see whole
            spans, and the targets get the last values.
        config: everything that decides the fit.
        checkpoint_dir, resume: where an interrupted training goes on from.
        on_epoch: called after each epoch with its number and metrics.
        progress: show a bar.
        earlier: what ``config.warm_start`` names.

    Raises:
        DataError: too few rows for one window in a part (the message says how many are needed), or no series to hold
            out or to fit on.
        ConfigError, ModelError: model and data do not fit each other, held-out series that the model or its scaling
            cannot forecast, weights to start from that do not fit or know too much, or the training failed.
    """
    check_settings(config)
    seed_everything(seed := config.train.seed)
    frame = _usable(newest(history), config)
    panel = panel_of(history, frame)
    splits, names = make_splits(panel, config.split), choose_held_out(config.entities, panel.series_ids)
    held_out = np.isin(panel.series_ids, names)
    series = panel.training_series(None, splits.train[1], ~held_out if names else None)
    warn_of_rows(panel, series)
    unit = error_unit(series, diverse=is_diverse(series))
    settings = settled(config.network, diverse=unit.ndim == 2)
    network = build_network(settings, _data_spec(panel, config, splits), seed=derive_seed(seed, "weights"))
    check_held_out(network, names)
    spans = _spans_of(panel, config, splits, held_out, network)
    raced, fitted_rows = config.model.name == AUTO, _fitted_rows(config, splits)
    log: GraphLog | None = None
    if raced:
        if resume:
            raise ConfigError("--resume has no effect with model=auto; run it again without")
        network, training = _race(panel, config, splits, unit, held_out=held_out, progress=progress)
        check_held_out(network, names)
        frame = _read_by(network, frame, config)
        if fitted_rows != splits.train:  # the other rows of the valid span are no longer held out
            spans = replace(spans, graded={**spans.graded, "valid": spans.calibration})
    else:
        start = _start(network, config, earlier, panel, names)
        log = _graph_log(network, config, checkpoint_dir, resume=resume)
        training = fit_network(
            network,
            spans.train,
            spans.watched,
            config.train,
            series=series,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            on_epoch=on_epoch if log is None else log.then(on_epoch),
            progress=progress,
            start_from=start,
        )
    if training.epochs == 0 and config.entities.watch != "seen_valid" and not raced:
        _LOG.warning(
            "entities.watch=%s has no effect: model '%s' took no gradient steps",
            config.entities.watch,
            config.model.name,
        )
    calibration = spans.graded["valid"] if training.epochs == 0 and not raced else spans.calibration
    if spans.is_shared and (training.epochs or raced) and config.calibration.enabled:
        warn_of_shared_rows(splits.valid[1] - splits.valid[0], config.window.horizon)
    table = _margins(network, spans.train, calibration, config.calibration)
    metrics, device = held_out_errors(network, spans.graded, unit), network.param_offset.device
    rows = replace(splits, train=fitted_rows, valid=(max(fitted_rows[1], splits.valid[0]), splits.valid[1])).to_dict()
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
            **_span_facts(history, frame, panel, rows),
            "entities": {"held_out": list(names), "watch": config.entities.watch},
            "training": _training_facts(training, earlier, config),
        },
    )
    if log is not None:
        graphs = log.table(artifact.id, panel.schema.targets, training.epochs)
        artifact = replace(artifact, tables={GRAPH_TABLE: graphs})
    return _with_dependence(artifact, calibration, config.calibration, device), training


def _span_facts(history: History, frame: SeriesFrame, panel: Panel, rows: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return what provenance says of the spans, and when the newest value came out that the fit was given of them."""
    times = {name: span_times(panel, span) for name, span in rows.items()}
    facts: dict[str, Any] = {"spans": times, "span_rows": rows}
    fitted = times["valid"] or times["train"]
    if isinstance(history, VintageFrame) and fitted:
        moment = history.newest_publication(fitted[-1], frame.series_ids, frame.schema.columns)
        facts |= {} if moment is None else {"published_until": str(moment)}
    return facts


def _training_facts(training: TrainResult, earlier: Artifact | None, config: FitConfig) -> dict[str, Any]:
    """Return what provenance says about a training."""
    start = {} if earlier is None else {"started_from": earlier.id, "start_dropout": config.warm_start.dropout}
    return {
        "epochs": training.epochs,
        "best_epoch": training.best_epoch,
        "stopped_by": training.stopped_by,
        "seconds": round(training.seconds, 3),
        "windows_per_second": round(training.windows_per_second, 1),
        **start,
    }


def _with_dependence(
    artifact: Artifact, windows: WindowDataset | None, config: CalibrationConfig, device: torch.device
) -> Artifact:
    """Return the artifact with what the calibration windows say about the errors of a horizon together."""
    distribution = artifact.calibration is not None or artifact.network.likelihood.has_distribution
    if windows is None or not distribution or config.dependence == "none":
        if "dependence" in config.model_fields_set and config.dependence != "none":
            why = "there is no validation span" if distribution else "the artifact gives points only"
            _LOG.warning("calibration.dependence=%s has no effect: %s", config.dependence, why)
        return artifact
    artifact.network.to(device)
    found = estimate_dependence(artifact, windows, config.dependence)
    artifact.network.cpu()
    return artifact if found is None else replace(artifact, dependence=found.tensors())


def fit(
    config: FitConfig,
    workspace: Workspace,
    *,
    progress: bool = False,
    resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    parent: Run | None = None,
    history: History | None = None,
) -> FitResult:
    """Fit on a stored data set, track the run, save the artifact and register it if asked.

    Args:
        config: everything that decides the fit.
        workspace: where data, artifacts and runs live.
        progress: show a bar.
        resume: go on with the interrupted training of the same config; without one it is a fresh fit.
        on_epoch: called after each epoch, besides tracking.
        parent: the run this fit is a part of.
        history: the data; default what the store holds.

    Raises:
        DataError: the data set is not in the store, or too short.
        ConfigError, ModelError, BackendError: see ``fit_frame`` and the tracker.
    """
    check_settings(config)  # before the data is read
    if history is None:
        history = load_history(workspace, config.data, masked=True)
    checkpoint_dir = workspace.checkpoints / fingerprint(config)
    if resume and config.model.name != AUTO and not (checkpoint_dir / CHECKPOINT).exists():
        _LOG.warning("--resume: there is no interrupted training of exactly these settings; starting afresh")
    name = f"{config.model.name} on {config.data.name}"
    tags = {"tsforge.model": config.model.name, "tsforge.dataset": config.data.name}
    with Tracker.open(workspace, config.tracking).start(name, config=config, tags=tags, parent=parent) as run:
        run.log_data(config.data.name, history.fingerprint(), profile={"rows": history.num_rows})

        def after_epoch(epoch: int, metrics: dict[str, float]) -> None:
            run.log_epoch(epoch, metrics)
            if on_epoch is not None:
                on_epoch(epoch, metrics)

        artifact, training = fit_frame(
            history,
            config,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            on_epoch=after_epoch,
            progress=progress,
            earlier=earlier_fit(config.warm_start, workspace),
        )
        artifact = save_artifact(artifact, workspace.artifacts)
        # names of their own: the curves of the epochs carry the plain ones, in scaled units
        run.log_metrics({f"final_{key}": value for key, value in artifact.metrics.items() if np.isfinite(value)})
        run.log_artifact(artifact)
        _log_plot(run, artifact, history)
        version = None
        if config.tracking.enabled and config.tracking.register_as is not None:
            version = register(artifact, config.tracking.register_as, config.tracking.alias, workspace, run=run)
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    log_event(_LOG, "fitted", model=config.model.name, dataset=config.data.name, artifact=artifact.id)
    return FitResult(
        artifact=artifact, training=training, metrics=dict(artifact.metrics), run_id=run.id, version=version
    )


def _log_plot(run: Run, artifact: Artifact, history: History) -> None:
    """Record what the artifact says one horizon before the end of the data, beside what came."""
    if run.id is None:
        return
    frame = newest(history)
    last = Panel.from_frame(frame).span()[1] - 1
    cutoff = frame.grid.time_at(last - artifact.window.horizon)
    try:
        forecast = predict(artifact, seen_from(history, cutoff), cutoff=cutoff)
    except TsforgeError as error:  # a series may be too short there; the fit itself is fine
        _LOG.warning("no forecast plot for the run: %s", error)
        return
    run.log_figure("plots/forecast.png", forecast_figure(frame.table, forecast))
