"""Predict: a fitted artifact and the stored data become a forecast table."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tsforge.app.ingest import load_dataset
from tsforge.artifact import MANIFEST, load_artifact
from tsforge.contracts.tables import Forecast
from tsforge.core.config import Config
from tsforge.core.errors import ArtifactError, ConfigError
from tsforge.core.workspace import Workspace
from tsforge.forecasting.predict import predict as predict_frame
from tsforge.tracking.registry import resolve

LATEST = "latest"


class PredictConfig(Config):
    """What to forecast with, and from when."""

    artifact: str = LATEST
    """An artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``: the newest artifact of the workspace."""
    dataset: str | None = None
    """Stored data set; default the one the artifact was fitted on."""
    series: tuple[str, ...] | None = None
    """Only these series; default all."""
    cutoff: str | int | None = None
    """Last time that may be seen; default the last observed row of each series."""
    horizon: int | None = Field(None, ge=1)
    """Steps; default the trained horizon."""
    rollout: bool = False
    """Allow more steps than trained, by repeating the forecast on its own means (no quantiles there)."""
    quantile_levels: tuple[float, ...] | None = None
    """Default: every level the artifact offers."""


def predict(config: PredictConfig, workspace: Workspace) -> Forecast:
    """Return the forecast of the stored series from the end of the data or from ``config.cutoff``.

    Raises:
        ArtifactError: no such artifact, or one that does not fit the data.
        DataError: no such data set or series, or too short a history.
        ConfigError, ModelError: levels or steps the artifact does not offer.
    """
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    steps = max(config.horizon or 0, artifact.window.horizon)
    frame = load_dataset(workspace, dataset, series=config.series, masked=True, extend=steps)
    forecast = predict_frame(
        artifact,
        frame,
        quantile_levels=config.quantile_levels,
        cutoff=config.cutoff,
        horizon=config.horizon,
        rollout=config.rollout,
    )
    metadata = {**forecast.metadata, "dataset": dataset, "data_fingerprint": frame.fingerprint()}
    return Forecast(table=forecast.table, quantile_levels=forecast.quantile_levels, metadata=metadata)


def find_artifact(reference: str, workspace: Workspace) -> Path:
    """Return the folder of an artifact; ``latest`` is the one made last in this workspace.

    Raises:
        ArtifactError: there is none; BackendError: the registry does not answer.
    """
    if reference != LATEST:
        return resolve(reference, workspace)
    made = [place.parent for place in workspace.artifacts.glob(f"*/{MANIFEST}")]
    if not made:
        raise ArtifactError(f"no artifact in {workspace.artifacts} yet; run tsforge fit first")
    return max(made, key=lambda path: path.name.rsplit("-", 2)[-2:])  # ids end in UTC time and hash
