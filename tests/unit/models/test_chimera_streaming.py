"""Chimera as a forecaster: streaming step by step equals one pass over the whole window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chimera_cases import CLOSED, COVARIATES, V, make, raw, span, spec_of, wide
from torch import Tensor

from tsforge.contracts.tensors import Batch, Observation
from tsforge.core.errors import ModelError
from tsforge.models.chimera import Chimera
from tsforge.testing.generators import make_batch

# ---- streaming

STREAMS: list[dict[str, Any]] = [
    {"skip": "closed_form", "ridge": 10.0},
    {"conv": 4, "coupling": "pooled"},
    {"selective": False, "heads": "seasonal", "skip": "learned"},
    {"selective": False, "structure": "companion", "num_layers": 1},
    CLOSED,
    {**CLOSED, "coupling": "none", "variate_embedding": True, "conv": 4},
    {"variate_order": "corr", "head_mix": "residual"},
]


def ahead_of(batch: Batch) -> Tensor | None:
    return None if batch.known is None else batch.known[:, batch.context.shape[1] :]


@torch.no_grad()
def streamed(model: Chimera, batch: Batch) -> Tensor:
    state = model.initial_state(len(batch.context), batch.static)
    for t in range(batch.context.shape[1]):
        row = Observation(
            batch.context[:, t],
            batch.context_mask[:, t],
            None if batch.past is None else batch.past[:, t],
            None if batch.known is None else batch.known[:, t],
        )
        state = model.step(state, row)
    return model.free_run(state, ahead_of(batch)).raw


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("settings", STREAMS, ids=str)
@torch.no_grad()
def test_checklist_5_8_streaming_equals_one_forward_pass(settings: dict[str, Any]) -> None:
    spec = spec_of(context_length=40, num_params=2, **COVARIATES)
    model = make(spec, **settings)
    if settings.get("skip") == "closed_form" or settings.get("variate_order") == "corr":
        model.solve(span(spec))
    model = model.double()
    batch = wide(make_batch(spec, size=2, gaps=0.3))
    assert model.recurrent
    expected = raw(model, batch)
    assert gap(streamed(model, batch), expected) < 1e-12
    warm = model.warm_up(batch)
    kept = {name: part.clone() for name, part in warm.items()}
    assert gap(model.free_run(warm, ahead_of(batch)).raw, expected) < 1e-12
    assert all(torch.equal(warm[name], part) for name, part in kept.items())
    zero = model.initial_state(2, batch.static)
    assert {name: part.shape for name, part in zero.items()} == {name: part.shape for name, part in warm.items()}
    alone = {name: part[1:] for name, part in warm.items()}
    ahead = ahead_of(batch)
    assert gap(model.free_run(alone, None if ahead is None else ahead[1:]).raw, expected[1:]) < 1e-12


@torch.no_grad()
def test_a_warm_up_keeps_its_statistics() -> None:
    spec = spec_of(**COVARIATES)
    for normalisation in ("window", "last"):
        model, batch = make(spec, normalisation=normalisation, **CLOSED), make_batch(spec, gaps=0.3)
        state = model.warm_up(batch)
        torch.testing.assert_close(model.free_run(state, ahead_of(batch)).raw, raw(model, batch), atol=1e-5, rtol=1e-4)
        row = Observation(batch.context[:, 0], batch.context_mask[:, 0], batch.past[:, 0], batch.known[:, 0])
        after = model.step(state, row)
        assert torch.equal(after["loc"], state["loc"])
        assert torch.equal(after["scale"], state["scale"])


def test_patches_cannot_stream() -> None:
    model = make(spec_of(), patch_length=4)
    assert not model.recurrent
    for call in (
        lambda: model.initial_state(2),
        lambda: model.warm_up(make_batch(spec_of())),
        lambda: model.free_run({}),
        lambda: model.step({}, Observation(torch.zeros(1, V), torch.ones(1, V, dtype=torch.bool))),
    ):
        with pytest.raises(ModelError, match=r"patches of 4 steps .* model\.patch_length=1"):
            call()
