"""Grade the cases of ``anomaly_cases.py`` with other implementations and write ``anomaly_oracles.json``.

Run where these are installed (CPython 3.11, NumPy 2.4; the first four with ``--no-deps``): tsb-ad 1.5, vus 0.0.6,
dtaianomaly 0.5.1, aeon 1.6.0, prts 1.0.0.3, tadpak 0.3.3, telemeval 0.3.4, scikit-learn, numba, pandas, tqdm,
deprecated, statsmodels, matplotlib::

    python tests/golden/write_anomaly_oracles.py

A package that cannot grade a case (its own error, or a known quirk named below) leaves no number there.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from aeon.benchmarking.metrics.anomaly_detection import range_pr_vus_score, range_roc_vus_score
from anomaly_cases import PERCENTS, RANGE_SETTINGS, Case, cases, lowered, one_event, periodic
from dtaianomaly import evaluation as dtai
from prts import ts_precision, ts_recall
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score
from tadpak.pak import pak
from telemeval.metrics.affiliation import convert_vector_to_events, pr_from_events
from TSB_AD.evaluation.affiliation import generics
from TSB_AD.evaluation.affiliation import metrics as tsb_affiliation
from TSB_AD.evaluation.basic_metrics import basic_metricor
from TSB_AD.utils.slidingWindows import find_length_rank
from vus.utils.metrics import metricor

PACKAGES = ("tsb-ad", "vus", "dtaianomaly", "aeon", "prts", "tadpak", "telemeval", "scikit-learn", "numpy")


def of_scores(case: Case) -> dict[str, list[float]]:
    """Grades of scores; they need rows of both kinds."""
    y, s, w = case.labels, case.scores, case.width
    precision, recall, _ = precision_recall_curve(y, s)
    *_, tsb_roc, tsb_pr = basic_metricor().RangeAUC_volume_opt(y, s, w)
    *_, vus_roc, vus_pr = metricor().RangeAUC_volume_opt(y, s, w)
    return {
        "scikit-learn": [
            average_precision_score(y, s),
            roc_auc_score(y, s),
            np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)),
        ],
        "tsb vus": [tsb_roc, tsb_pr],
        "vus vus": [vus_roc, vus_pr],
        "aeon vus": [range_roc_vus_score(y, s, w), range_pr_vus_score(y, s, w)],
        "dtaianomaly vus": [
            dtai.VolumeUnderROC(w, compatibility_mode=True).compute(y, s),
            dtai.VolumeUnderPR(w, compatibility_mode=True).compute(y, s),
        ],
        "tadpak": [max(f1_score(y, pak(s, y, t, k)) for t in lowered(s)) for k in PERCENTS],
    }


def of_alarms(case: Case) -> dict[str, list[float]]:
    """Grades of alarms, which all-anomalous labels have as well."""
    y, p = case.labels, case.alarms
    tsb = basic_metricor()
    found = {
        "dtaianomaly events": [
            dtai.EventWisePrecision().compute(y, p),
            dtai.EventWiseRecall().compute(y, p),
            dtai.EventWiseFBeta().compute(y, p),
        ],
        "prts": [
            value
            for alpha, bias, cardinality in RANGE_SETTINGS
            for value in (
                ts_precision(y, p, 0.0, cardinality, bias),
                ts_recall(y, p, alpha, cardinality, bias),
            )
        ],
        "dtaianomaly ranges": [
            value
            for alpha, bias, cardinality in RANGE_SETTINGS
            for value in (
                dtai.RangeBasedPrecision(bias, cardinality).compute(y, p),
                dtai.RangeBasedRecall(alpha, bias, cardinality).compute(y, p),
            )
        ],
        "tadpak of alarms": [f1_score(y, pak(p.astype(float), y, 0.5, k)) for k in PERCENTS],
    }
    if not y[-1]:  # it cuts the last row off an event that ends the series
        found["tsb composite"] = [tsb.metric_EventF1PA(y, None, p)]
    if not y.all() and not p.all():  # its segments of all-one rows are none
        found["tsb ranges"] = [tsb.metric_RF1(y, None, p)]
    if not y.all() and not y[0]:  # its point adjustment leaves out the first row
        found["tsb adjusted"] = [tsb.metric_PointF1PA(y, case.scores, p.copy())]
    span = (0, y.size)
    for name, convert, grade in (
        ("tsb affiliation", generics.convert_vector_to_events, tsb_affiliation.pr_from_events),
        ("telemeval affiliation", convert_vector_to_events, pr_from_events),
    ):
        result = grade(convert(p), convert(y), span)
        key = {key.lower().removeprefix("affiliation_"): key for key in result}
        found[name] = [result[key["precision"]], result[key["recall"]]]
    return found


def main() -> None:
    """Write the file beside this one."""
    warnings.simplefilter("ignore")
    rows = []
    for number, case in enumerate(cases()):
        grades = of_alarms(case) | ({} if case.labels.all() else of_scores(case))
        grades["dtaianomaly ucr"] = [dtai.UCRScore(100).compute(*one_event(number))]
        grades["tsb width"] = [find_length_rank(periodic(number))]
        plain = {name: [float(value) for value in values] for name, values in grades.items()}
        rows.append({"checksum": case.checksum} | plain)
    versions = {name: version(name) for name in PACKAGES}
    lines = ",\n".join(json.dumps(row) for row in rows)
    target = Path(__file__).with_name("anomaly_oracles.json")
    target.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
