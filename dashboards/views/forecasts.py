"""Forecast explorer: history, fan chart, what happened since, and the parts a forecast is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import polars as pl
import streamlit as st

from dashboards import address, charts, graph_charts, model_charts, quality_charts
from dashboards.state import (
    MINUTE,
    choose,
    empty,
    flag,
    labels,
    left_out,
    live_forecast,
    live_paths,
    moment,
    page,
    series_table,
    table,
    warn_of_link,
)
from dashboards.text import plain
from tsforge.app import catalog, catalog_results
from tsforge.core.workspace import Workspace

if TYPE_CHECKING:
    from tsforge.app.catalog_live import LiveForecast

LIVE, PUBLISHED = "on demand", "published"
_SOURCES = {LIVE: "Fitted model, any cutoff", PUBLISHED: "Published by a batch"}
_FURTHEST = 1440  # steps that the slider reaches back
_PATHS, _LINES = 1000, 30  # sample paths behind a total, and in the chart


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a page draws: one series and variate of a forecast, its parts, the stored rows, a name for files.

    ``live`` is the whole answer of the model, None for a published forecast; ``paths`` are sample paths, if asked for.
    """

    forecast: pl.DataFrame
    parts: pl.DataFrame | None
    rows: pl.DataFrame
    variate: str
    name: str
    live: LiveForecast | None = None
    paths: pl.DataFrame | None = None


def show() -> None:
    """Draw the page."""
    page("Forecasts", _draw, lead="What a model says, what happened then, and what the forecast is made of.")


def _draw(workspace: Workspace) -> None:
    artifacts = catalog.list_artifacts(workspace)
    published = catalog_results.list_forecasts(workspace)
    damaged = catalog.damaged_artifacts(workspace)
    left_out(damaged, "Fit them again.")
    if not artifacts and not published:
        empty("fitted model", "tsforge ingest data=nyc_weather\ntsforge fit data=nyc_weather model=ar_net")
        return
    columns = st.columns([1.2, 2, 1, 1])
    sources = [name for name, found in ((LIVE, artifacts), (PUBLISHED, published)) if found]
    source = choose("Source", sources, "source", names=_SOURCES, where=columns[0], lasting=True)
    if source == LIVE:
        shown = _live(workspace, artifacts, damaged, columns[1:])
    else:
        shown = _published(workspace, published, columns[1:])
    if shown is None:
        return
    _fan(shown)
    _parts(shown)
    with st.expander("Table"):
        table(shown.forecast.select(pl.exclude("series_id", "variate")))
        st.download_button("Download CSV", shown.forecast.write_csv(), file_name=f"{shown.name}.csv")
    if source == LIVE:
        _explanation(catalog.artifact_facts(workspace, address.get("artifact")), shown.variate)


def _live(
    workspace: Workspace, artifacts: list[dict[str, Any]], damaged: dict[str, str], where: list[Any]
) -> Shown | None:
    """Return the forecast of a chosen model from a chosen cutoff, None when the series is too short."""
    names = labels(artifacts, lambda item: f"{item['model']} on {item['dataset']}, {item['created']:{MINUTE}}")
    artifact = choose("Model", list(names), "artifact", names=names, where=where[0], damaged=damaged, lasting=True)
    facts = catalog.artifact_facts(workspace, artifact)
    shown = choose_forecast(facts, where[1:])
    if shown is None or not facts["paths"] or not flag("Sample paths", "paths"):
        return shown
    first = shown.forecast.row(0, named=True)
    paths = live_paths(artifact, facts["dataset"], first["series_id"], first["cutoff"], _PATHS)
    return replace(shown, paths=paths.filter(pl.col("variate") == shown.variate))


def choose_forecast(facts: dict[str, Any], where: list[Any]) -> Shown | None:
    """Return the forecast of a model for a series, variate and cutoff that the user chooses.

    Args:
        facts: of the model, from ``catalog.artifact_facts``.
        where: columns for series and variate.
    """
    artifact = facts["id"]
    series = choose("Series", facts["series"], "series", where=where[0])
    variate = choose("Variate", facts["variates"], "variate", where=where[1])
    rows = series_table(facts["dataset"], series, artifact=artifact)
    times = _cutoffs(rows, facts, variate)
    if times.is_empty():
        seen = rows[variate].count() if variate in rows.columns else 0
        st.warning(
            f"{plain(series)} has {seen} observed rows of {plain(variate)}; "
            f"this model reads {facts['context_length']} rows"
            + (f" and {facts['horizon']} of its known covariates ahead." if facts["known"] else ".")
        )
        return None
    cutoff = _choose_cutoff(times)
    found = live_forecast(artifact, facts["dataset"], series, cutoff)
    mine = pl.col("variate") == variate
    name = f"{artifact}-{series}-{variate}"
    return Shown(
        forecast=found.table.filter(mine),
        parts=found.components.filter(mine),
        rows=rows,
        variate=variate,
        name=name,
        live=found,
    )


def _published(workspace: Workspace, published: list[dict[str, Any]], where: list[Any]) -> Shown:
    """Return the chosen published forecast."""
    names = labels(published, lambda item: f"{item['source'].removeprefix('batch ')} ({item['model']})")
    records = {item["id"]: item for item in published}
    batch = choose("Batch", list(records), "batch", names=names, where=where[0], lasting=True)
    found = catalog_results.load_forecast(workspace, batch)
    series = choose("Series", found["series_id"].unique(maintain_order=True).to_list(), "series", where=where[1])
    variate = choose("Variate", found["variate"].unique(maintain_order=True).to_list(), "variate", where=where[2])
    forecast = found.filter(pl.col("series_id") == series, pl.col("variate") == variate)
    st.caption(f"Published {moment(records[batch]['created'])} UTC; cutoff **{moment(forecast['cutoff'][0])}**.")
    rows = series_table(records[batch]["dataset"], series)
    return Shown(forecast=forecast, parts=None, rows=rows, variate=variate, name=f"{batch}-{series}-{variate}")


def _cutoffs(rows: pl.DataFrame, facts: dict[str, Any], variate: str) -> pl.Series:
    """Return the times to forecast from: enough history before, known covariates of the data over the horizon."""
    if variate not in rows.columns:
        return rows["time"].clear()
    times = rows.filter(pl.col(variate).is_not_null())["time"][facts["context_length"] :]
    known = [name for name in facts["known"] if name in rows.columns]  # calendar features are made as needed
    if known:
        given = rows.filter(pl.all_horizontal(pl.col(known).is_not_null()))["time"][: -facts["horizon"]]
        times = times.filter(times <= given.max()) if given.len() else times.clear()
    return times


def _choose_cutoff(times: pl.Series) -> object:
    """Return the chosen cutoff; the position from the end is kept in the URL."""
    last = min(times.len() - 1, _FURTHEST)
    wanted = address.get("back", "0")
    back = address.whole_number(wanted, 0, last)
    if back is None and address.is_news():
        warn_of_link("steps back", wanted)
    choice = 0
    if last:
        address.adopt("choice-back", back or 0, valid=st.session_state.get("choice-back", 0) <= last)
        choice = st.slider("Steps back from the newest cutoff", 0, last, key="choice-back")
    address.put("back", str(choice))
    cutoff = times[times.len() - 1 - choice]
    st.caption(f"Cutoff **{moment(cutoff)}**: the model sees nothing that was observed after it.")
    return cutoff


def _fan(shown: Shown) -> None:
    cutoff, horizon = shown.forecast["cutoff"][0], shown.forecast.height
    values = shown.rows.select("time", pl.col(shown.variate).alias("value"))
    history = values.filter(pl.col("time") <= cutoff).tail(max(3 * horizon, 96))
    ends = shown.forecast["time"].max()
    actual = values.filter(pl.col("time") > cutoff, pl.col("time") <= ends).filter(pl.col("value").is_not_null().any())
    figure = charts.fan_chart(history, shown.forecast, actual=actual, variate=shown.variate)
    if shown.paths is not None:
        quality_charts.add_paths(figure, shown.paths.filter(pl.col("path") < _LINES))
    st.plotly_chart(figure, width="stretch", key="fan")
    if shown.paths is not None:
        _totals(shown.paths, horizon)
    _errors(shown.forecast, actual)


def _totals(paths: pl.DataFrame, horizon: int) -> None:
    """Say what the paths tell about the horizon as a whole."""
    wholes = paths.group_by("path").agg(pl.col("value").mean().alias("Mean"), pl.col("value").max().alias("Highest"))
    parts = []
    for name in ("Mean", "Highest"):
        low, middle, high = (wholes[name].quantile(level, "linear") or 0.0 for level in (0.05, 0.5, 0.95))
        parts.append(f"{name} of the {horizon} steps: **{middle:.4g}**, with 90 % between {low:.4g} and {high:.4g}.")
    st.caption(" ".join([f"{_LINES} of {_PATHS} possible futures, each a whole.", *parts]))


def _errors(forecast: pl.DataFrame, actual: pl.DataFrame) -> None:
    joined = forecast.join(actual.rename({"value": "actual"}), on="time", how="inner").drop_nulls("actual")
    if joined.is_empty():
        st.caption("Nothing has been observed after this cutoff yet.")
        return
    error = (joined["actual"] - joined["mean"]).abs().to_numpy()
    cells = [("Mean absolute error", f"{error.mean():.3g}"), ("Largest error", f"{error.max():.3g}")]
    for low, high, coverage in charts.quantile_pairs(forecast.columns):
        inside = ((joined["actual"] >= joined[low]) & (joined["actual"] <= joined[high])).to_numpy().mean()
        cells.append((f"Inside the {coverage:.0%} interval", f"{inside:.0%}"))
    for column, (label, value) in zip(st.columns(len(cells)), cells, strict=True):
        column.metric(label, value)
    if joined.height < forecast.height:
        st.caption(f"Over the {joined.height} of {forecast.height} steps observed so far.")


def _parts(shown: Shown) -> None:
    if shown.parts is None:
        return
    st.subheader("Parts of this forecast")
    if shown.parts.is_empty():
        st.caption("This model has no additive parts to show.")
        return
    nothing = pl.col("value").abs().max().over("component") == 0
    absent = shown.parts.filter(nothing)["component"].unique(maintain_order=True).to_list()
    note = "They add up to the forecast; every panel has its own scale."
    st.caption(note + (f" Zero throughout, not drawn: {plain(', '.join(absent))}." if absent else ""))
    drawn = shown.parts.filter(~nothing)
    if not drawn.is_empty():
        st.plotly_chart(charts.components_chart(drawn), width="stretch", key="parts")


_Draw = Callable[[pl.DataFrame, dict[str, Any]], None]


def _chart(name: str, note: str, chart: Callable[[pl.DataFrame], Any]) -> _Draw:
    """Return how a part of an explanation is drawn that needs nothing else of the model."""

    def draw(records: pl.DataFrame, facts: dict[str, Any]) -> None:
        st.caption(note)
        st.plotly_chart(chart(records), width="stretch", key=f"learnt-{name}")

    return draw


def _coupling(records: pl.DataFrame, facts: dict[str, Any]) -> None:
    if records.is_empty():
        st.caption("No coupling matrix: the model keeps variates apart, or has one, or more than 64.")
        return
    if records["effect"].max() == 0:
        st.caption("No variate moves another: the network adds nothing to the forecast.")
        return
    st.caption(
        "How much the forecast of one variate moves, root mean square over the horizon, when the last value of another "
        "is one deviation higher in a window at its mean. The linear part is left out; grey: a variate's own effect."
    )
    names = dict(enumerate(facts["variates"]))
    named = pl.col("source", "variate").replace_strict(names, return_dtype=pl.String)
    st.plotly_chart(model_charts.coupling_chart(records.with_columns(named)), width="stretch", key="learnt-coupling")


_SCALES = {
    "layer": "layer",
    "head": "head",
    "direction": "direction",
    "memory": "memory (steps)",
    "period": "period (steps)",
    "reach": "reach (variates)",
    "into_time": "variates into time",
    "into_variates": "time into variates",
}


def _time_scales(records: pl.DataFrame, facts: dict[str, Any]) -> None:
    coupled = records["reach"].is_not_null().any()
    more = (
        " and the number of variates. The last columns of the table are the learnt coupling (A2, A3) as a share of "
        "what stability allows"
    )
    st.caption(
        "How long the states of each head last, until 1/e is left: the median, the middle 80 % and, as a diamond, the "
        f"median period. Dotted: the context{more if coupled else ''}."
    )
    figure = model_charts.time_scales_chart(
        records, step=facts["freq"], context=facts["context_length"], variates=len(facts["variates"])
    )
    st.plotly_chart(figure, width="stretch", key="learnt-time-scales")
    shown = [name for name in _SCALES if records[name].is_not_null().any()]
    table(records, {name: _SCALES[name] for name in shown}, percentages=("into_time", "into_variates"))


def _order(records: pl.DataFrame, facts: dict[str, Any]) -> None:
    st.caption("The order that the coupling runs along, both ways: neighbours are variates that move together.")
    names = [facts["variates"][number] for number in records.sort("position")["variate"]]
    st.write(plain(", ".join(names)))


def _observer(records: pl.DataFrame, facts: dict[str, Any]) -> None:
    st.caption(
        "How much an observation corrects the state that the model predicted for it, chosen after training by the "
        "smallest one-step error. That error is in deviations of the variate within its context."
    )
    names = dict(enumerate(facts["variates"]))
    named = records.with_columns(pl.col("variate").replace_strict(names, return_dtype=pl.String))
    st.plotly_chart(model_charts.observer_chart(named), width="stretch", key="learnt-observer")
    headings = {"variate": "variate", "gain": "gain", "one_step_error": "one-step error"}
    table(named, {name: heading for name, heading in headings.items() if name in named.columns})


def _race(records: pl.DataFrame, facts: dict[str, Any]) -> None:
    st.caption(
        "What was tried, on how many held-out folds, and what became of it. The error is the mean over stretches of "
        "held-out time in deviations of each variate, its spread the standard error; errors over one fold and over "
        "several do not compare. Weights sum to 1."
    )
    headings = {
        "candidate": "candidate",
        "weight": "weight",
        "error": "error",
        "spread": "spread",
        "folds": "folds",
        "seconds": "seconds",
        "why": "outcome",
    }
    table(records, headings)


_DRAWN: dict[str, _Draw] = {  # parts of an explanation that people would rather look at than read
    "kernels": _chart(
        "kernels",
        "Impulse responses of some features, from the shortest to the longest memory, each as a share of its peak.",
        model_charts.kernels_chart,
    ),
    "timescales": _chart(
        "timescales",
        "How many steps back hold 95 % of a feature's weight, against the step size of its system.",
        model_charts.memory_chart,
    ),
    "time_scales": _time_scales,
    "coupling": _coupling,
    "order": _order,
    "observer": _observer,
    "race": _race,
    "autoregressive_kernel": _chart(
        "autoregressive_kernel",
        "Weights that all variates share: what a row of the context, relative to the last one, adds to each step.",
        graph_charts.kernel_chart,
    ),
}


def _explanation(facts: dict[str, Any], variate: str) -> None:
    with st.expander("What the model learnt"):
        found = {name: records for name, records in facts["explanation"].items() if records or name == "coupling"}
        if not found:
            st.caption("Nothing recorded for this model.")
            return
        kept = facts["provenance"].get("training")
        training = kept if isinstance(kept, dict) else {}
        if training.get("epochs") and training.get("best_epoch", 0) < 0:
            earlier = training.get("started_from")
            start = f"the weights of {plain(earlier)} that it began at" if earlier else "its closed-form start"
            st.info(f"This fit kept {start}: training did not clearly improve on that, and was taken back.")
        tabs = st.tabs([name.replace("_", " ") for name in found])
        for tab, (name, records) in zip(tabs, found.items(), strict=True):
            with tab:
                if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
                    st.json(records, expanded=False)
                elif name in _DRAWN:
                    _DRAWN[name](pl.DataFrame(records, infer_schema_length=None), facts)
                else:
                    table(_named(records, facts, variate))


def _named(records: list[dict[str, Any]], facts: dict[str, Any], variate: str) -> list[dict[str, Any]]:
    """Return the records of one variate, with names for the numbers of variates and known covariates."""
    names, covariates = facts["variates"], facts["covariates"]
    chosen = []
    for record in records:
        number = record.get("variate")
        if number is not None and names[number] != variate:
            continue
        shown = {key: value for key, value in record.items() if key != "variate"}
        if isinstance(shown.get("column"), str):
            kind, _, place = shown["column"].partition(" ")
            number = address.whole_number(place, 0, len(covariates.get(kind, ())) - 1)
            if number is not None:
                shown["column"] = covariates[kind][number]
        chosen.append(shown)
    return chosen
