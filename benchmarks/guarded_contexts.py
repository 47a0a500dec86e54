"""Do guarded contexts find more of long faults, and at what cost? Residuals of ``linear`` with and without a guard.

Usage: TSFORGE_DATA=FOLDER python benchmarks/guarded_contexts.py [--out PATH] [--quick]

Each series is fitted once (70 % of its training rows, as ``tsforge benchmark --task anomaly`` does) and its test rows
are judged by ``detect`` under two rules: as they are, and with values that raised an alarm hidden from later forecasts
for at most so many rows. Means over series; ``rows inside`` and ``normal rows`` are shares of anomalous and
normal rows in alarms (events without merging); seconds are those of ``detect`` alone.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
from _measure import arguments, describe, heading, write

from tsforge.anomaly.config import BudgetRule, DetectConfig, EventConfig, RollingQuantileRule, RuleConfig
from tsforge.app.anomaly_benchmark_data import LabelledSeries, read_family
from tsforge.app.anomaly_benchmark_run import Judgement, fit_series, grade_scores, run_recipe
from tsforge.core.config import validate
from tsforge.core.errors import DataError

FAMILIES = ("asd", "skab")
MODEL = {"name": "linear"}
SCORES: dict[str, dict[str, Any]] = {
    "mahalanobis, smoothed 0.1": {"joint": "mahalanobis", "smoothing": 0.1},
    "max_abs": {"joint": "max_abs"},
}
GUARDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "at most 20 rows": {"max_rows": 20},
    "at most 200 rows": {"max_rows": 200},
}
RULES: dict[str, RuleConfig] = {"budget": BudgetRule(), "1 % of rows": RollingQuantileRule(alpha=0.01)}


def judged(series: LabelledSeries, rule: str) -> list[dict[str, Any]]:
    """Return one record a score and guard."""
    judgement = Judgement(fit_share=0.7, rule=RULES[rule], events=EventConfig(), width=100)
    window = {"context_length": 32, "horizon": 1}
    artifact, _ = fit_series(series, {"model": MODEL, "window": window}, judgement, seed=0)
    records = []
    for score, plain in SCORES.items():
        for label, guard in GUARDS.items():
            calibration = {"min_scale_rows": 30, "min_rows": 50}
            config = validate(DetectConfig, {"score": plain, "guard": guard, "calibration": calibration})
            began = time.perf_counter()
            found = run_recipe(artifact, series, config, judgement)
            seconds = time.perf_counter() - began
            grades = grade_scores(found, series, judgement.width)
            shown = ("auc_pr", "vus_pr", "events", "found", "segments", "false_segments")
            record = {
                "family": series.family,
                "series": series.name,
                "rule": rule,
                "score": score,
                "guard": label,
                "seconds": seconds,
                "inside": float(found.flagged[series.labels].mean()) if series.labels.any() else None,
                "normal": float(found.flagged[~series.labels].mean()),
                **{what: grades[what] for what in shown},
            }
            records.append(record)
    return records


def measure(limit: int | None) -> list[dict[str, Any]]:
    """Return the records of all series that can be calibrated."""
    records = []
    for family in FAMILIES:
        for series in read_family(family, limit=limit).series:
            for rule in RULES:
                try:
                    records += judged(series, rule)
                except DataError as error:
                    print(f"{family}/{series.name}: left out, {error}", flush=True)
            print(f"{family}/{series.name}", flush=True)
    return records


def mean(records: list[dict[str, Any]], what: str) -> float:
    """Return the mean of one figure over the series that have it."""
    return float(np.mean([record[what] for record in records if record[what] is not None]))


def lines_of(records: list[dict[str, Any]]) -> list[str]:
    """Return a table a family and rule."""
    lines = []
    for family, rule in dict.fromkeys((record["family"], record["rule"]) for record in records):
        own = [record for record in records if (record["family"], record["rule"]) == (family, rule)]
        count = len({record["series"] for record in own})
        lines += ["", f"## {family}, {count} series, rule: {rule}", ""]
        lines.append("| score | guard | AUC-PR | VUS-PR | rows inside | normal rows | found | false segments | s |")
        lines.append("|" + "---|" * 9)
        for key in dict.fromkeys((record["score"], record["guard"]) for record in own):
            part = [record for record in own if (record["score"], record["guard"]) == key]
            cells = [f"{mean(part, what):.3f}" for what in ("auc_pr", "vus_pr", "inside", "normal")]
            found = f"{sum(r['found'] for r in part)} of {sum(r['events'] for r in part)}"
            false = f"{sum(r['false_segments'] for r in part)} of {sum(r['segments'] for r in part)}"
            seconds = f"{sum(r['seconds'] for r in part):.1f}"
            lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} | {found} | {false} | {seconds} |")
    return lines


def main() -> None:
    """Measure and write the table."""
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    logging.getLogger("tsforge").setLevel(logging.ERROR)
    records = measure(1 if given.quick else None)
    about = describe(given, before)
    lines = heading("Residuals with and without guarded contexts", about)
    lines += ["", __doc__.split("\n\n", 2)[2].strip(), *lines_of(records)]
    write(given.out, {"about": about, "records": records}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
