"""Do masked reconstruction and other memories than exponential smoothing find more than plain scorers on ASD and SMD?

Usage: python benchmarks/anomaly_scores.py DATA_FOLDER  (holds anomaly/asd and anomaly/smd)

Protocol of anomaly_baselines.py: one model a series, fitted on the first 70 % of the training file; the other 30 % set
the scale of residuals and calibrate; AUC-PR of the test file, mean over series. Nothing was tuned: windows, weights and
the shift are the defaults or the values that the docs name.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
from anomaly_baselines import FIT_SHARE, Arrays, series_of

from tsforge.anomaly.baselines import build_baseline
from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.reconstruction import fit_window_pca
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.scoring import fit_score_model
from tsforge.anomaly.smoothing import CumulativeSum, Exponential, MovingMedian, smooth_and_judge
from tsforge.anomaly.thresholds import Quantile
from tsforge.core.config import validate
from tsforge.metrics.anomaly import auc_pr

WINDOWS = (2, 16)
ALPHA = 0.001


def reconstructed(rows: Arrays) -> dict[str, np.ndarray]:
    """Return test scores of masked reconstruction; ``last`` reads no later row."""
    train, test, _ = rows
    cut, found = int(FIT_SHARE * len(train)), {}
    for window in WINDOWS:
        model = fit_window_pca(train[:cut], window)
        for overlap in ("last", "median"):
            residuals = [part - model.expected(part, overlap) for part in (train[cut:], test)]
            for joint in ("mean_abs", "mahalanobis"):
                config = validate(ScoreConfig, {"kind": "reconstruction", "joint": joint})
                scorer = fit_score_model(residuals[0][:, None], train[cut:], TrainingRange.of(train[:cut]), config)
                scores = scorer.score(residuals[1][:, None], test).joint
                found[f"reconstruction of {window} rows, {overlap}, {joint}"] = scores
    return found


def remembered(rows: Arrays) -> dict[str, np.ndarray]:
    """Return test scores of VAR(1) and of principal components with each memory."""
    train, test, _ = rows
    cut, found = int(FIT_SHARE * len(train)), {}
    for name in ("var1_mean_abs", "pca_residual"):
        scorer = build_baseline(name).fit(train[:cut])
        calibration, scores = scorer.score(train[cut:]), scorer.score(test)
        found[name] = scores
        found[f"{name}, exponential 0.1"] = Exponential(0.1).run(scores)
        found[f"{name}, median of 9"] = MovingMedian(9).run(scores)
        cusum = CumulativeSum(1.0).fit(calibration)
        rule = Quantile(ALPHA).fit(cusum.run(calibration))
        found[f"{name}, cumulative sum, shift 1"] = smooth_and_judge(scores, CumulativeSum(1.0).fit(calibration), rule)[
            0
        ]
    return found


def table(folder: Path) -> pl.DataFrame:
    """Return the mean AUC-PR of every score over the series of a family; rows without any score count lowest."""
    found: dict[str, list[float]] = {}
    for rows in series_of(folder):
        for name, scores in (remembered(rows) | reconstructed(rows)).items():
            found.setdefault(name, []).append(auc_pr(rows[2], scores, missing="lowest"))
    return pl.DataFrame(
        [{"score": name, "auc_pr": round(float(np.mean(each)), 3), "series": len(each)} for name, each in found.items()]
    )


def main() -> None:
    """Print the tables of both families as Markdown."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with pl.Config(tbl_formatting="MARKDOWN", tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True) as shown:
        shown.set_tbl_rows(50)
        shown.set_fmt_str_lengths(80)
        for family in ("asd", "smd"):
            start = time.perf_counter()
            print(f"\n## {family}\n\n{table(Path(sys.argv[1]) / 'anomaly' / family)}\n")
            print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
