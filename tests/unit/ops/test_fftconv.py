"""Causal convolution by FFT against NumPy, its gradients against autograd, and the choice of transform lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.fftconv import causal_convolution, causal_convolution_reference, fft_length

SHAPES = [(2, 1, 3, 1, 1), (2, 1, 3, 17, 17), (3, 2, 2, 40, 40), (1, 1, 1, 9, 30), (2, 3, 2, 50, 7)]
"""Batch, channels, features, steps, taps."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def by_numpy(u: Tensor, kernel: Tensor) -> np.ndarray:
    """Return the convolution of every pair of rows by ``numpy.convolve``, which sums directly."""
    length = u.shape[-1]
    return np.array(
        [
            [
                [np.convolve(one.numpy(), tap.numpy())[:length] for one, tap in zip(rows, taps, strict=True)]
                for taps in kernel
            ]
            for rows in u
        ]
    )


def plain(u: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution as an expression whose gradient autograd derives."""
    size = 2 * (u.shape[-1] + kernel.shape[-1])
    product = torch.fft.rfft(u, n=size).unsqueeze(1) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(product, n=size)[..., : u.shape[-1]]


@pytest.mark.parametrize(("batch", "channels", "features", "steps", "taps"), SHAPES)
def test_convolution_equals_numpy(batch: int, channels: int, features: int, steps: int, taps: int) -> None:
    u, kernel = drawn(batch, features, steps), drawn(channels, features, taps, seed=1)
    expected = by_numpy(u, kernel)
    for keeps in (None, True, False):
        found = causal_convolution(u, kernel, keeps_spectra=keeps)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-13 * (1 + taps))
    np.testing.assert_allclose(causal_convolution_reference(u, kernel).numpy(), expected, atol=1e-13 * (1 + taps))


def test_convolution_does_not_wrap_around() -> None:
    """An impulse in the last step times a long kernel must not come back at the first ones."""
    u = torch.zeros(1, 1, 64, dtype=torch.float64)
    u[..., -1] = 1.0
    y = causal_convolution(u, torch.full((1, 1, 64), 1e6, dtype=torch.float64))
    assert float(y[..., :-1].abs().max()) < 1e-9
    assert float(y[0, 0, 0, -1]) == pytest.approx(1e6)


def test_float32_is_accurate_over_a_long_context() -> None:
    u, kernel = drawn(2, 2, 4000), drawn(1, 2, 4000, seed=1)
    expected = plain(u, kernel)
    found = causal_convolution(u.float(), kernel.float())
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("channels", "steps", "taps"), [(1, 6, 6), (2, 5, 8), (2, 7, 3)])
def test_checklist_13_gradcheck_of_the_convolution(channels: int, steps: int, taps: int, keeps: bool) -> None:
    u = drawn(2, 2, steps).requires_grad_()
    kernel = drawn(channels, 2, taps, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: causal_convolution(a, b, keeps_spectra=keeps), (u, kernel))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_checklist_13_gradient_equals_autograd_in_float32(channels: int, keeps: bool) -> None:
    u, kernel = drawn(4, 3, 336, dtype=torch.float32), drawn(channels, 3, 336, seed=1, dtype=torch.float32)
    weight = drawn(4, channels, 3, 336, seed=2, dtype=torch.float32)
    found, expected = [], []
    for convolve, gradients, dtype in (
        (lambda a, b: causal_convolution(a, b, keeps_spectra=keeps), found, torch.float32),
        (plain, expected, torch.float64),  # of the same numbers
    ):
        a, b = (part.to(dtype).clone().requires_grad_() for part in (u, kernel))
        (convolve(a, b) * weight.to(dtype)).sum().backward()
        gradients += [a.grad, b.grad]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).abs().max() / other.abs().max()) < 1e-6


def test_only_the_gradient_asked_for_is_made() -> None:
    u, kernel = drawn(2, 1, 8), drawn(1, 1, 8, seed=1)
    causal_convolution(u.requires_grad_(), kernel).sum().backward()
    assert u.grad is not None
    assert kernel.grad is None
    u = u.detach()
    causal_convolution(u, kernel.requires_grad_()).sum().backward()
    assert u.grad is None
    assert kernel.grad is not None


@pytest.mark.parametrize("keeps", [True, False])
def test_a_second_derivative_is_refused_rather_than_wrong(keeps: bool) -> None:
    """The spectra that the backward pass keeps are no part of the graph: d2y / du dk would come out as 0."""
    u, kernel = drawn(1, 1, 4).requires_grad_(), drawn(1, 1, 4, seed=1).requires_grad_()
    for total in (
        causal_convolution(u, kernel, keeps_spectra=keeps).square().sum(),
        causal_convolution(u, kernel, keeps_spectra=keeps).sum(),  # the incoming gradient has no graph of its own
    ):
        with pytest.raises(ModelError, match="no second derivative"):
            torch.autograd.grad(total, u, create_graph=True)


def test_checklist_25_fft_lengths_are_even_smooth_and_tight() -> None:
    for least in range(1, 20_001):
        size = fft_length(least)
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1, f"{size} for {least} has a factor above 7"
        assert size % 8 == 0, f"{size} for {least} is no multiple of 8"
        assert least <= size <= max(8, 1 << (least - 1).bit_length()), f"{size} for {least}"


@pytest.mark.parametrize(
    ("least", "size"), [(1, 8), (8, 8), (9, 16), (671, 672), (1343, 1344), (2047, 2048), (337, 360)]
)
def test_fft_lengths_by_hand(least: int, size: int) -> None:
    assert fft_length(least) == size
