"""Baseline scorers and the rolling rule on labelled server data, against earlier measurements.

Setting of the numbers: one model a series, fitted on the first 70 % of the training file, mean over series; z cut at
20, scale floor 0.01, ridge 0.01 a row; rules calibrated on the other 30 %. Columns constant over the training file are
left out here. The rows of the Mahalanobis scores on ASD differ by up to 0.03 from that setting and are not asserted.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "anomaly_baselines.py"))
AUC_PR = {
    "asd": {
        "random": 0.054,
        "mean_abs": 0.171,
        "var1_mean_abs": 0.286,
        "var1_mean_abs, smoothed": 0.440,
    },
    "smd": {
        "random": 0.040,
        "mean_abs": 0.478,
        "mahalanobis": 0.475,
        "var1_mean_abs": 0.450,
        "var1_mean_abs, smoothed": 0.594,
        "var1_mahalanobis": 0.453,
        "var1_mahalanobis, smoothed": 0.501,
    },
}
ROLLING = {  # score: alarm rate on normal rows, event recall, event precision, event F
    "asd": {"var1_mean_abs": (0.0005, 0.334, 0.672, 0.401)},
    "smd": {"mean_abs": (0.0009, 0.587, 0.558, 0.527), "var1_mean_abs": (0.0005, 0.656, 0.605, 0.582)},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["asd", "smd"])
def test_scores_reach_the_measured_areas(family: str, shared_data: Path) -> None:
    table = BENCHMARK["score_table"](shared_data / "anomaly" / family, with_vus=False)
    found = dict(table.select("score", "auc_pr").iter_rows())
    for name, value in AUC_PR[family].items():
        assert found[name] == pytest.approx(value, abs=0.01), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["asd", "smd"])
def test_the_rolling_rule_keeps_its_rate(family: str, shared_data: Path) -> None:
    table = BENCHMARK["rule_table"](shared_data / "anomaly" / family)
    for score, expected in ROLLING[family].items():
        row = table.filter((table["score"] == score) & (table["rule"] == "rolling 5,000")).to_dicts()[0]
        assert row["normal_alarm_rate"] == pytest.approx(expected[0], abs=0.0002)
        grades = [row[name] for name in ("event_recall", "event_precision", "event_f1")]
        assert grades == pytest.approx(list(expected[1:]), abs=0.01)
