"""State space layers: their three ways to run agree, and each equals its definition in NumPy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from ssm_layer_cases import KINDS, build, drawn, gap, looped
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.layers.ssm import SSM, DiagonalSSM, LowRankSSM, StructuredSSM, UnitarySSM

CASES = [
    *[(kind, 1, 1) for kind in KINDS],
    ("zoh", 2, 2),
    ("bilinear", 3, 4),
    ("lru", 2, 1),
    ("s4", 2, 2),
    ("lssl", 2, 4),
]
"""Kind, channels M, copies of (A, B)."""


def moved(layer: SSM, u: Tensor, steps: int = 3) -> SSM:
    """Return the layer after some optimiser steps towards noise."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        y = layer(u)[0]
        (y - drawn(*y.shape, seed=step, dtype=y.dtype)).square().mean().backward()
        optimizer.step()
    return layer


# ---- definitions, in NumPy


def full(half: np.ndarray) -> np.ndarray:
    """Return the modes of both members of each conjugate pair along the last axis."""
    return np.concatenate([half, half.conj()], axis=-1)


def numbers(part: Tensor) -> np.ndarray:
    values = part.detach().double().numpy()
    return values[..., 0] + 1j * values[..., 1]


def continuous(layer: SSM) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A [H, N, N], B [H, N], C [M, H, N] with y = Re(C x), from the parameters and the definitions alone."""
    names = dict(layer.named_parameters()) | dict(layer.named_buffers())
    p = {name: value.detach().double().numpy() for name, value in names.items()}
    each = layer.features // max(len(p.get("log_decay", p.get("left"))), 1)
    if isinstance(layer, StructuredSSM):
        left, right = np.log1p(np.exp(p["left"])), np.log1p(np.exp(p["right"]))
        matrices = [
            -np.diag(left[i]) @ (np.diag(p["shift"][i]) + np.linalg.inv(_tridiagonal(p, i))) @ np.diag(right[i])
            for i in range(len(left))
        ]
        return np.repeat(matrices, each, axis=0), np.repeat(left * p["b"], each, axis=0), p["C"]
    eigenvalues = full(-np.exp(p["log_decay"]) + 1j * p["frequency"])
    A = np.stack([np.diag(row) for row in eigenvalues])
    if isinstance(layer, LowRankSSM):
        for low_rank in full(numbers(layer.P)):
            A = A - low_rank[:, :, None] * low_rank[:, None, :].conj()
    A, B = np.repeat(A, each, axis=0), np.repeat(full(numbers(layer.B)), each, axis=0)  # type: ignore[arg-type]
    return A, B, full(numbers(layer.C))  # type: ignore[arg-type]


def _tridiagonal(p: dict[str, np.ndarray], copy: int) -> np.ndarray:
    return np.diag(p["tri_diagonal"][copy]) + np.diag(p["tri_upper"][copy], 1) + np.diag(p["tri_lower"][copy], -1)


def discrete(layer: SSM, rate: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    A, B, C = continuous(layer)
    steps = np.exp(layer.log_dt.detach().double().numpy()) * rate
    if isinstance(layer, UnitarySSM):  # the eigenvalues are logarithms of the discrete ones
        return np.stack([np.diag(np.exp(np.diag(a))) for a in A]), B, C
    pairs = []
    for a, b, dt in zip(A, B, steps, strict=True):
        eye = np.eye(len(a))
        if isinstance(layer, DiagonalSSM) and layer.discretisation == "zoh":
            grown = np.zeros((len(a) + 1, len(a) + 1), dtype=complex)
            grown[:-1, :-1], grown[:-1, -1] = dt * a, dt * b
            power = expm(grown)
            pairs.append((power[:-1, :-1], power[:-1, -1]))
        else:
            alpha = getattr(layer, "alpha", 0.5)
            left = np.linalg.inv(eye - alpha * dt * a)
            pairs.append((left @ (eye + (1 - alpha) * dt * a), dt * left @ b))
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]), C


def simulate(layer: SSM, u: Tensor, rate: float = 1.0) -> Tensor:
    """Return outputs [B, M, H, L] of x = A x + B u, y = Re(C x) + D u, step after step."""
    A, B, C = discrete(layer, rate)
    inputs = u.double().numpy()
    x = np.zeros((len(u), *B.shape), dtype=complex)
    outputs = []
    for k in range(u.shape[-1]):
        x = np.einsum("hij,bhj->bhi", A, x) + B * inputs[:, :, k, None]
        outputs.append(np.einsum("mhn,bhn->bmh", C, x).real + layer.D.detach().double().numpy() * inputs[:, None, :, k])
    return torch.from_numpy(np.stack(outputs, axis=-1))


@pytest.mark.parametrize(("kind", "channels", "copies"), CASES)
def test_a_layer_is_its_definition(kind: str, channels: int, copies: int) -> None:
    layer = build(kind, channels=channels, copies=copies).double()
    u = drawn(2, 4, 60)
    assert gap(layer(u)[0], simulate(layer, u)) < 1e-11


@pytest.mark.parametrize("init", ["legs", "lagt", "legt"])
@pytest.mark.parametrize("kind", ["s4", "lssl"])
def test_every_hippo_start_is_its_definition(kind: str, init: str) -> None:
    layer = build(kind, init=init).double()
    u = drawn(1, 4, 60)
    assert gap(layer(u)[0], simulate(layer, u)) < 1e-11


def test_backward_euler_is_its_definition() -> None:
    layer = build("lssl", alpha=1.0).double()
    u = drawn(1, 4, 60)
    assert gap(layer(u)[0], simulate(layer, u)) < 1e-11
    assert gap(build("lssl").double()(u)[0], simulate(layer, u)) > 1e-3


@pytest.mark.parametrize("init", ["inv", "lin"])
@pytest.mark.parametrize("decay", [0.5, 0.02])
def test_checklist_11_float32_kernel_over_16384_steps(init: str, decay: float) -> None:
    """The worst row against the naive sum in complex128, from the same float32 parameters."""
    layer = build("zoh", features=8, states=64, init=init, dt_range=(1e-3, 1e-1), bandlimit=0.0).eval()
    with torch.no_grad():
        layer.log_decay.fill_(math.log(decay))  # type: ignore[operator]
        found = layer.kernel(16384)[0].double().numpy()
    lam = -np.exp(layer.log_decay.detach().double().numpy()[0]) + 1j * layer.frequency.detach().double().numpy()[0]  # type: ignore[operator]
    for h, dt in enumerate(np.exp(layer.log_dt.detach().double().numpy())):
        weight = numbers(layer.C)[0, h] * numbers(layer.B)[0] * np.expm1(dt * lam) / lam  # type: ignore[arg-type]
        expected = 2.0 * (weight @ np.exp((dt * lam)[:, None] * np.arange(16384))).real
        assert np.abs(found[h] - expected).max() < 1e-6 * np.abs(expected).max()


# ---- three ways to run


def check_modes(layer: SSM, u: Tensor, tolerance: float) -> None:
    """Assert that convolution, scan, scan in two parts, steps and the last output agree."""
    whole, none = layer(u)
    assert none is None
    scanned, state = layer(u, with_state=True)
    stepped, after = looped(layer, u, layer.default_state(len(u)))
    assert gap(scanned, whole) < tolerance
    assert gap(stepped, whole) < tolerance
    assert gap(after, state) < tolerance
    assert gap(layer.last(u), whole[..., -1]) < tolerance
    cut = u.shape[-1] // 3
    if cut:
        head, carried = layer(u[..., :cut], layer.default_state(len(u)))
        tail, end = layer(u[..., cut:], carried)
        assert gap(torch.cat([head, tail], dim=-1), whole) < tolerance
        assert gap(end, state) < tolerance


@pytest.mark.parametrize("length", [1, 2, 100])
@pytest.mark.parametrize(("kind", "channels", "copies"), CASES)
def test_checklist_14_convolution_scan_and_steps_agree(kind: str, channels: int, copies: int, length: int) -> None:
    layer = build(kind, channels=channels, copies=copies).double()
    check_modes(layer, drawn(2, 4, min(length, 37)), 1e-11)
    with torch.no_grad():
        check_modes(layer.eval(), drawn(3, 4, length, seed=1), 1e-11)


@pytest.mark.parametrize(("kind", "channels", "copies"), CASES)
def test_checklist_14_in_float32_after_training(kind: str, channels: int, copies: int) -> None:
    u = drawn(2, 4, 200, dtype=torch.float32)
    layer = build(kind, states=16, channels=channels, copies=copies)
    before = layer(u)[0].detach()
    moved(layer, u)
    assert gap(layer(u)[0], before) > 1e-3
    check_modes(layer, u[..., :40], 1e-5)
    with torch.no_grad():
        check_modes(layer.eval(), u, 1e-5)


@pytest.mark.parametrize(("kind", "channels", "copies"), CASES)
def test_checklist_14_in_float64_after_training_and_a_round_trip(kind: str, channels: int, copies: int) -> None:
    u = drawn(2, 4, 60)
    layer = moved(build(kind, channels=channels, copies=copies).double(), u)
    other = build(kind, channels=channels, copies=copies, seed=99).double().eval()
    with torch.no_grad():
        assert gap(other(u)[0], layer(u)[0]) > 1e-2  # and what it derived is cached now
        looped(other, u, other.default_state(2))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(u)[0], layer.eval()(u)[0])
        check_modes(layer, u, 1e-11)
        check_modes(other, u, 1e-11)


@pytest.mark.parametrize(("kind", "channels", "copies"), CASES)
def test_checklist_12_shapes(kind: str, channels: int, copies: int) -> None:
    layer = build(kind, features=4, states=6, channels=channels, copies=copies)
    state = layer.default_state(3)
    assert state.shape[0] == 3
    assert not state.any()
    for length in (1, 5, 130):
        u = torch.ones(3, 4, length)
        assert layer.kernel(length).shape == (channels, 4, length)
        y, after = layer(u, state)
        assert y.shape == layer(u)[0].shape == (3, channels, 4, length)
        assert after.shape == state.shape
        assert layer.last(u).shape == (3, channels, 4)
    y, after = layer.step(u[..., 0], state)
    assert y.shape == (3, channels, 4)
    assert after.shape == state.shape


def test_checklist_12_copies_are_shared_by_neighbouring_features() -> None:
    """Features 0 and 1 read the first (A, B), 2 and 3 the second."""
    for kind in ("zoh", "s4"):
        layer = build(kind, copies=2).double()
        before = layer.kernel(30).detach()
        with torch.no_grad():
            layer.log_decay[1] += 1.0  # type: ignore[index]
        changed = (layer.kernel(30).detach() - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checklist_16_a_layer_is_causal(kind: str, with_state: bool) -> None:
    layer, u = build(kind, channels=2).double(), drawn(1, 4, 90).requires_grad_()
    y = layer(u, with_state=with_state)[0]
    for t in (0, 40, 88):
        changed = u.detach().clone()
        changed[..., t + 1 :] += 10.0 * drawn(1, 4, 89 - t, seed=t)
        other = layer(changed, with_state=with_state)[0]
        assert float((other - y).detach()[..., : t + 1].abs().max()) < 1e-12 * 10
        assert float((other - y).detach()[..., t + 1 :].abs().min(dim=-1).values.max()) > 1e-3
        (gradient,) = torch.autograd.grad(y[..., t].sum(), u, retain_graph=True)
        assert float(gradient[..., t + 1 :].abs().max()) < 1e-12
        assert float(gradient[..., t].abs().min()) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_checklist_17_linear_and_time_invariant(kind: str) -> None:
    layer = build(kind, channels=2).double()
    u, v = drawn(1, 4, 80), drawn(1, 4, 80, seed=1)
    assert gap(layer(2.0 * u - 3.0 * v)[0], 2.0 * layer(u)[0] - 3.0 * layer(v)[0]) < 1e-12
    late = torch.nn.functional.pad(u, (7, 0))
    assert gap(layer(late)[0][..., 7:], layer(u)[0]) < 1e-12
    impulse = torch.zeros(1, 4, 80, dtype=torch.float64)
    impulse[..., 0] = 1.0
    expected = layer.kernel(80).detach().clone()
    expected[..., 0] += layer.D.detach()
    assert gap(layer(impulse)[0][0], expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_checklist_17_a_shorter_kernel_is_the_start_of_a_longer_one(kind: str) -> None:
    layer = build(kind, channels=2).double()
    long = layer.kernel(700)
    for length in (1, 2, 63, 64, 65, 336):
        assert gap(layer.kernel(length), long[..., :length]) < 1e-12


# ---- sampling rate


def test_checklist_19_zoh_kernel_at_half_the_frequency_is_pairwise_sums() -> None:
    layer = build("zoh", channels=2, states=16, dt_range=(1e-3, 1e-1), bandlimit=0.0).double()
    fine = layer.kernel(400)
    assert gap(layer.kernel(200, rate=2.0), fine[..., ::2] + fine[..., 1::2]) < 1e-12


def test_checklist_19_held_inputs_at_half_the_frequency() -> None:
    layer, u = build("zoh", channels=2).double(), drawn(2, 4, 60)
    fine = layer(u.repeat_interleave(2, dim=-1))[0]
    for coarse in (
        layer(u, rate=2.0)[0],
        layer(u, rate=2.0, with_state=True)[0],
        looped(layer, u, layer.default_state(2), rate=2.0)[0],
    ):
        assert gap(coarse, fine[..., 1::2]) < 1e-11
    assert gap(layer.last(u, rate=2.0), fine[..., -1]) < 1e-11
    assert gap(layer(u)[0], fine[..., 1::2]) > 1e-2


@pytest.mark.parametrize("kind", ["bilinear", "s4", "lssl"])
def test_checklist_19_bilinear_layers_warn(kind: str) -> None:
    layer = build(kind, states=16).double()
    fine = layer.kernel(400)
    with pytest.warns(UserWarning, match="layer tested: a bilinear kernel at rate 2 is only approximate"):
        coarse = layer.kernel(200, rate=2.0)
    assert gap(coarse, fine[..., ::2] + fine[..., 1::2]) > 1e-6
    u = drawn(1, 4, 30)
    with pytest.warns(UserWarning, match="only approximate"):
        y = layer(u, rate=2.0)[0]
    assert gap(y, simulate(layer, u, rate=2.0)) < 1e-11


def test_checklist_19_a_linear_recurrent_unit_has_no_rate() -> None:
    layer = build("lru")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.kernel(10)
    for run in (
        lambda: layer.kernel(10, rate=2.0),
        lambda: layer(torch.ones(1, 4, 5), rate=0.5),
        lambda: layer.step(torch.ones(1, 4), layer.default_state(1), rate=2.0),
    ):
        with pytest.raises(ModelError, match="layer tested has no step size.*kernel s4d"):
            run()


def test_irregular_steps_of_one_are_the_regular_layer() -> None:
    layer, u = build("zoh", channels=2, copies=2).double(), drawn(2, 4, 50)
    y, state = layer.irregular(u, torch.ones(2, 50, dtype=torch.float64))
    expected, after = layer(u, with_state=True)
    assert gap(y, expected) < 1e-11
    assert gap(state, after) < 1e-11


def test_an_irregular_step_holds_its_input() -> None:
    layer, u = build("zoh", channels=2).double(), drawn(1, 4, 20)
    spans = torch.from_numpy(np.random.default_rng(0).integers(1, 6, size=20))
    y, state = layer.irregular(u, spans.double()[None])
    expected, after = layer(u.repeat_interleave(spans, dim=-1), with_state=True)
    assert gap(y, expected[..., spans.cumsum(0) - 1]) < 1e-11
    assert gap(state, after) < 1e-11
    _, same = layer.irregular(u, torch.zeros(1, 20), state)
    assert torch.equal(same, state)


@pytest.mark.parametrize("kind", ["bilinear", "lru", "s4", "lssl"])
def test_irregular_steps_are_refused_where_a_step_is_fixed(kind: str) -> None:
    layer = build(kind)
    assert not layer.takes_elapsed
    with pytest.raises(ModelError, match="layer tested has a fixed step.*s4d with zero-order hold"):
        layer.irregular(torch.ones(1, 4, 3), torch.ones(1, 3))
