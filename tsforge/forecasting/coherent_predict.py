"""Coherent forecasts of an artifact: base forecasts of all nodes, reconciled by what was known at the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsforge.artifact import Artifact
from tsforge.contracts.tables import Forecast
from tsforge.core.errors import DataError
from tsforge.data.aggregates import frame_hierarchy
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike, show_time
from tsforge.data.hierarchy import HierarchyConfig
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.coherent import base_levels, make_coherence
from tsforge.forecasting.predict import offered_levels, predict
from tsforge.forecasting.reconcile import ReconcileConfig


def predict_coherent(
    artifact: Artifact,
    frame: SeriesFrame,
    structure: HierarchyConfig,
    config: ReconcileConfig,
    *,
    quantile_levels: Sequence[float] | None = None,
    cutoff: TimeLike | None = None,
    horizon: int | None = None,
) -> Forecast:
    """Return forecasts of every node of a hierarchy that add up.

    Args:
        artifact: the fitted network; it forecasts bottoms and aggregates alike.
        frame: history of every node (``with_aggregates``), and known covariates over the horizon.
        structure: what adds up to what.
        config: how forecasts are reconciled.
        quantile_levels: levels wanted; default those the artifact offers. Conformal intervals serve any level.
        cutoff: last time that may be seen, the same for all; default the last row at which any node is observed.
        horizon: steps, at most those trained.

    Returns:
        The table, with ``metadata["reconcile"]``: method, shrinkage, held-out windows, and by level how incoherent the
        base forecasts were, relative to their size.

    Raises:
        ArtifactError, ConfigError, DataError, ModelError: as for ``predict``; also too few windows before the cutoff.
    """
    hierarchy = frame_hierarchy(frame, structure)
    end: Any = frame.last_observed()["time"].max() if cutoff is None else cutoff
    if end is None:
        raise DataError("no target is observed in any series, so there is nothing to forecast from")
    offered = offered_levels(artifact)
    levels = tuple(offered if quantile_levels is None else quantile_levels)
    levels = () if config.intervals == "none" else levels
    base = predict(
        artifact,
        frame,
        quantile_levels=base_levels(config, offered, levels),
        cutoff=end,
        horizon=horizon,
    )
    visible, steps = frame.until(end), int(base.metadata["horizon"])
    coherence = make_coherence(
        artifact,
        visible,
        (hierarchy, config),
        (steps, levels),
        lambda at: forecasts_at(artifact, visible, at, steps=steps),
    )
    table = coherence.apply(base.table)
    facts = {**coherence.facts, "cutoff": show_time(end)}
    return Forecast(
        table=table,
        quantile_levels=coherence.levels,
        metadata={**base.metadata, "calibrated": bool(coherence.levels), "reconcile": facts},
    )
