"""The 2-D scan: every backend against a cell-by-cell loop in NumPy and against the algebra of blocks; gradients against
autograd through the loop; special cases, discretisation, stability, causality, symmetry and streams."""

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
from block_operator import TREES, Block, cell
from scan2d_cases import (
    TRITON,
    Case,
    backends,
    difference,
    draw,
    gradients,
    numpy_factors,
    oracle,
    run,
    worst_gradient,
)
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import scan2d as module
from tsforge.ops._scan2d_wavefront import scan2d_wavefront
from tsforge.ops.scan2d import Scan2D, discrete_factors, scan2d, scan2d_reference

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before the first profile: it would report start and stop
MEASURE = Path(__file__).resolve().parents[3] / "benchmarks" / "_measure.py"

GRIDS = [(1, 1), (1, 17), (17, 1), (2, 3), (5, 9), (7, 96), (12, 12), (33, 20)]


def reference(case: Case, **options: Any) -> Scan2D:
    return scan2d_reference(case.x, case.dt, case.A, case.B, case.C, left=case.left, top=case.top, **options)


def wavefront(case: Case, every: int | None = None) -> Scan2D:
    y, h1, h2 = scan2d_wavefront(case.x, case.dt, case.A, case.B, case.C, case.left, case.top, every=every)
    return Scan2D(y, (h1, h2))


# ---- equality


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", ["reference", "rows", "wavefront", "compiled", TRITON])
def test_checklist_5_1_float64_equals_the_loop(backend: str, grid: tuple[int, int]) -> None:
    case = draw(2, *grid, groups=2)
    assert difference(run(backend, case), oracle(case)) < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@backends()
def test_checklist_5_1_float32_equals_the_loop(backend: str, grid: tuple[int, int]) -> None:
    case = draw(2, *grid).lower()
    found = run(backend, case)
    assert found.y.dtype == found.right[0].dtype == torch.float32
    for ours, theirs in zip((found.y, *found.right), oracle(case), strict=True):
        assert np.abs(ours.double().numpy() - theirs).max() < 2e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (5, 9), (9, 4)])
@pytest.mark.parametrize("backend", ["reference", "rows", "wavefront", "compiled", TRITON])
def test_checklist_5_1_complex_states_equal_the_loop(backend: str, grid: tuple[int, int]) -> None:
    case = draw(2, *grid, groups=4, complex_states=True)
    found = run(backend, case)
    assert not found.y.is_complex()
    assert found.right[0].dtype == torch.complex128
    assert difference(found, oracle(case)) < 1e-12
    low = case.lower()
    assert difference(run(backend, low), oracle(low)) < 4e-6


@pytest.mark.parametrize("edges", ["none", "left", "top"])
@backends()
def test_states_outside_the_grid_are_optional(backend: str, edges: str) -> None:
    for grid in ((4, 6), (6, 4)):
        case = draw(2, *grid)
        case = replace(case, **{name: None for name in ("left", "top") if name != edges})
        assert difference(run(backend, case), oracle(case)) < 1e-12


@pytest.mark.parametrize("tree", sorted(TREES))
@backends()
def test_checklist_5_1_equals_the_composition_of_blocks(backend: str, tree: str) -> None:
    for grid in ((1, 1), (3, 5), (8, 16), (7, 2)):
        case = draw(1, *grid, channels=1, states=1, dt=(1e-2, 3.0))
        block = TREES[tree](_grid_of_blocks(case))
        assert case.left is not None
        assert case.top is not None
        inputs = [torch.stack(edge, dim=-1).flatten().numpy() for edge in (case.left, case.top)]
        right = (block.M @ np.concatenate(inputs) + block.c)[: 2 * grid[0]].reshape(-1, 2)
        found = torch.stack(run(backend, case).right, dim=-1).view(-1, 2)
        assert np.abs(found.numpy() - right).max() < 1e-12


def _grid_of_blocks(case: Case) -> list[list[Block]]:
    A = [float(part) for part in case.A]
    rows = []
    for v in range(case.x.shape[1]):
        row = []
        for t in range(case.x.shape[2]):
            dt1, dt2, x = (float(part[0, v, t, 0]) for part in (*case.dt, case.x))
            B1, B2 = (float(part[0, v, t, 0, 0]) for part in case.B)
            g1, g2 = np.expm1(dt1 * A[0]) / A[0], np.expm1(dt2 * A[3]) / A[3]
            factors = (np.exp(dt1 * A[0]), g1 * A[1], g2 * A[2], np.exp(dt2 * A[3]))
            row.append(cell(*factors, g1 * B1 * x, g2 * B2 * x))
        rows.append(row)
    return rows


def test_checklist_5_1_the_trees_agree() -> None:
    blocks = [tree(_grid_of_blocks(draw(1, 5, 7, 1, 1))) for tree in TREES.values()]
    for block in blocks[1:]:
        assert np.abs(block.M - blocks[0].M).max() < 1e-14
        assert np.abs(block.c - blocks[0].c).max() < 1e-14


def two_passes(case: Case) -> np.ndarray:
    """Return y of one scan along the variates without time states, and one along time with its result."""
    alone = replace(case, A=(*case.A[:2], torch.zeros_like(case.A[2]), case.A[3]))
    return oracle(alone)[0]


@backends()
def test_checklist_5_1_two_passes_are_wrong_when_both_couplings_are_on(backend: str) -> None:
    case = draw(1, 9, 14, edges=False, dt=(0.1, 2.0))
    assert np.abs(run(backend, case).y.numpy() - two_passes(case)).max() > 0.1
    one_way = replace(case, A=(*case.A[:2], torch.zeros_like(case.A[2]), case.A[3]))
    assert np.abs(run(backend, one_way).y.numpy() - two_passes(one_way)).max() < 1e-12


# ---- gradients


@pytest.mark.parametrize("complex_states", [False, True])
@backends()
def test_checklist_5_2_gradcheck(backend: str, complex_states: bool) -> None:
    case = draw(2, 3, 5, complex_states=complex_states, dt=(0.05, 2.0)).leaves()

    def scan(*parts: Tensor) -> tuple[Tensor, ...]:
        found = run(backend, case.rebuilt(list(parts)))
        return found.y, *found.right

    assert torch.autograd.gradcheck(scan, case.tensors(), fast_mode=complex_states or backend == "rows")


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (3, 8), (7, 4), (5, 5)])
@backends()
def test_checklist_5_2_gradients_equal_autograd_through_the_loop(
    backend: str, grid: tuple[int, int], complex_states: bool
) -> None:
    case = draw(2, *grid, groups=2, complex_states=complex_states)
    plain, ours = case.leaves(), case.leaves()
    expected = gradients(reference(plain), plain)
    assert worst_gradient(gradients(run(backend, ours), ours), expected) < 1e-11
    bare, other = (replace(part, left=None, top=None) for part in (case.leaves(), case.leaves()))
    assert worst_gradient(gradients(run(backend, other), other), gradients(reference(bare), bare)) < 1e-11


@backends()
def test_checklist_5_2_float32_gradients_are_close_to_float64(backend: str) -> None:
    case = draw(2, 7, 24, dt=(1e-3, 3.0)).lower()
    low, high = case.leaves(), case.mapped(Tensor.double).leaves()
    for ours, theirs in zip(gradients(run(backend, low), low), gradients(reference(high), high), strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(4, 9), (9, 4)])
def test_checklist_5_2_any_spacing_of_kept_states_gives_the_same_gradients(
    grid: tuple[int, int], complex_states: bool
) -> None:
    case = draw(2, *grid, complex_states=complex_states)
    found = []
    for every in (None, 1, 2, 5, sum(grid) - 1, 100):
        leaves = case.leaves()
        found.append(gradients(wavefront(leaves, every), leaves))
    for other in found[1:]:
        assert worst_gradient(other, found[0]) < 1e-12


@backends()
def test_a_gradient_through_only_one_output_is_whole(backend: str) -> None:
    """Outputs that nobody uses arrive as no gradient at all, or as zeros."""
    case = draw(1, 3, 4)
    for pick in (0, 1, 2):
        plain, ours = case.leaves(), case.leaves()
        flat = [(part.y, *part.right)[pick] for part in (reference(plain), run(backend, ours))]
        probe = torch.randn(flat[0].shape, dtype=flat[0].dtype, generator=torch.Generator().manual_seed(3))
        keep = plain.x, plain.dt[0], plain.A[0], plain.B[1]
        mine = ours.x, ours.dt[0], ours.A[0], ours.B[1]
        expected = torch.autograd.grad(flat[0], keep, probe)
        found = torch.autograd.grad(flat[1], mine, probe)
        assert worst_gradient(list(found), list(expected)) < 1e-12


def test_a_second_derivative_is_refused() -> None:
    case = draw(1, 2, 3).leaves()
    (first,) = torch.autograd.grad(wavefront(case).y.pow(2).sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- special cases


def scan_1d(keep: np.ndarray, push: np.ndarray, start: Any = 0.0) -> np.ndarray:
    """Return h_k = keep_k h_{k-1} + push_k along the first axis."""
    h, states = start, []
    for a, b in zip(keep, push, strict=True):
        h = a * h + b
        states.append(h)
    return np.stack(states)


def numpy_parts(case: Case) -> dict[str, Any]:
    """Return factors and forcings (b, N, T, D, S) of a case with one group, in NumPy."""
    dt1, dt2 = (part.numpy() for part in case.dt)
    a1, a2, b1, a3, a4, b2 = numpy_factors(dt1, dt2, [part.numpy() for part in case.A], "exact", "zoh")
    u = case.x.numpy()[..., None]
    push = [b * part.numpy() * u for b, part in ((b1, case.B[0]), (b2, case.B[1]))]
    return {"a1": a1, "a2": a2, "a3": a3, "a4": a4, "f1": push[0], "f2": push[1]}


def along(axis: int, keep: np.ndarray, push: np.ndarray) -> np.ndarray:
    return np.moveaxis(scan_1d(np.moveaxis(keep, axis, 0), np.moveaxis(push, axis, 0)), 0, axis)


@backends()
def test_checklist_5_3_without_coupling_it_is_one_scan_along_each_axis(backend: str) -> None:
    case = draw(2, 6, 11, edges=False).uncoupled()
    p = numpy_parts(case)
    h1, h2 = along(2, p["a1"], p["f1"]), along(1, p["a4"], p["f2"])
    expected = (case.C[0].numpy() * h1 + case.C[1].numpy() * h2).sum(-1)
    assert np.abs(run(backend, case).y.numpy() - expected).max() < 1e-12


@backends()
def test_checklist_5_3_without_coupling_alone_variates_still_mix(backend: str) -> None:
    """Setting A2 = A3 = 0 leaves the path along the variates; C2 = 0 (or B2 = 0) cuts it."""
    case = draw(1, 4, 5, edges=False).uncoupled()
    other = replace(case, x=case.x.clone())
    other.x[:, 0] += 1.0
    assert float((run(backend, case).y - run(backend, other).y)[:, 1:].abs().max()) > 1e-3
    silent = torch.zeros_like(case.C[1])
    for name, pair in (("C", (case.C[0], silent)), ("B", (case.B[0], silent))):
        first, second = (replace(part, **{name: pair}) for part in (case, other))
        assert torch.equal(run(backend, first).y[:, 1:], run(backend, second).y[:, 1:])


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_checklist_5_3_mamba_parity(backend: str) -> None:
    """exp(dt A) and dt B, one variate at a time."""
    case = draw(2, 4, 20, edges=False).uncoupled()
    case = replace(case, C=(case.C[0], torch.zeros_like(case.C[1])))
    found = run(backend, case, input_disc="euler").y.numpy()
    dt, A = case.dt[0].numpy()[..., None], case.A[0].numpy()
    for v in range(4):
        push = dt[:, v] * case.B[0].numpy()[:, v] * case.x.numpy()[:, v, :, :, None]
        h = along(1, np.exp(dt[:, v] * A), push)
        assert np.abs(found[:, v] - (case.C[0].numpy()[:, v] * h).sum(-1)).max() < 1e-12


@backends()
def test_checklist_5_3_one_state_recurrence(backend: str) -> None:
    """a1 = a2, a3 = a4, B2 = 0, C1 = C2: h = a h_left + c h_up + b (Fornasini-Marchesini)."""
    case = draw(2, 5, 6, edges=False)
    even = tuple(torch.full_like(part, step) for part, step in zip(case.dt, (0.4, 0.3), strict=True))
    a1, a4 = torch.exp(0.4 * case.A[0]), torch.exp(0.3 * case.A[3])
    same = (case.A[0], a1 * case.A[0] / torch.expm1(0.4 * case.A[0]), a4 * case.A[3] / torch.expm1(0.3 * case.A[3]))
    case = replace(case, dt=even, A=(*same, case.A[3]), B=(case.B[0], torch.zeros_like(case.B[0])), C=(case.C[0],) * 2)
    b = numpy_parts(case)["f1"]
    h = np.zeros((2, 6, 7, 4, 3))
    for v in range(5):
        for t in range(6):
            h[:, v + 1, t + 1] = a1.numpy() * h[:, v + 1, t] + a4.numpy() * h[:, v, t + 1] + b[:, v, t]
    expected = (case.C[0].numpy() * h[:, 1:, 1:]).sum(-1)
    assert difference(run(backend, case), (expected, *oracle(case)[1:])) < 1e-12


@backends()
def test_checklist_5_3_one_way_coupling_is_two_scans(backend: str) -> None:
    case = draw(2, 6, 9, edges=False)
    none = torch.zeros_like(case.A[1])
    into_time = replace(case, A=(case.A[0], case.A[1], none, case.A[3]))
    p = numpy_parts(into_time)
    h2 = along(1, p["a4"], p["f2"])
    before = np.concatenate([np.zeros_like(h2[:, :, :1]), h2[:, :, :-1]], axis=2)
    h1 = along(2, p["a1"], p["f1"] + p["a2"] * before)
    expected = (case.C[0].numpy() * h1 + case.C[1].numpy() * h2).sum(-1)
    assert np.abs(run(backend, into_time).y.numpy() - expected).max() < 1e-12
    into_variates = replace(case, A=(case.A[0], none, case.A[2], case.A[3]))
    h1 = along(2, p["a1"], p["f1"])
    p = numpy_parts(into_variates)
    above = np.concatenate([np.zeros_like(h1[:, :1]), h1[:, :-1]], axis=1)
    h2 = along(1, p["a4"], p["f2"] + p["a3"] * above)
    expected = (case.C[0].numpy() * h1 + case.C[1].numpy() * h2).sum(-1)
    assert np.abs(run(backend, into_variates).y.numpy() - expected).max() < 1e-12


@backends()
def test_checklist_5_3_a_single_variate_has_a_memoryless_second_state(backend: str) -> None:
    case = draw(2, 1, 15, edges=False)
    p = numpy_parts(case)
    h2 = p["f2"]
    before = np.concatenate([np.zeros_like(h2[:, :, :1]), h2[:, :, :-1]], axis=2)
    h1 = along(2, p["a1"], p["f1"] + p["a2"] * before)
    expected = (case.C[0].numpy() * h1 + case.C[1].numpy() * h2).sum(-1)
    assert np.abs(run(backend, case).y.numpy() - expected).max() < 1e-12


# ---- discretisation

SETTINGS = [
    ("exact", "euler"),
    ("separate", "zoh"),
    ("separate", "euler"),
    ("separate_avg", "zoh"),
    ("separate_avg", "euler"),
]


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize(("discretisation", "input_disc"), SETTINGS)
def test_every_discretisation_equals_the_loop(discretisation: str, input_disc: str, complex_states: bool) -> None:
    options = {"discretisation": discretisation, "input_disc": input_disc}
    for grid in ((3, 6), (6, 3)):
        case = draw(2, *grid, groups=2, complex_states=complex_states, dt=(1e-2, 1.0))
        expected = oracle(case, **options)
        plain = case.leaves()
        slow = reference(plain, **options)
        assert difference(slow, expected) < 1e-12
        for backend in ("rows", "auto"):
            ours = case.leaves()
            found = scan2d(
                ours.x,
                ours.dt,
                ours.A,
                ours.B,
                ours.C,
                left=ours.left,
                top=ours.top,
                backend=backend,
                **options,  # type: ignore[arg-type]
            )
            assert difference(found, expected) < 1e-12
        assert worst_gradient(gradients(found, ours), gradients(slow, plain)) < 1e-11


def one_cell(dt: float, A: tuple[float, ...], h1: float, h2: float, x: float = 0.0) -> Case:
    """A grid of one cell with B = C1 = 1, C2 = 0, from the given states at t = -1."""
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    step = torch.full((1, 1, 1, 1), dt, dtype=torch.float64)
    transitions = tuple(torch.full((1, 1), value, dtype=torch.float64) for value in A)
    left = (torch.full((1, 1, 1, 1), h1, dtype=torch.float64), torch.full((1, 1, 1, 1), h2, dtype=torch.float64))
    return Case(torch.full_like(step, x), (step, step), transitions, (one, one), (one, 0 * one), left)  # type: ignore[arg-type]


A_TEST = (-1.3, 0.7, 0.4, -0.8)


@backends()
def test_checklist_5_4_i_one_step_is_k_steps_of_a_part(backend: str) -> None:
    """With the input and the other state held."""
    h = 0.3
    for _ in range(7):
        h = float(run(backend, one_cell(2.1 / 7, A_TEST, h, -1.7, x=0.9)).y)
    assert abs(float(run(backend, one_cell(2.1, A_TEST, 0.3, -1.7, x=0.9)).y) - h) < 1e-13


@backends()
def test_checklist_5_4_ii_one_step_integrates_the_differential_equation(backend: str) -> None:
    h, size = 0.3, 2.1 / 4000

    def slope(state: float) -> float:
        return A_TEST[0] * state + A_TEST[1] * -1.7 + 0.9

    for _ in range(4000):
        k1 = slope(h)
        k2 = slope(h + size / 2 * k1)
        k3 = slope(h + size / 2 * k2)
        h += size / 6 * (k1 + 2 * k2 + 2 * k3 + slope(h + size * k3))
    assert abs(float(run(backend, one_cell(2.1, A_TEST, 0.3, -1.7, x=0.9)).y) - h) < 1e-10


def test_checklist_5_4_iii_no_coupling_is_a_member_of_the_family() -> None:
    dt = (torch.full((2,), 0.4), torch.full((2,), 0.2))
    A = tuple(torch.full((2, 3), value) for value in (-1.0, 0.0, 0.0, -2.0))
    exact = discrete_factors(dt, A)  # type: ignore[arg-type]
    assert float(exact.a2.abs().max()) == float(exact.a3.abs().max()) == 0.0
    separate = discrete_factors(dt, A, "separate")  # type: ignore[arg-type]
    assert float(separate.a2.min()) == 1.0  # which is why it is not the default
    halved = discrete_factors(dt, A, "separate_avg")  # type: ignore[arg-type]
    assert torch.allclose(halved.a1, 0.5 * exact.a1)
    assert torch.equal(halved.b1, exact.b1)


@backends()
def test_checklist_5_4_iv_a_step_of_no_time_leaves_the_states_alone(backend: str) -> None:
    for grid in ((4, 6), (6, 4)):
        case = draw(2, *grid)
        still = replace(case, dt=tuple(torch.zeros_like(part) for part in case.dt))
        found = run(backend, still)
        assert case.left is not None
        assert case.top is not None
        assert torch.equal(found.right[0], case.left[0])  # each variate keeps its own
        assert torch.equal(found.right[1], case.top[1][:, -1:].expand_as(found.right[1]))  # each step keeps its own
        tiny = replace(case, dt=tuple(torch.full_like(part, 1e-9) for part in case.dt))
        assert float((run(backend, tiny).right[0] - case.left[0]).abs().max()) < 1e-6


@backends()
def test_checklist_5_4_iv_a_long_step_reaches_the_steady_state(backend: str) -> None:
    found = float(run(backend, one_cell(40.0, A_TEST, 5.0, -1.7, x=0.9)).y)
    assert abs(found - -(A_TEST[1] * -1.7 + 0.9) / A_TEST[0]) < 1e-12
    huge = draw(1, 3, 3).lower()
    huge = replace(huge, dt=tuple(torch.full_like(part, 1e6) for part in huge.dt))
    assert bool(run(backend, huge).y.isfinite().all())


@pytest.mark.parametrize("complex_states", [False, True])
@backends()
def test_checklist_5_4_v_small_steps_are_exact_in_float32(backend: str, complex_states: bool) -> None:
    """h1 of one cell from zero states is g B x; exp(z) - 1 would be wrong by 1 % here."""
    case = draw(1, 1, 1, edges=False, complex_states=complex_states).lower()
    case = replace(case, dt=(torch.full((1, 1, 1, 4), 1e-6), case.dt[1]))
    found = run(backend, case).right[0][0, 0].to(torch.complex128)
    z = 1e-6 * case.A[0].to(torch.complex128)
    g = (z + z**2 / 2 + z**3 / 6) / case.A[0]
    expected = g * case.B[0][0, 0, 0].to(torch.complex128) * case.x[0, 0, 0].double()[:, None]
    assert float(((found - expected).abs() / expected.abs()).max()) < 1e-5


@backends()
def test_checklist_5_4_vi_longer_steps_are_repeated_samples(backend: str) -> None:
    case = draw(2, 3, 8, edges=False).uncoupled()
    case = replace(case, dt=(torch.full_like(case.dt[0], 0.6), case.dt[1]), C=(case.C[0], torch.zeros_like(case.C[1])))

    def repeated(part: Tensor) -> Tensor:
        return part.repeat_interleave(3, dim=2)

    dt, B, C = (tuple(repeated(part) for part in pair) for pair in (case.dt, case.B, case.C))
    fine = Case(repeated(case.x), (dt[0] / 3, dt[1]), case.A, B, C)  # type: ignore[arg-type]
    assert float((run(backend, fine).y[:, :, 2::3] - run(backend, case).y).abs().max()) < 1e-12


def test_separate_exponentials_explode_where_the_default_does_not() -> None:
    """Steps of the trend head, A = -1..-16 for all four matrices; the couplings of ``exact`` at 0.9 of that."""
    case = draw(1, 7, 96, 4, 16, edges=False, dt=(1e-3, 1e-1))
    rate = -torch.arange(1.0, 17.0, dtype=torch.float64).expand(4, 16)
    case = replace(case, A=(rate, rate, rate, rate))
    assert float(run("rows", case, discretisation="separate").right[0].abs().max()) > 1e4
    assert float(run("rows", case, discretisation="separate_avg").right[0].abs().max()) < 1.0
    stable = replace(case, A=(rate, 0.9 * rate, 0.9 * rate, rate))
    assert float(run("wavefront", stable).right[0].abs().max()) < 1.0


# ---- stability


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(25, 25), (4, 25), (17, 6)])
@backends()
def test_checklist_5_5_states_stay_within_the_bound(backend: str, grid: tuple[int, int], complex_states: bool) -> None:
    """32 random systems (channels of one state) each, with any couplings that satisfy the condition."""
    case = draw(2, *grid, 32, 1, complex_states=complex_states, edges=False, dt=(3e-4, 55.0))
    rng = np.random.default_rng(5)
    rate1, rate4 = (part.real.abs() if part.is_complex() else part.abs() for part in (case.A[0], case.A[3]))
    c2 = torch.from_numpy(np.exp(rng.uniform(-2, 2, (32, 1))))
    c3 = torch.from_numpy(rng.uniform(0.5, 0.999, (32, 1))) / c2
    A2, A3 = (part / part.abs() * c * rate for part, c, rate in ((case.A[1], c2, rate1), (case.A[2], c3, rate4)))
    case = replace(case, A=(case.A[0], A2, A3, case.A[3]), x=case.x.clamp(-1.0, 1.0))
    one, none = torch.ones_like(case.C[0]), torch.zeros_like(case.C[0])
    sizes = []
    for pair in ((one, none), (none, one)):
        real = run(backend, replace(case, C=pair)).y
        turned = run(backend, replace(case, C=(1j * pair[0], 1j * pair[1]))).y if complex_states else torch.zeros(())
        sizes.append(torch.hypot(real, turned.expand_as(real)).amax((0, 1, 2)))
    drive = [part[..., 0, :].abs() * case.x.abs() for part in case.B]  # (b, N, T, D) with one state
    b1, b2 = (part.amax((0, 1, 2)) / rate[:, 0] for part, rate in zip(drive, (rate1, rate4), strict=True))
    c2, c3 = c2[:, 0], c3[:, 0]
    for size, bound in zip(sizes, ((b1 + c2 * b2) / (1 - c2 * c3), (b2 + c3 * b1) / (1 - c2 * c3)), strict=True):
        assert bool((size <= bound + 1e-9).all())


def constant(variates: int, steps: int, coupling: float, dtype: torch.dtype = torch.float64) -> Case:
    """Input 1, steps 1, A1 = A4 = -1, A2 = A3 = coupling, y = h1."""
    one = torch.ones(1, variates, steps, 1, 1, dtype=dtype)
    rates = (-1.0, coupling, coupling, -1.0)
    A = tuple(torch.full((1, 1), value, dtype=dtype) for value in rates)
    return Case(one[..., 0], (one[..., 0], one[..., 0]), A, (one, one), (one, 0 * one))  # type: ignore[arg-type]


@backends()
def test_checklist_5_5_constant_input_tends_to_the_fixed_point(backend: str) -> None:
    assert abs(float(run(backend, constant(321, 96, 0.9)).y[0, -1, -1, 0]) - 10.0) < 1e-3


@backends()
def test_checklist_5_5_outside_the_condition_it_explodes(backend: str) -> None:
    assert float(run(backend, constant(200, 200, math.sqrt(1.2))).y.abs().max()) > 1e6


@pytest.mark.parametrize("backend", ["wavefront", "compiled", TRITON])
def test_checklist_5_5_float32_stays_finite_on_a_large_grid(backend: str) -> None:
    found = run(backend, constant(862, 720, 0.95, torch.float32))
    assert bool(found.y.isfinite().all())
    assert abs(float(found.y[0, -1, -1, 0]) - 20.0) < 1e-2


# ---- causality, symmetry


def changed(case: Case, axis: int, start: int) -> Case:
    """Return the case with other inputs, steps and maps from ``start`` on along an axis (1 variates, 2 time)."""
    other = draw(*case.x.shape, case.A[0].shape[1], seed=9)

    def join(old: Tensor, new: Tensor) -> Tensor:
        kept = old.narrow(axis, 0, start)
        return torch.cat([kept, new.narrow(axis, start, new.shape[axis] - start)], dim=axis)

    pairs = {name: tuple(map(join, getattr(case, name), getattr(other, name))) for name in ("dt", "B", "C")}
    return replace(case, x=join(case.x, other.x), **pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(5, 12), (12, 5)])
@backends()
def test_checklist_5_6_outputs_do_not_see_what_comes_later(backend: str, grid: tuple[int, int]) -> None:
    case = draw(2, *grid)
    before = run(backend, case).y
    for start in range(grid[1]):
        after = run(backend, changed(case, 2, start)).y
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert not torch.equal(after[:, :, start:], before[:, :, start:])
    for start in range(grid[0]):
        after = run(backend, changed(case, 1, start)).y
        assert torch.equal(after[:, :start], before[:, :start])


@backends()
def test_checklist_5_7_permutation_of_variates(backend: str) -> None:
    """Equivariant if nothing runs along the variates, and not otherwise."""
    order = torch.tensor([3, 0, 4, 1, 2])

    def permuted(case: Case) -> Case:
        dt, B, C = (tuple(part[:, order] for part in pair) for pair in (case.dt, case.B, case.C))
        return Case(case.x[:, order], dt, case.A, B, C)  # type: ignore[arg-type]

    coupled = draw(2, 5, 8, edges=False, dt=(0.05, 2.0))
    alone = replace(coupled.uncoupled(), C=(coupled.C[0], torch.zeros_like(coupled.C[1])))
    assert torch.equal(run(backend, permuted(alone)).y, run(backend, alone).y[:, order])
    assert float((run(backend, permuted(coupled)).y - run(backend, coupled).y[:, order]).abs().max()) > 1e-3


@backends()
def test_checklist_5_7_time_and_variates_exchanged(backend: str) -> None:
    """The equations are symmetric: the transposed grid with exchanged roles has the transposed outputs."""
    case = draw(2, 4, 9)
    assert case.left is not None
    assert case.top is not None
    dt, B, C = (tuple(part.transpose(1, 2) for part in pair)[::-1] for pair in (case.dt, case.B, case.C))
    other = Case(case.x.transpose(1, 2), dt, case.A[::-1], B, C, case.top[::-1], case.left[::-1])  # type: ignore[arg-type]
    assert float((run(backend, other).y.transpose(1, 2) - run(backend, case).y).abs().max()) < 1e-13


@backends()
def test_checklist_5_7_batches_can_be_permuted_and_split(backend: str) -> None:
    case = draw(5, 4, 9).lower()
    shared = {id(part) for part in case.A}
    whole = run(backend, case)
    order = torch.tensor([4, 2, 0, 1, 3])
    mixed = run(backend, case.mapped(lambda part: part if id(part) in shared else part[order]))
    assert float((mixed.y - whole.y[order]).abs().max()) < 1e-6 * float(whole.y.abs().max())
    for rows in (slice(0, 2), slice(2, 5)):
        part = run(backend, case.mapped(lambda part, rows=rows: part if id(part) in shared else part[rows]))
        assert float((part.y - whole.y[rows]).abs().max()) < 1e-6 * float(whole.y.abs().max())


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
