"""Plots of a benchmark as inline SVG: no library, no network, colours by style sheet so that they follow the theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH = 760
_LABEL = 250
MARKS = ("circle", "square", "diamond", "triangle")


def rank_plot(rows: Sequence[tuple[str, str, float]], difference: float | None) -> str:
    """Return mean ranks as dots, best on top, with bars half a critical difference long to each side.

    Two models whose bars do not overlap differ at the 5 % level.

    Args:
        rows: (name, role, mean rank), in order.
        difference: the critical difference, None where it cannot be told.
    """
    step, top = 24, 34
    height = top + step * len(rows) + 34
    reach = (difference or 0.0) / 2
    low, high = 1.0, max(float(len(rows)), 2.0)  # bars are cut at the first and the last rank there is

    def x(rank: float) -> float:
        return _LABEL + (rank - low) / (high - low) * (_WIDTH - _LABEL - 30)

    parts = [_open(_WIDTH, height, "Mean ranks, best on top")]
    for tick in range(int(np.ceil(low)), int(np.floor(high)) + 1):
        parts.append(_line(x(tick), top - 8, x(tick), height - 30, "grid"))
        parts.append(_text(x(tick), height - 14, str(tick), "tick", "middle"))
    for place, (name, role, rank) in enumerate(rows):
        y = top + step * place + 8
        parts.append(_text(_LABEL - 12, y + 4, _short(name, 34), f"name {role}", "end", title=name))
        if reach:
            parts.append(_line(x(max(rank - reach, low)), y, x(min(rank + reach, high)), y, f"bar {role}"))
        parts.append(f'<circle cx="{x(rank):.1f}" cy="{y}" r="5" class="dot {role}"><title>{rank:.2f}</title></circle>')
    parts.append(_text(_LABEL, 16, "mean rank (1 = best)", "axis", "start"))
    return "".join([*parts, "</svg>"])


def horizon_plot(horizons: Sequence[int], lines: Mapping[str, Sequence[float | None]]) -> str:
    """Return the MSE of each model against the horizon; the legend stands at the right in order of the last value.

    Args:
        horizons: steps, in order.
        lines: model -> MSE a horizon, None where it was not measured.
    """
    width, height, left, right, top = 520, 300, 52, 210, 16
    values = [value for line in lines.values() for value in line if value is not None]
    low, high = _span(values)

    def x(place: int) -> float:
        return left + 16 + place / max(len(horizons) - 1, 1) * (width - left - right - 32)

    def y(value: float) -> float:
        return height - 40 - (value - low) / (high - low) * (height - 40 - top)

    parts = [_open(width, height, "MSE against the horizon")]
    for tick in _ticks(low, high):
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:g}", "tick", "end"))
    for place, horizon in enumerate(horizons):
        parts.append(_text(x(place), height - 22, str(horizon), "tick", "middle"))
    parts.append(_text((left + width - right) / 2, height - 5, "horizon (steps)", "axis", "middle"))
    ends = {name: next((v for v in reversed(line) if v is not None), 0.0) for name, line in lines.items()}
    for order, name in enumerate(sorted(lines, key=lambda key: ends[key], reverse=True)):
        number = list(lines).index(name)
        points = [(x(place), y(value)) for place, value in enumerate(lines[name]) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" class="line c{number % 8}"><title>{escape(name)}</title></polyline>')
        parts += [_mark(a, b, number) for a, b in points]
        spot = top + 10 + 20 * order
        parts.append(_mark(width - right + 14, spot - 4, number))
        parts.append(_text(width - right + 26, spot, _short(name, 25), "legend", "start", title=name))
    return "".join([*parts, "</svg>"])


def cost_plot(points: Sequence[tuple[str, str, float, float]]) -> str:
    """Return error against seconds of a fit (logarithmic); the lower left is best.

    Args:
        points: (name, role, seconds, error relative to the reference).
    """
    width, height, left, top = _WIDTH, 340, 58, 20
    seconds = [max(point[2], 1e-3) for point in points]
    first, last = np.floor(np.log10(min(seconds, default=1.0))), np.ceil(np.log10(max(seconds, default=10.0)))
    last = max(last, first + 1)
    low, high = _span([point[3] for point in points])

    def x(value: float) -> float:
        return float(left + 20 + (np.log10(max(value, 1e-3)) - first) / (last - first) * (width - left - 190))

    def y(value: float) -> float:
        return height - 44 - (value - low) / (high - low) * (height - 44 - top)

    parts = [_open(width, height, "Error against seconds of a fit")]
    for tick in _ticks(low, high):
        parts.append(_line(left, y(tick), width - 10, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:g}", "tick", "end"))
    for power in range(int(first), int(last) + 1):
        parts.append(_line(x(10.0**power), top, x(10.0**power), height - 40, "grid"))
        parts.append(_text(x(10.0**power), height - 24, f"{10.0**power:g}", "tick", "middle"))
    parts.append(_text((left + width) / 2 - 80, height - 5, "seconds of a fit (mean)", "axis", "middle"))
    parts.append(_text(left - 44, 12, "MSE / ridge+IN", "axis", "start"))
    if low < 1.0 < high:
        parts.append(_line(left, y(1.0), width - 10, y(1.0), "reference"))
    taken: list[tuple[float, float]] = []
    for name, role, spent, error in sorted(points, key=lambda point: point[3]):
        a, b = x(spent), y(error)
        label = b + 4
        while any(abs(label - other) < 13 and abs(a - place) < 200 for place, other in taken):
            label -= 13
        taken.append((a, label))
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" class="dot {role}"><title>{escape(name)}</title></circle>'
        )
        if abs(label - b - 4) > 1:
            parts.append(_line(a + 5, b, a + 9, label - 4, "leader"))
        parts.append(_text(a + 11, label, _short(name, 28), f"legend {role}", "start", title=name))
    return "".join([*parts, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-6)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    size = 10.0 ** np.floor(np.log10(raw))
    step = next(float(size * factor) for factor in (1, 2, 5, 10) if size * factor >= raw)
    return [round(step * k, 10) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _open(width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" style="max-width:{width}px">'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str, *, title: str = "") -> str:
    hint = f"<title>{escape(title)}</title>" if title and title != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}{hint}</text>'


def _mark(x: float, y: float, number: int) -> str:
    kind = MARKS[number % len(MARKS)]
    style = f'class="mark c{number % 8}"'
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'
    shape = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
        "triangle": [(0, -5), (5, 4), (-5, 4)],
    }[kind]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shape)
    return f'<polygon points="{points}" {style}/>'


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
