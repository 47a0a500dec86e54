"""Charts from tables. Nothing here knows Streamlit; every function takes polars tables and returns a plotly figure.

Colours are distinguishable with the common colour-vision deficiencies and readable on a light and on a dark page, whose
own colours apply to text and background. A gap in the data is a gap in the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

HISTORY = "#7a8896"
FORECAST = "#2f7fd1"
BAND = "47,127,209"
OBSERVED = "#2e9e6b"
ALARM = "#d5533b"
ALARM_BAND = "rgba(213,83,59,0.2)"
ACCENT = "#e0912f"
CYCLE = ("#2f7fd1", "#e0912f", "#2e9e6b", "#a065bd", "#d5533b", "#7a8896", "#b8912f", "#2fa3ac")
GRID = "rgba(128,140,152,0.22)"
OWN = "#b4bcc4"
_READABLE = 12  # variates of a coupling matrix whose cells have room for numbers
_CHARACTERS = 90  # of all names side by side
_SMALL = 0.01  # below it ticks are powers of ten: nobody reads -200\u00b5


def style(figure: go.Figure, *, height: int = 380, title: str = "", y_title: str = "") -> go.Figure:
    """Give a figure the look of all charts and return it."""
    figure.update_layout(
        height=height,
        title={"text": title, "font": {"size": 15}} if title else None,
        margin={"l": 10, "r": 10, "t": 46 if title else 16, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
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
                mode="lines",  # few points would be drawn as markers on the edges
                fill="toself",
                fillcolor=f"rgba({BAND},{min(shade, 0.45):.2f})",
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
                line={"color": OBSERVED, "width": 2, "dash": "dot"},
            )
        )
    if table.height and isinstance(table["cutoff"][0], datetime):
        figure.add_vline(x=table["cutoff"][0], line_width=1, line_dash="dash", line_color=HISTORY)
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
        rows=count, cols=1, shared_xaxes=True, subplot_titles=list(lines), vertical_spacing=34 / height
    )
    for row, (name, (times, values)) in enumerate(lines.items(), start=1):
        figure.add_trace(
            go.Scatter(
                x=times.to_list(),
                y=values.to_list(),
                name=name,
                showlegend=False,
                line={"color": CYCLE[(row - 1) % len(CYCLE)], "width": 1.5},
            ),
            row=row,
            col=1,
        )
        if (values.abs().max() or 1.0) < _SMALL:  # type: ignore[operator]
            figure.update_yaxes(exponentformat="power", row=row, col=1)
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
    figure.add_trace(
        go.Scatter(
            x=values["time"].to_list(), y=values["value"].to_list(), name=variate or "value", line={"color": HISTORY}
        ),
        row=1,
        col=1,
    )
    if "expected" in values.columns:
        figure.add_trace(
            go.Scatter(
                x=values["time"].to_list(),
                y=values["expected"].to_list(),
                name="expected",
                line={"color": FORECAST, "width": 1.2, "dash": "dot"},
            ),
            row=1,
            col=1,
        )
    figure.add_trace(
        go.Scatter(x=scores["time"].to_list(), y=scores["score"].to_list(), name=score_name, line={"color": CYCLE[3]}),
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
            x0=event["start"], x1=event["end"], fillcolor=ALARM_BAND, line={"color": ALARM, "width": 1.2}, layer="below"
        )
    figure.update_yaxes(title_text=variate, row=1, col=1)
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
    return style(figure, height=130 + 28 * len(ranked), title="Which variates are strange")


def observer_chart(observer: pl.DataFrame) -> go.Figure:
    """Return bars of the gain of each variate; columns ``variate`` (names), ``gain``."""
    figure = go.Figure(
        go.Bar(
            x=observer["gain"],
            y=[short_name(name) for name in observer["variate"]],
            customdata=observer["variate"],
            orientation="h",
            marker_color=FORECAST,
            hovertemplate="%{customdata}<br>gain %{x:.3~g}<extra></extra>",
        )
    )
    figure.update_xaxes(range=[0, 1], title_text="0: only the model, 1: only the observation")
    figure.update_yaxes(autorange="reversed")
    return style(figure, height=150 + 28 * observer.height)


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
    return figure


def error_by_step(metrics: pl.DataFrame, *, metric: str, name: str = "") -> go.Figure:
    """Return one line per model over the forecast step; columns ``model, step`` and the metric (``name`` in words)."""
    figure = go.Figure()
    for index, model in enumerate(metrics["model"].unique(maintain_order=True).to_list()):
        part = metrics.filter(pl.col("model") == model).sort("step")
        figure.add_trace(
            go.Scatter(
                x=part["step"].to_list(),
                y=part[metric].to_list(),
                name=model,
                line={"color": CYCLE[index % len(CYCLE)]},
            )
        )
    figure.update_xaxes(title_text="steps ahead")
    return style(figure, y_title=name or metric)


def null_share_chart(report: pl.DataFrame) -> go.Figure:
    """Return a heat map of missing cells with their shares; columns ``series_id, column, null_share``.

    The scale ends at the largest share, but not below 5 %: a rare gap must not look like an empty column.
    """
    wide = report.pivot(on="column", index="series_id", values="null_share", aggregate_function="first")
    columns = [name for name in wide.columns if name != "series_id"]
    cells = [list(row) for row in wide.select(columns).iter_rows()]
    most = max((share for row in cells for share in row if share is not None), default=0.0)
    readable = wide.height * len(columns) <= 400
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
            colorbar={"title": "missing", "tickformat": ".0%", "len": 1},
            hovertemplate="%{y} %{x}: %{z:.2%}<extra></extra>",
        )
    )
    figure = style(figure, height=max(190, 90 + 34 * min(wide.height, 30)))
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return figure


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
        subplot_titles=[panel.replace("_", " ") for panel in ordered],
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
        "customdata": [[[a, b] for b in names] for a in names],
        "texttemplate": "%{text}" if readable else None,
        "textfont": {"size": 11},
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
    ticks = {"tickvals": list(range(len(names))), "ticktext": shown, "tickfont": {"size": size}, "showgrid": False}
    figure.update_xaxes(side="top", title_text="forecast of", tickangle=-60 if slanted else 0, **ticks)
    figure.update_yaxes(autorange="reversed", title_text="last value of", **ticks)
    return figure


def short_name(name: str, most: int = 22) -> str:
    """Return a name for a tick; what tells names apart is as often at their end as at their beginning."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}\u2026{name[1 - half :]}"


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
