"""Diagonal systems: kernels, scans, steps and irregular steps against complex arithmetic and loops in NumPy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiler import need_compiler
from scipy.linalg import expm
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import _vandermonde_compiled
from tsforge.ops.vandermonde import (
    Complex,
    b_like,
    chunked_scan,
    diagonal_scan_reference,
    diagonal_step,
    elapsed_scan,
    last_output,
    multiply,
    powers,
    two_level_kernel,
    vandermonde_kernel,
    vandermonde_kernel_reference,
)

System = tuple[Complex, Complex, Complex]
"""Logarithm of a, b, c."""
Kernel = Callable[[Complex, Complex, int], Tensor]


@pytest.fixture(params=["compiled", "plain torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The kernel as a CPU with a compiler gets it and as one without does."""
    monkeypatch.setenv("TSFORGE_COMPILED", "auto" if request.param == "compiled" else "off")
    if request.param == "compiled":
        need_compiler()
    reason = _vandermonde_compiled.unavailable(torch.zeros(1))
    assert (reason is None) == (request.param == "compiled"), reason
    return vandermonde_kernel


def pair(values: np.ndarray) -> Complex:
    return torch.from_numpy(values.real.copy()), torch.from_numpy(values.imag.copy())


def complex_of(parts: Complex) -> np.ndarray:
    return parts[0].detach().double().numpy() + 1j * parts[1].detach().double().numpy()


def random_system(features: int, modes: int, channels: int = 1, seed: int = 0) -> System:
    """A system in float64 whose modes keep between 80 % and 99.9 % a step and turn by up to half a cycle."""
    rng = np.random.default_rng(seed)
    log_a = np.log(rng.uniform(0.8, 0.999, (features, modes))) + 1j * rng.uniform(-math.pi, math.pi, (features, modes))
    b = rng.normal(size=(features, modes)) + 1j * rng.normal(size=(features, modes))
    c = rng.normal(size=(channels, features, modes)) + 1j * rng.normal(size=(channels, features, modes))
    return pair(log_a), pair(b), pair(c)


def slow_system(features: int, states: int, decay: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of a [H, n] and weight [1, H, n] of an S4D layer with step sizes from 1e-3 to 1e-1."""
    modes = np.arange(states // 2)
    turn = math.pi * modes if kind == "lin" else states / math.pi * (states / (2 * modes + 1) - 1)
    z = np.geomspace(1e-3, 1e-1, features)[:, None] * (-decay + 1j * turn)
    rng = np.random.default_rng(states)
    c = rng.normal(size=(1, features, states // 2)) + 1j * rng.normal(size=(1, features, states // 2))
    return z, c * np.expm1(z) / (-decay + 1j * turn)


def naive(log_a: np.ndarray, weight: np.ndarray, length: int) -> np.ndarray:
    """Return the kernel [M, H, L] from the complex exponentials of all lags, one feature after another."""
    steps = np.arange(length)
    rows = [2.0 * (weight[:, h] @ np.exp(log_a[h][:, None] * steps)).real for h in range(len(log_a))]
    return np.stack(rows, axis=1)


def worst_row(found: Tensor, expected: np.ndarray) -> float:
    error = np.abs(found.detach().double().numpy() - expected).max(-1)
    return float((error / np.abs(expected).max(-1)).max())


def simulate(system: System, u: Tensor, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs [B, M, H, L] and the last state [B, H, n] of x = a x + b u, y = 2 Re(c x)."""
    log_a, b, c = (complex_of(part) for part in system)
    x = np.zeros((len(u), *b.shape), dtype=complex) if state is None else state
    outputs = []
    for k in range(u.shape[-1]):
        x = np.exp(log_a) * x + b * u[:, :, k].double().numpy()[..., None]
        outputs.append(2.0 * np.einsum("mhn,bhn->bmh", c, x).real)
    return np.stack(outputs, axis=-1), x


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def stored(state: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([state.real, state.imag], axis=-1))


def test_multiply_is_the_complex_product() -> None:
    first, second = pair(drawn(5).numpy() + 1j * drawn(5, seed=1).numpy()), pair(drawn(5, seed=2).numpy() + 0.5j)
    np.testing.assert_allclose(complex_of(multiply(first, second)), complex_of(first) * complex_of(second), atol=1e-15)


@pytest.mark.parametrize(("count", "stride"), [(1, 1), (2, 5), (3, 1), (16, 16), (37, 7)])
def test_powers_equal_numpy(count: int, stride: int) -> None:
    log_a = random_system(3, 4)[0]
    expected = np.exp(complex_of(log_a)[:, None] * (stride * np.arange(count))[None, :, None])
    found = complex_of(powers(log_a, count, torch.float64, stride=stride))
    assert found.shape == (3, count, 4)
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_float32_powers_keep_the_phase_of_far_lags() -> None:
    """A turn of 3 a step reaches a phase of 50 000: a product in float32 would be off by several thousandths."""
    log_a = (torch.full((1, 1), -1e-6, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64))
    expected = np.exp(complex_of(log_a)[:, None] * np.arange(16384)[None, :, None])
    for found in (powers(log_a, 16384, torch.float32), powers(log_a, 1024, torch.float32, stride=16)):
        assert found[0].dtype == found[1].dtype == torch.float32
        assert np.abs(complex_of(found) - expected[:, :: 16384 // found[0].shape[1]]).max() < 5e-7


@pytest.mark.parametrize("length", [1, 2, 3, 17, 100, 336, 337, 1000])
def test_checklist_11_two_levels_equal_the_naive_sum_in_float64(kernel: Kernel, length: int) -> None:
    log_a, b, c = random_system(4, 6, channels=2, seed=length)
    weight = multiply(c, b)
    found = kernel(log_a, weight, length)
    assert found.shape == (2, 4, length)
    assert found.is_contiguous()
    assert worst_row(found, naive(complex_of(log_a), complex_of(weight), length)) < 1e-12


@pytest.mark.parametrize("decay", [0.5, 0.02])
@pytest.mark.parametrize("kind", ["lin", "inv"])
def test_checklist_11_float32_kernel_of_a_slow_system_over_16384_steps(kernel: Kernel, kind: str, decay: float) -> None:
    log_a, weight = slow_system(8, 64, decay, kind)
    low: Complex = tuple(part.float() for part in pair(weight))  # type: ignore[assignment]
    found = kernel(pair(log_a), low, 16384)
    assert found.dtype == torch.float32
    assert worst_row(found, naive(log_a, weight, 16384)) < 1e-6


def test_the_slow_reference_is_the_same_kernel() -> None:
    log_a, b, c = random_system(2, 3, channels=2)
    weight = multiply(c, b)
    found = vandermonde_kernel_reference(log_a, weight, 50)
    assert worst_row(found, naive(complex_of(log_a), complex_of(weight), 50)) < 1e-13


@pytest.mark.parametrize("function", [vandermonde_kernel, two_level_kernel])
def test_a_kernel_needs_a_step(function: Kernel) -> None:
    log_a, b, c = random_system(1, 1)
    with pytest.raises(ModelError, match="at least one step, asked for 0"):
        function(log_a, multiply(c, b), 0)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    log_a, weight = slow_system(61, 64, 0.5, "lin")
    found = []
    for count in (1, 3):
        monkeypatch.setattr(_vandermonde_compiled.compiled, "threads", lambda count=count: count)
        inputs = [part.requires_grad_() for part in (*pair(log_a), *pair(weight))]
        assert _vandermonde_compiled._sizes(inputs[2], 4000)[-1] == count
        result = vandermonde_kernel((inputs[0], inputs[1]), (inputs[2], inputs[3]), 4000)
        found.append([result, *torch.autograd.grad(result.square().sum(), inputs)])
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_last_output_is_the_last_of_the_convolution() -> None:
    kernel, u = drawn(2, 3, 20), drawn(4, 3, 20, seed=1)
    expected = [[[np.convolve(u[b, h], kernel[m, h])[19] for h in range(3)] for m in range(2)] for b in range(4)]
    np.testing.assert_allclose(last_output(kernel, u).numpy(), expected, atol=1e-13)


def test_step_and_loop_equal_numpy() -> None:
    system, u = random_system(3, 4, channels=2), drawn(2, 3, 30)
    rng = np.random.default_rng(3)
    start = rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4))
    log_a, b, c = system
    a = pair(np.exp(complex_of(log_a)))
    for given in (None, start):
        outputs, last = simulate(system, u, given)
        y, state = diagonal_scan_reference(a, b, c, u, None if given is None else stored(given))
        np.testing.assert_allclose(y.numpy(), outputs, atol=1e-12)
        np.testing.assert_allclose(state.numpy(), stored(last).numpy(), atol=1e-12)
    y, state = diagonal_step(a, b, c, u[..., 0], stored(start))
    outputs, last = simulate(system, u[..., :1], start)
    np.testing.assert_allclose(y.numpy(), outputs[..., 0], atol=1e-13)
    np.testing.assert_allclose(state.numpy(), stored(last).numpy(), atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 1, 5, 8, 200])
@pytest.mark.parametrize("length", [1, 7, 8, 64, 65, 150])
def test_chunks_equal_the_loop_from_any_state(length: int, chunk: int | None) -> None:
    system, u = random_system(2, 3, channels=2, seed=length), drawn(2, 2, length)
    rng = np.random.default_rng(length)
    start = rng.normal(size=(2, 2, 3)) + 1j * rng.normal(size=(2, 2, 3))
    for given in (None, start):
        outputs, last = simulate(system, u, given)
        y, state = chunked_scan(*system, u, None if given is None else stored(given), chunk=chunk)
        assert y.shape == (2, 2, 2, length)
        np.testing.assert_allclose(y.numpy(), outputs, atol=1e-11)
        np.testing.assert_allclose(state.numpy(), stored(last).numpy(), atol=1e-11)


def test_checklist_12_convolution_with_the_kernel_equals_the_loop() -> None:
    """L is no multiple of the block (100 is 12.5 blocks of 8), several channels."""
    system, u = random_system(3, 4, channels=3), drawn(2, 3, 100)
    log_a, b, c = system
    kernel = vandermonde_kernel(log_a, multiply(c, b), 100).numpy()
    expected, _ = simulate(system, u)
    found = [[[np.convolve(u[s, h], kernel[m, h])[:100] for h in range(3)] for m in range(3)] for s in range(2)]
    np.testing.assert_allclose(found, expected, atol=1e-11)


# ---- gradients


def leaves(*pairs: Complex) -> list[Tensor]:
    return [part.clone().requires_grad_() for parts in pairs for part in parts]


@pytest.mark.parametrize(("count", "stride"), [(1, 1), (7, 1), (5, 3)])
def test_checklist_13_gradcheck_of_powers(count: int, stride: int) -> None:
    inputs = leaves(random_system(2, 2)[0])
    assert torch.autograd.gradcheck(lambda re, im: powers((re, im), count, torch.float64, stride=stride), inputs)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_checklist_13_gradcheck_of_the_kernel(kernel: Kernel, length: int) -> None:
    log_a, _, c = random_system(2, 2, channels=2)
    assert torch.autograd.gradcheck(lambda a, b, w, v: kernel((a, b), (w, v), length), leaves(log_a, c))


@pytest.mark.parametrize("with_state", [False, True])
def test_checklist_13_gradcheck_of_chunks(with_state: bool) -> None:
    log_a, b, c = random_system(2, 2, channels=2)
    inputs = [*leaves(log_a, b, c), drawn(1, 2, 7).requires_grad_()]
    if with_state:
        inputs.append(drawn(1, 2, 2, 2, seed=1).requires_grad_())

    def scan(*parts: Tensor) -> tuple[Tensor, Tensor]:
        a, d, b, e, c, f, u = parts[:7]
        return chunked_scan((a, d), (b, e), (c, f), u, parts[7] if with_state else None, chunk=3)

    assert torch.autograd.gradcheck(scan, inputs)


def test_checklist_13_gradcheck_of_irregular_steps() -> None:
    z, g, c = continuous(2, 2)
    span = torch.tensor([[1.0, 0.0, 2.5, 1.0]], dtype=torch.float64)
    inputs = [*leaves(z, g, c), drawn(1, 2, 4).requires_grad_(), drawn(1, 2, 2, 2, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d, e, f, u, x: elapsed_scan(((a, b), (c, d)), (e, f), u, span, x), inputs
    )


def by_autograd(log_a: Complex, weight: Complex, probe: Tensor) -> list[Tensor]:
    """Return the gradients that autograd derives from the plain sum over modes in complex128."""
    inputs = [part.detach().double().requires_grad_() for part in (*log_a, *weight)]
    steps = torch.arange(probe.shape[-1])
    table = torch.exp(torch.complex(inputs[0], inputs[1]).unsqueeze(-1) * steps)  # [H, n, L]
    kernel = 2.0 * torch.einsum("mhn,hnl->mhl", torch.complex(inputs[2], inputs[3]), table).real
    return list(torch.autograd.grad((kernel * probe.double()).sum(), inputs))


@pytest.mark.parametrize("length", [17, 1000, 4096])
@pytest.mark.parametrize("decay", [0.5, 0.02])
@pytest.mark.parametrize("kind", ["lin", "inv"])
def test_checklist_13_float32_gradients_equal_autograd_of_the_plain_sum(
    kernel: Kernel, kind: str, decay: float, length: int
) -> None:
    """From the same float32 weights; largest error relative to the largest entry of each gradient."""
    log_a, exact = slow_system(4, 16, decay, kind)
    weight = [part.float() for part in pair(exact)]
    probe = drawn(1, 4, length).float()
    inputs = [part.requires_grad_() for part in (*pair(log_a), *weight)]
    found = kernel((inputs[0], inputs[1]), (inputs[2], inputs[3]), length)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad((found * probe).sum(), inputs)
    expected = by_autograd((inputs[0], inputs[1]), (inputs[2], inputs[3]), probe)
    for low, truth in zip(gradients, expected, strict=True):
        assert float((low.double() - truth).abs().max() / truth.abs().max()) < 1e-6


# ---- steps of their own length


def continuous(features: int, modes: int, channels: int = 1, seed: int = 0) -> System:
    """dt times the eigenvalues, dt times B, and C; the first mode stands still (the series near 0)."""
    rng = np.random.default_rng(seed)
    z = -rng.uniform(0.01, 0.3, (features, modes)) + 1j * rng.uniform(-1.5, 1.5, (features, modes))
    z[:, 0] = -1e-5
    g = rng.normal(size=(features, modes)) + 1j * rng.normal(size=(features, modes))
    c = rng.normal(size=(channels, features, modes)) + 1j * rng.normal(size=(channels, features, modes))
    return pair(z), pair(g), pair(c)


def by_expm(system: System, u: np.ndarray, spans: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One feature and sequence: hold each input for its span, by the matrix exponential of [[A, B], [0, 0]].

    The state is [Re x, Im x], with a real matrix [[Re z, -Im z], [Im z, Re z]] for every mode.
    """
    z, g, c = (complex_of(part) for part in system)
    modes = z.shape[-1]
    block = np.zeros((2 * modes + 1, 2 * modes + 1))
    block[:modes, :modes] = block[modes:-1, modes:-1] = np.diag(z[0].real)
    block[:modes, modes:-1] = -np.diag(z[0].imag)
    block[modes:-1, :modes] = np.diag(z[0].imag)
    block[:-1, -1] = np.concatenate([g[0].real, g[0].imag])
    readout = 2.0 * np.concatenate([c[0, 0].real, -c[0, 0].imag])
    x, outputs = np.concatenate([start.real, start.imag]), []
    for value, span in zip(u, spans, strict=True):
        x = (expm(span * block) @ np.append(x, value))[:-1]
        outputs.append(readout @ x)
    return np.array(outputs), x


def test_irregular_steps_equal_the_matrix_exponential() -> None:
    system = continuous(1, 4)
    u = drawn(2, 1, 40)
    rng = np.random.default_rng(1)
    spans = rng.choice([0.0, 0.25, 1.0, 2.0, 17.5], size=(2, 40))
    start = rng.normal(size=(2, 4)) + 1j * rng.normal(size=(2, 4))
    y, state = elapsed_scan(system[:2], system[2], u, torch.from_numpy(spans), stored(start[:, None]))
    for row in range(2):
        outputs, last = by_expm(system, u[row, 0].numpy(), spans[row], start[row])
        np.testing.assert_allclose(y[row, 0, 0].numpy(), outputs, atol=1e-11)
        np.testing.assert_allclose(state[row, 0].numpy().T.reshape(-1), last, atol=1e-11)


def held(system: System) -> System:
    """Zero-order hold over one step, in NumPy."""
    z, g, c = system
    return z, pair(complex_of(g) * np.expm1(complex_of(z)) / complex_of(z)), c


def test_irregular_steps_of_one_are_regular_steps() -> None:
    system, u = continuous(3, 4, channels=2), drawn(2, 3, 60)
    y, state = elapsed_scan(system[:2], system[2], u, torch.ones(2, 60, dtype=torch.float64))
    outputs, last = simulate(held(system), u)
    np.testing.assert_allclose(y.numpy(), outputs, atol=1e-10)
    np.testing.assert_allclose(state.numpy(), stored(last).numpy(), atol=1e-10)


def test_a_step_of_g_is_g_steps_with_the_input_held() -> None:
    system, u = continuous(3, 4), drawn(1, 3, 20)
    spans = np.random.default_rng(2).integers(1, 9, size=20)
    y, state = elapsed_scan(system[:2], system[2], u, torch.from_numpy(spans).double()[None])
    outputs, last = simulate(held(system), u.repeat_interleave(torch.from_numpy(spans), dim=-1))
    np.testing.assert_allclose(y.numpy(), outputs[..., np.cumsum(spans) - 1], atol=1e-10)
    np.testing.assert_allclose(state.numpy(), stored(last).numpy(), atol=1e-10)


def test_a_step_of_no_time_leaves_the_state_alone() -> None:
    system = continuous(2, 3)
    start = drawn(2, 2, 3, 2)
    u = drawn(2, 2, 5, seed=1)
    spans = torch.tensor([[0.0] * 5, [0.0, 0.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    _, state = elapsed_scan(system[:2], system[2], u, spans, start)
    assert torch.equal(state[0], start[0])
    _, later = elapsed_scan(system[:2], system[2], u[1:, :, 2:], spans[1:, 2:], start[1:])
    assert torch.equal(state[1], later[0])


def test_trailing_axes_are_added_to_both_parts() -> None:
    b = random_system(2, 3)[1]
    widened = b_like(b, 2)
    assert [tuple(part.shape) for part in widened] == [(2, 3, 1, 1)] * 2
    assert torch.equal(widened[1].flatten(), b[1].flatten())


@pytest.mark.slow
def test_checklist_25_two_levels_are_20_times_faster_than_the_naive_kernel() -> None:
    log_a, weight = slow_system(128, 64, 0.5, "lin")
    inputs = pair(log_a), tuple(part.float() for part in pair(weight))
    best = {"two levels": math.inf, "naive": math.inf}
    for _ in range(5):
        for name, kernel in (("two levels", vandermonde_kernel), ("naive", vandermonde_kernel_reference)):
            began = time.perf_counter()
            kernel(*inputs, 4096)  # type: ignore[arg-type]
            best[name] = min(best[name], time.perf_counter() - began)
    assert best["naive"] > 20.0 * best["two levels"], best
