"""A forecast on demand for the dashboard: a stored artifact applied from any cutoff, with its additive parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import load_dataset
from tsforge.artifact import Artifact, load_artifact, match_frame
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.windows import last_windows
from tsforge.forecasting.predict import artifact_panel, predict
from tsforge.forecasting.sample_paths import predict_paths
from tsforge.forecasting.window_forecasts import as_array, evaluating


@dataclass(frozen=True, kw_only=True)
class LiveForecast:
    """A forecast made on demand, its additive parts, and what variates give to each other in it.

    Attributes:
        table: the forecast.
        components: ``time, component, variate, value``.
        contributions: ``time, variate, source, value``: what ``source`` gives to the component ``network`` of
            ``variate``; empty where the model does not say.
        attention: ``variate, source, share``; empty where the model does not attend to variates.
    """

    table: pl.DataFrame
    components: pl.DataFrame
    contributions: pl.DataFrame
    attention: pl.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)


def live_forecast(workspace: Workspace, artifact: str, series: str, cutoff: TimeLike | None = None) -> LiveForecast:
    """Return what a fitted model says from ``cutoff`` on (default: the end of the data), knowing the data up to then.

    Args:
        workspace: store and artifacts.
        artifact: its id.
        series: the one to forecast; a model that reads all series at once gets all of them.
        cutoff: last time that may be seen.

    Raises:
        ArtifactError: no such artifact, damaged, or it does not fit the stored data.
        DataError: no such series, too short a history, or known covariates missing over the horizon.
        ConfigError: an artifact that does not say which data set it belongs to.
    """
    model = load_artifact(workspace.artifacts / artifact)
    frame = _frame(workspace, model, series, cutoff)
    forecast = predict(model, frame, cutoff=cutoff)
    table = forecast.table.filter(pl.col("series_id") == series)
    if table.is_empty():  # a model that couples series forecasts the others
        raise DataError(
            f"series '{series}' has no observed target in the {model.window.context_length} rows up to the cutoff; "
            "choose another series or cutoff"
        )
    return LiveForecast(table=table, **_parts(model, frame, series, table), metadata=dict(forecast.metadata))


def live_paths(workspace: Workspace, artifact: str, series: str, cutoff: TimeLike | None, number: int) -> pl.DataFrame:
    """Return sample paths of what ``live_forecast`` says: ``step, time, variate, path, value``.

    Raises:
        ArtifactError, DataError: as there.
        ConfigError: the artifact has no dependence structure.
    """
    model = load_artifact(workspace.artifacts / artifact)
    forecast = predict_paths(model, _frame(workspace, model, series, cutoff), number, cutoff=cutoff)
    rows = forecast.answer.filter(pl.col("series_id") == series)
    return rows.select("step", "time", "variate", "path", "value")


def _frame(workspace: Workspace, model: Artifact, series: str, cutoff: TimeLike | None) -> SeriesFrame:
    """Return the stored rows as the model reads them, a horizon of calendar after them, impossible values hidden."""
    dataset = model.provenance.get("dataset")
    if not dataset:
        raise ConfigError(
            f"artifact {model.id} does not say which data set it belongs to; forecast with tsforge predict"
        )
    wanted = None if model.network.capabilities.rows_coupled else [series]
    fitted = FittedData.of(model, dataset)
    return load_dataset(workspace, fitted, series=wanted, cutoff=cutoff, masked=True, extend=model.window.horizon)


def _parts(model: Artifact, frame: SeriesFrame, series: str, table: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the tables of components, contributions and attention of one series' forecast."""
    panel = artifact_panel(model, match_frame(model, frame))
    windows = last_windows(panel, model.window, table["cutoff"][0], aligned=model.network.capabilities.rows_coupled)
    row = [panel.series_ids[number] for number in windows.series_index].index(series)
    batch = windows.__getitems__(range(len(windows)))
    names = model.schema.targets
    with evaluating(model.network):
        parts = {name: as_array(part)[row] for name, part in model.network.components(batch).items()}
        told = (model.network.contributions(batch), model.network.attention(batch))
    given, shares = (None if part is None else as_array(part)[row] for part in told)
    times = table.filter(pl.col("variate") == names[0]).sort("step")["time"]
    components = [
        {"time": times, "component": name, "variate": variate, "value": part[:, place]}
        for name, part in parts.items()
        for place, variate in enumerate(names)
    ]
    contributions = [
        {"time": times, "variate": variate, "source": source, "value": given[:, i, j]}
        for i, variate in enumerate(names)
        for j, source in enumerate(names)
        if given is not None
    ]
    attention = [
        {"variate": variate, "source": list(names), "share": shares[i]}
        for i, variate in enumerate(names)
        if shares is not None
    ]
    number, text = pl.Float64(), pl.String()
    return {
        "components": _joined(components, {"time": times.dtype, "component": text, "variate": text, "value": number}),
        "contributions": _joined(
            contributions, {"time": times.dtype, "variate": text, "source": text, "value": number}
        ),
        "attention": _joined(attention, {"variate": text, "source": text, "share": number}),
    }


def _joined(parts: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    tables = [
        pl.DataFrame(part).cast({name: kind for name, kind in schema.items() if kind == pl.Float64}) for part in parts
    ]
    return pl.concat(tables) if tables else pl.DataFrame(schema=schema)
