"""The 2-D scan: streams, shapes, devices, bad input and cost."""

from __future__ import annotations

import math
import os
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan2d_cases import (
    TRITON,
    Case,
    backends,
    difference,
    draw,
    gradients,
    oracle,
    run,
    worst_gradient,
)
from scan2d_paths import reference, wavefront
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import scan2d as module
from tsforge.ops.scan2d import Scan2D, discrete_factors, scan2d

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before the first profile: it would report start and stop
MEASURE = Path(__file__).resolve().parents[3] / "benchmarks" / "_measure.py"

# ---- streams


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(5, 9), (9, 5), (1, 4)])
@pytest.mark.parametrize("backend", ["auto", "rows", "wavefront", "compiled", TRITON])
def test_checklist_5_8_column_by_column_equals_the_full_pass(
    backend: str, grid: tuple[int, int], complex_states: bool
) -> None:
    case = draw(2, *grid, complex_states=complex_states)
    whole = oracle(case)
    for pieces in ([1] * grid[1], [grid[1] - 1, 1], [1, grid[1] - 1], [grid[1] // 2, grid[1] - grid[1] // 2]):
        state, start, outputs = case.left, 0, []
        for size in pieces:
            found = run(backend, case.columns(start, start + size, state))
            outputs.append(found.y)
            state, start = found.right, start + size
            assert [tuple(part.shape) for part in state] == [(2, grid[0], 4, 3)] * 2
        assert difference(Scan2D(torch.cat(outputs, dim=2), state), whole) < 1e-12  # type: ignore[arg-type]


@backends()
def test_checklist_5_8_closed_loop_equals_streaming(backend: str) -> None:
    """Outputs fed back as the next inputs, by steps and by scanning the whole history again."""
    history, horizon = 6, 5
    case = draw(2, 4, history + horizon)
    state = run(backend, case.columns(0, history, case.left))
    fed, steps = state.y[:, :, -1:], []
    for t in range(history, history + horizon):
        state = run(backend, replace(case.columns(t, t + 1, state.right), x=fed))
        fed = state.y
        steps.append(fed)
    x = case.x.clone()
    for t in range(history, history + horizon):
        x[:, :, t] = torch.from_numpy(oracle(replace(case, x=x).columns(0, t, case.left))[0])[:, :, -1]
    expected = torch.from_numpy(oracle(replace(case, x=x))[0])[:, :, history:]
    assert float((torch.cat(steps, dim=2) - expected).abs().max()) < 1e-11


# ---- shapes, devices, bad input


@backends()
def test_checklist_5_10_inputs_need_not_be_contiguous(backend: str) -> None:
    case = draw(3, 4, 6, groups=2)
    odd = case.mapped(lambda part: part.transpose(0, -1).contiguous().transpose(0, -1))
    assert not odd.x.is_contiguous()
    plain, ours = case.leaves(), odd.mapped(lambda part: part.detach().requires_grad_())
    assert difference(run(backend, ours), oracle(case)) < 1e-12
    assert worst_gradient(gradients(run(backend, ours), ours), gradients(reference(plain), plain)) < 1e-11


@pytest.mark.parametrize("backend", ["rows", "wavefront", "compiled"])
def test_checklist_5_10_autocast_does_not_touch_the_scan(backend: str) -> None:
    case = draw(2, 4, 6).lower()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(backend, case.leaves())
    assert found.y.dtype == torch.float32
    assert torch.equal(found.y, run(backend, case).y)


def test_checklist_5_10_a_compiled_graph_falls_back_cleanly() -> None:
    case = draw(2, 4, 6)

    def scaled(x: Tensor) -> Tensor:
        return 2.0 * scan2d(3.0 * x, case.dt, case.A, case.B, case.C, left=case.left, top=case.top).y

    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    assert float((torch.compile(scaled, backend=count)(case.x) - scaled(case.x)).abs().max()) < 1e-12
    assert sum(graphs) < 30  # the scan itself is in none of them


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["rows", "wavefront", "auto"])
def test_checklist_5_10_cpu_and_gpu_agree(backend: str) -> None:
    case = draw(2, 7, 24).lower()
    found = scan2d(
        *(getattr(case.mapped(Tensor.cuda), name) for name in ("x", "dt", "A", "B", "C")),
        left=tuple(part.cuda() for part in case.left or ()),  # type: ignore[arg-type]
        top=tuple(part.cuda() for part in case.top or ()),  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
    )
    assert difference(Scan2D(found.y.cpu(), (found.right[0].cpu(), found.right[1].cpu())), oracle(case)) < 1e-4


def refused(case: Case, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        scan2d(case.x, case.dt, case.A, case.B, case.C, left=case.left, top=case.top, **options)


def test_tensors_that_do_not_fit_are_refused() -> None:
    case = draw(2, 3, 4, groups=2)
    refused(replace(case, x=case.x[0]), r"x of the 2-D scan needs shape \(b, N, T, D\)")
    refused(replace(case, x=case.x[:, :0]), "without empty axes")
    refused(replace(case, x=case.x.bfloat16()), "float32 or float64, x is torch.bfloat16")
    refused(replace(case, x=case.x.float()), "dt1 of the 2-D scan needs shape .* torch.float32")
    refused(replace(case, dt=(case.dt[0], case.dt[1][:, :, 1:])), r"dt2 .* needs shape \(2, 3, 4, 4\)")
    refused(replace(case, A=case.A[:3]), "needs four tensors")  # type: ignore[arg-type]
    refused(replace(case, A=(*case.A[:3], case.A[3][:, 1:])), r"A4 .* needs shape \(4, 3\)")
    refused(replace(case, A=(case.A[0] + 0j, *case.A[1:])), "A2 .* torch.complex128, .*; got .* torch.float64")  # type: ignore[arg-type]
    refused(replace(case, B=(case.B[0][..., :1, :].expand(-1, -1, -1, 3, -1), case.B[1])), "G divides the 4 channels")
    refused(replace(case, C=(case.C[0], case.C[1][..., :1, :])), r"C2 .* needs shape \(2, 3, 4, 2, 3\)")
    refused(replace(case, C=case.C[:1]), "C of the 2-D scan needs 2 tensors, got 1")  # type: ignore[arg-type]
    assert case.left is not None
    refused(replace(case, left=(case.left[0], case.left[1][:, 1:])), "left2")
    refused(replace(case, top=case.left), r"top1 .* needs shape \(2, 4, 4, 3\)")
    refused(replace(case, x=case.x.to("meta")), "dt1 .* on meta; got .* on cpu")


def test_wrong_signs_are_refused() -> None:
    case = draw(2, 3, 4)
    growing = case.A[3].clone()
    growing[1, 2] = 0.0
    refused(replace(case, A=(*case.A[:3], growing)), "A4 .* negative real part, 1 of 12")
    back = case.dt[0].clone()
    back[0, 0, 0, :2] = -0.1
    refused(replace(case, dt=(back, case.dt[1])), "dt1 .* 2 negative steps")


def test_settings_that_cannot_be_are_refused() -> None:
    case = draw(1, 2, 2)
    refused(case, "backend .* 'wavefrnt'; choose one of auto.*did you mean 'wavefront'", backend="wavefrnt")
    refused(case, "discretisation", discretisation="exakt")
    refused(case, "input_disc", input_disc="foh")
    for backend in ("wavefront", "compiled", "triton"):
        refused(case, "exact discretisation with a held input only", backend=backend, discretisation="separate")
        refused(case, "exact discretisation with a held input only", backend=backend, input_disc="euler")


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_unavailable", lambda backend, x, A: "no such thing here")
    refused(draw(1, 2, 2), "backend 'compiled' .* cannot run here: no such thing here", backend="compiled")


def test_auto_takes_a_kernel_else_rows_for_few_states_else_the_wavefront(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = draw(1, 3, 4), draw(8, 6, 8, 16, 8)
    reason: list[str | None] = [None]
    monkeypatch.setattr(module, "_unavailable", lambda backend, x, A: reason[0])
    assert module._choose("auto", small.x, small.A, True) == "compiled"
    assert module._choose("auto", small.x, small.A, False) == "rows"
    reason[0] = "no compiler"
    assert module._choose("auto", small.x, small.A, True) == "rows"
    assert module._choose("auto", large.x, large.A, True) == "rows"
    for wide in (draw(2, 7, 96, 16, 8), draw(8, 7, 1, 16, 8)):
        assert module._choose("auto", wide.x, wide.A, True) == "rows"
    for wide in (draw(32, 7, 16, 16, 8), draw(4, 7, 96, 16, 8), draw(1, 48, 48, 16, 8)):
        assert module._choose("auto", wide.x, wide.A, True) == "wavefront"


# ---- cost


def random_inputs(batch: int, variates: int, steps: int, channels: int, states: int) -> Case:
    return draw(batch, variates, steps, channels, states, edges=False, dt=(1e-3, 1.0)).lower().leaves()


def training_step(case: Case, scan: Any) -> None:
    torch.autograd.grad(scan(case).y.sum(), case.tensors())


@pytest.mark.parametrize("backend", ["wavefront", "compiled"])
def test_checklist_5_12_a_training_step_needs_less_than_80_mb(backend: str) -> None:
    peak_bytes = runpy.run_path(str(MEASURE))["peak_bytes"]
    case = random_inputs(32, 7, 96, 16, 8)
    training_step(case, lambda case: run(backend, case))
    peak = peak_bytes(lambda: training_step(case, lambda case: run(backend, case)), torch.device("cpu"))
    assert 5e6 < peak < 80e6


def autograd_wavefront(case: Case) -> Scan2D:
    """The same diagonals on padded rows, under plain autograd; N is the shorter axis and no states are given."""
    batch, variates, steps, channels = case.x.shape
    rows = variates + steps - 1
    v = torch.arange(variates)[:, None]

    def skewed(part: Tensor) -> Tensor:
        empty = part.new_zeros(rows, variates, *part.shape[:1], *part.shape[3:])
        return empty.index_put((v + torch.arange(steps), v), part.permute(1, 2, 0, *range(3, part.ndim)))

    f = discrete_factors((skewed(case.dt[0]), skewed(case.dt[1])), case.A)
    u = skewed(case.x).unsqueeze(-1)
    push1, push2 = f.b1 * skewed(case.B[0]) * u, f.b2 * skewed(case.B[1]) * u
    zero = u.new_zeros(1, batch, channels, case.A[0].shape[1])
    h1 = h2 = zero.expand(variates, -1, -1, -1)
    states = []
    for a1, a2, f1, a3, a4, f2 in zip(
        *(part.unbind(0) for part in (f.a1, f.a2, push1, f.a3, f.a4, push2)), strict=True
    ):
        up1, up2 = torch.cat([zero, h1[:-1]]), torch.cat([zero, h2[:-1]])
        h1, h2 = a1 * h1 + a2 * h2 + f1, a3 * up1 + a4 * up2 + f2
        states.append((h1, h2))
    h1, h2 = (torch.stack(part) for part in zip(*states, strict=True))
    y = (skewed(case.C[0]) * h1 + skewed(case.C[1]) * h2).sum(-1)[v + torch.arange(steps), v]
    return Scan2D(y.permute(2, 0, 1, 3), (h1[-1], h2[-1]))


def test_the_wavefront_under_autograd_is_the_same_scan() -> None:
    case = draw(2, 4, 9, edges=False)
    assert np.abs(autograd_wavefront(case).y.numpy() - oracle(case)[0]).max() < 1e-12


def best_seconds(call: Any, rounds: int = 5) -> float:
    call()
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return min(spent)


@pytest.mark.slow
def test_checklist_5_12_recomputation_is_no_slower_than_autograd() -> None:
    case = random_inputs(32, 7, 96, 16, 8)
    ours = best_seconds(lambda: training_step(case, wavefront))
    assert ours <= best_seconds(lambda: training_step(case, autograd_wavefront), rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["wavefront", "compiled"])
def test_checklist_5_12_cost_is_linear_in_time(backend: str) -> None:
    cases = {steps: random_inputs(8, 7, steps, 16, 8) for steps in (384, 768)}
    best = dict.fromkeys(cases, math.inf)
    with torch.no_grad():
        for _ in range(20):  # in turns: a busy spell of the machine hits both
            for steps, case in cases.items():
                began = time.perf_counter()
                run(backend, case)
                best[steps] = min(best[steps], time.perf_counter() - began)
    ratio = best[768] / best[384]
    assert 1.6 < ratio < 2.6
