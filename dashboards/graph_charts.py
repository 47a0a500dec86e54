"""Charts of graphs among variates: matrices as heat maps, weights as a network, what a forecast takes from whom."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import polars as pl

from dashboards.style import (
    ALARM,
    FORECAST,
    GRID,
    HISTORY,
    bar_of,
    extra_height,
    label,
    line_of,
    name_axis,
    names_across,
    short_name,
    style,
)

_READABLE = 12  # variates whose cells have room for numbers
_NARROW = 16  # characters of a name beside a small map
_PALE = "#eef1f4"
_ROOM = 0.12  # of the circle's radius, between an arrow and a name


def matrix_chart(
    cells: pl.DataFrame,
    *,
    value: str = "value",
    title: str = "",
    across: str = "",
    down: str = "",
    small: bool = False,
) -> go.Figure:
    """Return a heat map of one matrix; signed values are red below and blue above 0.

    Args:
        cells: ``row, column`` (names, in the order to draw) and ``value``.
        value: the column to draw.
        title: above the map.
        across, down: what columns and rows are.
        small: for narrow places, without a scale of colours.
    """
    rows, columns = (cells[name].unique(maintain_order=True).to_list() for name in ("row", "column"))
    found = {(row["row"], row["column"]): row[value] for row in cells.iter_rows(named=True)}
    values = [[found.get((a, b)) for b in columns] for a in rows]
    flat = [cell for row in values for cell in row if cell is not None]
    largest = max((abs(cell) for cell in flat), default=0.0) or 1.0
    signed = min(flat, default=0.0) < 0
    low = [[0, ALARM], [0.5, _PALE]] if signed else [[0, _PALE]]
    readable = max(len(rows), len(columns)) <= (_READABLE // 2 if small else _READABLE)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            text=[["" if cell is None else _number(cell, largest) for cell in row] for row in values],
            texttemplate="%{text}" if readable else None,
            colorscale=[*low, [1, FORECAST]],
            zmin=-largest if signed else 0.0,
            zmax=largest,
            xgap=2,
            ygap=2,
            customdata=[[[label(a), label(b)] for b in columns] for a in rows],
            hovertemplate="%{customdata[0]} from %{customdata[1]}<br>%{z:.3~g}<extra></extra>",
            colorbar={"len": 1, "thickness": 12},
            showscale=not small,
        )
    )
    figure = style(figure, height=150 + (34 if readable else 18) * len(rows), title=title)
    figure.update_layout(hovermode="closest")
    shown = {"showgrid": False, "tickfont": {"size": 11}, "type": "linear"}
    most = _NARROW if small else 22
    below = {**names_across(columns, room=30 if small else 90, most=most), "tickvals": list(range(len(columns)))}
    figure.update_layout(height=figure.layout.height + extra_height(below))
    figure.update_xaxes(title_text=across, **{**below, **shown})
    beside = {**name_axis(rows, most=most), "tickvals": list(range(len(rows)))}
    figure.update_yaxes(title_text=down, autorange="reversed", **{**beside, **shown})
    return figure


def _number(cell: float, most: float) -> str:
    """Return a cell to two digits; what rounds to nothing beside the largest is 0."""
    return "0" if abs(cell) < most / 200 else f"{cell:.2g}"


def network_chart(weights: pl.DataFrame, *, least: float) -> go.Figure:
    """Return arrows from the variate that gives to the one that receives, for weights of at least ``least`` in size.

    Args:
        weights: ``row`` (receives), ``column`` (gives), ``value``.
        least: share of the largest weight between two variates.
    """
    names = weights["row"].unique(maintain_order=True).to_list()
    angle = {name: math.pi / 2 - 2 * math.pi * place / len(names) for place, name in enumerate(names)}
    place = {name: (math.cos(found), math.sin(found)) for name, found in angle.items()}
    others = weights.filter(pl.col("row") != pl.col("column")).with_columns(pl.col("value").abs().alias("size"))
    most = max(others["size"].to_list(), default=0.0)
    figure = go.Figure(
        go.Scatter(
            x=[place[name][0] for name in names],
            y=[place[name][1] for name in names],
            mode="markers+text",
            text=[label(name, most=22) for name in names],
            hovertext=[label(name) for name in names],
            textposition=["top center" if place[name][1] >= 0 else "bottom center" for name in names],
            marker={"size": 14, "color": HISTORY},
            hoverinfo="text",
            showlegend=False,
        )
    )
    for row in others.filter(pl.col("size") >= least * most, pl.col("size") > 0).iter_rows(named=True):
        figure.add_annotation(**_arrow(place[row["column"]], place[row["row"]], row["value"], most))
    figure = style(figure, height=460)
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(visible=False, range=[-1.6, 1.6])
    figure.update_yaxes(visible=False, range=[-1.3, 1.3], scaleanchor="x")
    return figure


def _arrow(start: tuple[float, float], end: tuple[float, float], value: float, most: float) -> dict[str, Any]:
    """Return an arrow that keeps clear of both markers and of the one the other way."""
    run, rise = end[0] - start[0], end[1] - start[1]
    length = math.hypot(run, rise)
    along, side = (_ROOM * run / length, _ROOM * rise / length), (-0.03 * rise / length, 0.03 * run / length)
    return {
        "x": end[0] - along[0] + side[0],
        "y": end[1] - along[1] + side[1],
        "ax": start[0] + along[0] + side[0],
        "ay": start[1] + along[1] + side[1],
        "xref": "x",
        "yref": "y",
        "axref": "x",
        "ayref": "y",
        "text": "",
        "showarrow": True,
        "arrowhead": 3,
        "arrowwidth": 1 + 3 * abs(value) / most,
        "arrowcolor": FORECAST if value > 0 else ALARM,
        "opacity": 0.35 + 0.6 * abs(value) / most,
    }


def epochs_chart(weights: pl.DataFrame, *, most: int = 8) -> go.Figure:
    """Return lines over epochs of the cells whose largest and least value differ most.

    Args:
        weights: ``epoch, row`` (receives), ``column`` (gives), ``value``.
        most: lines.
    """
    keys = ["row", "column"]
    moved = weights.group_by(keys, maintain_order=True).agg((pl.col("value").max() - pl.col("value").min()).alias("by"))
    figure = go.Figure()
    for number, cell in enumerate(moved.sort("by", descending=True, maintain_order=True).head(most).to_dicts()):
        part = weights.filter(row=cell["row"], column=cell["column"]).sort("epoch")
        own = cell["row"] == cell["column"]
        figure.add_scatter(
            x=part["epoch"],
            y=part["value"],
            name=label(f"{short_name(cell['row'])} from {'itself' if own else short_name(cell['column'])}"),
            mode="lines+markers",
            line=line_of(number, width=2),
            marker={"size": 4},
        )
    figure = style(figure, height=320, y_title="weight")
    figure.update_xaxes(title_text="epoch")
    return figure


def contributions_chart(contributions: pl.DataFrame, *, variate: str) -> go.Figure:
    """Return stacked bars of what each variate gives to a variate at every step, and their sum as a line.

    Args:
        contributions: ``time, source, value`` of one receiving variate.
        variate: its name.
    """
    figure = go.Figure()
    for number, source in enumerate(contributions["source"].unique(maintain_order=True)):
        part = contributions.filter(pl.col("source") == source)
        name = label(f"{short_name(str(source))} (itself)" if source == variate else short_name(str(source)))
        figure.add_bar(x=part["time"], y=part["value"], name=name, marker=bar_of(number))
    total = contributions.group_by("time", maintain_order=True).agg(pl.col("value").sum())
    figure.add_scatter(
        x=total["time"], y=total["value"], name="network, whole", mode="lines", line={"color": HISTORY, "width": 2}
    )
    figure = style(figure, y_title=variate)
    figure.update_layout(barmode="relative", bargap=0.15)
    return figure


def kernel_chart(kernel: pl.DataFrame) -> go.Figure:
    """Return a heat map of the weights of an autoregression: columns ``lag, step, weight``."""
    wide = kernel.pivot("lag", index="step", values="weight").sort("step")
    lags = sorted((name for name in wide.columns if name != "step"), key=int, reverse=True)
    values = [[row[name] for name in lags] for row in wide.iter_rows(named=True)]
    most = max((abs(cell) for row in values for cell in row), default=1.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[int(name) for name in lags],
            y=wide["step"],
            colorscale=[[0, ALARM], [0.5, _PALE], [1, FORECAST]],
            zmin=-most,
            zmax=most,
            hovertemplate="step %{y} from %{x} rows back<br>weight %{z:.3~g}<extra></extra>",
            colorbar={"len": 1, "thickness": 12},
        )
    )
    figure = style(figure, height=min(560, 160 + 16 * wide.height), y_title="step ahead")
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title_text="rows before the last of the context", autorange="reversed", gridcolor=GRID)
    figure.update_yaxes(autorange="reversed")
    return figure
