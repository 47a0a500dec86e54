"""Settings of a recurring batch: its data set and model, what is checked, forecast and scored."""

from __future__ import annotations

from pydantic import Field, model_validator

from tsforge.anomaly.config import DetectConfig
from tsforge.app.checks import CheckConfig, NonEmptyCheck
from tsforge.core.config import Config, QuantileLevel
from tsforge.data.config import DataConfig
from tsforge.data.durations import Span
from tsforge.forecasting.cold_start import ColdStartConfig
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.reconcile import ReconcileConfig


class ForecastStage(Config):
    """What is forecast; None as the whole stage forecasts nothing."""

    horizon: int | None = Field(None, ge=1)
    """Steps; None = as many as the model was trained for."""
    quantile_levels: tuple[QuantileLevel, ...] | None = None
    """Levels; None = all the artifact offers."""
    reconcile: ReconcileConfig | None = None
    """Make the forecasts of the data set's hierarchy add up; they then start from one row, the last observed one."""
    online: OnlineConfig | None = None
    """Adapt the intervals to how earlier batches of the job fared; ``{}`` takes the defaults."""
    cold_start: ColdStartConfig | None = None
    """Also forecast series that are shorter than the context (``cold_start=pad``), and new ones without a row
    (``cold_start.like.NEW=OLD``), as ``predict`` does; without it they are errors."""

    @model_validator(mode="after")
    def _fits(self) -> ForecastStage:
        if self.cold_start is not None and self.reconcile is not None:
            raise ValueError("cold_start gives forecasts that need not add up: no reconcile beside it")
        return self


class DetectStage(Config):
    """What is scored: the rows of the last ``span`` before ``as_of``."""

    span: Span = "7d"
    detector: DetectConfig = DetectConfig()


class BatchConfig(Config):
    """A recurring job over one data set and one model.

    Attributes:
        name: of the job: its key in the ledger and its folder below ``published/``.
        data: the data set; its source is read again before each batch.
        model: artifact folder, artifact id, or ``NAME@alias`` of the registry (``weather@champion``).
        ingest: read the source first; False uses what is in the store.
        checks: what the data must satisfy; a failed blocking check publishes nothing.
        forecast, detect: the stages, None leaves one out.
        allow_future_model: accept a model that was fitted on rows after ``as_of`` (a backfill with today's champion);
            its forecasts look better than they could have been then, and the manifest says so.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$")
    data: DataConfig
    model: str = Field(min_length=1)
    ingest: bool = True
    checks: tuple[CheckConfig, ...] = (NonEmptyCheck(),)
    forecast: ForecastStage | None = ForecastStage()
    detect: DetectStage | None = DetectStage()
    allow_future_model: bool = False

    @model_validator(mode="after")
    def _has_sums(self) -> BatchConfig:
        if self.forecast is not None and self.forecast.reconcile is not None and self.data.hierarchy is None:
            raise ValueError(f"forecast.reconcile: data set '{self.data.name}' has no hierarchy; state data.hierarchy")
        return self

    @property
    def key(self) -> str:
        """The job's name in the ledger."""
        return f"batch/{self.name}"
