"""Which score of residuals would one choose without the labels of a family, and what is it worth there?

Usage: python benchmarks/anomaly_choice.py --choose SUMMARY.json --grade SUMMARY.json --out benchmarks/results/NAME

Both files are ``summary.json`` of ``tsforge benchmark --task anomaly``: ``--choose`` of ``benchmark/anomaly_scores`` or
another set of scores (eight families), ``--grade`` of the same scores on families that no choice may look at (asd,
smd). Within a family every area is divided by that of the plain scorer that is best by it, chosen with hindsight; a
score is worth the geometric mean over families and both areas (AUC-PR, VUS-PR). The choice is made once from all
families of the first file and graded on the second. ``left out``: for each family of the first file, the choice from
the other seven and what it is worth there. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tsforge.core.atomic import atomic_file

AREAS = ("auc_pr", "vus_pr")
Rows = dict[str, dict[str, dict[str, Any]]]  # by family and method


def read(path: Path) -> Rows:
    """Return the graded rows of a summary."""
    found: Rows = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["auc_pr"] is not None:
            found.setdefault(row["family"], {})[row["method"]] = row
    return found


def worth(rows: Rows, method: str, families: Iterable[str]) -> float:
    """Return the geometric mean of the ratios of a model's areas to those of the best plain scorers."""
    ratios = [rows[family][method][f"{area}_ratio"] for family in families for area in AREAS]
    return float(np.exp(np.mean(np.log(ratios))))


def models(rows: Rows) -> list[str]:
    """Return the methods of models that every family has."""
    first = next(iter(rows.values()))
    return [
        name for name, row in first.items() if row["role"] == "model" and all(name in part for part in rows.values())
    ]


def best(rows: Rows, families: list[str]) -> str:
    """Return the method worth most over some families."""
    return max(models(rows), key=lambda name: worth(rows, name, families))


def bar(rows: Rows, family: str) -> dict[str, float]:
    """Return the best area of any plain scorer of a family, each by itself."""
    plain = [row for row in rows[family].values() if row["role"] == "baseline"]
    return {area: max(row[area] for row in plain) for area in AREAS}


def cells(row: dict[str, Any]) -> str:
    """Return both areas of a row."""
    return " / ".join(f"{row[area]:.3f}" for area in AREAS)


def table(rows: Rows, order: list[str]) -> list[str]:
    """Return a markdown table: a line a method, a column a family."""
    families = list(rows)
    lines = [f"| score | worth | {' | '.join(families)} |", "|" + "---|" * (2 + len(families))]
    lines += [f"| best plain scorer, by each area | 1 | {' | '.join(cells(bar(rows, f)) for f in families)} |"]
    for name in order:
        shown = " | ".join(cells(rows[family][name]) for family in families)
        lines.append(f"| {name} | {worth(rows, name, families):.3f} | {shown} |")
    return lines


def main() -> None:
    """Choose, grade and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--choose", required=True, type=Path)
    parser.add_argument("--grade", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    rows, kept = read(given.choose), read(given.grade)
    if shared := set(rows) & set(kept):
        parser.error(f"{', '.join(sorted(shared))} would be chosen and graded on")
    families = list(rows)
    order = sorted(models(rows), key=lambda name: -worth(rows, name, families))
    chosen = order[0]
    left_out = {}
    for family in families:
        name = best(rows, [other for other in families if other != family])
        left_out[family] = {"choice": name, "worth": worth(rows, name, [family])}
    lines = [f"# A score chosen on other families, {datetime.now(UTC):%Y-%m-%d}", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), "", "## The choice", "", *table(rows, order), ""]
    lines += [f"Chosen: **{chosen}**.", "", "## Its grade on families that took no part", "", *table(kept, order), ""]
    lines += ["## Left out", "", "| family | choice of the others | worth there |", "|---|---|---|"]
    lines += [f"| {family} | {item['choice']} | {item['worth']:.3f} |" for family, item in left_out.items()]
    average = float(np.exp(np.mean([np.log(item["worth"]) for item in left_out.values()])))
    lines += ["", f"Geometric mean over the families left out: {average:.3f}."]
    plain = {
        "chosen": chosen,
        "worth": {name: worth(rows, name, families) for name in order},
        "worth_on_the_others": {name: worth(kept, name, kept) for name in order},
        "left_out": left_out,
        "areas": {
            family: {name: {area: part[family][name][area] for area in AREAS} for name in order}
            for part in (rows, kept)
            for family in part
        },
        "best_plain": {family: bar(part, family) for part in (rows, kept) for family in part},
    }
    with atomic_file(given.out.with_suffix(".json")) as path:
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    with atomic_file(given.out.with_suffix(".md")) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
