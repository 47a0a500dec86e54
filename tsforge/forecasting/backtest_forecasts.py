"""Forecasts of all series from several cutoffs at once, beside what came: what a backtest grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.artifact import Artifact, match_frame
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel
from tsforge.data.vintages import VintageFrame
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.predict import (
    forecast_table,
    network_levels,
    padded_panel,
    published_quantiles,
    published_windows,
)
from tsforge.forecasting.window_forecasts import FloatArray, predict_windows

Truth = Literal["latest", "first"]


def forecasts_at(
    artifact: Artifact,
    frame: SeriesFrame,
    cutoffs: NDArray[np.int64],
    *,
    steps: int,
    levels: Sequence[float] = (),
    grid: TimeGrid | None = None,
) -> pl.DataFrame:
    """Return the forecasts of all series from every cutoff with their ``actual`` values (null where not observed).

    Args:
        artifact: the fitted network; windows end at their cutoff, whatever the frame holds after it.
        frame: the data.
        cutoffs: rows on ``grid`` of the last visible row; series too short there are left out, for a model that couples
            series those with nothing observed in the context (with a warning).
        steps: at most the trained horizon.
        levels: quantile levels, calibrated if the artifact is.
        grid: default the frame's. Some series of a frame may begin later than the frame did: give its grid then.
    """
    frame = match_frame(artifact, frame)
    origin = (frame.grid if grid is None else grid).time_at(0)
    shift = int(artifact.grid.index_of(pl.Series([origin], dtype=frame.table["time"].dtype))[0])
    first = np.asarray(cutoffs, dtype=np.int64) + 1 + shift
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    panel = padded_panel(artifact, frame, int(first.max()) + spec.horizon)
    windows = WindowDataset(
        panel,
        spec,
        int(first.min()),
        int(first.max()) + spec.horizon,
        aligned=artifact.network.capabilities.rows_coupled,
    )
    starts = windows.cutoff_index[:: windows.rows_per_item]
    chosen = np.flatnonzero(np.isin(starts, first))
    found = predict_windows(artifact.network, windows, network_levels(artifact, levels), indices=chosen)
    cut = replace(
        found,
        mean=found.mean[:, :steps],
        quantiles=None if found.quantiles is None else found.quantiles[:, :steps],
    )
    cut = replace(cut, quantiles=published_quantiles(artifact, cut, levels, panel))
    actual = actual_values(panel, found.series_index, found.cutoff_index, steps)
    keep = published_windows(artifact, panel, found)
    table = forecast_table(cut, panel, levels, keep=keep)
    return table.with_columns(pl.Series("actual", actual[keep].ravel()).fill_nan(None))


def forecasts_of_vintages(
    artifact: Artifact,
    vintages: VintageFrame,
    cutoffs: NDArray[np.int64],
    *,
    steps: int,
    levels: Sequence[float] = (),
    truth: Truth = "latest",
) -> tuple[pl.DataFrame, int]:
    """Return forecasts as ``forecasts_at`` does, each from what was known at the moment of its cutoff.

    Args:
        artifact: the fitted network.
        vintages: all publications.
        cutoffs: rows on the grid of ``vintages.latest()``.
        steps, levels: as there.
        truth: which publication of a target is the actual value.

    Returns:
        The forecasts, and how many of their rows lacked a known covariate that was not published yet.
    """
    latest = vintages.latest()
    right = latest if truth == "latest" else vintages.first()
    actual = right.table.unpivot(
        on=right.schema.targets, index=["series_id", "time"], variable_name="variate", value_name="actual"
    )
    parts, lacking = [], 0
    for cutoff in cutoffs:
        time = latest.grid.time_at(int(cutoff))
        known = vintages.as_of(vintages.moment(time))
        here = np.array([known.grid.floor(time)])
        parts.append(forecasts_at(artifact, known, here, steps=steps, levels=levels).drop("actual"))
        lacking += lacking_known(artifact, known, parts[-1])
    table = pl.concat(parts).join(actual, on=["series_id", "time", "variate"], how="left", maintain_order="left")
    return table, lacking


def lacking_known(artifact: Artifact, frame: SeriesFrame, table: pl.DataFrame) -> int:
    """Return how many forecast rows of ``table`` lack a known covariate that the artifact reads."""
    names = artifact.schema.known
    if not names:
        return 0
    rows = table.select("series_id", "cutoff", "time").unique()
    there = frame.table.filter(pl.all_horizontal(pl.col(names).is_not_null())).select("series_id", "time")
    return rows.join(there, on=["series_id", "time"], how="anti").height


def actual_values(panel: Panel, series: NDArray[np.int64], cutoff: NDArray[np.int64], steps: int) -> FloatArray:
    """Return observed targets [N, steps, V] in double precision from row ``cutoff`` on, NaN elsewhere."""
    rows = (panel.indptr[series] + cutoff - panel.offset[series])[:, None] + np.arange(steps)  # [N, H]
    inside = (rows >= panel.indptr[series][:, None]) & (rows < panel.indptr[series + 1][:, None])
    rows = np.where(inside, rows, 0)
    seen = panel.target_observed[rows] & inside[..., None]
    return np.where(seen, panel.values[rows][..., : panel.num_targets], np.nan)
