"""What a fitted AR-Net says about a series, as plain records for tables and charts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tsforge.ops.ar_process import ljung_box
from tsforge.ops.moments import observed_runs
from tsforge.ops.stability import impulse_response, roots
from tsforge.ops.toeplitz import lagged_products

if TYPE_CHECKING:
    from tsforge.models._ar_solvers import Span
    from tsforge.models.ar_net import ARNet

_EXPORT_THRESHOLD = 1e-2  # of the largest weight: what gradient training leaves on a zero coefficient is below it
_MAX_ROOTS = 20
_RESPONSE_STEPS = 48
_SHOWN_STEPS = 5


def whiteness(weight: Tensor, bias: float, span: Span, num_lags: int = 20) -> tuple[float, float]:
    """Return the Ljung-Box statistic and p-value of one-step residuals over gap-free stretches.

    ``num_lags`` residual autocorrelations beyond the fitted lags' own number are tested.
    """
    from scipy.signal import oaconvolve

    kernel = np.concatenate([[1.0], -weight.double().cpu().numpy()])
    order = len(kernel) - 1
    used = int(np.count_nonzero(kernel[1:]))
    reach = used + num_lags
    residuals = []
    for variate in range(span.values.shape[1]):
        for first, last in observed_runs(span.mask[:, variate], span.bounds):
            if last - first <= order + reach:
                continue
            values = span.values[first:last, variate].double().cpu().numpy()
            residuals.append(oaconvolve(values, kernel, mode="valid") - bias)
    edges = np.cumsum([0, *map(len, residuals)])
    rows = int(edges[-1])
    if rows == 0:
        return 0.0, 1.0
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    products = lagged_products(np.concatenate(residuals)[:, None], None, spans, reach)[0]
    if products[0] <= 0.0:
        return 0.0, 1.0
    return ljung_box(products[1:] / products[0], float(rows), used)


def explain(model: ARNet) -> dict[str, Any]:
    """Return name -> records of everything worth showing about a fitted model; all in scaled units."""
    shown: dict[str, Any] = {
        "coefficients": _coefficients(model),
        "lags": _lag_selection(model),
        "pacf": _partial(model),
        "roots": _roots(model),
        "impulse_response": _response(model),
        "residuals": _residuals(model),
    }
    if model.additive.num_columns:
        shown["effects"] = _effects(model)
    if model.covariates is not None:
        shown["covariates"] = _covariates(model)
    return shown


def _variates(model: ARNet) -> list[int | str]:
    count = len(model.bias)
    return ["*"] if count < model.spec.num_variates or model.config.weights == "shared" else list(range(count))


def _selected(weight: Tensor) -> Tensor:
    """Return which coefficients [..., p] count as non-zero."""
    size = weight.abs()
    if not weight.shape[-1]:
        return size > 0
    return (size > 0) & (size >= _EXPORT_THRESHOLD * size.amax(-1, keepdim=True))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _coefficients(model: ARNet) -> list[dict[str, Any]]:
    """Return the weights of the first step and, if direct, of up to five steps spread over the horizon."""
    weight, error = model.ar.weight.detach().cpu(), model.error.cpu()
    steps = sorted({round(step) for step in np.linspace(0, weight.shape[1] - 1, _SHOWN_STEPS)})
    chosen = _selected(weight)
    trained = model.config.solver == "sgd" or bool(model.config.hidden)
    return [
        {
            "variate": variate,
            "step": step + 1,
            "lag": lag + 1,
            "value": float(weight[group, step, lag]),
            "standard_error": float(error[group, step, lag]) or None if not trained else None,
            "selected": bool(chosen[group, step, lag]),
            "post_selection": model.config.solver in ("sparse", "omp"),
        }
        for group, variate in enumerate(_variates(model))
        for step in steps
        for lag in range(weight.shape[2])
    ]


def _lag_selection(model: ARNet) -> list[dict[str, Any]]:
    """Return for every lag in how many steps it is used and how large it is on average."""
    weight = model.ar.weight.detach().cpu()
    chosen = _selected(weight)
    return [
        {
            "variate": variate,
            "lag": lag + 1,
            "steps": int(chosen[group, :, lag].sum()),
            "mean_magnitude": float(weight[group, :, lag].abs().mean()),
        }
        for group, variate in enumerate(_variates(model))
        for lag in range(weight.shape[2])
        if bool(chosen[group, :, lag].any())
    ]


def _partial(model: ARNet) -> list[dict[str, Any]]:
    """Return partial autocorrelations with the 95 % band of white noise."""
    rows = model.health[:, 0].clamp(min=1.0).sqrt().cpu()
    return [
        {
            "variate": variate,
            "lag": lag + 1,
            "value": float(value),
            "bound": float(1.96 / rows[group]) if float(model.health[group, 0]) > 0 else None,
        }
        for group, variate in enumerate(_variates(model))
        for lag, value in enumerate(model.pacf[group].cpu())
    ]


def _roots(model: ARNet) -> list[dict[str, Any]]:
    """Return the slowest modes of the one-step polynomial: cycle length and half-life in steps, and stability."""
    records = []
    for group, variate in enumerate(_variates(model)):
        for root in roots(model.ar.weight[group, 0].detach().double().cpu().numpy())[:_MAX_ROOTS]:
            records.append(
                {
                    "variate": variate,
                    "real": root.real,
                    "imaginary": root.imaginary,
                    "modulus": root.modulus,
                    "cycle_length": _finite(root.cycle_length),
                    "half_life": _finite(root.half_life),
                    "stable": root.modulus < 1.0,
                }
            )
    return records


def _response(model: ARNet) -> list[dict[str, Any]]:
    steps = max(_RESPONSE_STEPS, model.spec.horizon)
    response = impulse_response(model.ar.weight[:, 0].detach().double().cpu(), steps)
    return [
        {"variate": variate, "step": step, "value": _finite(float(response[group, step]))}
        for group, variate in enumerate(_variates(model))
        for step in range(steps)
    ]


def _residuals(model: ARNet) -> list[dict[str, Any]]:
    """Return the one-step noise and, where it was tested, whether residuals look white."""
    return [
        {
            "variate": variate,
            "noise_scale": float(model.noise[group, 0]),
            "rows": float(model.health[group, 0]) or None,
            "ljung_box": float(model.health[group, 1]) if float(model.health[group, 0]) > 0 else None,
            "p_value": float(model.health[group, 2]) if float(model.health[group, 0]) > 0 else None,
        }
        for group, variate in enumerate(_variates(model))
    ]


def _effects(model: ARNet) -> list[dict[str, Any]]:
    weight = model.additive.weight.detach().cpu()
    return [
        {"variate": variate, "component": component, "column": column, "value": float(weight[variate, index])}
        for variate in range(weight.shape[0])
        for index, (component, column) in enumerate(model.additive.labels)
    ]


def _covariates(model: ARNet) -> list[dict[str, Any]]:
    """Return each past covariate's share of the absolute weight of the linear part, by group."""
    assert model.covariates is not None
    edges = list(pairwise(range(0, model.covariates.weight.shape[2] + 1, model.covariate_lags)))
    records = []
    for group, variate in enumerate(_variates(model)):
        size = model.covariates.weight[group].detach().abs().sum(0).cpu()
        total = max(float(size.sum()), 1e-300)
        for covariate, (first, last) in enumerate(edges):
            share = float(size[first:last].sum()) / total
            records.append({"variate": variate, "covariate": covariate, "share": share})
    return records
