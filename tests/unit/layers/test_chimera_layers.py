"""The 2-D state space layer and its blocks: what they reduce to, that they stay bounded, causal and symmetric.

The recurrences compared with are written out here, cell by cell, and share no code with the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tsforge.core.errors import ConfigError
from tsforge.layers.chimera import Chimera2DSSM
from tsforge.layers.chimera_block import ChimeraBlock, ChimeraStack, RMSNorm
from tsforge.layers.chimera_heads import RHO, ChimeraOptions, DiagonalHead, inverse_softplus
from tsforge.training.module import parameter_groups

E, S, D = 4, 3, 5


def options(**settings: Any) -> ChimeraOptions:
    return ChimeraOptions(**{"states": S, **settings})


def layer_of(*, seed: int = 0, features: int = E, looks_ahead: bool = False, **settings: Any) -> Chimera2DSSM:
    """Return a layer in float64 whose coupling is far from 0."""
    torch.manual_seed(seed)
    layer = Chimera2DSSM(features, options(**settings), looks_ahead=looks_ahead).double()
    with torch.no_grad():
        for _, head in layer.each():
            if head.coupled:
                head.p2.normal_()
                head.p3.normal_()
    return layer


def stack_of(*, seed: int = 0, blocks: int = 2, conv: int = 0, gate: bool = True, **settings: Any) -> ChimeraStack:
    made = [
        ChimeraBlock(D, layer_of(seed=seed + index, **settings), conv=conv, gate=gate).double()
        for index in range(blocks)
    ]
    return ChimeraStack(made).double()


def grid(*shape: int, seed: int = 0, features: int = E) -> Tensor:
    return torch.randn(*shape, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(layer: Chimera2DSSM, name: str = "trend") -> DiagonalHead:
    return dict(layer.each())[name]


def maps_of(head: DiagonalHead, u: Tensor, group: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return dt (b, N, T, E) and B1, C1 (, B2, C2) (b, N, T, S) of inputs, from the parameters as documented."""
    codes = u @ head.project[group].T
    rank, count = head.rank, head.axes * 2
    steps = [
        softplus(
            codes[..., axis * rank : (axis + 1) * rank] @ head.dt_weight[group, axis].T + head.dt_bias[group, axis]
        )
        for axis in range(head.axes)
    ]
    rest = codes[..., head.axes * rank :]
    if head.complex:
        rest = torch.complex(rest[..., 0::2], rest[..., 1::2])
    return steps, list(rest.chunk(count, dim=-1))


def zoh_path(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a one-dimensional selective scan along axis 2: x, dt (b, N, T, E), a (E, S), b and c (b, N, T, S)."""
    state = torch.zeros(*x.shape[:2], *a.shape, dtype=a.dtype)
    outputs = []
    for t in range(x.shape[2]):
        decay = torch.exp(dt[:, :, t, :, None] * a)
        state = decay * state + (decay - 1) / a * b[:, :, t, None, :] * x[:, :, t, :, None]
        found = (c[:, :, t, None, :] * state).sum(-1)
        outputs.append(found.real if found.is_complex() else found)
    return torch.stack(outputs, dim=2)


def transitions(head: DiagonalHead) -> tuple[Tensor, Tensor]:
    """Return A1 and A4 of the first direction (E, S)."""
    a1 = -head.p1[0].exp()
    a1 = torch.complex(a1, head.w1[0]) if head.complex else a1
    if not head.coupled:
        return a1, a1
    a4 = -head.p4[0].exp()
    return a1, torch.complex(a4, head.w4[0]) if head.complex else a4


# ---- 5.3 what it reduces to

HEADS = pytest.mark.parametrize("name", ["trend", "seasonal"])


@HEADS
@torch.no_grad()
def test_checklist_5_3_without_transitions_between_them_two_one_dimensional_scans_add_up(name: str) -> None:
    layer = layer_of(heads=name, directions="forward")
    head, u = head_of(layer, name), grid(2, 4, 9)
    head.p2.zero_()
    head.p3.zero_()
    (dt1, dt2), (b1, c1, b2, c2) = maps_of(head, u)
    a1, a4 = transitions(head)
    along_time = zoh_path(u, dt1, a1, b1, c1)
    turned = [part.transpose(1, 2) for part in (u, dt2, b2, c2)]
    along_variates = zoh_path(turned[0], turned[1], a4, turned[2], turned[3]).transpose(1, 2)
    found = layer(u)
    torch.testing.assert_close(found.parts[name], along_time + along_variates, atol=1e-12, rtol=0)
    assert float(along_variates.abs().max()) > 1e-3
    torch.testing.assert_close(found.y, found.parts[name] + layer.D_skip * u, atol=1e-15, rtol=0)


@HEADS
@torch.no_grad()
def test_checklist_5_3_without_coupling_every_variate_is_a_selective_scan_along_time(name: str) -> None:
    u = grid(2, 4, 9)
    layer = layer_of(heads=name, directions="forward", coupling="none")
    head = head_of(layer, name)
    (dt1,), (b1, c1) = maps_of(head, u)
    expected = zoh_path(u, dt1, transitions(head)[0], b1, c1)
    torch.testing.assert_close(layer(u).parts[name], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_checklist_5_3_coupling_none_is_the_coupled_layer_with_a2_a3_c2_at_zero() -> None:
    u = grid(2, 4, 9)
    coupled, plain = layer_of(), layer_of(coupling="none")
    plain.D_skip.copy_(coupled.D_skip)
    for name, head in coupled.each():
        own = head_of(plain, name)
        times = 2 if head.complex else 1
        head.p2.zero_()
        head.p3.zero_()
        rank, size = head.rank, S * times
        head.project[:, 2 * rank + 3 * size :] = 0.0  # C2
        own.p1.copy_(head.p1)
        if head.complex:
            own.w1.copy_(head.w1)
        own.dt_bias.copy_(head.dt_bias[:, :1])
        own.dt_weight.copy_(head.dt_weight[:, :1])
        own.project.copy_(torch.cat([head.project[:, :rank], head.project[:, 2 * rank : 2 * rank + 2 * size]], dim=1))
    torch.testing.assert_close(plain(u).y, coupled(u).y, atol=1e-12, rtol=0)


@torch.no_grad()
def test_checklist_5_3_a_time_invariant_layer_without_coupling_is_a_convolution() -> None:
    """S4D: y = sum_k Re(C B (e^(dt A) - 1) / A e^(k dt A)) u[t - k]."""
    layer, u = layer_of(heads="seasonal", directions="forward", coupling="none", selective=False), grid(2, 3, 12)
    head = head_of(layer, "seasonal")
    a1, _ = transitions(head)
    dt = softplus(head.dt_bias[0, 0])
    b, c = torch.view_as_complex(head.maps[0])
    powers = torch.exp(torch.arange(12.0, dtype=torch.float64)[:, None, None] * dt[:, None] * a1)
    kernel = (c * b * torch.expm1(dt[:, None] * a1) / a1 * powers).sum(-1).real  # (T, E)
    expected = torch.zeros_like(u)
    for lag in range(12):
        expected[:, :, lag:] += kernel[lag] * u[:, :, : 12 - lag]
    torch.testing.assert_close(layer(u).parts["seasonal"], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_checklist_5_3_one_way_coupling_leaves_the_time_states_alone() -> None:
    """A2 = 0: what is read from h1 is the one-dimensional scan along time, whatever A3."""
    layer, u = layer_of(heads="trend", directions="forward"), grid(2, 4, 9)
    head = head_of(layer)
    head.p2.zero_()
    head.project[:, 2 * head.rank + 3 * S :] = 0.0  # C2: only h1 is read
    (dt1, _), (b1, c1, _, _) = maps_of(head, u)
    torch.testing.assert_close(
        layer(u).parts["trend"], zoh_path(u, dt1, transitions(head)[0], b1, c1), atol=1e-12, rtol=0
    )
    head.p2.fill_(1.0)
    assert not torch.allclose(layer(u).parts["trend"], zoh_path(u, dt1, transitions(head)[0], b1, c1), atol=1e-4)


@torch.no_grad()
def test_checklist_5_3_with_one_variate_the_variate_state_has_no_memory() -> None:
    layer, u = layer_of(heads="trend", directions="forward"), grid(2, 1, 9)
    head = head_of(layer)
    (dt1, dt2), (b1, c1, b2, c2) = maps_of(head, u)
    a1, a4 = transitions(head)
    a2 = RHO * head.p2[0].tanh() * a1.abs()
    h1 = h2 = torch.zeros(2, E, S, dtype=torch.float64)
    outputs = []
    for t in range(9):
        g1 = (torch.exp(dt1[:, 0, t, :, None] * a1) - 1) / a1
        h1 = h1 + g1 * (a1 * h1 + a2 * h2 + b1[:, 0, t, None] * u[:, 0, t, :, None])
        h2 = (torch.exp(dt2[:, 0, t, :, None] * a4) - 1) / a4 * b2[:, 0, t, None] * u[:, 0, t, :, None]
        outputs.append((c1[:, 0, t, None] * h1 + c2[:, 0, t, None] * h2).sum(-1))
    torch.testing.assert_close(layer(u).parts["trend"][:, 0], torch.stack(outputs, dim=1), atol=1e-12, rtol=0)


@torch.no_grad()
def test_pooled_coupling_by_hand() -> None:
    """The row above every variate is the mean of the observed ones, with the same parameters."""
    layer, u = layer_of(heads="trend", directions="forward", coupling="pooled"), grid(1, 3, 6)
    observed = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    observed[0, :, 2] = False
    plain = layer_of(heads="trend", directions="forward", coupling="scan")
    plain.load_state_dict(layer.state_dict())
    for v in range(3):
        pooled = torch.zeros(6, E, dtype=torch.float64)
        for t in range(6):
            rows = [u[0, w, t] for w in range(3) if observed[0, w, t]]
            pooled[t] = torch.stack(rows).mean(0) if rows else 0.0
        two = torch.stack([pooled, u[0, v]]).unsqueeze(0)
        seen = torch.stack([torch.ones(6, dtype=torch.bool), observed[0, v]]).unsqueeze(0)
        expected = plain(two, seen).parts["trend"][0, 1]
        torch.testing.assert_close(layer(u, observed).parts["trend"][0, v], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_residual_mix_feeds_what_the_trend_left() -> None:
    u = grid(2, 3, 7)
    residual, plain = layer_of(head_mix="residual"), layer_of()
    plain.load_state_dict(residual.state_dict())
    trend = plain(u).parts["trend"]
    found = residual(u)
    assert torch.equal(found.parts["trend"], trend)
    torch.testing.assert_close(found.parts["seasonal"], plain(u - trend).parts["seasonal"], atol=1e-14, rtol=0)


@torch.no_grad()
def test_directions_are_averaged() -> None:
    """Each direction alone is a forward layer; the second one sees the variates in reverse."""
    u = grid(2, 4, 6)
    both = layer_of(heads="trend")
    means = []
    for group, seen in enumerate((u, u.flip(1))):
        one = layer_of(heads="trend", directions="forward")
        for name, part in head_of(one).named_parameters():
            part.copy_(getattr(head_of(both), name)[group : group + 1])
        means.append(one(seen).parts["trend"])
    torch.testing.assert_close(both(u).parts["trend"], (means[0] + means[1].flip(1)) / 2, atol=1e-13, rtol=0)


@pytest.mark.parametrize("coupling", ["scan", "none"])
@torch.no_grad()
def test_the_next_input_is_read_from_the_same_states_by_its_own_maps(coupling: str) -> None:
    """A layer whose C is the D of another gives as output what the other reads ahead."""
    u = grid(2, 4, 6)
    layer = layer_of(coupling=coupling, looks_ahead=True)
    found = layer(u)
    for read, expected in ((1, found.parts), (2, found.ahead)):
        plain = layer_of(coupling=coupling)
        for name, head in layer.each():
            own = head_of(plain, name)
            for key, part in own.named_parameters():
                if key != "project":
                    part.copy_(getattr(head, key))
            size, start = S * (2 if head.complex else 1), head.axes * head.rank
            maps = head.project[:, start:].split(size, dim=1)  # B, C, D of each axis
            chosen = [maps[3 * axis + place] for axis in range(head.axes) for place in (0, read)]
            own.project.copy_(torch.cat([head.project[:, :start], *chosen], dim=1))
        for name, part in plain(u).parts.items():
            torch.testing.assert_close(part, expected[name], atol=1e-12, rtol=0)


# ---- missing cells


@pytest.mark.parametrize("coupling", ["scan", "none", "pooled"])
@torch.no_grad()
def test_missing_cells_add_no_input(coupling: str) -> None:
    """Where nothing was observed from the start, states and heads are 0; only the direct path is left."""
    layer, u = layer_of(coupling=coupling), grid(2, 3, 7)
    observed = torch.ones(2, 3, 7, dtype=torch.bool)
    observed[0] = False
    found = layer(u, observed)
    for name, part in found.parts.items():
        assert not part[0].any()
        assert not found.state[name][0].any()
        assert bool(part[1].any())
    assert torch.equal(found.direct, layer.D_skip * u)


@torch.no_grad()
def test_missing_cells_pass_the_state_on() -> None:
    layer, u = layer_of(heads="trend", directions="forward", coupling="none"), grid(1, 1, 4)
    observed = torch.tensor([[[True, False, False, False]]])
    head = head_of(layer)
    (dt1,), (b1, c1) = maps_of(head, u)
    entering = torch.where(observed.unsqueeze(-1), u, 0.0)
    expected = zoh_path(entering, dt1, transitions(head)[0], b1, c1)
    torch.testing.assert_close(layer(u, observed).parts["trend"], expected, atol=1e-13, rtol=0)
    assert float(expected[:, :, 3].abs().max()) > 1e-6


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


# ---- 5.6 causality


@pytest.mark.parametrize("settings", [{}, {"coupling": "pooled"}, {"selective": False}, {"head_mix": "residual"}])
@torch.no_grad()
def test_checklist_5_6_later_inputs_change_nothing_before(settings: dict[str, Any]) -> None:
    stack, x = stack_of(conv=4, **settings), grid(2, 4, 12, features=D)
    before = stack(x).x
    for start in (1, 5, 11):
        changed = x.clone()
        changed[:, :, start:] = grid(2, 4, 12, seed=9, features=D)[:, :, start:]
        after = stack(changed).x
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert not torch.allclose(after[:, :, start:], before[:, :, start:], atol=1e-3)


@torch.no_grad()
def test_checklist_5_6_one_direction_is_causal_along_variates_and_two_are_not() -> None:
    x = grid(2, 5, 8, features=D)
    changed = x.clone()
    changed[:, 3:] += 1.0
    one = stack_of(directions="forward")
    assert torch.equal(one(changed).x[:, :3], one(x).x[:, :3])
    both = stack_of()
    assert float((both(changed).x[:, :3] - both(x).x[:, :3]).abs().max()) > 1e-3


@torch.no_grad()
def test_checklist_5_6_a_truncated_history_gives_the_same_features() -> None:
    stack, x = stack_of(conv=4), grid(2, 4, 12, features=D)
    torch.testing.assert_close(stack(x[:, :, :7]).x, stack(x).x[:, :, :7], atol=1e-12, rtol=0)


# ---- time-invariant heads

INVARIANT: list[dict[str, Any]] = [
    {},
    {"coupling": "none"},
    {"coupling": "pooled", "directions": "forward"},
    {"looks_ahead": True},
    {"structure": "companion"},
    {"structure": "companion", "coupling": "none"},
    {"structure": "companion", "coupling": "pooled", "looks_ahead": True},
]


@pytest.mark.parametrize("settings", INVARIANT, ids=str)
@torch.no_grad()
def test_checklist_5_9_the_convolution_equals_the_recurrence(settings: dict[str, Any]) -> None:
    layer, u = layer_of(selective=False, **settings), grid(2, 5, 9)
    observed = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(3)) > 0.2
    carried, whole = layer(u, observed), layer(u, observed, with_state=False)
    assert not whole.state
    assert set(carried.state) == {"trend", "seasonal"}
    torch.testing.assert_close(whole.y, carried.y, atol=1e-12, rtol=0)
    assert bool(whole.ahead) == ("looks_ahead" in settings)
    for name, part in whole.ahead.items():
        torch.testing.assert_close(part, carried.ahead[name], atol=1e-12, rtol=0)
        assert not torch.allclose(part, whole.parts[name], atol=1e-3)


@torch.no_grad()
def test_companion_heads_by_hand() -> None:
    layer, u = layer_of(heads="trend", directions="forward", selective=False, structure="companion"), grid(1, 3, 5)
    head = dict(layer.each())["trend"]
    a1, a2, a3, a4 = head.matrices()
    b1, c1, b2, c2 = head.maps[0]
    h1, h2, expected = {}, {}, torch.zeros(1, 3, 5, E, dtype=torch.float64)
    zero = torch.zeros(E, S, dtype=torch.float64)
    for v in range(3):
        for t in range(5):
            x = u[0, v, t].unsqueeze(-1)
            beside = (h1.get((v, t - 1), zero), h2.get((v, t - 1), zero))
            above = (h1.get((v - 1, t), zero), h2.get((v - 1, t), zero))
            h1[v, t] = (a1 @ beside[0].unsqueeze(-1) + a2 @ beside[1].unsqueeze(-1))[..., 0] + b1 * x
            h2[v, t] = a3 * above[0] + a4 * above[1] + b2 * x
            expected[0, v, t] = (c1 * h1[v, t] + c2 * h2[v, t]).sum(-1)
    torch.testing.assert_close(layer(u, with_state=False).parts["trend"], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_companion_heads_stay_stable_at_the_limit_of_their_coupling() -> None:
    """The joint matrix of both states over one cell keeps its 2-D radius below 1 whatever the parameters."""
    layer = layer_of(selective=False, structure="companion")
    for name, head in layer.each():
        for part in (head.p2, head.p3):
            part.fill_(20.0)
        a1, a2, a3, a4 = head.matrices()
        for z in torch.exp(2j * torch.pi * torch.arange(32, dtype=torch.float64) / 32):
            along = torch.diag_embed(z * a3 / (1 - z * a4))  # h2 for h1, a wave of this phase along variates
            onward = torch.linalg.eigvals(a1.to(z.dtype) + a2.to(z.dtype) @ along)
            assert float(onward.abs().max()) < 1.0, name
    y = layer(torch.ones(1, 40, 200, E, dtype=torch.float64), with_state=False).y
    assert float(y.abs().max()) < 1e4


# ---- 5.7 symmetry


@pytest.mark.parametrize("selective", [True, False])
@torch.no_grad()
def test_checklist_5_7_reversed_variates_and_swapped_directions_reverse_the_output(selective: bool) -> None:
    layer, u = layer_of(selective=selective), grid(2, 5, 8)
    swapped = layer_of(seed=3, selective=selective)
    swapped.load_state_dict(layer.state_dict())
    for _, head in swapped.each():
        for part in head.parameters():
            part.copy_(part.flip(0))
    assert torch.equal(swapped(u.flip(1)).y.flip(1), layer(u).y)
    assert not torch.allclose(layer(u.flip(1)).y.flip(1), layer(u).y, atol=1e-3)


@pytest.mark.parametrize(("coupling", "equivariant"), [("none", True), ("pooled", True), ("scan", False)])
@torch.no_grad()
def test_checklist_5_7_permuted_variates(coupling: str, equivariant: bool) -> None:
    stack, x = stack_of(coupling=coupling), grid(2, 5, 8, features=D)
    order = torch.tensor([3, 0, 4, 1, 2])
    gap = float((stack(x[:, order]).x - stack(x).x[:, order]).abs().max())
    assert gap < 1e-12 if equivariant else gap > 1e-3


@torch.no_grad()
def test_pooled_variates_read_each_other_and_uncoupled_ones_do_not() -> None:
    x = grid(2, 5, 8, features=D)
    changed = x.clone()
    changed[:, 4] += 1.0
    for coupling, reads in (("pooled", True), ("none", False), ("scan", True)):
        stack = stack_of(coupling=coupling)
        gap = float((stack(changed).x - stack(x).x)[:, :4].abs().max())
        assert gap > 1e-4 if reads else gap == 0.0


@torch.no_grad()
def test_checklist_5_7_windows_of_a_batch_are_independent() -> None:
    stack, x = stack_of().float(), grid(6, 4, 9, features=D).float()
    whole, order = stack(x).x, torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(stack(x[order]).x, whole[order], atol=1e-6, rtol=0)
    parts = torch.cat([stack(part).x for part in x.split([1, 3, 2])])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


# ---- 5.8 streaming

STREAMED: list[dict[str, Any]] = [
    {},
    {"conv": 4},
    {"coupling": "pooled", "conv": 4},
    {"coupling": "none"},
    {"selective": False},
    {"head_mix": "residual", "directions": "forward"},
    {"looks_ahead": True},
    {"selective": False, "looks_ahead": True, "coupling": "pooled"},
    {"selective": False, "structure": "companion"},
    {"selective": False, "structure": "companion", "looks_ahead": True, "coupling": "none"},
]


@pytest.mark.parametrize("settings", STREAMED, ids=str)
@torch.no_grad()
def test_checklist_5_8_column_by_column_equals_the_full_pass(settings: dict[str, Any]) -> None:
    stack, x = stack_of(**settings), grid(2, 3, 11, features=D)
    observed = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(2)) > 0.2
    whole = stack(x, observed)
    for cuts in (range(1, 11), (4,), (1, 10), (3, 6)):
        states, outputs, ahead = stack.default_states(2, 3), [], []
        for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
            part = stack(x[:, :, start:stop], observed[:, :, start:stop], states)
            states = part.state
            outputs.append(part.x)
            ahead.append(part.ahead)
        torch.testing.assert_close(torch.cat(outputs, dim=2), whole.x, atol=1e-12, rtol=0)
        for name, found in whole.ahead.items():
            torch.testing.assert_close(torch.cat([part[name] for part in ahead], dim=2), found, atol=1e-12, rtol=0)
        for own, expected in zip(states, whole.state, strict=True):
            assert own.keys() == expected.keys()
            for name, value in own.items():
                torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=0)


def test_checklist_5_8_the_state_holds_two_states_a_variate_channel_and_direction() -> None:
    layer = layer_of()
    state = layer(grid(2, 3, 4)).state
    assert state["trend"].shape == (2, 3, 2, 2 * E, S)
    assert state["seasonal"].shape == (2, 3, 2, 2 * E, S, 2)
    zero = layer.default_state(2, 3)
    assert {name: part.shape for name, part in zero.items()} == {name: part.shape for name, part in state.items()}
    assert not any(part.any() for part in zero.values())


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
@torch.no_grad()
def test_checklist_5_10_the_gpu_agrees() -> None:
    stack, x = stack_of(conv=4).float(), grid(2, 4, 33, features=D).float()
    expected = stack(x).x
    found = stack.cuda()(x.cuda()).x.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@torch.no_grad()
def test_checklist_5_10_a_block_compiles_or_falls_back() -> None:
    stack, x = stack_of(blocks=1).float(), grid(2, 3, 5, features=D).float()
    compiled: Callable[..., Any] = torch.compile(stack.each()[0], backend="eager")
    torch.testing.assert_close(compiled(x).x, stack.each()[0](x).x, atol=1e-6, rtol=0)


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
