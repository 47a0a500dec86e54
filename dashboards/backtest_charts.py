"""Charts of a backtest: errors by model, step and regime, skill by series; tables in, plotly figures out."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
import polars as pl

from dashboards.style import (
    ALARM,
    FORECAST,
    OBSERVED,
    bar_of,
    label,
    line_of,
    name_axis,
    names_across,
    place_map,
    style,
)

_MOST_SERIES = 15
ROUNDING = 1e-6  # a skill of this size is none


def leaderboard_chart(summary: pl.DataFrame, *, metric: str, name: str = "") -> go.Figure:
    """Return bars of one metric per model, best on top; columns ``model`` and the metric (``name`` in words)."""
    table = summary.drop_nulls(metric).sort(metric, descending=True)
    figure = go.Figure(
        go.Bar(
            x=table[metric].to_list(),
            y=table["model"].to_list(),
            orientation="h",
            marker_color=FORECAST,
            texttemplate="%{x:.4g}",
            textposition="auto",
        )
    )
    figure = style(figure, height=120 + 40 * table.height, title=f"{name or metric} (smaller is better)")
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(**name_axis(table["model"].to_list()))
    return figure


def error_by_step(
    metrics: pl.DataFrame, *, metric: str, name: str = "", places: Mapping[str, int] | None = None
) -> go.Figure:
    """Return one line per model over the forecast step; columns ``model, step`` and the metric (``name`` in words).

    ``places`` are those of the models (``place_map``) where other charts of the report show them too.
    """
    figure = go.Figure()
    places = places or place_map(metrics["model"])
    for model in metrics["model"].unique(maintain_order=True).to_list():
        part = metrics.filter(pl.col("model") == model).sort("step")
        figure.add_trace(
            go.Scatter(
                x=part["step"].to_list(),
                y=part[metric].to_list(),
                name=label(model, most=40),
                line=line_of(places[model]),
            )
        )
    figure.update_xaxes(title_text="steps ahead")
    return style(figure, y_title=name or metric)


def regime_chart(
    regimes: pl.DataFrame, *, metric: str, name: str = "", places: Mapping[str, int] | None = None
) -> go.Figure:
    """Return bars of a metric, one group a regime and one look a model; columns ``model, regime`` and the metric.

    ``places`` as in ``error_by_step``.
    """
    figure = go.Figure()
    places = places or place_map(regimes["model"])
    for model in regimes["model"].unique(maintain_order=True).to_list():
        part = regimes.filter(pl.col("model") == model)
        figure.add_trace(
            go.Bar(
                x=part["regime"].to_list(),
                y=part[metric].to_list(),
                name=label(model, most=40),
                marker=bar_of(places[model]),
                hovertemplate="%{y:.4g}",
            )
        )
    figure.update_layout(barmode="group")
    figure.update_xaxes(**names_across(regimes["regime"].unique(maintain_order=True).to_list()))
    return style(figure, height=320, y_title=name or metric)


def skill_chart(worst: pl.DataFrame, *, skill: str, reference: str) -> go.Figure:
    """Return bars of skill by series, the worst on top and at most 15; columns ``series_id`` and the skill."""
    known = worst.drop_nulls(skill)
    shown = known.head(_MOST_SERIES).reverse()  # the first bar is drawn at the bottom
    values = shown[skill].to_list()
    figure = go.Figure(
        go.Bar(
            x=values,
            y=shown["series_id"].to_list(),
            orientation="h",
            marker_color=[ALARM if value < -ROUNDING else OBSERVED for value in values],
            texttemplate="%{x:.1%}",
            textposition="auto",
        )
    )
    more = f", {_MOST_SERIES} worst of {known.height}" if known.height > _MOST_SERIES else ""
    title = f"Skill against {reference}{more} (below 0: worse)"
    figure = style(figure, height=140 + 28 * shown.height, title=title)
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(**name_axis(shown["series_id"].to_list()))
    figure.update_layout(hovermode="closest")
    return figure
