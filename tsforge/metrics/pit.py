"""Probability integral transforms: where in its forecast distribution each value fell.

Values of calibrated forecasts are uniform on (0, 1). A hump in the middle of their histogram says that intervals are
too wide, a U that they are too narrow, a slope that forecasts are biased. The bins here are the published quantile
levels themselves, so no interpolation enters a histogram; ``density`` is the observed over the nominal share, 1 when
calibrated.

A value that several quantiles share (an atom: censored or rounded data) is spread evenly over the probabilities that
the atom spans. This is what random PIT values would give on average, without the randomness.

Source: Dawid (1984), JRSS A 147:278-292; Gneiting, Balabdaoui, Raftery (2007), JRSS B 69:243-268; atoms: Czado,
Gneiting, Held (2009), Biometrics 65:1254-1261.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from tsforge.core.errors import DataError, listing
from tsforge.metrics.point import FloatArray
from tsforge.metrics.quantile import check_levels
from tsforge.metrics.quantile_function import probability_at
from tsforge.metrics.summary import quantile_name

BUCKETS = 4  # groups of neighbouring steps in a table
PIT_SCHEMA: dict[str, type[pl.DataType]] = {
    "variate": pl.String,
    "first_step": pl.Int32,
    "last_step": pl.Int32,
    "bin": pl.Int32,
    "low": pl.Float64,
    "high": pl.Float64,
    "count": pl.Float64,
    "density": pl.Float64,
}


def pit_values(
    target: ArrayLike, quantiles: ArrayLike, levels: Sequence[float], rng: np.random.Generator | None = None
) -> FloatArray:
    """Return F(y) of every cell, from quantiles by the rules of ``quantile_function``; NaN where something is missing.

    Args:
        rng: draws uniformly within the jump of an atom; without it the middle of the jump is returned. It matters for
            ties (censored, rounded or constant data) only.

    Shapes:
        target [...], quantiles [..., Q] -> [...].
    """
    before, after = probability_at(quantiles, levels, target)
    share = np.full(before.shape, 0.5) if rng is None else rng.random(before.shape)
    return np.asarray(before + share * (after - before))


def pit_counts(target: ArrayLike, quantiles: ArrayLike, levels: Sequence[float]) -> FloatArray:
    """Return in which bin each cell falls, as shares [..., Q + 1] that sum to one; 0 where something is missing.

    Bin k lies above level k - 1 up to and including level k, the outer ones reach to 0 and 1.

    Shapes:
        target [...], quantiles [..., Q] -> [..., Q + 1].
    Raises:
        DataError: another number of quantiles than of levels, or levels as ``check_levels`` refuses them.
    """
    tau = check_levels(levels)
    q, y = np.asarray(quantiles, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if q.shape[-1] != tau.size:
        raise DataError(f"{q.shape[-1]} quantiles on the last axis, but {tau.size} levels")
    below, up_to = (q < y[..., None]).sum(axis=-1), (q <= y[..., None]).sum(axis=-1)
    edges = np.concatenate([[0.0], tau, [1.0]])
    single = np.equal.outer(below, np.arange(tau.size + 1)).astype(np.float64)
    before = np.where(below == 0, 0.0, edges[np.minimum(below + 1, tau.size + 1)])[..., None]
    after = np.where(up_to == tau.size, 1.0, edges[up_to])[..., None]
    overlap = np.clip(np.minimum(edges[1:], after) - np.maximum(edges[:-1], before), 0.0, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = overlap / (after - before)
    shares = np.where((up_to - below >= 2)[..., None], spread, single)
    missing = np.isnan(y) | np.isnan(q).any(axis=-1)
    return np.where(missing[..., None], 0.0, shares)


def pit_table(forecasts: pl.DataFrame, levels: Sequence[float], *, buckets: int = BUCKETS) -> pl.DataFrame:
    """Return the histogram of every variate and group of neighbouring steps.

    Args:
        forecasts: long, of one model: ``variate, step, actual`` and one ``q...`` column a level; rows without a value
            or without quantiles do not count.
        levels: ascending levels present.
        buckets: groups of steps, as equal as can be; fewer when there are fewer steps.

    Returns:
        ``variate, first_step, last_step, bin`` (from 0), ``low, high`` (its probabilities), ``count`` (a share of a
        cell counts as such) and ``density`` (null without a cell).

    Raises:
        DataError: a column is missing or there is no group.
    """
    names = [quantile_name(level) for level in levels]
    lacking = [name for name in ("variate", "step", "actual", *names) if name not in forecasts.columns]
    if lacking or buckets < 1:
        raise DataError(
            f"a PIT table needs at least one group of steps and the columns {listing(['variate', 'step', 'actual'])} "
            f"and quantiles; {buckets} groups, lacking {listing(lacking) if lacking else 'none'}"
        )
    tau = check_levels(levels)
    if forecasts.is_empty():
        return pl.DataFrame(schema=PIT_SCHEMA)
    quantiles = np.column_stack([forecasts[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in names])
    shares = pit_counts(forecasts["actual"].cast(pl.Float64).fill_null(np.nan).to_numpy(), quantiles, tau.tolist())
    bins = [f"bin{k}" for k in range(tau.size + 1)]
    groups = [
        part for part in np.array_split(np.arange(1, int(forecasts["step"].to_numpy().max()) + 1), buckets) if part.size
    ]
    starts = pl.DataFrame(
        [(int(step), int(part[0]), int(part[-1])) for part in groups for step in part],
        schema={"step": forecasts.schema["step"], "first_step": pl.Int32, "last_step": pl.Int32},
        orient="row",
    )
    cells = forecasts.select("variate", "step").with_columns(pl.Series(n, shares[:, k]) for k, n in enumerate(bins))
    keys = ["variate", "first_step", "last_step"]
    summed = cells.join(starts, on="step", how="left", maintain_order="left")
    summed = summed.group_by(keys, maintain_order=True).agg(pl.col(bins).sum())
    edges = np.concatenate([[0.0], tau, [1.0]])
    places = pl.DataFrame({"name": bins, "bin": np.arange(len(bins)), "low": edges[:-1], "high": edges[1:]})
    long = summed.unpivot(index=keys, on=bins, variable_name="name", value_name="count").join(places, on="name")
    total = pl.col("count").sum().over(keys)
    density = pl.when(total > 0).then(pl.col("count") / total / (pl.col("high") - pl.col("low")))
    long = long.with_columns(density.alias("density")).sort(*keys, "bin")
    return long.select(pl.col(name).cast(kind) for name, kind in PIT_SCHEMA.items())


def reliability(table: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """Return the share of values at or below each quantile, beside the level it should be.

    Args:
        table: of ``pit_table``, of one model or with further columns such as ``model``.
        by: columns to keep apart; everything else is summed.

    Returns:
        The columns ``by``, then ``level, observed, count`` (cells).
    """
    keys = list(by)
    bins = table.group_by([*keys, "bin", "high"]).agg(pl.col("count").sum()).sort(*keys, "bin")
    running, total = pl.col("count").cum_sum(), pl.col("count").sum()
    if keys:
        running, total = running.over(keys), total.over(keys)
    shares = bins.with_columns((running / total).alias("observed"), total.alias("cells"))
    shares = shares.filter(pl.col("high") < 1.0)
    return shares.select(*keys, pl.col("high").alias("level"), "observed", pl.col("cells").alias("count"))


def pit_distance(table: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """Return the largest difference of observed share and level: Kolmogorov's distance from uniform at the levels.

    Returns:
        The columns ``by``, then ``distance`` and ``level`` (where it is largest), ``observed, count``.
    """
    gaps = reliability(table, by).with_columns((pl.col("observed") - pl.col("level")).abs().alias("distance"))
    largest = gaps.sort([*by, "distance"], descending=[*([False] * len(by)), True])
    largest = largest.unique(list(by), keep="first", maintain_order=True) if by else largest.head(1)
    return largest.select(*by, "distance", "level", "observed", "count")
