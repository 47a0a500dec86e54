"""Charts of forecasts as distributions: sample paths over a fan, and where observed values fell in their forecasts."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from dashboards.style import ALARM, FORECAST, GRID, style

_ACROSS = 2  # panels side by side: more have no room in a narrow window
PATH = "rgba(224,145,47,0.5)"


def add_paths(figure: go.Figure, paths: pl.DataFrame) -> go.Figure:
    """Draw sample paths over a fan and return the figure; they share one entry of the legend.

    Args:
        figure: of ``charts.fan_chart``.
        paths: columns ``path, time, value`` of one series, variate and cutoff.
    """
    for position, (_, path) in enumerate(paths.sort("time").group_by("path", maintain_order=True)):
        figure.add_trace(
            go.Scatter(
                x=path["time"].to_list(),
                y=path["value"].to_list(),
                name="sample paths",
                legendgroup="paths",
                showlegend=position == 0,
                mode="lines",
                line={"color": PATH, "width": 1},
                hoverinfo="skip",
            )
        )
    return figure


def pit_chart(pit: pl.DataFrame) -> go.Figure:
    """Return a histogram of PIT values for each group of steps, over all variates; a calibrated forecast is flat at 1.

    Args:
        pit: table of ``metrics.pit.pit_table`` of one model. Bars are as wide as the probabilities of their bin.
    """
    keys = ["first_step", "last_step"]
    bins = pit.group_by(*keys, "bin", "low", "high").agg(pl.col("count").sum()).sort(*keys, "bin")
    share = pl.col("count") / pl.col("count").sum().over(keys)
    bins = bins.with_columns((share / (pl.col("high") - pl.col("low"))).fill_nan(None).alias("density"))
    groups = list(bins.group_by(keys, maintain_order=True))
    titles = [f"step {first}" if first == last else f"steps {first} to {last}" for (first, last), _ in groups]
    lines = max(-(-len(groups) // _ACROSS), 1)
    figure = make_subplots(
        rows=lines,
        cols=min(max(len(groups), 1), _ACROSS),
        shared_xaxes=True,
        shared_yaxes="all",
        subplot_titles=titles,
        horizontal_spacing=0.03,
        vertical_spacing=0.2 / lines,
    )
    for place, (_, rows) in enumerate(groups):
        panel = {"row": place // _ACROSS + 1, "col": place % _ACROSS + 1}
        low, high = rows["low"], rows["high"]
        bars = go.Bar(
            x=((low + high) / 2).to_list(),
            y=rows["density"].to_list(),
            width=(high - low).to_list(),
            marker={"color": FORECAST, "line": {"color": GRID, "width": 1}},
            customdata=list(zip(low, high, rows["count"], strict=True)),
            hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:.2f} of what it should be "
            "(%{customdata[2]:.0f} values)<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(bars, **panel)
        figure.add_hline(y=1.0, line_width=1.2, line_dash="dash", line_color=ALARM, **panel)
    figure = style(figure, height=80 + 220 * lines)
    figure.update_layout(hovermode="closest", margin={"t": 34})
    figure.update_xaxes(range=[0, 1])
    figure.update_xaxes(title_text="forecast probability", row=lines)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="observed / nominal", col=1)
    return figure
