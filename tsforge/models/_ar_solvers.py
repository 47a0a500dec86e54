"""Which solver fills the weights of an AR-Net, given the moments of its lag windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import explicit_windows, lag_moments
from tsforge.ops.moments import LeastSquares, WindowMoments, least_squares, observed_runs, ridge_by_gcv
from tsforge.ops.robust import RobustLoss, reweighted_least_squares
from tsforge.ops.sparse import (
    Moments,
    SparseFit,
    information_path,
    matching_pursuit,
    paper_strength,
    refit,
    reweighted_l1,
)
from tsforge.ops.toeplitz import Levinson, burg, levinson, pacf_to_weights, sound_autocovariance, yule_walker_direct

if TYPE_CHECKING:
    from tsforge.models.ar_net import ARNetConfig


@dataclass(frozen=True)
class Span:
    """What one group of variates is fitted on: centred values [N, V'] (0 in gaps), mask, row bounds, covariates."""

    values: Tensor
    mask: Tensor
    bounds: list[int]
    past: Tensor | None = None


@dataclass(frozen=True)
class LagFit:
    """Fitted lags of one group.

    Shapes:
        weight [T, p + P q], bias [T], error [T, p + P q] standard errors (0 where none is known), noise [T] residual
        standard deviation. ``dof`` counts free coefficients of a step, without the intercept.
    """

    weight: Tensor
    bias: Tensor
    error: Tensor
    noise: Tensor
    dof: float
    rows: float
    method: str
    details: dict[str, float] = field(default_factory=dict)


def fit_lags(config: ARNetConfig, layout: LagLayout, span: Span) -> LagFit:
    """Return the fit of the solver that the config names; ``auto`` takes least squares, and ridge on little data.

    Raises:
        ModelError: the span holds no window of lags plus horizon.
    """
    if not bool(span.mask.any()):
        return _nothing(layout)
    if config.solver in ("yule_walker", "burg"):
        return _fit_toeplitz(config, layout, span)
    moments, filled = lag_moments(layout, span.values, span.mask, span.bounds, past=span.past, missing=config.missing)
    solver = config.solver
    if solver in ("auto", "sgd"):
        solver = "ols" if moments.rows >= 10 * len(layout.features) else "ridge"
    if solver in ("sparse", "omp"):
        fit = _fit_sparse(config, layout, moments)
    elif solver == "irls":
        fit = _fit_robust(config, layout, span, moments)
    else:
        fit = _fit_least_squares(config, layout, moments, solver)
    return replace(fit, details={**fit.details, "gaps_filled": float(filled)})


def _nothing(layout: LagLayout) -> LagFit:
    """Return the fit of a variate that was never observed: it forecasts the mean, with the spread of scaled data."""
    weight = torch.zeros(layout.horizon, len(layout.features), dtype=torch.float64)
    bias = weight.new_zeros(layout.horizon)
    return LagFit(weight, bias, torch.zeros_like(weight), torch.ones_like(bias), 0.0, 0.0, "none")


def _noise(rss: Tensor, rows: float, dof: float) -> Tensor:
    return (rss / max(rows - dof - 1.0, 1.0)).sqrt()


def _fit_least_squares(config: ARNetConfig, layout: LagLayout, moments: WindowMoments, solver: str) -> LagFit:
    features, targets = layout.features, layout.targets
    ridge = 0.0
    if solver == "ridge" and len(features):
        given = config.ridge
        ridge = ridge_by_gcv(moments, features, targets)[0] if given is None else given * moments.rows
    fit: LeastSquares = least_squares(moments, features, targets, ridge=ridge)
    noise = _noise(fit.rss, fit.rows, fit.dof)
    error = noise[:, None] * fit.leverage.sqrt()[None, :]
    details = {"ridge": ridge / fit.rows} if solver == "ridge" else {}
    return LagFit(fit.weight, fit.bias, error, noise, fit.dof, fit.rows, solver, details)


def scale_free(moments: WindowMoments, layout: LagLayout) -> tuple[Moments, float]:
    """Return the moments a sparse solver needs, divided by the mean variance of the targets, and that variance."""
    gram = (moments.centered() / moments.rows).cpu()
    features, targets = layout.features, layout.targets
    power = gram.diagonal()[targets]
    unit = max(float(power.mean()), 1e-300)
    inner, cross = gram[features][:, features] / unit, gram[targets][:, features] / unit
    return Moments(inner.numpy(), cross.numpy(), (power / unit).numpy(), moments.rows), unit


def _fit_sparse(config: ARNetConfig, layout: LagLayout, moments: WindowMoments) -> LagFit:
    small, unit = scale_free(moments, layout)
    found: SparseFit
    if config.solver == "omp":
        found = matching_pursuit(small, max_lags=config.expected_nonzero, group=config.group)
    else:
        start = least_squares(moments, layout.features, layout.targets).weight.cpu().numpy()
        density = config.density_of(len(layout.features))
        if density is None:
            found = information_path(small, start, group=config.group)
        else:
            strength = paper_strength(density, len(layout.features), config.c_lambda)
            found = reweighted_l1(small, start, strength, group=config.group)
    refitted, leverage = refit(small, found.theta)
    theta = refitted if config.refit else found.theta
    weight = torch.from_numpy(theta)
    counts = torch.from_numpy((theta != 0.0).sum(1)).double()
    rss = torch.from_numpy(small.mean_squared_error(theta)) * unit * small.rows
    noise = (rss / (small.rows - counts - 1.0).clamp(min=1.0)).sqrt()
    sums = moments.sums.cpu()
    bias = (sums[layout.targets] - weight @ sums[layout.features]) / moments.rows
    error = torch.from_numpy(np.sqrt(np.maximum(leverage, 0.0) / unit)) * noise[:, None]
    details = {"nonzero": float(counts.sum()), "strength": found.strength}
    if len(found.objective):
        details["objective"] = found.objective[-1]
    return LagFit(weight, bias, error, noise, float(counts.max()), small.rows, config.solver, details)


def _fit_robust(config: ARNetConfig, layout: LagLayout, span: Span, moments: WindowMoments) -> LagFit:
    start = least_squares(moments, layout.features, layout.targets)
    loss = RobustLoss(kind=config.loss, delta=config.huber_delta, level=config.quantile)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        return explicit_windows(layout, span.values, span.mask, span.bounds, span.past)

    weight, bias, iterations = reweighted_least_squares(chunks, start.weight, start.bias, loss)
    rss = torch.zeros_like(bias)
    for features, targets in chunks():
        rss += (targets - features @ weight.T - bias).square().sum(0)
    noise = _noise(rss, start.rows, start.dof)
    details = {"iterations": float(iterations)}
    return LagFit(weight, bias, torch.zeros_like(weight), noise, start.dof, start.rows, "irls", details)


def _fit_toeplitz(config: ARNetConfig, layout: LagLayout, span: Span) -> LagFit:
    rows = float(span.mask.sum())
    reach = layout.lags + layout.horizon - 1
    recursion: Levinson
    acov = np.zeros(reach + 1)
    if config.solver == "burg":
        segments = [
            span.values[first:last, variate].double().cpu().numpy()
            for variate in range(span.values.shape[1])
            for first, last in observed_runs(span.mask[:, variate], span.bounds)
        ]
        recursion = burg(segments, layout.lags)
    else:
        seen = span.mask.any(0)
        if bool(seen.any()):
            values, mask = span.values[:, seen].double().cpu().numpy(), span.mask[:, seen].cpu().numpy()
            acov = mask.sum(axis=0) / rows @ sound_autocovariance(values, mask, span.bounds, reach)
        acov[0] += config.ridge or 0.0
        recursion = levinson(acov[: layout.lags + 1])
    order = layout.lags
    if config.order_selection != "none":
        order = recursion.order(config.order_selection, rows)
    weight = np.zeros((layout.horizon, layout.lags))
    if layout.horizon == 1:
        weight[0, :order] = pacf_to_weights(recursion.pacf[:order])
    elif order:
        weight[:, :order] = yule_walker_direct(acov[: order + layout.horizon], order, layout.horizon)
    noise = np.full(layout.horizon, np.sqrt(max(float(recursion.variances[order]), 0.0)))
    if layout.horizon > 1:  # variance left after the best linear forecast of each step
        explained = [weight[h, :order] @ acov[h + 1 : h + 1 + order] for h in range(layout.horizon)]
        noise = np.sqrt(np.maximum(acov[0] - np.array(explained), 0.0))
    tensor = torch.from_numpy(weight)
    return LagFit(
        tensor,
        torch.zeros(layout.horizon, dtype=torch.float64),
        torch.zeros_like(tensor),
        torch.from_numpy(noise),
        float(order),
        rows,
        config.solver,
        {"order": float(order)},
    )
