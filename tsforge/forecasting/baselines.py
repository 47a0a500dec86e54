"""The naive forecasts every report compares with, fitted with the same scaler, likelihood and artifact as any model."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tsforge.artifact import Artifact, collect_provenance, create_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.seasons import season_length
from tsforge.layers.scaling import ScalingConfig
from tsforge.network import ForecastNetwork, NetworkConfig

BASELINES = ("last_value", "seasonal_naive", "drift")


def frame_season(frame: SeriesFrame, declared: int | None = None) -> int:
    """Return the season length of a frame: declared, implied by its frequency, or found in its longest series."""
    indptr = frame.indptr
    longest = int(np.diff(indptr).argmax())
    rows = frame.table[int(indptr[longest]) : int(indptr[longest + 1])]
    values = np.column_stack([rows[name].fill_null(np.nan).to_numpy() for name in frame.schema.targets])
    return season_length(frame.schema.freq, values, declared=declared)


class TrainingSpan:
    """Rows of a frame as fits take them, with what does not depend on the model: several fits of one frame share it."""

    def __init__(self, frame: SeriesFrame) -> None:
        self.panel = Panel.from_frame(frame)
        self.series = self.panel.training_series(None, None)
        self.provenance = collect_provenance(data_fingerprint=frame.fingerprint(), seeds={})
        self._scalers: dict[ScalingConfig, dict[str, Tensor]] = {}

    def fit_scaler(self, network: ForecastNetwork) -> None:
        """Give the network its scaling statistics: taken once for each kind of scaling, they are many small sums."""
        kind = network.config.scaling
        if kind in self._scalers:
            network.scaler.load_state_dict(self._scalers[kind])
        else:
            network.fit_scaler(self.series)
            self._scalers[kind] = network.scaler.state_dict()


def fit_solved(frame: SeriesFrame | TrainingSpan, network: NetworkConfig, window: WindowSpec) -> Artifact:
    """Return the artifact of a model that is fitted in closed form on every row of the frame, or needs no fit.

    Raises:
        ModelError: the model needs gradient training.
        DataError: nothing is observed.
    """
    span = frame if isinstance(frame, TrainingSpan) else TrainingSpan(frame)
    panel, series, schema = span.panel, span.series, span.panel.schema
    spec = DataSpec(
        context_length=window.context_length,
        horizon=window.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        num_past=len(schema.past),
        num_static=len(schema.static),
        train_length=panel.span()[1],
    )
    fitted = ForecastNetwork(network, spec)
    span.fit_scaler(fitted)
    report = fitted.solve(series)
    if fitted.capabilities.trainable and (report is None or not report.finished):
        raise ModelError(f"model '{network.model.name}' needs gradient training; use the fit use-case")
    return create_artifact(
        fitted,
        config=network.model_dump(mode="json"),
        schema=schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance=span.provenance,
    )


def fit_baseline(
    name: str,
    frame: SeriesFrame | TrainingSpan,
    *,
    horizon: int,
    season: int,
    context_length: int,
    per_series: bool = False,
) -> Artifact:
    """Return a naive forecaster with Normal intervals from its own errors over the frame.

    Args:
        name: one of ``BASELINES``.
        frame: everything that may be seen; a ``TrainingSpan`` of it without covariates where several are fitted.
        horizon: steps.
        season: steps of a season.
        context_length: rows to look back; at least one season is taken.
        per_series: take the spread of every series by itself; then only series of the frame can be forecast.

    Raises:
        ConfigError: no such model.
    """
    settings: dict[str, object] = {"name": name}
    if name == "seasonal_naive":
        settings["season_length"] = season
    scaling = "series" if per_series else "global"
    network = {"model": settings, "likelihood": {"name": "normal"}, "scaling": {"kind": scaling}}
    window = WindowSpec(context_length=max(context_length, season, 2), horizon=horizon)
    plain = frame if isinstance(frame, TrainingSpan) else frame.with_covariates()
    return fit_solved(plain, validate(NetworkConfig, network), window)
