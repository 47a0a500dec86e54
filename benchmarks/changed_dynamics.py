"""Changed dynamics that single values do not show: detection scores on Lorenz-63 whose parameters change.

Usage: python benchmarks/changed_dynamics.py --out benchmarks/results/changed_dynamics_HARDWARE_DATE [--seeds 3]

A change of speed keeps the distribution of values exactly, one of sigma nearly. 12,000 rows, 0.02 apart, 5 % noise:
6,000 train the models and are the reference of windows, 2,000 set the scale, 4,000 are scored, the change coming in
their middle: AUC-PR by chance is 0.5. Every score but those of windows is smoothed (0.01), or a single row could not
tell. Models are fitted once a seed. Larger is better; the scores see no labels.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tsforge.anomaly.baselines import build_baseline
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.smoothing import Exponential
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT
from tsforge.core.atomic import atomic_file
from tsforge.core.config import validate
from tsforge.data.attractors import lorenz63_with_shift
from tsforge.data.frame import SeriesFrame
from tsforge.metrics.anomaly import auc_pr

ROWS, TRAIN, SCALE, CHANGE = 12_000, 6_000, 2_000, 10_000
DT, NOISE, SMOOTHING, DELAYS = 0.02, 0.05, 0.01, 10
CHANGES: dict[str, dict[str, float]] = {
    "speed 0.8": {"speed": 0.8},
    "speed 0.9": {"speed": 0.9},
    "speed 1.1": {"speed": 1.1},
    "speed 1.25": {"speed": 1.25},
    "sigma 10 to 7": {"sigma": 7.0},
    "sigma 10 to 14": {"sigma": 14.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "plrnn": {"name": "plrnn", "latent": 3, "hidden": 60, "ensemble": 1, "normalisation": "none"}
    | {"forcing": {"method": "adaptive", "decay": 0.9}},
    "al-rnn": {"name": "plrnn", "kind": "almost_linear", "latent": 20, "rectified": 3, "ensemble": 1}
    | {"normalisation": "none", "forcing": {"method": "adaptive", "decay": 0.9}},
    "linear": {"name": "linear"},
}
RESIDUAL = {"joint": "mahalanobis", "smoothing": SMOOTHING}
WINDOW = {"joint": "mean_abs", "window": 400, "stride": 8}
SCORES: dict[str, tuple[str, dict[str, Any]]] = {  # title -> model, settings of the score
    "1: innovation of the PLRNN": ("plrnn", {**RESIDUAL, "steps": [1]}),
    "2: 20-step innovation of the PLRNN": ("plrnn", {**RESIDUAL, "steps": [20]}),
    "3a: spectrum of the window": ("plrnn", {**WINDOW, "kind": "spectrum"}),
    "3b: states of the window": ("plrnn", {**WINDOW, "kind": "states"}),
    "4: regions of the AL-RNN": ("al-rnn", {**WINDOW, "kind": "regions"}),
    "residual of linear, 1 step": ("linear", {**RESIDUAL, "steps": [1]}),
    "residual of linear, 20 steps": ("linear", {**RESIDUAL, "steps": [20]}),
}
BASELINES = ("mean_abs", "mahalanobis", "pca_residual", "var1_mahalanobis", "random")


def frame_of(values: np.ndarray) -> SeriesFrame:
    """Return rows [T, 3] as one series."""
    table = pl.DataFrame({"time": np.arange(len(values)), **{f"x{i}": column for i, column in enumerate(values.T)}})
    return SeriesFrame.from_wide(table, time="time", freq="1i")


def fit(frame: SeriesFrame, model: dict[str, Any], seed: int) -> Artifact:
    """Return a model fitted on the first rows."""
    settings = {
        "data": {"name": "lorenz", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": model,
        "likelihood": {"name": "point"},
        "window": {"context_length": 100, "horizon": 20},
        "split": {"kind": "counts", "counts": [TRAIN, 500, ROWS - TRAIN - 500]},
        "train": {
            "max_epochs": 10,
            "max_steps_per_epoch": 100,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "patience": None,
            "accelerator": "cpu",
            "seed": seed,
        },
    }
    return fit_frame(frame, validate(FitConfig, settings))[0]


def detector_scores(artifact: Artifact, frame: SeriesFrame, score: dict[str, Any]) -> np.ndarray:
    """Return the joint scores of the scored rows."""
    rule = {"kind": "quantile", "alpha": 0.01}
    report = detect(artifact, frame, validate(DetectConfig, {"score": score, "rule": rule}), start=TRAIN + SCALE)
    table = report.scores.table.filter(pl.col("variate") == JOINT).sort("time")
    return table["score"].to_numpy()


def baseline_scores(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return smoothed scores of plain scorers, and of a reconstruction of delay windows from their main components."""
    found = {}
    for name in BASELINES:
        scorer = build_baseline(name).fit(values[:TRAIN])
        found[name] = Exponential(SMOOTHING).run(scorer.score(values))[TRAIN + SCALE :]
    stacked = np.concatenate([values[DELAYS - 1 - k : len(values) - k] for k in range(DELAYS)], axis=1)
    scorer = build_baseline("pca_residual").fit(stacked[: TRAIN - DELAYS + 1])
    found[f"pca_residual of {DELAYS} rows"] = Exponential(SMOOTHING).run(scorer.score(stacked))[
        TRAIN + SCALE - DELAYS + 1 :
    ]
    return found


def measure(seeds: int) -> list[dict[str, Any]]:
    """Return a record a change, seed and score."""
    records = []
    for seed in range(seeds):
        artifacts: dict[str, Artifact] = {}
        for title, change in CHANGES.items():
            values, labels = lorenz63_with_shift(ROWS, change, CHANGE, dt=DT, seed=seed, noise=NOISE)
            frame = frame_of(values)
            if not artifacts:  # rows before the change are the same for every change
                artifacts = {name: fit(frame, model, seed) for name, model in MODELS.items()}
            scores = {name: detector_scores(artifacts[model], frame, score) for name, (model, score) in SCORES.items()}
            scores |= baseline_scores(values)
            truth = labels[TRAIN + SCALE :]
            for name, found in scores.items():
                records.append({"change": title, "seed": seed, "score": name, "auc_pr": auc_pr(truth, found)})
            print(f"seed {seed}, {title}", flush=True)
    return records


def page(records: list[dict[str, Any]], made: str) -> str:
    """Return means over seeds as Markdown."""
    table = pl.DataFrame(records)
    lines = [
        f"# Changed dynamics of Lorenz-63, {made}",
        "",
        f"AUC-PR, mean over {table['seed'].n_unique()} seeds (smallest); chance is 0.5. {platform.machine()}, torch "
        f"{torch.__version__}. Windows of {WINDOW['window']} rows; other scores smoothed by {SMOOTHING}.",
        "",
        "| score | " + " | ".join(CHANGES) + " | mean |",
        "|" + "---|" * (2 + len(CHANGES)),
    ]
    for name in table["score"].unique(maintain_order=True):
        rows = table.filter(pl.col("score") == name)
        cells = []
        for change in CHANGES:
            part = rows.filter(pl.col("change") == change)["auc_pr"]
            cells.append(f"{part.mean():.2f} ({part.min():.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {rows['auc_pr'].mean():.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    records = measure(options.seeds)
    text = page(records, f"{datetime.now(UTC):%Y-%m-%d}")
    for ending, content in ((".json", json.dumps(records, indent=1) + "\n"), (".md", text)):
        with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
