"""Training speed of ReGENN: the trainer on windows of a panel against a straightforward loop in the released order.

Usage: python benchmarks/regenn.py [--out benchmarks/results/regenn_HARDWARE_DATE] [--threads 1] [--quick] [--step]

The panel has the size of the SARS-CoV-2 one: 188 entities, 99 training rows, 3 variates; context 7, horizon 14, so
14,852 windows. The loop takes 32 entities and one window a step, windows in order of time, with Adam and clipping; it
slices a tensor and calls the same network by torch's layers (TSFORGE_COMPILED=off), so it is faster than the released
one, which also moves graphs about; it is timed through the compiled kernel of encoder and LSTMs too. Ours is
``fit_network`` with everything it costs but building the network: scaling, graph, closed-form start, shuffled batches
of 1,024 and of 4,096 windows under Lightning, 4 epochs. All in one process, in turns; windows a second, with one thread
and with ``--threads``.

With ``--step``, instead: CPU time of one optimiser step of 1,024 windows with parts of the network taken out, against
the loop's step of 32 windows, and the floating point operations a second it comes to, beside those of a large matrix
product on the same core in the same rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _measure
import numpy as np
import polars as pl
import torch
from torch import nn

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.models.regenn import ReGENN, ReGENNConfig
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

CONTEXT, HORIZON, VARIATES, ENTITIES = 7, 14, 3, 32
BATCHES = (1024, 4096)
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "released sizes (ff_dim 2048, no anchor)": {"ff_dim": 2048, "normalisation": "none", "mask_channel": False},
}


@dataclass(frozen=True)
class Pace:
    """How the methods are timed."""

    device: torch.device
    rounds: int
    least_seconds: float = 0.0


def make_panel(series: int, rows: int) -> Panel:
    """Return growing counts; speed does not depend on the values."""
    rng = np.random.default_rng(0)
    steps = rng.poisson(rng.uniform(0, 50, size=(series, 1, VARIATES)), size=(series, rows, VARIATES))
    values = steps.cumsum(1).reshape(-1, VARIATES).astype(float)
    table = pl.DataFrame(
        {"id": np.repeat([f"e{k:03}" for k in range(series)], rows), "t": np.tile(np.arange(rows), series)}
        | {f"v{k}": values[:, k] for k in range(VARIATES)}
    )
    names = [f"v{k}" for k in range(VARIATES)]
    return Panel.from_frame(SeriesFrame.from_long(table, time="t", series_id="id", targets=names, freq="1i"))


def loop_in_released_order(
    panel: Panel, settings: dict[str, Any], batches: int, *, kernel: bool
) -> tuple[Callable[[], Any], int]:
    """Return a call that trains on every window of the first ``batches`` batches of entities, and its windows."""
    values = torch.from_numpy(panel.values).float().reshape(panel.num_series, -1, VARIATES)
    spec = DataSpec(context_length=CONTEXT, horizon=HORIZON, num_variates=VARIATES)
    model = ReGENN(validate(ReGENNConfig, settings), spec).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    starts = values.shape[1] - CONTEXT - HORIZON + 1

    def run() -> None:
        os.environ["TSFORGE_COMPILED"] = "require" if kernel else "off"
        for batch in range(batches):
            rows = values[batch * ENTITIES : (batch + 1) * ENTITIES]
            for start in range(starts):
                x = rows[:, start : start + CONTEXT]
                y = rows[:, start + CONTEXT : start + CONTEXT + HORIZON]
                optimiser.zero_grad()
                found = model(Batch(x, torch.ones_like(x, dtype=torch.bool))).raw[..., 0]
                loss = (found - y).abs().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimiser.step()

    return run, batches * ENTITIES * starts


def our_training(
    panel: Panel, settings: dict[str, Any], epochs: int, *, kernel: bool, batch: int = BATCHES[0]
) -> tuple[Callable[[], Any], int]:
    """Return a call that fits a fresh network, and its windows."""
    config = validate(
        NetworkConfig,
        {"model": {"name": "regenn", **settings}, "likelihood": {"name": "point", "loss": "mae"}}
        | {"scaling": {"kind": "none"}},
    )
    spec = DataSpec(context_length=CONTEXT, horizon=HORIZON, num_variates=VARIATES)
    windows = WindowDataset(panel, WindowSpec(context_length=CONTEXT, horizon=HORIZON))
    plain = {"max_epochs": epochs, "batch_size": batch, "gradient_clip": 10.0, "accelerator": "cpu", "precision": "32"}
    train = validate(TrainConfig, plain)

    def run() -> None:
        os.environ["TSFORGE_COMPILED"] = "require" if kernel else "off"
        fit_network(
            build_network(config, spec), windows, None, train, series=panel.training_series(None, None), progress=False
        )

    return run, epochs * len(windows)


def step_of(panel: Panel, settings: dict[str, Any], windows: int, *, kernel: bool = True) -> Callable[[], None]:
    """Return a call that makes one optimiser step on that many windows, as the trainer's without Lightning."""
    config = validate(
        NetworkConfig,
        {"model": {"name": "regenn", **settings}, "likelihood": {"name": "point", "loss": "mae"}}
        | {"scaling": {"kind": "none"}},
    )
    network = build_network(config, DataSpec(context_length=CONTEXT, horizon=HORIZON, num_variates=VARIATES))
    series = panel.training_series(None, None)
    network.fit_scaler(series)
    network.prepare(series)
    network.solve(series)
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    dataset = WindowDataset(panel, WindowSpec(context_length=CONTEXT, horizon=HORIZON))
    batch = next(iter(dataset.batches(windows, shuffle=True)))

    def run() -> None:
        os.environ["TSFORGE_COMPILED"] = "require" if kernel else "off"
        optimiser.zero_grad()
        network.loss(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()

    return run


def operations(ff_dim: int = 128) -> int:
    """Return the multiplications and additions of matrix products for a window: forward, and twice that backward."""
    length, horizon, variates = CONTEXT, HORIZON, VARIATES
    multiplied = {
        "source": length * variates**2 + variates * length**2,
        "missing": variates * length**2,
        "encoder": variates * (4 * length**2 + 2 * length * ff_dim) + 2 * variates**2 * length,
        "gate": variates * 4 * horizon * (length + horizon),
        "sequencer": horizon * 4 * variates * 2 * variates,
        "target": horizon * variates**2,
        "autoregression": length * horizon * variates,
    }
    return 3 * 2 * sum(multiplied.values())


def measure_step(panel: Panel, windows: int, rounds: int) -> list[dict[str, Any]]:
    """Return CPU milliseconds of a step for the whole network and for what is left of it without some parts."""
    quiet = {"dropout": 0.0}
    cases: dict[str, dict[str, Any]] = {
        "whole": {},
        "without dropout": quiet,
        "without encoder": {"encoder": False},
        "without sequencer": {"sequencer": "none"},
        "without the graph": {"ablate_gse": True},
        "without dropout, encoder and sequencer": {**quiet, "encoder": False, "sequencer": "none"},
        "autoregression alone": {"paths": "autoregression"},
    }
    left = torch.randn(1024, 1024)
    calls = {name: step_of(panel, settings, windows) for name, settings in cases.items()}
    calls |= {"loop's step": step_of(panel, {}, ENTITIES, kernel=False), "matrix product": lambda: left @ left}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            start = time.process_time()
            for _ in range(5):
                calls[name]()
            if turn:  # the first round also pays for what is loaded and planned
                times[name].append(1e3 * (time.process_time() - start) / 5)
    middle = {name: statistics.median(found) for name, found in times.items()}
    a_window = {name: middle[name] / (ENTITIES if name == "loop's step" else windows) for name in calls}
    return [
        {"part": name, "ms": middle[name], "samples": times[name], "ratio": a_window["loop's step"] / a_window[name]}
        for name in calls
    ]


def write_step(given: Any, panel: Panel, rounds: int, load: float) -> None:
    """Measure one step, write and print."""
    windows = 1024
    table = measure_step(panel, windows, rounds)
    about = _measure.describe(given, load)
    found = {row["part"]: row for row in table}
    product = found.pop("matrix product")
    reached = operations() * windows / found["whole"]["ms"] / 1e6
    peak = 2 * 1024**3 / product["ms"] / 1e6
    lines = [
        *_measure.heading("ReGENN: where a training step goes", about),
        "",
        f"One optimiser step, {windows:,} windows (the loop's: {ENTITIES}), context {CONTEXT}, horizon {HORIZON}, "
        f"{VARIATES} variates, default sizes. CPU milliseconds of the process (the machine was shared): medians of "
        f"{rounds} rounds in turns; ratio: windows a second against the loop's step, which calls the same network.",
        "",
        "| network | ms a step | ratio to the loop |",
        "|---|---|---|",
        *(f"| {row['part']} | {row['ms']:.2f} | {row['ratio']:.2f} |" for row in found.values()),
        "",
        f"Matrix products of a window: {operations():,} operations forward and backward, so the whole step reaches "
        f"{reached:.2f} GFlop/s; a product of two 1,024 x 1,024 matrices in the same rounds {peak:.1f} GFlop/s.",
    ]
    result = {**about, "rows": table, "operations": operations(), "gflops": reached, "product_gflops": peak}
    _measure.write(given.out, result, "\n".join(lines) + "\n")


def main() -> None:
    """Measure, write and print."""
    step = "--step" in sys.argv
    sys.argv = [part for part in sys.argv if part != "--step"]
    given = _measure.arguments(__doc__)
    load = os.getloadavg()[0]
    if step:
        write_step(given, make_panel(*((60, 60) if given.quick else (188, 99))), 3 if given.quick else 9, load)
        return
    series, rows, batches, epochs, rounds = (40, 40, 1, 1, 3) if given.quick else (188, 99, 5, 4, 5)
    panel = make_panel(series, rows)
    pace = Pace(torch.device("cpu"), rounds)
    found: list[dict[str, Any]] = []
    for threads in sorted({1, given.threads}):
        torch.set_num_threads(threads)
        for name, settings in SETTINGS.items():
            calls, windows = {}, {}
            for method, (call, count) in {
                "loop": loop_in_released_order(panel, settings, batches, kernel=False),
                "loop, kernel": loop_in_released_order(panel, settings, batches, kernel=True),
                "trainer, layers": our_training(panel, settings, epochs, kernel=False),
                "trainer": our_training(panel, settings, epochs, kernel=True),
                "trainer, more a step": our_training(panel, settings, epochs, kernel=True, batch=BATCHES[1]),
            }.items():
                calls[method], windows[method] = call, count
            times = _measure.in_turns(calls, pace)
            a_window = {method: [spent / windows[method] for spent in times[method]] for method in times}
            row: dict[str, Any] = {"settings": name, "threads": threads, "windows": windows}
            row |= _measure.summarise(a_window, "loop")
            _measure.tell(row)
            found.append(row)
    about = _measure.describe(given, load)
    lines = [
        *_measure.heading("ReGENN: training windows a second", about),
        "",
        f"{series} entities x {rows} rows x {VARIATES} variates, context {CONTEXT}, horizon {HORIZON}; medians of "
        f"{rounds} rounds in turns, ratio to the loop with its extremes in a round. Loop: 32 entities and one window a "
        "step, by torch's layers; trainer: everything that `fit_network` does, by batches.",
        "",
        "| settings | threads | loop, windows/s | the same with the kernel | trainer by torch's layers, "
        f"{BATCHES[0]:,} a step | trainer, {BATCHES[0]:,} a step | trainer, {BATCHES[1]:,} a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            f"{1000 / row[method]['ms']:,.0f}: {_measure.ratio_cell(row[method])}"
            for method in ("loop, kernel", "trainer, layers", "trainer", "trainer, more a step")
        ]
        loop = f"{1000 / row['loop']['ms']:,.0f}"
        lines.append(f"| {row['settings']} | {row['threads']} | {loop} | {' | '.join(cells)} |")
    _measure.write(given.out, {**about, "rows": found}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
