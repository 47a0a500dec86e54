"""Graphs among variates: what was counted, what a model made of it, who gives to whom in a forecast, what is stable."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from dashboards import graph_charts as charts
from dashboards.state import MINUTE, choose, empty, labels, page, table
from dashboards.text import code, plain
from dashboards.views.forecasts import Shown, choose_forecast
from tsforge.app import catalog, catalog_graphs
from tsforge.app.catalog_graphs import WEIGHTS
from tsforge.core.workspace import Workspace

_LAYERS = {"source": "source: before the recurrent nets", "target": "target: after them"}
_COMPARED = (
    ("similarity_before", "Alike before"),
    ("similarity_after", "Alike after"),
    ("change", "Change"),
)
_ENOUGH = 3  # seeds from which a spread says something


def show() -> None:
    """Draw the page."""
    page("Graphs", _draw, lead="How a model lets variates act on each other.")


def _draw(workspace: Workspace) -> None:
    found = catalog_graphs.list_graphs(workspace)
    if not found:
        empty("model with a graph", "tsforge fit data=nyc_weather model=regenn")
        return
    names = labels(found, lambda item: f"{item['model']} on {item['dataset']}, {item['created']:{MINUTE}}")
    left, right = st.columns([2, 1])
    damaged = catalog.damaged_artifacts(workspace)
    artifact = choose("Model", list(names), "artifact", names=names, where=left, damaged=damaged, lasting=True)
    layer = choose("Layer", list(_LAYERS), "layer", names=_LAYERS, where=right)
    st.warning(
        "Weights are not causes. They are determined only up to scale and sign, which the other layers take up, and a "
        "model with other weights may forecast as well: read what is stable over seeds, and nothing into a single fit.",
        icon=":material/warning:",
    )
    facts = catalog.artifact_facts(workspace, artifact)
    cells = catalog_graphs.graph_table(workspace, artifact)
    mine = cells.filter(pl.col("layer") == layer)
    _evolution(mine)
    _weights(mine)
    _epochs(catalog_graphs.graph_epochs(workspace, artifact).filter(layer=layer), facts)
    _stability(workspace, artifact, layer, facts)
    _forecast(facts)
    with st.expander("Table"):
        table(cells.drop("run"))
        st.download_button("Download CSV", cells.write_csv(), file_name=f"{artifact}-graphs.csv")


def _evolution(cells: pl.DataFrame) -> None:
    st.subheader("Before and after")
    st.caption(
        "The graph counts how much of a variate (row) there is while another one (column) is present. Two variates are "
        "alike (cosine, at most 1) where the graph treats them alike; learnt weights change who is alike to whom."
    )
    st.plotly_chart(
        charts.matrix_chart(
            cells.filter(matrix="co_occurrence"),
            title="Graph that the layer starts from",
            across="present",
            down="mass of",
        ),
        width="stretch",
        key="graph",
    )
    for column, (matrix, title) in zip(st.columns(3), _COMPARED, strict=True):
        column.plotly_chart(
            charts.matrix_chart(cells.filter(matrix=matrix), title=title, small=True),
            width="stretch",
            key=f"graph-{matrix}",
        )


def _weights(cells: pl.DataFrame) -> None:
    st.subheader("Evolution weights")
    weights = cells.filter(matrix=WEIGHTS)
    left, right = st.columns(2)
    left.plotly_chart(
        charts.matrix_chart(weights, across="gives", down="receives"), width="stretch", key="graph-weights"
    )
    least = right.slider("Arrows from this share of the largest weight on", 0.0, 1.0, 0.3, 0.05, key="choice-least")
    right.plotly_chart(charts.network_chart(weights, least=least), width="stretch", key="graph-network")
    own = pl.col("row") == pl.col("column")
    rows = weights.group_by("row", maintain_order=True).agg(
        pl.col("value").filter(own).first().alias("itself"), pl.col("value").filter(~own).sum().alias("others")
    )
    left.caption("What a variate takes from itself, and the sum of what it takes from others:")
    with left:
        table(rows, {"row": "variate", "itself": "from itself", "others": "from others"})


def _epochs(cells: pl.DataFrame, facts: dict[str, Any]) -> None:
    st.subheader("Over the epochs")
    if cells.is_empty():
        command = f"tsforge fit data={facts['dataset']} model={facts['model']} log_graphs=1"
        st.caption(
            "This fit stored the graphs of its final weights only. To see how they came about, fit with `log_graphs=1` "
            f"(after every epoch, or every so many), as in {code(command)}."
        )
        return
    weights = cells.filter(matrix=WEIGHTS)
    st.caption(
        f"Evolution weights after {weights['epoch'].n_unique()} epochs (from 0), those that moved most. The final "
        "weights are those of the best epoch, not of the last."
    )
    st.plotly_chart(charts.epochs_chart(weights), width="stretch", key="graph-epochs")


def _stability(workspace: Workspace, artifact: str, layer: str, facts: dict[str, Any]) -> None:
    st.subheader("Stability over seeds")
    runs = catalog_graphs.sibling_graphs(workspace, artifact)
    count = runs["run"].n_unique()
    if count < _ENOUGH:
        command = f"tsforge fit data={facts['dataset']} model={facts['model']} train.seed=1"
        st.caption(
            f"{count} seed(s) of this model are stored; {_ENOUGH} or more tell what is stable. Fit others with the "
            f"same settings and another `train.seed`, as in {code(command)}."
        )
        return
    found = catalog_graphs.graph_stability(runs).filter(layer=layer, matrix=WEIGHTS)
    st.caption(f"Evolution weights of {count} seeds of this model.")
    parts = (("mean", "Mean"), ("sd", "Standard deviation"), ("same_sign", "Share with the sign of the mean"))
    for column, (value, title) in zip(st.columns(3), parts, strict=True):
        column.plotly_chart(
            charts.matrix_chart(found, value=value, title=title, small=True), width="stretch", key=f"stability-{value}"
        )


def _forecast(facts: dict[str, Any]) -> None:
    st.subheader("In one forecast")
    shown = choose_forecast(facts, list(st.columns(2)))
    if shown is None or shown.live is None:
        return
    _shares(shown)
    mine = pl.col("variate") == shown.variate
    given = shown.live.contributions.filter(mine)
    if given["value"].abs().max() in (None, 0.0):
        st.caption(
            "The network adds nothing to this forecast: it is the autoregression alone. A fit keeps its start where "
            "training did not clearly improve on it."
        )
    else:
        st.caption(f"What each variate gives through the target layer to the network's part of {plain(shown.variate)}.")
        st.plotly_chart(
            charts.contributions_chart(given, variate=shown.variate), width="stretch", key="graph-contributions"
        )
    attention = shown.live.attention
    if not attention.is_empty():
        st.caption("Shares of what the encoder attends to, in this window: a row adds up to 1.")
        cells = attention.rename({"variate": "row", "source": "column"})
        figure = charts.matrix_chart(cells, value="share", across="attended to", down="for")
        st.plotly_chart(figure, width="stretch", key="graph-attention")


def _shares(shown: Shown) -> None:
    """Say how much of the forecast's move from its anchor each path makes."""
    if shown.parts is None:
        return
    sizes = {
        name: float(part["value"].abs().sum())
        for (name,), part in shown.parts.partition_by("component", as_dict=True).items()
        if name in ("autoregression", "network")
    }
    total = sum(sizes.values())
    if not total:
        return
    for column, (name, size) in zip(st.columns(4), sizes.items(), strict=False):
        column.metric(f"Share of the {name}", f"{size / total:.0%}")
