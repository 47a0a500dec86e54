"""Metrics of a long forecast table: errors of every cell, then means over any grouping, each with its count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.metrics.point import FloatArray, absolute_error, squared_error, symmetric_percentage_error
from tsforge.metrics.quantile import crps_quantiles, inside, interval_score, pinball

KEYS = ("series_id", "cutoff", "step", "time", "variate")
_SAME_LEVEL = 1e-6  # columns hold six digits of a level: q0.0833333 and q0.916667 are a pair
SCOPES: dict[str, tuple[str, ...]] = {
    "overall": (),
    "series": ("series_id",),
    "variate": ("variate",),
    "step": ("step",),
    "cutoff": ("cutoff",),
    "series_variate": ("series_id", "variate"),
    "variate_step": ("variate", "step"),
}


def central_intervals(levels: Sequence[float]) -> list[tuple[float, float, float]]:
    """Return (coverage, low level, high level) of every symmetric pair among the levels, widest first."""
    ordered = sorted(levels)
    pairs = []
    for low in ordered:
        high = next((level for level in ordered if abs(level - (1.0 - low)) < _SAME_LEVEL), None)
        if low < 0.5 and high is not None:
            pairs.append((round(high - low, 9), low, high))
    return pairs


def quantile_name(level: float) -> str:
    """Return the column of a level in a forecast table."""
    return f"q{level:g}"


def score_cells(table: pl.DataFrame, levels: Sequence[float] = (), scales: pl.DataFrame | None = None) -> pl.DataFrame:
    """Return the errors of every cell whose actual value is known.

    Args:
        table: ``series_id, cutoff, step, time, variate, mean, actual`` and one ``q...`` column a level.
        levels: ascending quantile levels present.
        scales: ``series_id, variate, scale`` and, when the scale changes with the refits, ``cutoff``; the unit of the
            scaled metrics. Null or NaN where undefined.

    Returns:
        The keys, ``squared, absolute, percentage, size`` (|actual|), ``scaled`` (null where no scale exists) and,
        with levels, ``pinball, crps`` and per central interval of coverage c ``inside_c, width_c, interval_c``.

    Raises:
        DataError: a column is missing, or an actual value is infinite.
    """
    names = [quantile_name(level) for level in levels]
    missing = [name for name in (*KEYS, "mean", "actual", *names) if name not in table.columns]
    if missing:
        raise DataError(f"a forecast table to score lacks {listing(missing)}; it has {listing(table.columns, 30)}")
    known = table.filter(pl.col("actual").is_not_null() & pl.col("actual").is_not_nan())
    if scales is not None:
        keys = [name for name in ("series_id", "variate", "cutoff") if name in scales.columns]
        known = known.join(scales, on=keys, how="left", maintain_order="left")
        if known["scale"].len() and known["scale"].is_null().all():
            known = known.with_columns(pl.col("scale").cast(pl.Float64))
    y = known["actual"].to_numpy().astype(np.float64)
    if np.isinf(y).any():
        raise DataError(f"{int(np.isinf(y).sum())} of {len(y)} actual values are infinite; mark them as missing")
    mean = _column(known, "mean")
    unit = _column(known, "scale") if scales is not None else np.full(len(y), np.nan)
    unit = np.where(unit > 0, unit, np.nan)
    cells = {
        "squared": squared_error(y, mean),
        "absolute": absolute_error(y, mean),
        "percentage": symmetric_percentage_error(y, mean),
        "size": np.abs(y),
    }
    undefined = {"scaled": cells["absolute"] / unit}
    if names:
        quantiles = np.column_stack([_column(known, name) for name in names])
        cells["pinball"] = pinball(y, quantiles, levels).mean(axis=-1)
        cells["crps"] = crps_quantiles(y, quantiles, levels)
        for cover, low, high in central_intervals(levels):
            bounds = _column(known, quantile_name(low)), _column(known, quantile_name(high))
            tag = f"{100 * cover:g}"
            cells[f"inside_{tag}"] = inside(y, *bounds)
            cells[f"width_{tag}"] = bounds[1] - bounds[0]
            undefined[f"interval_{tag}"] = interval_score(y, *bounds, 1.0 - cover) / unit
    frame = known.select(KEYS).with_columns(pl.Series(name, values) for name, values in cells.items())
    usable = pl.Series("usable", ~np.isnan(unit))  # no unit: null, left out; a missing forecast: NaN, kept
    return frame.with_columns(
        pl.Series(name, values).set(~usable, None).alias(name) for name, values in undefined.items()
    )


def summarise(cells: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """Return one row a group: ``count, mse, mae, rmse, smape, mase, mase_count`` and, with quantiles, ``wql, crps`` and
    ``coverage_c, width_c, msis_c`` for each central interval. A mean over nothing is null.
    """
    total = pl.col("size").sum()
    metrics = [
        pl.len().cast(pl.Int64).alias("count"),
        pl.col("squared").mean().alias("mse"),
        pl.col("absolute").mean().alias("mae"),
        pl.col("squared").mean().sqrt().alias("rmse"),
        pl.col("percentage").mean().alias("smape"),
        pl.col("scaled").mean().alias("mase"),
        pl.col("scaled").count().cast(pl.Int64).alias("mase_count"),
    ]
    if "pinball" in cells.columns:
        metrics.append(pl.when(total > 0).then(2.0 * pl.col("pinball").sum() / total).alias("wql"))
        metrics.append(pl.col("crps").mean().alias("crps"))
    for name in cells.columns:
        for prefix, metric in (("inside_", "coverage_"), ("width_", "width_"), ("interval_", "msis_")):
            if name.startswith(prefix):
                metrics.append(pl.col(name).mean().alias(metric + name.removeprefix(prefix)))
    if not by:
        return cells.select(metrics)
    return cells.group_by(list(by), maintain_order=True).agg(metrics).sort(list(by))


def metric_table(cells: pl.DataFrame, scopes: Sequence[str] = tuple(SCOPES)) -> pl.DataFrame:
    """Return all metrics at all scopes, long: ``scope, series_id, variate, step, cutoff, metric, value, count``.

    A dimension that a scope averages over is null; ``count`` is the number of cells behind the value.
    """
    dimensions = ("series_id", "variate", "step", "cutoff")
    types = {name: cells.schema[name] for name in dimensions}
    parts = []
    for scope in scopes:
        wide = summarise(cells, SCOPES[scope])
        long = wide.unpivot(
            index=[*SCOPES[scope], "count", "mase_count"],
            on=[name for name in wide.columns if name not in (*SCOPES[scope], "count", "mase_count")],
            variable_name="metric",
        )
        scaled = pl.col("metric").str.contains("^(mase|msis)")
        parts.append(
            long.with_columns(
                pl.lit(scope).alias("scope"),
                pl.when(scaled).then("mase_count").otherwise("count").alias("count"),
                *(pl.lit(None, dtype=kind).alias(name) for name, kind in types.items() if name not in SCOPES[scope]),
            ).select("scope", *dimensions, "metric", "value", "count")
        )
    return pl.concat(parts)


def _column(table: pl.DataFrame, name: str) -> FloatArray:
    return table[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
