"""Charts of a backtest show every regime and the worst series first."""

from __future__ import annotations

import polars as pl

from dashboards import backtest_charts
from dashboards.style import ALARM, OBSERVED, place_map


def test_skill_chart_puts_the_worst_on_top_and_colours_losses() -> None:
    names = [f"a_series_with_a_rather_long_name_{number:02d}" for number in range(20)]
    worst = pl.DataFrame({"series_id": names, "skill_mae": [-0.5 + 0.1 * number for number in range(19)] + [None]})
    figure = backtest_charts.skill_chart(worst, skill="skill_mae", reference="seasonal_naive")
    bars = figure.data[0]
    assert list(bars.y) == names[14::-1]  # the last bar drawn is on top
    assert bars.x[-1] == -0.5
    assert list(bars.marker.color) == [ALARM if value < 0 else OBSERVED for value in bars.x]
    assert "15 worst of 19" in figure.layout.title.text
    assert all(len(tick) <= 23 for tick in figure.layout.yaxis.ticktext)


def test_rounding_is_no_loss() -> None:
    worst = pl.DataFrame({"series_id": ["a", "b"], "skill_mae": [-1e-3, -1e-12]})
    bars = backtest_charts.skill_chart(worst, skill="skill_mae", reference="drift").data[0]
    assert list(bars.marker.color) == [OBSERVED, ALARM]


def test_regime_chart_has_a_bar_for_every_model_and_regime() -> None:
    regimes = pl.DataFrame(
        {"model": ["m", "m", "n", "n"], "regime": ["1", "2", "1", "2"], "mae": [0.5, None, 0.7, 0.8]}
    )
    figure = backtest_charts.regime_chart(regimes, metric="mae", name="MAE")
    assert [trace.name for trace in figure.data] == ["m", "n"]
    assert list(figure.data[0].y) == [0.5, None]
    assert figure.layout.xaxis.type == "category"  # codes are names
    assert figure.layout.yaxis.title.text == "MAE"


def test_a_model_has_one_look_on_all_charts_of_a_report_and_no_two_have_the_same() -> None:
    models = [f"m{number:02d}" for number in range(20)]
    places = place_map(models)
    steps = pl.DataFrame({"model": models[::-1], "step": [1] * 20, "mae": [0.2] * 20})
    regimes = pl.DataFrame({"model": models, "regime": ["1"] * 20, "mae": [0.5] * 20})
    lines = backtest_charts.error_by_step(steps, metric="mae", places=places)
    bars = backtest_charts.regime_chart(regimes, metric="mae", places=places)
    drawn = {trace.name: (trace.line.color, trace.line.dash) for trace in lines.data}
    assert len(set(drawn.values())) == 20
    assert {dash for _, dash in list(drawn.values())[-8:]} == {"solid"}, "eight colours are enough for eight"
    filled = {trace.name: (trace.marker.color, trace.marker.pattern.shape) for trace in bars.data}
    assert len(set(filled.values())) == 20
    assert {name: colour for name, (colour, _) in filled.items()} == {name: look[0] for name, look in drawn.items()}
