"""Charts of the triage page: panels and their order, what is shaded, bars, the alarm rate beside the nominal one."""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl

from dashboards import triage_charts

START = datetime(2024, 1, 1)
TIMES = [START + timedelta(hours=hour) for hour in range(4)]
EVENT = {"start": TIMES[1], "end": TIMES[2]}


def values(*names: str, **changes: list[float | None]) -> pl.DataFrame:
    columns = {"value": [1.0, 2.0, 3.0, 4.0], "expected": [1.0] * 4, "low": [0.5] * 4, "high": [1.5] * 4, **changes}
    return pl.concat([pl.DataFrame({"time": TIMES, "variate": name, **columns}) for name in names])


def scores(*given: float) -> pl.DataFrame:
    return pl.DataFrame({"time": TIMES, "score": given or (1.0, 2.0, 9.0, 1.0), "threshold": 3.0})


def test_every_variate_has_a_panel_in_the_given_order_above_the_score() -> None:
    figure = triage_charts.event_chart(values("wind", "temp"), scores(), EVENT)
    assert [note.text for note in figure.layout.annotations] == ["wind", "temp", "score"]
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["usual (99 % of quiet rows)", "expected", "observed", "score", "threshold"], "each once"
    assert list(figure.data[3].y) == [1.0, 2.0, 3.0, 4.0]
    band = next(trace for trace in figure.data if trace.fill == "tonexty")
    assert list(band.y) == [1.5] * 4
    assert list(figure.data[0].y) == [0.5] * 4, "the band is filled down to the lower bound"


def test_the_event_is_red_and_others_are_not() -> None:
    others = pl.DataFrame({"start": [TIMES[3]], "end": [TIMES[3]]})
    figure = triage_charts.event_chart(values("temp"), scores(), EVENT, others)
    shaded = {(shape.x0, shape.x1): shape.line.color for shape in figure.layout.shapes}
    assert shaded == {(TIMES[1], TIMES[2]): triage_charts.ALARM, (TIMES[3], TIMES[3]): triage_charts.ACCENT}
    assert all(shape.line.width > 0 for shape in figure.layout.shapes), "one row has no width of its own"


def test_stored_values_alone_have_neither_score_nor_expectation() -> None:
    plain = values("temp").select("time", "variate", "value")
    figure = triage_charts.event_chart(plain, scores().clear(), EVENT)
    assert [trace.name for trace in figure.data] == ["observed"]
    assert [note.text for note in figure.layout.annotations] == ["temp"]


def test_gaps_stay_gaps_and_an_extreme_score_is_logarithmic() -> None:
    figure = triage_charts.event_chart(values("temp", value=[1.0, None, 3.0, 4.0]), scores(1.0, 1.0, 900.0, 1.0), EVENT)
    observed = next(trace for trace in figure.data if trace.name == "observed")
    assert list(observed.y) == [1.0, None, 3.0, 4.0]
    assert not observed.connectgaps
    assert figure.layout.yaxis2.type == "log"
    assert triage_charts.event_chart(values("temp"), scores(), EVENT).layout.yaxis2.type is None


def test_the_strongest_variates_are_on_top_with_what_the_others_say() -> None:
    ranked = [{"variate": f"v{rank}", "contribution": 9.0 - rank, "conditional": 4.0 * rank} for rank in range(9)]
    bars, points = triage_charts.contribution_chart(ranked, shown=3).data
    assert (list(bars.y), list(bars.x)) == (["v2", "v1", "v0"], [7.0, 8.0, 9.0])
    assert list(points.x) == [8.0**0.5, 2.0, 0.0]
    unknown = [{"variate": "a", "contribution": 2.0, "conditional": None}]
    assert len(triage_charts.contribution_chart(unknown).data) == 1


def history(**rates: list[float]) -> pl.DataFrame:
    parts = [
        pl.DataFrame({"series_id": name, "time": TIMES, "rate": rate, "ratio": [value * 100 for value in rate]})
        for name, rate in rates.items()
    ]
    return pl.concat(parts)


def test_health_shows_the_worst_series_beside_the_nominal_rate_and_the_bound() -> None:
    table = history(calm=[0.01] * 4, drifting=[0.01, 0.02, 0.05, 0.2], loud=[0.3, 0.2, 0.1, 0.05])
    figure = triage_charts.health_chart(table, bound=5.0, shown=2)
    assert [trace.name for trace in figure.data] == ["drifting", "loud"], "the worst by now, not ever"
    assert list(figure.data[0].y) == [1.0, 2.0, 5.0, 20.0]
    assert [shape.y0 for shape in figure.layout.shapes] == [1.0, 5.0]


def test_health_of_a_rule_without_a_nominal_rate_is_the_rate_itself() -> None:
    table = history(a=[0.1] * 4).with_columns(ratio=pl.lit(None, dtype=pl.Float64))
    figure = triage_charts.health_chart(table, bound=5.0)
    assert list(figure.data[0].y) == [0.1] * 4
    assert not figure.layout.shapes


def test_long_names_are_short_in_the_legend_and_words_stand_beside_the_lines() -> None:
    names = [f"plant_north_line_{letter}_pump_07_vibration_in_mm_per_s" for letter in "AB"]
    figure = triage_charts.health_chart(history(**{name: [0.1] * 4 for name in names}), bound=5.0)
    shown = [trace.name for trace in figure.data]
    assert len(set(shown)) == 2
    assert max(map(len, shown)) <= 40
    assert {(note.text, note.x, note.xanchor) for note in figure.layout.annotations} == {
        ("nominal", 1, "left"),
        ("stale above", 1, "left"),
    }
    assert figure.layout.margin.r > 80


def test_variates_named_like_numbers_have_their_bars() -> None:
    ranked = [{"variate": name, "contribution": 1.0, "conditional": 1.0} for name in ("40", "<i>2</i>")]
    axis = triage_charts.contribution_chart(ranked).layout.yaxis
    assert (axis.type, list(axis.ticktext)) == ("category", ["&lt;i&gt;2&lt;/i&gt;", "40"])


def test_a_lonely_observation_of_an_event_is_a_dot_and_tiny_values_have_no_prefix() -> None:
    table = values("temp", value=[1e-5, None, 2e-5, None]).select("time", "variate", "value")
    figure = triage_charts.event_chart(table, scores().clear(), EVENT)
    (dots,) = (trace for trace in figure.data if trace.mode == "markers")
    assert list(dots.y) == [1e-5, 2e-5]
    assert figure.layout.yaxis.exponentformat == "power"
