"""Predict: a fitted artifact and the stored data become a forecast table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
from pydantic import Field, model_validator

from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import dataset_hierarchy, load_dataset
from tsforge.artifact import load_artifact, newest_first
from tsforge.contracts.tables import Forecast
from tsforge.core.config import Config, QuantileLevel, Seed
from tsforge.core.errors import ArtifactError, ConfigError, DataError, listing
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.coherent_predict import predict_coherent
from tsforge.forecasting.cold_start import ColdStartConfig, predict_cold
from tsforge.forecasting.predict import predict as predict_frame
from tsforge.forecasting.reconcile import ReconcileConfig
from tsforge.forecasting.sample_paths import Aggregate, predict_paths
from tsforge.tracking.registry import resolve

LATEST = "latest"
AGGREGATED_PATHS = 2000


class PredictConfig(Config):
    """What to forecast with, and from when."""

    artifact: str = LATEST
    """An artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``: the newest artifact of the workspace."""
    dataset: str | None = None
    """Stored data set; default the one the artifact was fitted on."""
    series: tuple[str, ...] | None = Field(None, min_length=1)
    """Only these series; default all. Where series are forecast together (a reconciliation, a model that attends to all
    of them, ``cold_start``) the others still take part. Of new series all are forecast unless some are named."""
    cutoff: str | int | None = None
    """Last time that may be seen; default the last observed row of each series. Where publications are kept, values are
    those of that moment."""
    horizon: int | None = Field(None, ge=1)
    """Steps; default the trained horizon."""
    rollout: bool = False
    """Allow more steps than trained, by repeating the forecast on its own means (no quantiles there)."""
    quantile_levels: tuple[QuantileLevel, ...] | None = None
    """Default: every level the artifact offers."""
    paths: int | None = Field(None, ge=1)
    """Sample paths a series, jointly drawn over the horizon, instead of the table of quantiles."""
    aggregate: Aggregate | None = None
    """Quantiles of the sum, mean, max or min over the horizon instead; from ``paths`` paths, default 2000."""
    seed: Seed = 0
    """Of the paths."""
    cold_start: ColdStartConfig | None = None
    """Also forecast series that are shorter than the context (``cold_start=pad``), and new ones without a row
    (``cold_start.like.NEW=OLD``); without it they are errors."""
    reconcile: ReconcileConfig | None = None
    """Make the forecasts of the data set's hierarchy add up (``reconcile=mint``); all start from one cutoff, default
    the last row at which any series is observed."""

    @model_validator(mode="after")
    def _used(self) -> PredictConfig:
        drawn = self.paths is not None or self.aggregate is not None
        if drawn and self.rollout:
            raise ValueError("rollout=true gives no quantiles beyond the trained horizon, so no paths or aggregates")
        if self.cold_start is not None and (drawn or self.rollout or self.reconcile is not None):
            raise ValueError(
                "cold_start gives a table of the trained horizon: no paths, aggregate, rollout or reconcile"
            )
        if self.reconcile is not None and (drawn or self.rollout):
            raise ValueError("reconcile gives a table of the trained horizon: no paths, no aggregate, no rollout")
        if self.seed and not drawn:
            raise ValueError("seed has no effect without paths or aggregate")
        return self


def predict(config: PredictConfig, workspace: Workspace) -> Forecast:
    """Return the forecast of the stored series from the end of the data or from ``config.cutoff``.

    ``Forecast.answer`` is the table asked for: quantiles, sample paths, or aggregates over the horizon.

    Raises:
        ArtifactError: no such artifact, or one that does not fit the data.
        DataError: no such data set or series, or too short a history.
        ConfigError, ModelError: levels, steps or paths the artifact does not offer.
    """
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    steps = max(config.horizon or 0, artifact.window.horizon)
    new = [] if config.cold_start is None else list(config.cold_start.like)  # defined by the command, not stored
    # what depends on the other series (of a cold start the intervals) is made of all of them
    is_asked = config.reconcile is not None or config.cold_start is not None
    joint = is_asked or artifact.network.capabilities.rows_coupled
    chosen = None if joint else config.series
    fitted = FittedData.of(artifact, dataset)
    frame = load_dataset(workspace, fitted, series=chosen, cutoff=config.cutoff, masked=True, extend=steps)
    if config.paths is not None or config.aggregate is not None:
        forecast = predict_paths(
            artifact,
            frame,
            config.paths or AGGREGATED_PATHS,
            seed=config.seed,
            aggregate=config.aggregate,
            quantile_levels=config.quantile_levels,
            cutoff=config.cutoff,
            horizon=config.horizon,
        )
    elif config.cold_start is not None:
        forecast = predict_cold(
            artifact,
            frame,
            config.cold_start,
            quantile_levels=config.quantile_levels,
            cutoff=config.cutoff,
            horizon=config.horizon,
        )
    elif config.reconcile is not None:
        forecast = predict_coherent(
            artifact,
            frame,
            dataset_hierarchy(workspace, dataset),
            config.reconcile,
            quantile_levels=config.quantile_levels,
            cutoff=config.cutoff,
            horizon=config.horizon,
        )
    else:
        forecast = predict_frame(
            artifact,
            frame,
            quantile_levels=config.quantile_levels,
            cutoff=config.cutoff,
            horizon=config.horizon,
            rollout=config.rollout,
        )
    if joint and config.series is not None:
        forecast = _only(forecast, frame, config.series, new)
    return replace(
        forecast, metadata={**forecast.metadata, "dataset": dataset, "data_fingerprint": frame.fingerprint()}
    )


def _only(forecast: Forecast, frame: SeriesFrame, names: Sequence[str], new: Sequence[str]) -> Forecast:
    """Return the rows of some series of a joint forecast; of the new ones all, unless some are named."""
    if stored := [name for name in names if name not in new]:
        frame.select_series(stored)  # refuses what it does not know
    names = names if set(names) & set(new) else [*names, *new]
    wanted = pl.col("series_id").is_in(names)
    absent = sorted(set(names) - set(forecast.answer["series_id"]))
    if absent and "cold_start" in forecast.metadata:
        raise DataError(f"no forecast of {listing(absent)}: they begin after the cutoff; give a later one")
    if absent:
        raise DataError(
            f"no forecast of {listing(absent)}: all series are forecast from one cutoff, and nothing of these is "
            "observed in the context before it; give an earlier cutoff"
        )
    return replace(
        forecast,
        table=forecast.table.filter(wanted),
        paths=None if forecast.paths is None else forecast.paths.filter(wanted),
        aggregates=None if forecast.aggregates is None else forecast.aggregates.filter(wanted),
    )


def find_artifact(reference: str, workspace: Workspace) -> Path:
    """Return the folder of an artifact; ``latest`` is the one of this workspace that was fitted last.

    Raises:
        ArtifactError: there is none; BackendError: the registry does not answer.
    """
    if reference != LATEST:
        return resolve(reference, workspace)
    made = newest_first(workspace.artifacts)
    if not made:
        raise ArtifactError(f"no artifact in {workspace.artifacts} yet; run tsforge fit first")
    return made[0]
