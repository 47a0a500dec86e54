"""Metrics of forecast tables against the array metrics and plain loops."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.core.errors import DataError
from tsforge.metrics.point import mae, mase, mse, smape
from tsforge.metrics.quantile import coverage, crps_quantiles, interval_width, msis, weighted_quantile_loss
from tsforge.metrics.summary import central_intervals, metric_table, score_cells, summarise

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
SHAPE = (2, 3, 4, 2)  # series, cutoffs, steps, variates


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(12)
    target = rng.normal(3.0, 2.0, SHAPE)
    target[0, 1, 2, 0] = np.nan
    quantiles = np.sort(rng.normal(3.0, 2.0, (*SHAPE, 5)), axis=-1)
    scale = np.array([[0.5, np.nan], [2.0, 1.0]])  # [series, variates], one of them constant
    return target, quantiles[..., 2] + 0.1, quantiles, scale


@pytest.fixture
def table(arrays) -> pl.DataFrame:
    target, mean, quantiles, _ = arrays
    start = datetime(2024, 1, 1)
    rows = []
    for s, c, h, v in np.ndindex(SHAPE):
        cutoff = start + timedelta(hours=10 * c)
        actual = None if math.isnan(target[s, c, h, v]) else target[s, c, h, v]
        row = {"series_id": f"s{s}", "cutoff": cutoff, "step": h + 1, "time": cutoff + timedelta(hours=h + 1)}
        row |= {"variate": f"v{v}", "mean": mean[s, c, h, v], "actual": actual}
        rows.append(row | {f"q{level:g}": quantiles[s, c, h, v, i] for i, level in enumerate(LEVELS)})
    return pl.DataFrame(rows)


@pytest.fixture
def scales(arrays) -> pl.DataFrame:
    scale = arrays[3]
    rows = [{"series_id": f"s{s}", "variate": f"v{v}", "scale": scale[s, v]} for s, v in np.ndindex(2, 2)]
    return pl.DataFrame(rows)


def test_overall_metrics_equal_the_array_metrics(arrays, table, scales) -> None:
    target, mean, quantiles, scale = arrays
    row = summarise(score_cells(table, LEVELS, scales)).row(0, named=True)
    unit = scale[:, None, None, :]
    low, high = quantiles[..., 0], quantiles[..., 4]
    assert row["count"] == 47
    assert row["mse"] == pytest.approx(mse(target, mean).value)
    assert row["rmse"] == pytest.approx(math.sqrt(mse(target, mean).value))
    assert row["mae"] == pytest.approx(mae(target, mean).value)
    assert row["smape"] == pytest.approx(smape(target, mean).value)
    assert row["mase"] == pytest.approx(mase(target, mean, unit).value)
    assert row["mase_count"] == mase(target, mean, unit).count == 35
    assert row["wql"] == pytest.approx(weighted_quantile_loss(target, quantiles, LEVELS).value)
    assert row["crps"] == pytest.approx(np.nanmean(crps_quantiles(target, quantiles, LEVELS)))
    assert row["coverage_90"] == pytest.approx(coverage(target, low, high).value)
    assert row["width_90"] == pytest.approx(interval_width(target, low, high).value)
    assert row["msis_90"] == pytest.approx(msis(target, low, high, 0.1, unit).value)


def test_groups_equal_slices(arrays, table, scales) -> None:
    target, mean, _, _ = arrays
    cells = score_cells(table, LEVELS, scales)
    for row in summarise(cells, ("series_id", "variate")).iter_rows(named=True):
        s, v = int(row["series_id"][1]), int(row["variate"][1])
        assert row["mse"] == pytest.approx(mse(target[s, ..., v], mean[s, ..., v]).value)
    per_step = summarise(cells, ("step",))
    assert per_step["mae"].to_list() == pytest.approx(mae(target, mean, axis=(0, 1, 3)).value.tolist())
    undefined = summarise(cells, ("series_id", "variate")).row(1, named=True)
    assert undefined["mase"] is None
    assert undefined["mase_count"] == 0


def test_metric_table_holds_every_scope_with_counts(arrays, table, scales) -> None:
    target, mean, _, _ = arrays
    long = metric_table(score_cells(table, LEVELS, scales))
    assert set(long["scope"]) == {"overall", "series", "variate", "step", "cutoff", "series_variate", "variate_step"}
    overall = long.filter(scope="overall", metric="mase").row(0, named=True)
    assert overall["count"] == 35
    assert overall["series_id"] is None
    series = long.filter(pl.col("scope") == "series", pl.col("metric") == "mse", pl.col("series_id") == "s0")
    assert series["value"].item() == pytest.approx(mse(target[0], mean[0]).value)
    assert series["count"].item() == 23


def test_missing_forecasts_spoil_and_missing_actuals_do_not(table) -> None:
    spoiled = table.with_columns(pl.when(pl.col("step") == 2).then(None).otherwise("mean").alias("mean"))
    steps = summarise(score_cells(spoiled), ("step",))
    assert [math.isnan(value) for value in steps["mse"]] == [False, True, False, False]
    assert steps["count"].sum() == 47


def test_point_forecasts_have_no_interval_metrics(table) -> None:
    row = summarise(score_cells(table)).row(0, named=True)
    assert set(row) == {"count", "mse", "mae", "rmse", "smape", "mase", "mase_count"}
    assert row["mase"] is None
    assert row["mase_count"] == 0


def test_scale_may_change_from_cutoff_to_cutoff(table) -> None:
    keys = table.select("series_id", "variate", "cutoff").unique()
    scales = keys.with_columns(pl.when(pl.col("cutoff") > datetime(2024, 1, 1)).then(2.0).otherwise(1.0).alias("scale"))
    cells = score_cells(table, (), scales)
    ratio = (cells["absolute"] / cells["scaled"]).round(9)
    assert ratio.to_list() == [2.0 if cutoff > datetime(2024, 1, 1) else 1.0 for cutoff in cells["cutoff"]]


def test_nothing_scored_gives_null_not_zero(table) -> None:
    empty = summarise(score_cells(table.with_columns(actual=pl.lit(None, dtype=pl.Float64)), LEVELS))
    row = empty.row(0, named=True)
    assert row["count"] == 0
    assert row["mse"] is None
    assert row["wql"] is None


def test_unusable_tables_are_refused(table) -> None:
    with pytest.raises(DataError, match=r"lacks actual"):
        score_cells(table.drop("actual"))
    with pytest.raises(DataError, match=r"lacks q0\.1"):
        score_cells(table, (0.1,))
    with pytest.raises(DataError, match="1 of 47 actual values are infinite"):
        first = pl.int_range(pl.len()) == 0
        score_cells(table.with_columns(pl.when(first).then(math.inf).otherwise("actual").alias("actual")))


def test_central_intervals_pair_symmetric_levels() -> None:
    assert central_intervals((0.05, 0.1, 0.5, 0.9, 0.95)) == [(0.9, 0.05, 0.95), (0.8, 0.1, 0.9)]
    assert central_intervals((0.1, 0.5)) == []
