"""The benchmark report as one self-contained page: tables, plots, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np

from tsforge.app.benchmark_report import (
    BEST,
    NOT_BETTER,
    PLACE_HEAD,
    RANK_HEAD,
    Line,
    Rank,
    Report,
    Section,
    cell_text,
    last_text,
    left_out_text,
    lowest,
    number,
    place_rows,
    rank_note,
    verdicts,
)
from tsforge.app.benchmark_svg import cost_plot, horizon_plot, rank_plot

_LINES_SHOWN = 8
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#59636e;--rule:#d1d9e0;--tint:#f6f8fa;--grid:#e4e8ec;
--model:#0969da;--peer:#bc4c00;--baseline:#59636e;--good:#1a7f37;--bad:#b35900;
--c0:#0969da;--c1:#bc4c00;--c2:#1a7f37;--c3:#8250df;--c4:#bf3989;--c5:#1b7c83;--c6:#7d4e00;--c7:#59636e}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--rule:#3d444d;--tint:#151b23;
--grid:#262c36;--model:#4493f8;--peer:#f0883e;--baseline:#9198a1;--good:#3fb950;--bad:#e3a04f;
--c0:#4493f8;--c1:#f0883e;--c2:#3fb950;--c3:#ab7df8;--c4:#db61a2;--c5:#39c5cf;--c6:#d4a72c;--c7:#9198a1}}
body{margin:0 auto;max-width:1180px;padding:24px 20px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin:.2em 0}h2{margin:2em 0 .4em;padding-top:.4em;
border-top:1px solid var(--rule);font-size:1.25rem}
h3{font-size:1.02rem;margin:1.4em 0 .3em}.soft,figcaption{color:var(--soft);font-size:.9rem}
nav a{margin-right:.9em}a{color:var(--model)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.3em .65em;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th{background:var(--tint);color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child,td.text,th.text{text-align:left}td.text{white-space:normal;min-width:11em}
th:first-child{position:sticky;left:0}
td:first-child{position:sticky;left:0;background:var(--bg);min-width:11em;max-width:26em;white-space:normal;
overflow-wrap:break-word}
tr.baseline td:first-child{color:var(--baseline)}tr.peer td:first-child{color:var(--peer)}
tr.model td:first-child{color:var(--model)}tr.published td{color:var(--soft);background:var(--tint)}
.best{font-weight:700}.good{color:var(--good)}.bad{color:var(--bad)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em;margin:.4em 0 1em;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0}figure{margin:1em 0}
svg{width:100%;height:auto;display:block;font-size:12px;fill:var(--fg)}
svg .grid{stroke:var(--grid)}svg .tick,svg .axis{fill:var(--soft)}
svg .reference{stroke:var(--soft);stroke-dasharray:4 4}
svg .leader{stroke:var(--soft)}svg .bar{stroke-width:3;opacity:.45}svg .dot{stroke:var(--bg);stroke-width:1}
svg .line{fill:none;stroke-width:2}
"""
_ROLES = ("model", "peer", "baseline")


def page(report: Report) -> str:
    """Return the report as HTML that fetches nothing."""
    marks = "".join(
        f"svg .line.c{k},svg .bar.c{k}{{stroke:var(--c{k})}}svg .mark.c{k}{{fill:var(--c{k})}}" for k in range(8)
    )
    roles = "".join(
        f"svg .dot.{name},svg text.{name}{{fill:var(--{name})}}svg .bar.{name}{{stroke:var(--{name})}}"
        for name in _ROLES
    )
    facts = " · ".join(f"{escape(name)} {escape(str(value))}" for name, value in report.environment.items())
    links = "".join(f'<a href="#{escape(anchor(item.name))}">{escape(item.name)}</a>' for item in report.sections)
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="soft">{facts}</p>',
        "<p>Every test window, standardised units: MSE ± deviation over seeds / MAE. The lowest MSE of a column "
        "is bold. Published numbers are for orientation only: other code, other look-backs, known defects. Colours: "
        '<span style="color:var(--model)">models</span>, <span style="color:var(--peer)">peers</span>, '
        '<span style="color:var(--baseline)">baselines</span>.</p>',
        f'<nav><a href="#ranks">Ranks</a>{links}<a href="#failures">Failures and notes</a></nav>',
        _ranks(report),
        *(_section(section, report) for section in report.sections),
        _ending(report),
    ]
    return document(report.title, body, style=marks + roles)


def document(title: str, body: Sequence[str], *, style: str = "") -> str:
    """Return a whole page that fetches nothing; ``style`` is added to the style sheet."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    start = f"<title>{escape(title)}</title><style>{_STYLE}{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{start}</head><body>{"".join(body)}</body></html>\n'


def _ranks(report: Report) -> str:
    parts = ['<h2 id="ranks">Ranks</h2>', f"<p>{escape(rank_note(report))}</p>"]
    ranked = [(rank.name, rank.role, rank.mean_rank) for rank in report.ranks if rank.complete]
    if len(ranked) > 1:
        bars = " Bars: half a critical difference to each side; bars that do not overlap differ (Nemenyi, 5 %)."
        caption = "Mean rank of every model measured on all pairs." + (bars if report.difference is not None else "")
        parts.append(f"<figure>{rank_plot(ranked, report.difference)}<figcaption>{caption}</figcaption></figure>")
    if report.ranks:
        parts.append(table(RANK_HEAD, [_rank_row(rank) for rank in report.ranks], last_is_text=True))
        parts.append(
            '<p class="soft">MSE / ridge+IN: geometric mean over pairs against ridge+IN at its best look-back; wins: '
            "pairs below it; p: Wilcoxon over pairs against it, adjusted for the number of models (Holm).</p>"
        )
    against = place_rows(report)
    if against:
        parts.append("<h3>Against peers</h3>")
        cells = [("model", [escape(text) for text in row]) for row in against]
        parts.append(table(PLACE_HEAD, cells, last_is_text=True))
    points = [
        (rank.name, rank.role, rank.seconds, rank.ratio)
        for rank in report.ranks
        if np.isfinite(rank.ratio) and np.isfinite(rank.seconds) and rank.ratio < 1.6
    ]
    if len(points) > 1:
        left_out = sum(1 for rank in report.ranks if np.isfinite(rank.ratio) and rank.ratio >= 1.6)
        note = f" {left_out} with a ratio above 1.6 are not drawn." if left_out else ""
        parts += [
            "<h3>Error against cost</h3>",
            f"<figure>{cost_plot(points)}<figcaption>Lower left is better; dashed: ridge+IN, best look-back.{note}"
            "</figcaption></figure>",
        ]
    return "".join(parts)


def _rank_row(rank: Rank) -> tuple[str, list[str]]:
    tone = "bad" if rank.verdict == NOT_BETTER else "good"
    pairs = str(rank.cells) if rank.complete else f"{rank.cells} (some only)"
    cells = [
        name_text(rank.name),
        number(rank.mean_rank, 2),
        f"{rank.firsts} / {rank.level}",
        pairs,
        number(rank.ratio),
        str(rank.wins),
        number(rank.p_value),
        number(rank.seconds, 1),
        f'<span class="{tone}">{escape(rank.verdict)}</span>',
    ]
    return rank.role, cells


def _section(section: Section, report: Report) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in section.facts)
    means = ("mean MSE",) if section.with_mean else ()
    head = ("model", "L", *(f"h={h}" for h in section.horizons), *means, "s (fit)", "")
    best, known = lowest(section), verdicts(report)
    rows = [_row(section, line, best, last_text(line, known)) for line in section.lines]
    rows += [_row(section, line, [np.nan] * len(section.horizons), line.source) for line in section.published]
    parts = [f'<h2 id="{escape(anchor(section.name))}">{escape(section.name)}</h2><dl>{facts}</dl>']
    if section.left_out:
        parts.append(f"<p>{escape(left_out_text(section))}</p>")
    if not section.lines:
        return "".join(parts)
    parts.append(table(head, rows, last_is_text=True))
    chosen = _chosen(section.lines)
    if len(section.horizons) > 1 and chosen:
        lines = {line.name: [None if cell is None else cell[0] for cell in line.cells] for line in chosen}
        plot = horizon_plot(section.horizons, lines)
        parts.append(f"<figure>{plot}<figcaption>The {len(lines)} lowest, and ridge+IN.</figcaption></figure>")
    return "".join(parts)


def _chosen(lines: Sequence[Line]) -> list[Line]:
    """Return what a plot shows: the lowest means, and the reference in any case."""
    full = [line for line in lines if line.mean is not None]
    chosen = full[:_LINES_SHOWN]
    reference = [line for line in full if line.name.startswith("ridge+IN") and BEST in line.name and line not in chosen]
    return [*chosen[: _LINES_SHOWN - len(reference)], *reference]


def _row(section: Section, line: Line, best: Sequence[float], last: str) -> tuple[str, list[str]]:
    cells = []
    for cell, lowest_here in zip(line.cells, best, strict=True):
        text = escape(cell_text(cell))
        cells.append(f'<span class="best">{text}</span>' if cell is not None and cell[0] == lowest_here else text)
    tone = "bad" if last == NOT_BETTER or line.failed else "good" if line.role in ("model", "peer") else ""
    ending = f'<span class="{tone}">{escape(last)}</span>'
    means = [number(line.mean)] if section.with_mean else []
    return line.role, [name_text(line.name), line.look_back, *cells, *means, number(line.seconds, 1), ending]


def _ending(report: Report) -> str:
    failures = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in report.failures)
    parts = ['<h2 id="failures">Failures and notes</h2>']
    parts.append(
        f"<h3>{len(report.failures)} settings failed</h3><ul>{failures}</ul>"
        if failures
        else "<p>No setting failed.</p>"
    )
    if report.skipped:
        parts.append(f"<p>{report.skipped} settings were left out: the time budget was spent.</p>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*report.notes, *report.defects))
    if notes:
        parts.append(f"<h3>Notes</h3><ul>{notes}</ul>")
    return "".join(parts)


def name_text(name: str) -> str:
    """Return a name as HTML that may be broken where its parts end, and nowhere else if it has room."""
    return re.sub("[:=/]", r"\g<0><wbr>", escape(name))


def table(head: Sequence[str], rows: Sequence[tuple[str, list[str]]], *, last_is_text: bool) -> str:
    """Return a table whose rows are (role, cells as HTML); roles have colours."""
    final = len(head) - 1
    columns = "".join(
        f'<th class="text">{escape(name)}</th>' if last_is_text and place == final else f"<th>{escape(name)}</th>"
        for place, name in enumerate(head)
    )
    lines = []
    for role, cells in rows:
        inner = "".join(
            f'<td class="text">{cell}</td>' if last_is_text and place == final else f"<td>{cell}</td>"
            for place, cell in enumerate(cells)
        )
        lines.append(f'<tr class="{role}">{inner}</tr>')
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def anchor(name: str) -> str:
    """Return what a link calls the section of a name."""
    return "set-" + "".join(char if char.isalnum() else "-" for char in name)
