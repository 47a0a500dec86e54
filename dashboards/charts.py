"""Charts of forecasts, anomalies and stored values: from tables to figures. Nothing here knows Streamlit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from dashboards.style import (
    ACCENT,
    ALARM,
    ALARM_BAND,
    BAND,
    CYCLE,
    FORECAST,
    HISTORY,
    OBSERVED,
    add_line,
    beside,
    extra_height,
    label,
    name_axis,
    names_across,
    panel_titles,
    style,
    time_axis,
    value_axis,
)

MOST_ROWS = 40  # series of a heat map whose names do not overlap
_ACROSS = 16  # columns of a table whose cells have room for a share


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
                mode="lines",  # few points would be drawn as markers on the edges
                fill="toself",
                fillcolor=f"rgba({BAND},{min(shade, 0.45):.2f})",
                line={"width": 0},
                name=f"{coverage:.0%} interval",
                hoverinfo="skip",
            )
        )
    add_line(figure, history["time"], history["value"], name="history", line={"color": HISTORY})
    figure.add_trace(
        go.Scatter(
            x=table["time"].to_list(),
            y=table["mean"].to_list(),
            name="forecast",
            line={"color": FORECAST, "width": 2.4},
        )
    )
    drawn = [history["value"], table["mean"], *(table[name] for pair in pairs for name in pair[:2])]
    if actual is not None and actual.height:
        line = {"color": OBSERVED, "width": 2, "dash": "dot"}
        add_line(figure, actual["time"], actual["value"], name="what happened", line=line)
        drawn.append(actual["value"])
    if table.height:
        figure.add_vline(x=table["cutoff"][0], line_width=1, line_dash="dash", line_color=HISTORY)
    figure.update_yaxes(**value_axis(*drawn))
    return style(figure, height=440, y_title=variate)


def components_chart(components: pl.DataFrame) -> go.Figure:
    """Return one panel per additive component of a forecast; columns ``time, component, value``."""
    names = components["component"].unique(maintain_order=True).to_list()
    parts = {name: components.filter(pl.col("component") == name).sort("time") for name in names}
    return _panels({name: (part["time"], part["value"]) for name, part in parts.items()})


def series_chart(values: pl.DataFrame, *, columns: Sequence[str]) -> go.Figure:
    """Return one panel per column of a wide table with a ``time`` column: each has its own scale."""
    return _panels({name: (values["time"], values[name]) for name in columns})


def _panels(lines: Mapping[str, tuple[pl.Series, pl.Series]]) -> go.Figure:
    """Return lines below each other over one time axis, the name of each above it."""
    count = max(len(lines), 1)
    height = 60 + 140 * count
    figure = make_subplots(
        rows=count, cols=1, shared_xaxes=True, subplot_titles=panel_titles(lines), vertical_spacing=34 / height
    )
    for row, (name, (times, values)) in enumerate(lines.items(), start=1):
        line = {"color": CYCLE[(row - 1) % len(CYCLE)], "width": 1.5}
        add_line(figure, times, values, name=name, line=line, row=row, showlegend=False)
        figure.update_yaxes(**value_axis(values), row=row, col=1)
        figure.update_xaxes(**time_axis(times), row=row, col=1)
    figure = style(figure, height=height)
    figure.update_layout(margin={"t": 30}, hovermode="x")
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    return figure


def anomaly_timeline(
    values: pl.DataFrame, scores: pl.DataFrame, events: pl.DataFrame, *, variate: str = "", score_name: str = "score"
) -> go.Figure:
    """Return values above scores with their threshold; events are shaded over both.

    Args:
        values: columns ``time, value`` and, where the model said something about them, ``expected``.
        scores: columns ``time, score, threshold``.
        events: columns ``start, end, event_id``.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    add_line(figure, values["time"], values["value"], name=variate or "value", line={"color": HISTORY}, row=1)
    drawn = [values["value"]]
    if "expected" in values.columns:
        line = {"color": FORECAST, "width": 1.2, "dash": "dot"}
        add_line(figure, values["time"], values["expected"], name="expected", line=line, row=1)
        drawn.append(values["expected"])
    add_line(figure, scores["time"], scores["score"], name=score_name, line={"color": CYCLE[3]}, row=2)
    if "threshold" in scores.columns:
        line = {"color": ACCENT, "dash": "dash", "width": 1.2}
        add_line(figure, scores["time"], scores["threshold"], name="threshold", line=line, row=2)
    for event in events.iter_rows(named=True):
        # a one-step event has no width: the line keeps it visible at any zoom
        figure.add_vrect(
            x0=event["start"], x1=event["end"], fillcolor=ALARM_BAND, line={"color": ALARM, "width": 1.2}, layer="below"
        )
    figure.update_yaxes(title_text=beside(variate, height=330), **value_axis(*drawn), row=1, col=1)
    figure.update_yaxes(title_text=score_name, row=2, col=1)
    if scores.height and (scores["score"].max() or 0) > 50 * max(float(scores["score"].median() or 0), 1e-9):  # type: ignore[arg-type,operator]
        figure.update_yaxes(type="log", row=2, col=1)
    return style(figure, height=520)


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
    figure.update_xaxes(title_text="standard deviations")
    figure.update_yaxes(**name_axis([item["variate"] for item in ranked]))
    return style(figure, height=130 + 28 * len(ranked), title="Which variates are strange")


def with_gaps(report: pl.DataFrame, most: int = MOST_ROWS) -> pl.DataFrame:
    """Return the rows of the series that ``null_share_chart`` has room for: all, or those that lack most, in order."""
    if report["series_id"].n_unique() <= most:
        return report
    lacking = report.group_by("series_id", maintain_order=True).agg(pl.col("null_share").max())
    lacking = lacking.filter(pl.col("null_share") > 0).sort("null_share", descending=True, maintain_order=True)
    return report.filter(pl.col("series_id").is_in(lacking["series_id"].head(most).implode()))


def null_share_chart(report: pl.DataFrame) -> go.Figure:
    """Return a heat map of missing cells with their shares; columns ``series_id, column, null_share``.

    The scale ends at the largest share, but not below 5 %: a rare gap must not look like an empty column.
    """
    wide = report.pivot(on="column", index="series_id", values="null_share", aggregate_function="first")
    columns = [name for name in wide.columns if name != "series_id"]
    cells = [list(row) for row in wide.select(columns).iter_rows()]
    most = max((share for row in cells for share in row if share is not None), default=0.0)
    readable = len(columns) <= _ACROSS and wide.height * len(columns) <= 400
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=columns,
            y=wide["series_id"].to_list(),
            colorscale=[[0, "rgba(128,140,152,0.10)"], [0.001, "#f7e3c8"], [1, ALARM]],
            zmin=0,
            zmax=max(most, 0.05),
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2~%}" if readable else None,
            colorbar={"title": "missing", "tickformat": ".2~%", "len": 1, "nticks": 4},
            customdata=[[[label(series), label(name)] for name in columns] for series in wide["series_id"]],
            hovertemplate="%{customdata[0]} %{customdata[1]}: %{z:.2%}<extra></extra>",
        )
    )
    figure = style(figure, height=max(190, 90 + 34 * min(wide.height, 30)))
    figure.update_layout(hovermode="closest")
    across = names_across(columns)
    figure.update_layout(height=figure.layout.height + extra_height(across))
    figure.update_xaxes(showgrid=False, **across)
    figure.update_yaxes(showgrid=False, autorange="reversed", **name_axis(wide["series_id"].to_list()))
    return figure
