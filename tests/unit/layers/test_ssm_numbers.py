"""State space layers: numbers that go wrong are clamped or named, and what evaluation keeps follows every change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ssm_layer_cases import KINDS, build, drawn, gap, looped
from torch import Tensor, nn

from tsforge.core.errors import ModelError
from tsforge.layers.ssm import SSM

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
