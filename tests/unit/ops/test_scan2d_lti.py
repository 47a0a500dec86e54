"""The 2-D model with constant parameters: FFT against loops, companion structure, single columns of a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scan2d_cases import Case, draw, run
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import scan2d_lti as module
from tsforge.ops.scan2d import Discretisation
from tsforge.ops.scan2d_lti import (
    LTISystem2D,
    companion,
    lti_kernel2d,
    lti_scan2d,
    lti_scan2d_reference,
    lti_step2d,
    lti_system2d,
)

GRIDS = [(1, 1), (1, 17), (17, 1), (2, 3), (5, 9), (12, 5), (7, 24)]
KINDS = ["real", "complex", "companion"]


def parameters(channels: int = 4, states: int = 3, *, complex_states: bool = False, seed: int = 0) -> Any:
    """Return dt, A, B, C of a constant system: those of the first cell of a random case."""
    case = draw(1, 1, 1, channels, states, groups=channels, complex_states=complex_states, dt=(0.05, 2.0), seed=seed)
    dt, B, C = (tuple(part[0, 0, 0] for part in pair) for pair in (case.dt, case.B, case.C))
    return dt, case.A, B, C


def system_of(kind: str, channels: int = 4, states: int = 3, seed: int = 0) -> LTISystem2D:
    system = lti_system2d(*parameters(channels, states, complex_states=kind == "complex", seed=seed))
    if kind != "companion":
        return system
    columns = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, channels, states)))
    return system._replace(a1=companion(columns[0], 0.8), a2=0.1 * companion(columns[1], 0.8))


def inputs(batch: int, variates: int, steps: int, channels: int = 4, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, variates, steps, channels)))


def by_loop(x: Tensor, system: LTISystem2D) -> np.ndarray:
    """Return y of one cell after another in NumPy, companion matrices and all."""
    f = {name: part.detach().numpy() for name, part in system._asdict().items()}
    batch, variates, steps = x.shape[:3]
    h1 = np.zeros((batch, variates + 1, steps + 1, *f["b1"].shape), dtype=f["b1"].dtype)
    h2, y = np.zeros_like(h1), np.zeros(x.shape)

    def act(factor: np.ndarray, h: np.ndarray) -> np.ndarray:
        return factor * h if factor.ndim == 2 else (factor @ h[..., None])[..., 0]

    for v in range(variates):
        for t in range(steps):
            u = x.numpy()[:, v, t, :, None]
            h1[:, v + 1, t + 1] = act(f["a1"], h1[:, v + 1, t]) + act(f["a2"], h2[:, v + 1, t]) + f["b1"] * u
            h2[:, v + 1, t + 1] = f["a3"] * h1[:, v, t + 1] + f["a4"] * h2[:, v, t + 1] + f["b2"] * u
            y[:, v, t] = (f["c1"] * h1[:, v + 1, t + 1] + f["c2"] * h2[:, v + 1, t + 1]).sum(-1).real
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_checklist_5_9_fft_equals_the_recurrence(grid: tuple[int, int], kind: str) -> None:
    system, x = system_of(kind), inputs(2, *grid)
    kernel = lti_kernel2d(system, *grid)
    assert kernel.shape == (4, *grid)
    assert kernel.dtype == torch.float64
    expected = by_loop(x, system)
    assert np.abs(lti_scan2d(x, kernel).numpy() - expected).max() < 1e-12
    assert np.abs(lti_scan2d_reference(x, system).y.numpy() - expected).max() < 1e-12


def as_selective(dt: Any, A: Any, B: Any, C: Any, x: Tensor) -> Case:
    """Return the same system as a selective one whose parameters happen to be constant; every channel is a group."""

    def spread(part: Tensor) -> Tensor:
        return part.expand(*x.shape[:3], *part.shape)

    return Case(x, tuple(map(spread, dt)), A, tuple(map(spread, B)), tuple(map(spread, C)))  # type: ignore[arg-type]


@pytest.mark.parametrize("discretisation", ["exact", "separate_avg"])
@pytest.mark.parametrize("complex_states", [False, True])
def test_checklist_5_9_constant_parameters_are_a_case_of_the_selective_scan(
    complex_states: bool, discretisation: Discretisation
) -> None:
    given, x = parameters(complex_states=complex_states), inputs(2, 5, 9)
    system = lti_system2d(*given, discretisation=discretisation)
    found = lti_scan2d(x, lti_kernel2d(system, 5, 9))
    expected = run("rows", as_selective(*given, x), discretisation=discretisation).y
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


def test_checklist_5_9_the_kernel_is_the_response_to_an_impulse_whatever_the_batch() -> None:
    system = system_of("real")
    impulse = torch.zeros(1, 6, 8, 4, dtype=torch.float64)
    impulse[0, 0, 0] = 1.0
    kernel = lti_kernel2d(system, 6, 8)
    assert np.abs(kernel.permute(1, 2, 0).numpy() - by_loop(impulse, system)[0]).max() < 1e-14
    smaller = lti_kernel2d(system, 3, 5)
    assert float((smaller - kernel[:, :3, :5]).abs().max()) < 1e-14
    x = inputs(3, 3, 5)
    assert float((lti_scan2d(x, kernel) - lti_scan2d(x, smaller)).abs().max()) < 1e-13
    whole = lti_scan2d(x, kernel)
    assert float((torch.cat([lti_scan2d(part, kernel) for part in x.split(1)]) - whole).abs().max()) < 1e-13


@pytest.mark.parametrize("axis", [0, 1])
def test_checklist_5_9_without_padding_the_far_end_wraps_around(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    system, x = system_of("real"), inputs(1, 6, 8)
    expected = by_loop(x, system)
    sizes = iter([6 if axis == 0 else 16, 8 if axis == 1 else 16])
    monkeypatch.setattr(module, "fft_length", lambda least: next(sizes))
    assert np.abs(lti_scan2d(x, lti_kernel2d(system, 6, 8)).numpy() - expected).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_checklist_5_2_gradients_of_the_fft_path(kind: str) -> None:
    system, x = system_of(kind, 2, 2), inputs(2, 3, 4, 2)
    leaves = [part.detach().clone().requires_grad_() for part in (x, *system)]

    def scan(u: Tensor, *parts: Tensor) -> Tensor:
        return lti_scan2d(u, lti_kernel2d(LTISystem2D(*parts), 3, 4))

    assert torch.autograd.gradcheck(scan, leaves)
    probe = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(scan(*leaves), leaves, probe)
    slow = torch.autograd.grad(lti_scan2d_reference(leaves[0], LTISystem2D(*leaves[1:])).y, leaves, probe)
    assert max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, slow, strict=True)) < 1e-11


def test_float32_is_close_to_float64() -> None:
    system, x = system_of("real"), inputs(2, 7, 24)
    low = LTISystem2D(*(part.float() for part in system))
    found = lti_scan2d(x.float(), lti_kernel2d(low, 7, 24))
    assert found.dtype == torch.float32
    expected = by_loop(x, system)
    assert np.abs(found.numpy() - expected).max() < 2e-6 * np.abs(expected).max()


def test_half_precision_autocast_leaves_companion_matrices_alone() -> None:
    system = LTISystem2D(*(part.float() for part in system_of("companion")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lti_kernel2d(system, 3, 6)
    assert torch.equal(inside, lti_kernel2d(system, 3, 6))


# ---- special cases


def test_checklist_5_3_s4d_parity() -> None:
    """Without coupling and C2 every variate is convolved with the 1-D kernel sum_s c a^t b."""
    system = system_of("complex")
    none = torch.zeros_like(system.a2)
    system = system._replace(a2=none, a3=none, c2=torch.zeros_like(none))
    x, t = inputs(2, 3, 20), np.arange(20)
    a, b, c = (part.numpy()[..., None] for part in (system.a1, system.b1, system.c1))
    kernel = (c * a**t * b).sum(1).real  # (D, T)
    found = lti_scan2d(x, lti_kernel2d(system, 3, 20)).numpy()
    for d in range(4):
        expected = [[np.convolve(row, kernel[d])[:20] for row in batch] for batch in x.numpy()[..., d]]
        assert np.abs(found[..., d] - expected).max() < 1e-12


def test_checklist_5_3_one_way_coupling_has_a_separable_kernel() -> None:
    """A2 = 0 and one state: a matrix of rank 1 from the second variate on; with both couplings it is not."""
    system = system_of("real", 1, 1)
    one_way = lti_kernel2d(system._replace(a2=torch.zeros_like(system.a2)), 6, 8)[0, 1:]
    assert float(torch.linalg.svdvals(one_way)[1]) < 1e-14
    both = lti_kernel2d(system, 6, 8)[0, 1:]
    assert float(torch.linalg.svdvals(both)[1]) > 1e-4


def test_a_companion_row_is_an_autoregressive_model() -> None:
    """Its column holds the coefficients: h_S obeys h_t = c_S h_{t-1} + c_{S-1} h_{t-2} + ... + u."""
    column = torch.tensor([[0.1, -0.3, 0.5]], dtype=torch.float64)
    A = companion(column, 0.9)
    assert np.allclose(A[0].numpy(), [[0, 0, 0.1], [1, 0, -0.3], [0, 1, 0.5]])
    zero, last = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    system = LTISystem2D(A, torch.zeros_like(A), zero, zero, last, zero, last, zero)
    x = inputs(1, 1, 12, 1)
    y, past = lti_scan2d(x, lti_kernel2d(system, 1, 12))[0, 0, :, 0].numpy(), np.zeros(3)
    for t in range(12):
        value = 0.5 * past[0] - 0.3 * past[1] + 0.1 * past[2] + x.numpy()[0, 0, t, 0]
        assert abs(y[t] - value) < 1e-12
        past = np.array([value, *past[:2]])


def test_a_companion_column_is_scaled_and_bounds_the_eigenvalues() -> None:
    column = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 5)))
    for size in (1.0, 0.5):
        A = companion(column, size)
        assert torch.allclose(A[..., -1].abs().sum(-1), torch.full((200,), size, dtype=torch.float64))
        assert float(torch.linalg.eigvals(A).abs().max()) <= size ** (1 / 5) + 1e-12
    assert companion(torch.zeros(1, 3)).isfinite().all()
    assert companion(torch.ones(1, 1), 0.7).item() == pytest.approx(0.7)
    for size in (0.0, 1.1, float("nan")):
        with pytest.raises(ModelError, match="1-norm above 0 and up to 1"):
            companion(column, size)


@pytest.mark.parametrize(("margin", "stable"), [(0.98, True), (60.0, False)])
def test_companion_pair_stays_bounded_within_its_condition(margin: float, stable: bool) -> None:
    size, states, a4 = 0.6, 4, 0.7
    shrink = size ** (1 / states)
    coupling = margin * (1 - shrink) * (1 - a4) / (0.5 * shrink)  # of A2, with A3 = 0.5
    system = system_of("real", 16, states)
    columns = torch.from_numpy(np.random.default_rng(1).uniform(0.0, 1.0, size=(2, 16, states)))
    full = torch.full((16, states), 0.5, dtype=torch.float64)
    system = system._replace(
        a1=companion(columns[0], size), a2=coupling * companion(columns[1], size), a3=full, a4=full * (a4 / 0.5)
    )
    response = lti_kernel2d(system, 60, 60).abs()
    ends = float(response[:, -1, -1].max()) / float(response.max())
    assert (ends < 1e-2) == stable


# ---- streams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 5), (5, 9), (9, 4)])
def test_checklist_5_8_columns_equal_the_loop(grid: tuple[int, int], kind: str) -> None:
    system, x = system_of(kind), inputs(2, *grid)
    rng = np.random.default_rng(3)
    lanes = [torch.from_numpy(rng.normal(size=(2, cells, 4, 3))).to(system.b1.dtype) for cells in (*grid, *grid)]
    left, top = (lanes[0], lanes[2]), (lanes[1], lanes[3])
    for edges in ({}, {"left": left}, {"left": left, "top": top}):
        whole = lti_scan2d_reference(x, system, **edges)  # type: ignore[arg-type]
        state = edges.get("left", (torch.zeros_like(left[0]), torch.zeros_like(left[0])))
        outputs = []
        for t in range(grid[1]):
            above = (top[0][:, t], top[1][:, t]) if "top" in edges else None
            y, state = lti_step2d(system, x[:, :, t], state, above)
            outputs.append(y)
        assert float((torch.stack(outputs, dim=2) - whole.y).abs().max()) < 1e-12
        for ours, theirs in zip(state, whole.right, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-12
    assert np.abs(lti_scan2d_reference(x, system).y.numpy() - by_loop(x, system)).max() < 1e-12


def test_checklist_5_6_later_inputs_do_not_matter() -> None:
    kernel, x = lti_kernel2d(system_of("real"), 5, 9), inputs(2, 5, 9)
    before = lti_scan2d(x, kernel)
    after = x.clone()
    after[:, :, 6:] += 1.0
    change = (lti_scan2d(after, kernel) - before).abs()
    assert float(change[:, :, :6].max()) < 1e-13
    assert float(change[:, :, 6:].min()) > 1e-6
    after = x.clone()
    after[:, 3:] += 1.0
    assert float((lti_scan2d(after, kernel) - before)[:, :3].abs().max()) < 1e-13


# ---- bad input


def test_grids_and_kernels_that_do_not_fit_are_refused() -> None:
    system = system_of("real")
    for grid in ((0, 3), (3, 0)):
        with pytest.raises(ModelError, match="at least one variate and one step"):
            lti_kernel2d(system, *grid)
    kernel = lti_kernel2d(system, 3, 4)
    for x in (inputs(1, 4, 4), inputs(1, 3, 5), inputs(1, 3, 4, 2)):
        with pytest.raises(ModelError, match=r"kernel of shape \(4, 3, 4\) does not cover"):
            lti_scan2d(x, kernel)


def test_factors_that_do_not_fit_are_refused() -> None:
    system = system_of("real")
    wrong = {
        "b1": (system.b1[0], r"b1 .* needs shape \(D, S\)"),
        "a2": (companion(system.b1), r"a2 .* needs shape \(4, 3\)"),
        "c2": (system.c2[:, :1], r"c2 .* needs shape \(4, 3\)"),
        "a4": (system.a4.float(), "a4 .* torch.float64 here, got .*torch.float32"),
    }
    for name, (part, match) in wrong.items():
        with pytest.raises(ModelError, match=match):
            lti_kernel2d(system._replace(**{name: part}), 2, 2)
