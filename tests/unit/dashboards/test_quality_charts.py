"""Charts of distributions show every path and every bin of every group of steps."""

from __future__ import annotations

import numpy as np
import polars as pl

from dashboards.charts import fan_chart
from dashboards.quality_charts import add_paths, pit_chart
from tsforge.metrics.pit import pit_table


def test_paths_lie_over_the_fan_and_share_one_entry_of_the_legend() -> None:
    forecast = pl.DataFrame({"step": [1, 2], "time": [10, 11], "cutoff": [9, 9], "mean": [1.0, 2.0]})
    paths = pl.DataFrame({"path": [0, 1, 0, 1], "time": [11, 11, 10, 10], "value": [4.0, 3.0, 2.0, 1.0]})
    history = pl.DataFrame({"time": [8, 9], "value": [0.0, 0.5]})
    figure = add_paths(fan_chart(history, forecast), paths)
    drawn = {tuple(trace.y): trace.showlegend for trace in figure.data if trace.name == "sample paths"}
    assert set(drawn) == {(2.0, 4.0), (1.0, 3.0)}
    assert sorted(drawn.values()) == [False, True]


def test_histogram_has_a_panel_for_each_group_of_steps_and_adds_up_variates() -> None:
    rng = np.random.default_rng(0)
    data = pl.DataFrame(
        {
            "variate": ["y", "z"] * 200,
            "step": pl.Series(np.repeat(np.arange(1, 5), 100), dtype=pl.Int32),
            "actual": rng.uniform(size=400),
            "q0.1": [0.1] * 400,
            "q0.5": [0.5] * 400,
            "q0.9": [0.9] * 400,
        }
    )
    table = pit_table(data, (0.1, 0.5, 0.9), buckets=2)
    figure = pit_chart(table)
    assert [note.text for note in figure.layout.annotations][:2] == ["steps 1 to 2", "steps 3 to 4"]
    first = figure.data[0]
    np.testing.assert_allclose(first.width, [0.1, 0.4, 0.4, 0.1])
    np.testing.assert_allclose(first.x, [0.05, 0.3, 0.7, 0.95])
    shares = np.histogram(data.filter(pl.col("step") < 3)["actual"], [0, 0.1, 0.5, 0.9, 1])[0] / 200
    np.testing.assert_allclose(first.y, shares / [0.1, 0.4, 0.4, 0.1])
    assert pit_chart(table.clear()).data == ()
    four = pl.concat([table.with_columns(pl.col("first_step", "last_step") + more) for more in (0, 10)])
    panels = pit_chart(four)
    assert {trace.xaxis for trace in panels.data} == {"x", "x2", "x3", "x4"}
    assert panels.layout.yaxis3.domain[1] < panels.layout.yaxis.domain[0], "two by two, for narrow windows"
