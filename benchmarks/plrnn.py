"""The PLRNN under teacher forcing: all back ends at seven sizes, the free run, and seeds side by side, in one run.

    python benchmarks/plrnn.py --out benchmarks/results/plrnn_HARDWARE_DATE [--device auto] [--threads 1,2]

Writes ``OUT.json`` and ``OUT.md``; without ``--out`` it only prints. Clipped map, float32, forcing strength 0.1, no
inputs. Every round runs all methods of a size in turns; given are medians over rounds and the ratio of medians to the
loop under plain autograd (``reference``), with its least and largest value within a round. Calls above one second take
part in three rounds only. The training step is forward and backward pass to the gradients of z1 and of the five
parameters. Errors are the largest deviation of the states, and of a gradient, from the loop in float64, relative to
the largest value of each. "Expected" is what the plan for this recurrence had measured; nothing is asserted.

``newton`` takes part up to 16 latent units. The free run starts from one state; what is slow runs fewer steps, times
are for one step. Seeds side by side are compared with as many runs one after another of the same back end.

``--threads`` is a list: everything is measured with each number of threads of torch, whatever OMP_NUM_THREADS says,
with more than one at two sizes and without ``newton``. The page is written again as the measurement proceeds.
``--quick`` runs everything on toy sizes, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _measure import (
    SLOW_ROUNDS,
    SLOW_SECONDS,
    arguments,
    describe,
    heading,
    in_turns,
    ratio_cell,
    summarise,
    tell,
    without_gradients,
    write,
)
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.plrnn import Backend, Shallow, free_run, gtf_sequence

Size = tuple[int, int, int, int]  # batch, steps, latent units, hidden units

ALPHA = 0.1
NEWTON_LATENT = 16  # Jacobians are M x M; above, Newton's iterations cost too much


@dataclass(frozen=True)
class Plan:
    """Where and how much is measured."""

    device: torch.device
    sizes: tuple[Size, ...] = (
        (16, 200, 3, 50),
        (16, 200, 5, 250),
        (16, 200, 16, 512),
        (16, 200, 64, 512),
        (64, 200, 3, 50),
        (64, 200, 64, 512),
        (16, 50, 16, 512),
    )
    threaded_sizes: tuple[Size, ...] = ((16, 200, 3, 50), (16, 200, 64, 512))  # with more than one thread
    free_sizes: tuple[tuple[int, int], ...] = ((3, 50), (64, 512))
    free_steps: int = 20_000
    slow_steps: int = 2_000  # of a free run that is a loop in Python
    seeds: int = 5
    rounds: int = 5
    least_seconds: float = 0.01


QUICK: dict[str, Any] = {
    "sizes": ((2, 6, 3, 5), (2, 6, 20, 7)),
    "threaded_sizes": ((2, 6, 3, 5),),
    "free_sizes": ((3, 5),),
    "free_steps": 40,
    "slow_steps": 20,
    "seeds": 2,
    "rounds": 3,
    "least_seconds": 0.001,
}
# Of the plan, a quiet server of two cores, least of repetitions: milliseconds of a training step (forward pass) with
# threads, size and method; the free run in microseconds a step.
EXPECTED: dict[tuple[int, Size, str], str] = {
    (1, (16, 200, 3, 50), "reference"): "13.7 (3.6)",
    (1, (16, 200, 3, 50), "function"): "4.8",
    (1, (16, 200, 3, 50), "compiled"): "0.48 (0.16)",
    (1, (16, 200, 5, 250), "reference"): "17.5 (3.9)",
    (1, (16, 200, 5, 250), "function"): "10.7",
    (1, (16, 200, 5, 250), "compiled"): "1.59 (0.48)",
    (1, (16, 200, 16, 512), "reference"): "22.4 (5.2)",
    (1, (16, 200, 16, 512), "function"): "16.1",
    (1, (16, 200, 16, 512), "compiled"): "6.9 (1.85)",
    (1, (16, 200, 64, 512), "reference"): "36.9 (9.2)",
    (1, (16, 200, 64, 512), "function"): "28.5",
    (1, (16, 200, 64, 512), "compiled"): "27.2 (7.2)",
    (2, (16, 200, 3, 50), "reference"): "15.9",
    (2, (16, 200, 3, 50), "function"): "5.7",
    (2, (16, 200, 3, 50), "compiled"): "0.32",
    (2, (16, 200, 64, 512), "reference"): "48.5",
    (2, (16, 200, 64, 512), "function"): "26.2",
    (2, (16, 200, 64, 512), "compiled"): "14.7",
    (1, (64, 200, 3, 50), "reference"): "16.4",
    (1, (64, 200, 3, 50), "function"): "11.1",
    (1, (64, 200, 3, 50), "compiled"): "1.9",
    (1, (64, 200, 64, 512), "reference"): "86",
    (1, (64, 200, 64, 512), "function"): "85",
    (1, (64, 200, 64, 512), "compiled"): "104",
    (1, (16, 50, 16, 512), "reference"): "4.7",
    (1, (16, 50, 16, 512), "function"): "3.4",
    (1, (16, 50, 16, 512), "compiled"): "1.4",
}
EXPECTED_FREE: dict[tuple[int, int, str], str] = {
    (3, 50, "reference"): "8.5",
    (3, 50, "compiled"): "0.07",
    (64, 512, "reference"): "11",
    (64, 512, "compiled"): "1.7",
}


# ---- inputs and methods


def problem(size: Size, groups: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Return z1 (G, B, M) with A, W1, W2, h1, h2 of G groups, which want gradients, and the forcing (G, T, B, M)."""
    batch, steps, latent, hidden = size
    torch.manual_seed(0)
    values = [
        torch.randn(groups, batch, latent),
        0.5 + 0.4 * torch.rand(groups, latent),
        0.5 * torch.randn(groups, latent, hidden) / hidden**0.5,
        torch.randn(groups, hidden, latent) / latent**0.5,
        0.1 * torch.randn(groups, latent),
        torch.randn(groups, hidden),
    ]
    return [value.to(device).requires_grad_() for value in values], torch.randn(groups, steps, batch, latent).to(device)


def single(parts: list[Tensor], forcing: Tensor, group: int = 0) -> tuple[list[Tensor], Tensor]:
    """Return one group's inputs as leaves of their own, without the axis of groups."""
    return [part[group].detach().clone().requires_grad_() for part in parts], forcing[group].clone()


def states(backend: Backend, parts: list[Tensor], forcing: Tensor) -> Tensor:
    """Return the unforced states."""
    return gtf_sequence(parts[0], forcing, ALPHA, Shallow(*parts[1:]), clipped=True, backend=backend)


def training_step(call: Callable[[], Tensor], parts: list[Tensor], probe: Tensor) -> Callable[[], Any]:
    """Return forward and backward pass as one call."""
    return lambda: torch.autograd.grad(call(), parts, probe)


def backends_for(latent: int, device: torch.device, *, newton: bool) -> tuple[list[Backend], dict[str, str]]:
    """Return the back ends that run here with so many latent units, the loop first, and why others do not."""
    wanted: list[Backend] = ["reference", "function", "triton" if device.type == "cuda" else "compiled"]
    if newton and latent <= NEWTON_LATENT and torch.get_num_threads() == 1:
        wanted.append("newton")
    found: list[Backend] = []
    missing: dict[str, str] = {}
    parts, forcing = problem((1, 2, latent, 4), 1, device)
    for backend in wanted:
        try:
            states(backend, parts, forcing)
            found.append(backend)
        except ModelError as error:
            missing[backend] = str(error)
    return found, missing


def runnable(size: Size, parts: list[Tensor], forcing: Tensor, plan: Plan) -> tuple[list[Backend], dict[str, str]]:
    """Return the back ends that run at this size, and why others do not: limits may depend on the size."""
    found, missing = backends_for(size[2], plan.device, newton=True)
    for backend in list(found):
        try:
            states(backend, parts, forcing)
        except ModelError as error:
            found.remove(backend)
            missing[f"{backend} at {size}"] = str(error)
    return found, missing


def relative(found: Tensor, truth: Tensor) -> float:
    """Return the largest deviation relative to the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


# ---- tables


def size_rows(size: Size, threads: int, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return time and errors of all back ends at one size, and why some are missing."""
    parts, forcing = single(*problem(size, 1, plan.device))
    backends, missing = runnable(size, parts, forcing, plan)
    probe = torch.randn(forcing.shape, generator=torch.Generator().manual_seed(1)).to(plan.device)
    calls = {str(backend): partial(states, backend, parts, forcing) for backend in backends}
    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: without_gradients(call) for name, call in calls.items()},
        "both": {name: training_step(call, parts, probe) for name, call in calls.items()},
    }
    stats = {which: summarise(in_turns(methods, plan), "reference") for which, methods in passes.items()}
    exact = [part.detach().double().requires_grad_() for part in parts]
    truth = states("reference", exact, forcing.double())
    slopes = torch.autograd.grad(truth, exact, probe.double())
    rows = []
    for name in calls:
        gradients = passes["both"][name]()
        row: dict[str, Any] = {"size": list(size), "threads": threads, "method": name}
        row |= {which: stats[which][name] for which in passes}
        row["error"] = relative(passes["forward"][name](), truth.detach())
        row["gradient_error"] = max(relative(ours, peer) for ours, peer in zip(gradients, slopes, strict=True))
        row["expected"] = EXPECTED.get((threads, size, name)) if plan.device.type == "cpu" else None
        rows.append(row)
        tell(row)
    return rows, missing


def free_rows(threads: int, plan: Plan) -> list[dict[str, Any]]:
    """Return microseconds of one step of a free run from one state."""
    rows = []
    for latent, hidden in plan.free_sizes:
        parts, _ = single(*problem((1, 1, latent, hidden), 1, plan.device))
        backends, _ = backends_for(latent, plan.device, newton=False)
        steps = {
            str(name): plan.slow_steps if name in ("reference", "function") else plan.free_steps for name in backends
        }
        calls: dict[str, Callable[[], Any]] = {
            str(name): partial(free_run, parts[0], Shallow(*parts[1:]), steps[str(name)], clipped=True, backend=name)
            for name in backends
        }
        samples = {
            name: [1e3 * value / steps[name] for value in values] for name, values in in_turns(calls, plan).items()
        }
        for name, stat in summarise(samples, "reference").items():
            stat["us"] = stat.pop("ms")  # the samples were scaled to microseconds a step
            expected = EXPECTED_FREE.get((latent, hidden, name)) if plan.device.type == "cpu" else None
            row = {"latent": latent, "hidden": hidden, "threads": threads, "method": name, "steps": steps[name]}
            rows.append({**row, "step": stat, "expected": expected})
            tell(rows[-1])
    return rows


def seed_rows(threads: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the training step of several seeds side by side and one after another, for every back end."""
    size = plan.sizes[0]
    parts, forcing = problem(size, plan.seeds, plan.device)
    ones = [single(parts, forcing, group) for group in range(plan.seeds)]
    backends, _ = backends_for(size[2], plan.device, newton=False)
    calls: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        each = [training_step(partial(states, backend, *one), one[0], torch.ones_like(one[1])) for one in ones]
        calls[f"{backend}, in turn"] = lambda each=each: [call() for call in each]  # type: ignore[misc]
        calls[f"{backend}, side by side"] = training_step(
            partial(states, backend, parts, forcing), parts, torch.ones_like(forcing)
        )
    samples = in_turns(calls, plan)
    to_loop = summarise(samples, "reference, in turn")
    rows = []
    for name in calls:
        own = summarise(samples, name.split(",")[0] + ", in turn")[name]
        row = {"size": list(size), "seeds": plan.seeds, "threads": threads, "method": name}
        rows.append({**row, "both": own, "both_to_loop": to_loop[name]})
        tell(rows[-1])
    return rows


# ---- the page


def size_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of one size as Markdown."""
    lines = [
        "",
        f"## (B, T, M, H) = ({', '.join(map(str, rows[0]['size']))}), {rows[0]['threads']} thread(s)",
        "",
        "| back end | forward, ms | x loop (range) | forward + backward, ms | x loop (range) | error | of gradients "
        "| expected, ms: both (forward) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["method"]]
        for which in ("forward", "both"):
            cells += [f"{row[which]['ms']:.3g}", ratio_cell(row[which])]
        cells += [f"{row['error']:.1e}", f"{row['gradient_error']:.1e}", row["expected"] or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def free_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of free runs as Markdown."""
    lines = [
        "",
        "## Free run from one state",
        "",
        "| M, H | threads | back end | steps | us/step | x loop (range) | expected, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['latent']}, {row['hidden']}", str(row["threads"]), row["method"], str(row["steps"])]
        cells += [f"{row['step']['us']:.3g}", ratio_cell(row["step"]), row["expected"] or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def seed_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of seeds side by side as Markdown."""
    lines = [
        "",
        f"## {rows[0]['seeds']} seeds at (B, T, M, H) = ({', '.join(map(str, rows[0]['size']))}), forward + backward",
        "",
        "| threads | method | ms of all seeds | x in turn, same back end (range) | x loop in turn (range) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["threads"]), row["method"], f"{row['both']['ms']:.3g}"]
        lines.append("| " + " | ".join([*cells, ratio_cell(row["both"]), ratio_cell(row["both_to_loop"])]) + " |")
    return lines


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    about = result["about"]
    *lines, hardware = heading("PLRNN under teacher forcing: cost of all back ends", about)
    lines += [
        f"{hardware} float32, clipped map, alpha {ALPHA}. Medians of {about['rounds']} rounds in turns ({SLOW_ROUNDS} "
        f"for calls above {SLOW_SECONDS:g} s); in brackets least and largest ratio within a round. Ratios say how many "
        "times faster than the loop under plain autograd (reference). Errors: against that loop in float64. Expected: "
        "the plan's figures, least of repetitions on a quiet server of two cores."
    ]
    for rows in result["tables"]:
        lines += size_lines(rows)
    lines += free_lines(result["free"]) + seed_lines(result["seeds"])
    lines += ["", *(f"Not measured: {name}: {reason}." for name, reason in result["missing"].items())]
    return "\n".join([*lines, ""])


def thread_counts(text: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--threads", type=thread_counts, default=[1, 2])
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest  # the shared options know one number of threads only
    given = arguments(__doc__)
    plan = Plan(device=torch.device(given.device), **(QUICK if given.quick else {}))
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"about": {}, "tables": [], "free": [], "seeds": [], "missing": {}}
    result["missing"]["the rest"] = "the run was stopped"

    def save() -> None:
        given.threads = ", then ".join(map(str, own.threads))
        result["about"] = {**describe(given, load), "rounds": plan.rounds}
        write(given.out, result, page(result))

    for threads in own.threads:
        torch.set_num_threads(threads)
        if torch.get_num_threads() != threads:
            raise SystemExit(f"torch runs {torch.get_num_threads()} thread(s), not {threads}")
        for size in plan.sizes if threads == 1 else plan.threaded_sizes:
            rows, absent = size_rows(size, threads, plan)
            result["tables"].append(rows)
            result["missing"] |= absent
            if result["seeds"]:  # what was measured is kept if contending threads take too long
                save()
        result["free"] += free_rows(threads, plan)
        result["seeds"] += seed_rows(threads, plan)
        save()
    del result["missing"]["the rest"]
    save()


if __name__ == "__main__":
    main()
