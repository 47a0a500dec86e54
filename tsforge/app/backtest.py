"""Backtest: fit on the past again and again, grade against what came, keep the report."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, model_validator

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.fit_checks import check_settings
from tsforge.app.fit_warnings import warn_of_rows
from tsforge.app.ingest import dataset_hierarchy, load_history
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, listing
from tsforge.core.logs import get_logger, log_event, warned_once
from tsforge.core.workspace import Workspace
from tsforge.data.splits import SplitConfig
from tsforge.data.vintages import History, known_at
from tsforge.forecasting.backtest import BacktestConfig, Fit
from tsforge.forecasting.backtest import backtest as backtest_frame
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

    @model_validator(mode="after")
    def _no_split(self) -> BacktestJobConfig:
        if self.split != SplitConfig():
            raise ConfigError("split has no effect in a backtest: every fit ends at its cutoff; set valid (a share)")
        twice = [name for name in self.compare if name == self.model.name or self.compare.count(name) > 1]
        if twice:
            raise ConfigError(f"compare: {listing(dict.fromkeys(twice))} would be measured twice")
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
    frame = load_history(workspace, config.data, masked=True)
    season = config.backtest.season_length
    fits = {
        name: _fit(config.fit_config(None if name == config.model.name else name), season) for name in _names(config)
    }
    with warned_once(fit_frame.__module__, warn_of_rows.__module__, calibrate.__module__):
        report = backtest_frame(
            fits,
            frame,
            config.backtest,
            horizon=config.window.horizon,
            progress=progress,
            structure=config.data.hierarchy,
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


def _names(config: BacktestJobConfig) -> tuple[str, ...]:
    return (config.model.name, *config.compare)


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
