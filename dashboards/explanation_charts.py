"""Charts of explanations: from a baseline to the forecast, where in the past it comes from, what a model needs."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from dashboards.style import ALARM, FORECAST, GRID, HISTORY, OWN, extra_height, label, name_axis, names_across, style

MOST = 12  # inputs drawn one by one; the others are one bar
OTHERS = "all others"
_PALE = "#f3f4f6"


def waterfall_chart(parts: pl.DataFrame, *, baseline: float, forecast: float, variate: str = "") -> go.Figure:
    """Return steps from the forecast for the baseline to the forecast.

    Args:
        parts: ``label, contribution``, in the order drawn; what they leave of the way is drawn as ``remainder``.
        baseline, forecast: both ends.
        variate: name of the axis.
    """
    names, values = parts["label"].to_list(), parts["contribution"].to_list()
    rest = forecast - baseline - sum(values)
    if abs(rest) > 1e-3 * (abs(forecast - baseline) + sum(map(abs, values))):
        names, values = [*names, "remainder"], [*values, rest]
    texts = ["baseline", *names, "forecast"]  # an input may have either name too: places are numbers
    figure = go.Figure(
        go.Waterfall(
            x=list(range(1, len(names) + 1)),
            y=values,
            base=baseline,
            increasing={"marker": {"color": FORECAST}},
            decreasing={"marker": {"color": ALARM}},
            connector={"line": {"color": GRID}},
            customdata=[label(name) for name in names],
            hovertemplate="%{customdata}: %{delta:+.4~g}<extra></extra>",
        )
    )
    figure.add_scatter(  # a bar would have to begin at 0, far from where the steps can be seen
        x=[0, len(names) + 1],
        y=[baseline, forecast],
        customdata=[texts[0], texts[-1]],
        mode="markers",
        marker={"symbol": "line-ew", "size": 44, "line": {"width": 3, "color": HISTORY}},
        hovertemplate="%{customdata}: %{y:.4~g}<extra></extra>",
    )
    figure = style(figure, y_title=variate)
    across = names_across(texts)
    figure.update_layout(height=figure.layout.height + extra_height(across))
    figure.update_xaxes(
        **{**across, "type": "linear", "tickvals": list(range(len(texts)))}, range=[-0.6, len(texts) - 0.4]
    )
    corners = [baseline]
    for value in values:
        corners.append(corners[-1] + value)
    low, high = min(*corners, forecast), max(*corners, forecast)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    figure.update_yaxes(range=[low - room, high + room])
    figure.update_layout(showlegend=False, hovermode="closest")
    return figure


def lags_chart(cells: pl.DataFrame) -> go.Figure:
    """Return a heat map of contributions, inputs by time of the input.

    Args:
        cells: ``label, source_time, contribution``; labels are drawn in the order they come.
    """
    names = cells["label"].unique(maintain_order=True).to_list()
    times = cells["source_time"].unique().sort().to_list()
    found = {(label, time): value for label, time, value in cells.select("label", "source_time", "contribution").rows()}
    values = [[found.get((name, time)) for time in times] for name in names]
    most = max((abs(cell) for row in values for cell in row if cell is not None), default=1.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=times,
            y=names,
            colorscale=[[0, ALARM], [0.5, _PALE], [1, FORECAST]],
            zmin=-most,
            zmax=most,
            customdata=[[label(name)] * len(times) for name in names],
            hovertemplate="%{customdata} at %{x}<br>%{z:.4~g}<extra></extra>",
            colorbar={"len": 1, "thickness": 12},
        )
    )
    figure = style(figure, height=120 + 30 * max(2, len(names)))
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(autorange="reversed", showgrid=False, **name_axis(names))
    return figure


def importance_chart(importance: pl.DataFrame) -> go.Figure:
    """Return bars of how much the error grows without each input, weightiest on top.

    Args:
        importance: ``label, importance, sd`` (a share of the error; sd may be null), weightiest first.
    """
    shown = importance.head(3 * MOST)
    figure = go.Figure(
        go.Bar(
            x=shown["importance"],
            y=shown["label"].to_list(),
            customdata=[label(name) for name in shown["label"]],
            orientation="h",
            error_x={"type": "data", "array": shown["sd"].fill_null(0.0).to_list(), "color": OWN, "thickness": 1.5},
            marker_color=[FORECAST if value is not None and value > 0 else OWN for value in shown["importance"]],
            hovertemplate="%{customdata}: %{x:+.1%}<extra></extra>",
        )
    )
    figure = style(figure, height=100 + 26 * max(2, shown.height))
    figure.update_layout(showlegend=False, hovermode="closest")
    figure.update_xaxes(tickformat="+.0%", title_text="growth of the error when the input is exchanged")
    figure.update_yaxes(autorange="reversed", showgrid=False, **name_axis(shown["label"].to_list()))
    return figure
