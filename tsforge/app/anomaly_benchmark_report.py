"""What the anomaly benchmark says: a table a family, chance and the best plain scorer beside every method.

Areas are means over series; events are those of ``anomaly_benchmark_rules``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tsforge.app.anomaly_benchmark_data import LabelledFamily
from tsforge.app.anomaly_benchmark_rules import (
    EVENT_FACTS,
    RULES_HEAD,
    event_facts,
    false_events,
    rule_records,
    shown_rules,
)
from tsforge.app.benchmark_html import anchor, document, name_text, table
from tsforge.app.benchmark_report import number
from tsforge.core.markdown import as_text
from tsforge.metrics.significance import holm, wilcoxon

FEWEST_SERIES = 10  # below, no claim of significance
BEATS, NOT_BETTER = "beats the best baseline", "does not beat the best baseline"
_AREAS = ("auc_pr", "vus_pr")
RULES_NOTE = (
    "The same scores under other rules; rules.parquet has all methods. Normal rows inside events beside the share of "
    "alarms that a rule aims at (an event goes on after its last alarm); within 2x: on which share of series they are "
    "at most twice that."
)
_HEAD = (
    "method",
    "AUC-PR",
    "VUS-PR",
    "VUS-PR (ref.)",
    "/ best baseline",
    "p",
    "event P",
    "R",
    "F",
    "false events / day",
    "delay (rows)",
    "HitRate@100 / 150 %",
    "s / series",
    "",
)


def leaderboard(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return one record a family and method: families in their order, methods by the mean of both areas, best first.

    Returns:
        Records of ``family, method, role, series, runs, auc_pr, auc_pr_sd, vus_pr, vus_pr_sd, vus_pr_reference`` (means
        over series; sd over seeds), ``event_precision, event_recall, event_f1, false_events_per_day``,
        ``false_events_per_10k_rows, median_delay_rows, normal_alarm_rate, hit_rate_100, hit_rate_150, hit_chance``,
        ``auc_pr_ratio, vus_pr_ratio`` (to the best baseline by that area, on the same series), ``auc_pr_p, vus_pr_p``
        (Wilcoxon over at least 10 series, Holm over the methods of a family), ``verdict, failed, seconds``.
    """
    records: list[dict[str, Any]] = []
    for (family,), part in rows.group_by("family", maintain_order=True):
        ok = part.filter(pl.col("status") == "ok")
        methods = ok["method"].unique(maintain_order=True).to_list()
        found = [_record(str(family), method, ok.filter(method=method)) for method in methods]
        failed = part.filter(status="failed")
        by_label = {str(label): count for label, count in failed.group_by("method").len().iter_rows() if label != "all"}
        for record in found:
            record["failed"] = by_label.get(record["method"].rpartition(", ")[0], 0) + by_label.get(record["method"], 0)
        known = {str(record["method"]).rpartition(", ")[0] for record in found} | set(methods)
        for label, count in by_label.items():  # failed everywhere: still a line
            if label not in known:
                found.append({**_empty(str(family), label), "failed": count})
        _compare(found, ok)
        records += sorted(found, key=lambda item: -_order(item))
    return records


def _order(record: Mapping[str, Any]) -> float:
    if record["auc_pr"] is None:
        return -1.0
    return float(record["auc_pr"] + record["vus_pr"]) / 2.0


def _empty(family: str, method: str) -> dict[str, Any]:
    names = (
        *("auc_pr", "auc_pr_sd", "vus_pr", "vus_pr_sd", "vus_pr_reference", *EVENT_FACTS),
        *("hit_rate_100", "hit_rate_150", "hit_chance", "auc_pr_ratio", "vus_pr_ratio", "auc_pr_p", "vus_pr_p"),
    )
    about = {"family": family, "method": method, "role": "model", "series": 0, "runs": 0}
    return {**about, **dict.fromkeys(names), "verdict": "", "failed": 0, "seconds": None}


def _record(family: str, method: str, part: pl.DataFrame) -> dict[str, Any]:
    record = _empty(family, method)
    record |= {"role": part["role"][0], "series": part["series"].n_unique(), "runs": part["seed"].n_unique()}
    seeds = part.group_by("seed", maintain_order=True).agg(pl.col(*_AREAS, "vus_pr_reference").mean())
    for name in _AREAS:
        values = seeds[name].drop_nulls().to_numpy()
        record[name] = float(values.mean()) if values.size else None
        record[f"{name}_sd"] = float(values.std(ddof=1)) if values.size > 1 else None
    record["vus_pr_reference"] = _mean(seeds["vus_pr_reference"])
    record |= event_facts(part)
    listed = int(part["hit_events"].sum())
    if listed:
        for name, column in (("hit_rate_100", "hits_100"), ("hit_rate_150", "hits_150"), ("hit_chance", "hit_chance")):
            record[name] = float(part[column].sum()) / listed
    record["seconds"] = _mean(part["seconds"])
    return record


def _compare(found: list[dict[str, Any]], ok: pl.DataFrame) -> None:
    """Set ratios, p-values and verdicts against the best baseline, area by area, on the series both have."""
    areas = {
        method: {name: _by_series(ok.filter(method=method), name) for name in _AREAS}
        for method in ok["method"].unique(maintain_order=True).to_list()
    }
    baselines = [item for item in found if item["role"] == "baseline" and item["method"] != "random"]
    ours = [item for item in found if item["role"] == "model" and item["method"] in areas]
    for name in _AREAS:
        usable = [item for item in baselines if item[name] is not None]
        if not usable:
            continue
        best = areas[max(usable, key=lambda item: float(item[name]))["method"]][name]
        p_values = []
        for item in ours:
            mine = areas[item["method"]][name]
            shared = [series for series in mine if series in best]
            a, b = np.array([mine[series] for series in shared]), np.array([best[series] for series in shared])
            if shared and b.mean() > 0.0:
                item[f"{name}_ratio"] = float(a.mean() / b.mean())
            enough = len(shared) >= FEWEST_SERIES
            p_values.append(wilcoxon(-a, -b).p_value if enough else float("nan"))
        for item, p_value in zip(ours, holm(p_values), strict=True):
            item[f"{name}_p"] = float(p_value) if np.isfinite(p_value) else None
    for item in ours:
        ratios = [item[f"{name}_ratio"] for name in _AREAS]
        if None not in ratios:
            item["verdict"] = BEATS if min(ratios) > 1.0 else NOT_BETTER


def _by_series(part: pl.DataFrame, name: str) -> dict[str, float]:
    means = part.group_by("series", maintain_order=True).agg(pl.col(name).mean()).drop_nulls()
    return {str(series): float(value) for series, value in means.iter_rows()}


def _mean(values: pl.Series) -> float | None:
    seen = values.drop_nulls().to_numpy()
    return float(seen.mean()) if seen.size else None


# ---- pages


@dataclass(frozen=True)
class Measured:
    """What a report is made of: rows of the deployed rule, rows of further rules, and the families."""

    rows: pl.DataFrame
    ruled: pl.DataFrame
    families: tuple[LabelledFamily, ...]


def write_report(folder: Path, measured: Measured, about: Mapping[str, Any], name: str, width: int) -> None:
    """Write ``report.md`` and ``report.html`` into a folder."""
    records, rules = leaderboard(measured.rows), rule_records(measured.ruled)
    title = f"Anomaly benchmark: {name}"
    said = explanation(width)
    (folder / "report.md").write_text(_markdown(title, records, rules, measured, about, said), encoding="utf-8")
    (folder / "report.html").write_text(_page(title, records, rules, measured, about, said), encoding="utf-8")


def explanation(width: int) -> str:
    """Return one paragraph: what the columns are."""
    return (
        "One model a series, only test rows scored, one recipe for all families; nothing is chosen by test labels. "
        "Areas are means over series (deviation over seeds): AUC-PR is average precision, VUS-PR the variant tsb with "
        f"W = {width} and exact thresholds, (ref.) with the 250 thresholds of its reference; random is the chance "
        "level of each. '/ best baseline': ratios of both areas to the best baseline by that area; p: Wilcoxon over "
        f"series, corrected for the number of methods (Holm), given from {FEWEST_SERIES} series on. Events are of the "
        "deployed rule, pooled over series; delay: median rows from the start of a found event to its first alarm. "
        "HitRate: over all events that experts listed, variates ranked by their largest residual in the event."
    )


def _cells(record: Mapping[str, Any]) -> list[str]:
    ratios = [record["auc_pr_ratio"], record["vus_pr_ratio"]]
    p_values = [record["auc_pr_p"], record["vus_pr_p"]]
    hits = [record["hit_rate_100"], record["hit_rate_150"]]
    ending = str(record["verdict"])
    if record["failed"]:
        ending = f"{ending}{'; ' if ending else ''}{record['failed']} series failed"
    return [
        *(_spread(record[name], record[f"{name}_sd"]) for name in _AREAS),
        number(record["vus_pr_reference"]),
        _both(ratios, 2),
        _both(p_values, 3),
        *(number(record[name], 2) for name in ("event_precision", "event_recall", "event_f1")),
        false_events(record),
        number(record["median_delay_rows"], 0),
        _both(hits, 2),
        number(record["seconds"], 1),
        ending,
    ]


def _markdown(
    title: str,
    records: Sequence[Mapping[str, Any]],
    rules: Sequence[Mapping[str, Any]],
    measured: Measured,
    about: Mapping[str, Any],
    said: str,
) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [f"# {as_text(title)}", "", facts + ".", "", said]
    for family in measured.families:
        lines += ["", f"## {as_text(family.name)}", "", *[f"- {name}: {text}" for name, text in _facts(family)], ""]
        own = [record for record in records if record["family"] == family.name]
        if not own:
            lines.append("Nothing was measured.")
            continue
        lines += [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
        best = _best(own)
        for record in own:
            cells = _cells(record)
            for place, name in enumerate(_AREAS):
                if record[name] is not None and record[name] == best[name]:
                    cells[place] = f"**{cells[place]}**"
            lines.append(f"| {as_text(record['method'])} | {' | '.join(cells)} |")
        judged = shown_rules([item for item in rules if item["family"] == family.name], _ranked(own))
        if judged:
            lines += ["", f"### {as_text(family.name)}: further rules", "", RULES_NOTE, ""]
            lines += [f"| {' | '.join(RULES_HEAD)} |", "|" + "---|" * len(RULES_HEAD)]
            lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in judged]
    lines += ["", "## Failures", ""]
    lines += [f"- {name}: {text}" for name, text in _failures(measured)] or ["No job failed."]
    skipped = measured.rows.filter(status="skipped").height
    if skipped:
        lines.append(f"- {skipped} jobs were left out: the time budget was spent.")
    return "\n".join(lines) + "\n"


def _page(
    title: str,
    records: Sequence[Mapping[str, Any]],
    rules: Sequence[Mapping[str, Any]],
    measured: Measured,
    about: Mapping[str, Any],
    said: str,
) -> str:
    facts = " · ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in about.items())
    links = "".join(f'<a href="#{anchor(family.name)}">{escape(family.name)}</a>' for family in measured.families)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{facts}</p><p>{escape(said)}</p>',
        f'<nav>{links}<a href="#failures">Failures</a></nav>',
    ]
    for family in measured.families:
        own = [record for record in records if record["family"] == family.name]
        about_family = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(family))
        body.append(f'<h2 id="{anchor(family.name)}">{escape(family.name)}</h2><dl>{about_family}</dl>')
        best = _best(own)
        lines = []
        for record in own:
            cells = [escape(cell) for cell in _cells(record)]
            for place, name in enumerate(_AREAS):
                if record[name] is not None and record[name] == best[name]:
                    cells[place] = f'<span class="best">{cells[place]}</span>'
            tone = "good" if record["verdict"] == BEATS else "bad"
            cells[-1] = f'<span class="{tone}">{cells[-1]}</span>'
            lines.append((str(record["role"]), [name_text(str(record["method"])), *cells]))
        body.append(table(_HEAD, lines, last_is_text=True) if lines else "<p>Nothing was measured.</p>")
        judged = shown_rules([item for item in rules if item["family"] == family.name], _ranked(own))
        if judged:
            body.append(f"<h3>Further rules</h3><p>{escape(RULES_NOTE)}</p>")
            body.append(
                table(RULES_HEAD, [("model", [escape(cell) for cell in cells]) for cells in judged], last_is_text=False)
            )
    failures = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in _failures(measured))
    skipped = measured.rows.filter(status="skipped").height
    ending = f"<p>{skipped} jobs were left out: the time budget was spent.</p>" if skipped else ""
    body.append('<h2 id="failures">Failures</h2>' + (f"<ul>{failures}</ul>" if failures else "<p>No job failed.</p>"))
    return document(title, [*body, ending])


def _facts(family: LabelledFamily) -> list[tuple[str, str]]:
    series = family.series
    train, test = sum(len(item.train) for item in series), sum(len(item.test) for item in series)
    share = sum(int(item.labels.sum()) for item in series) / max(test, 1)
    facts = [
        ("what", family.about.title or "a folder of series"),
        ("series", f"{len(series)}, of {', '.join(str(n) for n in sorted({len(s.columns) for s in series}))} variates"),
        ("rows", f"{train:,} training, {test:,} test, {share:.1%} of these anomalous"),
    ]
    return facts + [("note", note) for note in family.notes]


def _failures(measured: Measured) -> list[tuple[str, str]]:
    """Return what failed and why: jobs, then rules of a job that went well."""
    jobs, rules = (part.filter(status="failed") for part in (measured.rows, measured.ruled))
    found = [
        (f"{row['family']} {row['series']} {row['method']}", str(row["error"])) for row in jobs.iter_rows(named=True)
    ]
    return found + [
        (f"{row['family']} {row['series']} {row['method']}, rule {row['rule']}", str(row["error"]))
        for row in rules.iter_rows(named=True)
    ]


def _ranked(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the models, and the plain scorer best by AUC-PR: the methods whose rules are shown."""
    plain = [item for item in records if item["role"] == "baseline" and item["auc_pr"] is not None]
    best = [max(plain, key=lambda item: float(item["auc_pr"]))["method"]] if plain else []
    return [str(item["method"]) for item in records if item["role"] == "model"] + best


def _best(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {
        name: max((record[name] for record in records if record[name] is not None), default=None) for name in _AREAS
    }


def _spread(value: float | None, deviation: float | None) -> str:
    return number(value) + (f" ± {deviation:.3f}" if deviation is not None else "")


def _both(values: Sequence[float | None], digits: int) -> str:
    shown = [number(value, digits) for value in values]
    return " / ".join(shown) if any(shown) else ""
