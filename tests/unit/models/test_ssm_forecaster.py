"""The state space forecasters: inputs, heads, linear part, streaming and what they must not read.

Settings are spelled out, so that nothing here depends on a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.contracts.model import ForecastModel
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models._ssm_forecaster import SSMForecaster
from tsforge.models._ssm_rows import compact, last_index, shifted
from tsforge.models.linear import Linear, LinearConfig
from tsforge.models.lssl import LSSL, LSSLConfig
from tsforge.models.s4 import S4, S4Config
from tsforge.testing.generators import make_batch
from tsforge.training.module import parameter_groups

Model = SSMForecaster[Any]
L, H = 24, 5
BASE: dict[str, Any] = {
    "d_model": 12,
    "d_state": 8,
    "num_layers": 2,
    "num_channels": 1,
    "dropout": 0.1,
    "mixing": "independent",
    "head": "direct",
    "normalisation": "none",
    "patch_length": 1,
    "skip": "none",
    "missing": "mask",
}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": 2, **sizes})


COVARIATES = {"num_known": 2, "num_past": 1, "num_static": 2}


def make(spec: DataSpec, *, seed: int = 0, shaken: bool = True, name: str = "s4", **settings: Any) -> Model:
    """Return a model in evaluation mode, by default with noise in the parts that start at zero."""
    torch.manual_seed(seed)
    model: Model
    if name == "lssl":
        model = LSSL(validate(LSSLConfig, BASE | settings, where="model"), spec)
    else:
        model = S4(validate(S4Config, BASE | settings, where="model"), spec)
    if shaken:
        with torch.no_grad():
            for key, part in model.named_parameters():
                if key.startswith(("head", "ahead", "spread", "skip.spread")):
                    part.add_(0.3 * torch.randn_like(part))
    return model.eval()


@torch.no_grad()
def raw(model: ForecastModel[Any], batch: Batch) -> Tensor:
    return model(batch).raw


def span(spec: DataSpec) -> TrainingSeries:
    """Return a training span of two series without gaps: a season, its drift and noise."""
    rng = np.random.default_rng(5)
    rows = 2 * (spec.context_length + spec.horizon) + 100
    season = np.sin(2 * np.pi * (np.arange(2 * rows)[:, None] / 8 + np.arange(spec.num_variates) / 5))
    values = torch.from_numpy(
        season + 0.05 * rng.normal(size=season.shape).cumsum(0) + 0.3 * rng.normal(size=season.shape)
    )
    return TrainingSeries(
        values, torch.ones_like(values, dtype=torch.bool), torch.tensor([0, rows, 2 * rows]), torch.tensor([0, 0])
    )


def whole(spec: DataSpec, *, size: int = 3, seed: int = 0) -> Batch:
    """Return a batch without gaps."""
    return make_batch(spec, size=size, seed=seed, gaps=0.0)


def rows_of(batch: Batch) -> Iterator[Observation]:
    for t in range(batch.context.shape[1]):
        yield Observation(
            batch.context[:, t],
            batch.context_mask[:, t],
            None if batch.past is None else batch.past[:, t],
            None if batch.known is None else batch.known[:, t],
        )


def ahead_of(batch: Batch) -> Tensor | None:
    return None if batch.known is None else batch.known[:, batch.context.shape[1] :]


@torch.no_grad()
def streamed(model: Model, batch: Batch, state: dict[str, Tensor] | None = None) -> Prediction:
    state = model.initial_state(len(batch.context), batch.static) if state is None else state
    for row in rows_of(batch):
        state = model.step(state, row)
    return model.free_run(state, ahead_of(batch))


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

HEADS = [
    {"head": "direct"},
    {"head": "direct", "patch_length": 4, "patch_stride": 2},
    {"head": "direct", "missing": "skip"},
    {"head": "masked"},
    {"head": "masked", "missing": "skip"},
    {"head": "rollout"},
    {"head": "rollout", "missing": "skip"},
]


def ids_of(settings: list[dict[str, Any]]) -> list[str]:
    return ["-".join(str(value) for value in case.values()) for case in settings]


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


def shorter(model: Model, *, settings: dict[str, Any] | None = None, **sizes: int) -> Model:
    """Return the same weights for other window sizes; only a direct head depends on them."""
    config = model.config.model_copy(update=settings or {})
    other = type(model)(config, DataSpec(**{**vars(model.spec), **sizes}))
    other.load_state_dict(model.state_dict())
    return other.eval()


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


def test_leak_a_masked_head_reads_known_covariates_step_by_step() -> None:
    """Covariates of step t of the horizon reach the forecasts of t and later, none before."""
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, head="masked").double(), make_batch(spec, size=2)
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
    """The one-step forecasts of a rollout head read nothing at or after their own step."""
    spec = spec_of(num_variates=1, num_past=1, num_known=1)
    model, batch = make(spec, head="rollout").double(), whole(spec, size=1)
    parts = [part.double().requires_grad_() for part in (batch.context, batch.past, batch.known)]
    found = model(Batch(parts[0], batch.context_mask, past=parts[1], known=parts[2])).context_raw
    for t in (3, 12, L - 1):
        for gradient in torch.autograd.grad(found[:, t].sum(), parts, retain_graph=True):
            assert float(gradient[:, t:].abs().max()) < 1e-12
            assert float(gradient[:, t - 1].abs().max()) > 1e-6


@pytest.mark.parametrize("field", ["past", "known", "static"])
@pytest.mark.parametrize("settings", HEADS, ids=ids_of(HEADS))
def test_every_covariate_reaches_the_forecast(settings: dict[str, Any], field: str) -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(spec, **settings), whole(spec)
    changed = batch._replace(**{field: getattr(batch, field) + 1.0})
    assert float((raw(model, changed) - raw(model, batch)).abs().max()) > 1e-3


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
    batch = make_batch(spec, size=2)
    batch = Batch(*[part.double() if part is not None and part.is_floating_point() else part for part in batch])
    assert model.recurrent
    torch.testing.assert_close(streamed(model, batch).raw, raw(model, batch), atol=1e-8, rtol=0)


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


def cut(batch: Batch, rows: slice) -> Batch:
    """Return some rows of the context; known covariates of the horizon are left out."""
    parts = {name: getattr(batch, name)[:, rows] for name in ("context", "context_mask", "past")}
    return batch._replace(known=batch.known[:, : batch.context.shape[1]][:, rows], **parts)


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
