"""What is kept of a judged seed: one record of figures, and the tables that are drawn.

With features every series is judged by its own map: the figures of the seed are then medians over the series, and the
record holds those of each.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from tsforge import artifact as artifacts
from tsforge.app.reconstruct_data import Trajectories
from tsforge.core.atomic import atomic_directory
from tsforge.core.logs import get_logger, log_event
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.evaluation import METRICS, Drive, Judgement, evaluate
from tsforge.dynamics.module import TRACED, Training
from tsforge.dynamics.network import Model
from tsforge.dynamics.validation import FIGURES, Validation

_LOG = get_logger(__name__)
_POINTS = 5000  # of a trajectory that is stored to be drawn
_BINS = 500  # of a spectrum that is stored to be drawn
Array = NDArray[np.float64]


def judge_seed(
    training: Training, index: int, seed: int, data: Trajectories, config: ReconstructionConfig, folder: Path
) -> dict[str, Any]:
    """Judge the seed at ``index`` of a training, write ``folder/seeds/SEED`` and return its record."""
    network = training.network
    tests: dict[str | None, Array] = {None: data.test}
    if network.series:
        tests = {name: data.tests[name] for name in network.series}
    judged: dict[str | None, Judgement] = {}
    figures: dict[str | None, dict[str, Any]] = {}
    for name, test in tests.items():
        model = network.group(index, name)
        judged[name] = evaluate(
            model,
            test,
            config.evaluation,
            config.dt,
            drive=_drive(data),
            valid=data.valid,
            units=(data.loc, data.scale),
        )
        figures[name] = _figures(judged[name], model, data)
    weights, first = network.weights(index), next(iter(tests))
    record: dict[str, Any] = {
        "seed": seed,
        **(_over_series(figures) if network.series else figures[first]),
        "failed_steps": training.failed_steps[index],
        "restored": training.restored[index],
        "parameters": sum(value.numel() for value in weights.values()),
        "seconds": training.seconds / len(network.seeds),
        "steps": training.steps,
        "device": training.device,
    }
    if network.schedule.tau is not None:
        record["tau"] = network.schedule.tau
    if network.series:
        record["features"] = network.features(index)
    if training.validation is not None:
        record["validation"] = _validation(training.validation, index)
    with atomic_directory(folder / "seeds" / str(seed), replace=True) as temporary:
        (temporary / "weights.safetensors").write_bytes(artifacts.tensor_bytes(weights))
        drawn = {name: _trajectories(judged[name], test, data) for name, test in tests.items()}
        spectra = {name: _spectra(judged[name], test, data, config.dt) for name, test in tests.items()}
        for kind, tables in (("trajectory", drawn), ("spectra", spectra)):
            tables[first].write_parquet(temporary / f"{kind}.parquet")
            if network.series:
                named = [table.select(pl.lit(name).alias("series"), pl.all()) for name, table in tables.items()]
                pl.concat(named).write_parquet(temporary / f"series_{kind}.parquet")
        _trace(training, index).write_parquet(temporary / "trace.parquet")
        if training.validation is not None:
            _validations(training.validation, index).write_parquet(temporary / "validation.parquet")
        (temporary / "result.json").write_text(json_text(record), encoding="utf-8")
    shown = {name: record[name] for name in ("d_stsp", "d_h", "pe", "lambda_1", "captured", "alpha")}
    log_event(_LOG, f"seed {seed}", **shown, failed=record["failed"] or None)
    if "tau" in record:
        log_event(_LOG, f"seed {seed}", tau=record["tau"])
    for name, item in figures.items():
        for metric, reason in item["unjudged"].items():
            _LOG.warning("seed %d%s: no %s: %s", seed, f", series {name}" if name else "", metric, reason)
    for warning in record["warnings"]:
        _LOG.warning("seed %d: %s", seed, warning)
    return record


def _figures(judged: Judgement, model: Model, data: Trajectories) -> dict[str, Any]:
    """Return what was found of one map."""
    return {
        **{name: _number(value) for name, value in judged.metrics.items()},
        "failed": judged.failed,
        "healthy": judged.findings.get("healthy"),
        "warnings": judged.findings.get("warnings", []),
        "lyapunov_spectrum": judged.spectrum.tolist(),
        "lyapunov_steps": judged.lyapunov_steps,
        "unjudged": judged.missing,
        "spread": dict(zip(data.columns, map(_number, judged.spread.tolist()), strict=False)),
        "max_abs_A": _number(float(model.diagonal().abs().max())),
        "findings": _observed(judged.findings, model, data),
    }


def _over_series(figures: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a seed with a map for each series, and ``series``, those of each.

    Metrics are medians over the series that have them. The seed has failed if one series has, and is healthy if all
    are. Spectrum and findings are those of the first series.
    """
    each = list(figures.values())
    medians = {}
    for name in METRICS:
        values = [item[name] for item in each if item[name] is not None]
        medians[name] = float(np.median(values)) if values else None
    sizes = [item["max_abs_A"] for item in each if item["max_abs_A"] is not None]
    return {
        **each[0],
        **medians,
        "failed": "; ".join(f"series {name}: {item['failed']}" for name, item in figures.items() if item["failed"]),
        "healthy": None if each[0]["healthy"] is None else all(bool(item["healthy"]) for item in each),
        "warnings": [f"series {name}: {text}" for name, item in figures.items() for text in item["warnings"]],
        "max_abs_A": max(sizes, default=None),
        "series": figures,
    }


def _observed(findings: dict[str, Any], model: Model, data: Trajectories) -> dict[str, Any]:
    """Return the findings with the points of every cycle as the read-out shows them, in the units of the data."""
    if "cycles" not in findings:
        return findings
    cycles = [
        {
            **cycle,
            "observed": (
                model.observe(torch.tensor(cycle["points"], dtype=torch.float64)).numpy() * data.scale + data.loc
            ).tolist(),
        }
        for cycle in findings["cycles"]
    ]
    return {**findings, "cycles": cycles}


def _drive(data: Trajectories) -> Drive | None:
    if data.test_inputs is None or data.input_mean is None:
        return None
    return Drive(inputs=data.test_inputs, mean=data.input_mean)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def json_text(value: Any) -> str:
    """Return JSON text with null for numbers that JSON has not."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return plain types with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, complex):
        return [_finite(value.real), _finite(value.imag)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _trajectories(judged: Judgement, test: Array, data: Trajectories) -> pl.DataFrame:
    """Return ``kind, step`` and the variates, in the units of the data, of every few steps of both series."""
    every = max(len(test) // (5 * _POINTS), 1)
    parts = []
    for kind, series in (("data", test), ("free_run", judged.free_run)):
        rows = series[::every][:_POINTS] * data.scale + data.loc
        steps = np.arange(len(rows)) * every
        columns = {"kind": [kind] * len(rows), "step": steps, **dict(zip(data.columns, rows.T, strict=True))}
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts)


def _spectra(judged: Judgement, test: Array, data: Trajectories, dt: float) -> pl.DataFrame:
    """Return ``variate, frequency, data, free_run``: shares of power in equal bins of frequency."""
    length = len(test)
    frequency = np.fft.rfftfreq(length, dt)
    bins = np.minimum(np.arange(len(frequency)) * _BINS // len(frequency), _BINS - 1)
    used = np.unique(bins)
    centre = np.bincount(bins, weights=frequency)[used] / np.bincount(bins)[used]
    tables = []
    for index, name in enumerate(data.columns):
        columns: dict[str, Any] = {"variate": [name] * len(used), "frequency": centre}
        for kind, series in (("data", test), ("free_run", judged.free_run)):
            values = series[:, index]
            if np.isfinite(values).any():  # not the run of a failed model
                values = np.nan_to_num(values - np.nanmean(values))
            power = np.bincount(bins, weights=np.abs(np.fft.rfft(values)) ** 2)[used]
            total = power.sum()
            columns[kind] = power / total if total > 0 and math.isfinite(total) else np.full(len(used), np.nan)
        tables.append(pl.DataFrame(columns))
    return pl.concat(tables)


def _trace(training: Training, index: int) -> pl.DataFrame:
    """Return ``epoch`` and ``TRACED`` of one seed; null where there is no number."""
    table = pl.DataFrame(
        [{"epoch": row["epoch"], **{name: row[name][index] for name in TRACED}} for row in training.trace]
    )
    return table.with_columns(pl.col("kappa").fill_nan(None))


def _validation(validation: Validation, index: int) -> dict[str, Any]:
    """Return the epoch that was kept and its ``score``, None where no free run was finite."""
    return {"epoch": validation.epochs[index], "score": _number(validation.scores[index])}


def _validations(validation: Validation, index: int) -> pl.DataFrame:
    """Return ``epoch`` and ``FIGURES`` of every free run on the validation rows; null where there is no number."""
    table = pl.DataFrame(
        [{"epoch": row["epoch"], **{name: row[name][index] for name in FIGURES}} for row in validation.history]
    )
    return table.with_columns(pl.col(FIGURES).fill_nan(None))
