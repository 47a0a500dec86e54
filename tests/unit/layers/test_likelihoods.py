"""Likelihoods: losses by hand, quantiles that cannot cross, inverse functions, masking, gradients, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs
from pydantic import ValidationError

from tsforge.core.errors import ModelError
from tsforge.layers.likelihoods import (
    Normal,
    Point,
    Quantiles,
    StudentT,
    build_likelihood,
    inverse_softplus,
    student_t_norm,
)

ALL = [Point(), Point(loss="mae"), Point(loss="huber"), Normal(), StudentT(), Quantiles()]
DISTRIBUTIONS = [Normal(), StudentT(), Quantiles(), Quantiles(levels=(0.1, 0.5, 0.6))]


def _raw(num_params: int, seed: int = 0, size: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 3, num_params, generator=generator, dtype=torch.float64) * size


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mse", [9.0, 0.25]), ("mae", [3.0, 0.5]), ("huber", [2 * 3.0 - 2.0, 0.125])],
)
def test_point_losses_by_hand(loss: str, expected: list[float]) -> None:
    likelihood = build_likelihood(Point(loss=loss, huber_delta=2.0))
    raw = torch.tensor([4.0, 1.0]).reshape(1, 2, 1, 1)
    target = torch.tensor([1.0, 1.5]).reshape(1, 2, 1)
    torch.testing.assert_close(likelihood.loss(raw, target, None).flatten(), torch.tensor(expected))


def test_pinball_loss_by_hand() -> None:
    """Levels .25 .5 .75 at 1, 2, 4 and a target of 3: errors 2, 1, -1, pinball .5, .5, .25, twice their mean."""
    likelihood = build_likelihood(Quantiles(levels=(0.25, 0.5, 0.75)))
    steps = inverse_softplus(torch.tensor([2.0, 1.0], dtype=torch.float64) - 1e-6)
    raw = torch.cat([torch.tensor([2.0], dtype=torch.float64), steps]).reshape(1, 1, 1, 3)
    target = torch.tensor([[[3.0]]], dtype=torch.float64)
    assert likelihood.nll(raw, target).item() == pytest.approx(2 * (0.5 + 0.5 + 0.25) / 3, rel=1e-12)
    assert likelihood.quantile(raw, [0.25, 0.5, 0.625, 0.75]).flatten().tolist() == pytest.approx([1, 2, 3, 4])


def test_pinball_training_finds_the_quantiles_of_the_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = -torch.log(torch.rand(4000, generator=generator, dtype=torch.float64))
    likelihood = build_likelihood(Quantiles(levels=(0.1, 0.5, 0.9)))
    raw = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = likelihood.nll(raw.expand(4000, 1, 1, 3), sample.reshape(-1, 1, 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    found = likelihood.quantile(raw.detach(), [0.1, 0.5, 0.9]).flatten().numpy()
    np.testing.assert_allclose(found, np.quantile(sample.numpy(), [0.1, 0.5, 0.9]), atol=0.02)


@given(
    hs.lists(hs.floats(-80, 80, width=32), min_size=7, max_size=7),
    hs.lists(hs.floats(1e-4, 0.9999), min_size=2, max_size=8, unique=True).map(sorted),
)
@settings(max_examples=150, deadline=None)
def test_quantiles_never_cross(raw: list[float], levels: list[float]) -> None:
    likelihood = build_likelihood(Quantiles(levels=(0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)))
    found = likelihood.quantile(torch.tensor(raw).reshape(1, 1, 1, 7), levels)
    assert bool((found.diff(dim=-1) >= 0).all())
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("config", DISTRIBUTIONS)
def test_cdf_inverts_quantile_and_ascends(config) -> None:
    likelihood = build_likelihood(config)
    raw = _raw(likelihood.num_params)
    levels = [0.001, 0.04, 0.05, 0.2, 0.5, 0.55, 0.9, 0.97, 0.9999]
    quantiles = likelihood.quantile(raw, levels)
    for index, level in enumerate(levels):
        found = likelihood.cdf(raw, quantiles[..., index])
        torch.testing.assert_close(found, torch.full_like(found, level), rtol=1e-7, atol=1e-9)
        tail = likelihood.log_tail(raw, quantiles[..., index])
        expected = torch.full_like(tail, math.log(2 * min(level, 1 - level)))
        torch.testing.assert_close(tail, expected, rtol=1e-6, atol=1e-7)


def test_quantile_tails_keep_ranking_where_the_cdf_is_flat() -> None:
    likelihood = build_likelihood(Quantiles())
    raw = likelihood.initial_raw(torch.ones(1, 1, dtype=torch.float64)).unsqueeze(0)
    far = torch.tensor([30.0, 300.0, 3000.0], dtype=torch.float64)
    scores = [-likelihood.log_tail(raw, sign * y.reshape(1, 1, 1)).item() for sign in (1, -1) for y in far]
    assert scores[0] < scores[1] < scores[2]
    np.testing.assert_allclose(scores[:3], scores[3:], rtol=1e-9)


def test_quantile_mean_is_the_integral_of_the_quantile_function() -> None:
    likelihood = build_likelihood(Quantiles(levels=(0.1, 0.4, 0.5, 0.8)))
    raw = _raw(4, seed=9)
    grid = (np.arange(20_000) + 0.5) / 20_000
    inner = likelihood.quantile(raw[:1, :1, :1], grid.tolist()).numpy().mean()
    assert likelihood.mean(raw[:1, :1, :1]).item() == pytest.approx(inner, abs=5e-3)


@pytest.mark.parametrize("config", ALL)
def test_masked_cells_count_for_nothing_and_get_no_gradient(config) -> None:
    likelihood = build_likelihood(config)
    raw = _raw(likelihood.num_params).requires_grad_()
    target = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    poisoned = torch.where(mask, target, torch.nan)
    value = likelihood.nll(raw, poisoned, mask)
    expected = torch.stack([likelihood.loss(raw[index], target[index], None) for index in range(4)])[mask].mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, raw)
    assert bool(torch.isfinite(gradient).all())
    assert gradient[~mask].abs().max().item() == 0
    empty = likelihood.nll(raw, poisoned, torch.zeros_like(mask))
    assert empty.item() == 0
    assert torch.autograd.grad(empty, raw)[0].abs().max().item() == 0


@pytest.mark.parametrize("config", ALL)
def test_gradients_of_the_loss(config) -> None:
    likelihood = build_likelihood(config)
    raw = _raw(likelihood.num_params, size=0.7)[:1, :2, :2].clone().requires_grad_()
    target = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 3
    assert torch.autograd.gradcheck(lambda r: likelihood.loss(r, target, None), (raw,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("config", ALL)
def test_extreme_raw_values_stay_finite_in_float32(config) -> None:
    likelihood = build_likelihood(config)
    for size in (-1e4, -60.0, 0.0, 60.0, 1e4):
        raw = torch.full((1, 1, 1, likelihood.num_params), size, requires_grad=True)
        loss = likelihood.nll(raw, torch.zeros(1, 1, 1))
        loss.backward()
        assert math.isfinite(loss.item())
        assert bool(torch.isfinite(raw.grad).all())


def test_log_density_is_that_of_the_distribution_and_refused_without_one() -> None:
    generator = torch.Generator().manual_seed(0)
    y = 3.0 * torch.randn(50, generator=generator, dtype=torch.float64)
    for config in (Normal(), StudentT()):
        likelihood = build_likelihood(config)
        raw = torch.randn(50, likelihood.num_params, generator=generator, dtype=torch.float64)
        loc, scale = raw[:, 0], likelihood.scale(raw)
        known = (
            torch.distributions.Normal(loc, scale)
            if isinstance(config, Normal)
            else torch.distributions.StudentT(likelihood.degrees(raw), loc, scale)
        )
        torch.testing.assert_close(likelihood.log_density(raw, y), known.log_prob(y))
    for config in (Point(), Quantiles()):
        likelihood = build_likelihood(config)
        with pytest.raises(ModelError, match="has no density"):
            likelihood.log_density(torch.zeros(50, likelihood.num_params), y)


DEGREES = (2.5, 3.0, 6.0, 12.0, 19.9, 20.1, 30.0, 100.0, 300.0, 3e3, 3e4, 3e5, 1e8)


def _student(df: float, z: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the loss at z, and its slopes in location and in the raw degrees of freedom."""
    degrees = torch.tensor(df - 2.0 - 1e-4, dtype=torch.float64)
    raw = torch.stack([torch.zeros_like(degrees), torch.tensor(0.5).double(), inverse_softplus(degrees)])
    raw = raw.to(dtype).reshape(1, 1, 1, 3).requires_grad_()
    likelihood = build_likelihood(StudentT())
    loss = likelihood.loss(raw, likelihood.scale(raw.detach()) * z, None)
    loss.sum().backward()
    return loss.item(), raw.grad[..., 0].item(), raw.grad[..., 2].item()


@pytest.mark.parametrize("z", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("df", DEGREES)
def test_student_t_keeps_its_digits_in_single_precision(df: float, z: float) -> None:
    """Log gammas of many degrees of freedom are far larger than their difference."""
    single, double = _student(df, z, torch.float32), _student(df, z, torch.float64)
    assert single[0] == pytest.approx(double[0], rel=1e-6, abs=4e-6)
    assert single[1] == pytest.approx(double[1], rel=1e-5, abs=1e-7)
    assert single[2] == pytest.approx(double[2], rel=1e-3, abs=3e-7)


@pytest.mark.parametrize("half", [2, 3, 6, 9, 10, 11, 15, 50, 150, 1500, 15_000, 150_000])
def test_student_t_norm_is_a_product_for_even_degrees_of_freedom(half: int) -> None:
    """gamma(m + 1/2) / gamma(m) = sqrt(pi) / 2 times the product of 1 + 1 / 2k for k below m."""
    ratio = 0.5 * math.log(math.pi) - math.log(2) + math.fsum(math.log1p(0.5 / k) for k in range(1, half))
    expected = 0.5 * math.log(math.pi * 2 * half) - ratio
    assert student_t_norm(torch.tensor(2.0 * half).double()).item() == pytest.approx(expected, abs=1e-14)
    assert student_t_norm(torch.tensor(2.0 * half)).item() == pytest.approx(expected, abs=2e-6)


def test_unit_rescales_what_is_not_scale_free() -> None:
    raw, target = _raw(11), torch.zeros(4, 6, 3, dtype=torch.float64)
    unit = torch.full((4, 1, 3), 0.5, dtype=torch.float64)
    for config, power in ((Point(), 2), (Point(loss="mae"), 1), (Quantiles(), 1), (Normal(), 0), (StudentT(), 0)):
        likelihood = build_likelihood(config)
        part = raw[..., : likelihood.num_params]
        plain, scaled = likelihood.nll(part, target), likelihood.nll(part, target, None, unit)
        assert scaled.item() == pytest.approx(plain.item() * 0.5**power, rel=1e-12)


def test_point_refuses_to_invent_a_distribution() -> None:
    likelihood = build_likelihood(Point())
    raw = _raw(1)
    for call in (
        lambda: likelihood.quantile(raw, [0.5]),
        lambda: likelihood.cdf(raw, raw[..., 0]),
        lambda: likelihood.log_tail(raw, raw[..., 0]),
    ):
        with pytest.raises(ModelError, match="conformal"):
            call()


@pytest.mark.parametrize(
    "levels", [(0.1, 0.9), (0.5, 0.1, 0.9), (0.1, 0.5, 0.5, 0.9), (0.0, 0.5, 1.0), (0.1, 0.4, 0.9), (0.5, 0.6, 0.7)]
)
def test_bad_quantile_levels_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="levels"):
        Quantiles(levels=levels)
