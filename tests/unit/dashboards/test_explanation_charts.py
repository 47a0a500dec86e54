"""Charts of explanations: what is drawn are the numbers of the table, in its order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest

from dashboards.explanation_charts import importance_chart, lags_chart, waterfall_chart


def test_waterfall_walks_from_the_baseline_to_the_forecast() -> None:
    parts = pl.DataFrame({"label": ["x", "y"], "contribution": [3.0, -1.0]})
    figure = waterfall_chart(parts, baseline=10.0, forecast=12.0, variate="x")
    steps, ends = figure.data
    assert list(figure.layout.xaxis.ticktext) == ["baseline", "x", "y", "forecast"]
    assert list(steps.y) == [3.0, -1.0]
    assert steps.base == 10.0
    assert ends.mode == "markers", "a bar would say that the end is as large as the bar is long"
    assert dict(zip(ends.x, ends.y, strict=True)) == {0: 10.0, 3: 12.0}


def test_inputs_may_be_named_like_numbers_and_like_the_ends() -> None:
    parts = pl.DataFrame({"label": ["2", "forecast", "10"], "contribution": [3.0, -1.0, 0.5]})
    figure = waterfall_chart(parts, baseline=10.0, forecast=12.5)
    assert list(figure.data[0].x) == [1, 2, 3]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3, 4]
    assert list(figure.layout.xaxis.ticktext) == ["baseline", "2", "forecast", "10", "forecast"]
    cells = pl.DataFrame({"label": ["2", "10"], "source_time": [1, 2], "contribution": [1.0, 2.0]})
    assert lags_chart(cells).layout.yaxis.type == "category"
    table = pl.DataFrame({"label": ["2", "10"], "importance": [0.5, 0.1], "sd": [0.1, None]})
    assert importance_chart(table).layout.yaxis.type == "category"


def test_waterfall_names_what_is_left_over() -> None:
    parts = pl.DataFrame({"label": ["x"], "contribution": [3.0]})
    figure = waterfall_chart(parts, baseline=10.0, forecast=12.5)
    assert list(figure.layout.xaxis.ticktext) == ["baseline", "x", "remainder", "forecast"]
    assert figure.data[0].y[1] == pytest.approx(-0.5)
    low, high = figure.layout.yaxis.range
    assert low < 10.0
    assert high > 13.0


@pytest.mark.parametrize("times", [[3, 1, 2], [datetime(2026, 1, day, tzinfo=UTC) for day in (3, 1, 2)]])
def test_lags_are_drawn_in_time_order_with_gaps(times: list[Any]) -> None:
    cells = pl.DataFrame(
        {"label": ["b", "b", "a"], "source_time": [times[0], times[1], times[2]], "contribution": [1.0, -4.0, 2.0]}
    )
    heat = lags_chart(cells).data[0]
    assert list(heat.y) == ["b", "a"]
    assert list(heat.x) == sorted(times)
    assert [list(row) for row in heat.z] == [[-4.0, None, 1.0], [None, 2.0, None]]
    assert (heat.zmin, heat.zmax) == (-4.0, 4.0)


def test_importance_keeps_the_order_and_shows_the_spread() -> None:
    table = pl.DataFrame({"label": ["x", "y"], "importance": [0.5, -0.01], "sd": [0.1, None]})
    bars = importance_chart(table).data[0]
    assert list(bars.y) == ["x", "y"]
    assert list(bars.x) == [0.5, -0.01]
    assert list(bars.error_x.array) == [0.1, 0.0]
    assert bars.marker.color[0] != bars.marker.color[1]
