"""Charts show what the tables say: every row, every band, every event."""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl
import pytest

from dashboards import backtest_charts, charts, model_charts

START = datetime(2024, 1, 1)


def times(count: int, first: int = 0) -> list[datetime]:
    return [START + timedelta(hours=first + index) for index in range(count)]


@pytest.fixture
def forecast() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "cutoff": [START + timedelta(hours=19)] * 4,
            "step": [4, 3, 2, 1],  # unsorted on purpose
            "time": times(4, 20)[::-1],
            "mean": [4.0, 3.0, 2.0, 1.0],
            "q0.05": [0.0] * 4,
            "q0.25": [0.5] * 4,
            "q0.75": [4.5] * 4,
            "q0.95": [6.0] * 4,
            "q0.5": [2.0] * 4,
        }
    )


def test_quantile_pairs_are_symmetric_and_widest_first() -> None:
    columns = ["mean", "q0.05", "q0.25", "q0.5", "q0.75", "q0.95", "q0.99"]
    assert charts.quantile_pairs(columns) == [("q0.05", "q0.95", 0.9), ("q0.25", "q0.75", 0.5)]
    assert charts.quantile_pairs(["mean", "q0.5"]) == []


def test_fan_chart_draws_bands_history_forecast_and_truth(forecast: pl.DataFrame) -> None:
    history = pl.DataFrame({"time": times(20), "value": [float(i) for i in range(20)]})
    actual = pl.DataFrame({"time": times(4, 20), "value": [1.0, 2.0, 3.0, 9.0]})
    figure = charts.fan_chart(history, forecast, actual=actual, variate="temp")
    assert [trace.name for trace in figure.data] == [
        "90% interval",
        "50% interval",
        "history",
        "forecast",
        "what happened",
    ]
    assert list(figure.data[3].y) == [1.0, 2.0, 3.0, 4.0]  # in time order
    assert list(figure.data[0].y) == [6.0] * 4 + [0.0] * 4
    assert {trace.mode for trace in figure.data[:2]} == {"lines"}, "no dots on the edges of a band"
    assert figure.layout.yaxis.title.text == "temp"
    assert figure.layout.shapes[0].x0 == START + timedelta(hours=19)


def test_gaps_stay_gaps(forecast: pl.DataFrame) -> None:
    history = pl.DataFrame({"time": times(3), "value": [1.0, None, 3.0]})
    figure = charts.fan_chart(history, forecast)
    assert list(next(trace for trace in figure.data if trace.name == "history").y) == [1.0, None, 3.0]
    assert not any(trace.connectgaps for trace in figure.data)


def test_components_have_a_panel_each() -> None:
    table = pl.DataFrame(
        {"time": times(2) * 3, "component": ["level"] * 2 + ["ar"] * 2 + ["season"] * 2, "value": [1.0] * 6}
    )
    figure = charts.components_chart(table)
    assert [item.text for item in figure.layout.annotations] == ["level", "ar", "season"]


def test_timeline_marks_every_event_even_of_one_step() -> None:
    values = pl.DataFrame({"time": times(10), "value": [1.0] * 10})
    scores = pl.DataFrame({"time": times(10), "score": [1.0] * 10, "threshold": [3.0] * 10})
    events = pl.DataFrame(
        {"event_id": ["a", "b"], "start": [times(10)[2], times(10)[5]], "end": [times(10)[2], times(10)[7]]}
    )
    figure = charts.anomaly_timeline(values, scores, events, variate="temp")
    spans = {(shape.x0, shape.x1) for shape in figure.layout.shapes}
    assert spans == {(times(10)[2], times(10)[2]), (times(10)[5], times(10)[7])}
    assert all(shape.line.width > 0 for shape in figure.layout.shapes)
    assert figure.layout.yaxis2.type is None


def test_timeline_of_an_extreme_score_is_logarithmic() -> None:
    scores = pl.DataFrame({"time": times(5), "score": [1.0, 1.0, 900.0, None, 1.0], "threshold": [3.0] * 5})
    values = pl.DataFrame({"time": times(5), "value": [1.0] * 5})
    events = pl.DataFrame(schema={"event_id": pl.String, "start": pl.Datetime, "end": pl.Datetime})
    assert charts.anomaly_timeline(values, scores, events).layout.yaxis2.type == "log"


def test_attribution_and_leaderboard_put_the_first_on_top() -> None:
    bars = charts.attribution_chart(
        [{"variate": "a", "contribution": 1.0}, {"variate": "b", "contribution": 9.0}]
    ).data[0]
    assert (bars.y[-1], bars.x[-1]) == ("b", 9.0)
    board = backtest_charts.leaderboard_chart(
        pl.DataFrame({"model": ["x", "y", "z"], "mae": [2.0, 1.0, None]}), metric="mae"
    )
    assert list(board.data[0].y) == ["x", "y"]


def test_error_by_step_and_history_have_a_line_a_name() -> None:
    table = pl.DataFrame({"model": ["m", "m", "n"], "step": [2, 1, 1], "mae": [0.2, 0.1, 0.5]})
    figure = backtest_charts.error_by_step(table, metric="mae")
    assert {trace.name: list(trace.y) for trace in figure.data} == {"m": [0.1, 0.2], "n": [0.5]}
    curves = model_charts.history_chart(pl.DataFrame({"epoch": [1, 0], "name": ["loss"] * 2, "value": [0.1, 0.2]}))
    assert list(curves.data[0].y) == [0.2, 0.1]


def test_missing_cells_are_placed_by_series_and_column() -> None:
    report = pl.DataFrame({"series_id": ["s", "s", "t"], "column": ["a", "b", "a"], "null_share": [0.1, 0.2, 0.3]})
    heat = charts.null_share_chart(report).data[0]
    assert list(heat.x) == ["a", "b"]
    assert list(heat.y) == ["s", "t"]
    assert [list(row) for row in heat.z] == [[0.1, 0.2], [0.3, None]]


def test_kernels_chart_draws_every_feature_as_a_share_of_its_peak() -> None:
    rows = [
        {"layer": layer, "feature": feature, "lag": lag, "weight": float(weight)}
        for layer, feature, weights in ((0, 3, [2.0, -4.0, 1.0]), (0, 1, [0.0, 0.0, 0.0]), (1, 3, [0.5, 0.25, 0.0]))
        for lag, weight in enumerate(weights)
    ]
    figure = model_charts.kernels_chart(pl.DataFrame(rows))
    assert [list(trace.y) for trace in figure.data] == [[0.5, -1.0, 0.25], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]]
    assert [trace.name for trace in figure.data] == ["feature 3", "feature 1", "feature 3"]
    assert [item.text for item in figure.layout.annotations] == ["layer 0", "layer 1"]
    assert figure.data[2].yaxis == "y2"


def test_memory_chart_has_one_point_a_feature() -> None:
    table = pl.DataFrame(
        {"layer": [0, 0, 1], "feature": [0, 1, 0], "dt": [0.001, 0.1, 0.01], "memory": [300.0, 4.0, 40.0]}
    )
    figure = model_charts.memory_chart(table)
    assert [list(trace.y) for trace in figure.data] == [[300.0, 4.0], [40.0]]
    assert list(figure.data[0].x) == [0.001, 0.1]
    assert figure.layout.yaxis.type == "log"


def coupling(names: list[str], effects: list[list[float]]) -> pl.DataFrame:
    return pl.DataFrame(
        [{"source": a, "variate": b, "effect": effects[i][j]} for i, a in enumerate(names) for j, b in enumerate(names)]
    )


def test_coupling_chart_has_sources_as_rows_and_keeps_own_effects_out_of_the_colours() -> None:
    figure = model_charts.coupling_chart(coupling(["temp", "wind"], [[9.0, 0.0001], [0.5, 8.0]]))
    others, own = figure.data
    assert [list(row) for row in others.z] == [[None, 0.0001], [0.5, None]]
    assert [list(row) for row in own.z] == [[9.0, None], [None, 8.0]]
    assert (others.zmin, others.zmax) == (0, 0.5)
    assert [list(row) for row in others.text] == [["", ""], ["0.5", ""]]  # what is next to nothing has no number
    assert list(others.customdata[1][0]) == ["wind", "temp"]
    assert list(figure.layout.yaxis.ticktext) == list(figure.layout.xaxis.ticktext) == ["temp", "wind"]
    assert figure.layout.yaxis.title.text == "last value of"
    assert figure.layout.xaxis.title.text == "forecast of"
    assert figure.layout.yaxis.autorange == "reversed"  # the first on top, as in a matrix


def test_coupling_chart_of_many_variates_names_them_all_and_leaves_the_numbers_out() -> None:
    names = [f"particulate matter at station {number}" for number in range(20)]
    figure = model_charts.coupling_chart(coupling(names, [[1.0] * 20] * 20))
    ticks = list(figure.layout.xaxis.ticktext)
    assert len(set(ticks)) == 20
    assert max(len(tick) for tick in ticks) <= 22
    assert figure.layout.xaxis.tickangle == -60
    assert figure.data[0].texttemplate is None


def scales(*, coupled: bool = True, directions: tuple[str, ...] = ("forward", "backward")) -> pl.DataFrame:
    reach = {"reach_p10": 0.5, "reach": 2.0, "reach_p90": 9.0} if coupled else {}
    reach = {**dict.fromkeys(("reach_p10", "reach", "reach_p90")), **reach}
    return pl.DataFrame(
        [
            {"layer": 0, "head": head, "direction": direction, "memory_p10": 3.0, "memory": 20.0, "memory_p90": 400.0}
            | {"period": 24.0 if head == "seasonal" else None}
            | reach
            for head in ("trend", "seasonal")
            for direction in directions
        ],
        infer_schema_length=None,
    )


def test_time_scales_chart_has_a_row_a_head_and_direction_on_logarithmic_axes() -> None:
    figure = model_charts.time_scales_chart(scales(), step="15m", context=96, variates=7)
    assert [item.text for item in figure.layout.annotations] == [
        "memory along time (steps of 15m)",
        "reach along variates (number of variates)",
    ]
    assert [trace.name for trace in figure.data] == ["trend", "trend", "seasonal", "seasonal", "seasonal: period"]
    assert list(figure.layout.yaxis.ticktext) == [
        f"layer 0, {head}, {direction}" for head in ("trend", "seasonal") for direction in ("forward", "backward")
    ]
    memory = figure.data[0]
    assert (list(memory.x), list(memory.error_x.array), list(memory.error_x.arrayminus)) == (
        [20.0] * 2,
        [380.0] * 2,
        [17.0] * 2,
    )
    assert list(figure.data[4].x) == [24.0] * 2
    assert (figure.layout.xaxis.type, figure.layout.xaxis2.type) == ("log", "log")
    assert list(figure.layout.xaxis.range) == [0, 3]  # 3 to 400: whole decades
    assert [shape.x0 for shape in figure.layout.shapes] == [96, 7]


def test_time_scales_of_a_model_without_coupling_have_no_reach() -> None:
    table = scales(coupled=False, directions=("forward",))
    figure = model_charts.time_scales_chart(table, step="1d", context=96, variates=1)
    assert [item.text for item in figure.layout.annotations] == ["memory along time (steps of 1d)"]
    assert list(figure.layout.yaxis.ticktext) == ["layer 0, trend", "layer 0, seasonal"]


def test_small_parts_have_powers_of_ten_on_their_axis() -> None:
    table = pl.DataFrame(
        {"time": times(2) * 2, "component": ["level"] * 2 + ["trend"] * 2, "value": [9.0] * 2 + [2e-4] * 2}
    )
    figure = charts.components_chart(table)
    assert figure.layout.yaxis.exponentformat is None
    assert figure.layout.yaxis2.exponentformat == "power"


NAMES = ["1", "40", "<i>x</i> & y"]


def test_names_that_are_numbers_or_tags_are_names_on_every_axis() -> None:
    report = pl.DataFrame({"series_id": ["7"] * 3, "column": NAMES, "null_share": [0.1, 0.2, 0.3]})
    missing = charts.null_share_chart(report)
    assert (missing.layout.xaxis.type, missing.layout.yaxis.type) == ("category", "category")
    assert list(missing.layout.xaxis.ticktext) == ["1", "40", "&lt;i&gt;x&lt;/i&gt; &amp; y"]
    assert list(missing.layout.xaxis.tickvals) == NAMES
    blamed = charts.attribution_chart([{"variate": name, "contribution": 1.0} for name in NAMES])
    assert blamed.layout.yaxis.type == "category"
    assert blamed.layout.yaxis.ticktext[2] == "&lt;i&gt;x&lt;/i&gt; &amp; y"
    assert blamed.layout.autotypenumbers == "strict"
    values = pl.DataFrame({"time": times(3), "<b>": [1.0, 2.0, 3.0]})
    assert charts.series_chart(values, columns=["<b>"]).layout.annotations[0].text == "&lt;b&gt;"


def test_many_columns_are_all_told_apart_and_have_no_numbers() -> None:
    names = [f"sensor_number_{number:02d}_of_the_pressure" for number in range(50)]
    report = pl.DataFrame({"series_id": ["s"] * 50, "column": names, "null_share": [0.0] * 50})
    figure = charts.null_share_chart(report)
    assert figure.data[0].texttemplate is None, "cells are too narrow"
    assert len(set(figure.layout.xaxis.ticktext)) == 50
    assert figure.layout.xaxis.tickangle == -60
    short = charts.null_share_chart(report.with_columns(column=pl.lit("n" * 170)).head(1))
    assert len(short.layout.xaxis.ticktext[0]) <= 40


def test_a_value_between_two_gaps_is_a_dot(forecast: pl.DataFrame) -> None:
    lonely = [None, 1.0, None, 2.0, 3.0, float("nan"), 4.0]
    values = pl.DataFrame({"time": times(7), "value": lonely})
    scores = pl.DataFrame({"time": times(7), "score": lonely, "threshold": [3.0] * 7})
    events = pl.DataFrame(schema={"event_id": pl.String, "start": pl.Datetime, "end": pl.Datetime})
    for figure, lines in (
        (charts.fan_chart(values, forecast), 1),
        (charts.series_chart(values, columns=["value"]), 1),
        (charts.anomaly_timeline(values, scores, events), 2),
    ):
        dots = [trace for trace in figure.data if trace.mode == "markers"]
        assert [list(trace.y) for trace in dots] == [[1.0, 4.0]] * lines
        assert list(dots[0].x) == [times(7)[1], times(7)[6]]
        assert not any(trace.showlegend for trace in dots)


def test_a_constant_has_room_around_it_however_small() -> None:
    values = pl.DataFrame({"time": times(2), "tiny": [1e-6] * 2, "below": [-4.0] * 2, "zero": [0.0] * 2})
    layout = charts.series_chart(values, columns=["tiny", "below", "zero"]).layout
    assert list(layout.yaxis.range) == pytest.approx([5e-7, 1.5e-6])
    assert layout.yaxis.exponentformat == "power"
    assert list(layout.yaxis2.range) == [-6.0, -2.0]
    assert layout.yaxis3.range is None


def test_small_values_have_no_prefixes_on_any_chart(forecast: pl.DataFrame) -> None:
    numbers = pl.selectors.float()
    small = pl.DataFrame({"time": times(3), "value": [1e-5, 2e-5, 3e-5]})
    assert charts.fan_chart(small, forecast.with_columns(numbers * 1e-5)).layout.yaxis.exponentformat == "power"
    assert charts.fan_chart(small, forecast).layout.yaxis.exponentformat is None
    scores = pl.DataFrame({"time": times(3), "score": [1.0] * 3})
    events = pl.DataFrame(schema={"event_id": pl.String, "start": pl.Datetime, "end": pl.Datetime})
    assert charts.anomaly_timeline(small, scores, events).layout.yaxis.exponentformat == "power"


def test_a_cutoff_of_integer_time_is_marked(forecast: pl.DataFrame) -> None:
    counted = forecast.with_columns(cutoff=pl.lit(19), time=19 + pl.col("step"))
    history = pl.DataFrame({"time": [18, 19], "value": [1.0, 2.0]})
    assert charts.fan_chart(history, counted).layout.shapes[0].x0 == 19


def test_of_many_series_those_with_gaps_are_drawn() -> None:
    shares = {f"s{number:03d}": 0.001 * number if number % 2 else 0.0 for number in range(300)}
    report = pl.DataFrame({"series_id": list(shares), "column": ["x"] * 300, "null_share": list(shares.values())})
    drawn = charts.with_gaps(report)
    assert drawn["series_id"].to_list() == [f"s{number:03d}" for number in range(221, 300, 2)]
    assert charts.null_share_chart(drawn).layout.height >= 40 * 20, "a line of text for every name"
    assert charts.with_gaps(report.head(40)).height == 40
    assert charts.with_gaps(report.with_columns(null_share=0.0)).is_empty()


def test_a_single_row_stands_at_its_time() -> None:
    only = pl.DataFrame({"time": times(1), "a": [1.0], "b": [None]}, schema_overrides={"b": pl.Float64})
    figure = charts.series_chart(only, columns=["a", "b"])
    assert list(figure.layout.xaxis.tickvals) == list(figure.layout.xaxis2.tickvals) == times(1)
    assert figure.layout.xaxis.range == (times(1)[0] - timedelta(hours=12), times(1)[0] + timedelta(hours=12))
    assert charts.series_chart(only.vstack(only), columns=["a"]).layout.xaxis.tickvals is not None
    more = pl.DataFrame({"time": times(2), "a": [1.0, 2.0]})
    assert charts.series_chart(more, columns=["a"]).layout.xaxis.range is None


def test_a_long_name_beside_an_axis_keeps_both_ends(forecast: pl.DataFrame) -> None:
    name = "temperature_" + "x" * 80 + "_of_the_inlet"
    history = pl.DataFrame({"time": times(3), "value": [1.0, 2.0, 3.0]})
    title = charts.fan_chart(history, forecast, variate=name).layout.yaxis.title.text
    assert len(title) <= 40, "what is longer than the axis loses its beginning"
    assert (title[:11], title[-9:]) == ("temperature", "the_inlet")
