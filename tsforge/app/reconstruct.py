"""Reconstruct the dynamics behind trajectories: train several seeds side by side, judge each, store and track all.

A seed's folder is written whole when the seed is judged, and kept by the settings and the data: an interrupted run goes
on where it stopped, an unchanged one is free, further seeds are added to those that are there.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from tsforge.app.catalog_dynamics import FOLDER, seed_rank
from tsforge.app.reconstruct_checks import check_judging, spectral_notes
from tsforge.app.reconstruct_data import Trajectories, read_trajectories
from tsforge.app.reconstruct_record import json_text, judge_seed
from tsforge.app.reconstruct_times import interval_note
from tsforge.core.atomic import atomic_file
from tsforge.core.config import Config, fingerprint, to_yaml
from tsforge.core.errors import listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.dynamics.config import EvaluationConfig, OptimConfig, PLRNNConfig, ReconstructionConfig
from tsforge.dynamics.evaluation import METRICS, summarise
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.training_noise import training_noise
from tsforge.dynamics.validation import ValidationSeries
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.runs import Run, Tracker

_LOG = get_logger(__name__)
_LATER = {  # settings that came after the first results
    "train": ("lambda_self", "self_limit", "validate_every"),
    "model": ("features",),
    "evaluation": ("near_zero",),
}


class ReconstructConfig(ReconstructionConfig):
    """A reconstruction and where it is recorded."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$", max_length=80)
    """What a person reads; default the name of the training file."""
    tracking: TrackingConfig = TrackingConfig()
    refresh: bool = False
    """Train again what is stored."""


@dataclass(frozen=True, kw_only=True)
class ReconstructResult:
    """All seeds of a reconstruction.

    Attributes:
        table: long: ``seed, metric, value``; with features ``series`` too.
        seeds: one record a seed: ``METRICS``, ``failed``, ``healthy``, seconds and what went wrong.
        facts: what a person wants to know first, medians and deviations included.
        path: folder with ``result.json``, ``metrics.parquet`` and ``seeds/``.
    """

    table: pl.DataFrame
    seeds: list[dict[str, Any]]
    facts: dict[str, Any]
    path: Path

    @property
    def failed(self) -> bool:
        """Whether no seed has metrics."""
        return all(bool(row["failed"]) for row in self.seeds)

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
    data = read_trajectories(config.data, by_series=config.model.features > 0)
    data = replace(data, notes=(*data.notes, *_further_notes(data, config)))
    for note in data.notes:
        _LOG.warning("%s: %s", data.name, note)
    name = config.name or data.name
    key = fingerprint({**_decisive(config), "data": data.fingerprint})
    folder = workspace.reports / FOLDER / f"{name}-{key}"
    known = _stored(folder)
    missing = [seed for seed in config.seeds if config.refresh or seed not in known]
    if missing:
        check_judging(data, config.evaluation)
    tracker = Tracker.open(workspace, config.tracking)
    tags = {"tsforge.reconstruction": name, "tsforge.dataset": data.name}
    noise = _noise(config, data)
    if missing:
        shown = {key: _extent(noise[key].values()) for key in ("measured", "added")}
        log_event(_LOG, "noise of the windows (train.noise)", automatic=noise["automatic"], **shown)
    with tracker.start(f"reconstruct {name}", config=config, tags=tags) as run:
        rows = sum(len(part) for part in data.train)
        run.log_data(data.name, data.fingerprint, source=config.data.path or "simulated", profile={"rows": rows})
        for first in range(0, len(missing), config.seeds_at_once):
            chunk = missing[first : first + config.seeds_at_once]
            training = train_seeds(
                data.train,
                config,
                chunk,
                inputs=data.train_inputs,
                series=data.train_series,
                valid=_validation_series(data),
                progress=progress,
                on_trace=partial(_log, run, chunk),
            )
            for index, seed in enumerate(chunk):
                known[seed] = judge_seed(training, index, seed, data, config, folder)
            _write(folder, name, known, config, data, noise)
        result = _write(folder, name, known, config, data, noise)
        _log_result(run, result, data)
    return result


def _decisive(config: ReconstructConfig) -> dict[str, Any]:
    """Return the settings that decide a seed's numbers."""
    record = {"seeds", "seeds_at_once", "tracking", "refresh", "name", "data"}
    settings = config.model_dump(mode="json", exclude=record) | {"standardise": config.data.standardise}
    parts: dict[str, type[Config]] = {"train": OptimConfig, "model": PLRNNConfig, "evaluation": EvaluationConfig}
    for part, names in _LATER.items():  # seeds stored before these were there keep their key
        for name in names:
            if settings[part][name] == parts[part].model_fields[name].default:
                del settings[part][name]
    return settings


def _further_notes(data: Trajectories, config: ReconstructConfig) -> list[str]:
    """Return what the settings make of the data: the unit of rates, and metrics that say little or are not there."""
    dt = config.dt if "dt" in config.model_fields_set else None
    about = interval_note(data.spacing, data.is_date, dt)
    notes = [] if about is None else [about]
    if config.model.kind == "deep":
        notes.append("a deep map has no exponents, fixed points or capture test")
    return notes + spectral_notes(data, config.evaluation.sigma)


def _stored(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the record of every seed that is stored, in their order."""
    found = {}
    for place in sorted(folder.glob("seeds/*/result.json"), key=lambda place: (len(place.parent.name), place)):
        try:
            found[int(place.parent.name)] = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _LOG.warning("the stored seed %s cannot be read (%s); it is trained again when asked for", place, error)
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


def _validation_series(data: Trajectories) -> ValidationSeries | None:
    return None if data.valid is None else ValidationSeries(data.valid, data.valid_inputs)


def _write(
    folder: Path,
    name: str,
    known: dict[int, dict[str, Any]],
    config: ReconstructConfig,
    data: Trajectories,
    noise: dict[str, Any],
) -> ReconstructResult:
    """Write the tables over all seeds so far; ``result.json`` comes last."""
    seeds = [known[seed] for seed in sorted(known)]
    table = _metrics(seeds, list(data.tests))
    facts: dict[str, Any] = {"name": name, "data": data.name, **summarise(seeds)}
    facts["healthy_share"] = None if data.inputs else sum(bool(row["healthy"]) for row in seeds) / len(seeds)
    facts["test_steps"] = len(data.test)
    if data.valid is not None:
        facts["valid_steps"] = len(data.valid)
    facts["in_sample"] = config.data.in_sample
    facts["seconds"] = sum(row["seconds"] for row in seeds)
    facts["training_noise"] = max(noise["added"].values())
    facts["notes"] = list(data.notes)
    others = sorted(set(known) - set(config.seeds))
    if others:
        facts["notes"].append(f"stored before and counted too: seeds {listing([str(seed) for seed in others])}")
    if data.tests:
        facts["series"] = len(data.tests)
        facts["notes"].append(
            f"figures of a seed are medians over {len(data.tests)} series, those of each are in result.json; what is "
            f"drawn, exponents and fixed points are of '{next(iter(data.tests))}'"
        )
    facts["path"] = str(folder)
    document = {
        "summary": facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "columns": list(data.columns),
        "definition": _definition(config, data),
        "observation": {"kind": config.model.observation, "loc": data.loc.tolist(), "scale": data.scale.tolist()},
        "inputs": _inputs(data),
        "training_noise": noise,
        "machine": platform.machine(),
        "seeds": seeds,
    }
    if data.tests:
        document["series"] = {name: summarise([row["series"][name] for row in seeds]) for name in data.tests}
        with atomic_file(folder / "features.parquet") as temporary:
            _features(seeds).write_parquet(temporary)
    with atomic_file(folder / "metrics.parquet") as temporary:
        table.write_parquet(temporary)
    with atomic_file(folder / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config.model_copy(update={"seeds": tuple(sorted(known))})), encoding="utf-8")
    with atomic_file(folder / "result.json") as temporary:
        temporary.write_text(json_text(document), encoding="utf-8")
    return ReconstructResult(table=table, seeds=seeds, facts=facts, path=folder)


def _metrics(seeds: Sequence[dict[str, Any]], series: Sequence[str]) -> pl.DataFrame:
    """Return ``seed, metric, value``, with ``series`` between them if there are several."""
    rows = []
    for row in seeds:
        parts = [({"series": name}, row["series"][name]) for name in series] or [({}, row)]
        rows += [
            {"seed": row["seed"], **of, "metric": metric, "value": figures[metric]}
            for of, figures in parts
            for metric in METRICS
        ]
    named = {"series": pl.String} if series else {}
    return pl.DataFrame(rows, schema={"seed": pl.Int64, **named, "metric": pl.String, "value": pl.Float64})


def _features(seeds: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Return ``seed, series, feature, value``."""
    rows = [
        {"seed": row["seed"], "series": name, "feature": number, "value": value}
        for row in seeds
        for name, values in row["features"].items()
        for number, value in enumerate(values, start=1)
    ]
    schema = {"seed": pl.Int64, "series": pl.String, "feature": pl.Int64, "value": pl.Float64}
    return pl.DataFrame(rows, schema=schema)


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
    if data.tests:
        facts["series"] = "each judged by its own map and test rows; a seed has the medians, and fails with any of them"
    if data.inputs:
        facts |= {
            "free_run": "from the first test sample under the recorded inputs, T states, none dropped",
            "pe_inputs": "recorded",
            "lyapunov": "along the free run under the recorded inputs, lyapunov_steps of a seed says how long",
            "fixed_points": "of the map at the mean inputs of the training rows",
            "captured": "not examined: runs at held inputs need not end as driven data do",
        }
    return facts


def _noise(config: ReconstructConfig, data: Trajectories) -> dict[str, Any]:
    """Return what windows get of each variate (``added``) and what the rows hold (``measured``, NaN unknown).

    Both are standard deviations in the units of the rows that train.
    """
    found = training_noise(data.train, config.train.noise)
    parts = {name: dict(zip(data.columns, values.tolist(), strict=True)) for name, values in found._asdict().items()}
    return {"automatic": config.train.noise is None, **parts}


def _extent(values: Iterable[float]) -> str:
    """Return the least and the largest number as text."""
    known = [value for value in values if math.isfinite(value)]
    return f"{min(known):.4f} to {max(known):.4f}" if known else "unknown"


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
