"""The 2-D scan: discretisation, stability, causality and symmetry."""

from __future__ import annotations

import math
from dataclasses import replace

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
from scan2d_paths import reference
from torch import Tensor

from tsforge.ops.scan2d import discrete_factors, scan2d

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
