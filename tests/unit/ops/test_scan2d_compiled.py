"""The C++ lane kernel of the 2-D scan against the double loop and autograd through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compiler import need_compiler
from scan2d_cases import Case, difference, draw, gradients, oracle, worst_gradient
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import _scan2d_compiled as module
from tsforge.ops._scan2d_compiled import scan2d_compiled, unavailable
from tsforge.ops.scan2d import Scan2D, scan2d_reference

# variates, steps, channels, states, groups: every lane count with rests, one cell, both orders of the axes
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 9, 3, 1, 1),
    (8, 1, 7, 3, 1),
    (3, 5, 4, 8, 1),
    (5, 3, 16, 16, 1),
    (4, 6, 17, 17, 1),
    (6, 4, 33, 3, 1),
    (3, 7, 8, 8, 2),
    (7, 3, 40, 3, 2),
    (2, 10, 15, 1, 5),
]


@pytest.fixture(autouse=True)
def _available() -> None:
    need_compiler()
    assert unavailable(torch.zeros(1), torch.zeros(1)) is None


def scan(case: Case, **options: Any) -> Scan2D:
    y, h1, h2 = scan2d_compiled(case.x, case.dt, case.A, case.B, case.C, case.left, case.top, **options)
    return Scan2D(y, (h1, h2))


def loop(case: Case) -> Scan2D:
    return scan2d_reference(case.x, case.dt, case.A, case.B, case.C, left=case.left, top=case.top)


def case_of(shape: tuple[int, ...], complex_states: bool, **options: Any) -> Case:
    variates, steps, channels, states, groups = shape
    return draw(2, variates, steps, channels, states, groups=groups, complex_states=complex_states, **options)


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_checklist_5_1_it_equals_the_double_loop(shape: tuple[int, ...], complex_states: bool) -> None:
    for edges in (True, False):
        case = case_of(shape, complex_states, edges=edges)
        expected = oracle(case)
        assert difference(scan(case), expected) <= 1e-12
        assert difference(scan(case.lower()), oracle(case.lower())) <= 2e-6


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_checklist_5_2_gradients_equal_autograd_through_the_loop(shape: tuple[int, ...], complex_states: bool) -> None:
    for edges in (True, False):
        case = case_of(shape, complex_states, edges=edges).leaves()
        expected = gradients(loop(case), case)
        assert worst_gradient(gradients(scan(case), case), expected) <= 1e-11
        single = case.lower().leaves()
        exact = single.mapped(lambda part: part.to(torch.complex128 if part.is_complex() else torch.float64)).leaves()
        assert worst_gradient(gradients(scan(single), single), gradients(loop(exact), exact)) <= 2e-5


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(2, 4), (4, 2)])
def test_checklist_5_2_gradcheck(grid: tuple[int, int], complex_states: bool) -> None:
    case = draw(2, *grid, 4, 2, groups=2, complex_states=complex_states, dt=(0.05, 2.0)).leaves()

    def function(*parts: Tensor) -> tuple[Tensor, ...]:
        found = scan(case.rebuilt(list(parts)))
        return found.y, *found.right

    assert torch.autograd.gradcheck(function, case.tensors(), fast_mode=True)


@pytest.mark.parametrize("grid", [(3, 17), (17, 3)])
def test_checklist_5_2_the_checkpoint_interval_changes_nothing(grid: tuple[int, int]) -> None:
    case = draw(1, *grid, 3, 2).leaves()
    whole = gradients(scan(case, interval=100), case)
    for interval in (0, 1, 2, 5, 16, 17):
        assert worst_gradient(gradients(scan(case, interval=interval), case), whole) <= 1e-12


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("shape", [(1, 9, 3, 1, 1), (3, 5, 40, 8, 2), (5, 3, 4, 2, 1)])
def test_without_a_second_axis_its_states_are_left_out(shape: tuple[int, ...], complex_states: bool) -> None:
    for edges in (True, False):
        case = case_of(shape, complex_states, edges=edges)
        parts = case.tensors()
        for index in (4, 5, 8, 10):  # A2, A3, B2, C2
            parts[index] = torch.zeros_like(parts[index])
        for index in (12, 14) if edges else ():  # h2 at the edges
            parts[index] = torch.zeros_like(parts[index])
        case = case.rebuilt(parts).leaves()
        packed = [None if pair is None else torch.stack(pair, dim=2) for pair in (case.left, case.top)]
        one_sided = module._one_sided(tuple(case.tensors()[:11]), *packed)
        assert one_sided == (shape[0] <= shape[1])
        assert difference(scan(case), oracle(case)) <= 1e-12
        assert worst_gradient(gradients(scan(case), case), gradients(loop(case), case)) <= 1e-11  # h2 is read here
        ours = torch.autograd.grad(scan(case).y.square().sum(), case.tensors(), allow_unused=True)
        theirs = torch.autograd.grad(loop(case).y.square().sum(), case.tensors(), allow_unused=True)
        for left, right in zip(ours, theirs, strict=True):
            assert left is not None
            torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right, rtol=1e-11, atol=1e-11)
        for index in (4, 5, 8, 10):
            changed = case.tensors()
            changed[index] = torch.ones_like(changed[index])
            assert not module._one_sided(tuple(changed[:11]), *packed)


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(3, 5), (5, 3)])
def test_maps_are_read_where_they_lie_in_a_wider_tensor(grid: tuple[int, int], complex_states: bool) -> None:
    case = draw(2, *grid, 12, 3, groups=2, complex_states=complex_states)
    parts = case.tensors()
    wide = torch.stack(parts[7:11], dim=-2).movedim(3, 0).contiguous()  # (G, b, N, T, 4, S): groups far apart
    views = list(wide.movedim(0, 3).unbind(-2))
    times = 2 if complex_states else 1
    maps, strides = module._shared(tuple(views), one_sided=False)
    assert [part.data_ptr() for part in maps] == [part.data_ptr() for part in views]
    assert strides == (4 * 3 * times, wide[0].numel() * times)
    wider = case.rebuilt([*parts[:7], *views, *parts[11:]])
    ours, theirs = wider.leaves(), case.leaves()
    assert not ours.B[0].is_contiguous()
    assert torch.equal(scan(ours).y, scan(theirs).y)
    for left, right in zip(gradients(scan(ours), ours), gradients(scan(theirs), theirs), strict=True):
        assert torch.equal(left, right)


def test_checklist_5_12_memory_stays_far_below_all_states() -> None:
    x, A, B = torch.empty(32, 7, 96, 16), torch.empty(16, 8), torch.empty(32, 7, 96, 1, 8)
    plan = module._plan(x, A, B, 0)
    states = 2 * x.numel() * 8
    assert plan.checkpoints < states / 8
    assert (plan.checkpoints + plan.backward_scratch) * 4 < 10e6
    assert plan.forward_scratch < 1e5


def test_checklist_5_4_one_step_has_the_gain_of_the_exponential() -> None:
    z = np.concatenate([[0.0, 1e-30], np.geomspace(1e-8, 300.0, 2000), [1e6]])
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        step = torch.tensor(z, dtype=dtype).view(1, 1, 1, -1)
        ones = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
        A = -torch.ones(step.shape[-1], 1, dtype=dtype)
        y, _, _ = scan2d_compiled(
            torch.ones_like(step), (step, step), (A, A, A, A), (ones, ones), (ones, 0 * ones), None, None
        )
        expected = -np.expm1(-step.double().numpy())
        assert (np.abs(y.double().numpy() - expected) <= tolerance * expected).all()


def test_checklist_5_4_complex_gains_are_accurate_near_zero_and_over_many_turns() -> None:
    decay, turn = np.meshgrid(np.geomspace(1e-8, 60.0, 60), np.concatenate([[0.0], np.geomspace(1e-8, 1e4, 120)]))
    rate = -decay.ravel() + 1j * np.concatenate([turn.ravel()[::2], -turn.ravel()[1::2]])
    for dtype, tolerance in ((torch.complex64, 4e-7), (torch.complex128, 1e-15)):
        A = torch.tensor(rate, dtype=dtype).unsqueeze(-1)
        steps = torch.ones(1, 1, 1, len(rate), dtype=A.real.dtype)
        one = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
        parts = [
            scan2d_compiled(steps, (steps, steps), (A, A, A, A), (one, one), (c * one, 0 * one), None, None)[0]
            for c in (1.0, -1.0j)
        ]
        exact = A.to(torch.complex128).squeeze(-1).numpy()
        expected = np.expm1(exact) / exact
        found = parts[0].double().numpy().ravel() + 1j * parts[1].double().numpy().ravel()
        # a phase of many turns is only known to its own rounding
        allowed = tolerance * (np.abs(expected) + np.abs(exact.imag) * np.exp(exact.real) / np.abs(exact))
        assert (np.abs(found - expected) <= allowed).all()


def test_checklist_5_4_small_steps_keep_their_digits_in_single_precision() -> None:
    case = draw(1, 3, 8, 5, 4, dt=(1e-6, 1e-6)).lower()
    case = case.rebuilt([case.x, *case.dt, *[-part.abs() / part.abs() for part in case.A], *case.tensors()[7:]])
    assert difference(scan(case), oracle(case)) <= 5e-7


@pytest.mark.parametrize("complex_states", [False, True])
def test_checklist_5_4_a_step_of_zero_passes_states_on_and_a_huge_one_forgets(complex_states: bool) -> None:
    case = draw(1, 3, 4, 5, 2, complex_states=complex_states)
    parts = case.tensors()
    still = scan(case.rebuilt([parts[0], *(torch.zeros_like(part) for part in case.dt), *parts[3:]]))
    assert case.left is not None
    assert torch.equal(still.right[0], case.left[0])
    assert case.top is not None
    assert torch.equal(still.right[1], case.top[1][:, -1].unsqueeze(1).expand_as(still.right[1]))
    huge = case.rebuilt([parts[0], *(torch.full_like(part, 1e30) for part in case.dt), *parts[3:]])
    for precise in (huge, huge.lower()):
        assert difference(scan(precise), oracle(huge)) <= (1e-12 if precise is huge else 2e-6)


def test_what_is_no_number_stays_visible_and_stays_behind_its_time() -> None:
    case = draw(1, 3, 6, 2, 2)
    clean = scan(case).y
    for part in (case.x, case.dt[0]):
        kept = part[0, 1, 3].clone()
        part[0, 1, 3] = float("nan")
        y = scan(case).y
        assert y[0, 1:, 3:].isnan().all()
        assert torch.equal(y[:, :, :3], clean[:, :, :3])
        part[0, 1, 3] = kept


@pytest.mark.parametrize("complex_states", [False, True])
@pytest.mark.parametrize("grid", [(3, 8), (8, 3)])
def test_threads_change_no_bit(grid: tuple[int, int], complex_states: bool, two_threads: None) -> None:
    case = draw(3, *grid, 40, 3, groups=2, complex_states=complex_states).lower().leaves()
    several = scan(case)
    assert module._plan(case.x, case.A[0], case.B[0], 0).numbers[11] == 2
    several_gradients = gradients(several, case)
    torch.set_num_threads(1)
    one = scan(case)
    for ours, theirs in zip(
        [several.y, *several.right, *several_gradients], [one.y, *one.right, *gradients(one, case)], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_little_work_starts_no_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small, large = draw(1, 3, 8), draw(4, 64, 96, 16, 8)
        assert module._plan(small.x, small.A[0], small.B[0], 0).numbers[11] == 1
        assert module._plan(large.x, large.A[0], large.B[0], 0).numbers[11] == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("complex_states", [False, True])
def test_checklist_5_10_inputs_need_not_be_contiguous(complex_states: bool) -> None:
    case = draw(2, 4, 6, 6, 3, groups=2, complex_states=complex_states)

    def scattered(part: Tensor) -> Tensor:
        wide = torch.stack([part, part + 1.0], dim=-1).movedim(-1, 0).contiguous().movedim(0, -1)[..., 0]
        return wide.transpose(-1, -2).contiguous().transpose(-1, -2)

    loose = case.mapped(scattered).mapped(lambda part: part.conj().resolve_conj().conj() if complex_states else part)
    plain = loose.mapped(lambda part: part.resolve_conj().contiguous())
    assert not loose.x.is_contiguous()
    assert torch.equal(scan(loose).y, scan(plain).y)
    negated = torch._neg_view(case.x)  # minus x, by a flag and not in memory
    assert negated.is_neg()
    assert negated.is_contiguous()
    found = scan2d_compiled(negated, case.dt, case.A, case.B, case.C, None, None)[0]
    assert torch.equal(found, scan2d_compiled(-case.x, case.dt, case.A, case.B, case.C, None, None)[0])
    leaves = loose.leaves()
    expanded = torch.autograd.grad(scan(leaves).y.sum(), leaves.x)[0]  # a gradient with strides 0
    assert torch.equal(expanded, torch.autograd.grad(scan(leaves).y, leaves.x, torch.ones_like(leaves.x))[0])


def test_gradients_flow_from_each_output_alone() -> None:
    case = draw(2, 3, 5).leaves()
    for pick in (lambda found: found.y, lambda found: found.right[0], lambda found: found.right[1]):
        ours = torch.autograd.grad(pick(scan(case)).square().sum(), case.tensors(), allow_unused=True)
        theirs = torch.autograd.grad(pick(loop(case)).square().sum(), case.tensors(), allow_unused=True)
        for left, right in zip(ours, theirs, strict=True):
            right = torch.zeros_like(left) if right is None else right
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_gradients_only_where_asked() -> None:
    case = draw(2, 3, 5)
    case.x.requires_grad_()
    found = scan(case)
    (grad,) = torch.autograd.grad(found.y.sum(), case.x)
    assert grad.shape == case.x.shape
    with torch.no_grad():
        assert scan(case).y.grad_fn is None


def test_states_for_a_backward_pass_are_kept_only_when_one_may_follow() -> None:
    case = draw(2, 3, 30).leaves()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.numel()) or part, lambda part: part):
        scan(case.mapped(lambda part: part.detach()))
        with torch.no_grad():
            scan(case)
        assert kept == []
        scan(case)
    assert kept


def test_a_second_derivative_is_refused() -> None:
    case = draw(1, 2, 3).leaves()
    with pytest.raises(ModelError, match="no second derivative; choose backend 'rows'"):
        torch.autograd.grad(scan(case).y.sum(), case.x, create_graph=True)
    y = scan(case).y.sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_reasons_name_what_does_not_fit() -> None:
    assert "on the CPU, x is on meta" in (unavailable(torch.zeros(1, device="meta"), torch.zeros(1)) or "")
    assert "float16" in (unavailable(torch.zeros(1, dtype=torch.float16), torch.zeros(1)) or "")
    mixed = unavailable(torch.zeros(1), torch.zeros(1, dtype=torch.complex128))
    assert "same precision" in (mixed or "")
    assert unavailable(torch.zeros(1), torch.zeros(1, dtype=torch.complex64)) is None


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert unavailable(torch.zeros(1), torch.zeros(1)) == "TSFORGE_COMPILED=off"
