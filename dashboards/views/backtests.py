"""Backtest leaderboard: models against the naive forecasts, overall, by step, regime and series; what is chance."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import backtest_charts, quality_charts
from dashboards.state import MINUTE, backtest, choose, empty, labels, left_out, page, table
from dashboards.style import place_map
from dashboards.text import plain
from tsforge.app import catalog_results
from tsforge.app.catalog_results import StoredBacktest
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace

_NAMES = {
    "mase": "MASE",
    "mae": "MAE",
    "rmse": "RMSE",
    "mse": "MSE",
    "smape": "sMAPE",
    "wql": "weighted quantile loss",
    "crps": "CRPS",
}
_ERRORS = {"model": "model", "mean_rank": "mean rank", **_NAMES, "wql": "WQL"}
_TESTS = {
    "model": "model",
    "difference": "difference",
    "dm_statistic": "DM statistic",
    "dm_p": "p (DM)",
    "dm_p_holm": "p (DM), Holm",
    "cutoffs": "cutoffs",
    "wilcoxon_p": "p (Wilcoxon)",
    "wilcoxon_p_holm": "p (Wilcoxon), Holm",
    "units": "units",
}
_RANKS = {
    "skill_mae": "MAE skill",
    "win_share": "wins",
    "p_dm": "p (DM)",
    "p_wilcoxon": "p (Wilcoxon)",
    "fit_seconds": "fit s",
    "predict_seconds": "predict s",
}


def show() -> None:
    """Draw the page."""
    page("Backtests", _draw, lead="Forecasts from rolling cutoffs of the past, graded beside the naive forecasts.")


def _draw(workspace: Workspace) -> None:
    backtests = catalog_results.list_backtests(workspace)
    damaged = catalog_results.damaged_reports(workspace, catalog_results.BACKTESTS)
    left_out(damaged, "Run `tsforge backtest` again.")
    if not backtests:
        empty("backtest", "tsforge backtest data=nyc_weather model=ar_net")
        return
    names = labels(backtests, lambda item: f"{item['dataset']}, {item['model']}, {item['created']:{MINUTE}}")
    left, right = st.columns([2, 1])
    chosen = choose("Backtest", list(names), "backtest", names=names, where=left, damaged=damaged, lasting=True)
    report = backtest(chosen)
    if report.summary.is_empty() or not report.metrics:
        raise BackendError(f"backtest '{chosen}' is damaged: its leaderboard is empty; run tsforge backtest again")
    metric_names = {name: _metric_name(name) for name in report.metrics}
    metric = choose("Metric", list(report.metrics), "metric", names=metric_names, where=right)
    _verdict(report, metric)
    left, right = st.columns(2)
    left.plotly_chart(
        backtest_charts.leaderboard_chart(report.summary, metric=metric, name=metric_names[metric]),
        width="stretch",
        key="leaderboard",
    )
    steps = backtest_charts.error_by_step(
        report.by_step, metric=metric, name=metric_names[metric], places=_places(report)
    )
    right.plotly_chart(steps, width="stretch", key="by-step")
    st.subheader("All metrics")
    intervals = {
        name: f"inside {name.removeprefix('coverage_')} %"
        for name in report.summary.columns
        if name.startswith("coverage_")
    }
    shares = (*intervals, "win_share", "skill_mae")
    table(report.summary, {**_ERRORS, **intervals, **_RANKS}, percentages=shares)
    st.caption(
        f"Skill is 1 - error / error of {plain(report.metadata['reference'])}; ranks and wins count series, variates "
        "and cutoffs; p-values are against the reference, adjusted for the number of models (Holm)."
    )
    _tests(report)
    _calibration(report)
    _by_regime(report, metric)
    _worst_series(report, metric)
    for note in report.metadata["notes"]:
        st.info(plain(note))
    with st.expander("How this was measured"):
        st.json(report.metadata, expanded=1)


def _places(report: StoredBacktest) -> dict[str, int]:
    return place_map(report.summary["model"])


def _metric_name(name: str) -> str:
    return _NAMES.get(name) or f"scaled interval score {name.removeprefix('msis_')} %"


def _verdict(report: StoredBacktest, metric: str) -> None:
    """Say when the model is no better than doing next to nothing."""
    model, naive = report.metadata["model"], report.metadata["baselines"]
    scores = dict(report.summary.select("model", metric).iter_rows())
    own = scores.get(model)
    rivals = {name: scores[name] for name in naive if name != model and scores.get(name) is not None}
    if own is None or not rivals:
        return
    best = min(rivals, key=lambda name: rivals[name])
    if own >= rivals[best]:
        st.warning(
            f"{plain(model)} does not beat {plain(best)} on {_metric_name(metric)}: {own:.4g} against "
            f"{rivals[best]:.4g}.",
            icon=":material/trending_down:",
        )


def _tests(report: StoredBacktest) -> None:
    """Show every model against the reference and against the best one."""
    st.subheader("More than chance?")
    if report.tests.is_empty():
        st.info("There is only one model in this backtest, so there is nothing to hold it against.")
        return
    facts = report.metadata["comparison"]
    others = report.tests["against"].unique(maintain_order=True).to_list()
    kinds = {name: "the reference" if name == report.metadata["reference"] else "the best model" for name in others}
    for name in others:
        st.markdown(f"Against {plain(name)}, {kinds[name]}")
        table(report.tests.filter(pl.col("against") == name), _TESTS)
    st.caption(
        f"Difference in {facts['loss']}, negative is better. Diebold-Mariano over cutoffs, Wilcoxon over units "
        f"({facts['unit']}); Holm corrects for the number of models. The best model was chosen by the same data."
    )


def _calibration(report: StoredBacktest) -> None:
    """Show where observed values fell in the forecast distributions of a model."""
    st.subheader("Calibration")
    models = report.pit["model"].unique(maintain_order=True).to_list()
    if not models:
        st.info("These forecasts have no quantiles, so there is nothing to calibrate.")
        return
    model = choose("Forecasts of", models, "calibrated")
    st.caption(
        "How often observed values fell between neighbouring quantiles, against how often they should have (1). "
        "A hump: intervals too wide; high ends: too narrow; a slope: biased."
    )
    figure = quality_charts.pit_chart(report.pit.filter(pl.col("model") == model))
    st.plotly_chart(figure, width="stretch", key="pit")
    joint = report.summary.filter(pl.col("model") == model)
    if "energy" in joint.columns and joint["energy"][0] is not None:
        gain = _gain(joint["energy"][0], joint["energy_apart"][0])
        st.caption(
            f"Energy score of its sample paths {joint['energy'][0]:.4g}, {gain} independent "
            f"steps; variogram score {joint['variogram'][0]:.4g} against {joint['variogram_apart'][0]:.4g}."
        )


def _gain(error: float, other: float) -> str:
    """Return how an error compares with another in words, to a tenth of a percent."""
    share = round(100 * (1.0 - error / other), 1)
    return "the same as with" if share == 0.0 else f"{abs(share)} % {'better' if share > 0.0 else 'worse'} than with"


def _by_regime(report: StoredBacktest, metric: str) -> None:
    """Show the errors in each regime of the kind chosen."""
    st.subheader("By regime")
    kinds = report.regimes["kind"].unique(maintain_order=True).to_list()
    if not kinds:
        st.info("This backtest was not broken down by regimes; `backtest.regimes=[volatility,level,hour]` does.")
        return
    kind = choose("Regime", kinds, "regime")
    rows = report.regimes.filter(pl.col("kind") == kind)
    figure = backtest_charts.regime_chart(rows, metric=metric, name=_metric_name(metric), places=_places(report))
    st.plotly_chart(figure, width="stretch", key="by-regime")
    wide = rows.pivot(on="model", index="regime", values=metric, maintain_order=True)
    cells = rows.filter(pl.col("model") == report.metadata["model"]).select("regime", "count")
    headings = {"regime": kind, "count": "cells"} | {name: name for name in rows["model"].unique(maintain_order=True)}
    table(cells.join(wide, on="regime", maintain_order="left"), headings, integers=("count",))


def _worst_series(report: StoredBacktest, metric: str) -> None:
    """Show the series by the skill of our model against the reference, the worst on top."""
    st.subheader("By series, worst first")
    model, reference = report.metadata["model"], report.metadata["reference"]
    worst, skill = report.worst[metric], f"skill_{metric}"
    if model == reference or not worst[skill].count():
        why = "it is the reference itself" if model == reference else f"{reference} makes no error here"
        st.info(f"{plain(model)} has no skill to order series by: {plain(why)}.")
    else:
        lost = int((worst[skill] < -backtest_charts.ROUNDING).sum())
        st.caption(f"{plain(model)} is worse than {plain(reference)} on {lost} of {worst.height} series.")
        figure = backtest_charts.skill_chart(worst, skill=skill, reference=reference)
        st.plotly_chart(figure, width="stretch", key="worst-series")
    headings = {
        "series_id": "series",
        "count": "cells",
        metric: model,
        f"reference_{metric}": reference,
        skill: "skill",
    }
    table(worst, headings, integers=("count",), percentages=(skill,))
