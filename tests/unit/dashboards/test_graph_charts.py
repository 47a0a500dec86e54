"""Charts of graphs among variates say what the tables say."""

from __future__ import annotations

import polars as pl
import pytest

from dashboards import graph_charts as charts


def cells(rows: list[list[float]], names: str = "abc") -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"row": names[i], "column": names[j], "value": value}
            for i, row in enumerate(rows)
            for j, value in enumerate(row)
        ]
    )


def test_matrix_keeps_rows_columns_and_signs() -> None:
    figure = charts.matrix_chart(cells([[1.0, -2.0], [0.001, 0.5]]), across="gives", down="receives")
    (heat,) = figure.data
    assert [list(row) for row in heat.z] == [[1.0, -2.0], [0.001, 0.5]]
    assert [list(row) for row in heat.text] == [["1", "-2"], ["0", "0.5"]]
    assert (heat.zmin, heat.zmax) == (-2.0, 2.0)  # 0 has the middle colour
    assert (heat.colorscale[1][0], len(heat.colorscale)) == (0.5, 3)
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    assert figure.layout.yaxis.autorange == "reversed"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("gives", "receives")


def test_matrix_without_a_sign_starts_at_nothing_and_small_ones_have_no_scale() -> None:
    figure = charts.matrix_chart(cells([[1.0, 4.0], [0.0, 2.0]]), small=True)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0.0, 4.0)
    assert figure.data[0].showscale is False
    blank = charts.matrix_chart(cells([[0.0, 0.0], [0.0, 0.0]]))
    assert blank.data[0].zmax == 1.0
    names = [f"variate_{i}" for i in range(20)]
    many = pl.DataFrame([{"row": a, "column": b, "value": 1.0} for a in names for b in names])
    assert charts.matrix_chart(many).data[0].texttemplate is None


def test_network_draws_arrows_from_giver_to_receiver_above_the_threshold() -> None:
    weights = cells([[9.0, 1.0, -0.2], [0.0, 9.0, 0.6], [0.0, 0.0, 9.0]])  # row receives, column gives
    figure = charts.network_chart(weights, least=0.5)
    places = {text: (x, y) for text, x, y in zip(figure.data[0].text, figure.data[0].x, figure.data[0].y, strict=True)}
    arrows = figure.layout.annotations
    assert len(arrows) == 2  # what a variate gives itself is no arrow
    widest = max(arrows, key=lambda arrow: arrow.arrowwidth)
    for (x, y), name in (((widest.ax, widest.ay), "b"), ((widest.x, widest.y), "a")):
        assert (x - places[name][0]) ** 2 + (y - places[name][1]) ** 2 < 0.05
    assert len(charts.network_chart(weights, least=0.1).layout.annotations) == 3
    red = min(charts.network_chart(weights, least=0.1).layout.annotations, key=lambda arrow: arrow.arrowwidth)
    assert red.arrowcolor != widest.arrowcolor
    assert not charts.network_chart(cells([[1.0, 0.0], [0.0, 1.0]]), least=0.0).layout.annotations


def test_contributions_are_stacked_and_their_sum_is_drawn() -> None:
    table = pl.DataFrame({"time": [1, 2, 1, 2], "source": ["a", "a", "b", "b"], "value": [1.0, 2.0, -3.0, 4.0]})
    figure = charts.contributions_chart(table, variate="b")
    assert [trace.name for trace in figure.data] == ["a", "b (itself)", "network, whole"]
    assert list(figure.data[2].y) == pytest.approx([-2.0, 6.0])
    assert figure.layout.barmode == "relative"


def test_kernel_has_lags_across_and_steps_down() -> None:
    kernel = pl.DataFrame(
        {"lag": [2, 2, 0, 0, 1, 1], "step": [1, 2, 1, 2, 1, 2], "weight": [0.2, 0.4, 1.0, -3.0, 0.1, 0.3]}
    )
    (heat,) = charts.kernel_chart(kernel).data
    assert list(heat.x) == [2, 1, 0]
    assert [list(row) for row in heat.z] == [[0.2, 0.1, 1.0], [0.4, 0.3, -3.0]]
    assert heat.zmax == 3.0


def test_epochs_are_lines_of_the_cells_that_moved_most() -> None:
    values = {("a", "b"): [0.0, 1.0, 5.0], ("b", "a"): [2.0, 2.5, 2.0], ("b", "b"): [3.0, -1.0, -4.0]}
    table = pl.DataFrame(
        [
            {"epoch": epoch, "row": row, "column": column, "value": found[place]}
            for place, epoch in ((2, 8), (0, 0), (1, 4))
            for (row, column), found in values.items()
        ]
    )
    figure = charts.epochs_chart(table, most=2)
    assert [trace.name for trace in figure.data] == ["b from itself", "a from b"]
    assert list(figure.data[1].x) == [0, 4, 8]
    assert list(figure.data[1].y) == [0.0, 1.0, 5.0]
    assert len(charts.epochs_chart(table).data) == 3


def test_every_column_of_a_matrix_is_named_however_narrow_it_is() -> None:
    names = ["temp", "dewp", "humid", "wind_speed"]
    table = pl.DataFrame([{"row": a, "column": b, "value": 1.0} for a in names for b in names])
    for small in (False, True):
        figure = charts.matrix_chart(table, small=small)
        axis = figure.layout.xaxis
        assert list(axis.ticktext) == names
        assert axis.ticklabeloverflow == "allow"
        assert axis.automargin
        assert (axis.tickangle == -60) == small
        assert figure.data[0].textfont.size is None, "numbers shrink with their cells"
    wide = pl.DataFrame([{"row": a, "column": b, "value": 1.0} for a in "abcdefg" for b in "abcdefg"])
    assert charts.matrix_chart(wide).data[0].texttemplate is not None
    assert charts.matrix_chart(wide, small=True).data[0].texttemplate is None


def test_tags_in_names_are_text() -> None:
    table = pl.DataFrame([{"row": a, "column": b, "value": 1.0} for a in ("<b>", "y") for b in ("<b>", "y")])
    figure = charts.matrix_chart(table)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "y"]
    assert list(figure.data[0].customdata[0][1]) == ["&lt;b&gt;", "y"]
    assert list(charts.network_chart(table, least=0.5).data[0].text) == ["&lt;b&gt;", "y"]
