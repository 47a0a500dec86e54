"""The tuned gain of the PLRNN forecaster against fixed gains, the last observation among them, on noisy Lorenz-63.

Usage: python benchmarks/plrnn_observer.py --out benchmarks/results/plrnn_observer_HARDWARE_DATE [--seeds 3]

Simulated trajectories with observation noise of 5, 10 and 20 % of a standard deviation; the model sees noisy rows only
and chooses its gain by one-step errors on noisy validation rows. Errors are root mean squares against the trajectory
without noise, in standard deviations, over all windows of the test rows. Gain 1 starts at the last observation.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tsforge.contracts.tensors import DataSpec
from tsforge.core.atomic import atomic_file
from tsforge.data.attractors import simulate
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

CONTEXT, HORIZON, STEPS = 100, 50, (1, 20, 50)
TRAIN, VALID, ROWS = 6000, 7000, 9000
GAINS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NOISE = (0.05, 0.1, 0.2)
FORCING: dict[str, dict[str, Any]] = {
    "constant 0.15": {"method": "constant", "start": 0.15},
    "adaptive": {"method": "adaptive", "decay": 0.9},
}


def panel_of(values: np.ndarray) -> Panel:
    """Return rows [T, 3] as one series."""
    table = pl.DataFrame({"time": np.arange(len(values)), **{f"x{i}": column for i, column in enumerate(values.T)}})
    return Panel.from_frame(SeriesFrame.from_wide(table, time="time", freq="1i"))


def fit(panel: Panel, forcing: dict[str, Any], seed: int) -> ForecastNetwork:
    """Return a trained network."""
    model = {"name": "plrnn", "latent": 3, "hidden": 60, "ensemble": 1, "normalisation": "none", "forcing": forcing}
    config = NetworkConfig.model_validate({"model": model, "likelihood": {"name": "point"}})
    window = WindowSpec(context_length=CONTEXT, horizon=HORIZON)
    network = build_network(config, DataSpec(context_length=CONTEXT, horizon=HORIZON, num_variates=3), seed=seed)
    train = TrainConfig(
        batch_size=32,
        max_epochs=10,
        max_steps_per_epoch=100,
        learning_rate=3e-3,
        weight_decay=0.0,
        schedule="cosine",
        patience=None,
        accelerator="cpu",
        seed=seed,
    )
    spans = WindowDataset(panel, window, None, TRAIN), WindowDataset(panel, window, TRAIN, VALID)
    fit_network(network, *spans, train, series=panel.training_series(None, TRAIN), progress=False)
    return network


def errors(network: ForecastNetwork, seen: Panel, clean: Panel) -> list[float]:
    """Return the errors at ``STEPS``."""
    window = WindowSpec(context_length=CONTEXT, horizon=HORIZON)
    total, count = torch.zeros(HORIZON, dtype=torch.float64), 0
    shown, truth = (WindowDataset(panel, window, VALID, None).batches(512) for panel in (seen, clean))
    for told, true in zip(shown, truth, strict=True):
        assert true.target is not None
        miss = (network.predict(told).mean - true.target).double().square()
        total += miss.sum((0, 2))
        count += miss.shape[0] * miss.shape[2]
    return [float((total[step - 1] / count).sqrt()) for step in STEPS]


def measure(noise: float, name: str, seed: int) -> dict[str, Any]:
    """Return the errors of one trained model under every gain."""
    clean = simulate("lorenz63", ROWS, 0.01, seed=100 + seed)
    clean = (clean - clean[:TRAIN].mean(axis=0)) / clean[:TRAIN].std(axis=0)
    seen = clean + noise * np.random.default_rng(seed).standard_normal(clean.shape)
    network = fit(panel_of(seen), FORCING[name], seed)
    chosen = network.model.gain.clone()
    panels = panel_of(seen), panel_of(clean)
    found = {"tuned": errors(network, *panels)}
    for gain in GAINS:
        network.model.gain.fill_(gain)
        found[f"{gain:g}"] = errors(network, *panels)
    return {"noise": noise, "forcing": name, "seed": seed, "gain": chosen.flatten().tolist(), "errors": found}


def page(runs: list[dict[str, Any]], made: str) -> str:
    """Return the medians as Markdown."""
    lines = [
        f"# Gain of the PLRNN forecaster on noisy Lorenz-63, {made}",
        "",
        f"{platform.machine()}, torch {torch.__version__}, one thread; medians over seeds of root mean squared errors, "
        f"{STEPS[0]} / {STEPS[1]} / {STEPS[2]} steps ahead, against the trajectory without noise in its standard "
        "deviations.",
        "",
        "| noise | forcing | gains chosen | tuned | "
        + " | ".join(f"{gain:g}" for gain in GAINS)
        + " | tuned / gain 1 |",
        "|" + "---|" * (5 + len(GAINS)),
    ]
    for noise in NOISE:
        for name in FORCING:
            rows = [run for run in runs if run["noise"] == noise and run["forcing"] == name]
            middle = {key: np.median([run["errors"][key] for run in rows], axis=0) for key in rows[0]["errors"]}
            cells = [
                " / ".join(f"{value:.3f}" for value in middle[key]) for key in ("tuned", *map("{:g}".format, GAINS))
            ]
            gains = [value for run in rows for value in run["gain"]]
            ratio = " / ".join(f"{value:.2f}" for value in middle["tuned"] / middle["1"])
            chosen = f"{min(gains):.2g} to {max(gains):.2g}"
            lines.append(f"| {noise:.0%} | {name} | {chosen} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the result without ending")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for noise in NOISE:
        for name in FORCING:
            for seed in range(options.seeds):
                runs.append(measure(noise, name, seed))
                print(json.dumps(runs[-1]), flush=True)
    text = page(runs, f"{datetime.now(UTC):%Y-%m-%d}")
    for ending, content in ((".json", json.dumps(runs, indent=1) + "\n"), (".md", text)):
        with atomic_file(options.out.with_name(options.out.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
