"""Reconstruct the dynamics behind trajectories: train several seeds side by side, judge each, store and track all.

A seed's folder is written whole when the seed is judged, and kept by the settings and the data: an interrupted run goes
on where it stopped, an unchanged one is free, further seeds are added to those that are there.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import Field

from tsforge import artifact as artifacts
from tsforge.app.catalog_dynamics import FOLDER, seed_rank
from tsforge.app.reconstruct_data import Trajectories, read_trajectories
from tsforge.core.atomic import atomic_directory, atomic_file
from tsforge.core.config import fingerprint, to_yaml
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.dynamics.config import OptimConfig, ReconstructionConfig
from tsforge.dynamics.evaluation import METRICS, Drive, Judgement, evaluate, summarise
from tsforge.dynamics.module import TRACED, Training, train_seeds
from tsforge.dynamics.network import Model
from tsforge.dynamics.validation import FIGURES, Validation, ValidationSeries
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.runs import Run, Tracker

_LOG = get_logger(__name__)
_POINTS = 5000  # of a trajectory that is stored to be drawn
_BINS = 500  # of a spectrum that is stored to be drawn
_LATER = ("lambda_self", "self_limit", "validate_every")  # settings of train that came after the first results


class ReconstructConfig(ReconstructionConfig):
    """A reconstruction and where it is recorded."""

    name: str | None = Field(None, min_length=1)
    """What a person reads; default the name of the training file."""
    tracking: TrackingConfig = TrackingConfig()
    refresh: bool = False
    """Train again what is stored."""


@dataclass(frozen=True, kw_only=True)
class ReconstructResult:
    """All seeds of a reconstruction.

    Attributes:
        table: long: ``seed, metric, value``.
        seeds: one record a seed: ``METRICS``, ``failed``, ``healthy``, seconds and what went wrong.
        facts: what a person wants to know first, medians and deviations included.
        path: folder with ``result.json``, ``metrics.parquet`` and ``seeds/``.
    """

    table: pl.DataFrame
    seeds: list[dict[str, Any]]
    facts: dict[str, Any]
    path: Path

    def summary(self) -> dict[str, Any]:
        """Return medians, deviations, the share of failed seeds and where everything lies."""
        return self.facts

    def rows(self) -> list[dict[str, Any]]:
        """Return one record a seed."""
        shown = ("seed", *METRICS, "healthy", "failed_steps", "seconds", "failed")
        rows = [{name: row.get(name) for name in shown} for row in self.seeds]
        for row, record in zip(rows, self.seeds, strict=True):
            if "validation" in record:
                row["kept_epoch"] = record["validation"]["epoch"]
        return rows


def reconstruct(config: ReconstructConfig, workspace: Workspace, *, progress: bool = False) -> ReconstructResult:
    """Train, judge, store and track every seed that is not stored yet; return all.

    Raises:
        DataError: the files cannot be used.
        ConfigError, ModelError: settings that do not fit each other or the data.
        BackendError: a GPU, disk or tracking store that is not there.
        KeyboardInterrupt: seeds judged before are kept.
    """
    data = read_trajectories(config.data)
    for note in data.notes:
        _LOG.warning("%s: %s", data.name, note)
    name = config.name or data.name
    key = fingerprint({**_decisive(config), "data": data.fingerprint})
    folder = workspace.reports / FOLDER / f"{name}-{key}"
    known = {} if config.refresh else _stored(folder, config.seeds)
    missing = [seed for seed in config.seeds if seed not in known]
    tracker = Tracker.open(workspace, config.tracking)
    tags = {"tsforge.reconstruction": name, "tsforge.dataset": data.name}
    with tracker.start(f"reconstruct {name}", config=config, tags=tags) as run:
        rows = sum(len(part) for part in data.train)
        run.log_data(data.name, data.fingerprint, source=config.data.path or "simulated", profile={"rows": rows})
        for first in range(0, len(missing), config.seeds_at_once):
            chunk = missing[first : first + config.seeds_at_once]
            options: dict[str, Any] = {"progress": progress, "on_trace": partial(_log, run, chunk)}
            training = train_seeds(
                data.train, config, chunk, inputs=data.train_inputs, valid=_validation_series(data), **options
            )
            for index, seed in enumerate(chunk):
                known[seed] = _judge(training, index, seed, data, config, folder)
            _write(folder, name, known, config, data)
        result = _write(folder, name, known, config, data)
        _log_result(run, result, data)
    return result


def _decisive(config: ReconstructConfig) -> dict[str, Any]:
    """Return the settings that decide a seed's numbers."""
    record = {"seeds", "seeds_at_once", "tracking", "refresh", "name", "data"}
    settings = config.model_dump(mode="json", exclude=record) | {"standardise": config.data.standardise}
    for name in _LATER:  # seeds stored before these were there keep their key
        if settings["train"][name] == OptimConfig.model_fields[name].default:
            del settings["train"][name]
    return settings


def _stored(folder: Path, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = {}
    for seed in seeds:
        place = folder / "seeds" / str(seed) / "result.json"
        try:
            found[seed] = json.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            _LOG.warning("the stored seed %s cannot be read (%s) and is trained again", place, error)
    return found


def _log(run: Run, seeds: Sequence[int], epoch: int, row: dict[str, list[float]]) -> None:
    run.log_epoch(
        epoch,
        {
            f"seed_{seed}.{name}": float(values[index])
            for index, seed in enumerate(seeds)
            for name, values in row.items()
            if name != "failed_steps" and math.isfinite(values[index])
        },
    )


def _judge(
    training: Training, index: int, seed: int, data: Trajectories, config: ReconstructConfig, folder: Path
) -> dict[str, Any]:
    """Judge one seed, store its folder and return its record."""
    model = training.network.group(index)
    judged = evaluate(model, data.test, config.evaluation, config.dt, drive=_drive(data), valid=data.valid)
    record: dict[str, Any] = {
        "seed": seed,
        **{name: _number(value) for name, value in judged.metrics.items()},
        "failed": judged.failed,
        "healthy": judged.findings.get("healthy"),
        "warnings": judged.findings.get("warnings", []),
        "lyapunov_spectrum": judged.spectrum.tolist(),
        "lyapunov_steps": judged.lyapunov_steps,
        "failed_steps": training.failed_steps[index],
        "restored": training.restored[index],
        "max_abs_A": _number(float(model.diagonal().abs().max())),
        "parameters": sum(value.numel() for value in model.weights().values()),
        "seconds": training.seconds / len(training.network.seeds),
        "steps": training.steps,
        "device": training.device,
        "findings": _observed(judged.findings, model, data),
    }
    if training.validation is not None:
        record["validation"] = _validation(training.validation, index)
    with atomic_directory(folder / "seeds" / str(seed), replace=True) as temporary:
        tensors = artifacts.tensor_bytes(model.weights())
        (temporary / "weights.safetensors").write_bytes(tensors)
        _trajectories(judged, data).write_parquet(temporary / "trajectory.parquet")
        _spectra(judged, data, config.dt).write_parquet(temporary / "spectra.parquet")
        _trace(training, index).write_parquet(temporary / "trace.parquet")
        if training.validation is not None:
            _validations(training.validation, index).write_parquet(temporary / "validation.parquet")
        (temporary / "result.json").write_text(_json(record), encoding="utf-8")
    shown = {name: record[name] for name in ("d_stsp", "d_h", "pe", "lambda_1", "captured", "alpha")}
    log_event(_LOG, f"seed {seed}", **shown, failed=judged.failed or None)
    for warning in record["warnings"]:
        _LOG.warning("seed %d: %s", seed, warning)
    return record


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


def _json(value: Any) -> str:
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


def _trajectories(judged: Judgement, data: Trajectories) -> pl.DataFrame:
    """Return ``kind, step`` and the variates, in the units of the data, of every few steps of both series."""
    every = max(len(data.test) // (5 * _POINTS), 1)
    parts = []
    for kind, series in (("data", data.test), ("free_run", judged.free_run)):
        rows = series[::every][:_POINTS] * data.scale + data.loc
        steps = np.arange(len(rows)) * every
        columns = {"kind": [kind] * len(rows), "step": steps, **dict(zip(data.columns, rows.T, strict=True))}
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts)


def _spectra(judged: Judgement, data: Trajectories, dt: float) -> pl.DataFrame:
    """Return ``variate, frequency, data, free_run``: shares of power in equal bins of frequency."""
    length = len(data.test)
    frequency = np.fft.rfftfreq(length, dt)
    bins = np.minimum(np.arange(len(frequency)) * _BINS // len(frequency), _BINS - 1)
    used = np.unique(bins)
    centre = np.bincount(bins, weights=frequency)[used] / np.bincount(bins)[used]
    tables = []
    for index, name in enumerate(data.columns):
        columns: dict[str, Any] = {"variate": [name] * len(used), "frequency": centre}
        for kind, series in (("data", data.test), ("free_run", judged.free_run)):
            values = np.nan_to_num(series[:, index] - np.nanmean(series[:, index]) if len(series) else series[:, index])
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


def _validation_series(data: Trajectories) -> ValidationSeries | None:
    return None if data.valid is None else ValidationSeries(data.valid, data.valid_inputs)


def _write(
    folder: Path, name: str, known: dict[int, dict[str, Any]], config: ReconstructConfig, data: Trajectories
) -> ReconstructResult:
    """Write the tables over all seeds so far; ``result.json`` comes last."""
    seeds = [known[seed] for seed in config.seeds if seed in known]
    table = pl.DataFrame(
        [{"seed": row["seed"], "metric": metric, "value": row[metric]} for row in seeds for metric in METRICS],
        schema={"seed": pl.Int64, "metric": pl.String, "value": pl.Float64},
    )
    facts: dict[str, Any] = {"name": name, "data": data.name, **summarise(seeds)}
    facts["healthy_share"] = None if data.inputs else sum(bool(row["healthy"]) for row in seeds) / len(seeds)
    facts["test_steps"] = len(data.test)
    if data.valid is not None:
        facts["valid_steps"] = len(data.valid)
    facts["in_sample"] = config.data.in_sample
    facts["seconds"] = sum(row["seconds"] for row in seeds)
    facts["notes"] = list(data.notes)
    facts["path"] = str(folder)
    document = {
        "summary": facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "columns": list(data.columns),
        "definition": _definition(config, data),
        "observation": {"kind": config.model.observation, "loc": data.loc.tolist(), "scale": data.scale.tolist()},
        "inputs": _inputs(data),
        "machine": platform.machine(),
        "seeds": seeds,
    }
    with atomic_file(folder / "metrics.parquet") as temporary:
        table.write_parquet(temporary)
    with atomic_file(folder / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
    with atomic_file(folder / "result.json") as temporary:
        temporary.write_text(_json(document), encoding="utf-8")
    return ReconstructResult(table=table, seeds=seeds, facts=facts, path=folder)


def _definition(config: ReconstructConfig, data: Trajectories) -> dict[str, Any]:
    """Return how the metrics were computed."""
    facts: dict[str, Any] = {
        "d_stsp": "gtf preset: binned for fewer than 6 variates, Gaussian mixture otherwise",
        "d_h_sigma": config.evaluation.sigma,
        "pe_steps": config.evaluation.prediction_steps,
        "free_run": "from the first test sample, 1.25 T steps, first quarter dropped",
    }
    if data.valid is not None:
        facts |= {
            "validation": "D_stsp + D_H of a free run on the validation rows (D_stsp alone where values are missing); "
            "the least of all epochs looked at is kept",
            "findings": "from the validation rows; seeds are ranked by them and the validation score",
        }
    if data.inputs:
        facts |= {
            "free_run": "from the first test sample under the recorded inputs, T states, none dropped",
            "pe_inputs": "recorded",
            "lyapunov": "along the free run under the recorded inputs, lyapunov_steps of a seed says how long",
            "fixed_points": "of the map at the mean inputs of the training rows",
            "captured": "not examined: runs at held inputs need not end as driven data do",
        }
    return facts


def _inputs(data: Trajectories) -> list[dict[str, Any]]:
    """Return name, loc and scale of every input; input = (column - loc) / scale."""
    if data.input_loc is None or data.input_scale is None:
        return []
    parts = zip(data.inputs, data.input_loc.tolist(), data.input_scale.tolist(), strict=True)
    return [{"name": name, "loc": loc, "scale": scale} for name, loc, scale in parts]


def best_seed(seeds: Sequence[dict[str, Any]]) -> int | None:
    """Return the seed to use (``seed_rank``), None if all failed.

    Without validation the rank looks at the test series: the metrics of the seed chosen are then no estimate for new
    data.
    """
    first = min(seeds, key=seed_rank)
    return None if seed_rank(first)[0] else int(first["seed"])


def _log_result(run: Run, result: ReconstructResult, data: Trajectories) -> None:
    numbers = {
        name: float(value)
        for name, value in result.facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    run.log_metrics(numbers)
    chosen = best_seed(result.seeds)
    if run.id is None:
        return
    run.log_text("result.json", (result.path / "result.json").read_text(encoding="utf-8"))
    if chosen is None:
        return
    from tsforge.tracking.figures import phase_space_figure, spectra_figure

    folder = result.path / "seeds" / str(chosen)
    run.set_tags({"tsforge.best_seed": chosen})
    run.log_folder(folder, f"seeds/{chosen}")
    table = pl.read_parquet(folder / "trajectory.parquet")
    run.log_figure("plots/phase_space.png", phase_space_figure(table, data.columns))
    run.log_figure("plots/spectra.png", spectra_figure(pl.read_parquet(folder / "spectra.parquet")))
