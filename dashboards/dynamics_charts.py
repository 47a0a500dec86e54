"""Charts of a reconstruction, from tables to plotly figures. Nothing here knows Streamlit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from dashboards.style import (
    ACCENT,
    ALARM,
    FORECAST,
    HISTORY,
    OBSERVED,
    bar_of,
    beside,
    label,
    line_of,
    panel_titles,
    style,
)

_SERIES = (("data", "data", HISTORY), ("free_run", "free run", FORECAST))
# both plotly's flat and its 3-D markers know these symbols
_SYMBOLS = {"stable": ("circle", OBSERVED), "saddle": ("diamond", ACCENT), "unstable": ("x", ALARM)}


def phase_chart(trajectory: pl.DataFrame, cycles: pl.DataFrame, *, variates: Sequence[str]) -> go.Figure:
    """Return the data beside the free run in the plane or space of two or three variates, with what attracts or repels.

    Args:
        trajectory: ``kind`` (data, free_run), ``step`` and the variates.
        cycles: one row a point of a fixed point or cycle: ``period, kind, modulus`` and the variates; rows without a
            place in these units are not drawn.
        variates: one, drawn against the step without cycles, or two or three.
    """
    figure = go.Figure()
    flat = len(variates) < 3
    axes = ("step", variates[0]) if len(variates) == 1 else tuple(variates)
    for kind, name, colour in _SERIES:
        part = trajectory.filter(pl.col("kind") == kind)
        if not _is_drawable(part, axes):  # the free run of a failed seed
            continue
        line = {"color": colour, "width": 1 if flat else 2}
        figure.add_trace(_points(part, axes, mode="lines", name=name, line=line, opacity=0.75))
    if len(variates) > 1:
        for kind, (symbol, colour) in _SYMBOLS.items():
            part = cycles.filter(pl.col("kind") == kind).drop_nulls(list(variates))
            if part.is_empty():
                continue
            text = [
                f"{_name(row['period'])}, {kind}, largest multiplier {row['modulus']:.4g}"
                for row in part.iter_rows(named=True)
            ]
            marker = {
                "symbol": symbol,
                "color": colour,
                "size": 12 if flat else 6,
                "line": {"color": "white", "width": 1},
            }
            figure.add_trace(
                _points(
                    part,
                    axes,
                    mode="markers",
                    name=_kind_name(kind, part),
                    marker=marker,
                    text=text,
                    hovertemplate="%{text}",
                )
            )
    _style(figure, height=560)
    if flat:
        figure.update_xaxes(title_text=label(axes[0], most=60))
        figure.update_yaxes(title_text=beside(axes[1], height=560))
    else:
        titles = {
            f"{axis}axis": {"title": {"text": label(name, most=22)}} for axis, name in zip("xyz", axes, strict=True)
        }
        # the default eye is so near that the axes in front are cut off
        figure.update_layout(
            scene={**titles, "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 1.1}, "center": {"z": -0.15}}}
        )
    return figure


def _name(period: int) -> str:
    return "fixed point" if period == 1 else f"cycle of {period} steps"


def _kind_name(kind: str, cycles: pl.DataFrame) -> str:
    points = cycles["period"] == 1
    what = "fixed point" if points.all() else "fixed point or cycle" if points.any() else "cycle"
    return f"{kind} {what}"


def _is_drawable(table: pl.DataFrame, axes: Sequence[str]) -> bool:
    """Return whether a row has a place on all axes."""
    finite = [pl.col(name).cast(pl.Float64).is_finite().fill_null(value=False) for name in axes]
    return not table.filter(*finite).is_empty()


def _points(table: pl.DataFrame, axes: Sequence[str], **style: Any) -> go.Scatter | go.Scatter3d:
    """Return a trace in the plane or in space; a value that is not finite is a gap."""
    values = {axis: _gaps(table[name]) for axis, name in zip("xyz", axes, strict=False)}
    return go.Scatter(**values, **style) if len(axes) == 2 else go.Scatter3d(**values, **style)


def _gaps(values: pl.Series) -> list[float | None]:
    plain = values.cast(pl.Float64).to_frame("value")
    return plain.select(pl.when(pl.col("value").is_finite()).then("value")).to_series().to_list()


def spectra_chart(spectra: pl.DataFrame, *, variates: Sequence[str]) -> go.Figure:
    """Return one panel a variate: shares of power of the data and of the free run, on a logarithmic scale.

    The axis begins at a hundredth of the data's least power.

    Args:
        spectra: ``variate, frequency, data, free_run``.
        variates: those drawn.
    """
    height = 60 + 190 * max(len(variates), 1)
    figure = make_subplots(
        rows=max(len(variates), 1),
        cols=1,
        shared_xaxes=True,
        subplot_titles=panel_titles(variates),
        vertical_spacing=34 / height,
    )
    named: set[str] = set()
    for row, variate in enumerate(variates, start=1):
        part = spectra.filter(pl.col("variate") == variate)
        for kind, name, colour in _SERIES:
            power = [value if value else None for value in _gaps(part[kind])]  # no logarithm of nothing
            if not any(power):
                continue
            figure.add_trace(
                go.Scatter(
                    x=part["frequency"].to_list(),
                    y=power,
                    name=name,
                    line={"color": colour},
                    showlegend=name not in named,
                ),
                row=row,
                col=1,
            )
            named.add(name)
        least = min((value for value in _gaps(part["data"]) if value), default=None)
        if least is not None:  # a free run at rest has rounding errors only: they would flatten the data
            figure.update_yaxes(range=[math.log10(least) - 2, 0.3], row=row, col=1)
    figure.update_yaxes(type="log", exponentformat="power", title_text="share of power")
    figure.update_xaxes(title_text="frequency (cycles per unit of time)", row=max(len(variates), 1), col=1)
    _style(figure, height=height)
    figure.update_layout(hovermode="x", margin={"t": 50})
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    return figure


def lyapunov_chart(seeds: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Return the Lyapunov exponents of each seed as groups of bars; a seed without exponents has none.

    Args:
        seeds: records with ``seed`` and ``lyapunov_spectrum``, falling, per unit of time.
    """
    figure = go.Figure()
    for index, row in enumerate(seeds):
        spectrum = row["lyapunov_spectrum"]
        figure.add_trace(
            go.Bar(
                x=list(range(1, len(spectrum) + 1)),
                y=list(spectrum),
                name=f"seed {row['seed']}",
                marker=bar_of(index),
            )
        )
    _style(figure, height=360)
    figure.add_hline(y=0, line_width=1, line_color=HISTORY)
    figure.update_xaxes(title_text="exponent", dtick=1 if _most(seeds) <= 20 else None)
    figure.update_yaxes(title_text="per unit of time")
    figure.update_layout(barmode="group", showlegend=True)
    return figure


def _most(seeds: Sequence[Mapping[str, Any]]) -> int:
    return max((len(row["lyapunov_spectrum"]) for row in seeds), default=0)


def trace_chart(traces: pl.DataFrame, *, figure_of: str, title: str, logarithmic: bool = False) -> go.Figure:
    """Return one figure of the training over the epochs, one line a seed.

    Args:
        traces: ``seed, epoch`` and the figure, null where it was not taken.
        figure_of: the column drawn.
        title: of its axis.
        logarithmic: for positive figures over several sizes; others begin at 0.
    """
    figure = go.Figure()
    for index, seed in enumerate(traces["seed"].unique(maintain_order=True)):
        part = traces.filter(pl.col("seed") == seed).drop_nulls(figure_of).sort("epoch")
        figure.add_trace(
            go.Scatter(
                x=part["epoch"].to_list(),
                y=_gaps(part[figure_of]),
                name=f"seed {seed}",
                line=line_of(index, width=1.5),
            )
        )
    _style(figure, height=360)
    figure.update_xaxes(title_text="epoch")
    if logarithmic:
        figure.update_yaxes(title_text=title, type="log", exponentformat="power")
    else:
        figure.update_yaxes(title_text=title, rangemode="tozero")
    figure.update_layout(showlegend=True, hovermode="x unified")
    return figure


def _style(figure: go.Figure, *, height: int) -> None:
    style(figure, height=height).update_layout(margin_t=30, hovermode="closest")
