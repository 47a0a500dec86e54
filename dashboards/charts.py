"""Charts from tables. Nothing here knows Streamlit; every function takes polars tables and returns a plotly figure.

Colours are distinguishable with the common colour-vision deficiencies; a gap in the data is a gap in the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

INK = "#1c2733"
HISTORY = "#5b6b7b"
FORECAST = "#1f5fa8"
ALARM = "#c8442b"
ACCENT = "#e0912f"
CYCLE = ("#1f5fa8", "#e0912f", "#3c8d5a", "#8a4fa3", "#c8442b", "#5b6b7b", "#a8812f", "#2f9fa8")
GRID = "#e3e8ee"


def _style(figure: go.Figure, *, height: int = 380, title: str = "", y_title: str = "") -> go.Figure:
    figure.update_layout(
        height=height,
        title={"text": title, "font": {"size": 15}} if title else None,
        margin={"l": 10, "r": 10, "t": 46 if title else 16, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    if y_title:
        figure.update_yaxes(title_text=y_title, selector=0)
    return figure


def quantile_pairs(columns: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return ``(low column, high column, coverage)`` of symmetric quantile columns, widest first."""
    levels = {round(float(match[1]), 6): name for name in columns if (match := re.fullmatch(r"q(0?\.\d+)", name))}
    pairs = [
        (levels[low], levels[round(1 - low, 6)], round(1 - 2 * low, 6))
        for low in sorted(levels)
        if low < 0.5 and round(1 - low, 6) in levels
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def fan_chart(
    history: pl.DataFrame, forecast: pl.DataFrame, *, actual: pl.DataFrame | None = None, variate: str = ""
) -> go.Figure:
    """Return history, forecast mean and one band per symmetric quantile pair.

    Args:
        history: columns ``time, value`` up to the cutoff.
        forecast: a ``Forecast`` table of one series, variate and cutoff.
        actual: columns ``time, value`` after the cutoff, where they are known by now.
        variate: name for the axis.
    """
    figure = go.Figure()
    table = forecast.sort("step")
    pairs = quantile_pairs(table.columns)
    for position, (low, high, coverage) in enumerate(pairs):
        shade = 0.12 + 0.14 * position
        x = table["time"].to_list()
        figure.add_trace(
            go.Scatter(
                x=x + x[::-1],
                y=table[high].to_list() + table[low].to_list()[::-1],
                fill="toself",
                fillcolor=f"rgba(31,95,168,{min(shade, 0.45):.2f})",
                line={"width": 0},
                name=f"{coverage:.0%} interval",
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(x=history["time"].to_list(), y=history["value"].to_list(), name="history", line={"color": HISTORY})
    )
    figure.add_trace(
        go.Scatter(
            x=table["time"].to_list(),
            y=table["mean"].to_list(),
            name="forecast",
            line={"color": FORECAST, "width": 2.4},
        )
    )
    if actual is not None and actual.height:
        figure.add_trace(
            go.Scatter(
                x=actual["time"].to_list(),
                y=actual["value"].to_list(),
                name="what happened",
                line={"color": INK, "dash": "dot"},
            )
        )
    if table.height and isinstance(table["cutoff"][0], datetime):
        figure.add_vline(x=table["cutoff"][0], line_width=1, line_dash="dash", line_color=HISTORY)
    return _style(figure, height=440, y_title=variate)


def components_chart(components: pl.DataFrame) -> go.Figure:
    """Return one panel per additive component of a forecast; columns ``time, component, value``."""
    names = components["component"].unique(maintain_order=True).to_list()
    figure = make_subplots(
        rows=max(len(names), 1), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.08
    )
    for row, name in enumerate(names, start=1):
        part = components.filter(pl.col("component") == name).sort("time")
        figure.add_trace(
            go.Scatter(
                x=part["time"].to_list(),
                y=part["value"].to_list(),
                name=name,
                showlegend=False,
                line={"color": CYCLE[(row - 1) % len(CYCLE)]},
            ),
            row=row,
            col=1,
        )
    return _style(figure, height=120 + 130 * max(len(names), 1))


def series_chart(values: pl.DataFrame, *, columns: Sequence[str], title: str = "") -> go.Figure:
    """Return one line per column of a wide table with a ``time`` column."""
    figure = go.Figure()
    for index, name in enumerate(columns):
        figure.add_trace(
            go.Scatter(
                x=values["time"].to_list(),
                y=values[name].to_list(),
                name=name,
                line={"color": CYCLE[index % len(CYCLE)], "width": 1.4},
            )
        )
    return _style(figure, title=title)


def anomaly_timeline(
    values: pl.DataFrame, scores: pl.DataFrame, events: pl.DataFrame, *, variate: str = "", score_name: str = "score"
) -> go.Figure:
    """Return values above scores with their threshold; events are shaded over both.

    Args:
        values: columns ``time, value``.
        scores: columns ``time, score, threshold``.
        events: columns ``start, end, event_id``.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    figure.add_trace(
        go.Scatter(
            x=values["time"].to_list(), y=values["value"].to_list(), name=variate or "value", line={"color": HISTORY}
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Scatter(x=scores["time"].to_list(), y=scores["score"].to_list(), name=score_name, line={"color": FORECAST}),
        row=2,
        col=1,
    )
    if "threshold" in scores.columns:
        figure.add_trace(
            go.Scatter(
                x=scores["time"].to_list(),
                y=scores["threshold"].to_list(),
                name="threshold",
                line={"color": ACCENT, "dash": "dash", "width": 1.2},
            ),
            row=2,
            col=1,
        )
    for event in events.iter_rows(named=True):
        # a one-step event has no width: the line keeps it visible at any zoom
        figure.add_vrect(
            x0=event["start"], x1=event["end"], fillcolor=ALARM, opacity=0.18, line={"color": ALARM, "width": 1.5}
        )
    figure.update_yaxes(title_text=variate, row=1, col=1)
    figure.update_yaxes(title_text=score_name, row=2, col=1)
    if scores.height and (scores["score"].max() or 0) > 50 * max(float(scores["score"].median() or 0), 1e-9):  # type: ignore[arg-type,operator]
        figure.update_yaxes(type="log", row=2, col=1)
    return _style(figure, height=520)


def attribution_chart(variates: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Return bars of each variate's contribution to an event, strongest on top."""
    ranked = sorted(variates, key=lambda item: float(item["contribution"]))
    figure = go.Figure(
        go.Bar(
            x=[float(item["contribution"]) for item in ranked],
            y=[str(item["variate"]) for item in ranked],
            orientation="h",
            marker_color=ALARM,
        )
    )
    return _style(figure, height=110 + 28 * len(ranked), title="Which variates are strange (in standard deviations)")


def leaderboard_chart(summary: pl.DataFrame, *, metric: str) -> go.Figure:
    """Return bars of one metric per model, best first; columns ``model`` and the metric."""
    table = summary.drop_nulls(metric).sort(metric, descending=True)
    figure = go.Figure(
        go.Bar(x=table[metric].to_list(), y=table["model"].to_list(), orientation="h", marker_color=FORECAST)
    )
    return _style(figure, height=120 + 34 * table.height, title=f"{metric} (smaller is better)")


def error_by_step(metrics: pl.DataFrame, *, metric: str) -> go.Figure:
    """Return one line per model over the forecast step; columns ``model, step`` and the metric."""
    figure = go.Figure()
    for index, name in enumerate(metrics["model"].unique(maintain_order=True).to_list()):
        part = metrics.filter(pl.col("model") == name).sort("step")
        figure.add_trace(
            go.Scatter(
                x=part["step"].to_list(),
                y=part[metric].to_list(),
                name=name,
                line={"color": CYCLE[index % len(CYCLE)]},
            )
        )
    figure.update_xaxes(title_text="steps ahead")
    return _style(figure, y_title=metric)


def null_share_chart(report: pl.DataFrame) -> go.Figure:
    """Return a heat map of missing cells; columns ``series_id, column, null_share``."""
    wide = report.pivot(on="column", index="series_id", values="null_share", aggregate_function="first")
    columns = [name for name in wide.columns if name != "series_id"]
    figure = go.Figure(
        go.Heatmap(
            z=[list(row) for row in wide.select(columns).iter_rows()],
            x=columns,
            y=wide["series_id"].to_list(),
            colorscale=[[0, "#f3f6fa"], [0.02, "#f4d9b0"], [1, ALARM]],
            zmin=0,
            zmax=1,
            colorbar={"title": "missing", "tickformat": ".0%"},
            hovertemplate="%{y} %{x}: %{z:.1%}<extra></extra>",
        )
    )
    figure = _style(figure, height=150 + 26 * wide.height)
    figure.update_layout(hovermode="closest")
    return figure


def history_chart(history: pl.DataFrame) -> go.Figure:
    """Return training and validation curves; columns ``epoch, name, value``."""
    figure = go.Figure()
    for index, name in enumerate(history["name"].unique(maintain_order=True).to_list()):
        part = history.filter(pl.col("name") == name).sort("epoch")
        figure.add_trace(
            go.Scatter(
                x=part["epoch"].to_list(),
                y=part["value"].to_list(),
                name=name,
                line={"color": CYCLE[index % len(CYCLE)]},
            )
        )
    figure.update_xaxes(title_text="epoch")
    return _style(figure)
