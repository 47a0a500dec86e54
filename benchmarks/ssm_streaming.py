"""Carrying a state against reading the whole window again: latency, memory and agreement of ``s4`` and ``lssl``.

    python benchmarks/ssm_streaming.py --out benchmarks/results/ssm_streaming_HARDWARE_DATE [--threads 1]

Writes ``OUT.json`` and ``OUT.md``; without ``--out`` it only prints. Models: width 64, 64 states, 2 layers, context
336, horizon 96, patch_length 1, normalisation none, in evaluation, without gradients; once with the linear map beside
the layers (the default, whose state holds the last 336 rows) and once without it. Heads and linear maps get random
weights, as new ones are 0 and would hide errors.

Three parts. Latency: one new row a series through ``step``, the same with ``free_run`` after it (a new forecast), and
``forward`` on the last 336 rows, which forecasts without a state. All in turns in every round; kernels and step
matrices are cached before, for all alike. ``forward`` reads 64 rows (series times variates) at a time: where this was
written 32 to 64 were quickest, and all at once took twice as long. Memory: bytes of the state, and the resident memory
of the process before and after many steps. Agreement: the carried forecast against ``forward`` on 336 rows, and on
everything the state has seen; the linear map is left out of the second, since it reads the last 336 rows only.

``--quick`` runs everything on toy sizes, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsforge.artifact import collect_provenance
from tsforge.contracts.model import State
from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.core.atomic import atomic_file
from tsforge.models._ssm_forecaster import SSMForecaster
from tsforge.network import NetworkConfig, build_network

SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3
ROWS_AT_ONCE = 64  # rows (series times variates) of one forward pass


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    size: dict[str, int]
    context: int = 336
    horizon: int = 96
    batches: tuple[int, ...] = (1, 1000)
    rounds: int = 9
    least_seconds: float = 0.05  # of one sample: shorter calls are repeated within it
    runs: tuple[tuple[int, int], ...] = ((1, 100_000), (1000, 10_000))  # series, steps
    single: int = 2000  # steps timed one by one
    history: int = 2000  # rows of the agreement with a longer context


FULL = Plan({"d_model": 64, "d_state": 64, "num_layers": 2})
QUICK = Plan(
    {"d_model": 8, "d_state": 8, "num_layers": 2},
    context=48,
    horizon=12,
    batches=(1, 4),
    rounds=3,
    least_seconds=0.002,
    runs=((1, 300), (4, 100)),
    single=50,
    history=120,
)
MODELS = {  # name, linear map, variates
    "s4": ("s4", "auto", 1),
    "s4, 7 variates": ("s4", "auto", 7),
    "s4, no linear map": ("s4", "none", 1),
    "lssl": ("lssl", "auto", 1),
    "lssl, 7 variates": ("lssl", "auto", 7),
}


def make_model(name: str, skip: str, variates: int, plan: Plan) -> SSMForecaster[Any]:
    """Return a model with random weights where new ones have zeros, in evaluation."""
    settings = {**plan.size, "name": name, "patch_length": 1, "normalisation": "none", "skip": skip}
    spec = DataSpec(context_length=plan.context, horizon=plan.horizon, num_variates=variates)
    model = build_network(NetworkConfig.model_validate({"model": settings}), spec, seed=0).model
    assert isinstance(model, SSMForecaster)
    torch.manual_seed(1)
    nn.init.normal_(model.head.weight, std=0.1)
    if model.skip is not None:
        for weight in model.skip.parameters():
            nn.init.normal_(weight, std=0.05)
    return model.eval()


def make_rows(series: int, steps: int, variates: int) -> Tensor:
    """Return rows [B, T, V] of a daily wave with noise."""
    generator = torch.Generator().manual_seed(2)
    wave = torch.sin(2.0 * math.pi / 24.0 * torch.arange(steps))
    return wave[None, :, None] + torch.randn(series, steps, variates, generator=generator) * 0.3


def observe(values: Tensor) -> Observation:
    """Return one row [B, V] with everything observed."""
    return Observation(values, torch.ones_like(values, dtype=torch.bool))


def window(values: Tensor) -> Batch:
    """Return rows [B, T, V] as a context with everything observed."""
    return Batch(values, torch.ones_like(values, dtype=torch.bool))


def carry(model: SSMForecaster[Any], state: State, rows: Tensor) -> State:
    """Return the state after rows [B, T, V]."""
    for values in rows.unbind(1):
        state = model.step(state, observe(values))
    return state


def state_bytes(state: State) -> dict[str, int]:
    """Return bytes of the layers' states and of all of it."""
    sizes = {name: part.numel() * part.element_size() for name, part in state.items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("layer"))
    return {"layers": layers, "total": sum(sizes.values())}


# ---- latency


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Return wall seconds of one of ``count`` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def in_turns(calls: dict[str, Callable[[], Any]], plan: Plan) -> dict[str, list[float]]:
    """Return seconds of every call in every round it took part in; the order is reversed in every other round."""
    counts = {}
    for name, call in calls.items():
        call()  # fills the caches
        counts[name] = min(max(math.ceil(plan.least_seconds / seconds_of(call, 1)), 1), 1000)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(plan.rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            if turn < SLOW_ROUNDS or statistics.median(found[name]) < SLOW_SECONDS:
                found[name].append(seconds_of(calls[name], counts[name]))
    return found


def single_steps(step: Callable[[], Any], count: int) -> dict[str, float]:
    """Return quantiles of the seconds of single steps."""
    spent = sorted(seconds_of(step, 1) for _ in range(count))
    return {f"p{level}": spent[min(len(spent) * level // 100, len(spent) - 1)] for level in (50, 95, 99)}


def latency(title: str, series: int, plan: Plan) -> dict[str, Any]:
    """Return seconds a call for ``series`` series: step, step with forecast, forecast from the whole window."""
    name, skip, variates = MODELS[title]
    model = make_model(name, skip, variates, plan)
    rows = make_rows(series, plan.context, variates)
    kept = model.warm_up(window(rows))
    row = observe(rows[:, 0])
    held = [kept]

    def step() -> None:
        held[0] = model.step(held[0], row)

    def step_and_forecast() -> Tensor:
        step()
        return model.free_run(held[0]).raw

    batches = [window(part) for part in torch.split(rows, max(ROWS_AT_ONCE // variates, 1))]

    def again() -> Tensor:
        return torch.cat([model(batch).raw for batch in batches])

    calls: dict[str, Callable[[], Any]] = {"step": step, "step_and_forecast": step_and_forecast, "window": again}
    samples = in_turns(calls, plan)
    record: dict[str, Any] = {"model": title, "series": series, "variates": variates, "state": state_bytes(kept)}
    for key, values in samples.items():
        pairs = [peer / ours for ours, peer in zip(values, samples["window"], strict=False)]
        record[key] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(samples["window"]) / statistics.median(values),
            "ratio_range": [min(pairs), max(pairs)],
            "samples": values,
        }
    if series == 1:
        record["single_step"] = single_steps(step, plan.single)
    return record


# ---- memory


def resident_bytes() -> int | None:
    """Return the resident memory of this process now, None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def long_run(series: int, steps: int, plan: Plan) -> dict[str, Any]:
    """Return memory before and after ``steps`` steps of ``s4``, and for one series what the forecast deviates."""
    model = make_model("s4", "auto", 1, plan)
    bare = make_model("s4", "none", 1, plan)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("skip.")})
    bare.eval()
    cycle = make_rows(series, steps if series == 1 else plan.context, 1)  # many series: the same rows over and over
    state = model.initial_state(series)
    settled = min(200, steps // 2)
    before: int | None = None
    bytes_before = 0
    tenths: list[int | None] = []
    start = time.perf_counter()
    for index in range(steps):
        if index == settled:
            before, bytes_before = resident_bytes(), state_bytes(state)["total"]
        state = model.step(state, observe(cycle[:, index % cycle.shape[1]]))
        if (index + 1) * 10 % steps < 10:
            tenths.append(resident_bytes())
    seconds = time.perf_counter() - start
    after = resident_bytes()
    record: dict[str, Any] = {"series": series, "steps": steps, "seconds": seconds}
    record |= {"resident_before": before, "resident_after": after, "resident_tenths": tenths}
    record |= {"state_before": bytes_before, "state_after": state_bytes(state)["total"]}
    if series == 1:
        carried, whole = bare.free_run(state).raw, bare(window(cycle)).raw
        record["difference"] = float((carried - whole).abs().max())
        record["largest_forecast"] = float(whole.abs().max())
    return record


# ---- agreement


def agreement(title: str, plan: Plan) -> dict[str, Any]:
    """Return the largest differences of a carried forecast to ``forward``, on the context and on a longer history."""
    name, skip, variates = MODELS[title]
    model = make_model(name, skip, variates, plan)
    rows = make_rows(3, plan.context, variates)
    carried = model.free_run(carry(model, model.initial_state(3), rows)).raw
    whole = model(window(rows)).raw
    record = {"model": title, "context": float((carried - whole).abs().max()), "largest": float(whole.abs().max())}
    bare = make_model(name, "none", variates, plan)  # the linear map reads the last rows only, whatever came before
    rows = make_rows(3, plan.history, variates)
    state = carry(bare, bare.initial_state(3), rows)
    record["history"] = float((bare.free_run(state).raw - bare(window(rows)).raw).abs().max())
    warm = carry(bare, bare.warm_up(window(rows[:, : plan.context])), rows[:, plan.context :])
    record["history_from_warm_up"] = float((bare.free_run(warm).raw - bare(window(rows)).raw).abs().max())
    return record


# ---- result


@torch.no_grad()
def run(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return all tables; memory comes first, while the process is small."""
    tables: dict[str, list[dict[str, Any]]] = {"memory": [], "agreement": [], "latency": []}
    for series, steps in plan.runs:
        tables["memory"].append(long_run(series, steps, plan))
        tell(tables["memory"][-1])
    for title in MODELS:
        tables["agreement"].append(agreement(title, plan))
        tell(tables["agreement"][-1])
    for title in MODELS:
        for series in plan.batches:
            record = latency(title, series, plan)
            tables["latency"].append(record)
            tell(record)
    return tables


def tell(record: dict[str, Any]) -> None:
    """Print a record as soon as it is there, without its samples."""
    shown = {
        name: {key: part for key, part in value.items() if key != "samples"} if isinstance(value, dict) else value
        for name, value in record.items()
    }
    print(json.dumps(shown), flush=True)


def time_cell(seconds: float) -> str:
    """Return a time in a readable unit."""
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )


def ratio_cell(part: dict[str, Any]) -> str:
    """Return the ratio of medians with the extremes in a round."""
    low, high = part["ratio_range"]
    return f"{part['ratio']:.3g} ({low:.3g}-{high:.3g})"


def latency_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of latencies as Markdown."""
    lines = [
        "| model | series | step | p99 of single steps | step and forecast | whole window again "
        "| window / step (range) | window / step and forecast (range) | state of the layers | whole state |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tail = time_cell(row["single_step"]["p99"]) if "single_step" in row else ""
        cells = [row["model"], row["series"], time_cell(row["step"]["seconds"]), tail]
        cells += [time_cell(row[key]["seconds"]) for key in ("step_and_forecast", "window")]
        cells += [ratio_cell(row[key]) for key in ("step", "step_and_forecast")]
        cells += [f"{row['state'][key] / 1e3:,.1f} kB" for key in ("layers", "total")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def memory_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of memory as Markdown."""
    lines = [
        "| series | steps | s | state before and after, kB | resident before and after, MB | change, MB "
        "| resident after each tenth, MB | carried forecast against forward on all rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [row["series"], f"{row['steps']:,}", f"{row['seconds']:.1f}"]
        shown.append(f"{row['state_before'] / 1e3:,.1f}, {row['state_after'] / 1e3:,.1f}")
        if row["resident_before"] is None or row["resident_after"] is None:
            shown += ["not told", "not told", "not told"]
        else:
            before, after = row["resident_before"] / 1e6, row["resident_after"] / 1e6
            shown += [f"{before:.1f}, {after:.1f}", f"{after - before:+.2f}"]
            shown.append(", ".join(f"{part / 1e6:.0f}" for part in row.get("resident_tenths", []) if part is not None))
        known = "difference" in row
        shown.append(f"{row['difference']:.1e} (largest value {row['largest_forecast']:.2g})" if known else "")
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return lines


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    about, tables = result["about"], result["tables"]
    lines = [f"# Carrying a state, {about['date']}", ""]
    if about["quick"]:
        lines += ["**Toy sizes (--quick): the figures mean nothing.**", ""]
    sizes = ", ".join(f"{name} {value}" for name, value in about["size"].items())
    lines += [
        f"{about['hardware']}, {about['threads']} thread(s), load {about['load'][0]:.1f} at the start and "
        f"{about['load'][1]:.1f} at the end; torch {about['torch']}, Python {about['python']}, revision "
        f"{about['revision']}. {sizes}, context {about['context']}, horizon {about['horizon']}, patch_length 1, "
        f"normalisation none, evaluation without gradients. Medians of {about['rounds']} rounds in turns "
        f"({SLOW_ROUNDS} for calls above {SLOW_SECONDS:g} s); in brackets least and largest ratio within a round.",
        "",
        "## Latency of one new row a series, all series together",
        "",
        *latency_lines(tables["latency"]),
        "",
        f"The whole window is read {ROWS_AT_ONCE} rows (series times variates) at a time, with cached kernels. The "
        "whole state also holds the rows that the linear map reads.",
        "",
        "## Memory over many steps of s4",
        "",
        *memory_lines(tables["memory"]),
        "",
        f"## Agreement: largest difference of forecasts carried step by step, {about['history']} rows of history",
        "",
        "| model | context, to forward | history, to forward | history, from warm_up | largest forecast |",
        "|---|---|---|---|---|",
    ]
    for row in tables["agreement"]:
        cells = [f"{row[key]:.1e}" for key in ("context", "history", "history_from_warm_up")]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + f" | {row['largest']:.2g} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="toy sizes, three rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--many-steps", type=int, default=FULL.runs[1][1], help="steps of the memory run of 1000 series"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = QUICK if given.quick else replace(FULL, runs=(FULL.runs[0], (FULL.runs[1][0], given.many_steps)))
    load = os.getloadavg()[0]
    tables = run(plan)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} {platform.machine()} cores",
        "threads": given.threads,
        "load": [load, os.getloadavg()[0]],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
        "quick": given.quick,
        "size": plan.size,
        "context": plan.context,
        "horizon": plan.horizon,
        "history": plan.history,
        "rounds": plan.rounds,
    }
    result = {"about": about, "tables": tables}
    text = page(result)
    if given.out is not None:
        for ending, content in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
            with atomic_file(given.out.with_name(given.out.name + ending)) as temporary:
                temporary.write_text(content, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
