"""Benchmark: data sets x models x look-backs x horizons x seeds, by the rules of the literature, beside baselines.

Every setting is a file in a cache, written whole or not at all and keyed by the data, the setting and the source code
that decides its result: an interrupted run goes on where it stopped, an unchanged one is free.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import tsforge
from tsforge.app.benchmark_config import BenchmarkConfig, ModelEntry, PeersConfig, parse_entry
from tsforge.app.benchmark_pass import Pass, PassResult
from tsforge.app.benchmark_peers import PeerHost, open_peers
from tsforge.app.benchmark_plan import HIDDEN, LINEAR_BASELINES, Prepared, check_entries, cost, plan, prepare
from tsforge.app.benchmark_progress import Progress, open_progress
from tsforge.app.benchmark_report import environment, write_report
from tsforge.app.benchmark_run import FITTERS, Setting
from tsforge.app.worker_pool import Job
from tsforge.core.atomic import atomic_directory
from tsforge.core.config import fingerprint
from tsforge.core.errors import ConfigError
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.metrics.ranking import skill_score

__all__ = [
    "BenchmarkConfig",
    "BenchmarkResult",
    "ModelEntry",
    "PeersConfig",
    "benchmark",
    "code_version",
    "parse_entry",
]

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
_SCALARS = {
    "mse": pl.Float64,
    "mae": pl.Float64,
    "valid_mse": pl.Float64,
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
    "versions": pl.String,
}
_SCHEMA: dict[str, Any] = {
    "data": pl.String,
    "role": pl.String,
    "model": pl.String,
    "lookback": pl.String,
    "context_length": pl.Int64,
    "horizon": pl.Int64,
    "seed": pl.Int64,
    "status": pl.String,
    **_SCALARS,
    "mse_by_variate": pl.List(pl.Float64),
    "mse_by_step": pl.List(pl.Float64),
    "note": pl.String,
    "error": pl.String,
    "cached": pl.Boolean,
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(PassResult):
    """Every row measured, failed or left out.

    Attributes:
        table: one row a run: the setting, ``role`` (baseline, model, peer), ``status`` (ok, failed, skipped), errors in
            standardised units, seconds, MiB, parameters, ``error`` and whether it came from the cache.
        data: name of the data set, or of the benchmark where there are several.
        notes: what was assumed about the data.
        path: folder with ``table.parquet``, ``summary.json``, ``report.md`` and ``report.html``.
    """

    table: pl.DataFrame
    data: str
    notes: tuple[str, ...]
    path: Path

    def summary(self, *, places: bool = True) -> dict[str, Any]:
        """Return what a person wants to know first, with ``places`` where the report lies too."""
        return {"data": self.data, "settings": self.table.height, **self.facts(places=places)}

    def rows(self) -> list[dict[str, Any]]:
        """Return the records without what only the report needs."""
        return [{key: row[key] for key in row if key not in ("role", "lookback")} for row in self.records()]

    def records(self) -> list[dict[str, Any]]:
        """Return one record per data set, horizon, model and context length, seeds averaged, best first."""
        keys = ["data", "horizon", "model", "context_length"]
        ok = pl.col("status") == "ok"
        means = [pl.col(name).filter(ok).mean() for name in ("mse", "mae", "fit_seconds", "eval_seconds")]
        grouped = self.table.group_by(keys, maintain_order=True).agg(
            *means,
            pl.col("mse").filter(ok).std().alias("mse_sd"),
            pl.col("mse").filter(ok).min().alias("mse_min"),
            pl.col("mse").filter(ok).max().alias("mse_max"),
            pl.col("peak_memory_mb").filter(ok).max(),
            pl.col("parameters").filter(ok).first(),
            ok.sum().alias("runs"),
            pl.col("role", "lookback", "note").first(),
            pl.col("status").sort_by(ok).first(),  # a failure in any seed shows
            pl.col("error").drop_nulls().first(),
        )
        base = grouped.filter(model="last_value").select("data", "horizon", base="mse").unique(["data", "horizon"])
        joined = grouped.join(base, on=["data", "horizon"], how="left", maintain_order="left")
        mse, naive = (joined[name].fill_null(np.nan).to_numpy() for name in ("mse", "base"))
        skill = pl.Series("skill", skill_score(mse, naive)).fill_nan(None)
        sets = pl.Enum(self.table["data"].unique(maintain_order=True))
        ordered = (
            joined.with_columns(skill, pl.col("data").cast(sets))
            .sort("data", "horizon", "mse", nulls_last=True, maintain_order=True)
            .with_columns(pl.col("data").cast(pl.String))
        )
        columns = [*keys, "mse", "mae", "mse_sd", "mse_min", "mse_max", "skill", "runs", "fit_seconds", "eval_seconds"]
        rest = ["peak_memory_mb", "parameters", "role", "lookback", "note", "status", "error"]
        return ordered.select(*columns, *rest).to_dicts()


def benchmark(config: BenchmarkConfig, workspace: Workspace, *, progress: bool = False) -> BenchmarkResult:
    """Measure every setting that is not cached and return the whole table; naive forecasts are always part of it.

    A setting that fails becomes a row with its error and does not stop the others.

    Args:
        config: what to measure.
        workspace: results and cache live below ``reports/benchmark``.
        progress: show a bar on a terminal, else log a line for each setting.

    Raises:
        ConfigError: an unknown data set, model or setting, found before anything is measured.
        DataError: a data set cannot be used.
        KeyboardInterrupt: what was measured before is kept, no process is left behind.
    """
    check_entries(config.models, config)
    peers = None
    if any(entry.is_peer for entry in config.models):
        peers = open_peers(config.peers, config.threads)
    elif config.peers.python is not None:
        raise ConfigError("--peers has no effect: none of the models is a peer, written LIBRARY/MODEL")
    prepared = prepare(config, workspace)
    for item in prepared:
        for note in item.data.notes:
            _LOG.warning("%s: %s", item.data.name, note)
    run = _Run(config, prepared, workspace, peers)
    with open_progress(run.total, show=progress) as shown:
        run.measure(shown)
    notes = [
        note if len(prepared) == 1 else f"{item.data.name}: {note}" for item in prepared for note in item.data.notes
    ]
    if config.seeds > 1 and run.without_chance:
        notes.append(f"{len(run.without_chance)} settings have no random part: one run stands for all seeds")
    name = config.name or (prepared[0].data.name if len(prepared) == 1 else f"{len(prepared)}_sets")
    mark = (
        prepared[0].data.fingerprint
        if len(prepared) == 1
        else fingerprint({"data": [item.data.fingerprint for item in prepared]})
    )
    table = _with_best(run.table())
    # a run in which nothing came out must not take the place of the report of one in which something did
    kind = "last" if (table["status"] == "ok").any() else "no_results"
    path = workspace.reports / "benchmark" / f"{name}-{mark}" / kind
    result = BenchmarkResult(table=table, data=name, notes=tuple(notes), path=path)
    _save(result, config, prepared)
    return result


def code_version(model: str) -> str:
    """Return a hash of the source files that decide the result of a model's settings."""
    root = Path(tsforge.__file__).parent
    files: list[Path] = [*root.glob("models/_*.py"), root / "models" / f"{model}.py"]
    if model in FITTERS or not files[-1].is_file():  # an entry that may fit any of them
        files = [path for path in root.rglob("*.py") if path.parent.name != "peers"]
    for name in _SOURCES:
        place = root / name
        files += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in sorted({path for path in files if path.is_file()}):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


Mark = tuple[str, str, str, int, int, int]


@dataclass(kw_only=True)
class _Family:
    """All seeds of a setting: the first is run alone, since it tells whether the others are needed."""

    job: Job
    more: list[Setting] = field(default_factory=list)


class _Run(Pass):
    """One pass over every setting: what is cached, what is waiting, what came out."""

    def __init__(
        self, config: BenchmarkConfig, prepared: list[Prepared], workspace: Workspace, peers: PeerHost | None
    ) -> None:
        super().__init__(
            workers=config.workers,
            threads=config.threads,
            peers=peers,
            minutes=config.budget_minutes,
            refresh=config.refresh,
            key="mse",
        )
        self._root = workspace.reports / "benchmark"
        self._codes: dict[str, str] = {}
        self._rows: dict[tuple[str, Mark], dict[str, Any]] = {}
        self._order: dict[tuple[str, Mark], int] = {}
        self._families: dict[tuple[str, str], _Family] = {}
        self.without_chance: set[tuple[str, str]] = set()
        for place, item in enumerate(prepared):
            turn = 0 if config.budget_minutes is None else place  # whole data sets first: what is begun can be ranked
            for setting in plan(config, item):
                row = (item.data.fingerprint, _mark(setting))
                if row in self._order:
                    continue  # the same entry twice
                self._order[row] = len(self._order)
                key = (item.data.fingerprint, _family(setting))
                family = self._families.get(key)
                if family is None:
                    job = Job(data=item.data, setting=setting, cost=cost(setting, item.data), turn=turn)
                    self._families[key] = _Family(job=job)
                else:
                    family.more.append(setting)
        self.total = len(self._order)

    def table(self) -> pl.DataFrame:
        """Return every row in the order of the plan."""
        ordered = sorted(self._rows.items(), key=lambda item: self._order[item[0]])
        return pl.DataFrame([{name: row.get(name) for name in _SCHEMA} for _, row in ordered], schema=_SCHEMA)

    def first_jobs(self) -> list[Job]:
        """Return the first seed of every setting."""
        return [family.job for family in self._families.values()]

    def describe(self, job: Job) -> str:
        """Return data set, model, look-back and horizon."""
        setting = job.setting
        return f"{job.data.name} {setting.label} L={setting.context_length} h={setting.horizon}"

    def follow(self, job: Job, row: dict[str, Any], progress: Progress) -> list[Job]:
        """Return the other seeds of a first run, unless chance plays no part or the setting fails."""
        key = (job.data.fingerprint, _family(job.setting))
        waiting = self._families[key].more
        if row.get("closed_form"):
            self.without_chance.add(key)
        if row.get("closed_form") or row["status"] == "failed":  # a mean over fewer seeds would not be comparable
            progress.drop(len(waiting))
            waiting.clear()
            return []
        found = [replace(job, setting=setting) for setting in waiting]
        waiting.clear()
        return found

    def keep(self, job: Job, row: dict[str, Any], progress: Progress) -> None:
        """Take a row into the table."""
        setting = job.setting
        about = {
            "data": job.data.name,
            "role": setting.role,
            "model": setting.label,
            "lookback": setting.lookback,
            "context_length": setting.context_length,
            "horizon": setting.horizon,
            "seed": setting.seed,
        }
        self._rows[job.data.fingerprint, _mark(setting)] = {**about, **row}
        progress.advance({**about, **row})

    def place(self, job: Job) -> Path:
        """Return the file in the cache, named by everything that decides its content."""
        setting, data = job.setting, job.data
        if setting.name not in self._codes:
            library = setting.name.partition("/")[0]
            peer = self._peers if setting.kind == "peer" else None
            self._codes[setting.name] = code_version(setting.name) if peer is None else peer.code(library)
        plain = setting.plain()
        key = fingerprint({**plain, "data": data.fingerprint, "season": data.season, "code": self._codes[setting.name]})
        folder = self._root / f"{data.name}-{data.fingerprint}" / "cache"
        return folder / f"{setting.name.replace('/', '.')}-{key}.json"


def _mark(setting: Setting) -> Mark:
    """Return what tells one row of a data set from another."""
    return (
        setting.role,
        setting.label,
        setting.lookback,
        setting.context_length,
        setting.horizon,
        setting.seed,
    )


def _family(setting: Setting) -> str:
    """Return what all seeds of a setting share."""
    return fingerprint({**setting.plain(), "seed": None, "mark": _mark(setting)[:-1]})


def _with_best(table: pl.DataFrame) -> pl.DataFrame:
    """Return the table with each closed-form baseline at the look-back that is best on validation; candidates go."""
    chosen = []
    for label in LINEAR_BASELINES:
        rows = table.filter(role="baseline", model=label, status="ok").drop_nulls("valid_mse")
        for group in rows.partition_by("data", "horizon", maintain_order=True):
            lengths = sorted(set(group["context_length"].to_list()))
            best = group.sort("valid_mse").head(1)
            note = f"L={best['context_length'][0]} of {', '.join(map(str, lengths))}, chosen on validation"
            title = pl.lit(f"{label}, best look-back").alias("model")
            chosen.append(best.with_columns(title, pl.lit(note).alias("note"), pl.lit("best").alias("lookback")))
    shown = table.filter((pl.col("lookback") != HIDDEN) | (pl.col("status") == "failed"))
    return pl.concat([shown, *chosen])


def _save(result: BenchmarkResult, config: BenchmarkConfig, prepared: list[Prepared]) -> None:
    with atomic_directory(result.path, replace=True) as temporary:
        result.table.write_parquet(temporary / "table.parquet")
        document = {
            "config": config.model_dump(mode="json"),
            **result.summary(places=False),
            "environment": environment(config),
            "rows": result.rows(),
        }
        (temporary / "summary.json").write_text(json.dumps(document, indent=1, default=str))
        write_report(temporary, result.table, result.records(), prepared, config, result.notes)
