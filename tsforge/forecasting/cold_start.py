"""Cold start: forecasts of series with less history than a context, or none, from a model fitted on others.

*Short* series: the missing front of the context counts as unobserved, as any gap does; the scaler takes what is there.
*New* series without a row get the forecast of a series that the user names as alike, the mean over all series, or the
mean over those that are nearest by static features (``likeness.py``).

Intervals are split conformal and belong to the length of the history. Windows of other series after the training span
have their context hidden but for the last k rows and are forecast like a new series; the half-width is a rank of the
errors, in units of the scale that the network took from those k rows, not of training rows that a new series does not
have. A short series with training rows of its own is forecast by them, and so are the windows behind its margins. For a
series without a row every other pair of series is tried: how wrong is the forecast of one for the other (or the mean of
its own neighbours for it). Series held out of the fit are used where there are any: only to them the model is as much a
stranger as to a new series; else those of the fit, which makes the margins a little too small. k is rounded down to a
power of two: fewer rows, wider intervals. That series are exchangeable is the one assumption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import Forecast, quantile_column
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, TimeLike
from tsforge.data.windows import WindowDataset, last_windows
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.coherent import held_out_cutoffs
from tsforge.forecasting.conformal_scores import conformal_margin
from tsforge.forecasting.likeness import nearest_series
from tsforge.forecasting.predict import artifact_panel, forecast_table, offered_levels, padded_panel, predict
from tsforge.forecasting.window_forecasts import FloatArray, evaluating, forecast_batch, predict_windows, window_batches
from tsforge.layers.scaling import Scaler

_LOG = get_logger(__name__)
ALL = "*"
NEIGHBOURS = 5
_PAIRS = 2_000_000  # errors of one step and variate that calibrate a series without a row, at most


class ColdStartConfig(Config):
    """What happens to series that are shorter than the context."""

    short: Literal["refuse", "pad"] = "pad"
    """``pad`` takes the missing front as unobserved; ``refuse`` names the series."""
    like: dict[str, str | dict[str, float]] = Field(default_factory=dict)
    """New series without a row: id -> the series it is taken to be like, ``*`` for the mean of all, or its static
    features (name -> number) for the mean of those nearest to it."""
    neighbours: int | None = Field(None, ge=1)
    """How many are nearest by static features; default 5."""
    categories: tuple[str, ...] = ()
    """Static features whose numbers are codes: equal or not, instead of near or far."""
    windows: int = Field(200, ge=4)
    """Cutoffs that calibrate the intervals, at most."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"short": value} if isinstance(value, str) else value  # cold_start=pad

    @model_validator(mode="after")
    def _useful(self) -> ColdStartConfig:
        if self.short == "refuse" and not self.like:
            raise ValueError("cold_start with short=refuse and no like has no effect; remove it")
        if (self.neighbours or self.categories) and not any(isinstance(given, dict) for given in self.like.values()):
            raise ValueError("neighbours and categories have no effect without static features (like.NEW.FEATURE=...)")
        return self


def predict_cold(
    artifact: Artifact,
    frame: SeriesFrame,
    config: ColdStartConfig,
    *,
    quantile_levels: Sequence[float] | None = None,
    cutoff: TimeLike | None = None,
    horizon: int | None = None,
) -> Forecast:
    """Return the forecast of every series of the frame, short ones too, and of the new ones of ``config.like``.

    Args:
        artifact: the fitted network.
        frame: history of all series, and known covariates over the horizon where the model uses any.
        config: what to do with short and new series.
        quantile_levels: default those the artifact offers.
        cutoff: last time that may be seen; default the last observed row of each series.
        horizon: steps, at most those trained.

    Returns:
        The table; ``metadata["cold_start"]`` gives the rows of history of every short series, what every new one is
        taken to be like, how many windows calibrated the intervals, and whether they were of series held out.

    Raises:
        ArtifactError, ConfigError, DataError, ModelError: as for ``predict``; also a model that couples series, a new
            series that has rows, an unknown one to be like, or too few windows to calibrate.
    """
    if artifact.network.capabilities.rows_coupled:
        raise ConfigError(f"model '{artifact.model_name}' couples the series of a panel: it has no cold start")
    static = frame.static  # all of it, also what the model does not read
    frame = match_frame(artifact, frame)
    _check_like(config.like, frame)
    visible = frame if cutoff is None else frame.until(cutoff, keep_known=True)
    steps = artifact.window.horizon if horizon is None else horizon
    levels = tuple(sorted(offered_levels(artifact) if quantile_levels is None else quantile_levels))
    rows = history_rows(visible, cutoff)
    short = {name: count for name, count in rows.items() if count < artifact.window.context_length}
    if short and config.short == "refuse":
        raise DataError(
            f"{len(short)} of {len(rows)} series have fewer than {artifact.window.context_length} rows from their "
            f"first observed target to the cutoff ({listing(short)}); bring more history, leave them out, or take "
            "cold_start.short=pad"
        )
    warm = [name for name in visible.series_ids if name not in short]
    if not warm:
        raise DataError(f"all {len(short)} series are shorter than the context; there is none to learn intervals from")
    base = predict(artifact, visible.select_series(warm), quantile_levels=levels, cutoff=cutoff, horizon=horizon)
    end: Any = visible.last_observed()["time"].max() if cutoff is None else cutoff
    past, donors, held_out = _donors(artifact, frame.until(end), warm)
    tables = [base.table]
    facts: dict[str, Any] = {"held_out_series": held_out, "calibrated_on": len(donors)}
    at = np.zeros(0, dtype=np.int64)
    if (short or config.like) and levels:
        at, in_sample = held_out_cutoffs(artifact, past, artifact.window.horizon, config.windows)
        facts |= {"windows": len(at), "in_sample": in_sample}
    strangers = _strangers(artifact, short)
    alike: dict[tuple[int, bool], list[str]] = {}
    for name, count in short.items():
        alike.setdefault((_rounded(count), name in strangers), []).append(name)
    for (kept, stranger), names in sorted(alike.items()):
        part = visible.select_series(names)
        tables.append(_short(artifact, part, (cutoff, steps, levels), (past, at, kept, stranger)))
    seen = set(artifact.series_ids) - _held_out(artifact)
    fitted = [name for name in warm if name in seen]
    models = _models(config, static, fitted)
    near = any(isinstance(model, tuple) for model in models.values())
    others = _neighbours_of(config, static, donors, fitted) if near else None
    coverages = {_coverage(level) for level in levels} - {0.0}
    widths = _Likeness(artifact, frame.until(end), donors, (at, past.grid), steps)
    for name, model in sorted(models.items()):
        by = others if isinstance(model, tuple) else None
        margins = widths.margins(coverages, mean=model == ALL, others=by) if coverages else None
        tables.append(_alike(base.table, (name, model), levels, margins))
    facts |= {"history_rows": dict(sorted(short.items()))}
    facts["like"] = {name: list(found) if isinstance(found, tuple) else found for name, found in models.items()}
    table = pl.concat(tables, how="diagonal").select(base.table.columns)
    return replace(base, table=table, metadata={**base.metadata, "cold_start": facts})


def history_rows(frame: SeriesFrame, cutoff: TimeLike | None = None) -> dict[str, int]:
    """Return the rows of each series from its first observed one to the cutoff (default its last observed row), both
    included; 0 where nothing is observed. Rows before the first value tell no more than rows that are not there.
    """
    first, last = frame.first_observed()["time"], frame.last_observed()["time"]
    origin, seen = frame.grid.time_at(0), first.is_not_null().to_numpy()
    stop = frame.grid.index_of(last.fill_null(origin)) if cutoff is None else frame.grid.floor(cutoff)
    counts = np.where(seen, stop + 1 - frame.grid.index_of(first.fill_null(origin)), 0)
    return {name: int(count) for name, count in zip(frame.series_ids, counts, strict=True)}


def _check_like(like: Mapping[str, str | dict[str, float]], frame: SeriesFrame) -> None:
    known = set(frame.series_ids)
    there = [name for name in like if name in known]
    if there:
        raise ConfigError(f"cold_start.like: {listing(there)} has rows; leave it out, short histories are padded")
    for model in like.values():
        if isinstance(model, str) and model != ALL and model not in known:
            raise DataError(f"cold_start.like: unknown series '{model}'{nearest(model, frame.series_ids)}")


def _held_out(artifact: Artifact) -> set[str]:
    return set((artifact.provenance.get("entities") or {}).get("held_out") or ())


def _strangers(artifact: Artifact, names: Iterable[str]) -> set[str]:
    """Return the series of which the network knows nothing but their context: the fit had no rows of (a variate of)
    them, and a scaling by series does not need them.
    """
    if artifact.network.needs_known_series:
        return set()
    missing = np.zeros(len(artifact.series_ids), dtype=bool)
    for part in artifact.network.modules():
        if isinstance(part, Scaler) and part.unknown == "context":
            missing |= (part.series_scale == 0).any(dim=1).cpu().numpy()
    known = {name for name, none in zip(artifact.series_ids, missing, strict=True) if not none}
    return {name for name in names if name not in known}


def _models(
    config: ColdStartConfig, static: pl.DataFrame | None, fitted: Sequence[str]
) -> dict[str, str | tuple[str, ...]]:
    """Return what each new series is like: a series, ``*``, or its neighbours among the fitted ones."""
    found: dict[str, str | tuple[str, ...]] = {}
    for name, given in config.like.items():
        found[name] = given if isinstance(given, str) else _nearest(config, static, fitted, given)
    return found


def _nearest(
    config: ColdStartConfig,
    static: pl.DataFrame | None,
    among: Sequence[str],
    features: Mapping[str, float],
    most: int | None = None,
) -> tuple[str, ...]:
    count = config.neighbours or NEIGHBOURS
    return nearest_series(
        static, among, features, count=count if most is None else min(count, most), categories=config.categories
    )


def _neighbours_of(
    config: ColdStartConfig, static: pl.DataFrame | None, donors: Sequence[str], fitted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the fitted series each calibrating series would be taken to be like, if it were new."""
    assert static is not None  # nearest_series refused it before
    features = {row.pop("series_id"): row for row in static.to_dicts()}
    found = {}
    for name in donors:
        among = [other for other in fitted if other != name]
        if among:
            found[name] = _nearest(config, static, among, features[name], len(among))
    return found


def _donors(artifact: Artifact, past: SeriesFrame, warm: Sequence[str]) -> tuple[SeriesFrame, list[str], bool]:
    """Return the past of the series that calibrate, their names, and whether the fit never saw them."""
    seen = set(artifact.series_ids) - _held_out(artifact)
    strangers = [name for name in warm if name not in seen]
    names = strangers if len(strangers) > 1 else list(warm)
    return past.select_series(names), names, len(strangers) > 1


def _short(
    artifact: Artifact,
    frame: SeriesFrame,
    wanted: tuple[TimeLike | None, int, tuple[float, ...]],
    known: tuple[SeriesFrame, NDArray[np.int64], int, bool],
) -> pl.DataFrame:
    """Return the forecasts of series of about equal history, strangers to the fit or not, from padded contexts."""
    cutoff, steps, levels = wanted
    extended = frame.extend(artifact.window.horizon) if frame.schema.known else frame
    panel = artifact_panel(artifact, extended)
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    found = predict_windows(artifact.network, last_windows(panel, spec, cutoff, pad_context=True), ())
    cut = replace(found, mean=found.mean[:, :steps])
    if not levels:
        return forecast_table(cut, panel, ())
    past, at, count, stranger = known
    coverages = {_coverage(level) for level in levels} - {0.0}
    margins = short_margins(artifact, past, at, count, coverages, stranger=stranger)
    quantiles = [
        cut.mean
        + (np.sign(level - 0.5) * margins[_coverage(level)][:steps] * cut.scale[:, None] if level != 0.5 else 0.0)
        for level in levels
    ]
    return forecast_table(replace(cut, quantiles=np.stack(quantiles, axis=-1)), panel, levels)


def _rounded(count: int) -> int:
    return 1 << (max(count, 1).bit_length() - 1)


def _coverage(level: float) -> float:
    return round(abs(2.0 * level - 1.0), 9)


def short_margins(
    artifact: Artifact,
    past: SeriesFrame,
    at: NDArray[np.int64],
    count: int,
    coverages: set[float],
    *,
    stranger: bool,
) -> dict[float, FloatArray]:
    """Return half-widths [H, V] in units of the window scale for series with ``count`` rows of history.

    Args:
        artifact: the fitted network.
        past: series that stand in for new ones, up to the cutoff.
        at: cutoffs on the frame's grid; a whole horizon is observed after each.
        count: rows of history, rounded down to a power of two here.
        coverages: of the central intervals.
        stranger: the fit had no rows of the series that these half-widths are for: those that stand in for it are
            measured by their few rows as well. Else by their training rows, as far as the scaling takes these.
    """
    kept = _rounded(count)
    shift = int(artifact.grid.index_of(pl.Series([past.grid.time_at(0)], dtype=past.table["time"].dtype))[0])
    first = at + 1 + shift
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    stop = int(first.max()) + spec.horizon
    windows = WindowDataset(padded_panel(artifact, past, stop), spec, int(first.min()), stop)
    chosen = np.flatnonzero(np.isin(windows.cutoff_index, first))
    errors, masks = [], []
    with evaluating(artifact.network):
        for batch in window_batches(artifact.network, windows, indices=chosen):
            hidden = torch.arange(spec.context_length) < spec.context_length - kept
            mask = batch.context_mask & ~hidden[None, :, None]
            past_covariates = batch.past
            if past_covariates is not None:
                past_covariates = past_covariates.masked_fill(hidden[None, :, None], float("nan"))
            known = batch.known
            if known is not None:  # a padded window lacks them too
                whole = torch.nn.functional.pad(hidden, (0, known.shape[1] - len(hidden)), value=False)
                known = known.masked_fill(whole[None, :, None], float("nan"))
            context = batch.context.masked_fill(hidden[None, :, None], 0.0)
            blind = batch._replace(context=context, context_mask=mask, past=past_covariates, known=known)
            if stranger and blind.series_index is not None:
                blind = blind._replace(series_index=torch.full_like(blind.series_index, -1))  # of no series of the fit
            found = forecast_batch(artifact.network, blind)
            if found.target is None or found.mask is None:
                raise DataError("cold start needs windows with targets to calibrate on")
            seen = mask.any(dim=1).cpu().numpy()[:, None, :]  # nothing left to go by: no series begins that way
            errors.append(np.abs(found.target - found.mean) / found.scale[:, None])
            masks.append(found.mask & seen)
    scores, observed = np.concatenate(errors), np.concatenate(masks)
    return {coverage: conformal_margin(scores, observed, coverage)[0] for coverage in coverages}


class _Likeness:
    """Margins of series without a row; those of one kind are worked out once.

    Args:
        artifact: the fitted network.
        past: all series up to the cutoff.
        donors: those that calibrate.
        at: cutoffs that calibrate, and the grid on which they are rows.
        steps: horizon.
    """

    def __init__(
        self,
        artifact: Artifact,
        past: SeriesFrame,
        donors: Sequence[str],
        at: tuple[NDArray[np.int64], TimeGrid],
        steps: int,
    ) -> None:
        self._artifact, self._past, self._donors, self._steps = artifact, past, list(donors), steps
        self._at, self._grid = at
        self._found: dict[str, pl.DataFrame] = {}

    def margins(self, coverages: set[float], *, mean: bool, others: Mapping[str, Sequence[str]] | None) -> pl.DataFrame:
        """Return half-widths as ``likeness_margins`` does."""
        kind = "near" if others is not None else "mean" if mean else "one"
        if kind not in self._found:
            named = [] if others is None else [other for found in others.values() for other in found]
            names = sorted({*self._donors, *named})
            chosen = self._past.select_series(names)
            held_out = forecasts_at(self._artifact, chosen, self._at, steps=self._steps, grid=self._grid)
            self._found[kind] = likeness_margins(held_out, coverages, mean=mean, others=others)
        return self._found[kind]


def _alike(
    base: pl.DataFrame,
    names: tuple[str, str | tuple[str, ...]],
    levels: tuple[float, ...],
    margins: pl.DataFrame | None,
) -> pl.DataFrame:
    """Return the forecast of a series without a row: that of another one, or the mean over several or all."""
    name, model = names
    keys = ["cutoff", "step", "time", "variate"]
    chosen = [model] if isinstance(model, str) else list(model)
    donors = base if model == ALL else base.filter(pl.col("series_id").is_in(chosen))
    if not donors.height:
        raise DataError(f"cold_start.like: '{model}' is itself too short to be an example; choose another series")
    if donors["cutoff"].n_unique() > 1:
        donors = donors.filter(pl.col("cutoff") == pl.col("cutoff").max())
    table = donors.group_by(keys, maintain_order=True).agg(pl.col("mean").mean())
    table = table.select(pl.lit(name).alias("series_id"), *keys, "mean")
    for level in levels:
        if level == 0.5:
            table = table.with_columns(pl.col("mean").alias(quantile_column(level)))
            continue
        assert margins is not None  # there are levels to either side
        widths = margins.filter(coverage=_coverage(level)).select("step", "variate", "margin")
        bound = pl.col("mean") + float(np.sign(level - 0.5)) * pl.col("margin")
        joined = table.join(widths, on=["step", "variate"], how="left", maintain_order="left")
        table = joined.with_columns(bound.alias(quantile_column(level))).drop("margin")
    return table


def likeness_margins(
    held_out: pl.DataFrame,
    coverages: set[float],
    *,
    mean: bool,
    others: Mapping[str, Sequence[str]] | None = None,
) -> pl.DataFrame:
    """Return half-widths by step and variate: errors of one series' forecast, or of others' mean, for another.

    Args:
        held_out: forecasts with ``actual`` of the series that stand in for new ones.
        coverages: of the central intervals.
        mean: take the mean over the other series instead of each of them.
        others: series -> those whose mean stands for it; only these series calibrate.

    Returns:
        ``step, variate, coverage, margin``; infinite where the errors are too few. Of hundreds of series not all pairs
        are tried, but some two million of them, drawn once and so that all series count alike.

    Raises:
        DataError: fewer than two series.
    """
    if held_out["series_id"].n_unique() < 2 or others == {}:
        raise DataError("cold start without history needs two series that can stand in for each other; there is one")
    keys = ["cutoff", "step", "variate"]
    if others is not None:
        whose = pl.DataFrame([(name, other) for name, found in others.items() for other in found], orient="row")
        named = whose.rename({"column_0": "series_id", "column_1": "whose"})
        theirs = held_out.select(*keys, whose="series_id", other="mean")
        means = named.join(theirs, on="whose").group_by("series_id", *keys).agg(pl.col("other").mean())
        pairs = held_out.join(means, on=["series_id", *keys])
    elif mean:
        total, number = pl.col("mean").sum().over(keys), pl.len().over(keys)
        pairs = held_out.with_columns(other=(total - pl.col("mean")) / (number - 1), number=number).filter(
            pl.col("number") > 1
        )
    else:
        return _margins(_pair_errors(held_out), coverages)
    scored = pairs.drop_nulls("actual").with_columns(error=(pl.col("actual") - pl.col("other")).abs())
    groups = scored.group_by(["step", "variate"], maintain_order=True)
    return _margins(((*key, part["error"].to_numpy()) for key, part in groups), coverages)


def _pair_errors(held_out: pl.DataFrame) -> Iterator[tuple[Any, Any, FloatArray]]:
    """Yield step, variate and the errors of each series' forecast for every other series.

    Of many series, every one stands in for as many others as make ``_PAIRS`` errors, drawn once.
    """
    codes = held_out.with_columns(pl.col("series_id", "cutoff").rank("dense").cast(pl.Int64) - 1)
    series, cutoffs = int(codes["series_id"].max()) + 1, int(codes["cutoff"].max()) + 1  # type: ignore[arg-type]
    count = min(max(_PAIRS // (series * cutoffs), 1), series - 1)
    draw = np.random.default_rng(0)
    order, shifts = draw.permutation(series), draw.choice(np.arange(1, series), count, replace=False)
    others = order[(np.argsort(order)[:, None] + shifts) % series]  # [series, count]; each other one as often
    for (step, variate), part in codes.group_by(["step", "variate"], maintain_order=True):
        place = part["series_id"].to_numpy(), part["cutoff"].to_numpy()
        mean, actual = np.full((2, series, cutoffs), np.nan)
        mean[place], actual[place] = (
            part["mean"].to_numpy(),
            part["actual"].cast(pl.Float64).fill_null(np.nan).to_numpy(),
        )
        errors = np.abs(actual[:, None] - mean[others])  # [series, count, cutoffs]
        yield step, variate, errors[np.isfinite(errors)]


def _margins(errors: Iterable[tuple[Any, Any, FloatArray]], coverages: set[float]) -> pl.DataFrame:
    """Return the half-widths of each step and variate that has errors, as ``likeness_margins``."""
    records = []
    for step, variate, found in errors:
        for coverage in coverages if len(found) else ():
            margin = float(conformal_margin(found[:, None], np.isfinite(found)[:, None], coverage)[0][0])
            records.append({"step": step, "variate": variate, "coverage": coverage, "margin": margin})
    schema = {"step": pl.Int32, "variate": pl.String, "coverage": pl.Float64, "margin": pl.Float64}
    return pl.DataFrame(records, schema=schema)
