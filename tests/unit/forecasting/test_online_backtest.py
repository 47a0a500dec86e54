"""Adapted intervals of a backtest are graded on the cells, and in the units, of everything else in the report."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.baselines import fit_baseline
from tsforge.forecasting.report import BacktestReport


@pytest.fixture(scope="module")
def report() -> BacktestReport:
    """A third series, a hundred times as large, is too young for the season of one baseline, not for the others."""
    rng = np.random.default_rng(0)
    parts = []
    for name, first, size in (("a", 0, 1.0), ("b", 0, 1.0), ("c", 240, 100.0)):
        time = np.arange(first, 300)
        y = size * (np.sin(2 * np.pi * time / 7) + 0.3 * rng.normal(size=len(time)))
        parts.append(pl.DataFrame({"series_id": name, "time": time, "y": y}))
    frame = SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["y"], freq="1i")
    config = BacktestConfig(num_cutoffs=12, stride=3, season_length=50, online=True)  # type: ignore[arg-type]
    return backtest(
        lambda seen, _: fit_baseline("drift", seen, horizon=3, season=1, context_length=2), frame, config, horizon=3
    )


@pytest.mark.parametrize("model", ["drift", "last_value", "seasonal_naive"])
def test_means_have_the_errors_that_they_have_without(report: BacktestReport, model: str) -> None:
    assert any("9 of 36 windows are not graded" in note for note in report.notes)
    keys = ["scope", "series_id", "variate", "step", "cutoff", "metric"]
    both = report.metrics.filter(model=model).join(
        report.metrics.filter(model=model + "+online"), on=keys, how="full", nulls_equal=True
    )
    assert both.height == report.metrics.filter(model=model).height  # no cell more, none less
    assert both["count"].equals(both["count_right"], check_names=False)
    means = both.filter(pl.col("metric").is_in(["mae", "mse", "rmse", "smape", "mase"]))
    assert np.allclose(means["value"].fill_null(-1.0), means["value_right"].fill_null(-1.0), rtol=1e-12)
    overall = report.metrics.filter(scope="overall", model=model + "+online")
    scaled = overall.filter(pl.col("metric").str.contains("^(mase|msis)"))
    assert scaled.height > 1
    assert scaled["value"].is_finite().all()
    note = next(note for note in report.notes if note.startswith(f"{model}+online: "))
    adapted = overall.filter(metric="coverage_80")["value"].item()
    static = report.metrics.filter(scope="overall", model=model, metric="coverage_80")["value"].item()
    assert f"80 %: {adapted:.1%} (static {static:.1%})" in note
