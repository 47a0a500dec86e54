"""Chimera layers and blocks: they stay bounded, their parts add up; shapes, dtypes, gradients, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chimera_layer_cases import STREAMED, D, E, S, grid, head_of, layer_of, options, stack_of
from torch import Tensor, nn

from tsforge.core.errors import ConfigError
from tsforge.layers.chimera import Chimera2DSSM
from tsforge.layers.chimera_block import ChimeraBlock, ChimeraStack, RMSNorm
from tsforge.layers.chimera_heads import RHO, ChimeraOptions, DiagonalHead, inverse_softplus
from tsforge.training.module import parameter_groups

# ---- 5.5 stability


def products(module: nn.Module) -> Tensor:
    """Return |A2 A3| / |Re A1 Re A4| of all systems."""
    found = []
    for head in module.modules():
        if isinstance(head, DiagonalHead):
            a1, a2, a3, a4 = head.transitions()
            assert bool((a1.real < 0).all())
            assert bool((a4.real < 0).all())
            found.append((a2.abs() * a3.abs() / (a1.real * a4.real).abs()).flatten())
    return torch.cat(found)


def test_checklist_5_5_the_parameters_satisfy_the_stability_condition() -> None:
    torch.manual_seed(0)
    stack = ChimeraStack([ChimeraBlock(8, Chimera2DSSM(8, ChimeraOptions(states=4))) for _ in range(2)])
    assert float(products(stack).detach().max()) < 0.2  # nearly independent at the start
    optimizer = torch.optim.AdamW(parameter_groups(stack, 1e-2, 0.0))
    x = torch.randn(4, 5, 16, 8)
    for _ in range(100):
        optimizer.zero_grad()
        loss = -stack(x).x[:, 1:, 1:].sub(x[:, :-1, :-1]).square().mean()  # drives the states to grow
        loss.backward()
        optimizer.step()
    assert float(products(stack).detach().max()) <= RHO**2 < 1
    with torch.no_grad():
        for part in stack.parameters():
            part.add_(100 * torch.randn_like(part))
        assert float(products(stack).max()) <= RHO**2 * (1 + 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_checklist_5_5_a_large_grid_stays_finite_in_float32() -> None:
    torch.manual_seed(0)
    layer = Chimera2DSSM(2, ChimeraOptions(states=2))
    for _, head in layer.each():
        head.p2.fill_(10.0)
        head.p3.fill_(10.0)  # the coupling at its limit
    y = layer(torch.randn(1, 862, 720, 2)).y
    assert y.dtype == torch.float32
    assert bool(torch.isfinite(y).all())
    assert float(y.abs().max()) < 1e4


def test_initial_steps_lie_in_their_ranges() -> None:
    torch.manual_seed(0)
    layer = Chimera2DSSM(64, ChimeraOptions(dt_trend=(1e-4, 1e-2), dt_seasonal=(1e-2, 1.0), dt_variate=(0.1, 2.0)))
    for name, (low, high) in (("trend", (1e-4, 1e-2)), ("seasonal", (1e-2, 1.0))):
        steps = head_of(layer, name).mean_steps().detach()
        assert steps.shape == (2, 2, 64)
        for found, (least, most) in ((steps[0], (low, high)), (steps[1], (0.1, 2.0))):
            assert least * 0.999 <= float(found.min()) < least * 2
            assert most / 2 < float(found.max()) <= most * 1.001
    assert inverse_softplus(torch.tensor([1e-6])).item() == pytest.approx(-13.8155, abs=1e-3)


def test_delicate_parameters_are_not_decayed() -> None:
    layer = Chimera2DSSM(4, ChimeraOptions())
    kept = {"p1", "p2", "p3", "p4", "w1", "w4", "dt_bias"}
    decays = {
        id(part): group["weight_decay"] for group in parameter_groups(layer, 1e-3, 0.1) for part in group["params"]
    }
    seen = set()
    for name, part in layer.named_parameters():
        last = name.rsplit(".", 1)[-1]
        assert decays[id(part)] == (0.0 if last in kept else 0.1), name
        seen.add(last)
    assert kept <= seen


# ---- parts


@pytest.mark.parametrize("gate", [True, False])
@torch.no_grad()
def test_parts_add_up_to_the_output(gate: bool) -> None:
    stack, x = stack_of(gate=gate, conv=4), grid(2, 3, 7, features=D)
    found = stack.run(x, parts={"rest": x})
    assert set(found.parts) == {"trend", "seasonal", "rest"}
    torch.testing.assert_close(torch.stack(list(found.parts.values())).sum(0), found.x, atol=1e-12, rtol=0)
    assert torch.equal(stack.run(x).x, found.x)
    with_maps = [block.layer.each() for block in stack.each()]
    for heads in with_maps:  # a head that reads nothing from its states has no part
        for name, head in heads:
            if name == "trend":
                head.project[:, 2 * head.rank :].view(2, 4, S, E)[:, 1::2] = 0.0
    assert not stack.run(x, parts={"rest": x}).parts["trend"].any()


# ---- 5.10 shapes and dtypes


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 6), (2, 5, 1), (1, 7, 3)])
@pytest.mark.parametrize("coupling", ["scan", "none", "pooled"])
@torch.no_grad()
def test_checklist_5_10_any_number_of_variates_and_steps(shape: tuple[int, int, int], coupling: str) -> None:
    stack = stack_of(coupling=coupling)
    y = stack(grid(*shape, features=D)).x
    assert y.shape == (*shape, D)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize(("coupling", "same"), [("none", True), ("scan", False), ("pooled", False)])
def test_checklist_5_10_a_stack_trained_on_three_variates_takes_five(coupling: str, same: bool) -> None:
    """Uncoupled, the first three come out as before; coupled ones read the two that are new."""
    stack, x = stack_of(coupling=coupling, conv=4), grid(4, 3, 9, features=D)
    target, before = grid(4, 3, 9, seed=1, features=D), stack(x).x.detach()
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (stack(x).x - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        three = stack(x).x
        assert float((three - before).abs().max()) > 1e-2  # it has learnt something
        five = stack(torch.cat([x, grid(4, 2, 9, seed=2, features=D)], dim=1)).x
    assert five.shape == (4, 5, 9, D)
    assert bool(torch.isfinite(five).all())
    gap = float((five[:, :3] - three).abs().max())
    assert gap < 1e-12 if same else gap > 1e-3


@torch.no_grad()
def test_checklist_5_10_inputs_need_not_be_contiguous() -> None:
    stack, x = stack_of(conv=4), grid(2, 4, 9, features=D)
    scattered = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not scattered.is_contiguous()
    torch.testing.assert_close(stack(scattered).x, stack(x).x, atol=1e-14, rtol=0)


@torch.no_grad()
def test_checklist_5_10_autocast_leaves_the_scan_in_float32() -> None:
    stack, x = stack_of().float(), grid(2, 4, 9, features=D).float()
    expected = stack(x).x
    seen: list[torch.dtype] = []
    layers = [block.layer for block in stack.each()]
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out.y.dtype)) for layer in layers]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stack(x).x
    for handle in handles:
        handle.remove()
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    u = grid(2, 4, 9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layers[0](u).y
    torch.testing.assert_close(inside, layers[0](u).y, atol=1e-6, rtol=0)  # no product of the layer was rounded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_checklist_5_10_the_gpu_agrees() -> None:
    stack, x = stack_of(conv=4).float(), grid(2, 4, 33, features=D).float()
    expected = stack(x).x
    found = stack.cuda()(x.cuda()).x.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(is deprecated|should not be instantiated):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # all of them torch's own, in tracing
def test_checklist_5_10_a_compiled_block_has_the_same_values_and_gradients() -> None:
    """AOT autograd traces forward and backward; where tracing breaks off, at the scan, the rest compiles around it."""
    block = stack_of(blocks=1, heads="trend").each()[0]
    x, probe = grid(2, 3, 5, features=D), grid(2, 3, 5, seed=1, features=D)
    compiled: Callable[..., Any] = torch.compile(block, backend="aot_eager")
    found = []
    for run in (block, compiled):
        inputs = [x.clone().requires_grad_(), *block.parameters()]
        y = run(inputs[0]).x
        found.append([y, *torch.autograd.grad((y * probe).sum(), inputs)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, atol=1e-12, rtol=1e-12)
    assert all(bool(part.any()) for part in found[1])


def test_checklist_5_10_weights_survive_a_round_trip() -> None:
    first, second = stack_of(conv=4), stack_of(seed=7, conv=4)
    x = grid(2, 3, 6, features=D)
    assert not torch.allclose(first(x).x, second(x).x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x).x, second(x).x)


def test_gradients_reach_every_parameter() -> None:
    for settings in STREAMED:
        stack = stack_of(**settings)
        found = stack(grid(2, 3, 6, features=D))
        total = found.x.square().sum() + sum(part.square().sum() for part in found.ahead.values())
        total.backward()
        idle = [name for name, part in stack.named_parameters() if part.grad is None or not part.grad.any()]
        if settings.get("looks_ahead"):  # only the last block's prediction is read
            idle = [name for name in idle if not name.startswith("blocks.0")]
        assert not idle


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    assert not norm(torch.zeros(1, 2)).any()
    assert norm(torch.ones(3, 2, dtype=torch.bfloat16)).shape == (3, 2)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": 0}, "d_state is 0"),
        ({"dt_trend": (0.0, 1.0)}, "dt_trend is 0 to 1; the lower end must be positive"),
        ({"dt_variate": (0.2, 0.1)}, r"dt_variate is 0\.2 to 0\.1"),
        ({"head_mix": "residual", "heads": "trend"}, "head_mix 'residual' needs both heads"),
        ({"coupling": "none", "discretisation": "separate"}, "cannot switch the coupling off"),
        ({"structure": "companion"}, "structure 'companion' is a discrete, time-invariant system"),
        ({"structure": "companion", "selective": False, "discretisation": "separate"}, "structure 'companion'"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dropout": 1.0}, "dropout is 1"), ({"conv": 1}, "conv is 1"), ({"conv": -2}, "conv is -2")],
)
def test_settings_of_a_block_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChimeraBlock(D, layer_of(), **settings)
    with pytest.raises(ConfigError, match="at least 1 feature"):
        Chimera2DSSM(0, options())


@pytest.mark.parametrize("discretisation", ["separate", "separate_avg"])
@torch.no_grad()
def test_other_discretisations_warn_once(discretisation: str) -> None:
    with pytest.warns(UserWarning, match=f"discretisation '{discretisation}' is for study") as caught:
        layer = layer_of(discretisation=discretisation)
    assert len(caught) == 1
    u = grid(1, 3, 4)
    found = layer(u).y
    exact = layer_of()
    exact.load_state_dict(layer.state_dict())
    assert not torch.allclose(found, exact(u).y, atol=1e-3)


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    block = ChimeraBlock(D, layer_of(), dropout=0.5).double()
    x = grid(2, 3, 6, features=D)
    assert not torch.equal(block.train()(x).x, block(x).x)
    assert torch.equal(block.eval()(x).x, block(x).x)
