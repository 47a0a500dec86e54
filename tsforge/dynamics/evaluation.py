"""How a reconstruction is judged: the published protocol, and what no short-horizon error shows.

From the first test sample the model runs freely for 1.25 T steps; the first quarter of T is dropped, the rest compared
with the test series of T steps by D_stsp and D_H. PE(n) starts from every test sample alone. Lyapunov exponents,
fixed points and the capture test belong to the map itself. A model whose parameters or free run are not finite has
failed: its metrics are NaN and it counts in the share of failed seeds.

Source of the protocol: Hess et al. (2023), arXiv 2306.04406, and its published evaluation.

Legend: T test steps, N variates, M latent units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsforge.core.errors import DataError, ModelError
from tsforge.dynamics.config import EvaluationConfig
from tsforge.dynamics.findings import examine
from tsforge.dynamics.network import Model
from tsforge.metrics.dynamics import d_h, d_stsp, prediction_error
from tsforge.metrics.lyapunov import kaplan_yorke, lyapunov_spectrum
from tsforge.ops.plrnn_jacobian import jacobians

Array = NDArray[np.float64]
METRICS = ("d_stsp", "d_h", "pe", "lambda_1", "kaplan_yorke", "captured", "alpha")
_STATES = 10_000  # states of the data that the findings look at, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """One judged model.

    Attributes:
        metrics: ``METRICS``, NaN where there is none; ``captured`` is the share of free runs from data states that do
            not end as most of the data's do.
        free_run: (T, N) observations of the free run that was compared, standardised.
        spectrum: (M,) Lyapunov exponents per unit of time, falling; empty where there are none.
        findings: fixed points, capture test and warnings, plain types; empty if not asked for.
        failed: why there are no metrics, "" otherwise.
    """

    metrics: dict[str, float]
    free_run: Array
    spectrum: Array
    findings: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def free_comparison(model: Model, test: Array) -> Array:
    """Return the (T, N) observations of the free run that is compared with ``test`` (T, N).

    The start is the first test sample and no later value is read.
    """
    length = len(test)
    dropped = length // 4
    start = model.initial(torch.from_numpy(test[:1]))
    with torch.no_grad():
        states = model.run(start, length + dropped)[dropped:, 0]
        observed: Array = model.observe(states).numpy()
    return observed


def evaluate(model: Model, test: Array, config: EvaluationConfig, dt: float) -> Judgement:
    """Judge one model on a standardised test series (T, N).

    Args:
        dt: time between two steps.
    """
    nothing = dict.fromkeys(METRICS, math.nan) | {"alpha": model.alpha}
    empty = np.zeros(0)
    if not model.is_finite:
        return Judgement(metrics=nothing, free_run=np.full_like(test, np.nan), spectrum=empty, failed="parameters")
    run = free_comparison(model, test)
    if not np.isfinite(run).all():
        return Judgement(metrics=nothing, free_run=run, spectrum=empty, failed="the free run diverged")
    metrics = dict(nothing)
    complete = np.isfinite(test).all(axis=1)
    metrics["d_stsp"] = float(d_stsp(test[complete], run))
    metrics["d_h"] = float(d_h(test, run, sigma=config.sigma)) if complete.all() else math.nan
    metrics["pe"] = _prediction_error(model, test, config.prediction_steps)
    spectrum, findings = empty, {}
    reasons = []
    if model.params is not None:
        try:
            spectrum = _spectrum(model, test[complete][0], config, dt)
            metrics["lambda_1"] = float(spectrum[0])
            metrics["kaplan_yorke"] = float(kaplan_yorke(spectrum))
            if config.findings:
                findings = _findings(model, test[complete], config)
                metrics["captured"] = captured_share(findings["capture"], config.expected)
        except (DataError, ModelError, np.linalg.LinAlgError) as error:
            reasons.append(str(error))
    failed = "" if math.isfinite(metrics["d_stsp"]) else "no generated point lies in the range of the data"
    return Judgement(
        metrics=metrics,
        free_run=run,
        spectrum=spectrum,
        findings=findings,
        failed="; ".join([failed, *reasons]).strip("; "),
    )


def _prediction_error(model: Model, test: Array, steps: int) -> float:
    """Return PE(n): the map is iterated from all samples at once."""

    def start(x: Array) -> Array:
        return model.initial(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    def step(z: Array) -> Array:
        return model.step(torch.from_numpy(z)).numpy()

    def observe(z: Array) -> Array:
        return model.observe(torch.from_numpy(z)).numpy()

    return float(prediction_error(step, start, test, steps, observe=observe))


def _spectrum(model: Model, first: Array, config: EvaluationConfig, dt: float) -> Array:
    assert model.params is not None
    params, clipped = model.params, model.clipped

    def step(z: Array) -> Array:
        return model.step(torch.from_numpy(z[None]))[0].numpy()

    def jacobian(z: Array) -> Array:
        return jacobians(params, torch.from_numpy(z), clipped=clipped).numpy()

    start = model.initial(torch.from_numpy(first[None]))[0].numpy()
    found = lyapunov_spectrum(
        step, jacobian, start, steps=config.lyapunov_steps, transient=config.lyapunov_transient, dt=dt
    )
    return np.asarray(found, dtype=np.float64)


def _findings(model: Model, test: Array, config: EvaluationConfig) -> dict[str, Any]:
    assert model.params is not None
    every = max(len(test) // _STATES, 1)
    states = model.initial(torch.from_numpy(np.ascontiguousarray(test[::every])))
    return examine(
        model.params,
        states,
        clipped=model.clipped,
        expected=config.expected,
        periods=config.periods,
        settings=config.capture_settings(),
    ).to_dict()


def captured_share(capture: dict[str, Any], expected: str | None) -> float:
    """Return the share of free runs that do not end as the data do (``expected``), else as most that move do."""
    ends = {
        "rest": capture["fixed"],
        "oscillation": capture["contracting"] + capture["near_zero"],
        "chaos": capture["expanding"],
    }
    right = expected or max(("oscillation", "chaos"), key=lambda kind: ends[kind])
    return float(1.0 - ends[right])


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return median and median absolute deviation of every metric over the seeds that did not fail, and their share.

    Args:
        rows: one record a seed with ``METRICS`` and ``failed``.
    """
    facts: dict[str, Any] = {"seeds": len(rows), "failed_share": sum(bool(row["failed"]) for row in rows) / len(rows)}
    for name in METRICS:
        values = np.array([row[name] for row in rows if row[name] is not None], dtype=np.float64)
        values = values[np.isfinite(values)]
        middle = float(np.median(values)) if len(values) else None
        facts[name] = middle
        facts[f"{name}_mad"] = None if middle is None else float(np.median(np.abs(values - middle)))
    return facts
