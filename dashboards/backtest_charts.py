"""Charts of a backtest: errors by regime, skill by series; tables in, plotly figures out."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from dashboards.charts import ALARM, CYCLE, OBSERVED, short_name, style

_MOST_SERIES = 15


def regime_chart(regimes: pl.DataFrame, *, metric: str, name: str = "") -> go.Figure:
    """Return bars of a metric, one group a regime and one colour a model; columns ``model, regime`` and the metric."""
    figure = go.Figure()
    for index, model in enumerate(regimes["model"].unique(maintain_order=True).to_list()):
        part = regimes.filter(pl.col("model") == model)
        figure.add_trace(
            go.Bar(
                x=part["regime"].to_list(),
                y=part[metric].to_list(),
                name=model,
                marker_color=CYCLE[index % len(CYCLE)],
                hovertemplate="%{y:.4g}",
            )
        )
    figure.update_layout(barmode="group")
    figure.update_xaxes(type="category")  # codes such as 1 and 2 are names, not numbers
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
            marker_color=[ALARM if value < 0 else OBSERVED for value in values],
            texttemplate="%{x:.1%}",
            textposition="auto",
        )
    )
    more = f", {_MOST_SERIES} worst of {known.height}" if known.height > _MOST_SERIES else ""
    title = f"Skill against {reference}{more} (below 0: worse)"
    figure = style(figure, height=140 + 28 * shown.height, title=title)
    figure.update_xaxes(tickformat=".0%")
    names = shown["series_id"].to_list()
    figure.update_yaxes(type="category", tickvals=names, ticktext=[short_name(name) for name in names])
    figure.update_layout(hovermode="closest")
    return figure
