"""The closed-form linear model against explicit windows, scikit-learn and its own equivalences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import windows_of
from sklearn.linear_model import Ridge

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models.linear import Linear, LinearConfig, fit_windows_reference

L, H = 12, 5


def training(*, variates: int = 2, seed: int = 0, missing: float = 0.0, shift: float = 0.0) -> TrainingSeries:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(400, variates)).cumsum(0) * 0.2 + np.sin(np.arange(400) / 3)[:, None] + shift
    mask = rng.random((400, variates)) >= missing
    return TrainingSeries(
        values=torch.from_numpy(np.where(mask, values, 0.0)),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, 150, 400]),
        offset=torch.tensor([0, 0]),
    )


def fitted(data: TrainingSeries, **settings: Any) -> Linear:
    spec = DataSpec(context_length=L, horizon=H, num_variates=data.values.shape[1])
    model = Linear(LinearConfig(**settings), spec).double()
    report = model.solve(data)
    assert report is None or report.finished
    return model


def forecast(model: Linear, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    seen = torch.ones_like(context, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        return model(Batch(torch.where(seen, context, 0.0), seen)).raw[..., 0]


@pytest.mark.parametrize("ridge", [0.0, 30.0])
@pytest.mark.parametrize("offset", ["none", "constant", "window_scale"])
@pytest.mark.parametrize("remove", ["none", "window_mean", "last"])
def test_moments_equal_explicit_windows(remove: str, offset: str, ridge: float) -> None:
    data = training()
    model = fitted(data, remove=remove, offset=offset, ridge=ridge)
    contexts, targets = windows_of(data, L, H)
    assert len(contexts) == 2 * (150 - L - H + 1 + 250 - L - H + 1)
    weight, extra = fit_windows_reference(contexts, targets, model.config)
    level = {"none": 0.0, "window_mean": contexts.mean(1, keepdim=True), "last": contexts[:, -1:]}[remove]
    added = {"none": 0.0, "constant": extra, "window_scale": extra * contexts.std(1, keepdim=True, correction=0)}[
        offset
    ]
    expected = level + (contexts - level) @ weight.T + added
    found = forecast(model, contexts[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(found[..., 0], expected, atol=1e-9, rtol=0)


def test_equals_scikit_learn_ridge_per_variate() -> None:
    data = training(shift=50.0)
    model = fitted(data, remove="none", weights="per_variate", ridge=7.0)
    for variate in range(2):
        one = data._replace(values=data.values[:, [variate]], mask=data.mask[:, [variate]])
        contexts, targets = windows_of(one, L, H)
        expected = Ridge(alpha=7.0).fit(contexts.numpy(), targets.numpy())
        np.testing.assert_allclose(model.weight[variate].detach().numpy(), expected.coef_, atol=1e-8)
        np.testing.assert_allclose(model.offset[variate].detach().numpy(), expected.intercept_, atol=1e-7)


def test_nlinear_is_least_squares_with_rows_that_sum_to_one() -> None:
    data = training()
    model = fitted(data, remove="last", offset="constant", ridge=0.0)
    contexts, targets = windows_of(data, L, H)
    # equality-constrained least squares by its optimality system, with an intercept
    design = np.column_stack([contexts.numpy(), np.ones(len(contexts))])
    constraint = np.append(np.ones(L), 0.0)[None]
    system = np.block([[design.T @ design, constraint.T], [constraint, np.zeros((1, 1))]])
    right = np.vstack([design.T @ targets.numpy(), np.ones((1, H))])
    solution = np.linalg.solve(system, right)[:-1]
    expected = torch.from_numpy(design @ solution)
    found = forecast(model, contexts[..., None].expand(-1, -1, 2))[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_adding_a_constant_moves_the_forecast_by_it() -> None:
    data = training()
    contexts, _ = windows_of(data, L, H)
    contexts = contexts[:, :, None].expand(-1, -1, 2)
    for remove in ("window_mean", "last"):
        model = fitted(data, remove=remove)
        torch.testing.assert_close(forecast(model, contexts + 100.0), forecast(model, contexts) + 100.0)


def test_gaps_in_training_use_whole_windows_or_filled_ones() -> None:
    whole = fitted(training(), ridge=1.0)
    few, many = training(missing=0.01), training(missing=0.25)
    spec = DataSpec(context_length=L, horizon=H, num_variates=2)
    reports = [Linear(LinearConfig(ridge=1.0), spec).solve(data) for data in (few, many)]
    assert [report.details["gaps_filled"] for report in reports] == [0.0, 1.0]
    context = training(seed=1).values[None, :L]
    for data in (few, many):
        distance = (forecast(fitted(data, ridge=1.0), context) - forecast(whole, context)).abs().max()
        assert float(distance) < 0.5


def test_gaps_in_the_context_are_filled_not_read() -> None:
    data = training()
    model = fitted(data, remove="last")
    context = training(seed=2).values[None, :L].clone()
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[0, -2:, 0] = False
    plain = forecast(model, context, mask)
    poisoned = context.clone()
    poisoned[~mask] = 1e6
    assert torch.equal(forecast(model, poisoned, mask), plain)
    near = (plain - forecast(model, context)).abs().max()
    zeroed = context.clone()
    zeroed[~mask] = 0.0  # what reading the stored zeros would give
    assert float(near) < 0.5 * float((forecast(model, zeroed) - forecast(model, context)).abs().max()) + 0.3


def test_components_add_up_and_extra_outputs_stay_at_the_offset() -> None:
    spec = DataSpec(context_length=L, horizon=H, num_variates=2, num_params=3)
    model = Linear(LinearConfig(offset="window_scale"), spec)
    model.solve(training())
    context = training(seed=3).values[None, :L].float()
    batch = Batch(context, torch.ones_like(context, dtype=torch.bool))
    raw = model(batch).raw
    assert raw.shape == (1, H, 2, 3)
    assert not raw[..., 1:].any()
    torch.testing.assert_close(torch.stack(list(model.components(batch).values())).sum(0), raw[..., 0])


def test_residual_scale_is_close_to_the_training_error() -> None:
    data = training()
    spec = DataSpec(context_length=L, horizon=H, num_variates=2, num_params=2)
    model = Linear(LinearConfig(ridge=1.0), spec)
    report = model.solve(data)
    contexts, targets = windows_of(data, L, H)
    with torch.no_grad():
        error = forecast(model.double(), contexts[..., None].expand(-1, -1, 2))[..., 0] - targets
    half = len(targets) // 2
    for variate, part in enumerate((error[:half], error[half:])):
        ratio = report.residual_scale[:, variate] / part.square().mean(0).sqrt()
        assert bool(((ratio >= 1.0) & (ratio < 1.05)).all())  # a little above: corrected for fitted coefficients


def test_sgd_leaves_the_weights_to_training_and_refuses_a_ridge() -> None:
    torch.manual_seed(0)
    data = training()
    spec = DataSpec(context_length=L, horizon=H, num_variates=2)
    model = Linear(LinearConfig(solver="sgd"), spec)
    before = model.weight.detach().clone()
    assert model.solve(data) is None
    assert torch.equal(model.weight, before)
    with pytest.raises(ConfigError, match="no effect with solver 'sgd'"):
        LinearConfig(solver="sgd", ridge=1.0)


def test_a_variate_without_any_observation_forecasts_the_mean() -> None:
    data = training()
    mask = data.mask.clone()
    mask[:, 1] = False
    model = fitted(data._replace(mask=mask), weights="per_variate", remove="none")
    context = data.values[None, :L]
    seen = mask[None, :L]
    assert not forecast(model, context, seen)[..., 1].any()
    other = fitted(data, weights="per_variate", remove="none")
    torch.testing.assert_close(forecast(model, context, seen)[..., 0], forecast(other, context)[..., 0])


def test_a_span_without_a_window_is_refused() -> None:
    data = training()
    short = data._replace(
        values=data.values[:10], mask=data.mask[:10], indptr=torch.tensor([0, 10]), offset=data.offset[:1]
    )
    with pytest.raises(ModelError, match="17 rows"):
        fitted(short)
