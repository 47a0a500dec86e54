"""Attention of one fixed query over all prefixes: chunks, masked softmax, fused kernel and step loop, in one run.

    python benchmarks/recurrent.py --out benchmarks/results/recurrent_HARDWARE_DATE [--device auto] [--threads 1]

Writes ``OUT.json`` and ``OUT.md``; without ``--out`` it only prints. Every round runs all methods of a size in turns;
given are medians over rounds and the ratio of medians to the chunks, with its least and largest value within a round.
Calls above one second take part in three rounds only. Peak memory is that of tensors alive at once beyond the inputs
(CPU: allocations seen by the profiler; GPU: the allocator's own peak). The training step is forward and backward pass
to the gradients of scores and values. Errors are the largest deviation from the loop in float64. "Ramp" is the error
when scores rise from -100 to 100 over the sequence; "nan" is what it says.

The methods: ``chunks`` (the package), the same with a decay; ``masked softmax``: a square matrix for every sequence, as
one writes attention with the repeated query; ``fused causal attention``: torch's kernel, given the query at every
position; ``loop``: the recurrence, step after step; ``sums in chunks``: running sums of e^(score - chunk maximum), less
work, but not safe (see the ramp). The last two and the softmax are written here.

``--quick`` runs everything on toy sizes, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _measure import (
    SLOW_ROUNDS,
    SLOW_SECONDS,
    arguments,
    describe,
    heading,
    in_turns,
    peak_bytes,
    ratio_cell,
    summarise,
    tell,
    without_gradients,
    write,
)
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tsforge.ops.prefix_attention import merge, nothing, prefix_attention, token

Size = tuple[int, int, int]  # sequences (rows times heads), steps, entries of a value
BASE = "chunks"


@dataclass(frozen=True)
class Plan:
    """Where and how much is measured."""

    device: torch.device
    sizes: tuple[Size, ...] = ((128, 96, 16), (32, 336, 16), (16, 1024, 16), (4, 4096, 16), (4, 16384, 16))
    largest_matrix: int = 2**27  # entries of all square matrices together
    rounds: int = 5
    least_seconds: float = 0.02


QUICK: dict[str, Any] = {"sizes": ((4, 20, 4), (2, 70, 4)), "largest_matrix": 2000, "rounds": 3, "least_seconds": 1e-3}


@dataclass(frozen=True)
class Inputs:
    """Keys [B, n, E] and values [B, n, E] of the fixed query [E], whose scores [B, n] are what most methods take."""

    scores: Tensor
    values: Tensor


def masked_softmax(given: Inputs) -> Tensor:
    """Return the outputs by a softmax over square matrices."""
    length = given.scores.shape[-1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=given.scores.device).triu(1)
    repeated = given.scores.unsqueeze(-2).expand(*given.scores.shape, length)
    return repeated.masked_fill(ahead, -torch.inf).softmax(-1) @ given.values


def fused(given: Inputs) -> Tensor:
    """Return the outputs by torch's causal attention: the score is the first entry of a key, the query (1, 0 ...)."""
    width = given.values.shape[-1]
    keys = pad(given.scores.unsqueeze(-1), (0, width - 1))
    query = torch.zeros_like(given.values)
    query[..., 0] = 1.0
    parts = (part.unsqueeze(1) for part in (query, keys, given.values))
    return scaled_dot_product_attention(*parts, is_causal=True, scale=1.0)[:, 0]


def loop(given: Inputs) -> Tensor:
    """Return the outputs of the recurrence, one token at a time."""
    state = nothing(given.scores.shape[:-1], given.values.shape[-1], given.scores)
    outputs = []
    for score, value in zip(given.scores.unbind(-1), given.values.unbind(-2), strict=True):
        state = merge(state, token(score, value))
        outputs.append(state.output())
    return torch.stack(outputs, dim=-2)


def sums_in_chunks(given: Inputs, chunk: int = 64) -> Tensor:
    """Return the outputs by running sums within chunks, each with one maximum; needs a whole number of chunks."""
    *lead, length = given.scores.shape
    chunk = min(chunk, length)
    missing = -length % chunk
    scores = pad(given.scores, (0, missing), value=-torch.inf).reshape(*lead, -1, chunk)
    values = pad(given.values, (0, 0, 0, missing)).reshape(*lead, -1, chunk, given.values.shape[-1])
    own = scores.detach().amax(-1)
    top = own.cummax(-1).values
    part = (scores - top.unsqueeze(-1)).exp()
    weight, total = part.cumsum(-1), (part.unsqueeze(-1) * values).cumsum(-2)
    held = torch.zeros_like(top[..., 0]), torch.zeros_like(total[..., 0, 0, :])
    before: list[tuple[Tensor, Tensor]] = []
    for index in range(scores.shape[-2]):
        if index:
            shrink = (top[..., index - 1] - top[..., index]).exp()
            held = shrink * held[0], shrink.unsqueeze(-1) * held[1]
        before.append(held)
        held = held[0] + weight[..., index, -1], held[1] + total[..., index, -1, :]
    weight = weight + torch.stack([one for one, _ in before], dim=-1).unsqueeze(-1)
    total = total + torch.stack([two for _, two in before], dim=-2).unsqueeze(-2)
    return (total / weight.unsqueeze(-1)).flatten(-3, -2)[..., :length, :]


def chunks(given: Inputs) -> Tensor:
    """Return the outputs as the package makes them."""
    return prefix_attention(given.scores, given.values)[0]


def decayed(given: Inputs) -> Tensor:
    """Return the outputs of the package with a decay; another result."""
    decay = given.scores.new_full((len(given.scores),), 0.01)
    return prefix_attention(given.scores, given.values, decay)[0]


METHODS: dict[str, Callable[[Inputs], Tensor]] = {
    BASE: chunks,
    "chunks, decay": decayed,
    "sums in chunks": sums_in_chunks,
    "masked softmax": masked_softmax,
    "fused causal attention": fused,
    "loop": loop,
}


def training_step(method: Callable[[Inputs], Tensor], given: Inputs, probe: Tensor) -> Callable[[], Tensor]:
    """Return a call that goes forward and back to the gradients of scores and values."""

    def run() -> Tensor:
        given.scores.grad = given.values.grad = None
        (method(given) * probe).sum().backward()
        assert given.scores.grad is not None
        return given.scores.grad

    return run


def size_rows(size: Size, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a record a method, and what was not measured."""
    sequences, length, width = size
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in ((sequences, length), (sequences, length, width))]
    given = Inputs(*(part.to(plan.device).requires_grad_() for part in parts))
    ramp = Inputs(torch.linspace(-100, 100, length, device=plan.device).expand(sequences, -1), given.values)
    probe = torch.randn(sequences, length, width, generator=generator).to(plan.device)
    methods, missing = dict(METHODS), {}
    if sequences * length**2 > plan.largest_matrix:
        del methods["masked softmax"]
        missing[f"masked softmax at {length} steps"] = f"{4e-9 * sequences * length**2:.1f} GB a matrix"
    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {
            name: without_gradients(lambda method=method: method(given))  # type: ignore[misc]
            for name, method in methods.items()
        },
        "both": {name: training_step(method, given, probe) for name, method in methods.items()},
    }
    samples = {which: in_turns(calls, plan) for which, calls in passes.items()}
    rows = []
    with torch.no_grad():
        truths = [loop(Inputs(part.scores.double(), part.values.double())) for part in (given, ramp)]
    for name, method in methods.items():
        row: dict[str, Any] = {"size": list(size), "method": name}
        for which in passes:
            row[which] = summarise(samples[which], BASE, inverse=True)[name]
            row[f"{which}_peak_mb"] = peak_bytes(passes[which][name], plan.device) / 1e6
        with torch.no_grad():
            errors = [
                float((method(part) - truth).abs().max()) for part, truth in zip((given, ramp), truths, strict=True)
            ]
        row |= {} if method is decayed else dict(zip(("error", "ramp"), errors, strict=True))
        rows.append(row)
        tell(row)
    return rows, missing


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    about = result["about"]
    *lines, hardware = heading("Attention of one fixed query over all prefixes", about)
    lines += [
        f"{hardware} float32. Medians of {about['rounds']} rounds in turns ({SLOW_ROUNDS} for calls above "
        f"{SLOW_SECONDS:g} s); ratios say how many times the time of `{BASE}` a method takes, in brackets the least "
        "and largest within a round. Peak memory: tensors alive at once beyond the inputs. Errors against the loop in "
        "float64; ramp: with scores that rise from -100 to 100."
    ]
    for rows in result["tables"]:
        sequences, length, width = rows[0]["size"]
        lines += [
            "",
            f"## {length} steps, {sequences} sequences, values of {width}",
            "",
            "| method | forward, ms | x chunks (range) | forward + backward, ms | x chunks (range) | peak MB, forward "
            "| forward + backward | error | ramp |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [row["method"]]
            for which in ("forward", "both"):
                cells += [f"{row[which]['ms']:.3g}", ratio_cell(row[which])]
            cells += [f"{row[f'{which}_peak_mb']:.3g}" for which in ("forward", "both")]
            cells += [f"{row[kind]:.1e}" if kind in row else "" for kind in ("error", "ramp")]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"Not measured: {name}: {reason}." for name, reason in result["missing"].items())]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, write and print."""
    given = arguments(__doc__)
    plan = Plan(device=torch.device(given.device), **(QUICK if given.quick else {}))
    load = os.getloadavg()[0]
    tables: list[list[dict[str, Any]]] = []
    missing: dict[str, str] = {}
    for size in plan.sizes:
        rows, absent = size_rows(size, plan)
        tables.append(rows)
        missing |= absent
    result = {"about": {**describe(given, load), "rounds": plan.rounds}, "tables": tables, "missing": missing}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
