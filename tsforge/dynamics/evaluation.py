"""How a reconstruction is judged: the published protocol, and what no short-horizon error shows.

From the first test sample the model runs freely for 1.25 T steps; the first quarter of T is dropped, the rest compared
with the test series of T steps by D_stsp and D_H. PE(n) starts from every test sample alone. Lyapunov exponents,
fixed points and the capture test belong to the map itself. A model whose parameters or free run are not finite has
failed: its metrics are NaN and it counts in the share of failed seeds.

A map with external inputs is no autonomous system. Its free run takes the recorded inputs of the test series from the
first test sample on; none of its T states is dropped, and state t goes with row t. PE(n) takes the recorded inputs too,
and so do the Lyapunov exponents: they say how a deviation between two runs under the same inputs grows, along that free
run and only as long as it is. A fixed point exists only for inputs that stay where they are: the search is for the map
at the mean inputs of the training rows. There is no capture test, since a run at held inputs need not end as driven
data do.

Source of the protocol: Hess et al. (2023), arXiv 2306.04406, and its published evaluation.

Legend: T test steps, N variates, M latent units, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.dynamics.config import EvaluationConfig
from tsforge.dynamics.findings import examine, examine_held
from tsforge.dynamics.network import Model
from tsforge.metrics.dynamics import d_h, d_stsp, prediction_error
from tsforge.metrics.lyapunov import kaplan_yorke, lyapunov_spectrum, spectrum_of_jacobians
from tsforge.ops.plrnn_jacobian import jacobians

Array = NDArray[np.float64]
METRICS = ("d_stsp", "d_h", "pe", "lambda_1", "kaplan_yorke", "captured", "alpha")
_STATES = 10_000  # states of the data that the findings look at, at most
_FEWEST = 4  # rows of D_H
_ALIGN = 100  # steps in which the directions of the exponents turn into place
_MATRICES = 2_000_000  # entries of Jacobians held at once
_UNFIT = (ConfigError, DataError, ModelError, np.linalg.LinAlgError)  # what cannot be judged or examined raises


@dataclass(frozen=True, kw_only=True, eq=False)
class Drive:
    """External inputs of a test series.

    Attributes:
        inputs: (T, K), standardised and complete.
        mean: (K,) of the training rows, at which inputs are held in the search for fixed points.
    """

    inputs: Array
    mean: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """One judged model.

    Attributes:
        metrics: ``METRICS``, NaN where there is none; ``captured`` is the share of free runs from data states that do
            not end as most of the data's do.
        free_run: (T, N) observations of the free run that was compared, standardised.
        spectrum: (M,) Lyapunov exponents per unit of time, falling; empty where there are none.
        lyapunov_steps: steps that the exponents are means of, 0 where there are none.
        findings: fixed points, capture test and warnings, plain types; empty if not asked for.
        failed: why there are no metrics, "" otherwise.
        missing: why single metrics are NaN though the model did not fail, by their name.
        spread: (N,) standard deviation of the free run in those of the test series; NaN where one is not known.
    """

    metrics: dict[str, float]
    free_run: Array
    spectrum: Array
    lyapunov_steps: int = 0
    findings: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    spread: Array = field(default_factory=lambda: np.zeros(0))


def free_comparison(model: Model, test: Array, inputs: Array | None = None) -> Array:
    """Return the (T, N) observations of the free run that is compared with ``test`` (T, N).

    The start is the first test sample and no later one is read; ``inputs`` (T, K) are. The first row is then the start.
    """
    with torch.no_grad():
        if inputs is not None:
            observed: Array = model.observe(_driven_states(model, test, inputs)).numpy()
            return observed
        length = len(test)
        dropped = length // 4
        start = model.initial(torch.from_numpy(test[:1]))
        states = model.run(start, length + dropped)[dropped:, 0]
        observed = model.observe(states).numpy()
    return observed


def _driven_states(model: Model, test: Array, inputs: Array) -> Tensor:
    """Return the (T, M) states from the first test sample on, under the inputs of the rows that they predict."""
    start = model.initial(torch.from_numpy(test[:1]))
    pushed = torch.from_numpy(inputs[1:, None])
    return torch.cat([start, model.run(start, len(test) - 1, inputs=pushed)[:, 0]])


def evaluate(
    model: Model,
    test: Array,
    config: EvaluationConfig,
    dt: float,
    *,
    drive: Drive | None = None,
    valid: Array | None = None,
    units: tuple[Array, Array] | None = None,
) -> Judgement:
    """Judge one model on a standardised test series (T, N).

    Args:
        dt: time between two steps.
        drive: of a map with inputs.
        valid: (V, N) rows that validated; fixed points and the capture test then look at them instead of the test
            series, so that a seed can be chosen without it, even where its test run diverges.
        units: (N,) offset and scale that turn observations into the units of the data, in which warnings name places.

    Raises:
        ModelError: a map with inputs without their values, or the reverse.
    """
    if (model.inputs > 0) != (drive is not None):
        raise ModelError(f"the map has {model.inputs} external inputs; their test values (drive) belong to it")
    inputs = None if drive is None else drive.inputs
    metrics = dict.fromkeys(METRICS, math.nan) | {"alpha": model.alpha}
    spectrum, steps = np.zeros(0), 0
    if not model.is_finite:
        return Judgement(metrics=metrics, free_run=np.full_like(test, np.nan), spectrum=spectrum, failed="parameters")
    run = free_comparison(model, test, inputs)
    reasons = [] if np.isfinite(run).all() else ["the free run diverged"]
    missing: dict[str, str] = {}
    if not reasons:
        found, missing = _distances(model, test, run, config, inputs)
        metrics |= found
        if not math.isfinite(metrics["d_stsp"]) and "d_stsp" not in missing:
            reasons.append("no generated point lies in the range of the data")
        try:
            spectrum, steps = _spectrum(model, test, inputs, config, dt)
        except _UNFIT as error:
            reasons.append(str(error))
        if len(spectrum):
            metrics |= {"lambda_1": float(spectrum[0]), "kaplan_yorke": float(kaplan_yorke(spectrum))}
    findings: dict[str, Any] = {}
    if config.findings and model.params is not None and (valid is not None or len(spectrum)):
        looked = test if valid is None else valid
        try:
            findings = _findings(model, looked[np.isfinite(looked).all(axis=1)], drive, config, units)
            if drive is None:
                metrics["captured"] = captured_share(findings["capture"], config.expected)
        except _UNFIT as error:
            reasons.append(str(error))
    return Judgement(
        metrics=metrics,
        free_run=run,
        spectrum=spectrum,
        lyapunov_steps=steps,
        findings=findings,
        failed="; ".join(reasons),
        missing=missing,
        spread=_spread(test, run),
    )


def _distances(
    model: Model, test: Array, run: Array, config: EvaluationConfig, inputs: Array | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Return D_stsp, D_H and PE of a finite free run, NaN where the test series does not allow one, and why."""
    complete = np.isfinite(test).all(axis=1)
    rows = spectral_rows(test, config.sigma)
    asked: dict[str, Callable[[], Any]] = {
        "d_stsp": lambda: d_stsp(test[complete], run),
        "d_h": lambda: math.nan if rows is None else d_h(test[rows], run[rows], sigma=config.sigma),
        "pe": lambda: _prediction_error(model, test, config.prediction_steps, inputs),
    }
    metrics, missing = {}, {}
    for name, value in asked.items():
        try:
            metrics[name] = float(value())
        except _UNFIT as error:
            metrics[name], missing[name] = math.nan, str(error)
    return metrics, missing


def _spread(test: Array, run: Array) -> Array:
    """Return (N,) the deviation of the run (T, N) in deviations of the test series, over the values that it has."""
    known = np.isfinite(test) & np.isfinite(run)
    found = np.full(test.shape[1], math.nan)
    for index, rows in enumerate(known.T):
        size = test[rows, index].std() if rows.any() else 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # a run about to diverge
            found[index] = run[rows, index].std() / size if size > 0 else math.nan
    return found


def spectral_rows(test: Array, sigma: float) -> slice | None:
    """Return the rows of a test series (T, N) that D_H compares: the longest stretch without a missing value.

    None where that is shorter than 20 sigma and than half the series: smoothing over ``sigma`` frequencies leaves
    nothing of so short a spectrum to compare.
    """
    complete = np.isfinite(test).all(axis=1)
    starts, stops = np.flatnonzero(np.diff(np.r_[False, complete, False])).reshape(-1, 2).T
    if not len(starts):
        return None
    longest = int(np.argmax(stops - starts))
    rows = slice(int(starts[longest]), int(stops[longest]))
    is_enough = rows.stop - rows.start >= max(min(20.0 * sigma, len(test) / 2), _FEWEST)
    return rows if is_enough else None


def _prediction_error(model: Model, test: Array, steps: int, inputs: Array | None) -> float:
    """Return PE(n): the map is iterated from all samples at once."""

    def start(x: Array) -> Array:
        return model.initial(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    def step(z: Array, s: Array | None = None) -> Array:
        return model.step(torch.from_numpy(z), None if s is None else torch.from_numpy(s)).numpy()

    def observe(z: Array) -> Array:
        return model.observe(torch.from_numpy(z)).numpy()

    return float(prediction_error(step, start, test, steps, observe=observe, inputs=inputs))


def _spectrum(
    model: Model, test: Array, inputs: Array | None, config: EvaluationConfig, dt: float
) -> tuple[Array, int]:
    """Return the exponents and the steps that they are means of; none of a deep map."""
    if model.params is None:
        return np.zeros(0), 0
    if inputs is not None:
        return _driven_spectrum(model, test, inputs, config, dt)
    params, clipped = model.params, model.clipped

    def step(z: Array) -> Array:
        return model.step(torch.from_numpy(z[None]))[0].numpy()

    def jacobian(z: Array) -> Array:
        return jacobians(params, torch.from_numpy(z), clipped=clipped).numpy()

    first = test[np.isfinite(test).all(axis=1)][:1]
    start = model.initial(torch.from_numpy(first))[0].numpy()
    found = lyapunov_spectrum(
        step, jacobian, start, steps=config.lyapunov_steps, transient=config.lyapunov_transient, dt=dt
    )
    return np.asarray(found, dtype=np.float64), found.steps


def _driven_spectrum(
    model: Model, test: Array, inputs: Array, config: EvaluationConfig, dt: float
) -> tuple[Array, int]:
    """Return the exponents along the free run under recorded inputs, and the steps that they are means of.

    Of short series at most a quarter is transient and a tenth aligns the directions.
    """
    params, length = model.params, len(test)
    assert params is not None
    first = min(config.lyapunov_transient, length // 4)
    align = min(_ALIGN, length // 10)
    steps = min(config.lyapunov_steps, length - first - align)
    states = _driven_states(model, test, inputs)[first : first + align + steps]

    def pieces() -> Iterator[Array]:
        for part in torch.split(states, max(_MATRICES // model.latent**2, 1)):
            yield jacobians(params, part, clipped=model.clipped).numpy()

    found = spectrum_of_jacobians(pieces(), align=align, dt=dt)
    return np.asarray(found, dtype=np.float64), found.steps


def _findings(
    model: Model, rows: Array, drive: Drive | None, config: EvaluationConfig, units: tuple[Array, Array] | None
) -> dict[str, Any]:
    """Examine the map from complete rows (R, N) of data; with inputs, the map at their mean."""
    assert model.params is not None
    every = max(len(rows) // _STATES, 1)
    states = model.initial(torch.from_numpy(np.ascontiguousarray(rows[::every])))
    if drive is not None:
        held = model.held(torch.from_numpy(drive.mean))
        assert held is not None
        return examine_held(held, states, clipped=model.clipped, periods=config.periods)
    loc, scale = units or (np.zeros(rows.shape[1]), np.ones(rows.shape[1]))

    def observe(points: Array) -> Array:
        with torch.no_grad():
            observed: Array = model.observe(torch.from_numpy(np.ascontiguousarray(points))).numpy() * scale + loc
        return observed

    return examine(
        model.params,
        states,
        clipped=model.clipped,
        expected=config.expected,
        periods=config.periods,
        settings=config.capture_settings(),
        observe=observe,
    ).to_dict()


def captured_share(capture: dict[str, Any], expected: str | None) -> float:
    """Return the share of free runs that do not end as the data do (``expected``), else as most that move do.

    A run that ends far outside the range of the data does not end as they do, however it moves there.
    """
    kept = capture["kept"]
    ends = {
        "rest": kept["fixed"],
        "oscillation": kept["contracting"] + kept["near_zero"],
        "chaos": kept["expanding"],
    }
    right = expected or max(("oscillation", "chaos"), key=lambda kind: ends[kind])
    return float(1.0 - ends[right])


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return median and median absolute deviation of every metric over the seeds that did not fail, and their share.

    Args:
        rows: one record a seed with ``METRICS`` and ``failed``.
    """
    sound = [row for row in rows if not row["failed"]]
    facts: dict[str, Any] = {"seeds": len(rows), "failed_share": (len(rows) - len(sound)) / len(rows)}
    for name in METRICS:
        values = np.array([row[name] for row in sound if row[name] is not None], dtype=np.float64)
        values = values[np.isfinite(values)]
        middle = float(np.median(values)) if len(values) else None
        facts[name] = middle
        facts[f"{name}_mad"] = None if middle is None else float(np.median(np.abs(values - middle)))
    return facts
