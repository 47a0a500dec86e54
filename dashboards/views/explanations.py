"""Why a forecast is what it is, and which inputs a model needs."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from dashboards import explanation_charts
from dashboards.explanation_charts import MOST, OTHERS
from dashboards.state import MINUTE, attribution, choose, empty, importance, labels, left_out, page, table
from dashboards.views.forecasts import Shown, choose_forecast
from tsforge.app import catalog
from tsforge.core.workspace import Workspace

_METHODS = {
    "auto": "Slopes of the model (exact where it is linear)",
    "occlusion": "Hiding blocks of rows one by one",
}
_EXPLAINED = {
    "exact": "The forecast is linear along the way from the baseline, so the parts are exact and add up.",
    "integrated_gradients": "Mean slope on the way from the baseline (integrated gradients); the parts add up.",
    "occlusion": "Change of the forecast when a block of rows is put at its level; blocks interact, so a remainder is "
    "left.",
}
_ALL = "mean of all steps"


def show() -> None:
    """Draw the page."""
    page("Explanations", _draw, lead="What a forecast rests on: which variates, and how long ago.")


def _draw(workspace: Workspace) -> None:
    artifacts = catalog.list_artifacts(workspace)
    damaged = catalog.damaged_artifacts(workspace)
    left_out(damaged, "Fit them again.")
    if not artifacts:
        empty("fitted model", "tsforge ingest data=nyc_weather\ntsforge fit data=nyc_weather model=ar_net")
        return
    columns = st.columns([2, 1, 1])
    names = labels(artifacts, lambda item: f"{item['model']} on {item['dataset']}, {item['created']:{MINUTE}}")
    artifact = choose("Model", list(names), "artifact", names=names, where=columns[0], damaged=damaged, lasting=True)
    facts = catalog.artifact_facts(workspace, artifact)
    shown = choose_forecast(facts, columns[1:])
    if shown is not None:
        _forecast(facts, shown)
    _importance(facts)


def _forecast(facts: dict[str, Any], shown: Shown) -> None:
    st.subheader("In this forecast")
    left, right = st.columns(2)
    method = choose("Parts by", list(_METHODS), "method", names=_METHODS, where=left)
    steps = [_ALL, *map(str, range(1, shown.forecast.height + 1))]
    step = choose("Step ahead", steps, "step", where=right)
    chosen = None if step == _ALL else (int(step),)
    found = attribution(
        facts["id"], facts["dataset"], shown.forecast["series_id"][0], shown.variate, shown.forecast["cutoff"][0],
        chosen, method, max(1, facts["context_length"] // 48),
    )  # fmt: skip
    st.caption(
        f"{_EXPLAINED[found.metadata['method']]} The baseline is a forecast from a window in which every variate stays "
        "at its mean, and covariates at theirs. Parts say what the model used, not what causes what."
    )
    inputs = _labelled(found.table.filter(~pl.col("kind").is_in(["baseline", "remainder", "component"])), facts)
    count = found.table["step"].n_unique()
    sums = inputs.group_by("label", maintain_order=True).agg(
        pl.col("contribution").sum() / count, pl.col("contribution").abs().sum().alias("size")
    )
    ordered = sums.sort("size", descending=True, maintain_order=True)
    if ordered["size"].max() in (None, 0.0):
        st.caption("Nothing moves this forecast: it is that of the baseline.")
        return
    top = ordered.head(MOST)
    drawn = top.select("label", "contribution")
    if ordered.height > MOST:
        rest = pl.DataFrame({"label": [OTHERS], "contribution": [float(ordered["contribution"][MOST:].sum())]})
        drawn = pl.concat([drawn, rest])
    baseline = float(found.table.filter(kind="baseline")["contribution"].to_numpy().mean())
    ahead = shown.forecast if chosen is None else shown.forecast.filter(pl.col("step").is_in(chosen))
    forecast = float(ahead["mean"].to_numpy().mean())
    st.plotly_chart(
        explanation_charts.waterfall_chart(drawn, baseline=baseline, forecast=forecast, variate=shown.variate),
        width="stretch",
        key="explain-waterfall",
    )
    placed = inputs.filter(pl.col("source_time").is_not_null(), pl.col("label").is_in(top["label"].implode()))
    if placed.height:
        st.caption("When the parts come from; blue raises the forecast, red lowers it.")
        cells = placed.group_by("label", "source_time").agg(pl.col("contribution").sum() / count)
        order = pl.DataFrame({"label": top["label"], "place": range(top.height)})
        cells = cells.join(order, on="label").sort("place", "source_time")
        st.plotly_chart(explanation_charts.lags_chart(cells), width="stretch", key="explain-lags")
    with st.expander("Table"):
        table(found.by_source(), {"kind": "kind", "source_series": "series", "source": "input",
                                  "contribution": "contribution", "size": "size", "share": "share"},
              percentages=("share",))  # fmt: skip
        name = f"{facts['id']}-{shown.variate}-explained.csv"
        st.download_button("Download every part (CSV)", found.table.write_csv(), file_name=name)


def _labelled(cells: pl.DataFrame, facts: dict[str, Any]) -> pl.DataFrame:
    """Return the cells with a readable ``label``: the input, its series where several take part."""
    several = cells["source_series"].n_unique() > 1
    label = pl.format("{} of {}", "source", "source_series") if several else pl.col("source")
    return cells.with_columns(label.alias("label"))


def _importance(facts: dict[str, Any]) -> None:
    st.subheader("Over many forecasts")
    st.caption(
        "How much the mean absolute error grows over windows that the fit has not seen when an input is exchanged "
        "between windows. Of a variate only the moves about its mean are exchanged."
    )
    if not st.button("Measure", key="measure-importance", help="Forecasts some hundred windows for every input."):
        return
    found = importance(facts["id"], facts["dataset"])
    whole = found.table.filter(variate="*")
    named = whole.with_columns(pl.col("source").alias("label"))
    st.plotly_chart(explanation_charts.importance_chart(named), width="stretch", key="explain-importance")
    st.caption(f"{found.metadata['windows']:,} windows of the {found.metadata['rows']} span, "
               f"{found.metadata['repeats']} exchanges of each input.")  # fmt: skip
    with st.expander("By variate"):
        table(found.table.filter(pl.col("variate") != "*"), percentages=("importance", "sd"))
