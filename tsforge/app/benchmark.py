"""Benchmark: models x context lengths x horizons x seeds on one data set, by the rules of the literature.

Every setting is a file in a cache, written whole or not at all and keyed by the data, the setting and the source code
that decides its result: an interrupted run goes on where it stopped, an unchanged one is free.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from pydantic import Field, field_validator

import tsforge
from tsforge.app.benchmark_data import BenchmarkData, read_benchmark_data
from tsforge.app.benchmark_run import Setting, network_config, run_setting
from tsforge.core.atomic import atomic_directory, atomic_file
from tsforge.core.config import Config, fingerprint, validate
from tsforge.core.errors import ConfigError, TsforgeError
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import Feature
from tsforge.data.splits import SplitConfig
from tsforge.metrics.ranking import skill_score
from tsforge.training.config import TrainConfig

_LOG = get_logger(__name__)

_SOURCES = (  # what decides a number; a change there makes cached settings stale
    "contracts",
    "ops",
    "layers",
    "training",
    "network.py",
    "data/panel.py",
    "data/windows.py",
    "data/splits.py",
    "metrics/point.py",
    "forecasting/window_forecasts.py",
    "app/benchmark_data.py",
    "app/benchmark_run.py",
)
_FAILURES = (TsforgeError, ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_SCALARS = {
    "mse": pl.Float64,
    "mae": pl.Float64,
    "windows": pl.Int64,
    "cells": pl.Int64,
    "fit_seconds": pl.Float64,
    "eval_seconds": pl.Float64,
    "cpu_seconds": pl.Float64,
    "peak_memory_mb": pl.Float64,
    "parameters": pl.Int64,
    "epochs": pl.Int64,
    "closed_form": pl.Boolean,
    "device": pl.String,
}
_SCHEMA: dict[str, Any] = {
    "data": pl.String,
    "model": pl.String,
    "context_length": pl.Int64,
    "horizon": pl.Int64,
    "seed": pl.Int64,
    "status": pl.String,
    **_SCALARS,
    "mse_by_variate": pl.List(pl.Float64),
    "mse_by_step": pl.List(pl.Float64),
    "error": pl.String,
    "cached": pl.Boolean,
}


class ModelEntry(Config):
    """A model with what differs from its defaults. As text: ``name:key=value:key=value``, keys of the model, or with
    the prefix ``train.``, ``likelihood.`` or ``scaling.``.
    """

    name: str
    label: str = ""
    """How the table calls it; default the text it was given as."""
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    likelihood: dict[str, Any] = Field(default_factory=dict)
    scaling: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The label, else the name."""
        return self.label or self.name


class BenchmarkConfig(Config):
    """What to measure."""

    path: str
    """A wide Parquet or CSV file: one column of times, one column a variate."""
    models: tuple[ModelEntry, ...]
    context_lengths: tuple[int, ...] = Field((336,), min_length=1)
    horizons: tuple[int, ...] = Field((96,), min_length=1)
    seeds: int = Field(1, ge=1)
    """Runs of each setting with seeds 0, 1, ...; a fit without randomness is run once."""
    time: str | None = None
    """Time column; default ``ds``, else the first column of dates."""
    columns: tuple[str, ...] | None = None
    """Variates; default every numeric column."""
    calendar: tuple[Feature, ...] = ()
    """Features of the time stamp that models with known covariates are given; the others do without."""
    split: SplitConfig | None = None
    """Default: the literature's (ETT by months, others 7:1:2)."""
    season_length: int | None = Field(None, ge=1)
    """Of the seasonal naive row; default from the frequency, else found in the training rows."""
    train: TrainConfig = TrainConfig()
    budget_minutes: float | None = Field(None, gt=0)
    """No setting is begun after this time; those left out are reported as skipped."""
    refresh: bool = False
    """Measure again what is cached."""

    @field_validator("models", mode="before")
    @classmethod
    def _parse_models(cls, values: Any) -> Any:
        items = [values] if isinstance(values, str | Mapping) else values
        if not items:
            raise ConfigError("models: name at least one model; `tsforge models` lists them")
        return [parse_entry(item) if isinstance(item, str) else item for item in items]

    @field_validator("context_lengths", "horizons")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if min(values) < 1:
            raise ConfigError(f"context_lengths and horizons must be at least 1, given: {list(values)}")
        return values


def parse_entry(text: str) -> dict[str, Any]:
    """Return the plain form of ``name:key=value:...``.

    Raises:
        ConfigError: a part without ``=``.
    """
    name, *parts = text.split(":")
    entry: dict[str, Any] = {"name": name.strip(), "label": text.strip()}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign:
            raise ConfigError(f"models: '{part}' in '{text}' is no key=value; write for example linear:ridge=5e4")
        group, dot, rest = key.strip().partition(".")
        if not dot or group not in ("train", "likelihood", "scaling"):
            group, rest = "model", key.strip()
        entry.setdefault(group, {})[rest] = yaml.safe_load(value)
    return entry


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Every row measured, failed or left out.

    Attributes:
        table: one row a run: the setting, ``status`` (ok, failed, skipped), errors in standardised units, seconds, MiB,
            parameters, ``error`` and whether it came from the cache.
        data: name of the data set.
        notes: what was assumed about the data.
        path: folder with ``table.parquet`` and ``summary.json``.
    """

    table: pl.DataFrame
    data: str
    notes: tuple[str, ...]
    path: Path

    @property
    def failed(self) -> int:
        """Number of settings that failed."""
        return self.table.filter(status="failed").height

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        status = self.table["status"]
        return {
            "data": self.data,
            "settings": self.table.height,
            "failed": self.failed,
            "skipped": int((status == "skipped").sum()),
            "from_cache": int(self.table["cached"].sum()),
            "notes": list(self.notes),
            "path": str(self.path),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per model, context length and horizon, seeds averaged, best first within a horizon."""
        keys = ["horizon", "model", "context_length"]
        ok = pl.col("status") == "ok"
        means = [pl.col(name).filter(ok).mean() for name in ("mse", "mae", "fit_seconds", "eval_seconds")]
        grouped = self.table.group_by(keys, maintain_order=True).agg(
            *means,
            pl.col("mse").filter(ok).std().alias("mse_sd"),
            pl.col("peak_memory_mb").filter(ok).max(),
            pl.col("parameters").filter(ok).first(),
            ok.sum().alias("runs"),
            pl.col("status").sort_by(ok).first(),  # a failure in any seed shows
            pl.col("error").drop_nulls().first(),
        )
        base = grouped.filter(model="last_value").select("horizon", base="mse").unique("horizon")
        joined = grouped.join(base, on="horizon", how="left", maintain_order="left")
        mse, naive = (joined[name].fill_null(np.nan).to_numpy() for name in ("mse", "base"))
        skill = pl.Series("skill", skill_score(mse, naive)).fill_nan(None)
        ordered = joined.with_columns(skill).drop("base").sort("horizon", "mse", nulls_last=True, maintain_order=True)
        columns = [*keys, "mse", "mae", "mse_sd", "skill", "runs", "fit_seconds", "eval_seconds"]
        return ordered.select(*columns, "peak_memory_mb", "parameters", "status", "error").to_dicts()


def benchmark(config: BenchmarkConfig, workspace: Workspace, *, progress: bool = False) -> BenchmarkResult:
    """Measure every setting that is not cached and return the whole table; naive forecasts are always part of it.

    A setting that fails becomes a row with its error and does not stop the others.

    Args:
        config: what to measure.
        workspace: results and cache live below ``reports/benchmark``.
        progress: log a line for each setting, and show training progress.

    Raises:
        ConfigError: an unknown model or setting, found before anything is measured.
        DataError: the file cannot be used.
        KeyboardInterrupt: what was measured before is kept.
    """
    data = read_benchmark_data(
        config.path,
        time=config.time,
        columns=config.columns,
        split=config.split,
        season=config.season_length,
        calendar=config.calendar,
    )
    for note in data.notes:
        _LOG.warning("%s: %s", data.name, note)
    settings = plan(config, data)
    folder = workspace.reports / "benchmark" / f"{data.name}-{data.fingerprint}"
    deadline = None if config.budget_minutes is None else time.monotonic() + 60.0 * config.budget_minutes
    rows: list[dict[str, Any]] = []
    without_chance: set[str] = set()
    broken: set[str] = set()  # other seeds of a failed setting would not make its mean comparable
    for number, setting in enumerate(settings, start=1):
        family = _family(setting)
        if family in without_chance or family in broken:
            continue
        row = _measure(data, setting, folder / "cache", deadline, refresh=config.refresh, progress=progress)
        if row.get("closed_form"):
            without_chance.add(family)
        if row["status"] == "failed":
            broken.add(family)
        rows.append(row)
        if progress:
            shown = {
                key: row.get(key) for key in ("model", "context_length", "horizon", "seed", "status", "mse", "mae")
            }
            log_event(_LOG, f"setting {number} of {len(settings)}", **shown)
    notes = list(data.notes)
    if config.seeds > 1 and without_chance:
        notes.append(f"{len(without_chance)} settings have no random part: one run stands for all seeds")
    result = BenchmarkResult(table=_table(rows), data=data.name, notes=tuple(notes), path=folder / "last")
    _save(result, config)
    return result


def plan(config: BenchmarkConfig, data: BenchmarkData) -> list[Setting]:
    """Return every setting to run, naive forecasts first.

    Raises:
        ConfigError: an unknown model, or a setting it does not have.
    """
    entries = [(entry, length) for length in config.context_lengths for entry in config.models]
    look_back = max(data.season, min(config.context_lengths))
    naive = [parse_entry("last_value")]
    if data.season > 1:
        naive.append(parse_entry(f"seasonal_naive:season_length={data.season}"))
    named = {entry.title for entry in config.models}
    extra = [(validate(ModelEntry, item), look_back) for item in naive if item["label"] not in named]
    settings = []
    for horizon in config.horizons:
        for entry, length in [*extra, *entries]:
            network = network_config({"name": entry.name, **entry.model}, entry.likelihood, entry.scaling)
            train = validate(TrainConfig, {**config.train.model_dump(), **entry.train}, where="train")
            settings += [
                Setting(
                    label=entry.title,
                    network=network,
                    train=train,
                    context_length=length,
                    horizon=horizon,
                    seed=seed,
                )
                for seed in range(config.seeds)
            ]
    return settings


def code_version(model: str) -> str:
    """Return a hash of the source files that decide the result of a model's settings."""
    root = Path(tsforge.__file__).parent
    files: list[Path] = [*root.glob("models/_*.py"), root / "models" / f"{model}.py"]
    for name in _SOURCES:
        place = root / name
        files += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _family(setting: Setting) -> str:
    """Return what all seeds of a setting share."""
    return fingerprint({**setting.plain(), "seed": None, "label": setting.label})


def _measure(
    data: BenchmarkData,
    setting: Setting,
    cache: Path,
    deadline: float | None,
    *,
    refresh: bool,
    progress: bool,
) -> dict[str, Any]:
    about = {
        "data": data.name,
        "model": setting.label,
        "context_length": setting.context_length,
        "horizon": setting.horizon,
        "seed": setting.seed,
    }
    name = setting.network.model.name
    key = fingerprint({**setting.plain(), "data": data.fingerprint, "code": code_version(name)})
    place = cache / f"{name}-{key}.json"
    if not refresh:
        known = _cached(place)
        if known is not None:
            return {**about, **known, "cached": True}
    if deadline is not None and time.monotonic() > deadline:
        return {**about, "status": "skipped", "error": "the time budget is spent", "cached": False}
    try:
        found = run_setting(data, setting, progress=progress)
    except _FAILURES as error:
        reason = str(error) if isinstance(error, TsforgeError) else f"{type(error).__name__}: {error}"
        _LOG.warning("%s L=%d h=%d failed: %s", setting.label, setting.context_length, setting.horizon, reason)
        return {**about, "status": "failed", "error": reason, "cached": False}
    stored = {**found, "status": "ok", "setting": setting.plain(), "made": datetime.now(UTC).isoformat()}
    with atomic_file(place) as temporary:
        temporary.write_text(json.dumps(stored, indent=1))
    return {**about, **stored, "cached": False}


def _cached(place: Path) -> dict[str, Any] | None:
    """Return a stored row, or None where there is none that can be read."""
    try:
        row = json.loads(place.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _LOG.warning("cached setting %s cannot be read (%s) and is measured again", place, error)
        return None
    return row if isinstance(row, dict) and "mse" in row else None


def _table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{name: row.get(name) for name in _SCHEMA} for row in rows], schema=_SCHEMA)


def _save(result: BenchmarkResult, config: BenchmarkConfig) -> None:
    with atomic_directory(result.path, replace=True) as temporary:
        result.table.write_parquet(temporary / "table.parquet")
        document = {"config": config.model_dump(mode="json"), **result.summary(), "rows": result.rows()}
        (temporary / "summary.json").write_text(json.dumps(document, indent=1, default=str))
