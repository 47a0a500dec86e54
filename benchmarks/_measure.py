"""What the benchmarks share: timing in turns, peak memory, and the shell around a result page.

Every round runs all methods in turns, so that a busy spell of the machine hits each of them; given are medians over
rounds, the ratio of medians, and the least and largest ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report every start and stop

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tsforge.artifact import collect_provenance
from tsforge.core.atomic import atomic_file

SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3


class Pace(Protocol):
    """Where and how often something is measured; calls shorter than ``least_seconds`` are repeated in one sample."""

    @property
    def device(self) -> torch.device: ...
    @property
    def rounds(self) -> int: ...
    @property
    def least_seconds(self) -> float: ...


def seconds_of(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return wall seconds of one of ``count`` calls in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def in_turns(calls: dict[str, Callable[[], Any]], plan: Pace) -> dict[str, list[float]]:
    """Return milliseconds of every call in every round it took part in; the order is reversed in every other round."""
    first = {name: seconds_of(call, 1, plan.device) for name, call in calls.items()}
    for name, call in calls.items():  # the first call also pays for libraries that load and plan
        if first[name] < SLOW_SECONDS:
            first[name] = seconds_of(call, 1, plan.device)
    counts = {name: min(max(math.ceil(plan.least_seconds / spent), 1), 200) for name, spent in first.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(plan.rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            if turn < SLOW_ROUNDS or statistics.median(found[name]) < 1e3 * SLOW_SECONDS:
                found[name].append(1e3 * seconds_of(calls[name], counts[name], plan.device))
    return found


def summarise(samples: dict[str, list[float]], base: str, *, inverse: bool = False) -> dict[str, dict[str, Any]]:
    """Return median, ratio of medians and extremes of the ratio in a round, for every method.

    The ratio says how many times faster than ``base`` a method is; with ``inverse``, how many times its time it takes.
    """
    middle = {name: statistics.median(values) for name, values in samples.items()}
    table = {}
    for name, values in samples.items():
        pairs = [ours / peer for ours, peer in zip(values, samples[base], strict=False)]
        pairs = pairs if inverse else [1.0 / pair for pair in pairs]
        ratio = middle[name] / middle[base] if inverse else middle[base] / middle[name]
        table[name] = {"ms": middle[name], "ratio": ratio, "ratio_range": [min(pairs), max(pairs)], "samples": values}
    return table


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes of tensors that were alive at once during a call, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    inner: Any = seen.profiler  # the tables of the public interface sum allocations, they do not say what was alive
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        live += int(event.nbytes())
        peak = max(peak, live)
    return peak


def without_gradients(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the call as evaluation runs it."""

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def tell(row: dict[str, Any]) -> None:
    """Print a record as soon as it is there, without its samples."""
    shown = {
        name: {key: part for key, part in value.items() if key != "samples"} if isinstance(value, dict) else value
        for name, value in row.items()
    }
    print(json.dumps(shown), flush=True)


def ratio_cell(stat: dict[str, Any]) -> str:
    """Return the ratio of medians with the extremes in a round."""
    low, high = stat["ratio_range"]
    return f"{stat['ratio']:.3g} ({low:.3g}-{high:.3g})"


# ---- the shell


def arguments(
    description: str | None,
    *,
    data: bool = False,
    numbers: dict[str, int] | None = None,
    parts: dict[str, Iterable[str]] | None = None,
) -> argparse.Namespace:
    """Read the options every benchmark has, set the threads and resolve ``device`` to a device that is there.

    Args:
        description: shown by ``--help``.
        data: also read ``data``, the folder of the shared data, which must be given.
        numbers: further options with a whole number each, and their defaults.
        parts: further options with some of these names, separated by commas; default: all.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        parser.add_argument("--data", type=Path, required=True, help="folder of the shared data")
    parser.add_argument("--out", type=Path, help="result path without ending; default: print only")
    parser.add_argument("--quick", action="store_true", help="toy sizes, three rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    for name, default in (numbers or {}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, known in (parts or {}).items():
        parser.add_argument(f"--{name}", default=",".join(known), help="some of the default, separated by commas")
    given = parser.parse_args()
    for name, known in (parts or {}).items():
        chosen = getattr(given, name).split(",")
        if strangers := set(chosen) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(strangers))} (known: {', '.join(known)})")
        setattr(given, name, chosen)
    torch.set_num_threads(given.threads)
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is there; use --device cpu")
    return given


def describe(given: argparse.Namespace, load_before: float) -> dict[str, Any]:
    """Return date, hardware, load and versions of a run."""
    cuda = given.device == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} {platform.machine()} cores",
        "device": given.device,
        "threads": given.threads,
        "load": [load_before, os.getloadavg()[0]],
        "torch": torch.__version__,
        "scipy": version("scipy"),
        "python": platform.python_version(),
        "revision": collect_provenance(data_fingerprint="", seeds={})["revision"],
        "quick": given.quick,
    }


def heading(title: str, about: dict[str, Any]) -> list[str]:
    """Return the first lines of a page: title, warning about toy sizes, and an open line on hardware and versions."""
    lines = [f"# {title}, {about['date']}", ""]
    if about["quick"]:
        lines += ["**Toy sizes (--quick): the figures mean nothing.**", ""]
    hardware = (
        f"{about['hardware']}, {about['threads']} thread(s), load {about['load'][0]:.1f} at the start and "
        f"{about['load'][1]:.1f} at the end; torch {about['torch']}, scipy {about['scipy']}, Python "
        f"{about['python']}, revision {about['revision']}."
    )
    return [*lines, hardware]


def write(out: Path | None, result: dict[str, Any], text: str) -> None:
    """Write OUT.json and OUT.md, if asked to, and print the page."""
    if out is not None:
        for ending, content in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
            with atomic_file(out.with_name(out.name + ending)) as temporary:
                temporary.write_text(content, encoding="utf-8")
    print(text)
