"""State space layers: kernels, blocks, convolutions and scans against their plain forms, in one run.

    python benchmarks/ssm_kernels.py --out benchmarks/results/ssm_kernels_HARDWARE_DATE [--device auto] [--threads 1]

Writes ``OUT.json`` and ``OUT.md``; without ``--out`` it only prints. Every round runs all methods of a table in turns,
so that a busy spell of the machine hits each of them; given are medians over rounds, the ratio of medians, and the
least and largest ratio within one round. Calls above one second take part in three rounds only. Peak memory is that of
tensors alive at once beyond the inputs (CPU: allocations seen by the profiler, so scratch space of FFT and BLAS
libraries is not in it; GPU: the allocator's own peak). Errors are the largest deviation from float64 within a row
(feature), relative to the largest value of that row, of the worst row. "Expected" is what the plan for these layers
had measured or required; nothing is asserted.

The peers: the naive complex Vandermonde product; the block around it, the doubling of the Krylov matrix, the Cauchy
form of S4 and plain FFTs are written in ``_ssm_reference.py``.

``--quick`` runs everything on toy sizes, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
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
from _ssm_reference import (
    PlainBlock,
    cauchy_kernel,
    dense_truth,
    doubling_kernel,
    plain_convolution,
    slices,
    truncated,
)
from scipy.fft import next_fast_len
from torch import Tensor, nn

from tsforge.layers.ssm import DiagonalSSM, diagonal_init, timescales
from tsforge.layers.ssm_block import SSMBlock
from tsforge.ops.discretise import gbt
from tsforge.ops.dplr import dplr_discretise, dplr_kernel, dplr_real_form
from tsforge.ops.fftconv import causal_convolution, fft_length
from tsforge.ops.hippo import diagonal_plus_low_rank, hippo_matrix
from tsforge.ops.krylov import krylov_kernel, krylov_kernel_reference
from tsforge.ops.vandermonde import chunked_scan, two_level_kernel, vandermonde_kernel, vandermonde_kernel_reference

DT = (1e-3, 1e-1)
TRAINING = {"context": 336, "horizon": 96, "variates": 7, "rows": 8640, "batch": 256, "steps": 50}


@dataclass(frozen=True)
class Plan:
    """Where and how much is measured."""

    device: torch.device
    width: int = 128  # H, also the width of blocks
    states: int = 64  # N
    lengths: tuple[int, ...] = (336, 1024, 4096, 16384)
    powering_limit: int = 1024  # longest kernel for which one power after another is waited for
    blocks: tuple[tuple[int, int], ...] = ((16, 336), (4, 1024), (32, 96))  # batch, length
    sequences: tuple[tuple[int, int], ...] = ((16, 336), (8, 1024), (1, 16384))
    transforms: tuple[tuple[int, int], ...] = ((4, 336), (4, 720), (4, 1024), (4, 4096), (1, 16384))
    heads: int = 8
    rounds: int = 7
    least_seconds: float = 0.02  # of one sample: shorter calls are repeated within it


QUICK: dict[str, Any] = {
    "width": 16,
    "states": 8,
    "lengths": (48, 129),
    "powering_limit": 64,
    "blocks": ((2, 48),),
    "sequences": ((2, 48), (1, 129)),
    "transforms": ((2, 48), (1, 129)),
    "heads": 2,
    "rounds": 3,
    "least_seconds": 0.001,
}
# Of the plan, all for H = 128, N = 64 on a CPU; keys are lengths or (batch, length).
AS_USED = "as used"
EXPECTED_LENGTHS = (336, 1024, 4096, 16384)
EXPECTED_DOUBLING = {336: "1.3", 1024: "3.4", 16384: "31"}
EXPECTED_BLOCK = {(16, 336): ">= 2.5", (4, 1024): ">= 8"}
EXPECTED_BACKWARD = {(16, 336): "1.25", (8, 1024): "1.4", (1, 16384): "3.0"}
EXPECTED_SCAN = {(16, 336): "0.4-0.5", (8, 1024): "0.67", (1, 16384): "2"}


@dataclass(frozen=True)
class Method:
    """One way to make a kernel [M, H, L]: ``call`` reads ``inputs``, which want gradients."""

    inputs: Sequence[Tensor]
    call: Callable[[], Tensor]


# ---- measuring


def worst_row(value: Tensor, truth: Tensor) -> float:
    """Return the largest deviation within a row relative to the row's largest value, of the worst row."""
    value, truth = value.detach().cpu().double(), truth.detach().cpu().double()
    return float(((value - truth).abs().amax(-1) / truth.abs().amax(-1)).max())


def backward_of(method: Method, probe: Tensor) -> Callable[[], Any]:
    """Return forward and backward pass of a method as one call."""
    return lambda: torch.autograd.grad(method.call(), list(method.inputs), probe)


def kernel_rows(
    length: int, methods: dict[str, Method], truth: Tensor, base: str, plan: Plan, expected: dict[str, str]
) -> list[dict[str, Any]]:
    """Return speed, memory and error of all methods for one length."""
    forward_calls = {name: without_gradients(method.call) for name, method in methods.items()}
    probe = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(plan.device)
    both_calls = {name: backward_of(method, probe) for name, method in methods.items()}
    forward = summarise(in_turns(forward_calls, plan), base)
    both = summarise(in_turns(both_calls, plan), base)
    rows = []
    for name in methods:
        row: dict[str, Any] = {"length": length, "method": name, "forward": forward[name], "both": both[name]}
        row["peak_mb"] = [peak_bytes(call[name], plan.device) / 1e6 for call in (forward_calls, both_calls)]
        row["worst_row_error"] = worst_row(forward_calls[name](), truth)
        row["expected_forward_ratio"] = expected.get(name)
        rows.append(row)
        tell(row)
    return rows


def timed_rows(
    case: str,
    calls: dict[str, Callable[[], Any]],
    base: str,
    plan: Plan,
    *,
    expected: dict[str, str] | None = None,
    differences: dict[str, float] | None = None,
    inverse: bool = False,
) -> list[dict[str, Any]]:
    """Return speed of all methods for one case; ``differences`` are what their results deviate from ``base``."""
    found = summarise(in_turns(calls, plan), base, inverse=inverse)
    rows = []
    for name in calls:
        row: dict[str, Any] = {"case": case, "method": name, "time": found[name]}
        row["expected_ratio"] = (expected or {}).get(name)
        row["difference"] = (differences or {}).get(name)
        rows.append(row)
        tell(row)
    return rows


def leaves(plan: Plan, *values: Tensor) -> list[Tensor]:
    """Return copies on the device that want gradients."""
    return [value.detach().clone().to(plan.device).requires_grad_() for value in values]


# ---- kernels


def diagonal_rows(length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of S4D kernels: what layers use and the torch path against the matrix of all powers."""
    torch.manual_seed(0)
    decay, frequency, _ = diagonal_init("lin", plan.states)
    dt = timescales(plan.width, *DT).double().exp()[:, None]
    log_re, log_im = -(dt * decay), dt * frequency
    weight = torch.randn(2, 1, plan.width, plan.states // 2)
    truth = torch.cat(
        [
            2.0 * torch.einsum("mhn,hnl->mhl", torch.complex(*weight[:, :, part].double()), powers).real
            for part in slices(plan.width, 16)
            for powers in [torch.exp(torch.complex(log_re[part], log_im[part])[..., None] * torch.arange(length))]
        ],
        dim=1,
    )
    ours = leaves(plan, log_re, log_im, *weight)
    plain = leaves(plan, log_re.float(), log_im.float(), *weight)
    expected = {AS_USED: ">= 40"} if length in EXPECTED_LENGTHS else {}
    methods = {
        AS_USED: Method(ours, lambda: vandermonde_kernel((ours[0], ours[1]), (ours[2], ours[3]), length)),
        "plain torch": Method(ours, lambda: two_level_kernel((ours[0], ours[1]), (ours[2], ours[3]), length)),
        "naive complex64": Method(
            plain, lambda: vandermonde_kernel_reference((plain[0], plain[1]), (plain[2], plain[3]), length)
        ),
    }
    return kernel_rows(length, methods, truth, "naive complex64", plan, expected)


def krylov_rows(length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of LSSL kernels: two-level product against doubling and powering."""
    torch.manual_seed(0)
    A, B = hippo_matrix("legs", plan.states)
    dt = timescales(plan.width, *DT).double().exp()
    a_bar, b_bar = gbt(A[None], B[None], dt)
    c = torch.randn(1, plan.width, plan.states) / math.sqrt(plan.states)
    truth = dense_truth(a_bar, b_bar, c.double(), length)
    a, b, c = leaves(plan, a_bar.float(), b_bar.float(), c)
    methods = {
        "two-level": Method((a, b, c), lambda: krylov_kernel(a, b, c, length)),
        "doubling": Method((a, b, c), lambda: doubling_kernel(a, b, c, length)),
    }
    if length <= plan.powering_limit:
        methods["powering"] = Method((a, b, c), lambda: krylov_kernel_reference(a, b, c, length))
    expected = {"two-level": EXPECTED_DOUBLING[length]} if length in EXPECTED_DOUBLING else {}
    return kernel_rows(length, methods, truth, "doubling", plan, expected)


def low_rank_rows(length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of S4 kernels: half-angle form against dense two-level products and the published form."""
    torch.manual_seed(0)
    found = diagonal_plus_low_rank("legs", plan.states)
    dt = timescales(plan.width, *DT).exp()
    shape = (plan.width, plan.states // 2)
    re, im = (part.float().expand(shape) for part in (found.eigenvalues.real, found.eigenvalues.imag))
    P = torch.view_as_real(found.low_rank).float().unsqueeze(1).expand(1, *shape, 2)
    B = torch.view_as_real(found.input).float().expand(*shape, 2)
    C = torch.randn(1, *shape, 2) * math.sqrt(0.5)
    a, b, c = dplr_real_form(re.double(), im.double(), P.double(), B.double(), C.double())
    truth = dense_truth(*gbt(a, b, dt.double()), c, length)
    ours = leaves(plan, re, im, P, B, C, dt)
    pair = [torch.view_as_complex(value.contiguous()) for value in (torch.stack([re, im], dim=-1), P[0], B)]
    published = leaves(plan, *pair, truncated(re, im, P, C, dt, length), dt)

    def dense() -> Tensor:
        re, im, P, B, C, dt = ours
        a, b, c = dplr_real_form(re.double(), im.double(), P.double(), B.double(), C)
        a_bar, b_bar = gbt(a, b, dt.double())
        return krylov_kernel(a_bar.float(), b_bar.float(), c, length)

    def dense_without_solve() -> Tensor:
        re, im, P, B, C, dt = ours
        return krylov_kernel(*dplr_discretise(re, im, P, B, C, dt), length)

    def half_angle() -> Tensor:
        re, im, P, B, C, dt = ours
        return dplr_kernel(re, im, P, B, C, dt, length)

    def cauchy() -> Tensor:
        modes, P, B, C, dt = published
        return cauchy_kernel(modes, P, B, C, dt, length)

    methods = {
        "half-angle": Method(ours, half_angle),
        "dense, gbt, two-level": Method(ours, dense),
        "dense, Woodbury, two-level": Method(ours, dense_without_solve),
        "published Cauchy complex64": Method(published, cauchy),
    }
    return kernel_rows(length, methods, truth, "published Cauchy complex64", plan, {})


# ---- blocks


def block_rows(batch: int, length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of whole blocks, forward and backward pass, gradients of input and all weights."""
    torch.manual_seed(0)
    width = plan.width
    ours = SSMBlock(DiagonalSSM(width, plan.states, dt_range=DT)).to(plan.device)
    plain = PlainBlock(ours).to(plan.device)
    lstm = nn.LSTM(width, width, batch_first=True).to(plan.device)
    encoder = nn.TransformerEncoderLayer(width, plan.heads, 2 * width, dropout=0.0, batch_first=True).to(plan.device)
    x = torch.randn(batch, length, width, device=plan.device, requires_grad=True)
    probe = torch.randn(batch, length, width, device=plan.device)
    modules: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "S4D block": (ours, lambda: ours(x)[0]),
        "naive block": (plain, lambda: plain(x)),
        "nn.LSTM": (lstm, lambda: lstm(x)[0]),
        "nn.TransformerEncoderLayer": (encoder, lambda: encoder(x)),
    }
    calls = {
        name: backward_of(Method([x, *module.parameters()], run), probe) for name, (module, run) in modules.items()
    }
    with torch.no_grad():
        difference = float((ours(x)[0] - plain(x)).abs().max())
    expected = {"S4D block": EXPECTED_BLOCK[batch, length]} if (batch, length) in EXPECTED_BLOCK else {}
    return timed_rows(
        f"B{batch} L{length}",
        calls,
        "naive block",
        plan,
        expected=expected,
        differences={"S4D block": difference},
    )


# ---- convolutions and scans


def backward_rows(batch: int, length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of convolutions, forward and backward pass, with the same transform length."""
    torch.manual_seed(0)
    u, kernel = leaves(plan, torch.randn(batch, plan.width, length), torch.randn(plan.width, length))
    probe = torch.randn(batch, plan.width, length, device=plan.device)
    size = fft_length(2 * length - 1)
    custom = Method((u, kernel), lambda: causal_convolution(u, kernel.unsqueeze(0))[:, 0])
    plain = Method((u, kernel), lambda: plain_convolution(u, kernel, size))
    calls = {"own backward": backward_of(custom, probe), "plain autograd": backward_of(plain, probe)}
    pairs = zip(calls["own backward"](), calls["plain autograd"](), strict=True)
    difference = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    expected = {"own backward": EXPECTED_BACKWARD[batch, length]} if (batch, length) in EXPECTED_BACKWARD else {}
    return timed_rows(
        f"B{batch} L{length}",
        calls,
        "plain autograd",
        plan,
        expected=expected,
        differences={"own backward": difference},
    )


def transform_rows(batch: int, length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of transform lengths, forward pass of the convolution."""
    torch.manual_seed(0)
    u = torch.randn(batch, plan.width, length, device=plan.device)
    kernel = torch.randn(plan.width, length, device=plan.device)
    least = 2 * length - 1
    sizes = {
        "fft_length": fft_length(least),
        "2L": 2 * length,
        "2L-1": least,
        "scipy next_fast_len": int(next_fast_len(least, real=True)),
    }

    def call(size: int) -> Callable[[], Tensor]:
        return without_gradients(lambda: plain_convolution(u, kernel, size))

    named = {f"{name} = {size}": call(size) for name, size in sizes.items()}
    expected = {f"2L-1 = {least}": "6-14"} if length in EXPECTED_LENGTHS else {}
    if length == 336:
        expected[f"scipy next_fast_len = {sizes['scipy next_fast_len']}"] = "3"
    return timed_rows(f"B{batch} L{length}", named, next(iter(named)), plan, expected=expected, inverse=True)


def scan_rows(batch: int, length: int, plan: Plan) -> list[dict[str, Any]]:
    """Return the table of the scan in chunks against kernel and FFT, forward pass, from the weights of a system."""
    torch.manual_seed(0)
    layer = DiagonalSSM(plan.width, plan.states, dt_range=DT).to(plan.device)
    u = torch.randn(batch, plan.width, length, device=plan.device)
    with torch.no_grad():
        log_a, _, b, c = layer.system(1.0)
        kernel = layer.make_kernel(length, 1.0)
    calls = {
        "chunked scan": without_gradients(lambda: chunked_scan(log_a, b, c, u)[0]),
        "kernel and FFT": without_gradients(lambda: causal_convolution(u, layer.make_kernel(length, 1.0))),
        "FFT alone": without_gradients(lambda: causal_convolution(u, kernel)),
    }
    wanted = calls["kernel and FFT"]()
    difference = float((calls["chunked scan"]() - wanted).abs().max() / wanted.abs().max())
    expected = {"chunked scan": EXPECTED_SCAN[batch, length]} if (batch, length) in EXPECTED_SCAN else {}
    return timed_rows(
        f"B{batch} L{length}",
        calls,
        "kernel and FFT",
        plan,
        expected=expected,
        differences={"chunked scan": difference},
    )


# ---- training on a GPU


def training_speed(patch: int | None, accelerator: str, sizes: dict[str, int]) -> float:
    """Return windows (of all variates) a second in the second epoch of training model ``s4`` on a random walk."""
    import numpy as np  # here and below: only a run with a GPU needs the trainer
    import polars as pl

    from tsforge.contracts.tensors import DataSpec
    from tsforge.data.frame import SeriesFrame
    from tsforge.data.panel import Panel
    from tsforge.data.windows import WindowDataset, WindowSpec
    from tsforge.network import NetworkConfig, build_network
    from tsforge.training.config import TrainConfig
    from tsforge.training.loop import fit_network

    walk = np.random.default_rng(0).normal(size=(sizes["rows"], sizes["variates"])).cumsum(axis=0)
    hours = [datetime(2016, 7, 1) + timedelta(hours=step) for step in range(sizes["rows"])]
    table = pl.DataFrame({"ds": hours, **{f"x{index}": walk[:, index] for index in range(sizes["variates"])}})
    panel = Panel.from_frame(SeriesFrame.from_wide(table, time="ds"))
    train = WindowDataset(panel, WindowSpec(context_length=sizes["context"], horizon=sizes["horizon"]))
    spec = DataSpec(context_length=sizes["context"], horizon=sizes["horizon"], num_variates=sizes["variates"])
    model = {"name": "s4"} if patch is None else {"name": "s4", "patch_length": patch}
    network = build_network(NetworkConfig.model_validate({"model": model}), spec, seed=0)
    config = TrainConfig.model_validate(
        {
            "max_epochs": 2,
            "batch_size": sizes["batch"],
            "max_steps_per_epoch": sizes["steps"],
            "accelerator": accelerator,
        }
    )
    result = fit_network(network, train, None, config, series=panel.training_series(None, None), progress=False)
    return float(result.history[1]["windows_per_second"])


# ---- result


def run(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return all tables."""
    tables: dict[str, list[dict[str, Any]]] = {
        "diagonal": [row for length in plan.lengths for row in diagonal_rows(length, plan)],
        "krylov": [row for length in plan.lengths for row in krylov_rows(length, plan)],
        "low_rank": [row for length in plan.lengths for row in low_rank_rows(length, plan)],
        "blocks": [row for sizes in plan.blocks for row in block_rows(*sizes, plan)],
        "backward": [row for sizes in plan.sequences for row in backward_rows(*sizes, plan)],
        "transforms": [row for sizes in plan.transforms for row in transform_rows(*sizes, plan)],
        "scans": [row for sizes in plan.sequences for row in scan_rows(*sizes, plan)],
    }
    if plan.device.type == "cuda":
        for name, patch in (("default patches", None), ("patch_length 1", 1)):
            speeds = [training_speed(patch, "gpu", TRAINING) for _ in range(3)]
            row = {"model": f"s4, {name}", "windows_a_second": statistics.median(speeds), "samples": speeds}
            tables.setdefault("training", []).append(row)
            print(json.dumps(row), flush=True)
    return tables


def kernel_lines(title: str, base: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of kernels as Markdown."""
    lines = [
        "",
        f"## {title}",
        "",
        f"| L | method | forward, ms | times faster than {base} (range) | expected | forward + backward, ms "
        "| times faster (range) | peak MB, forward | forward + backward | worst row error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["length"], row["method"], f"{row['forward']['ms']:.3g}", ratio_cell(row["forward"])]
        cells += [row["expected_forward_ratio"] or "", f"{row['both']['ms']:.3g}", ratio_cell(row["both"])]
        cells += [f"{value:.3g}" for value in row["peak_mb"]] + [f"{row['worst_row_error']:.1e}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def timed_lines(title: str, heading: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of times as Markdown."""
    last = " | largest difference" if any(row["difference"] is not None for row in rows) else ""
    lines = ["", f"## {title}", "", f"| case | method | ms | {heading} (range) | expected{last} |"]
    lines.append("|---|---|---|---|---|" + ("---|" if last else ""))
    for row in rows:
        cells = [
            row["case"],
            row["method"],
            f"{row['time']['ms']:.3g}",
            ratio_cell(row["time"]),
            row["expected_ratio"] or "",
        ]
        if last:
            cells.append("" if row["difference"] is None else f"{row['difference']:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    about, tables = result["about"], result["tables"]
    *lines, hardware = heading("State space kernels, blocks and scans", about)
    lines += [
        f"{hardware} H = {about['width']} features, N = {about['states']}. "
        f"Medians of {about['rounds']} rounds in turns ({SLOW_ROUNDS} for calls above {SLOW_SECONDS:g} s); in brackets "
        "least and largest ratio within a round. Peak memory: tensors alive at once beyond the inputs.",
        *kernel_lines(
            "S4D kernel: two-level Vandermonde product, compiled (CPU) or Triton (GPU) as used",
            "naive",
            tables["diagonal"],
        ),
        *kernel_lines("LSSL kernel: two-level Krylov product (HiPPO-LegS, bilinear)", "doubling", tables["krylov"]),
        *kernel_lines("S4 kernel: diagonal plus low rank (HiPPO-LegS, bilinear)", "published", tables["low_rank"]),
        "",
        "The published form is given C (I - A^L) ready-made; the others start from C and have no such tie to L.",
        *timed_lines("Whole block, forward and backward", "times faster than the naive block", tables["blocks"]),
        *timed_lines(
            "Convolution, forward and backward, same transform length",
            "times faster than plain autograd",
            tables["backward"],
        ),
        *timed_lines("Transform length, forward", "times the time of fft_length", tables["transforms"]),
        *timed_lines("Scan in chunks, forward", "times faster than kernel and FFT", tables["scans"]),
        "",
        "## Training on a GPU",
        "",
    ]
    if "training" not in tables:
        return "\n".join([*lines, "Not measured: no GPU was there, or it was not asked for.", ""])
    sizes = ", ".join(f"{name} {value}" for name, value in TRAINING.items())
    lines += [f"Random walk, {sizes}.", "", "| model | windows/s |", "|---|---|"]
    lines += [f"| {row['model']} | {row['windows_a_second']:,.0f} |" for row in tables["training"]]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, write and print."""
    given = arguments(__doc__)
    plan = Plan(device=torch.device(given.device), **(QUICK if given.quick else {}))
    load = os.getloadavg()[0]
    tables = run(plan)
    about = {**describe(given, load), "width": plan.width, "states": plan.states, "rounds": plan.rounds}
    result = {"about": about, "tables": tables}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
