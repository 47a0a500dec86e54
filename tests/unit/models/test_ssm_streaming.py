"""The state space forecasters: missing rows, irregular steps and streams."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from ssm_cases import (
    COVARIATES,
    H,
    L,
    Model,
    ahead_of,
    ids_of,
    make,
    raw,
    rows_of,
    shorter,
    span,
    spec_of,
    streamed,
    whole,
)
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.models._ssm_rows import compact, last_index, shifted
from tsforge.testing.generators import make_batch

# ---- missing rows


def test_compact_by_hand() -> None:
    seen = torch.tensor([[False, True, False, False, True], [True, True, False, True, False], [False] * 5])
    inputs = torch.arange(1.0, 6.0).view(1, 5, 1).expand(3, -1, 2).contiguous()
    assert last_index(seen).tolist() == [4, 3, -1]
    rows, took = compact(inputs, seen)
    # the second row ends with an empty step that reaches the last grid step, the third is only that
    assert took.tolist() == [[0.0, 0.0, 1.0, 3.0], [1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    assert rows[..., 0].tolist() == [[0.0, 0.0, 2.0, 5.0], [1.0, 2.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(rows[..., 1], torch.log1p(took))
    rows, took = compact(inputs, seen, closes=False)
    assert took.tolist() == [[0.0, 1.0, 3.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]
    assert rows[..., 0].tolist() == [[0.0, 2.0, 5.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]


def test_shifted_by_hand() -> None:
    context = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).unsqueeze(-1).repeat(3, 1, 1)
    state = {"context": context, "context_mask": torch.ones(3, 4, 1, dtype=torch.bool)}
    row = Observation(torch.full((3, 1), 9.0), torch.tensor([[True], [True], [False]]))
    values, mask = shifted(state, row)
    assert values[..., 0].tolist() == [[2.0, 3.0, 4.0, 9.0], [2.0, 3.0, 4.0, 9.0], [2.0, 3.0, 4.0, 0.0]]
    assert mask[..., 0].tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    values, mask = shifted(state, row._replace(elapsed=torch.tensor([1, 3, 7])))
    assert values[..., 0].tolist() == [[2.0, 3.0, 4.0, 9.0], [4.0, 0.0, 0.0, 9.0], [0.0] * 4]
    assert mask[..., 0].tolist() == [[True] * 4, [True, False, False, True], [False] * 4]


@pytest.mark.parametrize("ends", [True, False])
def test_skipped_rows_by_hand(ends: bool) -> None:
    """One series: only observed rows enter, each with the logarithm of the time since the one before."""
    spec = spec_of(num_variates=1)
    model = make(spec, missing="skip")
    places = [2, 3, 7, 15, L - 1] if ends else [2, 3, 7, 15, 20]
    batch = whole(spec, size=1)
    mask = torch.zeros(1, L, 1, dtype=torch.bool)
    mask[0, places] = True
    values = [float(batch.context[0, t, 0]) for t in places]
    took = [1.0, *(float(b - a) for a, b in pairwise(places))]
    seen = [1.0] * len(places)
    if not ends:  # the state still has to reach the last grid step
        values, took, seen = [*values, 0.0], [*took, float(L - 1 - places[-1])], [*seen, 0.0]
    elapsed = torch.tensor([took])
    inputs = torch.stack([torch.tensor([values]), torch.tensor([seen]), torch.log1p(elapsed)], dim=-1)
    with torch.no_grad():
        features, _ = model.stack(model.embed(inputs), elapsed=elapsed)
        expected = model.head(features[:, -1]).view(1, H, 1, 1)
    found = raw(model, Batch(torch.where(mask, batch.context, 0.0), mask))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_skipped_rows_before_the_first_observation_do_not_matter() -> None:
    spec = spec_of()
    model, batch = make(spec, missing="skip", mixing="mixed", head="masked"), whole(spec)
    mask = batch.context_mask.clone()
    mask[:, :9] = False
    late = Batch(torch.where(mask, batch.context, 0.0), mask)
    brief = Batch(batch.context[:, 9:], batch.context_mask[:, 9:])
    torch.testing.assert_close(raw(model, late), raw(shorter(model, context_length=L - 9), brief), atol=1e-5, rtol=1e-5)


def test_masked_rows_are_steps_and_skipped_rows_are_none() -> None:
    """The stack of ``skip`` runs over observed rows only, and over the last one."""
    spec = spec_of(num_variates=1)
    skipping = make(spec, missing="skip")
    batch = whole(spec, size=1)
    few = batch.context_mask.clone()
    few[:, 3:-1] = False
    seen: list[tuple[int, ...]] = []
    handle = skipping.embed.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    raw(skipping, batch)
    raw(skipping, Batch(torch.where(few, batch.context, 0.0), few))
    handle.remove()
    assert [shape[1] for shape in seen] == [L, 4]


# ---- streaming

STREAMS: list[dict[str, Any]] = [
    {"kernel": "s4d", "head": "direct", "skip": "closed_form", "ridge": 10.0},
    {"kernel": "s4", "head": "masked", "mixing": "mixed", "num_channels": 2},
    {"kernel": "lru", "head": "rollout"},
    {"kernel": "s4d", "head": "masked", "missing": "skip", "skip": "learned"},
    {"kernel": "s4d", "head": "rollout", "missing": "skip", "num_layers": 1},
    {"name": "lssl", "head": "direct", "mixing": "mixed"},
    {"name": "lssl", "head": "masked", "shares_a": False, "skip": "learned"},
]


def built_stream(settings: dict[str, Any], spec: DataSpec) -> Model:
    model = make(spec, **settings)
    if settings.get("skip") == "closed_form":
        model.solve(span(spec))
    return model


@pytest.mark.parametrize("settings", STREAMS, ids=ids_of(STREAMS))
def test_checklist_15_streaming_200_rows_equals_one_forward_pass(settings: dict[str, Any]) -> None:
    spec = spec_of(context_length=200, **COVARIATES)
    model = built_stream(settings, spec).double()
    batch = wide(make_batch(spec, size=2))
    assert model.recurrent
    torch.testing.assert_close(streamed(model, batch).raw, raw(model, batch), atol=1e-8, rtol=0)


def cut(batch: Batch, rows: slice) -> Batch:
    """Return some rows of the context; known covariates of the horizon are left out."""
    parts = {name: getattr(batch, name)[:, rows] for name in ("context", "context_mask", "past")}
    return batch._replace(known=batch.known[:, : batch.context.shape[1]][:, rows], **parts)


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def wide(batch: Batch) -> Batch:
    return Batch(*[part.double() if part is not None and part.is_floating_point() else part for part in batch])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", STREAMS, ids=ids_of(STREAMS))
@torch.no_grad()
def test_checklist_15_chunks_of_any_size_equal_one_pass(settings: dict[str, Any], seed: int) -> None:
    """200 rows of the whole network, cut at random: the rows before a cut warm it up, those after it are steps.

    And the stack alone, in as many pieces as there are cuts.
    """
    spec = spec_of(context_length=200, **COVARIATES)
    small = built_stream(settings, spec)
    cuts = sorted({1, *np.random.default_rng(seed).integers(2, 199, size=5).tolist()})
    parts = [] if "skip" in settings else [(at, shorter(small, context_length=at).double()) for at in cuts[1::2]]
    model, batch = small.double(), wide(make_batch(spec, size=2, gaps=0.3, seed=seed))
    expected = raw(model, batch)
    for at, early in parts:
        state = early.warm_up(cut(batch, slice(at)))
        for row in rows_of(cut(batch, slice(at, None))):
            state = model.step(state, row)
        assert gap(model.free_run(state, ahead_of(batch)).raw, expected) < 1e-11
    rows = model._rows_of(batch, *model._statistics(batch))
    tokens = model._embed(rows.inputs, batch.static)
    whole, ends = model.stack(tokens, elapsed=rows.elapsed, with_states=True)
    states, pieces = model.stack.default_states(len(tokens)), []
    cuts = [at for at in cuts if at < tokens.shape[1]]
    assert len(cuts) > 1
    for first, last in pairwise([0, *cuts, tokens.shape[1]]):
        took = None if rows.elapsed is None else rows.elapsed[:, first:last]
        piece, states = model.stack(tokens[:, first:last], states, elapsed=took, with_states=True)
        pieces.append(piece)
    assert gap(torch.cat(pieces, dim=1), whole) < 1e-11
    for found_state, end in zip(states, ends, strict=True):
        assert gap(found_state, end) < 1e-11


@pytest.mark.parametrize("normalisation", ["none", "window", "last"])
@pytest.mark.parametrize("settings", STREAMS, ids=ids_of(STREAMS))
def test_warming_up_and_running_free_equals_forward(settings: dict[str, Any], normalisation: str) -> None:
    spec = spec_of(**COVARIATES)
    model = built_stream(settings | {"normalisation": normalisation}, spec)
    batch = make_batch(spec, size=3, gaps=0.3)
    state = model.warm_up(batch)
    kept = {name: part.clone() for name, part in state.items()}
    found = model.free_run(state, ahead_of(batch)).raw
    torch.testing.assert_close(found, raw(model, batch), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(state[name], part) for name, part in kept.items())  # running free changes no state


CARRIED = [case for case in STREAMS if "skip" not in case]
"""Without a linear part, which reads a window of fixed length."""


@pytest.mark.parametrize("normalisation", ["none", "window", "last"])
@pytest.mark.parametrize("settings", CARRIED, ids=ids_of(CARRIED))
@torch.no_grad()
def test_rows_after_a_warm_up_continue_it(settings: dict[str, Any], normalisation: str) -> None:
    """A warm-up on 25 rows and steps for 15 equal forward on 40, in the units of the first 25."""
    spec = spec_of(context_length=40, **COVARIATES)
    model = make(spec, normalisation=normalisation, **settings)
    batch = make_batch(spec, size=2, gaps=0.3)
    early = cut(batch, slice(25))
    state = shorter(model, context_length=25).warm_up(early)
    for row in rows_of(cut(batch, slice(25, None))):
        state = model.step(state, row)
    found = model.free_run(state, ahead_of(batch)).raw[..., 0]
    loc, scale = model._statistics(early)
    own = batch._replace(context=torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0))
    expected = raw(shorter(model, settings={"normalisation": "none"}), own)[..., 0] * scale + loc
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", STREAMS, ids=ids_of(STREAMS))
@torch.no_grad()
def test_rows_without_any_observation(settings: dict[str, Any]) -> None:
    """One variate or series was never observed: streamed, warmed up or whole, the forecast is the same and finite."""
    spec = spec_of(**COVARIATES)
    model, batch = built_stream(settings, spec), make_batch(spec, size=3)
    mask = batch.context_mask.clone()
    mask[0], mask[1, :, 0] = False, False
    batch = batch._replace(context=torch.where(mask, batch.context, 0.0), context_mask=mask)
    expected = raw(model, batch)
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(streamed(model, batch).raw, expected, atol=1e-5, rtol=1e-4)
    warm = model.free_run(model.warm_up(batch), ahead_of(batch)).raw
    torch.testing.assert_close(warm, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixing", ["independent", "mixed"])
@pytest.mark.parametrize("skip", ["none", "learned"])
@torch.no_grad()
def test_elapsed_time_equals_unobserved_rows(mixing: str, skip: str) -> None:
    spec = spec_of()
    model = make(spec, missing="skip", mixing=mixing, skip=skip)
    rng = torch.Generator().manual_seed(1)
    values = torch.randn(2, 60, 2, generator=rng)
    places = [4, 5, 11, 12, 13, 30, 59]
    unseen = torch.zeros(2, 2, dtype=torch.bool)
    partly = torch.tensor([[True, False], [True, True]])
    every, brief = model.initial_state(2), model.initial_state(2)
    for t in range(60):
        seen = (partly if t == 11 else ~unseen) if t in places else unseen
        every = model.step(every, Observation(values[:, t], seen))
    previous = -1
    for t in places:
        seen = partly if t == 11 else ~unseen
        elapsed = torch.full((2,), t - previous)
        brief = model.step(brief, Observation(values[:, t], seen, elapsed=elapsed))
        previous = t
    torch.testing.assert_close(model.free_run(brief).raw, model.free_run(every).raw, atol=1e-5, rtol=1e-4)
    assert every.keys() == brief.keys()
    for name, part in every.items():
        torch.testing.assert_close(brief[name], part, atol=1e-5, rtol=1e-4)
    other = model.step(model.initial_state(2), Observation(values[:, 4], ~unseen))
    assert not torch.allclose(model.free_run(other).raw, model.free_run(brief).raw, atol=1e-3)


@torch.no_grad()
def test_series_of_a_state_are_independent_of_each_other() -> None:
    """The first axis of every tensor is the series: a state can be split and stacked."""
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, missing="skip", head="masked", skip="learned"), make_batch(spec, size=3)
    state = model.warm_up(batch)
    alone = {name: part[1:2] for name, part in state.items()}
    found = model.free_run(alone, ahead_of(batch)[1:2]).raw
    torch.testing.assert_close(found, model.free_run(state, ahead_of(batch)).raw[1:2], atol=1e-6, rtol=1e-5)
