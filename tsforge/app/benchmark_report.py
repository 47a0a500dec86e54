"""What a benchmark says: a table a data set beside published numbers, ranks over all of them, what it cost.

``Report`` holds the content; this module writes it as markdown, ``benchmark_html`` as a page with plots. The plots are
hand-made SVG, since plotting libraries belong to the dashboard and to tracking.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from tsforge.app.benchmark_config import BenchmarkConfig
from tsforge.app.benchmark_places import Entry, Place, places
from tsforge.app.benchmark_plan import HIDDEN, RIDGE_IN, Prepared
from tsforge.app.benchmark_sets import published_results
from tsforge.artifact import collect_provenance
from tsforge.core.markdown import as_text
from tsforge.metrics.ranking import better, critical_difference, friedman, mean_ranks
from tsforge.metrics.significance import holm, wilcoxon

BEST = "best"
NOT_BETTER = "does not beat ridge+IN"
RANK_HEAD = ("model", "mean rank", "first / level", "pairs", "MSE / ridge+IN", "wins", "p", "s (fit)", "verdict")
PLACE_HEAD = ("pair", "first", "best model (seeds)", "best peer (seeds)", "model / peer", "level with the first")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a data set's table; ``cells`` are (mse, mae, sd of mse) a horizon, None where nothing was measured.

    ``look_back`` and ``source`` are text; published lines hold no seconds; ``failed`` says that a cell is empty for it.
    """

    name: str
    role: str
    look_back: str
    cells: tuple[tuple[float, float | None, float | None] | None, ...]
    mean: float | None
    seconds: float | None
    runs: int
    source: str = ""
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A data set: facts as (name, text) pairs, horizons, measured and published lines, models the budget left out."""

    name: str
    facts: tuple[tuple[str, str], ...]
    horizons: tuple[int, ...]
    lines: tuple[Line, ...]
    published: tuple[Line, ...]
    left_out: tuple[str, ...] = ()

    @property
    def with_mean(self) -> bool:
        """Whether a mean over horizons says more than the one column."""
        return len(self.horizons) > 1


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A model over all data sets x horizons.

    Attributes:
        mean_rank: among the models that have every cell, plus this one where it lacks some.
        cells, complete: (data set, horizon) pairs it was measured on, and whether these are all.
        wins: pairs where its MSE is below that of ridge+IN at its best look-back.
        firsts, level: pairs where it is first, and where it is or its seeds do not tell it from the first.
        p_value: of a Wilcoxon test against ridge+IN over the pairs, adjusted for the number of models (Holm), NaN where
            undecidable.
        ratio: geometric mean of MSE / MSE of ridge+IN.
        seconds: mean seconds of a fit.
        verdict: empty for baselines.
    """

    name: str
    role: str
    mean_rank: float
    cells: int
    complete: bool
    wins: int
    firsts: int
    level: int
    p_value: float
    ratio: float
    seconds: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the two pages show."""

    title: str
    environment: dict[str, Any]
    sections: tuple[Section, ...]
    ranks: tuple[Rank, ...]
    places: tuple[Place, ...]
    num_cells: int
    friedman_p: float
    difference: float | None
    failures: tuple[tuple[str, str], ...]
    skipped: int
    notes: tuple[str, ...]
    defects: tuple[str, ...]


class RunSettings(Protocol):
    """What the environment of a run says of its settings."""

    @property
    def workers(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def seeds(self) -> int: ...


def environment(config: RunSettings) -> dict[str, Any]:
    """Return date, machine and versions of a run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{gpu + ' and ' if gpu else ''}{os.cpu_count()} {platform.machine()} cores",
        "workers": config.workers,
        "threads of a worker": config.threads if config.workers > 1 else torch.get_num_threads(),
        "seeds": config.seeds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tsforge": version("tsforge"),
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"] or "unknown",
        "load average": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }


def build_report(
    table: pl.DataFrame,
    rows: Sequence[Mapping[str, Any]],
    prepared: Sequence[Prepared],
    config: BenchmarkConfig,
    notes: Sequence[str],
) -> Report:
    """Return the content of the report.

    Args:
        table: one row a run.
        rows: one record a data set, horizon, model and look-back, seeds averaged.
        prepared: the data sets.
        config: what was asked.
        notes: what was assumed.
    """
    usable = [row for row in rows if row["lookback"] != HIDDEN]
    ranks, num_cells, friedman_p, difference = _ranking(usable)
    failed = table.filter(status="failed")
    failures = [
        (f"{row['data']} {row['model']} L={row['context_length']} h={row['horizon']}", str(row["error"]))
        for row in failed.iter_rows(named=True)
    ]
    seen = table["versions"].drop_nulls().unique().sort().to_list()
    about = {**environment(config), **({"peers": "; ".join(seen)} if seen else {})}
    names = [item.data.name for item in prepared]
    used = {name for data in names for row in published_results().of(data) for name in row.defects}
    return Report(
        title="Benchmark: " + (config.name or (", ".join(names) if len(names) < 5 else f"{len(names)} data sets")),
        environment=about,
        sections=tuple(_section(item, usable) for item in prepared),
        ranks=tuple(ranks),
        places=places(usable, [ranked_name(row) for row in usable]),
        num_cells=num_cells,
        friedman_p=friedman_p,
        difference=difference,
        failures=tuple(failures),
        skipped=table.filter(status="skipped").height,
        notes=tuple(notes),
        defects=tuple(f"{name}: {text}" for name, text in published_results().defects.items() if name in used),
    )


def write_report(
    folder: Path,
    table: pl.DataFrame,
    rows: Sequence[Mapping[str, Any]],
    prepared: Sequence[Prepared],
    config: BenchmarkConfig,
    notes: Sequence[str],
) -> None:
    """Write ``report.md`` and ``report.html`` into a folder."""
    from tsforge.app.benchmark_html import page

    report = build_report(table, rows, prepared, config, notes)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


def display(row: Mapping[str, Any]) -> str:
    """Return how a model is called over several data sets: with its look-back where one was stated."""
    return f"{row['model']}, L={row['lookback']}" if str(row["lookback"]).isdigit() else str(row["model"])


def ranked_name(row: Mapping[str, Any]) -> str:
    """Return how a model is called among the ranks: naive rows carry settings of their data set, one name over all."""
    if row["role"] == "baseline":
        naive = next((name for name in ("seasonal_naive", "drift") if row["model"].startswith(name)), None)
        if naive is not None:
            return naive
    return display(row)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a table, empty for none."""
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def cell_text(cell: tuple[float, float | None, float | None] | None) -> str:
    """Return ``mse ± sd / mae``."""
    if cell is None:
        return ""
    mse, mae, sd = cell
    spread = f" ± {sd:.3f}" if sd is not None and np.isfinite(sd) else ""
    return f"{mse:.3f}{spread}" + (f" / {mae:.3f}" if mae is not None else "")


def verdicts(report: Report) -> dict[str, str]:
    """Return the verdict of every model by its name."""
    return {rank.name: rank.verdict for rank in report.ranks}


def rank_note(report: Report) -> str:
    """Return one paragraph: what the ranks rest on and how far apart they must be."""
    if not report.num_cells:
        return "No data set and horizon has a result of every model: no ranks."
    lines = [
        f"Mean ranks by MSE over {report.num_cells} pair{'s' if report.num_cells != 1 else ''} of data set and horizon "
        "(1 = best, seeds averaged first). "
        "Horizons of one data set are not independent, so the tests below are optimistic.",
    ]
    if report.skipped:
        lines.append("Pairs where the time budget left out a model are not ranked.")
    if np.isfinite(report.friedman_p):
        lines.append(f"Friedman test that all rank alike: p = {report.friedman_p:.2g}.")
    if report.difference is not None:
        lines.append(
            f"Two mean ranks closer than {report.difference:.2f} (Nemenyi, 5 %) are not told apart by these data."
        )
    lines.append(
        "First / level: pairs where a model has the lowest mean / or a seed not above the highest of the first."
    )
    return " ".join(lines)


def markdown(report: Report) -> str:
    """Return the report as markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    lines = [
        f"# {as_text(report.title)}",
        "",
        facts + ".",
        "",
        "Every test window, standardised units, MSE ± deviation ",
    ]
    lines[-1] += (
        "over seeds / MAE; the lowest measured MSE of a column is bold. Published numbers are for orientation only."
    )
    lines += ["", "## Ranks", "", rank_note(report), ""]
    if report.ranks:
        lines += [f"| {' | '.join(RANK_HEAD)} |", "|" + "---|" * len(RANK_HEAD)]
        for rank in report.ranks:
            pairs = f"{rank.cells}{'' if rank.complete else ' (some only)'}"
            lines.append(
                f"| {as_text(rank.name)} | {number(rank.mean_rank, 2)} | {rank.firsts} / {rank.level} | {pairs} | "
                f"{number(rank.ratio)} | {rank.wins} | {number(rank.p_value)} | {number(rank.seconds, 1)} | "
                f"{rank.verdict} |"
            )
    lines += _markdown_places(report)
    for section in report.sections:
        lines += ["", f"## {as_text(section.name)}", "", *[f"- {name}: {text}" for name, text in section.facts], ""]
        if section.left_out:
            lines += [left_out_text(section), ""]
        if not section.lines:
            continue
        head = [*(f"h={h}" for h in section.horizons), *(["mean MSE"] if section.with_mean else [])]
        lines += [f"| model | L | {' | '.join(head)} | s (fit) | |", "|" + "---|" * (len(head) + 4)]
        best = lowest(section)
        for line in section.lines:
            cells = [
                f"**{cell_text(cell)}**" if cell is not None and cell[0] == best[place] else cell_text(cell)
                for place, cell in enumerate(line.cells)
            ]
            lines.append(_markdown_line(section, line, cells, last_text(line, verdicts(report))))
        for line in section.published:
            lines.append(_markdown_line(section, line, [cell_text(cell) for cell in line.cells], line.source))
    lines += ["", "## Failures", ""]
    lines += [f"- {name}: {text}" for name, text in report.failures] or ["No setting failed."]
    if report.skipped:
        lines.append(f"- {report.skipped} settings were left out: the time budget was spent.")
    if report.notes or report.defects:
        lines += ["", "## Notes", "", *[f"- {note}" for note in (*report.notes, *report.defects)]]
    return "\n".join(lines) + "\n"


def place_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row of ``PLACE_HEAD`` for each pair that peers were measured on."""
    found = []
    for place in report.places:
        ours, peer = place.best("model"), place.best("peer")
        if ours is None or peer is None:
            continue
        level = [name for name in place.level if name != place.first.name]
        shown = [_with_seeds(item) for item in (ours, peer)]
        ratio = number(ours.mse / peer.mse)
        found.append((f"{place.data}, h={place.horizon}", place.first.name, *shown, ratio, ", ".join(level)))
    return found


def _with_seeds(entry: Entry) -> str:
    spread = "" if entry.low == entry.high else f" ({number(entry.low, 4)} to {number(entry.high, 4)})"
    return f"{entry.name} {number(entry.mse, 4)}{spread}"


def _markdown_places(report: Report) -> list[str]:
    rows = place_rows(report)
    if not rows:
        return []
    table = [f"| {' | '.join(PLACE_HEAD)} |", "|" + "---|" * len(PLACE_HEAD)]
    return ["", "## Against peers", "", *table, *(f"| {' | '.join(row)} |" for row in rows)]


def lowest(section: Section) -> list[float]:
    """Return the lowest measured MSE of every horizon."""
    columns = zip(*(line.cells for line in section.lines), strict=True) if section.lines else ()
    return [min((cell[0] for cell in column if cell is not None), default=np.nan) for column in columns]


def last_text(line: Line, known: Mapping[str, str]) -> str:
    """Return what the last column says of a measured line: the verdict over all pairs, or that it failed here."""
    return "failed, see below" if line.failed else known.get(line.name, "")


def left_out_text(section: Section) -> str:
    """Return which models the time budget left out."""
    if not section.lines:
        return "Nothing was measured here: the time budget was spent."
    return f"Left out, since the time budget was spent: {', '.join(section.left_out)}."


def _markdown_line(section: Section, line: Line, cells: Sequence[str], last: str) -> str:
    name = as_text(line.name)
    shown = [*cells, *([number(line.mean)] if section.with_mean else [])]
    return f"| {name} | {line.look_back} | {' | '.join(shown)} | {number(line.seconds, 1)} | {last} |"


def _section(item: Prepared, rows: Sequence[Mapping[str, Any]]) -> Section:
    data, known = item.data, item.known
    own = [row for row in rows if row["data"] == data.name]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in own:
        groups.setdefault((row["model"], row["lookback"]), []).append(row)
    late = [group for group in groups.values() if {row["status"] for row in group} == {"skipped"}]
    lines = [_line(group, item.horizons) for group in groups.values() if group not in late]
    ordered = sorted(lines, key=lambda line: (line.mean is None, line.mean or 0.0, line.name))
    spans = " / ".join(f"{stop - start:,}" for start, stop in (data.splits.train, data.splits.valid, data.splits.test))
    facts = [("rows", f"{spans} (training / validation / test)"), ("variates", str(data.panel.num_targets))]
    facts.append(("season", f"{data.season} rows"))
    if known is not None:
        facts += [(name, str(getattr(known, name))) for name in ("frequency", "split", "source", "flaws")]
    return Section(
        name=data.name,
        facts=tuple(facts),
        horizons=item.horizons,
        lines=tuple(ordered),
        published=tuple(_published(data.name, item.horizons)),
        left_out=tuple(sorted(display(group[0]) for group in late)),
    )


def _line(rows: Sequence[Mapping[str, Any]], horizons: Sequence[int]) -> Line:
    by_horizon = {row["horizon"]: row for row in rows if row["mse"] is not None and row["status"] == "ok"}
    cells = [
        (row["mse"], row["mae"], row["mse_sd"]) if (row := by_horizon.get(horizon)) is not None else None
        for horizon in horizons
    ]
    lengths = sorted({row["context_length"] for row in rows})
    seconds = [row["fit_seconds"] for row in by_horizon.values() if row["fit_seconds"] is not None]
    full = all(cell is not None for cell in cells)
    return Line(
        name=display(rows[0]),
        role=rows[0]["role"],
        look_back=", ".join(map(str, lengths)),
        cells=tuple(cells),
        mean=float(np.mean([cell[0] for cell in cells if cell is not None])) if full else None,
        seconds=float(np.mean(seconds)) if seconds else None,
        runs=max((row["runs"] for row in rows), default=0),
        failed=any(row["status"] == "failed" for row in rows),
    )


def _published(name: str, horizons: Sequence[int]) -> list[Line]:
    lines = []
    for row in published_results().of(name):
        places = {horizon: place for place, horizon in enumerate(row.horizons)}
        mse, mae = row.mse.get(name), row.mae.get(name)
        cells = [
            (mse[places[h]], None if mae is None else mae[places[h]], None) if mse is not None and h in places else None
            for h in horizons
        ]
        mean = row.mean_mse.get(name)
        if mean is None and all(cell is not None for cell in cells):
            mean = float(np.mean([cell[0] for cell in cells if cell is not None]))
        if mean is None and all(cell is None for cell in cells):
            continue
        defects = f" [{', '.join(row.defects)}]" if row.defects else ""
        lines.append(
            Line(
                name=row.title,
                role="published",
                look_back="" if row.look_back is None else str(row.look_back),
                cells=tuple(cells),
                mean=mean,
                seconds=None,
                runs=0,
                source=row.source + defects,
            )
        )
    return lines


def _ranking(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Rank], int, float, float | None]:
    """Return ranks best first, the number of pairs, the Friedman p-value and the critical difference."""
    late = {(row["data"], row["horizon"]) for row in rows if row["status"] == "skipped"}
    pairs = [pair for pair in dict.fromkeys((row["data"], row["horizon"]) for row in rows) if pair not in late]
    roles: dict[str, str] = {}
    losses: dict[str, dict[Any, float]] = {}
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] != "ok" or row["mse"] is None or (row["data"], row["horizon"]) in late:
            continue
        name = ranked_name(row)
        roles[name] = row["role"]
        losses.setdefault(name, {})[row["data"], row["horizon"]] = row["mse"]
        seconds.setdefault(name, []).append(row["fit_seconds"])
    complete = [name for name, values in losses.items() if len(values) == len(pairs)]
    ridge = next((name for name in (f"{RIDGE_IN}, best look-back", RIDGE_IN) if name in losses), None)
    standing = places(rows, [ranked_name(row) for row in rows])
    found = []
    for name, values in losses.items():
        own = [pair for pair in pairs if pair in values]
        names = [*dict.fromkeys([*complete, name])]
        table = np.array([[losses[other][pair] for other in names] for pair in own])
        ranks = dict(zip(names, mean_ranks(table), strict=True))
        wins, p_value, ratio, verdict = 0, np.nan, np.nan, ""
        if ridge is not None and all(pair in losses[ridge] for pair in own):
            ours, theirs = table[:, names.index(name)], np.array([losses[ridge][pair] for pair in own])
            wins, ratio = int(better(ours, theirs).sum()), float(np.exp(np.mean(np.log(ours / theirs))))
            p_value = wilcoxon(ours, theirs).p_value if name != ridge and len(own) > 5 else np.nan
            if roles[name] != "baseline" and ridge in ranks:
                verdict = "beats ridge+IN" if ranks[name] < ranks[ridge] else NOT_BETTER
        found.append(
            Rank(
                name=name,
                role=roles[name],
                mean_rank=float(ranks[name]),
                cells=len(own),
                complete=len(own) == len(pairs),
                wins=wins,
                firsts=sum(place.first.name == name for place in standing),
                level=sum(name in place.level for place in standing),
                p_value=p_value,
                ratio=ratio,
                seconds=float(np.mean(seconds[name])),
                verdict=verdict,
            )
        )
    table = np.array([[losses[name][pair] for name in complete] for pair in pairs]).reshape(len(pairs), len(complete))
    difference = critical_difference(len(complete), len(pairs)) if len(complete) > 1 and len(pairs) > 1 else None
    adjusted = holm([rank.p_value for rank in found])
    found = [replace(rank, p_value=float(value)) for rank, value in zip(found, adjusted, strict=True)]
    ordered = sorted(found, key=lambda rank: (not rank.complete, rank.mean_rank, rank.name))
    return ordered, len(pairs) if complete else 0, friedman(table).p_value if complete else np.nan, difference
