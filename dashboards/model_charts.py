"""Charts of what models learnt and how they were trained: from tables to figures. Nothing here knows Streamlit."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from dashboards.style import ACCENT, CYCLE, FORECAST, HISTORY, OWN, label, name_axis, panel_titles, short_name, style

_READABLE = 12  # variates of a coupling matrix whose cells have room for numbers
_CHARACTERS = 90  # of all names side by side


def observer_chart(observer: pl.DataFrame) -> go.Figure:
    """Return bars of the gain of each variate; columns ``variate`` (names), ``gain``."""
    figure = go.Figure(
        go.Bar(
            x=observer["gain"],
            y=observer["variate"].to_list(),
            customdata=[label(name) for name in observer["variate"]],
            orientation="h",
            marker_color=FORECAST,
            hovertemplate="%{customdata}<br>gain %{x:.3~g}<extra></extra>",
        )
    )
    figure.update_xaxes(range=[0, 1], title_text="0: only the model, 1: only the observation")
    figure.update_yaxes(autorange="reversed", **name_axis(observer["variate"].to_list()))
    return style(figure, height=150 + 28 * observer.height)


def history_chart(history: pl.DataFrame) -> go.Figure:
    """Return learning curves, one panel a quantity, training and validation together; columns ``epoch, name, value``.

    ``train_loss`` and ``valid_loss`` share the panel ``loss``; a name without such a beginning has its own.
    """
    names = history["name"].unique(maintain_order=True).to_list()
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(re.sub("^(train|valid)_", "", name), []).append(name)
    ordered = sorted(panels, key=lambda panel: (panel != "loss", -len(panels[panel]), panel))
    columns = min(max(len(ordered), 1), 3)
    rows = max(-(-len(ordered) // columns), 1)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=panel_titles(panel.replace("_", " ") for panel in ordered),
        vertical_spacing=0.28 / rows,
    )
    shown: set[str] = set()
    for place, panel in enumerate(ordered):
        for name in panels[panel]:
            part = history.filter(pl.col("name") == name).sort("epoch")
            kind = "training" if name.startswith("train_") else "validation" if name.startswith("valid_") else "value"
            color = {"training": FORECAST, "validation": ACCENT, "value": HISTORY}[kind]
            figure.add_trace(
                go.Scatter(
                    x=part["epoch"].to_list(),
                    y=part["value"].to_list(),
                    name=kind,
                    legendgroup=kind,
                    showlegend=kind not in shown,
                    mode="lines+markers",
                    line={"color": color},
                ),
                row=place // columns + 1,
                col=place % columns + 1,
            )
            shown.add(kind)
    figure = style(figure, height=40 + 230 * rows)
    figure.update_layout(margin={"t": 50}, legend={"y": 1.12})
    epochs = int(history["epoch"].n_unique())
    figure.update_xaxes(tick0=0, dtick=max(1, -(-epochs // 6)))
    figure.update_xaxes(title_text="epoch", row=rows)
    return figure


def kernels_chart(kernels: pl.DataFrame) -> go.Figure:
    """Return what state space layers remember: a panel a layer, a line for each of some features, over the lag.

    Args:
        kernels: columns ``layer, feature, lag, weight``; weights are drawn as shares of the largest of their feature.
    """
    layers = kernels["layer"].unique(maintain_order=True).to_list()
    figure = make_subplots(
        rows=len(layers), cols=1, subplot_titles=[f"layer {layer}" for layer in layers], vertical_spacing=0.14
    )
    for row, layer in enumerate(layers, start=1):
        chosen = kernels.filter(pl.col("layer") == layer)
        for index, feature in enumerate(chosen["feature"].unique(maintain_order=True)):
            line = chosen.filter(pl.col("feature") == feature).sort("lag")
            size = line["weight"].abs().max()
            weights = line["weight"] / size if size else line["weight"]
            figure.add_scatter(
                x=line["lag"],
                y=weights,
                name=f"feature {feature}",
                mode="lines",
                line={"color": CYCLE[index % len(CYCLE)], "width": 1.5},
                showlegend=False,
                row=row,
                col=1,
            )
    style(figure, height=80 + 210 * len(layers))
    figure.update_layout(margin_t=36)  # room for the first panel's title
    figure.update_xaxes(title_text="steps back", row=len(layers), col=1)
    return figure


def memory_chart(timescales: pl.DataFrame) -> go.Figure:
    """Return how far back each feature of each layer looks against its step size, both on logarithmic axes.

    Args:
        timescales: columns ``layer, feature, dt, memory`` (memory in steps of the data).
    """
    figure = go.Figure()
    for index, layer in enumerate(timescales["layer"].unique(maintain_order=True)):
        chosen = timescales.filter(pl.col("layer") == layer)
        figure.add_scatter(
            x=chosen["dt"],
            y=chosen["memory"],
            name=f"layer {layer}",
            mode="markers",
            marker={"color": CYCLE[index % len(CYCLE)], "size": 8, "opacity": 0.75},
            customdata=chosen["feature"],
            hovertemplate="feature %{customdata}: %{y:.0f} steps back, dt %{x:.3g}",
        )
    style(figure, height=320, y_title="effective memory (steps)")
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(type="log", title_text="step size dt")
    figure.update_yaxes(type="log")
    return figure


def coupling_chart(coupling: pl.DataFrame) -> go.Figure:
    """Return a heat map of how much one variate's last value (row) moves the forecast of another (column).

    What a variate does to itself is greyed: it is usually the largest, and would hide the others in the colours.

    Args:
        coupling: columns ``source, variate`` (names), ``effect``; one row a pair, in the order of the variates.
    """
    names = coupling["source"].unique(maintain_order=True).to_list()
    effects = {(row["source"], row["variate"]): row["effect"] for row in coupling.iter_rows(named=True)}
    others = [[None if a == b else effects.get((a, b)) for b in names] for a in names]
    own = [[effects.get((a, b)) if a == b else None for b in names] for a in names]
    most = max((value for row in others for value in row if value is not None), default=0.0)
    readable = len(names) <= _READABLE
    shape: dict[str, Any] = {
        "xgap": 2,
        "ygap": 2,
        "customdata": [[[label(a), label(b)] for b in names] for a in names],
        "texttemplate": "%{text}" if readable else None,
        "hovertemplate": "last value of %{customdata[0]}<br>moves the forecast of %{customdata[1]}<br>"
        "by %{z:.3~g}<extra></extra>",
        "hoverongaps": False,
    }
    figure = go.Figure(
        [
            go.Heatmap(
                z=others,
                text=_numbers(others, least=most / 100),
                colorscale=[[0, "#e6eef7"], [0.5, FORECAST], [1, "#123f73"]],
                zmin=0,
                zmax=most or 1.0,
                colorbar={"title": "effect", "len": 1, "exponentformat": "power"},
                **shape,
            ),
            go.Heatmap(z=own, text=_numbers(own), colorscale=[[0, OWN], [1, OWN]], showscale=False, **shape),
        ]
    )
    shown = [short_name(name) for name in names]
    longest = max(len(name) for name in shown)
    slanted = longest * len(names) > _CHARACTERS
    cell = 34 if readable else max(16, 440 // len(names))
    figure = style(figure, height=140 + cell * len(names) + (6 * longest if slanted else 0))
    figure.update_layout(hovermode="closest")
    size = 12 if len(names) <= 2 * _READABLE else 10
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": [label(name) for name in shown],
        "tickfont": {"size": size},
        "showgrid": False,
    }
    figure.update_xaxes(side="top", title_text="forecast of", tickangle=-60 if slanted else 0, **ticks)
    figure.update_yaxes(autorange="reversed", title_text="last value of", **ticks)
    return figure


def _numbers(rows: Sequence[Sequence[float | None]], least: float = 0.0) -> list[list[str]]:
    """Return what stands in the cells of a heat map; nothing below ``least``."""
    return [["" if value is None or value < least else f"{value:.2g}" for value in row] for row in rows]


def time_scales_chart(scales: pl.DataFrame, *, step: str, context: int, variates: int) -> go.Figure:
    """Return memory along time and, for coupled models, reach along variates: a row a layer, head and direction.

    A dot is the median over channels and states, its bar the middle 80 %; a diamond the median period of those that
    turn. Both axes are logarithmic. Dotted lines: the context, and the number of variates.

    Args:
        scales: columns ``layer, head, direction, period``, and ``memory, reach`` with ``_p10`` and ``_p90``.
        step: what one step of the data is, for the title.
        context: steps that a forecast reads.
        variates: how many there are.
    """
    coupled = scales["reach"].is_not_null().any()
    titles = [f"memory along time (steps of {step})", "reach along variates (number of variates)"]
    panels = (("memory", context), ("reach", variates))[: 1 + coupled]
    figure = make_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, subplot_titles=titles[: len(panels)], horizontal_spacing=0.08
    )
    table = scales.with_row_index("place")
    for index, head in enumerate(table["head"].unique(maintain_order=True)):
        chosen = table.filter(pl.col("head") == head)
        color = CYCLE[index % len(CYCLE)]
        for column, (name, _) in enumerate(panels, start=1):
            figure.add_scatter(
                x=chosen[name],
                y=chosen["place"],
                name=head,
                legendgroup=head,
                showlegend=column == 1,
                mode="markers",
                marker={"color": color, "size": 9},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": chosen[f"{name}_p90"] - chosen[name],
                    "arrayminus": chosen[name] - chosen[f"{name}_p10"],
                    "thickness": 2,
                    "width": 4,
                },
                customdata=chosen.select(f"{name}_p10", f"{name}_p90").rows(),
                hovertemplate="%{x:.3~g} (%{customdata[0]:.3~g} to %{customdata[1]:.3~g})<extra></extra>",
                row=1,
                col=column,
            )
        if chosen["period"].is_not_null().any():
            figure.add_scatter(
                x=chosen["period"],
                y=chosen["place"] + 0.3,  # below the dot, which may have the same value
                name=f"{head}: period",
                mode="markers",
                marker={"color": color, "size": 9, "symbol": "diamond-open", "line": {"width": 2}},
                hovertemplate="period %{x:.3~g}<extra></extra>",
                row=1,
                col=1,
            )
    style(figure, height=130 + 34 * table.height)
    figure.update_layout(margin_t=48, hovermode="closest")
    figure.update_layout(legend={"yref": "container", "y": 0, "yanchor": "bottom", "x": 0.5, "xanchor": "center"})
    figure.update_annotations(font={"size": 13})
    for column, (name, limit) in enumerate(panels, start=1):
        figure.add_vline(x=limit, line={"dash": "dot", "color": HISTORY, "width": 1.5}, row=1, col=column)
        ends = [f"{name}_p10", f"{name}_p90", *(["period"] if name == "memory" else [])]
        shown = [float(limit), *(value for end in ends for value in table[end].drop_nulls())]
        decades = [math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))]
        figure.update_xaxes(type="log", range=decades, dtick=1, showgrid=True, col=column, row=1)
    words = ("layer", "head", "direction") if table["direction"].n_unique() > 1 else ("layer", "head")
    labels = ["layer " + ", ".join(str(row[word]) for word in words) for row in table.iter_rows(named=True)]
    figure.update_yaxes(tickvals=table["place"].to_list(), ticktext=labels, range=[table.height - 0.4, -0.6])
    return figure
