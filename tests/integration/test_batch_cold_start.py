"""Batches with series that are too short for the model, or not there yet."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tsforge.app.batch import BatchConfig, BatchResult, run_batch
from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import PredictConfig, predict
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace

AS_OF = datetime(2026, 3, 4, 6, tzinfo=UTC)
CHECKS = [{"kind": "non_empty", "min_rows": 1}]


@pytest.fixture
def young(site: Any) -> Any:
    """The site with a third series, which has five rows at ``AS_OF``."""
    table = pl.read_parquet(site.source)
    begun = pl.col("ds") > AS_OF - timedelta(hours=5)
    columns = (pl.when(begun).then(pl.col(f"a.{name}") + 5).alias(f"c.{name}") for name in ("x", "y"))
    table.with_columns(columns).write_parquet(site.source)
    return site


def run(site: Any, as_of: datetime = AS_OF, **changes: Any) -> BatchResult:
    config = validate(BatchConfig, site.batch(**{"checks": CHECKS, "detect": None} | changes))
    return run_batch(config, as_of, Workspace.open())


def forecast_of(result: BatchResult) -> pl.DataFrame:
    table = result.partition.table("forecast")
    assert table is not None
    return table


def test_a_young_series_does_not_keep_the_others_from_being_published(young: Any) -> None:
    with pytest.raises(DataError, match="cold_start=pad"):
        run(young)
    result = run(young, forecast={"cold_start": "pad"})
    table = forecast_of(result)
    assert table["series_id"].unique().sort().to_list() == ["a", "b", "c"]
    assert table.height == 3 * 2 * 12
    assert table.null_count().sum_horizontal().item() == 0
    assert result.partition.manifest["cold_start"]["history_rows"] == {"c": 5}
    asked = {"artifact": young.artifact, "cold_start": "pad", "cutoff": AS_OF.isoformat()}
    same = predict(validate(PredictConfig, asked), Workspace.open()).table
    assert_frame_equal(table, same)


def test_detection_goes_on_with_the_series_that_fill_a_context(young: Any) -> None:
    scores = run(young, forecast={"cold_start": "pad"}, detect={"span": "3d"}).partition.table("scores")
    assert scores is not None
    assert scores["series_id"].unique().sort().to_list() == ["a", "b"]


def test_online_intervals_of_a_young_series_learn_as_those_of_the_others(young: Any) -> None:
    forecast = {"quantile_levels": [0.1, 0.5, 0.9], "online": {"start": 1, "window": 30}, "cold_start": "pad"}
    results = [run(young, AS_OF + timedelta(hours=12 * number), forecast=forecast) for number in range(5)]
    facts = [result.partition.manifest for result in results]
    assert [item["cold_start"]["history_rows"] for item in facts] == [{"c": 5}, {"c": 17}, {"c": 29}, {"c": 41}, {}]
    assert [item["online"]["judged"] for item in facts] == [0, *[3 * 2 * 12] * 4]
    online = results[-1].partition.table("online")
    assert online is not None
    assert online.filter(series_id="c")["status_80"].unique().to_list() == ["adapted"]


def test_a_new_series_is_forecast_until_it_begins(young: Any, caplog: pytest.LogCaptureFixture) -> None:
    forecast = {"cold_start": {"like": {"c": "a"}}}
    before = run(young, AS_OF - timedelta(days=1), forecast=forecast)
    assert before.partition.manifest["cold_start"]["like"] == {"c": "a"}
    table = forecast_of(before)
    means = table.sort("variate", "step").partition_by("series_id", as_dict=True)
    assert means["c",]["mean"].to_list() == means["a",]["mean"].to_list()
    assert "no effect any more" not in caplog.text
    begun = run(young, forecast=forecast).partition.manifest["cold_start"]
    assert (begun["like"], begun["history_rows"]) == ({}, {"c": 5})
    assert "forecast.cold_start.like of c has no effect any more" in caplog.text


def test_sums_of_a_cold_start_are_refused(site: Any) -> None:
    data = site.data() | {"hierarchy": {"levels": ["all", "part"], "separator": "/"}}
    with pytest.raises(ConfigError, match="no reconcile beside it"):
        run(site, data=data, forecast={"cold_start": "pad", "reconcile": "ols"})


def test_fewer_steps_than_trained_with_a_calendar_of_the_model(site: Any) -> None:
    """The model reads its whole horizon whatever is asked for."""
    workspace = Workspace.open()
    settings = {
        "data": site.data() | {"calendar": {"features": ["weekday"]}},
        "model": {"name": "ar_net", "lags": 24},
        "window": {"context_length": 48, "horizon": 12},
        "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
        "tracking": {"enabled": False},
    }
    artifact = fit(validate(FitConfig, settings), workspace).artifact
    newest = pl.read_parquet(site.source)["ds"].max()  # no later row brings its calendar along
    assert isinstance(newest, datetime)
    short, whole = (
        forecast_of(run(site, newest, model=artifact.id, name=f"h{steps}", forecast={"horizon": steps}))
        for steps in (3, 12)
    )
    assert_frame_equal(short, whole.filter(pl.col("step") <= 3))
