"""The 2-D scan: every backend against a cell-by-cell loop in NumPy and against the algebra of blocks; gradients against
autograd through the loop; special cases."""

from __future__ import annotations

from dataclasses import replace
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
from scan2d_paths import reference, wavefront
from torch import Tensor

from tsforge.core.errors import ModelError

GRIDS = [(1, 1), (1, 17), (17, 1), (2, 3), (5, 9), (7, 96), (12, 12), (33, 20)]

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
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(wavefront(case).y.pow(2).sum(), case.x, create_graph=True)


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
