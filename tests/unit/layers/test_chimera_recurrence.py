"""The recurrence of the 2-D state space layer: what it reduces to, missing cells, time-invariant heads.

The recurrences compared with are written out here, cell by cell, and share no code with the scan.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chimera_layer_cases import E, S, grid, head_of, layer_of
from torch import Tensor
from torch.nn.functional import softplus

from tsforge.layers.chimera_heads import RHO, DiagonalHead


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
