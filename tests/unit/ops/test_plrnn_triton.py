"""The Triton kernel of the forced PLRNN against a plain loop: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import plrnn_cases
import pytest
import torch
from plrnn_cases import Arguments, loop
from torch import Tensor
from triton_interpreter import DEVICES, INTERPRETING, PORTIONS, run_in_interpreter

from tsforge.core.errors import ModelError
from tsforge.ops import _plrnn_triton as module
from tsforge.ops._plrnn_triton import Tile, default_tile, gtf_triton, unavailable
from tsforge.ops.plrnn import Shallow

Sizes = tuple[int, int, int, int, int]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def draw(sizes: Sizes, device: str = "cpu", *, forced: bool = True, pushed: bool = True) -> Arguments:
    """Return the arguments in float64 for (G, B, T, M, H); where alpha is 0 the forcing is NaN."""
    groups, *rest = sizes
    z1, forcing, alpha, params, inputs = plrnn_cases.draw(*rest, groups=groups, inputs=pushed).arguments()
    assert forcing is not None
    if not forced:
        return on((z1, None, torch.zeros_like(alpha), params, inputs), device)
    return on((z1, torch.where(alpha == 0, torch.nan, forcing), alpha, params, inputs), device)


def on(args: Arguments, target: Any) -> Arguments:
    """Move to a device or a dtype."""
    z1, forcing, alpha, params, inputs = args
    moved = [None if part is None else part.to(target) for part in (forcing, inputs)]
    return z1.to(target), moved[0], alpha.to(target), Shallow(*(part.to(target) for part in params)), moved[1]


def with_gradients(run: Any, args: Arguments, clipped: bool, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The states, and gradients of a weighted sum of them: of z1, A, W1, W2, h1, h2 and of the inputs if any."""
    z1, forcing, alpha, params, inputs = args
    leaves = [part.detach().clone().requires_grad_() for part in (z1, *params)]
    pushes = None if inputs is None else inputs.detach().clone().requires_grad_()
    found = run(leaves[0], forcing, alpha, Shallow(*leaves[1:]), pushes, clipped, **options)
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(found.shape, generator=rng, dtype=torch.float64).to(found)
    wanted = leaves if pushes is None else [*leaves, pushes]
    return found.detach(), list(torch.autograd.grad((found * weights).sum(), wanted))


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor where that is above 1."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


def agree(args: Arguments, clipped: bool, tolerance: float = 1e-12, **options: Any) -> None:
    found, gradients = with_gradients(gtf_triton, args, clipped, **options)
    expected, expected_gradients = with_gradients(loop, args, clipped)
    assert gap([found], [expected]) <= tolerance
    assert gap(gradients, expected_gradients) <= tolerance


SHAPES = [
    pytest.param((1, 1, 1, 1, 1), id="one of everything"),
    pytest.param((2, 3, 3, 3, 50), id="Lorenz"),
    pytest.param((3, 2, 4, 5, 17), id="odd sizes"),
    pytest.param((1, 5, 3, 17, 33), id="just above powers of 2"),
]


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_checklist_8_3_states_and_gradients_are_those_of_the_loop(device: str, sizes: Sizes, clipped: bool) -> None:
    agree(draw(sizes, device), clipped)


def tile(samples: int, hidden: int, *, resident: bool = True, accumulate: bool = False, warps: int = 1) -> Tile:
    return Tile(samples=samples, hidden=hidden, warps=warps, resident=resident, accumulate=accumulate)


@pytest.mark.parametrize(
    "clipped", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="clipped")]
)
@pytest.mark.parametrize(
    "tiles",
    [
        pytest.param((tile(2, 16), tile(4, 16, accumulate=True)), id="small: gradients in registers"),
        pytest.param((tile(4, 16, warps=2), tile(2, 16)), id="middle: products afterwards"),
        pytest.param((tile(2, 4, resident=False), tile(1, 8, resident=False)), id="large: tiles of hidden units"),
    ],
)
def test_checklist_8_3_every_regime_and_tile_gives_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch, tiles: tuple[Tile, Tile], clipped: bool
) -> None:
    """Five samples and 13 hidden units fill no tile; the products go over time in stretches of 2 steps."""
    monkeypatch.setattr(module, "_STRETCH", 2 * 2 * 5 * 13)
    agree(draw((2, 5, 3, 3, 13), device), clipped, tiles=tiles)
    agree(draw((2, 5, 1, 3, 13), device, pushed=False), clipped, tiles=tiles)


def test_default_tiles_cover_the_regimes() -> None:
    small, middle, large, double = (
        default_tile((20, 16, latent, hidden), itemsize, backward=True)
        for latent, hidden, itemsize in ((3, 50, 4), (32, 512, 4), (64, 512, 4), (16, 512, 8))
    )
    assert (small.resident, small.accumulate, small.hidden, small.warps) == (True, True, 64, 1)
    assert (middle.resident, middle.accumulate) == (True, False)
    assert (large.resident, large.accumulate) == (False, False)
    assert large.samples * large.hidden * 64 <= 8192
    assert (double.resident, double.accumulate) == (True, False)
    assert not default_tile((20, 16, 3, 50), 4, backward=False).accumulate
    assert default_tile((20, 4096, 3, 50), 4, backward=False).samples > 1
    assert not default_tile((64, 65536, 5, 250), 4, backward=True).accumulate  # too many partial gradients


@pytest.mark.parametrize(("latent", "hidden"), [(3, 12), (2, 5)])
def test_the_defaults_of_a_large_map_run(
    device: str, monkeypatch: pytest.MonkeyPatch, latent: int, hidden: int
) -> None:
    """The bounds are lowered, so that a small map passes for a large one."""
    monkeypatch.setattr(module, "_RESIDENT", 8)
    monkeypatch.setattr(module, "_STREAMED", 64)
    assert not default_tile((1, 5, latent, hidden), 8, backward=True).resident
    agree(draw((1, 5, 3, latent, hidden), device), True)


def test_checklist_8_3_float32(device: str) -> None:
    args = draw((1, 3, 12, 4, 20), device)
    found, gradients = with_gradients(gtf_triton, on(args, torch.float32), True)
    expected, expected_gradients = with_gradients(loop, args, True)
    assert found.dtype == torch.float32
    assert gap([found.double()], [expected]) <= 1e-6
    assert gap([part.double() for part in gradients], expected_gradients) <= 1e-5


def test_checklist_8_3_constant_alpha_and_any_strides_equal_full_arrays(device: str) -> None:
    z1, forcing, alpha, params, inputs = draw((2, 3, 4, 3, 6), device)
    assert forcing is not None
    assert inputs is not None
    for shape in ((2, 1, 1, 1), (2, 4, 1, 3)):
        view = alpha[: shape[0], : shape[1], : shape[2], : shape[3]].clamp(min=0.1).expand(2, 4, 3, 3)
        signals = forcing.nan_to_num()
        turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (signals, inputs)]
        expected = with_gradients(gtf_triton, (z1, signals, view.contiguous(), params, inputs), True)
        found = with_gradients(gtf_triton, (z1, turned[0], view, params, turned[1]), True)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    sliced = params._replace(W1=params.W1.mT.contiguous().mT, W2=params.W2.mT.contiguous().mT)
    again = with_gradients(gtf_triton, (z1, signals, view, sliced, inputs), True)
    assert torch.equal(again[0], expected[0])


def test_checklist_8_4_extremes_of_alpha(device: str) -> None:
    """Without forcing it is a free run, as with alpha = 0; with alpha = 1 every step starts from the data."""
    agree(draw((2, 3, 4, 3, 6), device, forced=False), True)
    z1, forcing, alpha, params, inputs = draw((2, 3, 4, 3, 6), device)
    assert forcing is not None
    free = gtf_triton(z1, None, torch.zeros_like(alpha), params, inputs, True)
    assert torch.equal(
        gtf_triton(z1, torch.full_like(forcing, torch.nan), torch.zeros_like(alpha), params, inputs, True), free
    )
    signals = forcing.nan_to_num()
    found, gradients = with_gradients(gtf_triton, (z1, signals, torch.ones_like(alpha), params, inputs), True)
    starts = torch.cat([z1[:, None], signals[:, :-1]], dim=1)
    assert inputs is not None
    single = [loop(starts[:, k], None, alpha[:, :1], params, inputs[:, k : k + 1], True) for k in range(4)]
    assert gap([found], [torch.cat(single, dim=1)]) <= 1e-13
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    assert torch.equal(gradients[-1], weights)  # no gradient through time


def test_a_nan_in_the_parameters_shows_and_runs_repeat_bitwise(device: str) -> None:
    args = draw((1, 3, 3, 3, 6), device)
    first, again = (with_gradients(gtf_triton, args, True) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    for name in ("W2", "h2"):
        spoilt = args[3]._replace(**{name: torch.full_like(getattr(args[3], name), torch.nan)})
        assert bool(gtf_triton(*args[:3], spoilt, args[4], False).isnan().all())


@pytest.mark.parametrize("accumulate", [True, False])
def test_only_gradients_asked_for_are_given(device: str, accumulate: bool) -> None:
    z1, forcing, alpha, params, inputs = draw((1, 2, 3, 2, 4), device)
    _, expected = with_gradients(gtf_triton, (z1, forcing, alpha, params, inputs), True)
    tiles = (tile(1, 4), tile(1, 4, accumulate=accumulate))
    rng = torch.Generator().manual_seed(1)
    for place, leaf in ((0, z1), (3, params.W2), (6, inputs)):
        assert leaf is not None
        leaf.requires_grad_()
        found = gtf_triton(z1, forcing, alpha, params, inputs, True, tiles=tiles)
        weights = torch.randn(found.shape, generator=rng.manual_seed(1), dtype=torch.float64).to(device)
        (gradient,) = torch.autograd.grad((found * weights).sum(), leaf)
        assert gap([gradient], [expected[place]]) <= 1e-13
        leaf.requires_grad_(False)


def test_asking_for_what_cannot_run_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z1, forcing, alpha, params, inputs = draw((1, 1, 2, 1, 1))
    assert "on cpu" in str(unavailable(z1, params))
    with pytest.raises(ModelError, match="on cpu"):
        gtf_triton(z1, forcing, alpha, params, inputs, True)
    assert "float16" in str(unavailable(z1.half(), params))
    assert "float32" in str(unavailable(z1, on((z1, None, alpha, params, None), torch.float32)[3]))
    assert "5000 latent" in str(unavailable(z1.expand(1, 1, 5000), params))


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
@pytest.mark.parametrize("portion", PORTIONS)
def test_kernels_in_the_interpreter(portion: str) -> None:
    run_in_interpreter(__file__, portion)
