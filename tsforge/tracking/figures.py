"""Plots that go with a run: how the training went, what the forecast looks like. Pictures, no network needed.

Figures are made without pyplot, so they are safe in threads and need no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import polars as pl
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from tsforge.contracts.tables import Forecast, quantile_column
from tsforge.core.errors import DataError

_LINE, _BAND, _PAST = "#1f6feb", "#1f6feb", "#57606a"


def learning_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return the losses over epochs (every metric, when none is called a loss), logarithmic where all are positive.

    Args:
        history: metric -> (epoch, value) pairs in order.
    """
    names = sorted(name for name in history if name.endswith("loss")) or sorted(history)
    figure = Figure(figsize=(7, 3.2), layout="tight")
    axis = figure.subplots()
    for name in names:
        epochs, values = zip(*history[name], strict=True)
        axis.plot(epochs, values, marker=".", label=name)
    if all(value > 0 for name in names for _, value in history[name]):
        axis.set_yscale("log")
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def forecast_figure(
    history: pl.DataFrame, forecast: Forecast, *, series_id: str | None = None, num_past: int = 200
) -> Figure:
    """Return history, forecast mean and quantile bands of every variate of one series.

    Args:
        history: ``series_id, time`` and one column a variate; rows after the cutoff are drawn too (what came true).
        forecast: of one or more series; the last cutoff of the series is drawn.
        series_id: default the first of the forecast.
        num_past: rows of history before the cutoff.

    Raises:
        DataError: the forecast does not hold the series.
    """
    name = series_id if series_id is not None else forecast.table["series_id"][0]
    table = forecast.table.filter(pl.col("series_id") == name)
    if not table.height:
        raise DataError(f"the forecast holds no series '{name}'")
    cutoff = table["cutoff"].max()
    table = table.filter(pl.col("cutoff") == cutoff)
    own = history.filter(pl.col("series_id") == name).sort("time")
    past = own.filter(pl.col("time") <= cutoff).tail(num_past)
    shown = pl.concat([past, own.filter(pl.col("time").is_in(table["time"].unique().implode()))])
    variates = table["variate"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(9, 2.4 * len(variates)), layout="constrained")
    axes = figure.subplots(len(variates), 1, squeeze=False, sharex=True)[:, 0]
    for axis, variate in zip(axes, variates, strict=True):
        _draw(axis, shown, table.filter(pl.col("variate") == variate).sort("step"), variate, forecast.quantile_levels)
    axes[0].set_title(f"{name}, forecast from {cutoff!s}", loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    if isinstance(cutoff, datetime):
        locator = AutoDateLocator(maxticks=9)  # type: ignore[no-untyped-call]
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    return figure


def _draw(axis: Any, shown: pl.DataFrame, table: pl.DataFrame, variate: str, levels: Sequence[float]) -> None:
    axis.plot(shown["time"].to_list(), shown[variate].to_list(), color=_PAST, linewidth=0.9, label="observed")
    times = table["time"].to_list()
    for low in (level for level in levels if level < 0.5):
        high = next((level for level in levels if abs(level - (1 - low)) < 1e-9), None)
        if high is None:
            continue
        low_values, high_values = (table[quantile_column(level)].cast(pl.Float64).to_list() for level in (low, high))
        bounds = [[float("nan") if value is None else value for value in side] for side in (low_values, high_values)]
        axis.fill_between(times, *bounds, color=_BAND, alpha=0.12, linewidth=0)
    axis.plot(times, table["mean"].to_list(), color=_LINE, linewidth=1.4, label="forecast")
    axis.set_ylabel(variate)
    axis.grid(alpha=0.3)


def phase_space_figure(table: pl.DataFrame, variates: Sequence[str]) -> Figure:
    """Return data and free run side by side in the space of up to three variates (over the steps, where there is one).

    Args:
        table: ``kind`` (``data``, ``free_run``), ``step`` and the variates.
        variates: the first three are drawn.
    """
    shown = list(variates[:3])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    options = {"projection": "3d"} if len(shown) == 3 else {}
    for place, (kind, title, colour) in enumerate((("data", "data", _PAST), ("free_run", "free run", _LINE)), start=1):
        axis: Any = figure.add_subplot(1, 2, place, **options)
        rows = table.filter(pl.col("kind") == kind)
        names = shown if len(shown) > 1 else ["step", *shown]
        axis.plot(*(rows[name].to_numpy() for name in names), color=colour, linewidth=0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(names[0])
        axis.set_ylabel(names[1])
        if len(names) == 3:
            axis.set_zlabel(names[2])
    return figure


def spectra_figure(table: pl.DataFrame) -> Figure:
    """Return the power spectra of data and free run, one panel a variate (the first six).

    Args:
        table: ``variate, frequency, data, free_run``.
    """
    variates = table["variate"].unique(maintain_order=True).to_list()[:6]
    figure = Figure(figsize=(9, 1.9 * len(variates)), layout="constrained")
    axes = figure.subplots(len(variates), 1, squeeze=False, sharex=True)[:, 0]
    for axis, variate in zip(axes, variates, strict=True):
        rows = table.filter(pl.col("variate") == variate)
        for kind, label, colour in (("data", "data", _PAST), ("free_run", "free run", _LINE)):
            power = rows[kind].to_numpy()
            if (power > 0).any():
                axis.semilogy(rows["frequency"].to_numpy(), power, color=colour, linewidth=0.9, label=label)
        axis.set_ylabel(variate)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("frequency (cycles per unit of time)")
    return figure
