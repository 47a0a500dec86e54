"""Likelihoods against scipy.stats: densities, probabilities, quantiles, far tails; tolerances beside the checks."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st
import torch

from tsforge.layers import student_t
from tsforge.layers.likelihoods import MIN_DF, MIN_SCALE, Normal, StudentT, build_likelihood

LEVELS = [0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999]


def _raw(num_params: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, 3, num_params, generator=generator, dtype=torch.float64) * 2


def _target() -> torch.Tensor:
    return torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 5


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def _frozen(name: str, raw: torch.Tensor):
    plain = raw.numpy()
    scale = _softplus(plain[..., 1]) + MIN_SCALE
    if name == "normal":
        return st.norm(plain[..., 0], scale)
    return st.t(MIN_DF + _softplus(plain[..., 2]) + MIN_SCALE, plain[..., 0], scale)


CASES = [("normal", Normal()), ("student_t", StudentT())]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_loss_is_the_negative_log_density(name: str, config) -> None:
    likelihood = build_likelihood(config)
    raw, target = _raw(likelihood.num_params), _target()
    expected = -_frozen(name, raw).logpdf(target.numpy())
    np.testing.assert_allclose(likelihood.loss(raw, target, None).numpy(), expected, rtol=1e-12, atol=1e-12)
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) > 0.4
    np.testing.assert_allclose(likelihood.nll(raw, target, mask).item(), expected[mask.numpy()].mean(), rtol=1e-12)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_cdf_and_quantiles(name: str, config) -> None:
    likelihood = build_likelihood(config)
    raw, target = _raw(likelihood.num_params), _target()
    frozen = _frozen(name, raw)
    np.testing.assert_allclose(likelihood.cdf(raw, target).numpy(), frozen.cdf(target.numpy()), rtol=1e-9, atol=1e-12)
    found = likelihood.quantile(raw, LEVELS).numpy()
    for index, level in enumerate(LEVELS):
        np.testing.assert_allclose(found[..., index], frozen.ppf(level), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_log_tail_keeps_its_precision_far_out(name: str, config) -> None:
    likelihood = build_likelihood(config)
    raw = _raw(likelihood.num_params)
    frozen = _frozen(name, raw)
    for sigmas in (0.0, 0.5, 3.0, 20.0, 1e3):
        y = raw[..., 0] + sigmas * (torch.nn.functional.softplus(raw[..., 1]) + MIN_SCALE)
        expected = np.log(2) + frozen.logsf(y.numpy())
        np.testing.assert_allclose(likelihood.log_tail(raw, y).numpy(), expected, rtol=1e-9, atol=1e-9)
        mirrored = 2 * raw[..., 0] - y
        torch.testing.assert_close(likelihood.log_tail(raw, mirrored), likelihood.log_tail(raw, y))


def test_student_t_functions_over_degrees_of_freedom_and_levels() -> None:
    df = torch.tensor([2.0001, 2.1, 3.0, 4.9, 5.1, 10.0, 30.0, 100.0, 1e3, 1e5], dtype=torch.float64)
    p = torch.tensor([1e-12, 1e-6, 0.01, 0.25, 0.4999, 0.5, 0.6, 0.99, 1 - 1e-9], dtype=torch.float64)
    p, df = (part.reshape(-1) for part in torch.meshgrid(p, df, indexing="ij"))
    quantiles = student_t.quantile(p, df)
    np.testing.assert_allclose(quantiles.numpy(), st.t.ppf(p.numpy(), df.numpy()), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(student_t.cdf(quantiles, df).numpy(), p.numpy(), rtol=1e-9)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_mean_and_initial_spread_match_the_distribution(name: str, config) -> None:
    likelihood = build_likelihood(config)
    spread = torch.tensor([[0.3, 2.0], [0.01, 40.0]], dtype=torch.float64)
    raw = likelihood.initial_raw(spread)
    frozen = _frozen(name, raw)
    np.testing.assert_allclose(likelihood.mean(raw).numpy(), frozen.mean(), atol=1e-12)
    np.testing.assert_allclose(frozen.std(), spread.numpy(), rtol=1e-3)  # MIN_DF's and MIN_SCALE's share
