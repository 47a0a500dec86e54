"""Chimera as a forecaster: the parts of a forecast, time scales and the coupling of variates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chimera_cases import CLOSED, COVARIATES, H, L, V, make, raw, shorter, span, spec_of

from tsforge.contracts.tensors import Batch
from tsforge.models._chimera_explain import coupling_matrix
from tsforge.testing.generators import make_batch

# ---- parts


@pytest.mark.parametrize(
    "settings",
    [
        {"normalisation": "window"},
        {"skip": "closed_form", "ridge": 10.0, "normalisation": "window", "patch_length": 4},
        {"decoder": "closed_loop", "patch_length": 2, "normalisation": "last"},
        {"head_mix": "residual", "gate": False, "variate_order": "corr", "conv": 4},
        {"heads": "seasonal", "coupling": "pooled", "expand": 2},
        {"selective": False, "decoder": "closed_loop"},
    ],
    ids=str,
)
@torch.no_grad()
def test_components_add_up_to_the_forecast(settings: dict[str, Any]) -> None:
    spec = spec_of(num_params=2, **COVARIATES)
    model, batch = make(spec, **settings), make_batch(spec, size=4)
    model.solve(span(spec))
    parts = model.components(batch)
    heads = ("trend", "seasonal") if model.config.heads == "both" else ("seasonal",)
    assert {*heads, "rest"} <= set(parts)
    assert all(part.shape == (4, H, V) for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)
    for name in heads:
        assert float(parts[name].abs().max()) > 1e-4


@torch.no_grad()
def test_a_head_that_is_not_read_has_no_part() -> None:
    """C of the trend heads at zero: their part vanishes, and nothing else of the forecast is theirs."""
    spec = spec_of()
    for settings in ({}, CLOSED):
        model, batch = make(spec, **settings), make_batch(spec)
        before = model.components(batch)
        assert bool(before["trend"].any())
        for block in model.stack.each():
            head = dict(block.layer.each())["trend"]
            maps = head.project[:, 2 * head.rank :]
            each = maps.view(maps.shape[0], head.count, 3, -1)
            for index in range(head.count):
                if index % (head.count // 2):  # C and D, not B
                    each[:, index] = 0.0
        parts = model.components(batch)
        assert not parts["trend"].any()
        torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_fed_back_input_counts_by_its_heads() -> None:
    """Trend heads that only predict the next input, C at zero but not D, have a part from the second step on."""
    spec = spec_of()
    model, batch = make(spec, num_layers=1, **CLOSED), make_batch(spec)
    head = dict(model.stack.each()[0].layer.each())["trend"]
    maps = head.project[:, 2 * head.rank :].view(2, 6, 3, -1)  # B1, C1, D1, B2, C2, D2
    maps[:, [1, 4]] = 0.0
    parts = model.components(batch)
    assert not parts["trend"][:, 0].any()
    assert float(parts["trend"][:, 1:].abs().amax((0, 2)).min()) > 1e-6
    torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)


# ---- explanation


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_length": 4, "directions": "forward"},
        {"coupling": "none"},
        {"selective": False, "structure": "companion"},
        {"heads": "trend", "coupling": "pooled", **CLOSED},
    ],
    ids=str,
)
def test_explanation(settings: dict[str, Any]) -> None:
    model = make(spec_of(**COVARIATES), **settings).train()
    found = model.explain()
    assert model.training
    assert set(found) == {"time_scales", "coupling"}
    heads = len(model.config.options(1).names)
    assert len(found["time_scales"]) == 2 * heads * (1 if settings.get("directions") == "forward" else 2)
    coupled = settings.get("coupling") != "none"
    for record in found["time_scales"]:
        assert 0 < record["memory_p10"] <= record["memory"] <= record["memory_p90"]
        turns = record["head"] == "seasonal" and "structure" not in settings
        assert (record["period"] is not None) == turns
        assert (record["reach"] is not None) == coupled
        assert (record["into_time"] is not None) == coupled
    assert len(found["coupling"]) == (V * V if coupled else 0)


def test_time_scales_by_hand() -> None:
    model = make(spec_of(), patch_length=4, num_layers=1, directions="forward", d_state=1)
    head = dict(model.stack.each()[0].layer.each())["seasonal"]
    with torch.no_grad():
        head.dt_bias[:, 0] = float(np.log(np.expm1(0.5)))
        head.dt_bias[:, 1] = float(np.log(np.expm1(0.25)))
        head.p1.fill_(float(np.log(0.2)))
        head.w1.fill_(-2.0)
        head.p4.fill_(0.0)
        head.p2.fill_(-0.5)
    record = next(part for part in model.explain()["time_scales"] if part["head"] == "seasonal")
    assert record["memory"] == pytest.approx(4 / (0.5 * 0.2))
    assert record["period"] == pytest.approx(4 * 2 * np.pi / (0.5 * 2.0))
    assert record["reach"] == pytest.approx(4.0)
    assert record["into_time"] == pytest.approx(0.95 * np.tanh(0.5))


@torch.no_grad()
def test_the_coupling_matrix_is_what_an_impulse_moves() -> None:
    spec = spec_of()
    model = make(spec, normalisation="window", directions="forward")
    found = coupling_matrix(model)
    frozen = shorter(model, settings={"normalisation": "none"})
    quiet = torch.zeros(1, L, V)
    mask = torch.ones(1, L, V, dtype=torch.bool)
    for i in range(V):
        loud = quiet.clone()
        loud[0, -1, i] = 1.0
        moved = raw(frozen, Batch(loud, mask)) - raw(frozen, Batch(quiet, mask))
        torch.testing.assert_close(found[i], moved[0, ..., 0].square().mean(0).sqrt(), atol=1e-6, rtol=1e-4)
    assert bool((found.tril(-1) == 0).all())  # forward only: nothing moves the variates before
    assert bool((found.triu() > 0)[torch.ones(V, V).triu().bool()].all())
    uncoupled = coupling_matrix(make(spec, coupling="none"))
    assert torch.equal(uncoupled, uncoupled.diag().diag())
