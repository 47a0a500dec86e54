"""State space layers: their three ways to run agree, and each equals its definition in NumPy."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.ssm import (
    SSM,
    DiagonalSSM,
    LowRankSSM,
    StructuredSSM,
    UnitarySSM,
    diagonal_init,
    timescales,
)

KINDS = ("zoh", "bilinear", "lru", "s4", "lssl")
CASES = [
    *[(kind, 1, 1) for kind in KINDS],
    ("zoh", 2, 2),
    ("bilinear", 3, 4),
    ("lru", 2, 1),
    ("s4", 2, 2),
    ("lssl", 2, 4),
]
"""Kind, channels M, copies of (A, B)."""


def build(
    kind: str, *, features: int = 4, states: int = 8, channels: int = 1, copies: int = 1, seed: int = 0, **settings: Any
) -> SSM:
    torch.manual_seed(seed)
    size = (features, states, channels)
    dt_range = settings.pop("dt_range", (0.01, 0.1))
    if kind == "lru":
        return UnitarySSM(*size, name="tested", **settings)
    if kind == "s4":
        return LowRankSSM(*size, name="tested", dt_range=dt_range, copies=copies, **settings)
    if kind == "lssl":
        return StructuredSSM(*size, name="tested", dt_range=dt_range, shares_a=copies == 1, **settings)
    return DiagonalSSM(*size, name="tested", dt_range=dt_range, copies=copies, discretisation=kind, **settings)  # type: ignore[arg-type]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def looped(layer: SSM, u: Tensor, state: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    outputs = []
    for value in u.unbind(-1):
        y, state = layer.step(value, state, **settings)
        outputs.append(y)
    return torch.stack(outputs, dim=-1), state


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


# ---- numbers that go wrong


@pytest.mark.parametrize("kind", ["zoh", "bilinear", "s4", "lssl"])
def test_checklist_22_step_sizes_at_both_clamps_stay_finite(kind: str) -> None:
    u, target = drawn(2, 4, 32, dtype=torch.float32), drawn(2, 1, 4, 32, seed=1, dtype=torch.float32)
    layer = build(kind)
    clamps = torch.tensor([math.log(1e-5), 0.0, -40.0, 5.0])  # both ends, and beyond them
    with torch.no_grad():
        layer.log_dt.copy_(clamps)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, fused=True)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(u)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert all(bool(torch.isfinite(part).all()) for part in layer.parameters())
    dt = layer.dt(1.0).detach()
    assert 1e-5 * (1 - 1e-9) <= float(dt.min()) <= float(dt.max()) <= 1.0
    stepped, _ = looped(layer, u, layer.default_state(2))
    assert bool(torch.isfinite(stepped).all())


def test_checklist_22_decays_beyond_the_clamps_stay_finite() -> None:
    for kind in ("zoh", "s4"):
        layer = build(kind)
        with torch.no_grad():
            layer.log_decay[0, 0], layer.log_decay[0, 1] = 1000.0, -1000.0  # type: ignore[index]
        y = layer(torch.ones(1, 4, 50))[0]
        assert bool(torch.isfinite(y).all())
        y.sum().backward()
        assert all(bool(torch.isfinite(part.grad).all()) for part in layer.parameters() if part.grad is not None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checklist_22_a_broken_parameter_names_the_layer(kind: str, training: bool) -> None:
    layer = build(kind).train(training)
    broken = "frequency" if hasattr(layer, "frequency") else "tri_upper"
    with torch.no_grad():
        getattr(layer, broken)[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layer tested.*dt"):
        layer(torch.ones(1, 4, 20))
    with pytest.raises(ModelError, match=r"layer tested"):
        layer.last(torch.ones(1, 4, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_parameter_stops_a_stream(kind: str) -> None:
    layer = build(kind).eval()
    state = layer.default_state(1)
    with torch.no_grad():
        layer.step(torch.ones(1, 4), state)
        layer.C.view(-1)[0] = torch.nan
        with pytest.raises(ModelError, match=r"system of layer tested is not finite"):
            layer.step(torch.ones(1, 4), state)
        with pytest.raises(ModelError, match=r"system of layer tested is not finite"):
            layer(torch.ones(1, 4, 5), state)


def test_checklist_22_the_message_gives_the_ranges() -> None:
    layer = build("zoh", dt_range=(0.02, 0.02))
    with torch.no_grad():
        layer.C[0, 0, 0, 0] = torch.inf  # type: ignore[index]
    with pytest.raises(ModelError, match=r"dt 0.02 to 0.02, Re A -0.5 to -0.5.*lower the learning rate"):
        layer.kernel(20)


def test_an_unstable_structured_layer_is_refused_when_evaluated() -> None:
    layer = build("lssl")
    stable = layer.eval().kernel(50)
    assert bool(torch.isfinite(stable).all())
    with torch.no_grad():
        layer.shift.sub_(1.0)  # type: ignore[operator]
    u = torch.ones(1, 4, 50)
    assert bool(torch.isfinite(layer.train()(u)[0]).all())
    layer.eval()
    for run in (lambda: layer.kernel(50), lambda: layer(u), lambda: layer.last(u)):
        with pytest.raises(ModelError, match=r"layer tested has become unstable.*within 50 steps.*trains_a=false"):
            run()


@pytest.mark.parametrize("kind", KINDS)
def test_checklist_24_autocast_changes_nothing(kind: str) -> None:
    layer, u = build(kind, channels=2), drawn(2, 4, 70, dtype=torch.float32)
    state = layer.default_state(2)
    runs = {
        "forward": lambda: layer(u)[0],
        "scan": lambda: layer(u, state)[0],
        "last": lambda: layer.last(u),
        "step": lambda: layer.step(u[..., 0], state)[0],
    }
    if layer.takes_elapsed:
        runs["irregular"] = lambda: layer.irregular(u, torch.full((2, 70), 1.5))[0]
    for name, run in runs.items():
        expected = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert (u[0] @ u[0].T).dtype == torch.bfloat16  # it is on here
            found = run()
        assert found.dtype == torch.float32, name
        assert torch.equal(found, expected), name
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(u.bfloat16())[0]
    assert low.dtype == torch.float32
    assert torch.equal(low, layer(u.bfloat16().float())[0])


# ---- what is kept while evaluating


def kept(layer: SSM, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel and the outputs of steps, both from the cache."""
    return layer.kernel(u.shape[-1]), looped(layer, u, layer.default_state(len(u)))[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_evaluating_derives_once_and_notices_every_change(kind: str) -> None:
    layer, u = build(kind).eval(), drawn(1, 4, 20, dtype=torch.float32)
    first = layer.kernel(20)
    assert layer.kernel(20) is first
    assert layer.kernel(19) is not first
    before = kept(layer, u)
    layer.C.mul_(2.0)  # type: ignore[operator]
    doubled = kept(layer, u)
    assert gap(doubled[0], 2.0 * before[0]) < 1e-6
    assert gap(doubled[1], before[1]) > 1e-2
    other = build(kind, seed=5)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.kernel(20), other.kernel(20))
    assert gap(kept(layer, u)[1], layer(u)[0]) < 1e-5
    layer.double()
    assert layer.kernel(20).dtype == torch.float64
    assert kept(layer, u)[1].dtype == torch.float64
    layer.float().train()
    assert layer.kernel(20) is not layer.kernel(20)
    layer.log_dt.add_(0.0 if kind == "lru" else 0.5)
    layer.D.add_(1.0)
    layer.eval()
    assert gap(kept(layer, u)[1], layer(u)[0]) < 1e-5


@torch.no_grad()
def test_replaced_parameters_are_noticed() -> None:
    """``assign=True`` and a plain assignment put in other tensors, whose versions may be the same as before."""
    for kind in KINDS:
        layer, other = build(kind).eval(), build(kind, seed=5)
        layer.kernel(20)
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer.kernel(20), other.kernel(20))
        layer = build(kind).eval()
        before = layer.kernel(20)
        layer.C = nn.Parameter(3.0 * layer.C)  # type: ignore[operator]
        assert gap(layer.kernel(20), 3.0 * before) < 1e-5


def test_evaluating_with_gradients_keeps_nothing() -> None:
    layer = build("zoh").eval()
    with torch.no_grad():
        layer.kernel(20)
    kernel = layer.kernel(20)
    assert kernel.requires_grad
    kernel.sum().backward()
    assert layer.C.grad is not None


# ---- initial values


def test_timescales_are_uniform_in_the_logarithm() -> None:
    torch.manual_seed(0)
    drawn_values = timescales(20_000, 1e-3, 1e-1)
    assert drawn_values.shape == (20_000,)
    assert math.log(1e-3) <= float(drawn_values.min()) < float(drawn_values.max()) <= math.log(1e-1)
    expected = torch.linspace(math.log(1e-3), math.log(1e-1), 11)
    torch.testing.assert_close(torch.quantile(drawn_values, torch.linspace(0, 1, 11)), expected, atol=0.05, rtol=0)
    assert timescales(3, 0.5, 0.5).exp().tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("span", [(0.0, 0.1), (-1.0, 0.1), (0.2, 0.1), (0.1, 2.0)])
def test_time_scales_out_of_range_are_refused(span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"dt_min .* and dt_max .* must satisfy 0 < dt_min <= dt_max <= 1"):
        timescales(4, *span)
    for kind in ("zoh", "s4", "lssl"):
        with pytest.raises(ConfigError, match="dt_min"):
            build(kind, dt_range=span)


def test_diagonal_starts_by_hand() -> None:
    """N = 4, two modes: Eq. 8 and 9 of arXiv 2206.11893."""
    for kind, decay, frequency in (
        ("lin", [0.5, 0.5], [0.0, math.pi]),
        ("inv", [0.5, 0.5], [4 / math.pi * 3, 4 / math.pi / 3]),
        ("real", [1.0, 2.0], [0.0, 0.0]),
    ):
        found = diagonal_init(kind, 4)  # type: ignore[arg-type]
        assert found[0].tolist() == pytest.approx(decay)
        assert found[1].tolist() == pytest.approx(frequency)
        assert found[2].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_the_legs_start_is_the_normal_part_of_the_matrix() -> None:
    """B' exp(t S) B with S = A + P P' has the modes as exponents and |B_n|^2 as their weights."""
    n = np.arange(16)
    root = np.sqrt(2 * n + 1.0)
    normal = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0) + np.outer(root, root) / 2
    decay, frequency, weight = (part.numpy() for part in diagonal_init("legs", 16))
    np.testing.assert_allclose(decay, 0.5, atol=1e-12)
    size = (weight**2).sum(-1)
    for t in (0.0, 0.1, 1.0):
        found = 2.0 * (size * np.exp(-decay * t) * np.cos(frequency * t)).sum()
        assert found == pytest.approx(root @ expm(t * normal) @ root, abs=1e-9)


def test_aliased_modes_start_at_zero() -> None:
    layer = build("zoh", features=8, states=64, dt_range=(0.01, 1.0))
    turn = layer.log_dt.exp()[:, None] * layer.frequency.abs()  # type: ignore[operator]
    silent = (layer.C[0] == 0.0).all(-1)  # type: ignore[index]
    assert torch.equal(silent, turn > math.pi)
    assert 0 < int(silent.sum()) < silent.numel()
    half = build("zoh", features=8, states=64, dt_range=(0.01, 1.0), bandlimit=0.5)
    assert torch.equal((half.C[0] == 0.0).all(-1), turn > 0.5 * math.pi)  # type: ignore[index]
    every = build("zoh", features=8, states=64, dt_range=(0.01, 1.0), bandlimit=0.0)
    assert bool(every.C.any(-1).all())  # type: ignore[operator]


def test_ring_of_the_linear_recurrent_unit() -> None:
    layer = build("lru", features=64, states=64, ring=(0.6, 0.9))
    log_re, log_im = (part.detach() for part in layer.eigenvalues())  # type: ignore[operator]
    radius = log_re.exp()
    assert 0.6 - 1e-6 <= float(radius.min()) < float(radius.max()) <= 0.9 + 1e-6
    # uniform over the area of the ring: the squared radius is uniform
    middle = radius.square().median()
    assert float(middle) == pytest.approx((0.6**2 + 0.9**2) / 2, abs=0.02)
    assert bool(((log_im >= 0.0) & (log_im <= math.pi)).all())
    gain = layer.B.detach()[..., 0].double()  # type: ignore[operator]
    torch.testing.assert_close(gain, (1 - radius.square()).sqrt(), atol=1e-6, rtol=1e-5)
    assert "log_dt" not in dict(layer.named_parameters())


def test_fixed_structured_layers_train_only_their_readout() -> None:
    layer = build("lssl", trains_a=False)
    assert set(dict(layer.named_parameters())) == {"C", "D"}
    assert {"log_dt", "tri_diagonal", "shift", "left", "right", "b"} <= set(dict(layer.named_buffers()))
    trained = build("lssl")
    torch.testing.assert_close(layer.kernel(30), trained.kernel(30))  # buffers hold what parameters would
    assert len(list(trained.parameters())) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("zoh", states=7), "d_state is 7; it must be even"),
        (lambda: build("s4", states=0), "d_state is 0"),
        (lambda: build("lssl", states=3), "d_state is 3"),
        (lambda: build("zoh", features=0), "needs features and channels, got 0 and 1"),
        (lambda: build("lssl", channels=0), "needs features and channels, got 4 and 0"),
        (lambda: build("zoh", copies=3), "n_ssm is 3; it must divide d_model, 4"),
        (lambda: build("s4", copies=0), "n_ssm is 0; it must divide d_model, 4"),
        (lambda: build("lru", ring=(0.9, 0.5)), "ring of eigenvalues"),
        (lambda: build("lru", ring=(0.5, 1.0)), "ring of eigenvalues"),
        (lambda: build("lru", ring=(-0.1, 0.5)), "ring of eigenvalues"),
        (lambda: build("lssl", alpha=0.4), "alpha is 0.4"),
        (lambda: build("lssl", alpha=1.1), "alpha is 1.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
