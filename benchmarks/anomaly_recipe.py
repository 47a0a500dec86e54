"""Which scores, joined how, find anomalies that were written into training rows? The choice of the benchmark's recipe.

Usage: TSFORGE_DATA=FOLDER python benchmarks/anomaly_recipe.py [--out PATH] [--quick]

No test row and no label is read. The training rows of every second ASD series and every third SMD machine are cut: 65
% play the training part (70 % fit, 30 % scale and calibrate), 35 % play the test. ``wander`` moves the level of half
of the variates for good, as servers do (normal), and ``inject`` writes ten kinds of anomalies of 10 to 1,000 rows,
clear and faint ones into two copies. Residuals are those of ``ar_net`` one row ahead, by the code of ``tsforge
benchmark``.

The mean is that of (AUC-PR + VUS-PR) / 2 over both families and strengths (VUS: W = 100, reference thresholds).
Beside it stands, for a kind, the share of its rows above the level that 1 % of the normal rows exceed: what a
candidate misses.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from _measure import arguments, describe, heading, write

from tsforge.anomaly.config import BudgetRule, EventConfig
from tsforge.anomaly.ensemble import EnsembleConfig, Join, combine, ensemble_scores
from tsforge.anomaly.injection import (
    INJECTION_KINDS,
    InjectionConfig,
    WanderConfig,
    inject,
    injected_labels,
    wander,
)
from tsforge.anomaly.smoothing import Exponential
from tsforge.app.anomaly_benchmark_data import LabelledSeries, read_family
from tsforge.app.anomaly_benchmark_run import Judgement, fit_series
from tsforge.metrics.anomaly import auc_pr
from tsforge.metrics.vus import vus

TRAIN_SHARE, WIDTH = 0.65, 100
STRENGTHS: dict[str, dict[str, tuple[float, float]]] = {
    "clear": {"size": (0.5, 4.0), "variates": (0.1, 0.8)},
    "faint": {"size": (0.25, 1.5), "variates": (0.05, 0.4)},
}
SETS: dict[str, tuple[str, ...]] = {
    "var": ("var1_mean_abs", "var1_mahalanobis"),
    "residual": ("residual_mean_abs", "residual_mahalanobis"),
    "var + residual": ("var1_mean_abs", "var1_mahalanobis", "residual_mean_abs", "residual_mahalanobis"),
    "var + residual, mahalanobis": ("var1_mahalanobis", "residual_mahalanobis"),
    "levels + var": ("mean_abs", "mahalanobis", "var1_mean_abs", "var1_mahalanobis"),
    "levels + pca + var + residual, mahalanobis": (
        "mahalanobis",
        "pca_mahalanobis",
        "var1_mahalanobis",
        "residual_mahalanobis",
    ),
    "all": (
        *("mean_abs", "mahalanobis", "pca_residual", "pca_mahalanobis", "var1_mean_abs", "var1_mahalanobis"),
        *("residual_mean_abs", "residual_mahalanobis"),
    ),
}
JOINS: tuple[Join, ...] = ("ratio", "surprise")
HALF_LIVES = (None, 1000.0, 4000.0)
EVERY = {"asd": 2, "smd": 3}
WEIGHTS = (0.2, 0.1)


def pseudo(series: LabelledSeries, strength: str, seed: int) -> tuple[LabelledSeries, list[Any]]:
    """Return a series whose test part is training rows with injected anomalies, and what was injected."""
    cut = int(TRAIN_SHARE * len(series.train))
    moved = wander(series.train[cut:], WanderConfig(seed=seed))
    written, events = inject(moved, InjectionConfig(seed=seed, length=(10, 1000), **STRENGTHS[strength]))
    labels = injected_labels(events, len(written))
    return replace(series, train=series.train[:cut], test=written, labels=labels, experts=()), events


def candidates(series: LabelledSeries, judgement: Judgement) -> dict[str, np.ndarray]:
    """Return the scores of the test rows by every candidate."""
    settings = {"model": {"name": "ar_net"}, "window": {"context_length": 32, "horizon": 1}}
    artifact, _ = fit_series(series, settings, judgement, seed=0)
    config = EnsembleConfig(members=SETS["all"], smoothing=None, recentre=None)
    found = ensemble_scores(artifact, series.frame(test=True), config, start=len(series.train))[0]
    out = {}
    for (name, parts), join, weight, half in product(SETS.items(), JOINS, WEIGHTS, HALF_LIVES):
        chosen = {part: found.members[part] for part in parts}
        scores = combine(chosen, found.known, join=join, smoothing=weight, recentre=half)
        ending = "" if half is None else f", recentred {half:g}"
        out[f"{name}; {join}, smoothed {weight:g}{ending}"] = scores[found.known :]
    for name in ("var1_mean_abs", "var1_mahalanobis"):  # the best rows of the published baselines
        out[f"{name} alone, smoothed 0.1"] = Exponential(0.1).run(found.members[name])[found.known :]
    return out


def measure(families: tuple[str, ...], strengths: tuple[str, ...], limit: int | None) -> list[dict[str, Any]]:
    """Return one record a candidate, best first."""
    judgement = Judgement(fit_share=0.7, rule=BudgetRule(), events=EventConfig(), width=WIDTH)
    areas: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    shares: dict[str, dict[str, list[float]]] = {}
    for family in families:
        for place, series in enumerate(read_family(family, limit=limit).series[:: EVERY[family]]):
            for number, strength in enumerate(strengths):
                made, events = pseudo(series, strength, 1000 * number + place)
                for name, scores in candidates(made, judgement).items():
                    pair = (
                        auc_pr(made.labels, scores),
                        vus(made.labels, scores, width=WIDTH, thresholds="reference").pr,
                    )
                    areas.setdefault(name, {}).setdefault((family, strength), []).append(pair)
                    level = np.quantile(scores[~made.labels], 0.99)
                    for event in events:
                        above = float((scores[event.start : event.stop] > level).mean())
                        shares.setdefault(name, {}).setdefault(event.kind, []).append(above)
            print(family, series.name, flush=True)
    records = []
    for name, by_part in areas.items():
        means = {" ".join(part): np.mean(pairs, axis=0) for part, pairs in by_part.items()}
        record: dict[str, Any] = {"candidate": name, "score": float(np.mean([pair.mean() for pair in means.values()]))}
        record["parts"] = {part: [float(pair[0]), float(pair[1])] for part, pair in means.items()}
        record["kinds"] = {kind: float(np.mean(shares[name][kind])) for kind in INJECTION_KINDS if kind in shares[name]}
        records.append(record)
    return sorted(records, key=lambda record: -record["score"])


def main() -> None:
    """Measure and write the table."""
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    logging.getLogger("tsforge").setLevel(logging.ERROR)
    families = ("asd", "smd")
    records = measure(families, tuple(STRENGTHS), 1 if given.quick else None)
    about = describe(given, before)
    parts = [f"{family} {strength}" for family in families for strength in STRENGTHS]
    columns = [f"{part} AUC / VUS" for part in parts]
    lines = heading("Scores on anomalies written into training rows", about)
    lines += ["", __doc__.split("\n\n", 2)[2].strip(), "", "The best 25, and the best published baselines:", ""]
    lines += [f"| candidate | mean | {' | '.join([*columns, *INJECTION_KINDS])} |"]
    lines += ["|" + "---|" * (2 + len(columns) + len(INJECTION_KINDS))]
    for place, record in enumerate(records):
        if place >= 25 and " alone" not in record["candidate"]:
            continue
        cells = [f"{record['score']:.3f}", *(" / ".join(f"{x:.3f}" for x in record["parts"][part]) for part in parts)]
        cells += [f"{record['kinds'][kind]:.2f}" if kind in record["kinds"] else "" for kind in INJECTION_KINDS]
        lines.append(f"| {record['candidate']} | {' | '.join(cells)} |")
    write(given.out, {"about": about, "records": records}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
