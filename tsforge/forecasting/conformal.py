"""Split conformal calibration: intervals whose coverage is counted on held-out windows, not assumed.

Scores (``conformal_scores``) are taken in units of each window, so that calm and lively series share one table. Margins
are kept per step (or over all steps), variate and central interval, and may depend on a label known at the cutoff.

For n exchangeable scores the k-th smallest with k = ceil((n + 1) coverage) covers at least ``coverage``; when k > n no
finite interval does, and the margin is infinite with status ``too_few``. It is never the largest score at hand, let
alone the smallest. Each side of an asymmetric interval has its own rank at (1 + coverage) / 2. Overlapping windows are
dependent, so n overstates the evidence; the backtest measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.conformal_buckets import BucketKind, Origins, lower_edge, third_edges
from tsforge.forecasting.conformal_scores import (
    LOCAL_UNIT,
    QUANTILE_SCORES,
    FloatArray,
    IntArray,
    ScoreArray,
    anchors,
    bucket_margins,
    interval_scores,
    nested,
    paired_levels,
)
from tsforge.forecasting.recent_errors import earlier_cutoffs, recent_errors, recent_unit
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.network import ForecastNetwork

_LOG = get_logger(__name__)

Method = Literal["auto", "absolute", "cqr", "cqr_asymmetric", "scaled", "recent"]
Pool = Literal["step", "horizon"]
CALIBRATION_SCHEMA: dict[str, type[pl.DataType]] = {
    "step": pl.Int32,
    "variate": pl.String,
    "level": pl.Float64,
    "n": pl.Int64,
    "low": pl.Float64,
    "high": pl.Float64,
    "score": pl.String,
    "status": pl.String,
}
BUCKET_SCHEMA: dict[str, type[pl.DataType]] = {"by": pl.String, "bucket": pl.String, "above": pl.Float64}
"""Further columns of a bucketed table; ``bucket`` is null in the rows that hold for all other labels."""
RECENT_SCHEMA: dict[str, type[pl.DataType]] = {"expected": pl.Float64}
"""Further column of a table of ``recent`` scores: mean absolute error of the held-out windows, in units of a window."""
DEFAULT_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_WINDOWS = 2000  # evenly spaced; more overlapping windows add memory, not evidence
MAX_BUCKET_CELLS = 50_000_000  # scores kept when every bucket needs windows of its own


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Labels of the cells of a calibration set.

    Attributes:
        kind: what the labels say.
        names: the labels.
        codes: [N, H, V], place in ``names``; -1 = none.
        edges: variate -> edges between thirds (``level``, ``volatility``).
    """

    kind: BucketKind
    names: tuple[str, ...]
    codes: IntArray
    edges: dict[str, tuple[float, float]]


def make_buckets(kind: BucketKind, origins: Origins, steps: int) -> Buckets | None:
    """Return the labels of all cells, None for ``none``.

    Raises:
        ConfigError: a calendar label on integer time.
    """
    if kind == "none":
        return None
    edges = third_edges(kind, origins)
    labels = origins.labels(kind, steps, edges)
    names, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(labels.shape)
    return Buckets(kind=kind, names=tuple(map(str, names)), codes=codes, edges=edges)


def calibration_table(
    scores: ScoreArray,
    mask: NDArray[np.bool_],
    levels: Sequence[float],
    variates: Sequence[str],
    score: str,
    *,
    pool: Pool = "step",
    weights: FloatArray | None = None,
    buckets: Buckets | None = None,
) -> pl.DataFrame:
    """Return the margins of every step, variate and central interval as a long table.

    Columns ``step, variate, level`` (nominal coverage), ``n, low`` (added to the lower bound, in units), ``high``
    (added to the upper bound), ``score, status`` (``ok``, ``too_few``; in a bucket with too few scores ``fallback``:
    the margin over all labels). With buckets also ``by, bucket, above``: kind and name of the label, null for the
    margin over all labels, and where a third begins.

    Shapes:
        scores [N, H, V, P] or [N, H, V, P, 2] from ``interval_scores``, mask [N, H, V], weights [N].
    """
    everyone = _tables(scores, mask, np.zeros(mask.shape, dtype=np.int64), levels, (variates, pool, weights), 1)
    plain = [table.with_columns(score=pl.lit(score)) for table in everyone]
    if not plain:
        return pl.DataFrame(schema=CALIBRATION_SCHEMA)
    whole = pl.concat(plain)
    order = list(CALIBRATION_SCHEMA)
    if buckets is None:
        return whole.select(pl.col(name).cast(CALIBRATION_SCHEMA[name]) for name in order)
    parts = _tables(scores, mask, buckets.codes, levels, (variates, pool, weights), len(buckets.names))
    keys = ["step", "variate", "level"]
    split = pl.concat(parts).join(whole.select(*keys, "n", "low", "high", "status"), on=keys, maintain_order="left")
    short = (pl.col("status") == "too_few") & (pl.col("status_right") == "ok")
    chosen = [pl.when(short).then(f"{name}_right").otherwise(name).alias(name) for name in ("n", "low", "high")]
    status = pl.when(short).then(pl.lit("fallback")).otherwise("status").alias("status")
    names = pl.Series(buckets.names, dtype=pl.String)
    above = [
        lower_edge(name, buckets.edges.get(variate, ()))
        for name, variate in zip(names.gather(split["code"]), split["variate"], strict=True)
    ]
    split = split.select(*keys, *chosen, status, score=pl.lit(score), bucket=names.gather(split["code"]))
    split = split.with_columns(pl.Series("above", above, dtype=pl.Float64))
    whole = whole.with_columns(bucket=pl.lit(None, pl.String), above=pl.lit(None, pl.Float64))
    full = CALIBRATION_SCHEMA | BUCKET_SCHEMA
    both = pl.concat([whole.select(split.columns), split]).with_columns(by=pl.lit(buckets.kind))
    return both.select(pl.col(name).cast(kind) for name, kind in full.items())


def _tables(
    scores: ScoreArray,
    mask: NDArray[np.bool_],
    codes: IntArray,
    levels: Sequence[float],
    how: tuple[Sequence[str], Pool, FloatArray | None],
    number: int,
) -> list[pl.DataFrame]:
    """Return one table a central interval: all of CALIBRATION_SCHEMA but the score, and ``code``."""
    variates, pool, weights = how
    windows, steps, width = mask.shape
    columns = (windows, steps * width) if pool == "step" else (windows * steps, width)
    used = np.where(mask, codes, -1).reshape(columns)
    if pool == "horizon" and weights is not None:
        weights = np.repeat(weights, steps)

    def margins(part: ScoreArray, coverage: float) -> tuple[FloatArray, IntArray]:
        found, count = bucket_margins(part.reshape(columns), used, number, coverage, weights)
        shape = (number, steps, width)
        if pool == "step":
            return found.reshape(shape), count.reshape(shape)
        return np.broadcast_to(found[:, None], shape), np.broadcast_to(count[:, None], shape)

    tables = []
    code, step, variate = (part.ravel() for part in np.indices((number, steps, width)))
    for position, (coverage, _, _) in enumerate(paired_levels(levels)):
        part = scores[:, :, :, position]
        if part.ndim == 4:
            tail = (1.0 + coverage) / 2.0
            (low, count), (high, _) = margins(part[..., 0], tail), margins(part[..., 1], tail)
        else:
            low, count = margins(part, coverage)
            high = low
        enough = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(enough, low, np.inf), np.where(enough, high, np.inf)
        columns_of = {
            "code": code,
            "step": step + 1,
            "variate": pl.Series(list(variates), dtype=pl.String).gather(variate),
            "level": np.full(len(code), coverage),
            "n": count.ravel(),
            "low": -low.ravel(),
            "high": high.ravel(),
            "status": pl.Series(["too_few", "ok"]).gather(enough.ravel().astype(np.int64)),
        }
        tables.append(pl.DataFrame(columns_of))
    return tables


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How scores become margins; the fields are those of ``CalibrationConfig``."""

    method: Method = "auto"
    pool: Pool = "step"
    bucket: BucketKind = "none"
    half_life: float | None = None


def score_kind(method: Method, *, has_distribution: bool) -> str:
    """Return the score behind a method for a network of points or one with a distribution.

    Raises:
        ConfigError: ``cqr`` for points.
    """
    if has_distribution:
        return "cqr" if method == "auto" else method
    if method == "cqr":
        raise ConfigError(
            "calibration.method=cqr needs forecast quantiles, and this network gives points; choose absolute, or a "
            "likelihood that is a distribution"
        )
    return {"auto": "absolute", "cqr_asymmetric": "asymmetric", "scaled": "scaled_volatility"}.get(method, method)


def calibrate(
    network: ForecastNetwork,
    windows: WindowDataset,
    levels: Sequence[float] = DEFAULT_LEVELS,
    *,
    max_windows: int | None = None,
    choices: Choices | None = None,
) -> pl.DataFrame:
    """Return the calibration table of a fitted network from windows it was not trained on.

    Args:
        network: the fitted network.
        windows: held-out windows, later than the training span.
        levels: quantile levels the artifact will offer, closed under mirroring at 0.5.
        max_windows: items of ``windows`` to use when there are more: evenly spaced, with buckets drawn (even spacing
            could miss labels). Default 2,000; with buckets as many as 50 million scores allow.
        choices: score, pooling, label and recency.

    Raises:
        ConfigError: levels without mirror image, or a method or label that network or data do not allow.
        DataError: there is no window, or none has a target.
    """
    choices = choices or Choices()
    pairs = paired_levels(levels)
    score = score_kind(choices.method, has_distribution=network.likelihood.has_distribution)
    if score == "recent" and windows.panel.versions is not None:
        raise ConfigError(
            "calibration.method=recent reads what came of earlier forecasts, and this data was published late or "
            "revised: what was known when is not at hand there; choose another method"
        )
    asked = tuple(levels) if score in QUANTILE_SCORES else ()
    chosen = _chosen(windows, len(pairs), max_windows, bucketed=choices.bucket != "none", settled=score == "recent")
    parts, masks, places, scales = [], [], [], []
    for part in forecast_batches(network, windows, asked, indices=chosen):
        if part.target is None or part.mask is None:
            raise DataError("calibration needs windows with targets; these are for prediction only")
        if score == "recent":  # the unit needs all windows
            found = np.where(part.mask, np.abs(part.target - part.mean), 0.0)
        else:
            origins = _origins(windows, part.series_index, part.cutoff_index)
            local = origins.volatility()[:, None] if score == "scaled_volatility" else None
            found = interval_scores(
                part.target, part.mean, part.quantiles, levels, part.scale, score=score, local=local
            )
        parts.append(found.astype(np.float32))
        masks.append(part.mask)
        places.append((part.series_index, part.cutoff_index))
        scales.append(part.scale)
    if not parts:
        raise DataError("calibration needs at least one held-out window; shorten the horizon or widen the valid span")
    scores, mask = np.concatenate(parts), np.concatenate(masks)
    origins = _origins(windows, *(np.concatenate(found) for found in zip(*places, strict=True)))
    usual = None
    if score == "recent":
        usual, scores = _relative(network, windows, origins, scores, mask, np.concatenate(scales), len(pairs))
    table = calibration_table(
        scores,
        mask,
        levels,
        windows.panel.schema.targets,
        score,
        pool=choices.pool,
        weights=_recency(origins.cutoff_index, choices.half_life),
        buckets=make_buckets(choices.bucket, origins, mask.shape[1]),
    )
    if usual is not None:
        step, variate = np.indices(usual.shape)
        names = pl.Series(windows.panel.schema.targets, dtype=pl.String).gather(variate.ravel())
        keys = {"step": pl.Series(step.ravel() + 1, dtype=pl.Int32), "variate": names}
        extra = pl.DataFrame(keys | {"expected": usual.ravel()})
        table = table.join(extra, on=["step", "variate"], how="left", maintain_order="left")
    _tell(table)
    return table


def _relative(
    network: ForecastNetwork,
    windows: WindowDataset,
    origins: Origins,
    errors: ScoreArray,
    mask: NDArray[np.bool_],
    scale: FloatArray,
    pairs: int,
) -> tuple[FloatArray, ScoreArray]:
    """Return the usual error [H, V] in units of a window, and errors [N, H, V] over recent ones as scores [N, H, V, P].

    Only errors of the held-out span count as recent: those on rows the network was fitted on may be too small.
    """
    count = np.maximum(mask.sum(axis=0), 1)
    usual = (np.where(mask, errors, 0.0) / scale[:, None]).sum(axis=0, dtype=np.float64) / count
    total, weight = recent_errors(
        network,
        windows.panel,
        windows.spec,
        origins.series_index,
        origins.cutoff_index,
        first_row=int(windows.cutoff_index.min()),
    )
    scores = (errors / recent_unit(total, weight, usual, scale)).astype(np.float32)
    return usual, np.broadcast_to(scores[..., None], (*scores.shape, pairs))


def _chosen(windows: WindowDataset, pairs: int, most: int | None, *, bucketed: bool, settled: bool) -> IntArray:
    """Return the items to calibrate on; ``settled``: not those too early in the span to look back within it."""
    if settled:
        cutoff = windows.cutoff_index[:: windows.rows_per_item]
        reach = int(earlier_cutoffs(windows.spec.horizon)[0][-1])
        late = cutoff >= cutoff.min() + min(reach, int(np.ptp(cutoff)) // 4)
        items: IntArray = np.flatnonzero(late)
        return items[_spread(len(items), windows, pairs, most, bucketed=bucketed)]
    return _spread(len(windows), windows, pairs, most, bucketed=bucketed)


def _spread(count: int, windows: WindowDataset, pairs: int, most: int | None, *, bucketed: bool) -> IntArray:
    """Return which of so many items to take."""
    if most is None:
        cells = windows.spec.horizon * windows.panel.num_targets * max(pairs, 1) * windows.rows_per_item
        most = max(MAX_WINDOWS, MAX_BUCKET_CELLS // cells) if bucketed else MAX_WINDOWS
    if bucketed and count > most:
        return np.sort(np.random.default_rng(0).choice(count, most, replace=False))
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _origins(windows: WindowDataset, series: IntArray, cutoff: IntArray) -> Origins:
    return Origins(
        panel=windows.panel,
        series_index=series,
        cutoff_index=cutoff,
        context_length=windows.spec.context_length,
    )


def _recency(cutoff: IntArray, half_life: float | None) -> FloatArray | None:
    """Return the weight of each window: halved every ``half_life`` rows before the newest."""
    return None if half_life is None else np.exp2((cutoff - cutoff.max()) / half_life)


def _tell(table: pl.DataFrame) -> None:
    short = table.filter(status="too_few")
    if short.height:
        _LOG.warning(
            "%d of %d intervals have too few held-out windows (fewest: %d) and are infinite; "
            "widen the valid span or ask for lower coverage than %g",
            short.height,
            table.height,
            short["n"].min(),
            short["level"].min(),
        )
    if "bucket" in table.columns:
        split = table.filter(pl.col("bucket").is_not_null())
        fallen = split.filter(status="fallback")
        if fallen.height:
            _LOG.warning(
                "%d of %d margins by %s have too few held-out windows for their coverage and fall back to the margin "
                "over all of them (%d of %d labels: %s)",
                fallen.height,
                split.height,
                table["by"][0],
                fallen["bucket"].n_unique(),
                split["bucket"].n_unique(),
                listing(fallen["bucket"].unique().sort().to_list()),
            )


def calibrated_levels(calibration: pl.DataFrame) -> tuple[float, ...]:
    """Return the quantile levels a calibration table can serve, ascending, 0.5 included."""
    cover = calibration["level"].unique().to_list()
    return tuple(sorted({round(0.5 + sign * c / 2.0, 9) for c in cover for sign in (-1.0, 1.0)} | {0.5}))


def needs_quantiles(calibration: pl.DataFrame) -> bool:
    """Whether the table's margins belong to the quantiles of the network, not to its mean."""
    return calibration["score"].is_in(QUANTILE_SCORES).any()


def needs_recent_errors(calibration: pl.DataFrame) -> bool:
    """Whether the table's margins are in units of recent errors of the network."""
    return _score(calibration) == "recent"


def needs_windows(calibration: pl.DataFrame) -> bool:
    """Whether the margins depend on more than step and variate: labels, the context, or recent errors."""
    return _score(calibration) in LOCAL_UNIT or _label(calibration) != "none"


def _score(calibration: pl.DataFrame) -> str:
    return str(calibration["score"][0]) if calibration.height else "absolute"


def _label(calibration: pl.DataFrame) -> str:
    return str(calibration["by"][0]) if "by" in calibration.columns and calibration.height else "none"


def apply_calibration(
    calibration: pl.DataFrame,
    mean: FloatArray,
    quantiles: FloatArray | None,
    levels: Sequence[float],
    scale: FloatArray,
    variates: Sequence[str],
    *,
    origins: Origins | None = None,
    recent: FloatArray | None = None,
) -> FloatArray:
    """Return calibrated quantiles; they never cross.

    Where margins would cross bounds, the outer one is pushed outwards: intervals only ever grow, so coverage stays. A
    label that the calibration has not seen gets the margin over all labels.

    Args:
        calibration: table of ``calibrate``.
        mean: location, the 0.5 quantile of tables that rest on it.
        quantiles: the network's own quantiles at ``levels``; None for tables that rest on the mean.
        levels: ascending levels, each with its mirror image; all calibrated.
        scale: unit of each window and variate.
        variates: names along V.
        origins: of the windows, for tables that look at the context, the calendar or the series.
        recent: unit of each cell, for tables of ``recent`` scores.

    Shapes:
        mean, recent [N, H, V], quantiles [N, H, V, Q], scale [N, V] -> [N, H, V, Q].
    Raises:
        ConfigError: a level is not calibrated, the kind of score does not fit the quantiles given, or ``origins`` is
            needed.
    """
    check_calibration(calibration, levels, has_quantiles=quantiles is not None)
    steps = mean.shape[1]
    score, by = _score(calibration), _label(calibration)
    if (origins is None and (by != "none" or score == "scaled_volatility")) or (recent is None and score == "recent"):
        what = f"bucket={by}" if by != "none" else f"method={'scaled' if score == 'scaled_volatility' else score}"
        raise ConfigError(
            f"calibration.{what} looks at the windows themselves, which plain arrays do not hold; fit without it for "
            "this use"
        )
    local = recent
    if score == "scaled_volatility" and origins is not None:
        local = origins.volatility()[:, None]
    base = anchors(score, mean, quantiles, levels, scale, local)
    codes = None if origins is None or by == "none" else _codes(calibration, origins, steps)
    result = np.repeat(mean[..., None], len(levels), axis=-1)
    if quantiles is not None and len(levels) % 2 and score != "scaled":
        result[..., len(levels) // 2] = quantiles[..., len(levels) // 2]
    for position, (coverage, below, above) in enumerate(paired_levels(levels)):
        low, high = _margins(calibration, coverage, steps, variates, codes)
        result[..., below] = base.low[..., position] + low * base.unit_low[..., position]
        result[..., above] = base.high[..., position] + high * base.unit_high[..., position]
    return nested(result)


def check_calibration(calibration: pl.DataFrame, levels: Sequence[float], *, has_quantiles: bool) -> None:
    """Check that a calibration table serves these levels with what the network was asked for.

    Raises:
        ConfigError: it does not; the message lists the levels it has.
    """
    known = calibrated_levels(calibration)
    unknown = [level for level in levels if not any(abs(level - other) < 1e-9 for other in known)]
    if unknown:
        raise ConfigError(
            f"quantile level(s) {listing(unknown)} are not calibrated; choose among {listing(known, 30)}, "
            "or refit with the levels wanted"
        )
    if calibration.height and needs_quantiles(calibration) != has_quantiles:
        needed = "the network's quantiles" if not has_quantiles else "its mean alone"
        raise ConfigError(f"the calibration holds '{calibration['score'][0]}' scores, which rest on {needed}; refit it")


def _codes(calibration: pl.DataFrame, origins: Origins, steps: int) -> IntArray:
    """Return the place of each cell's label [N, H, V] among the sorted labels of the table; last = other."""
    kind: BucketKind = calibration["by"][0]
    edges = {
        variate: tuple(part["above"].drop_nulls().unique().sort().to_list())
        for (variate,), part in calibration.group_by("variate")
    }
    labels = origins.labels(kind, steps, edges)
    names = np.asarray(_names(calibration))
    place = np.minimum(np.searchsorted(names, labels), max(len(names) - 1, 0))
    known = names[place] == labels if len(names) else np.zeros(labels.shape, dtype=bool)
    if not known.all():
        _LOG.info(
            "%d of %d cells have a label of '%s' that no held-out window had; they get the margin over all labels",
            int((~known).sum()),
            known.size,
            kind,
        )
    return np.where(known, place, len(names))


def _names(calibration: pl.DataFrame) -> list[str]:
    return sorted(calibration["bucket"].drop_nulls().unique().to_list())


def _margins(
    calibration: pl.DataFrame, coverage: float, steps: int, variates: Sequence[str], codes: IntArray | None
) -> tuple[FloatArray, FloatArray]:
    """Return low and high margins [H, V], or [N, H, V] where labels decide."""
    order = pl.DataFrame({"variate": list(variates), "place": range(len(variates))})
    rows = calibration.filter((pl.col("level") - coverage).abs() < 1e-9, pl.col("step") <= steps).join(
        order, on="variate"
    )
    if codes is not None:
        names = _names(calibration)
        numbers = pl.DataFrame({"bucket": names, "code": range(len(names))}, schema={"bucket": str, "code": pl.Int64})
        rows = rows.join(numbers, on="bucket", how="left").with_columns(pl.col("code").fill_null(len(names)))
        shape: tuple[int, ...] = (len(names) + 1, steps, len(variates))
        rows = rows.sort("code", "step", "place")
    else:
        rows = rows.sort("step", "place")
        shape = (steps, len(variates))
    if rows.height != math.prod(shape):
        raise DataError(
            f"the calibration has {rows.height} margins of coverage {coverage:g} for {steps} steps and "
            f"{len(variates)} variates; the artifact does not belong to this network"
        )
    low, high = rows["low"].to_numpy().reshape(shape), rows["high"].to_numpy().reshape(shape)
    if codes is None:
        return low, high
    step, place = np.arange(steps)[:, None], np.arange(len(variates))
    return low[codes, step, place], high[codes, step, place]
