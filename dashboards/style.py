"""The look of all charts, and how names and values from data get into them. Nothing here knows Streamlit.

Colours are distinguishable with the common colour-vision deficiencies and readable on a light and on a dark page, whose
own colours apply to text and background. A gap in the data is a gap in the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import plotly.graph_objects as go
import polars as pl

HISTORY = "#7a8896"
FORECAST = "#2f7fd1"
BAND = "47,127,209"
OBSERVED = "#2e9e6b"
ALARM = "#d5533b"
ALARM_BAND = "rgba(213,83,59,0.2)"
ACCENT = "#e0912f"
CYCLE = ("#2f7fd1", "#e0912f", "#2e9e6b", "#a065bd", "#d5533b", "#7a8896", "#b8912f", "#2fa3ac")
_DASHES = ("solid", "dash", "dot", "dashdot")  # where the colours begin anew
_PATTERNS = ("", "/", "x", ".")
GRID = "rgba(128,140,152,0.22)"
OWN = "#b4bcc4"
_AROUND_ONE = timedelta(hours=12)  # a library left to itself shows milliseconds
_SMALL = 0.01  # below it ticks are powers of ten: nobody reads -200\u00b5
_PANEL_NAME = 70  # characters of a name above a panel
_BESIDE = 9  # pixels of an upright axis that a character of its title takes


def style(figure: go.Figure, *, height: int = 380, title: str = "", y_title: str = "") -> go.Figure:
    """Give a figure the look of all charts and return it; titles are plain text, not markup."""
    figure.update_layout(
        height=height,
        title={"text": label(title, most=_PANEL_NAME), "font": {"size": 15}} if title else None,
        margin={"l": 10, "r": 10, "t": 46 if title else 16, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        hovermode="x unified",
        autotypenumbers="strict",  # a variate named 40 is a name, not a place on an axis
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
    if y_title:
        figure.update_yaxes(title_text=beside(y_title, height=height), selector=0)
    return figure


def short_name(name: str, most: int = 22) -> str:
    """Return a name for a tick; what tells names apart is as often at their end as at their beginning."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}\u2026{name[1 - half :]}"


def short_names(names: Iterable[object], most: int = 22) -> list[str]:
    """Return names for ticks, as short as tells them apart, if forty characters do."""
    full = [str(name) for name in names]
    while most < 40 and len({short_name(name, most) for name in full}) < len(set(full)):
        most += 3
    return [short_name(name, most) for name in full]


def label(name: object, *, most: int | None = None) -> str:
    """Return text for a figure, which takes tags for markup; shortened to ``most`` characters before it is escaped."""
    text = str(name) if most is None else short_name(str(name), most)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def beside(name: object, *, height: int) -> str:
    """Return a name as the title of an upright axis, which cuts what is longer than the chart is high."""
    return label(name, most=max((height - 80) // _BESIDE, 12))


def panel_titles(names: Iterable[object]) -> list[str]:
    """Return what stands above panels of these names."""
    return [label(name, most=_PANEL_NAME) for name in names]


def name_axis(names: Sequence[object], *, most: int = 22) -> dict[str, Any]:
    """Return settings of an axis whose places are these names, shortened where they are drawn."""
    texts = [label(name) for name in short_names(names, most)]
    return {"type": "category", "tickmode": "array", "tickvals": [str(name) for name in names], "ticktext": texts}


def names_across(names: Sequence[object], *, room: int = 90, most: int = 22) -> dict[str, Any]:
    """Return ``name_axis`` for names side by side: all are drawn, slanted if they take over ``room`` characters."""
    axis = name_axis(names, most=most)
    longest = max(map(len, short_names(names, most)), default=0)
    slanted = longest * len(names) > room
    angle = {"tickangle": -60} if slanted else {"autotickangles": [0, -60]}  # a window may be narrower than thought
    return {**axis, **angle, "ticklabeloverflow": "allow", "automargin": True}


def extra_height(axis: Mapping[str, Any]) -> int:
    """Return the pixels that slanted names of ``names_across`` take from a figure."""
    return 6 * max(map(len, axis["ticktext"]), default=0) if "tickangle" in axis else 0


def value_axis(*values: pl.Series) -> dict[str, Any]:
    """Return settings of an axis for these values: powers of ten for tiny ones, room around a constant."""
    known = pl.concat([part.cast(pl.Float64).fill_nan(None).drop_nulls() for part in values]).to_numpy()
    if not len(known):
        return {}
    low, high = float(known.min()), float(known.max())
    settings: dict[str, Any] = {"exponentformat": "power"} if 0.0 < max(-low, high) < _SMALL else {}
    if low == high != 0.0:  # the library would draw 1e-6 at 0, between -1 and 1
        settings["range"] = [low - 0.5 * abs(low), low + 0.5 * abs(low)]
    return settings


def time_axis(times: pl.Series) -> dict[str, Any]:
    """Return settings of an axis over these times: a single one has room around it, and its own label."""
    only = times.drop_nulls().unique()
    if only.len() != 1 or not isinstance(only.dtype, pl.Datetime):
        return {}
    moment = only[0]
    return {"range": [moment - _AROUND_ONE, moment + _AROUND_ONE], "tickvals": [moment]}


def add_line(
    figure: go.Figure,
    times: pl.Series,
    values: pl.Series,
    *,
    name: str,
    line: Mapping[str, Any],
    row: int | None = None,
    **more: Any,
) -> None:
    """Add values as a line; one between two gaps, to which no line leads, is a dot.

    Args:
        figure: with panels below each other where ``row`` is given.
        times, values: of one length; null and NaN are gaps.
        name: in the legend, as plain text.
        line: its colour, width and dash.
        row: of the panel, from 1.
        more: of the trace.
    """
    place: dict[str, Any] = {} if row is None else {"row": row, "col": 1}
    known = values.is_not_null() & values.cast(pl.Float64).is_not_nan().fill_null(value=False)
    alone = known & ~known.shift(1, fill_value=False) & ~known.shift(-1, fill_value=False)
    shown = {"name": label(name, most=40), **more}
    figure.add_trace(go.Scatter(x=times.to_list(), y=values.to_list(), line=dict(line), **shown), **place)
    if alone.any():
        dots = {**shown, "showlegend": False, "hoverinfo": "skip"}
        marker = {"color": line["color"], "size": 5}
        x, y = times.filter(alone).to_list(), values.filter(alone).to_list()
        figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=marker, **dots), **place)


def place_map(names: Iterable[str]) -> dict[str, int]:
    """Return the place of each name in the order they come, by which ``line_of`` and ``bar_of`` tell them apart."""
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def line_of(place: int, **more: Any) -> dict[str, Any]:
    """Return the line of the name at a place: its colour, from the ninth on dashed too, and ``more`` of the line."""
    return {"color": CYCLE[place % len(CYCLE)], "dash": _DASHES[place // len(CYCLE) % len(_DASHES)], **more}


def bar_of(place: int) -> dict[str, Any]:
    """Return the marker of the bars of the name at a place: its colour, from the ninth on with a pattern."""
    pattern = _PATTERNS[place // len(CYCLE) % len(_PATTERNS)]
    return {"color": CYCLE[place % len(CYCLE)], "pattern": {"shape": pattern, "solidity": 0.4}}
