"""The forced PLRNN: every backend against scalar loops; gradients against autograd through the definition; forcing
strengths, missing entries, bounds of states and gradients, free runs, choice of the backend and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plrnn_cases import (
    ALPHAS,
    SIZES,
    Case,
    backends,
    difference,
    draw,
    gradients,
    need,
    oracle,
    run,
    run_free,
    run_or_skip,
    worst_gradient,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsforge.core.errors import ModelError
from tsforge.ops import _plrnn_function as function_module
from tsforge.ops import plrnn as module
from tsforge.ops.plrnn import Shallow, free_run, gtf_loop, gtf_sequence, plain, shallow_map

both = pytest.mark.parametrize("clipped", [False, True])
grouped = pytest.mark.parametrize("groups", [None, 3])


def lozi() -> Shallow:
    """The Lozi map x' = 1 - 1.7 |x| + y, y' = 0.5 x: chaotic and piecewise linear."""
    read = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    rise = torch.tensor([[-1.7, -1.7, 1.0, -1.0], [0.5, -0.5, 0.0, 0.0]], dtype=torch.float64)
    offset = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Shallow(torch.zeros_like(offset), rise, read, offset, torch.zeros(4, dtype=torch.float64))


def jacobians(params: Shallow, states: np.ndarray, clipped: bool) -> np.ndarray:
    """Return the Jacobian (..., M, M) at every state (..., M), each column from the definition."""
    A, W1, W2, _, h2 = (part.numpy() for part in params)
    drive = states @ W2.T
    slope = (drive + h2 > 0).astype(float) - clipped * (drive > 0)
    return np.diag(A) + (W1 * slope[..., None, :]) @ W2


# ---- 8.2 clipped maps


@grouped
def test_checklist_8_2_a_clipped_map_equals_its_plain_form(groups: int | None) -> None:
    case = draw(5, 40, 3, 17, groups=groups, clipped=True)
    twice = replace(case, params=plain(case.params, True), clipped=False)
    assert twice.params.h2.shape[-1] == 34
    assert difference(run("reference", twice), oracle(case)) < 1e-12
    assert plain(case.params, False) is case.params
    leaves = case.leaves()
    ours = gtf_sequence(leaves.z1, case.forcing, case.alpha, plain(leaves.params, True), inputs=leaves.inputs)
    grads = torch.autograd.grad(ours.sin().sum(), leaves.tensors())
    again = case.leaves()
    theirs = torch.autograd.grad(run("reference", again).sin().sum(), again.tensors())
    assert worst_gradient(list(grads), list(theirs)) < 1e-12


@backends(reference=True, free=True)
def test_checklist_8_2_clipped_free_runs_stay_bounded(backend: str) -> None:
    for seed in range(2):
        rng = np.random.default_rng(seed)
        case = draw(4, 1, 3, 20, clipped=True, inputs=False, seed=seed)
        params = case.params._replace(
            A=torch.from_numpy(rng.uniform(-0.999, 0.999, 3)), W1=4.0 * torch.from_numpy(rng.normal(size=(3, 20)))
        )
        bound = (params.W1.abs() @ params.h2.abs() + params.h1.abs()) / (1.0 - params.A.abs())
        far = replace(case, z1=1e4 * case.z1, params=params)
        end = run_free(backend, far, 10_000, every=2_500)
        left = far.z1.abs().amax() * params.A.abs() ** 10_000  # of a start this far
        assert bool((end[-1].abs() <= bound * (1 + 1e-9) + left).all())
        unclipped = run_free(backend, replace(far, clipped=False), 10_000, every=2_500)
        assert not bool((unclipped[-1].abs() <= bound).all())


# ---- 8.3 all backends agree


@both
@grouped
@pytest.mark.parametrize("size", SIZES)
@backends(reference=True)
def test_checklist_8_3_float64_equals_the_loop(
    backend: str, size: tuple[int, ...], groups: int | None, clipped: bool
) -> None:
    for inputs in (True, False):
        case = draw(*size, groups=groups, clipped=clipped, inputs=inputs)
        assert difference(run_or_skip(backend, case), oracle(case)) < 1e-12


@both
@backends(reference=True)
def test_checklist_8_3_float32_equals_the_loop(backend: str, clipped: bool) -> None:
    for size in SIZES:
        case = draw(*size, groups=2, clipped=clipped).lower()
        found = run(backend, case)
        assert found.dtype == torch.float32
        assert difference(found, oracle(case)) < 1e-6


@pytest.mark.parametrize("form", [*ALPHAS, "groups"])
@backends(reference=True)
def test_checklist_8_3_every_form_of_alpha_equals_the_loop(backend: str, form: str) -> None:
    for groups in (2,) if form == "groups" else (None, 2):
        case = draw(5, 8, 4, 9, groups=groups, alpha=form)
        assert difference(run(backend, case), oracle(case)) < 1e-12


@backends(reference=True)
def test_checklist_8_3_a_scalar_alpha_equals_the_broadcast_one(backend: str) -> None:
    case = draw(5, 8, 4, 9, alpha="number")
    assert case.forcing is not None
    full = replace(case, alpha=torch.full_like(case.forcing, 0.3))
    assert difference(run(backend, case), run(backend, full)) < 1e-14
    assert worst_gradient(gradients(backend, case), gradients(backend, full)) < 1e-13


@both
@grouped
@pytest.mark.parametrize("size", SIZES)
@backends()
def test_checklist_8_3_gradients_equal_autograd(
    backend: str, size: tuple[int, ...], groups: int | None, clipped: bool
) -> None:
    case = draw(*size, groups=groups, clipped=clipped)
    assert worst_gradient(gradients(backend, case), gradients("reference", case)) < 1e-12
    low, free = case.lower(), replace(case, forcing=None, alpha=0.0)
    assert worst_gradient(gradients(backend, low), gradients("reference", case)) < 2e-5
    if backend != "newton":
        assert worst_gradient(gradients(backend, free), gradients("reference", free)) < 1e-12


@both
@grouped
@backends()
def test_checklist_8_3_gradcheck(backend: str, groups: int | None, clipped: bool) -> None:
    need(backend)
    if backend == "triton":
        pytest.skip("on the CPU only; its gradients are compared with autograd's")
    case = draw(3, 4, 2, 5, groups=groups, clipped=clipped).leaves()

    def scanned(*parts: Tensor) -> Tensor:
        return run(backend, case.rebuilt(parts))

    assert torch.autograd.gradcheck(scanned, case.tensors(), eps=1e-7, atol=1e-6)


@both
@backends(reference=True)
def test_checklist_8_3_groups_equal_separate_runs(backend: str, clipped: bool) -> None:
    case = draw(5, 7, 3, 17, groups=3, clipped=clipped)
    found, grads = run(backend, case), gradients(backend, case)
    probe = torch.from_numpy(np.random.default_rng(0).normal(size=found.shape))
    for g in range(3):
        alone = case.group(g).leaves()
        result = run(backend, alone)
        assert difference(found[g], result) < 1e-13
        separate = torch.autograd.grad(result, alone.tensors(), probe[g])
        assert worst_gradient([part[g] for part in grads], list(separate)) < 1e-12


@backends()
def test_strided_and_expanded_arguments_are_fine(backend: str) -> None:
    case = draw(5, 7, 3, 17, groups=2)
    strange = case.mapped(lambda part: part.mT.contiguous().mT if part.ndim > 2 else part)
    assert difference(run(backend, strange), oracle(case)) < 1e-12
    leaves = strange.leaves()
    total = torch.autograd.grad(run(backend, leaves).sum(), leaves.tensors())  # its gradient repeats one number
    again = case.leaves()
    assert (
        worst_gradient(list(total), list(torch.autograd.grad(run("reference", again).sum(), again.tensors()))) < 1e-12
    )


@backends()
def test_gradients_are_those_that_are_asked_for(backend: str) -> None:
    case = draw(5, 7, 3, 17)
    full = gradients("reference", case)
    for index in range(len(full)):
        parts = [part.detach().clone().requires_grad_(k == index) for k, part in enumerate(case.tensors())]
        found = run(backend, case.rebuilt(parts))
        probe = torch.from_numpy(np.random.default_rng(0).normal(size=found.shape))
        (ours,) = torch.autograd.grad(found, parts[index], probe)
        assert difference(ours, full[index]) < 1e-12


@backends(reference=True)
def test_forcing_and_alpha_get_no_gradient(backend: str) -> None:
    case = draw(5, 7, 3, 17)
    assert case.forcing is not None
    assert isinstance(case.alpha, Tensor)
    forcing, alpha = case.forcing.clone().requires_grad_(), case.alpha.clone().requires_grad_()
    assert not run(backend, replace(case, forcing=forcing, alpha=alpha)).requires_grad
    leaves = replace(case.leaves(), forcing=forcing, alpha=alpha)
    run(backend, leaves).sum().backward()
    assert forcing.grad is None
    assert alpha.grad is None


@backends()
def test_hidden_activations_are_not_stored(backend: str) -> None:
    case = draw(4, 60, 2, 200, clipped=True).leaves()
    need(backend)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(backend, case)
    assert 0 < kept < 60 * 4 * 200 / 4


class _Largest(TorchDispatchMode):
    """Records the most numbers that one result holds."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(found) if isinstance(part, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@both
@pytest.mark.parametrize("stretch", [1, 6400, 1 << 20])
def test_the_backward_pass_works_in_stretches_of_time(
    clipped: bool, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_module, "_HIDDEN", stretch)
    case = draw(4, 37, 2, 200, clipped=clipped)
    assert worst_gradient(gradients("function", case), gradients("reference", case)) < 1e-12
    leaves = case.leaves()
    with _Largest() as seen:
        run("function", leaves).sum().backward()
    assert seen.numbers <= min(max(stretch, 4 * 200), 37 * 4 * 200)


@backends()
def test_a_second_derivative_is_refused(backend: str) -> None:
    case = draw(3, 4, 2, 5).leaves()
    with pytest.raises((ModelError, RuntimeError), match=r"second derivative|create_graph|once_differentiable"):
        first = torch.autograd.grad(run(backend, case).sin().sum(), case.z1, create_graph=True)[0]
        first.sum().backward()


# ---- 8.4 strengths of forcing


@both
@backends(reference=True)
def test_checklist_8_4_full_forcing_is_a_set_of_one_step_problems(backend: str, clipped: bool) -> None:
    case = replace(draw(5, 7, 3, 17, clipped=clipped), alpha=1.0)
    assert case.forcing is not None
    found, grads = run(backend, case), gradients(backend, case)
    leaves = case.leaves()
    assert leaves.inputs is not None
    starts = torch.cat([leaves.z1[None], case.forcing[:-1]])
    alone = shallow_map(starts, leaves.params, clipped) + leaves.inputs
    probe = torch.from_numpy(np.random.default_rng(0).normal(size=found.shape))
    assert difference(found, alone) < 1e-13
    assert worst_gradient(grads, list(torch.autograd.grad(alone, leaves.tensors(), probe))) < 1e-12


@both
@backends(reference=True, free=True)
def test_checklist_8_4_no_forcing_is_backpropagation_through_time(backend: str, clipped: bool) -> None:
    case = replace(draw(5, 7, 3, 17, clipped=clipped), alpha=0.0)
    found, grads = run(backend, case), gradients(backend, case)
    leaves = case.leaves()
    assert leaves.inputs is not None
    z, states = leaves.z1, []
    for push in leaves.inputs:
        z = shallow_map(z, leaves.params, clipped) + push
        states.append(z)
    unrolled = torch.stack(states)
    probe = torch.from_numpy(np.random.default_rng(0).normal(size=found.shape))
    expected = list(torch.autograd.grad(unrolled, leaves.tensors(), probe))
    assert difference(found, unrolled) < 1e-13
    assert worst_gradient(grads, expected) < 1e-12
    without = replace(case, forcing=None)
    assert difference(run(backend, without), unrolled) < 1e-13
    assert worst_gradient(gradients(backend, without), expected) < 1e-12


@backends(reference=True, free=True)
def test_checklist_8_4_sparse_forcing_reaches_from_full_to_none(backend: str) -> None:
    case = draw(5, 7, 3, 17)

    def sparse(interval: int) -> Case:
        # z_k of step k = 0.. is z_{k+2} of the paper, forced when its index less 1 is a multiple of the interval
        mask = ((torch.arange(7) + 1) % interval == 0).double()
        return replace(case, alpha=mask[:, None].expand(7, 3))

    for interval, alpha in ((1, 1.0), (8, 0.0)):
        constant = replace(case, alpha=alpha)
        assert difference(run(backend, sparse(interval)), run(backend, constant)) < 1e-14
        assert worst_gradient(gradients(backend, sparse(interval)), gradients(backend, constant)) < 1e-13
    assert difference(run(backend, sparse(3)), oracle(sparse(3))) < 1e-12
    assert difference(run(backend, sparse(3)), run(backend, sparse(1))) > 1e-2


# ---- 8.5 gradients through time


def through_time(backend: str, params: Shallow, forcing: Tensor, alpha: float, clipped: bool) -> tuple[float, Tensor]:
    """Return the norm of d z_{T-1} / d z_0 and the states; an input at step 0 moves z_0."""
    inputs = torch.zeros_like(forcing).requires_grad_()
    found = run(backend, Case(forcing[0], forcing, alpha, params, inputs, clipped))
    rows = [torch.autograd.grad(found[-1, 0, m], inputs, retain_graph=True)[0][0, 0] for m in range(found.shape[-1])]
    return float(torch.linalg.matrix_norm(torch.stack(rows), 2)), found.detach()


@both
@backends(reference=True)
def test_checklist_8_5_enough_forcing_bounds_the_gradient(backend: str, clipped: bool) -> None:
    rng = np.random.default_rng(0)
    forcing = torch.from_numpy(rng.normal(size=(1500, 1, 3)))
    drawn = draw(1, 1, 3, 20, clipped=clipped).params
    params = drawn._replace(A=torch.tensor([1.05, 0.9, -0.8], dtype=torch.float64), W1=drawn.W1, h2=3.0 * drawn.h2)
    bound = float(params.A.abs().max() + np.linalg.norm(params.W1, 2) * np.linalg.norm(params.W2, 2))
    assert through_time(backend, params, forcing, 1.0 - 1.0 / bound, clipped)[0] <= 1.0 + 1e-6
    # the bound over the forced states of the window, which depend on alpha: raise alpha until it is enough
    alpha = 0.0
    for _ in range(50):
        states = run("reference", Case(forcing[0], forcing, alpha, params, None, clipped))
        forced = ((1 - alpha) * states + alpha * forcing)[:-1, 0].numpy()
        sigma = float(np.linalg.norm(jacobians(params, forced, clipped), 2, axis=(-2, -1)).max())
        if alpha >= 1.0 - 1.0 / sigma:
            break
        alpha = 1.0 - 1.0 / sigma
    assert sigma > 1.0
    assert 0.0 < alpha < 1.0 - 1.0 / bound
    assert through_time(backend, params, forcing, alpha, clipped)[0] <= 1.0 + 1e-6


@backends(reference=True)
def test_checklist_8_5_the_bound_is_reached_by_a_linear_map(backend: str) -> None:
    drawn = draw(1, 1, 3, 5).params
    params = drawn._replace(A=torch.tensor([1.25, 1.0, 0.5], dtype=torch.float64), W1=torch.zeros_like(drawn.W1))
    forcing = torch.from_numpy(np.random.default_rng(0).normal(size=(1500, 1, 3)))
    assert through_time(backend, params, forcing, 1.0 - 1.0 / 1.25, False)[0] == pytest.approx(1.0, abs=1e-9)
    assert through_time(backend, params, forcing, 0.9 - 1.0 / 1.25, False)[0] > 1e10


@backends(reference=True, free=True)
def test_checklist_8_5_without_forcing_the_gradient_grows_with_the_lyapunov_exponent(backend: str) -> None:
    params, steps = lozi(), 1000
    start = torch.tensor([[0.1, 0.1]], dtype=torch.float64)
    forcing = free_run(start, params, steps, backend="reference")
    norm, _ = through_time(backend, params, forcing, 0.0, False)
    measured = np.log(norm) / (steps - 1)
    assert 0.47 / 2 < measured < 0.47 * 2  # published value of the exponent
    path = run("reference", Case(forcing[0], forcing, 0.0, params, None, False))[:-1, 0].numpy()
    tangent, growth = np.eye(2), 0.0
    for matrix in jacobians(params, path, False):
        tangent = matrix @ tangent
        size = np.linalg.norm(tangent, 2)
        tangent, growth = tangent / size, growth + np.log(size)
    assert measured == pytest.approx(growth / (steps - 1), rel=1e-9)


# ---- 8.12 missing entries


@grouped
@backends(reference=True)
def test_checklist_8_12_a_missing_entry_is_an_entry_without_forcing(backend: str, groups: int | None) -> None:
    case = draw(5, 9, 3, 17, groups=groups)
    assert case.forcing is not None
    assert isinstance(case.alpha, Tensor)
    holes = torch.from_numpy(np.random.default_rng(1).uniform(size=case.forcing.shape) < 0.3)
    masked = replace(case, alpha=torch.where(holes, 0.0, case.alpha))
    missing = replace(masked, forcing=torch.where(holes, torch.nan, case.forcing))
    found = run(backend, missing)
    assert bool(found.isfinite().all())
    assert difference(found, oracle(masked)) < 1e-12
    assert worst_gradient(gradients(backend, missing), gradients("reference", masked)) < 1e-12
    whole = replace(case, forcing=missing.forcing)  # alpha above 0 where the value is missing: not hidden
    assert backend == "newton" or bool(run(backend, whole).isnan().any())


@backends(reference=True)
def test_checklist_8_12_a_missing_stretch_is_a_free_run(backend: str) -> None:
    case = draw(5, 20, 3, 17, inputs=False)
    assert case.forcing is not None
    assert isinstance(case.alpha, Tensor)
    alpha, forcing = case.alpha.clone(), case.forcing.clone()
    alpha[8:], forcing[8:] = 0.0, torch.nan
    found = run(backend, replace(case, alpha=alpha, forcing=forcing))
    free = free_run(found[8], case.params, 11, backend="reference")
    assert difference(found[9:], free) < 1e-12


# ---- other maps and free runs


@grouped
def test_a_loop_over_any_map_is_the_same_recurrence(groups: int | None) -> None:
    case = draw(5, 7, 3, 17, groups=groups).leaves()
    found = gtf_loop(lambda z: shallow_map(z, case.params), case.z1, case.forcing, case.alpha, case.inputs)
    assert difference(found, oracle(case)) < 1e-12
    probe = torch.from_numpy(np.random.default_rng(0).normal(size=found.shape))
    grads = torch.autograd.grad(found, case.tensors(), probe)
    assert worst_gradient(gradients("function", case), list(grads)) < 1e-12


@both
@grouped
@backends(reference=True, free=True)
def test_a_free_run_keeps_every_few_states(backend: str, groups: int | None, clipped: bool) -> None:
    case = replace(draw(3, 11, 3, 17, groups=groups, clipped=clipped), forcing=None, alpha=0.0)
    expected = torch.from_numpy(oracle(case))
    for every in (1, 2, 5, 11):
        found = run_free(backend, case.leaves(), 11, every)
        assert not found.requires_grad
        kept = expected.unbind(-3)[every - 1 :: every]
        assert difference(found, torch.stack(kept, dim=-3)) < 1e-12
    alone = replace(case, inputs=None)
    assert difference(run_free(backend, alone, 4, 2), run_free("reference", alone, 4, 2)) < 1e-12


def test_a_free_run_by_a_kernel_for_forced_steps_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    case = draw(3, 50, 2, 5, groups=2)
    assert case.inputs is not None
    seen: list[int] = []

    def kernel(z1: Tensor, forcing: Any, alpha: Tensor, params: Shallow, inputs: Any, clipped: bool) -> Tensor:
        seen.append(alpha.shape[1])
        return function_module.gtf_function(z1, forcing, alpha, params, inputs, clipped)

    for every in (1, 3, 20):
        for inputs in (None, case.inputs):
            found = module._free_by_chunks(kernel, case.z1, case.params, 50, inputs, False, every)
            expected = free_run(case.z1, case.params, 50, inputs=inputs, every=every, backend="reference")
            assert difference(found, expected) < 1e-12
    assert max(seen) == 20


def test_zeros_over_time_give_the_number_of_steps() -> None:
    case = draw(3, 6, 2, 5, inputs=False)
    found = gtf_sequence(case.z1, None, torch.zeros(6, 2), case.params)
    assert difference(found, free_run(case.z1, case.params, 6)) < 1e-14


# ---- choice of the backend


def chosen(case: Case, backend: str = "auto", **options: Any) -> str:
    return module._choose(backend, *module._grouped(case.z1, case.params), **options)  # type: ignore[arg-type]


def test_auto_takes_the_kernel_but_for_large_products() -> None:
    need("compiled")
    assert chosen(draw(16, 1, 3, 50)) == "compiled"
    assert chosen(draw(16, 1, 64, 512)) == "compiled"
    assert chosen(draw(256, 1, 256, 1024)) == "function"


def test_auto_takes_torch_where_the_kernel_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert chosen(draw(16, 1, 3, 50)) == "function"
    with pytest.raises(ModelError, match="'compiled' of the PLRNN cannot run here: .*TSFORGE_COMPILED=off"):
        chosen(draw(16, 1, 3, 50), "compiled")


def test_a_backend_that_cannot_run_says_why() -> None:
    case = draw(3, 4, 2, 5)
    with pytest.raises(ModelError, match="did you mean 'function'"):
        run("functoin", case)
    with pytest.raises(ModelError, match="'triton' of the PLRNN cannot run here"):
        gtf_sequence(case.z1, case.forcing, case.alpha, case.params, backend="triton")
    with pytest.raises(ModelError, match="'newton' of the PLRNN needs"):
        free_run(case.z1, case.params, 4, backend="newton")
    with pytest.raises(ModelError, match="'newton' of the PLRNN needs"):
        gtf_sequence(case.z1, case.forcing, 0.0, case.params, backend="newton")


# ---- refusals


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = draw(3, 4, 2, 5)
    params = case.params
    assert case.forcing is not None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"z1": case.z1[0]}, "z1 .* needs shape"),
        ({"z1": case.z1[:0]}, "without empty axes"),
        ({"z1": case.z1.int()}, "float32 or float64"),
        ({"params": params._replace(A=params.A[:1])}, r"A of the PLRNN needs shape \(2,\)"),
        ({"params": params._replace(W1=params.W2)}, r"W1 of the PLRNN needs shape \(2, 5\)"),
        ({"params": params._replace(W2=params.W2.float())}, "W2 .*float64.*got.*float32"),
        ({"params": params._replace(h2=params.h2[:0])}, "at least one hidden unit"),
        ({"forcing": case.forcing[:, :2]}, "forcing .* needs shape"),
        ({"forcing": case.forcing[:0], "inputs": None, "alpha": 0.1}, "at least one step"),
        ({"inputs": case.forcing[:3]}, "inputs .* needs shape"),
        ({"alpha": torch.zeros(3)}, r"alpha .* shapes \(\), \(2,\), \(4, 2\), \(4, 3, 2\), got \(3,\)"),
        ({"alpha": 1.5}, r"\[0, 1\], got values from 1.5"),
        ({"alpha": -0.1}, r"\[0, 1\]"),
        ({"alpha": float("nan")}, r"\[0, 1\]"),
        ({"forcing": None, "alpha": 0.1}, "but no forcing"),
        ({"forcing": None, "alpha": 0.0, "inputs": None}, "number of steps is open"),
    ]
    for change, message in changes:
        with pytest.raises(ModelError, match=message):
            run("function", replace(case, **change))
    with pytest.raises(ModelError, match="z1 .* needs shape"):
        gtf_loop(lambda z: z, case.z1[0], case.forcing, 0.1)


def test_free_runs_that_keep_nothing_are_refused() -> None:
    case = draw(3, 4, 2, 5)
    for steps, every in ((0, 1), (4, 0), (4, 5)):
        with pytest.raises(ModelError, match="1 <= every <= steps"):
            free_run(case.z1, case.params, steps, every=every)
    with pytest.raises(ModelError, match="inputs .* needs shape"):
        free_run(case.z1, case.params, 3, inputs=case.inputs)
