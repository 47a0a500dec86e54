"""Split conformal calibration: intervals whose coverage is counted on held-out windows, not assumed.

Scores (``conformal_scores``) are taken in units of each window, so that calm and lively series share one table. Margins
are kept per step (or over all steps), variate and central interval, and may depend on a label known at the cutoff.

For n exchangeable scores the k-th smallest with k = ceil((n + 1) coverage) covers at least ``coverage``; when k > n no
finite interval does. By default the scores of all steps stand in then (status ``pooled``), and where these are too few
as well the margin is infinite (``too_few``). It is never the largest score at hand, let alone the smallest. Each side
of an asymmetric interval has its own rank at (1 + coverage) / 2. Overlapping windows are dependent, so n overstates the
evidence, that of pooled scores most; the backtest measures the coverage.
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
from tsforge.forecasting.conformal_buckets import BucketKind, Origins, lower_edge, third_edges
from tsforge.forecasting.conformal_scores import (
    LOCAL_UNIT,
    QUANTILE_SCORES,
    FloatArray,
    IntArray,
    ScoreArray,
    anchors,
    bucket_margins,
    nested,
    paired_levels,
)

_LOG = get_logger(__name__)

Pool = Literal["auto", "step", "horizon"]
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
    (added to the upper bound), ``score, status``: ``ok``, ``too_few``; ``pooled``, with ``pool="auto"`` the margin over
    all steps where one of them has too few scores; ``fallback``, in a bucket with too few the margin over all labels.
    With buckets also ``by, bucket, above``: kind and name of the label, null for the margin over all labels, and where
    a third begins.

    Shapes:
        scores [N, H, V, P] or [N, H, V, P, 2] from ``interval_scores``, mask [N, H, V], weights [N].
    """
    own: Pool = "step" if pool == "auto" else pool
    nobody = np.zeros(mask.shape, dtype=np.int64)
    everyone = _tables(scores, mask, nobody, levels, (variates, own, weights), 1)
    if pool == "auto" and any((table["status"] == "too_few").any() for table in everyone):
        pooled = _tables(scores, mask, nobody, levels, (variates, "horizon", weights), 1)
        everyone = [_stand_in(*tables) for tables in zip(everyone, pooled, strict=True)]
    plain = [table.with_columns(score=pl.lit(score)) for table in everyone]
    if not plain:
        return pl.DataFrame(schema=CALIBRATION_SCHEMA)
    whole = pl.concat(plain)
    order = list(CALIBRATION_SCHEMA)
    if buckets is None:
        return whole.select(pl.col(name).cast(CALIBRATION_SCHEMA[name]) for name in order)
    parts = _tables(scores, mask, buckets.codes, levels, (variates, own, weights), len(buckets.names))
    keys = ["step", "variate", "level"]
    split = pl.concat(parts).join(whole.select(*keys, "n", "low", "high", "status"), on=keys, maintain_order="left")
    short = (pl.col("status") == "too_few") & (pl.col("status_right") != "too_few")
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


def _stand_in(alone: pl.DataFrame, pooled: pl.DataFrame) -> pl.DataFrame:
    """Return a table of margins with those over all steps where a step has too few scores; rows in the same order."""
    short = (alone["status"] == "too_few") & (pooled["status"] == "ok")
    names = ("n", "low", "high")
    both = alone.with_columns(short.alias("short"), *(pooled[name].alias(f"pooled_{name}") for name in names))
    chosen = [pl.when("short").then(f"pooled_{name}").otherwise(name).alias(name) for name in names]
    status = pl.when("short").then(pl.lit("pooled")).otherwise("status").alias("status")
    return both.with_columns(*chosen, status).select(alone.columns)


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
    edges = {str(variate): _edges(part) for (variate,), part in calibration.group_by("variate")}
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


def _edges(calibration: pl.DataFrame) -> tuple[float, float]:
    """Return where the thirds of one variate begin; both, also where they coincide or no window fell in between."""
    above: dict[str, float] = dict(calibration.drop_nulls("above").select("bucket", "above").unique().iter_rows())
    high = above.get("high", math.inf)
    return above.get("middle", high), high


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
