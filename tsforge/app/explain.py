"""Explain: why a stored model forecasts what it does, and which inputs it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl
from pydantic import Field

from tsforge.app.fitted_data import FittedData
from tsforge.app.forecast import LATEST, find_artifact
from tsforge.app.ingest import load_dataset
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.attribution import Attribution, AttributionConfig, attribute
from tsforge.forecasting.importance import EVERY, ImportanceConfig, permutation_importance

__all__ = ["Attribution", "ExplainConfig", "Importance", "explain"]

_LOG = get_logger(__name__)


class ExplainConfig(Config):
    """What to explain."""

    artifact: str = LATEST
    """An artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``: the newest artifact of the workspace."""
    dataset: str | None = None
    """Stored data set; default the one the artifact was fitted on."""
    what: Literal["forecast", "importance"] = "forecast"
    """``forecast`` divides one forecast among its inputs; ``importance`` exchanges inputs over past windows."""
    series: str | None = None
    """Whose forecast; default the first series. For ``importance``: only this series; default all, which a model that
    couples the series of a panel always takes."""
    variate: str | None = None
    """Whose forecast; default the first target (``importance`` is measured for all)."""
    cutoff: str | int | None = None
    """Last time the forecast may see; default the last observed row."""
    steps: tuple[int, ...] | None = Field(None, min_length=1)
    """Steps of the horizon to explain, from 1; default all."""
    attribution: AttributionConfig = AttributionConfig()
    importance: ImportanceConfig = ImportanceConfig()


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What exchanging each input does to the errors; see ``permutation_importance`` for the columns of ``table``."""

    table: pl.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        return dict(self.metadata)

    def rows(self) -> list[dict[str, Any]]:
        """Return one record an input, over all targets, the weightiest first."""
        return self.table.filter(variate=EVERY).select("kind", "source", "lags", "importance", "sd").to_dicts()


def explain(config: ExplainConfig, workspace: Workspace) -> Attribution | Importance:
    """Return the division of a forecast, or the importance of every input over past windows.

    Importance uses the rows after the fit's own (its test span), or where it had none its validation span.

    Raises:
        ArtifactError: no such artifact, or one that does not fit the data.
        DataError: no such data set or series, or too few rows.
        ConfigError: a setting that does not fit the artifact.
    """
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    _refuse_unused(config, artifact)
    wanted = None if config.series is None or artifact.network.capabilities.rows_coupled else [config.series]
    frame = load_dataset(
        workspace,
        FittedData.of(artifact, dataset),
        series=wanted,
        masked=True,
        extend=artifact.window.horizon,
        cutoff=config.cutoff,
    )
    if config.what == "importance":
        return _importance(artifact, frame, config.importance, dataset)
    found = attribute(
        artifact,
        frame,
        config.attribution,
        series=config.series,
        variate=config.variate,
        cutoff=config.cutoff,
        steps=config.steps,
    )
    return Attribution(table=found.table, metadata={**found.metadata, "dataset": dataset})


def _refuse_unused(config: ExplainConfig, artifact: Artifact) -> None:
    """Refuse settings of one forecast where past windows are looked at, and the other way round."""
    if config.what != "importance":
        if config.importance != ImportanceConfig():
            raise ConfigError(f"importance has no effect with what={config.what}; add what=importance")
        return
    if config.attribution != AttributionConfig():
        raise ConfigError("attribution has no effect with what=importance: inputs are shuffled, nothing is attributed")
    given = [name for name in ("variate", "cutoff", "steps") if getattr(config, name) is not None]
    if given:
        raise ConfigError(f"{given[0]} has no effect with what=importance: it looks at many windows of all variates")
    if config.series is not None and artifact.network.capabilities.rows_coupled:
        raise ConfigError(
            f"series={config.series} has no effect with what=importance: model '{artifact.model_name}' couples the "
            "series of a panel, so inputs are exchanged and errors counted for all of them at once; leave it out"
        )


def _importance(artifact: Artifact, frame: SeriesFrame, config: ImportanceConfig, dataset: str) -> Importance:
    start, stop, name = _unseen_rows(artifact)
    table = permutation_importance(artifact, frame, config, start=start, stop=stop)
    _LOG.info("importance over %s rows of %s", name, dataset)
    metadata = {
        "model": artifact.model_name,
        "artifact_id": artifact.id,
        "dataset": dataset,
        "rows": name,
        "windows": int(table["windows"][0]),
        "repeats": config.repeats,
    }
    return Importance(table=table, metadata=metadata)


def _unseen_rows(artifact: Artifact) -> tuple[int | None, int | None, str]:
    """Return the rows that the fit kept for grading: test, else valid; (None, None) where it recorded none."""
    spans = artifact.provenance.get("span_rows") or {}
    for name in ("test", "valid"):
        low, high = spans.get(name) or (0, 0)
        if high - low >= artifact.window.horizon + 1:
            return int(low), int(high), name
    return None, None, "all"
