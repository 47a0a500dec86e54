"""The naive forecasts every report compares with, fitted with the same scaler, likelihood and artifact as any model."""

from __future__ import annotations

import numpy as np
import torch
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
from tsforge.models._ar_windows import NaiveForecaster, series_error
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
    return _artifact(_solved(span, network, window), span, window)


def _solved(span: TrainingSpan, network: NetworkConfig, window: WindowSpec) -> ForecastNetwork:
    schema = span.panel.schema
    spec = DataSpec(
        context_length=window.context_length,
        horizon=window.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        num_past=len(schema.past),
        num_static=len(schema.static),
        train_length=span.panel.span()[1],
    )
    fitted = ForecastNetwork(network, spec)
    span.fit_scaler(fitted)
    report = fitted.solve(span.series)
    if fitted.capabilities.trainable and (report is None or not report.finished):
        raise ModelError(f"model '{network.model.name}' needs gradient training; use the fit use-case")
    return fitted


def _artifact(fitted: ForecastNetwork, span: TrainingSpan, window: WindowSpec) -> Artifact:
    return create_artifact(
        fitted,
        config=fitted.config.model_dump(mode="json"),
        schema=span.panel.schema,
        grid=span.panel.grid,
        series_ids=span.panel.series_ids,
        window=window,
        provenance=span.provenance,
    )


def _settings(name: str, season: int) -> dict[str, object]:
    return {"name": name, "season_length": season} if name == "seasonal_naive" else {"name": name}


def _context(season: int, context_length: int) -> int:
    return max(context_length, season, 2)


def is_baseline(artifact: Artifact, name: str, season: int) -> bool:
    """Return whether an artifact makes the forecasts of the baseline ``name`` that looks back one season.

    Same model, same settings and same look-back: a longer one holds other starts of a drift and other values where the
    last season has gaps. For the last value a longer one will do: it differs only after a gap of a whole season.
    """
    same = validate(NetworkConfig, {"model": _settings(name, season)}).model == artifact.network.config.model
    length, least = artifact.window.context_length, _context(season, 0)
    return same and (length >= least if name == "last_value" else length == least)


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
        per_series: take the spread of every series from its own errors, step by step. A series that is too short for a
            window, or not in the frame, takes that of all series, in units of its own deviation (of its context where
            it is not in the frame).

    Raises:
        ConfigError: no such model.
    """
    scaling = {"kind": "series", "unknown": "context"} if per_series else {"kind": "global"}
    settings = {"model": _settings(name, season), "likelihood": {"name": "normal"}, "scaling": scaling}
    window = WindowSpec(context_length=_context(season, context_length), horizon=horizon)
    span = frame if isinstance(frame, TrainingSpan) else TrainingSpan(frame.with_covariates())
    fitted = _solved(span, validate(NetworkConfig, settings), window)
    if per_series:
        _take_own_spreads(fitted, span)
    return _artifact(fitted, span, window)


def _take_own_spreads(fitted: ForecastNetwork, span: TrainingSpan) -> None:
    """Give each series the spread of its own training errors, beside the spread of all that the network has."""
    model = fitted.model
    if not isinstance(model, NaiveForecaster):
        raise ModelError(f"model '{fitted.config.model.name}' has no spread by series")
    own = series_error(model, fitted.scaler.scale_series(span.series))
    if own is None:
        return
    together = fitted.param_offset.double()  # [H, V, K]
    raw = fitted.likelihood.initial_raw(own.flatten(0, 1)).reshape(*own.shape, -1)  # [S, H, V, K]
    more = torch.where(own.isnan().unsqueeze(-1), 0.0, raw - together)
    model.series_spread = more[..., 1:].to(fitted.param_offset.dtype)
