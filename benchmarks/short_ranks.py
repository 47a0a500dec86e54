"""Ranks of the short table over all of its sets, or of the long one, joined from the result files of its parts.

Usage: python benchmarks/short_ranks.py [--table long] --out benchmarks/results/short_ranks_DATE FILE.json [...]

The sets of ``benchmark/short`` and ``benchmark/long`` were measured in several sittings, each with a table of its own.
Here every set is ranked once (seeds averaged first, ties share their mean rank) and ranks are averaged over sets, for
models measured on all of them. A model that several files have on a set counts as the last of them has it. ``first or
level``: lowest of all, or with a seed within the range of the seeds of the lowest. Rows that choose their look-back
by the test rows ("best look-back") take no part. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from tsforge.core.atomic import atomic_file

PEERS = ("neuralforecast", "Darts", "statsforecast")


def read(paths: list[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the measured rows by data set and model; the season that names a seasonal naive is left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in paths:
        here: dict[str, dict[str, dict[str, Any]]] = {}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["status"] == "ok" and "best look-back" not in row["model"]:
                name = row["model"].split(":season_length")[0].split(":minutes")[0]  # as the config labels them
                here.setdefault(row["data"], {})[name] = row
        for data, rows in here.items():
            found.setdefault(data, {}).update(rows)
    return found


def ranked(sets: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one record a model that every set has, best first."""
    models = [name for name in next(iter(sets.values())) if all(name in rows for rows in sets.values())]
    records: dict[str, dict[str, Any]] = {name: {"model": name, "ranks": {}, "first": 0, "level": 0} for name in models}
    for data, rows in sets.items():
        ranks = rankdata([rows[name]["mse"] for name in models])
        lowest = min((rows[name] for name in models), key=lambda row: row["mse"])
        ceiling = max(lowest.get("mse_max") or lowest["mse"], lowest["mse"])
        for name, rank in zip(models, ranks, strict=True):
            records[name]["ranks"][data] = float(rank)
            records[name]["first"] += int(rows[name]["mse"] == lowest["mse"])
            floor = rows[name].get("mse_min") or rows[name]["mse"]
            records[name]["level"] += int(min(floor, rows[name]["mse"]) <= ceiling)
    for record in records.values():
        record["mean_rank"] = sum(record["ranks"].values()) / len(sets)
    return sorted(records.values(), key=lambda record: record["mean_rank"])


def page(
    records: list[dict[str, Any]], sets: dict[str, dict[str, dict[str, Any]]], files: list[Path], table: str
) -> str:
    """Return the table as text."""
    lines = [f"# The {table} table over {len(sets)} sets, {datetime.now(UTC):%Y-%m-%d}", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), "", f"Joined from {', '.join(f.name for f in files)}.", ""]
    lines += [f"| model | mean rank | first | first or level | {' | '.join(sets)} |", "|" + "---|" * (4 + len(sets))]
    for record in records:
        cells = [f"{sets[data][record['model']]['mse']:.3f} ({record['ranks'][data]:g})" for data in sets]
        lines.append(
            f"| {record['model']} | {record['mean_rank']:.2f} | {record['first']} | {record['level']} | "
            f"{' | '.join(cells)} |"
        )
    peers = [record for record in records if record["model"].startswith(PEERS)]
    lines += ["", f"Best peer by mean rank: {peers[0]['model']}, {peers[0]['mean_rank']:.2f}.", ""]
    lines += ["| set | auto | best peer | auto / best peer | seeds of that peer |", "|---|---|---|---|---|"]
    for data, rows in sets.items():
        best = min((row for name, row in rows.items() if name.startswith(PEERS)), key=lambda row: row["mse"])
        ours = rows["auto"]["mse"]
        seeds = "" if best.get("mse_min") is None else f"{best['mse_min']:.4f} to {best['mse_max']:.4f}"
        lines.append(
            f"| {data} | {ours:.4f} | {best['model']} {best['mse']:.4f} | {ours / best['mse']:.3f} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Join the files and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--table", choices=("short", "long"), default="short")
    given = parser.parse_args()
    sets = read(given.files)
    records = ranked(sets)
    with atomic_file(given.out.with_suffix(".json")) as path:
        path.write_text(json.dumps({"files": [f.name for f in given.files], "records": records}, indent=1) + "\n")
    with atomic_file(given.out.with_suffix(".md")) as path:
        path.write_text(page(records, sets, given.files, given.table), encoding="utf-8")


if __name__ == "__main__":
    main()
