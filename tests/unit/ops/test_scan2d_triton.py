"""The Triton scan against the cell-by-cell reference: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICES, INTERPRETING, PORTIONS, run_in_interpreter

from tsforge.core.errors import ModelError
from tsforge.ops._scan2d_triton import scan2d_triton, unavailable
from tsforge.ops.scan2d import scan2d

Args = tuple[Any, ...]
SMALL_TILES = ((2, 1), (4, 1))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def random_args(
    shape: tuple[int, int, int, int, int, int], device: str, *, is_complex: bool = False, edges: bool = False
) -> Args:
    """x, dt, A, B, C, left, top in float64 for (b, N, T, D, S, G); steps in [1e-4, 10], signed A2, A3."""
    b, n, t, d, s, g = shape
    rng = torch.Generator().manual_seed(sum(shape) + 100 * is_complex + 200 * edges)

    def normal(*size: int) -> Tensor:
        drawn = torch.randn(*size, 2 if is_complex else 1, generator=rng, dtype=torch.float64)
        return torch.view_as_complex(drawn) if is_complex else drawn[..., 0]

    def steps() -> Tensor:
        return 10.0 ** (torch.rand(b, n, t, d, generator=rng, dtype=torch.float64) * 5.0 - 4.0)

    def decay() -> Tensor:
        size = -torch.exp(0.5 * torch.randn(d, s, generator=rng, dtype=torch.float64))
        return torch.complex(size, normal(d, s).imag * 3.0) if is_complex else size

    own, own_back = decay(), decay()
    cross, cross_back = own.real * torch.tanh(normal(d, s)), own_back.real * torch.tanh(normal(d, s))
    x = torch.randn(b, n, t, d, generator=rng, dtype=torch.float64)
    maps = [tuple(normal(b, n, t, g, s) for _ in range(2)) for _ in range(2)]
    left = tuple(normal(b, n, d, s) for _ in range(2)) if edges else None
    top = tuple(normal(b, t, d, s) for _ in range(2)) if edges else None
    args = (x, (steps(), steps()), (own, cross, cross_back, own_back), *maps, left, top)
    return each(args, lambda part: part.to(device))


def each(args: Args, change: Any) -> Args:
    return tuple(
        None if part is None else tuple(change(one) for one in part) if isinstance(part, tuple) else change(part)
        for part in args
    )


def narrow(part: Tensor) -> Tensor:
    return part.to(torch.complex64 if part.is_complex() else torch.float32)


def flat(args: Args) -> list[Tensor]:
    return [one for part in args if part is not None for one in (part if isinstance(part, tuple) else (part,))]


def reference(x: Tensor, dt: Any, A: Any, B: Any, C: Any, left: Any, top: Any) -> tuple[Tensor, ...]:
    y, right = scan2d(x, dt, A, B, C, left=left, top=top, backend="reference")
    return y, *right


def with_gradients(scan: Any, args: Args) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a weighted sum of all of them with respect to every tensor given."""
    args = each(args, lambda part: part.detach().clone().requires_grad_())
    outputs = scan(*args)
    rng = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for part in outputs:
        weights = torch.randn(*part.shape, 2, generator=rng, dtype=torch.float64).to(part.device)
        total = total + (part.real * weights[..., 0]).sum()
        if part.is_complex():
            total = total + (part.imag * weights[..., 1]).sum()
    return [part.detach() for part in outputs], list(torch.autograd.grad(total, flat(args)))


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor where that is above 1."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


CASES = [
    pytest.param((1, 2, 5, 5, 3, 1), False, False, id="time longer", marks=pytest.mark.slow),
    pytest.param((2, 4, 2, 3, 2, 1), False, True, id="variates longer, edges"),
    pytest.param((1, 3, 4, 3, 3, 1), True, True, id="complex, edges"),
    pytest.param((1, 4, 3, 3, 2, 1), True, False, id="complex, variates longer", marks=pytest.mark.slow),
    pytest.param((1, 2, 3, 6, 2, 2), False, True, id="groups", marks=pytest.mark.slow),
    pytest.param((1, 3, 2, 6, 3, 3), True, True, id="complex groups"),
    pytest.param((2, 1, 4, 2, 1, 1), False, True, id="one variate, one state"),
    pytest.param((1, 3, 1, 2, 4, 1), True, True, id="one step"),
    pytest.param((1, 1, 1, 3, 3, 1), False, False, id="one cell"),
]


@pytest.mark.parametrize(("shape", "is_complex", "edges"), CASES)
def test_checklist_5_1_and_5_2_values_and_gradients_are_those_of_the_reference(
    device: str, shape: tuple[int, int, int, int, int, int], is_complex: bool, edges: bool
) -> None:
    args = random_args(shape, device, is_complex=is_complex, edges=edges)
    values, gradients = with_gradients(lambda *a: scan2d_triton(*a, tiles=SMALL_TILES), args)
    expected, expected_gradients = with_gradients(reference, args)
    assert gap(values, expected) <= 1e-12
    assert gap(gradients, expected_gradients) <= 1e-11


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_checklist_5_1_float32(device: str, is_complex: bool) -> None:
    args = random_args((1, 3, 7, 3, 4, 1), device, is_complex=is_complex, edges=True)
    with torch.no_grad():
        found = scan2d_triton(*each(args, narrow))
        expected = reference(*args)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert float((a.to(b.dtype) - b).abs().max() / b.abs().max()) <= 2e-6


def test_checklist_5_2_intervals_of_kept_states_do_not_matter(device: str) -> None:
    args = random_args((1, 2, 5, 2, 2, 1), device, edges=True)
    expected, expected_gradients = with_gradients(scan2d_triton, args)
    for every in (1, 2, 5):
        values, gradients = with_gradients(lambda *a, every=every: scan2d_triton(*a, every=every), args)
        assert gap(values, expected) <= 1e-12
        assert gap(gradients, expected_gradients) <= 1e-12


def test_tiles_change_rounding_only_and_runs_repeat_bitwise(device: str) -> None:
    args = random_args((1, 2, 2, 3, 2, 1), device, is_complex=True)
    first = with_gradients(scan2d_triton, args)
    again = with_gradients(scan2d_triton, args)
    assert all(torch.equal(a, b) for p, q in zip(first, again, strict=True) for a, b in zip(p, q, strict=True))
    for tiles in (((1, 1), (1, 1)), ((8, 2), (8, 2))):
        values, gradients = with_gradients(lambda *a, tiles=tiles: scan2d_triton(*a, tiles=tiles), args)
        assert gap(values, first[0]) <= 1e-13
        assert gap(gradients, first[1]) <= 1e-12


def test_checklist_5_4_small_and_large_steps(device: str) -> None:
    """g at dt A = -1e-6 to 1e-5 in float32; dt = 0 passes the states on; dt = 1e3 ends in the steady state."""
    x = torch.ones(1, 1, 1, 1, device=device)
    a, none, one = torch.full((1, 1), -1.0, device=device), torch.zeros(1, 1, device=device), x.unsqueeze(-1)
    for dt, expected in ((1e-6, 1e-6 - 0.5e-12), (0.0, 0.0), (1e3, 1.0), (0.49, 0.387373606), (0.51, 0.399504413)):
        step = torch.full_like(x, dt)
        y, h1, _ = scan2d_triton(x, (step, step), (a, none, none, a), (one, one), (one, one * 0.0), None, None)
        assert float(y) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert float(h1) == float(y)


def test_inputs_that_are_views_are_read_by_their_strides(device: str) -> None:
    args = random_args((2, 2, 3, 3, 2, 1), device, is_complex=True)
    turned = each(args, lambda part: part.transpose(0, -1).contiguous().transpose(0, -1))
    turned = (*turned[:3], tuple(part.conj().resolve_conj().conj() for part in turned[3]), *turned[4:])
    with torch.no_grad():
        expected = scan2d_triton(*args)
        found = scan2d_triton(*turned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_asking_for_what_cannot_run_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = random_args((1, 1, 2, 1, 1, 1), "cpu")
    assert "on cpu" in str(unavailable(args[0], args[2]))
    with pytest.raises(ModelError, match="on cpu"):
        scan2d_triton(*args)
    assert "float16" in str(unavailable(args[0].half(), args[2]))
    assert "float32" in str(unavailable(args[0], each(args[2], narrow)))


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
@pytest.mark.parametrize("portion", PORTIONS)
def test_kernels_in_the_interpreter(portion: str) -> None:
    run_in_interpreter(__file__, portion)
