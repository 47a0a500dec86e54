"""The 2-D scan: all back ends at five grid sizes, forward pass and training step, time and peak memory, in one run.

    python benchmarks/scan2d.py --out benchmarks/results/scan2d_HARDWARE_DATE [--device auto] [--threads 1]

Writes ``OUT.json`` and ``OUT.md``; without ``--out`` it only prints. Every round runs all methods of a size in turns;
given are medians over rounds and the ratio of medians to the loop and to the wavefront, with its least and largest
value within a round. Calls above one second take part in three rounds only. Peak memory is that of tensors alive at
once beyond the inputs (CPU: allocations seen by the profiler; GPU: the allocator's own peak). The training step is
forward and backward pass to the gradients of all eleven inputs. Errors are the largest deviation of y from the
wavefront in float64, relative to its largest value. "Expected" is what the plan for this scan had measured or
required; nothing is asserted.

The methods: the double loop, three times (``loop``: the reference of the package; ``loop, factors ahead``: the plan's
peer, which slices the factors of all cells, so that autograd makes a tensor of zeros of their whole size for each
slice; ``loop, unbound``: the grids are taken apart once, the fastest; the last two are written here); rows with a
prefix scan; the wavefront under plain autograd, which is written here too, and with recomputation; the compiled CPU or
the Triton kernel; and, with constant parameters of the same sizes, the impulse response with a 2-D FFT.

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

from tsforge.core.errors import ModelError
from tsforge.ops.scan2d import Backend, discrete_factors, scan2d, scan2d_reference
from tsforge.ops.scan2d_lti import lti_kernel2d, lti_scan2d, lti_system2d

Size = tuple[int, int, int, int, int]  # batch, variates, steps, channels, states


@dataclass(frozen=True)
class Plan:
    """Where and how much is measured."""

    device: torch.device
    sizes: tuple[Size, ...] = (
        (32, 7, 96, 16, 8),
        (32, 7, 12, 64, 16),
        (4, 64, 96, 16, 8),
        (1, 321, 96, 8, 8),
        (1, 7, 96, 16, 8),
    )
    loop_cells: int = 672  # largest grid for which the loops are waited for
    rounds: int = 7
    least_seconds: float = 0.02


QUICK: dict[str, Any] = {
    "sizes": ((2, 3, 8, 4, 2), (1, 9, 5, 4, 2)),
    "loop_cells": 24,
    "rounds": 3,
    "least_seconds": 0.001,
}
# Of the plan, float32, one thread of a shared CPU server: milliseconds forward / training step, and what is asked for.
EXPECTED: dict[tuple[Size, str], str] = {
    ((32, 7, 96, 16, 8), "loop, factors ahead"): "221 / 12294",
    ((32, 7, 96, 16, 8), "rows"): "128-137 / 631-838",
    ((32, 7, 96, 16, 8), "wavefront, autograd"): "69-77 / 393-503",
    ((32, 7, 96, 16, 8), "wavefront"): "52-70 / 275-309; training >= 35 x loop, <= 80 MB",
    ((32, 7, 96, 16, 8), "compiled"): "10-23 / -; >= 3 x wavefront, both",
    ((32, 7, 96, 16, 8), "constant, FFT"): "10 / 39",
    ((32, 7, 12, 64, 16), "loop, factors ahead"): "89 / 1387",
    ((32, 7, 12, 64, 16), "rows"): "55-75 / 372-421",
    ((32, 7, 12, 64, 16), "wavefront, autograd"): "64-72 / 255-269",
    ((32, 7, 12, 64, 16), "wavefront"): "60-61 / 225-247",
    ((32, 7, 12, 64, 16), "compiled"): "3-12 / -",
    ((32, 7, 12, 64, 16), "constant, FFT"): "5 / 15",
    ((4, 64, 96, 16, 8), "rows"): "116 / 2055",
    ((4, 64, 96, 16, 8), "wavefront, autograd"): "118 / 871",
    ((4, 64, 96, 16, 8), "wavefront"): "149 / 641",
    ((4, 64, 96, 16, 8), "compiled"): "7-22 / -",
    ((4, 64, 96, 16, 8), "constant, FFT"): "17 / 61",
    ((1, 321, 96, 8, 8), "rows"): "175 / 4405",
    ((1, 321, 96, 8, 8), "wavefront, autograd"): "142 / 2339",
    ((1, 321, 96, 8, 8), "wavefront"): "83 / 475",
    ((1, 7, 96, 16, 8), "loop, factors ahead"): "57 / 622",
    ((1, 7, 96, 16, 8), "rows"): "2.3 / 36",
    ((1, 7, 96, 16, 8), "wavefront, autograd"): "15 / 199",
    ((1, 7, 96, 16, 8), "wavefront"): "18 / 96",
    ((1, 7, 96, 16, 8), "compiled"): "0.2 / -",
}


@dataclass(frozen=True)
class Method:
    """One way to make y (b, N, T, D); ``inputs`` want gradients."""

    inputs: list[Tensor]
    call: Callable[[], Tensor]


# ---- methods


def selective_inputs(size: Size, device: torch.device) -> list[Tensor]:
    """Return x, dt1, dt2, A1..A4, B1, B2, C1, C2 with steps from 1e-3 to 1."""
    batch, variates, steps, channels, states = size
    torch.manual_seed(0)
    grid = (batch, variates, steps, channels)
    rate = torch.arange(1.0, states + 1.0).expand(channels, states)
    dt = [10.0 ** (-3.0 * torch.rand(grid)) for _ in range(2)]
    A = [-rate, 0.5 * rate * torch.randn(channels, states).tanh(), 0.5 * rate * torch.randn(channels, states).tanh()]
    maps = [torch.randn(batch, variates, steps, 1, states) for _ in range(4)]
    values = [torch.randn(grid), *dt, *A, -rate, *maps]
    return [value.detach().clone().to(device).requires_grad_() for value in values]


def split(parts: list[Tensor]) -> tuple[Any, ...]:
    """Return x, dt, A, B, C as the scan takes them."""
    return parts[0], tuple(parts[1:3]), tuple(parts[3:7]), tuple(parts[7:9]), tuple(parts[9:11])


def unbound_loop(parts: list[Tensor]) -> Tensor:
    """Return y by the double loop over lists of cells: autograd then stacks their gradients once."""
    x, dt, A, B, C = split(parts)
    cells = [[row.unbind(1) for row in part.unbind(1)] for part in (x, *dt, *B, *C)]
    above1: list[Any] = [0.0] * x.shape[2]
    above2: list[Any] = [0.0] * x.shape[2]
    rows = []
    for v in range(x.shape[1]):
        h1: Any = 0.0
        h2: Any = 0.0
        outputs = []
        for t in range(x.shape[2]):
            u, dt1, dt2, b1, b2, c1, c2 = (part[v][t] for part in cells)
            f, u = discrete_factors((dt1, dt2), A), u.unsqueeze(-1)
            h1, h2 = (
                f.a1 * h1 + f.a2 * h2 + f.b1 * b1 * u,
                f.a3 * above1[t] + f.a4 * above2[t] + f.b2 * b2 * u,
            )
            above1[t], above2[t] = h1, h2
            outputs.append((c1 * h1 + c2 * h2).sum(-1))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows, dim=1)


def sliced_loop(parts: list[Tensor]) -> Tensor:
    """Return y by the double loop over slices of factors and forcings that were computed for all cells at once."""
    x, dt, A, B, C = split(parts)
    f, u = discrete_factors(dt, A), x.unsqueeze(-1)
    push1, push2 = f.b1 * B[0] * u, f.b2 * B[1] * u
    above1: list[Any] = [0.0] * x.shape[2]
    above2: list[Any] = [0.0] * x.shape[2]
    rows = []
    for v in range(x.shape[1]):
        h1: Any = 0.0
        h2: Any = 0.0
        outputs = []
        for t in range(x.shape[2]):
            h1, h2 = (
                f.a1[:, v, t] * h1 + f.a2[:, v, t] * h2 + push1[:, v, t],
                f.a3[:, v, t] * above1[t] + f.a4[:, v, t] * above2[t] + push2[:, v, t],
            )
            above1[t], above2[t] = h1, h2
            outputs.append((C[0][:, v, t] * h1 + C[1][:, v, t] * h2).sum(-1))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows, dim=1)


def autograd_wavefront(parts: list[Tensor]) -> Tensor:
    """Return y one padded antidiagonal after another, under plain autograd; the state axis is the shorter one."""
    x, dt, A, B, C = split(parts)
    swapped = x.shape[2] < x.shape[1]
    if swapped:
        x, dt, B, C = x.transpose(1, 2), dt[::-1], B[::-1], C[::-1]
        dt, B, C = (tuple(part.transpose(1, 2) for part in pair) for pair in (dt, B, C))
        A = A[::-1]
    first, last = x.shape[1:3]
    cell = torch.arange(first, device=x.device)[:, None]
    diagonal = cell + torch.arange(last, device=x.device)

    def skew(part: Tensor) -> Tensor:
        rows = part.new_zeros(first + last - 1, first, part.shape[0], *part.shape[3:])
        return rows.index_put((diagonal, cell), part.permute(1, 2, 0, *range(3, part.ndim)))

    f = discrete_factors((skew(dt[0]), skew(dt[1])), A)
    u = skew(x).unsqueeze(-1)
    push1, push2 = f.b1 * skew(B[0]) * u, f.b2 * skew(B[1]) * u
    zero = torch.zeros_like(push1[0, :1])
    h1 = h2 = torch.zeros_like(push1[0])
    states1, states2 = [], []
    factors = (f.a1, f.a2, push1, f.a3, f.a4, push2)
    for a1, a2, f1, a3, a4, f2 in zip(*(part.unbind(0) for part in factors), strict=True):
        up1, up2 = torch.cat([zero, h1[:-1]]), torch.cat([zero, h2[:-1]])
        h1, h2 = a1 * h1 + a2 * h2 + f1, a3 * up1 + a4 * up2 + f2
        states1.append(h1)
        states2.append(h2)
    y = (skew(C[0]) * torch.stack(states1) + skew(C[1]) * torch.stack(states2)).sum(-1)[diagonal, cell]
    return y.permute(2, 1, 0, 3) if swapped else y.permute(2, 0, 1, 3)


def constant_method(size: Size, device: torch.device) -> Method:
    """Return the convolution with the impulse response of constant parameters."""
    _, variates, steps, channels, states = size
    selective = selective_inputs(size, device)
    dt = [10.0 ** (-3.0 * torch.rand(channels)) for _ in range(2)]
    maps = [torch.randn(channels, states) for _ in range(4)]
    parts = [selective[0], *(value.to(device).requires_grad_() for value in dt), *selective[3:7]]
    parts += [value.to(device).requires_grad_() for value in maps]

    def call() -> Tensor:
        x, steps_of, A, B, C = split(parts)
        return lti_scan2d(x, lti_kernel2d(lti_system2d(steps_of, A, B, C), variates, steps))

    return Method(parts, call)


def methods_for(size: Size, plan: Plan) -> tuple[dict[str, Method], dict[str, str]]:
    """Return the methods that run at this size, and why the others do not."""
    parts = selective_inputs(size, plan.device)
    x, dt, A, B, C = split(parts)
    found: dict[str, Method] = {}
    missing: dict[str, str] = {}
    if size[1] * size[2] <= plan.loop_cells:
        found["loop"] = Method(parts, lambda: scan2d_reference(x, dt, A, B, C).y)
        found["loop, factors ahead"] = Method(parts, lambda: sliced_loop(parts))
        found["loop, unbound"] = Method(parts, lambda: unbound_loop(parts))

    def method(backend: Backend) -> Method:
        return Method(parts, lambda: scan2d(x, dt, A, B, C, backend=backend).y)

    found["rows"] = method("rows")
    found["wavefront, autograd"] = Method(parts, lambda: autograd_wavefront(parts))
    found["wavefront"] = method("wavefront")
    kernel: Backend = "triton" if plan.device.type == "cuda" else "compiled"
    try:
        found[kernel] = method(kernel)
        found[kernel].call()
    except ModelError as error:
        del found[kernel]
        missing[kernel] = str(error)
    found["constant, FFT"] = constant_method(size, plan.device)
    return found, missing


# ---- tables


def training_step(method: Method, probe: Tensor) -> Callable[[], Any]:
    """Return forward and backward pass as one call."""
    return lambda: torch.autograd.grad(method.call(), method.inputs, probe)


def size_rows(size: Size, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return time, memory and error of all methods at one size, and why methods are missing."""
    methods, missing = methods_for(size, plan)
    probe = torch.randn(size[:4], generator=torch.Generator().manual_seed(1)).to(plan.device)
    passes = {
        "forward": {name: without_gradients(method.call) for name, method in methods.items()},
        "both": {name: training_step(method, probe) for name, method in methods.items()},
    }
    samples = {which: in_turns(calls, plan) for which, calls in passes.items()}
    x, dt, A, B, C = split([part.detach().double() for part in selective_inputs(size, plan.device)])
    truth = scan2d(x, dt, A, B, C, backend="wavefront").y
    rows = []
    for name in methods:
        row: dict[str, Any] = {"size": list(size), "method": name}
        for which in passes:
            row[which] = summarise(samples[which], "wavefront")[name]
            row[f"{which}_to_loop"] = summarise(samples[which], "loop")[name] if "loop" in methods else None
            row[f"{which}_peak_mb"] = peak_bytes(passes[which][name], plan.device) / 1e6
        error = (passes["forward"][name]().double() - truth).abs().max() / truth.abs().max()
        row["error"] = None if name == "constant, FFT" else float(error)
        row["expected"] = EXPECTED.get((size, name))
        rows.append(row)
        tell({key: value for key, value in row.items() if not key.endswith("_to_loop")})
    return rows, missing


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of one size as Markdown."""
    lines = [
        "",
        "## (b, N, T, D, S) = (" + ", ".join(map(str, rows[0]["size"])) + ")",
        "",
        "| method | forward, ms | x loop | x wavefront (range) | forward + backward, ms | x loop | x wavefront (range) "
        "| peak MB, forward | forward + backward | error | expected, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["method"]]
        for which in ("forward", "both"):
            loop = row[f"{which}_to_loop"]
            cells += [f"{row[which]['ms']:.3g}", "" if loop is None else f"{loop['ratio']:.3g}", ratio_cell(row[which])]
        cells += [f"{row[f'{which}_peak_mb']:.3g}" for which in ("forward", "both")]
        cells += ["" if row["error"] is None else f"{row['error']:.1e}", row["expected"] or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    about = result["about"]
    *lines, hardware = heading("2-D scan: cost of all back ends", about)
    lines += [
        f"{hardware} float32. Medians of {about['rounds']} rounds in turns ({SLOW_ROUNDS} for calls above "
        f"{SLOW_SECONDS:g} s); in brackets least and largest ratio within a round. Ratios say how many times faster. "
        "Peak memory: tensors alive at once beyond the inputs. The last row of a table is another model, with constant "
        "parameters."
    ]
    for rows in result["tables"]:
        lines += table_lines(rows)
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
    about = {**describe(given, load), "rounds": plan.rounds}
    result = {"about": about, "tables": tables, "missing": missing}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
