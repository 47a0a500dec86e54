"""The state space forecasters: settings, heads, patches, linear part, explanation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ssm_cases import (
    BASE,
    COVARIATES,
    HEADS,
    H,
    L,
    Model,
    ids_of,
    make,
    raw,
    rows_of,
    shorter,
    span,
    spec_of,
    whole,
)
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models.linear import Linear, LinearConfig
from tsforge.models.lssl import LSSLConfig
from tsforge.models.s4 import S4Config
from tsforge.testing.generators import make_batch
from tsforge.training.module import parameter_groups

# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 7}, r"model\.d_state: 7 is odd"),
        ({"d_state": 0}, r"model\.d_state: .*greater than or equal to 2"),
        ({"d_model": 0}, r"model\.d_model: "),
        ({"num_layers": 0}, r"model\.num_layers: "),
        ({"num_channels": 0}, r"model\.num_channels: "),
        ({"dropout": 1.0}, r"model\.dropout: "),
        ({"dropout": -0.1}, r"model\.dropout: "),
        ({"mixing": "some"}, r"model\.mixing: "),
        ({"normalisation": "batch"}, r"model\.normalisation: "),
        ({"patch_length": 0}, r"model\.patch_length: 0 must be at least 1"),
        ({"patch_length": 4, "head": "masked"}, r"model\.patch_length: patches need head direct and missing mask"),
        ({"patch_length": 4, "head": "rollout"}, r"model\.patch_length: patches need head direct"),
        ({"patch_length": 4, "missing": "skip"}, r"model\.patch_length: patches need .* missing mask"),
        ({"patch_length": None, "patch_stride": 2}, r"model\.patch_stride: give it together with patch_length"),
        ({"patch_length": 4, "patch_stride": 0}, r"model\.patch_stride: .*between 1 and that"),
        ({"patch_length": 4, "patch_stride": 5}, r"model\.patch_stride: .*between 1 and that"),
        ({"head": "rollout", "skip": "closed_form"}, r"model\.skip: a rollout head predicts one step; use skip none"),
        ({"head": "rollout", "skip": "learned"}, r"model\.skip: a rollout head"),
        ({"skip": "none", "ridge": 3.0}, r"model\.ridge has no effect with skip 'none'"),
        ({"skip": "learned", "ridge": 3.0}, r"model\.ridge has no effect with skip 'learned'"),
        ({"skip": "closed_form", "ridge": -3.0}, r"model\.ridge: "),
    ],
)
@pytest.mark.parametrize("name", ["s4", "lssl"])
def test_settings_that_contradict_each_other_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    config: type[Any] = S4Config if name == "s4" else LSSLConfig
    with pytest.raises(ConfigError, match=message):
        validate(config, BASE | settings, where="model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "s5"}, r"model\.kernel: "),
        ({"init": "legt"}, r"model\.init: kernel s4d starts from auto, lin, inv, legs"),
        ({"kernel": "s4", "init": "inv"}, r"model\.init: kernel s4 starts from auto, legs, lagt, legt"),
        ({"kernel": "lru", "init": "legs"}, r"model\.init: kernel lru starts from auto"),
        ({"kernel": "s4", "discretisation": "bilinear"}, r"model\.discretisation has no effect with kernel s4"),
        ({"kernel": "s4", "bandlimit": 0.5}, r"model\.bandlimit has no effect with kernel s4"),
        ({"kernel": "lru", "discretisation": "bilinear"}, r"model\.discretisation has no effect with kernel lru"),
        ({"kernel": "lru", "bandlimit": 0.5}, r"model\.bandlimit has no effect with kernel lru"),
        ({"kernel": "lru", "n_ssm": 2}, r"model\.n_ssm has no effect with kernel lru"),
        ({"kernel": "lru", "dt_min": 0.01}, r"model\.dt_min has no effect with kernel lru"),
        ({"kernel": "lru", "dt_max": 0.1}, r"model\.dt_max has no effect with kernel lru"),
        ({"kernel": "s4", "missing": "skip"}, r"model\.missing: irregular steps need kernel s4d"),
        ({"kernel": "lru", "missing": "skip"}, r"model\.missing: irregular steps need kernel s4d"),
        ({"discretisation": "bilinear", "missing": "skip"}, r"model\.missing: .* discretisation zoh"),
    ],
)
def test_settings_that_a_kernel_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(S4Config, BASE | settings, where="model")


def test_settings_of_lssl_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.missing: irregular steps need model s4 with kernel s4d"):
        validate(LSSLConfig, BASE | {"missing": "skip"}, where="model")
    with pytest.raises(ConfigError, match=r"model\.init: "):
        validate(LSSLConfig, BASE | {"init": "lin"}, where="model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_length": L + 1}, rf"model\.patch_length: {L + 1} exceeds context_length {L}"),
        ({"n_ssm": 5}, "n_ssm is 5; it must divide d_model, 12"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min 0.2 and dt_max 0.1 must satisfy"),
        ({"dt_min": 0.0, "dt_max": 0.1}, "dt_min 0 and dt_max 0.1 must satisfy"),
        ({"name": "lssl", "alpha": 0.3}, "alpha is 0.3"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spec_of(), **settings)


def test_step_sizes_follow_the_context_or_the_settings() -> None:
    model = make(spec_of(context_length=200), dt_min=0.03, dt_max=0.04)
    for layer in model.stack.layers():
        assert bool(((layer.dt(1.0) >= 0.03 - 1e-9) & (layer.dt(1.0) <= 0.04 + 1e-9)).all())
    for length in (2, 24, 200, 5000):  # 1 / dt_max <= L <= 1 / dt_min (LSSL, appendix B.3), where 1 allows it
        low, high = make(spec_of(context_length=length))._dt_range()
        assert low < high <= 1.0
        assert 1 / high <= length <= 1 / low or low == 0.1
    patched = make(spec_of(context_length=200), patch_length=20, patch_stride=20)
    assert patched._dt_range() == pytest.approx((1 / 40, 1.0))  # 10 steps


# ---- shapes and heads


@pytest.mark.parametrize("mixing", ["independent", "mixed"])
@pytest.mark.parametrize("settings", HEADS, ids=ids_of(HEADS))
def test_shapes(settings: dict[str, Any], mixing: str) -> None:
    spec = spec_of(num_params=3, **COVARIATES)
    model = make(spec, mixing=mixing, normalisation="window", **settings)
    found = model(make_batch(spec, size=4))
    assert found.raw.shape == (4, H, 2, 3)
    assert bool(torch.isfinite(found.raw).all())
    outputs = settings["head"] == "rollout" and "missing" not in settings
    assert (found.context_raw is not None) == outputs
    if outputs:
        assert found.context_raw.shape == (4, L, 2, 3)


def test_the_head_follows_the_known_covariates() -> None:
    assert make(spec_of(), head="auto").head_kind == "direct"
    assert make(spec_of(num_known=1), head="auto").head_kind == "masked"
    assert make(spec_of(num_known=1), head="auto", patch_length=4).head_kind == "direct"


@pytest.mark.parametrize("normalisation", ["none", "window"])
def test_a_rollout_feeds_its_means_back(normalisation: str) -> None:
    """Each further step is the one-step forecast of a context that ends with the forecasts so far."""
    spec = spec_of()
    model, batch = make(spec, head="rollout", normalisation=normalisation), whole(spec)
    expected, found = [], raw(model, batch)[..., 0]
    loc, scale = model._statistics(batch)
    frozen = shorter(model, settings={"normalisation": "none"}, horizon=1)  # statistics stay those of the start
    context = (batch.context - loc) / scale
    for _ in range(H):
        longer = shorter(frozen, context_length=context.shape[1])
        step = raw(longer, Batch(context, torch.ones_like(context, dtype=torch.bool)))[..., 0]
        expected.append(step * scale + loc)
        context = torch.cat([context, step], dim=1)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)


def test_a_rollout_gives_the_one_step_forecasts_of_its_context() -> None:
    spec = spec_of()
    model, batch = make(spec, head="rollout"), whole(spec)
    with torch.no_grad():
        found = model(batch).context_raw
    assert not found[:, 0].any()  # nothing was seen: the mean of the training span
    for t in (1, 2, 17, L - 1):
        past = Batch(batch.context[:, :t], batch.context_mask[:, :t])
        expected = raw(shorter(model, context_length=t, horizon=1), past)
        torch.testing.assert_close(found[:, t : t + 1], expected, atol=1e-5, rtol=1e-4)


def test_no_window_changes_what_others_are_trained_on() -> None:
    """Steps that hold nothing have no feature: with them skipped no window tells its context, gaps or not."""
    spec = spec_of()
    model, batch = make(spec, head="rollout", missing="skip"), make_batch(spec, size=4)
    assert not batch.context_mask.all()
    for one in (batch, whole(spec, size=4)):
        assert model(one).context_raw is None
    assert not type(model).capabilities_of(model.config).context_outputs
    assert type(model).capabilities_of(make(spec, head="rollout").config).context_outputs
    assert not type(model).capabilities_of(make(spec, head="masked").config).context_outputs


def test_a_masked_head_answers_a_longer_horizon_with_the_same_first_steps() -> None:
    spec = spec_of(num_known=1)
    model, batch = make(spec, head="masked"), whole(spec)
    brief = batch._replace(known=batch.known[:, : L + 2])
    torch.testing.assert_close(raw(shorter(model, horizon=2), brief), raw(model, batch)[:, :2], atol=1e-5, rtol=1e-5)


def test_a_masked_head_tells_the_horizon_from_missing_rows() -> None:
    """The flag of the horizon enters: with its weights at zero the forecast is another one."""
    spec = spec_of()
    model, batch = make(spec, head="masked"), whole(spec)
    before = raw(model, batch)
    with torch.no_grad():
        model.embed.weight[:, -1] = 0.0
    assert not torch.allclose(raw(model, batch), before, atol=1e-3)


def test_the_untrained_stack_adds_nothing() -> None:
    spec = spec_of(num_known=1)
    batch = make_batch(spec, size=4)
    for head in ("direct", "masked", "rollout"):
        for normalisation in ("none", "window", "last"):
            model = make(spec, shaken=False, head=head, normalisation=normalisation)
            loc, _ = model._statistics(batch)
            assert torch.equal(raw(model, batch)[..., 0], loc.expand(-1, H, -1))


# ---- patches


def captured(model: Model, batch: Batch) -> Tensor:
    """Return what enters the embedding."""
    seen: list[Tensor] = []
    handle = model.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    raw(model, batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("length", "stride", "context"), [(4, 2, 11), (4, 2, 10), (5, 5, 5), (6, 4, 24), (3, 1, 9)])
def test_patches_end_at_the_last_row(length: int, stride: int, context: int) -> None:
    spec = spec_of(context_length=context)
    model = make(spec, patch_length=length, patch_stride=stride)
    batch = whole(spec, size=2)
    found = captured(model, batch).unflatten(2, (2, length))  # [B V, T, (value, mask), P]
    count = -(-(context - length) // stride) + 1
    assert found.shape == (4, count, 2, length)
    series = batch.context.transpose(1, 2).flatten(0, 1)  # [B V, L]
    for token in range(count):
        stop = context - (count - 1 - token) * stride
        rows = range(stop - length, stop)
        expected = torch.stack([series[:, t] if t >= 0 else torch.zeros(4) for t in rows], dim=1)
        assert torch.equal(found[:, token, 0], expected)
        assert torch.equal(found[:, token, 1], torch.tensor([float(t >= 0) for t in rows]).expand(4, -1))
    assert bool(found[:, 0, 1].all()) == ((context - length) % stride == 0)  # else the oldest patch is padded


def test_every_row_reaches_a_patched_forecast() -> None:
    spec = spec_of(context_length=11)
    model, batch = make(spec, patch_length=4, patch_stride=2), whole(spec)
    context = batch.context.clone().requires_grad_()
    model(batch._replace(context=context)).raw.sum().backward()
    assert float(context.grad.abs().amax((0, 2)).min()) > 1e-6


def test_patches_cannot_be_carried_forward() -> None:
    spec = spec_of()
    model, batch = make(spec, patch_length=4), whole(spec)
    assert not model.recurrent
    row = next(rows_of(batch))
    for run in (
        lambda: model.initial_state(3),
        lambda: model.warm_up(batch),
        lambda: model.step({}, row),
        lambda: model.free_run({}),
    ):
        with pytest.raises(ModelError, match=r"patches of 4 steps cannot .* model\.patch_length=1"):
            run()


# ---- the linear part


def frozen_linear(config: LinearConfig, spec: DataSpec, data: TrainingSeries) -> Linear:
    """Return model ``linear``, solved. Frozen as well: a matrix product may round otherwise where a gradient is due."""
    torch.manual_seed(77)
    model = Linear(config, spec)
    model.solve(data)
    model.weight.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize("params", [1, 3])
@pytest.mark.parametrize("ridge", [10.0, None])
def test_training_starts_at_the_linear_model(ridge: float | None, params: int) -> None:
    spec = spec_of(num_params=params)
    data, batch = span(spec), make_batch(spec, size=6)
    cases: list[dict[str, Any]] = [
        {"head": "direct", "normalisation": "window"},
        {"head": "masked", "normalisation": "none"},
        {"head": "direct", "patch_length": 4, "normalisation": "last", "mixing": "mixed"},
        {"name": "lssl"},
    ]
    for case in cases:
        model = make(spec, shaken=False, skip="closed_form", ridge=ridge, **case)
        before = raw(model, batch)
        report = model.solve(data)
        assert report is not None
        assert not report.finished
        assert not torch.equal(raw(model, batch), before)
        config = LinearConfig(ridge=10.0, remove="window_mean", weights="shared") if ridge else model.skip.config
        assert config.ridge == ridge
        assert torch.equal(raw(model, batch), raw(frozen_linear(config, spec, data), batch))


def test_skip_auto_is_closed_form_without_a_rollout() -> None:
    spec = spec_of()
    data = span(spec)
    assert make(spec, skip="auto", ridge=10.0).solve(data) is not None
    assert make(spec, skip="auto", head="rollout").skip is None
    for skip in ("none", "learned"):
        assert make(spec, skip=skip).solve(data) is None


def trained(model: Model, steps: int = 5, rate: float = 0.01) -> set[str]:
    """Train for some steps and return the names of the parameters that did not move."""
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, 0.0), lr=rate)
    model.train()
    for step in range(steps):
        batch = make_batch(model.spec, size=16, seed=step)
        optimizer.zero_grad()
        prediction = model(batch)
        loss = (prediction.raw[..., 0] - batch.target).square().mean() + (prediction.raw[..., 1:] - 1).square().mean()
        loss.backward()
        optimizer.step()
    model.eval()
    return {name for name, part in model.named_parameters() if torch.equal(part, before[name])}


@pytest.mark.parametrize("name", ["s4", "lssl"])
def test_the_solved_weights_stay_and_the_rest_is_trained(name: str) -> None:
    spec = spec_of(num_params=2)
    model = make(spec, shaken=False, name=name, skip="closed_form", ridge=10.0)
    model.solve(span(spec))
    assert trained(model) == {"skip.weight"}
    assert not model.skip.weight.requires_grad


def test_a_learned_skip_is_trained_with_the_rest() -> None:
    spec = spec_of(num_params=2)
    model = make(spec, shaken=False, skip="learned")
    assert trained(model) == set()


def test_components_add_up_to_the_forecast() -> None:
    spec = spec_of(**COVARIATES)
    batch = make_batch(spec, size=4)
    for settings in ({"normalisation": "window"}, {"head": "masked"}, {"patch_length": 4, "mixing": "mixed"}):
        model = make(spec, skip="closed_form", ridge=10.0, **settings)
        model.solve(span(spec))
        with torch.no_grad():
            parts = model.components(batch)
            assert {"lags", "offset", "state_space"} < set(parts)
            assert all(part.shape == (4, H, 2) for part in parts.values())
            torch.testing.assert_close(sum(parts.values()), raw(model, batch)[..., 0], atol=1e-5, rtol=1e-5)
            assert float(parts["state_space"].abs().max()) > 1e-3
            alone = model.skip(Batch(batch.context, batch.context_mask)).raw[..., 0]
            rest = sum(part for name, part in parts.items() if name != "state_space")
            torch.testing.assert_close(rest, alone, atol=1e-5, rtol=1e-5)
    assert make(spec, skip="none").components(batch) == {}


# ---- explanation and errors


@pytest.mark.parametrize(
    "settings", [{}, {"patch_length": 4, "patch_stride": 2}, {"kernel": "lru"}, {"kernel": "s4"}, {"name": "lssl"}]
)
@pytest.mark.parametrize("context", [24, 600])
def test_explanation(settings: dict[str, Any], context: int) -> None:
    model = make(spec_of(context_length=context), **settings).train()
    found = model.explain()
    assert model.training
    assert set(found) == {"memory", "timescales", "kernels"}
    assert [set(record) for record in found["memory"]] == [{"layer", "p10", "median", "p90", "longest"}] * 2
    assert [record["layer"] for record in found["memory"]] == [0, 1]
    for record in found["memory"]:
        assert 1 <= record["p10"] <= record["median"] <= record["p90"] <= record["longest"] <= context
    assert len(found["timescales"]) == 2 * 12
    for record in found["timescales"]:
        assert set(record) == {"layer", "feature", "dt", "memory"}
        assert 0.0 < record["dt"] <= 1.0
        assert 1 <= record["memory"] <= context
    for record in found["kernels"]:
        assert set(record) == {"layer", "feature", "lag", "weight"}
        assert 0 <= record["lag"] < context
    plain = [value for part in found.values() for record in part for value in record.values()]
    assert all(isinstance(value, int | float) for value in plain)
    shown = {(record["layer"], record["feature"]) for record in found["kernels"]}
    layer, feature = next(iter(sorted(shown)))
    curve = [r for r in found["kernels"] if (r["layer"], r["feature"]) == (layer, feature)]
    with torch.no_grad():
        kernel = model.eval().stack.layers()[layer].kernel(context)[0, feature]
    for record in curve[:20]:
        assert record["weight"] == pytest.approx(float(kernel[record["lag"] // model.stride]), abs=1e-5)


def test_memory_does_not_exceed_the_context() -> None:
    """Three patches of four steps cover a context of ten; slow systems remember all of it."""
    model = make(spec_of(context_length=10), patch_length=4, patch_stride=4, dt_min=1e-4, dt_max=1e-3)
    assert [record["longest"] for record in model.explain()["memory"]] == [10.0, 10.0]


@pytest.mark.parametrize("name", ["s4", "lssl"])
def test_checklist_22_a_broken_parameter_names_its_layer(name: str) -> None:
    spec = spec_of()
    model = make(spec, name=name)
    with torch.no_grad():
        model.stack.layers()[1].C.view(-1)[0] = torch.nan  # type: ignore[operator]
    for mode in (True, False):
        with pytest.raises(ModelError, match=rf"layer {name}\.1"):
            model.train(mode)(whole(spec))
