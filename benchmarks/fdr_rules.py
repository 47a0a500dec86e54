"""What do threshold rules do where the truth is known: false discoveries, level shifts, trends; what does a row cost?

Usage: python benchmarks/fdr_rules.py [--out PATH_WITHOUT_ENDING] [--quick] [--data FOLDER]   (FOLDER holds anomaly/smd)

1. False discoveries: t(8) scores, 2,000 calibrate and 20,000 are judged, 0.2 % of them shifted by 8; level 0.1. Tails
   start at the 0.95 quantile, for 100 excesses; "tail" has a free shape.
2. Alarm rates at alpha = 0.01 before and after a step or during a trend of the score mean. Nothing is an anomaly.
3. Processor microseconds a row, stepped and run, on usual scores and after a shift of them.
4. With --data: alarm rate on the normal rows of every SMD machine at alpha = 0.01, scores of a first-order
   autoregression, fitted on 70 % of the training file and calibrated on the rest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from _measure import describe, heading, write
from numpy.typing import NDArray
from scipy import stats

from tsforge.anomaly.adaptive_rules import Adaptive, EwNormalised
from tsforge.anomaly.baselines import build_baseline
from tsforge.anomaly.calibration import fit_calibration
from tsforge.anomaly.config import CalibrationConfig, FdrRule
from tsforge.anomaly.extreme_rules import Dspot, Pot, Spot
from tsforge.anomaly.fdr import (
    Lond,
    LordDecay,
    LordPlusPlus,
    TrailingBH,
    benjamini_hochberg,
    direct_e_values,
    e_benjamini_hochberg,
    kappa_e_values,
)
from tsforge.anomaly.fdr_rule import FalseDiscoveryRate
from tsforge.anomaly.rule_base import ThresholdRule
from tsforge.anomaly.thresholds import Quantile, RollingQuantile

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
LEVEL, ALPHA, WINDOW = 0.1, 0.01, 5_000
PUBLISHED = {  # (p-values, procedure): FDR, power of the specification's simulation
    ("conformal", "BH"): (0.0, 0.0),
    ("conformal", "LORD++"): (0.0, 0.0),
    ("conformal", "LORD decay"): (0.181, 0.807),
    ("tail", "BH"): (0.211, 0.800),
    ("tail", "LORD++"): (0.119, 0.580),
    ("tail", "LORD decay"): (0.292, 0.988),
    ("scores", "quantile 0.999"): (0.387, 1.000),
}
PROCEDURES: dict[str, Callable[[Floats], Flags]] = {
    "BH": lambda p: benjamini_hochberg(p, LEVEL),
    "BH, trailing 1,000": lambda p: TrailingBH(LEVEL, 1_000).run(p),
    "LORD++": lambda p: LordPlusPlus(LEVEL).run(p),
    "LORD decay": lambda p: LordDecay(LEVEL).run(p),
    "e-BH, kappa 0.1": lambda p: e_benjamini_hochberg(kappa_e_values(p, 0.1), LEVEL),
    "e-LOND, kappa 0.1": lambda p: Lond(LEVEL).run(1.0 / kappa_e_values(p, 0.1)),
    "p <= 0.001": lambda p: p <= 1e-3,
}


def discoveries(runs: int, rows: int) -> list[dict[str, Any]]:
    """Return mean FDR and power of every way to make p-values and every procedure."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def count(kind: str, name: str, rejected: Flags, strange: Flags) -> None:
        false = float((rejected & ~strange).sum() / max(rejected.sum(), 1))
        found.setdefault((kind, name), []).append((false, float(rejected[strange].mean())))

    for seed in range(runs):
        generator = np.random.default_rng(seed)
        calibration, scores = generator.standard_t(8, 2_000), generator.standard_t(8, rows)
        strange = generator.uniform(size=rows) < 0.002
        scores[strange] += 8.0
        free = fit_calibration(calibration, method="gpd", level=0.95, shape="free")
        p_values = {
            "conformal": fit_calibration(calibration, method="conformal").p_values(scores),
            "tail": free.p_values(scores),
            "tail, shape >= 0": fit_calibration(calibration, method="gpd", level=0.95).p_values(scores),
            "known": stats.t.sf(scores, 8),
        }
        for kind, p in p_values.items():
            for name, procedure in PROCEDURES.items():
                count(kind, name, procedure(p), strange)
        magnitudes = np.abs(scores)
        for power in (1, 8):
            e = direct_e_values(np.abs(calibration), magnitudes, power=power)
            count("scores", f"e-BH, direct^{power}", e_benjamini_hochberg(e, LEVEL), strange)
        count("scores", "quantile 0.999", Quantile(0.001).fit(calibration).run(scores).alarm, strange)
    return [
        {
            "values": kind,
            "procedure": name,
            "fdr": float(np.mean([row[0] for row in rows_])),
            "power": float(np.mean([row[1] for row in rows_])),
            "published": PUBLISHED.get((kind, name)),
        }
        for (kind, name), rows_ in found.items()
    ]


def fdr(**settings: Any) -> FalseDiscoveryRate:
    """Return an unfitted rule on p-values of a tail model."""
    return FalseDiscoveryRate(FdrRule(**settings), CalibrationConfig(method="gpd"))


RATE_RULES: dict[str, Callable[[], ThresholdRule]] = {
    "quantile": lambda: Quantile(ALPHA),
    "rolling_quantile": lambda: RollingQuantile(ALPHA, WINDOW),
    "rolling_quantile, cap 120": lambda: RollingQuantile(ALPHA, WINDOW, exclude_flagged=120),
    "rolling_quantile, no cap": lambda: RollingQuantile(ALPHA, WINDOW, exclude_flagged=10**9),
    "adaptive": lambda: Adaptive(ALPHA, 0.005, WINDOW),
    "ew_normalised": lambda: EwNormalised(ALPHA, 720.0),
    "pot": lambda: Pot(ALPHA),
    "spot, cap 120": lambda: Spot(ALPHA),
    "spot, published": lambda: Spot(ALPHA, exclude_flagged=None, shape="free"),
    "dspot, cap 120": lambda: Dspot(ALPHA, 100),
    "dspot, published": lambda: Dspot(ALPHA, 100, exclude_flagged=None, shape="free"),
}
FDR_RULES: dict[str, Callable[[], ThresholdRule]] = {
    "fdr lord": lambda: fdr(procedure="lord"),
    "fdr lord_decay": lambda: fdr(procedure="lord_decay"),
    "fdr e_lond": lambda: fdr(procedure="e_lond"),
    "fdr bh": lambda: fdr(procedure="bh"),
    "fdr e_bh": lambda: fdr(procedure="e_bh"),
}


def shifts(rows: int) -> list[dict[str, Any]]:
    """Return alarm rates of every rule: usual rows, first window after a step of 6, after that, and in a trend."""
    table = []
    generator = np.random.default_rng(0)
    calibration = np.abs(generator.standard_normal(WINDOW))
    usual = np.abs(generator.standard_normal(rows))
    stepped = np.abs(generator.standard_normal(WINDOW + rows)) + 6.0
    trend = np.abs(generator.standard_normal(rows)) + np.linspace(0.0, 6.0, rows)
    for name, make in (RATE_RULES | FDR_RULES).items():
        rule = make().fit(calibration)
        before = float(rule.run(usual).alarm.mean())
        alarm = rule.run(stepped).alarm
        rising = float(make().fit(calibration).run(trend).alarm.mean())
        rates = {"usual": before, "first": float(alarm[:WINDOW].mean()), "later": float(alarm[WINDOW:].mean())}
        table.append({"rule": name, **rates, "trend": rising})
    return table


def costs(rows: int, rounds: int) -> list[dict[str, Any]]:
    """Return median processor microseconds a row of every rule; all rules take turns in every round."""
    generator = np.random.default_rng(1)
    calibration = np.abs(generator.standard_normal(WINDOW))
    scores = {"usual": np.abs(generator.standard_normal(rows)), "shifted": np.abs(generator.standard_normal(rows)) + 6}
    spent: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, make in (RATE_RULES | FDR_RULES).items():
            for kind, values in scores.items():
                for how in ("step", "run"):
                    rule = make().fit(calibration)
                    start = time.process_time()
                    if how == "run":
                        rule.run(values)
                    else:
                        for score in values.tolist():
                            rule.step(score)
                    seconds = time.process_time() - start
                    spent.setdefault(name, {}).setdefault(f"{how} {kind}", []).append(1e6 * seconds / rows)
    return [{"rule": name, **{key: statistics.median(v) for key, v in kinds.items()}} for name, kinds in spent.items()]


def machines(folder: Path) -> list[dict[str, Any]]:
    """Return the alarm rate on normal rows over SMD machines: mean, worst, and how many are within twice alpha."""
    rates: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*_test.parquet")):
        test = pl.read_parquet(path)
        train = pl.read_parquet(path.with_name(path.name.replace("_test", "_train")))
        columns = [name for name in train.columns if name not in ("ds", "step", "label")]
        rows, later = (table.select(columns).to_numpy().astype(np.float64) for table in (train, test))
        keep = rows.std(axis=0) > 0.0
        cut = int(0.7 * len(rows))
        scorer = build_baseline("var1_mean_abs").fit(rows[:cut, keep])
        calibration, scores = scorer.score(rows[cut:, keep]), scorer.score(later[:, keep])
        normal = test["label"].to_numpy() == 0
        for name, make in RATE_RULES.items():
            alarm = make().fit(calibration).run(scores).alarm
            rates.setdefault(name, []).append(float(alarm[normal].mean()))
    return [
        {
            "rule": name,
            "mean": float(np.mean(r)),
            "worst": max(r),
            "within": sum(x <= 2 * ALPHA for x in r),
            "of": len(r),
        }
        for name, r in rates.items()
    ]


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = heading("Threshold rules", result["about"])
    lines += ["", "## False discoveries, level 0.1", "", "| values | procedure | FDR | power | specification |"]
    lines.append("|---|---|---|---|---|")
    for row in result["discoveries"]:
        stated = row["published"]
        shown = "" if stated is None else f"{stated[0]:.3f}, {stated[1]:.3f}"
        lines.append(f"| {row['values']} | {row['procedure']} | {row['fdr']:.3f} | {row['power']:.3f} | {shown} |")
    lines += ["", f"## Alarm rate, alpha {ALPHA:g} (fdr rules: level {LEVEL:g}), window {WINDOW:,}", ""]
    lines += ["| rule | usual rows | first window after a step of 6 | later | trend of 6 |", "|---|---|---|---|---|"]
    for row in result["shifts"]:
        lines.append(
            f"| {row['rule']} | " + " | ".join(f"{row[k]:.4f}" for k in ("usual", "first", "later", "trend")) + " |"
        )
    kinds = ("step usual", "run usual", "step shifted", "run shifted")
    lines += [
        "",
        "## Processor microseconds a row, median",
        "",
        "| rule | " + " | ".join(kinds) + " |",
        "|---|---|---|---|---|",
    ]
    for row in result["costs"]:
        lines.append(f"| {row['rule']} | " + " | ".join(f"{row[kind]:.2f}" for kind in kinds) + " |")
    if result["machines"]:
        lines += ["", f"## Normal rows of SMD, alpha {ALPHA:g}, VAR(1) mean_abs", ""]
        lines += ["| rule | mean alarm rate | worst machine | machines within 2 alpha |", "|---|---|---|---|"]
        for row in result["machines"]:
            lines.append(f"| {row['rule']} | {row['mean']:.4f} | {row['worst']:.4f} | {row['within']} of {row['of']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--data", type=Path, help="folder of shared data with anomaly/smd")
    given = parser.parse_args()
    given.device, given.threads = "cpu", 1
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = 4_000 if given.quick else 20_000
    result: dict[str, Any] = {
        "discoveries": discoveries(2 if given.quick else 10, rows),
        "shifts": shifts(rows),
        "costs": costs(500 if given.quick else 5_000, 1 if given.quick else 3),
        "machines": [] if given.data is None else machines(given.data / "anomaly" / "smd"),
    }
    result["about"] = describe(given, load)
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
