"""What do windows of a large panel cost in memory and time, by rule and as the lists that came before?

    python benchmarks/panel_windows.py [--quick] [--out PREFIX]

The panel has 10,000 entities x 1,000 steps x 8 variables; a window has 14 steps of context and 7 of horizon. Two ways
to know the windows:

- *by rule* (``tsforge.data.windows``): a few numbers a series, and a shuffled order of 4 bytes a window;
- *listed*, as before: series, cutoff, five int64 index rows and a flag for every window, and shuffled copies of the
  rows for every epoch. Re-created here as the reference; its batches must be equal.

Memory comes from a process for each way that holds the panel and its resident tensors: the most in use beyond them
while the windows are built and a shuffled epoch in batches of 1024 begins. Speeds come from one process that holds both
ways and runs whole epochs in turns, start included; given are medians and the extremes of the ratio in a round. A last
process starts from a table and says what the panel itself needs on the way to its tensors. Linux only: the peak is
``VmHWM``, put back between the stages.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from _measure import arguments, describe, heading, in_turns, ratio_cell, summarise, tell, write
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.core.seeding import derive_seed
from tsforge.data.frame import SeriesFrame
from tsforge.data.gather import take_padded, take_slices
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.windows import WindowDataset, WindowSpec

CONTEXT, HORIZON, BATCH = 14, 7, 1024
METHODS = ("rule", "listed")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the panel, strides of the windows, and how many rounds."""

    entities: int = 10_000
    steps: int = 1_000
    variables: int = 8
    strides: tuple[int, ...] = (10, 2, 1)
    rounds: int = 5
    threads: int = 1
    least_seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where it is measured."""
        return torch.device("cpu")


QUICK = Plan(entities=200, steps=100, variables=3)


class Listed:
    """Windows as they were kept before: one entry a window for everything that a gather needs."""

    def __init__(self, windows: WindowDataset) -> None:
        panel, spec = windows.panel, windows.spec
        self.spec, self.rows = spec, panel.resident()
        self.series, self.cutoff = windows.series_index, windows.cutoff_index
        low, high = panel.indptr[self.series], panel.indptr[self.series + 1]
        first = low + self.cutoff - panel.offset[self.series] - spec.context_length
        self.padded = (first < low) | (first + spec.length > high)
        self.index = torch.from_numpy(np.stack([first, low, high, self.series, self.cutoff]))

    @property
    def nbytes(self) -> int:
        """Bytes of the lists."""
        return self.series.nbytes + self.cutoff.nbytes + self.padded.nbytes + self.index.nbytes

    def batches(self, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """Yield all windows once."""
        items = np.arange(len(self.series))
        if shuffle:
            items = np.random.default_rng(derive_seed(seed, "windows")).permutation(items)
        index = self.index.index_select(1, torch.from_numpy(items)) if shuffle else self.index
        padded = self.padded[items]
        for begin in range(0, len(items), batch_size):
            end = begin + batch_size
            yield self._gather(index[:, begin:end], padded=bool(padded[begin:end].any()))

    def _gather(self, index: Tensor, *, padded: bool) -> Batch:
        first, low, high, series, cutoff = index.unbind(0)
        context, horizon, data = self.spec.context_length, self.spec.horizon, self.rows

        def take(rows: Tensor, start: Tensor, length: int, fill: float = 0.0) -> Tensor:
            return take_padded(rows, start, length, low, high, fill) if padded else take_slices(rows, start, length)

        return Batch(
            context=take(data.target, first, context),
            context_mask=take(data.mask, first, context),
            target=take(data.target, first + context, horizon),
            target_mask=take(data.mask, first + context, horizon),
            past=None if data.past is None else take(data.past, first, context, nan),
            known=None if data.known is None else take(data.known, first, context + horizon, nan),
            static=None if data.static is None else data.static.index_select(0, series),
            series_index=series,
            cutoff_index=cutoff,
        )


# ---- memory


def memory(name: str) -> int:
    """Return ``VmRSS`` (in use) or ``VmHWM`` (most in use) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}")


class Stage:
    """Measures bytes and seconds of what runs inside it."""

    def __enter__(self) -> Stage:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        self.before, self._start = memory("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak, self.after = memory("VmHWM") - self.before, memory("VmRSS") - self.before


def make_panel(plan: Plan) -> Panel:
    """Return a panel of random numbers without gaps."""
    rows = plan.entities * plan.steps
    values = np.random.default_rng(0).standard_normal((rows, plan.variables))
    return Panel(
        values,
        np.ones(values.shape, dtype=bool),
        np.arange(plan.entities + 1) * plan.steps,
        np.zeros(plan.entities, dtype=np.int64),
        None,
        tuple(f"e{entity:05d}" for entity in range(plan.entities)),
        SeriesSchema(targets=tuple(f"v{place}" for place in range(plan.variables)), freq="1i"),
        TimeGrid(0, "1i"),
    )


def make_windows(panel: Panel, stride: int) -> WindowDataset:
    """Return the windows by rule."""
    return WindowDataset(panel, WindowSpec(context_length=CONTEXT, horizon=HORIZON, stride=stride, min_observed=0.5))


def draw(windows: WindowDataset | Listed, *, shuffle: bool, most: int | None = None) -> int:
    """Gather the batches of an epoch, or its first ``most``, and return how many windows they hold."""
    return sum(len(batch.context) for batch in islice(windows.batches(BATCH, shuffle=shuffle), most))


# ---- what runs in processes of their own


def hold(plan: Plan, stride: int, method: str) -> dict[str, Any]:
    """Measure the memory of one way to know the windows."""
    torch.set_num_threads(plan.threads)
    panel = make_panel(plan)
    panel.resident()
    with Stage() as stage:
        windows = make_windows(panel, stride)
        held: Any = windows if method == "rule" else Listed(windows)
        draw(held, shuffle=True, most=100)
    kept = windows.index.nbytes if method == "rule" else held.nbytes
    order = 4 if method == "rule" else 8 + 8 + 40 + 1  # items, their permutation, shuffled rows and flags
    return {
        "windows": len(windows),
        "index_bytes": kept,
        "epoch_bytes": kept + len(windows) * order,
        "peak_bytes": stage.peak,
        "build_seconds": stage.seconds,
    }


def race(plan: Plan, stride: int) -> dict[str, Any]:
    """Measure the speed of both ways in turns, in windows a second."""
    torch.set_num_threads(plan.threads)
    windows = make_windows(make_panel(plan), stride)
    held = {"rule": windows, "listed": Listed(windows)}
    found = {}
    for kind, shuffle in (("shuffled", True), ("ordered", False)):
        calls = {name: partial(draw, way, shuffle=shuffle) for name, way in held.items()}
        spent = summarise(in_turns(calls, plan), "listed")
        found[kind] = {name: stat | {"speed": 1e3 * len(windows) / stat["ms"]} for name, stat in spent.items()}
    return found


def compare(plan: Plan, stride: int) -> None:
    """Stop unless both ways give the same batches."""
    panel = make_panel(plan)
    windows = make_windows(panel, stride)
    for ours, listed in zip(
        windows.batches(BATCH, shuffle=True, seed=3), Listed(windows).batches(BATCH, shuffle=True, seed=3), strict=True
    ):
        for name, part in ours._asdict().items():
            other = getattr(listed, name)
            if (part is None) != (other is None) or (part is not None and not torch.equal(part, other)):
                raise SystemExit(f"stride {stride}: the batches differ in {name}")


def climb(plan: Plan) -> dict[str, Any]:
    """Measure the way from a table to the tensors that windows are gathered from."""
    torch.set_num_threads(plan.threads)
    random = np.random.default_rng(0)
    rows = plan.entities * plan.steps
    ids = pl.Series("series_id", [f"e{entity:05d}" for entity in range(plan.entities)])
    schema = SeriesSchema(targets=tuple(f"v{place}" for place in range(plan.variables)), freq="1i")
    found = {}
    with Stage() as stage:
        keys = [
            ids.gather(np.repeat(np.arange(plan.entities), plan.steps)),
            pl.Series("time", np.tile(np.arange(plan.steps), plan.entities)),
        ]
        frame = SeriesFrame(
            pl.DataFrame([*keys, *(pl.Series(n, random.standard_normal(rows)) for n in schema.targets)]), schema
        )
        del keys
    found["table, checked"] = stage
    with Stage() as stage:
        panel = Panel.from_frame(frame)
    found["panel (float64)"] = stage
    with Stage() as stage:
        panel.resident()
    found["resident tensors (float32)"] = stage
    with Stage() as stage:
        panel.training_series(None, int(0.7 * plan.steps))
    found["training span for closed forms (70 %, float64)"] = stage
    del frame  # not before: memory that is given back late would hide what a stage takes
    return {
        name: {"peak_bytes": stage.peak, "kept_bytes": stage.after, "seconds": stage.seconds}
        for name, stage in found.items()
    }


def alone(call: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what a call gives in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, given)


# ---- the page


def measure(plan: Plan) -> dict[str, Any]:
    """Return the figures of all strides and stages."""
    small = Plan(entities=300, steps=120, variables=plan.variables)
    rows = []
    for stride in plan.strides:
        compare(small, stride)
        memory = {method: alone(hold, plan, stride, method) for method in METHODS}
        row = {"stride": stride, "memory": memory, "speed": alone(race, plan, stride)}
        rows.append(row)
        tell(memory | {kind: {n: stat["speed"] for n, stat in found.items()} for kind, found in row["speed"].items()})
    stages = alone(climb, plan)
    tell(stages)
    return {"streaming": rows, "stages": stages}


def page(result: dict[str, Any]) -> str:
    """Return the figures as a page."""
    plan = result["plan"]
    lines = heading("Windows of a panel, by rule and listed", result)
    lines += [
        "",
        f"{plan['entities']:,} entities x {plan['steps']:,} steps x {plan['variables']} variables, context {CONTEXT}, "
        f"horizon {HORIZON}, batches of {BATCH}. Peak: most memory in use beyond the panel and its tensors, while "
        "windows are built and a shuffled epoch begins. Speeds: windows a second over whole epochs, medians of "
        f"{plan['rounds']} rounds (3 where one takes more than a second); ratio to the lists, with its extremes in a "
        "round.",
        "",
        "| stride | windows | way | index kept, MB | index in a shuffled epoch, MB | bytes a window | peak, MB "
        "| shuffled, windows/s | ratio | in order, windows/s | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["streaming"]:
        for method in METHODS:
            stat, speed = row["memory"][method], row["speed"]
            cells = [
                f"{row['stride']} | {stat['windows']:,} | {'by rule' if method == 'rule' else 'listed (before)'}",
                f"{stat['index_bytes'] / 1e6:,.2f} | {stat['epoch_bytes'] / 1e6:,.1f}",
                f"{stat['epoch_bytes'] / stat['windows']:.1f} | {stat['peak_bytes'] / 1e6:,.0f}",
            ]
            for kind in ("shuffled", "ordered"):
                ratio = ratio_cell(speed[kind][method]) if method == "rule" else "1"
                cells.append(f"{speed[kind][method]['speed']:,.0f} | {ratio}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "From a table to the tensors, one process: most memory in use in each stage beyond what was there before it.",
        "",
        "| stage | peak, MB | kept, MB | seconds |",
        "|---|---|---|---|",
    ]
    for name, stat in result["stages"].items():
        lines.append(
            f"| {name} | {stat['peak_bytes'] / 1e6:,.0f} | {stat['kept_bytes'] / 1e6:,.0f} | {stat['seconds']:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and write the page."""
    given = arguments(__doc__)
    load = os.getloadavg()[0]
    plan = QUICK if given.quick else Plan(threads=given.threads)
    result = {"plan": vars(plan), **measure(plan)}
    result = {**describe(given, load), **result}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
