"""Folds of a backtest: cutoffs that share one fit; each from what was known at its cutoffs, whatever ran before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from tsforge.artifact import Artifact
from tsforge.core.config import Config, QuantileLevel
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.data.aggregates import frame_hierarchy
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import show_time
from tsforge.data.hierarchy import Hierarchy, HierarchyConfig
from tsforge.data.panel import Panel
from tsforge.data.vintages import History, VintageFrame, known_at, newest
from tsforge.forecasting.backtest_cold import (
    ColdBacktest,
    ColdFold,
    Graded,
    check_cold,
    cold_forecasts,
)
from tsforge.forecasting.backtest_forecasts import Truth, forecasts_at, forecasts_of_vintages, lacking_known
from tsforge.forecasting.baselines import BASELINES, TrainingSpan, fit_baseline, frame_season, is_baseline
from tsforge.forecasting.coherent import make_coherence, reconciled_name
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.predict import offered_levels
from tsforge.forecasting.reconcile import ReconcileConfig
from tsforge.forecasting.regimes import HISTORY, Regime, block_rows, check_regimes, window_labels
from tsforge.forecasting.sample_paths import joint_scores
from tsforge.metrics.point import seasonal_scale

_LOG = get_logger(__name__)

Fit = Callable[[Any, Any], Artifact]
"""From a ``SeriesFrame`` that ends at the cutoff (or a ``VintageFrame`` of what was out by then), and the cutoff."""


class BacktestConfig(Config):
    """Which cutoffs, and how often to fit again."""

    num_cutoffs: int = Field(10, ge=1)
    """Cutoffs; the last one leaves exactly one horizon of observed data."""
    stride: int | None = Field(None, ge=1)
    """Steps between cutoffs; default one horizon, so that no row is forecast twice."""
    refit_every: int = Field(0, ge=0)
    """Fit again at every k-th cutoff; 0 fits once, at the first."""
    horizon: int | None = Field(None, ge=1)
    """Steps to grade; default the trained horizon."""
    season_length: int | None = Field(None, ge=1)
    """Season of the naive forecast and of the scaled metrics; default from the frequency, else found in the data."""
    baselines: tuple[str, ...] = BASELINES
    """Naive forecasts beside the model; ``last_value`` is always among them. ``NAME@baseline`` where a model with other
    settings has the name."""
    quantile_levels: tuple[QuantileLevel, ...] | None = None
    """Default: every level the artifact offers."""
    regimes: tuple[Regime, ...] = ("volatility",)
    """Breakdowns of errors: ``volatility, level`` before the cutoff, ``hour, weekday, month`` of the forecast row."""
    regime_rows: int | None = Field(None, ge=2)
    """Rows before a cutoff that volatility and level look at; default whole seasons that cover the horizon."""
    reconcile: ReconcileConfig | None = None
    """Grade each model a second time with its forecasts made to add up; weights from before the cutoff of the fit."""
    regime_column: str | None = None
    """A column of codes; its last value up to the cutoff is one more breakdown."""

    truth: Truth = "latest"
    """What forecasts are graded against where values were revised: the last publication, or the first."""
    online: OnlineConfig | None = None
    """Grade every model a second time with intervals that learn on the way; ``true`` takes the defaults."""
    cold_start: ColdBacktest | None = None
    """Treat series as new, a group at a time, and grade what the model makes of a few rows of them; ``true`` takes the
    defaults."""

    @field_validator("online", "cold_start", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in BASELINES]
        if unknown:
            raise ValueError(f"unknown baseline(s) {listing(unknown)} (known: {listing(BASELINES)})")
        return tuple(dict.fromkeys(("last_value", *names)))

    @field_validator("regimes")
    @classmethod
    def _once(cls, names: tuple[Regime, ...]) -> tuple[Regime, ...]:
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _used(self) -> BacktestConfig:
        if self.regime_rows is not None and not set(self.regimes) & set(HISTORY):
            raise ValueError("regime_rows has no effect without the regimes volatility or level")
        if self.regime_column in self.regimes:
            raise ValueError(f"regime_column '{self.regime_column}' is also the name of a regime; rename the column")
        if self.cold_start is not None and (self.online is not None or self.reconcile is not None):
            raise ValueError("cold_start forecasts series on their own and without their past: no online, no reconcile")
        return self


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Cutoffs that share one fit: absolute rows of their last visible row."""

    number: int
    cutoffs: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """What one fold came to.

    Attributes:
        number: of the fold.
        forecasts: a table of each model. timings: what each cost. levels: quantile levels in each.
        scales, labels: MASE units and regimes of its cutoffs.
        called: what the report calls each baseline.
    """

    number: int
    forecasts: list[pl.DataFrame]
    timings: list[dict[str, Any]]
    levels: dict[str, tuple[float, ...]]
    scales: pl.DataFrame
    labels: pl.DataFrame
    called: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """Everything that folds share; ``called`` holds names of baselines from the first fold on."""

    fits: Mapping[str, Fit]
    history: History
    frame: SeriesFrame
    config: BacktestConfig
    steps: int
    season: int
    folds: list[_Fold]
    joint: tuple[Hierarchy, ReconcileConfig] | None
    called: dict[str, str]

    def run(self, number: int, *, progress: bool = False) -> FoldOutcome:
        """Fit and forecast over one fold; ``progress`` logs a line for each model."""
        fold, config, history, frame = self.folds[number], self.config, self.history, self.frame
        sizes = (self.steps, self.season)
        cutoff = frame.grid.time_at(int(fold.cutoffs[0]))
        visible = known_at(history, cutoff)
        given = history.until(history.moment(cutoff)) if isinstance(history, VintageFrame) else visible
        scales, labels = _scales(visible, self.season, frame, fold), _labels(history, frame, fold, config, sizes)
        graded: list[Graded] = []
        levels: dict[str, tuple[float, ...]] = {}
        for name, make in _makers(self.fits, (given, visible), frame, config, sizes, self.called):
            asked = config.quantile_levels
            if asked is None and name not in self.fits:  # scores of quantiles compare at equal levels only
                asked = next((found for found in levels.values() if found), None)
            rule = self.joint if name in self.fits else None
            found = _run_fold(name, make, history, fold, (self.steps, asked, config.truth), rule)
            levels |= {timing["model"]: offered for _, offered, timing in found}
            graded += found
            if progress:
                self.tell(number, [timing for _, _, timing in found])
        cold = list(_run_cold(self.fits, frame, fold, config, self.steps))
        if progress:
            self.tell(number, [timing for _, _, timing in cold])
        graded += cold
        levels |= {timing["model"]: offered for _, offered, timing in cold}
        return FoldOutcome(
            number=number,
            forecasts=[table for table, _, _ in graded],
            timings=[timing for _, _, timing in graded],
            levels=levels,
            scales=scales,
            labels=labels,
            called=dict(self.called),
        )

    def tell(self, number: int, timings: Sequence[Mapping[str, Any]]) -> None:
        """Log what each model of a fold cost."""
        for timing in timings:
            log_event(_LOG, f"fold {number + 1} of {len(self.folds)}", **timing)


def plan_folds(
    fit: Fit | Mapping[str, Fit],
    frame: History,
    config: BacktestConfig,
    horizon: int,
    structure: HierarchyConfig | None,
) -> FoldPlan:
    """Return the folds and what they share; arguments and errors as of ``backtest``."""
    history, frame = frame, newest(frame)
    if config.truth != "latest" and not isinstance(history, VintageFrame):
        raise ConfigError(f"backtest.truth={config.truth} has no effect: the data has one value a cell (see published)")
    if config.online is not None and isinstance(history, VintageFrame):
        raise ConfigError("backtest.online learns from one value a cell, and this data has revisions; leave it out")
    if config.cold_start is not None and isinstance(history, VintageFrame):
        raise ConfigError("backtest.cold_start takes one value a cell, and this data has revisions; leave it out")
    joint = None
    if config.reconcile is not None:
        if structure is None:
            raise ConfigError("backtest.reconcile needs data with a hierarchy; state data.hierarchy")
        joint = frame_hierarchy(frame, structure), config.reconcile
    fits = dict(fit) if isinstance(fit, Mapping) else {"": fit}
    if not fits:
        raise ConfigError("there is no model to backtest")
    steps = config.horizon or horizon
    folds = _folds(frame, config, steps)
    season = frame_season(known_at(history, frame.grid.time_at(int(folds[0].cutoffs[0]))), config.season_length)
    _check_season(frame, config, folds[0], steps)
    check_regimes(frame, config.regimes, config.regime_column)
    if config.cold_start is not None:
        check_cold(frame, config.cold_start, [fold.cutoffs for fold in folds])
    return FoldPlan(
        fits=fits,
        history=history,
        frame=frame,
        config=config,
        steps=steps,
        season=season,
        folds=folds,
        joint=joint,
        called={},
    )


def run_fold(
    fit: Fit | Mapping[str, Fit],
    frame: History,
    config: BacktestConfig,
    number: int,
    called: Mapping[str, str],
    *,
    horizon: int,
    structure: HierarchyConfig | None = None,
) -> FoldOutcome:
    """Return one fold of ``backtest`` by itself, as another process makes it.

    Args:
        number: of the fold, from 1 on. called: names of baselines, of the outcome of fold 0.
        fit, frame, config, horizon, structure: as of ``backtest``.

    Raises:
        DataError, ConfigError: as ``backtest``.
    """
    plan = plan_folds(fit, frame, config, horizon, structure)
    plan.called.update(called)
    return plan.run(number)


def _check_season(frame: SeriesFrame, config: BacktestConfig, fold: _Fold, steps: int) -> None:
    """Refuse a declared season of which the rows before the first cutoff hold none with a horizon after it."""
    season, rows = config.season_length, int(fold.cutoffs[0]) + 1 - Panel.from_frame(frame).span()[0]
    if season is not None and "seasonal_naive" in config.baselines and season + steps > rows:
        raise ConfigError(
            f"backtest.season_length is {season}: a seasonal naive forecast of {steps} steps needs {season + steps} "
            f"rows before the first cutoff, the data has {rows}; give a shorter season or other baselines"
        )


def _run_cold(
    fits: Mapping[str, Fit], frame: SeriesFrame, fold: _Fold, config: BacktestConfig, steps: int
) -> Iterator[Graded]:
    """Yield what the models make of new series over one fold; nothing where it was not asked for."""
    if config.cold_start is not None:
        asked = ColdFold(
            number=fold.number,
            cutoffs=fold.cutoffs,
            steps=steps,
            levels=config.quantile_levels,
            season=config.season_length,
        )
        yield from cold_forecasts(fits, frame, asked, config.cold_start)


def _folds(frame: SeriesFrame, config: BacktestConfig, steps: int) -> list[_Fold]:
    panel = Panel.from_frame(frame)
    first, stop = panel.span()
    stride = config.stride or steps
    last = stop - 1 - steps
    cutoffs = last - stride * np.arange(config.num_cutoffs)[::-1]
    if cutoffs[0] < first:
        possible = max(0, (last - first) // stride + 1)
        raise DataError(
            f"{config.num_cutoffs} cutoffs {stride} steps apart with horizon {steps} need "
            f"{stride * (config.num_cutoffs - 1) + steps + 1} rows, the data has {stop - first} "
            f"(from {show_time(frame.grid.time_at(first))}); at most {possible} cutoffs fit"
        )
    every = config.refit_every or config.num_cutoffs
    starts = range(0, len(cutoffs), every)
    return [_Fold(number=number, cutoffs=cutoffs[at : at + every]) for number, at in enumerate(starts)]


Maker = Callable[[], Artifact]


def _makers(
    fits: Mapping[str, Fit],
    seen: tuple[History, SeriesFrame],
    frame: SeriesFrame,
    config: BacktestConfig,
    sizes: tuple[int, int],
    called: dict[str, str],
) -> Iterator[tuple[str, Maker]]:
    """Yield name and fit of every model, then of every baseline for one fold; ask for the next when one is made.

    A single unnamed fit is named by its artifact. A fit with the name of a baseline keeps it: the baseline is called
    ``NAME@baseline`` then, or left out where the fit makes the same forecasts. ``called`` holds these names from the
    first fold on.
    """
    given, visible = seen
    steps, season = sizes
    cutoff = visible.table["time"].max()
    made: dict[str, Artifact] = {}

    def of(name: str, fit: Fit) -> Maker:
        def make() -> Artifact:
            artifact = fit(given, cutoff)
            made[name or artifact.model_name] = artifact
            return artifact

        return make

    shared: list[TrainingSpan] = []

    def naive(name: str) -> Maker:
        def make() -> Artifact:
            if not shared:
                shared.append(TrainingSpan(visible.with_covariates()))
            several = len(frame.series_ids) > 1
            return fit_baseline(
                name, shared[0], horizon=steps, season=season, context_length=season, per_series=several
            )

        return make

    for name, fit in fits.items():
        yield name, of(name, fit)
    for name in config.baselines:
        taken = name in made and not is_baseline(made[name], name, season)
        label = called.setdefault(name, f"{name}@baseline" if taken else name)
        if label not in made:
            yield label, naive(name)


def _run_fold(
    name: str,
    make: Maker,
    history: History,
    fold: _Fold,
    wanted: tuple[int, Sequence[float] | None, Truth],
    joint: tuple[Hierarchy, ReconcileConfig] | None = None,
) -> list[tuple[pl.DataFrame, tuple[float, ...], dict[str, Any]]]:
    """Return the graded forecasts of one model over one fold, the levels in them, and what it cost.

    With ``joint`` the same forecasts follow once more, reconciled, as a model of their own.
    """
    started = time.perf_counter()
    artifact = make()
    fitted = time.perf_counter()
    steps, asked, truth = wanted
    if steps > artifact.window.horizon:
        raise ConfigError(
            f"horizon {steps} is beyond the {artifact.window.horizon} steps of artifact {artifact.id}; fit with more"
        )
    offered = offered_levels(artifact)
    levels = offered if asked is None or not offered else tuple(asked)
    if isinstance(history, VintageFrame):
        table, lacking = forecasts_of_vintages(artifact, history, fold.cutoffs, steps=steps, levels=levels, truth=truth)
    else:
        table = forecasts_at(artifact, history, fold.cutoffs, steps=steps, levels=levels)
        lacking = lacking_known(artifact, history, table)
    label = name or artifact.model_name
    timing: dict[str, Any] = {
        "model": label,
        "fold": fold.number,
        "cutoff": newest(history).grid.time_at(int(fold.cutoffs[0])),
        "num_cutoffs": len(fold.cutoffs),
        "artifact_id": artifact.id,
        "fit_seconds": fitted - started,
        "predict_seconds": time.perf_counter() - fitted,
        "known_missing": lacking,
        **joint_scores(artifact, table, levels),
    }
    results = [(table.select(pl.lit(label).alias("model"), pl.all()), levels, timing)]
    if joint is not None:
        started = time.perf_counter()
        visible = known_at(history, timing["cutoff"])
        coherence = make_coherence(
            artifact, visible, joint, (steps, levels), lambda at: forecasts_at(artifact, visible, at, steps=steps)
        )
        label = reconciled_name(label, joint[1])
        both = coherence.apply(table, drop_incomplete=True).select(pl.lit(label).alias("model"), pl.all())
        spent = {"model": label, "fit_seconds": 0.0, "predict_seconds": time.perf_counter() - started}
        plain = ("fold", "cutoff", "num_cutoffs", "artifact_id")
        results.append((both, coherence.levels, {name: timing[name] for name in plain} | spent))
    return results


def _scales(visible: SeriesFrame, season: int, frame: SeriesFrame, fold: _Fold) -> pl.DataFrame:
    """Return the MASE unit of every series and variate from the rows visible to the fit, for each cutoff of a fold."""
    panel = Panel.from_frame(visible)
    targets = panel.schema.targets
    records = []
    for index, name in enumerate(panel.series_ids):
        rows = slice(int(panel.indptr[index]), int(panel.indptr[index + 1]))
        unit = seasonal_scale(panel.values[rows, : len(targets)], season, panel.target_observed[rows]).value
        records += [{"series_id": name, "variate": v, "scale": float(u)} for v, u in zip(targets, unit, strict=True)]
    table = pl.DataFrame(records, schema={"series_id": pl.String, "variate": pl.String, "scale": pl.Float64})
    times = pl.DataFrame({"cutoff": frame.grid.time_at(fold.cutoffs)})
    return table.join(times, how="cross")


def _labels(
    history: History, frame: SeriesFrame, fold: _Fold, config: BacktestConfig, sizes: tuple[int, int]
) -> pl.DataFrame:
    """Return the regime of every series, variate and cutoff of a fold, each from what is known at its cutoff."""
    steps, season = sizes
    rows = config.regime_rows or block_rows(season, steps)
    parts = []
    for index in fold.cutoffs:
        cutoff = frame.grid.time_at(int(index))
        found = window_labels(known_at(history, cutoff), cutoff, config.regimes, rows=rows, column=config.regime_column)
        parts.append(found.with_columns(pl.lit(cutoff, dtype=frame.table.schema["time"]).alias("cutoff")))
    return pl.concat(parts)
