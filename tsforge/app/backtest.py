"""Backtest: fit on the past again and again, grade against what came, keep the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from pydantic import Field, model_validator

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.fit_checks import check_settings
from tsforge.app.fit_warnings import warn_of_rows
from tsforge.app.ingest import dataset_hierarchy, load_history
from tsforge.app.worker_pool import Job, JobQueue, WorkerPool
from tsforge.artifact import Artifact
from tsforge.core import errors
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event, warned_once
from tsforge.core.workspace import Workspace
from tsforge.data.splits import SplitConfig
from tsforge.data.vintages import History, known_at
from tsforge.forecasting.backtest import BacktestConfig, Elsewhere, Fit
from tsforge.forecasting.backtest import backtest as backtest_frame
from tsforge.forecasting.backtest_folds import FoldOutcome, run_fold
from tsforge.forecasting.baselines import frame_season
from tsforge.forecasting.conformal_calibration import calibrate
from tsforge.forecasting.report import BacktestReport
from tsforge.models.seasonal_naive import SeasonalNaiveConfig

_LOG = get_logger(__name__)
FOLDER = "backtests"


class BacktestJobConfig(FitConfig):
    """A fit config, and the cutoffs it is tried from."""

    backtest: BacktestConfig = BacktestConfig()
    valid: float = Field(0.15, ge=0, lt=1)
    """Share of the rows before each cutoff that stops the training and calibrates the intervals."""
    compare: tuple[str, ...] = ()
    """Further models, with their default settings, in the same report; a seasonal naive has the report's season."""
    workers: int = Field(1, ge=1)
    """Processes that fit side by side from the second fit on; each has the data in memory."""

    @model_validator(mode="after")
    def _no_split(self) -> BacktestJobConfig:
        if self.split != SplitConfig():
            raise ConfigError("split has no effect in a backtest: every fit ends at its cutoff; set valid (a share)")
        twice = [name for name in self.compare if name == self.model.name or self.compare.count(name) > 1]
        if twice:
            raise ConfigError(f"compare: {listing(dict.fromkeys(twice))} would be measured twice")
        return self

    @model_validator(mode="after")
    def _workers_have_work(self) -> BacktestJobConfig:
        every, cutoffs = self.backtest.refit_every, self.backtest.num_cutoffs
        if self.workers > 1 and (every == 0 or every >= cutoffs):
            raise ConfigError(
                f"workers={self.workers} has no effect with a single fit for {cutoffs} cutoffs; set "
                "backtest.refit_every, or leave workers out"
            )
        return self

    @model_validator(mode="after")
    def _fits_are_possible(self) -> BacktestJobConfig:
        if (start := self.warm_start.artifact) is not None:
            raise ConfigError(
                f"warm_start.artifact={start} works with tsforge fit and retrain only: elsewhere it would know rows "
                "that are forecast; leave it out"
            )
        check_settings(self.fit_config())
        for name in self.compare:  # one that is unknown or does not go with the settings: told before the first fit
            try:
                check_settings(self.fit_config(name))
            except ConfigError as error:
                raise ConfigError(f"compare: {error}") from error
        return self

    def fit_config(self, model: str | None = None) -> FitConfig:
        """Return how one fit runs: no test part, since what follows the cutoff is the test."""
        shares = SplitConfig(train=1.0 - self.valid, valid=self.valid, test=0.0)
        values = {name: getattr(self, name) for name in FitConfig.model_fields}
        changes: dict[str, Any] = {"split": shares} if model is None else {"split": shares, "model": model}
        return validate(FitConfig, {**values, **changes})


def backtest(config: BacktestJobConfig, workspace: Workspace, *, progress: bool = False) -> BacktestReport:
    """Return the report of a backtest on stored data, kept below ``reports/backtests``.

    Args:
        config: data, model, training, cutoffs.
        workspace: where the data lies and the report goes.
        progress: log a line for each fit.

    Raises:
        DataError: no such data set, or too few rows for the cutoffs.
        ConfigError, ModelError: a model that does not fit the data.
    """
    config = _with_structure(config, workspace)
    fits = _fits(config, config.backtest.season_length)
    with ExitStack() as stack:
        pool = stack.enter_context(_processes(config)) if config.workers > 1 else None
        frame = load_history(workspace, config.data, masked=True)
        stack.enter_context(warned_once(fit_frame.__module__, warn_of_rows.__module__, calibrate.__module__))
        report = backtest_frame(
            fits,
            frame,
            config.backtest,
            horizon=config.window.horizon,
            progress=progress,
            structure=config.data.hierarchy,
            elsewhere=None if pool is None else _side_by_side(config, frame, pool),
        )
    created = datetime.now(UTC)
    about = {
        "dataset": config.data.name,
        "model": config.model.name,
        "created": created.isoformat(timespec="seconds"),
        "data_fingerprint": frame.fingerprint(),
        "config": config.model_dump(mode="json"),
    }
    report = replace(report, settings={**about, **report.settings})
    name = f"{config.data.name}-{config.model.name}-{created:%Y%m%dT%H%M%S%f}Z"
    report = report.save(workspace.reports / FOLDER / name)
    log_event(_LOG, "backtested", dataset=config.data.name, model=config.model.name, report=name)
    return report


def _with_structure(config: BacktestJobConfig, workspace: Workspace) -> BacktestJobConfig:
    """Return the config with the hierarchy that the data set was ingested with, where one is needed and none stated."""
    if config.data.hierarchy is not None or config.backtest.reconcile is None:
        return config
    structure = dataset_hierarchy(workspace, config.data.name)
    return config.model_copy(update={"data": config.data.model_copy(update={"hierarchy": structure})})


def _fits(config: BacktestJobConfig, season: int | None) -> dict[str, Fit]:
    names = (config.model.name, *config.compare)
    return {name: _fit(config.fit_config(None if name == config.model.name else name), season) for name in names}


def _fit(config: FitConfig, season: int | None) -> Fit:
    """Return the fit of a model; a seasonal naive without a season of its own has that of the report.

    Args:
        config: of each fit.
        season: that the report declares, None = found at the first cutoff, as the report does.
    """
    settled: list[FitConfig] = []
    if not isinstance(config.model, SeasonalNaiveConfig) or "season_length" in config.model.model_fields_set:
        settled.append(config)

    def fit(frame: History, cutoff: Any) -> Artifact:
        if not settled:
            settled.append(_of_season(config, frame_season(known_at(frame, cutoff), season)))
        return fit_frame(frame, settled[0])[0]

    return fit


def _of_season(config: FitConfig, season: int) -> FitConfig:
    """Return the config of a seasonal naive with a season, which its window holds."""
    window = config.window.model_copy(update={"context_length": max(config.window.context_length, season)})
    model = SeasonalNaiveConfig(season_length=season)
    return config.model_copy(update={"model": model, "window": window})


@dataclass(frozen=True, kw_only=True)
class _FoldData:
    """What every fold reads; sent to a process once."""

    name: str
    fingerprint: str
    history: History


@dataclass(frozen=True, kw_only=True)
class _FoldTask:
    """One fold, for another process."""

    config: BacktestJobConfig
    number: int
    season: int
    called: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """Return what it is."""
        return {"fold": self.number}

    def measure(self, data: _FoldData, *, progress: bool) -> dict[str, Any]:
        """Return the outcome or the error, and the warnings, which the process that asked gives out."""
        kept, logger = _KeptWarnings(), logging.getLogger("tsforge")
        logger.addHandler(kept)
        heard, logger.propagate = logger.propagate, False
        try:
            outcome = run_fold(
                _fits(self.config, self.season),
                data.history,
                self.config.backtest,
                self.number,
                self.called,
                horizon=self.config.window.horizon,
                structure=self.config.data.hierarchy,
            )
        except TsforgeError as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
            return {"error": (kind, str(error)), "warnings": kept.records}
        finally:
            logger.propagate = heard
            logger.removeHandler(kept)
        return {"outcome": outcome, "warnings": kept.records}


class _KeptWarnings(logging.Handler):
    """Keeps warnings as plain values that can be sent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[tuple[str, int, str, tuple[Any, ...]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one: text and values apart, by which it is known again."""
        values = record.args if isinstance(record.args, tuple) else ()
        plain = tuple(value if isinstance(value, int | float | str) else str(value) for value in values)
        text = str(record.msg) if isinstance(record.args, tuple) else record.getMessage()
        self.records.append((record.name, record.levelno, text, plain))


@contextmanager
def _processes(config: BacktestJobConfig) -> Iterator[WorkerPool]:
    """Give processes for the fits after the first one, which load libraries meanwhile."""
    fits = math.ceil(config.backtest.num_cutoffs / config.backtest.refit_every)
    workers = min(config.workers, fits - 1)
    with WorkerPool(workers, threads=max(torch.get_num_threads() // workers, 1), peers=None) as pool:
        pool.warm()
        yield pool


def _side_by_side(config: BacktestJobConfig, history: History, pool: WorkerPool) -> Elsewhere:
    """Return what runs folds in processes, those with most rows first."""

    def run(numbers: Sequence[int], season: int, called: Mapping[str, str]) -> Iterator[FoldOutcome]:
        data = _FoldData(name=config.data.name, fingerprint=history.fingerprint(), history=history)
        queue = JobQueue()
        for number in numbers:
            task = _FoldTask(config=config, number=number, season=season, called=called)
            queue.push(Job(data=data, setting=task, cost=number))
        for job, found in pool.results(queue):
            if found["status"] != "ok":
                raise BackendError(f"fold {job.setting.number + 1} failed: {found['error']}")
            for name, level, text, values in found["warnings"]:
                get_logger(name).log(level, text, *values)
            if "error" in found:
                kind, text = found["error"]
                raise getattr(errors, kind)(text)
            yield found["outcome"]

    return run
