"""The Triton kernels of diagonal systems against float64 sums and against the torch path's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICES, INTERPRETING, run_in_interpreter

from tsforge.layers.ssm import DiagonalSSM
from tsforge.ops import _vandermonde_triton
from tsforge.ops._vandermonde_triton import triton_kernel, unavailable
from tsforge.ops.vandermonde import two_level_kernel, vandermonde_kernel, vandermonde_kernel_reference


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def system(channels: int, features: int, modes: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Log a in float64 and weights in float32, of slow modes that turn."""
    generator = torch.Generator().manual_seed(channels + features)
    dt = torch.logspace(-3, -1, features, dtype=torch.float64)[:, None]
    logs = [(-0.5 * dt).expand(features, modes).clone(), dt * math.pi * torch.arange(modes)]
    weights = [torch.randn(channels, features, modes, generator=generator) for _ in range(2)]
    return [part.to(device).requires_grad_() for part in logs], [part.to(device).requires_grad_() for part in weights]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


SIZES = [(1, 3, 32, 200), (2, 2, 5, 64), (1, 2, 3, 1), (1, 1, 32, 1500)]


@pytest.mark.parametrize("sizes", SIZES)
def test_checklist_11_kernel_equals_the_naive_sum(device: str, sizes: tuple[int, int, int, int]) -> None:
    logs, weights = system(*sizes[:3], device)
    assert unavailable(weights[0]) is None
    found = vandermonde_kernel((logs[0], logs[1]), (weights[0], weights[1]), sizes[3])
    high = [part.detach().double() for part in weights]
    expected = vandermonde_kernel_reference((logs[0].detach(), logs[1].detach()), (high[0], high[1]), sizes[3])
    for channel in range(sizes[0]):
        assert relative(found[channel], expected[channel]) < 1e-6


@pytest.mark.parametrize("sizes", SIZES)
def test_checklist_13_gradients_equal_those_of_the_torch_path(device: str, sizes: tuple[int, int, int, int]) -> None:
    logs, weights = system(*sizes[:3], device)
    probe = torch.randn(sizes[0], sizes[1], sizes[3], generator=torch.Generator().manual_seed(9)).to(device)
    found = torch.autograd.grad(triton_kernel(*logs, *weights, sizes[3]), [*logs, *weights], probe)
    high = [part.detach().double().requires_grad_() for part in weights]
    truth = two_level_kernel((logs[0], logs[1]), (high[0], high[1]), sizes[3])
    expected = torch.autograd.grad(truth, [*logs, *high], probe.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 3e-6 * float(theirs.abs().max())


@pytest.mark.parametrize(("copies", "init", "rate"), [(3, "lin", 1.0), (1, "legs", 2.0), (6, "real", 0.5)])
def test_s4d_from_its_parameters_equals_the_layer(
    device: str, copies: int, init: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discretisation and its chain rule, with parameters at and beyond their clamps and a mode that nearly stands."""
    torch.manual_seed(0)
    layer = DiagonalSSM(6, 8, 2, init=init, copies=copies).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.B.add_(torch.randn_like(layer.B))
        layer.log_decay[0, :3] = torch.tensor([-13.0, -11.0, 9.0])
        layer.log_dt[:2] = torch.tensor([0.5, -13.0])
        layer.frequency[0, 1] = 1e-6
    parameters = [layer.log_dt, layer.log_decay, layer.frequency, layer.B, layer.C]
    probe = torch.randn(2, 6, 70, generator=torch.Generator().manual_seed(3)).to(device)
    results = []
    for reason in (None, "switched off"):
        monkeypatch.setattr(_vandermonde_triton, "unavailable", lambda weight, reason=reason: reason)
        kernel = layer.make_kernel(70, rate)
        results.append([kernel, *torch.autograd.grad(kernel, parameters, probe)])
    for name, ours, theirs in zip(("kernel", "log dt", "log decay", "frequency", "B", "C"), *results, strict=True):
        assert bool(((ours == 0.0) == (theirs == 0.0)).all()), name  # clamped parameters have no gradient
        assert relative(ours, theirs) < 2e-5, name


def test_what_it_cannot_take_is_said() -> None:
    weight = torch.zeros(1, 1, 1)
    if not INTERPRETING:
        assert "on cpu" in str(unavailable(weight))
    assert unavailable(weight.double()) is not None


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_kernels_in_the_interpreter() -> None:
    run_in_interpreter(__file__, "not slow")
