"""How many normal rows of drifting servers alarm at a nominal rate of 1 %? Every SMD machine, every rule.

Usage: TSFORGE_DATA=FOLDER python benchmarks/anomaly_drift.py [--out PATH] [--quick]

Scores and calibration rows are those of ``tsforge benchmark --task anomaly`` (fit on 70 % of the training file, rules
fitted on scores of the rest); the rate is over test rows that are not labelled. An event leaves a tail in a smoothed
score, and rows next to a labelled event count as normal all the same. A static level is expected to go stale.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from _measure import arguments, describe, heading, write

from tsforge.anomaly.baselines import build_baseline
from tsforge.anomaly.config import BudgetRule, DetectConfig, EventConfig
from tsforge.anomaly.ensemble import EnsembleConfig, ensemble_scores, filled
from tsforge.anomaly.smoothing import Exponential
from tsforge.anomaly.thresholds import ThresholdRule, build_rule
from tsforge.app.anomaly_benchmark_data import LabelledSeries, read_family
from tsforge.app.anomaly_benchmark_run import Judgement, fit_series
from tsforge.core.config import validate

ALPHA, TARGET = 0.01, 2.0
RULES: dict[str, dict[str, Any]] = {
    "static": {"kind": "quantile", "alpha": ALPHA},
    "rolling_quantile": {"kind": "rolling_quantile", "alpha": ALPHA},
    "ew_normalised": {"kind": "ew_normalised", "alpha": ALPHA},
}


def scores_of(series: LabelledSeries, judgement: Judgement) -> dict[str, tuple[np.ndarray, int]]:
    """Return scores of calibration and test rows, and how many calibrate."""
    cut, known = judgement.fit_rows(series), len(series.train)
    rows = filled(np.vstack([series.train, series.test]))
    rows = rows[:, np.ptp(rows[:known], axis=0) > 0.0]
    plain = build_baseline("var1_mean_abs").fit(rows[:cut]).score(rows[cut:])
    settings = {"model": {"name": "ar_net"}, "window": {"context_length": 32, "horizon": 1}}
    artifact, _ = fit_series(series, settings, judgement, seed=0)
    recipe = EnsembleConfig()
    found = ensemble_scores(artifact, series.frame(test=True), recipe, start=known)[0]
    positive = np.exp(np.minimum(found.scores, 700.0))  # same ranks; ew_normalised takes logarithms
    return {
        "var1 mean_abs": (plain, known - cut),
        "var1 mean_abs, smoothed 0.1": (Exponential(0.1).run(plain), known - cut),
        "ar_net residuals": (found.members["residual_mahalanobis"], found.known),
        "ar_net, ensemble": (positive, found.known),
    }


def measure(limit: int | None) -> list[dict[str, Any]]:
    """Return one record a machine, score and rule."""
    judgement = Judgement(fit_share=0.7, rule=BudgetRule(), events=EventConfig(), width=100)
    records = []
    for series in read_family("smd", limit=limit).series:
        for name, (scores, known) in scores_of(series, judgement).items():
            for label, plain in RULES.items():
                config = validate(DetectConfig, {"rule": plain}).rule
                rule: ThresholdRule = build_rule(config, season_length=series.season).fit(scores[:known])
                alarm = rule.run(scores[known:]).alarm
                rate = float(alarm[~series.labels].mean())
                touched = float(alarm[series.labels].mean())
                record = {"machine": series.name, "score": name, "rule": label, "rate": rate, "anomalous_rate": touched}
                records.append(record)
        print(series.name, flush=True)
    return records


def main() -> None:
    """Measure and write the table."""
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    logging.getLogger("tsforge").setLevel(logging.ERROR)
    records = measure(2 if given.quick else None)
    about = describe(given, before)
    lines = heading(f"Alarm rate on normal rows at alpha {ALPHA:g}", about)
    lines += ["", __doc__.split("\n\n", 2)[2].strip(), "", "| score | rule | median | largest | machines within 2x | "]
    lines[-1] += "rate on anomalous rows |"
    lines.append("|" + "---|" * 6)
    machines = list(dict.fromkeys(record["machine"] for record in records))
    for score in dict.fromkeys(record["score"] for record in records):
        for rule in RULES:
            own = [record for record in records if record["score"] == score and record["rule"] == rule]
            rates = np.array([record["rate"] for record in own])
            touched = np.mean([record["anomalous_rate"] for record in own])
            within = int((rates <= TARGET * ALPHA).sum())
            lines.append(
                f"| {score} | {rule} | {np.median(rates):.4f} | {rates.max():.4f} | {within} of {len(rates)} | "
                f"{touched:.3f} |"
            )
    for score in dict.fromkeys(record["score"] for record in records):
        lines += ["", f"## {score}", "", f"| machine | {' | '.join(RULES)} |", "|" + "---|" * (1 + len(RULES))]
        for machine in machines:
            cells = [
                f"{record['rate']:.4f}"
                for rule in RULES
                for record in records
                if (record["machine"], record["score"], record["rule"]) == (machine, score, rule)
            ]
            lines.append(f"| {machine} | {' | '.join(cells)} |")
    write(given.out, {"about": about, "records": records}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
