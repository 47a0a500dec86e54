"""The state space forecasters: normalisation, variates, covariates and what must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ssm_cases import (
    COVARIATES,
    HEADS,
    H,
    L,
    ids_of,
    make,
    raw,
    span,
    spec_of,
    whole,
)

from tsforge.contracts.tensors import Batch
from tsforge.testing.generators import make_batch

# ---- normalisation


def test_statistics_read_observed_values_only() -> None:
    spec = spec_of(num_variates=1)
    values = torch.arange(float(L)).view(1, L, 1).repeat(3, 1, 1)
    mask = torch.ones(3, L, 1, dtype=torch.bool)
    mask[1, ::2] = False
    mask[1, -3:] = False
    mask[2] = False
    batch = Batch(torch.where(mask, values, 1e6), mask)
    seen = values[0, :, 0]
    some = seen[1 : L - 3 : 2]
    loc, scale = make(spec, normalisation="window")._statistics(batch)
    assert loc[:, 0, 0].tolist() == pytest.approx([float(seen.mean()), float(some.mean()), 0.0])
    expected = [float(seen.std(correction=0)), float(some.std(correction=0)), 1.0]
    assert scale[:, 0, 0].tolist() == pytest.approx(expected)
    loc, scale = make(spec, normalisation="last")._statistics(batch)
    assert loc[:, 0, 0].tolist() == [L - 1.0, float(some[-1]), 0.0]
    assert scale[:, 0, 0].tolist() == pytest.approx(expected)
    loc, scale = make(spec, normalisation="none")._statistics(batch)
    assert not loc.any()
    assert bool((scale == 1.0).all())


def test_a_constant_context_keeps_scale_one() -> None:
    spec = spec_of(num_variates=1)
    batch = Batch(torch.full((1, L, 1), 7.0), torch.ones(1, L, 1, dtype=torch.bool))
    model = make(spec, normalisation="window", shaken=False)
    assert float(model._statistics(batch)[1]) == 1.0
    assert raw(model, batch).flatten().tolist() == [7.0] * H


@pytest.mark.parametrize("num_params", [1, 3])
@pytest.mark.parametrize("normalisation", ["window", "last"])
@pytest.mark.parametrize(
    "settings",
    [
        {"skip": "closed_form", "ridge": 5.0},
        {"kernel": "lru", "mixing": "mixed"},
        {"kernel": "s4", "head": "masked"},
        {"head": "rollout"},
        {"missing": "skip"},
        {"name": "lssl", "patch_length": 6, "skip": "learned"},
    ],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_checklist_23_forecasts_move_and_stretch_with_the_context(
    settings: dict[str, Any], normalisation: str, num_params: int
) -> None:
    spec = spec_of(num_params=num_params)
    model = make(spec, normalisation=normalisation, **settings)
    if settings.get("skip") == "closed_form":
        model.solve(span(spec))
    batch = make_batch(spec, size=4, gaps=0.0 if "skip" in settings else 0.2)
    found = raw(model, batch)[..., 0]
    for factor, shift in ((3.7, 0.0), (0.2, 5.0), (12.0, -40.0)):
        moved = batch._replace(context=torch.where(batch.context_mask, factor * batch.context + shift, 0.0))
        expected = factor * found + shift
        difference = (raw(model, moved)[..., 0] - expected).abs().max()
        assert float(difference) < 1e-4 * factor * float(found.abs().max())
        if num_params > 1 and factor != 1.0:  # the spread is told how large the context was
            assert float((raw(model, moved)[..., 1:] - raw(model, batch)[..., 1:]).abs().max()) > 1e-3


def test_without_normalisation_the_level_matters() -> None:
    spec = spec_of()
    model, batch = make(spec, normalisation="none"), whole(spec)
    moved = raw(model, batch._replace(context=batch.context + 1.0))
    assert float((moved - raw(model, batch) - 1.0).abs().max()) > 0.1


# ---- variates and covariates


@pytest.mark.parametrize("normalisation", ["none", "window"])
@pytest.mark.parametrize("skip", ["none", "learned"])
@pytest.mark.parametrize("missing", ["mask", "skip"])
def test_independent_variates_do_not_see_each_other(normalisation: str, skip: str, missing: str) -> None:
    spec = spec_of(num_variates=3, num_known=1)
    batch = make_batch(spec, size=4)
    changed = batch.context.clone()
    changed[..., 1] += torch.randn(4, L, generator=torch.Generator().manual_seed(9))
    changed = torch.where(batch.context_mask, changed, 0.0)
    settings = {"normalisation": normalisation, "skip": skip, "missing": missing}
    for mixing, others in (("independent", False), ("mixed", True)):
        model = make(spec, mixing=mixing, **settings)
        difference = (raw(model, batch._replace(context=changed)) - raw(model, batch)).abs().amax((0, 1, 3))
        assert float(difference[1]) > 1e-3
        assert (float(difference[0]) > 1e-6) == others
        assert (float(difference[2]) > 1e-6) == others


def test_independent_variates_share_weights_but_know_who_they_are() -> None:
    spec = spec_of()
    model = make(spec)
    batch = whole(spec)
    same = batch._replace(context=batch.context[..., :1].expand(-1, -1, 2).contiguous())
    found = raw(model, same)
    assert float((found[:, :, 0] - found[:, :, 1]).abs().max()) > 1e-4
    with torch.no_grad():
        model.variate.zero_()
    found = raw(model, same)
    torch.testing.assert_close(found[:, :, 0], found[:, :, 1])
    assert not hasattr(make(spec_of(num_variates=1)), "variate")
    assert not hasattr(make(spec, mixing="mixed"), "variate")


@pytest.mark.parametrize("settings", HEADS, ids=ids_of(HEADS))
def test_leak_the_target_is_never_read(settings: dict[str, Any]) -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, normalisation="window", **settings), make_batch(spec, size=4)
    found = raw(model, batch._replace(target=None, target_mask=None))
    for target in (batch.target, torch.full_like(batch.target, torch.nan)):
        mask = torch.ones_like(batch.target_mask)
        assert torch.equal(raw(model, batch._replace(target=target, target_mask=mask)), found)


@pytest.mark.parametrize("settings", HEADS, ids=ids_of(HEADS))
def test_leak_unobserved_cells_are_never_read(settings: dict[str, Any]) -> None:
    spec = spec_of()
    model, batch = make(spec, normalisation="last", **settings), make_batch(spec, size=4, gaps=0.3)
    noise = torch.randn(batch.context.shape, generator=torch.Generator().manual_seed(3))
    poisoned = torch.where(batch.context_mask, batch.context, 100.0 * noise)
    assert torch.equal(raw(model, batch._replace(context=poisoned)), raw(model, batch))


@pytest.mark.parametrize("missing", ["mask", "skip"])
@pytest.mark.parametrize("head", ["masked", "rollout"])
def test_leak_heads_over_steps_read_known_covariates_step_by_step(head: str, missing: str) -> None:
    """Covariates of step t of the horizon reach the forecasts of t and later, none before."""
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, head=head, missing=missing).double(), make_batch(spec, size=2)
    batch = Batch(*[part.double() if part is not None and part.is_floating_point() else part for part in batch])
    known = batch.known.clone().requires_grad_()
    forecast = model(batch._replace(known=known)).raw
    for t in range(H):
        (gradient,) = torch.autograd.grad(forecast[:, t].sum(), known, retain_graph=True)
        ahead = gradient[:, L:].abs().amax((0, 2))
        assert float(ahead[t + 1 :].sum()) < 1e-12
        assert float(ahead[: t + 1].min()) > 1e-6
        assert float(gradient[:, :L].abs().max()) > 1e-6


def test_leak_a_direct_head_reads_the_known_covariates_of_the_step_itself() -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, head="direct"), make_batch(spec, size=2)
    known = batch.known.clone().requires_grad_()
    forecast = model(batch._replace(known=known)).raw
    for t in range(H):
        (gradient,) = torch.autograd.grad(forecast[:, t].sum(), known, retain_graph=True)
        ahead = gradient[:, L:].abs().amax((0, 2))
        assert float(ahead[t]) > 1e-3
        assert float(ahead.sum() - ahead[t]) == 0.0


def test_leak_the_embedding_is_causal() -> None:
    """The one-step forecasts of a rollout head read values before their own step, and what is known for it."""
    spec = spec_of(num_variates=1, num_past=1, num_known=1)
    model, batch = make(spec, head="rollout").double(), whole(spec, size=1)
    parts = [part.double().requires_grad_() for part in (batch.context, batch.past, batch.known)]
    found = model(Batch(parts[0], batch.context_mask, past=parts[1], known=parts[2])).context_raw
    for t in (3, 12, L - 1):
        gradients = torch.autograd.grad(found[:, t].sum(), parts, retain_graph=True)
        for gradient, first_unread in zip(gradients, (t, t, t + 1), strict=True):
            assert not gradient[:, first_unread:].abs().any()
            assert float(gradient[:, first_unread - 1].abs().max()) > 1e-6
            assert float(gradient[:, t - 1].abs().max()) > 1e-6


def test_a_rollout_of_a_version_without_that_map_is_read_as_it_was() -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, head="rollout"), whole(spec)
    with torch.no_grad():
        model.ahead.weight.zero_()
    stored = {name: part for name, part in model.state_dict().items() if not name.startswith("ahead")}
    other = make(spec, head="rollout", seed=1)
    other.load_state_dict(stored)
    assert torch.equal(raw(other, batch), raw(model, batch))
    with pytest.raises(RuntimeError, match="ahead"):
        make(spec, head="direct").load_state_dict(stored)


@pytest.mark.parametrize("field", ["past", "known", "static"])
@pytest.mark.parametrize("settings", HEADS, ids=ids_of(HEADS))
def test_every_covariate_reaches_the_forecast(settings: dict[str, Any], field: str) -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, **settings), whole(spec)
    changed = batch._replace(**{field: getattr(batch, field) + 1.0})
    assert float((raw(model, changed) - raw(model, batch)).abs().max()) > 1e-3
