"""Anomaly benchmark: families x models x recipes beside plain scorers, one model a series, graded once by the labels.

Every job is a file in a cache keyed by data, settings and source code, as in the forecasting benchmark: an interrupted
run goes on where it stopped, an unchanged one is free. A job that fails is listed, never entered as 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field, field_validator

import tsforge
from tsforge.anomaly.config import (
    BudgetRule,
    CalibrationConfig,
    DetectConfig,
    EventConfig,
    GuardSetting,
    RuleConfig,
    ScoreConfig,
)
from tsforge.anomaly.ensemble import EnsembleConfig
from tsforge.app.anomaly_benchmark_data import LabelledFamily, LabelledSeries, read_family
from tsforge.app.anomaly_benchmark_report import Measured, leaderboard, write_report
from tsforge.app.anomaly_benchmark_rules import rule_records
from tsforge.app.anomaly_benchmark_run import BASELINES_LABEL, BaselineSetting, Judgement, ModelSetting
from tsforge.app.benchmark import code_version
from tsforge.app.benchmark_config import ModelEntry, parse_entry
from tsforge.app.benchmark_pass import Pass, PassResult
from tsforge.app.benchmark_progress import Progress, open_progress
from tsforge.app.benchmark_report import environment
from tsforge.app.detect import rounded
from tsforge.app.worker_pool import Job
from tsforge.core.atomic import atomic_directory
from tsforge.core.config import Config, fingerprint, validate
from tsforge.core.errors import ConfigError
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.models.registry import MODELS, resolve_model_config
from tsforge.training.config import TrainConfig

_LOG = get_logger(__name__)
FOLDER = "anomaly_benchmark"
DEPLOYED = "deployed"  # the name of ``rule`` among the further ones
RESIDUALS, ENSEMBLE = "residuals", "ensemble"  # the rows of ``score`` and ``ensemble``
_SOURCES = (
    "anomaly",
    "metrics",
    "forecasting/rolling.py",
    "app/anomaly_benchmark_data.py",
    "app/anomaly_benchmark_run.py",
)
_TRAINED = 100.0  # rough cost of gradient training against a closed form
_NUMBERS = ("auc_pr", "vus_pr", "vus_pr_reference", "chance", "rows_per_day", "nominal", "seconds")
_SUMS = ("hits_100", "hits_150", "hit_chance")
_EVENTS = ("events", "found", "segments", "false_segments", "normal_rows", "alarmed_normal_rows", "rows")
_COUNTS = (*_EVENTS, "hit_events")
_SHOWN = (
    *("family", "method", "auc_pr", "vus_pr", "event_precision", "event_recall", "event_f1"),
    *("false_events_per_day", "median_delay_rows", "verdict", "failed"),
)
SCHEMA: dict[str, Any] = {
    "family": pl.String,
    "series": pl.String,
    "method": pl.String,
    "role": pl.String,
    "seed": pl.Int64,
    "status": pl.String,
    **dict.fromkeys((*_NUMBERS, *_SUMS), pl.Float64),
    **dict.fromkeys((*_COUNTS, "unscored"), pl.Int64),
    "delays": pl.List(pl.Float64),
    "closed_form": pl.Boolean,
    "error": pl.String,
    "cached": pl.Boolean,
}


RULES_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("family", "series", "method", "role", "rule"), pl.String),
    "seed": pl.Int64,
    "status": pl.String,
    **dict.fromkeys(_EVENTS, pl.Int64),
    **dict.fromkeys(("rows_per_day", "nominal"), pl.Float64),
    "delays": pl.List(pl.Float64),
    "error": pl.String,
}


class AnomalyBenchmarkConfig(Config):
    """What to measure; one recipe for all families."""

    families: tuple[str, ...] = Field(min_length=1)
    """Known families, ``synthetic``, or folders of SERIES_train.parquet and SERIES_test.parquet with a label."""
    models: tuple[ModelEntry, ...] = ()
    """As in the forecasting benchmark: ``name:key=value``; ``data`` of an entry names families."""
    context_length: int = Field(32, ge=1)
    """Rows a model sees, where an entry names none."""
    horizon: int = Field(1, ge=1)
    """Rows ahead of which residuals are taken."""
    score: ScoreConfig | None = validate(ScoreConfig, {"joint": "mahalanobis", "smoothing": 0.1})
    """Of the residuals of a model alone; null: not graded."""
    scores: dict[str, ScoreConfig] = Field(default_factory=dict)
    """Further scores of the same model by a name of one's own, each a row beside ``score``."""
    guard: GuardSetting = None
    """Of ``score``, as in ``detect``; the others have none. Rows then go through a model one at a time."""
    ensemble: EnsembleConfig | None = EnsembleConfig()
    """Of a model's residuals with plain scorers; null: not graded. Its plain members alone are a row too."""
    calibration: CalibrationConfig = CalibrationConfig(min_scale_rows=30, min_rows=50)
    """Of ``detect``; its least sizes are below the usual ones, since some families have a few hundred training rows."""
    smoothing: float = Field(0.1, gt=0.0, le=1.0)
    """Of the second row of every plain scorer."""
    two_sided: bool = False
    """A third row of every plain scorer, smoothed to both sides: fair beside scores with ``smoothing.kind=two_sided``,
    which know later rows."""
    rule: RuleConfig = BudgetRule()
    """How alarms are raised; a budget takes rows a day from the family, or 10,000 rows for a day."""
    rules: dict[str, RuleConfig] = Field(default_factory=dict)
    """Further rules by a name of one's own, judged on the same scores beside ``rule``; areas do not depend on it."""
    events: EventConfig = EventConfig()
    fit_share: float = Field(0.7, gt=0.0, lt=1.0)
    """Of the training rows; the others scale and calibrate."""
    width: int = Field(100, ge=0)
    """Largest buffer W of VUS."""
    seeds: int = Field(1, ge=1)
    """Runs with seeds 0, 1, ...; a fit without randomness is run once."""
    train: TrainConfig = TrainConfig()
    series: tuple[str, ...] | None = Field(None, min_length=1)
    """Only these series; all families must have them."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many series of each family."""
    sensor_only: bool = False
    """Leave out the commands of families with one sensor (msl, smap)."""
    data_folder: str | None = None
    """Where known families lie (or in its ``anomaly/``); default TSFORGE_DATA."""
    workers: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    budget_minutes: float | None = Field(None, gt=0)
    """No job is begun after this time; those left out are reported as skipped."""
    refresh: bool = False
    """Measure again what is cached."""
    name: str = ""
    """Of the report; default the families."""

    @field_validator("models", mode="before")
    @classmethod
    def _parse_models(cls, values: Any) -> Any:
        items = [values] if isinstance(values, str | Mapping) else values or []
        return [parse_entry(item) if isinstance(item, str) else item for item in items]

    @field_validator("families", mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        return [values] if isinstance(values, str) else values

    @field_validator("rule", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        return {"kind": "budget", **value} if isinstance(value, dict) else value

    @property
    def judgement(self) -> Judgement:
        """What all methods share."""
        return Judgement(
            fit_share=self.fit_share,
            rule=self.rule,
            events=self.events,
            width=self.width,
            rules=tuple(self.rules.items()),
        )


@dataclass(frozen=True, kw_only=True)
class AnomalyBenchmarkResult(PassResult):
    """Every row measured, failed or left out.

    Attributes:
        table: one row a family, series, method and seed. ruled: one for each of their rules, if there are further ones.
        notes: what a reader has to know, by family.
        path: folder with ``table.parquet``, ``rules.parquet``, ``summary.json``, ``report.md`` and ``report.html``.
    """

    table: pl.DataFrame
    ruled: pl.DataFrame
    name: str
    notes: tuple[str, ...]
    path: Path

    def summary(self, *, places: bool = True) -> dict[str, Any]:
        """Return what a person wants to know first, with ``places`` where the report lies too."""
        rules = {"failed_rules": self.ruled.filter(status="failed").height} if self.ruled.height else {}
        return {"benchmark": self.name, "rows": self.table.height, **rules, **self.facts(places=places)}

    def rows(self) -> list[dict[str, Any]]:
        """Return the records with what fits on a screen."""
        return [{name: rounded(record[name]) for name in _SHOWN} for record in self.records()]

    def records(self) -> list[dict[str, Any]]:
        """Return one record a family and method, best first; ``leaderboard`` says what is in it."""
        return leaderboard(self.table)


def anomaly_benchmark(
    config: AnomalyBenchmarkConfig, workspace: Workspace, *, progress: bool = False
) -> AnomalyBenchmarkResult:
    """Measure every job that is not cached and return the whole table; plain scorers are always part of it.

    Args:
        config: what to measure.
        workspace: results and cache live below ``reports/anomaly_benchmark``.
        progress: show a bar on a terminal, else log a line for each job.

    Raises:
        ConfigError: an unknown family, model or setting, found before anything is measured.
        DataError: a family cannot be used.
    """
    families = [
        read_family(name, config.data_folder, sensor_only=config.sensor_only, only=config.series, limit=config.limit)
        for name in dict.fromkeys(config.families)
    ]
    names = [family.name for family in families]
    if len(set(names)) < len(names):
        raise ConfigError(f"families: {', '.join(names)} names one family twice; rename a folder or measure them apart")
    notes = tuple(f"{family.name}: {note}" for family in families for note in family.notes)
    for note in notes:
        _LOG.warning("%s", note)
    run = _Run(config, families, workspace)
    with open_progress(run.total, show=progress) as shown:
        run.measure(shown)
    name = config.name or "-".join(names)
    path = workspace.reports / FOLDER / name / "last"
    result = AnomalyBenchmarkResult(table=run.table(), ruled=run.ruled(), name=name, notes=notes, path=path)
    with atomic_directory(path, replace=True) as temporary:
        result.table.write_parquet(temporary / "table.parquet")
        result.ruled.write_parquet(temporary / "rules.parquet")
        document = {
            "config": config.model_dump(mode="json"),
            **result.summary(places=False),
            "environment": environment(config),
            "rows": result.records(),
            "rules": rule_records(result.ruled),
        }
        (temporary / "summary.json").write_text(json.dumps(document, indent=1, default=str))
        tables = Measured(result.table, result.ruled, tuple(families))
        write_report(temporary, tables, environment(config), name, config.width)
    return result


class _Run(Pass):
    """One pass over all jobs: a job is a series with all plain scorers, or with one model."""

    def __init__(self, config: AnomalyBenchmarkConfig, families: list[LabelledFamily], workspace: Workspace) -> None:
        super().__init__(
            workers=config.workers,
            threads=config.threads,
            peers=None,
            minutes=config.budget_minutes,
            refresh=config.refresh,
            key="rows",
        )
        self._root = workspace.reports / FOLDER
        self._compares_rules = bool(config.rules)
        self._codes: dict[str, str] = {}
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._ruled: list[tuple[int, dict[str, Any]]] = []
        self._order: dict[tuple[str, str, str, int], int] = {}
        self._jobs: list[Job] = []
        self._seeds = {entry.title: entry.seeds or config.seeds for entry in config.models}
        ensembles = _plain_ensembles(config)
        _check(config, {family.name for family in families})
        for turn, family in enumerate(families):
            for series, reason in family.unusable:
                about = {"family": family.name, "series": series, "method": "all", "status": "failed", "error": reason}
                self._rows.append((-1, {**about, "cached": False}))
            for data in family.series:
                plain = BaselineSetting(
                    judgement=config.judgement,
                    smoothing=config.smoothing,
                    two_sided=config.two_sided,
                    ensembles=ensembles,
                )
                settings: list[BaselineSetting | ModelSetting] = [plain]
                settings += [
                    _setting(entry, config)
                    for entry in config.models
                    if entry.data is None or family.name in entry.data
                ]
                self._jobs += [Job(data=data, setting=item, cost=_cost(item, data), turn=turn) for item in settings]
        for job in self._jobs:
            for seed in range(self._seeds.get(job.setting.label, 1)):
                self._order[self._mark(job, seed)] = len(self._order)
        self.total = len(self._order)

    def table(self) -> pl.DataFrame:
        """Return every row in the order of the plan."""
        return _table(self._rows, SCHEMA)

    def ruled(self) -> pl.DataFrame:
        """Return what the further rules did, in the order of the plan."""
        return _table(self._ruled, RULES_SCHEMA)

    def first_jobs(self) -> list[Job]:
        """Return the first seed of every job."""
        return self._jobs

    def describe(self, job: Job) -> str:
        """Return series and method."""
        return f"{job.data.family} {job.data.name} {job.setting.label}"

    def place(self, job: Job) -> Path:
        """Return the file in the cache, named by everything that decides its content."""
        name = job.setting.name
        if name not in self._codes:
            self._codes[name] = _code(name)
        key = fingerprint({**job.setting.plain(), "data": job.data.fingerprint, "code": self._codes[name]})
        return self._root / "cache" / f"{job.data.family}-{job.data.name}" / f"{name}-{key}.json"

    def follow(self, job: Job, row: dict[str, Any], progress: Progress) -> list[Job]:
        """Return the other seeds of a first run, unless chance plays no part or it fails."""
        setting = job.setting
        if setting.seed or isinstance(setting, BaselineSetting):
            return []
        more = self._seeds[setting.label] - 1
        if row.get("closed_form") or row["status"] == "failed":
            progress.drop(more)
            return []
        return [replace(job, setting=replace(setting, seed=seed)) for seed in range(1, more + 1)]

    def keep(self, job: Job, row: dict[str, Any], progress: Progress) -> None:
        """Take the rows of a job into the table."""
        about = {"family": job.data.family, "series": job.data.name, "seed": job.setting.seed}
        order = self._order[self._mark(job, job.setting.seed)]
        shared = {name: row.get(name) for name in ("status", "cached", "error")}
        if row["status"] != "ok":
            found = {**about, "method": job.setting.label, "role": "", **shared}
            self._rows.append((order, found))
        for item in row.get("rows", []):
            self._rows.append((order, {**about, **shared, **item}))
            if item.get("status") == "failed" and not row["cached"]:
                _LOG.warning("%s %s %s failed: %s", job.data.family, job.data.name, item["method"], item["error"])
            if self._compares_rules and item.get("status", "ok") == "ok":
                self._ruled.append((order, {**about, **item, "rule": DEPLOYED, "status": "ok"}))
        self._ruled += [(order, {**about, **item}) for item in row.get("rules", [])]
        progress.advance({**about, "data": job.data.name, "model": job.setting.label, **row})

    @staticmethod
    def _mark(job: Job, seed: int) -> tuple[str, str, str, int]:
        return job.data.family, job.data.name, job.setting.label, seed


def _table(rows: list[tuple[int, dict[str, Any]]], schema: dict[str, Any]) -> pl.DataFrame:
    ordered = [row for _, row in sorted(rows, key=lambda item: item[0])]
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in ordered], schema=schema)


def _plain_ensembles(config: AnomalyBenchmarkConfig) -> tuple[tuple[str, EnsembleConfig], ...]:
    """Return the ensemble without a model, where it has plain members: what does the model add?"""
    if config.ensemble is None or not config.ensemble.plain:
        return ()
    return (("plain ensemble", config.ensemble.model_copy(update={"members": config.ensemble.plain})),)


def _check(config: AnomalyBenchmarkConfig, names: set[str]) -> None:
    titles = [entry.title for entry in config.models]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise ConfigError(f"models: {', '.join(twice)} is there twice; give the entries labels of their own")
    if DEPLOYED in config.rules:
        raise ConfigError(f"rules: '{DEPLOYED}' is what the table calls the rule of `rule`; take another name")
    for entry in config.models:
        if entry.is_peer:
            raise ConfigError(f"models: '{entry.title}' is a peer; the anomaly benchmark measures tsforge's own models")
        strange = sorted(set(entry.data or ()) - names)
        if strange:
            raise ConfigError(
                f"models: '{entry.title}' is for {', '.join(strange)}, but measured are {', '.join(sorted(names))}"
            )
        if entry.context_lengths is not None and len(entry.context_lengths) > 1:
            raise ConfigError(f"models: '{entry.title}' names several look-backs; the anomaly benchmark takes one")
        resolve_model_config({"name": entry.name, **entry.model})
    for name in config.scores:
        if name in (RESIDUALS, ENSEMBLE) or "," in name:
            raise ConfigError(
                f"scores: '{name}' cannot name a row; take a name that is neither "
                f"'{RESIDUALS}' nor '{ENSEMBLE}' and has no comma"
            )
    if config.models and config.score is None and config.ensemble is None and not config.scores:
        raise ConfigError(
            "score and ensemble are both null and scores is empty, so no model would be graded; give one of them"
        )
    if config.guard is not None and config.score is None:
        raise ConfigError("guard is for the residuals of a model alone, which score: null leaves out")
    if config.guard is not None and config.guard.max_rows is None:
        raise ConfigError("guard needs max_rows here: rows of labelled families are numbered, so no season is known")


def _setting(entry: ModelEntry, config: AnomalyBenchmarkConfig) -> ModelSetting:
    recipes: list[tuple[str, DetectConfig | EnsembleConfig]] = []
    shared: dict[str, Any] = {"calibration": config.calibration, "rule": config.rule, "events": config.events}
    if config.score is not None:
        recipes.append((RESIDUALS, DetectConfig(score=config.score, guard=config.guard, **shared)))
    recipes += [(name, DetectConfig(score=score, **shared)) for name, score in config.scores.items()]
    if config.ensemble is not None and config.ensemble.residual:
        recipes.append((ENSEMBLE, config.ensemble))
    train = validate(TrainConfig, {**config.train.model_dump(exclude_unset=True), **entry.train}, where="train")
    fit: dict[str, Any] = {
        "model": {"name": entry.name, **entry.model},
        "window": {
            "context_length": (entry.context_lengths or (config.context_length,))[0],
            "horizon": config.horizon,
        },
        "train": train.model_dump(mode="json", exclude_unset=True),
    }
    if entry.likelihood:
        fit["likelihood"] = entry.likelihood
    if entry.scaling:
        fit["scaling"] = entry.scaling
    return ModelSetting(
        name=entry.name, label=entry.title, fit=fit, seed=0, judgement=config.judgement, recipes=tuple(recipes)
    )


def _cost(setting: BaselineSetting | ModelSetting, data: LabelledSeries) -> float:
    size = float(data.train.size)
    if isinstance(setting, BaselineSetting):
        return size
    return size * (2.0 if MODELS.get(setting.name).capabilities.closed_form else _TRAINED)


def _code(name: str) -> str:
    """Return a hash of the source files that decide the rows of a job."""
    root = Path(tsforge.__file__).parent
    digest = hashlib.sha256(code_version("linear" if name == BASELINES_LABEL else name).encode())
    for source in _SOURCES:
        place = root / source
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
