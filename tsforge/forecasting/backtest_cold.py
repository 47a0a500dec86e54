"""What cold start is worth, measured: series of the past are treated as new at every cutoff.

The series are dealt into groups. Each group is new in turn: the model is fitted on the other series only, and at a
cutoff of the new ones nothing may be seen but their last K rows. They are forecast by the code of
``predict cold_start=...``. In the report stand, as models of their own and on the same cells:

- ``MODEL@K``: with K rows of history; ``@0`` from the other series alone, by the mean or by static features;
- ``MODEL@all``: fitted on the other series as well, but with the whole history of the new ones as context;
- ``naive@K``: a seasonal naive forecast from the same K rows, their last value where they hold no season; ``@0`` the
  mean of the seasonal naive forecasts of the other series.

``MODEL`` itself was fitted on all series and has all history, as in any backtest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from tsforge.artifact import Artifact
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.forecasting.backtest_cold_page import FULL, NAIVE, cold_name, cold_notes, cold_records
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.baselines import frame_season
from tsforge.forecasting.cold_start import ALL, NEIGHBOURS, ColdStartConfig, predict_cold
from tsforge.forecasting.predict import offered_levels
from tsforge.forecasting.report import BacktestReport
from tsforge.forecasting.window_forecasts import FloatArray

ColdFit = Callable[[Any, Any], Artifact]
Graded = tuple[pl.DataFrame, tuple[float, ...], dict[str, Any]]


class ColdBacktest(Config):
    """Which series are new, and how much of them may be seen."""

    rows: tuple[int, ...] = (0, 8, 32)
    """Rows of history K that a new series has, each graded on its own."""
    groups: int = Field(4, ge=2)
    """Every series is new once for each fit: with the others of its group, one of so many. Each group costs a fit."""
    like: Literal["mean", "static"] = "mean"
    """Without a row: the mean over all other series, or over those nearest by static features."""
    neighbours: int | None = Field(None, ge=1)
    """How many are nearest; default 5; only with like=static."""
    categories: tuple[str, ...] = ()
    """Static features whose numbers are codes; only with like=static."""
    windows: int = Field(50, ge=4)
    """Cutoffs before each cutoff that calibrate the intervals, at most."""
    seed: int = Field(0, ge=0)
    """Of the dealing."""

    @field_validator("rows", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("rows")
    @classmethod
    def _ascending(cls, rows: tuple[int, ...]) -> tuple[int, ...]:
        if not rows or min(rows) < 0:
            raise ValueError("give at least one number of rows, 0 or more")
        if len(set(rows)) < len(rows):
            raise ValueError(f"{list(rows)} names a number of rows twice; give each once")
        return tuple(sorted(rows))

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings of another likeness."""
        if self.like != "static" and (self.neighbours is not None or self.categories):
            raise ConfigError(f"backtest.cold_start: neighbours and categories have no effect with like={self.like}")
        if self.like == "static" and 0 not in self.rows:
            raise ConfigError("backtest.cold_start.like=static has no effect: rows has no 0, and rows tell more")

    def settings(self, new: Mapping[str, dict[str, float]]) -> ColdStartConfig:
        """Return how new series without a row are forecast; ``new`` maps their names to static features."""
        near: dict[str, Any] = {}
        if self.like == "static":
            near = {"neighbours": self.neighbours, "categories": self.categories}
        like = {name: features if self.like == "static" else ALL for name, features in new.items()}
        return ColdStartConfig.model_validate({"like": like, "windows": self.windows, **(near if like else {})})


class _Data:
    """A frame, and its rows by name of the series."""

    def __init__(self, frame: SeriesFrame) -> None:
        self.frame = frame
        self._panel = Panel.from_frame(frame)
        self._place = {name: index for index, name in enumerate(self._panel.series_ids)}

    def _span(self, name: str, cutoff: int) -> tuple[int, int, int]:
        """Return first row, end of the rows, and the row after the cutoff of a series in the panel."""
        panel, index = self._panel, self._place[name]
        low = int(panel.indptr[index])
        return low, int(panel.indptr[index + 1]), low + cutoff + 1 - int(panel.offset[index])

    def history(self, name: str, cutoff: int) -> int:
        """Return how many rows a series has up to a cutoff."""
        low, high, stop = self._span(name, cutoff)
        return max(0, min(stop, high) - low)

    def able(self, names: Sequence[str], cutoff: int, rows: int, ahead: int = 0) -> list[str]:
        """Return the series that have so many rows up to the cutoff, an observed target among them, and rows ahead."""
        found = []
        for name in names:
            low, high, stop = self._span(name, cutoff)
            if low <= stop - rows and stop + ahead <= high and self._panel.target_observed[stop - rows : stop].any():
                found.append(name)
        return found

    def last_rows(self, name: str, cutoff: int, rows: int) -> FloatArray:
        """Return the targets [T, V] of at most so many rows up to a cutoff, NaN where not observed."""
        low, _, stop = self._span(name, cutoff)
        part, panel = slice(max(low, stop - rows), stop), self._panel
        return np.where(panel.target_observed[part], panel.values[part, : panel.num_targets], np.nan)


@dataclass(frozen=True, kw_only=True)
class ColdFold:
    """Cutoffs that share a fit, and what is wanted of them.

    Attributes:
        number: of the fold.
        cutoffs: rows on the frame's grid of the last visible row.
        steps: to grade.
        levels: quantile levels, None = those offered.
        season: declared season of the naive forecast, None = found in what is visible.
    """

    number: int
    cutoffs: NDArray[np.int64]
    steps: int
    levels: Sequence[float] | None
    season: int | None


def new_groups(series_ids: Sequence[str], config: ColdBacktest) -> list[tuple[str, ...]]:
    """Return the groups of series that are new together, of about equal size; a matter of names and seed alone.

    Raises:
        ConfigError: fewer series than groups.
    """
    if len(series_ids) < config.groups:
        raise ConfigError(
            f"backtest.cold_start.groups is {config.groups}, the data has {len(series_ids)} series; lower it"
        )
    names = np.array(sorted(series_ids))[np.random.default_rng(config.seed).permutation(len(series_ids))]
    return [tuple(sorted(str(name) for name in part)) for part in np.array_split(names, config.groups)]


def check_cold(frame: SeriesFrame, config: ColdBacktest, folds: Iterable[NDArray[np.int64]]) -> None:
    """Refuse what the data cannot give before anything is fitted.

    Args:
        frame: all data.
        config: which series are new, and how much of them may be seen.
        folds: the cutoffs of each fit, rows on the frame's grid.

    Raises:
        ConfigError: fewer series than groups, fewer old series than neighbours, or more rows of history than the new
            series have at any cutoff of a fit.
        DataError: likeness by static features of series that have none.
    """
    groups = new_groups(frame.series_ids, config)
    if config.like == "static":
        if frame.static is None:
            raise DataError(
                "backtest.cold_start.like=static needs static features; declare data.static, or use like=mean"
            )
        wanted, total = config.neighbours or NEIGHBOURS, len(frame.series_ids)
        old = total - max(map(len, groups))
        if wanted > old:
            raise ConfigError(
                f"backtest.cold_start.neighbours is {wanted}, and only {old} of {total} series are not new at a time; "
                "lower it, or raise groups"
            )
    data = _Data(frame)
    longest = min(
        max(data.history(name, int(at)) for name in new for at in cutoffs) for cutoffs in folds for new in groups
    )
    if max(config.rows) > longest:
        raise ConfigError(
            f"backtest.cold_start.rows has {max(config.rows)}, and at the cutoffs of some fit no new series has more "
            f"than {longest} rows; lower it, or move the cutoffs (fewer, or with a shorter stride)"
        )


def cold_forecasts(
    fits: Mapping[str, ColdFit], frame: SeriesFrame, fold: ColdFold, config: ColdBacktest
) -> Iterator[Graded]:
    """Yield table, quantile levels and costs of every cold model over one fold, group after group.

    Args:
        fits: from a frame that ends at the cutoff of the fit, and that cutoff, to an artifact.
        frame: all data; only what may be seen at a cutoff reaches a fit or a forecast of it.
        fold: the cutoffs.
        config: which series are new, and what is left of them.

    Raises:
        ConfigError: as ``predict_cold``; also more steps than trained.
        DataError: as ``predict_cold``.
    """
    data = _Data(frame)
    actual = frame.table.unpivot(
        on=frame.schema.targets, index=["series_id", "time"], variable_name="variate", value_name="actual"
    )
    first = frame.grid.time_at(int(fold.cutoffs[0]))
    for number, new in enumerate(new_groups(frame.series_ids, config)):
        group = set(new)
        old = tuple(name for name in frame.series_ids if name not in group)
        begun = frame.until(first)
        seen = begun.select_series([name for name in begun.series_ids if name not in group])
        base = {"fold": fold.number, "cutoff": first, "num_cutoffs": len(fold.cutoffs), "group": number}
        context = 1
        for name, fit in fits.items():
            started = time.perf_counter()
            artifact = fit(seen, first)
            spent = time.perf_counter() - started
            context = max(context, artifact.window.context_length)
            label = name or artifact.model_name
            for table, levels, timing in _of_model(label, artifact, data, (old, new), fold, config):
                costs = {**base, "artifact_id": artifact.id, "fit_seconds": spent, **timing}
                yield _named(table, actual, timing["model"]), levels, costs
                spent = 0.0  # the other rows share the fit
        season = frame_season(seen, fold.season)
        for kept in config.rows:
            started = time.perf_counter()
            table = _naive(data, (old, new), fold, (kept, season, context))
            costs = {"artifact_id": None, "fit_seconds": 0.0, "predict_seconds": time.perf_counter() - started}
            label = cold_name(NAIVE, kept)
            yield _named(table, actual, label), (), {**base, "model": label, **costs}


def _named(table: pl.DataFrame, actual: pl.DataFrame, label: str) -> pl.DataFrame:
    if "actual" not in table.columns:
        table = table.join(actual, on=["series_id", "time", "variate"], how="left", maintain_order="left")
    return table.select(pl.lit(label).alias("model"), pl.all())


def _of_model(
    label: str,
    artifact: Artifact,
    data: _Data,
    series: tuple[Sequence[str], Sequence[str]],
    fold: ColdFold,
    config: ColdBacktest,
) -> Iterator[Graded]:
    """Yield the forecasts of one artifact for new series: with their whole history, then with K rows of it."""
    if fold.steps > artifact.window.horizon:
        raise ConfigError(f"horizon {fold.steps} is beyond the {artifact.window.horizon} steps of the fit")
    offered = offered_levels(artifact)
    levels = offered if fold.levels is None or not offered else tuple(fold.levels)
    amounts: list[int | str] = [FULL, *config.rows]
    for kept in amounts:
        started = time.perf_counter()
        if isinstance(kept, str):
            chosen, grid = data.frame.select_series(series[1]), data.frame.grid
            table = forecasts_at(artifact, chosen, fold.cutoffs, steps=fold.steps, levels=levels, grid=grid)
        else:
            wanted = (kept, fold.steps, levels)
            found = [
                part
                for at in fold.cutoffs
                if (part := _cold(artifact, data, series, int(at), wanted, config)) is not None
            ]
            if not found:
                ahead = ", and known covariates over the trained horizon" if artifact.schema.known else ""
                raise DataError(
                    f"{label} with {kept} rows of history: at none of {len(fold.cutoffs)} cutoffs a new series has "
                    f"these and another series {artifact.window.context_length} rows, some observed{ahead}; move the "
                    "cutoffs, lower backtest.cold_start.rows or shorten the context"
                )
            table = pl.concat(found)
        yield table, levels, {"model": cold_name(label, kept), "predict_seconds": time.perf_counter() - started}


def _cold(
    artifact: Artifact,
    data: _Data,
    series: tuple[Sequence[str], Sequence[str]],
    at: int,
    wanted: tuple[int, int, tuple[float, ...]],
    config: ColdBacktest,
) -> pl.DataFrame | None:
    """Return the forecasts of new series from one cutoff and K rows; None where no other series can be forecast."""
    kept, steps, levels = wanted
    frame = data.frame
    ahead = artifact.window.horizon if artifact.schema.known else 0
    old = data.able(series[0], at, artifact.window.context_length, ahead)
    new = data.able(series[1], at, kept, ahead) if kept else list(series[1])
    if not old or not new:
        return None
    features: dict[str, dict[str, float]] = {}
    if kept == 0:
        static = frame.static
        rows = {} if static is None else {row.pop("series_id"): row for row in static.to_dicts()}
        features = {name: rows.get(name, {}) for name in new}
    found = predict_cold(
        artifact,
        visible_rows(frame, old, new, at, kept),
        config.settings(features),
        quantile_levels=levels,
        cutoff=frame.grid.time_at(at),
        horizon=steps,
    )
    return found.table.filter(pl.col("series_id").is_in(new))


def visible_rows(frame: SeriesFrame, old: Sequence[str], new: Sequence[str], cutoff: int, kept: int) -> SeriesFrame:
    """Return what may be seen at a cutoff: old series up to it, and the last ``kept`` rows of the new ones.

    Known covariates after the cutoff stay, as in any forecast.
    """
    names = [*old, *new] if kept else list(old)
    shown = frame.select_series(names).until(frame.grid.time_at(cutoff), keep_known=True)
    if not kept:
        return shown
    first = pl.lit(frame.grid.time_at(cutoff - kept + 1), dtype=shown.table.schema["time"])
    table = shown.table.filter(~pl.col("series_id").is_in(list(new)) | (pl.col("time") >= first))
    return SeriesFrame(table, shown.schema, shown.static)


def _naive(
    data: _Data, series: tuple[Sequence[str], Sequence[str]], fold: ColdFold, sizes: tuple[int, int, int]
) -> pl.DataFrame:
    """Return naive forecasts of the new series from their last rows, or from the other series where there are none."""
    kept, season, context = sizes
    parts = []
    for at in (int(cutoff) for cutoff in fold.cutoffs):
        rows = [data.last_rows(name, at, max(context, season)) for name in data.able(series[0], at, context)]
        if not rows:
            continue
        mean = _mean([naive_forecast(values, fold.steps, season) for values in rows])
        for name in data.able(series[1], at, kept) if kept else series[1]:
            own = naive_forecast(data.last_rows(name, at, kept), fold.steps, season) if kept else mean
            values = np.where(np.isnan(own), mean, own)  # a variate that is missing in all rows
            parts.append(_table(data.frame, name, at, values))
    if not parts:
        raise DataError("no series is observed at any cutoff; move the cutoffs")
    return pl.concat(parts)


def naive_forecast(values: FloatArray, steps: int, season: int) -> FloatArray:
    """Return [H, V]: the value one season before each step, else the last observed one; NaN where none is.

    Args:
        values: [T, V] up to the cutoff, NaN where not observed; T may be less than a season.
        steps: H.
        season: rows.
    """
    rows, variates = values.shape
    seen = ~np.isnan(values)
    last = np.full(variates, np.nan)
    for variate in np.flatnonzero(seen.any(axis=0)):
        last[variate] = values[np.flatnonzero(seen[:, variate])[-1], variate]
    found = np.tile(last, (steps, 1))
    for step in range(steps):
        row = rows - season + step % season
        if row >= 0:
            found[step] = np.where(seen[row], values[row], last)
    return found


def _mean(parts: Sequence[FloatArray]) -> FloatArray:
    """Return the mean over what is there, NaN where nothing is."""
    stacked = np.stack(parts)
    seen = ~np.isnan(stacked)
    count = seen.sum(axis=0)
    total = np.where(seen, stacked, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _table(frame: SeriesFrame, name: str, cutoff: int, values: FloatArray) -> pl.DataFrame:
    steps, variates = len(values), len(frame.schema.targets)
    kind = frame.table.schema["time"]
    times = frame.grid.time_at(np.repeat(cutoff + 1 + np.arange(steps), variates))
    return pl.DataFrame(
        {
            "series_id": pl.Series([name] * (steps * variates), dtype=pl.String),
            "cutoff": pl.Series([frame.grid.time_at(cutoff)] * (steps * variates), dtype=kind),
            "step": pl.Series(np.repeat(np.arange(1, steps + 1), variates), dtype=pl.Int32),
            "time": times.cast(kind),
            "variate": pl.Series(list(frame.schema.targets) * steps, dtype=pl.String),
            "mean": values.ravel(),
        }
    )


def with_cold_start(report: BacktestReport, models: Sequence[str], config: ColdBacktest | None) -> BacktestReport:
    """Return the report with the errors by rows of history in its settings and notes; as it is without ``config``.

    Args:
        report: a finished backtest that holds the cold models.
        models: names of the fits.
        config: rows of history.
    """
    if config is None:
        return report
    records = cold_records(report.leaderboard, models, config.rows)
    settings = {**report.settings, "cold_start_rows": records}
    return replace(report, settings=settings, notes=(*report.notes, *cold_notes(records)))
