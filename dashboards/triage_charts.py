"""Charts of the triage page and of model health, from tables; the look is that of ``style``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
    add_line,
    label,
    line_of,
    name_axis,
    panel_titles,
    short_names,
    style,
    value_axis,
)

OTHER_BAND = "rgba(224,145,47,0.16)"
_LOG_ABOVE = 50  # times the median: such a score leaves nothing to see on a linear axis


def event_chart(
    values: pl.DataFrame, scores: pl.DataFrame, event: Mapping[str, Any], others: pl.DataFrame | None = None
) -> go.Figure:
    """Return a panel a variate and one for the score below; the event is shaded red, other events orange.

    Args:
        values: ``time, variate, value`` and, if known, ``expected, low, high``; panels in the order of the variates.
        scores: ``time, score, threshold``; without rows there is no panel.
        event: ``start, end``.
        others: ``start, end`` of other events of the series.
    """
    names = values["variate"].unique(maintain_order=True).to_list()
    has_scores = scores.height > 0
    rows = max(len(names) + has_scores, 1)
    height = 80 + 145 * rows
    figure = make_subplots(
        rows=rows,
        cols=1,
        shared_xaxes=True,
        subplot_titles=panel_titles([*names, *(["score"] if has_scores else [])]),
        vertical_spacing=38 / height,
    )
    for row, name in enumerate(names, start=1):
        _variate(figure, values.filter(pl.col("variate") == name).sort("time"), row)
    if has_scores:
        _score(figure, scores.sort("time"), rows)
    for other in () if others is None else others.iter_rows(named=True):
        _shade(figure, other, OTHER_BAND, ACCENT)
    _shade(figure, event, ALARM_BAND, ALARM)
    figure = style(figure, height=height)
    figure.update_layout(margin={"t": 52}, legend={"y": 1.0 + 26 / height})
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    return figure


def _variate(figure: go.Figure, part: pl.DataFrame, row: int) -> None:
    """Draw value, expected value and the range of usual errors of one variate."""
    times, is_first = part["time"].to_list(), row == 1
    if "low" in part.columns and part["low"].count():
        for name, fill in (("low", None), ("high", "tonexty")):
            figure.add_trace(
                go.Scatter(
                    x=times,
                    y=part[name].to_list(),
                    mode="lines",
                    line={"width": 0},
                    fill=fill,
                    fillcolor=f"rgba({BAND},0.16)",
                    name="usual (99 % of quiet rows)",
                    legendgroup="usual",
                    showlegend=is_first and fill is not None,
                    hoverinfo="skip",
                ),
                row=row,
                col=1,
            )
    if "expected" in part.columns and part["expected"].count():
        line = {"color": FORECAST, "width": 1.4, "dash": "dot"}
        _line(figure, part["time"], part["expected"], "expected", line, row, legend=is_first)
    line = {"color": HISTORY, "width": 1.8}
    _line(figure, part["time"], part["value"], "observed", line, row, legend=is_first)
    drawn = [part[name] for name in ("value", "expected", "low", "high") if name in part.columns]
    figure.update_yaxes(**value_axis(*drawn), row=row, col=1)


def _score(figure: go.Figure, scores: pl.DataFrame, row: int) -> None:
    times = scores["time"]
    _line(figure, times, scores["score"], "score", {"color": CYCLE[3], "width": 1.8}, row)
    if scores["threshold"].count():
        _line(figure, times, scores["threshold"], "threshold", {"color": ACCENT, "dash": "dash", "width": 1.4}, row)
    known = scores["score"].drop_nulls().to_numpy()
    if known.size and known.max() > _LOG_ABOVE * max(float(np.median(known)), 1e-9):
        figure.update_yaxes(type="log", row=row, col=1)


def _line(
    figure: go.Figure,
    times: pl.Series,
    values: pl.Series,
    name: str,
    line: dict[str, Any],
    row: int,
    *,
    legend: bool = True,
) -> None:
    add_line(figure, times, values, name=name, line=line, row=row, legendgroup=name, showlegend=legend)


def _shade(figure: go.Figure, event: Mapping[str, Any], fill: str, edge: str) -> None:
    # a one-row event has no width: the line keeps it visible at any zoom
    figure.add_vrect(
        x0=event["start"], x1=event["end"], fillcolor=fill, line={"color": edge, "width": 1.2}, layer="below"
    )


def contribution_chart(variates: Sequence[Mapping[str, Any]], *, shown: int = 8) -> go.Figure:
    """Return bars of the first ``shown`` variates of an event, strongest on top; a diamond marks what others expect.

    Args:
        variates: ``variate, contribution`` (how far out, in standard deviations) and ``conditional`` (its share of the
            squared distance given all the others; drawn as its root), strongest first.
        shown: bars.
    """
    ranked = list(reversed(variates[:shown]))
    names = [str(item["variate"]) for item in ranked]
    figure = go.Figure(
        go.Bar(
            x=[float(item["contribution"]) for item in ranked],
            y=names,
            orientation="h",
            marker_color=ALARM,
            name="by itself",
            hovertemplate="%{x:.3g}",
        )
    )
    given = [item.get("conditional") for item in ranked]
    if any(value is not None for value in given):
        figure.add_trace(
            go.Scatter(
                x=[None if value is None else max(float(value), 0.0) ** 0.5 for value in given],
                y=names,
                mode="markers",
                marker={"symbol": "diamond", "size": 10, "color": HISTORY},
                name="given the others",
                hovertemplate="%{x:.3g}",
            )
        )
    figure = style(figure, height=150 + 28 * len(ranked))
    figure.update_layout(hovermode="y unified", margin={"t": 36})
    figure.update_xaxes(title_text="standard deviations", rangemode="tozero")
    figure.update_yaxes(**name_axis(names))
    return figure


def health_chart(history: pl.DataFrame, *, bound: float, shown: int = 8) -> go.Figure:
    """Return the alarm rate of each series over time as a multiple of the nominal rate (or as it is, without one).

    Args:
        history: ``series_id, time, rate, ratio`` of ``health_history``.
        bound: multiple from which a model counts as stale.
        shown: series with the largest value at the end; the others are left out.
    """
    name = "ratio" if history["ratio"].count() else "rate"
    last = history.sort("time").group_by("series_id").last().sort(name, descending=True, nulls_last=True)
    figure = go.Figure()
    drawn = last["series_id"].head(shown)
    for index, (series, short) in enumerate(zip(drawn, short_names(drawn, 28), strict=True)):
        part = history.filter(pl.col("series_id") == series).sort("time")
        figure.add_trace(
            go.Scatter(
                x=part["time"].to_list(),
                y=part[name].to_list(),
                name=label(short),
                line=line_of(index, width=1.8),
            )
        )
    if name == "ratio":
        for level, text, color in ((1.0, "nominal", HISTORY), (bound, "stale above", ALARM)):
            figure.add_hline(
                y=level,
                line={"color": color, "width": 1.2, "dash": "dash"},
                annotation={"text": text, "font": {"size": 12}},
                annotation_position="right",
            )
        figure.update_yaxes(ticksuffix=" x", rangemode="tozero")
    else:
        figure.update_yaxes(tickformat=".1%", rangemode="tozero")
    figure = style(figure, height=320, y_title="alarm rate / nominal" if name == "ratio" else "alarm rate")
    if name == "ratio":
        figure.update_layout(margin_r=92)  # the words stand beside the lines, where no curve crosses them
    return figure
