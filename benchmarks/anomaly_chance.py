"""What a uniform random score gets on labelled public data, by every metric: the level below which nothing was learnt.

Usage: python benchmarks/anomaly_chance.py --data FOLDER [--out RESULT_WITHOUT_ENDING] [--quick]

FOLDER holds ``anomaly/FAMILY/*_test.parquet`` with a 0/1 column ``label``. Only the labels are read. Means over series;
alarms of the random score: its highest 1 % of rows. Five draws each; W = 100.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, tell, write

from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import auc_pr, auc_roc, best_adjusted_f1, best_f1, event_score
from tsforge.metrics.headline import mean_of
from tsforge.metrics.range_based import range_score
from tsforge.metrics.vus import vus

FAMILIES = ("smd", "asd", "skab", "msl", "smap", "gecco", "tep")
ALARM_SHARE = 0.01
DRAWS = 5
PERCENTS = (0.0, 20.0, 50.0, 100.0)


def labels_of(folder: Path) -> list[np.ndarray]:
    """Return the labels of every series that has rows of both kinds."""
    found = [
        pl.read_parquet(path, columns=["label"])["label"].to_numpy() for path in sorted(folder.glob("*_test.parquet"))
    ]
    return [labels for labels in found if 0 < labels.sum() < labels.size]


def grades(labels: np.ndarray, seed: int) -> dict[str, float]:
    """Return all grades of one random score."""
    scores = np.random.default_rng(seed).uniform(size=labels.size)
    alarms = scores >= np.quantile(scores, 1.0 - ALARM_SHARE)
    events, near = event_score(labels, alarms), affiliation(labels, alarms)
    row = {"rate": float(labels.mean()), "AUC-PR": auc_pr(labels, scores), "AUC-ROC": auc_roc(labels, scores)}
    for variant in ("tsb", "2022"):
        volume = vus(labels, scores, variant=variant)
        row |= {f"VUS-PR {variant}": volume.pr, f"VUS-ROC {variant}": volume.roc}
    row["VUS-PR tsb, reference"] = vus(labels, scores, thresholds="reference").pr
    row["best F1"] = best_f1(labels, scores).f1
    adjusted = best_adjusted_f1(labels, scores, percents=PERCENTS).f1
    row |= {f"best PA%{k:g} F1": f1 for k, f1 in zip(PERCENTS, adjusted, strict=True)}
    return row | {
        "event recall": events.recall,
        "event precision": events.precision,
        "penalised precision": events.penalised_precision,
        "composite F1": events.composite_f1,
        "range F1 tsb": range_score(labels, alarms).f1,
        "affiliation precision": near.precision,
        "affiliation recall": near.recall,
        "affiliation F1": near.f1,
    }


def main() -> None:
    """Measure, write and print."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--data", type=Path, required=True)
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    given = arguments(__doc__)
    load = os.getloadavg()[0]
    table: dict[str, dict[str, Any]] = {}
    for family in FAMILIES[1:2] if given.quick else FAMILIES:
        series = labels_of(mine.data / "anomaly" / family)
        rows = [grades(labels, seed) for labels in series for seed in range(1 if given.quick else DRAWS)]
        table[family] = {"series": len(series), **mean_of(rows)}
        tell({"family": family} | table[family])
    about = describe(given, load)
    names = list(next(iter(table.values())))
    lines = heading("Anomaly metrics of a random score", about)
    lines += [
        "",
        f"Mean over series and {DRAWS} draws; W = 100, exact thresholds; alarms: the highest 1 % of rows.",
        "",
    ]
    lines += [f"| metric | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for name in names:
        cells = [str(row[name]) if name == "series" else f"{row[name]:.3f}" for row in table.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    write(given.out, {"about": about, "families": table}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
