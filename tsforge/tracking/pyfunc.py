"""An artifact as an MLflow model: a table in, a table out, no pickle.

MLflow calls ``_load_pyfunc`` of this module with the artifact's folder (``loader_module``), so that
``mlflow.pyfunc.load_model("models:/NAME@champion")`` and ``mlflow models serve`` need nothing but tsforge installed.
The table in has the columns of the source data: ``series_id``, ``time`` (UTC, without zone), targets, past and known
covariates, constants. Calendar features and physical limits are applied as they were in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import validate
from tsforge.core.errors import DataError, TsforgeError, listing
from tsforge.data.calendar import CalendarConfig, add_calendar, calendar_columns
from tsforge.data.frame import SeriesFrame
from tsforge.data.io import from_pandas
from tsforge.forecasting.predict import offered_levels, predict

if TYPE_CHECKING:
    import pandas as pd


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> TableForecaster:
    """Return the model in the folder ``path``; the entry point that MLflow looks for by this name."""
    return TableForecaster(load_artifact(Path(path)))


class TableForecaster:
    """What ``mlflow.pyfunc`` wraps."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def predict(self, table: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return the forecast of every series from its last observed row.

        Args:
            table: history; rows after the last observed target carry known covariates of the future.
            params: ``horizon`` and ``quantile_levels``; both default to what the artifact was made for.

        Raises:
            MlflowException: the table does not fit the artifact; a server answers 400 with the same message.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        chosen = dict(params or {})
        try:
            frame = frame_of(self.artifact, from_pandas(table))
            forecast = predict(
                self.artifact,
                frame,
                horizon=chosen.get("horizon"),
                quantile_levels=chosen.get("quantile_levels"),
            )
        except TsforgeError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        return naive_times(forecast.table).to_pandas()


def source_columns(artifact: Artifact) -> dict[str, tuple[str, ...]]:
    """Return the value columns a table must bring, by role; columns made from the calendar are left out."""
    schema = artifact.schema
    made = set(calendar_columns(_calendar(artifact)))
    known = tuple(name for name in schema.known if name not in made)
    return {"targets": schema.targets, "past": schema.past, "known": known, "static": schema.static}


def _calendar(artifact: Artifact) -> CalendarConfig:
    return validate(CalendarConfig, (artifact.config.get("data") or {}).get("calendar") or {}, where="data.calendar")


def frame_of(artifact: Artifact, table: pl.DataFrame) -> SeriesFrame:
    """Return a plain table as the frame that the artifact's network expects.

    Raises:
        DataError: columns are missing, or the rows break the contract of a ``SeriesFrame``.
    """
    roles = source_columns(artifact)
    wanted = ["series_id", "time", *(name for names in roles.values() for name in names)]
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise DataError(f"the table lacks the column(s) {listing(missing)}; it has {listing(table.columns, 20)}")
    if not table.height:
        raise DataError("the table has no rows; give at least the context of one series")
    if not artifact.schema.has_integer_time:
        table = table.with_columns(_utc(table["time"]))
    frame = SeriesFrame.from_long(
        table.select(wanted), time="time", series_id="series_id", freq=artifact.schema.freq, **roles
    )
    limits = (artifact.config.get("data") or {}).get("valid_range") or {}
    frame, _ = frame.mask_outside({name: tuple(limits[name]) for name in limits if name in frame.schema.columns})
    calendar = _calendar(artifact)
    return frame if calendar.is_empty else add_calendar(frame.extend(artifact.window.horizon), calendar)


def _utc(times: pl.Series) -> pl.Series:
    """Return times as UTC; without a zone they are taken as UTC, text is read as ISO 8601."""
    if times.dtype == pl.String:
        try:
            times = times.str.to_datetime(time_unit="us", time_zone="UTC", strict=True)
        except pl.exceptions.PolarsError as error:
            raise DataError("column 'time' holds text that is no ISO 8601 time such as 2026-03-01T12:00:00") from error
    if not isinstance(times.dtype, pl.Datetime | pl.Date):
        raise DataError(f"column 'time' holds {times.dtype}, no times")
    times = times.cast(pl.Datetime("us", times.dtype.time_zone if isinstance(times.dtype, pl.Datetime) else None))
    zone = getattr(times.dtype, "time_zone", None)
    return times.dt.replace_time_zone("UTC") if zone is None else times.dt.convert_time_zone("UTC")


def naive_times(table: pl.DataFrame) -> pl.DataFrame:
    """Return the table with its times in UTC without a zone, the form MLflow's signature asks of the input as well."""
    zoned = [
        name for name, kind in table.schema.items() if isinstance(kind, pl.Datetime) and kind.time_zone is not None
    ]
    return table.with_columns(pl.col(name).dt.convert_time_zone("UTC").dt.replace_time_zone(None) for name in zoned)


def signature(artifact: Artifact) -> Any:
    """Return MLflow's description of the table in, the parameters and the table out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    time = DataType.long if artifact.schema.has_integer_time else DataType.datetime
    roles = source_columns(artifact)
    values = [ColSpec(DataType.double, name) for names in roles.values() for name in names]
    levels = offered_levels(artifact)
    outputs = [("series_id", DataType.string), ("cutoff", time), ("step", DataType.integer), ("time", time)]
    outputs += [("variate", DataType.string), ("mean", DataType.double)]
    outputs += [(f"q{level:g}", DataType.double) for level in levels]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "series_id"), ColSpec(time, "time"), *values]),
        outputs=Schema([ColSpec(kind, name) for name, kind in outputs]),
        params=ParamSchema(
            [
                ParamSpec("horizon", DataType.long, artifact.window.horizon),
                ParamSpec("quantile_levels", DataType.double, list(levels), (-1,)),
            ]
        ),
    )
